"""
The turns of queues with nothing to do: one call for all of them at an endpoint.

A turn every few seconds renews the lease of a queue, finds what a lost wake-up token announced, and looks for dead
workers. It costs about 25 commands. For queues of which the worker holds nothing, one script does this for all at once,
one command a queue, and names those that need a turn of their own.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from conveyor.errors import ConveyorError
from conveyor.store import operations
from conveyor.worker.leasing.membership import longest_pause
from conveyor.worker.logs import log_repeated_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conveyor.store.keys import QueueKeys
    from conveyor.store.transport.async_connection import AsyncConnection

MOST = 100
"""Queues of one call, at most: 1,600 keys."""
COMPARE_EVERY = 12
"""Of so many idle turns one asks whether Redis says that the worker holds something."""


class IdleConsumer(Protocol):
    """A consumer that may have nothing to do."""

    keys: QueueKeys
    identity: str
    lease_ms: int
    renewed_at: float
    number: int
    """Of its last turn."""

    @property
    def pause(self) -> float: ...
    @property
    def is_quiet(self) -> bool: ...
    def renew(self) -> None: ...
    def on_idle_turn(
        self, number: int, clock_offset: float, *, needs_turn: bool, now: int, next_due: int | None
    ) -> None: ...


class IdleTurns:
    """Renews the queues at one endpoint: those with nothing to do together, each of the others by a turn."""

    def __init__(
        self, connection: AsyncConnection, consumers: Sequence[IdleConsumer], after_turn: Callable[[], None] | None
    ) -> None:
        """
        Args:
            connection: the one that the turns of the queues use.
            consumers: those at the endpoint; more may be added.
            after_turn: called after each idle turn, if anything.
        """
        self._connection, self._consumers, self._after_turn = connection, consumers, after_turn
        self._task: asyncio.Task[None] | None = None
        self._count = 0

    def tick(self) -> None:
        """Renew what was not renewed lately. Called a few times a second."""
        now, quiet, is_due = monotonic(), [], False
        for consumer in self._consumers:
            if not consumer.is_quiet:
                consumer.renew()
            elif self._task is None:
                age = now - consumer.renewed_at
                is_due = is_due or age >= consumer.pause
                if age >= consumer.pause / 2:  # so that all of them come to be due together
                    quiet.append(consumer)
        if is_due:
            self._task = asyncio.get_running_loop().create_task(self._make(quiet))

    async def _make(self, quiet: list[IdleConsumer]) -> None:
        try:
            for first in range(0, len(quiet), MOST):
                await self._renew(quiet[first : first + MOST])
        except ConveyorError as error:  # rights of an earlier version, perhaps, which are enough for turns
            log_repeated_error("idle queues could not be renewed together, so each makes a turn: %s", error)
            for consumer in quiet:
                consumer.renew()
        finally:
            self._task = None
        if self._after_turn is not None:
            self._after_turn()

    async def _renew(self, consumers: list[IdleConsumer]) -> None:
        self._count += 1
        members = [
            (one.keys, one.identity, one.lease_ms, (at + self._count) % COMPARE_EVERY == 0)
            for at, one in enumerate(consumers)
        ]
        numbers, sent_at = [one.number for one in consumers], monotonic()
        pause = longest_pause(min(one.lease_ms for one in consumers))
        reply = await self._connection.run(operations.idle_turn(members), retry_for=None, longest_pause=pause)
        offset = reply.now - sent_at * 1000
        answers = zip(consumers, numbers, members, reply.needs_turn, reply.next_due, strict=True)
        for consumer, number, (_, identity, _, _), needs_turn, next_due in answers:
            if consumer.identity == identity:
                consumer.on_idle_turn(number, offset, needs_turn=needs_turn, now=reply.now, next_due=next_due)

    def close(self) -> None:
        """Stop waiting for a reply."""
        if self._task is not None:
            self._task.cancel()
