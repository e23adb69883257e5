"""await, forget, counts, page, show, crew, audit: what can be known of a queue."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conveyor.store import inspection, operations
from conveyor.store.inspection import FinishedJob, write_finished
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement, TurnReport
from support.script_calls import furnish
from support.seeded_queue import LEASE, Scene, entry

# -- await, forget ----------------------------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("place", "word", "data"),
    [
        ("result", "result", b"{}"), ("dead", "dead", b"1 1 0\n{}"), ("ready", "waiting", b""), ("leased", "waiting", b""),
        ("scheduled", "waiting", b""), ("stub", "result", None), ("unknown", "gone", b""),
    ],
)  # fmt: skip
def test_await_result(scene: Scene, place: str, word: str, data: bytes | None) -> None:
    """Awaiting reads an outcome that is there, and registers the waiter for one that is still to come."""
    if place in {"ready", "scheduled", "stub"}:
        scene.push(entry("a", delay_ms=60_000 if place == "scheduled" else None))
    if place == "stub":
        scene.run(operations.cancel(scene.keys, "a"))
    if place in {"leased", "result"}:
        scene.lease("a")
    if place == "result":
        scene.turn("w", 2, others=[Settlement("D", "a", ms=60_000, record=b"{}")])
    if place == "dead":
        scene.bury("a")
    before = scene.dump()

    with scene.unchanged():
        asked = scene.run(operations.await_result(scene.keys, "a", ""))
    answer = scene.run(operations.await_result(scene.keys, "a", "one"))

    assert asked == answer
    assert answer[0] == word
    assert data is None or answer[1] == data
    assert scene.since(before) == ({"waiters": {"a": "one"}} if word == "waiting" else {})


def test_stub_without_a_record_is_gone(scene: Scene) -> None:
    """A deleted job whose entry was not reached yet is gone for who asks."""
    scene.push("a")
    scene.run(operations.cancel(scene.keys, "a", delete=True))
    assert scene.run(operations.await_result(scene.keys, "a", "one")) == ("gone", b"")


def test_waiters_are_a_set(scene: Scene) -> None:
    """Each process waits once, in any order, and forgetting one leaves the others, whatever their names begin with."""
    scene.push("a")
    for channel in ("one", "on", "one", "two", "on"):
        scene.run(operations.await_result(scene.keys, "a", channel))
    assert scene.dump()["waiters"] == {"a": "one on two"}

    scene.run(operations.forget(scene.keys, "a", "on"))
    assert scene.dump()["waiters"] == {"a": "one two"}
    with scene.unchanged():
        scene.run(operations.forget(scene.keys, "a", "on"))
    for channel in ("one", "two"):
        scene.run(operations.forget(scene.keys, "a", channel))
    assert "waiters" not in scene.dump()


# -- reads ------------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_counts(scene: Scene) -> None:
    """Each job is counted in one place, stubs in none, and the raw entries of a plain list as ready."""
    furnish(scene)

    found = scene.run(inspection.counts(QueueKeys("c", "q", foreign="q")))

    assert (found.ready, found.scheduled, found.leased, found.dead) == (3 + 4, 3, 8, 2)
    assert (found.workers, found.paused, found.max_length) == (2, False, None)
    scene.run(operations.configure(scene.keys, "paused", "1"))
    scene.run(operations.configure(scene.keys, "max_length", "7"))
    found = scene.run(inspection.counts(scene.keys))
    assert (found.ready, found.paused, found.max_length) == (3, True, 7)


def test_counts_of_nothing(scene: Scene) -> None:
    """An empty queue counts zero and has no oldest job."""
    found = scene.run(inspection.counts(scene.keys))
    assert (len(found), found.leased, found.dead, found.workers, found.oldest_age) == (0, 0, 0, 0, None)


@pytest.mark.parametrize("status", ["ready", "scheduled", "leased", "dead", "dead-oldest"])
def test_list_jobs_cuts_one_order(scene: Scene, status: str) -> None:
    """Pages of any size, one after the other, give each job of a state once, in the order of one large page."""
    furnish(scene)
    whole = [row.id for row in scene.run(inspection.list_jobs(scene.keys, status, 0, 500))]
    expected = {
        "ready": ["r2", "r1", "r3"], "scheduled": ["s3", "s1", "s2"], "leased": None,
        "dead": ["d2", "d1"], "dead-oldest": ["d1", "d2"],
    }[status]  # fmt: skip
    if expected is None:
        assert sorted(whole) == ["h1", "h2", "h3", "h4", "h5", "h6", "v1", "v2"]
    elif not status.startswith("dead"):  # these died in one millisecond
        assert whole == expected
    for size in (1, 2, 3):
        pages = [scene.run(inspection.list_jobs(scene.keys, status, at, size)) for at in range(0, 12, size)]
        assert [row.id for page in pages for row in page] == whole


def test_list_jobs_that_finished(scene: Scene) -> None:
    """The recently finished come newest first, as they were written."""
    scene.register("w")
    made = [write_finished(f"j{n}", "t", "done", 5, n) for n in range(3)]
    scene.turn("w", 1, report=TurnReport(recent=made))

    assert scene.run(inspection.finished(scene.keys, 0, 2)) == [FinishedJob(f"j{n}", "t", "done", 5, n) for n in (2, 1)]


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("id", "place", "extra"),
    [
        ("r1", "ready", ""), ("r2", "ready", ""), ("h1", "leased", "w"), ("v2", "leased", "v"), ("s3", "scheduled", "1"),
        ("d1", "dead", None), ("x1", "result", None), ("old", "result", None), ("ghost", "none", None),
    ],
)  # fmt: skip
def test_get_job(scene: Scene, id: str, place: str, extra: str | None) -> None:  # noqa: A002
    """A job is shown where it is, with who holds it or when it is due."""
    furnish(scene)
    found, row, record = scene.run(inspection.get_job(scene.keys, id))

    assert found == place
    if place in {"result", "none"}:
        assert (row is None, record != b"") == (True, place == "result")
    else:
        assert row is not None
        assert (row.id, row.status) == (id, place)
        assert extra is None or row.extra == extra


def test_get_job_knows_an_own_id_that_ended(scene: Scene) -> None:
    """An own id that ended without a record is told from one that never was."""
    scene.push(entry("a", own_id=True))
    scene.register("w")
    scene.turn("w", 1, 1)
    scene.turn("w", 2, others=[Settlement("D", "a", own_id=True)])
    assert scene.run(inspection.get_job(scene.keys, "a")) == ("none", None, b"1")


def test_workers(scene: Scene) -> None:
    """Each worker is listed with its end, what it said of itself, and how much it holds, cancel requests apart."""
    scene.lease("a", "b")
    scene.run(operations.cancel(scene.keys, "a"))
    scene.run(operations.register(scene.keys, "z", 2 * LEASE, operations.about(host="h")))

    first, second = scene.run(inspection.workers(scene.keys))

    assert (first.worker, first.about, first.held) == ("w", {}, 2)
    assert (second.worker, second.about, second.held) == ("z", {"host": "h"}, 0)
    assert 0 < first.end - scene.now() <= LEASE < second.end - scene.now() <= 2 * LEASE


# -- audit ------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[Scene], object], set[tuple[str, str]]]] = {
    "none": (lambda s: None, set()),
    "twice in ready": (lambda s: s.redis.rpush(s.keys.ready[0], "r1"), {("in ready and ready", "r1")}),
    "in two priorities": (lambda s: s.redis.rpush(s.keys.ready[7], "r1"), {("in ready and ready", "r1")}),
    "ready and scheduled": (lambda s: s.redis.zadd(s.keys.due, {"r1": 1}), {("in ready and scheduled", "r1")}),
    "ready and dead": (lambda s: s.redis.zadd(s.keys.dead, {"r1": 1}), {("in ready and dead", "r1")}),
    "ready and leased": (
        lambda s: s.redis.hset(s.keys.leased("w"), "r1", 8193), {("in ready and leased", "r1")},
    ),
    "two holders": (lambda s: s.redis.hset(s.keys.leased("v"), "h1", 8193), {("in leased and leased", "h1")}),
    "nowhere": (lambda s: s.redis.lpop(s.keys.ready[5]), {("nowhere", "r2")}),
    "lease of nobody": (lambda s: s.redis.zrem(s.keys.workers, "v"), {("nowhere", "v1"), ("nowhere", "v2")}),
    "ghost in ready": (lambda s: s.redis.rpush(s.keys.ready[0], "g"), {("no envelope, but in ready", "g")}),
    "ghost in due": (lambda s: s.redis.zadd(s.keys.due, {"g": 1}), {("no envelope, but in scheduled", "g")}),
    "ghost in dead": (lambda s: s.redis.zadd(s.keys.dead, {"g": 1}), {("no envelope, but in dead", "g")}),
    "ghost leased": (lambda s: s.redis.hset(s.keys.leased("w"), "g", 8193), {("no envelope, but in leased", "g")}),
    "state of nobody": (lambda s: s.redis.hset(s.keys.state, "g", "1 1 0"), {("state without a job", "g")}),
    "stubs miscounted": (lambda s: s.redis.hset(s.keys.conf, "stubs", 5), {("wrong count of stubs", "1")}),
    "stub elsewhere": (
        lambda s: (s.redis.lrem(s.keys.ready[0], 0, "x1"), s.redis.zadd(s.keys.due, {"x1": 1})),
        {("stub outside ready", "x1")},
    ),
}  # fmt: skip


@pytest.mark.row("I1")
@pytest.mark.redis6
@pytest.mark.parametrize("name", DAMAGE)
def test_audit_finds(scene: Scene, name: str) -> None:
    """The audit names each inconsistency there is, and no other."""
    furnish(scene)
    damage, expected = DAMAGE[name]
    damage(scene)
    assert set(scene.audit()) == expected


def test_audit_refuses_what_is_too_large(scene: Scene) -> None:
    """The audit reads everything in one step, so it refuses a queue above the size it is given."""
    scene.push("a", "b", "c")
    assert scene.run(inspection.audit(scene.keys, most=2)) == [("too-large", "3")]
    assert scene.run(inspection.audit(scene.keys, most=3)) == []
