"""
The parameters of a task that the worker fills: its context, and dependencies.

What a task needs is resolved when it is declared, into an `Injection`: the steps that open its dependencies, each behind those
that it needs itself. A task without such parameters has none, and costs nothing.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Literal, Protocol, TypeVar, overload

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.jobs.context import Context
from conveyor.payload.codec import show

Scope = Literal["job", "worker"]
Function = Callable[..., Any]
Overrides = Mapping[Function, Function]
"""Functions of dependencies, and what is called in their places."""
Block = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the event loop, from outside of it, and returns its result."""
T = TypeVar("T")
M = TypeVar("M", bound=AbstractContextManager[Any] | AbstractAsyncContextManager[Any])
_EMPTY = inspect.Parameter.empty
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_SCOPES = ("job", "worker")


class Dependency:
    """The default value of a parameter that the worker fills with what a function returns or yields."""

    __slots__ = ("function", "scope")

    def __init__(self, function: Function, scope: Scope) -> None:
        self.function, self.scope = function, scope

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigurationError(
            f"{self!r}.{name}: only a worker fills this parameter. Where you call the function yourself, pass the value by name."
        )

    def __repr__(self) -> str:
        return f"Depends({_name(self.function)})"


# A value with `__enter__`, such as a file or a cursor, is often an iterator as well: it is passed as it is.
@overload
def Depends(function: Callable[..., AsyncGenerator[T, Any] | Generator[T, Any, Any]], *, scope: Scope = "job") -> T: ...
@overload
def Depends(function: Callable[..., Coroutine[Any, Any, T]], *, scope: Scope = "job") -> T: ...
@overload
def Depends(function: Callable[..., M], *, scope: Scope = "job") -> M: ...
@overload
def Depends(function: Callable[..., AsyncIterator[T] | Iterator[T]], *, scope: Scope = "job") -> T: ...
@overload
def Depends(function: Callable[..., T], *, scope: Scope = "job") -> T: ...


def Depends(function: Function, *, scope: Scope = "job") -> Any:  # noqa: N802  the contract's name
    """
    Have the worker fill a parameter with what a function returns.

    It is the default value: ``db: Db = Depends(get_db)``. The function is a `def` or an `async def`, or a generator of either
    kind, which yields the value once, and goes on after the job has ended, however that was: there it cleans up. It is called
    once for each job, also where several parameters need it, and its own parameters may be dependencies and `current()`. With
    ``scope="worker"`` it is called once in a worker process, at first use, and cleans up when that ends. Raises
    ConfigurationError.
    """
    if not callable(function):
        raise ConfigurationError(
            f"Depends() takes a function, not {show(function)}. Write Depends(get_db), without a call."
        )
    if scope not in _SCOPES:
        raise ConfigurationError(f"Depends(scope=…) must be one of 'job', 'worker', not {show(scope)}.")
    try:
        hash(function)
    except TypeError as error:
        raise ConfigurationError(f"Depends() takes a function that can be a key of a dict: {error}.") from None
    return Dependency(function, scope)


def is_injected(parameter: inspect.Parameter) -> bool:
    """Tell whether the worker fills a parameter: its default is `current()` or `Depends(…)`. Raises ConfigurationError."""
    if typing.get_origin(parameter.annotation) is typing.Annotated:
        for extra in parameter.annotation.__metadata__:
            if isinstance(extra, Dependency):
                raise ConfigurationError(
                    f"'{parameter.name}': a dependency is a default value, so that type checkers do not ask for it when the "
                    f"task is enqueued. Write:  {parameter.name}: … = {extra!r}"
                )
    return isinstance(parameter.default, Context | Dependency)


class _Step(typing.NamedTuple):
    """One dependency to open: which parameters get the values of which earlier steps, and which the context."""

    function: Function
    kind: Literal["value", "coroutine", "generator", "async generator"]
    scope: Scope
    values: tuple[tuple[str, int], ...]
    contexts: tuple[str, ...]


class Injection(msgspec.Struct, frozen=True):
    """
    The values that a worker fills in of the calls of one task.

    `contexts` are the parameters that get the context, `values` those that get the value of a step. `positions` are the
    parameters with a dependency, each with its place in a call by position.
    """

    contexts: tuple[str, ...]
    values: tuple[tuple[str, int], ...]
    steps: tuple[_Step, ...]
    positions: Mapping[str, int]

    @property
    def functions(self) -> set[Function]:
        """The functions of its dependencies, nested ones too."""
        return {step.function for step in self.steps}

    def refuse_call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigurationError for a plain call of task *name* that leaves out a dependency."""
        for parameter, at in self.positions.items():
            if parameter not in kwargs and at >= len(args):
                raise ConfigurationError(
                    f"{name}() was called here without '{parameter}', which only a worker fills. Pass it by name: "
                    f"{name.rpartition('.')[2]}(…, {parameter}=…), or enqueue the task."
                )

    def around(
        self, function: Function, open_context: Callable[[], Context], scope: WorkerScope, block: Block | None
    ) -> Function:
        """
        Return *function* as it is called with the arguments of a job alone: the rest is filled in.

        Args:
            function: that of the task.
            open_context: returns the context of the job.
            scope: has the values that a worker process opens once.
            block: runs a coroutine from outside of the event loop; None: *function* is async, and so is what is returned.

        """
        needs_context = self.contexts or any(step.contexts for step in self.steps)
        context = open_context() if needs_context else None
        filled = functools.partial(function, **dict.fromkeys(self.contexts, context))
        if not self.steps:
            return filled
        if block is None:
            return functools.partial(self._call, filled, context, scope, _OnLoop())

        def call(*args: Any, **kwargs: Any) -> Any:
            return _finish(self._call(filled, context, scope, _OffLoop(block), *args, **kwargs))

        return call

    async def _call(
        self, function: Function, context: Context | None, scope: WorkerScope, side: _Side, *args: Any, **kwargs: Any
    ) -> Any:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(side.close)
            values: list[Any] = []
            for step in self.steps:
                inputs = {name: values[at] for name, at in step.values}
                inputs |= dict.fromkeys(step.contexts, context)
                if step.scope == "worker":
                    value = await side.wait_for(scope, step, inputs)
                else:
                    value = await _open(step, inputs, stack, side.run)
                values.append(value)
            kwargs |= {name: values[at] for name, at in self.values}
            return await side.result(function(*args, **kwargs))
        raise AssertionError("no clean-up keeps an error to itself")


def plan_injection(
    injected: Mapping[str, Any], positional: typing.Sequence[str], task: str, overrides: Overrides
) -> Injection | None:
    """
    Return what a worker fills in of the calls of *task*; None: nothing. Raises ConfigurationError.

    Args:
        injected: its parameters that are filled, with their defaults.
        positional: the parameters of its function that can be given by position, in their order.
        task: its name.
        overrides: those that are in force.

    """
    if not injected:
        return None
    planner = _Planner(task, overrides)
    wanted = {name: one for name, one in injected.items() if isinstance(one, Dependency)}
    values = tuple((name, planner.place(one)) for name, one in wanted.items())
    positions = {name: positional.index(name) if name in positional else sys.maxsize for name in wanted}
    return Injection(
        tuple(name for name in injected if name not in wanted), values, tuple(planner.steps), positions
    )  # fmt: skip


class _Planner:
    """Puts the dependencies of one task in order, each function once."""

    def __init__(self, task: str, overrides: Overrides) -> None:
        self._task, self._overrides = task, overrides
        self.steps: list[_Step] = []
        self._places: dict[tuple[Function, Scope], int] = {}
        self._path: list[Function] = []

    def place(self, dependency: Dependency) -> int:
        """Return the number of the step of a dependency; it is added, behind those that it needs."""
        function, scope = self._overrides.get(dependency.function, dependency.function), dependency.scope
        if function in self._path:
            function = dependency.function  # what stands in its place may use the original
        if function in self._path:
            raise ConfigurationError(f"{self._task}(): {_name(function)} depends on itself.")
        if (function, scope) in self._places:
            return self._places[function, scope]
        self._path.append(function)
        values, contexts = [], []
        for parameter in _parameters(function, self._task):
            default = parameter.default
            if isinstance(default, Dependency):
                values.append((parameter.name, self.place(default)))
            elif isinstance(default, Context):
                contexts.append(parameter.name)
            elif default is _EMPTY and parameter.kind not in _VARIADIC:
                raise ConfigurationError(
                    f"{self._task}(): '{parameter.name}' of its dependency {_name(function)}() has no default. The worker fills "
                    "only parameters with Depends(…) or current() as their defaults."
                )
        self._path.pop()
        if scope == "worker" and (contexts or any(self.steps[at].scope == "job" for _, at in values)):
            raise ConfigurationError(
                f'{self._task}(): {_name(function)} has scope="worker", so it cannot depend on what belongs to one job. '
                'Give what it depends on scope="worker" too.'
            )
        self.steps.append(_Step(function, _kind(function), scope, tuple(values), tuple(contexts)))
        self._places[function, scope] = len(self.steps) - 1
        return len(self.steps) - 1


@contextmanager
def overriding(
    overrides: MutableMapping[Function, Function], function: Function, replacement: Function
) -> Iterator[None]:
    """Have *replacement* called in place of *function* inside the block; raises ConfigurationError."""
    for one in (function, replacement):
        if not callable(one):
            raise ConfigurationError(
                f"app.override() takes the function of a dependency and another one for its place, not {show(one)}."
            )
    _Planner("app.override", overrides).place(Dependency(replacement, "job"))
    before = overrides.get(function)
    overrides[function] = replacement
    try:
        yield
    finally:
        if before is None:
            del overrides[function]
        else:
            overrides[function] = before


# -- opening and closing ------------------------------------------------------------------------------------------


class WorkerScope:
    """The dependencies that a worker process opens once, each at its first use."""

    def __init__(self, *, offload: bool) -> None:
        """*offload*: plain functions run on a thread, since other jobs run on the event loop meanwhile."""
        self._values: dict[Function, Any] = {}
        self._offload = offload
        self._stack = AsyncExitStack()
        self._server = _LoopTask()

    async def value(self, step: _Step, inputs: dict[str, Any]) -> Any:
        """Return the value of a step, opened if need be. One that cannot be opened is tried again at the next use."""

        async def opened() -> Any:
            if step.function not in self._values:
                run = _run_on_thread if self._offload and step.kind in {"value", "generator"} else _run_here
                self._values[step.function] = await _open(step, inputs, self._stack, run, plainly=run is _run_here)
            return self._values[step.function]

        return self._values[step.function] if step.function in self._values else await self._server.run(opened)

    async def close(self) -> None:
        """Clean up, the last opened first."""
        if self._values:
            self._values.clear()
            await self._server.run(self._stack.aclose)
        await self._server.close()


AwaitableCaller = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Calls a function that returns an awaitable, where that belongs, and returns its result."""


async def _run_here(function: Callable[[], Any]) -> Any:
    return await function()


async def _run_on_thread(function: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(function)


async def _open(
    step: _Step, inputs: dict[str, Any], stack: AsyncExitStack, run: AwaitableCaller, *, plainly: bool = True
) -> Any:
    """Return the value of a dependency; *stack* gets its clean-up. *plainly*: plain functions are called here, not by *run*."""
    call = functools.partial(step.function, **inputs)
    if step.kind == "coroutine":
        return await run(call)
    if step.kind == "value":
        return call() if plainly else await run(call)
    enter: Callable[[], Any]
    leave: Callable[..., Any]
    if step.kind == "generator":
        manager = contextmanager(step.function)(**inputs)
        enter, leave = manager.__enter__, manager.__exit__
    else:
        async_manager = asynccontextmanager(step.function)(**inputs)
        enter, leave, plainly = async_manager.__aenter__, async_manager.__aexit__, False

    async def clean_up(*error: Any) -> None:
        # It may keep an error to itself; the job has failed nevertheless, and what is closed after it must know.
        if plainly:
            leave(*error)
        else:
            await run(functools.partial(leave, *error))

    value = enter() if plainly else await run(enter)
    stack.push_async_exit(clean_up)
    return value


class _Side(Protocol):
    """Where a job runs: on the event loop, or outside of it."""

    async def run(self, function: Callable[[], Any]) -> Any: ...
    async def wait_for(self, scope: WorkerScope, step: _Step, inputs: dict[str, Any]) -> Any: ...
    async def result(self, returned: Any) -> Any: ...
    async def close(self) -> None: ...


class _OnLoop:
    """A job on the event loop: it awaits its dependencies itself."""

    async def run(self, function: Callable[[], Any]) -> Any:
        return await function()

    async def wait_for(self, scope: WorkerScope, step: _Step, inputs: dict[str, Any]) -> Any:
        return await scope.value(step, inputs)

    async def result(self, returned: Any) -> Any:
        return await returned

    async def close(self) -> None:
        pass


class _OffLoop:
    """A job outside of the event loop: its async dependencies run there, all in one task, while it waits."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._server: _LoopTask | None = None

    async def run(self, function: Callable[[], Any]) -> Any:
        if self._server is None:
            self._server = _LoopTask()
        return self._block(self._server.run(function, cancels=True))

    async def wait_for(self, scope: WorkerScope, step: _Step, inputs: dict[str, Any]) -> Any:
        return self._block(scope.value(step, inputs))

    async def result(self, returned: Any) -> Any:
        return returned

    async def close(self) -> None:
        if self._server is not None:
            self._block(self._server.close())


class _LoopTask:
    """A task of an event loop that runs one function after the other: cancel scopes must be left in the task that entered them."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._served: asyncio.Future[Any] | None = None

    async def run(self, function: Callable[[], Any], *, cancels: bool = False) -> Any:
        """
        Await what *function* returns, in the task, and return its result.

        *cancels*: it is for the caller alone, and cancelled with it.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name="conveyor-dependencies")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((function, answer))
        try:
            return await answer
        except asyncio.CancelledError:
            if cancels and self._served is answer:
                self._task.cancel()
            raise

    async def close(self) -> None:
        """End the task."""
        if self._task is not None:
            self._waiting.put_nowait(None)
            await self._task

    async def _serve(self) -> None:
        assert self._task is not None
        while (request := await self._waiting.get()) is not None:
            function, answer = request
            if answer.cancelled():
                continue
            self._served = answer
            try:
                value = await function()
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    self._task.uncancel()  # it was for this function, and those that follow clean up
                if not answer.done():
                    # A future takes no StopIteration.
                    answer.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
            else:
                if not answer.done():
                    answer.set_result(value)
            finally:
                self._served = None


def _finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end that never suspends: outside of the event loop each wait in it blocks."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it never suspends")


def _kind(function: Function) -> Literal["value", "coroutine", "generator", "async generator"]:
    while isinstance(function, functools.partial):
        function = function.func
    for one in (function, type(function).__call__):
        if inspect.isasyncgenfunction(one):
            return "async generator"
        if inspect.isgeneratorfunction(one):
            return "generator"
        if inspect.iscoroutinefunction(one):
            return "coroutine"
    return "value"


def _parameters(function: Function, task: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{task}(): the parameters of {_name(function)} cannot be read: {error}.") from error


def _name(function: Function) -> str:
    return getattr(function, "__qualname__", None) or show(function)
