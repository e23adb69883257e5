"""A proxy between Redis and its clients that breaks connections on request.

It runs on a thread of its own; every method may be called from any other and has taken effect when it returns.
`up` is the way from client to server, `down` the way back.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.proxy_connections import DIRECTIONS, Cut, ProxyConnection, ProxyState, SocketEnd, Swallow


class Proxy(ProxyState):
    """`with Proxy("/tmp/redis.sock") as proxy: Conveyor(proxy.url)`, and then `proxy.cut(after=100)`."""

    def __init__(self, upstream: str | Path | tuple[str, int], *, listen: Path | None = None, seed: int = 0) -> None:
        """Stand before *upstream*, a Unix socket or host and port; listen on loopback, or on the Unix socket *listen*."""
        super().__init__(upstream, seed)
        self._listen = listen
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._storm: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    # Life

    def start(self) -> Proxy:
        """Listen."""
        self._thread.start()
        self._do(self._open_door)
        return self

    def stop(self) -> None:
        """Close everything. A second call does nothing."""
        if not self._thread.is_alive():
            return
        self._do(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL that clients connect to."""
        return f"unix://{self._listen}?db=0" if self._listen else f"redis://127.0.0.1:{self.port}/0"

    # Faults

    def cut(self, *, after: int, direction: str = "down") -> None:
        """End the connection that carries byte *after* + 1 of that direction from now on, before this byte."""
        self._do(lambda: self.cuts.append(Cut(direction, after, None, 1)))

    def cut_randomly(self, *, mean: int, times: int, seed: int, directions: tuple[str, ...] = DIRECTIONS) -> None:
        """Cut *times* connections, as many in each direction, with exponentially many bytes between, *mean* on average."""
        draw = random.Random(seed)

        def arm() -> None:
            for at, direction in enumerate(directions):
                share = (times + at) // len(directions)
                if share:
                    self.cuts.append(Cut(direction, again(), again, share))

        def again() -> int:
            return int(draw.expovariate(1 / mean))

        self._do(arm)

    def swallow_reply(self, n: int = 1, name: str | None = None, *, hang: bool = False) -> None:
        """Let the *n*-th command (of this name) reach the server and lose its reply; the connection ends or hangs."""
        self._do(lambda: self.swallows.append(Swallow(n, name.upper() if name else None, hang=hang)))

    def delay(self, seconds: float, jitter: float = 0.0, directions: tuple[str, ...] = DIRECTIONS) -> None:
        """Hand everything on this much later, plus or minus up to *jitter*. Order is kept."""
        self._do(lambda: self.delays.update(dict.fromkeys(directions, (seconds, jitter))))

    def black_hole(self, directions: tuple[str, ...] = DIRECTIONS) -> None:
        """Let nothing pass any more, with connections left open; `heal` delivers what was held, as TCP does."""
        self._do(lambda: self.black.update(directions))

    def refuse(self) -> None:
        """Close every new connection, and leave the open ones."""
        self._do(lambda: setattr(self, "refusing", True))

    def close_all(self) -> int:
        """Cut every connection there is; return how many."""
        closed: int = self._do(self._close_some)
        return closed

    def storm(self, *, every: float, share: float = 1.0) -> None:
        """Cut each connection with this probability, again and again until `heal`."""

        async def blow() -> None:
            while True:
                self._close_some(share)
                await asyncio.sleep(every)

        def begin() -> None:
            self._end_storm()
            self._storm = self._loop.create_task(blow())

        self._do(begin)

    def heal(self) -> None:
        """End every fault; what a black hole held back is delivered now."""

        def calm() -> None:
            self._end_storm()
            self.cuts.clear()
            self.swallows.clear()
            self.refusing = False
            self.delays = dict.fromkeys(DIRECTIONS, (0.0, 0.0))
            self.black.clear()
            for link in list(self.links):
                link.up.flush()
                link.down.flush()

        self._do(calm)

    def connections(self) -> int:
        """Return how many clients are connected."""
        count: int = self._do(lambda: len(self.links))
        return count

    # Within the loop's thread

    def _close_some(self, share: float = 1.0) -> int:
        struck = [link for link in self.links if share >= 1 or self.random.random() < share]
        for link in struck:
            link.cut()
        self.count["closed"] += len(struck)
        return len(struck)

    def _end_storm(self) -> None:
        if self._storm is not None:
            self._storm.cancel()
            self._storm = None

    async def _open_door(self) -> None:
        def meet() -> SocketEnd:
            link = ProxyConnection(self)
            return SocketEnd(link, link.up, link.down)

        if self._listen:
            self._door = await self._loop.create_unix_server(meet, str(self._listen))
        else:
            self._door = await self._loop.create_server(meet, "127.0.0.1", 0)
            self.port = int(self._door.sockets[0].getsockname()[1])

    async def _shut(self) -> None:
        self._end_storm()
        self._door.close()
        self._close_some()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.sleep(0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _do(self, act: Callable[[], Any]) -> Any:
        async def within() -> Any:
            found = act()
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(within(), self._loop).result(30)
