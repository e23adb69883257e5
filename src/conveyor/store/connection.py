"""The blocking runner: one socket, one call in flight, repeated until it is answered or the deadline passes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

from conveyor.store import fault
from conveyor.store.script import Call

if TYPE_CHECKING:
    import redis

    from conveyor.store.address import Address

T = TypeVar("T")
READ_TIMEOUT = 5.0


class Connection:
    """A blocking connection that opens itself. Not for several threads at once."""

    def __init__(self, address: Address) -> None:
        """Remember where to connect."""
        self.address = address
        self._raw: redis.Connection | None = None

    def run(self, call: Call[T], *, patience: float) -> T:
        """
        Carry out *call* and return its decoded reply.

        Transport errors and passing refusals are repeated for *patience* seconds, then raise StoreUnavailable:
        the step may or may not have happened.
        """
        deadline = time.monotonic() + patience
        command, attempt = call.command, 0
        while True:
            try:
                reply = self.execute(*command())
            except Exception as error:
                what = _verdict(error)
                if what is fault.Remedy.LOAD:
                    command = call.load
                    continue
                if what is fault.Remedy.RAISE:
                    raise fault.final(str(error), str(self.address)) from error
                if what is fault.Remedy.RECONNECT:
                    self.close()
                wait = fault.pause(attempt)
                if time.monotonic() + wait > deadline:
                    raise fault.unreachable(str(self.address), error) from error
                attempt += 1
                time.sleep(wait)
            else:
                return call.decode(reply)

    def execute(self, *command: Any, block: float = 0.0) -> Any:
        """Send one command and return the raw reply; *block* is how many seconds the server may hold it back."""
        import hiredis

        raw = self._open()
        try:
            raw.send_packed_command([hiredis.pack_command(command)], check_health=False)
            return raw.read_response(timeout=block + READ_TIMEOUT) if block else raw.read_response()
        except BaseException as error:
            if not _answered(error):
                self.close()
            raise

    def _open(self) -> redis.Connection:
        if self._raw is None:
            raw = self.address.connection(read_timeout=READ_TIMEOUT)
            raw.connect()
            self._raw = raw
        return self._raw

    def close(self) -> None:
        """Close the socket; the next call opens another."""
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.disconnect()


def _answered(error: BaseException) -> bool:
    from redis.exceptions import ConnectionError as TransportError
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError) and not isinstance(error, TransportError)


def _verdict(error: Exception) -> fault.Remedy:
    """Return what to do about an exception of the client library."""
    from redis.exceptions import AuthenticationError, RedisError

    if isinstance(error, AuthenticationError):
        return fault.Remedy.RAISE
    if _answered(error):
        from redis.exceptions import NoScriptError

        return fault.Remedy.LOAD if isinstance(error, NoScriptError) else fault.remedy(str(error))
    if isinstance(error, RedisError | OSError):
        known = fault.remedy(str(error))
        return fault.Remedy.RECONNECT if known is fault.Remedy.RAISE else known
    raise error
