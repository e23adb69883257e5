"""The sweep of large bodies beside outboxes in a database: bodies of rows that are not delivered stay."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis

from conveyor import FileStore
from conveyor.admin import sweep
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.sql import Outbox
from support.databases import Database, prepare, sqlite

BIG = "big " * 20_000


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "blobs")


@pytest.fixture
def app(url: str, store: FileStore) -> Iterator[Conveyor]:
    """An app with a store for what takes more than 10 kB."""
    with Conveyor(url, large=store, large_above=10_000) as app:
        yield app
        app.queue("mail", str).purge()


def bodies(store: FileStore, *, days: int = 0) -> list[Path]:
    """Return the files of the store, made older by so many days."""
    found = sorted(store.directory.glob("??/*"))
    for path in found if days else ():
        os.utime(path, (then := time.time() - 86_400 * days, then))
    return found


def commit(outbox: Outbox, database: Database, count: int = 1) -> None:
    """Push large messages in a transaction, and commit it."""
    with closing(database.connect()) as connection, outbox.transaction(connection):
        outbox.app.queue("mail", str).push_many([BIG] * count)


@pytest.mark.row("D47")
def test_bodies_of_rows_that_wait_are_kept(app: Conveyor, outbox: Outbox, database: Database, store: FileStore) -> None:
    """Bodies of committed rows stay however old they are, of rows in a batch and set aside too; an orphan goes."""
    commit(outbox, database, 450)
    orphan = app.queue("mail", str)
    orphan.push(BIG)
    orphan.purge()
    last = database.one("SELECT MAX(seq) FROM conveyor_outbox")
    database.do(
        f"UPDATE conveyor_outbox SET batch = 'aa' WHERE seq < {last}",
        f"UPDATE conveyor_outbox SET batch = '!' WHERE seq = {last}",
    )
    assert len(bodies(store, days=3)) == 451
    assert sweep(app) == 1
    assert len(bodies(store)) == 450

    outbox.redrive()
    assert outbox.deliver() == 450
    taken = app.queue("mail", str).pull(450)
    assert [message.body for message in taken] == [BIG] * 450
    for message in taken:
        message.ack()
    assert bodies(store) == []


@pytest.mark.row("D47")
def test_rows_that_cannot_be_read_stop_the_sweep(tmp_path: Path, app: Conveyor, store: FileStore) -> None:
    """Nothing is removed while a row, a table or a database of the app cannot be read."""
    database = sqlite(tmp_path / "shop.db")
    outbox = Outbox(app, database.connect)
    app.queue("mail", str).push(BIG)
    app.queue("mail", str).purge()
    bodies(store, days=3)
    with pytest.raises(ConfigurationError, match="does not exist") as refused:
        sweep(app)
    assert refused.value.code == "E48"
    prepare(outbox, database)
    commit(outbox, database)
    database.do("UPDATE conveyor_outbox SET entry = X'6f6c64'")
    with pytest.raises(PayloadError, match="Nothing was removed"):
        sweep(app)
    database.do("DELETE FROM conveyor_outbox")
    Outbox(app)
    with pytest.raises(ConfigurationError, match="function that opens a connection"):
        sweep(app)
    assert len(bodies(store)) == 2


@pytest.mark.row("D47")
def test_outbox_that_the_program_does_not_know_stops_the_sweep(
    url: str, redis: Redis, tmp_path: Path, app: Conveyor, store: FileStore
) -> None:
    """Once a table has delivered to a namespace, a program without its `Outbox` sweeps nothing there."""
    database = sqlite(tmp_path / "shop.db")
    outbox = Outbox(app, database.connect)
    prepare(outbox, database)
    commit(outbox, database)
    assert outbox.deliver() == 1
    commit(outbox, database)
    bodies(store, days=3)
    with Conveyor(url, large=store, large_above=10_000) as other, pytest.raises(ConfigurationError) as refused:
        sweep(other)
    assert "conveyor_outbox" in str(refused.value)
    assert "SREM conveyor:outboxes conveyor_outbox" in str(refused.value)
    assert sweep(app) == 0
    assert len(bodies(store)) == 2
    outbox.deliver()
