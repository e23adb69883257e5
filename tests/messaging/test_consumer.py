"""Consuming messages one by one, and the idle consumer."""

from __future__ import annotations

import itertools
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from conveyor.errors import ConfigurationError, LeaseLost, RetryIn
from conveyor.messaging.consumer.blocking import Consumer
from conveyor.messaging.consumer.renewal import LeaseRenewer
from conveyor.messaging.leases import LeaseSession
from conveyor.messaging.message import Batch
from conveyor.messaging.queue import Queue
from conveyor.messaging.retry import Retry
from conveyor.store import operations
from conveyor.store.operations import Settlement
from conveyor.store.signal_safety import SignalSafeEvent
from support.interruption import points
from support.message_fixtures import first
from support.time_limits import PATIENCE
from support.waiting import until, until_ended

_LOOP = """
from conveyor import Conveyor
for message in Conveyor({url!r}, namespace={namespace!r}).queue("c", partitions={partitions}).{loop}:
    pass
"""
_AWAITABLE_LOOP = """
import asyncio
from conveyor import Conveyor
async def main():
    async for message in Conveyor({url!r}, namespace={namespace!r}).queue("c", partitions={partitions}).{loop}:
        pass
asyncio.run(main())
"""


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
        """Each failure is logged and counted, the first of a kind with its traceback, and the loop goes on; the last buries."""
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
        assert records[0].exc_info[0] is ValueError
        assert "dead: ValueError: boom 3 (as before: 2 since its traceback)" in records[2].getMessage()
        [letter] = queue.dead_letters()
        assert (letter.error, letter.attempts, letter.payload) == ("ValueError: boom 3", 3, b'"bad"')
        assert "raise ValueError" in letter.failure.traceback

    def test_errors_are_dated_by_the_server(self, queue, monkeypatch):
        """The instants of a message's errors lie before its end, also when the clock of the consumer's machine is ahead."""
        queue.push("bad")
        true = time.time
        monkeypatch.setattr(time, "time", lambda: true() + 3600)
        with closing(queue.consume()) as messages:
            for message in messages:
                if message.body == "end":
                    message.ack()
                    break
                if message.attempt == 3:
                    queue.push("end")
                message.nack(delay=0)
        monkeypatch.undo()
        [letter] = queue.dead_letters()
        died_ms = letter.died_at.timestamp() * 1000
        assert died_ms - 60_000 < letter.failure.at <= died_ms

    def test_a_retry_in_comes_back_when_it_says(self, backend):
        """A handler that raises RetryIn uses an attempt, and its message comes back after that time, not the policy's."""
        queue = Queue(backend, "patient", lease_ms=2000, retry=Retry(attempts=2, backoff="1h"))
        queue.push(1)
        attempts = []
        with closing(queue.consume()) as messages:
            for message in messages:
                with message as body:
                    if body == "end":
                        break
                    attempts.append(message.attempt)
                    if len(attempts) == 2:
                        queue.push("end")
                    raise RetryIn("1ms")
        assert attempts == [1, 2]
        assert [letter.attempts for letter in queue.dead_letters()] == [2]
        queue.purge(dead=True)

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
        assert (message.attempt, message._leased.history.failures) == (2, 0)
        message.ack()

    @pytest.mark.parametrize("loop", ["consume()", "batches(2)", "aconsume()"])
    @pytest.mark.parametrize("partitions", [1, 2])
    def test_an_interrupt_shows_the_loop_and_not_where_it_waited(self, url, redis, backend, loop, partitions):
        """Ctrl-C ends a waiting loop with KeyboardInterrupt; the traceback ends with it, not in our sockets."""
        program = _LOOP if loop[0] != "a" else _AWAITABLE_LOOP
        program = program.format(url=url, namespace=backend.namespace, partitions=partitions, loop=loop)
        with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as child:
            try:
                parts = [backend.keys(name) for name in (["c"] if partitions == 1 else ["c/0", "c/1"])]
                until(lambda: all(backend.execute("ZCARD", one.workers, key=one.workers) for one in parts), 30)
                until(lambda: int(redis.info("clients")["blocked_clients"]) > 0, 30)
                child.send_signal(signal.SIGINT)
                _, errors = child.communicate(timeout=60)
            finally:
                child.kill()
        assert child.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")
        ours = {Path(name).name for name in re.findall(r'File "([^"]*conveyor[^"]*)"', errors)}
        assert ours <= {"queue.py", "blocking.py", "asynchronous.py"}
        assert errors.count("During handling") == (loop[0] == "a")  # asyncio tells a cancellation that way itself

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
        assert letter.failure.type == "PayloadError"
        assert f"Message {letter.id} cannot be decoded" in caplog.text
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
        consumer, message = first(Queue(queue.client, "mail", lease_ms=60_000))
        go = threading.Event()

        def work():
            with message:
                go.wait(60)

        worker = threading.Thread(target=work)
        waiter = threading.Thread(target=lambda: next(consumer).ack())
        worker.start()
        waiter.start()
        until(lambda: message._settler._consumer.is_idle)
        go.set()
        until_ended(worker)
        until(lambda: queue.stats().leased == 0)
        queue.push(2)
        waiter.join(60)
        consumer.close()

    def test_an_end_that_nothing_follows_leaves_soon(self, queue):
        """When the loop does not come back for the next message, the ack goes without it."""
        queue.push(1)
        consumer, message = first(queue)
        with message:
            pass
        until(lambda: queue.stats().leased == 0)
        consumer.close()

    def test_a_forgotten_iterator(self, queue):
        """A message whose loop is gone was handed back, and the error says so."""
        queue.push(1)
        message = next(queue.consume())
        with pytest.raises(LeaseLost, match="the loop over consume"):
            message.ack()

    def test_mistakes(self, queue):
        """Numbers that make no sense are refused at the call, not at the first message."""
        for call in (lambda: queue.consume(prefetch=0), lambda: queue.consume(prefetch=1001), lambda: queue.pull(0),
                     lambda: queue.batches(size=0), lambda: queue.batches(within="soon")):  # fmt: skip
            with pytest.raises(ConfigurationError):
                call()


@pytest.mark.row("A49")
@pytest.mark.parametrize("way", ["consume", "batches"])
def test_a_loop_that_is_interrupted_as_it_ends(queue, way):
    """Wherever a signal handler raises as a loop ends, its leases are renewed no longer, also while a message of it is kept."""
    ending = (Consumer.__exit__, LeaseRenewer.stop, SignalSafeEvent.set)
    for interruption in points(only=lambda frame: any(frame.f_code is one.__code__ for one in ending)):
        queue.push(1)
        loop = queue.consume() if way == "consume" else queue.batches(1)
        kept = next(loop)
        with interruption:
            loop.close()
        until(lambda: not any(thread.name == "conveyor-renewer" for thread in threading.enumerate()))
        del kept
        [message] = queue.pull(wait="60s")
        message.ack()


class TestWaiting:
    @pytest.mark.usefixtures("only_when_woken")
    def test_a_push_is_taken_at_once(self, queue):
        """An idle consumer is woken; it does not poll."""
        queue.push(0)
        consumer, message = first(queue)
        message.ack()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(next(consumer)))
        thread.start()
        until(lambda: message._settler._consumer.is_idle)
        queue.push(1)
        thread.join(PATIENCE)
        seen[0].ack()
        consumer.close()

    @pytest.mark.usefixtures("only_when_woken")
    def test_resume_wakes(self, queue):
        """While paused nothing is leased; the end of a pause wakes a blocked consumer at once."""
        queue.pause()
        queue.push(1)
        assert queue.pull() == []
        assert queue.stats().paused
        got = []
        thread = threading.Thread(target=lambda: got.extend(queue.pull(wait="1h")))
        thread.start()
        until(lambda: b"cmd=blpop" in queue.client.execute("CLIENT", "LIST"))  # a pull that waits is not registered
        queue.resume()
        thread.join(PATIENCE)
        got[0].ack()

    @pytest.mark.standalone_only("counts every command that one server gets")
    def test_idle_rate(self, backend, redis):
        """An idle consumer sends nothing but a turn and a wait whenever five seconds have passed since its last look."""
        queue = Queue(backend, "calm", lease_ms=15_000)
        queue.push(1)
        began = time.monotonic()
        consumer, message = first(queue)
        message.ack()
        thread = threading.Thread(target=lambda: next(consumer).ack(), daemon=True)
        thread.start()
        until(lambda: redis.info("clients")["blocked_clients"] == 1)
        before = _calls(redis)
        time.sleep(2.5)  # the law is about a span of time
        sent = _calls(redis) - before
        assert sent <= 2 * int((time.monotonic() - began) / 5)
        queue.push(2)
        thread.join(60)
        consumer.close()

    @pytest.mark.usefixtures("only_when_woken")
    def test_a_due_message_is_taken_in_time(self, queue):
        """A blocked consumer wakes for what was scheduled while it was blocked."""
        with closing(queue.consume()) as messages:
            begin = time.monotonic()
            timer = threading.Timer(0.1, lambda: queue.push("later", delay="300ms"))
            timer.start()
            message = next(messages)
            assert 0.35 < time.monotonic() - begin < PATIENCE
            message.ack()
            until_ended(timer)


class TestMayNotStart:
    @pytest.mark.row("D151")
    def test_a_nack_of_a_cancelled_message(self, queue):
        """A message whose cancellation was asked does not come back, however its holder gives it up."""
        for give_up in (lambda m: m.nack(0), lambda m: m._settler.settle([(m._leased, Settlement("F", m._leased.id))])):
            queue.push(1)
            [message] = queue.pull()
            assert queue.client.run(operations.cancel(queue.keys, message._leased.id)) == operations.CANCEL_ASKED
            give_up(message)
            assert queue.pull() == []
        stats = queue.stats()
        assert (stats.ready, stats.scheduled, stats.leased, stats.dead) == (0, 0, 0, 0)

    @pytest.mark.row("D151")
    def test_cancelled_in_a_batch_that_fills(self, queue):
        """A message that waits for its batch to fill is not in it when it was cancelled meanwhile."""
        queue.push_many(["first", "second"])
        with closing(queue.batches(size=3, within="1h")) as batches:
            taken = []
            thread = threading.Thread(target=lambda: taken.append(next(batches)))
            thread.start()
            until(lambda: queue.stats().leased == 2)
            [cancelled, _] = list(_leased_ids(queue))
            assert queue.client.run(operations.cancel(queue.keys, cancelled)) == operations.CANCEL_ASKED
            queue.push_many(["third", "fourth"])
            thread.join(60)
            with taken[0] as bodies:
                assert bodies == ["second", "third", "fourth"]

    @pytest.mark.row("D161")
    @pytest.mark.parametrize("kind", ["consume", "batches"])
    def test_expired_behind_another(self, queue, kind, monkeypatch):
        """A message that was leased in time and has expired when its turn comes is not handed out."""
        # Two hours pass after it was looked at so often: only this message can expire, and a batch takes it first.
        in_time, looks, now_ms = 0 if kind == "consume" else 1, itertools.count(), LeaseSession.now_ms.fget
        later = property(lambda session: now_ms(session) + (7_200_000 if next(looks) >= in_time else 0))
        monkeypatch.setattr(LeaseSession, "now_ms", later)
        ids = [queue.push(n, expires="1h" if n == 1 else None) for n in range(3)]
        if kind == "consume":
            with closing(queue.consume(prefetch=3)) as messages:
                with next(messages) as body:
                    assert (body, queue.stats().leased) == (0, 3)
                with next(messages) as body:
                    assert body == 2
        else:
            with closing(queue.batches(size=4, within="100ms")) as batches, next(batches) as bodies:
                assert bodies == [0, 2]
        record = queue.client.execute("GET", queue.keys.result(ids[1].partition(":")[2]), key=queue.keys.jobs)
        assert b'"reason":"expired"' in record


def _calls(redis):
    """Return how many turns and waits the server was asked for."""
    stats = redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval", "blpop"))


def _leased_ids(queue):
    """Return the ids that consumers of the queue hold, in the order in which they were leased."""
    for worker in queue.client.execute("ZRANGE", queue.keys.workers, "0", "-1", key=queue.keys.workers):
        held = queue.client.execute("HGETALL", queue.keys.leased(worker.decode()), key=queue.keys.workers)
        pairs = zip(held[::2], held[1::2], strict=True)
        yield from (id_.decode() for id_, _ in sorted(pairs, key=lambda pair: pair[1]) if not id_.startswith(b"\t"))
