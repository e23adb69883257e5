"""
The blocking runner: one socket, one call in flight, repeated until it is answered or its time is over.

A signal handler may raise between any two steps of a call (ctrl-C that is caught, an alarm). The protocol has no number
in a reply, but a server answers each command once and in order, so a reply belongs to a command exactly if both have
the same number on their connection. A connection therefore counts the commands *before* their first byte leaves and the
replies *after* they are read. Where the counts differ at the next command, a call was interrupted: the socket is closed,
whatever the handler interrupted, also a cleanup. Two integers a call are all that this costs.

Below it: the meaning of an exception of redis-py, and single commands on a connection that redis-py has just opened.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # builtin; typeshed knows only signal
import asyncio
import concurrent.futures.thread  # noqa: F401  redis imports it later, which fails while the interpreter ends
import math
import os
import select
import signal
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from conveyor.errors import QueueFull
from conveyor.store.script import Argument, Call
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from redis import Connection as RawConnection
    from redis.asyncio import Connection as AsyncRawConnection

    from conveyor.store.transport.endpoint import Endpoint

T = TypeVar("T")
POLL_AFTER = 0.005
"""
Seconds for which the kernel may hold a read or a write, before the rest of a call's time is waited for in `poll`.

The kernel's timeout begins anew after each signal, and that of `poll` in Python does not. So signals that come more seldom
than this never lengthen a call, and an answer that comes sooner costs no `poll`. Where the program has a timer, see `_may_tick`.
"""
_UNHANDLED = int(signal.SIG_DFL), int(signal.SIG_IGN)
_ALARM, _PROFILE, _VIRTUAL_ALARM = int(signal.SIGALRM), int(signal.SIGPROF), int(signal.SIGVTALRM)
_handler_of: Callable[[int], Any] = _signal.getsignal
"""`signal.getsignal` without its search for the name of a handler: 30 ns, and no system call."""
_DAY = 86400.0
_NOT_READY = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_NOT_READY_YET = BlockingIOError()
ASYNC_QUERY_TIMEOUT = 2.0
"""Seconds a reply may take on an asyncio connection of redis-py, which has no time limit of its own."""


class Connection:
    """
    A blocking connection that opens itself. Not for several threads at once.

    redis-py opens it (URL, TLS, AUTH, SELECT); commands and replies go over its socket directly, which saves a quarter of
    the time of a call. It blocks in the kernel for a moment first (`POLL_AFTER`): a timeout of Python's costs a system call
    each way.
    """

    def __init__(self, endpoint: Endpoint, timeout: replies.CallTimeout = replies.NO_TIMEOUT) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._deadline = math.inf  # of the call that is under way (monotonic)
        self._longest_try = self._reply_timeout = endpoint.reply_timeout  # of any try, and of the present one
        self._usual_times = math.nan, 0.0, 0.0  # seconds to retry for, and what `replies.usual_times` returned for them
        self._raw: RawConnection | None = None
        self._socket: socket.socket | None = None
        self._reader: Any = None
        self._pack: Callable[[Any], bytes]
        self._sent = 0  # the number of the last command that may have left
        self._answered = 0  # the number of the last command whose reply was read, or that was given up
        self._has_ended = False

    def run(self, call: Call[T] | IdempotentCommand, *, retry_for: float, deadline: float | None = None) -> T:
        """
        Carry out *call* and return its decoded reply.

        Transport errors and temporary refusals are retried for *retry_for* seconds, and at most until *deadline* or the
        connection's timeout. Then StoreUnavailable is raised: the step may or may not have happened.
        """
        since = self.begin(retry_for, deadline)
        try:
            decoded: T = call.decode(self.execute(*call.command()))
            return decoded
        except Exception as error:
            return self._retry(call, error, self._timeout.timer(retry_for, deadline, since))

    def run_command(self, *command: Argument, retry_for: float, deadline: float | None = None) -> Any:
        """Send one plain command that may be repeated and return the raw reply; errors as in `run`."""
        return self.run(IdempotentCommand(command), retry_for=retry_for, deadline=deadline)

    def run_each(self, calls: Sequence[Call[T]], *, retry_for: float) -> list[T]:
        """
        Carry out *calls*, which only read, in one round trip: all are sent in one write.

        One that fails, and all behind a connection that is lost, is repeated by itself as `run` does.
        """
        found: list[Any] = []
        try:
            self.begin(retry_for)
            first = self._send([call.command() for call in calls])
            for number in range(first, first + len(calls)):
                self.begin(retry_for)
                try:
                    found.append(self._receive(number, 0.0))
                except Exception as error:
                    if not is_error_reply(error):
                        raise
                    found.append(error)
        except Exception:  # of the connection
            self.close()
        answered = [*found, *[None] * (len(calls) - len(found))]
        return [
            self.run(call, retry_for=retry_for) if reply is None or isinstance(reply, Exception) else call.decode(reply)
            for call, reply in zip(calls, answered, strict=True)
        ]

    def begin(self, retry_for: float, deadline: float | None = None) -> float:
        """Begin the time of a call, of which the next command is the first try; return when that was (monotonic)."""
        since = time.monotonic()
        if deadline is None:
            if retry_for != self._usual_times[0]:
                self._usual_times = retry_for, *replies.usual_times(self._timeout, retry_for, self._longest_try)
            _, left, self._reply_timeout = self._usual_times
            self._deadline = since + left
        else:
            self._deadline = deadline
            self._reply_timeout = replies.first_try(deadline - since, retry_for, self._longest_try)
        return since

    def start(self, call: Call[T]) -> Callable[[float], T]:
        """Send *call*; return a function that, called with the seconds to retry for, completes `run`."""
        failed: Exception | None = None
        number = 0
        at_first = self._timeout.seconds or 0.0
        since = self.begin(at_first)
        try:
            number = self._send([call.command()])
        except Exception as error:
            failed = error

        def collect(retry_for: float) -> T:
            if failed is not None:
                return self._retry(call, failed, self._timeout.timer(at_first, None, since))
            asked = self.begin(retry_for)
            try:
                return call.decode(self._receive(number, 0.0))
            except Exception as error:
                return self._retry(call, error, self._timeout.timer(retry_for, None, asked))

        return collect

    def _retry(self, call: Call[T] | IdempotentCommand, error: Exception, timer: replies.RetryTimer) -> T:
        """Repeat *call*, which failed with *error*, until it is answered or its time is over."""
        command, unsure = call.command, False
        while True:
            what, text, at = _action_for(error), reply_text(error), self
            unsure = unsure or not is_error_reply(error)
            if what is replies.ErrorAction.LOAD:
                command = call.load
            elif what is replies.ErrorAction.RAISE:
                fatal = replies.fatal_error(text, str(self.endpoint))
                if not unsure:
                    raise fatal from error
                return self._confirm_refusal(call, fatal, timer)
            else:
                if what in _RECONNECTING:
                    self.close()
                    if what is replies.ErrorAction.MOVE:
                        self.endpoint.note_moved(text)
                wait = timer.next_pause(text)
                if wait is None:
                    raise replies.unavailable(str(self.endpoint), error) from error
                time.sleep(wait)
                self._deadline, self._reply_timeout = timer.deadline, timer.next_try(self._longest_try)
                if what is replies.ErrorAction.ASK:
                    at = Connection(self.endpoint.ask_redirect(text))
                    at._deadline, at._reply_timeout = self._deadline, self._reply_timeout
            try:
                if at is not self:
                    at.execute("ASKING")
                return cast("T", call.decode(at.execute(*command())))
            except QueueFull as full:
                if not unsure:
                    raise
                return self._confirm_refusal(call, full, timer)
            except Exception as again:
                error = again
            finally:
                if at is not self:
                    at.close()

    def _confirm_refusal(self, call: Call[T] | IdempotentCommand, fatal: Exception, timer: replies.RetryTimer) -> T:
        """
        Raise *fatal*, the refusal of a call that may have been carried out before.

        QueueFull is raised only when no copy of the push that is still on its way can be accepted any more.
        """
        withdrawal = call.withdrawal() if isinstance(fatal, QueueFull) else None
        if (
            withdrawal is None
            or (reply := self.run(withdrawal, retry_for=timer.seconds or 0.0, deadline=timer.deadline)) is None
        ):
            raise fatal
        return cast("T", call.decode(reply))

    def execute(self, *command: Argument, block: float = 0.0) -> Any:
        """Send one command and return the raw reply; *block* is how many seconds the server may delay it."""
        return self._receive(self._send((command,)), block)

    def open(self) -> None:
        """Open the socket, if it is not: from then on `close` ends a call that another thread makes."""
        self._open()

    def _send(self, commands: Sequence[tuple[Argument, ...]]) -> int:
        """Send *commands* in one write; return the number of the first."""
        connection = self._socket
        if connection is None or self._answered != self._sent:
            connection = self._open()
        pack = self._pack
        try:
            data = pack(commands[0]) if len(commands) == 1 else b"".join([pack(command) for command in commands])
        except (UnicodeEncodeError, TypeError) as error:
            raise replies.not_sendable(error) from None
        first = self._sent + 1
        self._sent += len(commands)
        try:
            written = 0
            try:
                written = connection.send(data)
            except _NOT_READY:
                pass
            if written < len(data):
                self._send_rest(connection, memoryview(data)[written:])
        except BaseException:
            self.close()
            raise
        return first

    def _send_rest(self, connection: socket.socket, data: memoryview) -> None:
        """Send what the kernel did not take at once; each part of it may take as long as a reply, all of it until the deadline."""
        until, polls = self._wait_until(), _may_tick(connection)
        while data:
            try:
                if polls:
                    self._wait(connection, _NOT_READY_YET, select.POLLOUT, until)
                written = connection.send(data)
            except _NOT_READY as error:
                self._wait(connection, error, select.POLLOUT, until)
            else:
                data, until = data[written:], self._wait_until()

    def _wait_until(self) -> float:
        """Return until when the socket may take to be ready for the next part of what is sent."""
        return min(time.monotonic() + self._reply_timeout, self._deadline)

    @staticmethod
    def _wait(connection: socket.socket, refusal: Exception, event: int, until: float) -> None:
        """Wait until the socket is ready for *event*, or for what TLS needs first. Raises redis-py's ConnectionError at *until*."""
        if isinstance(refusal, ssl.SSLError):
            event = select.POLLIN if isinstance(refusal, ssl.SSLWantReadError) else select.POLLOUT
        left = until - time.monotonic()
        if left > 0:
            poller = select.poll()
            poller.register(connection, event)
            if poller.poll(math.ceil(min(left, _DAY) * 1000)):
                return
        raise _connection_error(f"Timeout {'reading from' if event == select.POLLIN else 'writing to'} server")

    def _receive(self, number: int, block: float) -> Any:
        """Return the reply to command *number*, the oldest that has none."""
        connection, reader = self._socket, self._reader
        if connection is None:
            raise _connection_error("Connection closed")
        if number != self._answered + 1:
            self.close()
            raise _connection_error("Another call has used the connection before this one was answered")
        data, until, polls = b"", math.nan, _may_tick(connection)
        try:
            while (reply := reader.gets()) is False:
                if data and time.monotonic() > block + self._deadline:  # it comes in pieces, too slowly
                    raise _connection_error("Timeout reading from server")
                if polls:
                    until = time.monotonic() + block + self._reply_timeout
                    self._wait(connection, _NOT_READY_YET, select.POLLIN, until)
                try:
                    data = connection.recv(65536)
                except _NOT_READY as error:
                    if math.isnan(until):
                        until = time.monotonic() + block + self._reply_timeout
                    self._wait(connection, error, select.POLLIN, until)
                    continue
                if not data:
                    raise _connection_error("Connection closed by server")
                until = math.nan
                reader.feed(data)
        except BaseException:
            self.close()
            raise
        self._answered = number
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _open(self) -> socket.socket:
        """Return the open socket, a new one where a call was interrupted: it would get the reply to that one."""
        if self._answered != self._sent:
            self.close()
        if self._socket is not None:
            return self._socket
        import hiredis
        from redis import ResponseError

        if self._has_ended:
            raise _connection_error("Connection closed")
        raw = self.endpoint.open(read_timeout=self._reply_timeout, deadline=self._deadline)
        connection = raw._sock  # noqa: SLF001  the one private name we use; a test holds it
        assert connection is not None
        self._reader = hiredis.Reader(replyError=ResponseError)
        self._pack = hiredis.pack_command
        self._raw = raw
        _block_briefly(connection)
        self._socket = connection  # last, so that an interrupted opening leaves none that is half made
        if self._has_ended:  # before `interrupt` could see the socket
            self.close()
            raise _connection_error("Connection closed")
        return connection

    def interrupt(self) -> None:
        """
        Let a call that another thread makes fail; that thread closes the socket.

        Closed here, its number could be that of a new socket while the other thread still waits for the number.
        """
        raw = self._raw
        if raw is not None:
            shut_down(raw)

    def end(self) -> None:
        """Interrupt for good: no call opens a socket any more."""
        self._has_ended = True  # first, since a call that is about to begin opens a socket where it finds none
        self.interrupt()

    def close(self) -> None:
        """Close the socket; the next call opens another. Only for the thread that makes the calls, or when none makes one."""
        raw, self._raw, self._socket = self._raw, None, None
        self._answered = self._sent  # only when the socket is out of use: nothing will be read for them
        if raw is not None:
            raw.disconnect()


class IdempotentCommand:
    """A plain command that may be repeated."""

    __slots__ = ("_words",)

    def __init__(self, words: tuple[Argument, ...]) -> None:
        self._words = words

    def command(self) -> tuple[Argument, ...]:
        """Return the words sent to the server."""
        return self._words

    load = command

    @staticmethod
    def withdrawal() -> None:
        """Return None: it is not a push."""

    @staticmethod
    def decode(reply: Any) -> Any:
        """Return the reply unchanged."""
        return reply


def _may_tick(connection: socket.socket) -> bool:
    """
    Tell whether the program handles a signal of a timer, which may interrupt each wait in the kernel before that is over.

    Python then begins the wait anew without coming back. So such a program, and no other, waits in `poll` from the beginning.
    Over TLS Python comes back.
    """
    if isinstance(connection, ssl.SSLSocket):
        return False
    return not (
        _handler_of(_ALARM) in _UNHANDLED
        and _handler_of(_PROFILE) in _UNHANDLED
        and _handler_of(_VIRTUAL_ALARM) in _UNHANDLED
    )


def _block_briefly(connection: socket.socket) -> None:
    """
    Let the kernel hold each read and write of *connection* for `POLL_AFTER` at most.

    Python believes that the socket never blocks, so it makes no system call besides, and hands a refusal on. For TLS
    too: where Python believes that a socket blocks, it repeats a read that timed out without end.
    """
    connection.settimeout(0.0)
    os.set_blocking(connection.fileno(), True)
    longest = struct.pack("ll", int(POLL_AFTER), int(POLL_AFTER % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, longest)


_RECONNECTING = {replies.ErrorAction.RECONNECT, replies.ErrorAction.MOVE}


def _action_for(error: Exception) -> replies.ErrorAction:
    """Return what to do about an exception of redis-py."""
    from redis import AuthenticationError, RedisError

    if isinstance(error, AuthenticationError):
        return replies.ErrorAction.RAISE
    if is_error_reply(error):
        return replies.action_for(reply_text(error))
    if isinstance(error, RedisError | OSError):
        known = replies.action_for(reply_text(error))
        return replies.ErrorAction.RECONNECT if known is replies.ErrorAction.RAISE else known
    raise error


def reply_text(error: BaseException) -> str:
    """Return an error reply as the server sent it, with the code in front."""
    text, code = str(error), _CODES.get(type(error).__name__, "")
    return text if not code or code in text else f"{code} {text}"


# redis-py removes these codes from the text and turns them into classes.
_CODES = {
    "OutOfMemoryError": "OOM", "ReadOnlyError": "READONLY", "BusyLoadingError": "LOADING", "NoPermissionError": "NOPERM",
    "AuthenticationError": "NOAUTH", "TryAgainError": "TRYAGAIN", "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
}  # fmt: skip


def is_error_reply(error: BaseException) -> bool:
    """Tell whether *error* is a reply of the server, so that the connection is usable."""
    from redis import ConnectionError as TransportError
    from redis import ResponseError

    return isinstance(error, ResponseError) and not isinstance(error, TransportError)


def fatal_reply(error: Exception) -> str | None:
    """Return the error reply that a server sent while a connection was opened; None if a retry may help."""
    from redis import AuthenticationError

    for one in (error, error.__cause__):  # redis-py's asyncio wraps the errors it meets
        if isinstance(one, AuthenticationError):
            return f"NOAUTH {one}"
        if (
            isinstance(one, Exception)
            and is_error_reply(one)
            and replies.action_for(text := reply_text(one)) is replies.ErrorAction.RAISE
        ):
            return text
    return None


def shut_down(connection: RawConnection) -> None:
    """Wake a thread that reads from *connection* of redis-py: it reads what has come, and then the end."""
    sock = connection._sock  # noqa: SLF001  as in `_open`
    if sock is not None:
        try:
            # Below TLS, of which the other thread may be in the middle.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass


def _connection_error(why: str) -> Exception:
    from redis import ConnectionError as TransportError

    return TransportError(why)


def query(connection: RawConnection, *command: str) -> Any:
    """Return the reply to one command, None when this user may not send it; any other error closes the connection."""
    from redis import exceptions

    try:
        connection.send_command(*command)
        return connection.read_response()
    except exceptions.NoPermissionError:
        return None
    except BaseException:
        connection.disconnect()
        raise


async def aquery(connection: AsyncRawConnection, *command: str) -> Any:
    """Awaitable form of `query`."""
    from redis import exceptions

    try:
        async with asyncio.timeout(ASYNC_QUERY_TIMEOUT):
            await connection.send_command(*command)
            return await connection.read_response()
    except exceptions.NoPermissionError:
        return None
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
