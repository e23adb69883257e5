"""
Who ran what when a child died: a table on the board with a seat for each slot, thread and process, and one for the loop.

A job is named by a checksum of its id, so that a seat is one cell of eight bytes, stored in one go. Writing costs a job
0.2 µs; nobody reads before a death. Then it tells who can have caused it: whose code was being executed, and who was
only under way, waiting for something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

SEATS = 4096
LOOP = 0
"""The seat of the job whose code the event loop executes."""
FULL = 1
"""Taken by everyone who found no seat, and never cleared: then nobody can be ruled out."""
EXECUTING = 1 << 33
"""Added to the name of a job whose code a thread executes."""
BESIDE = 1 << 34
"""Added to the name of a job that a process of its own executes, until its end is settled: a crash may not have been told yet."""
_NAMED = 1 << 32  # no name is 0, which is an empty seat


def named(id_: str) -> int:
    """Return what a job is called in a seat; two of the few thousand that a child holds share one once in a million times."""
    return crc32(id_.encode()) | _NAMED


class RunningTable:
    """The child's side. `cells` is written directly where every nanosecond counts."""

    def __init__(self, cells: memoryview) -> None:
        """Take `SEATS` cells of eight bytes."""
        self.cells = cells
        self._next = FULL + 1
        self._free: list[int] = []

    def take(self) -> int:
        """Return an empty seat; `FULL` when there is none."""
        if self._free:
            return self._free.pop()
        if self._next == SEATS:
            return FULL
        self._next += 1
        return self._next - 1

    def leave(self, seat: int) -> None:
        """Give a seat back."""
        if seat != FULL:
            self.cells[seat] = 0
            self._free.append(seat)


@dataclass(frozen=True, slots=True)
class RunningSnapshot:
    """What the seats said when their child was dead; names as in the seats."""

    executing: frozenset[int]
    waiting: frozenset[int]
    beside: frozenset[int] = frozenset()

    @classmethod
    def read(cls, cells: Iterable[int]) -> RunningSnapshot | None:
        """Take the cells; None where there were more jobs than seats."""
        loop, full, *seats = cells
        if full:
            return None
        executing = frozenset({loop} | {seat ^ EXECUTING for seat in seats if seat & EXECUTING}) - {0}
        beside = frozenset(seat ^ BESIDE for seat in seats if seat & BESIDE)
        waiting = frozenset(seat for seat in seats if seat and not seat & (EXECUTING | BESIDE))
        return cls(executing, waiting - executing - beside, beside)

    def judge(self, ids: Iterable[str], *, fault: bool) -> tuple[list[str], list[str]]:
        """
        Return those of *ids* that are to blame for the death, and those that may be.

        With a *fault* in what was executed (a signal of the processor, an exit) nobody else comes into question. A kill
        from outside, when memory runs out, strikes whoever executes something just then, and not always who took it.
        When nobody executed anything, all that were under way are to blame. Jobs beside always are: what their own process
        died of may not have been told yet.
        """
        executing, waiting = self.executing, self.waiting
        if not executing:
            executing, waiting = waiting, frozenset()
        held = [(id_, named(id_)) for id_ in ids]
        blamed = [id_ for id_, seat in held if seat in executing or seat in self.beside]
        return blamed, [] if fault else [id_ for id_, seat in held if seat in waiting]
