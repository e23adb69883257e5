"""
Waiting without polling: one connection blocks on the wake-up lists of all hungry queues.

A token holds no job, so a lost one costs seconds and nothing else. Each queue's own list
(`wake:<worker>`) is always listened to while jobs run: a cancellation rings there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError
from conveyor.store import fault
from conveyor.store.wire import Wire, WireLost
from conveyor.worker.log import complain

if TYPE_CHECKING:
    from conveyor.worker.role import Dormitory, Sleeper

BLOCK = 30.0
"""Seconds of one blocking call. Due instants and lost tokens are the turns' business, so it may be long."""
BUSY = 0.1
"""Seconds of uninterrupted work after which the worker's own lists are listened to as well."""


class Listener:
    """Blocks on wake-up lists, and tells the consumer whose token it took."""

    def __init__(self, worker: Dormitory, wire: Wire) -> None:
        """Take the worker whose consumers it serves, and a connection of its own."""
        self._worker, self._wire = worker, wire
        self._listening: dict[bytes, Sleeper] | None = None
        self._heard: frozenset[str] = frozenset()  # queues whose common list is part of the blocked call
        self._later: asyncio.TimerHandle | None = None
        self._retry: asyncio.Task[None] | None = None
        self._attempt = 0
        self.blocked = 0  # calls made, for tests and the curious

    def listen(self) -> None:
        """Block if nothing is blocked yet; if a hungry queue is not heard, call ourselves and block anew."""
        if self._worker.stopped or self._retry is not None:
            return
        hungry = [consumer for consumer in self._worker.sleepers if consumer.hungry]
        if self._listening is not None:
            unheard = [consumer for consumer in hungry if consumer.queue not in self._heard]
            if unheard:
                self._heard = self._heard | {consumer.queue for consumer in unheard}  # one call is enough
                unheard[0].call_myself()
            return
        if hungry:
            self._block(hungry)
        else:
            self._wait_a_little()

    def _wait_a_little(self) -> None:
        if self._later is None and not self._worker.stopped:
            self._later = asyncio.get_running_loop().call_later(BUSY, self._busy)

    def _busy(self) -> None:
        self._later = None
        if self._listening is None and self._retry is None and not self._worker.stopped:
            self._block([consumer for consumer in self._worker.sleepers if consumer.hungry])

    def _block(self, hungry: list[Sleeper]) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        names: dict[bytes, Sleeper] = {consumer.keys.wake.encode(): consumer for consumer in hungry}
        for consumer in self._worker.sleepers:
            if consumer.identity:
                names[consumer.keys.wake_of(consumer.identity).encode()] = consumer
        if not names:
            return
        self._listening = names
        self._heard = frozenset(consumer.queue for consumer in hungry)
        if not self._wire.is_open:
            self._reconnect()
            return
        self.blocked += 1
        self._wire.send(("BLPOP", *names, BLOCK), self._answered, block=BLOCK)

    def _answered(self, reply: Any) -> None:
        names, self._listening = self._listening, None
        if isinstance(reply, Exception):
            if not self._worker.stopped:
                self._refused(reply)
                self._reconnect()
            return
        self._attempt = 0
        if reply is not None and names is not None:
            # Not at once: it makes a turn now, so it would not be among the hungry, and would call us again as soon as
            # it is. Its turn ends in `listen`; one that leads to work is not waited for longer than this.
            names[reply[0]].woken()
            self._wait_a_little()
        else:
            self.listen()

    def _refused(self, reply: Exception) -> None:
        if isinstance(reply, OSError):
            return
        try:
            if self._wire.heed(reply) is fault.Remedy.RAISE:
                complain("waiting for work was refused: %s", reply)
        except ConveyorError as error:
            complain("waiting for work was refused: %s", error)

    def renew(self) -> None:
        """
        Connect anew: the turns' connection had to, so ours may lead to a server that is not the right one any more.

        Without this, workers live on but idle after a failover, blocked at a server nobody pushes to.
        """
        if self._wire.is_open:
            self._wire.drop(WireLost("connected elsewhere now"))

    def _reconnect(self) -> None:
        self._listening = {}
        if self._retry is None:
            self._retry = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        while not self._worker.stopped:
            await asyncio.sleep(fault.pause(self._attempt))
            self._attempt += 1
            try:
                await self._wire.open()
            except OSError:
                continue
            except ConveyorError as error:  # its password is refused: for a while, we hope
                complain("waiting for work was refused: %s", error)
                continue
            break
        self._retry = self._listening = None
        # Whatever was announced meanwhile was not heard: ask each queue once.
        for consumer in self._worker.sleepers:
            consumer.woken()
        self.listen()

    async def close(self) -> None:
        """Stop waiting."""
        if self._later is not None:
            self._later.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._wire.close()
