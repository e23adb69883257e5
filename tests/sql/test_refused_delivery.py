"""Refusals of a relay by Redis or the database: rows stay, others go on, and a retry doubles nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from conveyor import QueueFull, StoreUnavailable
from conveyor.errors import ConveyorError, DurabilityNotReached
from conveyor.jobs.app import Conveyor
from conveyor.sql import Outbox
from conveyor.store.operations import StalePush
from support.databases import Database, prepare
from support.interrupted_delivery import KillAtStep, attempt, fill
from support.ready_ids import bare, line
from support.waiting import until
from testbed.server_process import Server


def test_a_full_queue_takes_what_fits(app: Conveyor, outbox: Outbox, database: Database, server: Server) -> None:
    """A queue with room for fewer than were committed takes those that fit, holds up no other queue, and gets the rest later, once."""
    mail = app.queue("mail", max_length=100)
    ids = fill(outbox, database, "mail", "orders", count=150)
    with pytest.raises(QueueFull) as refused:
        outbox.deliver()
    assert "mail wait" in refused.value.__notes__[0]
    assert line(server, "orders") == ids["orders"]
    taken: list[str] = []
    while len(taken) < 150:
        assert 0 < len(mail) <= 100
        for message in mail.pull(100):
            taken += bare([message.id])
            message.ack()
        try:
            outbox.deliver()
        except QueueFull:
            pass
    assert taken == ids["mail"]
    assert outbox.stats().waiting == 0


def test_what_follows_a_batch_that_is_cut_does_not_overtake_it(
    app: Conveyor, outbox: Outbox, database: Database, server: Server
) -> None:
    """When a batch does not fit and the one behind it would, the queue gets the beginning of the first."""
    mail = app.queue("mail", max_length=4)
    before = bare(mail.push_many(range(2)))
    ids = fill(outbox, database, "mail", count=4)["mail"]
    last = database.one("SELECT MAX(seq) FROM conveyor_outbox")
    database.do(
        f"UPDATE conveyor_outbox SET batch = 'aa' WHERE seq < {last}",
        f"UPDATE conveyor_outbox SET batch = 'bb' WHERE seq = {last}",
    )
    with pytest.raises(QueueFull):
        outbox.deliver()
    assert line(server) == [*before, *ids[:2]]


def test_a_late_copy_of_what_was_cut_counts_for_nothing(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that was refused as a whole and is cut into parts is refused for good: a copy of it that arrives later is late."""
    mail = app.queue("mail", max_length=4)
    ids = fill(outbox, database, "mail", count=6)["mail"]
    calls: list[tuple[Any, ...]] = []
    carry = app.client.push_unbuffered
    monkeypatch.setattr(
        app.client, "push_unbuffered", lambda *args, **options: calls.append((args, options)) or carry(*args, **options)
    )
    with pytest.raises(QueueFull):
        outbox.deliver()
    assert line(server) == ids[:4]
    for message in mail.pull(4):
        message.ack()
    args, options = calls[0]
    with pytest.raises(StalePush):
        carry(*args, **options)
    assert line(server) == []
    assert outbox.deliver() == 2
    assert line(server) == ids[4:]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_while_a_batch_is_cut(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that dies at any step of cutting a batch for a full queue loses nothing, doubles nothing, and keeps the order."""
    mail, step, killed = app.queue("mail", max_length=4), 0, True
    while killed:
        step += 1
        ids = fill(outbox, database, "mail", count=6)["mail"]
        killed = attempt(outbox, database, KillAtStep(step, after=after), monkeypatch)
        taken: list[str] = []

        def is_over(taken: list[str] = taken) -> bool:
            for message in mail.pull(10):
                taken += bare([message.id])
                message.ack()
            try:
                outbox.deliver()
            except QueueFull:
                pass
            return not outbox.stats().waiting and not len(mail)

        until(is_over, what=f"all rows are delivered, killed at step {step}")
        assert taken == ids, f"killed at step {step}"
    assert step > 15


def test_redis_away(database: Database, start_server: Callable[..., Server]) -> None:
    """While Redis is away rows stay, and a relay that was running delivers them when it is back, once."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with Conveyor(server.url) as app:
        outbox = Outbox(app, database.connect, interval="20ms")
        prepare(outbox, database)
        ids = fill(outbox, database, "mail")["mail"]
        with outbox.relay():
            until(lambda: outbox.stats().waiting == 0)
            server.kill()
            ids += fill(outbox, database, "mail", count=1500)["mail"]
            with pytest.raises(StoreUnavailable):
                outbox.deliver()
            assert outbox.stats().waiting == 1500
            server.start()
            until(lambda: outbox.stats().waiting == 0, 30)
        assert line(server) == ids


def test_a_relay_at_a_full_queue(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A relay keeps a full queue filled while it is drained, lets others through, and says so once, not at every turn."""
    caplog.set_level(logging.WARNING, "conveyor.relay")
    mail = app.queue("mail", max_length=10)
    ids = fill(outbox, database, "mail", "orders", count=100)
    taken: list[str] = []
    with outbox.relay():
        until(lambda: line(server, "orders") == ids["orders"])
        until(lambda: caplog.records)

        def take_some() -> bool:
            for message in mail.pull(10, wait="10s"):
                taken.extend(bare([message.id]))
                message.ack()
            return len(taken) >= 100

        until(take_some, what="a hundred messages")
        until(lambda: outbox.stats().waiting == 0)
    assert taken == ids["mail"]
    said = [record.getMessage() for record in caplog.records]
    assert [("wait; trying again" in one, "again" in one) for one in said] in (
        [(True, True)],
        [(True, True), (False, True)],
    )


def test_the_database_away(app: Conveyor, outbox: Outbox, database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A relay whose database refuses or loses connections goes on trying, says so, and delivers when it can."""
    caplog.set_level(logging.WARNING, "conveyor.relay")
    refused = threading.Event()

    def connect() -> Any:
        if not refused.is_set():
            refused.set()
            raise OSError("nobody listens")
        return database.connect()

    fill(outbox, database, "mail")
    flaky = Outbox(app, connect, interval="10ms")
    with flaky.relay():
        until(lambda: len(app.queue("mail")) == 3)
    assert "nobody listens" in caplog.text


def test_a_row_that_cannot_be_read_is_set_aside(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that cannot be decoded is reported, kept, and blocks no other; put back after an upgrade it is delivered."""
    ids = fill(outbox, database, "mail", count=5)["mail"]
    mark = "?" if database.dialect == "sqlite" else "%s"
    sql = f"UPDATE conveyor_outbox SET entry = {mark} WHERE seq = {mark}"
    seq = database.one("SELECT MIN(seq) + 1 FROM conveyor_outbox")
    good = bytes(database.one(f"SELECT entry FROM conveyor_outbox WHERE seq = {seq}"))

    def put(data: bytes) -> None:
        with closing(database.connect()) as connection:
            connection.cursor().execute(sql, (data, seq))
            connection.commit()

    put(b"\xffno line of JSON")
    with caplog.at_level(logging.ERROR, "conveyor.relay"):
        assert outbox.deliver() == 4
    assert "E49" in caplog.text
    assert outbox.deliver() == 0
    assert outbox.stats()[:2] == (0, 1)
    put(good)
    assert (outbox.redrive(), outbox.deliver()) == (1, 1)
    assert line(server) == [ids[0], *ids[2:], ids[1]]


@pytest.mark.standalone_only(
    "there is no replica to confirm anything", on=("valkey", "redis6", "redis7", "tls", "acl", "cluster")
)
def test_a_queue_that_asks_for_replicas_keeps_its_rows(
    app: Conveyor, outbox: Outbox, database: Database, server: Server
) -> None:
    """Rows of a queue that was declared with wait_replicas stay until the push is confirmed, which never doubles it."""
    app.queue("mail", wait_replicas=1, wait_timeout="50ms")
    ids = fill(outbox, database, "mail")["mail"]
    for _ in range(2):
        with pytest.raises(DurabilityNotReached):
            outbox.deliver()
    assert (outbox.stats().waiting, line(server)) == (3, ids)


# -- large, and in partitions ---------------------------------------------------------------------------------------


def test_large_rows_travel_in_several_batches(
    app: Conveyor, outbox: Outbox, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call to Redis carries about 4 MB at most, however many rows wait."""
    sizes: list[int] = []
    carry = app.client.push_unbuffered

    def measured(keys: Any, call: Any, *args: Any, **options: Any) -> Any:
        sizes.append(sum(len(one) for one in call.args if isinstance(one, bytes)))
        return carry(keys, call, *args, **options)

    monkeypatch.setattr(app.client, "push_unbuffered", measured)
    with closing(database.connect()) as connection, outbox.transaction(connection):
        app.queue("mail").push_many(["x" * 300_000] * 40)
    assert outbox.deliver() == 40
    assert len(sizes) == 4
    assert max(sizes) <= 4_000_000


@pytest.fixture
def spread(url: str, database: Database) -> Iterator[tuple[Conveyor, Outbox]]:
    with Conveyor(url) as app:
        app.queue("orders", partitions=8)
        outbox = Outbox(app, database.connect)
        prepare(outbox, database)
        yield app, outbox


@pytest.mark.leaves_keys("the numbers of partitions")
def test_partitions(spread: tuple[Conveyor, Outbox], database: Database) -> None:
    """Messages and jobs of queues with partitions arrive where their ids say, once, messages in their order there."""
    app, outbox = spread
    orders, notes = app.queue("orders", partitions=8), app.queue("notes", partitions=8)

    @app.task(queue="notes", name="note")
    def note(n: int) -> None: ...

    with closing(database.connect()) as connection, outbox.transaction(connection):
        ids = [orders.push(n, group=f"c{n % 5}") for n in range(40)]
        ids += orders.push_many(range(100))
        jobs = [note.enqueue(n) for n in range(20)]
    assert outbox.deliver() == 160
    assert (len(orders), len(notes)) == (140, 20)
    assert {job.status() for job in jobs} == {"ready"}
    notes.purge()
    taken: list[str] = []

    def take_some() -> bool:  # of a group one message at a time
        for message in orders.pull(200, wait="60s"):
            taken.append(message.id)
            message.ack()
        return len(taken) >= len(ids)

    until(take_some, what="all messages")
    assert sorted(taken) == sorted(ids)
    customers = [[id_ for n, id_ in enumerate(ids[:40]) if n % 5 == c] for c in range(5)]
    for mine in customers:
        assert len({id_.partition(":")[0] for id_ in mine}) == 1
        assert [id_ for id_ in taken if id_ in mine] == mine


@pytest.mark.leaves_keys("the numbers of partitions")
def test_partitions_that_changed_meanwhile(spread: tuple[Conveyor, Outbox], url: str, database: Database) -> None:
    """Rows that were placed in a partition that is no more go to one that is; a program with the old number delivers none."""
    app, outbox = spread
    orders = app.queue("orders", partitions=8)
    orders.push(0)
    orders.purge()
    with closing(database.connect()) as connection, outbox.transaction(connection):
        orders.push_many(range(100))
    orders.repartition(3)
    with pytest.raises(ConveyorError) as refused:
        outbox.deliver()
    assert refused.value.code == "E34"
    with Conveyor(url) as later:
        fewer = later.queue("orders", partitions=3)
        assert Outbox(later, database.connect).deliver() == 100
        messages = fewer.pull(200, wait="60s")
        assert sorted(message.body for message in messages) == list(range(100))
        for message in messages:
            message.ack()
