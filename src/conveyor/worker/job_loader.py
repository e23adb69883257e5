"""
Loads jobs that are more than a task name and JSON.

They have marks or options, are sealed, have another version, are damaged, or need a task that this worker does not have.
A job that cannot run here waits for a newer worker, or becomes a dead letter with its bytes kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError, PayloadError
from conveyor.jobs.changes import open_arguments
from conveyor.payload.codec import UnreadablePayload
from conveyor.payload.pipeline import PLAIN
from conveyor.payload.records import Envelope, EnvelopeOptions, read_leniently
from conveyor.payload.versions import PayloadTooNew
from conveyor.payload.wrapped import MAGIC
from conveyor.store.operations import TurnReport
from conveyor.worker.attempt import Attempt, AttemptOwner, Handler
from conveyor.worker.crash_attribution import EXECUTING, LOOP_CELL, RunningTable, id_checksum

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.worker.settlement import SettlementWriter

log = logging.getLogger("conveyor.worker")


def load_attributes(
    consumer: AttemptOwner, plain: Mapping[bytes, Handler], id_: str, data: bytes, first: int
) -> Attempt | None:
    """
    Return an attempt at a job that has attributes and no marks; None: it needs `JobLoader.load`.

    *plain* is what `plain_handlers` returns, *first* the end of the first line of *data*.
    """
    second = data.find(b"\n", first + 1)
    handler = plain.get(data[first : second + 2])
    if handler is None:
        return None
    try:
        attributes = data[:first].decode()
    except UnicodeDecodeError:
        return None
    body = data[second + 1 :]
    return Attempt(consumer, handler, id_, body, Envelope(handler.name, body, attributes=attributes))


class JobLoader:
    """Makes attempts of such jobs, and opens their bodies. One for each worker."""

    def __init__(
        self,
        app: AppCore,
        settlement_writer: SettlementWriter,
        running_table: RunningTable | None,
        unmet: Callable[[EnvelopeOptions], ConveyorError | None],
    ) -> None:
        """
        Args:
            app: the app whose tasks run.
            settlement_writer: that of the worker.
            running_table: where a supervisor reads which job's body is being opened; None without one.
            unmet: returns why a job with these options needs another worker; None: it does not.
        """
        self._unmet = unmet
        self._sealing = app.sealing
        self._task_of_list = {name: listed.task for name, listed in app.plain_lists.items()}
        self._settlement_writer = settlement_writer
        self._running_table = running_table
        self.fetching: set[asyncio.Task[None]] = set()
        """One task for each body that is on its way from the blob store."""

    def plain_handlers(self, queue: str, handlers: Mapping[str, Handler], *, foreign: bool) -> dict[bytes, Handler]:
        """
        Return handlers by the first bytes of an envelope that needs no `load`: the task's name and a brace.

        Left out are all where all jobs are sealed, and tasks that have versions, are acknowledged early or cannot run here.
        """
        runnable = {name: one for name, one in handlers.items() if one.kind != "unknown"}
        names = {name for name, one in runnable.items() if one.task.settings.version == 1 and not one.early}
        if self._sealing is not None and self._sealing.sealer is not None:
            names &= {self._task_of_list.get(queue)} if foreign else set()
        return {b"\n%b\n{" % name.encode(): handlers[name] for name in names}

    def load(
        self,
        consumer: AttemptOwner,
        handlers: Mapping[str, Handler],
        id_: str,
        data: bytes,
    ) -> Attempt:
        """Return an attempt at a job. One that cannot run here has a handler of kind "unknown", for `set_aside`."""
        envelope, _, damage = read_leniently(data, None)
        handler = handlers.get(envelope.task)
        load_error: ConveyorError | None = None
        if damage:
            load_error = PayloadError(f"E15 The envelope cannot be read: {damage}.", code="E15")
        elif handler is not None and handler.kind == "unknown":
            load_error = handler.load_error
        elif (missing := self._unmet(envelope.extra)) is not None:
            load_error = missing
        elif handler is not None and envelope.extra.version > handler.task.settings.version:
            load_error = PayloadTooNew(
                f"The payload of {envelope.task}()", envelope.extra.version, handler.task.settings.version
            )
        if handler is None or load_error is not None:
            handler = Handler.unknown(envelope.task, load_error)
        sealed = handler.kind != "unknown" and self._is_sealed(consumer, handler, envelope.body, envelope.extra.version)
        attempt = Attempt(consumer, handler, id_, envelope.body, envelope, sealed=sealed)
        if handler.early:
            self._read_early(attempt)
        return attempt

    def _read_early(self, attempt: Attempt) -> None:
        """Read a job that is acknowledged before it starts: one that cannot be read must be kept, so not acknowledged."""
        handler = attempt.handler
        try:
            if attempt.sealed:
                _unseal(attempt, self.open(attempt))
            handler.decode(attempt.body)
        except ConveyorError as error:
            attempt.handler = Handler.unknown(handler.name, error)

    def _is_sealed(self, consumer: AttemptOwner, handler: Handler, body: bytes, version: int) -> bool:
        if version != handler.task.settings.version:
            return True
        if consumer.keys.foreign is not None:
            return handler.name != self._task_of_list.get(consumer.queue)
        return body[:1] == MAGIC or (self._sealing is not None and self._sealing.sealer is not None)

    def open(self, attempt: Attempt) -> bytes:
        """Return the arguments' JSON in this worker's version of the task; raises PayloadError, BlobUnavailable."""
        handler, consumer = attempt.handler, attempt.consumer
        bare = consumer.keys.foreign is not None and handler.name == self._task_of_list.get(consumer.queue)
        body, blob = open_arguments(
            handler.task, attempt.envelope, consumer.queue, attempt.id, None if bare else self._sealing or PLAIN
        )
        if blob is not None:
            consumer.blobs[attempt.id] = blob
        return body

    def begin(self, attempt: Attempt, submit: Callable[[Attempt], None], fail: Callable[..., None]) -> None:
        """Open *attempt*, on a thread when its body lies in the blob store, and then *submit* it or *fail* it."""
        if PLAIN.is_stored_elsewhere(attempt.body):
            fetching = asyncio.get_running_loop().create_task(self._fetch(attempt, submit, fail))
            self.fetching.add(fetching)
            fetching.add_done_callback(self.fetching.discard)
            return
        if self._running_table is not None:
            self._running_table.cells[LOOP_CELL] = id_checksum(
                attempt.id
            )  # `Executor.submit` clears it, once for all attempts
        try:
            body = self.open(attempt)
        except Exception as error:
            self._failed(attempt, error, fail)
        else:
            self._opened(attempt, body, submit)

    async def _fetch(self, attempt: Attempt, submit: Callable[[Attempt], None], fail: Callable[..., None]) -> None:
        cell = 0 if self._running_table is None else self._running_table.take_cell()
        if self._running_table is not None:
            self._running_table.cells[cell] = id_checksum(attempt.id) | EXECUTING
        try:
            body = await asyncio.to_thread(self.open, attempt)
        except Exception as error:
            self._failed(attempt, error, fail)
        else:
            self._opened(attempt, body, submit)
        finally:
            if self._running_table is not None:
                self._running_table.release_cell(cell)

    def _opened(self, attempt: Attempt, body: bytes, submit: Callable[[Attempt], None]) -> None:
        if attempt.ended != 0.0:  # cancelled or handed back meanwhile
            attempt.consumer.on_abandoned()
            return
        _unseal(attempt, body)
        submit(attempt)

    def _failed(self, attempt: Attempt, error: Exception, fail: Callable[..., None]) -> None:
        attempt.consumer.on_abandoned()
        if attempt.ended == 0.0:
            if isinstance(error, PayloadError):
                error = UnreadablePayload(f"The payload of {attempt.handler.name}(): {error}", code=error.code)
            attempt.started = perf_counter()
            fail(attempt, None, error)

    def set_aside(self, attempt: Attempt) -> None:
        """Put off a job that cannot run here; one that no worker can read is a dead letter at once."""
        consumer, error = attempt.consumer, attempt.handler.load_error
        attempt.ended = monotonic()
        if isinstance(error, PayloadError) and not isinstance(error, PayloadTooNew):
            self._settlement_writer.unreadable(consumer.report, attempt, error, consumer.now_ms)
        else:
            self._settlement_writer.leave_to_others(attempt, error)

    def delete_bodies(self, consumer: AttemptOwner, report: TurnReport, lost: Iterable[str]) -> None:
        """Delete the large bodies of jobs whose end Redis has confirmed. Those of other jobs are still needed."""
        refused = set(lost)
        ended = {*report.done, *(one.id for one in report.others if one.kind in {"D", "C"})} - refused
        for id_ in ended | {one.id for one in report.others if not one.stays} | refused:
            name = consumer.blobs.pop(id_, None)
            if name is not None and id_ in ended and self._sealing is not None:
                asyncio.get_running_loop().run_in_executor(None, self._sealing.delete, name)


def _unseal(attempt: Attempt, body: bytes) -> None:
    attempt.body, attempt.sealed = body, False
