"""Who carries out how leased messages end: a blocking driver and an awaitable one over the same books."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeVar

from conveyor import ids
from conveyor.messaging.leases import LeasedMessage, LeaseSession
from conveyor.messaging.message import Ending, OnError, lost
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store.client.client import Client, refuse_in_loop
from conveyor.store.operations import LIST_INTAKE, StaleTurn, WorkerUnregistered
from conveyor.store.script import Call
from conveyor.store.transport import eviction

V = TypeVar("V")
Run = Callable[[Call[Any]], Any]
AsyncRun = Callable[[Call[Any]], Awaitable[Any]]
logger = logging.getLogger("conveyor.queue")


class _SettlerState:
    """What both drivers share."""

    def __init__(self, client: Client, lessee: LeaseSession, verdict: SettlementPolicy, on_error: OnError) -> None:
        self.client = client
        self.lessee = lessee
        self.verdict = verdict
        self.on_error: OnError = on_error
        self._left = False

    def is_cancelled(self, leased: LeasedMessage) -> bool:
        """Tell whether somebody asked to cancel it while we hold it."""
        return leased.id in self.lessee.cancelled

    def enter(self, endings: Sequence[Ending]) -> None:
        for leased, settlement in endings:
            self.lessee.settle(leased, settlement)

    def note(self, asked: Sequence[Ending] = ()) -> None:
        """Log what was refused without anybody asking; raise LeaseLost for what was asked."""
        refused, self.lessee.refused = self.lessee.refused, []
        known = [leased for leased, _ in asked]
        for leased in refused:
            if not any(leased is one for one in known):
                logger.warning(
                    "Message %s: its end was refused, since the lease was given up before; it runs again.",
                    ids.public(self.lessee.keys.queue, leased.id),
                )
        reaped, self.lessee.reaped = self.lessee.reaped, 0
        if reaped:
            logger.warning("Queue %s: %d messages of a dead consumer are back.", self.lessee.keys.queue, reaped)
        missing, self.lessee.missing = self.lessee.missing, []
        if missing:
            eviction.tell_missing(logger, self.lessee.keys.queue, missing)
        if gone := [leased for leased in known if leased.lost]:
            raise lost(self.lessee.keys.queue, gone)


class BlockingSettler(_SettlerState):
    """Settles by blocking calls; the awaitable forms use a thread."""

    def __init__(
        self,
        client: Client,
        lessee: LeaseSession,
        verdict: SettlementPolicy,
        on_error: OnError,
        run: Run | None = None,
    ) -> None:
        """Take how calls are run; by default on a connection of the app."""
        super().__init__(client, lessee, verdict, on_error)
        self._run: Run = run if run is not None else partial(run_once, client)
        self._lock = threading.Lock()  # one turn of an identity in flight

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        refuse_in_loop()
        self.enter(endings)
        self.round()
        self.note(endings)

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle when it costs least; here at once."""
        self.settle(endings)

    def extend(self, leased: LeasedMessage, ms: int) -> BlockingSettler:
        """Move one message to an identity of its own."""
        refuse_in_loop()
        with self._lock:
            own = drive(self.lessee.split(leased, ms), self._run)
        if own is None:
            raise lost(self.lessee.keys.queue, [leased])
        return BlockingSettler(self.client, own, self.verdict, self.on_error)

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, from a loop."""
        await asyncio.to_thread(self.settle, endings)

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle when it costs least, from a loop."""
        await asyncio.to_thread(self.settle_soon, endings)

    async def aextend(self, leased: LeasedMessage, ms: int) -> BlockingSettler:
        """Move one message to an identity of its own, from a loop."""
        return await asyncio.to_thread(self.extend, leased, ms)

    def round(self, want: int = 0, *, leave: bool = False, blocking: bool = True) -> bool:
        """Make one turn, and what its reply asks for; False, without *blocking*, when one is under way."""
        if not self._lock.acquire(blocking=blocking):
            return False
        try:
            if self._left:
                return False  # a thread that renews comes late: it must not register anew
            drive(self.lessee.round(want, leave=leave), self._run)
            self._left = leave and not self.lessee.transient
        finally:
            self._lock.release()
        return True


class AsyncSettler(_SettlerState):
    """Settles by awaitable calls of one event loop; the blocking forms work from its other threads."""

    def __init__(
        self,
        client: Client,
        lessee: LeaseSession,
        verdict: SettlementPolicy,
        on_error: OnError,
        run: AsyncRun | None = None,
    ) -> None:
        """Take how calls are run; by default on the wire of the app."""
        super().__init__(client, lessee, verdict, on_error)
        self._run: AsyncRun = run if run is not None else partial(arun_once, client)
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    async def asettle(self, endings: Sequence[Ending]) -> None:
        """Settle, and return when Redis confirmed it. Raises LeaseLost, StoreUnavailable."""
        self.enter(endings)
        await self.around()
        self.note(endings)

    async def asettle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle when it costs least; here at once."""
        await self.asettle(endings)

    async def aextend(self, leased: LeasedMessage, ms: int) -> AsyncSettler:
        """Move one message to an identity of its own."""
        async with self._lock:
            own = await adrive(self.lessee.split(leased, ms), self._run)
        if own is None:
            raise lost(self.lessee.keys.queue, [leased])
        return AsyncSettler(self.client, own, self.verdict, self.on_error)

    def settle(self, endings: Sequence[Ending]) -> None:
        """Settle, from another thread."""
        refuse_in_loop()
        asyncio.run_coroutine_threadsafe(self.asettle(endings), self._loop).result()

    def settle_soon(self, endings: Sequence[Ending]) -> None:
        """Settle when it costs least, from another thread."""
        refuse_in_loop()
        asyncio.run_coroutine_threadsafe(self.asettle_soon(endings), self._loop).result()

    def extend(self, leased: LeasedMessage, ms: int) -> AsyncSettler:
        """Move one message to an identity of its own, from another thread."""
        refuse_in_loop()
        return asyncio.run_coroutine_threadsafe(self.aextend(leased, ms), self._loop).result()

    async def around(self, want: int = 0, *, leave: bool = False) -> None:
        """Make one turn, and what its reply asks for."""
        async with self._lock:
            if self._left:
                return
            await adrive(self.lessee.round(want, leave=leave), self._run)
            self._left = leave and not self.lessee.transient
        if self.lessee.opening is not None:
            await self.lessee.opening.fetch(self.lessee.waiting)


def patience(client: Client, call: Call[Any]) -> float:
    """Return for how long a call is repeated: an intake never, since it would store new entries over old."""
    return 0.0 if call.script is LIST_INTAKE else client.patience


def run_once(client: Client, call: Call[Any]) -> Any:
    """Carry out a call, repeated only when that is harmless."""
    return client.run(call, patience=patience(client, call))


async def arun_once(client: Client, call: Call[Any]) -> Any:
    """Carry out a call, repeated only when that is harmless."""
    return await client.arun(call, patience=patience(client, call))


def drive(calls: Generator[Call[Any], Any, V], run: Run) -> V:
    """Carry out a generator of calls and return its value."""
    try:
        call = next(calls)
        while True:
            try:
                reply = run(call)
            except (WorkerUnregistered, StaleTurn) as error:
                call = calls.throw(error)
            else:
                call = calls.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def adrive(calls: Generator[Call[Any], Any, V], run: AsyncRun) -> V:
    """Do the same, awaiting."""
    try:
        call = next(calls)
        while True:
            try:
                reply = await run(call)
            except (WorkerUnregistered, StaleTurn) as error:
                call = calls.throw(error)
            else:
                call = calls.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
