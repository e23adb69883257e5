"""Workers that stand still: stopped, blocked in their loop, or with the interpreter's lock held."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.events import WorkerStarted
from conveyor.ids import split
from conveyor.store import inspection, operations
from conveyor.store.operations import TurnReport
from support.client_worker import LEASE_MS, ClientWorker
from support.worker_processes import WorkerProcesses, wait, worker_processes

Rounds = Callable[[int, int], int]
QUICK = 0.6
LEASE = 1.2  # where the law is that it is kept, so that a loaded machine can keep it
pytestmark = pytest.mark.leaves_keys("what killed workers leave is taken away by its fixture")


@contextmanager
def told(redis: Any) -> Iterator[Callable[[], Counter[str]]]:
    """Count how often each result is written, by what the server says that it carries out."""
    seen, marks, asked = Counter[str](), SimpleQueue[str](), itertools.count()

    def listen(monitor: Any) -> None:
        while (command := monitor.next_command()["command"]) != "ECHO the end":
            if command.startswith("HSET ") and ":results:" in command:
                seen.update(re.findall(r" ([0-9A-Z_a-z~]{22}) \d+\\n", command))
            elif command.startswith("SET ") and ":result:" in command:
                seen[re.findall(r":result:([0-9A-Z_a-z~]{22}) ", command)[0]] += 1
            elif command.startswith("ECHO "):
                marks.put(command)

    def read() -> Counter[str]:
        redis.echo(mark := f"so far {next(asked)}")
        while marks.get(timeout=30) != f"ECHO {mark}":
            pass
        return seen

    with redis.monitor() as monitor:
        listener = threading.Thread(target=listen, args=(monitor,))
        listener.start()
        try:
            yield read
        finally:
            redis.echo("the end")
            listener.join()


def freeze(dice: random.Random, frozen: dict[int, float], at_work: Callable[[], list[int]]) -> None:
    """Stop a worker that has just started a job, for 1.2 to 5 leases."""
    victim = dice.choice(wait(lambda: [pid for pid in at_work() if pid not in frozen]))
    os.kill(victim, signal.SIGSTOP)
    frozen[victim] = time.monotonic() + dice.uniform(1.2, 5) * QUICK


def thaw(frozen: dict[int, float], *, most: int) -> None:
    """Let go on who was stopped for long enough, until at most *most* are."""
    while len(frozen) > most:
        for pid, until in list(frozen.items()):
            if time.monotonic() > until:
                os.kill(pid, signal.SIGCONT)
                del frozen[pid]
        time.sleep(0.01)


@pytest.mark.row("A3", "I6", "I7")
@pytest.mark.standalone_only(
    "watches the commands of one server", on=("redis6", "redis7", "redis8", "tls", "acl", "sentinel")
)
def test_frozen_workers_change_nothing_afterwards(url: str, redis: Any, tmp_path: Path, rounds: Rounds) -> None:
    """Workers frozen beyond their leases: each job has one result, that of its last attempt, written once."""
    stops = rounds(200, 5)
    dice = random.Random(seed := random.randrange(10**9))
    print(f"seed {seed}")
    with worker_processes(url, tmp_path, lease=f"{QUICK}s") as one, told(redis) as written:
        workers = [one.embed(concurrency=4) for _ in range(4)]
        jobs: list[Any] = []
        frozen: dict[int, float] = {}

        def at_work() -> list[int]:
            if one.counts().ready < 10:
                calls = [one.tasks.told.s(len(jobs) + n, dice.uniform(0.1, 0.4)) for n in range(20)]
                jobs.extend(one.app.enqueue_many(calls))
            seen = len(one.journal)
            time.sleep(0.05)
            return [line.pid for line in one.journal[seen:] if line.what == "start"]

        for _ in range(stops):
            freeze(dice, frozen, at_work)
            thaw(frozen, most=1)
            written()
        thaw(frozen, most=0)
        wait(one.drained, 120)

        starts = one.starts()
        results = {split(job.id)[1]: job.result(timeout=60) for job in jobs}
        assert written() == Counter(results.keys())
        assert one.completions() == len(jobs)
        for n, job in enumerate(jobs):
            attempts = {line.attempt: line.pid for line in starts[n]}  # a thawed worker may start what it has lost
            assert len(attempts) == len(starts[n])
            assert results[split(job.id)[1]] == f"{max(attempts)} {attempts[max(attempts)]}"
        assert sum(map(len, starts.values())) > len(jobs)
        assert one.log.count("the lease was lost") > 0
        assert one.counts().dead == 0
        assert [worker.poll() for worker in workers] == [None] * 4
        assert one.is_sound()


@pytest.mark.row("A4", "I6")
def test_a_late_beat_does_not_restore_a_reaped_worker(url: str, rounds: Rounds) -> None:
    """After a reap no beat, turn or extension under the old identity changes anything, however often it comes."""
    with Conveyor(url) as app:
        queue = app.queue("mail")
        queue.push(1)
        late = ClientWorker(app.client, "mail")
        (job,) = late.take()
        assert app.client.run(operations.reap(late.keys, late.identity)) == 1
        current = ClientWorker(app.client, "mail")
        assert current.take() == [job]
        keys, id_ = late.keys, split(job)[1]

        def ends() -> dict[str, int]:
            return {one.worker: one.end for one in app.client.run(inspection.workers(keys))}

        before = ends()
        for number in range(rounds(1000, 100)):
            assert app.client.run(operations.heartbeat(keys, late.identity, LEASE_MS)) is False
            with pytest.raises(operations.WorkerUnregistered):
                app.client.run(operations.turn(keys, late.identity, 2 + number, 0, LEASE_MS, TurnReport(done=[id_])))
            assert app.client.run(operations.extend(keys, late.identity, id_, "other", LEASE_MS, b"{}")) is False
        assert ends() == before
        assert app.client.run(operations.held_ids(keys, current.identity)) == [id_]
        current.succeed(job)
        app.client.run(operations.reap(keys, current.identity, crashed=False))


def together(one: WorkerProcesses, count: int) -> None:
    """Wait until so many workers are registered."""
    wait(lambda: len(one.app.client.run(inspection.workers(one.keys))) == count)


@pytest.mark.row("A5", "A6")
def test_a_blocked_worker_keeps_its_jobs_under_a_supervisor(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """Jobs that block the loop, or hold the interpreter's lock, for three leases are started once; the log names them."""
    with worker_processes(url, tmp_path, lease=f"{LEASE}s") as one:
        one.start(processes=3, concurrency=1)
        together(one, 3)
        for n in range(rounds(50, 1)):
            jobs = [one.tasks.block.enqueue(2 * n, 3 * LEASE), one.tasks.clutch.enqueue(2 * n + 1, 3 * LEASE)]
            assert [job.result(timeout=60).split()[0] for job in jobs] == ["1", "1"]
            assert f"s in block ({jobs[0].id})" in one.log
            assert re.search(
                r'journal_app\.py", line \d+ in clutch', one.log
            )  # from the kernel's signal: no thread runs
        assert one.repeats() == 0


@pytest.mark.row("A5", "A6")
@pytest.mark.standalone_only(
    "watches the commands of one server", on=("redis6", "redis7", "redis8", "tls", "acl", "sentinel")
)
def test_a_blocked_worker_inside_a_program(url: str, redis: Any, tmp_path: Path, rounds: Rounds) -> None:
    """A blocked loop keeps its job there too; under a held GIL no thread renews: the job runs twice, and the first end is refused."""
    with worker_processes(url, tmp_path, lease=f"{LEASE}s") as one, told(redis) as written:
        for _ in range(3):
            one.embed(concurrency=1)
        for n in range(rounds(50, 1)):
            together(one, 3)
            block, clutch = one.tasks.block.enqueue(2 * n, 3 * LEASE), one.tasks.clutch.enqueue(2 * n + 1, 4 * LEASE)
            assert block.result(timeout=60).split()[0] == "1"
            assert clutch.result(timeout=60).split()[0] == "2"
            assert f"Task block ({block.id}) has blocked" in one.log
            wait(lambda n=n: one.log.count("the lease was lost") > n)
            assert clutch.result(timeout=60).split()[0] == "2"
            assert [written()[split(job.id)[1]] for job in (block, clutch)] == [1, 1]
        assert one.repeats() == rounds(50, 1)


@pytest.mark.row("A5")
@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "embedded"])
def test_a_loop_blocked_too_long_loses_its_jobs(url: str, tmp_path: Path, rounds: Rounds, supervised: bool) -> None:
    """Beyond `max_stall` the job runs elsewhere, while it still blocks its first worker; the result is that of the second run."""
    stall = LEASE
    with worker_processes(url, tmp_path, lease=f"{LEASE}s") as one:
        if supervised:
            one.start(processes=2, max_stall=stall)
        else:
            one.embed(max_stall=stall)
            one.embed(max_stall=stall)
        for n in range(rounds(50, 1)):
            together(one, 2)
            job = one.tasks.block.enqueue(n, 600)
            assert job.result(timeout=120).split()[0] == "2"
            words = "was killed after blocking" if supervised else "its leases are no longer renewed"
            wait(lambda n=n, words=words: one.log.count(words) > n)
            if not supervised:
                os.kill(one.starts()[n][0].pid, signal.SIGKILL)
                one.embed(max_stall=stall)
        one.repeats()


@pytest.mark.row("A5")
async def test_leases_are_renewed_before_the_first_job_is_taken(url: str) -> None:
    """A job that blocks the loop as soon as a worker inside a program takes jobs finds the thread that renews at work."""
    app, threads = Conveyor(url), list[str]()

    def note(event: WorkerStarted) -> None:
        threads.extend(thread.name for thread in threading.enumerate())

    app.on(WorkerStarted, note)
    app.task(name="any")(note)
    async with app.worker():
        pass
    await app.aclose()

    assert "conveyor-heartbeat" in threads
