"""Forked children of a test. One that leaves the test by an exception would run the rest of the suite a second time."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

RAISED = 99
"""The exit code of a child whose work raised."""


def in_child(work: Callable[[], int]) -> int:
    """Fork; return the pid of the child, whose exit code is what *work* returns, at most 98."""
    pid = os.fork()
    if pid == 0:
        code = RAISED
        try:
            code = min(work(), RAISED - 1)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int, seconds: float = 120.0) -> int:
    """Wait for a child; return its exit code. One that does not end in time is killed: -9."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def exit_codes(pids: Iterable[int]) -> list[int]:
    """Wait for children; return their exit codes."""
    return [exit_code(pid) for pid in pids]
