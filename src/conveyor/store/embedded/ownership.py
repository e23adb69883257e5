"""
Tells whose the files of an embedded server are.

The directory is found upwards from the working directory, so anybody may have put one there. What it says is followed:
files are written, a process is ended, and jobs are sent to the socket. So all of it must belong to the user who runs this.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from conveyor.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def require_own(directory: Path) -> None:
    """
    Check the owner, the kind and the mode of *directory* and everything in it; root is no exception.

    Raises ConfigurationError (E02) when something belongs to another user, may be written by others, or is a link. A directory
    that does not exist yet passes.
    """
    for path, status in _entries(str(directory)):
        why = _fault(status)
        if why:
            raise ConfigurationError(
                f"{path} {why}, so the embedded server of {directory} is not used.\n"
                "    Make a directory of your own with:  mkdir -m 700 .conveyor\n"
                "    Or set CONVEYOR_URL to another server. Or, if you trust all that is in it:  "
                f"chown -R {os.geteuid()} {directory}; chmod -R go-w {directory}",
                code="E02",
            )


def open_own(path: Path, flags: int) -> int:
    """Open a file of the directory and return its descriptor; it is made private, and no link is followed."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _fault(status: os.stat_result) -> str:
    """Return what is wrong with a file or a directory; empty when nothing is."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if status.st_uid != os.geteuid():
        return f"belongs to the user {status.st_uid}, and you are {os.geteuid()}"
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        return "is neither a file nor a directory"
    if status.st_mode & 0o022:
        return f"may be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _entries(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield *path* and all below it, each with its status; what disappears meanwhile is left out."""
    try:
        status = os.lstat(path)
        yield path, status
        names = os.listdir(path) if stat.S_ISDIR(status.st_mode) else []
    except FileNotFoundError:
        return
    for name in names:
        yield from _entries(os.path.join(path, name))
