"""Network faults: rows C16 to C20 of docs/reliability.md, through a proxy that breaks connections."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
from redis import Redis

from chaos.fault_proxy import Proxy
from conveyor.jobs.app import Conveyor
from conveyor.store.transport import replies
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.url import StandaloneServer
from support.job_load import JobLoad
from support.running_worker import working
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
Start = Callable[..., Server]


@pytest.mark.row("C16", "I2")
async def test_cuts_at_random_bytes_make_and_end_each_job_once(start_server: Start, rounds: Rounds) -> None:
    """Connections that end at random bytes, both ways, under load: as many jobs as calls, each ended once, and hardly a caller is told."""
    server, seed = start_server(), random.randrange(2**32)
    cuts = rounds(5000, 150)
    print(f"seed {seed}")
    with Proxy(server.socket, seed=seed) as before, Proxy(server.socket, seed=seed + 1) as behind:
        async with JobLoad(behind.url, producer=before.url) as load:
            before.cut_randomly(mean=1500, times=cuts, seed=seed)
            behind.cut_randomly(mean=8000, times=cuts, seed=seed)  # a turn's reply is larger than a push
            await auntil(lambda: before.count["cut"] + behind.count["cut"] >= cuts, 60 + cuts / 2)
            before.heal()
            behind.heal()
    print(f"{cuts} cuts, {len(load.accepted)} jobs, {len(load.unknown)} calls that ran out of patience")
    assert (load.errors, load.lost, load.again) == ([], [], [])
    assert set(load.accepted) <= load.ran.keys() <= {*load.accepted, *load.unknown}
    assert len(load.unknown) <= cuts / 500


@pytest.mark.row("C18")
async def test_a_storm_of_killed_connections(start_server: Start, rounds: Rounds) -> None:
    """CLIENT KILL of everybody every 100 ms under load loses nothing and runs nothing twice."""
    server = start_server()
    with server.client() as client:
        async with JobLoad(server.url, bulk=10) as load:
            for _ in range(rounds(600, 15)):
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(0.1)
    assert (load.errors, load.unknown, load.lost, load.again) == ([], [], [], [])


@pytest.mark.row("C20", "I10")
async def test_a_slow_way_takes_no_lease(start_server: Start, rounds: Rounds, caplog: pytest.LogCaptureFixture) -> None:
    """With 200 ± 150 ms each way no living worker is taken for dead, and no job runs twice."""
    server, seed = start_server(), random.randrange(2**32)
    print(f"seed {seed}")
    with Proxy(server.socket, seed=seed) as proxy:
        async with JobLoad(proxy.url, producer=server.url, workers=2, lease="3s") as load:
            proxy.delay(0.2, 0.15)
            until_then = monotonic() + rounds(600, 2)
            while monotonic() < until_then:
                await load.more(1)
            proxy.heal()
    assert "is dead" not in caplog.text
    assert (load.errors, load.lost, load.again) == ([], [], [])


@pytest.mark.row("C17")
async def test_a_peer_that_is_gone_without_a_word(start_server: Start, rounds: Rounds) -> None:
    """Nothing passes, or one reply never comes and its connection stays open: work is picked up within 15 s; idle workers stay."""
    server = start_server()
    idle = Conveyor(server.url)
    idle.task(name="idle")(_nothing)
    with server.client() as client:
        async with working(idle):
            [before] = await auntil(lambda: _blocked(client))
            ways = [_gone(start_server(), rounds, name) for name in ("all", "BLPOP", "EVALSHA", "CLIENT")]
            await asyncio.gather(*ways)
            await auntil(lambda: _blocked(client) == [before])  # its connection still: no timeout of the library's own
    await idle.aclose()


async def _gone(server: Server, rounds: Rounds, name: str) -> None:
    """Let the reply to the next command *name* be lost with its connection left open, or let nothing pass at all."""
    ran: list[int] = []
    with Proxy(server.socket) as proxy, Conveyor(server.url) as other, server.client() as client:
        app = Conveyor(proxy.url, lease="3s")
        app.client.retry_for = 2.0  # who connects waits no longer either

        @app.task(name="note")
        async def note(n: int) -> None:
            ran.append(n)

        task = other.task(name="note")(note.function)
        async with working(app):
            for n in range(rounds(50, 1)):
                await auntil(lambda: _blocked(client))
                if name == "all":
                    proxy.black_hole()
                elif name == "CLIENT":
                    proxy.swallow_reply(1, name, hang=True)  # of both connections, while they are made
                    proxy.swallow_reply(3, name, hang=True)
                    proxy.close_all()
                else:
                    proxy.swallow_reply(1, name, hang=True)
                    await asyncio.to_thread(task.enqueue, -1)  # the next wait is the one whose reply is lost
                    await auntil(lambda n=n: ran[-1:] == [-1])
                await asyncio.to_thread(task.enqueue, n)
                if name == "all":
                    await asyncio.sleep(rounds(60, 6))  # longer than any reply is waited for
                    assert n not in ran
                    proxy.heal()
                began = monotonic()
                await auntil(lambda n=n: n in ran, 15)
                print(f"{name}: picked up after {monotonic() - began:.2f} s")
        assert name == "all" or proxy.count["swallowed"] > 0
        await app.aclose()


async def _nothing() -> None: ...


def _blocked(client: Redis) -> list[str]:
    """Return the connections that wait for work."""
    return [one["id"] for one in client.client_list() if one["cmd"] == "blpop" and "b" in one["flags"]]


@pytest.mark.row("C17")
async def test_our_sockets_keep_themselves_alive(start_server: Start) -> None:
    """Both kinds of connection have TCP keepalive on, so that a peer which is gone is noticed where nothing is sent."""
    server = start_server()
    with Proxy(server.socket) as proxy:
        wire, connection = AsyncConnection(StandaloneServer(proxy.url)), Connection(StandaloneServer(proxy.url))
        await wire.open()
        connection.execute("PING")
        for one in (wire._transport.get_extra_info("socket"), connection._socket):
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        wire.close()
        connection.close()


@pytest.mark.row("C19")
async def test_a_herd_comes_back_one_by_one(
    start_server: Start, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many connections that were lost at once try again spread out: a few times each, evenly, and not all in the same moment."""
    server, herd = start_server("--maxclients", "1000"), rounds(400, 100)
    instants, timers, next_pause = dict[int, list[float]](), list[Any](), replies.RetryTimer.next_pause

    def noted(timer: replies.RetryTimer, text: str) -> float | None:
        """Note when a client tries again, by the sum of its pauses: a busy machine does not change them."""
        pause = next_pause(timer, text)
        assert pause is not None
        timers.append(timer)  # so that no other gets its place in memory
        before = instants.setdefault(id(timer), [])
        before.append((before[-1] if before else 0.0) + pause)
        return pause

    with Proxy(server.socket) as proxy:
        wires = [AsyncConnection(StandaloneServer(proxy.url)) for _ in range(herd)]
        for wire in wires:
            await wire.open()
        monkeypatch.setattr(replies.RetryTimer, "next_pause", noted)
        proxy.refuse()
        proxy.close_all()
        calls = [asyncio.create_task(_ping(wire)) for wire in wires]
        await auntil(lambda: len(instants) == herd and all(tries[-1] > 2 for tries in instants.values()))
        proxy.heal()
        await asyncio.wait_for(asyncio.gather(*calls), 60)
        for wire in wires:
            wire.close()
    away = [sum(at < 2 for at in tries) for tries in instants.values()]
    back = Counter(int(10 * tries[-1]) for tries in instants.values())
    print(f"{herd} clients: {sum(away)} attempts in the first 2 s; back, by tenths of a second: {sorted(back.items())}")
    assert sum(away) < 15 * herd  # a blind repeat would have made some thousand each
    assert max(back.values()) < herd / 2
    pauses = Counter(int(10 * replies.backoff(20)) for _ in range(20_000))
    assert max(pauses.values()) < 1.3 * 20_000 / 20  # evenly over 2 s, once they have failed for a while


async def _ping(wire: AsyncConnection) -> object:
    from conveyor.store.operations import announce

    return await wire.run(announce("conveyor:queues", "herd"), retry_for=None)


async def test_a_wire_that_is_closed_while_it_opens(start_server: Start) -> None:
    """A socket that opens after its connection was closed is closed as well, so none stays behind."""
    server, begun, go = start_server(), asyncio.Event(), asyncio.Event()

    class Slow(StandaloneServer):
        async def aopen(self) -> Any:
            opened = await super().aopen()
            begun.set()
            await go.wait()
            return opened

    wire = AsyncConnection(Slow(server.url))
    opening = asyncio.create_task(wire.open())
    await asyncio.wait_for(begun.wait(), 60)
    wire.close()
    go.set()
    with pytest.raises(OSError, match="closed"):
        await asyncio.wait_for(opening, 60)
    with server.client() as client:
        await auntil(lambda: len(client.client_list()) == 1)
