"""Moves raw entries of a plain list into the queue while a consumer is idle."""

from __future__ import annotations

import asyncio
import threading

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
        self._has_stopped = False
        self._seconds = 0.0
        self._is_refused = False
        self._is_moving = False
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> float:
        """Wait up to *seconds* for an entry in the background; return the seconds the caller should wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._move, name="conveyor-mover", daemon=True)
            self._thread.start()
        self._seconds = seconds
        self._work.set()
        return min(seconds, POLL) if self._is_refused else seconds

    def end(self) -> None:
        """Stop waiting while the consumer is busy. An entry already moved is kept."""
        self._work.clear()
        if self._is_moving:
            self._waiter.close()

    def stop(self) -> None:
        """Stop for good. Entries in the intake list stay there for any consumer's next turn."""
        self._has_stopped = True
        self._work.set()
        self._waiter.end()

    def _move(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            if self._has_stopped:
                break
            try:
                assert self._keys.foreign is not None
                self._is_moving = True
                try:
                    moved = self._waiter.wait_and_move(self._keys.foreign, self._keys.intake, self._seconds)
                finally:
                    self._is_moving = False
                self._is_refused = False
                if moved:
                    self._client.announce(self._keys)
                    self._connection.run(intake(self._keys, 1), retry_for=0)
            except ConveyorError:
                self._is_refused = True  # Redis is full or away: the consumer looks by itself, or reports it
        self._connection.close()
        self._waiter.close()


class AsyncListMover:
    """Tasks that do on an event loop what `ListMover` does in a thread."""

    def __init__(self, client: Client, keys: QueueKeys) -> None:
        self._client, self._keys = client, keys
        self._waiter: AsyncWakeupWaiter | None = None
        self._is_refused = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, seconds: float) -> float:
        """Wait up to *seconds* for an entry in the background; return the seconds the caller should wait."""
        self._task = asyncio.get_running_loop().create_task(self._move(seconds))
        return min(seconds, POLL) if self._is_refused else seconds

    def end(self) -> None:
        """Stop waiting while the consumer is busy. An entry already moved is kept."""
        task, self._task = self._task, None
        if task is not None and not task.done() and self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.close()

    async def _move(self, seconds: float) -> None:
        assert self._keys.foreign is not None
        waiter = self._waiter = self._waiter or AsyncWakeupWaiter(
            self._client.endpoint(self._keys), self._client.timeout
        )
        try:
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
