"""Judging what Redis itself wrote down: how jobs were stored and ended, who held them, and where they were meanwhile."""

from __future__ import annotations

import itertools

from chaos.redis_history import History
from chaos.run_data import Evidence, Run
from chaos.run_result import Verdict


def judge_history(evidence: Evidence, verdict: Verdict) -> None:
    """Judge the history of a run, and what was left of it at the end."""
    for finding in evidence.dump.findings:
        verdict.note("audit findings", finding)
    history = evidence.history
    if history is None:
        verdict.counts["false reaps"] = "-"  # several servers, and no one file that says who was reaped when
        return
    for finding in history.ledger.findings:
        verdict.note("audit findings", finding)
    for id_, job in history.jobs.items():
        if job.created > 1:
            verdict.note("stored twice", f"{id_} was stored {job.created} times")
        late = [end for end in job.ends if end.endswith(" again")]
        stored = [record for record in job.records if record["status"] == "done"]
        if late or len(stored) > 1 or any(record["late"] for record in job.records):
            verdict.note("duplicate outcomes", f"{id_}: ends {job.ends}, {len(stored)} results")
        if job.stolen:
            verdict.note("zombie accepted", f"{id_} was ended by who did not hold it; ends {job.ends}")
        if job.key_taken:
            verdict.note("unique key held twice", f"{id_} and {job.key_taken} both held {job.unique!r}")
        if job.silent and _owes_a_result(evidence, id_):
            verdict.note("ended without result", f"{id_}: its end and its result were two steps")
    verdict.counts["workers registered"] = len(history.crew)
    _false_reaps(evidence, history, verdict)


def _owes_a_result(evidence: Evidence, id_: str) -> bool:
    runs = evidence.runs.get(id_, [])
    token = evidence.tokens.get(runs[0].token) if runs else None
    return token is not None and "message" not in token.kind and any(run.how == "ok" for run in runs)


def _false_reaps(evidence: Evidence, history: History, verdict: Verdict) -> None:
    """Count registrations that were taken, jobs and all, from a process that had met no fault: nobody may bury the living."""
    struck, common = evidence.struck()
    for identity, ids in history.taken:
        pid = history.crew.get(identity, 0)
        if pid in struck:
            continue
        for before, after in _handovers(evidence, pid, ids):
            if not any(
                fault["at"] < after.start and fault["until"] > before.start - evidence.lease for fault in common
            ):
                verdict.note("false reaps", f"{identity} of pid {pid}, which lived, held {before.id}")
                break


def _handovers(evidence: Evidence, pid: int, ids: set[str]) -> list[tuple[Run, Run]]:
    """Return runs of *ids* in process *pid* that had not failed, each with the run that followed it."""
    found = []
    for id_ in ids:
        runs = evidence.runs.get(id_, [])
        found += [(a, b) for a, b in itertools.pairwise(runs) if a.pid == pid and a.how != "failed"]
    return found
