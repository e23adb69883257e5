"""
The report of a demo: what was acknowledged, what became of it, and whether the two agree.

Pure: no clock, no files, no Redis. It compares three independent sources: the producers (which pushes were
acknowledged), the queue (the present state of each id) and the journal (which runs took place). A job counts as done
only if the queue says so and the journal saw it succeed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import click

from conveyor.cli.demo.journal import JournalEntry
from conveyor.units import quantity, span

LEFT_STATES = frozenset({"ready", "scheduled", "leased", "waiting"})


@dataclass(frozen=True, slots=True)
class Kill:
    """
    A kill of worker process `pid` at `at` (s since the epoch).

    `returned`: jobs that its supervisor returned to the queue; None: it reported none.
    """

    pid: int
    at: float
    returned: int | None = None


@dataclass
class KeyHistory:
    """The runs of one key by the journal."""

    task: str
    starts: list[JournalEntry] = field(default_factory=list)
    ends: list[JournalEntry] = field(default_factory=list)
    retries: int = 0

    @property
    def succeeded(self) -> int:
        """The number of successful runs."""
        return sum(entry.kind == "ok" for entry in self.ends)

    @property
    def open(self) -> JournalEntry | None:
        """The last run that started and has not ended; None without one."""
        ended = {(entry.pid, entry.attempt) for entry in self.ends}
        return next((entry for entry in reversed(self.starts) if (entry.pid, entry.attempt) not in ended), None)


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """The counts of one task. Durations in ms are those of runs that ended."""

    task: str
    accepted: int
    done: int
    dead: int
    runs: int
    retries: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class KillSummary:
    """
    The jobs that a kill interrupted.

    `again`: how many of them started again; `first_ms`, `last_ms`: ms from the kill to the first and the last start.
    """

    pid: int
    at: float
    returned: int | None
    interrupted: int
    again: int
    first_ms: float | None
    last_ms: float | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The counts of a demo. `problems` is empty when they add up."""

    accepted: int
    done: int
    dead: int
    cancelled: int
    left: int
    lost: int
    runs: int
    retries: int
    done_twice: int
    tasks: list[TaskSummary]
    kills: list[KillSummary]
    problems: list[str]

    @property
    def sound(self) -> bool:
        """Whether every acknowledged push is accounted for."""
        return not self.problems


def histories(entries: Iterable[JournalEntry]) -> dict[str, KeyHistory]:
    """Return key → history by the journal."""
    by_key: dict[str, KeyHistory] = {}
    for entry in entries:
        if entry.kind == "up":
            continue
        history = by_key.setdefault(entry.key, KeyHistory(entry.task))
        if entry.kind == "start":
            history.starts.append(entry)
        elif entry.kind in {"ok", "fail"}:
            history.ends.append(entry)
        elif entry.kind == "retry":
            history.retries += 1
    return by_key


def build_report(
    accepted: Mapping[str, str],
    states: Mapping[str, str | None],
    journaled: Mapping[str, KeyHistory],
    kills: Iterable[Kill] = (),
) -> DemoReport:
    """
    Return the report on *accepted* (key → task).

    *states*: key → state by the queue, None: the queue does not know it. `lost` counts acknowledged keys that are
    neither kept anywhere nor proven to have run to their end.
    """
    outcomes = {key: _outcome(states.get(key), journaled.get(key)) for key in accepted}
    counts = {
        outcome: sum(one == outcome for one in outcomes.values()) for outcome in ("done", "dead", "cancelled", "left")
    }
    lost = [key for key, outcome in outcomes.items() if outcome == "lost"]
    kill_summaries = [_kill_summary(kill, journaled) for kill in kills]
    problems = [f"{len(lost)} lost: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}"] if lost else []
    if sum(counts.values()) + len(lost) != len(accepted):
        problems.append(f"{len(accepted)} accepted, but the parts are {counts} and {len(lost)} lost")
    problems += [
        f"{key} was interrupted by the kill of {kill.pid} and is reported as done, but did not run again"
        for kill in kills for key, history in _interrupted(kill, journaled)
        if outcomes.get(key) == "done" and not _later_starts(kill, history)
    ]  # fmt: skip
    return DemoReport(
        accepted=len(accepted),
        **counts,
        lost=len(lost),
        runs=sum(len(history.starts) for history in journaled.values()),
        retries=sum(history.retries for history in journaled.values()),
        done_twice=sum(history.succeeded > 1 for history in journaled.values()),
        tasks=[_task_summary(name, accepted, outcomes, journaled) for name in sorted(set(accepted.values()))],
        kills=kill_summaries,
        problems=problems,
    )


def _outcome(state: str | None, history: KeyHistory | None) -> str:
    if state in LEFT_STATES:
        return "left"
    if state == "done":
        return "done" if history is not None and history.succeeded else "lost"
    return state if state in {"dead", "cancelled"} else "lost"


def _task_summary(
    name: str, accepted: Mapping[str, str], outcomes: Mapping[str, str], journaled: Mapping[str, KeyHistory]
) -> TaskSummary:
    keys = [key for key, task in accepted.items() if task == name]
    own_histories = [journaled[key] for key in keys if key in journaled]
    took = sorted(1000 * entry.seconds for history in own_histories for entry in history.ends)
    return TaskSummary(
        task=name,
        accepted=len(keys),
        done=sum(outcomes[key] == "done" for key in keys),
        dead=sum(outcomes[key] == "dead" for key in keys),
        runs=sum(len(history.starts) for history in own_histories),
        retries=sum(history.retries for history in own_histories),
        median_ms=quantile(took, 0.5),
        p95_ms=quantile(took, 0.95),
    )


def _kill_summary(kill: Kill, journaled: Mapping[str, KeyHistory]) -> KillSummary:
    interrupted = _interrupted(kill, journaled)
    waits = sorted(
        1000 * (entry.at - kill.at) for _, history in interrupted for entry in _later_starts(kill, history)[:1]
    )
    return KillSummary(
        kill.pid, kill.at, kill.returned, len(interrupted), len(waits), waits[0] if waits else None,
        waits[-1] if waits else None,
    )  # fmt: skip


def _interrupted(kill: Kill, journaled: Mapping[str, KeyHistory]) -> list[tuple[str, KeyHistory]]:
    """Return the histories with a run that the kill interrupted."""
    interrupted = []
    for key, history in journaled.items():
        ended = {entry.attempt for entry in history.ends if entry.pid == kill.pid}
        if any(entry.pid == kill.pid and entry.attempt not in ended for entry in history.starts):
            interrupted.append((key, history))
    return interrupted


def _later_starts(kill: Kill, history: KeyHistory) -> list[JournalEntry]:
    return [entry for entry in history.starts if entry.at >= kill.at and entry.pid != kill.pid]


def quantile(ordered: list[float], part: float) -> float:
    """Return the value below which *part* of the sorted values lie; 0 without any."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


_TASK_HEADINGS = f"{'TASK':<18}{'ACCEPTED':>9}{'DONE':>7}{'DEAD':>6}{'RUNS':>7}{'RETRIES':>9}{'MEDIAN':>10}{'P95':>10}"


def summary_lines(report: DemoReport) -> list[str]:
    """Return the report as lines of text."""
    parts = [
        ("done", report.done, "confirmed by the queue and by the tasks' own journal"),
        ("dead", report.dead, "kept as dead letters, with their errors"),
        ("cancelled", report.cancelled, ""),
        ("left", report.left, "still queued at the end" if report.left else ""),
        ("lost", report.lost, "every acknowledged id was looked up"),
    ]
    lines = [
        "",
        f"{click.style('accepted'.ljust(12), bold=True)}{report.accepted:>7,}",
        *(f"  {name:<10}{number:>7,}" + (f"  {click.style(why, dim=True)}" if why else "") for name, number, why in parts),
        "",
        *(line for kill in report.kills for line in _kill_lines(kill)),
        *_run_lines(report),
        "",
        click.style(_TASK_HEADINGS, dim=True),
        *(
            f"{one.task:<18}{one.accepted:>9,}{one.done:>7,}{one.dead:>6,}{one.runs:>7,}{one.retries:>9,}"
            f"{_ms(one.median_ms):>10}{_ms(one.p95_ms):>10}"
            for one in report.tasks
        ),
        "",
    ]  # fmt: skip
    if report.sound:
        sums = " + ".join(f"{number:,} {name}" for name, number, _ in parts[:4] if number or name == "done")
        lines.append(
            click.style("✓ The counts add up: ", fg="green")
            + f"{report.accepted:,} accepted = {sums}. Nothing was lost."
        )
    else:
        lines += [click.style("✗ Something is wrong: ", fg="red") + problem for problem in report.problems]
    return lines


def _kill_lines(kill: KillSummary) -> list[str]:
    at = time.strftime("%H:%M:%S", time.localtime(kill.at))
    returned = "" if kill.returned is None else f"; {quantity(kill.returned, 'job')} returned to the queue"
    line = f"Worker {kill.pid} was killed at {at} while it ran {quantity(kill.interrupted, 'job')}{returned}."
    if kill.first_ms is None or kill.last_ms is None:
        return [line]
    first, last = span(kill.first_ms / 1000), span(kill.last_ms / 1000)
    return [line, f"  {kill.again} of the {kill.interrupted} started again, {first} to {last} after the kill."]


def _run_lines(report: DemoReport) -> list[str]:
    again = sum(kill.again for kill in report.kills)
    killed = f", {again:,} after the kill" if report.kills else ""
    twice = "No job succeeded twice."
    if report.done_twice:
        twice = f"{report.done_twice:,} succeeded twice: the worker was killed between the work and its report."
    return [f"{quantity(report.runs, 'run')}: {report.retries:,} repeated after a failure{killed}.", twice]


def _ms(ms: float) -> str:
    return f"{ms:,.1f} ms" if ms < 10 else f"{ms:,.0f} ms"
