"""Time `import conveyor` and `conveyor --help` in fresh processes, beside `import asyncio`."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.harness import Bench, environment

# The start of the interpreter is left out: with it, all three would look alike.
_IMPORT = "import time; t = time.perf_counter(); import {}; print((time.perf_counter() - t) * 1e3)"
_HELP = """
import contextlib, io, sys, time
sys.argv = ["conveyor", "--help"]
t = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    from conveyor.cli import main
    main()
taken = (time.perf_counter() - t) * 1e3
assert "worker" in out.getvalue(), out.getvalue()
print(taken if "{}" == "time" else int("redis" in sys.modules))
"""


def import_time(bench: Bench) -> None:
    """Note the medians of interleaved runs, and whether the help needed redis-py."""
    programs = {
        "import asyncio ms": _IMPORT.format("asyncio"),
        "import conveyor ms": _IMPORT.format("conveyor"),
        "conveyor --help ms": _HELP.format("time"),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(5 if bench.quick else 15):
        for name, program in programs.items():
            times[name].append(_run(bench, program))
    for name, values in times.items():
        bench.note(name, statistics.median(values))
    bench.note("conveyor --help imports redis", _run(bench, _HELP.format("modules")))


def _run(bench: Bench, program: str) -> float:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(bench), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"This failed:\n{program}\n{done.stderr}")
    return float(done.stdout)
