"""One worker in one event loop, from its start to its stop: consumers lease jobs, an executor runs them."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from conveyor import ids
from conveyor.errors import ConveyorError, QueueFull, StoreUnavailable
from conveyor.events import WorkerStarted, WorkerStopped
from conveyor.jobs.core import core_of
from conveyor.jobs.hooks import run_through, skipping, wraps_runs
from conveyor.store import operations
from conveyor.store.client.queue_index import REFRESH
from conveyor.store.transport import eviction
from conveyor.units import installed_version
from conveyor.worker.app_loading import find_reference
from conveyor.worker.attempt import Attempt, error_line
from conveyor.worker.commands import all_stacks, describe_again, send_answer
from conveyor.worker.execution.batches import BatchAttempt, End
from conveyor.worker.execution.executor import Executor
from conveyor.worker.execution.processes import ProcessPool, module_of
from conveyor.worker.job_loader import JobLoader
from conveyor.worker.leasing.capacity import Capacity, PartitionGroup
from conveyor.worker.leasing.heartbeat import TICK, Watchdog
from conveyor.worker.leasing.membership import LeaseHolder, partition_keys, queue_weights
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.leasing.wakeup import WorkerConnections
from conveyor.worker.lifecycle import Lifecycle
from conveyor.worker.log_capture import keep_logs
from conveyor.worker.recycling import RecycleLimits
from conveyor.worker.requirements import unmet
from conveyor.worker.scheduler import declare_schedules
from conveyor.worker.services import WorkerServices
from conveyor.worker.settlement import SettlementWriter
from conveyor.worker.shutdown import RECYCLE, STOPPED, BurstMonitor, DrainMonitor, running
from conveyor.worker.usage import ProcessUsage

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor
    from conveyor.store.transport.credentials import LoginProvider
    from conveyor.store.worker_commands import WorkerCommand
    from conveyor.worker.shared_memory import ChildSlot

log = logging.getLogger("conveyor.worker")


class Worker:
    """Leases and runs jobs until it is told to stop. Then everything it holds is settled or handed back."""

    def __init__(
        self, app: Conveyor, *, queues: Mapping[str, float] | None = None, concurrency: int = 100, threads: int = 8,
        burst: bool = False, grace: float = 30.0, slot: ChildSlot | None = None, reference: str | None = None,
        recycle_limits: RecycleLimits | None = None, await_until: float = 0.0,
        before_leasing: Callable[[], None] = lambda: None, declares: bool = True, labels: str | Iterable[str] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            app: the app whose tasks run.
            queues: queue → weight; None: the queues of the app's tasks.
            concurrency: how many jobs run at once.
            threads: how many of them may be plain functions.
            burst: end when everything is drained.
            grace: seconds that running jobs have to end at a stop.
            slot: where a supervisor reads about this process; None without one.
            reference: the app as ``module:object``, for other processes; None: it is looked for in the modules of this one.
            recycle_limits: above these the worker asks to be replaced, which takes a supervisor.
            await_until: monotonic time before which no burst ends.
            before_leasing: called when all queues are registered, before the first job is leased.
            labels: what tasks may require of a worker.
            declares: store the schedules that decorators of the app declare.
        """
        self.app = core_of(app)
        self._labels, self._build = sorted(ids.label_texts(labels, "labels")), ids.build_of_program()
        self.name = f"{platform.node()}:{os.getpid()}"
        self.lifecycle = Lifecycle()
        self.retiring = self._stopped_by_command = False
        self._background: set[asyncio.Task[None]] = set()
        self.consumers: list[QueueConsumer] = []
        self.settlement_writer = SettlementWriter(self.app, self.name)
        self._running_table = None if slot is None else slot.running_table()
        self.loader = JobLoader(
            self.app, self.settlement_writer, self._running_table, lambda extra: unmet(extra, self._labels, self._build)
        )
        self._created_at = self.last_tick = monotonic()
        self._started_ms = int(time() * 1000)
        self._usage = ProcessUsage(lambda: self.executor.processes.pids)
        self._queues = queue_weights(self.app, queues)
        self._limits = (concurrency, threads)
        self._recycle_limits = recycle_limits or RecycleLimits(None, None)
        self._burst = BurstMonitor(until=await_until) if burst else None
        self._grace, self._slot = grace, slot
        self._app, self._reference = app, reference
        self._before_leasing, self._declares = before_leasing, declares
        self._drain_monitor = DrainMonitor()
        self.ready = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of the queues it leases from."""
        return tuple(self._queues)

    @property
    def login(self) -> LoginProvider | None:
        """That of the app, asked at each connection; None: the URL has user and password."""
        return self.app.client.login

    # -- start ----------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Work until `stop()`, or with burst until everything is drained; return the exit code."""
        async with AsyncExitStack() as stack:
            started = await self._started(stack)
            await self._stop_asked.wait()
            if self._failure is not None:
                self.lifecycle.stopped = True
                raise self._failure
            if not started:
                return 0
            await self._drain()
        if self._stopped_by_command and self._slot is not None:
            return STOPPED
        return RECYCLE if self.retiring else 0

    async def _started(self, stack: AsyncExitStack) -> bool:
        """Start, however long Redis is away; False when a stop was asked for before that."""
        starting = asyncio.create_task(self.start(stack))
        asked = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                return True
        finally:
            asked.cancel()
            starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        met = [one for one in self.consumers if one.identity and one.connection.is_open]
        await asyncio.gather(*(consumer.leave() for consumer in met))  # their registration may be on the way already
        return False

    async def start(self, stack: AsyncExitStack) -> None:
        """Connect, run the lifespan, register, and begin."""
        self.executor = self._make_executor()
        stack.callback(keep_logs())
        self._watch_loop(stack)  # first: a start may wait for Redis, and a loop that waits is not blocked
        self.capacity = Capacity(self.executor, self.lifecycle, self._recycle_limits)
        after_turn = self._after_turn if self._burst is not None or self._recycle_limits.is_limited else None
        self.connections = WorkerConnections(self.name, self.lifecycle, self.app.client, self.capacity, after_turn)
        stack.push_async_callback(self.connections.close)
        shared_state = await stack.enter_async_context(self.app.lifespan_context())
        stack.push_async_callback(self.executor.close)
        services = WorkerServices(
            self.app, self.lifecycle, self.executor, self.capacity, self.loader, self.settlement_writer, shared_state,
            self._slot, self._burst is not None, self._describe, self.connections.listen, after_turn,
            self.carry_out, self.fail,
        )  # fmt: skip
        for queue, weight in self._queues.items():
            parts, lease_ms = await partition_keys(self.app, queue), self.app.queue_lease_ms(queue)
            group = PartitionGroup(weight)
            for keys in parts:
                connection = self.connections.of(keys).connection
                consumer = QueueConsumer(services, connection, keys, group, lease_ms)
                self.connections.add(consumer)
                self.consumers.append(consumer)
        self._usage.begin()
        for consumer in self.consumers:
            await consumer.register()
            # A full Redis takes no name; a program that pushes there makes the queue known.
            with suppress(QueueFull, StoreUnavailable):
                await self.app.client.aannounce(consumer.keys)
        self._recycle_limits.begin()
        for watch in (eviction.watch_policy(self._server_infos, log), self._keep_queues_known()):
            stack.callback(asyncio.create_task(watch).cancel)
        self._before_leasing()
        if self._declares and self.app.declared_schedules:
            await declare_schedules(self.app, self._queues)
        self.app.emit(WorkerStarted(self.name))
        for consumer in self.consumers:
            consumer.begin(stack)
        self.ready.set()

    def _make_executor(self) -> Executor:
        concurrency, threads = self._limits
        processes, tasks = self._make_processes(), self.app.definitions.values()
        chain = [middleware for middleware in self.app.run_middlewares if wraps_runs(middleware)]
        return Executor(
            concurrency=concurrency, threads=threads, processes=processes,
            on_finished=self.on_finished, on_stuck=self._on_stuck, on_batch=self.on_batch_finished,
            kinds={task.run_in for task in tasks if task.run_in != "process" or processes.refusal(task) is None},
            loader=self.loader, running_table=self._running_table,
            chain=(lambda context, call: run_through(chain, context, call)) if chain else None,
            skips=skipping(chain) if chain else None,
        )  # fmt: skip

    def _make_processes(self) -> ProcessPool:
        """Make the pool for tasks of `run_in="process"`; its processes load what this one has imported for them."""
        limits, tasks = self._recycle_limits, [one for one in self.app.definitions.values() if one.run_in == "process"]
        return ProcessPool(
            (self._reference or find_reference(self._app)) if tasks else None, os.cpu_count() or 1,
            modules={task.name: module_of(task) for task in tasks if module_of(task) not in {"", "__main__"}},
            max_jobs=limits.max_jobs, max_memory=limits.max_memory,
        )  # fmt: skip

    def _watch_loop(self, stack: AsyncExitStack) -> None:
        watchdog = Watchdog(self._on_the_loop, self._tick, None if self._slot is None else self._slot.set_job)
        watchdog.start()
        stack.callback(watchdog.close)

    async def _keep_queues_known(self) -> None:
        """Add the names of all queues to the set of known ones again from time to time: the set may be lost."""
        while True:
            await asyncio.sleep(REFRESH)
            with suppress(ConveyorError):
                await self.app.client.aannounce(*(consumer.keys for consumer in self.consumers))

    async def _server_infos(self) -> list[Any]:
        """Return the reply to INFO of each server that holds a queue of this worker."""
        connections = {one.connection: None for one in self.consumers}
        return [await connection.run_command("INFO", retry_for=5.0) for connection in connections]

    # -- stop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain: lease nothing more, and give running jobs their grace."""
        self.lifecycle.draining = True
        self._stop_asked.set()
        self._note_state()

    def hurry(self) -> None:
        """Drain, and hand everything back at once."""
        self._drain_monitor.hurry()
        self.stop()

    def fail(self, error: BaseException) -> None:
        """End with *error*: `run()` raises it."""
        self._failure = self._failure or error
        self.lifecycle.stopping = True
        self.stop()

    def quiet(self) -> None:
        """Lease nothing more; running jobs go on."""
        self.lifecycle.stopping = True
        self._note_state()

    def carry_out(self, consumer: LeaseHolder, command: WorkerCommand) -> None:
        """Carry out a person's command that came through a queue of *consumer*, and answer it."""
        log.info("worker %s: %s was asked for by a command", self.name, command.action)
        answer = "ok"
        if command.action == "stack":
            held = (one for each in self.consumers for one in each.held.values())
            answer = all_stacks({one.runner: one.label for one in held if one.runner is not None})
        elif command.action == "quiet":
            self.quiet()
        self._run_beside(send_answer(consumer, command, answer))
        if command.action == "stop":
            self._stopped_by_command = True
            self.stop()

    def _note_state(self) -> None:
        """Have the supervisor know, and Redis show, that this worker is quiet or stopping; Redis once it is registered."""
        if self._slot is not None:
            self._slot.quiet = True
        if self.ready.is_set():
            self._describe_again(self.consumers)

    def _describe_again(self, consumers: list[QueueConsumer]) -> None:
        about = {one: self._describe(one.group.weight / one.keys.partitions) for one in consumers}
        self._run_beside(describe_again(consumers, about))

    def _run_beside(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _drain(self) -> None:
        self.lifecycle.stopping = True
        for consumer in self.consumers:
            consumer.hand_back()
            consumer.schedule()
        self.executor.drain()
        await self._drain_monitor.wait(self.consumers, self._grace)
        await self._cut_off()
        if self._background:  # before the connections close
            await asyncio.wait(self._background, timeout=1.0)
        try:
            async with asyncio.timeout(5.0):
                await asyncio.gather(*(consumer.leave() for consumer in self.consumers))
        except TimeoutError:
            log.warning("worker %s: Redis does not answer; jobs still held come back when their leases end", self.name)
        if self._slot is not None and self._burst is not None:
            due = [at for consumer in self.consumers for at in consumer.own_retries.values()]
            self._slot.await_until = max(self._burst.until, 0.0, *(at + 1.0 for at in due))
        self.lifecycle.stopped = True
        self.app.emit(WorkerStopped(self.name))

    async def _cut_off(self) -> None:
        """Stop what still runs after the grace, and hand it back."""
        late, every = list(running(self.consumers, early=False)), list(running(self.consumers))
        if late:
            jobs = "1 job that is" if len(late) == 1 else f"{len(late)} jobs that are"
            log.warning("worker %s: handing back %s still running", self.name, jobs)
        if len(every) > len(late):
            log.warning(
                "worker %s: cutting off %d jobs: an early ack cannot be taken back", self.name, len(every) - len(late)
            )
        for attempt in every:
            self.executor.stop(attempt, "stop")
        await self._drain_monitor.wait(self.consumers, 1.0, hurry=False)
        for attempt in list(running(self.consumers, early=False)):
            # A thread, or a coroutine that swallows its cancellation: it dies with the process.
            attempt.ended = monotonic()
            if attempt in self._drain_monitor.stuck:
                self.settlement_writer.settle(attempt, None, None, stuck=True)
            else:
                self.settlement_writer.handed_back(attempt.consumer.report, attempt, started=True)

    # -- for consumers --------------------------------------------------------------------------------------------

    def _after_turn(self) -> None:
        self._stop_if_drained()
        self._retire_if_used_up()

    def _stop_if_drained(self) -> None:
        burst, gatherer = self._burst, self.executor.gatherer
        if burst is not None and gatherer is not None and not any(one.has_more for one in self.consumers):
            gatherer.run_all()
        if burst is not None and not self.lifecycle.stopping and burst.is_over(self.consumers, self.capacity.finished):
            self.stop()

    def _describe(self, weight: float) -> bytes:
        """Return what Redis stores about this worker, for a queue of that weight."""
        concurrency, threads = self._limits
        usage = self._usage
        return operations.about(
            kind="worker", name=self.name, host=platform.node(), pid=os.getpid(), started=self._started_ms,
            concurrency=concurrency, threads=threads, weight=weight, tasks=len(self.app.definitions),
            version=installed_version(), python=platform.python_version(), state=self._state(),
            labels=self._labels, build=self._build,
            supervisor=None if self._slot is None else os.getppid(), loop_lag_ms=usage.lag_ms,
            memory=usage.memory, cpu=usage.cpu, usage_told=usage.told_ms,
            task_set=operations.task_set(self.app.definitions),
            timeouts={name: ms for name, task in self.app.definitions.items() if (ms := task.settings.timeout_ms)},
        )  # fmt: skip

    def _state(self) -> str:
        lifecycle = self.lifecycle
        return "stopping" if lifecycle.draining else "quiet" if lifecycle.stopping else "running"

    @property
    def last_renewal(self) -> float:
        """When a turn last renewed any lease (monotonic)."""
        return max((consumer.renewed_at for consumer in self.consumers), default=self._created_at)

    # -- ends of attempts -----------------------------------------------------------------------------------------

    def on_finished(self, attempt: Attempt, value: Any, error: BaseException | None) -> None:
        """Settle an attempt. The executor calls this once for each."""
        consumer = attempt.consumer
        self.capacity.finished += 1
        if consumer.holds(attempt):
            self.settlement_writer.settle(attempt, value, error, stuck=attempt in self._drain_monitor.stuck)
        elif error is not None and attempt.handler.early:
            hide = attempt.hider()
            self.settlement_writer.failure_log.log(
                logging.ERROR, "✗ %s failed after its early ack: %s", attempt.label, error_line(error, hide), error=error,
                hide=hide,
            )  # fmt: skip
        consumer.on_finished(attempt)
        if attempt.handler.early:
            self._stop_if_drained()  # no turn follows, which would see to it
        if self.lifecycle.stopping:
            self._drain_monitor.note_end()
        executor = self.executor
        if (
            executor.coroutines.backlog or executor.threads.ended or not self.capacity.is_alone(consumer)
        ):  # other ends follow
            consumer.schedule()
            self.capacity.offer()
        else:
            consumer.schedule(at_once=True)

    def on_batch_finished(self, ends: list[End]) -> None:
        """Settle the jobs of a batch, which leave with one turn."""
        for consumer in {attempt.consumer for attempt, _, _ in ends}:
            consumer.schedule()
        self.capacity.note_batch(len(ends))
        with self.settlement_writer.shared_errors(attempt for attempt, _, error in ends if error is not None):
            for attempt, value, error in ends:
                self.on_finished(attempt, value, error)

    def _on_stuck(self, attempt: Attempt) -> None:
        """Drain and be replaced, because a thread outlived its time limit. Its job is settled last."""
        if attempt in self._drain_monitor.stuck or attempt.ended != 0.0:
            return
        self._drain_monitor.stuck += [attempt, *(attempt.items if isinstance(attempt, BatchAttempt) else ())]
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
        """Drain, and be replaced by a new process."""
        self.retiring = self.lifecycle.stopping = True
        if self._slot is not None:
            self._slot.retiring = True
        self.stop()

    def _retire_if_used_up(self) -> None:
        """Ask to be replaced above a recycle limit; above that of jobs not before all that were taken have started."""
        limits = self._recycle_limits
        if not limits.is_limited or self.lifecycle.draining or (why := limits.used_up(self.capacity.taken)) is None:
            return
        waits = any(a.started == 0.0 == a.ended for one in self.consumers for a in one.held.values())
        if waits and limits.remaining(self.capacity.taken) == 0:
            return
        log.info("Process %d %s: it takes no more, and a fresh one takes its place", os.getpid(), why)
        self._retire()

    # -- the event loop -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._usage.note_ticks(self.last_tick, now := monotonic(), TICK)
        self.last_tick = now
        if self._slot is not None:
            self._slot.held = sum(len(consumer.held) for consumer in self.consumers)
            self._slot.tick()
            self._slot.clear_job()
        if not self.ready.is_set():
            return  # it may still wait for Redis
        self.connections.tick()
        self._retire_if_used_up()
        if self._usage.is_to_be_told(now):
            self._describe_again(self.consumers[:1])

    def _on_the_loop(self) -> tuple[str, str] | None:
        attempt = self.executor.coroutines.current
        return (attempt.handler.name, ids.clean(attempt.public_id)) if attempt is not None else None
