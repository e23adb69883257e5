"""The name of whoever acts: it stands in the history of a job that somebody cancels, redrives, promotes or updates."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from conveyor.errors import ConfigurationError

LONGEST_NAME = 200
_ACTOR: ContextVar[str] = ContextVar("conveyor_actor", default="")


@contextmanager
def acting_as(name: str) -> Iterator[None]:
    """
    Have what the block does to jobs, in this thread or task, stand under *name* in their histories and in the events of queues.

    Without it the program itself stands there, as ``host:pid``. Raises ConfigurationError.
    """
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not name.isprintable():
        raise ConfigurationError(
            f"acting_as() takes a name of up to {LONGEST_NAME} printable characters, such as 'ada@example.com', not {name!r:.50}."
        )
    token = _ACTOR.set(name)
    try:
        yield
    finally:
        _ACTOR.reset(token)


def current_actor() -> str:
    """Return who acts: the name of the block of `acting_as` that this runs in, else this program."""
    return _ACTOR.get() or f"{socket.gethostname()}:{os.getpid()}"
