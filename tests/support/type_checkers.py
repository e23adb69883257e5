"""The two type checkers that users run, called on a file. One that cannot run is a failure, never a skip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src"


Place = tuple[str, int]


def mypy_errors_in(folder: Path) -> dict[Place, str]:
    """Return (file's name, line) → first error of `mypy --strict` on the files of a folder, in one run."""
    return _mypy(sorted(folder.glob("*.py")), folder)


def pyright_errors_in(folder: Path) -> dict[Place, str]:
    """Return (file's name, line) → first error of pyright in strict mode on the files of a folder, in one run."""
    return _pyright(sorted(folder.glob("*.py")), folder)


def _mypy(files: list[Path], folder: Path) -> dict[Place, str]:
    options = ["--strict", "--follow-imports=silent", "--no-error-summary", "--output=json", "--config-file="]
    command = [sys.executable, "-m", "mypy", *options, *(file.name for file in files)]
    done = _run(command, {"MYPYPATH": str(SOURCES)}, folder)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return _first(
        ((Path(item["file"]).name, item["line"]), item["message"]) for item in found if item["severity"] == "error"
    )


def _pyright(files: list[Path], folder: Path) -> dict[Place, str]:
    settings = {
        "include": [file.name for file in files],
        "extraPaths": [str(SOURCES)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    # The wheel brings pyright and its node; without this it asks the network whether there is a newer one.
    done = _run(command, {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}, folder)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return _first(
        ((Path(item["file"]).name, item["range"]["start"]["line"] + 1), item["message"])
        for item in found
        if item["severity"] == "error"
    )


def _run(command: list[str], extra: dict[str, str], directory: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=directory, env=os.environ | extra, capture_output=True, text=True, timeout=170, check=False
    )
    # 0: no errors, 1: errors. Anything else: the checker itself could not do its work.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{command[2]} exited {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def _first(errors: Iterable[tuple[Place, str]]) -> dict[Place, str]:
    places: dict[Place, str] = {}
    for place, message in errors:
        places.setdefault(place, message)
    return places
