"""The app: where a program's tasks, queues, hooks and its connection to Redis come together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar, Unpack, cast, overload

from conveyor import ident, provider
from conveyor.bulk import Shipment, chunks, note
from conveyor.codec import MAX_PAYLOAD
from conveyor.duration import Duration
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.hook import Hooks
from conveyor.job import Job, refuse_in_loop
from conveyor.outcome import Retry
from conveyor.outgoing import positive_ms
from conveyor.registration import TaskDecorator, refuse_later, register, task_options
from conveyor.result import Replies
from conveyor.sealing.choice import choose
from conveyor.sealing.sealing import LARGE_ABOVE, MAX_LARGE
from conveyor.sealing.size import Size
from conveyor.sending import Sending
from conveyor.store.durability import Asking, asked
from conveyor.store.reach import reach
from conveyor.task import AsyncTask, RunIn, SyncTask, Task, TaskCall, Upcast

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.limit import Concurrency, Debounce, Rate, Unique
    from conveyor.plain import PlainList
    from conveyor.queue import Queue
    from conveyor.sealing.blob import BlobStore
    from conveyor.store.buffer import Buffer
    from conveyor.store.keys import QueueKeys

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Full = Literal["raise", "block", "drop-oldest"]
Step = Callable[[int, Any], Any]
"""From a version and a message of it to the message as the next version has it."""


class Conveyor(Hooks, Sending):
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
        max_payload: int = MAX_PAYLOAD,
        compress: Size | None = None,
        large: BlobStore | None = None,
        large_above: Size = LARGE_ABOVE,
        max_large: Size = MAX_LARGE,
        buffer: Buffer | None = None,
    ) -> None:
        """
        Take the URL (None: ``CONVEYOR_URL``, else the embedded server) and what holds for all queues.

        `lease` is how long a worker may be silent before its jobs go to others, `max_payload` the limit in bytes of
        one set of arguments, one message or one result. `keys` (key id to secret) seal payloads, results and errors:
        the first seals, all open, and what is not sealed is set aside; `encrypt` makes them unreadable too.
        `compress` is a size above which they are compressed; with `large`, a store, arguments and messages above
        `large_above` lie there, up to `max_large`. Sizes: bytes or ``"256KiB"``. `buffer` keeps what is pushed while
        Redis is away. Raises ConfigurationError.
        """
        super().__init__()
        if not isinstance(max_payload, int) or isinstance(max_payload, bool) or max_payload < 1:
            raise ConfigurationError(f"max_payload must be a number of bytes, not {max_payload!r}.")
        self.backend = reach(url, namespace, buffer)
        self.replies = Replies(self.backend)
        self.namespace = namespace
        self.lease_ms = positive_ms(lease, "lease")
        self.max_payload = max_payload
        self.sealing = choose(
            keys=keys, encrypt=encrypt, compress=compress, large=large, large_above=large_above, max_large=max_large,
            max_payload=max_payload,
        )  # fmt: skip
        """What happens to bodies on their way; None when nothing does."""
        self.max_whole = max_payload if self.sealing is None else self.sealing.max_whole
        self.tasks: dict[str, Task[..., Any]] = {}
        self.queues: dict[str, Queue[Any]] = {}
        self.plain_lists: dict[str, PlainList[Any]] = {}
        self.bounded: dict[str, Queue[Any]] = {}
        self._declared: dict[str, object] = {}
        self._keys: dict[str, QueueKeys] = {}

    def __repr__(self) -> str:
        return f"<Conveyor {self.namespace}: {len(self.tasks)} tasks, {len(self.queues)} queues>"

    @property
    def promises(self) -> Mapping[str, Task[..., Any]]:
        """The tasks, for handles that want to know what a result is."""
        return self.tasks

    # -- queues ---------------------------------------------------------------------------------------------------

    @overload
    def queue(
        self, name: str, *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        **durable: Unpack[Asking],
    ) -> Queue[Any]: ...  # fmt: skip
    @overload
    def queue(
        self, name: str, type: type[T], *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        **durable: Unpack[Asking],
    ) -> Queue[T]: ...  # fmt: skip
    @overload
    def queue(
        self, name: str, type: Any, *, partitions: int = 1, lease: Duration | None = None, max_attempts: int = 5,
        max_length: int | None = None, full: Full = "raise", version: int = 1, upcast: Step | None = None,
        **durable: Unpack[Asking],
    ) -> Queue[Any]: ...  # fmt: skip

    def queue(
        self,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        partitions: int = 1,
        lease: Duration | None = None,
        max_attempts: int = 5,
        max_length: int | None = None,
        full: Full = "raise",
        version: int = 1,
        upcast: Step | None = None,
        **durable: Unpack[Asking],
    ) -> Queue[Any]:
        """
        Declare a queue of messages of *type* (any JSON value when left out), or set up one that tasks use.

        `lease` as for the app, `max_attempts` how often a message is tried, `max_length` how many may be unfinished,
        `full` what a push beyond that does, `version` and `upcast(version, value)` as of a task. `fsync` and
        `wait_replicas` make each push, of jobs too, wait until it is on disk and that many replicas have it, each for
        `wait_timeout`; then DurabilityNotReached. Declared again with the same options it is the same object; with
        others it raises ConfigurationError.
        """
        ident.queue_name(name)
        if partitions != 1:
            raise ConfigurationError(f"queue({name!r}, partitions={partitions!r}) is not available yet. Leave it out.")
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        asks = asked(durable)
        facts = ("queue", type, lease_ms, max_attempts, max_length, full, version, upcast, asks)
        if self._is_declared(name, facts):
            return self.queues[name]
        from conveyor.queue import Queue

        queue: Queue[Any] = Queue(
            self.backend, name, type, lease_ms=lease_ms, max_attempts=max_attempts, max_length=max_length, full=full,
            asks=asks, max_payload=self.max_whole, sealing=self.sealing, version=version, upcast=upcast,
        )  # fmt: skip
        self.queues[name], self._declared[name] = queue, facts
        if max_length is not None or asks is not None:
            self.bounded[name] = queue
        return queue

    def plain_list(
        self,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        task: Task[..., Any] | str | None = None,
        lease: Duration | None = None,
        max_attempts: int = 5,
        sealed: bool = True,
    ) -> PlainList[Any]:
        """
        Declare a plain Redis list of JSON documents, shared with programs that know nothing of us.

        With *task* its entries run as jobs of that task. The rest is as in `queue`. Nobody can seal them, so an app
        with keys takes them only when told so: ``sealed=False``.
        """
        if sealed and self.sealing is not None and self.sealing.seal is not None:
            raise ConfigurationError(
                f"plain_list({name!r}): programs that know nothing of us cannot seal, and this app takes only sealed "
                "payloads. If whoever can write to that list may be trusted, say so: plain_list(…, sealed=False)."
            )
        fed = task.name if isinstance(task, Task) else task
        lease_ms = self.lease_ms if lease is None else positive_ms(lease, "lease")
        facts = ("plain list", type, fed, lease_ms, max_attempts)
        if self._is_declared(name, facts):
            return self.plain_lists[name]
        from conveyor.plain import PlainList

        found: PlainList[Any] = PlainList(
            self.backend, name, type, task=fed, lease_ms=lease_ms, max_attempts=max_attempts,
            max_payload=self.max_payload,
        )  # fmt: skip
        self.plain_lists[name], self._declared[name] = found, facts
        self._keys[name] = found.keys  # they lie where the list lies
        return found

    def _is_declared(self, name: str, facts: tuple[object, ...]) -> bool:
        if name not in self._declared:
            return False
        if self._declared[name] != facts:
            raise ConfigurationError(
                f"{name!r} is declared twice with different options: {self._declared[name]} and {facts}. "
                "Declare it once and import it where it is used."
            )
        return True

    def queue_lease_ms(self, queue: str) -> int:
        """Return the lease of *queue* in ms."""
        found = self.queues.get(queue, self.plain_lists.get(queue))
        return self.lease_ms if found is None else found.lease_ms

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
        max_payload: int | None = None, unique: Unique | None = None,
        limits: Sequence[Rate | Concurrency] | None = None, group_by: str | None = None,
        debounce: Debounce | None = None, version: int = 1, upcast: Upcast | None = None,
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
        max_payload: int | None = None,
        unique: Unique | None = None,
        limits: Sequence[Rate | Concurrency] | None = None,
        group_by: str | None = None,
        debounce: Debounce | None = None,
        version: int = 1,
        upcast: Upcast | None = None,
    ) -> Any:
        """
        Register a function as a task; used bare (``@app.task``) or with options.

        `timeout` limits one attempt, `retry` is a policy or a number of attempts, `keep_result` how long the result
        stays (0: not at all), `expires` cancels a job that has not started by then, `ack="early"` gives up the
        promise to run again after a crash. `run_in` is loop, thread or process: by default loop for an `async def`,
        thread for a `def`. `version` numbers what the payload looks like; `upcast(version, arguments)` turns the
        arguments of that version into those of the next.
        Raises ConfigurationError, also for a function whose arguments JSON cannot carry.
        """
        refuse_later(unique=unique, limits=limits, group_by=group_by, debounce=debounce)
        options = task_options(
            timeout=timeout, retry=retry, keep_result=keep_result, ack=ack, expires=expires, priority=priority,
            version=version, upcast=upcast,
        )  # fmt: skip

        def add(function: Callable[..., Any]) -> Task[..., Any]:
            return register(self, function, name, ident.queue_name(queue), run_in, options, max_payload)

        return add if function is None else add(function)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def enqueue_many(self, calls: Iterable[TaskCall[R]]) -> list[Job[R]]:
        """
        Enqueue many calls (``task.s(…)``) in a few round trips, each queue's in their order; return their handles.

        Each thousand for a queue is accepted whole or not at all. A call that does not fit raises PayloadError: of a
        list nothing was stored then, of a generator nothing from that thousand on.
        """
        refuse_in_loop("app.enqueue_many()", "await app.aenqueue_many(…)")
        shipment = Shipment()
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
        queue, bare = ident.split(id)
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
        if provider.embedded_worker is None:
            raise ConfigurationError("This installation has no worker.")
        made = provider.embedded_worker().EmbeddedWorker(
            self, queues=queues, concurrency=concurrency, threads=threads, burst=burst, grace=grace,
            allow_eviction=allow_eviction,
        )  # fmt: skip
        return cast("AbstractAsyncContextManager[Any]", made)

    def close(self) -> None:
        """Close the connections of this process and leave the embedded server; using the app opens them again."""
        self.replies.close()
        self.backend.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, then the rest."""
        self.replies.close()
        await self.backend.aclose()

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
