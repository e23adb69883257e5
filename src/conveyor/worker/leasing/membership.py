"""
A worker among the workers of a queue.

It registers and registers anew after its lease was lost, compares what it holds with what Redis says, and finds the dead
among the others and returns what they held.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.messaging.leases import DeadWorkerDetector
from conveyor.store import operations
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import adrive
from conveyor.store.transport.replies import LONGEST_PAUSE
from conveyor.worker.logs import log_repeated_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.jobs.core import AppCore
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Registration, TurnReply
    from conveyor.store.script import Call
    from conveyor.store.transport.async_connection import AsyncConnection

log = logging.getLogger("conveyor.worker")
LOOK_EARLY = 0.3
"""Seconds: a look that is due so soon goes with the turn that is made anyway."""


def longest_pause(lease_ms: int) -> float:
    """Return the longest pause in seconds before a turn is repeated: a lease must be renewed soon after the server is well."""
    return min(LONGEST_PAUSE, lease_ms / 8000)


def queue_weights(app: AppCore, queues: Mapping[str, float] | None) -> dict[str, float]:
    """
    Return queue → weight: those of *queues*, else all that tasks name.

    Raises ConfigurationError for a plain list that feeds no task, and where there is no queue at all.
    """
    fed_lists = [name for name, listed in app.plain_lists.items() if listed.task]
    task_queues = [task.queue for task in app.definitions.values()]
    weights = dict(queues) if queues else dict.fromkeys((*task_queues, *fed_lists), 1.0)
    for name in weights:
        if name not in app.plain_lists:
            ids.queue_name(ids.logical(name) if isinstance(name, str) else name)
        elif name not in fed_lists:
            raise ConfigurationError(
                f"The plain list '{name}' feeds no task, so a worker can do nothing with it. "
                f"Declare app.plain_list('{name}', task=…), or consume it with app.plain_list('{name}').consume()."
            )
    if not weights:
        raise ConfigurationError(
            "This worker has no queue: the app has no tasks, and no queue was named (-q, or queues= of app.worker)."
        )
    return weights


async def partition_keys(app: AppCore, queue: str) -> list[QueueKeys]:
    """Return the keys of a queue, or of each of its partitions; raises ConfigurationError (E34) if their number differs."""
    if (listed := app.plain_lists.get(queue)) is not None:
        return [listed.keys]
    if (partitions := app.partitioned.get(queue)) is not None:
        await partitions.aagree()
        return list(partitions.keys)
    return [app.keys(queue)]


async def register(app: AppCore, connection: AsyncConnection, keys: QueueKeys, call: Call[Registration]) -> int:
    """
    Carry out a registration and return the server's time in ms.

    After Redis was emptied, agree anew on the partitions, and make the queue known again. The limits are declared before the
    worker is known, and so before its first lease: the newest worker's numbers hold. Raises ConfigurationError.
    """
    limits, run = app.limits.get(ids.logical(keys.queue)), partial(connection.run, retry_for=None)
    if limits is not None:
        await adrive(limits.declare(keys, anew=True), run)
    try:
        registration = await run(call)
    except PartitionCountMismatch:
        if (partitions := app.partitioned.get(ids.logical(keys.queue))) is None:
            raise
        await partitions.areclaim()
        registration = await run(call)
    if registration.new_queue:
        await app.client.aannounce_again(keys)
    return registration.now


class Registrable(Protocol):
    """A consumer that can register again."""

    queue: str

    has_left: bool
    """Whether it has left meanwhile."""

    async def register(self) -> None:
        """Register under a new identity; raises ConveyorError."""


async def register_again(consumer: Registrable) -> None:
    """
    Register again, retrying until it succeeds. A missing ACL permission is logged once a minute.

    Raises PartitionCountMismatch.
    """
    while not consumer.has_left:
        try:
            await consumer.register()
            break
        except PartitionCountMismatch:
            raise  # waiting does not change it
        except ConveyorError as error:
            log_repeated_error("queue %s: registering was refused: %s", consumer.queue, error)
            await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311


class LeaseHolder(Protocol):
    """A consumer that holds leases of one queue."""

    keys: QueueKeys
    connection: AsyncConnection
    identity: str

    @property
    def held(self) -> Collection[str]: ...


async def differences(holder: LeaseHolder) -> tuple[list[str], list[str]]:
    """
    Return the ids that Redis does not list as held here, and those it lists besides, the youngest first.

    Both are empty when Redis refuses to tell.
    """
    try:
        listed = await holder.connection.run(operations.held_ids(holder.keys, holder.identity), retry_for=None)
    except ConveyorError as error:
        log.warning("queue %s: leases could not be compared: %s", holder.keys.queue, error)
        return [], []
    known = set(listed)
    unknown = [id_ for id_ in reversed(listed) if id_ not in holder.held]  # each goes to the front
    if unknown:
        log.warning("queue %s: giving back %d leases whose jobs never arrived here", holder.keys.queue, len(unknown))
    return [id_ for id_ in holder.held if id_ not in known], unknown


class Reaper:
    """Looks for dead workers of one queue a few times per lease, and returns what they held. See `DeadWorkerDetector`."""

    def __init__(self, keys: QueueKeys, connection: AsyncConnection, lease_ms: int) -> None:
        self._keys, self._connection = keys, connection
        self._detector = DeadWorkerDetector(lease_ms)
        self._tasks: set[asyncio.Task[None]] = set()
        self.due_at = 0.0
        """From when on (monotonic) the next turn should look."""

    @property
    def has_suspects(self) -> bool:
        """True while a worker is listed that may be dead: it takes another look to decide."""
        return self._detector.has_suspects

    def look(self, turn: TurnReply, me: str) -> None:
        """Note the workers that a turn with the flag ``l`` listed, and reap the dead ones; *me* is never one."""
        now = monotonic()
        dead = self._detector.look(turn.now, turn.overdue, now)
        self.due_at = now + self._detector.next_look(now) - LOOK_EARLY
        for worker, end in dead:
            if worker != me:
                task = asyncio.get_running_loop().create_task(self._reap(worker, end))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _reap(self, worker: str, end: int) -> None:
        try:
            call = operations.reap(self._keys, worker, end=end, cause=operations.GAVE_NO_SIGN)
            count = await self._connection.run(call, retry_for=5.0)
        except ConveyorError as error:
            log.warning("queue %s: the jobs of a dead worker could not be returned: %s", self._keys.queue, error)
            return
        if count >= 0:
            log.warning("queue %s: worker %s is dead; returned %d jobs", self._keys.queue, worker[:8], count)
