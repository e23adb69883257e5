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

CELLS = 4096
LOOP_CELL = 0
"""The seat of the job whose code the event loop executes."""
OVERFLOW_CELL = 1
"""Taken by everyone who found no seat, and never cleared: then nobody can be ruled out."""
EXECUTING = 1 << 33
"""Added to the name of a job whose code a thread executes."""
IN_PROCESS = 1 << 34
"""Added to the name of a job that a process of its own executes, until its end is settled: a crash may not have been told yet."""
_USED = 1 << 32  # no name is 0, which is an empty seat


def id_checksum(id_: str) -> int:
    """Return what a job is called in a seat; two of the few thousand that a child holds share one once in a million times."""
    return crc32(id_.encode()) | _USED


class RunningTable:
    """The child's side. `cells` is written directly where every nanosecond counts."""

    def __init__(self, cells: memoryview) -> None:
        """Take `SEATS` cells of eight bytes."""
        self.cells = cells
        self._next = OVERFLOW_CELL + 1
        self._free: list[int] = []

    def take_cell(self) -> int:
        """Return an empty seat; `FULL` when there is none."""
        if self._free:
            return self._free.pop()
        if self._next == CELLS:
            return OVERFLOW_CELL
        self._next += 1
        return self._next - 1

    def release_cell(self, cell: int) -> None:
        """Give a seat back."""
        if cell != OVERFLOW_CELL:
            self.cells[cell] = 0
            self._free.append(cell)


@dataclass(frozen=True, slots=True)
class RunningSnapshot:
    """What the seats said when their child was dead; names as in the seats."""

    executing: frozenset[int]
    waiting: frozenset[int]
    in_process: frozenset[int] = frozenset()

    @classmethod
    def read(cls, cells: Iterable[int]) -> RunningSnapshot | None:
        """Take the cells; None where there were more jobs than seats."""
        loop, full, *rest = cells
        if full:
            return None
        executing = frozenset({loop} | {cell ^ EXECUTING for cell in rest if cell & EXECUTING}) - {0}
        in_process = frozenset(cell ^ IN_PROCESS for cell in rest if cell & IN_PROCESS)
        waiting = frozenset(cell for cell in rest if cell and not cell & (EXECUTING | IN_PROCESS))
        return cls(executing, waiting - executing - in_process, in_process)

    def blame(self, ids: Iterable[str], *, fault: bool) -> tuple[list[str], list[str]]:
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
        held = [(id_, id_checksum(id_)) for id_ in ids]
        blamed = [id_ for id_, cell in held if cell in executing or cell in self.in_process]
        return blamed, [] if fault else [id_ for id_, cell in held if cell in waiting]
