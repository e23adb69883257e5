"""The awaitable consumer of a queue in several partitions: an identity at each, and one wait for all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from random import randrange
from typing import Any, Generic, TypeVar

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.blocking import PartitionSource
from conveyor.messaging.consumer.partition_steps import PartitionRoundRobin, PartitionTurnStep, PartitionWaitStep, Steps
from conveyor.messaging.consumer.pulses import Pulses, by_place
from conveyor.messaging.consumer.settling import AsyncSettler, arun_once
from conveyor.messaging.consumer.steps import ConsumerSteps, aquietly
from conveyor.messaging.leases import LeaseSession
from conveyor.messaging.message import Batch, Ending, Message, OnError
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store.client.client import Client
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Call
from conveyor.store.transport.wakeup import AsyncWakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")


class AsyncPartitionSettler(AsyncSettler):
    """Who holds the messages of one partition."""

    def __init__(
        self, spread: AsyncPartitionedConsumer[Any], lessee: LeaseSession, verdict: SettlementPolicy, on_error: OnError
    ) -> None:
        """Take the consumer it belongs to, the books, and the judge."""
        super().__init__(spread.client, lessee, verdict, on_error, run=spread.run)
        self._spread = spread
        self._flushing: asyncio.Task[None] | None = None

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        await super().asettle(endings)
        self._spread.freed.set()

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn, when the loop's body comes to it without waiting for anything else, or at once."""
        self.enter(endings)
        self._spread.freed.set()
        self._loop.call_soon(self.begin_flush)

    def begin_flush(self) -> None:
        """Report what is pending, unless that is under way."""
        if self.lessee.pending and self._flushing is None:
            self._flushing = self._loop.create_task(self._flush())

    def flush(self) -> bool:
        """Return False: what a thread may do to renew is a beat and no more."""
        return False

    async def _flush(self) -> None:
        try:
            while self.lessee.pending:
                await self.turn()
        except ConveyorError as error:
            logger.debug("Queue %s: an end leaves with a later turn: %s", self.lessee.keys.queue, error)
        finally:
            self._flushing = None

    async def turn(self) -> None:
        """Make a turn that leases nothing."""
        await self.around()
        self.note()


class AsyncPartitionedConsumer(Generic[T]):
    """Hands out the messages of all partitions, one or several at a time. Belongs to the loop it was made on."""

    def __init__(
        self,
        partitions: Partitions,
        sources: Sequence[PartitionSource[T]],
        on_error: OnError,
        *,
        transient: bool = False,
    ) -> None:
        """Connects when the first message is asked for."""
        self.client: Client = partitions.client
        self._partitions = partitions
        self.freed = asyncio.Event()
        self.holders: list[AsyncPartitionSettler] = []
        flows: list[ConsumerSteps[Message[T]]] = []
        for source in sources:
            holder, flow = self._stand(source, on_error, transient=transient)
            self.holders.append(holder)
            flows.append(flow)
        self._rota = PartitionRoundRobin(flows, randrange(len(flows)))  # noqa: S311
        self._tower = AsyncWakeupWaiters(self)
        self._pulses: Pulses | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self.idle = False
        self._failures = 0

    def _stand(
        self, source: PartitionSource[T], on_error: OnError, *, transient: bool
    ) -> tuple[AsyncPartitionSettler, ConsumerSteps[Message[T]]]:
        lessee, verdict = source._lessee("pull" if transient else "consumer", transient=transient), source._verdict()  # noqa: SLF001
        holder = AsyncPartitionSettler(self, lessee, verdict, on_error)
        return holder, ConsumerSteps(lessee, verdict, lambda leased: source._open(leased, holder))  # noqa: SLF001

    # -- what the queue hands out -----------------------------------------------------------------------------------

    async def messages(self, prefetch: int) -> AsyncGenerator[Message[T], None]:
        """Yield messages for ever, each as soon as there is one."""
        await self._begin()
        try:
            while True:
                yield await aquietly(self._follow, self._rota.fetch(prefetch))
        finally:
            await self._end()

    async def batches(self, size: int, within: float) -> AsyncGenerator[Batch[T], None]:
        """Yield batches for ever."""
        await self._begin()
        try:
            while True:
                yield Batch(await aquietly(self._follow, self._rota.gather(size, within)))
        finally:
            await self._end()

    async def pull(self, count: int, wait: float) -> list[Message[T]]:
        """Return up to *count* messages as soon as there is one, or none after *wait* seconds."""
        await self._partitions.aagree()
        try:
            return await self._follow(self._rota.pull(count, wait), patient=False)
        finally:
            self._tower.close()

    async def run(self, call: Call[Any]) -> Any:
        """Carry out a step; after Redis was emptied the number of partitions is agreed on anew."""
        try:
            return await arun_once(self.client, call)
        except PartitionCountMismatch:
            await self._partitions.aclaim()
            return await arun_once(self.client, call)

    # -- driving ------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        await self._partitions.aagree()
        self._pulses = Pulses(self.client, self.holders, slack=1.6)
        self._upkeep = asyncio.get_running_loop().create_task(self._renew())

    async def _end(self) -> None:
        if self._pulses is not None:
            self._pulses.stop()
        if self._upkeep is not None:
            self._upkeep.cancel()
        self._tower.close()
        for step in self._rota.leave():
            if isinstance(step, PartitionTurnStep):
                holder = self.holders[step.at]
                try:
                    await holder.around(step.want, leave=step.leave)
                    holder.note()
                except ConveyorError as error:
                    name = holder.lessee.keys.queue
                    if holder.lessee.registered:
                        logger.warning("Queue %s: what was leased returns when the lease ends: %s", name, error)

    async def _follow(self, program: Steps[V], *, patient: bool = True) -> V:
        try:
            while True:
                step = next(program)
                for at in self._tower.heard():
                    self._rota.rung(at)
                if isinstance(step, PartitionWaitStep):
                    await self._idle(step)
                elif patient:
                    await self._visit(step)
                else:
                    await self.holders[step.at].around(step.want, leave=step.leave)
                    self.holders[step.at].note()
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _visit(self, step: PartitionTurnStep) -> None:
        holder = self.holders[step.at]
        while True:
            try:
                await holder.around(step.want, leave=step.leave)
            except StoreUnavailable as error:
                self._failures += 1
                if self._failures == 1:
                    logger.warning("Queue %s: waiting for Redis. %s", holder.lessee.keys.queue, error)
                await asyncio.sleep(min(1.0, 0.05 * self._failures))
                if not step.must:
                    return
                continue
            if self._failures:
                self._failures = 0
                logger.warning("Queue %s: Redis answers again.", holder.lessee.keys.queue)
            holder.note()
            return

    async def _idle(self, step: PartitionWaitStep) -> None:
        self.idle = True
        if self._pulses is not None:
            self._pulses.idle = True
        try:
            for holder in self.holders:
                holder.begin_flush()  # settled meanwhile by another task
            if step.full:
                self.freed.clear()
                try:
                    await asyncio.wait_for(self.freed.wait(), step.seconds)
                except TimeoutError:
                    pass
                return
            for at in await self._tower.wait(step.seconds):
                self._rota.rung(at)
        finally:
            self.idle = False
            if self._pulses is not None:
                self._pulses.idle = False

    async def _renew(self) -> None:
        """Make turns a few times a lease while the body runs; the threads stand in when the loop is blocked."""
        lease = min(holder.lessee.lease_ms for holder in self.holders) / 1000
        while True:
            await asyncio.sleep(lease / 8)
            for holder in self.holders:
                lessee = holder.lessee
                if self.idle or not lessee.registered or lessee.clock() - lessee.renewed < lease / 4:
                    continue
                try:
                    await holder.turn()
                except ConveyorError as error:
                    logger.debug("Queue %s: not renewed: %s", lessee.keys.queue, error)


class AsyncWakeupWaiters:
    """
    Waits for a token at any partition: one blocked connection for each place they lie at.

    Of several places each has a task; one that hears a token while the consumer is busy makes a turn without taking
    anything, which calls the next idle consumer.
    """

    def __init__(self, spread: AsyncPartitionedConsumer[Any]) -> None:
        """Connects when something is first waited for."""
        self._spread = spread
        self._bells: list[_AsyncEndpointWaiter] | None = None
        self._heard: list[int] = []
        self._ring = asyncio.Event()

    async def wait(self, seconds: float) -> list[int]:
        """Wait up to *seconds*; return the partitions whose tokens were taken."""
        if self._bells is None:
            holders = list(enumerate(self._spread.holders))
            groups = by_place(self._spread.client, holders, lambda one: one[1].lessee.keys)
            self._bells = [_AsyncEndpointWaiter(self._spread, dict(group), self.hear) for group in groups]
        if len(self._bells) == 1:
            at = await self._bells[0].wait(seconds)
            return [] if at is None else [at]
        self._ring.clear()
        for bell in self._bells:
            bell.begin(seconds)
        try:
            await asyncio.wait_for(self._ring.wait(), seconds)
        except TimeoutError:
            pass
        return self.heard()

    def hear(self, at: int) -> None:
        """Take note of a token."""
        self._heard.append(at)
        self._ring.set()

    def heard(self) -> list[int]:
        """Return the partitions whose tokens were taken meanwhile."""
        heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        """Wait no longer."""
        for bell in self._bells or ():
            bell.close()
        self._bells = None


class _AsyncEndpointWaiter:
    """One place of a tower."""

    def __init__(
        self, spread: AsyncPartitionedConsumer[Any], holders: dict[int, AsyncPartitionSettler], hear: Any
    ) -> None:
        self._spread, self._holders, self._hear = spread, holders, hear
        self._names = {holder.lessee.keys.wake: at for at, holder in holders.items()}
        first = next(iter(holders.values()))
        self._bell = AsyncWakeupWaiter(spread.client.endpoint(first.lessee.keys))
        self._task: asyncio.Task[None] | None = None

    async def wait(self, seconds: float) -> int | None:
        key = await self._bell.wait_any(list(self._names), seconds)
        return None if key is None else self._names[key]

    def begin(self, seconds: float) -> None:
        """Wait in the background, unless that is so already."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._listen(seconds))

    async def _listen(self, seconds: float) -> None:
        try:
            at = await self.wait(seconds)
            if at is None:
                return
            self._hear(at)
            if not self._spread.idle:
                await self._holders[at].turn()
        except ConveyorError as error:
            logger.warning("Waiting for work was refused: %s", error)
            await asyncio.sleep(min(1.0, seconds))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._bell.close()
