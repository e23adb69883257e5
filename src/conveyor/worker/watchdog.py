"""Says which job blocks the event loop, from a thread that the loop cannot block."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from time import monotonic

log = logging.getLogger("conveyor.worker")
LOOK = 0.5
PATIENCE = 1.0
"""Seconds without a pass of the loop after which it counts as blocked."""
MAX_STALL = 300.0
"""Seconds a worker may block its event loop before its jobs are given to others."""


class Watchdog:
    """Ticks on the loop and looks from a daemon thread; one warning per blockage."""

    def __init__(
        self, who: Callable[[], tuple[str, str] | None], ticked: Callable[[], None],
        blame: Callable[[str, str], None] | None = None,
    ) -> None:  # fmt: skip
        """
        Take who runs on the loop now (task and job id), and what else to do at each tick.

        With *blame* a supervisor watches too, and sees more: it is told the name and says the rest.
        """
        self._who, self._ticked, self._blame = who, ticked, blame
        self._tick_at = monotonic()
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin."""
        self._tick()
        threading.Thread(target=self._watch, name="conveyor-watchdog", daemon=True).start()

    def close(self) -> None:
        """End."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self._tick_at = monotonic()
        self._ticked()
        self._timer = self._loop.call_later(LOOK / 2, self._tick)

    def _watch(self) -> None:
        told, looked = 0.0, monotonic()
        while not self._stop.wait(LOOK if self._blame is None else LOOK / 2):
            tick, now = self._tick_at, monotonic()
            blocked, late, looked = now - tick, now - looked > PATIENCE, now
            if late and self._who() is None:
                continue  # the whole process stood still, and no job is to blame for it
            if blocked < (PATIENCE if self._blame is None else LOOK / 2) or tick == told:
                continue
            told = tick
            task, job_id = self._who() or ("something", "-")
            if self._blame is not None:
                self._blame(task, job_id)
                continue
            frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001  the documented way to see another thread
            stack = "".join(traceback.format_stack(frame)[-12:]) if frame else ""
            log.warning(
                "E11 Task %s (%s) has blocked the event loop for %.1f s. Other jobs and results wait.\n"
                '    Make it `def` instead of `async def` to run in a thread, or @app.task(run_in="process").\n%s',
                task, job_id, blocked, stack,
            )  # fmt: skip
