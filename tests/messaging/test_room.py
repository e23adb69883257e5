"""Producers that wait for room in a full queue: in order, each woken once, none stranded, none polling."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from typing import ClassVar

import pytest

from conveyor.errors import ConfigurationError, QueueFull
from conveyor.messaging.limits import Concurrency
from conveyor.messaging.queue import Queue
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from support.script_faults import break_script
from support.waiting import auntil, until, until_ended


def bounded(backend, most=3, name="small", **options):
    return Queue(backend, name, int, lease_ms=2000, max_length=most, full="block", **options)


@pytest.fixture
def queue(backend, redis):
    """A queue that takes three messages; nobody stands in its line when the test is over, and the audit finds nothing."""
    queue = bounded(backend)
    yield queue
    queue.purge()
    assert backend.run(inspection.audit(queue.keys)) == []
    until(lambda: not redis.exists(queue.keys.room))
    assert redis.hget(queue.keys.conf, "line") is None


def in_line(redis, queue):
    """Return how many producers stand in the line, those that were called included."""
    return redis.zcard(queue.keys.room)


class Producers:
    """Threads that push one number each, begun one behind the other, so that their order in the line is that of the numbers."""

    def __init__(self, redis, queue):
        self.redis, self.queue = redis, queue
        self.threads, self.errors = [], []

    def begin(self, *numbers, **options):
        for number in numbers:
            before = in_line(self.redis, self.queue)
            thread = threading.Thread(daemon=True, target=self._push, args=(number, options))
            thread.start()
            self.threads.append(thread)
            until(lambda before=before: in_line(self.redis, self.queue) > before)

    def _push(self, number, options):
        try:
            self.queue.push(number, **options)
        except Exception as error:
            self.errors.append(error)

    def join(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def take(queue, count):
    """Pull and acknowledge so many messages, one at a time; return their bodies."""
    bodies = []
    while len(bodies) < count:
        messages = queue.pull(wait="20s")
        assert messages, f"nothing comes behind {bodies}"
        for message in messages:
            bodies.append(message.body)
            message.ack()
    return bodies


def scripts_sent(redis):
    """Return how many scripts clients have sent since the statistics were reset."""
    return redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]


def commands_run(redis):
    """Return how often each command ran since the statistics were reset, those inside scripts too; not those of new connections."""
    counts = Counter()
    for name, row in redis.info("commandstats").items():
        command = name.removeprefix("cmdstat_")
        if command.partition("|")[0] not in {"info", "config", "hello", "auth", "client", "select"}:
            counts[command] += row["calls"]
    return counts


class TestThreads:
    def test_a_full_queue_makes_the_push_wait(self, queue, redis):
        """A push to a full queue returns when a message was acknowledged, and not when it was only leased."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4)
        [message] = queue.pull()
        assert in_line(redis, queue) == 1
        message.ack()
        producers.join()
        assert take(queue, 3) == [2, 3, 4]
        assert producers.errors == []

    def test_in_order_and_each_woken_once(self, queue, redis, monkeypatch):
        """Producers are woken in the order in which they came, and each pushes exactly twice: refused, then accepted."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4)
        assert take(queue, 1) == [1]
        producers.join()  # so that the process is subscribed, and has told those who waited for that
        attempts, push = [], queue.client.push

        def counted(keys, entries, **options):
            attempts.extend(int(entry.rest.rpartition(b"\n")[2]) for entry in entries)
            return push(keys, entries, **options)

        monkeypatch.setattr(queue.client, "push", counted)
        redis.config_resetstat()
        producers.begin(*range(5, 25))
        assert scripts_sent(redis) == 20
        assert queue.purge() == 3
        assert take(queue, 20) == list(range(5, 25))
        producers.join()
        assert producers.errors == []
        assert Counter(attempts) == dict.fromkeys(range(5, 25), 2)

    def test_nobody_overtakes_the_line(self, queue, redis):
        """A push that comes while others wait stands behind them, one with timeout=0 is refused."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4, 5)
        with pytest.raises(QueueFull):
            queue.push(0, timeout=0)
        other = Queue(queue.client, "small", int, lease_ms=2000, max_length=3)
        with pytest.raises(QueueFull):
            other.push(0)
        assert take(queue, 5) == [1, 2, 3, 4, 5]
        producers.join()

    def test_the_timeout_ends_in_queue_full(self, queue, redis):
        """After its timeout a push raises QueueFull, has stored nothing, and has left the line."""
        queue.push_many([1, 2, 3])
        began = time.monotonic()
        with pytest.raises(QueueFull, match=r"waited .* for room"):
            queue.push(4, timeout="200ms")
        assert time.monotonic() - began >= 0.2
        assert in_line(redis, queue) == 0
        assert take(queue, 3) == [1, 2, 3]
        assert len(queue) == 0

    def test_a_waiter_that_gives_up_does_not_hold_the_next(self, queue, redis):
        """When the first of the line gives up, the second is the next."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4, timeout="300ms")
        producers.begin(5)
        until(lambda: producers.errors)
        assert take(queue, 4) == [1, 2, 3, 5]
        producers.join()

    def test_push_many_is_accepted_whole_and_keeps_its_place(self, queue, redis):
        """A bulk push waits until all of it fits; those behind it wait too, though they would fit."""
        queue.push_many([1, 2, 3])
        bulk = threading.Thread(daemon=True, target=queue.push_many, args=([4, 5],))
        bulk.start()
        until(lambda: in_line(redis, queue) == 1)
        producers = Producers(redis, queue)
        producers.begin(6)
        assert take(queue, 1) == [1]
        assert (len(queue), in_line(redis, queue)) == (2, 2)
        assert take(queue, 5) == [2, 3, 4, 5, 6]
        until_ended(bulk)
        producers.join()

    def test_push_many_of_more_than_the_queue_takes_comes_in_parts(self, queue):
        """A bulk push of more than max_length is stored in parts, as room comes, in its order."""
        bulk = threading.Thread(daemon=True, target=queue.push_many, args=(iter(range(40)),))
        bulk.start()
        assert take(queue, 40) == list(range(40))
        until_ended(bulk)

    def test_a_bulk_push_that_runs_out_of_time_says_what_it_stored(self, queue):
        """At its timeout a push in parts raises QueueFull with the number that was stored."""
        with pytest.raises(QueueFull, match="The first 3 messages were stored"):
            queue.push_many(list(range(9)), timeout="200ms")
        assert take(queue, 3) == [0, 1, 2]


class TestRoom:
    """Everything that makes room wakes the next producer."""

    @pytest.fixture
    def waiting(self, queue, redis):
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4)
        yield queue
        producers.join()
        assert producers.errors == []

    def test_dead(self, waiting):
        """A dead letter takes no place."""
        [message] = waiting.pull()
        message.dead("broken")
        until(lambda: len(waiting) == 3)
        assert waiting.purge(dead=True) == 1

    def test_purge(self, waiting):
        """A purge makes room."""
        assert waiting.purge() == 3

    def test_cancel(self, waiting):
        """A cancelled message makes room, though its entry stays in the list for a while."""
        [id_] = waiting.client.run(inspection.list_jobs(waiting.keys, "ready", 0, 1)).rows
        assert waiting.client.run(operations.cancel(waiting.keys, id_.id)) == 1

    def test_expiry(self, waiting, redis):
        """A message that expires makes room when a turn drops it."""
        first = redis.lindex(waiting.keys.ready[0], 0)
        redis.hset(waiting.keys.jobs, first, b" e1\n\n1")
        assert take(waiting, 1) == [2]

    def test_a_raised_maximum(self, waiting):
        """An operator's higher maximum makes room."""
        waiting.client.run(operations.configure(waiting.keys, "max_length", "10"))
        until(lambda: len(waiting) == 4)

    def test_deleted_and_emptied(self, waiting, redis):
        """A job that is deleted while it waits makes room."""
        [row] = waiting.client.run(inspection.list_jobs(waiting.keys, "ready", 0, 1)).rows
        assert waiting.client.run(operations.cancel(waiting.keys, row.id, delete=True)) == 1


class TestLostProducers:
    def test_a_killed_producer_is_passed_over(self, queue, redis, url):
        """A process that died in the line, as a closed connection tells, gets no place: the next one is called at once."""
        queue.push_many([1, 2, 3])
        other = Client(url)
        dead = Producers(redis, bounded(other))
        dead.begin(4, 5, timeout="60s")
        producers = Producers(redis, queue)
        producers.begin(6)
        for subscription in other.room._subscriptions.values():
            subscription.close()
        until(lambda: all(count == 0 for _, count in redis.pubsub_numsub(other.room._channel)))
        assert take(queue, 4) == [1, 2, 3, 6]
        producers.join()
        other.room._wake_all(
            next(iter(other.room._subscriptions))
        )  # so that its threads end: they push, as they live still
        dead.join()
        assert sorted(take(queue, 2)) == [4, 5]
        other.close()

    def test_a_call_without_an_answer_lapses(self, queue, redis):
        """Places that were kept for a producer which does not come are given to the next."""
        queue.push_many([1, 2, 3])
        redis.zadd(queue.keys.room, {"nowhere 1 1": -1})
        redis.hset(queue.keys.conf, "line", "1")
        producers = Producers(redis, queue)
        redis.hset(queue.keys.conf, "line", "1")
        thread = threading.Thread(daemon=True, target=queue.push, args=(4,))
        thread.start()
        assert take(queue, 4) == [1, 2, 3, 4]
        until_ended(thread)
        producers.join()

    def test_a_called_producer_that_dies_leaves_nothing_for_good(self, queue, redis):
        """The places kept for a producer that was called last a bounded time in Redis, also where nobody looks at the queue again."""
        queue.push_many([1, 2, 3])
        with redis.pubsub() as channel:
            channel.subscribe("here")
            until(lambda: redis.pubsub_numsub("here")[0][1] == 1)
            redis.zadd(queue.keys.room, {"here 1 1": 1})
            redis.hset(queue.keys.conf, "line", "1")
            take(queue, 1)
            assert redis.zscore(queue.keys.room, "here 1 1") < 0
            assert 0 < redis.pttl(queue.keys.room) <= 600_000
            redis.zadd(queue.keys.room, {"here 1 1": -1})
        assert queue.purge() == 2

    def test_a_call_to_a_push_that_was_given_up_is_handed_on(self, queue, redis):
        """A producer that is called after its caller has gone gives its place to the next."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4)
        room = queue.client.room
        gone = f"{room._channel} 99 1"
        redis.zadd(queue.keys.room, {gone: 1})  # before the other
        assert take(queue, 4) == [1, 2, 3, 4]
        producers.join()
        until(lambda: in_line(redis, queue) == 0)

    def test_a_lost_connection_strands_nobody(self, queue, redis):
        """After their connection was cut, producers push when there is room."""
        queue.push_many([1, 2, 3])
        producers = Producers(redis, queue)
        producers.begin(4, 5)
        redis.client_kill_filter(_type="pubsub")
        assert sorted(take(queue, 5)) == [1, 2, 3, 4, 5]
        producers.join()
        assert producers.errors == []


def watch_line(queue, redis, url, count, *, watched=0.0):
    """
    Let so many producers wait in line, and then make room for all of them, one after the other.

    Returns how many commands they sent while they were watched for so many seconds, the numbers in the order in which they were
    stored, and how often each was called.
    """

    async def wait_in_line(channels):
        client = Client(url)
        mine = bounded(client)
        tasks = []
        for number in range(count):
            tasks.append(asyncio.create_task(mine.apush(number)))
            await auntil(lambda number=number: in_line(redis, queue) > number)
        sent = scripts_sent(redis)
        await asyncio.sleep(watched)
        idle = scripts_sent(redis) - sent
        names = redis.pubsub_channels("*")
        channels.subscribe(*names)
        for _ in names:
            channels.get_message(timeout=5)
        assert await asyncio.to_thread(queue.purge) == 3
        taken = await asyncio.to_thread(take, queue, count)
        await asyncio.gather(*tasks)
        await client.aclose()
        return idle, taken

    queue.push_many([1, 2, 3])
    with redis.pubsub(ignore_subscribe_messages=True) as channels:
        idle, taken = asyncio.run(wait_in_line(channels))
        told = [message["data"] for message in iter(lambda: channels.get_message(timeout=0.3), None)]
    return idle, taken, Counter(data.split(b"\n")[0] for data in told if b"\n" in data)


@pytest.mark.standalone_only("counts every command that one server runs")
class TestCosts:
    """Commands of a producer that waits for room, and is woken, as the server counts them."""

    @pytest.mark.parametrize("length", [2, 40])
    def test_a_wake(self, queue, redis, length):
        """A producer that waits sends nothing; its wake is one round trip, with the same commands whether 2 or 40 stand behind it."""
        ids = [queue.push(0) for _ in range(3)]
        producers = Producers(redis, queue)

        def count_commands(store):
            """Cancel a message, and store one in its place; return the commands of both."""
            redis.config_resetstat()
            assert queue.client.run(operations.cancel(queue.keys, ids.pop().removeprefix("small:"))) == 1
            store()
            return commands_run(redis)

        for _ in range(2):  # at first the server does not know the scripts
            plain = count_commands(lambda: ids.append(queue.push(0)))
        producers.begin(1)
        count_commands(producers.join)  # the process is subscribed from now on, and has told those who waited for that
        producers.begin(*range(2, 4 + length))
        _, second, third = producers.threads[:3]
        redis.config_resetstat()
        time.sleep(0.3)
        assert commands_run(redis) == {}
        woken = count_commands(second.join)
        assert count_commands(third.join) == woken
        assert (plain["evalsha"], woken["evalsha"]) == (2, 2)
        assert (plain["publish"], woken["publish"]) == (0, 2)  # the call, and the question whether the next one lives
        assert woken.total() - plain.total() == 20  # of the two scripts
        assert queue.purge() == 3
        assert take(queue, length) == list(range(4, 4 + length))
        producers.join()
        assert producers.errors == []


class TestAsync:
    def test_tasks_wait_without_a_thread(self, queue, redis, url):
        """Pushes of one event loop wait in order, in one connection, and those of one tick that fit are stored at once."""

        async def main():
            client = Client(url)
            mine = bounded(client)
            tasks = [asyncio.create_task(mine.apush(number)) for number in range(13)]
            await auntil(lambda: in_line(redis, queue) >= 10)
            taken = await asyncio.to_thread(take, queue, 13)
            await asyncio.gather(*tasks)
            await client.aclose()
            return taken

        assert sorted(asyncio.run(main())) == list(range(13))

    def test_two_hundred_wait_in_order(self, queue, redis, url):
        """Of 200 producers that wait none sends a command; they store in their order, and each is called once."""
        idle, taken, called = watch_line(queue, redis, url, 200, watched=1.1)
        assert idle <= 1
        assert taken == list(range(200))
        assert list(called.values()) == [1] * 200

    # what is broken → the script, the line, what stands there instead
    SABOTAGES: ClassVar[dict[str, tuple[str, str, str]]] = {
        "a producer is called twice": ("PUSH", "redis.call('ZADD', room, int(-(now + 5000)), first)", "redis.call('ZADD', room, 1, first)"),
        "all are called at once": ("PUSH", "free, pending = free - tonumber(places), true", "free = 1"),
        "the last of the line is called": ("PUSH", "'ZRANGE', room, 0, '+inf', 'BYSCORE', 'LIMIT', 0, 1)", "'ZRANGE', room, '+inf', 0, 'BYSCORE', 'REV', 'LIMIT', 0, 1)"),
    }  # fmt: skip

    @pytest.mark.parametrize("name", SABOTAGES)
    def test_sabotage_is_caught(self, queue, redis, url, monkeypatch, name):
        """The order of the producers, and the number of calls, show each of these defects."""
        break_script(monkeypatch, operations, *self.SABOTAGES[name])
        _, taken, called = watch_line(queue, redis, url, 8)
        assert taken != list(range(8)) or list(called.values()) != [1] * 8
        monkeypatch.undo()

    def test_a_cancelled_push_leaves_the_line(self, queue, redis, url):
        """A cancelled push leaves the line, also when it was called at the same moment, and the next gets its place."""

        async def main():
            client = Client(url)
            mine = bounded(client)
            await mine.apush_many([1, 2, 3])
            given_up = asyncio.create_task(mine.apush(4))
            await auntil(lambda: in_line(redis, queue) >= 1)
            stays = asyncio.create_task(mine.apush(5))
            await auntil(lambda: in_line(redis, queue) >= 2)
            given_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await given_up
            await auntil(lambda: in_line(redis, queue) <= 1)
            taken = await asyncio.to_thread(take, queue, 4)
            await stays
            await client.aclose()
            return taken

        assert asyncio.run(main()) == [1, 2, 3, 5]

    def test_the_timeout_of_an_awaited_push(self, queue, redis, url):
        """After its timeout an awaited push raises QueueFull and has left the line."""

        async def main():
            client = Client(url)
            mine = bounded(client)
            await mine.apush_many([1, 2, 3])
            with pytest.raises(QueueFull):
                await mine.apush(4, timeout="100ms")
            await client.aclose()

        asyncio.run(main())
        assert in_line(redis, queue) == 0


class TestHandlers:
    def test_a_handler_does_not_wait_for_its_own_queue(self, queue):
        """Code that handles a message of the queue is refused at once, with the reason; behind the block a push waits again."""
        queue.push_many([1, 2, 3])
        for message in queue.pull():
            with message, pytest.raises(QueueFull, match="handles a job or a message of queue 'small'"):
                queue.push(4)
        queue.push(4)
        for message in queue.pull(4):
            with message as number:
                queue.push(number + 10)
                if number == 2:
                    message.ack()

    def test_a_handler_of_two_queues_waits_for_neither(self, queue, backend):
        """Code that handles messages of two queues is refused by both, and by none when both have ended, in whatever order."""
        other = Queue(backend, "other", int, lease_ms=60_000)
        other.push(9)
        queue.push_many([1, 2, 3])
        mine, (others,) = queue.pull(2), other.pull()
        mine[0].__enter__()
        others.__enter__()
        with pytest.raises(QueueFull, match="handles a job or a message of queue 'small'"):
            queue.push(4, timeout="20s")
        mine[0].__exit__(None, None, None)
        others.__exit__(None, None, None)
        queue.push(4)
        with pytest.raises(QueueFull, match="The push waited"):
            queue.push(5, timeout="50ms")
        mine[1].ack()
        take(queue, 2)

    def test_a_handler_waits_for_another_queue(self, queue, backend, redis):
        """Code that handles a message of one queue waits for room in another."""
        first = Queue(backend, "first", int, lease_ms=2000)
        first.push(9)
        queue.push_many([1, 2, 3])

        def forward():
            for message in first.pull():
                with message as number:
                    queue.push(number)

        thread = threading.Thread(daemon=True, target=forward)
        thread.start()
        until(lambda: in_line(redis, queue) == 1)
        assert take(queue, 4) == [1, 2, 3, 9]
        until_ended(thread)


class TestBadInput:
    def test_declarations(self, backend):
        """full= without max_length=, an unknown word, and a timeout for a queue that does not wait are refused."""
        with pytest.raises(ConfigurationError, match="give max_length too"):
            Queue(backend, "q", lease_ms=2000, full="block")
        with pytest.raises(ConfigurationError, match="full must be one of"):
            Queue(backend, "q", lease_ms=2000, max_length=3, full="wait")
        with pytest.raises(ConfigurationError, match="exclude each other"):
            Queue(backend, "q", lease_ms=2000, max_length=3, full="drop-oldest", limits=[Concurrency(2)])
        plain = Queue(backend, "q", lease_ms=2000, max_length=3)
        with pytest.raises(ConfigurationError, match="does not wait"):
            plain.push(1, timeout="1s")
        assert len(plain) == 0


class TestDropOldest:
    """full="drop-oldest": what waits longest makes room for what is new."""

    @pytest.fixture
    def newest(self, backend):
        queue = Queue(backend, "newest", int, lease_ms=2000, max_length=3, full="drop-oldest")
        yield queue
        assert backend.run(inspection.audit(queue.keys)) == []
        queue.purge()

    def test_the_oldest_is_dropped_and_counted(self, newest, redis):
        """A push to a full queue stores the new message, drops the one that waits longest, and counts it; one script does it."""
        newest.push_many([1, 2, 3])
        redis.config_resetstat()
        newest.push(4)
        assert scripts_sent(redis) == 1
        newest.push_many([5, 6])
        assert (len(newest), newest.stats().dropped) == (3, 3)
        assert take(newest, 3) == [4, 5, 6]

    def test_leased_messages_stay(self, newest):
        """A leased message is not dropped; a queue of leased ones alone is full."""
        newest.push_many([1, 2, 3])
        leased = newest.pull(2)
        newest.push(4)
        third = newest.pull()
        assert [message.body for message in third] == [4]
        with pytest.raises(QueueFull):
            newest.push(5)
        for message in leased + third:
            message.ack()
        assert newest.stats().dropped == 1

    def test_the_lowest_priority_goes_first_and_scheduled_ones_last(self, newest):
        """Of the lowest priority the oldest goes first; when nothing is ready, the scheduled one that is due first."""
        newest.push(1, priority=5)
        newest.push(2, delay="1h")
        newest.push(3)
        newest.push(4, priority=9)  # drops 3
        newest.push(5, priority=9)  # drops 1
        assert take(newest, 2) == [4, 5]
        newest.push(6, delay="2h")
        newest.push(7, delay="3h")
        newest.push(8)  # drops 2
        assert (newest.stats().scheduled, newest.stats().dropped) == (2, 3)
        assert take(newest, 1) == [8]

    def test_a_push_of_more_than_the_queue_takes_is_refused(self, newest):
        """A bulk push never drops its own messages: it is refused whole."""
        newest.push(1)
        with pytest.raises(QueueFull):
            newest.push_many([2, 3, 4, 5])
        assert take(newest, 1) == [1]

    def test_a_push_that_stores_nothing_drops_nothing(self, newest):
        """A push with an id that is there already drops nothing."""
        newest.push(1, id="one")
        newest.push_many([2, 3])
        assert newest.push(1, id="one") == "one"
        assert (len(newest), newest.stats().dropped) == (3, 0)
        newest.push(4)
        assert take(newest, 3) == [2, 3, 4]

    def test_cancelled_messages_are_passed_over(self, newest):
        """A cancelled message has no place: the next one is dropped, and the counts stay right."""
        newest.push_many([1, 2, 3])
        [row] = newest.client.run(inspection.list_jobs(newest.keys, "ready", 0, 1)).rows
        newest.client.run(operations.cancel(newest.keys, row.id))
        newest.push_many([4, 5])
        assert newest.stats().dropped == 1
        assert take(newest, 3) == [3, 4, 5]

    def test_front_and_awaited(self, newest, url):
        """A message put before all others stays when it drops one; an awaited push does the same."""
        newest.push_many([1, 2, 3])
        newest.push(4, front=True)

        async def main():
            client = Client(url)
            mine = Queue(client, "newest", int, lease_ms=2000, max_length=3, full="drop-oldest")
            await asyncio.gather(mine.apush(5), mine.apush(6))
            await client.aclose()

        assert take(newest, 1) == [4]
        newest.push(9)
        asyncio.run(main())
        assert take(newest, 3) == [9, 5, 6]

    @pytest.mark.parametrize("options", [{"unique": "u"}, {"group": "g"}])
    def test_what_cannot_be_dropped_is_refused(self, newest, options):
        """A message with a unique key or a group is refused before anything is stored."""
        with pytest.raises(ConfigurationError, match="drops the oldest"):
            newest.push(1, **options)
        assert len(newest) == 0

    def test_a_lowered_maximum_is_reached_step_by_step(self, newest):
        """After an operator has lowered the maximum, a push drops what is too much."""
        newest.push_many([1, 2, 3])
        newest.client.run(operations.configure(newest.keys, "max_length", "1"))
        newest.push(4)
        assert take(newest, 1) == [4]
        newest.client.run(operations.configure(newest.keys, "max_length", ""))


def test_producers_go_on_waiting_when_the_connections_were_closed(backend, queue, redis, url):
    """A producer in line keeps its place while its program closes and opens its connections, and is called there."""
    queue.push_many([0, 0, 0])
    producers = Producers(redis, queue)
    producers.begin(1)
    (entry,) = redis.zrange(queue.keys.room, 0, -1)
    backend.close()
    other = Client(url)
    until(lambda: redis.pubsub_numsub(entry.split()[0])[0][1] == 1)
    assert redis.zrange(queue.keys.room, 0, -1) == [entry]
    Queue(other, "small", int, lease_ms=2000).purge()
    producers.join()
    assert producers.errors == []
    other.close()
