"""
The names of queues that this process has added to Redis's set of all queues.

The set lies in a slot of its own, so no push can look into it. It is written to again when a push or a registration
finds its queue new in Redis, which has then forgotten everything, and every 30 seconds: the set alone may be lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

REFRESH = 30.0
"""Seconds after which all names are added again."""
PAUSE = 5.0
"""Seconds before the set is tried again at a node that was away."""
MOST = 10_000
"""Names that are remembered, at most: a program may push to a queue of each of its clients, all its life."""


class QueueIndex:
    """The names that were added, and when to add them again."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}  # in the order in which they were added
        self._refresh_at = float("inf")
        self._paused_until = float("-inf")

    def __contains__(self, name: str) -> bool:
        """Tell whether nothing needs to be done before a push to queue *name*."""
        return name in self._names and monotonic() < self._refresh_at

    def due(self, names: Iterable[str]) -> list[str]:
        """Return the names to add now: those of *names* that were not added, and from time to time all that are remembered."""
        now = monotonic()
        if now < self._paused_until:
            return []
        if now < self._refresh_at:
            return [name for name in names if name not in self._names]
        self._refresh_at = now + REFRESH  # first, so that pushes at the same time do not add them as well
        return sorted({*self._names, *names})

    def add(self, names: Iterable[str]) -> None:
        """Note that *names* were added."""
        if not self._names:
            self._refresh_at = monotonic() + REFRESH
        self._names.update(dict.fromkeys(names))
        while len(self._names) > MOST:
            self.discard(next(iter(self._names)))  # the next push there adds it again

    def discard(self, name: str) -> None:
        """Note that Redis has forgotten queue *name*."""
        self._names.pop(name, None)

    def pause(self) -> None:
        """Note that the node of the set is away: pushes to other nodes go on without it."""
        now = monotonic()
        self._paused_until, self._refresh_at = now + PAUSE, min(self._refresh_at, now + PAUSE)
