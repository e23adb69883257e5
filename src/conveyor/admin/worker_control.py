"""Workers as processes: what each of them does, and commands to one of them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from conveyor.admin.views import WorkerInfo
from conveyor.errors import WorkerNotFound
from conveyor.ids import logical, public
from conveyor.store import worker_commands
from conveyor.store.inspection import DAMAGED
from conveyor.store.worker_commands import LeasedRow, WorkerAction, WorkerCommand
from conveyor.units import instant, instant_or_none, quantity

if TYPE_CHECKING:
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys

LOOK_EVERY = 0.03
"""Seconds between two looks for the answer of a worker, which comes within milliseconds."""


class LeasedJob(msgspec.Struct, frozen=True):
    """A job that a worker holds; `since`: when it was leased, None where that is not known."""

    id: str
    task: str
    queue: str
    since: datetime | None


class Slots(NamedTuple):
    """Places of workers in which jobs run, and how many of them are used."""

    used: int
    total: int

    def __str__(self) -> str:
        return f"{self.used:,} of {quantity(self.total, 'slot')} used"


class WorkerProcess(msgspec.Struct, frozen=True):
    """
    One process that serves queues.

    `name` is host:pid, `kind` "worker" (of jobs), "consumer" or "pull" (of messages). `version` is that of Conveyor, `python` that
    of the interpreter, `build` and `labels` are what it was started with. `state`: "running", "quiet" (takes no new jobs) or
    "stopping". `supervisor`: the pid of the process that started it, None without one. `held`: how many jobs it holds. `seen`: its
    last heartbeat, `heartbeat_age` seconds ago by the server's clock. `silent`: all its leases have ended. `loop_lag`: for how many
    seconds its event loop kept others waiting lately at most; 0 below a tenth. `memory`: bytes that it and its job processes
    occupy; `cpu`: per cent of one core that they use. Both are told when they have changed, and None where they are not known.
    `jobs`: what it holds, the longest first, where that was asked for.
    """

    name: str
    host: str
    pid: int | None
    kind: str
    version: str
    python: str
    build: str
    labels: list[str]
    state: str
    started: datetime | None
    supervisor: int | None
    concurrency: int | None
    threads: int | None
    queues: list[str]
    held: int
    seen: datetime
    heartbeat_age: float
    lease_ends: datetime
    silent: bool
    loop_lag: float = 0.0
    memory: int | None = None
    cpu: int | None = None
    jobs: list[LeasedJob] = msgspec.field(default_factory=list)
    members: list[WorkerInfo] = msgspec.field(default_factory=list)
    """Its registrations, one for each queue or partition."""

    @property
    def slots(self) -> Slots:
        """Its slots; none of one that is silent, or takes messages. It may hold more jobs than run."""
        total = 0 if self.silent or self.kind != "worker" else max(0, self.concurrency or 0)
        return Slots(min(self.held, total), total)

    @property
    def about(self) -> dict[str, Any]:
        """The facts that it told of itself last: a change of its usage is told through one of its registrations."""
        return _told_last(self.members)


class QueueWorkers(NamedTuple):
    """
    The workers of a queue, and the slots of all worker processes that serve it.

    Slots may be used by jobs of other queues. `exact`: all of those were read; else more slots may be used.
    """

    registrations: list[WorkerInfo]
    processes: list[WorkerProcess]
    exact: bool

    @property
    def slots(self) -> Slots:
        """The slots of the processes."""
        return slots_of(self.processes)


def slots_of(processes: Iterable[WorkerProcess]) -> Slots:
    """Return the slots of *processes*."""
    slots = [one.slots for one in processes]
    return Slots(sum(one.used for one in slots), sum(one.total for one in slots))


def by_process(workers: Iterable[WorkerInfo]) -> dict[tuple[str, int | None, str], list[WorkerInfo]]:
    """Return *workers* by the process that they are (host, pid, its id without a pid): it has a registration for each queue."""
    groups: dict[tuple[str, int | None, str], list[WorkerInfo]] = {}
    for worker in workers:
        groups.setdefault((worker.host, worker.pid, "" if worker.pid else worker.id), []).append(worker)
    return groups


def processes_of(workers: Iterable[WorkerInfo]) -> list[WorkerProcess]:
    """Return the processes that *workers* belong to."""
    return [_process(group) for group in by_process(workers).values()]


def _process(group: list[WorkerInfo]) -> WorkerProcess:
    latest = max(group, key=lambda worker: worker.seen)
    about, pid, usage = latest.about, latest.pid, _told_last(group)
    name = f"{latest.host}:{pid}" if pid else latest.id
    if latest.host == DAMAGED:
        name = latest.id
    age = max(0.0, (latest.read_at - latest.seen).total_seconds())
    return WorkerProcess(
        name=name, host=latest.host, pid=pid, kind=_text(about, "kind"), version=_text(about, "version"),
        python=_text(about, "python"), build=_text(about, "build"), labels=_texts(about.get("labels")),
        state=_text(about, "state") or "running", started=instant_or_none(_number(about, "started")),
        supervisor=_number(about, "supervisor"), concurrency=_number(about, "concurrency"),
        threads=_number(about, "threads"), queues=list(dict.fromkeys(logical(one.queue) for one in group)),
        held=sum(one.held for one in group), seen=latest.seen, heartbeat_age=round(age, 3),
        lease_ends=max(one.lease_ends for one in group), silent=all(one.lease_ends < one.read_at for one in group),
        loop_lag=(_number(usage, "loop_lag_ms") or 0) / 1000, memory=_number(usage, "memory"), cpu=_number(usage, "cpu"),
        members=group,
    )  # fmt: skip


def _told_last(group: list[WorkerInfo]) -> dict[str, Any]:
    """Return what a process said of itself through that of its registrations through which it told its usage last."""
    # An earlier release tells no instant, and its lag through one of them alone.
    return max(
        (one.about for one in group),
        key=lambda about: (_number(about, "usage_told") or 0, _number(about, "loop_lag_ms") or 0),
    )


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    return value if isinstance(value, str) else ""


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _number(about: dict[str, Any], name: str) -> int | None:
    value = about.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def leased_job(queue: str, row: LeasedRow) -> LeasedJob:
    """Return a job that a worker holds."""
    return LeasedJob(public(queue, row.id), row.task, queue, instant(row.since_ms) if row.since_ms else None)


def find_process(processes: list[WorkerProcess], name: str) -> WorkerProcess:
    """Return the process of that name; raises WorkerNotFound."""
    for process in processes:
        if process.name == name:
            return process
    raise WorkerNotFound(name, [process.name for process in processes])


def command(
    client: Client, members: list[tuple[QueueKeys, str]], name: str, action: WorkerAction, seconds: float
) -> str:
    """
    Send a command to the process *name* through the first of its registrations that is there; return its answer.

    Raises WorkerNotFound, and TimeoutError where it does not answer within *seconds*.
    """
    for keys, identity in members:
        order = worker_commands.new_command(keys, action)
        if client.run(worker_commands.send(keys, identity, order)):
            return _answer(client, order, name, seconds)
    raise WorkerNotFound(name, [])


def _answer(client: Client, order: WorkerCommand, name: str, seconds: float) -> str:
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        data = client.run(worker_commands.read_answer(order))
        if data is not None:
            return data.decode(errors="replace")
        sleep(LOOK_EVERY)
    raise TimeoutError(
        f"Worker {name} has not answered to {order.action!r} within {seconds:g} s. The command stays for it for a minute. Is its "
        "event loop blocked, or the process stopped? Its log says which job blocks it, with the stack (E11)."
    )
