"""turn.lua, the half that settles: what each kind leaves behind."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor.store import operations
from conveyor.store.operations import Settlement, TurnReport
from support.seeded_queue import PLAIN, WORKER, Scene, entry

LEASED_B = {".turn": "2", **WORKER, "b": "1.2"}


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize(
    ("settlement", "changes"),
    [
        (None, {"jobs": {"b": PLAIN}, "leased:w": LEASED_B}),
        (
            Settlement("D", "a", ms=60_000, record=b"{}"),
            {"jobs": {"b": PLAIN}, "leased:w": LEASED_B, "result:a ~60s": "{}"},
        ),
        (Settlement("D", "a"), {"jobs": {"b": PLAIN}, "leased:w": LEASED_B}),
        (
            Settlement("C", "a", ms=60_000, record=b"c"),
            {"jobs": {"b": PLAIN}, "leased:w": LEASED_B, "result:a ~60s": "c"},
        ),
        (
            Settlement("R", "a", ms=60_000, state=b"1 1 0\n{}"),
            {"leased:w": LEASED_B, "due": {"a": "now+60s"}, "state": {"a": "1 1 0\n{}"}, "wake ~3600s": ["1"]},
        ),
        (
            Settlement("F", "a", state=b"1 0 0"),
            {"leased:w": LEASED_B, "ready:0": ["a"], "state": {"a": "1 0 0"}, "wake ~3600s": ["1"]},
        ),
        (Settlement("F", "a"), {"leased:w": LEASED_B, "ready:0": ["a"], "wake ~3600s": ["1"]}),
        (
            Settlement("X", "a", record=b"{}", state=b"1 1 0\n{}"),
            {"leased:w": LEASED_B, "dead": {"a": "now"}, "state": {"a": "1 1 0\n{}"}},
        ),
        (
            Settlement("M", "a", state=b"1 0 1"),
            {"leased:w": {**LEASED_B, "a": "1.1"}, "state": {"a": "1 0 1"}},
        ),
    ],
)  # fmt: skip
def test_settlement(scene: Scene, settlement: Settlement | None, changes: dict[str, Any]) -> None:
    """Each kind of settlement leaves exactly what the header of turn.lua says."""
    scene.lease("a", "b")
    before = scene.dump()

    turn = scene.turn("w", 2, done=[] if settlement else ["a"], others=[settlement] if settlement else [])

    assert (turn.lost, turn.ids) == ([], [])
    assert turn.held == (2 if settlement and settlement.kind == "M" else 1)
    assert scene.since(before) == changes
    assert scene.audit() == []


@pytest.mark.row("I6")
@pytest.mark.redis6
@pytest.mark.parametrize("kind", ["done", "D", "C", "X", "R", "F", "M"])
def test_lost_lease_is_told_and_ignored(scene: Scene, kind: str) -> None:
    """A settlement of a job the worker does not hold changes nothing and is listed as lost, whoever holds it."""
    scene.lease("a", worker="other")
    scene.register("w")
    before = scene.dump()
    others = [] if kind == "done" else [Settlement(kind, "a", ms=60_000, record=b"r", state=b"9 9 9")]

    turn = scene.turn("w", 1, done=["a", "ghost"] if kind == "done" else [], others=others)

    assert turn.lost == (["a", "ghost"] if kind == "done" else ["a"])
    assert scene.since(before) == {"leased:w": {".turn": "1", **WORKER}}


@pytest.mark.redis6
def test_lost_and_held_in_one_report(scene: Scene) -> None:
    """Of a report, what is held is settled and what is not is told, over the limit of unpack too."""
    ids = [f"{n:03}" for n in range(900)]
    scene.lease(*ids)
    ghosts = [f"ghost-{n}" for n in range(7500)]

    turn = scene.turn("w", 2, done=[*ghosts, *ids])

    assert turn.lost == ghosts
    assert (turn.held, scene.redis.hlen(scene.keys.jobs)) == (0, 0)


@pytest.mark.row("I7")
@pytest.mark.parametrize("second", ["D", "X", "R", "F", "M"])
def test_one_job_has_one_outcome(scene: Scene, second: str) -> None:
    """Of two settlements of one job in a report the first counts."""
    scene.lease("a")
    before = scene.dump()
    others = [Settlement("D", "a", ms=60_000, record=b"first"), Settlement(second, "a", ms=60_000, state=b"1 1 0")]

    scene.turn("w", 2, others=others)

    assert scene.since(before) == {
        "jobs": None, "leased:w": {".turn": "2", **WORKER}, "result:a ~60s": "first",
    }  # fmt: skip


@pytest.mark.row("D12")
@pytest.mark.parametrize("kind", ["D", "C", "X"])
def test_end_gives_back_the_unique_key(scene: Scene, kind: str) -> None:
    """Whatever ends a job gives its unique key back at once and keeps its own id for a day."""
    scene.push(entry("a", unique="k", own_id=True))
    scene.register("w")
    scene.turn("w", 1, 1)

    scene.turn("w", 2, others=[Settlement(kind, "a", state=b"1 1 0", unique="k", own_id=True)])

    state = scene.dump()
    assert "unique:k:k" not in state
    assert state["unique:i:a ~86400s"] == "a"


@pytest.mark.parametrize("kind", ["R", "F", "M"])
def test_going_on_keeps_the_unique_key(scene: Scene, kind: str) -> None:
    """A job that goes on keeps its unique key and its id."""
    scene.push(entry("a", unique="k", own_id=True))
    scene.register("w")
    scene.turn("w", 1, 1)
    before = scene.dump()

    scene.turn("w", 2, others=[Settlement(kind, "a", ms=60_000, state=b"1 1 0", unique="k", own_id=True)])

    changed = scene.since(before)
    assert [key for key in changed if key.startswith("unique")] == []


@pytest.mark.row("I13")
def test_key_that_another_holds_is_not_given_back(scene: Scene) -> None:
    """A job gives back a unique key only while it holds it itself."""
    scene.push(entry("a", unique="k"))
    scene.register("w")
    scene.turn("w", 1, 1)
    scene.redis.set(scene.keys.prefix + "unique:k:k", "other")

    scene.turn("w", 2, others=[Settlement("D", "a", unique="k")])

    assert scene.dump()["unique:k:k"] == "other"


def test_returned_jobs_come_first_in_their_own_priority(scene: Scene) -> None:
    """F puts a job to the front of its priority; given newest first, the order is the old one."""
    scene.push(entry("a", priority=2), "b", "c", "d")
    scene.register("w")
    assert scene.turn("w", 1, 3).ids == ["a", "b", "c"]

    turn = scene.turn("w", 2, 3, others=[Settlement("F", id_) for id_ in ("c", "b", "a")])

    assert turn.ids == ["a", "b", "c"]


def test_settled_and_leased_in_one_turn(scene: Scene) -> None:
    """A job that came back in this turn and is leased again in it arrives with its new state."""
    scene.lease("a")

    turn = scene.turn("w", 2, 1, others=[Settlement("F", "a", state=b"1 1 0")])

    assert (turn.ids, turn.states, turn.held) == (["a"], [b"1 1 0"], 1)
    assert scene.dump()["leased:w"]["a"] == "2.1"


def test_first_retry_is_watched_or_told(scene: Scene) -> None:
    """Who sets the first due instant either has room and learns of it, or passes the token on."""
    scene.lease("a", "b")
    turn = scene.turn("w", 2, 1, others=[Settlement("R", "a", ms=60_000, state=b"1 1 0")])
    assert turn.next_due is not None
    assert not scene.take_token()

    scene.turn("w", 3, 0, others=[Settlement("R", "b", ms=30_000, state=b"1 1 0")])
    assert scene.take_token()


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("settlement", "record"),
    [
        (None, b""), (Settlement("D", "a", ms=1000, record=b"{1}"), b"{1}"), (Settlement("D", "a"), b""),
        (Settlement("C", "a", record=b"{2}"), b"{2}"), (Settlement("X", "a", record=b"{3}", state=b"1 1 0"), b"{3}"),
    ],
)  # fmt: skip
def test_end_is_announced_to_all_who_wait(scene: Scene, settlement: Settlement | None, record: bytes) -> None:
    """Whoever waits for a job is told its outcome on his channel, once, and is forgotten."""
    scene.lease("a", "b")
    for channel in ("one", "two"):
        scene.run(operations.await_result(scene.keys, "a", channel))
    scene.run(operations.await_result(scene.keys, "b", "one"))
    with scene.redis.pubsub() as pubsub:
        pubsub.subscribe("one", "two")
        assert {pubsub.get_message(timeout=5)["channel"] for _ in range(2)} == {b"one", b"two"}

        scene.turn("w", 2, done=[] if settlement else ["a"], others=[settlement] if settlement else [])

        heard = [pubsub.get_message(timeout=5) for _ in range(2)]
    assert {(m["channel"], m["data"]) for m in heard} == {(b"one", b"a\n" + record), (b"two", b"a\n" + record)}
    assert scene.dump()["waiters"] == {"b": "one"}


@pytest.mark.parametrize("kind", ["R", "F", "M"])
def test_going_on_is_not_announced(scene: Scene, kind: str) -> None:
    """Who waits for a job goes on waiting while the job does."""
    scene.lease("a")
    scene.run(operations.await_result(scene.keys, "a", "one"))

    scene.turn("w", 2, others=[Settlement(kind, "a", ms=60_000, state=b"1 1 0")])

    assert scene.dump()["waiters"] == {"a": "one"}


@pytest.mark.redis6
def test_cancel_request_reaches_its_worker(scene: Scene) -> None:
    """A turn is told of cancelled jobs while the worker holds them, and the request goes with the last of them."""
    scene.lease("a", "b", "c")
    scene.run(operations.cancel(scene.keys, "a"))
    scene.run(operations.cancel(scene.keys, "b"))

    assert scene.turn("w", 2).cancelled == ["a", "b"]
    turn = scene.turn("w", 3, others=[Settlement("C", "a", ms=1000, record=b"{}")])
    assert (turn.cancelled, turn.held) == (["b"], 2)
    assert scene.turn("w", 4, done=["b"]).cancelled == []
    assert scene.dump()["leased:w"] == {".turn": "4", **WORKER, "c": "1.3"}


def test_counters_and_recent(scene: Scene) -> None:
    """Counters of this minute add up and expire after a day; the recently finished are newest first, 1,000 at most."""
    scene.register("w")
    scene.turn("w", 1, report=TurnReport(stats={"t:done": 2, "t:failed": 1}, recent=[b"1", b"2"]))
    scene.turn("w", 2, report=TurnReport(stats={"t:done": 3}, recent=[b"3"]))

    state = scene.dump()
    stats = [value for key, value in state.items() if key.startswith("stats:") and key.endswith("~90000s")]
    totals = {field: sum(int(minute.get(field, 0)) for minute in stats) for field in ("t:done", "t:failed")}
    assert totals == {"t:done": 5, "t:failed": 1}
    assert state["recent"] == ["3", "2", "1"]

    scene.turn("w", 3, report=TurnReport(recent=[b"%d" % n for n in range(9000)]))
    assert scene.redis.lrange(scene.keys.recent, 0, -1) == [b"%d" % n for n in range(8999, 7999, -1)]
