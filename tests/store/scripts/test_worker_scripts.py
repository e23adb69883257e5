"""register, beat, reap, extend, held: a worker's lease."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.store import operations
from support.seeded_queue import LEASE, PLAIN, WORKER, Scene, entry


@pytest.mark.redis6
@pytest.mark.redis7
def test_register(scene: Scene) -> None:
    """Registering writes the worker's hash and its end, and repeating it changes nothing but the end."""
    scene.register("w")
    expected = {"conf": {"schema": "1"}, "leased:w": {".turn": "0", **WORKER}, "workers": {"w": "now+60s"}}
    assert scene.dump() == expected

    scene.push("a")
    scene.turn("w", 1, 1)
    before = scene.dump()
    scene.register("w")
    assert scene.since(before) == {}


def test_register_makes_a_hashtable(scene: Scene) -> None:
    """However little a worker says of itself, its hash is a hashtable: leases in a listpack cost ten times as much."""
    scene.register("w")
    assert scene.redis.object("encoding", scene.keys.leased("w")) == b"hashtable"
    scene.push("a")
    scene.turn("w", 1, 1)
    scene.run(operations.extend(scene.keys, "w", "a", "x", LEASE, b"{}"))
    assert scene.redis.object("encoding", scene.keys.leased("x")) == b"hashtable"


def test_register_refuses_another_layout(scene: Scene) -> None:
    """A worker of this version does not register on a queue of another layout."""
    scene.redis.hset(scene.keys.conf, "schema", "2")
    with scene.unchanged(), pytest.raises(ConfigurationError, match="layout 2"):
        scene.register("w")


def test_heartbeat(scene: Scene) -> None:
    """A beat moves the end of the whole lease and nothing else; one of a stranger changes nothing."""
    scene.lease("a", "b")
    scene.redis.zadd(scene.keys.workers, {"w": scene.now() + 5000})
    before = scene.dump()

    assert scene.run(operations.heartbeat(scene.keys, "w", 120_000)) is True

    assert scene.since(before) == {"workers": {"w": "now+120s"}}
    with scene.unchanged():
        assert scene.run(operations.heartbeat(scene.keys, "nobody", LEASE)) is False


# -- reap -------------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.redis7
def test_reap_returns_jobs_to_the_front_in_their_order(scene: Scene) -> None:
    """What a dead worker held comes back in front of everything, in the order it was leased, each charged a crash."""
    scene.lease("a", "b")
    scene.push("c", entry("u", priority=3), "d")
    scene.turn("w", 2, 2)
    scene.take_token()
    before = scene.dump()

    assert scene.run(operations.reap(scene.keys, "w")) == 4

    assert scene.since(before) == {
        "leased:w": None, "workers": None, "ready:0": ["a", "b", "c", "d"], "ready:3": ["u"],
        "state": dict.fromkeys("cbau", "1 0 1"), "wake ~3600s": ["1"],
    }  # fmt: skip
    assert scene.audit() == []


@pytest.mark.row("I8")
@pytest.mark.redis6
@pytest.mark.parametrize(
    ("state", "crashed", "after"),
    [
        (None, True, "1 0 1"), ("1 1 0\n{}", True, "2 1 1\n{}"), ("1 0 1", True, "2 0 1"), ("3 0 2\n{}\n{}", True, "4 0 2\n{}\n{}"),
        ("odd", True, "1 0 1"), (None, False, "1 0 0"), ("1 1 0\n{}", False, "2 1 0\n{}"), ("3 0 2", False, "4 0 2"),
    ],
)  # fmt: skip
def test_reap_charges(scene: Scene, state: str | None, crashed: bool, after: str | None) -> None:
    """A crash charges a start, and the first crash of a job; a leave a start, since the job may have begun."""
    scene.lease("a")
    if state:
        scene.redis.hset(scene.keys.state, "a", state)

    assert scene.run(operations.reap(scene.keys, "w", crashed=crashed)) == 1

    found = scene.redis.hget(scene.keys.state, "a")
    assert (found.decode() if found else None) == after
    assert scene.dump()["ready:0"] == ["a"]


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("end", "seen", "reaped"),
    [(-1000, 0, True), (-1000, 1, False), (-1000, -1, False), (1000, 0, False), (80_000, 0, False), (100_000, 0, True)],
)  # fmt: skip
def test_reap_compares_the_end_it_saw(scene: Scene, end: int, seen: int, reaped: bool) -> None:
    """With an end, a reap counts only for exactly that end, when it has passed or lies further off than the lease allows."""
    scene.lease("a")
    instant = scene.now() + end
    scene.redis.zadd(scene.keys.workers, {"w": instant})

    call = operations.reap(scene.keys, "w", end=instant + seen)
    if reaped:
        assert scene.run(call) == 1
        assert scene.dump()["ready:0"] == ["a"]
    else:
        with scene.unchanged():
            assert scene.run(call) == -1


def test_heartbeat_between_two_looks_saves_a_worker(scene: Scene) -> None:
    """Who beats after it was seen overdue is not reaped by who saw it."""
    scene.lease("a")
    seen = scene.now() - 1
    scene.redis.zadd(scene.keys.workers, {"w": seen})
    scene.run(operations.heartbeat(scene.keys, "w", LEASE))

    with scene.unchanged():
        assert scene.run(operations.reap(scene.keys, "w", end=seen)) == -1


def test_second_reap_finds_nobody(scene: Scene) -> None:
    """A reap sent twice returns the jobs once."""
    scene.lease("a", "b")
    assert scene.run(operations.reap(scene.keys, "w")) == 2
    with scene.unchanged():
        assert scene.run(operations.reap(scene.keys, "w")) == -1


def test_reap_of_an_idle_worker_calls_nobody(scene: Scene) -> None:
    """A reap that returns nothing leaves nothing of the worker and makes nothing takeable."""
    scene.register("w")
    assert scene.run(operations.reap(scene.keys, "w")) == 0
    assert scene.dump() == {"conf": {"schema": "1"}}


def test_reap_of_an_end_without_a_hash(scene: Scene) -> None:
    """A registration whose hash is gone is taken away too."""
    scene.redis.zadd(scene.keys.workers, {"w": 1})
    assert scene.run(operations.reap(scene.keys, "w", end=1)) == 0
    assert scene.dump() == {}


@pytest.mark.redis6
def test_reap_honours_cancel_requests(scene: Scene) -> None:
    """A job whose cancellation was asked of the dead worker ends cancelled; its neighbours come back."""
    scene.push("a", entry("b", unique="k", own_id=True))
    scene.register("w")
    scene.turn("w", 1, 2)
    scene.run(operations.cancel(scene.keys, "b"))
    scene.run(operations.await_result(scene.keys, "b", "one"))

    assert scene.run(operations.reap(scene.keys, "w")) == 1

    state = scene.dump()
    assert state["jobs"] == {"a": PLAIN}
    assert state["ready:0"] == ["a"]
    assert state["result:b ~600s"] == '{"status":"cancelled","at":now}'
    assert state["unique:i:b ~86400s"] == "b"
    assert not {"unique:k:k", "waiters"} & state.keys()
    assert scene.audit() == []


def test_reap_skips_a_job_that_is_gone(scene: Scene) -> None:
    """A leased id without an envelope is dropped with its state."""
    scene.lease("a", "b")
    scene.redis.hdel(scene.keys.jobs, "a")
    scene.redis.hset(scene.keys.state, "a", "1 1 0")

    assert scene.run(operations.reap(scene.keys, "w", crashed=False)) == 1
    assert scene.dump()["ready:0"] == ["b"]
    assert scene.audit() == []


# -- extend, held -----------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_extend(scene: Scene) -> None:
    """An extended message moves to an identity of its own with its own end; the rest stays; a repeat changes nothing."""
    scene.lease("a", "b")
    before = scene.dump()
    call = operations.extend(scene.keys, "w", "a", "x", 300_000, b"{}")

    assert scene.run(call) is True

    assert scene.since(before) == {
        "leased:w": {".turn": "1", **WORKER, "b": "1.2"},
        "leased:x": {".turn": "0", ".about": "{}", ".lease": "300000", "a": "1"},
        "workers": {"w": "now+60s", "x": "now+300s"},
    }
    with scene.unchanged():
        assert scene.run(call) is True
    assert scene.audit() == []


def test_extended_message_is_settled_by_its_own_identity_only(scene: Scene) -> None:
    """After extend the old identity has lost the message, and the new one can settle it or be reaped."""
    scene.lease("a", "b")
    for id_, identity in (("a", "x"), ("b", "y")):
        scene.run(operations.extend(scene.keys, "w", id_, identity, LEASE, b"{}"))

    assert scene.turn("w", 2, done=["a"]).lost == ["a"]
    assert scene.turn("x", 1, done=["a"], flags="kt").held == 0
    assert scene.run(operations.reap(scene.keys, "y")) == 1
    assert scene.dump()["ready:0"] == ["b"]


def test_extend_takes_the_cancel_request_along(scene: Scene) -> None:
    """A cancellation asked of the worker is asked of the identity the message moved to."""
    scene.lease("a", "b")
    scene.run(operations.cancel(scene.keys, "a"))
    scene.run(operations.extend(scene.keys, "w", "a", "x", LEASE, b"{}"))

    assert scene.turn("w", 2).cancelled == []
    assert scene.turn("x", 1).cancelled == ["a"]


def test_extend_of_what_is_not_held(scene: Scene) -> None:
    """What the worker does not hold cannot be extended."""
    scene.lease("a")
    scene.push("b")
    with scene.unchanged():
        for worker, id_ in (("w", "b"), ("nobody", "a")):
            assert scene.run(operations.extend(scene.keys, worker, id_, "x", LEASE, b"{}")) is False


@pytest.mark.parametrize("asked", [False, True])
def test_held_ids(scene: Scene, asked: bool) -> None:
    """What a worker holds is listed without what else its hash holds."""
    scene.lease("a", "b")
    if asked:
        scene.run(operations.cancel(scene.keys, "a"))

    with scene.unchanged():
        assert sorted(scene.run(operations.held_ids(scene.keys, "w"))) == ["a", "b"]
        assert scene.run(operations.held_ids(scene.keys, "nobody")) == []


@pytest.mark.parametrize("number", [8, 20])
def test_reap_of_many_turns(scene: Scene, number: int) -> None:
    """The order over many turns is kept, whatever was settled in between."""
    ids = [f"{n:02}" for n in range(number * 2)]
    scene.push(*ids)
    scene.register("w")
    done: list[Any] = []
    for turn in range(1, number + 1):
        done = scene.turn("w", turn, 2, done=done[:1]).ids

    left = [id_ for n, id_ in enumerate(ids) if n % 2 or n == len(ids) - 2]
    assert scene.run(operations.reap(scene.keys, "w", crashed=False)) == len(left)
    assert scene.dump()["ready:0"] == left
