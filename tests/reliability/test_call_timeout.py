"""`Conveyor(timeout=…)`: a server that takes a connection and never answers costs a call no more than that."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.store.client.buffer import Buffer
from conveyor.store.transport import connection, replies
from conveyor.store.transport.connection import Connection
from support.time_limits import PATIENCE
from support.waiting import auntil, until
from testbed.server_process import Server

Start = Callable[..., Server]
SHORT = 0.4
ROOM = 2.5
"""Seconds that a busy machine may add; without the timeout each of these calls takes from 5 to 20."""


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Let the server stand still: the kernel still takes connections and bytes for it."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def black_hole() -> Iterator[str]:
    """Yield the URL of a listener that never reads or writes, with a password, so that the first exchange waits too."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"redis://:secret@127.0.0.1:{listener.getsockname()[1]}/3"


def make(
    url: str, **options: Any
) -> tuple[Conveyor, dict[str, Callable[[], Any]], dict[str, Callable[[], Awaitable[Any]]]]:
    """Return an app, its blocking calls, and their awaitable forms."""
    app = Conveyor(url, timeout=SHORT, **options)
    mail, both, raw = app.queue("mail"), app.queue("both", partitions=2), app.plain_list("raw")
    send = app.external_task("send")
    job = app.job("mail:0000000000000000000001")
    blocking: dict[str, Callable[[], Any]] = {
        "push": lambda: mail.push(1),
        "push_many": lambda: mail.push_many(range(3000)),
        "priority": lambda: mail.push(1, priority=3),
        "fsync": lambda: mail.push(1, fsync=True, wait_timeout="100ms"),
        "partitioned": lambda: both.push(1),
        "list": lambda: raw.push({}),
        "pull": mail.pull,
        "pull of partitions": both.pull,
        "stats": mail.stats,
        "purge": mail.purge,
        "enqueue": lambda: send.enqueue(1),
        "status": job.status,
        "cancel": job.cancel,
        "own id": lambda: app.job("own").status(),
        "ping": app.ping,
    }
    awaitable: dict[str, Callable[[], Awaitable[Any]]] = {
        "push": lambda: mail.apush(1),
        "push_many": lambda: mail.apush_many(range(3000)),
        "priority": lambda: mail.apush(1, priority=3),
        "fsync": lambda: mail.apush(1, fsync=True, wait_timeout="100ms"),
        "partitioned": lambda: both.apush(1),
        "list": lambda: raw.apush({}),
        "pull": mail.apull,
        "pull of partitions": both.apull,
        "stats": mail.astats,
        "purge": mail.apurge,
        "enqueue": lambda: send.aenqueue(1),
        "status": job.astatus,
        "cancel": job.acancel,
        "own id": lambda: app.job("own").astatus(),
        "ping": app.aping,
    }
    return app, blocking, awaitable


NAMES = list(make("redis://127.0.0.1:1")[1])


@pytest.mark.row("C110")
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_ends_in_time(start_server: Start, name: str, connected: bool) -> None:
    """A blocking call to a server that stands still raises StoreUnavailable in time, over an open connection and a new one."""
    server = start_server()
    app, calls, _ = make(server.url)
    with app:
        if connected:
            app.ping(timeout=PATIENCE)
        with frozen(server):
            began = monotonic()
            with pytest.raises(StoreUnavailable):
                calls[name]()
            assert SHORT / 2 <= monotonic() - began < SHORT + ROOM


@pytest.mark.row("C110")
@pytest.mark.parametrize("connected", [False, True])
async def test_awaited_calls_end_in_time(start_server: Start, connected: bool) -> None:
    """Awaitable calls end in time as well, also when all of them wait at once for the one connection."""
    server = start_server()
    app, _, calls = make(server.url)
    async with app:
        if connected:
            await app.aping(timeout=PATIENCE)
        with frozen(server):
            took, errors = await timed(call for call in calls.values() for _ in range(5))
    assert {type(error) for error in errors} == {StoreUnavailable}
    assert max(took) < SHORT + ROOM


async def timed(calls: Any) -> tuple[list[float], list[object]]:
    """Make the calls at once; return how long each took, and what it raised or returned."""

    async def one(call: Callable[[], Awaitable[Any]]) -> tuple[float, object]:
        began = monotonic()
        try:
            answer = await call()
        except Exception as error:
            answer = error
        return monotonic() - began, answer

    answers = await asyncio.gather(*(one(call) for call in calls))
    return [took for took, _ in answers], [answer for _, answer in answers]


@pytest.mark.row("C110")
@pytest.mark.parametrize("kind", ["redis", "redis+cluster", "redis+sentinel"])
async def test_a_black_hole_is_left_in_time(kind: str) -> None:
    """A port that takes connections and says nothing at all ends calls in time: one server, a cluster, sentinels."""
    with black_hole() as url:
        url = url.replace("redis://", f"{kind}://")
        url = url.replace("/3", "/0" if kind == "redis+cluster" else "/mymaster" if kind == "redis+sentinel" else "/3")
        app, calls, awaited = make(url)
        async with app:
            for name in ("push", "stats", "ping"):
                began = monotonic()
                with pytest.raises(StoreUnavailable):
                    await asyncio.to_thread(calls[name])
                assert monotonic() - began < SHORT + ROOM, name
            took, errors = await timed(awaited[name] for name in ("push", "stats", "ping"))
    assert {type(error) for error in errors} == {StoreUnavailable}
    assert max(took) < SHORT + ROOM


@pytest.mark.row("C110")
async def test_a_wait_has_its_own_time_besides(start_server: Start) -> None:
    """`pull(wait=)` and `result(timeout=)` of a server that stops answering while they wait end after both times."""
    server = start_server()
    app = Conveyor(server.url, timeout=SHORT)
    mail = app.queue("mail")
    async with Conveyor(server.url) as other:  # which waits for a busy machine
        job = app.job((await other.external_task("never").aenqueue()).id)
    async with app:
        await app.aping(timeout=PATIENCE)

        async def listens() -> bool:
            try:
                await job.aresult(timeout=0.05)
            except StoreUnavailable:
                return False
            except TimeoutError:
                return True
            raise AssertionError("it has a result")

        await auntil(listens, what="the connection for results")
        calls: list[Callable[[], Any]] = [
            lambda: asyncio.to_thread(mail.pull, 1, 1.0),
            lambda: asyncio.to_thread(job.result, 1.0),
            lambda: mail.apull(1, 1.0),
            lambda: job.aresult(1.0),
        ]
        for call in calls:
            waiting = asyncio.create_task(timed([call]))
            with server.client() as client:
                await auntil(lambda: any(one["cmd"] in {"blpop", "evalsha"} for one in client.client_list()))
            with frozen(server):
                [took], [error] = await waiting
            assert isinstance(error, StoreUnavailable | TimeoutError)
            assert took < 1.0 + SHORT + ROOM


@pytest.mark.row("C110")
@pytest.mark.parametrize("awaitable", [False, True])
async def test_a_dead_connection_is_replaced_within_the_call(start_server: Start, awaitable: bool) -> None:
    """A connection on which nothing comes back, as behind a firewall that forgot it, costs half of a call's time and no call."""
    server = start_server()
    with forgetful_relay(server) as (url, forget):
        app = Conveyor(url, timeout=2 * ROOM)  # of which half is left for a busy machine
        mail = app.queue("mail")
        async with app:
            for n in range(2):
                began = monotonic()
                await (mail.apush(n) if awaitable else asyncio.to_thread(mail.push, n))
                took = monotonic() - began
                forget()
            assert ROOM / 2 <= took < 2 * ROOM
            assert len(await mail.apull(5)) == 2


@contextmanager
def forgetful_relay(server: Server) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the URL of a relay to *server*, and what makes it carry nothing more for the connections that it has."""
    generation = 0

    def carry(source: socket.socket, target: socket.socket, born: int) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if born == generation:
                    target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(server.socket))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=(*pair, generation), daemon=True).start()

    def forget() -> None:
        nonlocal generation
        generation += 1

    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0", forget
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for end in ends:
                end.close()


@pytest.mark.row("C110")
async def test_a_push_behind_others_keeps_its_time(start_server: Start) -> None:
    """Pushes that gather behind one in flight fail by their own time each, and what came last is tried the longest."""
    server = start_server()
    app = Conveyor(server.url, timeout=1.0)
    mail = app.queue("mail")
    async with app:
        await app.aping(timeout=PATIENCE)
        with frozen(server):
            first = asyncio.create_task(timed([lambda: mail.apush(1)]))
            await asyncio.sleep(0.7)
            second = asyncio.create_task(timed([lambda: mail.apush(2)]))
            [early], [error] = await first
            [late], [other] = await second
        assert isinstance(error, StoreUnavailable)
        assert isinstance(other, StoreUnavailable)
        assert 0.5 <= early < 1.0 + ROOM
        assert 0.9 <= late < 1.0 + ROOM
        assert await app.aping(timeout=PATIENCE)
        assert await mail.apush(3)


@pytest.mark.row("C110")
def test_a_buffer_takes_over_in_time(start_server: Start) -> None:
    """With a buffer a push to a server that stands still is kept within the time, and none is lost."""
    server = start_server()
    app = Conveyor(server.url, timeout=SHORT, buffer=Buffer())
    mail = app.queue("mail")
    with app:
        with frozen(server):
            began = monotonic()
            for n in range(20):
                mail.push(n)
            assert monotonic() - began < SHORT + ROOM
        taken: list[int] = []
        with Conveyor(server.url) as other:

            def take_some() -> bool:
                for message in other.queue("mail").pull(20, wait="5s"):
                    taken.append(message.body)
                    message.ack()
                return len(taken) >= 20

            until(take_some, what="twenty messages")
    assert sorted(taken) == list(range(20))


def test_ping_says_how_long_and_who_is_away(start_server: Start) -> None:
    """`ping` returns the seconds to the answer; its own timeout counts, the shorter and the longer."""
    server = start_server()
    with Conveyor(server.url, timeout="200ms") as app:
        assert 0 < app.ping(timeout=PATIENCE) < PATIENCE
        with frozen(server):
            began = monotonic()
            with pytest.raises(StoreUnavailable):
                app.ping(timeout="50ms")
            assert monotonic() - began < 0.2 + ROOM
            began = monotonic()
            with pytest.raises(StoreUnavailable):
                app.ping(timeout="800ms")
            assert monotonic() - began >= 0.4
        assert app.ping(timeout=PATIENCE) > 0
        server.kill()
        with pytest.raises(StoreUnavailable, match="Cannot reach"):
            app.ping(timeout="100ms")


@pytest.mark.parametrize("value", [0, -1, "soon", float("nan"), True, object()])
def test_a_bad_timeout_is_refused(value: Any) -> None:
    """A timeout that is no duration above zero is refused where the app is made, and by `ping` before anything is sent."""
    with pytest.raises(ConfigurationError, match="timeout"):
        Conveyor("redis://127.0.0.1:1", timeout=value)
    with pytest.raises(ConfigurationError, match="timeout"):
        Conveyor("redis://127.0.0.1:1").ping(timeout=value)


@pytest.mark.leaves_keys("the jobs that were enqueued")
def test_a_quick_answer_costs_no_poll(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with any timeouts set those of the kernel once, and one that is answered while the kernel waits makes no other call."""
    set_up: list[object] = []
    waits: list[float] = []
    block_briefly, wait = connection._block_briefly, Connection._wait

    def setting(one: socket.socket) -> None:
        set_up.append(one)
        block_briefly(one)

    def waiting(one: socket.socket, refusal: Exception, event: int, until: float) -> None:
        waits.append(until)
        wait(one, refusal, event, until)

    monkeypatch.setattr(connection, "_block_briefly", setting)
    monkeypatch.setattr(connection, "POLL_AFTER", PATIENCE)  # so that no busy machine is slower
    monkeypatch.setattr(Connection, "_wait", staticmethod(waiting))
    with Conveyor(url, timeout=4) as app:
        for number in range(20):
            app.queue("orders").push(number)
        app.client.retry_for = 6
        app.queue("orders").push(20)

    assert len(set_up) == 1
    assert waits == []


STORM = 5.0
"""Seconds of signals, where a call takes `SHORT`."""


@pytest.mark.row("C110")
@pytest.mark.parametrize("each", [0.02, 0.001], ids=["seldom", "often"])
@pytest.mark.parametrize("what", ["answer", "room to write"])
def test_signals_do_not_lengthen_a_call(start_server: Start, what: str, each: float) -> None:
    """A server that stands still costs a call no more than its timeout while signals are handled, which interrupt each wait."""
    server, ticks, storm = start_server(), 0, int(STORM / each)

    def tick(*_: object) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == storm:
            signal.setitimer(signal.ITIMER_REAL, 0)

    with Conveyor(server.url, timeout=SHORT, max_payload="16MiB") as app:
        app.ping(timeout=PATIENCE)
        before = signal.signal(signal.SIGALRM, tick)
        try:
            with frozen(server):
                signal.setitimer(signal.ITIMER_REAL, each, each)
                with pytest.raises(StoreUnavailable):
                    app.queue("mail").push("" if what == "answer" else "x" * 16_000_000)
                ended = ticks
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert 0 < ended < storm


@pytest.mark.parametrize("draw", ["longest", "shortest"])
def test_a_call_is_tried_until_its_time_is_over(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause that was drawn long ends the tries early: the last of them comes within 20 ms of the end, and none behind it."""
    clock = [100.0]
    monkeypatch.setattr(replies, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(replies.random, "uniform", lambda least, most: most if draw == "longest" else least)
    for seconds, end in ((0.5, 100.5), (5.0, 105.0), (5.0, 102.0)):
        clock[0] = 100.0
        timer = replies.RetryTimer(seconds, end)
        while (pause := timer.next_pause("Connection refused")) is not None:
            clock[0] += pause
        assert end - 0.02 <= clock[0] < end
    assert replies.RetryTimer(0.0, 200.0).next_pause("Connection refused") is None
