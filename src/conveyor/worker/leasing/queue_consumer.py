"""
One queue's leases: numbered turns, one in flight, each settling what ended and asking for more.

Driven by replies, not by a task of its own: waking a task for each reply would cost more than the turn.
"""

from __future__ import annotations

import asyncio
import logging
import random
from time import monotonic
from typing import TYPE_CHECKING, Any

from conveyor import ids
from conveyor.errors import ConveyorError
from conveyor.events import JobLost, JobStarted
from conveyor.store import operations
from conveyor.store.operations import Settlement, StaleTurn, TurnReply, TurnReport, WorkerUnregistered
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Call
from conveyor.store.transport import eviction, wakeup
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.worker.attempt import Attempt
from conveyor.worker.leasing.list_intake import ListIntake
from conveyor.worker.leasing.membership import Reaper, differences, enrolled, readmit
from conveyor.worker.leasing.prefetch import JobSizeEstimate
from conveyor.worker.leasing.quarantine import Quarantine
from conveyor.worker.leasing.spawn_delivery import SpawnDelivery
from conveyor.worker.leasing.timers import DueTimer
from conveyor.worker.logs import complain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack

    from conveyor.store.keys import QueueKeys
    from conveyor.worker.attempt import Handler
    from conveyor.worker.leasing.wakeup import EndpointConnections
    from conveyor.worker.protocols import WorkerServices

log = logging.getLogger("conveyor.worker")
IDLE = 5.0
"""Longest pause between two turns in seconds: a lost wake-up token costs at most this."""


class QueueConsumer:
    """A worker's share of one queue."""

    def __init__(
        self, worker: WorkerServices, berth: EndpointConnections, keys: QueueKeys, weight: float, lease_ms: int
    ) -> None:
        """Take the worker, where its commands go, the queue's keys, its weight among the worker's queues, and its lease."""
        self.keys, self.queue, self.weight, self.lease_ms = keys, keys.queue, weight, lease_ms
        self.executor = worker.executor
        self.shared_state: Mapping[str, Any] = worker.state
        self.identity = ""
        self.held: dict[str, Attempt] = {}
        self.own_retries: dict[str, float] = {}  # id → when it is due
        self.blobs: dict[str, str] = {}  # id → where the large body of a job lies
        self.report = TurnReport()
        self.worked: set[Handler] = set()  # whose counters have moved since the last turn
        self.more = True  # work may be there: ask
        self.paused = False
        self.backlog = 0  # leased here, not started
        self._worker = worker
        self.wire = berth.wire
        berth.sleepers.append(self)
        self._number, self._kick_soon = 0, False
        self._flying: tuple[Call[TurnReply], TurnReport] | None = None
        self._reaper = Reaper(keys, berth.wire, lease_ms)
        self.alarm = DueTimer(self._due_now)
        self._last_turn = 0.0
        self._looked = self.gone = self._absorbing = False
        self.antechamber = Quarantine(lambda: worker.executor.free)
        self._delivery = SpawnDelivery(keys, worker.app, self.schedule)
        self._intake = (
            ListIntake(self, worker.app.plain_lists[keys.queue].task or "") if keys.foreign is not None else None
        )
        self._recovery: asyncio.Task[None] | None = None
        self._wanted, self.sizes = 0, JobSizeEstimate()
        self._landed = asyncio.Event()
        self._idle = asyncio.Event()  # hungry: for the intake, which waits only then
        self._clock_offset = 0.0  # server ms minus our monotonic ms

    async def register(self) -> None:
        """Take a fresh identity, tell the supervisor, then tell Redis."""
        self.identity, self._number = ids.new_identity(), 0
        self._worker.note_identity(self)
        call = operations.register(self.keys, self.identity, self.lease_ms, self._worker.about(self))
        now = await enrolled(self._worker.app, self.wire, self.queue, call)
        self._clock_offset = now - monotonic() * 1000
        self._last_turn = monotonic()

    def begin(self, stack: AsyncExitStack) -> None:
        """Start leasing."""
        if self._intake is not None:
            self._intake.start(AsyncConnection(self.wire.place))
            stack.push_async_callback(self._intake.close)
        self._kick()

    async def leave(self) -> None:
        """Send what is left to report and take the registration away; nothing that is still held is charged."""
        self.alarm.close()
        await self._settled()
        if self.report:
            self._start(0)
            await self._settled()
        await self._delivery.finish(2.0)
        self.gone = True
        try:
            await self.wire.run(operations.reap(self.keys, self.identity, crashed=False), patience=2.0)
        except ConveyorError as error:
            log.warning("could not leave queue %s: %s", self.queue, error)

    async def _settled(self) -> None:
        """Wait until no turn is on its way: its answer decides what is left to report."""
        while self._flying is not None or self._recovery is not None:
            self._landed.clear()
            await self._landed.wait()

    @property
    def now_ms(self) -> int:
        """The server's time, as far as we know it."""
        return int(monotonic() * 1000 + self._clock_offset)

    @property
    def has_capacity(self) -> bool:
        """True when it would take work but there was none: then its wake-up list is listened to."""
        return not self.more and not self._worker.stopping and self._flying is None and self._worker.room(self) > 0

    @property
    def busy(self) -> bool:
        """True while it holds jobs or has something to report."""
        under_way = self._delivery.busy or (self._intake is not None and self._intake.loading)
        return bool(self.held or self.report or self._flying or self._recovery or self.antechamber or under_way)

    def schedule(self, *, at_once: bool = False) -> None:
        """Look again once what runs now has come to a pause, so that many ends make one turn; or *at_once*."""
        if at_once and not self._kick_soon and not self._absorbing:
            self._kick()
        elif not self._kick_soon:
            self._kick_soon = True
            asyncio.get_running_loop().call_soon(self._kick)

    def woken(self) -> None:
        """A token was taken: make a turn, with or without room."""
        self.more = True
        if self._flying is None and self._recovery is None:
            self._start(self._worker.room(self))

    def _kick(self) -> None:
        self._kick_soon = False
        if self._flying is not None or self._recovery is not None:
            return
        if self.antechamber.reserved:
            self._next_suspect()
        want = self._worker.room(self) if self.more else 0
        if self.report or want > 0:
            self._start(want)
        else:
            if self.has_capacity:
                self._idle.set()
            self._worker.listen()

    def renew(self) -> None:
        """Make a turn if none was made lately: it renews the lease, reconciles, and looks for work and for the dead."""
        pause = min(IDLE, self.lease_ms / 3000)
        if self._flying is not None or self._recovery is not None:
            return
        now = monotonic()
        if now - self._last_turn >= 0.95 * pause or self._reaper.is_due:
            self._start(self._worker.room(self))

    def _start(self, want: int) -> None:
        if self.gone or self._worker.stopped:
            return
        self._idle.clear()
        report, self.report = self.report, TurnReport()
        self._worker.settle_stats(self, report)
        now = monotonic()
        self._looked = self._reaper.is_due
        self._number += 1
        call = operations.turn(
            self.keys, self.identity, self._number, want, self.lease_ms, report, flags="l" if self._looked else ""
        )
        self._flying = (call, report)
        self._last_turn = now
        self._wanted = want
        if self._intake is not None and want > 0:
            self._intake.send(self.wire, want)
        # At once: jobs that are about to run would keep the loop, and Redis would wait for us instead of beside us.
        self.wire.send(call.command(), self._answered, at_once=True)

    def _answered(self, reply: Any) -> None:
        assert self._flying is not None
        call, report = self._flying
        if isinstance(reply, Exception):
            self._recovery = asyncio.get_running_loop().create_task(self._recover(call, report))
            return
        try:
            turn = call.decode(reply)
        except (WorkerUnregistered, StaleTurn) as error:
            self._recovery = asyncio.get_running_loop().create_task(self._again_from_nothing(report, error))
            return
        self._absorb(turn, report)

    async def _recover(self, call: Call[TurnReply], report: TurnReport) -> None:
        """Repeat a turn whose reply was lost until it is answered; its number keeps it from being done twice."""
        try:
            turn = await self.wire.run(call, patience=None)
        except (WorkerUnregistered, StaleTurn) as error:
            await self._again_from_nothing(report, error)
            return
        except ConveyorError as error:
            complain("a turn on queue %s was refused: %s", self.queue, error)
            self.report.done[:0], self.report.others[:0] = report.done, report.others
            await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311
            self._recovery = self._flying = None
            self._landed.set()
            self.schedule()
            return
        self._recovery = None
        self._absorb(turn, report)

    async def _again_from_nothing(self, report: TurnReport, error: Exception) -> None:
        """Redis does not know us any more: all we held is somebody else's. Abandon it and register anew."""
        abandoned = list(self.held.values())
        log.warning("queue %s: our lease was lost (%s); %d jobs abandoned", self.queue, error, len(abandoned))
        self.held.clear()
        self.blobs.clear()
        for attempt in abandoned:
            self._lost(attempt)
        self._worker.settle_stats(self, self.report)  # nobody counts what nobody accepted
        self.report, self.more = TurnReport(), True
        self.antechamber.clear()
        try:
            await readmit(self)
        except PartitionCountMismatch as refused:  # not ours to serve any more
            self._worker.fail(refused)
            return
        self._recovery = self._flying = None
        self._landed.set()
        self.schedule()

    def _absorb(self, turn: TurnReply, report: TurnReport) -> None:
        self._absorbing = True
        try:
            self._settle_and_take(turn, report)
        except Exception as error:
            # A defect of ours: end loudly, what is held comes back when the lease ends or the supervisor sees us go.
            self._worker.fail(error)
        self._absorbing = False

    def _settle_and_take(self, turn: TurnReply, report: TurnReport) -> None:
        self._flying = None
        self._clock_offset = turn.now - self._last_turn * 1000
        self._worker.note_renewal(self)
        held = self.held
        for id_ in report.done:
            held.pop(id_, None)
        for one in report.others:
            if one.kind != "M":
                held.pop(one.id, None)
        for id_ in turn.lost:
            self._refused(id_)
        if turn.missing:
            eviction.tell_missing(log, self.queue, turn.missing)
        if self.blobs:
            self._worker.unusual.release(self, report, turn.lost)
        if report.spawned or turn.outbox:
            self._delivery.begin()
        self._submit(self.antechamber.confirmed(report, self.held))
        if turn.ids:
            self._take(turn)
        self._next_suspect()
        self.more = turn.more or (len(turn.ids) >= self._wanted > 0)
        self.paused = turn.paused
        for id_ in turn.cancelled:
            if id_ in held:
                self.executor.stop(held[id_], "cancel")
        if self._looked:
            self._reaper.look(turn, self.identity)
        if turn.held != len(held):
            self._recovery = asyncio.get_running_loop().create_task(self._reconcile())
            return
        if not self._worker.stopping:
            self.alarm.watch(turn, asked=self._wanted > 0)
        self._landed.set()
        self._kick()
        self._worker.absorbed(self)

    def _take(self, turn: TurnReply) -> None:
        """Turn what was leased into attempts, and hand them over."""
        held, lookup = self.held, self._worker.handlers(self)
        self.sizes.note(turn.envelopes)
        states = turn.states
        attempts = []
        for at, (id_, data) in enumerate(zip(turn.ids, turn.envelopes, strict=True)):
            end = data.find(b"\n", 1)
            handler = lookup.get(data[: end + 2])  # a plain job's envelope: \n, its task, \n, an object
            if handler is not None:
                attempt = Attempt(self, handler, id_, data[end + 1 :])
            else:
                attempt = self._worker.arrive(self, id_, data)
            held[id_] = attempt
            if states and states[at] is not None:
                attempt.recall(states[at])  # type: ignore[arg-type]
                self.own_retries.pop(id_, None)
            if attempt.handler.kind == "unknown":
                self._worker.unusual.set_aside(self, attempt)
            elif attempt.handler.early:
                self.antechamber.early(attempt, self.report)
            elif attempt.suspect:
                self.antechamber.suspect(attempt)
            else:
                attempts.append(attempt)
        if self._worker.draining:
            self._worker.hand_back(self)
        else:
            self._submit(attempts)

    def _submit(self, attempts: list[Attempt]) -> None:
        if attempts:
            self.backlog += len(attempts)
            self.executor.submit(attempts)

    def _next_suspect(self) -> None:
        for attempt in self.antechamber.advance(self.report, self.held):
            attempt.ended = monotonic()
            self._worker.settling.poison(self.report, attempt, self.now_ms)

    def _refused(self, id_: str) -> None:
        attempt = self.held.pop(id_, None)
        log.warning("the outcome of %s was refused: its lease was lost", ids.clean(ids.public(self.queue, id_)))
        self.antechamber.forget(id_)
        if attempt is not None:
            self._lost(attempt)

    def _lost(self, attempt: Attempt) -> None:
        self.executor.stop(attempt, "lost")
        self._worker.app.emit(JobLost(attempt.public_id, attempt.handler.name, self.queue, attempt.number))

    async def _reconcile(self) -> None:
        """Our counts differ: drop what Redis does not believe we hold, give back what we do not know."""
        gone, unknown = await differences(self)
        for id_ in gone:
            self._lost(self.held.pop(id_))
        self.report.others += [Settlement("F", id_) for id_ in unknown]
        self._recovery = None
        self._landed.set()
        self.schedule()

    def begun(self, attempt: Attempt) -> None:
        """One of ours began."""
        self.backlog -= 1
        if self._worker.app.has_listener(JobStarted):
            self._worker.app.emit(JobStarted(attempt.public_id, attempt.handler.name, self.queue, attempt.number))

    def left(self) -> None:
        """One of ours left the backlog without beginning."""
        self.backlog -= 1

    def holds(self, attempt: Attempt) -> bool:
        """Tell whether *attempt* is still ours to settle."""
        return self.held.get(attempt.id) is attempt

    def ended(self, attempt: Attempt) -> None:
        """One of ours ended: the next suspect may run."""
        if attempt.suspect or attempt.handler.early:
            self.antechamber.ended(attempt)
            self._next_suspect()

    def move_deadline(self, attempt: Attempt, seconds: float) -> None:
        """Give *attempt* that many seconds from now on."""
        self.executor.deadlines.move(attempt, seconds)

    def _due_now(self) -> None:
        if self._flying is None and self._recovery is None and not self._worker.stopping:
            self._start(self._worker.room(self))

    @property
    def drained(self) -> bool:
        """True when nothing is left that this worker could do: for a burst."""
        if self.more or self.busy:
            return False
        if not self.alarm.is_set:
            self.own_retries.clear()  # nothing is scheduled, so another worker took them
        return not self.own_retries

    def wake_self(self) -> None:
        """Wake our own blocked listener: it hears one list too few."""
        wakeup.wake(self.wire, self.keys.wake_of(self.identity))

    async def until_has_capacity(self) -> None:
        """Wait until it would take work but has none."""
        await self._idle.wait()

    def __repr__(self) -> str:
        return f"<Consumer {self.queue}: {len(self.held)} held, {self.backlog} waiting>"
