"""Renews leases from threads, so that a body that blocks its loop keeps its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.leases import LeaseSession
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.fork_safety import on_fork
from conveyor.store.keys import QueueKeys
from conveyor.store.signal_safety import SignalSafeEvent

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

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

    Those of a consumer are renewed until `stop`; `idle` says that it waits for work and makes turns by itself. Those of
    pulled messages are renewed until the messages are settled, or nothing can settle them any more; a thread without leases
    ends. *slack* stretches the pauses where something else renews first.
    """

    def __init__(self, client: Client, leases: Sequence[Renewable] = (), *, slack: float = 1.0) -> None:
        self._slack = slack
        self._stop = SignalSafeEvent()
        self.idle = False
        self.forked()
        self.add(client, leases)

    def forked(self) -> None:
        """Renew nothing in a child: the leases are its parent's."""
        self._lock = threading.Lock()
        self._leases: dict[Endpoint, list[ref[Renewable]]] = {}
        self._threads: dict[Endpoint, threading.Thread] = {}

    def add(self, client: Client, leases: Sequence[Renewable]) -> None:
        """Renew these too."""
        for group in by_endpoint(client, leases, lambda one: one.session.keys):
            endpoint = client.endpoint(group[0].session.keys)
            with self._lock:
                self._leases.setdefault(endpoint, []).extend(map(ref, group))
                thread = self._threads.get(endpoint)
                if thread is None or not thread.is_alive():
                    thread = self._threads[endpoint] = threading.Thread(
                        target=self._renew_all, args=(client, endpoint), name="conveyor-renewer", daemon=True
                    )
                    thread.start()

    def stop(self) -> None:
        """Stop; returns at once, whatever the threads are waiting for."""
        self._stop.set()

    def _renew_all(self, client: Client, endpoint: Endpoint) -> None:
        while (pause := self._renew_once(client, endpoint)) is not None and not self._stop.wait(pause):
            pass

    def _renew_once(self, client: Client, endpoint: Endpoint) -> float | None:
        """Renew what is due at *endpoint*; return the seconds until the next look, None when nothing is left."""
        with self._lock:
            leases = [one for known in self._leases[endpoint] if (one := known()) is not None and _is_needed(one)]
            self._leases[endpoint] = [ref(one) for one in leases]
            if not leases:
                del self._leases[endpoint], self._threads[endpoint]
                return None
        for one in leases:
            if self._stop.is_set():
                break
            try:
                self._renew(client, one)
            # The consumer's own turns report what is wrong.
            except (StoreUnavailable, OSError):
                self._put_last(endpoint, one)  # its slot may be moving, and no other: these come first at the next look
                break
            except ConveyorError:
                continue  # its queue alone is refused
        return min(0.5, min(one.session.lease_ms for one in leases) / 10_000)

    def _put_last(self, endpoint: Endpoint, one: Renewable) -> None:
        with self._lock:
            self._leases[endpoint].sort(key=lambda known: known() is one)

    def _renew(self, client: Client, one: Renewable) -> None:
        session = one.session
        lease, began = session.lease_ms / 1000, session.clock()
        due = began - session.renewed >= min(lease * 0.45, lease * (IDLE if self.idle else BUSY) * self._slack)
        if not session.registered or not (due or (session.pending and not self.idle)):
            return
        if (not session.transient and one.flush()) or not due:
            return
        call, most = operations.heartbeat(session.keys, session.worker, session.lease_ms), lease / 4
        client.run(call, retry_for=most, deadline=monotonic() + most)
        # Also when it was refused: the next turn finds that out, and beating faster would not help.
        session.renewed = began


def _is_needed(one: Renewable) -> bool:
    return bool(one.session.held) or not one.session.transient


def renew_until_settled(client: Client, leases: Sequence[Renewable]) -> None:
    """Renew the *leases* of pulled messages until these are settled, or are no longer referred to."""
    renewer = _pulled.get(client)
    if renewer is None:
        renewer = _pulled.setdefault(client, LeaseRenewer(client))
        on_fork(renewer)
    renewer.add(client, [one for one in leases if _is_needed(one)])


_pulled: WeakKeyDictionary[Client, LeaseRenewer] = WeakKeyDictionary()
"""The renewers of the leases of the messages that each client has pulled."""


def by_endpoint(client: Client, things: Sequence[V], keys: Callable[[V], QueueKeys]) -> list[list[V]]:
    """Return *things* in groups whose keys lie at the same endpoint."""
    groups: dict[object, list[V]] = {}
    for thing in things:
        groups.setdefault(client.endpoint(keys(thing)), []).append(thing)
    return list(groups.values())
