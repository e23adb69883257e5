"""Delivers the outbox of a queue: the jobs that its jobs spawned, each to its own queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from conveyor import ids
from conveyor.errors import ConveyorError
from conveyor.jobs import spawn_outbox
from conveyor.store.operations import NewQueueIds, StalePush
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Entry
    from conveyor.store.script import Call

log = logging.getLogger("conveyor.worker")
RETRY_FOR = 5.0
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
    """Deliver one batch of an outbox; return whether there was one. Raises what the pushes raise; then the batch stays."""
    client = app.client
    batch = await client.arun(spawn_outbox.take(keys), retry_for=RETRY_FOR)
    if batch is None:
        return False
    failed: ConveyorError | None = None
    for queue, entries in batch.parts.items():
        try:
            for call in await _calls(keys, app, batch.number, queue, entries):
                await _push(app, queue, call)
        except _StaleDelivery as stale:
            # Others have delivered and trimmed this batch, and a newer one. Or a failover took the source back to a
            # number that this receiver has seen: then the same batch gets a higher one.
            last_seen = await client.aexecute("GET", stale.inbox, key=stale.inbox)
            if isinstance(last_seen, bytes):
                least = int(last_seen.partition(b"\n")[0]) + 1
                await client.arun(spawn_outbox.take(keys, replacing=batch.number, least=least), retry_for=RETRY_FOR)
            return True
        except ConveyorError as error:
            failed = error  # the others need not wait for it; the repeat finds theirs done
    if failed is not None:
        raise failed
    await client.arun(spawn_outbox.trim(keys, batch.number), retry_for=RETRY_FOR)
    return True


class _StaleDelivery(Exception):
    """A receiver has seen a higher number; *inbox* is the key that holds it."""

    def __init__(self, inbox: str) -> None:
        super().__init__(inbox)
        self.inbox = inbox


async def _calls(
    source: QueueKeys, app: AppCore, number: int, queue: str, entries: list[Entry]
) -> list[Call[list[str]]]:
    """Return the pushes of a part: one, unless it was written for a partition that does not exist (any more, or yet)."""
    partitions = app.partitioned.get(ids.logical(queue))
    if partitions is None:
        target = app.keys(queue if queue in app.plain_lists else ids.logical(queue))
        await app.client.aannounce(target)
        if target.queue == queue:
            return [spawn_outbox.deliver(source, target, number, entries)]
        targets = {}
    else:
        targets = {keys.queue: keys for keys in partitions.keys}
    if queue in targets:
        return [spawn_outbox.deliver(source, targets[queue], number, entries)]
    if await _has_delivered(source, app, number, queue):
        return []
    if partitions is None:
        return [spawn_outbox.deliver(source, target, number, entries, written_for=queue)]
    by_queue: dict[str, list[Entry]] = {}
    for entry in entries:
        # By its id where it has no key: a repeat must find the same partition.
        at = partitions.pick(unique=entry.unique, id=entry.id)
        by_queue.setdefault(partitions.keys[at].queue, []).append(entry)
    return [
        spawn_outbox.deliver(source, targets[name], number, part, written_for=queue) for name, part in by_queue.items()
    ]


async def _has_delivered(source: QueueKeys, app: AppCore, number: int, queue: str) -> bool:
    """Tell whether a partition that is not used any more accepted its part of batch *number*, before that was trimmed."""
    inbox = app.keys(queue).inbox(source.queue)
    seen = await app.client.aexecute("GET", inbox, key=inbox, retry_for=RETRY_FOR)
    return isinstance(seen, bytes) and seen.startswith(f"{number}\nok".encode())


async def _push(app: AppCore, queue: str, call: Call[list[str]]) -> None:
    partitions = app.partitioned.get(ids.logical(queue))
    try:
        if partitions is None:
            stored = await app.client.arun(call, retry_for=RETRY_FOR)
        else:
            stored = await partitions.arun_agreed(lambda: app.client.arun(call, retry_for=RETRY_FOR))
        if isinstance(stored, NewQueueIds):
            await app.client.aannounce_again(app.keys(queue if queue in app.plain_lists else ids.logical(queue)))
    except StalePush:
        raise _StaleDelivery(call.keys[0]) from None
