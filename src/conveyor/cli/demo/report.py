"""
The accounts: what was acknowledged, what became of it, and whether the two agree. Pure: no clock, no files, no Redis.

Three witnesses who know nothing of each other: the producers (what was acknowledged), the queue (how each id stands
now) and the journal (what ran). A job counts as done only if the queue says so and the journal saw it succeed.

The closing words of the demo: the accounts as a person reads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import click

from conveyor.cli.demo.journal import JournalEntry
from conveyor.cli.output import count
from conveyor.units import span

LEFT = frozenset({"ready", "scheduled", "leased", "waiting"})


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker process was killed at `at` (s since the epoch); its supervisor `returned` so many jobs, if it said so."""

    pid: int
    at: float
    returned: int | None = None


@dataclass
class KeyHistory:
    """What the journal saw of one key."""

    task: str
    starts: list[JournalEntry] = field(default_factory=list)
    ends: list[JournalEntry] = field(default_factory=list)
    retries: int = 0

    @property
    def succeeded(self) -> int:
        """How often it ran to a good end."""
        return sum(line.kind == "ok" for line in self.ends)

    @property
    def open(self) -> JournalEntry | None:
        """The run that began and has not ended, if any: the last such."""
        ended = {(line.pid, line.attempt) for line in self.ends}
        return next((line for line in reversed(self.starts) if (line.pid, line.attempt) not in ended), None)


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """One task: durations in ms of the runs that ended."""

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
    """What a killed process ran, and how long after the kill each of these began again, in ms."""

    pid: int
    at: float
    returned: int | None
    interrupted: int
    again: int
    first_ms: float | None
    last_ms: float | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The counts, and what is wrong with them: `problems` is empty when they add up."""

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
        """Whether everything that was acknowledged is accounted for."""
        return not self.problems


def trails(lines: Iterable[JournalEntry]) -> dict[str, KeyHistory]:
    """Return what the journal saw, by key."""
    found: dict[str, KeyHistory] = {}
    for line in lines:
        if line.kind == "up":
            continue
        trail = found.setdefault(line.key, KeyHistory(line.task))
        if line.kind == "start":
            trail.starts.append(line)
        elif line.kind in {"ok", "fail"}:
            trail.ends.append(line)
        elif line.kind == "retry":
            trail.retries += 1
    return found


def judge(
    accepted: Mapping[str, str],
    states: Mapping[str, str | None],
    seen: Mapping[str, KeyHistory],
    kills: Iterable[Kill] = (),
) -> DemoReport:
    """
    Return the accounts of *accepted* (key → task) by *states* (key → how the queue says it stands; None: unknown to it).

    `lost` is what was acknowledged and neither stands anywhere nor is proven to have run to its end.
    """
    fates = {key: _fate(states.get(key), seen.get(key)) for key in accepted}
    counts = {fate: sum(found == fate for found in fates.values()) for fate in ("done", "dead", "cancelled", "left")}
    lost = [key for key, fate in fates.items() if fate == "lost"]
    cut = [_killed(kill, seen) for kill in kills]
    problems = [f"{len(lost)} lost: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}"] if lost else []
    if sum(counts.values()) + len(lost) != len(accepted):
        problems.append(f"{len(accepted)} accepted, but the parts are {counts} and {len(lost)} lost")
    problems += [
        f"{key} was cut off by the kill of {kill.pid} and is said to be done, but did not run again"
        for kill in kills for key, trail in _interrupted(kill, seen)
        if fates.get(key) == "done" and not _again(kill, trail)
    ]  # fmt: skip
    return DemoReport(
        accepted=len(accepted),
        **counts,
        lost=len(lost),
        runs=sum(len(trail.starts) for trail in seen.values()),
        retries=sum(trail.retries for trail in seen.values()),
        done_twice=sum(trail.succeeded > 1 for trail in seen.values()),
        tasks=[_task(name, accepted, fates, seen) for name in sorted(set(accepted.values()))],
        kills=cut,
        problems=problems,
    )


def _fate(state: str | None, trail: KeyHistory | None) -> str:
    if state in LEFT:
        return "left"
    if state == "done":
        return "done" if trail is not None and trail.succeeded else "lost"
    return state if state in {"dead", "cancelled"} else "lost"


def _task(
    name: str, accepted: Mapping[str, str], fates: Mapping[str, str], seen: Mapping[str, KeyHistory]
) -> TaskSummary:
    keys = [key for key, task in accepted.items() if task == name]
    found = [seen[key] for key in keys if key in seen]
    took = sorted(1000 * line.seconds for trail in found for line in trail.ends)
    return TaskSummary(
        task=name,
        accepted=len(keys),
        done=sum(fates[key] == "done" for key in keys),
        dead=sum(fates[key] == "dead" for key in keys),
        runs=sum(len(trail.starts) for trail in found),
        retries=sum(trail.retries for trail in found),
        median_ms=quantile(took, 0.5),
        p95_ms=quantile(took, 0.95),
    )


def _killed(kill: Kill, seen: Mapping[str, KeyHistory]) -> KillSummary:
    interrupted = _interrupted(kill, seen)
    waits = sorted(1000 * (line.at - kill.at) for _, trail in interrupted for line in _again(kill, trail)[:1])
    return KillSummary(
        kill.pid, kill.at, kill.returned, len(interrupted), len(waits), waits[0] if waits else None,
        waits[-1] if waits else None,
    )  # fmt: skip


def _interrupted(kill: Kill, seen: Mapping[str, KeyHistory]) -> list[tuple[str, KeyHistory]]:
    """Return what the killed process had begun and not ended."""
    found = []
    for key, trail in seen.items():
        ended = {line.attempt for line in trail.ends if line.pid == kill.pid}
        if any(line.pid == kill.pid and line.attempt not in ended for line in trail.starts):
            found.append((key, trail))
    return found


def _again(kill: Kill, trail: KeyHistory) -> list[JournalEntry]:
    return [line for line in trail.starts if line.at >= kill.at and line.pid != kill.pid]


def quantile(ordered: list[float], part: float) -> float:
    """Return the value below which *part* of the sorted values lie; 0 of none."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


_HEADINGS = f"{'TASK':<18}{'ACCEPTED':>9}{'DONE':>7}{'DEAD':>6}{'RUNS':>7}{'RETRIES':>9}{'MEDIAN':>10}{'P95':>10}"


def summary(account: DemoReport) -> list[str]:
    """Return the accounts, a line each."""
    parts = [
        ("done", account.done, "the queue says so, and the task itself wrote it down"),
        ("dead", account.dead, "kept as dead letters, with their errors"),
        ("cancelled", account.cancelled, ""),
        ("left", account.left, "still in the queue when time was up" if account.left else ""),
        ("lost", account.lost, "every acknowledged id was looked up"),
    ]
    lines = [
        "",
        f"{click.style('accepted', bold=True):<10} {account.accepted:>8,}",
        *(f"  {name:<10}{number:>7,}" + (f"  {click.style(why, dim=True)}" if why else "") for name, number, why in parts),
        "",
        *(line for kill in account.kills for line in _kill(kill)),
        *_runs(account),
        "",
        click.style(_HEADINGS, dim=True),
        *(
            f"{one.task:<18}{one.accepted:>9,}{one.done:>7,}{one.dead:>6,}{one.runs:>7,}{one.retries:>9,}"
            f"{_ms(one.median_ms):>10}{_ms(one.p95_ms):>10}"
            for one in account.tasks
        ),
        "",
    ]  # fmt: skip
    if account.sound:
        sums = " + ".join(f"{number:,} {name}" for name, number, _ in parts[:4] if number or name == "done")
        lines.append(
            click.style("✓ The counts add up: ", fg="green")
            + f"{account.accepted:,} accepted = {sums}. Nothing was lost."
        )
    else:
        lines += [click.style("✗ Something is wrong: ", fg="red") + problem for problem in account.problems]
    return lines


def _kill(kill: KillSummary) -> list[str]:
    at = time.strftime("%H:%M:%S", time.localtime(kill.at))
    returned = "" if kill.returned is None else f", and {count(kill.returned, 'job')} went back"
    line = f"Worker {kill.pid} was killed at {at} while it ran {count(kill.interrupted, 'job')}{returned}."
    if kill.first_ms is None or kill.last_ms is None:
        return [line]
    first, last = span(kill.first_ms / 1000), span(kill.last_ms / 1000)
    return [line, f"  {kill.again} of the {kill.interrupted} began again, the first {first} and the last {last} later."]


def _runs(account: DemoReport) -> list[str]:
    again = sum(kill.again for kill in account.kills)
    killed = f", {again:,} after the kill" if account.kills else ""
    twice = "No job succeeded twice."
    if account.done_twice:
        twice = f"{account.done_twice:,} succeeded twice: cut off between the work and saying so."
    return [f"{count(account.runs, 'run')}: {account.retries:,} again after a failure{killed}.", twice]


def _ms(ms: float) -> str:
    return f"{ms:,.1f} ms" if ms < 10 else f"{ms:,.0f} ms"
