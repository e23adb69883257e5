"""Decides purely how a leased message ends: the settlement that the next turn reports."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from conveyor.errors import ConveyorError, RateLimited, UnknownTask
from conveyor.ids import made_at_ms
from conveyor.messaging.declared_limits import QueueLimits, held_limit
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.retry import (
    GiveUp,
    Retry,
    RetryAfter,
    after_failure,
    handed_back,
    put_off_ms,
    wait_of,
    with_presumed_crash,
)
from conveyor.payload import failures
from conveyor.payload.records import NOT_STARTED, AttemptHistory, Failure, Outcome, to_json
from conveyor.payload.redaction import Hide
from conveyor.store.operations import Settlement

CANCELLED_KEPT_MS = 600_000
"""ms for which the record of a cancelled job or message is kept, as after any cancel."""


class SettlementPolicy(msgspec.Struct, frozen=True):
    """Decides what becomes of a leased message. `worker` is recorded in every failure, dated by `now_ms`, the server's clock."""

    retry: Retry
    worker: str
    now_ms: Callable[[], int]
    pack: Callable[[str, Failure], Failure] | None = None
    """Seals the text of an error, given the id; None: not sealed."""
    pack_refusal: Callable[[str, Failure, str], Failure] | None = None
    """Seals the text of an error with that code, for a body that cannot be read; None: not sealed."""
    limits: QueueLimits | None = None
    """Those of the queue."""
    hider: Callable[[LeasedMessage], Hide | None] | None = None
    """Returns what takes redacted values of a message out of texts about it; None: nothing is redacted."""

    def hide_of(self, leased: LeasedMessage) -> Hide | None:
        """Return what takes redacted values of a message out of texts about it."""
        return None if self.hider is None else self.hider(leased)

    def without_values(self, leased: LeasedMessage, text: str) -> str:
        """Return a text about a message without its redacted values."""
        hide = self.hide_of(leased)
        return text if hide is None else hide(text)

    def failed(self, leased: LeasedMessage, error: BaseException, *, cancelled: bool = False) -> Settlement:
        """Settle a message whose body raised: retry after the policy's pause, or give up."""
        if cancelled:
            return self.cancelled(leased)
        if isinstance(error, RateLimited) and (after_ms := wait_of(error)) is not None:
            return self._rate_limited(leased, after_ms)
        now, extra = self.now_ms(), leased.envelope.extra
        record = failures.describe(error, leased.attempt, now, self.worker, self.hide_of(leased))
        if self.pack is not None:
            record = self.pack(leased.id, record)
        follows = after_failure(
            self.retry, leased.history, leased.attempt, error, to_json(record),
            attempts=extra.attempts, now_ms=now, id=leased.id, due_ms=leased.envelope.due_ms,
        )  # fmt: skip
        if isinstance(follows, RetryAfter):
            return _settlement(leased, "R", ms=follows.ms, state=follows.history.encode())
        return self._buried(leased, follows, record)

    def _rate_limited(self, leased: LeasedMessage, ms: int) -> Settlement:
        """Return a message that a service refused for now, and hold its limit until then; one without a limit waits alone."""
        history = handed_back(leased.history, leased.attempt, started=True).encode()
        declared = {} if self.limits is None else self.limits.all()
        limit = held_limit(leased.envelope.limits, leased.envelope.group, declared)
        if limit is None:
            return _settlement(leased, "R", ms=ms, state=history)
        return _settlement(leased, "L", ms=ms, record=limit.encode(), state=history)

    def nacked(self, leased: LeasedMessage, delay_ms: int | None, *, cancelled: bool = False) -> Settlement:
        """Settle a refused message: retry after *delay_ms* (None: the policy's pause), or give up."""
        if cancelled:
            return self.cancelled(leased)
        now = self.now_ms()
        record = Failure(leased.attempt, now, "nack", "refused by nack()", worker=self.worker)
        before, attempts = leased.history, leased.envelope.extra.attempts
        state = before.with_error(to_json(record), starts=leased.attempt, failures=before.failures + 1)
        budget = self.retry.attempts if attempts is None else attempts
        if state.failures >= budget:
            return self._buried(leased, GiveUp(state, f"all {budget} attempts failed"), record)
        pause = self.retry.pause_ms(state.failures) if delay_ms is None else delay_ms
        if self.retry.is_over(now + pause, leased.id, leased.envelope.due_ms, state):
            return self._buried(leased, GiveUp(state, self.retry.over_text), record)
        return _settlement(leased, "R", ms=pause, state=state.encode())

    def dead(self, leased: LeasedMessage, reason: str) -> Settlement:
        """Make it a dead letter for *reason*; its bytes are kept."""
        text = failures.shorten(self.without_values(leased, reason), failures.MESSAGE_BYTES)
        record = Failure(leased.attempt, self.now_ms(), "dead", text, worker=self.worker)
        if self.pack is not None:
            text, record = "given up by its consumer", self.pack(leased.id, record)
        return self._given_up(leased, text, record)

    def _given_up(self, leased: LeasedMessage, text: str, record: Failure) -> Settlement:
        state = leased.history.with_error(to_json(record), starts=leased.attempt)
        return self._buried(leased, GiveUp(state, text), record)

    def undecodable(self, leased: LeasedMessage, error: ConveyorError, kind: str = "PayloadError") -> Settlement:
        """Make it a dead letter because its body cannot be decoded: repeating would not help."""
        text = failures.shorten(self.without_values(leased, failures.message(error)), failures.MESSAGE_BYTES)
        record = Failure(leased.attempt, self.now_ms(), kind, text, worker=self.worker)
        if self.pack_refusal is not None:
            record = self.pack_refusal(leased.id, record, error.code)
        return self._given_up(leased, f"{error.code}: its body cannot be read" if record.packed else text, record)

    def put_off(self, leased: LeasedMessage, error: ConveyorError) -> Settlement:
        """Put off a message that another program can take without using an attempt; after a day it is a dead letter."""
        now = self.now_ms()
        pause = put_off_ms(now - (made_at_ms(leased.id) or leased.envelope.due_ms or now))
        if pause is None:
            return self.undecodable(leased, error, "UnknownTask" if isinstance(error, UnknownTask) else "PayloadError")
        return _settlement(
            leased, "R", ms=pause, state=leased.history.encode() if leased.history != AttemptHistory() else b""
        )

    def poison(self, leased: LeasedMessage) -> Settlement | None:
        """Make it a dead letter when it crashed its consumers too often; else return None."""
        crashes = leased.history.crashes
        # The first crash of a consumer is charged to all that it held, so it alone gives up nothing.
        if crashes < max(2, self.retry.max_crashes):
            return None
        record = Failure(
            leased.history.starts, self.now_ms(), "crashed", f"its consumer crashed {crashes} times", worker=self.worker
        )
        return self._buried(leased, GiveUp(leased.history.with_error(to_json(record)), "crashed"), record)

    def presumed_crash(self, leased: LeasedMessage) -> Settlement | None:
        """Count one more crash before the message starts; None for one that came back from no crash."""
        if leased.history.crashes == 0:
            return None
        return _settlement(leased, "M", state=with_presumed_crash(leased.history).encode())

    def returned(self, leased: LeasedMessage) -> bytes:
        """Return the history of a message that is given back: its start counts, its budget is unchanged."""
        return handed_back(leased.history, leased.attempt, started=True).encode() if leased.started else b""

    def released(self, leased: LeasedMessage) -> Settlement:
        """Settle a message that goes back to the front as if it had not been taken."""
        # The possible crash of a suspect, which was recorded before it began, is taken back.
        recorded = leased.begun and self.presumed_crash(leased) is not None
        return Settlement("F", leased.id, state=leased.history.encode() if recorded else b"")

    def cancelled(self, leased: LeasedMessage, reason: str = "") -> Settlement:
        """Settle a message that somebody cancelled, or for another *reason* that is recorded."""
        reason = reason or ("" if leased.started else NOT_STARTED)
        record = to_json(Outcome("cancelled", reason=reason, at=self.now_ms()))
        return _settlement(leased, "C", ms=CANCELLED_KEPT_MS, record=record)

    def _buried(self, leased: LeasedMessage, dead: GiveUp, last: Failure) -> Settlement:
        record = to_json(Outcome("dead", failure=last, reason=dead.reason, at=last.at))
        return _settlement(leased, "X", ms=last.at, record=record, state=dead.history.encode())


def _settlement(
    leased: LeasedMessage, kind: str, *, ms: int = 0, record: bytes = b"", state: bytes = b""
) -> Settlement:
    envelope = leased.envelope
    return Settlement(kind, leased.id, ms, record, state, attributes=envelope.attributes, own_id=envelope.own_id)
