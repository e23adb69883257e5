"""
How messages are taken from several partitions: programs as in `flow`, whose steps also say at which partition.

Each partition has its own flow and lease; nothing here talks to Redis. A consumer stays at a partition for a stint, so
that ends travel with the next turn, then moves to the next that has work. At each move it also looks at one that had
none, so none starves while others are busy; when none has work, it waits for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from conveyor.messaging.consumer.steps import ConsumerSteps, Program, TurnStep
from conveyor.messaging.leases import LeasedMessage
from conveyor.store.operations import MOST_HELD

M = TypeVar("M")
V = TypeVar("V")
STINT = 16
"""Messages handed out at one partition before the next has its turn."""
STINT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class PartitionTurnStep:
    """Make a turn at partition `at`; where Redis is away, go on without it unless it `must` be made."""

    at: int
    want: int
    leave: bool = False
    must: bool = False


@dataclass(frozen=True, slots=True)
class PartitionWaitStep:
    """Block until a token comes at any partition, at most `seconds`; when `full`, until something held was settled."""

    seconds: float
    full: bool = False


Steps = Generator[PartitionTurnStep | PartitionWaitStep, None, V]


class PartitionCursor(Generic[M]):
    """One partition as a consumer sees it: `quiet` until `look_at` (by the clock), or until a token comes."""

    def __init__(self, at: int, flow: ConsumerSteps[M]) -> None:
        """Take its number and its flow. It may have work until it was looked at."""
        self.at, self.flow, self.lessee = at, flow, flow.lessee
        self.quiet = False
        self.look_at = 0.0

    @property
    def full(self) -> bool:
        """True when it may lease no more."""
        return len(self.lessee.held) >= MOST_HELD

    def wakes(self, now: float) -> bool:
        """Tell whether it may have work."""
        return not self.quiet or now >= self.look_at

    def follow(self, program: Program[V]) -> Steps[V]:
        """Carry out a flow's own program here."""
        try:
            step = next(program)
            while True:
                if isinstance(step, TurnStep):
                    yield PartitionTurnStep(self.at, step.want, step.leave, must=True)
                else:
                    yield PartitionWaitStep(step.seconds, step.full)
                step = next(program)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


class PartitionRoundRobin(Generic[M]):
    """The programs of one consumer of several partitions."""

    def __init__(
        self, flows: Sequence[ConsumerSteps[M]], first: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the flows of the partitions, and with which to begin."""
        self.stands = [PartitionCursor(at, flow) for at, flow in enumerate(flows)]
        self._here = self.stands[first % len(flows)]
        self._clock = clock
        self._handed, self._arrived = 0, clock()
        self._probe = first

    def rung(self, at: int) -> None:
        """A token of partition *at* was taken: it has work."""
        self.stands[at].quiet = False

    # -- programs -------------------------------------------------------------------------------------------------

    def fetch(self, prefetch: int) -> Steps[M]:
        """Return the next message; lease *prefetch* at one partition when none is at hand."""
        while True:
            here = self._here
            while here.lessee.waiting:
                found = yield from here.follow(here.flow._next(alone=True))  # noqa: SLF001  a flow of ours
                if found is not None:
                    found[0].started = True
                    self._handed += 1
                    return found[1]
            now = self._clock()
            if not here.wakes(now) or self._is_over(now):
                yield from self._move(prefetch)
            else:
                yield from self._visit(here, prefetch)

    def gather(self, size: int, within: float) -> Steps[list[M]]:
        """Return up to *size* messages of any partitions, complete or *within* seconds after the first came."""
        found: list[tuple[LeasedMessage, M]] = []
        deadline: float | None = None
        while True:
            closed = False
            for stand in self._round():
                closed = closed or len(found) >= size
                want = 0 if closed else size - len(found) - len(stand.lessee.waiting)
                if stand.wakes(self._clock()) and want > 0:
                    yield from self._visit(stand, want)
                elif stand.lessee.pending:
                    yield PartitionTurnStep(stand.at, 0)
                if not closed and stand.lessee.waiting:
                    closed = yield from stand.follow(stand.flow._fill(found, size))  # noqa: SLF001
                    self._here = stand
            found = [one for one in found if not one[0].lost]
            now = self._clock()
            if found and deadline is None:
                deadline = now + within
            if found and (closed or len(found) >= size or (deadline is not None and now >= deadline)):
                return self._begun(found)
            if not any(stand.lessee.waiting for stand in self.stands):
                rest = self._rest(now)
                if rest is not None:
                    yield (
                        rest
                        if deadline is None
                        else PartitionWaitStep(max(0.001, min(rest.seconds, deadline - now)), rest.full)
                    )

    def pull(self, count: int, wait: float) -> Steps[list[M]]:
        """Return up to *count* messages of any partitions, as soon as there is one, or none after *wait* seconds."""
        deadline = self._clock() + wait
        while True:
            last = self._clock() >= deadline
            found: list[M] = []
            for stand in self._round():
                if len(found) < count and (last or stand.wakes(self._clock())):
                    found += yield from stand.follow(stand.flow.pull(count - len(found), 0))
                    self._note(stand)
            if found or last:
                return found
            rest = self._rest(self._clock())
            if rest is not None:
                yield PartitionWaitStep(max(0.001, min(rest.seconds, deadline - self._clock())))

    def leave(self) -> Steps[None]:
        """Give everything back, and take the registrations away."""
        for stand in self.stands:
            if stand.lessee.registered:
                yield from stand.follow(stand.flow.leave())

    # -- steps ----------------------------------------------------------------------------------------------------

    def _is_over(self, now: float) -> bool:
        return self._handed >= STINT or (self._handed > 0 and now - self._arrived >= STINT_SECONDS)

    def _visit(self, stand: PartitionCursor[M], want: int) -> Steps[None]:
        if stand.full:
            stand.quiet, stand.look_at = True, self._clock() + stand.lessee.wait()
            if stand.lessee.pending:
                yield PartitionTurnStep(stand.at, 0)
            return
        yield PartitionTurnStep(stand.at, want)
        self._note(stand)

    def _note(self, stand: PartitionCursor[M]) -> None:
        stand.quiet = not stand.lessee.waiting
        stand.look_at = self._clock() + stand.lessee.wait()

    def _move(self, prefetch: int) -> Steps[None]:
        """Go where work is: to one that was quiet, if something has come, else to the next that is not."""
        left, stint = self._here, self._handed
        if left.lessee.pending:
            yield PartitionTurnStep(left.at, 0)
        self._handed, self._arrived = 0, self._clock()
        quiet = self._quiet(left)
        if stint and quiet is not None:
            yield from self._visit(quiet, prefetch)
            if quiet.lessee.waiting:
                self._here = quiet
                return
        now = self._clock()
        following = next((stand for stand in self._round(left.at + 1) if stand.wakes(now)), None)
        if following is not None:
            self._here, self._arrived = following, now
            if not following.lessee.waiting:
                yield from self._visit(following, prefetch)
            return
        rest = self._rest(now)
        if rest is not None:
            yield rest

    def _quiet(self, left: PartitionCursor[M]) -> PartitionCursor[M] | None:
        """Return the quiet partition that was looked at longest ago."""
        count, now = len(self.stands), self._clock()
        for _ in range(count):
            self._probe = (self._probe + 1) % count
            stand = self.stands[self._probe]
            if stand is not left and not stand.wakes(now):
                return stand
        return None

    def _round(self, first: int | None = None) -> list[PartitionCursor[M]]:
        """Return all partitions once: those that hold messages first, then on from the next."""
        at = (self._here.at + 1 if first is None else first) % len(self.stands)
        order = self.stands[at:] + self.stands[:at]
        return sorted(order, key=lambda stand: not stand.lessee.waiting)

    def _rest(self, now: float) -> PartitionWaitStep | None:
        """Return how long to wait, None when one has woken meanwhile."""
        if any(stand.wakes(now) for stand in self.stands):
            return None
        seconds = min(stand.look_at for stand in self.stands) - now
        return PartitionWaitStep(max(0.001, seconds), full=all(stand.full for stand in self.stands))

    @staticmethod
    def _begun(found: list[tuple[LeasedMessage, M]]) -> list[M]:
        for leased, _ in found:
            leased.started = True
        return [message for _, message in found]
