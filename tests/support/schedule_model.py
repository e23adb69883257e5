"""Random steps on the schedules of a real queue and on a model of them; after each of them both must be alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conveyor.store import operations, schedules
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement
from conveyor.store.schedules import ScheduleRow
from support.seeded_queue import SeededQueue, entry

STEP = 3_600_000
"""An hour from one instant to the next: nothing comes by itself while the test runs."""
NAMES, DIGESTS = st.sampled_from(["a", "b"]), st.sampled_from(["old", "new"])
ANY, HOW = st.integers(0, 99), st.sampled_from(["fire", "alone", "alone", "missed"])


@dataclass
class Expected:
    """The state that a schedule is to have; `next` is the number of an instant, None when none comes any more."""

    digest: str
    origin: str
    next: int | None
    paused: bool = False
    fired: int = 0
    skipped: int = 0
    last: str = ""


class ScheduleMachine(RuleBasedStateMachine):
    """Two schedules, programs that declare them in two versions, workers that read them and come late, and a clock."""

    seeded: ClassVar[SeededQueue]

    def __init__(self) -> None:
        super().__init__()
        self.seeded.redis.flushall(asynchronous=False)
        self.keys: QueueKeys = self.seeded.keys
        self.known: dict[str, Expected] = {}
        self.jobs: list[str] = []
        self.held: list[str] = []
        self.dead: set[str] = set()
        self.seen: list[tuple[str, ScheduleRow]] = []  # what workers have read, and not carried out yet
        self.base = self.seeded.now() + STEP // 2  # of instant 0
        self.number = itertools.count(1)
        self.turns = itertools.count(1)
        self.seeded.register("w")

    @initialize()
    def begin(self) -> None:
        """Begin with two schedules whose instants have come."""
        for name in ("a", "b"):
            self.put(name, "old", "data", -2)

    def ms(self, instant: int | None) -> int | None:
        """Return an instant in ms: those from 0 on are to come."""
        return None if instant is None else self.base + instant * STEP

    def note_passed(self, schedule: Expected) -> None:
        """Count an instant that had come, and that nobody carried out."""
        schedule.skipped += schedule.next is not None and schedule.next < 0

    # -- people and programs ----------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        digest=DIGESTS,
        origin=st.sampled_from(["data", "data", "data", "code"]),
        first=st.sampled_from([-2, -1, 0]),
    )
    def put(self, name: str, digest: str, origin: Any, first: int) -> None:
        """Declare a schedule, in one of two versions."""
        call = schedules.put_schedule(self.keys, name, digest, b"{}", b"", origin, self.ms(first))
        answer, schedule = self.seeded.run(call), self.known.get(name)
        if schedule is None:
            assert answer == 1
            self.known[name] = Expected(digest, origin, first)
        elif schedule.origin != origin:
            assert answer == schedules.PUT_FOREIGN
        elif schedule.digest == digest:
            assert answer == 0
        else:
            assert answer == 2
            if schedule.next != first:  # an instant that it goes on from is still to be carried out
                self.note_passed(schedule)
            schedule.digest, schedule.next = digest, first

    @rule(name=NAMES)
    def deploy(self, name: str) -> None:
        """Declare the other version at the instant that the schedule has reached, as another spelling of its expression does."""
        schedule = self.known.get(name)
        if schedule is not None and schedule.next is not None:
            self.put(name, "old" if schedule.digest == "new" else "new", schedule.origin, schedule.next)

    @rule(name=NAMES, sure=st.integers(0, 3))
    def delete(self, name: str, sure: int) -> None:
        """Remove a schedule now and then; its jobs stay."""
        if sure < 3:
            return
        gone = self.seeded.run(schedules.change_schedule(self.keys, name, "delete"))
        assert gone == (1 if self.known.pop(name, None) else -1)

    @rule(name=NAMES)
    def pause(self, name: str) -> None:
        """Let a schedule stand still."""
        schedule = self.known.get(name)
        answer = self.seeded.run(schedules.change_schedule(self.keys, name, "pause"))
        assert answer == (-1 if schedule is None else int(not schedule.paused))
        if schedule is not None:
            schedule.paused = True

    @rule(name=NAMES)
    def resume(self, name: str) -> None:
        """Let it go on, from the first instant that is to come; each that has passed meanwhile is skipped."""
        schedule = self.known.get(name)
        passed = 0 if schedule is None or schedule.next is None else max(0, -schedule.next)
        answer = self.seeded.run(schedules.change_schedule(self.keys, name, "resume", self.ms(0), passed))
        assert answer == (-1 if schedule is None else int(schedule.paused))
        if schedule is not None and schedule.paused:
            schedule.skipped += passed
            schedule.paused, schedule.next = False, 0

    @rule(hours=st.sampled_from([1, 1, 2, -1]))
    def clock(self, hours: int) -> None:
        """Let an hour pass or two for all schedules, or set the clock back by one. What workers have read before is of another time."""
        self.seen.clear()
        for name, schedule in self.known.items():
            if schedule.next is None:
                continue
            schedule.next -= hours
            self.seeded.redis.hset(self.keys.schedule(name), "next", self.ms(schedule.next))
            if not schedule.paused:
                self.seeded.redis.zadd(self.keys.due, {f"\t\t{name}": self.ms(schedule.next)}, xx=True)

    # -- workers ----------------------------------------------------------------------------------------------------

    @rule(name=NAMES, looks=st.booleans(), how=HOW, ends=ANY)
    def tick(self, name: str, looks: bool, how: str, ends: int) -> None:
        """Let a worker read a schedule whose instant has come, and carry it out now or later; another may have read it too."""
        _, rows = self.seeded.run(schedules.read_schedules(self.keys, name))
        for row in rows:
            if row.next_ms is not None and not row.paused and self.known[name].next < 0:
                self.seen.append((name, row))
                if not looks:
                    self.carry_out(name, row, how, ends)

    @precondition(lambda self: self.seen)
    @rule(which=ANY, how=HOW, ends=ANY)
    def come_late(self, which: int, how: str, ends: int) -> None:
        """Let a worker carry out what it has read, perhaps long ago, perhaps again."""
        self.carry_out(*self.seen[which % len(self.seen)], how, ends)

    def carry_out(self, name: str, row: ScheduleRow, how: str, ends: int) -> None:
        """Carry out an instant as a worker does that has read *row*; the last one of its schedule, seldom."""
        schedule = self.known.get(name)
        following = None if ends > 90 else row.next_ms + STEP
        id_ = f"{name}@{next(self.number)}"
        skips = how == "missed"
        call = schedules.fire_schedule(
            self.keys,
            row,
            following,
            None if skips else entry(id_, planned_ms=row.next_ms),
            reason="missed" if skips else "",
            alone=how == "alone",
        )
        found = self.seeded.run(call)
        if (
            schedule is None or schedule.paused or schedule.digest != row.digest
            or schedule.next is None or self.ms(schedule.next) != row.next_ms
        ):  # fmt: skip
            assert found == schedules.Fired(), "another worker has carried it out, or it has changed"
            return
        lives = schedule.last in self.jobs or schedule.last in self.held
        reason = "missed" if skips else "overlap" if how == "alone" and lives else ""
        assert found == (schedules.Fired(skipped=reason) if reason else schedules.Fired(job=id_))
        if reason:
            schedule.skipped += 1
        else:
            schedule.fired, schedule.last = schedule.fired + 1, id_
            self.jobs.append(id_)
        schedule.next = None if following is None else schedule.next + 1

    @rule(name=NAMES)
    def defer(self, name: str) -> None:
        """Let a worker that does not know the task put the alarm off."""
        schedule = self.known.get(name)
        if schedule is not None and not schedule.paused and schedule.next is not None and schedule.next < 0:
            self.seeded.run(schedules.change_schedule(self.keys, name, "defer", self.seeded.now() + 20_000))

    @rule(dies=st.booleans(), takes=st.booleans())
    def turn(self, dies: bool, takes: bool) -> None:
        """Let a worker report what it holds, as done or dead, and take jobs and the schedules whose instants have come."""
        others = [Settlement("X", id_, state=b"1 1 0\n{}") for id_ in self.held if dies]
        reply = self.seeded.turn("w", next(self.turns), 50 * takes, done=[] if dies else self.held, others=others)
        if dies:
            self.dead |= {*self.held}
        assert reply.lost == []
        self.held = list(reply.ids)
        assert self.held == self.jobs[: len(self.held)]
        del self.jobs[: len(self.held)]
        due = {name for name, one in self.known.items() if not one.paused and one.next is not None and one.next < 0}
        assert {*reply.schedules} <= due

    @rule(name=NAMES)
    def run_now(self, name: str) -> None:
        """Enqueue a job beside the instants, as `Schedule.run` does."""
        id_ = f"{name}!{next(self.number)}"
        self.seeded.run(operations.push(self.keys, self.seeded.lane, [entry(id_)]))
        self.jobs.append(id_)

    # -- laws -------------------------------------------------------------------------------------------------------

    @invariant()
    def both_are_alike(self) -> None:
        """Each schedule is where the model has it, each job is there once, and the audit finds nothing."""
        _, rows = self.seeded.run(schedules.read_schedules(self.keys))
        found = {
            row.name: (row.digest, row.origin, row.next_ms, row.paused, row.fired, row.skipped, row.last)
            for row in rows
        }
        assert found == {
            name: (one.digest, one.origin, self.ms(one.next), one.paused, one.fired, one.skipped, one.last)
            for name, one in self.known.items()
        }
        stored = {id_.decode() for id_ in self.seeded.redis.hkeys(self.keys.jobs)}
        assert stored == {*self.jobs, *self.held, *self.dead}
        assert self.seeded.audit() == []
