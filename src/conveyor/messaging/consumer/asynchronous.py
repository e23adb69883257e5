"""The awaitable consumer: an identity at each partition of a queue, and one wait for all."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from conveyor.errors import ConfigurationError, ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.blocking import LONGEST_END
from conveyor.messaging.consumer.list_mover import AsyncListMover
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
from conveyor.messaging.message import Ending, Message, OnError
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store import operations
from conveyor.store.client.batching import LoopConnections
from conveyor.store.client.client import Client
from conveyor.store.client.outages import FIRST_TRY
from conveyor.store.script import AsyncRun, Call, adrive, adrive_steps, drive
from conveyor.store.transport.wakeup import AsyncWakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")
LONGEST_LEAVE = 1.0
"""Seconds for which a cancelled pull waits until what it leased is handed back. Where Redis is away that goes on behind it."""
LOOK_AT_LOOP = 0.1
"""Seconds between two looks of a thread whether the event loop that settles its message has ended."""
_LEAVING: set[asyncio.Task[None]] = set()
"""The tasks that hand back what cancelled pulls had leased."""


def begin_through(work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """
    Return a task that carries out *work*, which may be repeated.

    A loop that closes cancels each of its tasks once and then waits for them, so *work* begins again when it is cancelled.
    """

    async def twice() -> None:
        try:
            await work()
        except asyncio.CancelledError:
            async with asyncio.timeout(LONGEST_LEAVE):
                await work()

    task = asyncio.get_running_loop().create_task(twice())
    _LEAVING.add(task)
    task.add_done_callback(_LEAVING.discard)
    return task


async def see_through(work: Callable[[], Awaitable[None]], seconds: float | None = LONGEST_LEAVE) -> None:
    """Carry out *work* as `begin_through` does, also where the caller is cancelled (again), and wait for it up to *seconds*."""
    await asyncio.wait([begin_through(work)], timeout=seconds)


class AsyncSettler(SettlerState):
    """Settles by awaitable calls on one event loop. The blocking forms work from other threads."""

    is_async = True

    def __init__(
        self, client: Client, session: LeaseSession, policy: SettlementPolicy, on_error: OnError, run: AsyncRun
    ) -> None:
        super().__init__(client, session, policy, on_error)
        self._run = self._first_try = run
        self._lock = asyncio.Lock()  # one turn of an identity in flight
        self._loop = asyncio.get_running_loop()
        self._lock_after_loop = threading.Lock()
        self._flushing: asyncio.Task[None] | None = None

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        settle_all(endings)
        await self._drive(self.confirm(endings))
        self.report_refused(endings)

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn if one follows at once. Here none does."""
        await self.asettle(endings)

    async def aextend(self, leased: LeasedMessage, ms: int) -> None:
        """Move one message to an identity of its own."""
        await self._drive(self.move(leased, ms))

    async def _drive(self, program: Generator[Call[Any], Any, None]) -> None:
        async with self._lock:
            await adrive(program, self._run)
        if self.session.bodies is not None:
            await self.session.bodies.fetch(self.session.waiting)

    def refuse_block(self) -> None:
        """Raise ConfigurationError (E06) for a block without `async` on the loop that took the message: its end would fail."""
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001  as below
            raise ConfigurationError(
                "`with message` was written on the event loop that took the message, and the end of the block would stop "
                "all of it. Nothing was done.\n    Write:  async with message as body",
                code="E06",
            )

    def _refuse_own_loop(self) -> None:
        """Raise ConfigurationError (E06) where a loop may not be blocked, or is the one that would do the work."""
        self.client.refuse_in_loop()
        if asyncio._get_running_loop() is self._loop:  # noqa: SLF001  the C function; get_running_loop raises instead
            raise ConfigurationError(
                "A blocking end of a message was asked for on the event loop that took it and would carry it out. Nothing "
                "was done. Write the awaitable form: aack, anack, adead, aextend.",
                code="E06",
            )

    def settle(self, endings: Sequence[Ending]) -> None:
        """Blocking form of `asettle`, for another thread."""
        self._refuse_own_loop()
        self._on_loop(partial(self.asettle, endings), partial(self._settle_after_loop, endings))

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Blocking form of `asettle_soon`, for another thread."""
        self._refuse_own_loop()
        self._on_loop(partial(self.asettle_soon, endings), partial(self._settle_after_loop, endings))

    def extend(self, leased: LeasedMessage, ms: int) -> None:
        """Blocking form of `aextend`, for another thread."""
        self._refuse_own_loop()
        self._on_loop(partial(self.aextend, leased, ms), lambda: drive(self.move(leased, ms), self.client.run_once))

    def _on_loop(self, work: Callable[[], Coroutine[Any, Any, None]], after: Callable[[], None]) -> None:
        """
        Carry out *work* on the event loop that took the messages, or *after* here where that has ended, also amid *work*.

        Raises StoreUnavailable where the loop does not run for as long as a call may take.
        """
        loop, deadline = self._loop, self.client.deadline(0.0) or math.inf
        if not loop.is_closed():
            coroutine = work()
            try:
                future = asyncio.run_coroutine_threadsafe(coroutine, loop)
            except RuntimeError:  # it was closed just now
                coroutine.close()
            else:
                while not loop.is_closed():
                    try:
                        return future.result(LOOK_AT_LOOP)
                    except TimeoutError:
                        is_stuck = not loop.is_running()
                    except CancelledError:  # a loop that ends cancels all that it runs, and is closed then
                        is_stuck = True
                        time.sleep(LOOK_AT_LOOP)
                    if is_stuck and time.monotonic() > deadline:
                        raise StoreUnavailable(
                            "The event loop that took the message does not carry out its end, which may not have been "
                            "reported. Call it again while the loop runs, or when it is closed."
                        )
                if future.done() and not future.cancelled():
                    return future.result()
                coroutine.close()  # where the loop had not begun it
        with self._lock_after_loop:
            after()
        return None

    def _settle_after_loop(self, endings: Sequence[Ending]) -> None:
        settle_all(endings)
        drive(self.confirm(endings), self.client.run_once)
        self.report_refused(endings)

    async def aturn(
        self, want: int = 0, *, leave: bool = False, brief: bool = False, deadline: float | None = None
    ) -> None:
        """Make one turn, with *brief* and *deadline* as in `BlockingSettler.turn`."""
        async with self._lock:
            if self._has_left:
                return
            run = partial(self._first_try if brief else self._run, deadline=deadline)
            await adrive(self.session.turn(want, leave=leave), run)
            if self.session.take_new_queue():
                await self.client.aannounce_again(self.session.keys)
            self._has_left = leave and not self.session.transient and not self.session.held
        if self.session.take_outbox():
            await adrive_steps(self.deliver_outbox())
        if self.session.bodies is not None:
            await self.session.bodies.fetch(self.session.waiting)

    def begin_flush(self) -> None:
        """Report what is pending, unless that is under way."""
        if self.session.pending and self._flushing is None and not self.is_away:
            self._flushing = self._loop.create_task(self._flush())

    def flush(self) -> bool:
        """Return False: turns belong to the loop, so the renewing thread makes none."""
        return False

    async def aflush(self) -> None:
        """Make a turn that leases nothing. Raises StoreUnavailable at once while the server is away."""
        self.refuse_away()
        try:
            await self.aturn(brief=True)
        except StoreUnavailable:
            self.note_away()
            raise
        self.report_refused()

    async def _flush(self) -> None:
        try:
            while self.session.pending:
                await self.aflush()
        except ConveyorError as error:
            logger.debug("Queue %s: an end leaves with a later turn: %s", self.session.keys.queue, error)
        finally:
            self._flushing = None


class AsyncPartitionSettler(AsyncSettler):
    """Settles the messages of one partition with the turns that its consumer makes anyway."""

    def __init__(
        self, consumer: AsyncConsumer[Any], source: PartitionSource[Any], on_error: OnError, run: AsyncRun
    ) -> None:
        super().__init__(consumer.client, source.session, source.policy, on_error, run)
        self._consumer = consumer

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        await super().asettle(endings)
        self._consumer.settled.set()

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn if the loop's body comes to it without waiting, else at once."""
        if holds_all(self.session, endings):
            settle_all(endings)
            self._consumer.settled.set()
            self._loop.call_soon(self.begin_flush)
        else:
            await self.asettle(endings)


async def arun_partitioned(
    partitions: Partitions, call: Call[Any], *, retry_for: float | None = None, deadline: float | None = None
) -> Any:
    """Awaitable form of `run_partitioned`."""
    return await partitions.aretry_agreed(lambda: partitions.client.arun(call, retry_for=retry_for, deadline=deadline))


class AsyncConsumer(ConsumerState[T, AsyncSettler]):
    """
    Hands out the messages of queues, one or several at a time. Belongs to the event loop it was made on.

    A *transient* one serves a single `pull`. Connects when the first message is asked for.
    """

    def __init__(
        self, client: Client, sources: ConsumerSources[T], on_error: OnError, *, transient: bool = False
    ) -> None:
        self.client = client  # the settlers read it
        # No turn follows a pull by itself, so its messages are settled at once; they outlive this consumer.
        settlers = [
            AsyncSettler(client, source.session, source.policy, on_error, self._run_for(source))
            if transient
            else AsyncPartitionSettler(self, source, on_error, self._run_for(source))
            for source in sources.all
        ]
        super().__init__(client, sources, settlers)
        self._waiters: AsyncWakeupWaiters | None = None
        self._renewer: LeaseRenewer | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._connections: LoopConnections | None = None
        """The connections of the event loop when the loop over messages began."""
        self._movers: list[AsyncListMover] | None = None
        self.is_idle = False
        self.settled = asyncio.Event()

    # -- what the queue hands out -----------------------------------------------------------------------------------

    async def next(self, program: Program[V]) -> V:
        """Return what a program of a loop returns. Raises ConfigurationError in a forked child."""
        if self.settlers[0].is_of_parent:
            raise loop_of_parent()
        try:
            return await self._follow(program)
        except asyncio.CancelledError as stop:
            raise stop.with_traceback(None) from None  # how ctrl-C ends a loop: no need to show where it waited

    async def pull(self, count: int, wait: float, *, renew: bool = False) -> list[Message[T]]:
        """
        Return up to *count* messages as soon as there is one, or none after *wait* seconds.

        *renew*: their leases are renewed until they are settled.
        """
        self._deadline = self.client.deadline(wait)
        await self._agree(look=True)
        try:
            pulled = await self._follow(self._programs.pull(count, wait), patient=False)
            await self._stop_waiting()
            if renew and pulled:
                renew_until_settled(self.client, self.settlers)
            if self._sources.several_queues:
                pulled = by_arrival(pulled)
            return pulled or self.settlers[0].nothing_from(self.settlers)
        except StoreUnavailable:  # where there are several, others may have given messages
            await see_through(partial(self._give_up, answered_only=True), None)
            raise
        except BaseException:  # cancelled, as by a timeout: what was leased has not been handed out
            await see_through(self._give_up)
            raise

    async def _give_up(self, *, answered_only: bool = False) -> None:
        if not answered_only or self._only_session is None:
            await self._take_back(answered_only=answered_only)
        await self._stop_waiting()

    # -- driving ------------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Begin a loop: agree on the number of partitions, and renew what will be leased."""
        self._connections = self.client.loop_connections()
        await self._agree()
        self._renewer = LeaseRenewer(self.client, self.settlers, slack=1.6)
        self._renewal = asyncio.get_running_loop().create_task(self._renew())

    async def end(self) -> None:
        """End a loop: give everything back, and take the registrations away. In a forked child the parent does that."""
        if self._renewer is not None:
            self._renewer.stop()
        if self.settlers[0].is_of_parent:
            return
        if self._renewal is not None:
            self._renewal.cancel()
        await see_through(self._go, None)

    async def _go(self) -> None:
        await self._stop_waiting()
        await self._leave_all()
        if self._connections is not None:
            self.client.close_reopened(self._connections)

    async def _agree(self, *, look: bool = False) -> None:
        for partitions in self._sources.partitions:
            await (partitions.acompare() if look else partitions.aagree())

    def _run_for(self, source: PartitionSource[T]) -> Callable[..., Awaitable[Any]]:
        """Return what carries out the calls at *source*."""
        if source.partitions is not None:
            return partial(arun_partitioned, source.partitions)
        return self.client.arun_once

    async def _take_back(self, *, answered_only: bool = False) -> None:
        """Give back what was pulled and not handed out; *answered_only*: where Redis has answered before it did not."""
        for settler in self.settlers:
            settler.note_not_handed_out()
        await self._leave_all(answered_only=answered_only)

    async def _leave_all(self, *, answered_only: bool = False) -> None:
        """Give everything back, and take the registrations away."""
        # The time of a pull may be over, and what answers gets a moment all the same.
        deadline = max(self._deadline or 0.0, time.monotonic() + FIRST_TRY) if answered_only else None
        for step in self._programs.leave():
            if not isinstance(step, TurnStep) or (answered_only and not self.settlers[step.at].has_answered):
                continue
            has_left = await self._leave(step, deadline)
            if answered_only and not has_left and self.client.has_one_endpoint:
                return

    async def _leave(self, step: TurnStep, deadline: float | None) -> bool:
        settler = self.settlers[step.at]
        try:
            settler.refuse_away()
            await settler.aturn(step.want, leave=step.leave, deadline=deadline)
            settler.report_refused()
        except ConveyorError as error:
            log_not_left(settler.session, error)
            return False
        return True

    async def _follow(self, program: Program[V], *, patient: bool = True) -> V:
        try:
            while True:
                step = next(program)
                heard = self._waiters.heard() if self._waiters is not None else ()
                for at in heard:
                    self._programs.woken(at)
                if isinstance(step, WaitStep):
                    if not heard:  # else a token came as the program decided to wait
                        await self._wait(step)
                elif isinstance(step, LookStep):
                    found = await self.client.arun(self._sources.find_work(step.ats))
                    for at, due_in in zip(step.ats, found, strict=True):
                        self._programs.looked(at, due_in)
                elif patient:
                    await self._turn(step)
                else:
                    await self._turn_once(step)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _turn_once(self, step: TurnStep) -> None:
        """Make a turn of a pull; leave its partition out where the server is away and others are not."""
        settler = self.settlers[step.at]
        try:
            await settler.aturn(step.want, leave=step.leave, brief=step.want > 0, deadline=self._deadline)
        except StoreUnavailable:
            if not step.want or not settler.note_away():
                raise
        else:
            settler.report_refused()

    async def _turn(self, step: TurnStep) -> None:
        settler = self.settlers[step.at]
        session = settler.session
        while True:
            try:
                await settler.aturn(step.want, leave=step.leave, brief=not step.must)
            except StoreUnavailable as error:
                if not step.must and settler.note_away():
                    return
                await asyncio.sleep(self._outage.failed(session, error))
                if not step.must:
                    return
                continue
            if self._outage.failures:
                self._outage.answered(session)
            if session.refused or session.reaped or session.missing:
                settler.report_refused()
            return

    async def _wait(self, step: WaitStep) -> None:
        self._set_idle(True)
        try:
            self.settled.clear()  # before the look: what is settled from now on is noted
            for settler in self.settlers:
                if settler.session.pending:  # settled meanwhile by another task
                    if self._only_session is not None:
                        return  # the turn that follows takes it along
                    settler.begin_flush()
            if step.full:
                try:
                    await asyncio.wait_for(self.settled.wait(), step.seconds)
                except TimeoutError:
                    pass
                return
            if self._movers is None:
                lists = [one.session.keys for one in self._sources.all if one.session.keys.foreign is not None]
                self._movers = [AsyncListMover(self.client, keys) for keys in lists]
            seconds = min([step.seconds, *(mover.begin(step.seconds) for mover in self._movers)])
            self._waiters = self._waiters or AsyncWakeupWaiters(self)
            for at in await self._waiters.wait(seconds):
                self._programs.woken(at)
        finally:
            for mover in self._movers or ():
                mover.end()
            self._set_idle(False)

    async def _stop_waiting(self) -> None:
        """Wait no longer; put back the tokens of partitions that were not looked at, so that others who wait there are woken."""
        for mover in self._movers or ():
            mover.stop()
        for at in await self._waiters.end() if self._waiters is not None else ():
            self._programs.woken(at)
        self._waiters = self._movers = None
        for at in self._programs.unspent():
            with suppress(ConveyorError):  # a lost token costs seconds, never a message
                await self.client.arun(operations.wake(self.settlers[at].session.keys.wake), retry_for=0)

    def _set_idle(self, idle: bool) -> None:
        self.is_idle = idle
        if self._renewer is not None:
            self._renewer.idle = idle

    async def _renew(self) -> None:
        """Make turns a few times a lease while the body runs. The threads cover a blocked loop."""
        lease = min(settler.session.lease_ms for settler in self.settlers) / 1000
        while True:
            await asyncio.sleep(lease / 8)
            for settler in self.settlers:
                session = settler.session
                if self.is_idle or not session.registered or session.clock() - session.renewed < lease / 4:
                    continue
                try:
                    await settler.aflush()
                except ConveyorError as error:
                    logger.debug("Queue %s: not renewed: %s", session.keys.queue, error)


class AsyncWakeupWaiters:
    """
    Waits for a token at any partition: one blocked connection and a task for each endpoint they lie at.

    Of several, one that hears a token while the consumer is busy makes a turn without taking anything, which wakes the next
    idle consumer.
    """

    def __init__(self, consumer: AsyncConsumer[Any]) -> None:
        self._consumer = consumer
        self._waiters: list[_AsyncEndpointWaiter] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._heard: list[int] = []
        self._has_heard = asyncio.Event()

    async def wait(self, seconds: float) -> list[int]:
        """Wait up to *seconds*; return the partitions whose tokens were taken."""
        if self._waiters is None:
            settlers = list(enumerate(self._consumer.settlers))
            groups = by_endpoint(self._consumer.client, settlers, lambda one: one[1].session.keys)
            self._waiters = [
                _AsyncEndpointWaiter(self._consumer, dict(group), self.hear, is_only=len(groups) == 1)
                for group in groups
            ]
        if self._heard:  # one came while an end was reported
            return self.heard()
        self._has_heard.clear()
        tasks = [waiter.begin(time.monotonic() + seconds) for waiter in self._waiters]
        if len(tasks) == 1:
            await asyncio.wait(tasks)  # cancelled, the task goes on, and `end` reads what it takes
            tasks[0].result()
        else:
            try:
                await asyncio.wait_for(self._has_heard.wait(), seconds)
            except TimeoutError:
                pass
        return self.heard()

    def hear(self, at: int) -> None:
        """Note that a token of partition *at* was taken."""
        self._heard.append(at)
        self._has_heard.set()

    def heard(self) -> list[int]:
        """Return the partitions whose tokens were taken meanwhile."""
        heard, self._heard = self._heard, []
        return heard

    async def end(self) -> list[int]:
        """Wait no longer; return the partitions whose tokens were taken meanwhile."""
        if self._ending is None:  # in a task of its own: none that is cancelled before its first step closes anything
            self._ending = begin_through(self._end_all)
        await asyncio.wait([self._ending])
        return self.heard()

    async def _end_all(self) -> None:
        await asyncio.gather(*(waiter.end() for waiter in self._waiters or ()))


class _AsyncEndpointWaiter:
    """
    Waits at one endpoint for *settlers*, the partitions there.

    Its call also waits for an element in a list of its own, and is ended by one, as that of the blocking consumer.
    """

    def __init__(
        self,
        consumer: AsyncConsumer[Any],
        settlers: dict[int, AsyncSettler],
        hear: Callable[[int], None],
        *,
        is_only: bool,
    ) -> None:
        self._consumer, self._settlers, self._hear, self._is_only = consumer, settlers, hear, is_only
        self._partition_of = {settler.session.keys.wake: at for at, settler in settlers.items()}
        session = next(iter(settlers.values())).session
        self._keys, self._own = session.keys, session.keys.wake_of(session.worker)
        self._waiter = AsyncWakeupWaiter(consumer.client.endpoint(session.keys), consumer.client.timeout)
        self._until = 0.0
        self._has_ended = self._is_called = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, until: float) -> asyncio.Task[None]:
        """Wait until an instant (monotonic), also where a wait is under way and would end before; return what waits."""
        self._until = until
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._listen())
        return self._task

    async def _listen(self) -> None:
        while not self._has_ended:
            seconds = max(0.001, self._until - time.monotonic())
            try:
                key = await self._waiter.wait_any([self._own, *self._partition_of], seconds)
                if key == self._own:
                    self._is_called = False
                elif key is not None:
                    await self._note(self._partition_of[key])
                    return
            except ConveyorError as error:
                if self._is_only:
                    raise
                logger.warning("Waiting for messages was refused: %s", error)
                await asyncio.sleep(min(1.0, seconds))
            if self._until - time.monotonic() < 0.01:
                return

    async def _note(self, at: int) -> None:
        """Tell the consumer, unless it is busy; then wake the next idle one."""
        self._hear(at)
        if not (self._consumer.is_idle or self._has_ended):
            await self._settlers[at].aflush()

    async def end(self) -> None:
        """End the wait, and close the connection."""
        self._has_ended = True
        task = self._task
        try:
            if task is not None and not task.done() and not self._consumer.client.is_away(self._keys):
                self._is_called = True
                async with asyncio.timeout(LONGEST_END):
                    await self._consumer.client.arun(operations.wake(self._own), retry_for=FIRST_TRY)
                    await asyncio.gather(task, return_exceptions=True)
                    if self._is_called:  # the call had ended by itself
                        await self._consumer.client.arun(operations.delete_key(self._own), retry_for=0)
        except (ConveyorError, TimeoutError):
            pass
        finally:
            if task is not None:
                task.cancel()
            self._waiter.close()
