"""The context of a running job."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

import pytest

from conveyor.errors import ConfigurationError, JobCancelled
from conveyor.jobs.context import CURRENT, Context, current


def make(**changes: Any) -> Context:
    facts: dict[str, Any] = {
        "job_id": "default:x", "task": "mail.send", "queue": "default", "attempt": 2, "headers": {"trace": "t"},
        "state": {"db": 1}, "deadline_hook": None,
    }  # fmt: skip
    return Context(**{**facts, **changes})


def inside(context: Context, function: Any) -> Any:
    def run() -> Any:
        CURRENT.set(context)
        return function()

    return contextvars.copy_context().run(run)


def test_current_is_the_job_that_runs_here() -> None:
    """current() inside a job is its context, in each thread and task its own."""
    context = make()

    assert inside(context, current) is context
    assert inside(context, lambda: asyncio.run(asyncio.to_thread(current))) is context
    assert current() is not context


def test_current_as_a_default_speaks_for_the_job() -> None:
    """A default of current() stands for the job that runs when it is used, and for none it raises."""

    def work(context: Context = current()) -> tuple[str, int]:
        context.check()
        return context.job_id, context.attempt

    assert inside(make(), work) == ("default:x", 2)
    assert repr(current()) == "current()"
    with pytest.raises(ConfigurationError, match="no job is running here"):
        work()
    for use in (
        lambda: current().progress(1),
        lambda: current().emit(1),
        lambda: current().notes,
        lambda: current().logger,
    ):
        with pytest.raises(ConfigurationError, match=r"^current\(\): no job is running here"):
            use()


def test_check_stops_a_job_that_was_told_to() -> None:
    """check() returns while all is well, and raises what happened: the time limit, or a cancel."""
    context = make()
    context.check()
    context.cancelled = True
    with pytest.raises(JobCancelled, match="default:x was cancelled"):
        context.check()
    context.timed_out = True
    with pytest.raises(TimeoutError):
        context.check()


def test_extend_moves_the_time_limit() -> None:
    """extend() passes the new time to the worker in ms; a wrong duration is refused."""
    asked: list[int] = []
    context = make(deadline_hook=asked.append)
    context.extend("1m")
    context.extend(0.5)
    make().extend(1)  # a job without a time limit has nothing to move

    assert asked == [60_000, 500]
    with pytest.raises(ConfigurationError):
        context.extend("soon")


def test_logger_says_whose_line_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Records of the context's logger carry job, task, queue and attempt."""
    with caplog.at_level(logging.INFO):
        make().logger.info("hello %s", "you")

    [record] = caplog.records
    facts: Any = record
    assert (record.getMessage(), facts.job_id, facts.task, facts.queue, facts.attempt) == (
        "hello you", "default:x", "mail.send", "default", 2,
    )  # fmt: skip
