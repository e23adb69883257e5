"""Scripts that read a queue: await_result, forget, counts, list_jobs, get_job, workers, audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from conveyor.messaging import maintenance
from conveyor.payload.records import AttemptHistory, Failure, to_json, write_envelope
from conveyor.store import inspection, operations, schedules
from conveyor.store.inspection import FinishedJob, write_finished
from conveyor.store.job_filter import ANY_JOB, JobFilter, Walk
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement, TurnReport
from conveyor.store.script import Call
from support.script_calls import furnish
from support.seeded_queue import LEASE, SeededQueue, entry

# -- await, forget ----------------------------------------------------------------------------------------------------


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("place", "word", "data"),
    [
        ("result", "result", b"{}"), ("dead", "dead", b"1 1 0\n{}"), ("ready", "waiting", b""), ("leased", "waiting", b""),
        ("scheduled", "waiting", b""), ("stub", "result", None), ("unknown", "gone", b""),
    ],
)  # fmt: skip
def test_await_result(seeded: SeededQueue, place: str, word: str, data: bytes | None) -> None:
    """Awaiting reads an outcome that is there, and registers the waiter for one that is still to come."""
    if place in {"ready", "scheduled", "stub"}:
        seeded.push(entry("a", delay_ms=60_000 if place == "scheduled" else None))
    if place == "stub":
        seeded.run(operations.cancel(seeded.keys, "a"))
    if place in {"leased", "result"}:
        seeded.lease("a")
    if place == "result":
        seeded.turn("w", 2, others=[Settlement("D", "a", ms=60_000, record=b"{}")])
    if place == "dead":
        seeded.add_dead("a")
    before = seeded.dump()

    with seeded.unchanged():
        asked = seeded.run(operations.await_result(seeded.keys, "a", ""))
    answer = seeded.run(operations.await_result(seeded.keys, "a", "one"))

    assert asked == answer
    assert answer[0] == word
    assert data is None or answer[1] == data
    assert seeded.since(before) == ({"waiters": {"a": "one"}} if word == "waiting" else {})


def test_stub_without_a_record_is_gone(seeded: SeededQueue) -> None:
    """A deleted job whose entry was not reached yet is gone for who asks."""
    seeded.push("a")
    seeded.run(operations.cancel(seeded.keys, "a", delete=True))
    assert seeded.run(operations.await_result(seeded.keys, "a", "one")) == ("gone", b"")


def test_waiters_are_a_set(seeded: SeededQueue) -> None:
    """Each process waits once, in any order, and forgetting one leaves the others, whatever their names begin with."""
    seeded.push("a")
    for channel in ("one", "on", "one", "two", "on"):
        seeded.run(operations.await_result(seeded.keys, "a", channel))
    assert seeded.dump()["waiters"] == {"a": "one on two"}

    seeded.run(operations.forget(seeded.keys, "a", "on"))
    assert seeded.dump()["waiters"] == {"a": "one two"}
    with seeded.unchanged():
        seeded.run(operations.forget(seeded.keys, "a", "on"))
    for channel in ("one", "two"):
        seeded.run(operations.forget(seeded.keys, "a", channel))
    assert "waiters" not in seeded.dump()


# -- reads ------------------------------------------------------------------------------------------------------------


@pytest.mark.redis6
def test_counts(seeded: SeededQueue) -> None:
    """Each job is counted in one place, stubs in none, and the raw entries of a plain list as ready."""
    furnish(seeded)

    found = seeded.run(inspection.counts(QueueKeys("c", "q", foreign="q")))

    assert (found.ready, found.scheduled, found.leased, found.dead) == (3 + 4, 3, 9, 2)
    assert (found.workers, found.paused, found.max_length) == (2, False, None)
    seeded.run(operations.configure(seeded.keys, "paused", "1"))
    seeded.run(operations.configure(seeded.keys, "max_length", "7"))
    found = seeded.run(inspection.counts(seeded.keys))
    assert (found.ready, found.paused, found.max_length) == (3, True, 7)


def test_many_queues_are_counted_as_one_is(seeded: SeededQueue) -> None:
    """The script that counts many queues says of each what the script for one says; a queue that holds little costs six commands."""
    furnish(seeded)
    seeded.run(operations.configure(seeded.keys, "max_length", "7"))
    idle, plain = QueueKeys("c", "q-idle"), QueueKeys("c", "q-plain")
    seeded.redis.rpush(plain.ready[0], "AAAAAAAAAAAAAAAAAAAAAA")
    seeded.redis.hset(plain.jobs, "AAAAAAAAAAAAAAAAAAAAAA", "\n\n1")
    one_by_one = [seeded.run(inspection.counts(keys)) for keys in (seeded.keys, idle, plain)]

    together = [one.counts for one in seeded.run(inspection.count_queues([seeded.keys.jobs, idle.jobs, plain.jobs], 0))]

    assert [replace(one, oldest_age=None) for one in together] == [replace(one, oldest_age=None) for one in one_by_one]
    assert [one.oldest_age is None for one in together] == [one.oldest_age is None for one in one_by_one]
    for keys, most in ((idle, 4), (plain, 6)):
        assert commands_of(seeded, inspection.count_queues([keys.jobs], 0)) == most
    # A worker beside jobs that are all in their list holds none of them: it costs its name.
    seeded.redis.zadd(plain.workers, {"w": 9_999_999_999_999})
    assert commands_of(seeded, inspection.count_queues([plain.jobs], 0)) == 7


def test_an_idle_worker_adds_two_commands_to_a_count(seeded: SeededQueue) -> None:
    """A worker that holds nothing costs a count its name and one look; one that holds jobs, and is asked to cancel one, is counted."""
    idle, busy = QueueKeys("c", "q-idle"), QueueKeys("c", "q-busy")
    for keys, held in ((idle, {}), (busy, {"a": "1", "b": "2", "\tcancel": "a"})):
        seeded.redis.hset(keys.conf, "schema", "2")
        seeded.redis.zadd(keys.workers, {"w": 9_999_999_999_999})
        seeded.redis.hset(
            f"{keys.prefix}leased:w", mapping={"\tturn": "1", "\tabout": "{}", "\tlease": "15000", **held}
        )

    leased = [one.counts.leased for one in seeded.run(inspection.count_queues([idle.jobs, busy.jobs], 0))]

    assert leased == [0, 2]
    assert commands_of(seeded, inspection.count_queues([idle.jobs], 0)) == 6


def commands_of(seeded: SeededQueue, call: Call[Any]) -> int:
    """Return how many commands a script runs."""
    seeded.redis.config_resetstat()
    seeded.run(call)
    used = {name: stats["calls"] for name, stats in seeded.redis.info("commandstats").items()}
    return sum(used.values()) - sum(used.get(f"cmdstat_{one}", 0) for one in ("evalsha", "time", "config|resetstat"))


def test_entries_of_cancelled_jobs_hide_no_urgent_one(seeded: SeededQueue) -> None:
    """Urgent jobs are counted also where as many entries of cancelled ones stand in the list of priority 0."""
    seeded.redis.rpush(seeded.keys.ready[0], "cancelled")
    seeded.redis.rpush(next(key for key in seeded.keys.ready if key.endswith(":5")), "AAAAAAAAAAAAAAAAAAAAAA")
    seeded.redis.hset(seeded.keys.jobs, "AAAAAAAAAAAAAAAAAAAAAA", "\n\n1")
    seeded.redis.hset(seeded.keys.conf, "stubs", "1")

    counts = seeded.run(inspection.counts(seeded.keys))

    assert (counts.ready, counts.unplaced, counts.oldest_age is None) == (1, 0, False)


def test_totals_are_read_where_there_are_any(seeded: SeededQueue) -> None:
    """A queue in which nothing ended costs two commands; each of many has its own counters, schedules and limits."""
    plain, counted, limited, crowded = (
        QueueKeys("c", f"q-{name}") for name in ("plain", "counted", "limited", "crowded")
    )
    for keys in (plain, limited, crowded):
        seeded.redis.hset(keys.conf, "schema", "2")
    seeded.redis.hset(f"{counted.prefix}stats:total", mapping={"done:a": "3", "lost": "1"})
    seeded.redis.set(f"{counted.prefix}stats:last", "77")
    seeded.redis.hset(f"{counted.prefix}stats:77", mapping={"done:a": "4", "done:b": "1"})
    seeded.redis.zadd(f"{counted.prefix}schedules", {"hourly": 1})
    seeded.redis.hset(limited.conf, "limit:a", "x")
    seeded.redis.hset(crowded.conf, mapping={f"field{number}": "1" for number in range(2_000)})
    queues = (plain, counted, limited, crowded)

    found = seeded.run(inspection.read_totals([keys.jobs for keys in queues]))

    assert [(dict(one.counters), one.has_schedules, one.has_limits) for one in found] == [
        ({}, False, False), ({"done:a": 7, "lost": 1, "done:b": 1}, True, False), ({}, False, True), ({}, False, True),
    ]  # fmt: skip
    assert commands_of(seeded, inspection.read_totals([plain.jobs])) == 2


def test_counts_of_nothing(seeded: SeededQueue) -> None:
    """An empty queue counts zero and has no oldest job."""
    found = seeded.run(inspection.counts(seeded.keys))
    assert (len(found), found.leased, found.dead, found.workers, found.oldest_age) == (0, 0, 0, 0, None)


@pytest.mark.parametrize("status", ["ready", "scheduled", "leased", "dead", "dead-oldest"])
def test_list_jobs_cuts_one_order(seeded: SeededQueue, status: str) -> None:
    """Pages of any size, one after the other, give each job of a state once, in the order of one large page."""
    furnish(seeded)
    whole = [row.id for row in seeded.run(inspection.list_jobs(seeded.keys, status, 0, 500)).rows]
    expected = {
        "ready": ["r2", "r1", "r3"], "scheduled": ["s3", "s1", "s2"], "leased": None,
        "dead": ["d2", "d1"], "dead-oldest": ["d1", "d2"],
    }[status]  # fmt: skip
    if expected is None:
        assert sorted(whole) == ["h1", "h2", "h3", "h4", "h5", "h6", "h7", "v1", "v2"]
    elif not status.startswith("dead"):  # these died in one millisecond
        assert whole == expected
    for size in (1, 2, 3):
        pages = [seeded.run(inspection.list_jobs(seeded.keys, status, at, size)) for at in range(0, 12, size)]
        assert [row.id for page in pages for row in page.rows] == whole


def add_dead_jobs(seeded: SeededQueue, *tasks: str, body: str = "{}", state: str = "1 1 0") -> list[str]:
    """Make a dead letter of each of *tasks*, the oldest first, and return their ids."""
    ids = [f"d{n:05}" for n in range(len(tasks))]
    seeded.redis.hset(
        seeded.keys.jobs, mapping={id_: f"\n{task}\n{body}" for id_, task in zip(ids, tasks, strict=True)}
    )
    seeded.redis.hset(seeded.keys.state, mapping=dict.fromkeys(ids, state))
    seeded.redis.zadd(seeded.keys.dead, {id_: 1_700_000_000_000 + n for n, id_ in enumerate(ids)})
    return ids


def all_pages(seeded: SeededQueue, count: int, task: str | None = None) -> list[inspection.JobPage]:
    """Read the dead letters page by page, each behind the one before."""
    pages, offset = [], 0
    while True:
        page = seeded.run(
            inspection.list_jobs(seeded.keys, "dead-oldest", offset, count, JobFilter(task=task) if task else ANY_JOB)
        )
        if not page.entries:
            return pages
        pages.append(page)
        offset += page.entries


@pytest.mark.row("D291")
@pytest.mark.redis6
@pytest.mark.standalone_only("counts the commands of one server")
def test_jobs_of_a_task_are_found_in_bounded_steps(seeded: SeededQueue) -> None:
    """A search for the jobs of a task brings those alone: of the others no call reads more than their envelopes."""
    tasks = ["shop.add", "shop.a", "shop.add\t{}", "shop.adds", "x\nshop.add"] * 200
    ids = add_dead_jobs(seeded, *tasks, state="1 1 0\n" + "e" * 2000)
    seeded.redis.config_resetstat()

    pages = all_pages(seeded, 200, "shop.add")

    reads = seeded.redis.info("commandstats")["cmdstat_hget"]["calls"]
    assert [page.entries for page in pages] == [200] * 5
    assert [row.id for page in pages for row in page.rows] == [id_ for n, id_ in enumerate(ids) if n % 5 in {0, 2}]
    assert reads == len(ids) + 400


@pytest.mark.row("D291")
@pytest.mark.redis6
@pytest.mark.parametrize("large", ["body", "state"])
def test_a_page_of_large_jobs_is_short(seeded: SeededQueue, large: str) -> None:
    """A page ends when it has about 1 MiB, and the next one begins behind it, so that no job is left out."""
    content = {"body": "{}", "state": "1 1 0"} | {large: ("[1" if large == "body" else "1 1 0\n{") + " " * 100_000}
    ids = add_dead_jobs(seeded, *["t"] * 30, **content)

    pages = all_pages(seeded, 100)

    assert [page.entries for page in pages] == [11, 11, 8]
    assert [row.id for page in pages for row in page.rows] == ids


@pytest.mark.redis6
def test_heads_bring_neither_bodies_nor_tracebacks(seeded: SeededQueue) -> None:
    """The head of a job is its task and its last error without the traceback, whatever its texts hold; a sealed error is whole."""
    tricky = Failure(2, 6, "Odd", 'of ,"traceback":"\\", no', "app/x.py:1 f", 'the ,"traceback":"', "w")
    sealed = Failure(1, 7, "Odd", "sealed", worker="w", packed="AAAA")
    states = {
        "first\t{}": AttemptHistory(
            2, 2, 1, [to_json(Failure(1, 5, "No", "no", "", "t" * 9000, "w")), to_json(tricky)]
        ),
        "sealed": AttemptHistory(1, 1, 0, [to_json(sealed)]),
        "none": AttemptHistory(3, 0, 0),
    }
    ids = add_dead_jobs(seeded, *states, body='["' + "b" * 9000 + '"]\n')
    for id_, state in zip(ids, states.values(), strict=True):
        seeded.redis.hset(seeded.keys.state, id_, state.encode())

    call = inspection.list_jobs(seeded.keys, "dead-oldest", 0, 9, reads="heads")
    reply = seeded.redis.execute_command(*call.command()) if seeded.run(call) else None
    rows = call.decode(reply).rows

    assert [(row.envelope.task, row.envelope.body, row.state.starts) for row in rows] == [
        ("first", b"", 2), ("sealed", b"", 1), ("none", b"", 3),
    ]  # fmt: skip
    assert [row.state.failures_list() for row in rows] == [
        [Failure(2, 6, "Odd", tricky.message, tricky.frame)], [sealed], [],
    ]  # fmt: skip
    assert len(b"".join(bytes(one) for one in reply[1:])) < 500


@pytest.mark.redis6
def test_heads_are_read_in_bounded_steps(seeded: SeededQueue) -> None:
    """A page of heads ends when about 1 MiB was looked at, though almost nothing of it is sent."""
    ids = add_dead_jobs(seeded, *["t"] * 30, body="[1" + " " * 100_000)
    pages, offset = [], 0
    while (page := seeded.run(inspection.list_jobs(seeded.keys, "dead-oldest", offset, 100, reads="heads"))).entries:
        pages.append(page)
        offset += page.entries

    assert [page.entries for page in pages] == [11, 11, 8]
    assert [row.id for page in pages for row in page.rows] == ids


def test_heads_become_whole_in_bounded_steps(seeded: SeededQueue) -> None:
    """The jobs of some heads are read in pages of about 1 MiB, in their order; those that are gone are left out."""
    ids = add_dead_jobs(seeded, *["t"] * 15, body="[1" + " " * 100_000)
    heads = seeded.run(inspection.list_jobs(seeded.keys, "dead-oldest", 0, 100, reads="heads")).rows
    heads += seeded.run(inspection.list_jobs(seeded.keys, "dead-oldest", 11, 100, reads="heads")).rows
    seeded.redis.hdel(seeded.keys.jobs, ids[3])

    first = seeded.run(inspection.whole_jobs(seeded.keys, heads))
    rest = seeded.run(inspection.whole_jobs(seeded.keys, heads[first.entries :]))

    assert (first.entries, rest.entries) == (12, 3)
    assert [row.id for row in [*first.rows, *rest.rows]] == [id_ for id_ in ids if id_ != ids[3]]
    assert {(len(row.envelope.body), row.extra) for row in first.rows[:1]} == {(100_002, heads[0].extra)}


def test_all_dead_letters_are_read(seeded: SeededQueue) -> None:
    """The dead letters of a queue are read to the end, also behind entries whose envelope the server has lost."""
    ids = add_dead_jobs(seeded, *[""] * 250, body="1")
    seeded.redis.hdel(seeded.keys.jobs, *ids[50:180])
    pages = all_pages(seeded, 100)
    assert [row.id for page in pages for row in page.rows] == ids[:50] + ids[180:]

    found: list[str] = []
    page, after = seeded.run(maintenance.dead_page(seeded.keys, 0))
    while after:
        found += [letter.id.partition(":")[2] or letter.id for letter in page]
        page, after = seeded.run(maintenance.dead_page(seeded.keys, after))
    assert found == ids[:50] + ids[180:]


@pytest.mark.standalone_only("counts the commands of one server")
def test_leased_jobs_that_a_page_passes_over_are_not_read(seeded: SeededQueue) -> None:
    """A page of leased jobs reads the jobs of the workers that it shows, and only counts those of the others."""
    for number in range(20):
        seeded.lease(*(f"j{number}-{n}" for n in range(5)), worker=f"w{number:02}")
    seeded.redis.config_resetstat()

    page = seeded.run(inspection.list_jobs(seeded.keys, "leased", 52, 5))

    assert [(row.id, row.extra) for row in page.rows] == [(f"j10-{n}", "w10") for n in (2, 3, 4)] + [
        (f"j11-{n}", "w11") for n in (0, 1)
    ]
    assert seeded.redis.info("commandstats")["cmdstat_hgetall"]["calls"] == 2


@pytest.mark.redis6
def test_a_leased_job_tells_since_when_and_where(seeded: SeededQueue) -> None:
    """A leased job is read with the instant of its lease and the facts of its worker, listed or alone, extended or not."""
    began = seeded.now()
    for worker in ("w", "v"):
        seeded.run(operations.register(seeded.keys, worker, LEASE, operations.about(host=worker, tasks="t" * 80)))
        seeded.push(*(f"{worker}{n}" for n in range(3)))
        seeded.turn(worker, operations.next_turn_number(0, seeded.now()), 3)
    ended = seeded.now()
    seeded.run(operations.extend(seeded.keys, "v", "v1", "x", LEASE, operations.about(host="x")))

    listed = [
        row for at in range(0, 6, 2) for row in seeded.run(inspection.list_jobs(seeded.keys, "leased", at, 2)).rows
    ]
    alone = [seeded.run(inspection.get_job(seeded.keys, row.id))[1] for row in listed]

    assert [replace(row, raw=b"\n\n1") for row in listed] == alone  # which can be changed by what it was
    assert {row.id: row.about["host"] for row in listed} == {
        "w0": "w", "w1": "w", "w2": "w", "v0": "v", "v1": "x", "v2": "v",
    }  # fmt: skip
    assert all(began <= row.leased_ms <= ended for row in listed)


def test_a_turn_that_does_not_know_the_time_has_no_instant(seeded: SeededQueue) -> None:
    """A place whose turn is numbered from one, since its worker did not know the time, has no instant; an extension keeps it so."""
    seeded.lease("a")
    seeded.redis.hset(seeded.keys.leased("w"), "a", 8193)

    [row] = seeded.run(inspection.list_jobs(seeded.keys, "leased", 0, 9)).rows
    assert row.leased_ms == 0
    seeded.run(operations.extend(seeded.keys, "w", "a", "x", LEASE, b"{}"))
    [row] = seeded.run(inspection.list_jobs(seeded.keys, "leased", 0, 9)).rows
    assert (row.extra, row.leased_ms) == ("x", 0)


def test_list_jobs_that_finished(seeded: SeededQueue) -> None:
    """The recently finished come newest first, as they were written."""
    seeded.register("w")
    made = [write_finished(f"j{n}", "t", "done", 5, n) for n in range(3)]
    seeded.turn("w", 1, report=TurnReport(recent=made))

    assert seeded.run(inspection.finished(seeded.keys, 0, 2)) == [
        FinishedJob(f"j{n}", "t", "done", 5, n) for n in (2, 1)
    ]


@pytest.mark.redis6
@pytest.mark.parametrize(
    ("id", "place", "extra"),
    [
        ("r1", "ready", ""), ("r2", "ready", ""), ("h1", "leased", "w"), ("v2", "leased", "v"), ("s3", "scheduled", "1"),
        ("d1", "dead", None), ("x1", "result", None), ("old", "result", None), ("ghost", "none", None),
    ],
)  # fmt: skip
def test_get_job(seeded: SeededQueue, id: str, place: str, extra: str | None) -> None:  # noqa: A002
    """A job is shown where it is, with who holds it or when it is due."""
    furnish(seeded)
    found, row, record = seeded.run(inspection.get_job(seeded.keys, id))

    assert found == place
    if place in {"result", "none"}:
        assert (row is None, record != b"") == (True, place == "result")
    else:
        assert row is not None
        assert (row.id, row.status) == (id, place)
        assert extra is None or row.extra == extra


def test_get_job_knows_an_own_id_that_ended(seeded: SeededQueue) -> None:
    """An own id that ended well without a record is told from one that ended otherwise, and from one that never was."""
    seeded.push(entry("a", own_id=True))
    seeded.register("w")
    seeded.turn("w", 1, 1)
    seeded.turn("w", 2, others=[Settlement("D", "a", own_id=True)])
    assert seeded.run(inspection.get_job(seeded.keys, "a")) == ("ended", None, b"-")
    seeded.push(entry("b", own_id=True))
    seeded.run(operations.purge(seeded.keys, "ready", 9))
    assert seeded.run(inspection.get_job(seeded.keys, "b")) == ("none", None, b"1")


def test_workers(seeded: SeededQueue) -> None:
    """Each worker is listed with its end, what it said of itself, and how much it holds, cancel requests apart."""
    seeded.lease("a", "b")
    seeded.run(operations.cancel(seeded.keys, "a"))
    seeded.run(operations.register(seeded.keys, "z", 2 * LEASE, operations.about(host="h")))

    first, second = seeded.run(inspection.workers(seeded.keys))

    assert (first.worker, first.about, first.held) == ("w", {}, 2)
    assert (second.worker, second.about, second.held) == ("z", {"host": "h"}, 0)
    assert 0 < first.end - seeded.now() <= LEASE < second.end - seeded.now() <= 2 * LEASE
    (counted,) = seeded.run(inspection.count_queues([seeded.keys.jobs], 0, workers=True))
    assert [replace(one, now=first.now) for one in counted.workers] == [first, second]
    assert seeded.run(inspection.count_queues([seeded.keys.jobs], 0))[0].workers == ()


# -- audit ------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[SeededQueue], object], set[tuple[str, str]]]] = {
    "none": (lambda s: None, set()),
    "twice in ready": (lambda s: s.redis.rpush(s.keys.ready[0], "r1"), {("in ready and ready", "r1")}),
    "in two priorities": (lambda s: s.redis.rpush(s.keys.ready[7], "r1"), {("in ready and ready", "r1")}),
    "ready and scheduled": (lambda s: s.redis.zadd(s.keys.due, {"r1": 1}), {("in ready and scheduled", "r1")}),
    "ready and dead": (
        lambda s: s.redis.zadd(s.keys.dead, {"r1": 1}),
        {("in ready and dead", "r1"), ("somebody waits for it, and it has ended", "r1")},
    ),
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
def test_audit_finds(seeded: SeededQueue, name: str) -> None:
    """The audit names each inconsistency there is, and no other."""
    furnish(seeded)
    damage, expected = DAMAGE[name]
    damage(seeded)
    assert set(seeded.audit()) == expected


def tell(seeded: SeededQueue) -> None:
    """Add two schedules, one of them paused, and what running jobs tell: progress, notes, parts, lines."""
    for name in ("hourly", "still"):
        put = schedules.put_schedule(seeded.keys, name, name, b"{}", b"", "data", seeded.now() + 3_600_000)
        assert seeded.run(put) == 1
    seeded.run(schedules.change_schedule(seeded.keys, "still", "pause"))
    seeded.redis.hset(
        seeded.keys.state,
        "h1",
        b'1 0 0+ \tp{"done":1} \tn{"a":[2]} \th{"state":"redriven"} \th{"state":"updated"}\n{"attempt":1}',
    )
    for id_ in ("h1", "gone"):
        seeded.redis.xadd(seeded.keys.stream(id_), {"v": "1"}, id="1-2")
        seeded.redis.rpush(seeded.keys.logs(id_), "[]")
        for key in (seeded.keys.stream(id_), seeded.keys.logs(id_)):
            seeded.redis.pexpire(key, 60_000)
    seeded.redis.hset(seeded.keys.waiters, "h1", "*channel")


def alarm(seeded: SeededQueue, name: str, *, late: int = 0) -> None:
    """Set an alarm of a schedule, and count it where it is a new one."""
    added = seeded.redis.zadd(seeded.keys.due, {f"\t\t{name}": seeded.now() + 3_600_000 + late})
    seeded.redis.hincrby(seeded.keys.conf, "alarms", added)


def silence(seeded: SeededQueue, name: str) -> None:
    """Remove the alarm of a schedule, as an eviction or a hand would."""
    seeded.redis.hincrby(seeded.keys.conf, "alarms", -seeded.redis.zrem(seeded.keys.due, f"\t\t{name}"))


TOLD: dict[str, tuple[Callable[[SeededQueue], object], set[tuple[str, str]]]] = {
    "none": (lambda s: None, set()),
    "no alarm": (lambda s: silence(s, "hourly"), {("schedule without an alarm", "hourly")}),
    "alarm too late": (lambda s: alarm(s, "hourly", late=1), {("alarm behind the instant of its schedule", "hourly")}),
    "alarm while paused": (lambda s: alarm(s, "still"), {("alarm of a schedule that stands still", "still")}),
    "alarm of nobody": (lambda s: alarm(s, "other"), {("alarm of no schedule", "other")}),
    "alarm not counted": (lambda s: s.redis.hincrby(s.keys.conf, "alarms", 1), {("wrong count of alarms", "2")}),
    "schedule gone": (
        lambda s: s.redis.delete(s.keys.schedule("hourly")), {("listed schedule that is gone", "hourly")},
    ),
    "schedule not listed": (
        lambda s: s.redis.srem(s.keys.schedules, "hourly"), {("alarm of no schedule", "hourly")},
    ),
    "progress twice": (
        lambda s: s.redis.hset(s.keys.state, "h1", '1 0 0 \tp{"done":1} \tp{"done":2}'), {("told twice in its record: p", "h1")},
    ),
    "notes twice": (
        lambda s: s.redis.hset(s.keys.state, "h1", "1 0 0 \tn{} \tn{}"), {("told twice in its record: n", "h1")},
    ),
    "notes cut off": (
        lambda s: s.redis.hset(s.keys.state, "h1", '1 0 0 \tn{"a":'), {("record that cannot be read", "h1")},
    ),
    "history cut off": (
        lambda s: s.redis.hset(s.keys.state, "h1", '1 0 0 \th{"state"\n{}'), {("record that cannot be read", "h1")},
    ),
    "error cut off": (lambda s: s.redis.hset(s.keys.state, "h1", "1 0 0\n"), {("record that cannot be read", "h1")}),
    "stream of a job for ever": (
        lambda s: s.redis.persist(s.keys.stream("h1")), {("no time to live", "stream:h1")},
    ),
    "stream of nobody for ever": (
        lambda s: s.redis.persist(s.keys.stream("gone")), {("no time to live", "stream:gone")},
    ),
    "lines of a job for ever": (lambda s: s.redis.persist(s.keys.logs("h1")), {("no time to live", "logs:h1")}),
    "lines of nobody for ever": (lambda s: s.redis.persist(s.keys.logs("gone")), {("no time to live", "logs:gone")}),
    "watcher not told of a death": (
        lambda s: s.redis.hset(s.keys.waiters, "d1", "*channel"), {("somebody waits for it, and it has ended", "d1")},
    ),
    "watcher not told of a result": (
        lambda s: (s.redis.hset(s.keys.waiters, "gone", "*channel"), s.redis.set(s.keys.result("gone"), "{}", px=60_000)),
        {("somebody waits for it, and it has ended", "gone")},
    ),
}  # fmt: skip


@pytest.mark.row("I1")
@pytest.mark.redis6
@pytest.mark.parametrize("name", TOLD)
def test_audit_finds_of_schedules_and_of_what_jobs_tell(seeded: SeededQueue, name: str) -> None:
    """The audit names each inconsistency of schedules, records, streams, lines and watchers, and no other."""
    furnish(seeded)
    tell(seeded)
    damage, expected = TOLD[name]
    damage(seeded)
    assert set(seeded.audit()) == expected


REPLACED: dict[str, Callable[[SeededQueue], object]] = {
    "paused and resumed": lambda s: [
        s.run(schedules.change_schedule(s.keys, "hourly", "pause")),
        s.run(schedules.change_schedule(s.keys, "hourly", "resume", s.now() + 60_000)),
    ],
    "declared anew": lambda s: s.run(
        schedules.put_schedule(s.keys, "hourly", "other", b"{}", b"", "data", s.now() + 60_000)
    ),
    "deleted": lambda s: s.run(schedules.change_schedule(s.keys, "hourly", "delete")),
}


@pytest.mark.row("B10")
@pytest.mark.parametrize("name", REPLACED)
def test_an_alarm_that_was_lost_is_counted_once(seeded: SeededQueue, name: str) -> None:
    """A schedule whose alarm the server lost, and that gets a new one or goes, leaves the number of alarms right."""
    tell(seeded)
    seeded.redis.delete(seeded.keys.due)
    REPLACED[name](seeded)
    problems = {problem for problem, _ in seeded.audit()}
    assert not {one for one in problems if "alarm" in one}, problems


def test_audit_refuses_what_is_too_large(seeded: SeededQueue) -> None:
    """The audit reads everything in one step, so it refuses a queue above the size it is given."""
    seeded.push("a", "b", "c")
    assert seeded.run(inspection.audit(seeded.keys, most=2)) == [("too-large", "3")]
    assert seeded.run(inspection.audit(seeded.keys, most=3)) == []


def test_a_step_of_the_history_reads_a_thousand_counters(seeded: SeededQueue) -> None:
    """A step reads minutes until it has read about a thousand counters, and tells where the next one begins."""
    counters = {f"done:task{number}": 1 for number in range(200)}
    for minute in range(100, 120):
        seeded.redis.hset(f"{seeded.keys.prefix}stats:{minute}", mapping=counters)

    page = seeded.run(inspection.read_stats(seeded.keys, "minutes", 100, 119))

    assert page.next == 105
    assert sorted(page.times) == [100, 101, 102, 103, 104]
    assert page.times[100] == {"done": 200}


def test_a_step_that_compares_errors_looks_at_fewer_jobs(seeded: SeededQueue) -> None:
    """The error of a job costs as much as four looks: a step that compares it looks at 100 jobs, and one that does not at 500."""
    keys, ids = seeded.keys, [f"d{number:03}" for number in range(600)]
    error = to_json(Failure(1, 1, "builtins.ValueError", "no", "", "w"))
    state = AttemptHistory(1, 1, 0, [error]).encode()
    seeded.redis.hset(keys.jobs, mapping=dict.fromkeys(ids, write_envelope("t", b"1")))
    seeded.redis.hset(keys.state, mapping=dict.fromkeys(ids, state))
    seeded.redis.zadd(keys.dead, dict.fromkeys(ids, 1))

    compared, found = seeded.run(inspection.count_found(keys, Walk(JobFilter(error="valueerror"), ("dead",))))
    passed, all_ = seeded.run(inspection.count_found(keys, Walk(JobFilter(), ("dead",))))

    assert (compared.looked, found, compared.ended) == (100, {"dead": 100}, False)
    assert (passed.looked, all_) == (500, {"dead": 500})
