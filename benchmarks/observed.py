"""
The cost of being watched: ``python -m benchmarks.observed [--rounds 7] [--parts traces viewer scraper]``.

Short rounds alternate in one run. *off*: a worker alone. *again*: the same once more. *on*: with tracing by the OpenTelemetry API
(no SDK), the counters of history that are always written, a dashboard whose stream of events one viewer reads, and metrics that
are scraped each second. Each round is compared with the two alone beside it, and the figure is the median of these ratios: of the
jobs that a second of processor time of worker and server drains, since other programs on the machine slow a clock. Goal: at
least 0.97 × alone. The ratio of *again* to *off* says what the machine can tell: where it is off 1, so is the figure. `--parts`
turns on only those, to find what costs.

Before that, watching alone is measured for some seconds, with a full queue and no worker: the processor time of the server and of
the dashboard's own process, and the commands, each a second. On a machine of two cores that process takes its time from the
other two; the figure of the rounds leaves it out.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from benchmarks.drain import Cost, drained, note_costs
from benchmarks.harness import NAMESPACE, TEXT, Bench, commands_run, cpu_seconds, running_dashboard, running_server

GOAL = 0.97
PARTS = ("traces", "viewer", "scraper")
KINDS = ("off", "again", "on")
WATCHED_SECONDS = 10.0
TRACED = "CONVEYOR_BENCH_TRACED"
"""The variable with which `measured_jobs` adds the middleware of OpenTelemetry to its app."""


def observed(bench: Bench, rounds: int, parts: Collection[str] = PARTS) -> bool:
    """Compare the costs and rates of rounds with and without *parts* turned on; return whether the goal is reached."""
    from benchmarks import measured_jobs

    count = bench.size(200_000)
    spent = defaultdict[str, list[Cost]](list)
    with running_dashboard(bench.url, NAMESPACE) as (base, dashboard):  # which reads nothing while nobody looks
        bench.flush()
        measured_jobs.app.enqueue_many(measured_jobs.noop.s(at, TEXT) for at in range(count))
        _note_watching(bench, parts, base, dashboard)
        for number in range(rounds):
            for name in KINDS[number % 3 :] + KINDS[: number % 3]:
                bench.flush()
                measured_jobs.app.enqueue_many(measured_jobs.noop.s(at, TEXT) for at in range(count))
                with _turned_on(parts if name == "on" else (), base):
                    spent[name].append(Cost.between(*drained(bench, "async", 1)))
    bench.flush()
    for name, costs in spent.items():
        note_costs(bench, f"observed {name}", costs)
        bench.note(f"observed {name} commands/job", statistics.median(cost.sent for cost in costs))
    off, again, on = (spent[name] for name in KINDS)
    alone = [(one.rate + other.rate) / 2 for one, other in zip(off, again, strict=True)]
    alone_cpu = [(one.cpu + other.cpu) / 2 for one, other in zip(off, again, strict=True)]
    _note_ratios(bench, "again of off", again, [one.rate for one in off], [one.cpu for one in off])
    return _note_ratios(bench, "on of alone", on, alone, alone_cpu) >= GOAL


def _note_ratios(bench: Bench, name: str, costs: list[Cost], rates: list[float], cpus: list[float]) -> float:
    """Note the medians of the ratios of *costs* to others of the same round; return that of processor time."""
    bench.note(f"observed {name}", statistics.median(one.rate / rate for one, rate in zip(costs, rates, strict=True)))
    by_cpu = [cpu / one.cpu for one, cpu in zip(costs, cpus, strict=True)]
    print("  ".join(f"{one:.3f}" for one in sorted(by_cpu)))
    bench.note(f"observed {name}, by CPU", statistics.median(by_cpu))
    return statistics.median(by_cpu)


def _note_watching(bench: Bench, parts: Collection[str], base: str, dashboard: int) -> None:
    """Note what a second of watching costs the server and the process of the dashboard, less what passes while nobody looks."""

    def spent() -> tuple[float, ...]:
        return time.perf_counter(), cpu_seconds(bench.server_pid), cpu_seconds(dashboard), commands_run(client)

    costs = []
    with bench.client() as client:
        for some in ((), parts):
            with _turned_on(some, base):
                time.sleep(2)  # the first answers read more
                began = spent()
                time.sleep(WATCHED_SECONDS)
                took, *used = (after - before for before, after in zip(began, spent(), strict=True))
                costs.append([one / took for one in used])
    server, process, ran = (on - off for off, on in zip(*costs, strict=True))
    bench.note("watching server ms/s", server * 1000)
    bench.note("watching dashboard ms/s", process * 1000)
    bench.note("watching commands/s", ran)


@contextmanager
def _turned_on(parts: Collection[str], base: str) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_part(part, base))
        yield


def _part(part: str, base: str) -> AbstractContextManager[None]:
    if part == "traces":
        return _environment_variable(TRACED, "1")
    return _viewer(base) if part == "viewer" else _scraper(base)


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _viewer(base: str) -> Iterator[None]:
    """Read the stream of events as a page does; at the end it must have brought some."""
    ended, read = threading.Event(), 0

    def follow() -> None:
        nonlocal read
        with urllib.request.urlopen(base + "api/v1/stream", timeout=60) as stream:
            for line in stream:
                read += len(line)
                if ended.is_set():
                    return

    with _thread(follow, ended):
        yield
    if not read:
        raise RuntimeError("The stream of events brought nothing.")


@contextmanager
def _scraper(base: str) -> Iterator[None]:
    """Ask for the metrics each second, as Prometheus would."""
    ended, scraped = threading.Event(), 0

    def scrape() -> None:
        nonlocal scraped
        while True:
            with urllib.request.urlopen(base + "metrics", timeout=60) as answer:
                scraped += len(answer.read())
            if ended.wait(1):
                return

    with _thread(scrape, ended):
        yield
    if not scraped:
        raise RuntimeError("There were no metrics to scrape.")


@contextmanager
def _thread(work: object, ended: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(30)


def main() -> int:
    """Return 0 when the goal is reached."""
    parser = ArgumentParser(prog="python -m benchmarks.observed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each kind (default 7)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is turned on (default: all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the jobs: for a look, not for a figure")
    options = parser.parse_args()
    with running_server() as (url, pid), tempfile.TemporaryDirectory(prefix="bench") as directory:
        os.environ["CONVEYOR_URL"] = url  # before benchmarks.measured_jobs is imported
        bench = Bench(url, pid, options.quick, 0, Path(directory) / "record")
        began = time.monotonic()
        reached = observed(bench, options.rounds, options.parts)
        print(f"{time.monotonic() - began:.0f} s; goal: at least {GOAL}, {'reached' if reached else 'missed'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
