"""The queue whose job or message the running code handles: that has a place in the queue until it ends."""

from __future__ import annotations

from contextvars import ContextVar

_HANDLED: ContextVar[str | None] = ContextVar("conveyor_handled", default=None)


def begin_handling(queue: str) -> str | None:
    """Note that a message of *queue* is handled from here on; return what was handled before, for `end_handling`."""
    outer = _HANDLED.get()
    _HANDLED.set(queue)
    return outer


def end_handling(outer: str | None) -> None:
    """Note that the handling has ended."""
    _HANDLED.set(outer)


def handled_queue() -> str | None:
    """Return the queue or partition whose message is handled here, None outside."""
    return _HANDLED.get()
