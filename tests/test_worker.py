"""The worker in one process: what becomes of jobs, in order, in time, and at a stop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from conveyor.app import Conveyor
from conveyor.context import Context, current
from conveyor.errors import JobCancelled, JobFailed, Snooze
from conveyor.outcome import Retry
from conveyor.store import inspection, operations
from conveyor.worker.worker import Worker
from working import audit, counts, drain, until, working


@pytest.fixture
async def app(url: str) -> Any:
    """An app on the emptied server."""
    app = Conveyor(url)
    yield app
    await app.aclose()


async def test_jobs_run_in_the_order_they_were_enqueued(app: Conveyor) -> None:
    """One worker with one slot starts the jobs of a queue in the order they were accepted."""
    seen: list[int] = []

    @app.task
    async def note(n: int) -> None:
        seen.append(n)

    await app.aenqueue_many(note.s(n) for n in range(1500))
    await drain(app, concurrency=1)

    assert seen == list(range(1500))
    assert await audit(app) == []


async def test_functions_run_on_threads_and_coroutines_on_the_loop(app: Conveyor) -> None:
    """A plain function runs off the event loop's thread, an async one on it."""
    loop_thread = threading.get_ident()

    @app.task
    def plain() -> bool:
        return threading.get_ident() != loop_thread

    @app.task
    async def coroutine() -> bool:
        return threading.get_ident() == loop_thread

    jobs = [await plain.aenqueue(), await coroutine.aenqueue()]
    await drain(app)

    assert [await job.aresult(timeout=5) for job in jobs] == [True, True]


async def test_priorities_go_first(app: Conveyor) -> None:
    """Of jobs that wait, the one with the higher priority starts first."""
    seen: list[int] = []

    @app.task
    async def note(n: int) -> None:
        seen.append(n)

    for n in (0, 9, 5, 1):
        await note.options(priority=n).aenqueue(n)
    await drain(app, concurrency=1)

    assert seen == [9, 5, 1, 0]


async def test_a_failure_is_retried_and_every_error_is_kept(app: Conveyor) -> None:
    """A job that fails twice and then succeeds has run three times, with rising attempt numbers."""
    attempts: list[int] = []

    @app.task(retry=Retry(attempts=3, backoff="10ms", jitter=False))
    async def flaky(context: Context = current()) -> str:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise ValueError(f"no {context.attempt}")
        return "ok"

    job = await flaky.aenqueue()
    await drain(app)

    assert attempts == [1, 2, 3]
    assert await job.aresult(timeout=5) == "ok"


@pytest.mark.leaves_keys("a dead letter stays")
async def test_the_last_failure_makes_a_dead_letter(app: Conveyor) -> None:
    """When the attempts are used up the job is dead, and its result raises the last error with its traceback."""

    @app.task(retry=Retry(attempts=2, backoff="10ms"))
    async def hopeless() -> int:
        raise KeyError("gone")

    job = await hopeless.aenqueue()
    await drain(app)

    assert await job.astatus() == "dead"
    with pytest.raises(JobFailed) as caught:
        await job.aresult(timeout=5)
    assert caught.value.type == "KeyError"
    assert "hopeless" in caught.value.traceback
    [row] = await app.backend.arun(inspection.page(app.keys("default"), "dead", 0, 10))
    assert [error.attempt for error in row.state.failures_list()] == [1, 2]


@pytest.mark.leaves_keys("a dead letter stays")
async def test_give_up_ends_at_once(app: Conveyor) -> None:
    """An exception of `give_up` is never retried, nor is one that `on` does not name."""
    runs: list[str] = []

    @app.task(retry=Retry(give_up=(ValueError,)))
    async def first() -> None:
        runs.append("first")
        raise ValueError

    @app.task(retry=Retry(on=(OSError,)))
    async def second() -> None:
        runs.append("second")
        raise KeyError

    await first.aenqueue()
    await second.aenqueue()
    await drain(app)

    assert sorted(runs) == ["first", "second"]
    assert (await counts(app)).dead == 2


async def test_a_snooze_uses_no_attempt(app: Conveyor) -> None:
    """A job that snoozes runs again later, with a higher attempt number and its whole budget."""
    seen: list[int] = []

    @app.task(retry=1)
    async def patient(context: Context = current()) -> None:
        seen.append(context.attempt)
        if context.attempt < 4:
            raise Snooze("5ms")

    await patient.aenqueue()
    await drain(app)

    assert seen == [1, 2, 3, 4]
    assert (await counts(app)).dead == 0


async def test_a_delayed_job_starts_when_it_is_due(app: Conveyor) -> None:
    """A delayed job starts soon after its instant and not before, on a worker that waits without polling."""

    @app.task
    async def when() -> float:
        return time.monotonic()

    async with working(app):
        start = time.monotonic()
        job = await when.options(delay="300ms").aenqueue()
        assert await job.astatus() == "scheduled"
        ran = await job.aresult(timeout=5)

    assert 0.29 <= ran - start < 0.9


async def test_an_expired_job_never_starts(app: Conveyor) -> None:
    """A job that has not started when it expires is cancelled."""
    ran: list[int] = []

    @app.task
    async def late() -> None:
        ran.append(1)

    job = await late.options(expires="20ms").aenqueue()
    await asyncio.sleep(0.05)  # the job must grow old: time itself is the condition
    await drain(app)

    assert ran == []
    with pytest.raises(JobCancelled):
        await job.aresult(timeout=5)


@pytest.mark.leaves_keys("dead letters stay")
async def test_a_time_limit_stops_a_coroutine(app: Conveyor) -> None:
    """A coroutine is cancelled at its time limit; what it cleans up runs, and the attempt failed with TimeoutError."""
    cleaned: list[int] = []

    @app.task(timeout="50ms", retry=1)
    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(1)

    @app.task(timeout="50ms", retry=1)
    async def deaf() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                pass

    jobs = [await endless.aenqueue(), await deaf.aenqueue()]
    await drain(app)

    assert cleaned == [1]
    for job in jobs:
        with pytest.raises(JobFailed) as caught:
            await job.aresult(timeout=5)
        assert caught.value.type == "TimeoutError"


async def test_an_extended_time_limit_holds(app: Conveyor) -> None:
    """A job may move its own time limit from inside."""

    @app.task(timeout="80ms", retry=1)
    async def slow(context: Context = current()) -> str:
        context.extend("10s")
        await asyncio.sleep(0.2)
        return "done"

    job = await slow.aenqueue()
    await drain(app)

    assert await job.aresult(timeout=5) == "done"


async def test_timeouts_inside_a_job_are_its_own(app: Conveyor) -> None:
    """`asyncio.timeout` and task groups inside a job see the right current task, before and after it suspends."""

    @app.task
    async def careful(n: int) -> str:
        try:
            async with asyncio.timeout(0.02):
                await asyncio.sleep(5)
        except TimeoutError:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0.001))
            return "own"
        return "none"

    jobs = [await careful.aenqueue(n) for n in range(20)]
    await drain(app, concurrency=5)

    assert [await job.aresult(timeout=5) for job in jobs] == ["own"] * 20


async def test_cancelling_a_waiting_job_keeps_it_from_starting(app: Conveyor) -> None:
    """After `cancel()` a job that had not started never starts."""
    ran: list[int] = []

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    jobs = [await note.aenqueue(n) for n in range(3)]
    later = await note.options(delay="1h").aenqueue(9)
    assert await jobs[1].acancel()
    assert await later.acancel()
    await drain(app)

    assert ran == [0, 2]
    assert await jobs[1].astatus() == "cancelled"
    assert await later.astatus() == "cancelled"
    assert await audit(app) == []


async def test_cancelling_a_running_job_stops_it(app: Conveyor) -> None:
    """A running coroutine is cancelled within a second, and its job is cancelled, not failed."""
    started = asyncio.Event()

    @app.task
    async def endless() -> None:
        started.set()
        await asyncio.sleep(60)

    async with working(app):
        job = await endless.aenqueue()
        await asyncio.wait_for(started.wait(), 5)
        begun = time.monotonic()
        assert await job.acancel()
        with pytest.raises(JobCancelled):
            await job.aresult(timeout=5)
        assert time.monotonic() - begun < 1.5
    assert await job.astatus() == "cancelled"


async def test_a_thread_is_told_that_it_is_cancelled(app: Conveyor) -> None:
    """A function on a thread sees the cancellation in its context."""
    started = threading.Event()

    @app.task
    def patient(context: Context = current()) -> None:
        started.set()
        while not context.cancelled:
            time.sleep(0.005)
        context.check()

    async with working(app):
        job = await patient.aenqueue()
        await until(started.is_set)
        assert await job.acancel()
        with pytest.raises(JobCancelled):
            await job.aresult(timeout=5)


async def test_a_stop_hands_back_what_has_not_started(app: Conveyor) -> None:
    """A stopping worker finishes what runs and returns the rest in order, without using an attempt."""
    gate = asyncio.Event()
    seen: list[int] = []

    @app.task
    async def wait(n: int) -> None:
        seen.append(n)
        await gate.wait()

    await app.aenqueue_many(wait.s(n) for n in range(10))
    worker = Worker(app, concurrency=2, grace=10)
    running = asyncio.create_task(worker.run())
    await until(lambda: len(seen) == 2)
    worker.stop()
    gate.set()
    await asyncio.wait_for(running, 10)

    assert seen == [0, 1]
    found = await counts(app)
    assert (found.ready, found.leased, found.workers) == (8, 0, 0)
    await drain(app, concurrency=1)
    assert seen == list(range(10))


async def test_what_outlives_the_grace_is_handed_back_free(app: Conveyor) -> None:
    """A job that still runs at the end of the grace goes back: its start is seen, its budget is untouched."""

    @app.task(retry=1)
    async def long(context: Context = current()) -> int:
        if context.attempt == 1:
            await asyncio.sleep(60)
        return context.attempt

    job = await long.aenqueue()
    worker = Worker(app, grace=0.05)
    running = asyncio.create_task(worker.run())
    await until(lambda: worker.consumers and worker.executor.slots.running)
    worker.stop()
    await asyncio.wait_for(running, 10)
    assert (await counts(app)).ready == 1
    await drain(app)

    assert await job.aresult(timeout=5) == 2


async def test_a_reaped_worker_is_refused_and_goes_on(app: Conveyor) -> None:
    """A worker that lost its lease abandons its jobs: one outcome per job, and it works on under a new identity."""
    runs: list[int] = []
    gate = asyncio.Event()

    @app.task
    async def twice(context: Context = current()) -> int:
        runs.append(context.attempt)
        await gate.wait()
        return context.attempt

    async with working(app) as worker:
        job = await twice.aenqueue()
        await until(lambda: runs == [1])
        old = worker.consumers[0].identity
        assert await app.backend.arun(operations.reap(app.keys("default"), old)) == 1
        worker.consumers[0].woken()
        await until(lambda: runs == [1, 2])
        gate.set()
        assert await job.aresult(timeout=5) == 2
        assert worker.consumers[0].identity != old
    assert await audit(app) == []


@pytest.mark.leaves_keys("a poison job is a dead letter")
async def test_poison_stops_after_max_crashes_and_spares_its_neighbours(app: Conveyor) -> None:
    """A job whose worker crashes each time it runs is started three times; jobs leased beside it all succeed."""
    poison_runs: list[int] = []
    done: list[int] = []

    @app.task
    async def poison() -> None:
        poison_runs.append(1)
        crash.set()
        await asyncio.sleep(60)

    @app.task
    async def good(n: int) -> None:
        done.append(n)

    crash = asyncio.Event()
    await poison.aenqueue()
    await app.aenqueue_many(good.s(n) for n in range(20))
    for _ in range(3):
        crash.clear()
        worker = Worker(app, concurrency=1)
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(crash.wait(), 5)
        worker.fail(RuntimeError("crash"))  # ends without settling anything, as a killed process would
        with pytest.raises(RuntimeError, match="crash"):
            await running
        await app.backend.arun(operations.reap(app.keys("default"), worker.consumers[0].identity))
    await drain(app)

    assert len(poison_runs) == 3
    assert sorted(done) == list(range(20))
    [row] = await app.backend.arun(inspection.page(app.keys("default"), "dead", 0, 10))
    assert row.envelope.task.endswith("poison")
    assert row.state.failures_list()[-1].type == "crashed"


async def test_a_job_of_an_unknown_task_waits_for_a_newer_worker(url: str, app: Conveyor) -> None:
    """A worker that does not know a task puts its job off without using an attempt."""
    newer = Conveyor(url)

    @newer.task(name="new.task", retry=1)
    async def task(context: Context = current()) -> int:
        return context.attempt

    @app.task
    async def old() -> None: ...

    job = await task.aenqueue()
    await old.aenqueue()
    async with working(app):
        await until(lambda: True)
        while (await counts(app)).scheduled != 1:
            await asyncio.sleep(0.01)
    await app.backend.arun(operations.promote(app.keys("default"), job.id.rpartition(":")[2]))
    await drain(newer)

    assert await job.aresult(timeout=5) == 1
    await newer.aclose()


async def test_an_early_ack_runs_at_most_once(app: Conveyor) -> None:
    """With `ack="early"` the job is gone from Redis before it starts."""
    seen: list[int] = []

    @app.task(ack="early", retry=5)
    async def once() -> None:
        found = await counts(app)
        seen.append(found.leased + found.ready + found.scheduled)
        raise ValueError

    await once.aenqueue()
    await drain(app)

    assert seen == [0]
    assert (await counts(app)).dead == 0


async def test_weights_share_a_worker_between_queues(app: Conveyor) -> None:
    """With weights 3 and 1 and work in both queues, three of four starts belong to the first."""
    seen: list[str] = []

    @app.task(queue="a")
    async def in_a() -> None:
        seen.append("a")
        await asyncio.sleep(0.001)

    @app.task(queue="b")
    async def in_b() -> None:
        seen.append("b")
        await asyncio.sleep(0.001)

    await app.aenqueue_many(in_a.s() for _ in range(300))
    await app.aenqueue_many(in_b.s() for _ in range(300))
    await drain(app, queues={"a": 3, "b": 1}, concurrency=1)

    assert 0.6 < seen[:300].count("a") / 300 < 0.9
    assert len(seen) == 600


async def test_undecodable_arguments_make_a_dead_letter_with_their_bytes(app: Conveyor, redis: Any) -> None:
    """Arguments that no longer fit the task are not retried for ever, and their bytes are kept."""

    @app.task(name="typed", retry=Retry(attempts=1))
    async def typed(n: int) -> None: ...

    job = await typed.aenqueue(1)
    key = app.keys("default").jobs
    [id_] = redis.hkeys(key)
    redis.hset(key, id_, b'\ntyped\n{"n":"x"}')
    await drain(app)

    assert await job.astatus() == "dead"
    assert redis.hget(key, id_) == b'\ntyped\n{"n":"x"}'
    with pytest.raises(JobFailed, match="Expected `int`|Expected int"):
        await job.aresult(timeout=5)
    redis.delete(key, app.keys("default").dead, app.keys("default").state)


async def test_a_result_that_cannot_be_stored_is_a_visible_failure(app: Conveyor, redis: Any) -> None:
    """A task whose result JSON cannot carry ends as a dead letter, once."""
    runs: list[int] = []

    @app.task
    async def odd() -> Any:
        runs.append(1)
        return object()

    job = await odd.aenqueue()
    await drain(app)

    assert runs == [1]
    assert await job.astatus() == "dead"
    redis.delete(app.keys("default").jobs, app.keys("default").dead, app.keys("default").state)


@pytest.mark.leaves_keys("dead letters stay")
async def test_hostile_exceptions_do_not_hurt_the_worker(app: Conveyor) -> None:
    """Exceptions that cannot be shown, endless ones, and ones that are no Exception are recorded, and work goes on."""

    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    errors: list[Any] = [
        Hostile(),
        ValueError("x" * 1_000_000),
        SystemExit(3),
        asyncio.CancelledError(),
        GeneratorExit(),
    ]

    @app.task(retry=1)
    async def hostile(n: int) -> None:
        raise errors[n]

    @app.task(retry=1)
    def in_thread(n: int) -> None:
        raise errors[n]

    @app.task
    async def fine() -> str:
        return "fine"

    for n in range(len(errors)):
        await hostile.aenqueue(n)
        await in_thread.aenqueue(n)
    job = await fine.aenqueue()
    await drain(app)

    assert await job.aresult(timeout=5) == "fine"
    assert (await counts(app)).dead == 2 * len(errors)


async def test_an_idle_worker_is_woken_at_once(app: Conveyor) -> None:
    """A job pushed to an idle worker starts without waiting for any clock."""

    @app.task
    async def when() -> float:
        return time.monotonic()

    async with working(app) as worker:
        for _ in range(5):
            await until(lambda: worker.listener.blocked and not worker.consumers[0].busy)
            start = time.monotonic()
            job = await when.aenqueue()
            assert await job.aresult(timeout=5) - start < 0.5


async def test_an_idle_worker_sends_next_to_nothing(app: Conveyor, redis: Any) -> None:
    """An idle worker blocks: in two seconds it sends at most two commands."""

    @app.task
    async def never() -> None: ...

    async with working(app) as worker:
        await until(lambda: worker.listener.blocked)
        await asyncio.sleep(0.1)  # let the first turns pass
        before = redis.info("stats")["total_commands_processed"]
        await asyncio.sleep(2)  # the law is about time that passes
        after = redis.info("stats")["total_commands_processed"]

    assert after - before - 1 <= 2


async def test_commands_per_job_are_few(app: Conveyor, redis: Any) -> None:
    """Draining 5,000 plain jobs takes at most 0.05 commands each."""

    @app.task
    async def noop() -> None: ...

    await app.aenqueue_many(noop.s() for _ in range(5000))
    before = {name: row["calls"] for name, row in redis.info("commandstats").items()}
    await drain(app)
    after = {name: row["calls"] for name, row in redis.info("commandstats").items()}

    sent = sum(
        after.get(name, 0) - before.get(name, 0) for name in ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_blpop")
    )
    assert sent <= 0.05 * 5000
