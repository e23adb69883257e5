"""
Limits and groups in Redis: what code declares, what operators set, and what is in use.

A limit is called `<name>` or `<name>:<key>`. Its text is ``c <n>`` (so many at a time) or ``r <n> <ms> <smooth 0|1>`` (so many
starts in a time); a declaration adds the argument that it is by, or ``-``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Script

DECLARE_LIMITS, SET_LIMITS, LIST_LIMITS = Script("declare_limits"), Script("set_limits"), Script("list_limits")


class LimitRecord(NamedTuple):
    """
    One limit; `key` is "" for the limit itself, and texts are "" where there are none.

    `used`: slots that are taken, or starts (their costs) that count now. `waiting`: jobs that wait here. `opens_at`: when time
    opens it (ms), None when it has room or time does not open it.
    """

    name: str
    key: str
    declared: str
    override: str
    used: int
    waiting: int
    opens_at: int | None


class GroupRecord(NamedTuple):
    """One key of groups: how many of its jobs wait and run, and what operators have set."""

    group: str
    waiting: int
    weight: int
    paused: bool
    running: int


def declare_limits(keys: QueueKeys, declared: Mapping[str, str], *, replace: bool) -> Call[dict[str, str]]:
    """
    Return the call that records the texts of limits by name, those that are new; with *replace* also other numbers.

    It yields the recorded texts of those whose kind or argument differs: then nothing was recorded.
    """
    args = ["1" if replace else ""]
    for name, text in declared.items():
        args += (name, text)
    return Call(
        DECLARE_LIMITS,
        _keys(keys),
        args,
        lambda reply: {reply[at].decode(): reply[at + 1].decode() for at in range(0, len(reply), 2)},
    )


def set_limit(keys: QueueKeys, name: str, key: str | None, text: str) -> Call[int]:
    """Return the call that records what an operator allows, for all keys (None) or for one. It wins until it is reset."""
    limit = name if key is None else f"{name}:{key}"
    return Call(SET_LIMITS, _keys(keys), ("set", limit, f"override:{limit}", text), int)


def reset_limit(keys: QueueKeys, name: str | None, key: str | None) -> Call[int]:
    """Return the call that removes what operators set of a limit and its keys, of one key, or of all limits; it yields how many."""
    return Call(SET_LIMITS, _keys(keys), ("reset", name or "", key or ""), int)


def set_group(keys: QueueKeys, group: str, *, weight: int | None, paused: bool | None) -> Call[None]:
    """Return the call that changes the weight of a group's key, or pauses or resumes it; None changes nothing."""
    args = ["set", f":{group}"]
    if weight is not None:
        args += (f"weight:{group}", "" if weight == 1 else str(weight))
    if paused is not None:
        args += (f"paused:{group}", "1" if paused else "")
    return Call(SET_LIMITS, _keys(keys), args, lambda reply: None)


def pause_task(keys: QueueKeys, task: str, *, paused: bool) -> Call[bool]:
    """Return the call that has the jobs of a task wait, or go on; it yields False when that was so already."""
    return Call(SET_LIMITS, _keys(keys), ("task", task, "1" if paused else ""), bool)


def list_limits(keys: QueueKeys, most: int = 1000) -> Call[list[LimitRecord]]:
    """Return the call that lists the limits that are declared, set, or in use: of the last at most *most*."""

    def decode(reply: list[Any]) -> list[LimitRecord]:
        return [
            LimitRecord(
                reply[at].decode(), reply[at + 1].decode(), reply[at + 2].decode(), reply[at + 3].decode(), int(reply[at + 4]),
                int(reply[at + 5]), int(reply[at + 6]) if reply[at + 6] else None,
            )
            for at in range(0, len(reply), 7)
        ]  # fmt: skip

    return Call(LIST_LIMITS, _list_keys(keys), ("limits", str(most)), decode)


def list_groups(keys: QueueKeys, limit: int = 1000) -> Call[list[GroupRecord]]:
    """Return the call that lists the keys of groups that have jobs, at most *limit*, and those of which something is set."""

    def decode(reply: list[Any]) -> list[GroupRecord]:
        return [
            GroupRecord(reply[at].decode(), reply[at + 1], reply[at + 2], reply[at + 3] == 1, reply[at + 4])
            for at in range(0, len(reply), 5)
        ]

    return Call(LIST_LIMITS, _list_keys(keys), ("groups", str(limit)), decode)


def _keys(keys: QueueKeys) -> tuple[str, ...]:
    return (keys.conf, keys.jobs, keys.due, keys.wake, keys.none)


def _list_keys(keys: QueueKeys) -> tuple[str, ...]:
    return (keys.conf, keys.jobs, keys.due, *keys.ready)
