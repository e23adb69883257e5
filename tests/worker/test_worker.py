"""The worker in one process: outcomes of jobs, their order, time limits, and a stop."""

from __future__ import annotations

import asyncio
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from conveyor.errors import JobCancelled, JobFailed, RateLimited, RetryIn, Snooze
from conveyor.events import Event
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.messaging.retry import Retry
from conveyor.store import inspection
from conveyor.worker.leasing.capacity import Capacity
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, counts, drain, working
from support.time_limits import PATIENCE
from support.waiting import auntil


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

    assert [await job.aresult(timeout=60) for job in jobs] == [True, True]


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
    assert await job.aresult(timeout=60) == "ok"


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
        await job.aresult(timeout=60)
    assert caught.value.type == "KeyError"
    assert "hopeless" in caught.value.traceback
    [row] = (await app.client.arun(inspection.list_jobs(app.client.keys("default"), "dead", 0, 10))).rows
    assert [error.attempt for error in row.state.failures_list()] == [1, 2]


@pytest.mark.leaves_keys("dead letters stay")
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


@pytest.mark.leaves_keys("a dead letter stays")
@pytest.mark.parametrize("wait", [Snooze("soon"), Snooze(cast("Any", None)), RetryIn("soon"), RateLimited("soon")])
async def test_a_wait_that_is_no_duration_is_a_failure_like_any_other(app: Conveyor, wait: Exception) -> None:
    """A job that raises it fails, which its record shows; the worker goes on."""

    @app.task(retry=1)
    async def wrong() -> None:
        raise wait

    @app.task
    async def right() -> int:
        return 1

    jobs = await wrong.aenqueue(), await right.aenqueue()
    await drain(app)

    assert await jobs[1].aresult(timeout=60) == 1
    with pytest.raises(JobFailed) as failed:
        await jobs[0].aresult(timeout=60)
    assert failed.value.type.endswith(type(wait).__name__)
    assert (await counts(app)).dead == 1


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_an_error_shows_the_frames_of_the_program(
    app: Conveyor, run_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The stored traceback and the log begin at the task's own frame: nothing of the worker is shown."""

    def fail() -> None:
        raise ValueError("no")

    async def fail_awaited() -> None:
        fail()

    task = app.task(retry=1)(fail_awaited if run_in == "loop" else fail)
    job = await task.aenqueue()
    await drain(app)

    with pytest.raises(JobFailed) as caught:
        await job.aresult()
    files = re.findall(r'File "([^"]+)"', caught.value.traceback)
    assert set(files) == {__file__}
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None
    assert record.exc_info[2] is not None
    assert record.exc_info[2].tb_frame.f_code.co_filename == __file__
    await app.queue("default").apurge(dead=True)


@pytest.mark.parametrize("delay", ["5ms", "no duration"])
async def test_a_retry_in_uses_an_attempt(app: Conveyor, delay: str) -> None:
    """A job that raises RetryIn runs again after that time, whatever `give_up` says, until its budget is spent."""
    seen: list[int] = []
    policy = Retry(attempts=3, backoff="1h", give_up=(RetryIn,)) if delay == "5ms" else Retry(attempts=3, backoff="1ms")

    @app.task(retry=policy)
    async def refused(context: Context = current()) -> None:
        seen.append(context.attempt)
        raise RetryIn(delay)

    job = await refused.aenqueue()
    await drain(app)

    assert seen == [1, 2, 3]
    with pytest.raises(JobFailed, match="RetryIn"):
        await job.aresult()
    await app.queue("default").apurge(dead=True)


async def test_a_retry_in_is_logged_without_a_traceback(app: Conveyor, caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of a RetryIn is logged where another exception caused it, and where the job is dead."""

    @app.task(retry=3)
    async def wait(context: Context = current()) -> None:
        if context.attempt == 2:
            try:
                raise ConnectionError("away")
            except ConnectionError:
                raise RetryIn("1ms")  # noqa: B904
        raise RetryIn("2ms")

    await wait.aenqueue()
    await drain(app)

    records = [record for record in caplog.records if "RetryIn" in record.getMessage()]
    assert [(record.levelname, bool(record.exc_info)) for record in records] == [
        ("WARNING", False), ("WARNING", True), ("ERROR", True),
    ]  # fmt: skip
    await app.queue("default").apurge(dead=True)


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_listeners_hear_of_starts_and_ends(app: Conveyor, run_in: str) -> None:
    """Each attempt is told of at its start and at its end, with its number; the worker of its own."""
    seen: list[tuple[str, Any]] = []
    app.on(Event, lambda event: seen.append((event.name, getattr(event, "attempt", None))))

    def once() -> None:
        if current().attempt == 1:
            raise ValueError("no")

    async def aonce() -> None:
        once()

    await app.task(retry=Retry(backoff="1ms"), name="once")(aonce if run_in == "loop" else once).aenqueue()
    await drain(app)

    assert seen == [
        ("worker-started", None), ("started", 1), ("retried", 1), ("started", 2), ("done", 2), ("worker-stopped", None),
    ]  # fmt: skip


@pytest.mark.usefixtures("only_when_woken")
async def test_a_delayed_job_starts_when_it_is_due(app: Conveyor) -> None:
    """A delayed job starts at its instant and not before, on a worker that waits without polling."""

    @app.task
    async def when() -> float:
        return time.monotonic()

    async with working(app):
        start = time.monotonic()
        job, later = await when.options(delay="300ms").aenqueue(), await when.options(delay="1h").aenqueue()
        ran = await job.aresult(timeout=PATIENCE)
        assert await later.astatus() == "scheduled"

    assert ran - start >= 0.29
    assert await later.acancel()


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
        await job.aresult(timeout=60)


@pytest.mark.row("A9")
@pytest.mark.leaves_keys("dead letters stay")
async def test_a_time_limit_stops_a_coroutine(app: Conveyor) -> None:
    """A coroutine is cancelled at its time limit; its cleanup runs, and the attempt fails with TimeoutError."""
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
            await job.aresult(timeout=60)
        assert caught.value.type == "TimeoutError"


@pytest.mark.row("A111")
@pytest.mark.leaves_keys("dead letters stay")
@pytest.mark.parametrize("middleware", [False, True])
async def test_a_job_that_cancels_itself_fails(app: Conveyor, middleware: bool) -> None:
    """A coroutine that its own code cancels ends as failed; neither the jobs beside it nor those after it notice."""
    if middleware:

        @app.middleware
        async def pass_on(context: Context, call_next: Any) -> Any:
            return await call_next()

    @app.task(retry=1)
    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("own time limit")
        await asyncio.sleep(60)

    @app.task(retry=1)
    async def limits_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel)
        await asyncio.sleep(60)

    @app.task(retry=1)
    async def asks_and_returns() -> str:
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(0)
        task.cancel()
        return "done"

    @app.task(retry=1)
    async def sleeps(n: int) -> int:
        await asyncio.sleep(0.001)
        return n

    failing, others, asking = [], [], []
    for n in range(30):
        failing += [await cancels_itself.aenqueue(), await limits_itself.aenqueue()]
        asking.append(await asks_and_returns.aenqueue())
        others.append(await sleeps.aenqueue(n))
    worker = await drain(app, concurrency=3)

    for job in failing:
        with pytest.raises(JobFailed, match="cancelled itself"):
            await job.aresult(timeout=60)
    assert [await job.aresult(timeout=60) for job in asking] == ["done"] * 30
    assert [await job.aresult(timeout=60) for job in others] == list(range(30))
    assert worker.executor.running == 0


async def test_an_extended_time_limit_holds(app: Conveyor) -> None:
    """A job may move its own time limit from inside."""

    @app.task(timeout="80ms", retry=1)
    async def slow(context: Context = current()) -> str:
        context.extend("10s")
        await asyncio.sleep(0.2)
        return "done"

    job = await slow.aenqueue()
    await drain(app)

    assert await job.aresult(timeout=60) == "done"


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

    assert [await job.aresult(timeout=60) for job in jobs] == ["own"] * 20


@pytest.mark.parametrize("ahead", [0, 2, 3, None])
async def test_weights_share_a_worker_between_queues(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch, ahead: int | None
) -> None:
    """With weights 3 and 1 and work in both queues, three of four starts belong to the first, however fast the jobs are."""
    seen: list[str] = []

    @app.task(queue="a")
    async def in_a() -> None:
        seen.append("a")
        await asyncio.sleep(0.001)

    @app.task(queue="b")
    async def in_b() -> None:
        seen.append("b")
        await asyncio.sleep(0.001)

    if ahead is not None:  # by the rate of ends: 20 a second give 1
        monkeypatch.setattr(Capacity, "ahead", lambda *_: ahead)
    await app.aenqueue_many(in_a.s() for _ in range(100))
    await app.aenqueue_many(in_b.s() for _ in range(100))
    await drain(app, queues={"a": 3, "b": 1}, concurrency=1)

    assert 0.6 < seen[:100].count("a") / 100 < 0.9
    assert len(seen) == 200


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


async def test_functions_keep_to_their_threads_inside_middlewares(app: Conveyor) -> None:
    """With a middleware too, at most `threads` functions run at once, and their results and errors pass through it."""
    running, most, seen = [0], [0], []
    lock = threading.Lock()

    @app.middleware
    async def watch(context: Context, call_next: Any) -> Any:
        result = await call_next()
        seen.append(result)
        return result

    @app.task(retry=Retry(attempts=2, backoff="5ms"))
    def work(n: int, context: Context = current()) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1
        if n == 3 and context.attempt == 1:
            raise StopIteration
        return n

    jobs = [await work.aenqueue(n) for n in range(12)]
    await drain(app, threads=2)

    assert [await job.aresult(timeout=60) for job in jobs] == list(range(12))
    assert sorted(seen) == list(range(12))
    assert most[0] <= 2


@pytest.mark.row("A9")
async def test_an_embedded_worker_outlives_a_blocked_thread(app: Conveyor) -> None:
    """A function that outlives its time limit keeps its lease; its attempt ends, failed, when the thread does."""
    release = threading.Event()
    seen: list[int] = []
    told: list[bool] = []

    @app.task(timeout="30ms", retry=Retry(attempts=2, backoff="5ms"))
    def stubborn(context: Context = current()) -> str:
        seen.append(context.attempt)
        while context.attempt == 1 and not context.cancelled:
            release.wait(0.005)
        told.append(context.cancelled)
        if context.attempt == 1:
            release.wait(10)
        return "done"

    async with working(app, threads=2):
        job = await stubborn.aenqueue()
        await auntil(lambda: told == [True])
        assert (await counts(app)).leased == 1
        release.set()
        assert await job.aresult(timeout=60) == "done"
    assert seen == [1, 2]


@pytest.mark.parametrize("keep", [0, "10m"])
async def test_a_job_whose_function_has_not_run_is_never_done(app: Conveyor, keep: float | str) -> None:
    """A function that returns a coroutine or a generator leaves a dead letter that says so, also where no result is stored."""
    ran: list[int] = []

    async def ring(n: int) -> None:
        ran.append(n)

    def each(n: int) -> Iterator[int]:
        ran.append(n)
        yield n

    def around(function: Callable[[int], Any]) -> Callable[[int], Any]:
        @functools.wraps(function)
        def call(n: int) -> Any:
            return function(n)

        return call

    @app.batch_task(size=2, within="10ms", name="batched", keep_result=keep)
    def batched(items: list[int]) -> None:
        return ring(items[0])  # type: ignore[return-value]  # a coroutine, by mistake

    @app.task(name="forgot", keep_result=keep)
    async def forgot(n: int) -> None:
        return ring(n)  # type: ignore[return-value]  # without an await

    tasks = [app.task(name=one.__name__, keep_result=keep)(around(one)) for one in (ring, each)]
    jobs = [await task.aenqueue(1) for task in (*tasks, batched, forgot)]
    await drain(app)

    assert ran == []
    assert [await job.astatus() for job in jobs] == ["dead"] * 4
    for job, what in zip(jobs, ("coroutine", "generator", "coroutine", "coroutine"), strict=True):
        with pytest.raises(JobFailed, match=f"The function returned a {what}"):
            await job.aresult()
    await app.queue("default").apurge(dead=True)
