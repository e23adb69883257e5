"""
A thread that renews the leases of workers that do not renew them themselves, and returns the jobs of dead ones.

It reads identities from the slots of the shared memory. A healthy worker renews by its own turns and costs no command
here. All commands of a supervisor to Redis are sent here, so that a Redis that hangs never keeps the supervisor from
watching its children.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.transport.credentials import LoginProvider
from conveyor.units import quantity, span
from conveyor.worker.crash_attribution import RunningSnapshot
from conveyor.worker.logs import LOG, log_repeated_error
from conveyor.worker.shared_memory import ChildInfo, ChildSlot, LeaseIdentity

RENEW_AFTER = 0.4
"""Part of a lease without a renewal after which it is renewed here; a live worker renews after a third."""
RETRY_FOR = 0.5
"""Seconds that one call to Redis may take."""
_LONGEST_PAUSE, _SHORTEST_PAUSE = 1.0, 0.02
_LONGEST_REST = 60.0
_MAX_DEAD_CHILDREN = 1000


@dataclass(eq=False)
class DeadChild:
    """
    A dead worker and the identities whose jobs are to be returned.

    `event` is what happened, in words for the log, and `cause` for the history of the jobs that it is charged to.

    `running` are the jobs that ran, None where that is not known. `fault`: code that was executed ended the process, as a
    segmentation fault does.
    """

    event: str
    info: ChildInfo
    identities: list[LeaseIdentity]
    crashed: bool
    running: RunningSnapshot | None = None
    fault: bool = False
    cause: str = "its worker died"
    died_at: float = field(default_factory=monotonic)
    returned: int = 0
    all_returned: threading.Event = field(default_factory=threading.Event)


class _GuardedStep:
    """A step of the guard's loop. One that fails unexpectedly is left alone for a while, longer each time."""

    def __init__(self, step: Callable[[], float]) -> None:
        self._step, self._failures, self._resumes_at = step, 0, 0.0

    def run(self) -> float:
        """Carry out the step, unless it is left alone; return the seconds until the next look."""
        if (rest := self._resumes_at - monotonic()) > 0:
            return min(rest, _LONGEST_PAUSE)
        try:
            pause = self._step()
        except Exception:
            rest = min(_LONGEST_REST, 0.5 * 2.0**self._failures)
            self._failures = min(self._failures + 1, 10)
            self._resumes_at = monotonic() + rest
            LOG.exception("The lease guard failed unexpectedly; it goes on in %s", span(rest))
            return min(rest, _LONGEST_PAUSE)
        self._failures = 0
        return pause


class LeaseGuard:
    """A thread that renews for watched slots and returns the jobs of dead children, however long Redis is away."""

    def __init__(self, login: LoginProvider | None = None) -> None:
        """*login*: asked for user and password at each connection; None: the URL has them."""
        self._login = login
        self._slots: list[ChildSlot] = []
        self._dead_children: deque[DeadChild] = deque()
        self._lock = threading.Lock()
        self._wakeup = threading.Event()
        self._closing_at: float | None = None
        self._renewed_at: dict[str, float] = {}
        self._unanswered: set[str] = set()
        """The identities whose last renewal failed."""
        self._clients: dict[tuple[str, str], Client] = {}
        self._failures = 0
        self._failing_since = 0.0
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name="conveyor-lease-guard", daemon=True)
        self._thread.start()

    def watch(self, slot: ChildSlot) -> None:
        """Renew the leases that the owner of *slot* leaves unrenewed for too long."""
        with self._lock:
            self._slots.append(slot)
        self._wakeup.set()

    def forget(self, slot: ChildSlot) -> None:
        """Stop reading *slot*; afterwards it may be cleared."""
        with self._lock:
            self._slots.remove(slot)

    def return_jobs(self, dead_child: DeadChild) -> None:
        """Return the jobs of a dead worker, at once or when Redis is back."""
        with self._lock:
            self._dead_children.append(dead_child)
            if len(self._dead_children) > _MAX_DEAD_CHILDREN:
                # Its leases have long ended, so other workers take care of them.
                self._dead_children.popleft().all_returned.set()
        self._wakeup.set()

    def close(self, seconds: float) -> bool:
        """Go on for up to so many *seconds*, then end the thread; return whether all jobs were returned."""
        self._closing_at = monotonic() + seconds
        self._wakeup.set()
        self._thread.join(seconds + 0.2)
        return not self._dead_children

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.0
        returning, renewing = _GuardedStep(self._return_all), _GuardedStep(self._renew_all)
        while True:
            self._wakeup.wait(pause)
            self._wakeup.clear()
            pause = min(returning.run(), renewing.run())
            if self._closing_at is not None and (not self._dead_children or monotonic() >= self._closing_at):
                break
        for client in self._clients.values():
            client.close()

    def _return_all(self) -> float:
        """Return the jobs of dead children; return the seconds until the next look."""
        while self._dead_children and monotonic() >= self._retry_at:
            dead_child = self._dead_children[0]
            try:
                client = self._client(dead_child.info)
                while dead_child.identities:
                    one = dead_child.identities[0]
                    blame = None
                    if dead_child.crashed and dead_child.running is not None:
                        held = client.run(operations.held_ids(one.keys, one.worker), retry_for=RETRY_FOR)
                        blame = dead_child.running.blame(held, fault=dead_child.fault)
                    call = operations.reap(
                        one.keys, one.worker, crashed=dead_child.crashed, blame=blame, cause=dead_child.cause,
                        ago=monotonic() - dead_child.died_at,
                    )  # fmt: skip
                    dead_child.returned += max(0, client.run(call, retry_for=RETRY_FOR))
                    del dead_child.identities[0]
            except Exception as error:
                self._note_failure(error)
                dead_child.identities.append(dead_child.identities.pop(0))  # the next try begins with another
                with self._lock:
                    if self._dead_children and self._dead_children[0] is dead_child:
                        self._dead_children.rotate(-1)
                break
            self._note_success()
            with self._lock:
                if self._dead_children and self._dead_children[0] is dead_child:
                    self._dead_children.popleft()
            _log_returned(dead_child)
        return max(self._retry_at - monotonic(), _SHORTEST_PAUSE) if self._dead_children else _LONGEST_PAUSE

    def _renew_all(self) -> float:
        """Renew what is stale; return the seconds until the next look."""
        stale, shortest = self._find_stale()
        # A queue that is refused, or whose slot is moving, holds up no other.
        stale.sort(key=lambda found: found[1] is not None and found[1].worker in self._unanswered)
        for info, one in stale:
            if monotonic() < self._retry_at:
                break
            try:
                # Connected at first sight: a death is answered at once, and an embedded server counts this process as a user.
                client = self._client(info)
                if one is None:
                    self._note_success()
                    continue
                known = client.run(operations.heartbeat(one.keys, one.worker, one.lease_ms), retry_for=RETRY_FOR)
            except Exception as error:
                if one is not None:
                    self._unanswered.add(one.worker)
                if one is None or isinstance(error, StoreUnavailable) or not isinstance(error, ConveyorError):
                    self._note_failure(error)
                else:
                    log_repeated_error("Cannot keep the leases of queue '%s': %s", one.queue, error)
                continue
            self._note_success()
            self._renewed_at[one.worker] = monotonic()
            self._unanswered.discard(one.worker)
            if not known:
                LOG.debug("Identity %s of queue '%s' is not registered; nothing was renewed", one.worker, one.queue)
        return min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, shortest / 10))

    def _find_stale(self) -> tuple[list[tuple[ChildInfo, LeaseIdentity | None]], float]:
        """Return the identities to renew (None: an app to connect to), and the shortest lease of all (s)."""
        stale: list[tuple[ChildInfo, LeaseIdentity | None]] = []
        shortest, renewed_at = float("inf"), {}
        with self._lock:
            now = monotonic()
            for slot in self._slots:
                info = slot.info()
                if info is None:
                    shortest = min(shortest, 1.0)  # just started: look again soon
                    continue
                if (info.url, info.namespace) not in self._clients:
                    stale.append((info, None))
                for one in slot.identities():
                    if not one.current:
                        continue
                    lease = one.lease_ms / 1000
                    shortest = min(shortest, lease)
                    last = renewed_at[one.worker] = self._renewed_at.get(one.worker, 0.0)
                    if now - max(last, one.renewed) > RENEW_AFTER * lease:
                        stale.append((info, one))
        self._renewed_at = renewed_at
        self._unanswered &= renewed_at.keys()
        return stale, shortest

    def _client(self, info: ChildInfo) -> Client:
        key = (info.url, info.namespace)
        client = self._clients.get(key)
        if client is None:
            client = Client(info.url, namespace=info.namespace, login=self._login)
            client.execute("PING", retry_for=0.0)
            LOG.debug("The lease guard is connected to %s", client.address)
            self._clients[key] = client
        return client

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        self._retry_at = monotonic() + min(1.0, 0.05 * 2**self._failures)
        if self._failures == 1:
            self._failing_since = monotonic()
            text = str(error).splitlines()[0] if isinstance(error, ConveyorError) else repr(error)
            if self._clients:
                LOG.warning("Cannot keep the leases of this worker for now, trying again: %s", text)
            else:
                LOG.warning("%s Waiting for it.", text)  # nothing is leased yet

    def _note_success(self) -> None:
        if self._failures:
            LOG.info("Redis answers after %s", span(monotonic() - self._failing_since))
        self._failures, self._retry_at = 0, 0.0


def _log_returned(dead_child: DeadChild) -> None:
    dead_child.all_returned.set()
    if dead_child.crashed or dead_child.returned:
        took = 1000 * (monotonic() - dead_child.died_at)
        LOG.warning("%s; returned %s in %.0f ms", dead_child.event, quantity(dead_child.returned, "job"), took)
