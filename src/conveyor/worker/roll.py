"""Where a worker signs on: the places of each of its queues, and the number of partitions that it must share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conveyor import ident
from conveyor.store.partitioning import WrongPartitions

if TYPE_CHECKING:
    from conveyor.app import Conveyor
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call
    from conveyor.store.wire import Wire


async def served(app: Conveyor, queue: str) -> list[QueueKeys]:
    """Return the keys of a queue, or of each of its partitions; raises ConfigurationError (E34) for another number of them."""
    if (listed := app.plain_lists.get(queue)) is not None:
        return [listed.keys]
    if (partitions := app.partitioned.get(queue)) is not None:
        await partitions.aagree()
        return list(partitions.keys)
    return [app.keys(queue)]


async def enrolled(app: Conveyor, wire: Wire, queue: str, call: Call[int]) -> int:
    """Carry out a registration and return the server's time in ms; after Redis was emptied the number is agreed on anew."""
    try:
        return await wire.run(call, patience=None)
    except WrongPartitions:
        if (partitions := app.partitioned.get(ident.logical(queue))) is None:
            raise
        await partitions.aclaim()
        return await wire.run(call, patience=None)
