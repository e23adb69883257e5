"""Sealed payloads of jobs: they run where the keys are, and are set aside with their bytes where they are not."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import pytest_asyncio

from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, JobFailed, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import current
from conveyor.jobs.core import core_of
from conveyor.messaging.retry import Retry
from support.queue_snapshot import kept_result
from support.running_worker import drain

FIRST, SECOND, THIRD = "first-" * 6, "second-" * 6, "third-" * 6
OLD, NEW = {"2026-10": FIRST}, {"2026-11": SECOND, "2026-10": FIRST}
ran: list[object] = []


def make(url: str, **options: object) -> Conveyor:
    """An app with the same tasks, and other settings."""
    app = Conveyor(url, **options)

    @app.task(name="shop.add")
    async def add(a: int, b: int) -> int:
        ran.append((a, b))
        return a + b

    @app.task(name="shop.fail", retry=Retry(attempts=2, backoff="1ms"))
    def fail(word: str) -> None:
        raise ValueError(f"no {word}")

    @app.task(name="shop.spawn")
    async def spawn(a: int) -> None:
        current().spawn(add.s(a, a))

    @app.task(name="shop.early", ack="early")
    async def early(word: str) -> None:
        ran.append(word)

    return app


@pytest_asyncio.fixture
async def made(url):
    """Make apps on the emptied server; all are closed and their queues emptied at the end."""
    ran.clear()
    apps = []

    def one(**options):
        apps.append(make(url, **options))
        return apps[-1]

    yield one
    for app in apps:
        for queue in ("default", *core_of(app).plain_lists):
            one = core_of(app).plain_lists.get(queue) or app.queue(queue)
            await one.apurge()
            await one.apurge(dead=True)
        await app.aclose()


JOBS, STATE = "conveyor:{default}:jobs", "conveyor:{default}:state"


async def letters(app: Conveyor, queue: str = "default") -> list[Any]:
    """The dead letters of a queue."""
    held = core_of(app).plain_lists.get(queue) or app.queue(queue)
    return [letter async for letter in held.adead_letters()]


@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
async def test_sealed_jobs_run_and_answer(made, redis, encrypt):
    """With the same keys on both sides jobs run, results and errors come back, and Redis holds no bare payload."""
    app = made(keys=OLD, encrypt=encrypt)
    jobs = [await app.tasks["shop.add"].aenqueue(1, 2), await app.tasks["shop.add"].options(id="mine").aenqueue(3, 4)]
    jobs += await app.aenqueue_many(app.tasks["shop.add"].s(n, n) for n in range(5))
    failed = await app.tasks["shop.fail"].aenqueue("luck")
    bodies = [data.split(b"\n", 2)[2] for data in redis.hvals(JOBS)]
    assert len(bodies) == 8
    assert all(body.startswith(b"\x01\x01") for body in bodies)
    assert encrypt is not any(b'"word":"luck"' in body for body in bodies)

    await drain(app)

    assert [await job.aresult("1s") for job in jobs] == [3, 7, 0, 2, 4, 6, 8]
    with pytest.raises(JobFailed, match="ValueError: no luck") as caught:
        await failed.aresult("1s")
    assert "Traceback" in caught.value.traceback
    [state] = redis.hvals(STATE)
    record = kept_result(redis, app.client.keys("default"), jobs[0].id.split(":")[1])
    assert b"no luck" not in state
    assert b"ValueError" in state
    assert b'"packed":"' in record
    assert [letter.error for letter in (await letters(app))] == ["ValueError: no luck"]


@pytest.mark.row("D1", "I17")
@pytest.mark.parametrize(
    ("code", "producer", "worker", "advice"),
    [
        ("E38", {"keys": OLD}, {}, "this program has no keys"),
        ("E39", {"keys": {"2026-12": THIRD}}, {"keys": NEW}, r"does not know \(it has 2026-11, 2026-10\)"),
        ("E40", {"keys": {"2026-10": THIRD}}, {"keys": OLD}, "does not match"),
        ("E40", {"keys": {"2026-10": THIRD}, "encrypt": True}, {"keys": OLD}, "does not match"),
        ("E41", {}, {"keys": OLD}, "is not sealed"),
        ("E41", {"compress": 1}, {"keys": OLD}, "is not sealed"),
    ],
)
async def test_what_cannot_be_opened_is_set_aside(made, redis, caplog, code, producer, worker, advice):
    """It is a dead letter after one start, with its bytes, a code, and one line of error in the log; redriven, it runs."""
    sender, receiver = made(**producer), made(**worker)
    task = sender.tasks["shop.add"]
    job = await task.aenqueue(10**9, 2)
    early = await sender.tasks["shop.early"].aenqueue("a" * 40)
    before = sorted(redis.hvals(JOBS))
    with caplog.at_level(logging.WARNING, "conveyor"):
        await drain(receiver)

    assert ran == []
    assert len([r for r in caplog.records if code in r.getMessage()]) == len(caplog.records) == 2
    assert sorted(redis.hvals(JOBS)) == before
    found = await letters(receiver)
    assert {letter.id for letter in found} == {job.id, early.id}
    assert all(letter.attempts == 1 and f"{code} " in letter.error for letter in found)
    with pytest.raises(JobFailed, match=advice):
        await receiver.job(job.id).aresult("1s")

    assert await sender.queue("default").aredrive() == 2
    await drain(sender)
    assert await job.aresult("1s") == 10**9 + 2
    assert sorted(ran, key=str) == [(10**9, 2), "a" * 40]


async def test_spawned_jobs_are_sealed(made, redis):
    """A spawned job lies in the outbox sealed, for its own id."""
    app = made(keys=OLD, encrypt=True)
    await app.tasks["shop.spawn"].aenqueue(21)
    await drain(app)
    assert ran == [(21, 21)]
    assert await letters(app) == []


async def test_keys_are_rotated_without_losing_a_job(made, redis):
    """The first key seals and all open: jobs of the old key run after the change, new ones carry the new one."""
    old, new = made(keys=OLD), made(keys=NEW)
    jobs = [await app.tasks["shop.add"].aenqueue(1, 1) for app in (old, new)]
    assert sorted(data.split(b"\n", 2)[2][5:12] for data in redis.hvals(JOBS)) == [b"2026-10", b"2026-11"]

    await drain(new)

    assert [await new.job(job.id).aresult("1s") for job in jobs] == [2, 2]


@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
async def test_sealed_bytes_hold_nowhere_else(made, redis, encrypt):
    """Bytes moved to another id, task or queue do not match there."""
    app = made(keys=OLD, encrypt=encrypt)
    job = await app.tasks["shop.add"].aenqueue(1, 2)
    [envelope] = redis.hvals(JOBS)
    body = envelope.split(b"\n", 2)[2]
    keys = app.client.keys("default")
    bare = job.id.split(":")[1]
    opened = {"queue": "default", "task": "shop.add", "id": bare}
    assert app.sealing.unwrap(body, **opened) == b'{"a":1,"b":2}'
    for other in ({"queue": "vip"}, {"task": "shop.fail"}, {"id": "mine"}):
        with pytest.raises(PayloadError, match="E40"):
            app.sealing.unwrap(body, **opened | other)
    with pytest.raises(PayloadError, match="E40"):
        app.sealing.unwrap(body, **opened, kind=b"result")
    redis.hset(keys.jobs, bare, b"\nshop.early\n" + body)  # as somebody with access to Redis may
    await drain(app)
    assert ran == []
    assert "E40" in (await letters(app))[0].error


async def test_retry_and_redrive_keep_the_sealed_bytes(made, redis):
    """A payload is sealed once: neither a retry nor a redrive touches it."""
    app = made(keys=OLD, encrypt=True)
    await app.tasks["shop.fail"].aenqueue("luck")
    before = redis.hvals(JOBS)
    await drain(app)
    assert redis.hvals(JOBS) == before
    assert (await letters(app))[0].attempts == 2
    await app.queue("default").aredrive()
    assert redis.hvals(JOBS) == before
    await drain(app)
    assert redis.hvals(JOBS) == before


async def test_forged_result_is_refused(made, redis):
    """A result that somebody wrote into Redis without the keys is not believed."""
    app = made(keys=OLD)
    job = await app.tasks["shop.add"].aenqueue(1, 2)
    await drain(app)
    keys, bare = app.client.keys("default"), job.id.split(":")[1]
    genuine = kept_result(redis, keys, bare)
    for forged, code in (
        (b'{"status":"done","value":99}', "E41"),
        (genuine.replace(b'"packed":"AQE', b'"packed":"AQI'), "E15"),
    ):
        redis.set(keys.result(bare), forged, ex=60)
        with pytest.raises(PayloadError) as caught:
            await job.aresult("1s")
        assert caught.value.code == code


async def test_administration_shows_what_it_may(made, redis):
    """With the keys the payload and the error are shown, without them which key they need."""
    app = made(keys=OLD)
    job = await app.tasks["shop.fail"].aenqueue("luck")
    await drain(app)
    blind = await asyncio.to_thread(Admin(app.client).job, job.id)
    assert blind.payload.startswith("sealed with key 2026-10 (hmac): ")
    assert blind.errors[-1].message.startswith("sealed with key 2026-10")
    assert blind.errors[-1].type == "ValueError"
    seeing = await asyncio.to_thread(Admin(app.client, sealing=app.sealing).job, job.id)
    assert seeing.payload == '{"word":"luck"}'
    assert seeing.errors[-1].message == "no luck"


async def test_compressed_results_and_errors_need_no_settings(made, redis):
    """Without keys large results and errors are compressed, and anybody reads them."""
    app, other = made(compress=100), made()

    @app.task(name="talk", retry=1)
    async def talk(word: str, times: int) -> str:
        if times == 0:
            raise ValueError(word * 300)
        return word * times

    jobs = [await talk.aenqueue("ab", times) for times in (3000, 0)]
    await drain(app)
    kept = kept_result(redis, app.client.keys("default"), jobs[0].id.split(":")[1])
    assert len(kept.partition(b',"run":')[0]) < 200
    assert await other.job(jobs[0].id).aresult("1s") == "ab" * 3000
    with pytest.raises(JobFailed, match="ValueError: abab"):
        await other.job(jobs[1].id).aresult("1s")
    assert (await letters(other))[0].error.startswith("ValueError: abab")
    info = await asyncio.to_thread(Admin(other.client).job, jobs[0].id)
    assert info.result == '"' + "ab" * 3000 + '"'


async def test_plain_list_is_taken_only_when_told(made, redis):
    """Producers of a plain list cannot seal, so an app with keys refuses the list unless it is declared unsealed."""
    app = made(keys=OLD)
    with pytest.raises(ConfigurationError, match="sealed=False"):
        app.plain_list("foreign", task="shop.add")
    app.plain_list("foreign", task="shop.add", sealed=False)
    redis.rpush("foreign", b'{"a": 1, "b": 2}')
    await drain(app, queues={"foreign": 1})
    assert ran == [(1, 2)]
    redis.hset(app.client.keys("foreign").jobs, "forged", b'\nshop.early\n{"word":"x"}')
    redis.rpush(app.client.keys("foreign").ready[0], "forged")
    await drain(app, queues={"foreign": 1})
    assert ran == [(1, 2)]
    assert "E41" in (await letters(app, "foreign"))[0].error
