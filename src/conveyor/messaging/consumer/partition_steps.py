"""
Programs that take messages from several partitions, as in `steps.py`; a step also names its partition.

Each partition has its own steps and lease; nothing here talks to Redis. A consumer stays at a partition for a stint, so
that ends travel with the next turn, then moves to the next that has work. At each move it also looks at one that had
none, so none starves while others are busy; when none has work, it waits for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from conveyor.messaging.consumer.steps import ConsumerSteps, Program, TurnStep, WaitStep, start
from conveyor.messaging.leases import LeasedMessage
from conveyor.store.client.outages import PROBE_PAUSE
from conveyor.store.operations import MOST_HELD

M = TypeVar("M")
V = TypeVar("V")
STINT = 16
"""Messages handed out at one partition before the next has its turn."""
STINT_SECONDS = 0.05


class PartitionCursor(Generic[M]):
    """
    One partition as a consumer sees it: `quiet` until the time `look_at`, or until a token comes.

    While its server is away it has no work, and what is to be reported there waits.
    """

    def __init__(self, at: int, steps: ConsumerSteps[M], is_away: Callable[[int], bool]) -> None:
        self.at, self.steps, self.session, self._is_away = at, steps, steps.session, is_away
        self.quiet = False  # it may have work until it was looked at
        self.look_at = 0.0

    @property
    def full(self) -> bool:
        """True when it may lease no more."""
        return len(self.session.held) >= MOST_HELD

    def may_have_work(self, now: float) -> bool:
        """Tell whether it may have work."""
        return (not self.quiet or now >= self.look_at) and not self.away

    @property
    def away(self) -> bool:
        """True while its server is away."""
        return self._is_away(self.at)

    @property
    def has_waiting(self) -> bool:
        """True when messages that it leased can be handed out."""
        return bool(self.session.waiting) and not self.away

    def turn(self, want: int = 0) -> TurnStep:
        """Return the step that makes a turn here, unless Redis is away."""
        return TurnStep(want, at=self.at, must=False)

    def follow(self, program: Program[V]) -> Program[V]:
        """Carry out a program of `steps` here."""
        try:
            while True:
                step = next(program)
                yield TurnStep(step.want, step.leave, self.at) if isinstance(step, TurnStep) else step
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


class PartitionRoundRobin(Generic[M]):
    """The programs of a consumer of several partitions. *first* is the partition it begins at."""

    def __init__(
        self,
        steps: Sequence[ConsumerSteps[M]],
        first: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        is_away: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._cursors = [PartitionCursor(at, one, is_away) for at, one in enumerate(steps)]
        self._here = self._cursors[first % len(steps)]
        self._clock = clock
        self._handed_out, self._arrived = 0, clock()
        self._last_probed = first

    def woken(self, at: int) -> None:
        """Note that a token of partition *at* was taken: it has work."""
        self._cursors[at].quiet = False

    # -- programs -------------------------------------------------------------------------------------------------

    def fetch(self, prefetch: int) -> Program[M]:
        """Return the next message; lease *prefetch* at one partition when none is at hand."""
        while True:
            here = self._here
            while here.has_waiting:
                opened = yield from here.follow(here.steps.next_message(alone=True))
                if opened is not None:
                    opened[0].started = True
                    self._handed_out += 1
                    return opened[1]
            now = self._clock()
            if not here.may_have_work(now) or self._is_stint_over(now):
                yield from self._move(prefetch)
            else:
                yield from self._visit(here, prefetch)

    def gather(self, size: int, within: float) -> Program[list[M]]:
        """Return up to *size* messages, complete or *within* seconds after the first came."""
        gathered: list[tuple[LeasedMessage, M]] = []
        deadline: float | None = None
        while True:
            closed = False
            for cursor in self._in_turn():
                closed = closed or len(gathered) >= size
                want = 0 if closed else size - len(gathered) - len(cursor.session.waiting)
                if cursor.may_have_work(self._clock()) and want > 0:
                    yield from self._visit(cursor, want)
                elif cursor.session.pending and not cursor.away:
                    yield cursor.turn()
                if not closed and cursor.has_waiting:
                    closed = yield from cursor.follow(cursor.steps.fill(gathered, size))
                    self._here = cursor
            gathered = [one for one in gathered if not one[0].lost and not self._drop(one[0])]
            now = self._clock()
            if gathered and deadline is None:
                deadline = now + within
            if gathered and (closed or len(gathered) >= size or (deadline is not None and now >= deadline)):
                return start(gathered)
            if not any(cursor.has_waiting for cursor in self._cursors):
                yield from self._wait(now, None if deadline is None else deadline - now)

    def pull(self, count: int, wait: float) -> Program[list[M]]:
        """Return up to *count* messages as soon as there is one, or none after *wait* seconds."""
        deadline = self._clock() + wait
        while True:
            last = self._clock() >= deadline
            pulled: list[M] = []
            for cursor in self._in_turn():
                if len(pulled) < count and not cursor.away and (last or cursor.may_have_work(self._clock())):
                    pulled += yield from cursor.follow(cursor.steps.pull(count - len(pulled), 0))
                    self._note_visit(cursor)
            if pulled or last:
                return pulled
            yield from self._wait(self._clock(), deadline - self._clock())

    def leave(self) -> Program[None]:
        """Give everything back, and take the registrations away."""
        for cursor in self._cursors:
            if cursor.session.registered or cursor.session.registering:
                yield from cursor.follow(cursor.steps.leave())

    # -- parts of programs ----------------------------------------------------------------------------------------

    def _drop(self, leased: LeasedMessage) -> bool:
        """Settle a message that may not start any more, at its partition, and tell whether it was one."""
        holders = [one for one in self._cursors if one.session.cancelled or leased.envelope.expires_ms is not None]
        return any(one.session.held.get(leased.id) is leased and one.steps.drop(leased) for one in holders)

    def _is_stint_over(self, now: float) -> bool:
        return self._handed_out >= STINT or (self._handed_out > 0 and now - self._arrived >= STINT_SECONDS)

    def _visit(self, cursor: PartitionCursor[M], want: int) -> Program[None]:
        if cursor.full:
            cursor.quiet, cursor.look_at = True, self._clock() + cursor.session.wait()
            if cursor.session.pending:
                yield cursor.turn()
            return
        yield cursor.turn(want)
        self._note_visit(cursor)

    def _note_visit(self, cursor: PartitionCursor[M]) -> None:
        cursor.quiet = not cursor.session.waiting
        cursor.look_at = self._clock() + cursor.session.wait()

    def _move(self, prefetch: int) -> Program[None]:
        """Move to a quiet partition if something came there, else to the next that is not quiet."""
        left, stint = self._here, self._handed_out
        if left.session.pending and not left.away:
            yield left.turn()
        self._handed_out, self._arrived = 0, self._clock()
        quiet = self._next_quiet(left)
        if stint and quiet is not None:
            yield from self._visit(quiet, prefetch)
            if quiet.session.waiting:
                self._here = quiet
                return
        now = self._clock()
        following = next((cursor for cursor in self._in_turn(left.at + 1) if cursor.may_have_work(now)), None)
        if following is None:
            yield from self._wait(now)
            return
        self._here, self._arrived = following, now
        if not following.session.waiting:
            yield from self._visit(following, prefetch)

    def _next_quiet(self, left: PartitionCursor[M]) -> PartitionCursor[M] | None:
        """Return the quiet partition looked at longest ago; None when there is none beside *left*."""
        count, now = len(self._cursors), self._clock()
        for _ in range(count):
            self._last_probed = (self._last_probed + 1) % count
            cursor = self._cursors[self._last_probed]
            if cursor is not left and not cursor.away and not cursor.may_have_work(now):
                return cursor
        return None

    def _in_turn(self, first: int | None = None) -> list[PartitionCursor[M]]:
        """Return all partitions: those that hold messages, then from *first* on (None: the next)."""
        at = (self._here.at + 1 if first is None else first) % len(self._cursors)
        order = self._cursors[at:] + self._cursors[:at]
        return sorted(order, key=lambda cursor: not cursor.has_waiting)

    def _wait(self, now: float, most: float | None = None) -> Program[None]:
        """Wait for all partitions at once, at most *most* seconds, unless one may have work now."""
        if any(cursor.may_have_work(now) for cursor in self._cursors):
            return
        live = [cursor for cursor in self._cursors if not cursor.away]
        seconds = min((cursor.look_at for cursor in live), default=now + PROBE_PAUSE) - now
        if most is not None:
            seconds = min(seconds, most)
        yield WaitStep(max(0.001, seconds), full=bool(live) and all(cursor.full for cursor in live))
