"""How much to lease: what will start within about 50 ms, judged by how fast jobs ended lately."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conveyor.worker.protocols import PrefetchPeer

AHEAD = 0.05
"""Seconds of work to hold in advance."""
WINDOW = 0.05
"""Shortest time over which a rate is measured, in seconds: jobs that began together end together."""
MOST = 1000
REPLY_BYTES = 4 * 1024 * 1024


class JobSizeEstimate:
    """The size of the jobs of a queue, as seen lately: one reply may weigh about 4 MB."""

    def __init__(self) -> None:
        """Expect small ones."""
        self._mean = 200.0

    def note(self, envelopes: Sequence[bytes]) -> None:
        """See what was leased."""
        mean = sum(map(len, envelopes)) / len(envelopes)
        self._mean = max(mean, 0.9 * self._mean)  # quick to believe in large ones, slow to forget them

    @property
    def most(self) -> int:
        """How many may be leased at once."""
        return max(1, int(REPLY_BYTES / self._mean))


class Prefetch:
    """Measures the rate of ends and shares the room among queues by their weights."""

    def __init__(self) -> None:
        """Know nothing yet: at first only free slots are filled."""
        self.ended = 0
        self._rate = 0.0
        self._seen, self._at = 0, perf_counter()
        self._picked: PrefetchPeer | None = None
        self._credit: dict[str, float] = {}

    def ahead(self, saturated: bool) -> int:
        """Return how many jobs beyond the free slots to hold; *saturated* tells that work was waiting all the time."""
        now = perf_counter()
        passed = now - self._at
        if passed >= WINDOW:
            rate = (self.ended - self._seen) / passed
            # Idle time says nothing of the speed: only a busy window may lower it.
            if saturated or rate > self._rate:
                self._rate = rate if rate > self._rate else 0.7 * self._rate + 0.3 * rate
            self._seen, self._at = self.ended, now
        return min(MOST, int(self._rate * AHEAD))

    def share(self, capacity: int, waiting: int, consumer: PrefetchPeer, rivals: Sequence[PrefetchPeer]) -> int:
        """
        Return how many jobs *consumer* may lease: its part of *capacity*, less what it has waiting.

        *waiting* is what all queues have leased and not begun; *rivals* are those that may have work, itself included.
        """
        if len(rivals) <= 1:
            return capacity - waiting
        total = sum(rival.weight for rival in rivals)
        part = int(capacity * consumer.weight / total)
        if part >= 1:
            return part - consumer.backlog
        if capacity - waiting < 1:
            return 0
        # Too little for a part each: smooth weighted round robin (as nginx does) says whose turn it is.
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
