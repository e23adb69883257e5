"""The judge: a pure function from evidence to counts. It imports nothing of Conveyor and trusts nothing it says of itself.

The words are those of the Jepsen suites of message brokers; chaos/README.md explains each line of the table.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from chaos.history_check import judge_history
from chaos.run_data import POISONS, Evidence, Run, Token
from chaos.run_result import MUST_BE_ZERO, Verdict, spread

COUNTED = (
    "attempted", "acknowledged", "confirmed", "existing", "refused", "unknown", "ok", "dead", "cancelled", "convicted", "recovered",
    "spawned", "false reaps",
)  # fmt: skip


def check(evidence: Evidence, *, also: Iterable[str] = (), waived: Iterable[str] = ()) -> Verdict:
    """Judge a run; *also* must be zero too, *waived* need not be."""
    verdict = Verdict(dict.fromkeys((*COUNTED, *MUST_BE_ZERO, *also), 0))
    for token in evidence.tokens.values():
        if token.parent:
            _judge_spawned(evidence, token, verdict)
        else:
            _judge_token(evidence, token, verdict)
    _judge_runs(evidence, verdict)
    judge_history(evidence, verdict)
    for id_, place in evidence.dump.live.items():
        verdict.note("stuck", f"{id_} is {place}")
    for key in evidence.dump.leaked:
        verdict.note("leaked keys", key)
    _times(evidence, verdict)
    verdict.counts["limit violations"] = "-"  # there are no limits yet
    let = {*waived}
    if any(fault["kind"] == "step clock" for fault in evidence.faults):
        let.add("started early")  # a clock set forward makes what is due later due now
    wrong = [name for name in (*MUST_BE_ZERO, *also) if name not in let]
    verdict.failed = [name for name in wrong if verdict.counts[name]]
    verdict.waived = [name for name in waived if verdict.counts.get(name)]
    return verdict


# -- what was asked for ------------------------------------------------------------------------------------------------


def _judge_token(evidence: Evidence, token: Token, verdict: Verdict) -> None:
    verdict.counts["attempted"] += 1
    ran_as = evidence.by_token.get(token.name, set())
    if len(ran_as) > 1:
        verdict.note("unexpected", f"{token.name} ran as {sorted(ran_as)}")
    if token.outcome in {"refused", "existing"}:
        verdict.counts[token.outcome] += 1
        if ran_as:
            verdict.note("unexpected", f"{token.name} was {token.outcome} and ran as {sorted(ran_as)}")
        return
    if token.outcome == "unknown":
        verdict.counts["unknown"] += 1
        if ran_as:
            verdict.counts["recovered"] += 1
            for id_ in ran_as:
                _judge_end(evidence, token, id_, verdict, acknowledged=False)
        return
    verdict.counts["acknowledged"] += 1
    verdict.counts["confirmed"] += token.confirmed
    if ran_as - {token.id}:
        verdict.note("unexpected", f"{token.name} is {token.id} and ran as {sorted(ran_as)}")
    _judge_end(evidence, token, token.id, verdict, acknowledged=True)


def _judge_spawned(evidence: Evidence, token: Token, verdict: Verdict) -> None:
    """Judge what a job spawned: it runs, as one job, exactly when its parent ended well."""
    ran_as = evidence.by_token.get(token.name, set())
    parents = evidence.by_token.get(token.parent, set())
    ended_well = any(
        run.how == "ok" and _ending(evidence, id_, True) == "done" for id_ in parents for run in evidence.runs[id_]
    )
    if ran_as and not ended_well:
        verdict.note("unexpected", f"{token.name} ran as {sorted(ran_as)}, and its parent did not end well")
    elif len(ran_as) > 1:
        verdict.note("spawned twice", f"{token.name} ran as {sorted(ran_as)}")
    elif ended_well and not ran_as:
        verdict.note("lost", f"{token.name}, spawned by {sorted(parents)}, never ran")
    verdict.counts["spawned"] += ended_well
    for id_ in ran_as:
        _judge_end(evidence, token, id_, verdict, acknowledged=False)


def _judge_end(evidence: Evidence, token: Token, id_: str, verdict: Verdict, *, acknowledged: bool) -> None:
    if id_ in evidence.dump.live:
        return  # counted as stuck
    runs = evidence.runs.get(id_, [])
    finished = any(run.how == "ok" for run in runs)
    ended = _ending(evidence, id_, finished)
    if ended == "done" and finished:
        if token.kind in POISONS:
            verdict.note("unexpected", f"{id_} is poison and succeeded")
        verdict.counts["ok"] += acknowledged
    elif ended == "cancelled" and id_ in evidence.cancelled:
        verdict.counts["cancelled"] += 1
    elif ended == "dead" and (token.kind in POISONS or token.kind == "hopeless"):
        verdict.counts["dead"] += 1
    elif ended == "dead" and _convicted(evidence, id_, runs):
        verdict.counts["convicted"] += 1
    else:
        line = "confirmed lost" if token.confirmed else "lost"
        verdict.note(line, f"{id_} ({token.kind} {token.name}): {ended or 'nowhere'}, runs {_brief(runs)}")


def _ending(evidence: Evidence, id_: str, finished: bool) -> str:
    """Return done, dead or cancelled, or nothing when Redis never recorded an end."""
    if id_ in evidence.dump.dead:
        return "dead"
    record = evidence.record(id_)
    if record is not None:
        return str(record["status"])
    if evidence.history is None:
        return "done" if finished else ""  # who keeps no result leaves no record
    job = evidence.history.jobs.get(id_)
    if job is None or not job.ends or job.ends[-1].startswith("again"):
        return ""
    return "dead" if job.ends[-1].startswith("dead") else "done"


def _convicted(evidence: Evidence, id_: str, runs: list[Run]) -> bool:
    # Dead for crashes: only who was running at nearly all of them (the first may have struck while it waited its turn).
    crashed = '"crashed"' in evidence.dump.dead.get(id_, "")
    return crashed and sum(not run.how for run in runs) >= evidence.max_crashes - 1


# -- what ran ----------------------------------------------------------------------------------------------------------


def _judge_runs(evidence: Evidence, verdict: Verdict) -> None:
    again, most, overlap = 0, 0, 0
    for id_, runs in evidence.runs.items():
        token = evidence.tokens.get(runs[0].token)
        if token is None:
            verdict.note("unexpected", f"{id_} ran for a token {runs[0].token} that nobody asked for")
            continue
        again += len(runs) - 1
        most = max(most, *(run.attempt for run in runs))
        for attempt, count in Counter(run.attempt for run in runs).items():
            if count > 1:
                verdict.note("same attempt twice", f"{id_} attempt {attempt} ran {count} times: {_brief(runs)}")
        overlap += sum(b.start < (a.end or 0) for a, b in itertools.pairwise(runs))
        if token.kind in POISONS and len(runs) > evidence.max_crashes:
            verdict.note("poison started too often", f"{id_}: {len(runs)} starts")
        delay = token.facts.get("delay") or 0
        if delay and runs[0].start < token.asked_at + delay - 0.05:
            verdict.note("started early", f"{id_}: {token.asked_at + delay - runs[0].start:.3f} s before it was due")
        gone = evidence.cancelled.get(id_, 0.0)
        if gone and delay and gone < token.asked_at + delay - 0.05 and runs[-1].start > gone:
            verdict.note("ran after cancel", f"{id_}: {runs[-1].start - gone:.3f} s after")
        _judge_result(evidence, id_, runs, verdict)
    verdict.counts["executions"] = sum(map(len, evidence.runs.values()))
    verdict.counts["repeated executions"] = again
    verdict.counts["highest attempt"] = most
    verdict.counts["overlapping executions"] = overlap
    verdict.counts["unexplained repeats"] = _unexplained(evidence, verdict)


def _judge_result(evidence: Evidence, id_: str, runs: list[Run], verdict: Verdict) -> None:
    record = evidence.record(id_)
    value = record.get("value") if record else None
    if not isinstance(value, dict) or "attempt" not in value:
        return
    if value["attempt"] < max(run.attempt for run in runs):
        verdict.note("zombie accepted", f"{id_}: attempt {value['attempt']} was recorded, runs {_brief(runs)}")
    if not any((run.attempt, run.pid) == (value["attempt"], value["pid"]) for run in runs):
        verdict.note("unexpected", f"{id_}: nobody computed {value}")


def _unexplained(evidence: Evidence, verdict: Verdict) -> int:
    """Count runs that began although the one before had neither failed nor met a fault: a lease taken from the living."""
    struck, common = evidence.struck()
    for id_, runs in evidence.runs.items():
        for before, after in itertools.pairwise(runs):
            excused = before.how == "failed" or before.pid in struck
            since = before.start - evidence.lease
            if (
                excused
                or before.end is None
                or any(fault["at"] < after.start and fault["until"] > since for fault in common)
            ):
                continue
            verdict.note("unexplained repeats", f"{id_}: {_brief(runs)}")
    return int(verdict.counts.get("unexplained repeats", 0))


# -- how long it took --------------------------------------------------------------------------------------------------


def _times(evidence: Evidence, verdict: Verdict) -> None:
    for supervised, name in ((True, "recovery, supervised"), (False, "recovery, by lease")):
        verdict.counts[name] = spread(_recoveries(evidence, supervised=supervised))
    first = [
        runs[0].start - evidence.tokens[runs[0].token].told_at
        for runs in evidence.runs.values()
        if runs[0].token in evidence.tokens
        and evidence.tokens[runs[0].token].outcome == "ok"
        and not evidence.tokens[runs[0].token].facts.keys() & {"delay", "buffered"}
    ]
    verdict.counts["pickup"] = spread([max(0.0, one) for one in first])


def _recoveries(evidence: Evidence, *, supervised: bool) -> list[float]:
    deaths = {
        pid: fault["at"]
        for fault in evidence.faults
        if fault["kind"].startswith("kill") and bool(fault.get("supervised")) == supervised
        for pid in fault.get("pids", ())
    }
    found = []
    for runs in evidence.runs.values():
        for at, run in enumerate(runs[:-1]):
            died = deaths.get(run.pid)
            if died is not None and not run.how and run.start < died:
                found.append(runs[at + 1].start - died)
    return found


def _brief(runs: list[Run]) -> str:
    first = runs[0].start if runs else 0.0
    return "; ".join(
        f"#{run.attempt} pid {run.pid} +{run.start - first:.2f} {run.how or 'cut off'}" for run in runs[:6]
    )
