"""Messages that a program has pulled: it keeps their leases, sees when these end, gives messages back."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast

import pytest

from conveyor import Conveyor, LeaseLost, StoreUnavailable
from conveyor.store import inspection
from support.message_fixtures import crash, first
from support.waiting import until, until_ended

SHORT = 0.4
"""Seconds of a lease that is to end in a test."""
LEASE = 2.0
"""Seconds of one that is not."""
MOVED = timedelta(milliseconds=50)
"""More than two readings of an end that has not moved differ by."""


def wait_until_renewed(queue: Any, times: int = 2) -> None:
    """Wait until the end of each lease that Redis keeps has moved on so often."""
    for _ in range(times):
        ends = _ends(queue)
        assert ends
        until(lambda ends=ends: all(end > ends[worker] for worker, end in _ends(queue).items()), 8)


def _ends(queue: Any) -> dict[str, int]:
    return {member.worker: member.end for member in queue.client.run(inspection.workers(queue.keys))}


def renewing() -> list[threading.Thread]:
    """Return the threads that renew leases."""
    return [thread for thread in threading.enumerate() if thread.name == "conveyor-renewer"]


class TestRelease:
    def test_as_if_it_had_not_been_taken(self, queue: Any) -> None:
        """It is the first of its queue at once, and its next delivery is attempt 1 again, however often."""
        queue.push_many([1, 2])
        for _ in range(7):
            [message] = queue.pull()
            message.release()
            assert (message.lease_ends, queue.stats().leased) == (None, 0)
        [message] = queue.pull()
        assert (message.body, message.attempt) == (1, 1)
        message.ack()
        queue.pull()[0].ack()
        assert queue.stats().dead == 0

    def test_several_released_last_first_keep_their_order(self, queue: Any) -> None:
        """The last of several is released first, and they stand in front as they did."""
        queue.push_many(range(5))
        for message in reversed(queue.pull(3)):
            message.release()
        messages = queue.pull(5)
        assert [message.body for message in messages] == [0, 1, 2, 3, 4]
        for message in messages:
            message.ack()

    def test_failures_before_it_stay(self, queue: Any) -> None:
        """A crash charged before stays charged, and the release adds nothing."""
        queue.push(1)
        queue.pull()[0].nack(delay=0)
        for _ in range(3):
            [message] = queue.pull(wait="2s")
            assert message.attempt == 2
            message.release()
        for attempt in (2, 3):
            [message] = queue.pull(wait="2s")
            assert message.attempt == attempt
            message.nack(delay=0)
        assert queue.stats().dead == 1

    def test_a_suspect(self, queue: Any) -> None:
        """The possible crash that was recorded before its handling began is taken back."""
        queue.push("suspect")
        [message] = queue.pull()
        message.start()
        crash(queue, message)
        for _ in range(5):
            [message] = queue.pull()
            history = message._leased.history
            message.start()
            message.release()
            assert (history.crashes, message.attempt) == (1, 2)
        queue.pull()[0].ack()
        assert queue.stats().dead == 0

    def test_it_wakes_another_consumer(self, queue: Any) -> None:
        """Whoever waits has the message at once, with its priority."""
        queue.push("low")
        queue.push("high", priority=5)
        low, high = [message for _ in range(2) for message in queue.pull()][::-1]
        assert (low.body, high.body) == ("low", "high")
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(queue.pull(2, wait="20s")))
        thread.start()
        until(lambda: _is_blocked(queue))
        low.release()
        until_ended(thread)
        assert [message.body for message in found] == ["low"]
        found[0].release()
        high.release()
        for body in ("high", "low"):
            [message] = queue.pull()
            assert message.body == body
            message.ack()

    def test_the_message_of_a_loop(self, queue: Any) -> None:
        """In a loop and inside the block too: the block has nothing left to do."""
        queue.push(1)
        with closing(queue.consume()) as messages:
            with (message := next(messages)):
                message.release()
            with (message := next(messages)):
                assert message.attempt == 1

    def test_a_lost_lease(self, queue: Any) -> None:
        """A message that is not held any more cannot be released; one that was settled neither."""
        queue.push(1)
        [message] = queue.pull()
        crash(queue, message)
        with pytest.raises(LeaseLost):
            message.release()
        [message] = queue.pull()
        message.ack()
        with pytest.raises(LeaseLost):
            message.release()

    def test_repeated_after_an_outage(self, queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the answer did not come it is called again, and the message goes back once."""
        queue.push_many([1, 2])
        [message] = queue.pull()
        with monkeypatch.context() as patch:
            patch.setattr(message._settler, "_run", _carried_out_but_unanswered(message._settler._run))
            with pytest.raises(StoreUnavailable):
                message.release()
        message.release()
        messages = queue.pull(5)
        assert [(one.body, one.attempt) for one in messages] == [(1, 1), (2, 1)]
        for one in messages:
            one.ack()

    def test_a_cancelled_one_ends(self, url: str) -> None:
        """A release of what somebody cancelled meanwhile ends it as cancelled."""
        with Conveyor(url) as app:
            mail = app.queue("mail")
            mail.push(1)
            [message] = mail.pull()
            assert app.job(message.id).cancel()
            message.release()
            assert mail.pull() == []
            assert app.job(message.id).status() == "cancelled"


class TestRenew:
    def test_a_lease_is_renewed_until_the_message_is_settled(self, queue: Any) -> None:
        """Its consumer is not taken for dead, its lease moves on; with the last end the thread ends too."""
        queue.push_many([1, 2])
        first_, second = queue.pull(2, renew=True)
        ends = first_.lease_ends
        wait_until_renewed(queue)
        assert first_.lease_ends > ends + MOVED
        first_.ack()
        wait_until_renewed(queue)
        second.nack(delay="1h")
        until(lambda: not renewing())
        assert queue.stats().workers == 0

    def test_without_it_the_lease_ends(self, queue: Any) -> None:
        """The same without `renew`: another consumer has the message."""
        queue.lease_ms = int(SHORT * 1000)
        queue.push(1)
        [message] = queue.pull()
        [again] = until(lambda: queue.pull(wait="100ms"))
        assert (again.body, again.attempt) == (1, 2)
        assert message.lease_ends < datetime.now(UTC)
        with pytest.raises(LeaseLost):
            message.ack()
        again.ack()

    @pytest.mark.row("D323")
    def test_messages_nobody_refers_to(self, queue: Any) -> None:
        """A message that the program has dropped cannot be settled, so it is not kept: it comes again when its lease ends."""
        queue.lease_ms = int(SHORT * 1000)
        queue.push(1)
        queue.pull(renew=True)
        gc.collect()
        [message] = until(lambda: queue.pull(wait="100ms"))
        message.ack()
        until(lambda: not renewing())

    def test_many_pulls_share_a_thread(self, queue: Any) -> None:
        """However many pulls are renewed at one server, one thread does it."""
        until(lambda: not renewing())  # those of tests before
        queue.push_many(range(30))
        messages = [message for _ in range(30) for message in queue.pull(renew=True)]
        assert len(renewing()) == 1
        for message in messages:
            message.ack()

    async def test_on_a_loop_that_is_blocked(self, url: str) -> None:
        """Renewed from a thread, so a body that blocks the loop keeps its message; partitions and several queues too."""
        async with Conveyor(url, lease=LEASE) as app, Conveyor(url, lease=LEASE) as other:
            many: Any = app.queue("many", partitions=2)
            await many.apush_many([1, 2])
            await app.queue("one").apush(3)
            messages = await app.apull(["one", "many"], 3, renew=True)
            queues = [other.queue("one"), *cast("Any", other.queue("many", partitions=2)).parts]
            with ThreadPoolExecutor() as pool:
                list(pool.map(wait_until_renewed, queues))  # which blocks the loop
            for message in messages:
                await message.aack()
            assert sorted(message.body for message in messages) == [1, 2, 3]

    def test_an_outage_of_the_server(self, start_server: Any) -> None:
        """A server that is away for less than a lease costs nothing; renewing goes on when it is back."""
        server = start_server()
        with Conveyor(server.url, lease="3s") as app:
            mail = app.queue("mail")
            mail.push(1)
            [message] = mail.pull(renew=True)
            server.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            wait_until_renewed(mail)
            message.ack()

    def test_a_forked_child_renews_nothing(self, queue: Any) -> None:
        """The leases are those of the process that pulled."""
        until(lambda: not renewing())
        queue.push(1)
        [message] = queue.pull(renew=True)
        child = os.fork()
        if child == 0:
            os._exit(len(renewing()))
        assert os.waitpid(child, 0)[1] == 0
        assert len(renewing()) == 1
        message.ack()


class TestLeaseEnds:
    def test_it_is_when_redis_says(self, queue: Any) -> None:
        """Never later than the end that Redis has, of a pulled message, one in a loop, and one with a lease of its own."""
        queue.push_many([1, 2])
        [message] = queue.pull()
        _agrees(queue, message, 2.0)
        message.extend("5m")
        _agrees(queue, message, 300.0)
        message.ack()
        assert message.lease_ends is None
        consumer, message = first(queue)
        _agrees(queue, message, 2.0)
        with message:
            pass
        consumer.close()

    async def test_of_an_awaitable_loop(self, url: str) -> None:
        """The end moves on while the body of a loop runs."""
        async with Conveyor(url, lease=LEASE) as app:
            await app.queue("mail").apush(1)
            async with aclosing(app.aconsume(["mail"])) as messages:
                message = await anext(messages)
                async with message:
                    ends = message.lease_ends
                    assert ends is not None
                    async with asyncio.timeout(10):
                        while message.lease_ends <= ends + MOVED:
                            await asyncio.sleep(0.02)


def test_a_loop_over_several_leaves_what_it_holds(url: str) -> None:
    """A loop over several queues that is left hands back all it had prefetched, without a trace."""
    with Conveyor(url) as app:
        queues = [app.queue("a"), app.queue("b")]
        for queue in queues:
            queue.push_many(range(10))
        for message in islice(app.consume(queues, prefetch=5), 20):
            with message:
                pass
            break
        assert sum(queue.stats().ready for queue in queues) == 19
        assert all((queue.stats().leased, queue.stats().workers) == (0, 0) for queue in queues)
        for queue in queues:
            queue.purge()


def _agrees(queue: Any, message: Any, lease: float) -> None:
    """Compare with the end of the lease that Redis keeps; both clocks are those of this machine."""
    [member] = queue.client.run(inspection.workers(queue.keys))
    ours = message.lease_ends.timestamp()
    assert ours <= member.end / 1000 + 0.01
    assert time.time() + lease / 2 < ours <= time.time() + lease


def _is_blocked(queue: Any) -> bool:
    info = queue.client.execute("INFO", "clients").decode()
    return "blocked_clients:0" not in info


def _carried_out_but_unanswered(run: Any) -> Any:
    def answer_nothing(call: Any) -> Any:
        run(call)
        raise StoreUnavailable("no answer")

    return answer_nothing
