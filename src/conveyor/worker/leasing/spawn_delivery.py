"""Emptying the outbox of a queue: what its jobs spawned goes to where it belongs, whoever settled them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from conveyor import ids
from conveyor.errors import ConveyorError
from conveyor.jobs import spawn_outbox
from conveyor.store.operations import StalePush
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from conveyor.messaging.partitions import Partitions
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Entry
    from conveyor.store.script import Call

    class Home(Protocol):
        """What a delivery needs of the app."""

        @property
        def client(self) -> Client: ...
        @property
        def partitioned(self) -> Mapping[str, Partitions]: ...
        def keys(self, queue: str) -> QueueKeys: ...


log = logging.getLogger("conveyor.worker")
PATIENCE = 5.0
PAUSES = 5.0
"""Longest pause in seconds before a delivery that was refused is tried again."""


class SpawnDelivery:
    """Delivers one queue's outbox while there is something in it; nothing runs, and nothing is sent, while there is not."""

    def __init__(self, keys: QueueKeys, home: Home, done: Callable[[], None]) -> None:
        """Take whose outbox it is, how to reach all queues, and what to call when it was emptied."""
        self._keys, self._home, self._done = keys, home, done
        self._task: asyncio.Task[None] | None = None
        self._asked = False

    @property
    def busy(self) -> bool:
        """True while something may be left to deliver."""
        return self._task is not None

    def begin(self) -> None:
        """Something lies in the outbox: deliver it, now or right after what is under way."""
        self._asked = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def finish(self, seconds: float) -> None:
        """Wait for what is under way, but not for ever: what is left, any worker of the queue delivers."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        attempt = 0
        try:
            while self._asked:
                self._asked = False
                try:
                    while await deliver(self._keys, self._home):
                        attempt = 0
                except ConveyorError as error:
                    log.warning(
                        "followers of queue %s are not delivered yet, trying again: %s", self._keys.queue, error
                    )
                    await asyncio.sleep(replies.pause(attempt + 5, cap=PAUSES))
                    attempt += 1
                    self._asked = True
        finally:
            self._task = None
        self._done()


async def deliver(keys: QueueKeys, home: Home) -> bool:
    """Deliver one batch of an outbox; return whether there was one. Raises what the pushes raise: it stays to be repeated."""
    client = home.client
    batch = await client.arun(spawn_outbox.take(keys), patience=PATIENCE)
    if batch is None:
        return False
    failed: ConveyorError | None = None
    for queue, entries in batch.parts.items():
        try:
            for call in await _calls(keys, home, batch.number, queue, entries):
                await _push(home, queue, call)
        except _StaleDelivery as late:
            # Others have delivered and trimmed this batch, and a newer one. Or a failover took the source back to a
            # number that this receiver has seen: then the same batch gets a higher one.
            seen = await client.aexecute("GET", late.inbox, key=late.inbox)
            if isinstance(seen, bytes):
                least = int(seen.partition(b"\n")[0]) + 1
                await client.arun(spawn_outbox.take(keys, replacing=batch.number, least=least), patience=PATIENCE)
            return True
        except ConveyorError as error:
            failed = error  # the others need not wait for it; the repeat finds theirs done
    if failed is not None:
        raise failed
    await client.arun(spawn_outbox.trim(keys, batch.number), patience=PATIENCE)
    return True


class _StaleDelivery(Exception):
    """A receiver has seen a higher number; *inbox* is where it keeps it."""

    def __init__(self, inbox: str) -> None:
        super().__init__(inbox)
        self.inbox = inbox


async def _calls(source: QueueKeys, home: Home, number: int, queue: str, entries: list[Entry]) -> list[Call[list[str]]]:
    """Return the pushes of a part: one, unless it was written for a partition that there is no more, or not yet."""
    partitions = home.partitioned.get(ids.logical(queue))
    if partitions is None:
        target = home.keys(queue)
        await home.client.aannounce(target)
        return [spawn_outbox.deliver(source, target, number, entries)]
    targets = {keys.queue: keys for keys in partitions.keys}
    if queue in targets:
        return [spawn_outbox.deliver(source, targets[queue], number, entries)]
    moved: dict[str, list[Entry]] = {}
    for entry in entries:
        # By its id where it has no key: a repeat must find the same place.
        at = partitions.pick(unique=entry.unique, id=entry.id)
        moved.setdefault(partitions.keys[at].queue, []).append(entry)
    return [
        spawn_outbox.deliver(source, targets[name], number, part, written_for=queue) for name, part in moved.items()
    ]


async def _push(home: Home, queue: str, call: Call[list[str]]) -> None:
    partitions = home.partitioned.get(ids.logical(queue))
    try:
        if partitions is None:
            await home.client.arun(call, patience=PATIENCE)
        else:
            await partitions.akeep(lambda: home.client.arun(call, patience=PATIENCE))
    except StalePush:
        raise _StaleDelivery(call.keys[0]) from None
