"""The snapshot that all viewers share: it is read at most once a second, whatever their number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from conveyor.admin.queue_flow import flow_document
from conveyor.admin.worker_control import WorkerProcess, processes_of, slots_of
from conveyor.dashboard.documents import encoded
from conveyor.dashboard.operations import Operations
from conveyor.dashboard.queue_counts import FEW, QueueTable
from conveyor.store.transport.endpoint import in_thread

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.doctor import HealthReport
    from conveyor.admin.views import QueueInfo

_STATES = ("ready", "scheduled", "waiting", "leased", "dead")
_FLAGS_SECONDS, _SECONDS_OF_A_QUEUE, _MOST_SECONDS = 5.0, 1.5, 60.0
"""The age that flags may have, the part of it that each busy queue adds, since it is read by itself, and the most."""
_MOST_FLAGS, _MOST_BUSY = 20, 200
"""Flags of a snapshot, and queues whose tasks and running jobs are looked at for them."""
_SECONDS_OF_RECORDS = 0.03
"""The time in which the doctor examines the records of queue after queue."""


class Shared:
    """A document that many ask for: made anew when it is older than *seconds*, once for all who ask meanwhile."""

    def __init__(self, make: Callable[[], dict[str, Any]], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._making: asyncio.Task[dict[str, Any]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._found: tuple[float, dict[str, Any]] | None = None
        self._event: tuple[dict[str, Any], bytes] | None = None

    async def get(self) -> dict[str, Any]:
        """Return the document. Raises what making it raises."""
        if self._found is not None and time.monotonic() - self._found[0] < self._seconds:
            return self._found[1]
        loop = asyncio.get_running_loop()
        if self._making is None or self._making.done() or self._loop is not loop:  # each request has its own below WSGI
            self._making, self._loop = loop.create_task(self._read()), loop
            self._making.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._making)  # one who goes takes it from nobody

    async def event(self, name: str) -> bytes:
        """Return the document as a server-sent event, written once for all who follow. Raises as `get`."""
        document = await self.get()
        if self._event is None or self._event[0] is not document:
            self._event = (document, event(name, document))
        return self._event[1]

    async def _read(self) -> dict[str, Any]:
        made = await in_thread(self._make)
        self._found = (time.monotonic(), made)
        return made


class LiveView:
    """The documents that viewers follow: counts of all queues, flags, and what ended in the last hour."""

    def __init__(self, admin: Admin, operations: Operations) -> None:
        self._admin, self._operations = admin, operations
        self._flags: list[dict[str, Any]] = []
        self._flags_until = 0.0
        self._workers: list[WorkerProcess] = []
        self.queues = QueueTable(admin)
        self.snapshot = Shared(self._read_snapshot, 0.9)
        self.hour = Shared(lambda: asdict(admin.history("1h")), 25.0)
        self.findings = Shared(self._read_findings, 120.0)

    def _read_snapshot(self) -> dict[str, Any]:
        counts = self.queues.followed()
        infos, minute = counts.infos, [one.ended for one in counts.queues if one.ended is not None]
        flows = self.queues.flows()
        ages = [info.oldest_age for info in infos if info.oldest_age is not None]
        is_due = time.monotonic() >= self._flags_until
        if is_due or len(infos) <= FEW:
            serving = (one for queue in counts.queues if queue.info.workers for one in queue.workers)
            self._workers = processes_of(serving)
        if is_due:
            self._flags = self._read_flags(self._admin.knowing(counts.partitions), infos)
            busy = sum(bool(info.workers or info.leased or info.dead or info.scheduled) for info in infos)
            self._flags_until = time.monotonic() + min(_MOST_SECONDS, max(_FLAGS_SECONDS, _SECONDS_OF_A_QUEUE * busy))
        return {
            "at": datetime.now(UTC), "counted_since": counts.since,
            "totals": {
                **{state: sum(getattr(info, state) for info in infos) for state in _STATES}, "workers": len(self._workers),
                "slots": slots_of(self._workers)._asdict(),
                "paused_queues": sum(info.paused for info in infos), "oldest_age": max(ages, default=None),
            },
            "queues": [
                {
                    "name": info.name, **{state: getattr(info, state) for state in _STATES}, "workers": info.workers,
                    "oldest_age": info.oldest_age, "paused": info.paused, "stranded": info.stranded,
                    "flow": flow_document(flows.get(info.name)),
                }
                for info in counts.shown()
            ],
            "queues_total": len(infos),
            "read_queues": len(infos),
            "minute": {
                name: sum(max(0, getattr(one, name)) for one in minute) for name in ("done", "failed", "retried")
            },
            "flags": self._flags,
            "operations": self._operations.shown(),
        }  # fmt: skip

    # -- flags ------------------------------------------------------------------------------------------------------

    def _read_findings(self) -> dict[str, Any]:
        """Return what the doctor finds wrong."""
        found = [asdict(one) for one in self.doctor().findings if one.level in {"problem", "warning"}]
        return {"findings": found}

    def doctor(self) -> HealthReport:
        """Examine the server and the queues, of which each was counted lately."""
        counts = self.queues.counted()
        return self._admin.knowing(counts.partitions).doctor(seconds=_SECONDS_OF_RECORDS, queues=counts.infos)

    @staticmethod
    def _read_flags(admin: Admin, infos: list[QueueInfo]) -> list[dict[str, Any]]:
        """Return what asks for attention, as sentences with links: the worst first."""
        return [asdict(one) for one in admin.flags(infos, most=_MOST_BUSY)[:_MOST_FLAGS]]


def event(name: str, document: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + encoded(name, document) + b"\n\n"
