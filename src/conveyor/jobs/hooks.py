"""Extensions of an app by its program: middleware around pushes and runs, lifespans, listeners of events."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from conveyor.errors import ConfigurationError
from conveyor.events import EVENTS, Event
from conveyor.jobs.context import Context
from conveyor.messaging.push_options import Outgoing, PushEnd

_log = logging.getLogger("conveyor.app")


class CallNext(Protocol):
    """The next middleware, or the job, as a middleware calls it: the call returns the job's result."""

    def __call__(self, context: Context | None = None, /) -> Awaitable[Any]:
        """Run the next middleware, or the job. The argument may be left out."""
        ...


RunFunction = Callable[[Context, CallNext], Awaitable[Any]]
Resources = Mapping[str, Any] | None
Lifespan = Callable[
    [], AsyncGenerator[Resources, None] | AsyncIterator[Resources] | AbstractAsyncContextManager[Resources]
]


class Middleware:
    """
    Code around pushes and runs; override one or both. The first one added is the outermost.

    `push` runs in the producer, inside `enqueue` of a task and `push` of a queue, their bulk and awaitable forms alike, and
    may change what goes out. It may return a function, which is called when what was pushed is stored, with None, or with the error
    that the call raises. `run` wraps every attempt in the worker, on its event loop; an exception that it raises fails
    the attempt.
    """

    def push(self, outgoing: Outgoing) -> PushEnd | None:
        """Look at a job or a message that is about to be stored, or change it. An exception reaches the caller."""
        return None

    async def run(self, context: Context, call_next: CallNext) -> Any:
        """Await ``call_next()`` to run the job, and return its result or another one."""
        return await call_next()

    def skips(self, headers: Mapping[str, str]) -> bool:
        """
        Tell whether `run` would do nothing for a job with these headers. Where all middleware says so, none is called.

        It is asked before an attempt, and must be quick. Of jobs without headers it is asked once in 0.1 s, and the answer serves
        for all of them.
        """
        return False


class _AdaptedMiddleware(Middleware):
    """A function, or an object that has `push` or `run` without being a Middleware."""

    def __init__(
        self, source: object, push: Callable[[Outgoing], PushEnd | None] | None, run: RunFunction | None
    ) -> None:
        self._source = source
        if push is not None:
            vars(self)["push"] = push
        if run is not None:
            vars(self)["run"] = run

    def __repr__(self) -> str:
        return f"<Middleware {self._source!r}>"


def as_middleware(source: object) -> Middleware:
    """Return a middleware from a class (instantiated here), an instance or an async function; or ConfigurationError."""
    if inspect.isclass(source):
        try:
            return as_middleware(source())
        except TypeError as error:
            raise ConfigurationError(
                f"@app.middleware cannot make a {source.__name__}: {error}. "
                f"Pass an instance: app.middleware({source.__name__}(…))."
            ) from error
    if inspect.iscoroutinefunction(source):
        return _AdaptedMiddleware(source, None, source)
    push, run = getattr(source, "push", None), getattr(source, "run", None)
    if run is not None and not inspect.iscoroutinefunction(run):
        raise ConfigurationError(f"{source!r}: run must be `async def run(self, context, call_next)`.")
    if inspect.iscoroutinefunction(push):
        raise ConfigurationError(f"{source!r}: push must be a plain `def push(self, outgoing)`; enqueue calls it too.")
    if isinstance(source, Middleware):
        return source
    if push is None and run is None:
        raise ConfigurationError(
            f"{source!r} is not a middleware: write `async def name(context, call_next)`, or a class with push or run."
        )
    return _AdaptedMiddleware(source, push, run)


def wraps_pushes(middleware: Middleware) -> bool:
    """Tell whether it does anything when a job or a message is pushed."""
    return "push" in vars(middleware) or type(middleware).push is not Middleware.push


def wraps_runs(middleware: Middleware) -> bool:
    """Tell whether it does anything when a job runs."""
    return "run" in vars(middleware) or type(middleware).run is not Middleware.run


def skipping(middlewares: Sequence[Middleware]) -> Callable[[Mapping[str, str]], bool] | None:
    """Return what tells whether all of *middlewares* skip a job; None where one of them never does."""
    if any(type(one).skips is Middleware.skips for one in middlewares):
        return None
    if len(middlewares) == 1:
        return middlewares[0].skips
    return lambda headers: all(one.skips(headers) for one in middlewares)


async def run_through(middlewares: Sequence[Middleware], context: Context, job: Callable[[], Awaitable[Any]]) -> Any:
    """Run *job* inside all of *middlewares*, the first outermost, and return what the outermost returned."""

    async def step(at: int) -> Any:
        if at == len(middlewares):
            return await job()

        def call_next(_: Context | None = None, /) -> Awaitable[Any]:
            return step(at + 1)

        return await middlewares[at].run(context, call_next)

    return await step(0)


class Hooks:
    """The middleware, lifespans and listeners of an app, each in the order they were added."""

    def __init__(self) -> None:
        self.run_middlewares: list[Middleware] = []
        """Those that wrap runs, the outermost first."""
        self.push_middlewares: list[Middleware] = []
        """Those that see pushes, the outermost first."""
        self._lifespans: list[Callable[[], AbstractAsyncContextManager[Resources]]] = []
        self.listeners: dict[type[Event], list[Callable[[Any], Any]]] = {}
        """By the exact class of the events."""
        self._running: set[asyncio.Future[Any]] = set()

    def add_middleware(self, source: object) -> None:
        """Add a middleware; raises ConfigurationError."""
        middleware = as_middleware(source)
        if wraps_pushes(middleware):
            self.push_middlewares.append(middleware)
        if wraps_runs(middleware):
            self.run_middlewares.append(middleware)

    def add_lifespan(self, function: Lifespan) -> None:
        """Add a lifespan; raises ConfigurationError."""
        if inspect.isasyncgenfunction(function):
            self._lifespans.append(asynccontextmanager(function))
        elif inspect.iscoroutinefunction(function) or not callable(function):
            raise ConfigurationError(
                f"{function!r}: a lifespan must yield once, between opening and closing its resources."
            )
        else:
            self._lifespans.append(function)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan_context(self) -> AsyncIterator[Mapping[str, Any]]:
        """Open all lifespans, in order, and yield their resources as one mapping; close them in reverse."""
        state: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            for open_lifespan in self._lifespans:
                resources = await stack.enter_async_context(open_lifespan())
                state.update(resources or {})
            yield state

    def listen(self, kind: type[Any] | str) -> Callable[[Callable[..., Any]], None]:
        """Return the function that adds a listener to events of a kind; raises ConfigurationError."""
        if isinstance(kind, str):
            if kind not in EVENTS:
                raise ConfigurationError(f"There is no event {kind!r}. There are: {', '.join(EVENTS)}.")
            kind = EVENTS[kind]
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise ConfigurationError(f"app.on takes the name of an event or a class of conveyor.events, not {kind!r}.")
        kinds = {event for event in EVENTS.values() if issubclass(event, kind)} | {kind}

        def add(listener: Callable[..., Any]) -> None:
            for event in kinds:
                self.listeners.setdefault(event, []).append(listener)

        return add

    def emit(self, event: Event) -> None:
        """Call the listeners of *event*; async ones are scheduled on the running loop. Never raises."""
        for listener in self.listeners.get(type(event), ()):
            try:
                answer = listener(event)
                if inspect.isawaitable(answer):
                    self._schedule(listener, answer)
            except Exception:
                _log.exception("the listener %r failed on %s", listener, type(event).__name__)

    def _schedule(self, listener: Callable[[Any], Any], answer: Any) -> None:
        if asyncio._get_running_loop() is None:  # noqa: SLF001  the C function; get_running_loop raises instead
            if inspect.iscoroutine(answer):
                answer.close()
            _log.warning("the async listener %r was not called: no event loop runs in this thread", listener)
            return
        future = asyncio.ensure_future(answer)
        self._running.add(future)  # the loop itself holds tasks only weakly

        def on_finished(future: asyncio.Future[Any]) -> None:
            self._running.discard(future)
            if not future.cancelled() and (error := future.exception()) is not None:
                _log.error("the listener %r failed", listener, exc_info=error)

        future.add_done_callback(on_finished)
