"""Queues that are deleted, and names that are forgotten: no key is left, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from conveyor import Conveyor, current
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, QueueNotFound
from conveyor.messaging import deletion
from conveyor.store import inspection
from conveyor.store import partitions as partitioning
from support.app_fixtures import blocking_app  # noqa: F401
from support.message_fixtures import first
from support.running_worker import drain
from support.shell import Shell


def keys_of(redis: redis_py.Redis) -> dict[bytes, bytes | None]:
    """Return all keys of the server with what they hold, as it is stored."""
    return {key: redis.dump(key) for key in redis.scan_iter()}


def _handle_all(queue: Any) -> int:
    """Acknowledge all messages there are; return how many."""
    count = 0
    while pulled := queue.pull(100):
        for message in pulled:
            message.ack()
        count += len(pulled)
    return count


# -- what is left -------------------------------------------------------------------------------------------------


@pytest.mark.row("D273")
@pytest.mark.parametrize("partitions", [1, 3])
def test_no_key_is_left(app: Conveyor, redis: redis_py.Redis, partitions: int) -> None:
    """A queue of messages that was used in every way is deleted with all its keys; keys of others are as before."""
    app.queue("mail2").push(1)
    app.queue("mail").push(1, unique="other")
    before = keys_of(redis)
    queue = app.queue("mail-out", partitions=partitions)
    queue.push_many(range(20))
    queue.push("own", id="mine")
    queue.push("keyed", unique="k", headers={"a": "b"})
    queue.push("soon", delay="10ms", priority=7)
    queue.push("late", expires="1h")
    handled = _handle_all(queue)
    while handled < 24:  # one of them is due in a moment
        [message] = queue.pull(wait="20s")
        message.ack()
        handled += 1
    queue.push("bad")
    consumer, message = first(queue)
    message.dead("no")
    consumer.close()
    queue.purge()
    queue.purge(dead=True)
    queue.pause()
    assert keys_of(redis) != before
    queue.delete()
    assert keys_of(redis) == before
    queue.delete()
    assert keys_of(redis) == before
    for name in ("mail", "mail2"):
        app.queue(name).purge()


@pytest.mark.row("D273")
async def test_no_key_of_jobs_is_left(url: str, redis: redis_py.Redis) -> None:
    """The same for a queue of jobs: results, counters, own ids, finished jobs, and what it spawned into other queues."""
    async with Conveyor(url) as app:

        @app.task(queue="target")
        async def spawned(n: int) -> int:
            return n

        @app.task(queue="source")
        async def add(a: int, b: int) -> int:
            current().spawn(spawned.s(a))
            return a + b

        jobs = [await add.options(id=f"own{n}").aenqueue(n, 1) for n in range(3)]
        await (await add.options(delay="1h").aenqueue(1, 1)).acancel()
        await drain(app)
        assert await jobs[2].aresult() == 3
        await app.queue("source").adelete()
        left = {key for key in redis.scan_iter() if b"source" in key}
        assert left == set()
        assert redis.smembers("conveyor:queues") == {b"target"}
        await app.queue("target").adelete()
        assert list(redis.scan_iter()) == []


def test_no_key_beside_a_plain_list_is_left(app: Conveyor, redis: redis_py.Redis) -> None:
    """A queue beside a list goes, also where the list lends its tag to a queue; one that is on the list keeps it."""
    mail, tagged = app.queue("mail"), app.plain_list("to{mail}list")
    mail.push(1)
    tagged.push({"n": 1})
    assert _handle_all(tagged) == 1
    assert _handle_all(mail) == 1
    redis.rpush("to{mail}list", "2")
    mail.delete()
    assert any(b"to{mail}list" in key for key in redis.scan_iter())
    with pytest.raises(ConfigurationError, match=r"is not empty: 1 ready\. Nothing was deleted"):
        tagged.delete()
    assert redis.lrange("to{mail}list", 0, -1) == [b"2"]
    assert _handle_all(tagged) == 1
    tagged.delete()
    assert list(redis.scan_iter()) == []


def test_what_may_be_repeated_tomorrow_stays_and_expires(app: Conveyor, redis: redis_py.Redis) -> None:
    """The sequences of buffers and database outboxes, whose pushes may be repeated for a day, expire by themselves."""
    queue = app.queue("mail")
    queue.push(1)
    _handle_all(queue)
    redis.set(queue.keys.lane("buffer+"), "1\nok", px=86_400_000)
    queue.delete()
    assert [key.decode() for key in redis.scan_iter()] == [queue.keys.lane("buffer+")]


def test_more_keys_than_one_step_deletes(app: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of keys beside a queue are deleted in several steps."""
    monkeypatch.setattr(deletion, "CHUNK", 10)
    queue = app.queue("mail")
    for number in range(35):
        queue.push(1, id=f"own{number}")
    _handle_all(queue)
    queue.delete()
    assert list(redis.scan_iter()) == []


def test_partitions_of_before_go_too(app: Conveyor, redis: redis_py.Redis, url: str) -> None:
    """Partitions that an earlier, larger number has left behind are deleted; a plain list that is named like one is not."""
    app.queue("orders", partitions=4).push_many([1, 2])
    _handle_all(app.queue("orders", partitions=4))
    app.queue("orders", partitions=4).repartition(2)
    app.plain_list("orders/9").pause()
    with Conveyor(url) as other:
        other.queue("orders", partitions=2).push(1)
        _handle_all(other.queue("orders", partitions=2))
        other.queue("orders", partitions=2).delete()
        assert {key.decode() for key in redis.scan_iter()} == {"conveyor:{orders/9}:conf", "conveyor:{orders/9}:wake"}
        app.plain_list("orders/9").delete()


# -- what is in use -----------------------------------------------------------------------------------------------


def _ready(queue: Any) -> None:
    queue.push(1)


def _scheduled(queue: Any) -> None:
    queue.push(1, delay="1h")


def _leased(queue: Any) -> None:
    queue.push(1)
    assert len(queue.pull()) == 1


def _dead(queue: Any) -> None:
    queue.push(1)
    queue.pull()[0].dead("no")


async def _awaited_code(url: str, partitions: int) -> str:
    async with Conveyor(url) as app:
        with pytest.raises(ConfigurationError) as caught:
            await app.queue("orders", partitions=partitions).adelete()
        return caught.value.code


@pytest.mark.row("D273")
@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (_ready, "is not empty: 1 ready. Nothing was deleted. Have it drained, or: conveyor queue purge orders"),
        (_scheduled, "is not empty: 1 scheduled."),
        (_leased, "is not empty: 1 leased, 1 worker or consumer. Nothing was deleted. Stop what serves it."),
        (_dead, "is not empty: 1 dead. Nothing was deleted. Dead letters: conveyor queue redrive orders, or"),
    ],
)
@pytest.mark.leaves_keys("what is refused stays")
def test_a_queue_in_use_is_refused(
    app: Conveyor, redis: redis_py.Redis, url: str, partitions: int, fill: Callable[[Any], None], says: str
) -> None:
    """A queue that holds anything is refused with the counts and what to do, and no key is changed."""
    queue = app.queue("orders", partitions=partitions)
    fill(queue)
    before = keys_of(redis)
    with pytest.raises(ConfigurationError) as caught:
        queue.delete()
    assert caught.value.code == "E35"
    assert says in str(caught.value)
    assert asyncio.run(_awaited_code(url, partitions)) == "E35"
    assert keys_of(redis) == before


def test_a_queue_that_is_served_is_refused(app: Conveyor, redis: redis_py.Redis) -> None:
    """A consumer that waits keeps its queue; one that died, and held nothing, does not."""
    queue = app.queue("orders")
    queue.push(1)
    consumer, message = first(queue)
    message.ack()
    with pytest.raises(ConfigurationError, match=r"is in use: 1 worker or consumer\. Nothing was deleted"):
        queue.delete()
    consumer.close()
    source = queue._source(False)
    queue.client.run(next(source.session.turn(1)))
    with pytest.raises(ConfigurationError, match="is in use"):
        queue.delete()
    redis.zadd(queue.keys.workers, {source.session.worker: 1})
    queue.delete()
    assert list(redis.scan_iter()) == []


# -- races --------------------------------------------------------------------------------------------------------


@pytest.mark.row("D273")
@pytest.mark.parametrize("partitions", [1, 3])
def test_racing_producers_lose_nothing(url: str, partitions: int) -> None:
    """Producers that push while the queue is deleted again and again: each message is taken exactly once."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    done, pushed, taken, deleted = threading.Event(), list[str](), list[int](), [0]
    met = threading.Event()  # a deletion that was not refused

    def produce(number: int) -> None:
        chance = random.Random(seed + number)
        with Conveyor(url) as app:
            queue = app.queue("orders", partitions=partitions)
            for n in range(40):
                if n == 20:
                    met.wait(60)  # on a busy machine the queue is never empty otherwise
                pushed.append(queue.push(number * 1000 + n))
                done.wait(chance.random() * 0.01)  # stops the producer for a moment

    def take() -> None:
        with Conveyor(url) as app:
            queue = app.queue("orders", partitions=partitions)
            while not done.is_set() or len(queue):
                for message in queue.pull(10, wait="20ms"):
                    taken.append(message.body)
                    message.ack()

    def delete() -> None:
        with Conveyor(url) as app:
            queue = app.queue("orders", partitions=partitions)
            while not done.is_set():
                try:
                    queue.delete()
                    deleted[0] += 1
                    met.set()
                except ConfigurationError as error:
                    assert error.code == "E35"  # noqa: PT017

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(take), pool.submit(take), pool.submit(delete)]
        producers = [pool.submit(produce, number) for number in range(3)]
        wait(producers, 60)
        done.set()
        for producer in producers:
            producer.result(60)
        for other in others:
            other.result(60)
    assert len(pushed) == 120
    assert sorted(taken) == sorted(number * 1000 + n for number in range(3) for n in range(40))
    assert deleted[0] > 0
    with Conveyor(url) as app:
        queue = app.queue("orders", partitions=partitions)
        queue.push("last")
        assert Admin(app.client).names() == ["orders"]
        _handle_all(queue)
        queue.delete()
        assert Admin(app.client).names() == []


@pytest.mark.row("D273")
def test_a_push_between_the_steps(app: Conveyor, url: str) -> None:
    """A push at each point of a deletion is stored, in the queue before, which is then kept, or in a new one that is known."""
    for partitions in (1, 3):
        steps = 0
        while True:
            queue = app.queue(f"orders{partitions}", partitions=partitions)
            queue.push("before")
            _handle_all(queue)
            keys = queue.keys
            program = deletion._delete(app.client, keys, deletion._find(app.client, keys))
            failed, call, left = False, next(program), steps
            with Conveyor(url) as producer, ThreadPoolExecutor(1) as pool:
                pushing: Any = None
                try:
                    while True:
                        if left == 0:
                            pushing = pool.submit(producer.queue(queue.name, partitions=partitions).push, "racing")
                            if partitions == 1:
                                pushing.result(10)
                        left -= 1
                        call = program.send(app.client.run(call))
                except StopIteration:
                    pass
                except ConfigurationError as error:
                    failed = True
                    assert error.code == "E35"  # noqa: PT017
                if pushing is None:
                    break
                pushing.result(20)
            assert app.client.run(inspection.counts(keys)).workers == 0
            names = Admin(app.client).names()
            assert queue.name in names, (partitions, steps, failed)
            pulled = queue.pull(5, wait="5s")
            assert [message.body for message in pulled] == ["racing"], (partitions, steps)
            pulled[0].ack()
            steps += 1
        assert steps > 3
        queue.delete()


@pytest.mark.row("D273")
def test_an_interrupted_deletion_is_completed(app: Conveyor, redis: redis_py.Redis) -> None:
    """A deletion that ended between any two of its steps is completed by the next one."""
    steps = 0
    while True:
        queue = app.queue("orders", partitions=2)
        queue.push_many([1, 2])
        _handle_all(queue)
        program = deletion._delete(app.client, queue.keys, deletion._find(app.client, queue.keys))
        call = next(program)
        try:
            for _ in range(steps):
                call = program.send(app.client.run(call))
        except StopIteration:
            break
        program.close()
        queue.delete()
        assert list(redis.scan_iter()) == [], steps
        steps += 1
    assert steps > 5
    assert app.client.run(partitioning.count(queue.keys)) == (1, "")


# -- the command line ---------------------------------------------------------------------------------------------


def test_the_command(url: str, app: Conveyor, redis: redis_py.Redis, tmp_path: Path) -> None:
    """It asks, says what is in the way, deletes, and leaves nothing; names that were looked at are not kept."""
    shell = Shell(tmp_path, url)
    queue = app.queue("orders")
    queue.push(1)
    refused = shell.run("queue", "delete", "orders", "--yes")
    assert (refused.returncode, "1 ready. Nothing was deleted." in refused.stderr) == (6, True)
    _handle_all(queue)
    asked = shell.run("queue", "delete", "orders")
    assert (asked.returncode, "Not confirmed: give --yes" in asked.stderr) == (6, True)
    assert shell.run("queue", "delete", "orders", "--dry-run").returncode == 0
    assert redis.smembers("conveyor:queues") == {b"orders"}
    done = shell.run("queue", "delete", "orders", "--yes", "--json")
    assert '"conveyor/queue-deleted@1"' in done.stdout
    assert '"deleted":true' in done.stdout.replace(" ", "")
    assert [key for key in redis.scan_iter() if key != b"conveyor:audit"] == []
    for command in (("show", "typo"), ("delete", "typo", "--yes"), ("purge", "typo", "--yes"), ("pause", "typo")):
        assert shell.run("queue", *command).returncode == 5, command
    assert [key for key in redis.scan_iter() if key != b"conveyor:audit"] == []
    with pytest.raises(QueueNotFound):
        Admin(app.client).delete_queue("typo")
