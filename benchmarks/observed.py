"""
The cost of being watched: ``python -m benchmarks.observed [--rounds 3]``.

Rounds alternate in one run. *off*: a worker alone. *on*: the same with tracing by the OpenTelemetry API (no SDK), the counters of
history that are always written, a dashboard whose stream of events one viewer reads, and metrics that are scraped each second.
Goal: a drain rate of at least 0.97 × off. Counts, which no other program on the machine disturbs, stand beside the rates.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.drain import Snapshot, drained
from benchmarks.harness import TEXT, Bench, environment, running_server, wait_for

TRACED = "CONVEYOR_BENCH_TRACED"
"""The variable with which `measured_jobs` adds the middleware of OpenTelemetry to its app."""


def observed(bench: Bench, rounds: int) -> bool:
    """Compare the rates and the costs of rounds with and without everything on; return whether the goal is reached."""
    from benchmarks import measured_jobs

    count = bench.size(100_000)
    ratios: list[float] = []
    for _ in range(rounds):
        pair: dict[str, float] = {}
        for name in ("off", "on"):
            bench.flush()
            measured_jobs.app.enqueue_many(measured_jobs.noop.s(number, TEXT) for number in range(count))
            if name == "off":
                first, last = drained(bench, "async", 1)
            else:
                with _environment_variable(TRACED, "1"), _dashboard(bench) as base, _viewer(base), _scraper(base):
                    first, last = drained(bench, "async", 1)
            pair[name] = _note(bench, name, first, last)
        ratios.append(pair["on"] / pair["off"])
    bench.note("on / off, rate", statistics.median(ratios))
    bench.flush()
    return statistics.median(ratios) >= 0.97


def _note(bench: Bench, name: str, first: Snapshot, last: Snapshot) -> float:
    done = first.left - last.left
    rate = done / (last.time - first.time)
    bench.note_rounds(f"observed {name} /s", [rate])
    bench.note_rounds(f"observed {name} worker us/job", [(last.worker_cpu - first.worker_cpu) / done * 1e6])
    bench.note_rounds(f"observed {name} server us/job", [(last.server_cpu - first.server_cpu) / done * 1e6])
    bench.note_rounds(f"observed {name} commands/job", [(last.commands - first.commands) / done])
    return rate


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _dashboard(bench: Bench) -> Iterator[str]:
    """Run a dashboard of its own process, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}/"
    command = [
        sys.executable, "-m", "conveyor", "dashboard", "--namespace", "bench", "--port", str(port),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(bench))
        try:
            wait_for(lambda: _answers(base), "the dashboard to answer", within=60)
            yield base
        finally:
            process.terminate()
            process.wait(20)


def _answers(base: str) -> bool:
    try:
        with urllib.request.urlopen(base, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


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
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind (default 3)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the jobs: for a look, not for a figure")
    options = parser.parse_args()
    with running_server() as (url, pid), tempfile.TemporaryDirectory(prefix="bench") as directory:
        os.environ["CONVEYOR_URL"] = url  # before benchmarks.measured_jobs is imported
        bench = Bench(url, pid, options.quick, 0, Path(directory) / "record")
        began = time.monotonic()
        reached = observed(bench, options.rounds)
        print(f"{time.monotonic() - began:.0f} s; goal: at least 0.97, {'reached' if reached else 'missed'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
