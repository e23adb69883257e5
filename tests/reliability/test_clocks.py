"""Clocks that are wrong or jump: a worker's, and the server's."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conveyor import ConfigurationError, Conveyor
from conveyor.admin.admin import Admin
from conveyor.store.inspection import read_stats
from conveyor.worker.worker import Worker
from support.running_worker import audit, counts, drain, until_counts, working
from support.waiting import auntil, until_status
from support.worker_processes import wait, worker_processes
from testbed.server_process import Server, find_binary

Rounds = Callable[[int, int], int]
LEASE = 4.0
EARLY, LATE = 0.01, 120.0
"""Seconds that a start may lie before its instant (rounding), and after it on a loaded machine: a wrong clock is an hour off."""

_LIBRARY = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
needs_faketime = pytest.mark.skipif(not _LIBRARY, reason="libfaketime is not installed")
RIGHT = {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.row("B1", "I11")
@pytest.mark.leaves_keys("what is left is taken away by its fixture")
@needs_faketime
@pytest.mark.standalone_only(
    "a certificate made just now is not valid yet an hour ago", on=("valkey", "redis6", "redis7", "acl")
)
def test_workers_with_wrong_clocks_are_on_time(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """Workers an hour ahead and an hour behind: delayed jobs start at their instants, and no lease is taken."""
    count = rounds(1000, 100)
    with worker_processes(url, tmp_path, lease="4s") as one:
        for shift in ("+3600s", "-3600s"):
            one.start(env={"LD_PRELOAD": str(_LIBRARY[0]), "FAKETIME": shift, **RIGHT}, concurrency=12)
        one.start(concurrency=12)  # so that each of the three takes part of the thirty jobs
        wait(lambda: len(one.registered()) == 3)
        one.app.enqueue_many(one.tasks.note.s(count + n, 6) for n in range(30))  # longer than a lease
        due: dict[int, float] = {}
        for n in range(count):
            delay = 0.5 + 1.5 * n / count
            due[n] = time.monotonic() + delay  # before the call: its instant is later by less than a round trip
            one.tasks.note.options(delay=delay).enqueue(n)
        wait(one.drained)
        starts = one.starts()
        late = [starts[n][0].at - due[n] for n in range(count)]
        print(f"started {min(late):.3f} to {max(late):.3f} s after their instants")

        assert min(late) > -EARLY
        assert max(late) < LATE
        assert one.repeats() == 0
        offset = time.time() - time.monotonic()
        wrong = {round((line.wall - line.at - offset) / 3600) for lines in starts.values() for line in lines}
        assert wrong == {-1, 0, 1}


@pytest.fixture
def clock(directory: Path) -> Iterator[tuple[Server, Callable[[str], None]]]:
    """Yield a server whose clock can be set, and the function that sets it: `step("+3600")`."""
    place = directory / f"clock{time.monotonic_ns()}"
    place.mkdir()
    offset = place / "offset"

    def step(seconds: str) -> None:
        (place / "next").write_text(f"{seconds}s\n")
        os.replace(place / "next", offset)

    step("+0")
    settings = {
        "LD_PRELOAD": str(_LIBRARY[0]).replace("MT.so", ".so"), "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1", **RIGHT,
    }  # fmt: skip
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    program = place / "server"
    program.write_text(f'#!/bin/sh\nexec env {words} {find_binary("valkey")} "$@"\n')
    program.chmod(0o755)
    server = Server(program, place)
    try:
        yield server, step
    finally:
        server.kill()


async def server_time(app: Conveyor) -> int:
    """Return the server's seconds since the epoch."""
    return int((await app.client.aexecute("TIME"))[0])


async def died_lately(admin: Admin) -> int:
    """Return how many jobs have died in the last 15 minutes, as the history tells."""
    return sum((await admin.ahistory("15m")).failed)


async def is_hour(app: Conveyor, start: int, hour: int) -> bool:
    """Tell whether the server's clock is so many hours ahead of *start*."""
    return abs(await server_time(app) - start - 3600 * hour) < 600


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("+0", "+3600", marks=pytest.mark.row("B2"), id="ahead"),
        pytest.param("+3600", "+0", marks=pytest.mark.row("B3"), id="back"),
    ],
)
@needs_faketime
async def test_a_step_of_the_servers_clock(
    clock: tuple[Server, Callable[[str], None]], before: str, after: str
) -> None:
    """With 100 jobs running the server's clock jumps an hour: none runs twice, and the jobs of a dead worker are recovered."""
    server, step = clock
    step(before)
    async with Conveyor(server.url, lease=f"{LEASE}s") as app:
        runs: Counter[int] = Counter()
        again: dict[int, float] = {}
        release = asyncio.Event()

        @app.task
        async def hold(n: int) -> None:
            runs[n] += 1
            if 100 <= n < 105 and runs[n] == 2:
                again[n] = time.monotonic()
                return
            await release.wait()

        dead = Worker(app, concurrency=5)
        running = asyncio.create_task(dead.run())
        await app.aenqueue_many(hold.s(n) for n in range(100, 105))
        await auntil(lambda: len(runs) == 5)
        async with working(app, concurrency=34), working(app, concurrency=34), working(app, concurrency=34):
            await app.aenqueue_many(hold.s(n) for n in range(100))
            await auntil(lambda: len(runs) == 105)
            dead.fail(RuntimeError("dies"))
            with pytest.raises(RuntimeError, match="dies"):
                await asyncio.wait_for(running, 60)
            delayed = await hold.options(delay="30m").aenqueue(200)
            hour = await server_time(app)
            step(after)
            stepped = time.monotonic()
            while abs(await server_time(app) - hour) < 3500:  # the library looks at its file now and then
                assert time.monotonic() - stepped < LATE, "the clock does not jump"
                await asyncio.sleep(0.01)
            await auntil(lambda: len(again) == 5, LATE)  # not an hour later
            print(f"recovered 5 jobs {max(again.values()) - stepped:.1f} s after the step")
            release.set()
            await auntil(lambda: 200 in runs or before > after)  # what is due within the hour is due now
            await delayed.acancel()
            still = time.monotonic() + LEASE  # for whoever doubts the living
            await auntil(lambda: time.monotonic() > still)
        assert {n: count for n, count in runs.items() if count > 1} == dict.fromkeys(range(100, 105), 2)
        found = await counts(app)
        assert (found.ready, found.leased, found.dead) == (0, 0, 0)
        assert await audit(app) == []


@needs_faketime
async def test_a_clock_that_goes_back_and_forth_loses_no_count(clock: tuple[Server, Callable[[str], None]]) -> None:
    """Each end is counted once, whatever minute it falls into: a new one, one that is over, or one that was ahead; so counters never fall."""
    server, step = clock
    async with Conveyor(server.url) as app, Conveyor(server.url) as other:

        @app.task
        async def note() -> None: ...

        start, hours = await server_time(app), [0, 2, 0, 1, 2, 1, 0, 3]
        for number, hour in enumerate(hours, 1):
            step(f"+{3600 * hour}")
            await auntil(partial(is_hour, app, start, hour), LATE)
            await note.aenqueue()
            await drain(app)
            told = await Admin(other.client).ametrics_text()
            assert f'task="{note.name}",outcome="succeeded"}} {number}\n' in told, hour
        keys, first = app.client.keys("default"), start // 3600
        read = await app.client.arun(read_stats(keys, "hours", first, first + 4))
        assert sum(sums["done"] for sums in read.times.values()) == len(hours)


@needs_faketime
async def test_what_is_shown_goes_by_the_servers_clock(clock: tuple[Server, Callable[[str], None]]) -> None:
    """With a server an hour ahead of this machine, or behind, the last minutes show what ended, and nothing counts as late or too long."""
    server, step = clock
    async with Conveyor(server.url) as app:
        release, admin = asyncio.Event(), Admin(app.client)

        @app.task(name="bad", queue="mail", retry=1)
        async def bad() -> None:
            raise ValueError("as asked")

        @app.task(name="held", queue="mail")
        async def held() -> None:
            await release.wait()

        start = await server_time(app)
        for seconds in (3600, -3600):
            step(f"{seconds:+}")
            await auntil(partial(is_hour, app, start, seconds // 3600), LATE)
            schedule = await app.schedules.aput("daily", held.s(), every="1d")
            await bad.aenqueue()
            job = await held.aenqueue()
            release.clear()
            async with working(app):
                await until_counts(app, lambda found: found.dead == 1 and found.leased == 1, "mail")
                await auntil(lambda: died_lately(admin), LATE)
                assert sum(group.count for group in (await admin.afailure_matrix("1h")).groups) == 1
                assert [flag.kind for flag in await admin.aflags()] == []
                release.set()
                await until_status(job, "done")
            await schedule.adelete()
            await app.queue("mail").apurge(dead=True)


@pytest.mark.row("B8")
async def test_instants_in_the_past_and_far_away(url: str) -> None:
    """An instant in the past is now, one in the year 9999 is kept, and an invalid instant or duration stores nothing."""
    async with Conveyor(url) as app:
        ran: list[str] = []

        @app.task
        async def note(what: str) -> None:
            ran.append(what)

        now = datetime.now(UTC)
        for at in (now - timedelta(days=400), datetime(1970, 1, 1, tzinfo=UTC), datetime(1, 1, 2, tzinfo=UTC), now):
            await note.options(at=at).aenqueue("past")
        await note.options(delay=0).aenqueue("past")
        far = await note.options(at=datetime(9999, 12, 31, tzinfo=UTC)).aenqueue("far")
        century = await note.options(delay="36500d").aenqueue("far")

        async def stored() -> tuple[int, int]:
            found = await counts(app)
            return found.ready, found.scheduled

        wrong: list[dict[str, Any]] = [
            *({"delay": value} for value in (math.nan, math.inf, -math.inf, -1, -0.001, "-5s", timedelta(days=-1), 1e300)),
            {"at": now.replace(tzinfo=None)}, {"at": now.timestamp()}, {"at": now, "delay": 1}, {"expires": math.nan},
        ]  # fmt: skip
        for options in wrong:
            with pytest.raises(ConfigurationError):
                await note.options(**options).aenqueue("wrong")
        assert await stored() == (5, 2)

        async with working(app):
            await auntil(lambda: ran == ["past"] * 5)
        assert [await job.astatus() for job in (far, century)] == ["scheduled"] * 2
        assert [await job.acancel() for job in (far, century)] == ["removed", "removed"]
        assert await audit(app) == []
