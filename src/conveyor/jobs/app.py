"""The app: a program's tasks, queues and hooks on one Redis."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from importlib import import_module
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Never,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    Unpack,
    cast,
    get_args,
    overload,
)

from conveyor import ids
from conveyor.acting import acting_as
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.jobs.batch_task import BatchDecorator, batch_plan
from conveyor.jobs.bulk import ChunkSender, add_count, bulk_bar, chunks, planned
from conveyor.jobs.core import AppCore
from conveyor.jobs.decorator import TaskDecorator, external_task, named_task, register, task_options
from conveyor.jobs.dependencies import overriding
from conveyor.jobs.hints import APP_OPTIONS, TASK_OPTIONS, refuse_unknown
from conveyor.jobs.hooks import Lifespan
from conveyor.jobs.include import check_include
from conveyor.jobs.job import Job, awatch_jobs, refuse_in_loop, watch_jobs
from conveyor.jobs.registry import UpcastMessage
from conveyor.jobs.schedule import make_timing
from conveyor.jobs.schedules import Schedules, declare
from conveyor.jobs.task import AsyncTask, Logs, RunIn, SyncTask, Task, TaskCall, Upcast
from conveyor.messaging.limit_control import GroupControl, LimitControl
from conveyor.messaging.push_options import push_scope
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import MAX_PAYLOAD, payload_limit, show
from conveyor.payload.formats import FormatChoice, make_registry
from conveyor.payload.pipeline import LARGE_ABOVE, MAX_LARGE, make_pipeline
from conveyor.payload.redaction import check_names
from conveyor.store import limits
from conveyor.store.client.client import Client
from conveyor.store.max_length import Full
from conveyor.store.transport.credentials import CredentialProvider, Credentials, LoginProvider
from conveyor.units import Duration, Size, positive_ms

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.events import Event, JobEvent, JobUpdate
    from conveyor.jobs.decorator import CronDecorator
    from conveyor.jobs.job_selection import CancelledJobs, JobSelection
    from conveyor.jobs.queue_events import EventReader
    from conveyor.jobs.registry import QueueNames, QueuesOf
    from conveyor.jobs.schedule import Missed, Overlap
    from conveyor.jobs.uniqueness import Debounce, Throttle, Unique
    from conveyor.jobs.webhooks import Webhook
    from conveyor.messaging.limits import Concurrency, Rate
    from conveyor.messaging.message import Message, OnError
    from conveyor.messaging.plain_list import PlainList
    from conveyor.messaging.queue import Queue
    from conveyor.messaging.topic import Topic, TopicInfo
    from conveyor.payload.blobs import BlobStore
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.client.buffer import Buffer
    from conveyor.store.client.durability import DurabilityOptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E", bound="Event")
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M")
L = TypeVar("L", bound=Lifespan)
BlockingInLoop = Literal["refuse", "allow"]


class AppWorker(Protocol):
    """The worker of ``async with app.worker() as worker:``."""

    async def wait(self) -> None:
        """Wait until the worker ends by itself, which it does with `burst` when everything is drained."""
        ...

    def stop(self) -> None:
        """Stop before the block ends. The first call drains, the second hands everything back at once."""
        ...


class Conveyor:
    """
    One program's queues and tasks on one Redis.

    Nothing is opened before it is needed. `with app:` and `async with app:` close it at the end; a closed app opens
    itself again when it is used.
    """

    sealing: PayloadPipeline | None
    """The sealing, compression and store of payloads; None when there is none."""
    tasks: Mapping[str, Task[..., Any]]
    """The tasks by their names."""
    limits: LimitControl
    """The limits of queues and tasks while programs run: `set`, `list`, `reset`."""
    groups: GroupControl
    """The groups of queues while programs run: weight and pause."""

    def __init__(
        self, url: str | None = None, *, namespace: str = "conveyor", lease: Duration = "15s",
        keys: Mapping[str, str | bytes] | None = None, encrypt: bool = False, max_payload: Size = MAX_PAYLOAD,
        compress: Size | None = None, large: BlobStore | None = None, large_above: Size = LARGE_ABOVE,
        max_large: Size = MAX_LARGE, format: FormatChoice | Sequence[FormatChoice] = "json",  # noqa: A002
        buffer: Buffer | None = None, include: Sequence[str] = (), timeout: Duration | None = None,
        blocking_in_loop: BlockingInLoop = "refuse", credentials: Credentials | CredentialProvider | None = None,
        redact: Iterable[str] = (),
        **unknown: Never,
    ) -> None:  # fmt: skip
        """
        Make the app; raises ConfigurationError.

        Args:
            url: the server. None: ``CONVEYOR_URL``, else the embedded server.
            namespace: the prefix of all keys in Redis.
            lease: how long a worker may be silent before its jobs go to others.
            keys: key id to secret: the first seals payloads, results and errors, all open them. Unsealed ones are set aside.
            encrypt: with `keys`, payloads cannot be read in Redis either.
            max_payload: the limit of one set of arguments, one message or one result; bytes, or ``"256KiB"``, at most 16 MiB.
            compress: the size above which payloads are compressed. None: never.
            large: a store for large arguments and messages.
            large_above: the size above which they go there.
            max_large: the limit of those.
            format: ``"json"``, ``"msgpack"`` or a Format of your own; of several the first is written and all are read.
            buffer: keeps pushes while Redis is away. None: they raise StoreUnavailable.
            include: modules (``"shop.mail"``) or patterns (``"shop.tasks.*"``) that define tasks, for a worker and the
                command line to import; a program that enqueues imports what it needs.
            timeout: the longest a call may take, connecting and repeating included, before StoreUnavailable. None: 5 s.
            blocking_in_loop: ``"refuse"``: a blocking method raises E06 where an event loop runs; ``"allow"``: it blocks it.
            credentials: a function that returns a password, or (user, password), asked at each connection; or a CredentialProvider
                of redis-py. None: those of the URL.
            redact: fields of arguments, messages, headers, notes and results that no page, command or log shows: a name at any
                depth (``"password"``), or the end of a path (``"*.token"``).
            **unknown: none: a name that another library has is refused with what to write here.

        """
        if unknown:
            refuse_unknown("Conveyor()", unknown, APP_OPTIONS)
        max_payload = payload_limit(max_payload, "max_payload")
        client = make_client(url, namespace, buffer, timeout, blocking_in_loop, credentials)
        client.redaction.add_patterns(check_names(redact, "Conveyor(redact=)"))
        self._core = AppCore(
            client, lease_ms=positive_ms(lease, "lease"), max_payload=max_payload,
            sealing=make_pipeline(
                keys=keys, encrypt=encrypt, compress=compress, large=large, large_above=large_above,
                max_large=max_large, max_payload=max_payload,
            ),
            formats=make_registry(format), include=check_include(include),
            module=sys._getframe(1).f_globals.get("__name__", ""),  # noqa: SLF001  errors name the app by it
        )  # fmt: skip
        self.client, self.namespace = client, namespace
        self.sealing = self._core.sealing
        self.tasks = self._core.tasks
        self.limits = LimitControl(client, self._core.find_limits)
        self.groups = GroupControl(client, self._core.find_groups)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            from conveyor.jobs.hints import APP_MEMBERS, no_member

            raise no_member("Conveyor", name, APP_MEMBERS)

    def __repr__(self) -> str:
        return f"<Conveyor {self.namespace}: {len(self.tasks)} tasks, {len(self._core.queues)} queues>"

    def override(self, function: Callable[..., Any], replacement: Callable[..., Any]) -> AbstractContextManager[None]:
        """
        Have workers of this program call *replacement* where a task has ``Depends(function)``.

        It is in force inside the block: ``with app.override(get_db, fake_db):``. The replacement is a dependency like another,
        and may itself depend on *function*. A task of ``run_in="process"`` is refused while one of its dependencies is
        replaced. Raises ConfigurationError.
        """
        return overriding(self._core.overrides, function, replacement)

    # -- queues ---------------------------------------------------------------------------------------------------

    @overload
    def queue(
        self, name: str, type: type[T], *, partitions: int = 1, lease: Duration | None = None, max_attempts: int | None = None,
        retry: Retry | None = None, max_crashes: int | None = None, max_length: int | None = None, full: Full = "raise",
        limits: Sequence[Rate | Concurrency] | None = None, ageing: Duration | None = None, expires: Duration | None = None,
        events: int | None = None, version: int = 1, upcast: UpcastMessage | None = None,
        format: FormatChoice | None = None, **durability: Unpack[DurabilityOptions],
    ) -> Queue[T]: ...  # fmt: skip
    @overload
    def queue(
        self, name: str, type: Any = ..., *, partitions: int = 1, lease: Duration | None = None, max_attempts: int | None = None,
        retry: Retry | None = None, max_crashes: int | None = None, max_length: int | None = None, full: Full = "raise",
        limits: Sequence[Rate | Concurrency] | None = None, ageing: Duration | None = None, expires: Duration | None = None,
        events: int | None = None, version: int = 1, upcast: UpcastMessage | None = None,
        format: FormatChoice | None = None, **durability: Unpack[DurabilityOptions],
    ) -> Queue[Any]: ...  # fmt: skip

    def queue(
        self, name: str, type: Any = Any, *, partitions: int = 1, lease: Duration | None = None,  # noqa: A002
        max_attempts: int | None = None, retry: Retry | None = None, max_crashes: int | None = None,
        max_length: int | None = None, full: Full = "raise", limits: Sequence[Rate | Concurrency] | None = None,
        ageing: Duration | None = None, expires: Duration | None = None, events: int | None = None, version: int = 1,
        upcast: UpcastMessage | None = None, format: FormatChoice | None = None,  # noqa: A002
        **durability: Unpack[DurabilityOptions],
    ) -> Queue[Any]:  # fmt: skip
        """
        Declare a queue of messages, or set up one that tasks use.

        The same declaration again returns the same object; with other options it raises ConfigurationError.

        Args:
            name: its name.
            type: the type of its messages. Left out: any JSON value.
            partitions: over how many partitions it is spread, which may lie on several nodes: order holds within each, and all
                programs must say the same number.
            lease: as for the app.
            max_attempts: takes the place of the number in `retry` (5).
            retry: when and how often a message that failed is tried again.
            max_crashes: takes the place of the number in `retry` (3). A message is given up when so many of its consumers died
                while they handled it. The first such death is charged to all that the consumer held, so it alone gives up nothing.
            max_length: how many may be unfinished. None: no limit.
            full: what a push beyond that does.
            limits: `Rate` and `Concurrency` that hold for all that starts from it.
            ageing: what waits is raised by one priority each time it has waited that long. None: never.
            expires: the queue goes, with all of its keys and its name, when it is empty and nobody has pushed to it, consumed from
                it or waited for it for so long (at least ten seconds). None: never.
            events: how many events it keeps for `Conveyor.events` (0: none). Left out: as other programs say.
            version: as for a task.
            upcast: ``upcast(version, value)``, as for a task.
            format: as for a task.
            **durability: `fsync` and `wait_replicas` make each push, of jobs too, wait until it is on disk and until that many
                replicas have it, each for `wait_timeout`; after that comes DurabilityNotReached.

        """
        return self._core.declare_queue(
            name, type, partitions=partitions, lease=lease, max_attempts=max_attempts, retry=retry,
            max_crashes=max_crashes, max_length=max_length, full=full, limits=limits,
            ageing=ageing, expires=expires, events=events, version=version, upcast=upcast, format=format, **durability,
        )  # fmt: skip

    @overload
    def plain_list(
        self, name: str, task: Task[..., Any] | str | None = None, *, type: type[T], lease: Duration | None = None,
        max_attempts: int = 5, sealed: bool = True,
    ) -> PlainList[T]: ...  # fmt: skip
    @overload
    def plain_list(
        self, name: str, task: Task[..., Any] | str | None = None, *, type: Any = ..., lease: Duration | None = None,
        max_attempts: int = 5, sealed: bool = True,
    ) -> PlainList[Any]: ...  # fmt: skip

    def plain_list(
        self,
        name: str,
        task: Task[..., Any] | str | None = None,
        *,
        type: Any = Any,  # noqa: A002  the contract's name
        lease: Duration | None = None,
        max_attempts: int = 5,
        sealed: bool = True,
    ) -> PlainList[Any]:
        """
        Declare a plain Redis list of JSON documents, shared with programs that know nothing of Conveyor.

        With *task* its entries run as jobs of that task; without one they are consumed, as *type* (any JSON value when
        left out). The rest is as in `queue`. Other programs cannot seal, so an
        app with keys refuses a plain list without ``sealed=False``.
        """
        task_name = task.name if isinstance(task, Task) else task
        if task_name is not None and not isinstance(task_name, str):
            raise ConfigurationError(
                f"app.plain_list({name!r}, …) takes a task or the name of one, not {show(task)}. The type of the entries "
                "of a list that is consumed goes by name: type=…"
            )
        return self._core.declare_plain_list(
            name, type, task=task_name, lease=lease, max_attempts=max_attempts, sealed=sealed
        )

    @overload
    def topic(
        self, name: str, type: type[T], *, version: int = 1, format: FormatChoice | None = None
    ) -> Topic[T]: ...  # fmt: skip
    @overload
    def topic(
        self, name: str, type: Any = ..., *, version: int = 1, format: FormatChoice | None = None
    ) -> Topic[Any]: ...  # fmt: skip

    def topic(
        self,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        version: int = 1,
        format: FormatChoice | None = None,  # noqa: A002
    ) -> Topic[Any]:
        """
        Return a topic: a message published to it reaches every queue that subscribes.

        *name* is words with points between them, ``"user.created"``. A pattern such as ``"user.*"`` is for subscriptions: `*`
        stands for one word, `#` at the end for any number of words, also none. *type*, `version` and `format` say how messages
        are written, as for a queue. Nothing is sent. Raises ConfigurationError.
        """
        return self._core.topics.make(name, type, version=version, format=format)

    def topics(self) -> list[TopicInfo]:
        """Return every name that queues subscribe to and every topic that was published to, with its counts, sorted."""
        return self._core.topics.read_all()

    async def atopics(self) -> list[TopicInfo]:
        """Awaitable form of `topics`."""
        return await self._core.topics.aread_all()

    @overload
    def pull(self, queues: QueuesOf[T], n: int = 1, wait: Duration = 0, *, renew: bool = False) -> list[Message[T]]: ...
    @overload
    def pull(
        self, queues: QueueNames, n: int = 1, wait: Duration = 0, *, renew: bool = False
    ) -> list[Message[Any]]: ...
    def pull(self, queues: QueueNames, n: int = 1, wait: Duration = 0, *, renew: bool = False) -> list[Message[Any]]:
        """
        Return up to *n* messages of several queues as soon as there is one, or none after *wait*.

        *queues* are names or queues: a list, or a map to weights. Where several have messages, each gives its share of
        *n* by its weight, over several calls too; what one does not have, the others give. The messages come in the order
        in which they were pushed or came due, those of a queue in its own order. A queue that is not declared here holds
        any value. The rest is as in `Queue.pull`.
        """
        return self._core.select(queues, "app.pull()").pull(n, wait, renew=renew)

    @overload
    async def apull(
        self, queues: QueuesOf[T], n: int = 1, wait: Duration = 0, *, renew: bool = False
    ) -> list[Message[T]]: ...
    @overload
    async def apull(
        self, queues: QueueNames, n: int = 1, wait: Duration = 0, *, renew: bool = False
    ) -> list[Message[Any]]: ...
    async def apull(
        self, queues: QueueNames, n: int = 1, wait: Duration = 0, *, renew: bool = False
    ) -> list[Message[Any]]:
        """Awaitable form of `pull`."""
        return await self._core.select(queues, "app.apull()").apull(n, wait, renew=renew)

    @overload
    def consume(
        self, queues: QueuesOf[T], prefetch: int = 1, *, on_error: OnError = "log"
    ) -> Generator[Message[T], None, None]: ...
    @overload
    def consume(
        self, queues: QueueNames, prefetch: int = 1, *, on_error: OnError = "log"
    ) -> Generator[Message[Any], None, None]: ...
    def consume(
        self, queues: QueueNames, prefetch: int = 1, *, on_error: OnError = "log"
    ) -> Generator[Message[Any], None, None]:
        """
        Yield messages of several queues without end, each as soon as there is one.

        *queues* are names or queues: a list, or a map to weights, by which they have their turns where several have
        messages. The rest is as in `Queue.consume`.
        """
        return self._core.select(queues, "app.consume()").consume(prefetch, on_error=on_error)

    @overload
    def aconsume(
        self, queues: QueuesOf[T], prefetch: int = 1, *, on_error: OnError = "log"
    ) -> AsyncGenerator[Message[T], None]: ...
    @overload
    def aconsume(
        self, queues: QueueNames, prefetch: int = 1, *, on_error: OnError = "log"
    ) -> AsyncGenerator[Message[Any], None]: ...
    def aconsume(
        self, queues: QueueNames, prefetch: int = 1, *, on_error: OnError = "log"
    ) -> AsyncGenerator[Message[Any], None]:
        """Awaitable form of `consume`."""
        return self._core.select(queues, "app.aconsume()").aconsume(prefetch, on_error=on_error)

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
        debounce: Debounce | None = None, throttle: Throttle | None = None, version: int = 1, upcast: Upcast | None = None,
        format: FormatChoice | None = None, tags: Iterable[str] | None = None, requires: str | Iterable[str] = (),
        pin: Literal["build"] | None = None, logs: Logs = "failure",
        webhook: Webhook | None = None, timeout_hard: Duration | None = None, fresh: bool = False,
        sensitive: Iterable[str] = (),
    ) -> TaskDecorator: ...  # fmt: skip

    def task(
        self, function: Callable[..., Any] | None = None, /, *, name: str | None = None, queue: str = "default",
        timeout: Duration | None = None, retry: Retry | int | None = None, keep_result: Duration = "10m",
        run_in: RunIn | None = None, ack: Literal["late", "early"] = "late", expires: Duration | None = None,
        priority: int = 0, max_payload: Size | None = None, unique: Unique | None = None,
        limits: Sequence[Rate | Concurrency] | None = None, group_by: str | None = None,
        debounce: Debounce | None = None, throttle: Throttle | None = None, version: int = 1, upcast: Upcast | None = None,
        format: FormatChoice | None = None, tags: Iterable[str] | None = None,  # noqa: A002
        requires: str | Iterable[str] = (), pin: Literal["build"] | None = None, webhook: Webhook | None = None,
        logs: Logs = "failure", timeout_hard: Duration | None = None, fresh: bool = False, sensitive: Iterable[str] = (),
        **unknown: object,
    ) -> Any:  # fmt: skip
        """
        Register a function as a task; used bare (``@app.task``) or with options. Raises ConfigurationError.

        Args:
            function: the function, when used bare.
            name: the name of the task. None: the module and the name of the function.
            queue: where its jobs go.
            timeout: the time limit of one attempt. None: no limit.
            retry: a policy, or a number of attempts.
            keep_result: how long the result stays; 0: not at all.
            run_in: ``"loop"``, ``"thread"`` or ``"process"``. None: the loop for an `async def`, a thread for a `def`.
            ack: ``"early"`` gives up the promise to run again after a crash.
            expires: cancels a job that has not started by then. None: never.
            priority: that of its jobs, 0 to 9, higher first.
            max_payload: the limit of its arguments, and of its result. None: as the app says.
            unique: one job at a time for equal arguments.
            limits: how many of its jobs may start in a time, or run at a time.
            group_by: an argument: jobs that are equal in it run in their order, one at a time.
            debounce: equal calls run once, some time after the last of them.
            throttle: after a call, equal ones are not accepted for some time.
            version: the version of the payload's layout.
            upcast: ``upcast(version, arguments)`` turns the arguments of that version into those of the next.
            format: how arguments and results are written. None: as the app says.
            tags: those of each of its jobs, besides a job's own.
            requires: labels of the workers that run it.
            pin: ``"build"`` keeps a job to workers of the build that enqueued it.
            webhook: told how its jobs end.
            logs: which lines that jobs log are kept.
            timeout_hard: with ``run_in="process"``, kills a process that runs for so long. None: never.
            fresh: with ``run_in="process"``, each job has a process of its own.
            sensitive: arguments that nobody is shown, and ``"return"`` for the result.
            **unknown: none: a name that another library has is refused with what to write here.

        """
        if unknown:
            refuse_unknown("@app.task()", unknown, TASK_OPTIONS)
        options = task_options(
            timeout=timeout, retry=retry, keep_result=keep_result, ack=ack, expires=expires, priority=priority,
            version=version, upcast=upcast, tags=tags, limits=limits, group_by=group_by, requires=requires, pin=pin,
            webhook=webhook, logs=logs, timeout_hard=timeout_hard, fresh=fresh, sensitive=sensitive,
        )  # fmt: skip
        uniqueness, where = (unique, debounce, throttle), ids.queue_name(queue)

        def add(function: Callable[..., Any]) -> Task[..., Any]:
            return register(self._core, function, name, where, run_in, options, max_payload, format, None, uniqueness)

        return add if function is None else add(function)

    def batch_task(
        self, *, size: int, within: Duration, group_by: str | None = None, name: str | None = None, queue: str = "default",
        timeout: Duration | None = None, retry: Retry | int | None = None, keep_result: Duration = "10m",
        run_in: RunIn | None = None, ack: Literal["late", "early"] = "late", expires: Duration | None = None,
        priority: int = 0, max_payload: Size | None = None, unique: Unique | None = None,
        debounce: Debounce | None = None, throttle: Throttle | None = None, version: int = 1, upcast: Upcast | None = None,
        format: FormatChoice | None = None, tags: Iterable[str] | None = None,  # noqa: A002
        limits: Sequence[Rate | Concurrency] | None = None, requires: str | Iterable[str] = (),
        pin: Literal["build"] | None = None, logs: Logs = "failure", sensitive: Iterable[str] = (),
        **unknown: object,
    ) -> BatchDecorator:  # fmt: skip
        """
        Register a function that takes a list as a task whose jobs are enqueued one by one: ``index.enqueue(row)``.

        A worker runs *size* of them in one call, or fewer as soon as *within* has passed since the first of them came.
        `group_by` names a field of the items (``"customer.id"``: a field of a field): a batch holds items that are equal in
        it. The function returns a list with one result per item, or None; it raises `BatchFailed` when only some items
        failed, and any other error for all of them. Each item has its own attempts and its own result. `timeout` limits one
        call of the function, `limits` count items, and `unique`, `debounce` and `throttle` compare them (``by="row.id"``,
        a field of the item); the other options are those of `task`. Raises ConfigurationError.
        """
        if unknown:
            refuse_unknown("@app.batch_task()", unknown, TASK_OPTIONS)
        plan = batch_plan(size, within, group_by)
        options = task_options(
            timeout=timeout, retry=retry, keep_result=keep_result, ack=ack, expires=expires, priority=priority,
            version=version, upcast=upcast, tags=tags, limits=limits, requires=requires, pin=pin,
            logs=logs, sensitive=sensitive,
        )  # fmt: skip

        def add(function: Callable[..., Any]) -> Any:
            return register(
                self._core, function, name, ids.queue_name(queue), run_in, options, max_payload, format, plan,
                uniqueness=(unique, debounce, throttle),
            )  # fmt: skip

        return add

    def cron(
        self, expression: str | None = None, /, *, every: Duration | None = None, tz: str | None = None, overlap: Overlap = "skip",
        missed: Missed = "one", jitter: Duration | None = None, name: str | None = None, queue: str = "default",
    ) -> CronDecorator:  # fmt: skip
        """
        Enqueue a task at each instant of a cron expression or an interval: ``@app.cron("0 9 * * mon-fri", tz="Europe/Berlin")``.

        It decorates a function, which becomes a task of *name* and *queue*, or a task that `app.task` has made. The task takes no
        arguments, and its name is that of the schedule. A worker stores the schedule when it starts. The other options are
        those of `app.schedules.put`. Raises ConfigurationError.
        """
        timing = make_timing(expression, tz=tz, every=every)

        def add(function: Callable[..., Any] | Task[..., Any]) -> Task[..., Any]:
            if isinstance(function, Task):
                task = function
            else:
                task = self.task(name=name, queue=queue)(function)
            declare(self._core, task, timing, overlap, missed, jitter)
            return task

        return cast("CronDecorator", add)

    @property
    def schedules(self) -> Schedules:
        """The schedules of the namespace: stored, read, paused and deleted here."""
        return Schedules(self._core)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def enqueue_many(
        self,
        calls: Iterable[TaskCall[R]],
        *,
        spread: Duration | None = None,
        jitter: Duration | None = None,
        tags: Iterable[str] | None = None,
        bar: bool = False,
    ) -> list[Job[R]]:
        """
        Enqueue many calls (``task.s(…)``) in a few round trips, each queue's in their order; return their handles.

        *spread* distributes their starts evenly over that time from now, and *jitter* puts each off by up to that; both add
        to what a call has of `delay` or `at`, and a generator is taken whole first. *tags* are those of all these jobs, besides
        those of a call. *bar* draws on a terminal (standard error) how
        many are stored. Each thousand for a queue is accepted
        whole or not at all. A call that does not fit raises PayloadError. Of a list nothing is stored then; of a generator
        nothing is stored from that thousand on.
        """
        refuse_in_loop(self.client, "app.enqueue_many()", "await app.aenqueue_many(…)")
        sender = ChunkSender()
        try:
            with push_scope(self._core.push_middlewares, many=True), sender, bulk_bar(calls, wanted=bar) as show:
                for chunk in chunks(self._core, planned(calls, spread, jitter, tags)):
                    sender.send(chunk)
                    show(len(sender.jobs))
        except ConveyorError as error:
            add_count(error, len(sender.jobs))
            raise
        return sender.jobs

    async def aenqueue_many(
        self,
        calls: Iterable[TaskCall[R]],
        *,
        spread: Duration | None = None,
        jitter: Duration | None = None,
        tags: Iterable[str] | None = None,
        bar: bool = False,
    ) -> list[Job[R]]:
        """Awaitable form of `enqueue_many`."""
        jobs: list[Job[R]] = []
        stored = self.sealing is not None and self.sealing.store is not None
        prepared = chunks(self._core, planned(calls, spread, jitter, tags))
        try:
            # Large bodies are written while a chunk is prepared, which would block the loop.
            with push_scope(self._core.push_middlewares, many=True), bulk_bar(calls, wanted=bar) as show:
                while chunk := await asyncio.to_thread(next, prepared, None) if stored else next(prepared, None):
                    await chunk.apush()
                    jobs += chunk.jobs
                    show(len(jobs))
        except ConveyorError as error:
            add_count(error, len(jobs))
            raise
        return jobs

    def watch(
        self, jobs: Iterable[Job[Any] | str], after: Mapping[str, str] | None = None
    ) -> Generator[JobUpdate, None, None]:
        """
        Yield what happens to *jobs* (handles or ids), as `Job.watch` does for one, until all have ended.

        *after*: the id of the last update that was seen of each, by the id of the job. A program has one subscription for all
        jobs that it watches, however many watch them.
        """
        refuse_in_loop(self.client, "app.watch()", "async for update in app.awatch(…)")
        return watch_jobs(self._core, self._handles(jobs), after)

    def awatch(
        self, jobs: Iterable[Job[Any] | str], after: Mapping[str, str] | None = None
    ) -> AsyncGenerator[JobUpdate, None]:
        """Awaitable form of `watch`."""
        return awatch_jobs(self._core, self._handles(jobs), after)

    def _handles(self, jobs: Iterable[Job[Any] | str]) -> list[Job[Any]]:
        if isinstance(jobs, str | Job) or not isinstance(jobs, Iterable):
            raise ConfigurationError(f"app.watch() takes several jobs, or their ids, such as [job], not {show(jobs)}.")
        return [one if isinstance(one, Job) else self.job(one) for one in jobs]

    def events(self, queue: str | Queue[Any], after: str | None = None) -> Generator[JobEvent, None, None]:
        """
        Yield what happens to the jobs and messages of a queue without end, each as soon as it is there.

        The queue keeps events when it is declared with ``app.queue(name, events=10_000)``: the newest so many, for a week after
        the last. *after*: the `id` of an event, to go on behind it; None: all that are kept, then those that come; ``"now"``: only
        those that come. Where events behind *after* are not kept any more, an `EventsMissed` comes first. An outage of Redis is
        waited for. Raises ConfigurationError, also for a queue that keeps none.
        """
        refuse_in_loop(self.client, "app.events()", "async for event in app.aevents(…)")
        return self._event_reader(queue, after).read()

    def aevents(self, queue: str | Queue[Any], after: str | None = None) -> AsyncGenerator[JobEvent, None]:
        """Awaitable form of `events`."""
        return self._event_reader(queue, after).aread()

    def _event_reader(self, queue: str | Queue[Any], after: str | None) -> EventReader:
        from conveyor.jobs.queue_events import EventReader  # an app that reads no events never loads it

        return EventReader(self._core, ids.name_of(queue), after)

    def external_task(self, name: str, *, queue: str = "default") -> Task[..., Any]:
        """
        Return a task whose function lives in another program, to enqueue its jobs from here.

        The worker checks the arguments, since the signature is not known here: a call that does not fit becomes a dead
        letter. A task that is registered here is returned itself. Raises ConfigurationError.
        """
        return external_task(self._core, name, ids.queue_name(queue))

    def enqueue(self, name: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """
        Enqueue a job of the task of that name; raises what `Task.enqueue` does.

        A name that is not registered here is taken as that of an external task, on the queue of its `external_task`,
        else on ``default``.
        """
        task = named_task(self._core, name)
        refuse_in_loop(self.client, "app.enqueue()", f"await app.aenqueue({name!r}, …)")
        return task.enqueue(*args, **kwargs)

    async def aenqueue(self, name: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Awaitable form of `enqueue`."""
        return await named_task(self._core, name).aenqueue(*args, **kwargs)

    def job(self, id: str) -> Job[Any]:  # noqa: A002  the contract's name
        """
        Return a handle from a public id; nothing is sent.

        An id of the caller's own is looked for in all known queues when the handle is used. JobNotFound is raised then
        when no queue has it. The handle of `Task.job` has a typed result.
        """
        queue, bare = ids.split(id)
        return Job(self._core, bare, queue)

    # -- jobs chosen by a filter ----------------------------------------------------------------------------------

    def jobs(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> Iterator[Job[Any]]:  # fmt: skip
        """
        Yield handles of the jobs and messages that Redis keeps and that all the options given choose.

        They come in the order of their ids with a tag, the oldest first when they are dead or scheduled, else in no order. Redis
        looks at them in steps of a few milliseconds, with a tag at those alone that have it. What is there throughout is found;
        what comes or goes meanwhile may be. Raises ConfigurationError.

        Args:
            tag: one of theirs.
            state: scheduled, ready, waiting, leased or dead.
            task: the name of their task.
            error: a text that their last error, as "class: message", holds.
            older: an instant, or how long ago: their state began before. They died or were leased then, else were enqueued.
            since: an instant, or how long ago: their state began since.
            queue: the queue, or its name.

        """
        refuse_in_loop(self.client, "app.jobs()", "async for job in app.ajobs(…)")
        return self._select(tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue).find()

    def ajobs(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> AsyncIterator[Job[Any]]:  # fmt: skip
        """Awaitable form of `jobs`."""
        return self._select(tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue).afind()

    def count_jobs(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> int:  # fmt: skip
        """Count the jobs that `jobs` yields; with a tag alone in one command a queue."""
        refuse_in_loop(self.client, "app.count_jobs()", "await app.acount_jobs(…)")
        return self._select(tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue).count()

    async def acount_jobs(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> int:  # fmt: skip
        """Awaitable form of `count_jobs`."""
        return await self._select(
            tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue
        ).acount()

    def cancel(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> CancelledJobs:  # fmt: skip
        """
        Cancel the jobs that `jobs` yields and that have not ended; return how many.

        Redis chooses and cancels them, as `Job.cancel` does one. Of those that a worker holds, `asked` of the number returned,
        the worker is asked. Raises ConfigurationError, also without any option.
        """
        refuse_in_loop(self.client, "app.cancel()", "await app.acancel(…)")
        chosen = self._select(tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue)
        return chosen.refuse_everything().cancel()

    async def acancel(
        self, *, tag: str | None = None, state: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None,
        queue: str | Queue[Any] | None = None,
    ) -> CancelledJobs:  # fmt: skip
        """Awaitable form of `cancel`."""
        chosen = self._select(tag=tag, state=state, task=task, error=error, older=older, since=since, queue=queue)
        return await chosen.refuse_everything().acancel()

    def redrive(
        self, queue: str | Queue[Any], *, tag: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None, rate: str | None = None,
        limit: int | None = None,
    ) -> int:  # fmt: skip
        """
        Put dead letters of a queue back, the oldest first, with all their attempts; return how many.

        The options choose as those of `jobs` do. `rate` (``"100/s"``) spreads them evenly, so that the queue is not flooded.
        A call that is interrupted leaves done what it has done, and the next one goes on. Raises ConfigurationError.
        """
        refuse_in_loop(self.client, "app.redrive()", "await app.aredrive(…)")
        chosen = self._select(tag=tag, task=task, error=error, older=older, since=since, queue=queue)
        return chosen.redrive(rate, limit)

    async def aredrive(
        self, queue: str | Queue[Any], *, tag: str | None = None, task: str | None = None, error: str | None = None,
        older: datetime | Duration | None = None, since: datetime | Duration | None = None, rate: str | None = None,
        limit: int | None = None,
    ) -> int:  # fmt: skip
        """Awaitable form of `redrive`."""
        chosen = self._select(tag=tag, task=task, error=error, older=older, since=since, queue=queue)
        return await chosen.aredrive(rate, limit)

    def _select(self, **options: Any) -> JobSelection:
        # An app that only enqueues never loads it.
        from conveyor.jobs.job_selection import select

        return select(self._core, **options)

    def acting_as(self, name: str) -> AbstractContextManager[None]:
        """
        Name who cancels, redrives or updates jobs inside the block: ``with app.acting_as("ada@example.com"):``.

        The name stands in the histories of the jobs and in the events of queues; without it the program does, as ``host:pid``. It
        holds in this thread or task alone. Raises ConfigurationError.
        """
        return acting_as(name)

    def pause_task(self, task: Task[..., Any] | str, *, queue: str | None = None) -> None:
        """
        Have jobs of a task wait, in all queues that exist (None) or in one, until `resume_task`; other jobs go on.

        They hold no place in a worker and use no attempt, and keep their order. Jobs that a worker has leased already, those that
        it runs and the few that it runs next, are not affected. Enqueueing goes on. Every worker obeys from its next lease on,
        and workers and servers that are started again, too.
        """
        refuse_in_loop(self.client, "app.pause_task()", "await app.apause_task(…)")
        self._pause_task(task, queue, paused=True)

    def resume_task(self, task: Task[..., Any] | str, *, queue: str | None = None) -> None:
        """End a pause: the jobs that waited go first, in their order."""
        refuse_in_loop(self.client, "app.resume_task()", "await app.aresume_task(…)")
        self._pause_task(task, queue, paused=False)

    def _pause_task(self, task: Task[..., Any] | str, queue: str | None, *, paused: bool) -> None:
        name = _task_name(task, queue)
        for keys in self._core.places_of(self.client.queues(), name, queue):
            self.client.run(limits.pause_task(keys, name, paused=paused))

    async def apause_task(self, task: Task[..., Any] | str, *, queue: str | None = None) -> None:
        """Awaitable form of `pause_task`."""
        await self._apause_task(task, queue, paused=True)

    async def aresume_task(self, task: Task[..., Any] | str, *, queue: str | None = None) -> None:
        """Awaitable form of `resume_task`."""
        await self._apause_task(task, queue, paused=False)

    async def _apause_task(self, task: Task[..., Any] | str, queue: str | None, *, paused: bool) -> None:
        name = _task_name(task, queue)
        for keys in self._core.places_of(await self.client.aqueues(), name, queue):
            await self.client.arun(limits.pause_task(keys, name, paused=paused))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def middleware(self, source: M, /) -> M:
        """
        Add a middleware: a class (which is instantiated), an instance, or ``async def name(context, call_next)``.

        The first one added is the outermost. Usable as a decorator; raises ConfigurationError.
        """
        self._core.add_middleware(source)
        return source

    def lifespan(self, function: L, /) -> L:
        """
        Add resources that are opened before a worker's first job and closed after its last.

        *function* is an async generator function that yields once, or a function that returns an async context manager.
        The mapping it yields (or None) is part of `context.state`.
        """
        self._core.add_lifespan(function)
        return function

    @overload
    def on(self, kind: type[E], /) -> Callable[[F], F]: ...
    @overload
    def on(self, kind: str, /) -> Callable[[F], F]: ...
    @overload
    def on(self, kind: type[E], listener: Callable[[E], Any], /) -> None: ...
    @overload
    def on(self, kind: str, listener: Callable[[Any], Any], /) -> None: ...

    def on(self, kind: type[Any] | str, listener: Callable[[Any], Any] | None = None, /) -> Any:
        """
        Call *listener*, a `def` or an `async def`, with every event of a kind: ``"dead"``, or ``JobDead``.

        Without *listener* it is a decorator. A class above several kinds, such as `JobEvent`, stands for all of them.
        An exception in a listener is logged and disturbs nothing else.
        """
        if listener is not None and not callable(listener):
            raise ConfigurationError(f"app.on takes a function that is called with the event, not {show(listener)}.")
        add = self._core.listen(kind)

        def decorate(function: F) -> F:
            add(function)
            return function

        return decorate if listener is None else add(listener)

    # -- running --------------------------------------------------------------------------------------------------

    def worker(
        self,
        *,
        queues: QueueNames | None = None,
        concurrency: int = 100,
        threads: int = 8,
        burst: bool = False,
        grace: Duration = "30s",
        allow_eviction: bool = False,
        labels: str | Iterable[str] = (),
    ) -> AbstractAsyncContextManager[AppWorker]:
        """
        Return a worker for `async with`, which runs jobs inside this program until the block ends.

        `queues` are names or queues: a list, or a map to weights (None: the queues of all tasks). `concurrency` limits the
        jobs on the loop, `threads` those on threads. `burst` stops the worker when the queues are drained. `grace` is the time that
        running jobs get at the end. A server that may delete jobs when its memory is full is refused (E10), unless
        `allow_eviction`. `labels`: those that tasks may require of a worker.
        """
        # By name: the package stands above this one, and an app that only enqueues never loads it.
        made = import_module("conveyor.worker.embedded").EmbeddedWorker(
            self, queues=queues, concurrency=concurrency, threads=threads, burst=burst, grace=grace,
            allow_eviction=allow_eviction, labels=labels,
        )  # fmt: skip
        return cast("AbstractAsyncContextManager[AppWorker]", made)

    def ping(self, timeout: Duration | None = None) -> float:
        """
        Return the seconds until Redis has answered, with connecting where that is needed.

        Raises StoreUnavailable when nobody answers within *timeout* (None: that of the app), and ConfigurationError when
        the server refuses the login. In a cluster any node may answer.
        """
        return self.client.ping(None if timeout is None else positive_ms(timeout, "timeout") / 1000)

    async def aping(self, timeout: Duration | None = None) -> float:  # noqa: ASYNC109  the twin of ping
        """Awaitable form of `ping`."""
        return await self.client.aping(None if timeout is None else positive_ms(timeout, "timeout") / 1000)

    def close(self) -> None:
        """Close the connections of this process and leave the embedded server; a later use opens them again."""
        self._core.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, then the rest."""
        await self._core.aclose()

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


def make_client(
    url: str | None,
    namespace: str,
    buffer: Buffer | None,
    timeout: Duration | None = None,
    blocking_in_loop: BlockingInLoop = "refuse",
    credentials: Credentials | CredentialProvider | None = None,
) -> Client:
    """
    Return the client of an app: with a buffer, or without (None).

    Nothing is opened, unless an earlier process left pushes in the buffer. Raises ConfigurationError.
    """
    if url is not None and not isinstance(url, str):
        raise ConfigurationError(f"The URL must be text such as 'redis://host:6379/0', not {type(url).__name__}.")
    if url == "":
        raise ConfigurationError(
            "The URL is empty. Give one such as 'redis://host:6379/0', or None for CONVEYOR_URL or the embedded server."
        )
    if blocking_in_loop not in get_args(BlockingInLoop):
        raise ConfigurationError(f"blocking_in_loop must be 'refuse' or 'allow', not {show(blocking_in_loop)}.")
    options: dict[str, Any] = {
        "namespace": namespace,
        "timeout": None if timeout is None else positive_ms(timeout, "timeout") / 1000,
        "allow_in_loop": blocking_in_loop == "allow",
        "login": None if credentials is None else LoginProvider(credentials),
    }
    if buffer is None:
        return Client(url, **options)
    from conveyor.store.client.buffer import Buffer
    from conveyor.store.client.buffered import BufferedClient

    if not isinstance(buffer, Buffer):
        raise ConfigurationError(
            f"Conveyor(buffer=…) takes a Buffer, such as Buffer() or Buffer('spool'), not {type(buffer).__name__}."
        )
    return BufferedClient(url, buffer=buffer, **options)


def _task_name(task: Task[..., Any] | str, queue: str | None) -> str:
    """Return the name of a task, given itself or by name; raises ConfigurationError for what is none, or no queue."""
    if queue is not None:
        ids.queue_name(queue)
    return task.name if isinstance(task, Task) else ids.queue_name(task, what="task")
