"""Comparing what a worker believes it holds with what Redis believes, when the counts of a turn differ."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from conveyor.errors import ConveyorError
from conveyor.store import operations

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.wire import Wire

log = logging.getLogger("conveyor.worker")


class Bookkeeper(Protocol):
    """Who holds leases of one queue."""

    keys: QueueKeys
    wire: Wire
    identity: str

    @property
    def held(self) -> Collection[str]: ...


async def differences(books: Bookkeeper) -> tuple[list[str], list[str]]:
    """Return the ids that Redis does not list as held here, and those it lists besides; none of them when it refuses to tell."""
    try:
        listed = await books.wire.run(operations.held(books.keys, books.identity), patience=None)
    except ConveyorError as error:
        log.warning("could not reconcile queue %s: %s", books.keys.queue, error)
        return [], []
    known = set(listed)
    unknown = [id_ for id_ in known if id_ not in books.held]
    if unknown:
        log.warning("queue %s: giving back %d leases we never learned of", books.keys.queue, len(unknown))
    return [id_ for id_ in books.held if id_ not in known], unknown
