"""The snapshot that all viewers share: it is read at most once a second, whatever their number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from conveyor.dashboard.documents import encoded
from conveyor.dashboard.operations import Operations
from conveyor.errors import ConveyorError
from conveyor.store.transport.endpoint import in_thread
from conveyor.units import span

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.views import QueueInfo

MOST_QUEUES = 200
"""Queues that a snapshot has, by name."""
_STATES = ("ready", "scheduled", "waiting", "leased", "dead")
_FLAGS_SECONDS = 5.0
"""The age that flags may have: they are read less often than counts."""
_MOST_FLAGS = 20


class Shared:
    """A document that many ask for: made anew when it is older than *seconds*, by one of them while the others wait."""

    def __init__(self, make: Callable[[], dict[str, Any]], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._lock: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._found: tuple[float, dict[str, Any]] | None = None

    async def get(self) -> dict[str, Any]:
        """Return the document. Raises what making it raises."""
        loop = asyncio.get_running_loop()
        if self._lock is None or self._loop is not loop:  # each request has a loop of its own below WSGI
            self._lock, self._loop = asyncio.Lock(), loop
        async with self._lock:
            if self._found is None or time.monotonic() - self._found[0] >= self._seconds:
                made = await in_thread(self._make)
                self._found = (time.monotonic(), made)
            return self._found[1]


class LiveView:
    """
    The documents that viewers follow: counts of all queues, flags, and what ended in the last hour.

    *workers*: counts the worker processes. *schedules*: returns the documents of all schedules.
    """

    def __init__(
        self,
        admin: Admin,
        workers: Callable[[], int],
        schedules: Callable[[], list[dict[str, Any]]],
        operations: Operations,
    ) -> None:
        self._admin, self._count_workers, self._schedules = admin, workers, schedules
        self._operations = operations
        self._flags: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._workers = 0
        self.snapshot = Shared(self._read_snapshot, 0.9)
        self.hour = Shared(lambda: asdict(admin.history("1h")), 10.0)
        self.findings = Shared(self._read_findings, 30.0)

    def _read_snapshot(self) -> dict[str, Any]:
        admin = self._admin
        names = admin.names()
        infos = admin.queues(names[:MOST_QUEUES])
        ended = admin.ended_lately([info.name for info in infos], 1)
        minute = [last[-1] for last in ended.values() if last]
        ages = [info.oldest_age for info in infos if info.oldest_age is not None]
        if time.monotonic() - self._flags[0] > _FLAGS_SECONDS:
            self._flags = (time.monotonic(), self._read_flags(infos))
        return {
            "at": datetime.now(UTC),
            "totals": {
                **{state: sum(getattr(info, state) for info in infos) for state in _STATES}, "workers": self._workers,
                "paused_queues": sum(info.paused for info in infos), "oldest_age": max(ages, default=None),
            },
            "queues": [
                {
                    "name": info.name, **{state: getattr(info, state) for state in _STATES}, "workers": info.workers,
                    "oldest_age": info.oldest_age, "paused": info.paused, "stranded": info.stranded,
                }
                for info in infos
            ],
            "queues_total": len(names),
            "read_queues": len(infos),
            "minute": {
                name: sum(max(0, getattr(one, name)) for one in minute) for name in ("done", "failed", "retried")
            },
            "flags": self._flags[1],
            "operations": self._operations.shown(),
        }  # fmt: skip

    # -- flags ------------------------------------------------------------------------------------------------------

    def _read_findings(self) -> dict[str, Any]:
        """Return what the doctor finds wrong."""
        found = [asdict(one) for one in self._admin.doctor().findings if one.level in {"problem", "warning"}]
        return {"findings": found}

    def _read_flags(self, infos: list[QueueInfo]) -> list[dict[str, Any]]:
        """Return what asks for attention, as sentences with links: the worst first."""
        self._workers = self._count_workers()
        found = [*queue_flags(infos)]
        for read in (self._late_schedules, self._failing_tasks, self._overdue_jobs):
            try:
                found += read()
            except ConveyorError:
                continue  # a user of Redis who may not read it, a queue that went: the other flags are shown
        found.sort(key=lambda flag: flag["level"] != "problem")
        return found[:_MOST_FLAGS]

    def _late_schedules(self) -> list[dict[str, Any]]:
        found = []
        for one in self._schedules():
            if one["late"]:
                late = span((datetime.now(UTC) - one["due"]).total_seconds())
                text = f"Schedule '{one['name']}' stands still: it was due {late} ago. A worker of '{one['queue']}' carries it on."
                links = {"page": "schedule", "name": one["name"]}, {"page": "queue", "name": one["queue"]}
                found.append(_flag("schedule-stands-still", "problem", text, *links))
        return found

    def _failing_tasks(self) -> list[dict[str, Any]]:
        """Return a flag for each task of which every attempt failed lately, two or more."""
        return [
            _flag(
                "failing", "warning",
                f"'{one['task']}' failed {one['failed'] + one['retried']} times in a row in the last 15 minutes.",
                {"page": "jobs", "filter": f"state:dead task:{one['task']}"},
            )
            for one in self._admin.history("15m").tasks
            if one["task"] and not one["done"] and one["failed"] + one["retried"] >= 2
        ]  # fmt: skip

    def _overdue_jobs(self) -> list[dict[str, Any]]:
        """Return a flag for each job that runs longer than ten times the p95 of its task."""
        usual = {one["task"]: one["p95_ms"] for one in self._admin.history("1h").tasks if one["p95_ms"]}
        found = []
        for job in self._admin.jobs(None, "leased", limit=100) if usual else ():
            p95 = usual.get(job.task or "")
            ran = None if job.leased_at is None else datetime.now(UTC) - job.leased_at
            if p95 and ran is not None and ran.total_seconds() * 1000 > max(10 * p95, 1000):
                text = f"A job of '{job.task}' runs for {span(ran.total_seconds())}; 95 of 100 end within {span(p95 / 1000)}."
                found.append(_flag("running-long", "warning", text, {"page": "job", "id": job.id}))
        return found


def queue_flags(infos: list[QueueInfo]) -> list[dict[str, Any]]:
    """Return the flags of queues: without a worker, with an outbox that does not empty, with jobs in no place."""
    found = []
    for info in infos:
        link = {"page": "queue", "name": info.name}
        if info.ready and not info.workers and not info.paused:
            jobs = "1 job is" if info.ready == 1 else f"{info.ready:,} jobs are"
            since = "" if info.oldest_age is None else f" since {span(info.oldest_age)}"
            found.append(
                _flag("no-worker", "problem", f"{jobs} ready in '{info.name}'{since}, and no worker serves it.", link)
            )
        if info.outbox and not info.workers:
            text = f"{info.outbox:,} jobs that were spawned in '{info.name}' are not delivered: no worker serves it."
            found.append(_flag("outbox", "problem", text, link))
        if info.unplaced:
            text = f"{info.unplaced:,} jobs of '{info.name}' are in no place: repair the queue."
            found.append(_flag("unplaced", "problem", text, link))
    return found


def _flag(kind: str, level: str, text: str, *links: dict[str, str]) -> dict[str, Any]:
    return {"kind": kind, "level": level, "text": text, "links": list(links)}


def event(name: str, document: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + encoded(name, document) + b"\n\n"
