"""
Gathers jobs of batch tasks, and runs each batch as one attempt.

A job of a batch task is leased as any other. Here it waits for others of its task, queue and key, without a slot, until its
batch is full or the time since its first job is over. Then the batch takes a slot and runs; each of its jobs ends for
itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from msgspec import field

from conveyor.jobs.batch_task import item_ends
from conveyor.jobs.context import Context, share_log
from conveyor.jobs.job_log import JobLog
from conveyor.jobs.task import BatchPlan
from conveyor.payload import failures
from conveyor.payload.records import Envelope
from conveyor.store.operations import MOST_HELD
from conveyor.worker.attempt import PLAIN_ENVELOPE, Attempt, AttemptOwner, GatheringGroup, Handler
from conveyor.worker.crash_attribution import LOOP_CELL, RunningTable, id_checksum, item_cell

if TYPE_CHECKING:
    from conveyor.worker.execution.coroutines import CoroutinePool
    from conveyor.worker.execution.threads import ThreadPool

GATHERED = MOST_HELD // 2
"""
Jobs of a queue that wait for others, at most (or one full batch). Then the fullest batch runs: otherwise batches of many keys
would fill the lease, and no job could come that fills one of them.
"""
_BATCH = Envelope("", b"", expires_ms=0)  # whether its items have expired is looked at when it starts

End = tuple[Attempt, Any, BaseException | None]
"""A job, its result, and its error."""
BatchKey = tuple[str, GatheringGroup, Hashable]
"""The task, queue and key that the jobs of a batch have in common."""


class BatchHandler(Handler):
    """A batch task as the executor runs it: with the list of a batch in place of one job's arguments."""

    __slots__ = ()

    def __init__(self, handler: Handler) -> None:
        """*handler* is that of its single jobs."""
        super().__init__(handler.task)
        self.kind = handler.task.run_in
        self.decode = _as_arguments


def _as_arguments(values: Any) -> tuple[list[Any], dict[str, Any]]:
    return [values], {}


class BatchAttempt(Attempt, kw_only=True, eq=False):
    """One call of the function of a batch task: the attempt that takes a slot. `items` are the attempts of its jobs."""

    shared: BatchKey
    plan: BatchPlan
    items: dict[Attempt, Any] = field(default_factory=dict)
    """The attempts of its jobs, with their decoded arguments, in the order in which they came."""
    live: list[Attempt] = field(default_factory=list)
    """Those of them that the function receives, in the order of its list; set when it starts."""
    phase: Literal["open", "recalled", "submitted"] = "open"
    is_announced: bool = False
    timer: asyncio.TimerHandle | None = None
    cells: list[int] = field(default_factory=list)

    @classmethod
    def begun_by(cls, first: Attempt, handler: Handler, shared: BatchKey, plan: BatchPlan) -> BatchAttempt:
        """Return a batch without items, for *first*."""
        values: list[Any] = []  # the list that the function receives; `BatchHandler` makes it the arguments
        batch = cls(
            first.consumer,
            handler,
            first.id,
            cast("bytes", values),
            _BATCH,
            shared=shared,
            plan=plan,
            number=first.number,
        )
        batch.consumer = cast("AttemptOwner", BatchOwner(batch))
        return batch

    @property
    def first(self) -> Attempt:
        """The first of its items."""
        return next(iter(self.items))

    @property
    def public_id(self) -> str:
        """The id of its first item."""
        return self.first.public_id

    @property
    def timeout(self) -> float | None:
        """The shortest time limit of its items, in seconds."""
        limits = [
            limit for item in self.items if item.envelope is not PLAIN_ENVELOPE and (limit := item.timeout) is not None
        ]
        if self.handler.timeout is not None and len(limits) < len(self.items):
            limits.append(self.handler.timeout)
        return min(limits, default=None)

    def expire(self) -> bool:
        """Leave out the items that have expired or were cancelled before their start; tell whether none is left."""
        live = [
            one
            for one in self.items
            if one.stop_reason is None and (one.envelope is PLAIN_ENVELOPE or not one.expire())
        ]
        self.live, values = live, cast("list[Any]", self.body)
        values[:] = [self.items[item] for item in live]  # in place: a thread has got the list already
        now = perf_counter()
        for item in live:
            item.started = item.started or now
        if not live:
            self.stop_reason = "expired"
        return not live

    def time_out(self) -> None:
        """Note for its items that the time limit has passed."""
        for item in self.items:
            item.stop_reason = item.stop_reason or "timeout"

    def open(self) -> Context:
        """Return the context of the call, made at the first time."""
        if self.context is None:
            first = self.first.open()
            self.context = Context(
                job_id=first.job_id, task=first.task, queue=first.queue, attempt=first.attempt, headers=first.headers,
                state=first.state, deadline_hook=self.move_deadline, enqueued_at=first.enqueued_at,
                scheduled_for=first.scheduled_for,
                items=lambda: [item.open() for item in self.live],
                log=JobLog if self.handler.keeps_logs else None,
            )  # fmt: skip
            if self.stop_reason is not None:
                self.flag_context()
        return self.context


class BatchOwner:
    """The consumers of a batch's items, as the executor sees the consumer of an attempt."""

    def __init__(self, batch: BatchAttempt) -> None:
        self._batch = batch

    @property
    def queue(self) -> str:
        """The queue of the first item."""
        return self._batch.first.consumer.queue

    def on_started(self, batch: BatchAttempt) -> None:
        """Tell the consumers that their jobs start."""
        if not batch.is_announced:
            batch.is_announced = True
            self.on_abandoned()
            for item in batch.items:
                if item.stop_reason is None:
                    item.consumer.announce(item)

    def on_abandoned(self) -> None:
        """Note that the batch left the backlog."""
        self._batch.first.consumer.note_backlog(-1)

    def holds(self, batch: BatchAttempt) -> bool:
        """Tell whether one of its jobs is still leased here."""
        return any(item.consumer.holds(item) for item in batch.items)

    def move_deadline(self, batch: BatchAttempt, seconds: float) -> None:
        """Set the deadline of the batch that many seconds ahead."""
        batch.first.consumer.move_deadline(batch, seconds)


class BatchRunner(Protocol):
    """The executor, as batches are run by it."""

    @property
    def threads(self) -> ThreadPool: ...
    @property
    def coroutines(self) -> CoroutinePool: ...
    def submit(self, attempts: list[Attempt]) -> None: ...
    def stop(self, attempt: Attempt, why: str) -> None: ...


class BatchGatherer:
    """The batches of a worker that gather, and those that run."""

    def __init__(
        self, runner: BatchRunner, on_finished: Callable[[list[End]], None], running_table: RunningTable | None, *,
        is_draining: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            runner: runs the batches.
            on_finished: called with the ends of the jobs of a batch.
            running_table: where a supervisor reads which jobs run; None without one.
            is_draining: each job runs at once, as after `drain`.
        """
        self._runner, self._on_finished, self._running_table = runner, on_finished, running_table
        self._loop = asyncio.get_running_loop()
        self._open: dict[BatchKey, BatchAttempt] = {}
        self._batch_of: dict[Attempt, BatchAttempt] = {}
        self._handlers: dict[str, Handler] = {}
        self._is_draining = is_draining

    # -- gathering ------------------------------------------------------------------------------------------------

    def add(self, item: Attempt) -> None:
        """Add a job to the batch of its task, queue and key; one that came back from a crash runs alone."""
        consumer, task, plan = item.consumer, item.handler.task, item.handler.task.batch
        assert plan is not None
        consumer.note_backlog(-1)  # it takes no slot of its own
        if self._running_table is not None:
            self._running_table.cells[LOOP_CELL] = id_checksum(item.id)  # validators are code of the job, too
        try:
            value = item.handler.decode(item.body)[0][0]
            key = plan.group_of(value)
        except Exception as error:
            item.started = item.ended = perf_counter()
            ends: list[End] = [(item, None, error)]
            self._loop.call_soon(self._on_finished, ends)
            return
        shared = (task.name, consumer.group, key)
        batch = None if item.crashed_before else self._open.get(shared)
        if batch is None:
            handler = self._handlers.setdefault(task.name, BatchHandler(item.handler))
            batch = BatchAttempt.begun_by(item, handler, shared, plan)
        batch.items[item] = value
        self._batch_of[item] = batch
        if item.crashed_before or self._is_draining:
            self._submit(batch)
            return
        group = consumer.group
        group.gathered += 1
        group.wanted -= 1
        if len(batch.items) == 1:
            self._open[shared] = batch
            group.gathering += 1
            group.wanted += plan.size
            batch.timer = self._loop.call_later(plan.within_ms / 1000, self._close, batch)
        if len(batch.items) == plan.size:
            self._close(batch)
        elif group.gathered >= max(GATHERED, plan.size):
            self._close(
                max((one for one in self._open.values() if one.shared[1] is group), key=lambda one: len(one.items))
            )

    def run_all(self) -> None:
        """Run every batch with what it has: nothing will come that fills it."""
        for batch in list(self._open.values()):
            self._close(batch)

    def drain(self) -> None:
        """Run what is left, and what is added from now on, at once: jobs that cannot go back, at a stop."""
        self._is_draining = True
        self.run_all()

    def _close(self, batch: BatchAttempt) -> None:
        self._leave(batch)
        self._submit(batch)

    def _leave(self, batch: BatchAttempt) -> None:
        """Remove a batch from those that gather."""
        del self._open[batch.shared]
        assert batch.timer is not None
        batch.timer.cancel()
        group = batch.shared[1]
        group.gathering -= 1
        group.gathered -= len(batch.items)
        group.wanted -= batch.plan.size - len(batch.items)

    def _submit(self, batch: BatchAttempt) -> None:
        batch.phase = "submitted"
        if not batch.is_announced:
            batch.first.consumer.note_backlog(1)
        table = self._running_table
        if table is not None and len(batch.items) > 1:
            for item in batch.items:
                batch.cells.append(cell := table.take_cell())
                table.cells[cell] = item_cell(item.id, batch.id)
        self._runner.submit([batch])

    # -- jobs that leave ------------------------------------------------------------------------------------------

    def take_back(self, item: Attempt) -> bool:
        """Remove a job from a batch that has not started; False when it has."""
        batch = self._batch_of.get(item)
        if batch is None:
            return True  # its body is on its way
        if batch.phase == "submitted":
            if batch.started != 0.0:
                return False
            if batch.unclaimed is not None:
                if not self._runner.threads.take_back(batch):
                    return False
                batch = self._recall(batch)
        if batch.phase == "open":
            group = batch.shared[1]
            if len(batch.items) == 1:
                self._leave(batch)
            else:
                group.gathered -= 1
                group.wanted += 1
        elif batch.phase == "submitted" and len(batch.items) == 1:
            self._runner.coroutines.backlog.remove(batch)
            batch.consumer.on_abandoned()
            self.release_cells(batch)
        del batch.items[item], self._batch_of[item]
        return True

    def _recall(self, batch: BatchAttempt) -> BatchAttempt:
        """Return a batch in place of one that no thread had begun, of which jobs leave; what is left is submitted again."""
        rest = BatchAttempt.begun_by(batch.first, batch.handler, batch.shared, batch.plan)
        rest.phase, rest.is_announced, rest.items = "recalled", True, batch.items
        self._batch_of.update(dict.fromkeys(rest.items, rest))
        batch.ended = perf_counter()  # its thread still reports it
        self.release_cells(batch)
        self._loop.call_soon(lambda: self._submit(rest) if rest.items else None)
        return rest

    def on_stopped(self, item: Attempt, why: str) -> None:
        """Stop the batch of a job that was told to stop while it runs, when all of its jobs were."""
        batch = self._batch_of.get(item)
        if batch is not None and all(one.stop_reason is not None for one in batch.items):
            self._runner.stop(batch, why)

    # -- ends -----------------------------------------------------------------------------------------------------

    def finish(self, batch: BatchAttempt, value: Any, error: BaseException | None) -> None:
        """End the jobs of a batch that has ended."""
        ends = dict(zip(batch.live, item_ends(value, error, len(batch.live)), strict=True))
        ended: list[End] = []
        for item in batch.items:
            self._batch_of.pop(item, None)
            item.ended = batch.ended
            if batch.log is not None:
                share_log(item.open(), batch.log)
            left_out = asyncio.CancelledError() if item.stop_reason is not None else error
            result, failure = ends.get(item, (None, left_out))
            ended.append((item, result, None if failure is None else failures.safe_exception(failure)))
        if batch.handler.kind != "process":  # a crash of that process may not have been settled yet
            self.release_cells(batch)
        self._on_finished(ended)

    def release_cells(self, batch: BatchAttempt) -> None:
        """Empty the cells of a batch's items."""
        while batch.cells and self._running_table is not None:
            self._running_table.release_cell(batch.cells.pop())
