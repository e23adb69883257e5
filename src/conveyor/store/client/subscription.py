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
    import hiredis

    from conveyor.store.transport.endpoint import Endpoint

PING_AFTER, PONG_WITHIN = 15.0, 5.0
"""Seconds of silence after which a PING is sent, and seconds that its answer may take."""
OUTAGE_LIMIT = 60.0
"""Seconds that Redis may be away while somebody waits for a message, without a time limit."""
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_PING = b"*1\r\n$4\r\nPING\r\n"
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
        import hiredis
        from redis import ResponseError

        connection: Any = self._endpoint.open(read_timeout=PONG_WITHIN)
        self._connection = connection
        if self._closed.is_set():
            return
        # From here on without redis-py, which looks at the socket four times for each message: a caller waits for it.
        sock: socket.socket = connection._sock  # noqa: SLF001  the one private name we use; a test holds it
        reader = hiredis.Reader(replyError=ResponseError)
        pack: Callable[[Any], bytes] = hiredis.pack_command
        sock.sendall(pack(("SUBSCRIBE", self._channel)))
        self._next(sock, reader, pings=False)
        if self._ping_after is None:
            _keep_alive(sock)
        self.ready.set()
        self._on_subscribed()
        sock.settimeout(self._ping_after)
        while True:
            message = self._next(sock, reader, pings=True)
            if isinstance(message, list) and message[0] == b"message":
                self._on_message(message[2])

    def _next(self, sock: socket.socket, reader: hiredis.Reader, *, pings: bool) -> Any:
        """Return what the server says next; a server that died silently is found by a PING, with *pings*."""
        is_asked = False
        while (message := reader.gets()) is False:
            try:
                data = sock.recv(65536)
            except TimeoutError:
                if is_asked or not pings:
                    raise TimeoutError("no answer") from None
                is_asked = True
                sock.settimeout(PONG_WITHIN)
                sock.sendall(_PING)
                continue
            if not data:
                raise ConnectionError("Connection closed by server")
            reader.feed(data)
        if is_asked:
            sock.settimeout(self._ping_after)
        if isinstance(message, Exception):
            raise message
        return message


def _keep_alive(sock: socket.socket) -> None:
    """Have the system find out whether the server is there: that costs the server no command."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sock.family != socket.AF_UNIX:
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
