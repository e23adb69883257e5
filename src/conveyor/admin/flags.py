"""Problems that are found by themselves: each a sentence, with what to do and where it is seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from conveyor.units import instant_or_none, quantity, span

if TYPE_CHECKING:
    from conveyor.admin.history import History
    from conveyor.admin.views import QueueInfo
    from conveyor.admin.worker_control import LeasedJob
    from conveyor.store.schedules import ScheduleRow

_MAX_NAMED = 10
_MAX_ALONE = 5
"""Queues without a worker that have a flag each; more of them share one."""
_OR_CONSUMER = "  (for messages: a program that consumes them)"
DOCTORS_KINDS = frozenset({"no-worker", "outbox", "unplaced", "full", "schedule-stands-still"})
"""The kinds that the doctor finds too."""
LATE_SECONDS = 60.0
"""A schedule is late when it is so far behind its instant: workers decide within seconds."""
LONG_SECONDS = 3600.0
"""A job runs too long after that where nothing tells how long those of its task usually run."""


class Flag(msgspec.Struct, frozen=True):
    """
    Something that asks for attention; the dashboard, the doctor and `conveyor status` show the same sentence of it.

    `kind`: no-worker, outbox, unplaced, full, schedule-stands-still, failing or running-long. `problem`: something is wrong now.
    `warning`: something may go wrong. `note`: it passes by itself. `remedy`: a command. `links`: the pages of the dashboard.
    """

    kind: str
    level: Literal["problem", "warning", "note"]
    text: str
    remedy: str = ""
    code: str = ""
    links: tuple[dict[str, str], ...] = ()


def queue_flags(queues: Sequence[QueueInfo]) -> list[Flag]:
    """Return the flags of queues: without a worker, with an outbox that does not empty, with jobs in no place, full."""
    found = _stranded(queues)
    for one in queues:
        link = _queue_link(one)
        if one.outbox:
            what = (
                "1 spawned job or published copy"
                if one.outbox == 1
                else f"{one.outbox:,} spawned jobs or published copies"
            )
            has = f"Queue '{one.name}' has {what} in its outbox"
            if one.workers:
                found.append(
                    Flag("outbox", "note", f"{has}, not delivered to their queues yet", code="", links=(link,))
                )
            else:
                text = f"{has} and no worker of it delivers them, so they do not run."
                found.append(Flag("outbox", "problem", text, f"conveyor worker -q {one.name}", "E12", (link,)))
        if one.unplaced:
            records = (
                "1 job has a record and is" if one.unplaced == 1 else f"{one.unplaced:,} jobs have a record and are"
            )
            text = f"queue '{one.name}': {records} neither ready, scheduled, leased nor dead"
            found.append(Flag("unplaced", "problem", text, f"conveyor queue repair {one.name}", "", (link,)))
        if one.blocked:
            who = "1 producer waits" if one.blocked == 1 else f"{one.blocked:,} producers wait"
            text = f"Queue '{one.name}' is full ({held(one)}): {who} for room."
            found.append(Flag("full", "warning", text, f"conveyor worker -q {one.name}", "", (link,)))
    return found


def held(queue: QueueInfo) -> str:
    """Return how many places of a bounded queue are taken: "100 of 100"."""
    taken = queue.ready + queue.scheduled + queue.waiting + queue.leased
    return f"{taken:,} of {queue.max_length:,}" if queue.max_length else f"{taken:,} jobs"


def _stranded(queues: Sequence[QueueInfo]) -> list[Flag]:
    """Return flags for queues with jobs that no worker takes; one for all of them where they are many, or no worker runs."""
    served = [one.name for one in queues if one.workers]
    stuck = [one for one in queues if _without_worker(one) and not one.workers and not one.paused]
    if len(stuck) > (_MAX_ALONE if served else 1):
        names = ", ".join(one.name for one in stuck[:_MAX_NAMED]) + (", …" if len(stuck) > _MAX_NAMED else "")
        what = "and no worker takes them" if served else "and no worker is running"
        since = _age(max(stuck, key=lambda one: one.oldest_age or 0))
        left = sum(one.silent > 0 for one in stuck)
        gone = f". The workers of {left} of them have died or hang" if left else ""
        text = f"{len(stuck)} queues have {sum(map(_without_worker, stuck)):,} jobs {what}{since}: {names}{gone}"
        links = tuple(map(_queue_link, stuck[:_MAX_NAMED]))
        return [Flag("no-worker", "problem", text, f"conveyor worker{_OR_CONSUMER}", "E12", links)]
    takers = f"Workers take: {', '.join(served[:_MAX_NAMED])}." if served else "No worker is running."
    found = []
    for one in stuck:
        number = _without_worker(one)
        text = f"Queue '{one.name}' has {quantity(number, 'job')} and no worker takes it{_age(one)}.{_silent(one)} {takers}"
        remedy = f"conveyor worker -q {one.name}{_OR_CONSUMER}"
        found.append(Flag("no-worker", "problem", text, remedy, "E12", (_queue_link(one),)))
    return found


def _without_worker(queue: QueueInfo) -> int:
    """
    Count the jobs that wait for a worker where there is none.

    Those of limits and groups start no sooner without one, and those that silent workers hold are given to nobody else.
    """
    return queue.ready + queue.waiting + queue.leased


def _silent(queue: QueueInfo) -> str:
    """Return that the workers of a queue are there no more, where it had some."""
    if not queue.silent:
        return ""
    return (
        " Its worker has died or hangs." if queue.silent == 1 else f" Its {queue.silent:,} workers have died or hang."
    )


def _age(queue: QueueInfo) -> str:
    """Return since when the oldest job could have started; nothing in the first minute."""
    return "" if (queue.oldest_age or 0) < 60 else f", since {span(queue.oldest_age or 0)}"


def late_schedules(rows: Iterable[tuple[str, ScheduleRow]], now: datetime) -> list[Flag]:
    """Return a flag for each schedule that is behind its instant; *rows*: its queue, and what is stored of it."""
    found = []
    for queue, row in rows:
        name, due = row.name, instant_or_none(row.next_ms)
        if due is None or row.paused or (late := (now - due).total_seconds()) < LATE_SECONDS:
            continue
        text = f"Schedule '{name}' stands still: it was due {span(late)} ago. A worker of '{queue}' carries it on."
        remedy = f"conveyor worker -q {queue}  (with an app that has its task)"
        links = {"page": "schedule", "name": name}, {"page": "queue", "name": queue}
        found.append(Flag("schedule-stands-still", "problem", text, remedy, "E12", links))
    return found


def failing_tasks(history: History) -> list[Flag]:
    """Return a flag for each task of which every attempt failed lately, two or more."""
    return [
        Flag(
            "failing", "warning",
            f"'{one['task']}' failed {one['failed'] + one['retried']} times in a row in the last 15 minutes.",
            f"conveyor job list --task {one['task']} --state {state}", "",
            ({"page": "jobs", "filter": f"state:{state} task:{one['task']}"},),
        )
        for one in history.tasks
        if one["task"] and not one["done"] and one["failed"] + one["retried"] >= 2
        for state in ["dead" if one["failed"] else "scheduled"]  # those that wait for their retry
    ]  # fmt: skip


def overdue_jobs(history: History, running: Iterable[LeasedJob], now: datetime) -> list[Flag]:
    """
    Return a flag for each of the *running* jobs that runs longer than ten times the p95 of its task.

    For a task of which no job has ended lately an hour is too long.
    """
    usual: dict[Any, float] = {one["task"]: one["p95_ms"] for one in history.tasks if one["p95_ms"]}
    found = []
    for job in running:
        p95 = usual.get(job.task)
        ran = 0.0 if job.since is None else (now - job.since).total_seconds()
        if ran <= (LONG_SECONDS if p95 is None else max(10 * p95 / 1000, 1.0)):
            continue
        what = f"A job of '{job.task}' runs for" if job.task else f"A message of '{job.queue}' is held for"
        beside = "none has ended in the last 15 minutes" if p95 is None else f"95 of 100 end within {span(p95 / 1000)}"
        remedy = f"conveyor job show {job.id}"
        found.append(
            Flag(
                "running-long",
                "warning",
                f"{what} {span(ran)}; {beside}.",
                remedy,
                "",
                ({"page": "job", "id": job.id},),
            )
        )
    return found


def _queue_link(queue: QueueInfo) -> dict[str, str]:
    return {"page": "queue", "name": queue.name}
