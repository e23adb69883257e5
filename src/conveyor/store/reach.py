"""The backend of an app: with a buffer, or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conveyor.store.backend import Backend

if TYPE_CHECKING:
    from conveyor.store.buffer import Buffer


def reach(url: str | None, namespace: str, buffer: Buffer | None) -> Backend:
    """Return it; nothing is opened, unless an earlier process left something in the buffer."""
    if buffer is None:
        return Backend(url, namespace=namespace)
    from conveyor.store.buffered import BufferedBackend

    return BufferedBackend(url, namespace=namespace, buffer=buffer)
