"""The ledger: which effects have happened, written down in the transaction that makes them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from time import time
from typing import Any, ParamSpec, TypeVar, get_type_hints

from conveyor.errors import ConfigurationError
from conveyor.payload.codec import ValueCodec
from conveyor.sql.drivers import (
    AsyncDbapiConnection,
    AsyncDbConnection,
    AsyncSqlAlchemyConnection,
    DbConnection,
    StatementResult,
    adapt,
    adapt_async,
    adapt_blocking,
    refuse_autocommit,
)
from conveyor.sql.tables import LEDGER, ManagedTable, TableSql
from conveyor.sql.transaction import explain_missing_table
from conveyor.units import Duration, milliseconds

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Steps = Generator[tuple[str, tuple[object, ...]], StatementResult, T]
"""Statements with their values, each answered, and what comes of them: the same for both kinds of connection."""

INSERT = "INSERT INTO {table} (id, created_ms) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
INSERT_MYSQL = "INSERT IGNORE INTO {table} (id, created_ms) VALUES (?, ?)"
KEEP = "UPDATE {table} SET result = ? WHERE id = ?"
READ = "SELECT result FROM {table} WHERE id = ?"
READ_MYSQL = READ + " FOR UPDATE"  # a plain read there may be of an older snapshot
TRIM = "DELETE FROM {table} WHERE created_ms < ?"
MOST = 255


class Ledger(ManagedTable):
    """
    Tells, inside a transaction, whether something happens for the first time; what it told is part of the transaction.

    A job may run twice, also at the same time. Its effects in that database then happen once: the second attempt waits
    for the first to commit or roll back, and is told.
    """

    def __init__(self, table: str = "conveyor_ledger") -> None:
        """Take the name of the table, perhaps with a schema. Nothing is opened; raises ConfigurationError."""
        super().__init__(TableSql(table, LEDGER, "ledger"))

    def __repr__(self) -> str:
        return f"<Ledger {self._table}>"

    def first(self, connection: Any, key: str) -> bool:
        """
        Write *key* down and return True; False when a committed transaction has done so before.

        `key` is 1 to 255 characters: the job's id, with the name of the effect where a job has several. Call it before
        the effect, in its transaction. Raises ConfigurationError: E47 for a connection in autocommit, E48 without the
        table; and what the driver raises.
        """
        return self._run(connection, partial(self._insert_key, _check_key(key)))

    async def afirst(self, connection: Any, key: str) -> bool:
        """Write *key* down and return whether it is new, as `first`, on a connection of asyncio."""
        return await self._arun(connection, partial(self._insert_key, _check_key(key)))

    def once(
        self, connection: Any, key: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:  # fmt: skip
        """
        Call *function* if *key* is new, keep what it returns with the key, and return that; else return what was kept.

        The result must be JSON, of the type that the function is annotated with. When the function raises, the
        exception passes: roll back, and nothing has happened. Raises what `first` does, and PayloadError.
        """
        codec = _result_codec(function)
        if self.first(connection, key):
            result = function(*args, **kwargs)
            self._run(connection, partial(self._store_result, key, codec.encode(result)))
            return result
        kept: R = codec.decode(self._run(connection, partial(self._read_result, key)))
        return kept

    async def aonce(
        self, connection: Any, key: str, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:  # fmt: skip
        """Call an async *function* if *key* is new, as `once`, on a connection of asyncio."""
        codec = _result_codec(function)
        if await self.afirst(connection, key):
            result = await function(*args, **kwargs)
            await self._arun(connection, partial(self._store_result, key, codec.encode(result)))
            return result
        kept: R = codec.decode(await self._arun(connection, partial(self._read_result, key)))
        return kept

    # -- care ---------------------------------------------------------------------------------------------------------

    def trim(self, connection: Any, older_than: Duration = "30d") -> int:
        """
        Delete what was written down longer ago, commit, and return how many.

        A job that runs again after that finds its key new: take longer than jobs are retried, redriven or kept.
        """
        db, before = adapt_blocking(connection), _cutoff_ms(older_than)
        with explain_missing_table(self._table):
            count = db.run(self._table.fill(TRIM), before).row_count
        db.commit()
        return count

    async def atrim(self, connection: Any, older_than: Duration = "30d") -> int:
        """Delete what was written down longer ago, as `trim`, on a connection of asyncio."""
        db, before = adapt_async(connection), _cutoff_ms(older_than)
        with explain_missing_table(self._table):
            count = (await db.run(self._table.fill(TRIM), before)).row_count
        await db.commit()
        return count

    # -- steps --------------------------------------------------------------------------------------------------------

    def _insert_key(self, key: str, dialect: str) -> Steps[bool]:
        sql = INSERT_MYSQL if dialect == "mysql" else INSERT
        result = yield self._table.fill(sql), (key, int(time() * 1000))
        return result.row_count == 1

    def _store_result(self, key: str, result: bytes, _: str) -> Steps[None]:
        yield self._table.fill(KEEP), (result, key)

    def _read_result(self, key: str, dialect: str) -> Steps[bytes]:
        result = yield self._table.fill(READ_MYSQL if dialect == "mysql" else READ), (key,)
        if not result.rows or result.rows[0][0] is None:
            raise ConfigurationError(
                f"The ledger holds {key!r} without a result: it was stored by first(), or by a once() whose function raised "
                "and whose transaction was committed all the same. Use different keys, and roll back after an "
                "error. Nothing was done."
            )
        return bytes(result.rows[0][0])

    def _run(self, connection: Any, steps: Callable[[str], Steps[T]]) -> T:
        db = adapt_blocking(connection)
        refuse_autocommit(db.in_autocommit())
        with explain_missing_table(self._table):
            return _run_steps(db, steps(db.dialect))

    async def _arun(self, connection: Any, steps: Callable[[str], Steps[T]]) -> T:
        db = adapt(connection)
        with explain_missing_table(self._table):
            if not isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
                refuse_autocommit(db.in_autocommit())
                return _run_steps(db, steps(db.dialect))
            refuse_autocommit(await db.in_autocommit())
            return await _arun_steps(db, steps(db.dialect))


def _run_steps(db: DbConnection, steps: Steps[T]) -> T:
    try:
        sql, values = next(steps)
        while True:
            sql, values = steps.send(db.run(sql, *values))
    except StopIteration as stop:
        value: T = stop.value
        return value


async def _arun_steps(db: AsyncDbConnection, steps: Steps[T]) -> T:
    try:
        sql, values = next(steps)
        while True:
            sql, values = steps.send(await db.run(sql, *values))
    except StopIteration as stop:
        value: T = stop.value
        return value


def _cutoff_ms(older_than: Duration) -> int:
    return int(time() * 1000) - milliseconds(older_than, name="older_than")


def _check_key(key: str) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MOST or not key.isprintable():
        raise ConfigurationError(
            f"A key of a ledger must be 1 to {MOST} printable characters, not {key!r}. Nothing was done."
        )
    return key


def _result_codec(function: Callable[..., Any]) -> ValueCodec[Any]:
    hints = get_type_hints(function) if inspect.isroutine(function) else {}
    return ValueCodec(
        hints.get("return", Any), what=f"The result of {getattr(function, '__name__', function)}()",
        lossy="return" not in hints,
    )  # fmt: skip
