"""The blocking consumer: an identity, a thread that renews its lease, and a connection that waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.messaging.consumer.list_mover import ListMover
from conveyor.messaging.consumer.renewal import LeaseRenewer
from conveyor.messaging.consumer.settling import BlockingSettler, retry_for
from conveyor.messaging.consumer.steps import ConsumerSteps, Program, TurnStep, WaitStep, quietly
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.message import Batch, Ending, Message, OnError
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store.client.client import Client
from conveyor.store.script import Call
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.wakeup import WakeupWaiter

T = TypeVar("T")
V = TypeVar("V")
Decode = Callable[[bytes], T]
logger = logging.getLogger("conveyor.queue")


class Consumer(BlockingSettler, Generic[T]):
    """Hands out messages, one or several at a time, and carries their ends with the next turn."""

    def __init__(
        self,
        client: Client,
        lessee: LeaseSession,
        verdict: SettlementPolicy,
        on_error: OnError,
        open: Callable[..., Message[T]],  # noqa: A002
    ) -> None:
        """Connects when the first message is asked for."""
        super().__init__(client, lessee, verdict, on_error, run=self._run_own)
        self._flow = ConsumerSteps(lessee, verdict, lambda leased: open(leased, self))
        self._connection = Connection(client.endpoint(lessee.keys))
        self._bell = WakeupWaiter(client.endpoint(lessee.keys))
        self._pulse: LeaseRenewer | None = None
        self._mover: ListMover | None = None
        self._latest: Sequence[LeasedMessage] = ()
        self._waiting = False
        self._freed = threading.Event()
        self._outage = False

    # -- what the queue hands out -----------------------------------------------------------------------------------

    def messages(self, prefetch: int) -> Generator[Message[T], None, None]:
        """Yield messages for ever, each as soon as there is one."""
        with self:
            while True:
                message = quietly(self._follow, self._flow.fetch(prefetch))
                self._latest = (message._leased,)  # noqa: SLF001
                yield message

    def batches(self, size: int, within: float) -> Generator[Batch[T], None, None]:
        """Yield batches for ever."""
        with self:
            while True:
                batch = Batch(quietly(self._follow, self._flow.gather(size, within)))
                self._latest = [message._leased for message in batch]  # noqa: SLF001
                yield batch

    # -- how messages end ---------------------------------------------------------------------------------------------

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        super().settle(endings)
        if not self._freed.is_set():
            self._freed.set()

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle with the next turn when that comes at once: when this is what the loop is at."""
        self.enter(endings)
        if not self._freed.is_set():
            self._freed.set()
        latest = self._latest
        # The order matters: entered first, then looked, as the loop first says that it waits and then looks.
        if self._waiting or not all(any(leased is one for one in latest) for leased, _ in endings):
            self._flush()

    # -- driving ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Consumer[T]:
        self._pulse = LeaseRenewer(self.client.endpoint(self.lessee.keys), self.lessee, flush=self._flush)
        if self.lessee.keys.foreign is not None:
            self._mover = ListMover(self.client, self.lessee.keys)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        if self._mover is not None:
            self._mover.stop()
        try:
            for step in self._flow.leave():
                if isinstance(step, TurnStep):
                    self.round(step.want, leave=step.leave)
            self.note()
        except ConveyorError as error:
            if self.lessee.registered:
                logger.warning(
                    "Queue %s: what was leased returns when the lease ends: %s", self.lessee.keys.queue, error
                )
        except KeyboardInterrupt as stop:
            raise stop.with_traceback(None) from None  # pressed twice: what was leased returns when the lease ends
        finally:
            self._bell.close()
            self._connection.close()

    def _follow(self, program: Program[V]) -> V:
        try:
            step = next(program)
            while True:
                if isinstance(step, TurnStep):
                    self._take(step)
                else:
                    self._idle(step)
                step = next(program)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _take(self, step: TurnStep) -> None:
        failures = 0
        while True:
            try:
                self.round(step.want, leave=step.leave)
            except StoreUnavailable as error:
                failures += 1
                if failures == 2 or (failures == 1 and self.client.retry_for >= 1 and self.lessee.intake is None):
                    logger.warning("Queue %s: waiting for Redis. %s", self.lessee.keys.queue, error)
                    self._outage = True
                time.sleep(min(1.0, 0.05 * failures))
            else:
                if self._outage:
                    self._outage = False
                    logger.warning("Queue %s: Redis answers again.", self.lessee.keys.queue)
                self.note()
                return

    def _idle(self, step: WaitStep) -> None:
        assert self._pulse is not None
        self._waiting = self._pulse.idle = True
        try:
            if self.lessee.pending:
                return  # another thread settled something meanwhile: the turn that follows takes it along
            if step.full:
                self._freed.clear()
                self._freed.wait(step.seconds)
                return
            seconds = step.seconds if self._mover is None else self._mover.begin(step.seconds)
            self._bell.wait(self.lessee.keys.wake, seconds)
        finally:
            if self._mover is not None:
                self._mover.end()
            self._waiting = self._pulse.idle = False

    def _flush(self) -> bool:
        """Make a turn that leases nothing; False when one is under way, or Redis is away."""
        try:
            made = self.round(blocking=False)
        except ConveyorError:
            return False
        self.note()
        return made

    def _run_own(self, call: Call[Any]) -> Any:
        return self._connection.run(call, retry_for=retry_for(self.client, call))
