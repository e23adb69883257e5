"""The JSON documents of the HTTP API. What the visitor may not see is left out here, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict, replace

from conveyor.admin.views import json_form
from conveyor.dashboard.access import Access

if TYPE_CHECKING:
    from conveyor.admin.views import ErrorInfo, JobInfo, QueueInfo
    from conveyor.jobs.why import QueueCause, Why

PREVIEW = 200
"""Characters of the arguments of a job in a list."""
MOST_SHOWN = 64 * 1024
"""Characters of a payload or a result on the page of a job."""
HIDDEN_OF_JOBS = ("args", "payload", "payload_size", "result", "result_size", "progress", "notes", "logs", "headers")
"""The members of a job that show payloads."""
HIDDEN_OF_ERRORS = ("message", "traceback", "frames")


def encoded(schema: str, document: Mapping[str, Any]) -> bytes:
    """Return a document with its schema as JSON; without one where that is ""."""
    whole = {**({"schema": f"conveyor/{schema}@1"} if schema else {}), **document}
    text = json.dumps(whole, default=json_form, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def hide(document: dict[str, Any], access: Access) -> dict[str, Any]:
    """
    Return a document of a job, an error or a failure group without what the visitor may not see.

    The one place where arguments, results, logs, notes and the texts of errors are taken out.
    """
    if access.allows("view_payloads"):
        return document
    names = {*HIDDEN_OF_JOBS, *HIDDEN_OF_ERRORS} & set(document)
    kept = {name: None if name in names else value for name, value in document.items()}
    for name in ("error", "errors"):
        value = kept.get(name)
        if isinstance(value, dict):
            kept[name] = hide(value, access)
        elif isinstance(value, list):
            kept[name] = [hide(one, access) for one in value]
    return {**kept, "hidden": True}


def queue_document(info: QueueInfo) -> dict[str, Any]:
    """Return a queue."""
    return {**asdict(info), "stranded": info.stranded}


def job_row(info: JobInfo, access: Access) -> dict[str, Any]:
    """Return a job as lists show it."""
    return hide(_job_row(info), access)


def _job_row(info: JobInfo) -> dict[str, Any]:
    last = info.errors[-1] if info.errors else None
    return {
        "id": info.id, "queue": info.queue, "state": info.status, "task": info.task, "attempt": info.attempt,
        "failures": info.failures, "crashes": info.crashes, "priority": info.priority, "enqueued": info.enqueued,
        "due": info.due, "expires": info.expires, "ended": info.ended, "since": info.since, "ran_ms": info.ran_ms,
        "unique": ", ".join(info.keys) or info.unique, "group": info.group, "limits": info.limits, "tags": info.tags,
        "worker": info.worker, "host": info.host, "pid": info.pid, "args": shortened(info.payload, PREVIEW),
        "error": None if last is None else {"type": last.type, "message": shortened(last.message, 300)},
        "progress": info.progress,
    }  # fmt: skip


def job_document(info: JobInfo, access: Access) -> dict[str, Any]:
    """Return a job with everything that is kept of it."""
    whole = {
        **_job_row(info),
        "keys": info.keys,
        "headers": info.headers,
        "payload": shortened(info.payload, MOST_SHOWN),
        "payload_size": None if info.payload is None else len(info.payload),
        "result": shortened(info.result, MOST_SHOWN),
        "result_size": None if info.result is None else len(info.result),
        "reason": info.reason,
        "leased_at": info.leased_at,
        "timeout_ms": info.timeout_ms,
        "errors": [error_document(one) for one in info.errors],
        "notes": info.notes,
        "origin": info.origin,
    }
    return hide(whole, access)


def error_document(error: ErrorInfo) -> dict[str, Any]:
    """Return the error of an attempt, with its traceback in frames."""
    from conveyor.admin.tracebacks import frames_of

    return {**asdict(error), "frames": [asdict(frame) for frame in frames_of(error.traceback)]}


def why_document(why: Why, access: Access) -> dict[str, Any]:
    """Return a cause of waiting with its sentence, its links and the further causes; without the errors that may not be seen."""
    if not access.allows("view_payloads"):
        why = replace(why, error="")
    links: list[dict[str, str]] = []
    if why.kind in {"queue-paused", "no-worker", "position", "unknown-task", "task-paused"}:
        links.append({"page": "queue", "name": why.queue})
    if why.kind in {"limit", "group-paused"}:
        links.append({"page": "limits", "name": why.name})
    if why.kind == "group" and why.behind:
        links.append({"page": "job", "id": why.behind})
    if why.kind in {"rerun", "parent"} and why.name:
        links.append({"page": "job", "id": why.name})
    if why.kind == "running":
        links.append({"page": "workers", "name": why.name})
    return {
        **asdict(why),
        "sentence": str(why),
        "links": links,
        "also": [why_document(one, access) for one in why.also],
    }


def cause_document(cause: QueueCause) -> dict[str, Any]:
    """Return a cause for which jobs of a queue wait, with its sentence and its links."""
    links = [{"page": "limits", "name": cause.name}] if cause.kind in {"limit", "group", "group-paused"} else []
    return {**asdict(cause), "sentence": str(cause), "links": links}


def shortened(text: str | None, most: int) -> str | None:
    """Return the beginning of a text, with … where more follows."""
    return text if text is None or len(text) <= most else f"{text[:most]}…"
