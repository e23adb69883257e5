"""For a plain list: what waits for raw entries while a consumer is idle, in a thread or on a loop."""

from __future__ import annotations

import asyncio
import threading

from conveyor.errors import ConveyorError
from conveyor.ids import new_id
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.wakeup import AsyncWakeupWaiter, WakeupWaiter

POLL = 1.0
"""Seconds between looks at the list while Redis is too full to move an entry."""


def intake(keys: QueueKeys, want: int) -> Call[int]:
    """Return the call that moves up to *want* raw entries into the queue, under fresh ids."""
    return operations.list_intake(keys, want, new_id()[:18])  # the script counts the last four characters


class ListMover:
    """Moves one entry at a time to the intake list and from there into the queue, which wakes the consumer."""

    def __init__(self, client: Client, keys: QueueKeys) -> None:
        """Starts its thread when it is first needed."""
        self._client, self._keys = client, keys
        self._known = False
        self._bell = WakeupWaiter(client.endpoint(keys))
        self._connection = Connection(client.endpoint(keys))
        self._begin = threading.Event()
        self._stopped = False
        self._seconds = 0.0
        self._refused = False
        self._moving = False
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> float:
        """Wait for an entry in the background, up to *seconds*; return how long the caller should wait beside it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._move, name="conveyor-mover", daemon=True)
            self._thread.start()
        self._seconds = seconds
        self._begin.set()
        return min(seconds, POLL) if self._refused else seconds

    def end(self) -> None:
        """Wait no longer: the consumer is busy, and others may want what comes. An entry already moved is kept."""
        self._begin.clear()
        if self._moving:
            self._bell.close()

    def stop(self) -> None:
        """Stop waiting; what arrived meanwhile stays in the intake list, for any consumer's next turn."""
        self._stopped = True
        self._begin.set()
        self._bell.close()

    def _move(self) -> None:
        while True:
            self._begin.wait()
            self._begin.clear()
            if self._stopped:
                break
            try:
                assert self._keys.foreign is not None
                if not self._known:
                    self._client.announce(self._keys)
                    self._known = True
                self._moving = True
                try:
                    moved = self._bell.move(self._keys.foreign, self._keys.intake, self._seconds)
                finally:
                    self._moving = False
                self._refused = False
                if moved:
                    self._connection.run(intake(self._keys, 1), patience=0)
            except ConveyorError:
                self._refused = True  # Redis is full or away: the consumer looks by itself, or reports it
        self._connection.close()
        self._bell.close()


class AsyncListMover:
    """The same as a task of an event loop."""

    def __init__(self, client: Client, keys: QueueKeys) -> None:
        """Starts a task whenever the consumer is idle."""
        self._client, self._keys = client, keys
        self._bell: AsyncWakeupWaiter | None = None
        self._refused = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, seconds: float) -> float:
        """Wait for an entry in the background, up to *seconds*; return how long the caller should wait beside it."""
        self._task = asyncio.get_running_loop().create_task(self._move(seconds))
        return min(seconds, POLL) if self._refused else seconds

    def end(self) -> None:
        """Wait no longer; an entry already moved is kept for any consumer's next turn."""
        task, self._task = self._task, None
        if task is not None and not task.done() and self._bell is not None:
            bell, self._bell = self._bell, None
            bell.close()

    async def _move(self, seconds: float) -> None:
        assert self._keys.foreign is not None
        bell = self._bell = self._bell or AsyncWakeupWaiter(self._client.endpoint(self._keys))
        try:
            await self._client.aannounce(self._keys)
            moved = await bell.move(self._keys.foreign, self._keys.intake, seconds)
            self._refused = False
            if moved:
                await self._client.arun(intake(self._keys, 1), patience=0)
        except ConveyorError:
            self._refused = True

    def stop(self) -> None:
        """Stop waiting."""
        self.end()
        if self._bell is not None:
            self._bell.close()
