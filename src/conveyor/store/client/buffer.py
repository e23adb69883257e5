"""The producer's buffer: keeps pushes while Redis is away."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store.client.spool import (
    MemorySpool,
    QueueName,
    SpoolBatch,
    SpoolDirectory,
    SpooledPush,
    prepare_directory,
)
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.units import Duration, milliseconds

_log = logging.getLogger("conveyor.buffer")
LOOK_EVERY = 3.0
"""Seconds between two looks for what dead processes left in the directory."""


class Buffer:
    """
    Keeps what is pushed while Redis is away and delivers it in order when it is back: ``Conveyor(buffer=Buffer())``.

    It is in memory, or with a *directory* on disk. There it outlives this process, and the next one that uses the directory
    delivers it. `len` is the number of waiting jobs.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        most: int = 10_000,
        most_bytes: int = 64_000_000,
        fsync: bool = False,
        linger: Duration = "5s",
        server: str | None = None,
    ) -> None:
        """
        Set the limits: *most* jobs of *most_bytes* in total can wait; beyond that a push raises (E37).

        On disk each push is in the file before it returns, so it survives this process; with *fsync* also a power cut. *linger* is
        how long closing the app waits for the rest to be delivered. What lies on disk is for one server: *server* is its name,
        None for hosts and database of the URL. Give a name when the address may change. Raises ConfigurationError.
        """
        for name, value in (("most", most), ("most_bytes", most_bytes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"Buffer({name}=…) must be a whole number of at least 1, not {value!r}.")
        if not isinstance(fsync, bool):
            raise ConfigurationError(f"Buffer(fsync=…) must be True or False, not {fsync!r}.")
        if directory is not None and (not isinstance(directory, str | os.PathLike) or not os.fspath(directory)):
            raise ConfigurationError(
                f"Buffer(…) takes the path of a directory, such as Buffer('spool'), not {directory!r}."
            )
        if fsync and directory is None:
            raise ConfigurationError("Buffer(fsync=True) is for a buffer on disk: Buffer('spool', fsync=True).")
        if server is not None and (not isinstance(server, str) or not server):
            raise ConfigurationError(f"Buffer(server=…) is a name of the server, such as 'orders', not {server!r}.")
        self.directory = None if directory is None else Path(directory)
        self.most = most
        self.most_bytes = most_bytes
        self.linger = milliseconds(linger, name="linger") / 1000
        self._fsync = fsync
        self._server = server
        self._spools: SpoolDirectory | None = None
        self._start: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._changed = SignalSafeEvent()
        self._own: MemorySpool | None = None
        self._others: list[MemorySpool] = []
        self._ids: set[str] = set()
        self._outage_since: float | None = None
        self._count_delivered = 0
        self._next_look = 0.0
        self.away = False
        """True when the last attempt found no Redis."""
        self.draining = False
        """True while Redis accepts the waiting pushes. New pushes are slowed down then, or the buffer would never become empty."""

    def bind(self, start: Callable[[], None], server: str) -> None:
        """
        Set the function that starts a delivery, and the name of the server; a buffer belongs to one app.

        Raises ConfigurationError.
        """
        if self._start is not None:
            raise ConfigurationError("This Buffer already belongs to another app. Create one for each app.")
        if self.directory is not None:
            try:
                # Now, not in the middle of the first outage.
                prepare_directory(self.directory, fsync=self._fsync)
            except OSError as fault:
                raise ConfigurationError(
                    f"Buffer('{self.directory}') cannot be used: {fault.strerror or fault}. Make the directory writable, "
                    "or use another."
                ) from None
        self._server = self._server or server
        if self.directory is not None:
            self._spools = SpoolDirectory(self.directory, self._server, fsync=self._fsync)
        self._start = start
        _bound.add(self)

    def __len__(self) -> int:
        with self._lock:
            return sum(one.jobs for one in self._all())

    def __bool__(self) -> bool:
        return True  # an empty buffer is a buffer

    def __repr__(self) -> str:
        return f"<Buffer {self.directory or 'in memory'}: {len(self)} of {self.most} jobs>"

    def holds_back(self, to: QueueName) -> bool:
        """Tell whether a push to this queue must wait here: behind others, or because Redis is away."""
        own = self._own
        return own is not None and bool(own.queues) and (self.away or to in own.queues)

    @property
    def on_disk(self) -> bool:
        """True when dead processes may leave something for this one."""
        return self._spools is not None

    def holds(self, id: str) -> bool:  # noqa: A002
        """Tell whether the job with this bare id waits here."""
        return id in self._ids

    # -- in -----------------------------------------------------------------------------------------------------------

    def add(self, record: SpooledPush, error: StoreUnavailable | None) -> None:
        """
        Keep *record* and start its delivery.

        If it does not fit, raises *error*, that of the attempt; StoreUnavailable (E37) if there was no attempt.
        """
        with self._lock:
            count = len(record.entries)
            try:
                own = self._own_spool()
                if own.jobs + count > self.most or own.bytes + record.size > self.most_bytes:
                    raise error or self._full_error(own, count)
                record.server = self._server or ""
                own.add(record)
            except OSError as fault:
                raise error or StoreUnavailable(
                    f"Redis does not answer, and the buffer {self.directory} cannot be written: {fault}. Nothing was "
                    "stored. Free disk space, or give the buffer another directory.",
                    code="E37",
                ) from fault
            self._ids.update(entry.id for entry in record.entries)
            self.away = self.away or error is not None
            if self._outage_since is None and error is not None:
                self._outage_since = time.monotonic()
                where = "in memory" if self.directory is None else f"in {self.directory}"
                reason = str(error).partition("\n")[0].rstrip(".")
                _log.warning(
                    "%s: pushes are kept %s until it answers, %s jobs at most", reason, where, f"{self.most:,}"
                )
        self.start_delivery()

    def start_delivery(self) -> None:
        """Start the delivery unless it runs."""
        if self._start is not None:
            self._start()

    def _full_error(self, own: MemorySpool, count: int) -> StoreUnavailable:
        return StoreUnavailable(
            f"Redis is unreachable or slower than the pushes, and the buffer is full: it holds {own.jobs:,} jobs in "
            f"{own.bytes:,} bytes, and its limits are {self.most:,} jobs and {self.most_bytes:,} bytes. {count:,} more were "
            "not stored. Push again later, or raise the limits: Buffer(most=…, most_bytes=…).",
            code="E37",
        )

    def _own_spool(self) -> MemorySpool:
        if self._own is None:
            if self._spools is None:
                self._own = MemorySpool()
            else:
                self._own = self._spools.claim()
                self._remember(self._own)
        return self._own

    def _remember(self, spool: MemorySpool) -> None:
        self._ids.update(entry.id for record in spool.records() for entry in record.entries)

    # -- out ----------------------------------------------------------------------------------------------------------

    def next_batch(self, may_send: Callable[[QueueName], bool]) -> tuple[MemorySpool, SpoolBatch] | None:
        """Return a spool and the batch of it to send now, None when nothing waits for a queue that *may_send* allows."""
        with self._lock:
            self._look()
            for spool in self._all():
                if (batch := spool.next_batch(may_send)) is not None:
                    return spool, batch
            if not self.away:
                self._finish()
            return None

    def _look(self) -> None:
        """Claim what dead processes left in the directory."""
        now = time.monotonic()
        if self._spools is None or now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        if self._own is None and self._spools.has_leftovers():
            self._own_spool()  # with the leftovers of one, so that new pushes follow them
        for spool in self._spools.orphans():
            self._others.append(spool)
            self._remember(spool)

    def delivered(self, spool: MemorySpool, batch: SpoolBatch, number: int) -> None:
        """Remove what Redis has: the records of the batch's sequence up to *number*."""
        with self._lock:
            self.away, self.draining = False, True
            for record in spool.finish(batch, number):
                self._count_delivered += len(record.entries)
                self._ids.difference_update(entry.id for entry in record.entries)
            if not spool and spool in self._others:
                self._others.remove(spool)
                spool.close()
            if not any(self._all()):
                self._finish()
        self._changed.set()

    def place_anew(self, spool: MemorySpool, batch: SpoolBatch, placed: Sequence[SpooledPush]) -> None:
        """Replace the records of a batch by *placed*, which are for other queues."""
        with self._lock:
            spool.replace(batch, placed)

    def refused(self) -> None:
        """Note that Redis answers, though it accepts nothing."""
        self.away = False

    def unanswered(self) -> None:
        """Note that Redis does not answer."""
        self.away, self.draining = True, False

    def halve_batch(self, spool: MemorySpool, batch: SpoolBatch) -> bool:
        """Send less at a time; return False when it is one record already."""
        with self._lock:
            return spool.halve_batch(batch)

    def _finish(self) -> None:
        """Report the end of an outage: what can be delivered is."""
        left = sum(one.jobs for one in self._all())
        wait = f"; {left:,} wait for queues that do not accept them" if left else ""
        if self._outage_since is not None:
            _log.warning(
                "Redis answers again after %.1f s: %s buffered jobs were delivered%s",
                time.monotonic() - self._outage_since, f"{self._count_delivered:,}", wait,
            )  # fmt: skip
        elif self._count_delivered:
            _log.info("%s buffered jobs were delivered%s", f"{self._count_delivered:,}", wait)
        self._outage_since, self._count_delivered, self.draining = None, 0, False

    def _all(self) -> list[MemorySpool]:
        return [*self._others, *([self._own] if self._own is not None else [])]

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_empty(self, seconds: float, to: QueueName | None = None) -> bool:
        """Wait until nothing waits here (for queue *to*); return whether that happened in time."""
        empty = (lambda: not any(self._all())) if to is None else (lambda: not self.holds_back(to))
        return self._changed.wait_for(empty, seconds)

    def wait_delivered(self, id: str, seconds: float | None) -> bool:  # noqa: A002
        """Wait until the job with this bare id is delivered; return whether that happened in time."""
        return self._changed.wait_for(lambda: id not in self._ids, seconds)

    def flush(self) -> None:
        """Give the delivery its `linger` seconds, and log what remains."""
        with self._lock:
            try:
                self._next_look = 0.0
                self._look()
            except (OSError, ConfigurationError) as error:
                _log.warning("the buffer %s cannot be read: %s", self.directory, error)
        if not len(self):
            return
        self.start_delivery()
        if self.wait_empty(self.linger):
            return
        left = len(self)
        if self.directory is not None:
            _log.warning(
                "%d buffered jobs were not delivered within %g s; they wait in %s for the next process that uses it",
                left, self.linger, self.directory,
            )  # fmt: skip
            return
        with self._lock:
            first = ", ".join(sorted(self._ids)[:20])
        _log.error(
            "%d buffered jobs were not delivered within %g s and are lost when this process ends: %s%s",
            left, self.linger, first, ", …" if left > 20 else "",
        )  # fmt: skip

    def release_files(self) -> None:
        """Close files on disk, for the next process; what is in memory stays."""
        with self._lock:
            if self.directory is None:
                return
            for one in self._all():
                one.close()
            self._own, self._others = None, []
            self._ids.clear()
            self._outage_since, self.away, self._next_look = None, False, 0.0

    def forked(self) -> None:
        """Start empty in a forked child: the parent delivers what waits."""
        for one in self._all():
            one.close()
        self._reset()


_bound: weakref.WeakSet[Buffer] = weakref.WeakSet()


def flush_all() -> None:
    """Flush all buffers; called when the process ends, also by programs that end without `atexit`."""
    for buffer in list(_bound):
        buffer.flush()


atexit.register(flush_all)
