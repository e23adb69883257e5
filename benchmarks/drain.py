"""Conveyor as a worker sees it: how fast real `conveyor worker` processes empty a queue, and at what cost."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.harness import NAMESPACE, TEXT, Bench, Worker, commands_run, commands_sent, cpu_seconds, wait_for


@dataclass(frozen=True)
class Snapshot:
    """The state of things at one instant of a drain."""

    time: float
    left: int
    commands: int
    run: int
    server_cpu: float
    worker_cpu: float


class Cost(NamedTuple):
    """Jobs a second, and for each job the CPU seconds of the server and the worker, and the commands sent and run."""

    rate: float
    server: float
    worker: float
    sent: float
    run: float

    @property
    def cpu(self) -> float:
        """CPU seconds of both for each job."""
        return self.server + self.worker

    @classmethod
    def between(cls, first: Snapshot, last: Snapshot) -> Cost:
        """Return the cost of what was drained between two snapshots."""
        done = first.left - last.left
        return cls(
            done / (last.time - first.time), (last.server_cpu - first.server_cpu) / done,
            (last.worker_cpu - first.worker_cpu) / done, (last.commands - first.commands) / done, (last.run - first.run) / done,
        )  # fmt: skip


def drain(bench: Bench) -> None:
    """Drain no-op jobs with one and with two worker processes, async and sync, with results that are kept, and in batches."""
    from benchmarks import measured_jobs

    count = bench.size(100_000)
    jobs = measured_jobs
    for call, queue in (
        (jobs.noop.s, "async"), (jobs.noop_sync.s, "sync"), (jobs.echo.s, "kept"),
        (lambda number, text: jobs.batched.s((number, text)), "batched"),
    ):  # fmt: skip
        for processes in (1, 2):
            if queue in {"kept", "batched"} and processes == 2:
                continue
            bench.flush()
            measured_jobs.app.enqueue_many(call(number, TEXT) for number in range(count * processes))
            first, last = drained(bench, queue, processes)
            name = f"ours drain {queue} {processes}"
            cost = Cost.between(first, last)
            note_costs(bench, name, [cost])
            bench.note(f"{name} commands/job", cost.sent)
    bench.flush()


def levelled(bench: Bench) -> None:
    """
    Drain no-op jobs of 10,000 groups, of one, of one opened, under a limit with room, and with unique keys; and plain ones.

    Short rounds of plain jobs and of the others alternate, and each round is compared with its neighbour alone.
    """
    from benchmarks import measured_jobs as jobs

    count, rounds = (20_000, 2) if bench.quick else (100_000, 5)
    calls = {
        "async": jobs.noop.s,
        "grouped": lambda number, text: jobs.grouped.s(number % (count // 10), text),
        "strict": lambda _, text: jobs.strict.s(1, text),
        "opened": lambda _, text: jobs.opened.s(1, text),
        "limited": jobs.limited.s,
        "keyed": jobs.keyed.s,
    }
    spent = defaultdict[str, list[Cost]](list)
    for kind in (name for name in calls if name != "async"):
        for number in range(rounds):
            for queue in ("async", kind) if number % 2 else (kind, "async"):
                bench.flush()
                jobs.app.enqueue_many(calls[queue](at, TEXT) for at in range(count))
                spent[queue].append(Cost.between(*drained(bench, queue, 1)))
        pairs = list(zip(spent["async"][-rounds:], spent[kind], strict=True))
        name = f"ours levelled {kind}"
        bench.note(f"{name} of plain", statistics.median(one.rate / plain.rate for plain, one in pairs))
        bench.note(f"{name} of plain, by CPU", statistics.median(plain.cpu / one.cpu for plain, one in pairs))
    for queue, costs in spent.items():
        note_costs(bench, f"ours levelled {queue}", costs)
        bench.note(f"ours levelled {queue} commands/job", statistics.median(cost.run for cost in costs))
    bench.flush()


def note_costs(bench: Bench, name: str, costs: Sequence[Cost]) -> None:
    """Note the rate and the costs of drains, the median of each."""
    bench.note(f"{name} /s", statistics.median(cost.rate for cost in costs))
    bench.note(f"{name} server us/job", statistics.median(cost.server for cost in costs) * 1e6)
    bench.note(f"{name} worker us/job", statistics.median(cost.worker for cost in costs) * 1e6)


def live_jobs(client: Any, queue: str) -> int:
    """Return how many jobs are accepted and not finished: those leased too, which `len(queue)` leaves out."""
    return int(client.hlen(f"{NAMESPACE}:{{{queue}}}:jobs"))


def drained(bench: Bench, queue: str, processes: int, parts: Sequence[str] = ()) -> tuple[Snapshot, Snapshot]:
    """
    Return the snapshots at about 10 % and 90 %, so that neither start-up nor the tail is measured.

    *parts* are the partitions of the queue, where it has any.
    """
    parts = parts or (queue,)
    with bench.client() as client:
        total = _live(client, parts)
        with Worker(bench, "-q", queue, "--processes", str(processes), "--burst") as worker:

            def reached(left: float) -> bool:
                worker.check()
                return _live(client, parts) <= left

            wait_for(lambda: reached(total * 0.9), "a tenth to be drained", within=120)
            first = _snapshot(bench, worker, client, parts)
            wait_for(lambda: reached(total * 0.1), "nine tenths to be drained", within=120)
            last = _snapshot(bench, worker, client, parts)
            worker.process.wait(60)
            worker.check()
        if left := _live(client, parts):
            raise RuntimeError(f"The worker said that {queue} was drained, and left {left} jobs.")
    return first, last


def _live(client: Any, parts: Sequence[str]) -> int:
    return sum(live_jobs(client, part) for part in parts)


def _snapshot(bench: Bench, worker: Worker, client: Any, parts: Sequence[str]) -> Snapshot:
    worker_cpu, server_cpu, commands = worker.cpu(), cpu_seconds(bench.server_pid), commands_sent(client)
    return Snapshot(time.perf_counter(), _live(client, parts), commands, commands_run(client), server_cpu, worker_cpu)


def partitions(bench: Bench) -> None:
    """Push and drain no-op jobs of a queue in one piece, and of queues in 4 and 16 partitions."""
    from benchmarks import measured_jobs

    count = bench.size(100_000)
    for number in measured_jobs.PARTED:
        bench.flush()
        task, queue = measured_jobs.parted[number], f"parted{number}"
        measured_jobs.app.enqueue_many([task.s(0, TEXT)] * number)  # connects, and agrees on the number of partitions
        parts = [queue] if number == 1 else [f"{queue}/{at}" for at in range(number)]
        with bench.client() as client:
            used, ran = cpu_seconds(bench.server_pid), commands_run(client)
            measured_jobs.app.enqueue_many(task.s(at, TEXT) for at in range(count))
            bench.note(
                f"ours push {number} partitions server us/job", (cpu_seconds(bench.server_pid) - used) / count * 1e6
            )
            bench.note(f"ours push {number} partitions commands/job", (commands_run(client) - ran) / count)
        first, last = drained(bench, queue, 1, parts)
        done = first.left - last.left
        bench.note(f"ours drain {number} partitions server us/job", (last.server_cpu - first.server_cpu) / done * 1e6)
        bench.note(f"ours drain {number} partitions commands/job", (last.run - first.run) / done)
    bench.flush()


def depth(bench: Bench) -> None:
    """
    Compare the rate in a queue that holds a million jobs with that in one that holds a thousand.

    A producer keeps each as deep as it is while it is drained, so that both runs do the same work on the same cores.
    """
    bench.flush()
    count = 50_000 if bench.quick else 150_000
    for backlog in (1_000, 200_000 if bench.quick else 1_000_000):
        bench.flush()
        name = "ours drain at 1,000 /s" if backlog == 1_000 else "ours drain deep /s"
        bench.note(name, statistics.median(_steady(bench, backlog, count // 3)))
    bench.flush()


def _steady(bench: Bench, backlog: int, count: int) -> list[float]:
    """Return three rates, each over *count* jobs, in a queue kept at *backlog*."""
    from benchmarks.measured_jobs import app, deep

    queue, ready = app.queue("depth"), f"{NAMESPACE}:{{depth}}:ready:0"
    queue.pause()
    app.enqueue_many(deep.s(number, TEXT) for number in range(backlog))
    accepted = backlog
    rates: list[float] = []
    with Worker(bench, "-q", "depth", "--processes", "1") as worker, bench.client() as client:
        queue.resume()
        goal, since = 20_000, 0.0
        while len(rates) < 3:
            worker.check()
            if client.llen(ready) < backlog:
                accepted += len(app.enqueue_many([deep.s(number, TEXT) for number in range(1_000)]))
            if accepted - live_jobs(client, "depth") >= goal:
                now = time.perf_counter()
                if since:
                    rates.append(count / (now - since))
                since, goal = now, goal + count
        queue.pause()  # the rest is thrown away
    return rates
