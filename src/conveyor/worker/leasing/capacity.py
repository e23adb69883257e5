"""The number of jobs that a worker may lease now: free slots, work ahead, shares of the queues, and the limits of recycling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from conveyor.store.operations import MOST_HELD

if TYPE_CHECKING:
    from conveyor.store.operations import TurnReport
    from conveyor.worker.attempt import Attempt
    from conveyor.worker.execution.executor import Executor
    from conveyor.worker.leasing.quarantine import Quarantine
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
    weight: float
    backlog: int
    has_more: bool
    paused: bool
    report: TurnReport
    quarantine: Quarantine
    job_size: JobSizeEstimate

    @property
    def held(self) -> Sized: ...
    def running(self) -> Iterator[Attempt]: ...
    def schedule(self) -> None: ...


class Capacity:
    """Divides the room of one worker among its queues, by their weights. Asked once for each turn that may lease."""

    def __init__(
        self, executor: Executor, lifecycle: Lifecycle, limits: RecycleLimits, queues: Sequence[LeasingQueue]
    ) -> None:
        self._executor, self._lifecycle, self._limits = executor, lifecycle, limits
        self._queues = queues
        self.finished = 0
        """Attempts that have ended so far."""
        self._rate = 0.0  # ends a second; 0 at first, so that only free slots are filled
        self._rated, self._rated_at = 0, perf_counter()
        self._picked: LeasingQueue | None = None
        self._credit: dict[str, float] = {}

    def room(self, consumer: LeasingQueue) -> int:
        """Return how many jobs *consumer* may lease now."""
        if self._lifecycle.stopping:
            return 0
        waiting = reserved = 0
        rivals = []  # the queues that may have work, and the asking one
        for one in self._queues:
            waiting += one.backlog
            reserved += one.quarantine.reserved
            if one is consumer or (one.has_more and not one.paused):
                rivals.append(one)
        free = self._executor.free + waiting - reserved  # slots that no job runs in
        capacity = free + self.ahead(consumer.backlog > 0)
        if self._limits.is_limited:
            capacity = min(capacity, waiting + self._limits.remaining(self.taken))
        room = capacity - waiting if len(rivals) == 1 else self._share(capacity, waiting, consumer, rivals)
        settled = len(consumer.report.done) + len(consumer.report.others)  # given back before more is taken
        return max(0, min(room, BATCH, consumer.job_size.max_jobs, MOST_HELD - len(consumer.held) + settled))

    @property
    def taken(self) -> int:
        """Jobs that were leased so far."""
        return self.finished + sum(1 for one in self._queues for _ in one.running())

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

    def _share(self, capacity: int, waiting: int, consumer: LeasingQueue, rivals: Sequence[LeasingQueue]) -> int:
        """
        Return how many jobs *consumer* may lease: its part of *capacity*, less what it has waiting.

        *waiting* is what all queues have leased and not started; *rivals* are those that may have work, itself included.
        """
        total = sum(rival.weight for rival in rivals)
        part = int(capacity * consumer.weight / total)
        if part >= 1:
            return part - consumer.backlog
        if capacity - waiting < 1:
            return 0
        # Too little for a part each: smooth weighted round robin (as nginx does) picks the next queue.
        if self._picked is None or self._picked not in rivals:
            for rival in rivals:
                self._credit[rival.queue] = self._credit.get(rival.queue, 0.0) + rival.weight
            self._picked = max(rivals, key=lambda rival: self._credit[rival.queue])
            self._credit[self._picked.queue] -= total
        if self._picked is not consumer:
            self._picked.schedule()
            return 0
        self._picked = None
        return 1

    def pass_on(self) -> None:
        """Schedule the queues that may have work, because the asking one had no use for its room."""
        if len(self._queues) > 1:
            for one in self._queues:
                if one.has_more:
                    one.schedule()
