"""
Databases for the tests of transactions: SQLite; and, of the run's own, PostgreSQL and MariaDB where these and their drivers
(psycopg, pymysql) are installed.
"""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conveyor.jobs.app import Conveyor
from conveyor.sql import Ledger, Outbox
from support.waiting import until


@dataclass
class Database:
    """One empty database; `connect` opens a connection, `dsn` is how a driver names it."""

    dialect: str
    dsn: str
    connect: Callable[[], Any]

    def one(self, sql: str) -> Any:
        """Return the first value of a query, read on a connection of its own."""
        with closing(self.connect()) as connection:
            cursor = connection.cursor()
            cursor.execute(sql)
            [value, *_] = cursor.fetchone()
            return value

    def do(self, *statements: str) -> None:
        """Carry out statements and commit."""
        with closing(self.connect()) as connection:
            for statement in statements:
                connection.cursor().execute(statement)
            connection.commit()


class Postgres:
    """A server on a private socket."""

    def __init__(self, bin_: Path, directory: Path) -> None:
        # It refuses to run as root.
        self.user = "nobody" if os.getuid() == 0 else None
        self.directory, self._bin = directory, bin_
        directory.mkdir()
        if self.user is not None:
            os.chown(directory, pwd.getpwnam(self.user).pw_uid, -1)
            directory.parent.chmod(0o755)
        self._call(
            "initdb",
            "-D",
            str(directory / "data"),
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        self._call("pg_ctl", "-D", str(directory / "data"), "-w", "-l", str(directory / "log"), "-o",
                   f"-k {directory} -c listen_addresses= -c fsync=off", "start")  # fmt: skip

    def _call(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / name, *arguments], check=True, stdout=subprocess.DEVNULL, user=self.user, cwd=self.directory
        )  # fmt: skip

    def dsn(self, name: str) -> str:
        return f"host={self.directory} user=postgres dbname={name}"

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self.directory / "data"), "-m", "immediate", "stop")


def _find_postgres() -> Path | None:
    places = [*sorted(glob.glob("/usr/lib/postgresql/*/bin")), os.path.dirname(shutil.which("initdb") or "")]
    return next((Path(place) for place in places if place and (Path(place) / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres(directory: Path) -> Iterator[Postgres]:
    """The PostgreSQL of this run."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    bin_ = _find_postgres()
    if bin_ is None:
        pytest.skip("PostgreSQL is not installed")
    server = Postgres(bin_, directory / "pg")
    yield server
    server.stop()


def sqlite(path: Path) -> Database:
    """A database in a file."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=20)
        connection.execute("PRAGMA synchronous = OFF")  # no test cuts the power
        return connection

    return Database("sqlite", str(path), connect)


class Maria:
    """A server on a private socket."""

    def __init__(self, daemon: str, directory: Path) -> None:
        user = ["--user=nobody"] if os.getuid() == 0 else []
        directory.mkdir()
        if user:
            os.chown(directory, pwd.getpwnam("nobody").pw_uid, -1)
            directory.parent.chmod(0o755)
        self.socket = str(directory / "s")
        place = [f"--datadir={directory / 'data'}", *user]
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db", *place],
            check=True, capture_output=True,
        )  # fmt: skip
        self._process = subprocess.Popen(
            [daemon, "--no-defaults", *place, f"--socket={self.socket}", "--skip-networking", "--innodb-flush-log-at-trx-commit=0",
             f"--pid-file={directory / 'pid'}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def connect(self, name: str | None = None) -> Any:
        import pymysql

        return pymysql.connect(unix_socket=self.socket, user="root", database=name)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def maria(directory: Path) -> Iterator[Maria]:
    """The MariaDB of this run."""
    pytest.importorskip("pymysql", reason="pymysql is not installed")
    daemon = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    if daemon is None:
        pytest.skip("MariaDB is not installed")
    server = Maria(daemon, directory / "maria")
    try:
        until(lambda: Path(server.socket).exists(), 60)
        yield server
    finally:
        server.stop()


_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql", "mysql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite(tmp_path / "shop.db")
    name = f"shop{next(_numbers)}"
    if request.param == "mysql":
        maria: Maria = request.getfixturevalue("maria")
        with closing(maria.connect()) as connection:
            connection.cursor().execute(f"CREATE DATABASE {name}")
        return Database("mysql", name, lambda: maria.connect(name))
    server: Postgres = request.getfixturevalue("postgres")
    import psycopg

    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    dsn = server.dsn(name)
    return Database("postgresql", dsn, lambda: psycopg.connect(dsn))


@pytest.fixture
def outbox(app: Conveyor, database: Database) -> Outbox:
    """The outbox of `app` in that database, with its table, and a table ``sale (item)`` of the program's."""
    made = Outbox(app, database.connect)
    prepare(made, database)
    return made


def prepare(outbox: Outbox, database: Database) -> None:
    """Create the tables."""
    with closing(database.connect()) as connection:
        outbox.create(connection)
        Ledger().create(connection)
    database.do("CREATE TABLE sale (item VARCHAR(50))")
