"""The data of a run in the form the checker reads: calls, runs, faults, Redis' own history, and what remained."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chaos.redis_history import History
from chaos.remaining_state import RemainingState

Line = dict[str, Any]
TICK = "tick/"
"""Beginning of the token of a job that a schedule has enqueued: its name and the planned instant in ms follow."""
POISONS = {"poison", "boxed_poison", "batched_poison"}


@dataclass
class Token:
    """One job that a producer wanted, by its own name for it."""

    name: str
    kind: str
    asked_at: float
    facts: Line
    outcome: str = "unknown"
    """`ok`, `existing` (another job stands for it), `refused`, `unknown`."""
    id: str = ""
    told_at: float = 0.0
    confirmed: bool = False
    """Acknowledged by a replica, too."""
    parent: str = ""
    """The token of the job that spawns it."""


@dataclass
class Run:
    """One execution of a job."""

    token: str
    id: str
    attempt: int
    pid: int
    start: float
    end: float | None = None
    how: str = ""
    """`ok`, `failed`, or nothing when its process did not live to tell."""
    why: str = ""
    """The class of the error that it failed with."""


@dataclass
class RunData:
    """All that is known of a run."""

    tokens: dict[str, Token]
    runs: dict[str, list[Run]]
    """id → its runs, in the order they began."""
    cancelled: dict[str, float]
    """id → when `cancel()` returned True (0 when it never answered)."""
    faults: list[Line]
    dump: RemainingState
    history: History | None
    lease: float
    max_crashes: int = 3
    by_token: dict[str, set[str]] = field(default_factory=dict)
    """token → the ids it ran under."""
    told: list[Line] = field(default_factory=list)
    """Lines of jobs on the notes they found, and on what they told."""
    reads: list[Line] = field(default_factory=list)
    """Lines of the reader on what it was told of them; nothing in a run without one."""

    def struck(self) -> tuple[set[int], list[Line]]:
        """Return the pids that met a fault of their own, and the faults that concern everybody."""
        found: set[int] = {pid for fault in self.faults for pid in fault["pids"]}
        for runs in self.runs.values():
            token = self.tokens.get(runs[0].token)
            if token is not None and token.kind in POISONS:
                found.update(run.pid for run in runs)  # what ended beside it may have gone down with it, unreported
        return found, [fault for fault in self.faults if not fault["pids"]]

    def record(self, id_: str) -> Line | None:
        """Return the last outcome that was stored for *id_*."""
        if self.history is not None and (job := self.history.jobs.get(id_)) is not None and job.records:
            return job.records[-1]
        stored = self.dump.results.get(id_)
        return json.loads(stored) if stored is not None else None


def gather(
    calls: Iterable[Line],
    runs: Iterable[Line],
    faults: Iterable[Line],
    dump: RemainingState,
    history: History | None,
    lease: float,
    *,
    told: Iterable[Line] = (),
    reads: Iterable[Line] = (),
) -> RunData:
    """Put lines together."""
    tokens, cancelled = _tokens(calls)
    by_id, by_token = _runs(runs)
    for name in by_token:
        if name.startswith(TICK):  # nobody has asked for it but its schedule
            tokens[name] = Token(name, "tick", 0.0, {})
    return RunData(
        tokens, by_id, cancelled, list(faults), dump, history, lease,
        by_token=by_token, told=list(told), reads=list(reads),
    )  # fmt: skip


def normal(id_: str) -> str:
    """Return the id with its place in front: a caller's own comes without one, as does that of an instant of a schedule."""
    if "@" in id_:
        return id_ if id_.startswith("told:") else f"told:{id_}"
    return id_ if ":" in id_ else f"default:{id_}"


def _tokens(calls: Iterable[Line]) -> tuple[dict[str, Token], dict[str, float]]:
    tokens: dict[str, Token] = {}
    cancelled: dict[str, float] = {}
    groups: dict[str, list[str]] = {}
    for line in calls:
        phase = line["phase"]
        if phase == "intent":
            names = [f"{line['prefix']}{line['first'] + i}" for i in range(line["count"])]
            groups[line["call"]] = names
            for name in names:
                tokens[name] = Token(name, line["kind"], line["at"], line)
                for child in range(line.get("spawns", 0)):
                    spawned = f"{name}/{child}"
                    tokens[spawned] = Token(spawned, "spawned", line["at"], {}, parent=name)
        elif phase == "cancel":
            cancelled[normal(line["id"])] = 0.0
        elif phase == "cancelled" and line["gone"]:
            cancelled[normal(line["id"])] = line["at"]
        elif phase in {"ok", "refused"}:
            for at, name in enumerate(groups[line["call"]]):
                token = tokens[name]
                token.outcome, token.told_at = phase, line["at"]
                if phase == "ok":
                    token.id = normal(line["ids"][at])
                    token.confirmed = bool(token.facts.get("wait_replicas")) and not line.get("unconfirmed")
                    if at in line["existing"]:
                        token.outcome = "existing"
    return tokens, cancelled


def _runs(lines: Iterable[Line]) -> tuple[dict[str, list[Run]], dict[str, set[str]]]:
    by_id: dict[str, list[Run]] = defaultdict(list)
    by_token: dict[str, set[str]] = defaultdict(set)
    open_: dict[tuple[str, int, int], Run] = {}
    for line in lines:
        id_ = normal(line["id"])
        key = (id_, line["attempt"], line["pid"])
        if line["phase"] == "start":
            run = Run(line["token"], id_, line["attempt"], line["pid"], line["at"])
            by_id[id_].append(run)
            by_token[run.token].add(id_)
            open_[key] = run
        elif key in open_:
            run = open_.pop(key)
            run.end, run.how, run.why = line["at"], line["phase"], line.get("why", "")
    for found in by_id.values():
        found.sort(key=lambda run: run.start)
    return dict(by_id), dict(by_token)
