"""The one extension point: code around every push and around every run."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from conveyor.context import Context
from conveyor.errors import ConfigurationError
from conveyor.outgoing import Outgoing


class CallNext(Protocol):
    """What a middleware awaits to go on inwards; it returns the job's result. The argument may be left out."""

    def __call__(self, context: Context | None = None, /) -> Awaitable[Any]:
        """Run the next middleware, or the job."""
        ...


Around = Callable[[Context, CallNext], Awaitable[Any]]


class Middleware:
    """
    Code around pushes and runs; override one or both. The first one added is the outermost.

    `push` runs in the producer, inside `enqueue` and `aenqueue` alike, and may change what goes out. `run` wraps
    every attempt in the worker, on its event loop; what it raises fails the attempt.
    """

    def push(self, outgoing: Outgoing) -> None:
        """Look at a job that is about to be enqueued, or change it; what is raised here reaches the caller."""

    async def run(self, context: Context, call_next: CallNext) -> Any:
        """Await ``call_next()`` to run the job, and return its result or another one."""
        return await call_next()


class _Borrowed(Middleware):
    """A function, or an object that has one of the two methods without being a Middleware."""

    def __init__(self, source: object, push: Callable[[Outgoing], None] | None, run: Around | None) -> None:
        self._source = source
        if push is not None:
            vars(self)["push"] = push
        if run is not None:
            vars(self)["run"] = run

    def __repr__(self) -> str:
        return f"<Middleware {self._source!r}>"


def adopt(source: object) -> Middleware:
    """Return a middleware from a class (instantiated here), an instance or an async function; or ConfigurationError."""
    if inspect.isclass(source):
        try:
            return adopt(source())
        except TypeError as error:
            raise ConfigurationError(
                f"@app.middleware cannot make a {source.__name__}: {error}. "
                f"Pass an instance: app.middleware({source.__name__}(…))."
            ) from error
    if inspect.iscoroutinefunction(source):
        return _Borrowed(source, None, source)
    push, run = getattr(source, "push", None), getattr(source, "run", None)
    if run is not None and not inspect.iscoroutinefunction(run):
        raise ConfigurationError(f"{source!r}: run must be `async def run(self, context, call_next)`.")
    if inspect.iscoroutinefunction(push):
        raise ConfigurationError(f"{source!r}: push must be a plain `def push(self, outgoing)`; enqueue calls it too.")
    if isinstance(source, Middleware):
        return source
    if push is None and run is None:
        raise ConfigurationError(
            f"{source!r} is no middleware: write `async def name(context, call_next)`, or a class with push or run."
        )
    return _Borrowed(source, push, run)


def pushes(middleware: Middleware) -> bool:
    """Tell whether it does anything when a job is enqueued."""
    return "push" in vars(middleware) or type(middleware).push is not Middleware.push


def runs(middleware: Middleware) -> bool:
    """Tell whether it does anything when a job runs."""
    return "run" in vars(middleware) or type(middleware).run is not Middleware.run


async def run_through(middlewares: Sequence[Middleware], context: Context, job: Callable[[], Awaitable[Any]]) -> Any:
    """Run *job* inside all of *middlewares*, the first outermost, and return what the outermost returned."""

    async def step(at: int) -> Any:
        if at == len(middlewares):
            return await job()

        def call_next(_: Context | None = None, /) -> Awaitable[Any]:
            return step(at + 1)

        return await middlewares[at].run(context, call_next)

    return await step(0)
