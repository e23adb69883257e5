"""Beating from a thread: a worker inside another program keeps its leases while the loop is blocked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.errors import ConveyorError
from conveyor.store import operations
from conveyor.store.connection import Connection
from conveyor.worker.watchdog import MAX_STALL

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.place import Place

log = logging.getLogger("conveyor.worker")
Lease = tuple["QueueKeys", str, int]


class Heartbeat:
    """A daemon thread that renews leases which nobody renewed lately; a turn of the worker renews as well."""

    def __init__(
        self, place: Callable[[QueueKeys], Place], leases: Callable[[], list[Lease]],
        last_renewal: Callable[[], float], last_tick: Callable[[], float],
    ) -> None:  # fmt: skip
        """
        Take who knows where to beat, what to renew (keys, identity, lease in ms), and when that was done last.

        Also when the event loop last turned: one that is blocked for ever must not hold its jobs for ever. Instants
        by `time.monotonic`.
        """
        self._place = place
        self._connections: dict[Place, Connection] = {}
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
                    self._connection(keys).run(operations.beat(keys, identity, lease_ms), patience=shortest / 4)
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
