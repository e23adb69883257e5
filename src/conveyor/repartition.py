"""
Changing in how many partitions a queue lies: only while it is empty, since no order spans the change.

The queue's own number is set to 0 first, which stops programs that come; then each partition is shut where it holds
nothing, which stops those that were there. Then the queue's number is the new one, and the partitions are opened with it.
A partition that still holds something ends it, and all is as it was. Who dies in between leaves the queue shut, and
the same call completes it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from conveyor import ident
from conveyor.errors import ConfigurationError
from conveyor.holder import adrive, drive
from conveyor.partition import checked
from conveyor.store import inspection, partitioning
from conveyor.store.backend import Backend
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.script import Call

Steps = Generator[Call[Any], Any, int]


def number_of(backend: Backend, queue: str) -> int:
    """Return in how many partitions *queue* lies (1 when it lies in one piece), as recorded in Redis."""
    number, change = backend.run(partitioning.count(backend.keys(queue)))
    return number or int((change or "1").split()[0])


def partition_names(queue: str, number: int) -> list[str]:
    """Return the names of the places of a queue that lies in *number* partitions."""
    return [queue] if number == 1 else [ident.partition(queue, one) for one in range(number)]


def repartition(backend: Backend, queue: str, number: int) -> int:
    """
    Lay *queue* in *number* partitions, and return in how many it lay before.

    Raises ConfigurationError (E35), and changes nothing, when a partition is not empty: leased and dead ones count.
    Programs that still declare the old number are refused from then on (E34), running workers and consumers too.
    """
    before = drive(_change(backend, ident.queue_name(queue), checked(number)), backend.run)
    known = known_queues(backend.namespace)
    for command in _renamed(queue, before, number):
        backend.execute(command[0], known, *command[1:], key=known)
    return before


async def arepartition(backend: Backend, queue: str, number: int) -> int:
    """Do the same on this event loop."""
    before = await adrive(_change(backend, ident.queue_name(queue), checked(number)), backend.arun)
    known = known_queues(backend.namespace)
    for command in _renamed(queue, before, number):
        await backend.aexecute(command[0], known, *command[1:], key=known)
    return before


def _renamed(queue: str, before: int, number: int) -> Generator[tuple[str, ...]]:
    """Yield how the set of known queues changes."""
    now, old = partition_names(queue, number), partition_names(queue, before)
    yield "SADD", *now
    if gone := [name for name in old if name not in now]:
        yield "SREM", *gone


def _change(backend: Backend, queue: str, number: int) -> Steps:
    whole, token = backend.keys(queue), ident.new_identity()
    there = yield partitioning.count(whole)
    yield from _refuse_full(backend, queue, there[0] or 1)
    if there[0] == number and not there[1]:
        yield from _mend(backend, queue, number, token)
        return number
    done, before = yield partitioning.switch(whole, "begin", token, number)
    if done != 1:
        raise _full(queue, {queue: before})
    most = max(before, number)
    places = [backend.keys(ident.partition(queue, one)) for one in range(most)] if most > 1 else []
    full: dict[str, int] = {}
    shut: list[QueueKeys] = []
    for one, keys in enumerate(places):
        done, found = yield partitioning.switch(keys, "close", token, before if one < before else None)
        if done == 1:
            shut.append(keys)
        elif done == 0:
            full[keys.queue] = found
        else:
            full[keys.queue] = -1
    after = before if full else number
    done, _ = yield partitioning.switch(whole, "end", token, after)
    for keys in shut:
        yield partitioning.switch(keys, "open", token, after)
    if full:
        raise _full(queue, full)
    if done != 1:
        raise ConfigurationError(
            f"Somebody else is changing the partitions of queue '{queue}' too. Look, and try again.", code="E35"
        )
    return int(before)


def _refuse_full(backend: Backend, queue: str, number: int) -> Generator[Call[Any], Any, None]:
    """Raise the error of a queue that obviously cannot change, before it is shut even for a moment."""
    full: dict[str, int] = {}
    for name in partition_names(queue, number):
        found: inspection.Counts = yield inspection.counts(backend.keys(name))
        if held := len(found) + found.leased + found.dead:
            full[name] = held
    if full:
        raise _full(queue, full)


def refuse_full(backend: Backend, queue: str) -> None:
    """Raise ConfigurationError (E35) when the partitions of *queue* hold something; changes nothing."""
    drive(_refuse_full(backend, queue, number_of(backend, queue)), backend.run)


def _mend(backend: Backend, queue: str, number: int, token: str) -> Generator[Call[Any], Any, None]:
    """Open what a change that was completed but for this has left shut."""
    for one in range(number if number > 1 else 0):
        keys = backend.keys(ident.partition(queue, one))
        found = yield partitioning.count(keys)
        if found[0] == 0:
            done, _ = yield partitioning.switch(keys, "close", token, None)
            if done == 1:
                yield partitioning.switch(keys, "open", token, number)


def _full(queue: str, full: dict[str, int]) -> ConfigurationError:
    held = ", ".join(
        f"{name} ({count:,})" if count >= 0 else f"{name} (changed meanwhile)" for name, count in full.items()
    )
    return ConfigurationError(
        f"Queue '{queue}' is not empty, so its partitions cannot change: {held}. Nothing was changed. Let workers drain "
        f"it, then redrive or purge its dead letters: conveyor queue purge {queue} --dead",
        code="E35",
    )
