"""Limits of jobs and memory above which a process is replaced by a fresh one."""

from __future__ import annotations

import os
import random
import sys
from time import monotonic

from conveyor.units import quantity
from conveyor.worker.logs import LOG
from conveyor.worker.usage import resident_memory

MIN_LIFE = 10.0
"""
Seconds before a process is replaced for its memory. Otherwise one whose first job needs all of it would be replaced
without end.
"""
SPREAD = 10
"""Limits are drawn lower by up to a tenth, so that processes which started together are not replaced together."""
_CHECK_EVERY = 0.2


class RecycleLimits:
    """The limits of one process: jobs, and memory in bytes. None: no limit of that kind."""

    def __init__(self, max_jobs: int | None, max_memory: int | None) -> None:
        self.max_jobs, self.max_memory = max_jobs, max_memory
        self.is_limited = max_jobs is not None or max_memory is not None
        self._jobs = None if max_jobs is None else max_jobs - random.randrange(max_jobs // SPREAD + 1)  # noqa: S311
        self._memory: float | None = None
        self._begun_at = self._checked_at = monotonic()

    def begin(self) -> None:
        """
        Measure the memory of the process before its first job.

        A memory limit below that would replace fresh processes one after the other; then twice the need is allowed.
        """
        self._begun_at = self._checked_at = monotonic()
        if self.max_memory is None:
            return
        at_start = memory_or_peak()
        self._memory = self.max_memory - random.random() / SPREAD * max(0, self.max_memory - at_start)  # noqa: S311
        if at_start >= self.max_memory:
            self._memory = 2.0 * at_start
            LOG.error(
                "Process %d has %s before its first job, more than --max-memory %s. A fresh process would be no smaller, so "
                "this one is replaced above %s. Raise the limit.",
                os.getpid(), megabytes(at_start), megabytes(self.max_memory), megabytes(self._memory),
            )  # fmt: skip

    def remaining(self, jobs: int) -> int:
        """Return how many more jobs it may take after *jobs*; `sys.maxsize` without a limit."""
        return sys.maxsize if self._jobs is None else max(0, self._jobs - jobs)

    def used_up(self, jobs: int) -> str | None:
        """
        Return in words why a process is to be replaced after *jobs*; None while it is not.

        Memory is measured a few times a second.
        """
        if self._jobs is not None and jobs >= self._jobs:
            return f"has had {quantity(jobs, 'job')} (limit {self.max_jobs:,})"
        now = monotonic()
        life = now - self._begun_at
        if self._memory is None or now - self._checked_at < _CHECK_EVERY or life < MIN_LIFE:
            return None
        self._checked_at = now
        resident = memory_or_peak()
        if resident <= self._memory:
            return None
        return f"has {megabytes(resident)} after {quantity(jobs, 'job')} and {life:.0f} s (limit {megabytes(self._memory)})"


def memory_or_peak() -> int:
    """Return the bytes of memory that this process occupies; on systems that do not say the most it ever did."""
    resident = resident_memory()
    if resident is not None:
        return resident
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e6:,.0f} MB"
