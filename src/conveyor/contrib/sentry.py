"""
Errors and traces of jobs in Sentry.

A job that is dead is one event there; attempts that are tried again are none. Each run is a transaction of the trace in which the
job was enqueued.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from conveyor import CallNext, Context, Conveyor, Middleware, Outgoing, RateLimited, Snooze
from conveyor.events import JobDead


class Sentry(Middleware):
    """Carries the trace of Sentry from a push to the run of the job, and makes a transaction of each run."""

    def push(self, outgoing: Outgoing) -> None:
        """Write the context of the trace into the headers, within a span where a transaction is under way."""
        place = outgoing.queue or outgoing.topic
        with sentry_sdk.start_span(op="queue.publish", name=outgoing.task or place) as span:
            span.set_data("messaging.destination.name", place)
            for name, value in sentry_sdk.get_current_scope().iter_trace_propagation_headers(span=span):
                outgoing.headers[name] = value

    async def run(self, context: Context, call_next: CallNext) -> Any:
        """Run the job in a scope and a transaction of its own."""
        with sentry_sdk.isolation_scope() as scope:
            scope.clear_breadcrumbs()
            _describe(scope, context.task, context.queue, context.job_id, context.attempt)
            transaction = sentry_sdk.continue_trace(
                dict(context.headers), op="queue.process", name=context.task, source="task"
            )
            with sentry_sdk.start_transaction(transaction) as current:
                current.set_data("messaging.destination.name", context.queue)
                current.set_data("messaging.message.id", context.job_id)
                current.set_data("messaging.message.retry.count", context.attempt - 1)
                due = context.scheduled_for or context.enqueued_at
                if due is not None and context.attempt == 1:
                    late = max(0.0, (datetime.now(UTC) - due).total_seconds() * 1000)
                    current.set_data("messaging.message.receive.latency", round(late, 3))
                # An exception that passes the end of a transaction makes its status internal_error, whatever it was.
                try:
                    result = await call_next()
                except BaseException as error:
                    ended = error
                    current.set_status(_status(error, context))
                else:
                    current.set_status("ok")
                    return result
            try:
                raise ended
            finally:
                del ended  # it holds this frame


def _status(error: BaseException, context: Context) -> str:
    """Return the status of a run that ended with *error*."""
    if isinstance(error, Snooze | RateLimited):
        return "ok"
    if isinstance(error, asyncio.CancelledError):
        return "deadline_exceeded" if context.timed_out else "cancelled"
    return "internal_error"


def instrument(app: Conveyor) -> None:
    """
    Report the dead jobs of *app* to Sentry, and trace its pushes and runs. `sentry_sdk.init` is called by the program.

    The lines of the logger ``conveyor.worker`` are not reported any more: each job that fails has some, in the words of its worker.
    """
    ignore_logger("conveyor.worker")
    app.middleware(Sentry())
    app.on(JobDead)(report_dead)


def report_dead(event: JobDead) -> None:
    """Report a job that is dead: its last error, grouped by the task and where the error was raised."""
    with sentry_sdk.new_scope() as scope:
        _describe(scope, event.task, event.queue, event.job_id, event.attempt)
        scope.set_tag("conveyor.reason", event.reason)
        scope.fingerprint = ["{{ default }}", event.task]
        if event.error is not None:
            sentry_sdk.capture_exception(event.error)
        else:
            sentry_sdk.capture_message(f"Job of task {event.task} is dead: {event.reason}", level="error")


def _describe(scope: Any, task: str, queue: str, job_id: str, attempt: int) -> None:
    scope.set_tag("conveyor.task", task)
    scope.set_tag("conveyor.queue", queue)
    scope.set_context("conveyor", {"job_id": job_id, "attempt": attempt, "task": task, "queue": queue})
