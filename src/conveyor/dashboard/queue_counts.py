"""The counts of all queues, which all answers of a dashboard share where queues are many."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from heapq import nlargest
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from conveyor.admin.queue_flow import FlowMeter
from conveyor.admin.worker_control import processes_of, slots_of

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.queue_flow import Flow
    from conveyor.admin.views import QueueInfo, WorkerInfo
    from conveyor.admin.worker_control import Slots, WorkerProcess
    from conveyor.store.inspection import Ended

FEW = 300
"""So many queues are counted anew for each answer, in three steps. More of them are counted one after the other."""
MOST_SHOWN = 200
"""Queues that a snapshot has."""
STEP = 100
"""Queues that one step counts."""
_STEPS = 3
"""Steps of a snapshot for the queues that were counted longest ago: ten thousand take 34 of them."""
_SECONDS_FOLLOWED = 5.0
"""Seconds after which slots and rates that were found for those who follow are not told any more."""
_SECONDS_OF_NAMES, _LONGEST_PAUSE = 5.0, 60.0
"""Seconds for which names of many queues serve, and after which one who begins to follow has all queues counted."""


class CountedQueue(msgspec.Struct, frozen=True, gc=False):  # ten thousand at once: no cycle to look for
    """
    A queue as it was counted at an instant (`at`: monotonic).

    `ended`: what ended there in the last whole minute before it was last counted for those who follow; None: it never was.
    `listed`: when its workers were listed, as `at`, or seen to be none. `flow`: its rates when it was last counted for those who
    follow.
    """

    at: float
    info: QueueInfo
    ended: Ended | None = None
    workers: Sequence[WorkerInfo] = ()
    listed: float = float("-inf")
    flow: Flow | None = None


def _jobs(one: CountedQueue) -> int:
    info = one.info
    return info.ready + info.scheduled + info.waiting + info.leased + info.dead


class CountedQueues(NamedTuple):
    """All queues by name, when the one was counted that was counted first, and the partitions of each."""

    queues: list[CountedQueue]
    since: datetime
    partitions: Mapping[str, list[str]]

    @property
    def infos(self) -> list[QueueInfo]:
        """The queues without what ended there."""
        return [one.info for one in self.queues]

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers of the queues."""
        return [worker for one in self.queues for worker in one.workers]

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
        self._partitions: Mapping[str, list[str]] = {}
        self._named_at = self._followed_at = float("-inf")
        self._counted: dict[str, CountedQueue] = {}  # in the order in which following has counted them
        self._meter = FlowMeter()

    def counted(self, seconds: float | None = None, *, workers: bool = False) -> CountedQueues:
        """
        Return all queues, none of them counted longer ago than *seconds*; a few are always counted now.

        None: so long ago as following takes to come round, half as much again. *workers*: theirs were listed no longer ago; else
        they may be old, or missing, and the server is not asked for them.
        """
        with self._lock:
            begin = time.monotonic()
            self._read_names(begin, min(_SECONDS_OF_NAMES, 1.0 if seconds is None else seconds))
            count = len(self._partitions)
            limit = 0.0 if count <= FEW else count / (STEP * _STEPS) * 1.5 if seconds is None else seconds
            known, instant = self._counted, begin - limit
            old = [
                name for name in self._partitions
                if (one := known.get(name)) is None or one.at <= instant or (workers and one.listed <= instant)
            ]  # fmt: skip
            for info, _, rows, _ in self._admin.count({name: self._partitions[name] for name in old}, workers=workers):
                former = known.get(info.name) or CountedQueue(begin, info)
                is_listed = workers or not (info.workers or info.silent)
                listed = (rows, begin) if is_listed else (former.workers, former.listed)
                # It keeps its turn, so that each comes round.
                known[info.name] = CountedQueue(begin, info, former.ended, *listed, former.flow)
            return self._all()

    def followed(self) -> CountedQueues:
        """Return all queues; of many only those are counted now that have most jobs, and those that were counted longest ago."""
        with self._lock:
            begin = time.monotonic()
            self._read_names(begin, _SECONDS_OF_NAMES)
            names: Sequence[str] = list(self._partitions)
            if len(names) > FEW and begin - self._followed_at < _LONGEST_PAUSE:
                largest = [one.info.name for one in nlargest(STEP, self._counted.values(), key=_jobs)]
                new = [name for name in names if name not in self._counted]
                names = list(dict.fromkeys([*largest, *new, *islice(self._counted, max(0, STEP * _STEPS - len(new)))]))
            partitions = {name: self._partitions[name] for name in names}
            for one in self._admin.count(partitions, 1, workers=True):
                flow = self._meter.add(one, {str(worker.about.get("kind", "")) for worker in one.workers})
                ended = one.ended[-1] if one.ended else None
                self._counted.pop(one.info.name, None)
                self._counted[one.info.name] = CountedQueue(begin, one.info, ended, one.workers, begin, flow)
            self._followed_at = begin
            return self._all()

    def slots(self) -> dict[str, Slots]:
        """
        Return the slots of the workers that serve each queue, which takes no command; a queue without a worker is left out.

        Nothing is known while nobody follows, and of many queues, which are not counted at the same time.
        """
        with self._lock:
            if len(self._partitions) > FEW or time.monotonic() - self._followed_at > _SECONDS_FOLLOWED:
                return {}
            serving = [worker for one in self._counted.values() if one.info.workers for worker in one.workers]
        found: dict[str, list[WorkerProcess]] = {}
        for process in processes_of(serving):
            for name in process.queues:
                found.setdefault(name, []).append(process)
        return {name: slots_of(processes) for name, processes in found.items()}

    def flows(self) -> dict[str, Flow]:
        """Return the rates of queues as those who follow see them; none when nobody follows."""
        with self._lock:
            if time.monotonic() - self._followed_at > _SECONDS_FOLLOWED:
                return {}
            return {name: one.flow for name, one in self._counted.items() if one.flow is not None}

    def _read_names(self, now: float, seconds: float) -> None:
        """Read the names of queues; of many not in the *seconds* after they were read. Those that are gone leave."""
        if len(self._partitions) > FEW and now - self._named_at < seconds:
            return
        self._partitions = self._admin.queue_partitions()
        self._named_at = now
        self._counted = {name: one for name, one in self._counted.items() if name in self._partitions}
        self._meter.keep(self._partitions.keys())

    def _all(self) -> CountedQueues:
        queues, now = [self._counted[name] for name in self._partitions], time.monotonic()
        since = time.time() - now + min([one.at for one in queues], default=now)
        return CountedQueues(queues, datetime.fromtimestamp(since, UTC), self._partitions)
