"""Keeping the leases of one consumer on several partitions alive, from one thread for each place they lie at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from conveyor.errors import ConveyorError
from conveyor.messaging.consumer.renewal import BUSY, IDLE
from conveyor.messaging.leases import LeaseSession
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys

H = TypeVar("H")


class Lively(Protocol):
    """What renewing needs of a holder."""

    lessee: LeaseSession

    def flush(self) -> bool:
        """Make a whole turn where that is possible now; tell whether it was."""
        ...


class Pulses:
    """Daemon threads, so that a place which is away does not keep the leases at others from being renewed."""

    def __init__(self, client: Client, holders: Sequence[Lively], *, slack: float = 1.0) -> None:
        """Start beating; *slack* stretches the pauses where something else renews first."""
        self._client, self._slack = client, slack
        self._stop = threading.Event()
        self.idle = False
        for group in by_place(client, holders, lambda holder: holder.lessee.keys):
            threading.Thread(target=self._beat, args=(group,), name="conveyor-pulse", daemon=True).start()

    def stop(self) -> None:
        """Stop; returns at once, whatever the threads are waiting for."""
        self._stop.set()

    def _beat(self, holders: Sequence[Lively]) -> None:
        lease = min(holder.lessee.lease_ms for holder in holders) / 1000
        while not self._stop.wait(min(0.5, lease / 10)):
            for holder in holders:
                if self._stop.is_set():
                    return
                try:
                    self._renew(holder, lease)
                except (ConveyorError, OSError):
                    break  # the consumer's own turns report what is wrong; the others lie at the same place

    def _renew(self, holder: Lively, lease: float) -> None:
        lessee = holder.lessee
        age = lessee.clock() - lessee.renewed
        due = age >= min(lease * 0.45, lease * (IDLE if self.idle else BUSY) * self._slack)
        if not lessee.registered or not (due or (lessee.pending and not self.idle)):
            return
        if holder.flush() or not due:
            return
        self._client.run(operations.heartbeat(lessee.keys, lessee.worker, lessee.lease_ms), patience=lease / 4)
        # Also when it was refused: the next turn finds that out, and beating faster would not help.
        lessee.renewed = lessee.clock()


def by_place(client: Client, things: Sequence[H], keys: Callable[[H], QueueKeys]) -> list[list[H]]:
    """Return *things* in groups whose keys lie at the same place."""
    groups: dict[object, list[H]] = {}
    for thing in things:
        groups.setdefault(client.endpoint(keys(thing)), []).append(thing)
    return list(groups.values())
