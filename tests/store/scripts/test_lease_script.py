"""turn.lua, the half that leases: order, what is dropped, promotion, repeats, waking others."""

from __future__ import annotations

import pytest

from conveyor.store import operations
from conveyor.store.operations import Settlement, StaleTurn, WorkerUnregistered
from support.seeded_queue import LEASE, PLAIN, WORKER, SeededQueue, entry


@pytest.mark.redis6
@pytest.mark.redis7
def test_lease(seeded: SeededQueue) -> None:
    """A turn moves ids from ready into the worker's hash with their place in it, and changes nothing else."""
    seeded.push("a", "b", "c")
    seeded.register("w")
    before = seeded.dump()

    turn = seeded.turn("w", 1, 2)

    assert (turn.ids, turn.envelopes, turn.held, turn.lost) == (["a", "b"], [PLAIN.encode()] * 2, 2, [])
    assert seeded.since(before) == {"leased:w": {".turn": "1", **WORKER, "a": "1.1", "b": "1.2"}, "ready:0": ["c"]}


@pytest.mark.redis6
def test_order_is_by_priority_then_age(seeded: SeededQueue) -> None:
    """Higher priorities come first, and within one the order of the pushes holds, also over several turns."""
    seeded.push("a", entry("b", priority=9), entry("c", priority=1), "d", entry("e", priority=9))
    seeded.register("w")

    assert seeded.turn("w", 1, 3).ids == ["b", "e", "c"]
    seeded.push(entry("f", priority=2))
    assert seeded.turn("w", 2, 3).ids == ["f", "a", "d"]


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("want", [1000, 5000, 10**9])
def test_a_worker_holds_a_thousand_at_most(seeded: SeededQueue, want: int) -> None:
    """However much is asked for, a worker never holds more than 1,000 jobs, over any number of turns."""
    seeded.push(*[f"{n:04}" for n in range(1200)])
    seeded.register("w")

    assert len(seeded.turn("w", 1, 700).ids) == 700
    assert seeded.turn("w", 2, want).held == 1000
    full = seeded.turn("w", 3, want)
    assert (full.ids, full.held, full.more) == ([], 1000, True)
    assert seeded.redis.llen(seeded.keys.ready[0]) == 200


@pytest.mark.parametrize("want", [0, -5])
def test_no_room_leases_nothing(seeded: SeededQueue, want: int) -> None:
    """A turn without room renews the lease and takes nothing."""
    seeded.push("a")
    seeded.register("w")
    before = seeded.dump()

    turn = seeded.turn("w", 1, want)

    assert (turn.ids, turn.more) == ([], True)
    assert seeded.since(before) == {"leased:w": {".turn": "1", **WORKER}}


@pytest.mark.redis6
def test_expired_job_is_dropped(seeded: SeededQueue) -> None:
    """A job past its expiry is never leased: it ends cancelled, gives back its keys, and the next one is taken."""
    seeded.push(entry("a", expires_ms=0, unique="k", own_id=True), "b")
    seeded.register("w")
    before = seeded.dump()

    assert seeded.turn("w", 1, 1).ids == ["b"]

    assert seeded.since(before) == {
        "jobs": {"b": PLAIN},
        "leased:w": {".turn": "1", **WORKER, "b": "1.1"},
        "ready:0": None,
        "result:a ~600s": '{"status":"cancelled","reason":"expired","at":now}',
        "unique:i:a": None,
        "unique:i:a ~86400s": "a",
        "unique:k:k": None,
    }


def test_expiry_in_the_future_is_kept(seeded: SeededQueue) -> None:
    """A job before its expiry is leased like any other."""
    seeded.push(entry("a", expires_ms=60_000))
    seeded.register("w")

    assert seeded.turn("w", 1, 1).ids == ["a"]


@pytest.mark.redis6
@pytest.mark.redis7
def test_stub_is_dropped_when_reached(seeded: SeededQueue) -> None:
    """The entry of a cancelled job is dropped by the turn that reaches it, and the count of stubs falls."""
    seeded.push("a", "b", "c")
    for id_ in ("a", "b"):
        seeded.run(operations.cancel(seeded.keys, id_))
    seeded.register("w")
    assert seeded.dump()["conf"] == {"schema": "2", "stubs": "2"}

    assert seeded.turn("w", 1, 1).ids == ["c"]

    assert seeded.dump()["conf"] == {"schema": "2", "stubs": "0"}
    assert seeded.redis.hkeys(seeded.keys.jobs) == [b"c"]
    assert seeded.audit() == []


def test_entry_without_a_job_is_dropped(seeded: SeededQueue) -> None:
    """An entry whose envelope is gone is dropped when it is reached."""
    seeded.push("a", "b")
    seeded.redis.hdel(seeded.keys.jobs, "a")
    seeded.register("w")

    assert seeded.turn("w", 1, 1).ids == ["b"]
    assert seeded.audit() == []


def test_states_come_with_the_jobs(seeded: SeededQueue) -> None:
    """A job that is not fresh arrives with its state, a fresh one beside it with none."""
    seeded.push("a", "b")
    seeded.redis.hset(seeded.keys.state, "b", "2 1 1\n{}")
    seeded.register("w")

    assert seeded.turn("w", 1, 2).states == [None, b"2 1 1\n{}"]


# -- due jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_due_jobs_join_the_tail_in_the_order_of_their_instants(seeded: SeededQueue) -> None:
    """Due jobs join their priority's tail, earliest first; those of later stay."""
    seeded.push(*[entry(id_, delay_ms=60_000, priority=int(id_ == "p")) for id_ in ("x", "y", "z", "p", "later")])
    seeded.redis.zadd(seeded.keys.due, {"x": 3, "y": 1, "z": 2, "p": 4})
    seeded.push("old")
    seeded.register("w")

    turn = seeded.turn("w", 1, 3)

    assert turn.ids == ["p", "old", "y"]
    assert turn.next_due is not None
    assert 50_000 < turn.next_due - turn.now <= 60_000
    state = seeded.dump()
    assert state["ready:0"] == ["z", "x"]
    assert state["due"] == {"later": "now+60s"}


@pytest.mark.row("D9", "I12")
@pytest.mark.redis6
def test_promotion_is_bounded(seeded: SeededQueue) -> None:
    """A turn promotes at most 200 due jobs and tells that the next one is due already."""
    seeded.push(*[entry(f"{n:03}", delay_ms=60_000) for n in range(450)])
    seeded.redis.zadd(seeded.keys.due, {f"{n:03}": n + 1 for n in range(450)})
    seeded.register("w")

    turn = seeded.turn("w", 1, 1000)

    assert turn.ids == [f"{n:03}" for n in range(200)]
    assert turn.next_due == 201
    assert seeded.turn("w", 2, 1000).ids == [f"{n:03}" for n in range(200, 400)]


def test_due_entry_without_a_job_is_dropped(seeded: SeededQueue) -> None:
    """A due id whose envelope is gone does not become an entry."""
    seeded.redis.zadd(seeded.keys.due, {"ghost": 1})
    seeded.register("w")

    turn = seeded.turn("w", 1, 1)

    assert (turn.ids, turn.next_due) == ([], None)
    assert seeded.audit() == []


# -- repeats, late copies, strangers ----------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.redis7
def test_repeat_gets_the_same_jobs(seeded: SeededQueue) -> None:
    """The same number again gets the same jobs in the same order and changes nothing."""
    seeded.push("a", entry("b", priority=3), "c", "d")
    seeded.redis.hset(seeded.keys.state, "c", "1 1 0")
    seeded.register("w")
    call = seeded.turn_call("w", 1, 3)
    first = seeded.run(call)

    with seeded.unchanged():
        again = seeded.run(call)

    assert (again.ids, again.envelopes, again.states) == (first.ids, first.envelopes, first.states)
    assert (again.ids, again.held, again.lost) == (["b", "a", "c"], 3, [])


@pytest.mark.parametrize("kind", ["done", "D", "X", "C", "R", "F", "M"])
def test_repeat_does_not_settle_again(seeded: SeededQueue, kind: str) -> None:
    """A repeated settlement counts as done, whatever became of the job meanwhile, and changes nothing."""
    seeded.lease("a", "b")
    others = [] if kind == "done" else [Settlement(kind, "a", ms=60_000, state=b"1 1 0")]
    call = seeded.turn_call("w", 2, 0, done=["a"] if kind == "done" else [], others=others)
    seeded.run(call)

    with seeded.unchanged():
        again = seeded.run(call)

    assert again.lost == []
    assert again.held == (2 if kind == "M" else 1)


def test_repeat_knows_cancel_requests_from_jobs(seeded: SeededQueue) -> None:
    """The number of jobs held is exact with and without a cancel request, in a repeat too."""
    seeded.lease("a", "b")
    seeded.run(operations.cancel(seeded.keys, "b"))
    call = seeded.turn_call("w", 2, 0)
    first = seeded.run(call)

    assert (first.held, first.cancelled) == (2, ["b"])
    assert seeded.run(call).held == 2


@pytest.mark.redis6
@pytest.mark.redis7
def test_late_copy_of_a_turn_changes_nothing(seeded: SeededQueue) -> None:
    """A lower number than the last is refused: it neither settles nor leases."""
    seeded.lease("a")
    seeded.push("b")
    late = seeded.turn_call("w", 2, 5, done=["a"])
    seeded.turn("w", 3)

    with seeded.unchanged(), pytest.raises(StaleTurn):
        seeded.run(late)


@pytest.mark.redis6
@pytest.mark.redis7
def test_reaped_worker_changes_nothing(seeded: SeededQueue) -> None:
    """A worker that was reaped is told so, and neither settles nor leases, even with the job leased by another."""
    seeded.lease("a")
    seeded.run(operations.reap(seeded.keys, "w"))
    seeded.register("other")
    seeded.turn("other", 1, 1)
    seeded.push("b")

    stale = [Settlement(kind, "a", state=b"9 9 9") for kind in "DXCRFM"]
    for turn in (seeded.turn_call("w", 2, 5, done=["a"]), seeded.turn_call("w", 3, 5, others=stale)):
        with seeded.unchanged(), pytest.raises(WorkerUnregistered):
            seeded.run(turn)
    with seeded.unchanged():
        assert seeded.run(operations.heartbeat(seeded.keys, "w", LEASE)) is False
        assert seeded.run(operations.extend(seeded.keys, "w", "a", "x", LEASE, b"{}")) is False


def test_stranger_is_unregistered(seeded: SeededQueue) -> None:
    """A worker that never registered gets nothing."""
    seeded.push("a")
    with seeded.unchanged(), pytest.raises(WorkerUnregistered):
        seeded.turn("nobody", 1, 1)


# -- waking another worker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "due", "want", "token"),
    [(0, False, 2, False), (0, False, 3, False), (1, False, 2, True), (0, True, 2, True), (0, True, 3, False), (3, True, 0, True)],
)  # fmt: skip
def test_turn_wakes_another_worker(seeded: SeededQueue, left: int, due: bool, want: int, token: bool) -> None:
    """A worker that got all it wanted wakes another while ready or scheduled jobs remain; one with room watches the clock itself."""
    seeded.push(*[str(n) for n in range(left if want == 0 else 2 + left)])
    if due:
        seeded.push(entry("later", delay_ms=60_000))
    seeded.take_token()
    seeded.register("w")

    turn = seeded.turn("w", 1, want)

    assert seeded.take_token() is token
    assert (turn.next_due is not None) is due


def test_no_second_token(seeded: SeededQueue) -> None:
    """A second token is not added."""
    seeded.push("a", "b")
    seeded.register("w")
    seeded.turn("w", 1, 1)

    assert seeded.take_token()
    assert not seeded.take_token()


def test_worker_that_leaves_wakes_another(seeded: SeededQueue) -> None:
    """A worker that leaves does not watch the clock, though it had room: it wakes another."""
    seeded.push(entry("later", delay_ms=60_000))
    seeded.take_token()
    seeded.register("w")

    seeded.turn("w", 1, 5, flags="t")

    assert seeded.take_token()


@pytest.mark.row("D19")
def test_paused_queue(seeded: SeededQueue) -> None:
    """A paused queue leases nothing, wakes no worker, and still settles; resuming wakes a worker."""
    seeded.lease("a")
    seeded.push("b", entry("later", delay_ms=60_000))
    seeded.pause()

    turn = seeded.turn("w", 2, 5, done=["a"])

    assert (turn.ids, turn.paused, turn.held, turn.next_due) == ([], True, 0, None)
    assert not seeded.take_token()
    seeded.run(operations.configure(seeded.keys, "paused", ""))
    assert seeded.take_token()
    assert seeded.turn("w", 3, 5).ids == ["b"]


def test_jobs_come_due_while_paused(seeded: SeededQueue) -> None:
    """A turn on a paused queue moves due jobs to ready, where they wait."""
    seeded.push(entry("a", delay_ms=60_000))
    seeded.redis.zadd(seeded.keys.due, {"a": 1})
    seeded.pause()
    seeded.register("w")

    assert seeded.turn("w", 1, 5).ids == []
    assert seeded.dump()["ready:0"] == ["a"]


# -- flags ------------------------------------------------------------------------------------------------------------


def test_turn_renews_the_lease_unless_told_not_to(seeded: SeededQueue) -> None:
    """A turn renews as a beat does; with k it leaves the end as it is."""
    seeded.register("w")
    seeded.redis.zadd(seeded.keys.workers, {"w": seeded.now() + 20_000})
    seeded.turn("w", 1, flags="k")
    assert seeded.dump()["workers"] == {"w": "now+20s"}

    seeded.turn("w", 2)
    assert seeded.dump()["workers"] == {"w": "now+60s"}


@pytest.mark.redis6
def test_leaving(seeded: SeededQueue) -> None:
    """With t a worker that holds nothing goes; a repeat is still answered, and any other call finds it gone."""
    seeded.lease("a")
    seeded.push("b")
    call = seeded.turn_call("w", 2, 0, done=["a"], flags="t")
    seeded.run(call)

    state = seeded.dump()
    assert "workers" not in state
    assert state["leased:w ~10s"] == {".turn": "2", **WORKER, ".left": "1"}
    assert seeded.run(call).held == 0
    with seeded.unchanged():
        with pytest.raises(WorkerUnregistered):
            seeded.turn("w", 3, 1)
        assert seeded.run(operations.heartbeat(seeded.keys, "w", LEASE)) is False


def test_leaving_waits_for_what_is_held(seeded: SeededQueue) -> None:
    """With t a worker that still holds something stays."""
    seeded.lease("a", "b")
    seeded.turn("w", 2, done=["a"], flags="t")

    assert seeded.dump()["workers"] == {"w": "now+60s"}


@pytest.mark.redis6
def test_look_finds_the_overdue(seeded: SeededQueue) -> None:
    """With l a turn reports who ends within half a lease, and whose end lies further ahead than its own lease allows."""
    seeded.register("soon", "fine", "ahead", "w")
    seeded.register("long", lease_ms=500_000)
    now = seeded.now()
    seeded.redis.zadd(seeded.keys.workers, {"soon": now + 20_000, "ahead": now + 400_000})

    turn = seeded.turn("w", 1, flags="l")

    assert [worker for worker, _ in turn.overdue] == ["soon", "ahead"]
    assert dict(turn.overdue)["soon"] == now + 20_000
    assert seeded.turn("w", 2).overdue == []


def test_look_trims_old_dead_letters(seeded: SeededQueue) -> None:
    """With l a turn removes dead letters of more than 90 days, with their envelopes and states."""
    seeded.add_dead("old", "new")
    seeded.redis.zadd(seeded.keys.dead, {"old": seeded.now() - 91 * 86_400_000})
    seeded.register("w")

    seeded.turn("w", 1, flags="l")

    assert seeded.redis.hkeys(seeded.keys.jobs) == [b"new"]
    assert seeded.redis.hkeys(seeded.keys.state) == [b"new"]
    assert seeded.audit() == []
