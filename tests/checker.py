"""The two type checkers that users run, called on a file. One that cannot run is a failure, never a skip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "src"


def mypy_errors(path: Path) -> dict[int, str]:
    """Return line → first error of `mypy --strict` on the file."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--output=json",
        "--config-file=",
        str(path),
    ]
    done = _run(command, {"MYPYPATH": str(SOURCES)}, path.parent)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return _first((item["line"], item["message"]) for item in found if item["severity"] == "error")


def pyright_errors(path: Path) -> dict[int, str]:
    """Return line → first error of pyright in strict mode on the file."""
    settings = {
        "include": [path.name],
        "extraPaths": [str(SOURCES)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    (path.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    # The wheel brings pyright and its node; without this it asks the network whether there is a newer one.
    done = _run(command, {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}, path.parent)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return _first(
        (item["range"]["start"]["line"] + 1, item["message"]) for item in found if item["severity"] == "error"
    )


def _run(command: list[str], extra: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=directory, env=os.environ | extra, capture_output=True, text=True, timeout=170, check=False
    )
    # 0: no errors, 1: errors. Anything else: the checker itself could not do its work.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command[2]} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def _first(errors: Iterable[tuple[int, str]]) -> dict[int, str]:
    lines: dict[int, str] = {}
    for line, message in errors:
        lines.setdefault(line, message)
    return lines
