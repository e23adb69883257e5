"""The blocking consumer: an identity at each partition of a queue, and one wait for all."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.list_mover import ListMover
from conveyor.messaging.consumer.renewal import LeaseRenewer, by_endpoint, renew_until_settled
from conveyor.messaging.consumer.settling import (
    ConsumerSources,
    ConsumerState,
    PartitionSource,
    SettlerState,
    by_arrival,
    log_not_left,
    loop_of_parent,
)
from conveyor.messaging.consumer.steps import LookStep, Program, TurnStep, WaitStep
from conveyor.messaging.leases import LeasedMessage, LeaseSession, holds_all, settle_all
from conveyor.messaging.message import Batch, Ending, Message, OnError
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.client.outages import FIRST_TRY
from conveyor.store.script import Call, Run, drive, drive_steps
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.wakeup import WakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")
LONGEST_END = 2.0
"""Seconds for which a consumer that ends waits for the answers to the calls that wait for tokens."""


class BlockingSettler(SettlerState):
    """Settles leased messages by blocking calls. The awaitable forms use a thread."""

    def __init__(
        self, client: Client, session: LeaseSession, policy: SettlementPolicy, on_error: OnError, run: Run
    ) -> None:
        super().__init__(client, session, policy, on_error)
        self._run = self._first_try = run
        self._lock = threading.Lock()  # one turn of an identity in flight

    def forked(self) -> None:
        """Forget in a child that a thread of the parent makes a turn: it may settle what was pulled."""
        super().forked()
        self._lock = threading.Lock()

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        self.client.refuse_in_loop()
        settle_all(endings)
        with self._lock:
            drive(self.confirm(endings), self._run)
        self.report_refused(endings)

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn if one follows at once. Here none does."""
        self.settle(endings)

    def extend(self, leased: LeasedMessage, ms: int) -> None:
        """Move one message to an identity of its own."""
        self.client.refuse_in_loop()
        with self._lock:
            drive(self.move(leased, ms), self._run)

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Awaitable form of `settle`."""
        await asyncio.to_thread(self.settle, endings)

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Awaitable form of `settle_soon`."""
        await asyncio.to_thread(self.settle_soon, endings)

    async def aextend(self, leased: LeasedMessage, ms: int) -> None:
        """Awaitable form of `extend`."""
        await asyncio.to_thread(self.extend, leased, ms)

    def turn(self, want: int = 0, *, leave: bool = False, brief: bool = False, deadline: float | None = None) -> bool:
        """
        Make one turn and the calls that its reply asks for. Return False when none was made.

        *brief*: hardly repeat it. *deadline* (monotonic): when it must be done.
        """
        with self._lock:
            if self._has_left:
                return False  # a thread that renews comes late: it must not register anew
            run = partial(self._first_try if brief else self._run, deadline=deadline)
            drive(self.session.turn(want, leave=leave), run)
            if self.session.take_new_queue():
                self.client.announce_again(self.session.keys)
            self._has_left = leave and not self.session.transient and not self.session.held
        if self.session.take_outbox():
            drive_steps(self.deliver_outbox())
        return True

    @property
    def is_busy(self) -> bool:
        """True while a call is under way, of any thread."""
        return self._lock.locked()

    def flush(self) -> bool:
        """Make a turn that leases nothing; return False when one is under way, or Redis is away."""
        if self.is_busy or self.is_away:
            return False
        try:
            made = self.turn(brief=True)
        except StoreUnavailable:
            self.note_away()
            return False
        except ConveyorError:
            return False
        self.report_refused()
        return made


class PartitionSettler(BlockingSettler):
    """Settles the messages of one partition with the turns that its consumer makes anyway."""

    def __init__(self, consumer: Consumer[Any], source: PartitionSource[Any], on_error: OnError, run: Run) -> None:
        super().__init__(consumer.client, source.session, source.policy, on_error, run)
        self._consumer = consumer

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        super().settle(endings)
        self._consumer.note_settled()

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn if the loop comes to it at once, else now."""
        if holds_all(self.session, endings):
            settle_all(endings)
            self._consumer.note_settled()
            if not self._consumer.comes_to(endings):
                self.flush()
        else:
            self.settle(endings)


def run_partitioned(
    partitions: Partitions, call: Call[Any], *, retry_for: float | None = None, deadline: float | None = None
) -> Any:
    """Carry out *call*; after Redis was emptied the number of *partitions* is agreed on anew."""
    return partitions.retry_agreed(lambda: partitions.client.run(call, retry_for=retry_for, deadline=deadline))


class Consumer(ConsumerState[T, BlockingSettler]):
    """
    Hands out the messages of queues, one or several at a time, and reports their ends with the next turn.

    A *transient* one serves a single `pull`. Connects when the first message is asked for.
    """

    def __init__(
        self, client: Client, sources: ConsumerSources[T], on_error: OnError, *, transient: bool = False
    ) -> None:
        self.client = client  # the settlers read it
        self._connection: Connection | None = None
        if not transient and sources.only is not None and sources.only.partitions is None:
            # A loop over a queue in one piece has a connection of its own, which saves the way through the pool. An intake
            # goes through the pool all the same: it is repeated by other rules.
            session = sources.only.session
            if session.intake is None:
                self._connection = Connection(client.endpoint(session.keys), client.timeout)
        # No turn follows a pull by itself, so its messages are settled at once; they outlive this consumer.
        settlers = [
            BlockingSettler(client, source.session, source.policy, on_error, self._run_for(source))
            if transient
            else PartitionSettler(self, source, on_error, self._run_for(source))
            for source in sources.all
        ]
        super().__init__(client, sources, settlers)
        self._waiters: WakeupWaiters | None = None
        self._renewer: LeaseRenewer | None = None
        self._movers: list[ListMover] | None = None
        self._latest: Sequence[LeasedMessage] = ()
        self._is_idle = False
        self._settled = SignalSafeEvent()

    # -- what the queue hands out -----------------------------------------------------------------------------------

    def loop(
        self, program: Callable[[], Program[Any]], as_batch: type[Batch[T]] | None = None
    ) -> Generator[Any, None, None]:
        """Yield without end what each *program* returns: one message, or a list of them *as_batch*."""
        try:
            with self:
                while True:
                    if self.settlers[0].is_of_parent:
                        raise loop_of_parent()
                    try:
                        found = self._follow(program())
                    except KeyboardInterrupt as stop:
                        raise stop.with_traceback(None) from None  # how a loop ends: no need to show where it waited
                    if as_batch is None:
                        self._latest = (found._leased,)  # noqa: SLF001
                        yield found
                    else:
                        self._latest = [message._leased for message in found]  # noqa: SLF001
                        yield as_batch(found)
        finally:
            self._renew_no_more()

    def pull(self, count: int, wait: float, *, renew: bool = False) -> list[Message[T]]:
        """
        Return up to *count* messages as soon as there is one, or none after *wait* seconds.

        *renew*: their leases are renewed until they are settled.
        """
        self._deadline = self.client.deadline(wait)
        self._agree(look=True)
        try:
            pulled = self._follow(self._programs.pull(count, wait), patient=False)
            self._stop_waiting()
            if renew and pulled:
                renew_until_settled(self.client, self.settlers)
            if self._sources.several_queues:
                pulled = by_arrival(pulled)
            return pulled or self.settlers[0].nothing_from(self.settlers)
        except BaseException as stop:  # what was leased has not been handed out
            try:
                if not isinstance(stop, StoreUnavailable):
                    self._take_back()
                elif self._only_session is None:  # others may have given messages
                    self._take_back(answered_only=True)
            finally:
                self._stop_waiting()
            if isinstance(stop, KeyboardInterrupt):
                raise stop.with_traceback(None) from None  # no need to show where it waited
            raise

    # -- for the settlers ---------------------------------------------------------------------------------------------

    def note_settled(self) -> None:
        """Note that a held message has been settled. A loop that is not idle looks by itself before it waits."""
        if self._is_idle and not self._settled.is_set():
            self._settled.set()

    def comes_to(self, endings: Sequence[Ending]) -> bool:
        """Tell whether the loop's next turn reports these ends: those of what it handed out last."""
        # The order matters: entered first, then looked, as the loop first says that it waits and then looks.
        latest = self._latest
        return not self._is_idle and all(leased in latest for leased, _ in endings)

    @property
    def is_idle(self) -> bool:
        """True while the loop waits for work."""
        return self._is_idle

    # -- driving ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Consumer[T]:
        self._agree()
        self._renewer = LeaseRenewer(self.client, self.settlers)
        return self

    def _renew_no_more(self) -> None:
        """Stop the renewer, also where a signal handler raised as the loop ended: what is leased returns with its lease."""
        if self._renewer is not None:
            self._renewer.stop()

    def __exit__(self, *_: object) -> None:
        self._renew_no_more()
        if self.settlers[0].is_of_parent:
            return  # the parent goes on with it
        self._stop_waiting()
        try:
            self._leave_all()
        except KeyboardInterrupt as stop:
            raise stop.with_traceback(None) from None  # pressed twice: what was leased returns when the lease ends
        finally:
            connection, self._connection = self._connection, None
            if connection is not None and self.settlers[0].is_busy:
                connection.interrupt()  # that call is repeated on a new socket
            elif connection is not None:
                connection.close()

    def _agree(self, *, look: bool = False) -> None:
        for partitions in self._sources.partitions:
            if look:
                partitions.compare()
            else:
                partitions.agree()

    def _run_for(self, source: PartitionSource[T]) -> Callable[..., Any]:
        """Return what carries out the calls at *source*."""
        if source.partitions is not None:
            return partial(run_partitioned, source.partitions)
        return self.client.run_once if self._connection is None else self._run_own

    def _run_own(self, call: Call[Any], *, deadline: float | None = None) -> Any:
        connection = self._connection  # read once: the loop may end while another thread settles
        # An extended message outlives its consumer; a forked child has no part in the connection of its parent.
        if connection is None or self.settlers[0].is_of_parent:
            return self.client.run_once(call, deadline=deadline)
        return connection.run(call, retry_for=self.client.retry_for, deadline=deadline)

    def _take_back(self, *, answered_only: bool = False) -> None:
        """Give back what was pulled and not handed out; *answered_only*: where Redis has answered before it did not."""
        for settler in self.settlers:
            settler.note_not_handed_out()
        self._leave_all(answered_only=answered_only)

    def _leave_all(self, *, answered_only: bool = False) -> None:
        """Give everything back, and take the registrations away."""
        # The time of a pull may be over, and what answers gets a moment all the same.
        deadline = max(self._deadline or 0.0, time.monotonic() + FIRST_TRY) if answered_only else None
        for step in self._programs.leave():
            if not isinstance(step, TurnStep) or (answered_only and not self.settlers[step.at].has_answered):
                continue
            has_left = self._leave(step, deadline)
            if answered_only and not has_left and self.client.has_one_endpoint:
                return

    def _leave(self, step: TurnStep, deadline: float | None) -> bool:
        settler = self.settlers[step.at]
        try:
            settler.refuse_away()
            settler.turn(step.want, leave=step.leave, deadline=deadline)
            settler.report_refused()
        except ConveyorError as error:
            log_not_left(settler.session, error)
            return False
        return True

    def _follow(self, program: Program[V], *, patient: bool = True) -> V:
        try:
            while True:
                step = next(program)
                heard = self._waiters.heard() if self._waiters is not None else ()
                for at in heard:
                    self._programs.woken(at)
                if isinstance(step, WaitStep):
                    if not heard:  # else a token came as the program decided to wait
                        self._wait(step)
                elif isinstance(step, LookStep):
                    found = self.client.run(self._sources.find_work(step.ats))
                    for at, due_in in zip(step.ats, found, strict=True):
                        self._programs.looked(at, due_in)
                elif patient:
                    self._turn(step)
                else:
                    self._turn_once(step)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _turn_once(self, step: TurnStep) -> None:
        """Make a turn of a pull; leave its partition out where the server is away and others are not."""
        settler = self.settlers[step.at]
        try:
            settler.turn(step.want, leave=step.leave, brief=step.want > 0, deadline=self._deadline)
        except StoreUnavailable:
            if not step.want or not settler.note_away():
                raise
        else:
            settler.report_refused()

    def _turn(self, step: TurnStep) -> None:
        settler = self.settlers[step.at]
        session = settler.session
        while True:
            try:
                settler.turn(step.want, leave=step.leave, brief=not step.must)
            except StoreUnavailable as error:
                if not step.must and settler.note_away():
                    return
                time.sleep(self._outage.failed(session, error))
                if not step.must:
                    return
                continue
            if self._outage.failures:
                self._outage.answered(session)
            if session.refused or session.reaped or session.missing:
                settler.report_refused()
            return

    def _wait(self, step: WaitStep) -> None:
        self._set_idle(True)
        try:
            self._settled.clear()  # before the look: what is settled from now on is noted
            for settler in self.settlers:
                if settler.session.pending:  # another thread settled something meanwhile
                    if self._only_session is not None:
                        return  # the turn that follows takes it along
                    settler.flush()
            if step.full:
                self._settled.wait(step.seconds)
                return
            if self._movers is None:
                lists = [one.session.keys for one in self._sources.all if one.session.keys.foreign is not None]
                self._movers = [ListMover(self.client, keys) for keys in lists]
            seconds = min([step.seconds, *(mover.begin(step.seconds) for mover in self._movers)])
            self._waiters = self._waiters or WakeupWaiters(self)
            for at in self._waiters.wait(seconds):
                self._programs.woken(at)
        finally:
            for mover in self._movers or ():
                mover.end()
            self._set_idle(False)

    def _stop_waiting(self) -> None:
        """Wait no longer; put back the tokens of partitions that were not looked at, so that others who wait there are woken."""
        for mover in self._movers or ():
            mover.stop()
        for at in self._waiters.end() if self._waiters is not None else ():
            self._programs.woken(at)
        self._waiters = self._movers = None  # last, so that what was interrupted is done again
        for at in self._programs.unspent():
            with suppress(ConveyorError):  # a lost token costs seconds, never a message
                self.client.run(operations.wake(self.settlers[at].session.keys.wake), retry_for=0)

    def _set_idle(self, idle: bool) -> None:
        self._is_idle = idle
        if self._renewer is not None:
            self._renewer.idle = idle


class WakeupWaiters:
    """
    Waits for a token at any partition: one blocked connection for each endpoint they lie at.

    A single endpoint is waited at by the consumer's own thread. Of several each has a thread; one that hears a token
    while the consumer is busy makes a turn without taking anything, which wakes the next idle consumer.
    """

    def __init__(self, consumer: Consumer[Any]) -> None:
        self._consumer = consumer
        self._waiters: list[_EndpointWaiter] | None = None
        self._heard: SimpleQueue[int] = SimpleQueue()

    def wait(self, seconds: float) -> list[int]:
        """Wait up to *seconds*; return the partitions whose tokens were taken."""
        if self._waiters is None:
            settlers = list(enumerate(self._consumer.settlers))
            groups = by_endpoint(self._consumer.client, settlers, lambda one: one[1].session.keys)
            self._waiters = [_EndpointWaiter(self._consumer, dict(group), self._heard) for group in groups]
        if len(self._waiters) == 1:
            at = self._waiters[0].wait(seconds)
            return [] if at is None else [at]
        until = time.monotonic() + seconds
        for waiter in self._waiters:
            waiter.begin(until)
        try:
            return [self._heard.get(timeout=seconds), *self.heard()]
        except Empty:
            return []

    def heard(self) -> list[int]:
        """Return the partitions whose tokens were taken meanwhile."""
        heard: list[int] = []
        while not self._heard.empty():
            heard.append(self._heard.get())
        return heard

    def end(self) -> list[int]:
        """Wait no longer; return the partitions whose tokens were taken meanwhile."""
        waiters, deadline = self._waiters or [], time.monotonic() + LONGEST_END
        for waiter in waiters:
            waiter.end(deadline)
        for waiter in waiters:
            waiter.join(deadline)
        self._waiters = None
        return self.heard()


class _EndpointWaiter:
    """
    Waits at one endpoint for *settlers*, the partitions there: by a call, or from a thread.

    The call of a thread also waits for an element in a list of its own. It is ended by one, and its answer read: a server
    that has not noticed yet that a connection was closed would give it a token that others wait for.
    """

    def __init__(self, consumer: Consumer[Any], settlers: dict[int, BlockingSettler], heard: SimpleQueue[int]) -> None:
        self._consumer, self._settlers, self._heard = consumer, settlers, heard
        self._partition_of = {settler.session.keys.wake: at for at, settler in settlers.items()}
        self._first = next(iter(settlers.values()))
        session = self._first.session
        self._own = session.keys.wake_of(session.worker)
        self._waiter = WakeupWaiter(consumer.client.endpoint(session.keys), consumer.client.timeout)
        self._begin: SimpleQueue[None] = SimpleQueue()
        self._until = 0.0
        self._is_waiting = self._has_ended = self._is_called = False
        self._thread: threading.Thread | None = None

    def wait(self, seconds: float) -> int | None:
        """Wait here and now; return the partition whose token was taken, None when none came."""
        key = self._waiter.wait_any(list(self._partition_of), seconds)
        return None if key is None else self._partition_of[key]

    def begin(self, until: float) -> None:
        """Wait in the background until an instant (monotonic), also where a wait is under way and would end before."""
        self._until = until
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="conveyor-waiter", daemon=True)
            self._thread.start()
        self._begin.put(None)

    def end(self, deadline: float) -> None:
        """Tell the thread to end; where its server has not answered by *deadline* (monotonic), its connection is closed."""
        self._has_ended = True
        if self._is_waiting:
            self._is_called = True
            try:
                self._run(operations.wake(self._own), deadline)
            except ConveyorError:
                self._is_called = False
                self._waiter.end()
        self._begin.put(None)

    def join(self, deadline: float) -> None:
        """Wait until *deadline* for the end of the thread, and close the connection."""
        if self._thread is None:
            self._waiter.close()
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self._waiter.end()
        if self._is_called:  # the call had ended by itself
            with suppress(ConveyorError):
                self._run(operations.delete_key(self._own), deadline)

    def _run(self, call: Call[Any], deadline: float) -> None:
        if self._first.is_away or time.monotonic() >= deadline:
            raise StoreUnavailable("The server does not answer.")
        self._consumer.client.run(call, retry_for=FIRST_TRY, deadline=deadline)

    def _listen(self) -> None:
        while not self._has_ended:
            self._begin.get()
            self._is_waiting = True  # first, and then the look: `end` first says that it ends, and then looks
            # Again where the connection broke: the consumer begins anew only when its own wait is over.
            while not self._has_ended and (seconds := self._until - time.monotonic()) > 0:
                try:
                    key = self._waiter.wait_any([self._own, *self._partition_of], seconds)
                except ConveyorError as error:
                    logger.warning("Waiting for messages was refused: %s", error)
                    time.sleep(min(1.0, seconds))
                    break
                if key is not None:
                    self._hear(key)
                    break
            self._is_waiting = False
        self._waiter.close()

    def _hear(self, key: str) -> None:
        """Act on what a call has taken."""
        while not self._begin.empty():
            self._begin.get()  # the consumer is awake now, and begins anew
        if key == self._own:
            self._is_called = False
            return
        at = self._partition_of[key]
        self._heard.put(at)
        if not (self._consumer.is_idle or self._has_ended):
            self._settlers[at].flush()
