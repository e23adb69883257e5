"""Messages where jobs are, and jobs where messages are: refused where the app knows, explained and kept where it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import time
from typing import Any

import pytest
import redis as redis_py

from conveyor import Conveyor, ids
from conveyor.errors import ConfigurationError
from support.running_worker import working
from support.waiting import auntil

pytestmark = pytest.mark.usefixtures("redis")


@pytest.fixture
def app(url: str) -> Conveyor:
    """An app on the emptied server."""
    return Conveyor(url)


def _typed(app: Conveyor) -> None:
    app.queue("mixed", dict[str, int])


def _format(app: Conveyor) -> None:
    app.queue("mixed", format="msgpack")


def _pushed(app: Conveyor) -> None:
    app.queue("mixed").push({"n": 1})
    app.queue("mixed").purge()


def _listed(app: Conveyor) -> None:
    app.plain_list("mixed")


@pytest.mark.row("D271")
@pytest.mark.parametrize("declare", [_typed, _format, _pushed, _listed])
def test_a_job_in_a_queue_of_messages_is_refused(app: Conveyor, declare: Callable[[Conveyor], None], url: str) -> None:
    """A job of a task of another queue is refused before anything is stored, one call or many, also of a task by name."""
    with app:

        @app.task
        def add(a: int, b: int) -> int:
            return a + b

        declare(app)
        elsewhere = add.options(queue="mixed")
        with pytest.raises(ConfigurationError, match="'mixed' holds messages") as caught:
            elsewhere.enqueue(1, 2)
        assert caught.value.code == "E05"
        with pytest.raises(ConfigurationError, match="'mixed' holds messages"):
            app.enqueue_many([add.s(1, 2), elsewhere.s(1, 2)])
        with pytest.raises(ConfigurationError, match="'mixed' holds messages"):
            asyncio.run(elsewhere.aenqueue(1, 2))
        assert len(app.queue("default")) == 0
        with Conveyor(url) as other:
            assert len(app.plain_list("mixed") if declare is _listed else other.queue("mixed")) == 0


@pytest.mark.row("D271")
@pytest.mark.parametrize("kind", ["task", "later task", "external task", "enqueued"])
def test_a_message_in_a_queue_of_jobs_is_refused(app: Conveyor, kind: str) -> None:
    """A message to the queue of a task is refused before anything is stored, however late the task was declared."""
    with app:
        queue = app.queue("mixed")
        if kind == "external task":
            app.external_task("elsewhere.add", queue="mixed")
        elif kind == "enqueued":
            app.external_task("elsewhere.add").options(queue="mixed").enqueue(1)
            queue.purge()
        else:
            if kind == "later task":
                queue.push({"n": 1})
                queue.purge()

            @app.task(queue="mixed", name="elsewhere.add")
            def add() -> None: ...

        for push in (
            lambda: queue.push({"n": 1}),
            lambda: queue.push_many([{"n": 1}], priority=2),
            lambda: asyncio.run(queue.apush({"n": 1})),
        ):
            with pytest.raises(ConfigurationError, match=r"'mixed' holds jobs: .*'elsewhere\.add'") as caught:
                push()
            assert caught.value.code == "E05"
        assert len(queue) == 0


def test_settings_of_a_queue_of_tasks_refuse_no_job(app: Conveyor) -> None:
    """A queue that is declared for its settings alone, or looked at, takes jobs; the entries of a list with a task are pushed."""
    with app:

        @app.task
        def add(a: int, b: int) -> int:
            return a + b

        bounded, looked_at = app.queue("vip", max_length=10, lease="1m", max_attempts=2), app.queue("other")
        listed = app.plain_list("listed", add)
        assert len(looked_at) == 0
        add.options(queue="vip").enqueue(1, 2)
        add.options(queue="other").enqueue(1, 2)
        listed.push({"a": 1, "b": 2})
        assert (len(bounded), len(looked_at), len(listed)) == (1, 1, 1)
        for queue in (bounded, looked_at, listed):
            queue.purge()


def test_knowing_costs_no_command(app: Conveyor, redis: redis_py.Redis) -> None:
    """A push to a queue of messages, and a job in another queue, cost one script, as without the check."""
    with app:

        @app.task
        def add(a: int, b: int) -> int:
            return a + b

        queue, elsewhere = app.queue("mail"), add.options(queue="vip")
        queue.push(1)
        elsewhere.enqueue(1, 2)
        before = int(redis.info("stats")["total_commands_processed"])
        redis.config_resetstat()
        queue.push(1)
        elsewhere.enqueue(1, 2)
        assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 2
        assert before
        queue.purge()
        app.queue("vip").purge()


@pytest.mark.row("D271")
async def test_a_worker_that_meets_a_message_says_so(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The message keeps its attempts and its place in the queue, and a consumer of another program takes it."""
    async with Conveyor(url) as app, Conveyor(url) as producer:

        @app.task(queue="mixed")
        async def add(a: int, b: int) -> int:
            return a + b

        id_ = await producer.queue("mixed").apush({"n": 1})
        async with working(app):
            job = await add.aenqueue(1, 2)
            assert await job.aresult(timeout="10s") == 3
            text = await auntil(
                lambda: next((one.getMessage() for one in caplog.records if "E05" in one.getMessage()), "")
            )
        assert text.startswith(
            f"E05 Entry {id_} in 'mixed' is a message, not a job: it was pushed with push; jobs are enqueued with enqueue."
        )
        assert "It stays in 'mixed' and is tried again in 2.0 s; no attempt was used." in text
        [message] = await producer.queue("mixed").apull(wait="20s")
        assert (message.id, message.body, message.attempt) == (id_, {"n": 1}, 1)
        await message.aack()


@pytest.mark.row("D271")
async def test_a_consumer_that_meets_a_job_says_so(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The job keeps its attempts and its place in the queue, the message behind it is taken, and a worker runs the job."""
    caplog.set_level(logging.WARNING)
    async with Conveyor(url) as app, Conveyor(url) as consumer:

        @app.task(queue="mixed", name="add")
        async def add(a: int, b: int) -> int:
            return a + b

        job = await add.aenqueue(1, 2)
        queue = consumer.queue("mixed")
        id_ = await queue.apush({"n": 1})
        [message] = await queue.apull(2, wait="10s")
        assert (message.id, message.body) == (id_, {"n": 1})
        await message.aack()
        [text] = [one.getMessage() for one in caplog.records if "E05" in one.getMessage()]
        assert text.startswith(
            f"E05 Entry {job.id} in 'mixed' is a job of task 'add', not a message: it was enqueued with enqueue; messages are "
            "pushed with push."
        )
        assert text.endswith("It stays in 'mixed' and is tried again in 2.0 s; no attempt was used.")
        async with working(app):
            assert await job.aresult(timeout="20s") == 3
        assert (await queue.astats()).dead == 0


@pytest.mark.row("D271")
@pytest.mark.parametrize("how", ["consume", "batches"])
def test_consumers_put_jobs_off(app: Conveyor, url: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A loop over messages, or batches of them, passes a job over, even one whose workers crashed often."""
    with app, Conveyor(url) as consumer:
        job = app.external_task("add", queue="mixed").enqueue(1)
        keys = app.client.keys("mixed")
        app.client.execute("HSET", keys.state, job.id.partition(":")[2], "2 0 2", key=keys.state)
        queue: Any = consumer.queue("mixed")
        queue.push({"n": 1})
        loop = queue.consume() if how == "consume" else queue.batches(2, within=0)
        taken = next(loop)
        with taken as body:
            assert body in ({"n": 1}, [{"n": 1}])
        loop.close()
        assert (queue.stats().scheduled, queue.stats().dead) == (1, 0)
        assert [one.getMessage()[:30] for one in caplog.records if "E05" in one.getMessage()] == [
            f"E05 Entry {job.id}"[:30]
        ]
        queue.purge()


@pytest.mark.row("D271")
@pytest.mark.parametrize("kind", ["message", "job"])
async def test_after_a_day_it_is_a_dead_letter(
    url: str, redis: redis_py.Redis, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that no program took for a day becomes a dead letter that says why, with its bytes kept."""
    async with Conveyor(url) as app, Conveyor(url) as producer:
        keys, queue = app.client.keys("mixed"), app.queue("mixed")
        with monkeypatch.context() as long_ago:
            long_ago.setattr(ids, "time", lambda: time() - 90_000)
            if kind == "message":
                await producer.queue("mixed").apush({})
            else:
                await producer.external_task("add", queue="mixed").aenqueue()
        if kind == "job":
            assert await queue.apull() == []
        else:
            app.task(queue="mixed")(_nothing)
            async with working(app):
                await auntil(lambda: redis.zcard(keys.dead))
        [letter] = [one async for one in queue.adead_letters()]
        assert letter.payload[:1] == b"{"
        assert letter.error.startswith("UnknownTask: ")
        assert "message, not a job" in letter.error if kind == "message" else "a job of task 'add'" in letter.error
        await queue.apurge(dead=True)


async def _nothing() -> None: ...
