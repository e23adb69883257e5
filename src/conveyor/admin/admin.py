"""
Reads and actions on queues, jobs and workers.

The interface behind the command line and the dashboard. Everything is typed and works on any queue of one client.
Calls block, and each has an awaitable twin that runs in a thread. Workers never import this module.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from copy import copy
from datetime import UTC, datetime
from functools import cache, partial, wraps
from heapq import nlargest
from itertools import islice
from math import inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

import msgspec
from msgspec.structs import replace

from conveyor.acting import LONGEST_NAME, acting_as
from conveyor.admin import doctor
from conveyor.admin.flags import Flag, failing_tasks, late_schedules, overdue_jobs, queue_flags
from conveyor.admin.history import MOST_MARKS, History, read_history
from conveyor.admin.job_search import FailureCount, last_failure
from conveyor.admin.known_redaction import KnownRedaction
from conveyor.admin.queue_directory import QueueDirectory, ended_in
from conveyor.admin.server_info import server_time
from conveyor.admin.views import (
    ActionResult,
    AuditEntry,
    FailureSummary,
    JobInfo,
    JobReport,
    QueueCount,
    QueueInfo,
    WorkerInfo,
    audit_entry,
    error_info,
    live_job,
    queue_info,
    without_values,
)
from conveyor.admin.worker_control import (
    LeasedJob,
    QueueWorkers,
    WorkerProcess,
    by_process,
    command,
    find_process,
    leased_job,
    processes_of,
)
from conveyor.errors import (
    ConfigurationError,
    ConveyorError,
    JobNotFound,
    PayloadError,
    ResultExpired,
    StoreUnavailable,
    UnknownTask,
)
from conveyor.ids import clean, label_text, logical, made_at_ms, public, queue_name, split
from conveyor.jobs.history import HistoryEntry, ended_history, live_history
from conveyor.jobs.why import QueueCause, Why, explain, queue_causes, with_openings
from conveyor.messaging.partitions import refuse_full
from conveyor.payload.formats import JSON, FormatRegistry
from conveyor.payload.live_records import LogLine
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import AttemptHistory, Status, read_envelope, read_outcome
from conveyor.payload.redaction import REDACTED, Hide
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store import inspection, limits, operations, schedules, worker_commands
from conveyor.store.audit_log import audit_key, keep_audit, marks_key, note_action, read_audit, write_audit
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability
from conveyor.store.client.outages import FIRST_TRY
from conveyor.store.inspection import CountedPart, Ended, FinishedJob, JobRow, QueueCounts, WorkerRow
from conveyor.store.job_filter import ANY_JOB, LIVE, JobFilter, Walk
from conveyor.store.keys import PRIORITIES, QueueKeys
from conveyor.store.script import Call
from conveyor.store.transport import replies
from conveyor.store.transport.endpoint import in_thread
from conveyor.store.worker_commands import FOLLOWED, WorkerAction
from conveyor.units import Duration, instant, instant_or_none, milliseconds, whole_number

if TYPE_CHECKING:
    from conveyor.admin import metrics
    from conveyor.admin.failure_matrix import FailureMatrix
    from conveyor.admin.job_query import JobQuery
    from conveyor.admin.search import JobSearch, MatchCount, SearchPage
    from conveyor.events import JobUpdate
    from conveyor.jobs.core import AppCore
    from conveyor.jobs.job import Job
    from conveyor.jobs.watching import Changes, WatchHub
    from conveyor.messaging.limit_control import LimitState
    from conveyor.messaging.selection import ActionName, Sleep

T = TypeVar("T")
P = ParamSpec("P")

logger = logging.getLogger("conveyor.admin")
PAGE_SIZE = 500
_HEADS_SIZE = 250
"""Jobs of which one call reads the last error, so that it takes the server a millisecond or two."""
_MATRIX_SIZE = 100
"""The same while people wait for a page, and other programs for the server."""
_WORKERS_SIZE = 500
"""Queues of which one call reads the workers."""
_LONGEST_MARK = 100
_IDS_NOTED = 10
_LONGEST_ID = 200
_ENTRY = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")
MOST_ENTRIES = 10_000
"""Entries of the audit that one call returns."""
_AT_A_TIME = 100
"""Jobs that a thread reads before an awaiting caller gets them."""
_MOST_LISTED = 100
"""Queues of which the jobs that are done and still listed are counted."""
_TOTALS_OF: tuple[Literal["total"], Literal["last"]] = ("total", "last")
_TRIES = 5
"""So often are counters read anew to which a minute was added meanwhile."""
_MOST_HOLDING, _LONGEST = 100, 20
"""Workers, and jobs of each, of which is asked whether they run too long: what a worker holds is in the order of its starts."""


class _JobLookup(msgspec.Struct, frozen=True):
    keys: QueueKeys
    id: str
    location: str
    row: JobRow | None
    record: bytes


def _named_after(method: Callable[..., Any], twin: Callable[..., Any]) -> None:
    twin.__name__, twin.__qualname__ = f"a{method.__name__}", f"Admin.a{method.__name__}"
    twin.__doc__ = f"Awaitable form of `{method.__name__}`."


def _awaitable(
    method: Callable[Concatenate[Admin, P], T],
) -> Callable[Concatenate[Admin, P], Coroutine[Any, Any, T]]:
    """Return the awaitable twin of a blocking method."""

    @wraps(method)
    async def twin(self: Admin, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await in_thread(partial(method, self, *args, **kwargs))

    _named_after(method, twin)
    return twin


def _awaitable_iterator(
    method: Callable[Concatenate[Admin, P], Iterator[T]], at_a_time: int = _AT_A_TIME
) -> Callable[Concatenate[Admin, P], AsyncIterator[T]]:
    """Return the awaitable twin of a method that yields; *at_a_time*: what a thread reads before the caller gets it."""

    @wraps(method)
    async def twin(self: Admin, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        values = await in_thread(partial(method, self, *args, **kwargs))
        while page := await in_thread(lambda: list(islice(values, at_a_time))):
            for value in page:
                yield value

    _named_after(method, twin)
    return twin


def _acting(method: Callable[Concatenate[Admin, P], T]) -> Callable[Concatenate[Admin, P], T]:
    """Return an action that stands under the name of whoever acts (`Admin.who`) in the histories of jobs."""

    @wraps(method)
    def action(self: Admin, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self.who:
            return method(self, *args, **kwargs)
        with acting_as(self.who[:LONGEST_NAME]):
            return method(self, *args, **kwargs)

    return action


class Admin:
    """Reads and actions over all queues of one client."""

    def __init__(
        self,
        client: Client,
        *,
        plain_lists: Collection[str] = (),
        sealing: PayloadPipeline | None = None,
        formats: FormatRegistry = JSON,
        durability_requests: Mapping[str, Durability] | None = None,
    ) -> None:
        """
        Create the interface to all queues of *client*.

        *plain_lists*: names of lists shared with other programs; Redis does not record which ones are. *sealing* and
        *formats*: those of the app; without them a sealed payload, error or result is described instead of shown.
        *durability_requests*: the durability that queues request for every push; the doctor checks it.
        """
        if hasattr(client, "client"):  # an app has one
            raise ConfigurationError("Admin takes the connections of an app. Write: Admin(app.client)")
        self.durability_requests = durability_requests or {}
        self.who = ""
        """The name of the user or account for the audit; "": nothing is noted."""
        self._sealing, self._formats = sealing, formats
        self._core: AppCore | None = None  # of the app, which knows tasks
        self._redaction = KnownRedaction(client)
        self.client = client
        self.plain_lists = frozenset(plain_lists)
        self._directory = QueueDirectory(client, plain_lists)
        self.unanswered: set[str] = set()
        """The queues and partitions that reads left out because their server does not answer."""

    @classmethod
    def of_app(cls, app: Any, client: Client | None = None) -> Admin:
        """Return the interface to the queues of an app, with its keys and formats; *client*: instead of the app's own."""
        from conveyor.jobs.core import core_of

        core = core_of(app)
        requests = {name: queue.durability for name, queue in core.queues.items() if queue.durability is not None}
        admin = cls(
            client or core.client, plain_lists=core.plain_lists, sealing=core.sealing, formats=core.formats,
            durability_requests=requests,
        )  # fmt: skip
        admin._core = core
        return admin

    @property
    def _decoder(self) -> RecordDecoder:
        """The decoder of bodies, results and errors, less what is redacted; the names of that are read from time to time."""
        return RecordDecoder(self._sealing, self._formats, self._redaction.current())

    @property
    def _seals(self) -> bool:
        """True when Redis cannot compare the texts of errors: they are sealed, or are compared as people see them."""
        return self._sealing is not None or bool(self._redaction.current())

    def acting_as(self, who: str) -> Admin:
        """Return the same interface for somebody, who stands in the audit with every action."""
        other = copy(self)
        other.who, other.unanswered = who, set()
        return other

    def knowing(self, partitions: Mapping[str, list[str]]) -> Admin:
        """
        Return the same interface for an answer that asks several things: it reads the names of queues no more.

        *partitions*: all queues, as `queue_partitions` returned them just now.
        """
        other = copy(self)
        other._directory = self._directory.knowing(partitions)  # noqa: SLF001  a copy of itself
        return other

    def names(self) -> list[str]:
        """Return the names of all known queues, sorted. A queue with partitions is listed once."""
        return self._directory.names()

    # -- audit ----------------------------------------------------------------------------------------------------

    def note(
        self, what: str, target: str = "", *, chosen_by: str = "", count: int | None = None, detail: str = "",
        quiet: bool = False,
    ) -> None:  # fmt: skip
        """
        Note in the audit that somebody (`who`) did something; nothing where nobody is named. *chosen_by*: the filter.

        What was done stays done when it cannot be noted, as for a user of Redis who may not write there: a warning is logged,
        unless this is *quiet*.
        """
        if self.who:
            write_audit(
                self.client, self.who, what, target, chosen_by=chosen_by, count=count, detail=detail, quiet=quiet
            )

    def audit(self, *, limit: int = 50, before: str | None = None) -> list[AuditEntry]:
        """Return what people did, the newest first; *before*: what they did before the entry of this id."""
        whole_number("limit", limit, 1, MOST_ENTRIES)
        if before is not None and not (isinstance(before, str) and _ENTRY.fullmatch(before)):
            raise ConfigurationError(
                f"before must be the id of an entry, such as 1790000000000-0, not {before!r:.100}."
            )
        rows = self.client.run(read_audit(audit_key(self.client.namespace), before, limit))
        return [audit_entry(row) for row in rows]

    def mark(self, text: str) -> None:
        """
        Draw a line with *text* on all charts, at this instant: of a deployment, for example. The newest 200 are kept.

        Raises ConfigurationError for an empty text and one above 100 characters.
        """
        text = clean(text).strip() if isinstance(text, str) else ""
        if not 0 < len(text) <= _LONGEST_MARK:
            raise ConfigurationError(f"A mark is a text of 1 to {_LONGEST_MARK} characters, such as 'v1.4'.")
        key = marks_key(self.client.namespace)
        self.client.run(note_action(key, {"text": text}, MOST_MARKS), retry_for=0.0)
        self.client.run(keep_audit(key))
        self.note("mark", text)

    # -- queues ---------------------------------------------------------------------------------------------------

    def queues(self, names: Collection[str] | None = None) -> list[QueueInfo]:
        """Return all known queues (None), or those of *names* that are known, by name."""
        return [one.info for one in self.count(self._known(names))]

    def _counts(self, parts: Sequence[str]) -> dict[str, QueueCounts]:
        """Return the counts of queues and partitions; those whose server does not answer are left out."""
        counted = self._directory.counts_and_ended(parts, 0, self._ask)
        return {part: one.counts for part, one in counted.items()}

    def queue_partitions(self) -> Mapping[str, list[str]]:
        """Return the names of all known queues, sorted, each with the names of its partitions; one read of them all."""
        return self._directory.everything()

    def count(
        self, partitions: Mapping[str, Sequence[str]], minutes: int = 0, *, workers: bool = False
    ) -> list[QueueCount]:
        """
        Return queues of `queue_partitions`, a hundred in one step.

        Each with what ended in it in the last whole *minutes*, what left it, and with its *workers*.
        """
        parts = [part for some in partitions.values() for part in some]
        counted, at = self._directory.counts_and_ended(parts, minutes, self._ask, workers=workers), cache(instant)
        return [
            QueueCount(
                queue_info(name, found.counts),
                found.ended,
                [_worker_info(name, row, at) for row in found.workers],
                () if found.left is None else (found.left,),
            )
            if len(some) == 1 and (found := counted.get(some[0])) is not None
            else _count_partitions(name, some, counted, at)
            for name, some in partitions.items()
        ]

    def failure_matrix(
        self, range: str = "24h", *, queue: str | None = None, most: int = 5_000, seconds: float | None = None,  # noqa: A002
        queues: Sequence[QueueInfo] | None = None,
    ) -> FailureMatrix:  # fmt: skip
        """
        Return dead letters by what they have in common and by time; of at most *most*, the newest. Raises ConfigurationError.

        *seconds*: no more are read after so long; `read` of the `total` says how many were. None: no limit. *queues*: all of them,
        as they were counted just now.
        """
        from conveyor.admin.failure_matrix import MATRIX_RANGES, FailureTable

        if range not in MATRIX_RANGES:
            raise ConfigurationError(f"There is no range {range!r}. Known: {', '.join(MATRIX_RANGES)}.")
        table, total, cut = FailureTable(range, int(server_time(self.client) * 1000), self._decoder), 0, False
        counts = self._counts(self._parts_with_dead(queue, queues))
        busy = {part: one.dead for part, one in counts.items() if one.dead}
        ends = monotonic() + (seconds or 3600.0)
        for part, dead in busy.items():
            total += dead
            read, share = 0, -(-most // len(busy))
            for page in self._dead_letters(part, min(dead, share), _MATRIX_SIZE, ends):
                read += page.entries
                if not table.add(logical(part), part, page.rows):
                    break
            else:
                cut = cut or read < dead
        return table.matrix(self._tracebacks(table.samples()), total, cut=cut)

    def _dead_letters(self, part: str, most: int, size: int, ends: float = inf) -> Iterator[inspection.JobPage]:
        """Yield the heads of the newest *most* dead letters, page by page; after *ends* (monotonic) none but the first."""
        offset = 0
        while offset < most and (not offset or monotonic() < ends):
            call = inspection.list_jobs(self._keys(part), "dead", offset, min(size, most - offset), reads="heads")
            page = self.client.run(call)
            if not page.entries:
                return
            offset += page.entries
            yield page

    def _tracebacks(self, samples: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return the last traceback of each of these jobs by its public id; those that are gone are left out."""
        from conveyor.admin.search import whole_rows

        by_part: dict[str, list[str]] = {}
        for part, id_ in samples:
            by_part.setdefault(part, []).append(split(id_)[1])
        found: dict[str, str] = {}
        for part, ids in by_part.items():
            rows = [JobRow(id_, "dead", read_envelope(b"\n\n"), AttemptHistory(0, 0, 0), "") for id_ in ids]
            for row in whole_rows(self.client, self._keys(part), rows):
                if failure := last_failure(row, part, self._decoder):
                    found[public(part, row.id)] = failure.traceback
        return found

    def ended_lately(self, names: Collection[str], minutes: int) -> dict[str, Sequence[Ended]]:
        """Return what ended in each of the last whole minutes in these queues, the oldest first."""
        return {one.info.name: one.ended for one in self.count(self._known(names), minutes) if one.ended}

    def history(self, range: str = "1h", *, queue: str | None = None, task: str | None = None) -> History:  # noqa: A002
        """
        Return what ended in each minute of the last 15m, 1h, 6h, 24h, or in each hour of the last 7d, 30d.

        *queue*, *task*: only there, only of it. Raises ConfigurationError and QueueNotFound.
        """
        return read_history(self.client, self._directory, range, None if queue is None else [queue], task)

    def state_counts(self, queue: str | None = None, *, queues: Sequence[QueueInfo] | None = None) -> dict[str, int]:
        """
        Count the jobs of a queue, or of all (None), by state.

        Of `done` those that are still listed, and nothing where there are more than a hundred queues. *queues*: all of them, as
        they were counted just now.
        """
        counts: Sequence[QueueCounts | QueueInfo] = queues or ()
        parts: Sequence[str] = ()
        if queues is None or len(queues) <= _MOST_LISTED:
            parts = self._partition_names(queue)
        if queues is None:
            counts = list(self._counts(parts).values())
        found: dict[str, int] = {state: sum(getattr(one, state) for one in counts) for state in LIVE}
        if 0 < len(parts) <= _MOST_LISTED or not counts:
            search = self._search()
            found["done"] = sum(map(search.listed_done, parts))
        return found

    def queue(self, name: str) -> QueueInfo:
        """Return one queue, or one partition (``orders/3``). Raises QueueNotFound."""
        return self._queue_info(name)

    def partitions(self, name: str) -> list[QueueInfo]:
        """Return the partitions of a queue, in order; [] without partitions. Raises QueueNotFound."""
        partitions = self._directory.partition_names(name)
        return [self._queue_info(part) for part in partitions] if len(partitions) > 1 else []

    def causes(
        self, name: str, waiting: int | None = None, *, limits: Sequence[LimitState] | None = None
    ) -> list[QueueCause]:
        """
        Return why jobs of a queue wait, in the order in which a lease meets the causes.

        One call for each partition, and where a limit is full one more that reads when it opens.
        *waiting*: how many are ready or wait, *limits*: those of the queue, where that is known. Raises QueueNotFound.
        """
        if waiting is None:
            info = self._queue_info(name)
            waiting = info.ready + info.waiting
        answers = [
            self._ask(part, inspection.queue_causes(self._keys(part))) for part in self._directory.partition_names(name)
        ]
        found = queue_causes(name, waiting, [facts for facts in answers if facts is not None])
        if not any(one.kind == "limit" for one in found):
            return found
        if limits is None:
            from conveyor.messaging.limit_control import LimitControl

            try:
                limits = LimitControl(self.client).list(name)
            except StoreUnavailable:  # of a partition; the causes at the others stand
                return found
        keyed = {one.name if one.key is None else f"{one.name}:{one.key}": one.opens_at for one in limits}
        return with_openings(found, keyed)

    def pause(self, name: str | None) -> list[str]:
        """
        Pause a queue, or all that exist (None), one after the other; return their names. Workers lease nothing more from it.

        Jobs that run are not affected. Where it ends early, the queues that it reached stay paused: call it again.
        """
        return self._pause(name, "pause")

    def resume(self, name: str | None) -> list[str]:
        """Resume a paused queue, or all (None), also those that were paused one by one; return their names."""
        return self._pause(name, "resume")

    def _pause(self, name: str | None, what: Literal["pause", "resume"]) -> list[str]:
        if name is not None:
            getattr(self._directory.queue(name), what)()
            self.note(what, name)
            return [name]
        everything, reached = self._directory.everything(), list[str]()
        directory = self._directory.knowing(everything)
        try:
            for one in everything:
                getattr(directory.queue(one), what)()
                reached.append(one)
        finally:
            self.note(what, "all queues", count=len(reached))
        return reached

    def pause_task(self, task: str, queue: str | None = None) -> list[str]:
        """Have the jobs of a task wait, in one queue or in all that exist (None); return the queues. Other jobs go on."""
        return self._pause_task(task, queue, paused=True)

    def resume_task(self, task: str, queue: str | None = None) -> list[str]:
        """End the pause of a task, in one queue or in all (None); return the queues."""
        return self._pause_task(task, queue, paused=False)

    def _pause_task(self, task: str, queue: str | None, *, paused: bool) -> list[str]:
        queue_name(task, what="task")
        places = self._partition_names(queue)
        for name in places:
            self.client.run(limits.pause_task(self._keys(name), task, paused=paused))
        self.note("pause task" if paused else "resume task", queue or "all queues", detail=task)
        return list(dict.fromkeys(map(logical, places))) if queue is None else [queue]

    @_acting
    def purge(self, name: str, *, dead: bool = False) -> int:
        """
        Remove all jobs that are not leased, or the dead letters; return how many.

        Jobs that arrive during the call are kept. Call it again if it was interrupted.
        """
        removed = self._directory.queue(name).purge(dead)
        self.note("purge dead letters" if dead else "purge", name, count=removed)
        return removed

    def refuse_full(self, name: str) -> None:
        """Raise ConfigurationError (E35) when a queue is not empty: its partitions cannot change."""
        refuse_full(self.client, self._directory.queue(name).name)

    def repartition(self, name: str, partitions: int) -> int:
        """
        Change the number of partitions of an empty queue; return the former number.

        Raises ConfigurationError.
        """
        former = self._directory.queue(name).repartition(partitions)
        self.note("repartition", name, count=partitions)
        return former

    def refuse_in_use(self, name: str) -> None:
        """Raise ConfigurationError (E35) when a queue could not be deleted now."""
        from conveyor.messaging.deletion import refuse_in_use

        refuse_in_use(self.client, self._directory.queue(name).keys)

    def delete_queue(self, name: str) -> None:
        """
        Delete a queue that holds nothing and that nothing serves, with all its keys.

        Raises QueueNotFound; ConfigurationError (E35), with nothing deleted, for a queue in use.
        """
        self._directory.queue(name).delete()
        self.note("delete queue", name)

    @_acting
    def redrive(self, name: str, *, limit: int | None = None, ids: Sequence[str] = ()) -> int:
        """
        Put dead letters back, oldest first; return how many.

        *limit*: at most so many, None: all. *ids*: only these, one or many, with or without the name of the queue.
        """
        moved = self._redrive(name, limit, _each(ids))
        self.note("redrive", name, count=moved)
        return moved

    def _redrive(self, name: str, limit: int | None, ids: Sequence[str]) -> int:
        queue = self._directory.queue(name)
        if not ids:
            return queue.redrive(limit)
        from conveyor.messaging.maintenance import redrive_batch

        moved, homes = 0, [split(one) for one in ids]
        for part in self._directory.partition_names(name):
            bare = [id_ for home, id_ in homes if home in {None, part}]
            for first in range(0, len(bare), PAGE_SIZE):
                call = redrive_batch(self._directory.keys(part), Walk(ids=bare[first : first + PAGE_SIZE]))
                moved += self.client.run(call)
        return moved

    def release_build(self, name: str, build: str) -> int:
        """
        Release the jobs of a queue that are pinned to a build, so that any worker runs them; return how many.

        Those that waited for a worker of it start now.
        """
        label_text(build, "build")
        released = 0
        for part in self._directory.partition_names(name):
            cursor = "0"
            while True:
                cursor, count = self.client.run(worker_commands.release_build(self._keys(part), cursor, build))
                released += count
                if cursor == "0":
                    break
        self.note("release build", name, count=released, detail=build)
        return released

    def repair(self, name: str) -> int:
        """
        Put jobs back that have a record and are in no place, each with a start counted; return how many.

        Workers and producers may go on meanwhile. The ids of the queue are read in pages, then what was found is looked up
        again in the step that puts it back.
        """
        repaired = sum(self._repair(self._keys(part)) for part in self._directory.partition_names(name))
        self.note("repair", name, count=repaired)
        return repaired

    def workers(self, queue: str | Collection[str] | None = None) -> list[WorkerInfo]:
        """
        Return the workers of a queue, of those of some that are known, or of all queues (None).

        A worker is listed once for each queue or partition it serves.
        """
        parts = self._partition_names(queue) if queue is None or isinstance(queue, str) else self._parts_of(queue)
        return [one for found, _ in self._read_workers(parts) for one in found]

    def queue_workers(self, queue: str) -> QueueWorkers:
        """
        Return the workers of a queue, or of a partition, and the processes that they are; it takes as many calls as `workers`.

        Those of other queues are read with them, as far as one call goes, so that what the processes hold of these is known too.
        """
        known = self._directory.everything()
        own = self._directory.knowing(known).partition_names(queue)
        of_queue = set(own)
        others = [part for parts in known.values() for part in parts if part not in of_queue]
        steps = list(self._read_workers([*own, *others] if self.client.has_one_endpoint else own, least=len(own)))
        found, read = [one for some, _ in steps for one in some], sum(count for _, count in steps)
        registrations = [one for one in found if one.queue in of_queue]
        processes = by_process(found)
        serving = [one for key in by_process(registrations) for one in processes_of(processes[key])]
        return QueueWorkers(registrations, serving, exact=read == len(own) + len(others))

    def _read_workers(self, names: Sequence[str], least: int | None = None) -> Iterator[tuple[list[WorkerInfo], int]]:
        """
        Yield the workers of *names*, queues or partitions, and of how many of these they are: a few hundred in one step.

        *least*: the steps end when the first so many were read.
        """
        at, moment = 0, cache(instant)
        while at < (len(names) if least is None else least):
            # In a cluster each partition is in a slot of its own.
            some = names[at : at + (_WORKERS_SIZE if self.client.has_one_endpoint else 1)]
            page = self._ask(some[0], inspection.workers_of([self._directory.key(name, "workers") for name in some]))
            if page is not None:
                yield (
                    [_worker_info(some[number], row, moment) for number, rows in page.rows.items() for row in rows],
                    page.read,
                )
            at += len(some) if page is None else page.read

    def worker_processes(self, *, jobs: int = 0) -> list[WorkerProcess]:
        """Return the processes that serve queues, each once; *jobs*: with at most so many of the jobs that each holds."""
        found = processes_of(self.workers())
        return [self._with_jobs(process, jobs) for process in found] if jobs else found

    def worker_process(self, name: str, *, jobs: int = 100) -> WorkerProcess:
        """Return one process by its name (host:pid), with up to *jobs* of those it holds. Raises WorkerNotFound."""
        return self._with_jobs(find_process(self.worker_processes(), name), jobs)

    def quiet_worker(self, name: str, *, timeout: Duration = "5s") -> None:
        """
        Have a worker take no new jobs; those that it has go on.

        Raises WorkerNotFound, and TimeoutError where it does not answer within *timeout*.
        """
        self._command_worker(name, "quiet", timeout)

    def stop_worker(self, name: str, *, timeout: Duration = "5s") -> None:
        """
        Have a worker drain and end, as after SIGTERM; its supervisor does not start it again.

        Returns when the worker has begun. Raises as `quiet_worker`.
        """
        self._command_worker(name, "stop", timeout)

    def worker_stack(self, name: str, *, timeout: Duration = "5s") -> str:
        """Return where each thread and each asyncio task of a worker is now. Raises as `quiet_worker`."""
        return self._command_worker(name, "stack", timeout)

    def _command_worker(self, name: str, action: WorkerAction, timeout: Duration) -> str:
        process = find_process(self.worker_processes(), name)
        if process.kind != "worker":
            raise ConfigurationError(f"{name} consumes messages: only workers of jobs take commands. Nothing was sent.")
        members = [(self._keys(one.queue), one.id) for one in process.members]
        what = f"{action} worker"
        try:
            answer = command(self.client, members, name, action, milliseconds(timeout, name="timeout") / 1000)
        except TimeoutError:
            if action != "stack":  # the command stays for it: it may still be carried out
                self.note(what, name, count=1, detail="no answer yet")
            raise
        if action != "stack":
            self.note(what, name, count=1)
        return answer

    def _with_jobs(self, process: WorkerProcess, most: int) -> WorkerProcess:
        found = [
            leased_job(one.queue, row)
            for one in process.members
            if one.held
            for row in self._ask(one.queue, worker_commands.leased_jobs(self._keys(one.queue), one.id, most)) or ()
        ]
        found.sort(key=lambda job: job.since or process.seen)
        return replace(process, jobs=found[:most])

    # -- metrics --------------------------------------------------------------------------------------------------

    def metrics_text(
        self, queues: Sequence[QueueInfo] | None = None, workers: Iterable[WorkerInfo] | None = None
    ) -> str:
        """
        Return metrics as Prometheus reads them: of all queues, tasks and the server, the same from every program.

        *queues*, *workers*: all of them, as they were read just now; None: they are read. While Redis does not answer, the text
        says that and no more.
        """
        from conveyor.admin import metrics

        try:
            server = replies.parse_info(self.client.execute("INFO", retry_for=0.0))
            everything = self._directory.everything()
            if queues is None or workers is None:
                counted = self.count(everything, workers=True)
                queues, workers = [one.info for one in counted], [worker for one in counted for worker in one.workers]
            totals = self._read_totals(everything)
            for at, one in totals.items():
                if one.has_many:
                    totals[at] = one._replace(counters=self._read_many_totals(at[1]))
            facts = self._system_facts(totals, workers)
        except StoreUnavailable:
            return metrics.render((), {}, None)
        counters: dict[str, Counter[str]] = {}
        for (name, _), one in totals.items():
            if one.counters:
                counters.setdefault(name, Counter()).update(one.counters)
        by_task = {name: metrics.task_totals(total) for name, total in counters.items()}
        return metrics.render(queues, by_task, server, facts)

    def _system_facts(
        self, totals: Mapping[tuple[str, str], inspection.QueueTotals], workers: Iterable[WorkerInfo]
    ) -> metrics.SystemFacts:
        """Read schedules and limits where there are any: most queues have neither."""
        from conveyor.admin import metrics
        from conveyor.messaging.limit_control import LimitControl

        lost = dict.fromkeys((name for name, _ in totals), 0)
        for (name, _), one in totals.items():
            if one.counters:
                lost[name] += one.counters.get("lost", 0)
        read = [
            (name, *found)
            for (name, part), one in totals.items()
            if one.has_schedules and (found := self._ask(part, schedules.read_schedules(self._keys(part)))) is not None
        ]
        limited = _limited(totals)
        control = LimitControl(self.client)
        return metrics.SystemFacts(
            [(name, now, row) for name, now, rows in read for row in rows],
            [limit for name in limited for limit in control.list(name)],
            processes_of(workers),
            lost,
        )

    def queues_with_limits(self) -> list[str]:
        """Return the queues of which code has declared limits, which are read a hundred in one step."""
        return _limited(self._read_totals(self._directory.everything()))

    def _read_totals(self, everything: Mapping[str, list[str]]) -> dict[tuple[str, str], inspection.QueueTotals]:
        """Return what `read_totals` says, by queue and partition; those whose server does not answer are left out."""
        totals: dict[tuple[str, str], inspection.QueueTotals] = {}
        parts, at = [(name, part) for name, some in everything.items() for part in some], 0
        size = _AT_A_TIME if self.client.has_one_endpoint else 1  # in a cluster each partition is in a slot of its own
        while at < len(parts):
            some = parts[at : at + size]
            call = inspection.read_totals([self._directory.key(part, "jobs") for _, part in some])
            found = self._ask(some[0][1], call)
            totals.update(zip(some, found or (), strict=False))
            at += len(some if found is None else found)
        return totals

    def _read_many_totals(self, part: str) -> Mapping[str, int]:
        """Return the counters of a queue or partition that are too many for one step; none when its server does not answer."""
        key = self._directory.key(part, "jobs")
        for _ in range(_TRIES):
            counters, minutes = Counter[str](), set[bytes]()
            for of in _TOTALS_OF:
                fields, cursor = dict[str, int](), None  # a page may repeat what another had
                while cursor != 0:
                    page = self._ask(part, inspection.read_totals_page(key, of, cursor or 0))
                    if page is None:
                        return {}
                    fields.update(page.counters)
                    minutes.add(page.minute)
                    cursor = page.cursor
                counters.update(fields)
            # Else a minute has become one of those that are over: it may be missing, or there twice.
            if len(minutes) == 1:
                return counters
        return {}

    def load(self, queues: Collection[str] = ()) -> dict[str, metrics.LoadView]:
        """Return the work of *queues*, all that are known when none is named, for an autoscaler. Raises QueueNotFound."""
        from conveyor.admin import metrics

        names = _each(queues)
        infos = [self._queue_info(name) for name in names] if names else self.queues()
        return {info.name: metrics.load_view(info) for info in infos}

    # -- jobs -----------------------------------------------------------------------------------------------------

    def jobs(
        self,
        queue: str | None = None,
        state: str | None = None,
        *,
        offset: int = 0,
        limit: int = 50,
        task: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        older: datetime | None = None,
        tag: str | None = None,
    ) -> list[JobInfo]:
        """Return a page of the jobs that `each_job` yields."""
        return list(
            self.each_job(
                queue, state, offset=offset, limit=limit, task=task, error=error, since=since, older=older, tag=tag
            )
        )

    def each_job(
        self,
        queue: str | None = None,
        state: str | None = None,
        *,
        offset: int = 0,
        limit: int | None = None,
        task: str | None = None,
        error: str | None = None,
        since: datetime | None = None,
        older: datetime | None = None,
        tag: str | None = None,
    ) -> Iterator[JobInfo]:
        """
        Yield jobs of a queue in a state, in the order in which they would be leased; read in pages.

        *queue*: a name or a pattern, None: of all queues. *state* None: all states except done. *limit*: at most so many, None:
        all. *task*, *error*, *since*, *older*, *tag*: only those that a `JobFilter` of these accepts; no bodies of others are read.
        Dead and finished jobs come newest first, those of a tag in the order of their ids, partitions one after the other. While
        workers change the queue, a job may come twice or be missed. Raises ConfigurationError and QueueNotFound.
        """
        query = _query(queue, state, JobFilter(task, error, since, older, tag))
        return self.each_matching(query, offset=offset, limit=limit)

    def each_matching(self, query: JobQuery, *, offset: int = 0, limit: int | None = None) -> Iterator[JobInfo]:
        """Yield the jobs that a filter chooses, as `each_job` does."""
        return self._search().each(query, offset=offset, limit=limit)

    def _search(self, queues: Sequence[QueueInfo] | None = None) -> JobSearch:
        from conveyor.admin.search import JobSearch

        return JobSearch(
            self.client, self._directory, self._decoder, sealed=self._seals, counts=self._counts, queues=queues
        )

    def search(
        self, query: JobQuery, *, cursor: str | None = None, offset: int = 0, limit: int = 50, most: int = 10_000,
        seconds: float = 3600.0, queues: Sequence[QueueInfo] | None = None,
    ) -> SearchPage:  # fmt: skip
        """
        Return jobs that a filter accepts, in the order of `each_job`: a page of *limit* at most, with bounded work.

        *cursor*: the `next` of the page before; without it the page begins after *offset* jobs. At most *most* jobs are looked at,
        for about *seconds*; the `footer` says what was not. Of bodies about 2 KiB are read, unless the filter looks into them.
        *queues*: all of them, as they were counted just now; None: those that the filter takes are counted.
        """
        search = self._search(queues)
        return search.page(query, cursor=cursor, offset=offset, limit=limit, most=most, seconds=seconds)

    def count_matching(
        self, query: JobQuery, action: ActionName | None = None, *, seconds: float = 3600.0,
        queues: Sequence[QueueInfo] | None = None,
    ) -> MatchCount:  # fmt: skip
        """Count the jobs that a filter chooses, of those that *action* is for, for about *seconds*. *queues* as in `search`."""
        from conveyor.messaging.selection import ACTED_ON

        return self._search(queues).count(query, ACTED_ON[action] if action else (), seconds=seconds)

    def act_on_matching(
        self, action: ActionName, query: JobQuery, *, limit: int | None = None, rate: str | None = None,
        sleep: Sleep | None = None,
    ) -> Iterator[list[ActionResult]]:  # fmt: skip
        """
        Carry out *action* on all jobs that a filter chooses; yield what became of them, step by step.

        Each step takes Redis a few milliseconds. *limit*: on at most so many, None: on all. *rate*: no faster, as in ``"100/s"``;
        *sleep* waits for so many seconds between two steps, and ends the action by returning True, as `threading.Event.wait`.
        What a step has done stays done when it is not gone on with, and a second run does the rest. Raises ConfigurationError.
        """
        return self._search().act(action, query, limit=limit, rate=rate, sleep=sleep)

    def failures(
        self, queue: str | None = None, *, most: int | None = None, queues: Sequence[QueueInfo] | None = None
    ) -> FailureSummary:
        """
        Count dead letters by queue, task and last error, with when the first and the last of them died; read in pages.

        *queue* None: of all queues. *most*: at most so many are read of each queue, the newest, of its partitions equal shares;
        None: all. *queues*: all of them, as they were counted just now.
        """
        count = FailureCount(self._decoder)
        dead = {part: counts.dead for part, counts in self._counts(self._parts_with_dead(queue, queues)).items()}
        partitions = Counter(map(logical, dead))
        for part, number in dead.items():
            share = number if most is None else min(number, -(-most // partitions[logical(part)]))
            for page in self._dead_letters(part, share, _HEADS_SIZE):
                count.add(logical(part), part, page.rows)
        return FailureSummary(count.groups(), count.counted, sum(dead.values()))

    def count_jobs(self, queue: str | None = None, state: str | None = None) -> int:
        """Count the jobs that `each_job` yields for a queue and a state."""
        return sum(entries for _, _, entries in self._search().places(_query(queue, state)))

    def job(self, public_id: str) -> JobInfo:
        """Return everything known about a job. Raises JobNotFound."""
        return self._job_at(self._found(public_id))

    def report(self, public_id: str) -> JobReport:
        """Return what `job`, `why` and `history_of` return. The job, which may have megabytes, is read once. Raises JobNotFound."""
        lookup = self._found(public_id)
        return JobReport(self._job_at(lookup), self._why(lookup), self._history(lookup))

    def _job_at(self, lookup: _JobLookup) -> JobInfo:
        if lookup.row is not None:
            return live_job(lookup.keys.queue, lookup.row, self._decoder)
        return self._ended_job(lookup)

    def why(self, public_id: str) -> Why:
        """Return why a job waits, or that it does not. Raises JobNotFound."""
        return self._why(self._found(public_id))

    def _why(self, lookup: _JobLookup) -> Why:
        facts = self.client.run(inspection.why(lookup.keys, lookup.id))
        where, row, record = facts.job
        ended: Status = "cancelled" if where == "cancelled" else "done"
        status = row.status if row else read_outcome(record).status if where == "result" else ended
        return explain(status, lookup.keys.queue, facts, self._decoder)

    def history_of(self, public_id: str) -> list[HistoryEntry]:
        """Return the states that a job came into, oldest first. Raises JobNotFound."""
        return self._history(self._found(public_id))

    def _history(self, lookup: _JobLookup) -> list[HistoryEntry]:
        if lookup.row is not None:
            return live_history(lookup.keys.queue, lookup.row, self._decoder)
        entries = ended_history(lookup.id, lookup.location, lookup.record)
        if entries[-1].at is None and (recent := self._recent_entry(lookup)) is not None:  # no record says when
            entries[-1] = replace(entries[-1], at=instant(recent.at))
        return entries

    def logs(self, public_id: str) -> list[LogLine]:
        """Return what a job has logged, as far as it is kept: seven days, also of a job that is not known any more."""
        keys, id_ = self._keys_of_logs(public_id), split(public_id)[1]
        portions = self.client.run(inspection.read_logs(keys, id_))
        return self._decoder.lines(portions, keys.queue, id_)

    def follow_logs(self, public_id: str, *, pause: float = 0.25) -> Iterator[LogLine]:
        """Yield what a job has logged, and then what it logs while it runs, until it has ended; looks every *pause* seconds."""
        keys, id_ = self._keys_of_logs(public_id), split(public_id)[1]
        read, asked_at = 0, -FOLLOWED
        while True:
            where, row, _ = self.client.run(inspection.get_job(keys, id_))
            if where == "leased" and row is not None and monotonic() - asked_at > FOLLOWED / 3:
                asked_at = monotonic()
                with suppress(ConveyorError):  # a user who may not: the lines come when they are kept
                    self._ask_for_lines(keys, id_, row.extra)
            portions = self.client.run(inspection.read_logs(keys, id_, read))
            read += len(portions)
            yield from self._decoder.lines(portions, keys.queue, id_)
            if not portions and (row is None or row.status == "dead"):
                return
            if not portions:
                sleep(pause)

    def ask_for_logs(self, public_id: str) -> bool:
        """
        Have the worker of a job send the job's lines as they come, for 15 seconds; False where no worker runs it.

        Raises JobNotFound.
        """
        lookup = self._found(public_id)
        if lookup.location != "leased" or lookup.row is None:
            return False
        self._ask_for_lines(lookup.keys, lookup.id, lookup.row.extra)
        return True

    def _ask_for_lines(self, keys: QueueKeys, id_: str, worker: str) -> None:
        self.client.run(worker_commands.send(keys, worker, worker_commands.new_command(keys, "logs", id_)))

    def _keys_of_logs(self, public_id: str) -> QueueKeys:
        """Return the keys of the queue that a job is in, or was in as its id says; raises JobNotFound."""
        queue = split(public_id)[0]
        return self._found(public_id).keys if queue is None else self._keys(queue)

    def watch(self, *ids: str) -> Generator[JobUpdate, None, None]:
        """Yield what happens to jobs, as `Job.watch` does, until all have ended. Raises JobNotFound."""
        with self._changes_of(ids) as (hub, jobs):
            yield from hub.watch(jobs)

    async def awatch(self, *ids: str) -> AsyncGenerator[JobUpdate, None]:
        """Awaitable form of `watch`."""
        changes = self._changes_of(ids)
        hub, jobs = await in_thread(changes.__enter__)
        try:
            async for one in hub.awatch(jobs):
                yield one
        finally:
            await in_thread(lambda: changes.__exit__(None, None, None))

    @contextmanager
    def _changes_of(self, ids: Iterable[str]) -> Iterator[tuple[WatchHub, list[Changes]]]:
        """Give what watches, and what it is to watch; raises JobNotFound."""
        from conveyor.jobs.results import ResultSubscriber
        from conveyor.jobs.watching import Changes, WatchedJob, WatchHub

        found = [self._found(one) for one in ids]
        subscriber = ResultSubscriber(self.client)
        hub = WatchHub(self.client, subscriber)
        jobs = [WatchedJob(one.keys, one.id, lambda: False) for one in found]
        try:
            yield hub, [Changes(job, None, self._decoder) for job in jobs]
        finally:
            hub.close()
            subscriber.close()

    def _found(self, public_id: str) -> _JobLookup:
        lookup = self._find(public_id)
        if lookup is None:
            shown = public_id if len(public_id) <= _LONGEST_ID else f"{public_id[:_LONGEST_ID]}…"
            raise JobNotFound(
                f"No job {shown} is known in namespace {self.client.namespace!r}. It was never there, was purged or deleted, or "
                "ended longer ago than is remembered: ten minutes, or as long as its result is kept."
            )
        return lookup

    @_acting
    def retry(self, ids: Iterable[str]) -> list[ActionResult]:
        """Put dead jobs back with a new budget of attempts, and make scheduled ones ready now; *ids*: one or many."""
        return self._noted("retry", [self._retry(one) for one in _each(ids)])

    @_acting
    def cancel(self, ids: Iterable[str]) -> list[ActionResult]:
        """Cancel jobs that have not ended, *ids*: one or many. For a running job, its worker is asked to stop it."""
        return self._noted("cancel", [self._cancel(one) for one in _each(ids)])

    @_acting
    def delete(self, ids: Iterable[str]) -> list[ActionResult]:
        """Remove jobs and dead letters completely; *ids*: one or many. Leased jobs are refused."""
        return self._noted("delete", [self._delete(one) for one in _each(ids)])

    @_acting
    def update(
        self, public_id: str, *, delay: Duration | None = None, at: datetime | None = None, priority: int | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """
        Change a job while it waits, as `Job.update` does; return False when it has started, or ended.

        New arguments need an app that knows the task. Raises ConfigurationError for one that holds the mark of what is redacted.
        """
        refuse_mark(args, "Nothing was changed.")
        done = self._handle(public_id).update(delay=delay, at=at, priority=priority, args=args)
        if done:
            changed = {"delay": delay, "at": at, "priority": priority, **{f"args.{name}": "…" for name in args or ()}}
            told = ", ".join(
                name if text == "…" else f"{name}={text}" for name, text in changed.items() if text is not None
            )
            self.note("update", public_id, count=1, detail=told)
        return done

    @_acting
    def rerun(self, ids: Iterable[str]) -> list[ActionResult]:
        """
        Enqueue a new job with the arguments of each of some that have ended, as `Job.rerun` does; *ids*: one or many.

        The `detail` of a result is the id of the new job. It needs an app that knows the tasks.
        """
        return self._noted("rerun", [self._rerun(one) for one in _each(ids)])

    def _rerun(self, one: str) -> ActionResult:
        try:
            return ActionResult(one, "enqueued", self._handle(one).rerun().id)
        except JobNotFound:
            return ActionResult(one, "not found")
        except (ConfigurationError, UnknownTask, ResultExpired, PayloadError) as error:
            return ActionResult(one, "refused", str(error).partition("\n")[0])

    def _handle(self, public_id: str) -> Job[Any]:
        from conveyor.jobs.job import Job

        core = self._core
        if core is None:  # one that declares nothing
            from conveyor.jobs.core import AppCore

            core = AppCore.without_declarations(self.client, sealing=self._sealing, formats=self._formats)
        queue, bare = split(public_id)
        return Job(core, bare, queue)

    def _noted(self, what: str, results: list[ActionResult]) -> list[ActionResult]:
        """Note an action on ids, and return its results."""
        done = [one.id for one in results if one.done]
        if done:
            self.note(what, ", ".join(done[:_IDS_NOTED]), count=len(done))
        return results

    def flags(self, queues: Sequence[QueueInfo] | None = None, *, most: int | None = None) -> list[Flag]:
        """
        Return what asks for attention, the worst first: stuck queues and schedules, tasks that only fail, jobs that run too long.

        *queues*: those to look at, as they were counted just now; None: all. *most*: the tasks and jobs of so many of them at most,
        those that have most running, dead and scheduled ones, since each is read by itself. What may not be read is left out.
        """
        infos = self.queues() if queues is None else queues
        found, now = queue_flags(infos), datetime.fromtimestamp(server_time(self.client), UTC)
        with suppress(ConveyorError):
            found += late_schedules(self._schedule_rows(), now)
        with suppress(ConveyorError):
            lately = [one for one in infos if one.workers or one.leased or one.dead or one.scheduled]
            if most is not None and len(lately) > most:
                lately = nlargest(most, lately, key=lambda one: (one.leased, one.dead, one.scheduled))
            history = read_history(self.client, self._directory, "15m", [one.name for one in lately], None)
            found += failing_tasks(history)
            found += overdue_jobs(history, self._longest_running([one.name for one in lately if one.leased]), now)
        return sorted(found, key=lambda flag: ("problem", "warning", "note").index(flag.level))

    def _longest_running(self, queues: Collection[str]) -> Iterator[LeasedJob]:
        """Yield the jobs that the workers of *queues* hold for longest: a few of each, of so many workers at most."""
        holding = (one for found, _ in self._read_workers(self._parts_of(queues)) for one in found if one.held)
        for one in islice(holding, _MOST_HOLDING):
            for row in self._ask(one.queue, worker_commands.leased_jobs(self._keys(one.queue), one.id, _LONGEST)) or ():
                yield leased_job(one.queue, row)

    def _schedule_rows(self) -> Iterator[tuple[str, schedules.ScheduleRow]]:
        """Yield the queue and the row of all schedules."""
        named = self.client.run(schedules.all_names(schedules.schedule_index(self.client.namespace)))
        for queue in sorted(set(named.values())):
            _, rows = self._ask(queue, schedules.read_schedules(self._keys(queue))) or (0, ())
            for row in rows:
                yield logical(queue), row

    def doctor(self, *, seconds: float | None = None, queues: Sequence[QueueInfo] | None = None) -> doctor.HealthReport:
        """
        Examine the server and the queues.

        *seconds*: the time for the records of queue after queue; None: of all. *queues*: all of them, as they were counted just
        now; None: they are counted.
        """
        return doctor.examine(self.client, self._directory, self.durability_requests, seconds=seconds, queues=queues)

    # -- awaitable ------------------------------------------------------------------------------------------------

    # In a thread each, since a read of many queues is many calls; a caller that is cancelled does not stop it.
    anames = _awaitable(names)
    ahistory = _awaitable(history)
    amark = _awaitable(mark)
    aflags = _awaitable(flags)
    afailure_matrix = _awaitable(failure_matrix)
    aqueues = _awaitable(queues)
    aqueues_with_limits = _awaitable(queues_with_limits)
    aqueue_partitions = _awaitable(queue_partitions)
    acount = _awaitable(count)
    aqueue = _awaitable(queue)
    acauses = _awaitable(causes)
    apartitions = _awaitable(partitions)
    aended_lately = _awaitable(ended_lately)
    astate_counts = _awaitable(state_counts)
    anote = _awaitable(note)
    aaudit = _awaitable(audit)
    apause = _awaitable(pause)
    apause_task = _awaitable(pause_task)
    aresume_task = _awaitable(resume_task)
    aresume = _awaitable(resume)
    apurge = _awaitable(purge)
    arefuse_full = _awaitable(refuse_full)
    arefuse_in_use = _awaitable(refuse_in_use)
    arepartition = _awaitable(repartition)
    aredrive = _awaitable(redrive)
    arepair = _awaitable(repair)
    arelease_build = _awaitable(release_build)
    aworkers = _awaitable(workers)
    aqueue_workers = _awaitable(queue_workers)
    aworker_processes = _awaitable(worker_processes)
    aworker_process = _awaitable(worker_process)
    aquiet_worker = _awaitable(quiet_worker)
    astop_worker = _awaitable(stop_worker)
    aworker_stack = _awaitable(worker_stack)
    ajobs = _awaitable(jobs)
    asearch = _awaitable(search)
    acount_matching = _awaitable(count_matching)
    afailures = _awaitable(failures)
    acount_jobs = _awaitable(count_jobs)
    ajob = _awaitable(job)
    areport = _awaitable(report)
    awhy = _awaitable(why)
    alogs = _awaitable(logs)
    ahistory_of = _awaitable(history_of)
    aretry = _awaitable(retry)
    acancel = _awaitable(cancel)
    adelete = _awaitable(delete)
    aupdate = _awaitable(update)
    arerun = _awaitable(rerun)
    adelete_queue = _awaitable(delete_queue)
    adoctor = _awaitable(doctor)
    ametrics_text = _awaitable(metrics_text)
    aload = _awaitable(load)
    aask_for_logs = _awaitable(ask_for_logs)

    aeach_job = _awaitable_iterator(each_job)
    aeach_matching = _awaitable_iterator(each_matching)
    aact_on_matching = _awaitable_iterator(act_on_matching, 1)
    afollow_logs = _awaitable_iterator(follow_logs, 1)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _ask(self, name: str, call: Call[T]) -> T | None:
        """Return the reply to a read of a queue or partition; None when its server does not answer and others do."""
        keys = self._keys(name)
        if not self.client.is_away(keys):
            try:
                return self.client.run(call, retry_for=None if self.client.has_one_endpoint else FIRST_TRY)
            except StoreUnavailable:
                if not self.client.note_away(keys):
                    raise
        self.unanswered.add(name)
        return None

    def _keys(self, name: str) -> QueueKeys:
        return self._directory.keys(name)

    def _partition_names(self, queue: str | None) -> list[str]:
        if queue is not None:
            return self._directory.partition_names(queue)
        return [part for parts in self._directory.everything().values() for part in parts]

    def _parts_with_dead(self, queue: str | None, queues: Sequence[QueueInfo] | None) -> list[str]:
        """Return the partitions of *queue*, or of all in which dead letters may be; *queues*: all of them, as they were counted."""
        if queue is not None or queues is None:
            return self._partition_names(queue)
        return self._parts_of([one.name for one in queues if one.dead])

    def _parts_of(self, queues: Collection[str]) -> list[str]:
        """Return the partitions of those of *queues* that are known: one read of the names, however many they are."""
        return [part for parts in self._known(queues).values() for part in parts] if queues else []

    def _known(self, names: Collection[str] | None) -> Mapping[str, list[str]]:
        """Return all known queues (None), or those of *names* that are known, with their partitions."""
        everything = self._directory.everything()
        if names is None:
            return everything
        wanted = set(names)
        return {name: parts for name, parts in everything.items() if name in wanted}

    def _repair(self, keys: QueueKeys) -> int:
        suspects = set(self._page_ids(keys, "jobs"))
        ready = 0
        for where in [*map(str, range(PRIORITIES)), "waits"] if suspects else []:
            for id_ in self._page_ids(keys, where):
                suspects.discard(id_)
                ready += 1
        # A step searches the ready lists for each of its ids: it stays short with long lists, too.
        chosen, size = sorted(suspects, reverse=True), max(1, min(PAGE_SIZE, 1_000_000 // (ready + 1)))
        return sum(
            self.client.run(operations.repair(keys, chosen[first : first + size]))[0]
            for first in range(0, len(chosen), size)
        )

    def _page_ids(self, keys: QueueKeys, where: str) -> Iterator[str]:
        cursor = "0"
        while True:
            cursor, ids = self.client.run(inspection.unplaced(keys, where, cursor))
            yield from ids
            if cursor == "0":
                return

    def _queue_info(self, name: str) -> QueueInfo:
        parts = self._directory.partition_names(name)
        answers = {part: self._ask(part, inspection.counts(self._keys(part))) for part in parts}
        return _queue_info(name, parts, answers)

    def _find(self, public_id: str) -> _JobLookup | None:
        queue, id_ = split(public_id)
        remains: _JobLookup | None = None
        for name in [queue] if queue else self._directory.all_partition_names(id_):
            keys = self._keys(name)
            location, row, record = self.client.run(inspection.get_job(keys, id_))
            lookup = _JobLookup(keys, id_, location, row, record)
            if location != "none":
                return lookup
            entry = self._recent_entry(lookup)
            # A dead letter that only the list of recent jobs still names was deleted or purged.
            if entry is not None and entry.status != "dead":
                remains = lookup
        return remains

    def _recent_entry(self, lookup: _JobLookup) -> FinishedJob | None:
        for first in (0, PAGE_SIZE):  # the list holds at most a thousand entries
            page = self.client.run(inspection.finished(lookup.keys, first, PAGE_SIZE))
            entry = next((entry for entry in page if entry.id == lookup.id), None)
            if entry is not None or len(page) < PAGE_SIZE:
                return entry
        return None

    def _ended_job(self, lookup: _JobLookup) -> JobInfo:
        entry = self._recent_entry(lookup)
        base: dict[str, Any] = {
            "id": public(lookup.keys.queue, lookup.id),
            "queue": lookup.keys.queue,
            "enqueued": instant_or_none(made_at_ms(lookup.id)),
            "task": entry.task if entry else None,
            "ended": instant(entry.at) if entry else None,
            "ran_ms": entry.ran_ms if entry else None,
        }
        if lookup.location == "result":
            outcome = read_outcome(lookup.record)
            base["ended"] = instant_or_none(outcome.at) or base["ended"]
            failure, queue = outcome.failure, lookup.keys.queue
            errors = [error_info(self._decoder.failure(failure, queue, lookup.id))] if failure else []
            result = self._decoder.result(outcome, queue, lookup.id) if outcome.status == "done" else None
            hide: Hide | None = None
            if (run := outcome.run) is not None:
                base |= {
                    "task": run.task,
                    "attempt": run.attempt,
                    "worker": run.worker,
                    "headers": self._decoder.headers(run.headers),
                    "tags": run.tags,
                    "origin": run.origin or None,
                }
                base["payload"], hide = self._decoder.arguments_and_hide(run, queue, lookup.id)
            base["progress"] = self._decoder.progress(bytes(outcome.progress), queue, lookup.id)
            base["notes"] = self._decoder.notes(bytes(outcome.notes), queue, lookup.id)
            info = JobInfo(**base, status=outcome.status, errors=errors, result=result, reason=outcome.reason)
            return info if hide is None else without_values(info, hide)
        if lookup.location == "cancelled":
            return JobInfo(**base, status="cancelled")
        status: Any = entry.status if entry else "done"
        return JobInfo(
            **base, status=status, reason="" if entry else "it has ended, and only its id and outcome are kept"
        )

    def _retry(self, one: str) -> ActionResult:
        lookup = self._find(one)
        if lookup is None:
            return ActionResult(one, "not found")
        if lookup.location == "dead" and (moved := self.client.run(operations.redrive(lookup.keys, ids=[lookup.id]))):
            return ActionResult(one, "retried", f"back in {lookup.keys.queue} with a new budget of attempts")
        if lookup.location == "dead" and moved.kept:
            holder = public(lookup.keys.queue, moved.kept[0][1])
            return ActionResult(one, "refused", f"job {holder} holds its unique key now; retry it when that has ended")
        if lookup.location == "scheduled" and self.client.run(operations.promote(lookup.keys, lookup.id)):
            return ActionResult(one, "retried", "starts now, not when it was due")
        return ActionResult(
            one, "refused", f"it is {_state_of(lookup)}, and only dead and scheduled jobs can be retried"
        )

    def _cancel(self, one: str) -> ActionResult:
        lookup = self._find(one)
        if lookup is None:
            return ActionResult(one, "not found")
        reply = self.client.run(operations.cancel(lookup.keys, lookup.id))
        if reply == operations.CANCEL_REMOVED:
            return ActionResult(one, "cancelled")
        if reply in {operations.CANCEL_ASKED, operations.CANCEL_RUNS}:
            return ActionResult(one, "asked", "a worker holds it, and was asked not to start it or to stop it")
        return ActionResult(one, "refused", f"it is {_state_of(lookup)}, so it has ended")

    def _delete(self, one: str) -> ActionResult:
        lookup = self._find(one)
        if lookup is None:
            return ActionResult(one, "not found")
        reply = self.client.run(operations.cancel(lookup.keys, lookup.id, delete=True))
        if reply == 1:
            return ActionResult(one, "deleted")
        if reply == -1:
            return ActionResult(one, "refused", "a worker has leased it; cancel it first")
        return ActionResult(one, "refused", f"it is {_state_of(lookup)}; nothing of it is in the queue")


def _queue_info(name: str, partitions: Sequence[str], answers: Mapping[str, QueueCounts | None]) -> QueueInfo:
    """Return a queue of which the counts of all partitions that answer are among *answers*."""
    found = [counts for part in partitions if (counts := answers.get(part)) is not None]
    unanswered = tuple(part for part in partitions if answers.get(part) is None) if len(found) < len(partitions) else ()
    return queue_info(name, inspection.total(found or [inspection.NOTHING]), len(partitions), unanswered)


def _query(queue: str | None, state: str | None, wanted: JobFilter = ANY_JOB) -> JobQuery:
    from conveyor.admin.job_query import JobQuery

    return JobQuery(queue=queue, states=() if state is None else (state,), wanted=wanted)


def _count_partitions(
    name: str, parts: Sequence[str], counted: Mapping[str, CountedPart], at: Callable[[int], datetime]
) -> QueueCount:
    """Return a queue with partitions, or one of which the server does not answer."""
    found = {part: counted[part] for part in parts if part in counted}
    workers = [_worker_info(part, row, at) for part, one in found.items() for row in one.workers]
    info = _queue_info(name, parts, {part: one.counts for part, one in found.items()})
    left = [one.left for one in found.values() if one.left is not None]
    return QueueCount(info, ended_in(parts, found), workers, left if len(left) == len(parts) else ())


def _worker_info(part: str, row: WorkerRow, at: Callable[[int], datetime]) -> WorkerInfo:
    """Return a worker of a queue or partition. *at*: `instant`, cached: those of one process are renewed and read together."""
    return WorkerInfo(
        row.worker, part, str(row.about.get("host", "")), row.about.get("pid"), row.held, at(row.end), row.about,
        at(row.end - row.lease_ms), at(row.now),
    )  # fmt: skip


def _each(ids: Iterable[str]) -> list[str]:
    if not isinstance(ids, Iterable):
        raise ConfigurationError(f"ids takes the id of a job, or a list of ids, not {ids!r}. Nothing was done.")
    # A text is an iterable of texts too, and its letters are nobody's ids.
    return [ids] if isinstance(ids, str) else list(ids)


def refuse_mark(value: Any, nothing: str) -> None:
    """Raise ConfigurationError for arguments in which the mark of what is redacted stands for a value."""
    if value == REDACTED:
        raise ConfigurationError(f"{REDACTED} stands for a value that nobody is shown, and is none itself. {nothing}")
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        refuse_mark(one, nothing)


def _state_of(lookup: _JobLookup) -> str:
    if lookup.location == "result":
        return read_outcome(lookup.record).status
    return "done" if lookup.location in {"none", "ended"} else lookup.location


def _limited(totals: Mapping[tuple[str, str], inspection.QueueTotals]) -> list[str]:
    """Return the queues that have limits, each once."""
    return list(dict.fromkeys(name for (name, _), one in totals.items() if one.has_limits))
