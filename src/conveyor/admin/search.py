"""Jobs chosen by the filter language: pages of them with bounded work a call, their number, and actions on all of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from conveyor.admin.job_query import JobQuery
from conveyor.admin.queue_directory import QueueDirectory, ended_in
from conveyor.admin.views import ActionResult, JobInfo, QueueInfo, finished_job, live_job
from conveyor.errors import ConfigurationError, InvalidFilter
from conveyor.messaging.selection import ACTED_ON, LIVE, ActionName, Pace, Walks, act, last_error
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.store import inspection
from conveyor.store.inspection import Ended, JobRow, QueueCounts
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call
from conveyor.units import instant

if TYPE_CHECKING:
    from conveyor.payload.sealed_records import RecordDecoder
    from conveyor.store.client.client import Client

T = TypeVar("T")
MOST_LOOKED = 10_000
"""Jobs that one call looks at."""
_AT_A_TIME = 100
_FAR = 2**53
"""No list of Redis is as long."""
_MOST_LISTED = 100
"""Queues of which the jobs that are done and still listed are counted."""


class SearchPage(msgspec.Struct, frozen=True):
    """
    One page of jobs.

    `next`: where the next page begins, None at the end. `looked`: how many jobs were looked at in this call; `total`: how many
    there are in the queues and states that were asked for. `footer`: what was not searched, as a sentence.
    """

    jobs: list[JobInfo]
    next: str | None
    looked: int
    total: int
    footer: str | None


class MatchCount(msgspec.Struct, frozen=True):
    """The number of jobs that a filter chooses, by state. `exact` is false where the search ended before it had looked at all."""

    count: int
    states: dict[str, int]
    exact: bool


class _SearchStep(msgspec.Struct, frozen=True):
    """The jobs that one step has found, out of *looked*; where it began, and where the next one does (None: at the end)."""

    looked: int
    jobs: list[JobInfo]
    begins: str
    next: str | None


class _Budget(msgspec.Struct):
    """The work that one call may still do: jobs to look at, and the instant (monotonic) at which it ends."""

    looks: int
    ends: float
    looked: int = 0

    @property
    def is_spent(self) -> bool:
        return self.looked >= self.looks or time.monotonic() >= self.ends


class JobSearch:
    """
    Searches through the queues of one client.

    *ask* reads, and returns None where a server does not answer. *queues*: all of them, as they were counted lately; None: those
    that a filter takes are counted.
    """

    def __init__(
        self, client: Client, directory: QueueDirectory, decoder: RecordDecoder, *, sealed: bool,
        ask: Callable[[str, Call[Any]], Any], queues: Sequence[QueueInfo] | None = None,
    ) -> None:  # fmt: skip
        self._client, self._directory, self._decoder, self._sealed, self._ask = client, directory, decoder, sealed, ask
        self._queues = queues

    # -- queues ---------------------------------------------------------------------------------------------------

    def counts(self, parts: Sequence[str]) -> dict[str, QueueCounts]:
        """Return the counts of queues and partitions; a hundred in one step where one server has them all."""
        return {part: counts for part, (counts, _) in self.counts_and_ended(parts, 0).items()}

    def counts_and_ended(self, parts: Sequence[str], minutes: int) -> dict[str, tuple[QueueCounts, list[Ended]]]:
        """Return the counts of queues and partitions, and what ended there in each of the last whole minutes, in the same steps."""
        return self._directory.counts_and_ended(parts, minutes, self._ask)

    def ended(self, names: Collection[str], minutes: int) -> dict[str, list[Ended]]:
        """Return what ended in each of the last whole minutes in these queues, the oldest first."""
        wanted = set(names)
        everything = {name: parts for name, parts in self._directory.everything().items() if name in wanted}
        counted = self.counts_and_ended([part for parts in everything.values() for part in parts], minutes)
        return {name: ended for name, parts in everything.items() if (ended := ended_in(parts, counted))}

    def state_counts(self, queue: str | None) -> dict[str, int]:
        """Count the jobs of a queue, or of all, by state; of `done` those that are still listed, of a hundred queues at most."""
        queues = self._queues
        counts: Sequence[QueueCounts | QueueInfo] = queues or ()
        parts: Sequence[str] = ()
        if queues is None or len(queues) <= _MOST_LISTED:
            known = self._directory.everything() if queue is None else {queue: self._directory.partition_names(queue)}
            parts = [part for some in known.values() for part in some]
        if queues is None:
            counts = list(self.counts(parts).values())
        found: dict[str, int] = {state: sum(getattr(one, state) for one in counts) for state in LIVE}
        if 0 < len(parts) <= _MOST_LISTED or not counts:
            found["done"] = sum(self._entries(part, "done", inspection.NOTHING) for part in parts)
        return found

    def _places(self, query: JobQuery) -> list[tuple[str, str, int]]:
        """Return (queue or partition, state, entries) for all that the filter may find something in."""
        parts = [
            part for name, parts in self._directory.everything().items() for part in parts if query.takes_queue(part)
        ]
        if not parts and query.queue is not None and not any(sign in query.queue for sign in "*?[,"):
            parts = self._directory.partition_names(query.queue)  # raises QueueNotFound, or it is a partition
        # Counts of a queue with partitions are sums.
        known = {one.name: one for one in self._queues or () if one.partitions == 1}
        counts: dict[str, QueueCounts | QueueInfo] = {part: known[part] for part in parts if part in known}
        counts |= self.counts([part for part in parts if part not in counts])
        places: list[tuple[str, str, int]] = []
        for part in parts:
            if part in counts:
                found = ((part, state, self._entries(part, state, counts[part])) for state in query.states or LIVE)
                places += [one for one in found if one[2]]
        return places

    def _entries(self, part: str, state: str, counts: QueueCounts | QueueInfo) -> int:
        if state == "done":
            keys = self._directory.keys(part)
            return int(self._client.execute("LLEN", keys.recent, key=keys.recent))  # type: ignore[call-overload,no-any-return]
        return int(getattr(counts, state))

    # -- pages ----------------------------------------------------------------------------------------------------

    def page(
        self, query: JobQuery, *, cursor: str | None = None, offset: int = 0, limit: int = 50, most: int = MOST_LOOKED,
        seconds: float = 3600.0,
    ) -> SearchPage:  # fmt: skip
        """
        Return jobs that *query* accepts, from *cursor* on; without one after *offset* of them.

        At most *limit* jobs; at most *most* are looked at, for about *seconds*.
        """
        _refuse_ended_tag(query)
        self._refuse_redacted(query)
        budget, jobs = _Budget(most, time.monotonic() + seconds), list[JobInfo]()
        places = self._places(query)
        total = sum(entries for _, _, entries in places)
        begin, at, skip = _read_cursor(cursor, places)
        skip = max(0, offset) if cursor is None else skip

        def page(after: str | None) -> SearchPage:
            footer = None
            if after is not None and not query.chooses_all:
                footer = f"Searched {min(budget.looked, total):,} of {total:,} jobs; the next page goes on from there."
            return SearchPage(jobs, after, budget.looked, total, footer)

        for number in range(begin, len(places)):
            part, state, entries = places[number]
            if query.chooses_all and not at:
                if skip >= entries:
                    skip -= entries
                    continue
                at, skip = str(skip), 0
            for step in self._steps(part, state, query, at, limit):
                budget.looked += step.looked
                room = limit - len(jobs)
                jobs += step.jobs[skip : skip + room]
                taken, skip = skip + room, max(0, skip - len(step.jobs))
                if len(jobs) >= limit:
                    if taken < len(step.jobs):
                        return page(_cursor(part, state, step.begins, taken))
                    return page(
                        _cursor(part, state, step.next) if step.next is not None else _place(places, number + 1)
                    )
                if budget.is_spent and step.next is not None:
                    return page(_cursor(part, state, step.next, skip))
            at = ""
            if budget.is_spent and number + 1 < len(places):
                return page(_place(places, number + 1, skip))
        return page(None)

    def _steps(self, part: str, state: str, query: JobQuery, at: str, limit: int) -> Iterator[_SearchStep]:
        """Yield the jobs of one queue or partition that the filter accepts, step by step, from *at* on."""
        if query.wanted.tag is not None:
            yield from self._tag_steps(part, state, query, at)
            return
        keys, offset = self._directory.keys(part), _offset(at)
        size = min(_AT_A_TIME, max(limit, 20)) if query.chooses_all else _AT_A_TIME
        while True:
            if state == "done":
                entries = self._client.run(inspection.finished(keys, offset, size))
                infos = [finished_job(part, one) for one in entries if one.status != "dead"]
                looked, jobs = len(entries), [info for info in infos if _is_wanted(query, info)]
            else:
                page = self._read(keys, state, offset, size, query)
                looked, jobs = page.entries, self._accepted(part, page.rows, query)
            if looked or jobs:
                yield _SearchStep(looked or len(jobs), jobs, str(offset), str(offset + looked) if looked else None)
            if not looked:  # at the end, or no later one can be wanted
                return
            offset += looked

    def _read(self, keys: QueueKeys, state: str, offset: int, size: int, query: JobQuery) -> inspection.JobPage:
        reads: inspection.Reading = "" if query.needs_payload else "short"
        call = inspection.list_jobs(keys, state, offset, size, query.wanted, reads=reads, ignores_error=self._sealed)
        return self._client.run(call)

    def _refuse_redacted(self, query: JobQuery) -> None:
        """Raise InvalidFilter for a filter that names what nobody is shown. Other terms see the mark in its place."""
        redaction = self._decoder.redaction
        for term in query.rest if redaction else ():
            assert redaction is not None
            path = tuple(term.path.split(".")) if term.field in {"args", "body"} else (term.path,)
            if term.path and redaction.hides_somewhere(path):
                raise InvalidFilter(
                    f"Column {term.position + 1} of the filter: {term.path!r} is redacted, and nobody can search in it. "
                    "Nothing was searched.",
                    term.position,
                )

    def _accepted(self, part: str, rows: Sequence[JobRow], query: JobQuery) -> list[JobInfo]:
        """Return the jobs of *rows* that the filter accepts."""
        wanted = query.wanted
        if wanted.error is not None:
            rows = [row for row in rows if wanted.accepts_error(last_error(row, part, self._decoder))]
        # The limit bounds the page when bodies are decompression bombs.
        jobs = [live_job(part, row, self._decoder, MAX_PAYLOAD) for row in rows]
        return [job for job in jobs if query.accepts(job)]

    def _tag_steps(self, part: str, state: str, query: JobQuery, at: str) -> Iterator[_SearchStep]:
        keys = self._directory.keys(part)
        walk = Walks(query.wanted, self._decoder, self._sealed).finding(keys, (state,))
        walk.cursor = begins = at
        looked, jobs = 0, list[JobInfo]()
        while (call := walk.next_call(_AT_A_TIME)) is not None:
            rows = self._client.run(call)
            rows = self._whole(keys, rows, "" if query.needs_payload else "short")
            jobs += [
                job for job in (live_job(part, row, self._decoder, MAX_PAYLOAD) for row in rows) if query.accepts(job)
            ]
            if walk.unsure or walk.pending:
                continue  # the cursor is behind these already
            yield _SearchStep(walk.looked - looked, jobs, begins, None if walk.ended else walk.cursor)
            looked, jobs, begins = walk.looked, [], walk.cursor

    def _whole(self, keys: QueueKeys, rows: Sequence[JobRow], reads: inspection.Reading = "") -> list[JobRow]:
        """Return jobs with their bodies; those that have ended since are left out."""
        found, left = list[JobRow](), list(rows)
        while left:
            read = self._client.run(inspection.whole_jobs(keys, left[:_AT_A_TIME], reads))
            found += read.rows
            left = left[read.entries :]
        return found

    # -- all that match -------------------------------------------------------------------------------------------

    def count(self, query: JobQuery, states: Sequence[str] = (), *, seconds: float = 3600.0) -> MatchCount:
        """Count the jobs that a filter chooses, for about *seconds*. *states*: those of an action, where the filter names none."""
        self._refuse_redacted(query)
        counts, ends = Counter[str](), time.monotonic() + seconds
        query = replace(query, states=query.states or tuple(states))
        if query.chooses_all:
            for _, state, entries in self._places(query):
                counts[state] += entries
            return MatchCount(sum(counts.values()), dict(counts), exact=True)
        exact = True
        for part, state, _ in self._places(query):
            for found in self._chosen(part, (state,), query):
                counts[state] += len(found)
                if time.monotonic() >= ends:
                    exact = False
                    break
            if not exact:
                break
        return MatchCount(sum(counts.values()), {state: n for state, n in counts.items() if n}, exact)

    def act(
        self, action: ActionName, query: JobQuery, *, limit: int | None = None, rate: str | None = None
    ) -> Iterator[list[ActionResult]]:
        """Carry out *action* on all jobs that *query* chooses, in steps of Redis; yield what became of those of each step."""
        self._refuse_redacted(query)
        states = query.states or ACTED_ON[action]
        if wrong := [state for state in states if state not in ACTED_ON[action]]:
            raise ConfigurationError(
                f"Jobs that are {wrong[0]} cannot be chosen here. Possible: {', '.join(ACTED_ON[action])}. Nothing was done."
            )
        pace, left = Pace(rate), limit
        for part in dict.fromkeys(part for part, _, _ in self._places(replace(query, states=tuple(states)))):
            keys = self._directory.keys(part)
            if query.is_whole:
                made = Walks(query.wanted, self._decoder, self._sealed)
                steps: Iterator[list[Any]] = act(
                    self._client, [made.acting(keys, action, state) for state in states], pace, left
                )
            else:
                steps = self._act_on_found(keys, action, states, query, pace, left)
            for acted in steps:
                results = [ActionResult(*one) for one in acted]
                if left is not None:
                    left -= sum(one.done for one in results)
                yield results
            if left is not None and left <= 0:
                return

    def _act_on_found(
        self, keys: QueueKeys, action: ActionName, states: Sequence[str], query: JobQuery, pace: Pace, limit: int | None
    ) -> Iterator[list[Any]]:
        made, left = Walks(query.wanted, self._decoder, self._sealed), limit
        for state in states:
            for ids in self._chosen(keys.queue, (state,), query):
                if left is not None:
                    ids = ids[: max(0, left)]
                if not ids:
                    continue
                walk = made.acting(keys, action, state)
                walk.pending, walk.ended = tuple(ids), True
                for acted in act(self._client, [walk], pace):
                    if left is not None:
                        left -= sum(one.outcome != "refused" for one in acted)
                    yield acted

    def _chosen(self, part: str, states: tuple[str, ...], query: JobQuery) -> Iterator[list[str]]:
        """Yield the bare ids of the jobs in *states* that a filter chooses, step by step."""
        keys = self._directory.keys(part)
        walk = Walks(query.wanted, self._decoder, self._sealed).finding(keys, states)
        while (call := walk.next_call()) is not None:
            found = self._client.run(call)
            # Bodies are read some at a time, so that whoever has no more time ends between two reads.
            size = _AT_A_TIME if query.rest and query.needs_payload else max(1, len(found))
            for first in range(0, len(found), size) or (0,):
                rows = found[first : first + size]
                if query.rest and query.needs_payload:
                    rows = self._whole(keys, rows)
                if query.rest:
                    rows = [row for row in rows if query.accepts(live_job(part, row, self._decoder, MAX_PAYLOAD))]
                yield [row.id for row in rows]


def _is_wanted(query: JobQuery, info: JobInfo) -> bool:
    wanted = query.wanted
    if wanted.task is not None and info.task != wanted.task:
        return False
    return wanted.accepts(info.ended or instant(0), None) and query.accepts(info)


def _refuse_ended_tag(query: JobQuery) -> None:
    if query.wanted.tag is not None and "done" in query.states:
        raise InvalidFilter("A job that has ended is not found by its tag any more: give a tag, or state:done.")


def _cursor(part: str, state: str, at: str, skip: int = 0) -> str:
    return f"{part}\n{state}\n{skip}\n{at}"


def _place(places: Sequence[tuple[str, str, int]], number: int, skip: int = 0) -> str | None:
    """Return the cursor of the beginning of a place; None behind the last."""
    return _cursor(*places[number][:2], "", skip) if number < len(places) else None


def _read_cursor(cursor: str | None, places: Sequence[tuple[str, str, int]]) -> tuple[int, str, int]:
    """Return the number of the place where a page begins, where in it, and how many jobs are passed over there."""
    if not cursor:
        return 0, "", 0
    part, state, skip, at = [*cursor.split("\n", 3), "", "", "", ""][:4]
    for number, (name, one, _) in enumerate(places):
        if (name, one) == (part, state):
            return number, at, _offset(skip)
        if name > part:
            return number, "", 0
    known = [number for number, (name, _, _) in enumerate(places) if name == part]
    return (known[0] if known else len(places)), "", 0


def _offset(at: str) -> int:
    return min(int(at), _FAR) if at.isdigit() and len(at) < 20 else 0
