"""Jobs of tasks on a queue with a maximum length: enqueue waits for room, or is refused."""

from __future__ import annotations

import asyncio
import threading

import pytest

from conveyor import Debounce, Duplicate, Unique
from conveyor.errors import ConfigurationError, JobCancelled, JobNotFound, QueueFull
from conveyor.store import inspection
from conveyor.store.operations import Settlement
from support.app_fixtures import blocking_app  # noqa: F401
from support.manual_worker import ManualWorker
from support.waiting import until, until_ended


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
        until_ended(producer)
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
        until_ended(producer)
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
                await asyncio.to_thread(lambda: [until_ended(producer) for producer in producers])
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

    def test_the_alarm_of_a_schedule_stands_in_no_way(self, app):
        """Where the instant of a schedule comes before all scheduled jobs, the first of these is dropped, and the schedule stays."""
        queue = app.queue("newest", max_length=3, full="drop-oldest")

        @app.task(name="newest.note", queue="newest")
        def note(number: int) -> None: ...

        app.schedules.put("tick", note.s(0), every="10m")
        first, *_ = [note.options(delay=f"{number + 1}h").enqueue(number) for number in range(3)]
        note.enqueue(3)
        with pytest.raises(JobNotFound):
            first.status()
        stats = queue.stats()
        assert (stats.ready, stats.scheduled, stats.dropped) == (1, 2, 1)
        assert app.client.run(inspection.audit(app.client.keys("newest"))) == []
        app.schedules.get("tick").delete()
        assert queue.purge() == 3

    @pytest.mark.parametrize("resumed", [False, True])
    @pytest.mark.parametrize("more", [1, 3, 4])
    def test_jobs_of_a_paused_task_are_dropped_first(self, app, resumed, more):
        """Jobs that were set aside for their task have waited longest: they are dropped before others, and leave no ticket behind."""
        queue = app.queue("newest", max_length=5, full="drop-oldest")

        @app.task(name="newest.held", queue="newest")
        def held(number: int) -> None: ...

        @app.task(name="newest.note", queue="newest")
        def note(number: int) -> None: ...

        app.pause_task("newest.held")
        old = [held.enqueue(number) for number in range(3)]
        worker = ManualWorker(app, "newest")
        assert worker.take(5) == []
        if resumed:
            app.resume_task("newest.held")
        new = [note.enqueue(number) for number in range(2 + more)]
        gone = [*old, *new][:more]
        for job in gone:
            with pytest.raises(JobNotFound):
                job.status()
        stats = queue.stats()
        assert (stats.ready + stats.waiting, stats.dropped) == (5, more)
        assert app.client.run(inspection.audit(app.client.keys("newest"))) == []
        app.resume_task("newest.held")
        kept = [job.id.partition(":")[2] for job in [*old, *new][more:]]
        assert worker.take(9) == kept
        for id_ in kept:
            worker.turn(0, Settlement("D", id_))
        worker.leave()


class TestNeedsNoPlace:
    """A call that stores no new job needs no place, so a full queue takes it."""

    @pytest.mark.parametrize("full", ["raise", "block"])
    def test_a_replaced_job(self, app, full):
        """The latest arguments reach a unique or debounced job of a full queue; a call that is kept or raises is answered as ever."""
        queue = app.queue("few", max_length=3, full=full)

        @app.task(name="few.replace", queue="few", unique=Unique(by=("page",), conflict="replace"))
        def replace(page: int, text: str = "") -> None: ...

        @app.task(name="few.later", queue="few", debounce=Debounce("1h", by="page"))
        def later(page: int, text: str = "") -> None: ...

        @app.task(name="few.once", queue="few", unique=Unique(by=("page",), conflict="raise"))
        def once(page: int) -> None: ...

        first, debounced, _ = replace.enqueue(1, "old"), later.enqueue(1, "old"), once.enqueue(1)
        assert (replace.enqueue(1, "new").conflict, later.enqueue(1, "new").conflict) == ("replaced", "replaced")
        assert first.info().arguments == debounced.info().arguments == {"page": 1, "text": "new"}
        assert replace.enqueue(1, "new").conflict == "kept"
        with pytest.raises(Duplicate):
            once.enqueue(1)
        with pytest.raises(QueueFull):
            (replace if full == "raise" else replace.options(room_timeout=0)).enqueue(2)
        assert queue.stats().blocked == 0
        assert queue.purge() == 3

    def test_some_of_several(self, app):
        """Of a bulk call only jobs that are new count: it is stored whole when these have room."""
        queue = app.queue("few", max_length=3)

        @app.task(name="few.keep", queue="few", unique=Unique(by=("page",)))
        def keep(page: int) -> None: ...

        app.enqueue_many([keep.s(1), keep.s(2)])
        jobs = app.enqueue_many([keep.s(1), keep.s(2), keep.s(3)])
        assert [job.duplicate for job in jobs] == [True, True, False]
        with pytest.raises(QueueFull):
            app.enqueue_many([keep.s(1), keep.s(4)])
        assert queue.purge() == 3

    def test_a_rerun_is_a_new_job(self, app):
        """A call whose job runs stores one that is to run afterwards, which needs a place; the next calls are that job, and need none."""
        queue = app.queue("few", max_length=2)

        @app.task(name="few.again", queue="few", unique=Unique(by=("page",), conflict="rerun"))
        def again(page: int, text: str = "") -> None: ...

        again.enqueue(1)
        worker = ManualWorker(app, "few")
        [first] = worker.take(1)
        again.enqueue(2)
        with pytest.raises(QueueFull):
            again.enqueue(1, "new")
        assert queue.purge() == 1
        assert [again.enqueue(1, text).conflict for text in ("new", "newer")] == ["rerun", "rerun"]
        worker.turn(0, Settlement("D", first, attributes=worker.envelopes[first].attributes))
        [second] = worker.take(1)
        worker.turn(0, Settlement("D", second, attributes=worker.envelopes[second].attributes))
        worker.leave()
