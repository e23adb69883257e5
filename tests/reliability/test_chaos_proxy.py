"""The fault proxy of the chaos runs: each fault does what it says, and no more."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from chaos.fault_proxy import Proxy
from chaos.resp_framing import RespSplitter
from support.waiting import until
from testbed.server_process import Server

ONCE = Retry(NoBackoff(), 0)  # redis-py repeats commands by default, also when it is given no retry
SET = b"*3\r\n$3\r\nset\r\n$1\r\nk\r\n$5\r\nv\r\nvv\r\n"

pytestmark = pytest.mark.standalone_only("a proxy stands before the socket of one server")


@pytest.fixture
def proxy(server: Server, url: str) -> Iterator[Proxy]:
    """A proxy before the emptied server."""
    with Proxy(server.socket, seed=1) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[redis_py.Redis]:
    """A client through the proxy that repeats nothing."""
    with redis_py.Redis.from_url(proxy.url, retry=ONCE, socket_timeout=5) as client:
        yield client


def test_splitter_finds_the_same_wholes_in_any_chunks() -> None:
    """Commands and replies of both protocols end where they end, whether the bytes come one by one or all at once."""
    wholes = [
        SET,
        b"PING\r\n",
        b"+OK\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*2\r\n:1\r\n$0\r\n\r\n$-1\r\n",
        b"%1\r\n+k\r\n*1\r\n$2\r\n\r\n\r\n",
        b"|1\r\n+ttl\r\n:3\r\n$1\r\nx\r\n",
        b">2\r\n+message\r\n$1\r\nx\r\n",
        b"_\r\n",
    ]
    stream = b"".join(wholes)
    ends = [sum(map(len, wholes[: i + 1])) for i in range(len(wholes))]

    for size in (1, 2, 7, len(stream)):
        splitter = RespSplitter()
        found = [
            (at + end, name, push)
            for at in range(0, len(stream), size)
            for end, name, push in splitter.feed(stream[at : at + size])
        ]
        assert [end for end, _, _ in found] == ends
        assert [name for _, name, _ in found][:2] == ["SET", "PING"]
        assert [push for _, _, push in found] == [whole.startswith(b">") for whole in wholes]


def test_it_passes_everything_and_counts_commands(proxy: Proxy, client: redis_py.Redis) -> None:
    """Without a fault the proxy changes nothing, also for large values, and knows how often each command came."""
    value = bytes(range(256)) * 20_000

    assert client.set("k", value)
    assert [client.get("k") == value for _ in range(3)] == [True] * 3
    client.delete("k")

    assert (proxy.commands["SET"], proxy.commands["GET"]) == (1, 3)
    assert proxy.connections() == 1


def test_a_cut_request_is_not_carried_out(proxy: Proxy, redis: redis_py.Redis) -> None:
    """A connection cut before the last byte of a request has sent nothing; cut after it, the server has done it."""
    for after, stored in ((len(SET) - 1, None), (len(SET), b"v\r\nvv")):
        redis.delete("k")
        proxy.cut(after=after, direction="up")
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as raw:
            raw.sendall(SET + (b"*1\r\n$4\r\nPING\r\n" if stored else b""))
            assert raw.recv(100) in {b"", b"+OK\r\n"}
        if stored:
            until(lambda: redis.get("k") == b"v\r\nvv")
        assert redis.get("k") == stored
    redis.delete("k")
    assert proxy.count["cut"] == 2


def test_a_cut_reply_arrives_up_to_the_byte(proxy: Proxy) -> None:
    """Of a reply cut after three bytes three bytes arrive, and then the end."""
    proxy.cut(after=3, direction="down")
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as raw:
        raw.sendall(b"PING\r\n")

        assert raw.recv(100) == b"+PO"
        assert raw.recv(100) == b""


def test_a_swallowed_reply_was_carried_out(proxy: Proxy, client: redis_py.Redis, redis: redis_py.Redis) -> None:
    """The reply of the second INCR is lost, the first and third are not, and the server counted all three."""
    proxy.swallow_reply(2, "incrby")

    assert client.incr("n") == 1
    with pytest.raises(redis_py.ConnectionError):
        client.incr("n")
    assert client.incr("n") == 3
    assert proxy.count["swallowed"] == 1
    redis.delete("n")


def test_a_swallowed_reply_may_leave_the_connection_hanging(proxy: Proxy, redis: redis_py.Redis) -> None:
    """With `hang` the connection stays open and silent, so that only a deadline of the client's ends the wait."""
    proxy.swallow_reply(1, "INCRBY", hang=True)

    with redis_py.Redis.from_url(proxy.url, retry=ONCE, single_connection_client=True) as client:
        client.ping()
        client.connection._sock.settimeout(0.2)  # now that it is connected, however slowly
        with pytest.raises(redis_py.TimeoutError):
            client.incr("n")
    assert redis.get("n") == b"1"
    redis.delete("n")


def test_a_delay_keeps_the_order(proxy: Proxy, client: redis_py.Redis) -> None:
    """Every command takes the delay there and back, and a pipeline is answered in order however the delay varies."""
    client.ping()
    proxy.delay(0.03, 0.02)

    began = time.monotonic()
    with client.pipeline(transaction=False) as pipeline:
        for i in range(50):
            pipeline.echo(str(i))
        assert pipeline.execute() == [str(i).encode() for i in range(50)]
    assert time.monotonic() - began >= 0.02

    proxy.heal()
    assert client.ping()


def test_a_black_hole_delivers_late(proxy: Proxy, redis: redis_py.Redis) -> None:
    """Bytes sent into a swallowed direction are not refused; they arrive when it is free again, even if the sender has gone."""
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as raw:
        raw.sendall(b"PING\r\n")
        assert raw.recv(100) == b"+PONG\r\n"
        proxy.black_hole()
        raw.sendall(SET)
        raw.settimeout(0.1)
        with pytest.raises(TimeoutError):
            raw.recv(100)
    assert redis.get("k") is None

    proxy.heal()
    until(lambda: redis.get("k") == b"v\r\nvv")
    redis.delete("k")


def test_a_black_hole_may_have_one_direction(proxy: Proxy, redis: redis_py.Redis) -> None:
    """When only replies are lost the server carries out what it is told."""
    with socket.create_connection(("127.0.0.1", proxy.port), 5) as raw:
        proxy.black_hole(("down",))
        raw.sendall(SET)
        until(lambda: redis.get("k") == b"v\r\nvv")
        proxy.heal()
        assert raw.recv(100) == b"+OK\r\n"
    redis.delete("k")


def test_storms_close_connections_until_healed(proxy: Proxy, client: redis_py.Redis) -> None:
    """A storm ends connections again and again, and a healed proxy none; a refusing one accepts no connection."""
    client.ping()
    proxy.storm(every=0.01)
    until(lambda: proxy.count["closed"] >= 1)
    until(lambda: _fails(client))
    proxy.heal()
    closed = proxy.count["closed"]
    client.connection_pool.disconnect()
    assert all(client.ping() for _ in range(100))
    assert proxy.count["closed"] == closed

    proxy.refuse()
    assert proxy.close_all() == 1
    with pytest.raises(redis_py.ConnectionError):
        client.ping()


def _fails(client: redis_py.Redis) -> bool:
    try:
        return not client.ping()
    except redis_py.ConnectionError:
        return True


def test_random_cuts_are_as_many_as_were_asked(proxy: Proxy, client: redis_py.Redis) -> None:
    """Forty random cuts strike forty connections; after that nothing is cut."""
    proxy.cut_randomly(mean=200, times=40, seed=7)
    failures = 0
    while proxy.cuts:
        try:
            client.ping()
        except redis_py.ConnectionError:
            failures += 1

    assert all(client.ping() for _ in range(100))
    assert proxy.count["cut"] == 40
    assert failures >= 20  # a cut after the whole reply shows only at the next command, or in the handshake
    assert failures <= 80


def test_it_listens_on_a_socket_file_too(server: Server, url: str, directory: Path) -> None:
    """A proxy that is given a path listens there, and a server that is down makes it hang up."""
    with Proxy(directory / "nobody", listen=directory / "p") as proxy:
        assert proxy.url == f"unix://{directory}/p?db=0"
        with redis_py.Redis.from_url(proxy.url, retry=ONCE) as client, pytest.raises(redis_py.ConnectionError):
            client.ping()
        proxy.upstream = server.socket
        with redis_py.Redis.from_url(proxy.url) as client:
            assert client.ping()
