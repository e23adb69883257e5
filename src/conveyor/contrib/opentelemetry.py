"""
Traces and metrics of OpenTelemetry, by its conventions for messaging.

It needs ``opentelemetry-api`` alone. Without an SDK in the program nothing is recorded. The context of a trace travels in
the headers of jobs and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context as TraceContext
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from conveyor import CallNext, Context, Conveyor, Message, Middleware, Outgoing, RateLimited, Snooze

TraceParent = Literal["auto", "always", "never"]
_EXPECTED = (Snooze, RateLimited)
"""The exceptions by which a job comes again later: no errors of a trace."""


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
        self._duration = meter.create_histogram("messaging.process.duration", "s")
        self._trace_parent, self._task_in_name = trace_parent, task_in_name

    def push(self, outgoing: Outgoing) -> None:
        """Make the span of a push, and write its context into the headers."""
        place = outgoing.queue or outgoing.topic
        attributes = _attributes("send", "send", place, outgoing.task)
        if outgoing.id is not None:
            attributes["messaging.message.id"] = outgoing.id
        self._sent.add(1, _of_metric(attributes))
        span = self._tracer.start_span(
            self._name("send", place, outgoing.task), kind=SpanKind.PRODUCER, attributes=attributes
        )
        propagate.inject(outgoing.headers, trace.set_span_in_context(span))
        span.end()

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
        joins = self._trace_parent == "always" or (self._trace_parent == "auto" and context.scheduled_for is None)
        with self._processing(self._name("process", context.queue, context.task), attributes, context.headers, joins):
            return await call_next()

    @contextmanager
    def process(self, message: Message[Any]) -> Iterator[trace.Span]:
        """Make the span of handling *message*: ``with message, telemetry.process(message): …``."""
        queue = message.queue
        attributes = _attributes("process", "process", queue, "")
        attributes["messaging.message.id"] = message.id
        attributes["messaging.message.retry.count"] = message.attempt - 1
        with self._processing(f"process {queue}", attributes, message.headers, self._trace_parent != "never") as span:
            yield span

    @contextmanager
    def _processing(self, name: str, attributes: dict[str, Any], headers: Any, joins: bool) -> Iterator[trace.Span]:
        sent = propagate.extract(headers, TraceContext())
        origin = trace.get_current_span(sent).get_span_context()
        links = [Link(origin)] if origin.is_valid else []
        began, labels = perf_counter(), _of_metric(attributes)
        with self._tracer.start_as_current_span(
            name, sent if joins else TraceContext(), SpanKind.CONSUMER, attributes, links,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            try:
                yield span
            except _EXPECTED as later:
                span.set_attribute("messaging.conveyor.outcome", type(later).__name__)
                raise
            except BaseException as error:
                kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
                labels["error.type"] = kind
                span.set_attribute("error.type", kind)
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, str(error)))
                raise
            finally:
                self._consumed.add(1, labels)
                self._duration.record(perf_counter() - began, labels)

    def _name(self, operation: str, place: str, task: str) -> str:
        return f"{operation} {place} {task}" if task and self._task_in_name else f"{operation} {place}"


def instrument(app: Conveyor, **options: Any) -> OpenTelemetry:
    """Add the middleware to *app*, with the options of `OpenTelemetry`, and return it."""
    made = OpenTelemetry(**options)
    app.middleware(made)
    return made


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
        "messaging.destination.name",
        "messaging.conveyor.task.name",
    )
    return {name: attributes[name] for name in names if name in attributes}
