"""Schedules: one pure function per step, each returning a `Call`. lib/schedules.lua says what a schedule is in Redis."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import AS_DECLARED
from conveyor.store.operations import Entry, push_arguments, push_keys
from conveyor.store.script import Argument, Call, Command, Script

SCHEDULE_PUT, SCHEDULE_FIRE = Script("schedule_put"), Script("schedule_fire")
SCHEDULE_CHANGE, SCHEDULE_READ = Script("schedule_change"), Script("schedule_read")

HSETNX, HGET, HDEL, HGETALL = Script("HSETNX"), Script("HGET"), Script("HDEL"), Script("HGETALL")

SKIP_REASONS = ("missed", "overlap", "paused", "superseded")
"""Why instants are skipped, as schedule_read.lua counts them."""
PUT_FOREIGN = -1
"""The reply of schedule_put.lua for a name of the other origin; its header has the others."""
Origin = Literal["code", "data"]


class ScheduleRow(NamedTuple):
    """
    A schedule as it is stored; instants in ms since the epoch by the server's clock.

    `entry` is what each instant enqueues, as `outbox.write` wrote it. `next_ms` is the instant it has reached, None when none
    comes any more. `runs` are the last instants, the newest first. `skipped_by`: how many were skipped, by reason.
    """

    name: str
    digest: str
    spec: bytes
    entry: bytes
    origin: Origin
    next_ms: int | None
    paused: bool
    last: str
    fired: int
    skipped: int
    runs: list[RunLine]
    declared_ms: int
    skipped_by: dict[str, int]


class RunLine(NamedTuple):
    """
    One instant: `outcome` is ``fired`` or why it was skipped.

    `job` is the bare id of its job, `skipped` how many instants, of which it is the first, were skipped together.
    """

    instant_ms: int
    at_ms: int
    outcome: str
    job: str
    skipped: int


class Fired(NamedTuple):
    """The outcome of an instant: the bare id of its job, or why it was skipped; neither when another worker did it."""

    job: str = ""
    skipped: str = ""
    refusal: str = ""
    """The status with which the queue refused the job; nothing was changed then."""


def schedule_index(namespace: str) -> str:
    """Return the key of the hash of all schedules: name to queue."""
    return f"{namespace}:schedules"


def claim_name(index: str, name: str, queue: str) -> Call[int]:
    """Return the call that gives *name* to *queue* unless another has it."""
    return Command(HSETNX, (index,), (name, queue), int)


def queue_of(index: str, name: str) -> Call[str]:
    """Return the call that reads which queue has *name*; "" for none."""
    return Command(HGET, (index,), (name,), lambda found: "" if found is None else found.decode())


def forget_name(index: str, name: str) -> Call[int]:
    """Return the call that frees *name*."""
    return Command(HDEL, (index,), (name,), int)


def all_names(index: str) -> Call[dict[str, str]]:
    """Return the call that reads all names, and the queue of each."""
    return Command(HGETALL, (index,), (), _read_names)


def put_schedule(
    keys: QueueKeys, name: str, digest: str, spec: bytes, entry: bytes, origin: Origin, next_ms: int | None
) -> Call[int]:
    """Return the call that declares a schedule; it yields a reply of schedule_put.lua."""
    args = (name, digest, spec, entry, origin, "" if next_ms is None else str(next_ms))
    return Call(SCHEDULE_PUT, _keys(keys, name), args, int)


def fire_schedule(
    keys: QueueKeys, row: ScheduleRow, next_ms: int | None, job: Entry | None, *,
    reason: str = "", count: int = 1, alone: bool = False, max_length: int = AS_DECLARED,
) -> Call[Fired]:  # fmt: skip
    """
    Return the call that carries out the instant that *row* has reached, and moves on to *next_ms*.

    *job* is enqueued; without one the instant is skipped for *reason*, with *count* instants in all. *alone*: skipped also
    while the last job lives.
    """
    args: list[Argument] = [
        row.name, row.digest, str(row.next_ms), "" if next_ms is None else str(next_ms), reason, str(count), "1" if alone else "",
    ]  # fmt: skip
    args += push_arguments("0", keys, [] if job is None else [job], max_length)[0]
    names = (keys.schedule(row.name), *push_keys(keys, "")[1:])
    return Call(SCHEDULE_FIRE, names, args, _read_fired)


def change_schedule(
    keys: QueueKeys,
    name: str,
    action: Literal["pause", "resume", "delete", "defer"],
    ms: int | None = None,
    passed: int = 0,
) -> Call[int]:
    """Return the call that changes a schedule, as schedule_change.lua says; it yields 1, 0 or -1."""
    return Call(SCHEDULE_CHANGE, _keys(keys, name), (name, action, "" if ms is None else str(ms), str(passed)), int)


def read_schedules(keys: QueueKeys, *names: str) -> Call[tuple[int, list[ScheduleRow]]]:
    """Return the call that reads schedules of a queue, all without *names*; it yields the server's ms, and those that exist."""
    return Call(SCHEDULE_READ, (keys.schedules, keys.none), names, _read_rows)


def _keys(keys: QueueKeys, name: str) -> tuple[str, ...]:
    return (keys.schedule(name), keys.schedules, keys.due, keys.conf, keys.wake, keys.none)


def _read_names(reply: Any) -> dict[str, str]:
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode(): queue.decode() for name, queue in pairs}


def _read_fired(reply: list[Any]) -> Fired:
    code = reply[0]
    if code == 1:
        return Fired(job=reply[1].decode())
    if code == 2:
        return Fired(skipped=reply[1].decode())
    return Fired(refusal=reply[1].decode().split("\n")[1]) if code == -1 else Fired()


def _read_rows(reply: list[Any]) -> tuple[int, list[ScheduleRow]]:
    return reply[0], sorted(map(_read_row, reply[1:]))


def _read_row(fields: list[bytes | None]) -> ScheduleRow:
    name, digest, spec, entry, origin, next_, paused, last, fired, skipped, runs, declared, *reasons = (
        one or b"" for one in fields
    )
    return ScheduleRow(
        name.decode(), digest.decode(), spec, entry, "code" if origin == b"code" else "data", int(next_) if next_ else None,
        paused == b"1", last.decode(), int(fired or 0), int(skipped or 0),
        [_read_run(line) for line in runs.decode().split("\n") if line], int(declared or 0),
        {reason: int(count or 0) for reason, count in zip(SKIP_REASONS, reasons, strict=True)},
    )  # fmt: skip


def _read_run(line: str) -> RunLine:
    instant, at, outcome, rest = line.split(" ", 3)
    fired = outcome == "fired"
    return RunLine(int(instant), int(at), outcome, rest if fired else "", 0 if fired else int(rest))
