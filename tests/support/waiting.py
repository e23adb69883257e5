"""Waiting for a condition: the only way in which a test waits for what others do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from inspect import isawaitable
from typing import Any


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
