"""One worker in one event loop: consumers that lease, an executor that runs, and the end of both."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from conveyor import ids
from conveyor.errors import QueueFull, StoreUnavailable
from conveyor.events import WorkerStarted, WorkerStopped
from conveyor.jobs.core import core_of
from conveyor.jobs.hooks import run_through, wraps_runs
from conveyor.payload import failures
from conveyor.store import operations
from conveyor.store.operations import MOST_HELD, TurnReport
from conveyor.store.transport import eviction
from conveyor.worker import settlement
from conveyor.worker.attempt import Attempt, Handler, details
from conveyor.worker.execution.executor import Executor
from conveyor.worker.execution.processes import ProcessCrashed, ProcessPool
from conveyor.worker.job_loader import JobLoader
from conveyor.worker.leasing.heartbeat import Watchdog
from conveyor.worker.leasing.membership import served, weighted
from conveyor.worker.leasing.prefetch import Prefetch
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.leasing.wakeup import WorkerConnections
from conveyor.worker.recycling import RecycleLimits
from conveyor.worker.shutdown import BurstMonitor, DrainMonitor, running, unstarted

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor
    from conveyor.worker.shared_memory import ChildSlot

log = logging.getLogger("conveyor.worker")
BATCH = MOST_HELD // 2
"""Jobs leased per turn at most: half of what may be held runs while Redis serves the other half (+25 % at full speed)."""
RETIRED = 75
"""Exit code of a child that asks to be replaced: one of its threads does not end."""


class Worker:
    """Leases and runs jobs until it is told to stop; everything it holds is handed back or settled then."""

    def __init__(
        self, app: Conveyor, *, queues: Mapping[str, float] | None = None, concurrency: int = 100, threads: int = 8,
        burst: bool = False, grace: float = 30.0, slot: ChildSlot | None = None, reference: str | None = None,
        quota: RecycleLimits | None = None, await_until: float = 0.0, before_leasing: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Take the app, its queues with their weights (default: those of its tasks), and the limits.

        `concurrency` jobs at once, at most `threads` of them plain functions; `grace` seconds for running
        jobs at a stop; `burst` ends when everything is drained; `reference` is the app's ``module:object``; a used up
        `quota` makes it ask to be replaced, which takes a supervisor; no burst ends before `await_until` (monotonic);
        `before_leasing` is called once every queue is registered, before the first job is leased.
        """
        self.app = core_of(app)
        self.name = f"{platform.node()}:{os.getpid()}"
        self.stopping = False
        self.stopped = False
        self.retiring = False
        self.state: Mapping[str, Any] = {}
        self.consumers: list[QueueConsumer] = []
        self.settling = settlement.SettlementWriter(self.app, self.name)
        self._seats = None if slot is None else slot.seats()
        self.unusual = JobLoader(self.app, self.settling, self.name, self._seats)
        self.last_renewal = self.last_tick = monotonic()
        self._queues = weighted(self.app, queues)
        self._limits = (concurrency, threads)
        self._quota = quota or RecycleLimits(None, None)
        self._burst = BurstMonitor(until=await_until) if burst else None
        self._grace, self._slot, self._reference = grace, slot, reference
        self._before_leasing = before_leasing
        self._handlers: dict[str, dict[bytes, Handler]] = {}
        self._named: dict[str, dict[str, Handler]] = {}
        self._prefetch = Prefetch()
        self._ending = DrainMonitor()
        self.ready = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of the queues it takes from."""
        return tuple(self._queues)

    # -- life -----------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Work until `stop()`, or with burst until everything is drained; return the exit code."""
        async with AsyncExitStack() as stack:
            started = await self._started(stack)
            await self._stop_asked.wait()
            if self._failure is not None:
                self.stopped = True
                raise self._failure
            if not started:
                return 0
            await self._drain()
        return RETIRED if self.retiring else 0

    async def _started(self, stack: AsyncExitStack) -> bool:
        """Start, however long Redis is away; False when a stop was asked for before that."""
        starting = asyncio.create_task(self.start(stack))
        asked = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if starting.done():
            await starting
            return True
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        met = [one for one in self.consumers if one.identity and one.wire.is_open]
        await asyncio.gather(*(consumer.leave() for consumer in met))  # its registration may be on the way already
        return False

    async def start(self, stack: AsyncExitStack) -> None:
        """Connect, run the lifespan, register, and begin."""
        self.harbour = WorkerConnections(self, self.app.client)
        stack.push_async_callback(self.harbour.close)
        self.state = await stack.enter_async_context(self.app.lifespan_context())
        concurrency, threads = self._limits
        chain = [middleware for middleware in self.app.run_middlewares if wraps_runs(middleware)]
        self.executor = Executor(
            concurrency=concurrency, threads=threads, processes=ProcessPool(
                self._reference, os.cpu_count() or 1, max_jobs=self._quota.max_jobs, max_memory=self._quota.max_memory
            ),
            ended=self.ended, stuck=self._is_stuck, kinds={task.run_in for task in self.app.definitions.values()},
            unusual=self.unusual, seats=self._seats,
            chain=(lambda context, call: run_through(chain, context, call)) if chain else None,
        )  # fmt: skip
        stack.push_async_callback(self.executor.close)
        for queue, weight in self._queues.items():
            places, lease_ms = await served(self.app, queue), self.app.queue_lease_ms(queue)
            for keys in places:
                consumer = QueueConsumer(self, self.harbour.berth(keys), keys, weight / len(places), lease_ms)
                self.consumers.append(consumer)
        for consumer in self.consumers:
            await consumer.register()
            # A full Redis takes no name; whoever pushes there makes the queue known.
            with suppress(QueueFull, StoreUnavailable):
                await self.app.client.aannounce(consumer.keys)
        self._quota.begin()
        watchdog = Watchdog(self._on_the_loop, self._tick, None if self._slot is None else self._slot.set_job)
        watchdog.start()
        stack.callback(watchdog.close)
        eviction_watch = asyncio.create_task(eviction.watch(self._informations, log))
        stack.callback(eviction_watch.cancel)
        self._before_leasing()
        self.app.emit(WorkerStarted(self.name))
        for consumer in self.consumers:
            consumer.begin(stack)
        self.ready.set()

    async def _informations(self) -> list[Any]:
        """Return what each server that holds a queue of ours says of itself."""
        return [await wire.ask("INFO", patience=5.0) for wire in {one.wire: None for one in self.consumers}]

    def stop(self) -> None:
        """Drain: lease no more, and give what runs its grace."""
        self._stop_asked.set()

    def hurry(self) -> None:
        """Drain, and hand everything back at once."""
        self._ending.hurry()
        self.stop()

    def fail(self, error: BaseException) -> None:
        """End with *error*: `run()` raises it."""
        self._failure = self._failure or error
        self.stopping = True
        self._stop_asked.set()

    def quiet(self) -> None:
        """Lease nothing more; what runs goes on."""
        self.stopping = True

    async def _drain(self) -> None:
        self.stopping = True
        for consumer in self.consumers:
            self.hand_back(consumer)
            consumer.schedule()
        await self._ending.wait(self.consumers, self._grace)
        late, every = list(running(self.consumers, early=False)), list(running(self.consumers))
        if late:
            jobs = "1 job that is" if len(late) == 1 else f"{len(late)} jobs that are"
            log.warning("worker %s: handing back %s still running", self.name, jobs)
        if len(every) > len(late):
            log.warning("cutting off %d jobs: an early ack cannot be taken back", len(every) - len(late))
        for attempt in every:
            self.executor.stop(attempt, "stop")
        await self._ending.wait(self.consumers, 1.0, hurry=False)
        for attempt in list(running(self.consumers, early=False)):
            attempt.ended = monotonic()  # a thread, or a coroutine that swallows its cancellation: it dies with us
            if attempt in self._ending.stuck:
                self._settle(attempt, None, None)
            else:
                self.settling.handed_back(attempt.consumer.report, attempt, started=True)
        try:
            async with asyncio.timeout(5.0):
                await asyncio.gather(*(consumer.leave() for consumer in self.consumers))
        except TimeoutError:
            log.warning("Redis does not answer; what is still held comes back when its lease ends")
        if self._slot is not None and self._burst is not None:
            due = [at for consumer in self.consumers for at in consumer.own_retries.values()]
            self._slot.await_until = max(self._burst.until, 0.0, *(at + 1.0 for at in due))
        self.stopped = True
        self.app.emit(WorkerStopped(self.name))

    @property
    def draining(self) -> bool:
        """Whether nothing is started any more."""
        return self._stop_asked.is_set()

    def hand_back(self, consumer: QueueConsumer) -> None:
        """Return what has not started to the front of its queue, in its order."""
        returned = TurnReport()
        for attempt in unstarted(consumer):
            self.executor.take_back(attempt)
            attempt.ended = monotonic()
            self.settling.handed_back(returned, attempt, started=False)
        consumer.report.others[:0] = returned.others  # before those returned earlier, since they are younger

    # -- for consumers --------------------------------------------------------------------------------------------

    def room(self, consumer: QueueConsumer) -> int:
        """Return how many jobs *consumer* may lease now."""
        if self.stopping:
            return 0
        waiting = sum(one.backlog for one in self.consumers)
        reserved = sum(one.antechamber.reserved for one in self.consumers)
        free = self.executor.free + waiting - reserved  # slots that nobody runs in
        rivals = [one for one in self.consumers if (one.more and not one.paused) or one is consumer]
        capacity = free + self._prefetch.ahead(consumer.backlog > 0)
        if self._quota.is_limited:
            capacity = min(capacity, waiting + self._quota.left(self._taken))
        room = self._prefetch.share(capacity, waiting, consumer, rivals)
        settled = len(consumer.report.done) + len(consumer.report.others)  # given back before more is taken
        return max(0, min(room, BATCH, consumer.sizes.most, MOST_HELD - len(consumer.held) + settled))

    def handlers(self, consumer: QueueConsumer) -> dict[bytes, Handler]:
        """Return the handlers of *consumer* by what the envelope of a job that needs nothing more begins with."""
        found = self._handlers.get(consumer.queue)
        if found is None:
            foreign = consumer.keys.foreign is not None
            named = {name: Handler(task, raw=foreign) for name, task in self.app.definitions.items()}
            self._named[consumer.queue] = named
            found = self._handlers[consumer.queue] = self.unusual.fast(consumer.queue, named, foreign=foreign)
        return found

    def arrive(self, consumer: QueueConsumer, id_: str, data: bytes) -> Attempt:
        """Make an attempt of a job that is more than a name and JSON, or that cannot run here."""
        self.handlers(consumer)
        return self.unusual.arrive(consumer, self._named[consumer.queue], id_, data)

    def settle_stats(self, consumer: QueueConsumer, report: TurnReport) -> None:
        """Put the counters since the last turn into *report*."""
        for handler in consumer.worked:
            handler.drain(report.stats)
        consumer.worked.clear()

    def absorbed(self, consumer: QueueConsumer) -> None:
        """A turn was answered: see whether the burst is over."""
        self._end_burst()
        self._retire_if_worn()
        if not consumer.more and len(self.consumers) > 1:
            for one in self.consumers:  # it has no use for the room it was given: whose turn is it next?
                if one.more:
                    one.schedule()

    def _end_burst(self) -> None:
        if self._burst is not None and not self.stopping and self._burst.is_over(self.consumers, self._prefetch.ended):
            self.stop()

    def listen(self) -> None:
        """Wait for work, if nobody does."""
        self.harbour.listen()

    def note_identity(self, consumer: QueueConsumer) -> None:
        """Tell the supervisor under which identity we are about to register."""
        if self._slot is not None:
            self._slot.set_identity(consumer.keys, consumer.identity, consumer.lease_ms)

    def note_renewal(self, consumer: QueueConsumer) -> None:
        """Tell the supervisor that the lease on a queue was renewed."""
        self.last_renewal = monotonic()
        if self._slot is not None:
            self._slot.renewed(consumer.identity)

    def about(self, consumer: QueueConsumer) -> bytes:
        """Return who we are, as Redis keeps it."""
        concurrency, threads = self._limits
        return operations.about(
            kind="worker", name=self.name, host=platform.node(), pid=os.getpid(), started=int(time() * 1000),
            concurrency=concurrency, threads=threads, weight=consumer.weight, tasks=len(self.app.definitions),
        )  # fmt: skip

    # -- ends -----------------------------------------------------------------------------------------------------

    def ended(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        """Settle an attempt: called by the executor once for each."""
        consumer = attempt.consumer
        self._prefetch.ended += 1
        if consumer.holds(attempt):
            self._settle(attempt, value, error)
        elif error is not None and attempt.handler.early:
            failures.log_error(
                log, logging.ERROR, "✗ %s failed after its early ack: %s", attempt.label, details(error), error=error
            )
        consumer.ended(attempt)
        if attempt.handler.early:
            self._end_burst()  # no turn follows, which would see to it
        if self.stopping:
            self._ending.moved()
        if not self.executor.slots.backlog and len(self.consumers) == 1:
            consumer.schedule(at_once=True)
            return
        for one in self.consumers:
            if one is consumer or one.more or one.antechamber.reserved:
                one.schedule()

    def _settle(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        consumer, why = attempt.consumer, attempt.stopped
        consumer.worked.add(attempt.handler)
        report, now = consumer.report, consumer.now_ms
        unfinished = (
            attempt.started == 0.0 or isinstance(error, asyncio.CancelledError) or attempt in self._ending.stuck
        )
        if why == "cancel" and (unfinished or error is not None):
            self.settling.cancelled(report, attempt, now)
        elif why == "stop" and (unfinished or error is not None):
            self.settling.handed_back(report, attempt, started=attempt.started != 0.0)
        elif isinstance(error, ProcessCrashed) and why is None:
            self.settling.crashed(report, attempt, now, error)
        else:
            final = settlement.error_of(attempt, error)
            if final is None:
                self.settling.done(report, attempt, value, now)
            else:
                self.settling.failed(report, attempt, final, now)

    def _is_stuck(self, attempt: Attempt) -> None:
        """A thread outlived its time limit: take no more work, finish the rest, be replaced; its outcome is written at the end."""
        if attempt in self._ending.stuck or attempt.ended != 0.0:
            return
        self._ending.stuck.append(attempt)
        if self._slot is None:
            log.error(
                "E13 Job %s timed out and its thread cannot be killed; its lease is kept until it ends.", attempt.label
            )
            self.executor.threads.replace(attempt)
            return
        log.error(
            "E13 Job %s timed out and its thread cannot be killed; this process finishes its other jobs and is replaced.",
            attempt.label,
        )
        self._retire()

    def _retire(self) -> None:
        """Take no more work, finish the rest, and be replaced."""
        self.retiring = self.stopping = True
        if self._slot is not None:
            self._slot.retiring = True
        self._stop_asked.set()

    @property
    def _taken(self) -> int:
        """How many jobs it leased so far."""
        return self._prefetch.ended + sum(1 for _ in running(self.consumers))

    def _retire_if_worn(self) -> None:
        """Ask to be replaced when the quota is used up; of jobs not before all that were taken have started."""
        if not self._quota.is_limited or self.draining or (why := self._quota.used_up(self._taken)) is None:
            return
        waits = any(a.started == 0.0 == a.ended for one in self.consumers for a in one.held.values())
        if waits and self._quota.left(self._taken) == 0:
            return
        log.info("Process %d %s: it takes no more, and a fresh one takes its place", os.getpid(), why)
        self._retire()

    def _tick(self) -> None:
        self.last_tick = monotonic()
        if self._slot is not None:
            self._slot.tick()
            self._slot.clear_job()
        for consumer in self.consumers:
            consumer.renew()
        self._retire_if_worn()

    def _on_the_loop(self) -> tuple[str, str] | None:
        attempt = self.executor.slots.current
        return (attempt.handler.name, ids.clean(attempt.public_id)) if attempt is not None else None
