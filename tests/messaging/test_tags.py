"""Tags: jobs and messages are found, counted, cancelled and put back by them, and no tag outlives its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from conveyor import Buffer, Middleware, Outgoing, Retry, current
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from conveyor.jobs.job_selection import select
from conveyor.messaging.message import Batch
from conveyor.messaging.selection import Pace, act
from support.running_worker import drain
from support.waiting import until


@pytest.fixture
async def loop_app(url: str) -> AsyncIterator[Conveyor]:
    """An app on the emptied server, closed in the loop of its test."""
    app = Conveyor(url)
    yield app
    await app.aclose()


def tag_keys(redis: redis_py.Redis) -> dict[str, list[str]]:
    """Return each tag that has a key, and the ids in it."""
    keys: Iterable[bytes] = redis.keys("*:tag:*")
    return {key.decode().partition(":tag:")[2]: [id_.decode() for id_ in redis.zrange(key, 0, -1)] for key in keys}


async def seen(app: Conveyor, **options: Any) -> set[str]:
    return {job.id async for job in app.ajobs(**options)}


async def test_tags_reach_the_job_and_end_with_it(loop_app: Conveyor, redis: redis_py.Redis) -> None:
    """Tags of the task and of the call reach the job, are shown as long as it is known, and their keys end with the job."""
    app, met = loop_app, []

    @app.task(tags=["mail"])
    async def send(user: int) -> int:
        met.append(list(current().tags))
        return user

    job = await send.options(tags=["order:4711", "mail", "grüße"]).aenqueue(7)
    assert (await job.ainfo()).tags == ("mail", "order:4711", "grüße")
    assert tag_keys(redis) == {key: [job.id.partition(":")[2]] for key in ("mail", "order:4711", "grüße")}

    await drain(app)

    assert met == [["mail", "order:4711", "grüße"]]
    assert (await job.ainfo()).tags == ("mail", "order:4711", "grüße")
    assert tag_keys(redis) == {}


def test_messages_have_tags(app: Conveyor, redis: redis_py.Redis) -> None:
    """A message brings its tags, alone or pushed with many, and they end when it is acknowledged or purged."""
    orders = app.queue("orders", int)
    first = orders.push(1, tags=["a"])
    orders.push_many([2, 3], tags=["a", "b"])
    [message] = orders.pull()
    assert (message.id, message.tags) == (first, ["a"])
    message.ack()
    assert {tag: len(ids) for tag, ids in tag_keys(redis).items()} == {"a": 2, "b": 2}
    assert app.count_jobs(tag="a") == 2
    assert orders.purge() == 2
    assert tag_keys(redis) == {}


@pytest.mark.parametrize(
    "tags", ["order:1", ["a\tb"], ["a\n"], [""], ["x" * 201], [f"t{n}" for n in range(17)], [4711], 5, ["\ud800"]]
)
def test_bad_tags_are_refused_before_anything_is_stored(app: Conveyor, redis: redis_py.Redis, tags: Any) -> None:
    """A text alone, control characters, an empty or a long tag, too many, and what is no text raise; nothing is stored."""

    @app.task
    def send() -> None: ...

    for refused in (
        lambda: send.options(tags=tags).enqueue(),
        lambda: app.enqueue_many([send.options(tags=tags).s()]),
        lambda: app.queue("orders").push(1, tags=tags),
        lambda: app.queue("orders").push_many([1], tags=tags),
        lambda: app.task(tags=tags),
    ):
        with pytest.raises(ConfigurationError, match="tag"):
            refused()
    assert redis.keys() == []


@pytest.mark.leaves_keys("a dead letter stays")
async def test_dead_letters_keep_their_tags(loop_app: Conveyor, redis: redis_py.Redis) -> None:
    """A dead letter is found by its tags, also when it was put back and died again, until it is deleted."""
    app = loop_app

    @app.task(retry=1)
    async def fail() -> None:
        raise ValueError("no account")

    job = await fail.options(tags=["order:1"]).aenqueue()
    await drain(app)
    assert await seen(app, tag="order:1", state="dead") == {job.id}
    assert await app.aredrive("default", tag="order:1") == 1
    assert await seen(app, tag="order:1", state="ready") == {job.id}
    await drain(app)
    assert await app.acount_jobs(tag="order:1", error="No ACCOUNT") == 1
    await asyncio.to_thread(app.queue("default").purge, True)
    assert await app.acount_jobs(tag="order:1") == 0
    assert tag_keys(redis) == {}


# -- walks --------------------------------------------------------------------------------------------------------


def pushed(app: Conveyor, count: int, **options: Any) -> list[str]:
    """Push messages to queue `q`; return their ids."""
    return app.queue("q").push_many(range(count), **options)


@pytest.mark.standalone_only("counts the calls of one server")
def test_a_tag_among_many_is_found_without_a_scan(app: Conveyor, redis: redis_py.Redis) -> None:
    """With a tag only the jobs that have it are looked at: a count is one command, a search reads no other envelope."""
    pushed(app, 3000)
    few = pushed(app, 5, tags=["few"])
    redis.config_resetstat()

    counted, found = app.count_jobs(tag="few"), [job.id for job in app.jobs(tag="few")]

    calls = redis.info("commandstats")
    assert (counted, found) == (5, few)
    # Two for each job, and one for the tasks that are paused.
    assert (calls["cmdstat_zcard"]["calls"], calls["cmdstat_hget"]["calls"]) == (1, 2 * len(few) + 1)
    assert not {"cmdstat_hscan", "cmdstat_scan", "cmdstat_lrange"} & calls.keys()


@pytest.mark.standalone_only("counts the commands of one server")
def test_plain_jobs_send_no_command_for_tags(app: Conveyor, redis: redis_py.Redis) -> None:
    """Messages with one tag cost one command more for all of a push, and one for all that end in a report."""
    queue = app.queue("q")

    def commands(**options: Any) -> tuple[int, int]:
        redis.config_resetstat()
        queue.push_many(range(20), priority=1, **options)
        messages = queue.pull(20)
        with Batch(messages):
            pass
        calls = redis.info("commandstats")
        names = ("cmdstat_zadd", "cmdstat_zrem")
        return tuple(calls.get(name, {"calls": 0})["calls"] for name in names)

    plain = commands()
    tagged = commands(tags=["a"])

    assert (tagged[0] - plain[0], tagged[1] - plain[1]) == (2, 1)  # of the push the proof too, that it may


@pytest.mark.row("D341")
@pytest.mark.redis6
@pytest.mark.parametrize("options", [{"tag": "many"}, {"queue": "q"}, {"state": "scheduled", "task": None}])
def test_many_are_cancelled_in_bounded_steps(app: Conveyor, redis: redis_py.Redis, options: dict[str, Any]) -> None:
    """No step acts on more than about a hundred jobs, and each job is cancelled once, on every way."""
    ids = pushed(app, 1500, tags=["many"], delay="1h")
    chosen = select(core_of(app), **options)
    steps = [
        [one.id for one in acted] for acted in act(app.client, chosen.acting("cancel", app.client.queues()), Pace(None))
    ]

    assert max(map(len, steps)) <= 220
    assert sorted(id_ for step in steps for id_ in step) == sorted(ids)
    assert (app.count_jobs(queue="q"), tag_keys(redis)) == (0, {})


@pytest.mark.row("D341")
@pytest.mark.redis6
@pytest.mark.parametrize("state", ["ready", "scheduled", "leased"])
def test_a_walk_misses_nothing_while_the_queue_changes(app: Conveyor, state: str) -> None:
    """Jobs that are there from the first step to the last are found, each once, though others come and go meanwhile."""
    later: dict[str, Any] = {"delay": "1h"} if state == "scheduled" else {}
    ids = pushed(app, 2500, **later)
    held = [message for _ in range(3) for message in app.queue("q").pull(1000)] if state == "leased" else []
    found: list[str] = []
    for number, job in enumerate(app.jobs(state=state, queue="q")):
        found.append(job.id)
        if number % 300 == 0:
            pushed(app, 1, **later)
            if held:
                held.pop(number // 3 % len(held)).ack()
            else:
                app.job(ids[number]).cancel()

    keys = app.client.keys("q")
    gone = {id_ for id_ in ids if not app.client.execute("HEXISTS", keys.jobs, id_.removeprefix("q:"), key=keys.jobs)}
    for message in held:
        message.ack()
    assert len(found) == len(set(found))
    assert set(ids) - gone - {ids[number] for number in range(0, 2500, 300)} <= set(found)


def test_what_is_chosen_by_age_and_error(app: Conveyor) -> None:
    """Age is that of the present state; an error is compared in whatever case and language, by Redis and by the program alike."""
    orders = app.queue("q", retry=Retry(attempts=1))
    orders.push_many(["Straße gesperrt", "no account", "closed"], tags=["x"])
    for message in orders.pull(3):
        message.dead(message.body)
    orders.push("young", tags=["x"])

    def bodies(**options: Any) -> int:
        assert app.count_jobs(**options) == len(list(app.jobs(**options)))
        return app.count_jobs(**options)

    assert bodies(error="STRASSE") == bodies(error="straße", tag="x") == 1
    assert (bodies(error="ACCOUNT"), bodies(error="account", state="ready")) == (1, 0)
    assert (bodies(older="1h"), bodies(since="1h"), bodies(since="1h", state="dead", tag="x")) == (0, 4, 3)
    assert app.redrive("q", error="strasse") == 1
    assert app.redrive("q", error="straße") == 0
    assert app.redrive("q", limit=1) == 1
    assert app.count_jobs(state="dead") == 1
    assert app.cancel(queue="q", error="closed") == 0  # it has ended
    assert orders.purge(dead=True) == 1


def test_sealed_errors_are_chosen_by_the_program(url: str) -> None:
    """Errors that Redis cannot read are read by the program that has the keys: it counts and puts back what it chooses."""
    with Conveyor(url, keys={"k": "s" * 32}, encrypt=True) as app:
        orders = app.queue("q")
        orders.push_many(["no account", "closed"])
        for message in orders.pull(2):
            message.dead(message.body)

        assert app.count_jobs(error="No Account") == 1
        assert app.redrive(orders, error="no account") == 1
        assert app.count_jobs(state="dead") == 1
        assert (orders.purge(), orders.purge(dead=True)) == (1, 1)


def test_leased_jobs_are_asked(app: Conveyor) -> None:
    """Of jobs that are cancelled together those that a worker holds are asked of it, and counted apart; without a choice it is refused."""
    ids = pushed(app, 3, tags=["x"])
    [held] = app.queue("q").pull(1)

    cancelled = app.cancel(tag="x")

    assert (cancelled, cancelled.asked, held.id in ids) == (3, 1, True)
    assert app.queue("q").stats().ready == 0
    held.nack()
    assert app.count_jobs(queue="q") == 0
    with pytest.raises(ConfigurationError, match="every job of every queue"):
        app.cancel()
    with pytest.raises(ConfigurationError, match="state='done'"):
        app.jobs(state="done")


# -- every way in -------------------------------------------------------------------------------------------------


@pytest.mark.leaves_keys("the entries of cancelled jobs, which a worker passes over")
def test_partitions_have_tags(url: str, redis: redis_py.Redis) -> None:
    """Jobs of one tag are found, counted and cancelled in all partitions of a queue."""
    with Conveyor(url) as app:
        ids = app.queue("spread", partitions=3).push_many(range(30), tags=["x"])

        assert app.count_jobs(tag="x") == app.count_jobs(tag="x", queue="spread", state="ready") == 30
        assert {job.id for job in app.jobs(tag="x")} == set(ids)
        assert app.cancel(tag="x", queue="spread/1") == 10
        assert app.cancel(tag="x") == 20
        assert tag_keys(redis) == {}


def test_many_jobs_get_tags_together(app: Conveyor) -> None:
    """`enqueue_many` gives its tags to all its jobs, besides those of a task and of a call, and of a generator too."""

    @app.task(tags=["task"])
    def send(n: int) -> None: ...

    listed = app.enqueue_many(
        [send.s(1), send.options(tags=["own"], queue="vip").s(2), send.s(3)], tags=["bulk", "task"]
    )
    generated = app.enqueue_many((send.s(n) for n in range(3)), tags=["bulk"], spread="1h")

    assert [job.info().tags for job in listed] == [("task", "bulk"), ("task", "own", "bulk"), ("task", "bulk")]
    assert {job.id for job in app.jobs(tag="bulk")} == {job.id for job in [*listed, *generated]}
    assert app.cancel(tag="bulk") == 6


def test_a_middleware_sees_and_changes_tags(app: Conveyor) -> None:
    """A middleware reads the tags of jobs and messages, and may change them; bad ones are refused before anything is stored."""
    given: list[tuple[str, ...]] = []

    @app.middleware
    class Tenant(Middleware):
        def push(self, outgoing: Outgoing) -> None:
            given.append(outgoing.tags)
            outgoing.tags = (*outgoing.tags, "tenant:7") if "bad" not in outgoing.tags else ("\n",)

    @app.task
    def send() -> None: ...

    job = send.options(tags=["a"]).enqueue()
    app.queue("q").push_many([1, 2], tags=["b"])

    assert given == [("a",), ("b",), ("b",)]
    assert job.info().tags == ("a", "tenant:7")
    assert app.count_jobs(tag="tenant:7") == 3
    for refused in (send.options(tags=["bad"]).enqueue, lambda: app.queue("q").push(1, tags=["bad"])):
        with pytest.raises(ConfigurationError, match="tag"):
            refused()
    assert app.count_jobs() == 3


async def test_spawned_jobs_keep_their_tags(loop_app: Conveyor) -> None:
    """A job that a job spawns has its tags when it arrives."""
    met: list[Any] = []

    @loop_app.task
    async def child() -> None:
        met.append(current().tags)

    @loop_app.task
    async def parent() -> None:
        current().spawn(child.options(tags=["order:1"]).s())

    await parent.aenqueue()
    await drain(loop_app)

    assert met == [["order:1"]]


def test_buffered_pushes_keep_their_tags(url: str, tmp_path: Path) -> None:
    """A push that waited in a buffer, in a file too, is stored with its tags."""
    buffer = Buffer(tmp_path, server="one", linger=0)  # nobody is there to deliver to
    with Conveyor("redis://127.0.0.1:1", buffer=buffer, timeout="100ms") as away:
        away.queue("q").push(1, tags=["a", "b"])
    with Conveyor(url, buffer=Buffer(tmp_path, server="one")) as app:
        until(lambda: app.count_jobs(tag="b"))
        [message] = app.queue("q").pull(1)
        assert message.tags == ["a", "b"]
        message.ack()
        assert app.count_jobs(tag="a") == 0
