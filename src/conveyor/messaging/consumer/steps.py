"""
Programs that take messages from a queue in one piece: they say when to make a turn and when to wait.

A program is a generator of steps and does no input or output. The blocking and the awaitable consumer carry out the
same programs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

import msgspec

from conveyor.errors import PayloadError, UnknownTask
from conveyor.ids import clean, public
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.blobs import BlobUnavailable
from conveyor.payload.versions import PayloadTooNew
from conveyor.store.operations import MOST_HELD
from conveyor.units import span

M = TypeVar("M")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")


class TurnStep(msgspec.Struct, frozen=True):
    """Make a turn at partition `at`: report what is pending and lease up to `want` more."""

    want: int
    leave: bool = False
    at: int = 0
    must: bool = True
    """False: where Redis is away, go on without this turn."""


class WaitStep(msgspec.Struct, frozen=True):
    """Block until a token comes, at most `seconds`; when `full`, until something held was settled."""

    seconds: float
    full: bool = False


class LookStep(msgspec.Struct, frozen=True):
    """Find out, in one call, at which of the partitions `ats` a turn would find something; report to `looked`."""

    ats: tuple[int, ...]


Program = Generator[TurnStep | WaitStep | LookStep, None, V]


class ConsumerSteps(Generic[M]):
    """The programs of a consumer at one queue or partition. `open` makes the message users see."""

    def __init__(
        self,
        session: LeaseSession,
        policy: SettlementPolicy,
        open: Callable[[LeasedMessage], M],  # noqa: A002
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self._policy = policy
        self._open = open
        self._clock = clock

    def fetch(self, prefetch: int) -> Program[M]:
        """Return the next message; lease *prefetch* when none is at hand."""
        session = self.session
        while True:
            while session.waiting:
                opened = yield from self.next_message(alone=True)
                if opened is not None:
                    opened[0].started = True
                    return opened[1]
            yield TurnStep(prefetch)
            if not session.waiting:
                yield self._wait()

    def gather(self, size: int, within: float) -> Program[list[M]]:
        """Return up to *size* messages, complete or *within* seconds after the first came."""
        gathered: list[tuple[LeasedMessage, M]] = []
        deadline: float | None = None
        while True:
            yield TurnStep(max(0, size - len(gathered) - len(self.session.waiting)))
            gathered = [one for one in gathered if not (one[0].lost or self.drop(one[0]))]
            closed = yield from self.fill(gathered, size)
            now = self._clock()
            if gathered and deadline is None:
                deadline = now + within
            if gathered and (closed or len(gathered) >= size or (deadline is not None and now >= deadline)):
                return start(gathered)
            if not self.session.waiting:
                yield self._wait(None if deadline is None else deadline - now)

    def pull(self, count: int, wait: float) -> Program[list[M]]:
        """Return up to *count* messages, as soon as there is one, or none after *wait* seconds."""
        deadline = self._clock() + wait
        while True:
            now = self._clock()
            last = now >= deadline
            yield TurnStep(count, leave=last)
            pulled: list[tuple[LeasedMessage, M]] = []
            while self.session.waiting and not (yield from self.fill(pulled, count, begin=False)):
                pass
            if self.session.waiting:  # behind a suspect, or a suspect behind others: it runs alone
                self.session.hand_back(self.session.waiting, self._policy.returned)
                self.session.waiting.clear()
            if self.session.pending:
                yield TurnStep(0)
            pulled = [one for one in pulled if not one[0].lost]
            if pulled or last:
                return start(pulled)
            yield self._wait(deadline - now)

    def leave(self) -> Program[None]:
        """Give everything back, unstarted messages without a trace, and take the registration away."""
        session = self.session
        for _ in range(2):  # a turn that was interrupted is repeated first, and may bring more
            session.hand_back(list(session.held.values()), self._policy.returned)
            session.waiting.clear()
            yield TurnStep(0, leave=True)
            if not session.held:
                return

    def woken(self, at: int) -> None:
        """Do nothing: a queue in one piece is looked at anyway after each wait."""

    def looked(self, at: int, due_in: float | None) -> None:
        """Do nothing: it makes its turn."""

    def unspent(self) -> list[int]:
        """Return nothing, for the same reason."""
        return []

    # -- parts of programs ----------------------------------------------------------------------------------------

    def next_message(self, *, alone: bool, begin: bool = True) -> Program[tuple[LeasedMessage, M] | None]:
        """
        Return the first waiting message; None when it was settled, or is a suspect that must wait.

        *begin*: its handling begins when it is handed out, so the possible crash of a suspect is recorded first.
        """
        session = self.session
        leased = session.waiting[0]
        if not alone and self._is_suspect(leased):
            return None
        session.waiting.popleft()
        if leased.lost or self.drop(leased):
            return None
        # An entry that a worker has moved off a plain list names its task, and is a document for a consumer all the same.
        if leased.envelope.task and not leased.damage and session.keys.foreign is None:
            self._put_off_job(leased)
            return None
        if leased.history.crashes and (poison := self._policy.poison(leased)) is not None:
            logger.error(
                "Message %s crashed its consumers %d times and is now a dead letter.",
                self._name(leased),
                leased.history.crashes,
            )
            session.settle(leased, poison)
            return None
        try:
            message = self._open(leased)
        except (PayloadError, BlobUnavailable) as error:
            self._settle_unreadable(leased, error)
            return None
        leased.begun = begin
        if begin and leased.history.crashes and (presumed := self._policy.presumed_crash(leased)) is not None:
            session.settle(leased, presumed)
            yield TurnStep(0)
            if leased.lost or self.drop(leased):
                return None
        return leased, message

    def drop(self, leased: LeasedMessage) -> bool:
        """Settle a message that has not started and may not: it was cancelled, or has expired. Tell whether it was one."""
        session, expires = self.session, leased.envelope.expires_ms
        if leased.id in session.cancelled:
            session.settle(leased, self._policy.cancelled(leased))
        elif expires is not None and expires <= session.now_ms:
            session.settle(leased, self._policy.cancelled(leased, "expired"))
        else:
            return False
        return True

    def fill(self, gathered: list[tuple[LeasedMessage, M]], size: int, *, begin: bool = True) -> Program[bool]:
        """Move waiting messages into *gathered*. Return True when it must be handed out as it is."""
        while self.session.waiting and len(gathered) < size:
            opened = yield from self.next_message(alone=not gathered, begin=begin)
            if opened is None:
                if gathered and self.session.waiting and self._is_suspect(self.session.waiting[0]):
                    return True
                continue
            gathered.append(opened)
            if self._is_suspect(opened[0]):
                return True
        return len(gathered) >= size

    def _wait(self, most: float | None = None) -> WaitStep:
        full = len(self.session.held) >= MOST_HELD
        seconds = self.session.wait()
        return WaitStep(seconds if most is None else max(0.001, min(seconds, most)), full)

    def _is_suspect(self, leased: LeasedMessage) -> bool:
        """Tell whether it may have crashed a consumer and may be tried again. A suspect runs alone."""
        return leased.history.crashes != 0 and self._policy.poison(leased) is None

    def _settle_unreadable(self, leased: LeasedMessage, error: PayloadError | BlobUnavailable) -> None:
        name, line = self._name(leased), clean(" ".join(self._policy.without_values(leased, str(error)).split()))
        if isinstance(error, PayloadTooNew):
            settlement = self._policy.put_off(leased, error)
            log = logger.warning if settlement.kind == "R" else logger.error
            log("Message %s waits for a newer program: %s", name, line)
        elif isinstance(error, BlobUnavailable):
            settlement = self._policy.failed(leased, error)
            logger.error("Message %s: %s", name, line)
        else:
            settlement = self._policy.undecodable(leased, error)
            logger.error("Message %s cannot be decoded and is now a dead letter: %s", name, line)
        self.session.settle(leased, settlement)

    def _put_off_job(self, leased: LeasedMessage) -> None:
        """Leave a job to a worker: no attempt is used."""
        name, queue = self._name(leased), self.session.keys.queue
        error = UnknownTask(
            f"E05 Entry {name} in '{queue}' is a job of task '{leased.envelope.task}', not a message: it was enqueued with "
            "enqueue; messages are pushed with push. A worker that has the task runs it; enqueue jobs in a queue of their own."
        )
        settlement = self._policy.put_off(leased, error)
        if settlement.kind == "R":
            again = f"It stays in '{queue}' and is tried again in {span(settlement.ms / 1000)}; no attempt was used."
            logger.warning("%s %s", clean(str(error)), again)
        else:
            logger.error("%s No worker ran it for a day, and it is now a dead letter.", clean(str(error)))
        self.session.settle(leased, settlement)

    def _name(self, leased: LeasedMessage) -> str:
        return clean(public(self.session.keys.queue, leased.id))


def start(gathered: list[tuple[LeasedMessage, M]]) -> list[M]:
    """Mark messages as started, and return them as users see them."""
    for leased, _ in gathered:
        leased.started = True
    return [message for _, message in gathered]
