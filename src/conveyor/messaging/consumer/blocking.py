"""The blocking consumer of a queue in several partitions: an identity at each, and one wait for all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Sequence
from queue import Empty, SimpleQueue
from random import randrange
from typing import Any, Generic, Protocol, TypeVar

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.partition_steps import PartitionRoundRobin, PartitionTurnStep, PartitionWaitStep, Steps
from conveyor.messaging.consumer.pulses import Pulses, by_place
from conveyor.messaging.consumer.settling import BlockingSettler, run_once
from conveyor.messaging.consumer.steps import ConsumerSteps, quietly
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.message import Batch, Ending, Message, OnError
from conveyor.messaging.partitions import Partitions
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store.client.client import Client
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Call
from conveyor.store.transport.wakeup import WakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
logger = logging.getLogger("conveyor.queue")


class PartitionSource(Protocol[T]):
    """What a consumer needs of one partition."""

    def _lessee(self, kind: str, *, transient: bool = False) -> LeaseSession: ...
    def _verdict(self) -> SettlementPolicy: ...
    def _open(self, leased: LeasedMessage, holder: Any) -> Message[T]: ...


class PartitionSettler(BlockingSettler):
    """Who holds the messages of one partition."""

    def __init__(
        self, spread: PartitionedConsumer[Any], lessee: LeaseSession, verdict: SettlementPolicy, on_error: OnError
    ) -> None:
        """Take the consumer it belongs to, the books, and the judge."""
        super().__init__(spread.client, lessee, verdict, on_error, run=spread.run)
        self._spread = spread

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        super().settle(endings)
        self._spread.freed()

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn when that comes at once: when this is what the loop is at."""
        self.enter(endings)
        self._spread.freed()
        if not self._spread.comes_to(endings):
            self.flush()

    def flush(self) -> bool:
        """Make a turn that leases nothing; False when one is under way, or Redis is away."""
        try:
            made = self.round(blocking=False)
        except ConveyorError:
            return False
        self.note()
        return made


class PartitionedConsumer(Generic[T]):
    """Hands out the messages of all partitions, one or several at a time."""

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
        self.holders: list[PartitionSettler] = []
        flows: list[ConsumerSteps[Message[T]]] = []
        for source in sources:
            holder, flow = self._stand(source, on_error, transient=transient)
            self.holders.append(holder)
            flows.append(flow)
        self._rota = PartitionRoundRobin(flows, randrange(len(flows)))  # noqa: S311
        self._tower = WakeupWaiters(self)
        self._pulses: Pulses | None = None
        self._latest: Sequence[LeasedMessage] = ()
        self._waiting = False
        self._freed = threading.Event()
        self._failures = 0

    def _stand(
        self, source: PartitionSource[T], on_error: OnError, *, transient: bool
    ) -> tuple[PartitionSettler, ConsumerSteps[Message[T]]]:
        lessee, verdict = source._lessee("pull" if transient else "consumer", transient=transient), source._verdict()  # noqa: SLF001
        holder = PartitionSettler(self, lessee, verdict, on_error)
        return holder, ConsumerSteps(lessee, verdict, lambda leased: source._open(leased, holder))  # noqa: SLF001

    # -- what the queue hands out -----------------------------------------------------------------------------------

    def messages(self, prefetch: int) -> Generator[Message[T], None, None]:
        """Yield messages for ever, each as soon as there is one."""
        with self:
            while True:
                message = quietly(self._follow, self._rota.fetch(prefetch))
                self._latest = (message._leased,)  # noqa: SLF001
                yield message

    def batches(self, size: int, within: float) -> Generator[Batch[T], None, None]:
        """Yield batches for ever."""
        with self:
            while True:
                batch = Batch(quietly(self._follow, self._rota.gather(size, within)))
                self._latest = [message._leased for message in batch]  # noqa: SLF001
                yield batch

    def pull(self, count: int, wait: float) -> list[Message[T]]:
        """Return up to *count* messages as soon as there is one, or none after *wait* seconds."""
        self._partitions.agree()
        try:
            return self._follow(self._rota.pull(count, wait), patient=False)
        finally:
            self._tower.close()

    # -- for the holders ----------------------------------------------------------------------------------------------

    def run(self, call: Call[Any]) -> Any:
        """Carry out a step; after Redis was emptied the number of partitions is agreed on anew."""
        try:
            return run_once(self.client, call)
        except PartitionCountMismatch:
            self._partitions.claim()
            return run_once(self.client, call)

    def freed(self) -> None:
        """Something that was held has been settled."""
        if not self._freed.is_set():
            self._freed.set()

    def comes_to(self, endings: Sequence[Ending]) -> bool:
        """Tell whether the loop's next turn will report these ends, since they are those of what it handed out last."""
        # The order matters: entered first, then looked, as the loop first says that it waits and then looks.
        latest = self._latest
        return not self._waiting and all(any(leased is one for one in latest) for leased, _ in endings)

    @property
    def idle(self) -> bool:
        """True while the loop waits for work."""
        return self._waiting

    # -- driving ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> PartitionedConsumer[T]:
        self._partitions.agree()
        self._pulses = Pulses(self.client, self.holders)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pulses is not None:
            self._pulses.stop()
        self._tower.close()
        for step in self._rota.leave():
            if isinstance(step, PartitionTurnStep):
                holder = self.holders[step.at]
                try:
                    holder.round(step.want, leave=step.leave)
                    holder.note()
                except ConveyorError as error:
                    name = holder.lessee.keys.queue
                    if holder.lessee.registered:
                        logger.warning("Queue %s: what was leased returns when the lease ends: %s", name, error)

    def _follow(self, program: Steps[V], *, patient: bool = True) -> V:
        try:
            while True:
                step = next(program)
                for at in self._tower.heard():
                    self._rota.rung(at)
                if isinstance(step, PartitionWaitStep):
                    self._idle(step)
                elif patient:
                    self._visit(step)
                else:
                    self.holders[step.at].round(step.want, leave=step.leave)
                    self.holders[step.at].note()
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _visit(self, step: PartitionTurnStep) -> None:
        holder = self.holders[step.at]
        while True:
            try:
                holder.round(step.want, leave=step.leave)
            except StoreUnavailable as error:
                self._failures += 1
                if self._failures == 1:
                    logger.warning("Queue %s: waiting for Redis. %s", holder.lessee.keys.queue, error)
                time.sleep(min(1.0, 0.05 * self._failures))
                if not step.must:
                    return
                continue
            if self._failures:
                self._failures = 0
                logger.warning("Queue %s: Redis answers again.", holder.lessee.keys.queue)
            holder.note()
            return

    def _idle(self, step: PartitionWaitStep) -> None:
        self._waiting = True
        if self._pulses is not None:
            self._pulses.idle = True
        try:
            for holder in self.holders:
                if holder.lessee.pending:
                    holder.flush()  # another thread settled something meanwhile
            if step.full:
                self._freed.clear()
                self._freed.wait(step.seconds)
                return
            for at in self._tower.wait(step.seconds):
                self._rota.rung(at)
        finally:
            self._waiting = False
            if self._pulses is not None:
                self._pulses.idle = False


class WakeupWaiters:
    """
    Waits for a token at any partition: one blocked connection for each place they lie at.

    A single place is waited at by the consumer's own thread. Of several each has a thread; one that hears a token while
    the consumer is busy makes a turn without taking anything, which calls the next idle one.
    """

    def __init__(self, spread: PartitionedConsumer[Any]) -> None:
        """Connects when something is first waited for."""
        self._spread = spread
        self._bells: list[_EndpointWaiter] | None = None
        self._heard: SimpleQueue[int] = SimpleQueue()

    def wait(self, seconds: float) -> list[int]:
        """Wait up to *seconds*; return the partitions whose tokens were taken."""
        if self._bells is None:
            holders = list(enumerate(self._spread.holders))
            groups = by_place(self._spread.client, holders, lambda one: one[1].lessee.keys)
            self._bells = [_EndpointWaiter(self._spread, dict(group), self._heard) for group in groups]
        if len(self._bells) == 1:
            at = self._bells[0].wait(seconds)
            return [] if at is None else [at]
        for bell in self._bells:
            bell.begin(seconds)
        try:
            return [self._heard.get(timeout=seconds), *self.heard()]
        except Empty:
            return []

    def heard(self) -> list[int]:
        """Return the partitions whose tokens were taken meanwhile."""
        found: list[int] = []
        while not self._heard.empty():
            found.append(self._heard.get())
        return found

    def close(self) -> None:
        """Wait no longer."""
        for bell in self._bells or ():
            bell.close()
        self._bells = None


class _EndpointWaiter:
    """One place of a tower."""

    def __init__(
        self, spread: PartitionedConsumer[Any], holders: dict[int, PartitionSettler], heard: SimpleQueue[int]
    ) -> None:
        self._spread, self._holders, self._heard = spread, holders, heard
        self._names = {holder.lessee.keys.wake: at for at, holder in holders.items()}
        first = next(iter(holders.values()))
        self._bell = WakeupWaiter(spread.client.endpoint(first.lessee.keys))
        self._begin: SimpleQueue[float | None] = SimpleQueue()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def wait(self, seconds: float) -> int | None:
        """Wait here and now."""
        key = self._bell.wait_any(list(self._names), seconds)
        return None if key is None else self._names[key]

    def begin(self, seconds: float) -> None:
        """Wait in the background, unless that is so already."""
        if self._busy:
            return
        self._busy = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="conveyor-bell", daemon=True)
            self._thread.start()
        self._begin.put(seconds)

    def close(self) -> None:
        self._closed = True
        self._begin.put(None)
        self._bell.close()

    def _listen(self) -> None:
        while (seconds := self._begin.get()) is not None:
            at = None
            try:
                at = self.wait(seconds)
            except ConveyorError as error:
                logger.warning("Waiting for work was refused: %s", error)
                time.sleep(min(1.0, seconds))
            self._busy = False
            if at is None or self._closed:
                continue
            self._heard.put(at)
            if not self._spread.idle:
                self._holders[at].flush()
        self._bell.close()
