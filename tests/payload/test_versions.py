"""Versions of payloads of jobs: older ones are brought up to date, newer ones wait for a newer worker."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from conveyor.errors import JobFailed
from conveyor.ids import new_id
from conveyor.jobs.app import Conveyor
from conveyor.payload.records import EnvelopeOptions, write_envelope
from support.running_worker import counts, drain

KEYS = {"2026-11": "v" * 32}


@pytest.fixture
async def made(url: str) -> Any:
    """Apps as they were released one after the other."""
    apps: list[Conveyor] = []

    def one(release: int, upcast: Any = None, **options: Any) -> Conveyor:
        app = Conveyor(url, **options)
        apps.append(app)
        if release == 1:

            @app.task(name="charge")
            async def first(cents: int) -> list[Any]:
                return [1, cents]
        elif release == 2:

            @app.task(name="charge", version=2, upcast=upcast)
            async def second(amount: int, currency: str) -> list[Any]:
                return [2, amount, currency]
        else:

            @app.task(name="charge", version=3, upcast=upcast)
            async def third(price: dict[str, int]) -> list[Any]:
                return [3, price]

        return app

    yield one
    for app in apps:
        await app.queue("default").apurge()
        await app.queue("default").apurge(dead=True)
        await app.aclose()


def upcast(version: int, arguments: dict[str, Any]) -> dict[str, Any]:
    if version == 1:
        return {"amount": arguments["cents"], "currency": "EUR"}
    return {"price": {arguments["currency"]: arguments["amount"]}}


@pytest.mark.row("D3")
@pytest.mark.parametrize("options", [{}, {"keys": KEYS, "encrypt": True}], ids=["bare", "sealed"])
async def test_older_jobs_are_brought_up_step_by_step(made, redis, options):
    """A worker of version 3 runs jobs of versions 1, 2 and 3; the version is stored only when it is not 1."""
    apps = [made(1, **options), made(2, upcast, **options), made(3, upcast, **options)]
    calls = [(5,), (6, "USD"), ({"GBP": 7},)]
    jobs = [await app.tasks["charge"].aenqueue(*call) for app, call in zip(apps, calls, strict=True)]
    heads = sorted(data.split(b"\n")[1] for data in redis.hvals("conveyor:{default}:jobs"))
    assert heads == [b"charge", b'charge\t{"version":2}', b'charge\t{"version":3}']

    await drain(apps[2])

    assert [await apps[2].job(job.id).aresult("1s") for job in jobs] == [
        [3, {"EUR": 5}],
        [3, {"USD": 6}],
        [3, {"GBP": 7}],
    ]


@pytest.mark.row("D2", "D3")
async def test_newer_jobs_wait_and_use_no_attempt(made, caplog):
    """A job of a later version comes back untouched, and runs once a newer worker is there."""
    old, new = made(1), made(2, upcast)
    job = await new.tasks["charge"].aenqueue(6, "USD")
    with caplog.at_level(logging.WARNING):
        await drain(old)
    assert "E43 The payload of charge() has version 2, and this program knows 1 at most" in caplog.text
    assert (await counts(old)).scheduled == 1
    assert await job.astatus() == "scheduled"
    await new.client.arun(_promote(new, job.id))
    await drain(new)
    assert await job.aresult("1s") == [2, 6, "USD"]


@pytest.mark.row("D2", "D3")
async def test_newer_job_is_dead_after_a_day(made, redis):
    """After a day without a newer worker the job is a dead letter that names the needed version, and can be redriven."""
    old, new = made(1), made(2, upcast)
    job = await new.tasks["charge"].aenqueue(6, "USD")
    bare = job.id.split(":")[1]
    aged = _older(new_id(), 25 * 3_600_000)
    keys = old.client.keys("default")
    redis.hset(keys.jobs, aged, redis.hget(keys.jobs, bare))
    redis.hdel(keys.jobs, bare)
    redis.delete(keys.ready[0])
    redis.rpush(keys.ready[0], aged)
    await drain(old)
    with pytest.raises(JobFailed, match=r"E43.*No worker that can run it came within a day"):
        await old.job(f"default:{aged}").aresult("1s")
    await old.queue("default").aredrive()
    await drain(new)
    assert await new.job(f"default:{aged}").aresult("1s") == [2, 6, "USD"]


async def test_upcast_that_fails_makes_a_dead_letter(made):
    """A fault in the upcast is not retried: mended and redriven, the job runs."""
    first, wrong, right = made(1), made(2, lambda version, arguments: {}["x"]), made(2, upcast)
    job = await first.tasks["charge"].aenqueue(5)
    await drain(wrong)
    with pytest.raises(JobFailed, match="could not be upcast to 2: KeyError"):
        await right.job(job.id).aresult("1s")
    await right.queue("default").aredrive()
    await drain(right)
    assert await right.job(job.id).aresult("1s") == [2, 5, "EUR"]


@pytest.mark.parametrize("version", [0, -1, -(10**18)])
async def test_version_that_never_was_is_refused(made, redis, version):
    """A version below 1, which no release writes, is refused at once and does not keep a worker busy."""
    app = made(2, upcast)
    job = await app.tasks["charge"].aenqueue(1, "EUR")
    key, bare = "conveyor:{default}:jobs", job.id.split(":")[1]
    redis.hset(key, bare, redis.hget(key, bare).replace(b'"version":2', b'"version":%d' % version))
    await drain(app)
    with pytest.raises(JobFailed, match="none below 1"):
        await job.aresult("1s")


async def test_version_without_upcast_only_waits(made):
    """Without an upcast an older payload is read as it is: the number then only keeps old workers away."""
    app = made(2)
    job = await app.tasks["charge"].aenqueue(1, "EUR")
    assert write_envelope("charge", b"{}", EnvelopeOptions(version=2)) == b'\ncharge\t{"version":2}\n{}'
    await drain(app)
    assert await job.aresult("1s") == [2, 1, "EUR"]


def _promote(app: Conveyor, public: str) -> Any:
    from conveyor.store import operations

    return operations.promote(app.client.keys("default"), public.split(":")[1])


def _older(id_: str, ms: int) -> str:
    from conveyor.ids import made_at_ms

    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
    at = made_at_ms(id_)
    assert at is not None
    number = (at - ms) << 84
    return "".join(alphabet[number >> 6 * place & 63] for place in range(21, -1, -1))


async def test_version_cannot_be_changed_under_a_seal(made, redis):
    """Write access to Redis does not suffice to have a sealed payload read as another version's."""
    app = made(2, upcast, keys=KEYS)
    await app.tasks["charge"].aenqueue(5, "EUR")
    key = "conveyor:{default}:jobs"
    [(id_, data)] = redis.hgetall(key).items()
    redis.hset(key, id_, data.replace(b'\t{"version":2}', b""))
    await drain(app)
    [letter] = [letter async for letter in app.queue("default").adead_letters()]
    assert "E40" in letter.error
