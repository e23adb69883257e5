"""Many calls at once: a thousand at a time, one push for each queue among them, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError
from conveyor.ids import new_ids
from conveyor.jobs.job import Job
from conveyor.store.client.batching import BULK
from conveyor.store.operations import Entry

if TYPE_CHECKING:
    from conveyor.jobs.job_options import JobOptions
    from conveyor.jobs.task import Task, TaskApp, TaskCall
    from conveyor.store.client.durability import DurabilityRequest

Encode = Callable[[tuple[Any, ...], dict[str, Any]], bytes]


class QueueBatch:
    """The jobs of one queue in a chunk: flat pairs of id and envelope while all are plain, entries else."""

    __slots__ = ("durability_request", "entries", "jobs", "pairs", "queue")

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.jobs: list[Job[Any]] = []
        self.pairs: list[str | bytes] = []
        self.entries: list[Entry] = []
        self.durability_request: DurabilityRequest | None = (
            None  # what satisfies all of them: they travel together, in their order
        )

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

    def settle(self, ids: Sequence[str]) -> None:
        """Take the ids the queue answered with: another one than asked for is that of a job that existed."""
        for job, id_ in zip(self.jobs, ids, strict=True):
            job.settle(id_)


class JobChunk:
    """Up to a thousand prepared calls: handles in the order of the calls, and what to push where."""

    __slots__ = ("_batches", "_home", "jobs")

    def __init__(self, home: TaskApp, calls: list[TaskCall[Any]]) -> None:
        """Encode all of *calls*; raises PayloadError for the first that does not fit."""
        self._home = home
        self._batches: dict[str, QueueBatch] = {}
        self.jobs: list[Job[Any]] = []
        if not calls:
            return
        append = self.jobs.append
        task, choice = calls[0].task, calls[0].choice
        batch, plain, encode = self._settings(task, choice)
        for id_, call in zip(new_ids(len(calls)), calls, strict=True):
            if call.task is not task or call.choice is not choice:
                task, choice = call.task, call.choice
                batch, plain, encode = self._settings(task, choice)
            if plain and not batch.entries:
                batch.pairs += (id_, task.head + encode(call.args, call.kwargs))
                job: Job[Any] = Job(home, id_, task.queue, task)
                batch.jobs.append(job)
            else:
                job = self._special(task, call)
            append(job)

    def _settings(self, task: Task[..., Any], choice: JobOptions) -> tuple[QueueBatch, bool, Encode]:
        plain = task.is_plain(choice) and task.queue not in self._home.partitioned
        return self._batch(task.queue), plain, task.signature.encode

    def _special(self, task: Task[..., Any], call: TaskCall[Any]) -> Job[Any]:
        queue, entry = task.prepare(call.choice, call.args, call.kwargs)
        job: Job[Any] = Job(self._home, entry.id, queue, task)
        batch = self._batch(queue)
        batch.add(entry, job)
        if call.choice.durability_request is not None:
            batch.durability_request = call.choice.durability_request.combined_with(batch.durability_request)
        return job

    def _batch(self, queue: str) -> QueueBatch:
        found = self._batches.get(queue)
        if found is None:
            found = self._batches[queue] = QueueBatch(queue)
        return found

    def send(self) -> list[Callable[[], None]]:
        """Push all; return what has to be called before anything else is pushed."""
        home = self._home
        finish: list[Callable[[], None]] = []
        for batch in self._batches.values():
            if batch.pairs and batch.queue not in home.bounded:
                finish.append(home.client.start_push_plain(home.keys(batch.queue), batch.pairs))
            elif batch.jobs:
                batch.settle(home.send(batch.queue, batch.as_entries(), batch.durability_request))
        return finish

    async def asend(self) -> None:
        """Do the same without blocking the event loop."""
        for batch in self._batches.values():
            if batch.jobs:
                batch.settle(await self._home.asend(batch.queue, batch.as_entries(), batch.durability_request))


class ChunkSender:
    """Chunks on their way: Redis works on one while the next is prepared. `jobs` are those accepted."""

    def __init__(self) -> None:
        self.jobs: list[Job[Any]] = []
        self._finish: list[Callable[[], None]] = []
        self._under_way: list[Job[Any]] = []

    def send(self, chunk: JobChunk) -> None:
        """Send *chunk* when the one before is accepted."""
        self._settle()
        self._under_way = chunk.jobs
        self._finish = chunk.send()

    def _settle(self) -> None:
        while self._finish:
            self._finish.pop(0)()
        self.jobs += self._under_way
        self._under_way = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        """What was sent is accepted or refused before anything else is said."""
        self._settle()


def chunks(home: TaskApp, calls: Iterable[TaskCall[Any]]) -> Iterator[JobChunk]:
    """
    Yield prepared chunks of *calls*.

    A sequence is prepared as a whole before anything is sent, so a bad call in it stores nothing; anything else is
    consumed as it is sent.
    """
    if isinstance(calls, Sequence):
        yield from [JobChunk(home, list(calls[at : at + BULK])) for at in range(0, len(calls), BULK)]
        return
    source = iter(calls)
    while taken := list(islice(source, BULK)):
        yield JobChunk(home, taken)


def note(error: ConveyorError, count: int) -> None:
    """Say on *error* how many jobs were enqueued before it."""
    if count:
        error.add_note(f"{count} jobs were enqueued before it.")
