"""
The asyncio runner: one socket that many callers share, replies handed out in order.

redis-py opens the connection (URL, TLS, AUTH, SELECT), and this protocol takes over its transport. Measured on 2 cores
from wake-up to the start of a job: 0.78-0.91 ms this way, 1.2-1.4 ms through redis-py's own streams, which cost a task
switch and a timeout object per command.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from conveyor.errors import QueueFull
from conveyor.store.script import Argument, Call, WrongReply
from conveyor.store.transport import replies
from conveyor.store.transport.connection import IdempotentCommand, fatal_reply

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

T = TypeVar("T")
OnReply = Callable[[Any], None]


class ConnectionLost(ConnectionError):
    """The connection was lost before the reply came."""


class _StreamProtocol(asyncio.Protocol):
    """The protocol of one transport; once detached it no longer calls its connection."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection: AsyncConnection | None = connection

    def detach(self) -> None:
        self._connection = None

    def data_received(self, data: bytes) -> None:
        connection = self._connection
        if connection is not None:
            try:
                connection.feed(data)
            # Here, since it may be interrupted as it is entered, and a reply that is lost shifts all that follow.
            except BaseException:
                connection.drop(ConnectionLost("interrupted while replies were handed out"))
                raise

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._connection.drop(ConnectionLost(str(exc) if exc else "Connection closed by server"))


class AsyncConnection:
    """A connection of one event loop that opens itself; commands of one tick leave in one write, the first of an idle one alone."""

    def __init__(self, endpoint: Endpoint, timeout: replies.CallTimeout = replies.NO_TIMEOUT) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self._reply_timeout = endpoint.reply_timeout
        self._raw: Any = None  # keeps redis-py's stream writer alive, which would close the transport
        self._transport: asyncio.WriteTransport | None = None
        self._stream: _StreamProtocol | None = None
        self._reader: Any = None
        self._pack: Callable[[Any], bytes]
        self._pending: deque[tuple[OnReply, float, int]] = deque()
        self._sent = 0  # the number of the last command that may have left
        self._answered = 0  # the number of the last reply
        self._out: list[bytes] = []
        self._opening: asyncio.Task[None] | None = None
        self._overdue_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._opened = False
        self.on_reopened: Callable[[], None] | None = None
        """Called whenever a lost connection was replaced."""
        self.on_lost: Callable[[OSError], None] | None = None
        """Called whenever a connection was lost."""

    # -- for callers ----------------------------------------------------------------------------------------------

    async def run(
        self, call: Call[T] | IdempotentCommand, *, retry_for: float | None, deadline: float | None = None,
        longest_pause: float = replies.LONGEST_PAUSE,
    ) -> T:  # fmt: skip
        """
        Carry out *call* and return its decoded reply.

        Transport errors and temporary refusals are retried for *retry_for* seconds (None: without limit), and at most until
        *deadline* or the connection's timeout; *longest_pause* bounds the seconds between two tries. Then StoreUnavailable is
        raised: the step may or may not have happened.
        Cancelling the caller affects no other caller.
        """
        since, timer = time.monotonic(), None
        if deadline is None:
            within = replies.usual_times(self.timeout, retry_for, self._reply_timeout)[1]
        else:
            within = replies.first_try(deadline - since, retry_for, self._reply_timeout)
        command, unsure = call.command, False
        while True:
            try:
                reply = await self.execute(*command(), within=within)
            except OSError as error:
                unsure, cause = True, cast("Exception", error)
                what = replies.ErrorAction.WAIT
                if self._closed:
                    raise replies.unavailable(str(self.endpoint), error) from error
            else:
                if not isinstance(reply, Exception):
                    try:
                        return await self._decode(call, reply, timer) if timer and unsure else call.decode(reply)
                    except WrongReply as error:
                        self.drop(error)
                        unsure, cause, what = True, error, replies.ErrorAction.WAIT
                else:
                    cause, what = reply, self.handle_error_reply(reply)
            if timer is None:
                timer = self.timeout.timer(retry_for, deadline, since)
                timer.longest_pause = longest_pause
            if what is replies.ErrorAction.LOAD:
                command = call.load
                continue
            if what is replies.ErrorAction.RAISE:
                fatal = replies.fatal_error(str(cause), str(self.endpoint))
                if not unsure:
                    raise fatal from cause
                return await self._confirm_refusal(call, fatal, timer)
            wait = timer.next_pause(str(cause))
            if wait is None:
                raise replies.unavailable(str(self.endpoint), cause) from cause
            await asyncio.sleep(wait)
            within = timer.next_try(self._reply_timeout)
            if what is replies.ErrorAction.ASK:
                reply = await self._run_redirected(str(cause), command(), within)
                if not isinstance(reply, Exception):
                    return await self._decode(call, reply, timer) if unsure else call.decode(reply)
                unsure = unsure or isinstance(reply, OSError)
                if replies.action_for(str(reply)) is replies.ErrorAction.LOAD:
                    command = call.load

    async def _decode(self, call: Call[T] | IdempotentCommand, reply: Any, timer: replies.RetryTimer) -> T:
        """Decode the reply of a call that may have been carried out before."""
        try:
            return cast("T", call.decode(reply))
        except QueueFull as fatal:
            return await self._confirm_refusal(call, fatal, timer)

    async def _confirm_refusal(
        self, call: Call[T] | IdempotentCommand, fatal: Exception, timer: replies.RetryTimer
    ) -> T:
        """Raise *fatal* as `Connection` does: QueueFull only when no copy of the push can be accepted any more."""
        withdrawal = call.withdrawal() if isinstance(fatal, QueueFull) else None
        if withdrawal is None:
            raise fatal
        reply = await self.run(withdrawal, retry_for=timer.seconds, deadline=timer.deadline)
        if reply is None:
            raise fatal
        return cast("T", call.decode(reply))

    async def run_command(self, *command: Argument, retry_for: float | None, deadline: float | None = None) -> Any:
        """Send one plain command that may be repeated and return the raw reply; errors as in `run`."""
        return await self.run(IdempotentCommand(command), retry_for=retry_for, deadline=deadline)

    async def _run_redirected(self, redirection: str, command: tuple[Argument, ...], within: float) -> Any:
        """Send one command to the node named by ASK; after any error the call is repeated here."""
        other = AsyncConnection(self.endpoint.ask_redirect(redirection))
        try:
            async with asyncio.timeout(within):
                await other.execute("ASKING")
                return await other.execute(*command)
        except OSError as error:
            return error
        finally:
            other.close()

    def handle_error_reply(self, reply: object) -> replies.ErrorAction:
        """
        Return what to do about an error reply; drop the connection when this is the wrong server.

        Raises ConfigurationError (E33) when a single server says that it is a node of a cluster.
        """
        text = str(reply)
        what = replies.action_for(text)
        if what is replies.ErrorAction.MOVE:
            self.drop(ConnectionLost(f"this is the wrong node now ({text})"))
            self.endpoint.note_moved(text)
        elif what is replies.ErrorAction.RECONNECT:
            self.drop(ConnectionLost(f"the server takes no writes now ({text})"))
        return what

    async def execute(self, *command: Argument, block: float = 0.0, within: float | None = None) -> Any:
        """
        Send one command and return the raw reply, an exception object for an error reply.

        *block* is how many seconds the server may delay it, *within* in how many it and a new connection must be there
        (None: as the endpoint says). Raises OSError when the connection is lost.
        """
        if self._transport is None:
            within = await self.open_within(within)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer(reply: Any) -> None:
            if not future.done():
                if isinstance(reply, OSError):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

        self.send(command, answer, block=block, within=within)
        return await future

    def pack(self, command: tuple[Argument, ...]) -> bytes | None:
        """Return what `send` would write for *command*, to be sent later; None when the connection is not open."""
        return None if self._transport is None else self._pack(command)

    def send(
        self, command: tuple[Argument, ...], answer: OnReply, *,
        block: float = 0.0, at_once: bool = False, packed: bytes | None = None, within: float | None = None,
    ) -> None:  # fmt: skip
        """
        Send one command on the open connection; *answer* gets the reply, or an OSError when the connection is lost.

        It leaves at once where no reply is awaited, or *at_once*; else at the end of this pass of the loop, with all others of
        the pass. *packed* is what `pack` returned for it, if it was asked.
        """
        if self._transport is None or self._loop is None:
            answer(ConnectionLost("not connected"))
            return
        if not (self._pending or self._out):
            at_once = True
        elif not self._out and not at_once:
            self._loop.call_soon(self._flush)
        if packed is None:
            try:
                packed = self._pack(command)
            except (UnicodeEncodeError, TypeError) as error:
                raise replies.not_sendable(error) from None
        deadline = self._loop.time() + block + (self._reply_timeout if within is None else within)
        # In this order, so that the numbers show it if something is raised in between.
        self._sent += 1
        self._out.append(packed)
        if at_once:
            self._flush()
        self._pending.append((answer, deadline, self._sent))
        if self._overdue_timer is None:
            self._overdue_timer = self._loop.call_at(deadline, self._check_overdue)
        elif deadline < self._overdue_timer.when():
            self._overdue_timer.cancel()
            self._overdue_timer = self._loop.call_at(deadline, self._check_overdue)

    async def open(self, within: float | None = None) -> None:
        """Connect, unless it is connected: all that wait share one try. Raises OSError, after *within* seconds at the latest."""
        while self._transport is None:
            if self._closed:
                raise ConnectionLost("closed")
            opening = self._opening
            if opening is None:
                opening = self._opening = asyncio.get_running_loop().create_task(self._connect())
                opening.add_done_callback(self._end_opening)
            await asyncio.wait([opening], timeout=within)
            if not opening.done():
                raise ConnectionLost("Timeout connecting to server")
            error = ConnectionLost("closed") if opening.cancelled() else opening.exception()
            if isinstance(error, Exception):
                raise error
            if error is not None:  # whoever runs the loop has it already
                raise ConnectionLost("interrupted while it was opened")

    async def open_within(self, within: float | None) -> float | None:
        """Connect as `open` does; return what is left of *within* for the reply."""
        began = time.monotonic()
        await self.open(within)
        return None if within is None else max(0.001, within - (time.monotonic() - began))

    async def _connect(self) -> None:
        import hiredis
        from redis import RedisError

        try:
            async with asyncio.timeout(self.timeout.seconds):
                raw = await self.endpoint.aopen()
        except TimeoutError as error:
            raise ConnectionLost(str(error) or "Timeout connecting to server") from error
        except RedisError as error:
            if (text := fatal_reply(error)) is not None:
                raise replies.fatal_error(text, str(self.endpoint)) from error
            raise ConnectionLost(str(error)) from error
        if self._closed:  # meanwhile
            await raw.disconnect(nowait=True)
            raise ConnectionLost("closed")
        self._raw, self._reader = raw, hiredis.Reader(replyError=_reply_error)
        self._pack = hiredis.pack_command
        self._sent = self._answered = 0
        self._loop = asyncio.get_running_loop()
        assert raw._writer is not None  # noqa: SLF001
        transport = raw._writer.transport  # noqa: SLF001  the one private name we use; a test holds it
        self._stream, self._transport = _StreamProtocol(self), transport
        transport.set_protocol(self._stream)
        if self._opened and self.on_reopened is not None:
            self.on_reopened()
        self._opened = True

    def _end_opening(self, opening: asyncio.Task[None]) -> None:
        if self._opening is opening:
            self._opening = None
        if not opening.cancelled():
            opening.exception()  # whether or not anybody still waits for it

    def close(self) -> None:
        """Close for good."""
        self._closed = True  # a try that is under way closes what it has opened
        self.drop(ConnectionLost("closed"))

    @property
    def is_open(self) -> bool:
        """True when commands can be sent without waiting."""
        return self._transport is not None

    @property
    def is_busy(self) -> bool:
        """True when a command waits for its reply, or for the connection."""
        return bool(self._pending) or self._opening is not None

    # -- for the stream -------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Hand out the replies in order, each to the command of its number; a mismatch ends the connection."""
        reader, pending = self._reader, self._pending
        reader.feed(data)
        while pending is self._pending and (reply := reader.gets()) is not False:
            self._answered += 1
            if not pending or pending[0][2] != self._answered:
                self.drop(ConnectionLost("a reply belongs to no command"))
                return
            pending.popleft()[0](reply)

    def drop(self, error: OSError) -> None:
        """Give up the connection; every pending call gets *error*."""
        transport, self._transport = self._transport, None
        stream, self._stream = self._stream, None
        raw, self._raw = self._raw, None
        if self._overdue_timer is not None:
            self._overdue_timer.cancel()
            self._overdue_timer = None
        self._out = []
        if stream is not None:
            stream.detach()
        if transport is not None:
            transport.abort()
        if raw is not None:
            raw._writer = raw._reader = None  # noqa: SLF001  else its destructor warns of an unclosed connection
        pending, self._pending = self._pending, deque()
        if transport is not None and self.on_lost is not None and not self._closed:
            self.on_lost(error)
        for answer, _, _ in pending:
            answer(error)

    # -- internals ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        try:
            out, self._out = self._out, []
            if self._transport is not None and out:
                self._transport.write(b"".join(out) if len(out) > 1 else out[0])
        except BaseException:
            self.drop(ConnectionLost("interrupted while commands were sent"))
            raise

    def _check_overdue(self) -> None:
        """Give up a connection on which a call is overdue: one timer for all, not one per call."""
        self._overdue_timer = None
        if not self._pending or self._loop is None:
            return
        first = min(deadline for _, deadline, _ in self._pending)
        if first <= self._loop.time():
            self.drop(ConnectionLost("Timeout reading from server"))
        else:
            self._overdue_timer = self._loop.call_at(first, self._check_overdue)


class ReplyError(Exception):
    """An error reply of the server."""


def _reply_error(text: str) -> ReplyError:
    return ReplyError(text)
