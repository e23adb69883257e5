"""register, beat, reap, extend, held: a worker's lease."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor.admin.acl import commands_of
from conveyor.errors import ConfigurationError
from conveyor.messaging import outbox
from conveyor.payload.records import AttemptHistory, JobKey, read_failure
from conveyor.store import operations
from support.script_faults import LimitedUser, refuse_each_command
from support.seeded_queue import LEASE, PLAIN, WORKER, SeededQueue, entry


@pytest.mark.redis6
@pytest.mark.redis7
def test_register(seeded: SeededQueue) -> None:
    """Registering writes the worker's hash and its end, and repeating it changes nothing but the end."""
    seeded.register("w")
    expected = {"conf": {"schema": "2"}, "leased:w": {".turn": "0", **WORKER}, "workers": {"w": "now+60s"}}
    assert seeded.dump() == expected

    seeded.push("a")
    seeded.turn("w", 1, 1)
    before = seeded.dump()
    seeded.register("w")
    assert seeded.since(before) == {}


def test_register_makes_a_hashtable(seeded: SeededQueue) -> None:
    """However little a worker says of itself, its hash is a hashtable: leases in a listpack cost ten times as much."""
    seeded.register("w")
    assert seeded.redis.object("encoding", seeded.keys.leased("w")) == b"hashtable"
    seeded.push("a")
    seeded.turn("w", 1, 1)
    seeded.run(operations.extend(seeded.keys, "w", "a", "x", LEASE, b"{}"))
    assert seeded.redis.object("encoding", seeded.keys.leased("x")) == b"hashtable"


def test_register_refuses_another_layout(seeded: SeededQueue) -> None:
    """A worker of this version does not register on a queue of another layout."""
    seeded.redis.hset(seeded.keys.conf, "schema", "3")
    with seeded.unchanged(), pytest.raises(ConfigurationError, match="layout 3"):
        seeded.register("w")


def test_heartbeat(seeded: SeededQueue) -> None:
    """A beat moves the end of the whole lease and nothing else; one of a stranger changes nothing."""
    seeded.lease("a", "b")
    seeded.redis.zadd(seeded.keys.workers, {"w": seeded.now() + 5000})
    before = seeded.dump()

    assert seeded.run(operations.heartbeat(seeded.keys, "w", 120_000)) is True

    assert seeded.since(before) == {"workers": {"w": "now+120s"}}
    with seeded.unchanged():
        assert seeded.run(operations.heartbeat(seeded.keys, "nobody", LEASE)) is False


# -- reap -------------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.redis7
def test_reap_returns_jobs_to_the_front_in_their_order(seeded: SeededQueue) -> None:
    """Jobs of a dead worker come back in front of all others, in the order they were leased, each charged a crash."""
    seeded.lease("a", "b")
    seeded.push("c", entry("u", priority=3), "d")
    seeded.turn("w", 2, 2)
    seeded.take_token()
    before = seeded.dump()

    assert seeded.run(operations.reap(seeded.keys, "w")) == 4

    assert seeded.since(before) == {
        "leased:w": None, "workers": None, "ready:0": ["a", "b", "c", "d"], "ready:3": ["u"],
        "state": dict.fromkeys("cbau", "1 0 1"), "wake ~3600s": ["1"],
    }  # fmt: skip
    assert seeded.audit() == []


@pytest.mark.row("I8")
@pytest.mark.redis6
@pytest.mark.parametrize(
    ("state", "crashed", "after"),
    [
        (None, True, "1 0 1"), ("1 1 0\n{}", True, "2 1 1\n{}"), ("1 0 1", True, "2 0 1"), ("3 0 2\n{}\n{}", True, "4 0 2\n{}\n{}"),
        ("odd", True, "1 0 1"), (None, False, "1 0 0"), ("1 1 0\n{}", False, "2 1 0\n{}"), ("3 0 2", False, "4 0 2"),
    ],
)  # fmt: skip
def test_reap_charges(seeded: SeededQueue, state: str | None, crashed: bool, after: str | None) -> None:
    """A crash charges a start, and the first crash of a job; a leave a start, since the job may have begun."""
    seeded.lease("a")
    if state:
        seeded.redis.hset(seeded.keys.state, "a", state)

    assert seeded.run(operations.reap(seeded.keys, "w", crashed=crashed)) == 1

    found = seeded.redis.hget(seeded.keys.state, "a")
    assert (found.decode() if found else None) == after
    assert seeded.dump()["ready:0"] == ["a"]


@pytest.mark.redis6
@pytest.mark.parametrize("blames", [True, False])
def test_reap_leaves_an_error_with_each_crash(seeded: SeededQueue, blames: bool) -> None:
    """Jobs that are charged a crash get an error that says what ended which worker, and when; the others get none."""
    seeded.push("a", "b")
    seeded.run(
        operations.register(
            seeded.keys, "w", LEASE, operations.about(name="x", host='h"h' if blames else "host", pid=7)
        )
    )
    seeded.turn("w", 1, 2)
    seeded.redis.hset(seeded.keys.state, "a", "1 1 0\n{}")
    now = seeded.now()

    blame = (["a"], []) if blames else None
    seeded.run(operations.reap(seeded.keys, "w", blame=blame, cause='it "ended"', ago=60.0))

    a, b = (AttemptHistory.decode(seeded.redis.hget(seeded.keys.state, id_)) for id_ in "ab")
    error = read_failure(a.errors[-1])
    assert (a.starts, a.failures, a.crashes, a.errors[:-1]) == (2, 1, 1, [b"{}"])
    assert (error.attempt, error.type, error.message) == (2, "crashed", 'it "ended"')
    assert error.worker == ("w" if blames else "host:7")  # a name that needs care gives way to the identity
    assert now - 60_000 <= error.at <= seeded.now() - 60_000
    assert (b.crashes, len(b.errors)) == ((0, 0) if blames else (1, 1))


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("end", "seen", "reaped"),
    [(-1000, 0, True), (-1000, 1, False), (-1000, -1, False), (1000, 0, False), (80_000, 0, False), (100_000, 0, True)],
)  # fmt: skip
def test_reap_compares_the_end_it_saw(seeded: SeededQueue, end: int, seen: int, reaped: bool) -> None:
    """With an end, a reap counts only for exactly that end, when it has passed or lies further off than the lease allows."""
    seeded.lease("a")
    instant = seeded.now() + end
    seeded.redis.zadd(seeded.keys.workers, {"w": instant})

    call = operations.reap(seeded.keys, "w", end=instant + seen)
    if reaped:
        assert seeded.run(call) == 1
        assert seeded.dump()["ready:0"] == ["a"]
    else:
        with seeded.unchanged():
            assert seeded.run(call) == -1


def test_heartbeat_between_two_looks_saves_a_worker(seeded: SeededQueue) -> None:
    """A worker that renews after it was seen overdue is not reaped by the observer."""
    seeded.lease("a")
    seen = seeded.now() - 1
    seeded.redis.zadd(seeded.keys.workers, {"w": seen})
    seeded.run(operations.heartbeat(seeded.keys, "w", LEASE))

    with seeded.unchanged():
        assert seeded.run(operations.reap(seeded.keys, "w", end=seen)) == -1


def test_second_reap_finds_nobody(seeded: SeededQueue) -> None:
    """A reap sent twice returns the jobs once."""
    seeded.lease("a", "b")
    assert seeded.run(operations.reap(seeded.keys, "w")) == 2
    with seeded.unchanged():
        assert seeded.run(operations.reap(seeded.keys, "w")) == -1


def test_reap_of_an_idle_worker_calls_nobody(seeded: SeededQueue) -> None:
    """A reap that returns nothing leaves nothing of the worker and makes nothing takeable."""
    seeded.register("w")
    assert seeded.run(operations.reap(seeded.keys, "w")) == 0
    assert seeded.dump() == {"conf": {"schema": "2"}}


@pytest.mark.parametrize("left", ["ready", "scheduled", "alarm"])
def test_reap_calls_another_worker_for_what_is_left(seeded: SeededQueue, left: str) -> None:
    """A dead worker that held nothing may have taken a token, or have been first at the next alarm: another one is called."""
    seeded.register("w")
    if left == "ready":
        seeded.push("a")
        seeded.take_token()
    elif left == "scheduled":
        seeded.push(entry("a", delay_ms=60_000))
        seeded.take_token()
    else:
        seeded.redis.zadd(seeded.keys.due, {"\trate": 10**15})
    assert not seeded.redis.exists(seeded.keys.wake)
    assert seeded.run(operations.reap(seeded.keys, "w")) == 0
    assert seeded.redis.llen(seeded.keys.wake) == 1


def test_reap_of_an_end_without_a_hash(seeded: SeededQueue) -> None:
    """A registration whose hash is gone is taken away too."""
    seeded.redis.zadd(seeded.keys.workers, {"w": 1})
    assert seeded.run(operations.reap(seeded.keys, "w", end=1)) == 0
    assert seeded.dump() == {}


@pytest.mark.redis6
def test_reap_honours_cancel_requests(seeded: SeededQueue) -> None:
    """A job whose cancellation was asked of the dead worker ends cancelled; its neighbours come back."""
    seeded.push("a", entry("b", unique="k", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 2)
    seeded.run(operations.cancel(seeded.keys, "b"))
    seeded.run(operations.await_result(seeded.keys, "b", "one"))

    assert seeded.run(operations.reap(seeded.keys, "w")) == 1

    state = seeded.dump()
    assert state["jobs"] == {"a": PLAIN}
    assert state["ready:0"] == ["a"]
    assert state["result:b ~600s"] == '{"status":"cancelled","by":"ada","at":now}'
    assert state["unique:i:b ~86400s"] == "b"
    assert not {"unique:k:k", "waiters"} & state.keys()
    assert seeded.audit() == []


def test_reap_skips_a_job_that_is_gone(seeded: SeededQueue) -> None:
    """A leased id without an envelope is dropped with its state."""
    seeded.lease("a", "b")
    seeded.redis.hdel(seeded.keys.jobs, "a")
    seeded.redis.hset(seeded.keys.state, "a", "1 1 0")

    assert seeded.run(operations.reap(seeded.keys, "w", crashed=False)) == 1
    assert seeded.dump()["ready:0"] == ["b"]
    assert seeded.audit() == []


# -- extend, held -----------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_extend(seeded: SeededQueue) -> None:
    """An extended message moves to an identity of its own with its own end; the rest stays; a repeat changes nothing."""
    seeded.lease("a", "b")
    before = seeded.dump()
    call = operations.extend(seeded.keys, "w", "a", "x", 300_000, b"{}")

    assert seeded.run(call) is True

    assert seeded.since(before) == {
        "leased:w": {".turn": "1", **WORKER, "b": "1.2"},
        "leased:x": {".turn": "0", ".about": "{}", ".lease": "300000", "a": "-8193"},
        "workers": {"w": "now+60s", "x": "now+300s"},
    }
    with seeded.unchanged():
        assert seeded.run(call) is True
    assert seeded.audit() == []


def test_extended_message_is_settled_by_its_own_identity_only(seeded: SeededQueue) -> None:
    """After extend the old identity has lost the message, and the new one can settle it or be reaped."""
    seeded.lease("a", "b")
    for id_, identity in (("a", "x"), ("b", "y")):
        seeded.run(operations.extend(seeded.keys, "w", id_, identity, LEASE, b"{}"))

    assert seeded.turn("w", 2, done=["a"]).lost == ["a"]
    assert seeded.turn("x", 1, done=["a"], flags="kt").held == 0
    assert seeded.run(operations.reap(seeded.keys, "y")) == 1
    assert seeded.dump()["ready:0"] == ["b"]


def test_extend_takes_the_cancel_request_along(seeded: SeededQueue) -> None:
    """A cancellation asked of the worker is asked of the identity the message moved to."""
    seeded.lease("a", "b")
    seeded.run(operations.cancel(seeded.keys, "a"))
    seeded.run(operations.extend(seeded.keys, "w", "a", "x", LEASE, b"{}"))

    assert seeded.turn("w", 2).cancelled == []
    assert seeded.turn("x", 1).cancelled == ["a"]


def test_extend_of_what_is_not_held(seeded: SeededQueue) -> None:
    """A job that the worker does not hold cannot be extended."""
    seeded.lease("a")
    seeded.push("b")
    with seeded.unchanged():
        for worker, id_ in (("w", "b"), ("nobody", "a")):
            assert seeded.run(operations.extend(seeded.keys, worker, id_, "x", LEASE, b"{}")) is False


@pytest.mark.parametrize("asked", [False, True])
def test_held_ids(seeded: SeededQueue, asked: bool) -> None:
    """The jobs of a worker are listed without the other fields of its hash."""
    seeded.lease("a", "b")
    if asked:
        seeded.run(operations.cancel(seeded.keys, "a"))

    with seeded.unchanged():
        assert sorted(seeded.run(operations.held_ids(seeded.keys, "w"))) == ["a", "b"]
        assert seeded.run(operations.held_ids(seeded.keys, "nobody")) == []


@pytest.mark.parametrize("number", [8, 20])
def test_reap_of_many_turns(seeded: SeededQueue, number: int) -> None:
    """The order over many turns is kept, whatever was settled in between."""
    ids = [f"{n:02}" for n in range(number * 2)]
    seeded.push(*ids)
    seeded.register("w")
    done: list[Any] = []
    for turn in range(1, number + 1):
        done = seeded.turn("w", turn, 2, done=done[:1]).ids

    left = [id_ for n, id_ in enumerate(ids) if n % 2 or n == len(ids) - 2]
    assert seeded.run(operations.reap(seeded.keys, "w", crashed=False)) == len(left)
    assert seeded.dump()["ready:0"] == left


@pytest.mark.row("C102")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.standalone_only("makes a user")
def test_register_names_the_right_that_is_missing(seeded: SeededQueue, url: str) -> None:
    """Whoever registers without a right that a worker's steps need is refused with its name, and nothing is left on the server."""
    steps = (
        operations.TURN, operations.IDLE_TURN, operations.HEARTBEAT, operations.REAP, operations.EXTEND, operations.HELD_IDS,
        operations.WAKE, outbox.TAKE, outbox.TRIM,
    )  # fmt: skip
    needed = {command.upper() for script in steps for command in commands_of(script)}
    assert needed <= {command.upper() for command in commands_of(operations.REGISTER)}
    user = LimitedUser(seeded.redis, url)
    limited = SeededQueue(seeded.redis, user.url)
    for command in sorted(needed - {"TIME", "HDEL"}):  # those two come first, and are refused like any other
        user.deny(f"-{command}")
        with seeded.unchanged(), pytest.raises(ConfigurationError) as refused:
            limited.register("w")
        assert refused.value.code == "E17"
        if command not in {"ZCARD", "HMGET"}:
            assert f"ACL SETUSER name +{command.lower()}" in str(refused.value)
    user.deny("resetchannels")
    with seeded.unchanged(), pytest.raises(ConfigurationError, match=r"ACL SETUSER name \+publish &c:replies:\*"):
        limited.register("w")
    user.deny("resetchannels", "&c:replies:*")
    limited.register("w")
    limited.client.close()
    user.close()


@pytest.mark.row("C101")
@pytest.mark.standalone_only("makes a user, and reads with MONITOR what scripts send")
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_successor_takes_its_place_or_nothing_is_done(seeded: SeededQueue, url: str, scheduled: bool) -> None:
    """Whichever command a user may not use: a dead worker whose job was to be cancelled is removed whole, with the successor's place."""
    key = JobKey("k", conflict="rerun")
    seeded.push(entry("a", keys=(key,)))
    seeded.register("w")
    assert seeded.turn("w", 1, 1).ids == ["a"]
    seeded.push(entry("b", keys=(key,), delay_ms=3_600_000 if scheduled else None))
    seeded.run(operations.cancel(seeded.keys, "a"))
    refuse_each_command(seeded, url, operations.reap(seeded.keys, "w"))
