"""Waiting for results: by push, on one connection, through timeouts, restarts and forks."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py

from conveyor.errors import JobFailed, ResultExpired, StoreUnavailable
from conveyor.jobs import results
from conveyor.jobs.app import Conveyor
from conveyor.jobs.job import Job
from conveyor.jobs.task import Task
from conveyor.payload.records import Failure
from support.forked_children import exit_code, in_child
from support.manual_worker import (
    ManualWorker,
    drain,
    manual_worker,  # noqa: F401
)
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil, until
from testbed.server_process import Server

WAITERS = "conveyor:{default}:waiters"


@pytest.fixture
def echo(app: Conveyor) -> Task[[int], int]:
    return make_echo(app)


def make_echo(app: Conveyor) -> Task[[int], int]:
    @app.task
    def echo(n: int) -> int:
        return n

    return echo


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def subscribers(client: redis_py.Redis) -> list[dict[str, Any]]:
    return [one for one in client.client_list() if int(one["sub"]) > 0]


def listen(job: Job[int], redis: redis_py.Redis) -> None:
    """Wait for *job* until this process listens: a wait whose time is over at the first answer of Redis does not."""

    def listens() -> bool:
        if not subscribers(redis):
            with pytest.raises(TimeoutError):
                job.result(timeout=0.2)
        return bool(subscribers(redis))

    until(listens)


def test_waiter_is_woken_by_push(
    echo: Task[[int], int],
    manual: ManualWorker,
    pool: ThreadPoolExecutor,
    redis: redis_py.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A waiting call returns when the job ends, and asked Redis at its beginning only."""
    monkeypatch.setattr(results, "CHECK_AGAIN", LATER)
    for n in range(2):  # the first hears that the process is subscribed, and may ask once more for it
        job = echo.enqueue(n)
        [id_] = manual.take()
        waiting = pool.submit(job.result, timeout=PATIENCE)
        until(lambda id_=id_: redis.hexists(WAITERS, id_))
        if n == 0:
            manual.done(id_, 0)
            assert waiting.result(60) == 0
    redis.config_resetstat()
    manual.done(id_, 41)

    assert waiting.result(60) == 41
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 1  # the turn that finished it
    assert not redis.exists(WAITERS)


def test_all_kinds_of_ends_are_pushed(
    echo: Task[[int], int], manual: ManualWorker, pool: ThreadPoolExecutor, redis: redis_py.Redis
) -> None:
    """A waiter hears of a death, of a value that is not kept, and of a success without one, as it hears of a value."""
    jobs = [echo.enqueue(n) for n in range(3)]
    ids = manual.take(3)
    waiting = [pool.submit(job.result, timeout=PATIENCE) for job in jobs]
    until(lambda: redis.hlen(WAITERS) == 3)
    manual.dead(ids[0], Failure(1, 0, "ValueError", "no", traceback="trace"))
    manual.unkept(ids[1])
    manual.plainly_done(ids[2])

    with pytest.raises(JobFailed, match="ValueError: no"):
        waiting[0].result(60)
    with pytest.raises(ResultExpired):
        waiting[1].result(60)
    assert waiting[2].result(60) is None


@pytest.mark.standalone_only(
    "counts subscribers, and sentinels are some", on=("redis6", "redis7", "tls", "acl", "cluster")
)
def test_one_connection_serves_all_waiters(
    app: Conveyor, echo: Task[[int], int], manual: ManualWorker, pool: ThreadPoolExecutor, redis: redis_py.Redis
) -> None:
    """Threads and event loops that wait together share one subscribed connection, and each gets its own result."""
    jobs = [echo.enqueue(n) for n in range(60)]

    async def wait_for(some: list[Any]) -> list[int]:
        try:
            return await asyncio.gather(*(job.aresult(timeout=PATIENCE) for job in some))
        finally:
            await app.client.aclose()

    threads = [pool.submit(job.result, timeout=PATIENCE) for job in jobs[:20]]
    loops = [pool.submit(asyncio.run, wait_for(jobs[20:40])), pool.submit(asyncio.run, wait_for(jobs[40:]))]
    ids = manual.take(60)
    until(lambda: redis.hlen(WAITERS) == 60)
    assert len(subscribers(redis)) == 1
    for n, id_ in enumerate(ids):
        manual.done(id_, n)

    assert [one.result(60) for one in threads] == list(range(20))
    assert [one.result(60) for one in loops] == [list(range(20, 40)), list(range(40, 60))]
    assert not redis.exists(WAITERS)


def test_many_wait_for_one_job(
    echo: Task[[int], int], manual: ManualWorker, pool: ThreadPoolExecutor, redis: redis_py.Redis
) -> None:
    """All who wait for the same job are woken, and one that gives up leaves the others registered."""
    job = echo.enqueue(1)
    [id_] = manual.take()
    waiting = [pool.submit(job.result, timeout=PATIENCE) for _ in range(5)]
    until(lambda: redis.hexists(WAITERS, id_))
    with pytest.raises(TimeoutError):
        job.result(timeout="10ms")
    assert redis.hexists(WAITERS, id_)
    manual.done(id_, 7)

    assert [one.result(60) for one in waiting] == [7] * 5


@pytest.mark.parametrize(("name", "command"), [("app", "shop_of_this_test:app"), ("_made['app']", "MODULE:app")])
def test_a_wait_names_the_command(url: str, monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    """A wait for a job that no worker takes ends with the command that starts one, with the app where a module holds it."""
    module = types.ModuleType("shop_of_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(f"from conveyor import Conveyor\n_made = {{}}\n{name} = Conveyor({url!r})", vars(module))
    app = eval(name, vars(module))
    job = app.task(name="nothing")(print).enqueue()

    with pytest.raises(TimeoutError, match=f"Start one:  conveyor worker {command}$"):
        job.result(timeout=0)

    app.queue("default").purge()
    app.close()


def test_timeout_is_kept_and_leaves_nothing(
    echo: Task[[int], int], manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """result() raises TimeoutError at its timeout, says which job, and is not registered any more."""
    job = echo.enqueue(1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"{job.id} has not ended after 0.15 s"):
        job.result(timeout="150ms")

    manual.take()
    with pytest.raises(TimeoutError, match="A worker has leased it"):
        job.result(timeout=0)

    assert 0.14 < time.monotonic() - began < PATIENCE
    assert not redis.exists(WAITERS)
    with pytest.raises(TimeoutError):
        job.result(timeout=0)


async def test_cancelled_waiter_leaves_nothing(app: Conveyor, echo: Task[[int], int], redis: redis_py.Redis) -> None:
    """A cancelled aresult() is not registered any more."""
    job = await echo.aenqueue(1)
    waiting = asyncio.create_task(job.aresult())
    await auntil(lambda: redis.exists(WAITERS))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert not redis.exists(WAITERS)
    with pytest.raises(TimeoutError):
        await job.aresult(timeout=0.05)
    await app.aclose()


def test_same_own_id_in_two_queues(
    app: Conveyor, echo: Task[[int], int], pool: ThreadPoolExecutor, redis: redis_py.Redis
) -> None:
    """Two queues may hold the same id of a caller's own; each waiter gets the end of its own job."""
    jobs = [echo.options(id="x", queue=queue).enqueue(1) for queue in ("a", "b")]
    hands = [ManualWorker(app, "a"), ManualWorker(app, "b")]
    assert [manual.take() for manual in hands] == [["x"], ["x"]]
    waiting = [pool.submit(job.result, timeout=PATIENCE) for job in jobs]
    until(lambda: redis.exists("conveyor:{a}:waiters", "conveyor:{b}:waiters") == 2)
    hands[1].done("x", 2)
    assert waiting[1].result(60) == 2
    assert not waiting[0].done()
    hands[0].done("x", 1)

    assert waiting[0].result(60) == 1
    for manual in hands:
        manual.leave()


@pytest.mark.row("D11")
def test_missed_message_is_made_good(
    echo: Task[[int], int],
    manual: ManualWorker,
    pool: ThreadPoolExecutor,
    redis: redis_py.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A waiter whose message never came asks again after a while."""
    monkeypatch.setattr(results, "CHECK_AGAIN", 0.2)
    job = echo.enqueue(1)
    [id_] = manual.take()
    waiting = pool.submit(job.result, timeout=PATIENCE)
    until(lambda: redis.hexists(WAITERS, id_))
    redis.delete(WAITERS)
    manual.done(id_, 5)

    assert waiting.result(60) == 5


@pytest.mark.row("D11")
@pytest.mark.standalone_only("kills one connection and deletes a key in one transaction")
def test_lost_connection_is_made_good(
    echo: Task[[int], int],
    manual: ManualWorker,
    pool: ThreadPoolExecutor,
    redis: redis_py.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the subscribed connection breaks it is opened again, and waiters ask at once for what they missed."""
    monkeypatch.setattr(results, "CHECK_AGAIN", LATER)
    job = echo.enqueue(1)
    [id_] = manual.take()
    waiting = pool.submit(job.result, timeout=PATIENCE)
    until(lambda: redis.hexists(WAITERS, id_))
    [one] = subscribers(redis)
    with redis.pipeline(transaction=True) as pipeline:  # nobody can subscribe between the two
        pipeline.client_kill_filter(_id=one["id"])
        pipeline.delete(WAITERS)
        pipeline.execute()
    manual.done(id_, 6)

    assert waiting.result(60) == 6


@pytest.mark.row("C1", "D11")
def test_waiters_survive_a_restart(start_server: Callable[..., Server]) -> None:
    """A waiter outlives a restart of Redis: it registers again and gets the result that comes afterwards."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with Conveyor(server.url) as app, ThreadPoolExecutor(2) as pool:
        echo, manual = make_echo(app), ManualWorker(app)
        jobs = [echo.enqueue(n) for n in range(2)]
        ids = manual.take(2)

        async def wait() -> int:
            try:
                return await jobs[1].aresult(timeout=60)
            finally:
                await app.client.aclose()

        waiting = [pool.submit(jobs[0].result, timeout=60), pool.submit(asyncio.run, wait())]
        with server.client() as client:
            until(lambda: client.hlen(WAITERS) == 2)
        server.kill()
        server.start()
        with server.client() as client:
            until(lambda: len(subscribers(client)) == 1)
        manual.done(ids[0], 10)
        manual.done(ids[1], 11)

        assert [one.result(20) for one in waiting] == [10, 11]
        manual.leave()
        drain(app)


def test_server_that_is_away_is_an_error(start_server: Callable[..., Server]) -> None:
    """Asking for a result of a server that does not answer raises StoreUnavailable."""
    server = start_server()
    with Conveyor(server.url) as app:
        app.client.retry_for = 0.1
        job = make_echo(app).enqueue(1)
        server.kill()
        with pytest.raises(StoreUnavailable):
            job.result(timeout=PATIENCE)


@pytest.mark.standalone_only(
    "counts subscribers, and sentinels are some", on=("redis6", "redis7", "tls", "acl", "cluster")
)
def test_close_ends_the_thread_and_use_starts_it_again(
    app: Conveyor, echo: Task[[int], int], redis: redis_py.Redis
) -> None:
    """close() ends the listening thread and its connection; waiting afterwards opens both again."""
    job = echo.enqueue(1)
    for _ in range(2):
        listen(job, redis)
        assert [t.name for t in threading.enumerate()].count("conveyor-replies") == 1
        app.close()
        assert [t.name for t in threading.enumerate()].count("conveyor-replies") == 0
        until(lambda: subscribers(redis) == [])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.standalone_only(
    "counts subscribers, and sentinels are some", on=("redis6", "redis7", "tls", "acl", "cluster")
)
def test_child_process_waits_on_its_own(
    app: Conveyor, echo: Task[[int], int], manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """A forked child listens on a channel of its own; the parent goes on hearing its results."""
    listen(echo.enqueue(0), redis)
    jobs = [echo.enqueue(n) for n in (1, 2)]
    _, first, second = manual.take(3)
    child = in_child(lambda: jobs[0].result(timeout=60))
    until(lambda: redis.hexists(WAITERS, first))
    until(lambda: len(subscribers(redis)) == 2)
    manual.done(first, 33)
    assert exit_code(child) == 33

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(jobs[1].result, timeout=20)
        until(lambda: redis.hexists(WAITERS, second))
        manual.done(second, 34)
        assert waiting.result(60) == 34
