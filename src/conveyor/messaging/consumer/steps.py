"""
How messages are taken: programs that say when to make a turn and when to wait.

A program is a generator of steps; the blocking and the awaitable driver carry the same ones out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

from conveyor.errors import PayloadError
from conveyor.ids import clean, public
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.blobs import BlobUnavailable
from conveyor.payload.versions import PayloadTooNew
from conveyor.store.operations import MOST_HELD

M = TypeVar("M")
S = TypeVar("S")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")


@dataclass(frozen=True, slots=True)
class TurnStep:
    """Make a turn: report what is pending and lease up to `want` more."""

    want: int
    leave: bool = False


@dataclass(frozen=True, slots=True)
class WaitStep:
    """Block until a token comes, at most `seconds`; when `full`, until something held was settled."""

    seconds: float
    full: bool = False


Step = TurnStep | WaitStep
Program = Generator[Step, None, M]


class ConsumerSteps(Generic[M]):
    """The programs of one consumer. `open` makes the message people see, and raises PayloadError when it cannot."""

    def __init__(
        self,
        lessee: LeaseSession,
        verdict: SettlementPolicy,
        open: Callable[[LeasedMessage], M],  # noqa: A002
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the books, the judge, and how a message is made."""
        self.lessee = lessee
        self._verdict = verdict
        self._open = open
        self._clock = clock

    def fetch(self, prefetch: int) -> Program[M]:
        """Return the next message; lease *prefetch* when none is at hand."""
        while True:
            while self.lessee.waiting:
                found = yield from self._next(alone=True)
                if found is not None:
                    found[0].started = True
                    return found[1]
            yield TurnStep(prefetch)
            if not self.lessee.waiting:
                yield self._wait()

    def gather(self, size: int, within: float) -> Program[list[M]]:
        """Return up to *size* messages, complete or *within* seconds after the first came."""
        found: list[tuple[LeasedMessage, M]] = []
        deadline: float | None = None
        while True:
            yield TurnStep(max(0, size - len(found) - len(self.lessee.waiting)))
            found = [one for one in found if not one[0].lost]
            closed = yield from self._fill(found, size)
            now = self._clock()
            if found and deadline is None:
                deadline = now + within
            if found and (closed or len(found) >= size or (deadline is not None and now >= deadline)):
                return _start(found)
            if not self.lessee.waiting:
                yield self._wait(None if deadline is None else deadline - now)

    def pull(self, count: int, wait: float) -> Program[list[M]]:
        """Return up to *count* messages, as soon as there is one, or none after *wait* seconds."""
        deadline = self._clock() + wait
        while True:
            now = self._clock()
            last = now >= deadline
            yield TurnStep(count, leave=last)
            found: list[tuple[LeasedMessage, M]] = []
            while self.lessee.waiting and not (yield from self._fill(found, count)):
                pass
            if self.lessee.waiting:  # behind a suspect, or a suspect behind others: it runs alone
                self.lessee.hand_back(self.lessee.waiting, self._verdict.returned)
                self.lessee.waiting.clear()
            if self.lessee.pending:
                yield TurnStep(0)
            found = [one for one in found if not one[0].lost]
            if found or last:
                return _start(found)
            yield self._wait(deadline - now)

    def leave(self) -> Program[None]:
        """Give everything back, unstarted ones without a trace, and take the registration away."""
        lessee = self.lessee
        lessee.hand_back(list(lessee.held.values()), self._verdict.returned)
        lessee.waiting.clear()
        yield TurnStep(0, leave=True)

    def _wait(self, most: float | None = None) -> WaitStep:
        full = len(self.lessee.held) >= MOST_HELD
        seconds = self.lessee.wait()
        return WaitStep(seconds if most is None else max(0.001, min(seconds, most)), full)

    def _fill(self, found: list[tuple[LeasedMessage, M]], size: int) -> Program[bool]:
        """Move what waits into *found*; True when that must be handed out as it is, since a suspect travels alone."""
        while self.lessee.waiting and len(found) < size:
            one = yield from self._next(alone=not found)
            if one is None:
                if found and self.lessee.waiting and self._is_suspect(self.lessee.waiting[0]):
                    return True
                continue
            found.append(one)
            if self._is_suspect(one[0]):
                return True
        return len(found) >= size

    def _is_suspect(self, leased: LeasedMessage) -> bool:
        return self._verdict.suspected(leased) is not None and self._verdict.poison(leased) is None

    def _next(self, *, alone: bool) -> Program[tuple[LeasedMessage, M] | None]:
        """Return the first that waits, opened; None when it was settled instead, or is a suspect that must wait."""
        lessee = self.lessee
        leased = lessee.waiting[0]
        if self._is_suspect(leased) and not alone:
            return None
        lessee.waiting.popleft()
        if leased.lost:
            return None
        name = clean(public(lessee.keys.queue, leased.id))
        if leased.id in lessee.cancelled:
            lessee.settle(leased, self._verdict.cancelled(leased))
            return None
        if (poison := self._verdict.poison(leased)) is not None:
            logger.error("Message %s crashed its consumers %d times: dead.", name, leased.state.crashes)
            lessee.settle(leased, poison)
            return None
        try:
            message = self._open(leased)
        except PayloadTooNew as error:
            put_off = self._verdict.put_off(leased, error)
            log = logger.warning if put_off.kind == "R" else logger.error
            log("Message %s waits for a newer program: %s", name, _line(error))
            lessee.settle(leased, put_off)
            return None
        except BlobUnavailable as error:
            logger.error("Message %s: %s", name, _line(error))
            lessee.settle(leased, self._verdict.failed(leased, error))
            return None
        except PayloadError as error:
            logger.error("Message %s cannot be decoded and is now a dead letter: %s", name, _line(error))
            lessee.settle(leased, self._verdict.undecodable(leased, error))
            return None
        if (suspicion := self._verdict.suspected(leased)) is not None:
            lessee.settle(leased, suspicion)
            yield TurnStep(0)
            if leased.lost:
                return None
        return leased, message


def _line(error: Exception) -> str:
    return clean(" ".join(str(error).split()))


def _start(found: list[tuple[LeasedMessage, M]]) -> list[M]:
    for leased, _ in found:
        leased.started = True
    return [message for _, message in found]


def quietly(follow: Callable[[S], V], program: S) -> V:
    """Let *follow* carry *program* out. Ctrl-C is how a loop ends: where it waited then is left out of the traceback."""
    try:
        return follow(program)
    except KeyboardInterrupt as stop:
        raise stop.with_traceback(None) from None


async def aquietly(follow: Callable[[S], Awaitable[V]], program: S) -> V:
    """Do the same for a loop of asyncio, which ctrl-C cancels."""
    try:
        return await follow(program)
    except asyncio.CancelledError as stop:
        raise stop.with_traceback(None) from None
