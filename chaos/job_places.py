"""Where each job is, by every step that Redis recorded: between two steps a job is in exactly one place."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

Command = list[bytes]
FRONT, BACK = {b"LPUSH", b"LPUSHX"}, {b"RPUSH", b"RPUSHX"}
GONE = {b"DEL", b"UNLINK"}
ZADD_OPTIONS = {b"NX", b"XX", b"GT", b"LT", b"CH"}
BOUNDS = {b"narrow": 40}
"""Queue → its `max_length` in the program under test."""


@dataclass
class QueuePlaces:
    """One queue: which jobs it knows, and the four kinds of places where one may be."""

    jobs: set[bytes] = field(default_factory=set)
    """Those with a record: living, dead, or cancelled with their entry still in line."""
    stubs: set[bytes] = field(default_factory=set)
    """Those of them that are cancelled."""
    ready: dict[bytes, deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    entries: Counter[bytes] = field(default_factory=Counter)
    due: set[bytes] = field(default_factory=set)
    dead: set[bytes] = field(default_factory=set)
    leased: dict[bytes, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    holders: Counter[bytes] = field(default_factory=Counter)
    successors: dict[bytes, bytes] = field(default_factory=dict)
    """Job → the one that runs after it, and waits for its end."""

    @property
    def unfinished(self) -> int:
        """The number of jobs that `max_length` bounds."""
        return len(self.jobs) - len(self.dead) - len(self.stubs)

    def where(self, id_: bytes) -> list[str]:
        """Return the places of a job."""
        found = ["ready"] * self.entries[id_] + ["leased"] * self.holders[id_]
        found += ["behind another"] * list(self.successors.values()).count(id_) if self.successors else []
        return found + ["due"] * (id_ in self.due) + ["dead"] * (id_ in self.dead)


class JobPlaces:
    """The places of all jobs of all queues. `findings` tell after which step a job was nowhere, or in two places."""

    def __init__(self) -> None:
        """Begin with an empty Redis."""
        self.findings: list[str] = []
        self._queues: dict[bytes, QueuePlaces] = defaultdict(QueuePlaces)
        self._touched: set[tuple[bytes, bytes]] = set()
        self._wrong: set[tuple[bytes, bytes]] = set()

    def take(self, name: bytes, queue: bytes, kind: bytes, rest: Command) -> None:
        """Apply one command on the key *kind* of *queue*; *rest* are its arguments after the key."""
        places = self._queues[queue]
        if kind == b"jobs":
            touched = self._on_jobs(places, name, rest)
            if (most := BOUNDS.get(queue)) is not None and places.unfinished > most:
                self.findings.append(f"{queue.decode()} held {places.unfinished} jobs, and takes {most}")
        elif kind.startswith((b"ready:", b"group:")):
            touched = [one for one in self._on_line(places, name, kind, rest) if one[:1] != b"\t"]  # that is a ticket
        elif kind == b"reruns":
            touched = self._on_reruns(places, name, rest)
        elif kind in {b"due", b"dead"}:
            touched = self._on_scores(places.due if kind == b"due" else places.dead, name, rest)
        elif kind.startswith(b"leased:"):
            touched = self._on_leased(places, name, kind[7:], rest)
        else:
            return
        self._touched.update((queue, id_) for id_ in touched)

    def settle(self) -> None:
        """A step is over: each job it touched must be in one place now."""
        for queue, id_ in self._touched:
            places = self._queues[queue]
            where, known = places.where(id_), id_ in places.jobs
            if len(where) != known and (queue, id_) not in self._wrong:
                self._wrong.add((queue, id_))
                place = f"{' and '.join(where) or 'nowhere'}{'' if known else ', and no job'}"
                self.findings.append(f"{queue.decode()}:{id_.decode()} was {place} between two steps")
        self._touched.clear()

    @staticmethod
    def _on_jobs(places: QueuePlaces, name: bytes, rest: Command) -> list[bytes]:
        if name in {b"HSET", b"HMSET"}:
            places.jobs.update(rest[::2])
            for id_, envelope in zip(rest[::2], rest[1::2], strict=True):
                (places.stubs.add if envelope[:1] == b"x" else places.stubs.discard)(id_)
            return rest[::2]
        gone = list(places.jobs) if name in GONE else rest if name == b"HDEL" else []
        places.jobs.difference_update(gone)
        places.stubs.difference_update(gone)
        return gone

    @staticmethod
    def _on_reruns(places: QueuePlaces, name: bytes, rest: Command) -> list[bytes]:
        if name in {b"HSET", b"HMSET"}:
            places.successors.update(zip(rest[::2], rest[1::2], strict=True))
            return rest[1::2]
        gone = list(places.successors) if name in GONE else rest if name == b"HDEL" else []
        return [places.successors.pop(id_) for id_ in gone if id_ in places.successors]

    @staticmethod
    def _on_line(places: QueuePlaces, name: bytes, kind: bytes, rest: Command) -> list[bytes]:
        line = places.ready[kind]
        moved: list[bytes] = []
        if name in FRONT:
            line.extendleft(rest)
            places.entries.update(rest)
            return rest
        if name in BACK:
            line.extend(rest)
            places.entries.update(rest)
            return rest
        if name in {b"LPOP", b"RPOP"} or name in GONE:
            take = line.pop if name == b"RPOP" else line.popleft
            count = len(line) if name in GONE else int(rest[0]) if rest else 1
            moved = [take() for _ in range(min(count, len(line)))]
            places.entries.subtract(moved)
        elif name == b"LTRIM":  # of scripts, which keep a list from some entry on
            moved = [line.popleft() for _ in range(min(int(rest[0]), len(line)))]
            places.entries.subtract(moved)
        return moved

    @staticmethod
    def _on_scores(members: set[bytes], name: bytes, rest: Command) -> list[bytes]:
        rest = [word for word in rest if word[:1] != b"\t"] if name == b"ZREM" else rest  # alarms of limits are no jobs
        if name == b"ZADD":
            pairs = rest[next(at for at, word in enumerate(rest) if word.upper() not in ZADD_OPTIONS) :]
            added = [member for member in pairs[1::2] if member[:1] != b"\t"]
            members.update(added)
            return added
        gone = list(members) if name in GONE else rest if name == b"ZREM" else []
        members.difference_update(gone)
        return gone

    @staticmethod
    def _on_leased(places: QueuePlaces, name: bytes, worker: bytes, rest: Command) -> list[bytes]:
        held = places.leased[worker]
        ids: list[bytes] = []
        if name in {b"HSET", b"HMSET"}:
            ids = [id_ for id_ in rest[::2] if id_[:1] != b"\t" and id_ not in held]
            held.update(ids)
            places.holders.update(ids)
        elif name in GONE or name == b"HDEL":
            ids = [id_ for id_ in (list(held) if name in GONE else rest) if id_ in held]
            held.difference_update(ids)
            places.holders.subtract(ids)
        return ids
