"""
Servers that do not answer, where others serve the rest: calls leave them out until they answer again.

A thread for each such server tries it, so no caller waits for it in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING

from conveyor.store.fork_safety import on_fork

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

PROBE_PAUSE = 0.25
"""Seconds between two tries of a server that is away."""
FIRST_TRY = 0.5
"""Seconds for which a call is repeated that may be made at another server instead."""
log = logging.getLogger("conveyor.store")


class ServerOutages:
    """The servers of one client that are away."""

    def __init__(self) -> None:
        self.forked()
        on_fork(self)

    def forked(self) -> None:
        """Forget the outages and their threads, which belong to the parent."""
        self._away: set[Hashable] = set()
        self._closed = threading.Event()

    def is_away(self, endpoint: Endpoint) -> bool:
        """Tell whether the server of *endpoint* was away when it was last tried."""
        return bool(self._away) and endpoint.current_server() in self._away

    def note(self, endpoint: Endpoint) -> bool:
        """Note that the server of *endpoint* did not answer; return whether that is news."""
        server = endpoint.current_server()
        if server in self._away:
            return False
        self._away.add(server)
        thread = threading.Thread(
            target=self._watch, args=(endpoint, server, self._away, self._closed), name="conveyor-outage", daemon=True
        )
        thread.start()
        return True

    def close(self) -> None:
        """End the threads; what is noted later has new ones."""
        self._closed.set()
        self._away, self._closed = set(), threading.Event()

    @staticmethod
    def _watch(endpoint: Endpoint, server: Hashable, away: set[Hashable], closed: threading.Event) -> None:
        while not closed.wait(PROBE_PAUSE):
            with suppress(Exception):
                connection = endpoint.open(read_timeout=endpoint.reply_timeout)
                try:
                    connection.send_command("PING")
                    connection.read_response()
                finally:
                    connection.disconnect()
                away.discard(server)
                log.warning("%s answers again.", server)
                return
