"""
Adapters of the program's database connections, and the statements as each driver wants them. No driver is imported.

A connection is recognised by its methods: any DB-API 2.0 connection, one of Django, a Session or Connection of
SQLAlchemy; on asyncio the connections of psycopg and aiosqlite, and SQLAlchemy's AsyncSession and AsyncConnection.
Statements are written with question marks, which become the placeholders of the driver.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

from conveyor.errors import ConfigurationError, ConveyorError

T = TypeVar("T")
_MARKS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":{}", "numeric_dollar": "${}", "named": ":p{}"}
MOST_ROWS, MOST_BYTES = 100, 1_000_000
"""Rows and bytes of one INSERT: old SQLite takes at most 999 parameters, MySQL has a limit in bytes."""

_DIALECTS = {
    "sqlite3": "sqlite", "aiosqlite": "sqlite", "pysqlite3": "sqlite", "psycopg": "postgresql", "psycopg2": "postgresql",
    "pg8000": "postgresql", "asyncpg": "postgresql", "pymysql": "mysql", "MySQLdb": "mysql", "mysql": "mysql",
    "mariadb": "mysql", "aiomysql": "mysql", "asyncmy": "mysql",
}  # fmt: skip
_IN_TRANSACTION = 1
"""The bit in the status of a MySQL server for an open transaction."""


@lru_cache(256)
def with_placeholders(sql: str, style: str) -> str:
    """Return *sql* with the driver's placeholders instead of question marks."""
    numbers = count(1)
    return re.sub(r"\?", lambda _: _MARKS[style].format(next(numbers)), sql)


def parameters_for(values: Sequence[object], style: str) -> tuple[object, ...] | Mapping[str, object]:
    """Return the values in the form that the driver takes."""
    if style == "named":
        return {f"p{number}": value for number, value in enumerate(values, 1)}
    return tuple(values)


def is_known_style(style: str) -> bool:
    """Tell whether a ``paramstyle`` is known here."""
    return style in _MARKS


def insert_statements(head: str, rows: Sequence[tuple[object, ...]]) -> Iterator[tuple[str, list[object]]]:
    """Yield statements and values that insert *rows*, in order; the size of the last column limits a statement."""
    values: list[object] = []
    taken = size = 0
    for row in rows:
        length = len(row[-1]) if isinstance(row[-1], bytes) else 0
        if taken and (taken == MOST_ROWS or size + length > MOST_BYTES):
            yield _insert_statement(head, taken, len(row)), values
            values, taken, size = [], 0, 0
        values += row
        taken, size = taken + 1, size + length
    if taken:
        yield _insert_statement(head, taken, len(rows[0])), values


def _insert_statement(head: str, rows: int, columns: int) -> str:
    marks = "(" + ", ".join("?" * columns) + ")"
    return f"{head} VALUES {', '.join([marks] * rows)}"


class StatementResult(NamedTuple):
    """The result of a statement: its rows, and how many it changed (-1 where the driver does not say)."""

    rows: list[tuple[Any, ...]]
    row_count: int


class DbConnection(Protocol):
    """A blocking connection."""

    @property
    def dialect(self) -> str:
        """One of `tables.DIALECTS`, or the name of an unknown driver."""
        ...

    def run(self, sql: str, *values: object) -> StatementResult:
        """Execute one statement, in the open transaction or a new one."""
        ...

    def commit(self) -> None: ...
    def rollback(self) -> None: ...

    def in_autocommit(self) -> bool:
        """Tell whether each statement is a transaction of its own; False where that is not known."""
        ...

    def begin(self) -> None:
        """Prepare a connection that the relay has opened: its statements must be in transactions."""
        ...


class DbapiConnection:
    """A blocking DB-API connection."""

    def __init__(self, connection: Any, style: str, dialect: str) -> None:
        self._connection, self._style, self.dialect = connection, style, dialect

    def run(self, sql: str, *values: object) -> StatementResult:
        """Execute one statement."""
        cursor = self._connection.cursor()
        try:
            cursor.execute(with_placeholders(sql, self._style), parameters_for(values, self._style))
            rows = cursor.fetchall() if cursor.description else ()
            return StatementResult(_as_tuples(rows), cursor.rowcount)
        finally:
            cursor.close()

    def commit(self) -> None:
        """Commit the transaction."""
        self._connection.commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._connection.rollback()

    def in_autocommit(self) -> bool:
        """Tell whether the connection is in autocommit, without a transaction that was begun by hand."""
        return _in_autocommit(self._connection, self.dialect)

    def begin(self) -> None:
        """Do nothing: a transaction begins by itself."""


class DjangoConnection(DbapiConnection):
    """A connection of Django, whose cursors take ``%s`` for every database."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, "format", connection.vendor)

    def in_autocommit(self) -> bool:
        """Tell whether no atomic block is open."""
        return bool(self._connection.get_autocommit() and not self._connection.in_atomic_block)

    def begin(self) -> None:
        """Turn autocommit off: transactions begin by themselves, as with other drivers."""
        self._connection.set_autocommit(False)


class SqlAlchemyConnection:
    """A Session or Connection of SQLAlchemy."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self.dialect: str = self._connection.dialect.name.replace("mariadb", "mysql")
        self._style: str = self._connection.dialect.paramstyle

    @property
    def _connection(self) -> Any:
        # Read each time: after a commit a session has another connection.
        return self._owner if hasattr(self._owner, "exec_driver_sql") else self._owner.connection()

    def run(self, sql: str, *values: object) -> StatementResult:
        """Execute one statement."""
        result = self._connection.exec_driver_sql(
            with_placeholders(sql, self._style), parameters_for(values, self._style)
        )
        rows = result.fetchall() if result.returns_rows else ()
        return StatementResult(_as_tuples(rows), result.rowcount)

    def commit(self) -> None:
        """Commit the transaction."""
        self._owner.commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._owner.rollback()

    def in_autocommit(self) -> bool:
        """Tell whether the isolation level is AUTOCOMMIT."""
        if self._connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return True
        return _in_autocommit(self._connection.connection.dbapi_connection, self.dialect)

    def begin(self) -> None:
        """Do nothing: a transaction begins by itself."""


class AsyncDbapiConnection:
    """An asyncio connection with the methods of DB-API."""

    def __init__(self, connection: Any, style: str, dialect: str) -> None:
        self._connection, self._style, self.dialect = connection, style, dialect

    async def run(self, sql: str, *values: object) -> StatementResult:
        """Execute one statement."""
        cursor = await _awaited(self._connection.cursor())
        try:
            await _awaited(cursor.execute(with_placeholders(sql, self._style), parameters_for(values, self._style)))
            rows = await _awaited(cursor.fetchall()) if cursor.description else ()
            return StatementResult(_as_tuples(rows), cursor.rowcount)
        finally:
            await _awaited(cursor.close())

    async def commit(self) -> None:
        """Commit the transaction."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        await self._connection.rollback()

    async def in_autocommit(self) -> bool:
        """Tell whether the connection is in autocommit, without a transaction that was begun by hand."""
        return _in_autocommit(self._connection, self.dialect)


class AsyncSqlAlchemyConnection:
    """An AsyncSession or AsyncConnection of SQLAlchemy."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    @property
    def dialect(self) -> str:
        """One of `tables.DIALECTS`, or the name of an unknown driver."""
        inner = getattr(self._owner, "sync_connection", None) or self._owner.get_bind()
        return str(inner.dialect.name).replace("mariadb", "mysql")

    async def run(self, sql: str, *values: object) -> StatementResult:
        """Execute one statement."""
        return await self._within(lambda inner: SqlAlchemyConnection(inner).run(sql, *values))

    async def commit(self) -> None:
        """Commit the transaction."""
        await self._owner.commit()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        await self._owner.rollback()

    async def in_autocommit(self) -> bool:
        """Tell whether the isolation level is AUTOCOMMIT."""
        return await self._within(lambda inner: SqlAlchemyConnection(inner).in_autocommit())

    async def _within(self, work: Callable[[Any], T]) -> T:
        value: T = await self._owner.run_sync(work)
        return value


AsyncDbConnection = AsyncDbapiConnection | AsyncSqlAlchemyConnection


def is_django(connection: Any) -> bool:
    """Tell whether *connection* is one of Django."""
    return hasattr(connection, "in_atomic_block") and hasattr(connection, "vendor")


def adapt(connection: Any) -> DbConnection | AsyncDbConnection:
    """Return the adapter of *connection*. Raises ConfigurationError (E47) for an unknown kind of object."""
    if hasattr(connection, "run_sync"):
        return AsyncSqlAlchemyConnection(connection)
    if hasattr(connection, "exec_driver_sql") or (
        hasattr(connection, "get_bind") and hasattr(connection, "connection")
    ):
        return SqlAlchemyConnection(connection)
    if is_django(connection):
        return DjangoConnection(connection)
    if not all(callable(getattr(connection, name, None)) for name in ("cursor", "commit", "rollback")):
        raise ConfigurationError(
            f"{connection!r} is not a known kind of database connection: a DB-API connection (it has cursor, commit "
            "and rollback), one of Django, or a Session or Connection of SQLAlchemy. Nothing was stored.",
            code="E47",
        )
    # A connection of a pool wraps that of the driver.
    own = getattr(connection, "dbapi_connection", None) or connection
    style, dialect = _style_and_dialect(type(own))
    kind = AsyncDbapiConnection if inspect.iscoroutinefunction(connection.commit) else DbapiConnection
    return kind(connection, style, dialect)


def adapt_blocking(connection: Any) -> DbConnection:
    """Return the adapter of a blocking *connection*. Raises ConfigurationError (E47) for an asyncio one too."""
    db = adapt(connection)
    if isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
        raise ConfigurationError(
            f"{connection!r} is an asyncio connection, and this call needs a blocking one. In a block write `async with`; "
            "for a relay give a function that opens a blocking connection. Nothing was stored.",
            code="E47",
        )
    return db


def adapt_async(connection: Any) -> AsyncDbConnection:
    """Return the adapter of an asyncio *connection*. Raises ConfigurationError (E47) for a blocking one."""
    db = adapt(connection)
    if isinstance(db, AsyncDbapiConnection | AsyncSqlAlchemyConnection):
        return db
    raise ConfigurationError(
        f"{connection!r} is a blocking connection, and this call needs an asyncio one. Nothing was stored. Call the "
        "method without the a before its name.",
        code="E47",
    )


def connection_of_our_own(connect: Callable[[], Any]) -> Any:
    """
    Return the connection that *connect* opens, which the caller closes.

    Django's `connection` belongs to its thread, so it gets another one to the same database. Raises ConfigurationError
    (E47), and leaves the connection alone, when a transaction is open on it: it is one that the program uses.
    """
    connection = connect()
    if is_django(connection):
        return connection.copy()
    if _has_open_transaction(connection):
        raise ConfigurationError(
            f"The function that opens a connection returned {connection!r}, on which a transaction is open. It was left "
            "alone, since its transaction would end. Return a new connection each time: Outbox(app, connect).",
            code="E47",
        )
    return connection


def refuse_autocommit(autocommit: bool) -> None:
    """Raise ConfigurationError (E47) for a connection in autocommit, on which nothing would be atomic."""
    if autocommit:
        raise ConfigurationError(
            "The connection commits each statement by itself (autocommit), and no transaction is open on it: jobs and "
            "data would not be stored together. Nothing was stored. Begin a transaction first, or turn autocommit off.",
            code="E47",
        )


def is_missing_table(error: BaseException, table: str) -> bool:
    """Tell whether an *error* of a driver means that *table* does not exist."""
    if isinstance(error, ConveyorError):
        return False
    own = getattr(error, "orig", error)  # SQLAlchemy wraps it
    code = getattr(own, "sqlstate", None) or getattr(own, "pgcode", None)
    text = str(own)
    return code == "42P01" or (table.rpartition(".")[2] in text and ("no such table" in text or "exist" in text))


def _style_and_dialect(kind: type) -> tuple[str, str]:
    """Return the paramstyle and dialect of a connection's class, from its module or that of a base class."""
    for base in kind.__mro__:
        name = base.__module__
        while name:
            style = getattr(sys.modules.get(name), "paramstyle", None)
            if isinstance(style, str) and is_known_style(style):
                root = base.__module__.partition(".")[0]
                return style, _DIALECTS.get(root, root)
            name = name.rpartition(".")[0]
    raise ConfigurationError(
        f"{kind.__module__}.{kind.__qualname__} comes from no module with a `paramstyle`, as drivers of DB-API have it, so "
        "no statement can be written for it. Nothing was stored. Give the driver's own connection.",
        code="E47",
    )


def _has_open_transaction(connection: Any) -> bool:
    """Tell whether a transaction is open; False where the driver does not say."""
    status = getattr(getattr(connection, "info", None), "transaction_status", 0)  # psycopg, psycopg2
    server = getattr(connection, "server_status", 0)  # pymysql
    inside = getattr(connection, "in_transaction", False)
    if callable(inside):  # SQLAlchemy
        inside = inside()
    return inside is True or bool(status) or (isinstance(server, int) and bool(server & _IN_TRANSACTION))


def _in_autocommit(connection: Any, dialect: str) -> bool:
    if _has_open_transaction(connection):
        return False
    alone = getattr(connection, "autocommit", None)
    if dialect == "sqlite" and alone not in {True, False}:  # before Python 3.12, and the default after
        return getattr(connection, "isolation_level", "") is None
    if callable(alone):
        alone = connection.get_autocommit() if hasattr(connection, "get_autocommit") else None
    return isinstance(alone, int) and bool(alone)


def _as_tuples(rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) if isinstance(row, Mapping) else tuple(row) for row in rows]


async def _awaited(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value
