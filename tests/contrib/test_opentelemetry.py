"""Traces of OpenTelemetry: a run is linked to its push, across a worker, by the conventions for messaging."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from typing import Any

import pytest

from conveyor import Conveyor, JobFailed, LeaseLost, QueueFull, Retry, Snooze, current
from conveyor.store.transport.endpoint import in_thread
from support.running_worker import drain, working
from support.waiting import until_status

trace = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk, which the extra dev installs")

from opentelemetry import baggage  # noqa: E402
from opentelemetry import context as contexts  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import (  # noqa: E402
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)

from conveyor.contrib.opentelemetry import OpenTelemetry, instrument  # noqa: E402


class Recorder:
    """The spans and metrics that a program has recorded."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer_provider = trace.TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meter_provider = MeterProvider(metric_readers=[self.reader])

    def spans(self, name: str) -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def metrics(self) -> dict[str, int]:
        """Return how many points each metric has."""
        data = self.reader.get_metrics_data()
        return {
            one.name: sum(getattr(point, "value", 0) or getattr(point, "count", 0) for point in one.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for one in scope.metrics
        }


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_a_run_is_linked_to_its_push(url: str, recorder: Recorder) -> None:
    """Push and run are one trace with a link; the job sees the span of its run, also on a thread; a scheduled one begins a trace."""
    seen: list[int] = []
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)

        @app.task(name="loop", queue="mail")
        async def loop() -> None:
            seen.append(get_current_span().get_span_context().span_id)

        @app.task(name="thread", queue="mail")
        def thread() -> None:
            seen.append(get_current_span().get_span_context().span_id)

        job = await loop.aenqueue()
        await thread.aenqueue()
        await drain(app)
    [sent], [ran], [on_thread] = (
        recorder.spans(name) for name in ("send mail loop", "process mail loop", "process mail thread")
    )
    assert (sent.kind, ran.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert ran.parent.span_id == sent.context.span_id
    assert ran.context.trace_id == sent.context.trace_id
    assert [link.context.span_id for link in ran.links] == [sent.context.span_id]
    assert set(seen) == {ran.context.span_id, on_thread.context.span_id}
    assert ran.attributes["messaging.message.id"] == job.id
    assert ran.attributes["messaging.message.receive.latency"] >= 0
    expected = {
        "messaging.system": "conveyor", "messaging.operation.type": "process", "messaging.operation.name": "process",
        "messaging.destination.name": "mail", "messaging.conveyor.task.name": "loop", "messaging.conveyor.attempt": 1,
        "messaging.message.retry.count": 0,
    }  # fmt: skip
    assert expected.items() <= dict(ran.attributes).items()
    assert recorder.metrics() == {
        "messaging.client.sent.messages": 2, "messaging.client.consumed.messages": 2, "messaging.process.duration": 2,
        "messaging.client.operation.duration": 2,
    }  # fmt: skip


async def test_errors_are_recorded_and_expected_ones_are_not(url: str, recorder: Recorder) -> None:
    """An attempt that raises has an error status, type and event, though it is tried again; one that snoozes has none."""
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider, trace_parent="never")

        @app.task(name="bad", queue="mail", retry=Retry(attempts=2, backoff="1ms", jitter=False))
        async def bad() -> None:
            raise KeyError("as asked")

        @app.task(name="later", queue="mail")
        async def later() -> None:
            if not recorder.spans("process mail later"):
                raise Snooze("1ms")

        await bad.aenqueue()
        await later.aenqueue()
        await drain(app)
        await app.queue("mail").apurge(dead=True)
    first, second = recorder.spans("process mail bad")
    for attempt, span in enumerate((first, second), 1):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "KeyError"
        assert span.attributes["messaging.conveyor.attempt"] == attempt
        assert [event.name for event in span.events] == ["exception"]
        assert span.parent is None
        assert len(span.links) == 1
    snoozed = recorder.spans("process mail later")[0]
    assert snoozed.status.status_code is StatusCode.UNSET
    assert snoozed.attributes["messaging.conveyor.outcome"] == "Snooze"


def test_messages_carry_the_trace_too(url: str, recorder: Recorder) -> None:
    """A message that is pushed and handled is one trace, with the headers of the program beside it."""
    with Conveyor(url) as app:
        telemetry = OpenTelemetry(recorder.tracer_provider, recorder.meter_provider)
        app.middleware(telemetry)
        queue = app.queue("mail")
        queue.push(1, headers={"own": "kept"})
        [message] = queue.pull()
        assert message.headers["own"] == "kept"
        assert "traceparent" in message.headers
        with message, telemetry.process(message):
            pass
    [sent], [handled] = recorder.spans("send mail"), recorder.spans("process mail")
    assert handled.context.trace_id == sent.context.trace_id
    assert handled.attributes["messaging.message.id"] == message.id


async def test_without_a_provider_nothing_is_recorded(url: str) -> None:
    """A program without an SDK runs as ever, and its jobs carry no header of a trace."""
    async with Conveyor(url) as app:
        instrument(app)
        headers: list[dict[str, str]] = []

        @app.task(queue="mail")
        async def plain() -> None:
            headers.append(dict(current().headers))

        await plain.aenqueue()
        await drain(app)
    assert headers == [{}]


async def test_without_a_provider_a_push_makes_no_span(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the API alone a push makes no span and no header, unless it stands in the trace of another program, which it carries on."""
    made: list[str] = []
    async with Conveyor(url) as app:
        telemetry = instrument(app)
        start_span = telemetry._tracer.start_span
        monkeypatch.setattr(
            telemetry._tracer, "start_span", lambda name, **more: made.append(name) or start_span(name, **more)
        )
        queue = app.queue("mail")
        await queue.apush(1)
        assert made == []
        remote = SpanContext(
            0xAF7651916CD43DD8448EB211C80319C0, 0xB7AD6B7169203331, is_remote=True, trace_flags=TraceFlags(1)
        )
        token = contexts.attach(set_span_in_context(NonRecordingSpan(remote)))
        try:
            await queue.apush(2)
        finally:
            contexts.detach(token)
        headers = []
        for message in await queue.apull(n=2):
            headers.append(dict(message.headers))
            await message.aack()
    assert made == ["send mail"]
    assert headers == [{}, {"traceparent": f"00-{remote.trace_id:032x}-{remote.span_id:016x}-01"}]


async def test_a_send_times_the_push_and_fails_with_it(url: str, recorder: Recorder) -> None:
    """The span of a push lasts until it is stored; one that is refused has the error, on the metrics too, and is over."""
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)
        queue = app.queue("mail", max_length=1)
        open_at_store: list[bool] = []
        store = queue._publisher._send

        def send(planned: Any) -> Any:
            open_at_store.append(not recorder.spans("send mail"))
            return store(planned)

        queue._publisher._send = send  # type: ignore[method-assign]
        await in_thread(lambda: queue.push(1))
        with pytest.raises(QueueFull):
            await queue.apush(2)
        await queue.apurge()
    stored, refused = recorder.spans("send mail")
    assert open_at_store == [True]
    assert stored.status.status_code is StatusCode.UNSET
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.attributes["error.type"] == "conveyor.errors.QueueFull"
    assert [event.name for event in refused.events] == ["exception"]
    assert recorder.metrics()["messaging.client.operation.duration"] == 2


async def test_a_bulk_push_is_one_send(url: str, recorder: Recorder) -> None:
    """Each job of a bulk push has a span that its run is linked to, and one span times the push of all."""
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)

        @app.task(name="loop", queue="mail")
        async def loop(n: int) -> None: ...

        await app.aenqueue_many(loop.s(n) for n in range(3))
        await drain(app)
        await app.queue("post").apush_many([1, 2])
        await app.queue("post").apurge()
    created, runs, [sent] = (recorder.spans(name) for name in ("create mail loop", "process mail loop", "send mail"))
    assert (sent.kind, {one.kind for one in created}) == (SpanKind.CLIENT, {SpanKind.PRODUCER})
    assert sent.attributes["messaging.batch.message_count"] == 3
    ids = {one.context.span_id for one in created}
    assert {link.context.span_id for link in sent.links} == ids
    assert {run.links[0].context.span_id for run in runs} == ids
    assert recorder.spans("send post")[0].attributes["messaging.batch.message_count"] == 2
    assert recorder.metrics()["messaging.client.sent.messages"] == 5


async def test_a_batch_is_linked_to_each_push(url: str, recorder: Recorder) -> None:
    """The run of a batch is linked to the pushes of all its items, is a part of none of their traces, and counts as that many."""
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)

        @app.batch_task(name="index", queue="mail", size=3, within="1h")
        async def index(words: list[str]) -> None: ...

        for word in ("a", "b", "c"):
            await index.aenqueue(word)
        await drain(app)
    sent, [ran] = recorder.spans("send mail index"), recorder.spans("process mail index")
    assert {link.context.span_id for link in ran.links} == {one.context.span_id for one in sent}
    assert len(ran.links) == ran.attributes["messaging.batch.message_count"] == 3
    assert ran.parent is None
    counted = recorder.metrics()
    assert (counted["messaging.client.consumed.messages"], counted["messaging.process.duration"]) == (3, 1)


async def test_baggage_goes_with_a_job(url: str, recorder: Recorder) -> None:
    """The baggage of a program is there in its jobs, on threads too, and in those that they spawn; not after them."""
    seen: dict[str, Any] = {}
    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider)

        @app.task(name="child", queue="mail")
        def child() -> None:
            seen["child"] = baggage.get_baggage("tenant")

        @app.task(name="parent", queue="mail")
        async def parent() -> None:
            seen["parent"] = baggage.get_baggage("tenant")
            await child.aenqueue()

        token = contexts.attach(baggage.set_baggage("tenant", "acme"))
        try:
            await parent.aenqueue()
        finally:
            contexts.detach(token)
        await drain(app)
    assert seen == {"parent": "acme", "child": "acme"}
    assert baggage.get_all() == {}


async def test_a_callers_own_trace_is_left_alone(url: str, recorder: Recorder) -> None:
    """A job or message with the context of another span belongs to that one; its send is linked to it. One that runs again is pushed anew."""
    own = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with Conveyor(url) as app:
        telemetry = instrument(app, tracer_provider=recorder.tracer_provider)

        @app.task(name="loop", queue="mail", keep_result="1h")
        async def loop() -> int:
            return 1

        job = await loop.options(headers={"traceparent": own}).aenqueue()
        await app.queue("post").apush_many([1, 2], headers={"traceparent": own})
        await drain(app)
        again = await job.arerun()
        await drain(app)
        for message in await app.queue("post").apull(n=2):
            assert message.headers == {"traceparent": own}
            with telemetry.process(message):
                pass
            await message.aack()
    [sent, sent_again], [ran, ran_again] = recorder.spans("send mail loop"), recorder.spans("process mail loop")
    origin = int(own.split("-")[2], 16)
    assert (sent.kind, [link.context.span_id for link in sent.links]) == (SpanKind.CLIENT, [origin])
    assert (ran.parent.span_id, [link.context.span_id for link in ran.links]) == (origin, [origin])
    assert again.id != job.id
    assert (sent_again.kind, sent_again.links) == (SpanKind.PRODUCER, ())
    assert ran_again.parent.span_id == sent_again.context.span_id
    assert recorder.spans("create post") == []
    [bulk] = recorder.spans("send post")
    assert bulk.attributes["messaging.batch.message_count"] == 2
    assert {one.parent.span_id for one in recorder.spans("process post")} == {origin}


async def test_a_stop_is_no_error_and_a_timeout_is(url: str, recorder: Recorder) -> None:
    """A job that is cancelled has no error; one beyond its time limit has; one whose error cannot be printed ends with that error."""

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("never seen")

    async with Conveyor(url) as app:
        instrument(app, tracer_provider=recorder.tracer_provider)
        started = asyncio.Event()

        @app.task(name="long", queue="mail", retry=1)
        async def long() -> None:
            started.set()
            await asyncio.sleep(3600)

        @app.task(name="odd", queue="mail", retry=1)
        async def odd() -> None:
            raise Unprintable

        late, bad = await long.options(timeout="50ms").aenqueue(), await odd.aenqueue()
        async with working(app, queues={"mail": 1.0}):
            await until_status(late, "dead")
            await until_status(bad, "dead")
            started.clear()
            stopped = await long.aenqueue()
            await asyncio.wait_for(started.wait(), 60)
            await stopped.acancel()
            await until_status(stopped, "cancelled")
        with pytest.raises(JobFailed) as failed:
            await bad.aresult(timeout=60)
        await app.queue("mail").apurge(dead=True)
    assert failed.value.type.endswith("Unprintable")
    [timed_out, cancelled], [unprintable] = recorder.spans("process mail long"), recorder.spans("process mail odd")
    assert (timed_out.status.status_code, timed_out.attributes["error.type"]) == (StatusCode.ERROR, "TimeoutError")
    assert (cancelled.status.status_code, cancelled.events) == (StatusCode.UNSET, ())
    assert cancelled.attributes["messaging.conveyor.outcome"] == "CancelledError"
    assert unprintable.status.status_code is StatusCode.ERROR
    assert unprintable.attributes["error.type"].endswith("Unprintable")


async def test_durations_have_buckets_of_seconds(url: str, recorder: Recorder) -> None:
    """A job of a few ms is told from one of a second: the buckets are those of the conventions, not those of an SDK, which are for ms."""
    async with Conveyor(url) as app:
        instrument(app, meter_provider=recorder.meter_provider)

        @app.task(name="loop", queue="mail")
        async def loop() -> None: ...

        await loop.aenqueue()
        await drain(app)
    [scope] = recorder.reader.get_metrics_data().resource_metrics[0].scope_metrics
    bounds = {one.name: tuple(one.data.data_points[0].explicit_bounds) for one in scope.metrics if one.unit == "s"}
    expected = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    assert bounds == {"messaging.client.operation.duration": expected, "messaging.process.duration": expected}


def test_receive_and_settle(url: str, recorder: Recorder) -> None:
    """Fetching and settling messages are spans of a client, linked to the pushes; what fails there is told."""
    with Conveyor(url) as app:
        telemetry = instrument(app, tracer_provider=recorder.tracer_provider, meter_provider=recorder.meter_provider)
        queue = app.queue("mail")
        queue.push_many([1, 2])
        with telemetry.receive("mail") as received:
            received += queue.pull(n=10)
        for message in received:
            with telemetry.process(message):
                pass
            with telemetry.settle(message, "ack"):
                message.ack()
        with pytest.raises(LeaseLost), telemetry.settle(received[0], "nack"):
            received[0].nack()
    [fetch], acks, [nack] = (recorder.spans(f"{name} mail") for name in ("receive", "ack", "nack"))
    ids = {one.context.span_id for one in recorder.spans("create mail")}
    assert {span.kind for span in (fetch, *acks)} == {SpanKind.CLIENT}
    assert fetch.attributes["messaging.batch.message_count"] == 2
    assert {link.context.span_id for link in fetch.links} == ids
    assert [one.attributes["messaging.operation.type"] for one in acks] == ["settle", "settle"]
    assert {one.links[0].context.span_id for one in acks} == ids
    assert nack.attributes["error.type"] == "conveyor.errors.LeaseLost"
    counted = recorder.metrics()
    assert counted["messaging.client.consumed.messages"] == 2
    assert counted["messaging.client.operation.duration"] == 5  # one send, one receive, three settles


async def test_absent_tracing_costs_nothing(url: str) -> None:
    """Without a middleware no push and no run calls anything of it: not one Python call a job more."""
    called: list[str] = []
    async with Conveyor(url) as app:

        @app.task(name="loop", queue="mail")
        async def loop() -> None: ...

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_name in {
                "push_scope", "_scoped", "apply_middlewares", "run_through", "pass_through"
            }:  # fmt: skip
                called.append(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            for _ in range(10):
                await loop.aenqueue()
                await app.queue("post").apush(1)
            await drain(app)
        finally:
            sys.setprofile(None)
        await app.queue("post").apurge()
    assert called == []


async def test_tracing_without_an_sdk_calls_nothing_a_job(url: str) -> None:
    """With the API alone a run of a plain job costs not one Python call more: the middleware is asked ten times a second at most."""
    asked = 0

    class Counting(OpenTelemetry):
        def skips(self, headers: Any) -> bool:
            nonlocal asked
            asked += 1
            return super().skips(headers)

    async with Conveyor(url) as app:
        app.middleware(Counting())

        @app.task(name="loop", queue="mail")
        async def loop() -> None: ...

        calls: Counter[str] = Counter()

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_name in {"_is_skipped", "skips", "run_through", "run"}:
                calls[frame.f_code.co_name] += frame.f_code.co_filename.endswith(
                    ("executor.py", "opentelemetry.py", "hooks.py")
                )

        await app.aenqueue_many([loop.s() for _ in range(300)])
        began = time.perf_counter()
        sys.setprofile(note)
        try:
            await drain(app)
        finally:
            sys.setprofile(None)
        portions = (time.perf_counter() - began) / 0.1 + 1
    assert 1 <= asked == calls["_is_skipped"] <= portions
    assert calls["run_through"] == calls["run"] == 0


@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_tracing_without_an_sdk_is_left_out_of_runs(url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the API alone no run goes through the middleware, unless its job carries a trace on; with an SDK each does."""
    ran: list[str] = []

    class Noting(OpenTelemetry):
        async def run(self, context: Any, call_next: Any) -> Any:
            ran.append(context.job_id)
            return await super().run(context, call_next)

    async with Conveyor(url) as app:
        app.middleware(Noting())
        seen: list[dict[str, str]] = []

        async def loop() -> None:
            seen.append(dict(current().headers))

        def thread() -> None:
            seen.append(dict(current().headers))

        task = app.task(name=kind, queue="mail")(loop if kind == "loop" else thread)
        await task.aenqueue()
        await drain(app)
        assert (ran, seen) == ([], [{}])

        traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        carried = await task.options(headers=traced).aenqueue()
        await drain(app)
        assert (ran, seen[1:]) == ([carried.id], [traced])

        monkeypatch.setattr("conveyor.contrib.opentelemetry._API", ("no.api",))  # as where an SDK is set up
        later = await task.aenqueue()
        await drain(app)
        assert ran[1:] == [later.id]
