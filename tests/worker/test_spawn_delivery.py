"""The outbox of a queue at every step: its jobs arrive once, in order, whichever worker delivers and however that ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py

from conveyor import Conveyor, current
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, QueueFull
from conveyor.jobs.core import core_of
from conveyor.messaging import outbox
from conveyor.store import inspection, operations, partitions
from conveyor.store.operations import Settlement
from conveyor.store.transport.async_connection import ConnectionLost
from conveyor.worker.leasing.spawn_delivery import SpawnDelivery, deliver
from support.cut_commands import AsyncCut, Dies
from support.manual_worker import ManualWorker
from support.running_worker import drain
from support.spawned_jobs import emptied, entry, settle, take_all


@pytest.mark.row("A3")
def test_zombie_spawns_nothing(family: Conveyor, redis: redis_py.Redis) -> None:
    """The end of an attempt whose lease was lost is refused with all that it spawned."""
    with pytest.raises(operations.WorkerUnregistered):
        settle(family, [("two", 1)], reaped=True)
    assert redis.exists(family.client.keys("default").outbox) == 0
    assert take_all(family, "default") == [0]


def test_one_refused_end_takes_its_followers_along(family: Conveyor, redis: redis_py.Redis) -> None:
    """In a report, what one job spawned leaves and what another spawned that is not held any more does not."""
    app = family
    for n in range(2):
        app.tasks["family.parent"].enqueue(n)
    manual = ManualWorker(app)
    kept, gone = manual.take(2)
    app.client.run(operations.extend(manual.keys, manual.worker, gone, "other", 60_000, b""))
    ends = [
        one for id_ in (gone, kept) for one in (Settlement("S", id_, record=entry(app, "two", 1)), Settlement("D", id_))
    ]

    assert manual.turn(0, *ends).lost == [gone]
    assert [outbox.read(one)[0] for one in redis.lrange(manual.keys.outbox, 0, -1)] == ["two"]
    app.client.run(operations.reap(manual.keys, "other"))
    manual.leave()
    assert asyncio.run(emptied(app)) == 1
    assert (take_all(app, "two"), take_all(app, "default")) == ([1], [1])


@pytest.fixture
def family(url: str) -> Any:
    """The same app for tests without a loop."""
    with Conveyor(url) as app:

        @app.task(name="family.follower", queue="two")
        async def follower(n: int) -> None: ...

        @app.task(name="family.parent")
        async def parent(n: int) -> None: ...

        yield app


TARGETS = [("two", 1), ("three", 2), ("two", 3), ("default", 4), ("three", 5)]


@pytest.mark.row("A2", "C16", "D15")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize("error", [Dies, ConnectionLost], ids=["dies", "cut"])
def test_once_each_wherever_it_breaks(
    family: Conveyor, monkeypatch: pytest.MonkeyPatch, sent: bool, error: type[BaseException]
) -> None:
    """
    The deliverer dies, or its connection breaks, at every step: each follower arrives once, in its order.

    Fast consumers finish what has arrived before the next deliverer begins, so no id is left to recognise a repeat by.
    """
    app, steps, at = family, 1, 0
    while at <= steps:
        got: dict[str, list[int]] = {"two": [], "three": [], "default": []}
        settle(app, TARGETS)
        with monkeypatch.context() as patch:
            fatal = AsyncCut(patch, at, sent=sent, error=error)
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
def test_deliverers_that_meet_push_once(family: Conveyor, rounds: Callable[[int, int], int]) -> None:
    """Three deliverers at once, cut off at random, and consumers beside them: 0 lost, 0 doubled, each queue in order."""
    app, seed = family, random.randrange(2**32)
    rng = random.Random(seed)
    settled = 0
    got: dict[str, list[int]] = {"two": [], "three": []}

    async def work() -> None:
        flock = [asyncio.create_task(deliver(app.client.keys("default"), core_of(app))) for _ in range(3)]
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
            await asyncio.sleep(rng.choice([0, 0, 0.0005]))
        for one in flock:
            if rng.random() < 0.7:
                one.cancel()  # its commands may be carried out all the same
        await asyncio.gather(*flock, return_exceptions=True)
        await app.client.aclose()

    for _ in range(rounds(2000, 60)):
        count = rng.choice([1, 5, 130])
        settle(app, [(rng.choice(list(got)), settled + i) for i in range(count)])
        settled += count
        asyncio.run(work())
        if rng.random() < 0.5:
            got["two"] += take_all(app, "two")
    asyncio.run(emptied(app))
    for queue, numbers in got.items():
        while more := take_all(app, queue):
            numbers += more

    assert [numbers == sorted(numbers) for numbers in got.values()] == [True, True], f"out of order (seed {seed})"
    assert sorted(got["two"] + got["three"]) == list(range(settled)), f"lost or doubled (seed {seed})"


def test_full_target_keeps_only_its_own(family: Conveyor, redis: redis_py.Redis) -> None:
    """A queue at its maximum gets its followers when there is room; those for others arrive before, and none twice."""
    app = family
    settle(app, TARGETS)
    redis.hset(app.client.keys("three").conf, "max_length", 1)
    for _ in range(2):
        with pytest.raises(QueueFull):
            asyncio.run(emptied(app))
    assert take_all(app, "two") == [1, 3]
    redis.hdel(app.client.keys("three").conf, "max_length")
    assert asyncio.run(emptied(app)) == 1
    assert (take_all(app, "two"), take_all(app, "three"), take_all(app, "default")) == ([], [2, 5], [4])


@pytest.mark.row("C4", "B3")
def test_numbers_taken_back_lose_nothing(family: Conveyor, redis: redis_py.Redis) -> None:
    """A source whose number a failover took back, even to a clock that runs behind, still delivers what is new."""
    app = family
    conf, inbox = app.client.keys("default").conf, app.client.keys("two").inbox("default")
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


def test_late_deliverer_changes_nothing(family: Conveyor, redis: redis_py.Redis) -> None:
    """A deliverer that froze with a batch and wakes after others delivered it and the next pushes and trims nothing."""
    app = family
    keys, client = app.client.keys("default"), app.client
    settle(app, [("two", 1)])
    old = client.run(outbox.take(keys))
    assert old is not None
    asyncio.run(emptied(app))
    settle(app, [("two", 2)])
    now = client.run(outbox.take(keys))
    assert now is not None
    client.run(outbox.push_part(keys, app.client.keys("two"), now.number, now.parts["two"]))

    with pytest.raises(operations.StalePush):
        client.run(outbox.push_part(keys, app.client.keys("two"), old.number, old.parts["two"]))
    assert client.run(outbox.trim(keys, old.number)) == -1
    again = client.run(outbox.take(keys, replacing=old.number, least=now.number + 99))
    assert again is not None
    assert again.number == now.number
    asyncio.run(emptied(app))
    assert take_all(app, "two") == [1, 2]


def test_large_entries_travel_in_small_batches(family: Conveyor, redis: redis_py.Redis) -> None:
    """A batch holds about a megabyte, and always something."""
    app = family
    keys = app.client.keys("default")
    redis.rpush(
        keys.outbox, *(b'["two","%d",0,null,null,null,null,false,false]\n' % n + b"x" * 400_000 for n in range(5))
    )
    sizes = []
    while batch := app.client.run(outbox.take(keys)):
        sizes.append(len(batch.parts["two"]))
        app.client.run(outbox.trim(keys, batch.number))
    assert sizes == [2, 2, 1]


def test_unreadable_entry_is_an_error(family: Conveyor, redis: redis_py.Redis) -> None:
    """An entry of another version stays where it is, with an error that says so."""
    keys = family.client.keys("default")
    redis.rpush(keys.outbox, b"from the future")
    with pytest.raises(ConfigurationError, match="Upgrade") as caught:
        asyncio.run(emptied(family))
    assert caught.value.code == "E45"
    assert redis.llen(keys.outbox) == 1
    redis.delete(keys.outbox)


async def test_partitions_at_both_ends(url: str) -> None:
    """Jobs in partitions spawn jobs into the partitions of another queue: each arrives once, where its id says."""
    app = Conveyor(url)
    app.queue("from", partitions=2)
    app.queue("into", partitions=3)

    @app.task(name="family.follower", queue="into")
    async def follower(n: int) -> int:
        return n

    @app.task(name="family.parent", queue="from")
    async def parent(n: int) -> list[str]:
        return [current().spawn(follower.s(n + i)).id for i in range(10)]

    jobs = [await parent.aenqueue(10 * n) for n in range(6)]
    await drain(app)
    ids = [id_ for job in jobs for id_ in await job.aresult(timeout=60)]
    assert {id_.split(":")[0] for id_ in ids} == {"into/0", "into/1", "into/2"}
    assert [await follower.job(id_).aresult(timeout=60) for id_ in ids] == list(range(60))
    await app.aclose()


async def test_a_partition_that_is_gone(url: str) -> None:
    """A follower for a partition that is gone goes where its id belongs now, once, however often it is repeated."""
    app = Conveyor(url)
    app.queue("into", partitions=2)
    app.task(name="family.follower", queue="into")(_nothing)
    keys, client = app.client.keys("default"), app.client
    prepared = [outbox.read(app.tasks["family.follower"].s().follow()[1])[1] for _ in range(20)]
    written = [outbox.write("into", one) for one in prepared[:10]]
    await client.aexecute("RPUSH", keys.outbox, *written, key=keys.outbox)
    await client.aexecute(
        "RPUSH", keys.outbox, *[outbox.write("into/7", one) for one in prepared[10:]], key=keys.outbox
    )
    batch = await client.arun(outbox.take(keys))
    assert batch is not None
    for _ in range(2):
        assert await deliver(keys, core_of(app))
        await client.aexecute("RPUSH", keys.outbox, *written, key=keys.outbox)
        await client.aexecute("HSET", keys.conf, "outbox", f"{batch.number} 10", key=keys.conf)  # as if never trimmed
    await deliver(keys, core_of(app))
    counts = [await client.arun(inspection.counts(one)) for one in core_of(app).partitioned["into"].keys]
    assert [one.ready > 0 for one in counts] == [True, True]
    assert sum(one.ready for one in counts) == 20
    await drain(app)
    await app.aclose()


async def _nothing() -> None: ...


@pytest.mark.row("D57")
async def test_partitions_do_not_change_over_what_is_not_delivered(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While outboxes of a queue hold spawned jobs its partitions stay, and doctor and lists say so; delivered, each ran once."""
    ran: list[int] = []

    def declare(app: Conveyor, partitions: int) -> Any:
        app.queue("from", partitions=partitions)

        @app.task(name="family.follower", queue="two")
        async def follower(n: int) -> None:
            ran.append(n)

        @app.task(name="family.parent", queue="from")
        async def parent(n: int) -> None:
            current().spawn(follower.s(n))

        return parent

    async with Conveyor(url) as app:
        parent, admin = declare(app, 4), Admin(app.client)
        for n in range(20):
            await parent.aenqueue(n)
        with monkeypatch.context() as patch:
            patch.setattr(SpawnDelivery, "begin", lambda _: None)  # as if each worker died before it delivered
            await drain(app, queues={"from": 1.0})
        info = await asyncio.to_thread(admin.queue, "from")
        assert (info.outbox, info.ready, info.stranded) == (20, 0, True)
        report = await asyncio.to_thread(admin.doctor)
        assert any(
            "'from' has 20 spawned jobs or published copies in its outbox" in one.text for one in report.problems
        )
        with pytest.raises(ConfigurationError, match="20 of these are spawned jobs") as refused:
            await asyncio.to_thread(admin.repartition, "from", 2)
        assert refused.value.code == "E35"
        await drain(app)
        assert await asyncio.to_thread(admin.repartition, "from", 2) == 4
        assert sorted(ran) == list(range(20))


@pytest.mark.row("D57")
async def test_partition_is_not_shut_over_what_is_not_delivered(url: str, redis: redis_py.Redis) -> None:
    """An entry that comes into an outbox amid the change keeps its partition open, and the number as it was."""
    async with Conveyor(url) as app:
        app.queue("from", partitions=2)
        keys = core_of(app).partitioned["from"].keys[1]
        await core_of(app).partitioned["from"].aagree()
        redis.rpush(keys.outbox, "x")
        assert await app.client.arun(partitions.repartition(keys, "close", "token", 2)) == (0, 1)
        redis.delete(keys.outbox)
        assert await app.client.arun(partitions.repartition(keys, "close", "token", 2)) == (1, 2)


@pytest.mark.row("D57")
async def test_a_queue_that_is_in_one_piece_now(url: str) -> None:
    """Followers for partitions of a queue that has none any more go to the queue, once; what a partition accepted stays there."""
    async with Conveyor(url) as app:
        app.task(name="family.follower", queue="into")(_nothing)
        keys, client = app.client.keys("default"), app.client
        prepared = [outbox.read(app.tasks["family.follower"].s().follow()[1])[1] for _ in range(30)]
        written = [outbox.write(f"into/{n % 3}", one) for n, one in enumerate(prepared)]
        await client.aexecute("RPUSH", keys.outbox, *written, key=keys.outbox)
        batch = await client.arun(outbox.take(keys))
        assert batch is not None
        accepted = client.keys("into/0").inbox("default")
        await client.aexecute("SET", accepted, f"{batch.number}\nok", key=accepted)
        for _ in range(2):
            assert await deliver(keys, core_of(app))
            await client.aexecute("RPUSH", keys.outbox, *written, key=keys.outbox)
            await client.aexecute("HSET", keys.conf, "outbox", f"{batch.number} 30", key=keys.conf)
        await deliver(keys, core_of(app))
        assert (await client.arun(inspection.counts(client.keys("into")))).ready == 20
        await drain(app)
