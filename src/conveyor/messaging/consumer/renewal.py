"""Renews leases from threads, so that a body that blocks its loop keeps its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from conveyor.errors import ConveyorError
from conveyor.messaging.leases import LeaseSession
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.signal_safety import SignalSafeEvent

V = TypeVar("V")
BUSY, IDLE = 0.25, 0.42
"""Parts of a lease after which it is renewed. An idle consumer makes turns anyway."""


class Renewable(Protocol):
    """The leases of one partition, as their renewer needs them."""

    session: LeaseSession

    def flush(self) -> bool:
        """Make a whole turn where that is possible now; tell whether it was."""
        ...


class LeaseRenewer:
    """
    Renews leases from one daemon thread per endpoint, so an unreachable node delays only its own leases.

    The threads run from the beginning; `idle` says that the consumer waits for work and makes turns by itself. *slack*
    stretches the pauses where something else renews first.
    """

    def __init__(self, client: Client, leases: Sequence[Renewable], *, slack: float = 1.0) -> None:
        self._client, self._slack = client, slack
        self._stop = SignalSafeEvent()
        self.idle = False
        for group in by_endpoint(client, leases, lambda one: one.session.keys):
            threading.Thread(target=self._renew_all, args=(group,), name="conveyor-renewer", daemon=True).start()

    def stop(self) -> None:
        """Stop; returns at once, whatever the threads are waiting for."""
        self._stop.set()

    def _renew_all(self, leases: Sequence[Renewable]) -> None:
        lease = min(one.session.lease_ms for one in leases) / 1000
        while not self._stop.wait(min(0.5, lease / 10)):
            for one in leases:
                if self._stop.is_set():
                    return
                try:
                    self._renew(one, lease)
                except (ConveyorError, OSError):
                    break  # the consumer's own turns report what is wrong; the others lie at the same endpoint

    def _renew(self, one: Renewable, lease: float) -> None:
        session = one.session
        age = session.clock() - session.renewed
        due = age >= min(lease * 0.45, lease * (IDLE if self.idle else BUSY) * self._slack)
        if not session.registered or not (due or (session.pending and not self.idle)):
            return
        if one.flush() or not due:
            return
        self._client.run(operations.heartbeat(session.keys, session.worker, session.lease_ms), retry_for=lease / 4)
        # Also when it was refused: the next turn finds that out, and beating faster would not help.
        session.renewed = session.clock()


def by_endpoint(client: Client, things: Sequence[V], keys: Callable[[V], QueueKeys]) -> list[list[V]]:
    """Return *things* in groups whose keys lie at the same endpoint."""
    groups: dict[object, list[V]] = {}
    for thing in things:
        groups.setdefault(client.endpoint(keys(thing)), []).append(thing)
    return list(groups.values())
