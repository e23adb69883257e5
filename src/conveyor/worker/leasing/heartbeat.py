"""
Beating from a thread: a worker inside another program keeps its leases while the loop is blocked.

Says which job blocks the event loop, from a thread that the loop cannot block.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.store import operations
from conveyor.store.transport.connection import Connection

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.endpoint import Endpoint


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


Lease = tuple["QueueKeys", str, int]


class Heartbeat:
    """A daemon thread that renews leases which nobody renewed lately; a turn of the worker renews as well."""

    def __init__(
        self, place: Callable[[QueueKeys], Endpoint], leases: Callable[[], list[Lease]],
        last_renewal: Callable[[], float], last_tick: Callable[[], float],
    ) -> None:  # fmt: skip
        """
        Take who knows where to beat, what to renew (keys, identity, lease in ms), and when that was done last.

        Also when the event loop last turned: one that is blocked for ever must not hold its jobs for ever. Instants
        by `time.monotonic`.
        """
        self._place = place
        self._connections: dict[Endpoint, Connection] = {}
        self._leases, self._last, self._tick = leases, last_renewal, last_tick
        self._gave_up = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="conveyor-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, without waiting for a reply that may be on its way."""
        self._stop.set()

    def _beat(self) -> None:
        shortest = min((lease for _, _, lease in self._leases()), default=15_000) / 1000
        while not self._stop.wait(shortest / 4):
            if monotonic() - self._last() < 0.4 * shortest or self._is_hopeless():
                continue
            for keys, identity, lease_ms in self._leases():
                try:
                    self._connection(keys).run(operations.heartbeat(keys, identity, lease_ms), patience=shortest / 4)
                except ConveyorError as error:
                    log.warning("could not renew the lease on queue %s: %s", keys.queue, error)
        for connection in self._connections.values():
            connection.close()

    def _is_hopeless(self) -> bool:
        """Tell whether the loop stands still for so long that others should have its jobs; say so once."""
        tick = self._tick()
        if monotonic() - tick <= MAX_STALL:
            return False
        if self._gave_up != tick:
            self._gave_up = tick
            log.error(
                "E11 The event loop has been blocked for %g s: its leases are renewed no more, and other workers take its "
                "jobs. Make the task a plain def, so that it runs in a thread.", MAX_STALL,
            )  # fmt: skip
        return True

    def _connection(self, keys: QueueKeys) -> Connection:
        place = self._place(keys)
        found = self._connections.get(place)
        if found is None:
            found = self._connections[place] = Connection(place)
        return found
