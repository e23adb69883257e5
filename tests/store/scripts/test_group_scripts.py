"""Groups, tickets, slots and limits: what the scripts do with them, step by step."""

from __future__ import annotations

import itertools
import random
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from conveyor.errors import ConveyorError
from conveyor.payload.records import write_attributes
from conveyor.store import inspection, limits, operations
from conveyor.store.operations import Settlement, TurnReport
from support.script_faults import Snapshot, break_script, refuse_each_command
from support.seeded_queue import LEASE, SeededQueue, entry
from support.server_dump import difference, exact
from support.waiting import until

pytestmark = [pytest.mark.redis6, pytest.mark.redis7]


def declare(seeded: SeededQueue, **texts: str) -> None:
    """Record limits."""
    assert seeded.run(limits.declare_limits(seeded.keys, texts, replace=True)) == {}


def waiting(seeded: SeededQueue) -> int:
    """Return how many jobs wait in groups; the queue must be consistent."""
    assert seeded.audit() == []
    return seeded.run(inspection.counts(seeded.keys)).waiting


def test_group_runs_one_at_a_time_in_order(seeded: SeededQueue) -> None:
    """Of a group key one job is leased at a time, in the order of the pushes; other keys and plain jobs go on."""
    seeded.push(*(entry(f"{key}{n}", group=key) for n in (1, 2) for key in "ab"), "plain")
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 9).ids == ["a1", "b1", "plain"]
    assert seeded.turn("v", 1, 9).ids == []
    assert waiting(seeded) == 2
    assert seeded.turn("w", 2, 9, done=["a1"]).ids == ["a2"]
    assert seeded.turn("w", 3, 9, done=["a2", "b1", "plain"]).ids == ["b2"]
    assert seeded.turn("w", 4, 9, done=["b2"]).held == 0
    assert waiting(seeded) == 0
    assert seeded.redis.hgetall(seeded.keys.prefix + "limits") == {}
    assert not seeded.redis.exists(seeded.keys.prefix + "tickets", seeded.keys.prefix + "slots")


@pytest.mark.row("C292")
def test_series_of_a_group(seeded: SeededQueue) -> None:
    """
    A worker that runs jobs in their order gets several of a group in one turn, no more than it asks for; others get none of them.

    A copy of the turn has the same jobs in the same order. The group is leased again when all of them have ended.
    """
    seeded.push(*(entry(f"a{n}", group="a", expires_ms=2**42 if n == 4 else None) for n in range(1, 9)))
    seeded.register("w", "v")
    call = seeded.turn_call("w", 1, 9, flags="s5")
    for _ in range(2):
        reply = seeded.run(call)
        assert (reply.ids, reply.has_series) == (["a1", "a2", "a3", "a4", "a5"], True)
    assert seeded.turn("v", 1, 9, flags="s5").ids == []
    assert waiting(seeded) == 3
    assert seeded.turn("w", 2, 9, done=["a1", "a2", "a3", "a4"], flags="s5").ids == []
    assert waiting(seeded) == 3
    last = seeded.turn("w", 3, 9, done=["a5"], flags="s5")
    assert (last.ids, last.has_series) == (["a6", "a7", "a8"], True)
    assert seeded.turn("w", 4, 9, done=last.ids).held == 0
    assert waiting(seeded) == 0
    assert seeded.redis.hgetall(seeded.keys.prefix + "limits") == {}


@pytest.mark.row("C292")
def test_series_goes_on(seeded: SeededQueue) -> None:
    """
    Jobs of a group follow those that a worker holds where it holds all that run or wait for a retry, by its own number.

    A copy of the turn has the same jobs. A pause of the key, a limit of the next job and other groups without number let none follow.
    """
    declare(seeded, all="c 100 -")
    seeded.push(*(entry(f"a{n:02}", group="a") for n in range(1, 13)), entry("x", group="a", limits=("1:all",)))
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 9, flags="s4").ids == ["a01", "a02", "a03", "a04"]
    assert seeded.turn("v", 1, 9, flags="s4").ids == []
    call = seeded.turn_call("w", 2, 9, done=["a01"], flags="s4\t3:a\t1:b")
    for _ in range(2):
        reply = seeded.run(call)
        assert (reply.ids, reply.has_series, reply.held) == (["a05", "a06", "a07", "a08"], True, 7)
    for number, asked in enumerate(("", "\t6:a", "\t8:a", "\t7:b"), 3):
        assert seeded.turn("w", number, 9, flags="s4" + asked).ids == []
    seeded.run(limits.set_group(seeded.keys, "a", weight=None, paused=True))
    assert seeded.turn("w", 7, 9, flags="s4\t7:a").ids == []
    seeded.run(limits.set_group(seeded.keys, "a", weight=None, paused=False))
    assert seeded.turn("w", 8, 2, flags="s4\t7:a").ids == ["a09", "a10"]
    assert seeded.turn("w", 9, 9, flags="s9\t9:a").ids == ["a11", "a12"]
    assert seeded.turn("w", 10, 9, done=["a02"], flags="s9\t10:a").ids == []
    assert seeded.audit() == []
    end = Settlement("R", "a03", ms=3_600_000, state=b"1 1 0")
    back = [Settlement("F", f"a{n:02}") for n in range(12, 3, -1)]
    assert seeded.turn("w", 11, 9, others=[*back, end], flags="s9\t1:b").ids == []
    assert waiting(seeded) == 10
    seeded.redis.zadd(seeded.keys.due, {"a03": 1})
    assert seeded.turn("v", 2, 20, flags="s20").ids == [f"a{n:02}" for n in range(3, 13)]
    assert seeded.turn("v", 3, 20, done=[f"a{n:02}" for n in range(3, 13)], flags="s20").ids == ["x"]
    assert seeded.turn("v", 4, 20, done=["x"]).held == 0
    assert seeded.redis.hgetall(seeded.keys.prefix + "limits") == {}
    assert seeded.audit() == []


def test_series_only_of_what_is_left(seeded: SeededQueue) -> None:
    """Each group and plain job has its turn before a group has a series; a limit, an opened group or a running job allows none."""
    declare(seeded, two="c 2 key", all="c 100 -")
    seeded.push(
        *(entry(f"a{n}", group="a") for n in range(5)), *(entry(f"b{n}", group="b") for n in range(5)), "p0", "p1"
    )
    seeded.register("w")
    assert seeded.turn("w", 1, 3, flags="s9").ids == ["a0", "b0", "p0"]
    assert seeded.turn("w", 2, 9, done=["b0"], flags="s9").ids == ["p1", "b1", "b2", "b3", "b4"]
    assert seeded.turn("w", 3, 9, done=["a0"], flags="s9").ids == ["a1", "a2", "a3", "a4"]
    seeded.push(*(entry(f"c{n}", group="c", limits=("1:two:c",)) for n in range(4)))
    seeded.push(*(entry(f"d{n}", group="d", limits=("1:all",)) for n in range(4)))
    seeded.push(entry("e0", group="e"), entry("e1", group="e", limits=("1:all",)), entry("e2", group="e"))
    reply = seeded.turn("w", 4, 20, flags="s9")
    assert (sorted(reply.ids), reply.has_series) == (["c0", "c1", "d0", "e0"], False)
    assert waiting(seeded) == 7


@pytest.mark.row("C292")
@pytest.mark.parametrize("way", ["F", "R", "L", "reap"])
def test_rest_of_a_series_comes_back_in_order(seeded: SeededQueue, way: str) -> None:
    """Jobs of a series that a worker has not started stand before those behind them, and behind the job that ended otherwise."""
    seeded.push(*(entry(f"a{n}", group="a") for n in range(1, 7)))
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 9, flags="s4").ids == ["a1", "a2", "a3", "a4"]
    if way == "reap":
        seeded.turn("w", 2, 0, done=["a1"])
        seeded.run(operations.reap(seeded.keys, "w"))
    else:
        end = Settlement(way, "a2", ms=3_600_000 if way == "R" else 0, state=b"1 1 0")
        seeded.turn("w", 2, 0, done=["a1"], others=[Settlement("F", "a4"), Settlement("F", "a3"), end])
    if way == "R":
        assert seeded.turn("v", 1, 9, flags="s9").ids == []
        seeded.redis.zadd(seeded.keys.due, {"a2": 1})
    assert seeded.audit() == []
    assert seeded.turn("v", 2, 9, flags="s9").ids == ["a2", "a3", "a4", "a5", "a6"]
    assert waiting(seeded) == 0


@pytest.mark.row("C290")
@pytest.mark.parametrize("way", ["R", "F", "reap", "leave"])
def test_retried_or_returned_job_keeps_its_place(seeded: SeededQueue, way: str) -> None:
    """A job that is retried, returned or reaped runs before those behind it, and blocks its key alone."""
    seeded.push(*(entry(f"{key}{n}", group=key) for n in (1, 2) for key in "ab"))
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 9).ids == ["a1", "b1"]
    if way in "RF":
        seeded.turn("w", 2, 0, others=[Settlement(way, "a1", ms=3_600_000, state=b"1 1 0")])
    else:
        seeded.run(operations.reap(seeded.keys, "w", crashed=way == "reap"))
    if way == "R":
        assert seeded.turn("v", 1, 9).ids == []
        assert seeded.turn("v", 2, 9).ids == []
        assert seeded.turn("w", 3, 9, done=["b1"]).ids == ["b2"]
        seeded.redis.zadd(seeded.keys.due, {"a1": 1})
        assert waiting(seeded) == 1
        assert seeded.turn("v", 3, 9).ids == ["a1"]
        assert seeded.turn("v", 4, 9, done=["a1"]).ids == ["a2"]
    else:
        first = seeded.turn("v", 1, 9).ids
        assert sorted(first) == (["a1"] if way == "F" else ["a1", "b1"])
        assert sorted(seeded.turn("v", 2, 9, done=first).ids) == (["a2"] if way == "F" else ["a2", "b2"])
    assert seeded.audit() == []


@pytest.mark.row("C290")
def test_cancelled_retry_frees_its_key(seeded: SeededQueue) -> None:
    """A job that waits for its retry and is cancelled gives its key to the next."""
    seeded.push(entry("a1", group="a"), entry("a2", group="a"))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    assert seeded.turn("w", 2, 9, others=[Settlement("R", "a1", ms=3_600_000, state=b"1 1 0")]).ids == []
    assert seeded.run(operations.cancel(seeded.keys, "a1")) == operations.CANCEL_REMOVED
    assert seeded.turn("w", 3, 9).ids == ["a2"]
    assert seeded.audit() == []


def test_groups_take_turns_with_plain_jobs(seeded: SeededQueue) -> None:
    """A group that leases goes to the tail: a flood of one key lets others and plain jobs through; a weight is a larger share."""
    declare(seeded, open="c 1000 key")
    seeded.push(*(entry(f"a{n:02}", limits=("1:open:a",)) for n in range(20)))
    seeded.push(entry("b00", limits=("1:open:b",)), "p0", entry("b01", limits=("1:open:b",)), "p1")
    seeded.register("w")
    order = [seeded.turn("w", number, 1).ids[0] for number in range(1, 9)]
    assert order == ["a00", "b00", "p0", "p1", "a01", "b01", "a02", "a03"]
    seeded.push(*(entry(f"b1{n}", limits=("1:open:b",)) for n in range(9)))
    seeded.run(limits.set_group(seeded.keys, "b", weight=3, paused=None))
    assert [id_[0] for id_ in seeded.turn("w", 9, 4).ids] == ["a", "b", "b", "b"]
    assert [seeded.turn("w", number, 1).ids[0][0] for number in range(10, 18)] == [*"abbbabbb"]
    assert seeded.audit() == []
    assert not seeded.redis.exists(seeded.keys.prefix + "credits")


@pytest.mark.parametrize("most", [1, 3, 7, 10, 48])
def test_a_weight_is_a_share_however_many_a_turn_leases(seeded: SeededQueue, most: int) -> None:
    """Of two groups the one with weight 4 gets four jobs for each of the other, in turns of any size, and never falls behind."""
    declare(seeded, open="c 1000 key")
    for key in ("light", "heavy"):
        seeded.push(*(entry(f"{key}{n:03}", limits=(f"1:open:{key}",)) for n in range(300)))
    seeded.run(limits.set_group(seeded.keys, "heavy", weight=4, paused=None))
    seeded.register("w")
    leased: list[str] = []
    while len(leased) < 300:
        leased += seeded.turn("w", len(leased) + 1, most).ids
        heavy = sum(one.startswith("heavy") for one in leased)
        assert abs(heavy - 4 * (len(leased) - heavy)) <= 4


def test_paused_key_stands_still(seeded: SeededQueue) -> None:
    """Nothing of a paused key is leased until it is resumed; what it had pushed meanwhile comes too."""
    seeded.push(entry("a1", group="a"), entry("b1", group="b"))
    seeded.register("w")
    seeded.run(limits.set_group(seeded.keys, "a", weight=None, paused=True))
    assert seeded.turn("w", 1, 9).ids == ["b1"]
    seeded.push(entry("a2", group="a", priority=5))
    assert seeded.turn("w", 2, 9, done=["b1"]).ids == []
    assert seeded.run(limits.list_groups(seeded.keys)) == [limits.GroupRecord("a", 2, 1, True, 0)]
    seeded.run(limits.set_group(seeded.keys, "a", weight=None, paused=False))
    assert seeded.turn("w", 3, 9).ids == ["a2"]
    assert seeded.turn("w", 4, 9, done=["a2"]).ids == ["a1"]
    assert seeded.audit() == []


@pytest.mark.row("I14", "D18")
def test_slots_of_a_concurrency_limit(seeded: SeededQueue) -> None:
    """Never more jobs than the limit says are leased; each way out frees a slot, and the operator's number wins until it is reset."""
    declare(seeded, few="c 2 -")
    seeded.push(*(entry(f"j{n}", limits=("1:few",)) for n in range(9)))
    seeded.register("w", "v")
    assert seeded.turn("w", 1, 9).ids == ["j0", "j1"]
    assert seeded.turn("v", 1, 9).ids == []
    assert seeded.run(limits.list_limits(seeded.keys)) == [limits.LimitRecord("few", "", "c 2 -", "", 2, 7, None)]
    assert seeded.turn("w", 2, 0, done=["j0"]).more
    assert seeded.turn("v", 2, 9).ids == ["j2"]
    seeded.run(limits.set_limit(seeded.keys, "few", None, "c 4"))
    assert seeded.turn("v", 3, 9).ids == ["j3", "j4"]
    assert seeded.run(limits.reset_limit(seeded.keys, "few", None)) == 1
    assert seeded.turn("w", 3, 9, others=[Settlement("X", "j1", state=b"1 1 0")]).ids == []
    seeded.run(operations.reap(seeded.keys, "v"))
    assert seeded.turn("w", 4, 9).ids == ["j2", "j3"]
    assert seeded.audit() == []


@pytest.mark.row("I14")
def test_rate_is_exact_over_every_pair_of_starts(seeded: SeededQueue) -> None:
    """Start k comes no earlier than the length of the window after start k - n, and the limit is used while there is work."""
    declare(seeded, three="r 3 60 0 -")
    seeded.push(*(entry(f"j{n:02}", limits=("1:three",)) for n in range(12)))
    seeded.register("w")
    starts: list[int] = []
    number, ends = 0, time.monotonic() + 60
    while len(starts) < 15:
        number += 1
        # One of another group looks at the limit at any time, not only when it opens.
        seeded.push(entry(f"x{number}", group=f"x{number}", limits=("1:three",)))
        reply = seeded.turn("w", number, 9)
        starts += [reply.now] * len(reply.ids)
        assert reply.ids or reply.next_due is not None
        assert seeded.audit() == []
        assert time.monotonic() < ends
        time.sleep(0.003)
    assert all(later - earlier >= 60 for earlier, later in zip(starts, starts[3:], strict=False))


@pytest.mark.row("I14")
def test_a_start_counts_for_a_whole_window(seeded: SeededQueue) -> None:
    """A start counts for as long as the window lasts, wherever the clock stands, and no longer."""
    seconds, micros = seeded.redis.time()
    now = seconds * 1000 + micros // 1000
    per = (now - 60_000) // 500_000  # an hour; windows of this length, counted from 1970, began one to ten minutes ago
    declare(seeded, one=f"r 1 {per} 0 -")
    seeded.push(entry("a", limits=("1:one",)), entry("b", limits=("1:one",)))
    seeded.register("w")
    assert seeded.turn("w", 1, 9).ids == ["a"]
    seeded.redis.lset(f"{seeded.keys.prefix}rate:one", 0, now - 1_800_000)
    assert seeded.turn("w", 2, 9).ids == []
    seeded.redis.lset(f"{seeded.keys.prefix}rate:one", 0, now - per - 1)
    seeded.push(entry("c", group="c", limits=("1:one",)))
    assert seeded.turn("w", 3, 9).ids == ["c"]  # it looks at the limit now, and b when it opens
    assert seeded.audit() == []


@pytest.mark.parametrize("text", ["r 10 1000 0 cost", "r 5000 1000 0 -"])
def test_rate_with_costs_counts_them(seeded: SeededQueue, text: str) -> None:
    """Jobs pay their cost; a charge beside it delays the next, and what is given back lets it go."""
    declare(seeded, tokens=text)
    n = int(text.split()[1])
    cost = str(n * 4 // 10)
    seeded.push(*(entry(f"j{i}", limits=(f"{cost}:tokens",)) for i in range(4)))
    seeded.register("w")
    assert seeded.turn("w", 1, 9).ids == ["j0", "j1"]
    back = Settlement("G", "j0", ms=-int(cost), record=b"tokens")
    assert seeded.turn("w", 2, 9, others=[back]).ids == ["j2"]
    assert seeded.turn("w", 3, 9, others=[Settlement("G", "j1", ms=n, record=b"tokens")]).ids == []
    [record] = seeded.run(limits.list_limits(seeded.keys))
    assert record.used >= n
    assert record.opens_at is not None
    assert seeded.audit() == []


def test_what_is_given_back_late_is_nobody_elses(seeded: SeededQueue) -> None:
    """A job that cost less gives that back to the window of its own start; when it has left the window, to none: others paid for theirs."""
    declare(seeded, tokens="r 100 3600000 0 -/cost")
    seeded.push(*(entry(f"j{i}", limits=("50:tokens",)) for i in range(3)))
    seeded.register("w")
    began = seeded.now() - 1_735_689_600_000
    assert seeded.turn("w", began - 3_700_000, 9).ids == ["j0", "j1"]
    back = Settlement("G", "j0", ms=-40, record=b"tokens", state=b"50")
    assert seeded.turn("w", began, 9, others=[back]).ids == []
    [record] = seeded.run(limits.list_limits(seeded.keys))
    assert record.used == 100
    seeded.redis.delete(f"{seeded.keys.prefix}rate:tokens")
    seeded.redis.zadd(seeded.keys.due, {"\ttokens": 1}, xx=True)
    assert seeded.turn("w", began + 1, 9).ids == ["j2"]
    back = Settlement("G", "j2", ms=-40, record=b"tokens", state=b"50")
    seeded.turn("w", began + 2, others=[back])
    [record] = seeded.run(limits.list_limits(seeded.keys))
    assert record.used == 10
    assert seeded.audit() == []


def test_a_charge_counts_from_what_was_paid(seeded: SeededQueue) -> None:
    """A job that costs more than its limit lets pass, since it was lowered, has paid that: its true cost counts from there."""
    declare(seeded, tokens="r 100 3600000 0 -/cost")
    seeded.push(entry("j0", limits=("100:tokens",)))
    seeded.run(limits.set_limit(seeded.keys, "tokens", None, "r 50 3600000 0"))
    seeded.register("w")
    assert seeded.turn("w", 1, 9).ids == ["j0"]
    seeded.turn("w", 2, others=[Settlement("G", "j0", ms=-40, record=b"tokens", state=b"100")])
    [record] = seeded.run(limits.list_limits(seeded.keys))
    assert record.used == 60
    assert seeded.audit() == []


@pytest.mark.parametrize(("old", "new"), [(0, 1400), (1200, 200), (1999, 1), (1500, 0), (700, 1300)])
def test_starts_of_a_large_rate_are_counted(seeded: SeededQueue, old: int, new: int) -> None:
    """Of a rate above a thousand all starts in its window are told, and none that has left it."""
    declare(seeded, large="r 2000 60000 0 -")
    now, key = seeded.now(), f"{seeded.keys.prefix}rate:large"
    for count, at in ((old, now - 70_000), (new, now - 1000)):
        if count:
            seeded.redis.lpush(key, *[at] * count)
    [record] = seeded.run(limits.list_limits(seeded.keys))
    assert record.used == new


def test_smooth_rate_spaces_starts(seeded: SeededQueue) -> None:
    """Of a smooth rate one starts at a time, an interval apart."""
    declare(seeded, even="r 2 3600000 1 -")
    seeded.push(*(entry(f"j{i}", limits=("1:even",)) for i in range(2)))
    seeded.register("w")
    reply = seeded.turn("w", 1, 9)
    assert reply.ids == ["j0"]
    assert reply.next_due is not None
    assert 1_790_000 < reply.next_due - reply.now <= 1_800_001
    assert seeded.audit() == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("r 1 3600000 1", "r 10 100 1"),
        ("r 1 3600000 1", "r 10 100 0"),
        ("r 1 3600000 0", "r 10 100 1"),
        ("r 5000 12800 0", "r 10 100 1"),
        ("r 1 3600000 0", "r 1 100 0"),
    ],
)
def test_a_rate_that_is_made_faster_starts_at_its_new_pace(seeded: SeededQueue, before: str, after: str) -> None:
    """A job that waits starts when the new limit has room after the last start, and not when the one before would have had."""
    declare(seeded, even=f"{before} -")
    seeded.push(*(entry(f"j{i}", limits=("1:even",)) for i in range(3)))
    seeded.register("w")
    assert seeded.turn("w", 1, 1).ids == ["j0"]
    seeded.turn("w", 2, 0)

    seeded.run(limits.set_limit(seeded.keys, "even", None, after))
    [record] = seeded.run(limits.list_limits(seeded.keys))

    assert (record.opens_at or seeded.now()) <= seeded.now() + 250
    number = itertools.count(3)
    for expected in ("j1", "j2"):
        assert until(lambda: seeded.turn("w", next(number), 1).ids, seconds=10) == [expected]
    assert seeded.audit() == []


@pytest.mark.parametrize("after", ["r 1 3600000 1", "r 1 3600000 0"])
def test_a_smooth_rate_that_is_made_slower_counts_its_last_start(seeded: SeededQueue, after: str) -> None:
    """The interval of now counts from the last start, also where the one before is over."""
    declare(seeded, even="r 1 60000 1 -")
    seeded.push(*(entry(f"j{i}", limits=("1:even",)) for i in range(2)))
    seeded.register("w")
    assert seeded.turn("w", 1, 1).ids == ["j0"]

    seeded.run(limits.set_limit(seeded.keys, "even", None, after))
    assert seeded.turn("w", 2, 1).ids == []
    [record] = seeded.run(limits.list_limits(seeded.keys))

    assert record.opens_at is not None
    assert record.opens_at > seeded.now() + 3_500_000
    assert seeded.audit() == []


def test_job_holds_its_limit(seeded: SeededQueue) -> None:
    """A job that was told to come back later holds its limit until then; it goes to the front of its group."""
    declare(seeded, api="c 5 -")
    seeded.push(*(entry(f"j{i}", limits=("1:api",)) for i in range(3)))
    seeded.register("w")
    assert seeded.turn("w", 1, 1).ids == ["j0"]
    held = Settlement("L", "j0", ms=3_600_000, record=b"api", state=b"0 0 0")
    reply = seeded.turn("w", 2, 9, others=[held])
    assert reply.ids == []
    assert waiting(seeded) == 3
    seeded.redis.hset(seeded.keys.prefix + "limits", "\tapi", 1)
    seeded.redis.zadd(seeded.keys.due, {"\tapi": 1})
    assert seeded.turn("w", 3, 9).ids == ["j0", "j1", "j2"]
    assert seeded.audit() == []


def test_differing_declaration_is_refused(seeded: SeededQueue) -> None:
    """Another kind or another argument under a name that is recorded is refused whole; a producer changes no number."""
    declare(seeded, a="c 5 -", b="r 5 1000 0 tenant")
    for text, name in (("r 5 1000 0 -", "a"), ("r 5 1000 0 user", "b")):
        found = seeded.run(limits.declare_limits(seeded.keys, {"new": "c 1 -", name: text}, replace=True))
        assert list(found) == [name]
        assert not seeded.redis.hexists(seeded.keys.conf, "limit:new")
    assert seeded.run(limits.declare_limits(seeded.keys, {"a": "c 9 -"}, replace=False)) == {}
    assert seeded.redis.hget(seeded.keys.conf, "limit:a") == b"c 5 -"
    declare(seeded, a="c 9 -")
    assert seeded.redis.hget(seeded.keys.conf, "limit:a") == b"c 9 -"


def test_limits_that_open_together_keep_their_order(seeded: SeededQueue) -> None:
    """Of limits that a turn finds open, the one that opened first is served first: nobody waits behind those that came later."""
    declare(seeded, each="r 1 200 0 key")
    seeded.push(*(entry(f"{part}{key}", limits=(f"1:each:{key}",)) for part in "ab" for key in range(9)))
    seeded.register("w")
    assert seeded.turn("w", 1, 20).ids == [f"a{key}" for key in range(9)]
    opens = seeded.now() + 200
    while seeded.now() <= opens:
        pass
    assert seeded.turn("w", 2, 20).ids == [f"b{key}" for key in range(9)]


def test_one_admission_a_start(seeded: SeededQueue) -> None:
    """However many keys' limits jobs wait behind, each start takes one ticket out of its limit, counted in the commands."""
    declare(seeded, each="r 1 200 0 key")
    seeded.push(*(entry(f"j{n}-{key}", limits=(f"1:each:{key}",)) for n in range(3) for key in range(40)))
    seeded.register("w")
    started, number = len(seeded.turn("w", 1, 1000).ids), 1
    assert started == 40
    assert waiting(seeded) == 80
    seeded.redis.config_resetstat()
    while started < 120:
        number += 1
        reply = seeded.turn("w", number, 1000)
        started += len(reply.ids)
        if reply.next_due is not None and not reply.ids:
            time.sleep(max(0, reply.next_due - seeded.now()) / 1000)
    popped = seeded.redis.info("commandstats")["cmdstat_zpopmin"]["calls"] - (number - 1)  # those that prove the right
    assert popped <= 1.05 * 80
    assert seeded.audit() == []


SOME = {
    "c2": "c 2 -", "ck": "c 1 k", "rt": "r 3 40 0 -", "rk": "r 2 30 0 k", "rc": "r 10 40 0 cost", "sm": "r 5 50 1 -",
    "big": "r 5000 50 0 -",
}  # fmt: skip


class Chance:
    """Random steps on one queue."""

    def __init__(self, seeded: SeededQueue, seed: int) -> None:
        self.seeded, self.any, self.pushed = seeded, random.Random(seed), 0
        self.held: dict[str, tuple[int, list[str]]] = {}
        self.made = 0

    def push(self) -> None:
        """Push up to three jobs."""
        entries, pick = [], self.any
        for _ in range(pick.randint(1, 3)):
            self.pushed += 1
            options: dict[str, Any] = {}
            if pick.random() < 0.4:
                options["group"] = pick.choice("abcd")
            if pick.random() < 0.75:
                names = pick.sample([*SOME, "unknown"], pick.randint(1, 3))
                options["limits"] = tuple(
                    f"{pick.randint(1, 4) if name in {'rc', 'big'} else 1}:{name}{':' + pick.choice('abxy') if name[-1] == 'k' else ''}"
                    for name in names
                )
            options |= {"priority": pick.randint(1, 2)} if pick.random() < 0.3 else {}
            options |= {"front": True} if pick.random() < 0.1 else {}
            options |= {"delay_ms": pick.randint(0, 20)} if pick.random() < 0.1 else {}
            options |= {"expires_ms": pick.randint(0, 10)} if pick.random() < 0.05 else {}
            entries.append(entry(f"j{self.pushed}", **options))
        self.seeded.push(*entries)

    def turn(self, want: int | None = None) -> list[str]:
        """Let a worker settle some of what it holds, and lease."""
        pick = self.any
        if len(self.held) < 3:
            self.made += 1
            self.seeded.register(f"w{self.made}")
            self.held[f"w{self.made}"] = (0, [])
        name = pick.choice(list(self.held))
        number, held = self.held[name]
        report = TurnReport()
        for id_ in held:
            how = pick.random()
            if how < 0.35:
                report.done.append(id_)
            elif how < 0.5:
                state = b"1 0 0"
                report.others.append(
                    Settlement(pick.choice("RRFXDM"), id_, ms=pick.randint(0, 15), record=b"{}", state=state)
                )
            elif how < 0.58:
                kind = pick.choice("LG")
                report.others.append(Settlement(kind, id_, ms=pick.randint(-5, 20) if kind == "G" else 9, record=b"rc"))
        wanted = pick.choice([0, 1, 2, 5, 20]) if want is None else want
        reply = self.seeded.run(operations.turn(self.seeded.keys, name, number + 1, wanted, LEASE, report))
        gone = {*report.done, *(one.id for one in report.others if one.kind not in "MG")}
        self.held[name] = (number + 1, [id_ for id_ in held if id_ not in gone] + reply.ids)
        assert not reply.lost
        assert reply.held == len(self.held[name][1])
        return reply.ids

    def other(self) -> None:
        """Reap, cancel, redrive, purge, promote, or change a limit or a group."""
        pick, keys, run = self.any, self.seeded.keys, self.seeded.run
        match pick.randrange(7):
            case 0 if self.held:
                name = pick.choice(list(self.held))
                del self.held[name]
                run(operations.reap(keys, name, crashed=pick.random() < 0.5))
            case 1:
                run(operations.cancel(keys, f"j{pick.randint(1, self.pushed + 1)}", delete=pick.random() < 0.3))
            case 2:
                run(operations.redrive(keys, limit=3))
            case 3:
                run(operations.purge(keys, pick.choice(["ready", "due", "dead"]), pick.choice([1, 2, 5])))
            case 4:
                run(limits.set_group(keys, pick.choice("abcd"), weight=pick.randint(1, 3), paused=pick.random() < 0.3))
            case 5:
                key = pick.choice([None, "a"])
                run(limits.set_limit(keys, "ck" if key else "c2", key, f"c {pick.randint(0, 5)}"))
                run(limits.set_limit(keys, "rk" if key else "rt", key, f"r {pick.randint(1, 6)} 40 0"))
            case _:
                due = [id_ for id_ in self.seeded.redis.zrange(keys.due, 0, -1) if not id_.startswith(b"\t")]
                if due:
                    run(operations.promote(keys, pick.choice(due).decode()))
                run(limits.reset_limit(keys, None, None))


def test_a_lowered_weight_leaves_nothing_behind(seeded: SeededQueue) -> None:
    """The rest of a turn that a weight has left goes with the ticket of its group, also when the weight is one by then."""
    seeded.run(limits.set_group(seeded.keys, "a", weight=3, paused=None))
    declare(seeded, open="c 100 group")
    seeded.push(*(entry(f"a{n}", group="a", limits=("1:open:a",)) for n in range(3)))
    seeded.register("w")
    assert seeded.turn("w", 1, 1).ids == ["a0"]
    seeded.run(limits.set_group(seeded.keys, "a", weight=1, paused=None))

    assert seeded.turn("w", 2, 5).ids == ["a1", "a2"]
    assert seeded.audit() == []
    assert not seeded.redis.exists(f"{seeded.keys.prefix}credits")


def test_first_jobs_of_many_groups(seeded: SeededQueue) -> None:
    """Of many groups a turn leases the first job of each in the order of their tickets; what cannot start is passed over, and stays."""
    declare(seeded, two="c 1 -")
    seeded.run(limits.set_group(seeded.keys, "9", weight=None, paused=True))
    unlike: dict[int, dict[str, Any]] = {
        2: {"expires_ms": 3_600_000}, 4: {"limits": ("1:two",)}, 5: {"limits": ("1:two",)}, 8: {"expires_ms": 1},
    }  # fmt: skip
    seeded.push(*(entry(f"a{n:02}", group=f"{n}", **unlike.get(n, {})) for n in range(12)))
    seeded.push(*(entry(f"b{n:02}", group=f"{n}") for n in range(12) if n != 10), "plain")
    seeded.run(operations.cancel(seeded.keys, "a07"))
    seeded.redis.hdel(seeded.keys.jobs, "a06")
    seeded.register("w")
    ends = seeded.now() + 1
    while seeded.now() <= ends:
        pass

    reply = seeded.turn("w", 1, 13)
    assert reply.ids == ["a00", "a01", "a02", "a03", "a04", "a10", "a11", "plain", "b06", "b07", "b08"]
    assert reply.missing == ["a06"]
    assert seeded.audit() == []

    assert seeded.turn("w", 2, 13, done=reply.ids).ids == ["b00", "b01", "b02", "b03", "b04", "a05", "b11"]
    seeded.run(limits.set_group(seeded.keys, "9", weight=None, paused=False))
    assert seeded.turn("w", 3, 13).ids == ["a09"]
    last = ["a05", "a09", "b00", "b01", "b02", "b03", "b04", "b11"]
    assert seeded.turn("w", 4, 13, done=last).ids == ["b05", "b09"]
    assert seeded.turn("w", 5, done=["b05", "b09"]).held == 0
    assert waiting(seeded) == 0
    assert not seeded.redis.exists(*(seeded.keys.prefix + name for name in ("tickets", "slots", "limits", "waits")))


def test_a_turn_over_groups_costs_a_command_each(seeded: SeededQueue) -> None:
    """A turn that settles and leases a job of each of eighty groups sends forty commands more than one over forty groups."""
    seeded.register("w")
    sent, number = [], 0
    for count in (40, 80):
        seeded.push(*(entry(f"{count}-{part}-{n}", group=f"{count}-{n}") for part in "abc" for n in range(count)))
        leased, calls = list[str](), 0
        for _ in "abc":
            number += 1
            calls, before = command_calls(seeded.redis), leased
            leased = seeded.turn("w", number, count, done=before).ids
            if before and len(sent) < (1 if count == 40 else 2):
                sent.append(command_calls(seeded.redis) - calls)
            assert len(leased) == count
        number += 1
        seeded.turn("w", number, done=leased)
        assert seeded.audit() == []
    assert sent[1] - sent[0] == 40


@pytest.mark.row("C290", "D18")
@pytest.mark.parametrize("seed", range(4))
def test_random_steps_leave_no_ticket_and_no_waiter_behind(seeded: SeededQueue, seed: int) -> None:
    """After every step each group has one ticket, each slot a holder, no ticket waits at a limit with room; and all drains."""
    chance = Chance(seeded, seed)
    declare(seeded, **SOME)
    for _ in range(250):
        chance.any.choice([chance.push] * 6 + [chance.turn] * 11 + [chance.other] * 3)()
        assert seeded.audit() == []
        counted = seeded.run(inspection.counts(seeded.keys))
        stubs = int(seeded.redis.hget(seeded.keys.conf, "stubs") or 0)
        assert counted.unplaced == 0
        assert min(counted.ready, counted.waiting, counted.scheduled) >= 0
        assert len(counted) + counted.leased + counted.dead == seeded.redis.hlen(seeded.keys.jobs) - stubs

    seeded.run(limits.reset_limit(seeded.keys, None, None))
    for group in "abcd":
        seeded.run(limits.set_group(seeded.keys, group, weight=1, paused=False))
    for name in chance.held:
        seeded.run(operations.reap(seeded.keys, name, crashed=False))
    seeded.register("last")
    number, held, ends = 0, list[str](), time.monotonic() + 60
    while len(counted := seeded.run(inspection.counts(seeded.keys))) + counted.leased:
        number += 1
        held = seeded.turn("last", number, 10, done=held).ids
        assert seeded.audit() == []
        assert time.monotonic() < ends, "some jobs never start"
    assert not seeded.redis.hgetall(seeded.keys.prefix + "slots")
    assert not [name for name in seeded.redis.hkeys(seeded.keys.prefix + "limits") if not name.startswith(b"\t")]


# what is broken → the script, the line, what stands there instead
SABOTAGES = {
    "the baton is dropped": ("TURN", "if room >= cost then", "if false then"),
    "a slot is given back twice": ("TURN", "- given[name]", "- 2 * given[name]"),
    "a slot is not given back by a cancellation": ("CANCEL", "if group then give_back(queue, {id}) end", ""),
    "a ticket is doubled": ("PUSH", "if length == 1 then", "if length <= 2 then"),
    "a ticket is lost with its leased job": ("TURN", "if #plan.tail > 0 then", "if false then"),
    "an alarm is forgotten": ("TURN", "set_alarm(queue, s, cost, now)", ""),
    "a retry gives its key away": ("TURN", "give_back(queue, queue.retried, true)", "give_back(queue, queue.retried)"),
    "a returned job joins the tail": ("TURN", "join_group(queue, priority, group, id, true)", "join_group(queue, priority, group, id)"),
    "a slot of a series is given back with its first job": ("TURN", "(counts[i] or 0) - given[name]", "0"),
    "a series takes more than a worker asks for": ("TURN", "math.min(one.most, queue.series or 1)", "one.most"),
    "a series takes jobs that a limit holds": ("TURN", "alone = closed and (one.own or one.series > 1) and #fact[3] == 1", "alone = one.own or one.series > 1"),
    "a series goes on behind jobs of others": ("TURN", "s.count == queue.own[name]", "queue.own[name]"),
    "a series goes on in a key that is paused": ("TURN", "s.count == queue.own[name] and not s.paused", "s.count == queue.own[name]"),
    "the rest of a series does not find its ticket": ("TURN", "readmit(queue, '0g' .. string.sub(limit, 2))", ""),
    "a series is not told to its worker": ("TURN", "if alone and count > 1 then queue.has_series = true end", ""),
    "a job is lost that needs more than its turn": ("TURN", "redis.call('LPUSH', keys[at], ids[at])", ""),
    "an empty group keeps its ticket": ("TURN", "find_empty(1, count)\nreturn", "return"),
    "a window is fixed": ("TURN", "if tonumber(starts[i]) > now - s.per then", "if tonumber(starts[i]) >= now - now % s.per then"),
}  # fmt: skip


PROOFS = [
    test_a_turn_over_groups_costs_a_command_each,
    test_first_jobs_of_many_groups,
    *(partial(test_retried_or_returned_job_keeps_its_place, way=way) for way in ("R", "F")),
    test_cancelled_retry_frees_its_key,
    test_series_of_a_group,
    test_series_goes_on,
    test_series_only_of_what_is_left,
    *(partial(test_rest_of_a_series_comes_back_in_order, way=way) for way in ("F", "R", "L")),
    test_rate_is_exact_over_every_pair_of_starts,
    test_a_start_counts_for_a_whole_window,
    *(partial(test_random_steps_leave_no_ticket_and_no_waiter_behind, seed=seed) for seed in range(8)),
]


def prove_all(seeded: SeededQueue) -> None:
    """Carry out the tests of PROOFS, each with an empty server."""
    for proof in PROOFS:
        seeded.redis.flushall(asynchronous=False)
        seeded.lane = operations.ProducerSequence("L")
        proof(seeded)


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_caught(seeded: SeededQueue, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The tests above see each of these defects: tickets, slots, order and rates are compared after every step."""
    break_script(monkeypatch, operations, *SABOTAGES[name])

    with pytest.raises((AssertionError, ConveyorError)):
        prove_all(seeded)
    seeded.redis.flushall(asynchronous=False)


GROUPED_CALLS = {
    "turn": lambda keys: operations.turn(
        keys, "w", 2, 9, LEASE,
        TurnReport(["a1"], [Settlement("R", "b1", 60_000, state=b"1 1 0"), Settlement("F", "c1"), Settlement("X", "l1", state=b"1 1 0")]),
    ),
    "reap": lambda keys: operations.reap(keys, "w"),
    "cancel-first": lambda keys: operations.cancel(keys, "a2"),
    "purge": lambda keys: operations.purge(keys, "ready", 3),
    "push-front": lambda keys: operations.push(keys, operations.ProducerSequence("N"), [entry("n", group="a", front=True)]),
    "set_limits": lambda keys: limits.set_limit(keys, "one", None, "c 4"),
}  # fmt: skip


@pytest.mark.row("C291")
@pytest.mark.standalone_only("makes a user, and reads with MONITOR what scripts send")
@pytest.mark.parametrize("name", GROUPED_CALLS)
def test_refused_command_refuses_whole(seeded: SeededQueue, url: str, name: str) -> None:
    """Whichever command a user may not use: a step on groups is refused whole, or done."""
    declare(seeded, one="c 1 -", rate="r 1 3600000 0 -")
    seeded.push(*(entry(f"{key}{n}", group=key) for n in (1, 2, 3) for key in "abc"))
    seeded.push(
        *(entry(f"l{n}", limits=("1:one", "1:rate")) for n in (1, 2)),
        *(entry(f"m{n}", limits=("1:rate",)) for n in (1, 2)),
    )
    seeded.register("w")
    assert len(seeded.turn("w", 1, 9).ids) == 4
    renewed = {seeded.keys.workers} if name == "turn" else ()
    refuse_each_command(seeded, url, GROUPED_CALLS[name](seeded.keys), renewed=frozenset(renewed))


@pytest.mark.row("C28")
@pytest.mark.parametrize("name", GROUPED_CALLS)
def test_wrong_type_fails_with_nothing_written(seeded: SeededQueue, name: str) -> None:
    """With any of the keys that groups and limits share of another type, a step fails before its first write, or never touches it."""
    declare(seeded, one="c 1 -", rate="r 1 3600000 0 -")
    seeded.push(*(entry(f"{key}{n}", group=key) for n in (1, 2, 3) for key in "abc"))
    seeded.push(*(entry(f"l{n}", limits=("1:one", "1:rate")) for n in (1, 2)))
    seeded.register("w")
    assert len(seeded.turn("w", 1, 9).ids) == 4
    call = GROUPED_CALLS[name](seeded.keys)
    snapshot, noticed = Snapshot(seeded.redis), set[str]()
    shared = {"slots", "limits", "waits", "credits", "tickets"}
    for key in sorted(shared):
        snapshot.restore()
        seeded.redis.set(seeded.keys.prefix + key, "spoiled")
        before = exact(seeded.redis)
        with suppress(ConveyorError):
            seeded.run(call)
            continue
        noticed.add(key)
        assert difference(before, exact(seeded.redis)) == {}, f"it wrote something before it failed on {key}"
    assert noticed == shared


@pytest.mark.row("C28")
@pytest.mark.parametrize("name", [*GROUPED_CALLS, "turn-due"])
def test_wrong_type_of_one_group_or_limit(seeded: SeededQueue, name: str) -> None:
    """With the key of one group, limit or rate of another type, a step is refused whole, or done with that group set aside."""
    declare(seeded, one="c 1 -", rate="r 1 3600000 0 -")
    seeded.push(*(entry(f"{key}{n}", group=key) for n in (1, 2, 3) for key in "abc"))
    seeded.push(
        *(entry(f"l{n}", limits=("1:one", "1:rate")) for n in (1, 2)),
        *(entry(f"m{n}", limits=("1:rate",)) for n in (1, 2)),
    )
    seeded.register("w")
    assert len(seeded.turn("w", 1, 9).ids) == 4
    call = GROUPED_CALLS.get(name, lambda keys: operations.turn(keys, "w", 3, 9, LEASE, TurnReport([])))(seeded.keys)
    if name == "turn-due":
        seeded.turn("w", 2, 0, others=[Settlement("R", "b1", 1, state=b"1 1 0")])
        instant = seeded.now()
        while seeded.now() <= instant + 1:
            pass
    snapshot = Snapshot(seeded.redis)
    seeded.run(call)
    jobs = set(seeded.redis.hkeys(seeded.keys.jobs))
    kinds = ("group:", "limit:", "rate:")
    snapshot.restore()
    single = [
        key
        for found in seeded.redis.scan_iter("*")
        if (key := found.decode().removeprefix(seeded.keys.prefix)).startswith(kinds)
    ]
    assert {key.partition(":")[0] + ":" for key in single} == {*kinds}
    for key in sorted(single):
        snapshot.restore()
        seeded.redis.delete(seeded.keys.prefix + key)
        seeded.redis.sadd(seeded.keys.prefix + key, "spoiled")
        before = exact(seeded.redis)
        try:
            seeded.run(call)
        except ConveyorError:
            assert difference(before, exact(seeded.redis)) == {}, f"it wrote something before it failed on {key}"
            continue
        left = set(seeded.redis.hkeys(seeded.keys.jobs))
        assert left >= jobs or (name == "purge" and len(left) >= len(jobs)), f"it lost jobs over {key}"
        if seeded.redis.type(seeded.keys.prefix + key) == b"set":
            seeded.redis.delete(seeded.keys.prefix + key)
        seeded.run(operations.repair(seeded.keys, [one.decode() for one in sorted(left)]))
        assert [one for one in seeded.audit() if "count" not in one[0]] == [], f"after {key}"


def test_hashes_of_many_slots_are_tables(seeded: SeededQueue) -> None:
    """A turn of many jobs keeps slots and their counts as tables: a list would be searched for every job."""
    declare(seeded, one="c 1000")
    seeded.push(
        *(entry(f"a{n:02}", limits=("1:one",)) for n in range(40)),
        *(entry(f"b{n:02}", group=f"{n}") for n in range(40)),
    )
    seeded.register("w")
    leased = seeded.turn("w", 1, 80).ids
    assert len(leased) == 80
    for name in ("slots", "limits"):
        assert seeded.redis.object("encoding", seeded.keys.prefix + name) in {"hashtable", b"hashtable"}
    assert seeded.audit() == []
    assert [one.used for one in seeded.run(limits.list_limits(seeded.keys)) if one.name == "one"] == [40]
    seeded.turn("w", 2, done=leased)
    assert seeded.audit() == []
    assert not seeded.redis.exists(seeded.keys.prefix + "slots", seeded.keys.prefix + "limits")


@pytest.mark.parametrize(
    "attributes", [{"limits": ("1:one",)}, {"tags": ("t",)}, {"limits": ("1:one",), "tags": ("t",)}]
)
def test_alike_jobs_cost_a_turn_no_command_each(seeded: SeededQueue, attributes: dict[str, Any]) -> None:
    """A turn that settles and leases forty jobs with the same limit or tag sends as many commands as one of four."""
    declare(seeded, one="c 1000")
    seeded.register("w")
    sent, number, text = [], 0, write_attributes(**attributes)
    for count in (4, 40):
        seeded.push(*(entry(f"{count}-{part}-{n}", **attributes) for part in "ab" for n in range(count)))
        number += 1
        first = seeded.turn("w", number, count).ids
        assert len(first) == count
        report = TurnReport()
        for id_ in first:
            report.add_done(id_, text)
        number += 1
        calls = command_calls(seeded.redis)
        second = seeded.turn("w", number, count, report=report).ids
        sent.append(command_calls(seeded.redis) - calls)
        assert len(second) == count
        number += 1
        seeded.turn("w", number, report=TurnReport(done=second, attributes=dict.fromkeys(second, text)))
        assert seeded.audit() == []
    assert sent[0] == sent[1]


def command_calls(client: Any) -> int:
    """Return how many commands the server has carried out, those of scripts too."""
    return sum(
        one["calls"]
        for name, one in client.info("commandstats").items()
        if name not in {"cmdstat_info", "cmdstat_ping"}
    )


@pytest.mark.parametrize("group", ["g", None])
def test_lost_job_is_no_other_one(seeded: SeededQueue, group: str | None) -> None:
    """Jobs that the server has lost are reported, and those behind them in their group, which have the same first line, are leased."""
    declare(seeded, open="c 1000 key")
    seeded.push(
        *(entry(f"a{n}", group=group, limits=("1:open:g",)) for n in range(5)),
        *(entry(f"b{n}", group="b") for n in range(3)),
    )
    seeded.redis.hdel(seeded.keys.jobs, "a0", "a2", "b0")
    seeded.register("w")
    found = [seeded.turn("w", number, 9) for number in range(1, 4)]
    assert sorted(id_ for reply in found for id_ in reply.missing) == ["a0", "a2", "b0"]
    assert sorted(id_ for reply in found for id_ in reply.ids) == ["a1", "a3", "a4", "b1"]
