"""Random steps on a real queue and on the model; after each of them both must be alike."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conveyor.errors import Duplicate, QueueFull
from conveyor.payload.records import JobKey, write_attributes, write_envelope
from conveyor.store import inspection, operations
from conveyor.store.job_filter import JobFilter, Walk
from conveyor.store.operations import (
    Entry,
    ProducerSequence,
    Settlement,
    StalePush,
    StaleTurn,
    TurnReply,
    TurnReport,
    WorkerUnregistered,
)
from conveyor.store.script import Call
from support.queue_model import FRESH, History, Job, KeyHeld, Model, ModelWorker, Reply
from support.queue_snapshot import history, read
from support.seeded_queue import LEASE, REST, SeededQueue

KINDS = ["keep", "done", "done", "D", "C", "X", "R0", "R", "F", "F-", "M", "M*", "K"]
SPECS = [
    "plain",
    "plain",
    "urgent",
    "later",
    "zero",
    "unique",
    "keyed",
    "keyed",
    "keyed",
    "own",
    "expired",
    "front",
    "tagged",
    "all",
]
CONFLICTS: dict[str, Any] = {"k": "keep", "r": "replace", "x": "raise", "a": "rerun", "b": "debounce"}
LIVES: dict[str, Any] = {"d": "done", "s": "start", "t": "time"}
STATES = ["scheduled", "ready", "leased", "dead"]
ANY = st.integers(0, 99)


def same_turn(found: TurnReply, expected: Reply, *, paused: bool) -> None:
    """Compare what a turn answered with what the model says."""
    states = [None if not state or state.startswith(b"0 0 0 \th") else history(state) for state in found.states]
    assert (found.ids, found.lost, found.held, found.cancelled) == (
        expected.ids, expected.lost, expected.held, expected.cancelled,
    )  # fmt: skip
    assert states == (expected.states if found.states else []), (states, expected.states)
    assert found.states or not any(expected.states)
    assert (found.more, found.next_due is not None, found.paused) == (expected.more, expected.due, paused)


class QueueMachine(RuleBasedStateMachine):
    """Three workers, two producers, and people who cancel, purge, pause, redrive; calls arrive twice and late."""

    seeded: ClassVar[SeededQueue]
    kind: ClassVar[type[Model]] = Model

    def __init__(self) -> None:
        super().__init__()
        self.seeded.redis.flushall(asynchronous=False)
        self.keys = self.seeded.keys
        self.model = self.kind()
        self.base = self.seeded.now()
        self.count = itertools.count(1)
        self.lanes = [ProducerSequence("L0"), ProducerSequence("L1")]
        self.pushed: list[list[tuple[Call[Any], list[str]]]] = [[], []]
        self.workers = [self._hire(n) for n in range(3)]
        self.gone: list[str] = []
        self.turns: dict[str, list[Call[Any]]] = {}
        self.ends: list[str] = []  # who died, in order

    def _hire(self, index: int) -> str:
        name = f"w{index}-{next(self.count)}"
        self.seeded.register(name)
        self.model.members[name] = ModelWorker()
        return name

    def _worker_at(self, pick: int) -> str:
        """Return the worker at an index; one that was reaped there or has left comes back under a new identity."""
        index = pick % 3
        if self.workers[index] not in self.model.members:
            self.workers[index] = self._hire(index)
        return self.workers[index]

    def _any(self, pick: int) -> str:
        ids = list(self.model.jobs) or ["ghost"]
        return "ghost" if pick == 99 else ids[pick % len(ids)]

    @contextmanager
    def _refused(self, error: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
        try:
            yield
        except error:
            return
        raise AssertionError(f"{error} was expected")

    def _run(self, call: Call[Any]) -> Any:
        return self.seeded.run(call)

    # -- producers ------------------------------------------------------------------------------------------------

    def _spec(self, kind: str, pick: int, key: str = "", conflict: str = "") -> tuple[Entry, Job, float | None]:
        number = next(self.count)
        entry, job, rank = Entry(f"j{number:04}", REST), Job(), None
        if kind in {"urgent", "all"}:
            entry.priority = job.priority = 1 + pick % 9
        if kind in {"later", "all"}:
            entry.due_at_ms, rank = self.base + 10**9 + number, 2e6 + number
        if kind == "zero":
            entry.delay_ms = 0
        if kind in {"unique", "all"}:
            entry.unique = job.unique = f"k{pick % 2}"
        if kind in {"own", "all"}:
            entry.id, entry.own_id, job.own = f"own{pick % 6}", True, True
        if kind == "expired":
            entry.expires_ms, job.expired = 0, True
        if kind in {"tagged", "all"} or (pick % 5 == 0 and kind != "plain"):
            entry.tags = job.tags = (("a",), ("b", "a"))[pick % 2]
        if kind == "keyed":
            life = "ddst"[pick % 4]
            job.unique, job.conflict = key or f"{life}{pick % 8 // 4}", conflict or "kraaxb"[pick // 4 % 6]
            job.life, job.body = job.unique[0], str((pick + number) % 3)
            job.conflict = "r" if job.conflict == "b" and job.life != "s" else job.conflict
            entry.rest = write_envelope("", job.body.encode())
            entry.keys = (self._key(job),)
            if job.conflict == "b":
                entry.delay_ms, rank = 5 * 10**9 + number * 1000, 5e6 + number
            if pick > 90:
                entry.expires_ms, job.expired = 0, True
            elif pick > 80:
                entry.priority = job.priority = 2
        entry.front = kind == "front"
        return entry, job, rank

    def _attributes(self, job: Job) -> str:
        keys = () if job.unique is None else (self._key(job),)
        return write_attributes(keys=keys, tags=job.tags, group=job.group, limits=job.limits)

    def _key(self, job: Job) -> JobKey:
        assert job.unique is not None
        return JobKey(job.unique, LIVES[job.life], 10**9 if job.life == "t" else None, CONFLICTS[job.conflict])

    @rule(
        lane=ANY,
        specs=st.lists(st.tuples(st.sampled_from(SPECS), ANY), min_size=1, max_size=4),
        room=st.integers(0, 20),
    )
    def push(self, lane: int, specs: list[tuple[str, int]], room: int, plain: bool = False) -> None:
        self._push(lane, [self._spec(kind, pick) for kind, pick in specs], room, plain)

    def _push(self, lane: int, made: list[tuple[Entry, Job, float | None]], room: int, plain: bool = False) -> None:
        maximum, sender = self.model.length() + room if 0 < room <= 3 else 0, self.lanes[lane % 2]
        if plain:
            pairs = [part for entry, _, _ in made for part in (entry.id, entry.rest)]
            call: Call[Any] = operations.push_plain(self.keys, sender, pairs, max_length=maximum)
        else:
            call = operations.push(self.keys, sender, [entry for entry, _, _ in made], max_length=maximum)
        before = deepcopy(self.model) if maximum or any(job.conflict == "x" for _, job, _ in made) else self.model
        try:
            answers: list[tuple[str, str | None]] = []
            for entry, job, rank in made:
                answers.append(self.model.push(entry.id, job, rank, entry.front, {id_ for id_, _ in answers}))
        except KeyHeld:
            self.model = before
            with self._refused(Duplicate):
                self._run(call)
            return
        if maximum and self.model.length() > maximum:
            self.model = before
            with self._refused(QueueFull):
                self._run(call)
            return
        expected = [id_ for id_, _ in answers]
        found = self._run(call)
        assert found == (False if call.script is operations.PUSH_PLAIN else expected)
        assert plain or [getattr(id_, "conflict", None) for id_ in found] == [conflict for _, conflict in answers]
        self.pushed[lane % 2].append((call, expected))

    @precondition(lambda self: self.model.unique)
    @rule(
        lane=ANY, pick=ANY, runs=st.booleans(), conflicts=st.lists(st.sampled_from("rraaabk"), min_size=1, max_size=3)
    )
    def push_the_same(self, lane: int, pick: int, runs: bool, conflicts: list[str]) -> None:
        """Calls meet a job that has their key, which a worker holds where there is such a one."""
        held = [key for key, id_ in self.model.unique.items() if self.model.holder(id_) is not None]
        keys = held if runs and held else list(self.model.unique)
        key = keys[pick % len(keys)]
        if key[0] in LIVES:
            made = [self._spec("keyed", pick, key, conflict) for conflict in conflicts]
            self._push(lane, made, 0)

    @rule(lane=ANY, count=st.integers(1, 3), room=st.integers(0, 20), late=st.integers(0, 9))
    def push_plain(self, lane: int, count: int, room: int, late: int) -> None:
        """The short script; now and then an older copy arrives behind it, and then its own."""
        self.push(lane, [("plain", 0)] * count, room, plain=True)
        if late < 4:
            self.push_again(lane, 61 + late)
            self.push_again(lane, 0)

    @initialize(specs=st.lists(st.tuples(st.sampled_from(SPECS), ANY), min_size=3, max_size=8))
    def begin(self, specs: list[tuple[str, int]]) -> None:
        self.push(0, specs, 0)

    @rule(lane=ANY, which=ANY)
    def push_again(self, lane: int, which: int) -> None:
        sent = self.pushed[lane % 2]
        if not sent:
            return
        call, expected = sent[-1 - which % len(sent)] if which > 60 else sent[-1]
        if call is sent[-1][0]:
            assert self._run(call) == (False if call.script is operations.PUSH_PLAIN else expected)
        else:
            # The script for plain messages looks at the room first: refused is refused.
            with self._refused((StalePush, QueueFull) if call.script is operations.PUSH_PLAIN else (StalePush,)):
                self._run(call)

    # -- workers --------------------------------------------------------------------------------------------------

    def _after(self, id_: str, kind: str) -> History:
        starts, failures, crashes, _ = self.model.jobs[id_].state or FRESH
        doubt = {"M": b"+", "M*": b"*"}.get(kind, b"")
        return (starts + 1, failures + (kind in {"R0", "R", "X"}), crashes + len(doubt), doubt)

    def _settle(self, kind: str, id_: str) -> tuple[Settlement | None, tuple[str, str, Any]]:
        """Return what is sent (None: simply done) and what the model is told."""
        job = self.model.jobs.get(id_, Job())
        if kind == "done" and not (job.own or job.tags):
            return None, ("done", id_, None)
        if kind in {"F-", "K"}:
            return Settlement(kind[0], id_), (kind[0], id_, None)
        letter = "D" if kind == "done" else kind[0]
        after = self._after(id_, kind) if id_ in self.model.jobs else FRESH
        number = next(self.count)
        sent = Settlement(letter, id_, 0, b"{}", b"%d %d %d%b" % after, self._attributes(job), job.own)
        if letter in "DC":
            sent.ms = 600_000
        if letter != "R":
            return sent, (letter, id_, after)
        sent.ms = 0 if kind == "R0" else 2 * 10**9 + number * 10_000
        return sent, ("R", id_, (1e6 if kind == "R0" else 3e6 + number, after))

    @rule(
        index=ANY, want=st.sampled_from([0, 1, 2, 3, 1000]), kinds=st.lists(st.sampled_from(KINDS), max_size=8),
        woken=st.booleans(), foreign=ANY, flags=st.sampled_from(["", "", "l", "k", "t", "kt"]),
    )  # fmt: skip
    def turn(self, index: int, want: int, kinds: list[str], woken: bool, foreign: int, flags: str) -> None:
        name = self._worker_at(index)
        member = self.model.members[name]
        if woken:  # an idle worker takes the token, then makes its turn
            self.seeded.take_token()
            self.model.token = False
        chosen = [(kind, id_) for kind, id_ in zip(kinds, list(member.leases), strict=False) if kind != "keep"]
        if foreign < 10 and (stranger := self._any(foreign)) not in member.leases:
            chosen.append((KINDS[1 + foreign], stranger))
        if 50 < foreign < 60 and chosen:  # a job that is settled twice in one report
            chosen.append((KINDS[foreign - 49], chosen[0][1]))
        pairs = [self._settle(kind, id_) for kind, id_ in chosen]
        report = TurnReport(others=[sent for sent, _ in pairs if sent is not None])
        for id_ in [told[1] for sent, told in pairs if sent is None]:
            report.add_done(id_, self._attributes(self.model.jobs.get(id_, Job())))
        if woken:
            report.results = dict.fromkeys(report.done, (600_000, b"{}"))
            pairs = [(None, ("kept", told[1], None)) if sent is None else (sent, told) for sent, told in pairs]
        told = [told for sent, told in pairs if sent is None] + [told for sent, told in pairs if sent is not None]
        call = operations.turn(self.keys, name, member.turn + 1, want, LEASE, report, flags=flags)
        buried = len(self.model.dead)

        self._make_turn(call, name, want, told, leave="t" in flags)

        self.turns.setdefault(name, []).append(call)
        if name not in self.model.members:
            self.gone.append(name)
        for id_ in self.model.dead[buried:]:  # so that no two die in the same millisecond
            self.seeded.redis.zadd(self.keys.dead, {id_: self.base - 10**6 + next(self.count)})

    def _make_turn(
        self, call: Call[TurnReply], name: str, want: int, told: list[tuple[str, str, Any]], *, leave: bool
    ) -> None:
        expected = self.model.turn(name, want, told, leave=leave)
        found = self._run(call)
        same_turn(found, expected, paused=self.model.paused)

    @precondition(lambda self: any(self.model.ready.values()) or any(self.model.groups.values()))
    @rule(index=ANY, want=st.sampled_from([1, 1, 2, 3, 1000]))
    def lease(self, index: int, want: int) -> None:
        """A worker with room takes the token, then what there is."""
        self.turn(index, want, [], True, 99, "")

    @precondition(lambda self: any(member.leases for member in self.model.members.values()))
    @rule(pick=ANY, want=st.sampled_from([0, 1, 2]), kinds=st.lists(st.sampled_from(KINDS[1:]), min_size=1, max_size=5))
    def settle(self, pick: int, want: int, kinds: list[str]) -> None:
        """A worker that holds something settles some of it, and goes on."""
        busy = [name for name, member in self.model.members.items() if member.leases]
        self.workers[pick % 3] = busy[pick % len(busy)]
        self.turn(pick, want, kinds, False, pick, "")

    @rule(index=ANY, which=ANY)
    def turn_again(self, index: int, which: int) -> None:
        name = self._worker_at(index)
        sent = self.turns.get(name, [])
        if not sent:
            return
        call = sent[-1 - which % len(sent)] if which > 60 else sent[-1]
        if call is not sent[-1]:
            with self._refused(StaleTurn):
                self._run(call)
            return
        found = self._run(call)
        assert (found.ids, found.lost, found.held) == (
            self.model.again(name), [], len(self.model.members[name].leases),
        )  # fmt: skip

    @precondition(lambda self: self.gone)
    @rule(which=ANY, pick=ANY)
    def call_of_the_dead(self, which: int, pick: int) -> None:
        """A worker that was reaped or has left changes nothing, whatever it sends."""
        name, id_ = self.gone[which % len(self.gone)], self._any(pick)
        late = operations.turn(self.keys, name, 10**6, 5, LEASE, TurnReport([id_], [Settlement("X", id_)]))
        with self._refused(WorkerUnregistered):
            self._run(late)
        assert self._run(operations.heartbeat(self.keys, name, LEASE)) is False
        assert self._run(operations.extend(self.keys, name, id_, "heir", LEASE, b"{}")) is False

    @rule(index=ANY)
    def beat(self, index: int) -> None:
        assert self._run(operations.heartbeat(self.keys, self._worker_at(index), LEASE)) is True

    @precondition(lambda self: self.model.members)
    @rule(pick=ANY, how=st.sampled_from(["crash", "blame", "leave", "looks", "beaten", "moved", "alive"]), share=ANY)
    def reap(self, pick: int, how: str, share: int) -> None:
        names = list(self.model.members)
        name, end = names[pick % len(names)], None
        if how in {"looks", "beaten", "moved"}:
            end = self.seeded.now() - 1000
            self.seeded.redis.zadd(self.keys.workers, {name: end})
        if how == "beaten":
            self._run(operations.heartbeat(self.keys, name, LEASE))
        if how == "moved":  # it has beaten, and its lease has ended once more
            self.seeded.redis.zadd(self.keys.workers, {name: end + 1})
        if how == "alive":
            end = int(self.seeded.redis.zscore(self.keys.workers, name))
        blame = None
        if how == "blame":
            held = [*self.model.members[name].leases]
            blame = held[share % 3 :: 3], held[share % 2 :: 2]
        answer = self._run(operations.reap(self.keys, name, end=end, crashed=how != "leave", blame=blame))
        if how in {"beaten", "moved", "alive"}:
            assert answer == -1
            self._run(operations.heartbeat(self.keys, name, LEASE))
            return
        assert answer == self.model.reap(name, crashed=how != "leave", blame=blame)
        self.gone.append(name)

    @precondition(lambda self: any(member.leases for member in self.model.members.values()))
    @rule(index=ANY, pick=ANY)
    def extend(self, index: int, pick: int) -> None:
        busy = [name for name, member in self.model.members.items() if member.leases]
        name, heir = busy[index % len(busy)], f"x{next(self.count)}"
        ids = ["ghost"] if pick > 90 else list(self.model.members[name].leases)
        id_ = ids[pick % len(ids)]
        call = operations.extend(self.keys, name, id_, heir, LEASE, b"{}")
        assert self._run(call) is self.model.extend(name, id_, heir)
        if heir in self.model.members:
            assert self._run(call) is True
            self.workers[index % 3] = heir if pick % 2 else name

    # -- people ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.jobs)
    @rule(pick=ANY, delete=st.booleans())
    def cancel(self, pick: int, delete: bool) -> None:
        id_ = self._any(pick)
        assert self._run(operations.cancel(self.keys, id_, delete=delete)) == self.model.cancel(id_, delete=delete)

    @precondition(lambda self: any(member.leases for member in self.model.members.values()))
    @rule(pick=ANY)
    def cancel_leased(self, pick: int) -> None:
        held = [id_ for member in self.model.members.values() for id_ in member.leases]
        id_ = held[pick % len(held)]
        assert self._run(operations.cancel(self.keys, id_)) == self.model.cancel(id_, delete=False)

    @precondition(lambda self: self.model.tags())
    @rule(
        pick=ANY,
        what=st.sampled_from(["count", "cancel", "delete", "redrive"]),
        states=st.sets(st.sampled_from(STATES)),
    )
    def act_on_tagged(self, pick: int, what: str, states: set[str]) -> None:
        """Somebody counts, cancels, deletes or puts back what has a tag, in one step."""
        tag = sorted(self.model.tags())[pick % len(self.model.tags())]
        walk, tagged = Walk(JobFilter(tag=tag), sorted(states)), self.model.tags()[tag]
        ids = [id_ for id_ in tagged if not states or self.model.state_of(id_) in states]
        if what == "count":
            _, counted = self._run(inspection.count_found(self.keys, walk))
            assert counted == Counter(map(self.model.state_of, ids))
        elif what == "redrive":
            assert self._run(operations.redrive_some(self.keys, walk)) == self.model.redrive(ids)
        else:
            done = self._run(operations.cancel_some(self.keys, walk, delete=what == "delete"))
            assert done.codes == [(id_, self.model.cancel(id_, delete=what == "delete")) for id_ in ids]
            assert done.step.ended

    @precondition(lambda self: self.model.dead)
    @rule(limit=st.integers(1, 9), pick=ANY, named=st.booleans())
    def redrive(self, limit: int, pick: int, named: bool) -> None:
        ids = [self._any(pick)] if named else self.model.dead[:limit]
        call = operations.redrive(self.keys, ids=ids) if named else operations.redrive(self.keys, limit=limit)
        assert self._run(call) == self.model.redrive(list(ids))

    @precondition(lambda self: self.model.due)
    @rule(pick=ANY, promote=st.booleans())
    def becomes_due(self, pick: int, promote: bool) -> None:
        """An instant arrives by itself, or somebody promotes the job."""
        id_ = list(self.model.due)[pick % len(self.model.due)]
        if promote:
            assert self._run(operations.promote(self.keys, id_)) is self.model.promote(id_) is True
            assert self._run(operations.promote(self.keys, id_)) is False
        else:
            rank = next(self.count)
            self.seeded.redis.zadd(self.keys.due, {id_: rank})
            self.model.due[id_] = float(rank)

    @precondition(lambda self: self.model.jobs)
    @rule(place=st.sampled_from(["ready", "due", "dead", "rerun"]), limit=st.sampled_from([1, 2, 1000]))
    def purge(self, place: str, limit: int) -> None:
        self._purge(place, limit)

    def _purge(self, place: str, limit: int) -> None:
        assert self._run(operations.purge(self.keys, place, limit)) == self.model.purge(place, limit)

    @rule()
    def pause_or_resume(self) -> None:
        self.model.configure(paused=not self.model.paused)
        self._run(operations.configure(self.keys, "paused", "1" if self.model.paused else ""))

    @rule(pick=ANY, channel=st.sampled_from(["one", "on", "two"]), forget=st.booleans())
    def wait(self, pick: int, channel: str, forget: bool) -> None:
        id_ = self._any(pick)
        if forget:
            self.model.forget(id_, channel)
            self._run(operations.forget(self.keys, id_, channel))
        else:
            assert self._run(operations.await_result(self.keys, id_, channel))[0] == self.model.wait(id_, channel)

    @rule()
    def script_flush(self) -> None:
        self.seeded.redis.script_flush()

    # -- what holds after every step ------------------------------------------------------------------------------

    @invariant()
    def is_alike(self) -> None:
        """The queue equals the model, each id is in one place, and no worker waits while there is work."""
        assert read(self.seeded.redis, self.keys) == self.model.snapshot()
        assert self.seeded.audit() == []
        counted, model = self._run(inspection.counts(self.keys)), self.model
        assert (len(counted), counted.leased, counted.dead) == (
            model.length() - counted.leased, sum(len(member.leases) for member in model.members.values()), len(model.dead),
        )  # fmt: skip
        assert model.told(), "there is work, no token, and nobody watches"
