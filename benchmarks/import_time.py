"""Time `import conveyor` beside `import asyncio`, and `conveyor --help` and `conveyor status` beside the bare interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

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
    # `conveyor status` ends with 8 where the server keeps nothing on disk, as this one.
    commands = {
        "python": ["-c", "pass"],
        "conveyor --help": ["-m", "conveyor", "--help"],
        "conveyor status": ["-m", "conveyor", "status"],
    }
    times: dict[str, list[float]] = {name: [] for name in [*programs, *commands]}
    with tempfile.TemporaryDirectory(prefix="bench") as compiled:
        env = environment(bench) | {
            "PYTHONPYCACHEPREFIX": compiled
        }  # as installed: what is imported was compiled before
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(5 if bench.quick else 15):
            for name, program in programs.items():
                times[name].append(float(_output(program, env)))
            for name, arguments in commands.items():
                times[name].append(_processor_ms(arguments, env))
        for name in programs:
            bench.note(name, statistics.median(times[name]))
        for name in commands:
            bench.note(f"{name} CPU ms", statistics.median(times[name]))
        for name in ("conveyor --help", "conveyor status"):
            ratios = [one / bare for one, bare in zip(times[name], times["python"], strict=True)]
            bench.note(f"{name} of python, CPU", statistics.median(ratios))
        bench.note("conveyor --help imports redis", float(_output(_HELP.format("modules"), env)))


def _output(program: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"This failed:\n{program}\n{done.stderr}")
    return done.stdout


def _processor_ms(arguments: list[str], env: dict[str, str]) -> float:
    """Return the CPU time of a fresh interpreter with *arguments*, which other programs do not lengthen."""
    with subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in {0, 8}:
        raise RuntimeError(f"{arguments} ended with {process.returncode}.")
    return (used.ru_utime + used.ru_stime) * 1e3
