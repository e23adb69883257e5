"""Handles: how a job stands, and how it ended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import redis as redis_py

from conveyor.errors import ConfigurationError, JobCancelled, JobFailed, JobNotFound, PayloadError, ResultExpired
from conveyor.ids import new_id
from conveyor.jobs.app import Conveyor
from conveyor.jobs.job import Job
from conveyor.payload.records import Failure
from conveyor.store import operations
from support.manual_worker import ManualWorker, manual_worker  # noqa: F401
from support.waiting import until


@dataclass
class Receipt:
    id: str
    at: datetime


AT = datetime(2026, 5, 4, tzinfo=UTC)
FAILURE = Failure(1, 5, "builtins.ValueError", "no such card", traceback="Traceback …")


class Tasks:
    """One task of each kind of promise."""

    def __init__(self, app: Conveyor) -> None:
        @app.task
        def pay(amount: int) -> Receipt: ...  # type: ignore[empty-body]

        @app.task
        def forget() -> None: ...

        @app.task
        def plain(): ...  # type: ignore[no-untyped-def]

        self.pay, self.forget, self.plain = pay, forget, plain


@pytest.fixture
def tasks(app: Conveyor) -> Tasks:
    return Tasks(app)


def test_status_follows_the_job(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """A job is ready, then leased, then done; a handle from its id says the same, a result or none."""
    job = tasks.pay.enqueue(1)
    seen = [job.status()]
    [id_] = manual.take()
    seen.append(job.status())
    manual.done(id_, Receipt("r", AT))

    assert [*seen, job.status(), app.job(job.id).status()] == ["ready", "leased", "done", "done"]

    other = tasks.forget.enqueue()
    [id_] = manual.take()
    manual.plainly_done(id_)
    assert other.status() == "done"


def test_status_of_those_that_did_not_succeed(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """Dead letters are dead, cancelled jobs cancelled whether they waited, were delayed or ran."""
    dead, waiting, later, running = (
        tasks.forget.enqueue(),
        tasks.forget.options(priority=1).enqueue(),
        tasks.forget.options(delay=60).enqueue(),
        tasks.forget.enqueue(),
    )
    assert waiting.cancel()
    assert later.cancel()
    first, second = manual.take(2)
    manual.dead(first, FAILURE)
    assert running.cancel()
    assert running.status() == "leased"
    manual.cancelled(second)

    assert [job.status() for job in (dead, waiting, later, running)] == ["dead", *["cancelled"] * 3]


def test_cancel_tells_whether_there_was_something_to_cancel(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """Cancelling is refused for jobs that ended; a running one is asked of its worker, which hears of it."""
    job = tasks.forget.enqueue()
    [id_] = manual.take()

    assert job.cancel()
    assert manual.turn().cancelled == [id_]
    manual.cancelled(id_)
    assert not job.cancel()
    assert not app.job(job.id).cancel()


def test_result_comes_in_its_type(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """A result is decoded into what the function says it returns; without the function it is plain JSON."""
    job = tasks.pay.enqueue(1)
    [id_] = manual.take()
    manual.done(id_, Receipt("r1", AT))

    assert job.result() == Receipt("r1", AT)
    assert tasks.pay.job(job.id).result(timeout=0) == Receipt("r1", AT)
    assert app.job(job.id).result() == {"id": "r1", "at": "2026-05-04T00:00:00Z"}


def test_handle_from_an_id_learns_the_task(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """A handle made from the id of a job that is not finished types the result as the task does."""
    handle = app.job(tasks.pay.enqueue(1).id)
    assert (handle.queue, handle.task) == ("default", None)
    assert handle.status() == "ready"
    assert handle.task == tasks.pay.name
    [id_] = manual.take()
    manual.done(id_, Receipt("r1", AT))

    assert handle.result() == Receipt("r1", AT)


def test_failure_is_raised_with_what_the_job_raised(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """JobFailed carries type, message and traceback of the last attempt; of a poison job it says that it crashed."""
    job, poison = tasks.pay.enqueue(1), tasks.pay.enqueue(2)
    first, second = manual.take(2)
    manual.dead(first, FAILURE)
    manual.dead(second, None, crashes=3)

    with pytest.raises(JobFailed) as caught:
        job.result()
    error = caught.value
    assert (error.job_id, error.type, error.message, error.traceback) == (
        job.id, "builtins.ValueError", "no such card", "Traceback …",
    )  # fmt: skip
    with pytest.raises(JobFailed, match="crashed 3 times"):
        poison.result()


def test_result_of_a_cancelled_job(app: Conveyor, tasks: Tasks, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """The result of a job that was cancelled, or expired, is JobCancelled and says which."""
    job = tasks.pay.enqueue(1)
    job.cancel()
    late = tasks.pay.options(expires="1ms").enqueue(1)
    seconds, micros = redis.time()
    until(lambda: redis.time() > (seconds, micros + 2000))
    assert manual.take() == []

    with pytest.raises(JobCancelled, match="was cancelled"):
        job.result()
    with pytest.raises(JobCancelled, match="expired before it started"):
        late.result()


def test_promised_value_that_is_gone_is_an_error(
    app: Conveyor, tasks: Tasks, manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """ResultExpired when there was a value and it is not kept; None when there was none, also for a handle from an id."""
    jobs = [tasks.pay.enqueue(1), tasks.pay.enqueue(2), tasks.forget.enqueue(), tasks.plain.enqueue()]
    ids = manual.take(4)
    manual.done(ids[0], Receipt("r", AT), keep_ms=60_000)
    manual.unkept(ids[1])
    manual.plainly_done(*ids[2:])
    redis.delete(f"conveyor:{{default}}:result:{ids[0]}")

    for job in jobs[:2]:
        for handle in (job, app.job(job.id)):
            assert handle.status() == "done"
            with pytest.raises(ResultExpired):
                handle.result()
    for job in jobs[2:]:
        assert [job.result(), app.job(job.id).result()] == [None, None]


@pytest.mark.row("D304")
def test_done_is_said_only_of_what_is_known_to_have_ended_well(
    app: Conveyor, tasks: Tasks, manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """Purged, lost, forgotten and never known jobs are JobNotFound for each question; what ended well is remembered."""
    keys = app.client.keys("default")

    def make() -> list[Job[None]]:
        return [
            tasks.forget.enqueue(),
            tasks.forget.options(unique="k").enqueue(),
            tasks.forget.options(id=new_id()[1:]).enqueue(),
        ]

    def end() -> list[Job[None]]:
        jobs = make()
        first, *others = manual.take(3)
        manual.plainly_done(first)
        for id_ in others:
            manual.done(id_)
        return jobs

    def refuse_unknown(*jobs: Job[Any]) -> None:
        for job in (*jobs, *(app.job(job.id) for job in jobs)):
            for ask in (job.status, job.result, job.cancel):
                with pytest.raises(JobNotFound, match=job.id):
                    ask()

    for job in end():
        for handle in (job, app.job(job.id)):
            assert (handle.status(), handle.result(), handle.cancel()) == ("done", None, "")

    waiting, later = make(), tasks.forget.options(delay=60).enqueue()
    app.client.run(operations.purge(keys, "ready", 9))
    app.client.run(operations.purge(keys, "due", 9))
    refuse_unknown(*waiting, later, app.job(f"default:{new_id()}"), app.job("nobody"))

    buried = tasks.forget.enqueue()
    manual.dead(*manual.take(), FAILURE)
    app.client.run(operations.purge(keys, "dead", 9))
    refuse_unknown(buried)

    lost = make()
    redis.delete(keys.jobs)
    refuse_unknown(*lost)
    assert manual.take(9) == []
    redis.delete(f"{keys.prefix}unique:i:{lost[2].id}")

    forgotten = end()
    for key in redis.keys(f"{keys.prefix}ended:*"):
        assert 590_000 < redis.pttl(key) <= 600_000
        redis.delete(key)
    refuse_unknown(*forgotten[:2])
    assert forgotten[2].status() == "done"  # an id of one's own is remembered for a day
    redis.delete(f"{keys.prefix}unique:i:{forgotten[2].id}")
    refuse_unknown(forgotten[2])


def test_purged_job_tells_who_waits(app: Conveyor, tasks: Tasks, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """A caller who waits for a job that is purged gets JobCancelled, which says so."""
    job = tasks.pay.enqueue(1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(job.result, timeout=30)
        until(lambda: redis.exists("conveyor:{default}:waiters"))
        app.client.run(operations.purge(app.client.keys("default"), "ready", 9))
        with pytest.raises(JobCancelled, match="was purged"):
            waiting.result(10)


def test_result_that_does_not_fit_is_an_error(app: Conveyor, tasks: Tasks, manual: ManualWorker) -> None:
    """A stored result that is not what the function says it returns raises PayloadError."""
    job = tasks.pay.enqueue(1)
    [id_] = manual.take()
    manual.done(id_, 5)

    with pytest.raises(PayloadError):
        job.result()


def test_own_id_is_found_in_any_queue(app: Conveyor, tasks: Tasks, redis: redis_py.Redis) -> None:
    """An id of one's own does not name its queue: all known ones are asked; one that none knows is JobNotFound."""
    tasks.forget.enqueue()
    tasks.forget.options(id="order-7", queue="mail").enqueue()

    handle = app.job("order-7")
    assert (handle.queue, handle.id, handle.status(), handle.queue) == (None, "order-7", "ready", "mail")
    assert app.job("order-7").cancel()
    assert app.job("order-7").status() == "cancelled"
    redis.delete("conveyor:{mail}:result:order-7")
    manual = ManualWorker(app, "mail")
    assert manual.take() == []
    manual.leave()
    for name in ("order-7", "order-8"):  # one that was cancelled is remembered for ten minutes, which are over here
        for ask in (app.job(name).status, app.job(name).cancel, app.job(name).result):
            with pytest.raises(JobNotFound, match=name):
                ask()


async def test_awaitable_twins(app: Conveyor, tasks: Tasks) -> None:
    """Each blocking method has a twin that does the same; the blocking one is refused inside a loop, naming it."""
    job = await tasks.pay.aenqueue(1)
    own = await tasks.forget.options(id="mine").aenqueue()
    assert [await job.astatus(), await app.job("mine").astatus()] == ["ready", "ready"]
    assert await app.job("mine").acancel()
    with pytest.raises(JobCancelled):
        await own.aresult()
    with pytest.raises(TimeoutError):
        await job.aresult(timeout=0)
    for unknown in ("nobody", f"default:{new_id()}"):
        for ask in (app.job(unknown).astatus, app.job(unknown).aresult, app.job(unknown).acancel):
            with pytest.raises(JobNotFound):
                await ask()

    assert (await job.ainfo()).arguments == {"amount": 1}
    with pytest.raises(JobNotFound):
        await app.job("nobody").ainfo()

    calls: list[tuple[Any, str]] = [
        (job.status, "astatus"),
        (job.result, "aresult"),
        (job.cancel, "acancel"),
        (job.info, "ainfo"),
    ]
    for call, twin in calls:
        with pytest.raises(ConfigurationError, match=f"await job.{twin}") as caught:
            call()
        assert caught.value.code == "E06"
    await app.aclose()


def test_handles_print_and_compare(app: Conveyor, tasks: Tasks) -> None:
    """A handle shows id and task; two handles of one job are equal."""
    job = tasks.forget.options(id="x").enqueue()

    assert repr(job) == "<Job x test_job.forget>"
    assert repr(app.job("mail:0Q8AowMY__caJ~9pfQBvJl")) == "<Job mail:0Q8AowMY__caJ~9pfQBvJl>"
    assert len({job, tasks.forget.job("x"), app.job("y")}) == 2
