"""One message as a consumer holds it, and several of them as a batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Generic, Literal, Protocol, TypeVar

from conveyor.errors import ConfigurationError, LeaseLost
from conveyor.ids import clean, public
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload import failures
from conveyor.store.operations import Settlement
from conveyor.units import Duration, milliseconds

T = TypeVar("T")
OnError = Literal["log", "raise"]
Ending = tuple[LeasedMessage, Settlement]
logger = logging.getLogger("conveyor.queue")


class Settler(Protocol):
    """Who holds leased messages and carries out how they end. `settle` and `extend` raise LeaseLost."""

    verdict: SettlementPolicy
    on_error: OnError

    def is_cancelled(self, leased: LeasedMessage) -> bool: ...
    def settle(self, endings: Sequence[Ending]) -> None: ...
    def settle_soon(self, endings: Sequence[Ending]) -> None: ...
    def extend(self, leased: LeasedMessage, ms: int) -> Settler: ...
    async def asettle(self, endings: Sequence[Ending]) -> None: ...
    async def asettle_soon(self, endings: Sequence[Ending]) -> None: ...
    async def aextend(self, leased: LeasedMessage, ms: int) -> Settler: ...


class Message(Generic[T]):
    """
    A leased message: `id`, `body`, `attempt` (from 1), `headers`.

    ``with message as body`` acks on success; an exception nacks with backoff, is logged, and does not leave the
    block; anything else (KeyboardInterrupt) hands the message back. The calls return when Redis confirmed them,
    and raise LeaseLost when the message is no longer ours.
    """

    __slots__ = ("_holder", "_leased", "body", "id", "queue")

    def __init__(self, queue: str, body: T, leased: LeasedMessage, holder: Settler) -> None:
        """Made by the queue."""
        self.queue = queue
        self.id = public(queue, leased.id)
        self.body = body
        self._leased = leased
        self._holder = holder

    @property
    def attempt(self) -> int:
        """The number of this delivery that a consumer began, from 1."""
        return self._leased.attempt

    @property
    def headers(self) -> dict[str, str]:
        """The headers given with the push."""
        return self._leased.envelope.extra.headers

    @property
    def priority(self) -> int:
        """The priority given with the push, 0 to 9."""
        return self._leased.envelope.priority

    def __repr__(self) -> str:
        state = "lost" if self._leased.lost else "settled" if self._leased.settled else "leased"
        return f"<Message {self.id}: attempt {self.attempt}, {state}>"

    # -- how it ends ----------------------------------------------------------------------------------------------

    def ack(self) -> None:
        """Finish it. Raises LeaseLost."""
        self._holder.settle([self._done()])

    def nack(self, delay: Duration | None = None) -> None:
        """Refuse it: it comes back after *delay* (default: the queue's backoff), or is dead after `max_attempts`."""
        self._holder.settle([self._nacked(delay)])

    def dead(self, reason: str) -> None:
        """Make it a dead letter. Raises LeaseLost."""
        self._holder.settle([self._dead(reason)])

    def extend(self, duration: Duration) -> None:
        """Give it a lease of its own that ends *duration* from now, renewed by nobody else. Raises LeaseLost."""
        self._holder = self._holder.extend(self._ours(), _lease(duration))

    async def aack(self) -> None:
        """Finish it. Raises LeaseLost."""
        await self._holder.asettle([self._done()])

    async def anack(self, delay: Duration | None = None) -> None:
        """Refuse it, as `nack`."""
        await self._holder.asettle([self._nacked(delay)])

    async def adead(self, reason: str) -> None:
        """Make it a dead letter. Raises LeaseLost."""
        await self._holder.asettle([self._dead(reason)])

    async def aextend(self, duration: Duration) -> None:
        """Give it a lease of its own, as `extend`."""
        self._holder = await self._holder.aextend(self._ours(), _lease(duration))

    # -- as a block -----------------------------------------------------------------------------------------------

    def __enter__(self) -> T:
        self._ours()
        return self.body

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if endings := self._endings(error):
            self._holder.settle_soon(endings)
        return self._stops(error)

    async def __aenter__(self) -> T:
        self._ours()
        return self.body

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if endings := self._endings(error):
            await self._holder.asettle_soon(endings)
        return self._stops(error)

    # -- decisions ------------------------------------------------------------------------------------------------

    def _ours(self) -> LeasedMessage:
        leased = self._leased
        if leased.settled or leased.lost:
            why = "its lease was given up" if leased.lost else "it was settled before"
            if leased.returned:
                why = "the loop over consume() was left, which handed it back. Keep the iterator in a variable"
            raise LeaseLost(f"Message {self.id} is no longer ours: {why}. Nothing was changed.")
        return leased

    def _done(self) -> Ending:
        leased = self._ours()
        return leased, self._holder.verdict.done(leased)

    def _nacked(self, delay: Duration | None) -> Ending:
        delay_ms = None if delay is None else milliseconds(delay, name="delay")
        leased = self._ours()
        return leased, self._holder.verdict.nacked(leased, delay_ms, cancelled=self._holder.is_cancelled(leased))

    def _dead(self, reason: str) -> Ending:
        if not isinstance(reason, str):
            raise ConfigurationError(f"dead() takes the reason as text, not {type(reason).__name__}.")
        leased = self._ours()
        return leased, self._holder.verdict.dead(leased, reason)

    def _endings(self, error: BaseException | None, *, log: bool = True) -> list[Ending]:
        """Return how a block that ended with *error* settles this message, and log what a person should know."""
        leased, verdict = self._leased, self._holder.verdict
        if leased.settled or leased.lost:
            if isinstance(error, Exception) and self._holder.on_error == "log":
                failures.log_error(logger, logging.ERROR, "Message %s: %s", clean(self.id), _brief(error), error=error)
            elif leased.lost and not leased.settled:
                logger.warning(
                    "Message %s was lost while it ran: its lease was given up, another has it.", clean(self.id)
                )
            return []
        if error is None:
            return [(leased, verdict.done(leased))]
        if not isinstance(error, Exception):
            leased.started = True
            return [(leased, Settlement("F", leased.id, state=verdict.returned(leased)))]
        ending = verdict.failed(leased, error, cancelled=self._holder.is_cancelled(leased))
        if log and self._holder.on_error == "log":
            follows = {"R": f"again in {ending.ms / 1000:.1f} s", "X": "dead"}.get(ending.kind, "cancelled")
            failures.log_error(
                logger, logging.ERROR, "Message %s failed at attempt %d, %s: %s", clean(self.id), self.attempt, follows,
                _brief(error), error=error,
            )  # fmt: skip
        return [(leased, ending)]

    def _stops(self, error: BaseException | None) -> bool:
        return isinstance(error, Exception) and self._holder.on_error == "log"


class Batch(list[Message[T]]):
    """
    Messages that came together. ``with batch as bodies`` acks all that were not settled one by one, or nacks them.

    A message that may have crashed a consumer comes in a batch of its own.
    """

    __slots__ = ()

    @property
    def bodies(self) -> list[T]:
        """What the messages hold, in their order."""
        return [message.body for message in self]

    def ack(self) -> None:
        """Finish all that are not settled yet, in one round trip. Raises LeaseLost when some are no longer ours."""
        for holder, endings in _grouped((m._holder, [m._done()]) for m in self._open()):  # noqa: SLF001
            holder.settle(endings)

    def nack(self, delay: Duration | None = None) -> None:
        """Refuse all that are not settled yet."""
        for holder, endings in _grouped((m._holder, [m._nacked(delay)]) for m in self._open()):  # noqa: SLF001
            holder.settle(endings)

    async def aack(self) -> None:
        """Finish all that are not settled yet."""
        for holder, endings in _grouped((m._holder, [m._done()]) for m in self._open()):  # noqa: SLF001
            await holder.asettle(endings)

    async def anack(self, delay: Duration | None = None) -> None:
        """Refuse all that are not settled yet."""
        for holder, endings in _grouped((m._holder, [m._nacked(delay)]) for m in self._open()):  # noqa: SLF001
            await holder.asettle(endings)

    def __enter__(self) -> list[T]:
        return self.bodies

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for holder, endings in self._endings(error):
            holder.settle_soon(endings)
        return bool(self) and self[0]._stops(error)  # noqa: SLF001

    async def __aenter__(self) -> list[T]:
        return self.bodies

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for holder, endings in self._endings(error):
            await holder.asettle_soon(endings)
        return bool(self) and self[0]._stops(error)  # noqa: SLF001

    def _open(self) -> list[Message[T]]:
        return [message for message in self if not message._leased.settled]  # noqa: SLF001

    def _endings(self, error: BaseException | None) -> list[tuple[Settler, list[Ending]]]:
        # Newest first, so that what is handed back to the front keeps its order. One traceback says it for all.
        return _grouped(
            (message._holder, message._endings(error, log=number == 0))  # noqa: SLF001
            for number, message in enumerate(reversed(self._open()))
        )


def _grouped(endings: Iterable[tuple[Settler, list[Ending]]]) -> list[tuple[Settler, list[Ending]]]:
    """Return what each holder has to settle; one that was extended has a holder of its own."""
    by_holder: dict[int, tuple[Settler, list[Ending]]] = {}
    for holder, several in endings:
        by_holder.setdefault(id(holder), (holder, []))[1].extend(several)
    return [one for one in by_holder.values() if one[1]]


def _lease(duration: Duration) -> int:
    ms = milliseconds(duration, name="duration")
    if ms < 1:
        raise ConfigurationError("extend() needs a duration longer than 0. Use nack(delay=0) to give a message back.")
    return ms


def _brief(error: BaseException) -> str:
    return clean(f"{failures.type_name(error)}: {failures.message(error)}")


def lost(queue: str, leased: Iterable[LeasedMessage]) -> LeaseLost:
    """Return the error for messages whose end was refused."""
    ids = ", ".join(public(queue, one.id) for one in leased)
    return LeaseLost(f"No longer ours, so another may run it: {ids}. The lease was given up; nothing was changed.")
