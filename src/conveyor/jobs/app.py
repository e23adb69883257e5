"""The app: where a program's tasks, queues, hooks and its connection to Redis come together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar, cast, overload

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.jobs.bulk import ChunkSender, chunks, note
from conveyor.jobs.decorator import TaskDecorator, refuse_later, register, task_options
from conveyor.jobs.hooks import Hooks
from conveyor.jobs.job import Job, refuse_in_loop
from conveyor.jobs.job_options import positive_ms
from conveyor.jobs.registry import QueueRegistry
from conveyor.jobs.results import ResultSubscriber
from conveyor.jobs.task import AsyncTask, RunIn, SyncTask, Task, TaskCall, Upcast
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.payload.formats import Choice, chosen
from conveyor.payload.pipeline import LARGE_ABOVE, MAX_LARGE, choose
from conveyor.store.client.client import Client
from conveyor.units import Duration, Size, size

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.messaging.limits import Concurrency, Debounce, Rate, Unique
    from conveyor.payload.blobs import BlobStore
    from conveyor.store.client.buffer import Buffer

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Full = Literal["raise", "block", "drop-oldest"]
Step = Callable[[int, Any], Any]
"""From a version and a message of it to the message as the next version has it."""


class Conveyor(QueueRegistry, Hooks):
    """
    One program's queues and tasks on one Redis.

    Nothing is opened before it is needed. `with app:` and `async with app:` close it at the end; a closed app opens
    itself again when it is used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str = "conveyor",
        lease: Duration = "15s",
        keys: Mapping[str, str | bytes] | None = None,
        encrypt: bool = False,
        max_payload: Size = MAX_PAYLOAD,
        compress: Size | None = None,
        large: BlobStore | None = None,
        large_above: Size = LARGE_ABOVE,
        max_large: Size = MAX_LARGE,
        format: Choice | Sequence[Choice] = "json",  # noqa: A002
        buffer: Buffer | None = None,
    ) -> None:
        """
        Take the URL (None: ``CONVEYOR_URL``, else the embedded server) and what holds for all queues.

        `lease` is how long a worker may be silent before its jobs go to others, `max_payload` the limit of
        one set of arguments, one message or one result. `keys` (key id to secret) seal payloads, results and errors:
        the first seals, all open, and what is not sealed is set aside; `encrypt` makes them unreadable too.
        `compress` is a size above which they are compressed; with `large`, a store, arguments and messages above
        `large_above` lie there, up to `max_large`. Sizes: bytes or ``"256KiB"``. `format` is how values are written:
        ``"json"``, ``"msgpack"`` or a Format of your own; of several the first writes, all are read. `buffer` keeps what
        is pushed while Redis is away. Raises ConfigurationError.
        """
        super().__init__()
        self.client = make_client(url, namespace, buffer)
        self.replies = ResultSubscriber(self.client)
        self.namespace = namespace
        self.lease_ms = positive_ms(lease, "lease")
        self.max_payload = size(max_payload, "max_payload")
        self.sealing = choose(
            keys=keys, encrypt=encrypt, compress=compress, large=large, large_above=large_above, max_large=max_large,
            max_payload=self.max_payload,
        )  # fmt: skip
        """What happens to bodies on their way; None when nothing does."""
        self.formats = chosen(format)
        self.max_whole = self.max_payload if self.sealing is None else self.sealing.max_whole
        self.tasks: dict[str, Task[..., Any]] = {}

    def __repr__(self) -> str:
        return f"<Conveyor {self.namespace}: {len(self.tasks)} tasks, {len(self.queues)} queues>"

    @property
    def promises(self) -> Mapping[str, Task[..., Any]]:
        """The tasks, for handles that want to know what a result is."""
        return self.tasks

    # -- tasks ----------------------------------------------------------------------------------------------------

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
    @overload
    def task(
        self, /, *, name: str | None = None, queue: str = "default", timeout: Duration | None = None,
        retry: Retry | int | None = None, keep_result: Duration = "10m", run_in: RunIn | None = None,
        ack: Literal["late", "early"] = "late", expires: Duration | None = None, priority: int = 0,
        max_payload: Size | None = None, unique: Unique | None = None,
        limits: Sequence[Rate | Concurrency] | None = None, group_by: str | None = None,
        debounce: Debounce | None = None, version: int = 1, upcast: Upcast | None = None,
        format: Choice | None = None,
    ) -> TaskDecorator: ...  # fmt: skip

    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        timeout: Duration | None = None,
        retry: Retry | int | None = None,
        keep_result: Duration = "10m",
        run_in: RunIn | None = None,
        ack: Literal["late", "early"] = "late",
        expires: Duration | None = None,
        priority: int = 0,
        max_payload: Size | None = None,
        unique: Unique | None = None,
        limits: Sequence[Rate | Concurrency] | None = None,
        group_by: str | None = None,
        debounce: Debounce | None = None,
        version: int = 1,
        upcast: Upcast | None = None,
        format: Choice | None = None,  # noqa: A002
    ) -> Any:
        """
        Register a function as a task; used bare (``@app.task``) or with options.

        `timeout` limits one attempt, `retry` is a policy or a number of attempts, `keep_result` how long the result
        stays (0: not at all), `expires` cancels a job that has not started by then, `ack="early"` gives up the
        promise to run again after a crash. `run_in` is loop, thread or process: by default loop for an `async def`,
        thread for a `def`. `version` numbers what the payload looks like; `upcast(version, arguments)` turns the
        arguments of that version into those of the next. `format` is how arguments and results are written, as of the app.
        Raises ConfigurationError, also for a function whose arguments JSON cannot carry.
        """
        refuse_later(unique=unique, limits=limits, group_by=group_by, debounce=debounce)
        options = task_options(
            timeout=timeout, retry=retry, keep_result=keep_result, ack=ack, expires=expires, priority=priority,
            version=version, upcast=upcast,
        )  # fmt: skip

        def add(function: Callable[..., Any]) -> Task[..., Any]:
            return register(self, function, name, ids.queue_name(queue), run_in, options, max_payload, format)

        return add if function is None else add(function)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def enqueue_many(self, calls: Iterable[TaskCall[R]]) -> list[Job[R]]:
        """
        Enqueue many calls (``task.s(…)``) in a few round trips, each queue's in their order; return their handles.

        Each thousand for a queue is accepted whole or not at all. A call that does not fit raises PayloadError: of a
        list nothing was stored then, of a generator nothing from that thousand on.
        """
        refuse_in_loop("app.enqueue_many()", "await app.aenqueue_many(…)")
        shipment = ChunkSender()
        try:
            with shipment:
                for chunk in chunks(self, calls):
                    shipment.send(chunk)
        except ConveyorError as error:
            note(error, len(shipment.jobs))
            raise
        return shipment.jobs

    async def aenqueue_many(self, calls: Iterable[TaskCall[R]]) -> list[Job[R]]:
        """Do the same without blocking the event loop."""
        jobs: list[Job[R]] = []
        stored = self.sealing is not None and self.sealing.store is not None
        prepared = chunks(self, calls)
        try:
            # Large bodies are written while a chunk is prepared, and that is no work for the loop.
            while chunk := await asyncio.to_thread(next, prepared, None) if stored else next(prepared, None):
                await chunk.asend()
                jobs += chunk.jobs
        except ConveyorError as error:
            note(error, len(jobs))
            raise
        return jobs

    def job(self, id: str) -> Job[Any]:  # noqa: A002  the contract's name
        """
        Return a handle from a public id; asks nothing.

        An id of a caller's own is looked for in all known queues when the handle is used, which raises JobNotFound
        when it is in none. `Task.job` types the result.
        """
        queue, bare = ids.split(id)
        return Job(self, bare, queue)

    # -- running --------------------------------------------------------------------------------------------------

    def worker(
        self,
        *,
        queues: Mapping[str, float] | None = None,
        concurrency: int = 100,
        threads: int = 8,
        burst: bool = False,
        grace: Duration = "30s",
        allow_eviction: bool = False,
    ) -> AbstractAsyncContextManager[Any]:
        """
        Return a worker for `async with`, which runs jobs inside this program until the block ends.

        `queues` maps names to weights (None: those of all tasks), `concurrency` limits the jobs on the loop and
        `threads` those on threads, `burst` stops it when all is drained, `grace` is what running jobs get at the end.
        A server that may delete jobs when its memory is full is refused (E10), unless `allow_eviction`.
        """
        # By name: the worker is built on the jobs, and an app that only sends never loads it.
        made = import_module("conveyor.worker.embedded").EmbeddedWorker(
            self, queues=queues, concurrency=concurrency, threads=threads, burst=burst, grace=grace,
            allow_eviction=allow_eviction,
        )  # fmt: skip
        return cast("AbstractAsyncContextManager[Any]", made)

    def close(self) -> None:
        """Close the connections of this process and leave the embedded server; using the app opens them again."""
        self.replies.close()
        self.client.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, then the rest."""
        self.replies.close()
        await self.client.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def make_client(url: str | None, namespace: str, buffer: Buffer | None) -> Client:
    """
    Return the client of an app: with a buffer, or without (None).

    Nothing is opened, unless an earlier process left pushes in the buffer. Raises ConfigurationError.
    """
    if url is not None and not isinstance(url, str):
        raise ConfigurationError(f"The URL must be text such as 'redis://host:6379/0', not {type(url).__name__}.")
    if buffer is None:
        return Client(url, namespace=namespace)
    from conveyor.store.client.buffer import Buffer
    from conveyor.store.client.buffered import BufferedClient

    if not isinstance(buffer, Buffer):
        raise ConfigurationError(
            f"Conveyor(buffer=…) takes a Buffer, such as Buffer() or Buffer('spool'), not {type(buffer).__name__}."
        )
    return BufferedClient(url, namespace=namespace, buffer=buffer)
