"""A primary dies under load with its replica behind: confirmed jobs are there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from conveyor.errors import DurabilityNotReached, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.store import inspection, operations
from conveyor.store.operations import WorkerUnregistered
from support.manual_worker import ManualWorker
from support.replica_pair import ReplicaPair, Switch, bare, stored
from support.waiting import until
from testbed.server_process import Server

Start = Callable[..., Server]


class Producer(threading.Thread):
    """Pushes until told to stop; `returned` are the ids of the pushes that did."""

    def __init__(self, url: str, options: dict[str, Any], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.app, self.options, self.stop = Conveyor(url), options, stop
        self.returned: list[str] = []
        self.failed = 0

    def run(self) -> None:
        mail = self.app.queue("mail")
        while not self.stop.is_set():
            try:
                self.returned += mail.push_many("0123456789", **self.options)
            except (DurabilityNotReached, StoreUnavailable):
                self.failed += 1
            if not self.options:
                self.stop.wait(0.001)  # else it takes all of this process's time from those that wait
        self.app.close()


def fail_over(start: Start, dice: random.Random) -> tuple[int, int, int, int]:
    """Kill a loaded primary whose replica is behind; return (confirmed, of these lost, unconfirmed, of these lost)."""
    pair = ReplicaPair(start)
    door, stop = Switch(str(pair.primary.socket)), threading.Event()
    durability_request = {"wait_replicas": 1, "wait_timeout": "300ms"}
    producers = [
        Producer(door.url, options, stop)
        for options in (durability_request, durability_request, durability_request, {})
    ]
    for one in producers:
        one.start()
    time.sleep(dice.uniform(0.1, 0.6))  # the load before the fault, not a wait for something
    until(lambda: all(one.returned for one in producers))
    pair.link.hold()
    before = len(producers[3].returned)
    time.sleep(dice.uniform(0.02, 0.2))
    until(lambda: len(producers[3].returned) > before + 10)  # the replica is behind now
    pair.primary.kill()
    stop.set()
    pair.promote()
    door.turn(str(pair.replica.socket))
    for one in producers:
        one.join(60)
        assert not one.is_alive()
    there = stored(pair.replica)
    with Conveyor(pair.replica.url) as app:
        assert app.client.run(inspection.audit(app.client.keys("mail"))) == []
    confirmed = set().union(*(bare(one.returned) for one in producers[:3]))
    unconfirmed = bare(producers[3].returned)
    door.close()
    pair.close()
    return len(confirmed), len(confirmed - there), len(unconfirmed), len(unconfirmed - there)


@pytest.mark.row("C4")
def test_failover_loses_nothing_that_was_confirmed(
    start_server: Start, rounds: Callable[[int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs confirmed by the replica are on it when it takes over, however the primary dies."""
    seed, count = random.randrange(2**32), rounds(50, 3)
    dice, total = random.Random(seed), [0, 0, 0, 0]
    for _ in range(count):
        found = fail_over(start_server, dice)
        total = [a + b for a, b in zip(total, found, strict=True)]
    with capsys.disabled():
        print(
            f"\n{count} failovers (seed {seed}): of {total[0]:,} confirmed messages {total[1]} lost, "
            f"of {total[2]:,} unconfirmed {total[3]:,}"
        )
    assert total[0] > count
    assert total[1] == 0
    assert total[3] > 0  # the replica was behind, or this shows nothing


@pytest.mark.row("C4")
@pytest.mark.parametrize("known", [True, False], ids=["a known worker", "a worker that is forgotten too"])
def test_a_lease_that_failover_forgets_is_refused(start_server: Start, known: bool) -> None:
    """A job leased from a primary that dies before its replica heard of it is leased to another, and the first holder changes nothing."""
    pair = ReplicaPair(start_server)
    door = Switch(str(pair.primary.socket))
    with Conveyor(door.url) as app:
        task = app.task(name="note")(lambda n: None)
        task.options(id="one", wait_replicas=1).enqueue(1)
        first = ManualWorker(app) if known else None
        if known:
            task.options(id="two", wait_replicas=1).enqueue(2)  # the replica has what came before it
        pair.link.hold()
        first = first or ManualWorker(app)
        assert first.take() == ["one"]
        pair.primary.kill()
        pair.promote()
        door.turn(str(pair.replica.socket))
        second = ManualWorker(app)
        assert second.take() == ["one"]
        if known:
            assert first.turn(0, done=("one",)).lost == ["one"]
        else:
            with pytest.raises(WorkerUnregistered):
                first.turn(0, done=("one",))
        assert app.client.run(operations.held_ids(second.keys, second.worker)) == ["one"]
        second.plainly_done("one")
        assert app.client.run(inspection.audit(app.client.keys("default"))) == []
    door.close()
    pair.close()
