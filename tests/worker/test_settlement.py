"""The worker in one process: jobs that are cancelled, handed back, lost, or bad."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import threading
import time
from typing import Any

import pytest
import redis as redis_py

from conveyor.admin.admin import Admin
from conveyor.errors import JobCancelled, JobFailed, JobNotFound, ResultExpired
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.jobs.details import JobDetails
from conveyor.messaging.retry import Retry
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.worker.leasing.capacity import Capacity
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.worker import Worker
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, counts, drain, until_counts, working
from support.time_limits import PATIENCE
from support.waiting import auntil


@pytest.mark.row("I18")
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


@pytest.mark.usefixtures("only_when_woken")
async def test_cancelling_a_running_job_stops_it(app: Conveyor, caplog: pytest.LogCaptureFixture) -> None:
    """A running coroutine is cancelled without waiting for any clock: its job is cancelled, and log and record say where it ran."""
    caplog.set_level(logging.INFO, "conveyor.worker")
    started = asyncio.Event()

    @app.task
    async def endless() -> None:
        started.set()
        await asyncio.sleep(600)

    async with working(app):
        job = await endless.aenqueue()
        await asyncio.wait_for(started.wait(), 60)
        assert await job.acancel()
        with (
            caplog.at_level(logging.INFO, "conveyor.worker"),
            pytest.raises(JobCancelled, match="was cancelled: it had run for "),
        ):
            await job.aresult(timeout=PATIENCE)
    assert await job.astatus() == "cancelled"
    reason = (await asyncio.to_thread(Admin(app.client).job, job.id)).reason
    assert re.fullmatch(rf"it had run for .+ on .+:{os.getpid()}", reason)
    assert f"test_settlement.endless {job.id} attempt 1 cancelled: {reason}" in caplog.text


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
        await auntil(started.is_set)
        assert await job.acancel()
        with pytest.raises(JobCancelled):
            await job.aresult(timeout=60)


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
    await auntil(lambda: len(seen) == 2)
    worker.stop()
    gate.set()
    await asyncio.wait_for(running, 60)

    assert seen == [0, 1]
    found = await counts(app)
    assert (found.ready, found.leased, found.workers) == (8, 0, 0)
    await drain(app, concurrency=1)
    assert seen == list(range(10))


@pytest.mark.row("A10")
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
    await auntil(lambda: worker.consumers and worker.executor.coroutines.running)
    worker.stop()
    await asyncio.wait_for(running, 60)
    assert (await counts(app)).ready == 1
    await drain(app)

    assert await job.aresult(timeout=60) == 2


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
        await auntil(lambda: runs == [1])
        old = worker.consumers[0].identity
        assert await app.client.arun(operations.reap(app.client.keys("default"), old)) == 1
        worker.consumers[0].on_token()
        await auntil(lambda: runs == [1, 2])
        gate.set()
        assert await job.aresult(timeout=60) == 2
        assert worker.consumers[0].identity != old
    assert await audit(app) == []


@pytest.mark.row("A8")
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
        await asyncio.wait_for(crash.wait(), 60)
        worker.fail(RuntimeError("crash"))  # ends without settling anything, as a killed process would
        with pytest.raises(RuntimeError, match="crash"):
            await asyncio.wait_for(running, 60)
        await app.client.arun(operations.reap(app.client.keys("default"), worker.consumers[0].identity))
    await drain(app)

    assert len(poison_runs) == 3
    assert sorted(done) == list(range(20))
    [row] = (await app.client.arun(inspection.list_jobs(app.client.keys("default"), "dead", 0, 10))).rows
    assert row.envelope.task.endswith("poison")
    assert row.state.failures_list()[-1].type == "crashed"


@pytest.mark.row("A8")
async def test_suspects_do_not_wait_for_one_worker(app: Conveyor, redis: Any) -> None:
    """Jobs that must run alone come to one worker, all of them; other workers run those behind the first, at no attempt."""
    release = asyncio.Event()
    started: list[int] = []

    @app.task
    async def suspect(n: int, context: Context = current()) -> int:
        started.append(n)
        await release.wait()
        return context.attempt

    keys = app.client.keys("default")
    jobs = [await suspect.aenqueue(n) for n in range(3)]
    for job in jobs:  # as two crashes leave them
        redis.hset(keys.state, job.id.split(":")[1], "2 0 2")
    try:
        async with working(app) as first:
            await auntil(lambda: len(started) == 1 and len(first.consumers[0].held) == 3)
            async with working(app), working(app):
                await auntil(lambda: sorted(started) == [0, 1, 2], 30)
                release.set()
                assert [await job.aresult(timeout=10) for job in jobs] == [3, 3, 3]
    finally:
        release.set()
    assert await audit(app) == []


async def test_only_a_burst_remembers_retries(app: Conveyor) -> None:
    """A worker that goes on keeps nothing of a job that it put off: another worker may take it, and it would stay for ever."""

    @app.task(retry=Retry(attempts=2, backoff="1h"))
    async def fail() -> None:
        raise ValueError("once")

    async with working(app) as worker:
        job = await fail.aenqueue()
        await until_counts(app, lambda now: now.scheduled)
        assert worker.consumers[0].own_retries == {}
    assert await job.acancel()


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
        await until_counts(app, lambda now: now.scheduled == 1)
    await app.client.arun(operations.promote(app.client.keys("default"), job.id.rpartition(":")[2]))
    await drain(newer)

    assert await job.aresult(timeout=60) == 1
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


@pytest.mark.row("I17")
async def test_undecodable_arguments_make_a_dead_letter_with_their_bytes(app: Conveyor, redis: Any) -> None:
    """Arguments that no longer fit the task are not retried for ever, and their bytes are kept."""

    @app.task(name="typed", retry=Retry(attempts=1))
    async def typed(n: int) -> None: ...

    job = await typed.aenqueue(1)
    key = app.client.keys("default").jobs
    [id_] = redis.hkeys(key)
    redis.hset(key, id_, b'\ntyped\n{"n":"x"}')
    await drain(app)

    assert await job.astatus() == "dead"
    assert redis.hget(key, id_) == b'\ntyped\n{"n":"x"}'
    with pytest.raises(JobFailed, match=r"Expected `int`|Expected int"):
        await job.aresult(timeout=60)
    redis.delete(key, app.client.keys("default").dead, app.client.keys("default").state)


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
    redis.delete(app.client.keys("default").jobs, app.client.keys("default").dead, app.client.keys("default").state)


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

    assert await job.aresult(timeout=60) == "fine"
    assert (await counts(app)).dead == 2 * len(errors)


async def test_a_worker_that_never_reached_redis_stops_at_once() -> None:
    """A stop ends a worker that still waits for a server, without waiting for any grace."""
    app = Conveyor("redis://127.0.0.1:1/0")

    @app.task
    async def never() -> None: ...

    worker = Worker(app, grace=600)
    running = asyncio.create_task(worker.run())
    await auntil(lambda: not worker.ready.is_set())
    worker.stop()
    assert await asyncio.wait_for(running, 60) == 0
    await app.aclose()


async def test_a_worker_that_waits_for_redis_is_not_blocked() -> None:
    """The loop of a worker that cannot register yet ticks, so nobody takes it for blocked; it says what it waits for."""
    app = Conveyor("redis://127.0.0.1:1")

    @app.task
    async def note() -> None: ...

    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    for _ in range(2):
        seen = worker.last_tick
        await auntil(lambda seen=seen: worker.last_tick > seen)
    assert not worker.ready.is_set()
    worker.stop()
    await asyncio.wait_for(running, 60)
    await app.aclose()


@pytest.mark.row("A8")
@pytest.mark.leaves_keys("a suspect that was killed may be a dead letter")
async def test_kills_under_load_spare_jobs_that_are_only_held(app: Conveyor) -> None:
    """Of the many jobs of a dying worker at most one becomes a dead letter: the suspect that it ran, at its third crash."""
    done: set[int] = set()

    @app.task
    async def work(n: int) -> None:
        await asyncio.sleep(0.005)
        done.add(n)

    await app.aenqueue_many(work.s(n) for n in range(1000))
    for _ in range(5):
        worker = Worker(app, concurrency=50)
        running = asyncio.create_task(worker.run())
        before = len(done)
        await auntil(lambda least=before + 110: len(done) > least)
        worker.fail(RuntimeError("crash"))
        with pytest.raises(RuntimeError, match="crash"):
            await asyncio.wait_for(running, 60)
        await app.client.arun(operations.reap(app.client.keys("default"), worker.consumers[0].identity))
    await drain(app, concurrency=50)

    given_up = (await counts(app)).dead
    assert given_up <= 3  # the first two of five crashes make no dead letter
    assert len(done) >= 1000 - given_up


@pytest.mark.row("A11")
async def test_a_worker_without_its_server_leaves_nothing_running(start_server: Any) -> None:
    """A worker stopped while its server is gone ends in bounded time, and no task of it goes on trying."""
    server = start_server()
    app = Conveyor(server.url)

    @app.task
    async def never() -> None: ...

    worker = Worker(app, grace=0.1)
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.ready.wait(), 60)
    server.kill()
    worker.consumers[0].on_token()
    worker.stop()
    assert await asyncio.wait_for(running, 60) == 0
    await app.aclose()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 60)


def _lease_ahead(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let a worker lease that many jobs beyond those that can run, however slow they are."""
    monkeypatch.setattr(Capacity, "ahead", lambda _, saturated: most)


@pytest.mark.row("D151")
async def test_the_answer_of_a_cancellation(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting job was removed, one that is leased behind another will not start, and one that runs was asked to stop."""
    gate, started = threading.Event(), []
    _lease_ahead(monkeypatch, 1)

    @app.task
    def hold(n: int) -> None:
        started.append(n)
        gate.wait(10)

    try:
        async with working(app, concurrency=1, threads=1):
            jobs = [await hold.aenqueue(n) for n in range(3)]
            await auntil(lambda: started == [0])
            await until_counts(app, lambda now: now.leased == 2)

            answers = [await job.acancel() for job in reversed(jobs)]
            assert answers == ["removed", "will-not-start", "asked"]
            assert await jobs[1].astatus() == "cancelled"
            gate.set()
            await until_counts(app, lambda now: now.leased == 0)
            assert [await job.acancel() for job in jobs] == ["", "", ""]
    finally:
        gate.set()
    assert started == [0]
    assert await audit(app) == []


@pytest.mark.row("D151")
async def test_a_job_that_was_cancelled_while_it_failed_is_not_tried_again(app: Conveyor, url: str) -> None:
    """A worker that retries a job before it hears of its cancellation does not bring it back."""
    runs: list[int] = []

    @app.task(retry=Retry(attempts=5, backoff="1ms"))
    async def fails(context: Context = current()) -> None:
        runs.append(context.attempt)
        # While the loop is busy: the worker reports the retry before it can hear of the request.
        asked = threading.Thread(target=_ask_to_cancel, args=(url, context.job_id), daemon=True)
        asked.start()
        asked.join(60)
        assert not asked.is_alive()
        raise ValueError

    job = await fails.aenqueue()
    await drain(app)

    assert runs == [1]
    assert await job.astatus() == "cancelled"
    assert (await counts(app)).dead == 0
    assert await audit(app) == []


def _ask_to_cancel(url: str, job_id: str) -> None:
    client = Client(url)
    queue, _, bare = job_id.partition(":")
    assert client.run(operations.cancel(client.keys(queue), bare)) == operations.CANCEL_ASKED
    client.close()


@pytest.mark.row("D161")
@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_a_job_that_expired_behind_another_does_not_start(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`expires` is looked at where a job starts: one that was leased in time and reached too late ends as expired."""
    seen: list[int] = []
    gate = asyncio.Event()
    opened = threading.Event()
    now_ms: Any = QueueConsumer.now_ms.fget
    _lease_ahead(monkeypatch, 2)

    def on_thread(n: int) -> None:
        seen.append(n)
        opened.wait(10)

    async def on_loop(n: int) -> None:
        seen.append(n)
        await gate.wait()

    task: Any = app.task(on_thread if kind == "thread" else on_loop)
    try:
        async with working(app, concurrency=1, threads=1):
            await task.aenqueue(0)
            await auntil(lambda: seen == [0])
            late = await task.options(expires="1h").aenqueue(1)
            last = await task.options(expires="3h").aenqueue(2)
            await until_counts(app, lambda now: now.leased == 3)
            assert await late.astatus() == "leased"
            monkeypatch.setattr(
                QueueConsumer, "now_ms", property(lambda one: now_ms(one) + 7_200_000)
            )  # two hours later
            gate.set()
            opened.set()
            with pytest.raises(JobCancelled, match="expired before it started"):
                await late.aresult(timeout=60)
            await last.aresult(timeout=60)
    finally:
        gate.set()
        opened.set()
    assert seen == [0, 2]
    assert await audit(app) == []


@pytest.mark.row("D304")
async def test_ends_without_a_result_are_remembered(app: Conveyor) -> None:
    """Of hundreds of jobs that return nothing, that are asked about after all have ended, each is known to have ended well."""

    @app.task
    async def nothing(n: int) -> None: ...

    @app.task(keep_result=0)
    async def unkept(n: int) -> int:
        return n

    @app.task(keep_result="1ms")
    async def short(n: int) -> int:
        return n

    @app.task
    async def optional(n: int) -> int | None:
        return None

    silent = [nothing.aenqueue(n) for n in range(300)]
    jobs = [await job for job in [*silent, optional.aenqueue(1), nothing.options(unique="k").aenqueue(1)]]
    expired = [await task.options(id=own).aenqueue(1) for task in (unkept, short) for own in (None, f"own-{task.name}")]
    await drain(app)

    for job in jobs:
        assert (await job.astatus(), await job.aresult(), await app.job(job.id).aresult()) == ("done", None, None)
    for lost in expired:
        call = operations.await_result(app.client.keys("default"), lost.id.removeprefix("default:"), "")
        while (await app.client.arun(call))[0] == "result":
            await asyncio.sleep(0.001)  # its millisecond is not over
        assert await lost.astatus() == "done"
        with pytest.raises(ResultExpired):
            await lost.aresult()


async def test_an_error_lies_before_the_end_of_its_job(app: Conveyor, redis: redis_py.Redis) -> None:
    """The instant of an error is not behind the end of its job, also when Redis took long for the turn before."""

    @app.task
    async def slow_turn() -> None:
        redis.client_pause(300)  # the turn that reports this end is under way for so long

    @app.task(retry=1)
    async def fail() -> None:
        while (await counts(app)).leased > 1:  # until that turn is over, and before the next one is
            pass
        raise ValueError("no")

    _, job = await app.aenqueue_many([slow_turn.s(), fail.s()])
    async with working(app):
        with pytest.raises(JobFailed):
            await job.aresult(timeout=20)
    shown = await asyncio.to_thread(Admin(app.client).job, job.id)
    assert shown.ended is not None
    assert [error.at <= shown.ended for error in shown.errors] == [True]
    await asyncio.to_thread(Admin(app.client).delete, job.id)


async def test_the_facts_about_a_job_are_kept_with_its_result(app: Conveyor) -> None:
    """`info` knows arguments, headers, attempts, worker and start of a job that waits or failed, and while its result is kept."""
    tries: list[int] = []

    @app.task(retry=Retry(attempts=2, backoff=0, jitter=False))
    async def pay(user: int, text: str = "") -> str:
        tries.append(user)
        if len(tries) == 1:
            raise ValueError("once")
        return "paid"

    @app.task(retry=1)
    async def fail(user: int) -> int:
        raise ValueError("no")

    @app.task
    async def silent(user: int) -> None: ...

    job = await pay.options(headers={"trace": "t1"}, priority=3).aenqueue(7, text="ü")
    waiting = await job.ainfo()
    assert (waiting.status, waiting.arguments, waiting.headers, waiting.attempts) == (
        "ready", {"user": 7, "text": "ü"}, {"trace": "t1"}, 0,
    )  # fmt: skip
    plain, long = await pay.aenqueue(8), await pay.aenqueue(9, "x" * 3000)
    dead, gone = await fail.aenqueue(1), await silent.aenqueue(2)
    await drain(app)

    done = await app.job(job.id).ainfo()
    assert (done.status, done.task, done.arguments, done.headers, done.attempts) == (
        "done", pay.name, {"user": 7, "text": "ü"}, {"trace": "t1"}, 2,
    )  # fmt: skip
    worker = f"{platform.node()}:{os.getpid()}"
    assert done.worker == worker
    assert done.enqueued is not None
    assert done.started is not None
    assert done.ended is not None
    assert done.started <= done.ended
    assert (await plain.ainfo()).arguments == {"user": 8}
    assert ((await long.ainfo()).arguments, (await long.ainfo()).attempts) == (None, 1)
    buried = await dead.ainfo()
    assert (buried.status, buried.arguments, buried.attempts, buried.worker) == ("dead", {"user": 1}, 1, worker)
    nothing = await gone.ainfo()
    assert (nothing.status, nothing.arguments, nothing.task) == ("done", None, None)
    shown = await asyncio.to_thread(Admin(app.client).job, job.id)
    assert (shown.payload, shown.worker, shown.attempt, shown.headers) == (
        '{"user":7,"text":"ü"}', worker, 2, {"trace": "t1"},
    )  # fmt: skip
    await asyncio.to_thread(Admin(app.client).delete, dead.id)
    with pytest.raises(JobNotFound):
        await dead.ainfo()


async def test_the_facts_about_a_job_that_runs(app: Conveyor) -> None:
    """`info` of a job that runs says since when, and in which process."""
    seen: list[JobDetails] = []

    @app.task
    async def look() -> None:
        seen.append(await app.job(current().job_id).ainfo())

    looked = await look.aenqueue()
    await drain(app)

    [held] = seen
    assert (held.id, held.status, held.attempts) == (looked.id, "leased", 1)
    assert held.worker == f"{platform.node()}:{os.getpid()}"
    assert held.started is not None
    assert held.enqueued is not None
    assert held.enqueued <= held.started


async def test_kept_arguments_stay_sealed(url: str) -> None:
    """Arguments of an app with keys are kept as they were sealed: without the keys nobody reads them with the result."""
    sealing = Conveyor(url, keys={"k": b"k" * 32}, encrypt=True)

    @sealing.task
    async def login(password: str) -> str:
        return "in"

    job = await login.aenqueue("secret-one")
    await drain(sealing)
    assert (await job.ainfo()).arguments == {"password": "secret-one"}
    stranger = Conveyor(url)
    seen = await stranger.job(job.id).ainfo()
    assert (seen.status, seen.arguments, seen.attempts) == ("done", None, 1)
    assert "secret-one" not in str(await asyncio.to_thread(Admin(stranger.client).job, job.id))
    await stranger.aclose()
    await sealing.aclose()
