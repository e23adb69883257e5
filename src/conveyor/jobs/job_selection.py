"""Jobs of an app chosen by tag, state, task, error and age: found, counted, cancelled and put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.jobs.job import Job
from conveyor.messaging.selection import (
    Acted,
    ActionName,
    JobWalk,
    Pace,
    Walks,
    aact,
    act,
    acted_states,
    asteps_of,
    since_instant,
    steps_of,
)
from conveyor.store import inspection
from conveyor.store.job_filter import LIVE, JobFilter
from conveyor.store.script import CallProgram, adrive, drive
from conveyor.units import Duration

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.messaging.queue import Queue
    from conveyor.store.inspection import JobRow


class CancelledJobs(int):
    """The number of jobs that were cancelled; `asked` of them are held by workers, which were asked to stop them."""

    asked: int = 0


class JobSelection(msgspec.Struct, frozen=True):
    """
    The jobs of an app that *wanted* accepts, in *state* (None: any that Redis keeps whole) and in *queue* (None: all queues).

    It is made by `select`. Each method yields, or returns, what the method of the app does that has its name.
    """

    core: AppCore
    wanted: JobFilter
    state: str | None
    queue: str | None

    # -- what is sent ---------------------------------------------------------------------------------------------

    def _places(self, known: Iterable[str]) -> list[str]:
        """Return the queues and partitions to walk through, of all that are *known*."""
        if self.queue is None:
            return sorted(known)
        return sorted(name for name in known if self.queue in {name, ids.logical(name)}) or [self.queue]

    @property
    def _states(self) -> tuple[str, ...]:
        return () if self.state is None else (self.state,)

    @property
    def _walks(self) -> Walks:
        return Walks(self.wanted, self.core.decoder, self.core.sealing is not None)

    def acting(self, action: ActionName, known: Iterable[str]) -> list[JobWalk[Acted]]:
        """Return the walks through the queues *known* that carry out *action*."""
        walks, states = self._walks, acted_states(action, self._states)
        return [walks.acting(self.core.keys(name), action, states) for name in self._places(known)]

    def _job(self, queue: str, row: JobRow) -> Job[Any]:
        task = row.envelope.task
        job: Job[Any] = Job(self.core, row.id, queue, self.core.definitions.get(task))
        job.task = task or None
        return job

    def _count(self, known: Iterable[str]) -> CallProgram[int]:
        tag, total = self.wanted.tag, 0
        for name in self._places(known):
            keys = self.core.keys(name)
            if tag is not None and self.state is None and self.wanted == JobFilter(tag=tag):
                total += yield inspection.count_tagged(keys, tag)  # the index alone tells
                continue
            walk = self._walks.counting(keys, self._states)
            while (call := walk.next_call()) is not None:
                found = yield call
                total += sum(sum(counts.values()) for counts in found)
        return total

    def _cancel(self, known: Iterable[str]) -> CallProgram[CancelledJobs]:
        outcomes = Counter[str]()
        for walk in self.acting("cancel", known):
            while (call := walk.next_call()) is not None:
                acted = yield call
                outcomes.update(one.outcome for one in acted)
        cancelled = CancelledJobs(outcomes["cancelled"] + outcomes["asked"])
        cancelled.asked = outcomes["asked"]
        return cancelled

    def refuse_everything(self) -> JobSelection:
        """Return the choice if it leaves anything out; raises ConfigurationError for every job of every queue."""
        if self.wanted.is_empty and self.state is None and self.queue is None:
            raise ConfigurationError(
                "app.cancel() without a filter would cancel every job of every queue. Give tag=, task=, error=, older=, since=, "
                "state= or queue=. Nothing was cancelled."
            )
        return self

    # -- blocking -------------------------------------------------------------------------------------------------

    def find(self) -> Iterator[Job[Any]]:
        """Yield the jobs."""
        client = self.core.client
        for name in self._places(client.queues()):
            walk = self._walks.finding(self.core.keys(name), self._states)
            for rows in steps_of(client, walk):
                for row in rows:
                    yield self._job(name, row)

    def count(self) -> int:
        """Count the jobs."""
        client = self.core.client
        return drive(self._count(client.queues()), client.run)

    def cancel(self) -> CancelledJobs:
        """Cancel the jobs."""
        client = self.core.client
        return drive(self._cancel(client.queues()), client.run)

    def redrive(self, rate: str | None, limit: int | None) -> int:
        """Put the dead letters back."""
        client, pace, most = self.core.client, Pace(rate), checked_limit(limit)
        steps = act(client, self.acting("redrive", client.queues()), pace, most)
        return sum(sum(one.outcome == "retried" for one in acted) for acted in steps)

    # -- awaitable ------------------------------------------------------------------------------------------------

    async def afind(self) -> AsyncIterator[Job[Any]]:
        """Awaitable form of `find`."""
        client = self.core.client
        for name in self._places(await client.aqueues()):
            walk = self._walks.finding(self.core.keys(name), self._states)
            async for rows in asteps_of(client, walk):
                for row in rows:
                    yield self._job(name, row)

    async def acount(self) -> int:
        """Awaitable form of `count`."""
        client = self.core.client
        return await adrive(self._count(await client.aqueues()), client.arun)

    async def acancel(self) -> CancelledJobs:
        """Awaitable form of `cancel`."""
        client = self.core.client
        return await adrive(self._cancel(await client.aqueues()), client.arun)

    async def aredrive(self, rate: str | None, limit: int | None) -> int:
        """Awaitable form of `redrive`."""
        client, pace, most, done = self.core.client, Pace(rate), checked_limit(limit), 0
        steps = aact(client, self.acting("redrive", await client.aqueues()), pace, most)
        async for acted in steps:
            done += sum(one.outcome == "retried" for one in acted)
        return done


def select(
    core: AppCore,
    *,
    tag: str | None = None,
    state: str | None = None,
    task: str | None = None,
    error: str | None = None,
    older: datetime | Duration | None = None,
    since: datetime | Duration | None = None,
    queue: str | Queue[Any] | None = None,
) -> JobSelection:
    """Return a choice of jobs, checked. Raises ConfigurationError."""
    if state is not None and state not in LIVE:
        raise ConfigurationError(
            f"state={state!r} cannot be chosen: a job is found while it is {', '.join(LIVE[:-1])} or {LIVE[-1]}."
        )
    name = None if queue is None else ids.name_of(queue)
    wanted = JobFilter(task, error, since_instant("since", since), since_instant("older", older), tag)
    known_list = name is not None and name in core.plain_lists
    return JobSelection(core, wanted, state, name if name is None or known_list else _queue_or_partition(name))


def _queue_or_partition(name: str) -> str:
    """Return the name of a queue, or of one partition (``orders/3``), if it is valid; raises ConfigurationError."""
    ids.queue_name(ids.logical(name) if isinstance(name, str) else name)
    return name


def checked_limit(limit: int | None) -> int | None:
    """Return a number of jobs; raises ConfigurationError."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise ConfigurationError(f"limit must be a whole number of at least 0, not {limit!r}.")
    return limit
