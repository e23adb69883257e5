"""A thread that reads one channel of a server, for all that wait in this process."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport.connection import shut_down
from conveyor.store.transport.replies import backoff

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

PING_AFTER, PONG_WITHIN = 15.0, 5.0
"""Seconds of silence after which a PING is sent, and seconds that its answer may take."""
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_log = logging.getLogger("conveyor.result")


class Subscription:
    """
    A thread that reads a channel. It reconnects until it is closed.

    *on_message* gets the data of each message, *on_subscribed* is called whenever messages arrive from now on: some may have
    been missed before. A server that died silently is found by a PING after *ping_after* seconds, by the system where that is None.
    """

    def __init__(
        self, endpoint: Endpoint, channel: str, *, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None],
        ping_after: float | None = PING_AFTER,
    ) -> None:  # fmt: skip
        self.ready = SignalSafeEvent()
        self.error: Exception | None = None
        self._endpoint, self._channel, self._ping_after = endpoint, channel, ping_after
        self._on_message, self._on_subscribed = on_message, on_subscribed
        self._closed = SignalSafeEvent()
        self._connection: Any = None  # a redis.Connection, whose methods have no types
        self._thread = threading.Thread(target=self._run, name="conveyor-replies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            shut_down(connection)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        attempt = 0
        while not self._closed.is_set():
            try:
                self._read()
            except Exception as error:
                if self.ready.is_set():
                    attempt = 0
                    self.ready.clear()
                    if not self._closed.is_set():
                        _log.debug("lost the connection to channel %s: %s", self._channel, error)
                self.error = error
                self._closed.wait(backoff(attempt))
                attempt += 1
            finally:
                connection, self._connection = self._connection, None
                if connection is not None:
                    connection.disconnect()

    def _read(self) -> None:
        connection: Any = self._endpoint.open(read_timeout=PONG_WITHIN)
        self._connection = connection
        if self._closed.is_set():
            return
        connection.send_command("SUBSCRIBE", self._channel)
        connection.read_response()
        if self._ping_after is None:
            _keep_alive(connection)
        self.ready.set()
        self._on_subscribed()
        while True:
            if not connection.can_read(timeout=self._ping_after):
                connection.send_command("PING", check_health=False)  # detects a server that died silently
                if not connection.can_read(timeout=PONG_WITHIN):
                    raise TimeoutError("no answer")
            message = connection.read_response()
            if isinstance(message, list) and message[0] == b"message":
                self._on_message(message[2])


def _keep_alive(connection: Any) -> None:
    """Have the system find out whether the server is there: that costs the server no command."""
    sock = connection._sock  # noqa: SLF001  as below
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sock.family != socket.AF_UNIX:
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
