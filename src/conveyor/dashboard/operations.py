"""Actions on all jobs that a filter chooses, in the background: with progress, at a rate, and stopped when asked to."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec.structs import asdict

from conveyor.admin.job_query import JobQuery
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.ids import new_id
from conveyor.messaging.selection import ActionName, Pace

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin

logger = logging.getLogger("conveyor.dashboard")
MOST_RUNNING = 4
_MOST_KEPT = 100
_SHOWN_FOR = timedelta(minutes=1)
_NOTED_AFTER = 1.0
"""Seconds after which the audit tells that an operation has begun: its end is not noted where its process is killed."""


class Operation(msgspec.Struct):
    """One action on all jobs that a filter chooses; `done`, `refused` and `total` are numbers of jobs."""

    id: str
    action: str
    filter: str
    user: str
    state: Literal["running", "done", "stopped", "failed"] = "running"
    total: int | None = None
    done: int = 0
    refused: int = 0
    started: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))
    ended: datetime | None = None
    error: str | None = None


class Operations:
    """The operations of one process, each in a thread. They end with the process; what a step has done stays done."""

    def __init__(self) -> None:
        self._known: dict[str, Operation] = {}
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Operation]:
        """Return the operations, the newest first."""
        return list(reversed(self._known.values()))

    def shown(self) -> list[dict[str, Any]]:
        """Return those that run, or ended within the last minute, without their filters, which may quote payloads."""
        now = datetime.now(UTC)
        recent = [one for one in self.all() if one.ended is None or now - one.ended < _SHOWN_FOR]
        return [{**asdict(one), "filter": None} for one in recent]

    def get(self, id: str) -> Operation:  # noqa: A002
        """Return one. Raises ConfigurationError."""
        if id not in self._known:
            raise ConfigurationError(f"There is no operation {id[:50]!r} in this process.")
        return self._known[id]

    def start(
        self, admin: Admin, action: ActionName, shown: str, query: JobQuery, *, limit: int | None, rate: str | None
    ) -> Operation:
        """Begin an operation. Raises ConfigurationError, also when four run already."""
        Pace(rate)  # raises for one that cannot be read
        operation = Operation(new_id(), shown, query.text, admin.who)
        with self._lock:
            if sum(one.state == "running" for one in self._known.values()) >= MOST_RUNNING:
                raise ConfigurationError(
                    f"{MOST_RUNNING} operations run already. Wait for one, or stop it. Nothing was done."
                )
            self._known[operation.id] = operation
            while len(self._known) > _MOST_KEPT:
                oldest = next(id_ for id_, one in self._known.items() if one.state != "running")
                del self._known[oldest]
                self._stops.pop(oldest, None)
            self._stops[operation.id] = threading.Event()
        work = self._work(operation, admin, action, query, limit, rate)
        threading.Thread(target=work, name=f"operation {operation.id}", daemon=True).start()
        return operation

    def stop(self, id: str) -> Operation:  # noqa: A002
        """Have an operation end after its present step."""
        operation = self.get(id)
        self._stops[id].set()
        return operation

    def stop_all(self) -> None:
        """Have all end after their present step."""
        for stop in self._stops.values():
            stop.set()

    def _work(
        self,
        operation: Operation,
        admin: Admin,
        action: ActionName,
        query: JobQuery,
        limit: int | None,
        rate: str | None,
    ) -> Callable[[], None]:
        stop = self._stops[operation.id]

        def note(detail: str, count: int | None) -> None:
            admin.note(
                operation.action, query.queue or "all queues", chosen_by=query.described, count=count, detail=detail
            )

        def work() -> None:
            state: Literal["done", "stopped", "failed"] = "done"
            unnoted_until = time.monotonic() + _NOTED_AFTER
            try:
                found = admin.count_matching(query, action, seconds=2.0)
                operation.total = found.count if found.exact else None
                for results in admin.act_on_matching(action, query, limit=limit, rate=rate, sleep=stop.wait):
                    operation.done += sum(one.done for one in results)
                    operation.refused += sum(not one.done for one in results)
                    if time.monotonic() > unnoted_until:
                        unnoted_until = math.inf
                        note("begun", None)
                    if stop.is_set():
                        break
                if stop.is_set():
                    state = "stopped"
            except ConveyorError as error:
                state, operation.error = "failed", str(error)
            except Exception:
                logger.exception("the operation %s on %r failed", operation.action, operation.filter)
                state, operation.error = "failed", "an error of the dashboard itself; its log has the traceback"
            note(operation.error or ("" if state == "done" else state), operation.done)
            operation.ended, operation.state = datetime.now(UTC), state

        return work
