"""A registered function: called as it is, or enqueued with its arguments checked and its result typed."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from asyncio import _get_running_loop
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.ids import new_id
from conveyor.jobs import spawn_outbox
from conveyor.jobs.context import Context
from conveyor.jobs.job import Job, JobApp
from conveyor.jobs.job_options import NOTHING, JobOptions, Outgoing, choose
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import ValueCodec, show
from conveyor.payload.formats import JSON, FormatRegistry, codec_for
from conveyor.payload.records import write_rest
from conveyor.payload.signature import TaskSignature
from conveyor.store.operations import Entry, ExistingId
from conveyor.units import Duration

if TYPE_CHECKING:
    from conveyor.jobs.hooks import Middleware
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.client.durability import DurabilityRequest
    from conveyor.store.keys import QueueKeys

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
RunIn = Literal["loop", "thread", "process"]
Upcast = Callable[[int, dict[str, Any]], dict[str, Any]]
"""From a version and the arguments of a job that has it to those of the next version."""


class TaskApp(JobApp, Protocol):
    """What a task needs of its app."""

    @property
    def pushers(self) -> Sequence[Middleware]: ...

    @property
    def bounded(self) -> Container[str]: ...
    @property
    def partitioned(self) -> Container[str]: ...

    @property
    def sealing(self) -> PayloadPipeline | None: ...

    def placed(self, queue: str, entry: Entry) -> str: ...
    def send(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]: ...
    async def asend(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]: ...


@dataclass(frozen=True)
class TaskOptions:
    """How the jobs of a task run. Times in ms; `keep_ms` 0 keeps no result, None elsewhere sets no limit."""

    timeout_ms: int | None = None
    retry: Retry = field(default_factory=Retry)
    keep_ms: int = 600_000
    ack: Literal["late", "early"] = "late"
    expires_ms: int | None = None
    priority: int = 0
    version: int = 1
    upcast: Upcast | None = None


class Task(Generic[P, R_co]):
    """
    A function that workers run. Calling it runs it here; `enqueue` has a worker run it.

    `name` is what jobs carry, `queue` where they go, `run_in` where they run (loop, thread or process), `settings` how.
    """

    def __init__(
        self,
        home: TaskApp,
        function: Callable[P, Any],
        *,
        name: str,
        queue: str,
        run_in: RunIn,
        options: TaskOptions,
        max_payload: int,
        max_result: int | None = None,
        formats: FormatRegistry = JSON,
    ) -> None:
        """Read the function's signature; raises ConfigurationError for one whose arguments JSON cannot carry."""
        functools.update_wrapper(self, function)
        self._home = home
        self.function: Callable[P, Any] = function
        self.name = name
        self.queue = queue
        self.is_async = is_async(function)
        self.run_in: RunIn = run_in
        self.settings = options
        self.signature = TaskSignature(function, name, max_payload=max_payload, formats=formats, injected=_is_injected)
        self.returns_none = self.signature.returns_none
        unannotated = self.signature.result is inspect.Signature.empty
        self.promises = not (unannotated or self.returns_none)
        self.results: ValueCodec[Any] = codec_for(
            self.signature.result if options.keep_ms or not self.promises else Any,
            formats=formats,
            max_payload=max_payload if max_result is None else max_result,
            what=f"The result of {name}()",
            lossy=unannotated,
        )
        self.bare_results = home.sealing is None and formats.writes is None  # they stand in the outcome as they are
        self.head = write_rest(name, b"")
        self._keys: QueueKeys = home.keys(queue)
        self._plain = (
            options.priority == 0 and options.expires_ms is None and home.sealing is None and options.version == 1
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function, here and now."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.signature.describe()} on {self.queue}>"

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """
        Have a worker call the function with these arguments; return a handle of the job.

        Raises PayloadError for arguments that do not fit or cannot be stored, QueueFull, StoreUnavailable, and
        ConfigurationError inside a running event loop. When it raises the first two, nothing was stored.
        """
        if _get_running_loop() is not None:
            raise _in_loop(self, args, kwargs, sys._getframe(1))  # noqa: SLF001  where to look is half of the help
        home = self._home
        if self._plain and not home.pushers and not home.client.deferring and self.queue not in home.bounded:
            id_ = new_id()
            home.client.push_plain(self._keys, (id_, self.head + self.signature.encode(args, kwargs)))
            return Job(home, id_, self.queue, self)
        queue, entry = self.prepare(NOTHING, args, kwargs)
        return self._handle(queue, entry, home.send(queue, (entry,))[0])

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Do the same without blocking the event loop; calls of one tick share a round trip."""
        home = self._home
        if self._plain and not home.pushers and not home.client.deferring and self.queue not in home.bounded:
            client, keys = home.client, self._keys
            body = self.signature.encode(args, kwargs)
            if not client.is_announced(keys):
                await client.aannounce(keys)
            id_ = new_id()
            await client.put(keys, id_, self.head + body)
            return Job(home, id_, self.queue, self)
        return await self.aenqueue_with(NOTHING, args, kwargs)

    def s(self, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R_co]:
        """Return the call as a value, for `app.enqueue_many`."""
        return TaskCall(self, args, kwargs, NOTHING)

    def job(self, id: str) -> Job[R_co]:  # noqa: A002  the contract's name
        """Return a handle from the id of a job of this task, with its result typed; asks nothing."""
        queue, bare = ids.split(id)
        return Job(self._home, bare, queue, self)

    def options(
        self,
        *,
        delay: Duration | None = None,
        at: datetime | None = None,
        priority: int | None = None,
        id: str | None = None,  # noqa: A002  the contract's name
        queue: str | None = None,
        unique: str | None = None,
        expires: Duration | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: Duration | None = None,
        keep_result: Duration | None = None,
        retry: int | None = None,
        front: bool = False,
        fsync: bool | None = None,
        wait_replicas: int | None = None,
        wait_timeout: Duration | None = None,
    ) -> BoundTask[P, R_co]:
        """
        Return the task with options for single jobs; what is None stays as the task has it.

        `delay` or `at` (an aware datetime) starts it later, `expires` cancels it when it has not started by
        then, `id` is an id of your own and a unique key, `retry` the number of attempts, `front` goes before all
        of its priority. `fsync` waits until it is on disk, `wait_replicas` until so many replicas have it, each for
        `wait_timeout`; then DurabilityNotReached.
        Raises ConfigurationError.
        """
        choice = choose(
            delay=delay, at=at, priority=priority, id=id, queue=queue, unique=unique, expires=expires, headers=headers,
            timeout=timeout, keep_result=keep_result, retry=retry, front=front, fsync=fsync,
            wait_replicas=wait_replicas, wait_timeout=wait_timeout,
        )  # fmt: skip
        return BoundTask(self, choice)

    def enqueue_with(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job[R_co]:
        """Enqueue with checked options; what `options(…).enqueue` does."""
        if _get_running_loop() is not None:
            raise _in_loop(self, args, kwargs, sys._getframe(2))  # noqa: SLF001
        queue, entry = self.prepare(choice, args, kwargs)
        return self._handle(queue, entry, self._home.send(queue, (entry,), choice.durability_request)[0])

    async def aenqueue_with(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job[R_co]:
        """Do the same without blocking the event loop."""
        queue, entry = await self.aprepare(choice, args, kwargs)
        return self._handle(queue, entry, (await self._home.asend(queue, (entry,), choice.durability_request))[0])

    def follow_with(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Job[R_co], bytes]:
        """Prepare a job for an outbox; raises PayloadError."""
        if choice.id is None:
            choice = replace(choice, id=ids.new_spawned_id())
        queue, entry = self.prepare(choice, args, kwargs)
        return Job(self._home, entry.id, queue, self), spawn_outbox.write(queue, entry)

    def _handle(self, queue: str, entry: Entry, id: str) -> Job[R_co]:  # noqa: A002
        return Job(self._home, id, queue, self, duplicate=isinstance(id, ExistingId))

    def is_plain(self, choice: JobOptions) -> bool:
        """Tell whether a call is just an envelope at the tail of the task's queue, which is the cheapest."""
        return choice is NOTHING and self._plain and not self._home.pushers and not self._home.client.deferring

    def prepare(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Entry]:
        """Return the queue (or partition) and the entry of a call, with the middleware's changes; raises PayloadError."""
        outgoing, body = self._outgoing(choice, args, kwargs)
        entry = outgoing.entry(body, self._home.sealing, deferred=self._home.client.deferring)
        return self._home.placed(outgoing.queue, entry), entry

    async def aprepare(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Entry]:
        """Do the same; a body for the store of large ones is written there on a thread."""
        sealing, deferred = self._home.sealing, self._home.client.deferring
        outgoing, body = self._outgoing(choice, args, kwargs)
        if sealing is None or not sealing.is_large(body, b"payload"):
            entry = outgoing.entry(body, sealing, deferred=deferred)
        else:
            entry = await asyncio.to_thread(outgoing.entry, body, sealing, deferred=deferred)
        return self._home.placed(outgoing.queue, entry), entry

    def _outgoing(self, choice: JobOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outgoing, bytes]:
        settings = self.settings
        outgoing = Outgoing(
            task=self.name,
            queue=self.queue if choice.queue is None else choice.queue,
            args=args,
            kwargs=kwargs,
            headers=dict(choice.headers),
            priority=settings.priority if choice.priority is None else choice.priority,
            delay_ms=choice.delay_ms,
            at_ms=choice.at_ms,
            expires_ms=settings.expires_ms if choice.expires_ms is None else choice.expires_ms,
            unique=choice.unique,
            id=choice.id,
            front=choice.front,
            timeout_ms=choice.timeout_ms,
            keep_ms=choice.keep_ms,
            attempts=choice.attempts,
            version=settings.version,
        )
        for middleware in self._home.pushers:
            middleware.push(outgoing)
        ids.queue_name(outgoing.queue)
        return outgoing, self.signature.encode(tuple(outgoing.args), outgoing.kwargs)


class SyncTask(Task[P, R_co]):
    """A task whose function is a `def`."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class AsyncTask(Task[P, R_co]):
    """A task whose function is an `async def`."""

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]: ...


class BoundTask(Generic[P, R_co]):
    """A task with options for the jobs enqueued through it."""

    __slots__ = ("_choice", "_task")

    def __init__(self, task: Task[P, R_co], choice: JobOptions) -> None:
        """Take options that were checked."""
        self._task = task
        self._choice = choice

    def __repr__(self) -> str:
        return f"<{self._task.name} with {self._choice}>"

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Have a worker call the function with these arguments and options; raises what `Task.enqueue` does."""
        return self._task.enqueue_with(self._choice, args, kwargs)

    async def aenqueue(self, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Do the same without blocking the event loop."""
        return await self._task.aenqueue_with(self._choice, args, kwargs)

    def s(self, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R_co]:
        """Return the call as a value, for `app.enqueue_many`."""
        return TaskCall(self._task, args, kwargs, self._choice)


class TaskCall(Generic[R_co]):
    """One call of a task as a value; its arguments are checked when it is enqueued."""

    __slots__ = ("args", "choice", "kwargs", "task")

    def __init__(
        self, task: Task[..., R_co], args: tuple[Any, ...], kwargs: dict[str, Any], choice: JobOptions
    ) -> None:
        """Take the task, its arguments and checked options."""
        self.task = task
        self.args = args
        self.kwargs = kwargs
        self.choice = choice

    def __repr__(self) -> str:
        return f"<{_call_text(self.task.name, self.args, self.kwargs)}>"

    def follow(self) -> tuple[Job[R_co], bytes]:
        """Return the handle of the job this call is to become, and its entry in an outbox: for `context.spawn`."""
        return self.task.follow_with(self.choice, self.args, self.kwargs)

    def enqueue(self) -> Job[R_co]:
        """Enqueue this call alone."""
        return self.task.enqueue_with(self.choice, self.args, self.kwargs)

    async def aenqueue(self) -> Job[R_co]:
        """Do the same without blocking the event loop."""
        return await self.task.aenqueue_with(self.choice, self.args, self.kwargs)


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether calling *function* gives a coroutine; looks through partials and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def default_name(function: Callable[..., Any]) -> str:
    """
    Return ``module.function``; raises ConfigurationError for what has no name of its own.

    A module that runs as a script is called as a worker will import it, by its file's name.
    """
    name = getattr(function, "__name__", "")
    if not name or name == "<lambda>":
        raise ConfigurationError(f"{show(function)} has no name. Give it one: @app.task(name='…').")
    module = getattr(function, "__module__", None) or "__main__"
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:
            module = spec.name.removesuffix(".__main__")
        elif file:
            module = file.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
    return f"{module}.{name}"


def _is_injected(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, Context)


def _call_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [show(value) for value in args] + [f"{key}={show(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(given)})"


def _in_loop(
    task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
) -> ConfigurationError:
    name = getattr(task, "__name__", task.name)
    where = f"{frame.f_code.co_filename.replace(chr(92), '/').rpartition('/')[2]}:{frame.f_lineno}"
    return ConfigurationError(
        f"{name}.enqueue() called while an event loop is running in this thread "
        f"(from {where} in {frame.f_code.co_name}).\n"
        f"    Write:  await {_call_text(f'{name}.aenqueue', args, kwargs)}"
        "          It would have blocked everything else on this loop for one round trip. Nothing was enqueued.",
        code="E06",
    )
