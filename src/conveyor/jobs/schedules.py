"""Schedules of an app: what is enqueued when, kept in Redis beside the queue, so that no program has to wait for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from conveyor import ids
from conveyor.errors import ConfigurationError, PayloadError, ScheduleNotFound
from conveyor.ids import new_identity
from conveyor.jobs.job import Job
from conveyor.jobs.job_options import entry_of
from conveyor.jobs.schedule import Declaration, Missed, Overlap, ScheduleSpec, Timing, make_spec, make_timing
from conveyor.messaging import outbox
from conveyor.payload.records import read_envelope, write_envelope
from conveyor.payload.versions import sealed_name
from conveyor.store import operations, schedules
from conveyor.store.keys import known_queues
from conveyor.store.operations import Entry
from conveyor.store.schedules import Origin, RunLine, ScheduleRow
from conveyor.store.script import CallProgram, adrive, drive
from conveyor.units import Duration, instant, whole_number

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.jobs.task import Task, TaskCall
    from conveyor.store.keys import QueueKeys

V = TypeVar("V")

MOST_NEXT = 1000
"""Instants that one call of `next` returns."""


class ScheduledRun(msgspec.Struct, frozen=True):
    """
    One instant of a schedule, and its outcome.

    `outcome`: ``fired``, or why it was skipped: ``missed``, ``overlap``, ``paused``, ``superseded`` by another definition.
    `job`: the public id of the job. `skipped`: how many instants were skipped together, of which `instant` is the first.
    `at`: when it was decided.
    """

    instant: datetime
    at: datetime
    outcome: str
    job: str
    skipped: int

    @property
    def drift(self) -> timedelta | None:
        """The time from the instant to its job, jitter included; None of an instant that was skipped."""
        return self.at - self.instant if self.job else None


class Schedule:
    """A schedule as it was read. Its methods act on what is in Redis now."""

    def __init__(self, owner: Schedules, keys: QueueKeys, row: ScheduleRow) -> None:
        self._owner, self._keys, self._row = owner, keys, row
        self._spec = read_spec(row)
        self.name = row.name
        """Its name."""
        self.queue = ids.logical(keys.queue)
        """The queue that its jobs go to."""
        self.task = self._spec.task
        """The name of the task."""
        self.when = str(self._spec.timing)
        """When it is due, in words."""
        self.overlap: Overlap = self._spec.overlap
        self.missed: Missed = self._spec.missed
        self.origin: Origin = row.origin
        """``code``: a decorator declares it. ``data``: a program has put it."""
        self.paused = row.paused
        """Whether it stands still."""
        self.due = None if row.next_ms is None else instant(row.next_ms)
        """The instant it has reached; None when none comes any more."""
        self.fired, self.skipped = row.fired, row.skipped
        """The numbers of instants that had a job, and that were skipped."""

    def __repr__(self) -> str:
        return f"<Schedule {self.name} {self.when} {self.task}{' paused' if self.paused else ''}>"

    def next(self, count: int = 5) -> list[datetime]:
        """Return its next *count* instants, 1,000 at most, in its zone; none are said of a schedule that is paused."""
        whole_number("next(count)", count, 0, MOST_NEXT)
        if self._row.next_ms is None or self.paused:
            return []
        return self._spec.timing.next(count, self._row.next_ms - 1)

    def runs(self) -> list[ScheduledRun]:
        """Return what became of its last instants, the newest first; 20 at most are kept."""
        return [_run(self._keys, line) for line in self._row.runs]

    def run(self) -> Job[Any]:
        """Enqueue a job of it now, beside its instants; its next instant stays."""
        return self._owner.drive(self._owner.run_program(self._keys, self.name))

    async def arun(self) -> Job[Any]:
        """Awaitable form of `run`."""
        return await self._owner.adrive(self._owner.run_program(self._keys, self.name))

    def pause(self) -> None:
        """Let it stand still: its instants are skipped until `resume`."""
        self._owner.drive(self._owner.change_program(self._keys, self.name, "pause"))

    async def apause(self) -> None:
        """Awaitable form of `pause`."""
        await self._owner.adrive(self._owner.change_program(self._keys, self.name, "pause"))

    def resume(self) -> None:
        """Let it go on with its next instant."""
        self._owner.drive(self._owner.change_program(self._keys, self.name, "resume"))

    async def aresume(self) -> None:
        """Awaitable form of `resume`."""
        await self._owner.adrive(self._owner.change_program(self._keys, self.name, "resume"))

    def delete(self) -> None:
        """Remove it. Jobs that it has enqueued stay."""
        self._owner.delete(self.name)

    async def adelete(self) -> None:
        """Awaitable form of `delete`."""
        await self._owner.adelete(self.name)


class Schedules:
    """The schedules of an app's namespace."""

    def __init__(self, core: AppCore) -> None:
        self._core = core

    def put(
        self, name: str, call: TaskCall[Any], *, cron: str | None = None, tz: str | None = None, every: Duration | None = None,
        at: datetime | None = None, overlap: Overlap = "skip", missed: Missed = "one", jitter: Duration | None = None,
    ) -> Schedule:  # fmt: skip
        """
        Have *call* (``task.s(…)``) enqueued at each instant of a schedule; one of that name gets the new definition.

        The same definition changes nothing, so a program may put its schedules each time it starts. Raises ConfigurationError,
        also for a name that belongs to a decorator, and PayloadError.

        Args:
            name: of the schedule.
            call: what is enqueued.
            cron: a cron expression, of five fields, or six with seconds before them.
            tz: the time zone of `cron`; None: UTC.
            every: an interval of a second at least, counted from the epoch.
            at: one instant, with a zone.
            overlap: what an instant does while the job of the one before is not over: ``"skip"`` it, ``"queue"`` its job behind
                the other, or ``"cancel"`` the other.
            missed: of instants that passed while no worker was there: ``"skip"`` them, run ``"one"`` for all, or ``"all"``.
            jitter: each job starts later than its instant by up to that.
        """
        spec = make_spec(call, make_timing(cron, tz=tz, every=every, at=at), overlap, missed, jitter)
        return self.drive(self.put_program(name, call, spec, "data"))

    async def aput(
        self, name: str, call: TaskCall[Any], *, cron: str | None = None, tz: str | None = None, every: Duration | None = None,
        at: datetime | None = None, overlap: Overlap = "skip", missed: Missed = "one", jitter: Duration | None = None,
    ) -> Schedule:  # fmt: skip
        """Awaitable form of `put`."""
        spec = make_spec(call, make_timing(cron, tz=tz, every=every, at=at), overlap, missed, jitter)
        return await self.adrive(self.put_program(name, call, spec, "data"))

    def get(self, name: str) -> Schedule:
        """Return a schedule; raises ScheduleNotFound."""
        return self.drive(self._get(name))

    async def aget(self, name: str) -> Schedule:
        """Awaitable form of `get`."""
        return await self.adrive(self._get(name))

    def list(self) -> Sequence[Schedule]:
        """Return all schedules, by name."""
        return self.drive(self._list())

    async def alist(self) -> Sequence[Schedule]:
        """Awaitable form of `list`."""
        return await self.adrive(self._list())

    def delete(self, name: str) -> None:
        """Remove a schedule; raises ScheduleNotFound. Jobs that it has enqueued stay."""
        self.drive(self._delete(name))

    async def adelete(self, name: str) -> None:
        """Awaitable form of `delete`."""
        await self.adrive(self._delete(name))

    # -- programs -------------------------------------------------------------------------------------------------

    def drive(self, program: CallProgram[V]) -> V:
        """Carry out a program and return its value."""
        return drive(program, self._core.client.run)

    async def adrive(self, program: CallProgram[V]) -> V:
        """Awaitable form of `drive`."""
        return await adrive(program, self._core.client.arun)

    def put_program(self, name: str, call: TaskCall[Any], spec: ScheduleSpec, origin: Origin) -> CallProgram[Schedule]:
        """Declare a schedule; the value is the schedule as it is then."""
        ids.queue_name(name, what="schedule")
        if origin == "data" and name in self._core.declared_schedules:
            raise _foreign(name, "code")  # of this program, whose workers may not have stored it yet
        keys, entry = self._prepared(name, call, spec)
        return (yield from self._store(name, keys, entry, spec, origin))

    def edit_program(
        self, name: str, call: TaskCall[Any] | None, timing: Timing, overlap: Overlap | None, missed: Missed | None,
        jitter_ms: int | None,
    ) -> CallProgram[Schedule]:  # fmt: skip
        """
        Give a schedule that a program has put other instants; what is None stays as it is, also the options of its call.

        Raises ScheduleNotFound, and ConfigurationError for one that a decorator declares, for another queue, and for another call
        where the present one has options that the new one lacks: nobody would see that they are gone.
        """
        keys, row = yield from self._find(name)
        if row.origin == "code":
            raise _foreign(name, "code")
        old = read_spec(row)
        spec = replace(
            old, cron=timing.cron, tz=timing.tz, every_ms=timing.every_ms, at_ms=timing.at_ms, overlap=overlap or old.overlap,
            missed=missed or old.missed, jitter_ms=old.jitter_ms if jitter_ms is None else jitter_ms,
        )  # fmt: skip
        queue, kept = outbox.read(self._open(name, row.entry))
        if call is None:
            if spec.overlap == "queue":
                kept.group = kept.group or _own_group(name)
            elif kept.group == _own_group(name):
                kept.group = None
            return (yield from self._store(name, keys, outbox.write(queue, kept), spec, "data"))
        spec = replace(spec, task=call.definition.name)
        keys, entry = self._prepared(name, call, spec)
        if _options_of(name, kept) != _options_of(name, outbox.read(entry)[1]):
            raise ConfigurationError(
                f"The call of schedule {name!r} has options that {spec.task} does not give it by itself, such as a priority or a "
                f"timeout, and they would be lost. Nothing was stored. Change its call with app.schedules.put({name!r}, …)."
            )
        return (yield from self._store(name, keys, entry, spec, "data"))

    def _store(
        self, name: str, keys: QueueKeys, entry: bytes, spec: ScheduleSpec, origin: Origin
    ) -> CallProgram[Schedule]:
        index = schedules.schedule_index(self._core.client.namespace)
        while True:
            yield schedules.claim_name(index, name, keys.queue)
            other = yield schedules.queue_of(index, name)
            if other and other != keys.queue:
                elsewhere = self._core.keys(other)
                _, found = yield schedules.read_schedules(elsewhere, name)
                if found:
                    raise ConfigurationError(
                        f"Schedule {name!r} is there, for queue {ids.logical(other)!r}, and this one is for "
                        f"{ids.logical(keys.queue)!r}. Delete it first, or take another name."
                    )
                yield schedules.forget_name(index, name)
                continue
            now, rows = yield schedules.read_schedules(keys, name)
            is_same = bool(rows) and self._defines(rows[0], spec, entry)
            if is_same and rows[0].origin != origin:
                raise _foreign(name, rows[0].origin)
            if is_same and (self._core.sealing is None or self._core.sealing.is_current(rows[0].entry)):
                return Schedule(self, keys, rows[0])
            yield operations.announce(known_queues(self._core.client.namespace), keys.queue)
            # One that differs in the key of its seal alone goes on from the instant that it has reached.
            next_ms = rows[0].next_ms if is_same else spec.timing.at_ms or spec.timing.after(now)
            stored = yield schedules.put_schedule(
                keys, name, new_identity(), _write_spec(spec), self._seal(name, entry), origin, next_ms
            )
            if stored == schedules.PUT_FOREIGN:
                raise _foreign(name, "data" if origin == "code" else "code")
            _, rows = yield schedules.read_schedules(keys, name)
            if rows:
                return Schedule(self, keys, rows[0])

    def change_program(self, keys: QueueKeys, name: str, action: Literal["pause", "resume"]) -> CallProgram[None]:
        """Pause a schedule, or let it go on."""
        next_ms, passed = None, 0
        if action == "resume":
            now, rows = yield schedules.read_schedules(keys, name)
            if rows:
                timing, reached = read_spec(rows[0]).timing, rows[0].next_ms
                next_ms = reached if timing.at_ms is not None else timing.after(now)
                passed = 0 if reached is None else timing.count(reached, now)
        changed = yield schedules.change_schedule(keys, name, action, next_ms, passed)
        if changed == -1:
            raise ScheduleNotFound(name)

    def run_program(self, keys: QueueKeys, name: str) -> CallProgram[Job[Any]]:
        """Enqueue a job of a schedule now."""
        now, rows = yield schedules.read_schedules(keys, name)
        if not rows:
            raise ScheduleNotFound(name)
        entry = self.job_entry(keys, rows[0], now, ids.new_id(), jitter=False)
        entry.planned_ms = None
        [job] = yield operations.push(keys, operations.ProducerSequence(new_identity()), [entry])
        return Job(self._core, str(job), keys.queue, self._core.definitions.get(read_spec(rows[0]).task))

    def _get(self, name: str) -> CallProgram[Schedule]:
        return Schedule(self, *(yield from self._find(name)))

    def _find(self, name: str) -> CallProgram[tuple[QueueKeys, ScheduleRow]]:
        queue = yield schedules.queue_of(schedules.schedule_index(self._core.client.namespace), name)
        if queue:
            keys = self._core.keys(queue)
            _, rows = yield schedules.read_schedules(keys, name)
            if rows:
                return keys, rows[0]
        raise ScheduleNotFound(name)

    def _list(self) -> CallProgram[Sequence[Schedule]]:
        named = yield schedules.all_names(schedules.schedule_index(self._core.client.namespace))
        found: list[Schedule] = []
        for queue in sorted(set(named.values())):
            keys = self._core.keys(queue)
            _, rows = yield schedules.read_schedules(keys)
            found += [Schedule(self, keys, row) for row in rows]
        return sorted(found, key=lambda one: one.name)

    def _delete(self, name: str) -> CallProgram[None]:
        index = schedules.schedule_index(self._core.client.namespace)
        queue = yield schedules.queue_of(index, name)
        gone = -1
        if queue:
            gone = yield schedules.change_schedule(self._core.keys(queue), name, "delete")
            yield schedules.forget_name(index, name)
        if gone == -1:
            raise ScheduleNotFound(name)

    # -- what an instant enqueues -----------------------------------------------------------------------------------

    def job_entry(
        self, keys: QueueKeys, row: ScheduleRow, instant_ms: int, id: str, *, jitter: bool = True  # noqa: A002
    ) -> Entry:  # fmt: skip
        """
        Return the job of a schedule for an instant, put off by its *jitter*.

        Raises PayloadError for a definition that cannot be opened.
        """
        spec = read_spec(row)
        _, entry = outbox.read(self._open(row.name, row.entry))
        if self._core.sealing is not None:
            envelope = read_envelope(entry.rest)
            task = sealed_name(envelope.task, envelope.extra.version)
            body = self._core.sealing.wrap(envelope.body, queue=ids.logical(keys.queue), task=task, id=id)
            entry.rest = write_envelope(envelope.task, body, envelope.extra)
        entry.id, entry.own_id, entry.planned_ms = id, False, instant_ms
        if jitter and spec.jitter_ms:
            entry.delay_ms = (entry.delay_ms or 0) + random.randint(0, spec.jitter_ms)  # noqa: S311  no secret
        return entry

    def _prepared(self, name: str, call: TaskCall[Any], spec: ScheduleSpec) -> tuple[QueueKeys, bytes]:
        """Return the keys of the queue that a call goes to, and what is stored of it."""
        definition, outgoing = call.definition, call.outgoing
        if outgoing.id is not None or outgoing.at_ms is not None:
            raise ConfigurationError("A scheduled call takes no id= and no at=: its schedule gives each job both.")
        sent, body, limits = definition.encoded(outgoing, call.args, call.kwargs)
        entry = replace(entry_of(sent, body, None, definition.uniqueness, limits, deferred=False), id="")
        if spec.overlap == "queue" and entry.group is None:
            entry.group = _own_group(name)
        return self._keys(sent.queue), outbox.write(sent.queue, entry)

    def _defines(self, row: ScheduleRow, spec: ScheduleSpec, entry: bytes) -> bool:
        """Tell whether a schedule has this definition. One that was sealed with a key that is gone is another."""
        try:
            return (row.spec, self._open(row.name, row.entry)) == (_write_spec(spec), entry)
        except PayloadError:
            if self._core.sealing is None:
                raise
            return False

    def _keys(self, queue: str) -> QueueKeys:
        """Return the keys of a queue, of its first partition where it has several."""
        partitions = self._core.partitioned.get(queue)
        return self._core.keys(queue) if partitions is None else partitions.keys[0]

    def _seal(self, name: str, entry: bytes) -> bytes:
        sealing = self._core.sealing
        return entry if sealing is None else sealing.wrap(entry, queue="", task="", id=f"schedule:{name}")

    def _open(self, name: str, entry: bytes) -> bytes:
        sealing = self._core.sealing
        return entry if sealing is None else sealing.unwrap(entry, queue="", task="", id=f"schedule:{name}")


def declare(
    core: AppCore, task: Task[..., Any], timing: Timing, overlap: Overlap, missed: Missed, jitter: Duration | None
) -> None:
    """Note that a decorator has declared a schedule; raises ConfigurationError."""
    call = task.s()
    try:
        call.definition.signature.encode((), {})
    except PayloadError:
        raise ConfigurationError(
            f"{task.name} cannot be scheduled by a decorator, since it takes arguments. Write: "
            f"app.schedules.put({task.name!r}, {task.name.rpartition('.')[2]}.s(…), cron=…)"
        ) from None
    known = core.declared_schedules.get(task.name)
    if known is not None and known.call.definition.function is not call.definition.function:
        raise ConfigurationError(f"Two schedules are called {task.name!r}. Give a task another name.")
    core.declared_schedules[task.name] = Declaration(task.name, call, make_spec(call, timing, overlap, missed, jitter))


def _foreign(name: str, origin: str) -> ConfigurationError:
    whose = "a decorator in the code" if origin == "code" else "app.schedules.put()"
    return ConfigurationError(
        f"Schedule {name!r} belongs to {whose}. Nothing was stored. Take another name, or delete it first: "
        f"app.schedules.delete({name!r})."
    )


def _own_group(name: str) -> str:
    """Return the group by which the jobs of a schedule run one after the other, where they have no other."""
    return f"schedule:{name}"


def _options_of(name: str, entry: Entry) -> tuple[object, ...]:
    """Return what of a call does not come from its arguments; of headers the names: a middleware may write their values."""
    extra = read_envelope(entry.rest).extra
    return (
        entry.priority, entry.delay_ms, entry.expires_ms, entry.front, entry.tags, entry.unique is None,
        entry.group in {None, _own_group(name)}, replace(extra, headers=dict.fromkeys(extra.headers, "")),
    )  # fmt: skip


def timing_of(one: Schedule) -> Timing:
    """Return the instants at which a schedule is due."""
    return one._spec.timing  # noqa: SLF001  the one way to it


def _write_spec(spec: ScheduleSpec) -> bytes:
    return msgspec.json.encode(spec)


def read_spec(row: ScheduleRow) -> ScheduleSpec:
    """Return the specification of a schedule that was read; raises msgspec.MsgspecError for that of a later version."""
    return msgspec.json.decode(row.spec, type=ScheduleSpec)


def _run(keys: QueueKeys, line: RunLine) -> ScheduledRun:
    job = ids.public(keys.queue, line.job) if line.job else ""
    return ScheduledRun(instant(line.instant_ms), instant(line.at_ms), line.outcome, job, line.skipped)
