"""The events of a queue: what happens to its jobs, by push, from any place on, over partitions and cuts; nothing where nobody asks."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

import pytest
import redis as redis_py

from conveyor import Conveyor, JobFailed, Retry, Snooze, current
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError
from conveyor.events import (
    EventsMissed,
    JobCancelledEvent,
    JobDead,
    JobEnqueued,
    JobEvent,
    JobRetried,
    JobReturned,
)
from conveyor.jobs import queue_events
from support.app_fixtures import blocking_client  # noqa: F401
from support.running_worker import drain, working
from support.time_limits import LATER, PATIENCE
from support.waiting import until


@pytest.fixture
async def app(url: str) -> AsyncIterator[Conveyor]:
    """An app on the emptied server, with a queue that keeps events."""
    app = Conveyor(url)
    app.queue("told", events=1000)
    yield app
    await app.aclose()


async def take(app: Conveyor, count: int, after: str | None = None, name: str = "told") -> list[JobEvent]:
    """Return the next *count* events."""
    found: list[JobEvent] = []
    async with asyncio.timeout(PATIENCE):
        async for event in app.aevents(name, after):
            found.append(event)
            if len(found) == count:
                break
    return found


def names(events: list[JobEvent], job: Any) -> list[str]:
    return [event.name for event in events if event.job_id == job.id]


@pytest.mark.redis6
async def test_every_change_of_a_job_is_told_in_order(app: Conveyor) -> None:
    """Retries, snoozes, ends of all kinds and what people do come as typed events, in order, and any place resumes."""

    @app.task(queue="told", retry=Retry(attempts=2, backoff="1ms", jitter=False))
    async def work(how: str) -> None:
        if how == "snooze" and current().attempt == 1:
            raise Snooze(0.001)
        if how == "fail":
            raise LookupError("no page")

    good, bad, lazy = [await work.aenqueue(how) for how in ("good", "fail", "snooze")]
    late = await work.options(delay="1h").aenqueue("good")
    with app.acting_as("ada"):
        assert await late.aupdate(priority=3)
        await Admin(app.client).aretry([late.id])
        gone = await work.options(delay="1h").aenqueue("good")
        await gone.acancel()
    await drain(app)
    with app.acting_as("bob"):
        await app.aredrive("told")
    await drain(app)
    told = await take(app, 3 + 10 + 5 + 5 + 2)
    assert names(told, good) == ["enqueued", "started", "done"]
    once = ["started", "retried", "started", "dead"]
    assert names(told, bad) == ["enqueued", *once, "redriven", *once]
    assert names(told, lazy) == ["enqueued", "started", "returned", "started", "done"]
    assert names(told, late) == ["enqueued", "updated", "promoted", "started", "done"]
    assert names(told, gone) == ["enqueued", "cancelled"]
    assert [event.at for event in told] == sorted(event.at for event in told if event.at)
    assert {event.task for event in told} == {work.name}
    assert {event.by for event in told if getattr(event, "by", "")} == {"ada", "bob"}
    [retried, *_] = [event for event in told if isinstance(event, JobRetried)]
    assert isinstance(retried.error, JobFailed)
    assert (retried.error.type, retried.error.message) == ("LookupError", "no page")
    dead = [event for event in told if isinstance(event, JobDead)]
    assert [event.attempt for event in dead] == [2, 4]
    assert "attempts" in dead[0].reason
    assert [event.reason for event in told if isinstance(event, JobReturned)] == ["put off"]
    assert [event.due is not None for event in told if isinstance(event, JobEnqueued)] == [False] * 3 + [True] * 2
    assert [event.id for event in await take(app, 5, told[-6].id)] == [event.id for event in told[-5:]]
    history = [(entry.state, entry.by) for entry in await late.ahistory()]
    assert history == [("pushed", ""), ("updated", "ada"), ("promoted", "ada"), ("leased", ""), ("done", "")]
    assert [(entry.state, entry.at is None) for entry in await good.ahistory()] == [("pushed", False), ("done", True)]
    await Admin(app.client).adelete([bad.id])


async def test_a_running_job_that_is_cancelled_names_who_asked(app: Conveyor) -> None:
    """The event and the history of a job that ran, and of one that a stopped worker held, say who cancelled it."""
    began = asyncio.Event()

    @app.task(queue="told")
    async def endless() -> None:
        began.set()
        await asyncio.sleep(600)

    job = await endless.aenqueue()
    async with working(app):
        await asyncio.wait_for(began.wait(), PATIENCE)
        with app.acting_as("ada@example.com"):
            await job.acancel()
        told = await take(app, 3)
    assert [event.name for event in told] == ["enqueued", "started", "cancelled"]
    assert isinstance(told[2], JobCancelledEvent)
    assert told[2].by == "ada@example.com"
    last = (await job.ahistory())[-1]
    assert (last.state, last.by) == ("cancelled", "ada@example.com")


def test_events_come_by_push_and_over_a_cut(
    client: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocking reader gets an event by a message, goes on by itself when its connections are cut, and ends with the app."""
    monkeypatch.setattr(queue_events, "CHECK_AGAIN", LATER)
    messages = client.queue("notes", events=50)
    seen: queue.SimpleQueue[JobEvent] = queue.SimpleQueue()
    ended: list[str] = []

    def read() -> None:
        try:
            for event in client.events("notes", after="now"):
                seen.put(event)
        except ConfigurationError as error:
            ended.append(str(error))

    threading.Thread(target=read, daemon=True).start()
    until(lambda: redis.zcard("conveyor:{notes}:event-readers") == 1)
    first = messages.push(1)
    event = seen.get(timeout=PATIENCE)
    assert (event.name, event.job_id, event.task, event.queue) == ("enqueued", first, "", "notes")
    redis.client_kill_filter(_type="pubsub")
    redis.client_kill_filter(_type="normal", skipme=True)
    [message] = messages.pull()
    message.ack()
    assert [seen.get(timeout=PATIENCE).name for _ in range(2)] == ["started", "done"]
    client.close()
    until(lambda: bool(ended))
    assert "was closed" in ended[0]


def test_a_queue_in_partitions_and_one_that_has_dropped_events(client: Conveyor) -> None:
    """The events of partitions come as one stream that any place resumes; where some are not kept, EventsMissed says so."""
    spread = client.queue("spread", partitions=3, events=1000)
    pushed = set(spread.push_many(range(30)))
    told = list(islice(client.events("spread"), 30))
    assert {event.job_id for event in told} == pushed
    assert [event.job_id for event in islice(client.events(spread, told[11].id), 18)] == [
        one.job_id for one in told[12:]
    ]
    few = client.queue("few", events=5)
    few.push("first")
    [event] = islice(client.events("few"), 1)
    ids = few.push_many(range(20))
    missed, *rest = islice(client.events("few", event.id), 6)
    assert isinstance(missed, EventsMissed)
    assert [one.job_id for one in rest] == ids[-5:]
    for each in spread, few:
        each.purge()


def test_a_queue_that_nobody_asked_keeps_none(client: Conveyor, redis: redis_py.Redis) -> None:
    """Without events= nothing is stored and reading is refused, also when a later program turns them off; so is wrong input."""
    silent = client.queue("silent")
    silent.push(1)
    for after in (None, "now"):
        with pytest.raises(ConfigurationError, match="keeps no events"):
            next(client.events("silent", after))
    for wrong in ("x", 7, "1-1 2-2"):
        with pytest.raises(ConfigurationError, match="takes the id of an event"):
            client.events("silent", wrong)  # type: ignore[arg-type]
    for number in (-1, True, 2_000_000, "10"):
        with pytest.raises(ConfigurationError, match="how many events"):
            client.queue("wrong", events=number)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="takes a name"), client.acting_as("a\nb"):
        pass
    assert not redis.exists("conveyor:{silent}:events")
    with Conveyor(client.client.address.url) as other:
        told = other.queue("silent", events=9)
        told.push(2)
        assert redis.xlen("conveyor:{silent}:events") == 1
        assert 0 < redis.pttl("conveyor:{silent}:events") <= 7 * 86_400_000
    with Conveyor(client.client.address.url) as other:
        other.queue("silent", events=0).push(3)
    assert redis.xlen("conveyor:{silent}:events") == 1
    silent.purge()
    silent.delete()
    assert not redis.exists("conveyor:{silent}:events")
