"""The parts of a worker that all its consumers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conveyor.jobs.core import AppCore
    from conveyor.store.worker_commands import WorkerCommand
    from conveyor.worker.execution.executor import Executor
    from conveyor.worker.job_loader import JobLoader
    from conveyor.worker.leasing.capacity import Capacity, LeasingQueue
    from conveyor.worker.leasing.membership import LeaseHolder
    from conveyor.worker.lifecycle import Lifecycle
    from conveyor.worker.settlement import SettlementWriter
    from conveyor.worker.shared_memory import ChildSlot


class WorkerServices(msgspec.Struct, frozen=True):
    """The parts of one worker, as its consumers use them. Made once, when the worker starts."""

    app: AppCore
    lifecycle: Lifecycle
    executor: Executor
    capacity: Capacity
    loader: JobLoader
    settlement_writer: SettlementWriter
    shared_state: Mapping[str, Any]
    """The values that the app's lifespans yielded."""
    slot: ChildSlot | None
    """Where a supervisor reads leases and renewals; None without one."""
    is_burst: bool
    """True when the worker ends as soon as everything is drained."""
    describe: Callable[[float], bytes]
    """Returns what Redis stores about the worker of a queue with that weight."""
    listen: Callable[[LeasingQueue], None]
    """Waits for work of a consumer, and of others that nothing waits for."""
    after_turn: Callable[[], None] | None
    """Called after each turn, when its reply was taken in; None: there is nothing to do then."""
    carry_out: Callable[[LeaseHolder, WorkerCommand], None]
    """Carries out a command that a person sent to the worker."""
    fail: Callable[[BaseException], None]
    """Ends the worker with an error."""
