"""The routes of the HTTP API about queues."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from conveyor.admin.queue_flow import flow_document
from conveyor.admin.views import QueueInfo
from conveyor.admin.worker_control import processes_of
from conveyor.dashboard.documents import cause_document, queue_document
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field
from conveyor.dashboard.service import limit_document
from conveyor.errors import ConfigurationError

PAGE = Field("number", "rows of a page", default=50, least=1, most=100)
OFFSET = Field("number", "rows before the page", default=0)
QUEUE = Field("text", "the name of a queue", required=True)


def list_queues(call: ApiCall) -> dict[str, Any]:
    """
    Return a page of queues; those of the page are counted now.

    Where they are sorted by a count, `at` is when the first of all was counted for it. `slots` are those that a snapshot had last.
    """
    partitions = call.admin.queue_partitions()
    names = [name for name in partitions if call["q"].casefold() in name.casefold()]
    begin, end = call["offset"], call["offset"] + call["limit"]
    by_name, at, read = call["sort"] == "name", datetime.now(UTC), 0
    if not by_name:
        counts, wanted = call.service.live.queues.counted(), set(names)
        sizes = {info.name: getattr(info, call["sort"]) or 0 for info in counts.infos if info.name in wanted}
        names, at, read = sorted(sizes, key=lambda name: -sizes[name]), counts.since, len(sizes)
    counted = call.admin.count({name: partitions[name] for name in names[begin:end] if name in partitions}, 5)
    if not by_name:
        counted.sort(key=lambda one: -(getattr(one[0], call["sort"]) or 0))
    slots = call.service.live.queues.slots()
    flows = call.service.live.queues.flows()
    queues = [
        {
            **queue_document(info),
            "slots": slots[info.name]._asdict() if info.name in slots else None,
            "flow": flow_document(flows.get(info.name)),
            "recent": {"done": [one.done for one in last], "failed": [one.failed for one in last]},
        }
        for info, last, *_ in counted
    ]
    return {
        "queues": queues, "total": len(names), "offset": begin, "limit": call["limit"], "at": at,
        "read": len(queues) if by_name else read,
    }  # fmt: skip


def show_queue(call: ApiCall) -> dict[str, Any]:
    """Return one queue, why its jobs wait, and who serves it."""
    name = call["name"]
    info: QueueInfo = call.admin.queue(name)
    limits = call.service.limits.list(name)
    causes = call.admin.causes(name, info.ready + info.waiting, limits=limits)
    workers = call.admin.queue_workers(name)
    return {
        "queue": {**queue_document(info), "flow": flow_document(call.service.live.queues.flows().get(name))},
        "partitions": [queue_document(one) for one in call.admin.partitions(name)],
        "causes": [cause_document(one) for one in causes],
        "workers": [
            {**call.service.worker_document(one), "slots": whole.slots._asdict()}
            for one, whole in zip(processes_of(workers.registrations), workers.processes, strict=True)
        ],
        "slots": {**workers.slots._asdict(), "exact": workers.exact},
        "limits": [limit_document(one) for one in limits],
        "groups": call.service.groups_of(name),
        "paused_tasks": [one.name for one in causes if one.kind == "task-paused"],
    }


def pause(call: ApiCall) -> dict[str, Any]:
    """Pause a queue or all queues, or one task in it or in all."""
    return _pause(call, paused=True)


def resume(call: ApiCall) -> dict[str, Any]:
    """End a pause."""
    return _pause(call, paused=False)


def _pause(call: ApiCall, *, paused: bool) -> dict[str, Any]:
    queue, task = call["queue"], call["task"]
    if call["all"] and (queue is not None or task is not None):
        raise ConfigurationError("'all' means all queues, so it goes without 'queue' and 'task'. Nothing was changed.")
    if task is not None:
        change = call.admin.pause_task if paused else call.admin.resume_task
        return {"queue": queue, "task": task, "queues": change(task, queue)}
    changed = (call.admin.pause if paused else call.admin.resume)(None if call["all"] else queue or "")
    return {"queue": queue, "task": None, "queues": changed}


def purge(call: ApiCall) -> dict[str, Any]:
    """Remove all jobs that are not leased, or the dead letters."""
    return {"removed": call.admin.purge(call["queue"], dead=call["dead"])}


def redrive(call: ApiCall) -> dict[str, Any]:
    """Put dead letters back."""
    return {"moved": call.admin.redrive(call["queue"], limit=call["limit"])}


def repair(call: ApiCall) -> dict[str, Any]:
    """Put jobs back that are in no place."""
    return {"repaired": call.admin.repair(call["queue"])}


def delete(call: ApiCall) -> dict[str, Any]:
    """Delete an empty queue that nothing serves."""
    call.admin.delete_queue(call["queue"])
    return {"deleted": True}


_ONE = {"queue": QUEUE}
_PAUSED = {
    "queue": Field("text", "the name of a queue; with a task none for all"),
    "task": Field("text", "the name of a task"),
    "all": Field("flag", "all queues that exist", default=False),
}
QUEUE_ENDPOINTS = (
    ApiRoute(
        "GET", "queues", "queues", "List queues with their counts", list_queues,
        fields={
            "q": Field("text", "a part of the name", default=""), "offset": OFFSET, "limit": PAGE,
            "sort": Field("text", "the order", default="name", choices=("name", "ready", "dead", "oldest_age")),
        },
    ),
    ApiRoute("GET", "queue", "queue", "Show a queue", show_queue, fields={"name": QUEUE}),
    ApiRoute("POST", "queues/pause", "queue-paused", "Pause a queue, a task or all", pause, "pause_queues", _PAUSED),
    ApiRoute("POST", "queues/resume", "queue-resumed", "Resume a queue, a task or all", resume, "pause_queues", _PAUSED),
    ApiRoute(
        "POST", "queues/purge", "queue-purged", "Remove jobs that are not leased, or dead letters", purge, "purge_queues",
        {**_ONE, "dead": Field("flag", "the dead letters instead", default=False)},
    ),
    ApiRoute(
        "POST", "queues/redrive", "queue-redriven", "Put dead letters back", redrive, "retry_jobs",
        {**_ONE, "limit": Field("number", "at most so many", least=1)},
    ),
    ApiRoute("POST", "queues/repair", "queue-repaired", "Put jobs back that are in no place", repair, "retry_jobs", _ONE),
    ApiRoute("POST", "queues/delete", "queue-deleted", "Delete an empty queue", delete, "purge_queues", _ONE),
)  # fmt: skip
