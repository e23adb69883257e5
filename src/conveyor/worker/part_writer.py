"""Writes the partial results of running jobs: those of one queue, with one call under way."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.payload.sealed_records import pack_part
from conveyor.store import streams
from conveyor.store.operations import Settlement
from conveyor.worker.leasing.timers import BackgroundRun
from conveyor.worker.logs import log_repeated_error

if TYPE_CHECKING:
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.async_connection import AsyncConnection
    from conveyor.worker.attempt import Attempt

KEPT_MS = 600_000
"""For how long a stream is kept after the end of its job, at least: its result may be kept for longer."""
_CALL_PARTS, _CALL_BYTES, _CALL_JOBS = 1000, 1 << 20, 100
"""Parts, and bytes of them, that one call carries of a job, and jobs that share a call."""
_AHEAD = 256
"""Parts of an attempt that may be on the way before `await context.emit(…)` waits."""


class AttemptParts:
    """The parts of one attempt that Redis has not confirmed. They may come from a thread."""

    __slots__ = ("_first", "_lock", "_longest", "_pending", "attempt", "ended")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.ended = False
        self._first = 1  # the number of the first one in `_pending`
        self._pending: list[bytes] = []
        self._longest = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """The number of parts on the way."""
        return len(self._pending)

    def add(self, pack: Callable[[str], bytes]) -> bool:
        """
        Add the part that *pack* returns for an id; return False after the end.

        Where Redis is away and more wait than the stream would keep, the oldest is dropped.
        """
        with self._lock:
            if self.ended:
                return False
            data = pack(f"{self.attempt.number}-{self._first + len(self._pending)}")
            self._longest = max(self._longest, len(data))
            self._pending.append(data)
            if len(self._pending) > 2 * streams.kept_parts(self._longest):
                del self._pending[0]
                self._first += 1
            return True

    def next_record(self) -> tuple[bytes, int]:
        """Return the oldest parts as they are stored, as many as one call carries, and the number behind the last of them."""
        with self._lock:
            parts = self._pending[: max(1, min(_CALL_PARTS, _CALL_BYTES // max(self._longest, 1)))]
            return self._write(parts), self._first + len(parts)

    def confirm(self, behind: int) -> None:
        """Forget the parts before number *behind*: Redis has them."""
        with self._lock:
            del self._pending[: max(0, behind - self._first)]
            self._first = max(self._first, behind)

    def end(self) -> bytes:
        """Refuse parts from now on; return those that are left, as they are stored."""
        with self._lock:
            record = self._write(self._pending)
            self.ended = True
            self._pending = []
            return record

    def _write(self, parts: list[bytes]) -> bytes:
        return streams.write_parts(self.attempt.number, self._first, parts, self._longest)


class Emission:
    """A part on its way to Redis. A job that awaits it goes on when few of its parts are on the way."""

    __slots__ = ("_parts", "_writer")

    def __init__(self, writer: PartWriter, parts: AttemptParts) -> None:
        self._writer, self._parts = writer, parts

    def __await__(self) -> Generator[object, None, None]:
        while self._parts.count > _AHEAD:
            yield from self._writer.progress.wait().__await__()


class PartWriter(BackgroundRun):
    """The parts of a consumer's attempts, on their way to Redis. While no job emits, nothing runs and nothing is sent."""

    def __init__(
        self, keys: QueueKeys, connection: AsyncConnection, sealing: PayloadPipeline | None, identity: Callable[[], str]
    ) -> None:
        """
        Args:
            keys: those of the queue.
            connection: the consumer's: a turn that ends a job follows the parts that were sent before it.
            sealing: how parts are sealed; None: they are stored as they are.
            identity: returns that under which the consumer holds its jobs.
        """
        super().__init__()
        self._keys, self._connection, self._sealing, self._identity = keys, connection, sealing, identity
        self._loop = asyncio.get_running_loop()
        self.is_used = False
        """True from the first part on: a consumer whose jobs emit nothing does not ask at their ends."""
        self._of: dict[Attempt, AttemptParts] = {}
        self._changed: dict[AttemptParts, None] = {}
        self.progress = asyncio.Event()
        """Set for a moment whenever Redis has confirmed some parts."""

    def add(self, attempt: Attempt, data: bytes) -> Emission:
        """Write an encoded part of *attempt* soon; any thread may call it. Raises ConfigurationError (E44) after its end."""
        parts = self._of.get(attempt)
        if parts is None:
            if attempt.ended != 0.0:
                raise _after_the_end(attempt)
            parts = self._of.setdefault(attempt, AttemptParts(attempt))
            self.is_used = True
        if not parts.add(lambda part: pack_part(self._sealing, data, self._keys.queue, attempt.id, part)):
            raise _after_the_end(attempt)
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001  the C function; get_running_loop raises instead
            self._note(parts)
        else:
            self._loop.call_soon_threadsafe(self._note, parts)
        return Emission(self, parts)

    def end(self, attempt: Attempt) -> Settlement | None:
        """Return what a turn carries of an attempt that emitted, in front of its end: the parts that are not confirmed."""
        parts = self._of.pop(attempt, None)
        return None if parts is None else Settlement("E", attempt.id, streams.LIFE_MS, parts.end())

    def forget(self, attempt: Attempt) -> None:
        """Drop the parts of an attempt that lost its lease."""
        parts = self._of.pop(attempt, None)
        if parts is not None:
            parts.end()
            self._announce()

    def _note(self, parts: AttemptParts) -> None:
        self._changed[parts] = None
        self._begin()

    def _announce(self) -> None:
        self.progress.set()
        self.progress.clear()

    async def _work(self) -> None:
        while self._changed:
            await asyncio.sleep(0)  # what emits in this pass of the loop shares the call
            batch = [parts for parts in list(self._changed)[:_CALL_JOBS] if parts.count]
            records = [(parts, *parts.next_record()) for parts in batch]
            self._changed = dict.fromkeys(list(self._changed)[_CALL_JOBS:])
            if not records:
                continue
            call = streams.emit(self._keys, self._identity(), [(parts.attempt.id, data) for parts, data, _ in records])
            try:
                held = await self._connection.run(call, retry_for=None)
            except ConveyorError as error:
                log_repeated_error("queue %s: partial results were refused: %s", self._keys.queue, error)
                self._changed.update(dict.fromkeys(batch))
                await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311
                continue
            for (parts, _, behind), is_held in zip(records, held, strict=True):
                if is_held:
                    parts.confirm(behind)
                    if parts.count:
                        self._changed[parts] = None
                else:
                    self.forget(parts.attempt)
            self._announce()


def _after_the_end(attempt: Attempt) -> ConfigurationError:
    return ConfigurationError(
        f"Job {attempt.public_id} emitted a value after its own end: one of its threads is still running. Nothing was stored.",
        code="E44",
    )
