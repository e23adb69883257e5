"""The routes of the HTTP API about schedules, workers, limits, groups, topics, the server and the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, get_args

from msgspec.structs import asdict

from conveyor.admin.admin import refuse_mark
from conveyor.admin.server_info import read_server_info
from conveyor.admin.worker_control import slots_of
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field, NotAllowed
from conveyor.dashboard.send_routes import task_of
from conveyor.dashboard.service import in_zone, limit_document, schedule_document
from conveyor.errors import ConfigurationError, ScheduleNotFound
from conveyor.jobs.schedule import Missed, Overlap, make_spec, make_timing
from conveyor.jobs.schedules import Schedule
from conveyor.messaging.declared_limits import parse_limit
from conveyor.messaging.limit_control import GroupControl
from conveyor.units import milliseconds

if TYPE_CHECKING:
    from conveyor.jobs.task import TaskCall
    from conveyor.messaging.topic import Topic

SECONDS = 0.06
"""The time in which one call reads queue after queue, so that an answer takes less than 100 ms."""
_MOST_HELD_SHOWN = 10
"""Jobs of one worker that are shown."""
_AUDIT_PAGE = Field("number", "entries of a page", default=50, least=1, most=100)
_NAME = Field("text", "the name of a schedule", required=True)
_TIMING = {
    "cron": Field("text", "a cron expression of five fields, or six with seconds first"),
    "tz": Field("text", "the time zone of the expression; UTC without it"),
    "every": Field("text", "an interval, such as 30s or 1h, in place of an expression"),
}
_TOPIC = {
    "topic": Field("text", "the name of a topic, or a pattern", required=True),
    "queues": Field("texts", "names of queues", required=True, most=100),
}


# -- schedules ------------------------------------------------------------------------------------------------------


def list_schedules(call: ApiCall) -> dict[str, Any]:
    """Return all schedules with their next and their last instants."""
    return {"schedules": [schedule_document(one) for one in call.service.schedules.list()]}


def show_schedule(call: ApiCall) -> dict[str, Any]:
    """Return one schedule."""
    return {"schedule": schedule_document(call.service.schedules.get(call["name"]))}


def run_schedule(call: ApiCall) -> dict[str, Any]:
    """Enqueue a job of a schedule now."""
    job = call.service.schedules.get(call["name"]).run()
    call.admin.note("run schedule", call["name"], detail=job.id)
    return {"name": call["name"], "id": job.id}


def preview_schedule(call: ApiCall) -> dict[str, Any]:
    """Return when a schedule would be due, or what is wrong with it as written; nothing is stored."""
    try:
        timing = make_timing(call["cron"], tz=call["tz"], every=call["every"])
    except ConfigurationError as error:  # an answer like others: people are still writing
        return {"when": None, "next": [], "next_in_zone": [], "error": str(error)}
    instants = timing.next(5, round(datetime.now(UTC).timestamp() * 1000))
    return {"when": str(timing), "next": instants, "next_in_zone": in_zone(instants), "error": None}


def list_tasks(call: ApiCall) -> dict[str, Any]:
    """Return the tasks of the app, each with its signature; none without an app."""
    core = call.service.core
    return {
        "tasks": [
            {
                "name": name, "queue": one.outgoing.queue, "signature": one.signature.describe(),
                "parameters": one.signature.parameters, "required": one.signature.required,
            }
            for name, one in sorted(core.definitions.items() if core else ())
        ]
    }  # fmt: skip


def put_schedule(call: ApiCall) -> dict[str, Any]:
    """Put a new schedule, or change one that a program or a person has put."""
    name, schedules = call["name"], call.service.schedules
    timing = make_timing(call["cron"], tz=call["tz"], every=call["every"])
    jitter = None if call["jitter"] is None else milliseconds(call["jitter"], name="jitter")
    scheduled = _scheduled_call(call)
    if call["replace"]:
        program = schedules.edit_program(name, scheduled, timing, call["overlap"], call["missed"], jitter)
    else:
        if scheduled is None:
            raise ConfigurationError("'task' is missing: the name of a task. Nothing was stored.")
        with suppress(ScheduleNotFound):
            schedules.get(name)
            raise ConfigurationError(f"There is a schedule {name!r} already. Nothing was stored. Take another name.")
        spec = make_spec(scheduled, timing, call["overlap"] or "skip", call["missed"] or "one", call["jitter"])
        program = schedules.put_program(name, scheduled, spec, "data")
    stored = schedules.drive(program)
    call.admin.note(
        "edit schedule" if call["replace"] else "create schedule", name, detail=f"{stored.task} {stored.when}"
    )
    return {"schedule": schedule_document(stored)}


def _scheduled_call(call: ApiCall) -> TaskCall[Any] | None:
    """Return what a schedule is to enqueue; None: no task is named. Raises NotAllowed, since a schedule enqueues jobs."""
    if call["task"] is None:
        if call["args"] or call["kwargs"] or call["queue"]:
            raise ConfigurationError(
                "'args', 'kwargs' and 'queue' belong to a 'task', which is missing. Nothing was stored."
            )
        return None
    if not call.access.allows("enqueue_jobs"):
        raise NotAllowed("enqueue_jobs")
    task = task_of(call, "Nothing was stored.")
    refuse_mark([*call["args"], call["kwargs"]], "Nothing was stored.")
    scheduled: TaskCall[Any] = (task.options(queue=call["queue"]) if call["queue"] else task).s(
        *call["args"], **call["kwargs"]
    )
    return scheduled


def _change_schedule(word: str, change: Callable[[Schedule], None]) -> Callable[[ApiCall], dict[str, Any]]:
    def handle(call: ApiCall) -> dict[str, Any]:
        change(call.service.schedules.get(call["name"]))
        call.admin.note(f"{word} schedule", call["name"])
        return {"name": call["name"]}

    return handle


# -- workers ----------------------------------------------------------------------------------------------------------


def list_workers(call: ApiCall) -> dict[str, Any]:
    """Return the worker processes."""
    found = call.admin.worker_processes()
    workers = [call.service.worker_document(one) for one in found]
    return {"workers": workers, "slots": slots_of(found)._asdict(), "footer": None}


def list_held_jobs(call: ApiCall) -> dict[str, Any]:
    """Return some of the jobs that a worker holds, the longest first, and how many it holds."""
    one = call.admin.worker_process(call["id"], jobs=_MOST_HELD_SHOWN)
    return {"worker": one.name, "held": one.held, "jobs": [asdict(job) for job in one.jobs]}


def quiet_worker(call: ApiCall) -> dict[str, Any]:
    """Have a worker take no more jobs."""
    call.admin.quiet_worker(call["id"])
    return {"worker": call["id"], "outcome": "quiet"}


def stop_worker(call: ApiCall) -> dict[str, Any]:
    """Have a worker drain and end."""
    call.admin.stop_worker(call["id"])
    return {"worker": call["id"], "outcome": "stopping"}


def dump_stack(call: ApiCall) -> dict[str, Any]:
    """Return where each thread and each asyncio task of a worker is now."""
    return {"worker": call["id"], "stack": call.admin.worker_stack(call["id"])}


# -- limits and groups ------------------------------------------------------------------------------------------------


def list_limits(call: ApiCall) -> dict[str, Any]:
    """Return the limits and groups of all queues, or of those that were read in the time of one call: first those with limits."""
    until = monotonic() + SECONDS
    limited = {*call.admin.queues_with_limits(), *(call.service.core.limits if call.service.core else ())}
    names = sorted(call.admin.names(), key=lambda name: name not in limited)
    control = call.service.limits
    found: list[dict[str, Any]] = []
    grouped: list[dict[str, Any]] = []
    read = 0
    for name in names:
        if name in limited:
            found += [limit_document(one) for one in control.list(name)]
        grouped += call.service.groups_of(name)
        read += 1
        if monotonic() > until:
            break
    footer = (
        None if read == len(names) else f"Read {read:,} of {len(names):,} queues; a queue's own page has its limits."
    )
    return {"limits": found, "groups": grouped, "footer": footer}


def set_limit(call: ApiCall) -> dict[str, Any]:
    """Change a limit until it is reset."""
    limit = parse_limit(call["limit"], smooth=call["smooth"])
    named = limit if call["name"] is None else replace(limit, name=call["name"])
    call.service.limits.set(call["queue"], named, call["key"])
    call.admin.note("set limit", call["queue"], detail=_detail(call["name"], call["key"], call["limit"]))
    return {"queue": call["queue"], "name": call["name"], "key": call["key"], "limit": call["limit"]}


def reset_limit(call: ApiCall) -> dict[str, Any]:
    """Give a limit back to what code declares."""
    count = call.service.limits.reset(call["queue"], call["name"], call["key"])
    call.admin.note("reset limit", call["queue"], detail=_detail(call["name"], call["key"]))
    return {"queue": call["queue"], "reset": count}


def set_group(call: ApiCall) -> dict[str, Any]:
    """Set the weight of a group, or pause it."""
    GroupControl(call.admin.client).set(call["queue"], call["key"], weight=call["weight"], paused=call["paused"])
    paused = {None: None, True: "paused", False: "resumed"}[call["paused"]]
    weight = None if call["weight"] is None else f"weight {call['weight']}"
    call.admin.note("set group", call["queue"], detail=_detail(call["key"], paused, weight))
    return {"queue": call["queue"], "key": call["key"], "weight": call["weight"], "paused": call["paused"]}


def _detail(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


# -- topics -----------------------------------------------------------------------------------------------------------


def list_topics(call: ApiCall) -> dict[str, Any]:
    """Return the topics, and the queues that subscribe to each."""
    return {"topics": [asdict(one) for one in call.service.app_core().topics.read_all()]}


def _topic(call: ApiCall) -> Topic[Any]:
    return call.service.app_core().topics.make(call["topic"], Any, version=1, format=None)


def subscribe(call: ApiCall) -> dict[str, Any]:
    """Subscribe queues to a topic."""
    changed = _topic(call).subscribe(*call["queues"])
    call.admin.note("subscribe", call["topic"], count=changed, detail=_detail(*call["queues"]))
    return {"topic": call["topic"], "subscribed": changed}


def unsubscribe(call: ApiCall) -> dict[str, Any]:
    """End subscriptions to a topic."""
    changed = _topic(call).unsubscribe(*call["queues"])
    call.admin.note("unsubscribe", call["topic"], count=changed, detail=_detail(*call["queues"]))
    return {"topic": call["topic"], "unsubscribed": changed}


# -- the server and the audit -----------------------------------------------------------------------------------------


def show_server(call: ApiCall) -> dict[str, Any]:
    """Return what the server says of itself, and the findings of the doctor."""
    report = call.service.live.doctor()
    return {
        **asdict(read_server_info(call.admin.client)), "url": report.url, "family": report.family, "version": report.version,
        "latency_ms": report.latency_ms, "durability": report.durability, "replicas": report.replicas,
        "findings": [asdict(one) for one in report.findings],
    }  # fmt: skip


def show_audit(call: ApiCall) -> dict[str, Any]:
    """Return what people did, the newest first."""
    entries = call.admin.audit(limit=call["limit"], before=call["before"])
    return {
        "entries": [asdict(one) for one in entries],
        "next": entries[-1].id if len(entries) == call["limit"] else None,
    }


def _schedule_endpoints() -> Iterable[ApiRoute]:
    changes: dict[str, tuple[str, Callable[[ApiCall], dict[str, Any]]]] = {
        "run": ("Enqueue a job of a schedule now", run_schedule),
        "pause": ("Let a schedule stand still", _change_schedule("pause", Schedule.pause)),
        "resume": ("Let a schedule go on", _change_schedule("resume", Schedule.resume)),
        "delete": ("Remove a schedule", _change_schedule("delete", Schedule.delete)),
    }
    for word, (summary, handle) in changes.items():
        path = f"schedules/{word}"
        yield ApiRoute("POST", path, f"schedule-{word}", summary, handle, "manage_schedules", {"name": _NAME})


_WORKER = {"id": Field("text", "host:pid of a worker process", required=True)}
_LIMIT = {
    "queue": Field("text", "the name of a queue or a task", required=True),
    "name": Field("text", "the name of a limit"),
    "key": Field("text", "one key of it"),
}
SYSTEM_ENDPOINTS = (
    ApiRoute("GET", "schedules", "schedules", "List schedules", list_schedules),
    ApiRoute("GET", "schedule", "schedule", "Show a schedule", show_schedule, fields={"name": _NAME}),
    ApiRoute(
        "GET", "schedules/preview", "schedule-preview", "Say when a schedule would be due", preview_schedule, fields=_TIMING
    ),
    ApiRoute(
        "POST", "schedules/put", "schedule-put", "Create a schedule, or change one; a task needs enqueue_jobs too",
        put_schedule, "manage_schedules",
        {
            "name": _NAME, **_TIMING, "task": Field("text", "the name of a task; of one that is changed, left out: its call stays"),
            "args": Field("list", "by position", default=()), "kwargs": Field("object", "by name", default={}),
            "queue": Field("text", "another queue than the task's"),
            "overlap": Field("text", "while the last job is not over", choices=get_args(Overlap)),
            "missed": Field("text", "of instants that passed without a worker", choices=get_args(Missed)),
            "jitter": Field("text", "each job starts later by up to that"),
            "replace": Field("flag", "change the one of that name; what is left out stays", default=False),
        },
    ),
    ApiRoute("GET", "tasks", "tasks", "List the tasks of the app", list_tasks),
    *_schedule_endpoints(),
    ApiRoute("GET", "workers", "workers", "List worker processes", list_workers),
    ApiRoute("GET", "workers/jobs", "worker-jobs", "List the jobs that a worker holds for longest", list_held_jobs, fields=_WORKER),
    *(
        ApiRoute("POST", f"workers/{word}", schema, title, handle, "stop_workers", _WORKER)
        for word, schema, title, handle in (
            ("quiet", "worker-commanded", "Have a worker take no more jobs", quiet_worker),
            ("stop", "worker-commanded", "Have a worker drain and end", stop_worker),
            ("stack", "worker-stack", "Show where the threads and tasks of a worker are", dump_stack),
        )
    ),
    ApiRoute("GET", "limits", "limits", "List limits and groups", list_limits),
    ApiRoute(
        "POST", "limits/set", "limit-set", "Change a limit until it is reset", set_limit, "manage_limits",
        {
            **_LIMIT, "limit": Field("text", "500/1m is a rate, 50 a concurrency", required=True),
            "smooth": Field("flag", "space the starts of a rate evenly", default=False),
        },
    ),
    ApiRoute(
        "POST", "limits/reset", "limits-reset", "Give limits back to what code declares", reset_limit, "manage_limits", _LIMIT
    ),
    ApiRoute(
        "POST", "groups/set", "group-set", "Set the weight of a group, or pause it", set_group, "manage_limits",
        {
            "queue": Field("text", "the name of a queue", required=True), "key": Field("text", "the key of a group", required=True),
            "weight": Field("number", "its turns for one of another", least=1, most=1000),
            "paused": Field("flag", "whether it stands still"),
        },
    ),
    ApiRoute("GET", "topics", "topics", "List topics", list_topics),
    ApiRoute(
        "POST", "topics/subscribe", "topic-subscribed", "Subscribe queues to a topic", subscribe, "manage_schedules", _TOPIC
    ),
    ApiRoute(
        "POST", "topics/unsubscribe", "topic-unsubscribed", "End subscriptions to a topic", unsubscribe, "manage_schedules", _TOPIC
    ),
    ApiRoute("GET", "redis", "redis", "Show the server and the findings about it", show_server),
    ApiRoute(
        "GET", "audit", "audit", "List what people did", show_audit,
        fields={"limit": _AUDIT_PAGE, "before": Field("text", "the id of an entry")},
    ),
)  # fmt: skip
