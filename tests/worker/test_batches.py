"""Batch tasks: what is enqueued one by one runs together, and ends one by one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict

import pytest

from conveyor import (
    BatchFailed,
    Concurrency,
    ConfigurationError,
    Context,
    Conveyor,
    Debounce,
    Job,
    JobCancelled,
    JobFailed,
    PayloadError,
    Rate,
    Retry,
    RetryIn,
    Snooze,
    Throttle,
    Unique,
    current,
)
from conveyor.events import Event
from conveyor.ids import split
from conveyor.store import inspection
from conveyor.worker.execution import executor
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.shared_memory import ChildSlot
from conveyor.worker.shutdown import RECYCLE
from conveyor.worker.worker import Worker
from support import batch_app
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, counts, drain, until_counts, working
from support.time_limits import PATIENCE
from support.waiting import auntil
from support.worker_processes import wait, worker_processes

QUICK = Retry(attempts=2, backoff="5ms", jitter=False)
LONG = "1h"
"""A `within` that no test waits for."""


@dataclass
class Row:
    id: int
    tenant: str = ""


async def results(jobs: list[Job[Any]]) -> list[Any]:
    return [await job.aresult(timeout=PATIENCE) for job in jobs]


# -- gathering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "thread", "process"])
async def test_full_batches_run_and_each_job_has_its_result(app: Conveyor, kind: str) -> None:
    """Ten jobs of a batch task of four run as 4, 4 and 2 in their order, and each job has its own result."""
    seen: list[list[int]] = []

    def double(rows: list[Row]) -> list[int]:
        seen.append([row.id for row in rows])
        return [2 * row.id for row in rows]

    async def adouble(rows: list[Row]) -> list[int]:
        return double(rows)

    if kind == "process":
        task: Any = batch_app.declare(app)
        app.task(name="after", queue="after")(batch_app.after.function)
    else:
        task = app.batch_task(size=4, within=LONG)(adouble if kind == "loop" else double)
    row = batch_app.Row if kind == "process" else Row
    jobs = [await task.aenqueue(row(n)) for n in range(10)]
    await drain(app, concurrency=1, reference="support.batch_app:app")

    found = await results(jobs)
    if kind == "process":
        assert [(one[0], one[1], one[2]) for one in found] == [(n, 4 if n < 8 else 2, 1) for n in range(10)]
        assert all(one[3] != os.getpid() for one in found)
    else:
        assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert found == [2 * n for n in range(10)]
    assert await audit(app) == []


async def test_a_batch_runs_within_the_time_since_its_first_item(app: Conveyor) -> None:
    """A batch that does not fill runs when its time is over: not before, and without another job to wake it."""
    seen: list[tuple[int, float]] = []

    @app.batch_task(size=100, within="150ms")
    async def note(rows: list[int]) -> None:
        seen.append((len(rows), perf_counter()))

    async with working(app):
        since = perf_counter()
        jobs = [await note.aenqueue(n) for n in range(3)]
        await results(jobs)

    assert sum(count for count, _ in seen) == 3
    assert seen[0][1] - since >= 0.15


async def test_a_burst_runs_what_it_has(app: Conveyor) -> None:
    """A burst does not wait for jobs that no queue has."""
    seen: list[int] = []

    @app.batch_task(size=100, within=LONG)
    async def note(rows: list[int]) -> None:
        seen.append(len(rows))

    await app.aenqueue_many(note.s(n) for n in range(250))
    await drain(app, concurrency=4)

    assert sorted(seen) == [50, 100, 100]


async def test_batches_never_mix_groups(app: Conveyor) -> None:
    """With `group_by` every batch holds items of one key, and full ones do not wait for those of other keys."""
    seen: list[list[Row]] = []

    @app.batch_task(size=5, within=LONG, group_by="tenant")
    async def note(rows: list[Row]) -> None:
        seen.append(rows)

    await app.aenqueue_many(note.s(Row(n, "abc"[n % 3])) for n in range(32))
    await drain(app)

    assert all(len({row.tenant for row in rows}) == 1 for rows in seen)
    assert Counter(len(rows) for rows in seen) == {5: 6, 1: 2}
    for tenant in "abc":
        ids = [row.id for rows in seen for row in rows if row.tenant == tenant]
        assert ids == sorted(ids)


async def test_a_key_may_be_any_value_of_a_field(app: Conveyor) -> None:
    """A key is a number, a nested value or none: items without the field make batches of their own."""
    seen: list[list[Any]] = []

    @app.batch_task(size=10, within=LONG, group_by="at.place")
    async def note(rows: list[dict[str, Any]]) -> None:
        seen.append([row.get("at") for row in rows])

    places: list[Any] = [{"place": 1}, {"place": [1, 2]}, {"place": 1.0}, {}, {"place": [1, 2]}, None, {"place": "x"}]
    await app.aenqueue_many(note.s({} if place is None else {"at": place}) for place in places)
    await drain(app)

    assert sorted(map(len, seen)) == [1, 2, 2, 2]


async def test_many_keys_do_not_fill_the_lease(app: Conveyor) -> None:
    """Where the items of 400 keys come in turn, their batches run with what they have before the lease is full."""
    seen: list[int] = []

    @app.batch_task(size=100, within=LONG, group_by="tenant")
    async def note(rows: list[Row]) -> None:
        seen.append(len(rows))

    await app.aenqueue_many(note.s(Row(n, str(n % 400))) for n in range(2000))
    async with working(app, concurrency=2):
        await auntil(lambda: sum(seen) >= 1400)  # the others wait for their time
    assert max(seen) > 1
    await drain(app)
    assert sum(seen) == 2000


async def test_a_batch_is_one_slot_and_leases_what_it_needs(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two slots at most two batches of 300 run at once, and few turns fill each of them."""
    turns: list[int] = []
    running, most, sizes = 0, 0, list[int]()
    send = QueueConsumer._send_turn

    def count(consumer: QueueConsumer, want: int) -> None:
        turns.append(want)
        send(consumer, want)

    @app.batch_task(size=300, within=LONG)
    async def note(rows: list[int]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        sizes.append(len(rows))
        await asyncio.sleep(0.02)
        running -= 1

    await app.aenqueue_many(note.s(n) for n in range(3000))
    monkeypatch.setattr(QueueConsumer, "_send_turn", count)
    await drain(app, concurrency=2)

    assert sizes == [300] * 10
    assert most == 2
    assert len(turns) <= 60, turns


async def test_batches_are_full_while_there_is_work(app: Conveyor) -> None:
    """Where a call takes longer than `within`, no batch begins without a slot for it: that would run before it is full."""
    sizes: list[int] = []

    @app.batch_task(size=50, within="50ms")
    async def note(rows: list[int]) -> None:
        sizes.append(len(rows))
        await asyncio.sleep(0.1)

    await app.aenqueue_many(note.s(n) for n in range(400))
    async with working(app, concurrency=1):
        await auntil(lambda: sum(sizes) == 400)
    assert len(sizes) <= 12, sizes


async def test_jobs_beside_a_gathering_batch_run(app: Conveyor) -> None:
    """A worker with one slot runs plain jobs of the same and of another queue while a batch waits for more items."""
    seen: list[int] = []

    @app.batch_task(size=100, within=LONG)
    async def note(rows: list[int]) -> None:
        seen.append(len(rows))

    @app.task
    async def plain(n: int) -> int:
        return n

    @app.task(queue="other")
    async def other(n: int) -> int:
        return n

    async with working(app, concurrency=1):
        for n in range(5):
            await note.aenqueue(n)
            assert await (await plain.aenqueue(n)).aresult(timeout=PATIENCE) == n
            assert await (await other.aenqueue(n)).aresult(timeout=PATIENCE) == n
        assert seen == []
    assert (await counts(app)).ready == 5
    await drain(app)
    assert seen == [5]


async def test_partitions_fill_one_batch(app: Conveyor) -> None:
    """Items of all partitions of a queue come into the same batches."""
    app.queue("spread", partitions=4)
    seen: list[int] = []

    @app.batch_task(size=40, within=LONG, queue="spread")
    async def note(rows: list[int]) -> None:
        seen.append(len(rows))

    await app.aenqueue_many(note.s(n) for n in range(80))
    await drain(app)
    assert seen == [40, 40]


# -- outcomes ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("A181")
@pytest.mark.leaves_keys("a dead letter stays")
@pytest.mark.parametrize("kind", ["loop", "thread", "process"])
async def test_only_the_items_that_failed_are_tried_again(app: Conveyor, kind: str) -> None:
    """`BatchFailed` retries the items that it names, each with its own count; the others are done, with their results."""
    seen: list[list[tuple[int, int]]] = []

    def some(rows: list[Row], context: Context = current()) -> list[int]:
        seen.append([(row.id, item.attempt) for row, item in zip(rows, context.items, strict=True)])
        failed: dict[int, BaseException] = {
            at: LookupError(f"no {row.id}") for at, row in enumerate(rows) if row.id < 0
        }
        if failed:
            raise BatchFailed(failed, results=[row.id for row in rows])
        return [row.id for row in rows]

    async def asome(rows: list[Row], context: Context = current()) -> list[int]:
        return some(rows, context)

    if kind == "process":
        task: Any = batch_app.declare(app)
        app.task(name="after", queue="after")(batch_app.after.function)
    else:
        task = app.batch_task(size=4, within=LONG, retry=QUICK)(asome if kind == "loop" else some)
    row = batch_app.Row if kind == "process" else Row
    jobs = [await task.aenqueue(row(n)) for n in (1, -2, 3, 4)]
    await drain(app, reference="support.batch_app:app")

    with pytest.raises(JobFailed, match="no -2") as caught:
        await jobs[1].aresult(timeout=PATIENCE)
    assert caught.value.type == "LookupError"
    found = await results([jobs[0], jobs[2], jobs[3]])
    assert [one[0] if kind == "process" else one for one in found] == [1, 3, 4]
    if kind != "process":
        assert seen == [[(1, 1), (-2, 1), (3, 1), (4, 1)], [(-2, 2)]]
    [dead] = (await app.client.arun(inspection.list_jobs(app.client.keys("default"), "dead", 0, 10))).rows
    assert [error.attempt for error in dead.state.failures_list()] == [1, 2]


@pytest.mark.leaves_keys("a dead letter stays")
async def test_another_error_is_that_of_every_item(app: Conveyor) -> None:
    """Any other error fails all items; each is tried again by its own policy and its own count."""
    seen: list[list[int]] = []

    @app.batch_task(size=3, within=LONG, retry=QUICK)
    async def fail(rows: list[int]) -> None:
        seen.append(sorted(rows))
        if len(seen) == 1:
            raise ConnectionError("away")

    jobs = [await fail.aenqueue(0), await fail.options(retry=1).aenqueue(1), await fail.aenqueue(2)]
    await drain(app)

    assert seen[0] == [0, 1, 2]
    assert sorted(n for rows in seen[1:] for n in rows) == [0, 2]
    assert [await job.astatus() for job in jobs] == ["done", "dead", "done"]


async def test_an_item_may_choose_when_it_runs_again(app: Conveyor) -> None:
    """A `RetryIn` of one item counts an attempt, a `Snooze` of another none; raised by the batch they are for all."""
    seen: list[list[tuple[int, int]]] = []

    @app.batch_task(size=3, within=LONG, retry=Retry(attempts=2))
    async def some(rows: list[int], context: Context = current()) -> None:
        seen.append([(n, item.attempt) for n, item in zip(rows, context.items, strict=True)])
        if len(seen) == 1:
            raise BatchFailed({0: RetryIn("10ms"), 1: Snooze("10ms")})
        if len(seen) == 2:
            raise Snooze("10ms")

    jobs = [await some.aenqueue(n) for n in range(3)]
    await drain(app)

    assert await results(jobs) == [None] * 3
    runs = Counter(n for rows in seen for n, _ in rows)
    assert runs[2] == 1
    assert runs[0] + runs[1] >= 5
    assert [max(attempt for rows in seen for n, attempt in rows if n == one) for one in range(3)] == [
        runs[0], runs[1], 1
    ]  # fmt: skip


@pytest.mark.leaves_keys("dead letters stay")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1], "returned 1 results for a batch of 3 items"),
        ("abc", r"returned 'abc' \(str\) for a batch of 3 items"),
        (BatchFailed({7: ValueError()}), "names item 7, and the batch had 3 items"),
    ],
)
async def test_an_answer_that_does_not_fit_ends_the_items(app: Conveyor, answer: Any, words: str) -> None:
    """Items that cannot be told apart are dead letters at once, with an error that says why: their work is done."""
    seen: list[int] = []

    @app.batch_task(size=3, within=LONG)
    async def some(rows):  # type: ignore[no-untyped-def]
        seen.append(len(rows))
        if isinstance(answer, Exception):
            raise answer
        return answer

    jobs = [await some.aenqueue(n) for n in range(3)]
    await drain(app)

    assert seen == [3]
    for job in jobs:
        with pytest.raises(JobFailed, match=words):
            await job.aresult(timeout=PATIENCE)


@pytest.mark.leaves_keys("dead letters stay")
async def test_a_result_of_a_wrong_type_is_that_item_s_alone(app: Conveyor) -> None:
    """One result that cannot be stored makes a dead letter of its item; the others are done."""

    @app.batch_task(size=2, within=LONG)
    async def some(rows: list[int]) -> list[int]:
        return ["no", 2]  # type: ignore[list-item]

    jobs = [await some.aenqueue(n) for n in range(2)]
    await drain(app)
    assert [await job.astatus() for job in jobs] == ["dead", "done"]


@pytest.mark.row("A181")
@pytest.mark.leaves_keys("dead letters stay")
async def test_an_item_that_cannot_be_read_is_left_out(app: Conveyor, url: str) -> None:
    """Arguments that do not fit make a dead letter of their job; the rest of the batch runs without it."""
    seen: list[list[Row]] = []

    @app.batch_task(name="some", size=3, within=LONG)
    async def some(rows: list[Row]) -> None:
        seen.append(rows)

    other = Conveyor(url)
    bad = await other.external_task("some").aenqueue({"id": "x"})
    jobs = [await some.aenqueue(Row(n)) for n in range(3)]
    await drain(app)

    assert await results(jobs) == [None] * 3
    assert [[row.id for row in rows] for rows in seen] == [[0, 1, 2]]
    with pytest.raises(JobFailed, match="do not fit"):
        await bad.aresult(timeout=PATIENCE)
    await other.aclose()


# -- time, cancellation, stop -----------------------------------------------------------------------------------------


@pytest.mark.leaves_keys("dead letters stay")
@pytest.mark.parametrize("kind", ["loop", "thread", "process"])
async def test_a_time_limit_is_that_of_the_call(app: Conveyor, tmp_path: Path, kind: str) -> None:
    """A batch that outlives the limit is stopped, and each of its items has failed by its time limit."""

    @app.batch_task(name="loop", size=3, within=LONG, timeout="50ms", retry=1)
    async def on_loop(rows: list[Row]) -> None:
        await asyncio.sleep(PATIENCE)

    @app.batch_task(name="thread", size=3, within=LONG, timeout="50ms", retry=1)
    def on_thread(rows: list[Row], context: Context = current()) -> None:
        while not context.cancelled:
            threading.Event().wait(0.005)

    batch_app.declare(app, size=3, timeout="1s", retry=1)
    app.task(name="after", queue="after")(batch_app.after.function)
    task = app.tasks["apart" if kind == "process" else kind]
    row = batch_app.Row if kind == "process" else Row
    jobs = [await task.aenqueue(row(60, str(tmp_path / "begun"))) for _ in range(3)]
    await drain(app, reference="support.batch_app:app")

    for job in jobs:
        with pytest.raises(JobFailed, match="time limit") as caught:
            await job.aresult(timeout=PATIENCE)
        assert caught.value.type == "TimeoutError"


async def test_one_item_is_cancelled_before_its_batch_runs(app: Conveyor) -> None:
    """A job that waits for others is cancelled as one that has not started; the others run without it."""
    seen: list[list[int]] = []

    @app.batch_task(size=3, within=LONG)
    async def note(rows: list[int]) -> None:
        seen.append(rows)

    async with working(app):
        first, second = await note.aenqueue(0), await note.aenqueue(1)
        await until_counts(app, lambda now: now.leased >= 2)
        assert await first.acancel()
        with pytest.raises(JobCancelled):
            await first.aresult(timeout=PATIENCE)
        jobs = [second, await note.aenqueue(2), await note.aenqueue(3)]
        await results(jobs)
    assert seen == [[1, 2, 3]]


@pytest.mark.row("A181")
@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_one_item_is_cancelled_while_its_batch_runs(app: Conveyor, kind: str) -> None:
    """The batch goes on and sees it in that item's context; when all of its items are cancelled, it is stopped."""
    flags: list[bool] = []
    begun = threading.Event()

    def look(context: Context) -> bool:
        begun.set()
        flags[:] = [item.cancelled for item in context.items]
        return context.cancelled

    async def on_loop(rows: list[int], context: Context = current()) -> None:
        while not look(context):
            await asyncio.sleep(0.005)

    def on_thread(rows: list[int], context: Context = current()) -> None:
        while not look(context):
            threading.Event().wait(0.005)
        context.check()

    task = app.batch_task(size=2, within=LONG)(on_loop if kind == "loop" else on_thread)
    async with working(app):
        jobs = [await task.aenqueue(n) for n in range(2)]
        await auntil(begun.is_set)
        await jobs[1].acancel()
        await auntil(lambda: flags == [False, True])
        assert await jobs[1].astatus() == "leased"
        await jobs[0].acancel()
        for job in jobs:
            with pytest.raises(JobCancelled):
                await job.aresult(timeout=PATIENCE)


@pytest.mark.row("A181")
async def test_an_item_that_has_expired_is_left_out(app: Conveyor) -> None:
    """Items that expire while their batch gathers do not run, and are cancelled."""
    seen: list[list[int]] = []

    @app.batch_task(size=2, within="200ms")
    async def note(rows: list[int]) -> None:
        seen.append(rows)

    async with working(app):
        expired = await note.options(expires="50ms").aenqueue(0)
        with pytest.raises(JobCancelled):
            await expired.aresult(timeout=PATIENCE)
        assert seen == []
        kept = await note.aenqueue(1)
        await kept.aresult(timeout=PATIENCE)
    assert seen == [[1]]


@pytest.mark.row("A181")
@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_a_half_full_batch_goes_back_at_a_stop(app: Conveyor, kind: str) -> None:
    """Items that wait for others when the worker is told to stop go back in their order, without an attempt."""
    seen: list[list[tuple[int, int]]] = []

    def note(rows: list[int], context: Context = current()) -> None:
        seen.append([(n, item.attempt) for n, item in zip(rows, context.items, strict=True)])

    async def anote(rows: list[int], context: Context = current()) -> None:
        note(rows, context)

    task = app.batch_task(size=10, within=LONG)(anote if kind == "loop" else note)
    await app.aenqueue_many(task.s(n) for n in range(5))
    async with working(app, grace=PATIENCE):
        await until_counts(app, lambda now: now.leased >= 5)
    assert seen == []
    assert (await counts(app)).ready == 5
    await drain(app)
    assert seen == [[(n, 1) for n in range(5)]]


async def test_batches_that_wait_for_a_thread_go_back_at_a_stop(app: Conveyor) -> None:
    """A full batch that no thread has begun goes back whole, while the one that runs ends."""
    go, seen = threading.Event(), list[list[int]]()

    @app.batch_task(size=2, within=LONG)
    def note(rows: list[int]) -> None:
        seen.append(rows)
        go.wait(PATIENCE)

    worker = Worker(app, threads=1, grace=PATIENCE)
    running = asyncio.create_task(worker.run())
    await app.aenqueue_many(note.s(n) for n in range(2))
    await auntil(lambda: seen)
    consumer = worker.consumers[0]
    await app.aenqueue_many(note.s(n) for n in range(2, 4))
    consumer.has_more = True
    consumer._send_turn(10)  # as a worker does that leases ahead
    await auntil(lambda: len(consumer.held) == 4)
    worker.stop()
    await auntil(lambda: len(consumer.held) == 2)
    go.set()
    assert await asyncio.wait_for(running, PATIENCE) == 0
    assert seen == [[0, 1]]
    go.set()
    await drain(app)
    assert seen == [[0, 1], [2, 3]]


@pytest.mark.row("A181")
async def test_what_was_acknowledged_early_runs_at_a_stop(app: Conveyor) -> None:
    """Items of ack="early" cannot go back: a half-full batch of them runs when the worker is told to stop."""
    seen: list[int] = []

    @app.batch_task(size=10, within=LONG, ack="early")
    async def note(rows: list[int]) -> None:
        seen.extend(rows)

    await app.aenqueue_many(note.s(n) for n in range(3))
    async with working(app, grace=PATIENCE):
        await until_counts(app, lambda now: not now.ready + now.leased)
        assert seen == []
    assert seen == [0, 1, 2]


@pytest.mark.row("A181")
async def test_what_outlives_the_grace_goes_back(app: Conveyor) -> None:
    """A batch that runs beyond the grace is cut off, and its items run again with the next attempt."""
    attempts: list[list[int]] = []

    @app.batch_task(size=2, within=LONG)
    async def note(rows: list[int], context: Context = current()) -> None:
        attempts.append([item.attempt for item in context.items])
        if len(attempts) == 1:
            await asyncio.sleep(PATIENCE)

    await app.aenqueue_many(note.s(n) for n in range(2))
    async with working(app, grace=0.05):
        await auntil(lambda: attempts)
    await drain(app)
    assert attempts == [[1, 1], [2, 2]]


@pytest.mark.leaves_keys("dead letters stay")
async def test_a_thread_that_does_not_end_has_timed_out(
    app: Conveyor, slot: ChildSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of a batch whose thread outlives the limit have failed by it when the process is replaced; they do not go back."""
    monkeypatch.setattr(executor, "AFTER_TIMEOUT", 0.02)
    go = threading.Event()

    @app.batch_task(size=2, within=LONG, timeout="20ms", retry=1)
    def note(rows: list[int]) -> None:
        go.wait(PATIENCE)

    jobs = [await note.aenqueue(n) for n in range(2)]
    worker = Worker(app, slot=slot, grace=PATIENCE)
    assert await asyncio.wait_for(worker.run(), PATIENCE) == RECYCLE
    go.set()
    assert [await job.astatus() for job in jobs] == ["dead", "dead"]
    for job in jobs:
        with pytest.raises(JobFailed, match="time limit"):
            await job.aresult(timeout=PATIENCE)


@pytest.mark.row("A181")
async def test_an_item_whose_lease_is_lost_is_not_reported(app: Conveyor) -> None:
    """Jobs of a batch that another worker took over are not settled here; they run there."""
    runs: list[list[int]] = []

    @app.batch_task(size=3, within=LONG)
    async def note(rows: list[int]) -> None:
        runs.append(rows)
        if len(runs) == 1:
            from conveyor.store import operations

            consumer = worker.consumers[0]
            await app.client.arun(operations.reap(consumer.keys, consumer.identity, crashed=False))
            consumer.schedule()
            consumer.has_more = True
            await asyncio.sleep(PATIENCE)

    jobs = [await note.aenqueue(n) for n in range(3)]
    async with working(app) as worker:
        await results(jobs)
    assert [sorted(rows) for rows in runs] == [[0, 1, 2], [0, 1, 2]]
    assert await audit(app) == []


# -- crashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "thread"])
async def test_every_item_of_a_batch_that_runs_is_seen(app: Conveyor, slot: ChildSlot, kind: str) -> None:
    """The supervisor sees all items as executed while their batch is, none that only waits for others, and none afterwards."""
    seen: list[tuple[list[str], list[str]]] = []

    def look(rows: list[int]) -> None:
        snapshot = slot.running_snapshot()
        assert snapshot is not None
        seen.append(snapshot.blame(ids, fault=False))

    async def alook(rows: list[int]) -> None:
        look(rows)
        await asyncio.sleep(0)
        look(rows)

    task = app.batch_task(size=3, within=LONG)(alook if kind == "loop" else look)
    worker = Worker(app, slot=slot)
    ids: list[str] = []
    jobs = [await task.aenqueue(n) for n in range(5)]
    ids += [split(job.id)[1] for job in jobs]
    running = asyncio.create_task(worker.run())
    await results(jobs[:3])
    found = slot.running_snapshot()
    worker.stop()
    assert await asyncio.wait_for(running, PATIENCE) == 0
    assert seen == [(ids[:3], [])] * (2 if kind == "loop" else 1)
    assert found is not None
    assert found.blame(ids, fault=False) == ([], [])
    await asyncio.to_thread(app.queue("default").purge)


@pytest.mark.row("A181")
@pytest.mark.leaves_keys("a dead letter stays")
async def test_a_process_that_dies_is_charged_to_its_items_which_run_alone(app: Conveyor, tmp_path: Path) -> None:
    """Of a batch whose process dies each item comes back alone; only the one that ends it again is dead."""
    task = batch_app.declare(app, retry=Retry(max_crashes=3))
    app.task(name="after", queue="after")(batch_app.after.function)
    jobs = [await task.aenqueue(batch_app.Row(n)) for n in (1, 2, 13, 4)]
    await drain(app, reference="support.batch_app:app")

    with pytest.raises(JobFailed, match="crashed 3 times"):
        await jobs[2].aresult(timeout=PATIENCE)
    found = await results([jobs[0], jobs[1], jobs[3]])
    assert [(one[0], one[1], one[2]) for one in found] == [(1, 1, 2), (2, 1, 2), (4, 1, 2)]


@pytest.mark.row("A8")
def test_a_crash_is_charged_to_the_items_of_the_batch(url: str, tmp_path: Path) -> None:
    """One item of a batch kills its worker: all of that batch run alone then, and the gathering ones have no crash."""
    with worker_processes(url, tmp_path, lease="10s") as one:
        one.start(processes=1, concurrency=10)
        waiting = one.app.enqueue_many(one.tasks.waiting.s([n, 0]) for n in range(100, 103))
        wait(lambda: one.counts().leased == 3)
        jobs = one.app.enqueue_many(one.tasks.gathered.s([n, 13 if n == 2 else 0]) for n in range(4))
        wait(lambda: one.counts().dead == 1)
        for job in [jobs[0], jobs[1], jobs[3]]:
            job.result(timeout=PATIENCE)
        starts = one.starts()
        assert len(starts[2]) == 3
        assert all(len(starts[n]) > 1 for n in (0, 1, 3))  # they came back with it
        keys = one.app.client.keys("default")
        states = [one.app.client.execute("HGET", keys.state, split(job.id)[1], key=keys.state) for job in waiting]
        assert all(state is None or state.split()[2] == b"0" for state in states)
        assert all(n not in starts for n in (100, 101, 102))
        with pytest.raises(JobFailed, match="SIGSEGV"):
            jobs[2].result(timeout=PATIENCE)


# -- around it --------------------------------------------------------------------------------------------------------


async def test_what_a_batch_sees_of_itself(app: Conveyor) -> None:
    """`current()` is the context of the call, with those of its items; each item spawns for itself, and the batch cannot."""
    seen: list[Any] = []

    @app.task(queue="after")
    async def after(n: int) -> int:
        return n

    @app.batch_task(size=2, within=LONG, retry=QUICK)
    async def some(rows: list[int], *, context: Context = current()) -> None:
        assert current() is context
        items = context.items
        seen.append((context.task, context.job_id == items[0].job_id, [item.job_id for item in items]))
        seen.append([item.headers.get("trace") for item in items])
        with pytest.raises(ConfigurationError, match="items"):
            context.spawn(after.s(1))
        children.extend(item.spawn(after.s(n)) for n, item in zip(rows, items, strict=True))
        if items[0].attempt == 1:
            raise BatchFailed({0: ValueError("once")})

    children: list[Job[int]] = []
    jobs = [await some.options(headers={"trace": str(n)}).aenqueue(n) for n in range(2)]
    await drain(app)

    assert seen[:2] == [(some.name, True, [job.id for job in jobs]), ["0", "1"]]
    assert len(children) == 3  # the first attempt of item 0 failed, so what it spawned is nowhere
    assert [await one.aresult(timeout=PATIENCE) for one in children[1:]] == [1, 0]


async def test_a_middleware_wraps_the_batch_once(app: Conveyor) -> None:
    """`run` is called once for a call of the function, and an error that it raises is that of all items; events are one an item."""
    calls: list[int] = []
    events: Counter[str] = Counter()

    @app.middleware
    async def count(context: Context, call_next: Callable[..., Awaitable[Any]]) -> Any:
        calls.append(len(context.items))
        if len(calls) == 1:
            raise ValueError("not yet")
        return await call_next()

    @app.on("started")
    @app.on("done")
    def heard(event: Event) -> None:
        events[type(event).__name__] += 1

    @app.batch_task(size=3, within=LONG, retry=QUICK)
    def on_thread(rows: list[int]) -> list[int]:
        return rows

    jobs = [await on_thread.aenqueue(n) for n in range(3)]
    await drain(app)

    assert await results(jobs) == [0, 1, 2]
    assert calls[0] == 3
    assert sum(calls) == 6
    assert events == {"JobStarted": 6, "JobDone": 3}


@pytest.mark.parametrize("kind", ["loop", "process"])
async def test_limits_count_items(app: Conveyor, kind: str) -> None:
    """A `Concurrency` bounds the items of all batches that run; a rate pays for each item, and an item tells its true cost."""
    options: dict[str, Any] = {"limits": [Concurrency(3), Rate(1000, "1h", cost="rows.id")]}

    async def cost(rows: list[Row], context: Context = current()) -> list[int]:
        for row, item in zip(rows, context.items, strict=True):
            item.charge(2 * row.id)
        with pytest.raises(ConfigurationError, match="items"):
            context.charge(1)
        return [len(rows)] * len(rows)

    if kind == "process":
        task: Any = batch_app.declare(app, size=4, within="200ms", **options)
        app.task(name="after", queue="after")(batch_app.after.function)
    else:
        task = app.batch_task(name="apart", size=4, within="200ms", **options)(cost)
    row = batch_app.Row if kind == "process" else Row
    jobs = [await task.aenqueue(row(n)) for n in range(1, 7)]
    async with working(app, reference="support.batch_app:app"):
        found = await results(jobs)
    await drain(app, reference="support.batch_app:app")  # what the items spawned, of which the worker may have run none
    assert [one[1] if kind == "process" else one for one in found] == [3] * 6
    [rate] = [limit for limit in await app.limits.alist("default") if limit.name == "apart.rate"]
    assert rate.used == 2 * sum(range(1, 7))


async def test_sealed_items_run_in_batches(url: str) -> None:
    """Items that are encrypted, or lie in a store, are opened before they join their batch."""
    seen: list[list[int]] = []
    async with Conveyor(url, keys={"k": "secret of at least 16 bytes"}, encrypt=True) as app:

        @app.batch_task(size=4, within=LONG)
        async def note(rows: list[int]) -> list[int]:
            seen.append(rows)
            return rows

        jobs = [await note.aenqueue(n) for n in range(4)]
        await drain(app)
        assert await results(jobs) == [0, 1, 2, 3]
    assert seen == [[0, 1, 2, 3]]


async def test_a_plain_list_feeds_a_batch_task(app: Conveyor, redis: Any) -> None:
    """Entries that other programs push onto a plain list run in batches."""
    seen: list[list[Row]] = []

    @app.batch_task(size=3, within="200ms", queue="foreign")
    async def note(rows: list[Row]) -> None:
        seen.append(rows)

    app.plain_list("foreign", task=note)
    redis.rpush("foreign", *(f'{{"id": {n}}}' for n in range(3)))
    async with working(app):
        await auntil(lambda: sum(map(len, seen)) == 3)
    assert sorted(row.id for rows in seen for row in rows) == [0, 1, 2]


async def test_its_jobs_are_seen_as_any_other(app: Conveyor) -> None:
    """A job that waits for others is leased; a finished one shows its attempt, and the counters count items."""

    @app.batch_task(name="note", size=2, within=LONG)
    async def note(rows: list[int]) -> None: ...

    async with working(app):
        first = await note.aenqueue(1)
        await until_counts(app, lambda now: now.leased >= 1)
        assert await first.astatus() == "leased"
        second = await note.aenqueue(2)
        await results([first, second])
        assert (await first.ainfo()).status == "done"
    assert await note([3]) is None


class Wide(TypedDict):
    place: str


def _list(rows: list[int]) -> None: ...
def _wide(rows: list[Wide]) -> None: ...
def _two(rows: list[int], more: int) -> None: ...
def _none() -> None: ...
def _one(row: int) -> None: ...
def _by_name(*, rows: list[int]) -> None: ...
def _rest(*rows: int) -> None: ...
def _default(rows: list[int] = []) -> None: ...  # noqa: B006
def _number(rows: list[int]) -> int: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("options", "function", "words"),
    [
        ({"size": 0, "within": 1}, _list, "from 1 to 1,000, not 0"),
        ({"size": 1001, "within": 1}, _list, "from 1 to 1,000"),
        ({"size": True, "within": 1}, _list, "whole number"),
        ({"size": "5", "within": 1}, _list, "whole number"),
        ({"size": 5, "within": 0}, _list, "greater than zero"),
        ({"size": 5, "within": -1}, _list, "within"),
        ({"size": 5, "within": "soon"}, _list, "within"),
        ({"size": 5, "within": 1, "group_by": "a b"}, _list, "name of a field"),
        ({"size": 5, "within": 1, "group_by": 3}, _list, "name of a field"),
        ({"size": 5, "within": 1, "group_by": "tenant"}, _list, "have no fields"),
        ({"size": 5, "within": 1, "group_by": "tenant"}, _wide, "have place"),
        ({"size": 5, "within": 1}, _two, "takes exactly one list"),
        ({"size": 5, "within": 1}, _none, "takes nothing"),
        ({"size": 5, "within": 1}, _one, "must be a list of the items"),
        ({"size": 5, "within": 1}, _by_name, "takes exactly one list"),
        ({"size": 5, "within": 1}, _rest, "takes exactly one list"),
        ({"size": 5, "within": 1}, _default, "takes exactly one list"),
        ({"size": 5, "within": 1}, _number, "a list with one result per item, or None, not int"),
        ({"size": 5, "within": 1, "run_in": "thread"}, batch_app.after.function, "exactly one list|needs a plain"),
    ],
)
def test_a_wrong_declaration_is_refused(app: Conveyor, options: dict[str, Any], function: Any, words: str) -> None:
    """A size, a time, a field or a function that cannot work raises at import, and says what to write."""
    with pytest.raises(ConfigurationError, match=words):
        app.batch_task(**options)(function)
    assert not app.tasks


def test_a_wrong_item_is_refused_before_it_is_stored(app: Conveyor) -> None:
    """`enqueue` takes one item: a list of them, or one of another type, is refused."""

    @app.batch_task(size=5, within=1)
    def note(rows: list[Row]) -> None: ...

    for wrong in ([Row(1)], 7, "x"):
        with pytest.raises(PayloadError, match="Nothing was enqueued"):
            note.enqueue(wrong)  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="Nothing was enqueued"):
        note.enqueue(Row(1), Row(2))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="soze"):
        app.batch_task(size=5, within=1, soze=3)  # type: ignore[call-arg]
    for wrong_errors in ([ValueError()], {"a": ValueError()}, {-1: ValueError()}, {0: "no"}):
        with pytest.raises(ConfigurationError, match="BatchFailed takes"):
            BatchFailed(wrong_errors)  # type: ignore[arg-type]
    assert len(app.queue("default")) == 0


async def test_equal_items_are_one_job(app: Conveyor) -> None:
    """`unique`, `debounce` and `throttle` compare items by a field or whole; a key ends with its item, and the batch has each once."""
    seen: dict[str, list[list[Row]]] = {"keyed": [], "latest": [], "first": []}

    @app.batch_task(size=10, within="20ms", unique=Unique(by=("rows.id",)))
    async def keyed(rows: list[Row]) -> None:
        seen["keyed"].append(rows)

    @app.batch_task(size=10, within="20ms", debounce=Debounce("50ms", by="rows.id"))
    async def latest(rows: list[Row]) -> None:
        seen["latest"].append(rows)

    @app.batch_task(size=10, within="20ms", throttle=Throttle("1h", by="rows.id"))
    async def first(rows: list[Row]) -> None:
        seen["first"].append(rows)

    jobs = [await keyed.aenqueue(Row(n % 2, "a")) for n in range(4)]
    assert [job.duplicate for job in jobs] == [False, False, True, True]
    for tenant in ("a", "b"):
        await latest.aenqueue(Row(1, tenant))
        await first.aenqueue(Row(1, tenant))
    async with working(app):
        await auntil(lambda: all(seen.values()))
        assert [sorted(row.id for row in rows) for rows in seen["keyed"]] == [[0, 1]]
        assert seen["latest"] == [[Row(1, "b")]]
        assert seen["first"] == [[Row(1, "a")]]
        await jobs[0].aresult(timeout=60)
        assert not (await keyed.aenqueue(Row(0, "c"))).duplicate
        await auntil(lambda: len(seen["keyed"]) == 2)
    with pytest.raises(ConfigurationError, match="takes a Unique"):

        @app.batch_task(size=1, within="1s", unique="id")  # type: ignore[arg-type]
        async def wrong(rows: list[Row]) -> None: ...
