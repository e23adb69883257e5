"""The table of a run, and the same as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from chaos.run_result import MUST_BE_ZERO, RunResult

ROWS = (
    "attempted", "acknowledged", "confirmed", "existing", "refused", "unknown", "recovered", "ok", "dead", "dead by crashes",
    "cancelled", "spawned", "executions", "repeated executions", "highest attempt", "overlapping executions", "unexplained repeats",
    "false reaps", "workers registered", "runs under a limit", "calls made one", "ticks", "ticks skipped",
    "notes found", "parts read", "updates read", "events read", "reads left", *MUST_BE_ZERO,
    "recovery, supervised", "recovery, by lease", "pickup",
)  # fmt: skip
"""The lines of the table, in their order; chaos/README.md explains each."""


def table(result: RunResult, faults: dict[str, int], facts: dict[str, Any]) -> str:
    """Return what is printed at the end of a run."""
    lines = [f"  {name:<26} {_cell(value)}" for name, value in facts.items()]
    lines.append("")
    lines += [f"  {name:<26} {count:,}" for name, count in sorted(faults.items())]
    lines.append("")
    extra = [name for name in result.counts if name not in ROWS]
    for name in (*ROWS, *extra):
        if name in result.counts:
            mark = "✗" if name in result.failed else " "
            lines.append(f"{mark} {name:<26} {_cell(result.counts[name])}")
            if name in result.failed:
                lines += [f"      {example}" for example in result.examples.get(name, [])]
    lines.append("")
    if result.failed:
        lines.append("✗ " + ", ".join(result.failed))
    elif result.waived:
        lines.append("✓ but for what this topology does not promise: " + ", ".join(result.waived))
    else:
        lines.append("✓ nothing lost, nothing twice unseen")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        if not value.get("count"):
            return "-"
        return (
            f"p50 {value['p50']:.3f} s  p99 {value['p99']:.3f} s  max {value['max']:.3f} s  ({value['count']:,} times)"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(path: Path, result: RunResult, faults: dict[str, int], facts: dict[str, Any]) -> None:
    """Write the run as one JSON document."""
    document = {
        "schema": "conveyor/chaos@1",
        "machine": platform.platform(),
        "python": platform.python_version(),
        **facts,
        "faults": faults,
        "counts": result.counts,
        "failed": result.failed,
        "examples": result.examples,
    }
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
