"""
The number of worker processes by the age of the oldest job: decided here, carried out by the supervisor.

Age says what a count of jobs cannot: whether the processes keep up, whatever a job takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import monotonic

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.transport.credentials import LoginProvider
from conveyor.units import digits
from conveyor.worker.logs import LOG
from conveyor.worker.shared_memory import ChildInfo

GROW_AGE = 1.0
"""Seconds that the oldest job has waited, from which on the processes do not keep up."""
CALM_AGE = 0.3
"""Seconds below which they do; between the two nothing changes."""
GROW_EVERY = 1.0
"""Seconds between two steps up: the processes of the last one have begun by then."""
CALM_FOR = 15.0
"""Seconds of calm before the first step down, and between two of them less."""
SHRINK_EVERY = 8.0
LOOK_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the most processes."""

    lower: int
    upper: int

    @classmethod
    def parse(cls, text: str) -> Bounds:
        """Return the bounds that a text such as ``2..8`` names; raises ConfigurationError."""
        lower, upper = (digits(part) or 0 for part in (text.partition("..")[0], text.partition("..")[2]))
        if not 1 <= lower <= upper <= 256:
            raise ConfigurationError(
                f"--autoscale takes two numbers of processes from 1 to 256, such as 2..8, not {text!r}."
            )
        return cls(lower, upper)


def next_count(bounds: Bounds, count: int, age: float | None, calm: float, unchanged: float) -> int:
    """
    Return how many processes there should be.

    Args:
        bounds: the least and the most.
        count: how many there are.
        age: for how long the oldest job that could start has waited, in seconds; None: there is no such job.
        calm: seconds since it was last as old as `CALM_AGE`.
        unchanged: seconds since the number was changed.
    """
    if age is not None and age >= GROW_AGE and unchanged >= GROW_EVERY:
        return min(bounds.upper, max(count * 2, bounds.lower))
    if calm >= CALM_FOR and unchanged >= SHRINK_EVERY:
        return max(bounds.lower, count // 2)
    return min(max(count, bounds.lower), bounds.upper)


class OldestJob:
    """A thread that reads the age of the oldest job of the queues of a worker, twice a second."""

    def __init__(
        self, info: ChildInfo, queues: Callable[[], Collection[QueueKeys]], login: LoginProvider | None = None
    ) -> None:
        """
        Args:
            info: where Redis is.
            queues: returns the keys of the queues (or partitions) that the worker serves now.
            login: asked for user and password at each connection.
        """
        self._login = login
        self._info, self._queues = info, queues
        self.age: float | None = None
        """None: no job could start."""
        self.calm_since = self.read_at = monotonic()
        """Since when no job was as old as `CALM_AGE`, and when this was last read (monotonic)."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conveyor-oldest-job", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, which reads the memory that is closed next."""
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        client = Client(self._info.url, namespace=self._info.namespace, retry_for=1.0, login=self._login)
        while not self._stop.wait(LOOK_EVERY):
            try:
                counts = [client.run(inspection.counts(keys)) for keys in self._queues()]
            except ConveyorError as error:
                LOG.debug("The age of the oldest job could not be read: %s", error)
                continue  # the number of processes stays as it is
            now, ages = monotonic(), [one.oldest_age for one in counts if one.oldest_age is not None and not one.paused]
            self.age = max(ages, default=None)
            if self.age is not None and self.age >= CALM_AGE:
                self.calm_since = now
            self.read_at = now
        client.close()
