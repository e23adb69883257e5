"""The routes of the HTTP API about jobs."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import asdict

from conveyor.admin.failure_matrix import MATRIX_RANGES
from conveyor.admin.job_query import JobQuery, parse
from conveyor.admin.views import ActionResult, JobInfo, QueueInfo
from conveyor.dashboard.access import Action
from conveyor.dashboard.documents import hide, job_document, job_row, why_document
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field, NotAllowed
from conveyor.dashboard.job_timeline import attempts_of, path_of
from conveyor.dashboard.operations import Operation
from conveyor.dashboard.queue_routes import OFFSET, PAGE
from conveyor.errors import ConfigurationError
from conveyor.ids import logical
from conveyor.jobs.history import HistoryEntry
from conveyor.messaging.selection import ActionName

SECONDS = 0.06
"""The time for which one call searches, so that an answer takes less than 100 ms; the next one goes on."""
_COUNTED_SECONDS = 5.0
"""The age that the counts of many queues may have where jobs are looked for."""
MOST_IDS = 1_000
_MOST_COPIED = 10_000
"""Characters of arguments for which a call that enqueues them again is written."""
MOST_LINES = 500
"""Lines of a job's log on its page, the newest."""
ACTIONS_OF: dict[str, Action] = {
    "retry": "retry_jobs",
    "promote": "retry_jobs",
    "cancel": "cancel_jobs",
    "delete": "delete_jobs",
}
FILTER = {
    "filter": Field("text", "a filter, such as state:dead task:mail.*", default=""),
    "queue": Field("text", "only of this queue"),
    "state": Field("text", "only in this state"),
}


def query_of(call: ApiCall) -> JobQuery:
    """Return the filter of a request. Raises NotAllowed for one that looks into payloads which the visitor may not see."""
    query = parse(call["filter"]).joined(call["queue"], call["state"])
    if query.reads_payloads and not call.access.allows("view_payloads"):
        raise NotAllowed("view_payloads")
    return query


def filter_document(query: JobQuery) -> dict[str, Any]:
    """Return the parts of a filter that the pages show as chosen."""
    return {
        "text": query.text, "queue": query.queue, "state": ",".join(query.states) or None, "task": query.wanted.task,
        "tag": query.wanted.tag,
    }  # fmt: skip


def list_jobs(call: ApiCall) -> dict[str, Any]:
    """Return a page of jobs, found in bounded work; the footer says what was not searched yet."""
    query = query_of(call)
    page = call.admin.search(
        query, cursor=call["cursor"], offset=call["offset"], limit=call["limit"], seconds=SECONDS,
        queues=_counted(call, query.queue),
    )  # fmt: skip
    newest = set(query.states) <= {"dead", "done"} and query.states
    return {
        "jobs": [job_row(info, call.access) for info in page.jobs], "next": page.next, "looked": page.looked,
        "total": page.total, "footer": page.footer, "filter": filter_document(query),
        "order": "newest first" if newest else "lease order",
    }  # fmt: skip


def _counted(call: ApiCall, queue: str | None) -> list[QueueInfo] | None:
    """Return all queues, by which a search in all of them finds its places: many as they were counted within the last seconds."""
    return call.service.live.queues.counted(_COUNTED_SECONDS).infos if queue is None else None


def count_states(call: ApiCall) -> dict[str, Any]:
    """Return how many jobs are in each state; `at`: when the first of the queues was counted."""
    if call["queue"]:
        return {**call.admin.state_counts(call["queue"]), "at": datetime.now(UTC)}
    counts = call.service.live.queues.counted()
    return {**call.admin.state_counts(queues=counts.infos), "at": counts.since}


def count_matching(call: ApiCall) -> dict[str, Any]:
    """Return how many jobs a filter chooses; not exact where that takes longer."""
    query = query_of(call)
    found = call.admin.count_matching(query, seconds=SECONDS, queues=_counted(call, query.queue))
    return {"count": found.count, "states": found.states, "exact": found.exact}


def show_job(call: ApiCall) -> dict[str, Any]:
    """Return everything about a job, and why it waits or how it ended."""
    info, why, entries = call.admin.report(call["id"])
    document = job_document(info, call.access)
    return {
        "job": document, "why": why_document(why, call.access), "path": path_of(entries, info.status),
        "attempts": attempts_of(entries), "history": [hide_reason(one, call) for one in entries],
        "progress": document["progress"], "notes": document["notes"],
        "logs": _log_lines(call, info.id) if call.access.allows("view_payloads") else None,
        "actions": _possible(info, call), "copy": _copies(info, call),
    }  # fmt: skip


def hide_reason(entry: HistoryEntry, call: ApiCall) -> dict[str, Any]:
    """Return a state that a job came into; without its reason, which may be an error, where payloads are not seen."""
    return {**asdict(entry), **({} if call.access.allows("view_payloads") else {"reason": None})}


def job_logs(call: ApiCall) -> dict[str, Any]:
    """Return the log lines of a job. A worker that runs it is asked to send further ones as they come."""
    followed = call.admin.ask_for_logs(call["id"])
    return {"followed": followed, "logs": _log_lines(call, call["id"])}


def _log_lines(call: ApiCall, id_: str) -> list[dict[str, Any]]:
    return [
        {"at": one.at, "level": one.level, "logger": one.logger, "text": one.message, "attempt": one.attempt}
        for one in call.admin.logs(id_)[-MOST_LINES:]
    ]


def act_on_jobs(call: ApiCall) -> dict[str, Any]:
    """Act on jobs that are named by their ids."""
    acts = {
        "retry": call.admin.retry, "promote": call.admin.retry, "cancel": call.admin.cancel, "delete": call.admin.delete,
    }  # fmt: skip
    return _done(acts[call["action"]](call["ids"]))


def update_job(call: ApiCall) -> dict[str, Any]:
    """Change a job that waits. Arguments that are given as they are shown stay as they are, what is redacted in them too."""
    changes = dict(call["changes"])
    if unknown := sorted(set(changes) - {"delay", "at", "priority", "args"}):
        raise ConfigurationError(f"A job has no {unknown[0]!r} to change. Known: delay, at, priority, args.")
    at, args = changes.get("at"), changes.get("args")
    if at is not None:
        changes["at"] = _instant(at)
    if args is not None:
        if not isinstance(args, dict):
            raise ConfigurationError("'args' must be an object of arguments by name. Nothing was changed.")
        shown = _arguments(call.admin.job(call["id"]))
        changes["args"] = {name: value for name, value in args.items() if name not in shown or shown[name] != value}
        if not changes["args"]:
            del changes["args"]
        if not changes:
            return {"id": call["id"], "changed": False, "detail": "These are the arguments that it has."}
    done = call.admin.update(call["id"], **changes)
    detail = "" if done else "It has started or ended meanwhile, and was not changed."
    return {"id": call["id"], "changed": done, "detail": detail}


def rerun_jobs(call: ApiCall) -> dict[str, Any]:
    """Enqueue new jobs with the arguments of some that have ended; the `detail` of a result is the new id."""
    return _done(call.admin.rerun(call["ids"]))


def _done(results: list[ActionResult]) -> dict[str, Any]:
    return {"results": results, "done": sum(one.done for one in results)}


def _instant(text: Any) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigurationError(f"'at' must be an instant, such as 2026-05-01T09:00+02:00, not {text!r}.") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _arguments(info: JobInfo) -> dict[str, Any]:
    """Return the arguments of a job as they are shown."""
    try:
        found = json.loads(info.payload or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _possible(info: JobInfo, call: ApiCall) -> list[str]:
    """Return what can be done with a job in its state; a job runs again where the app knows its task and it is kept."""
    waits = ["update", "cancel", "delete"]
    actions = {
        "dead": ["retry", "delete"], "scheduled": ["promote", *waits], "ready": waits, "waiting": waits, "leased": ["cancel"],
    }.get(info.status, [])  # fmt: skip
    known = call.service.core is not None and info.task in call.service.core.definitions
    if info.status in {"dead", "done"} and known and info.payload is not None:
        actions = [*actions, "rerun"]
    return actions


def _copies(info: JobInfo, call: ApiCall) -> dict[str, str | None]:
    """Return the call that would enqueue a job once more, as Python and as a command; none where its arguments may not be seen."""
    if not call.access.allows("view_payloads") or info.payload is None or len(info.payload) > _MOST_COPIED:
        return {"python": None, "command": None}
    if not info.task:
        queue = logical(info.queue)
        return {
            "python": f"app.queue({queue!r}).push(json.loads({info.payload!r}))",
            "command": f"conveyor push {shlex.quote(queue)} {shlex.quote(info.payload)}",
        }
    try:
        arguments = json.loads(info.payload)
    except ValueError:
        return {"python": None, "command": None}
    if not isinstance(arguments, dict):
        return {"python": None, "command": None}
    named = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return {
        "python": f"app.tasks[{info.task!r}].enqueue({named})",
        "command": f"conveyor enqueue {shlex.quote(info.task)} --args {shlex.quote(info.payload)}",
    }


def list_failures(call: ApiCall) -> dict[str, Any]:
    """Return failures by what they have in common and by time."""
    queues = _counted(call, call["queue"])
    document = asdict(call.admin.failure_matrix(call["range"], queue=call["queue"], seconds=SECONDS, queues=queues))
    groups = [hide(asdict(one), call.access) for one in document["groups"]]
    if not call.access.allows("view_payloads"):
        groups = [{**one, "filter": one["filter"] if " fingerprint:" in one["filter"] else None} for one in groups]
    return {**document, "groups": groups}


def start_operation(call: ApiCall) -> dict[str, Any]:
    """Begin an action on all jobs that a filter chooses."""
    query, shown = query_of(call), call["action"]
    if not call["filter"].strip() and not call["queue"] and not call["state"]:
        raise ConfigurationError("This would be done to every job of every queue: give a filter, a queue or a state.")
    actions: dict[str, ActionName] = {"retry": "redrive", "promote": "promote", "cancel": "cancel", "delete": "delete"}
    action = "promote" if shown == "retry" and query.states == ("scheduled",) else actions[shown]
    operation = call.service.operations.start(call.admin, action, shown, query, limit=call["limit"], rate=call["rate"])
    return {"operation": asdict(operation)}


def list_operations(call: ApiCall) -> dict[str, Any]:
    """Return the operations of this process, the newest first."""
    return {"operations": [_operation(one, call) for one in call.service.operations.all()]}


def show_operation(call: ApiCall) -> dict[str, Any]:
    """Return one operation."""
    return {"operation": _operation(call.service.operations.get(call["id"]), call)}


def stop_operation(call: ApiCall) -> dict[str, Any]:
    """Have an operation end after its present step; what it has done stays done."""
    return {"operation": _operation(call.service.operations.stop(call["id"]), call)}


def _operation(one: Operation, call: ApiCall) -> dict[str, Any]:
    return {**asdict(one), **({} if call.access.allows("view_payloads") else {"filter": None})}


_ID = {"id": Field("text", "the id of an operation", required=True)}
JOB_ENDPOINTS = (
    ApiRoute(
        "GET", "jobs", "jobs", "List jobs by a filter", list_jobs,
        fields={**FILTER, "cursor": Field("text", "the next of the page before"), "offset": OFFSET, "limit": PAGE},
    ),
    ApiRoute("GET", "jobs/counts", "job-counts", "Count jobs by state", count_states, fields={"queue": FILTER["queue"]}),
    ApiRoute("GET", "jobs/matching", "job-matches", "Count the jobs that a filter chooses", count_matching, fields=FILTER),
    ApiRoute("GET", "job", "job", "Show a job", show_job, fields={"id": Field("text", "the id of a job", required=True)}),
    ApiRoute(
        "GET", "job/logs", "job-logs", "Show the log lines of a job; a running one sends further ones as they come, for 15 seconds",
        job_logs, "view_payloads", {"id": Field("text", "the id of a job", required=True)},
    ),
    ApiRoute(
        "POST", "jobs/actions", "job-actions", "Retry, cancel or delete jobs by their ids", act_on_jobs, ACTIONS_OF,
        {
            "action": Field("text", "what to do", required=True, choices=tuple(ACTIONS_OF)),
            "ids": Field("texts", "ids of jobs", required=True, most=MOST_IDS),
        },
    ),
    ApiRoute(
        "POST", "jobs/update", "job-updated", "Change a job that waits", update_job, "edit_jobs",
        {
            "id": Field("text", "the id of a job", required=True),
            "changes": Field("object", "delay or at, priority, and args by name", required=True),
        },
    ),
    ApiRoute(
        "POST", "jobs/rerun", "jobs-rerun", "Run jobs again that have ended, as new jobs", rerun_jobs, "enqueue_jobs",
        {"ids": Field("texts", "ids of jobs", required=True, most=MOST_IDS)},
    ),
    ApiRoute(
        "POST", "operations", "operation", "Act on all jobs that a filter chooses, in the background", start_operation,
        ACTIONS_OF,
        {
            "action": Field("text", "what to do", required=True, choices=tuple(ACTIONS_OF)), **FILTER,
            "limit": Field("number", "at most so many", least=1), "rate": Field("text", "such as 100/s"),
        },
        status=202,
    ),
    ApiRoute(
        "GET", "failures", "failures", "Show failures by kind and time", list_failures,
        fields={
            "range": Field("text", "how far back", default="24h", choices=MATRIX_RANGES),
            "queue": Field("text", "only of this queue"),
        },
    ),
    ApiRoute("GET", "operations", "operations", "List operations", list_operations),
    ApiRoute("GET", "operation", "operation", "Show an operation", show_operation, fields=_ID),
    ApiRoute(
        "POST", "operations/stop", "operation", "Stop an operation", stop_operation, "cancel_jobs", _ID
    ),
)  # fmt: skip
