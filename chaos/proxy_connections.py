"""The connections of a fault proxy: how bytes pass from one socket to the other, and what happens to them on the way."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.resp_framing import RespSplitter

DIRECTIONS = ("up", "down")
_HIGH_WATER = 4_000_000  # bytes waiting for one receiver; its sender is not read from until they are fewer


class Cut:
    """Ends the connection that carries the byte after *left* more, in one direction."""

    def __init__(self, direction: str, left: int, again: Callable[[], int] | None, times: int) -> None:
        self.direction = direction
        self.left = left
        self.again = again
        self.times = times


class Swallow:
    """Loses the reply of the *left*-th command of this name from now on; then the connection is cut, or hangs."""

    def __init__(self, left: int, name: str | None, *, hang: bool) -> None:
        self.left = left
        self.name = name
        self.hang = hang


class ProxyState:
    """The state that all connections of a proxy share: active faults and counters."""

    def __init__(self, upstream: str | Path | tuple[str, int], seed: int) -> None:
        self.upstream = upstream
        self.random = random.Random(seed)
        self.commands: Counter[str] = Counter()  # by name, as they came from clients
        self.bytes: Counter[str] = Counter()  # by direction, as passed on
        self.count: Counter[str] = Counter()  # faults made: cut, swallowed, closed
        self.accepted = 0
        self.links: set[ProxyConnection] = set()
        self.cuts: list[Cut] = []
        self.swallows: list[Swallow] = []
        self.delays = dict.fromkeys(DIRECTIONS, (0.0, 0.0))
        self.black: set[str] = set()
        self.refusing = False
        self.tasks: set[asyncio.Task[Any]] = set()

    async def open(self, loop: asyncio.AbstractEventLoop, end: Callable[[], SocketEnd]) -> None:
        """Connect to the server."""
        if isinstance(self.upstream, tuple):
            await loop.create_connection(end, *self.upstream)
        else:
            await loop.create_unix_connection(end, str(self.upstream))

    def used(self, cut: Cut) -> None:
        """Remove a cut that was made, or aim it anew."""
        cut.times -= 1
        if cut.times and cut.again:
            cut.left = cut.again()
        else:
            self.cuts.remove(cut)


class Pipe:
    """One direction of one connection: bytes in, bytes out, perhaps later, perhaps never."""

    def __init__(self, link: ProxyConnection, direction: str) -> None:
        self.link = link
        self.direction = direction
        self.splitter = RespSplitter()
        self.queue: deque[tuple[float, bytes | None]] = deque()  # None: the end of the connection
        self.waiting = 0
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.last_due = 0.0
        self.muted = False  # what comes is dropped: the connection hangs
        self.timer: asyncio.TimerHandle | None = None

    def put(self, data: bytes | None) -> None:
        """Accept bytes, or the end of the stream, from the source."""
        if self.muted:
            return
        proxy = self.link.proxy
        low, spread = proxy.delays[self.direction]
        delay = max(0.0, low + proxy.random.uniform(-spread, spread)) if low or spread else 0.0
        self.last_due = max(self.last_due, asyncio.get_running_loop().time() + delay)
        self.queue.append((self.last_due, data))
        self.waiting += len(data or b"")
        if self.waiting > _HIGH_WATER and self.source is not None:
            self.source.pause_reading()
        self.flush()

    def flush(self) -> None:
        """Hand on what is due, unless this direction is a black hole now."""
        loop = asyncio.get_running_loop()
        while self.queue and self.sink is not None and self.direction not in self.link.proxy.black:
            due, data = self.queue[0]
            if due > loop.time():
                if self.timer is None:
                    self.timer = loop.call_at(due, self._on_time)
                return
            self.queue.popleft()
            if data is None:
                self.sink.close()
                self.link.half_closed(self)
                return
            self.waiting -= len(data)
            if not self.sink.is_closing():
                self.sink.write(data)
            if self.waiting <= _HIGH_WATER and self.source is not None and not self.source.is_closing():
                self.source.resume_reading()

    def _on_time(self) -> None:
        self.timer = None
        self.flush()


class SocketEnd(asyncio.Protocol):
    """One of the two sockets of a link."""

    def __init__(self, link: ProxyConnection, incoming: Pipe, outgoing: Pipe) -> None:
        self.link = link
        self.incoming = incoming
        self.outgoing = outgoing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.incoming.source = self.outgoing.sink = transport
        if self.incoming.direction == "up":
            self.link.begin()
        self.outgoing.flush()

    def data_received(self, data: bytes) -> None:
        self.link.carry(self.incoming, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.incoming.put(None)


class ProxyConnection:
    """A client's connection and the one to the server that was opened for it."""

    def __init__(self, proxy: ProxyState) -> None:
        self.proxy = proxy
        self.up = Pipe(self, "up")
        self.down = Pipe(self, "down")
        self.commands = 0
        self.replies = 0
        self.swallow_at: dict[int, bool] = {}  # number of a command whose reply is lost → the connection hangs then

    def begin(self) -> None:
        """Open the way to the server for a client that has come."""
        self.proxy.links.add(self)
        self.proxy.accepted += 1
        if self.proxy.refusing:
            self.cut()
            return
        task = asyncio.get_running_loop().create_task(self._connect())
        self.proxy.tasks.add(task)
        task.add_done_callback(self.proxy.tasks.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.proxy.open(loop, lambda: SocketEnd(self, self.down, self.up))
        except OSError:
            self.cut()

    def carry(self, pipe: Pipe, data: bytes) -> None:
        """Pass on what came, with the faults that are due within it."""
        if pipe.muted:
            return
        data, ends = self._lose(pipe, data)
        cut = next((cut for cut in self.proxy.cuts if cut.direction == pipe.direction), None)
        if cut is not None:
            if len(data) > cut.left:
                data, ends = data[: cut.left], "cut"
                self.proxy.used(cut)
            else:
                cut.left -= len(data)
        if data:
            self.proxy.bytes[pipe.direction] += len(data)
            pipe.put(data)
        if ends == "cut":
            self.proxy.count["cut"] += 1
            self.cut(but=pipe)
        elif ends == "hang":
            self.up.muted = self.down.muted = True

    def _lose(self, pipe: Pipe, data: bytes) -> tuple[bytes, str]:
        # Count commands and replies; return what of the data is passed on, and what becomes of the connection.
        wholes = pipe.splitter.feed(data)
        if pipe.direction == "up":
            for _, name, _ in wholes:
                self.commands += 1
                self.proxy.commands[name] += 1
                self._arm(name)
            return data, ""
        begin = 0
        for end, _, push in wholes:
            if not push:
                self.replies += 1
                if self.replies in self.swallow_at:
                    self.proxy.count["swallowed"] += 1
                    return data[:begin], "hang" if self.swallow_at[self.replies] else "cut"
            begin = end
        # The head of a reply that is to be lost does not pass either.
        return (data[:begin], "") if self.replies + 1 in self.swallow_at else (data, "")

    def _arm(self, name: str) -> None:
        for swallow in list(self.proxy.swallows):
            if swallow.name in {None, name}:
                swallow.left -= 1
                if swallow.left == 0:
                    self.proxy.swallows.remove(swallow)
                    self.swallow_at[self.commands] = swallow.hang

    def cut(self, but: Pipe | None = None) -> None:
        """Close both sockets now; only what stands in *but* still arrives."""
        self.proxy.links.discard(self)
        for pipe in (self.up, self.down):
            pipe.muted = True
            if pipe is but:
                pipe.queue.append((pipe.last_due, None))
                pipe.flush()
            else:
                pipe.queue.clear()
            if pipe.source is not None and (but is None or pipe is but):
                pipe.source.abort()

    def half_closed(self, pipe: Pipe) -> None:
        """One side has gone and the other was told: the link is over when nothing waits the other way."""
        other = self.down if pipe is self.up else self.up
        if not other.queue:
            self.proxy.links.discard(self)
