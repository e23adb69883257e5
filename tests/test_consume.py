"""Taking messages under a lease: consume, batches, pull, and what happens when somebody dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import aclosing, closing

import pytest

from conveyor.errors import ConfigurationError, LeaseLost, StoreUnavailable
from conveyor.message import Batch
from conveyor.outcome import Retry
from conveyor.queue import Queue
from conveyor.store import inspection, operations
from conveyor.store.backend import Backend

FAST = Retry(attempts=3, backoff="10ms", jitter=False)


def until(check, seconds=4.0):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


@pytest.fixture
def backend(url):
    backend = Backend(url)
    yield backend
    backend.close()


@pytest.fixture
def queue(backend):
    queue = Queue(backend, "mail", lease_ms=2000, retry=FAST)
    yield queue
    assert backend.run(inspection.audit(queue.keys)) == []
    queue.purge()
    queue.purge(dead=True)
    stats = queue.stats()
    assert (stats.ready, stats.leased, stats.workers) == (0, 0, 0)


def first(queue, **options):
    """Take one message with a consumer that goes on."""
    consumer = queue.consume(**options)
    return consumer, next(consumer)


def crash(queue, message):
    """Return what *message*'s holder has leased, as its supervisor does when it died."""
    return queue.backend.run(operations.reap(queue.keys, message._holder.lessee.worker))


class TestOneByOne:
    def test_success_acks(self, queue):
        """Leaving the block finishes the message; leaving the loop leaves nothing behind."""
        queue.push_many([1, 2, 3])
        seen = []
        for message in queue.consume():
            with message as body:
                seen.append((body, message.attempt))
            if len(seen) == 3:
                break
        assert seen == [(1, 1), (2, 1), (3, 1)]
        assert queue.stats().leased == 0

    def test_an_exception_comes_back_later_and_ends_dead(self, queue, caplog):
        """Each failure is logged with its traceback and counted, and the loop goes on; the last one buries."""
        queue.push("bad")
        attempts = []
        with closing(queue.consume()) as messages:
            for message in messages:
                with message as body:
                    if body == "end":
                        break
                    attempts.append(message.attempt)
                    if len(attempts) == 3:
                        queue.push("end")
                    raise ValueError(f"boom {message.attempt}")
        assert attempts == [1, 2, 3]
        records = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert len(records) == 3
        assert "failed at attempt 1, again in 0.0 s: ValueError: boom 1" in records[0].getMessage()
        assert records[2].exc_info[0] is ValueError
        [letter] = queue.dead_letters()
        assert (letter.error, letter.attempts, letter.payload) == ("ValueError: boom 3", 3, b'"bad"')
        assert "raise ValueError" in letter.failure.traceback

    def test_hostile_exceptions_are_like_others(self, queue):
        """An exception whose __str__ raises is recorded and retried."""

        class Hostile(Exception):
            def __str__(self):
                raise SystemExit

        queue.push(1)
        consumer, message = first(queue)
        with message:
            raise Hostile
        message = next(consumer)
        assert message.attempt == 2
        message.ack()
        consumer.close()

    def test_on_error_raise(self, queue):
        """The exception passes on, and the message is nacked as well."""
        queue.push(1)
        with pytest.raises(ValueError, match="boom"):  # noqa: PT012  the loop is what is tested
            for message in queue.consume(on_error="raise"):
                with message:
                    raise ValueError("boom")
        assert queue.stats().scheduled == 1
        with pytest.raises(ConfigurationError):
            queue.consume(on_error="ignore")

    def test_an_interrupt_hands_back(self, queue):
        """KeyboardInterrupt costs no attempt of the budget, though the start was seen."""
        queue.push(1)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  the loop is what is tested
            for message in queue.consume():
                with message:
                    raise KeyboardInterrupt
        [message] = queue.pull()
        assert (message.attempt, message._leased.state.failures) == (2, 0)
        message.ack()

    def test_undecodable(self, backend, queue, caplog):
        """A body that is not what the queue holds becomes a dead letter with its bytes, and the loop goes on."""
        queue.push("text")
        queue.push(7)
        numbers = Queue(backend, "mail", int, lease_ms=2000)
        for message in numbers.consume():
            with message as body:
                assert body == 7
            break
        [letter] = queue.dead_letters()
        assert letter.payload == b'"text"'
        assert "cannot be decoded" in letter.error
        assert sum("cannot be decoded" in r.getMessage() for r in caplog.records) == 1

    def test_leaving_returns_what_had_not_started(self, queue):
        """Prefetched messages go back in their order without a trace, the started one with its start seen."""
        queue.push_many(range(5))
        consumer, message = first(queue, prefetch=3)
        assert message.body == 0
        assert queue.stats().leased == 3
        consumer.close()
        messages = queue.pull(5)
        assert [(m.body, m.attempt) for m in messages] == [(0, 2), (1, 1), (2, 1), (3, 1), (4, 1)]
        Batch(messages).ack()

    def test_turns_carry_the_acks(self, queue, redis):
        """With prefetch 100, a hundred messages cost one command beside the waiting."""
        queue.push_many(range(1000))
        redis.config_resetstat()
        for number, message in enumerate(queue.consume(prefetch=100)):
            with message:
                pass
            if number == 999:
                break
        calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
        assert calls <= 13

    def test_a_thread_of_the_caller_may_settle(self, queue):
        """A block that ends elsewhere, while the loop waits for new work, is acknowledged at once."""
        queue.push(1)
        consumer, message = first(Queue(queue.backend, "mail", lease_ms=60_000))
        go = threading.Event()

        def work():
            with message:
                go.wait(5)

        worker = threading.Thread(target=work)
        waiter = threading.Thread(target=lambda: next(consumer).ack())
        worker.start()
        waiter.start()
        until(lambda: message._holder._waiting)
        go.set()
        worker.join()
        until(lambda: queue.stats().leased == 0, 1.0)
        queue.push(2)
        waiter.join(5)
        consumer.close()

    def test_an_end_that_nothing_follows_leaves_soon(self, queue):
        """When the loop does not come back for the next message, the ack goes without it."""
        queue.push(1)
        consumer, message = first(queue)
        with message:
            pass
        until(lambda: queue.stats().leased == 0, 2.0)
        consumer.close()

    def test_mistakes(self, queue):
        """Numbers that make no sense are refused at the call, not at the first message."""
        for call in (lambda: queue.consume(prefetch=0), lambda: queue.consume(prefetch=1001), lambda: queue.pull(0),
                     lambda: queue.batches(size=0), lambda: queue.batches(within="soon")):  # fmt: skip
            with pytest.raises(ConfigurationError):
                call()


class TestWaiting:
    def test_a_push_is_taken_at_once(self, queue):
        """An idle consumer is woken; it does not poll."""
        queue.push(0)
        consumer, message = first(queue)
        message.ack()
        seen = []
        thread = threading.Thread(target=lambda: seen.append((next(consumer), time.monotonic())))
        thread.start()
        until(lambda: message._holder._waiting)
        begin = time.monotonic()
        queue.push(1)
        thread.join(3)
        assert seen[0][1] - begin < 0.3
        seen[0][0].ack()
        consumer.close()

    def test_resume_wakes(self, queue):
        """While paused nothing is leased; the end of a pause wakes a blocked consumer at once."""
        queue.pause()
        queue.push(1)
        assert queue.pull() == []
        assert queue.stats().paused
        got = []
        thread = threading.Thread(target=lambda: got.extend(queue.pull(wait="4s")))
        begin = time.monotonic()
        thread.start()
        until(lambda: queue.stats().workers == 1)
        queue.resume()
        thread.join(3)
        assert time.monotonic() - begin < 1.5
        got[0].ack()

    def test_idle_rate(self, backend, redis):
        """An idle consumer sends less than one command a second, and no more than its waits and turns."""
        queue = Queue(backend, "calm", lease_ms=15_000)
        queue.push(1)
        consumer, message = first(queue)
        message.ack()
        thread = threading.Thread(target=lambda: next(consumer).ack(), daemon=True)
        thread.start()
        until(lambda: message._holder._waiting)
        before = redis.info("stats")["total_commands_processed"]
        time.sleep(2.5)  # the law is about a span of time
        sent = redis.info("stats")["total_commands_processed"] - before
        assert sent <= 2, "the question itself, and at most one more"
        queue.push(2)
        thread.join(3)
        consumer.close()

    def test_a_due_message_is_taken_in_time(self, queue):
        """A blocked consumer wakes for what was scheduled while it was blocked."""
        with closing(queue.consume()) as messages:
            timer = threading.Timer(0.1, lambda: queue.push("later", delay="300ms"))
            timer.start()
            begin = time.monotonic()
            message = next(messages)
            assert 0.35 < time.monotonic() - begin < 1.0
            message.ack()
            timer.join()


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
        [member] = queue.backend.run(inspection.crew(queue.keys))
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

    def test_pull_waits(self, queue):
        """Empty after its time, and leaves nothing behind."""
        begin = time.monotonic()
        assert queue.pull(3, wait="250ms") == []
        assert 0.2 < time.monotonic() - begin < 1
        assert queue.pull() == []
        assert queue.stats().workers == 0


class TestBatches:
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
        assert 0.15 < time.monotonic() - begin < 1
        assert queue.stats().leased == 0

    def test_errors_nack_what_is_open(self, queue):
        """What was settled one by one stays so; the rest comes back in order."""
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


class TestLost:
    def test_a_late_ack_is_refused(self, queue):
        """A consumer that lost its lease cannot finish a message that another may run; it goes on as another."""
        queue.push(1)
        consumer, late = first(queue)
        assert crash(queue, late) == 1
        [current] = queue.pull()
        assert current.attempt == 2
        with pytest.raises(LeaseLost):
            late.ack()
        current.ack()
        queue.push(2)
        message = next(consumer)
        assert message.body == 2
        message.ack()
        consumer.close()

    def test_a_late_block_is_logged(self, queue, caplog):
        """In a loop the refusal is told in the log, and the loop goes on."""
        queue.push(1)
        consumer, late = first(queue)
        crash(queue, late)
        with late:
            pass
        again = next(consumer)
        assert (again.body, again.attempt) == (1, 2)
        again.ack()
        assert any("its end was refused" in r.getMessage() for r in caplog.records)
        consumer.close()

    def test_renewal_outlives_the_lease(self, backend):
        """A message whose body runs for several leases stays leased, and its ack is accepted."""
        queue = Queue(backend, "slow", lease_ms=300)
        queue.push(1)
        consumer, message = first(queue)
        with closing(Queue(backend, "slow", lease_ms=300).consume()) as other:
            thief = threading.Thread(target=lambda: _swallow(other), daemon=True)
            thief.start()
            time.sleep(1.2)  # four leases: the law is about a span of time
            message.ack()
            queue.push("end")
            thief.join(3)
        consumer.close()

    def test_a_killed_consumer_gives_back(self, backend, url):
        """What a process held that was killed comes back with the next attempt number, by two looks of another."""
        queue = Queue(backend, "mail", lease_ms=400, retry=FAST)
        queue.push_many(["a", "b"])
        process = _process(
            url, "for m in q.consume(prefetch=2): print('leased', flush=True); import time; time.sleep(60)"
        )
        try:
            assert process.stdout.readline() == b"leased\n"
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.wait(5)
            process.stdout.close()
        begin = time.monotonic()
        got = []
        for message in queue.consume():
            with message as body:
                got.append((body, message.attempt, message._leased.state.crashes))
            if len(got) == 2:
                break
        assert got == [("a", 2, 1), ("b", 2, 1)]
        assert time.monotonic() - begin < 2

    def test_poison_dies_and_its_neighbours_live(self, queue):
        """Only what crashed its consumer three times is given up; what was merely prefetched beside it is not."""
        queue.push_many(["poison", "good"])
        for _ in range(3):
            consumer, message = first(queue, prefetch=2)
            assert message.body == "poison"
            crash(queue, message)
            consumer.close()
        consumer, message = first(queue, prefetch=2)
        assert message.body == "good"
        message.ack()
        consumer.close()
        [letter] = queue.dead_letters()
        assert (letter.error, letter.attempts) == ("crashed: its consumer crashed 3 times", 3)

    def test_suspects_travel_alone(self, queue):
        """After a crash nobody gets two suspects together, in a batch or in a pull."""
        queue.push_many(range(3))
        crash(queue, queue.pull(3)[0])
        queue.push(3)
        with closing(queue.batches(size=4, within=0)) as batches:
            for expected in ([0], [1]):
                with next(batches) as bodies:
                    assert bodies == expected
        pulled = queue.pull(4)
        assert [m.body for m in pulled] == [2]
        Batch(pulled).ack()
        [message] = queue.pull(4)
        assert (message.body, message.attempt) == (3, 1)
        message.ack()


def _swallow(messages):
    for message in messages:
        with message as body:
            if body == "end":
                return
            raise AssertionError("the lease was given up")


def _process(url, code):
    prelude = (
        "from conveyor.queue import Queue; from conveyor.store.backend import Backend\n"
        f"q = Queue(Backend({url!r}), 'mail', lease_ms=400)\n"
    )
    return subprocess.Popen([sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, env=os.environ)


class TestOutage:
    def test_consumers_and_producers_recover(self, start_server, caplog):
        """Through a kill of the server, with its log kept, nothing accepted is lost and no loop ends."""
        server = start_server("--appendonly", "yes", "--appendfsync", "always")
        backend = Backend(server.url, patience=0.3)
        queue = Queue(backend, "mail", lease_ms=2000)
        queue.push_many(range(3))
        got = []

        def consume():
            for message in queue.consume():
                with message as body:
                    got.append(body)
                if body == "end":
                    return

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        until(lambda: len(got) == 3)
        server.kill()
        with pytest.raises(StoreUnavailable):
            queue.push("lost")
        until(lambda: any("waiting for Redis" in r.getMessage() for r in caplog.records))
        server.start()
        queue.push("end")
        thread.join(4)
        assert got == [0, 1, 2, "end"]
        assert not thread.is_alive()
        assert sum("waiting for Redis" in r.getMessage() for r in caplog.records) == 1
        backend.close()

    def test_data_gone(self, queue, redis):
        """When Redis forgets everything, a consumer registers anew and goes on; what it held is lost."""
        queue.push(1)
        consumer, message = first(queue)
        redis.flushall()
        with pytest.raises(LeaseLost):
            message.ack()
        queue.push(2)
        message = next(consumer)
        assert message.body == 2
        message.ack()
        consumer.close()


@pytest.fixture
async def aqueue(url):
    backend = Backend(url)
    queue = Queue(backend, "mail", lease_ms=1000, retry=FAST)
    yield queue
    await queue.apurge()
    await queue.apurge(dead=True)
    assert (await queue.astats()).workers == 0
    await backend.aclose()


class TestAwaitable:
    async def test_loop(self, aqueue):
        """Success acks, an exception nacks and is logged, an interrupt hands back; leaving leaves nothing."""
        await aqueue.apush_many(["good", "bad"])
        seen = []
        async with aclosing(aqueue.aconsume(prefetch=2)) as messages:
            async for message in messages:
                async with message as body:
                    seen.append((body, message.attempt))
                    if body == "bad" and message.attempt == 1:
                        raise ValueError
                if len(seen) == 3:
                    break
        assert seen == [("good", 1), ("bad", 1), ("bad", 2)]
        assert (await aqueue.astats()).leased == 0

    async def test_acks_leave_when_the_body_goes_on(self, aqueue):
        """An end travels with the next turn, or alone as soon as the loop is free."""
        await aqueue.apush_many([1, 2])
        async with aclosing(aqueue.aconsume()) as messages:
            async with await anext(messages):
                pass
            async with asyncio.timeout(1):
                while (await aqueue.astats()).leased:
                    await asyncio.sleep(0)
            await (await anext(messages)).aack()

    async def test_a_blocked_loop_keeps_its_messages(self, aqueue):
        """The lease is renewed from a thread while the loop does nothing else."""
        await aqueue.apush(1)
        async with aclosing(aqueue.aconsume()) as messages:
            message = await anext(messages)
            ends = await _end(aqueue)
            time.sleep(1.3)  # blocks the loop for more than a lease
            assert await _end(aqueue) > ends + 800
            await message.aack()

    async def test_cancelled_body(self, aqueue):
        """A cancelled task hands its message back."""
        await aqueue.apush(1)
        started = asyncio.Event()

        async def run():
            async with aclosing(aqueue.aconsume()) as messages:
                async for message in messages:
                    async with message:
                        started.set()
                        await asyncio.sleep(60)

        task = asyncio.create_task(run())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [message] = await aqueue.apull()
        assert (message.attempt, message._leased.state.failures) == (2, 0)
        await message.aack()

    async def test_cancelled_while_waiting(self, aqueue):
        """A consumer cancelled while it waits leaves nothing and loses nothing."""

        async def run():
            async with aclosing(aqueue.aconsume()) as messages:
                await anext(messages)

        task = asyncio.create_task(run())
        while not (await aqueue.astats()).workers:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await aqueue.apush(1)
        [message] = await aqueue.apull(wait="1s")
        await message.aack()

    async def test_batches_and_explicit_ends(self, aqueue):
        """The awaitable batch, pull and extend."""
        await aqueue.apush_many(range(5))
        async with aclosing(aqueue.abatches(size=3, within="50ms")) as batches:
            async with await anext(batches) as bodies:
                assert bodies == [0, 1, 2]
            await (await anext(batches)).anack("1h")
        assert (await aqueue.astats()).scheduled == 2
        await aqueue.apush("x")
        [message] = await aqueue.apull(wait="1s")
        await message.aextend("1m")
        await message.aack()
        with pytest.raises(LeaseLost):
            await message.anack()

    async def test_ends_from_a_thread(self, aqueue):
        """A message of a loop may be settled by blocking calls from other threads, and the other way round."""
        await aqueue.apush_many([1, 2])
        [message] = await aqueue.apull()
        await asyncio.to_thread(message.ack)
        [message] = await asyncio.to_thread(aqueue.pull)
        await message.aack()
        assert (await aqueue.astats()).leased == 0


async def _end(queue):
    [member] = await queue.backend.arun(inspection.crew(queue.keys))
    return member.end
