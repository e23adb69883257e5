"""A thread and an asyncio task that sleep until another thread wakes them. A wake-up that comes earlier ends the next sleep."""

from __future__ import annotations

import asyncio
import threading


class SleepingThread:
    """The thread that made it."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """End its sleep."""
        try:
            self._lock.release()
        except RuntimeError:  # it was woken before
            pass

    def sleep(self, seconds: float = -1) -> None:
        """Sleep until it is woken, *seconds* at most; -1: without a limit."""
        self._lock.acquire(timeout=seconds)


class SleepingTask:
    """A task of the event loop that runs here."""

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def wake(self) -> None:
        """End its sleep; callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed, and the task with it
            pass

    async def sleep(self, seconds: float | None = None) -> None:
        """Sleep until it is woken, *seconds* at most; None: without a limit."""
        timer = None if seconds is None else self._loop.call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._event.clear()
