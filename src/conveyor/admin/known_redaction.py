"""The fields that nobody is shown, as this program and all others of the namespace say."""

from __future__ import annotations

from time import monotonic

from conveyor.payload.redaction import Redaction
from conveyor.store import redacted_names
from conveyor.store.client.client import Client

REFRESH = 10.0
"""Seconds after which the names in Redis are read again."""


class KnownRedaction:
    """Joins the names of the app with those in Redis, by which a program without the app knows them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._joined, self._changes, self._read_at = Redaction(), -1, float("-inf")

    def current(self) -> Redaction:
        """Return the redaction that holds now. Raises StoreUnavailable."""
        own, now = self._client.redaction, monotonic()
        if now - self._read_at >= REFRESH or own.changes != self._changes:
            known = self._client.run(redacted_names.read(self._client.namespace))
            if own.changes != self._changes or known != self._joined.names:
                self._joined = own.joined(known)
            self._changes, self._read_at = own.changes, now
        return self._joined
