"""The producer's buffer: jobs pushed while Redis is away arrive, in order and once."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor import Buffer
from conveyor.errors import ConfigurationError, QueueFull, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.messaging.partitions import partition_names, repartition
from conveyor.store.client import spool
from conveyor.store.partitions import partition_of
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection
from support.forked_children import exit_code, in_child
from support.ready_ids import bare, line
from support.waiting import until
from testbed.server_process import Server

Start = Callable[..., Server]
AOF = ("--appendonly", "yes", "--appendfsync", "always")  # everysec may lose what came during a sync


@pytest.fixture
def server(start_server: Start) -> Server:
    """A server that may be killed and started again."""
    return start_server(*AOF)


@pytest.fixture(params=["memory", "disk"])
def buffer(request: pytest.FixtureRequest, tmp_path: Path) -> Buffer:
    return Buffer(tmp_path / "spool" if request.param == "disk" else None, linger="10s")


def test_an_outage_in_the_middle(server: Server, buffer: Buffer, caplog: pytest.LogCaptureFixture) -> None:
    """Of 5,000 pushes with an outage among them every one returns, and all arrive: in order, with their ids, once."""
    caplog.set_level(logging.WARNING, "conveyor.buffer")
    ids: list[str] = []
    jobs: list[str] = []
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")

        @app.task(queue="sends")
        def send(n: int) -> None: ...

        for n in range(3000):
            if n == 1000:
                server.kill()
            if n == 2500:
                assert len(buffer) == 1500
                server.start()
            if n % 3:
                ids.append(mail.push(n))
            else:
                jobs.append(send.enqueue(n).id)
        ids += mail.push_many(range(1000))
        jobs += [job.id for job in app.enqueue_many([send.s(n) for n in range(1000)])]
    assert line(server) == bare(ids)
    assert line(server, "sends") == bare(jobs)
    assert len(buffer) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "pushes are kept" in said[0]
    assert "Redis answers again after" in said[1]


async def test_an_outage_on_a_loop(server: Server, buffer: Buffer) -> None:
    """The same for awaitable pushes, alone, many in a tick, and in bulk."""
    ids: list[str] = []
    jobs: list[str] = []
    async with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")

        @app.task(queue="sends")
        async def send(n: int) -> None: ...

        for n in range(400):
            if n == 100:
                server.kill()
            if n == 300:
                assert len(buffer) > 1000
                server.start()
            if n % 3:
                ids.append(await mail.apush(n))
            else:
                jobs.append((await send.aenqueue(n)).id)
            if n % 20 == 0:
                ids += await asyncio.gather(*(mail.apush(m) for m in range(50)))
                ids += await mail.apush_many(range(100))
    assert line(server) == bare(ids)
    assert line(server, "sends") == bare(jobs)


def lose_replies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every push be carried out and its reply be lost, until the list that is returned is cleared."""
    losing = [1]
    real, areal = Connection.execute, AsyncConnection.execute

    def execute(self: Connection, *command: Any, block: float = 0.0) -> Any:
        reply = real(self, *command, block=block)
        if losing and str(command[0]).startswith("EVAL"):
            self.close()
            raise TransportError("cut")
        return reply

    async def aexecute(self: AsyncConnection, *command: Any, **times: Any) -> Any:
        reply = await areal(self, *command, **times)
        if losing and str(command[0]).startswith("EVAL") and not isinstance(reply, Exception):
            self.drop(ConnectionLost("cut"))
            raise ConnectionLost("cut")
        return reply

    monkeypatch.setattr(Connection, "execute", execute)
    monkeypatch.setattr(AsyncConnection, "execute", aexecute)
    return losing


def test_what_waits_comes_to_an_end(server: Server, buffer: Buffer) -> None:
    """However fast a program goes on pushing, the buffer is empty some time after the outage."""
    buffer.most = 1_000_000
    stop, ids = threading.Event(), list[str]()
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        server.kill()

        def push() -> None:
            while not stop.is_set():
                ids.append(mail.push(1))

        pusher = threading.Thread(target=push, daemon=True)
        pusher.start()
        until(lambda: len(buffer) > 3000)
        server.start()
        until(lambda: not len(buffer))
        stop.set()
        pusher.join(60)
        assert not pusher.is_alive()
    assert line(server) == bare(ids)


def test_an_attempt_that_arrived_is_not_doubled(
    server: Server, buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that Redis took and whose reply was lost goes into the buffer, and is stored once, even a day later."""
    losing = lose_replies(monkeypatch)
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        ids = [mail.push(1), mail.push(2, priority=0, headers={"a": "b"})]
        until(lambda: len(line(server)) == 1)
        with server.client() as client:  # a consumer has finished it meanwhile, so its id tells nothing
            client.delete("conveyor:{mail}:jobs", "conveyor:{mail}:ready:0")
            lives = [client.pttl(key) for key in client.keys("*:lane:*")]
        assert min(lives) > 80_000_000
        losing.clear()
        assert buffer.wait_empty(60)
    assert line(server) == bare(ids)[1:]


async def test_an_attempt_on_a_loop_is_not_doubled(
    server: Server, buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on asyncio."""
    losing = lose_replies(monkeypatch)
    async with Conveyor(server.url, buffer=buffer) as app:
        ids = await asyncio.gather(*(app.queue("mail").apush(n) for n in range(3)))
        assert line(server) == bare(ids)
        losing.clear()
    assert line(server) == bare(ids)


def test_a_full_buffer_refuses(server: Server, buffer: Buffer) -> None:
    """A buffer that is full refuses (E37) what does not fit, a bulk push whole, and delivers exactly what it took."""
    buffer.most = 5
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        server.kill()
        ids = [mail.push(n) for n in range(3)]
        with pytest.raises(StoreUnavailable, match="buffer is full: it holds 3 jobs") as caught:
            mail.push_many(range(3))
        assert caught.value.code == "E37"
        ids += mail.push_many(range(2))
        with pytest.raises(StoreUnavailable, match="were not stored"):
            mail.push(1)
        server.start()
    assert line(server) == bare(ids)


def test_closing_says_what_remains(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Closing an app tries for `linger`; then it says loudly what memory loses, and keeps what is on disk."""
    server.kill()
    app = Conveyor(server.url, buffer=Buffer(linger="50ms"))
    id_ = app.queue("mail").push(1)
    app.close()
    assert [r.levelno for r in caplog.records if "are lost" in r.message] == [logging.ERROR]
    assert bare([id_])[0] in caplog.text

    other = Conveyor(server.url, buffer=Buffer(tmp_path, linger="50ms"))
    later = other.queue("mail").push(2)
    other.close()
    assert "they wait in" in caplog.text
    server.start()
    app.close()  # it is still in memory, so this delivers it
    with Conveyor(server.url, buffer=Buffer(tmp_path)) as third:
        assert third.client.buffer is not None
    assert line(server) == bare([id_, later])


def test_a_job_that_waits(server: Server, buffer: Buffer) -> None:
    """A handle of a job in the buffer says `waiting`, its result is waited for, and it cannot be cancelled yet."""
    with Conveyor(server.url, buffer=buffer) as app:
        app.client.retry_for = 0.2

        @app.task(queue="mail", keep_result="1m")
        def send(n: int) -> int:
            return n

        server.kill()
        job = send.enqueue(1)
        assert job.status() == "waiting"
        with pytest.raises(TimeoutError):
            job.result(timeout="50ms")
        with pytest.raises(TimeoutError):
            job.cancel()
        server.start()
        with pytest.raises(TimeoutError):
            job.result(timeout="1s")  # delivered, and nobody runs it
        assert job.status() == "ready"
        assert job.cancel()


def test_a_full_queue_is_waited_for(server: Server, buffer: Buffer) -> None:
    """Jobs that a full queue refuses at delivery go on waiting, in order."""
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail", max_length=4)
        first = mail.push(0)
        server.kill()
        ids = [mail.push(n) for n in range(1, 10)]
        with pytest.raises(QueueFull):
            mail.push_many(range(5))
        server.start()
        until(lambda: len(line(server)) == 4)
        seen: list[int] = []
        while len(seen) < 10 and (messages := mail.pull(10, wait="10s")):
            for message in messages:
                seen.append(message.body)
                message.ack()
        assert seen == list(range(10))
        assert first
        assert len(buffer) == 0
        assert ids


@pytest.mark.row("D187")
def test_a_full_queue_holds_up_no_other(server: Server, buffer: Buffer) -> None:
    """While one queue accepts nothing, buffered and new jobs of the others are stored, and only its own wait."""
    with Conveyor(server.url, buffer=buffer) as app:
        full, mail = app.queue("full", max_length=1), app.queue("mail")
        full.push(0)
        server.kill()
        first, blocked = mail.push(1), [full.push(n) for n in range(1, 4)]
        others = [app.queue(f"other{n}").push(n) for n in range(20)]
        server.start()
        until(lambda: len(buffer) == len(blocked))
        assert all(line(server, f"other{n}") == bare([id_]) for n, id_ in enumerate(others))
        assert not buffer.holds_back(("conveyor", "mail", None))
        second = mail.push(2)  # it goes to Redis itself
        assert line(server) == bare([first, second])
        mail.push(3, fsync=False)
        blocked.append(full.push(4))
        assert len(buffer) == len(blocked)
        for n in range(5):
            (message,) = full.pull(1, wait="10s")
            assert message.body == n
            message.ack()
        assert buffer.wait_empty(60)


@pytest.mark.parametrize("emptied", [False, True])
def test_a_queue_with_partitions(start_server: Start, buffer: Buffer, emptied: bool) -> None:
    """A buffered job arrives in its partition, even when Redis has lost all data and knows of no partitions any more."""
    server = start_server(*(() if emptied else AOF))
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail", partitions=2)
        mail.push("first")
        server.kill()
        ids = [mail.push(n, unique=f"key {n}") for n in range(50)] + mail.push_many(range(50))
        server.start()
        assert buffer.wait_empty(60)
        assert len(mail) == 100 + (not emptied)
        assert mail.stats().ready == len(mail)
        assert len(set(ids)) == 100


@pytest.mark.row("D184")
@pytest.mark.parametrize("numbers", [(4, 2), (2, 5), (3, 1), (1, 3)], ids=str)
def test_another_number_of_partitions(
    server: Server, buffer: Buffer, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int]
) -> None:
    """Jobs for partitions whose number was changed meanwhile are placed anew: each is stored once, where its key belongs."""
    monkeypatch.setattr(spool, "MAX_JOBS", 7)
    before, after = numbers
    with Conveyor(server.url, buffer=buffer) as app, Conveyor(server.url) as other:
        orders, behind = app.queue("orders", **({"partitions": before} if before > 1 else {})), app.queue("mail")
        message = orders.push("first")
        (pulled,) = orders.pull(1)
        pulled.ack()
        monkeypatch.setattr(app.client, "announce", hindered := Hindered(app.client.announce))
        server.kill()
        ids = [orders.push(n, unique=f"key {n}") for n in range(30)] + orders.push_many(range(30, 60))
        last = behind.push("behind them")
        server.start()
        repartition(other.client, "orders", after)
        hindered.over = True
        assert buffer.wait_empty(60)
        assert line(server) == bare([last])
        names = partition_names("orders", after)
        found = {name: line(server, name) for name in names}
        assert sorted(id_ for part in found.values() for id_ in part) == sorted(bare(ids))
        if after > 1:
            assert all(bare([ids[n]])[0] in found[names[partition_of(f"key {n}", after)]] for n in range(30))
        assert message


class Hindered:
    """A call that fails as when Redis is away, until that is `over`."""

    def __init__(self, real: Callable[..., None]) -> None:
        self.real, self.over = real, False

    def __call__(self, *about: Any, **options: Any) -> None:
        if not self.over:
            raise StoreUnavailable("not yet")
        self.real(*about, **options)


def test_delays_count_from_the_push(server: Server, buffer: Buffer) -> None:
    """A delay or a life that passed while its job waited in the buffer is over when it arrives."""
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        server.kill()
        mail.push("soon", delay="300ms")
        mail.push("late", delay="1h")
        time.sleep(0.4)  # longer than the delay: this is the outage
        server.start()
        assert buffer.wait_empty(60)
        stats = mail.stats()
        assert (stats.ready, stats.scheduled) == (1, 1)


def test_confirmed_pushes_do_not_overtake(server: Server, buffer: Buffer) -> None:
    """A push that asks for fsync is never kept in the buffer: it waits until that is empty, or is refused."""
    server.kill()
    with Conveyor(server.url, buffer=buffer) as app:
        app.client.retry_for = 0.2
        mail = app.queue("mail")
        ids = [mail.push(1)]
        with pytest.raises(StoreUnavailable, match="cannot overtake the 1 jobs"):
            mail.push(2, fsync=True)
        server.start()
        app.client.retry_for = 10
        ids.append(mail.push(3, fsync=True))
    assert line(server) == bare(ids)


def test_a_buffer_belongs_to_one_app(server: Server) -> None:
    """One buffer for two apps is refused, and so are limits that mean nothing."""
    buffer = Buffer()
    Conveyor(server.url, buffer=buffer)
    with pytest.raises(ConfigurationError, match="another app"):
        Conveyor(server.url, buffer=buffer)
    for wrong in (
        {"most": 0},
        {"most_bytes": "1MB"},
        {"fsync": True},
        {"directory": "x", "fsync": 1},
        {"directory": 7},
        {"directory": ""},
    ):
        with pytest.raises(ConfigurationError):
            Buffer(**wrong)  # type: ignore[arg-type]
    for no_buffer in (7, "spool", True, Buffer):
        with pytest.raises(ConfigurationError, match="takes a Buffer, such as"):
            Conveyor(server.url, buffer=no_buffer)  # type: ignore[arg-type]


def test_a_forked_child_begins_empty(server: Server, buffer: Buffer) -> None:
    """A forked child does not deliver its parent's buffered jobs, and has a buffer of its own."""
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        server.kill()
        ids = [mail.push(n) for n in range(3)]

        def push() -> int:
            mail.push("the child's")
            return 0 if len(buffer) == 1 else 1  # it ends without a word: what it kept in memory is gone

        assert exit_code(in_child(push)) == 0
        server.start()
    found = line(server)
    assert found[:3] == bare(ids) or buffer.directory is not None
    assert [id_ for id_ in found if id_ in bare(ids)] == bare(ids)
    assert len(found) == 3 + (buffer.directory is not None)  # what it kept on disk, its parent delivered


def test_a_worker_delivers_before_it_ends(
    server: Server,
) -> None:
    """A process that ends without its exit handlers can be told to deliver first."""
    from conveyor.store.client.buffer import flush_all

    server.kill()
    app = Conveyor(server.url, buffer=Buffer(linger="10s"))
    id_ = app.queue("mail").push(1)
    server.start()
    flush_all()
    assert line(server) == bare([id_])
    app.close()


def test_commands_do_not_buffer(server: Server, tmp_path: Path) -> None:
    """A command that pushes fails when Redis is away, also with an app that has a buffer, because it ends before a delivery."""
    (tmp_path / "shop.py").write_text(
        f"from conveyor import Buffer, Conveyor\napp = Conveyor({server.url!r}, buffer=Buffer())\n"
    )
    server.kill()
    command = [sys.executable, "-m", "conveyor", "push", "--app", "shop:app", "mail", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
