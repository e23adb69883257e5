"""The relay: whatever breaks between the database and Redis, each row becomes one job, in its order."""

from __future__ import annotations

import logging
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffering import bare, line
from conveyor import QueueFull, StoreUnavailable
from conveyor.app import Conveyor
from conveyor.errors import ConveyorError, DurabilityNotReached
from conveyor.sql import Outbox
from conveyor.sql.delivery import Delivery
from conveyor.sql.link import Answer, Driver, blocking
from conveyor.store.operations import LateReply
from database import Database, prepare, sqlite
from hand import drain, eventually
from server import Server
from shell import Shell


class Killed(BaseException):
    """Stands for the end of the process."""


class Fate:
    """Kills at the n-th act of a delivery: before it is carried out, or right after."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.left, self.after = at, after

    def act(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        try:
            return work(*args, **options)
        finally:
            if self.left == 0:
                raise Killed


class Mortal(Driver):
    """A link whose statements and commits are acts."""

    def __init__(self, link: Any, fate: Fate) -> None:
        super().__init__(link._connection, link._style, link.dialect)
        self.fate = fate

    def run(self, sql: str, *values: object) -> Answer:
        return self.fate.act(super().run, sql, *values)  # type: ignore[no-any-return]

    def commit(self) -> None:
        self.fate.act(super().commit)


def attempt(outbox: Outbox, database: Database, fate: Fate, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Deliver until fate strikes; return whether it did."""
    backend = outbox.app.backend
    carry = backend.carry
    connection = database.connect()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "carry", lambda *args, **options: fate.act(carry, *args, **options))
            Delivery(outbox.app, outbox._table).pass_through(Mortal(blocking(connection), fate))
    except Killed:
        return True
    else:
        return False
    finally:
        connection.close()  # what was not committed is rolled back, as when the process ends


def fill(outbox: Outbox, database: Database, *names: str, count: int = 3, rounds: int = 1) -> dict[str, list[str]]:
    """Push to queues in turns, in one transaction; return the ids by queue."""
    ids: dict[str, list[str]] = {name: [] for name in names}
    with closing(database.connect()) as connection, outbox.transaction(connection):
        for _ in range(rounds):
            for name in names:
                queue = outbox.app.queues.get(name) or outbox.app.queue(name)
                ids[name] += bare(queue.push_many(range(count)))
    return ids


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay killed before or after any statement, commit or push: the next one delivers each row once, in order."""
    step, expected = 0, {"mail": list[str](), "orders": list[str]()}
    while True:
        step += 1
        for name, ids in fill(outbox, database, "mail", "orders", rounds=2).items():
            expected[name] += ids
        if not attempt(outbox, database, Fate(step, after=after), monkeypatch):
            break
        outbox.deliver()
        assert {name: line(server, name) for name in expected} == expected, f"killed at step {step}"
    assert step > 10
    assert {name: line(server, name) for name in expected} == expected
    assert outbox.stats().waiting == 0


def test_killed_again_and_again(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relays that all die, each a step later than the last, deliver each row once as soon as one gets through."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, expected = random.Random(seed), list[str]()
    for _ in range(6):
        expected += fill(outbox, database, "mail", count=5)["mail"]
        while attempt(outbox, database, Fate(draw.randrange(1, 14), after=draw.random() < 0.5), monkeypatch):
            pass
    assert line(server) == expected


RELAY = """
import sqlite3
from conveyor import Conveyor
from conveyor.sql import Outbox
app = Conveyor()
mail = app.queue("mail")
outbox = Outbox(app, lambda: sqlite3.connect("shop.db", timeout=20), interval="10ms")
"""


def test_processes_killed_with_sigkill(
    url: str, server: Server, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    """Relay processes killed by SIGKILL while they work: of all rows none is lost and none is doubled."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", RELAY)
    database = sqlite(tmp_path / "shop.db")
    with Conveyor(url) as app:
        outbox = Outbox(app, database.connect)
        prepare(outbox, database)
        expected: list[str] = []
        for _ in range(rounds(100, 5)):
            expected += fill(outbox, database, "mail", count=500, rounds=5)["mail"]
            before = len(app.queue("mail"))
            process = shell.start("relay", "shop:outbox")
            eventually(lambda before=before: len(app.queue("mail")) > before, 30)
            process.kill()
            process.communicate()
        left = outbox.stats().waiting
        outbox.deliver()
        assert line(server) == expected
        print(f"{left} of {len(expected)} rows were left by the killed")
        drain(app)


def test_a_relay_ends_when_it_is_told(url: str, server: Server, tmp_path: Path) -> None:
    """`conveyor relay` delivers, ends with 0 at SIGTERM, and with --once says how many rows it delivered."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", RELAY)
    assert "no Outbox" in shell.run("relay", "shop:app").stderr
    missing = shell.run("relay", "shop:outbox")
    assert (missing.returncode, "E48" in missing.stderr) == (2, True)
    created = shell.run("relay", "shop:outbox", "--ddl", "sqlite").stdout
    database = sqlite(tmp_path / "shop.db")
    database.do(*created.split(";\n"))
    with Conveyor(url) as app:
        outbox = Outbox(app, database.connect)
        fill(outbox, database, "mail")
        once = shell.run("relay", "shop:outbox", "--once")
        assert (once.returncode, once.stdout) == (0, "3\n")
        process = shell.start("relay", "shop:outbox")
        fill(outbox, database, "mail")
        eventually(lambda: len(app.queue("mail")) == 6, 30)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0, said
        assert "Delivers conveyor_outbox to namespace conveyor" in said
        drain(app)


def test_two_relays_and_two_writers(app: Conveyor, outbox: Outbox, database: Database, server: Server) -> None:
    """Relays at work at the same time, in a race with those who commit: each row once, and each writer's in its order."""
    written: dict[int, list[str]] = {0: [], 1: []}
    mail = app.queue("mail")

    def write(number: int) -> None:
        with closing(database.connect()) as connection:
            for _ in range(40):
                with outbox.transaction(connection):
                    written[number] += bare(mail.push_many([number] * 25))

    stop, delivered, failed = threading.Event(), [0, 0], list[BaseException]()

    def deliver(number: int) -> None:
        try:
            with closing(database.connect()) as connection:
                delivery = Delivery(app, outbox._table)
                while not stop.is_set() or outbox.stats().waiting:
                    delivered[number] += delivery.pass_through(blocking(connection), courtesy=number * 0.02).count
        except BaseException as error:
            failed.append(error)

    relays = [threading.Thread(target=deliver, args=(number,)) for number in range(2)]
    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in [*relays, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in relays:
        thread.join()
    assert failed == []
    arrived = line(server)
    assert sorted(arrived) == sorted(written[0] + written[1])
    assert sum(delivered) == len(arrived)
    for ids in written.values():
        mine = set(ids)
        assert [id_ for id_ in arrived if id_ in mine] == ids


def test_a_batch_that_another_pushes_meanwhile(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between one relay's claim and its push another delivers everything: the first finds it done, even when it was consumed."""
    ids = fill(outbox, database, "mail")["mail"]
    carry = app.backend.carry

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(app.backend, "carry", carry)
        assert outbox.deliver() == 3
        assert line(server) == ids
        for message in app.queue("mail").pull(3, wait="5s"):
            message.ack()
        return carry(*args, **options)

    monkeypatch.setattr(app.backend, "carry", meanwhile)
    assert outbox.deliver() == 0
    assert line(server) == []


def test_another_relays_batch_is_left_to_it_for_a_while(
    app: Conveyor, outbox: Outbox, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay on duty is not overtaken: its batch, and all behind it, are left to it; and are taken over when it does nothing."""
    fill(outbox, database, "mail")
    assert attempt(outbox, database, Fate(6, after=False), monkeypatch)  # named and committed, not pushed
    assert database.one("SELECT COUNT(*) FROM conveyor_outbox WHERE batch > ''") == 3
    fill(outbox, database, "mail")
    with closing(database.connect()) as connection:
        delivery = Delivery(app, outbox._table)
        first = delivery.pass_through(blocking(connection), courtesy=3600)
        assert (first.count, first.left) == (0, True)
        second = delivery.pass_through(blocking(connection), courtesy=0)
        assert (second.count, second.left) == (6, False)


# -- refusals ---------------------------------------------------------------------------------------------------------


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


def test_a_late_copy_of_what_was_cut_counts_for_nothing(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that was refused as a whole and is cut into parts is refused for good: a copy of it that arrives later is late."""
    mail = app.queue("mail", max_length=4)
    ids = fill(outbox, database, "mail", count=6)["mail"]
    calls: list[tuple[Any, ...]] = []
    carry = app.backend.carry
    monkeypatch.setattr(
        app.backend, "carry", lambda *args, **options: calls.append((args, options)) or carry(*args, **options)
    )
    with pytest.raises(QueueFull):
        outbox.deliver()
    assert line(server) == ids[:4]
    for message in mail.pull(4):
        message.ack()
    args, options = calls[0]
    with pytest.raises(LateReply):
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
        killed = attempt(outbox, database, Fate(step, after=after), monkeypatch)
        taken: list[str] = []
        while outbox.stats().waiting or len(mail):
            for message in mail.pull(10):
                taken += bare([message.id])
                message.ack()
            try:
                outbox.deliver()
            except QueueFull:
                pass
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
            eventually(lambda: outbox.stats().waiting == 0)
            server.kill()
            ids += fill(outbox, database, "mail", count=1500)["mail"]
            with pytest.raises(StoreUnavailable):
                outbox.deliver()
            assert outbox.stats().waiting == 1500
            server.start()
            eventually(lambda: outbox.stats().waiting == 0, 30)
        assert line(server) == ids


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
        eventually(lambda: len(app.queue("mail")) == 3)
    assert "nobody listens" in caplog.text


def test_a_row_that_cannot_be_read_is_set_aside(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody can decode is reported, kept, and in nobody's way; put back after an upgrade it is delivered."""
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
    carry = app.backend.carry

    def measured(keys: Any, call: Any, *args: Any, **options: Any) -> Any:
        sizes.append(sum(len(one) for one in call.args if isinstance(one, bytes)))
        return carry(keys, call, *args, **options)

    monkeypatch.setattr(app.backend, "carry", measured)
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
    """Messages and jobs of a queue with partitions arrive where their ids say, once, in their order there."""
    app, outbox = spread
    orders = app.queue("orders", partitions=8)

    @app.task(queue="orders", name="note")
    def note(n: int) -> None: ...

    with closing(database.connect()) as connection, outbox.transaction(connection):
        ids = [orders.push(n, group=f"c{n % 5}") for n in range(40)]
        ids += orders.push_many(range(100))
        jobs = [note.enqueue(n) for n in range(20)]
    assert outbox.deliver() == 160
    assert len(orders) == 160
    taken = {message.id: message for message in orders.pull(200, wait="5s")}
    assert set(taken) == {*ids, *(job.id for job in jobs)}
    for message in taken.values():
        message.ack()
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
        messages = fewer.pull(200, wait="5s")
        assert sorted(message.body for message in messages) == list(range(100))
        for message in messages:
            message.ack()
