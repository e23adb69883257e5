"""turn.lua, the half that leases: order, what is dropped, promotion, repeats, waking others."""

from __future__ import annotations

import pytest

from conveyor.store import operations
from conveyor.store.operations import Settlement, StaleTurn, WorkerUnregistered
from support.seeded_queue import LEASE, PLAIN, WORKER, Scene, entry


@pytest.mark.redis6
@pytest.mark.redis7
def test_lease(scene: Scene) -> None:
    """A turn moves ids from ready into the worker's hash with their place in it, and changes nothing else."""
    scene.push("a", "b", "c")
    scene.register("w")
    before = scene.dump()

    turn = scene.turn("w", 1, 2)

    assert (turn.ids, turn.envelopes, turn.held, turn.lost) == (["a", "b"], [PLAIN.encode()] * 2, 2, [])
    assert scene.since(before) == {"leased:w": {".turn": "1", **WORKER, "a": "1.1", "b": "1.2"}, "ready:0": ["c"]}


@pytest.mark.redis6
def test_order_is_by_priority_then_age(scene: Scene) -> None:
    """Higher priorities come first, and within one the order of the pushes holds, also over several turns."""
    scene.push("a", entry("b", priority=9), entry("c", priority=1), "d", entry("e", priority=9))
    scene.register("w")

    assert scene.turn("w", 1, 3).ids == ["b", "e", "c"]
    scene.push(entry("f", priority=2))
    assert scene.turn("w", 2, 3).ids == ["f", "a", "d"]


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("want", [1000, 5000, 10**9])
def test_a_worker_holds_a_thousand_at_most(scene: Scene, want: int) -> None:
    """However much is asked for, a worker never holds more than 1,000 jobs, over any number of turns."""
    scene.push(*[f"{n:04}" for n in range(1200)])
    scene.register("w")

    assert len(scene.turn("w", 1, 700).ids) == 700
    assert scene.turn("w", 2, want).held == 1000
    full = scene.turn("w", 3, want)
    assert (full.ids, full.held, full.more) == ([], 1000, True)
    assert scene.redis.llen(scene.keys.ready[0]) == 200


@pytest.mark.parametrize("want", [0, -5])
def test_no_room_leases_nothing(scene: Scene, want: int) -> None:
    """A turn without room renews the lease and takes nothing."""
    scene.push("a")
    scene.register("w")
    before = scene.dump()

    turn = scene.turn("w", 1, want)

    assert (turn.ids, turn.more) == ([], True)
    assert scene.since(before) == {"leased:w": {".turn": "1", **WORKER}}


@pytest.mark.redis6
def test_expired_job_is_dropped(scene: Scene) -> None:
    """A job past its expiry is never leased: it ends cancelled, gives back its keys, and the next one is taken."""
    scene.push(entry("a", expires_ms=0, unique="k", own_id=True), "b")
    scene.register("w")
    before = scene.dump()

    assert scene.turn("w", 1, 1).ids == ["b"]

    assert scene.since(before) == {
        "jobs": {"b": PLAIN},
        "leased:w": {".turn": "1", **WORKER, "b": "1.1"},
        "ready:0": None,
        "result:a ~600s": '{"status":"cancelled","reason":"expired","at":now}',
        "unique:i:a": None,
        "unique:i:a ~86400s": "a",
        "unique:k:k": None,
    }


def test_expiry_in_the_future_is_kept(scene: Scene) -> None:
    """A job before its expiry is leased like any other."""
    scene.push(entry("a", expires_ms=60_000))
    scene.register("w")

    assert scene.turn("w", 1, 1).ids == ["a"]


@pytest.mark.redis6
@pytest.mark.redis7
def test_stub_is_dropped_when_reached(scene: Scene) -> None:
    """The entry of a cancelled job is dropped by the turn that reaches it, and the count of stubs falls."""
    scene.push("a", "b", "c")
    for id_ in ("a", "b"):
        scene.run(operations.cancel(scene.keys, id_))
    scene.register("w")
    assert scene.dump()["conf"] == {"schema": "1", "stubs": "2"}

    assert scene.turn("w", 1, 1).ids == ["c"]

    assert scene.dump()["conf"] == {"schema": "1", "stubs": "0"}
    assert scene.redis.hkeys(scene.keys.jobs) == [b"c"]
    assert scene.audit() == []


def test_entry_without_a_job_is_dropped(scene: Scene) -> None:
    """An entry whose envelope is gone is dropped when it is reached."""
    scene.push("a", "b")
    scene.redis.hdel(scene.keys.jobs, "a")
    scene.register("w")

    assert scene.turn("w", 1, 1).ids == ["b"]
    assert scene.audit() == []


def test_states_come_with_the_jobs(scene: Scene) -> None:
    """A job that is not fresh arrives with its state, a fresh one beside it with none."""
    scene.push("a", "b")
    scene.redis.hset(scene.keys.state, "b", "2 1 1\n{}")
    scene.register("w")

    assert scene.turn("w", 1, 2).states == [None, b"2 1 1\n{}"]


# -- due jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_due_jobs_join_the_tail_in_the_order_of_their_instants(scene: Scene) -> None:
    """Due jobs join their priority's tail, earliest first; those of later stay."""
    scene.push(*[entry(id_, delay_ms=60_000, priority=int(id_ == "p")) for id_ in ("x", "y", "z", "p", "later")])
    scene.redis.zadd(scene.keys.due, {"x": 3, "y": 1, "z": 2, "p": 4})
    scene.push("old")
    scene.register("w")

    turn = scene.turn("w", 1, 3)

    assert turn.ids == ["p", "old", "y"]
    assert turn.next_due is not None
    assert 50_000 < turn.next_due - turn.now <= 60_000
    state = scene.dump()
    assert state["ready:0"] == ["z", "x"]
    assert state["due"] == {"later": "now+60s"}


@pytest.mark.row("D9", "I12")
@pytest.mark.redis6
def test_promotion_is_bounded(scene: Scene) -> None:
    """A turn promotes at most 200 due jobs and tells that the next one is due already."""
    scene.push(*[entry(f"{n:03}", delay_ms=60_000) for n in range(450)])
    scene.redis.zadd(scene.keys.due, {f"{n:03}": n + 1 for n in range(450)})
    scene.register("w")

    turn = scene.turn("w", 1, 1000)

    assert turn.ids == [f"{n:03}" for n in range(200)]
    assert turn.next_due == 201
    assert scene.turn("w", 2, 1000).ids == [f"{n:03}" for n in range(200, 400)]


def test_due_entry_without_a_job_is_dropped(scene: Scene) -> None:
    """A due id whose envelope is gone does not become an entry."""
    scene.redis.zadd(scene.keys.due, {"ghost": 1})
    scene.register("w")

    turn = scene.turn("w", 1, 1)

    assert (turn.ids, turn.next_due) == ([], None)
    assert scene.audit() == []


# -- repeats, late copies, strangers ----------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.redis7
def test_repeat_gets_the_same_jobs(scene: Scene) -> None:
    """The same number again gets the same jobs in the same order and changes nothing."""
    scene.push("a", entry("b", priority=3), "c", "d")
    scene.redis.hset(scene.keys.state, "c", "1 1 0")
    scene.register("w")
    call = scene.turn_call("w", 1, 3)
    first = scene.run(call)

    with scene.unchanged():
        again = scene.run(call)

    assert (again.ids, again.envelopes, again.states) == (first.ids, first.envelopes, first.states)
    assert (again.ids, again.held, again.lost) == (["b", "a", "c"], 3, [])


@pytest.mark.parametrize("kind", ["done", "D", "X", "C", "R", "F", "M"])
def test_repeat_does_not_settle_again(scene: Scene, kind: str) -> None:
    """A repeated settlement counts as done, whatever became of the job meanwhile, and changes nothing."""
    scene.lease("a", "b")
    others = [] if kind == "done" else [Settlement(kind, "a", ms=60_000, state=b"1 1 0")]
    call = scene.turn_call("w", 2, 0, done=["a"] if kind == "done" else [], others=others)
    scene.run(call)

    with scene.unchanged():
        again = scene.run(call)

    assert again.lost == []
    assert again.held == (2 if kind == "M" else 1)


def test_repeat_knows_cancel_requests_from_jobs(scene: Scene) -> None:
    """The number of jobs held is exact with and without a cancel request, in a repeat too."""
    scene.lease("a", "b")
    scene.run(operations.cancel(scene.keys, "b"))
    call = scene.turn_call("w", 2, 0)
    first = scene.run(call)

    assert (first.held, first.cancelled) == (2, ["b"])
    assert scene.run(call).held == 2


@pytest.mark.redis6
@pytest.mark.redis7
def test_late_copy_of_a_turn_changes_nothing(scene: Scene) -> None:
    """A lower number than the last is refused: it neither settles nor leases."""
    scene.lease("a")
    scene.push("b")
    late = scene.turn_call("w", 2, 5, done=["a"])
    scene.turn("w", 3)

    with scene.unchanged(), pytest.raises(StaleTurn):
        scene.run(late)


@pytest.mark.redis6
@pytest.mark.redis7
def test_reaped_worker_changes_nothing(scene: Scene) -> None:
    """A worker that was reaped is told so, and neither settles nor leases, even with the job leased by another."""
    scene.lease("a")
    scene.run(operations.reap(scene.keys, "w"))
    scene.register("other")
    scene.turn("other", 1, 1)
    scene.push("b")

    stale = [Settlement(kind, "a", state=b"9 9 9") for kind in "DXCRFM"]
    for turn in (scene.turn_call("w", 2, 5, done=["a"]), scene.turn_call("w", 3, 5, others=stale)):
        with scene.unchanged(), pytest.raises(WorkerUnregistered):
            scene.run(turn)
    with scene.unchanged():
        assert scene.run(operations.heartbeat(scene.keys, "w", LEASE)) is False
        assert scene.run(operations.extend(scene.keys, "w", "a", "x", LEASE, b"{}")) is False


def test_stranger_is_unregistered(scene: Scene) -> None:
    """A worker that never registered gets nothing."""
    scene.push("a")
    with scene.unchanged(), pytest.raises(WorkerUnregistered):
        scene.turn("nobody", 1, 1)


# -- waking another worker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "due", "want", "token"),
    [(0, False, 2, False), (0, False, 3, False), (1, False, 2, True), (0, True, 2, True), (0, True, 3, False), (3, True, 0, True)],
)  # fmt: skip
def test_turn_wakes_another_worker(scene: Scene, left: int, due: bool, want: int, token: bool) -> None:
    """A worker that got all it wanted wakes another while ready or scheduled jobs remain; one with room watches the clock itself."""
    scene.push(*[str(n) for n in range(left if want == 0 else 2 + left)])
    if due:
        scene.push(entry("later", delay_ms=60_000))
    scene.take_token()
    scene.register("w")

    turn = scene.turn("w", 1, want)

    assert scene.take_token() is token
    assert (turn.next_due is not None) is due


def test_no_second_token(scene: Scene) -> None:
    """A second token is not added."""
    scene.push("a", "b")
    scene.register("w")
    scene.turn("w", 1, 1)

    assert scene.take_token()
    assert not scene.take_token()


def test_worker_that_leaves_wakes_another(scene: Scene) -> None:
    """A worker that leaves does not watch the clock, though it had room: it wakes another."""
    scene.push(entry("later", delay_ms=60_000))
    scene.take_token()
    scene.register("w")

    scene.turn("w", 1, 5, flags="t")

    assert scene.take_token()


@pytest.mark.row("D19")
def test_paused_queue(scene: Scene) -> None:
    """A paused queue leases nothing, wakes no worker, and still settles; resuming wakes a worker."""
    scene.lease("a")
    scene.push("b", entry("later", delay_ms=60_000))
    scene.pause()

    turn = scene.turn("w", 2, 5, done=["a"])

    assert (turn.ids, turn.paused, turn.held, turn.next_due) == ([], True, 0, None)
    assert not scene.take_token()
    scene.run(operations.configure(scene.keys, "paused", ""))
    assert scene.take_token()
    assert scene.turn("w", 3, 5).ids == ["b"]


def test_jobs_come_due_while_paused(scene: Scene) -> None:
    """A turn on a paused queue moves due jobs to ready, where they wait."""
    scene.push(entry("a", delay_ms=60_000))
    scene.redis.zadd(scene.keys.due, {"a": 1})
    scene.pause()
    scene.register("w")

    assert scene.turn("w", 1, 5).ids == []
    assert scene.dump()["ready:0"] == ["a"]


# -- flags ------------------------------------------------------------------------------------------------------------


def test_turn_renews_the_lease_unless_told_not_to(scene: Scene) -> None:
    """A turn renews as a beat does; with k it leaves the end as it is."""
    scene.register("w")
    scene.redis.zadd(scene.keys.workers, {"w": scene.now() + 20_000})
    scene.turn("w", 1, flags="k")
    assert scene.dump()["workers"] == {"w": "now+20s"}

    scene.turn("w", 2)
    assert scene.dump()["workers"] == {"w": "now+60s"}


@pytest.mark.redis6
def test_leaving(scene: Scene) -> None:
    """With t a worker that holds nothing goes; a repeat is still answered, and any other call finds it gone."""
    scene.lease("a")
    scene.push("b")
    call = scene.turn_call("w", 2, 0, done=["a"], flags="t")
    scene.run(call)

    state = scene.dump()
    assert "workers" not in state
    assert state["leased:w ~10s"] == {".turn": "2", **WORKER, ".left": "1"}
    assert scene.run(call).held == 0
    with scene.unchanged():
        with pytest.raises(WorkerUnregistered):
            scene.turn("w", 3, 1)
        assert scene.run(operations.heartbeat(scene.keys, "w", LEASE)) is False


def test_leaving_waits_for_what_is_held(scene: Scene) -> None:
    """With t a worker that still holds something stays."""
    scene.lease("a", "b")
    scene.turn("w", 2, done=["a"], flags="t")

    assert scene.dump()["workers"] == {"w": "now+60s"}


@pytest.mark.redis6
def test_look_finds_the_overdue(scene: Scene) -> None:
    """With l a turn reports who ends within half a lease, and whose end lies further ahead than its own lease allows."""
    scene.register("soon", "fine", "ahead", "w")
    scene.register("long", lease_ms=500_000)
    now = scene.now()
    scene.redis.zadd(scene.keys.workers, {"soon": now + 20_000, "ahead": now + 400_000})

    turn = scene.turn("w", 1, flags="l")

    assert [worker for worker, _ in turn.overdue] == ["soon", "ahead"]
    assert dict(turn.overdue)["soon"] == now + 20_000
    assert scene.turn("w", 2).overdue == []


def test_look_trims_old_dead_letters(scene: Scene) -> None:
    """With l a turn removes dead letters of more than 90 days, with their envelopes and states."""
    scene.bury("old", "new")
    scene.redis.zadd(scene.keys.dead, {"old": scene.now() - 91 * 86_400_000})
    scene.register("w")

    scene.turn("w", 1, flags="l")

    assert scene.redis.hkeys(scene.keys.jobs) == [b"new"]
    assert scene.redis.hkeys(scene.keys.state) == [b"new"]
    assert scene.audit() == []
