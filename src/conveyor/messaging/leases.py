"""
The books of one identity that leases messages: what it holds, what it must report, whom it suspects.

Nothing here talks to Redis. `LeaseSession.round` is a generator of calls: a driver carries each out and sends
the decoded reply back, so blocking and awaitable consumers share every decision.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from conveyor.ids import new_identity
from conveyor.payload.records import AttemptHistory, Envelope, read_leniently
from conveyor.store import operations
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement, StaleTurn, TurnReply, TurnReport, WorkerUnregistered
from conveyor.store.script import Call

DONE = "A"
"""The kind of a settlement that travels as a bare id; the other kinds are those of turn.lua."""
LONGEST_WAIT = 5.0
"""Seconds an idle consumer blocks at most: what a lost wake-up token costs."""
MOST_BYTES = 4_000_000
"""Bytes of messages asked for in one turn, at the mean size seen."""


class DeadWorkerDetector:
    """
    Whom an observer takes for dead: by two looks, never by the clock alone.

    A worker is convicted when it was already listed with the same end at a look at least 0.45 lease earlier
    (by our own monotonic clock) and its lease has ended, or ends further ahead than a lease can.
    """

    def __init__(self, lease_ms: int) -> None:
        """Take the lease of the queue in ms."""
        self._lease_ms = lease_ms
        self._lease = lease_ms / 1000
        self._seen: dict[str, tuple[int, float]] = {}
        self._ripe: float | None = None
        self._last: float | None = None

    def look(self, now_ms: int, overdue: Iterable[tuple[str, int]], monotonic: float) -> list[tuple[str, int]]:
        """Take what a look listed, (worker, end in ms) by the server's clock; return whom to reap."""
        seen: dict[str, tuple[int, float]] = {}
        convicted: list[tuple[str, int]] = []
        self._last, self._ripe = monotonic, None
        for worker, end in overdue:
            known = self._seen.get(worker)
            since = known[1] if known is not None and known[0] == end else monotonic
            ends = max(0, end - now_ms) / 1000 if end <= now_ms + self._lease_ms / 2 else 0.0
            ripe = max(since + 0.45 * self._lease, monotonic + ends)
            if ripe <= monotonic:
                convicted.append((worker, end))
                continue
            seen[worker] = (end, since)
            self._ripe = ripe if self._ripe is None else min(self._ripe, ripe)
        self._seen = seen
        return convicted

    def next_look(self, monotonic: float) -> float:
        """Return the seconds until the next look is due; 0 when it is due now."""
        if self._last is None:
            return 0.0
        due = self._last + self._lease / 3
        if self._ripe is not None:
            due = min(due, max(self._ripe, self._last + self._lease / 10))
        return max(0.0, due - monotonic)


@dataclass(slots=True, eq=False)
class LeasedMessage:
    """One message as it was leased; `state` is from before this start."""

    id: str
    envelope: Envelope
    state: AttemptHistory
    damage: str = ""
    """Why what is stored cannot be read; its body is then the bytes as they are."""
    started: bool = False
    settled: bool = False
    returned: bool = False
    opened: bytes | None = None
    """Its body, where that was fetched before it is handed out."""
    blob: str = ""
    """Where its body lies, when that is not in Redis."""
    lost: bool = False

    @property
    def attempt(self) -> int:
        """The number of this start, from 1."""
        return self.state.starts + 1


class BodyFetcher(Protocol):
    """What the books need of who opens messages."""

    async def fetch(self, waiting: Iterable[LeasedMessage]) -> None: ...
    def ended(self, blob: str) -> None: ...


@dataclass(slots=True)
class LeaseSession:
    """
    One identity. `held` is what Redis must say it holds, `waiting` what of that was not handed out yet.

    Turns are numbered, one in flight at a time (the driver's lock). One whose reply never came is repeated
    with its number before any other.
    """

    keys: QueueKeys
    lease_ms: int
    about: bytes
    suspects: DeadWorkerDetector
    intake: Callable[[int], Call[int]] | None = None
    """For a plain list: the call that moves up to that many raw entries in before a turn."""
    transient: bool = False
    """Not renewed by what it settles, never registered anew, and gone with the last message."""
    opening: BodyFetcher | None = None
    """Where bodies may lie outside Redis."""
    clock: Callable[[], float] = time.monotonic
    worker: str = field(default_factory=new_identity)
    number: int = 0
    registered: bool = False
    held: dict[str, LeasedMessage] = field(default_factory=dict)
    waiting: deque[LeasedMessage] = field(default_factory=deque)
    cancelled: set[str] = field(default_factory=set)
    renewed: float = 0.0
    due_at: float | None = None
    """When the next scheduled message is due, by our clock; None when there is none."""
    reaped: int = 0
    refused: list[LeasedMessage] = field(default_factory=list)
    """What was settled in vain since somebody last looked: for the log."""
    missing: list[str] = field(default_factory=list)
    """Whose records the server has lost, since somebody last looked: for the log."""
    _pending: deque[tuple[LeasedMessage | None, Settlement]] = field(default_factory=deque)
    _call: Call[TurnReply] | None = None
    _reported: dict[str, LeasedMessage] = field(default_factory=dict)
    _mean: float = 0.0
    _looking: bool = False
    _leaving: bool = False
    _blobs: list[LeasedMessage] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Tell whether something waits to be reported."""
        return bool(self._pending)

    def settle(self, leased: LeasedMessage, settlement: Settlement) -> None:
        """Note how *leased* ends; the next turn reports it."""
        leased.settled = settlement.kind != "M"
        self._pending.append((leased, settlement))

    def wait(self) -> float:
        """Return for how many seconds an idle consumer may block."""
        now = self.clock()
        wait = min(LONGEST_WAIT, self.lease_ms / 3000)
        if self.due_at is not None:
            wait = min(wait, self.due_at + 0.001 - now)
        return max(0.001, min(wait, max(self.suspects.next_look(now), 0.02)))

    # -- one round trip -------------------------------------------------------------------------------------------

    def round(self, want: int = 0, *, leave: bool = False) -> Generator[Call[Any], Any, None]:
        """
        Report what is pending, lease up to *want* more, and see to what the reply asks for.

        *leave* takes the registration away when nothing is held any more. A driver that gives up in the middle
        loses nothing: the next round begins with the same turn.
        """
        mended = False
        while True:
            repeated = self._call is not None
            try:
                if not self.registered:
                    yield operations.register(self.keys, self.worker, self.lease_ms, self.about)
                    self.registered = True
                if want and self.intake is not None and not repeated:
                    yield self.intake(want)
                turn: TurnReply = yield self._call or self._turn(want, leave)
            except (WorkerUnregistered, StaleTurn):
                self.forget()
                if self.transient and not want:
                    return
                continue
            known = self._absorb(turn)
            if not known:
                self._reconcile((yield operations.held_ids(self.keys, self.worker)))
            for worker, end in self._judge(turn):
                self.reaped += max(0, (yield operations.reap(self.keys, worker, end=end)))
            if repeated:
                continue
            if known or not self._pending or mended:
                return
            want, mended = 0, True  # what was given back leaves at once

    def forget(self) -> None:
        """Take a new identity: the old one was reaped, or Redis lost its data, and all it held with it."""
        for leased in (*self.held.values(), *self._reported.values()):
            leased.lost = True
            if leased.settled:
                self.refused.append(leased)
        self.held.clear()
        self.waiting.clear()
        self.cancelled.clear()
        self._reported.clear()
        self._blobs.clear()
        self._call = None
        self.worker, self.number, self.registered = new_identity(), 0, False

    def hand_back(self, leased: Iterable[LeasedMessage], states: Callable[[LeasedMessage], bytes]) -> None:
        """Give *leased* back to the front, in their order, with the given states (b"" as it was)."""
        for one in reversed(list(leased)):
            if not (one.lost or one.settled):
                self.settle(one, Settlement("F", one.id, state=states(one)))
                one.returned = True

    def split(self, leased: LeasedMessage, ms: int) -> Generator[Call[Any], Any, LeaseSession | None]:
        """Move *leased* to an identity of its own with a lease of *ms* and return it; None when the lease is lost."""
        own = LeaseSession(self.keys, ms, self.about, self.suspects, transient=True, clock=self.clock, registered=True)
        own.opening = self.opening
        if not (yield operations.extend(self.keys, self.worker, leased.id, own.worker, ms, self.about)):
            leased.lost = True
            self.held.pop(leased.id, None)
            return None
        self.held.pop(leased.id, None)
        own.held[leased.id] = leased
        if self.transient and not self.held:
            yield operations.reap(self.keys, self.worker, crashed=False)  # leaves nothing of the empty identity behind
        return own

    # -- inside a round -------------------------------------------------------------------------------------------

    def _turn(self, want: int, leave: bool) -> Call[TurnReply]:
        report = TurnReport()
        while self._pending:
            leased, settlement = self._pending.popleft()
            if leased is not None and self.held.get(settlement.id) is not leased:
                leased.lost = True  # the identity it was leased under is gone
                self.refused.append(leased)
                continue
            if leased is not None:
                self._reported[leased.id] = leased
                if settlement.kind != "M":
                    del self.held[leased.id]
                if leased.blob and settlement.kind in {DONE, "D", "C"}:
                    self._blobs.append(leased)
            if settlement.kind == DONE:
                report.done.append(settlement.id)
            else:
                report.others.append(settlement)
        flags = ("k" if self.transient and not want else "") + ("t" if leave or (self.transient and not want) else "")
        if want or not self.transient:
            now = self.clock()
            self._looking = self.suspects.next_look(now) == 0
            flags += "l" if self._looking else ""
            self.renewed = now
        self.number += 1
        self._leaving = "t" in flags
        if want and self._mean:
            want = max(1, min(want, int(MOST_BYTES / self._mean)))
        self._call = operations.turn(self.keys, self.worker, self.number, want, self.lease_ms, report, flags=flags)
        return self._call

    def _absorb(self, turn: TurnReply) -> bool:
        """Take a reply into the books; False when Redis says we hold another number of messages."""
        self._call = None
        self.missing += turn.missing
        for id_ in turn.lost:
            leased = self._reported.get(id_)
            if leased is not None:
                leased.lost = True
                self.held.pop(id_, None)
                if leased.settled:
                    self.refused.append(leased)
        self._reported.clear()
        while self._blobs:  # removed only now: had the end been refused, another would need them
            if not (ended := self._blobs.pop()).lost and self.opening is not None:
                self.opening.ended(ended.blob)
        states = turn.states or [None] * len(turn.ids)
        for id_, data, state in zip(turn.ids, turn.envelopes, states, strict=True):
            leased = _read(id_, data, state)
            self.held[id_] = leased
            self.waiting.append(leased)
            self._mean += (len(data) - self._mean) / 16 if self._mean else len(data)
        self.cancelled = set(turn.cancelled)
        self.due_at = None if turn.next_due is None else self.clock() + max(0, turn.next_due - turn.now) / 1000
        known = turn.held == len(self.held)
        if self._leaving and turn.held == 0:
            self.forget()  # what is left of this identity expires, with whatever it would lease
        return known

    def _judge(self, turn: TurnReply) -> list[tuple[str, int]]:
        if not self._looking:
            return []
        self._looking = False
        return [one for one in self.suspects.look(turn.now, turn.overdue, self.clock()) if one[0] != self.worker]

    def _reconcile(self, ids: Iterable[str]) -> None:
        """Give back what we do not know, and give up what Redis does not know."""
        theirs = set(ids)
        for id_ in theirs - self.held.keys():
            self._pending.append((None, Settlement("F", id_)))
        for id_ in self.held.keys() - theirs:
            self.held.pop(id_).lost = True
        self.waiting = deque(leased for leased in self.waiting if not leased.lost)


def _read(id_: str, data: bytes, state: bytes | None) -> LeasedMessage:
    envelope, known, damage = read_leniently(data, state)
    return LeasedMessage(id_, envelope, known, damage=damage)
