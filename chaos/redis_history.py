"""The history of a run as Redis recorded it in its append-only file: every effect of every script, in order.

The file is written before a reply leaves, so it knows more than any client: which jobs were accepted, who held them,
how they ended. Key names are those of docs/reference/redis-keys.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hiredis

from chaos.job_places import Command, JobPlaces


@dataclass
class Job:
    """The recorded life of one id of one queue."""

    created: int = 0
    """Times it was stored: more than once is a push that happened twice."""
    unique: str = ""
    key_taken: str = ""
    """The id that lived and held the same unique key when this one was stored."""
    leases: int = 0
    ends: list[str] = field(default_factory=list)
    """`gone` (acknowledged, cancelled, purged), `dead`, `again` (a dead letter put back), in order."""
    stolen: int = 0
    """Ends recorded by somebody who did not hold it."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Results stored of it, each time."""
    silent: bool = False
    """It went, and the same step stored no result."""


class History:
    """The history of one namespace, built while transactions are replayed."""

    def __init__(self, namespace: str = "chaos") -> None:
        """Begin with an empty Redis."""
        self.jobs: dict[str, Job] = {}
        self.processes: dict[str, int] = {}  # identity → pid
        self.taken: list[tuple[str, set[str]]] = []
        """Registrations that ended with jobs still held: the identity, and which jobs went back."""
        self.places = JobPlaces()
        self.writes = 0
        self._prefix = f"{namespace}:".encode()
        self._live: set[str] = set()
        self._holder: dict[str, bytes] = {}
        self._keys: dict[tuple[bytes, bytes], str] = {}

    def apply(self, transaction: list[Command]) -> None:
        """Apply the effects of one script."""
        self.writes += len(transaction)
        released: dict[str, bytes] = {}
        before = set[str]()
        ended: set[str] = set()
        for command in transaction:
            if len(command) < 2:
                continue
            name = command[0].upper()
            queue, kind = self._place(command[1])
            if queue is None:
                continue
            self.places.take(name, queue, kind, command[2:])
            if kind == b"jobs":
                self._on_jobs(name, queue, command[2:], released, before, ended)
            elif kind.startswith(b"leased:"):
                self._on_leased(name, queue, kind[7:], command[2:], released)
            elif kind == b"dead":
                self._on_dead(name, queue, command[2:], released, before)
            elif kind.startswith(b"result:") and name in {b"SET", b"PSETEX", b"SETEX"}:
                self._on_result(queue, kind[7:], command[2], before, ended)
            elif kind.startswith(b"results:") and name in {b"HSET", b"HMSET"}:
                for id_, kept in zip(command[2::2], command[3::2], strict=True):
                    self._on_result(queue, id_, kept.partition(b"\n")[2], before, ended)
        self.places.settle()
        for public in ended:
            self.jobs[public].silent = not self.jobs[public].records

    def _place(self, key: bytes) -> tuple[bytes | None, bytes]:
        if not key.startswith(self._prefix + b"{"):
            return None, b""
        queue, _, kind = key[len(self._prefix) + 1 :].partition(b"}:")
        return queue, kind

    def _on_jobs(
        self, name: bytes, queue: bytes, rest: Command, released: dict[str, bytes], before: set[str], ended: set[str]
    ) -> None:
        if name in {b"HSET", b"HMSET"}:
            for id_, envelope in zip(rest[::2], rest[1::2], strict=True):
                if envelope[:1] == b"x":
                    continue  # a stub: cancelled, and its entry not reached yet
                public = _public(queue, id_)
                job = self.jobs.setdefault(public, Job())
                if public in self._live and b"\tk" in envelope.split(b"\n", 1)[0]:
                    continue  # a call with its key has replaced its arguments
                job.created += 1
                self._live.add(public)
                self._take_key(queue, public, job, envelope)
        elif name == b"HDEL":
            for id_ in rest:
                public = _public(queue, id_)
                job = self.jobs.setdefault(public, Job())
                self._end(public, job, "gone", released, before)
                ended.add(public)
                self._live.discard(public)

    def _take_key(self, queue: bytes, public: str, job: Job, envelope: bytes) -> None:
        marks, *attributes = envelope.split(b"\n", 1)[0].split(b"\t")
        key = next((one[1:] for one in attributes if one.startswith(b"u")), None)
        if key is None or b"x" in marks:
            return
        job.unique = key.decode()
        self._hold_key(queue, public, job, key)

    def _hold_key(self, queue: bytes, public: str, job: Job, key: bytes) -> None:
        if not key:
            return
        holder = self._keys.get((queue, key))
        if holder is not None and holder != public and holder in self._live and not self._is_dead(holder):
            job.key_taken = holder
        self._keys[queue, key] = public

    def _is_dead(self, public: str) -> bool:
        ends = self.jobs[public].ends
        return bool(ends) and ends[-1] == "dead"  # a dead letter gave its key up; put back, it takes it again

    def _end(self, public: str, job: Job, how: str, released: dict[str, bytes], before: set[str]) -> None:
        holder = self._holder.get(public)
        if holder is not None and released.get(public) != holder:
            job.stolen += 1
        if public not in self._live and public not in before:
            job.ends.append(f"{how} again")
            return
        before.add(public)
        job.ends.append(how)

    def _on_leased(self, name: bytes, queue: bytes, worker: bytes, rest: Command, released: dict[str, bytes]) -> None:
        if name in {b"HSET", b"HMSET"}:
            for field_, value in zip(rest[::2], rest[1::2], strict=True):
                if field_ == b"\tabout":
                    self.processes[worker.decode()] = int(json.loads(value).get("pid", 0))
                elif field_[:1] != b"\t":
                    public = _public(queue, field_)
                    self.jobs.setdefault(public, Job()).leases += 1
                    self._holder[public] = worker
        elif name == b"HDEL":
            for id_ in rest:
                public = _public(queue, id_)
                if self._holder.get(public) == worker:
                    released[public] = worker
                    del self._holder[public]
        elif name in {b"DEL", b"UNLINK"}:
            held = {public for public, holder in self._holder.items() if holder == worker}
            if held:
                self.taken.append((worker.decode(), held))
            for public in held:
                released[public] = worker
                del self._holder[public]

    def _on_dead(self, name: bytes, queue: bytes, rest: Command, released: dict[str, bytes], before: set[str]) -> None:
        if name == b"ZADD":
            for id_ in rest[1::2]:
                public = _public(queue, id_)
                self._end(public, self.jobs.setdefault(public, Job()), "dead", released, before)
        elif name == b"ZREM":
            for id_ in rest:
                job = self.jobs.get(public := _public(queue, id_))
                if job is not None and job.ends and job.ends[-1] == "dead":
                    job.ends.append("again")
                    self._hold_key(queue, public, job, job.unique.encode())

    def _on_result(self, queue: bytes, id_: bytes, stored: bytes, before: set[str], ended: set[str]) -> None:
        public = _public(queue, id_)
        job = self.jobs.setdefault(public, Job())
        try:
            record = json.loads(stored)
        except ValueError:
            record = {"status": "unreadable"}
        record["late"] = public not in before and public not in ended and public not in self._live and bool(job.records)
        job.records.append(record)


def _public(queue: bytes, id_: bytes) -> str:
    bare = id_.decode()
    return f"{queue.decode()}:{bare}"


def transactions(chunks: Iterator[bytes]) -> Iterator[list[Command]]:
    """Yield the effects of each script, or of each command by itself."""
    reader = hiredis.Reader()
    within: list[Command] | None = None
    for chunk in chunks:
        reader.feed(chunk)
        while (command := reader.gets()) is not False:
            if not isinstance(command, list) or not command:
                continue
            name = command[0].upper()
            if name == b"MULTI":
                within = []
            elif name == b"EXEC":
                yield within or []
                within = None
            elif within is not None:
                within.append(command)
            else:
                yield [command]


def read_history(directory: Path, namespace: str = "chaos") -> History:
    """Return the history read from the append-only files of a server's directory; raises ValueError without any."""
    files = sorted(directory.glob("appendonlydir/*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    files = files or sorted(directory.glob("appendonly.aof"))
    if not files:
        raise ValueError(f"no append-only file in {directory}")
    history = History(namespace)
    for transaction in transactions(_chunks(files)):
        history.apply(transaction)
    return history


def _chunks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
