"""Plain lists: programs that know nothing of us at the other end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import aclosing, closing
from pathlib import Path

import pytest

from conveyor.errors import ConfigurationError, ConveyorError, PayloadError
from conveyor.messaging.message import Batch
from conveyor.messaging.plain_list import PlainList
from conveyor.messaging.queue import Queue
from conveyor.messaging.retry import Retry
from conveyor.store import inspection, operations, plain_list
from conveyor.store.client.client import Client
from support.waiting import until, until_ended

EXAMPLES = Path(__file__).parents[2] / "examples"
LIST = "my_task_queue"


@pytest.fixture
def tasks(backend):
    tasks = PlainList(backend, LIST, lease_ms=2000, retry=Retry(attempts=2, backoff="10ms", jitter=False))
    yield tasks
    assert backend.run(inspection.audit(tasks.keys)) == []
    tasks.purge()
    tasks.purge(dead=True)
    assert tasks.stats().workers == 0


class TestPairs:
    @pytest.mark.parametrize("consumer", ["plain", "conveyor"])
    @pytest.mark.parametrize("producer", ["plain", "conveyor"])
    @pytest.mark.standalone_only("the plain examples know no other place")
    def test_examples_work_together(self, url, redis, producer, consumer):
        """Each producer feeds each consumer with an id, a description and a timestamp: all arrive, in order, and none is left."""
        environment = {**os.environ, "CONVEYOR_URL": url, "PAUSE": "0.02"}
        names = [f"{consumer}_consumer.py", f"{producer}_producer.py"]
        processes = [
            subprocess.Popen(
                [sys.executable, EXAMPLES / name, "10"], env=environment, text=True, stdout=subprocess.PIPE
            )
            for name in names
        ]
        try:
            outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait(60)
        assert [process.returncode for process in processes] == [0, 0]
        assert outputs[0] == [f"done {n}: task {n}" for n in range(1, 11)]
        assert len(outputs[1]) == 10
        assert redis.llen(LIST) == 0


class TestForeignProducers:
    def test_all_ways_in_count(self, tasks, redis):
        """RPUSH of one and of many stand at the tail, LPUSH at the head; len and stats count them."""
        redis.rpush(LIST, json.dumps({"id": 1}))
        redis.rpush(LIST, *[json.dumps({"id": n}) for n in range(2, 30)])
        redis.lpush(LIST, '{"id": 0}')
        assert (len(tasks), tasks.stats().ready) == (30, 30)
        with closing(tasks.consume()) as messages:
            for expected in range(30):
                with next(messages) as body:
                    assert body == {"id": expected}
        assert len(tasks) == 0

    @pytest.mark.usefixtures("only_when_woken")
    def test_an_idle_consumer_is_woken(self, tasks, redis):
        """A raw push reaches a consumer that waits, at once, and so does the next."""
        seen = []

        def consume():
            for message in tasks.consume():
                with message as body:
                    seen.append(body)
                if len(seen) == 3:
                    return

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        for number in range(3):
            until(lambda: _blocked(redis, "blmove"))
            redis.rpush(LIST, number)
            until(lambda: len(seen) == number + 1)  # noqa: B023
        thread.join(60)
        assert seen == [0, 1, 2]

    def test_retries_and_dead_letters(self, tasks, redis):
        """A failed entry comes back by backoff and dies after its attempts, its bytes kept as they were pushed."""
        redis.rpush(LIST, '{ "id":   1}')
        attempts = []
        with closing(tasks.consume()) as messages:
            for _ in range(2):
                message = next(messages)
                attempts.append(message.attempt)
                with message:
                    raise ValueError("boom")
        assert attempts == [1, 2]
        [letter] = tasks.dead_letters()
        assert (letter.payload, letter.error) == (b'{ "id":   1}', "ValueError: boom")
        assert redis.llen(LIST) == 0

    @pytest.mark.parametrize("entry", [b"not json", b"\xff\x00\n\n\t", b"", b'{"id": 1', b"[" * 100 + b"]" * 100])
    def test_what_is_not_json(self, tasks, redis, entry):
        """It becomes a dead letter with its bytes, and the next entry is taken."""
        redis.rpush(LIST, entry, "7")
        [message] = _first(tasks)
        assert message == 7
        assert [letter.payload for letter in tasks.dead_letters()] == [entry]

    def test_what_is_of_another_type(self, backend, tasks, redis):
        """An entry that does not fit the declared type is set aside in the same way."""
        redis.rpush(LIST, '"seven"', "7")
        numbers = PlainList(backend, LIST, int, lease_ms=2000)
        assert _first(numbers) == [7]
        assert [letter.payload for letter in tasks.dead_letters()] == [b'"seven"']

    def test_what_a_dead_consumer_left_in_the_intake(self, tasks, redis):
        """Any turn takes it, before what came later."""
        redis.rpush(LIST, "2")
        redis.rpush(tasks.keys.intake, "1")
        assert len(tasks) == 2
        messages = tasks.pull(5)
        assert [message.body for message in messages] == [1, 2]
        Batch(messages).ack()

    def test_batches_and_pull(self, tasks, redis):
        """The other ways of taking work on a plain list too."""
        redis.rpush(LIST, *range(20))
        with closing(tasks.batches(size=15, within="50ms")) as batches, next(batches) as bodies:
            assert bodies == list(range(15))
        got = tasks.pull(100, wait="1s")
        assert [message.body for message in got] == list(range(15, 20))
        Batch(got).ack()

    def test_a_full_server(self, start_server):
        """When Redis is full and refuses to move entries, a consumer still drains the list."""
        server = start_server("--maxmemory", "16mb", "--maxmemory-policy", "noeviction")
        with server.client() as client:
            tasks = PlainList(Client(server.url), LIST, lease_ms=2000)
            client.rpush(LIST, "1")
            client.config_set("maxmemory", "1mb")
            with pytest.raises(ConveyorError, match="maxmemory"):
                tasks.push(2)
            consumer = tasks.consume()
            message = next(consumer)
            assert message.body == 1
            message.ack()
            consumer.close()

    def test_nothing_is_taken_while_busy(self, tasks, redis):
        """While a consumer works, what comes stays on the list, for any program to take."""
        redis.rpush(LIST, "1")
        consumer = tasks.consume()
        message = next(consumer)
        message.nack(delay="1h")

        def promote():
            until(lambda: _blocked(redis, "blmove"))
            tasks.client.run(operations.promote(tasks.keys, message._leased.id))

        thread = threading.Thread(target=promote)
        thread.start()
        message = next(consumer)  # it was idle in between, waiting at the list too
        thread.join(60)
        assert message.attempt == 2
        until(lambda: not _blocked(redis, "blmove"))  # the server has seen that the connection was closed
        redis.rpush(LIST, "2")
        assert redis.lrange(LIST, 0, -1) == [b"2"]
        message.ack()
        consumer.close()
        assert redis.blpop(LIST, 1) == (LIST.encode(), b"2")


class TestForeignConsumers:
    def test_bare_documents(self, tasks, redis):
        """BLPOP gets exactly the JSON that was pushed, in order."""
        assert tasks.push({"id": 1}) == ""
        assert len(tasks.push_many({"id": n} for n in range(2, 2500))) == 2498
        assert redis.lrange(LIST, 0, 1) == [b'{"id":1}', b'{"id":2}']
        assert redis.llen(LIST) == 2499
        assert tasks.purge() == 2499
        assert redis.llen(LIST) == 0

    @pytest.mark.parametrize(
        "options",
        [{"delay": 1}, {"priority": 1}, {"id": "x"}, {"unique": "x"}, {"expires": 1}, {"headers": {"a": "b"}},
         {"front": True}],
    )  # fmt: skip
    def test_options_of_a_queue(self, tasks, options):
        """Options that a bare document cannot carry are refused, never ignored."""
        with pytest.raises(ConfigurationError, match="plain list"):
            tasks.push({}, **options)
        assert len(tasks) == 0

    def test_bad_values(self, tasks, redis):
        """A value that cannot be stored leaves the list as it was."""
        with pytest.raises(PayloadError):
            tasks.push_many([1, 2, object()])
        assert redis.llen(LIST) == 0

    def test_a_repeated_push_is_answered_not_done_again(self, backend, tasks, redis):
        """The same call twice, as after a lost reply, appends once."""
        lanes = plain_list.SequencePool()
        with lanes.lend() as lane:
            call = plain_list.push(tasks.keys, lane, [b"1", b"2"])
        backend.run(call)
        backend.run(call)
        assert redis.lrange(LIST, 0, -1) == [b"1", b"2"]
        with lanes.lend() as lane:
            backend.run(plain_list.push(tasks.keys, lane, [b"3"]))
        assert redis.llen(LIST) == 3

    def test_a_key_that_is_no_list(self, tasks, redis):
        """It is left alone, and the error names the reason."""
        redis.set(LIST, "x", px=60_000)
        with pytest.raises(ConfigurationError, match="WRONGTYPE"):
            tasks.push(1)
        assert redis.get(LIST) == b"x"
        redis.delete(LIST)

    @pytest.mark.parametrize("name", ["", "a\n", "a{b", 7])
    def test_names(self, backend, name):
        """A name that cannot be a list beside our keys is refused."""
        with pytest.raises(ConfigurationError):
            PlainList(backend, name, lease_ms=1000)

    def test_a_name_with_a_tag(self, backend, redis):
        """A list that brings its own hash tag lends it to our keys."""
        tasks = PlainList(backend, "app:{t1}:tasks", lease_ms=1000)
        redis.rpush("app:{t1}:tasks", "1")
        assert _first(tasks) == [1]
        assert all(b"{t1}" in key for key in redis.keys("*") if key != b"conveyor:queues")


class TestAwaitable:
    async def test_push_and_consume(self, url, redis):
        """The awaitable forms, with a consumer that waits when the entries come."""
        backend = Client(url)
        tasks = PlainList(backend, LIST, lease_ms=2000)
        await tasks.apush(1)
        await tasks.apush_many([2, 3])
        seen, later = [], threading.Timer(0.05, lambda: redis.rpush(LIST, 4))
        async with aclosing(tasks.aconsume()) as messages:
            async for message in messages:
                async with message as body:
                    seen.append(body)
                if body == 3:
                    later.start()
                if body == 4:
                    break
        until_ended(later)  # its reply may come behind the entry
        assert seen == [1, 2, 3, 4]
        assert await tasks.alen() == 0
        await backend.aclose()


def _first(queue: Queue):
    for message in queue.consume():
        with message as body:
            return [body]
    return []


def _blocked(redis, command):
    return any(client["cmd"] == command for client in redis.client_list())
