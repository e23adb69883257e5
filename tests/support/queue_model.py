"""
The reference model of a queue, in plain Python, for the state machine in test_queue_model.py.

Instants are ranks: due ones lie below `NOW`, far ones above, and equal ranks are ordered by id, as Redis does.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

NOW = 1_000_000.0
History = tuple[int, int, int, bytes]
"""Starts, failures, crashes, and + or * behind a crash that was counted before it happened."""
FRESH: History = (0, 0, 0, b"")


@dataclass
class Job:
    """One accepted job; `state` is None while it is fresh."""

    priority: int = 0
    unique: str | None = None
    tags: tuple[str, ...] = ()
    life: str = "d"  # until when the key is held: d done, s start, t a time that is far away
    conflict: str = "k"  # k keep, r replace, x raise, a rerun, b debounce
    body: str = "1"
    rank: float | None = None
    own: bool = False
    expired: bool = False
    stub: bool = False
    state: History | None = None
    group: str | None = None
    limits: tuple[str, ...] = ()  # as they are written: <cost>:<name>[:<key>]


@dataclass
class ModelWorker:
    """One registered worker. `watching`: it left its last turn with room and knows the first due instant."""

    turn: int = 0
    leases: dict[str, int] = field(default_factory=dict)
    cancel: list[str] = field(default_factory=list)
    watching: bool = False


@dataclass
class Reply:
    """The reply to a turn."""

    ids: list[str]
    lost: list[str]
    held: int
    cancelled: list[str]
    more: bool
    due: bool
    states: list[History | None]


class KeyHeld(Exception):
    """A push with a key that another job has is refused whole."""


class Model:
    """One queue."""

    def __init__(self) -> None:
        """Begin empty."""
        self.jobs: dict[str, Job] = {}
        self.ready: dict[int, list[str]] = {priority: [] for priority in range(10)}
        self.groups: dict[str, list[str]] = {}  # <priority>:<group> → the jobs that wait there
        self.slots: dict[str, list[str]] = {}  # job → the limits whose slots it holds
        self.due: dict[str, float] = {}
        self.dead: list[str] = []
        self.members: dict[str, ModelWorker] = {}
        self.unique: dict[str, str] = {}
        self.reruns: dict[str, str] = {}  # job that runs, or comes back → the one that is to run after it
        self.own: dict[str, bool] = {}  # id → kept for a day only
        self.results: set[str] = set()
        self.unstarted: set[str] = set()  # of the results: cancelled before a worker had started them
        self.waiters: dict[str, list[str]] = {}
        self.paused = False
        self.token = False

    # -- what is true of every queue ------------------------------------------------------------------------------

    def length(self) -> int:
        """Return how many jobs are accepted and not finished."""
        return len(self.jobs) - len(self.dead) - self.stubs()

    def stubs(self) -> int:
        """Return how many cancelled jobs still have an entry."""
        return sum(job.stub for job in self.jobs.values())

    def tags(self) -> dict[str, list[str]]:
        """Return the ids that each tag finds, dead letters among them, in the order of the ids."""
        found: dict[str, list[str]] = {}
        for id_ in sorted(self.jobs):
            for tag in () if self.jobs[id_].stub else self.jobs[id_].tags:
                found.setdefault(tag, []).append(id_)
        return found

    def state_of(self, id_: str) -> str:
        """Return where a job is."""
        if id_ in self.due:
            return "scheduled"
        if id_ in self.reruns.values():
            return "waiting"
        return "dead" if id_ in self.dead else "leased" if self.holder(id_) is not None else "ready"

    def line_of(self, id_: str) -> list[str]:
        """Return the list in which a job waits to be leased."""
        return self.ready[self.jobs[id_].priority]

    def in_order(self) -> list[str]:
        """Return the scheduled ids, earliest first."""
        return sorted(self.due, key=lambda id_: (self.due[id_], id_))

    def holder(self, id_: str) -> str | None:
        """Return the worker that holds a job."""
        return next((name for name, member in self.members.items() if id_ in member.leases), None)

    def told(self) -> bool:
        """
        Return whether no worker waits while there is work.

        On a queue that is not paused: while an entry stands in ready, a wake token is there; while anything is
        scheduled, a token is there or a worker watches the clock that had room when it learned of the first instant.
        """
        if self.paused or self.token:
            return True
        if any(self.ready.values()):
            return False
        return not self.due or any(member.watching for member in self.members.values())

    def wake(self) -> None:
        """Leave one token."""
        self.token = True

    # -- ends -----------------------------------------------------------------------------------------------------

    def release(self, id_: str, *, ended: bool = False) -> None:
        """Give back the unique key, and let the job take its place that waits for it; keep the own id for a day."""
        job = self.jobs[id_]
        successor = self.reruns.pop(id_, None)
        if job.unique and self.unique.get(job.unique) == id_:
            if successor is not None:
                self.unique[job.unique] = successor
            elif not (ended and job.life == "t"):
                del self.unique[job.unique]
        if successor is not None:
            self._admit(successor)
        if job.own and id_ in self.own:
            self.own[id_] = True

    def _admit(self, id_: str) -> None:
        job = self.jobs[id_]
        assert job.unique is not None
        if job.life != "t":
            self.unique.setdefault(job.unique, id_)
        if job.rank is not None and job.rank > NOW:
            self.due[id_] = job.rank
        elif job.group or job.limits:
            self.due[id_] = NOW  # the next turn puts it into its group
        else:
            self._enter(id_)
        self.wake()

    def _enter(self, id_: str) -> None:
        """Let a successor, or a job that was scheduled, wait to be leased."""
        self.line_of(id_).append(id_)

    def end(self, id_: str, *, record: bool, ended: bool = False) -> None:
        """Remove a job."""
        self.release(id_, ended=ended)
        del self.jobs[id_]
        self.waiters.pop(id_, None)
        if record:
            self.results.add(id_)
            self.unstarted.discard(id_)

    # -- steps ----------------------------------------------------------------------------------------------------

    def push(
        self, id_: str, job: Job, rank: float | None, front: bool, beside: Container[str] = ()
    ) -> tuple[str, str | None]:
        """
        Accept one message; return its id or the one that is there already, and what was done then. Raises KeyHeld.

        Those *beside* it, which the same push has stored or changed before, have not expired yet.
        """
        job.rank = rank
        if job.own and (id_ in self.own or id_ in self.jobs):
            return id_, "kept"
        if (holder := self._key_holder(job, beside)) is not None:
            return self._meet(holder, id_, job)
        self._store(id_, job)
        if job.unique:
            self.unique[job.unique] = id_
        if rank is not None:
            self.due[id_] = rank
            if self.in_order()[0] == id_:
                self.wake()
        else:
            line = self.line_of(id_)
            line.insert(0 if front else len(line), id_)
            self.wake()
        return id_, None

    def _key_holder(self, job: Job, beside: Container[str] = ()) -> str | None:
        """Return the job that has the key of another one; one that expired while it waited has none, unless it has a successor."""
        holder = self.unique.get(job.unique) if job.unique else None
        if holder is None or (there := self.jobs.get(holder)) is None:
            return holder if job.life == "t" else None
        keeps = not there.expired or holder in beside or there.stub or holder in self.dead or holder in self.reruns
        return holder if keeps or self.holder(holder) is not None else None

    def _store(self, id_: str, job: Job) -> None:
        self.jobs[id_] = job
        if job.own:
            self.own[id_] = False
            self.results.discard(id_)
            self.unstarted.discard(id_)

    def _meet(self, holder: str, id_: str, job: Job) -> tuple[str, str | None]:
        """Carry out the policy of a push whose key another job has."""
        if job.conflict == "x":
            raise KeyHeld
        there = self.jobs.get(holder)
        if job.conflict == "k" or there is None or there.stub or holder in self.dead:
            return holder, "kept"
        if (successor := self.reruns.get(holder)) is not None:
            self.replace(successor, job)
            return successor, "rerun"
        runs = self.holder(holder) is not None
        if there.body == job.body and (job.conflict == "r" or (job.conflict == "a" and not runs)):
            return holder, "kept"
        if runs:
            self._store(id_, job)
            self.reruns[holder] = id_
            return id_, "rerun"
        self.replace(holder, job)
        if job.conflict == "b" and holder in self.due and job.rank is not None:
            self.due[holder] = job.rank
            if self.in_order()[0] == holder:
                self.wake()
        return holder, "replaced"

    def replace(self, id_: str, job: Job) -> None:
        """Give a job that waits what another one was pushed with."""
        there = self.jobs[id_]
        there.body, there.expired, there.group, there.limits = job.body, job.expired, job.group, job.limits

    def turn(self, name: str, want: int, settled: list[tuple[str, str, Any]], *, leave: bool = False) -> Reply:
        """Settle (kind, id, state or rank of a retry with state)… and lease up to *want*."""
        member = self.members[name]
        member.turn += 1
        lost = [id_ for _, id_, _ in settled if id_ not in member.leases]
        for kind, id_, what in settled:
            if id_ in member.leases:
                self._settle(member, kind, id_, what)
        cancelled = [id_ for id_ in dict.fromkeys(member.cancel) if id_ in member.leases]
        if not cancelled:
            member.cancel = []
        self._promote_due()
        taken: list[str] = []
        if not self.paused:
            self._lease(want, taken)
        for id_ in taken:
            key = self.jobs[id_].unique
            if key is not None and self.jobs[id_].life == "s" and self.unique.get(key) == id_:
                del self.unique[key]
        for place, id_ in enumerate(taken, 1):
            member.leases[id_] = member.turn * 8192 + place
        more = self._wakes_another(member, want, taken, leave=leave and not member.leases)
        states = [self.jobs[id_].state for id_ in taken]
        held = len(member.leases)
        if leave and not held:
            del self.members[name]
        return Reply(taken, lost, held, cancelled, more, bool(self.due) and not self.paused, states)

    def _lease(self, want: int, taken: list[str]) -> None:
        for priority in range(9, -1, -1):
            while self.ready[priority] and len(taken) < want:
                self._take(self.ready[priority].pop(0), taken)

    def _promote_due(self) -> None:
        for id_ in [id_ for id_ in self.in_order() if self.due[id_] <= NOW]:
            del self.due[id_]
            self._enter(id_)

    def _settle(self, member: ModelWorker, kind: str, id_: str, what: Any) -> None:
        if kind == "M":
            self.jobs[id_].state = what
            return
        if kind == "K":
            if id_ in member.cancel:
                member.cancel.append(id_)
            return
        del member.leases[id_]
        if kind in {"done", "kept", "D", "C"}:
            self.end(id_, record=kind != "done", ended=kind != "C")
        elif kind == "X":
            self.jobs[id_].state = what
            self.release(id_, ended=True)
            self.waiters.pop(id_, None)
            self.dead.append(id_)
        elif id_ in member.cancel:  # a retry or a return: it ends cancelled
            self.end(id_, record=True)
            if kind == "F" and what is None:
                self.unstarted.add(id_)
        elif kind == "R":
            self.due[id_], self.jobs[id_].state = what
        else:
            if what is not None:
                self.jobs[id_].state = what
            self.line_of(id_).insert(0, id_)

    def _take(self, id_: str, taken: list[str]) -> None:
        if self.jobs[id_].stub:
            del self.jobs[id_]
        elif self.jobs[id_].expired:
            self.end(id_, record=True)
        else:
            taken.append(id_)

    def _wakes_another(self, member: ModelWorker, want: int, taken: list[str], *, leave: bool) -> bool:
        member.watching = False
        if self.paused:
            return False
        if leave or len(taken) >= want:
            more = any(self.ready.values())
            if more or self.due:
                self.wake()
            return more
        member.watching = True
        return False

    def again(self, name: str) -> list[str]:
        """Return what a repeat of the last turn gets: the jobs of that turn which are still held."""
        member = self.members[name]
        places = {place: id_ for id_, place in member.leases.items() if place // 8192 == member.turn}
        return [places[place] for place in sorted(places)]

    def reap(self, name: str, *, crashed: bool, blame: tuple[list[str], list[str]] | None = None) -> int:
        """Remove a worker, with a crash for all it held or for those in *blame*; return how many jobs came back."""
        member = self.members.pop(name)
        returned = 0
        for id_ in sorted(member.leases, key=lambda one: -member.leases[one]):
            job = self.jobs[id_]
            if id_ in member.cancel:
                self.end(id_, record=True)
                continue
            starts, failures, crashes, doubt = job.state or FRESH
            charged = crashed if blame is None else id_ in blame[0] or (id_ in blame[1] and doubt != b"*")
            crashes = max(crashes, 1) if charged else crashes - len(doubt)
            job.state = (starts + 1, failures, crashes, b"")
            self.line_of(id_).insert(0, id_)
            returned += 1
        self.wake_for_the_rest()
        return returned

    def wake_for_the_rest(self) -> None:
        """Wake a worker when anything is ready or scheduled, as a reap does."""
        if self.due or any(self.ready.values()):
            self.wake()

    def extend(self, name: str, id_: str, new: str) -> bool:
        """Move a lease to an identity of its own."""
        member = self.members.get(name)
        if member is None or id_ not in member.leases:
            return False
        place = member.leases.pop(id_)
        self.members[new] = ModelWorker(0, {id_: -abs(place)}, [id_] if id_ in member.cancel else [])
        return True

    def cancel(self, id_: str, *, delete: bool) -> int:
        """Cancel or delete; return what cancel.lua does."""
        job = self.jobs.get(id_)
        if job is None and not delete and id_ in self.unstarted:
            return 4
        if job is None or job.stub:
            return 0 if id_ in self.results else -2
        if id_ in self.dead and not delete:
            return 0
        holder = self.holder(id_)
        if holder is not None:
            if delete:
                return -1
            if self.members[holder].cancel.count(id_) > 1:
                return 3
            if id_ not in self.members[holder].cancel:
                self.members[holder].cancel.append(id_)
            return 2
        follows = next((first for first, last in self.reruns.items() if last == id_), None)
        if follows is not None:
            del self.reruns[follows]
        if follows is not None or id_ in self.due or id_ in self.dead:
            self.due.pop(id_, None)
            if id_ in self.dead:
                self.dead.remove(id_)
            self.end(id_, record=not delete)
            return 1
        self.release(id_)
        self.waiters.pop(id_, None)
        if not delete:
            self.results.add(id_)
            self.unstarted.discard(id_)
        self.jobs[id_] = Job(job.priority, stub=True, group=job.group, limits=job.limits)
        return 1

    def redrive(self, ids: list[str]) -> int:
        """Put dead letters back."""
        found: list[str] = []
        for id_ in dict.fromkeys(one for one in ids if one in self.dead):
            job = self.jobs[id_]
            if job.life != "t" and self._key_holder(job) not in {None, id_}:
                continue
            found.append(id_)
            self.dead.remove(id_)
            if job.unique and job.life != "t":
                self.unique[job.unique] = id_
            job.state = ((job.state or FRESH)[0], 0, 0, b"")
            if job.own:
                self.own[id_] = False
            self.line_of(id_).append(id_)
        if found:
            self.wake()
        return len(found)

    def promote(self, id_: str) -> bool:
        """Make a scheduled job ready."""
        if id_ not in self.due:
            return False
        del self.due[id_]
        self._enter(id_)
        self.wake()
        return True

    def front(self, limit: int) -> list[str]:
        """Return that many ready jobs, and the entries of cancelled ones that stand before them."""
        ids: list[str] = []
        for id_ in (id_ for priority in range(9, -1, -1) for id_ in self.ready[priority]):
            if limit == 0:
                break
            ids.append(id_)
            limit -= not self.jobs[id_].stub
        return ids

    def purge(self, place: str, limit: int) -> tuple[int, int]:
        """Remove one batch; return (entries, jobs)."""
        if place == "rerun":
            ids = list(self.reruns.values())[:limit]
            self.reruns = dict(list(self.reruns.items())[limit:])
        elif place == "ready":
            ids = self.front(limit)
        else:
            ids = (self.in_order() if place == "due" else list(self.dead))[:limit]
        removed = 0
        for id_ in ids:
            for entries in (*self.ready.values(), self.dead):
                if id_ in entries:
                    entries.remove(id_)
            self.due.pop(id_, None)
            if self.jobs[id_].stub:
                del self.jobs[id_]
            else:
                removed += 1
                self.end(id_, record=False)
        return len(ids), removed

    def configure(self, *, paused: bool) -> None:
        """Pause or resume."""
        self.paused = paused
        self.wake()

    def wait(self, id_: str, channel: str) -> str:
        """Read an outcome or wait for it; return await_result.lua's word."""
        if id_ in self.results:
            return "result"
        if id_ not in self.jobs or self.jobs[id_].stub:
            return "gone"
        if id_ in self.dead:
            return "dead"
        channels = self.waiters.setdefault(id_, [])
        if channel not in channels:
            channels.append(channel)
        return "waiting"

    def forget(self, id_: str, channel: str) -> None:
        """Stop waiting."""
        rest = [one for one in self.waiters.pop(id_, []) if one != channel]
        if rest:
            self.waiters[id_] = rest

    # -- compared with the real thing -----------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return everything that must be equal to what `reading.read` finds."""
        return {
            "jobs": {id_: job.stub for id_, job in self.jobs.items()},
            "ready": {priority: list(ids) for priority, ids in self.ready.items() if ids},
            "groups": {name: list(ids) for name, ids in self.groups.items() if ids},
            "slots": {id_: list(names) for id_, names in self.slots.items()},
            "due": self.in_order(),
            "dead": list(self.dead),
            "leased": {
                name: (member.turn, dict(member.leases), list(member.cancel)) for name, member in self.members.items()
            },
            "state": {id_: job.state for id_, job in self.jobs.items() if job.state is not None},
            "unique": dict(self.unique),
            "reruns": dict(self.reruns),
            "bodies": {id_: job.body for id_, job in self.jobs.items() if not job.stub},
            "own": dict(self.own),
            "tags": self.tags(),
            "results": set(self.results),
            "waiters": {id_: list(channels) for id_, channels in self.waiters.items()},
            "stubs": self.stubs(),
            "paused": self.paused,
            "token": self.token,
        }
