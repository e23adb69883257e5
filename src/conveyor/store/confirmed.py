"""The way in for pushes that ask for more than being stored: on connections of their own, gathered by what they ask."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from conveyor import ident
from conveyor.errors import DurabilityNotReached
from conveyor.ident import new_identity
from conveyor.store import operations
from conveyor.store.confirming import NOTHING, ConfirmedConnection, ConfirmedWire
from conveyor.store.durability import Durability, after
from conveyor.store.fork import on_fork
from conveyor.store.gathering import BULK, AsyncLane, Item
from conveyor.store.operations import Entry, Lane
from conveyor.store.script import Argument, Call

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.place import Place

T = TypeVar("T")
MOST_WIRES = 8
"""Wires of one event loop and place for confirmed pushes: one that waits for a dead replica holds up an eighth."""


class ConfirmedLane(AsyncLane):
    """Gathers the pushes of one queue that ask the same."""

    def __init__(
        self, wire: ConfirmedWire, keys: QueueKeys, max_length: int, patience: float, asked: Durability
    ) -> None:
        """Take what every lane takes, and what is asked."""
        super().__init__(wire, keys, max_length, patience)
        self._confirmed, self._asked, self._got = wire, asked, NOTHING

    async def run(self, call: Call[T]) -> T:
        """Carry out one push."""
        reply, self._got = await self._confirmed.confirm(call, self._asked, patience=self._patience)
        return reply

    def answer(self, batch: list[Item], ids: list[str]) -> None:
        """Tell everybody who waits."""
        if self._asked.reached(self._got):
            super().answer(batch, ids)
            return
        at = 0
        for first, _, future in batch:
            own = ids[at : at + len(first)]
            at += len(first)
            if not future.done():
                future.set_exception(self._asked.failure(self._keys.queue, own, self._got))


class _Loop:
    """What one event loop's confirmed pushes share."""

    def __init__(self) -> None:
        self.wires: dict[Place, list[ConfirmedWire]] = {}
        self.lanes: dict[tuple[str, int, Durability], ConfirmedLane] = {}


class Home(Protocol):
    """What is needed of the backend."""

    @property
    def patience(self) -> float: ...
    def place(self, keys: QueueKeys) -> Place: ...
    def announce(self, keys: QueueKeys) -> None: ...
    async def aannounce(self, keys: QueueKeys) -> None: ...


class Confirmed:
    """The way into Redis for pushes that ask the same: as a backend's, and each returns when it is confirmed."""

    deferred = False

    def __init__(self, confirmer: Confirmer, asked: Durability) -> None:
        """Take whose connections, and what is asked."""
        self._confirmer = confirmer
        self._asked = asked

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """
        Accept *entries* and wait, once for each thousand.

        Raises DurabilityNotReached with the ids of all that this call stored: what follows the thousand that was not
        confirmed is not stored.
        """
        asked, ids = self._asked, list[str]()
        with self._confirmer.one(keys) as (connection, lane):
            for part in _parts(entries, whole):
                call = operations.push(keys, lane, part, max_length=max_length)
                accepted, got = connection.confirm(call, asked, patience=self._confirmer.home.patience)
                if not asked.reached(got):
                    failure = asked.failure(keys.queue, accepted, got)
                    raise after(failure, _public(keys, ids)) if len(entries) > len(part) else failure
                ids += accepted
        return ids

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Accept plain messages (id, envelope, id, envelope, …) and wait."""
        self.push(keys, plain_entries(pairs), max_length=max_length)

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Do the same on this event loop; pushes of one tick that ask the same share a call."""
        await self._confirmer.home.aannounce(keys)
        lane = self._confirmer.lane(keys, max_length, self._asked)
        ids: list[str] = []
        for part in _parts(entries, whole):
            try:
                ids += await lane.push(part)
            except DurabilityNotReached as error:
                if len(part) == len(entries):
                    raise
                raise after(error, _public(keys, ids)) from None
        return ids


class Confirmer:
    """The connections of one app for confirmed pushes, opened when first used."""

    def __init__(self, home: Home, refuse: Callable[[], None]) -> None:
        """Open nothing yet; *refuse* raises where blocking calls may not be made."""
        self.home = home
        self._refuse = refuse
        self._reset()
        on_fork(self)

    def _reset(self) -> None:
        self._free: dict[Place, deque[tuple[ConfirmedConnection, Lane]]] = {}
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()

    @contextmanager
    def one(self, keys: QueueKeys) -> Iterator[tuple[ConfirmedConnection, Lane]]:
        """Lend a connection and its lane; the queue is known by then."""
        self._refuse()
        self.home.announce(keys)
        place = self.home.place(keys)
        free = self._free.setdefault(place, deque())
        try:
            found = free.pop()
        except IndexError:
            found = ConfirmedConnection(place), Lane(new_identity())
        try:
            yield found
        finally:
            free.append(found)

    def lane(self, keys: QueueKeys, max_length: int, asked: Durability) -> ConfirmedLane:
        """Return this event loop's lane for pushes to a queue that ask the same."""
        loop = asyncio.get_running_loop()
        home = self._loops.get(loop)
        if home is None:
            home = self._loops[loop] = _Loop()
        found = home.lanes.get((keys.prefix, max_length, asked))
        if found is None:
            place = self.home.place(keys)
            wires = home.wires.setdefault(place, [])
            if len(wires) < MOST_WIRES:
                wires.append(ConfirmedWire(place))
            wire = wires[len(home.lanes) % len(wires)]
            found = ConfirmedLane(wire, keys, max_length, self.home.patience, asked)
            home.lanes[keys.prefix, max_length, asked] = found
        return found

    def close(self) -> None:
        """Close the blocking connections."""
        for free in self._free.values():
            while free:
                free.pop()[0].close()

    def aclose(self) -> None:
        """Close this event loop's wires."""
        home = self._loops.pop(asyncio.get_running_loop(), None)
        for wires in home.wires.values() if home is not None else ():
            for wire in wires:
                wire.close()

    def forked(self) -> None:
        """Start anew in a forked child: the parent goes on using its sockets and lanes."""
        self._reset()


def plain_entries(pairs: Sequence[Argument]) -> list[Entry]:
    """Return id, envelope, id, envelope, … as entries."""
    both: Sequence[Any] = pairs
    return [Entry(both[at], both[at + 1]) for at in range(0, len(both), 2)]


def _public(keys: QueueKeys, ids: Sequence[str]) -> list[str]:
    return [ident.public(keys.queue, id_) for id_ in ids]


def _parts(entries: Sequence[Entry], whole: bool) -> list[Sequence[Entry]]:
    if whole:
        return [entries]
    return [entries[first : first + BULK] for first in range(0, len(entries), BULK)]
