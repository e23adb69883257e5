"""The outbox: a table in the program's own database, through which jobs are enqueued in its transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

from conveyor.errors import ConfigurationError
from conveyor.jobs.core import core_of
from conveyor.jobs.job import refuse_in_loop
from conveyor.sql.delivery import OutboxDelivery
from conveyor.sql.drivers import adapt_blocking, connection_of_our_own, refuse_autocommit
from conveyor.sql.relay import Relay
from conveyor.sql.tables import OUTBOX, ManagedTable, TableSql
from conveyor.sql.transaction import OutboxTransaction, explain_missing_table, open_transaction
from conveyor.units import Duration, positive_ms

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor
    from conveyor.sql.drivers import DbConnection

COUNT = "SELECT COUNT(*), MIN(created_ms) FROM {table} WHERE namespace = ? AND batch <> '!'"
COUNT_ASIDE = "SELECT COUNT(*) FROM {table} WHERE namespace = ? AND batch = '!'"
ENTRIES = "SELECT seq, entry FROM {table} WHERE namespace = ? AND seq > ? ORDER BY seq LIMIT 200"
REDRIVE = "UPDATE {table} SET batch = '' WHERE namespace = ? AND batch = '!'"


class OutboxBacklog(NamedTuple):
    """Rows that wait, rows set aside because they cannot be read, and the age in seconds of the oldest waiting row."""

    waiting: int
    aside: int
    oldest_age: float | None


@dataclass(frozen=True, slots=True)
class OutboxRows:
    """The rows of one outbox, as the app knows them: jobs to come."""

    _table: TableSql
    _connect: Callable[[], AbstractContextManager[DbConnection]]
    _namespace: str

    @property
    def table(self) -> str:
        """The name of the table."""
        return self._table.name

    def entries(self) -> Iterator[bytes]:
        """Yield the entries of all rows, also of those that were set aside."""
        with self._connect() as db, explain_missing_table(self._table):
            last = -1
            while rows := db.run(self._table.fill(ENTRIES), self._namespace, last).rows:
                yield from (bytes(entry) for _, entry in rows)
                last = rows[-1][0]


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
        Make the outbox of *app*. Nothing is opened; raises ConfigurationError.

        *connect* opens a blocking connection for the relay, which closes it; None: this program only enqueues. *table*
        is a name with or without a schema. *interval* is the longest pause between two passes of a relay.
        """
        super().__init__(TableSql(table, OUTBOX, "outbox"))
        core = core_of(app)
        if connect is not None and not callable(connect):
            raise ConfigurationError(
                f"Outbox(app, connect) takes a function that opens a blocking connection, not {connect!r:.100}."
            )
        self.app = app
        self._connect = connect
        self._interval = positive_ms(interval, "interval") / 1000
        self._relays: set[Relay] = set()
        app.client.push_target_resolver = partial(open_transaction, app.client)
        core.outboxes.append(OutboxRows(self._table, self._connection, app.namespace))

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

        All that the app enqueues and pushes in it is part of the transaction. Use ``with`` for a blocking connection,
        ``async with`` for an asyncio one; the guide lists the known types. Entering the block raises ConfigurationError
        (E47) for another type, and for a connection in autocommit.
        """
        return OutboxTransaction(self.app.client, self._table, connection, self._wake_relays, commits=True)

    def within(self, connection: Any) -> OutboxTransaction:
        """Return a block that is part of the program's own transaction: the program commits or rolls back."""
        return OutboxTransaction(self.app.client, self._table, connection, self._wake_relays, commits=False)

    def _wake_relays(self, committed: bool) -> None:
        for relay in self._relays.copy():
            relay.wake(committed)

    # -- delivering ---------------------------------------------------------------------------------------------------

    def deliver(self) -> int:
        """
        Deliver the committed rows, and return how many.

        When a queue refuses its rows, they stay, the others are delivered, and the refusal is raised: QueueFull,
        StoreUnavailable, ConfigurationError. Errors of the driver are raised as they are.
        """
        refuse_in_loop(self.app.client, "outbox.deliver()", "await outbox.adeliver()")
        with self._connection() as db:
            done = self._delivery().deliver(db)
        for refusal in done.refusals.values():
            refusal.add_note(
                f"{done.count} rows of the outbox were delivered; those for {', '.join(done.refusals)} wait."
            )
            raise refusal
        return done.count

    async def adeliver(self) -> int:
        """Awaitable form of `deliver`."""
        return await asyncio.to_thread(self.deliver)

    def relay(self) -> Relay:
        """Return a relay, which delivers from a thread while its block lasts (``with`` or ``async with``)."""
        self._connect_function()
        return Relay(self._connection, self._delivery(), self._interval, self._relays)

    # -- care ---------------------------------------------------------------------------------------------------------

    def stats(self) -> OutboxBacklog:
        """Count the committed rows that are not delivered."""
        with self._connection() as db, explain_missing_table(self._table):
            [(waiting, oldest)] = db.run(self._table.fill(COUNT), self.app.namespace).rows
            [(aside,)] = db.run(self._table.fill(COUNT_ASIDE), self.app.namespace).rows
        return OutboxBacklog(waiting, aside, None if oldest is None else max(0.0, time() - oldest / 1000))

    async def astats(self) -> OutboxBacklog:
        """Awaitable form of `stats`."""
        return await asyncio.to_thread(self.stats)

    def redrive(self) -> int:
        """Try the rows again that were set aside, and return how many."""
        with self._connection() as db, explain_missing_table(self._table):
            count = db.run(self._table.fill(REDRIVE), self.app.namespace).row_count
            db.commit()
        self._wake_relays(True)
        return count

    async def aredrive(self) -> int:
        """Awaitable form of `redrive`."""
        return await asyncio.to_thread(self.redrive)

    def _delivery(self) -> OutboxDelivery:
        return OutboxDelivery(core_of(self.app), self._table)

    def _connect_function(self) -> Callable[[], Any]:
        if self._connect is None:
            raise ConfigurationError(
                "This Outbox has no function that opens a connection, so it can only enqueue. Write: Outbox(app, connect), "
                "with a function that returns a new blocking connection."
            )
        return self._connect

    @contextmanager
    def _connection(self) -> Iterator[DbConnection]:
        connection = connection_of_our_own(self._connect_function())
        try:
            db = adapt_blocking(connection)
            db.begin()
            refuse_autocommit(db.in_autocommit())
            try:
                yield db
            finally:
                with suppress(Exception):  # the connection itself may be broken
                    db.rollback()
        finally:
            with suppress(Exception):
                connection.close()
