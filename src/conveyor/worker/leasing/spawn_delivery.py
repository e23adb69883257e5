"""Delivers the outbox of a queue: the jobs that its jobs spawned, and copies of what was published, each to its own queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.messaging import outbox
from conveyor.store.script import adrive_steps
from conveyor.store.transport import replies
from conveyor.worker.leasing.timers import BackgroundRun

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.store.keys import QueueKeys

log = logging.getLogger("conveyor.worker")
LONGEST_PAUSE = 5.0
"""Seconds before a delivery that was refused is tried again, at most."""


class SpawnDelivery(BackgroundRun):
    """The delivery of one queue's outbox. While the outbox is empty, nothing runs and nothing is sent."""

    def __init__(self, keys: QueueKeys, app: AppCore, on_emptied: Callable[[], None]) -> None:
        """
        Args:
            keys: those of the queue.
            app: the app that reaches all queues.
            on_emptied: called each time the outbox was emptied.
        """
        super().__init__()
        self._keys, self._app, self._on_emptied = keys, app, on_emptied
        self._is_requested = False

    def begin(self) -> None:
        """Deliver what lies in the outbox, now or right after the delivery that is under way."""
        self._is_requested = True
        self._begin()

    async def _run(self) -> None:
        await super()._run()
        self._on_emptied()

    async def _work(self) -> None:
        attempt = 0
        while self._is_requested:
            self._is_requested = False
            try:
                while await deliver(self._keys, self._app):
                    attempt = 0
            except ConveyorError as error:
                log.warning("queue %s: spawned jobs are not delivered yet, trying again: %s", self._keys.queue, error)
                await asyncio.sleep(replies.backoff(attempt + 5, cap=LONGEST_PAUSE))
                attempt += 1
                self._is_requested = True


async def deliver(keys: QueueKeys, app: AppCore) -> bool:
    """Deliver one batch of an outbox, as `outbox.deliver`."""
    return bool(await adrive_steps(outbox.deliver(app, keys)))
