"""The message queue on a real server: pushing, counting, caring."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from conveyor.errors import ConfigurationError, PayloadError, QueueFull
from conveyor.messaging.message import Batch
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.client.client import Client
from support.time_limits import PATIENCE
from support.waiting import until


@dataclass
class Order:
    id: str
    customer: str
    total: int


def order(number=1):
    return Order(f"o{number}", "c7", number)


@pytest.fixture
def queue(backend):
    queue = Queue(backend, "orders", Order, lease_ms=2000)
    yield queue
    assert backend.run(inspection.audit(queue.keys)) == []
    queue.purge()
    queue.purge(dead=True)


def dump(redis):
    """Every key with its content."""
    return {key: redis.dump(key) for key in redis.keys("*")}


def take(queue, count):
    """Pull and ack; return the bodies."""
    bodies = []
    for message in queue.pull(count):
        bodies.append(message.body)
        message.ack()
    return bodies


def commands(redis, work):
    """Return what *work* returns and how many commands clients sent meanwhile."""
    redis.config_resetstat()
    value = work()
    stats = redis.info("commandstats")
    inner = redis.info("stats")["total_commands_processed"]
    return value, {name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()}, inner


class TestPush:
    def test_first_in_first_out(self, queue):
        """Messages are taken in the order in which they were accepted, one by one or in bulk."""
        first = queue.push(order(1))
        rest = queue.push_many(order(n) for n in range(2, 3002))
        assert first.startswith("orders:")
        assert len(set(rest)) == 3000
        got = [m for _ in range(4) for m in queue.pull(1000)]
        assert [m.body.total for m in got] == list(range(1, 3002))
        assert [m.id for m in got] == [first, *rest]
        Batch(got).ack()

    def test_priorities(self, queue):
        """Higher first, in order within one."""
        for priority, number in [(0, 1), (9, 2), (5, 3), (9, 4)]:
            queue.push(order(number), priority=priority)
        assert [o.total for o in take(queue, 9)] == [2, 4, 3, 1]

    def test_front(self, queue):
        """Each push to the front stands before all others."""
        queue.push(order(1))
        queue.push_many([order(2), order(3)], front=True)
        assert [o.total for o in take(queue, 9)] == [3, 2, 1]

    @pytest.mark.usefixtures("only_when_woken")
    def test_delay_and_instant(self, queue):
        """A delayed message is counted as scheduled and taken when it is due, not before."""
        queue.push(order(4), delay="1h")
        queue.push(order(2), at=datetime.now(UTC) + timedelta(hours=1))
        queue.push(order(3), at=datetime.now(UTC) - timedelta(hours=1))
        assert take(queue, 9) == [order(3)]
        assert (queue.stats().scheduled, len(queue)) == (2, 2)
        begin = time.monotonic()
        queue.push(order(1), delay="200ms")
        [message] = queue.pull(9, wait="1h")
        assert message.body == order(1)
        assert 0.19 < time.monotonic() - begin < PATIENCE
        message.ack()

    def test_expiry(self, queue):
        """A message that is not leased in time is dropped."""
        queue.push(order(1), expires="1ms")
        queue.push(order(2), expires="1h")
        pushed = time.monotonic()
        until(lambda: time.monotonic() > pushed + 0.005)
        assert take(queue, 9) == [order(2)]
        assert len(queue) == 0

    def test_headers(self, queue):
        """Headers arrive as they were given."""
        queue.push(order(), headers={"trace": "a\nb\t", "ü": "€"})
        [message] = queue.pull()
        assert message.headers == {"trace": "a\nb\t", "ü": "€"}
        message.ack()

    def test_own_id_is_a_key_for_a_day(self, queue, redis):
        """A second push of an id stores nothing, while the message lives and after it ended."""
        assert [queue.push(order(1), id="o-7"), queue.push(order(2), id="o-7")] == ["o-7", "o-7"]
        [message] = queue.pull(9)
        assert (message.id, message.body) == ("o-7", order(1))
        message.ack()
        assert queue.push(order(3), id="o-7") == "o-7"
        assert len(queue) == 0
        assert 0 < redis.pttl("conveyor:{orders}:unique:i:o-7") <= 86_400_000

    def test_unique_key_while_it_lives(self, queue):
        """A second push returns the id of the first until that one has ended."""
        first = queue.push(order(1), unique="user 7")
        assert queue.push(order(2), unique="user 7") == first
        assert take(queue, 9) == [order(1)]
        assert queue.push(order(3), unique="user 7") != first
        assert take(queue, 9) == [order(3)]

    def test_bulk_costs_a_call_a_thousand(self, queue, redis):
        """3,000 messages are three pushes."""
        queue.push(order())
        _, calls, _ = commands(redis, lambda: queue.push_many([order(n) for n in range(3000)]))
        assert calls["evalsha"] == 3
        assert len(queue) == 3001

    def test_a_generator_is_not_held(self, queue, monkeypatch):
        """An iterator is read in windows: sent messages are released before the next window is read."""
        monkeypatch.setattr("conveyor.messaging.publisher.WINDOW", 2000)
        lengths = []

        def orders():
            for number in range(5000):
                if number % 2000 == 0:
                    lengths.append(len(queue))
                yield order(number)

        assert len(queue.push_many(orders())) == 5000
        assert lengths == [0, 2000, 4000]

    def test_large_messages_travel_in_smaller_calls(self, queue, redis, monkeypatch):
        """No call of a bulk push carries much more than its share of bytes."""
        monkeypatch.setattr("conveyor.messaging.publisher.CHUNK_BYTES", 10_000)
        queue.push(order())
        big = [Order("x" * 3000, "c", n) for n in range(10)]
        _, calls, _ = commands(redis, lambda: queue.push_many(big))
        assert calls["evalsha"] == 4
        assert [o.total for o in take(queue, 99)] == [1, *range(10)]


class TestMaximumLength:
    def test_refused_whole(self, backend, redis):
        """A push beyond the maximum stores nothing, in one call or in what would be many."""
        queue = Queue(backend, "small", Order, lease_ms=2000, max_length=2500)
        queue.push_many([order(n) for n in range(2000)])
        with pytest.raises(QueueFull, match="2000 jobs and takes at most 2500"):
            queue.push_many(order(n) for n in range(1500))
        with pytest.raises(QueueFull):
            queue.push_many([order(n) for n in range(1500)], priority=3)
        assert (len(queue), queue.stats().ready) == (2000, 2000)
        assert len(queue.push_many([order(n) for n in range(500)], priority=3)) == 500
        with pytest.raises(QueueFull):
            queue.push(order())
        assert queue.purge() == 2500

    def test_counts_what_is_leased(self, backend):
        """The maximum bounds everything accepted and not finished."""
        queue = Queue(backend, "small", Order, lease_ms=2000, max_length=1)
        queue.push(order())
        [message] = queue.pull()
        with pytest.raises(QueueFull):
            queue.push(order())
        message.ack()
        queue.push(order())
        assert queue.purge() == 1

    def test_too_many_at_a_time(self, backend, monkeypatch):
        """A push that cannot be accepted in one step is refused before any of it is sent."""
        monkeypatch.setattr("conveyor.messaging.publisher.WINDOW", 10)
        queue = Queue(backend, "small", Order, lease_ms=2000, max_length=100)
        with pytest.raises(ConfigurationError, match="at most 10 messages at a time"):
            queue.push_many(order(n) for n in itertools.count())
        assert len(queue) == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("value", "options"),
        [
            ({"id": "o1"}, {}),
            (Order("o1", "c", "many"), {}),
            (Order("x" * 600_000, "c", 1), {}),
            (Order("\ud800", "c", 1), {}),
            (object(), {}),
            (order(), {"priority": 10}),
            (order(), {"priority": True}),
            (order(), {"delay": "soon"}),
            (order(), {"delay": -1}),
            (order(), {"at": datetime(2030, 1, 1)}),  # noqa: DTZ001
            (order(), {"at": datetime.now(UTC), "delay": 1}),
            (order(), {"front": True, "delay": 1}),
            (order(), {"expires": 0}),
            (order(), {"id": ""}),
            (order(), {"id": "a\tb"}),
            (order(), {"unique": "x" * 201}),
            (order(), {"headers": {"a": 1}}),
            (order(), {"headers": ["a"]}),
            (order(), {"headers": {"a": "\ud800"}}),
            (order(), {"headers": {"a": "x" * 9000}}),
            (order(), {"group": "c\n7"}),
            (order(), {"wait_replicas": -1}),
            (order(), {"timeout": "1s"}),
        ],
    )
    def test_nothing_is_stored(self, queue, redis, value, options):
        """A wrong value or option raises, and the data stays as it was, byte for byte."""
        queue.push(order())
        before = dump(redis)
        with pytest.raises((PayloadError, ConfigurationError)):
            queue.push(value, **options)
        with pytest.raises((PayloadError, ConfigurationError)):
            queue.push_many([order()] * 1500 + [value], **options)
        with pytest.raises((PayloadError, ConfigurationError)):
            asyncio.run(apush(queue, value, options))
        assert dump(redis) == before

    def test_the_place_is_named(self, queue):
        """An error in bulk names the message, and what was stored before, if anything was."""
        with pytest.raises(PayloadError, match=r"Message 1,200: .*Nothing was stored") as caught:
            queue.push_many([order()] * 1200 + [3])
        assert caught.value.code == "E03"

    @pytest.mark.parametrize(
        "options",
        [
            {"partitions": 2}, {"full": "block"}, {"full": "drop-oldest"}, {"full": "maybe"}, {"limits": ["x"]},
            {"max_length": 0}, {"max_attempts": 0}, {"lease_ms": 5},
        ],
    )  # fmt: skip
    def test_declarations(self, backend, options):
        """An option that is not supported is refused where it is declared."""
        with pytest.raises(ConfigurationError):
            Queue(backend, "q", Order, **{"lease_ms": 1000, **options})

    def test_one_id_for_many(self, queue):
        """An id or a key belongs to one message."""
        with pytest.raises(ConfigurationError, match="push_many takes no id and no unique"):
            queue.push_many([order()], id="x", unique="y")

    async def test_blocking_calls_in_a_loop(self, queue_in_loop):
        """Each names its twin instead of stopping the loop, and its repr does no I/O."""
        queue = queue_in_loop
        for call in (lambda: queue.push(order()), lambda: queue.push_many([order()]), queue.pull, queue.consume,
                     queue.batches, queue.stats, queue.purge, queue.pause, lambda: len(queue)):  # fmt: skip
            with pytest.raises(ConfigurationError) as caught:
                call()
            assert caught.value.code == "E06"
        with pytest.raises(
            ConfigurationError,
            match=r"queue\.push\(\) was called .*test_queue\.py:\d+ in test_(.|\n)*await queue\.apush\(",
        ):
            queue.push(order())
        assert repr(queue) == "<Queue orders>"


async def apush(queue, value, options):
    try:
        await queue.apush(value, **options)
    finally:
        await queue.client.aclose()


@pytest.fixture
async def queue_in_loop(url):
    backend = Client(url)
    yield Queue(backend, "orders", Order, lease_ms=2000)
    await backend.aclose()


class TestCare:
    def test_counts(self, queue):
        """len counts what waits; stats and repr tell the rest."""
        queue.push_many([order(n) for n in range(3)])
        queue.push(order(), delay="1h")
        first, second = queue.pull(2)
        second.dead("no")
        stats = queue.stats()
        assert (stats.ready, stats.scheduled, stats.waiting, stats.leased, stats.dead) == (1, 1, 0, 1, 1)
        assert (stats.paused, stats.workers, len(queue), bool(queue)) == (False, 1, 2, True)
        assert 0 <= stats.oldest_age < 5
        assert repr(queue) == "<Queue orders: 1 ready, 1 scheduled, 1 leased, 1 dead>"
        first.ack()

    def test_repr_does_not_connect(self, url):
        """Before its first use a queue prints its name alone."""
        assert repr(Queue(Client("redis://127.0.0.1:1/0"), "orders", lease_ms=1000)) == "<Queue orders>"

    def test_purge_takes_what_waits(self, queue):
        """Ready and scheduled messages go, leased and dead ones stay; dead ones go on request."""
        queue.push_many([order(n) for n in range(1203)])
        queue.push(order(), delay="1h")
        queue.push(order(), unique="k")
        kept, dead = queue.pull(2)
        dead.dead("x")
        assert queue.purge() == 1203
        assert (len(queue), queue.stats().leased, queue.stats().dead) == (0, 1, 1)
        assert queue.purge(dead=True) == 1
        assert queue.purge() == 0
        kept.ack()
        queue.push(order(), unique="k")
        assert len(queue) == 1

    def test_dead_letters_keep_everything(self, queue):
        """A dead letter tells what, why and when, with the bytes as they were pushed; oldest first."""
        queue.push(order(1))
        queue.push(order(2), id="mine")
        for message in queue.pull(2):
            message.dead(f"not {message.body.total}")
        first, second = queue.dead_letters()
        assert first.payload == b'{"id":"o1","customer":"c7","total":1}'
        assert (first.task, first.error, first.attempts) == ("", "dead: not 1", 1)
        assert (second.id, second.error) == ("mine", "dead: not 2")
        assert abs(datetime.now(UTC) - first.died_at) < timedelta(seconds=10)

    def test_redrive(self, queue):
        """Dead letters come back oldest first, with a new attempt number; those made meanwhile wait."""
        queue.push_many([order(n) for n in range(600)])
        pulled = queue.pull(600)
        pulled[0]._settler.settle([message._dead("x") for message in pulled])
        assert queue.redrive(limit=0) == 0
        assert queue.redrive(limit=1) == 1
        assert queue.redrive() == 599
        messages = queue.pull(600)
        assert [m.body.total for m in messages] == list(range(600))
        assert {m.attempt for m in messages} == {2}
        Batch(messages).ack()

    async def test_awaitable_twins(self, queue_in_loop):
        """Each does what its blocking form does."""
        queue = queue_in_loop
        ids = await queue.apush_many([order(n) for n in range(2500)])
        one = await queue.apush(order(7), unique="k", priority=3)
        assert await queue.apush(order(8), unique="k") == one
        assert (await queue.alen(), len(ids)) == (2501, 2500)
        await queue.apause()
        assert await queue.apull(1) == []
        await queue.aresume()
        [message] = await queue.apull(1)
        assert message.id == one
        await message.adead("x")
        assert [letter.id async for letter in queue.adead_letters()] == [one]
        assert await queue.aredrive() == 1
        assert (await queue.astats()).ready == 2501
        assert await queue.apurge() == 2501
        assert await queue.apurge(dead=True) == 0

    async def test_concurrent_pushes_share_calls(self, queue_in_loop, redis):
        """A hundred pushes of one tick travel in a few calls."""
        queue = queue_in_loop
        await queue.apush(order())
        redis.config_resetstat()
        ids = await asyncio.gather(*(queue.apush(order(n)) for n in range(100)))
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] <= 3
        assert len(set(ids)) == 100
        assert await queue.apurge() == 101
