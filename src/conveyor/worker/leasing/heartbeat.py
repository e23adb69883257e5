"""
Two daemon threads beside the event loop of a worker, which go on while a job blocks it.

`Watchdog` says which job blocks the loop. `Heartbeat` renews the leases of a worker inside another program.
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
CHECK_EVERY = 0.5
TICK = CHECK_EVERY / 2
"""Seconds between two ticks of the event loop."""
RETRY_FOR = 1.0
"""Seconds without a pass of the event loop after which it counts as blocked."""
MAX_STALL = 300.0
"""Seconds a job may block the event loop before other workers get the jobs of this one."""


class Watchdog:
    """A timer on the event loop and a daemon thread that watches it. Logs one warning for each blockage."""

    def __init__(
        self, current_job: Callable[[], tuple[str, str] | None], on_tick: Callable[[], None],
        on_blocked: Callable[[str, str], None] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            current_job: returns the task and the job id of what the loop runs now; None when it runs no job.
            on_tick: called at each tick, on the loop.
            on_blocked: called instead of the warning with the task and the job id, where a supervisor watches too: it
                sees more, and logs it.
        """
        self._current_job, self._on_tick, self._on_blocked = current_job, on_tick, on_blocked
        self._ticked_at = monotonic()
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Start the timer and the thread."""
        self._tick()
        threading.Thread(target=self._watch, name="conveyor-watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop both."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self._ticked_at = monotonic()
        self._on_tick()
        self._timer = self._loop.call_later(TICK, self._tick)

    def _watch(self) -> None:
        reported, checked_at = 0.0, monotonic()
        while not self._stop.wait(CHECK_EVERY if self._on_blocked is None else TICK):
            tick, now = self._ticked_at, monotonic()
            blocked, late, checked_at = now - tick, now - checked_at > RETRY_FOR, now
            if late and self._current_job() is None:
                continue  # the whole process stood still, and no job is to blame for it
            if blocked < (RETRY_FOR if self._on_blocked is None else TICK) or tick == reported:
                continue
            reported = tick
            task, job_id = self._current_job() or ("something", "-")
            if self._on_blocked is not None:
                self._on_blocked(task, job_id)
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
    """A daemon thread that renews leases which no turn of the worker renewed lately."""

    def __init__(
        self, endpoint_of: Callable[[QueueKeys], Endpoint], leases: Callable[[], list[Lease]],
        last_renewal: Callable[[], float], last_tick: Callable[[], float],
    ) -> None:  # fmt: skip
        """
        Args:
            endpoint_of: returns where a queue lies.
            leases: returns what to renew: (keys, identity, lease in ms).
            last_renewal: returns when a turn last renewed any of them (monotonic).
            last_tick: returns when the event loop last turned (monotonic). A loop that is blocked for ever must not hold
                its jobs for ever.
        """
        self._endpoint_of = endpoint_of
        self._connections: dict[Endpoint, Connection] = {}
        self._leases, self._last_renewal, self._tick = leases, last_renewal, last_tick
        self._gave_up_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conveyor-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, without waiting for a reply that may be on its way."""
        self._stop.set()

    def _run(self) -> None:
        shortest = min((lease for _, _, lease in self._leases()), default=15_000) / 1000
        while not self._stop.wait(shortest / 4):
            if monotonic() - self._last_renewal() < 0.4 * shortest or self._is_stalled():
                continue
            for keys, identity, lease_ms in self._leases():
                try:
                    self._connection(keys).run(operations.heartbeat(keys, identity, lease_ms), retry_for=shortest / 4)
                except ConveyorError as error:
                    log.warning("queue %s: the lease could not be renewed: %s", keys.queue, error)
        for connection in self._connections.values():
            connection.close()

    def _is_stalled(self) -> bool:
        """Tell whether the loop is blocked for so long that other workers should have its jobs; log it once."""
        tick = self._tick()
        if monotonic() - tick <= MAX_STALL:
            return False
        if self._gave_up_at != tick:
            self._gave_up_at = tick
            log.error(
                "E11 The event loop has been blocked for %g s: its leases are no longer renewed, and other workers take its "
                "jobs. Make the task a plain def, so that it runs in a thread.", MAX_STALL,
            )  # fmt: skip
        return True

    def _connection(self, keys: QueueKeys) -> Connection:
        endpoint = self._endpoint_of(keys)
        connection = self._connections.get(endpoint)
        if connection is None:
            connection = self._connections[endpoint] = Connection(endpoint)
        return connection
