"""Registering anew after a lease was lost, however long the server refuses it."""

from __future__ import annotations

import asyncio
import random
from typing import Protocol

from conveyor.errors import ConveyorError
from conveyor.store.partitioning import WrongPartitions
from conveyor.worker.log import complain


class Refugee(Protocol):
    """Who registers again."""

    queue: str

    gone: bool
    """It has left meanwhile."""

    async def register(self) -> None:
        """Take a fresh identity and tell Redis; raises ConveyorError."""


async def readmit(consumer: Refugee) -> None:
    """Register until it is done: a right that was taken away is waited for, loudly. Raises WrongPartitions."""
    while not consumer.gone:
        try:
            await consumer.register()
            break
        except WrongPartitions:
            raise  # waiting does not mend it
        except ConveyorError as error:
            complain("registering on queue %s was refused: %s", consumer.queue, error)
            await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311
