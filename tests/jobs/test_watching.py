"""Watching jobs: every start and end, in order, by push, over cuts of the connection and of the reader; one registration for all."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import redis as redis_py

from conveyor import ConfigurationError, Conveyor, JobNotFound, Retry, current
from conveyor.events import JobEnded, JobUpdate, ProgressChanged, StateChanged
from conveyor.jobs import watching
from conveyor.payload.records import AttemptHistory, Failure, Outcome, to_json
from conveyor.store import operations
from conveyor.store.operations import Settlement
from support.app_fixtures import blocking_client, loop_app  # noqa: F401
from support.manual_worker import ManualWorker
from support.running_worker import drain, working
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil, until

WAITERS = "conveyor:{default}:waiters"


def told(updates: list[JobUpdate]) -> list[str]:
    return [update.id for update in updates]


class Reader:
    """A thread that watches a job, and what it has seen."""

    def __init__(self, job: Any, after: str | None = None) -> None:
        self.seen: list[JobUpdate] = []
        self.thread = threading.Thread(target=lambda: [self.seen.append(one) for one in job.watch(after)])
        self.thread.start()

    def until(self, last: str) -> None:
        until(lambda: bool(self.seen) and self.seen[-1].id == last)

    def end(self) -> list[str]:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return told(self.seen)


@pytest.mark.redis6
def test_each_state_by_push(client: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts, failures with their errors, hand-backs and the end come by messages: the watcher asks nothing by itself."""
    monkeypatch.setattr(watching, "CHECK_AGAIN", LATER)

    @client.task
    def work() -> None: ...

    job = work.enqueue()
    reader = Reader(job)
    reader.until("1-ready")
    manual = ManualWorker(client)
    [id_] = manual.take()
    reader.until("1-leased")
    failure = to_json(Failure(1, 1, "ValueError", "no", worker="w"))
    manual.turn(0, Settlement("R", id_, 3_600_000, state=AttemptHistory(1, 1, 0, [failure]).encode()))
    reader.until("2-scheduled")
    assert isinstance(reader.seen[-1], StateChanged)
    assert reader.seen[-1].error == "ValueError: no"
    client.client.run(operations.promote(manual.keys, id_))
    reader.until("2-ready")
    manual.take()
    reader.until("2-leased")
    manual.turn(0, Settlement("F", id_, state=AttemptHistory(2, 1, 0, [failure]).encode()))
    reader.until("3-ready")
    manual.take()
    manual.done(id_, 41)
    assert reader.end() == [
        "1-ready", "1-leased", "2-scheduled", "2-ready", "2-leased", "3-ready", "3-leased", "3-done",
    ]  # fmt: skip
    assert isinstance(reader.seen[-1], JobEnded)
    assert not redis.exists(WAITERS)
    manual.leave()


@pytest.mark.row("D353")
def test_nothing_is_missed_over_a_cut(client: Conveyor, redis: redis_py.Redis) -> None:
    """Updates of the time while the subscription was cut are told afterwards, in order; a reader that went away goes on from its id."""

    @client.task
    def work() -> None: ...

    job = work.enqueue()
    manual = ManualWorker(client)
    reader = Reader(job)
    reader.until("1-ready")
    for attempt in (1, 2, 3):
        [id_] = manual.take()
        failures = [to_json(Failure(one, 1, "ValueError", f"no {one}", worker="w")) for one in range(1, attempt + 1)]
        redis.client_kill_filter(_type="pubsub")
        manual.turn(0, Settlement("R", id_, 0, state=AttemptHistory(attempt, attempt, 0, failures).encode()))
    [id_] = manual.take()
    errors = [to_json(Failure(one, 1, "ValueError", f"no {one}", worker="w")) for one in (1, 2, 3, 4)]
    record = to_json(Outcome("dead", reason="gave up"))
    manual.turn(0, Settlement("X", id_, 0, record, AttemptHistory(4, 4, 0, errors).encode()))
    seen = reader.end()
    assert [one for one in seen if one.endswith("leased")] == [f"{attempt}-leased" for attempt in (1, 2, 3, 4)]
    assert seen[-1] == "4-dead"
    assert {one.error for one in reader.seen if isinstance(one, StateChanged)} >= {"ValueError: no 1"}
    assert told(list(client.job(job.id).watch(after=seen[-1]))) == []
    manual.leave()
    client.queue("default").purge(dead=True)


@pytest.mark.row("D353")
async def test_a_real_run_and_its_replay(app: Conveyor, redis: redis_py.Redis) -> None:
    """A watcher of a run, one that comes after its end and one that goes on in the middle see the same starts and the same end."""

    @app.task(retry=Retry(attempts=3, backoff="1ms", jitter=False))
    async def fragile() -> int:
        if current().attempt < 3:
            raise ValueError(current().attempt)
        return 7

    job = await fragile.aenqueue()
    async with working(app):
        live = [update async for update in job.awatch()]
        later = [update async for update in app.job(job.id).awatch()]
        resumed = [update async for update in app.job(job.id).awatch(after="2-leased")]
    ended = [one for one in told(live) if not one.endswith(("ready", "scheduled"))]
    assert ended == ["1-leased", "2-leased", "3-leased", "3-done"]
    assert [one for one in told(later) if not one.endswith(("ready", "scheduled"))] == ended
    assert [one for one in told(resumed) if not one.endswith(("ready", "scheduled"))] == ["3-leased", "3-done"]
    await auntil(lambda: not redis.exists(WAITERS))


async def test_progress_is_told(app: Conveyor) -> None:
    """A progress reaches the watcher while the job runs, and the last one is not told again to one that goes on behind it."""
    go_on = asyncio.Event()

    @app.task
    async def count() -> None:
        current().progress(3, 10, "counting")
        await go_on.wait()

    job = await count.aenqueue()
    async with working(app):
        async for update in job.awatch():
            if isinstance(update, ProgressChanged):
                assert (update.state, update.done, update.total, update.text) == ("leased", 3, 10, "counting")
                break
        resumed = asyncio.create_task(until_end(job, update.id))
        go_on.set()
        assert await resumed == ["1-done"]


async def test_the_last_progress_is_told_before_the_end(app: Conveyor) -> None:
    """The last progress comes before the end, to a watcher that comes when all is over, and with the errors of earlier attempts."""

    @app.task(retry=Retry(attempts=2, backoff=0))
    async def count() -> None:
        if current().attempt == 1:
            current().progress(3, 10)
            await first.wait()
            raise OSError("away")
        await second.wait()
        for done in range(11):
            current().progress(done, 10)

    first, second, live = asyncio.Event(), asyncio.Event(), list[JobUpdate]()
    job = await count.aenqueue()
    async with working(app):
        async for update in job.awatch():
            live.append(update)
            if isinstance(update, ProgressChanged):
                first.set()
            elif update.id == "2-leased":
                second.set()
    later = [update async for update in app.job(job.id).awatch()]
    progress = [(one.attempt, one.done) for one in live if isinstance(one, ProgressChanged)]
    assert progress[0] == (1, 3)
    assert progress[1][1] == 0 or progress[1][1] > 3  # what attempt 1 told is not told again as that of attempt 2
    for seen in (live, later):
        assert isinstance(seen[-2], ProgressChanged)
        assert (seen[-2].done, seen[-2].total, seen[-2].attempt) == (10, 10, 2)
        assert isinstance(seen[-1], JobEnded)
    assert [(one.id, one.error) for one in later if isinstance(one, StateChanged)] == [
        ("1-ready", ""), ("1-leased", ""), ("2-scheduled", "OSError"), ("2-leased", ""),
    ]  # fmt: skip
    assert later[3].at is not None
    assert await until_end(job, live[-2].id) == ["2-done"]


async def until_end(job: Any, after: str) -> list[str]:
    return [update.id async for update in job.awatch(after)]


@pytest.mark.row("D353")
async def test_many_watchers_share_a_subscription(app: Conveyor, redis: redis_py.Redis) -> None:
    """Watchers of 1,000 jobs have one subscription and one registration a job, and each sees every start and end once."""

    @app.task(keep_result=0)
    async def work(n: int) -> None: ...

    jobs = await app.aenqueue_many(work.s(n) for n in range(1000))

    async def watch() -> dict[str, list[str]]:
        seen: dict[str, list[str]] = {}
        async for update in app.awatch(jobs):
            seen.setdefault(update.job_id, []).append(update.state)
        return seen

    watchers = [asyncio.create_task(watch()) for _ in range(10)]
    await auntil(lambda: redis.hlen(WAITERS) == 1000)
    assert len([one for one in redis.client_list() if int(one["sub"]) > 0]) == 1
    assert {value.count(b"*") for value in redis.hvals(WAITERS)} == {1}
    await drain(app)
    for seen in await asyncio.wait_for(asyncio.gather(*watchers), 120):
        assert len(seen) == 1000
        assert set(map(tuple, seen.values())) == {("ready", "leased", "done")}
    assert not redis.exists(WAITERS)


async def test_ends_without_a_start_and_bad_input(
    app: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled job ends as such, a watcher that leaves leaves nothing, and what cannot be watched is refused clearly."""
    monkeypatch.setattr(watching, "CHECK_AGAIN", LATER)

    @app.task
    async def work() -> None: ...

    job = await work.options(delay="1h").aenqueue()
    seen: list[str] = []
    async for update in job.awatch():
        seen.append(update.id)
        if len(seen) == 1:
            await job.acancel()
    assert seen == ["1-scheduled", "1-cancelled"]
    other = await work.options(delay="1h").aenqueue()
    async for _ in (updates := other.awatch()):
        break
    await auntil(lambda: app._core.watch_hub._changed._sleepers)  # its thread waits for changes: leaving is one
    await updates.aclose()
    await auntil(lambda: not redis.exists(WAITERS))
    await other.acancel()
    with pytest.raises(ConfigurationError, match="after"):
        job.awatch(after="yesterday")
    with pytest.raises(ConfigurationError, match="map"):
        app.awatch([job, other], after="1-leased")  # type: ignore[arg-type]
    with pytest.raises(JobNotFound):
        [one async for one in app.job("default:0000000000000000000000").awatch()]
