"""Waiting for a condition: the only way in which a test waits for what others do."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from testbed.fork_server import Program


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "what the test waits for") -> Any:
    """Return what *condition* returns as soon as that is true; fail with *what* after so many *seconds*."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.003)
    return found


async def auntil(condition: Callable[[], Any], seconds: float = 60.0, what: str = "what the test waits for") -> Any:
    """Return what *condition*, a `def` or an `async def`, returns, as `until` does, beside the other tasks of the event loop."""
    deadline = time.monotonic() + seconds
    while not (found := await answer if isawaitable(answer := condition()) else answer):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.003)
    return found


async def until_status(job: Any, *wanted: str) -> str:
    """Return the status of *job* as soon as it is one of those."""

    async def reached() -> str | None:
        status: str = await job.astatus()
        return status if status in wanted else None

    found: str = await auntil(reached, what=f"{job} is {' or '.join(wanted)}")
    return found


def until_ended(thread: threading.Thread, seconds: float = 60.0) -> None:
    """Wait for the end of a thread."""
    thread.join(seconds)
    assert not thread.is_alive(), f"not within {seconds:g} s: the end of {thread}"


def until_said(process: Program | subprocess.Popen[Any], text: str = "\n", seconds: float = 60.0) -> str:
    """Return what a process prints, up to the line with *text*; fail with it where the process ends before. One that is late is killed."""
    assert process.stdout is not None
    clock, said = threading.Timer(seconds, process.kill), ""
    clock.start()
    try:
        while text not in said:
            line = process.stdout.readline()
            said += line if isinstance(line, str) else line.decode()
            assert line, f"it ended, by itself or after {seconds:g} s, before it printed {text!r}; it printed: {said!r}"
    finally:
        clock.cancel()
    return said
