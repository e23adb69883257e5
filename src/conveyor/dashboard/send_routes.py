"""The routes of the HTTP API that store something new: messages and jobs of the app."""

from __future__ import annotations

from typing import Any

from conveyor.admin.admin import refuse_mark
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field
from conveyor.errors import ConfigurationError, UnknownTask

MOST_MESSAGES = 1_000
_OPTIONS = {
    "delay": Field("text", "how long it waits first, such as 5m"), "priority": Field("number", "0 to 9", default=0, most=9),
    "id": Field("text", "an id of your own"), "tags": Field("texts", "words by which it is found", default=()),
    "headers": Field("object", "texts by name"),
}  # fmt: skip


def app_of(call: ApiCall) -> Any:
    """Return the app of the dashboard. Raises ConfigurationError without one."""
    if call.service.app is None:
        raise ConfigurationError("This dashboard knows no app, whose queues and tasks are meant: start it with APP.")
    return call.service.app


def _options(call: ApiCall) -> dict[str, Any]:
    """Return the options that were given."""
    found = {name: call[name] for name in _OPTIONS if call[name]}
    if not all(isinstance(text, str) for text in found.get("headers", {}).values()):
        raise ConfigurationError("'headers' must be an object of texts. Nothing was stored.")
    return found


def push(call: ApiCall) -> dict[str, Any]:
    """Push messages with the same options; all or none of them."""
    messages = call["messages"]
    if call["id"] and len(messages) != 1:
        raise ConfigurationError("'id' names one message, and there are several. Nothing was stored.")
    queue, options = app_of(call).queue(call["queue"]), _options(call)
    ids = [queue.push(messages[0], **options)] if call["id"] else queue.push_many(messages, **options)
    call.admin.note("push", call["queue"], count=len(ids))
    return {"queue": call["queue"], "ids": ids}


def task_of(call: ApiCall, nothing: str) -> Any:
    """Return the task of the app that is named. Raises UnknownTask, which ends with *nothing*."""
    tasks = app_of(call).tasks
    if call["task"] not in tasks:
        known = ", ".join(sorted(tasks)[:10]) or "none"
        raise UnknownTask(f"There is no task {call['task'][:200]!r}. Known: {known}. {nothing}")
    return tasks[call["task"]]


def enqueue(call: ApiCall) -> dict[str, Any]:
    """Enqueue a job of a task of the app; its arguments are checked against the signature."""
    task = task_of(call, "Nothing was enqueued.")
    refuse_mark([*call["args"], call["kwargs"]], "Nothing was enqueued.")
    options = {**_options(call), **({"queue": call["queue"]} if call["queue"] else {})}
    job = (task.options(**options) if options else task).enqueue(*call["args"], **call["kwargs"])
    call.admin.note("enqueue", job.id, detail=call["task"])
    return {"id": job.id, "task": call["task"], "duplicate": job.duplicate}


SEND_ROUTES = (
    ApiRoute(
        "POST", "push", "pushed", "Push messages to a queue of the app", push, "enqueue_jobs",
        {
            "queue": Field("text", "the name of a queue", required=True),
            "messages": Field("list", "JSON values", required=True, most=MOST_MESSAGES), **_OPTIONS,
        },
    ),
    ApiRoute(
        "POST", "enqueue", "enqueued", "Enqueue a job of the app", enqueue, "enqueue_jobs",
        {
            "task": Field("text", "the name of a task", required=True), "args": Field("list", "by position", default=()),
            "kwargs": Field("object", "by name", default={}), "queue": Field("text", "another queue than the task's"), **_OPTIONS,
        },
    ),
)  # fmt: skip
