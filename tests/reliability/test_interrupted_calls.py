"""A signal handler raises amid a call (ctrl-C that is caught, an alarm): the calls after it are right, and none hangs."""

from __future__ import annotations

import asyncio
import signal
from contextlib import closing
from functools import partial

import hiredis
import pytest

from conveyor import Buffer
from conveyor.errors import QueueFull
from conveyor.jobs.app import Conveyor
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.topology import topology_of
from support.interruption import Interrupted, points, within

# Some of the points lie in callbacks that nothing leaves, and a socket that was being opened is closed when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def stored(server):
    with server.client() as raw:
        return {id_.decode() for id_ in raw.hkeys("conveyor:{mail}:jobs")}


def bare(public_id):
    return public_id.rpartition(":")[2]


@pytest.mark.row("A31")
@pytest.mark.parametrize("is_open", [True, False])
def test_pushes_after_an_interrupted_push(url, server, is_open):
    """Wherever a push is interrupted, each later one stores what it says, and a full queue still refuses."""
    for interruption in points(1 if is_open else 61):
        with server.client() as raw:
            raw.flushall()
        client = Client(url)
        queue = Queue(client, "mail", lease_ms=60_000, max_length=4)
        if is_open:
            client.announce(queue.keys)
        with interruption:
            queue.push("interrupted")
        accepted = 0
        for value in range(4):
            try:
                assert bare(queue.push(value)) in stored(server), f"push {value} stored nothing"
                accepted += 1
            except QueueFull:
                assert value == 3, "only the interrupted push may have taken a place"
        assert len(stored(server)) == 4
        with pytest.raises(QueueFull):
            queue.push("too many")
        queue.purge()
        client.close()


@pytest.mark.row("A31")
def test_reads_after_an_interrupted_read(url):
    """A plain command says nothing of its call, so what tells replies apart is counted on the connection itself."""
    for number, interruption in enumerate(points()):
        client = Client(url)
        client.execute("PING")
        with interruption:
            client.execute("ECHO", "interrupted")
        assert client.execute("ECHO", f"first {number}") == f"first {number}".encode()
        assert client.execute("ECHO", f"second {number}") == f"second {number}".encode()
        client.close()


@pytest.mark.row("A31")
def test_an_alarm_amid_a_wait_for_the_reply(url, server):
    """The handler of a real signal raises while the server is silent: the next call gets its own reply."""

    def alarm(_signal, _frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, alarm)
    client = Client(url)
    try:
        client.execute("PING")
        with server.client() as other:
            other.execute_command("CLIENT", "PAUSE", "100", "ALL")
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        with pytest.raises(Interrupted):
            client.execute("ECHO", "interrupted")
        assert client.execute("ECHO", "next") == b"next"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        client.close()


@pytest.mark.row("A31")
def test_a_push_that_was_sent_ahead(url):
    """Another call between a push and its completion: the push is repeated and not answered with the other's reply."""
    connection = Connection(topology_of(url).endpoint(""))
    from conveyor.store import operations
    from conveyor.store.keys import QueueKeys

    call = operations.push_plain(QueueKeys("conveyor", "mail"), operations.ProducerSequence("p"), ["a", b"\n\n{}"])
    collect = connection.start(call)
    assert connection.execute("ECHO", "between") == b"between"
    collect(5.0)
    assert connection.execute("HLEN", "conveyor:{mail}:jobs") == 1
    assert connection.execute("ECHO", "after") == b"after"
    connection.execute("FLUSHALL")
    connection.close()


@pytest.mark.row("A31")
def test_confirmed_pushes_after_an_interrupted_one(start_server):
    """The same of a push with fsync, which reads several replies: each later one is stored when it returns."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    for interruption in points(2):
        with Conveyor(server.url) as app:
            mail = app.queue("mail", fsync=True)
            mail.push("first")
            with interruption:
                mail.push("interrupted")
            for value in range(2):
                assert bare(mail.push(value)) in stored(server), f"push {value} stored nothing"


@pytest.mark.row("A31")
def test_acks_after_an_interrupted_ack(url):
    """Wherever an ack is interrupted, no lock stays held: the next acks return."""
    client = Client(url)
    queue = Queue(client, "mail", lease_ms=60_000)
    for interruption in points():
        queue.push_many(range(2))
        with closing(queue.consume()) as messages:
            first = next(messages)
            with interruption:
                first.ack()
            second = next(messages)
            within(5.0, second.ack)
        assert client.run(inspection.audit(queue.keys)) == []
        queue.purge()
    client.execute("FLUSHALL")
    client.close()


@pytest.mark.row("A31")
def test_a_buffer_after_an_interrupted_push(start_server):
    """Wherever a push into a buffer is interrupted, no lock stays held: the thread that delivers gets on."""
    server = start_server()
    server.kill()
    buffer = Buffer(linger="5s")
    with Conveyor(server.url, buffer=buffer) as app:
        mail = app.queue("mail")
        mail.push("kept")
        for interruption in points():
            with interruption:
                mail.push("interrupted")
            assert within(5.0, partial(len, buffer)) > 0
        server.start()
        assert within(10.0, partial(buffer.wait_empty, 10.0))


def in_conveyor(frame):
    name = frame.f_globals.get("__name__", "")
    return name.startswith("conveyor.") and frame.f_code.co_name != "data_received"


@pytest.mark.row("A31")
def test_calls_of_a_loop_that_was_interrupted(url):
    """KeyboardInterrupt leaves `run_until_complete`, and the program goes on with the same loop: its calls are right."""
    for interruption in points(1, only=in_conveyor, error=KeyboardInterrupt):
        loop = asyncio.new_event_loop()
        client = Client(url)

        async def echo(word, client=client):
            return await client.aexecute("ECHO", word, retry_for=5.0)

        async def both(client=client):
            return await asyncio.gather(*(client.aexecute("ECHO", str(n), retry_for=5.0) for n in range(3)))

        loop.run_until_complete(echo("open"))
        with interruption:
            loop.run_until_complete(echo("interrupted"))
        assert loop.run_until_complete(both()) == [b"0", b"1", b"2"]
        loop.run_until_complete(client.aclose())
        _end(loop)


def _end(loop):
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.row("A31")
async def test_a_call_that_was_cancelled(url):
    """A cancelled call leaves its reply to nobody: the others of the loop get theirs."""
    client = Client(url)
    await client.aexecute("PING")
    for n in range(20):
        lost = asyncio.ensure_future(client.aexecute("ECHO", "cancelled"))
        kept = asyncio.ensure_future(client.aexecute("ECHO", f"kept {n}"))
        for _ in range(n % 5):
            await asyncio.sleep(0)
        lost.cancel()
        assert await kept == f"kept {n}".encode()
        assert await client.aexecute("ECHO", f"next {n}") == f"next {n}".encode()
    await client.aclose()


@pytest.mark.row("A31")
def test_every_word_of_a_command_is_text_or_bytes(url, monkeypatch):
    """No int is packed, by us or by redis-py for us: hiredis 3.5.0 ends the process when a handler raises meanwhile."""
    packed = []
    real = hiredis.pack_command

    def pack(words):
        packed.append(words)
        return real(words)

    monkeypatch.setattr(hiredis, "pack_command", pack)
    with Conveyor(url.replace("db=0", "db=3")) as app:
        mail = app.queue("mail", max_length=100)

        @app.task(queue="sends")
        def send(n: int) -> None: ...

        mail.push(1, delay="1h", priority=3, expires="2h")
        send.enqueue(1)
        mail.push_many(range(3))
        for message in mail.pull(2):
            message.extend("30s")
            message.nack()
        with closing(mail.consume()) as messages:
            next(messages).ack()
        mail.stats()
        mail.purge()
        app.client.execute("FLUSHDB")
    words = {type(word) for command in packed for word in command}
    assert words <= {str, bytes}, [c for c in packed if any(not isinstance(w, (str, bytes)) for w in c)][:3]
    assert any(command[0] in {"SELECT", b"SELECT"} for command in packed)
