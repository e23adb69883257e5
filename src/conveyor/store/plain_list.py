"""Pushes of raw entries to a plain Redis list that other programs read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from conveyor.ids import new_identity
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import WITHDRAW, ProducerSequence, StalePush, status_of
from conveyor.store.script import Call, Script

if TYPE_CHECKING:
    from collections.abc import Iterator

LIST_PUSH = Script("list_push")


class SequencePool:
    """Producer sequences for pushes that overlap: each is used by one push at a time, and none by a forked child."""

    def __init__(self) -> None:
        self._free: deque[ProducerSequence] = deque()
        self._process = os.getpid()

    @contextmanager
    def lend(self) -> Iterator[ProducerSequence]:
        """Lend a sequence. One whose push failed is not used again, because a repeat may still arrive."""
        if self._process != os.getpid():
            self._free, self._process = deque(), os.getpid()
        try:
            sequence = self._free.pop()
        except IndexError:
            sequence = ProducerSequence(new_identity())
        yield sequence
        self._free.append(sequence)


def push(keys: QueueKeys, sequence: ProducerSequence, entries: Sequence[bytes]) -> Call[None]:
    """Return the call that appends *entries* to the plain list of *keys*."""
    assert keys.foreign is not None
    number = str(sequence.next())
    return Call(
        LIST_PUSH, (keys.lane(sequence.identity), keys.foreign), (number, *entries), partial(_pushed, number), WITHDRAW
    )


def _pushed(number: str, reply: bytes) -> None:
    if status_of(number, reply)[0] != "ok":
        raise StalePush
