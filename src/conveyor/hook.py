"""What a program hangs on its app: middleware, lifespans, listeners."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar, overload

from conveyor.errors import ConfigurationError
from conveyor.event import EVENTS, Event
from conveyor.middleware import Middleware, adopt, pushes, runs

E = TypeVar("E", bound=Event)
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M")
Resources = Mapping[str, Any] | None
Lifespan = Callable[
    [], AsyncGenerator[Resources, None] | AsyncIterator[Resources] | AbstractAsyncContextManager[Resources]
]
L = TypeVar("L", bound=Lifespan)

_log = logging.getLogger("conveyor.app")


class Hooks:
    """The hooks of an app; they are kept in the order they were added."""

    def __init__(self) -> None:
        """Have none."""
        self.middlewares: list[Middleware] = []
        """Those that wrap runs, the outermost first."""
        self.pushers: list[Middleware] = []
        """Those that see what is enqueued."""
        self._lifespans: list[Callable[[], AbstractAsyncContextManager[Resources]]] = []
        self._listeners: dict[type[Event], list[Callable[[Any], Any]]] = {}
        self._running: set[asyncio.Future[Any]] = set()

    def middleware(self, source: M, /) -> M:
        """
        Add a middleware: a class (which is instantiated), an instance, or ``async def name(context, call_next)``.

        The first one added is the outermost. Usable as a decorator; raises ConfigurationError.
        """
        found = adopt(source)
        if pushes(found):
            self.pushers.append(found)
        if runs(found):
            self.middlewares.append(found)
        return source

    def lifespan(self, function: L, /) -> L:
        """
        Add what is opened before a worker's first job and closed after its last.

        An async generator function that yields once, or a function that returns an async context manager; the
        mapping it yields (or None) is part of `context.state`.
        """
        if inspect.isasyncgenfunction(function):
            self._lifespans.append(asynccontextmanager(function))
        elif inspect.iscoroutinefunction(function) or not callable(function):
            raise ConfigurationError(
                f"{function!r}: a lifespan must yield once, between opening and closing its resources."
            )
        else:
            self._lifespans.append(function)  # type: ignore[arg-type]
        return function

    @asynccontextmanager
    async def lifespan_context(self) -> AsyncIterator[Mapping[str, Any]]:
        """Open all lifespans, in order, and yield what they yielded, together; close them in reverse."""
        state: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            for open_one in self._lifespans:
                resources = await stack.enter_async_context(open_one())
                state.update(resources or {})
            yield state

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
        What a listener raises is logged and disturbs nobody.
        """
        if isinstance(kind, str):
            if kind not in EVENTS:
                raise ConfigurationError(f"There is no event {kind!r}. There are: {', '.join(EVENTS)}.")
            kind = EVENTS[kind]
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise ConfigurationError(f"app.on takes the name of an event or a class of conveyor.event, not {kind!r}.")
        kinds = {found for found in EVENTS.values() if issubclass(found, kind)} | {kind}

        def add(function: F) -> F:
            for one in kinds:
                self._listeners.setdefault(one, []).append(function)
            return function

        if listener is None:
            return add
        add(listener)
        return None

    def has_listener(self, kind: type[Event]) -> bool:
        """Tell whether anybody listens to events of exactly this class."""
        return kind in self._listeners

    def emit(self, event: Event) -> None:
        """Call the listeners of *event*; async ones are scheduled on the running loop. Never raises."""
        for listener in self._listeners.get(type(event), ()):
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

        def ended(future: asyncio.Future[Any]) -> None:
            self._running.discard(future)
            if not future.cancelled() and (error := future.exception()) is not None:
                _log.error("the listener %r failed", listener, exc_info=error)

        future.add_done_callback(ended)
