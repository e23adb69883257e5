"""The memory and the processor time that a worker process uses, and for how long its event loop keeps others waiting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from time import monotonic, time

WINDOW = 15.0
"""Seconds after which a worker looks at its usage; it tells what it has found where that is another than what it told last."""
LEAST_LAG = 0.1
"""Seconds that the event loop kept others waiting; less is 0."""
LEAST_MEMORY, LEAST_SHARE, LEAST_CPU = 8 * 2**20, 0.1, 10
"""Changes that are told: of memory so many bytes that are such a share of it too, of processor use so many points."""
PROC = "/proc"
_MIB = 2**20
_UNREADABLE = (OSError, ValueError, IndexError)
"""Errors of a file that is missing, or of another system's form."""


def resident_memory(pid: int | str = "self") -> int | None:
    """Return the bytes of memory that a process occupies; None where that is not known, or it has ended."""
    try:
        with open(f"{PROC}/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except _UNREADABLE:
        return None


def processor_seconds(pid: int | str = "self") -> float | None:
    """Return the seconds of processor time that a process has used; None where that is not known, or it has ended."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb") as file:
            user, system = file.read().rpartition(b")")[2].split()[11:13]  # the name in parentheses may hold spaces
    except _UNREADABLE:
        return None
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class ProcessUsage:
    """
    The usage of a worker process with its job processes: measured at the end of a window, and kept as it was told last.

    `lag_ms`: the longest time that the event loop kept others waiting. `memory`: bytes, to the MiB; pages that processes share
    count in each. `cpu`: per cent of one core, 0 before the first window has ended. None: the system does not say.
    `told_ms`: when.
    """

    def __init__(self, job_processes: Callable[[], Iterable[int]]) -> None:
        """*job_processes* returns the pids of the processes that run jobs of this one."""
        self.lag_ms, self.told_ms = 0, 0
        self.memory: int | None = None
        self.cpu: int | None = None
        self._job_processes = job_processes
        self._longest = 0.0
        self._seconds: dict[int | str, float] = {}
        self._begun_at = monotonic()
        self._until = self._begun_at + WINDOW

    def begin(self) -> None:
        """Measure for the first time, before anything is told."""
        self.memory, self._seconds = self._measure()
        self.cpu = 0 if self._seconds else None
        self.told_ms, self._begun_at = int(time() * 1000), monotonic()
        self._until = self._begun_at + WINDOW

    def note_ticks(self, before: float, now: float, interval: float) -> None:
        """Note two ticks of the event loop, one after the other, that should be *interval* seconds apart."""
        self._longest = max(self._longest, now - before - interval)

    def is_to_be_told(self, now: float) -> bool:
        """Tell whether anything is to be told at the end of a window; a new window begins then."""
        if now < self._until:
            return False
        memory, seconds = self._measure()
        used = sum(max(0.0, total - self._seconds.get(pid, 0.0)) for pid, total in seconds.items())
        found = (
            int(self._longest * 1000) if self._longest >= LEAST_LAG else 0,
            memory,
            round(100 * used / (now - self._begun_at)) if seconds else None,
        )
        self._longest, self._seconds, self._begun_at, self._until = 0.0, seconds, now, now + WINDOW
        if not self._differs(*found):
            return False
        (self.lag_ms, self.memory, self.cpu), self.told_ms = found, int(time() * 1000)
        return True

    def _differs(self, lag_ms: int, memory: int | None, cpu: int | None) -> bool:
        """Tell whether what was found is another than what was told last, by more than what goes up and down all the time."""
        grown = abs((memory or 0) - (self.memory or 0))
        return (
            lag_ms != self.lag_ms
            or grown >= max(LEAST_MEMORY, LEAST_SHARE * (self.memory or 0))
            or abs((cpu or 0) - (self.cpu or 0)) >= LEAST_CPU
        )

    def _measure(self) -> tuple[int | None, dict[int | str, float]]:
        """Return the memory of all processes, and the processor time of each; of those that have ended meanwhile nothing."""
        own = resident_memory()
        if own is None:
            return None, {}
        job_processes = list(self._job_processes())
        memory = own + sum(resident_memory(pid) or 0 for pid in job_processes)
        pids: list[int | str] = ["self", *job_processes]
        seconds = {pid: found for pid in pids if (found := processor_seconds(pid)) is not None}
        return round(memory / _MIB) * _MIB, seconds
