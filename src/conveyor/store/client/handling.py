"""The queues whose messages the running code handles: each has a place in its queue until it ends."""

from __future__ import annotations

from contextvars import ContextVar

HANDLED: ContextVar[tuple[str, ...]] = ContextVar("conveyor_handled", default=())
"""The queues or partitions whose messages are handled here, with one name for each message."""
