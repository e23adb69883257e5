"""Jobs of tasks on a queue with a maximum length: enqueue waits for room, or is refused."""

from __future__ import annotations

import asyncio
import threading

import pytest

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, JobCancelled, JobNotFound, QueueFull
from support.message_fixtures import until


@pytest.fixture
def app(url):
    with Conveyor(url) as app:
        yield app


def declared(app, partitions=1):
    app.queue("work", max_length=3 * partitions, full="block", partitions=partitions)

    @app.task(name="work.double", queue="work")
    async def double(number: int) -> int:
        return 2 * number

    return double


def drain(app, redis, count):
    """Run a worker inside this program until so many jobs have ended."""

    async def main():
        async with app.worker(queues={"work": 1}, concurrency=2):
            await asyncio.to_thread(until, lambda: ended(app, redis) >= count)
        await app.aclose()

    asyncio.run(main())


def ended(app, redis):
    """Return how many jobs of the queue have ended."""
    return redis.llen(app.client.keys("work").recent)


class TestEnqueue:
    def test_waits_until_a_job_has_ended(self, app, redis):
        """An enqueue to a full queue waits until a worker has finished a job, and its result arrives as always."""
        double = declared(app)
        app.enqueue_many([double.s(1), double.s(2), double.s(3)])
        jobs = []
        producer = threading.Thread(daemon=True, target=lambda: jobs.append(double.enqueue(4)))
        producer.start()
        until(lambda: app.queue("work", max_length=3, full="block").stats().blocked == 1)
        drain(app, redis, 4)
        producer.join()
        assert jobs[0].result(timeout="20s") == 8

    def test_many_more_than_the_queue_takes(self, app, redis):
        """enqueue_many of more than max_length streams through the queue, in parts, and every job gets its handle."""
        double = declared(app)
        jobs = []
        producer = threading.Thread(
            daemon=True, target=lambda: jobs.extend(app.enqueue_many(double.s(number) for number in range(20)))
        )
        producer.start()
        drain(app, redis, 20)
        producer.join()
        assert [job.result(timeout="20s") for job in jobs] == [2 * number for number in range(20)]

    def test_the_room_timeout(self, app, redis):
        """options(room_timeout=) ends in QueueFull; where no queue waits it is refused before anything is stored."""
        double = declared(app)
        app.enqueue_many([double.s(1), double.s(2), double.s(3)])
        with pytest.raises(QueueFull, match="waited"):
            double.options(room_timeout="100ms").enqueue(4)
        with pytest.raises(ConfigurationError, match="does not wait"):
            double.options(room_timeout="1s", queue="other").enqueue(4)
        work = app.queue("work", max_length=3, full="block")
        assert (work.purge(), len(app.queue("other"))) == (3, 0)

    def test_a_job_does_not_wait_for_its_own_queue(self, app, redis):
        """A job that enqueues to its own full queue is refused at once, on the loop and on a thread."""
        app.queue("work", max_length=2, full="block")
        refused, over = [], threading.Event()

        @app.task(name="work.leaf", queue="work")
        async def leaf() -> None:
            await asyncio.to_thread(over.wait, 60)  # else it may make room before the second is enqueued

        @app.task(name="work.loop", queue="work", retry=1)
        async def on_loop() -> None:
            try:
                await leaf.aenqueue()
                await leaf.aenqueue()
            except QueueFull as error:
                refused.append(str(error))
            finally:
                over.set()

        @app.task(name="work.thread", queue="work", retry=1)
        def on_thread() -> None:
            try:
                leaf.enqueue()
                leaf.enqueue()
            except QueueFull as error:
                refused.append(str(error))
            finally:
                over.set()

        for task in (on_loop, on_thread):
            before = ended(app, redis)
            over.clear()
            task.enqueue()
            drain(app, redis, before + 2)
        assert len(refused) == 2
        assert all("handles a job or a message of queue 'work'" in text for text in refused)

    def test_a_job_that_handles_a_message_of_another_queue(self, app, redis):
        """A job that enqueues to its own full queue is refused at once also while it handles a message of another one."""
        app.queue("work", max_length=1, full="block")
        app.queue("mail").push("x")
        refused = []

        @app.task(name="work.forward", queue="work", retry=1)
        def forward() -> None:
            with app.queue("mail").pull()[0]:
                try:
                    forward.enqueue()
                except QueueFull as error:
                    refused.append(str(error))

        forward.enqueue()
        drain(app, redis, 1)
        assert "handles a job or a message of queue 'work'" in refused[0]

    def test_with_partitions(self, app, redis):
        """max_length is split, and each enqueue waits for room in its own partition."""
        double = declared(app, partitions=2)
        work = app.queue("work", max_length=6, full="block", partitions=2)
        jobs = [double.enqueue(number) for number in range(6)]
        with pytest.raises(QueueFull, match="its part"):
            double.options(room_timeout="100ms").enqueue(9)
        more = []
        producers = [threading.Thread(daemon=True, target=lambda: more.append(double.enqueue(7))) for _ in range(2)]
        for producer in producers:
            producer.start()
        until(lambda: work.stats().blocked == 2)

        async def main():
            async with app.worker(queues={"work": 1}, concurrency=2):
                for job in jobs:
                    await job.aresult(timeout="20s")
                await asyncio.to_thread(lambda: [producer.join() for producer in producers])
                for job in more:
                    assert await job.aresult(timeout="20s") == 14
            await app.aclose()

        asyncio.run(main())


class TestDropOldest:
    def test_a_waiting_result_ends(self, app):
        """A caller that waits for the result of a job that is dropped learns that at once; a unique task is refused."""
        app.queue("newest", max_length=2, full="drop-oldest")

        @app.task(name="newest.double", queue="newest")
        async def double(number: int) -> int:
            return 2 * number

        first = double.enqueue(1)
        double.enqueue(2)
        said = []

        def wait():
            try:
                first.result(timeout="60s")
            except JobCancelled as error:
                said.append(str(error))

        waiting = threading.Thread(daemon=True, target=wait)
        waiting.start()
        until(lambda: app.client.execute("HLEN", app.client.keys("newest").waiters))
        double.enqueue(3)
        waiting.join(60)
        assert "was dropped for a newer one" in said[0]
        with pytest.raises(JobNotFound):
            first.status()
        with pytest.raises(ConfigurationError, match="drops the oldest"):
            double.options(unique="k").enqueue(4)
        newest = app.queue("newest", max_length=2, full="drop-oldest")
        assert (newest.stats().dropped, newest.purge()) == (1, 2)
