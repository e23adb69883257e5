"""Time limits of all kinds of tasks, and the resources of a worker that lives long."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conveyor.store import inspection
from support.worker_processes import WorkerProcesses, wait, worker_processes

Rounds = Callable[[int, int], int]
pytestmark = pytest.mark.leaves_keys("what is left is taken away by its fixture")


@pytest.mark.row("A9")
def test_time_limits_of_all_kinds(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """Over its limit a coroutine is cancelled, a process killed, a thread waited for or left with its process; never two at once."""
    many, few = rounds(100, 8), rounds(100, 2)
    with worker_processes(url, tmp_path, WORKERS_AFTER_TIMEOUT="0.2") as one:
        kinds = {"slow": many, "deaf": many, "apart": few, "stuck": few}
        names: dict[int, str] = {}
        for kind, count in kinds.items():
            numbers = range(len(names), len(names) + count)
            names |= dict.fromkeys(numbers, kind)
            task, seconds = getattr(one.tasks, kind), {"deaf": 0.01, "stuck": 2.0}.get(kind, 30.0)
            one.app.enqueue_many(task.s(n, seconds) for n in numbers)
        one.start(processes=2)
        wait(one.drained, rounds(600, 150))

        starts, one_run = one.starts(), {"deaf"}
        for n, kind in names.items():
            attempts = [line.attempt for line in starts[n]]
            if kind == "apart":  # its limit counts from before its process starts, which may take all of it
                assert set(attempts) <= {1, 2}
            else:
                assert attempts == ([1] if kind in one_run else [1, 2]), kind
        ends = {(line.n, line.attempt): line.at for line in one.journal if line.what == "end"}
        assert {names[n] for n, _ in ends} <= {"deaf", "stuck"}
        for n in (n for n, kind in names.items() if kind == "stuck"):
            first, second = starts[n]  # its end was written, or it ended with its process
            assert ends[n, 1] < second.at if (n, 1) in ends else first.pid != second.pid
        rows = one.app.client.run(inspection.list_jobs(one.keys, "dead", 0, 1000)).rows
        assert Counter(row.envelope.task for row in rows) == kinds
        assert {row.state.failures_list()[-1].type for row in rows} == {"TimeoutError"}
        assert {row.state.crashes for row in rows} == {0}
        assert one.log.count("to be replaced by a fresh one") > 0
        assert one.is_sound()


def footprint(pid: int) -> tuple[int, list[str], int]:
    """Return a process's resident memory in KiB, its open files and how many threads it has."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = sorted(re.sub(r"\d+", "N", os.readlink(one)) for one in Path(f"/proc/{pid}/fd").iterdir())
    return int(status["VmRSS"].split()[0]), files, int(status["Threads"])


def at_rest(pid: int) -> tuple[int, list[str], int]:
    """Return the footprint once it does not change: an idle worker opens what it waits on a moment later."""
    seen = None

    def at_last() -> tuple[int, list[str], int] | None:
        nonlocal seen
        time.sleep(0.3)
        before = seen
        try:
            seen = footprint(pid)
        except FileNotFoundError:  # closed while we looked
            return None
        return seen if before is not None and seen[1:] == before[1:] else None

    found: tuple[int, list[str], int] = wait(at_last)
    return found


def feed(one: WorkerProcesses, count: int) -> None:
    """Enqueue *count* jobs and wait until they are done."""
    for first in range(0, count, 5000):
        some = range(first, min(count, first + 5000))
        one.app.enqueue_many((one.tasks.idle if n % 10 == 0 else one.tasks.noop).s(n) for n in some)
        wait(lambda: one.counts().ready < 5000)
    wait(one.drained)


@pytest.mark.row("A16", "I10")
def test_a_long_life_costs_nothing(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """After many thousand jobs, each run once, a worker has the memory, the files and the threads it had when it was warm."""
    count = rounds(1_000_000, 50_000)
    with worker_processes(url, tmp_path) as one:
        supervisor = one.start()
        feed(one, count // 4)
        (pid,) = one.children(supervisor)
        before = at_rest(pid)
        feed(one, count - count // 4)
        after = at_rest(pid)
        print(f"{count} jobs: {before[0]} KiB before, {after[0]} KiB after")

        assert after[0] < before[0] * 1.05 + 2048
        assert after[1:] == before[1:]
        assert one.completions() == count
        one.tasks.tell.enqueue(0)
        wait(one.drained)
        assert [(line.what, line.n) for line in one.journal] == [("runs", count)]
