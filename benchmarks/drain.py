"""Conveyor as a worker sees it: how fast real `conveyor worker` processes empty a queue, and at what cost."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import NAMESPACE, TEXT, Bench, Worker, commands_sent, cpu_seconds, wait_for
from benchmarks.record import Record

if TYPE_CHECKING:
    from conveyor import Conveyor


@dataclass(frozen=True)
class Snapshot:
    """The state of things at one instant of a drain."""

    time: float
    left: int
    commands: int
    server_cpu: float
    worker_cpu: float


def drain(bench: Bench) -> None:
    """Drain no-op jobs with one and with two worker processes, async and sync, and with results that are kept."""
    from benchmarks import jobs

    count = bench.size(100_000)
    for task, queue in ((jobs.noop, "async"), (jobs.noop_sync, "sync"), (jobs.echo, "kept")):
        for processes in (1, 2):
            if queue == "kept" and processes == 2:
                continue
            bench.flush()
            jobs.app.enqueue_many(task.s(number, TEXT) for number in range(count * processes))
            first, last = _drain(bench, queue, processes)
            done, seconds = first.left - last.left, last.time - first.time
            name = f"ours drain {queue} {processes}"
            bench.note(f"{name} /s", done / seconds)
            bench.note(f"{name} server us/job", (last.server_cpu - first.server_cpu) / done * 1e6)
            bench.note(f"{name} worker us/job", (last.worker_cpu - first.worker_cpu) / done * 1e6)
            bench.note(f"{name} commands/job", (last.commands - first.commands) / done)
    bench.flush()


def live_jobs(client: Any, queue: str) -> int:
    """Return how many jobs are accepted and not finished: those leased too, which `len(queue)` leaves out."""
    return int(client.hlen(f"{NAMESPACE}:{{{queue}}}:jobs"))


def _drain(bench: Bench, queue: str, processes: int) -> tuple[Snapshot, Snapshot]:
    """Return the snapshots at about 10 % and 90 %, so that neither start-up nor the tail is measured."""
    with bench.client() as client:
        total = live_jobs(client, queue)
        with Worker(bench, "-q", queue, "--processes", str(processes), "--burst") as worker:

            def reached(left: float) -> bool:
                worker.check()
                return live_jobs(client, queue) <= left

            wait_for(lambda: reached(total * 0.9), "a tenth to be drained", within=120)
            first = _snapshot(bench, worker, client, queue)
            wait_for(lambda: reached(total * 0.1), "nine tenths to be drained", within=120)
            last = _snapshot(bench, worker, client, queue)
            worker.process.wait(60)
            worker.check()
        if left := live_jobs(client, queue):
            raise RuntimeError(f"The worker said that {queue} was drained, and left {left} jobs.")
    return first, last


def _snapshot(bench: Bench, worker: Worker, client: Any, queue: str) -> Snapshot:
    worker_cpu, server_cpu, commands = worker.cpu(), cpu_seconds(bench.server_pid), commands_sent(client)
    return Snapshot(time.perf_counter(), live_jobs(client, queue), commands, server_cpu, worker_cpu)


def depth(bench: Bench) -> None:
    """Compare the rate in a queue of a million with that in bursts of 1,000, and in a queue of 20,000."""
    from benchmarks.jobs import app

    bench.flush()
    queue, record = app.queue("depth"), Record(bench.record_path)
    with Worker(bench, "-q", "depth", "--processes", "1") as worker, bench.client() as client:
        runs = [_marked(app, record, worker, client, 1000, 0, 999) for _ in range(15 if bench.quick else 50)]
        bench.note("ours drain at 1,000 /s", statistics.median(runs[5:]))
        runs = [_marked(app, record, worker, client, 20_000, 2_000, 18_000) for _ in range(3)]
        bench.note("ours drain at 20,000 /s", statistics.median(runs))
        deep = 200_000 if bench.quick else 1_000_000
        bench.note("ours drain deep /s", _marked(app, record, worker, client, deep, 2_000, 52_000))
        queue.pause()  # the rest is thrown away
    bench.flush()


def _marked(app: Conveyor, record: Record, worker: Worker, client: Any, count: int, first: int, last: int) -> float:
    """Fill the paused queue with *count* jobs, let it go, and return the rate between two of them."""
    from benchmarks.jobs import mark

    queue = app.queue("depth")
    wait_for(lambda: live_jobs(client, "depth") == 0, "the queue to be empty")
    queue.pause()
    marks = {first: -1, last: -2}
    app.enqueue_many(mark.s(marks.get(number, number), TEXT) for number in range(count))
    queue.resume()
    times: dict[int, int] = {}

    def both_seen() -> bool:
        worker.check()
        times.update((line.number, line.value) for line in record.read())
        return len(times) == 2

    wait_for(both_seen, "the marked jobs", within=60)
    return (last - first) / (times[-2] - times[-1]) * 1e9
