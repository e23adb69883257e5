"""The figures of a run against the goals: a Markdown table and a plot."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """
    One line of the table: *ours*, over *raw* where that is named, should be at least or at most *bound*.

    A goal without a bound is for information.
    """

    title: str
    ours: str
    raw: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def value(self, figures: Figures) -> float | None:
        """Return the ratio, or the plain figure when there is nothing to compare with; None when not measured."""
        if self.ours not in figures or (self.raw and not figures.get(self.raw)):
            return None
        return figures[self.ours] / (figures[self.raw] if self.raw else 1)

    def margin(self, figures: Figures) -> float | None:
        """Return how many times better than the goal it is; below 1 the goal is missed."""
        value = self.value(figures)
        if value is None:
            return None
        if self.at_least is not None:
            return value / self.at_least
        if self.at_most is not None:
            return self.at_most / value if value else math.inf
        return None

    def text(self) -> str:
        """Return the goal as a person writes it."""
        times = " ×" if self.raw else f" {self.unit}".rstrip()
        if self.at_least is not None:
            return f"≥ {self.at_least:g}{times}"
        if self.at_most is not None:
            # A tiny bound stands for none at all: a ratio to zero says nothing.
            return f"≤ {self.at_most:g}{times}" if self.at_most >= 1e-6 else "0"
        return ""


LIST, LIMIT = "raw-list pop /s", "raw-limit pop /s"
GOALS = (
    Goal("drain, one process, `async def`, against raw-list", "ours drain async 1 /s", LIST, at_least=8),
    Goal("drain, one process, `async def`, against raw-limit", "ours drain async 1 /s", LIMIT, at_least=0.12),
    Goal("drain, one process, `def`, against raw-list", "ours drain sync 1 /s", LIST, at_least=8),
    Goal("drain, one process, `def`, against raw-limit", "ours drain sync 1 /s", LIMIT, at_least=0.12),
    Goal("drain, one process, results kept, against raw-list", "ours drain kept 1 /s", LIST),
    Goal("drain, batches of 500 against one by one", "ours drain batched 1 /s", "ours drain async 1 /s", at_least=1),
    Goal("drain, results kept against none", "ours drain kept 1 /s", "ours drain async 1 /s", at_least=0.65),
    Goal(
        "drain, two processes against one, `async def`", "ours drain async 2 /s", "ours drain async 1 /s", at_least=1.4
    ),
    Goal("drain, two processes against one, `def`", "ours drain sync 2 /s", "ours drain sync 1 /s", at_least=1.4),
    *(
        goal
        for name, title, bound in (
            ("grouped", "10,000 groups", 0.4),
            ("strict", "one group", 0.5),
            ("opened", "one opened group", 0.5),
            ("limited", "under a limit with room", 0.7),
            ("keyed", "unique jobs", 0.6),
        )
        for goal in (
            Goal(f"drain, {title} against plain", f"ours levelled {name} of plain", at_least=bound, unit="×"),
            Goal(f"drain, {title} against plain, by CPU", f"ours levelled {name} of plain, by CPU", unit="×"),
        )
    ),
    Goal("CPU of the server per job, draining", "ours drain async 1 server us/job", at_most=10, unit="µs"),
    Goal("CPU of the worker per job, draining, `async def`", "ours drain async 1 worker us/job", at_most=30, unit="µs"),
    Goal("CPU of the worker per job, draining, `def`", "ours drain sync 1 worker us/job", at_most=30, unit="µs"),
    Goal("commands sent per job, draining", "ours drain async 1 commands/job", at_most=0.05),
    Goal("enqueue one, sync", "ours enqueue /s", "raw-list push /s", at_least=1),
    Goal("100 concurrent `aenqueue`", "ours aenqueue /s", "raw-list push /s", at_least=6),
    Goal("bulk: `enqueue_many`", "ours enqueue_many /s", "raw-limit push /s", at_least=0.15),
    Goal("bulk: `push_many`", "ours push_many /s", "raw-limit push /s", at_least=0.15),
    Goal("idle to start, p50", "ours idle-to-start p50 ms", "raw-list idle-to-start p50 ms", at_most=1.4),
    Goal("idle to start, p99", "ours idle-to-start p99 ms", "raw-list idle-to-start p99 ms", at_most=2),
    Goal(
        "idle to start of an awaited `aenqueue`, p50",
        "ours awaited idle-to-start p50 ms",
        "raw-list awaited idle-to-start p50 ms",
        at_most=1.5,
    ),
    Goal(
        "awaited `aenqueue` to `aresult`, p50",
        "ours awaited enqueue-to-result p50 ms",
        "raw-list awaited round trip p50 ms",
        at_most=1.8,
    ),
    Goal("enqueue to result, p50", "ours enqueue-to-result p50 ms", "raw-list round trip p50 ms", at_most=2.2),
    Goal(
        "200 queues against 1: idle to start, p50",
        "ours 200 queues idle-to-start p50 ms",
        "ours 1 queues idle-to-start p50 ms",
        at_most=1.5,
    ),
    Goal(
        "200 queues against 1: idle to start, longest",
        "ours 200 queues idle-to-start max ms",
        "ours 1 queues idle-to-start max ms",
        at_most=1.5,
    ),
    Goal(
        "16 partitions against 1: CPU of the server per job, draining",
        "ours drain 16 partitions server us/job",
        "ours drain 1 partitions server us/job",
        at_most=1.2,
    ),
    Goal(
        "16 partitions against 1: commands run per job, draining",
        "ours drain 16 partitions commands/job",
        "ours drain 1 partitions commands/job",
        at_most=1.2,
    ),
    Goal(
        "16 partitions against 1: CPU of the server per job, pushing",
        "ours push 16 partitions server us/job",
        "ours push 1 partitions server us/job",
        at_most=1.2,
    ),
    Goal("memory per queued job, 100-byte argument", "ours bytes per queued job", at_most=240, unit="bytes"),
    Goal("idle worker, commands", "ours idle commands /s", at_most=0.5, unit="/s"),
    Goal("idle worker, CPU", "ours idle CPU %", at_most=0.5, unit="%"),
    Goal("drain at 1,000,000 queued against 1,000", "ours drain deep /s", "ours drain at 1,000 /s", at_least=0.9),
    Goal("`import conveyor` against `import asyncio`", "import conveyor ms", "import asyncio ms", at_most=2),
    Goal("`conveyor --help` against `import asyncio`", "conveyor --help ms", "import asyncio ms", at_most=2),
    Goal("`conveyor --help` imports redis-py", "conveyor --help imports redis", at_most=1e-9),
    Goal("jobs lost when worker processes are killed", "ours jobs not ended after kills", at_most=1e-9),
    Goal("longest time to the next start after a kill", "ours re-run max ms", at_most=1000, unit="ms"),
)


def write(figures: Figures, folder: Path, about: str) -> list[Goal]:
    """Write `report.md` and `report.svg` into *folder*; returns the goals that were measured and missed."""
    folder.mkdir(parents=True, exist_ok=True)
    missed = [goal for goal in GOALS if (margin := goal.margin(figures)) is not None and margin < 1]
    folder.joinpath("report.md").write_text(_markdown(figures, about))
    folder.joinpath("report.svg").write_text(_svg(figures))
    return missed


def machine(server: str, redis_py: str) -> str:
    """Return one line about where and with what it was measured."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores; Python {python}, redis-py {redis_py}, Valkey {server}, TCP"


def number(value: float | None) -> str:
    """Return a figure with as many digits as it deserves."""
    if value is None:
        return "–"
    if value and abs(value) < 10:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def _markdown(figures: Figures, about: str) -> str:
    lines = [
        "# Benchmark report",
        "",
        f"{about}. Measured in one run on one fresh server, with leases, retries, timeouts and counters on.",
        "",
        "![How many times better than its goal each figure is](report.svg)",
        "",
        "| scenario | raw | ours | ratio | goal | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for goal in GOALS:
        value, margin = goal.value(figures), goal.margin(figures)
        if value is None:
            continue
        raw = number(figures[goal.raw]) if goal.raw else "–"
        ours = f"{number(figures[goal.ours])} {_unit(goal)}".strip()
        ratio = f"{number(value)} ×" if goal.raw else "–"
        verdict = "" if margin is None else "reached" if margin >= 1 else "**missed**"
        lines.append(f"| {goal.title} | {raw} | {ours} | {ratio} | {goal.text()} | {verdict} |")
    lines += ["", "## All figures", "", "| figure | value |", "| --- | ---: |"]
    lines += [f"| {name} | {number(value)} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def _unit(goal: Goal) -> str:
    return goal.unit or ("/s" if goal.ours.endswith("/s") else "ms" if goal.ours.endswith("ms") else "")


_WIDTH, _LEFT, _BAR, _TOP = 1000, 400, 24, 56
_DECADES = (-1.0, 1.0)  # from a tenth of the goal to ten times better


def _svg(figures: Figures) -> str:
    """Return a bar for each goal on a logarithmic axis: how many times better than the goal."""
    rows = [(goal, margin) for goal in GOALS if (margin := goal.margin(figures)) is not None]
    height = _TOP + _BAR * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="16" y="22" font-size="15">How many times better than its goal each figure is</text>',
    ]
    for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        x, strong = _place(mark), mark == 1
        colour = "#333" if strong else "#ddd"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - 16}" stroke="{colour}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP - 10}" text-anchor="middle">{"goal" if strong else f"{mark:g} ×"}</text>'
        )
    for row, (goal, margin) in enumerate(rows):
        parts += _bar(goal, margin, goal.value(figures) or 0, _TOP + row * _BAR)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(goal: Goal, margin: float, value: float, top: float) -> list[str]:
    origin, end = _place(1), _place(margin)
    colour = "#2a7f62" if margin >= 1 else "#c0392b"
    shown = f"{number(value)}{' ×' if goal.raw else (' ' + goal.unit).rstrip()}"
    title = escape(goal.title.replace("`", ""))
    text, anchor = (end + 6, "start") if margin >= 1 else (origin + 6, "start")
    return [
        f'<text x="{_LEFT - 10}" y="{top + 15}" text-anchor="end">{title}</text>',
        f'<rect x="{min(origin, end):.1f}" y="{top + 4}" width="{max(2, abs(end - origin)):.1f}"',
        f' height="{_BAR - 8}" fill="{colour}"/>',
        f'<text x="{text:.1f}" y="{top + 15}" text-anchor="{anchor}" fill="#333">{shown}</text>',
    ]


def _place(margin: float) -> float:
    low, high = _DECADES
    decade = min(high, max(low, math.log10(margin) if margin > 0 else low)) if margin != math.inf else high
    return _LEFT + (decade - low) / (high - low) * (_WIDTH - _LEFT - 90)
