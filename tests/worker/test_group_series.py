"""Series: several jobs of one group in one turn, which a worker runs one after the other."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from conveyor import Conveyor, JobFailed, RateLimited, Retry, RetryIn, Snooze, current
from conveyor.store import operations
from conveyor.worker.leasing import group_series
from conveyor.worker.leasing.group_series import GroupSeries
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, drain, until_counts, working
from support.waiting import auntil

ONCE = Retry(attempts=5, backoff="10ms", cap="10ms", jitter=False)


_ALWAYS_A_HUNDRED = property(lambda _: 100, lambda _series, _length: None)
"""A length of series that no measure of the jobs changes."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each turn ask for a hundred jobs of a group, and its jobs have all the time they need; return how many each has leased."""
    leased: list[int] = []
    take = QueueConsumer._take

    def noting(self: QueueConsumer, turn: operations.TurnReply, sent_at: float) -> None:
        leased.append(len(turn.ids))
        take(self, turn, sent_at)

    monkeypatch.setattr(group_series, "LONGEST", 600.0)
    monkeypatch.setattr(group_series, "_AIM", 300.0)
    monkeypatch.setattr(GroupSeries, "length", _ALWAYS_A_HUNDRED, raising=False)
    monkeypatch.setattr(QueueConsumer, "_take", noting)
    return leased


@pytest.mark.parametrize("kind", ["coroutine", "suspends", "function"])
async def test_one_turn_leases_many(app: Conveyor, taken: list[int], kind: str) -> None:
    """A hundred jobs of one group come with one turn, and run one after the other, in their order."""
    ran: list[int] = []
    running = threading.Lock()

    def note(number: int) -> None:
        ran.append(number)

    async def coroutine(number: int) -> None:
        assert running.acquire(blocking=False)
        if kind == "suspends":
            await asyncio.sleep(0)
        note(number)
        running.release()

    def function(number: int) -> None:
        with running:
            note(number)

    body: Any = function if kind == "function" else coroutine
    task: Any = app.task(name="book")(body)
    await app.aenqueue_many([task.options(group="a").s(number) for number in range(100)])
    await drain(app, concurrency=100, threads=100)
    assert (taken, ran) == ([100], [*range(100)])
    assert await audit(app) == []


@pytest.mark.row("C292")
@pytest.mark.parametrize("end", ["retry", "snooze", "limited", "dead", "cancelled"])
async def test_other_ends_keep_the_order(app: Conveyor, taken: list[int], end: str) -> None:
    """Jobs behind one that ends otherwise than well start after its last attempt, in their order."""
    starts: list[tuple[int, int]] = []
    errors = {"retry": RetryIn("20ms"), "snooze": Snooze("20ms"), "limited": RateLimited("20ms"), "dead": ValueError()}

    @app.task(name="book", group_by="account", retry=ONCE)
    async def book(account: str, number: int) -> None:
        starts.append((number, current().attempt))
        if number == 2 and end == "cancelled":
            await asyncio.sleep(60)
        elif number == 2 and (current().attempt == 1 or end == "dead"):
            raise errors[end]

    jobs = await app.aenqueue_many([book.s("a", number) for number in range(8)])
    async with working(app):
        if end == "cancelled":
            await auntil(lambda: (2, 1) in starts)
            await jobs[5].acancel()  # it waits in the series
            await jobs[2].acancel()
        await jobs[7].aresult(timeout="60s")
        if end == "dead":
            with pytest.raises(JobFailed):
                await jobs[2].aresult(timeout="1s")
            await app.queue("default").apurge(dead=True)
    tries = {"dead": 5, "cancelled": 1}.get(end, 2)
    expected = [(number, attempt) for number in range(8) for attempt in range(1, (tries if number == 2 else 1) + 1)]
    assert starts == [one for one in expected if one[0] != 5 or end != "cancelled"]
    assert taken[0] == 8
    assert await audit(app) == []


@pytest.fixture
def going_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the flags of the turns that went on with a series."""
    flags: list[str] = []
    ask = GroupSeries.ask

    def noting(self: GroupSeries) -> str:
        flag = ask(self)
        if "\t" in flag:
            flags.append(flag)
        return flag

    monkeypatch.setattr(GroupSeries, "ask", noting)
    return flags


@pytest.mark.row("C292")
@pytest.mark.parametrize("kind", ["coroutine", "function"])
async def test_a_series_goes_on(app: Conveyor, taken: list[int], going_on: list[str], kind: str) -> None:
    """Turns lease while a series runs, and jobs that are retried, put off or held have their place all the same, in two groups."""
    errors = [RetryIn("10ms"), Snooze("10ms"), RateLimited("10ms"), ValueError()]
    starts: dict[str, list[int]] = {"a": [], "b": []}
    running = {"a": threading.Lock(), "b": threading.Lock()}

    def note(account: str, number: int) -> None:
        starts[account].append(number)
        if number % 90 == 89 and starts[account].count(number) == 1:
            raise errors[number // 90 % 4]

    async def coroutine(account: str, number: int) -> None:
        assert running[account].acquire(blocking=False)
        try:
            if number % 7 == 0:
                await asyncio.sleep(0)
            note(account, number)
        finally:
            running[account].release()

    def function(account: str, number: int) -> None:
        with running[account]:
            note(account, number)

    body: Any = function if kind == "function" else coroutine
    task: Any = app.task(name="book", group_by="account", retry=ONCE)(body)
    await app.aenqueue_many([task.s(account, number) for number in range(720) for account in "ab"])
    await drain(app, concurrency=400, threads=20)
    again = [[number] * (2 if number % 90 == 89 else 1) for number in range(720)]
    assert starts["a"] == starts["b"] == [number for numbers in again for number in numbers]
    assert len(going_on) > 10
    assert await audit(app) == []


@pytest.mark.row("C292")
async def test_a_stop_ends_what_goes_on(app: Conveyor, taken: list[int], going_on: list[str]) -> None:
    """Workers that stop while turns go on with a series leave the rest in its order, whatever a turn brings after the stop."""
    ran: list[int] = []

    @app.task(name="book", group_by="account")
    def book(account: str, number: int) -> None:
        ran.append(number)

    await app.aenqueue_many([book.s("a", number) for number in range(1500)])
    for stops_at in range(150, 1500, 150):
        async with working(app, concurrency=400, threads=20) as worker:
            await auntil(lambda: len(ran) > stops_at)  # noqa: B023  it is called here
            worker.stop()
    await drain(app, concurrency=400)
    assert ran == [*range(1500)]
    assert going_on
    assert await audit(app) == []


@pytest.mark.row("C292")
async def test_nothing_waits_for_a_long_job(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs behind one that runs for long go back, where a pause of their key holds them; a stop returns them, too, and in order."""
    monkeypatch.setattr(GroupSeries, "length", _ALWAYS_A_HUNDRED, raising=False)
    ran: list[int] = []
    gate = asyncio.Event()

    @app.task(name="book", group_by="account")
    async def book(account: str, number: int) -> None:
        ran.append(number)
        if number == 0:
            await gate.wait()

    await app.aenqueue_many([book.s("a", number) for number in range(20)])
    async with working(app):
        await auntil(lambda: ran == [0])
        await until_counts(app, lambda now: now.waiting >= 19)
        await app.groups.aset("default", "a", paused=True)
        gate.set()
        await until_counts(app, lambda now: not now.leased)
        assert ran == [0]
        await app.groups.aset("default", "a", paused=False)
        await auntil(lambda: len(ran) == 20)
    assert ran == [*range(20)]
    assert await audit(app) == []


@pytest.mark.row("C292")
async def test_a_stop_returns_the_rest(app: Conveyor, taken: list[int]) -> None:
    """A worker that stops runs what it has begun, and returns what follows; the next worker runs that in its order."""
    ran: list[int] = []
    gate = asyncio.Event()

    @app.task(name="book", group_by="account")
    async def book(account: str, number: int) -> None:
        ran.append(number)
        if number == 2:
            await gate.wait()

    await app.aenqueue_many([book.s("a", number) for number in range(9)])
    async with working(app) as worker:
        await auntil(lambda: ran == [0, 1, 2])
        worker.stop()
        await until_counts(app, lambda now: now.waiting >= 6)
        gate.set()
    assert ran == [0, 1, 2]
    assert await audit(app) == []
    await drain(app)
    assert (taken, ran) == ([9, 6], [*range(9)])


async def test_jobs_that_are_not_simply_run_come_alone(app: Conveyor, taken: list[int]) -> None:
    """A job of a batch task, and one that is acknowledged early, is no part of a series: it starts when the one before has ended."""
    ran: list[int] = []

    @app.task(name="book", group_by="account")
    async def book(account: str, number: int) -> None:
        ran.append(number)

    @app.task(name="early", group_by="account", ack="early")
    async def early(account: str, number: int) -> None:
        ran.append(number)

    @app.batch_task(name="many", size=9, within="1ms")
    async def many(numbers: list[int]) -> None:
        ran.extend(numbers)

    tasks = [
        book.s("a", 0),
        book.s("a", 1),
        early.s("a", 2),
        book.s("a", 3),
        many.options(group="a").s(4),
        book.s("a", 5),
    ]
    await app.aenqueue_many(tasks)
    await drain(app)
    assert ran == [*range(6)]
    assert await audit(app) == []


def test_length_follows_the_jobs() -> None:
    """A series is as long as what jobs ran lately allows: it doubles while they are quick, and is short at once after a long one."""
    series = GroupSeries({}, lambda _: None, lambda _: None)
    lengths = []
    for _ in range(10):
        lengths.append((series.length, series.ask()))
        series.note_ends(series.length, series.length * 0.00001)
    assert lengths[:4] == [(1, ""), (2, "s2"), (4, "s4"), (8, "s8")]
    assert 200 < series.length <= group_series.MOST
    series.note_ends(1, 0.005)
    assert series.length == 4
    series.note_ends(1, 10.0)
    assert (series.length, series.ask()) == (1, "")
