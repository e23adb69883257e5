"""
Where a worker signs on: the places of each of its queues, and the number of partitions that it must share.

Registering anew after a lease was lost, however long the server refuses it.

Comparing what a worker believes it holds with what Redis believes, when the counts of a turn differ.

Finding the dead among the other workers of a queue, and returning what they held.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.messaging.leases import DeadWorkerDetector
from conveyor.store import operations
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.worker.logs import complain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.jobs.core import AppCore
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import TurnReply
    from conveyor.store.script import Call
    from conveyor.store.transport.async_connection import AsyncConnection


def weighted(app: AppCore, queues: Mapping[str, float] | None) -> dict[str, float]:
    """Return queue → weight: those asked for, else all that tasks name. Raises ConfigurationError where nothing could be done."""
    fed = [name for name, listed in app.plain_lists.items() if listed.task]
    own = [task.queue for task in app.definitions.values()]
    found = dict(queues) if queues else dict.fromkeys((*own, *fed), 1.0)
    for name in found:
        if name in app.plain_lists and name not in fed:
            raise ConfigurationError(
                f"The plain list '{name}' feeds no task, so a worker can do nothing with it. "
                f"Declare app.plain_list('{name}', task=…), or consume it with app.plain_list('{name}').consume()."
            )
    if not found:
        raise ConfigurationError("This worker has no queue: the app has no tasks and none was named with -q.")
    return found


async def served(app: AppCore, queue: str) -> list[QueueKeys]:
    """Return the keys of a queue, or of each of its partitions; raises ConfigurationError (E34) for another number of them."""
    if (listed := app.plain_lists.get(queue)) is not None:
        return [listed.keys]
    if (partitions := app.partitioned.get(queue)) is not None:
        await partitions.aagree()
        return list(partitions.keys)
    return [app.keys(queue)]


async def enrolled(app: AppCore, wire: AsyncConnection, queue: str, call: Call[int]) -> int:
    """Carry out a registration and return the server's time in ms; after Redis was emptied the number is agreed on anew."""
    try:
        return await wire.run(call, patience=None)
    except PartitionCountMismatch:
        if (partitions := app.partitioned.get(ids.logical(queue))) is None:
            raise
        await partitions.aclaim()
        return await wire.run(call, patience=None)


class Registrable(Protocol):
    """Who registers again."""

    queue: str

    gone: bool
    """It has left meanwhile."""

    async def register(self) -> None:
        """Take a fresh identity and tell Redis; raises ConveyorError."""


async def readmit(consumer: Registrable) -> None:
    """Register until it is done: a right that was taken away is waited for, loudly. Raises WrongPartitions."""
    while not consumer.gone:
        try:
            await consumer.register()
            break
        except PartitionCountMismatch:
            raise  # waiting does not mend it
        except ConveyorError as error:
            complain("registering on queue %s was refused: %s", consumer.queue, error)
            await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311


log = logging.getLogger("conveyor.worker")


class LeaseHolder(Protocol):
    """Who holds leases of one queue."""

    keys: QueueKeys
    wire: AsyncConnection
    identity: str

    @property
    def held(self) -> Collection[str]: ...


async def differences(books: LeaseHolder) -> tuple[list[str], list[str]]:
    """Return the ids that Redis does not list as held here, and those it lists besides; none of them when it refuses to tell."""
    try:
        listed = await books.wire.run(operations.held_ids(books.keys, books.identity), patience=None)
    except ConveyorError as error:
        log.warning("could not reconcile queue %s: %s", books.keys.queue, error)
        return [], []
    known = set(listed)
    unknown = [id_ for id_ in known if id_ not in books.held]
    if unknown:
        log.warning("queue %s: giving back %d leases we never learned of", books.keys.queue, len(unknown))
    return [id_ for id_ in books.held if id_ not in known], unknown


NEARLY = 0.3
"""A look that is due so soon, in seconds, goes with the turn that is made anyway."""


class Reaper:
    """Looks a few times a lease, and reaps by two looks (`lessee.Suspects`), never by the clock alone."""

    def __init__(self, keys: QueueKeys, wire: AsyncConnection, lease_ms: int) -> None:
        """Take the queue, the wire, and the lease in ms."""
        self._keys, self._wire = keys, wire
        self._suspects = DeadWorkerDetector(lease_ms)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_due(self) -> bool:
        """True when the next turn should look."""
        return self._suspects.next_look(monotonic()) <= NEARLY

    def look(self, turn: TurnReply, me: str) -> None:
        """Take what a turn with the flag ``l`` saw."""
        for worker, end in self._suspects.look(turn.now, turn.overdue, monotonic()):
            if worker != me:
                task = asyncio.get_running_loop().create_task(self._reap(worker, end))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _reap(self, worker: str, end: int) -> None:
        try:
            count = await self._wire.run(operations.reap(self._keys, worker, end=end), patience=5.0)
        except ConveyorError as error:
            log.warning("could not reap a dead worker of queue %s: %s", self._keys.queue, error)
            return
        if count >= 0:
            log.warning("queue %s: worker %s is dead; returned %d jobs", self._keys.queue, worker[:8], count)
