"""Jobs that jobs spawn: they leave with the end of the job, exactly once, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis as redis_py

from conveyor import Context, Conveyor, Retry, current, ident, outbox
from conveyor.errors import ConfigurationError, PayloadError, QueueFull
from conveyor.store import operations
from conveyor.store.operations import Settlement
from conveyor.store.wire import Wire, WireLost
from conveyor.worker.delivery import deliver
from hand import Hand
from working import drain, until, working

ran: list[Any] = []


@pytest.fixture
async def family(url: str) -> AsyncIterator[Conveyor]:
    """An app whose jobs spawn jobs."""
    app = Conveyor(url)
    ran.clear()

    @app.task(queue="two")
    async def follower(n: int) -> int:
        ran.append(n)
        return n

    @app.task(retry=Retry(attempts=2, backoff="1ms"))
    async def parent(n: int, fail: int = 0, context: Context = current()) -> str:
        job = context.spawn(follower.s(n))
        if context.attempt <= fail:
            raise ValueError("after it has spawned")
        return job.id

    @app.task
    def thread(n: int) -> None:
        for i in range(n):
            current().spawn(follower.options(priority=i % 2).s(i))

    @app.task
    async def stuck(context: Context = current()) -> None:
        context.spawn(follower.s(0))
        await asyncio.sleep(60)

    @app.task(ack="early")
    async def early() -> None:
        try:
            current().spawn(follower.s(0))
        except ConfigurationError as error:
            ran.append(error.code)

    yield app
    await app.aclose()


def queued(redis: redis_py.Redis, app: Conveyor, queue: str) -> list[str]:
    return [one.decode() for one in redis.lrange(app.keys(queue).ready[0], 0, -1)]


# -- what a user sees ----------------------------------------------------------------------------------------------


async def test_follower_leaves_with_the_success(family: Conveyor, redis: redis_py.Redis) -> None:
    """A spawned job runs after its parent ended well, under the id that `spawn` returned; the outbox is empty then."""
    job = await family.tasks["test_outbox.parent"].aenqueue(7)
    await drain(family)

    follower = family.tasks["test_outbox.follower"].job(await job.aresult(timeout=1))
    assert follower.queue == "two"
    assert await follower.aresult(timeout=1) == 7
    assert ran == [7]
    assert redis.exists(family.keys("default").outbox) == 0


async def test_nothing_leaves_an_attempt_without_success(family: Conveyor, redis: redis_py.Redis) -> None:
    """An attempt that fails, and one that is cancelled, spawns nothing; the attempt that succeeds spawns once."""
    parent, stuck = family.tasks["test_outbox.parent"], family.tasks["test_outbox.stuck"]
    async with working(family):
        await (await parent.aenqueue(1, fail=1)).aresult(timeout=5)
        dead = await parent.aenqueue(2, fail=9)
        gone = await stuck.aenqueue()
        while await gone.astatus() != "leased":
            await asyncio.sleep(0.005)
        await gone.acancel()
        for job in (dead, gone):
            while await job.astatus() not in {"dead", "cancelled"}:
                await asyncio.sleep(0.005)
        await until(lambda: ran == [1])
    await drain(family)
    assert ran == [1]
    await asyncio.to_thread(family.queue("default").purge, dead=True)


async def test_a_job_to_come_is_waited_for(family: Conveyor) -> None:
    """Before its parent ends a spawned job is `waiting`, and its result can be awaited; once it has ended it is done for good."""
    coming: list[Any] = []

    @family.task
    async def slow(context: Context = current()) -> None:
        coming.append(context.spawn(family.tasks["test_outbox.follower"].s(3)))
        while len(coming) < 2:
            await asyncio.sleep(0.005)

    await slow.aenqueue()
    async with working(family):
        await until(lambda: coming)
        job = coming[0]
        assert await job.astatus() == "waiting"
        with pytest.raises(TimeoutError):
            await job.aresult(timeout=0)
        waiting = asyncio.create_task(job.aresult(timeout=10))
        while not await family.backend.aexecute("HEXISTS", family.keys("two").waiters, job.id.split(":")[1]):
            await asyncio.sleep(0.005)
        coming.append(None)
        assert await waiting == 3
        assert await family.tasks["test_outbox.follower"].job(job.id).astatus() == "done"
    await family.backend.aexecute("DEL", family.keys("two").result(job.id.split(":")[1]))
    assert await job.astatus() == "done"


def test_ids_of_spawned_jobs_are_known_by_their_form() -> None:
    """They are generated ids in every respect, and no other generated id is taken for one of them."""
    spawned = [ident.new_spawned_id() for _ in range(300)]
    assert all(ident.is_spawned(one) and ident.is_generated(one) and ident.may_come(one) for one in spawned)
    assert not any(ident.is_spawned(one) for one in [*ident.new_ids(300), *(ident.new_id() for _ in range(300)), "own"])
    assert len(set(spawned)) == 300
    assert not ident.may_come("0" * 21 + "1")


async def test_many_keep_their_order(family: Conveyor) -> None:
    """What a thread spawns arrives in the order it was spawned, however many batches it makes, with its options."""
    await family.tasks["test_outbox.thread"].aenqueue(450)
    await drain(family, concurrency=1)

    assert ran == [*range(1, 450, 2), *range(0, 450, 2)]


async def test_limits_of_spawning(family: Conveyor) -> None:
    """More than a thousand are refused, so are arguments that do not fit, and a job that is acknowledged before it runs."""
    follower: Any = family.tasks["test_outbox.follower"]
    context = Context(job_id="x:1", task="t", queue="x", attempt=1, headers={}, state={}, deadline_hook=None)
    with pytest.raises(PayloadError):
        context.spawn(follower.s("no number"))
    for n in range(1000):
        context.spawn(follower.s(n))
    with pytest.raises(ConfigurationError, match=r"1,000") as caught:
        context.spawn(follower.s(0))
    assert caught.value.code == "E44"

    await family.tasks["test_outbox.early"].aenqueue()
    await drain(family)
    assert ran == ["E44"]


async def test_leftovers_are_found(family: Conveyor) -> None:
    """What a worker settled and did not live to deliver, the next worker of that queue delivers."""
    await asyncio.to_thread(settle, family, [("two", n) for n in range(3)])
    async with working(family, queues={"default": 1, "two": 1}):
        await until(lambda: ran == [0, 1, 2])


# -- the store -----------------------------------------------------------------------------------------------------


def entry(app: Conveyor, queue: str, n: int) -> bytes:
    """Return what an outbox keeps of a follower, here one that leaves no trace of its id when it has ended."""
    _, prepared = outbox.read(app.tasks["test_outbox.follower"].s(n).follow()[1])
    prepared.own_id = False
    return outbox.write(queue, prepared)


def settle(app: Conveyor, followers: list[tuple[str, int]], *, reaped: bool = False) -> Hand:
    """End a job that spawned these, as a worker that does no more than that; or as one that lost its lease before."""
    app.tasks["test_outbox.parent"].enqueue(0)
    hand = Hand(app)
    (id_,) = hand.take(1)
    if reaped:
        app.backend.run(operations.reap(hand.keys, hand.worker))
    spawned = [Settlement("S", id_, record=entry(app, queue, n)) for queue, n in followers]
    hand.turn(0, *spawned, Settlement("D", id_), flags="t")
    return hand


def take_all(app: Conveyor, queue: str) -> list[int]:
    """Lease and finish all of a queue; return the numbers in their order."""
    hand = Hand(app, queue)
    ids = hand.take(1000)
    found = [int(hand.envelopes[id_].body.strip(b'{"n:}[]')) for id_ in ids]
    hand.turn(0, done=tuple(ids), flags="t")
    return found


@pytest.mark.row("A3")
def test_zombie_spawns_nothing(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """The end of an attempt whose lease was lost is refused with all that it spawned."""
    with pytest.raises(operations.Unregistered):
        settle(family_sync, [("two", 1)], reaped=True)
    assert redis.exists(family_sync.keys("default").outbox) == 0
    assert take_all(family_sync, "default") == [0]


def test_one_refused_end_takes_its_followers_along(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """In a report, what one job spawned leaves and what another spawned that is not held any more does not."""
    app = family_sync
    for n in range(2):
        app.tasks["test_outbox.parent"].enqueue(n)
    hand = Hand(app)
    kept, gone = hand.take(2)
    app.backend.run(operations.extend(hand.keys, hand.worker, gone, "other", 60_000, b""))
    ends = [
        one for id_ in (gone, kept) for one in (Settlement("S", id_, record=entry(app, "two", 1)), Settlement("D", id_))
    ]

    assert hand.turn(0, *ends).lost == [gone]
    assert [outbox.read(one)[0] for one in redis.lrange(hand.keys.outbox, 0, -1)] == ["two"]
    app.backend.run(operations.reap(hand.keys, "other"))
    hand.leave()
    assert asyncio.run(emptied(app)) == 1
    assert (take_all(app, "two"), take_all(app, "default")) == ([1], [1])


@pytest.fixture
def family_sync(url: str) -> Any:
    """The same app for tests without a loop."""
    with Conveyor(url) as app:

        @app.task(name="test_outbox.follower", queue="two")
        async def follower(n: int) -> None: ...

        @app.task(name="test_outbox.parent")
        async def parent(n: int) -> None: ...

        yield app


async def emptied(app: Conveyor) -> int:
    """Deliver until nothing is left; return how many batches there were."""
    count = 0
    try:
        while await deliver(app.keys("default"), app):
            count += 1
    finally:
        await app.backend.aclose()
    return count


class Dies(BaseException):
    """The process ended here."""


class Fatal:
    """Ends the deliverer at the n-th command, before it left or after it was carried out."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, sent: bool, error: type[BaseException]) -> None:
        self.count = 0
        real, fatal = Wire.execute, self

        async def execute(wire: Wire, *command: Any, block: float = 0.0) -> Any:
            fatal.count += 1
            if fatal.count != at:
                return await real(wire, *command, block=block)
            if sent:
                await real(wire, *command, block=block)
            wire.drop(WireLost("cut"))
            raise error("cut")

        patch.setattr(Wire, "execute", execute)


TARGETS = [("two", 1), ("three", 2), ("two", 3), ("default", 4), ("three", 5)]


@pytest.mark.row("A2", "C16", "D15")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize("error", [Dies, WireLost], ids=["dies", "cut"])
def test_once_each_wherever_it_breaks(
    family_sync: Conveyor, monkeypatch: pytest.MonkeyPatch, sent: bool, error: type[BaseException]
) -> None:
    """
    The deliverer dies, or its connection breaks, at every step: each follower arrives once, in its order.

    Fast consumers finish what has arrived before the next deliverer begins, so no id is left to recognise a repeat by.
    """
    app, steps, at = family_sync, 1, 0
    while at <= steps:
        got: dict[str, list[int]] = {"two": [], "three": [], "default": []}
        settle(app, TARGETS)
        with monkeypatch.context() as patch:
            fatal = Fatal(patch, at, sent=sent, error=error)
            try:
                asyncio.run(emptied(app))
            except Dies:
                pass
            steps = max(steps, fatal.count)
        for final in (False, True):
            for queue, numbers in got.items():
                numbers += take_all(app, queue)
            if not final:
                asyncio.run(emptied(app))
        assert got == {"two": [1, 3], "three": [2, 5], "default": [4]}, f"at command {at}"
        at += 1
    assert at > 6


@pytest.mark.row("A3", "D15")
def test_deliverers_that_meet_push_once(family_sync: Conveyor, rounds: Callable[[int, int], int]) -> None:
    """Three deliverers at once, cut off at random, and consumers beside them: 0 lost, 0 doubled, each queue in order."""
    app, seed = family_sync, random.randrange(2**32)
    rng = random.Random(seed)
    settled = 0
    got: dict[str, list[int]] = {"two": [], "three": []}

    async def scene() -> None:
        flock = [asyncio.create_task(deliver(app.keys("default"), app)) for _ in range(3)]
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
            await asyncio.sleep(rng.choice([0, 0, 0.0005]))
        for one in flock:
            if rng.random() < 0.7:
                one.cancel()  # its commands may be carried out all the same
        await asyncio.gather(*flock, return_exceptions=True)
        await app.backend.aclose()

    for _ in range(rounds(2000, 60)):
        count = rng.choice([1, 5, 130])
        settle(app, [(rng.choice(list(got)), settled + i) for i in range(count)])
        settled += count
        asyncio.run(scene())
        if rng.random() < 0.5:
            got["two"] += take_all(app, "two")
    asyncio.run(emptied(app))
    for queue, numbers in got.items():
        while more := take_all(app, queue):
            numbers += more

    assert [numbers == sorted(numbers) for numbers in got.values()] == [True, True], f"out of order (seed {seed})"
    assert sorted(got["two"] + got["three"]) == list(range(settled)), f"lost or doubled (seed {seed})"


def test_full_target_keeps_only_its_own(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """A queue at its maximum gets its followers when there is room; those for others arrive before, and none twice."""
    app = family_sync
    settle(app, TARGETS)
    redis.hset(app.keys("three").conf, "max_length", 1)
    for _ in range(2):
        with pytest.raises(QueueFull):
            asyncio.run(emptied(app))
    assert take_all(app, "two") == [1, 3]
    redis.hdel(app.keys("three").conf, "max_length")
    assert asyncio.run(emptied(app)) == 1
    assert (take_all(app, "two"), take_all(app, "three"), take_all(app, "default")) == ([], [2, 5], [4])


@pytest.mark.row("C4", "B3")
def test_numbers_taken_back_lose_nothing(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """A source whose number a failover took back, even to a clock that runs behind, still delivers what is new."""
    app = family_sync
    conf, inbox = app.keys("default").conf, app.keys("two").inbox("default")
    for n, change in enumerate(
        (
            lambda: redis.hset(conf, "outbox", "5"),
            lambda: redis.hdel(conf, "outbox"),
            lambda: redis.set(inbox, f"{9 * 10**12}\nok"),
        )
    ):
        settle(app, [("two", n)])
        change()
        asyncio.run(emptied(app))
        assert take_all(app, "two") == [n]
        assert asyncio.run(emptied(app)) == 0


def test_late_deliverer_changes_nothing(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """Who took a batch, froze, and wakes after others have delivered it and the next, pushes and trims nothing."""
    app = family_sync
    keys, backend = app.keys("default"), app.backend
    settle(app, [("two", 1)])
    old = backend.run(outbox.take(keys))
    assert old is not None
    asyncio.run(emptied(app))
    settle(app, [("two", 2)])
    now = backend.run(outbox.take(keys))
    assert now is not None
    backend.run(outbox.deliver(keys, app.keys("two"), now.number, now.parts["two"]))

    with pytest.raises(operations.LateReply):
        backend.run(outbox.deliver(keys, app.keys("two"), old.number, old.parts["two"]))
    assert backend.run(outbox.trim(keys, old.number)) == -1
    again = backend.run(outbox.take(keys, instead=old.number, least=now.number + 99))
    assert again is not None
    assert again.number == now.number
    asyncio.run(emptied(app))
    assert take_all(app, "two") == [1, 2]


def test_large_entries_travel_in_small_batches(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """A batch holds about a megabyte, and always something."""
    app = family_sync
    keys = app.keys("default")
    redis.rpush(
        keys.outbox, *(b'["two","%d",0,null,null,null,null,false,false]\n' % n + b"x" * 400_000 for n in range(5))
    )
    sizes = []
    while batch := app.backend.run(outbox.take(keys)):
        sizes.append(len(batch.parts["two"]))
        app.backend.run(outbox.trim(keys, batch.number))
    assert sizes == [2, 2, 1]


def test_unreadable_entry_is_an_error(family_sync: Conveyor, redis: redis_py.Redis) -> None:
    """An entry of another version stays where it is, with an error that says so."""
    keys = family_sync.keys("default")
    redis.rpush(keys.outbox, b"from the future")
    with pytest.raises(ConfigurationError, match="Upgrade") as caught:
        asyncio.run(emptied(family_sync))
    assert caught.value.code == "E45"
    assert redis.llen(keys.outbox) == 1
    redis.delete(keys.outbox)
