"""
Deletes queues that hold nothing and that nothing serves, with every key of theirs.

A queue in one piece is looked at and deleted in one step. One with partitions is shut first, as for a change of their
number: a producer that comes meanwhile waits, and begins the queue anew when it is gone. So no push is lost, however
it races with the deletion. A process that dies in between leaves the queue shut; deleting it again completes that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.store import operations, topics
from conveyor.store import partitions as partitioning
from conveyor.store.client.client import Client
from conveyor.store.client.queue_index import withdrawing
from conveyor.store.client.queue_scan import keys_containing
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.operations import Remains
from conveyor.store.script import CallProgram, adrive, drive
from conveyor.store.transport.endpoint import in_thread

CHUNK = 5_000
"""Keys that one step deletes besides those of the queue itself."""
_BESIDE = re.compile(r"(lane|inbox|result|results|unique|stats|stream|logs|tag|wake|leased|needs):.")


@dataclass
class _Keys:
    """The keys in Redis that belong to a queue besides those that its name alone tells: by the prefix that they have."""

    beside: dict[str, list[str]] = field(default_factory=dict)
    partitions: set[int] = field(default_factory=set)
    inboxes: list[str] = field(default_factory=list)
    """Keys of other queues that remember what the outbox of this one has delivered there."""


def delete(client: Client, keys: QueueKeys) -> None:
    """Delete a queue with all its partitions. Raises ConfigurationError (E35) when it is in use; then nothing is deleted."""
    drive(_refuse_in_use(client, keys), client.run)
    drive(_delete(client, keys, _find(client, keys)), client.run)


async def adelete(client: Client, keys: QueueKeys) -> None:
    """Awaitable form of `delete`."""
    await adrive(_refuse_in_use(client, keys), client.arun)
    found = await in_thread(lambda: _find(client, keys))
    await adrive(_delete(client, keys, found), client.arun)


def refuse_in_use(client: Client, keys: QueueKeys) -> None:
    """Raise ConfigurationError (E35) when a queue could not be deleted now. Changes nothing."""
    drive(_refuse_in_use(client, keys), client.run)


def _find(client: Client, keys: QueueKeys) -> _Keys:
    """Look through the keys of all servers."""
    found, namespace, name = _Keys(), re.escape(client.namespace), re.escape(keys.queue)
    partition = re.compile(rf"{namespace}:\{{{name}/(\d+)\}}:")
    inbox = re.compile(rf"{namespace}:\{{[^}}]+\}}:(?:.+:)?inbox:{name}(?:/\d+)?(?:>.+)?", re.DOTALL)
    tag = "{" + keys.prefix.partition("{")[2].partition("}")[0] + "}"
    for key in keys_containing(client, keys.queue):
        owner = keys.prefix if key.startswith(keys.prefix) else ""
        if (match := partition.match(key)) is not None:
            owner = match[0]
            found.partitions.add(int(match[1]))
        rest = key[len(owner) :]
        # A plain list that lends this tag has its own keys behind the same prefix, and the tag in its name.
        if owner and _BESIDE.match(rest) and tag not in rest and not _is_asked_later(rest):
            found.beside.setdefault(owner, []).append(key)
        elif not owner and inbox.fullmatch(key):
            found.inboxes.append(key)
    return found


def _is_asked_later(rest: str) -> bool:
    """Tell whether a buffer or a database outbox may repeat a push as late as the key expires, in a day."""
    return rest.startswith("lane:") and rest.endswith("+")


def _refuse_in_use(client: Client, keys: QueueKeys) -> CallProgram[None]:
    number, change = yield partitioning.count(keys)
    places = _places(client, keys, range(_before(number, change)))
    total = Remains()
    for place in places:
        total = _sum(total, (yield operations.delete(place, "check")))
    if any(total):
        _in_use(keys, total)


def _before(number: int, change: str) -> int:
    """Return the number of partitions that a queue has, or had before an interrupted change."""
    return number or int((change or "1").split()[0])


def _places(client: Client, keys: QueueKeys, numbers: Sequence[int]) -> list[QueueKeys]:
    """Return a queue's own keys, and those of the partitions *numbers*; one partition is the queue itself."""
    parts = [client.keys(ids.partition(keys.queue, one)) for one in numbers] if len(numbers) > 1 else []
    return [keys, *parts]


def _delete(client: Client, keys: QueueKeys, found: _Keys) -> CallProgram[None]:
    number, change = yield partitioning.count(keys)
    token, parts = "", list[QueueKeys]()
    if number != 1 or change or found.partitions:
        before = _before(number, change)
        numbers = sorted(found.partitions.union(range(before if before > 1 else 0)))
        for one in numbers:
            place = client.keys(ids.partition(keys.queue, one))
            # Beyond the number: those of an earlier one. A plain list may have such a name, and no number.
            if one < before or (yield partitioning.count(place)) != (1, ""):
                parts.append(place)
        if number != 1 or change or parts:
            token = ids.new_identity()
            yield from _shut(keys, parts, token)
    places = [*parts, keys]
    for place in places:
        yield from _settle_inboxes(client, place, found)
        remains = yield operations.delete(place, "delete", token, found.beside.get(place.prefix, [])[:CHUNK])
        if remains is None:
            raise ConfigurationError(
                f"The number of partitions of queue '{keys.queue}' is being changed right now. Try again.", code="E35"
            )
        if any(remains):
            _in_use(keys, remains)
    for place in places:
        beside = found.beside.get(place.prefix, [])
        for first in range(CHUNK, len(beside), CHUNK):
            remains = yield operations.delete(place, "forget", "", beside[first : first + CHUNK])
            if remains is None or any(remains):
                break  # a producer began the queue anew; the keys that are left expire
    for key in found.inboxes:
        yield operations.delete_key(key)
    # Names of partitions that an interrupted deletion has deleted already, too.
    names = yield operations.known_names(known_queues(client.namespace))
    known = {place.queue for place in places}
    gone = [name for name in names if name not in known and ids.logical(name) == keys.queue and keys.foreign is None]
    yield from withdraw(client, [*places, *map(client.keys, gone)])
    if keys.foreign is None:
        yield topics.leave(topics.TopicKeys(client.namespace), keys.queue)


def _shut(keys: QueueKeys, parts: Sequence[QueueKeys], token: str) -> CallProgram[None]:
    """Shut a queue and its partitions for everybody. When one of them holds something, open them again and raise."""
    # The number that counts is the one that is recorded now: a producer may have begun the queue since it was looked at.
    done, before = yield partitioning.repartition(keys, "begin", token, 0)
    if done != 1:
        _in_use(keys, Remains(unplaced=before))
    shut: list[QueueKeys] = []
    for place in parts:
        done, held = yield partitioning.repartition(place, "close", token, None)
        if done != 1:
            if before == 1:  # none was recorded, so none may be left: a program could not claim its own number
                for one in (*shut, keys):
                    yield operations.delete(one, "delete", token)
            else:
                yield partitioning.repartition(keys, "end", token, before)
                for one in shut:
                    yield partitioning.repartition(one, "open", token, before)
            yield from _refuse_in_use_of(keys, place)
            _in_use(keys, Remains(unplaced=max(held, 1)))
        shut.append(place)


def _refuse_in_use_of(keys: QueueKeys, place: QueueKeys) -> CallProgram[None]:
    remains = yield operations.delete(place, "check")
    if remains is not None and any(remains):
        _in_use(keys, remains)


def _settle_inboxes(client: Client, place: QueueKeys, found: _Keys) -> CallProgram[None]:
    """Keep what guards a delivery that is under way: of outboxes that are not empty."""
    beside = found.beside.get(place.prefix, [])
    for key in [key for key in beside if key.startswith(place.prefix + "inbox:")]:
        source = key[len(place.prefix) + len("inbox:") :].partition(">")[0]
        if (yield operations.exists(client.keys(source).outbox)):
            beside.remove(key)


def withdraw(client: Client, places: Sequence[QueueKeys]) -> CallProgram[None]:
    """Remove queues from the set of known ones; those that were begun anew meanwhile are added again."""
    client.note_forgotten(*places)
    yield from withdrawing(client.namespace, places)


def _sum(one: Remains, other: Remains) -> Remains:
    # One that serves all partitions is counted once.
    counts = Remains(*map(sum, zip(one, other, strict=True)))
    return counts._replace(workers=max(one.workers, other.workers))


def _in_use(keys: QueueKeys, total: Remains) -> NoReturn:
    queue, held = keys.queue, total._replace(workers=0)
    words = _WORDS | ({"schedules": "schedule"} if total.schedules == 1 else {})
    counts = [f"{count:,} {words.get(name, name)}" for name, count in held._asdict().items() if count]
    if total.workers:
        counts.append(f"{total.workers:,} {'worker or consumer' if total.workers == 1 else 'workers and consumers'}")
    advice = [
        (total.workers, "Stop what serves it."),
        (total.ready or total.scheduled, f"Have it drained, or: conveyor queue purge {queue}"),
        (total.leased, "Leased entries end, or come back when their leases are over."),
        (total.dead, f"Dead letters: conveyor queue redrive {queue}, or conveyor queue purge {queue} --dead"),
        (total.outbox, "A worker of the queue delivers its outbox."),
        (total.schedules, "Delete its schedules: conveyor schedule delete NAME"),
        (total.unplaced, f"conveyor queue repair {queue} puts jobs back that are in no place."),
    ]
    raise ConfigurationError(
        f"Queue '{queue}' is {'not empty' if any(held) else 'in use'}: {', '.join(counts)}. Nothing was deleted. "
        + " ".join(text for applies, text in advice if applies),
        code="E35",
    )


_WORDS = {"outbox": "in its outbox", "unplaced": "in no place"}
