"""The producer's buffer: keeps pushes while Redis is away."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store.client.spool import (
    MemorySpool,
    SpoolBatch,
    SpooledPush,
    claim_spool,
    has_leftovers,
    orphaned_spools,
    prepare_directory,
)
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.units import Duration, milliseconds

_log = logging.getLogger("conveyor.buffer")


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
    ) -> None:
        """
        Set the limits: *most* jobs of *most_bytes* in total can wait; beyond that a push raises (E37).

        On disk each push is in the file before it returns, so it survives this process; with *fsync* also a power cut. *linger* is
        how long closing the app waits for the rest to be delivered. Raises ConfigurationError.
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
        self.directory = None if directory is None else Path(directory)
        self.most = most
        self.most_bytes = most_bytes
        self.linger = milliseconds(linger, name="linger") / 1000
        self._fsync = fsync
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
        self.draining = False
        """True while Redis accepts the waiting pushes. New pushes are slowed down then, or the buffer would never become empty."""

    def bind(self, start: Callable[[], None]) -> None:
        """Set the function that starts a delivery; a buffer belongs to one app. Raises ConfigurationError."""
        if self._start is not None:
            raise ConfigurationError("This Buffer already belongs to another app. Create one for each app.")
        if self.directory is not None:
            try:
                prepare_directory(self.directory)  # now, not in the middle of the first outage
            except OSError as fault:
                raise ConfigurationError(
                    f"Buffer('{self.directory}') cannot be used: {fault.strerror or fault}. Make the directory writable, "
                    "or use another."
                ) from None
        self._start = start
        _bound.add(self)

    def __len__(self) -> int:
        with self._lock:
            return sum(one.jobs for one in self._all())

    def __bool__(self) -> bool:
        return True  # an empty buffer is a buffer

    def __repr__(self) -> str:
        return f"<Buffer {self.directory or 'in memory'}: {len(self)} of {self.most} jobs>"

    @property
    def waiting(self) -> bool:
        """True when something waits that a new push must not overtake."""
        own = self._own
        return own is not None and bool(own)

    def has_leftovers(self) -> bool:
        """Tell whether an earlier process left something in the directory."""
        return self.directory is not None and has_leftovers(self.directory)

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
                own.add(record)
            except OSError as fault:
                raise error or StoreUnavailable(
                    f"Redis does not answer, and the buffer {self.directory} cannot be written: {fault}. Nothing was "
                    "stored. Free disk space, or give the buffer another directory.",
                    code="E37",
                ) from fault
            self._ids.update(entry.id for entry in record.entries)
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
            if self.directory is None:
                self._own = MemorySpool()
            else:
                self._own = claim_spool(self.directory, fsync=self._fsync)
                self._remember(self._own)
        return self._own

    def _remember(self, spool: MemorySpool) -> None:
        self._ids.update(entry.id for record in spool.records() for entry in record.entries)

    # -- out ----------------------------------------------------------------------------------------------------------

    def next_batch(self) -> tuple[MemorySpool, SpoolBatch] | None:
        """Return the spool and the batch to send now, None when nothing waits."""
        with self._lock:
            if self.directory is not None and self._own is None and self.has_leftovers():
                self._own_spool()
            spool = next((one for one in self._all() if one), None)
            if spool is None and self.directory is not None:
                self._others += orphaned_spools(self.directory)
                spool = next((one for one in self._others if one), None)
                if spool is not None:
                    self._remember(spool)
            if spool is None:
                self._finish()
                return None
            return spool, spool.next_batch()

    def delivered(self, spool: MemorySpool, batch: SpoolBatch, number: int) -> None:
        """Remove what Redis has: the records of the batch's sequence up to *number*."""
        with self._lock:
            self.draining = True
            for record in spool.finish(batch, number):
                self._count_delivered += len(record.entries)
                self._ids.difference_update(entry.id for entry in record.entries)
            if not spool and spool in self._others:
                self._others.remove(spool)
                spool.close()
            if not any(self._all()):
                self._finish()
        self._changed.set()

    def halve_batch(self, spool: MemorySpool, batch: SpoolBatch) -> bool:
        """Send less at a time; return False when it is one record already."""
        with self._lock:
            return spool.halve_batch(batch)

    def _finish(self) -> None:
        if self._outage_since is not None:
            _log.warning(
                "Redis answers again after %.1f s: %s buffered jobs were delivered",
                time.monotonic() - self._outage_since, f"{self._count_delivered:,}",
            )  # fmt: skip
        elif self._count_delivered:
            _log.info("%s buffered jobs were delivered", f"{self._count_delivered:,}")
        self._outage_since, self._count_delivered, self.draining = None, 0, False

    def _all(self) -> list[MemorySpool]:
        return [*self._others, *([self._own] if self._own is not None else [])]

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_empty(self, seconds: float) -> bool:
        """Wait until nothing waits here; return whether that happened in time."""
        return self._changed.wait_for(lambda: not any(self._all()), seconds)

    def wait_delivered(self, id: str, seconds: float | None) -> bool:  # noqa: A002
        """Wait until the job with this bare id is delivered; return whether that happened in time."""
        return self._changed.wait_for(lambda: id not in self._ids, seconds)

    def flush(self) -> None:
        """Give the delivery its `linger` seconds, and log what remains."""
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
            self._outage_since = None

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
