"""One worker in one event loop: consumers that lease, an executor that runs, and the end of both."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from conveyor import failure
from conveyor.errors import ConfigurationError, QueueFull, StoreUnavailable
from conveyor.event import WorkerStarted, WorkerStopped
from conveyor.middleware import run_through, runs
from conveyor.model import State, to_json
from conveyor.store import eviction, operations
from conveyor.store.operations import MOST_HELD, Report, Settlement
from conveyor.worker import settling
from conveyor.worker.attempt import Attempt, details
from conveyor.worker.berth import Harbour
from conveyor.worker.consumer import Consumer
from conveyor.worker.executor import Executor
from conveyor.worker.handler import Handler
from conveyor.worker.prefetch import Prefetch
from conveyor.worker.process import ProcessCrashed, Processes
from conveyor.worker.roll import served
from conveyor.worker.unusual import Unusual
from conveyor.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from conveyor.app import Conveyor
    from conveyor.worker.board import Slot

log = logging.getLogger("conveyor.worker")
BATCH = MOST_HELD // 2
"""Jobs leased per turn at most: half of what may be held runs while Redis serves the other half (+25 % at full speed)."""
RETIRED = 75
"""Exit code of a child that asks to be replaced: one of its threads does not end."""


class Worker:
    """Leases and runs jobs until it is told to stop; everything it holds is handed back or settled then."""

    def __init__(
        self, app: Conveyor, *, queues: Mapping[str, float] | None = None, concurrency: int = 100, threads: int = 8,
        burst: bool = False, grace: float = 30.0, slot: Slot | None = None, reference: str | None = None,
    ) -> None:  # fmt: skip
        """
        Take the app, its queues with their weights (default: those of its tasks), and the limits.

        `concurrency` jobs at once, at most `threads` of them plain functions; `grace` seconds for running
        jobs at a stop; `burst` ends when everything is drained; `reference` is the app's ``module:object``.
        """
        self.app = app
        self.name = f"{platform.node()}:{os.getpid()}"
        self.stopping = False
        self.stopped = False
        self.retiring = False
        self.state: Mapping[str, Any] = {}
        self.consumers: list[Consumer] = []
        self.settling = settling.Settling(app, self.name)
        self.unusual = Unusual(app, self.settling, self.name)
        self.last_renewal = self.last_tick = monotonic()
        fed = [name for name, listed in app.plain_lists.items() if listed.task]
        own = [task.queue for task in app.tasks.values()]
        self._queues = dict(queues) if queues else dict.fromkeys((*own, *fed), 1.0)
        for name in self._queues:
            if name in app.plain_lists and name not in fed:
                raise ConfigurationError(
                    f"The plain list '{name}' feeds no task, so a worker can do nothing with it. "
                    f"Declare app.plain_list('{name}', task=…), or consume it with app.plain_list('{name}').consume()."
                )
        if not self._queues:
            raise ConfigurationError("This worker has no queue: the app has no tasks and none was named with -q.")
        self._limits = (concurrency, threads)
        self._burst, self._grace, self._slot, self._reference = burst, grace, slot, reference
        self._handlers: dict[str, dict[bytes, Handler]] = {}
        self._named: dict[str, dict[str, Handler]] = {}
        self._prefetch = Prefetch()
        self._stuck: list[Attempt] = []
        self.ready = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._moved = asyncio.Event()
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
        self.harbour = Harbour(self, self.app.backend)
        stack.push_async_callback(self.harbour.close)
        self.state = await stack.enter_async_context(self.app.lifespan_context())
        concurrency, threads = self._limits
        chain = [middleware for middleware in self.app.middlewares if runs(middleware)]
        self.executor = Executor(
            concurrency=concurrency, threads=threads, processes=Processes(self._reference, os.cpu_count() or 1),
            ended=self.ended, stuck=self._is_stuck, kinds={task.run_in for task in self.app.tasks.values()},
            unusual=self.unusual,
            chain=(lambda context, call: run_through(chain, context, call)) if chain else None,
        )  # fmt: skip
        stack.push_async_callback(self.executor.close)
        for queue, weight in self._queues.items():
            places, lease_ms = await served(self.app, queue), self.app.queue_lease_ms(queue)
            for keys in places:
                consumer = Consumer(self, self.harbour.berth(keys), keys, weight / len(places), lease_ms)
                self.consumers.append(consumer)
        for consumer in self.consumers:
            await consumer.register()
            # A full Redis takes no name; whoever pushes there makes the queue known.
            with suppress(QueueFull, StoreUnavailable):
                await self.app.backend.aannounce(consumer.keys)
        watchdog = Watchdog(self._on_the_loop, self._tick, None if self._slot is None else self._slot.set_job)
        watchdog.start()
        stack.callback(watchdog.close)
        vigil = asyncio.create_task(eviction.watch(self._informations, log))
        stack.callback(vigil.cancel)
        self.app.emit(WorkerStarted(self.name))
        for consumer in self.consumers:
            consumer.begin(stack)
        self.ready.set()

    async def _informations(self) -> list[Any]:
        """Return what each server that holds a queue of ours says of itself."""
        return [await wire.ask("INFO", patience=5.0) for wire in {one.wire: None for one in self.consumers}]

    def stop(self) -> None:
        """Stop: the first call drains, the second hands everything back at once."""
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

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
            for attempt in reversed(list(consumer.held.values())):
                if attempt.handler.early and attempt.id not in consumer.report.done:
                    continue  # its ack is on the way: nobody else would run it
                if attempt.started == 0.0 and attempt.ended == 0.0:
                    if attempt.handler.early:
                        consumer.report.done.remove(attempt.id)
                    self.executor.take_back(attempt)
                    attempt.ended = monotonic()
                    self.settling.handed_back(consumer.report, attempt, started=False)
            consumer.schedule()
        await self._wait_for_ends(self._grace)
        running = [a for consumer in self.consumers for a in consumer.held.values() if a.ended == 0.0]
        if running:
            log.warning("handing back %d jobs that are still running", len(running))
        for attempt in running:
            self.executor.stop(attempt, "stop")
        await self._wait_for_ends(1.0, hurry=False)
        for consumer in self.consumers:
            for attempt in consumer.held.values():
                if attempt.ended == 0.0:  # a thread, or a coroutine that swallows its cancellation: it dies with us
                    attempt.ended = monotonic()
                    if attempt in self._stuck:
                        self._settle(attempt, None, None)
                    else:
                        self.settling.handed_back(consumer.report, attempt, started=True)
        try:
            async with asyncio.timeout(5.0):
                await asyncio.gather(*(consumer.leave() for consumer in self.consumers))
        except TimeoutError:
            log.warning("Redis does not answer; what is still held comes back when its lease ends")
        self.stopped = True
        self.app.emit(WorkerStopped(self.name))

    async def _wait_for_ends(self, seconds: float, *, hurry: bool = True) -> None:
        deadline = monotonic() + seconds
        while any(a.ended == 0.0 and a not in self._stuck for c in self.consumers for a in c.held.values()):
            left = deadline - monotonic()
            if left <= 0 or (hurry and self._hurry.is_set()):
                return
            self._moved.clear()
            waits = [asyncio.ensure_future(self._moved.wait()), asyncio.ensure_future(self._hurry.wait())]
            await asyncio.wait(waits[: 2 if hurry else 1], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    # -- for consumers --------------------------------------------------------------------------------------------

    def room(self, consumer: Consumer) -> int:
        """Return how many jobs *consumer* may lease now."""
        if self.stopping:
            return 0
        waiting = sum(one.backlog for one in self.consumers)
        reserved = sum(one.antechamber.reserved for one in self.consumers)
        free = self.executor.free + waiting - reserved  # slots that nobody runs in
        rivals = [one for one in self.consumers if (one.more and not one.paused) or one is consumer]
        capacity = free + self._prefetch.ahead(consumer.backlog > 0)
        room = self._prefetch.share(capacity, waiting, consumer, rivals)
        settled = len(consumer.report.done) + len(consumer.report.others)  # given back before more is taken
        return max(0, min(room, BATCH, consumer.sizes.most, MOST_HELD - len(consumer.held) + settled))

    def handlers(self, consumer: Consumer) -> dict[bytes, Handler]:
        """Return the handlers of *consumer* by what the envelope of a job that needs nothing more begins with."""
        found = self._handlers.get(consumer.queue)
        if found is None:
            foreign = consumer.keys.foreign is not None
            named = {name: Handler(task, raw=foreign) for name, task in self.app.tasks.items()}
            self._named[consumer.queue] = named
            found = self._handlers[consumer.queue] = self.unusual.fast(consumer.queue, named, foreign=foreign)
        return found

    def arrive(self, consumer: Consumer, id_: str, data: bytes) -> Attempt:
        """Make an attempt of a job that is more than a name and JSON, or that cannot run here."""
        self.handlers(consumer)
        return self.unusual.arrive(consumer, self._named[consumer.queue], id_, data)

    def settle_stats(self, consumer: Consumer, report: Report) -> None:
        """Put the counters since the last turn into *report*."""
        for handler in consumer.worked:
            handler.drain(report.stats)
        consumer.worked.clear()

    def absorbed(self, consumer: Consumer) -> None:
        """A turn was answered: see whether the burst is over."""
        if self._burst and not self.stopping and all(one.drained for one in self.consumers):
            self.stop()
        if not consumer.more and len(self.consumers) > 1:
            for one in self.consumers:  # it has no use for the room it was given: whose turn is it next?
                if one.more:
                    one.schedule()

    def listen(self) -> None:
        """Wait for work, if nobody does."""
        self.harbour.listen()

    def note_identity(self, consumer: Consumer) -> None:
        """Tell the supervisor under which identity we are about to register."""
        if self._slot is not None:
            self._slot.set_identity(consumer.keys, consumer.identity, consumer.lease_ms)

    def note_renewal(self, consumer: Consumer) -> None:
        """Tell the supervisor that the lease on a queue was renewed."""
        self.last_renewal = monotonic()
        if self._slot is not None:
            self._slot.renewed(consumer.identity)

    def about(self, consumer: Consumer) -> bytes:
        """Return who we are, as Redis keeps it."""
        concurrency, threads = self._limits
        return operations.about(
            kind="worker", name=self.name, host=platform.node(), pid=os.getpid(), started=int(time() * 1000),
            concurrency=concurrency, threads=threads, weight=consumer.weight, tasks=len(self.app.tasks),
        )  # fmt: skip

    # -- ends -----------------------------------------------------------------------------------------------------

    def ended(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        """Settle an attempt: called by the executor once for each."""
        consumer = attempt.consumer
        self._prefetch.ended += 1
        if consumer.holds(attempt):
            self._settle(attempt, value, error)
        elif error is not None and attempt.handler.early:
            failure.tell(
                log, logging.ERROR, "✗ %s %s failed after its early ack: %s", attempt.handler.name, attempt.public_id,
                details(error), error=error,
            )  # fmt: skip
        consumer.ended(attempt)
        if self.stopping:
            self._moved.set()
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
        unfinished = attempt.started == 0.0 or isinstance(error, asyncio.CancelledError) or attempt in self._stuck
        if why == "cancel" and (unfinished or error is not None):
            self.settling.cancelled(report, attempt, now)
        elif why == "stop" and (unfinished or error is not None):
            self.settling.handed_back(report, attempt, started=attempt.started != 0.0)
        elif isinstance(error, ProcessCrashed) and why is None:
            self._process_crashed(attempt, now, error)
        else:
            final = settling.error_of(attempt, error)
            if final is None:
                self.settling.done(report, attempt, value, now)
            else:
                self.settling.failed(report, attempt, final, now)

    def _process_crashed(self, attempt: Attempt, now: int, error: ProcessCrashed) -> None:
        """A job took its process with it: charge the crash, and try again alone, or give it up."""
        old = attempt.history
        record = to_json(failure.describe(error, attempt.number, now, self.name))
        state = State(attempt.number, old.failures, old.crashes + 1, [*old.errors, record])
        log.error("✗ %s %s crashed its process: %s", attempt.handler.name, attempt.public_id, error)
        if state.crashes >= attempt.handler.task.settings.retry.max_crashes:
            attempt.state = state
            self.settling.poison(attempt.consumer.report, attempt, now)
        else:
            attempt.consumer.report.others.append(Settlement("F", attempt.id, state=state.encode()))

    def _is_stuck(self, attempt: Attempt) -> None:
        """A thread outlived its time limit: take no more work, finish the rest, be replaced; its outcome is written at the end."""
        if attempt in self._stuck or attempt.ended != 0.0:
            return
        self._stuck.append(attempt)
        if self._slot is None:
            log.error(
                "E13 Job %s (%s) timed out and its thread cannot be killed; its lease is kept until it ends.",
                attempt.public_id, attempt.handler.name,
            )  # fmt: skip
            self.executor.threads.replace(attempt)
            return
        log.error(
            "E13 Job %s (%s) timed out and its thread cannot be killed; this process finishes its other jobs and is replaced.",
            attempt.public_id, attempt.handler.name,
        )  # fmt: skip
        self.retiring = True
        self._stop_asked.set()  # not `stop()`: when there was one already, that would hurry the other jobs

    def _tick(self) -> None:
        self.last_tick = monotonic()
        if self._slot is not None:
            self._slot.tick()
            self._slot.clear_job()
        for consumer in self.consumers:
            consumer.renew()

    def _on_the_loop(self) -> tuple[str, str] | None:
        attempt = self.executor.slots.current
        return (attempt.handler.name, attempt.public_id) if attempt is not None else None
