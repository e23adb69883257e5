"""Refusals by the server for a while: rows C6, C7, C8, C9, C13, C14 and C27 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from redis import Redis, RedisError

from conveyor import current
from conveyor.admin.history import read_history
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.store.transport import replies
from conveyor.store.transport.async_connection import AsyncConnection
from support.job_load import JobLoad
from support.replica_pair import Switch
from support.running_worker import working
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
Start = Callable[..., Server]


def _met(client: Redis, refusal: str) -> int:
    """Return how often the server has refused something in that way."""
    return int(client.info("errorstats").get(f"errorstat_{refusal}", {"count": 0})["count"])


@pytest.mark.row("C6", "C7")
@pytest.mark.parametrize("name", ["valkey", "redis7", "redis6"])
async def test_demotions_under_load_cost_no_job(start_server: Start, rounds: Rounds, name: str) -> None:
    """A server made a replica and a primary again under load: blocked workers go on, refused writes are repeated, no job fails."""
    server, refusal = start_server(name=name), "ERR" if name == "redis6" else "READONLY"  # 6.2 wraps it
    with server.client() as client:
        async with JobLoad(server.url) as load:
            for _ in range(rounds(50, 4)):
                before = _met(client, refusal)
                client.execute_command("REPLICAOF", "127.0.0.1", "1")
                accepted = len(load.accepted)
                await auntil(lambda before=before: _met(client, refusal) > before)
                client.execute_command("REPLICAOF", "NO", "ONE")
                await load.more(20)
                assert len(load.accepted) > accepted
    assert load.errors == []
    assert load.again == []


@pytest.mark.row("C7")
@pytest.mark.usefixtures("only_when_woken")
async def test_a_blocked_worker_outlives_its_unblocking(start_server: Start, rounds: Rounds) -> None:
    """An idle worker whose blocked call ends with UNBLOCKED takes the next job at once, each time."""
    server = start_server()
    app, ran = Conveyor(server.url), []

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    with server.client() as client:
        async with working(app):
            for n in range(rounds(50, 5)):
                await auntil(lambda: client.info("clients")["blocked_clients"] == 1)
                client.execute_command("REPLICAOF", "127.0.0.1", "1")
                client.execute_command("REPLICAOF", "NO", "ONE")
                await note.aenqueue(n)
                await auntil(lambda n=n: ran == list(range(n + 1)))
        assert client.info("errorstats")["errorstat_UNBLOCKED"]["count"] > 0
    await app.aclose()


def _ask(server: Server, question: Callable[[Redis], Any]) -> Any:
    """Return the answer of a server that may be starting; None when there is none."""
    with server.client() as client:
        try:
            return question(client)
        except RedisError:
            return None


@pytest.mark.row("C8")
async def test_a_server_that_loads_its_file_is_waited_for(start_server: Start, rounds: Rounds) -> None:
    """While the server reads its file it answers LOADING; workers wait, and producers for as long as they have patience."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with server.client() as client, client.pipeline(transaction=False) as ballast:  # what it will have to read
        for n in range(20_000):
            ballast.set(f"ballast:{n % 10}", n)
        ballast.execute()
    server.options += ("--key-load-delay", "500")  # ten seconds, but for what ends it
    async with JobLoad(server.url) as load:
        for _ in range(rounds(10, 1)):
            await load.more(20)
            server.kill()
            starting = asyncio.create_task(asyncio.to_thread(server.start))  # returns when it is loaded
            await auntil(lambda: _ask(server, lambda client: _met(client, "LOADING")))  # the load did meet it
            _ask(server, lambda client: client.config_set("key-load-delay", "0"))
            await starting
            await load.more(20)
    assert load.errors == []


@pytest.mark.row("C8")
async def test_a_replica_without_its_primary_is_left(start_server: Start) -> None:
    """MASTERDOWN: a server that became a replica and lost its primary is left for the one that took over, blocking and on a loop."""
    old, new = start_server(), start_server()
    door = Switch(str(old.socket))
    app = Conveyor(door.url)
    mail = app.queue("mail")
    with old.client() as client, new.client() as other:
        await mail.apush(0)
        await asyncio.to_thread(mail.push, 0)
        client.config_set("replica-serve-stale-data", "no")
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        pushes = [asyncio.create_task(mail.apush(1)), asyncio.create_task(asyncio.to_thread(mail.push, 2))]
        await auntil(lambda: client.info("errorstats").get("errorstat_MASTERDOWN", {"count": 0})["count"] >= 2)
        door.target = str(new.socket)  # who is connected stays connected
        await asyncio.gather(*pushes)
        assert other.llen("conveyor:{mail}:ready:0") == 2
    await app.aclose()
    door.close()


@pytest.mark.row("C9")
@pytest.mark.parametrize("name", ["valkey", "redis6"])
async def test_a_script_of_others_that_hogs_the_server_is_waited_for(
    start_server: Start, rounds: Rounds, name: str
) -> None:
    """A foreign script that keeps the server busy only delays jobs: no lease is lost, and the script is not killed."""
    server = start_server("--lua-time-limit", "50", name=name)
    # It stands still on newer ones, and 6.2 has no os.
    clock = (
        "(function() local t = redis.call('TIME') return t[1] + t[2] / 1e6 end)()" if name == "redis6" else "os.clock()"
    )
    hog = f"local e = {clock} + {rounds(3, 1)} while {clock} < e do end return 'whole'"
    with server.client(socket_timeout=30) as client:
        async with JobLoad(server.url, workers=2, lease="2s") as load:

            async def has_met_it() -> bool:
                answer = asyncio.create_task(asyncio.to_thread(client.eval, hog, 0))
                await auntil(answer.done)
                assert answer.result() == b"whole"
                await load.more(20)  # so that no lease begins the next one half over
                return _met(client, "BUSY") > 0

            await auntil(has_met_it, what="the load has met a busy server")
    assert (load.errors, load.lost, load.again) == ([], [], [])


@pytest.mark.row("C9")
async def test_a_refused_turn_is_repeated_soon_for_its_lease(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses between tries of a turn follow its lease: after an outage it is renewed within an eighth of it."""
    pauses: dict[str, set[float]] = {}
    turns = {"turn", "idle_turn"}
    sent: ContextVar[str] = ContextVar("sent", default="another")
    run = AsyncConnection.run

    async def run_noted(self: AsyncConnection, call: Any, *args: Any, **options: Any) -> Any:
        token = sent.set(call.script.name)
        try:
            return await run(self, call, *args, **options)
        finally:
            sent.reset(token)

    def backoff(attempt: int, *, cap: float = replies.LONGEST_PAUSE) -> float:
        pauses.setdefault(sent.get(), set()).add(cap)  # others, such as a look for the dead, may pause for longer
        return 0.01

    server = start_server("--lua-time-limit", "5")
    async with Conveyor(server.url, lease="2s") as app:
        app.task(name="note")(lambda: None)
        with server.client(socket_timeout=30) as client:
            async with working(app):
                monkeypatch.setattr(AsyncConnection, "run", run_noted)
                monkeypatch.setattr(replies, "backoff", backoff)

                async def has_paused() -> bool:
                    hog = "local e = os.clock() + 1 while os.clock() < e do end"
                    await asyncio.to_thread(client.eval, hog, 0)
                    return bool(turns & pauses.keys())

                await auntil(has_paused, what="a turn was refused")
                monkeypatch.undo()
    assert set().union(*(pauses[name] for name in turns & pauses.keys())) == {0.25}


@pytest.mark.row("C13", "I20")
async def test_a_server_that_cannot_save_is_waited_for(start_server: Start) -> None:
    """MISCONF: a producer is told after its patience, workers wait, and both go on when the disk is well again."""
    server = start_server("--save", "3600 1")
    app, ran = Conveyor(server.url, lease="900ms"), []

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    in_the_way = server.directory / "dump.rdb"
    with server.client() as client:
        client.set("x", 1)
        async with working(app):
            (in_the_way / "full").mkdir(parents=True)
            client.bgsave()
            await auntil(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            async with Conveyor(server.url) as hasty:
                hasty.client.retry_for = 0.3
                with pytest.raises(StoreUnavailable, match="MISCONF"):
                    await hasty.task(name=note.name)(note.function).aenqueue(1)
            met = client.info("errorstats")["errorstat_MISCONF"]["count"]
            await auntil(
                lambda: client.info("errorstats")["errorstat_MISCONF"]["count"] >= met + 2
            )  # the worker's turns
            waiting = asyncio.create_task(note.aenqueue(2))
            (in_the_way / "full").rmdir()
            in_the_way.rmdir()
            client.bgsave()
            await waiting
            await auntil(lambda: ran == [2])
    await app.aclose()


@pytest.mark.row("C14")
async def test_scripts_forgotten_all_the_time_are_not_noticed(start_server: Start, rounds: Rounds) -> None:
    """SCRIPT FLUSH every 50 ms under load, bulk pushes included, is no error to anybody and loses nothing."""
    server = start_server()
    with server.client() as client:
        async with JobLoad(server.url, bulk=20) as load:

            async def flushed() -> bool:
                client.script_flush()
                await asyncio.sleep(0.05)
                return _met(client, "NOSCRIPT") > 10

            for _ in range(rounds(1200, 30)):
                await flushed()
            await auntil(flushed, what="scripts were missed")
    assert (load.errors, load.unknown, load.lost, load.again) == ([], [], [], [])


def _user(server: Server, *rules: str) -> str:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "reset", "on", *rules)
    return f"unix://worker:old@{server.socket}?db=0"


def _banish(client: Redis) -> None:
    client.execute_command("CLIENT", "KILL", "USER", "worker")


@pytest.mark.row("C27", "I20")
@pytest.mark.parametrize("name", ["valkey", "redis6"])
async def test_a_password_that_is_rotated_under_load(
    start_server: Start, rounds: Rounds, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """While its password is refused a worker waits and says so, a producer gets E17; both go on when it is valid again."""
    server = start_server(name=name)
    url = _user(server, ">old", "~*", "&*", "+@all")
    with server.client() as client:
        async with JobLoad(url, producer=server.url) as load:
            for _ in range(rounds(5, 2)):
                caplog.clear()
                client.execute_command("ACL", "SETUSER", "worker", "resetpass", ">new")
                _banish(client)
                with pytest.raises(ConfigurationError) as refused:
                    await load.note.aenqueue(-1)
                assert refused.value.code == "E17"
                await auntil(lambda: any(record.levelno >= logging.WARNING for record in caplog.records))
                client.execute_command("ACL", "SETUSER", "worker", "resetpass", ">old")
                await load.more(20)
                await auntil(lambda: client.info("clients")["blocked_clients"] == 1 or load.ran.total() % 2)
    assert "old@" not in caplog.text
    assert (load.errors, load.again) == ([], [])


@pytest.mark.row("C27")
async def test_a_password_in_a_file_is_read_for_each_connection(
    start_server: Start, rounds: Rounds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotated under load, in Redis and in the file that the URL names: no producer sees an error, and the worker goes on."""
    server, secret = start_server(), tmp_path / "password"
    secret.write_text("secret-0\n")
    url = _user(server, ">secret-0", "~*", "&*", "+@all").replace("worker:old@", "worker@") + f"&password_file={secret}"
    with server.client() as client:
        async with JobLoad(url, producer=url) as load:
            for number in range(1, rounds(5, 2) + 1):
                client.execute_command("ACL", "SETUSER", "worker", f">secret-{number}")
                secret.write_text(f"secret-{number}\n")
                client.execute_command("ACL", "SETUSER", "worker", f"<secret-{number - 1}")
                _banish(client)
                await load.more(20)
    assert "secret-" not in caplog.text
    assert (load.errors, load.again) == ([], [])


@pytest.mark.row("C27")
async def test_rights_that_are_taken_away_and_given_back(start_server: Start, rounds: Rounds) -> None:
    """A worker that may run no scripts for a while, and was forgotten meanwhile, works again as soon as it may."""
    server = start_server()
    url = _user(server, ">old", "~*", "&*", "+@all")
    app, ran = Conveyor(url, lease="1s"), []

    @app.task
    async def note(n: int) -> None:
        ran.append(n)

    with server.client() as client, Conveyor(server.url) as other:
        task = other.task(name=note.name)(note.function)
        async with working(app):
            for n in range(rounds(5, 2)):
                client.execute_command("ACL", "SETUSER", "worker", "-evalsha", "-eval", "-blpop")
                with pytest.raises(ConfigurationError) as refused:
                    await note.aenqueue(n)
                assert refused.value.code == "E17"
                client.delete(*[key for key in client.scan_iter() if b"leased:" in key or b"workers" in key])
                await asyncio.to_thread(task.enqueue, n)
                await asyncio.sleep(0.7)  # some refused turns long
                client.execute_command("ACL", "SETUSER", "worker", "+@all")
                began = monotonic()
                await auntil(lambda n=n: ran == list(range(n + 1)))
                print(f"worked again after {monotonic() - began:.2f} s")
    await app.aclose()


@pytest.mark.row("C27")
async def test_a_refused_turn_takes_all_that_it_carried_again(
    start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a job whose turn is refused is counted once, and what the job spawned starts with the next turn, not later."""
    server, ran = start_server(), []
    url = _user(server, ">old", "~*", "&*", "+@all")
    app = Conveyor(url, lease="10m")  # so nothing is looked for in the time of a test

    @app.task
    async def follow() -> None:
        ran.append("follow")

    with server.client() as client:

        @app.task
        async def lead() -> None:
            client.execute_command("ACL", "SETUSER", "worker", "-evalsha", "-eval")
            current().spawn(follow.s())
            ran.append("lead")

        await lead.aenqueue()
        async with working(app):
            await auntil(lambda: "a turn was refused" in caplog.text)
            client.execute_command("ACL", "SETUSER", "worker", "+@all")
            await auntil(lambda: ran == ["lead", "follow"])
        history = await asyncio.to_thread(
            read_history, app.client, QueueDirectory(app.client), "1h", names=None, task=None
        )
    assert sum(history.done) == 2
    await app.aclose()


@pytest.mark.row("C102")
async def test_a_worker_without_a_right_refuses_to_start(start_server: Start) -> None:
    """A worker, a consumer and a pull with a user who has no channels (as Redis 7 makes users) are refused, and lease nothing."""
    server = start_server()
    url = _user(server, ">old", "~*", "+@all", "resetchannels")
    app = Conveyor(url)
    task = app.task(name="note")(print)
    await task.aenqueue(1)
    await app.queue("letters").apush("hello")
    refusals = []
    for start in (_start_worker(app), app.queue("letters").apull(), anext(aiter(app.queue("letters").aconsume()))):
        with pytest.raises(ConfigurationError) as refused:
            await start
        refusals.append(refused.value)
    assert {error.code for error in refusals} == {"E17"}
    assert all("ACL SETUSER name +publish &conveyor:replies:*" in str(error) for error in refusals)
    assert [await app.queue("letters").alen(), await app.queue(task.queue).alen()] == [1, 1]
    await app.aclose()


async def _start_worker(app: Conveyor) -> None:
    async with app.worker():
        raise AssertionError("it started")
