"""Carrying out schedules: computes what follows the instant that has come, and lets one step enqueue its job and move on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.ids import public
from conveyor.jobs.schedule import job_id, late_instants
from conveyor.jobs.schedules import Schedules, read_spec
from conveyor.payload import failures
from conveyor.store import operations, schedules
from conveyor.store.schedules import Fired, ScheduleRow
from conveyor.units import span
from conveyor.worker.attempt import one_line
from conveyor.worker.leasing.timers import BackgroundRun

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from conveyor.jobs.core import AppCore
    from conveyor.jobs.schedule import ScheduleSpec
    from conveyor.store.keys import QueueKeys

log = logging.getLogger("conveyor.worker")
DEFERRED_MS = 30_000
"""Before a worker is asked again about a schedule whose task this one does not know."""


async def declare_schedules(app: AppCore, queues: Container[str]) -> None:
    """
    Store the schedules that decorators of the app declare for *queues*.

    The last deployment that was started wins. A name that `app.schedules.put` has taken is left alone, with an error in the log.
    """
    owner = Schedules(app)
    for one in app.declared_schedules.values():
        if one.call.definition.queue in queues:
            try:
                await owner.adrive(owner.put_program(one.name, one.call, one.spec, "code"))
            except ConveyorError as error:
                log.error("schedule %s is not stored: %s %s", one.name, error.code, error)


class Scheduler(BackgroundRun):
    """
    Carries out the schedules of one queue whose instants a turn has met. While none has come, nothing runs and nothing is sent.

    The server puts an alarm off by two seconds when it hands it to a worker. So an instant whose worker dies is carried out by
    another one two seconds later, and since the step compares the instant, by one alone.
    """

    def __init__(self, keys: QueueKeys, app: AppCore) -> None:
        super().__init__()
        self._keys, self._app = keys, app
        self._schedules = Schedules(app)
        self._due: dict[str, None] = {}

    def begin(self, names: Iterable[str]) -> None:
        """Carry out the schedules *names*, now or right after those under way."""
        self._due |= dict.fromkeys(names)
        self._begin()

    async def _work(self) -> None:
        while self._due:
            names, self._due = list(self._due), {}
            try:
                now, rows = await self._app.client.arun(schedules.read_schedules(self._keys, *names))
                for row in rows:
                    await self._try(row, now)
                for name in set(names) - {row.name for row in rows}:
                    # Its alarm outlived it, and goes; one that was put meanwhile stays, and is looked at now.
                    await self._app.client.arun(schedules.change_schedule(self._keys, name, "defer", now))
            except ConveyorError as error:
                log.warning("queue %s: schedules are carried out later: %s", self._keys.queue, error)

    async def _try(self, row: ScheduleRow, now: int) -> None:
        """Carry out a schedule. One that cannot be is put off, for a worker that can, and holds up no other."""
        try:
            await self._carry_out(row, now)
        except StoreUnavailable:
            raise
        except Exception as error:
            code = getattr(error, "code", "") or type(error).__name__
            log.error(
                "schedule %s cannot be carried out here: %s %s", row.name, code, one_line(failures.message(error))
            )
            await self._defer(row, now)

    async def _carry_out(self, row: ScheduleRow, now: int) -> None:
        """Carry out all instants of a schedule that have come."""
        try:
            spec = read_spec(row)
        except msgspec.MsgspecError:
            log.warning("schedule %s: a later version wrote it; a worker of that version carries it out", row.name)
            await self._defer(row, now)
            return
        if spec.task not in self._app.definitions:
            await self._defer(row, now)
            return
        while row.next_ms is not None and row.next_ms <= now and not row.paused:
            missed, come = late_instants(spec, row.next_ms, now)
            if missed:
                following = come[0] if come else spec.timing.after(missed[-1])
                call = schedules.fire_schedule(self._keys, row, following, None, reason="missed", count=len(missed))
                if not (await self._app.client.arun(call)).skipped:
                    return  # another worker was first
                log.warning(
                    "schedule %s: %s passed while no worker was there, and %s skipped",
                    row.name,
                    *(("1 instant", "is") if len(missed) == 1 else (f"{len(missed):,} instants", "are")),
                )
                row = row._replace(next_ms=following)
            for instant in come:
                following = spec.timing.after(instant)
                fired = await self._fire(row, spec, instant, following, now)
                if not (fired.job or fired.skipped):
                    return
                row = row._replace(next_ms=following, last=fired.job or row.last)

    async def _fire(self, row: ScheduleRow, spec: ScheduleSpec, instant: int, following: int | None, now: int) -> Fired:
        """Carry out one instant; where another worker has done it, or the queue refuses its job, nothing was."""
        if spec.overlap == "cancel" and row.last:
            await self._app.client.arun(operations.cancel(self._keys, row.last))
        job = self._schedules.job_entry(self._keys, row, instant, job_id(row.name, instant))
        # The record of a job goes to the server as it is, sealed or not, and large bodies are in their store by now.
        call = schedules.fire_schedule(self._keys, row, following, job, alone=spec.overlap == "skip")
        fired = await self._app.client.arun(call)
        if fired.refusal:
            log.warning(
                "schedule %s: queue %s refused its job (%s); it is tried again",
                row.name,
                self._keys.queue,
                fired.refusal,
            )
        elif fired.skipped:
            log.info("schedule %s: skipped, because the job of its last instant is not over", row.name)
        elif fired.job:
            late = f", {span((now - instant) / 1000)} late" if now - instant >= 1000 else ""
            log.debug("schedule %s: job %s%s", row.name, public(self._keys.queue, fired.job), late)
        return fired

    async def _defer(self, row: ScheduleRow, now: int) -> None:
        await self._app.client.arun(schedules.change_schedule(self._keys, row.name, "defer", now + DEFERRED_MS))
