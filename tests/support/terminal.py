"""The command line as a person sees it: on a terminal of a given width."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Collection
from contextlib import suppress

from support.shell import FORK_SERVER, Shell


def plain(printed: str) -> str:
    """Return what a terminal got, without colours and carriage returns."""
    return re.sub(r"\x1b\[[0-9;]*m", "", printed).replace("\r", "")


def on_terminal(
    shell: Shell, *arguments: str, expected: Collection[int] = (0,), columns: int = 80, **variables: str
) -> str:
    """Return what a command prints in a terminal; *variables* of its environment may replace TERM=xterm."""
    ours, theirs = pty.openpty()
    environment = {
        name: value for name, value in shell.environment().items() if name not in {"NO_COLOR", "FORCE_COLOR"}
    }
    environment |= {"TERM": "xterm", "COLUMNS": str(columns)} | variables
    command = FORK_SERVER.start(["conveyor", *arguments], cwd=shell.directory, env=environment, streams=[theirs] * 3)
    assert command is not None
    os.close(theirs)
    printed = b""
    with suppress(OSError):  # EIO: the command has ended
        while chunk := os.read(ours, 65536):
            printed += chunk
    os.close(ours)
    assert command.wait(60) in expected
    return printed.decode()
