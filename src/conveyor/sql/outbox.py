"""The outbox: a table in the program's own database, so that jobs are enqueued in its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

from conveyor.errors import ConfigurationError
from conveyor.jobs.core import core_of
from conveyor.jobs.job import refuse_in_loop
from conveyor.jobs.job_options import positive_ms
from conveyor.sql.delivery import OutboxDelivery
from conveyor.sql.drivers import blocking, refuse_alone
from conveyor.sql.relay import Relay
from conveyor.sql.tables import OUTBOX, ManagedTable, TableSql
from conveyor.sql.transaction import OutboxTransaction, explained, find
from conveyor.units import Duration

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor
    from conveyor.sql.drivers import DbConnection

COUNT = "SELECT COUNT(*), MIN(created_ms) FROM {table} WHERE namespace = ? AND batch <> '!'"
COUNT_ASIDE = "SELECT COUNT(*) FROM {table} WHERE namespace = ? AND batch = '!'"
REDRIVE = "UPDATE {table} SET batch = '' WHERE namespace = ? AND batch = '!'"


class OutboxBacklog(NamedTuple):
    """Rows that wait for a relay, those set aside because they cannot be read, and the age in seconds of the oldest waiting."""

    waiting: int
    aside: int
    oldest_age: float | None


class Outbox(ManagedTable):
    """
    Enqueues jobs and pushes messages in the transactions of a database, and delivers them to Redis.

    One object for each database, beside the app: ``outbox = Outbox(app, connect)``.
    """

    def __init__(
        self,
        app: Conveyor,
        connect: Callable[[], Any] | None = None,
        *,
        table: str = "conveyor_outbox",
        interval: Duration = "1s",
    ) -> None:
        """
        Take the app, and a function that opens a blocking connection for the relay, which closes it.

        Without *connect* this program only enqueues. *table* is a name, perhaps with a schema; *interval* is how often
        a relay looks when nothing calls it. Nothing is opened. Raises ConfigurationError.
        """
        super().__init__(TableSql(table, OUTBOX, "outbox"))
        self.app = app
        self._connect = connect
        self._interval = positive_ms(interval, "interval") / 1000
        self._relays: set[Relay] = set()
        app.client.outlet = partial(find, app.client)

    def __repr__(self) -> str:
        return f"<Outbox {self._table} of {self.app!r}>"

    @property
    def table(self) -> str:
        """The name of the table."""
        return self._table.name

    # -- enqueuing ----------------------------------------------------------------------------------------------------

    def transaction(self, connection: Any) -> OutboxTransaction:
        """
        Return a block that is a transaction: it commits at its end, and rolls back on an error.

        What the app enqueues and pushes in it is part of the transaction. ``with`` for a blocking connection, ``async
        with`` for one of asyncio; the types that are understood stand in the guide. Raises, when it is entered,
        ConfigurationError: E47 for another, and for one in autocommit.
        """
        return OutboxTransaction(self.app.client, self._table, connection, self._ended, commits=True)

    def within(self, connection: Any) -> OutboxTransaction:
        """Return a block that is part of a transaction of the program's: that commits or rolls back, the block does not."""
        return OutboxTransaction(self.app.client, self._table, connection, self._ended, commits=False)

    def _ended(self, committed: bool) -> None:
        for relay in self._relays.copy():
            relay.wake(committed)

    # -- delivering ---------------------------------------------------------------------------------------------------

    def deliver(self) -> int:
        """
        Deliver what is committed by now, and return how many rows that were.

        When a queue refuses its rows they stay, the others are delivered, and then that refusal is raised: QueueFull,
        StoreUnavailable, ConfigurationError. What the database driver raises is raised as it is.
        """
        refuse_in_loop("outbox.deliver()", "await outbox.adeliver()")
        with self._opened() as link:
            passed = self._delivery().pass_through(link)
        for refusal in passed.refusals.values():
            refusal.add_note(
                f"{passed.count} rows of the outbox were delivered; those for {', '.join(passed.refusals)} wait."
            )
            raise refusal
        return passed.count

    async def adeliver(self) -> int:
        """Deliver what is committed by now, as `deliver`, on a thread."""
        return await asyncio.to_thread(self.deliver)

    def relay(self) -> Relay:
        """Return what delivers from a thread, for ever: between ``with`` or ``async with`` and the end of that block."""
        self._connecting()
        return Relay(self._opened, self._delivery(), self._interval, self._relays)

    # -- care ---------------------------------------------------------------------------------------------------------

    def stats(self) -> OutboxBacklog:
        """Count what is committed and not delivered."""
        with self._opened() as link, explained(self._table):
            [(waiting, oldest)] = link.run(self._table.fill(COUNT), self.app.namespace).rows
            [(aside,)] = link.run(self._table.fill(COUNT_ASIDE), self.app.namespace).rows
        return OutboxBacklog(waiting, aside, None if oldest is None else max(0.0, time() - oldest / 1000))

    async def astats(self) -> OutboxBacklog:
        """Count what is committed and not delivered, as `stats`, on a thread."""
        return await asyncio.to_thread(self.stats)

    def redrive(self) -> int:
        """Have the rows that were set aside tried again, and return how many."""
        with self._opened() as link, explained(self._table):
            count = link.run(self._table.fill(REDRIVE), self.app.namespace).touched
            link.commit()
        self._ended(True)
        return count

    async def aredrive(self) -> int:
        """Have the rows that were set aside tried again, as `redrive`, on a thread."""
        return await asyncio.to_thread(self.redrive)

    def _delivery(self) -> OutboxDelivery:
        return OutboxDelivery(core_of(self.app), self._table)

    def _connecting(self) -> Callable[[], Any]:
        if self._connect is None:
            raise ConfigurationError(
                "This Outbox was not told how to open a connection, so it can only enqueue. Write: Outbox(app, connect), "
                "with a function that returns a new blocking connection."
            )
        return self._connect

    @contextmanager
    def _opened(self) -> Iterator[DbConnection]:
        connection = self._connecting()()
        try:
            link = blocking(connection)
            link.begin()
            refuse_alone(link.commits_alone())
            try:
                yield link
            finally:
                with suppress(Exception):  # the connection may be what is broken
                    link.rollback()
        finally:
            with suppress(Exception):
                connection.close()
