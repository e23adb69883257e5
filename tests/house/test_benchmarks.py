"""The benchmarks: those that are commands can be begun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_command_of_the_benchmarks_tells_its_use() -> None:
    """Each module of `benchmarks` that is a command imports what it needs, and answers --help without measuring anything."""
    commands = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__name__ ==" in path.read_text()]
    assert len(commands) > 5
    running = [
        subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", "--help"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in commands
    ]
    for name, process in zip(commands, running, strict=True):
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, said[:6]) == (0, "usage:"), (name, said)
