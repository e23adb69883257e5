"""The awaitable consumer: turns on the loop's shared wire, a wire that waits, and a thread that renews the lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Generic, TypeVar

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.list_mover import AsyncListMover
from conveyor.messaging.consumer.renewal import LeaseRenewer
from conveyor.messaging.consumer.settling import AsyncSettler
from conveyor.messaging.consumer.steps import ConsumerSteps, Program, TurnStep, WaitStep, aquietly
from conveyor.messaging.leases import LeaseSession
from conveyor.messaging.message import Batch, Ending, Message, OnError
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store.client.client import Client
from conveyor.store.transport.wakeup import AsyncWakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")


class AsyncConsumer(AsyncSettler, Generic[T]):
    """Hands out messages, one or several at a time. Belongs to the loop it was made on."""

    def __init__(
        self,
        client: Client,
        lessee: LeaseSession,
        verdict: SettlementPolicy,
        on_error: OnError,
        open: Callable[..., Message[T]],  # noqa: A002
    ) -> None:
        """Connects when the first message is asked for."""
        super().__init__(client, lessee, verdict, on_error)
        self._flow = ConsumerSteps(lessee, verdict, lambda leased: open(leased, self))
        self._bell = AsyncWakeupWaiter(client.endpoint(lessee.keys))
        self._pulse: LeaseRenewer | None = None
        self._mover: AsyncListMover | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        self._outage = False

    async def messages(self, prefetch: int) -> AsyncGenerator[Message[T], None]:
        """Yield messages for ever, each as soon as there is one."""
        self._begin()
        try:
            while True:
                yield await aquietly(self._follow, self._flow.fetch(prefetch))
        finally:
            await self._end()

    async def batches(self, size: int, within: float) -> AsyncGenerator[Batch[T], None]:
        """Yield batches for ever."""
        self._begin()
        try:
            while True:
                yield Batch(await aquietly(self._follow, self._flow.gather(size, within)))
        finally:
            await self._end()

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        await super().asettle(endings)
        self._freed.set()

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn, when the loop's body comes to it without waiting for anything else, or at once."""
        self.enter(endings)
        self._freed.set()
        self._loop.call_soon(self._begin_flush)

    def _begin(self) -> None:
        self._pulse = LeaseRenewer(self.client.endpoint(self.lessee.keys), self.lessee, flush=lambda: False, slack=1.6)
        if self.lessee.keys.foreign is not None:
            self._mover = AsyncListMover(self.client, self.lessee.keys)
        self._upkeep = self._loop.create_task(self._renew())

    async def _end(self) -> None:
        assert self._pulse is not None
        assert self._upkeep is not None
        self._pulse.stop()
        self._upkeep.cancel()
        if self._mover is not None:
            self._mover.stop()
        self._bell.close()
        try:
            for step in self._flow.leave():
                if isinstance(step, TurnStep):
                    await self.around(step.want, leave=step.leave)
            self.note()
        except ConveyorError as error:
            if self.lessee.registered:
                logger.warning(
                    "Queue %s: what was leased returns when the lease ends: %s", self.lessee.keys.queue, error
                )

    async def _follow(self, program: Program[V]) -> V:
        try:
            step = next(program)
            while True:
                if isinstance(step, TurnStep):
                    await self._take(step)
                else:
                    await self._idle(step)
                step = next(program)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _take(self, step: TurnStep) -> None:
        failures = 0
        while True:
            try:
                await self.around(step.want, leave=step.leave)
            except StoreUnavailable as error:
                failures += 1
                if failures == 2 or (failures == 1 and self.client.retry_for >= 1 and self.lessee.intake is None):
                    logger.warning("Queue %s: waiting for Redis. %s", self.lessee.keys.queue, error)
                    self._outage = True
                await asyncio.sleep(min(1.0, 0.05 * failures))
            else:
                if self._outage:
                    self._outage = False
                    logger.warning("Queue %s: Redis answers again.", self.lessee.keys.queue)
                self.note()
                return

    async def _idle(self, step: WaitStep) -> None:
        assert self._pulse is not None
        self._pulse.idle = True
        try:
            if self.lessee.pending:
                return  # settled meanwhile by another task: the turn that follows takes it along
            if step.full:
                self._freed.clear()
                try:
                    await asyncio.wait_for(self._freed.wait(), step.seconds)
                except TimeoutError:
                    pass
                return
            seconds = step.seconds if self._mover is None else self._mover.begin(step.seconds)
            await self._bell.wait(self.lessee.keys.wake, seconds)
        finally:
            if self._mover is not None:
                self._mover.end()
            self._pulse.idle = False

    def _begin_flush(self) -> None:
        if self.lessee.pending and self._flushing is None:
            self._flushing = self._loop.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self.lessee.pending:
                await self.around()
                self.note()
        except ConveyorError as error:
            logger.debug("Queue %s: an end leaves with a later turn: %s", self.lessee.keys.queue, error)
        finally:
            self._flushing = None

    async def _renew(self) -> None:
        """Make a turn a few times a lease while the body runs; the thread stands in when the loop is blocked."""
        assert self._pulse is not None
        lease = self.lessee.lease_ms / 1000
        while True:
            await asyncio.sleep(lease / 8)
            if (
                not self._pulse.idle
                and self.lessee.registered
                and self.lessee.clock() - self.lessee.renewed >= lease / 4
            ):
                await self._flush_once()

    async def _flush_once(self) -> None:
        try:
            await self.around()
            self.note()
        except ConveyorError as error:
            logger.debug("Queue %s: not renewed: %s", self.lessee.keys.queue, error)
