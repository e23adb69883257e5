"""
Checks of what was to be levelled, from the jobs' own log: rates, concurrency, order within a group, and calls that become one job.

A run counts for as long as its worker surely had its lease. A fault that may have cost it the lease ends that, since the job and
its slot are then another worker's, whatever the process goes on to do.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

from chaos.run_data import Line, Run, RunData, Token
from chaos.run_result import RunResult

LINE = "limit violations"
DELAY = 2.0
"""
Seconds that a job may take from its lease to its first line: it waits behind what a worker runs, and its process for the
machine. A rate is counted from lease to lease, and here from line to line.
"""

PROMPT = {"flush scripts", "squeeze memory", "step clock", "kill clients"}
"""Faults of everybody's that delay no start and cost no lease."""


def check_limits(data: RunData, result: RunResult) -> None:
    """Check the rates, slots and groups that the facts of the calls name."""
    result.counts.setdefault(LINE, 0)
    surely = SureSpans(data)
    slots: dict[tuple[str, int], list[tuple[float, float, str]]] = defaultdict(list)
    rates: dict[tuple[str, int, float], list[tuple[float, int]]] = defaultdict(list)
    groups: dict[str, list[Token]] = defaultdict(list)
    for token in data.tokens.values():
        if token.facts.get("group"):
            groups[token.facts["group"]].append(token)
    for id_, runs in data.runs.items():
        for run in filter(surely.began, runs):
            found = data.tokens.get(run.token)
            facts = {} if found is None else found.facts
            held = [list(one) for one in facts.get("slots", ())]
            if facts.get("group") and not held:
                held = [[f"group {facts['group']}", 1]]
            for name, n in held:
                slots[name, n].append((run.start, surely.held_until(run), id_))
            for name, n, per, cost in facts.get("rates", ()) if surely.began_promptly(run) else ():
                rates[name, n, per].append((run.start, cost))
    for (name, n), spans in slots.items():
        _check_slots(name, n, spans, result)
    for (name, n, per), starts in rates.items():
        _check_rate(name, n, per, sorted(starts), surely.clock_steps, result)
    for name, tokens in groups.items():
        _check_order(name, tokens, data, surely.began, result)
    result.counts["runs under a limit"] = sum(map(len, slots.values())) + sum(map(len, rates.values()))


class SureSpans:
    """
    Tells which runs surely began under a lease, and until when they surely had it.

    Redis' own history says which jobs were ever taken from which worker. Such a run counts until a fault that struck its process,
    and not at all where a fault may have cost the lease before. Without a history that holds for every run.
    """

    def __init__(self, data: RunData) -> None:
        self._lease, self._history = data.lease, data.history
        self._struck: dict[int, list[tuple[float, float]]] = defaultdict(list)
        common = [fault for fault in data.faults if not fault["pids"] and fault["kind"] not in PROMPT]
        self._common: list[tuple[float, float]] = [(fault["at"], _end(fault)) for fault in common]
        self.clock_steps: list[float] = [fault["at"] for fault in data.faults if fault["kind"] == "step clock"]
        for fault in data.faults:
            for pid in fault["pids"]:
                self._struck[pid].append((fault["at"], _end(fault)))
        self._last: dict[int, float] = defaultdict(float)
        for run in itertools.chain(*data.runs.values()):
            self._last[run.pid] = max(self._last[run.pid], run.start, run.end or 0.0)
        self._taken: set[tuple[int, str]] = set()
        if data.history is not None:
            processes = data.history.processes
            self._taken = {(processes.get(identity, 0), id_) for identity, ids in data.history.taken for id_ in ids}

    def _may_be_lost(self, run: Run) -> bool:
        return self._history is None or (run.pid, run.id) in self._taken

    def began(self, run: Run) -> bool:
        """Tell whether its worker surely had its lease when it began."""
        return not self._may_be_lost(run) or self.began_promptly(run)

    def began_promptly(self, run: Run) -> bool:
        """Tell whether no fault can have come between its lease and its start, nor have cost its worker the lease before."""
        # A lease is lost a lease after the fault, and the next one taken. A reply that is lost holds up a start for as long as it
        # takes to be noticed, and the job then waits as any other. What is armed strikes a few commands later.
        after = max(2 * self._lease, self._lease + DELAY)
        faults = itertools.chain(self._struck.get(run.pid, ()), self._common)
        return not any(at <= run.start <= until + after for at, until in faults)

    def held_until(self, run: Run) -> float:
        """Return the instant until which it surely had its lease: a run that was cut off, to the last line of its process."""
        end = self._last[run.pid] if run.end is None else run.end
        common = self._common if self._may_be_lost(run) else ()
        return min([end, *(at for at, _ in itertools.chain(self._struck.get(run.pid, ()), common) if run.start < at)])


def _end(fault: Line) -> float:
    return float(fault["until"] if "until" in fault else fault["at"])


def _check_slots(name: str, n: int, spans: list[tuple[float, float, str]], result: RunResult) -> None:
    # At one instant an end counts before a start.
    steps = sorted(step for start, end, id_ in spans for step in ((start, 1, id_), (end, -1, id_)) if end > start)
    steps.sort(key=lambda step: (step[0], step[1]))
    running = 0
    for at, change, id_ in steps:
        running += change
        if change > 0 and running > n:
            result.note(LINE, f"{name}: {running} at a time, {n} are allowed, at {at:.3f} with {id_}")


def _check_rate(
    name: str, n: int, per: float, starts: list[tuple[float, int]], clock_steps: list[float], result: RunResult
) -> None:
    window, first, taken = per - DELAY, 0, 0
    for at, cost in starts:
        taken += cost
        while at - starts[first][0] >= window:
            taken -= starts[first][1]
            first += 1
        stepped = any(starts[first][0] - per <= step <= at for step in clock_steps)
        if taken > n and not stepped:
            result.note(LINE, f"{name}: {taken} in {at - starts[first][0]:.3f} s, {n} are allowed in {per:g} s")
            first, taken = starts.index((at, cost)) + 1, 0  # the same burst counts once


def _check_order(
    name: str, tokens: list[Token], data: RunData, surely_began: Callable[[Run], bool], result: RunResult
) -> None:
    """Check that each job of a group began for the last time before the next one of its producer began."""
    before: Token | None = None
    latest = 0.0
    for token in sorted(tokens, key=lambda one: one.asked_at):
        if token.outcome != "ok":
            continue
        starts = [run.start for run in data.runs.get(token.id, []) if surely_began(run)]
        if starts and before is not None and min(starts) < latest:
            result.note(
                "order violations",
                f"group {name}: {token.name} began {latest - min(starts):.3f} s before {before.name}",
            )
        if starts and max(starts) > latest:
            before, latest = token, max(starts)


def check_covered(data: RunData, result: RunResult) -> None:
    """Check calls that may become one job: the last of a key that was accepted has run, or one after it."""
    keys: dict[str, list[Token]] = defaultdict(list)
    for token in data.tokens.values():
        if token.facts.get("covers"):
            keys[token.facts["covers"]].append(token)
    ended = {run.token for runs in data.runs.values() for run in runs if run.how == "ok"}
    for key, tokens in keys.items():
        tokens.sort(key=lambda one: one.asked_at)
        accepted = [at for at, token in enumerate(tokens) if token.outcome in {"ok", "existing"}]
        if accepted and not any(token.name in ended for token in tokens[accepted[-1] :]):
            result.note(
                "lost", f"{key}: the call {tokens[accepted[-1]].name} was accepted, and no run had it or a later one"
            )
        result.counts["calls made one"] = result.counts.get("calls made one", 0) + sum(
            token.name not in data.by_token for token in tokens
        )


def check_copies(data: RunData, token: Token, result: RunResult) -> None:
    """Check a message that was published: all of its copies were handled, as one each, or none of an unknown call."""
    ran_as = data.by_token.get(token.name, set())
    wanted = token.facts["copies"]
    if token.outcome == "refused" and ran_as:
        result.note("unexpected", f"{token.name} was refused and ran as {sorted(ran_as)}")
    elif token.outcome == "ok" and len(ran_as) != wanted:
        line = "lost" if len(ran_as) < wanted else "stored twice"
        result.note(line, f"{token.name}: {len(ran_as)} of {wanted} copies were handled")
    elif token.outcome == "unknown" and ran_as and len(ran_as) != wanted:
        result.note("lost", f"{token.name}: {len(ran_as)} of {wanted} copies were handled")
