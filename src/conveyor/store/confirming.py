"""Pushes that are confirmed: the wait travels right behind the push, in one write on the same connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from conveyor.errors import ConfigurationError
from conveyor.store import operations
from conveyor.store.connection import Connection, answered
from conveyor.store.durability import Durability, Got, Sync, WaitBroken, Watch, judge
from conveyor.store.script import Call
from conveyor.store.wire import Wire, WireLost

if TYPE_CHECKING:
    from conveyor.store.place import Place

T = TypeVar("T")
EXAMINED = 10.0
"""Seconds after which the settings a connection relies on are looked at again."""
NOTHING = Got(synced=False, replicas=0)


class _Errand:
    """One confirmed call: what is asked, what was sent already, what came of it."""

    __slots__ = ("asked", "began", "got", "lane", "sent", "sync")

    def __init__(self, asked: Durability, lane: str) -> None:
        self.asked = asked
        self.lane = lane
        self.sent = False
        self.began = time.monotonic()
        self.sync = Sync.NONE
        self.got = NOTHING

    def commands(self, command: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """
        Return the push and what follows it.

        A repeat may be answered from its lane without a write, and a wait covers only what its connection wrote: a
        wait on a new connection would confirm nothing, at once. So a repeat touches its lane, behind which every
        earlier write stands in the stream of replication and in the file.
        """
        touch = [("PEXPIRE", self.lane, operations.LANE_MS)] if self.sent else []
        self.sent = True
        return [command, *touch, *self.asked.waits(self.sync)]

    def settle(self, replies: list[Any]) -> Any:
        """Take the replies; return the first, that of the push."""
        waits = len(self.asked.waits(self.sync))
        if not isinstance(replies[0], Exception):
            self.got = self.asked.read(self.sync, replies[len(replies) - waits :])
        return replies[0]

    def watch(self) -> Watch | None:
        """Return what still has to be watched."""
        if self.sync is not Sync.WATCH or not self.got.synced:
            return None
        return Watch(time.monotonic(), self.asked.timeout_ms)

    def judge(self, replies: Sequence[Any], where: str) -> None:
        """Take what the connection said of itself; what can never be had is refused, unless it may be stored already."""
        try:
            self.sync = judge(self.asked, replies, where)
        except ConfigurationError:
            if not self.sent:
                raise
            self.sync = Sync.NONE


class ConfirmedConnection(Connection):
    """A blocking connection whose pushes are followed by a wait."""

    def __init__(self, place: Place) -> None:
        """Remember where to connect."""
        super().__init__(place)
        self._errand: _Errand | None = None
        self._examined = 0.0
        self._judged: dict[bool, Sync] = {}

    def confirm(self, call: Call[T], asked: Durability, *, patience: float) -> tuple[T, Got]:
        """Carry out *call*, repeated as any; return its reply and what was confirmed."""
        errand = self._errand = _Errand(asked, call.keys[0])
        try:
            return self.run(call, patience=patience), errand.got
        finally:
            self._errand = None

    def execute(self, *command: Any, block: float = 0.0) -> Any:
        """Send one command, and behind it what confirms it."""
        errand = self._errand
        if errand is None or command[0] not in {"EVALSHA", "EVAL"}:
            return super().execute(*command, block=block)
        try:
            self._examine(errand)
            reply = errand.settle(self._exchange(errand.commands(command), errand.asked.seconds))
        except WaitBroken:
            self.close()
            raise
        if isinstance(reply, Exception):
            raise reply
        if (watch := errand.watch()) is not None:
            while (pause := watch.look(self._exchange([Watch.COMMAND], 0.0)[0], time.monotonic())) is not None:
                time.sleep(pause)
            errand.got = Got(watch.synced, errand.got.replicas)
        return reply

    def _examine(self, errand: _Errand) -> None:
        """Ask a new connection what it can confirm, and from time to time again."""
        if self._socket is None:
            self._open()
            self._judged = {}
        now = time.monotonic()
        if now - self._examined > EXAMINED:
            self._judged = {}
        found = self._judged.get(errand.asked.fsync)
        if found is None:
            errand.judge(self._exchange(errand.asked.examination(), 0.0), str(self.place))
            self._judged[errand.asked.fsync] = errand.sync
            self._examined = now
        else:
            errand.sync = found

    def _exchange(self, commands: Sequence[tuple[Any, ...]], block: float) -> list[Any]:
        """Send *commands* in one write; return all replies, error replies as exceptions."""
        assert self._socket is not None
        try:
            self._socket.sendall(b"".join([self._pack(command) for command in commands]))
        except BaseException:
            self.close()
            raise
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(self._receive(block))
            except Exception as error:
                if not answered(error):
                    raise
                replies.append(error)
        return replies


class ConfirmedWire(Wire):
    """The same on asyncio; one errand at a time, since a wait holds up whatever comes behind it."""

    def __init__(self, place: Place) -> None:
        """Remember where to connect."""
        super().__init__(place)
        self._turn = asyncio.Lock()
        self._errand: _Errand | None = None
        self._examined = 0.0
        self._judged: dict[bool, Sync] = {}
        self._known: object = None

    async def confirm(self, call: Call[T], asked: Durability, *, patience: float | None) -> tuple[T, Got]:
        """Carry out *call*, repeated as any; return its reply and what was confirmed."""
        async with self._turn:
            errand = self._errand = _Errand(asked, call.keys[0])
            try:
                return await self.run(call, patience=patience), errand.got
            finally:
                self._errand = None

    async def execute(self, *command: Any, block: float = 0.0) -> Any:
        """Send one command, and behind it what confirms it."""
        errand = self._errand
        if errand is None or command[0] not in {"EVALSHA", "EVAL"}:
            return await super().execute(*command, block=block)
        try:
            await self._examine(errand)
            reply = errand.settle(await self._exchange(errand.commands(command), errand.asked.seconds))
        except WaitBroken as error:
            self.drop(WireLost(str(error)))
            raise
        if not isinstance(reply, Exception) and (watch := errand.watch()) is not None:
            while True:
                [facts] = await self._exchange([Watch.COMMAND], 0.0)
                if (pause := watch.look(facts, time.monotonic())) is None:
                    break
                await asyncio.sleep(pause)
            errand.got = Got(watch.synced, errand.got.replicas)
        return reply

    async def _examine(self, errand: _Errand) -> None:
        if not self.is_open:
            await self.open()
        now = time.monotonic()
        if self._known is not self._stream or now - self._examined > EXAMINED:
            self._judged, self._known = {}, self._stream
        found = self._judged.get(errand.asked.fsync)
        if found is None:
            errand.judge(await self._exchange(errand.asked.examination(), 0.0), str(self.place))
            self._judged[errand.asked.fsync] = errand.sync
            self._examined = now
        else:
            errand.sync = found

    async def _exchange(self, commands: Sequence[tuple[Any, ...]], block: float) -> list[Any]:
        """Send *commands* in one write; return all replies, error replies as exceptions."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        for command, future in zip(commands, futures, strict=True):
            self.send(command, partial(_answer, future), block=block)
        return await asyncio.gather(*futures)


def _answer(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, OSError):
        future.set_exception(reply)
    else:
        future.set_result(reply)
