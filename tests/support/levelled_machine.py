"""
The state machine of queues, with groups, limits and unique keys besides: `LevelledMachine`, and its model.

Which of several jobs that may start comes first is the scripts' affair (they take turns, by weight). The model is told which were leased, and checks that each
might be: first of its group, room at all of its limits, and nothing of a higher priority left behind. Whatever may start then is
leased by a turn that wants more. All else is the same to the letter, in every place.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from conveyor.store import limits, operations
from conveyor.store.operations import Entry, Settlement, TurnReply
from conveyor.store.script import Call
from support.queue_model import NOW, Job, Model, ModelWorker, Reply
from support.state_machine import ANY, QueueMachine, same_turn

DECLARED = {"two": "c 2 -", "one": "c 1 key", "open": "c 2 key", "few": "r 3 3600000 0 -", "cost": "r 6 3600000 0 key"}
"""The declarations of the code. Time opens no rate here: `LevelledMachine.time_passes` does."""
SHAPES: list[tuple[str | None, tuple[str, ...]]] = [
    ("a", ()), ("a", ()), ("d", ()), ("a", ("1:two",)), ("b", ("1:open:b",)), (None, ("1:two",)), (None, ("1:one:x",)),
    (None, ("1:two", "1:one:y")), (None, ("1:few",)), ("c", ("2:cost:c", "1:two")), (None, ("3:cost:x",)), (None, ("1:unknown",)),
]  # fmt: skip
"""Groups and limits that jobs have."""
KEYS = ["a", "b", "d", "x", "two"]
"""Keys that are paused and weighed: of groups, and of groups that limits make."""


def group_of(job: Job) -> str | None:
    """Return the name of the group in which a job waits."""
    if job.group is not None:
        return "g" + job.group
    names = [one.partition(":")[2] for one in job.limits]
    return "l" + next((name for name in names if ":" in name), names[0]) if names else None


def names_of(job: Job) -> list[str]:
    """Return the limits of a job: that of its group's key first."""
    group = group_of(job)
    assert group is not None
    key = group[1:] if group[0] == "g" else group[1:].partition(":")[2] or group[1:]
    return [":" + key, *(one.partition(":")[2] for one in job.limits)]


class LevelledModel(Model):
    """One queue with groups and limits."""

    def __init__(self) -> None:
        """Begin with what the code declares."""
        super().__init__()
        self.overrides: dict[str, str] = {}
        self.shut: set[str] = set()  # keys that are paused
        self.held: set[str] = set()  # limits that a job holds
        self.passed: dict[str, int] = {}  # rate → the costs of what has started
        self.opened = False  # time has opened a limit, which nobody is told
        self.found: tuple[list[str], set[str], set[str]] = ([], set(), set())
        """Jobs that the turn being carried out has leased; all jobs that are there after it, and the scheduled ones."""

    # -- limits ---------------------------------------------------------------------------------------------------

    def line_of(self, id_: str) -> list[str]:
        """Return the list of its group, or of its priority."""
        job = self.jobs[id_]
        group = group_of(job)
        return super().line_of(id_) if group is None else self.groups.setdefault(f"{job.priority}:{group}", [])

    def definition(self, name: str) -> list[str]:
        """Return kind and numbers of a limit; [""] of one that nobody has declared."""
        base = name.partition(":")[0]
        return (self.overrides.get(name) or self.overrides.get(base) or DECLARED.get(base, "")).split(" ")

    def is_closed(self, job: Job) -> bool:
        """Return whether the group of a job runs one at a time."""
        key = names_of(job)[0]
        opened = any(name.endswith(key) and self.definition(name)[0] == "c" for name in names_of(job)[1:])
        return job.group is not None and not opened

    def taken(self, name: str) -> int:
        """Return how many slots of a limit are taken."""
        return sum(name in names for names in self.slots.values())

    def full_limit(self, id_: str) -> str | None:
        """Return a limit that keeps a job from starting."""
        job = self.jobs[id_]
        if group_of(job) is None:
            return None
        key, *names = names_of(job)
        if key[1:] in self.shut or (self.is_closed(job) and self.taken(key) > 0):
            return key
        for name, cost in zip(names, self.costs(job), strict=True):
            kind, *numbers = self.definition(name)
            if name in self.held or (kind == "c" and self.taken(name) >= int(numbers[0])):
                return name
            if kind == "r" and int(numbers[0]) - self.passed.get(name, 0) < min(cost, int(numbers[0])):
                return name
        return None

    def costs(self, job: Job) -> list[int]:
        """Return what a job pays at its limits."""
        return [int(one.partition(":")[0]) for one in job.limits]

    def startable(self) -> list[str]:
        """Return the jobs that may start, one of each group."""
        lines = [*self.ready.values(), *self.groups.values()]
        firsts = [next((id_ for id_ in line if not self.jobs[id_].stub), None) for line in lines]
        return [id_ for id_ in firsts if id_ is not None and self.full_limit(id_) is None]

    def start(self, id_: str) -> None:
        """Occupy the slots of a job, and pay its rates."""
        job, held = self.jobs[id_], list[str]()
        if group_of(job) is None:
            return
        key, *names = names_of(job)
        if self.is_closed(job):
            held.append(key)
        for name, cost in zip(names, self.costs(job), strict=True):
            kind, *numbers = self.definition(name)
            if kind == "c":
                held.append(name)
            elif kind == "r":
                self.passed[name] = self.passed.get(name, 0) + min(cost, int(numbers[0]))
        if held:
            self.slots[id_] = held

    def replace(self, id_: str, job: Job) -> None:
        """Move the job to the end of another group, where that is another one by now."""
        there = self.jobs[id_]
        line, moves = self.line_of(id_), group_of(there) != group_of(job)
        super().replace(id_, job)
        if moves:
            self.slots.pop(id_, None)
        if moves and id_ in line:
            line.remove(id_)
            self.line_of(id_).append(id_)

    # -- steps ----------------------------------------------------------------------------------------------------

    def told(self) -> bool:
        """Return whether there is a token, or somebody looks, while a job may start."""
        if self.paused or self.token or self.opened:
            return True
        if self.startable():
            return False
        return not self.due or any(member.watching for member in self.members.values())

    def wake(self) -> None:
        """Leave it to the server whether there is a token: a job behind others of its group needs none."""

    def release(self, id_: str, *, ended: bool = False) -> None:
        """Give back the slots, too."""
        self.slots.pop(id_, None)
        super().release(id_, ended=ended)

    def _enter(self, id_: str) -> None:
        # A retry keeps the slot of its key, and goes before what waits.
        line = self.line_of(id_)
        line.insert(0 if self.slots.pop(id_, None) else len(line), id_)

    def _promote_due(self) -> None:
        # A successor that this turn has admitted is due at that instant, a moment after the turn's own perhaps.
        later = {id_: self.due.pop(id_) for id_ in self.found[2] if self.due.get(id_) == NOW}
        super()._promote_due()
        self.due.update(later)

    def _settle(self, member: ModelWorker, kind: str, id_: str, what: Any) -> None:
        if kind == "G":
            name, ms, cost = what
            kind, *numbers = self.definition(name)
            if kind == "r":
                beyond = ms + max(0, cost - int(numbers[0]))
                self.passed[name] = max(0, self.passed.get(name, 0) + beyond)
            return
        if kind == "L":
            name, what = what
            if id_ not in member.cancel:
                self.held.add(name)
        kept = [name for name in self.slots.get(id_, ()) if name[0] == ":"]
        if kind not in {"M", "K"}:
            self.slots.pop(id_, None)
        super()._settle(member, "F" if kind == "L" else kind, id_, what)
        if kind == "R" and kept and id_ in self.due:
            self.slots[id_] = kept

    def vanish(self, ids: set[str]) -> None:
        """Remove what a turn has passed over: cancelled and expired jobs."""
        for line in [*(self.ready[priority] for priority in range(9, -1, -1)), *self.groups.values()]:
            for id_ in [id_ for id_ in line if id_ in ids]:
                line.remove(id_)
                if self.jobs[id_].stub:
                    del self.jobs[id_]
                else:
                    assert self.jobs[id_].expired, f"{id_} is gone"
                    self.end(id_, record=True)

    def leased(self, ids: list[str], gone: set[str], want: int) -> list[str]:
        """Check what a turn has leased and passed over, and do the same."""
        self.vanish(gone)
        for id_ in ids:
            line, priority = self.line_of(id_), self.jobs[id_].priority
            assert line[0] == id_, f"{id_} started before {line[:3]}"
            assert not self.jobs[id_].stub
            assert self.full_limit(id_) is None, f"{id_} started though {self.full_limit(id_)} is full"
            above = [one for one in self.startable() if self.jobs[one].priority > priority]
            assert not above, f"{id_} started before {above}"
            line.remove(id_)
            self.start(id_)
        assert len(ids) >= want or not self.startable(), f"{self.startable()} were left behind"
        return ids

    def turn(self, name: str, want: int, settled: list[tuple[str, str, Any]], *, leave: bool = False) -> Reply:
        """As the model of plain queues; `found` says what is leased."""
        self.opened = self.opened and self.paused
        return super().turn(name, want, settled, leave=leave)

    def _lease(self, want: int, taken: list[str]) -> None:
        ids, kept, _ = self.found
        taken += self.leased(ids, self.jobs.keys() - kept, want)

    def reap(self, name: str, *, crashed: bool, blame: tuple[list[str], list[str]] | None = None) -> int:
        """Give back the slots, too."""
        for id_ in self.members[name].leases:
            self.slots.pop(id_, None)
        return super().reap(name, crashed=crashed, blame=blame)

    def state_of(self, id_: str) -> str:
        """Return where a job is; in a group it waits."""
        found = super().state_of(id_)
        in_group = found == "ready" and any(id_ in line for line in self.groups.values())
        return "waiting" if in_group else found


class LevelledMachine(QueueMachine):
    """Everything that may happen to a plain queue, on one with groups and limits, and what operators change of these."""

    kind = LevelledModel
    model: LevelledModel
    shapes: ClassVar[list[tuple[str | None, tuple[str, ...]]]] = SHAPES

    def __init__(self) -> None:
        super().__init__()
        self.sound = True
        assert self._run(limits.declare_limits(self.keys, DECLARED, replace=True)) == {}

    def _run(self, call: Call[Any]) -> Any:
        self.sound = False
        return super()._run(call)

    def _spec(self, kind: str, pick: int, key: str = "", conflict: str = "") -> tuple[Entry, Job, float | None]:
        entry, job, rank = super()._spec(kind, pick, key, conflict)
        if entry.priority:
            entry.priority = job.priority = 1
        at = (pick + (next(self.count) if pick > 50 else 0)) % (len(self.shapes) + 2)
        if kind != "plain" and at < len(self.shapes):
            entry.group, entry.limits = job.group, job.limits = self.shapes[at]
        return entry, job, rank

    def _settle(self, kind: str, id_: str) -> tuple[Settlement | None, tuple[str, str, Any]]:
        job = self.model.jobs.get(id_, Job())
        if kind not in {"L", "G"}:
            return super()._settle("R" if kind == "R0" else kind, id_)
        name, number = job.limits[-1].partition(":")[2], next(self.count)
        if kind == "G":
            cost = int(job.limits[-1].partition(":")[0])
            ms = max(number % 7 - 3, -cost)
            return Settlement("G", id_, ms, name.encode(), b"%d" % cost), ("G", id_, (name, ms, cost))
        return Settlement("L", id_, 3_600_000, name.encode()), ("L", id_, (name, None))

    def _make_turn(
        self, call: Call[TurnReply], name: str, want: int, told: list[tuple[str, str, Any]], *, leave: bool
    ) -> None:
        found = self._run(call)
        there, due = self.seeded.redis.hkeys(self.keys.jobs), self.seeded.redis.zrange(self.keys.due, 0, -1)
        self.model.found = found.ids, {id_.decode() for id_ in there}, {id_.decode() for id_ in due}
        expected = self.model.turn(name, want, told, leave=leave)
        expected.more, expected.due = found.more, found.next_due is not None
        same_turn(found, expected, paused=self.model.paused)

    @initialize(specs=st.lists(st.tuples(st.just("grouped"), ANY), min_size=4, max_size=10))
    def begin_levelled(self, specs: list[tuple[str, int]]) -> None:
        self.push(1, specs, 0)

    @precondition(
        lambda self: any(self.model.jobs[id_].limits for one in self.model.members.values() for id_ in one.leases)
    )
    @rule(pick=ANY, kind=st.sampled_from("LLG"), want=st.sampled_from([0, 1, 3]))
    def hold_or_charge(self, pick: int, kind: str, want: int) -> None:
        """A job holds its limit for an hour, or was dearer or cheaper than it paid."""
        busy = [
            (name, at)
            for name, member in self.model.members.items()
            for at, id_ in enumerate(member.leases)
            if self.model.jobs[id_].limits
        ]
        name, at = busy[pick % len(busy)]
        self.workers[pick % 3] = name
        self.turn(pick, want, ["keep"] * at + [kind], False, 99, "")

    @precondition(lambda self: self.model.held or self.model.passed)
    @rule(pick=ANY)
    def time_passes(self, pick: int) -> None:
        """A slot that a job held is free, or the window of a rate is over; the alarm of the limit rings, if it has one."""
        names = [*sorted(self.model.held), *self.model.passed]
        name = names[pick % len(names)]
        if name in self.model.held:
            self.model.held.remove(name)
            self.seeded.redis.hset(f"{self.keys.prefix}limits", f"\t{name}", self.base - 1)
        else:
            del self.model.passed[name]
            self.seeded.redis.delete(f"{self.keys.prefix}rate:{name}")
        self.seeded.redis.zadd(self.keys.due, {f"\t{name}": 1}, xx=True)
        self.model.opened = True

    @rule(key=st.sampled_from(KEYS), weight=st.integers(1, 4), paused=st.booleans())
    def set_group(self, key: str, weight: int, paused: bool) -> None:
        """An operator pauses or resumes a key, and weighs it."""
        self._run(limits.set_group(self.keys, key, weight=weight, paused=paused))
        self.model.shut = self.model.shut | {key} if paused else self.model.shut - {key}

    @rule(limit=st.sampled_from(["two", "one", "one:x", "open:b", "few", "cost:x", "reset"]), n=st.integers(0, 4))
    def set_limit(self, limit: str, n: int) -> None:
        """An operator changes how many a limit lets pass, of all keys or of one, or takes back all changes."""
        if limit == "reset":
            self._run(limits.reset_limit(self.keys, None, None))
            self.model.overrides.clear()
            return
        name, _, key = limit.partition(":")
        text = f"c {n}" if DECLARED[name][0] == "c" else f"r {n + 1} 3600000 0"
        self._run(limits.set_limit(self.keys, name, key or None, text))
        self.model.overrides[limit] = text

    def _purge(self, place: str, limit: int) -> None:
        if place not in {"ready", "due"}:
            super()._purge(place, limit)
            return
        model, before = self.model, set(self.model.jobs)
        lines = [model.in_order()] if place == "due" else [*model.ready.values(), *model.groups.values()]
        entries, removed = self._run(operations.purge(self.keys, place, limit))
        gone = before - {id_.decode() for id_ in self.seeded.redis.hkeys(self.keys.jobs)}
        assert (entries, removed) == (len(gone), sum(not model.jobs[id_].stub for id_ in gone))
        assert gone or not any(lines)
        for line in lines:
            assert gone.isdisjoint(line[sum(id_ in gone for id_ in line) :]), "not from the front"
        for id_ in [id_ for line in lines for id_ in line if id_ in gone]:
            model.due.pop(id_, None)
            for line in (*model.ready.values(), *model.groups.values()):
                if id_ in line:
                    line.remove(id_)
            if model.jobs[id_].stub:
                del model.jobs[id_]
            else:
                model.end(id_, record=False)

    @invariant()
    def is_alike(self) -> None:
        """The queue equals the model, groups and slots too, and a worker is told while a job may start."""
        self.model.token = self.seeded.redis.llen(self.keys.wake) == 1
        super().is_alike()
        self.sound = True

    def drain(self) -> None:
        """Let all that waits run to its end; then nothing of groups, limits and keys is left."""
        model = self.model
        if model.paused:
            self.pause_or_resume()
        for key in sorted(model.shut):
            self.set_group(key, 1, False)
        if model.overrides:
            self.set_limit("reset", 0)
        while model.held or model.passed:
            self.time_passes(0)
        for id_ in list(model.due):
            if id_ in model.due:
                self.becomes_due(list(model.due).index(id_), False)
        for _ in range(100):
            if not (len(model.jobs) - len(model.dead)):
                break
            for at, name in enumerate(list(model.members)):
                self.workers[at % 3] = name
                self.turn(at, 0, ["D"] * len(model.members[name].leases), False, 99, "")
            self.turn(0, 1000, [], True, 99, "")
            while model.passed:
                self.time_passes(0)
        self.is_alike()
        assert len(model.jobs) == len(model.dead), f"{sorted(model.jobs.keys() - set(model.dead))} never start"
        left = {key.decode().removeprefix(self.keys.prefix) for key in self.seeded.redis.keys(f"{self.keys.prefix}*")}
        kinds = {name.partition(":")[0] for name in left if not name.startswith("unique:k:t")}
        assert not kinds & {"group", "tickets", "waits", "slots", "limit", "credits", "reruns"}, kinds
        assert not [name for name in left if name.startswith("unique:k:") and name[9] != "t"], "a key outlives its job"

    def teardown(self) -> None:
        """After each example all drains."""
        if self.sound:
            self.drain()
