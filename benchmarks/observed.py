"""
The cost of being watched: ``python -m benchmarks.observed [--rounds 7] [--parts traces viewer scraper]``.

Short rounds alternate in one run. *off*: a worker alone. *on*: the same with tracing by the OpenTelemetry API (no SDK), the
counters of history that are always written, a dashboard whose stream of events one viewer reads, and metrics that are scraped
each second. Each round is compared with its neighbour alone, and the figure is the median of these ratios: of the jobs that a
second of processor time of worker and server drains, since other programs on the machine slow a clock. Goal: at least 0.97 × off.
`--parts` turns on only those, to find what costs.
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
from benchmarks.harness import NAMESPACE, TEXT, Bench, running_dashboard, running_server

GOAL = 0.97
PARTS = ("traces", "viewer", "scraper")
TRACED = "CONVEYOR_BENCH_TRACED"
"""The variable with which `measured_jobs` adds the middleware of OpenTelemetry to its app."""


def observed(bench: Bench, rounds: int, parts: Collection[str] = PARTS) -> bool:
    """Compare the costs and rates of rounds with and without *parts* turned on; return whether the goal is reached."""
    from benchmarks import measured_jobs

    count = bench.size(200_000)
    spent = defaultdict[str, list[Cost]](list)
    with running_dashboard(bench.url, NAMESPACE) as base:  # which reads nothing while nobody looks
        for number in range(rounds):
            for name in ("off", "on") if number % 2 else ("on", "off"):
                bench.flush()
                measured_jobs.app.enqueue_many(measured_jobs.noop.s(at, TEXT) for at in range(count))
                with ExitStack() as stack:
                    if name == "on":
                        for part in parts:
                            stack.enter_context(_turned_on(part, base))
                    spent[name].append(Cost.between(*drained(bench, "async", 1)))
    bench.flush()
    for name, costs in spent.items():
        note_costs(bench, f"observed {name}", costs)
        bench.note(f"observed {name} commands/job", statistics.median(cost.sent for cost in costs))
    pairs = list(zip(spent["off"], spent["on"], strict=True))
    bench.note("observed of off", statistics.median(on.rate / off.rate for off, on in pairs))
    by_cpu = [off.cpu / on.cpu for off, on in pairs]
    print("  ".join(f"{one:.3f}" for one in sorted(by_cpu)))
    bench.note("observed of off, by CPU", statistics.median(by_cpu))
    return statistics.median(by_cpu) >= GOAL


def _turned_on(part: str, base: str) -> AbstractContextManager[None]:
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
