"""
Programs that take messages from several partitions, as in `steps.py`; a step also names its partition.

The partitions are those of one queue or of several, and a queue in one piece counts as one. Each has its own steps and
lease; nothing here talks to Redis. A consumer stays at a partition for a stint, so that ends travel with the next turn,
then moves to the next that has work: queues have their turns by their weights, the partitions of a queue one after the
other. At each move it also looks at one that had none, so none starves while others are busy; when none has work, it
waits for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from conveyor.messaging.consumer.steps import ConsumerSteps, LookStep, Program, TurnStep, WaitStep, start
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.shares import WeightedTurns
from conveyor.store.client.outages import PROBE_PAUSE
from conveyor.store.operations import MOST_HELD

M = TypeVar("M")
V = TypeVar("V")
STINT = 16
"""Messages handed out at one partition before the next has its turn; fewer where the queue has less weight."""
STINT_SECONDS = 0.05


class PartitionCursor(Generic[M]):
    """
    One partition as a consumer sees it: `quiet` until the time `look_at`, or until a token comes.

    While its server is away it has no work, and what is to be reported there waits.
    """

    def __init__(self, at: int, queue: int, steps: ConsumerSteps[M], is_away: Callable[[int], bool]) -> None:
        self.at, self.queue, self.steps, self.session, self._is_away = at, queue, steps, steps.session, is_away
        self.quiet = False  # it may have work until it was looked at
        self.has_token = False  # one was taken, and it was not looked at since
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


class QueueShares:
    """The weights of the queues that a consumer takes from, and what each has had; pulls from the same queues share one."""

    def __init__(self, weights: Sequence[float] = (1.0,)) -> None:
        self._weights = dict(enumerate(weights))
        self._turns = WeightedTurns[int]()
        heaviest = max(weights)
        self.stints = [max(1, round(STINT * weight / heaviest)) for weight in weights]
        """Messages handed out at one partition of each queue before the next has its turn."""

    def next(self, working: Sequence[PartitionCursor[Any]]) -> int:
        """Return the queue whose turn it is, of those of *working*."""
        return self._turns.next(self._rivals({cursor.queue for cursor in working}))

    def count(self, working: Sequence[PartitionCursor[Any]], left: PartitionCursor[Any], messages: int) -> None:
        """Count messages that were handed out at *left*, while the queues of *working* may have had some too."""
        if messages and len(self._weights) > 1:
            rivals = self._rivals({left.queue, *(cursor.queue for cursor in working)})
            self._turns.count(rivals, left.queue, messages)

    def split(self, messages: int, working: Sequence[PartitionCursor[Any]]) -> dict[int, int]:
        """Return how many of so many *messages* each queue of *working* may have."""
        return self._turns.split(messages, self._rivals({cursor.queue for cursor in working}))

    def count_pulled(self, taken: dict[int, int], fuller: Sequence[PartitionCursor[Any]]) -> None:
        """Count what was pulled from each queue, while those of *fuller* may have had more."""
        rivals = self._rivals({cursor.queue for cursor in fuller}.union(one for one, number in taken.items() if number))
        for queue in rivals.keys() & taken.keys():
            self._turns.count(rivals, queue, taken[queue])

    def _rivals(self, queues: set[int]) -> dict[int, float]:
        """Return the weights of *queues*, in the order of the queues."""
        return {queue: weight for queue, weight in self._weights.items() if queue in queues}


class PartitionRoundRobin(Generic[M]):
    """
    The programs of a consumer of several partitions. *first* is the partition it begins at.

    *queue_of* numbers the queue of each partition, None: all are of one. *shares* divide the turns among the queues.
    *looks*: one call tells at which partitions a turn would find something, since one server has all.
    """

    def __init__(
        self,
        steps: Sequence[ConsumerSteps[M]],
        first: int,
        *,
        queue_of: Sequence[int] | None = None,
        shares: QueueShares | None = None,
        looks: bool = False,
        clock: Callable[[], float] = time.monotonic,
        is_away: Callable[[int], bool] = lambda _: False,
    ) -> None:
        queues = queue_of or [0] * len(steps)
        self._cursors = [PartitionCursor(at, queues[at], one, is_away) for at, one in enumerate(steps)]
        self._here = self._cursors[first % len(steps)]
        self._last_at = dict.fromkeys(queues, self._here.at)  # the partition of each queue that was visited last
        self._shares, self._looks = shares or QueueShares(), looks
        self._clock = clock
        self._handed_out, self._arrived = 0, clock()
        self._last_probed = first

    def woken(self, at: int) -> None:
        """Note that a token of partition *at* was taken: it has work."""
        self._cursors[at].quiet, self._cursors[at].has_token = False, True

    def looked(self, at: int, due_in: float | None) -> None:
        """Note at partition *at* that a turn would find something (None), or nothing for that many seconds."""
        if due_in is not None:
            cursor = self._cursors[at]
            cursor.session.note_idle(due_in)
            self._note_visit(cursor)

    def unspent(self) -> list[int]:
        """Return the partitions whose tokens were taken, and that were not looked at since."""
        return [cursor.at for cursor in self._cursors if cursor.has_token]

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
                    self._arrive(cursor)
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
            pulled = yield from self._pull_shares(count)
            if pulled or last:
                return pulled
            yield from self._wait(self._clock(), deadline - self._clock())

    def _pull_shares(self, count: int) -> Program[list[M]]:
        """Pull what there is now: of each queue its share of *count*, and of those that have more what the others left."""
        now, shares = self._clock(), self._shares
        pulled: list[M] = []
        taken: dict[int, int] = {}
        sources = [cursor for cursor in self._in_turn() if cursor.may_have_work(now)]
        if self._looks and len(sources) > 2:  # else the turns cost no more
            yield LookStep(tuple(cursor.at for cursor in sources))
            sources = [cursor for cursor in sources if cursor.may_have_work(now)]
        while sources and len(pulled) < count:
            left = shares.split(count - len(pulled), sources)
            fuller: list[PartitionCursor[M]] = []
            for cursor in sources:
                want = min(left[cursor.queue], count - len(pulled))
                found = (yield from cursor.follow(cursor.steps.pull(want, 0))) if want else []
                if want:
                    self._note_visit(cursor)
                    pulled += found
                    left[cursor.queue] -= len(found)
                    taken[cursor.queue] = taken.get(cursor.queue, 0) + len(found)
                if len(found) == want:  # it may have more, or has not been asked
                    fuller.append(cursor)
            sources = fuller
        shares.count_pulled(taken, sources)
        return pulled

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
        most = self._shares.stints[self._here.queue]
        return self._handed_out >= most or (self._handed_out > 0 and now - self._arrived >= STINT_SECONDS)

    def _visit(self, cursor: PartitionCursor[M], want: int) -> Program[None]:
        if cursor.full:
            cursor.quiet, cursor.look_at = True, self._clock() + cursor.session.wait()
            if cursor.session.pending:
                yield cursor.turn()
            return
        yield cursor.turn(want)
        self._note_visit(cursor)

    def _note_visit(self, cursor: PartitionCursor[M]) -> None:
        cursor.quiet, cursor.has_token = not cursor.session.waiting, False
        cursor.look_at = self._clock() + cursor.session.wait()

    def _move(self, prefetch: int) -> Program[None]:
        """Move to a quiet partition if something came there, else to the next that is not quiet."""
        left, stint = self._here, self._handed_out
        if left.session.pending and not left.away:
            yield left.turn()
        working = [cursor for cursor in self._cursors if cursor.may_have_work(self._clock())]
        self._shares.count(working, left, stint)
        self._arrive(left)
        quiet = self._next_quiet(left)
        if stint and quiet is not None:
            yield from self._visit(quiet, prefetch)
            if quiet.session.waiting:
                self._arrive(quiet)
                return
        now = self._clock()
        working = [cursor for cursor in self._cursors if cursor.may_have_work(now)]
        if not working:
            yield from self._wait(now)
            return
        queue = self._shares.next(working)
        in_turn = self._in_turn(self._last_at[queue] + 1)
        following = next(one for one in in_turn if one.queue == queue and one.may_have_work(now))
        self._arrive(following)
        if not following.session.waiting:
            yield from self._visit(following, prefetch)

    def _arrive(self, cursor: PartitionCursor[M]) -> None:
        """Begin a stint at *cursor*."""
        self._here, self._last_at[cursor.queue] = cursor, cursor.at
        self._handed_out, self._arrived = 0, self._clock()

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
