"""
Memory that a supervisor shares with its children, one slot each.

A child writes, and the supervisor reads, also after the child is dead, whatever killed it at whatever point. Single
numbers are cells of eight bytes, stored in one go. Everything else is a record with its length and checksum, appended
behind the last one, so a write that was cut off hides nothing that was written before it.

All instants are seconds of the monotonic clock, which the processes of a machine share.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from struct import Struct
from time import monotonic_ns
from zlib import crc32

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.store.keys import QueueKeys
from conveyor.worker.crash_attribution import CELLS, RunningSnapshot, RunningTable

# The numbers of the cells: nine of one kind each, and the renewals of the leases.
_TICK, _RETIRING, _EPOCH, _JOB_MARK, _JOB_SIZE, _FINISHED, _AWAIT, _QUIET, _HELD = range(9)
_RENEWALS, _RENEWAL_CELLS = 16, 256
_CELL_BYTES = 4096
_JOB_ROOM = 4096
_RUNNING_AT = _CELL_BYTES + _JOB_ROOM
_RECORDS_AT = _RUNNING_AT + 8 * CELLS
RECORD_ROOM = 128 * 1024
"""Bytes for the records of a slot; there are two such areas. Pages that are never touched cost nothing."""
SLOT_BYTES = _RECORDS_AT + 2 * RECORD_ROOM
_HEAD = Struct("<II")  # length, checksum


class ChildSpec(msgspec.Struct, frozen=True, tag="spec"):
    """
    The worker that a child is to run. The supervisor writes it before the child starts.

    Times in seconds, memory in bytes. A burst does not end before `await_until` (monotonic): retries of the previous
    process are due by then.
    """

    app: str
    queues: dict[str, float]
    concurrency: int
    threads: int
    burst: bool
    grace: float
    verbose: bool = False
    quiet: bool = False
    path: tuple[str, ...] = ()
    max_jobs: int | None = None
    max_memory: int | None = None
    await_until: float = 0.0
    labels: tuple[str, ...] = ()
    declares: bool = False
    """Whether the child stores the schedules that its app declares."""


class ChildInfo(msgspec.Struct, frozen=True, tag="about"):
    """The app of a child, written when it is up: where Redis is, and for the log its queues and (some of) its tasks."""

    url: str
    namespace: str
    tasks: int = 0
    names: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()


class _RegisteredRecord(msgspec.Struct, frozen=True, tag="joined"):
    prefix: str
    queue: str
    foreign: str | None
    worker: str
    lease_ms: int
    cell: int


_Record = ChildSpec | ChildInfo | _RegisteredRecord
_DECODER: msgspec.json.Decoder[_Record] = msgspec.json.Decoder(_Record)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class LeaseIdentity:
    """
    One identity under which a child holds leases.

    Only a queue's last one is `current`. `renewed` is when the child itself last renewed it (monotonic).
    """

    namespace: str
    queue: str
    foreign: str | None
    worker: str
    lease_ms: int
    current: bool
    renewed: float

    @property
    def keys(self) -> QueueKeys:
        """The keys of its queue."""
        return QueueKeys(self.namespace, self.queue, foreign=self.foreign)


class SharedMemory:
    """The slots of all children, in memory that outlives each of them. A child that inherits `fd` attaches to it."""

    def __init__(self, slots: int, fd: int | None = None) -> None:
        """
        Args:
            slots: how many slots.
            fd: the descriptor of existing memory to attach to; None: make it.
        """
        self.slots = slots
        self.fd = anonymous_file("conveyor-children", slots * SLOT_BYTES) if fd is None else fd
        self._memory = mmap.mmap(self.fd, slots * SLOT_BYTES)
        self._view = memoryview(self._memory)
        self._opened: list[ChildSlot] = []

    def slot(self, number: int) -> ChildSlot:
        """Return one slot, counted from 0."""
        slot = ChildSlot(self._view[number * SLOT_BYTES : (number + 1) * SLOT_BYTES], number)
        self._opened.append(slot)
        return slot

    def close(self) -> None:
        """Release the memory; the slots are unusable afterwards."""
        while self._opened:
            self._opened.pop().close()
        self._view.release()
        self._memory.close()
        os.close(self.fd)


class ChildSlot:
    """The part of the memory that one child writes. While the child lives, nothing else writes there."""

    def __init__(self, view: memoryview, number: int) -> None:
        """
        Args:
            view: its bytes, `SLOT_BYTES` of them.
            number: its number in the memory, from 0.
        """
        self.number = number
        self._view = view
        self._cells = view[:_CELL_BYTES].cast("q")
        self._job = view[_CELL_BYTES:_RUNNING_AT]
        self._running = view[_RUNNING_AT:_RECORDS_AT].cast("q")
        self._tail: int | None = None
        self._job_mark = 0
        self._cell_of_prefix: dict[str, int] = {}  # prefix of a queue -> its renewal cell
        self._cell_of_identity: dict[str, int] = {}  # identity -> the same

    # -- the child ------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Note that the event loop turns."""
        self._cells[_TICK] = monotonic_ns()

    def note_renewal(self, worker: str | None = None) -> None:
        """Note that a turn has just renewed the lease of an identity; None: of all of them."""
        now = monotonic_ns()
        if worker is not None:
            self._cells[_RENEWALS + self._cell_of_identity[worker]] = now
        else:
            for cell in self._cell_of_prefix.values():
                self._cells[_RENEWALS + cell] = now

    def set_identity(self, keys: QueueKeys, worker: str, lease_ms: int) -> None:
        """
        Note the identity under which a queue is served from now on: before it is registered in Redis.

        The queue's earlier one is no longer renewed, and reaped all the same when the child dies.
        """
        cell = self._cell_of_prefix.setdefault(keys.prefix, len(self._cell_of_prefix) % _RENEWAL_CELLS)
        self._cell_of_identity[worker] = cell
        self._cells[_RENEWALS + cell] = monotonic_ns()
        self._append(_RegisteredRecord(keys.prefix, keys.queue, keys.foreign, worker, lease_ms, cell))

    def set_job(self, task: str, job_id: str) -> None:
        """Note the job that the event loop is running: the log names it when the loop is blocked."""
        data = f"{task}\n{job_id}".encode()[:_JOB_ROOM]
        cells, mark = self._cells, self._job_mark
        cells[_JOB_MARK] = mark + 1  # odd: do not read now
        self._job[: len(data)] = data
        cells[_JOB_SIZE] = len(data)
        self._job_mark = cells[_JOB_MARK] = mark + 2

    def clear_job(self) -> None:
        """Note that the event loop runs no job."""
        self._cells[_JOB_SIZE] = 0

    def running_table(self) -> RunningTable:
        """Return the table of the jobs that the child runs; all its cells are empty when it starts."""
        return RunningTable(self._running)

    def set_info(self, info: ChildInfo) -> None:
        """Write what the supervisor needs to know of the app."""
        self._append(info)

    @property
    def retiring(self) -> bool:
        """Whether the child takes no more work and asks for a successor (it exits with 75 when the rest is done)."""
        return self._cells[_RETIRING] == 1

    @retiring.setter
    def retiring(self, value: bool) -> None:
        self._cells[_RETIRING] = int(value)

    @property
    def quiet(self) -> bool:
        """Whether the child takes no new jobs, by a signal or a command."""
        return self._cells[_QUIET] == 1

    @quiet.setter
    def quiet(self, value: bool) -> None:
        self._cells[_QUIET] = int(value)

    @property
    def held(self) -> int:
        """The number of jobs that the child held when its loop last turned."""
        return self._cells[_HELD]

    @held.setter
    def held(self, value: int) -> None:
        self._cells[_HELD] = value

    @property
    def await_until(self) -> float:
        """Until when a burst must go on after the child (monotonic): its retries are due by then."""
        return self._cells[_AWAIT] / 1e9

    @await_until.setter
    def await_until(self, at: float) -> None:
        self._cells[_AWAIT] = int(at * 1e9)

    def finish(self) -> None:
        """Note that the child ends by its own decision: a job may end the process with any exit code."""
        self._cells[_FINISHED] = 1

    # -- the supervisor -------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the child came to its own end."""
        return self._cells[_FINISHED] == 1

    @property
    def last_tick(self) -> float:
        """When the loop last turned; 0.0 before it did."""
        return self._cells[_TICK] / 1e9

    def job(self) -> tuple[str, str] | None:
        """Return (task, job id) of what the event loop runs; None when it runs no job, or that cannot be read."""
        for _ in range(10):
            mark, size = self._cells[_JOB_MARK], self._cells[_JOB_SIZE]
            data = bytes(self._job[:size])
            if mark % 2 == 0 and mark == self._cells[_JOB_MARK]:
                task, _, job_id = data.decode(errors="replace").partition("\n")
                return (task, job_id) if size else None
        return None

    def running_snapshot(self) -> RunningSnapshot | None:
        """Return which jobs were running; None when that is not known."""
        return RunningSnapshot.read(self._running)

    def identities(self) -> list[LeaseIdentity]:
        """Return all identities that may hold leases, oldest first."""
        records = self._read()
        registered = [record for record in records if isinstance(record, _RegisteredRecord)]
        current = {record.prefix: record.worker for record in registered}
        return [
            LeaseIdentity(
                one.prefix.partition(":{")[0],  # a namespace holds no braces
                one.queue,
                one.foreign,
                one.worker,
                one.lease_ms,
                current[one.prefix] == one.worker,
                self._cells[_RENEWALS + one.cell] / 1e9,
            )
            for one in registered
        ]

    def info(self) -> ChildInfo | None:
        """Return what the child wrote about its app; None before it did."""
        return next((record for record in reversed(self._read()) if isinstance(record, ChildInfo)), None)

    def spec(self) -> ChildSpec | None:
        """Return what the child is to run."""
        return next((record for record in reversed(self._read()) if isinstance(record, ChildSpec)), None)

    def prepare(self, spec: ChildSpec) -> None:
        """Clear what a dead child left, and write what the next one is to run."""
        epoch = self._cells[_EPOCH]
        for cell in range(_RENEWALS + _RENEWAL_CELLS):
            if cell != _EPOCH:
                self._cells[cell] = 0
        self._view[_RUNNING_AT:_RECORDS_AT] = bytes(8 * CELLS)
        self._cells[_EPOCH] = epoch + 1  # records of another epoch do not count
        self._tail, self._job_mark = 0, 0
        self._append(spec)

    def close(self) -> None:
        """Release the memory."""
        self._cells.release()
        self._job.release()
        self._running.release()
        self._view.release()

    # -- records: two areas, of which the epoch's parity names the valid one; the epoch also seeds the checksums ----

    def _append(self, record: _Record) -> None:
        epoch = self._cells[_EPOCH]
        if self._tail is None:
            self._tail = self._scan(epoch)[1]
        end = self._put(epoch, self._tail, _encode(record))
        self._tail = self._rewrite(epoch + 1, record) if end is None else end

    def _put(self, epoch: int, at: int, payload: bytes) -> int | None:
        whole = _HEAD.pack(len(payload), crc32(payload, epoch & 0xFFFFFFFF)) + payload
        if at + len(whole) > RECORD_ROOM:
            return None
        first = self._area(epoch) + at
        self._view[first : first + len(whole)] = whole
        return at + len(whole)

    def _rewrite(self, epoch: int, newest: _Record) -> int:
        """Write what still counts to the other area, then make that area the valid one with a single store."""
        records = self._read()
        kept: dict[str, _Record] = {}
        for record in (*records, newest):
            if isinstance(record, _RegisteredRecord):
                kept.pop(record.prefix, None)
                kept[record.prefix] = record
            else:
                kept[type(record).__name__] = record
        at = 0
        for record in kept.values():
            end = self._put(epoch, at, _encode(record))
            if end is None:
                raise ConfigurationError(
                    f"One worker serves {len(self._cell_of_prefix)} queues, and their names do not fit in {RECORD_ROOM} "
                    "bytes. Use several workers, each with some of the queues (-q)."
                )
            at = end
        self._cells[_EPOCH] = epoch
        return at

    def _read(self) -> list[_Record]:
        while True:
            epoch = self._cells[_EPOCH]
            records, _ = self._scan(epoch)
            if epoch == self._cells[_EPOCH]:
                return records

    def _scan(self, epoch: int) -> tuple[list[_Record], int]:
        """Return the whole records of an area, and where they end."""
        area, at, records = self._area(epoch), 0, []
        while at + _HEAD.size <= RECORD_ROOM:
            size, checksum = _HEAD.unpack_from(self._view, area + at)
            end = at + _HEAD.size + size
            if size == 0 or end > RECORD_ROOM:
                break
            payload = bytes(self._view[area + at + _HEAD.size : area + end])
            if crc32(payload, epoch & 0xFFFFFFFF) != checksum:
                break
            records.append(_DECODER.decode(payload))
            at = end
        return records, at

    def _area(self, epoch: int) -> int:
        return _RECORDS_AT + (epoch & 1) * RECORD_ROOM


def anonymous_file(name: str, size: int) -> int:
    """Return the descriptor of a file without a name, which is deleted when no process has it open."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile(prefix=name) as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
