"""Changes of operators while programs run: the limits of a queue, and the weight and pause of its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple, TypeVar

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError
from conveyor.messaging.declared_limits import QueueLimits, default_name, limit_text, read_limit, show_limit, task_owner
from conveyor.messaging.limits import Concurrency, Rate
from conveyor.payload.key_text import group_key, key_text
from conveyor.store import limits as store_limits
from conveyor.store import partitions as partitioning
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.limits import LimitRecord
from conveyor.store.script import CallProgram, adrive, drive
from conveyor.units import instant_or_none

V = TypeVar("V")
MOST_GROUPS = 1000


class LimitState(msgspec.Struct, frozen=True):
    """
    One limit, or one key of it, at this moment. Of a queue in partitions numbers are sums.

    `limit` is in force, `declared` what code says; they differ while an operator's change holds. `overridden`: it was made to this
    limit, or this key of it; a key without one follows the limit. `used` are the jobs that run under a concurrency, or what a
    rate has spent in its window. `waiting` are jobs that wait at it, `opens_at` is when a full rate has room again.
    """

    queue: str
    name: str
    key: str | None
    limit: Rate | Concurrency
    declared: Rate | Concurrency | None
    overridden: bool
    used: int
    waiting: int
    opens_at: datetime | None


class GroupState(msgspec.Struct, frozen=True):
    """One group at this moment: how many of it wait and run, its weight, and whether it is paused."""

    queue: str
    key: str
    waiting: int
    running: int
    weight: int
    paused: bool


# Inside the classes below `list` is a method.
LimitStates = list[LimitState]
GroupStates = list[GroupState]
LimitRecords = list[LimitRecord]
GroupRecords = list[store_limits.GroupRecord]
LimitNames = list[str | None]


class LimitPlace(NamedTuple):
    """The queue that an operator's name stands for: a queue, or that of a task (`prefix`), whose own limits alone are meant."""

    queue: str
    prefix: str = ""
    limits: QueueLimits | None = None
    """Those that this program declares there."""
    partitions: int = 1
    """Those that this program declares."""

    def means(self, name: str) -> bool:
        """Tell whether the limit called *name* is meant."""
        own = self.limits.of(task_owner(self.prefix)) if self.prefix and self.limits else ()
        return not self.prefix or any(one.name == name for one in own)


class LimitControl:
    """The limits of queues while programs run: `app.limits`. Each call has an awaitable twin."""

    def __init__(self, client: Client, find: Callable[[str], LimitPlace] = LimitPlace) -> None:
        self._client, self._find = client, find

    def set(self, queue: str, limit: Rate | Concurrency, key: str | None = None) -> None:
        """
        Change a limit of *queue* (or of a task), for one *key* of it or for all, until `reset`; running workers follow at once.

        *limit* has the new number and window. Its name, kind and `by` tell which one is meant. Raises ConfigurationError
        when none, or more than one, fits.
        """
        drive(self._set(queue, limit, key), self._client.run)

    async def aset(self, queue: str, limit: Rate | Concurrency, key: str | None = None) -> None:
        """Awaitable form of `set`."""
        await adrive(self._set(queue, limit, key), self._client.arun)

    def list(self, queue: str) -> LimitStates:
        """Return the limits of *queue* (or of a task), with the keys that jobs wait at or run under, or that were changed."""
        return drive(self._list(queue), self._client.run)

    async def alist(self, queue: str) -> LimitStates:
        """Awaitable form of `list`."""
        return await adrive(self._list(queue), self._client.arun)

    def reset(self, queue: str, name: str | None = None, key: str | None = None) -> int:
        """
        Give limits of *queue* back to what code declares: all, those of one *name*, or one *key* of it.

        Return how many changes were taken back.
        """
        return drive(self._reset(queue, name, key), self._client.run)

    async def areset(self, queue: str, name: str | None = None, key: str | None = None) -> int:
        """Awaitable form of `reset`."""
        return await adrive(self._reset(queue, name, key), self._client.arun)

    # -- programs -------------------------------------------------------------------------------------------------

    def _set(self, owner: str, limit: Rate | Concurrency, key: str | None) -> CallProgram[None]:
        if not isinstance(limit, Rate | Concurrency):
            raise ConfigurationError(
                f'limits.set takes Rate(…) or Concurrency(…), such as Rate(500, "1m"), not {limit!r}.'
            )
        place = self._find(ids.queue_name(owner))
        parts = yield from _parts(self._client, place, changes=True)
        yield from _declare(place, parts)
        records: LimitRecords = yield store_limits.list_limits(parts[0])
        found = _choose(owner, place, limit, key, records)
        _check_weighed(limit, found)
        text = None if key is None else key_text(key, "key")
        number = limit.n if _is_exact(found.declared) else limit.n // len(parts)
        if number == 0:
            raise ConfigurationError(
                f"{show_limit(limit)} is smaller than the {len(parts)} partitions of queue {place.queue!r}, each of which gets its "
                "part and needs at least 1. Nothing was changed."
            )
        for keys in parts:
            yield store_limits.set_limit(keys, found.name, text, limit_text(limit, number))

    def _list(self, owner: str) -> CallProgram[LimitStates]:
        place = self._find(ids.queue_name(owner))
        parts = yield from _parts(self._client, place)
        yield from _declare(place, parts)
        merged: dict[tuple[str, str], LimitState] = {}
        for keys in parts:
            records: LimitRecords = yield store_limits.list_limits(keys)
            of_all = {record.name: record.override for record in records if not record.key}
            for record in records:
                if not place.means(record.name):
                    continue
                state = _state(place.queue, record, of_all.get(record.name, ""), len(parts))
                known = merged.get((record.name, record.key))
                merged[record.name, record.key] = state if known is None else _sum(known, state)
        return [merged[one] for one in sorted(merged)]

    def _reset(self, owner: str, name: str | None, key: str | None) -> CallProgram[int]:
        if key is not None and name is None:
            raise ConfigurationError("limits.reset(key=…) needs the name of the limit too: reset(queue, name, key).")
        place = self._find(ids.queue_name(owner))
        parts = yield from _parts(self._client, place, changes=True)
        if name is not None or place.prefix:
            records: LimitRecords = yield store_limits.list_limits(parts[0])
            known = sorted({record.name for record in records})
            names: LimitNames = [name] if name is not None else [one for one in known if place.means(one)]
            if name is not None and name not in known:
                raise ConfigurationError(
                    f"Queue {place.queue!r} has no limit {name!r}. {_listed(known)} Nothing was changed."
                )
        else:
            names = [None]
        changed = 0
        for keys in parts:
            count = 0
            for one in names:
                count += yield store_limits.reset_limit(keys, one, None if key is None else key_text(key, "key"))
            changed = max(changed, count)
        return changed


class GroupControl:
    """The groups of queues while programs run: `app.groups`. Each call has an awaitable twin."""

    def __init__(self, client: Client, find: Callable[[str], LimitPlace] = LimitPlace) -> None:
        self._client, self._find = client, find

    def set(self, queue: str, key: str, *, weight: int | None = None, paused: bool | None = None) -> None:
        """
        Set how many jobs of a group run for one of another (*weight*), and whether the group is *paused*.

        Both hold for what is queued already, until they are set again; weight 1 is that of every group. The key is that
        of `group=` and `group_by=`, or of a limit `by=`.
        """
        drive(self._set(queue, key, weight, paused), self._client.run)

    async def aset(self, queue: str, key: str, *, weight: int | None = None, paused: bool | None = None) -> None:
        """Awaitable form of `set`."""
        await adrive(self._set(queue, key, weight, paused), self._client.arun)

    def list(self, queue: str, limit: int = 100) -> GroupStates:
        """Return groups of *queue* that hold jobs or were set, those with most waiting first, at most *limit*."""
        return drive(self._list(queue, limit), self._client.run)

    async def alist(self, queue: str, limit: int = 100) -> GroupStates:
        """Awaitable form of `list`."""
        return await adrive(self._list(queue, limit), self._client.arun)

    def _set(self, queue: str, key: str, weight: int | None, paused: bool | None) -> CallProgram[None]:
        text = group_key(key)
        if weight is None and paused is None:
            raise ConfigurationError("groups.set needs weight=, paused= or both. Nothing was changed.")
        if weight is not None and (not isinstance(weight, int) or isinstance(weight, bool) or not 1 <= weight <= 1000):
            raise ConfigurationError(
                f"weight must be a whole number from 1 to 1,000, not {weight!r}. To stop a group: paused=True. Nothing was changed."
            )
        if paused is not None and not isinstance(paused, bool):
            raise ConfigurationError(f"paused must be True or False, not {paused!r}. Nothing was changed.")
        for keys in (yield from _parts(self._client, self._find(ids.queue_name(queue)), changes=True)):
            yield store_limits.set_group(keys, text, weight=weight, paused=paused)

    def _list(self, queue: str, limit: int) -> CallProgram[GroupStates]:
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_GROUPS:
            raise ConfigurationError(f"limit must be a whole number from 1 to {MOST_GROUPS:,}, not {limit!r}.")
        merged: dict[str, GroupState] = {}
        for keys in (yield from _parts(self._client, self._find(ids.queue_name(queue)))):
            records: GroupRecords = yield store_limits.list_groups(keys, limit)
            for one in records:
                known = merged.get(one.group)
                merged[one.group] = GroupState(
                    queue, one.group, one.waiting + (known.waiting if known else 0), one.running + (known.running if known else 0),
                    one.weight, one.paused,
                )  # fmt: skip
        return sorted(merged.values(), key=lambda one: (-one.waiting, one.key))[:limit]


def _parts(client: Client, place: LimitPlace, *, changes: bool = False) -> CallProgram[list[QueueKeys]]:
    """
    Return the keys of a queue, or of each of its partitions; in one that nobody has used yet the number declared here is recorded.

    Raises PartitionCountMismatch, which for a reader that *changes* nothing does not concern a number that is being changed.
    """
    number, _ = yield partitioning.count(client.keys(place.queue))
    if number == 0 and changes:
        raise partitioning.PartitionCountMismatch(client.keys(place.queue), "0")
    if number == 1 and place.partitions > 1:
        number = place.partitions
        for claim in partitioning.claims(client.namespace, place.queue, number):  # noqa: UP028 - a list takes no answers
            yield claim
    if number <= 1:
        return [client.keys(place.queue)]
    return [QueueKeys(client.namespace, ids.partition(place.queue, one), partitions=number) for one in range(number)]


def _declare(place: LimitPlace, parts: Iterable[QueueKeys]) -> CallProgram[None]:
    """Declare what this program knows where nothing is stored, so that an operator's change finds it."""
    for keys in parts if place.limits is not None else ():
        assert place.limits is not None
        if (call := place.limits.declaration(keys, replace=False)) is not None:
            place.limits.check((yield call))


def _choose(
    owner: str, place: LimitPlace, limit: Rate | Concurrency, key: str | None, records: Iterable[LimitRecord]
) -> LimitRecord:
    """Return the one declared limit that *limit* means. Raises ConfigurationError."""
    declared = [one for one in records if not one.key and one.declared]
    fits = [one for one in declared if _fits(one, limit, key)]
    if limit.name is not None:
        named = [one for one in fits if one.name == limit.name]
    else:
        named = [one for one in fits if one.name == default_name(limit, place.prefix)]
        if not named:
            named = [one for one in fits if place.means(one.name)]
    if len(named) == 1:
        return named[0]
    what = f"More than one limit of {owner!r}" if named else f"No limit of {owner!r}"
    advice = 'Say which: name="…".' if named else "Declare it in code first: limits=[…] of the queue or the task."
    of = f" with key {key!r}" if key is not None else ""
    known = [f"{one.name} = {show_limit(read_limit(one.declared))}" for one in declared]
    raise ConfigurationError(f"{what} fits {show_limit(limit)}{of}. {_listed(known)} {advice} Nothing was changed.")


def _check_weighed(limit: Rate | Concurrency, found: LimitRecord) -> None:
    """Raise ConfigurationError for a smooth rate in place of one whose jobs have costs."""
    known = read_limit(found.declared)
    if isinstance(known, Rate) and known.cost is not None and isinstance(limit, Rate) and limit.smooth:
        raise ConfigurationError(
            f"Limit {found.name!r} weighs jobs by {known.cost!r}, and a smooth rate cannot: leave smooth out. Nothing was changed."
        )


def _fits(record: LimitRecord, limit: Rate | Concurrency, key: str | None) -> bool:
    known = read_limit(record.declared)
    by_fits = known.by == limit.by or (limit.by is None and (key is not None or limit.name == record.name))
    return type(known) is type(limit) and by_fits and (key is None or known.by is not None)


def _listed(known: list[str]) -> str:
    return f"It has: {'; '.join(known)}." if known else "It has none."


def _is_exact(declared: str) -> bool:
    return declared.rpartition(" ")[2].startswith("+")


def _state(queue: str, record: LimitRecord, of_all: str, partitions: int) -> LimitState:
    """Return the state of a limit or a key; *of_all*: what operators have set for all keys, or ""."""
    declared = read_limit(record.declared) if record.declared else None
    in_effect = record.override or of_all
    override = read_limit(in_effect, record.declared) if in_effect else None
    factor = 1 if _is_exact(record.declared) else partitions
    in_force = override or declared
    assert in_force is not None
    return LimitState(
        queue,
        record.name,
        record.key or None,
        replace(in_force, n=in_force.n * factor),
        None if declared is None else replace(declared, n=declared.n * factor),
        record.override != "",
        record.used,
        record.waiting,
        instant_or_none(record.opens_at),
    )


def _sum(one: LimitState, other: LimitState) -> LimitState:
    opens = [at for at in (one.opens_at, other.opens_at) if at is not None]
    return msgspec.structs.replace(
        one, used=one.used + other.used, waiting=one.waiting + other.waiting, opens_at=min(opens, default=None)
    )
