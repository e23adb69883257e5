"""The result of a run: counts by the lines of the table, examples of errors, and the lines that fail the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5

MUST_BE_ZERO = (
    "lost", "confirmed lost", "unexpected", "spawned twice", "stored twice", "same attempt twice", "duplicate outcomes",
    "ended without result", "zombie accepted", "unique key held twice", "poison started too often", "started early",
    "ran after cancel", "limit violations", "order violations", "tick violations", "note violations", "stream violations",
    "progress violations", "update violations", "event violations", "stuck", "leaked keys", "audit findings",
)  # fmt: skip
"""Findings that no run may show; a scenario may add to these, or say why one cannot hold."""


@dataclass
class RunResult:
    """Counts by the lines of the table, and examples of what is wrong."""

    counts: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    waived: list[str] = field(default_factory=list)
    """Counts that are not zero, and need not be here."""

    def note(self, what: str, example: str) -> None:
        """Count one, and keep the first few as examples."""
        self.counts[what] = self.counts.get(what, 0) + 1
        kept = self.examples.setdefault(what, [])
        if len(kept) < EXAMPLES:
            kept.append(example)

    def fail(self, what: str, example: str) -> None:
        """Count one of what fails this run whatever it was asked."""
        self.note(what, example)
        if what not in self.failed:
            self.failed.append(what)


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
