"""
Pushes that wait until Redis is back: in memory, or also in a file that the next process reads when this one is gone.

They wait in order, each with the call in which it may have been sent already. The file is append-only: frames of
``length(4) crc32(4) body``. The body is MessagePack: a push, the begin of a call or its end. A torn tail is cut off and
logged. The file is emptied when all of it was delivered, and rewritten when most of it was.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.store.operations import Entry

_log = logging.getLogger("conveyor.buffer")
MAX_JOBS, MAX_BYTES = 1000, 4_000_000
"""What one call delivers at most."""
_OVERHEAD = 100
MAX_PROCESSES = 256
"""Processes that may share a directory."""
_REWRITE_ABOVE = 8_000_000
"""Bytes of delivered records a file may hold before it is written anew."""
_RESERVE = 4096
"""Bytes kept free behind the records for what is written during a delivery: a disk that is full must not hold it up."""
_HEAD = struct.Struct("<II")


@dataclass(slots=True)
class SpooledPush:
    """
    One push that waits. Its `lane` and `number` are those of an attempt that may have reached Redis, "" when there
    was none; `at` is when it was accepted (s since the epoch), since delays count from there.
    """

    namespace: str
    queue: str
    entries: list[Entry]
    at: float
    max_length: int = 0
    partitions: int = 1
    lane: str = ""
    number: int = 0
    foreign: str | None = None

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return sum(len(entry.rest) + len(entry.id) + _OVERHEAD for entry in self.entries)

    def due(self, now: float) -> Iterator[Entry]:
        """Yield its entries with what is left of their delays and lives."""
        waited = max(0, int((now - self.at) * 1000))
        for entry in self.entries:
            if entry.delay_ms is None and entry.expires_ms is None:
                yield entry
                continue
            delay = None if entry.delay_ms is None else max(0, entry.delay_ms - waited)
            life = None if entry.expires_ms is None else max(1, entry.expires_ms - waited)
            yield replace(entry, delay_ms=delay, expires_ms=life)

    def fits_with(self, other: SpooledPush) -> bool:
        """Tell whether both may travel in one call."""
        return (
            not self.lane and not other.lane and self.queue == other.queue and self.namespace == other.namespace
            and self.foreign == other.foreign and self.max_length == other.max_length and self.partitions == other.partitions
        )  # fmt: skip


@dataclass(slots=True)
class SpoolBatch:
    """The records of one call, the first of the backlog, and the lane and number it is sent in, however often."""

    records: list[SpooledPush]
    identity: str
    number: int

    def entries(self, now: float) -> list[Entry]:
        """Return all entries, in order."""
        return [entry for record in self.records for entry in record.due(now)]


class MemorySpool:
    """Records in order. Not for several threads at once: the buffer's lock guards it."""

    def __init__(self, identity: str) -> None:
        """Begin empty; batches go in *lane*."""
        self.records: deque[SpooledPush] = deque()
        self.jobs = self.bytes = 0
        self._identity = identity
        self._number = 0
        self._batch: SpoolBatch | None = None
        self._max_jobs = MAX_JOBS

    def __bool__(self) -> bool:
        return bool(self.records)

    def add(self, record: SpooledPush) -> None:
        """Append a record."""
        self._write_push(record)
        self.records.append(record)
        self.jobs += len(record.entries)
        self.bytes += record.size

    def next_batch(self) -> SpoolBatch:
        """Return what is to be sent now: the same until `done` or `cut`."""
        if self._batch is None:
            records = self._first()
            if records[0].lane:
                self._batch = SpoolBatch(records, records[0].lane, records[0].number)
            else:
                self._number += 1
                batch = SpoolBatch(records, self._identity, self._number)
                self._write_batch(batch)
                self._batch = batch
        return self._batch

    def _first(self) -> list[SpooledPush]:
        head = self.records[0]
        taken, jobs, size = [head], len(head.entries), head.size
        for record in islice(self.records, 1, self._max_jobs) if not head.lane else ():
            jobs, size = jobs + len(record.entries), size + record.size
            if jobs > self._max_jobs or size > MAX_BYTES or not head.fits_with(record):
                break
            taken.append(record)
        return taken

    def halve_batch(self) -> bool:
        """
        Send half as many from now on, since the queue has no room for all; return False when one record is the least.

        The next batch gets a higher number, so a late copy of this one changes nothing.
        """
        if self._batch is None or len(self._batch.records) == 1:
            return False
        self._max_jobs = max(1, len(self._batch.records) // 2)
        self._batch = None
        return True

    def finish_batch(self) -> list[SpooledPush]:
        """Forget the batch, which is delivered, and return its records."""
        assert self._batch is not None
        delivered, self._batch = self._batch.records, None
        self._max_jobs = min(MAX_JOBS, self._max_jobs * 2)
        for record in delivered:
            self.records.popleft()
            self.jobs -= len(record.entries)
            self.bytes -= record.size
        self._write_delivered(len(delivered))
        return delivered

    def close(self) -> None:
        """Let go of what it holds open."""

    # -- what a journal does besides --------------------------------------------------------------------------------

    def _write_push(self, record: SpooledPush) -> None: ...
    def _write_batch(self, batch: SpoolBatch) -> None: ...
    def _write_delivered(self, count: int) -> None: ...


class DiskSpool(MemorySpool):
    """A backlog that stands in a file as well; the lock beside it says that somebody uses it."""

    def __init__(self, path: Path, lock: int, identity: str, *, fsync: bool) -> None:
        """Read what an earlier process left. *lock* is the descriptor that holds the lock."""
        super().__init__(identity)
        self.path = path
        self._lock = lock
        self._fsync = fsync
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = self._allocated = self._read()

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write_push(self, record: SpooledPush) -> None:
        self._append(("P", record), sync=self._fsync, spare=_RESERVE)

    def _write_batch(self, batch: SpoolBatch) -> None:
        # Before it is sent: who reads this sends exactly these records again, in the same lane and number.
        self._append(("B", len(batch.records), batch.identity, batch.number), sync=self._fsync)

    def _write_delivered(self, count: int) -> None:
        if not self.records:
            os.ftruncate(self._file, 0)
            self._size = self._allocated = 0
            return
        try:
            self._append(("D", count), sync=False)
            if self._size > _REWRITE_ABOVE + 2 * self.bytes:
                self._rewrite()
        except OSError as error:
            # Whoever reads the file sends the same call again, and its lane answers that.
            _log.warning("%s: cannot record what was delivered: %s", self.path, error)

    def _append(self, body: tuple[Any, ...], *, sync: bool, spare: int = 0) -> None:
        frame = _frame(body)
        if spare and self._size + len(frame) + spare > self._allocated:
            self._write(bytes(len(frame) + spare), self._allocated, sync=False)
            self._allocated += len(frame) + spare
        self._write(frame, self._size, sync=sync)
        self._size += len(frame)
        self._allocated = max(self._allocated, self._size)

    def _write(self, data: bytes, at: int, *, sync: bool) -> None:
        """Write all of *data*, or leave the file as it was before that."""
        try:
            if (written := os.pwrite(self._file, data, at)) < len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
            if sync:
                os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, at)
            self._allocated = at
            raise

    def _rewrite(self) -> None:
        """Write what is left into a new file that takes the old one's place."""
        fresh = self.path.with_suffix(".new")
        frames = b"".join(_frame(("P", record)) for record in self.records)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(frames)
            if self._fsync:
                os.fsync(descriptor)
            os.replace(fresh, self.path)
        except OSError:
            os.close(descriptor)
            raise
        os.close(self._file)
        self._file, self._size = descriptor, len(frames)
        self._allocated = self._size

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self) -> int:
        data = self.path.read_bytes()
        at = 0
        while (frame := _unframe(data, at)) is not None:
            body, at = frame
            self._replay(body)
        if any(data[at:]):
            _log.warning(
                "%s: the last %d bytes cannot be read, because their writer died while it wrote them; "
                "all pushes accepted before are kept", self.path, len(data) - at,
            )  # fmt: skip
        os.ftruncate(self._file, at)
        return at

    def _replay(self, body: list[Any]) -> None:
        if body[0] == "P":
            record = msgspec.convert(body[1], SpooledPush)
            self.records.append(record)
            self.jobs += len(record.entries)
            self.bytes += record.size
        elif body[0] == "B":
            self._batch = SpoolBatch(list(islice(self.records, body[1])), body[2], body[3])
        else:
            for _ in range(body[1]):
                record = self.records.popleft()
                self.jobs -= len(record.entries)
                self.bytes -= record.size
            self._batch = None

    def close(self) -> None:
        """Let go of the file; what is in it waits for the next process."""
        os.close(self._file)
        os.close(self._lock)


def _frame(body: tuple[Any, ...]) -> bytes:
    packed = msgspec.msgpack.encode(body)
    return _HEAD.pack(len(packed), crc32(packed)) + packed


def _unframe(data: bytes, at: int) -> tuple[list[Any], int] | None:
    """Return a body and where the next frame begins, None for one that is not whole."""
    if at + _HEAD.size > len(data):
        return None
    length, check = _HEAD.unpack_from(data, at)
    packed = data[at + _HEAD.size : at + _HEAD.size + length]
    if length == 0 or len(packed) < length or crc32(packed) != check:
        return None
    return msgspec.msgpack.decode(packed), at + _HEAD.size + length


def prepare_directory(directory: Path) -> None:
    """Make *directory* where there is none; raises OSError where nothing can be written to it."""
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError("Permission denied")


def claim_spool(directory: Path, identity: str, *, fsync: bool) -> DiskSpool:
    """Return the first journal of *directory* that no other process uses, with what was left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for slot in range(MAX_PROCESSES):
        spool = _open(directory, slot, identity, fsync=fsync)
        if spool is not None:
            return spool
    raise ConfigurationError(f"{MAX_PROCESSES} processes already use the buffer {directory}. Use several directories.")


def orphaned_spools(directory: Path, identity: str) -> list[DiskSpool]:
    """Return the journals of *directory* that hold something and whose processes are gone."""
    spools: list[DiskSpool] = []
    for path in sorted(directory.glob("*.log")):
        if (
            path.stem.isdigit()
            and path.stat().st_size
            and (spool := _open(directory, int(path.stem), identity, fsync=False))
        ):
            if spool:
                spools.append(spool)
            else:
                spool.close()
    return spools


def has_leftovers(directory: Path) -> bool:
    """Tell whether some process left something in *directory*."""
    return any(path.stat().st_size for path in directory.glob("*.log"))


def _open(directory: Path, slot: int, identity: str, *, fsync: bool) -> DiskSpool | None:
    lock = os.open(directory / f"{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return DiskSpool(directory / f"{slot}.log", lock, identity, fsync=fsync)
