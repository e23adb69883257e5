"""The kept results of a turn: many of them in few commands, each readable for its own time."""

from __future__ import annotations

from collections import Counter

import pytest
import redis as redis_py

from conveyor.ids import new_ids
from conveyor.store import inspection, operations
from conveyor.store.operations import Settlement, TurnReport
from support.seeded_queue import SeededQueue

TEN_MINUTES = 600_000
STEM = "0Q8AwEk"
"""The first seven characters of an id: 64 ms."""


def ids_of(window: str, count: int) -> list[str]:
    return [f"{window}{n:015}" for n in range(count)]


def keep(
    seeded: SeededQueue, *ids: str, ms: int = TEN_MINUTES, record: bytes = b"{}", worker: str = "w", number: int = 2
) -> operations.TurnReply:
    """Let *worker* end *ids* in one turn, each with a result that is kept."""
    report = TurnReport(list(ids), results=dict.fromkeys(ids, (ms, record)))
    return seeded.turn(worker, number, report=report)


def outcome(seeded: SeededQueue, id_: str) -> tuple[str, bytes]:
    return seeded.run(operations.await_result(seeded.keys, id_, ""))


def ends_in(seeded: SeededQueue, key: str) -> int:
    return seeded.redis.pttl(key)


def commands(client: redis_py.Redis) -> Counter[str]:
    return Counter({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()})


@pytest.mark.row("D301")
@pytest.mark.redis6
@pytest.mark.standalone_only("counts the commands of one server")
def test_a_turn_keeps_its_results_in_few_commands(seeded: SeededQueue) -> None:
    """Five hundred results of one window cost as many commands as one: none is written, removed or looked up alone."""
    counts = []
    for number, window in ((1, "0Q8AwEA"), (500, "0Q8AwEB")):
        ids = ids_of(window, number)
        worker = f"w{number}"
        seeded.lease(*ids, worker=worker)
        before = commands(seeded.redis)
        assert keep(seeded, *ids, worker=worker).held == 0
        counts.append(commands(seeded.redis) - before - Counter(info=1))
        assert {outcome(seeded, id_) for id_ in ids} == {("result", b"{}")}

    assert counts[0] == counts[1]
    assert counts[1]["hset"] == 2  # the number of the turn, and all results
    assert "set" not in counts[1]


@pytest.mark.redis6
def test_results_are_in_the_window_of_their_id(seeded: SeededQueue) -> None:
    """Ids of the same 64 ms share a hash that lives an eighth longer than its first result; others have another."""
    first, second = ids_of(STEM, 2), ids_of("0Q8AwEl", 2)
    seeded.lease(*first, *second)
    before = seeded.dump()

    keep(seeded, *first, *second, ms=640_000)

    changed = seeded.since(before)
    assert changed.pop("jobs") is None
    assert set(changed.pop("leased:w")) == {".turn", ".about", ".lease"}
    assert changed == {
        f"results:{STEM} ~720s": dict.fromkeys(first, "now+640s\n{}"),
        "results:0Q8AwEl ~720s": dict.fromkeys(second, "now+640s\n{}"),
    }
    assert {outcome(seeded, id_) for id_ in (*first, *second)} == {("result", b"{}")}
    assert seeded.run(inspection.get_job(seeded.keys, first[0])) == ("result", None, b"{}")
    assert outcome(seeded, ids_of(STEM, 3)[2]) == ("gone", b"")
    assert seeded.audit() == []


@pytest.mark.row("D301")
@pytest.mark.redis6
def test_a_result_ends_before_its_window(seeded: SeededQueue) -> None:
    """A result whose time is over is gone for every reader, though the hash that holds it lives on."""
    [id_, other] = ids_of(STEM, 2)
    seeded.lease(id_, other)
    keep(seeded, id_, other)
    window = seeded.keys.result_window(id_)
    ends, record = seeded.redis.hget(window, id_).split(b"\n")
    assert abs(int(ends) - seeded.now() - TEN_MINUTES) < 60_000

    seeded.redis.hset(window, id_, b"%d\n%b" % (seeded.now() - 1, record))

    assert outcome(seeded, id_) == ("gone", b"")
    assert seeded.run(inspection.get_job(seeded.keys, id_))[0] == "none"
    assert outcome(seeded, other) == ("result", b"{}")


@pytest.mark.row("D301")
@pytest.mark.redis6
@pytest.mark.parametrize(
    ("ms", "record", "shares"),
    [
        (TEN_MINUTES, b"{}", True), (620_000, b"{}", True), (700_000, b"{}", False), (6_000_000, b"{}", False),
        (500_000, b"{}", False), (1000, b"{}", False), (TEN_MINUTES, b"x" * 4096, True), (TEN_MINUTES, b"x" * 4097, False),
    ],
)  # fmt: skip
def test_a_result_lives_as_long_as_was_asked(seeded: SeededQueue, ms: int, record: bytes, shares: bool) -> None:
    """A result that would end later or much sooner than its window, or is long, has a key of its own with its own time."""
    [first, second] = ids_of(STEM, 2)
    seeded.lease(first, second)
    keep(seeded, first)
    window = seeded.keys.result_window(first)
    before = ends_in(seeded, window)

    keep(seeded, second, ms=ms, record=record, number=3)

    assert outcome(seeded, first) == ("result", b"{}")
    assert outcome(seeded, second) == ("result", record)
    assert ends_in(seeded, window) <= before  # a window never lives longer than it was made for
    assert seeded.redis.hlen(window) == 1 + shares
    own = ends_in(seeded, seeded.keys.result(second))
    assert (own == -2) if shares else (ms - 60_000 < own <= ms)


@pytest.mark.redis6
def test_results_of_one_report_with_different_times(seeded: SeededQueue) -> None:
    """Jobs of one report keep their results for as long as each asked, also beside jobs without a result."""
    [minute, plain, ten, hour] = ids_of(STEM, 4)
    seeded.lease(minute, plain, ten, hour)
    results = {hour: (3_600_000, b"3"), minute: (60_000, b"1"), ten: (TEN_MINUTES, b"2")}

    turn = seeded.turn("w", 2, report=TurnReport([minute, plain, ten, hour], results=results))

    assert (turn.held, turn.lost) == (0, [])
    assert [outcome(seeded, id_) for id_ in (minute, ten, hour)] == [("result", b"%d" % n) for n in (1, 2, 3)]
    assert outcome(seeded, plain) == ("gone", b"")
    for id_, (ms, _) in results.items():
        holder = (
            seeded.keys.result(id_) if seeded.redis.exists(seeded.keys.result(id_)) else seeded.keys.result_window(id_)
        )
        assert ms - 60_000 < ends_in(seeded, holder) <= 1.125 * ms


@pytest.mark.redis6
@pytest.mark.parametrize(("counts", "encoding"), [([5], "listpack"), ([300], "hashtable"), ([20] * 5, "hashtable")])
def test_many_short_results_are_a_table(seeded: SeededQueue, counts: list[int], encoding: str) -> None:
    """A window of many short results is a hash table, and no list that every write has to search."""
    ids = ids_of(STEM, sum(counts))
    seeded.lease(*ids)

    for number, count in enumerate(counts):
        keep(seeded, *(ids[sum(counts[:number]) :][:count]), number=2 + number)

    found = seeded.redis.object("encoding", seeded.keys.result_window(ids[0])).decode()
    assert found.replace("ziplist", "listpack") == encoding
    assert {outcome(seeded, id_) for id_ in ids} == {("result", b"{}")}


@pytest.mark.row("D301")
@pytest.mark.redis6
def test_a_full_window_takes_no_more(seeded: SeededQueue) -> None:
    """A hash of results stays small enough to be removed at once: what it has no room for gets keys of its own."""
    ids = ids_of(STEM, 10)
    seeded.lease(*ids)
    keep(seeded, ids[0])
    window = seeded.keys.result_window(ids[0])
    seeded.redis.hset(window, mapping={f"seed-{n}": "1\n" for n in range(8188)})

    keep(seeded, *ids[1:], number=3)

    assert seeded.redis.hlen(window) == 8192
    assert {outcome(seeded, id_) for id_ in ids} == {("result", b"{}")}
    assert sum(seeded.redis.exists(seeded.keys.result(id_)) for id_ in ids) == 6


@pytest.mark.row("D301")
@pytest.mark.redis6
def test_a_result_of_a_lost_lease_is_not_kept(seeded: SeededQueue) -> None:
    """Of a report with results only those of jobs that the worker still holds are kept."""
    [mine, theirs] = ids_of(STEM, 2)
    seeded.lease(theirs, worker="other")
    seeded.lease(mine)

    turn = keep(seeded, theirs, mine)

    assert turn.lost == [theirs]
    assert outcome(seeded, mine) == ("result", b"{}")
    assert outcome(seeded, theirs) == ("waiting", b"")
    assert seeded.redis.hkeys(seeded.keys.result_window(mine)) == [mine.encode()]


@pytest.mark.row("D301")
def test_of_two_outcomes_the_kept_one_counts(seeded: SeededQueue) -> None:
    """A job that a report names as done with a result, and settles again, has that result."""
    [id_] = ids_of(STEM, 1)
    seeded.lease(id_)
    again = Settlement("D", id_, TEN_MINUTES, b"second")

    seeded.turn("w", 2, report=TurnReport([id_], [again], results={id_: (TEN_MINUTES, b"first")}))

    assert outcome(seeded, id_) == ("result", b"first")
    assert not seeded.redis.exists(seeded.keys.result(id_))


@pytest.mark.redis6
def test_waiters_are_told_the_results_of_a_report(seeded: SeededQueue) -> None:
    """Whoever waits for a job of a report is told its own result, and "" for one that keeps none."""
    ids = ids_of(STEM, 4)
    seeded.lease(*ids)
    for id_ in ids[1:]:
        assert seeded.run(operations.await_result(seeded.keys, id_, "me"))[0] == "waiting"
    with seeded.redis.pubsub() as pubsub:
        pubsub.subscribe("me")
        assert pubsub.get_message(timeout=60)["type"] == "subscribe"
        results = {id_: (TEN_MINUTES, id_.encode()) for id_ in ids[:3]}

        seeded.turn("w", 2, report=TurnReport(ids, results=results))

        heard = [pubsub.get_message(timeout=60)["data"] for _ in ids[1:]]
    assert sorted(heard) == [f"{ids[1]}\n{ids[1]}".encode(), f"{ids[2]}\n{ids[2]}".encode(), f"{ids[3]}\n".encode()]
    assert not seeded.redis.exists(seeded.keys.waiters)


@pytest.mark.redis6
def test_a_report_beyond_the_limits_of_unpack(seeded: SeededQueue) -> None:
    """A report of more results than Lua unpacks at once is kept whole."""
    ghosts, ids = ids_of("0Q8AwEz", 7500), new_ids(900)
    seeded.lease(*ids)

    turn = keep(seeded, *ghosts, *ids)

    assert turn.lost == ghosts
    assert (turn.held, seeded.redis.hlen(seeded.keys.jobs)) == (0, 0)
    assert {outcome(seeded, id_) for id_ in ids} == {("result", b"{}")}
    assert not seeded.redis.exists(seeded.keys.result_window(ghosts[0]))


@pytest.mark.row("D304")
@pytest.mark.redis6
@pytest.mark.standalone_only("counts the commands of one server")
def test_a_turn_remembers_its_ends_in_two_commands(seeded: SeededQueue) -> None:
    """Five hundred ends without a result cost as many commands as one, two, and 16 bytes each for ten minutes."""
    counts = []
    for flags, number, window in (("", 500, "0Q8AwEA"), ("e", 1, "0Q8AwEB"), ("e", 500, "0Q8AwEC")):
        ids = ids_of(window, number)
        worker = f"w{window}"
        seeded.lease(*ids, worker=worker)
        before = commands(seeded.redis)
        assert seeded.turn(worker, 2, done=ids, flags=flags).held == 0
        counts.append(commands(seeded.redis) - before - Counter(info=1))
        assert {outcome(seeded, id_) for id_ in ids} == {("ended", b"-") if flags else ("gone", b"")}
        assert seeded.redis.strlen(f"{seeded.keys.prefix}ended:{window}") == (23 * number if flags else 0)
        assert outcome(seeded, ids_of(window, 501)[500]) == ("gone", b"")

    assert counts[2] - counts[0] == Counter(append=1, pexpire=1)
    assert counts[1] == counts[2]
    assert TEN_MINUTES - 60_000 < ends_in(seeded, f"{seeded.keys.prefix}ended:0Q8AwEC") <= TEN_MINUTES


@pytest.mark.row("D304")
@pytest.mark.redis6
def test_an_end_outlives_a_short_result(seeded: SeededQueue) -> None:
    """A job is known to have ended well when its result is kept for less than ten minutes, or was not kept at all."""
    short, unkept, _, long = ids = ids_of(STEM, 4)
    seeded.lease(*ids)
    results = {short: (1000, b"1"), unkept: (0, b""), long: (3_600_000, b"2")}
    seeded.turn("w", 2, report=TurnReport(ids, results=results), flags="e")
    assert [outcome(seeded, id_) for id_ in (short, long)] == [("result", b"1"), ("result", b"2")]

    for id_ in (short, long):
        seeded.redis.delete(seeded.keys.result(id_))
    seeded.redis.delete(seeded.keys.result_window(short))

    assert [outcome(seeded, id_) for id_ in ids] == [("ended", b"+"), ("ended", b"+"), ("ended", b"-"), ("gone", b"")]


def test_an_end_is_found_only_in_its_place(seeded: SeededQueue) -> None:
    """Bytes of two neighbouring ends that happen to spell a third id do not make that one known."""
    first, second = STEM + "a" * 15, STEM + "a" * 14 + "b"
    seeded.lease(first, second)
    seeded.turn("w", 2, done=[first, second], flags="e")

    assert [outcome(seeded, id_) for id_ in (first, second)] == [("ended", b"-"), ("ended", b"-")]
    assert outcome(seeded, STEM + "aaaaaaaaaaaaaa-"[:15]) == ("gone", b"")
    assert outcome(seeded, STEM + "aaaaaaa-aaaaaaa") == ("gone", b"")
    assert seeded.run(operations.cancel(seeded.keys, first)) == 0
    assert seeded.run(operations.cancel(seeded.keys, STEM + "aaaaaaa-aaaaaaa")) == operations.CANCEL_UNKNOWN


def test_layout_one_is_read_and_raised(seeded: SeededQueue) -> None:
    """A queue of layout 1, where each result had a key of its own, is served: results of before stay readable."""
    [old, new] = ids_of(STEM, 2)
    seeded.redis.hset(seeded.keys.conf, "schema", "1")
    seeded.redis.set(seeded.keys.result(old), "before", px=TEN_MINUTES)

    seeded.lease(new)
    keep(seeded, new)

    assert outcome(seeded, old) == ("result", b"before")
    assert outcome(seeded, new) == ("result", b"{}")
    assert seeded.redis.hget(seeded.keys.conf, "schema") == b"2"
