"""
Producers of this process that wait for room in full queues.

A refused push stands in a line in Redis (lib/room.lua), and its caller sleeps. Whatever makes room calls the first of the line
on the channel of its process, and only then it pushes again. A call can be missed, so after minutes a producer looks by itself,
and whenever the connection was lost in between; it keeps its place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Hashable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from random import uniform
from typing import TYPE_CHECKING, Protocol

from conveyor.errors import ConveyorError, QueueFull
from conveyor.ids import logical, new_identity
from conveyor.store import operations
from conveyor.store.client.handling import HANDLED
from conveyor.store.client.subscription import OUTAGE_LIMIT, Subscription
from conveyor.store.fork_safety import on_fork
from conveyor.store.keys import reply_channel
from conveyor.store.operations import InLine
from conveyor.store.sleepers import SleepingTask, SleepingThread
from conveyor.store.transport.replies import unavailable
from conveyor.units import span

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.max_length import MaxLength
    from conveyor.store.operations import Entry
    from conveyor.store.script import Call
    from conveyor.store.transport.async_connection import AsyncConnection
    from conveyor.store.transport.endpoint import Endpoint, Topology

LOOK_AGAIN = 240.0, 300.0
"""Seconds after which a producer looks by itself, at random between these: 200 of them send less than one command a second."""
_log = logging.getLogger("conveyor.store")


class RoomClient(Protocol):
    """The part of a client that waiting producers use."""

    namespace: str
    retry_for: float
    queue_of_job: Callable[[], str | None]

    @property
    def address(self) -> Topology: ...
    def endpoint(self, keys: QueueKeys) -> Endpoint: ...
    def run(self, call: Call[bool], *, retry_for: float | None = None) -> bool: ...
    def async_connection(self, keys: QueueKeys) -> AsyncConnection: ...


class WaitingProducer:
    """One push that waits: its `entry` in the line, since when (µs by the server's clock), and what wakes it."""

    __slots__ = ("entry", "is_in_line", "is_woken", "server", "since", "wake")

    def __init__(self, entry: str, server: Hashable, wake: Callable[[], object]) -> None:
        self.entry, self.server, self.wake = entry, server, wake
        self.since = "0"
        self.is_woken = self.is_in_line = False

    def place(self, *, last: bool) -> str:
        """Return what the script needs to know of it; when it comes for the *last* time, it leaves the line."""
        self.is_woken, self.is_in_line = False, not last
        return f"{self.entry.rpartition(' ')[0]} {self.since} {'last' if last else 'wait'}"


class PushAttempt(Protocol):
    """A push, from a place in the line."""

    def __call__(self, *, max_length: MaxLength) -> list[str]:
        """Carry it out; raises QueueFull."""
        ...


class AsyncPushAttempt(Protocol):
    """Awaitable form of `PushAttempt`."""

    def __call__(self, *, max_length: MaxLength) -> Awaitable[list[str]]:
        """Carry it out; raises QueueFull."""
        ...


Steps = Generator[str | float, None, None]
"""Yields the place from which to push, "" for none, or the most seconds of a pause that ends when the producer is woken."""


class RoomLine:
    """The producers of one app in this process that wait for room, and the threads that wake them."""

    def __init__(self, client: RoomClient) -> None:
        self._client = client
        self.forked()
        on_fork(self)

    def forked(self) -> None:
        """Start with an empty table in a forked child."""
        self._channel = reply_channel(self._client.namespace, new_identity())
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._waiting: dict[str, WaitingProducer] = {}
        self._subscriptions: dict[Hashable, Subscription] = {}

    def close(self) -> None:
        """End the threads; producers that still wait look at once, and start others."""
        with self._lock:
            subscriptions, self._subscriptions = self._subscriptions, {}
        for server, one in subscriptions.items():
            one.close()
            self._wake_all(server)

    # -- pushing --------------------------------------------------------------------------------------------------

    def push(self, keys: QueueKeys, max_length: MaxLength, entries: Sequence[Entry], attempt: PushAttempt) -> list[str]:
        """Carry out *attempt*, a push of *entries*, when there is room; raises QueueFull at their deadline."""
        thread = SleepingThread()
        waiting = self._new_producer(keys, len(entries), thread.wake)
        steps = self._steps(keys, waiting, max_length, entries)
        try:
            step = next(steps)
            while True:
                if isinstance(step, float):
                    if not waiting.is_woken:
                        thread.sleep(step)
                    step = next(steps)
                    continue
                try:
                    return attempt(max_length=max_length.at(step))
                except QueueFull as full:
                    step = steps.throw(full)
        except BaseException:
            if waiting.is_in_line:
                with suppress(ConveyorError):
                    self._client.run(operations.leave_room(keys.prefix, waiting.entry), retry_for=0.0)
            raise
        finally:
            self._waiting.pop(waiting.entry, None)

    async def apush(
        self, keys: QueueKeys, max_length: MaxLength, entries: Sequence[Entry], attempt: AsyncPushAttempt
    ) -> list[str]:
        """Awaitable form of `push`."""
        task = SleepingTask()
        waiting = self._new_producer(keys, len(entries), task.wake)
        steps = self._steps(keys, waiting, max_length, entries)
        try:
            step = next(steps)
            while True:
                if isinstance(step, float):
                    if not waiting.is_woken:
                        await task.sleep(step)
                    step = next(steps)
                    continue
                try:
                    return await attempt(max_length=max_length.at(step))
                except QueueFull as full:
                    step = steps.throw(full)
        except BaseException:
            if waiting.is_in_line:  # nothing is awaited: the caller may have been cancelled
                call = operations.leave_room(keys.prefix, waiting.entry)
                self._client.async_connection(keys).send(call.load(), _ignore)
            raise
        finally:
            self._waiting.pop(waiting.entry, None)

    def _steps(
        self, keys: QueueKeys, waiting: WaitingProducer, max_length: MaxLength, entries: Sequence[Entry]
    ) -> Steps:
        """Plan a push. The QueueFull of an attempt is thrown in; it is raised when nothing more is to be tried."""
        deadline = min((entry.deadline for entry in entries if entry.deadline is not None), default=None)
        began = time.monotonic()
        inside = (*HANDLED.get(), self._client.queue_of_job() or "")
        is_inside = logical(keys.queue) in map(logical, inside)
        known = self._subscriptions.get(waiting.server)
        if is_inside or _is_over(deadline) or known is None or not known.ready.is_set():
            try:
                yield ""
            except QueueFull as full:
                if is_inside:
                    raise _refused_inside(keys, full) from None
                if _is_over(deadline):
                    raise
        self._waiting[waiting.entry] = waiting
        subscription = yield from self._listen(keys, waiting)
        while True:
            if self._subscriptions.get(waiting.server) is not subscription:  # the connections were closed meanwhile
                subscription = yield from self._listen(keys, waiting)
            is_last = _is_over(deadline)
            try:
                yield waiting.place(last=is_last)
            except InLine as full:
                waiting.since = full.since
            except QueueFull as full:
                raise _given_up(full, waiting, max_length, time.monotonic() - began) from None
            now = time.monotonic()
            look, outage_until = now + uniform(*LOOK_AGAIN), now + OUTAGE_LIMIT  # noqa: S311
            while not waiting.is_woken:
                until = look if subscription.ready.is_set() else min(look, outage_until)
                until = until if deadline is None else min(until, deadline)
                if _is_over(until):
                    break
                yield max(0.001, until - time.monotonic())

    def _listen(self, keys: QueueKeys, waiting: WaitingProducer) -> Generator[float, None, Subscription]:
        """Return what hears the calls, once it does; yields the most seconds of a pause, as `_steps`. Raises StoreUnavailable."""
        subscription = self._subscribe(keys, waiting.server)
        ready_until = time.monotonic() + self._client.retry_for + 1.0
        while True:
            waiting.is_woken = False  # first: it is set after `ready`
            if subscription.ready.is_set():
                return subscription
            if _is_over(ready_until):
                raise unavailable(str(self._client.address), subscription.error or "no answer")
            yield max(0.001, ready_until - time.monotonic())

    def _new_producer(self, keys: QueueKeys, places: int, wake: Callable[[], object]) -> WaitingProducer:
        server = self._client.endpoint(keys).current_server()
        return WaitingProducer(f"{self._channel} {next(self._numbers)} {places}", server, wake)

    # -- the calls ------------------------------------------------------------------------------------------------

    def _subscribe(self, keys: QueueKeys, server: Hashable) -> Subscription:
        with self._lock:
            subscription = self._subscriptions.get(server)
            if subscription is None:
                subscription = self._subscriptions[server] = Subscription(
                    self._client.endpoint(keys), self._channel, on_message=self._handle_call,
                    on_subscribed=partial(self._wake_all, server), ping_after=None,
                )  # fmt: skip
            return subscription

    def _handle_call(self, data: bytes) -> None:
        """Wake the producer that is called; the places of one that does not wait any more go to the next."""
        if not data:
            return  # the question whether this process lives
        entry, _, prefix = data.decode().partition("\n")
        waiting = self._waiting.get(entry)
        if waiting is not None:
            _wake(waiting)
        else:
            with suppress(ConveyorError):
                self._client.run(operations.leave_room(prefix, entry), retry_for=0.0)

    def _wake_all(self, server: Hashable) -> None:
        """Wake the producers at one server, after its connection was made or was lost: a call may have been missed."""
        for waiting in list(self._waiting.values()):
            if waiting.server == server:
                _wake(waiting)


def _wake(waiting: WaitingProducer) -> None:
    waiting.is_woken = True
    waiting.wake()


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _refused_inside(keys: QueueKeys, full: QueueFull) -> QueueFull:
    """Return the error of a push by code that handles a job or a message of the same queue."""
    return QueueFull(
        f"{full}\nThe push did not wait for room, because the code that pushed handles a job or a message of queue "
        f"'{logical(keys.queue)}': that has a place until it ends, so it could wait for itself. Let a job spawn the next one "
        "(context.spawn), or push to another queue."
    )


def _given_up(full: QueueFull, waiting: WaitingProducer, max_length: MaxLength, seconds: float) -> QueueFull:
    places = int(waiting.entry.rpartition(" ")[2])
    if places > max_length:
        return QueueFull(
            f"{full}\nThis push has {places:,} jobs, which is more than the queue ever takes: push them in parts."
        )
    return QueueFull(f"{full}\nThe push waited {span(seconds)} for room.")


def _ignore(reply: object) -> None:
    if isinstance(reply, Exception):
        _log.debug("could not leave the line of a full queue: %s", reply)
