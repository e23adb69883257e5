"""Watches jobs: a process registers each once, one thread reads what has changed, and all that watch get typed updates."""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from conveyor.errors import ConfigurationError, ConveyorError, JobNotFound, StoreUnavailable
from conveyor.events import JobEnded, JobUpdate, ProgressChanged, StateChanged
from conveyor.ids import may_arrive_later, public
from conveyor.jobs.results import CHECK_AGAIN, Listener, OutageTimer
from conveyor.payload.records import AttemptHistory, Failure, RunRecord, read_outcome
from conveyor.payload.sealed_records import RecordDecoder
from conveyor.store import inspection
from conveyor.store.fork_safety import on_fork
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.sleepers import SleepingTask, SleepingThread
from conveyor.units import digits, instant_or_none

if TYPE_CHECKING:
    from conveyor.jobs.results import ResultSubscriber
    from conveyor.payload.records import Status
    from conveyor.store.client.client import Client
    from conveyor.store.inspection import JobRow
    from conveyor.store.keys import QueueKeys

Lookup = tuple[str, "JobRow | None", bytes]
_PAGE = 100
"""Jobs that one call reads."""
_ENDED = frozenset({"dead", "result", "ended", "cancelled"})
_IDLE = 30.0
"""Seconds without a watched job after which the thread ends."""
_ENDS = ("done", "dead", "cancelled")
_STAGES = {"waiting": 0, "scheduled": 0, "ready": 0, "leased": 1, "done": 2, "dead": 2, "cancelled": 2}


class WatchedJob(NamedTuple):
    """A job that is watched: its queue's keys, and its id without the queue; `is_buffered`: whether this program still has it."""

    keys: QueueKeys
    id: str
    is_buffered: Callable[[], bool]

    @property
    def public_id(self) -> str:
        """The id as programs see it."""
        return public(self.keys.queue, self.id)


class Place(NamedTuple):
    """The place in a job up to which a watcher has seen it: its attempt, its state there, and a mark of its progress."""

    attempt: int
    state: str
    progress: str = ""

    @classmethod
    def read(cls, text: object) -> Place:
        """Return the place of an update's id; raises ConfigurationError."""
        number, _, rest = text.partition("-") if isinstance(text, str) else ("", "", "")
        state, _, progress = rest.partition("-")
        if (count := digits(number)) is None or state not in _STAGES:
            raise ConfigurationError(f"watch(after=…) takes the id of an update, such as '1-leased', not {text!r}.")
        return cls(count, state, progress)

    @property
    def text(self) -> str:
        """The id of the event that brought a watcher here."""
        return f"{self.attempt}-{self.state}" + (f"-{self.progress}" if self.progress else "")


class Changes:
    """The events of one job for one watcher: what lies between the place that it has seen and what Redis holds."""

    def __init__(self, job: WatchedJob, place: Place | None, decoder: RecordDecoder) -> None:
        self.job = job
        self.place = place
        self._progress = "" if place is None else place.progress
        self._decoder = decoder

    @property
    def has_ended(self) -> bool:
        """True when the watcher has seen the end."""
        return self.place is not None and self.place.state in _ENDS

    def events(self, lookup: Lookup) -> list[JobUpdate]:
        """Return the events since the last look, in order; raises JobNotFound."""
        if self.has_ended:
            return []
        where, row, record = lookup
        events: list[JobUpdate] = []
        if row is not None and row.status != "dead":
            self._advance(events, row.state.starts + 1, self._failed(row.state), self._was_delayed(row))
            self._live(events, row)
        elif row is not None:
            attempt = max(row.state.starts, 1)
            self._advance(events, attempt, self._failed(row.state), self._was_delayed(row))
            self._start(events, attempt)
            self._tell_progress(events, attempt, row.state.progress)
            failures = row.state.failures_list()
            at = int(row.extra) if row.extra.isdecimal() else 0
            self._end(events, "dead", attempt, at, "", failures[-1] if failures else None)
        elif where == "result":
            outcome = read_outcome(record)
            seen, run = 1 if self.place is None else self.place.attempt, outcome.run or RunRecord()
            attempt = max(run.attempt, seen)
            if outcome.status != "cancelled":
                failed = {one.attempt: one.reason for one in run.past if one.state == "failed"}
                self._advance(events, attempt, failed, scheduled=False)
                self._start(events, attempt, run.started)
            if self.place is not None and self.place.state == "leased":
                self._tell_progress(events, attempt, bytes(outcome.progress))
            self._end(events, outcome.status, attempt, outcome.at, outcome.reason, outcome.failure)
        elif where in {"ended", "cancelled"}:
            attempt = 1 if self.place is None else self.place.attempt
            if where == "ended":
                self._start(events, attempt)
            self._end(events, "done" if where == "ended" else "cancelled", attempt, 0, "", None)
        elif may_arrive_later(self.job.id) or self.job.is_buffered():
            if self.place is None:
                self._add(events, StateChanged, Place(1, "waiting"))
        else:
            raise JobNotFound(
                f"Queue {self.job.keys.queue!r} does not know a job {self.job.public_id!r}. It was never there, was purged or "
                "deleted, or ended longer ago than is remembered: ten minutes, or as long as its result is kept."
            )
        return events

    @staticmethod
    def _was_delayed(row: JobRow) -> bool:
        """Return whether the job was scheduled at first; after a failure its instant is that of the next attempt."""
        return row.envelope.due_ms is not None and not row.state.errors

    def _failed(self, history: AttemptHistory) -> dict[int, str]:
        """Return the errors of a job by attempt."""
        return {one.attempt: self._error(one) for one in history.failures_list()} if history.errors else {}

    def _advance(self, events: list[JobUpdate], attempt: int, failed: Mapping[int, str], scheduled: bool) -> None:
        """Add what happened before *attempt*: the starts of earlier ones, and that each waited for the next."""
        if self.place is None:
            self._add(events, StateChanged, Place(1, "scheduled" if scheduled else "ready"))
        assert self.place is not None
        while self.place.attempt < attempt:
            number = self.place.attempt
            self._start(events, number)
            state = "scheduled" if number in failed else "ready"
            self._add(events, StateChanged, Place(number + 1, state), error=failed.get(number, ""))

    def _start(self, events: list[JobUpdate], attempt: int, at: int = 0) -> None:
        if self.place is None:
            self._add(events, StateChanged, Place(attempt, "ready"))
        assert self.place is not None
        if _STAGES[self.place.state] == 0:
            self._add(events, StateChanged, Place(attempt, "leased"), at=at)

    def _live(self, events: list[JobUpdate], row: JobRow) -> None:
        assert self.place is not None
        attempt = row.state.starts + 1
        if row.status == "leased":
            self._start(events, attempt, row.leased_ms)
            self._tell_progress(events, attempt, row.state.progress)
        elif _STAGES[self.place.state] == 1 or row.status != self.place.state:
            if events and events[-1].attempt == attempt and events[-1].state in {"ready", "scheduled"}:
                last = events.pop()  # it was a guess, from what is left of it
                error = last.error if isinstance(last, StateChanged) else ""
                self._add(events, StateChanged, Place(attempt, row.status), error=error)
            else:
                self._add(events, StateChanged, Place(attempt, row.status))

    def _tell_progress(self, events: list[JobUpdate], attempt: int, stored: bytes) -> None:
        assert self.place is not None
        mark = f"{zlib.crc32(stored):08x}" if stored else ""
        if not stored or mark == self._progress:  # the next attempt finds it there until it tells one of its own
            return
        self._progress = mark
        known = self._decoder.progress(stored, self.job.keys.queue, self.job.id)
        if known is not None:
            place = Place(attempt, "leased", mark)
            self._add(events, ProgressChanged, place, done=known.done, total=known.total, text=known.text)

    def _end(
        self, events: list[JobUpdate], state: Status, attempt: int, at: int, reason: str, failure: Failure | None
    ) -> None:
        self._add(events, JobEnded, Place(attempt, state), at=at, reason=reason, error=self._error(failure))

    def _add(
        self, events: list[JobUpdate], kind: Callable[..., JobUpdate], place: Place, *, at: int = 0, **fields: object
    ) -> None:
        self.place = place
        when = instant_or_none(at)
        events.append(kind(place.text, self.job.public_id, place.state, place.attempt, when, **fields))

    def _error(self, failure: Failure | None) -> str:
        if failure is None:
            return ""
        failure = self._decoder.failure(failure, self.job.keys.queue, self.job.id)
        return f"{failure.type.rpartition('.')[2]}: {failure.message}"


class Watcher:
    """One iterator: the jobs that it watches, what it has not looked at yet, and what wakes it."""

    def __init__(self, jobs: Sequence[Changes], wake: Callable[[], object]) -> None:
        self.jobs = {(one.job.keys.prefix, one.job.id): one for one in jobs}
        self.live = {key for key, one in self.jobs.items() if not one.has_ended}
        self.error: ConveyorError | None = None
        self.wake = wake
        self._inbox: deque[tuple[tuple[str, str], Lookup]] = deque()

    def put(self, key: tuple[str, str], lookup: Lookup) -> None:
        """Add what Redis holds of a job, in the thread of the hub."""
        self._inbox.append((key, lookup))

    def take(self) -> list[JobUpdate]:
        """Return the events of what has come; raises what ended the watching."""
        events: list[JobUpdate] = []
        while self._inbox:
            key, lookup = self._inbox.popleft()
            changes = self.jobs[key]
            events += changes.events(lookup)
            if changes.has_ended:
                self.live.discard(key)
        if self.error is not None and not events:
            raise self.error
        return events


class _Watched:
    """A job that some watchers of this process watch."""

    __slots__ = ("job", "listener", "watchers")

    def __init__(self, job: WatchedJob) -> None:
        self.job = job
        self.listener: Listener
        self.watchers: list[Watcher] = []


class WatchHub:
    """The watched jobs of one app in this process, and the thread that reads them: at a message, and every few seconds."""

    def __init__(self, client: Client, subscriber: ResultSubscriber) -> None:
        self._client, self._subscriber = client, subscriber
        self._reset()
        on_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._stale: dict[tuple[str, str], None] = {}
        self._changed = SignalSafeEvent()
        self._thread: threading.Thread | None = None
        self._closed = False

    def forked(self) -> None:
        """Start with nothing in a forked child."""
        self._reset()

    def close(self) -> None:
        """End the thread, and all that watch."""
        with self._lock:
            thread, self._closed = self._thread, True
        self._changed.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10.0)

    # -- watching -------------------------------------------------------------------------------------------------

    def watch(self, jobs: Sequence[Changes]) -> Generator[JobUpdate, None, None]:
        """Yield the events of *jobs* until all have ended."""
        thread = SleepingThread()
        watcher = Watcher(jobs, thread.wake)
        self.add(watcher)
        try:
            while True:
                yield from watcher.take()
                if not watcher.live:
                    return
                thread.sleep()
        finally:
            self.remove(watcher)

    async def awatch(self, jobs: Sequence[Changes]) -> AsyncGenerator[JobUpdate, None]:
        """Awaitable form of `watch`."""
        task = SleepingTask()
        watcher = Watcher(jobs, task.wake)
        self.add(watcher)
        try:
            while True:
                for one in watcher.take():
                    yield one
                if not watcher.live:
                    return
                await task.sleep()
        finally:
            self.remove(watcher)

    def add(self, watcher: Watcher) -> None:
        """Give a watcher what happens from now on, and what Redis holds now."""
        with self._lock:
            for key in watcher.live:
                watched = self._watched.get(key)
                if watched is None:
                    job = watcher.jobs[key].job
                    watched = self._watched[key] = _Watched(job)
                    watched.listener = self._subscriber.listen(job.keys, job.id, "s", partial(self._note, key))
                watched.watchers.append(watcher)
                self._stale[key] = None
            if watcher.live and self._thread is None:
                self._closed = False
                self._thread = threading.Thread(target=self._run, name="conveyor-watch", daemon=True)
                self._thread.start()
        self._changed.set()

    def remove(self, watcher: Watcher) -> None:
        """Give a watcher nothing more."""
        with self._lock:
            for key in watcher.jobs:
                watched = self._watched.get(key)
                if watched is not None and watcher in watched.watchers:
                    watched.watchers.remove(watcher)
        self._changed.set()

    def _note(self, key: tuple[str, str]) -> None:
        """Note, in the thread of the subscription, that a job has changed."""
        self._stale[key] = None
        self._changed.set()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        outage, next_look, idle_since = OutageTimer(), 0.0, time.monotonic()
        while True:
            self._changed.clear()  # before the look: what changes from now on ends the wait below
            now = time.monotonic()
            keys = self._due(everything=now >= next_look)
            if now >= next_look:
                next_look = now + CHECK_AGAIN
            try:
                if keys:
                    self._subscriber.subscribe()
                    self._read(keys)
                    outage.note_reply()
            except StoreUnavailable as error:
                try:
                    outage.note_outage()
                except StoreUnavailable:
                    self._fail(error)
                next_look = time.monotonic() + 0.5
            except ConveyorError as error:
                self._fail(error)
            self._leave()
            with self._lock:
                idle_since = now if self._watched else idle_since
                if self._closed or (not self._watched and now - idle_since > _IDLE):
                    self._thread = None
                    break
            self._changed.wait(max(0.0, next_look - time.monotonic()))
        if self._closed:
            self._fail(ConfigurationError("The app was closed while jobs were watched. Watch again: watch(after=…)."))

    def _due(self, *, everything: bool) -> list[tuple[str, str]]:
        with self._lock:
            keys = list(self._watched) if everything else [key for key in list(self._stale) if key in self._watched]
            self._stale = {}
            return [key for key in keys if self._watched[key].watchers]

    def _read(self, keys: list[tuple[str, str]]) -> None:
        """Read what Redis holds of jobs, and give it to those that watch them."""
        of_queue: dict[str, list[_Watched]] = {}
        for key in keys:
            watched = self._watched.get(key)
            if watched is not None:
                of_queue.setdefault(key[0], []).append(watched)
        woken: dict[Watcher, None] = {}
        for several in of_queue.values():
            for first in range(0, len(several), _PAGE):
                page = several[first : first + _PAGE]
                call = inspection.watch_jobs(
                    page[0].job.keys, [one.job.id for one in page], self._subscriber.watch_channel
                )
                lookups = self._client.run(call)
                for watched, lookup in zip(page, lookups, strict=True):
                    for watcher in self._watchers_of(watched, has_ended=lookup[0] in _ENDED):
                        watcher.put((watched.job.keys.prefix, watched.job.id), lookup)
                        woken[watcher] = None
        for watcher in woken:
            watcher.wake()

    def _watchers_of(self, watched: _Watched, *, has_ended: bool) -> list[Watcher]:
        """Return those that watch a job; when it has ended nothing listens to it any more: whoever comes later reads it anew."""
        with self._lock:
            watchers = list(watched.watchers)
            if has_ended:
                self._watched.pop((watched.job.keys.prefix, watched.job.id), None)
        if has_ended:
            self._subscriber.unlisten(watched.job.id, watched.listener)
        return watchers

    def _leave(self) -> None:
        """Stop listening to the jobs that nobody watches any more."""
        with self._lock:
            unwatched = [key for key, one in self._watched.items() if not one.watchers]
            gone = [self._watched.pop(key) for key in unwatched]
        for watched in gone:
            if self._subscriber.unlisten(watched.job.id, watched.listener) and not self._closed:
                self._subscriber.stop_watching(watched.job.keys, watched.job.id)

    def _fail(self, error: ConveyorError) -> None:
        """End all that watch with an error."""
        with self._lock:
            watchers = {one: None for watched in self._watched.values() for one in watched.watchers}
        for watcher in watchers:
            watcher.error = error
            watcher.wake()


def check_after(after: object, count: int) -> None:
    """Raise ConfigurationError for an ``after=`` of *count* jobs that is no id of an update and no map of them."""
    if isinstance(after, Mapping):
        for value in after.values():
            Place.read(value)
    elif after is not None:
        if count != 1 and isinstance(after, str):
            raise ConfigurationError(
                f"app.watch(after=…) takes a map of job ids to the last ids of their updates, not {after!r}: "
                "keep  last[update.job_id] = update.id."
            )
        Place.read(after)


def places(after: object, jobs: Sequence[WatchedJob]) -> list[Place | None]:
    """Return the places of *jobs* in ``after=``: None, the id of an update of the only job, or a map of ids of jobs to them."""
    if isinstance(after, Mapping):
        known = {str(key): value for key, value in after.items()}
        return [Place.read(known[job.public_id]) if job.public_id in known else None for job in jobs]
    return [None if after is None else Place.read(after)] * len(jobs)
