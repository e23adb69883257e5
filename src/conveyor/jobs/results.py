"""
Waiting for the end of jobs by push: one subscribed connection and one thread for all waiters of an app.

A waiter registers in Redis (which answers at once when the job has ended) and then sleeps until the channel of its
process says how the job ended. Since a message can be missed, it asks again every few seconds, and whenever the
connection was lost in between.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from conveyor.errors import StoreUnavailable
from conveyor.ids import new_identity
from conveyor.store import operations
from conveyor.store.fork_safety import on_fork
from conveyor.store.keys import QueueKeys, reply_channel
from conveyor.store.transport.replies import pause, unreachable

if TYPE_CHECKING:
    from conveyor.store.client.client import Client

Answer = tuple[str, bytes]
"""What await_result.lua says: result | dead | gone | waiting, and its bytes."""

ASK_AGAIN = 5.0
"""Seconds after which a waiter asks again, in case its message was missed."""
PING_AFTER, PONG_WITHIN = 15.0, 5.0
"""Seconds of silence after which the server is asked whether it is there, and seconds it may take to say so."""
OUTAGE = 60.0
"""Seconds Redis may be away while somebody waits without a time limit."""

_log = logging.getLogger("conveyor.result")


class ResultWaiter:
    """One call that waits; `wake` lets it look at `answer`, None meaning that it should ask again."""

    __slots__ = ("answer", "wake")

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.answer: Answer | None = None


class ResultSubscriber:
    """The waiters of one app in this process, and the thread that wakes them."""

    def __init__(self, client: Client) -> None:
        """Open nothing yet."""
        self._client = client
        self._reset()
        on_fork(self)

    def _reset(self) -> None:
        self.channel = reply_channel(self._client.namespace, new_identity())
        self._lock = threading.Lock()
        self._waiters: dict[str, list[tuple[str, ResultWaiter]]] = {}
        self._listener: SubscriptionThread | None = None

    # -- waiting --------------------------------------------------------------------------------------------------

    def wait(self, keys: QueueKeys, id: str, timeout: float | None) -> Answer | None:  # noqa: A002
        """Return how the job ended, None when it had not after *timeout* seconds (None: wait for ever)."""
        clock = _Deadline(timeout)
        if clock.remaining() == 0.0 or not self._listening():
            answer = self._client.run(operations.await_result(keys, id, ""))
            if answer[0] != "waiting" or clock.remaining() == 0.0:
                return answer if answer[0] != "waiting" else None
            self._listen()
        gate = threading.Lock()
        gate.acquire()
        waiter = ResultWaiter(partial(_release, gate))
        self._add(keys, id, waiter)
        call = operations.await_result(keys, id, self.channel)
        try:
            while True:
                try:
                    answer = self._client.run(call)
                except StoreUnavailable:
                    clock.outage()
                else:
                    clock.reached()
                    if answer[0] != "waiting":
                        return answer
                gate.acquire(timeout=clock.nap())
                if waiter.answer is not None:
                    return waiter.answer
                if clock.remaining() == 0.0:
                    return None
        finally:
            if self._remove(keys, id, waiter):
                self._forget(keys, id)

    async def await_(self, keys: QueueKeys, id: str, timeout: float | None) -> Answer | None:  # noqa: A002, ASYNC109
        """Do the same without blocking the event loop."""
        clock = _Deadline(timeout)
        if clock.remaining() == 0.0 or not self._listening():
            answer = await self._client.arun(operations.await_result(keys, id, ""))
            if answer[0] != "waiting" or clock.remaining() == 0.0:
                return answer if answer[0] != "waiting" else None
            await asyncio.get_running_loop().run_in_executor(None, self._listen)
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        waiter = ResultWaiter(lambda: _call_soon(loop, event.set))
        self._add(keys, id, waiter)
        call = operations.await_result(keys, id, self.channel)
        try:
            while True:
                event.clear()
                try:
                    answer = await self._client.arun(call)
                except StoreUnavailable:
                    clock.outage()
                else:
                    clock.reached()
                    if answer[0] != "waiting":
                        return answer
                if waiter.answer is None:
                    timer = loop.call_later(clock.nap(), event.set)
                    try:
                        await event.wait()
                    finally:
                        timer.cancel()
                if waiter.answer is not None:
                    return waiter.answer
                if clock.remaining() == 0.0:
                    return None
        finally:
            if self._remove(keys, id, waiter):
                await self._aforget(keys, id)

    def _forget(self, keys: QueueKeys, id: str) -> None:  # noqa: A002
        try:
            self._client.run(operations.forget(keys, id, self.channel), patience=0.0)
        except StoreUnavailable:
            _log.debug("could not unregister from %s; the job's end removes the entry", id)
        self._wake(id)

    async def _aforget(self, keys: QueueKeys, id: str) -> None:  # noqa: A002
        try:
            await self._client.arun(operations.forget(keys, id, self.channel), patience=0.0)
        except StoreUnavailable:
            _log.debug("could not unregister from %s; the job's end removes the entry", id)
        self._wake(id)

    def _wake(self, id: str) -> None:  # noqa: A002
        """Let those ask again who came while the last one left: its leaving may have struck them off."""
        with self._lock:
            found = list(self._waiters.get(id, ()))
        for _, waiter in found:
            waiter.wake()

    # -- the table of waiters -------------------------------------------------------------------------------------

    def _add(self, keys: QueueKeys, id: str, waiter: ResultWaiter) -> None:  # noqa: A002
        with self._lock:
            self._waiters.setdefault(id, []).append((keys.prefix, waiter))

    def _remove(self, keys: QueueKeys, id: str, waiter: ResultWaiter) -> bool:  # noqa: A002
        """Take a waiter out; return whether Redis still believes that somebody here waits for this job."""
        with self._lock:
            found = self._waiters.get(id, [])
            if (keys.prefix, waiter) not in found:
                return False  # it was woken with the answer, and Redis had struck it off before
            found.remove((keys.prefix, waiter))
            if not found:
                del self._waiters[id]
            return not any(prefix == keys.prefix for prefix, _ in found)

    def hear(self, data: bytes) -> None:
        """Wake those who wait for the job a message is about."""
        id_, _, record = data.partition(b"\n")
        with self._lock:
            found = self._waiters.pop(id_.decode(), [])
            # Two queues may hold the same id of a caller's own: the message does not say which of them it is about.
            ambiguous = len({prefix for prefix, _ in found}) > 1
            if ambiguous:
                self._waiters[id_.decode()] = found
        for _, waiter in found:
            if not ambiguous:
                waiter.answer = ("result", record) if record else ("gone", b"done")
            waiter.wake()

    def ask_again(self) -> None:
        """Let all waiters ask for themselves, after the connection was lost."""
        with self._lock:
            waiters = [waiter for found in self._waiters.values() for _, waiter in found]
        for waiter in waiters:
            waiter.wake()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        listener = self._listener
        return listener is not None and listener.ready.is_set()

    def _listen(self) -> None:
        """Return when the channel is subscribed; raises StoreUnavailable when that takes too long."""
        with self._lock:
            if self._listener is None:
                self._listener = SubscriptionThread(self, self._client)
            listener = self._listener
        if not listener.ready.wait(self._client.patience + 1.0):
            raise unreachable(str(self._client.address), listener.error or "no answer")

    def close(self) -> None:
        """End the thread; waiters go on asking every few seconds."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def forked(self) -> None:
        """Start anew in a forked child."""
        self._reset()


class SubscriptionThread:
    """The thread that reads the channel; it connects again, for ever, until it is closed."""

    def __init__(self, replies: ResultSubscriber, client: Client) -> None:
        self.ready = threading.Event()
        self.error: Exception | None = None
        self._replies = replies
        self._place = client.endpoint(replies.channel)
        self._closed = threading.Event()
        self._raw: Any = None  # a redis.Connection, whose methods have no types
        self._thread = threading.Thread(target=self._run, name="conveyor-replies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closed.set()
        raw = self._raw
        if raw is not None:
            _hang_up(raw)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        attempt = 0
        while not self._closed.is_set():
            try:
                self._read()
            except Exception as error:
                if self.ready.is_set():
                    attempt = 0
                    self.ready.clear()
                    if not self._closed.is_set():
                        _log.debug("lost the connection for results: %s", error)
                self.error = error
                self._closed.wait(pause(attempt))
                attempt += 1
            finally:
                raw, self._raw = self._raw, None
                if raw is not None:
                    raw.disconnect()

    def _read(self) -> None:
        raw = self._raw = self._place.open(read_timeout=PONG_WITHIN)
        if self._closed.is_set():
            return
        raw.send_command("SUBSCRIBE", self._replies.channel)
        raw.read_response()
        self.ready.set()
        self._replies.ask_again()
        while True:
            if not raw.can_read(timeout=PING_AFTER):
                raw.send_command("PING", check_health=False)  # else a server that died silently would never be missed
                if not raw.can_read(timeout=PONG_WITHIN):
                    raise TimeoutError("no answer")
            message = raw.read_response()
            if isinstance(message, list) and message[0] == b"message":
                self._replies.hear(message[2])


class _Deadline:
    """How long a waiter still waits, and how long it bears Redis being away."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._away_since: float | None = None
        self._asked = False

    def remaining(self) -> float | None:
        """Return the seconds left, None for ever."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def nap(self) -> float:
        """Return how long to sleep before asking again."""
        remaining = self.remaining()
        return ASK_AGAIN if remaining is None else min(ASK_AGAIN, remaining)

    def reached(self) -> None:
        """Note that Redis answered."""
        self._asked, self._away_since = True, None

    def outage(self) -> None:
        """Note, inside an except clause, that it did not; passes the error on when that has lasted too long."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        over = self._deadline is not None and now >= self._deadline
        if not self._asked or over or now - self._away_since > OUTAGE:
            raise  # noqa: PLE0704  the caller's except clause


def _release(gate: threading.Lock) -> None:
    try:
        gate.release()
    except RuntimeError:  # somebody else released it between the look and now
        pass


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed, so nobody waits any more
        pass


def _hang_up(raw: Any) -> None:
    import socket

    found = raw._sock  # noqa: SLF001  shutting it down is what wakes a thread that reads from it
    if found is not None:
        try:
            found.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
