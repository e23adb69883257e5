"""The counts of all queues, which all answers of a dashboard share where queues are many."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from heapq import nlargest
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.views import QueueInfo
    from conveyor.store.inspection import Ended

FEW = 300
"""So many queues are counted anew for each answer, in three steps. More of them are counted one after the other."""
MOST_SHOWN = 200
"""Queues that a snapshot has."""
STEP = 100
"""Queues that one step counts."""
_STEPS = 3
"""Steps of a snapshot for the queues that were counted longest ago: ten thousand take 34 of them."""
_SECONDS_OF_NAMES = 5.0


class CountedQueue(NamedTuple):
    """A queue as it was counted at an instant (`at`: monotonic), and what ended there in the last whole minute before."""

    at: float
    info: QueueInfo
    ended: Ended | None


def _jobs(one: CountedQueue) -> int:
    info = one.info
    return info.ready + info.scheduled + info.waiting + info.leased + info.dead


class CountedQueues(NamedTuple):
    """All queues by name, and when the one was counted that was counted first."""

    queues: list[CountedQueue]
    since: datetime

    @property
    def infos(self) -> list[QueueInfo]:
        """The queues without what ended there."""
        return [one.info for one in self.queues]

    def shown(self) -> list[QueueInfo]:
        """Return the queues that a snapshot has, by name: of many those with most jobs."""
        if len(self.queues) <= MOST_SHOWN:
            return self.infos
        return sorted((one.info for one in nlargest(MOST_SHOWN, self.queues, key=_jobs)), key=lambda info: info.name)


class QueueTable:
    """
    The counts of all queues.

    To count ten thousand queues takes a hundred steps and a quarter of a second of two processes: too much for each answer. So they
    share what was counted. While somebody follows, a few hundred of many queues are counted again every second, those
    with most jobs each time and the others in turn. Each answer tells the age of its oldest count.
    """

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._lock = threading.Lock()
        self._partitions: dict[str, list[str]] = {}
        self._named_at = float("-inf")
        self._counted: dict[str, CountedQueue] = {}  # in the order in which they were counted

    def counted(self, seconds: float | None = None) -> CountedQueues:
        """
        Return all queues, none of them counted longer ago than *seconds*; a few are always counted now.

        None: so long ago as following takes to come round, half as much again.
        """
        with self._lock:
            begin = time.monotonic()
            self._read_names(begin, min(_SECONDS_OF_NAMES, 1.0 if seconds is None else seconds))
            count = len(self._partitions)
            limit = 0.0 if count <= FEW else count / (STEP * _STEPS) * 1.5 if seconds is None else seconds
            self._count([name for name in self._partitions if not self._is_younger(name, begin - limit)])
            return self._all()

    def followed(self) -> CountedQueues:
        """Return all queues; of many only those are counted now that have most jobs, and those that were counted longest ago."""
        with self._lock:
            begin = time.monotonic()
            self._read_names(begin, _SECONDS_OF_NAMES)
            names: Sequence[str] = list(self._partitions)
            if len(names) > FEW:
                oldest = min((one.at for one in islice(self._counted.values(), 1)), default=float("-inf"))
                if oldest > begin - 2 * len(names) / (STEP * _STEPS):  # else nobody has followed for a while
                    largest = [one.info.name for one in nlargest(STEP, self._counted.values(), key=_jobs)]
                    new = [name for name in names if name not in self._counted]
                    names = list(
                        dict.fromkeys([*largest, *new, *islice(self._counted, max(0, STEP * _STEPS - len(new)))])
                    )
            self._count(names)
            return self._all()

    def _is_younger(self, name: str, instant: float) -> bool:
        return (one := self._counted.get(name)) is not None and one.at > instant

    def _read_names(self, now: float, seconds: float) -> None:
        """Read the names of queues; of many not in the *seconds* after they were read. Those that are gone leave."""
        if len(self._partitions) > FEW and now - self._named_at < seconds:
            return
        self._partitions = self._admin.queue_partitions()
        self._named_at = now
        self._counted = {name: one for name, one in self._counted.items() if name in self._partitions}

    def _count(self, names: Sequence[str]) -> None:
        now = time.monotonic()
        some = {name: self._partitions[name] for name in names}
        for info, ended in self._admin.count(some, 1):
            self._counted.pop(info.name, None)
            self._counted[info.name] = CountedQueue(now, info, ended[-1] if ended else None)

    def _all(self) -> CountedQueues:
        first = next(iter(self._counted.values()), None)
        since = time.time() - (time.monotonic() - first.at if first else 0.0)
        return CountedQueues([self._counted[name] for name in self._partitions], datetime.fromtimestamp(since, UTC))
