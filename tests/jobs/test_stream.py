"""Partial results: each part once and in order, for readers that are cut, through retries, lost replies and ends of all kinds."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py

from conveyor import Conveyor, JobNotFound, PayloadError, ResultExpired, Retry, current
from conveyor.errors import ConfigurationError
from conveyor.jobs import stream
from conveyor.jobs.stream import Part
from conveyor.store import streams
from conveyor.store.operations import Settlement
from support.app_fixtures import blocking_client, loop_app  # noqa: F401
from support.manual_worker import ManualWorker
from support.running_worker import drain, working
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil, until

STREAM = "conveyor:{default}:stream:"


async def read(job: Any, after: str | None = None) -> list[Part]:
    return [part async for part in job.astream(after)]


def values(parts: list[Part]) -> list[Any]:
    return [part.value for part in parts]


@pytest.mark.row("D351")
@pytest.mark.redis6
async def test_each_part_once_in_order_for_a_reader_that_is_cut(app: Conveyor, redis: redis_py.Redis) -> None:
    """10,000 parts are read once each and in order, though the reader is cut ten times and goes on from its last id."""

    @app.task
    async def write(count: int) -> int:
        for number in range(count):
            await current().emit(number)
        return count

    job = await write.aenqueue(10_000)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    cuts = sorted(random.Random(seed).sample(range(1, 10_000), 10))
    seen: list[Part] = []
    async with working(app):
        for cut in [*cuts, 20_000]:
            async for part in job.astream(after=seen[-1].id if seen else None):
                seen.append(part)
                if len(seen) == cut:
                    break
        assert values(seen) == list(range(10_000))
        assert {part.attempt for part in seen} == {1}
        assert await job.aresult() == 10_000
        assert values(await read(job, seen[9_990].id)) == list(range(9_991, 10_000))
    assert 0 < redis.pttl(STREAM + job._bare_id) <= 600_000
    await auntil(lambda: not redis.exists("conveyor:{default}:waiters"))


@pytest.mark.row("D351")
def test_a_reader_gets_a_part_by_push(client: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part reaches a blocking reader by a message, not by a question; repeats and late copies change nothing."""
    monkeypatch.setattr(stream, "CHECK_AGAIN", LATER)

    @client.task
    def work() -> None: ...

    job = work.enqueue()
    manual = ManualWorker(client)
    [id_] = manual.take()
    seen: queue.SimpleQueue[Part] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [seen.put(part) for part in job.stream()])
    reader.start()
    until(lambda: (redis.hget("conveyor:{default}:waiters", id_) or b"").startswith(b"*"))
    record = streams.write_parts(1, 1, [b'"a"'], 3)
    for _ in "original", "repeat":
        assert client.client.run(streams.emit(manual.keys, manual.worker, [(id_, record)])) == [True]
    assert seen.get(timeout=PATIENCE) == Part("1-1", "a", 1)
    manual.turn(0, Settlement("E", id_, 1000, streams.write_parts(1, 1, [b'"a"', b'"b"'], 3)), Settlement("D", id_))
    assert seen.get(timeout=PATIENCE) == Part("1-2", "b", 1)
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert client.client.run(streams.emit(manual.keys, manual.worker, [(id_, record)])) == [False]
    assert not redis.exists("conveyor:{default}:waiters")
    manual.leave()


@pytest.mark.row("D351")
async def test_attempts_are_told_apart(app: Conveyor) -> None:
    """A job that is tried again emits anew; what an attempt emitted right before its failure is there."""

    @app.task(retry=Retry(attempts=2, backoff="1ms", jitter=False))
    def fragile() -> None:
        current().emit(f"a{current().attempt}")
        current().emit(f"b{current().attempt}")
        if current().attempt == 1:
            raise ValueError

    job = await fragile.aenqueue()
    await drain(app)
    parts = await read(job)
    assert [(part.id, part.value, part.attempt) for part in parts] == [
        ("1-1", "a1", 1), ("1-2", "b1", 1), ("2-1", "a2", 2), ("2-2", "b2", 2),
    ]  # fmt: skip


async def test_parts_are_sealed(url: str, redis: redis_py.Redis) -> None:
    """With encryption no part is readable in Redis, and a part at another place is refused."""
    app = Conveyor(url, keys={"k1": "s" * 32}, encrypt=True)

    @app.task
    async def tell() -> None:
        for word in ("secret", "other"):
            await current().emit(word)

    async with app:
        job = await tell.aenqueue()
        await drain(app)
        key = STREAM + job._bare_id
        stored = redis.xrange(key)
        assert b"secret" not in repr(stored).encode()
        assert values(await read(job)) == ["secret", "other"]
        redis.delete(key)
        redis.xadd(key, {"v": stored[1][1][b"v"]}, id="1-1")
        redis.expire(key, 60)
        with pytest.raises(PayloadError, match="E40"):
            await read(job)


@pytest.mark.row("D352")
async def test_missing_parts_are_no_silence(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream keeps the newest parts; a reader that comes too late for others is told where to go on."""
    monkeypatch.setattr(streams, "MOST_PARTS", 5)

    @app.task
    async def write() -> None:
        for number in range(1, 13):
            await current().emit(number)
            await asyncio.sleep(0.001)

    job = await write.aenqueue()
    await drain(app)
    with pytest.raises(ResultExpired, match=r"job\.stream\(after='1-7'\)"):
        await read(job)
    assert values(await read(job, "1-7")) == [8, 9, 10, 11, 12]


async def test_a_job_that_emits_nothing_costs_nothing(app: Conveyor, redis: redis_py.Redis) -> None:
    """Jobs without parts send no command of streams and leave no key; reading them ends with them."""

    @app.task
    async def plain(n: int) -> int:
        return n

    async with working(app):
        redis.config_resetstat()
        jobs = [await plain.aenqueue(n) for n in range(20)]
        assert [await job.aresult() for job in jobs] == list(range(20))
        used = redis.info("commandstats")
    assert not {"cmdstat_xadd", "cmdstat_xrevrange", "cmdstat_xrange"} & set(used)
    assert await read(jobs[0]) == []
    assert not list(redis.scan_iter("*stream:*"))


async def test_bad_input_is_refused(app: Conveyor) -> None:
    """A value that cannot be stored, a batch, an end that was, an unknown job and an id that is none: clear errors."""
    errors: list[str] = []

    def attempt(act: Callable[[], object]) -> None:
        try:
            act()
        except (ConfigurationError, PayloadError) as error:
            errors.append(str(error))

    @app.task
    async def emit(n: int) -> None:
        attempt(lambda: current().emit(object()))
        attempt(lambda: current().emit("x" * 600_000))

    @app.batch_task(size=2, within="1ms")
    async def many(items: list[int]) -> None:
        attempt(lambda: current().emit(1))
        await current().items[0].emit(items[0])

    @app.task(ack="early")
    async def early() -> None:
        attempt(lambda: current().emit(1))

    job, item = await emit.aenqueue(1), await many.aenqueue(7)
    await early.aenqueue()
    await drain(app)
    assert sorted(text[:3] for text in errors if text[:1] == "E") == ["E04", "E21"] or len(errors) == 4
    assert any("current().items[0].emit" in text for text in errors)
    assert any('ack="early"' in text for text in errors)
    assert values(await read(item)) == [7]
    with pytest.raises(ConfigurationError, match="after"):
        job.astream("one")
    with pytest.raises(JobNotFound):
        await read(app.job("default:0000000000000000000000"))
