"""The judge: a pure function from evidence to counts. It imports nothing of Conveyor and trusts nothing it says of itself.

The words are those of the Jepsen suites of message brokers; chaos/README.md explains each line of the table.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chaos.evidence import POISONS, Evidence, Run, Token

EXAMPLES = 5

MUST_BE_ZERO = (
    "lost", "unexpected", "stored twice", "same attempt twice", "duplicate outcomes", "zombie accepted", "unique key held twice",
    "poison started too often", "started early", "ran after cancel", "stuck", "leaked keys",
)  # fmt: skip
"""What no run may show; a scenario may add to these, or say why one cannot hold."""


@dataclass
class Verdict:
    """Counts by the lines of the table, and examples of what is wrong."""

    counts: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    waived: list[str] = field(default_factory=list)
    """What is not zero, and need not be here."""

    def note(self, what: str, example: str) -> None:
        """Count one, and keep the first few as examples."""
        self.counts[what] = self.counts.get(what, 0) + 1
        kept = self.examples.setdefault(what, [])
        if len(kept) < EXAMPLES:
            kept.append(example)


def check(evidence: Evidence, *, also: Iterable[str] = (), waived: Iterable[str] = ()) -> Verdict:
    """Judge a run; *also* must be zero too, *waived* need not be."""
    verdict = Verdict(dict.fromkeys(("attempted", "acknowledged", "existing", "refused", "unknown", "ok"), 0))
    verdict.counts.update(dict.fromkeys(("dead", "cancelled", "convicted", "recovered", *MUST_BE_ZERO, *also), 0))
    for token in evidence.tokens.values():
        _judge_token(evidence, token, verdict)
    _judge_runs(evidence, verdict)
    _judge_history(evidence, verdict)
    for id_, place in evidence.dump.live.items():
        verdict.note("stuck", f"{id_} is {place}")
    for key in evidence.dump.leaked:
        verdict.note("leaked keys", key)
    _times(evidence, verdict)
    verdict.counts["limit violations"] = "-"  # there are no limits yet
    wrong = [name for name in (*MUST_BE_ZERO, *also) if name not in set(waived)]
    if any(fault["kind"].startswith("clock") for fault in evidence.faults):
        wrong.remove("started early")  # a clock set forward makes what is due later due now
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
    if ran_as - {token.id}:
        verdict.note("unexpected", f"{token.name} is {token.id} and ran as {sorted(ran_as)}")
    _judge_end(evidence, token, token.id, verdict, acknowledged=True)


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
        verdict.note("lost", f"{id_} ({token.kind} {token.name}): {ended or 'nowhere'}, runs {_brief(runs)}")


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
    struck: set[int] = {pid for fault in evidence.faults for pid in fault.get("pids", ())}
    for runs in evidence.runs.values():
        token = evidence.tokens.get(runs[0].token)
        if token is not None and token.kind in POISONS:
            struck.update(run.pid for run in runs)  # what ended beside it may have gone down with it, unreported
    global_ = [fault for fault in evidence.faults if not fault.get("pids")]
    for id_, runs in evidence.runs.items():
        for before, after in itertools.pairwise(runs):
            excused = before.how == "failed" or before.pid in struck
            since = before.start - evidence.lease
            if (
                excused
                or before.end is None
                or any(f["at"] < after.start and float(f.get("until") or f["at"]) > since for f in global_)
            ):
                continue
            verdict.note("unexplained repeats", f"{id_}: {_brief(runs)}")
    return int(verdict.counts.get("unexplained repeats", 0))


# -- what Redis recorded -----------------------------------------------------------------------------------------------


def _judge_history(evidence: Evidence, verdict: Verdict) -> None:
    if evidence.history is None:
        return
    for id_, job in evidence.history.jobs.items():
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
    verdict.counts["workers registered"] = len(evidence.history.crew)


# -- how long it took --------------------------------------------------------------------------------------------------


def _times(evidence: Evidence, verdict: Verdict) -> None:
    for supervised, name in ((True, "recovery, supervised"), (False, "recovery, by lease")):
        verdict.counts[name] = spread(_recoveries(evidence, supervised=supervised))
    first = [
        runs[0].start - evidence.tokens[runs[0].token].told_at
        for runs in evidence.runs.values()
        if runs[0].token in evidence.tokens
        and evidence.tokens[runs[0].token].outcome == "ok"
        and not evidence.tokens[runs[0].token].facts.get("delay")
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


def spread(seconds: list[float]) -> dict[str, float]:
    """Return how many, the median, the 99th percentile and the longest."""
    if not seconds:
        return {"count": 0}
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "count": len(ordered),
        "p50": round(ordered[last // 2], 3),
        "p99": round(ordered[round(last * 0.99)], 3),
        "max": round(ordered[-1], 3),
    }


def _brief(runs: list[Run]) -> str:
    first = runs[0].start if runs else 0.0
    return "; ".join(
        f"#{run.attempt} pid {run.pid} +{run.start - first:.2f} {run.how or 'cut off'}" for run in runs[:6]
    )
