"""Taking messages on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from conveyor.errors import LeaseLost, StoreUnavailable
from conveyor.messaging.queue import Queue
from conveyor.store import inspection
from conveyor.store.client.client import Client
from support.message_fixtures import FAST
from support.waiting import auntil, until_ended


@pytest.fixture
async def aqueue(url):
    backend = Client(url)
    queue = Queue(backend, "mail", lease_ms=1000, retry=FAST)
    yield queue
    await queue.apurge()
    await queue.apurge(dead=True)
    assert (await queue.astats()).workers == 0
    await backend.aclose()


class TestAwaitable:
    async def test_loop(self, aqueue):
        """Success acks, an exception nacks and is logged, an interrupt hands back; leaving leaves nothing."""
        await aqueue.apush_many(["good", "bad"])
        seen = []
        async with aclosing(aqueue.aconsume(prefetch=2)) as messages:
            async for message in messages:
                async with message as body:
                    seen.append((body, message.attempt))
                    if body == "bad" and message.attempt == 1:
                        raise ValueError
                if len(seen) == 3:
                    break
        assert seen == [("good", 1), ("bad", 1), ("bad", 2)]
        assert (await aqueue.astats()).leased == 0

    async def test_acks_leave_when_the_body_goes_on(self, aqueue):
        """An end travels with the next turn, or alone as soon as the loop is free."""
        await aqueue.apush_many([1, 2])
        async with aclosing(aqueue.aconsume()) as messages:
            async with await anext(messages):
                pass
            async with asyncio.timeout(60):
                while (await aqueue.astats()).leased:
                    await asyncio.sleep(0)
            await (await anext(messages)).aack()

    async def test_a_blocked_loop_keeps_its_messages(self, aqueue):
        """The lease is renewed from a thread while the loop does nothing else."""
        await aqueue.apush(1)
        async with aclosing(aqueue.aconsume()) as messages:
            message = await anext(messages)
            ends = await _end(aqueue)
            time.sleep(1.3)  # blocks the loop for more than a lease
            assert await _end(aqueue) > ends + 800
            await message.aack()

    async def test_cancelled_body(self, aqueue):
        """A cancelled task hands its message back."""
        await aqueue.apush(1)
        started = asyncio.Event()

        async def run():
            async with aclosing(aqueue.aconsume()) as messages:
                async for message in messages:
                    async with message:
                        started.set()
                        await asyncio.sleep(60)

        task = asyncio.create_task(run())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [message] = await aqueue.apull()
        assert (message.attempt, message._leased.history.failures) == (2, 0)
        await message.aack()

    async def test_cancelled_while_waiting(self, aqueue):
        """A consumer cancelled while it waits leaves nothing and loses nothing."""

        async def run():
            async with aclosing(aqueue.aconsume()) as messages:
                await anext(messages)

        task = asyncio.create_task(run())

        async def has_come() -> bool:
            return bool((await aqueue.astats()).workers)

        await auntil(has_come)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await aqueue.apush(1)
        [message] = await aqueue.apull(wait="60s")
        await message.aack()

    async def test_batches_and_explicit_ends(self, aqueue):
        """The awaitable batch, pull and extend."""
        await aqueue.apush_many(range(5))
        async with aclosing(aqueue.abatches(size=3, within="50ms")) as batches:
            async with await anext(batches) as bodies:
                assert bodies == [0, 1, 2]
            await (await anext(batches)).anack("1h")
        assert (await aqueue.astats()).scheduled == 2
        await aqueue.apush("x")
        [message] = await aqueue.apull(wait="60s")
        await message.aextend("1m")
        await message.aack()
        with pytest.raises(LeaseLost):
            await message.anack()

    async def test_ends_from_a_thread(self, aqueue):
        """A message of a loop may be settled by blocking calls from other threads, and the other way round."""
        await aqueue.apush_many([1, 2])
        [message] = await aqueue.apull()
        await asyncio.to_thread(message.ack)
        [message] = await asyncio.to_thread(aqueue.pull)
        await message.aack()
        assert (await aqueue.astats()).leased == 0

    @pytest.mark.parametrize("way", ["aconsume", "abatches"])
    def test_a_loop_that_is_left_open(self, url, way):
        """A loop that nobody closed ends with its event loop: what it held goes back, and nothing is complained of."""
        complaints, backend = [], Client(url)
        queue = Queue(backend, "mail", lease_ms=60_000)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        queue.push_many(range(3))
        taking = getattr(queue, way)(2)

        async def take():
            await anext(taking)

        loop.run_until_complete(take())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(backend.aclose())
        loop.close()
        stats = queue.stats()
        assert (complaints, stats.ready, stats.leased, stats.workers) == ([], 3, 0, 0)
        queue.purge()
        backend.close()

    @pytest.mark.row("A48")
    @pytest.mark.parametrize("end", ["ack", "nack", "extend"])
    def test_an_end_after_its_event_loop(self, url, end):
        """A message that an event loop took may be settled by blocking calls when that loop is closed."""
        backend = Client(url)
        queue = Queue(backend, "mail", lease_ms=60_000)

        async def take():
            await queue.apush(1)
            [message] = await queue.apull()
            await backend.aclose()
            return message

        message = asyncio.run(take())
        if end == "extend":
            message.extend("1m")
            message.ack()
        elif end == "nack":
            message.nack("1h")
        else:
            message.ack()
        stats = queue.stats()
        assert (stats.leased, stats.workers, stats.scheduled) == (0, 0, int(end == "nack"))
        queue.purge()
        backend.close()

    @pytest.mark.row("A48")
    @pytest.mark.parametrize("closes", [True, False])
    def test_an_end_that_its_event_loop_does_not_carry_out(self, url, monkeypatch, closes):
        """Asked of a loop that has stopped, an end is reported when that is closed; else it fails in the time of a call."""
        backend, asked, usual = Client(url, timeout=0.3), threading.Event(), asyncio.run_coroutine_threadsafe
        queue = Queue(backend, "mail", lease_ms=60_000)
        loop = asyncio.new_event_loop()
        queue.push(1)
        [message] = loop.run_until_complete(queue.apull())
        if closes:
            loop.run_until_complete(backend.aclose())
            monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", lambda *given: (usual(*given), asked.set())[0])
            closing = threading.Thread(target=lambda: (asked.wait(), loop.close()))
            closing.start()
            message.ack()
            until_ended(closing)
        else:
            with pytest.raises(StoreUnavailable, match="does not carry out"):
                message.ack()
            loop.run_until_complete(message.aack())
            loop.run_until_complete(backend.aclose())
            loop.close()
        assert queue.stats().leased == 0
        backend.close()


async def _end(queue):
    [member] = await queue.client.arun(inspection.workers(queue.keys))
    return member.end
