"""app.queue(ageing=): what waits long is raised by one priority each time it has waited that long."""

from __future__ import annotations

import asyncio
import time

import pytest

from conveyor import Conveyor
from conveyor.errors import ConfigurationError
from conveyor.ids import new_id
from conveyor.messaging.queue import Queue
from conveyor.store import inspection, operations
from conveyor.store.operations import Entry, ProducerSequence
from support.waiting import until

MINUTE = 60_000


@pytest.fixture
def queue(backend):
    """A queue that raises by one priority each ten minutes."""
    queue = Queue(backend, "old", int, lease_ms=2000, ageing_ms=10 * MINUTE)
    yield queue
    assert backend.run(inspection.audit(queue.keys)) == []
    queue.purge()


def id_from(minutes, monkeypatch):
    """Return an id as one that was made so many minutes ago."""
    with monkeypatch.context() as patch:
        patch.setattr("conveyor.ids.time", lambda: time.time() - 60 * minutes)
        return new_id()


def seed(queue, monkeypatch, *jobs):
    """Push (number, minutes ago, options), in this order."""
    entries = [Entry(id_from(minutes, monkeypatch), b"\n\n%d" % number, **options) for number, minutes, options in jobs]
    queue.client.run(operations.push(queue.keys, ProducerSequence("seed"), entries))


def take(queue, count, at_once=1):
    """Pull so many messages, *at_once* in a turn; return their bodies."""
    bodies = []
    while len(bodies) < count:
        messages = queue.pull(at_once, wait="20s")
        assert messages, f"nothing comes behind {bodies}"
        for message in messages:
            bodies.append(message.body)
            message.ack()
    return bodies


@pytest.mark.row("D20")
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_order(queue, monkeypatch, at_once):
    """One step for each ten minutes, up to 9, to the end of the line there, however many a turn takes."""
    seed(
        queue, monkeypatch,
        (1, 95, {}),  # 9
        (2, 25, {}),  # 2
        (3, 12, {}),  # 1
        (4, 1, {}),  # 0
        (5, 500, {"priority": 8}),  # 9
        (6, 11, {"priority": 2}),  # 3
        (7, 0, {"priority": 2}),  # 2, and before 2, which came to this line later
        (8, 0, {"priority": 9}),
    )  # fmt: skip
    assert take(queue, 8, at_once) == [8, 5, 1, 6, 7, 2, 3, 4]


def test_the_wait_of_a_scheduled_message_begins_when_it_is_due(queue, monkeypatch, redis):
    """A message that was scheduled has waited since it was due, not since it was pushed."""
    seed(queue, monkeypatch, (1, 60, {"delay_ms": 1}), (2, 0, {"priority": 1}))
    time.sleep(0.01)
    assert take(queue, 2) == [2, 1]


def test_ids_of_a_callers_own_and_cancelled_ones_stay(queue, monkeypatch, redis):
    """A job with no time in its id keeps its priority, and holds up nobody behind it; a cancelled one is passed over."""
    own = Entry("mine", b"\n\n1", own_id=True)
    queue.client.run(operations.push(queue.keys, ProducerSequence("own"), [own]))
    seed(queue, monkeypatch, (2, 30, {}), (3, 30, {}), (4, 0, {"priority": 1}))
    queue.client.run(operations.cancel(queue.keys, redis.lindex(queue.keys.ready[0], 1).decode()))
    assert take(queue, 3) == [3, 4, 1]
    assert queue.pull() == []  # reaches the cancelled one


def test_a_queue_without_ageing_keeps_its_order(backend, monkeypatch):
    """Without ageing= the priority stays, however long a message waits."""
    plain = Queue(backend, "old", int, lease_ms=2000)
    seed(plain, monkeypatch, (1, 500, {}), (2, 0, {"priority": 1}))
    assert take(plain, 2) == [2, 1]


def test_nothing_is_scanned(queue, monkeypatch, redis):
    """A turn looks at the heads alone: with 20,000 messages that have aged it sends as few commands as with two."""
    sent = []
    for count in (2, 20_000):
        old = id_from(60, monkeypatch)
        pairs = [part for number in range(count) for part in (old[:8] + new_id()[8:], b"\n\n%d" % number)]
        queue.client.run(operations.push_plain(queue.keys, ProducerSequence(f"many{count}"), pairs))
        take(queue, 1)
        redis.config_resetstat()
        [message] = queue.pull(wait="20s")
        sent.append(sum(one["calls"] for one in redis.info("commandstats").values()))
        message.ack()
        queue.purge()
    assert abs(sent[1] - sent[0]) <= 4, sent


@pytest.mark.row("D20")
def test_workers_raise_too(url, monkeypatch, redis):
    """A worker leases the jobs of a queue in the same order."""
    ran = []

    async def main():
        async with Conveyor(url) as app:
            app.queue("old", ageing="10m")

            @app.task(name="note", queue="old")
            async def note(number: int) -> None:
                ran.append(number)

            with monkeypatch.context() as patch:
                patch.setattr("conveyor.ids.time", lambda: time.time() - 1500)
                await note.aenqueue(1)
            await note.options(priority=1).aenqueue(2)
            await note.options(priority=5).aenqueue(3)
            async with app.worker(queues={"old": 1}, concurrency=1):
                await asyncio.to_thread(until, lambda: len(ran) == 3)
                await asyncio.to_thread(until, lambda: redis.llen(app.client.keys("old").recent) == 3)

    asyncio.run(main())
    assert ran == [3, 1, 2]


@pytest.mark.parametrize("ageing", [0, -1, "soon", True])
def test_bad_input(url, ageing):
    """A step of no length, and what is no duration, are refused at the declaration."""
    with Conveyor(url) as app, pytest.raises(ConfigurationError):
        app.queue("old", ageing=ageing)
