"""The relay: each row becomes one job, in its order, whatever breaks between the database and Redis."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from conveyor.sql import Outbox
from conveyor.sql.delivery import OutboxDelivery
from conveyor.sql.drivers import DbapiConnection, StatementResult, adapt_blocking
from support.databases import Database, prepare, sqlite
from support.interrupted_delivery import KillAtStep, attempt, fill
from support.manual_worker import drain
from support.ready_ids import bare, line
from support.shell import Shell
from support.waiting import until
from testbed.server_process import Server


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
        if not attempt(outbox, database, KillAtStep(step, after=after), monkeypatch):
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
        kills = 0
        while attempt(outbox, database, KillAtStep(draw.randrange(1, 14), after=draw.random() < 0.5), monkeypatch):
            kills += 1
            assert kills < 1000, "no relay gets through in 13 steps"
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
            until(lambda before=before: len(app.queue("mail")) > before, 30)
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
    assert "is not an Outbox" in shell.run("relay", "shop:app").stderr
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
        until(lambda: len(app.queue("mail")) == 6, 30)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
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

    stop, delivered, failed, deadlocks = threading.Event(), [0, 0], list[BaseException](), [0]

    def deliver(number: int) -> None:
        try:
            with closing(database.connect()) as connection:
                delivery = OutboxDelivery(core_of(app), outbox._table)
                while not stop.is_set() or outbox.stats().waiting:
                    try:
                        delivered[number] += delivery.deliver(adapt_blocking(connection), grace=number * 0.02).count
                    except Exception as error:
                        # InnoDB may choose a relay as the one that gives way; a Relay tries again as well.
                        if "Deadlock found" not in str(error):
                            raise
                        connection.rollback()
                        deadlocks[0] += 1
        except BaseException as error:
            failed.append(error)

    relays = [threading.Thread(target=deliver, args=(number,), daemon=True) for number in range(2)]
    writers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(2)]
    for thread in [*relays, *writers]:
        thread.start()
    for thread in writers:
        thread.join(120)
    stop.set()
    for thread in relays:
        thread.join(60)
    assert failed == []
    assert not any(thread.is_alive() for thread in [*relays, *writers])
    arrived = line(server)
    assert sorted(arrived) == sorted(written[0] + written[1])
    # A pass that gave way has not told what it had delivered until then.
    assert sum(delivered) == len(arrived) or (deadlocks[0] and sum(delivered) < len(arrived))
    for ids in written.values():
        mine = set(ids)
        assert [id_ for id_ in arrived if id_ in mine] == ids


def test_a_batch_that_another_pushes_meanwhile(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between one relay's claim and its push another delivers everything: the first finds it done, even when it was consumed."""
    ids = fill(outbox, database, "mail")["mail"]
    carry = app.client.push_unbuffered

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(app.client, "push_unbuffered", carry)
        assert outbox.deliver() == 3
        assert line(server) == ids
        for message in app.queue("mail").pull(3, wait="60s"):
            message.ack()
        return carry(*args, **options)

    monkeypatch.setattr(app.client, "push_unbuffered", meanwhile)
    assert outbox.deliver() == 0
    assert line(server) == []


def test_a_claim_behind_another_is_taken_back(
    app: Conveyor, outbox: Outbox, database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that claims while another does, which it could not see yet, lets its own claim go: one batch at a time."""
    ids = fill(outbox, database, "mail")["mail"]

    class Racing(DbapiConnection):
        """A link on which another relay claims, and more is committed, right before the first look for rows."""

        raced = False

        def run(self, sql: str, *values: object) -> StatementResult:
            if "LENGTH" in sql and not self.raced:
                self.raced = True
                self.commit()
                assert attempt(outbox, database, KillAtStep(8, after=False), monkeypatch)
                ids.extend(fill(outbox, database, "mail")["mail"])
            return super().run(sql, *values)

    with closing(database.connect()) as connection:
        own = adapt_blocking(connection)
        assert isinstance(own, DbapiConnection)
        racing = Racing(connection, own._style, own.dialect)
        passed = OutboxDelivery(core_of(app), outbox._table).deliver(racing, grace=3600)
    assert (passed.count, passed.left_to_another) == (0, True)
    assert database.one("SELECT COUNT(*) FROM conveyor_outbox WHERE batch > ''") == 3
    assert outbox.deliver() == 6
    assert line(server) == ids


def test_batches_of_several_relays_go_in_the_order_of_their_rows(
    app: Conveyor, outbox: Outbox, database: Database, server: Server
) -> None:
    """Batches that were named at the same time are delivered first row first, whatever their names."""
    ids = [id_ for _ in range(3) for id_ in fill(outbox, database, "mail")["mail"]]
    first = database.one("SELECT MIN(seq) FROM conveyor_outbox")
    for at, name in enumerate(("cc", "aa", "bb")):
        begin = first + 3 * at
        database.do(f"UPDATE conveyor_outbox SET batch = '{name}' WHERE seq BETWEEN {begin} AND {begin + 2}")
    assert outbox.deliver() == 9
    assert line(server) == ids


def test_another_relays_batch_is_left_to_it_for_a_while(
    app: Conveyor, outbox: Outbox, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay on duty is not overtaken: its batch, and all behind it, are left to it; and are taken over when it does nothing."""
    fill(outbox, database, "mail")
    assert attempt(outbox, database, KillAtStep(8, after=False), monkeypatch)  # named and committed, not pushed
    assert database.one("SELECT COUNT(*) FROM conveyor_outbox WHERE batch > ''") == 3
    fill(outbox, database, "mail")
    with closing(database.connect()) as connection:
        delivery = OutboxDelivery(core_of(app), outbox._table)
        first = delivery.deliver(adapt_blocking(connection), grace=3600)
        assert (first.count, first.left_to_another) == (0, True)
        second = delivery.deliver(adapt_blocking(connection), grace=0)
        assert (second.count, second.left_to_another) == (6, False)
