"""From the end of an attempt to what is reported to Redis with the next turn."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from conveyor.errors import PayloadError, Snooze
from conveyor.events import JobCancelledEvent, JobDead, JobDone, JobRetried
from conveyor.jobs.context import end_spawning
from conveyor.messaging import retry as outcome
from conveyor.payload import failures
from conveyor.payload.codec import UnreadablePayload
from conveyor.payload.pipeline import PLAIN
from conveyor.payload.records import AttemptHistory, Failure, Outcome, read_failure, to_json
from conveyor.payload.sealed_records import pack_failure, pack_refusal, pack_result
from conveyor.store.inspection import write_finished
from conveyor.store.operations import Settlement, TurnReport
from conveyor.units import milliseconds, span
from conveyor.worker.attempt import Attempt, details, line

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore

log = logging.getLogger("conveyor.worker")
RECENT = 32
"""Finished jobs listed per turn at most; at high rates the list shows a sample."""
TOLD = 10
"""Successes logged a second, one line each."""
CANCELLED_KEPT_MS = 600_000


def _follow(report: TurnReport, id: str, spawned: list[bytes]) -> None:  # noqa: A002
    """Put what a successful attempt spawned into the outbox, right before the settlement that ends it."""
    report.others += [Settlement("S", id, record=entry) for entry in spawned]
    report.spawned = True


class SettlementWriter:
    """Decides nothing about policy (`outcome.py` does); writes what was decided into a consumer's report."""

    def __init__(self, app: AppCore, worker: str) -> None:
        """Take the app whose listeners hear of it, and the name recorded with errors."""
        self._app = app
        self._worker = worker
        self._sealing = app.sealing
        # One line a job while a person can read them; a summary of the rest. None when nobody wants them.
        self._told: int | None = 0 if log.isEnabledFor(logging.INFO) else None
        self._since = 0.0

    def _tell(self, attempt: Attempt, seconds: float) -> None:
        assert self._told is not None
        if attempt.ended - self._since >= 1.0:
            if self._told > TOLD:
                log.info("✓ … and %s more jobs", f"{self._told - TOLD:,}")
            self._since, self._told = attempt.ended, 0
        self._told += 1
        if self._told <= TOLD:
            log.info("✓ %s %s", attempt.label, span(seconds))

    def done(self, report: TurnReport, attempt: Attempt, value: Any, now_ms: int) -> None:
        """Settle a success; a result that cannot be stored makes it a dead letter."""
        handler, envelope = attempt.handler, attempt.envelope
        seconds = attempt.ended - attempt.started
        own = envelope.extra.keep_ms
        keep = handler.task.settings.keep_ms if own is None else own
        spawned = attempt.context is not None and attempt.spawned
        if value is not None and keep and handler.stores:
            try:
                data = handler.task.results.encode(value)
            except PayloadError as error:
                self.failed(report, attempt, error, now_ms, retry=False)
                return
            if handler.task.bare_results:
                record = b'{"status":"done","value":%b,"at":%d}' % (data, now_ms)
            else:
                packed = pack_result(self._sealing or PLAIN, data, attempt.consumer.queue, attempt.id)
                record = b'{"status":"done",%b,"at":%d}' % (packed, now_ms)
            if spawned:
                _follow(report, attempt.id, spawned)
            report.others.append(
                Settlement("D", attempt.id, keep, record, unique=envelope.unique, own_id=envelope.own_id)
            )
        elif envelope.is_plain and not spawned:
            report.done.append(attempt.id)
        else:
            if spawned:
                _follow(report, attempt.id, spawned)
            report.others.append(Settlement("D", attempt.id, unique=envelope.unique, own_id=envelope.own_id))
        if attempt.context is not None:
            end_spawning(attempt.context)  # a thread of it that goes on is told
        handler.count_done(seconds)
        if self._told is not None:
            self._tell(attempt, seconds)
        if len(report.recent) < RECENT:
            report.recent.append(write_finished(attempt.id, handler.name, "done", now_ms, round(seconds * 1000)))
        if self._app.has_listener(JobDone):
            self._app.emit(JobDone(attempt.public_id, handler.name, attempt.consumer.queue, attempt.number, seconds))

    def failed(
        self, report: TurnReport, attempt: Attempt, error: BaseException, now_ms: int, *, retry: bool = True
    ) -> None:
        """Settle a failure: again later, or dead."""
        if isinstance(error, Snooze):
            self._snoozed(report, attempt, error)
            return
        if isinstance(error, UnreadablePayload):
            self.unreadable(report, attempt, error, now_ms)
            return
        handler, queue = attempt.handler, attempt.consumer.queue
        described = failures.describe(error, attempt.number, now_ms, self._worker)
        if self._sealing is not None:
            described = pack_failure(self._sealing, described, queue, attempt.id)
        policy = handler.task.settings.retry if retry else outcome.Retry(attempts=1)
        decision = outcome.after_failure(
            policy, attempt.history, attempt.number, error, to_json(described),
            attempts=attempt.envelope.extra.attempts if retry else 1,
        )  # fmt: skip
        handler.failed += 1
        if isinstance(decision, outcome.RetryAfter):
            handler.retried += 1
            report.others.append(Settlement("R", attempt.id, decision.ms, state=decision.state.encode()))
            attempt.consumer.own_retries[attempt.id] = monotonic() + decision.ms / 1000
            budget = attempt.envelope.extra.attempts or policy.attempts
            failures.log_error(
                log, logging.WARNING, "✗ %s attempt %d/%d %s → retry in %s", attempt.label,
                attempt.number, budget, details(error), span(decision.ms / 1000), error=error,
            )  # fmt: skip
            if self._app.has_listener(JobRetried):
                self._app.emit(
                    JobRetried(attempt.public_id, handler.name, queue, attempt.number, decision.ms / 1000, error)
                )
            return
        failures.log_error(
            log, logging.ERROR, "✗ %s attempt %d dead: %s", attempt.label, attempt.number, details(error), error=error
        )
        self.bury(report, attempt, decision.state, decision.reason, now_ms, error)

    def unreadable(self, report: TurnReport, attempt: Attempt, error: PayloadError, now_ms: int) -> None:
        """Give up a job whose payload cannot be read: repeating would not mend it. One line in the log."""
        log.error("✗ %s cannot be read and is dead: %s", attempt.label, line(failures.message(error)))
        record = Failure(attempt.number, now_ms, "PayloadError", failures.message(error), worker=self._worker)
        if self._sealing is not None:
            record = pack_refusal(self._sealing, record, error.code, attempt.consumer.queue, attempt.id)
        old = attempt.history
        state = AttemptHistory(attempt.number, old.failures, old.crashes, [*old.errors, to_json(record)])
        attempt.handler.failed += 1
        self.bury(report, attempt, state, f"{error.code}: its payload cannot be read", now_ms, error)

    def bury(
        self,
        report: TurnReport,
        attempt: Attempt,
        state: AttemptHistory,
        reason: str,
        now_ms: int,
        error: BaseException | None = None,
    ) -> None:
        """Make a job a dead letter; its envelope, and so its payload, stays as it is."""
        last = read_failure(state.errors[-1]) if state.errors else None
        record = to_json(Outcome("dead", failure=last, reason=reason, at=now_ms))
        envelope = attempt.envelope
        report.others.append(Settlement("X", attempt.id, 0, record, state.encode(), envelope.unique, envelope.own_id))
        seconds = max(0.0, attempt.ended - attempt.started)
        if len(report.recent) < RECENT:
            report.recent.append(
                write_finished(attempt.id, attempt.handler.name, "dead", now_ms, round(seconds * 1000))
            )
        if self._app.has_listener(JobDead):
            self._app.emit(
                JobDead(attempt.public_id, attempt.handler.name, attempt.consumer.queue, attempt.number, reason, error)
            )

    def poison(self, report: TurnReport, attempt: Attempt, now_ms: int) -> None:
        """Give up a job whose worker crashed each time it ran."""
        state = attempt.history
        message = f"its worker crashed {state.crashes} times while it ran"
        record = to_json(Failure(state.starts, now_ms, "crashed", message, worker=self._worker))
        buried = AttemptHistory(state.starts, state.failures, state.crashes, [*state.errors, record])
        log.error("✗ %s is poison: its worker crashed %d times", attempt.label, state.crashes)
        self.bury(report, attempt, buried, "crashed", now_ms)

    def crashed(self, report: TurnReport, attempt: Attempt, now_ms: int, error: BaseException) -> None:
        """Settle a job that took its process with it: charge the crash, and try again alone, or give it up."""
        old = attempt.history
        record = to_json(failures.describe(error, attempt.number, now_ms, self._worker))
        state = AttemptHistory(attempt.number, old.failures, old.crashes + 1, [*old.errors, record])
        log.error("✗ %s crashed its process: %s", attempt.label, error)
        if state.crashes >= attempt.handler.task.settings.retry.max_crashes:
            attempt.state = state
            self.poison(report, attempt, now_ms)
        else:
            report.others.append(Settlement("F", attempt.id, state=state.encode()))

    def cancelled(self, report: TurnReport, attempt: Attempt, now_ms: int) -> None:
        """Settle a job that was cancelled while we held it."""
        record = to_json(Outcome("cancelled", at=now_ms))
        envelope = attempt.envelope
        report.others.append(
            Settlement("C", attempt.id, CANCELLED_KEPT_MS, record, b"", envelope.unique, envelope.own_id)
        )
        if self._app.has_listener(JobCancelledEvent):
            self._app.emit(
                JobCancelledEvent(attempt.public_id, attempt.handler.name, attempt.consumer.queue, attempt.number)
            )

    def handed_back(self, report: TurnReport, attempt: Attempt, *, started: bool) -> None:
        """Return a job to the front; it costs no attempt."""
        if started or attempt.state is not None:
            state = outcome.handed_back(attempt.history, attempt.number, started=started).encode()
        else:
            state = b""
        report.others.append(Settlement("F", attempt.id, state=state))

    def _snoozed(self, report: TurnReport, attempt: Attempt, snooze: Snooze) -> None:
        ms = milliseconds(snooze.delay, name="Snooze")
        state = outcome.snoozed(attempt.history, attempt.number)
        report.others.append(Settlement("R", attempt.id, ms, state=state.encode()))
        attempt.consumer.own_retries[attempt.id] = monotonic() + ms / 1000


def error_of(attempt: Attempt, error: BaseException | None) -> BaseException | None:
    """Return the error an attempt is settled with: a stop by timeout counts as one, whatever the job made of it."""
    if attempt.stopped == "timeout":
        limit = attempt.timeout
        return TimeoutError(
            f"the attempt ran longer than its time limit of {limit:g} s" if limit else "time limit passed"
        )
    if isinstance(error, asyncio.CancelledError):
        return RuntimeError("the job cancelled itself (CancelledError left the task without a cancel request)")
    return error
