"""Registering a function as a task: the options of `@app.task`, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.jobs import webhooks
from conveyor.jobs.batch_task import BatchTask, item_function
from conveyor.jobs.context import current
from conveyor.jobs.core import AppCore
from conveyor.jobs.job_options import check_priority
from conveyor.jobs.task import (
    AsyncTask,
    BatchPlan,
    Logs,
    RunIn,
    SyncTask,
    Task,
    TaskDefinition,
    TaskOptions,
    Upcast,
    default_name,
    is_async,
)
from conveyor.jobs.uniqueness import DeclaredUniqueness
from conveyor.jobs.webhooks import Webhook
from conveyor.messaging.limits import Concurrency, Rate, check_path
from conveyor.messaging.retry import Retry
from conveyor.payload.codec import payload_limit
from conveyor.payload.formats import FormatChoice
from conveyor.payload.redaction import RESULT, Redaction, check_names
from conveyor.payload.versions import check_version
from conveyor.units import Duration, Size, milliseconds, positive_ms

P = ParamSpec("P")
R = TypeVar("R")


class TaskDecorator(Protocol):
    """The decorator that `@app.task(…)` with options returns."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


class CronDecorator(Protocol):
    """The decorator that `@app.cron(…)` returns."""

    @overload
    def __call__(self, task: AsyncTask[P, R], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, task: SyncTask[P, R], /) -> SyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


def task_options(
    *,
    timeout: Duration | None,
    retry: Retry | int | None,
    keep_result: Duration,
    ack: Literal["late", "early"],
    expires: Duration | None,
    priority: int,
    version: int,
    upcast: Upcast | None,
    tags: Iterable[str] | None,
    limits: Sequence[Rate | Concurrency] | None = None,
    group_by: str | None = None,
    requires: str | Iterable[str] = (),
    pin: Literal["build"] | None = None,
    logs: Logs = "failure",
    webhook: Webhook | None = None,
    timeout_hard: Duration | None = None,
    fresh: bool = False,
    sensitive: Iterable[str] = (),
) -> TaskOptions:
    """Return the options of a task, checked; raises ConfigurationError."""
    check_path("group_by", group_by)
    hard_ms = None if timeout_hard is None else positive_ms(timeout_hard, "timeout_hard")
    if hard_ms is not None and timeout is not None and hard_ms <= positive_ms(timeout, "timeout"):
        raise ConfigurationError("timeout_hard must be longer than timeout, which raises in the function before.")
    return TaskOptions(
        timeout_ms=None if timeout is None else positive_ms(timeout, "timeout"),
        retry=_retry(retry),
        keep_ms=milliseconds(keep_result, name="keep_result"),
        ack=_one_of("ack", ack, ("late", "early")),
        expires_ms=None if expires is None else positive_ms(expires, "expires"),
        priority=check_priority(priority),
        version=check_version(version, upcast, "@app.task"),
        upcast=upcast,
        tags=ids.tag_texts(tags),
        limits=limits,
        group_by=group_by,
        requires=ids.label_texts(requires, "requires"),
        pin=None if pin is None else _one_of("pin", pin, ("build",)),
        webhook=_webhook(webhook, ack),
        logs=_one_of("logs", logs, ("failure", "always", "never")),
        timeout_hard_ms=hard_ms,
        fresh=bool(fresh),
        sensitive=check_names(sensitive, "@app.task(sensitive=)"),
    )


def _webhook(webhook: Webhook | None, ack: str) -> Webhook | None:
    if webhook is not None and not isinstance(webhook, Webhook):
        raise ConfigurationError(
            f'webhook takes a Webhook: webhook=Webhook("https://…", secret="whsec_…"), not {webhook!r}.'
        )
    if webhook is not None and ack == "early":
        raise ConfigurationError('webhook does not go with ack="early": such a job has ended before it runs.')
    return webhook


def register(
    core: AppCore,
    function: Callable[..., Any],
    name: str | None,
    queue: str,
    run_in: RunIn | None,
    options: TaskOptions,
    max_payload: Size | None,
    format: FormatChoice | None,  # noqa: A002
    batch: BatchPlan | None = None,
    uniqueness: DeclaredUniqueness = (None, None, None),
) -> Task[..., Any]:
    """Make *function* a task of the app, or with *batch* a batch task, and return it; raises ConfigurationError."""
    _check_function(function)
    name = ids.queue_name(default_name(function) if name is None else name, what="task")
    known = core.definitions.get(name)
    if known is not None and not _is_redefined(known.function, function):
        raise ConfigurationError(
            f"Two tasks are called {name!r}: {known.function!r} and {function!r}. "
            "Give one another name: @app.task(name='…')."
        )
    awaitable = is_async(function)
    kills = options.fresh or options.timeout_hard_ms is not None  # which only a process can do
    default = "process" if kills else "loop" if awaitable else "thread"
    where: RunIn = _one_of("run_in", run_in or default, ("loop", "thread", "process"))
    if where == "thread" and awaitable:
        raise ConfigurationError(f"{name}: run_in='thread' needs a plain `def`; an `async def` runs on the loop.")
    if where != "process" and kills:
        why = (
            "fresh= is for a task with run_in='process': a coroutine or a thread shares the process of its worker."
            if options.fresh
            else "timeout_hard= is for a task with run_in='process'. Nothing can kill a coroutine or a thread; `timeout` stops "
            "them as far as they let themselves be stopped."
        )
        raise ConfigurationError(f"{name}: {why}")
    limit = None if max_payload is None else payload_limit(max_payload, "@app.task(max_payload=…)")
    definition = TaskDefinition(
        core, function, name=name, queue=queue, run_in=where, options=options,
        max_payload=core.max_whole if limit is None else limit,
        max_result=core.max_payload if limit is None else limit, formats=core.formats.with_writer(format), batch=batch,
        call=None if batch is None else item_function(function, name, batch), uniqueness=uniqueness,
    )  # fmt: skip
    _check_sensitive(definition, uniqueness)
    core.check_limits(definition)
    kind: type[Task[..., Any]] = BatchTask if batch is not None else AsyncTask if awaitable else SyncTask
    task = kind(definition)
    core.definitions[name], core.tasks[name] = definition, task
    core.add_task(name, queue)
    if options.sensitive:
        core.client.redaction.add_sensitive(name, options.sensitive)
        core.client.note_forgotten(core.keys(queue))  # Redis is told before the next job
    if options.webhook is not None:
        _add_delivery(core, queue)
    return task


def _check_function(function: Callable[..., Any]) -> None:
    """Raise ConfigurationError for what no worker can run: another task, a generator, a method that waits for its object."""
    if isinstance(function, Task):
        raise ConfigurationError(
            f"{function!r} is a task already, and @app.task takes a function. Write one decorator; where both are wanted, "
            "@app.cron(…) stands above @app.task(…)."
        )
    if not callable(function):
        raise ConfigurationError(
            f"@app.task takes a function, not {function!r}. Options go by name: @app.task(queue='…')."
        )
    name = getattr(function, "__qualname__", repr(function))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{name}() is a generator: a worker that calls it would run none of its body. Return a list, or pass each value "
            "on with `await context.emit(value)`."
        )
    owner, _, _ = name.rpartition(".")
    if owner and not owner.endswith("<locals>") and inspect.isfunction(function):
        first = next(iter(function.__code__.co_varnames[: function.__code__.co_argcount]), None)
        if first in {"self", "cls"}:
            raise ConfigurationError(
                f"{name}() is a method, and a worker has no object to call it on. Make it a function, or a "
                "@staticmethod that takes what it needs as arguments."
            )


def _check_sensitive(definition: TaskDefinition, uniqueness: DeclaredUniqueness) -> None:
    """
    Raise ConfigurationError for a sensitive name that is no argument, or whose value would be a key.

    Keys of groups, limits and unique jobs are names that people see, in lists of them that hold no arguments.
    """
    options, known = definition.settings, definition.signature.parameters
    redaction = Redaction((), {definition.name: options.sensitive}).joined(definition.core.client.redaction.names)
    for name in options.sensitive:
        if name.partition(".")[0] not in {*known, RESULT} and not set("*?[") & set(name.partition(".")[0]):
            raise ConfigurationError(
                f"{definition.name} has no argument {name!r}, which sensitive= names. It takes: {', '.join(known) or 'none'}; "
                f"{RESULT!r} is its result."
            )
    by = [options.group_by, *(limit.by for limit in options.limits or ())]
    for one in uniqueness:
        named = getattr(one, "by", None)
        by += [named] if isinstance(named, str) else list(named or ())
    for path in filter(None, by):
        if redaction.hides(definition.name, tuple(path.split("."))):
            raise ConfigurationError(
                f"{definition.name}: {path!r} is redacted, and its values would be keys, which people see. Take another argument, "
                "or a digest of it."
            )


def _add_delivery(core: AppCore, queue: str) -> None:
    """Add the internal task that delivers webhooks to an app, once."""
    if webhooks.TASK in core.tasks:
        return

    def deliver(task: str, told: dict[str, Any]) -> int:
        definition = core.definitions.get(task)
        webhook = None if definition is None else definition.settings.webhook
        if webhook is None:  # a worker of an earlier or a later release, perhaps: another one may have it
            raise webhooks.WebhookFailed(f"Task {task!r} has no webhook in this program.")
        return webhooks.send(webhook, current().job_id, told)

    options = TaskOptions(timeout_ms=60_000, retry=webhooks.DELIVERY)
    register(core, deliver, webhooks.TASK, queue, "thread", options, None, None)


def external_task(core: AppCore, name: str, queue: str) -> Task[..., Any]:
    """Return the task of another program, made at the first call; raises ConfigurationError."""
    if ids.queue_name(name, what="task") in core.tasks:
        return core.tasks[name]
    known = core.external_tasks.get(name)
    if known is None:
        definition = TaskDefinition(
            core, _external, name=name, queue=queue, run_in="thread",
            options=TaskOptions(), max_payload=core.max_whole, max_result=core.max_payload,
            formats=core.formats.with_writer("json"),  # any worker reads it, and the worker has the types
        )  # fmt: skip
        known = core.external_tasks[name] = Task(definition)
        core.add_task(name, queue)
    elif known.queue != queue:
        raise ConfigurationError(
            f"external_task({name!r}) is declared twice, with different queues: {known.queue!r} and {queue!r}."
        )
    return known


def named_task(core: AppCore, name: str) -> Task[..., Any]:
    """Return the task of that name: registered here, declared as external, or an external one on ``default``."""
    if isinstance(name, Task):
        written = getattr(name.function, "__name__", name.name)
        raise ConfigurationError(f"app.enqueue() takes the name of a task. Write:  {written}.enqueue(…)")
    if not isinstance(name, str):
        raise ConfigurationError(f"app.enqueue() takes the name of a task, such as 'mail.send', not {name!r}.")
    return core.tasks.get(name) or core.external_tasks.get(name) or external_task(core, name, "default")


def _external(*args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN003, ANN202  any call, any result
    raise ConfigurationError("The function of this task lives in another program: enqueue it.")


def _retry(retry: Retry | int | None) -> Retry:
    if isinstance(retry, Retry):
        return retry
    return Retry() if retry is None else Retry(attempts=retry)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")
    return value


def _is_redefined(known: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Tell whether a function replaces an earlier one: a cell of a notebook that was run again."""
    return known is function or getattr(getattr(known, "__code__", None), "co_filename", "").startswith("<")
