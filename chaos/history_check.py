"""Checks of the history that Redis recorded: how jobs were stored and ended, their holders, and their places in between."""

from __future__ import annotations

import itertools

from chaos.redis_history import History
from chaos.run_data import Run, RunData
from chaos.run_result import RunResult


def check_history(data: RunData, result: RunResult) -> None:
    """Check the history of a run, and the content of Redis at its end."""
    for finding in data.dump.findings:
        result.note("audit findings", finding)
    history = data.history
    if history is None:
        result.counts["false reaps"] = "-"  # several servers, and no one file that says who was reaped when
        return
    for finding in history.places.findings:
        result.note("audit findings", finding)
    for id_, job in history.jobs.items():
        if job.created > 1:
            result.note("stored twice", f"{id_} was stored {job.created} times")
        late = [end for end in job.ends if end.endswith(" again")]
        stored = [record for record in job.records if record["status"] == "done"]
        if late or len(stored) > 1 or any(record["late"] for record in job.records):
            result.note("duplicate outcomes", f"{id_}: ends {job.ends}, {len(stored)} results")
        if job.stolen:
            result.note("zombie accepted", f"{id_} was ended by who did not hold it; ends {job.ends}")
        if job.key_taken:
            result.note("unique key held twice", f"{id_} and {job.key_taken} both held {job.unique!r}")
        if job.silent and _owes_a_result(data, id_):
            result.note("ended without result", f"{id_}: its end and its result were two steps")
    result.counts["workers registered"] = len(history.processes)
    _false_reaps(data, history, result)


def _owes_a_result(data: RunData, id_: str) -> bool:
    runs = data.runs.get(id_, [])
    token = data.tokens.get(runs[0].token) if runs else None
    return token is not None and "message" not in token.kind and any(run.how == "ok" for run in runs)


def _false_reaps(data: RunData, history: History, result: RunResult) -> None:
    """Count registrations that were taken, with their jobs, from a process that had met no fault: a false reap."""
    struck, common = data.struck()
    for identity, ids in history.taken:
        pid = history.processes.get(identity, 0)
        if pid in struck:
            continue
        for before, after in _handovers(data, pid, ids):
            if not any(fault["at"] < after.start and fault["until"] > before.start - data.lease for fault in common):
                result.note("false reaps", f"{identity} of pid {pid}, which lived, held {before.id}")
                break


def _handovers(data: RunData, pid: int, ids: set[str]) -> list[tuple[Run, Run]]:
    """Return runs of *ids* in process *pid* that had not failed, each with the run that followed it."""
    found = []
    for id_ in ids:
        runs = data.runs.get(id_, [])
        found += [(a, b) for a, b in itertools.pairwise(runs) if a.pid == pid and a.how != "failed"]
    return found
