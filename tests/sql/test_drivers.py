"""Connections of all kinds, and those that are refused."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.sql import Ledger, Outbox
from conveyor.sql.drivers import _style_and_dialect, adapt_blocking, parameters_for, with_placeholders
from conveyor.sql.tables import DIALECTS
from support.databases import Database, prepare, sqlite
from support.ready_ids import bare, line
from testbed.server_process import Server


def check(outbox: Outbox, database: Database, connection: Any, server: Server, commit: Callable[[], None]) -> None:
    """Use a connection for all that it is for: blocks of both kinds, the ledger, and as a relay's."""
    mail, ledger = outbox.app.queue("mail"), Ledger()
    with pytest.raises(ZeroDivisionError), outbox.transaction(connection):  # noqa: PT012
        mail.push(0)
        raise ZeroDivisionError
    with outbox.transaction(connection):
        ids = [mail.push(1)]
    with outbox.within(connection):
        ids += mail.push_many(range(3))
        assert ledger.once(connection, "k", lambda: [1]) == [1]
    commit()
    assert ledger.once(connection, "k", lambda: [2]) == [1]
    commit()
    assert ledger.trim(connection, "1h") == 0
    assert outbox.deliver() == 4
    assert line(server) == bare(ids)


async def acheck(outbox: Outbox, connection: Any, server: Server) -> None:
    """The same on asyncio."""
    mail, ledger = outbox.app.queue("mail"), Ledger()

    async def result(n: int) -> list[int]:
        return [n]

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with outbox.transaction(connection):
            await mail.apush(0)
            raise ZeroDivisionError
    async with outbox.transaction(connection):
        ids = [await mail.apush(1)]
        ids += await asyncio.gather(*(mail.apush(n) for n in range(5)))
        with pytest.raises(ConfigurationError) as blocked:
            await asyncio.to_thread(mail.push, 2)
        assert blocked.value.code == "E46"
    async with outbox.within(connection):
        ids += await mail.apush_many(range(3))
        assert await ledger.aonce(connection, "k", result, 1) == [1]
    await connection.commit()
    assert await ledger.aonce(connection, "k", result, 2) == [1]
    await connection.commit()
    with pytest.raises(ConfigurationError, match="asyncio"), outbox.within(connection):
        pass
    await outbox.acreate(connection)
    await ledger.acreate(connection)
    assert await ledger.atrim(connection, "1h") == 0
    assert (await outbox.astats()).waiting == 9
    with pytest.raises(ConfigurationError, match="adeliver"):
        outbox.deliver()
    assert await outbox.adeliver() == 9
    assert await outbox.aredrive() == 0
    assert line(server) == bare(ids)
    await outbox.app.aclose()


def test_drivers(app: Conveyor, outbox: Outbox, database: Database, server: Server) -> None:
    """The standard library's sqlite3, and psycopg."""
    with closing(database.connect()) as connection:
        check(outbox, database, connection, server, connection.commit)


def test_rows_of_other_forms(app: Conveyor, database: Database, outbox: Outbox, server: Server) -> None:
    """Connections that give rows as mappings are read like others, by a relay too."""

    def connect() -> Any:
        connection = database.connect()
        if database.dialect == "sqlite":
            connection.row_factory = lambda cursor, row: dict(zip([d[0] for d in cursor.description], row, strict=True))
        elif database.dialect == "mysql":
            from pymysql.cursors import DictCursor

            connection.cursorclass = DictCursor
        else:
            from psycopg.rows import dict_row

            connection.row_factory = dict_row
        return connection

    with closing(connect()) as connection:
        check(Outbox(app, connect), database, connection, server, connection.commit)


def test_psycopg2(app: Conveyor, database: Database, outbox: Outbox, server: Server) -> None:
    """psycopg2, which knows other names for the same."""
    psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    if database.dialect != "postgresql":
        pytest.skip("a driver for PostgreSQL")
    with closing(psycopg2.connect(database.dsn)) as connection:
        check(Outbox(app, lambda: psycopg2.connect(database.dsn)), database, connection, server, connection.commit)
        connection.autocommit = True
        refused(outbox, connection, "E47")


@pytest.mark.parametrize("kind", ["session", "connection", "pool"])
def test_sqlalchemy(kind: str, app: Conveyor, database: Database, outbox: Outbox, server: Server) -> None:
    """A Session, a Connection, and the result of `engine.raw_connection` are accepted; a relay takes `engine.connect`."""
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")
    from sqlalchemy.orm import Session

    scheme = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}[database.dialect]
    engine = sqlalchemy.create_engine(f"{scheme}://", creator=database.connect, poolclass=sqlalchemy.pool.NullPool)
    makers: dict[str, Callable[[], Any]] = {
        "session": lambda: Session(engine), "connection": engine.connect, "pool": engine.raw_connection,
    }  # fmt: skip
    with closing(makers[kind]()) as connection:
        connect = engine.raw_connection if kind == "pool" else engine.connect
        check(Outbox(app, connect), database, connection, server, connection.commit)
    with closing(engine.connect().execution_options(isolation_level="AUTOCOMMIT")) as connection:
        refused(outbox, connection, "E47")
    engine.dispose()


@pytest.mark.parametrize("kind", ["session", "connection"])
async def test_sqlalchemy_on_asyncio(
    kind: str, app: Conveyor, database: Database, outbox: Outbox, server: Server
) -> None:
    """An AsyncSession and an AsyncConnection, with aiosqlite and with psycopg."""
    pytest.importorskip("sqlalchemy.ext.asyncio", reason="SQLAlchemy is not installed")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.pool import NullPool

    if database.dialect == "mysql":
        pytest.skip("no driver on asyncio")
    if database.dialect == "sqlite":
        pytest.importorskip("aiosqlite", reason="aiosqlite is not installed")
        engine = create_async_engine(f"sqlite+aiosqlite:///{database.dsn}", poolclass=NullPool)
    else:
        host, user, name = (part.partition("=")[2] for part in database.dsn.split())
        engine = create_async_engine(f"postgresql+psycopg://{user}@/{name}?host={host}", poolclass=NullPool)
    if kind == "session":
        async with AsyncSession(engine) as session:
            await acheck(outbox, session, server)
    else:
        async with engine.connect() as connection:
            await acheck(outbox, connection, server)
    await engine.dispose()


@asynccontextmanager
async def opened(database: Database) -> AsyncIterator[Any]:
    if database.dialect == "mysql":
        pytest.skip("no driver on asyncio")
    if database.dialect == "sqlite":
        aiosqlite = pytest.importorskip("aiosqlite", reason="aiosqlite is not installed")
        connection = await aiosqlite.connect(database.dsn)
    else:
        import psycopg

        connection = await psycopg.AsyncConnection.connect(database.dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def test_drivers_on_asyncio(app: Conveyor, database: Database, outbox: Outbox, server: Server) -> None:
    """aiosqlite, and psycopg's AsyncConnection."""
    async with opened(database) as connection:
        await acheck(outbox, connection, server)


def django_connection(database: Database, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return Django's connection to *database*, and its module of transactions."""
    if database.dialect == "mysql":
        pytest.skip("it wants a driver of its own")
    django = pytest.importorskip("django", reason="Django is not installed")
    from django.conf import settings
    from django.db import transaction
    from django.db.utils import ConnectionHandler

    engine, name = (
        ("sqlite3", database.dsn) if database.dialect == "sqlite" else ("postgresql", database.dsn.rpartition("=")[2])
    )
    host = "" if database.dialect == "sqlite" else database.dsn.partition(" ")[0].partition("=")[2]
    if not settings.configured:
        settings.configure(USE_TZ=True)
        django.setup()
    connections = ConnectionHandler(
        {"default": {"ENGINE": f"django.db.backends.{engine}", "NAME": name, "HOST": host, "USER": "postgres"}}
    )
    monkeypatch.setattr(transaction, "get_connection", lambda using=None: connections["default"])
    return connections["default"], transaction


def test_django(
    app: Conveyor, database: Database, outbox: Outbox, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`django.db.connection` in an atomic block, also a nested one that is rolled back; outside of one it is refused."""
    connection, transaction = django_connection(database, monkeypatch)
    mail = app.queue("mail")
    refused(outbox, connection, "E47")
    with transaction.atomic(), outbox.within(connection):
        ids = [mail.push(1)]
        with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012
            mail.push(2)
            raise ZeroDivisionError
        ids.append(mail.push(3))
        assert Ledger().first(connection, "k")
    with pytest.raises(ZeroDivisionError), transaction.atomic(), outbox.within(connection):  # noqa: PT012
        mail.push(4)
        raise ZeroDivisionError
    assert Outbox(app, lambda: connection).deliver() == 2
    assert line(server) == bare(ids)
    connection.close()


def refused(outbox: Outbox, connection: Any, code: str) -> None:
    with pytest.raises(ConfigurationError) as found, outbox.within(connection):
        pass
    assert found.value.code == code, found.value


def test_autocommit_is_refused(app: Conveyor, database: Database, outbox: Outbox) -> None:
    """A connection that commits each statement by itself is refused, unless a transaction was begun on it explicitly."""
    mail = app.queue("mail")
    with closing(database.connect()) as connection:
        if database.dialect == "sqlite":
            connection.isolation_level = None
        elif database.dialect == "mysql":
            connection.autocommit(True)
        else:
            connection.autocommit = True
        refused(outbox, connection, "E47")
        with pytest.raises(ConfigurationError, match="autocommit"):
            Ledger().first(connection, "k")
        connection.cursor().execute("BEGIN")
        with outbox.within(connection):
            mail.push(1)
        connection.cursor().execute("ROLLBACK")
    assert outbox.deliver() == 0


def test_a_relay_needs_transactions(app: Conveyor, database: Database) -> None:
    """A relay's own connection is refused in autocommit too."""
    if database.dialect != "sqlite":
        pytest.skip("told alike everywhere")
    with pytest.raises(ConfigurationError, match="autocommit"):
        Outbox(app, lambda: sqlite3.connect(database.dsn, isolation_level=None)).deliver()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has autocommit since Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_autocommit_of_newer_pythons(app: Conveyor, outbox: Outbox, database: Database, autocommit: bool) -> None:
    """sqlite3.connect(autocommit=True) is refused, and autocommit=False taken."""
    if database.dialect != "sqlite":
        pytest.skip("of sqlite3")
    with closing(sqlite3.connect(database.dsn, autocommit=autocommit)) as connection:
        if autocommit:
            refused(outbox, connection, "E47")
        else:
            with outbox.transaction(connection):
                app.queue("mail").push(1)
            assert outbox.deliver() == 1


@pytest.mark.parametrize(
    "thing", [None, "postgresql://host/shop", object(), Path()], ids=["none", "url", "object", "path"]
)
def test_what_is_no_connection(app: Conveyor, thing: Any) -> None:
    """Anything else is refused with the kinds that are understood, before anything is done."""
    refused(Outbox(app), thing, "E47")
    with pytest.raises(ConfigurationError, match="not a known kind of database connection"):
        Ledger().first(thing, "k")


def test_a_driver_that_says_nothing(app: Conveyor) -> None:
    """A driver without `paramstyle` is refused, because the form of its statements would be a guess."""

    class Odd:
        def cursor(self) -> None: ...
        def commit(self) -> None: ...
        def rollback(self) -> None: ...

    with pytest.raises(ConfigurationError, match="paramstyle"):
        adapt_blocking(Odd())


def test_a_missing_table(app: Conveyor, database: Database) -> None:
    """Without its table a push, a delivery and a ledger say how to create it; afterwards the same calls work."""
    outbox, ledger = Outbox(app, database.connect, table="later_outbox"), Ledger("later_ledger")

    def push() -> None:
        with closing(database.connect()) as connection, outbox.transaction(connection):
            app.queue("mail").push(1)

    def write() -> None:
        with closing(database.connect()) as connection:
            ledger.first(connection, "k")

    for work in (push, write, outbox.deliver, outbox.stats):
        with pytest.raises(ConfigurationError, match="create") as missing:
            work()
        assert missing.value.code == "E48"
    with closing(database.connect()) as connection:
        for _ in range(2):
            outbox.create(connection)
            ledger.create(connection)
    push()
    write()
    assert outbox.deliver() == 1


async def test_what_a_block_cannot_take(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """Confirmed pushes and plain lists are refused in a block, blocking and awaitable; a wish that asks nothing is none."""
    mail, raw = app.queue("mail"), app.plain_list("raw")

    @app.task
    def add(a: int) -> None: ...

    with closing(database.connect()) as connection:
        async with outbox.transaction(connection):
            for push in (
                mail.apush(1, fsync=True), mail.apush_many([1], wait_replicas=1), raw.apush(1), raw.apush_many([1]),
                add.options(wait_replicas=1).aenqueue(1), app.aenqueue_many([add.options(fsync=True).s(1)]),
            ):  # fmt: skip
                with pytest.raises(ConfigurationError) as refusal:
                    await push
                assert refusal.value.code == "E46"
            with pytest.raises(ConfigurationError, match="event loop"):
                mail.push(1)
            await mail.apush(1, fsync=False)
    assert await outbox.adeliver() == 1
    await app.aclose()


@pytest.mark.parametrize("table", ["", "a b", "a;b", "a.b.c", "ä", 'a"b', "1a", "x" * 49, None])
def test_names_of_tables(app: Conveyor, table: Any) -> None:
    """A table's name is a name, perhaps behind a schema's, and nothing that SQL could read otherwise."""
    with pytest.raises(ConfigurationError, match="Invalid table name"):
        Outbox(app, table=table)
    with pytest.raises(ConfigurationError, match="Invalid table name"):
        Ledger(table)


def test_an_outbox_without_a_way_to_connect(app: Conveyor) -> None:
    """An outbox that only enqueues needs no function that connects; delivering without one is refused."""
    with pytest.raises(ConfigurationError, match="connect"):
        Outbox(app).relay()


def test_statements_are_spelled_for_every_driver() -> None:
    """Each paramstyle of DB-API gets its own marks."""
    styles = {
        style: with_placeholders("a = ? AND b = ?", style)
        for style in ("qmark", "format", "pyformat", "numeric", "named")
    }
    assert styles == {
        "qmark": "a = ? AND b = ?", "format": "a = %s AND b = %s", "pyformat": "a = %s AND b = %s",
        "numeric": "a = :1 AND b = :2", "named": "a = :p1 AND b = :p2",
    }  # fmt: skip
    assert parameters_for([1, 2], "named") == {"p1": 1, "p2": 2}
    assert parameters_for([1, 2], "format") == (1, 2)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ddl(app: Conveyor, dialect: str, tmp_path: Path) -> None:
    """The printed SQL names no placeholder any more; the one for SQLite creates what works."""
    text = Outbox(app).ddl(dialect) + Ledger().ddl(dialect)
    assert not re.search(r"[{}]|SERIAL|BYTES", text)
    assert text.count("INDEX") == 2
    if dialect == "sqlite":
        sqlite(tmp_path / "a.db").do(*text.split(";\n"))
    with pytest.raises(ConfigurationError, match="not for 'oracle'"):
        Outbox(app).ddl("oracle")


def test_a_driver_is_known_by_a_class_above(database: Database) -> None:
    """A class of the program's own that stands on a driver's connection is spoken to as that."""
    with closing(database.connect()) as connection:
        own = type("Own", (type(connection),), {"__module__": "shop.models"})
    assert _style_and_dialect(own)[1] == database.dialect


class LostConnection:
    """A connection that is lost: it cannot commit or roll back, as when the database has gone away."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def commit(self) -> None:
        raise ConnectionError("the commit was not answered")

    def rollback(self) -> None:
        raise ConnectionError("the connection is lost")


class AsyncLostConnection(LostConnection):
    """The same on asyncio."""

    async def commit(self) -> None:  # type: ignore[override]
        raise ConnectionError("the commit was not answered")

    async def rollback(self) -> None:  # type: ignore[override]
        raise ConnectionError("the connection is lost")


@pytest.mark.row("D62")
async def test_the_error_of_a_block_is_raised_though_the_connection_is_lost(app: Conveyor, tmp_path: Path) -> None:
    """The error of the block is raised, or that of the commit, and not that of the rollback that cannot be done."""
    database = sqlite(tmp_path / "shop.db")
    outbox = Outbox(app, database.connect)
    prepare(outbox, database)
    for block in (outbox.transaction(_lost(database)), outbox.transaction(_lost(database))):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
    with pytest.raises(ConnectionError, match="commit"), outbox.transaction(_lost(database)):
        pass
    with pytest.raises(ZeroDivisionError):
        async with outbox.transaction(_lost(database, AsyncLostConnection)):
            raise ZeroDivisionError
    with pytest.raises(ConnectionError, match="commit"):
        async with outbox.transaction(_lost(database, AsyncLostConnection)):
            pass


def _lost(database: Database, kind: type[LostConnection] = LostConnection) -> Any:
    """Return a lost connection whose class comes from the driver's module, as classes of a driver do."""
    own = type(kind.__name__, (kind,), {"__module__": "sqlite3"})
    return own(database.connect())


@pytest.mark.row("D62")
def test_a_connection_in_use_is_left_alone(app: Conveyor, tmp_path: Path) -> None:
    """When `connect` returns the program's own connection amid a transaction, that transaction goes on."""
    database = sqlite(tmp_path / "shop.db")
    outbox = Outbox(app, database.connect)
    prepare(outbox, database)
    with closing(database.connect()) as connection:
        shared = Outbox(app, lambda: connection)
        connection.execute("INSERT INTO sale VALUES ('o1')")
        for use in (shared.stats, shared.deliver, shared.redrive):
            with pytest.raises(ConfigurationError, match="transaction is open") as refused_use:
                use()
            assert refused_use.value.code == "E47"
        connection.commit()
    assert database.one("SELECT COUNT(*) FROM sale") == 1


@pytest.mark.row("D62")
def test_care_amid_a_block_of_django(
    app: Conveyor, database: Database, outbox: Outbox, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stats` with `lambda: connection` inside `atomic()` counts what is committed, and the block's transaction goes on."""
    connection, transaction = django_connection(database, monkeypatch)
    mail, shared = app.queue("mail"), Outbox(app, lambda: connection)
    with transaction.atomic(), outbox.within(connection):
        mail.push(1)
    with transaction.atomic(), outbox.within(connection):
        mail.push(2)
        assert shared.stats().waiting == 1
        assert connection.in_atomic_block
    assert shared.stats().waiting == 2
    assert connection.connection is not None
    assert shared.deliver() == 2
    assert len(line(server)) == 2
    connection.close()
