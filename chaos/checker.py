"""The checker: a pure function from the data of a run to counts. It imports nothing of Conveyor and trusts none of its reports.

The words are those of the Jepsen suites of message brokers; chaos/README.md explains each line of the table.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from chaos.history_check import check_history
from chaos.limit_check import check_copies, check_covered, check_limits
from chaos.run_data import POISONS, Run, RunData, Token
from chaos.run_result import MUST_BE_ZERO, RunResult, spread
from chaos.told_check import check_ticks, check_told

COUNTED = (
    "attempted", "acknowledged", "confirmed", "existing", "refused", "unknown", "ok", "dead", "cancelled", "dead by crashes",
    "recovered", "spawned", "false reaps",
)  # fmt: skip


def check(data: RunData, *, also: Iterable[str] = (), waived: Iterable[str] = ()) -> RunResult:
    """Check a run; the lines *also* must be zero too, the lines *waived* need not be."""
    result = RunResult(dict.fromkeys((*COUNTED, *MUST_BE_ZERO, *also), 0))
    for token in data.tokens.values():
        if token.parent:
            _check_spawned(data, token, result)
        elif token.kind == "tick":
            for id_ in data.by_token[token.name]:
                _check_end(data, token, id_, result, acknowledged=False)
        elif token.facts.get("copies"):
            result.counts["attempted"] += 1
            result.counts["acknowledged"] += token.outcome == "ok"
            check_copies(data, token, result)
        elif token.facts.get("covers"):
            result.counts["attempted"] += 1
            result.counts["acknowledged"] += token.outcome in {"ok", "existing"}
        else:
            _check_token(data, token, result)
    _check_runs(data, result)
    check_history(data, result)
    for id_, place in data.dump.live.items():
        result.note("stuck", f"{id_} is {place}")
    for key in data.dump.leaked:
        result.note("leaked keys", key)
    _times(data, result)
    check_covered(data, result)
    check_limits(data, result)
    check_told(data, result)
    check_ticks(data, result)
    let = {*waived}
    if any(fault["kind"] == "step clock" for fault in data.faults):
        let.add("started early")  # a clock set forward makes what is due later due now
    wrong = [name for name in (*MUST_BE_ZERO, *also) if name not in let]
    result.failed = [name for name in wrong if result.counts[name]]
    result.waived = [name for name in waived if result.counts.get(name)]
    return result


# -- what was asked for ------------------------------------------------------------------------------------------------


def _check_token(data: RunData, token: Token, result: RunResult) -> None:
    result.counts["attempted"] += 1
    ran_as = data.by_token.get(token.name, set())
    if len(ran_as) > 1:
        result.note("unexpected", f"{token.name} ran as {sorted(ran_as)}")
    if token.outcome in {"refused", "existing"}:
        result.counts[token.outcome] += 1
        if ran_as:
            result.note("unexpected", f"{token.name} was {token.outcome} and ran as {sorted(ran_as)}")
        return
    if token.outcome == "unknown":
        result.counts["unknown"] += 1
        if ran_as:
            result.counts["recovered"] += 1
            for id_ in ran_as:
                _check_end(data, token, id_, result, acknowledged=False)
        return
    result.counts["acknowledged"] += 1
    result.counts["confirmed"] += token.confirmed
    if ran_as - {token.id}:
        result.note("unexpected", f"{token.name} is {token.id} and ran as {sorted(ran_as)}")
    _check_end(data, token, token.id, result, acknowledged=True)


def _check_spawned(data: RunData, token: Token, result: RunResult) -> None:
    """Check a spawned job: it runs, as one job, exactly when its parent ended well."""
    ran_as = data.by_token.get(token.name, set())
    parents = data.by_token.get(token.parent, set())
    ended_well = any(
        run.how == "ok" and _ending(data, id_, True) == "done" for id_ in parents for run in data.runs[id_]
    )
    if ran_as and not ended_well:
        result.note("unexpected", f"{token.name} ran as {sorted(ran_as)}, and its parent did not end well")
    elif len(ran_as) > 1:
        result.note("spawned twice", f"{token.name} ran as {sorted(ran_as)}")
    elif ended_well and not ran_as:
        result.note("lost", f"{token.name}, spawned by {sorted(parents)}, never ran")
    result.counts["spawned"] += ended_well
    for id_ in ran_as:
        _check_end(data, token, id_, result, acknowledged=False)


def _check_end(data: RunData, token: Token, id_: str, result: RunResult, *, acknowledged: bool) -> None:
    if id_ in data.dump.live:
        return  # counted as stuck
    runs = data.runs.get(id_, [])
    finished = any(run.how == "ok" for run in runs)
    ended = _ending(data, id_, finished)
    if ended == "done" and finished:
        if token.kind in POISONS:
            result.note("unexpected", f"{id_} is poison and succeeded")
        result.counts["ok"] += acknowledged
    elif ended == "cancelled" and id_ in data.cancelled:
        result.counts["cancelled"] += 1
    elif ended == "dead" and (token.kind in POISONS or token.kind == "hopeless"):
        result.counts["dead"] += 1
    elif ended == "dead" and _dead_by_crashes(data, id_, runs):
        result.counts["dead by crashes"] += 1
    else:
        line = "confirmed lost" if token.confirmed else "lost"
        result.note(line, f"{id_} ({token.kind} {token.name}): {ended or 'nowhere'}, runs {_brief(runs)}")


def _ending(data: RunData, id_: str, finished: bool) -> str:
    """Return done, dead or cancelled, or nothing when Redis never recorded an end."""
    if id_ in data.dump.dead:
        return "dead"
    record = data.record(id_)
    if record is not None:
        return str(record["status"])
    if data.history is None:
        return "done" if finished else ""  # who keeps no result leaves no record
    job = data.history.jobs.get(id_)
    if job is None or not job.ends or job.ends[-1].startswith("again"):
        return ""
    return "dead" if job.ends[-1].startswith("dead") else "done"


def _dead_by_crashes(data: RunData, id_: str, runs: list[Run]) -> bool:
    # Dead for crashes: only who was running at nearly all of them (the first may have struck while it waited its turn).
    crashed = '"crashed"' in data.dump.dead.get(id_, "")
    return crashed and sum(not run.how for run in runs) >= data.max_crashes - 1


# -- what ran ----------------------------------------------------------------------------------------------------------


def _check_runs(data: RunData, result: RunResult) -> None:
    again, most, overlap = 0, 0, 0
    for id_, runs in data.runs.items():
        token = data.tokens.get(runs[0].token)
        if token is None:
            result.note("unexpected", f"{id_} ran for a token {runs[0].token} that nobody asked for")
            continue
        again += len(runs) - 1
        most = max(most, *(run.attempt for run in runs))
        for attempt, count in Counter(run.attempt for run in runs).items():
            if count > 1:
                result.note("same attempt twice", f"{id_} attempt {attempt} ran {count} times: {_brief(runs)}")
        overlap += sum(b.start < (a.end or 0) for a, b in itertools.pairwise(runs))
        if token.kind in POISONS and len(runs) > data.max_crashes:
            result.note("poison started too often", f"{id_}: {len(runs)} starts")
        delay = token.facts.get("delay") or 0
        if delay and runs[0].start < token.asked_at + delay - 0.05:
            result.note("started early", f"{id_}: {token.asked_at + delay - runs[0].start:.3f} s before it was due")
        gone = data.cancelled.get(id_, 0.0)
        if gone and delay and gone < token.asked_at + delay - 0.05 and runs[-1].start > gone:
            result.note("ran after cancel", f"{id_}: {runs[-1].start - gone:.3f} s after")
        _check_result(data, id_, runs, result)
    result.counts["executions"] = sum(map(len, data.runs.values()))
    result.counts["repeated executions"] = again
    result.counts["highest attempt"] = most
    result.counts["overlapping executions"] = overlap
    result.counts["unexplained repeats"] = _unexplained(data, result)


def _check_result(data: RunData, id_: str, runs: list[Run], result: RunResult) -> None:
    record = data.record(id_)
    value = record.get("value") if record else None
    if not isinstance(value, dict) or "attempt" not in value:
        return
    if value["attempt"] < max(run.attempt for run in runs):
        result.note("zombie accepted", f"{id_}: attempt {value['attempt']} was recorded, runs {_brief(runs)}")
    if not any((run.attempt, run.pid) == (value["attempt"], value["pid"]) for run in runs):
        result.note("unexpected", f"{id_}: nobody computed {value}")


def _unexplained(data: RunData, result: RunResult) -> int:
    """Count runs that began although the one before had neither failed nor met a fault: a living worker lost its lease."""
    struck, common = data.struck()
    for id_, runs in data.runs.items():
        for before, after in itertools.pairwise(runs):
            excused = before.how == "failed" or before.pid in struck
            since = before.start - data.lease
            if (
                excused
                or before.end is None
                or any(fault["at"] < after.start and fault["until"] > since for fault in common)
            ):
                continue
            result.note("unexplained repeats", f"{id_}: {_brief(runs)}")
    return int(result.counts.get("unexplained repeats", 0))


# -- how long it took --------------------------------------------------------------------------------------------------


def _times(data: RunData, result: RunResult) -> None:
    for supervised, name in ((True, "recovery, supervised"), (False, "recovery, by lease")):
        result.counts[name] = spread(_recoveries(data, supervised=supervised))
    first = [
        runs[0].start - data.tokens[runs[0].token].told_at
        for runs in data.runs.values()
        if runs[0].token in data.tokens
        and data.tokens[runs[0].token].outcome == "ok"
        and not data.tokens[runs[0].token].facts.keys() & {"delay", "buffered"}
    ]
    result.counts["pickup"] = spread([max(0.0, one) for one in first])


def _recoveries(data: RunData, *, supervised: bool) -> list[float]:
    deaths = {
        pid: fault["at"]
        for fault in data.faults
        if fault["kind"].startswith("kill") and bool(fault.get("supervised")) == supervised
        for pid in fault.get("pids", ())
    }
    found = []
    for runs in data.runs.values():
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
