"""The attempts of a job over time, and its path through the states, out of its history."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from conveyor.jobs.history import HistoryEntry

_ENDS = {"failed": "failed", "crashed": "crashed", "returned": "returned", "snoozed": "snoozed", "done": "done", "dead": "failed",
         "cancelled": "cancelled"}  # fmt: skip
_WAITS = {
    "failed": "retry",
    "crashed": "queue",
    "returned": "queue",
    "snoozed": "time",
    "pushed": "queue",
    "redriven": "queue",
}
_PLACES = {
    "pushed": ["ready"], "leased": ["leased"], "failed": ["leased", "scheduled"], "snoozed": ["leased", "scheduled"],
    "crashed": ["leased", "ready"], "returned": ["leased", "ready"], "redriven": ["ready"], "promoted": ["ready"],
    "done": ["leased", "done"], "dead": ["leased", "dead"], "cancelled": ["cancelled"],
}  # fmt: skip


def attempts_of(entries: Sequence[HistoryEntry]) -> list[dict[str, Any]]:
    """
    Return the attempts of a job, oldest first.

    `since`: the end of the attempt before, or when it was enqueued; between it and `ended` it waited and ran. `began`, `waited`
    and `ran_ms` are known of an attempt whose start is kept, which is that of no message that failed and of no crash.
    """
    found: list[dict[str, Any]] = []
    since: datetime | None = None
    waits, began = "queue", None
    for entry in entries:
        if entry.state == "leased":
            began = entry
        elif entry.state in _ENDS and (began is not None or not _repeats(found, entry)):
            if entry.attempt or began is not None:
                found.append(_attempt(len(found) + 1, entry, since, began, waits))
            began = None
        if entry.state in _WAITS:
            since, waits = entry.at, _WAITS[entry.state]
    if began is not None:
        found.append(_attempt(len(found) + 1, None, since, began, waits))
    return found


def _repeats(found: Sequence[dict[str, Any]], entry: HistoryEntry) -> bool:
    """Tell whether an end is that of the attempt before: a dead job has both its last error and its death."""
    return bool(found) and entry.attempt == found[-1]["number"]


def _attempt(
    number: int, end: HistoryEntry | None, since: datetime | None, began: HistoryEntry | None, waits: str
) -> dict[str, Any]:
    start = None if began is None else began.at
    waited = (
        []
        if start is None or since is None
        else [{"kind": waits, "seconds": max(0.0, (start - since).total_seconds())}]
    )
    ran = (
        None
        if start is None or end is None or end.at is None
        else max(0, round((end.at - start).total_seconds() * 1000))
    )
    source = end if end is not None else began
    named = next((one.attempt for one in (end, began) if one is not None and one.attempt), number)
    return {
        "number": named, "since": since, "began": start, "ended": None if end is None else end.at,
        "outcome": "running" if end is None else _ENDS[end.state], "waited": waited, "ran_ms": ran,
        "worker": (source.worker or None) if source is not None else None,
    }  # fmt: skip


def path_of(entries: Sequence[HistoryEntry], state: str) -> list[str]:
    """Return the states that a job went through, to the present one."""
    path: list[str] = []
    for before, entry in pairwise([None, *entries]):
        assert entry is not None
        if before and entry.state == before.state == "crashed" and entry.attempt == before.attempt:
            continue  # a job that is given up as poison has its last crash twice
        if entry.state == "dead" and before and before.state == "crashed":
            path.pop()  # the last crash led to the end, and not back
        for place in _PLACES.get(entry.state, ()):
            if not path or path[-1] != place:
                path.append(place)
    if path[-3:] == ["scheduled", "leased", "dead"]:  # the last error led to the end, not to a retry
        path[-3:] = ["dead"]
    return path if path and path[-1] == state else [*path, state]
