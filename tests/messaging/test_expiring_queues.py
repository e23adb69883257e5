"""Queues that nobody uses: such a queue goes by itself with all of its keys and its name, and never one that holds something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py

from conveyor import Concurrency, Conveyor
from conveyor.errors import ConfigurationError
from support.app_fixtures import blocking_app  # noqa: F401
from support.message_fixtures import first
from support.running_worker import working
from support.waiting import auntil, until

HOUR = 3_600_000
CONSTANT = 90_000_000
"""No key lives longer (ms): the counters of a minute, a day and an hour."""


def _ttls(redis: redis_py.Redis, tag: str = "reply") -> dict[str, int]:
    """Return the keys of a queue with the ms that they live: -1 for ever."""
    return {key.decode().rpartition(":")[2]: redis.pttl(key) for key in redis.scan_iter(f"conveyor:{{{tag}}}:*")}


def _pass_time(redis: redis_py.Redis, tag: str = "reply") -> None:
    """Let the time of a queue that expires go by: all of its keys that have one."""
    for key in redis.scan_iter(f"conveyor:{{{tag}}}:*"):
        if redis.pttl(key) > 0:
            redis.pexpire(key, 1)
    redis.zadd("conveyor:expiring", {tag: 1}, xx=True)
    until(lambda: all(left == -1 for left in _ttls(redis, tag).values()))


def _names(redis: redis_py.Redis) -> set[bytes]:
    return {name for name in redis.smembers("conveyor:queues") if name != b"\t"}


def _take(queue: Any) -> None:
    for message in queue.pull(100):
        message.ack()


def test_every_key_of_an_unused_queue_lives_as_long_as_said(app: Conveyor, redis: redis_py.Redis) -> None:
    """A queue that was used in every way and is empty has no key that stays; its name goes when somebody lists the queues."""
    app.queue("other").push(1)
    queue = app.queue("reply", expires="1h")
    queue.push_many(range(5))
    queue.push("keyed", unique="k", headers={"a": "b"}, tags=["t"])
    queue.push("grouped", group="g")
    queue.push("own", id="mine", priority=4)
    assert queue.push("own", id="mine") == queue.push("own", id="mine")
    _take(queue)
    queue.push("bad")
    consumer, message = first(queue)
    message.dead("no")
    consumer.close()
    assert queue.purge(dead=True) == 1
    left = _ttls(redis)
    assert {name for name, ms in left.items() if not 0 < ms <= CONSTANT} == set()
    assert HOUR - 600_000 < left["conf"] <= HOUR + 5_000
    assert _names(redis) == {b"other", b"reply"}
    _pass_time(redis)
    assert app.client.queues() == ["other"]
    assert _names(redis) == {b"other"}
    assert {key.decode() for key in redis.scan_iter() if b"{other}" not in key} == {"conveyor:queues"}
    app.client.queues()
    assert redis.smembers("conveyor:queues") == {b"other"}
    app.queue("other").purge()


@pytest.mark.parametrize("place", ["ready", "scheduled", "leased", "dead", "grouped"])
def test_a_queue_that_holds_something_stays(app: Conveyor, redis: redis_py.Redis, place: str) -> None:
    """No key of a queue has a time to live while something is in it, wherever; when that has gone, all have."""
    queue = app.queue("reply", expires="1h")
    queue.push(0)
    _take(queue)
    assert _ttls(redis)["conf"] > 0
    queue.push(1, **{"scheduled": {"delay": "1d"}, "grouped": {"group": "g"}}.get(place, {}))
    if place in {"leased", "dead"}:
        consumer, message = first(queue)
        if place == "dead":
            message.dead("no")
            consumer.close()
    identities = redis.scan_iter("conveyor:{reply}:leased:*")
    held = [redis.pttl(key) for key in identities if not redis.hexists(key, "\tleft")]
    assert held == ([-1] if place == "leased" else [])
    assert {
        _ttls(redis).get(name, -1) for name in ("conf", "jobs", "recent", "workers", "due", "dead", "0", "tickets")
    } == {-1}
    _pass_time(redis)
    assert app.client.queues() == ["reply"]
    counts = queue.stats()
    assert counts.ready + counts.scheduled + counts.waiting + counts.leased + counts.dead == 1
    if place == "leased":
        message.ack()
        consumer.close()
    assert queue.purge(dead=place == "dead") == (place != "leased")
    assert all(ms > 0 for ms in _ttls(redis).values())


def test_cancelled_message_nobody_waits_for_keeps_no_queue(app: Conveyor, redis: redis_py.Redis) -> None:
    """The rest of a job that was cancelled while it was ready goes with its queue."""
    queue = app.queue("reply", expires="1h")

    @app.task(queue="reply")
    async def answer() -> None: ...

    answer.enqueue().cancel()
    assert all(ms > 0 for ms in _ttls(redis).values())
    assert len(queue) == 0


def test_waiting_consumer_is_use(app: Conveyor, redis: redis_py.Redis) -> None:
    """A pull that waits sets the time anew, also of several queues at once, and so does a consumer that has nothing to do."""
    queue = app.queue("reply", expires="1h")
    queue.push(1)
    _take(queue)

    def age() -> None:
        for key in redis.scan_iter("conveyor:{reply}:*"):
            redis.pexpire(key, min(redis.pttl(key), 60_000))

    others = dict.fromkeys(("a", "b", "reply"), 1.0)
    for wait in (lambda: queue.pull(wait="1ms"), lambda: app.pull(others, 1, wait="1ms")):
        age()
        assert _ttls(redis)["conf"] <= 60_000
        wait()
        assert _ttls(redis)["conf"] > 60_000
        assert _ttls(redis)["recent" if "recent" in _ttls(redis) else "conf"] > 60_000


async def test_idle_worker_is_use(url: str, redis: redis_py.Redis) -> None:
    """A worker that has nothing to do keeps its queue; when it has left, the queue goes."""
    async with Conveyor(url, lease="300ms") as app:
        app.queue("reply", expires="1h")

        @app.task(queue="reply")
        async def answer() -> None: ...

        async with working(app):
            await (await answer.aenqueue()).aresult()
            await auntil(lambda: _ttls(redis)["conf"] > 0)
            for key in redis.scan_iter("conveyor:{reply}:*"):
                redis.pexpire(key, 60_000)
            await auntil(lambda: _ttls(redis)["conf"] > 60_000)
            assert _ttls(redis)["workers"] > 60_000
        assert all(ms > 0 for ms in _ttls(redis).values())


def test_forgotten_name_is_not_added_again(
    app: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that pushed to a queue that was deleted since does not add its name again; a name that the set has lost it does."""
    for name in ("gone", "stays"):
        app.queue(name).push(1)
    _take(app.queue("gone"))
    with Conveyor(app.client.configured_url) as other:
        other.queue("gone").delete()
    redis.srem("conveyor:queues", "stays")
    monkeypatch.setattr(app.client._announced, "_refresh_at", 0.0)
    app.queue("third").push(1)
    assert redis.smembers("conveyor:queues") == {b"stays", b"third"}
    app.queue("gone").push(1)
    assert redis.smembers("conveyor:queues") == {b"stays", b"third", b"gone"}
    for name in ("gone", "stays", "third"):
        app.queue(name).purge()


def test_names_go_without_anybody_who_lists(
    app: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that has pushed to such queues removes the names of those that are gone, its own and others'."""
    for name in ("reply", "reply2"):
        app.queue(name, expires="1h").push(1)
        _take(app.queue(name, expires="1h"))
        _pass_time(redis, name)
    assert _names(redis) == {b"reply", b"reply2"}
    monkeypatch.setattr(app.client._announced, "_refresh_at", 0.0)
    app.queue("reply3", expires="1h").push(1)
    assert _names(redis) == {b"reply3"}
    assert redis.zcard("conveyor:expiring") == 1
    app.queue("reply3", expires="1h").purge()


def test_queue_that_went_begins_anew(app: Conveyor, redis: redis_py.Redis) -> None:
    """A push to a queue that has gone makes it anew, with its time and its name."""
    queue = app.queue("reply", expires="1h")
    queue.push(1)
    _take(queue)
    _pass_time(redis)
    assert app.client.queues() == []
    queue.push(2)
    assert app.client.queues() == ["reply"]
    _take(queue)
    assert redis.hget("conveyor:{reply}:conf", "expires") == b"3600000"
    assert all(ms > 0 for ms in _ttls(redis).values())


def test_a_new_name_costs_four_calls_and_a_push_to_it_two_commands(app: Conveyor, redis: redis_py.Redis) -> None:
    """The first push to such a queue is three calls more than to another one; later pushes are one call."""
    queue, plain = app.queue("reply", expires="1h"), app.queue("plain")

    def commands(push: Callable[[], Any]) -> int:
        redis.config_resetstat()
        push()
        stats = redis.info("commandstats")
        return int(
            sum(
                one["calls"]
                for name, one in stats.items()
                if name in {"cmdstat_evalsha", "cmdstat_eval", "cmdstat_sadd", "cmdstat_zadd"}
            )
        )

    app.queue("first").push(1)  # the scripts are loaded
    app.queue("first2", expires="1h").push(1)
    assert commands(lambda: plain.push(1)) <= 2 + 1
    assert commands(lambda: queue.push(1)) <= 4 + 1
    assert commands(lambda: queue.push(1)) == 1
    for name in ("reply", "plain", "first", "first2"):
        redis.delete(f"conveyor:{{{name}}}:jobs", f"conveyor:{{{name}}}:ready:0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expires": 0}, "greater than zero"),
        ({"expires": "9s"}, "10 seconds or more"),
        ({"expires": "soon"}, "not a duration"),
        ({"expires": "1h", "partitions": 2}, "in one piece"),
        ({"expires": "1h", "limits": [Concurrency(1)]}, "exclude each other"),
    ],
)
def test_what_cannot_be_is_refused(app: Conveyor, options: dict[str, Any], words: str) -> None:
    """A time that is too short, or that fits no queue of that kind, is refused where it is declared."""
    with pytest.raises(ConfigurationError, match=words):
        app.queue("reply", **options)
