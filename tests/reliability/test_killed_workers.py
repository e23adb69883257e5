"""Workers that die: killed at random under load, at the worst points, and by their own jobs."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.ids import split
from conveyor.store import operations
from conveyor.worker.worker import Worker
from support.client_worker import ClientWorker
from support.supervisor_process import running
from support.waiting import auntil
from support.worker_processes import WorkerProcesses, wait, worker_processes

Rounds = Callable[[int, int], int]
pytestmark = pytest.mark.leaves_keys("what killed workers leave is taken away by its fixture")


@pytest.mark.row("A1", "I2")
def test_kills_under_load_lose_nothing(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """Children killed at random moments: every job completes exactly once, and each further start has a higher attempt."""
    kills = rounds(500, 15)
    jobs = rounds(100_000, 1_500)
    dice = random.Random(seed := random.randrange(10**9))
    print(f"seed {seed}")
    with worker_processes(url, tmp_path, lease="10s") as one:
        one.app.enqueue_many(one.tasks.note.s(n, 0.01) for n in range(min(jobs, 1000)))
        supervisor = one.start(processes=4)
        pushed = min(jobs, 1000)
        for number in range(kills):
            goal = jobs * number // kills
            wait(lambda goal=goal: one.completions() >= goal)
            more = range(pushed, min(jobs, max(pushed, goal + 1000)))
            one.app.enqueue_many((one.tasks.plain if n % 5 == 0 else one.tasks.note).s(n, 0.01) for n in more)
            pushed += len(more)
            victim = dice.choice(wait(lambda: _at_work(one, supervisor)))
            os.kill(victim, signal.SIGKILL)
            wait(lambda victim=victim: not running(victim))  # else it may be chosen again
        wait(one.drained)

        assert one.completions() == jobs
        assert set(one.starts()) == set(range(jobs))
        assert one.repeats() > 0
        assert one.counts().dead == 0
        wait(lambda: one.log.count("was killed by SIGKILL") == kills)
        assert one.is_sound()


def test_counters_are_exact_after_kills(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """The metrics tell of each task how its jobs ended, as the jobs do one by one, though workers were killed; no counter falls meanwhile."""
    kills, count = rounds(50, 4), rounds(5_000, 300)
    dice = random.Random(seed := random.randrange(10**9))
    print(f"seed {seed}")
    with worker_processes(url, tmp_path, lease="2s") as one:
        note, plain, poison = one.tasks.note, one.tasks.plain, one.tasks.poison
        jobs = [(task.name, task.enqueue(n, 0.01)) for n in range(count) for task in [note if n % 2 else plain]]
        later = note.options(delay="1h").enqueue(count), note.enqueue(count + 1), plain.enqueue(count + 2, 0.01)
        for job in later:
            assert job.cancel()
        jobs += zip((note.name, note.name, plain.name), later, strict=True)
        jobs.append((plain.name, plain.options(expires="1ms").enqueue(count + 3)))
        jobs.append((poison.name, poison.enqueue(count + 4, "exit")))
        supervisor, told = one.start(processes=2), Counter[tuple[str, str]]()
        for number in range(kills):
            wait(lambda number=number: one.completions() >= count * number // (kills + 1))
            victim = dice.choice(wait(lambda: _at_work(one, supervisor)))
            os.kill(victim, signal.SIGKILL)
            wait(lambda victim=victim: not running(victim))
            before, told = told, _told_ends(one)
            assert before <= told
        wait(one.drained)

        ends = Counter[tuple[str, str]]()
        for task, job in jobs:
            about = job.info()
            end = "expired" if about.reason == "expired" else about.status
            ends[task, "succeeded" if end == "done" else end] += 1
        assert _told_ends(one) == ends
        assert ends[note.name, "cancelled"] == 2
        assert {end for _, end in ends} == {"succeeded", "cancelled", "expired", "dead"}


def _told_ends(one: WorkerProcesses) -> Counter[tuple[str, str]]:
    """Return the number of ends by task and outcome, as metrics tell it."""
    sample = r'^conveyor_jobs_finished_total\{queue="default",task="([^"]*)",outcome="([a-z]*)"\} ([1-9]\d*)$'
    found = re.findall(sample, Admin(one.app.client).metrics_text(), re.MULTILINE)
    return Counter({(task, outcome): int(count) for task, outcome, count in found})


def _at_work(one: WorkerProcesses, supervisor: subprocess.Popen[bytes]) -> list[int]:
    """Return the children that started or ended a job lately; any when the last job is done."""
    busy = {line.pid for line in one.journal[-200:]}
    return [pid for pid in one.children(supervisor) if running(pid) and (pid in busy or one.drained())]


RUNS = {"after_claim": [2], "before_run": [2], "after_run": [1, 2], "before_ack": [1, 2], "mid_ack": [1]}
"""Point of the kill → the attempts that the jobs at that point are seen to start with: a lease counts, run or not."""


@pytest.mark.row("A2", "I8")
@pytest.mark.parametrize("point", RUNS)
def test_kills_at_the_worst_points(url: str, tmp_path: Path, rounds: Rounds, point: str) -> None:
    """Killed after the lease came, before or after the code ran, before or amid the ack: one completion, all starts visible."""
    kills = rounds(50, 2)
    numbers: dict[str, int] = {}
    with worker_processes(url, tmp_path, lease="10s", WORKERS_POINT=point) as one:
        one.start(processes=2)
        for number in range(kills):
            (tmp_path / point).touch()
            task = (one.tasks.note, one.tasks.plain)[number % 2]  # on the loop, on threads
            jobs = one.app.enqueue_many(task.s(n, 0.002) for n in range(number * 20, number * 20 + 20))
            numbers |= {split(job.id)[1]: number * 20 + n for n, job in enumerate(jobs)}
            wait(lambda: not (tmp_path / point).exists())
            wait(one.drained)
        starts = one.starts()
        struck = [line.split() for line in (tmp_path / "struck").read_text().splitlines()]
        attempts = [[line.attempt for line in starts[numbers[id_]]] for ids in struck for id_ in ids]
        ends = Counter((line.n, line.attempt) for line in one.journal if line.what == "end")

        assert one.completions() == kills * 20
        assert set(starts) == set(range(kills * 20))
        one.repeats()
        assert len(struck) == kills
        assert attempts == [RUNS[point]] * len(attempts)
        if point != "after_claim":  # what the code did before the kill, it did to its end
            assert all(ends[numbers[id_], RUNS[point][0]] for ids in struck for id_ in ids)
        assert one.log.count("was killed by SIGKILL") == kills
        assert one.is_sound()


@pytest.mark.row("A7", "A8", "I8")
def test_only_poison_jobs_die_by_crashes(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """A job that ends its process is started `max_crashes` times, then dead; the good ones around it, and between two, succeed."""
    bad, good = rounds(100, 8), rounds(10_000, 300)
    ways = ["kill", "segfault", "exit", "abort"]
    with worker_processes(url, tmp_path, lease="10s") as one:
        calls = [one.tasks.good.s(n, 0.02) for n in range(good)]
        calls += [one.tasks.poison.s(good + number, ways[number % 4]) for number in range(bad)]
        random.Random(8).shuffle(calls)  # one process holds several of them at a time
        one.app.enqueue_many(calls)
        supervisor = one.start(processes=4, concurrency=5)
        wait(one.drained, rounds(600, 150))

        starts = one.starts()
        assert [len(starts[good + n]) for n in range(bad)] == [3] * bad
        assert one.completions() == good
        assert one.counts().dead == bad
        one.repeats()
        words = {"kill": "SIGKILL", "segfault": "SIGSEGV", "exit": "exited with code 3", "abort": "SIGABRT"}
        told = {how: len(re.findall(f"pid.*{text}.*returned", one.log)) for how, text in words.items()}
        assert told == {how: 3 * len(range(place, bad, 4)) for place, how in enumerate(ways)}
        assert supervisor.poll() is None
        wait(lambda: len(one.registered()) == len(one.children(supervisor)) == 4)
        assert one.is_sound()


@pytest.mark.row("A8")
async def test_a_job_that_never_started_is_no_poison(url: str) -> None:
    """Workers that died while they held a job make it a suspect, once; only its own starts make it poison."""
    async with Conveyor(url) as app:
        started: list[int] = []
        crash = asyncio.Event()

        @app.task
        async def poison() -> None:
            started.append(1)
            crash.set()
            await asyncio.sleep(60)

        job = await poison.aenqueue()
        for _ in range(5):
            manual = await asyncio.to_thread(ClientWorker, app.client, "default")
            assert await asyncio.to_thread(manual.take) == [job.id]
            await app.client.arun(operations.reap(manual.keys, manual.identity))

        async def has_struck() -> bool:
            return crash.is_set() or await job.astatus() == "dead"

        while await job.astatus() != "dead":
            assert len(started) < 3
            crash.clear()
            worker = Worker(app)
            running = asyncio.create_task(worker.run())
            await auntil(has_struck)
            worker.fail(RuntimeError("crash"))
            with pytest.raises(RuntimeError, match="crash"):
                await asyncio.wait_for(running, 60)
            await app.client.arun(operations.reap(app.client.keys("default"), worker.consumers[0].identity))

        assert len(started) == 2


@pytest.mark.row("A7")
def test_a_killed_supervisor_is_told_by_its_exit(url: str, tmp_path: Path) -> None:
    """A supervisor that the kernel kills ends with that signal, and its children give back what they hold and end."""
    with worker_processes(url, tmp_path, lease="10s") as one:
        supervisor = one.start(processes=2, grace=0.2)
        one.app.enqueue_many(one.tasks.note.s(n, 60) for n in range(4))
        wait(lambda: len(one.starts()) == 4)
        children = one.children(supervisor)
        supervisor.kill()
        assert supervisor.wait(60) == -signal.SIGKILL
        wait(lambda: not any(map(running, children)))
        assert (one.counts().ready, one.counts().leased) == (4, 0)


@pytest.mark.row("I9")
@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "alone"])
def test_the_jobs_of_the_dead_are_back_in_time(url: str, tmp_path: Path, rounds: Rounds, supervised: bool) -> None:
    """Jobs of a killed worker run again long before the lease ends under a supervisor, else when it has ended."""
    lease = 600.0 if supervised else 2.0  # of the first, no test waits for the end
    with worker_processes(url, tmp_path, lease=f"{lease}s") as one:
        if supervised:
            one.start(processes=2, concurrency=4)
        else:
            alone = [one.embed(concurrency=4) for _ in range(2)]
        took: list[float] = []
        for number in range(rounds(50, 2)):
            wait(lambda: len(one.registered()) == 2)
            ids = range(4 * number, 4 * number + 4)
            one.app.enqueue_many(one.tasks.first.s(n) for n in ids)
            wait(lambda ids=ids: set(ids) <= one.starts().keys())
            victim = one.starts()[ids[0]][0].pid
            lost = [n for n in ids if one.starts()[n][0].pid == victim]
            killed = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            wait(lambda lost=lost: all(len(one.starts()[n]) == 2 for n in lost))
            took += [one.starts()[n][1].at - killed for n in lost]
            (tmp_path / "go").touch()  # those of the other, which hold on to it
            wait(one.drained)
            (tmp_path / "go").unlink()
            if not supervised:
                alone[:] = [each for each in alone if each.pid != victim] + [one.embed(concurrency=4)]
        print(f"{len(took)} jobs back after {min(took):.3f} to {max(took):.3f} s")

        assert supervised or min(took) > 0.45 * lease
        assert one.repeats() == len(took)
        assert one.is_sound()
