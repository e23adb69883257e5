"""push.lua: seed, call, compare everything."""

from __future__ import annotations

import pytest

from conveyor.errors import ConfigurationError, QueueFull
from conveyor.store import operations
from conveyor.store.operations import ProducerSequence, Settlement, StalePush
from conveyor.store.script import Call
from support.script_faults import break_script
from support.seeded_queue import PLAIN, REST, SeededQueue, entry

SCHEMA = {"schema": "2"}


@pytest.mark.redis6
@pytest.mark.redis7
def test_plain_push(seeded: SeededQueue) -> None:
    """A plain push writes envelopes, entries in order, the lane's answer and one wake token, and nothing else."""
    assert seeded.push("a", "b", "c") == ["a", "b", "c"]

    assert seeded.dump() == {
        "conf": SCHEMA,
        "jobs": {"a": PLAIN, "b": PLAIN, "c": PLAIN},
        "lane:L ~7200s": "1\nok\n.",
        "ready:0": ["a", "b", "c"],
        "wake ~3600s": ["1"],
    }


def test_second_push_adds_no_second_token(seeded: SeededQueue) -> None:
    """A push onto a queue with a wake token adds none; one after the token was taken adds the next."""
    seeded.push("a")
    before = seeded.dump()
    seeded.push("b")
    assert seeded.since(before) == {
        "jobs": {"a": PLAIN, "b": PLAIN}, "lane:L ~7200s": "2\nok", "ready:0": ["a", "b"],
    }  # fmt: skip

    assert seeded.take_token()
    seeded.push("c")
    assert seeded.take_token()
    assert not seeded.take_token()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"priority": 3}, {"jobs": {"x": "p3" + PLAIN}, "ready:3": ["x"], "wake ~3600s": ["1"]}),
        ({"priority": 9}, {"jobs": {"x": "p9" + PLAIN}, "ready:9": ["x"], "wake ~3600s": ["1"]}),
        ({"delay_ms": 60_000}, {"jobs": {"x": " dnow+60s" + PLAIN}, "due": {"x": "now+60s"}, "wake ~3600s": ["1"]}),
        ({"delay_ms": 0}, {"jobs": {"x": PLAIN}, "ready:0": ["x"], "wake ~3600s": ["1"]}),
        ({"due_at_ms": 1000}, {"jobs": {"x": PLAIN}, "ready:0": ["x"], "wake ~3600s": ["1"]}),
        ({"expires_ms": 90_000}, {"jobs": {"x": " enow+90s" + PLAIN}, "ready:0": ["x"], "wake ~3600s": ["1"]}),
        ({"front": True}, {"jobs": {"x": PLAIN}, "ready:0": ["x"], "wake ~3600s": ["1"]}),
        (
            {"unique": "k u"},
            {"jobs": {"x": ".uk u" + PLAIN}, "ready:0": ["x"], "unique:k:k u": "x", "wake ~3600s": ["1"]},
        ),
        ({"own_id": True}, {"jobs": {"x": " i" + PLAIN}, "ready:0": ["x"], "unique:i:x": "x", "wake ~3600s": ["1"]}),
        (
            {"priority": 2, "delay_ms": 60_000, "expires_ms": 120_000, "unique": "k", "own_id": True},
            {
                "jobs": {"x": "p2 enow+120s dnow+60s i.uk" + PLAIN}, "due": {"x": "now+60s"},
                "unique:k:k": "x", "unique:i:x": "x", "wake ~3600s": ["1"],
            },
        ),
    ],
)  # fmt: skip
def test_special_push(seeded: SeededQueue, options: dict[str, object], changes: dict[str, object]) -> None:
    """Each option leaves its mark in the envelope's first line and the job in its one place."""
    assert seeded.push(entry("x", **options)) == ["x"]

    assert seeded.dump() == {"conf": SCHEMA, "lane:L ~7200s": "1\nok\nx\n.", **changes}
    assert seeded.audit() == []


@pytest.mark.redis6
def test_mixed_runs_keep_their_order(seeded: SeededQueue) -> None:
    """Plain and special messages of one push stand in the order they were given, per priority."""
    front = entry("f", front=True)
    given = ["a", entry("b", unique="1"), entry("c", priority=5), "d", "e", entry("g", priority=5), front, "h"]

    assert seeded.push(*given) == ["a", "b", "c", "d", "e", "g", "f", "h"]

    state = seeded.dump()
    assert state["ready:0"] == ["f", "a", "b", "d", "e", "h"]
    assert state["ready:5"] == ["c", "g"]
    assert state["lane:L ~7200s"] == "1\nok\nb\nc\ng\nf\n."


@pytest.mark.redis6
@pytest.mark.redis7
def test_large_push_crosses_the_limit_of_unpack(seeded: SeededQueue) -> None:
    """20,000 plain messages in one call arrive whole and in order."""
    ids = [f"{n:05}" for n in range(20_000)]
    seeded.push(*ids)

    assert seeded.redis.lrange(seeded.keys.ready[0], 0, -1) == [id_.encode() for id_ in ids]
    assert seeded.redis.hlen(seeded.keys.jobs) == 20_000


def test_only_the_first_delayed_job_calls(seeded: SeededQueue) -> None:
    """A delayed push wakes somebody only when it becomes the first that is due."""
    seeded.push(entry("a", delay_ms=60_000))
    assert seeded.take_token()
    seeded.push(entry("b", delay_ms=90_000))
    assert not seeded.take_token()
    seeded.push(entry("c", delay_ms=30_000))
    assert seeded.take_token()


# -- repeats ----------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("options", [{}, {"priority": 4}, {"unique": "k"}, {"own_id": True}, {"delay_ms": 60_000}])
def test_repeat_is_answered_and_not_done(seeded: SeededQueue, options: dict[str, object]) -> None:
    """The same number of a lane again gets the same answer and changes nothing."""
    call = operations.push(seeded.keys, seeded.lane, [entry("a", **options), entry("b")])
    first = seeded.run(call)

    with seeded.unchanged():
        assert seeded.run(call) == first == ["a", "b"]


def test_repeat_after_the_job_is_finished(seeded: SeededQueue) -> None:
    """A repeat that arrives after a fast consumer has finished the job does not run it again."""
    call = operations.push(seeded.keys, seeded.lane, [entry("a")])
    seeded.run(call)
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, done=["a"])

    with seeded.unchanged():
        assert seeded.run(call) == ["a"]


def test_late_copy_changes_nothing(seeded: SeededQueue) -> None:
    """A lower number than the lane's last is a late copy: refused, nothing stored."""
    late = operations.push(seeded.keys, seeded.lane, [entry("a")])
    seeded.push("b")

    with seeded.unchanged(), pytest.raises(StalePush):
        seeded.run(late)


def test_lanes_are_independent(seeded: SeededQueue) -> None:
    """The same number in another lane is another push."""
    seeded.push("a")
    seeded.run(operations.push(seeded.keys, ProducerSequence("M"), [entry("b")]))

    assert seeded.dump()["ready:0"] == ["a", "b"]


# -- the script for plain messages only -------------------------------------------------------------------------------


def _plain(seeded: SeededQueue, *ids: str, maximum: int = 0) -> Call[None]:
    pairs: list[str | bytes] = [part for id_ in ids for part in (id_, REST)]
    return operations.push_plain(seeded.keys, seeded.lane, pairs, max_length=maximum)


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("count", [1, 3, 20_000])
def test_push_plain_does_what_push_does(seeded: SeededQueue, count: int) -> None:
    """The short script leaves exactly what the long one leaves."""
    ids = [f"{n:05}" for n in range(count)]
    seeded.push(*ids)
    expected = seeded.dump()
    seeded.redis.flushall(asynchronous=False)
    seeded.lane = ProducerSequence("L")

    seeded.run(_plain(seeded, *ids))

    assert seeded.dump() == expected


@pytest.mark.redis6
@pytest.mark.redis7
def test_push_plain_repeated_and_late(seeded: SeededQueue) -> None:
    """A repeat is answered and a late copy refused; neither changes anything, and the lane still knows its last push."""
    late, last = _plain(seeded, "a"), _plain(seeded, "b")
    seeded.run(last)
    with seeded.unchanged():
        seeded.run(last)
        with pytest.raises(StalePush):
            seeded.run(late)
        seeded.run(last)
        with pytest.raises(QueueFull):
            seeded.run(_plain(seeded, "c", "d", maximum=2))


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("last", [9, 10, 99, 100, 1_000_000])
def test_push_plain_compares_numbers_and_not_text(seeded: SeededQueue, last: int) -> None:
    """The push after number 9, 99 … is new though its first digit is lower, and a copy of the one before is late."""
    seeded.lane = ProducerSequence("L", last - 1)
    before, after = _plain(seeded, "a"), _plain(seeded, "b")
    seeded.run(before)
    seeded.run(after)
    with seeded.unchanged(), pytest.raises(StalePush):
        seeded.run(before)

    assert seeded.redis.hkeys(seeded.keys.jobs) == [b"a", b"b"]


@pytest.mark.leaves_keys("events of a queue")
def test_push_plain_makes_functions_for_queues_that_need_them(
    seeded: SeededQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain push makes no function in the server, unless the queue keeps events or goes when nobody uses it."""
    assert operations.PUSH_PLAIN.code.partition("\nlocal redis, ")[2].count("function(") == 1
    break_script(monkeypatch, operations, "PUSH_PLAIN", "function lazy()\n", "function lazy()\nerror('made')\n")
    seeded.run(_plain(seeded, "a"))
    seeded.run(_plain(seeded, "b", "c", maximum=9))
    for field in ("events", "expires"):
        seeded.redis.hset(seeded.keys.conf, field, "60000")
        with pytest.raises(Exception, match="made"):
            seeded.run(_plain(seeded, "d"))
        seeded.redis.hdel(seeded.keys.conf, field)


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("plain", [False, True], ids=["push", "push_plain"])
def test_withdrawn_stays_withdrawn(seeded: SeededQueue, plain: bool) -> None:
    """A withdrawn push stores nothing, however often copies and the withdrawal itself come again, until the next number."""
    call = _plain(seeded, "a") if plain else operations.push(seeded.keys, seeded.lane, [entry("a")])
    withdrawal = call.withdrawal()
    assert withdrawal is not None
    for _ in range(2):
        assert seeded.run(withdrawal) is None
        with seeded.unchanged(), pytest.raises(StalePush):
            seeded.run(call)

    seeded.push("b")

    assert seeded.run(withdrawal) is None
    assert seeded.redis.hkeys(seeded.keys.jobs) == [b"b"]


@pytest.mark.parametrize("plain", [False, True], ids=["push", "push_plain"])
def test_what_was_accepted_is_not_withdrawn(seeded: SeededQueue, plain: bool) -> None:
    """Withdrawing a push that a copy has stored returns the answer of that copy."""
    call = _plain(seeded, "a") if plain else operations.push(seeded.keys, seeded.lane, [entry("a")])
    withdrawal = call.withdrawal()
    assert withdrawal is not None
    seeded.run(call)

    with seeded.unchanged():
        assert seeded.run(withdrawal) == b"1\nok\n\t"


# -- duplicates -------------------------------------------------------------------------------------------------------


@pytest.mark.row("I3")
def test_own_id_is_stored_once(seeded: SeededQueue) -> None:
    """A second push of a caller's id returns it and changes nothing but the lane: the first payload wins."""
    seeded.push(entry("a", own_id=True))
    before = seeded.dump()

    assert seeded.push(entry("a", own_id=True, priority=7)) == ["a"]

    assert seeded.since(before) == {"lane:L ~7200s": "2\nok\n.a"}


@pytest.mark.row("I3")
@pytest.mark.parametrize("kind", ["D", "C", "X"])
def test_own_id_outlives_its_job_by_a_day(seeded: SeededQueue, kind: str) -> None:
    """However the job ended, its own id is taken for another day."""
    seeded.push(entry("a", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, others=[Settlement(kind, "a", state=b"1 1 0" if kind == "X" else b"", own_id=True)])
    before = seeded.dump()
    assert before["unique:i:a ~86400s"] == (".-" if kind == "D" else "a")  # a mark that it ended well

    assert seeded.push(entry("a", own_id=True)) == ["a"]

    assert seeded.since(before) == {"lane:L ~7200s": "2\nok\n.a"}


@pytest.mark.row("I3")
@pytest.mark.parametrize("place", ["dead", "stub", "scheduled"])
def test_own_id_is_taken_while_its_envelope_is_there(seeded: SeededQueue, place: str) -> None:
    """A dead letter or stub older than the day its id was kept for is never overwritten by a push of that id."""
    seeded.push(entry("a", own_id=True, delay_ms=60_000 if place == "scheduled" else None))
    if place == "stub":
        seeded.run(operations.cancel(seeded.keys, "a"))
    if place == "dead":
        seeded.register("w")
        seeded.turn("w", 1, 1)
        seeded.turn("w", 2, others=[Settlement("X", "a", state=b"1 1 0", own_id=True)])
    seeded.redis.delete(seeded.keys.prefix + "unique:i:a")  # the day is over
    before = seeded.dump()

    assert seeded.push(entry("a", own_id=True)) == ["a"]

    assert seeded.since(before) == {"lane:L ~7200s": "2\nok\n.a"}
    assert seeded.audit() == []


def test_unique_key_returns_its_holder(seeded: SeededQueue) -> None:
    """A push whose unique key is held stores nothing and returns the holder's id."""
    seeded.push(entry("a", unique="k"))
    before = seeded.dump()

    assert seeded.push(entry("b", unique="k"), "c", entry("d", unique="l")) == ["a", "c", "d"]

    assert seeded.since(before) == {
        "jobs": {"a": ".uk" + PLAIN, "c": PLAIN, "d": ".ul" + PLAIN},
        "lane:L ~7200s": "2\nok\n.a\nd",
        "ready:0": ["a", "c", "d"],
        "unique:k:l": "d",
    }


def test_duplicates_within_one_push(seeded: SeededQueue) -> None:
    """Of messages with the same key or the same own id in one push, the first is stored."""
    given = [entry("a", unique="k"), entry("b", unique="k"), entry("o", own_id=True), "p", entry("o", own_id=True)]

    assert seeded.push(*given) == ["a", "a", "o", "p", "o"]

    state = seeded.dump()
    assert state["ready:0"] == ["a", "o", "p"]
    assert state["unique:k:k"] == "a"
    assert set(state["jobs"]) == {"a", "o", "p"}


def test_duplicate_id_does_not_take_its_key(seeded: SeededQueue) -> None:
    """A message refused because of its id does not take the unique key it came with."""
    seeded.push(entry("a", own_id=True))

    assert seeded.push(entry("a", own_id=True, unique="k"), entry("b", unique="k")) == ["a", "b"]
    assert seeded.dump()["unique:k:k"] == "b"


def test_message_refused_for_its_key_does_not_take_its_id(seeded: SeededQueue) -> None:
    """After a message that is refused because of its key, one of the same push with its id is stored."""
    seeded.push(entry("a", unique="k"))

    assert seeded.push(entry("o", own_id=True, unique="k"), entry("o", own_id=True)) == ["a", "o"]

    assert seeded.dump()["ready:0"] == ["a", "o"]
    assert seeded.audit() == []


@pytest.mark.row("D12", "I13")
def test_dead_holder_does_not_count(seeded: SeededQueue) -> None:
    """A unique key whose holder is no longer there is taken over: it cannot leak."""
    seeded.redis.set(seeded.keys.prefix + "unique:k:k", "ghost")

    assert seeded.push(entry("b", unique="k")) == ["b"]

    assert seeded.dump()["unique:k:k"] == "b"


def test_push_of_duplicates_only_calls_nobody(seeded: SeededQueue) -> None:
    """A push that stores nothing makes nothing takeable, so it adds no token."""
    seeded.push(entry("a", unique="k"))
    seeded.take_token()
    seeded.push(entry("b", unique="k"))

    assert not seeded.take_token()


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_push_beyond_the_maximum_is_refused_whole(seeded: SeededQueue) -> None:
    """A push that would exceed the maximum length stores nothing of itself, not even what would fit."""
    seeded.push("a", "b", max_length=3)

    with seeded.unchanged(), pytest.raises(QueueFull, match="holds 2 jobs and takes at most 3"):
        seeded.push("c", "d", max_length=3)

    seeded.push("c", max_length=3)


def test_maximum_counts_what_is_accepted_and_not_finished(seeded: SeededQueue) -> None:
    """Leased and scheduled jobs count towards the maximum; dead letters and stubs do not."""
    seeded.add_dead("dead")
    seeded.lease("held")
    seeded.push("stub", "ready", entry("later", delay_ms=60_000))
    seeded.run(operations.cancel(seeded.keys, "stub"))

    with pytest.raises(QueueFull, match="holds 3 jobs"):
        seeded.push("x", max_length=3)
    seeded.push("x", max_length=4)


def test_operators_maximum_wins(seeded: SeededQueue) -> None:
    """A maximum set on the queue wins over the one the code brings."""
    seeded.run(operations.configure(seeded.keys, "max_length", "1"))
    seeded.push("a", max_length=100)

    with seeded.unchanged(), pytest.raises(QueueFull, match="at most 1"):
        seeded.push("b", max_length=100)


def test_other_layout_is_refused(seeded: SeededQueue) -> None:
    """A queue written by another layout takes nothing from this version."""
    seeded.redis.hset(seeded.keys.conf, "schema", "3")

    with seeded.unchanged(), pytest.raises(ConfigurationError, match="layout 3"):
        seeded.push("a")


@pytest.mark.parametrize("options", [{"priority": 12}, {"priority": -1}, {"delay_ms": "x"}, {"expires_ms": "x"}])
def test_silly_number_fails_with_nothing_done(seeded: SeededQueue, options: dict[str, object]) -> None:
    """A number that cannot be is found before the first write."""
    seeded.push("a")
    with seeded.unchanged(), pytest.raises(Exception, match=r"answered|holds"):
        seeded.push("b", entry("c", **options))


@pytest.mark.row("D181")
@pytest.mark.redis6
@pytest.mark.redis7
def test_numbered_push_is_taken_once_in_any_portions(seeded: SeededQueue) -> None:
    """Of entries that are numbered one by one, a portion that holds one of those taken stores nothing, and says which were."""

    def push(first: int, last: int) -> int:
        entries = [entry(f"n{number}", priority=number % 2) for number in range(first, last + 1)]
        return seeded.run(operations.push_numbered(seeded.keys, "S+", range(first, last + 1), entries))

    assert push(1, 3) == 3
    before = seeded.dump()
    for portion in [(1, 3), (1, 1), (2, 2), (1, 5), (3, 3), (3, 9), (2, 3)]:
        assert push(*portion) == 3, portion
    assert seeded.since(before) == {}
    assert push(4, 9) == 9
    assert seeded.dump()["jobs"].keys() == {f"n{number}" for number in range(1, 10)}
    assert seeded.audit() == []


@pytest.mark.row("D211")
@pytest.mark.parametrize("keeps", [True, False])
def test_own_id_that_is_free_again_has_no_result_yet(seeded: SeededQueue, keeps: bool) -> None:
    """A job whose id is used again has its own outcome, parts and lines: not those of the job before, also when it keeps no result."""
    done = Settlement("D", "a", 7 * 86_400_000, b'{"status":"done","value":1}', own_id=True)
    seeded.push(entry("a", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, others=[done])
    seeded.redis.xadd(stream := seeded.keys.stream("a"), {"v": b"1"}, id="1-7")
    seeded.redis.rpush(lines := seeded.keys.logs("a"), b"before")
    for key in (stream, lines):
        seeded.redis.pexpire(key, 7 * 86_400_000)
    seeded.redis.delete(seeded.keys.prefix + "unique:i:a")  # a day passes

    seeded.push(entry("a", own_id=True))

    assert seeded.run(operations.await_result(seeded.keys, "a", "")) == ("waiting", b"")
    assert seeded.redis.exists(stream, lines) == 0
    seeded.turn("w", 3, 1)
    record = b'{"status":"done","value":2}' if keeps else b""
    seeded.turn("w", 4, others=[Settlement("D", "a", 600_000 if keeps else 0, record, own_id=True)])
    assert seeded.run(operations.await_result(seeded.keys, "a", "")) == (
        ("result", record) if keeps else ("ended", b"-")
    )
    assert seeded.audit() == []
