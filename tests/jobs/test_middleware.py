"""Middleware around pushes and runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
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
from conveyor.messaging import push_options
from conveyor.messaging.publisher import Publisher
from conveyor.messaging.queue import Queue
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


class TestMessages:
    """Middleware around `push` of queues and plain lists."""

    @pytest.fixture(params=["queue", "bounded", "sealed", "partitions"])
    def made(self, url: str, request: pytest.FixtureRequest) -> Iterator[tuple[Conveyor, Queue[Any]]]:
        """An app with two middlewares and a queue of that kind; purged at the end."""
        keys = {"k1": "sixteen bytes and more"} if request.param == "sealed" else None
        options: dict[str, Any] = {"bounded": {"max_length": 5_000}, "partitions": {"partitions": 3}}.get(
            request.param, {}
        )
        with Conveyor(url, keys=keys) as app:
            queue = app.queue("mail", **options)  # before the middleware: what is declared early hears of it too
            app.middleware(Trace)
            app.middleware(Duck())
            yield app, queue
            queue.purge()

    def test_each_way_to_push_passes_all_in_order(self, made: tuple[Conveyor, Queue[Any]]) -> None:
        """One by one or in bulk, blocking or awaited, each message passes each middleware once, and arrives changed."""
        app, queue = made
        seen: list[Outgoing] = []

        @app.middleware
        class Change(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                seen.append(replace(outgoing, headers=dict(outgoing.headers)))
                outgoing.body = {"n": outgoing.body}
                outgoing.headers["n"] = str(outgoing.body["n"])

        queue.push(0)
        queue.push(1, headers={"trace": "own "}, priority=3)
        queue.push_many(range(2, 2_502))
        queue.push_many((n for n in range(2_502, 2_504)), headers={"a": "b"})

        async def awaited() -> None:
            await queue.apush(2_504)
            await queue.apush_many([2_505, 2_506], front=True)
            await app.aclose()

        asyncio.run(awaited())

        taken = [message for chunk in iter(partial(queue.pull, 500), []) for message in chunk]
        assert sorted(message.body["n"] for message in taken) == list(range(2_507))
        assert {message.body["n"]: message.headers["n"] for message in taken} == {n: str(n) for n in range(2_507)}
        traces = {message.body["n"]: message.headers["trace"] for message in taken}
        assert traces == {n: "own td" if n == 1 else "td" for n in range(2_507)}
        assert {message.body["n"] for message in taken if "a" in message.headers} == {2_502, 2_503}
        for message in taken:
            message.ack()
        assert [(one.body, one.task, one.queue) for one in seen] == [(n, "", "mail") for n in range(2_507)]
        assert (seen[1].priority, seen[1].headers, seen[-1].front) == (3, {"trace": "own td"}, True)
        if not hasattr(queue, "partitions"):
            assert [message.body["n"] for message in taken[:4]] == [1, 2_506, 2_505, 0]
            assert [message.body["n"] for message in taken[4:2_506]] == list(range(2, 2_504))

    def test_what_is_stored_may_be_changed(self, made: tuple[Conveyor, Queue[Any]]) -> None:
        """A push may be given another priority, delay, key, id or expiry, and each message of a bulk its own."""
        app, queue = made

        @app.middleware
        class Place(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                for name, value in outgoing.body.items():
                    setattr(outgoing, name, value)

        assert queue.push({"id": "order-7"}) == "order-7"
        assert queue.push({"unique": "u1"}) == queue.push({"unique": "u1"})
        queue.push_many([{"delay_ms": 3_600_000}, {"priority": 9}, {"expires_ms": 3_600_000}, {"front": True}])
        assert (queue.stats().scheduled, queue.stats().ready) == (1, 5)
        taken = queue.pull(10)
        assert len(taken) == 5
        if not hasattr(queue, "partitions"):
            assert [list(message.body) for message in taken[:3]] == [["priority"], ["front"], ["id"]]
        for message in taken:
            message.ack()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("queue", "other"), ("task", "t"), ("version", 2), ("args", (1,)), ("kwargs", {"a": 1}), ("timeout_ms", 5),
            ("keep_ms", 5), ("attempts", 2), ("priority", 10), ("id", ""), ("unique", "a\n"), ("headers", {"a": 1}),
            ("headers", {"a": "x" * 9_000}), ("delay_ms", -1), ("at_ms", "soon"), ("expires_ms", 0), ("body", object()),
        ],
    )  # fmt: skip
    async def test_a_push_cannot_break_the_rules(
        self, app: Conveyor, redis: redis_py.Redis, name: str, value: Any
    ) -> None:
        """Arguments that middleware has changed are checked like those of the caller; nothing is stored, in bulk neither."""

        class Break(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                setattr(outgoing, name, value)

        app.middleware(Break)
        mail = app.queue("mail")
        for push in (mail.apush(1), mail.apush_many([1, 2])):
            with pytest.raises((ConfigurationError, PayloadError)):
                await push
        await app.aclose()
        assert redis.keys() == []

    def test_a_bulk_push_takes_no_key(self, app: Conveyor, redis: redis_py.Redis) -> None:
        """An id or a unique key belongs to one message, so a middleware cannot give one to each of a bulk push."""

        @app.middleware
        class Unique(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                outgoing.unique = "u"

        with pytest.raises(ConfigurationError, match="push_many does not take"):
            app.queue("mail").push_many([1])
        assert redis.keys() == []

    def test_plain_lists(self, app: Conveyor, redis: redis_py.Redis) -> None:
        """A push to a plain list passes them as well. A bare document has no headers, and takes no other option."""
        seen = []

        @app.middleware
        class Change(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                seen.append((outgoing.task, outgoing.queue, outgoing.body))
                outgoing.headers["trace"] = "t"
                outgoing.body = {"n": outgoing.body}

        raw = app.plain_list("raw")
        assert (raw.push(0), raw.push_many([1, 2])) == ("", ["", ""])

        async def awaited() -> None:
            await raw.apush(3)
            await raw.apush_many([4])
            await app.aclose()

        asyncio.run(awaited())
        assert redis.lrange("raw", 0, -1) == [b'{"n":%d}' % n for n in range(5)]
        assert seen == [("", "raw", n) for n in range(5)]

        @app.middleware
        class First(Middleware):
            def push(self, outgoing: Outgoing) -> None:
                outgoing.front = True

        for push in (raw.push, lambda value: raw.push_many([value])):
            with pytest.raises(ConfigurationError, match="bare documents"):
                push(1)
        assert redis.llen("raw") == 5
        redis.delete("raw")

    def test_a_push_without_them_makes_nothing(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no middleware sees pushes, no `Outgoing` is made and no function of theirs is called, in no way to push."""
        made = []
        monkeypatch.setattr(push_options, "Outgoing", lambda *_, **__: made.append(1))
        monkeypatch.setattr(Publisher, "_passed", lambda *_: made.append(1))
        with Conveyor(url) as app:

            @app.middleware
            async def run(context: Context, call_next: CallNext) -> Any:
                return await call_next()

            queues = [app.queue("mail"), app.queue("spread", partitions=2), app.plain_list("raw")]
            for queue in queues:
                queue.push(1)
                queue.push_many(range(10))
                assert queue.purge() == 11
            assert made == []

            app.middleware(Trace)
            with pytest.raises(TypeError):
                queues[0].push(1)
            assert made == [1]
