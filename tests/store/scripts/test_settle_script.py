"""turn.lua, the half that settles: the keys that each kind of settlement leaves."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor.payload.records import JobKey, write_envelope
from conveyor.store import operations
from conveyor.store.operations import Entry, Settlement, TurnReport
from support.seeded_queue import PLAIN, WORKER, SeededQueue, entry
from support.waiting import until

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
def test_settlement(seeded: SeededQueue, settlement: Settlement | None, changes: dict[str, Any]) -> None:
    """Each kind of settlement leaves exactly what the header of turn.lua says."""
    seeded.lease("a", "b")
    before = seeded.dump()

    turn = seeded.turn("w", 2, done=[] if settlement else ["a"], others=[settlement] if settlement else [])

    assert (turn.lost, turn.ids) == ([], [])
    assert turn.held == (2 if settlement and settlement.kind == "M" else 1)
    assert seeded.since(before) == changes
    assert seeded.audit() == []


def test_a_job_dies_no_earlier_than_its_last_error(seeded: SeededQueue) -> None:
    """A dead letter has the instant of the server; that of its last error where the worker's clock is ahead of it."""
    seeded.lease("a", "b")
    now = seeded.now()
    seeded.turn("w", 2, others=[Settlement("X", "a", ms=now + 3_600_000), Settlement("X", "b", ms=now - 3_600_000)])

    died = {id_.decode(): int(at) for id_, at in seeded.redis.zrange(seeded.keys.dead, 0, -1, withscores=True)}
    assert died["a"] == now + 3_600_000
    assert now <= died["b"] <= seeded.now()


@pytest.mark.row("I6")
@pytest.mark.redis6
@pytest.mark.parametrize("kind", ["done", "D", "C", "X", "R", "F", "M"])
def test_lost_lease_is_told_and_ignored(seeded: SeededQueue, kind: str) -> None:
    """A settlement of a job the worker does not hold changes nothing and is listed as lost, whoever holds it."""
    seeded.lease("a", worker="other")
    seeded.register("w")
    before = seeded.dump()
    others = [] if kind == "done" else [Settlement(kind, "a", ms=60_000, record=b"r", state=b"9 9 9")]

    turn = seeded.turn("w", 1, done=["a", "ghost"] if kind == "done" else [], others=others)

    assert turn.lost == (["a", "ghost"] if kind == "done" else ["a"])
    assert seeded.since(before) == {"leased:w": {".turn": "1", **WORKER}}


@pytest.mark.redis6
def test_lost_and_held_in_one_report(seeded: SeededQueue) -> None:
    """Of a report, what is held is settled and what is not is told, over the limit of unpack too."""
    ids = [f"{n:03}" for n in range(900)]
    seeded.lease(*ids)
    ghosts = [f"ghost-{n}" for n in range(7500)]

    turn = seeded.turn("w", 2, done=[*ghosts, *ids])

    assert turn.lost == ghosts
    assert (turn.held, seeded.redis.hlen(seeded.keys.jobs)) == (0, 0)


@pytest.mark.row("I7")
@pytest.mark.parametrize("second", ["D", "X", "R", "F", "M"])
def test_one_job_has_one_outcome(seeded: SeededQueue, second: str) -> None:
    """Of two settlements of one job in a report the first counts."""
    seeded.lease("a")
    before = seeded.dump()
    others = [Settlement("D", "a", ms=60_000, record=b"first"), Settlement(second, "a", ms=60_000, state=b"1 1 0")]

    seeded.turn("w", 2, others=others)

    assert seeded.since(before) == {
        "jobs": None, "leased:w": {".turn": "2", **WORKER}, "result:a ~60s": "first",
    }  # fmt: skip


@pytest.mark.row("D12")
@pytest.mark.parametrize("kind", ["D", "C", "X"])
def test_end_gives_back_the_unique_key(seeded: SeededQueue, kind: str) -> None:
    """Every end of a job frees its unique key at once and keeps its own id for a day."""
    seeded.push(entry("a", unique="k", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 1)

    state_then = b"" if kind == "D" else b"1 1 0"
    seeded.turn("w", 2, others=[Settlement(kind, "a", state=state_then, attributes="\tuk", own_id=True)])

    state = seeded.dump()
    assert "unique:k:k" not in state
    assert state["unique:i:a ~86400s"] == (".-" if kind == "D" else "a")  # a mark that it ended well


@pytest.mark.parametrize("kind", ["R", "F", "M"])
def test_going_on_keeps_the_unique_key(seeded: SeededQueue, kind: str) -> None:
    """A job that goes on keeps its unique key and its id."""
    seeded.push(entry("a", unique="k", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    before = seeded.dump()

    seeded.turn("w", 2, others=[Settlement(kind, "a", ms=60_000, state=b"1 1 0", attributes="\tuk", own_id=True)])

    changed = seeded.since(before)
    assert [key for key in changed if key.startswith("unique")] == []


@pytest.mark.row("I13")
def test_key_that_another_holds_is_not_given_back(seeded: SeededQueue) -> None:
    """A job gives back a unique key only while it holds it itself."""
    seeded.push(entry("a", unique="k"))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.redis.set(seeded.keys.prefix + "unique:k:k", "other")

    seeded.turn("w", 2, others=[Settlement("D", "a", attributes="\tuk")])

    assert seeded.dump()["unique:k:k"] == "other"


def test_one_report_gives_back_what_each_job_has(seeded: SeededQueue) -> None:
    """Jobs with a key, with a result or tags besides, and with two keys end in one report; a key of another job, or of a lost one, stays."""
    twice = (JobKey("two-1", conflict="replace"), JobKey("two-2"))
    entries = [
        entry("key", unique="key"), entry("result", unique="result"), entry("tagged", unique="tagged", tags=("t",)),
        entry("two", keys=twice), entry("tag", tags=("t",)), entry("plain"), entry("others", unique="others"),
    ]  # fmt: skip
    seeded.push(*entries)
    seeded.register("w", "v")
    held = seeded.turn("w", 1, len(entries))
    seeded.push(entry("lost", unique="lost"))
    assert seeded.turn("v", 1, 1).ids == ["lost"]
    seeded.redis.set(seeded.keys.unique_lead + "others", "other")

    attributes = {id_: data.partition(b"\n")[0].decode() for id_, data in zip(held.ids, held.envelopes, strict=True)}
    for with_lost, number in ((False, 2), (True, 3)):
        report = TurnReport(results={"result": (600_000, b"{}")})
        for id_ in ["lost", "key"] if with_lost else [id_ for id_ in held.ids if id_ != "key"]:
            report.add_done(id_, "\tulost" if id_ == "lost" else attributes[id_])
        if with_lost:
            report.results.clear()
        assert seeded.turn("w", number, report=report).lost == (["lost"] if with_lost else [])

    state = seeded.jobs_and_places()
    assert {name: value for name, value in state.items() if name.startswith("unique")} == {
        "unique:k:others": "other", "unique:k:lost": "lost",
    }  # fmt: skip
    assert list(state["jobs"]) == ["lost"]
    assert [name for name in state if name.startswith("tag:")] == []
    assert any(name.startswith("results:") or name == "result:result" for name in state)


def test_keys_of_more_jobs_than_a_command_takes(seeded: SeededQueue) -> None:
    """One report gives back the keys of 7,500 jobs, over the limit of unpack."""
    report = TurnReport()
    seeded.register("w")
    for number in range(1, 9):
        seeded.push(*(entry(f"{number}-{at}", unique=f"{number}-{at}") for at in range(940)))
        for id_ in seeded.turn("w", number, 940).ids:
            report.add_done(id_, f"\tu{id_}")
        seeded.redis.hset(
            seeded.keys.leased("v"), mapping={"\tturn": 0, "\tabout": "", "\tlease": 1} | dict.fromkeys(report.done, 1)
        )
        seeded.redis.hdel(seeded.keys.leased("w"), *report.done)
    assert len(report.done) == 7520

    assert seeded.turn("v", 1, report=report).lost == []

    assert seeded.redis.keys(seeded.keys.unique_lead + "*") == []
    seeded.redis.delete(seeded.keys.leased("v"))


def test_returned_jobs_come_first_in_their_own_priority(seeded: SeededQueue) -> None:
    """F puts a job to the front of its priority; given newest first, the order is the old one."""
    seeded.push(entry("a", priority=2), "b", "c", "d")
    seeded.register("w")
    assert seeded.turn("w", 1, 3).ids == ["a", "b", "c"]

    turn = seeded.turn("w", 2, 3, others=[Settlement("F", id_) for id_ in ("c", "b", "a")])

    assert turn.ids == ["a", "b", "c"]


def test_returned_jobs_are_read_together(seeded: SeededQueue) -> None:
    """A turn that gives back twelve jobs reads what they are with as many commands as one that gives back two."""
    seeded.lease(*(f"a{n}" for n in range(14)))
    reads = []
    for number, returned in enumerate((range(2), range(2, 14)), 2):
        seeded.redis.config_resetstat()
        seeded.turn("w", number, others=[Settlement("F", f"a{n}") for n in returned])
        stats = seeded.redis.info("commandstats")
        reads.append([stats[f"cmdstat_{name}"]["calls"] for name in ("hget", "hmget")])
    assert reads[0] == reads[1]
    assert seeded.audit() == []


def test_settled_and_leased_in_one_turn(seeded: SeededQueue) -> None:
    """A job that came back in this turn and is leased again in it arrives with its new state."""
    seeded.lease("a")

    turn = seeded.turn("w", 2, 1, others=[Settlement("F", "a", state=b"1 1 0")])

    assert (turn.ids, turn.states, turn.held) == (["a"], [b"1 1 0"], 1)
    assert seeded.dump()["leased:w"]["a"] == "2.1"


def test_first_retry_is_watched_or_told(seeded: SeededQueue) -> None:
    """A turn that sets the first due instant either has room and returns it, or passes the wake token on."""
    seeded.lease("a", "b")
    turn = seeded.turn("w", 2, 1, others=[Settlement("R", "a", ms=60_000, state=b"1 1 0")])
    assert turn.next_due is not None
    assert not seeded.take_token()

    seeded.turn("w", 3, 0, others=[Settlement("R", "b", ms=30_000, state=b"1 1 0")])
    assert seeded.take_token()


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("settlement", "record"),
    [
        (None, b""), (Settlement("D", "a", ms=1000, record=b"{1}"), b"{1}"), (Settlement("D", "a"), b""),
        (Settlement("C", "a", record=b"{2}"), b"{2}"), (Settlement("X", "a", record=b"{3}", state=b"1 1 0"), b"{3}"),
    ],
)  # fmt: skip
def test_end_is_announced_to_all_waiters(seeded: SeededQueue, settlement: Settlement | None, record: bytes) -> None:
    """A waiter for a job is told its outcome on its channel, once, and is forgotten."""
    seeded.lease("a", "b")
    for channel in ("one", "two"):
        seeded.run(operations.await_result(seeded.keys, "a", channel))
    seeded.run(operations.await_result(seeded.keys, "b", "one"))
    with seeded.redis.pubsub() as pubsub:
        pubsub.subscribe("one", "two")
        assert {pubsub.get_message(timeout=60)["channel"] for _ in range(2)} == {b"one", b"two"}

        seeded.turn("w", 2, done=[] if settlement else ["a"], others=[settlement] if settlement else [])

        heard = [pubsub.get_message(timeout=60) for _ in range(2)]
    assert {(m["channel"], m["data"]) for m in heard} == {(b"one", b"a\n" + record), (b"two", b"a\n" + record)}
    assert seeded.dump()["waiters"] == {"b": "one"}


@pytest.mark.parametrize("kind", ["R", "F", "M"])
def test_going_on_is_not_announced(seeded: SeededQueue, kind: str) -> None:
    """A waiter for a job stays registered while the job waits."""
    seeded.lease("a")
    seeded.run(operations.await_result(seeded.keys, "a", "one"))

    seeded.turn("w", 2, others=[Settlement(kind, "a", ms=60_000, state=b"1 1 0")])

    assert seeded.dump()["waiters"] == {"a": "one"}


@pytest.mark.redis6
def test_cancel_request_reaches_its_worker(seeded: SeededQueue) -> None:
    """A turn is told of cancelled jobs while the worker holds them, and the request goes with the last of them."""
    seeded.lease("a", "b", "c")
    seeded.run(operations.cancel(seeded.keys, "a"))
    seeded.run(operations.cancel(seeded.keys, "b"))

    assert seeded.turn("w", 2).cancelled == ["a", "b"]
    turn = seeded.turn("w", 3, others=[Settlement("C", "a", ms=1000, record=b"{}")])
    assert (turn.cancelled, turn.held) == (["b"], 2)
    assert seeded.turn("w", 4, done=["b"]).cancelled == []
    assert seeded.dump()["leased:w"] == {".turn": "4", **WORKER, "c": "1.3"}


def test_counters_and_recent(seeded: SeededQueue) -> None:
    """Counters of this minute add up and expire after a month, if no later minute begins; the recently finished are newest first, 1,000 at most."""
    seeded.register("w")
    seeded.turn("w", 1, report=TurnReport(stats={"t:done": 2, "t:failed": 1}, recent=[b"1", b"2"]))
    seeded.turn("w", 2, report=TurnReport(stats={"t:done": 3}, recent=[b"3"]))

    state = seeded.dump()
    counted = dict.fromkeys((b"t:done", b"t:failed"), 0)
    for key in seeded.redis.scan_iter(f"{seeded.keys.prefix}stats:*"):
        if key.rpartition(b":")[2].isdigit():  # of a minute
            assert 0 < seeded.redis.ttl(key) <= 2_678_400
            for name, value in seeded.redis.hgetall(key).items():
                counted[name] += int(value)
    assert counted == {b"t:done": 5, b"t:failed": 1}
    assert state["recent"] == ["3", "2", "1"]

    seeded.turn("w", 3, report=TurnReport(recent=[b"%d" % n for n in range(9000)]))
    assert seeded.redis.lrange(seeded.keys.recent, 0, -1) == [b"%d" % n for n in range(8999, 7999, -1)]


@pytest.mark.redis6
@pytest.mark.leaves_keys("dead letters and counters")
def test_what_no_worker_reports_is_counted(seeded: SeededQueue) -> None:
    """Each job that a script ends is counted once, by outcome and task; messages, and jobs that are deleted, are not."""

    def job(id: str, **options: Any) -> Entry:  # noqa: A002
        return Entry(id, write_envelope(f"task {id}", b"1"), **options)

    seeded.push(job("ready"), job("retried"), job("orphan"), job("kept"), "message", job("stays"))
    seeded.push(job("scheduled", delay_ms=60_000))
    for id_ in ("ready", "scheduled", "ready"):
        seeded.run(operations.cancel(seeded.keys, id_))
    seeded.run(operations.cancel(seeded.keys, "message"))
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 1).ids == ["retried"]
    assert seeded.turn("v", 1, 1).ids == ["orphan"]
    for id_ in ("retried", "orphan"):
        seeded.run(operations.cancel(seeded.keys, id_))
    seeded.turn("w", 2, others=[Settlement("R", "retried", ms=60_000, state=b"1 1 0\n{}")])
    seeded.run(operations.reap(seeded.keys, "v"))
    seeded.push(job("late", expires_ms=1), job("deleted"))
    since = seeded.now()
    until(lambda: seeded.now() > since + 1)
    seeded.run(operations.cancel(seeded.keys, "deleted", delete=True))
    assert seeded.turn("w", 3, 5).ids == ["kept", "stays"]

    total = seeded.redis.hgetall(seeded.keys.prefix + "stats:total")
    names = (
        "cancelled:task ready",
        "cancelled:task scheduled",
        "cancelled:task retried",
        "cancelled:task orphan",
        "expired:task late",
    )
    assert total == {b"lost": b"1", **{name.encode(): b"1" for name in names}}
    assert 0 < seeded.redis.ttl(seeded.keys.prefix + "stats:total") <= 2_678_400


@pytest.mark.row("D151")
@pytest.mark.redis6
@pytest.mark.parametrize(
    ("settlement", "reason"),
    [
        (Settlement("R", "a", ms=60_000, state=b"1 1 0\n{}"), ""),
        (Settlement("F", "a", state=b"1 0 0"), ""),
        (Settlement("F", "a"), '"reason":"not started",'),
    ],
)
def test_what_was_cancelled_does_not_come_back(seeded: SeededQueue, settlement: Settlement, reason: str) -> None:
    """A retry or a return of a job whose cancellation was asked ends it: its record, its keys, and its waiters say so."""
    seeded.push(entry("a", unique="k", own_id=True), "b")
    seeded.register("w")
    seeded.turn("w", 1, 2)
    seeded.run(operations.cancel(seeded.keys, "a"))
    seeded.run(operations.await_result(seeded.keys, "a", "one"))
    before = seeded.dump()

    turn = seeded.turn("w", 2, others=[settlement])

    assert (turn.lost, turn.cancelled, turn.held) == ([], [], 1)
    changes = seeded.since(before)
    assert changes == {
        "jobs": {"b": PLAIN}, "leased:w": LEASED_B, "waiters": None, "unique:k:k": None, "unique:i:a": None,
        "unique:i:a ~86400s": "a", "result:a ~600s": f'{{"status":"cancelled",{reason}"by":"ada","at":now}}',
    }  # fmt: skip
    assert seeded.run(operations.cancel(seeded.keys, "a")) == (4 if reason else 0)
    assert seeded.audit() == []


@pytest.mark.redis6
def test_a_worker_answers_that_a_job_runs(seeded: SeededQueue) -> None:
    """The answer K stays with the request: cancel says 3, the count of held jobs is exact, a crash still ends the job."""
    seeded.lease("a", "b")
    assert seeded.run(operations.cancel(seeded.keys, "a")) == 2
    turn = seeded.turn("w", 2, others=[Settlement("K", "a"), Settlement("K", "b")])
    assert (turn.cancelled, turn.held) == (["a"], 2)

    assert seeded.run(operations.cancel(seeded.keys, "a")) == 3
    assert seeded.turn("w", 3).held == 2
    assert seeded.run(operations.reap(seeded.keys, "w")) == 1
    assert seeded.dump()["jobs"] == {"b": PLAIN}
    assert seeded.audit() == []
