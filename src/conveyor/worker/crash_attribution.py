"""
Finds the jobs that can have crashed a child, from a table of the jobs that were running.

The table lies in the memory that the child shares with its supervisor. It has a cell for each coroutine, thread and
process that runs a job, and one for the event loop. A cell holds a checksum of the job's id in eight bytes, which are
stored in one go. Writing costs a job 0.2 µs; nothing is read before the child is dead. Then the table tells which jobs'
code was being executed, and which jobs were only waiting for something.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import msgspec

CELLS = 4096
"""Cells of the table."""
LOOP_CELL = 0
"""The cell of the job whose code the event loop executes."""
OVERFLOW_CELL = 1
"""Overflow cell. Set when the table was full; never cleared, because afterwards no job can be ruled out."""
EXECUTING = 1 << 33
"""Bit that is set in the cell of a job whose code a thread executes."""
IN_PROCESS = 1 << 34
"""
Bit that is set in the cell of a job that a process of its own executes. It stays until the end of the job is settled: a
crash of that process may not have been reported yet.
"""
IN_BATCH = 1 << 35
"""Bit that is set in the cell of an item of a batch that runs: above it stands the number of the batch."""
_BATCH_SHIFT = 36
_BATCH_NUMBERS = (1 << 26) - 1
_USED = 1 << 32  # set in every checksum: an empty cell is 0


def id_checksum(id_: str) -> int:
    """
    Return the value of a cell that stands for a job.

    Two of the few thousand jobs that a child holds share one once in a million times.
    """
    return crc32(id_.encode()) | _USED


def item_cell(id_: str, batch: str) -> int:
    """Return the value of a cell that says: where *batch* runs, this item of it runs too."""
    return id_checksum(id_) | IN_BATCH | (crc32(batch.encode()) & _BATCH_NUMBERS) << _BATCH_SHIFT


class RunningTable:
    """The table as its child writes it. `cells` is written directly where every nanosecond counts."""

    def __init__(self, cells: memoryview) -> None:
        self.cells = cells
        self._next = OVERFLOW_CELL + 1
        self._free: list[int] = []

    def take_cell(self) -> int:
        """Return the number of an empty cell; `OVERFLOW_CELL` when there is none."""
        if self._free:
            return self._free.pop()
        if self._next == CELLS:
            return OVERFLOW_CELL
        self._next += 1
        return self._next - 1

    def release_cell(self, cell: int) -> None:
        """Empty a cell and give it back."""
        if cell != OVERFLOW_CELL:
            self.cells[cell] = 0
            self._free.append(cell)


class RunningSnapshot(msgspec.Struct, frozen=True):
    """The jobs that were running when their child died, as checksums."""

    executing: frozenset[int]
    waiting: frozenset[int]
    in_process: frozenset[int] = frozenset()

    @classmethod
    def read(cls, cells: Iterable[int]) -> RunningSnapshot | None:
        """Return what the cells say; None if there were more jobs than cells."""
        loop, full, *rest = cells
        if full:
            return None
        items: dict[int, set[int]] = {}
        for cell in rest:
            if cell & IN_BATCH:
                items.setdefault(cell >> _BATCH_SHIFT, set()).add(cell & (IN_BATCH - 1))

        def with_items(cells: Iterable[int]) -> frozenset[int]:
            found = set(cells) - {0}
            return frozenset(found.union(*(items.get(cell & _BATCH_NUMBERS, ()) for cell in found if items)))

        executing = with_items({loop} | {cell ^ EXECUTING for cell in rest if cell & EXECUTING})
        in_process = with_items(cell ^ IN_PROCESS for cell in rest if cell & IN_PROCESS)
        waiting = with_items(cell for cell in rest if not cell & (EXECUTING | IN_PROCESS | IN_BATCH))
        return cls(executing, waiting - executing - in_process, in_process)

    def blame(self, ids: Iterable[str], *, fault: bool) -> tuple[list[str], list[str]]:
        """
        Return those of *ids* that are to blame for the crash, and those that may be.

        With a *fault* in what was executed (a signal of the processor, an exit) no other job comes into question. A kill
        from outside, when memory runs out, hits the jobs that execute something just then, and not always the one that
        took the memory. When no job executed anything, all that were waiting are to blame. Jobs in processes of their own
        always are: why that process died may not have been reported yet.
        """
        executing, waiting = self.executing, self.waiting
        if not executing:
            executing, waiting = waiting, frozenset()
        held = [(id_, id_checksum(id_)) for id_ in ids]
        blamed = [id_ for id_, cell in held if cell in executing or cell in self.in_process]
        return blamed, [] if fault else [id_ for id_, cell in held if cell in waiting]
