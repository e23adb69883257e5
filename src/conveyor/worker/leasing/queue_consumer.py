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

import msgspec

from conveyor import ids
from conveyor.errors import ConveyorError
from conveyor.events import JobLost, JobStarted
from conveyor.store import operations
from conveyor.store.operations import MOST_HELD, Settlement, StaleTurn, TurnReply, TurnReport, WorkerUnregistered
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import WrongReply
from conveyor.store.transport import eviction, wakeup
from conveyor.store.worker_commands import FOLLOWED, read_command
from conveyor.worker.attempt import PLAIN_ENVELOPE, Attempt, Handler
from conveyor.worker.job_loader import load_attributes
from conveyor.worker.leasing.capacity import JobSizeEstimate
from conveyor.worker.leasing.group_series import GroupSeries
from conveyor.worker.leasing.list_intake import ListIntake
from conveyor.worker.leasing.live_reports import LiveReports
from conveyor.worker.leasing.membership import Reaper, differences, longest_pause, register, register_again
from conveyor.worker.leasing.quarantine import EarlyAcks, Quarantine
from conveyor.worker.leasing.spawn_delivery import SpawnDelivery
from conveyor.worker.leasing.timers import DueTimer
from conveyor.worker.logs import log_repeated_error
from conveyor.worker.part_writer import PartWriter
from conveyor.worker.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack

    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call
    from conveyor.store.transport.async_connection import AsyncConnection
    from conveyor.worker.leasing.capacity import PartitionGroup
    from conveyor.worker.services import WorkerServices

log = logging.getLogger("conveyor.worker")
REPORT_AFTER = 0.03
"""Seconds that ends of jobs of a partition wait for others, while another partition leases."""
LATE = 0.5
"""Seconds without a reply to a turn, after which other partitions of the queue lease before this one."""
PUT_OFF_MS = (100, 1000)
"""Shortest and longest time for which a job is put off that has waited long for others that must run alone."""
SENT_FIRST = 32
"""Jobs of a reply from which on the next turn leaves before they are made into attempts, so that the server works meanwhile."""
IDLE = 5.0
"""Longest pause between two turns in seconds: a lost wake-up token costs at most this."""


class PreparedTurn(msgspec.Struct):
    """The command of a turn that has nothing to report, made before it is needed."""

    identity: str
    number: int
    want: int
    call: Call[TurnReply]
    packed: bytes | None

    def fits(self, identity: str, room: int, report: TurnReport) -> bool:
        """Tell whether it is a turn of this worker, which has nothing to report, and *room* for what it asks."""
        reports = report.done or report.others or report.stats or report.recent
        return self.identity == identity and 0 < self.want <= room and not reports

    def numbered(self, number: int) -> tuple[Call[TurnReply], bytes | None]:
        """Return the call and the bytes of the turn with another *number*; no bytes when it is longer."""
        packed, made = self.packed, b"\r\n%d\r\n" % self.number
        if packed is not None:
            packed = packed.replace(made, b"\r\n%d\r\n" % number, 1) if len(str(number)) == len(made) - 4 else None
        return operations.numbered_turn(self.call, number), packed


class QueueConsumer:
    """A consumer of one queue: it leases jobs, hands them to the executor, and reports their ends, turn by turn."""

    def __init__(
        self, services: WorkerServices, connection: AsyncConnection, keys: QueueKeys, group: PartitionGroup,
        lease_ms: int,
    ) -> None:  # fmt: skip
        """
        Args:
            services: the parts of the worker.
            connection: the one to the queue's endpoint.
            keys: those of the queue.
            group: the partitions of its queue, with the weight of the queue among all of the worker.
            lease_ms: how long a lease lasts.
        """
        self._services, self.connection = services, connection
        self._lifecycle, self._capacity, self._executor = services.lifecycle, services.capacity, services.executor
        self.keys, self.queue, self.group, self.lease_ms = keys, keys.queue, group, lease_ms
        self._ageing = operations.ageing_flag(services.app.queue_ageing_ms(ids.logical(keys.queue)))
        self.shared_state, self.identity = services.shared_state, ""
        self.wake_list = self.own_wake_list = keys.wake.encode()
        """The keys of the lists whose tokens wake an idle worker, and this one."""
        self.held: dict[str, Attempt] = {}
        self.own_retries: dict[str, float] = {}
        """Of a burst, which waits for them: id → when the retry is due (monotonic)."""
        self.blobs: dict[str, str] = {}
        """Id → where the large body of the job lies."""
        self.part_writer = PartWriter(keys, connection, services.app.sealing, lambda: self.identity)
        self.report = TurnReport()
        self.changed_handlers: set[Handler] = set()
        """Those whose counters have moved since the last turn."""
        self._has_more = self._is_paused = self._expires = False
        self._is_woken = False  # a token was taken while a turn was under way, which may have come too early for it
        self.backlog = 0
        """Attempts that are leased here and have not started."""
        self.renewed_at = monotonic()
        """When a turn last renewed the lease (monotonic)."""
        self.has_left = False
        self.job_size = JobSizeEstimate()
        self.quarantine = Quarantine(
            lambda: self._executor.free, lambda slots: services.capacity.note_reserved(self, slots)
        )
        self.early_acks, self._series = EarlyAcks(), GroupSeries(self.held, self._start_next, self._return_unstarted)
        self._reaper, self._live_reports = Reaper(keys, connection, lease_ms), LiveReports(self._report_live)
        self.due_timer, self._scheduler = DueTimer(self._on_due), Scheduler(keys, services.app)
        self._delivery = SpawnDelivery(keys, services.app, self.schedule)
        self._intake: ListIntake | None = None
        if keys.foreign is not None:
            task = services.app.plain_lists[keys.queue].task or ""
            self._intake = ListIntake(keys, task, connection, self.on_token)
        self._handlers: dict[str, Handler] | None = None
        self._plain_handlers: dict[bytes, Handler] = {}
        self.number = 0
        """Of the last turn."""
        self._prepared: PreparedTurn | None = None
        self._in_flight: tuple[Call[TurnReply], TurnReport] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._turn_ended = asyncio.Event()
        self._sent_at, self._wanted = 0.0, 0
        self._report_timer: asyncio.TimerHandle | None = None
        self._is_scheduled = self._is_looking = self._is_absorbing = False
        self._takes_plainly = False  # the jobs leased last are run as they are: nothing is reported before
        self._clock_offset, self.has_more = 0.0, True  # server ms minus our monotonic ms

    # -- membership -----------------------------------------------------------------------------------------------

    async def register(self) -> None:
        """Make a new identity, tell the supervisor, then register it in Redis."""
        if self.identity:
            self.wake_self()  # a call that blocks covers the list of the former identity, where nobody calls any more
        self.identity, self.number = ids.new_identity(), 0
        self.own_wake_list = self.keys.wake_of(self.identity).encode()
        if self._services.slot is not None:
            self._services.slot.set_identity(self.keys, self.identity, self.lease_ms)
        about = self._services.describe(self.group.weight / self.keys.partitions)
        tasks = self._services.app.definitions
        call = operations.register(self.keys, self.identity, self.lease_ms, about, tasks=tasks)
        now = await register(self._services.app, self.connection, self.keys, call)
        self._clock_offset = now - monotonic() * 1000
        self._sent_at = monotonic()

    def begin(self, stack: AsyncExitStack) -> None:
        """Start leasing."""
        if self._intake is not None:
            self._intake.start()
            stack.push_async_callback(self._intake.close)
        self._advance()

    async def leave(self) -> None:
        """Send what is left to report and take the registration away; nothing that is still held is charged."""
        self.due_timer.close()
        self._live_reports.close()
        self._series.close()
        if self._report_timer is not None:
            self._report_timer.cancel()
        await self._until_turn_ended()
        if self.report:
            self._send_turn(0)
            await self._until_turn_ended()
        await asyncio.gather(*(one.finish(2.0) for one in (self._delivery, self._scheduler, self.part_writer)))
        self.has_left = True
        try:
            await self.connection.run(operations.reap(self.keys, self.identity, crashed=False), retry_for=2.0)
        except ConveyorError as error:
            log.warning("queue %s: this worker could not leave: %s", self.queue, error)

    async def _until_turn_ended(self) -> None:
        """Wait until no turn is on its way: its reply decides what is left to report."""
        while self._in_flight is not None or self._recovery is not None:
            self._turn_ended.clear()
            await self._turn_ended.wait()

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def sealing(self) -> PayloadPipeline | None:
        """The keys of the app, with which it seals what it stores of jobs."""
        return self._services.app.sealing

    @property
    def now_ms(self) -> int:
        """The server's time in ms, as far as it is known here."""
        return int(monotonic() * 1000 + self._clock_offset)

    def _set_clock(self, most: float, now: int) -> None:
        """
        Correct what is known of the server's clock by a reply that came just now.

        The server read *now* between the sending of the call, which gives *most*, and this moment. An estimate that runs ahead
        would date an error behind the end of its job.
        """
        self._clock_offset = max(now - monotonic() * 1000, min(self._clock_offset, most))

    @property
    def has_more(self) -> bool:
        """Whether there may be work: then it is asked for."""
        return self._has_more

    @has_more.setter
    def has_more(self, has_more: bool) -> None:
        self._has_more = has_more
        self._note_work()

    def _note_work(self) -> None:
        possible = self._has_more and not self._is_paused and len(self.held) < MOST_HELD
        self._capacity.note_work(self, possible=possible)

    @property
    def has_capacity(self) -> bool:
        """True when it could lease jobs and there were none: then its wake-up list is listened to."""
        return self.would_take and self._capacity.has_room

    @property
    def would_take(self) -> bool:
        """True when it has no work and would take some if the worker had room."""
        return not self._has_more and len(self.held) < MOST_HELD

    @property
    def is_turning(self) -> bool:
        """True while a turn is under way."""
        return self._in_flight is not None or self._recovery is not None

    @property
    def pause(self) -> float:
        """Longest pause between two turns in seconds."""
        return min(IDLE, self.lease_ms / 3000)

    @property
    def is_quiet(self) -> bool:
        """True when a turn would have nothing to say, so that an idle turn is enough."""
        if self._expires:
            return False  # each turn says that the queue is in use
        busy = self.held or self.report or self.is_turning or self.changed_handlers or self.quarantine.in_use
        return not (busy or self._intake is not None or self.has_left or self._reaper.has_suspects)

    @property
    def busy(self) -> bool:
        """True while it holds jobs or has something to report."""
        under_way = self._delivery.busy or (self._intake is not None and self._intake.loading)
        return bool(self.held or self.report or self._in_flight or self._recovery or self.early_acks or under_way)

    @property
    def drained(self) -> bool:
        """True when nothing is left that this worker could do: for a burst."""
        if self.has_more or self.busy:
            return False
        if not self.due_timer.is_set:
            self.own_retries.clear()  # nothing is scheduled, so another worker took them
        return not self.own_retries

    def running(self, *, early: bool = True) -> Iterator[Attempt]:
        """Yield the attempts that have not ended; with *early* also those whose jobs Redis no longer has."""
        for attempt in (*self.held.values(), *(self.early_acks.acknowledged if early else ())):
            if attempt.ended == 0.0:
                yield attempt

    # -- when to make a turn --------------------------------------------------------------------------------------

    def schedule(self, *, at_once: bool = False) -> None:
        """Make a turn at the next pass of the event loop, so that many ends make one turn; or *at_once*."""
        if at_once and not self._is_scheduled and not self._is_absorbing:
            self._advance()
        elif not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._advance)

    def on_element(self, element: bytes) -> bool:
        """Act on an element of a wake-up list; return whether it was a token, and no command to this worker."""
        command = read_command(self.keys, element) if element[:1] == b"{" else None
        if command is None:
            self.on_token()
            return True
        if command.action == "logs":
            attempt = self.held.get(command.job)
            if attempt is not None and attempt.ended == 0.0:
                attempt.follow(FOLLOWED)
        else:
            self._services.carry_out(self, command)
        return False

    def on_token(self) -> None:
        """Make a turn, with or without room, because a wake-up token was taken."""
        is_turning = self.is_turning
        self.has_more = True
        if is_turning:
            self._is_woken = True
        else:
            self._send_turn(self._capacity.room(self))

    def _on_due(self) -> None:
        if not self.is_turning and not self._lifecycle.stopping:
            self._send_turn(self._capacity.room(self))

    def renew(self) -> None:
        """Make a turn if none was made lately: it renews the lease, reconciles, and looks for work and for the dead."""
        now = monotonic()
        if self.is_turning:
            if now - self._sent_at >= LATE:
                self._capacity.note_work(self, possible=False)  # its server does not answer: other partitions lease
                self._capacity.offer()
            return
        if self._has_more and len(self.held) >= MOST_HELD:
            self._note_work()  # its jobs run for long, and it takes no more until some have ended: other partitions lease
            self._capacity.offer()
        if self.quarantine.in_use:
            self._put_off_late()
        if now - self._sent_at >= 0.95 * self.pause or now >= self._reaper.due_at:
            self._send_turn(self._capacity.room(self))

    def on_idle_turn(
        self, number: int, clock_offset: float, *, needs_turn: bool, now: int, next_due: int | None
    ) -> None:
        """Act on what an idle turn found here, unless another turn than *number* was sent meanwhile."""
        if number != self.number or self.is_turning or self.has_left:
            return
        if needs_turn:
            self.on_token()
            return
        self._set_clock(clock_offset, now)
        self._note_renewal()
        if not self._lifecycle.stopping:
            self.due_timer.watch(next_due, now)

    def _note_renewal(self) -> None:
        self.renewed_at = monotonic()
        if self._services.slot is not None:
            self._services.slot.note_renewal(self.identity)

    def _advance(self) -> None:
        """Make a turn if there is something to report or to lease; else wait for work."""
        self._is_scheduled = False
        if self.is_turning:
            return
        if self.quarantine.reserved:
            self._advance_quarantine()
        leases = self._has_more or self.report.frees or self._series.wants_more
        want = self._capacity.room(self) if leases else 0
        if want > 0:
            self._send_turn(want)
        elif self.report.done or self.report.others:
            if not self._report_waits():
                self._send_turn(0)
        else:
            if self._intake is not None and self.has_capacity:
                self._intake.has_capacity.set()
            self._services.listen(self)

    def _report_waits(self) -> bool:
        """
        Tell whether ends of jobs wait for others a moment: another partition leases, and jobs of this one are to begin.

        Else the jobs that are left when a partition gives its turn to the next would cost a turn for every few of them.
        """
        if self.backlog == 0 or not self.group.leads_another(self):
            return False
        if self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(REPORT_AFTER, self._report_now)
        return not self._lifecycle.stopping

    def _report_now(self) -> None:
        self._report_timer = None
        if not self.is_turning and (self.report.done or self.report.others):
            self._send_turn(self._capacity.room(self))

    # -- one turn -------------------------------------------------------------------------------------------------

    def _send_turn(self, want: int) -> None:
        if self.has_left or self._lifecycle.stopped or self._executor.fork_guard.is_copy:
            return
        report, self.report = self.report, TurnReport()
        self._drain_counters(report)
        now = monotonic()
        if report.frees:
            self._series.note_ends(report.frees, report.seconds)
            self._series.note_pace(report.frees, now)
        self._is_looking = now >= self._reaper.due_at
        self.number = operations.next_turn_number(self.number, self.now_ms)
        prepared, self._prepared = self._prepared, None
        if prepared is not None and not self._is_looking and prepared.fits(self.identity, want, report):
            want = prepared.want
            call, packed = prepared.numbered(self.number)
        else:
            flags, packed = ("el" if self._is_looking else "e") + self._ageing + self._series.ask(), None
            call = operations.turn(self.keys, self.identity, self.number, want, self.lease_ms, report, flags=flags)
        self._in_flight = (call, report)
        self._sent_at = now
        self._wanted = want
        if self._intake is not None:
            self._intake.has_capacity.clear()
            if want > 0:
                self._intake.send(want)
        # At once: jobs that are about to run would keep the loop, and Redis would work after them instead of beside them.
        self.connection.send(call.command(), self._on_reply, at_once=True, packed=packed)

    def prepare(self) -> None:
        """
        Make the command of the next turn while nothing is to be done: it is sent as soon as a token is taken.

        It is that of an idle worker, also while other queues work: nothing is asked of this one when they have ended.
        """
        if self.held or self.report.done or self.report.others or self._has_more or self.is_turning:
            return  # the next turn has something to say, or comes now
        if self.has_left or self._lifecycle.stopping:
            return  # it leases nothing
        now_ms = self.now_ms
        want, number = self._capacity.idle_room(self), operations.next_turn_number(self.number, now_ms)
        call = operations.turn(self.keys, self.identity, number, want, self.lease_ms, TurnReport(), flags=self._ageing)
        self._prepared = PreparedTurn(self.identity, number, want, call, self.connection.pack(call.command()))

    def _drain_counters(self, report: TurnReport) -> None:
        """Move the counters since the last turn into *report*."""
        for handler in self.changed_handlers:
            handler.drain(report.stats, self.now_ms)
        self.changed_handlers.clear()

    def _on_reply(self, reply: Any) -> None:
        assert self._in_flight is not None
        call, report = self._in_flight
        if isinstance(reply, Exception):
            self._recovery = asyncio.get_running_loop().create_task(self._recover(call, report))
            return
        try:
            turn = call.decode(reply)
        except (WorkerUnregistered, StaleTurn) as error:
            self._recovery = asyncio.get_running_loop().create_task(self._start_over(error))
            return
        except WrongReply as error:
            self.connection.drop(error)
            self._recovery = asyncio.get_running_loop().create_task(self._recover(call, report))
            return
        self._absorb(turn, report)

    async def _recover(self, call: Call[TurnReply], report: TurnReport) -> None:
        """Repeat a turn whose reply was lost until it is answered; its number keeps it from being done twice."""
        try:
            turn = await self.connection.run(call, retry_for=None, longest_pause=longest_pause(self.lease_ms))
        except (WorkerUnregistered, StaleTurn) as error:
            await self._start_over(error)
            return
        except ConveyorError as error:
            log_repeated_error("queue %s: a turn was refused: %s", self.queue, error)
            self.report.put_back(report)
            await asyncio.sleep(random.uniform(0.5, 1.0))  # noqa: S311
            self._end_recovery()
            return
        self._recovery = None
        self._absorb(turn, report)

    async def _start_over(self, error: Exception) -> None:
        """Abandon all jobs and register anew: Redis has dropped this worker, and other workers have the jobs."""
        abandoned = list(self.held.values())
        log.warning("queue %s: the lease was lost (%s); %d jobs abandoned", self.queue, error, len(abandoned))
        self.held.clear()
        self.blobs.clear()
        for attempt in abandoned:
            self._lose(attempt)
        self._drain_counters(self.report)  # what was not accepted is not counted
        self.report, self.has_more = TurnReport(), True
        self.quarantine.clear()
        self.early_acks.clear()
        self._series.clear()
        try:
            await register_again(self)
        except PartitionCountMismatch as refused:  # this partition is not for this worker any more
            self._services.fail(refused)
            return
        self._end_recovery()

    def _end_recovery(self) -> None:
        self._recovery = self._in_flight = None
        self._turn_ended.set()
        self._note_work()
        self.schedule()

    # -- the reply of a turn --------------------------------------------------------------------------------------

    def _absorb(self, turn: TurnReply, report: TurnReport) -> None:
        self._is_absorbing = True
        try:
            self._settle_and_take(turn, report)
        except Exception as error:
            # A defect of Conveyor: end with the error. Jobs come back when the lease ends, or the supervisor sees the exit.
            self._services.fail(error)
        self._is_absorbing = False

    def _settle_and_take(self, turn: TurnReply, report: TurnReport) -> None:
        self._in_flight = None
        wanted, sent_at, is_looking = self._wanted, self._sent_at, self._is_looking
        self._set_clock(turn.now - sent_at * 1000, turn.now)
        self._note_renewal()
        held = self.held
        self._drop_settled(turn, report)
        for id_ in turn.cancelled:  # before anything starts that waited for this reply
            if id_ in held:
                self._cancel(held[id_])
        if report.spawned or turn.outbox:
            self._delivery.begin()
        if turn.schedules:
            self._scheduler.begin(turn.schedules)
        if self.quarantine.in_use:
            self._submit(self.quarantine.confirmed(report, held))
        if self.early_acks.waiting:
            self._submit(self.early_acks.confirmed(report))
        self._is_paused, was_woken, self._is_woken = turn.paused, self._is_woken, False
        self._expires = turn.expires
        self._has_more = was_woken or turn.more or (len(turn.ids) >= wanted > 0)
        self._note_work()
        if turn.ids:
            self.group.note_turn(self)
            self._send_first(turn)
            self._take(turn, sent_at)
        if self.quarantine.in_use:
            self._advance_quarantine()
        self._capacity.note_held(self, bool(held or self.early_acks.waiting or self.early_acks.acknowledged))
        if is_looking:
            self._reaper.look(turn, self.identity)
        if turn.held != len(held) and not self.is_turning:
            self._recovery = asyncio.get_running_loop().create_task(self._reconcile())
            return
        if not self._lifecycle.stopping:
            self.due_timer.watch(turn.next_due, turn.now, missed=wanted > 0 and not turn.ids)
        self._turn_ended.set()
        self._advance()
        if self._services.after_turn is not None:
            self._services.after_turn()
        if not self._has_more:
            self._capacity.offer()

    def _send_first(self, turn: TurnReply) -> None:
        """
        Make the next turn before the jobs of *turn* are taken, where it is one that follows anyway.

        A server that waited while attempts are made would take turns with the worker. Jobs that report before they start need
        the turn that follows, and those of a series that has ended go back in it: then it is made after them.
        """
        count = len(turn.ids)
        if count < SENT_FIRST or turn.has_series or turn.held != len(self.held) + count:
            return
        if not (self._has_more and self._takes_plainly):
            return
        want = self._capacity.room(self, coming=count)
        if want > 0:
            self._send_turn(want)

    def _cancel(self, attempt: Attempt) -> None:
        """Stop an attempt whose cancellation was asked; one that runs is answered for, and one that has not begun ends."""
        if attempt.ended == 0.0 and attempt.stop_reason is None:
            self._executor.stop(attempt, "cancel")
            if attempt.ended == 0.0:
                self.report.others.append(Settlement("K", attempt.id))

    def _drop_settled(self, turn: TurnReply, report: TurnReport) -> None:
        held = self.held
        for id_ in report.done:
            held.pop(id_, None)
        for one in report.others:
            if not one.stays:
                held.pop(one.id, None)
        for id_ in turn.lost:
            self._on_refused(id_)
        if turn.missing:
            eviction.log_missing_jobs(log, self.queue, turn.missing)
        if self.blobs:
            self._services.loader.delete_bodies(self, report, turn.lost)

    def _take(self, turn: TurnReply, sent_at: float) -> None:
        """Turn what was leased into attempts, and hand them over. *sent_at*: when the turn was sent (monotonic)."""
        handlers = self._handlers
        if handlers is None:
            handlers = self._load_handlers()
        held, lookup, states = self.held, self._plain_handlers, turn.states
        self.job_size.note(turn.envelopes)
        series = self._series if turn.has_series else None
        attempts = []
        for at, (id_, data) in enumerate(zip(turn.ids, turn.envelopes, strict=True)):
            end = data.find(b"\n", 1)
            handler = lookup.get(data[: end + 2])  # a plain job's envelope: \n, its task, \n, an object
            if handler is not None:
                attempt = Attempt(self, handler, id_, data[end + 1 :], PLAIN_ENVELOPE)
            elif data[:1] == b"\t" and (made := load_attributes(self, lookup, id_, data, end)) is not None:
                attempt = made
            else:
                attempt = self._services.loader.load(self, handlers, id_, data)
            held[id_] = attempt
            if states and states[at] is not None:
                attempt.load_state(states[at])  # type: ignore[arg-type]
                self.own_retries.pop(id_, None)
            if series is not None and series.follows(attempt):
                continue
            if attempt.handler.kind == "unknown":
                self._services.loader.set_aside(attempt)
            elif attempt.handler.early:
                self.early_acks.add(attempt, self.report)
            elif attempt.crashed_before:
                self.quarantine.add(attempt)
            else:
                attempts.append(attempt)
        if series is not None:
            series.begin(sent_at)
        self._takes_plainly = len(attempts) == len(turn.ids) and self._executor.gatherer is None
        if self._lifecycle.draining:
            self.hand_back()
        else:
            self._submit(attempts)

    def _load_handlers(self) -> dict[str, Handler]:
        """Make the handlers of all tasks, by name, and by what the envelope of a job that needs nothing more begins with."""
        raw = self.keys.foreign is not None
        refusal, app = self._executor.processes.refusal, self._services.app
        handlers = {
            name: Handler(task, raw=raw, limits=app.limits_of(task, self.queue))
            if task.run_in != "process" or (error := refusal(task)) is None
            else Handler.unknown(name, error)
            for name, task in app.definitions.items()
        }
        self._plain_handlers = self._services.loader.plain_handlers(self.queue, handlers, foreign=raw)
        self._handlers = handlers
        return handlers

    def _submit(self, attempts: list[Attempt]) -> None:
        if attempts:
            self._capacity.note_backlog(self, len(attempts))
            self._executor.submit(attempts)

    def _start_next(self, attempt: Attempt) -> None:
        self._capacity.note_backlog(self, 1)
        self._executor.submit_next(attempt)

    def _advance_quarantine(self) -> None:
        for attempt in self.quarantine.advance(self.report, self.held):
            attempt.ended = monotonic()
            self._services.settlement_writer.poison(self.report, attempt, self.now_ms)

    def _put_off_late(self) -> None:
        """Put off those that wait here for others to end, each for another time, so that workers share them."""
        late = [one for one in self.quarantine.take_late() if self.holds(one) and one.ended == 0.0]
        for attempt in late:
            attempt.ended = monotonic()
            ms = random.randint(*PUT_OFF_MS)  # noqa: S311
            # With its history as it was leased: no attempt is used.
            self._services.settlement_writer.put_off(self.report, attempt, ms, attempt.history)
        if late:
            self.schedule()

    def _on_refused(self, id_: str) -> None:
        attempt = self.held.pop(id_, None)
        log.warning(
            "job %s: its outcome was refused, because its lease was lost", ids.clean(ids.public(self.queue, id_))
        )
        self.early_acks.forget(id_)
        if attempt is not None:
            self._lose(attempt)

    def _lose(self, attempt: Attempt) -> None:
        self.part_writer.forget(attempt)
        self._executor.stop(attempt, "lost")
        self._services.app.emit(JobLost(attempt.public_id, attempt.handler.name, self.queue, attempt.number))

    async def _reconcile(self) -> None:
        """Drop jobs that Redis does not list as held here, and give back those that it lists besides: the counts differ."""
        gone, unknown = await differences(self)
        for id_ in gone:
            self._lose(self.held.pop(id_))
        self.report.others += [Settlement("F", id_) for id_ in unknown]
        self._recovery = None
        self._turn_ended.set()
        self._note_work()
        self.schedule()

    # -- attempts -------------------------------------------------------------------------------------------------

    def on_started(self, attempt: Attempt) -> None:
        """Note that an attempt started, and tell listeners."""
        if JobStarted in self._services.app.listeners:
            self.announce(attempt)
        # As `note_backlog`, without a call, since it is once for each job.
        self.backlog -= 1
        self.group.backlog -= 1
        self._capacity.backlog -= 1

    def note_backlog(self, change: int) -> None:
        """Count a batch of this queue that waits for a slot, or has one."""
        self._capacity.note_backlog(self, change)

    def announce(self, attempt: Attempt) -> None:
        """Tell listeners that an attempt starts."""
        if JobStarted in self._services.app.listeners:
            self._services.app.emit(JobStarted(attempt.public_id, attempt.handler.name, self.queue, attempt.number))

    def on_abandoned(self) -> None:
        """Note that an attempt left the backlog without starting."""
        self._capacity.note_backlog(self, -1)

    def on_finished(self, attempt: Attempt) -> None:
        """Note that an attempt ended: the next of its series, or of the quarantine, may start."""
        if self._series.running:
            self._series.on_finished(attempt, self.report)
        if attempt.handler.early:
            self.early_acks.acknowledged.discard(attempt)
        if attempt.crashed_before or attempt.handler.early:
            self.quarantine.on_finished(attempt)
            self._advance_quarantine()

    def holds(self, attempt: Attempt) -> bool:
        """Tell whether *attempt* is still leased here, so that its end counts."""
        return self.held.get(attempt.id) is attempt

    def move_deadline(self, attempt: Attempt, seconds: float) -> None:
        """Set the deadline of *attempt* that many seconds ahead."""
        self._executor.deadlines.move(attempt, seconds)

    def encode_part(self, value: object) -> bytes:
        """Return the bytes of a partial result, not sealed yet; raises PayloadError."""
        return self._services.app.part_codec.encode(value)

    def note_retry(self, attempt: Attempt, ms: int) -> None:
        """Note that a job of *attempt* is due again so many ms from now: a burst waits for it."""
        if self._services.is_burst:  # another worker may take it, so that others would remember it for ever
            self.own_retries[attempt.id] = monotonic() + ms / 1000

    def note_change(self, attempt: Attempt) -> None:
        """Note that an attempt said something new of itself, which is written soon; from any thread."""
        self._live_reports.note(attempt)

    def _report_live(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            if attempt.ended == 0.0 and self.holds(attempt):
                self._services.settlement_writer.report_live(self.report, attempt)
        if self.report:
            self.schedule()

    def give_way(self, seconds: float) -> None:
        """Let other workers be first for so many seconds: what comes due then are jobs that this one cannot run."""
        self.due_timer.give_way(seconds)

    def hand_back(self) -> None:
        """Return what has not started to the front of the queue, in its order."""
        self._series.end_all()
        # One that take_back refuses is started by a thread just now.
        self._return_unstarted([one for one in self._unstarted() if self._executor.take_back(one)])

    def _return_unstarted(self, attempts: list[Attempt]) -> None:
        """Return *attempts*, the youngest first, to the front of the queue."""
        returned = TurnReport()
        for attempt in attempts:
            attempt.ended = monotonic()
            self._services.settlement_writer.handed_back(returned, attempt, started=False)
        self.report.others[:0] = returned.others  # before those returned earlier, since they are younger
        self.schedule()

    def _unstarted(self) -> list[Attempt]:
        """Return what was leased and has not started, the youngest first; an early ack that has not left is taken back."""
        unstarted, report = [], self.report
        for attempt in reversed(self.held.values()):
            if attempt.started == 0.0 == attempt.ended:
                if attempt.handler.early:
                    if attempt.id not in report.done:
                        continue  # its ack is on the way: no other worker would run it
                    report.done.remove(attempt.id)
                    report.attributes.pop(attempt.id, None)
                unstarted.append(attempt)
        return unstarted

    def wake_self(self) -> None:
        """Wake the blocked listener of this worker: it listens to one list too few."""
        wakeup.wake(self.connection, self.keys.wake_of(self.identity))

    def __repr__(self) -> str:
        return f"<Consumer {self.queue}: {len(self.held)} held, {self.backlog} waiting>"
