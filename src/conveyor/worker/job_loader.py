"""
Jobs that are more than a name and JSON: with marks or options, wrapped, of another version, of a task nobody here
knows, or damaged. What can run is made to; what cannot waits for a newer worker or becomes a dead letter, its bytes kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError, PayloadError, StoreUnavailable, UnknownTask
from conveyor.ids import clean, made_at_ms
from conveyor.messaging.retry import put_off_ms
from conveyor.payload.codec import UnreadablePayload
from conveyor.payload.pipeline import PLAIN
from conveyor.payload.records import AttemptHistory, Failure, read_leniently, to_json
from conveyor.payload.versions import OldPayload, PayloadTooNew, sealed_name, upcast_body
from conveyor.payload.wrapped import MAGIC
from conveyor.store.operations import Settlement, TurnReport
from conveyor.units import span
from conveyor.worker.attempt import Attempt, Handler, SealedAttempt
from conveyor.worker.crash_attribution import EXECUTING, LOOP, RunningTable, named

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.worker.settlement import SettlementWriter

log = logging.getLogger("conveyor.worker")


class JobLoader:
    """One worker's way with them."""

    def __init__(self, app: AppCore, settling: SettlementWriter, worker: str, seats: RunningTable | None) -> None:
        """Take the app, who settles, the name recorded with errors, and where a supervisor sees what is opened."""
        self._sealing = app.sealing
        self._fed = {name: listed.task for name, listed in app.plain_lists.items()}
        self._settling = settling
        self._worker = worker
        self._seats = seats
        self._fetching: set[asyncio.Task[None]] = set()

    def fast(self, queue: str, handlers: Mapping[str, Handler], *, foreign: bool) -> dict[bytes, Handler]:
        """
        Return the handlers by what an envelope of theirs begins with when it needs nothing: the name and a brace.

        None where all are sealed, and none of tasks that have versions or are acknowledged early: those come here.
        """
        names = {name for name, one in handlers.items() if one.task.settings.version == 1 and not one.early}
        if self._sealing is not None and self._sealing.sealer is not None:
            names &= {self._fed.get(queue)} if foreign else set()
        return {b"\n%b\n{" % name.encode(): handlers[name] for name in names}

    def arrive(self, consumer: Any, handlers: Mapping[str, Handler], id_: str, data: bytes) -> Attempt:
        """Make an attempt of a job; one that cannot run here has a handler of kind unknown, for `set_aside`."""
        envelope, _, damage = read_leniently(data, None)
        handler = handlers.get(envelope.task)
        load_error: ConveyorError | None = None
        if damage:
            load_error = PayloadError(f"E15 The envelope cannot be read: {damage}.", code="E15")
        elif handler is not None and envelope.extra.version > handler.task.settings.version:
            load_error = PayloadTooNew(
                f"The payload of {envelope.task}()", envelope.extra.version, handler.task.settings.version
            )
        if handler is None or load_error is not None:
            handler = Handler.unknown(envelope.task, load_error)
        closed = handler.kind != "unknown" and self._is_closed(consumer, handler, envelope.body, envelope.extra.version)
        attempt = (SealedAttempt if closed else Attempt)(consumer, handler, id_, envelope.body)
        attempt.envelope = envelope
        if handler.early:
            self._read_early(attempt)
        return attempt

    def _read_early(self, attempt: Attempt) -> None:
        """Read a job that is acknowledged before it starts: what cannot be read must be known, and kept, before that."""
        handler = attempt.handler
        try:
            if attempt.closed:
                _unclose(attempt, self.open(attempt))
            handler.decode(attempt.body)
        except ConveyorError as error:
            attempt.handler = Handler.unknown(handler.name, error)

    def _is_closed(self, consumer: Any, handler: Handler, body: bytes, version: int) -> bool:
        if version != handler.task.settings.version:
            return True
        if consumer.keys.foreign is not None:
            return handler.name != self._fed.get(consumer.queue)
        return body[:1] == MAGIC or (self._sealing is not None and self._sealing.sealer is not None)

    def open(self, attempt: Attempt) -> bytes:
        """Return the arguments' JSON as this worker's version of the task has them; raises PayloadError, BlobUnavailable."""
        envelope, handler, consumer = attempt.envelope, attempt.handler, attempt.consumer
        body, task, queue = envelope.body, handler.task, consumer.queue
        sealing = self._sealing or PLAIN
        if consumer.keys.foreign is None or handler.name != self._fed.get(queue):
            name = sealed_name(handler.name, envelope.extra.version)
            reference = sealing.reference(body, queue=queue, task=name, id=attempt.id)
            if reference is not None:
                consumer.blobs[attempt.id] = reference.name
            limit = task.signature.max_payload
            body = sealing.unwrap(body, queue=queue, task=name, id=attempt.id, limit=limit)
        version, current = envelope.extra.version, task.settings.version
        if version < current and task.settings.upcast is not None:
            signature = task.signature
            old = OldPayload(f"The payload of {handler.name}()", signature.max_payload, signature.formats, call=True)
            body = upcast_body(body, version, current, task.settings.upcast, old)
        return body

    def begin(self, attempt: Attempt, place: Callable[[Attempt], None], fail: Callable[..., None]) -> None:
        """Open *attempt*, on a thread when its body lies in the store, and then *place* it or *fail* it."""
        if PLAIN.is_stored_elsewhere(attempt.body):
            fetching = asyncio.get_running_loop().create_task(self._fetch(attempt, place, fail))
            self._fetching.add(fetching)
            fetching.add_done_callback(self._fetching.discard)
            return
        if self._seats is not None:
            self._seats.cells[LOOP] = named(attempt.id)  # who submits them empties it, once for all
        try:
            body = self.open(attempt)
        except Exception as error:
            self._failed(attempt, error, fail)
        else:
            self._opened(attempt, body, place)

    @property
    def fetching(self) -> int:
        """How many bodies are on their way from the store."""
        return len(self._fetching)

    async def _fetch(self, attempt: Attempt, place: Callable[[Attempt], None], fail: Callable[..., None]) -> None:
        seat = 0 if self._seats is None else self._seats.take()
        if self._seats is not None:
            self._seats.cells[seat] = named(attempt.id) | EXECUTING
        try:
            body = await asyncio.to_thread(self.open, attempt)
        except Exception as error:
            self._failed(attempt, error, fail)
        else:
            self._opened(attempt, body, place)
        finally:
            if self._seats is not None:
                self._seats.leave(seat)

    def _opened(self, attempt: Attempt, body: bytes, place: Callable[[Attempt], None]) -> None:
        if attempt.ended != 0.0:  # cancelled or handed back meanwhile
            attempt.consumer.left()
            return
        _unclose(attempt, body)
        place(attempt)

    def _failed(self, attempt: Attempt, error: Exception, fail: Callable[..., None]) -> None:
        attempt.consumer.left()
        if attempt.ended == 0.0:
            if isinstance(error, PayloadError):
                error = UnreadablePayload(f"The payload of {attempt.handler.name}(): {error}", code=error.code)
            attempt.started = perf_counter()
            fail(attempt, None, error)

    def set_aside(self, consumer: Any, attempt: Attempt) -> None:
        """
        Put off what a newer worker may run: 2 s at first, as long as it is old later, dead after a day; no attempt is used.

        What no worker can read is a dead letter at once.
        """
        report, now, error = consumer.report, consumer.now_ms, attempt.handler.load_error
        attempt.ended = monotonic()
        if isinstance(error, PayloadError) and not isinstance(error, PayloadTooNew):
            self._settling.unreadable(report, attempt, error, now)
            return
        age = now - (made_at_ms(attempt.id) or attempt.envelope.due_ms or now)
        pause = put_off_ms(age)
        if pause is None and not isinstance(error, StoreUnavailable):
            self._give_up(report, attempt, now)
            return
        pause = pause or 600_000
        why = str(error) if error else f"E05 It needs task '{attempt.handler.name}', which this worker does not have."
        log.warning(
            "%s Job %s stays in '%s' and is tried again in %s; no attempt was used.",
            clean(why), clean(attempt.public_id), consumer.queue, span(pause / 1000),
        )  # fmt: skip
        consumer.alarm.give_way(pause / 1000 + 1)
        state = attempt.state.encode() if attempt.state else b""
        report.others.append(Settlement("R", attempt.id, pause, state=state))

    def _give_up(self, report: TurnReport, attempt: Attempt, now: int) -> None:
        name, error = attempt.handler.name, attempt.handler.load_error
        message = f"no worker knew the task {name!r} for a day" if error is None else f"{error} None came for a day."
        kind = UnknownTask.__name__ if error is None else "PayloadError"
        record = to_json(Failure(attempt.number, now, kind, message, worker=self._worker))
        old = attempt.history
        state = AttemptHistory(old.starts, old.failures, old.crashes, [*old.errors, record])
        self._settling.bury(report, attempt, state, message, now)

    def release(self, consumer: Any, report: TurnReport, lost: Iterable[str]) -> None:
        """Remove the large bodies of jobs whose end Redis has confirmed; those of others are still needed."""
        refused = set(lost)
        ended = {*report.done, *(one.id for one in report.others if one.kind in {"D", "C"})} - refused
        for id_ in ended | {one.id for one in report.others if one.kind != "M"} | refused:
            name = consumer.blobs.pop(id_, None)
            if name is not None and id_ in ended and self._sealing is not None:
                asyncio.get_running_loop().run_in_executor(None, self._sealing.delete, name)


def _unclose(attempt: Attempt, body: bytes) -> None:
    assert isinstance(attempt, SealedAttempt)
    attempt.body, attempt.closed = body, False
