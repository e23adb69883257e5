"""Moves raw entries of a plain list into the queue while a consumer is idle."""

from __future__ import annotations

import asyncio
import threading
import time

from conveyor.errors import ConveyorError
from conveyor.ids import new_id
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.wakeup import AsyncWakeupWaiter, WakeupWaiter

POLL = 1.0
"""Seconds between looks at the list while Redis is too full to move an entry."""


def intake(keys: QueueKeys, want: int) -> Call[int]:
    """Return the call that moves up to *want* raw entries into the queue, under fresh ids."""
    return operations.list_intake(keys, want, new_id()[:18])  # the script counts the last four characters


class ListMover:
    """A thread that moves one entry at a time into the queue, which wakes the consumer."""

    def __init__(self, client: Client, keys: QueueKeys) -> None:
        self._client, self._keys = client, keys
        self._waiter = WakeupWaiter(client.endpoint(keys), client.timeout)
        self._connection = Connection(client.endpoint(keys))
        self._work = SignalSafeEvent()
        self._has_stopped = self._is_wanted = self._is_moving = self._is_refused = False
        self._until = 0.0
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> float:
        """Wait up to *seconds* for an entry in the background; return the seconds the caller should wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="conveyor-mover", daemon=True)
            self._thread.start()
        self._until = time.monotonic() + seconds
        self._is_wanted = True
        self._work.set()
        return min(seconds, POLL) if self._is_refused else seconds

    def end(self) -> None:
        """Stop waiting while the consumer is busy. An entry already moved is kept."""
        self._is_wanted = False
        if self._is_moving:
            self._waiter.interrupt()

    def stop(self) -> None:
        """Stop for good. Entries in the intake list stay there for any consumer's next turn."""
        self._has_stopped = True
        self._is_wanted = False
        self._work.set()
        self._waiter.end()

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            if self._has_stopped:
                break
            try:
                if self._move():
                    self._client.announce(self._keys)
                    self._connection.run(intake(self._keys, 1), retry_for=0)
            except ConveyorError:
                self._is_refused = True  # Redis is full or away: the consumer looks by itself, or reports it
        self._connection.close()
        self._waiter.close()

    def _move(self) -> bool:
        """Move one entry while the consumer is idle, also where the connection breaks meanwhile; tell whether one came."""
        assert self._keys.foreign is not None
        self._is_moving = True  # first, and then the look: `end` first says that it is not wanted, and then looks
        try:
            while self._is_wanted and (seconds := self._until - time.monotonic()) > 0:
                moved = self._waiter.wait_and_move(self._keys.foreign, self._keys.intake, seconds)
                self._is_refused = False
                if moved:
                    return True
        finally:
            self._is_moving = False
        return False


class AsyncListMover:
    """Tasks that do on an event loop what `ListMover` does in a thread."""

    def __init__(self, client: Client, keys: QueueKeys) -> None:
        self._client, self._keys = client, keys
        self._waiter: AsyncWakeupWaiter | None = None
        self._is_refused = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, seconds: float) -> float:
        """Wait up to *seconds* for an entry in the background; return the seconds the caller should wait."""
        if self._waiter is None:
            self._waiter = AsyncWakeupWaiter(self._client.endpoint(self._keys), self._client.timeout)
        self._task = asyncio.get_running_loop().create_task(self._move(self._waiter, seconds))
        return min(seconds, POLL) if self._is_refused else seconds

    def end(self) -> None:
        """Stop waiting while the consumer is busy. An entry already moved is kept."""
        task, self._task = self._task, None
        if task is not None and not task.done() and self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.close()

    async def _move(self, waiter: AsyncWakeupWaiter, seconds: float) -> None:
        assert self._keys.foreign is not None
        until, moved = time.monotonic() + seconds, False
        try:
            # Again where the connection broke; `end` takes the waiter away.
            while not moved and waiter is self._waiter and (seconds := until - time.monotonic()) > 0:
                moved = await waiter.wait_and_move(self._keys.foreign, self._keys.intake, seconds)
                self._is_refused = False
            if moved:
                await self._client.aannounce(self._keys)
                await self._client.arun(intake(self._keys, 1), retry_for=0)
        except ConveyorError:
            self._is_refused = True

    def stop(self) -> None:
        """Stop for good, as `ListMover.stop`."""
        self.end()
        if self._waiter is not None:
            self._waiter.close()
