"""The state of a settler, and the log of an outage, shared by both consumers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from random import randrange
from typing import Any, Generic, TypeVar, cast

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError, LeaseLost, StoreUnavailable
from conveyor.messaging import outbox
from conveyor.messaging.consumer.partition_steps import PartitionRoundRobin, QueueShares
from conveyor.messaging.consumer.steps import ConsumerSteps, Program
from conveyor.messaging.decoder import MessageDecoder
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.message import Ending, Message, OnError, Settler, lost
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.failures import FailureLog
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.client.outages import FIRST_TRY
from conveyor.store.fork_safety import on_fork
from conveyor.store.operations import Settlement
from conveyor.store.script import Call, CallProgram, StepProgram
from conveyor.store.transport import eviction

T = TypeVar("T")
S = TypeVar("S", bound="SettlerState")
logger = logging.getLogger("conveyor.queue")


class PartitionSource(msgspec.Struct, Generic[T], frozen=True):
    """A queue or partition as a consumer needs it: new session, policy, decoder."""

    session: LeaseSession
    policy: SettlementPolicy
    decoder: MessageDecoder[T]
    partitions: Partitions | None = None
    """Those of its queue, of which it is one; None for a queue in one piece."""

    def steps(self, settler: Settler) -> ConsumerSteps[Message[T]]:
        """Return the programs that take messages from here; *settler* carries out how they end."""
        return ConsumerSteps(self.session, self.policy, partial(self.decoder.message, settler=settler))


class ConsumerSources(Generic[T]):
    """The partitions that a consumer takes from: those of one queue, or of several whose *shares* divide the turns."""

    def __init__(self, *queues: Sequence[PartitionSource[T]], shares: QueueShares | None = None) -> None:
        self.all = [source for sources in queues for source in sources]
        self.several_queues = len(queues) > 1
        self._queue_of = [number for number, sources in enumerate(queues) for _ in sources]
        self._shares = shares

    @property
    def partitions(self) -> list[Partitions]:
        """The partitions of each queue that has several; their number must be agreed on."""
        return list({id(one.partitions): one.partitions for one in self.all if one.partitions is not None}.values())

    @property
    def only(self) -> PartitionSource[T] | None:
        """The source when there is a single one."""
        return self.all[0] if len(self.all) == 1 else None

    def programs(
        self, settlers: Sequence[Settler], is_away: Callable[[int], bool], *, looks: bool
    ) -> ConsumerSteps[Message[T]] | PartitionRoundRobin[Message[T]]:
        """Return the programs of the only source, or a round over all that begins at a random one."""
        steps = [one.steps(settler) for one, settler in zip(self.all, settlers, strict=True)]
        if len(steps) == 1:
            return steps[0]
        first = randrange(len(steps))  # noqa: S311
        return PartitionRoundRobin(
            steps, first, queue_of=self._queue_of, shares=self._shares, looks=looks, is_away=is_away
        )

    def find_work(self, ats: Sequence[int]) -> Call[list[float | None]]:
        """Return the call that finds those of the partitions *ats* at which a turn would find something."""
        sessions = [self.all[at].session for at in ats]
        return operations.find_work([(one.keys, one.lease_ms) for one in sessions])


def by_arrival(messages: list[Message[T]]) -> list[Message[T]]:
    """Return messages of several queues in the order in which they were pushed or came due; each queue keeps its own."""
    latest: dict[int, int] = {}  # of each partition that gave some
    arrivals: list[int] = []
    for message in messages:
        leased = message._leased  # noqa: SLF001
        place, arrived = id(leased.session), leased.envelope.due_ms or ids.made_at_ms(leased.id) or 0
        latest[place] = max(arrived, latest.get(place, 0))
        arrivals.append(latest[place])
    order = sorted(range(len(messages)), key=arrivals.__getitem__)
    return [messages[at] for at in order]


class SettlerState:
    """The leases of one identity and the policy for their ends, shared by both settlers."""

    is_async = False
    """True where an event loop carries out the ends."""

    def refuse_block(self) -> None:
        """Raise ConfigurationError (E06) where a block without `async` could not end; nowhere, unless `is_async`."""

    def __init__(self, client: Client, session: LeaseSession, policy: SettlementPolicy, on_error: OnError) -> None:
        self.client = client
        self.is_of_parent = False
        self.session = session
        self.policy = policy
        self.on_error: OnError = on_error
        self.failure_log = FailureLog(logger)
        self._has_left = False
        self._first_try: Any = None
        self._can_be_away = False
        on_fork(self)

    def forked(self) -> None:
        """Belong to the parent from now on, in a child."""
        self.is_of_parent = True

    # -- a server that is away ------------------------------------------------------------------------------------

    def leave_out(self, first_try: Any) -> None:
        """Leave this partition out while its server is away, as others go on; *first_try* hardly repeats a call."""
        self._first_try, self._can_be_away = first_try, True

    @property
    def is_away(self) -> bool:
        """True while the server of this partition is away, and others go on."""
        return self._can_be_away and self.client.is_away(self.session.keys)

    def note_away(self) -> bool:
        """Note that the server did not answer; return False where there are no others that go on."""
        return self._can_be_away and self.client.note_away(self.session.keys)

    def refuse_away(self) -> None:
        """Raise StoreUnavailable while the server is away."""
        if self.is_away:
            raise StoreUnavailable(f"The server of '{self.session.keys.queue}' does not answer.")

    def deliver_outbox(self) -> StepProgram:
        """Deliver what a turn has found in the outbox of the queue: copies of published messages, for other queues."""
        directory, keys = self.session.directory, self.session.keys
        if directory is None:
            return
        try:
            while (yield from outbox.deliver(directory, keys, retry_for=FIRST_TRY)):
                pass
        except ConveyorError as error:
            logger.warning("Queue %s: its outbox is not delivered yet, trying again: %s", keys.queue, error)

    def note_not_handed_out(self) -> None:
        """Note that no message that is held was handed out, so that it goes back as if it had not been leased."""
        for leased in self.session.held.values():
            leased.started = False

    @property
    def has_answered(self) -> bool:
        """True when it holds messages, or was registered before an intake, which is not repeated, failed."""
        return bool(self.session.held) or (self.session.registered and self.session.intake is not None)

    def nothing_from(self, settlers: Sequence[SettlerState]) -> list[Any]:
        """Return no messages; raise StoreUnavailable when the servers of all partitions are away."""
        if all(settler.is_away for settler in settlers):
            queues = ", ".join(dict.fromkeys(f"'{ids.logical(one.session.keys.queue)}'" for one in settlers))
            raise StoreUnavailable(f"No server of the partitions of {queues} answers. Nothing was pulled.")
        return []

    def is_cancelled(self, leased: LeasedMessage) -> bool:
        """Tell whether somebody asked to cancel the message while we hold it."""
        return leased.id in leased.session.cancelled

    def confirm(self, endings: Sequence[Ending]) -> CallProgram[None]:
        """Make the turns that report *endings*, wherever their messages are held now, unless another has."""
        for leased, settlement in endings:
            if settlement is leased.ending and not leased.lost:
                leased.session.settle(leased, settlement)
            while not (leased.lost or leased.confirmed) and leased.session.owes(leased):
                if self._has_left and leased.session is self.session:
                    leased.lost = True  # what it held was handed back
                    break
                yield from leased.session.turn()
        if self.session.has_moved:  # a caller that was cancelled may have left its empty identity behind
            yield from self.session.finish_extensions()

    def move(self, leased: LeasedMessage, ms: int) -> CallProgram[None]:
        """Move one message to an identity of its own. One that was settled meanwhile needs no lease any more."""
        if leased.ending is not None:
            yield from self.confirm([(leased, leased.ending)])
        elif not leased.lost:
            yield from leased.session.finish_extensions()
            if not leased.lost:
                yield from leased.session.extend(leased, ms)
        if leased.lost:
            raise lost(self.session.keys.queue, [leased])

    def report_refused(self, asked: Sequence[Ending] = ()) -> None:
        """Log what was refused without anybody asking; raise LeaseLost for what was asked."""
        known = [leased for leased, _ in asked]
        self._log_refused(self.session, known)
        for leased in known:
            if leased.session is not self.session:
                self._log_refused(leased.session, known)
        if gone := [leased for leased in known if leased.lost]:
            raise lost(self.session.keys.queue, gone)
        if other := [leased for leased, ending in asked if _ended_otherwise(leased, ending)]:
            names = ", ".join(ids.public(self.session.keys.queue, leased.id) for leased in other)
            raise LeaseLost(f"Another thread has settled {names} in another way meanwhile. Nothing was changed.")

    @staticmethod
    def _log_refused(session: LeaseSession, known: Sequence[LeasedMessage]) -> None:
        refused, session.refused = session.refused, []
        for leased in refused:
            if not any(leased is one for one in known):
                logger.warning(
                    "Message %s: its end was refused, because its lease had been lost; it runs again.",
                    ids.public(session.keys.queue, leased.id),
                )
        reaped, session.reaped = session.reaped, 0
        if reaped:
            logger.warning("Queue %s: %d messages of a dead consumer were returned.", session.keys.queue, reaped)
        missing, session.missing = session.missing, []
        if missing:
            eviction.log_missing_jobs(logger, session.keys.queue, missing)


class ConsumerState(Generic[T, S]):
    """The part of a consumer that is the same whether it blocks or is awaited: its sources, their settlers and programs."""

    def __init__(self, client: Client, sources: ConsumerSources[T], settlers: Sequence[S]) -> None:
        """*settlers*: one for each of the sources, in their order."""
        self.client, self._sources, self.settlers = client, sources, settlers
        self._only_session = sources.only.session if sources.only is not None else None
        if self._only_session is None and not client.has_one_endpoint:
            for source, settler in zip(sources.all, settlers, strict=True):
                settler.leave_out(partial(self._run_for(source), retry_for=FIRST_TRY))
        self._programs = sources.programs(
            cast("Sequence[Settler]", settlers), lambda at: settlers[at].is_away, looks=client.has_one_endpoint
        )
        self._outage = OutageLog(client)
        self._deadline: float | None = None  # of a pull (monotonic)

    def _run_for(self, source: PartitionSource[T]) -> Callable[..., Any]:
        """Return what carries out the calls at *source*."""
        raise NotImplementedError

    def fetching(self, prefetch: int) -> Callable[[], Program[Message[T]]]:
        """Return what begins a program that returns the next message."""
        return partial(self._programs.fetch, prefetch)

    def gathering(self, size: int, within: float) -> Callable[[], Program[list[Message[T]]]]:
        """Return what begins a program that returns the next batch: of *size*, or what came *within* seconds of the first."""
        return partial(self._programs.gather, size, within)


class OutageLog:
    """Counts failed turns in a row. Logs an outage once when it begins and once when it is over."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.failures = 0
        self._logged = False

    def failed(self, session: LeaseSession, error: StoreUnavailable) -> float:
        """Note that a turn failed; return the seconds to pause before the next."""
        self.failures += 1
        # The first failure says little where calls are hardly repeated: an intake never is.
        patient = self._client.retry_for >= 1 and session.intake is None
        if not self._logged and (patient or self.failures >= 2):
            self._logged = True
            logger.warning("Queue %s: waiting for Redis. %s", session.keys.queue, error)
        return min(1.0, 0.05 * self.failures)

    def answered(self, session: LeaseSession) -> None:
        """Note that a turn was answered."""
        self.failures = 0
        if self._logged:
            self._logged = False
            logger.warning("Queue %s: Redis answers again.", session.keys.queue)


def log_not_left(session: LeaseSession, error: Exception) -> None:
    """Log that what *session* holds could not be given back."""
    if session.registered:
        logger.warning("Queue %s: leased messages return when their lease ends: %s", session.keys.queue, error)


def _ended_otherwise(leased: LeasedMessage, ending: Settlement) -> bool:
    decided = leased.ending
    return not (decided is ending or decided is None or ending.stays or decided.kind == ending.kind)


def loop_of_parent() -> ConfigurationError:
    """Return the error for a loop that goes on in a forked child."""
    return ConfigurationError(
        "A loop over messages goes on in a forked child, and belongs to the process that began it: so do its messages. Nothing "
        "was done. Leave the child with os._exit, or begin a loop there: consume()."
    )
