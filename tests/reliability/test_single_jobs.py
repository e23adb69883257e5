"""Single jobs: rows D2, D12, D19, D21 and D22 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, time
from typing import Any

import pytest
import redis as redis_py

from conveyor.jobs import context
from conveyor.jobs.app import Conveyor
from conveyor.store import inspection, operations
from support.manual_worker import ManualWorker
from support.running_worker import audit, counts, working
from support.waiting import auntil

Rounds = Callable[[int, int], int]


@pytest.mark.row("D2", "I17")
async def test_a_task_that_only_the_new_release_knows(url: str, rounds: Rounds) -> None:
    """While old and new workers run side by side, jobs of a new task wait for the new ones, and no attempt is used up."""
    old, new, ran = Conveyor(url), Conveyor(url), dict[int, int]()

    @old.task(name="known")
    async def known() -> None: ...

    new.task(name="known")(known.function)

    @new.task(name="fresh", retry=1)
    async def fresh(n: int) -> None:
        ran[n] = context.current().attempt

    jobs = rounds(2000, 20)
    async with working(old):
        for n in range(jobs):
            await fresh.aenqueue(n)
            await known.aenqueue()
        async with working(new):
            for n in range(jobs, 2 * jobs):
                await fresh.aenqueue(n)
            began = monotonic()
            await auntil(lambda: len(ran) == 2 * jobs, 60)
            print(f"{2 * jobs} jobs of the new task ran within {monotonic() - began:.1f} s")
    left = await counts(new)
    assert (left.ready, left.scheduled, left.dead) == (0, 0, 0)
    assert set(ran.values()) == {1}
    await old.aclose()
    await new.aclose()


EXITS = ("done", "early", "dead", "poison", "cancel", "cancel scheduled", "cancel leased", "expire", "purge",
         "purge scheduled", "delete", "delete dead", "reap", "purge dead")  # fmt: skip


@pytest.mark.row("D12", "I13")
@pytest.mark.parametrize("way", EXITS)
def test_a_unique_key_is_free_after_every_end(app: Conveyor, rounds: Rounds, way: str) -> None:
    """However a job ends, its unique key is free then: the next push of the key makes a job of its own."""
    task = app.task(name="note")(lambda n: None)
    scheduled, manual = way.endswith("scheduled"), ManualWorker(app)
    push = task.options(unique="k", delay="1h" if scheduled else None, expires="5ms" if way == "expire" else None)
    ids = set()
    for n in range(rounds(100, 3)):
        began = manual.turn(0).now if way == "expire" else 0
        handle = push.enqueue(n)
        assert handle.id not in ids, f"the key was still held after {n} times"
        again = push.enqueue(n)
        if way == "expire" and manual.turn(0).now >= began + 5:
            handle = again  # the first one may have expired before the second push
        assert again.id == handle.id  # held as long as it lives
        ids.add(handle.id)
        manual = _end(app, manual, way, handle) or manual
    assert app.client.run(inspection.audit(app.client.keys("default"))) == []
    manual.leave()


def _end(app: Conveyor, manual: ManualWorker, way: str, handle: Any) -> ManualWorker | None:
    id_, queue = handle.id.partition(":")[2], app.queue("default")
    if way.startswith(("cancel", "delete")) and not way.endswith(("leased", "dead")):
        verb = operations.cancel(manual.keys, id_, delete=way == "delete")
        assert app.client.run(verb) == 1
    elif way.startswith("purge") and way != "purge dead":
        assert queue.purge() == 1
    elif way == "expire":
        began = manual.turn(0).now
        while manual.turn(0).now < began + 6:
            pass
    else:
        assert manual.take() == [id_]
        return _end_leased(app, manual, way, id_)
    assert manual.take() == []  # the entry of a cancelled job is dropped here
    return None


def _end_leased(app: Conveyor, manual: ManualWorker, way: str, id_: str) -> ManualWorker | None:
    if way in {"done", "early"}:
        manual.done(id_, *([1] if way == "done" else []))
    elif way == "cancel leased":
        assert app.client.run(operations.cancel(manual.keys, id_)) == 2
        manual.cancelled(id_)
    elif way == "reap":  # asked to cancel it, its worker dies
        assert app.client.run(operations.cancel(manual.keys, id_)) == 2
        assert app.client.run(operations.reap(manual.keys, manual.worker)) == 0
        return ManualWorker(app)
    else:
        manual.dead(id_, None, crashes=3 if way == "poison" else 0)
        if way == "delete dead":
            assert app.client.run(operations.cancel(manual.keys, id_, delete=True)) == 1
        elif way == "purge dead":
            assert app.queue("default").purge(dead=True) == 1
    return None


@pytest.mark.row("D19")
async def test_nothing_is_leased_after_a_pause_returned(app: Conveyor, rounds: Rounds) -> None:
    """However often a queue is paused under load, nothing that is pushed after `pause` returned starts before `resume`."""
    ran: set[int] = set()

    @app.task
    async def note(n: int) -> None:
        ran.add(n)

    admin = app.queue("default")
    manual = await asyncio.to_thread(ManualWorker, app)
    async with working(app), working(app):
        for n in range(rounds(1000, 100)):
            await note.aenqueue(-n - 1)  # something on the way
            await admin.apause()
            await note.aenqueue(n)  # calls the workers
            assert await asyncio.to_thread(manual.take, 5) == []
            assert n not in ran
            await admin.aresume()
            await auntil(lambda n=n: {n, -n - 1} <= ran)
    await asyncio.to_thread(manual.leave)
    assert await audit(app) == []
    await app.aclose()


IDLE = """
import asyncio, os
from conveyor import Conveyor
app = Conveyor(os.environ["CONVEYOR_URL"], lease="60s")

@app.task(name="note")
async def note(n: int) -> None: ...

async def main() -> None:
    async with app.worker():
        await asyncio.Event().wait()

asyncio.run(main())
"""


def _waiting(redis: redis_py.Redis) -> list[str]:
    """Return the connections that wait for work."""
    return [one["id"] for one in redis.client_list() if one["cmd"] == "blpop" and "b" in one["flags"]]


@pytest.mark.row("D21")
@pytest.mark.leaves_keys("the frozen worker is ended by force")
async def test_a_token_that_a_frozen_worker_took(
    url: str, redis: redis_py.Redis, tmp_path: Path, rounds: Rounds
) -> None:
    """A frozen idle worker swallows the call for a job; another idle one runs it a moment later, without a lease's wait."""
    (tmp_path / "idle.py").write_text(IDLE)
    frozen = subprocess.Popen([sys.executable, str(tmp_path / "idle.py")], env={**os.environ, "CONVEYOR_URL": url})
    app, ran = Conveyor(url, lease="1500ms"), list[int]()

    @app.task(name="note")
    async def note(n: int) -> None:
        ran.append(n)

    try:
        [first] = await auntil(lambda: _waiting(redis))
        async with working(app):
            for n in range(rounds(50, 2)):
                await auntil(lambda: redis.info("clients")["blocked_clients"] == 2)
                [other] = await auntil(lambda: [one for one in _waiting(redis) if one != first])
                redis.client_unblock(int(other))  # so that the other one has waited longer, and is called first
                await auntil(lambda: redis.info("clients")["blocked_clients"] == 2)
                os.kill(frozen.pid, signal.SIGSTOP)
                await note.aenqueue(n)
                began = monotonic()
                await auntil(lambda: first not in _waiting(redis))  # the call went to it, and is lost there
                await auntil(lambda n=n: ran == list(range(n + 1)))
                print(f"started after {monotonic() - began:.2f} s")
                os.kill(frozen.pid, signal.SIGCONT)
    finally:
        frozen.send_signal(signal.SIGCONT)
        frozen.terminate()
        await asyncio.to_thread(frozen.wait)
    await app.aclose()


@pytest.mark.row("D22")
async def test_delayed_jobs_start_in_time_with_idle_workers(app: Conveyor, rounds: Rounds) -> None:
    """Idle workers start delayed jobs when they are due, never before, and late by no more than a moment."""
    jobs, late, seed = rounds(5000, 60), list[float](), random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)

    @app.task
    async def note(due: float) -> None:
        late.append(time() - due)

    async with working(app), working(app):
        for _ in range(jobs):
            delay = draw.uniform(0.05, rounds(60, 2))
            await note.options(delay=delay).aenqueue(time() + delay)
        await auntil(lambda: len(late) == jobs, 90)
    print(
        f"{jobs} delayed jobs: late by {1000 * max(late):.0f} ms at most, {1000 * sorted(late)[jobs // 2]:.0f} ms in the middle"
    )
    assert min(late) > -0.05
    assert max(late) < 5
    await app.aclose()
