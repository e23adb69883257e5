"""idle_turn: renewing many queues of a worker that holds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conveyor.messaging import outbox
from conveyor.store import operations
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement
from support.seeded_queue import LEASE, SeededQueue, entry


def _idle_turn(seeded: SeededQueue, *, compares: bool = False) -> operations.IdleReply:
    # An end of this very millisecond would look as if it could not be moved.
    seeded.redis.zadd(seeded.keys.workers, {"w": seeded.now() + 40_000}, xx=True)
    return seeded.run(operations.idle_turn([(seeded.keys, "w", LEASE, compares)]))


@pytest.mark.redis6
@pytest.mark.redis7
def test_it_renews_and_finds_nothing(seeded: SeededQueue) -> None:
    """An idle turn moves the end of the lease, and notes that nothing was to be done for a third of a lease."""
    seeded.register("w")
    before = seeded.dump()
    seeded.redis.zadd(seeded.keys.workers, {"w": seeded.now() + 40_000})

    reply = _idle_turn(seeded)

    assert (reply.needs_turn, reply.next_due) == ([False], [None])
    assert abs(reply.now - seeded.now()) < 5000
    assert seeded.since(before) == {"upkeep ~20s": "0"}
    assert seeded.dump()["workers"] == {"w": "now+60s"}


def test_a_scheduled_job_is_told(seeded: SeededQueue) -> None:
    """The instant of the first scheduled job comes with the reply, and needs no turn before it."""
    seeded.register("w")
    seeded.push(entry("a", delay_ms=50_000), entry("b", delay_ms=30_000))
    [needs_turn], [due] = (reply := _idle_turn(seeded)).needs_turn, reply.next_due

    assert not needs_turn
    assert due is not None
    assert 25_000 < due - reply.now <= 30_000


def _ready(seeded: SeededQueue) -> None:
    seeded.push("a")


def _urgent(seeded: SeededQueue) -> None:
    seeded.push(entry("a", priority=9))


def _due(seeded: SeededQueue) -> None:
    seeded.push(entry("a", delay_ms=60_000))
    seeded.redis.zadd(seeded.keys.due, {"a": 1})


def _reaped(seeded: SeededQueue) -> None:
    seeded.run(operations.reap(seeded.keys, "w"))


def _overdue(seeded: SeededQueue) -> None:
    seeded.register("v")
    seeded.redis.zadd(seeded.keys.workers, {"v": seeded.now() - 1})


def _ahead(seeded: SeededQueue) -> None:
    seeded.register("v")
    seeded.redis.zadd(seeded.keys.workers, {"v": seeded.now() + 10 * LEASE})


def _outbox(seeded: SeededQueue) -> None:
    seeded.redis.rpush(seeded.keys.outbox, outbox.write("other", entry("o")))


def _old_letters(seeded: SeededQueue) -> None:
    seeded.push("a")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, others=[Settlement("X", "a", state=b"1 1 0")])
    seeded.redis.zadd(seeded.keys.dead, {"a": 1})


@pytest.mark.row("D25")
@pytest.mark.parametrize("happens", [_ready, _urgent, _due, _reaped, _overdue, _ahead, _outbox, _old_letters])
def test_what_needs_a_turn(seeded: SeededQueue, happens: Callable[[SeededQueue], None]) -> None:
    """Whatever a turn would find to do, an idle turn tells; it does nothing of it."""
    seeded.register("w")
    happens(seeded)
    before = seeded.dump()

    assert _idle_turn(seeded).needs_turn == [True]

    assert {key.split()[0] for key in seeded.since(before)} <= {"workers", "upkeep"}


@pytest.mark.row("D25")
def test_what_redis_says_is_held_is_compared(seeded: SeededQueue) -> None:
    """A job that Redis takes for held by a worker that holds nothing is found by the idle turn that compares."""
    seeded.lease("a")
    assert _idle_turn(seeded).needs_turn == [False]
    assert _idle_turn(seeded, compares=True).needs_turn == [True]


def _calls(redis: Any) -> int:
    """Return how many commands ran so far, those inside scripts too."""
    return sum(found["calls"] for name, found in redis.info("commandstats").items() if name != "cmdstat_info")


@pytest.mark.standalone_only("counts every command the server gets, those of a replica and of sentinels too")
def test_a_queue_costs_one_command(seeded: SeededQueue) -> None:
    """Of many idle queues each costs one command; the look for dead workers is shared by all workers of a queue."""
    members = []
    for at in range(40):
        keys = QueueKeys("c", f"idle{at}")
        seeded.run(operations.register(keys, "w", LEASE, b"{}"))
        seeded.run(operations.register(keys, "v", LEASE, b"{}"))
        members.append((keys, "w", LEASE, False))
    seeded.run(operations.idle_turn(members))  # takes the looks
    others = [(keys, "v", LEASE, False) for keys, _, _, _ in members]

    counted = []
    for some in (others[:1], others[1:]):  # an end of this very millisecond would look as if it could not be moved
        before = _calls(seeded.redis)
        assert not any(seeded.run(operations.idle_turn(some)).needs_turn)
        counted.append(_calls(seeded.redis) - before)

    assert counted[1] - counted[0] == 38
    assert counted[0] <= 7
