"""Writes the end of an attempt into the report that goes to Redis with the next turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from msgspec import Raw
from msgspec.structs import replace

from conveyor.errors import ConveyorError, PayloadError, RateLimited, Snooze, StoreUnavailable, UnknownTask
from conveyor.events import JobCancelledEvent, JobDead, JobDone, JobRetried
from conveyor.ids import clean, clean_lines, logical, made_at_ms
from conveyor.jobs import webhooks
from conveyor.jobs.batch_task import BatchMisreported
from conveyor.jobs.context import end_spawning
from conveyor.jobs.history import past_events
from conveyor.jobs.task import UNRUN, FunctionNotRun, not_run
from conveyor.messaging import retry
from conveyor.messaging.declared_limits import charge_of, held_limit
from conveyor.messaging.settlement import CANCELLED_KEPT_MS
from conveyor.payload import failures
from conveyor.payload.codec import UnreadablePayload
from conveyor.payload.live_records import pack_lines
from conveyor.payload.pipeline import PLAIN
from conveyor.payload.records import (
    NOT_STARTED,
    RAN,
    AttemptHistory,
    Failure,
    Outcome,
    PastEvent,
    read_failure,
    to_json,
)
from conveyor.payload.sealed_records import pack_arguments, pack_failure, pack_refusal, pack_result
from conveyor.store.inspection import write_finished
from conveyor.store.operations import Settlement, TurnReport
from conveyor.units import instant, span
from conveyor.worker.attempt import PLAIN_ENVELOPE, Attempt, error_line, one_line
from conveyor.worker.execution.processes import ProcessCrashed, ProcessUnavailable
from conveyor.worker.logs import log_repeated_error
from conveyor.worker.part_writer import KEPT_MS
from conveyor.worker.requirements import RequirementUnmet

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.jobs.job_log import JobLog
    from conveyor.jobs.live import LiveRecord
    from conveyor.payload.redaction import Hide

log = logging.getLogger("conveyor.worker")
RECENT = 32
"""Finished jobs listed per turn, at most. At high rates the list shows a sample."""
LOGGED_PER_SECOND = 10
"""Successes logged per second, one line each; the rest as one number."""
ARGUMENTS_KEPT = 2048
"""Bytes of arguments that are kept with a result, at most: results lie in small hashes, and memory is for jobs to come."""
LONGEST_REQUIREMENT_MS = 30_000
"""
The longest pause in ms of a job that needs another worker. One that serves the queue takes it as soon as it has room.
"""
LOGS_KEPT_MS = 7 * 86_400_000
"""For how long the lines of a job are kept, in ms, from the last of them on."""


def _hidden_by(text: str, hide: Hide) -> str:
    return hide(text)


def _add_spawned(report: TurnReport, id: str, spawned: list[bytes]) -> None:  # noqa: A002
    """Add the jobs that a successful attempt spawned, right before the settlement that ends it."""
    report.others += [Settlement("S", id, record=entry) for entry in spawned]
    report.spawned = True


class SettlementWriter:
    """
    Settles attempts into the report of their consumer.

    The policy of retries is decided in `messaging/retry.py`.
    """

    def __init__(self, app: AppCore, worker: str) -> None:
        """
        Args:
            app: its listeners get the events.
            worker: the name that is recorded with errors.
        """
        self._app = app
        self._worker = worker
        self._worker_member = b'"worker":%b}' % to_json(worker)
        self._sealing = app.sealing
        self.failure_log = failures.FailureLog(log)
        # One line a job while a person can read them, and a summary of the rest. None: the log does not show INFO.
        self._logged: int | None = 0 if log.isEnabledFor(logging.INFO) else None
        self._since = 0.0
        self._explained: set[str] = set()
        self._shared: dict[int, Failure] | None = None
        self._batch_hide: Hide | None = None

    def _log_done(self, attempt: Attempt, seconds: float) -> None:
        assert self._logged is not None
        if attempt.ended - self._since >= 1.0:
            if self._logged > LOGGED_PER_SECOND:
                log.info("✓ … and %s more jobs", f"{self._logged - LOGGED_PER_SECOND:,}")
            self._since, self._logged = attempt.ended, 0
        self._logged += 1
        if self._logged <= LOGGED_PER_SECOND:
            log.info("✓ %s %s", attempt.label, span(seconds))

    def settle(self, attempt: Attempt, value: Any, error: BaseException | None, *, stuck: bool = False) -> None:
        """
        Settle an attempt by its end: the value it returned, the error it raised, or why it was stopped.

        *stuck*: its thread goes on beyond the time limit.
        """
        consumer, why, handler = attempt.consumer, attempt.stop_reason, attempt.handler
        consumer.changed_handlers.add(handler)
        report = consumer.report
        if attempt.context is not None:
            if attempt.charges:
                self._charge(report, attempt)
            if (live := attempt.live_record) is not None:
                live.finish()
            if attempt.log is not None:
                self._keep_log(report, attempt, attempt.log, failed=error is not None or why is not None)
        writer = consumer.part_writer
        parts = writer.end(attempt) if writer.is_used else None  # those of a process come without a context
        if parts is not None:
            report.others.append(parts)
        if attempt.number == 1 and attempt.started:
            handler.first_starts.append(attempt)
        if error is None and why is None:
            self.done(report, attempt, value)
        else:
            self._settle_unsuccessful(report, attempt, value, error, stuck=stuck)
        if parts is not None and report.others[-1].kind in {"D", "C"}:
            parts.ms = max(self._keep_ms(attempt), KEPT_MS)

    def _settle_unsuccessful(
        self, report: TurnReport, attempt: Attempt, value: Any, error: BaseException | None, *, stuck: bool
    ) -> None:
        """Settle an attempt that raised or was stopped; one that returned although it was to be stopped is a success."""
        why, now = attempt.stop_reason, attempt.consumer.now_ms
        unfinished = attempt.started == 0.0 or isinstance(error, asyncio.CancelledError) or stuck
        if why in {"cancel", "expired"} and (unfinished or error is not None):
            self.cancelled(report, attempt, now)
        elif why == "stop" and (unfinished or error is not None):
            self.handed_back(report, attempt, started=attempt.started != 0.0)
        elif isinstance(error, ProcessCrashed) and why is None:
            self.crashed(report, attempt, now, error)
        elif isinstance(error, ProcessUnavailable) and why is None:
            self.leave_to_others(attempt, error)
        else:
            final = _error_of(attempt, error)
            if final is None:
                self.done(report, attempt, value)
            else:
                self.failed(report, attempt, final, now)

    @staticmethod
    def _keep_ms(attempt: Attempt) -> int:
        own = attempt.envelope.extra.keep_ms
        return attempt.handler.keep_ms if own is None else own

    def done(self, report: TurnReport, attempt: Attempt, value: Any) -> None:
        """Settle a success. A result that cannot be stored, or a function that did not run, makes the job a dead letter."""
        if value is not None and type(value) in UNRUN:
            self.failed(report, attempt, not_run(value), attempt.consumer.now_ms)
            return
        handler, envelope, context = attempt.handler, attempt.envelope, attempt.context
        seconds = attempt.ended - attempt.started
        keep = handler.keep_ms if (own := envelope.extra.keep_ms) is None else own
        told = handler.has_webhook and self._told(attempt, "done", attempt.consumer.now_ms)
        spawned = [*attempt.spawned, *told] if told else context is not None and attempt.spawned
        # Those that simply ended come first, and the other reports of an attempt must come before its end.
        live = None if context is None else attempt.live_record
        # Of a job that more is to be told of than its one run a record is kept in any case.
        tells = live is not None or attempt.state is not None
        simple = not (envelope.own_id or spawned or tells or (report.others and report.others[-1].id == attempt.id))
        stores = value is not None and handler.stores
        ms, record, state = 0, b"", b""
        if keep and (stores or tells):
            try:
                record = self._success_record(report, attempt, value, live, stores=stores)
            except PayloadError as error:
                self.failed(report, attempt, error, attempt.consumer.now_ms, may_retry=False)
                return
            ms, state = keep, b"" if stores else b"-"
        elif value is not None and not keep and handler.task.promises_result:
            # A promised value that was returned and is not kept is told from none: `result` raises ResultExpired.
            state = b"+"
        if simple:
            # As `add_done`, without a call, since it is once for each job.
            report.done.append(attempt.id)
            if envelope.attributes:
                report.attributes[attempt.id] = envelope.attributes
            if record or state:
                report.results[attempt.id] = (ms, record)
        else:
            if spawned:
                _add_spawned(report, attempt.id, spawned)
            report.others.append(
                Settlement("D", attempt.id, ms, record, state, envelope.attributes, own_id=envelope.own_id)
            )
        if envelope.attributes:
            report.frees += 1
            report.seconds += seconds
        if context is not None:
            end_spawning(context)  # a thread of the job that goes on gets an error if it spawns
        handler.successes.append(attempt)
        if self._logged is not None:
            self._log_done(attempt, seconds)
        if len(report.recent) < RECENT:
            now_ms = attempt.consumer.now_ms
            report.recent.append(write_finished(attempt.id, handler.name, "done", now_ms, round(seconds * 1000)))
        if JobDone in self._app.listeners:
            self._app.emit(JobDone(attempt.public_id, handler.name, attempt.consumer.queue, attempt.number, seconds))

    def _success_record(
        self, report: TurnReport, attempt: Attempt, value: Any, live: LiveRecord | None, *, stores: bool
    ) -> bytes:
        """Return the record of a success, with its value where the task *stores* one; raises PayloadError."""
        task, now_ms = attempt.handler.task, attempt.consumer.now_ms
        data = task.results.encode(value) if stores else b"null"
        run = self._run_record(attempt, now_ms)
        if task.bare_results:
            record = b'{"status":"done","value":%b,"at":%d,"run":%b}' % (data, now_ms, run)
        else:
            packed = pack_result(self._sealing or PLAIN, data, attempt.consumer.queue, attempt.id)
            record = b'{"status":"done",%b,"at":%d,"run":%b}' % (packed, now_ms, run)
        return record if live is None else self._add_live(report, attempt, live, record)

    def report_live(self, report: TurnReport, attempt: Attempt) -> None:
        """Report what a running attempt says of itself, as far as it is new, and its lines while somebody follows them."""
        live, lines = attempt.live_record, attempt.log
        if live is not None and live.is_changed:
            live.is_changed = False  # first: what the job says from now on is news again
            report.others.append(Settlement("M", attempt.id, state=attempt.running_history.encode()))
        if lines is not None and lines.is_followed:
            self._send_lines(report, attempt, lines)

    def _keep_log(self, report: TurnReport, attempt: Attempt, lines: JobLog, *, failed: bool) -> None:
        """Report the lines of an attempt that ends, where its task says that they are kept, or somebody follows them."""
        if failed or attempt.handler.task.settings.logs == "always" or lines.is_followed:
            self._send_lines(report, attempt, lines)

    def _send_lines(self, report: TurnReport, attempt: Attempt, log: JobLog) -> None:
        if lines := log.take():
            if (hide := attempt.hider()) is not None:
                lines = [(at, level, logger, hide(text)) for at, level, logger, text in lines]
            record = pack_lines(self._sealing, lines, attempt.number, attempt.consumer.queue, attempt.id)
            report.others.append(Settlement("T", attempt.id, LOGS_KEPT_MS, record))

    def _add_live(self, report: TurnReport, attempt: Attempt, live: LiveRecord, record: bytes) -> bytes:
        """Return the record of a success with what the job said of itself, whose last word is written before its end."""
        history = attempt.history
        if live.is_changed:
            live.is_changed = False
            report.others.append(Settlement("M", attempt.id, state=attempt.running_history.encode()))
        members = b"".join(
            b',"%b":%b' % (name, data)
            for name, data in ((b"progress", history.progress), (b"notes", history.notes))
            if data
        )
        return record[:-1] + members + b"}"

    def _told(
        self, attempt: Attempt, state: webhooks.EndState, now_ms: int, failure: Failure | None = None
    ) -> list[bytes]:
        """Return the entry of an outbox for the job that tells a webhook of this end; none where the task has no webhook for it."""
        webhook = None if attempt.handler.kind == "unknown" else attempt.handler.task.settings.webhook
        if webhook is None or state not in webhook.on:
            return []
        name, queue = attempt.handler.name, logical(attempt.consumer.queue)
        told = webhooks.told_of(attempt.public_id, name, queue, attempt.number, now_ms) | {"state": state}
        if failure is not None:  # the text of a sealed error says only that it is sealed
            told["error"] = {"type": failure.type, "message": failure.message}
        try:
            return [self._app.tasks[webhooks.TASK].options(queue=queue).s(name, told).follow()[1]]
        except ConveyorError as error:
            log.error("the webhook of %s cannot be enqueued: %s", attempt.label, one_line(failures.message(error)))
            return []

    def _run_record(self, attempt: Attempt, now_ms: int) -> bytes:
        """Return the JSON of a RunRecord, written by hand as most of it is known: it is a part of every kept result."""
        envelope, name = attempt.envelope, attempt.handler.name.encode()
        # As `_began_ms`, without a call for each result.
        started = now_ms - round((attempt.ended - attempt.started) * 1000)
        fresh = attempt.state is None
        if fresh and envelope is PLAIN_ENVELOPE and attempt.body[:1] == b"{" and len(attempt.body) <= ARGUMENTS_KEPT:
            return b'{"task":"%b","attempt":%d,"started":%d,"body":%b,%b' % (
                name, attempt.number, started, attempt.body, self._worker_member,
            )  # fmt: skip
        members = [b'{"task":"%b","attempt":%d,"started":%d' % (name, attempt.number, started)]
        if envelope.extra.headers:
            members.append(b'"headers":%b' % to_json(envelope.extra.headers))
        if tags := envelope.tags:
            members.append(b'"tags":%b' % to_json(tags))
        if attempt.state is not None and (past := past_events(attempt.state)):
            members.append(b'"past":%b' % to_json(past))
        if envelope.extra.version != 1:
            members.append(b'"version":%d' % envelope.extra.version)
        if envelope.extra.origin:
            members.append(b'"origin":%b' % to_json(envelope.extra.origin))
        body = attempt.body if envelope is PLAIN_ENVELOPE else envelope.body
        if len(body) <= ARGUMENTS_KEPT and attempt.id not in attempt.consumer.blobs:
            members.append(pack_arguments(body))
        return b",".join([*members, self._worker_member])

    def failed(
        self, report: TurnReport, attempt: Attempt, error: BaseException, now_ms: int, *, may_retry: bool = True
    ) -> None:
        """Settle a failure: again later, or dead."""
        if isinstance(error, Snooze) and (snooze_ms := retry.wait_of(error)) is not None:
            self._snoozed(report, attempt, snooze_ms)
            return
        if isinstance(error, UnreadablePayload):
            self.unreadable(report, attempt, error, now_ms)
            return
        if isinstance(error, RateLimited) and (after_ms := retry.wait_of(error)) is not None:
            self._rate_limited(report, attempt, after_ms)
            return
        handler, queue = attempt.handler, attempt.consumer.queue
        may_retry = may_retry and not isinstance(error, BatchMisreported | FunctionNotRun)
        hide = self._hider(attempt)
        record = self._describe(error, attempt, now_ms, hide)
        if self._sealing is not None:
            record = pack_failure(self._sealing, record, queue, attempt.id)
        policy = handler.task.settings.retry if may_retry else retry.Retry(attempts=1)
        decision = retry.after_failure(
            policy, attempt.history, attempt.number, error, to_json(record),
            attempts=attempt.envelope.extra.attempts if may_retry else 1,
            now_ms=now_ms, id=attempt.id, due_ms=attempt.envelope.due_ms,
        )  # fmt: skip
        if isinstance(decision, retry.RetryAfter):
            _count(attempt, "failed")
            _count(attempt, "retried")
            handler.waits["retry"] = handler.waits.get("retry", 0.0) + decision.ms
            self.put_off(report, attempt, decision.ms, decision.history)
            budget = attempt.envelope.extra.attempts or policy.attempts
            self.failure_log.log(
                logging.WARNING, "✗ %s attempt %d/%d %s → retry in %s", attempt.label,
                attempt.number, budget, error_line(error, hide), span(decision.ms / 1000), error=error, hide=hide,
            )  # fmt: skip
            if JobRetried in self._app.listeners:
                self._app.emit(
                    JobRetried(attempt.public_id, handler.name, queue, attempt.number, decision.ms / 1000, error)
                )
            return
        self.failure_log.log(
            logging.ERROR,
            "✗ %s attempt %d dead: %s",
            attempt.label,
            attempt.number,
            error_line(error, hide),
            error=error,
            hide=hide,
        )
        self.dead(report, attempt, decision.history, decision.reason, now_ms, error)

    @contextmanager
    def shared_errors(self, attempts: Iterable[Attempt]) -> Iterator[None]:
        """Describe an error once for all attempts that end with it: the jobs of a batch, whose arguments it may quote."""
        hides = [hide for attempt in attempts if (hide := attempt.hider()) is not None]
        self._shared, self._batch_hide = {}, partial(reduce, _hidden_by, hides) if hides else None
        try:
            yield
        finally:
            self._shared = self._batch_hide = None

    def _hider(self, attempt: Attempt) -> Hide | None:
        return attempt.hider() if self._shared is None else self._batch_hide

    def _describe(self, error: BaseException, attempt: Attempt, now_ms: int, hide: Hide | None) -> Failure:
        number, began_ms = attempt.number, _began_ms(attempt, now_ms)
        if self._shared is None:
            return failures.describe(error, number, now_ms, self._worker, hide, began_ms)
        record = self._shared.get(id(error))
        if record is None:
            record = self._shared[id(error)] = failures.describe(error, number, now_ms, self._worker, hide)
        return replace(record, attempt=number, at=now_ms, began=began_ms)

    def unreadable(self, report: TurnReport, attempt: Attempt, error: PayloadError, now_ms: int) -> None:
        """Make a job dead whose payload cannot be read, with one line in the log: no retry could change it."""
        message = failures.message(error)
        if (hide := attempt.hider()) is not None:
            message = failures.shorten(hide(message), failures.MESSAGE_BYTES)
        log.error("✗ %s cannot be read and is dead: %s", attempt.label, one_line(message))
        record = Failure(attempt.number, now_ms, "PayloadError", message, worker=self._worker)
        if self._sealing is not None:
            record = pack_refusal(self._sealing, record, error.code, attempt.consumer.queue, attempt.id)
        state = attempt.history.with_error(to_json(record), starts=attempt.number)
        self.dead(report, attempt, state, f"{error.code}: its payload cannot be read", now_ms, error)

    def dead(
        self,
        report: TurnReport,
        attempt: Attempt,
        state: AttemptHistory,
        reason: str,
        now_ms: int,
        error: BaseException | None = None,
    ) -> None:
        """Make a job a dead letter. Its envelope, and so its payload, stays as it is."""
        _count(attempt, "failed")
        last = read_failure(state.errors[-1]) if state.errors else None
        record = to_json(_with_live(Outcome("dead", failure=last, reason=reason, at=now_ms), state))
        envelope = attempt.envelope
        if told := self._told(attempt, "dead", now_ms, last):
            _add_spawned(report, attempt.id, told)
        report.others.append(
            Settlement("X", attempt.id, now_ms, record, state.encode(), envelope.attributes, envelope.own_id)
        )
        seconds = max(0.0, attempt.ended - attempt.started)
        if envelope.attributes:
            report.frees += 1
            report.seconds += seconds
        if len(report.recent) < RECENT:
            report.recent.append(
                write_finished(attempt.id, attempt.handler.name, "dead", now_ms, round(seconds * 1000))
            )
        if JobDead in self._app.listeners:
            self._app.emit(
                JobDead(attempt.public_id, attempt.handler.name, attempt.consumer.queue, attempt.number, reason, error)
            )

    def poison(self, report: TurnReport, attempt: Attempt, now_ms: int) -> None:
        """Make a job dead whose worker crashed each time it ran."""
        state = attempt.history
        message = f"its worker crashed {state.crashes} times while it ran"
        crash = state.failures_list()[-1] if state.errors else None
        if crash is not None and crash.type in {"crashed", "ProcessCrashed"}:
            message += (
                f"; the last time, at {instant(crash.at):%Y-%m-%d %H:%M:%S} UTC on {crash.worker}: {crash.message}"
            )
        record = to_json(Failure(state.starts, now_ms, "crashed", message, worker=self._worker))
        state = state.with_error(record)
        log.error("✗ %s is poison: %s", attempt.label, one_line(message))
        self.dead(report, attempt, state, "crashed", now_ms)

    def crashed(self, report: TurnReport, attempt: Attempt, now_ms: int, error: BaseException) -> None:
        """Settle a job that crashed its process: count the crash, and run the job again alone, or make it dead."""
        before = attempt.history
        record = to_json(self._describe(error, attempt, now_ms, attempt.hider()))
        state = before.with_error(record, starts=attempt.number, crashes=before.crashes + 1)
        log.error("✗ %s crashed its process: %s", attempt.label, error)
        if state.crashes >= attempt.handler.task.settings.retry.max_crashes:
            attempt.state = state
            self.poison(report, attempt, now_ms)
        else:
            _count(attempt, "failed")
            _count(attempt, "retried")
            report.others.append(Settlement("F", attempt.id, state=state.encode()))

    def leave_to_others(self, attempt: Attempt, error: ConveyorError | None) -> None:
        """
        Return a job that cannot run here, for a worker that can run it: after 2 s at first, later for as long as it is old.

        No attempt is used. *error* says why; None: the task is not known. What no worker knew for a day is dead; what
        waits for a process, a store, a label or a build is not.
        """
        consumer = attempt.consumer
        now, unlimited = consumer.now_ms, isinstance(error, ProcessUnavailable | StoreUnavailable | RequirementUnmet)
        pause = retry.put_off_ms(now - (made_at_ms(attempt.id) or attempt.envelope.due_ms or now))
        if pause is None and not unlimited:
            self._give_up(consumer.report, attempt, error, now)
            return
        pause = min(pause or 600_000, LONGEST_REQUIREMENT_MS if isinstance(error, RequirementUnmet) else 600_000)
        if isinstance(error, ProcessUnavailable | RequirementUnmet):
            self._explain(attempt, error)
        else:
            what = f"Job {attempt.public_id}" if attempt.handler.name else "It"
            log.warning(
                "%s %s stays in '%s' and is tried again in %s; no attempt was used.",
                clean(str(error) if error else _unknown(attempt)), clean(what), consumer.queue, span(pause / 1000),
            )  # fmt: skip
        consumer.give_way(pause / 1000 + 1)
        state = attempt.state.encode() if attempt.state else b""
        # A worker that can run it, and knows of it by these needs, takes it before that.
        needs = error.needs.encode() if isinstance(error, RequirementUnmet) else b""
        consumer.report.others.append(Settlement("R", attempt.id, pause, needs, state))

    def _explain(self, attempt: Attempt, error: ConveyorError) -> None:
        """Log why jobs of a task wait: once if nothing here will change that, else once a minute."""
        text = clean_lines(
            f"{error.code} {str(error).rstrip()}\n"
            f"Jobs of {attempt.handler.name} wait for a worker that can run them, and use no attempt."
        )
        if attempt.started != 0.0:
            log_repeated_error("%s", text)
        elif text not in self._explained:
            self._explained.add(text)
            log.warning("%s", text)

    def _give_up(self, report: TurnReport, attempt: Attempt, error: ConveyorError | None, now_ms: int) -> None:
        name = attempt.handler.name
        unknown = (
            f"no worker that has the task {name!r} came within a day"
            if name
            else "a message, not a job: no consumer took it within a day"
        )
        message = unknown if error is None else f"{error} No worker that can run it came within a day."
        kind = UnknownTask.__name__ if error is None else "PayloadError"
        record = to_json(Failure(attempt.number, now_ms, kind, message, worker=self._worker))
        self.dead(report, attempt, attempt.history.with_error(record), message, now_ms)

    def cancelled(self, report: TurnReport, attempt: Attempt, now_ms: int) -> None:
        """Settle a job that was cancelled while it was leased here, or expired before it started."""
        reason = "expired" if attempt.stop_reason == "expired" else NOT_STARTED if attempt.started == 0.0 else ""
        if not reason:
            reason = f"{RAN}{span(max(0.0, attempt.ended - attempt.started))} on {self._worker}"
            log.info("✗ %s attempt %d cancelled: %s", attempt.label, attempt.number, reason)
        _count(attempt, "expired" if reason == "expired" else "cancelled")
        record = to_json(_with_live(Outcome("cancelled", reason=reason, at=now_ms), attempt.history))
        envelope = attempt.envelope
        report.others.append(
            Settlement("C", attempt.id, CANCELLED_KEPT_MS, record, b"", envelope.attributes, envelope.own_id)
        )
        if JobCancelledEvent in self._app.listeners:
            self._app.emit(
                JobCancelledEvent(attempt.public_id, attempt.handler.name, attempt.consumer.queue, attempt.number)
            )

    def handed_back(self, report: TurnReport, attempt: Attempt, *, started: bool) -> None:
        """Return a job to the front of its queue. It costs no attempt."""
        if started or attempt.state is not None:
            history = retry.handed_back(attempt.history, attempt.number, started=started)
            state = (self._with_event(history, attempt, "returned") if started else history).encode()
        else:
            state = b""
        report.others.append(Settlement("F", attempt.id, state=state))

    def put_off(self, report: TurnReport, attempt: Attempt, ms: int, history: AttemptHistory) -> None:
        """Schedule a job for so many ms from now, with that history; a burst waits for it."""
        report.others.append(Settlement("R", attempt.id, ms, state=history.encode()))
        attempt.consumer.note_retry(attempt, ms)

    def _charge(self, report: TurnReport, attempt: Attempt) -> None:
        """Report what the attempt cost beyond what it paid when it started."""
        for limit in attempt.envelope.limits:
            if (charge := charge_of(limit, attempt.charges)) is not None:
                cost = b"%d" % charge.cost
                report.others.append(Settlement("G", attempt.id, charge.beyond, charge.limit.encode(), cost))

    def _rate_limited(self, report: TurnReport, attempt: Attempt, ms: int) -> None:
        """Return a job that a service refused for now, and hold its limit until then; where it has none, its task."""
        envelope = attempt.envelope
        history = self._with_event(retry.snoozed(attempt.history, attempt.number), attempt, "snoozed", "rate-limited")
        limit = held_limit(envelope.limits, envelope.group, attempt.handler.limits) or f";{attempt.handler.name}"
        log.info("✗ %s rate-limited for %s: %s waits", attempt.label, span(ms / 1000), clean(limit.removeprefix(";")))
        report.others.append(
            Settlement("L", attempt.id, ms, limit.encode(), history.encode(), envelope.attributes, envelope.own_id)
        )
        attempt.consumer.note_retry(attempt, ms)

    def _snoozed(self, report: TurnReport, attempt: Attempt, ms: int) -> None:
        history = retry.snoozed(attempt.history, attempt.number)
        self.put_off(report, attempt, ms, self._with_event(history, attempt, "snoozed"))

    def _with_event(self, history: AttemptHistory, attempt: Attempt, state: str, reason: str = "") -> AttemptHistory:
        """Return *history* with what became of an attempt, where no error tells of it."""
        return history.with_event(
            PastEvent(state, attempt.consumer.now_ms, self._worker, reason, attempt=attempt.number)
        )


def _count(attempt: Attempt, end: str) -> None:
    """Count an attempt that has not succeeded, for the next turn."""
    ends = attempt.handler.ends
    ends[end] = ends.get(end, 0) + 1
    attempt.consumer.changed_handlers.add(attempt.handler)


def _began_ms(attempt: Attempt, now_ms: int) -> int:
    """Return when an attempt that has ended began, in ms by the server's clock; 0: it did not."""
    return now_ms - round((attempt.ended - attempt.started) * 1000) if attempt.started else 0


def _with_live(outcome: Outcome, state: AttemptHistory) -> Outcome:
    """Return the end of a job with the progress and the notes of its *state*."""
    if state.progress:
        outcome.progress = Raw(state.progress)
    if state.notes:
        outcome.notes = Raw(state.notes)
    return outcome


def _unknown(attempt: Attempt) -> str:
    """Return why a worker cannot run an entry whose task it does not know: a job of another worker, or a message."""
    if attempt.handler.name:
        return f"E05 It needs task '{attempt.handler.name}', which this worker does not have."
    return (
        f"E05 Entry {attempt.public_id} in '{attempt.consumer.queue}' is a message, not a job: it was pushed with push; jobs are "
        "enqueued with enqueue. A consumer of messages takes it; push messages to a queue of their own."
    )


def _error_of(attempt: Attempt, error: BaseException | None) -> BaseException | None:
    """Return the error that an attempt is settled with. A stop by timeout is one, whatever the job returned."""
    if attempt.stop_reason == "timeout":
        limit = attempt.timeout
        return TimeoutError(
            f"the attempt ran longer than its time limit of {limit:g} s" if limit else "time limit passed"
        )
    if isinstance(error, asyncio.CancelledError):
        return RuntimeError("the job cancelled itself (CancelledError left the task without a cancel request)")
    return error
