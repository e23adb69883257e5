"""A server whose memory is full, or that throws keys away: rows C11 and C12 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from conveyor.admin import doctor
from conveyor.errors import ConfigurationError, QueueFull
from conveyor.events import JobLost
from conveyor.jobs.app import Conveyor
from conveyor.store.transport import eviction
from conveyor.store.transport.async_connection import AsyncConnection
from support.running_worker import audit, drain, working
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
Start = Callable[..., Server]


@pytest.mark.row("C11")
@pytest.mark.parametrize("name", ["valkey", "redis7", "redis6"])
async def test_a_backlog_drains_on_a_full_server(start_server: Start, rounds: Rounds, name: str) -> None:
    """Workers start, lease, retry, keep results and finish a backlog on a full server; a refused push leaves no key."""
    server = start_server(name=name)
    jobs, workers = rounds(10_000, 1000), rounds(4, 2)
    app, ran, lost = Conveyor(server.url, lease="2s"), Counter[int](), list[JobLost]()
    app.on(JobLost)(lost.append)

    @app.task(keep_result="1m")
    async def note(n: int) -> int:
        ran[n] += 1
        if n % 100 == 0 and ran[n] == 1:
            raise ValueError(n)
        return n

    note.options(retry=2)
    async with Conveyor(server.url) as producer:
        task = producer.task(name=note.name, keep_result="1m")(note.function)
        handles = await producer.aenqueue_many([task.s(n) for n in range(jobs)])
        with server.client() as client:
            client.config_set("maxmemory", "1")  # full from here on, however much is drained
            before = sorted(client.scan_iter())
            for push in (task.aenqueue(-1), task.options(unique="k", delay="1m").aenqueue(-1)):
                with pytest.raises(QueueFull, match="maxmemory"):
                    await push
            with pytest.raises(QueueFull, match="maxmemory"):
                await producer.aenqueue_many([task.s(-1), task.s(-1)])
            assert sorted(client.scan_iter()) == before
            async with AsyncExitStack() as stack:
                for _ in range(workers):
                    await stack.enter_async_context(working(app))
                await auntil(lambda: len(ran) == jobs)
                client.config_set("maxmemory", "0")
                assert await handles[1].aresult(timeout=60) == 1
                assert await (await task.aenqueue(jobs)).aresult(timeout=60) == jobs
                await auntil(lambda: client.hlen(app.client.keys("default").jobs) == 0)
    assert {n for n, times in ran.items() if times != (2 if n % 100 == 0 else 1)} == set()
    assert lost == []
    assert await audit(app) == []
    await app.aclose()


@pytest.mark.row("C12")
async def test_no_worker_starts_on_a_server_that_throws_jobs_away(
    start_server: Start,
) -> None:
    """With an evicting policy a worker inside a program refuses to start, names the policy, and starts when told to."""
    server = start_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    app = Conveyor(server.url)
    app.task(name="note")(lambda n: None)
    with pytest.raises(ConfigurationError, match="maxmemory-policy is allkeys-lru") as refused:
        async with app.worker():
            pass
    assert refused.value.code == "E10"
    async with app.worker(allow_eviction=True):
        pass
    await app.aclose()


@pytest.mark.row("C12")
async def test_a_policy_that_turns_bad_under_a_worker_is_said(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A running worker looks at the policy when it begins and every hour: one that deletes jobs is logged as E10, once."""
    assert eviction.CHECK_EVERY == 3600
    monkeypatch.setattr(eviction, "CHECK_EVERY", 0.01)
    server = start_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")  # it was away when it was asked
    app, looks, ask = Conveyor(server.url), list[object](), AsyncConnection.run_command
    app.task(name="note")(lambda n: None)

    async def counted(self: AsyncConnection, *command: str, **options: float) -> object:
        looks.append(reply := await ask(self, *command, **options))
        return reply

    monkeypatch.setattr(AsyncConnection, "run_command", counted)

    def said() -> list[str]:
        return [record.getMessage().split(".")[0] for record in caplog.records if record.getMessage().startswith("E10")]

    async def look(times: int) -> None:
        seen = len(looks)
        await auntil(lambda: len(looks) > seen + times)

    with server.client() as client:
        async with working(app) as worker:
            await look(5)
            client.config_set("maxmemory-policy", "noeviction")
            await look(2)
            client.config_set("maxmemory-policy", "volatile-ttl")
            await look(5)
            assert not worker.lifecycle.stopping
    policies = [text.rpartition(" ")[2] for text in said()]
    assert policies == ["allkeys-lru", "volatile-ttl"]
    await app.aclose()


@pytest.mark.row("C12")
async def test_a_policy_that_cannot_be_known_is_no_obstacle(
    start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Where this user may not ask for the policy a worker starts, and warns."""
    server = start_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">x", "~*", "&*", "+@all", "-info", "-config")
    app = Conveyor(f"unix://worker:x@{server.socket}?db=0")
    app.task(name="note")(lambda n: None)
    async with app.worker():
        pass
    assert "eviction policy is unknown" in caplog.text
    await app.aclose()


@pytest.mark.row("C12")
async def test_each_record_that_was_thrown_away_is_reported_once(
    start_server: Start, rounds: Rounds, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs whose record Redis has thrown away are found by the audit, said once each in the log, and the others run."""
    server = start_server()
    jobs = rounds(2000, 500)
    app, ran = Conveyor(server.url), set[int]()

    @app.task
    async def note(n: int) -> None:
        ran.add(n)

    handles = await app.aenqueue_many([note.s(n) for n in range(jobs)])
    gone = [handle.id.partition(":")[2] for handle in handles[::5]]
    with server.client() as client:
        client.hdel(app.client.keys("default").jobs, *gone)
    assert {id_ for _, id_ in await audit(app)} == set(gone)
    report = await asyncio.to_thread(doctor.examine, app.client)
    assert [f.text for f in report.problems if f.code == "E10" and f"{len(gone):,} jobs" in f.text]
    with caplog.at_level(logging.ERROR, "conveyor.worker"):
        await drain(app)
    said = [record.args for record in caplog.records if "E10" in record.msg]
    assert sum(number for _, number, _ in said) == len(gone)
    named = [id_ for _, _, ids in said for id_ in ids.split(", ")]
    assert len(named) == len(set(named))
    assert ran == set(range(jobs)) - set(range(0, jobs, 5))
    assert await audit(app) == []
    await app.aclose()


@pytest.mark.row("C12")
async def test_a_worker_outlives_evictions(start_server: Start, rounds: Rounds) -> None:
    """A worker survives repeated eviction of any key and runs the jobs that come afterwards."""
    server = start_server("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-random")
    app, ran = Conveyor(server.url, lease="3s"), set[int]()

    @app.task
    async def note(n: int) -> None:
        ran.add(n)

    times = rounds(50, 5)
    with server.client() as client:
        async with working(app, concurrency=5) as worker:
            for n in range(times):
                await app.aenqueue_many([note.s(-1 - n) for _ in range(500)])
                evicted = client.info("stats")["evicted_keys"]
                filler = 0
                while client.info("stats")["evicted_keys"] < evicted + 60:
                    client.set(f"ballast:{filler}", "x" * 100_000)
                    filler += 1
                assert not worker.lifecycle.stopping
            client.config_set("maxmemory", "0")
            client.delete(*client.keys("ballast:*"))
            await note.aenqueue(1)
            await auntil(lambda: 1 in ran)
            print(
                f"{client.info('stats')['evicted_keys']} keys evicted; the audit finds {len(await audit(app))} traces of it"
            )
    await app.aclose()
