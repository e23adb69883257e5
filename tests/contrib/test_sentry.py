"""Sentry: one event for each dead job, a transaction for each run, in the trace of its push."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conveyor import Conveyor, Retry
from support.running_worker import drain

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
