"""
The leases of one identity: the messages it holds, the ends it must report, the workers it takes for dead.

Nothing here talks to Redis. `LeaseSession.turn` is a program of calls: a driver carries each out and sends the decoded
reply back, so blocking and awaitable consumers share every decision.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from conveyor.ids import new_identity
from conveyor.payload.records import AttemptHistory, Envelope, read_leniently
from conveyor.store import inspection, operations
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Registration, Settlement, StaleTurn, TurnReply, TurnReport, WorkerUnregistered
from conveyor.store.script import Call, CallProgram

if TYPE_CHECKING:
    from conveyor.messaging.declared_limits import QueueLimits
    from conveyor.messaging.outbox import OutboxRoutes

LONGEST_WAIT = 5.0
"""Seconds an idle consumer blocks at most: what a lost wake-up token costs."""
MOST_BYTES = 4_000_000
"""Bytes of messages asked for in one turn, at the mean size seen."""


class DeadWorkerDetector:
    """
    Decides which workers are dead: by two looks, never by one reading of the clock.

    A worker is declared dead when it was already listed with the same end at a look at least 0.45 lease earlier (by
    our own monotonic clock) and its lease has ended, or ends further ahead than a lease can.
    """

    def __init__(self, lease_ms: int) -> None:
        self._lease_ms = lease_ms
        self._lease = lease_ms / 1000
        self._seen: dict[str, tuple[int, float]] = {}
        self._decidable_at: float | None = None
        self._last_look: float | None = None

    @property
    def has_suspects(self) -> bool:
        """True while a worker is listed that is neither declared dead nor renewed."""
        return bool(self._seen)

    def look(self, now_ms: int, overdue: Iterable[tuple[str, int]], monotonic: float) -> list[tuple[str, int]]:
        """Note the workers that a look listed, with their ends in ms; return those declared dead."""
        seen: dict[str, tuple[int, float]] = {}
        declared_dead: list[tuple[str, int]] = []
        self._last_look, self._decidable_at = monotonic, None
        for worker, end in overdue:
            known = self._seen.get(worker)
            since = known[1] if known is not None and known[0] == end else monotonic
            ends_in = max(0, end - now_ms) / 1000 if end <= now_ms + self._lease_ms / 2 else 0.0
            decidable_at = max(since + 0.45 * self._lease, monotonic + ends_in)
            if decidable_at <= monotonic:
                declared_dead.append((worker, end))
                continue
            seen[worker] = (end, since)
            self._decidable_at = decidable_at if self._decidable_at is None else min(self._decidable_at, decidable_at)
        self._seen = seen
        return declared_dead

    def next_look(self, monotonic: float) -> float:
        """Return the seconds until the next look is due; 0 when it is due now."""
        if self._last_look is None:
            return 0.0
        due = self._last_look + self._lease / 3
        if self._decidable_at is not None:
            due = min(due, max(self._decidable_at, self._last_look + self._lease / 10))
        return max(0.0, due - monotonic)


@dataclass(slots=True, eq=False)
class LeasedMessage:
    """One message as it was leased; `history` is from before this start."""

    id: str
    envelope: Envelope
    history: AttemptHistory
    damage: str = ""
    """Why what is stored cannot be read; its body is then the bytes as they are."""
    started: bool = False
    """It was handed out, so a delivery counts."""
    begun: bool = False
    """Its handling began, so a crash counts; that of a suspect is recorded before."""
    settled: bool = False
    """Its end was decided here."""
    ending: Settlement | None = None
    """The first end that was decided."""
    confirmed: bool = False
    """Redis has answered that it ended so."""
    returned: bool = False
    fetched_body: bytes | None = None
    """Its body, where that was fetched before it is handed out."""
    blob: str = ""
    """Where its body lies, when that is not in Redis."""
    lost: bool = False
    session: LeaseSession = field(repr=False, kw_only=True)
    """The identity that holds it; `extend` moves it to one of its own."""

    @property
    def attempt(self) -> int:
        """The number of this start, from 1."""
        return self.history.starts + 1


@dataclass(slots=True)
class Extension:
    """The move of one message to an identity of its own, which is not answered yet."""

    leased: LeasedMessage
    own: LeaseSession
    call: Call[bool]


class BodyFetcher(Protocol):
    """Reads and removes bodies that lie outside Redis."""

    async def fetch(self, waiting: Iterable[LeasedMessage]) -> None: ...
    def delete(self, blob: str) -> None: ...


@dataclass(slots=True)
class LeaseSession:
    """
    The leases of one identity: `held` is what Redis must say it holds, `waiting` what of that was not handed out yet.

    Turns are numbered, one in flight at a time (the driver's lock). One whose reply never came is repeated
    with its number before any other.
    """

    keys: QueueKeys
    lease_ms: int
    about: bytes
    detector: DeadWorkerDetector
    intake: Callable[[int], Call[int]] | None = None
    """For a plain list: the call that moves up to that many raw entries in before a turn."""
    transient: bool = False
    """Not renewed by what it settles, never registered anew, and gone with the last message."""
    limits: QueueLimits | None = None
    """Declared when it registers."""
    ageing_ms: int = 0
    """Milliseconds after which a message that waits is raised by one priority; 0: it is not."""
    bodies: BodyFetcher | None = None
    """Where bodies may lie outside Redis."""
    clock: Callable[[], float] = time.monotonic
    worker: str = field(default_factory=new_identity)
    number: int = 0
    registered: bool = False
    registering: bool = False
    """Redis may know it already: it was asked to register it, and has not answered."""
    held: dict[str, LeasedMessage] = field(default_factory=dict)
    waiting: deque[LeasedMessage] = field(default_factory=deque)
    cancelled: set[str] = field(default_factory=set)
    renewed: float = 0.0
    due_at: float | None = None
    """When the next scheduled message is due, by our clock; None when there is none."""
    pending: deque[tuple[LeasedMessage | None, Settlement]] = field(default_factory=deque)
    """Settlements that the next turn reports."""
    reaped: int = 0
    """Messages of dead workers that came back since this was last logged."""
    refused: list[LeasedMessage] = field(default_factory=list)
    """Messages whose settlement was refused since this was last logged."""
    missing: list[str] = field(default_factory=list)
    """The ids whose records the server has lost, since this was last logged."""
    _call: Call[TurnReply] | None = None
    """The turn that is not answered yet: the next one begins with it."""
    _reported: dict[str, LeasedMessage] = field(default_factory=dict)
    """The messages that this turn says something of."""
    _ended: list[LeasedMessage] = field(default_factory=list)
    """Those of them that it ends."""
    _extensions: dict[str, Extension] = field(default_factory=dict)
    """The extensions that are not answered yet: the next turn begins with them."""
    has_moved: bool = False
    """A message was moved to an identity of its own."""
    _mean_bytes: float = 0.0
    _clock_offset: float = 0.0  # server ms minus ours
    _looking: bool = False
    directory: OutboxRoutes | None = None
    """The queues of the app, to which the outbox of this one is delivered; None: it is left to others."""
    _new_queue: bool = False
    _outbox: bool = False
    _leaving: bool = False

    def settle(self, leased: LeasedMessage, settlement: Settlement) -> None:
        """Note how *leased* ends. The next turn reports it."""
        if leased.ending is settlement and (leased.confirmed or self.owes(leased)):
            return  # it was asked for before, and the turn that reports it is repeated
        if not settlement.stays:
            if leased.ending is not None and leased.ending is not settlement:
                return  # another thread has decided its end since this one looked
            leased.settled, leased.ending = True, settlement
        self.pending.append((leased, settlement))

    def owes(self, leased: LeasedMessage) -> bool:
        """Tell whether Redis has not answered yet what was decided of *leased*."""
        return self._reported.get(leased.id) is leased or any(leased is one for one, _ in tuple(self.pending))

    @property
    def now_ms(self) -> int:
        """The server's time in ms, as far as it is known here."""
        return int(self.clock() * 1000 + self._clock_offset)

    def note_time(self, now_ms: int) -> None:
        """Note the server's time in ms, where no reply has told it."""
        self._clock_offset = now_ms - self.clock() * 1000

    def remaining(self) -> float:
        """Return the seconds until the lease ends unless it is renewed; negative when it should be over."""
        return self.renewed + self.lease_ms / 1000 - self.clock()

    def wait(self) -> float:
        """Return for how many seconds an idle consumer may block."""
        now = self.clock()
        wait = min(LONGEST_WAIT, self.lease_ms / 3000)
        if self.due_at is not None:
            wait = min(wait, self.due_at + 0.001 - now)
        return max(0.001, min(wait, max(self.detector.next_look(now), 0.02)))

    def note_idle(self, due_in: float) -> None:
        """Note that a turn would find nothing now, and in how many seconds the next message is due (infinity: none is)."""
        now = self.clock()
        self.due_at = None if due_in == math.inf else now + due_in
        self.detector.look(0, (), now)

    # -- one round trip -------------------------------------------------------------------------------------------

    def turn(self, want: int = 0, *, leave: bool = False) -> CallProgram[None]:
        """
        Report what is pending, lease up to *want* more, and do what the reply asks for.

        *leave* takes the registration away when nothing is held any more. A driver that gives up in the middle
        loses nothing: the next turn begins with the same call.
        """
        moved: list[LeaseSession] = []
        if self.has_moved:
            yield from self.finish_extensions()
            moved = self._move_pending()
        if want or self._call is not None or not self.transient or self.registered or self.registering:
            yield from self._turn(want, leave)
        for own in moved:
            yield from own.turn()

    def _turn(self, want: int, leave: bool) -> CallProgram[None]:
        reconciled = False
        while True:
            repeated = self._call is not None
            try:
                if not self.registered:
                    if self.limits is not None:
                        yield from self.limits.declare(self.keys)
                    self.registering = True
                    registration = yield operations.register(
                        self.keys, self.worker, self.lease_ms, self.about, for_work=self.transient
                    )
                    self.registered, self.registering = not registration.idle, False
                    if registration.idle:
                        self._note_idle(registration)
                        return
                    self._clock_offset = registration.now - self.clock() * 1000
                    self._new_queue = self._new_queue or registration.new_queue
                    if self.limits is not None and registration.new_queue:
                        yield from self.limits.declare(self.keys, anew=True)
                if want and self.intake is not None and not repeated:
                    yield self.intake(want)
                reply: TurnReply = yield self._call or self._next_call(want, leave)
            except (WorkerUnregistered, StaleTurn):
                if repeated:
                    yield from self._find_acknowledged()
                self.forget()
                if self.transient and not want:
                    return
                continue
            known = self._absorb(reply)
            if not known:
                self._reconcile((yield operations.held_ids(self.keys, self.worker)))
            for worker, end in self._find_dead(reply):
                self.reaped += max(
                    0, (yield operations.reap(self.keys, worker, end=end, cause=operations.GAVE_NO_SIGN))
                )
            if repeated and (want or leave or self.pending):
                continue
            if known or not self.pending or reconciled:
                return
            want, reconciled = 0, True  # what was given back leaves at once

    def forget(self) -> None:
        """Change to a new identity. The messages of the old one are lost: it was reaped, or Redis lost its data."""
        for leased in {**self.held, **self._reported}.values():
            if leased.id not in self._extensions:
                self._lose(leased)
        self.held.clear()
        self.waiting.clear()
        self.cancelled.clear()
        self._reported, self._ended = {}, []
        self._call = None
        self.worker, self.number, self.registered, self.registering = new_identity(), 0, False, False

    def take_new_queue(self) -> bool:
        """Tell, once, whether a registration found the queue new in Redis: its name must be made known."""
        new, self._new_queue = self._new_queue, False
        return new

    def take_outbox(self) -> bool:
        """Tell, once, whether a turn has found something in the outbox of the queue."""
        found, self._outbox = self._outbox, False
        return found

    def hand_back(self, leased: Iterable[LeasedMessage], histories: Callable[[LeasedMessage], bytes]) -> None:
        """Give *leased* back to the front, in their order, with the given histories (b"" as it was)."""
        for one in reversed(list(leased)):
            if not (one.lost or one.settled):
                self.settle(one, Settlement("F", one.id, state=histories(one)))
                one.returned = True

    def extend(self, leased: LeasedMessage, ms: int) -> CallProgram[None]:
        """
        Move *leased*, which this session holds, to an identity of its own with a lease of *ms*.

        Until Redis has answered, whatever interrupts it, the next turn begins with the same call.
        """
        own = LeaseSession(self.keys, ms, self.about, self.detector, transient=True, clock=self.clock, registered=True)
        own.bodies, own.renewed = self.bodies, self.clock()
        call = operations.extend(self.keys, self.worker, leased.id, own.worker, ms, self.about)
        self.has_moved = True
        self._extensions[leased.id] = Extension(leased, own, call)
        yield from self.finish_extensions()

    def finish_extensions(self) -> CallProgram[None]:
        while self._extensions:
            extension = next(iter(self._extensions.values()))
            leased, own = extension.leased, extension.own
            if (yield extension.call):
                own.held[leased.id] = leased
                leased.session = own
            elif not leased.confirmed:
                self._lose(leased)
            self.held.pop(leased.id, None)
            del self._extensions[leased.id]
        if self.transient and self.registered and not self.held and self._call is None:
            yield operations.reap(self.keys, self.worker, crashed=False)  # leaves nothing of the empty identity behind
            self.forget()

    def _move_pending(self) -> list[LeaseSession]:
        """Hand the ends of messages that were moved to the sessions that hold them now; return those."""
        moved = []
        for leased, settlement in tuple(self.pending):
            if leased is not None and leased.session is not self:
                self.pending.remove((leased, settlement))
                if not (leased.confirmed or leased.session.owes(leased)):
                    leased.session.pending.append((leased, settlement))
                    moved.append(leased.session)
        return moved

    # -- inside a turn --------------------------------------------------------------------------------------------

    def _find_acknowledged(self) -> CallProgram[None]:
        """Confirm the acknowledgements of a turn whose identity is over: where it was carried out, its messages are gone."""
        for leased in self._ended:
            if leased.ending is not None and leased.ending.kind == "D":
                place, _, _ = yield inspection.get_job(self.keys, leased.id)
                leased.confirmed = place in {"none", "ended", "result"}

    def _lose(self, leased: LeasedMessage) -> None:
        if not (leased.lost or leased.confirmed):
            leased.lost = True
            if leased.settled:
                self.refused.append(leased)

    def _next_call(self, want: int, leave: bool) -> Call[TurnReply]:
        flags = ("k" if self.transient and not want else "") + ("t" if leave or (self.transient and not want) else "")
        if want or not self.transient:
            now = self.clock()
            self._looking = self.detector.next_look(now) == 0
            flags += "l" if self._looking else ""
            self.renewed = now
        report, pending, now_ms = TurnReport(), tuple(self.pending), self.now_ms
        reported: dict[str, LeasedMessage] = {}
        ended: list[LeasedMessage] = []
        for leased, settlement in pending:
            if leased is not None:
                if leased.confirmed:
                    continue  # it was reported before something was raised, and stayed in the list
                if self.held.get(settlement.id) is not leased:
                    self._lose(leased)  # the identity it was leased under is gone
                    continue
                reported[leased.id] = leased
                if not settlement.stays:
                    ended.append(leased)
            if settlement.kind == "D" and not settlement.own_id:
                report.add_done(settlement.id, settlement.attributes)  # the cheapest end: many travel in one command
            else:
                report.others.append(settlement)
        self.number = operations.next_turn_number(self.number, now_ms)
        self._leaving = "t" in flags
        flags += operations.ageing_flag(self.ageing_ms) if want else ""
        if want and self._mean_bytes:
            want = max(1, min(want, int(MOST_BYTES / self._mean_bytes)))
        call = operations.turn(self.keys, self.worker, self.number, want, self.lease_ms, report, flags=flags)
        # Only now, so that nothing is forgotten when a signal handler raises before.
        self._reported, self._ended = reported, ended
        self._call = call
        for _ in pending:
            self.pending.popleft()
        return call

    def _note_idle(self, registration: Registration) -> None:
        """Note that a pull found no work, and no dead worker: it holds no lease while it waits."""
        now = self.clock()
        self._clock_offset = registration.now - now * 1000
        due = registration.next_due
        self.due_at = None if due is None else now + max(0, due - registration.now) / 1000
        self.detector.look(registration.now, (), now)

    def _absorb(self, reply: TurnReply) -> bool:
        """Enter a reply; return False when Redis says we hold another number of messages."""
        self.missing += reply.missing
        self._outbox = self._outbox or reply.outbox
        for id_ in reply.lost:
            leased = self._reported.get(id_)
            if leased is not None:
                self._lose(leased)
                self.held.pop(id_, None)
        for leased in self._ended:
            if not leased.lost:
                leased.confirmed = True
                self.held.pop(leased.id, None)
                # Removed only now: had the end been refused, another would need it.
                if (
                    leased.blob
                    and leased.ending is not None
                    and leased.ending.kind in {"D", "C"}
                    and self.bodies is not None
                ):
                    self.bodies.delete(leased.blob)
        states = reply.states or [None] * len(reply.ids)
        for id_, data, state in zip(reply.ids, reply.envelopes, states, strict=True):
            if id_ in self.held:
                continue  # something was raised while this reply was entered, so it came again
            envelope, history, damage = read_leniently(data, state)
            leased = LeasedMessage(id_, envelope, history, damage=damage, session=self)
            self.held[id_] = leased
            self.waiting.append(leased)  # no call in between, so no signal handler
            self._mean_bytes += (len(data) - self._mean_bytes) / 16 if self._mean_bytes else len(data)
        self.cancelled = set(reply.cancelled)
        self._clock_offset = reply.now - self.clock() * 1000
        self.due_at = None if reply.next_due is None else self.clock() + max(0, reply.next_due - reply.now) / 1000
        known = reply.held == len(self.held)
        self._reported, self._ended = {}, []
        self._call = None
        if self._leaving and reply.held == 0:
            self.forget()  # what is left of this identity expires, with whatever it would lease
        return known

    def _find_dead(self, reply: TurnReply) -> list[tuple[str, int]]:
        if not self._looking:
            return []
        self._looking = False
        dead = self.detector.look(reply.now, reply.overdue, self.clock())
        return [one for one in dead if one[0] != self.worker]

    def _reconcile(self, ids: Iterable[str]) -> None:
        """Give back what we do not know, and give up what Redis does not know."""
        theirs = list(ids)
        for id_ in reversed(theirs):  # the youngest first, since each goes to the front
            if id_ not in self.held:
                self.pending.append((None, Settlement("F", id_)))
        for id_ in self.held.keys() - set(theirs):
            self.held.pop(id_).lost = True
        self.waiting = deque(leased for leased in self.waiting if not leased.lost)


def holds_all(session: LeaseSession, endings: Iterable[tuple[LeasedMessage, Settlement]]) -> bool:
    """Tell whether the turns of *session* report these ends: none of the messages was moved to another."""
    return all(leased.session is session for leased, _ in endings)


def settle_all(endings: Iterable[tuple[LeasedMessage, Settlement]]) -> None:
    """Note how several messages end. The next turns of the sessions that hold them report it."""
    for leased, settlement in endings:
        leased.session.settle(leased, settlement)
