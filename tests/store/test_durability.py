"""Durability of pushes: confirmed by replicas, confirmed on disk. Real replicas, real files."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor.errors import ConfigurationError, DurabilityNotReached
from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from conveyor.store.client import confirmed
from conveyor.store.client.confirmed import AsyncConfirmedConnection, ConfirmedConnection
from conveyor.store.transport.async_connection import ConnectionLost
from support.replica_pair import ReplicaPair, Switch, bare, stored
from support.running_worker import until_counts
from testbed.server_process import Server

Start = Callable[..., Server]
ALL = ["valkey", "redis6", "redis7"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, directory: Any) -> Iterator[ReplicaPair]:
    """A primary with one replica, for tests that leave them as they were."""
    from testbed.server_process import find_binary

    def start(*options: str, name: str) -> Server:
        binary = find_binary(name)
        assert binary is not None
        places.append(Server(binary, directory / f"pair{len(places)}", *options))
        return places[-1]

    places: list[Server] = []
    found = ReplicaPair(start)
    yield found
    found.close()


@pytest.fixture
def app(pair: ReplicaPair) -> Iterator[Conveyor]:
    """An app on the primary, emptied."""
    with pair.primary.client() as client:
        client.flushall()
    with Conveyor(pair.primary.url) as app:
        yield app


@pytest.fixture
def silent(pair: ReplicaPair) -> Iterator[None]:
    """The replica does not answer during the test."""
    os.kill(pair.replica.pid, signal.SIGSTOP)
    yield
    os.kill(pair.replica.pid, signal.SIGCONT)


async def apush(app: Conveyor, value: object) -> str:
    """Push on a loop of its own and leave nothing open."""
    try:
        return await core_of(app).queues["mail"].apush(value)
    finally:
        await app.aclose()


def test_what_returned_is_on_the_replica(app: Conveyor, pair: ReplicaPair) -> None:
    """When a push that asked for a replica returns, a replica has it: messages and jobs, one or many."""
    mail, _ = app.queue("mail", wait_replicas=1), app.queue("sends", wait_replicas=1)

    @app.task(queue="sends")
    def send(n: int) -> None: ...

    assert bare([mail.push(1)]) <= stored(pair.replica)
    assert bare([mail.push(2, priority=3, unique="two")]) <= stored(pair.replica)
    assert bare(mail.push_many(range(2500))) <= stored(pair.replica)
    assert bare([send.enqueue(1).id]) <= stored(pair.replica, "sends")
    assert bare([job.id for job in app.enqueue_many([send.s(n) for n in range(1500)])]) <= stored(pair.replica, "sends")
    other = app.queue("other")
    assert bare([other.push(1, wait_replicas=1)]) <= stored(pair.replica, "other")


async def test_a_publish_is_on_the_replica(app: Conveyor, pair: ReplicaPair) -> None:
    """When a publish that asked for a replica returns, a replica has all copies; where fewer confirm, the error names them all."""
    topic = app.topic("made")
    await topic.asubscribe("left", "right")
    async with app:
        for count in (1, 2):
            left, right = await topic.apublish(count, wait_replicas=1)
            assert bare([left]) <= stored(pair.replica, "left")
            assert bare([right]) <= stored(pair.replica, "right")
        with pytest.raises(DurabilityNotReached, match="1 of 2 replicas") as caught:
            await topic.apublish_many([3, 4], wait_replicas=2, wait_timeout="100ms")
        assert len(caught.value.job_ids) == 4
        assert await app.queue("left").alen() == await app.queue("right").alen() == 4
        assert await app.topic("nobody").apublish(1, wait_replicas=1) == []
    ids = await asyncio.to_thread(topic.publish, 5, wait_replicas=1)
    assert bare(ids) <= stored(pair.replica, "left") | stored(pair.replica, "right")


async def test_what_returned_on_a_loop_is_on_the_replica(app: Conveyor, pair: ReplicaPair) -> None:
    """The awaitable twins confirm as well, and those of one tick share one wait."""
    mail, _ = app.queue("mail", wait_replicas=1), app.queue("sends", wait_replicas=1)

    @app.task(queue="sends")
    async def send(n: int) -> None: ...

    async with app:
        assert bare(await mail.apush_many(range(1200))) <= stored(pair.replica)
        assert bare([(await send.aenqueue(1)).id]) <= stored(pair.replica, "sends")
        jobs = await app.aenqueue_many([send.s(n) for n in range(20)])
        assert bare([job.id for job in jobs]) <= stored(pair.replica, "sends")
        with pair.primary.client() as client:
            before = client.info("commandstats")["cmdstat_wait"]["calls"]
            ids = await asyncio.gather(*(mail.apush(n) for n in range(500)))
            assert client.info("commandstats")["cmdstat_wait"]["calls"] - before == 1
        assert bare(ids) <= stored(pair.replica)


def test_a_wait_costs_no_round_trip_and_nothing_when_off(app: Conveyor, pair: ReplicaPair) -> None:
    """A push that asks for nothing sends no WAIT, one that asks sends one, in the same write."""
    mail = app.queue("mail")
    mail.push(0, wait_replicas=1)
    with pair.primary.client() as client:
        before = client.info("commandstats")
        for n in range(10):
            mail.push(n)
        mail.push(10, fsync=False, wait_replicas=0)
        middle = client.info("commandstats")
        for n in range(10):
            mail.push(n, wait_replicas=1)
        after = client.info("commandstats")
    calls = [stats["cmdstat_wait"]["calls"] for stats in (before, middle, after)]
    assert calls[1] - calls[0] == 0
    assert calls[2] - calls[1] == 10


def test_more_replicas_than_there_are(app: Conveyor) -> None:
    """Asking for more replicas than follow raises after the timeout; the jobs are queued, and the error names them."""
    mail = app.queue("mail")
    began = time.monotonic()
    with pytest.raises(DurabilityNotReached, match="1 of 2 replicas") as caught:
        mail.push(1, wait_replicas=2, wait_timeout="200ms")
    assert time.monotonic() - began >= 0.2
    assert (caught.value.code, caught.value.asked, caught.value.got, caught.value.fsync) == ("E29", 2, 1, None)
    assert app.job(caught.value.job_id).status() == "ready"

    with pytest.raises(DurabilityNotReached, match="was not stored") as caught:
        mail.push_many(range(3000), wait_replicas=2, wait_timeout="200ms")
    assert len(caught.value.job_ids) == len(mail) - 1 == 1000


async def test_partitions_are_confirmed_too(app: Conveyor, pair: ReplicaPair) -> None:
    """With partitions a push waits in its own one; of many, the error names all that the call stored, wherever."""
    mail = app.queue("mail", partitions=3, wait_replicas=1, wait_timeout="10s")
    async with app:
        [id_] = await mail.apush_many([0])
        assert bare([id_]) <= stored(pair.replica, id_.rpartition(":")[0])
        with pytest.raises(DurabilityNotReached) as caught:
            await mail.apush_many(range(30), wait_replicas=2, wait_timeout="100ms")
        assert len(caught.value.job_ids) == await mail.alen() - 1


def test_repeating_with_the_same_id_is_safe(app: Conveyor, pair: ReplicaPair) -> None:
    """A push that was not confirmed, repeated with its id when the replica is back, stores nothing twice and is confirmed."""
    mail = app.queue("mail", wait_replicas=1, wait_timeout="150ms")
    os.kill(pair.replica.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DurabilityNotReached) as caught:
            mail.push("hello", id="order-7")
        assert caught.value.job_ids == ["order-7"]
    finally:
        os.kill(pair.replica.pid, signal.SIGCONT)
    assert mail.push("hello", id="order-7", wait_timeout="60s") == "order-7"
    assert stored(pair.replica) == {"order-7"}
    assert len(mail) == 1


@pytest.mark.usefixtures("silent")
async def test_a_wait_holds_up_nobody_else(app: Conveyor, pair: ReplicaPair) -> None:
    """While one push of a loop waits for a replica that is away, all other calls of the loop go on."""
    mail, free = app.queue("mail", wait_replicas=1, wait_timeout="60s"), app.queue("free")
    async with app:
        waiting = asyncio.ensure_future(mail.apush(1))
        await until_counts(app, lambda now: now.ready, "mail")
        for n in range(20):
            await free.apush(n)
        assert not waiting.done()
        os.kill(pair.replica.pid, signal.SIGCONT)
        assert await waiting


def lose_first_push(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None) -> list[int]:
    """Break the connection when the server has carried out the first push and before its wait is answered."""
    lost: list[int] = []
    real, areal = ConfirmedConnection._exchange, AsyncConfirmedConnection._exchange

    def exchange(self: ConfirmedConnection, commands: Any, block: float) -> Any:
        if lost or not str(commands[0][0]).startswith("EVAL"):
            return real(self, commands, block)
        replies = real(self, commands[:1], block)
        if isinstance(replies[0], Exception):  # NOSCRIPT: not carried out
            return replies + [0] * (len(commands) - 1)
        lost.append(1)
        then()
        self.close()
        raise TransportError("cut")

    async def aexchange(self: AsyncConfirmedConnection, commands: Any, block: float) -> Any:
        if lost or not str(commands[0][0]).startswith("EVAL"):
            return await areal(self, commands, block)
        replies = await areal(self, commands[:1], block)
        if isinstance(replies[0], Exception):
            return replies + [0] * (len(commands) - 1)
        lost.append(1)
        then()
        self.drop(ConnectionLost("cut"))
        raise ConnectionLost("cut")

    monkeypatch.setattr(ConfirmedConnection, "_exchange", exchange)
    monkeypatch.setattr(AsyncConfirmedConnection, "_exchange", aexchange)
    return lost


@pytest.mark.usefixtures("silent")
def test_a_repeat_confirms_nothing_by_itself(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A push whose connection broke is answered from its lane, without a write: the wait behind it must not take that for
    a confirmation. Without the write of the repeat it does, and the replica has nothing.
    """
    mail = app.queue("mail", wait_replicas=1, wait_timeout="200ms")
    lost = lose_first_push(monkeypatch)
    with pytest.raises(DurabilityNotReached):
        mail.push("hello")
    assert len(lost) == len(mail) == 1

    touching = confirmed._ConfirmedCall.commands
    monkeypatch.setattr(
        confirmed._ConfirmedCall,
        "commands",
        lambda self, command: [c for c in touching(self, command) if c[0] != "PEXPIRE"],
    )
    lost.clear()
    mail.push("hello")  # confirmed by a replica that is stopped
    assert len(lost) == 1


@pytest.mark.usefixtures("silent")
async def test_a_repeat_on_a_loop_confirms_nothing_by_itself(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on asyncio."""
    mail = app.queue("mail", wait_replicas=1, wait_timeout="200ms")
    lost = lose_first_push(monkeypatch)
    async with app:
        with pytest.raises(DurabilityNotReached):
            await mail.apush("hello")
        assert len(lost) == await mail.alen() == 1


def test_a_lost_connection_is_confirmed_by_the_repeat(
    app: Conveyor, pair: ReplicaPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection lost between push and wait costs nothing: the repeat stores nothing twice, and returned pushes are confirmed."""
    mail = app.queue("mail", wait_replicas=1)
    lose_first_push(monkeypatch)
    id_ = mail.push("hello")
    assert bare([id_]) == stored(pair.replica) == stored(pair.primary)


def test_failover_between_push_and_wait(
    pair: ReplicaPair, app: Conveyor, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the primary dies with the push and another takes over, the repeat stores it there, and confirmed is there."""
    alone = start_server()
    door = Switch(str(alone.socket))
    with Conveyor(door.url) as other:

        def fail_over() -> None:
            assert len(stored(alone)) == 1
            alone.kill()
            door.turn(str(pair.primary.socket))

        lose_first_push(monkeypatch, fail_over)
        id_ = other.queue("mail", wait_replicas=1).push("hello")
    assert bare([id_]) == stored(pair.primary) == stored(pair.replica)
    door.close()


@pytest.mark.parametrize("name", ALL)
def test_fsync_without_a_file_is_refused(start_server: Start, name: str) -> None:
    """Without an append-only file fsync=True is refused (E36) before anything is stored, in all forms of a push."""
    server = start_server(name=name)
    with Conveyor(server.url) as app:
        mail = app.queue("mail", fsync=True)
        for push in (lambda: mail.push(1), lambda: mail.push_many([1, 2]), lambda: asyncio.run(apush(app, 1))):
            with pytest.raises(ConfigurationError, match=r"append-only file is off.*Nothing was stored") as caught:
                push()
            assert caught.value.code == "E36"
        assert len(mail) == 0
        mail.push(1, fsync=False)
        assert len(mail) == 1


@pytest.mark.parametrize("name", ["redis6", "redis7"])
def test_servers_without_waitaof(start_server: Start, name: str) -> None:
    """A server older than 7.2 is taken at its word only when it syncs before each reply, also while it rewrites."""
    server = start_server("--appendonly", "yes", name=name)
    with Conveyor(server.url) as app, server.client() as client:
        mail = app.queue("mail", fsync=True)
        with pytest.raises(ConfigurationError, match=r"appendfsync is 'everysec'.*CONFIG SET appendfsync always"):
            mail.push(1)
        client.config_set("appendfsync", "always")
        client.config_set("no-appendfsync-on-rewrite", "yes")
        with pytest.raises(ConfigurationError, match="no-appendfsync-on-rewrite"):
            mail.push(1)
        assert len(mail) == 0
        client.config_set("no-appendfsync-on-rewrite", "no")
        mail.push(1)
        client.config_set("appendfsync", "no")
        with pytest.raises(ConfigurationError, match="never syncs"):
            Conveyor(server.url).queue("mail", fsync=True).push(1)
        assert len(mail) == 1


def test_fsync_with_waitaof(start_server: Start) -> None:
    """WAITAOF confirms under `always`; under `everysec`, where it answers too early, a whole sync is watched go by."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with Conveyor(server.url) as app, server.client() as client:
        mail = app.queue("mail", fsync=True)
        mail.push(1)
        asyncio.run(apush(app, 2))
        assert client.info("commandstats")["cmdstat_waitaof"]["calls"] >= 2
        client.config_set("appendfsync", "everysec")
    with Conveyor(server.url) as app:
        mail = app.queue("mail", fsync=True)
        began = time.monotonic()
        mail.push(3)
        assert time.monotonic() - began >= 1.0  # the next sync under everysec begins within a second, and not before
        with pytest.raises(DurabilityNotReached, match="no sync of the append-only file") as caught:
            mail.push(4, wait_timeout="1ms")
        assert (caught.value.fsync, len(mail)) == (False, 4)


def test_a_file_switched_off_under_a_connection(start_server: Start) -> None:
    """A connection that was good for syncs and is not any more: the push is stored, and said to be unconfirmed."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with Conveyor(server.url) as app, server.client() as client:
        mail = app.queue("mail", fsync=True)
        mail.push(1)
        client.config_set("appendonly", "no")
        with pytest.raises(DurabilityNotReached):
            mail.push(2)
        assert len(mail) == 2


def test_wrong_wishes_are_refused(app: Conveyor) -> None:
    """Nonsense is refused when it is declared or pushed, and nothing is stored."""
    mail = app.queue("mail")
    for options in ({"fsync": 1}, {"wait_replicas": -1}, {"wait_replicas": True}, {"wait_timeout": 0}):
        with pytest.raises(ConfigurationError, match="Nothing was stored"):
            mail.push(1, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        app.queue("other", wait_replicas="1")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="plain list"):
        app.plain_list("raw").push(1, wait_replicas=1)
    assert len(mail) == 0


async def test_a_demoted_primary_confirms_nothing(pair: ReplicaPair, start_server: Start) -> None:
    """A primary that became a replica is left for the one that took over, by blocking pushes and by those of a loop."""
    old = start_server()
    door = Switch(str(old.socket))
    other = Conveyor(door.url)
    mail = other.queue("mail")
    with old.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", str(pair.port))

    def take_over() -> None:
        door.target = str(pair.primary.socket)  # who is connected stays connected

    timer = threading.Timer(0.2, take_over)
    timer.start()
    async with other:
        ids = [await mail.apush(1, wait_replicas=1), await asyncio.to_thread(mail.push, 2, wait_replicas=1)]
    timer.join(60)
    assert not timer.is_alive()
    assert bare(ids) <= stored(pair.primary)
    with old.client() as client:
        client.execute_command("REPLICAOF", "NO", "ONE")
    door.close()
