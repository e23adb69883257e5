"""
Metrics as Prometheus reads them, from what Redis holds: the same numbers whichever program is asked.

The counters are those that workers write for each minute, with the sums of all minutes before. They begin at zero again
when a queue was deleted, or when nothing ended in it for 31 days.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from conveyor.admin.views import QueueInfo
from conveyor.admin.worker_control import WorkerProcess
from conveyor.messaging.limit_control import LimitState
from conveyor.store.inspection import BUCKETS_MS
from conveyor.store.schedules import ScheduleRow

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CAUSES = ("queue", "limit", "group", "retry")
"""The things that a job may have waited for."""
_ENDS = ("done", "failed", "retried", "cancelled", "expired")
_SECONDS = [f"{bound / 1000:g}" for bound in BUCKETS_MS]


class TaskTotals(msgspec.Struct):
    """The counters of one task in one queue. Histograms by the number of their bucket, times in ms."""

    done: int = 0
    failed: int = 0
    retried: int = 0
    cancelled: int = 0
    expired: int = 0
    ran_ms: int = 0
    durations: dict[int, int] = msgspec.field(default_factory=dict)
    delays: dict[int, int] = msgspec.field(default_factory=dict)
    waits: dict[str, int] = msgspec.field(default_factory=dict)


def task_totals(counters: Mapping[str, int]) -> dict[str, TaskTotals]:
    """Return the counters of a queue by task, from the fields that workers write."""
    totals: dict[str, TaskTotals] = defaultdict(TaskTotals)
    for name, value in counters.items():
        kind, _, task = name.partition(":")
        if kind == "wait":
            cause, _, task = task.partition(":")
            totals[task].waits[cause] = value
        elif kind in _ENDS:
            setattr(totals[task], kind, value)
        elif kind == "ms":
            totals[task].ran_ms = value
        elif kind[:2] in {"le", "at"} and kind[2:].isdigit():
            histogram = totals[task].durations if kind[:2] == "le" else totals[task].delays
            histogram[int(kind[2:])] = value
    return dict(totals)


class LoadView(msgspec.Struct, frozen=True):
    """
    The work of one queue, as an autoscaler needs it.

    `ready` jobs could start now, `waiting` ones wait for a group or a limit, `leased` ones are held by workers, `workers` is how
    many processes serve the queue. `oldest_age`: seconds since the oldest ready job could have started; 0 without one.
    """

    ready: int = 0
    waiting: int = 0
    scheduled: int = 0
    leased: int = 0
    workers: int = 0
    oldest_age: float = 0.0
    paused: bool = False


def load_view(info: QueueInfo) -> LoadView:
    """Return the work of a queue."""
    return LoadView(
        info.ready,
        info.waiting,
        info.scheduled,
        info.leased,
        info.workers,
        round(info.oldest_age or 0.0, 3),
        info.paused,
    )


def load_json(views: Mapping[str, LoadView]) -> dict[str, Any]:
    """
    Return the document of ``/load``: the queues, and the sums of those that are not paused.

    `load` is the one number for an autoscaler that takes no more: jobs that are ready, or held by workers.
    """
    active = [view for view in views.values() if not view.paused]
    total: dict[str, Any] = {
        name: sum(getattr(view, name) for view in active) for name in ("ready", "waiting", "scheduled", "leased")
    }
    total["load"] = total["ready"] + total["leased"]
    total["workers"] = max((view.workers for view in active), default=0)
    total["oldest_age"] = max((view.oldest_age for view in active), default=0.0)
    return {
        "schema": "conveyor/load@1",
        "queues": {
            name: {
                "ready": view.ready,
                "waiting": view.waiting,
                "scheduled": view.scheduled,
                "leased": view.leased,
                "workers": view.workers,
                "oldest_age": view.oldest_age,
                "paused": view.paused,
            }
            for name, view in sorted(views.items())
        },
        "total": total,
    }


class SystemFacts(msgspec.Struct, frozen=True):
    """
    The state of schedules, limits and workers, and the leases that were lost by queue.

    *schedules* are by queue, with the server's ms at which they were read.
    """

    schedules: Sequence[tuple[str, int, ScheduleRow]] = ()
    limits: Sequence[LimitState] = ()
    workers: Sequence[WorkerProcess] = ()
    lost: Mapping[str, int] = msgspec.field(default_factory=dict)


NO_FACTS = SystemFacts()


class _Family:
    """One metric with its samples."""

    def __init__(self, name: str, kind: str, help_: str) -> None:
        self._head = f"# HELP {name} {help_}\n# TYPE {name} {kind}\n"
        self.name, self._samples = name, list[str]()

    def add(self, value: float, suffix: str = "", **labels: str) -> None:
        self.add_labelled(value, _labels(**labels), suffix)

    def add_labelled(self, value: float, text: str, suffix: str = "") -> None:
        """Add a sample with labels that are text already."""
        self._samples.append(f"{self.name}{suffix}{text} {value:.15g}\n")

    def add_lines(self, lines: Sequence[str]) -> None:
        """Add samples that are text but for the name: of ten thousand queues, of which each has a dozen, that costs a fifth."""
        if lines:
            self._samples.append(self.name + self.name.join(lines))

    def add_histogram(self, buckets: Mapping[int, int], total: float, **labels: str) -> None:
        count, text = 0, _labels(**labels)
        for at, bound in enumerate([*_SECONDS, "+Inf"]):
            count += buckets.get(at, 0)
            self.add_labelled(count, f'{text[:-1]},le="{bound}"}}', "_bucket")
        self.add_labelled(total, text, "_sum")
        self.add_labelled(count, text, "_count")

    def text(self) -> str:
        return self._head + "".join(self._samples) if self._samples else ""


def _labels(**labels: str) -> str:
    """Return labels as a sample has them; without any nothing."""
    return "{" + ",".join(f'{label}="{_escaped(one)}"' for label, one in labels.items()) + "}" if labels else ""


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(
    queues: Iterable[QueueInfo],
    totals: Mapping[str, Mapping[str, TaskTotals]],
    server: Mapping[str, Any] | None,
    facts: SystemFacts = NO_FACTS,
) -> str:
    """
    Return the text of a scrape.

    *totals*: by queue and task. *server*: the reply to INFO; None: Redis does not answer, and nothing else is known.
    """
    families = [
        *_server_families(server),
        *_queue_families(queues),
        *_task_families(totals),
        *_schedule_families(facts),
    ]
    families += [*_limit_families(facts.limits), *_worker_families(facts)]
    return "".join(family.text() for family in families)


def _server_families(server: Mapping[str, Any] | None) -> Iterator[_Family]:
    up = _Family("conveyor_redis_up", "gauge", "1 when Redis answers.")
    up.add(0 if server is None else 1)
    yield up
    for name, kind, info, help_ in (
        ("conveyor_redis_memory_bytes", "gauge", "used_memory", "Memory that Redis uses."),
        ("conveyor_redis_memory_max_bytes", "gauge", "maxmemory", "Memory that Redis may use; 0: no limit."),
        (
            "conveyor_redis_evicted_keys_total",
            "counter",
            "evicted_keys",
            "Keys that Redis has evicted: each may be a lost job.",
        ),
        ("conveyor_redis_clients", "gauge", "connected_clients", "Connections to Redis."),
    ):
        family = _Family(name, kind, help_)
        if server is not None and info in server:
            family.add(float(server[info]))
        yield family


def _queue_families(queues: Iterable[QueueInfo]) -> Iterator[_Family]:
    jobs = _Family("conveyor_queue_jobs", "gauge", "Jobs and messages by state.")
    gauges = {
        "oldest_age": _Family(
            "conveyor_queue_oldest_seconds", "gauge", "Since when the oldest ready job could have started."
        ),
        "paused": _Family("conveyor_queue_paused", "gauge", "1 when the queue is paused."),
        "workers": _Family("conveyor_queue_workers", "gauge", "Workers and consumers that serve the queue."),
        "outbox": _Family("conveyor_queue_outbox_jobs", "gauge", "Spawned jobs that are not delivered yet."),
        "unplaced": _Family("conveyor_queue_unplaced_jobs", "gauge", "Jobs with a record that are in no place."),
        "blocked": _Family("conveyor_queue_blocked_producers", "gauge", "Producers that wait for room."),
        "dropped": _Family("conveyor_queue_dropped_total", "counter", "Jobs that were dropped for newer ones."),
        "max_length": _Family(
            "conveyor_queue_max_length", "gauge", "Jobs that the queue takes, where that is limited."
        ),
    }
    infos = list(queues)
    labels = [f'{{queue="{_escaped(info.name)}"' for info in infos]
    jobs.add_lines([
        f'{label},state="ready"}} {info.ready}\n{jobs.name}{label},state="scheduled"}} {info.scheduled}\n'
        f'{jobs.name}{label},state="waiting"}} {info.waiting}\n{jobs.name}{label},state="leased"}} {info.leased}\n'
        f'{jobs.name}{label},state="dead"}} {info.dead}\n'
        for label, info in zip(labels, infos, strict=True)
    ])  # fmt: skip
    zeros = [f"{label}}} 0\n" for label in labels]  # most are 0
    for attribute, family in gauges.items():
        values = [getattr(info, attribute) for info in infos]
        if attribute == "max_length":
            family.add_lines([
                f"{label}}} {value}\n" for label, value in zip(labels, values, strict=True) if value is not None
            ])  # fmt: skip
        else:
            lines, form = zeros.copy(), ".15g" if attribute == "oldest_age" else "d"
            for at, value in enumerate(values):
                if value:
                    lines[at] = f"{labels[at]}}} {value:{form}}\n"
            family.add_lines(lines)
    yield jobs
    yield from gauges.values()


def _task_families(totals: Mapping[str, Mapping[str, TaskTotals]]) -> Iterator[_Family]:
    finished = _Family(
        "conveyor_jobs_finished_total",
        "counter",
        "How attempts and jobs ended: succeeded, retried (comes again), dead, cancelled, expired.",
    )
    duration = _Family("conveyor_job_duration_seconds", "histogram", "Run time of attempts that succeeded.")
    delay = _Family("conveyor_job_start_delay_seconds", "histogram", "First start of a job minus when it was due.")
    waits = _Family("conveyor_job_wait_seconds_total", "counter", "Time that jobs have waited, by what for.")
    for queue, tasks in sorted(totals.items()):
        for task, one in sorted(tasks.items()):
            labels = {"queue": queue, "task": task}
            ended = {
                "succeeded": one.done, "retried": one.retried, "dead": max(0, one.failed - one.retried),
                "cancelled": one.cancelled, "expired": one.expired,
            }  # fmt: skip
            for outcome, count in ended.items():
                finished.add(count, **labels, outcome=outcome)
            if one.done:
                duration.add_histogram(one.durations, one.ran_ms / 1000, **labels)
            if one.delays:
                waited = sum(ms for cause, ms in one.waits.items() if cause != "retry")
                delay.add_histogram(one.delays, waited / 1000, **labels)
            for cause in CAUSES:
                if cause in one.waits:
                    waits.add(one.waits[cause] / 1000, **labels, cause=cause)
    yield from (finished, duration, delay, waits)


def _schedule_families(facts: SystemFacts) -> Iterator[_Family]:
    fired = _Family("conveyor_schedule_fired_total", "counter", "Instants of a schedule that had a job.")
    skipped = _Family("conveyor_schedule_skipped_total", "counter", "Instants that were skipped, by reason.")
    last = _Family(
        "conveyor_schedule_last_run_timestamp_seconds",
        "gauge",
        "The last instant that had a job, of those that are kept.",
    )
    late = _Family(
        "conveyor_schedule_late_seconds", "gauge", "How long the instant that is due has passed; 0: it has not."
    )
    paused = _Family("conveyor_schedule_paused", "gauge", "1 while the schedule is paused.")
    for queue, now, row in facts.schedules:
        labels = {"queue": queue, "schedule": row.name}
        fired.add(row.fired, **labels)
        for reason, count in row.skipped_by.items():
            skipped.add(count, **labels, reason=reason)
        ran = max((run.instant_ms for run in row.runs if run.outcome == "fired"), default=None)
        if ran is not None:
            last.add(ran / 1000, **labels)
        behind = 0 if row.paused or row.next_ms is None else max(0, now - row.next_ms)
        late.add(behind / 1000, **labels)
        paused.add(row.paused, **labels)
    yield from (fired, skipped, last, late, paused)


def _limit_families(limits: Iterable[LimitState]) -> Iterator[_Family]:
    used = _Family(
        "conveyor_limit_used", "gauge", "Places or starts in use; of a limit by keys those of its fullest key."
    )
    available = _Family("conveyor_limit_available", "gauge", "What is left of the limit, of its fullest key.")
    waiting = _Family("conveyor_limit_waiting", "gauge", "Jobs that wait at the limit.")
    of_name: dict[tuple[str, str], list[LimitState]] = defaultdict(list)
    for one in limits:
        of_name[one.queue, one.name].append(one)
    for (queue, name), states in sorted(of_name.items()):
        fullest = max(states, key=lambda one: one.used / one.limit.n)
        labels = {"queue": queue, "limit": name, "kind": fullest.limit.kind}
        used.add(fullest.used, **labels)
        available.add(max(0, fullest.limit.n - fullest.used), **labels)
        waiting.add(sum(one.waiting for one in states), **labels)
    yield from (used, available, waiting)


def _worker_families(facts: SystemFacts) -> Iterator[_Family]:
    count = _Family("conveyor_workers", "gauge", "Processes that serve queues: workers, consumers and pulls, by state.")
    slots = _Family(
        "conveyor_worker_slots", "gauge", "Jobs that a worker runs at once: places that are used, and free."
    )
    lag = _Family("conveyor_worker_loop_lag_seconds", "gauge", "How long the event loop kept others waiting lately.")
    memory = _Family("conveyor_worker_memory_bytes", "gauge", "Memory that a worker and its job processes occupy.")
    cpu = _Family("conveyor_worker_cpu_ratio", "gauge", "Processor time that a worker uses: 1 is one core.")
    lost = _Family("conveyor_leases_lost_total", "counter", "Jobs and messages whose holder died or fell silent.")
    states: dict[tuple[str, str], int] = defaultdict(int)
    for one in facts.workers:
        states[one.kind or "unknown", "silent" if one.silent else one.state] += 1
        if not one.slots.total:
            continue
        slots.add(one.slots.used, worker=one.name, state="used")
        slots.add(one.slots.total - one.slots.used, worker=one.name, state="free")
        lag.add(one.loop_lag, worker=one.name)
        if one.memory is not None:
            memory.add(one.memory, worker=one.name)
        if one.cpu is not None:
            cpu.add(one.cpu / 100, worker=one.name)
    for (kind, state), number in sorted(states.items()):
        count.add(number, kind=kind, state=state)
    lost.add_lines([f'{{queue="{_escaped(queue)}"}} {number}\n' for queue, number in sorted(facts.lost.items())])
    yield from (count, slots, lag, memory, cpu, lost)
