"""When a process has done enough: after so many jobs, or above so much memory, a fresh one takes its place."""

from __future__ import annotations

import os
import random
import sys
from time import monotonic

from conveyor.worker.logs import LOG

MIN_LIFE = 10.0
"""Seconds before a process is given up for its memory: else one whose first job needs it all would be replaced without end."""
SPREAD = 10
"""Limits are drawn up to a tenth lower, so that processes which started together are not replaced together."""
_CHECK_EVERY = 0.2
_STATM = "/proc/self/statm"


class RecycleLimits:
    """The limits of the process it is made in. None: no limit of that kind; memory in bytes."""

    def __init__(self, max_jobs: int | None, max_memory: int | None) -> None:
        """Draw the limits; call `begin` before the first job."""
        self.max_jobs, self.max_memory = max_jobs, max_memory
        self.is_limited = max_jobs is not None or max_memory is not None
        self._jobs = None if max_jobs is None else max_jobs - random.randrange(max_jobs // SPREAD + 1)  # noqa: S311
        self._memory: float | None = None
        self._begun_at = self._checked_at = monotonic()

    def begin(self) -> None:
        """
        Measure what the process needs before its first job: the limit of memory counts what comes on top.

        A limit that is below it would have fresh processes replaced one after the other; twice the need is allowed then.
        """
        self._begun_at = self._checked_at = monotonic()
        if self.max_memory is None:
            return
        at_start = resident_memory()
        self._memory = self.max_memory - random.random() / SPREAD * max(0, self.max_memory - at_start)  # noqa: S311
        if at_start >= self.max_memory:
            self._memory = 2.0 * at_start
            LOG.error(
                "Process %d has %s before its first job, more than --max-memory %s: a fresh one would be no smaller, so it is "
                "replaced above %s. Raise the limit.",
                os.getpid(), megabytes(at_start), megabytes(self.max_memory), megabytes(self._memory),
            )  # fmt: skip

    def remaining(self, jobs: int) -> int:
        """Return how many jobs more it may take, when it took *jobs*."""
        return sys.maxsize if self._jobs is None else max(0, self._jobs - jobs)

    def used_up(self, jobs: int) -> str | None:
        """Return in words why a process that had *jobs* is to be replaced, or None; looks at memory a few times a second."""
        if self._jobs is not None and jobs >= self._jobs:
            return f"has had {_jobs(jobs)} (limit {self.max_jobs:,})"
        now = monotonic()
        life = now - self._begun_at
        if self._memory is None or now - self._checked_at < _CHECK_EVERY or life < MIN_LIFE:
            return None
        self._checked_at = now
        resident = resident_memory()
        if resident <= self._memory:
            return None
        return f"has {megabytes(resident)} after {_jobs(jobs)} and {life:.0f} s (limit {megabytes(self._memory)})"


def resident_memory() -> int:
    """Return the bytes of memory this process occupies; the most it ever did on systems without /proc."""
    try:
        with open(_STATM, "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def megabytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e6:,.0f} MB"
