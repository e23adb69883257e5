"""
Waiting between threads when a signal handler may raise at any moment.

`threading.Event` and `threading.Condition` take their lock in Python code, so an exception out of a handler that strikes
just there leaves it held, and every later call hangs. Here nothing is held: each waiter sleeps on a lock of its own, and
what they share is a deque. For exclusion ``with lock:`` of a plain `threading.Lock` is safe: it is taken in C.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from conveyor.store.sleepers import SleepingThread


class SignalSafeEvent:
    """A flag that threads wait for, as `threading.Event`; `wait_for` waits for anything that its setter changes."""

    def __init__(self) -> None:
        self._is_set = False
        self._sleepers: deque[SleepingThread] = deque()

    def is_set(self) -> bool:
        """Tell whether the flag is set."""
        return self._is_set

    def set(self) -> None:
        """Set the flag and wake all that wait."""
        self._is_set = True
        for sleeper in tuple(self._sleepers):
            sleeper.wake()

    def clear(self) -> None:
        """Clear the flag."""
        self._is_set = False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the flag is set, at most *seconds*; return whether it is."""
        return self._is_set or self.wait_for(self.is_set, seconds)

    def wait_for(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until *condition* is true, at most *seconds*, looking whenever `set` was called; return whether it is."""
        deadline = None if seconds is None else time.monotonic() + seconds
        sleeper = SleepingThread()
        self._sleepers.append(sleeper)  # before the look, so that no change is missed
        try:
            while not condition():
                remaining = -1.0 if deadline is None else deadline - time.monotonic()
                if deadline is not None and remaining <= 0:
                    return False
                sleeper.sleep(remaining)
            return True
        finally:
            self._sleepers.remove(sleeper)
