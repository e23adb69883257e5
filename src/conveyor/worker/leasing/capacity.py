"""The number of jobs that a worker may lease now: free slots, work ahead, shares of the queues, and the limits of recycling."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence, Sized
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from conveyor.messaging.shares import WeightedTurns
from conveyor.store.operations import MOST_HELD

if TYPE_CHECKING:
    from conveyor.store.operations import TurnReport
    from conveyor.worker.attempt import Attempt
    from conveyor.worker.execution.executor import Executor
    from conveyor.worker.lifecycle import Lifecycle
    from conveyor.worker.recycling import RecycleLimits

BATCH = MOST_HELD // 2
"""Jobs leased per turn, at most. Half of what may be held runs while Redis serves the other half (+25 % at full speed)."""
AHEAD = 0.05
"""Seconds of work to hold in advance."""
WINDOW = 0.05
"""Seconds over which a rate is measured, at least: jobs that started together end together."""
MAX_AHEAD = 1000
"""Jobs to hold in advance, at most."""
STINT = 20
"""Turns of one partition before the next one leases."""
STINT_SECONDS = 0.1
REPLY_BYTES = 4 * 1024 * 1024


class JobSizeEstimate:
    """The size of the jobs of a queue, as seen lately. It keeps the reply of a turn below about 4 MB."""

    def __init__(self) -> None:
        self._mean = 200.0
        self.max_jobs = int(REPLY_BYTES / self._mean)
        """The number of jobs that may be leased at once."""

    def note(self, envelopes: Sequence[bytes]) -> None:
        """Measure what was leased."""
        mean = sum(map(len, envelopes)) / len(envelopes)
        self._mean = max(mean, 0.9 * self._mean)  # quick to believe in large ones, slow to forget them
        self.max_jobs = max(1, int(REPLY_BYTES / self._mean))


class LeasingQueue(Protocol):
    """The part of a queue's consumer that decides how much it may lease."""

    queue: str
    group: PartitionGroup
    backlog: int
    report: TurnReport
    job_size: JobSizeEstimate

    @property
    def held(self) -> Sized: ...
    def running(self) -> Iterator[Attempt]: ...
    def schedule(self, *, at_once: bool = False) -> None: ...
    def prepare(self) -> None: ...


class PartitionGroup:
    """
    The partitions of one queue, which share its weight; a queue in one piece is a group of one.

    They lease one after the other: small batches of each would cost the server a turn for each. One that may have work
    leases for a stint, so that ends of jobs travel with the next turn, and then gives its turn to the next.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.backlog = 0
        """Attempts of its partitions that are leased and have not started."""
        self.gathering = 0
        """Batches that gather jobs of it."""
        self.gathered = 0
        """The jobs that they have. These need no slots of their own, so they are not in the backlog."""
        self.wanted = 0
        """The jobs that they have room for."""
        self.ready: dict[LeasingQueue, None] = {}
        """The partitions that may have work, in the order of their turns."""
        self._turns, self._since = 0, 0.0

    @property
    def leader(self) -> LeasingQueue:
        """The partition that may lease now."""
        return next(iter(self.ready))

    def note_work(self, consumer: LeasingQueue, *, possible: bool) -> None:
        """Note whether *consumer* may have work."""
        if possible:
            self.ready[consumer] = None
            return
        if self.ready and self.leader is consumer:
            self._turns = 0
        self.ready.pop(consumer, None)

    def leads_another(self, consumer: LeasingQueue) -> bool:
        """Tell whether another partition than *consumer* may lease now."""
        return bool(self.ready) and self.leader is not consumer

    def note_turn(self, consumer: LeasingQueue) -> None:
        """Note that a partition has leased; at the end of its stint it goes behind the others."""
        if len(self.ready) < 2 or self.leads_another(consumer):
            return
        self._turns += 1
        if self._turns == 1:
            self._since = perf_counter()
        elif self._turns >= STINT or perf_counter() - self._since >= STINT_SECONDS:
            del self.ready[consumer]
            self.ready[consumer] = None
            self._turns = 0
            self.leader.schedule()


class Capacity:
    """
    Divides the room of one worker among its queues, by their weights. Asked once for each turn that may lease.

    Nothing here walks through all queues of the worker: consumers note what changes, and those without work cost nothing.
    """

    def __init__(self, executor: Executor, lifecycle: Lifecycle, limits: RecycleLimits) -> None:
        self._executor, self._lifecycle, self._limits = executor, lifecycle, limits
        self.rivals: dict[PartitionGroup, float] = {}
        """The queues that may have work, with their weights, in the order in which that was learned."""
        self.holders: dict[LeasingQueue, None] = {}
        """The queues of which jobs are held here."""
        self.backlog = 0
        """Attempts of all queues that are leased and have not started."""
        self._weight = 0.0  # of the rivals
        self._reserved: dict[LeasingQueue, int] = {}
        self._is_offered = False
        self.finished = 0
        """Attempts that have ended so far."""
        self._rate = 0.0  # ends a second; 0 at first, so that only free slots are filled
        self._rated, self._rated_at = 0, perf_counter()
        self._picked: PartitionGroup | None = None
        self._turns = WeightedTurns[PartitionGroup]()

    def note_work(self, consumer: LeasingQueue, *, possible: bool) -> None:
        """Note whether *consumer* may have work that it may lease."""
        group = consumer.group
        group.note_work(consumer, possible=possible)
        if bool(group.ready) is (group in self.rivals):
            return
        if group.ready:
            self.rivals[group] = group.weight
            self._weight += group.weight
        else:
            del self.rivals[group]
            self._weight = self._weight - group.weight if self.rivals else 0.0

    def note_backlog(self, consumer: LeasingQueue, change: int) -> None:
        """Count attempts that were leased, or have started or left."""
        consumer.backlog += change
        consumer.group.backlog += change
        self.backlog += change

    def note_held(self, consumer: LeasingQueue, holds: bool) -> None:
        """Note whether *consumer* holds jobs, or runs some whose acknowledgement was early."""
        if holds:
            self.holders[consumer] = None
        else:
            self.holders.pop(consumer, None)

    def note_reserved(self, consumer: LeasingQueue, slots: int) -> None:
        """Note how many slots *consumer* keeps for jobs that came back from a crash."""
        if slots:
            self._reserved[consumer] = slots
        else:
            self._reserved.pop(consumer, None)

    def is_alone(self, consumer: object) -> bool:
        """Tell whether no queue beside *consumer* has a use for room."""
        # In plain loops: it is asked at most ends of jobs, and a generator would be a fifth of what one of a plain function costs.
        for group in self.rivals:
            for one in group.ready:
                if one is not consumer:
                    return False
        return not self._reserved or (len(self._reserved) == 1 and consumer in self._reserved)

    @property
    def has_room(self) -> bool:
        """True when the worker could lease another job, of whatever queue."""
        return not self._lifecycle.stopping and self._total(saturated=False) > self.backlog

    def _total(self, *, saturated: bool) -> int:
        """Return how many jobs may be leased and not running: free slots and work ahead, those that wait already included."""
        free = self._executor.free + self.backlog - sum(self._reserved.values())  # slots that no job runs in
        # None ahead of those that came back from a crash: the backlog takes each slot that becomes free before they can.
        capacity = free + (0 if self._reserved else self.ahead(saturated))
        if self._limits.is_limited:
            capacity = min(capacity, self.backlog + self._limits.remaining(self.taken))
        return capacity

    def room(self, consumer: LeasingQueue, *, coming: int = 0) -> int:
        """Return how many jobs *consumer* may lease now, beside those *coming*: leased, and not taken yet."""
        if self._lifecycle.stopping:
            return 0
        group = consumer.group
        if group.leads_another(consumer):
            return 0
        # Those that come tell nothing of the time that is measured: a worker that had none left has waited for the server.
        waiting, capacity = self.backlog + coming, self._total(saturated=group.backlog > 0)
        rivals = len(self.rivals) + (group not in self.rivals)
        room = capacity - waiting if rivals == 1 else self._share(capacity, waiting, group, coming)
        if group.gathering and room > 0:
            room = self._with_batches(room, group)
        settled = len(consumer.report.done) + len(consumer.report.others)  # given back before more is taken
        held = len(consumer.held) + coming - settled
        return max(0, min(room, BATCH, consumer.job_size.max_jobs, MOST_HELD - held))

    def _with_batches(self, slots: int, group: PartitionGroup) -> int:
        """
        Return how many jobs *group*, whose part are so many slots, may lease: what its batches want, and one for each other slot.

        Each batch that gathers takes one of the slots. A job too many would begin a batch that has none: it would run as
        it is when its time is over, and take the place of a full one.
        """
        room = group.wanted + max(0, slots - group.gathering)
        return min(room, self._limits.remaining(self.taken)) if self._limits.is_limited else room

    def note_batch(self, jobs: int) -> None:
        """Note that so many jobs end together: for what is held ahead they count as one, since they took one slot."""
        self._rated += jobs - 1

    def idle_room(self, consumer: LeasingQueue) -> int:
        """
        Return how many jobs *consumer* may lease at least once the worker is idle: it holds none, and no queue has work.

        Work ahead is left out: its measure changes with every queue's jobs, and the turn that follows asks for it.
        """
        capacity = self._executor.slots
        if self._limits.is_limited:
            capacity = min(capacity, self._limits.remaining(self.taken))
        return max(0, min(capacity, BATCH, consumer.job_size.max_jobs))

    @property
    def taken(self) -> int:
        """Jobs that were leased so far."""
        return self.finished + sum(1 for one in self.holders for _ in one.running())

    def ahead(self, saturated: bool) -> int:
        """Return how many jobs to hold beyond the free slots; *saturated* tells that work was waiting all the time."""
        now = perf_counter()
        passed = now - self._rated_at
        if passed >= WINDOW:
            rate = (self.finished - self._rated) / passed
            # Idle time says nothing of the speed: only a busy window may lower it.
            if saturated or rate > self._rate:
                self._rate = rate if rate > self._rate else 0.7 * self._rate + 0.3 * rate
            self._rated, self._rated_at = self.finished, now
        return min(MAX_AHEAD, int(self._rate * AHEAD))

    def _share(self, capacity: int, waiting: int, group: PartitionGroup, coming: int) -> int:
        """
        Return how many jobs *group* may lease: its part of *capacity*, less what it has waiting.

        *waiting* is what all queues have leased and not started, *coming* what of it this group has not taken yet.
        """
        rivals = self.rivals if group in self.rivals else {**self.rivals, group: group.weight}
        total = self._weight if group in self.rivals else self._weight + group.weight
        part = int(capacity * group.weight / total)
        if part >= 1:
            room = part - group.backlog - coming
            if self._picked is group and room > 0:
                # A queue with too little for a part of its own waits until its turn comes: each job of the part counts.
                self._turns.count(rivals, group, room - 1)
                self._picked = None
            return room
        if capacity - waiting < 1:
            return 0
        # Too little for a part each: the next queue has its turn.
        if self._picked is None or self._picked not in rivals:
            self._picked = self._turns.pick(rivals)
        if self._picked is not group:
            self._picked.leader.schedule()
            return 0
        self._picked = None
        return 1

    def offer(self) -> None:
        """Let the queues that have a use for room take it, at the next pass of the event loop: once for many ends of jobs."""
        if not self._is_offered and (self.rivals or self._reserved):
            self._is_offered = True
            asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        self._is_offered = False
        for one in (*[group.leader for group in self.rivals], *self._reserved):
            one.schedule(at_once=True)
