"""The ledger: effects in a database happen once, though the job may run twice."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conveyor import PayloadError
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.sql import Ledger
from support.databases import Database, sqlite
from support.shell import Shell
from support.waiting import until


@pytest.fixture
def ledger(database: Database) -> Ledger:
    ledger = Ledger()
    with closing(database.connect()) as connection:
        ledger.create(connection)
    database.do("CREATE TABLE sale (item VARCHAR(50))")
    return ledger


def sell(connection: Any, item: str = "o1") -> None:
    connection.cursor().execute(f"INSERT INTO sale VALUES ('{item}')")


def test_the_first_commit_counts(ledger: Ledger, database: Database) -> None:
    """A key is new until a transaction that wrote it down has committed; a rollback leaves it new."""
    with closing(database.connect()) as connection:
        assert ledger.first(connection, "job:1")
        assert not ledger.first(connection, "job:1")
        connection.rollback()
        assert ledger.first(connection, "job:1")
        assert ledger.first(connection, "job:1/mail")
        connection.commit()
    with closing(database.connect()) as connection:
        assert not ledger.first(connection, "job:1")


def test_two_attempts_at_the_same_time(ledger: Ledger, database: Database) -> None:
    """Of attempts that run at the same time one makes the effect; the others wait for its commit and are told."""
    begun, told = threading.Barrier(4), list[bool]()

    def attempt() -> None:
        with closing(database.connect()) as connection:
            begun.wait(60)
            if first := ledger.first(connection, "job:1"):
                sell(connection)
            told.append(first)
            connection.commit()

    threads = [threading.Thread(target=attempt, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(told) == [False, False, False, True]
    assert database.one("SELECT COUNT(*) FROM sale") == 1


def test_an_attempt_that_rolls_back_leaves_it_to_the_next(ledger: Ledger, database: Database) -> None:
    """An attempt that waited for another which fails makes the effect itself."""
    told = list[bool]()
    with closing(database.connect()) as failing:
        assert ledger.first(failing, "job:1")

        def attempt() -> None:
            with closing(database.connect()) as connection:
                told.append(ledger.first(connection, "job:1"))
                connection.commit()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        failing.rollback()
        thread.join(60)
        assert not thread.is_alive()
    assert told == [True]


def test_a_step_keeps_its_result(ledger: Ledger, database: Database) -> None:
    """The function runs once; later calls return what it returned, in the annotated type, whatever their arguments."""
    calls = []

    def charge(amount: int) -> dict[str, tuple[int, str]]:
        calls.append(amount)
        sell(connection)
        return {"receipt": (amount, "EUR")}

    with closing(database.connect()) as connection:
        first = ledger.once(connection, "job:1", charge, 10)
        connection.commit()
        assert ledger.once(connection, "job:1", charge, 20) == first == {"receipt": (10, "EUR")}
        assert ledger.once(connection, "job:2", lambda: None) is None
        assert ledger.once(connection, "job:2", lambda: 1) is None
    assert calls == [10]


def test_a_step_that_fails_leaves_nothing(ledger: Ledger, database: Database) -> None:
    """An exception of the function, or a result that cannot be stored, reaches the caller, whose rollback makes the key new."""
    with closing(database.connect()) as connection:
        with pytest.raises(ZeroDivisionError):
            ledger.once(connection, "job:1", lambda: 1 / 0)
        connection.rollback()
        with pytest.raises(PayloadError):
            ledger.once(connection, "job:1", object)
        connection.rollback()
        assert ledger.first(connection, "job:1")


def test_trimming(ledger: Ledger, database: Database) -> None:
    """`trim` forgets what is older than it is told, and no more."""
    with closing(database.connect()) as connection:
        for key in ("old", "new"):
            ledger.first(connection, key)
        connection.commit()
        database.do("UPDATE conveyor_ledger SET created_ms = created_ms - 7200000 WHERE id = 'old'")
        assert ledger.trim(connection, older_than="1h") == 1
        assert (ledger.first(connection, "new"), ledger.first(connection, "old")) == (False, True)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb", None, 7])
def test_keys_that_are_none(ledger: Ledger, database: Database, key: Any) -> None:
    """A key is a text that fits into its column and can be read."""
    with closing(database.connect()) as connection, pytest.raises(ConfigurationError, match="1 to 255"):
        ledger.first(connection, key)


def test_the_two_kinds_of_keys_are_not_mixed(ledger: Ledger, database: Database) -> None:
    """A key that was written down without a result has none to give."""
    with closing(database.connect()) as connection:
        ledger.first(connection, "job:1")
        with pytest.raises(ConfigurationError, match="first"):
            ledger.once(connection, "job:1", lambda: 1)


JOBS = """
import os, sqlite3
from contextlib import closing
from pathlib import Path
from conveyor import Context, Conveyor, current
from conveyor.sql import Ledger
app = Conveyor(lease="1s")
ledger = Ledger()

@app.task(retry=5)
def sell(item: str, context: Context = current()) -> int:
    with closing(sqlite3.connect("shop.db", timeout=20)) as connection:
        if ledger.first(connection, context.job_id):
            connection.execute("INSERT INTO sale VALUES (?)", (item,))
        connection.commit()
    with open("runs", "a") as file:
        file.write(f"{context.attempt}\\n")
    if context.attempt == 1:
        os._exit(1)
    return context.attempt
"""


def test_killed_between_the_commit_and_the_acknowledgement(url: str, tmp_path: Path) -> None:
    """A worker that dies after the job's commit and before its end: the job runs again, and its effect is there once."""
    shell = Shell(tmp_path, url)
    shell.write("jobs.py", JOBS)
    database = sqlite(tmp_path / "shop.db")
    with closing(database.connect()) as connection:
        Ledger().create(connection)
    database.do("CREATE TABLE sale (item VARCHAR(50))")
    id_ = shell.run("enqueue", "sell", "item=o1", "--app", "jobs:app").stdout.strip()
    worker = shell.start("worker", "jobs:app")
    try:
        with Conveyor(url) as app:
            assert until(lambda: app.job(id_).status() == "done", 60)
            assert app.job(id_).result(timeout="60s") == 2
    finally:
        worker.terminate()
        worker.communicate(timeout=60)
    assert (tmp_path / "runs").read_text() == "1\n2\n"
    assert database.one("SELECT COUNT(*) FROM sale") == 1
