"""Delivers the outbox of a queue: the jobs that its jobs spawned, and copies of what was published, each to its own queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.messaging import outbox
from conveyor.store.client.programs import adrive_steps
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.store.keys import QueueKeys

log = logging.getLogger("conveyor.worker")
LONGEST_PAUSE = 5.0
"""Seconds before a delivery that was refused is tried again, at most."""


class SpawnDelivery:
    """The delivery of one queue's outbox. While the outbox is empty, nothing runs and nothing is sent."""

    def __init__(self, keys: QueueKeys, app: AppCore, on_emptied: Callable[[], None]) -> None:
        """
        Args:
            keys: those of the queue.
            app: the app that reaches all queues.
            on_emptied: called each time the outbox was emptied.
        """
        self._keys, self._app, self._on_emptied = keys, app, on_emptied
        self._task: asyncio.Task[None] | None = None
        self._is_requested = False

    @property
    def busy(self) -> bool:
        """True while something may be left to deliver."""
        return self._task is not None

    def begin(self) -> None:
        """Deliver what lies in the outbox, now or right after the delivery that is under way."""
        self._is_requested = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def finish(self, seconds: float) -> None:
        """Wait up to *seconds* for what is under way. Any worker of the queue delivers what is left."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        attempt = 0
        try:
            while self._is_requested:
                self._is_requested = False
                try:
                    while await deliver(self._keys, self._app):
                        attempt = 0
                except ConveyorError as error:
                    log.warning(
                        "queue %s: spawned jobs are not delivered yet, trying again: %s", self._keys.queue, error
                    )
                    await asyncio.sleep(replies.backoff(attempt + 5, cap=LONGEST_PAUSE))
                    attempt += 1
                    self._is_requested = True
        finally:
            self._task = None
        self._on_emptied()


async def deliver(keys: QueueKeys, app: AppCore) -> bool:
    """Deliver one batch of an outbox, as `outbox.deliver`."""
    return bool(await adrive_steps(outbox.deliver(app, keys)))
