"""Many calls at once: a thousand at a time, one push for each of their queues, in their order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.ids import new_ids, tag_texts
from conveyor.jobs.job import Job, note_accepted
from conveyor.jobs.task import TaskCall
from conveyor.payload.codec import show
from conveyor.store.client.batching import BULK
from conveyor.store.operations import Entry
from conveyor.units import Duration, milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.task import TaskCore, TaskDefinition
    from conveyor.messaging.push_options import Outgoing
    from conveyor.store.client.durability import DurabilityRequest

Encode = Callable[[tuple[Any, ...], dict[str, Any]], bytes]


class QueueBatch:
    """The jobs of one queue in a chunk: flat pairs of id and envelope while all are plain, else entries."""

    __slots__ = ("durability_request", "entries", "jobs", "pairs", "queue")

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.jobs: list[Job[Any]] = []
        self.pairs: list[str | bytes] = []
        self.entries: list[Entry] = []
        # One that satisfies all of them: they are pushed together, in their order.
        self.durability_request: DurabilityRequest | None = None

    def add(self, entry: Entry, job: Job[Any]) -> None:
        """Append a job that needs more than an envelope."""
        if self.pairs:
            self.entries, self.pairs = self.as_entries(), []
        self.entries.append(entry)
        self.jobs.append(job)

    def as_entries(self) -> list[Entry]:
        """Return all as entries."""
        pairs: list[Any] = self.pairs
        return [*(Entry(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)), *self.entries]

    def note_accepted(self, ids: Sequence[str]) -> None:
        """Note the ids that the queue answered with: an id other than the one sent is that of a job that existed."""
        for job, id_ in zip(self.jobs, ids, strict=True):
            note_accepted(job, id_)


class JobChunk:
    """Up to a thousand prepared calls: handles in the order of the calls, and what to push to each queue."""

    __slots__ = ("_batches", "_core", "_turns", "jobs")

    def __init__(self, core: TaskCore, calls: list[TaskCall[Any]]) -> None:
        """Encode all of *calls*; raises PayloadError for the first that does not fit, ConfigurationError for what is no call."""
        self._core = core
        self._batches: dict[str, QueueBatch] = {}
        self._turns: dict[str, int] = {}  # queue → the partition that this chunk fills
        self.jobs: list[Job[Any]] = []
        if not calls:
            return
        _refuse_others(calls)
        append = self.jobs.append
        definition, outgoing = calls[0].definition, calls[0].outgoing
        batch, plain, encode = self._settings(definition, outgoing)
        for id_, call in zip(new_ids(len(calls)), calls, strict=True):
            if call.definition is not definition or call.outgoing is not outgoing:
                definition, outgoing = call.definition, call.outgoing
                batch, plain, encode = self._settings(definition, outgoing)
            if plain and not batch.entries:
                batch.pairs += (id_, definition.head + encode(call.args, call.kwargs))
                job: Job[Any] = Job(core, id_, batch.queue, definition)
                batch.jobs.append(job)
            else:
                job = self._add_entry(call)
            append(job)

    def _settings(self, definition: TaskDefinition, outgoing: Outgoing) -> tuple[QueueBatch, bool, Encode]:
        queue = self._core.place_plain(definition.queue, self._turns) if definition.is_plain(outgoing) else None
        return self._batch(queue or definition.queue), queue is not None, definition.signature.encode

    def _add_entry(self, call: TaskCall[Any]) -> Job[Any]:
        queue, entry = call.definition.prepare(call.outgoing, call.args, call.kwargs, self._turns)
        job: Job[Any] = Job(self._core, entry.id, queue, call.definition)
        batch = self._batch(queue)
        batch.add(entry, job)
        if call.durability_request is not None:
            batch.durability_request = call.durability_request.combined_with(batch.durability_request)
        return job

    def _batch(self, queue: str) -> QueueBatch:
        batch = self._batches.get(queue)
        if batch is None:
            batch = self._batches[queue] = QueueBatch(queue)
        return batch

    def push(self) -> list[Callable[[], None]]:
        """Push all; return the functions to call before anything else is pushed: each waits for an answer."""
        core = self._core
        finish: list[Callable[[], None]] = []
        for batch in self._batches.values():
            if batch.pairs and (complete := core.start_push_plain(batch.queue, batch.pairs)) is not None:
                finish.append(complete)
            elif batch.jobs:
                batch.note_accepted(core.push(batch.queue, batch.as_entries(), batch.durability_request))
        return finish

    async def apush(self) -> None:
        """Awaitable form of `push`; returns when all is accepted."""
        for batch in self._batches.values():
            if batch.jobs:
                batch.note_accepted(await self._core.apush(batch.queue, batch.as_entries(), batch.durability_request))


class ChunkSender:
    """
    Sends chunks one behind the other: Redis works on one while the next is prepared. `jobs` are those accepted.

    Leaving the block waits for the last chunk, so that its answer is known before an error is reported.
    """

    def __init__(self) -> None:
        self.jobs: list[Job[Any]] = []
        self._finish: list[Callable[[], None]] = []
        self._in_flight: list[Job[Any]] = []

    def send(self, chunk: JobChunk) -> None:
        """Send *chunk* when the one before is accepted."""
        self._wait()
        self._in_flight = chunk.jobs
        self._finish = chunk.push()

    def _wait(self) -> None:
        while self._finish:
            self._finish.pop(0)()
        self.jobs += self._in_flight
        self._in_flight = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._wait()


def chunks(core: TaskCore, calls: Iterable[TaskCall[Any]]) -> Iterator[JobChunk]:
    """
    Yield prepared chunks of *calls*.

    A sequence is prepared as a whole before anything is sent, so a bad call in it stores nothing; anything else is
    consumed as it is sent.
    """
    if isinstance(calls, Sequence):
        yield from [JobChunk(core, list(calls[at : at + BULK])) for at in range(0, len(calls), BULK)]
        return
    source = iter(calls)
    while taken := list(islice(source, BULK)):
        yield JobChunk(core, taken)


def planned(
    calls: Iterable[TaskCall[Any]], spread: Duration | None, jitter: Duration | None, tags: Iterable[str] | None
) -> Iterable[TaskCall[Any]]:
    """Return *calls* with *tags* besides their own, and with their starts as `spread_out` has them; raises ConfigurationError."""
    if not isinstance(calls, Iterable):
        raise _no_call(calls)
    return spread_out(calls if tags is None else _tagged(calls, tag_texts(tags)), spread, jitter)


def _tagged(calls: Iterable[TaskCall[Any]], tags: tuple[str, ...]) -> Iterable[TaskCall[Any]]:
    before = after = None

    def add(call: TaskCall[Any]) -> TaskCall[Any]:
        nonlocal before, after
        _refuse_others([call])
        if after is None or call.outgoing is not before:  # most calls have that of their task
            before = call.outgoing
            after = replace(before, tags=tag_texts([*before.tags, *tags]))
        return TaskCall(call.definition, after, call.durability_request, call.args, call.kwargs)

    return [add(call) for call in calls] if isinstance(calls, Sequence) else map(add, calls)


def _refuse_others(calls: Sequence[object]) -> None:
    """Raise ConfigurationError when one of *calls* is no call of a task."""
    if {*map(type, calls)} - {TaskCall}:
        raise _no_call(next(one for one in calls if not isinstance(one, TaskCall)))


def _no_call(given: object) -> ConfigurationError:
    return ConfigurationError(
        f"enqueue_many takes calls of tasks, such as [add.s(1, 2), add.s(3, 4)], not {show(given)}."
    )


def spread_out(
    calls: Iterable[TaskCall[Any]], spread: Duration | None, jitter: Duration | None
) -> Iterable[TaskCall[Any]]:
    """
    Return *calls* with their starts evenly over the time *spread*, each later by up to *jitter*; as they are without both.

    What a call has of `delay` or `at` is added to. All calls are taken first, since their number decides. Raises
    ConfigurationError.
    """
    if spread is None and jitter is None:
        return calls
    over = 0 if spread is None else milliseconds(spread, name="spread")
    most = 0 if jitter is None else milliseconds(jitter, name="jitter")
    taken, later = list(calls), list[TaskCall[Any]]()
    _refuse_others(taken)
    for at, call in enumerate(taken):
        outgoing = call.outgoing
        if outgoing.front:
            raise ConfigurationError("spread and jitter are for calls without front=True. Nothing was enqueued.")
        ms = over * at // len(taken) + random.randint(0, most)  # noqa: S311  no secret
        if outgoing.at_ms is None:
            outgoing = replace(outgoing, delay_ms=(outgoing.delay_ms or 0) + ms)
        else:
            outgoing = replace(outgoing, at_ms=outgoing.at_ms + ms)
        later.append(TaskCall(call.definition, outgoing, call.durability_request, call.args, call.kwargs))
    return later


def add_count(error: ConveyorError, count: int) -> None:
    """Add a note to *error* with the number of jobs that were enqueued before it."""
    if count:
        error.add_note(f"{count} jobs were enqueued before it.")


@contextmanager
def bulk_bar(calls: Iterable[object], *, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Give the function that draws how many of *calls* are stored; where no bar is *wanted*, it does nothing."""
    if not wanted:
        yield lambda stored: None
        return
    from conveyor.jobs.progress_bar import ProgressBar

    bar, total = ProgressBar(), len(calls) if isinstance(calls, Sized) else None
    try:
        yield lambda stored: bar.show(stored, total, "enqueued")
    finally:
        bar.close()
