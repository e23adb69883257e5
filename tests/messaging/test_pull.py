"""Explicit ends, pull and batches."""

from __future__ import annotations

import asyncio
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from conveyor import Conveyor, Retry
from conveyor.errors import ConfigurationError, LeaseLost
from conveyor.messaging.consumer.blocking import BlockingSettler, Consumer
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.transport.wakeup import WakeupWaiter
from support.message_fixtures import crash, first
from support.time_limits import PATIENCE
from support.waiting import auntil, until


class TestExplicit:
    def test_ack_is_confirmed_when_it_returns(self, queue):
        """Nothing is leased after it; a second time it is no longer ours."""
        queue.push(1)
        [message] = queue.pull()
        message.ack()
        assert queue.stats().leased == 0
        with pytest.raises(LeaseLost):
            message.ack()

    def test_nack(self, queue):
        """It comes back after the given delay, or by the backoff; each counts, and the last of the budget buries."""
        queue.push(1)
        [message] = queue.pull()
        message.nack(delay="1h")
        assert queue.stats().scheduled == 1
        queue.purge()
        queue.push(2)
        for attempt in (1, 2, 3):
            [message] = queue.pull(wait="2s")
            assert message.attempt == attempt
            message.nack()
        [letter] = queue.dead_letters()
        assert (letter.error, letter.attempts) == ("nack: refused by nack()", 3)

    def test_dead(self, queue):
        """A dead letter with its reason."""
        queue.push(1)
        [message] = queue.pull()
        message.dead("no such address")
        assert [letter.error for letter in queue.dead_letters()] == ["dead: no such address"]

    def test_extend(self, queue):
        """The message gets a lease of its own that outlives its consumer, more than once, and ends like any other."""
        queue.push_many([1, 2])
        consumer, message = first(queue)
        message.extend("1m")
        message.extend("5m")
        consumer.close()
        [member] = queue.client.run(inspection.workers(queue.keys))
        assert member.held == 1
        assert member.end > time.time() * 1000 + 200_000
        message.ack()
        [message] = queue.pull()
        message.extend("1m")
        with message:
            raise ValueError
        until(lambda: queue.stats().ready + queue.stats().scheduled == 1)

    def test_extend_when_lost(self, queue):
        """A lease that was given up cannot be extended."""
        queue.push(1)
        [message] = queue.pull()
        crash(queue, message)
        with pytest.raises(LeaseLost):
            message.extend("1m")

    def test_block_of_a_pulled_message(self, queue):
        """Its end is confirmed with the block."""
        queue.push_many([1, 2])
        for message in queue.pull(2):
            with message:
                pass
        assert queue.stats().leased == 0

    @pytest.mark.usefixtures("only_when_woken")
    def test_pull_waits(self, queue):
        """Empty after its time, and leaves nothing behind."""
        begin = time.monotonic()
        assert queue.pull(3, wait="250ms") == []
        assert 0.2 < time.monotonic() - begin < PATIENCE
        assert queue.pull() == []
        assert queue.stats().workers == 0


class TestBatches:
    @pytest.mark.usefixtures("only_when_woken")
    def test_full_ones_and_the_rest_in_time(self, queue):
        """A batch is handed out full, or as it is some time after its first message came."""
        queue.push_many(range(25))
        sizes = []
        begin = time.monotonic()
        for batch in queue.batches(size=10, within="200ms"):
            sizes.append(len(batch))
            with batch as bodies:
                assert bodies == batch.bodies
            if sum(sizes) == 25:
                break
        assert sizes == [10, 10, 5]
        assert 0.15 < time.monotonic() - begin < PATIENCE
        assert queue.stats().leased == 0

    def test_errors_nack_what_is_open(self, queue):
        """Messages settled one by one stay settled; the rest comes back in order."""
        queue.push_many(range(4))
        with closing(queue.batches(size=4, within=0)) as batches:
            batch = next(batches)
            with batch:
                batch[0].ack()
                batch[1].dead("x")
                raise ValueError
        stats = until(lambda: (s := queue.stats()).leased == 0 and s)
        assert (stats.ready + stats.scheduled, stats.dead) == (2, 1)

    def test_all_at_once(self, queue):
        """ack() of a batch is one round trip and takes what is open."""
        queue.push_many(range(4))
        with closing(queue.batches(size=4)) as batches:
            batch = next(batches)
            batch[0].extend("1m")
            batch.ack()
            assert queue.stats().leased == 0


class TestInterrupted:
    """A pull that ends in the middle leaves nothing behind: what it had leased was not handed out."""

    @pytest.mark.row("D121")
    @pytest.mark.parametrize("partitions", [1, 3])
    @pytest.mark.parametrize("at", ["register", "before", "after", "wait"])
    async def test_a_cancelled_pull(self, url, partitions, at):
        """Cancelled at any of its steps, also behind a lease whose reply it has not seen, it hands back and leaves."""
        app = Conveyor(url)
        queue = app.queue("mail", partitions=partitions, lease="2s")
        if at != "wait":
            await queue.apush("m")
        for _ in range(8):
            task = asyncio.create_task(_stopped_at(app.client, queue.apull(1, wait="10s"), at))
            with pytest.raises(asyncio.CancelledError):
                await task
            stats = await queue.astats()
            assert (stats.leased, stats.workers, stats.dead) == (0, 0, 0)
        if at != "wait":
            [message] = await queue.apull(1, wait="60s")
            assert (message.attempt, message._leased.history.crashes) == (1, 0)
            await message.aack()
        await app.aclose()

    @pytest.mark.row("D121")
    @pytest.mark.parametrize("partitions", [1, 3])
    async def test_a_pull_that_is_cancelled_where_it_ends(self, url, redis, partitions):
        """Cancelled at any of its suspensions, also those behind the reply with its message, it hands back and leaves."""
        async with Conveyor(url) as app:
            queue = app.queue("mail", partitions=partitions, lease="1h")
            number, struck = 1, True
            while struck:
                pulling = asyncio.create_task(_cancelled_at(queue.apull(1, wait="60s"), number))
                await auntil(lambda pulling=pulling: pulling.done() or redis.info("clients")["blocked_clients"])
                await queue.apush(number)
                try:
                    [message] = await pulling
                    struck = False
                except asyncio.CancelledError:
                    stats = await queue.astats()
                    assert (stats.leased, stats.workers, stats.dead, stats.ready) == (0, 0, 0, 1)
                    [message] = await queue.apull(1)
                assert (message.body, message.attempt, message._leased.history.crashes) == (number, 1, 0)
                await message.aack()
                number += 1
            assert number > 8, number

    @pytest.mark.row("D121")
    def test_an_interrupted_blocking_pull(self, queue, monkeypatch):
        """Interrupted behind its lease, while it waits, or as it ends, a blocking pull hands back and takes its registration away."""
        for at in ("lease", "wait", "end"):
            with monkeypatch.context() as patch:
                if at == "lease":
                    queue.push("m")
                    patch.setattr(BlockingSettler, "report_refused", _interrupt)
                elif at == "end":
                    queue.push("m")
                    patch.setattr(Consumer, "_stop_waiting", _interrupt_once(Consumer._stop_waiting))
                else:
                    patch.setattr(WakeupWaiter, "wait_any", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    queue.pull(1, wait="60s")
            stats = queue.stats()
            assert (stats.leased, stats.workers) == (0, 0)
            if at != "wait":
                [message] = queue.pull()
                assert message.attempt == 1
                message.ack()


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def _interrupt_once(usual):
    """Return a function that is interrupted at its first call, and does the usual later."""
    calls = []

    def call(*given):
        calls.append(given)
        return _interrupt() if len(calls) == 1 else usual(*given)

    return call


@types.coroutine
def _cancelled_at(pulling, number):
    """Carry out *pulling* and cancel its task where it is suspended for the *number*-th time."""
    sent = error = None
    while True:
        try:
            future = pulling.send(sent) if error is None else pulling.throw(error)
        except StopIteration as stop:
            return stop.value
        number -= 1
        if not number:
            asyncio.current_task().cancel()
        sent = error = None
        try:
            sent = yield future
        except BaseException as raised:
            error = raised


async def _stopped_at(client, pulling, at):
    """Run *pulling* and cancel it: before or behind its first call of a step, or while it waits."""
    task = asyncio.current_task()
    usual, script = client.arun, {"register": "register", "before": "turn", "after": "turn"}.get(at)

    async def arun(call, **options):
        if call.script.name != script:
            return await usual(call, **options)
        client.arun = usual
        if at != "before":
            await usual(call, **options)
        task.cancel()
        return await asyncio.sleep(10)

    client.arun = arun
    if at == "wait":
        asyncio.get_running_loop().call_later(0.05, task.cancel)
    try:
        return await pulling
    finally:
        client.arun = usual


class TestBegun:
    """A consumer that dies is charged for the messages that it had begun."""

    @pytest.mark.row("D131")
    def test_what_was_only_pulled_ahead_does_not_die(self, queue):
        """Pulled ahead one by one and never begun, messages outlive any number of dead consumers."""
        queue.push_many(range(3))
        for _ in range(5):
            for message in [queue.pull()[0] for _ in range(3)]:
                crash(queue, message)
        assert queue.stats().dead == 0
        for _ in range(3):
            queue.pull()[0].ack()

    @pytest.mark.row("D131")
    @pytest.mark.parametrize("begin", ["start", "block"])
    def test_a_message_that_was_begun_each_time_is_given_up(self, queue, begin):
        """A pulled message whose consumers die after `start`, or in its block, is dead after `max_crashes` of them."""
        queue.push_many(["poison", "good"])
        for _ in range(3):
            poison, good = queue.pull()[0], queue.pull()[0]
            assert (poison.body, good.body) == ("poison", "good")
            poison.start() if begin == "start" else poison.__enter__()
            crash(queue, good)
            crash(queue, poison)
        [message] = queue.pull(2)
        assert message.body == "good"
        message.ack()
        [letter] = queue.dead_letters()
        assert letter.error == "crashed: its consumer crashed 3 times"

    def test_start_of_a_message_that_never_crashed_sends_nothing(self, queue, redis):
        """Without a crash before, `start` and the block cost no command; after one, the end takes the record back."""
        queue.push(1)
        [message] = queue.pull()
        before = redis.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
        message.start()
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == before
        crash(queue, message)
        [message] = queue.pull()
        message.start()
        message.nack(0)
        [message] = queue.pull(wait="60s")
        assert message._leased.history.crashes == 1
        message.ack()

    @pytest.mark.row("D131")
    def test_the_numbers_of_a_queue(self, backend):
        """`max_crashes` and `max_attempts` take the place of those of `retry`; one common crash alone gives up nothing."""
        assert Queue(backend, "a", lease_ms=2000, retry=Retry(attempts=9, max_crashes=8), max_crashes=2).retry == Retry(
            attempts=9, max_crashes=2
        )
        assert Queue(backend, "a", lease_ms=2000, max_attempts=7).retry == Retry(attempts=7)
        for mistake in ({"max_crashes": 0}, {"max_attempts": True}, {"retry": 3}):
            with pytest.raises(ConfigurationError):
                Queue(backend, "a", lease_ms=2000, **mistake)
        queue = Queue(backend, "mail", lease_ms=2000, max_crashes=1)
        queue.push(1)
        crash(queue, queue.pull()[0])
        [message] = queue.pull()
        message.start()
        crash(queue, message)
        assert queue.pull() == []
        assert queue.stats().dead == 1
        queue.purge(dead=True)


async def _awaited_pull(url, partitions):
    """Return what an awaited pull finds in a queue that does not exist."""
    async with Conveyor(url) as app:
        return await app.queue("typo", partitions=partitions).apull(wait="50ms")


class TestIdlePull:
    """A pull that finds nothing."""

    @pytest.mark.row("D272")
    @pytest.mark.parametrize("partitions", [1, 3])
    def test_it_leaves_no_key(self, url, redis, partitions):
        """A queue that does not exist is not made by looking at it, nor by a pull that waits; no name is kept."""
        with Conveyor(url) as app:
            queue = app.queue("typo", partitions=partitions)
            assert (len(queue), queue.stats().ready, bool(repr(queue))) == (0, 0, True)
            assert [*queue.dead_letters()] == []
            assert queue.pull() == []
            assert queue.pull(5, wait="50ms") == []
            assert asyncio.run(_awaited_pull(url, partitions)) == []
            assert list(redis.scan_iter()) == []
            assert app.client.queues() == []

    def test_it_leaves_no_key_beside_a_plain_list(self, url, redis):
        """The same for a plain list; what is on it makes the pull a registered one."""
        with Conveyor(url) as app:
            listed = app.plain_list("typo")
            assert listed.pull() == []
            assert listed.pull(wait="50ms") == []
            assert list(redis.scan_iter()) == []
            redis.rpush("typo", "1")
            [message] = listed.pull()
            assert message.body == 1
            message.ack()

    def test_it_costs_one_script(self, queue, redis):
        """One call where nothing waits, three where a message is taken and acknowledged: register, lease, settle."""
        queue.push(1)
        [message] = queue.pull()
        message.ack()
        redis.config_resetstat()
        assert queue.pull() == []
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
        queue.push(2)
        redis.config_resetstat()
        [message] = queue.pull()
        message.ack()
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 3

    @pytest.mark.row("D272")
    def test_waiting_ends_at_once(self, queue):
        """A pull that waits unregistered gets what is pushed, what becomes due, and what a dead consumer held."""
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(queue.pull, 1, "20s")
            until(lambda: queue.client.execute("CLIENT", "LIST", "TYPE", "normal").count(b"cmd=blpop"))
            queue.push("now")
            [message] = waiting.result(10)
            message.ack()
            waiting = pool.submit(queue.pull, 1, "20s")
            queue.push("later", delay="100ms")
            [message] = waiting.result(10)
            assert message.body == "later"
            message.nack(delay=0)
        [lost] = queue.pull()
        queue.client.execute(
            "ZADD", queue.keys.workers, "XX", "1", lost._settler.session.worker, key=queue.keys.workers
        )
        [message] = queue.pull(wait="20s")
        assert (message.body, message.attempt) == ("later", 3)
        message.ack()

    def test_it_polls_no_faster(self, queue, redis):
        """A pull that waits asks when a lost token or a dead worker may be found, as a registered one does, not all the time."""
        redis.config_resetstat()
        assert queue.pull(wait="1s") == []
        # A lease of 2 s: every 0.67 s, and at both ends.
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] <= 4

    def test_a_paused_queue_is_idle(self, queue, redis):
        """Messages in a paused queue make no work."""
        queue.push(1)
        queue.pause()
        redis.config_resetstat()
        assert queue.pull() == []
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
        queue.resume()
        [message] = queue.pull()
        message.ack()

    @pytest.mark.row("D272")
    def test_a_registration_whose_reply_was_lost(self, queue):
        """A pull that was registered, and does not know it, goes on with that registration when it asks again."""
        queue.push(1)
        source = queue._source(True)
        session = source.session
        program = session.turn(1)
        call = next(program)
        assert not queue.client.run(call).idle  # the reply is lost, and another consumer takes the message
        [message] = queue.pull()
        message.ack()
        registration = queue.client.run(call)
        assert not registration.idle
        with pytest.raises(StopIteration):
            program.send(queue.client.run(program.send(registration)))
        for step in session.turn(0, leave=True):
            assert queue.client.run(step).held == 0
            break
        assert queue.stats().workers == 0

    def test_another_number_of_partitions_is_refused(self, url):
        """A pull of a queue that is recorded with another number raises E34, whether anything lies there or not."""
        with Conveyor(url) as app, Conveyor(url) as other:
            app.queue("orders", partitions=2).push(1)
            with pytest.raises(ConfigurationError) as caught:
                other.queue("orders", partitions=3).pull()
            assert caught.value.code == "E34"
            [message] = app.queue("orders", partitions=2).pull()
            message.ack()
