"""An end that is asked for again, and one that meets an extension: both succeed, and it counts once."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import aclosing, closing, suppress

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor.errors import LeaseLost, StoreUnavailable
from conveyor.messaging.queue import Queue
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.transport.async_connection import AsyncConnection, ConnectionLost
from conveyor.store.transport.connection import Connection
from support.interruption import points, within
from support.message_fixtures import FAST
from support.waiting import until, until_ended


@pytest.fixture(params=["pull", "consume"])
def take(request):
    """Lease one message of a queue, pulled or from a loop; return it and what closes its consumer."""

    def take(queue):
        if request.param == "pull":
            [message] = queue.pull()
            return message, lambda: None
        consumer = queue.consume()
        return next(consumer), consumer.close

    return take


class Fault:
    """Breaks the connection at the next turn or extension; `sent` tells whether the server still carries it out."""

    def __init__(self, monkeypatch, *, sent):
        self.armed, self.sent = False, sent
        real, areal = Connection.execute, AsyncConnection.execute
        fault = self

        def execute(connection, *command, block=0.0):
            if not fault.armed:
                return real(connection, *command, block=block)
            if fault.sent:
                real(connection, *command, block=block)
            connection.close()
            raise TransportError("cut")

        async def aexecute(connection, *command, **times):
            if not fault.armed:
                return await areal(connection, *command, **times)
            if fault.sent:
                await areal(connection, *command, **times)
            raise ConnectionLost("cut")

        monkeypatch.setattr(Connection, "execute", execute)
        monkeypatch.setattr(AsyncConnection, "execute", aexecute)


@pytest.fixture(params=[False, True], ids=["not sent", "reply lost"])
def fault(request, monkeypatch):
    return Fault(monkeypatch, sent=request.param)


@pytest.fixture
def impatient(url):
    """A queue whose calls are not repeated by themselves; in order and empty afterwards."""
    client = Client(url, retry_for=0)
    queue = Queue(client, "mail", lease_ms=2000, retry=FAST)
    yield queue
    assert client.run(inspection.audit(queue.keys)) == []
    queue.purge()
    queue.purge(dead=True)
    stats = queue.stats()
    assert (stats.leased, stats.workers) == (0, 0)
    client.close()


def is_done(queue):
    stats = queue.stats()
    return (stats.ready, stats.scheduled, stats.leased, stats.dead) == (0, 0, 0, 0)


@pytest.mark.row("A32")
@pytest.mark.parametrize(
    ("end", "left"),
    [
        (lambda message: message.ack(), (0, 0, 0)),
        (lambda message: message.nack(delay="1h"), (0, 1, 0)),
        (lambda message: message.dead("no use"), (0, 0, 1)),
    ],
    ids=["ack", "nack", "dead"],
)
def test_an_end_is_repeated(impatient, fault, take, end, left):
    """After StoreUnavailable the same call again returns, whether or not the first was carried out, and it counts once."""
    impatient.push(1)
    message, close = take(impatient)
    fault.armed = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            end(message)
    fault.armed = False
    end(message)
    stats = impatient.stats()
    assert (stats.ready, stats.scheduled, stats.dead) == left
    assert stats.leased == 0
    with pytest.raises(LeaseLost, match="already settled"):
        end(message)
    close()


@pytest.mark.row("A32")
def test_another_end_is_refused_until_the_first_is_known(impatient, fault):
    """The first end may have been carried out, so another one is no answer to StoreUnavailable."""
    impatient.push(1)
    [message] = impatient.pull()
    fault.armed = True
    with pytest.raises(StoreUnavailable):
        message.ack()
    fault.armed = False
    with pytest.raises(LeaseLost, match="settled in another way"):
        message.nack()
    message.ack()
    assert is_done(impatient)


@pytest.mark.row("A32")
def test_an_ack_is_repeated_when_its_identity_is_over(impatient, fault):
    """Long after it, Redis has forgotten who acknowledged: the message that is gone is done, one that is back was lost."""
    impatient.push(1)
    [message] = impatient.pull()
    worker = message._leased.session.worker
    fault.armed = True
    with pytest.raises(StoreUnavailable):
        message.ack()
    fault.armed = False
    if fault.sent:
        impatient.client.execute("DEL", impatient.keys.leased(worker))  # it expires after 10 s
        message.ack()
        assert is_done(impatient)
    else:
        impatient.client.run(operations.reap(impatient.keys, worker))
        with pytest.raises(LeaseLost):
            message.ack()
        assert impatient.stats().ready == 1


@pytest.mark.row("A32")
def test_the_end_of_a_batch_is_repeated(impatient, fault):
    """The same of a batch: what was settled one by one stays as it was, and the rest is reported again."""
    impatient.push_many(range(4))
    with closing(impatient.batches(size=4)) as batches:
        batch = next(batches)
        batch[0].dead("no use")
        batch[1].extend("1m")
        fault.armed = True
        with pytest.raises(StoreUnavailable):
            batch.ack()
        fault.armed = False
        batch.ack()
        stats = impatient.stats()
        assert (stats.ready, stats.leased, stats.dead) == (0, 0, 1)


@pytest.mark.row("A32")
def test_a_block_repeats_the_end_that_failed_inside(impatient, fault):
    """A block whose own ack failed, and that ends in order all the same, reports it once more."""
    impatient.push(1)
    [message] = impatient.pull()
    with message:
        fault.armed = True
        with pytest.raises(StoreUnavailable):
            message.ack()
        fault.armed = False
    assert is_done(impatient)


@pytest.mark.row("A32")
async def test_an_awaited_end_is_repeated(impatient, fault):
    """The same on a loop."""
    await impatient.apush(1)
    [message] = await impatient.apull()
    fault.armed = True
    with pytest.raises(StoreUnavailable):
        await message.aack()
    fault.armed = False
    await message.aack()
    assert await asyncio.to_thread(is_done, impatient)
    await impatient.client.aclose()


@pytest.mark.row("A32")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_ack_is_repeated(queue, take):
    """Wherever a signal handler raises amid an ack, the next ack returns, and the message is done once."""
    for interruption in points():
        queue.push(1)
        message, close = take(queue)
        with interruption:
            message.ack()
        try:
            within(60.0, message.ack)
        except LeaseLost:  # the first one was confirmed, or the thread that renews has sent it since
            assert message._leased.confirmed
        close()
        assert is_done(queue)


@pytest.mark.row("A33")
@pytest.mark.parametrize("extend_first", [True, False])
@pytest.mark.parametrize("pulled", [True, False])
async def test_extend_beside_ack(queue, extend_first, pulled):
    """Gathered in either order both succeed, and the message is done once."""
    for _ in range(20):
        await queue.apush(1)
        if pulled:
            [message] = await queue.apull()
        else:
            consumer = queue.aconsume()
            message = await anext(consumer)
        both = [message.aextend("30s"), message.aack()]
        await asyncio.gather(*(both if extend_first else reversed(both)))
        if not pulled:
            await consumer.aclose()
        assert (await queue.astats()).leased == 0
    assert await asyncio.to_thread(is_done, queue)
    await queue.client.aclose()


@pytest.mark.row("A33")
def test_extend_beside_ack_from_two_threads(queue, take):
    """The same of two threads."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(40):
            queue.push(1)
            message, close = take(queue)
            errors = []
            begin = threading.Barrier(2)

            def call(function, *arguments, begin=begin, errors=errors):
                begin.wait()
                try:
                    function(*arguments)
                except Exception as error:
                    errors.append(error)

            threads = [
                threading.Thread(target=call, args=(message.extend, "30s")),
                threading.Thread(target=call, args=(message.ack,)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                until_ended(thread)
            assert errors == []
            close()
            assert is_done(queue)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.row("A33")
@pytest.mark.parametrize("passes", range(8))
async def test_ack_after_a_cancelled_extension(queue, passes):
    """A heartbeat task that is cancelled amid its extension and awaited, and then the ack: the message is done once."""
    for pulled in (True, False):
        await queue.apush(1)
        consumer = queue.aconsume()
        [message] = await queue.apull() if pulled else [await anext(consumer)]
        heartbeat = asyncio.ensure_future(message.aextend("30s"))
        for _ in range(passes):
            await asyncio.sleep(0)
        heartbeat.cancel()
        with suppress(asyncio.CancelledError):
            await heartbeat
        await message.aack()
        async with aclosing(consumer):
            pass
        assert await asyncio.to_thread(is_done, queue)
    await queue.client.aclose()


@pytest.mark.row("A33")
async def test_turn_after_an_extension_that_nobody_waited_for(queue, monkeypatch):
    """The same when Redis has carried the extension out, and a turn lies between: it takes no message for lost."""
    real, moved = AsyncConnection.execute, asyncio.Event()

    async def execute(connection, *command, **times):
        reply = await real(connection, *command, **times)
        if command[1] in (operations.EXTEND.sha, operations.EXTEND.text) and reply == 1 and not moved.is_set():
            moved.set()
            await asyncio.sleep(3600)
        return reply

    monkeypatch.setattr(AsyncConnection, "execute", execute)
    await queue.apush_many([1, 2])
    consumer = queue.aconsume(prefetch=2)
    message, other = await anext(consumer), await anext(consumer)
    heartbeat = asyncio.ensure_future(message.aextend("30s"))
    await moved.wait()
    heartbeat.cancel()
    with suppress(asyncio.CancelledError):
        await heartbeat
    await other.aack()
    await message.aack()
    await consumer.aclose()
    assert await asyncio.to_thread(is_done, queue)
    await queue.client.aclose()


@pytest.mark.row("A33")
@pytest.mark.parametrize("end", ["aack", "arelease"])
async def test_an_extension_that_is_cancelled_late_leaves_no_identity(queue, monkeypatch, end):
    """Cancelled as the identity that holds nothing any more is taken away: the end of the message does that."""
    real, leaving = AsyncConnection.execute, asyncio.Event()

    async def execute(connection, *command, **times):
        if command[1] in (operations.REAP.sha, operations.REAP.text) and not leaving.is_set():
            leaving.set()
            await asyncio.sleep(3600)
        return await real(connection, *command, **times)

    monkeypatch.setattr(AsyncConnection, "execute", execute)
    await queue.apush(1)
    [message] = await queue.apull()
    heartbeat = asyncio.ensure_future(message.aextend("30s"))
    await leaving.wait()
    heartbeat.cancel()
    with suppress(asyncio.CancelledError):
        await heartbeat
    await getattr(message, end)()
    assert (await queue.astats()).workers == 0
    await asyncio.to_thread(queue.purge)
    await queue.client.aclose()


@pytest.mark.row("A33")
def test_ack_after_an_extension_whose_reply_was_lost(impatient, fault, take):
    """After StoreUnavailable of `extend` the ack finds the message wherever it lies, and `extend` may be repeated too."""
    for again in (False, True):
        impatient.push(1)
        message, close = take(impatient)
        fault.armed = True
        with pytest.raises(StoreUnavailable):
            message.extend("1m")
        fault.armed = False
        if again:
            message.extend("2m")
        message.ack()
        close()
        assert is_done(impatient)


@pytest.mark.row("A33")
def test_extend_after_the_end(queue):
    """A message that was settled needs no lease; one that was handed back with its loop has lost it."""
    queue.push(1)
    [message] = queue.pull()
    message.ack()
    message.extend("1m")
    queue.push(2)
    consumer = queue.consume()
    message = next(consumer)
    consumer.close()
    with pytest.raises(LeaseLost, match="handed back"):
        message.extend("1m")
    until(lambda: queue.stats().ready == 1)


@pytest.mark.row("A49")
@pytest.mark.parametrize("other", ["ack", "dead"])
def test_two_threads_that_settle_one_message(queue, take, other):
    """Of two ends that threads decide at the same time the first counts; the other call returns when they agree, else it is refused."""
    queue.push(1)
    message, close = take(queue)
    first, second = message._done(), message._done() if other == "ack" else message._dead("no")
    message._settler.settle([first])
    if other == "ack":
        within(60.0, lambda: message._settler.settle([second]))
    else:
        with pytest.raises(LeaseLost, match="in another way"):
            within(60.0, lambda: message._settler.settle([second]))
    close()
    assert is_done(queue)
