"""Jobs chosen by the filter language: pages of them with bounded work a call, their number, and actions on all of them."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from conveyor.admin.job_query import JobQuery
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.admin.views import ActionResult, JobInfo, QueueInfo, finished_job, live_job
from conveyor.errors import ConfigurationError, InvalidFilter
from conveyor.messaging.selection import (
    Acted,
    ActionName,
    JobWalk,
    Pace,
    Sleep,
    Walks,
    act,
    acted_states,
    last_error,
    steps_of,
)
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.store import inspection
from conveyor.store.inspection import JobRow, QueueCounts
from conveyor.store.job_filter import LIVE
from conveyor.store.keys import QueueKeys
from conveyor.units import digits, instant, whole_number

if TYPE_CHECKING:
    from conveyor.payload.sealed_records import RecordDecoder
    from conveyor.store.client.client import Client

MOST_LOOKED = 10_000
"""Jobs that one call looks at."""
_AT_A_TIME = 100
"""Jobs that one step of a page looks at."""
_HEADS_SIZE = 250
"""The same where nobody waits for a page, so that it takes the server a millisecond or two."""
_PAGE_SIZE = 500
"""The same where all are taken."""
_FAR = 2**53
"""No list of Redis is as long."""


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

    *counts* counts queues and partitions, and leaves out those whose server does not answer. *queues*: all of them, as they were
    counted lately; None: those that a filter takes are counted.
    """

    def __init__(
        self, client: Client, directory: QueueDirectory, decoder: RecordDecoder, *, sealed: bool,
        counts: Callable[[Sequence[str]], Mapping[str, QueueCounts]], queues: Sequence[QueueInfo] | None = None,
    ) -> None:  # fmt: skip
        self._client, self._directory, self._decoder, self._sealed = client, directory, decoder, sealed
        self._counts, self._queues = counts, queues

    def places(self, query: JobQuery) -> list[tuple[str, str, int]]:
        """
        Return (queue or partition, state, entries) for all that the filter may find something in.

        Of a tag each queue comes once, with "" for all states: its jobs are in the order of their ids.
        """
        parts = [
            part for name, parts in self._directory.everything().items() for part in parts if query.takes_queue(part)
        ]
        if not parts and query.queue is not None and not any(sign in query.queue for sign in "*?[,"):
            parts = self._directory.partition_names(query.queue)  # raises QueueNotFound, or it is a partition
        # Counts of a queue with partitions are sums.
        known = {one.name: one for one in self._queues or () if one.partitions == 1}
        counts: dict[str, QueueCounts | QueueInfo] = {part: known[part] for part in parts if part in known}
        counts |= self._counts([part for part in parts if part not in counts])
        states = query.states or (LIVE if query.wanted.tag is None else ("",))
        found = (
            (part, state, self._entries(part, state, counts[part]))
            for part in parts
            if part in counts
            for state in states
        )
        return [one for one in found if one[2]]

    def _entries(self, part: str, state: str, counts: QueueCounts | QueueInfo) -> int:
        if state == "done":
            return self.listed_done(part)
        return sum(int(getattr(counts, one)) for one in ((state,) if state else LIVE))

    def listed_done(self, part: str) -> int:
        """Count the jobs that are done and still listed."""
        keys = self._directory.keys(part)
        return int(self._client.execute("LLEN", keys.recent, key=keys.recent))  # type: ignore[call-overload,no-any-return]

    # -- one after the other --------------------------------------------------------------------------------------

    def each(self, query: JobQuery, *, offset: int = 0, limit: int | None = None) -> Iterator[JobInfo]:
        """Yield the jobs that *query* accepts, with their whole bodies, after *offset* of them; *limit*: at most, None: all."""
        self._refuse(query)
        left = sys.maxsize if limit is None else whole_number("limit", limit, 0)
        whole_number("offset", offset, 0)
        most = _HEADS_SIZE if query.wanted.needs_heads else _PAGE_SIZE
        size = min(most, max(left, 1)) if query.chooses_all else most
        for _, step, skip in self._steps(self.places(query), query, (0, "", offset), size, ""):
            jobs = step.jobs[skip : skip + left]
            yield from jobs
            left -= len(jobs)
            if not left:
                return

    def page(
        self, query: JobQuery, *, cursor: str | None = None, offset: int = 0, limit: int = 50, most: int = MOST_LOOKED,
        seconds: float = 3600.0,
    ) -> SearchPage:  # fmt: skip
        """
        Return jobs that *query* accepts, from *cursor* on; without one after *offset* of them.

        At most *limit* jobs; at most *most* are looked at, for about *seconds*. A page of all that its queues and states have
        searches nothing, so it is filled however long that takes. Of bodies the beginning is read, unless *query* looks into
        them.
        """
        self._refuse(query)
        for name, number in (("limit", limit), ("offset", offset), ("most", most)):
            whole_number(name, number, 0)
        places = self.places(query)
        ends = math.inf if query.chooses_all else time.monotonic() + seconds
        budget, jobs = _Budget(most, ends), list[JobInfo]()
        total = sum(entries for _, _, entries in places)

        def page(after: str | None) -> SearchPage:
            footer = None
            if after is not None and not query.chooses_all:
                footer = f"Searched {min(budget.looked, total):,} of {total:,} jobs; the next page goes on from there."
            return SearchPage(jobs, after, budget.looked, total, footer)

        start = (0, "", offset) if cursor is None else _read_cursor(cursor, places)
        size = min(_AT_A_TIME, max(limit, 20)) if query.chooses_all else _AT_A_TIME
        for number, step, skip in self._steps(places, query, start, size, "" if query.needs_payload else "short"):
            part, state, _ = places[number]
            budget.looked += step.looked
            taken = skip + limit - len(jobs)
            jobs += step.jobs[skip:taken]
            full = len(jobs) >= limit
            if full and taken < len(step.jobs):
                return page(_cursor(part, state, step.begins, taken))
            if full or budget.is_spent:
                left = max(0, skip - len(step.jobs))
                return page(
                    _place(places, number + 1, left) if step.next is None else _cursor(part, state, step.next, left)
                )
        return page(None)

    def _steps(
        self, places: Sequence[tuple[str, str, int]], query: JobQuery, start: tuple[int, str, int], size: int,
        reads: inspection.Reading,
    ) -> Iterator[tuple[int, _SearchStep, int]]:  # fmt: skip
        """
        Yield the number of each place, each step there, and how many of its jobs are passed over; the last of a place has no next.

        *start*: the number of the first place, where in it, and how many jobs are passed over.
        """
        begin, at, skip = start
        for number in range(begin, len(places)):
            part, state, entries = places[number]
            keys = self._directory.keys(part)
            if query.wanted.tag is not None:
                steps = self._tag_steps(keys, state, query, at, size, reads)
            else:
                end = _FAR if at else entries + self._stubs(keys, state)
                if query.chooses_all and not at:
                    if skip >= end:
                        skip -= end
                        continue
                    at, skip = str(skip), 0
                steps = self._list_steps(keys, state, query, at, end, size, reads)
            for step in steps:
                yield number, step, skip
                skip = max(0, skip - len(step.jobs))
            at = ""

    def _stubs(self, keys: QueueKeys, state: str) -> int:
        """Count the stubs of cancelled jobs that are still in the lists of a state."""
        if state != "ready":
            return 0
        return int(self._client.execute("HGET", keys.conf, "stubs", key=keys.conf) or 0)  # type: ignore[call-overload,no-any-return]

    def _list_steps(
        self, keys: QueueKeys, state: str, query: JobQuery, at: str, end: int, size: int, reads: inspection.Reading
    ) -> Iterator[_SearchStep]:
        """Yield the jobs of one queue or partition that the filter accepts, step by step, from *at* to *end*."""
        offset, ended = _offset(at), False
        while not ended:
            if state == "done":
                entries = self._client.run(inspection.finished(keys, offset, size))
                infos = [finished_job(keys.queue, one) for one in entries if one.status != "dead"]
                looked, jobs = len(entries), [info for info in infos if _is_wanted(query, info)]
            else:
                looked, rows = self._look(keys, state, offset, size, query, reads)
                jobs = self._accepted(keys.queue, rows, query)
            begins, offset = offset, offset + looked
            # None was looked at where no later one can be wanted, or the list has become shorter.
            ended = not looked or offset >= end
            yield _SearchStep(looked or len(jobs), jobs, str(begins), None if ended else str(offset))

    def _look(
        self, keys: QueueKeys, state: str, offset: int, size: int, query: JobQuery, reads: inspection.Reading
    ) -> tuple[int, list[JobRow]]:
        """Look at *size* jobs; return how many these were, 0 at the end, and those that the `JobFilter` accepts."""
        wanted = query.wanted
        compares = self._sealed and wanted.error is not None
        first: inspection.Reading = "heads" if compares else reads
        page = self._client.run(
            inspection.list_jobs(keys, state, offset, size, wanted, reads=first, ignores_error=compares)
        )
        if wanted.error is None:
            return page.entries, page.rows
        rows = [row for row in page.rows if wanted.accepts_error(last_error(row, keys.queue, self._decoder))]
        return page.entries, self._whole(keys, rows, reads) if compares else rows

    def _tag_steps(
        self, keys: QueueKeys, state: str, query: JobQuery, at: str, size: int, reads: inspection.Reading
    ) -> Iterator[_SearchStep]:
        """Yield the jobs that have the tag and that the filter accepts, step by step, from *at* on."""
        walk = self._walks(query).finding(keys, (state,) if state else ())
        walk.cursor = begins = at
        looked, jobs = 0, list[JobInfo]()
        while (call := walk.next_call(size)) is not None:
            heads = self._client.run(call)
            jobs += self._accepted(keys.queue, self._whole(keys, heads, reads), query)
            if walk.unsure or walk.pending:
                continue  # the cursor is behind these already
            yield _SearchStep(walk.looked - looked, jobs, begins, None if walk.ended else walk.cursor)
            looked, jobs, begins = walk.looked, [], walk.cursor

    def _accepted(self, part: str, rows: Sequence[JobRow], query: JobQuery) -> list[JobInfo]:
        """Return those jobs of *rows* that the other terms of the filter accept."""
        # The limit bounds the page when bodies are decompression bombs.
        jobs = (live_job(part, row, self._decoder, MAX_PAYLOAD) for row in rows)
        return [job for job in jobs if query.accepts(job)]

    def _whole(self, keys: QueueKeys, rows: Sequence[JobRow], reads: inspection.Reading = "") -> list[JobRow]:
        """Return jobs with their bodies; those that have ended since are left out."""
        return whole_rows(self._client, keys, rows, reads)

    def _walks(self, query: JobQuery) -> Walks:
        return Walks(query.wanted, self._decoder, self._sealed)

    def _refuse(self, query: JobQuery) -> None:
        """Raise InvalidFilter for a filter by which nothing can be found."""
        if query.wanted.tag is not None and "done" in query.states:
            raise InvalidFilter("A job that has ended is not found by its tag any more: give a tag, or state:done.")
        self._refuse_redacted(query)

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

    # -- all that match -------------------------------------------------------------------------------------------

    def count(self, query: JobQuery, states: Sequence[str] = (), *, seconds: float = 3600.0) -> MatchCount:
        """Count the jobs that a filter chooses, for about *seconds*. *states*: those of an action, where the filter names none."""
        self._refuse_redacted(query)
        query = replace(query, states=query.states or tuple(states))
        counts, ends, exact = Counter[str](), time.monotonic() + seconds, True
        if query.chooses_all:
            for _, state, entries in self.places(query):
                counts[state] += entries
        else:
            for found in self._counted(query):
                counts.update(found)
                if time.monotonic() >= ends:
                    exact = False
                    break
        return MatchCount(counts.total(), dict(+counts), exact)

    def _counted(self, query: JobQuery) -> Iterator[Mapping[str, int]]:
        """Yield how many jobs each step chooses, by state."""
        for keys in self._holding(query):
            if query.is_whole:
                for counts in steps_of(self._client, self._walks(query).counting(keys, query.states)):
                    yield from counts
            else:
                for rows in self._chosen(keys, query.states, query):
                    yield Counter(row.status for row in rows)

    def act(
        self, action: ActionName, query: JobQuery, *, limit: int | None = None, rate: str | None = None,
        sleep: Sleep | None = None,
    ) -> Iterator[list[ActionResult]]:  # fmt: skip
        """Carry out *action* on all jobs that *query* chooses, in steps of Redis; yield what became of those of each step."""
        self._refuse_redacted(query)
        states = acted_states(action, query.states)
        for acted in act(self._client, self._acting(action, states, query), Pace(rate), limit, sleep):
            yield [ActionResult(*one) for one in acted]

    def _acting(self, action: ActionName, states: Collection[str], query: JobQuery) -> Iterator[JobWalk[Acted]]:
        """Yield the walks that act: one a queue or partition where Redis chooses, else one for those that a step has found."""
        walks = self._walks(query)
        for keys in self._holding(replace(query, states=tuple(states))):
            if query.is_whole:
                yield walks.acting(keys, action, states)
                continue
            for rows in self._chosen(keys, states, query):
                walk = walks.acting(keys, action, states)
                walk.pending, walk.ended = tuple(row.id for row in rows), True
                yield walk

    def _holding(self, query: JobQuery) -> list[QueueKeys]:
        """Return the keys of the queues and partitions that the filter may find something in."""
        return [self._directory.keys(part) for part in dict.fromkeys(part for part, _, _ in self.places(query))]

    def _chosen(self, keys: QueueKeys, states: Collection[str], query: JobQuery) -> Iterator[list[JobRow]]:
        """Yield the heads of the jobs in *states* that a filter chooses, step by step."""
        for found in steps_of(self._client, self._walks(query).finding(keys, states)):
            if not query.needs_payload:
                yield [row for row in found if self._accepted(keys.queue, [row], query)]
                continue
            # Bodies are read some at a time, so that whoever has no more time ends between two reads.
            for first in range(0, len(found), _AT_A_TIME) or (0,):
                rows = self._whole(keys, found[first : first + _AT_A_TIME])
                yield [row for row in rows if self._accepted(keys.queue, [row], query)]


def _is_wanted(query: JobQuery, info: JobInfo) -> bool:
    wanted = query.wanted
    if wanted.task is not None and info.task != wanted.task:
        return False
    return wanted.accepts(info.ended or instant(0), None) and query.accepts(info)


def whole_rows(
    client: Client, keys: QueueKeys, heads: Sequence[JobRow], reads: inspection.Reading = ""
) -> list[JobRow]:
    """Return jobs with their bodies and all errors; those that have ended since are left out."""
    found, left = list[JobRow](), list(heads)
    while left:
        read = client.run(inspection.whole_jobs(keys, left[:_HEADS_SIZE], reads))
        found += read.rows
        left = left[read.entries :]
    return found


def _cursor(part: str, state: str, at: str, skip: int = 0) -> str:
    return f"{part}\n{state}\n{skip}\n{at}"


def _place(places: Sequence[tuple[str, str, int]], number: int, skip: int = 0) -> str | None:
    """Return the cursor of the beginning of a place; None behind the last."""
    return _cursor(*places[number][:2], "", skip) if number < len(places) else None


def _read_cursor(cursor: str | None, places: Sequence[tuple[str, str, int]]) -> tuple[int, str, int]:
    """Return the number of the place where a page begins, where in it, and how many jobs are passed over there."""
    if not cursor:
        return 0, "", 0
    if not isinstance(cursor, str):
        raise ConfigurationError(f"cursor takes the next of the page before, a text, not {cursor!r}.")
    part, state, skip, at = [*cursor.split("\n", 3), "", "", "", ""][:4]
    for number, (name, one, _) in enumerate(places):
        if (name, one) == (part, state):
            return number, at, _offset(skip)
        if name > part:
            return number, "", 0
    known = [number for number, (name, _, _) in enumerate(places) if name == part]
    return (known[0] if known else len(places)), "", 0


def _offset(at: str) -> int:
    return min(digits(at) or 0, _FAR)
