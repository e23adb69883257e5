"""Scripts for operators and other programs: cancel, redrive, promote, purge, configure, list intake."""

from __future__ import annotations

import pytest

from conveyor import Conveyor
from conveyor.admin import Admin
from conveyor.admin.acl import commands_of
from conveyor.errors import ConfigurationError
from conveyor.store import inspection, operations
from conveyor.store.job_filter import Walk
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement
from support.script_faults import LimitedUser, Snapshot
from support.seeded_queue import PLAIN, WORKER, SeededQueue, entry

CANCELLED = '{"status":"cancelled","by":"ada","at":now}'


# -- cancel, delete ---------------------------------------------------------------------------------------------------

REDRIVEN = ' .h{"state":"redriven","at":now,"by":"ada"}'
"""The event of its history, as a dump shows it."""


@pytest.mark.redis6
@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("place", ["ready", "scheduled", "leased", "dead", "stub", "unknown"])
def test_cancel_in_each_place(seeded: SeededQueue, place: str, delete: bool) -> None:
    """Cancel and delete answer, and leave behind, what their header says for each place a job can be in."""
    seeded.push(entry("a", unique="k", own_id=True, delay_ms=60_000 if place == "scheduled" else None), "b")
    if place in {"leased", "dead"}:
        seeded.register("w")
        seeded.turn("w", 1, 1)
    if place == "dead":
        seeded.turn("w", 2, others=[Settlement("X", "a", state=b"1 1 0", attributes="\tuk", own_id=True)])
    if place == "stub":
        seeded.run(operations.cancel(seeded.keys, "a"))
    before = seeded.dump()

    answer = seeded.run(operations.cancel(seeded.keys, "x" if place == "unknown" else "a", delete=delete))

    ended = {"unique:k:k": None, "unique:i:a": None, "unique:i:a ~86400s": "a"}
    if not delete:
        ended["result:a ~600s"] = CANCELLED
    if place == "ready":
        assert answer == 1
        conf = {"schema": "2", "stubs": "1"}
        stub = "x" + before["jobs"]["a"].split("\n")[0] + "\n"
        assert seeded.since(before) == {"jobs": {"a": stub, "b": PLAIN}, "conf": conf, **ended}
    elif place == "scheduled":
        assert answer == 1
        assert seeded.since(before) == {"jobs": {"b": PLAIN}, "due": None, **ended}
    elif place == "leased" and not delete:
        assert answer == 2
        assert seeded.since(before) == {
            "leased:w": {".turn": "1", **WORKER, "a": "1.1", ".cancel": "a\n.a.ada"},
            "wake:w ~60s": ["1"],
        }
    elif place == "dead" and delete:
        assert answer == 1
        assert seeded.since(before) == {"jobs": {"b": PLAIN}, "dead": None, "state": None}
    else:
        assert answer == {"leased": -1, "unknown": -2}.get(place, 0)
        assert seeded.since(before) == {}
    assert seeded.audit() == []


@pytest.mark.row("I18")
def test_cancelled_job_never_starts(seeded: SeededQueue) -> None:
    """After cancel said 1, no turn returns the job, also after its place would have changed."""
    seeded.push("a", entry("b", delay_ms=60_000), entry("c", priority=5))
    for id_ in "abc":
        assert seeded.run(operations.cancel(seeded.keys, id_)) == 1
    assert seeded.run(operations.promote(seeded.keys, "b")) is False
    seeded.register("w")

    assert seeded.turn("w", 1, 9).ids == []
    assert seeded.dump()["conf"]["stubs"] == "0"


def test_repeated_cancel_asks_once(seeded: SeededQueue) -> None:
    """Asking a worker twice to cancel one job leaves one request and one call."""
    seeded.lease("a", "b")
    assert seeded.run(operations.cancel(seeded.keys, "a")) == 2
    with seeded.unchanged():
        assert seeded.run(operations.cancel(seeded.keys, "a")) == 2


def test_cancel_finds_the_holder_among_very_many(seeded: SeededQueue) -> None:
    """A leased job is never taken for a ready one, however many workers there are."""
    seeded.lease("a", worker="zz")
    seeded.redis.zadd(seeded.keys.workers, {f"w{n}": 1 for n in range(1500)})

    assert seeded.run(operations.cancel(seeded.keys, "a")) == 2


# -- redrive, promote -------------------------------------------------------------------------------------------------


@pytest.mark.row("D201")
@pytest.mark.redis6
@pytest.mark.parametrize("named", [True, False])
def test_redriven_jobs_take_their_keys_again(seeded: SeededQueue, named: bool) -> None:
    """A redriven job holds its unique key as before; one whose key another job holds now stays dead, and both are named."""
    seeded.register("w")
    for n, id_ in enumerate("abcd"):
        seeded.push(entry(id_, unique="k" if id_ in "ab" else id_))
        seeded.turn("w", 2 * n + 1, 1)
        seeded.turn(
            "w",
            2 * n + 2,
            others=[Settlement("X", id_, state=b"1 1 0", attributes="\tuk" if id_ in "ab" else f"\tu{id_}")],
        )
        seeded.redis.zadd(seeded.keys.dead, {id_: n})
    seeded.push(entry("c2", unique="c"))

    moved = seeded.run(operations.redrive(seeded.keys, ids=list("abcdd") if named else ()))

    assert (moved, moved.kept) == (2, (("b", "a"), ("c", "c2")))
    assert seeded.redis.mget(*(f"{seeded.keys.prefix}unique:k:{key}" for key in ("k", "c", "d"))) == [b"a", b"c2", b"d"]
    assert set(seeded.dump()["dead"]) == {"b", "c"}
    assert seeded.push(entry("a2", unique="k")) == ["a"]
    assert seeded.run(operations.redrive_some(seeded.keys, Walk(states=("dead",), most=5, cursor="1 b"))).kept == (
        ("c", "c2"),
    )
    assert seeded.audit() == []


@pytest.mark.row("D201")
def test_redrive_passes_over_what_stays_dead(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """`redrive` puts back all others, however many stay dead before them, says which, and a later one puts those back."""
    with Conveyor(url) as app:
        queue = app.queue("mail", max_attempts=1)
        for n in range(4):
            queue.push(n, unique=f"k{n}")
            queue.pull()[0].nack()
        holders = [queue.push("holder", unique=f"k{n}") for n in range(2)]

        assert queue.redrive(limit=2) == 2
        assert (queue.stats().dead, queue.stats().ready) == (2, 4)
        [said] = [record.getMessage() for record in caplog.records if "stay dead" in record.getMessage()]
        assert all(holder.partition(":")[2] in said for holder in holders)
        [one, _] = [letter.id for letter in queue.dead_letters()]
        [refused] = Admin(app.client).retry([one])
        assert (refused.outcome, f"job {holders[0]} holds its unique key" in refused.detail) == ("refused", True)
        for message in queue.pull(9):
            message.ack()
        assert queue.redrive() == 2
        for message in queue.pull(9):
            message.ack()


@pytest.mark.redis6
def test_redrive_takes_the_oldest(seeded: SeededQueue) -> None:
    """Dead letters come back oldest first at the tail, with their starts and errors and a fresh budget, and call a worker."""
    seeded.add_dead("a", "b", "c", state=b"4 3 1\n{}")
    seeded.push("r")
    seeded.take_token()
    before = seeded.dump()

    assert seeded.run(operations.redrive(seeded.keys, limit=2)) == 2

    assert seeded.since(before) == {
        "dead": {"c": before["dead"]["c"]},
        "ready:0": ["r", "a", "b"],
        "state": {"a": f"4 0 0{REDRIVEN}\n{{}}", "b": f"4 0 0{REDRIVEN}\n{{}}", "c": "4 3 1\n{}"},
        "wake ~3600s": ["1"],
    }
    assert seeded.audit() == []


@pytest.mark.parametrize("ids", [["b"], ["c", "a"], ["b", "ghost"], ["ghost"]])
def test_redrive_by_id(seeded: SeededQueue, ids: list[str]) -> None:
    """Named dead letters come back in the order they are named; an unknown one does not count."""
    seeded.add_dead("a", "b", "c")

    count = seeded.run(operations.redrive(seeded.keys, ids=ids))

    there = [id_ for id_ in ids if id_ != "ghost"]
    assert count == len(there)
    assert seeded.dump().get("ready:0", []) == there


@pytest.mark.parametrize("state", [b"", b"odd"])
def test_redrive_survives_an_odd_state(seeded: SeededQueue, state: bytes) -> None:
    """A dead letter whose state cannot be read comes back too, as a fresh one."""
    seeded.add_dead("a", "b", state=state)
    assert seeded.run(operations.redrive(seeded.keys)) == 2
    assert seeded.dump()["state"] == {"a": f"0 0 0{REDRIVEN}", "b": f"0 0 0{REDRIVEN}"}
    assert seeded.audit() == []


def test_redriven_job_holds_its_own_id(seeded: SeededQueue) -> None:
    """A job that lives again holds its id without an end, though the day after its death may be over."""
    seeded.push(entry("a", own_id=True, priority=4))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, others=[Settlement("X", "a", state=b"1 1 0", own_id=True)])
    seeded.redis.delete(seeded.keys.prefix + "unique:i:a")

    seeded.run(operations.redrive(seeded.keys))

    state = seeded.dump()
    assert state["unique:i:a"] == "a"
    assert state["ready:4"] == ["a"]


@pytest.mark.redis6
@pytest.mark.parametrize("priority", [0, 6])
def test_promote(seeded: SeededQueue, priority: int) -> None:
    """A promoted job stands at the tail of its priority and calls a worker; one that is not scheduled stays where it is."""
    seeded.push(entry("a", priority=priority), entry("b", delay_ms=60_000, priority=priority))
    seeded.take_token()

    assert seeded.run(operations.promote(seeded.keys, "b")) is True
    assert seeded.dump()[f"ready:{priority}"] == ["a", "b"]
    assert seeded.take_token()
    with seeded.unchanged():
        assert seeded.run(operations.promote(seeded.keys, "b")) is False
        assert seeded.run(operations.promote(seeded.keys, "ghost")) is False


# -- purge ------------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_purge_ready_in_batches(seeded: SeededQueue) -> None:
    """A purge takes from the front, urgent ones first, counts stubs apart, and leaves what is leased."""
    seeded.lease("held")
    seeded.push("a", entry("u", priority=9, unique="k", own_id=True), "b", "c")
    seeded.run(operations.cancel(seeded.keys, "a"))
    seeded.redis.hset(seeded.keys.state, mapping={"b": "1 1 0", "c": "1 1 0"})

    assert seeded.run(operations.purge(seeded.keys, "ready", 2)) == (3, 2)

    state = seeded.dump()
    assert set(state["jobs"]) == {"held", "c"}
    assert state["ready:0"] == ["c"]
    assert state["state"] == {"c": "1 1 0"}
    assert state["conf"]["stubs"] == "0"
    assert state["unique:i:u ~86400s"] == "u"
    assert "unique:k:k" not in state
    assert seeded.audit() == []
    assert seeded.run(operations.purge(seeded.keys, "ready", 3)) == (1, 1)
    assert seeded.run(operations.purge(seeded.keys, "ready", 3)) == (0, 0)


@pytest.mark.parametrize("place", ["due", "dead"])
def test_purge_elsewhere(seeded: SeededQueue, place: str) -> None:
    """A purge of one place takes its earliest and nothing of another place."""
    seeded.add_dead("d1", "d2", "d3")
    seeded.push("r", *[entry(f"s{n}", delay_ms=60_000 + n) for n in (1, 2, 3)])

    assert seeded.run(operations.purge(seeded.keys, place, 2)) == (2, 2)

    gone = {"s1", "s2"} if place == "due" else {"d1", "d2"}
    assert {id_.decode() for id_ in seeded.redis.hkeys(seeded.keys.jobs)} == {
        "r",
        "s1",
        "s2",
        "s3",
        "d1",
        "d2",
        "d3",
    } - gone
    assert seeded.audit() == []


@pytest.mark.row("D7", "I12")
@pytest.mark.redis6
@pytest.mark.parametrize(("limit", "taken"), [(10**9, 1000), (0, 0), (-1, 0)])
def test_purge_is_bounded(seeded: SeededQueue, limit: int, taken: int) -> None:
    """One call removes 1,000 at most, and nothing when nothing is asked."""
    seeded.push(*[str(n) for n in range(1300)])
    assert seeded.run(operations.purge(seeded.keys, "ready", limit)) == (taken, taken)
    assert seeded.redis.hlen(seeded.keys.jobs) == 1300 - taken


@pytest.mark.redis6
def test_purge_passes_many_cancelled_jobs_in_one_step(seeded: SeededQueue) -> None:
    """However few jobs are wanted, a step looks at a thousand entries of cancelled ones, and takes no job more than is wanted."""
    cancelled = [str(n) for n in range(2500)]
    seeded.push(*cancelled)
    seeded.run(operations.cancel_some(seeded.keys, Walk(ids=cancelled)))
    seeded.push("a", "b", "c", "newer")

    steps = [seeded.run(operations.purge(seeded.keys, "ready", 2)) for _ in range(3)]

    assert steps == [(1000, 0), (1000, 0), (502, 2)]
    assert {id_.decode() for id_ in seeded.redis.hkeys(seeded.keys.jobs)} == {"c", "newer"}
    assert seeded.audit() == []


def test_purge_passes_fewer_cancelled_jobs_where_some_have_groups(seeded: SeededQueue) -> None:
    """A job of a group costs more to take away, so a step looks at 500 entries, and takes no job more than is wanted."""
    cancelled = [str(n) for n in range(1200)]
    seeded.push(*cancelled, entry("g1", group="g"))
    seeded.run(operations.cancel_some(seeded.keys, Walk(ids=[*cancelled, "g1"])))
    seeded.push("a", "b", entry("g2", group="g"), "newer")

    steps = [seeded.run(operations.purge(seeded.keys, "ready", 2)) for _ in range(3)]

    assert steps == [(500, 0), (500, 0), (203, 2)]
    assert {id_.decode() for id_ in seeded.redis.hkeys(seeded.keys.jobs)} == {"b", "newer"}
    assert seeded.audit() == []


def test_purge_tells_waiters(seeded: SeededQueue) -> None:
    """A waiter for a purged job is told that it was cancelled."""
    seeded.push("a")
    seeded.run(operations.await_result(seeded.keys, "a", "one"))
    with seeded.redis.pubsub() as pubsub:
        pubsub.subscribe("one")
        pubsub.get_message(timeout=60)
        seeded.run(operations.purge(seeded.keys, "ready", 1))
        message = pubsub.get_message(timeout=60)
    assert message["data"].startswith(b'a\n{"status":"cancelled","reason":"purged"')


# -- configure, intake ------------------------------------------------------------------------------------------------


def test_configure(seeded: SeededQueue) -> None:
    """A setting is kept or removed, and a worker is called either way; a repeat changes nothing."""
    call = operations.configure(seeded.keys, "paused", "1")
    seeded.run(call)
    assert seeded.dump() == {"conf": {"paused": "1"}, "wake ~3600s": ["1"]}
    with seeded.unchanged():
        seeded.run(call)
    seeded.run(operations.configure(seeded.keys, "paused", ""))
    assert seeded.dump() == {"wake ~3600s": ["1"]}


@pytest.mark.redis6
@pytest.mark.redis7
def test_list_intake(seeded: SeededQueue) -> None:
    """Raw entries move from the intake list first, then from the foreign list, in order, byte for byte."""
    keys = QueueKeys("c", "q", foreign="q")
    seeded.redis.rpush(keys.intake, "1")
    seeded.redis.rpush("q", b"\xff\n2", "3", "4")

    assert seeded.run(operations.list_intake(keys, 3, "stem", "t")) == 3

    assert seeded.redis.hgetall(keys.jobs) == {
        b"stem0001": b"\nt\n1", b"stem0002": b"\nt\n\xff\n2", b"stem0003": b"\nt\n3",
    }  # fmt: skip
    assert seeded.redis.lrange(keys.ready[0], 0, -1) == [b"stem0001", b"stem0002", b"stem0003"]
    assert seeded.redis.lrange("q", 0, -1) == [b"4"]
    assert seeded.take_token()


@pytest.mark.redis6
def test_repeated_list_intake_overwrites_nothing(seeded: SeededQueue) -> None:
    """An intake sent again with the same stem gives new entries new ids, also when some of the old are finished."""
    keys = QueueKeys("c", "q", foreign="q")
    seeded.redis.rpush("q", *"123456")
    call = operations.list_intake(keys, 3, "stem")
    assert seeded.run(call) == 3
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, done=["stem0001"])

    assert seeded.run(call) == 3

    bodies = sorted(body[-1:] for body in seeded.redis.hvals(keys.jobs))
    assert bodies == [b"2", b"3", b"4", b"5", b"6"]
    assert seeded.audit() == []


@pytest.mark.parametrize("limit", [0, 5000])
def test_list_intake_is_bounded(seeded: SeededQueue, limit: int) -> None:
    """One call moves 1,000 at most, and an empty list is no change."""
    keys = QueueKeys("c", "q", foreign="q")
    seeded.redis.rpush("q", *range(1200))
    assert seeded.run(operations.list_intake(keys, limit, "stem")) == min(limit, 1000)
    seeded.redis.delete("q")
    with seeded.unchanged():
        assert seeded.run(operations.list_intake(keys, 10, "stem")) == 0


def lose(seeded: SeededQueue) -> None:
    """Make six jobs: one in its place, a ready one, an urgent one, a scheduled one and a stub in none, one leased in its place."""
    seeded.push("held")
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.push("stays", "a", entry("b", priority=3), entry("later", delay_ms=60_000), "stub")
    seeded.run(operations.cancel(seeded.keys, "stub"))
    seeded.redis.lrem(seeded.keys.ready[0], 0, "a")
    seeded.redis.lrem(seeded.keys.ready[0], 0, "stub")
    seeded.redis.delete(seeded.keys.ready[3], seeded.keys.due)
    seeded.redis.hset(seeded.keys.state, "b", "2 1 0\n{}")


@pytest.mark.row("C103")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.standalone_only("makes a user")
def test_repair_puts_back_what_is_in_no_place(seeded: SeededQueue, url: str) -> None:
    """Jobs in no place come back to theirs with a start counted, all others stay; with any command refused nothing happens."""
    lose(seeded)
    assert seeded.run(inspection.counts(seeded.keys)).unplaced == 4
    call = operations.repair(seeded.keys, ["stub", "stays", "later", "held", "b", "a", "unknown"])
    snapshot, commands = Snapshot(seeded.redis), commands_of(operations.REPAIR)
    user = LimitedUser(seeded.redis, url)
    limited = SeededQueue(seeded.redis, user.url)
    for command in sorted(
        commands - {"exists", "rpush", "pexpire", "del"}
    ):  # of the token; and of what has proven others
        user.deny(f"-{command}")
        with seeded.unchanged(), pytest.raises(ConfigurationError):
            limited.run(call)
    user.close()
    limited.client.close()
    snapshot.restore()

    assert seeded.run(call) == (3, 1)
    assert seeded.audit() == []
    assert seeded.run(inspection.counts(seeded.keys)).unplaced == 0
    assert seeded.redis.lrange(seeded.keys.ready[0], 0, -1) == [b"a", b"stays"]
    assert seeded.redis.lrange(seeded.keys.ready[3], 0, -1) == [b"b"]
    assert seeded.redis.zrange(seeded.keys.due, 0, -1) == [b"later"]
    assert seeded.redis.hgetall(seeded.keys.state) == {b"a": b"1 0 0", b"b": b"3 1 0\n{}", b"later": b"1 0 0"}
    assert seeded.run(call) == (0, 0)
