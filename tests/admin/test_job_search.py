"""Jobs chosen by task, error and time, and dead letters counted by what failed, on many of them in bounded steps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.admin.job_query import parse
from conveyor.admin.job_search import MOST_MESSAGES, OTHER_MESSAGES
from conveyor.errors import ConfigurationError
from conveyor.ids import new_ids
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.records import AttemptHistory, Failure, to_json, write_envelope
from conveyor.payload.sealed_records import pack_failure
from conveyor.payload.signing import Keyring, Sealer
from conveyor.store.client.client import Client
from support.client_worker import ClientWorker, push

pytestmark = pytest.mark.leaves_keys("dead letters are made here to be counted")
DIED = datetime(2026, 3, 1, 2, 14, tzinfo=UTC)
Died = tuple[str, str, str]
"""Task, class and message of the error of a dead letter."""


def bury(
    backend: Client,
    redis: Redis,
    queue: str,
    *letters: Died,
    body: bytes = b"{}",
    sealing: PayloadPipeline | None = None,
) -> list[str]:
    """Make dead letters that died a second after each other, from DIED on; return their public ids, the oldest first."""
    keys, ids = backend.keys(queue), new_ids(len(letters))
    backend.announce(keys)
    states, envelopes = {}, {}
    for id_, (task, kind, message) in zip(ids, letters, strict=True):
        failure = Failure(1, 1, kind, message, traceback="Traceback " * 50, worker="w")
        if sealing is not None:
            failure = pack_failure(sealing, failure, queue, id_)
        states[id_] = AttemptHistory(1, 1, 0, [to_json(failure)]).encode()
        envelopes[id_] = write_envelope(task, body)
    redis.hset(keys.jobs, mapping=envelopes)
    redis.hset(keys.state, mapping=states)
    redis.zadd(keys.dead, {id_: int(DIED.timestamp() * 1000) + 1000 * n for n, id_ in enumerate(ids)})
    return [f"{queue}:{id_}" for id_ in ids]


def at(seconds: float) -> datetime:
    return DIED + timedelta(seconds=seconds)


def test_failures_are_counted_by_what_they_have_in_common(admin: Admin, backend: Client, redis: Redis) -> None:
    """Dead letters are grouped by queue, task, class and message, first and last seen; numbers, ids and quoted texts make none."""
    ids = bury(
        backend, redis, "shop",
        ("shop.pay", "ValueError", "no account 17 of 'ann'"), ("shop.pay", "ValueError", "no account 4 of 'bob'\nmore"),
        ("shop.pay", "KeyError", "'x'"), ("shop.mail", "KeyError", "'y'"), ("shop.pay", "ValueError", "closed"),
        ("shop.pay", "ValueError", 'no account 9f8e7d6c-1b2a of "c"'),
    )  # fmt: skip
    bury(backend, redis, "films", ("", "KeyError", "'x'"))

    whole = admin.failures()

    first = whole.groups[0]
    assert (first.queue, first.task, first.type, first.count) == ("shop", "shop.pay", "ValueError", 3)
    assert (first.pattern, first.message, first.id) == ("no account … of …", 'no account 9f8e7d6c-1b2a of "c"', ids[5])
    assert (first.first, first.last) == (at(0), at(5))
    assert [(group.queue, group.task, group.type, group.pattern, group.count) for group in whole.groups[1:]] == [
        ("films", "", "KeyError", "'x'", 1), ("shop", "shop.mail", "KeyError", "'y'", 1), ("shop", "shop.pay", "KeyError", "'x'", 1),
        ("shop", "shop.pay", "ValueError", "closed", 1),
    ]  # fmt: skip
    assert (whole.read, whole.total) == (7, 7)
    assert [group.queue for group in admin.failures("films").groups] == ["films"]
    newest = admin.failures("shop", most=2)
    assert ([group.message for group in newest.groups], newest.read, newest.total) == (
        ['no account 9f8e7d6c-1b2a of "c"', "closed"], 2, 6,
    )  # fmt: skip


def test_messages_without_end_are_one_group(admin: Admin, backend: Client, redis: Redis) -> None:
    """When each failure says something else, the groups are bounded, and every failure is counted."""
    words = ["".join(chr(ord("g") + int(digit)) for digit in f"{n:03}") for n in range(200)]
    bury(backend, redis, "shop", *(("shop.pay", "ValueError", f"it was {word}") for word in words))

    groups = admin.failures("shop").groups

    assert (len(groups), groups[0].pattern, sum(group.count for group in groups)) == (
        MOST_MESSAGES + 1, OTHER_MESSAGES, 200,
    )  # fmt: skip


@pytest.mark.standalone_only("counts the calls to one server")
def test_many_dead_letters_are_searched_in_bounded_steps(admin: Admin, backend: Client, redis: Redis) -> None:
    """Counting and choosing among thousands reads 250 a call and no bodies; the bodies of those that are listed are read alone."""
    count, body = 3000, b'["' + b"b" * 1000 + b'"]'
    letters = [("t", "ValueError", f"account {n}" if n % 1000 else "the odd one") for n in range(count)]
    ids = bury(backend, redis, "shop", *letters, body=body)
    redis.config_resetstat()

    [most, odd] = admin.failures("shop").groups
    chosen = [job.id for job in admin.each_job("shop", "dead", error="odd")]
    listed = admin.jobs("shop", "dead", error="ODD ONE", limit=9)

    assert (most.count, odd.count, chosen) == (count - 3, 3, [ids[2000], ids[1000], ids[0]])
    assert [(job.id, job.payload) for job in listed] == [(id_, body.decode()) for id_ in chosen]
    received = redis.info("stats")["total_net_output_bytes"]
    assert received < 3 * count * 300
    longest = 3 * (count // 250) + 1  # and the counts of each search
    calls = sum(
        stats["calls"]
        for name, stats in redis.info("commandstats").items()
        if name in {"cmdstat_evalsha", "cmdstat_eval"}
    )
    assert longest <= calls <= longest + 6


def test_errors_are_matched_as_they_are_shown(admin: Admin, backend: Client, redis: Redis) -> None:
    """An error is chosen by any part of "class: message", in whatever case and language; one without an error by none."""
    letters = [
        ("a", "ValueError", "no account"), ("a", "shop.Failed", 'said "Straße"\nand \\ more'), ("b", "ValueError", "closed"),
    ]  # fmt: skip
    value, failed, closed = bury(backend, redis, "shop", *letters)
    push(backend, "shop", b"1", task="a")

    def chosen(error: str, task: str | None = None) -> list[str]:
        return [job.id for job in admin.jobs("shop", task=task, error=error)]

    assert chosen("valueerror: no") == [value]
    assert chosen("ValueError") == [closed, value]
    assert chosen("ValueError", "a") == [value]
    assert chosen('failed: said "STRASSE"') == [failed]
    assert chosen("and \\ m") == [failed]
    assert chosen("Traceback") == []
    assert [job.id for job in admin.jobs("shop", error="e", offset=1, limit=1)] == [failed]


def test_sealed_errors_are_matched_and_counted(backend: Client, redis: Redis) -> None:
    """With the keys sealed errors are chosen and grouped by their texts; without them by the class, which is not sealed."""
    sealing = PayloadPipeline(seal=Sealer(Keyring({"k": b"s" * 32}), encrypt=True))
    [one, two] = bury(
        backend, redis, "shop", ("a", "ValueError", "no account 1"), ("a", "ValueError", "closed"), sealing=sealing
    )
    knows, blind = Admin(backend, sealing=sealing), Admin(backend)

    assert [job.id for job in knows.jobs("shop", error="no account")] == [one]
    assert {group.message for group in knows.failures("shop").groups} == {"no account 1", "closed"}
    assert [job.id for job in blind.jobs("shop", error="no account")] == []
    assert [job.id for job in blind.jobs("shop", error="ValueError")] == [two, one]
    assert sum(group.count for group in blind.failures("shop").groups) == 2


def test_times_are_those_of_the_state(admin: Admin, backend: Client, redis: Redis) -> None:
    """A time chooses dead jobs by their death, leased ones by their lease, waiting ones by their push, finished ones by their end."""
    died = bury(backend, redis, "shop", *[("a", "ValueError", "no")] * 5)
    [held, ready, later] = push(backend, "shop", b"1", b"2", b"3")
    own = push(backend, "shop", b"4", id="own")
    worker = ClientWorker(backend, "shop")
    worker.take()
    now = datetime.now(UTC)
    hour = timedelta(hours=1)

    assert [job.id for job in admin.jobs("shop", "dead", since=at(3))] == [died[4], died[3]]
    assert [job.id for job in admin.jobs("shop", "dead", older=at(1))] == [died[1], died[0]]
    assert [job.id for job in admin.jobs("shop", "dead", since=at(1), older=at(2))] == [died[2], died[1]]
    assert [job.id for job in admin.jobs("shop", "leased", since=now - hour)] == [held]
    assert admin.jobs("shop", "leased", older=now - hour) == []
    assert [job.id for job in admin.jobs("shop", "ready", since=now - hour)] == [ready, later]
    assert [job.id for job in admin.jobs("shop", "ready", older=now + hour)] == [ready, later]
    assert own == ["own"]  # it does not tell when it was enqueued
    worker.succeed(held)
    ended = datetime.fromtimestamp(1_700_000_000, UTC)
    assert [job.id for job in admin.jobs("shop", "done", since=ended, older=ended)] == [held]
    assert admin.jobs("shop", "done", since=ended + hour) == []
    assert admin.jobs("shop", "done", error="no") == []
    with pytest.raises(ConfigurationError, match="since= needs a time zone"):
        admin.jobs("shop", since=datetime(2026, 1, 1))  # noqa: DTZ001


def test_a_worker_is_found_by_its_whole_name(admin: Admin, backend: Client) -> None:
    """A filter finds what a worker holds by its host:pid, its host or its id, or by a pattern of one of them; no part is enough."""
    push(backend, "shop", b"1")
    worker = ClientWorker(backend, "shop")
    [held] = worker.take()
    for name in ("testhost:4711", "testhost", worker.identity, "test*", "*:4711", "web-1,testhost", '"testhost:4711"'):
        assert [job.id for job in admin.search(parse(f"worker:{name}")).jobs] == [held], name
        assert admin.search(parse(f"-worker:{name}")).jobs == [], name
    for part in ("testhost:471", "host", "4711", worker.identity[1:]):
        assert admin.search(parse(f"state:leased worker:{part}")).jobs == [], part
    push(backend, "shop", b"2")
    assert len(admin.search(parse("worker:*")).jobs) == 1  # nobody holds the other


@pytest.mark.standalone_only("counts the calls to one server")
def test_the_newest_dead_letters_are_found_without_the_others(admin: Admin, backend: Client, redis: Redis) -> None:
    """A search for those that died lately ends at the first that died before."""
    ids = bury(backend, redis, "shop", *[("a", "ValueError", "no")] * 2000)
    redis.config_resetstat()

    assert [job.id for job in admin.each_job("shop", "dead", since=at(1990))] == ids[:1989:-1]

    assert redis.info("commandstats")["cmdstat_zrevrange"]["calls"] == 1


def test_a_filter_by_time_finds_those_that_died_before_the_first_that_is_too_old(
    admin: Admin, backend: Client, redis: Redis
) -> None:
    """Where a look ends at a dead letter that is too old, the newer ones that it met are found, over pages too."""
    ids = bury(backend, redis, "shop", *[("a", "ValueError", "no")] * 5)
    query = parse(f"state:dead since:{at(2).isoformat()}")

    page = admin.search(query, limit=2)
    rest = admin.search(query, cursor=page.next, limit=2)

    assert [job.id for job in (*page.jobs, *rest.jobs)] == ids[:1:-1]
    assert (rest.next, len(rest.jobs)) == (None, 1)


def test_partitions_are_one_queue(url: str) -> None:
    """Failures of all partitions are groups of the queue; what may be read of it is shared among them, and all of them are redriven."""
    with Conveyor(url) as app:
        orders = app.queue("orders", partitions=2)
        for number in range(20):
            orders.push(number)
        for message in orders.pull(n=20):
            message.dead(f"no account {number}")
        admin = Admin(app.client)

        [group] = admin.failures("orders").groups
        part = admin.failures("orders", most=6)
        chosen = [job.id for job in admin.each_job("orders", "dead", error="no account")]

        assert (group.queue, group.count, len(chosen)) == ("orders", 20, 20)
        assert (part.read, part.total, part.groups[0].queue) == (6, 20, "orders")
        assert admin.redrive("orders", ids=chosen[5:]) == 15
        assert (admin.queue("orders").ready, admin.queue("orders").dead) == (15, 5)
        orders.purge()
        orders.purge(dead=True)


def test_a_page_that_searches_nothing_is_full(app: Conveyor) -> None:
    """All jobs of many queues fill a page however slow the server answers; a filter that has to look ends with its time."""
    for name in "abcdefgh":
        app.queue(name).push(name)
    admin = Admin(app.client)
    page = admin.search(parse(""), limit=50, seconds=0)
    assert [job.queue for job in page.jobs] == list("abcdefgh")
    assert page.next is None
    assert admin.search(parse("body:h"), limit=50, seconds=0).next is not None
