"""
The guardian: a thread that keeps the leases of workers which do not do it themselves, and returns those of dead ones.

It reads identities from slots of the board. A healthy worker renews by its own turns and costs the guardian no command.
All Redis work of a supervisor happens here, so that a Redis which hangs never keeps it from watching its children.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from time import monotonic

from conveyor.errors import ConveyorError
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.worker.crash_attribution import RunningSnapshot
from conveyor.worker.logs import LOG
from conveyor.worker.shared_memory import ChildInfo, ChildSlot, LeaseIdentity

RENEW_AFTER = 0.4
"""The part of a lease without a renewal after which the guardian renews; a live worker does after a third."""
PATIENCE = 0.5
_LONGEST_ROUND, _SHORTEST_ROUND = 1.0, 0.02
_MOST_ESTATES = 1000


@dataclass(eq=False)
class DeadChild:
    """
    What a dead worker leaves: its identities, whose jobs are to be returned; `what` happened is said in the log.

    `seating` is what ran, where that is known; `fault` says that what was executed ended it, as a segmentation fault does.
    """

    what: str
    about: ChildInfo
    identities: list[LeaseIdentity]
    crashed: bool
    seating: RunningSnapshot | None = None
    fault: bool = False
    died: float = field(default_factory=monotonic)
    returned: int = 0
    settled: threading.Event = field(default_factory=threading.Event)


class LeaseGuard:
    """Renews for watched slots and settles estates, in a thread of its own, however long Redis is away."""

    def __init__(self) -> None:
        """Start the thread."""
        self._slots: list[ChildSlot] = []
        self._estates: deque[DeadChild] = deque()
        self._lock = threading.Lock()
        self._call = threading.Event()
        self._closing_at: float | None = None
        self._beaten: dict[str, float] = {}
        self._clients: dict[tuple[str, str], Client] = {}
        self._failures = 0
        self._again_at = 0.0
        self._thread = threading.Thread(target=self._run, name="conveyor-guardian", daemon=True)
        self._thread.start()

    def watch(self, slot: ChildSlot) -> None:
        """Renew what the owner of *slot* leaves unrenewed for too long."""
        with self._lock:
            self._slots.append(slot)
        self._call.set()

    def forget(self, slot: ChildSlot) -> None:
        """Look at *slot* no more; afterwards it may be wiped."""
        with self._lock:
            self._slots.remove(slot)

    def settle(self, estate: DeadChild) -> None:
        """Return the jobs of a dead worker: at once when Redis is there, else when it is back."""
        with self._lock:
            self._estates.append(estate)
            if len(self._estates) > _MOST_ESTATES:  # their leases have long ended, so other workers take care of them
                self._estates.popleft().settled.set()
        self._call.set()

    def close(self, patience: float) -> bool:
        """Settle what is open for *patience* seconds more, then end; return whether nothing is left open."""
        self._closing_at = monotonic() + patience
        self._call.set()
        self._thread.join(patience + 0.2)
        return not self._estates

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._call.wait(pause)
            self._call.clear()
            pause = _LONGEST_ROUND
            try:
                self._settle_all()
                pause = self._renew_all()
            except Exception:
                LOG.exception("The guardian of leases failed unexpectedly; it goes on")
            if self._estates:
                pause = min(pause, max(self._again_at - monotonic(), _SHORTEST_ROUND))
            if self._closing_at is not None and (not self._estates or monotonic() >= self._closing_at):
                break
        for client in self._clients.values():
            client.close()

    def _settle_all(self) -> None:
        while self._estates and monotonic() >= self._again_at:
            estate = self._estates[0]
            try:
                client = self._client(estate.about)
                while estate.identities:
                    one = estate.identities[0]
                    blame = None
                    if estate.crashed and estate.seating is not None:
                        held = client.run(operations.held_ids(one.keys, one.worker), patience=PATIENCE)
                        blame = estate.seating.judge(held, fault=estate.fault)
                    call = operations.reap(one.keys, one.worker, crashed=estate.crashed, blame=blame)
                    estate.returned += max(0, client.run(call, patience=PATIENCE))
                    del estate.identities[0]
            except Exception as error:
                self._failed(error)
                return
            self._succeeded()
            with self._lock:
                if self._estates and self._estates[0] is estate:
                    self._estates.popleft()
            _report(estate)

    def _renew_all(self) -> float:
        """Renew what is stale; return how long the next look may wait."""
        found, shortest = self._look()
        for about, one in found:
            if monotonic() < self._again_at:
                break
            try:
                # Connected at first sight: a death is answered at once, and an embedded server has us as a user.
                client = self._client(about)
                if one is None:
                    continue
                known = client.run(operations.heartbeat(one.keys, one.worker, one.lease_ms), patience=PATIENCE)
            except Exception as error:
                self._failed(error)
                continue
            self._succeeded()
            self._beaten[one.worker] = monotonic()
            if not known:
                LOG.debug("Identity %s of queue '%s' is not registered; nothing was renewed", one.worker, one.queue)
        return min(_LONGEST_ROUND, max(_SHORTEST_ROUND, shortest / 10))

    def _look(self) -> tuple[list[tuple[ChildInfo, LeaseIdentity | None]], float]:
        """Return the identities to renew (None: an app to connect to), and the shortest lease of all (s)."""
        found: list[tuple[ChildInfo, LeaseIdentity | None]] = []
        shortest, beaten = float("inf"), {}
        with self._lock:
            now = monotonic()
            for slot in self._slots:
                about = slot.about()
                if about is None:
                    shortest = min(shortest, 1.0)  # just started: look again soon
                    continue
                if (about.url, about.namespace) not in self._clients:
                    found.append((about, None))
                for one in slot.identities():
                    if not one.current:
                        continue
                    lease = one.lease_ms / 1000
                    shortest = min(shortest, lease)
                    last = beaten[one.worker] = self._beaten.get(one.worker, 0.0)
                    if now - max(last, one.renewed) > RENEW_AFTER * lease:
                        found.append((about, one))
        self._beaten = beaten
        return found, shortest

    def _client(self, about: ChildInfo) -> Client:
        key = (about.url, about.namespace)
        found = self._clients.get(key)
        if found is None:
            found = Client(about.url, namespace=about.namespace)
            found.execute("PING", patience=0.0)
            LOG.debug("The guardian is connected to %s", found.address)
            self._clients[key] = found
        return found

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._again_at = monotonic() + min(1.0, 0.05 * 2**self._failures)
        if self._failures == 1:
            text = str(error).splitlines()[0] if isinstance(error, ConveyorError) else repr(error)
            LOG.warning("Cannot keep the leases of this worker for now, trying again: %s", text)

    def _succeeded(self) -> None:
        if self._failures:
            LOG.info("Redis answers again after %d attempts", self._failures)
        self._failures, self._again_at = 0, 0.0


def _report(estate: DeadChild) -> None:
    estate.settled.set()
    if estate.crashed or estate.returned:
        took = 1000 * (monotonic() - estate.died)
        jobs = "1 job" if estate.returned == 1 else f"{estate.returned} jobs"
        LOG.warning("%s; returned %s in %.0f ms", estate.what, jobs, took)
