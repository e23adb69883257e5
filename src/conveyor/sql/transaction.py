"""A block in which pushes become rows: they are part of the program's transaction, and leave with its commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import time
from typing import TYPE_CHECKING, Any, Self

from conveyor.errors import ConfigurationError
from conveyor.jobs import spawn_outbox
from conveyor.sql.drivers import (
    AsyncDbapiConnection,
    AsyncLink,
    AsyncSqlAlchemyConnection,
    DbConnection,
    blocking,
    insertions,
    is_missing,
    link,
    refuse_alone,
)
from conveyor.sql.tables import TableSql
from conveyor.store.client.client import refuse_in_loop
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
    A block of `Outbox.transaction` or `Outbox.within`, and the way its pushes take.

    It holds for what this block calls, and for the tasks and threads begun in it that take the context along, until it
    ends: from then on they push to Redis.
    """

    deferred = True

    def __init__(
        self, client: Client, table: TableSql, connection: Any, ended: Callable[[bool], None], *, commits: bool
    ) -> None:
        """Take whose pushes, and whose transaction; *ended* is called at the end, with True when that was the commit."""
        self._client, self._table, self._connection = client, table, connection
        self._ended, self._commits = ended, commits
        self._link: DbConnection | AsyncLink | None = None
        self.outer: OutboxTransaction | None = None
        self._used = False
        self._turn = asyncio.Lock()

    def stands_for(self, client: Client) -> bool:
        """Tell whether pushes of that app go here: the block has not ended."""
        return self._link is not None and self._client is client

    # -- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        found = blocking(self._connection)
        refuse_alone(found.commits_alone())
        return self._begin(found)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        found = self._end()
        assert not isinstance(found, AsyncDbapiConnection | AsyncSqlAlchemyConnection)
        self._conclude(found, failed=kind is not None)

    async def __aenter__(self) -> Self:
        found = link(self._connection)
        alone = found.commits_alone()
        refuse_alone(alone if isinstance(alone, bool) else await alone)
        return self._begin(found)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        found = self._end()
        if isinstance(found, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
            await self._aconclude(found, failed=kind is not None)
        else:
            self._conclude(found, failed=kind is not None)

    def _begin(self, found: DbConnection | AsyncLink) -> Self:
        if self._used:
            raise ConfigurationError("A block of an outbox is used once. Call transaction() or within() again.")
        self._used, self._link, self.outer = True, found, _OPEN.get()
        _OPEN.set(self)
        return self

    def _end(self) -> DbConnection | AsyncLink:
        assert self._link is not None
        found, self._link = self._link, None
        if _OPEN.get() is self:  # a generator that a framework closes elsewhere has left another context behind
            _OPEN.set(self.outer)
        return found

    def _conclude(self, found: DbConnection, *, failed: bool) -> None:
        if self._commits and failed:
            found.rollback()
        elif self._commits:
            try:
                found.commit()
            except BaseException:
                found.rollback()
                raise
        if not failed:
            self._ended(self._commits)

    async def _aconclude(self, found: AsyncLink, *, failed: bool) -> None:
        if self._commits and failed:
            await found.rollback()
        elif self._commits:
            try:
                await found.commit()
            except BaseException:
                await found.rollback()
                raise
        if not failed:
            self._ended(self._commits)

    # -- the way ------------------------------------------------------------------------------------------------------

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Insert *entries*, and return their ids. How much the queue takes is seen when they are delivered."""
        refuse_in_loop()
        found = self._link
        if isinstance(found, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
            raise ConfigurationError(
                "This block is on a connection of asyncio, and a blocking push was made in it. Nothing was stored. Write "
                "the awaitable twin: await task.aenqueue(...), await queue.apush(...).",
                code="E46",
            )
        assert found is not None
        with explained(self._table):
            for sql, values in self._rows(keys, entries):
                found.run(sql, *values)
        return [entry.id for entry in entries]

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Insert plain messages (id, envelope, id, envelope, …)."""
        self.push(keys, plain_entries(pairs))

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Do the same on asyncio. On a blocking connection it blocks, as every statement on it does."""
        found = self._link
        assert found is not None
        async with self._turn:  # some sessions take one statement at a time
            with explained(self._table):
                for sql, values in self._rows(keys, entries):
                    answer = found.run(sql, *values)
                    if not isinstance(answer, tuple):
                        await answer
        return [entry.id for entry in entries]

    def _rows(self, keys: QueueKeys, entries: Sequence[Entry]) -> list[tuple[str, list[object]]]:
        now = int(time() * 1000)
        place = (self._client.namespace, keys.queue, now)
        return list(
            insertions(self._table.fill(INSERT), [(*place, spawn_outbox.write(keys.queue, one)) for one in entries])
        )


@contextmanager
def explained(table: TableSql) -> Iterator[None]:
    """Say what to do about a table that is missing (E48) instead of what the driver says; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_missing(error, table.name):
            raise
        raise ConfigurationError(
            f"The table {table} does not exist in this database. Nothing was stored. Create it once, with "
            f"{table.kind}.create(connection), or by a migration with the SQL of {table.kind}.ddl('postgresql').",
            code="E48",
        ) from error


def find(client: Client, durability_request: DurabilityRequest | None = None) -> OutboxTransaction | None:
    """Return the innermost open block that pushes of an app go to; raises ConfigurationError (E46) for one that asks more."""
    found = _OPEN.get()
    while found is not None and not found.stands_for(client):
        found = found.outer
    if found is not None and durability_request is not None and durability_request.applied_to(None) is not None:
        raise ConfigurationError(
            "This push asks for fsync or wait_replicas, and inside a database transaction nothing is sent yet that could "
            "be confirmed. Nothing was stored. Declare it for the queue instead: app.queue(…, wait_replicas=1); then its "
            "row is kept until the push is confirmed.",
            code="E46",
        )
    return found
