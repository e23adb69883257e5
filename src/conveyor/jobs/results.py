"""
Waiting for results: one subscribed connection and one thread for all waiters of an app.

A waiter registers in Redis, which answers at once when the job has ended. Otherwise the waiter sleeps until a message on
the channel of its process says how the job ended. A message can be missed, so the waiter asks again every few seconds,
and whenever the connection was lost in between.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.ids import new_identity
from conveyor.store import operations
from conveyor.store.client.subscription import OUTAGE_LIMIT, Subscription
from conveyor.store.fork_safety import on_fork
from conveyor.store.keys import QueueKeys, reply_channel
from conveyor.store.sleepers import SleepingTask, SleepingThread
from conveyor.store.transport.replies import unavailable

if TYPE_CHECKING:
    from conveyor.store.client.client import Client

WaitReply = tuple[str, bytes]
"""The reply of await_result.lua: result | dead | ended | gone | waiting, and its bytes."""

CHECK_AGAIN = 5.0
"""Seconds after which a waiter asks again, in case its message was missed."""
EVENT_READER = "e"
"""The word of a listener to the events of a queue, which ends with the subscription."""

_log = logging.getLogger("conveyor.result")


class ResultWaiter:
    """One call that waits. `wake` makes it read `reply`; None: it asks Redis again."""

    __slots__ = ("reply", "wake")

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.reply: WaitReply | None = None


class Listener(NamedTuple):
    """A function that is called at each change of one kind of a job; `prefix` is that of its queue's keys."""

    prefix: str
    what: str
    wake: Callable[[], object]


class ResultSubscriber:
    """The waiters of one app in this process, and the thread that wakes them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._reset()
        on_fork(self)

    def _reset(self) -> None:
        self.channel = reply_channel(self._client.namespace, new_identity())
        self._lock = threading.Lock()
        self._waiters: dict[str, list[tuple[str, ResultWaiter]]] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._thread: Subscription | None = None

    # -- waiting --------------------------------------------------------------------------------------------------

    def outcome(self, keys: QueueKeys, id: str, timeout: float | None) -> WaitReply | None:  # noqa: A002
        """Return how the job ended, None when it is running after *timeout* seconds (None: no limit)."""
        deadline, end = OutageTimer(timeout), self._client.deadline(timeout)
        if deadline.remaining() == 0.0 or not self._is_subscribed():
            reply = self._client.run(operations.await_result(keys, id, ""), deadline=end)
            if reply[0] != "waiting" or deadline.remaining() == 0.0:
                return reply if reply[0] != "waiting" else None
            self._subscribe(end)
        thread = SleepingThread()
        waiter = ResultWaiter(thread.wake)
        self._add_waiter(keys, id, waiter)
        call = operations.await_result(keys, id, self.channel)
        try:
            while True:
                try:
                    reply = self._client.run(call, deadline=end)
                except StoreUnavailable:
                    deadline.note_outage()
                else:
                    deadline.note_reply()
                    if reply[0] != "waiting":
                        return reply
                thread.sleep(deadline.next_check())
                if waiter.reply is not None:
                    return waiter.reply
                if deadline.remaining() == 0.0:
                    return None
        finally:
            if self._remove_waiter(keys, id, waiter):
                self._unregister(keys, id, end)

    async def aoutcome(self, keys: QueueKeys, id: str, timeout: float | None) -> WaitReply | None:  # noqa: A002, ASYNC109
        """Awaitable form of `outcome`."""
        deadline, end = OutageTimer(timeout), self._client.deadline(timeout)
        if deadline.remaining() == 0.0 or not self._is_subscribed():
            reply = await self._client.arun(operations.await_result(keys, id, ""), deadline=end)
            if reply[0] != "waiting" or deadline.remaining() == 0.0:
                return reply if reply[0] != "waiting" else None
            await asyncio.get_running_loop().run_in_executor(None, self._subscribe, end)
        task = SleepingTask()
        waiter = ResultWaiter(task.wake)
        self._add_waiter(keys, id, waiter)
        call = operations.await_result(keys, id, self.channel)
        try:
            while True:
                try:
                    reply = await self._client.arun(call, deadline=end)
                except StoreUnavailable:
                    deadline.note_outage()
                else:
                    deadline.note_reply()
                    if reply[0] != "waiting":
                        return reply
                if waiter.reply is None:
                    await task.sleep(deadline.next_check())
                if waiter.reply is not None:
                    return waiter.reply
                if deadline.remaining() == 0.0:
                    return None
        finally:
            if self._remove_waiter(keys, id, waiter):
                await self._aunregister(keys, id, end)

    def _unregister(self, keys: QueueKeys, id: str, deadline: float | None) -> None:  # noqa: A002
        try:
            self._client.run(operations.forget(keys, id, self.channel), retry_for=0.0, deadline=deadline)
        except StoreUnavailable:
            _log.debug("could not unregister from %s; the job's end removes the entry", id)
        self._wake_others(id)

    async def _aunregister(self, keys: QueueKeys, id: str, deadline: float | None) -> None:  # noqa: A002
        try:
            await self._client.arun(operations.forget(keys, id, self.channel), retry_for=0.0, deadline=deadline)
        except StoreUnavailable:
            _log.debug("could not unregister from %s; the job's end removes the entry", id)
        self._wake_others(id)

    def _wake_others(self, id: str) -> None:  # noqa: A002
        """Wake waiters that came while the last one unregistered: that may have removed their registration."""
        with self._lock:
            waiters = list(self._waiters.get(id, ()))
        for _, waiter in waiters:
            waiter.wake()

    # -- changes of a job that lives ------------------------------------------------------------------------------

    @property
    def watch_channel(self) -> str:
        """The channel, as `waiters` holds it for a process that wants to know each change."""
        return f"*{self.channel}"

    def listen(self, keys: QueueKeys, id: str, what: str, wake: Callable[[], object]) -> Listener:  # noqa: A002
        """
        Call *wake*, in the thread of the subscription, after each change of a job and at its end: "s" of its state, "p" new parts;
        or, of the queue whose prefix stands behind a tab in the place of the id, at new events, and when this is closed.

        The caller registers `watch_channel` in Redis, and asks again every few seconds.
        """
        listener = Listener(keys.prefix, what, wake)
        with self._lock:
            self._listeners.setdefault(id, []).append(listener)
        return listener

    def unlisten(self, id: str, listener: Listener) -> bool:  # noqa: A002
        """Stop that; return whether nothing listens to the job any more, so that the registration in Redis can go."""
        with self._lock:
            listeners = self._listeners.get(id, [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                self._listeners.pop(id, None)
            return not any(one.prefix == listener.prefix for one in listeners)

    @property
    def is_subscribed(self) -> bool:
        """False before `subscribe`, and when this is closed."""
        return self._thread is not None

    def subscribe(self) -> None:
        """Wait until the channel is subscribed; raises StoreUnavailable when that takes too long."""
        if not self._is_subscribed():
            self._subscribe(None)

    async def asubscribe(self) -> None:
        """Awaitable form of `subscribe`."""
        if not self._is_subscribed():
            await asyncio.get_running_loop().run_in_executor(None, self._subscribe, None)

    def stop_watching(self, keys: QueueKeys, id: str) -> None:  # noqa: A002
        """Remove the registration of a job that nothing here listens to any more."""
        with suppress(ConveyorError):
            self._client.run(operations.forget(keys, id, self.watch_channel), retry_for=0.0)
        self._wake_listeners(id, None)

    async def astop_watching(self, keys: QueueKeys, id: str) -> None:  # noqa: A002
        """Awaitable form of `stop_watching`."""
        with suppress(ConveyorError):
            await self._client.arun(operations.forget(keys, id, self.watch_channel), retry_for=0.0)
        self._wake_listeners(id, None)

    def _wake_listeners(self, id: str, what: str | None) -> None:  # noqa: A002
        """Wake what listens to changes of that kind; None: of every kind."""
        with self._lock:
            listeners = list(self._listeners.get(id, ()))
        for one in listeners:
            if what is None or one.what == what:
                one.wake()

    # -- the table of waiters -------------------------------------------------------------------------------------

    def _add_waiter(self, keys: QueueKeys, id: str, waiter: ResultWaiter) -> None:  # noqa: A002
        with self._lock:
            self._waiters.setdefault(id, []).append((keys.prefix, waiter))

    def _remove_waiter(self, keys: QueueKeys, id: str, waiter: ResultWaiter) -> bool:  # noqa: A002
        """Remove a waiter; return whether this process is still registered in Redis for the job, without a waiter."""
        with self._lock:
            waiters = self._waiters.get(id, [])
            if (keys.prefix, waiter) not in waiters:
                return False  # it was woken with the reply, and Redis had removed the registration before
            waiters.remove((keys.prefix, waiter))
            if not waiters:
                del self._waiters[id]
            return not any(prefix == keys.prefix for prefix, _ in waiters)

    def handle_message(self, data: bytes) -> None:
        """Wake the waiters for the job of a message."""
        id_, _, record = data.partition(b"\n")
        if id_[:1] == b"\t":  # it lives, and has changed
            self._wake_listeners(id_[1:].decode(), record.decode())
            return
        self._wake_listeners(id_.decode(), None)
        with self._lock:
            waiters = self._waiters.pop(id_.decode(), [])
            # Two queues may hold the same id of a caller's own: the message does not say which queue it is about.
            ambiguous = len({prefix for prefix, _ in waiters}) > 1
            if ambiguous:
                self._waiters[id_.decode()] = waiters
        for _, waiter in waiters:
            if not ambiguous:
                waiter.reply = ("result", record) if len(record) > 1 else ("ended", record or b"-")
            waiter.wake()

    def wake_all(self) -> None:
        """Make all waiters ask again, after the connection was lost."""
        with self._lock:
            waiters = [waiter for several in self._waiters.values() for _, waiter in several]
            wakes: list[Callable[[], object]] = [waiter.wake for waiter in waiters]
            wakes += [one.wake for several in self._listeners.values() for one in several]
        for wake in wakes:
            wake()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _is_subscribed(self) -> bool:
        thread = self._thread
        return thread is not None and thread.ready.is_set()

    def _subscribe(self, deadline: float | None) -> None:
        """Wait until the channel is subscribed, at most until *deadline*; raises StoreUnavailable when that takes too long."""
        with self._lock:
            if self._thread is None:
                self._thread = Subscription(
                    self._client.endpoint(self.channel), self.channel, on_message=self.handle_message,
                    on_subscribed=self.wake_all,
                )  # fmt: skip
            thread = self._thread
        most = self._client.retry_for + 1.0
        if not thread.ready.wait(most if deadline is None else min(most, deadline - time.monotonic())):
            raise unavailable(str(self._client.address), thread.error or "no answer")

    def close(self) -> None:
        """End the thread; waiters still ask every few seconds."""
        with self._lock:
            thread, self._thread = self._thread, None
            readers = [one for several in self._listeners.values() for one in several if one.what == EVENT_READER]
        if thread is not None:
            thread.close()
        for one in readers:
            one.wake()

    def forked(self) -> None:
        """Start with an empty table in a forked child."""
        self._reset()


class OutageTimer:
    """The time limits of a waiter: for what it waits for (None: without limit), and for an outage of Redis."""

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._outage_since: float | None = None
        self._was_reached = False

    def remaining(self) -> float | None:
        """Return the seconds until the time limit, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def next_check(self) -> float:
        """Return the seconds until the waiter asks again."""
        remaining = self.remaining()
        return CHECK_AGAIN if remaining is None else min(CHECK_AGAIN, remaining)

    def note_reply(self) -> None:
        """Note that Redis answered."""
        self._was_reached, self._outage_since = True, None

    def note_outage(self) -> None:
        """Note, inside an except clause, that Redis did not answer; re-raise when that has lasted too long."""
        now = time.monotonic()
        self._outage_since = self._outage_since or now
        over = self._deadline is not None and now >= self._deadline
        if not self._was_reached or over or now - self._outage_since > OUTAGE_LIMIT:
            raise  # noqa: PLE0704  the caller's except clause
