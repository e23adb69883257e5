"""
Pushes that wait until Redis is back: in memory, or also in a file that the next process reads when this one is gone.

Each push has a place in a sequence, which is kept with it: that of the attempt that failed, or the next number of the
spool's own. Redis remembers the highest number of a sequence that it has taken, queue by queue. So whatever records a
call is made of, and whoever sends it, each is taken once.

The file is append-only: frames of ``length(4) crc32(4) body``. The body is MessagePack, and begins with a letter: P a push,
D a mark that says up to which number those of a sequence were delivered, M the same for pushes that were placed anew, which
follow. What cannot be read is moved into a file beside it and logged, and reading goes on behind it. The file is emptied
when all of it was delivered, and rewritten when most of it was.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.ids import new_identity
from conveyor.store.operations import Entry

_log = logging.getLogger("conveyor.buffer")
MAX_JOBS, MAX_BYTES = 1000, 4_000_000
"""The limits of one call of the delivery."""
_OVERHEAD = 100
MAX_PROCESSES = 256
"""Processes that may share a directory."""
_REWRITE_ABOVE = 8_000_000
"""Bytes of delivered records a file may hold before it is rewritten."""
_RESERVE = 4096
"""Bytes reserved after the records for what a delivery writes: a full disk must not stop it."""
_HEAD = struct.Struct("<II")
DAY_SUFFIX = "+"
"""The last character of a sequence that Redis remembers for a day instead of two hours; the scripts know it."""
_BODY = re.compile(rb"\x92\xa1P|\x94\xa1D|\x95\xa1M")
"""The first bytes of a body, by which a frame is looked for behind a damaged one."""
QueueName = tuple[str, str, str | None]
"""Namespace, queue or partition, plain list."""


def day_identity() -> str:
    """Return a fresh identity for a sequence that Redis remembers for a day."""
    return new_identity() + DAY_SUFFIX


@dataclass(slots=True)
class SpooledPush:
    """
    One push that waits. The field names are those of the file.

    `lane` and `number` are its place in a sequence: of the attempt that may have reached Redis, or, when "" is given, of the
    spool that it is added to. `at` is when the push was accepted (s since the epoch), because delays count from there.
    `server` names the server it is for.
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
    server: str = ""

    @property
    def to(self) -> QueueName:
        """The queue that it is for."""
        return self.namespace, self.queue, self.foreign

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return sum(len(entry.rest) + len(entry.id) + _OVERHEAD for entry in self.entries)

    def due(self, now: float) -> Iterator[Entry]:
        """Yield its entries with the rest of their delays and expiries."""
        waited = max(0, int((now - self.at) * 1000))
        for entry in self.entries:
            if entry.delay_ms is None and entry.expires_ms is None:
                yield entry
                continue
            delay = None if entry.delay_ms is None else max(0, entry.delay_ms - waited)
            life = None if entry.expires_ms is None else max(1, entry.expires_ms - waited)
            yield msgspec.structs.replace(entry, delay_ms=delay, expires_ms=life)

    def fits_with(self, other: SpooledPush) -> bool:
        """Tell whether both, which are for one queue, may travel in one call."""
        return self.lane == other.lane and self.max_length == other.max_length and self.partitions == other.partitions


@dataclass(slots=True)
class SpoolBatch:
    """The first records of one queue, for one call: a range of numbers in a sequence."""

    records: list[SpooledPush]

    @property
    def first(self) -> SpooledPush:
        """The record with the lowest number."""
        return self.records[0]

    @property
    def last_number(self) -> int:
        """The highest number."""
        return self.records[-1].number

    def entries(self, now: float) -> list[Entry]:
        """Return all entries, in order."""
        return [entry for record in self.records for entry in record.due(now)]


@dataclass(slots=True)
class QueueRecords:
    """The records of one queue, in order, and how many jobs the next call may take."""

    records: deque[SpooledPush] = field(default_factory=deque)
    max_jobs: int = field(default_factory=lambda: MAX_JOBS)

    def next_batch(self) -> SpoolBatch:
        """Return the records to send now."""
        head = self.records[0]
        taken, jobs, size = [head], len(head.entries), head.size
        for record in islice(self.records, 1, self.max_jobs):
            jobs, size = jobs + len(record.entries), size + record.size
            if jobs > self.max_jobs or size > MAX_BYTES or not head.fits_with(record):
                break
            taken.append(record)
        return SpoolBatch(taken)

    def remove(self, lane: str, number: int) -> list[SpooledPush]:
        """Remove and return the records of the sequence *lane* up to *number*; they are the first."""
        removed = []
        while self.records and self.records[0].lane == lane and self.records[0].number <= number:
            removed.append(self.records.popleft())
        return removed


class MemorySpool:
    """
    Records of several queues, each queue's in order.

    Not for several threads at once: the buffer's lock guards it.
    """

    def __init__(self) -> None:
        self.queues: dict[QueueName, QueueRecords] = {}
        self.jobs = self.bytes = 0
        self._identity = day_identity()
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self.queues)

    def records(self) -> Iterator[SpooledPush]:
        """Yield all records, queue by queue."""
        for queue in self.queues.values():
            yield from queue.records

    def add(self, record: SpooledPush) -> None:
        """Append a record, which gets the next number of the spool's sequence unless it has a place in one."""
        if not record.lane:
            self._number += 1
            record.lane, record.number = self._identity, self._number
        self._write_push(record)
        self._append_record(record)

    def _append_record(self, record: SpooledPush) -> None:
        jobs, size, queue = len(record.entries), record.size, self.queues.get(record.to)
        added = QueueRecords(deque([record])) if queue is None else queue
        # A signal handler raises only after a call: the counters and the record go together.
        self.jobs += jobs
        self.bytes += size
        if queue is None:
            self.queues[record.to] = added
        else:
            queue.records.append(record)

    def next_batch(self, may_send: Callable[[QueueName], bool]) -> SpoolBatch | None:
        """Return the records to send now, of the first queue that *may_send* allows; None when there is none."""
        return next((queue.next_batch() for to, queue in self.queues.items() if may_send(to)), None)

    def halve_batch(self, batch: SpoolBatch) -> bool:
        """
        Send half as many from now on, since the queue has no room for all; return False when one record is the minimum.

        A late copy of the whole changes nothing then: Redis refuses it for the numbers that it has taken.
        """
        if len(batch.records) == 1:
            return False
        self.queues[batch.first.to].max_jobs = max(1, len(batch.records) // 2)
        return True

    def finish(self, batch: SpoolBatch, number: int) -> list[SpooledPush]:
        """Remove the records that Redis has: those of the batch's sequence up to *number*. Return them."""
        to, lane = batch.first.to, batch.first.lane
        queue = self.queues.pop(to)
        queue.max_jobs = min(MAX_JOBS, queue.max_jobs * 2)
        self.queues[to] = queue  # the last one now, so that each queue has its turn
        delivered = self._remove(to, lane, number)
        self._write_delivered(to, lane, number)
        return delivered

    def replace(self, batch: SpoolBatch, placed: Sequence[SpooledPush]) -> None:
        """Replace the records of a batch by *placed*, which are for other queues."""
        first = batch.first
        self._write_moved(first.to, first.lane, batch.last_number, placed)
        self._remove(first.to, first.lane, batch.last_number)
        for record in placed:
            self._append_record(record)

    def _remove(self, to: QueueName, lane: str, number: int) -> list[SpooledPush]:
        if (queue := self.queues.get(to)) is None:
            return []
        removed = queue.remove(lane, number)
        for record in removed:
            self.jobs -= len(record.entries)
            self.bytes -= record.size
        if not queue.records:
            del self.queues[to]
        return removed

    def close(self) -> None:
        """Close what it holds open."""

    # -- what a journal does besides --------------------------------------------------------------------------------

    def _write_push(self, record: SpooledPush) -> None: ...
    def _write_delivered(self, to: QueueName, lane: str, number: int) -> None: ...
    def _write_moved(self, to: QueueName, lane: str, number: int, placed: Sequence[SpooledPush]) -> None: ...


class DiskSpool(MemorySpool):
    """
    A spool that is also in a file, with what an earlier process left there.

    *lock* is the descriptor of a locked file beside it, which says that a process uses it. With *fsync* a push that was
    added survives a power cut.
    """

    def __init__(self, path: Path, lock: int, *, fsync: bool) -> None:
        super().__init__()
        self.path = path
        self._lock = lock
        self._fsync = fsync
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if fsync:
            _sync_directory(path.parent)  # the file's name must survive too
        self._size = self._allocated = 0
        self._read()

    @property
    def server(self) -> str | None:
        """The server that its records are for, None when it is empty."""
        first = next(self.records(), None)
        return None if first is None else first.server

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write_push(self, record: SpooledPush) -> None:
        self._append(("P", record), sync=self._fsync, spare=_RESERVE)

    def _write_delivered(self, to: QueueName, lane: str, number: int) -> None:
        try:
            if not self.queues:
                os.ftruncate(self._file, 0)
                self._size = self._allocated = 0
                return
            self._append(("D", to, lane, number), sync=False)
            if self._size > _REWRITE_ABOVE + 2 * self.bytes:
                self._rewrite()
        except OSError as error:
            # A process that reads the file sends these records again, and Redis knows their numbers.
            _log.warning("%s: cannot record what was delivered: %s", self.path, error)

    def _write_moved(self, to: QueueName, lane: str, number: int, placed: Sequence[SpooledPush]) -> None:
        # Before they are sent: a process that reads the file must not place them by another number of partitions again.
        self._append(("M", to, lane, number, placed), sync=self._fsync)

    def _append(self, body: tuple[Any, ...], *, sync: bool, spare: int = 0) -> None:
        frame = _frame(body)
        if spare and self._size + len(frame) + spare > self._allocated:
            self._write(bytes(len(frame) + spare), self._allocated, sync=False)
            self._allocated += len(frame) + spare
        self._write(frame, self._size, sync=sync)
        self._size += len(frame)
        self._allocated = max(self._allocated, self._size)

    def _write(self, data: bytes, at: int, *, sync: bool) -> None:
        """Write all of *data*, or leave the file as it was before."""
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
        """Write what is left into a new file that replaces the old one."""
        fresh = self.path.with_suffix(".new")
        frames = b"".join(_frame(("P", record)) for record in self.records())
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(frames)
            if self._fsync:
                os.fsync(descriptor)
            os.replace(fresh, self.path)
            if self._fsync:
                _sync_directory(self.path.parent)
        except OSError:
            os.close(descriptor)
            fresh.unlink(missing_ok=True)  # what it takes of a full disk is for pushes
            raise
        os.close(self._file)
        self._file, self._size = descriptor, len(frames)
        self._allocated = self._size

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        data, at = self.path.read_bytes(), 0
        damaged: list[bytes] = []
        while at < len(data):
            frame = _unframe(data, at)
            if frame is not None and self._replay(frame[0]):
                at = frame[1]
            elif data.count(b"\0", at) == len(data) - at:
                break  # the reserve
            else:
                behind = _next_frame(data, at)
                damaged.append(data[at:behind].rstrip(b"\0"))
                at = behind
        self._size = self._allocated = at
        os.ftruncate(self._file, at)
        if damaged:
            self._set_aside(damaged)

    def _set_aside(self, damaged: list[bytes]) -> None:
        """Move what cannot be read into a file of its own."""
        place = self.path.with_suffix(".damaged")
        _log.error(
            "%s: %s bytes in %d places cannot be read: they were damaged, or their writer died while it wrote them. They are "
            "kept in %s; the %s pushes before and behind them are delivered",
            self.path, f"{sum(map(len, damaged)):,}", len(damaged), place, f"{sum(1 for _ in self.records()):,}",
        )  # fmt: skip
        try:
            with open(place, "ab", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as file:
                file.write(b"".join(damaged))
                if self._fsync:
                    file.flush()
                    os.fsync(file.fileno())
            self._rewrite()
        except OSError as error:
            _log.warning("%s: cannot move them to %s: %s", self.path, place, error)

    def _replay(self, body: list[Any]) -> bool:
        """Carry out what a frame says; return False when that makes no sense."""
        try:
            if body[0] == "P":
                self._append_record(msgspec.convert(body[1], SpooledPush))
                return True
            to, lane, number = msgspec.convert(body[1:4], tuple[QueueName, str, int])
            placed = msgspec.convert(body[4], list[SpooledPush]) if body[0] == "M" else []
        except (msgspec.ValidationError, LookupError):
            return False
        if body[0] not in {"D", "M"}:
            return False
        self._remove(to, lane, number)
        for record in placed:
            self._append_record(record)
        return True

    def close(self) -> None:
        """Close the file; its content waits for the next process."""
        os.close(self._file)
        os.close(self._lock)


def _frame(body: tuple[Any, ...]) -> bytes:
    packed = msgspec.msgpack.encode(body)
    return _HEAD.pack(len(packed), crc32(packed)) + packed


def _unframe(data: bytes, at: int) -> tuple[list[Any], int] | None:
    """Return a body and the begin of the next frame, None for an incomplete or damaged one."""
    if at + _HEAD.size > len(data):
        return None
    length, check = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + length
    if length == 0 or end > len(data) or crc32(packed := data[at + _HEAD.size : end]) != check:
        return None
    try:
        return msgspec.msgpack.decode(packed, type=list[Any]), end
    except msgspec.DecodeError:
        return None


def _next_frame(data: bytes, at: int) -> int:
    """Return where the next whole frame begins behind the damaged one at *at*, the end of the data when there is none."""
    if at + _HEAD.size <= len(data):
        end: int = at + _HEAD.size + _HEAD.unpack_from(data, at)[0]
        if _unframe(data, end) is not None:
            return end  # its length is right, so nothing in its body is taken for a frame
    for found in _BODY.finditer(data, at + _HEAD.size + 1):
        if _unframe(data, found.start() - _HEAD.size) is not None:
            return found.start() - _HEAD.size
    return len(data)


def _sync_directory(directory: Path) -> None:
    """Write the names in *directory* to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_directory(directory: Path, *, fsync: bool) -> None:
    """Create *directory* if it does not exist; raises OSError when it is not writable."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError("Permission denied")
    if fsync:
        for one in reversed(missing):
            _sync_directory(one.parent)


class SpoolDirectory:
    """
    The spools of one directory, one for each process that uses it, and those that dead processes left.

    *server* names the server of this process. Spools of another one are left to the processes that use that.
    """

    def __init__(self, path: Path, server: str, *, fsync: bool) -> None:
        self.path, self.server = path, server
        self._fsync = fsync
        self._foreign: dict[Path, tuple[int, int]] = {}

    def claim(self) -> DiskSpool:
        """Return the first spool that no other process uses, with what was left in it."""
        prepare_directory(self.path, fsync=self._fsync)
        for slot in range(MAX_PROCESSES):
            spool = self._open(slot)
            if spool is not None:
                return spool
        raise ConfigurationError(
            f"{MAX_PROCESSES} processes already use the buffer {self.path}. Use several directories."
        )

    def orphans(self) -> list[DiskSpool]:
        """Return the spools that are not empty and whose processes are gone."""
        spools: list[DiskSpool] = []
        for path in self._leftovers():
            if (spool := self._open(int(path.stem))) is not None:
                if spool:
                    spools.append(spool)
                else:
                    spool.close()
        return spools

    def has_leftovers(self) -> bool:
        """Tell whether a process left something for this server, or one is using the directory."""
        return any(True for _ in self._leftovers())

    def _leftovers(self) -> Iterator[Path]:
        for path in sorted(self.path.glob("*.log")):
            if path.stem.isdigit() and (state := _state_of(path))[0] and self._foreign.get(path) != state:
                yield path

    def _open(self, slot: int) -> DiskSpool | None:
        """Return a spool; None when a process uses it, or when it is for another server."""
        path = self.path / f"{slot}.log"
        if path in self._foreign and self._foreign[path] == _state_of(path):
            return None
        lock = os.open(self.path / f"{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            spool = DiskSpool(path, lock, fsync=self._fsync)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        if spool.server in (None, self.server):
            return spool
        _log.warning(
            "%s holds %s jobs for the server %s, and this program uses %s: they wait for a program that uses that. If it is "
            "the same server under another address, name it: Buffer(…, server=%r)",
            path, f"{spool.jobs:,}", spool.server, self.server, spool.server,
        )  # fmt: skip
        spool.close()
        self._foreign[path] = _state_of(path)
        return None


def _state_of(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file, which tell whether it has changed; (0, 0) when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
