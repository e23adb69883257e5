"""A leased message, and a batch of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Generic, Literal, Protocol, TypeVar

from conveyor.errors import ConfigurationError, LeaseLost
from conveyor.ids import clean, logical, public
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload import failures
from conveyor.payload.redaction import Hide
from conveyor.store.client.client import Client
from conveyor.store.client.handling import HANDLED
from conveyor.store.operations import Settlement
from conveyor.units import Duration, milliseconds

T = TypeVar("T")
OnError = Literal["log", "raise"]
Ending = tuple[LeasedMessage, Settlement]
logger = logging.getLogger("conveyor.queue")


class Settler(Protocol):
    """Carries out how leased messages end. `settle` and `extend` raise LeaseLost."""

    client: Client
    is_of_parent: bool  # in a forked child of the process that took the messages: their loop goes on in the parent
    policy: SettlementPolicy
    on_error: OnError
    failure_log: failures.FailureLog
    is_async: bool

    def refuse_block(self) -> None: ...
    def is_cancelled(self, leased: LeasedMessage) -> bool: ...
    def settle(self, endings: Sequence[Ending]) -> None: ...
    def settle_soon(self, endings: Sequence[Ending]) -> None: ...
    def extend(self, leased: LeasedMessage, ms: int) -> None: ...
    async def asettle(self, endings: Sequence[Ending]) -> None: ...
    async def asettle_soon(self, endings: Sequence[Ending]) -> None: ...
    async def aextend(self, leased: LeasedMessage, ms: int) -> None: ...


@dataclass(slots=True, eq=False, repr=False)
class Message(Generic[T]):
    """
    A leased message: `id`, `body`, `attempt` (from 1), `headers`, `tags`.

    ``with message as body`` acks on success; an exception nacks with backoff, is logged, and does not leave the
    block; anything else (KeyboardInterrupt) hands the message back. The calls return when Redis confirmed them,
    and raise LeaseLost when the lease is no longer held.

    A consumer that dies is charged for what it had begun: all that `consume` and `batches` handed out, and of pulled
    messages those whose block was entered or `start` called.
    """

    body: T
    _leased: LeasedMessage
    _settler: Settler

    @property
    def id(self) -> str:
        """The id that `push` returned."""
        return public(self._leased.session.keys.queue, self._leased.id)

    @property
    def queue(self) -> str:
        """The name of its queue."""
        keys = self._leased.session.keys
        return logical(keys.queue) if keys.foreign is None else keys.queue

    @property
    def attempt(self) -> int:
        """The number of this delivery, from 1."""
        return self._leased.attempt

    @property
    def headers(self) -> dict[str, str]:
        """The headers given with the push."""
        return self._leased.envelope.extra.headers

    @property
    def tags(self) -> list[str]:
        """The tags given with the push."""
        return self._leased.envelope.tags

    @property
    def topic(self) -> str:
        """The topic that it was published to; "" for one that was pushed to the queue itself."""
        return self._leased.envelope.extra.topic

    @property
    def priority(self) -> int:
        """The priority given with the push, 0 to 9."""
        return self._leased.envelope.priority

    @property
    def lease_ends(self) -> datetime | None:
        """When its lease ends unless it is renewed, by the clock of this machine; None when it is settled or lost."""
        leased = self._leased
        if leased.settled or leased.lost:
            return None
        return datetime.now(UTC) + timedelta(seconds=leased.session.remaining())

    def __repr__(self) -> str:
        state = "lost" if self._leased.lost else "settled" if self._leased.settled else "leased"
        return f"<Message {self.id}: attempt {self.attempt}, {state}>"

    # -- how it begins and ends -----------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Tell that its handling begins, as the block does. Raises LeaseLost.

        Costs nothing, unless a consumer of the message has died: then the start is recorded, so that a message which
        ends its consumers is given up after `max_crashes`, and one that was only pulled ahead is not.
        """
        if beginning := self._beginning():
            self._settler.settle(beginning)
        self._leased.begun = True

    async def astart(self) -> None:
        """Awaitable form of `start`."""
        if beginning := self._beginning():
            await self._settler.asettle(beginning)
        self._leased.begun = True

    def ack(self) -> None:
        """
        Acknowledge the message: it is done. Raises LeaseLost.

        After StoreUnavailable call it again: the same report is repeated, so it counts once. The same holds for the other ends.
        """
        self._settler.settle([self._done()])

    def nack(self, delay: Duration | None = None) -> None:
        """Refuse the message: retry after *delay* (None: the queue's backoff), dead after `max_attempts`."""
        self._settler.settle([self._nacked(delay)])

    def dead(self, reason: str) -> None:
        """Make the message a dead letter. Raises LeaseLost."""
        self._settler.settle([self._dead(reason)])

    def release(self) -> None:
        """
        Give the message back to the front of its queue, as if it had not been taken: it counts as no attempt.

        Of several, release the last one first, and they keep their order. Raises LeaseLost.
        """
        self._settler.settle([self._released()])

    def extend(self, duration: Duration) -> None:
        """
        Give the message its own lease that ends *duration* from now and is not renewed. Raises LeaseLost.

        It may run beside `ack` and the other ends; a message that was settled meanwhile needs no lease, so it does nothing.
        """
        if leased := self._extendable():
            self._settler.extend(leased, _lease(duration))

    async def aack(self) -> None:
        """Awaitable form of `ack`."""
        await self._settler.asettle([self._done()])

    async def anack(self, delay: Duration | None = None) -> None:
        """Awaitable form of `nack`."""
        await self._settler.asettle([self._nacked(delay)])

    async def adead(self, reason: str) -> None:
        """Awaitable form of `dead`."""
        await self._settler.asettle([self._dead(reason)])

    async def arelease(self) -> None:
        """Awaitable form of `release`."""
        await self._settler.asettle([self._released()])

    async def aextend(self, duration: Duration) -> None:
        """Awaitable form of `extend`."""
        if leased := self._extendable():
            await self._settler.aextend(leased, _lease(duration))

    # -- as a block -----------------------------------------------------------------------------------------------

    def __enter__(self) -> T:
        if self._settler.is_async:
            self._settler.refuse_block()
        self.start()
        self._begin_handling()
        return self.body

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._end_handling()
        if endings := self._endings(error):
            self._settler.settle_soon(endings)
        return self._stops(error)

    async def __aenter__(self) -> T:
        await self.astart()
        self._begin_handling()
        return self.body

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._end_handling()
        if endings := self._endings(error):
            await self._settler.asettle_soon(endings)
        return self._stops(error)

    def _begin_handling(self) -> None:
        HANDLED.set((*HANDLED.get(), self._leased.session.keys.queue))

    def _end_handling(self) -> None:
        # The first of its name, and not what there was at its begin: messages may end in another order than they began.
        handled = list(HANDLED.get())
        if (queue := self._leased.session.keys.queue) in handled:
            handled.remove(queue)
        HANDLED.set(tuple(handled))

    # -- decisions ------------------------------------------------------------------------------------------------

    def _ours(self) -> LeasedMessage:
        leased = self._leased
        if leased.settled or leased.lost:
            what = "lost its lease, so another consumer may run it" if leased.lost else "was already settled"
            if leased.returned:
                what = "was handed back when the loop over consume() was left. Keep the iterator in a variable"
            raise LeaseLost(f"Message {self.id} {what}. Nothing was changed.")
        return leased

    def _extendable(self) -> LeasedMessage | None:
        """Return what can be extended, None when it was settled here. Raises LeaseLost."""
        leased = self._leased
        return None if leased.confirmed and not leased.returned and not leased.lost else self._held()

    def _held(self) -> LeasedMessage:
        """Return the message unless its lease is over; it may be on its way to its end."""
        return self._leased if self._unconfirmed() else self._ours()

    def _unconfirmed(self) -> list[Ending]:
        """Return the end that was asked for before and that Redis has not confirmed, to be reported again."""
        leased = self._leased
        if leased.ending is None or leased.confirmed or leased.lost or leased.returned:
            return []
        return [(leased, leased.ending)]

    def _again(self, kinds: str) -> Ending | None:
        """Return the unconfirmed end when it is one of *kinds*. Raises LeaseLost for another."""
        for leased, ending in self._unconfirmed():
            if ending.kind not in kinds:
                raise LeaseLost(
                    f"Message {self.id} was settled in another way before, and Redis has not confirmed that yet. "
                    "Repeat that call. Nothing was changed."
                )
            return leased, ending
        return None

    def _beginning(self) -> list[Ending]:
        """Return what must be recorded before its handling begins; nothing for what came back from no crash."""
        leased = self._ours()
        presumed = None if leased.begun else self._settler.policy.presumed_crash(leased)
        return [] if presumed is None else [(leased, presumed)]

    def _done(self) -> Ending:
        if again := self._again("D"):
            return again
        leased = self._ours()
        return leased, success(leased)

    def _nacked(self, delay: Duration | None) -> Ending:
        delay_ms = None if delay is None else milliseconds(delay, name="delay")
        if again := self._again("RXC"):
            return again
        leased = self._ours()
        return leased, self._settler.policy.nacked(leased, delay_ms, cancelled=self._settler.is_cancelled(leased))

    def _dead(self, reason: str) -> Ending:
        if not isinstance(reason, str):
            raise ConfigurationError(f"dead() takes the reason as text, not {type(reason).__name__}.")
        if again := self._again("X"):
            return again
        leased = self._ours()
        return leased, self._settler.policy.dead(leased, reason)

    def _released(self) -> Ending:
        if again := self._again("F"):
            return again
        leased = self._ours()
        return leased, self._settler.policy.released(leased)

    def _endings(self, error: BaseException | None, *, log: bool = True) -> list[Ending]:
        """Return how a block that ended with *error* settles this message, and log the failure."""
        leased, policy = self._leased, self._settler.policy
        of_parent = self._settler.is_of_parent  # which ends it; this is a forked child
        if leased.settled or leased.lost or of_parent:
            if isinstance(error, Exception) and self._settler.on_error == "log":
                hide = policy.hide_of(leased)
                self._settler.failure_log.log(
                    logging.ERROR, "Message %s: %s", clean(self.id), _brief(error, hide), error=error, hide=hide
                )
            elif leased.lost and not leased.settled:
                logger.warning("Message %s lost its lease while it ran: another consumer may run it.", clean(self.id))
            return self._unconfirmed() if error is None and not of_parent else []
        if error is None:
            return [(leased, success(leased))]
        if not isinstance(error, Exception):
            leased.started = True
            return [(leased, Settlement("F", leased.id, state=policy.returned(leased)))]
        ending = policy.failed(leased, error, cancelled=self._settler.is_cancelled(leased))
        if log and self._settler.on_error == "log":
            again = f"again in {ending.ms / 1000:.1f} s"
            follows = {"R": again, "L": again, "X": "dead"}.get(ending.kind, "cancelled")
            hide = policy.hide_of(leased)
            self._settler.failure_log.log(
                logging.ERROR, "Message %s failed at attempt %d, %s: %s", clean(self.id), self.attempt, follows,
                _brief(error, hide), error=error, hide=hide,
            )  # fmt: skip
        return [(leased, ending)]

    def _stops(self, error: BaseException | None) -> bool:
        return isinstance(error, Exception) and self._settler.on_error == "log"


class Batch(list[Message[T]]):
    """
    A list of messages. ``with batch as bodies`` acks all that were not settled one by one, or nacks them.

    A message that may have crashed a consumer comes in a batch of its own.
    """

    __slots__ = ()

    @property
    def bodies(self) -> list[T]:
        """The bodies of the messages, in their order."""
        return [message.body for message in self]

    def ack(self) -> None:
        """Acknowledge all that are not settled yet, in one round trip. Raises LeaseLost."""
        for settler, endings in _grouped((m._settler, m._unconfirmed() or [m._done()]) for m in self._open()):  # noqa: SLF001
            settler.settle(endings)

    def nack(self, delay: Duration | None = None) -> None:
        """Refuse all that are not settled yet, as `Message.nack`."""
        for settler, endings in _grouped((m._settler, m._unconfirmed() or [m._nacked(delay)]) for m in self._open()):  # noqa: SLF001
            settler.settle(endings)

    async def aack(self) -> None:
        """Awaitable form of `ack`."""
        for settler, endings in _grouped((m._settler, m._unconfirmed() or [m._done()]) for m in self._open()):  # noqa: SLF001
            await settler.asettle(endings)

    async def anack(self, delay: Duration | None = None) -> None:
        """Awaitable form of `nack`."""
        for settler, endings in _grouped((m._settler, m._unconfirmed() or [m._nacked(delay)]) for m in self._open()):  # noqa: SLF001
            await settler.asettle(endings)

    def __enter__(self) -> list[T]:
        if self and self[0]._settler.is_async:  # noqa: SLF001
            self[0]._settler.refuse_block()  # noqa: SLF001
        self._begin_handling()
        return self.bodies

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._end_handling()
        for settler, endings in self._endings(error):
            settler.settle_soon(endings)
        return bool(self) and self[0]._stops(error)  # noqa: SLF001

    async def __aenter__(self) -> list[T]:
        self._begin_handling()
        return self.bodies

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._end_handling()
        for settler, endings in self._endings(error):
            await settler.asettle_soon(endings)
        return bool(self) and self[0]._stops(error)  # noqa: SLF001

    def _begin_handling(self) -> None:
        if self:
            self[0]._begin_handling()  # noqa: SLF001

    def _end_handling(self) -> None:
        if self:
            self[0]._end_handling()  # noqa: SLF001

    def _open(self) -> list[Message[T]]:
        return [one for one in self if not one._leased.settled or one._unconfirmed()]  # noqa: SLF001

    def _endings(self, error: BaseException | None) -> list[tuple[Settler, list[Ending]]]:
        # Newest first, so that what is handed back to the front keeps its order. One traceback says it for all.
        return _grouped(
            (message._settler, message._endings(error, log=number == 0))  # noqa: SLF001
            for number, message in enumerate(reversed(self._open()))
        )


def _grouped(endings: Iterable[tuple[Settler, list[Ending]]]) -> list[tuple[Settler, list[Ending]]]:
    """Return the endings of each settler. A message that was extended has a settler of its own."""
    by_settler: dict[int, tuple[Settler, list[Ending]]] = {}
    for settler, several in endings:
        by_settler.setdefault(id(settler), (settler, []))[1].extend(several)
    return [one for one in by_settler.values() if one[1]]


def success(leased: LeasedMessage) -> Settlement:
    """Return the settlement of a message that succeeded; there is nothing to decide."""
    return Settlement("D", leased.id, attributes=leased.envelope.attributes, own_id=leased.envelope.own_id)


def _lease(duration: Duration) -> int:
    ms = milliseconds(duration, name="duration")
    if ms < 1:
        raise ConfigurationError("extend() needs a duration greater than zero. Use release() to give a message back.")
    return ms


def _brief(error: BaseException, hide: Hide | None) -> str:
    text = failures.message(error)
    return clean(f"{failures.type_name(error)}: {text if hide is None else hide(text)}")


def lost(queue: str, leased: Iterable[LeasedMessage]) -> LeaseLost:
    """Return the error for messages whose end was refused."""
    ids = ", ".join(public(queue, one.id) for one in leased)
    return LeaseLost(f"The lease was lost, so another consumer may run {ids}. Nothing was changed.")
