"""Keeping leases alive from a thread, so that a body which blocks its loop or runs for hours keeps its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable

from conveyor.errors import ConveyorError
from conveyor.messaging.leases import LeaseSession
from conveyor.store import operations
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.endpoint import Endpoint

BUSY, IDLE = 0.25, 0.42
"""Parts of a lease after which it is renewed; an idle consumer renews by the turns it makes anyway."""


class LeaseRenewer:
    """A daemon thread with a connection of its own. `flush` makes a whole turn where it can and says whether it did."""

    def __init__(self, place: Endpoint, lessee: LeaseSession, *, flush: Callable[[], bool], slack: float = 1.0) -> None:
        """Start beating; *slack* stretches the pauses where something else renews first."""
        self._lessee = lessee
        self._flush = flush
        self._slack = slack
        self._connection = Connection(place)
        self._stop = threading.Event()
        self.idle = False
        self._thread = threading.Thread(target=self._beat, name="conveyor-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; returns at once, whatever the thread is waiting for."""
        self._stop.set()

    def _beat(self) -> None:
        lessee = self._lessee
        lease = lessee.lease_ms / 1000
        while not self._stop.wait(min(0.5, lease / 10)):
            age = lessee.clock() - lessee.renewed
            due = age >= min(lease * 0.45, lease * (IDLE if self.idle else BUSY) * self._slack)
            if not lessee.registered or not (due or (lessee.pending and not self.idle)):
                continue
            try:
                if self._flush() or not due:
                    continue
                call = operations.heartbeat(lessee.keys, lessee.worker, lessee.lease_ms)
                self._connection.run(call, patience=lease / 4)
                # Also when it was refused: the next turn finds that out, and beating faster would not help.
                lessee.renewed = lessee.clock()
            except (ConveyorError, OSError):
                continue  # the consumer's own turns report what is wrong
        self._connection.close()
