"""The history of a job: which states it came into, when, where and why."""

from __future__ import annotations

import asyncio
import os
import platform
from typing import Any

import pytest

from conveyor import Context, Conveyor, Retry, Snooze, current
from conveyor.admin.admin import Admin
from conveyor.cli import main
from conveyor.payload.records import AttemptHistory, PastEvent
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, drain, working
from support.time_limits import PATIENCE

HERE = f"{platform.node()}:{os.getpid()}"


async def told(job: Any) -> list[tuple[str, str, int]]:
    """Return state, reason and attempt of each entry; the instants must rise."""
    entries = await job.ahistory()
    assert [entry.at for entry in entries] == sorted(entry.at for entry in entries)
    assert {entry.worker for entry in entries if entry.attempt} <= {HERE}
    return [(entry.state, entry.reason, entry.attempt) for entry in entries]


async def test_a_job_that_ends_well_tells_what_led_to_it(app: Conveyor) -> None:
    """Failed, snoozed and successful attempts are told after the end, as long as the result is kept; of a fresh job its run."""

    @app.task(retry=Retry(attempts=3, backoff="1ms"))
    async def work(context: Context = current()) -> int:
        if context.attempt == 1:
            raise LookupError("no page")
        if context.attempt == 2:
            raise Snooze(0.001)
        return 7

    @app.task
    async def plain() -> int:
        return 1

    job, other = await work.aenqueue(), await plain.aenqueue()
    assert await told(job) == [("pushed", "", 0)]
    await drain(app)
    assert await told(job) == [
        ("pushed", "", 0), ("leased", "", 1), ("failed", "LookupError", 1), ("snoozed", "", 2), ("leased", "", 3),
        ("done", "", 3),
    ]  # fmt: skip
    assert await told(other) == [("pushed", "", 0), ("leased", "", 1), ("done", "", 1)]
    assert await audit(app) == []


async def test_a_dead_letter_tells_its_attempts_and_its_redrive(app: Conveyor) -> None:
    """A dead letter has its errors in words, and one that was put back says so."""

    @app.task(retry=1)
    async def work() -> None:
        raise LookupError("no page")

    job = await work.aenqueue()
    await drain(app)
    failed = [("pushed", "", 0), ("leased", "", 1), ("failed", "LookupError: no page", 1)]
    died = [*failed, ("dead", "LookupError: no page", 1)]
    assert await told(job) == died
    admin = Admin(app.client)
    await admin.aretry([job.id])
    assert await told(job) == [*failed, ("redriven", "", 0)]
    await drain(app)
    assert [state for state, _, _ in await told(job)] == [
        "pushed",
        "leased",
        "failed",
        "redriven",
        "leased",
        "failed",
        "dead",
    ]
    await admin.adelete([job.id])


async def test_a_running_job_and_one_whose_worker_stopped(app: Conveyor) -> None:
    """A job that runs tells its lease; one that a stopping worker has returned says that, and one that was cancelled how it ended."""
    began = asyncio.Event()

    @app.task
    async def endless() -> None:
        began.set()
        await asyncio.sleep(600)

    job = await endless.aenqueue()
    async with working(app, grace=0.0):
        await asyncio.wait_for(began.wait(), PATIENCE)
        assert await told(job) == [("pushed", "", 0), ("leased", "", 1)]
    assert await told(job) == [("pushed", "", 0), ("returned", "", 1)]
    await job.acancel()
    await drain(app)
    assert [state for state, _, _ in await told(job)] == ["pushed", "cancelled"]


def test_events_are_bounded_and_read_leniently() -> None:
    """A history keeps its newest twenty events, and one that is damaged is left out."""
    history = AttemptHistory(1, 1, 0, [b"{}"])
    for number in range(25):
        history = history.with_event(PastEvent("snoozed", number))
    stored = AttemptHistory.decode(history.encode())
    assert [event.at for event in stored.events_list()] == list(range(5, 25))
    assert stored.errors == [b"{}"]
    stored.events.append(b"{")
    assert len(stored.events_list()) == 20


def test_the_command_line_prints_it(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`conveyor job show` prints a line for each state, and its JSON has them."""
    with Conveyor(url) as app:

        @app.task
        def work() -> int:
            return 1

        job = work.enqueue()
        asyncio.run(drain(app))
        for options in ([], ["--json"]):
            assert main(["job", "show", job.id, "--url", url, *options]) == 0
    shown = capsys.readouterr().out
    assert f" leased attempt 1 on {HERE}\n" in shown
    assert '"history": [{"state": "pushed"' in shown
