"""The ledger: a table of the effects that have happened, written in the transaction of each effect."""

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
    AsyncSqlAlchemyConnection,
    StatementResult,
    adapt,
    adapt_async,
    adapt_blocking,
    refuse_autocommit,
)
from conveyor.sql.tables import LEDGER, ManagedTable, TableSql
from conveyor.sql.transaction import explain_missing_table
from conveyor.store.script import adrive, drive
from conveyor.units import Duration, milliseconds

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Statements = Generator[tuple[str, tuple[object, ...]], StatementResult, T]
"""Yields statements with values, gets their results, returns a value: the same for both kinds of connection."""

INSERT = "INSERT INTO {table} (id, created_ms) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
INSERT_MYSQL = "INSERT IGNORE INTO {table} (id, created_ms) VALUES (?, ?)"
KEEP = "UPDATE {table} SET result = ? WHERE id = ?"
READ = "SELECT result FROM {table} WHERE id = ?"
READ_MYSQL = READ + " FOR UPDATE"  # a plain read in MySQL may see an older snapshot
TRIM = "DELETE FROM {table} WHERE created_ms < ?"
MOST = 255


class Ledger(ManagedTable):
    """
    Makes effects in a database happen once, by keys that are part of the same transactions.

    A job may run twice, also at the same time. Its effects in that database happen once: the second attempt waits for
    the first to commit or roll back, and then learns whether the key is new.
    """

    def __init__(self, table: str = "conveyor_ledger") -> None:
        """Make a ledger on *table*, a name with or without a schema. Nothing is opened; raises ConfigurationError."""
        super().__init__(TableSql(table, LEDGER, "ledger"))

    def __repr__(self) -> str:
        return f"<Ledger {self._table}>"

    def first(self, connection: Any, key: str) -> bool:
        """
        Store *key* and return True; return False when a committed transaction has stored it before.

        `key` is 1 to 255 characters: the id of the job, with the name of the effect where a job has several. Call this
        before the effect, in its transaction. Raises ConfigurationError (E47 for a connection in autocommit, E48
        without the table) and the errors of the driver.
        """
        return self._run(connection, partial(self._insert_key, _check_key(key)))

    async def afirst(self, connection: Any, key: str) -> bool:
        """Awaitable form of `first`."""
        return await self._arun(connection, partial(self._insert_key, _check_key(key)))

    def once(
        self, connection: Any, key: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:  # fmt: skip
        """
        Call *function* if *key* is new and store its result with the key; return the stored result.

        The result must be JSON, of the annotated type. An exception of the function is raised: roll back, and nothing
        has happened. Raises what `first` raises, and PayloadError.
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
        """Awaitable form of `once`."""
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
        Delete the keys that are older, commit, and return how many.

        A job that runs again after that finds its key new, so choose a time longer than jobs are retried, redriven or
        kept.
        """
        db, before = adapt_blocking(connection), _cutoff_ms(older_than)
        with explain_missing_table(self._table):
            count = db.run(self._table.fill(TRIM), before).row_count
        db.commit()
        return count

    async def atrim(self, connection: Any, older_than: Duration = "30d") -> int:
        """Awaitable form of `trim`."""
        db, before = adapt_async(connection), _cutoff_ms(older_than)
        with explain_missing_table(self._table):
            count = (await db.run(self._table.fill(TRIM), before)).row_count
        await db.commit()
        return count

    # -- steps --------------------------------------------------------------------------------------------------------

    def _insert_key(self, key: str, dialect: str) -> Statements[bool]:
        sql = INSERT_MYSQL if dialect == "mysql" else INSERT
        result = yield self._table.fill(sql), (key, int(time() * 1000))
        return result.row_count == 1

    def _store_result(self, key: str, result: bytes, _: str) -> Statements[None]:
        yield self._table.fill(KEEP), (result, key)

    def _read_result(self, key: str, dialect: str) -> Statements[bytes]:
        result = yield self._table.fill(READ_MYSQL if dialect == "mysql" else READ), (key,)
        if not result.rows or result.rows[0][0] is None:
            raise ConfigurationError(
                f"The ledger holds {key!r} without a result: it was stored by first(), or by a once() whose function raised "
                "and whose transaction was committed all the same. Use different keys, and roll back after an "
                "error. Nothing was done."
            )
        return bytes(result.rows[0][0])

    def _run(self, connection: Any, steps: Callable[[str], Statements[T]]) -> T:
        db = adapt_blocking(connection)
        refuse_autocommit(db.in_autocommit())
        with explain_missing_table(self._table):
            return drive(steps(db.dialect), lambda step: db.run(step[0], *step[1]))

    async def _arun(self, connection: Any, steps: Callable[[str], Statements[T]]) -> T:
        db = adapt(connection)
        with explain_missing_table(self._table):
            if not isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
                refuse_autocommit(db.in_autocommit())
                return drive(steps(db.dialect), lambda step: db.run(step[0], *step[1]))
            refuse_autocommit(await db.in_autocommit())
            return await adrive(steps(db.dialect), lambda step: db.run(step[0], *step[1]))


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
