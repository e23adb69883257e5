"""Where a worker signs on: the places of each of its queues, and the number of partitions that it must share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conveyor import ident
from conveyor.errors import ConfigurationError
from conveyor.store.partitioning import WrongPartitions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.app import Conveyor
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call
    from conveyor.store.wire import Wire


def weighted(app: Conveyor, queues: Mapping[str, float] | None) -> dict[str, float]:
    """Return queue → weight: those asked for, else all that tasks name. Raises ConfigurationError where nothing could be done."""
    fed = [name for name, listed in app.plain_lists.items() if listed.task]
    own = [task.queue for task in app.tasks.values()]
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
