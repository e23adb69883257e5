"""The backend of an app: with a buffer, or without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conveyor.errors import ConfigurationError
from conveyor.store.backend import Backend

if TYPE_CHECKING:
    from conveyor.store.buffer import Buffer


def reach(url: str | None, namespace: str, buffer: Buffer | None) -> Backend:
    """Return it; nothing is opened, unless an earlier process left something in the buffer. Raises ConfigurationError."""
    if url is not None and not isinstance(url, str):
        raise ConfigurationError(f"The URL must be text such as 'redis://host:6379/0', not {type(url).__name__}.")
    if buffer is None:
        return Backend(url, namespace=namespace)
    from conveyor.store.buffer import Buffer
    from conveyor.store.buffered import BufferedBackend

    if not isinstance(buffer, Buffer):
        raise ConfigurationError(
            f"Conveyor(buffer=…) takes a Buffer, such as Buffer() or Buffer('spool'), not {type(buffer).__name__}."
        )
    return BufferedBackend(url, namespace=namespace, buffer=buffer)
