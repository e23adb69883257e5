"""Waking up when the next scheduled job is due."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conveyor.store.operations import Turn


class Alarm:
    """A timer for the first due instant of a queue. All workers watch it, and most of them lose the race."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """Take what to do when it is due."""
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._watched: int | None = None
        self._yields_until = 0.0

    @property
    def is_set(self) -> bool:
        """True when something is scheduled, as far as we know."""
        return self._watched is not None

    def watch(self, turn: Turn, *, asked: bool) -> None:
        """Set the timer by a turn's reply; *asked* tells that it had room for work."""
        if turn.next_due is None:
            self._watched = None
            return
        if self._timer is not None:
            self._timer.cancel()
        late = 0.0
        if self._watched is not None and turn.next_due > self._watched and not turn.ids and asked:
            # Somebody else was quicker: be the second line, a little later, until we win one.
            late = random.uniform(0.02, 0.08)  # noqa: S311  no secret
        if monotonic() < self._yields_until:
            late = random.uniform(0.1, 0.2)  # noqa: S311
        self._watched = turn.next_due
        pause = max(0.001, (turn.next_due - turn.now) / 1000 + 0.001 + late)
        self._timer = asyncio.get_running_loop().call_later(min(pause, 3600.0), self._due)

    def give_way(self, seconds: float) -> None:
        """Let others be first for so long: what comes due then are jobs that we cannot run, and they perhaps can."""
        self._yields_until = max(self._yields_until, monotonic() + seconds)

    def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._ring()
