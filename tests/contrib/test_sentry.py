"""Sentry: one event for each dead job, a transaction for each run, in the trace of its push."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from conveyor import Conveyor, Retry, Snooze
from support.running_worker import drain, working
from support.waiting import auntil, until_status

sentry_sdk = pytest.importorskip("sentry_sdk", reason="needs sentry-sdk, which the extra sentry installs")

from conveyor.contrib.sentry import instrument  # noqa: E402


@pytest.fixture
def sent() -> Iterator[list[dict[str, Any]]]:
    """Collect what Sentry would get."""
    events: list[dict[str, Any]] = []

    class Collect(sentry_sdk.transport.Transport):  # type: ignore[misc]
        def capture_envelope(self, envelope: Any) -> None:
            events.extend(item.payload.json for item in envelope.items if item.payload.json is not None)

    sentry_sdk.init(
        dsn="https://key@example.invalid/1", transport=Collect, traces_sample_rate=1.0, default_integrations=False
    )
    yield events
    sentry_sdk.init(default_integrations=False)


async def test_a_dead_job_is_one_event_and_each_run_a_transaction(url: str, sent: list[dict[str, Any]]) -> None:
    """Attempts that are tried again report nothing; the trace goes from the push to the runs."""
    async with Conveyor(url) as app:
        instrument(app)

        @app.task(name="bad", queue="mail", retry=Retry(attempts=2, backoff="1ms", jitter=False))
        async def bad() -> None:
            raise KeyError("as asked")

        with sentry_sdk.start_transaction(name="request") as request:
            await bad.aenqueue()
        await drain(app)
        await app.queue("mail").apurge(dead=True)
    sentry_sdk.flush()
    errors = [one for one in sent if "exception" in one]
    assert [one["exception"]["values"][-1]["type"] for one in errors] == ["KeyError"]
    assert errors[0]["tags"]["conveyor.task"] == "bad"
    assert errors[0]["contexts"]["conveyor"]["attempt"] == 2
    assert errors[0]["fingerprint"] == ["{{ default }}", "bad"]
    runs = [one for one in sent if one.get("type") == "transaction" and one["transaction"] == "bad"]
    assert [one["contexts"]["trace"]["op"] for one in runs] == ["queue.process"] * 2
    assert {one["contexts"]["trace"]["trace_id"] for one in runs} == {request.trace_id}
    assert {one["contexts"]["trace"]["status"] for one in runs} == {"internal_error"}


async def test_the_log_of_the_worker_makes_no_event_beside(url: str, sent: list[dict[str, Any]]) -> None:
    """With the integrations that Sentry has by itself a dead job is one event too, that with its task; a line of the program is another."""
    client = sentry_sdk.get_client()
    sentry_sdk.init(dsn=client.dsn, transport=client.options["transport"], traces_sample_rate=1.0)
    async with Conveyor(url) as app:
        instrument(app)

        @app.task(name="bad", queue="mail", retry=Retry(attempts=2, backoff="1ms", jitter=False))
        async def bad() -> None:
            raise KeyError("as asked")

        @app.task(name="loud", queue="mail")
        async def loud() -> None:
            logging.getLogger("shop").error("something is wrong")

        await bad.aenqueue()
        await loud.aenqueue()
        await drain(app)
        await app.queue("mail").apurge(dead=True)
    sentry_sdk.flush()
    found = [one for one in sent if one.get("type") != "transaction"]
    dead = [one for one in found if "exception" in one]
    assert [one["tags"]["conveyor.task"] for one in dead] == ["bad"]
    assert {one.get("logger") for one in found} == {None, "shop"}
    assert len(found) == 2


async def test_a_stop_is_told_from_a_timeout(url: str, sent: list[dict[str, Any]]) -> None:
    """The transaction of a cancelled run is cancelled, one beyond its time limit has exceeded its deadline, one that snoozes is ok."""
    started = asyncio.Event()
    async with Conveyor(url) as app:
        instrument(app)

        @app.task(name="long", queue="mail", retry=1)
        async def long() -> None:
            started.set()
            await asyncio.sleep(3600)

        @app.task(name="later", queue="mail")
        async def later() -> None:
            raise Snooze("1h")

        snoozed, late = await later.aenqueue(), await long.options(timeout="50ms").aenqueue()
        async with working(app):
            await auntil(lambda: any(one.get("transaction") == "later" for one in sent))
            await snoozed.acancel()
            await until_status(late, "dead")
            started.clear()
            stopped = await long.aenqueue()
            await asyncio.wait_for(started.wait(), 60)
            await stopped.acancel()
            await until_status(stopped, "cancelled")
        await app.queue("mail").apurge(dead=True)
    sentry_sdk.flush()
    runs = [one["contexts"]["trace"] for one in sent if one.get("transaction") == "long"]
    assert next(one["contexts"]["trace"]["status"] for one in sent if one.get("transaction") == "later") == "ok"
    assert [one["status"] for one in runs] == ["deadline_exceeded", "cancelled"]
    assert all(one["data"]["messaging.message.receive.latency"] >= 0 for one in runs)
