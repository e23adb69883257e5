"""The queue whose job or message the running code handles: that has a place in the queue until it ends."""

from __future__ import annotations

from contextvars import ContextVar

HANDLED: ContextVar[str | None] = ContextVar("conveyor_handled", default=None)
"""The queue or partition whose message is handled here, None outside."""
