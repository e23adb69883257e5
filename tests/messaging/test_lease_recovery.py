"""Leases after a death: of a consumer, of the server, or of its data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from conveyor.errors import LeaseLost, StoreUnavailable
from conveyor.messaging.message import Batch
from conveyor.messaging.queue import Queue
from conveyor.store.client.client import Client
from support.message_fixtures import FAST, crash, first
from support.waiting import until, until_said


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
            thief.join(60)
            assert not thief.is_alive()
        consumer.close()

    def test_a_killed_consumer_gives_back(self, backend, url):
        """Messages of a killed process come back with the next attempt number, after two looks by another consumer."""
        queue = Queue(backend, "mail", lease_ms=400, retry=FAST)
        queue.push_many(["a", "b"])
        process = _process(
            url, "for m in q.consume(prefetch=2): print('leased', flush=True); import time; time.sleep(60)"
        )
        try:
            assert until_said(process) == "leased\n"
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.wait(60)
            process.stdout.close()
        got = []
        for message in queue.consume():
            with message as body:
                got.append((body, message.attempt, message._leased.history.crashes))
            if len(got) == 2:
                break
        assert got == [("a", 2, 1), ("b", 2, 1)]

    def test_poison_is_given_up_and_its_neighbours_are_not(self, queue):
        """Only a message that crashed its consumer three times is given up; those merely prefetched beside it are not."""
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

    def test_suspects_are_leased_alone(self, queue):
        """After a crash no batch and no pull contains two suspects."""
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
        "from conveyor.messaging.queue import Queue; from conveyor.store.client.client import Client\n"
        f"q = Queue(Client({url!r}), 'mail', lease_ms=400)\n"
    )
    return subprocess.Popen([sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, env=os.environ)


class TestOutage:
    def test_consumers_and_producers_recover(self, start_server, caplog):
        """Through a kill of the server, with its log kept, nothing accepted is lost and no loop ends."""
        server = start_server("--appendonly", "yes", "--appendfsync", "always")
        backend = Client(server.url, retry_for=0.3)
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
        thread.join(60)
        assert got == [0, 1, 2, "end"]
        assert not thread.is_alive()
        assert sum("waiting for Redis" in r.getMessage() for r in caplog.records) == 1
        backend.close()

    def test_data_gone(self, queue, redis):
        """When Redis loses all data, a consumer registers anew and goes on; the messages it held are lost."""
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
