"""The attempts of a job over time, and its path, out of its history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from conveyor import Conveyor, Retry
from conveyor.admin.admin import Admin
from conveyor.dashboard.job_timeline import attempts_of, path_of
from conveyor.jobs.history import HistoryEntry
from conveyor.store.transport.endpoint import in_thread
from support import process_app
from support.app_fixtures import blocking_client, loop_app  # noqa: F401
from support.running_worker import drain, working
from support.waiting import until_status


def entries(*states: tuple[str, float, int]) -> list[HistoryEntry]:
    """Return a history of (state, seconds, attempt)."""
    start = datetime(2026, 11, 28, tzinfo=UTC)
    return [
        HistoryEntry(state, start + timedelta(seconds=at), "web-1:7", attempt=attempt) for state, at, attempt in states
    ]


def test_attempts_that_failed_and_one_that_went_well() -> None:
    """An attempt whose start is not kept has its span alone; the last one tells what it waited for and how long it ran."""
    history = entries(("pushed", 0, 0), ("failed", 5, 1), ("crashed", 9, 2), ("leased", 12, 3), ("done", 13.5, 3))
    first, second, third = attempts_of(history)
    assert (first["number"], first["outcome"], first["began"], first["since"]) == (1, "failed", None, history[0].at)
    assert (second["outcome"], second["since"]) == ("crashed", history[1].at)
    assert (third["number"], third["outcome"], third["ran_ms"]) == (3, "done", 1500)
    assert third["waited"] == [{"kind": "queue", "seconds": 3.0}]
    assert path_of(history, "done") == ["ready", "leased", "scheduled", "leased", "ready", "leased", "done"]


def test_a_dead_job_has_its_last_error_once() -> None:
    """The last error and the death of a job are one attempt, and lead to no retry on its path."""
    history = entries(("pushed", 0, 0), ("failed", 5, 1), ("failed", 9, 2), ("dead", 9, 2))
    assert [one["number"] for one in attempts_of(history)] == [1, 2]
    assert path_of(history, "dead") == ["ready", "leased", "scheduled", "leased", "dead"]


def test_a_poison_job_has_its_last_crash_once() -> None:
    """The summary of all crashes of a job repeats the last one: it is no further attempt, and no way back on its path."""
    history = entries(
        ("pushed", 0, 0), ("leased", 1, 1), ("crashed", 2, 1), ("leased", 3, 2), ("crashed", 4, 2), ("crashed", 4, 2), ("dead", 4, 2)
    )  # fmt: skip
    assert [one["number"] for one in attempts_of(history)] == [1, 2]
    assert path_of(history, "dead") == ["ready", "leased", "ready", "leased", "dead"]


def test_running_and_waiting_jobs() -> None:
    """An attempt that runs has no end; a job that waits for its retry has no attempt beyond those that ended."""
    running = entries(("pushed", 0, 0), ("failed", 5, 1), ("leased", 7, 2))
    assert [(one["outcome"], one["ended"]) for one in attempts_of(running)][1] == ("running", None)
    assert attempts_of(running)[1]["waited"] == [{"kind": "retry", "seconds": 2.0}]
    assert path_of(running, "leased")[-1] == "leased"
    waiting = entries(("pushed", 0, 0), ("failed", 5, 1))
    assert len(attempts_of(waiting)) == 1
    assert path_of(waiting, "scheduled") == ["ready", "leased", "scheduled"]
    assert attempts_of(entries(("pushed", 0, 0), ("cancelled", 3, 0))) == []


async def test_a_job_without_a_result_tells_when_it_ended(app: Conveyor, client: Conveyor) -> None:
    """Of a job that keeps no result the list of the last ones knows when it ended, and its history says the same."""

    @app.task(queue="mail")
    def send() -> None: ...

    job = await send.aenqueue()
    await drain(app)
    admin = Admin(client.client)
    ended = (await in_thread(lambda: admin.job(job.id))).ended
    last = (await in_thread(lambda: admin.history_of(job.id)))[-1]
    assert ended is not None
    assert (last.state, last.at) == ("done", ended)


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_each_attempt_that_failed_tells_what_it_waited_and_ran(app: Conveyor, run_in: str) -> None:
    """The start of an attempt is kept with its error, so that its wait in the queue or for a retry stands apart from its run."""
    name = "support.process_app.fail_twice"
    options: dict[str, Any] = {
        "name": name,
        "run_in": run_in,
        "retry": Retry(attempts=2, backoff=["200ms"], jitter=False),
    }
    function = process_app.app.tasks[name].function
    if run_in == "loop":

        async def fail_twice() -> None:
            function()

        job = await app.task(**options)(fail_twice).aenqueue()
    else:
        job = await app.task(**options)(function).aenqueue()
    async with working(app, reference="support.process_app:app"):
        await until_status(job, "dead")
        history = await job.ahistory()
    first, second = attempts_of(history)
    assert first["began"] < first["ended"] < second["began"] < second["ended"]
    assert min(first["ran_ms"], second["ran_ms"]) >= 20
    assert [one["kind"] for one in (*first["waited"], *second["waited"])] == ["queue", "retry"]
    assert second["waited"][0]["seconds"] >= 0.15  # less what two readings of a clock may differ
    assert path_of(history, "dead") == ["ready", "leased", "scheduled", "leased", "dead"]
    await Admin(app.client).adelete([job.id])
