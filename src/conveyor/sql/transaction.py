"""Blocks in which pushes become rows: they are part of the program's transaction, and are delivered after its commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from time import time
from typing import TYPE_CHECKING, Any, Self

from conveyor.errors import ConfigurationError
from conveyor.messaging import outbox
from conveyor.sql.drivers import (
    AsyncDbapiConnection,
    AsyncDbConnection,
    AsyncSqlAlchemyConnection,
    DbConnection,
    adapt,
    adapt_blocking,
    insert_statements,
    is_missing_table,
    refuse_autocommit,
)
from conveyor.sql.tables import TableSql
from conveyor.store.operations import plain_entries

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.store.client.client import Client
    from conveyor.store.client.durability import DurabilityRequest
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Entry
    from conveyor.store.script import Argument

INSERT = "INSERT INTO {table} (namespace, queue, created_ms, entry)"
_OPEN: ContextVar[OutboxTransaction | None] = ContextVar("conveyor_transaction", default=None)


class OutboxTransaction:
    """
    A block of `Outbox.transaction` or `Outbox.within`, and the target of the pushes in it.

    It is in effect for all calls in the block, and for tasks and threads that were started in it with its context.
    After its end they push to Redis.
    """

    deferred = True

    def __init__(
        self, client: Client, table: TableSql, connection: Any, on_end: Callable[[bool], None], *, commits: bool
    ) -> None:
        """Make a block. *on_end* is called after it, with True when the block itself committed."""
        self._client, self._table, self._connection = client, table, connection
        self._on_end, self._commits = on_end, commits
        self._db: DbConnection | AsyncDbConnection | None = None
        self.enclosing: OutboxTransaction | None = None
        self._used = False
        self._statement_lock = asyncio.Lock()

    def takes_pushes_of(self, client: Client) -> bool:
        """Tell whether the block is open and takes the pushes of that app."""
        return self._db is not None and self._client is client

    # -- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        db = adapt_blocking(self._connection)
        refuse_autocommit(db.in_autocommit())
        return self._begin(db)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        db = self._end()
        assert not isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection)
        self._finish(db, failed=kind is not None)

    async def __aenter__(self) -> Self:
        db = adapt(self._connection)
        autocommit = db.in_autocommit()
        refuse_autocommit(autocommit if isinstance(autocommit, bool) else await autocommit)
        return self._begin(db)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        db = self._end()
        if isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
            await self._afinish(db, failed=kind is not None)
        else:
            self._finish(db, failed=kind is not None)

    def _begin(self, db: DbConnection | AsyncDbConnection) -> Self:
        if self._used:
            raise ConfigurationError("A block of an outbox can be used once. Call transaction() or within() again.")
        self._used, self._db, self.enclosing = True, db, _OPEN.get()
        _OPEN.set(self)
        return self

    def _end(self) -> DbConnection | AsyncDbConnection:
        assert self._db is not None
        db, self._db = self._db, None
        if _OPEN.get() is self:  # a framework that closes a generator in another context leaves another block there
            _OPEN.set(self.enclosing)
        return db

    def _finish(self, db: DbConnection, *, failed: bool) -> None:
        if self._commits and failed:
            with suppress(Exception):  # a connection that is lost has rolled back, and the error of the block counts
                db.rollback()
        elif self._commits:
            try:
                db.commit()
            except BaseException:
                with suppress(Exception):
                    db.rollback()
                raise
        if not failed:
            self._on_end(self._commits)

    async def _afinish(self, db: AsyncDbConnection, *, failed: bool) -> None:
        if self._commits and failed:
            with suppress(Exception):
                await db.rollback()
        elif self._commits:
            try:
                await db.commit()
            except BaseException:
                with suppress(Exception):
                    await db.rollback()
                raise
        if not failed:
            self._on_end(self._commits)

    # -- pushing ------------------------------------------------------------------------------------------------------

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Insert *entries*, and return their ids. A full queue refuses them later, when they are delivered."""
        self._client.refuse_in_loop()
        db = self._db
        if isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
            raise ConfigurationError(
                "This block is on an asyncio connection, and a blocking push was made in it. Nothing was stored. Write "
                "the awaitable twin: await task.aenqueue(...), await queue.apush(...).",
                code="E46",
            )
        assert db is not None
        with explain_missing_table(self._table):
            for sql, values in self._rows(keys, entries):
                db.run(sql, *values)
        return [entry.id for entry in entries]

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Insert plain jobs or messages (id, envelope, id, envelope, …)."""
        self.push(keys, plain_entries(pairs))

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Awaitable form of `push`. On a blocking connection it blocks, as every statement on it does."""
        db = self._db
        assert db is not None
        async with self._statement_lock:  # some sessions execute one statement at a time
            with explain_missing_table(self._table):
                for sql, values in self._rows(keys, entries):
                    result = db.run(sql, *values)
                    if not isinstance(result, tuple):
                        await result
        return [entry.id for entry in entries]

    def _rows(self, keys: QueueKeys, entries: Sequence[Entry]) -> list[tuple[str, list[object]]]:
        now = int(time() * 1000)
        shared = (self._client.namespace, keys.queue, now)
        return list(
            insert_statements(self._table.fill(INSERT), [(*shared, outbox.write(keys.queue, one)) for one in entries])
        )


@contextmanager
def explain_missing_table(table: TableSql) -> Iterator[None]:
    """Replace the driver's error for a missing table with E48, which says what to do; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_missing_table(error, table.name):
            raise
        raise ConfigurationError(
            f"The table {table} does not exist in this database. Nothing was stored. Create it once, with "
            f"{table.kind}.create(connection), or by a migration with the SQL of {table.kind}.ddl('postgresql').",
            code="E48",
        ) from error


def open_transaction(client: Client, durability_request: DurabilityRequest | None = None) -> OutboxTransaction | None:
    """Return the innermost open block for pushes of an app; ConfigurationError (E46) for one that asks for durability."""
    transaction = _OPEN.get()
    while transaction is not None and not transaction.takes_pushes_of(client):
        transaction = transaction.enclosing
    if transaction is not None and durability_request is not None and durability_request.applied_to(None) is not None:
        raise ConfigurationError(
            "This push asks for fsync or wait_replicas, and inside a database transaction nothing is sent yet that could "
            "be confirmed. Nothing was stored. Declare it for the queue instead: app.queue(…, wait_replicas=1); then its "
            "row is kept until the push is confirmed.",
            code="E46",
        )
    return transaction
