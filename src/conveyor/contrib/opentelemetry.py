"""
Traces and metrics of OpenTelemetry, by its conventions for messaging (1.44).

It needs ``opentelemetry-api`` alone. Without an SDK in the program nothing is recorded. The context of a trace travels in
the headers of jobs and messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any, Literal

from opentelemetry import context as contexts
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context as TraceContext
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from conveyor import CallNext, Context, Conveyor, Message, Middleware, Outgoing, RateLimited, Snooze

TraceParent = Literal["auto", "always", "never"]
SpanEnd = Callable[[BaseException | None], None]
_EXPECTED = (Snooze, RateLimited)
"""The exceptions by which a job comes again later: no errors of a trace."""
_API = ("opentelemetry.trace", "opentelemetry.metrics")
_MOST_LINKS = 128
"""Links of one span: what SDKs keep of them by default."""
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The buckets of durations in s, as the conventions have them: those that an SDK has by itself are for ms."""


class _Operation:
    """One operation that goes on: its span, when it began, and what its metrics are about."""

    def __init__(self, span: Span, attributes: dict[str, Any]) -> None:
        self.span, self.labels, self.began, self.count, self.links = span, _of_metric(attributes), perf_counter(), 0, 0
        self.batched = False

    def link(self, other: trace.SpanContext) -> None:
        """Link to a message that takes part; the first ones alone, of many."""
        if self.links < _MOST_LINKS and other.is_valid:
            self.span.add_link(other)
            self.links += 1

    def fail(self, error: BaseException) -> None:
        """Note an error: the type on span and metrics, an event on the span."""
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        self.labels["error.type"] = kind
        self.span.set_attribute("error.type", kind)
        self.span.set_status(Status(StatusCode.ERROR))
        # The methods of an exception are the caller's code: the job ends with it, not with what they raise.
        with suppress(Exception):
            self.span.record_exception(error)
            self.span.set_status(Status(StatusCode.ERROR, str(error)))


class OpenTelemetry(Middleware):
    """
    Makes a span for each push and for each run, and joins them: ``app.middleware(OpenTelemetry())``.

    A run is linked to the push that made its job. It is also a part of the same trace, unless the job was scheduled;
    ``trace_parent="always"`` and ``"never"`` say otherwise. ``task_in_name=False`` leaves the task out of the names of spans.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        trace_parent: TraceParent = "auto",
        task_in_name: bool = True,
    ) -> None:
        """Make the middleware; None: the providers of the program."""
        self._tracer = trace.get_tracer("conveyor", tracer_provider=tracer_provider)
        meter = metrics.get_meter("conveyor", meter_provider=meter_provider)
        self._sent = meter.create_counter("messaging.client.sent.messages", "{message}")
        self._consumed = meter.create_counter("messaging.client.consumed.messages", "{message}")
        self._operated, self._processed = (
            meter.create_histogram(name, "s", explicit_bucket_boundaries_advisory=_BOUNDS)
            for name in ("messaging.client.operation.duration", "messaging.process.duration")
        )
        self._trace_parent, self._task_in_name = trace_parent, task_in_name
        self._given = tracer_provider is not None or meter_provider is not None

    # -- pushes ---------------------------------------------------------------------------------------------------

    def push(self, outgoing: Outgoing) -> SpanEnd | None:
        """
        Begin the span of a push, and write its context into the headers.

        Of many that are pushed together each has a span of its own (create), and one times the push of all (send). Headers into
        which the caller has put the context of a span stay as they are, and the send is linked to that span.
        """
        if not self._given and _is_sdk_absent() and not contexts.get_current():
            return None  # nothing would be recorded, and there is nothing to carry on
        place = outgoing.queue or outgoing.topic
        # A job that runs again has the headers of its first run, which no caller has put there now.
        own = trace.INVALID_SPAN_CONTEXT if outgoing.origin else _origin(outgoing.headers)
        if own.is_valid and outgoing.batch is not None:
            return self._add_to_batch(outgoing.batch, place, own)
        name = "send" if outgoing.batch is None else "create"
        attributes = _attributes(name, name, place, outgoing.task)
        if outgoing.id is not None:
            attributes["messaging.message.id"] = outgoing.id
        span = self._tracer.start_span(
            self._name(name, place, outgoing.task), kind=SpanKind.CLIENT if own.is_valid else SpanKind.PRODUCER,
            attributes=attributes, links=[Link(own)] if own.is_valid else [],
        )  # fmt: skip
        if not own.is_valid:
            propagate.inject(outgoing.headers, trace.set_span_in_context(span))
        if outgoing.batch is None:
            one = _Operation(span, attributes)
            one.count = 1
            return partial(self._end_push, one)
        span.end()
        return self._add_to_batch(outgoing.batch, place, span.get_span_context())

    def _add_to_batch(self, batch: dict[Any, Any], place: str, created: trace.SpanContext) -> SpanEnd | None:
        """Count a message for the span of its bulk push to one place; return the end of that span with the first."""
        key, end = (self, place), None
        operation = batch.get(key)
        if operation is None:
            attributes = _attributes("send", "send", place, "")
            span = self._tracer.start_span(f"send {place}", kind=SpanKind.CLIENT, attributes=attributes)
            operation = batch[key] = _Operation(span, attributes)
            operation.batched = True
            end = partial(self._end_push, operation)
        operation.count += 1
        operation.link(created)
        return end

    def _end_push(self, operation: _Operation, error: BaseException | None) -> None:
        if operation.batched:
            operation.span.set_attribute("messaging.batch.message_count", operation.count)
        if error is not None:
            operation.fail(error)
        self._sent.add(operation.count, operation.labels)
        self._operated.record(perf_counter() - operation.began, operation.labels)
        operation.span.end()

    # -- consumers ------------------------------------------------------------------------------------------------

    @contextmanager
    def receive(self, queue: str) -> Iterator[list[Message[Any]]]:
        """
        Make the span of fetching messages, which links to the push of each that is put into the list.

        ``with telemetry.receive("orders") as received: received += orders.pull(n=10)``
        """
        received: list[Message[Any]] = []
        with self._client_operation("receive", "receive", queue) as operation:
            try:
                yield received
            finally:
                for message in received:
                    operation.link(_origin(message.headers))
                operation.span.set_attribute("messaging.batch.message_count", len(received))

    @contextmanager
    def settle(self, message: Message[Any], operation: str = "ack") -> Iterator[None]:
        """Make the span of settling a message: ``with telemetry.settle(message, "nack"): message.nack()``."""
        with self._client_operation(operation, "settle", message.queue) as settling:
            settling.span.set_attribute("messaging.message.id", message.id)
            settling.link(_origin(message.headers))
            yield

    @contextmanager
    def _client_operation(self, name: str, kind: str, queue: str) -> Iterator[_Operation]:
        attributes = _attributes(name, kind, queue, "")
        with self._tracer.start_as_current_span(
            f"{name} {queue}", kind=SpanKind.CLIENT, attributes=attributes, record_exception=False,
            set_status_on_exception=False,
        ) as span:  # fmt: skip
            operation = _Operation(span, attributes)
            try:
                yield operation
            except BaseException as error:
                operation.fail(error)
                raise
            finally:
                self._operated.record(perf_counter() - operation.began, operation.labels)

    def skips(self, headers: Mapping[str, str]) -> bool:
        """
        Tell whether no SDK records anything and no trace is carried on: then a run costs nothing.

        An SDK that the program sets up while it runs is seen within 0.1 s.
        """
        return not headers and not self._given and _is_sdk_absent()

    # -- runs -----------------------------------------------------------------------------------------------------

    async def run(self, context: Context, call_next: CallNext) -> Any:
        """Make the span of a run around the job."""
        attributes = _attributes("process", "process", context.queue, context.task)
        attributes["messaging.message.id"] = context.job_id
        attributes["messaging.conveyor.attempt"] = context.attempt
        attributes["messaging.message.retry.count"] = context.attempt - 1
        due = context.scheduled_for or context.enqueued_at
        if due is not None and context.attempt == 1:
            late = max(0.0, (datetime.now(UTC) - due).total_seconds() * 1000)
            attributes["messaging.message.receive.latency"] = round(late, 3)
        items = context.items
        if items:
            attributes["messaging.batch.message_count"] = len(items)
        alone = context.scheduled_for is None and not items
        sent = _sent(context.headers)
        if not (self._trace_parent == "always" or (self._trace_parent == "auto" and alone)):
            sent = trace.set_span_in_context(trace.INVALID_SPAN, TraceContext() if items else sent)
        origins = [_origin(one.headers) for one in items or (context,)]
        name = self._name("process", context.queue, context.task)
        with self._processing(name, attributes, sent, origins, context):
            return await call_next()

    @contextmanager
    def process(self, message: Message[Any]) -> Iterator[trace.Span]:
        """
        Make the span of handling *message*: ``with message, telemetry.process(message): …``.

        Where it belongs to the trace of the push, it is linked to the span in which it is made.
        """
        queue = message.queue
        attributes = _attributes("process", "process", queue, "")
        attributes["messaging.message.id"] = message.id
        attributes["messaging.message.retry.count"] = message.attempt - 1
        sent, origins, ambient = _sent(message.headers), [_origin(message.headers)], trace.get_current_span()
        if self._trace_parent == "never" or not origins[0].is_valid:
            sent = trace.set_span_in_context(ambient, sent)
        else:
            origins.append(ambient.get_span_context())
        with self._processing(f"process {queue}", attributes, sent, origins) as operation:
            yield operation.span

    @contextmanager
    def _processing(
        self, name: str, attributes: dict[str, Any], sent: TraceContext, origins: Sequence[trace.SpanContext],
        context: Context | None = None,
    ) -> Iterator[_Operation]:  # fmt: skip
        """Make a span as a part of *sent*, whose baggage is that of the program meanwhile, with links to *origins*."""
        links = [Link(one) for one in origins if one.is_valid][:_MOST_LINKS]
        token = contexts.attach(sent)
        try:
            with self._tracer.start_as_current_span(
                name, sent, SpanKind.CONSUMER, attributes, links, record_exception=False, set_status_on_exception=False
            ) as span:
                operation = _Operation(span, attributes)
                try:
                    yield operation
                except _EXPECTED as later:
                    span.set_attribute("messaging.conveyor.outcome", type(later).__name__)
                    raise
                except asyncio.CancelledError:
                    if context is not None and context.timed_out:
                        operation.fail(TimeoutError("the attempt ran longer than its time limit"))
                    else:  # it was cancelled, or is given back as its worker stops
                        span.set_attribute("messaging.conveyor.outcome", "CancelledError")
                    raise
                except BaseException as error:
                    operation.fail(error)
                    raise
                finally:
                    self._consumed.add(attributes.get("messaging.batch.message_count", 1), operation.labels)
                    self._processed.record(perf_counter() - operation.began, operation.labels)
        finally:
            contexts.detach(token)

    def _name(self, operation: str, place: str, task: str) -> str:
        return f"{operation} {place} {task}" if task and self._task_in_name else f"{operation} {place}"


def _is_sdk_absent() -> bool:
    """Tell whether the providers of the program are those of the API, which record nothing."""
    providers = (trace.get_tracer_provider(), metrics.get_meter_provider())
    return all(type(one).__module__.startswith(_API) for one in providers)


def instrument(app: Conveyor, **options: Any) -> OpenTelemetry:
    """Add the middleware to *app*, with the options of `OpenTelemetry`, and return it."""
    made = OpenTelemetry(**options)
    app.middleware(made)
    return made


def _sent(headers: Mapping[str, str]) -> TraceContext:
    """Return what *headers* carry: the span of a push, and baggage."""
    return propagate.extract(headers, TraceContext())


def _origin(headers: Mapping[str, str]) -> trace.SpanContext:
    """Return the context of the push that *headers* come from; an invalid one without any."""
    return trace.get_current_span(_sent(headers)).get_span_context()


def _attributes(name: str, kind: str, place: str, task: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "messaging.system": "conveyor",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": place,
    }
    if task:
        attributes["messaging.conveyor.task.name"] = task
    return attributes


def _of_metric(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return those of the attributes that take few values."""
    names = (
        "messaging.system",
        "messaging.operation.name",
        "messaging.operation.type",
        "messaging.destination.name",
        "messaging.conveyor.task.name",
    )
    return {name: attributes[name] for name in names if name in attributes}
