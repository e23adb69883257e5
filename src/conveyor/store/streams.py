"""Partial results of jobs: the calls that write and read their streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from conveyor.ids import may_arrive_later
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Argument, Call, Script

EMIT, READ_STREAM = Script("emit"), Script("read_stream")
LIFE_MS = 86_400_000
"""For how long a stream is kept after its last part, while its job has not ended."""
MOST_PARTS, MOST_BYTES = 16_384, 64 << 20
"""Parts, and bytes of them, that a stream keeps at most: the newest."""
PAGE = 500
"""Parts that are read at once."""


class StoredPart(NamedTuple):
    """A part as it is stored: the attempt that emitted it, its number there from 1 on, and its value, sealed perhaps."""

    attempt: int
    number: int
    data: bytes

    @property
    def id(self) -> str:
        """The id of the part within its stream."""
        return f"{self.attempt}-{self.number}"


def kept_parts(longest: int) -> int:
    """Return how many parts a stream keeps when the longest one has so many bytes."""
    return max(1, min(MOST_PARTS, MOST_BYTES // max(longest, 1)))


def write_parts(attempt: int, first: int, parts: Sequence[bytes], longest: int) -> bytes:
    """
    Return parts as the scripts read them (lib/parts.lua).

    *first* is the number of the first one, *longest* the bytes of the longest one: a stream of long parts keeps fewer.
    """
    sizes = b"".join(b" %d" % len(part) for part in parts)
    return b"".join([b"%d %d %d%b\n" % (kept_parts(longest), attempt, first, sizes), *parts])


def emit(keys: QueueKeys, worker: str, records: Sequence[tuple[str, bytes]]) -> Call[list[bool]]:
    """Return the call that adds parts to streams (id, `write_parts`); it yields for each job whether the worker holds it."""
    args: list[Argument] = [str(LIFE_MS)]
    for id_, record in records:
        args += (id_, record)
    return Call(EMIT, (keys.leased(worker), keys.waiters, keys.none), args, lambda reply: [one == 1 for one in reply])


def read_stream(
    keys: QueueKeys,
    id: str,  # noqa: A002
    channel: str,
    after: tuple[int, int] | None,
) -> Call[tuple[str, list[StoredPart]]]:
    """Return the call that reads a page of parts *after* one, or registers *channel*; it yields read_stream.lua's word and them."""
    names = (keys.jobs, keys.dead, keys.waiters, keys.result(id), keys.result_window(id), keys.stream(id))
    begin = "" if after is None else f"{after[0]}-{after[1]}"
    return Call(
        READ_STREAM, names, (id, channel, begin, str(PAGE), "1" if may_arrive_later(id) else ""),
        lambda reply: (reply[0].decode(), [_part(entry, fields) for entry, fields in reply[1]]),
    )  # fmt: skip


def _part(entry: bytes, fields: Sequence[bytes]) -> StoredPart:
    attempt, _, number = entry.partition(b"-")
    return StoredPart(int(attempt), int(number), fields[1])
