"""Middleware around pushes and runs."""

from __future__ import annotations

from typing import Any

import pytest
import redis as redis_py

from conveyor import CallNext, Middleware, Outgoing
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context
from conveyor.jobs.core import core_of
from conveyor.jobs.hooks import run_through
from conveyor.jobs.task import Task
from support.manual_worker import ManualWorker, arguments


class Trace(Middleware):
    def push(self, outgoing: Outgoing) -> None:
        outgoing.headers["trace"] = outgoing.headers.get("trace", "") + "t"


class Duck:
    def push(self, outgoing: Outgoing) -> None:
        outgoing.headers["trace"] += "d"


@pytest.fixture
def note(app: Conveyor) -> Task[[int], None]:
    @app.task
    def note(n: int) -> None: ...

    return note


def context() -> Context:
    return Context(job_id="q:x", task="t", queue="q", attempt=1, headers={}, state={}, deadline_hook=None)


async def test_pushes_pass_all_middlewares_in_order(app: Conveyor, note: Task[[int], None]) -> None:
    """Each way to enqueue passes each middleware's push, the first added first: classes, instances and look-alikes."""
    assert app.middleware(Trace) is Trace
    app.middleware(Duck())
    await note.aenqueue(1)
    await note.options(headers={"trace": "own "}).aenqueue(2)
    await app.aenqueue_many([note.s(3), note.options(priority=1).s(4)])

    def take() -> dict[int, str]:
        note.enqueue(5)
        manual = ManualWorker(app)
        ids = manual.take(10)
        found = {arguments(app, manual.envelopes[i])[0][0]: manual.envelopes[i].extra.headers["trace"] for i in ids}
        manual.leave()
        return found

    import asyncio

    await app.aclose()
    assert await asyncio.to_thread(take) == {1: "td", 2: "own td", 3: "td", 4: "td", 5: "td"}
    assert core_of(app).run_middlewares == []  # they have nothing to say about runs


def test_push_may_change_what_goes_out(app: Conveyor, note: Task[[int], None]) -> None:
    """A push may move a job to another queue, change its arguments, delay it; the handle knows where it went."""

    class Move(Middleware):
        def push(self, outgoing: Outgoing) -> None:
            outgoing.queue, outgoing.args, outgoing.priority = "vip", (outgoing.args[0] + 1,), 3

    app.middleware(Move())
    job = note.enqueue(1)

    assert (job.queue, job.status()) == ("vip", "ready")
    manual = ManualWorker(app, "vip")
    [id_] = manual.take()
    assert (arguments(app, manual.envelopes[id_]), manual.envelopes[id_].priority) == (([2], {}), 3)
    manual.leave()


@pytest.mark.parametrize(
    ("name", "value"), [("queue", "a b"), ("priority", 10), ("id", ""), ("headers", {"a": 1}), ("args", ("x",))]
)
def test_push_cannot_break_the_rules(
    app: Conveyor, note: Task[[int], None], redis: redis_py.Redis, name: str, value: Any
) -> None:
    """A call that middleware has changed is checked like one that the caller wrote; nothing is stored."""

    class Break(Middleware):
        def push(self, outgoing: Outgoing) -> None:
            setattr(outgoing, name, value)

    app.middleware(Break)
    with pytest.raises((ConfigurationError, PayloadError)):
        note.enqueue(1)

    assert redis.keys() == []


async def test_runs_nest_the_first_outermost(app: Conveyor) -> None:
    """Each run wraps what was added later, sees the context, and may change the result."""
    steps: list[str] = []

    @app.middleware
    async def outer(context: Context, call_next: CallNext) -> Any:
        steps.append(f"outer {context.job_id}")
        result = await call_next()
        steps.append("outer ends")
        return result * 2

    class Inner(Middleware):
        async def run(self, context: Context, call_next: CallNext) -> Any:
            steps.append("inner")
            return await call_next(context) + 1

    app.middleware(Inner)

    async def job() -> int:
        steps.append("job")
        return 10

    assert await run_through(core_of(app).run_middlewares, context(), job) == 22
    assert steps == ["outer q:x", "inner", "job", "outer ends"]
    assert core_of(app).push_middlewares == []


async def test_run_sees_what_the_job_raises(app: Conveyor) -> None:
    """An exception of a job passes outwards through the middleware, which may answer instead."""

    @app.middleware
    async def rescue(context: Context, call_next: CallNext) -> Any:
        try:
            return await call_next()
        except ValueError as error:
            return str(error)

    async def job() -> int:
        raise ValueError("no")

    assert await run_through(core_of(app).run_middlewares, context(), job) == "no"


def test_what_is_no_middleware_is_refused(app: Conveyor) -> None:
    """A plain function, an object without either method, methods of the wrong kind and classes with arguments are refused."""

    class Empty: ...

    class SyncRun:
        def run(self, context: Context, call_next: CallNext) -> Any: ...

    class AsyncPush:
        async def push(self, outgoing: Outgoing) -> None: ...

    class Needy(Middleware):
        def __init__(self, size: int) -> None: ...

    wrong: list[Any] = [lambda outgoing: None, 5, Empty, SyncRun(), AsyncPush, Needy]
    for one in wrong:
        with pytest.raises(ConfigurationError):
            app.middleware(one)
    assert (core_of(app).run_middlewares, core_of(app).push_middlewares) == ([], [])
