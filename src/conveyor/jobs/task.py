"""Tasks: registered functions, called in this process or enqueued with checked arguments and a typed result."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from asyncio import _get_running_loop
from collections.abc import Callable, Container, Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import TYPE_CHECKING, Any, Generic, Literal, Never, ParamSpec, Protocol, TypeVar

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.ids import new_id
from conveyor.jobs.dependencies import Injection, Overrides, is_injected, plan_injection
from conveyor.jobs.hints import CALL_OPTIONS, CHAINED, TASK_MEMBERS, no_member, refuse_unknown
from conveyor.jobs.job import Job, JobCore
from conveyor.jobs.job_options import entry_of, with_options
from conveyor.jobs.uniqueness import DeclaredUniqueness, task_uniqueness
from conveyor.messaging import outbox
from conveyor.messaging.declared_limits import LoadKeyReader, declare_limits, task_owner
from conveyor.messaging.push_options import Outgoing, apply_middlewares, check_times, push_scope
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import ValueCodec, encode_json, show
from conveyor.payload.formats import JSON, FormatRegistry, codec_for
from conveyor.payload.key_text import member_reader
from conveyor.payload.records import EnvelopeOptions, write_envelope
from conveyor.payload.signature import TaskSignature
from conveyor.store.client.durability import DurabilityRequest, durability_request
from conveyor.store.operations import Entry
from conveyor.units import Duration

if TYPE_CHECKING:
    from conveyor.jobs.hooks import Middleware
    from conveyor.jobs.webhooks import Webhook
    from conveyor.messaging.limits import Concurrency, Rate
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Argument

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
RunIn = Literal["loop", "thread", "process"]
Logs = Literal["failure", "always", "never"]
Upcast = Callable[[int, dict[str, Any]], dict[str, Any]]
"""Turns the arguments of a version into those of the next version."""


class TaskCore(JobCore, Protocol):
    """The part of an app's inside that tasks use."""

    @property
    def push_middlewares(self) -> Sequence[Middleware]: ...
    @property
    def overrides(self) -> Overrides: ...
    @property
    def bounded(self) -> Container[str]: ...
    @property
    def limited(self) -> Container[str]: ...

    def admit_job(self, queue: str, task: str) -> None: ...
    def load_keys(self, task: TaskDefinition, queue: str) -> LoadKeyReader: ...
    def place(self, queue: str, entry: Entry, turns: dict[str, int] | None = None) -> str: ...
    def place_plain(self, queue: str, turns: dict[str, int]) -> str | None: ...
    def start_push_plain(self, queue: str, pairs: Sequence[Argument]) -> Callable[[], None] | None: ...
    def push(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]: ...
    async def apush(
        self, queue: str, entries: Sequence[Entry], durability_request: DurabilityRequest | None = None
    ) -> list[str]: ...


class TaskOptions(msgspec.Struct, frozen=True):
    """The options of a task: how its jobs run. Times in ms; `keep_ms` 0 keeps no result, None elsewhere sets no limit."""

    timeout_ms: int | None = None
    retry: Retry = msgspec.field(default_factory=Retry)
    keep_ms: int = 600_000
    ack: Literal["late", "early"] = "late"
    expires_ms: int | None = None
    priority: int = 0
    version: int = 1
    upcast: Upcast | None = None
    tags: tuple[str, ...] = ()
    limits: Sequence[Rate | Concurrency] | None = None
    group_by: str | None = None
    logs: Logs = "failure"
    requires: tuple[str, ...] = ()
    pin: Literal["build"] | None = None
    webhook: Webhook | None = None
    timeout_hard_ms: int | None = None
    fresh: bool = False
    sensitive: tuple[str, ...] = ()

    def needs(self) -> EnvelopeOptions | None:
        """Return what a job of this program requires of a worker, as its envelope holds it; None: nothing."""
        build = ids.build_of_program() if self.pin else ""
        return EnvelopeOptions(pin=build, requires=list(self.requires)) if build or self.requires else None


class BatchPlan(msgspec.Struct, frozen=True):
    """When the jobs of a batch task run: `size` of them together, or fewer, `within_ms` after the first of them came."""

    size: int
    within_ms: int
    group_by: str | None = None

    def group_of(self, item: Any) -> Hashable:
        """Return the key of the batches that *item* belongs to; None without `group_by`, or for an item without it."""
        if self.group_by is None:
            return None
        try:
            value = member_reader(tuple(self.group_by.split(".")))(item)
        except LookupError:
            return None
        return value if isinstance(value, str | int | float | None) else encode_json(value)


class TaskDefinition:
    """
    A task as the library uses it: its function and options, and how a call of it becomes a job.

    `settings` are its options, `results` is the codec of its results. `outgoing` is the job that a call without options
    becomes, without its arguments.
    """

    def __init__(
        self,
        core: TaskCore,
        function: Callable[..., Any],
        *,
        name: str,
        queue: str,
        run_in: RunIn,
        options: TaskOptions,
        max_payload: int,
        max_result: int | None = None,
        formats: FormatRegistry = JSON,
        batch: BatchPlan | None = None,
        call: Callable[..., Any] | None = None,
        uniqueness: DeclaredUniqueness = (None, None, None),
    ) -> None:
        """
        Read the function's signature; raises ConfigurationError for one whose arguments JSON cannot carry.

        *batch*: when the jobs of a batch task run; None: it is none. *call* has the signature of one job; None: that of
        *function*.
        """
        self.core, self.function, self.name, self.queue = core, function, name, queue
        self.is_async = is_async(function)
        self.run_in: RunIn = run_in
        self.settings = options
        self.batch = batch
        self.signature = TaskSignature(
            call or function, name, max_payload=max_payload, formats=formats, injected=is_injected
        )
        self._declared_injection = self._plan({})
        self.uniqueness = task_uniqueness(self.signature, uniqueness, core.sealing)
        self.returns_none = self.signature.returns_none
        unannotated = self.signature.result is inspect.Signature.empty
        self.promises_result = not (unannotated or self.returns_none)
        self.results: ValueCodec[Any] = codec_for(
            self.signature.result if options.keep_ms or not self.promises_result else Any,
            formats=formats,
            max_payload=max_payload if max_result is None else max_result,
            what=f"The result of {name}()",
            lossy=unannotated,
        )
        self.bare_results = core.sealing is None and formats.writes is None  # they stand in the outcome as they are
        self.head = write_envelope(name, b"")
        """An envelope up to its body, for a job without options."""
        self.keys: QueueKeys = core.keys(queue)
        self.limits = declare_limits(task_owner(name), options.limits, prefix=name, group_by=options.group_by)
        self.loads = bool(self.limits) or options.group_by is not None
        """True when its jobs have limits of the task, or a group."""
        self.needs = options.needs()
        self.plain = (
            options.priority == 0 and options.expires_ms is None and core.sealing is None and options.version == 1
            and not options.tags and not self.loads and self.uniqueness is None and self.needs is None
        )  # fmt: skip
        """True when a call without options is stored as a bare envelope."""
        self.outgoing = Outgoing(
            task=name, queue=queue, priority=options.priority, expires_ms=options.expires_ms, version=options.version,
            tags=options.tags,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<TaskDefinition {self.signature.describe()} on {self.queue}>"

    @property
    def injection(self) -> Injection | None:
        """The values that a worker fills in of its calls; None: none."""
        overrides = self.core.overrides
        return self._plan(overrides) if overrides else self._declared_injection

    def _plan(self, overrides: Overrides) -> Injection | None:
        if not self.signature.injected:
            return None
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = [one.name for one in inspect.signature(self.function).parameters.values() if one.kind in kinds]
        return plan_injection(self.signature.injected, positional, self.name, overrides)

    def is_plain(self, outgoing: Outgoing) -> bool:
        """Tell whether a call is stored as a bare envelope at the tail of the task's queue, the cheapest way."""
        core = self.core
        return (
            outgoing is self.outgoing and self.plain and not core.push_middlewares and not core.client.deferring
            and self.queue not in core.limited
        )  # fmt: skip

    def prepare(
        self, outgoing: Outgoing, args: tuple[Any, ...], kwargs: dict[str, Any], turns: dict[str, int] | None = None
    ) -> tuple[str, Entry]:
        """
        Return the queue (or partition) and the entry of a call, with the middleware's changes; raises PayloadError.

        *turns*: as in `Partitions.partition_of`.
        """
        sent, body, limits = self.encoded(outgoing, args, kwargs)
        deferred, needs = self.core.client.deferring, self.needs
        entry = entry_of(sent, body, self.core.sealing, self.uniqueness, limits, deferred=deferred, needs=needs)
        return self.core.place(sent.queue, entry, turns), entry

    async def aprepare(self, outgoing: Outgoing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Entry]:
        """Awaitable form of `prepare`."""
        sealing, deferred, needs = self.core.sealing, self.core.client.deferring, self.needs
        sent, body, limits = self.encoded(outgoing, args, kwargs)
        if sealing is None or not sealing.is_large(body, b"payload"):
            entry = entry_of(sent, body, sealing, self.uniqueness, limits, deferred=deferred, needs=needs)
        else:  # it is written to a store, which blocks
            entry = await asyncio.to_thread(
                entry_of, sent, body, sealing, self.uniqueness, limits, deferred=deferred, needs=needs
            )
        return self.core.place(sent.queue, entry), entry

    def encoded(
        self, outgoing: Outgoing, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Outgoing, bytes, tuple[str, ...]]:
        """Return the job as the middleware leaves it, its encoded arguments, and its limits as `Entry.limits`."""
        # A copy for this call: a middleware may change it.
        sent = Outgoing(
            outgoing.task,
            outgoing.queue,
            args,
            kwargs,
            dict(outgoing.headers),
            outgoing.priority,
            outgoing.delay_ms,
            outgoing.at_ms,
            outgoing.expires_ms,
            outgoing.unique,
            outgoing.id,
            outgoing.front,
            outgoing.timeout_ms,
            outgoing.keep_ms,
            outgoing.attempts,
            outgoing.version,
            tags=outgoing.tags,
            room_timeout_ms=outgoing.room_timeout_ms,
            group=outgoing.group,
            origin=outgoing.origin,
        )
        if self.core.push_middlewares:
            apply_middlewares(self.core.push_middlewares, sent)
            check_times(sent)
        if sent.queue != self.queue:
            self.core.admit_job(ids.queue_name(sent.queue), self.name)
        body = self.signature.encode(tuple(sent.args), sent.kwargs)
        if self.loads or sent.group is not None or sent.queue in self.core.limited:
            return sent, body, self.core.load_keys(self, sent.queue).read(sent).limits
        return sent, body, ()

    def enqueue(
        self, outgoing: Outgoing, request: DurabilityRequest | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Job[Any]:
        """Enqueue a call with checked options. The caller's caller is named in the error inside an event loop."""
        if _get_running_loop() is not None and not self.core.client.allow_in_loop:
            raise in_loop(self, args, kwargs, sys._getframe(2))  # noqa: SLF001
        with push_scope(self.core.push_middlewares):
            queue, entry = self.prepare(outgoing, args, kwargs)
            return self._handle(queue, entry, self.core.push(queue, (entry,), request))

    async def aenqueue(
        self, outgoing: Outgoing, request: DurabilityRequest | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Job[Any]:
        """Awaitable form of `enqueue`."""
        with push_scope(self.core.push_middlewares):
            queue, entry = await self.aprepare(outgoing, args, kwargs)
            return self._handle(queue, entry, await self.core.apush(queue, (entry,), request))

    def _handle(self, queue: str, entry: Entry, accepted: list[str]) -> Job[Any]:
        [id_] = accepted
        return Job(self.core, id_, queue, self)

    def follow(self, outgoing: Outgoing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Job[Any], bytes]:
        """Return the handle of a job that is spawned, and its entry in an outbox; raises PayloadError."""
        if self.uniqueness is not None and self.uniqueness.raises:
            self.uniqueness.refuse_deferred(self.name)
        if outgoing.id is None:
            outgoing = replace(outgoing, id=ids.new_spawned_id())
        queue, entry = self.prepare(outgoing, args, kwargs)
        return Job(self.core, entry.id, queue, self), outbox.write(queue, entry)


class Task(Generic[P, R_co]):
    """
    A function that workers run. Calling it runs it here; `enqueue` has a worker run it.

    `name` is what jobs carry, `queue` is where they go, `function` is the function itself.
    """

    def __init__(self, definition: TaskDefinition) -> None:
        functools.update_wrapper(self, definition.function)
        self._definition = definition
        self.function: Callable[P, Any] = definition.function
        self.name = definition.name
        self.queue = definition.queue

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # By `vars`: a copy that is being made asks for members before it has any.
            known = vars(self)
            written = getattr(known.get("function"), "__name__", "task")
            raise no_member(f"Task {known.get('name', '')}".rstrip(), name, TASK_MEMBERS, written)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function, here and now. What a worker would fill with `Depends(…)` must be passed by name."""
        if (injection := self._definition.injection) is not None:
            injection.refuse_call(self.name, args, kwargs)
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self._definition.signature.describe()} on {self.queue}>"

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """
        Have a worker call the function with these arguments; return a handle of the job.

        Raises PayloadError for arguments that do not fit or cannot be stored, QueueFull, StoreUnavailable, and
        ConfigurationError inside a running event loop. When it raises the first two, nothing was stored.
        """
        definition = self._definition
        if _get_running_loop() is not None and not definition.core.client.allow_in_loop:
            raise in_loop(definition, args, kwargs, sys._getframe(1))  # noqa: SLF001  the line of the call goes into the message
        core, queue = definition.core, definition.queue
        if definition.plain and not core.push_middlewares and not core.client.deferring and queue not in core.bounded:
            id_ = new_id()
            core.client.push_plain(definition.keys, (id_, definition.head + definition.signature.encode(args, kwargs)))
            return Job(core, id_, queue, definition)
        return definition.enqueue(definition.outgoing, None, args, kwargs)

    async def aenqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Awaitable form of `enqueue`; calls of one tick of the loop share a round trip."""
        definition = self._definition
        core, queue = definition.core, definition.queue
        if definition.plain and not core.push_middlewares and not core.client.deferring and queue not in core.bounded:
            client, keys = core.client, definition.keys
            body = definition.signature.encode(args, kwargs)
            if not client.is_announced(keys):
                await client.aannounce(keys)
            id_ = new_id()
            await client.put(keys, id_, definition.head + body)
            return Job(core, id_, queue, definition)
        return await definition.aenqueue(definition.outgoing, None, args, kwargs)

    def s(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R_co]:
        """Return the call as a value, for `app.enqueue_many` and `context.spawn`."""
        return TaskCall(self._definition, self._definition.outgoing, None, args, kwargs)

    def job(self, id: str) -> Job[R_co]:  # noqa: A002  the contract's name
        """Return a handle from the id of a job of this task, with its result typed; nothing is sent."""
        queue, bare = ids.split(id)
        return Job(self._definition.core, bare, queue, self._definition)

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
        tags: Iterable[str] | None = None,
        timeout: Duration | None = None,
        keep_result: Duration | None = None,
        retry: int | None = None,
        front: bool = False,
        group: str | None = None,
        fsync: bool | None = None,
        wait_replicas: int | None = None,
        wait_timeout: Duration | None = None,
        room_timeout: Duration | None = None,
        **unknown: Never,
    ) -> BoundTask[P, R_co]:
        """
        Return the task with options for single jobs; an option that is None stays as the task has it.

        `delay` or `at` (an aware datetime) starts the job later. `expires` cancels it when it has not started by
        then. `id` is an id of your own and a unique key. `unique` is a key in place of the one that the task's `Unique` takes
        from the arguments, else one that is held until the job ends. `retry` is the number of attempts. `front` puts it before all
        others of its priority. `tags` are words by which it is found, besides those of the task. Jobs with the same `group`
        run in their order, one at a time. `fsync` waits until it is on disk, `wait_replicas` until so many replicas have it,
        each for `wait_timeout`; after that comes DurabilityNotReached. `room_timeout` is how long it waits for room in a full
        queue with ``full="block"``. Raises ConfigurationError.
        """
        refuse_unknown("options()", unknown, CALL_OPTIONS)
        outgoing = with_options(
            self._definition.outgoing, delay=delay, at=at, priority=priority, id=id, queue=queue, unique=unique,
            expires=expires, headers=headers, timeout=timeout, keep_result=keep_result, retry=retry, front=front,
            tags=tags,
            room_timeout=room_timeout,
            group=group,
        )  # fmt: skip
        return BoundTask(self._definition, outgoing, durability_request(fsync, wait_replicas, wait_timeout))


class SyncTask(Task[P, R_co]):
    """A task whose function is a `def`."""

    if TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class AsyncTask(Task[P, R_co]):
    """A task whose function is an `async def`."""

    if TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]: ...


class BoundTask(Generic[P, R_co]):
    """A task with options for the jobs enqueued through it."""

    __slots__ = ("_definition", "_durability", "_outgoing")

    def __init__(self, definition: TaskDefinition, outgoing: Outgoing, durability: DurabilityRequest | None) -> None:
        self._definition = definition
        self._outgoing = outgoing
        self._durability = durability

    def __repr__(self) -> str:
        return f"<{self._definition.name} with {self._outgoing}>"

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Have a worker call the function with these arguments and options; raises what `Task.enqueue` does."""
        return self._definition.enqueue(self._outgoing, self._durability, args, kwargs)

    async def aenqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Job[R_co]:
        """Awaitable form of `enqueue`."""
        return await self._definition.aenqueue(self._outgoing, self._durability, args, kwargs)

    def s(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R_co]:
        """Return the call as a value, for `app.enqueue_many` and `context.spawn`."""
        return TaskCall(self._definition, self._outgoing, self._durability, args, kwargs)


class TaskCall(Generic[R_co]):
    """One call of a task as a value; its arguments are checked when it is enqueued."""

    __slots__ = ("args", "definition", "durability_request", "kwargs", "outgoing")

    def __init__(
        self,
        definition: TaskDefinition,
        outgoing: Outgoing,
        durability_request: DurabilityRequest | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.definition = definition
        self.outgoing = outgoing
        self.durability_request = durability_request
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        return f"<{_call_text(self.definition.name, self.args, self.kwargs)}>"

    if not TYPE_CHECKING:

        def __or__(self, other: object) -> Never:
            raise TypeError(CHAINED)

    def follow(self) -> tuple[Job[R_co], bytes]:
        """Return the handle of the job that this call is to become, and its entry in an outbox: for `context.spawn`."""
        return self.definition.follow(self.outgoing, self.args, self.kwargs)

    def enqueue(self) -> Job[R_co]:
        """Enqueue this call alone."""
        return self.definition.enqueue(self.outgoing, self.durability_request, self.args, self.kwargs)

    async def aenqueue(self) -> Job[R_co]:
        """Awaitable form of `enqueue`."""
        return await self.definition.aenqueue(self.outgoing, self.durability_request, self.args, self.kwargs)


def definition_of(task: Task[..., Any]) -> TaskDefinition:
    """Return the inside of a task."""
    return task._definition  # noqa: SLF001  the one way to it


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether calling *function* returns a coroutine, also for partials and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class FunctionNotRun(ConfigurationError):
    """The function of a task returned a coroutine or a generator: what a worker was to run has not run."""


UNRUN: frozenset[type] = frozenset({CoroutineType, GeneratorType, AsyncGeneratorType})
"""Types of the values that stand for code that has not run."""


def not_run(value: Any) -> FunctionNotRun:
    """Return the error of a job whose function returned *value*, one of `UNRUN`, which is closed."""
    if not isinstance(value, AsyncGeneratorType):
        value.close()  # or Python warns that it was never awaited
    if isinstance(value, CoroutineType):
        kind, remedy = "a coroutine", "Await it in an `async def`; a decorator between must be `async def` as well"
    else:
        kind, remedy = "a generator", "Return a list, or pass each value on with `await context.emit(value)`"
    return FunctionNotRun(
        f"The function returned {kind}, {value.__qualname__}(), and none of its body has run. {remedy}. The job is a dead "
        "letter, and not tried again: redrive it when the code is mended."
    )


def default_name(function: Callable[..., Any]) -> str:
    """
    Return ``module.function``; raises ConfigurationError for a function without a name.

    A module that runs as a script is named as a worker imports it: by its file.
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


def _call_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [show(value) for value in args] + [f"{key}={show(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(given)})"


def in_loop(
    definition: TaskDefinition, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
) -> ConfigurationError:
    """Return the error for an enqueue that would block a running event loop; *frame* is where it was called."""
    name = getattr(definition.function, "__name__", definition.name)
    where = f"{frame.f_code.co_filename.replace(chr(92), '/').rpartition('/')[2]}:{frame.f_lineno}"
    return ConfigurationError(
        f"{name}.enqueue() called while an event loop is running in this thread "
        f"(from {where} in {frame.f_code.co_name}).\n"
        f"    Write:  await {_call_text(f'{name}.aenqueue', args, kwargs)}"
        "          It would have blocked everything else on this loop for one round trip. Nothing was enqueued.",
        code="E06",
    )
