"""`app.pull` and `app.consume`: messages of many queues, by weights, woken by one blocking call."""

from __future__ import annotations

import asyncio
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from itertools import islice
from typing import Any

import pytest
from redis import Redis

from conveyor import ConfigurationError, Conveyor, StoreUnavailable
from conveyor.messaging.consumer.asynchronous import AsyncConsumer, AsyncWakeupWaiters
from conveyor.messaging.consumer.blocking import BlockingSettler, Consumer, WakeupWaiters
from conveyor.messaging.consumer.list_mover import ListMover
from conveyor.messaging.consumer.steps import WaitStep
from conveyor.messaging.shares import WeightedTurns
from conveyor.store import operations
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.wakeup import WakeupWaiter
from support.time_limits import LATER, PATIENCE
from support.waiting import until, until_ended
from testbed.server_groups import ClusterOfNodes

NAMES = [f"q{number}" for number in range(20)]


@pytest.fixture
def app(url: str) -> Iterator[Conveyor]:
    """An app whose queues hold nothing leased when the test is over, and are emptied."""
    app = Conveyor(url, lease="30s")
    yield app
    for queue in (*app._core.queues.values(), *app._core.plain_lists.values()):
        queue.purge()
        assert (queue.stats().leased, queue.stats().workers) == (0, 0), queue.name
    app.close()


def blocked(redis: Redis[bytes]) -> int:
    """Return how many clients wait for something."""
    return int(redis.info("clients")["blocked_clients"])


def calls(redis: Redis[bytes], command: str) -> int:
    """Return how often a command was sent."""
    return int(redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def taken(messages: list[Any]) -> Counter[str]:
    """Acknowledge messages; return how many each queue gave."""
    for message in messages:
        message.ack()
    return Counter(message.queue for message in messages)


@pytest.mark.row("C35")
def test_a_queue_that_is_refused_ends_no_lease_of_others(url: str, redis: Redis[bytes]) -> None:
    """Leases of pulled messages are renewed while those of another queue of the same program are refused."""
    with Conveyor(url, lease="1s") as app:
        for name in "ab":
            app.queue(name).push(1)
        messages = app.pull({"a": 1, "b": 1}, 2, renew=True)
        refused, other = (app._core.client.keys(name).workers for name in "ab")
        redis.rename(refused, "aside")
        redis.set(refused, "of another program")
        [(worker, end)] = redis.zrange(other, 0, -1, withscores=True)
        until(lambda: (redis.zscore(other, worker) or 0) > end + 2000, 30)
        redis.delete(refused)
        redis.rename("aside", refused)
        assert taken(messages) == {"a": 1, "b": 1}


class TestShares:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 40])
    def test_pulls_share_by_weight(self, app: Conveyor, n: int) -> None:
        """While both have messages, the queues give them by their weights, whatever the size of the pulls."""
        for name in ("a", "b"):
            app.queue(name).push_many(range(200))
        got: Counter[str] = Counter()
        while got.total() < 120:
            pulled = app.pull({"a": 3, "b": 1}, n)
            assert pulled
            got += taken(pulled)
        assert abs(got["a"] - got.total() * 3 / 4) <= 2

    def test_what_one_lacks_the_others_give(self, app: Conveyor) -> None:
        """A pull is as full as there are messages; a queue without any does not lessen it."""
        app.queue("a").push_many(range(3))
        app.queue("c").push_many(range(20))
        assert taken(app.pull({"a": 5, "b": 90, "c": 1}, 10)) == {"a": 3, "c": 7}
        assert taken(app.pull(["a", "b", "c"], 100)) == {"c": 13}
        assert app.pull(["a", "b", "c"], 100) == []

    def test_a_loop_takes_by_weight(self, app: Conveyor) -> None:
        """While all have messages, a loop hands them out by the weights, and each queue's in their order."""
        for name in ("a", "b", "c"):
            app.queue(name).push_many(range(300))
        got: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        for message in islice(app.consume({"a": 4, "b": 2, "c": 1}), 280):
            with message as body:
                got[message.queue].append(body)
        assert all(bodies == sorted(bodies) for bodies in got.values())
        for name, share in (("a", 160), ("b", 80), ("c", 40)):
            assert abs(len(got[name]) - share) <= 20, {name: len(bodies) for name, bodies in got.items()}

    def test_weights_hold_for_slow_bodies(self, app: Conveyor) -> None:
        """Where each message takes longer than a stint, the queues still have their turns by weight."""
        for name in ("a", "b"):
            app.queue(name).push_many(range(20))
        got: Counter[str] = Counter()
        for message in islice(app.consume({"a": 3, "b": 1}), 12):
            with message:
                got[message.queue] += 1
                time.sleep(0.06)
        assert abs(got["a"] - 9) <= 1

    def test_a_quiet_queue_is_noticed_beside_a_busy_one(self, app: Conveyor) -> None:
        """A message that comes to a queue which had none is taken while another has plenty, however little it weighs."""
        app.queue("busy").push_many(range(1000))
        seen = 0
        with closing(app.consume({"busy": 1000, "rare": 1})) as messages:
            for message in messages:
                with message as body:
                    seen += 1
                if seen == 50:
                    app.queue("rare").push("late")
                if body == "late":
                    break
        assert seen < 200

    def test_turns_are_even(self) -> None:
        """Smooth weighted round robin: no rival waits longer than its weight says, and no turn is lost."""
        turns, rivals = WeightedTurns[str](), {"a": 5.0, "b": 1.0, "c": 1.0}
        assert "".join(turns.pick(rivals) for _ in range(14)) == "aabacaaaabacaa"
        assert turns.split(7, rivals) == {"a": 5, "b": 1, "c": 1}
        assert sum(turns.split(11, rivals).values()) == 11


class TestArrival:
    def test_a_pull_is_in_the_order_of_arrival(self, app: Conveyor) -> None:
        """Messages of several queues come as they were pushed, and each queue keeps its own order."""
        pushed = []
        for number in range(12):
            name = "abc"[number * 7 % 3]
            app.queue(name).push(number)
            pushed.append(number)
            begun = time.time()
            until(lambda begun=begun: int(time.time() * 1000) > int(begun * 1000) + 1)
        app.queue("b").push("urgent", priority=9)  # pushed last, and the first of its queue
        messages = app.pull(["a", "b", "c"], 50)
        found = [message.body for message in messages if message.queue != "b"]
        assert found == [number for number in pushed if "abc"[number * 7 % 3] != "b"]
        assert next(message.body for message in messages if message.queue == "b") == "urgent"
        taken(messages)

    def test_the_queue_of_a_message(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """A message names the queue as it was declared: a queue, one with partitions, a plain list with a slash."""
        app.queue("a").push(1)
        app.queue("many", partitions=3).push_many([2, 3, 4])
        app.plain_list("list/1").push(5)
        messages = app.pull(["a", "many", "list/1"], 10)
        assert taken(messages) == {"a": 1, "many": 3, "list/1": 1}
        assert {message.id.rpartition(":")[0].split("/")[0] for message in messages} == {"a", "many", "list"}

    def test_an_undeclared_queue(self, app: Conveyor) -> None:
        """A queue that was not declared holds any value, and can be declared afterwards."""
        app.queue("later").push({"a": [1]})
        other = Conveyor(app.client._url)
        [message] = other.pull(["later"])
        assert message.body == {"a": [1]}
        message.ack()
        assert other.queue("later", int, max_attempts=2).pull() == []
        other.close()


@pytest.mark.usefixtures("only_when_woken")
class TestWaiting:
    def test_one_blocking_call_for_all(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """A pull of twenty queues waits in one call on one connection, and is woken for any of them."""
        for name in NAMES:
            app.queue(name)
        for name in ("q0", "q19", "q7"):
            before = calls(redis, "blpop")
            found: list[Any] = []
            thread = threading.Thread(target=lambda found=found: found.extend(app.pull(NAMES, 5, wait="60s")))
            thread.start()
            until(lambda: blocked(redis) == 1)
            app.queue(name).push(name)
            until_ended(thread)
            assert [message.body for message in found] == [name]
            assert calls(redis, "blpop") - before == 1
            taken(found)
        assert app.pull(NAMES, wait="50ms") == []

    @pytest.mark.standalone_only("one call finds the work of all queues where one server has them")
    def test_the_cost_of_a_pull(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """An idle pull of twenty queues costs one script; one message costs three to take, and one to end."""
        queues = [*NAMES, app.queue("many", partitions=4), app.plain_list("list")]
        app.queue("many", partitions=4).push(0)
        assert taken(app.pull(queues)) == {"many": 1}  # the number of its partitions is compared, once
        before = calls(redis, "evalsha")
        assert app.pull(queues) == []
        assert calls(redis, "evalsha") - before == 1
        app.queue("q11").push(1)
        before = calls(redis, "evalsha")
        [message] = app.pull(queues)
        assert calls(redis, "evalsha") - before == 3
        message.ack()
        assert calls(redis, "evalsha") - before == 4
        for name in ("many", "list"):
            target: Any = next(queue for queue in queues if getattr(queue, "name", "") == name)
            target.push(name)
            [message] = app.pull(queues)
            assert message.body == name
            message.ack()

    def test_a_paused_queue_makes_nobody_ask(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """Messages in a paused queue, ready or overdue, neither end the wait of a pull nor make it ask again."""
        paused = app.queue("q3")
        paused.push("ready")
        paused.push("due", delay="50ms")
        paused.pause()
        before = calls(redis, "evalsha")
        assert app.pull(NAMES, wait="400ms") == []
        assert calls(redis, "evalsha") - before <= 6
        paused.resume()
        assert taken(app.pull(NAMES, 5, wait="60s")) == {"q3": 2}

    @pytest.mark.parametrize("kind", ["queue", "partitions", "plain list"])
    def test_an_idle_loop_is_woken_for_each_kind(self, app: Conveyor, redis: Redis[bytes], kind: str) -> None:
        """A loop over queues, queues with partitions and plain lists is woken for each of them at once."""
        queues = [app.queue("one"), app.queue("many", partitions=4), app.plain_list("list")]
        found: list[Any] = []

        def take() -> None:
            for message in islice(app.consume(queues), 6):
                with message as body:
                    found.append(body)

        thread = threading.Thread(target=take)
        thread.start()
        target = queues[["queue", "partitions", "plain list"].index(kind)]
        for number in range(6):
            until(lambda: blocked(redis) == 2)  # the wake-up lists, and the plain list itself
            redis.rpush("list", number) if kind == "plain list" else target.push(number)
            until(lambda number=number: len(found) > number)
        until_ended(thread)
        assert found == list(range(6))

    def test_a_pull_of_a_plain_list_is_woken(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """An entry that a foreign program pushes ends the wait of a pull at once."""
        found: list[Any] = []
        app.plain_list("list")
        thread = threading.Thread(target=lambda: found.extend(app.pull(["list", "a"], wait="60s")))
        thread.start()
        until(lambda: blocked(redis) == 2)
        redis.rpush("list", '{"n": 1}')
        until_ended(thread)
        assert [message.body for message in found] == [{"n": 1}]
        taken(found)
        until(lambda: blocked(redis) == 0)

    @pytest.mark.standalone_only("it kills one connection of one server")
    @pytest.mark.parametrize("awaited", [False, True])
    @pytest.mark.row("D322")
    def test_the_wait_for_a_plain_list_is_cut(self, app: Conveyor, redis: Redis[bytes], *, awaited: bool) -> None:
        """Where only the connection that waits for entries of a plain list is cut, a new one waits at once."""
        found: list[Any] = []
        app.plain_list("list")

        async def take() -> None:
            async with Conveyor(app.client._url) as own:
                own.plain_list("list")
                for message in await own.apull(["list", "a"], wait="60s"):
                    found.append(message.body)
                    await message.aack()

        def pull() -> None:
            for message in app.pull(["list", "a"], wait="60s"):
                with message as body:
                    found.append(body)

        thread = threading.Thread(target=(lambda: asyncio.run(take())) if awaited else pull)
        thread.start()
        until(lambda: blocked(redis) == 2)
        [moving] = [one["id"] for one in redis.client_list() if one["cmd"] == "blmove"]
        redis.client_kill_filter(_id=moving)
        until(lambda: blocked(redis) == 2)
        redis.rpush("list", '{"n": 1}')
        until_ended(thread)
        assert found == [{"n": 1}]
        until(lambda: blocked(redis) == 0)

    async def test_on_a_loop(self, url: str) -> None:
        """The awaitable twins: a waiting pull and a loop, over a queue, partitions and a plain list."""
        async with Conveyor(url, lease="30s") as app:
            queues = [app.queue("one"), app.queue("many", partitions=3), app.plain_list("list")]
            for number in range(6):
                pulling = asyncio.ensure_future(app.apull(queues, 3, wait="60s"))
                await asyncio.sleep(0.02)
                await queues[number % 3].apush(number)
                [message] = await pulling
                assert message.body == number
                await message.aack()
            for queue in queues:
                await queue.apush_many(range(20))
            got: Counter[str] = Counter()
            async with aclosing(app.aconsume(dict.fromkeys(queues, 1), prefetch=5)) as messages:
                async for message in messages:
                    async with message:
                        got[message.queue] += 1
                    if got.total() == 60:
                        break
            assert got == {"one": 20, "many": 20, "list": 20}
            for queue in queues:
                stats = await queue.astats()
                assert (stats.ready, stats.dead) == (0, 0)

    def test_a_due_message_ends_the_wait(self, app: Conveyor) -> None:
        """A message that comes due while a pull waits is handed out then."""
        app.queue("b").push("due", delay="300ms")
        begun = time.monotonic()
        messages = app.pull(["a", "b"], wait="60s")
        assert 0.25 < time.monotonic() - begun < PATIENCE
        assert taken(messages) == {"b": 1}


class TestEnds:
    def test_what_a_dead_consumer_held(self, app: Conveyor) -> None:
        """A pull of many finds the messages of a consumer that died, though nothing else makes it look at that queue."""
        queues = [app.queue(name, lease="300ms") for name in NAMES]
        queues[5].push("lost")
        queues[5].pull()
        [message] = app.pull(queues, wait="60s")
        assert (message.body, message.attempt) == ("lost", 2)
        message.ack()

    @pytest.mark.parametrize("at", ["lease", "wait"])
    @pytest.mark.row("D321")
    def test_an_interrupted_pull(self, app: Conveyor, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        """Interrupted behind its lease or while it waits, a pull of many hands back and leaves nothing."""
        if at == "lease":
            app.queue("b").push("m")
            monkeypatch.setattr(BlockingSettler, "report_refused", _interrupt)
        else:
            monkeypatch.setattr(WakeupWaiter, "wait_any", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            app.pull(["a", "b", "c"], 5, wait="5s")
        monkeypatch.undo()
        messages = app.pull(["a", "b", "c"], 5)
        assert [message.attempt for message in messages] == ([1] if at == "lease" else [])
        taken(messages)

    @pytest.mark.row("D321")
    def test_a_pull_that_fails_at_one_queue(self, app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where one queue does not answer, what the others had given is handed back as if it had not been leased."""
        queues = {app.queue(name): 1.0 for name in "abc"} | {app.plain_list("list"): 0.001}
        for queue in queues:
            queue.push(1)
        usual = app.client.run

        def fail_at_list(call: Any, **options: Any) -> Any:
            if call.script is operations.LIST_INTAKE:
                raise StoreUnavailable("cut")
            return usual(call, **options)

        monkeypatch.setattr(app.client, "run", fail_at_list)
        with pytest.raises(StoreUnavailable):
            app.pull(queues, 10)
        monkeypatch.undo()
        messages = app.pull(queues, 10)
        assert [message.attempt for message in messages] == [1, 1, 1, 1]
        taken(messages)

    @pytest.mark.row("D321")
    async def test_a_cancelled_pull(self, url: str) -> None:
        """Cancelled while it waits, an `apull` of many leaves no registration, and the next one has the message."""
        async with Conveyor(url) as app:
            for _ in range(5):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(app.apull(["a", "b"], wait="60s"), 0.05)
            await app.queue("b").apush(1)
            [message] = await app.apull(["a", "b"], wait="5s")
            await message.arelease()
            [message] = await app.apull(["a", "b"], wait="5s")
            assert message.attempt == 1
            await message.aack()
            stats = await app.queue("b").astats()
            assert (stats.leased, stats.workers, stats.ready) == (0, 0, 0)

    @pytest.mark.standalone_only("it kills all connections of one server")
    @pytest.mark.parametrize("way", ["pull", "consume"])
    @pytest.mark.row("D322")
    def test_connections_that_are_cut(self, app: Conveyor, redis: Redis[bytes], way: str) -> None:
        """Its connections cut while it waits, a pull and a loop go on over new ones, and lose nothing."""
        found: list[Any] = []

        def take() -> None:
            if way == "pull":
                while len(found) < 4:
                    for message in app.pull(["a", "b"], 2, wait="60s"):
                        with message as body:
                            found.append(body)
            else:
                for message in islice(app.consume(["a", "b"]), 4):
                    with message as body:
                        found.append(body)

        thread = threading.Thread(target=take)
        thread.start()
        for number in range(4):
            until(lambda: blocked(redis) == 1)
            redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            until(lambda: blocked(redis) == 1)
            app.queue("ab"[number % 2]).push(number)
            until(lambda number=number: len(found) > number)
        until_ended(thread)
        assert found == [0, 1, 2, 3]

    @pytest.mark.row("A47")
    @pytest.mark.parametrize("at", ["open", "execute"])
    def test_a_wait_that_ends_before_it_is_sent(
        self, app: Conveyor, redis: Redis[bytes], monkeypatch: pytest.MonkeyPatch, at: str
    ) -> None:
        """A thread that is told to end when it has connected, or is about to send, takes no token: it would be a token for nobody."""
        keys = app.queue("a").keys
        waiter, usual = WakeupWaiter(app.client.endpoint(keys), app.client.timeout), getattr(Connection, at)

        def late(connection: Connection, *given: Any, **options: Any) -> Any:
            if at == "open":
                usual(connection)
                return waiter.end()
            waiter.end()
            return usual(connection, *given, **options)

        app.client.run(operations.wake(keys.wake))
        with monkeypatch.context() as patch:
            patch.setattr(Connection, at, late)
            assert waiter.wait_any([keys.wake], 60) is None
        assert redis.exists(keys.wake)

    @pytest.mark.row("A47")
    def test_a_wait_that_is_ended_as_it_begins(self, app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wait in the kernel that another thread ends is over, though new sockets have taken every number that is free."""
        mover, usual, others = ListMover(app.client, app.plain_list("list").keys), select.poll, list[socket.socket]()

        class EndedAsItBegins:
            def __init__(self) -> None:
                self.poller, self.number = usual(), -1

            def register(self, one: socket.socket, event: int) -> None:
                self.poller.register(one, event)
                self.number = one.fileno()

            def poll(self, ms: int) -> Any:
                if threading.current_thread() is mover._thread and not others:
                    mover.end()
                    while not others or others[-1].fileno() < self.number:
                        others.append(socket.socket())
                return self.poller.poll(ms)

        with monkeypatch.context() as patch:
            patch.setattr(select, "poll", EndedAsItBegins)
            mover.begin(LATER)
            until(lambda: others and not mover._is_moving)
        assert mover._waiter._failures == 0, "the next wait begins with a pause"
        mover.stop()
        assert mover._thread is not None
        until_ended(mover._thread)
        for one in others:
            one.close()

    def test_a_token_that_comes_as_a_wait_begins(self, app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token that a thread has taken when the consumer has decided to wait is looked at, and nothing waits."""
        consumer = app._core.select(["a", "b"], "test")._consumer("log", transient=True)
        waiters = consumer._waiters = WakeupWaiters(consumer)
        monkeypatch.setattr(consumer, "_wait", lambda _: pytest.fail("it waits"))

        def wait() -> Any:
            waiters._heard.put(1)
            yield WaitStep(60)

        consumer._follow(wait())
        assert consumer._programs.unspent() == [1]

    def test_a_token_that_comes_as_an_awaited_wait_begins(self, url: str) -> None:
        """The same for a task that has taken one, also while the wait begins."""

        async def run() -> None:
            async with Conveyor(url) as app:
                consumer = app._core.select(["a", "b"], "test")._async_consumer("log", transient=True)
                waiters = consumer._waiters = AsyncWakeupWaiters(consumer)

                def wait() -> Any:
                    waiters.hear(1)
                    yield WaitStep(60)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(consumer, "_wait", lambda _: pytest.fail("it waits"))
                    await consumer._follow(wait())
                assert consumer._programs.unspent() == [1]
                waiters.hear(0)
                assert await asyncio.wait_for(waiters.wait(60), PATIENCE) == [0]
                assert await waiters.end() == []

        asyncio.run(run())

    def test_a_token_that_was_not_used_is_put_back(self, app: Conveyor, redis: Redis[bytes]) -> None:
        """A pull that was woken for a queue and got its message from another leaves the token to those who wait."""
        selection = app._core.select(["a", "b"], "test")
        consumer = selection._consumer("log", transient=True)
        for queue in selection.queues:
            queue.push(queue.name)
        keys = app.queue("b").keys
        redis.delete(keys.wake)
        consumer._programs.woken(1)
        [message] = consumer.pull(1, 0)
        woken = redis.exists(keys.wake)
        message.ack()
        assert (message.queue, woken) in {("a", 1), ("b", 0)}


@contextmanager
def at_several_nodes(cluster: ClusterOfNodes) -> Iterator[tuple[Conveyor, list[Any]]]:
    """Give an app, four queues at more than one node, and one with partitions."""
    with Conveyor(cluster.url, lease="30s") as app:
        queues = [*(app.queue(name) for name in NAMES[:4]), app.queue("many", partitions=3)]
        assert len({cluster.owner(queue.keys.jobs).port for queue in queues}) > 1
        yield app, queues


def push_one_by_one(app: Conveyor, queues: list[Any], count: int, take: Callable[..., None]) -> None:
    """Push to each of *queues* in turn, a body when the last one was taken, by *take* in a thread."""
    found: list[Any] = []
    thread = threading.Thread(target=take, args=(app, queues, found, count))
    thread.start()
    for number in range(count):
        queues[number % len(queues)].push(number)
        until(lambda number=number: len(found) > number, PATIENCE)
    until_ended(thread)
    assert found == list(range(count))


@pytest.mark.usefixtures("only_when_woken")
@pytest.mark.parametrize("way", ["consume", "pull"])
def test_a_token_at_any_node_wakes(cluster: ClusterOfNodes, way: str) -> None:
    """Over queues at several nodes, with partitions, a loop and one pull after the other are woken by a push to any of them."""
    with at_several_nodes(cluster) as (app, queues):
        push_one_by_one(app, queues, 10, _consume if way == "consume" else _pull)


@pytest.mark.usefixtures("only_when_woken")
@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.row("D322")
def test_the_wait_at_one_node_is_cut(cluster: ClusterOfNodes, *, awaited: bool) -> None:
    """Where the connection that waits at one of several nodes is cut, a new one waits there at once."""
    with at_several_nodes(cluster) as (app, queues):
        found: list[Any] = []

        async def take() -> None:
            async with Conveyor(cluster.url, lease="30s") as own:
                for message in await own.apull([queue.name for queue in queues[:4]], wait="60s"):
                    found.append(message.body)
                    await message.aack()

        def pull() -> None:
            for message in app.pull(queues[:4], wait="60s"):
                with message as body:
                    found.append(body)

        nodes = {node.port: node for node in (cluster.owner(queue.keys.jobs) for queue in queues[:4])}.values()

        def waiting(node: Any) -> list[str]:
            lines = node.ask("CLIENT", "LIST").decode().splitlines()
            return [line.split()[0].removeprefix("id=") for line in lines if re.search(r" flags=\S*b", line)]

        def wait() -> None:
            until(lambda: sum(len(waiting(node)) for node in nodes) == 4)  # keys of several slots cannot share a call

        thread = threading.Thread(target=(lambda: asyncio.run(take())) if awaited else pull)
        thread.start()
        wait()
        node = cluster.owner(queues[2].keys.jobs)
        for client in waiting(node):
            node.ask("CLIENT", "KILL", "ID", client)
        wait()
        queues[2].push("m")
        until_ended(thread)
        assert found == ["m"]


class TestATokenThatComesAsAPullEnds:
    """A pull over several nodes that takes a token as it ends, with a message of another node or with none, puts it back."""

    @pytest.fixture
    def app(self, cluster: ClusterOfNodes) -> Iterator[Conveyor]:
        """An app of the cluster."""
        with Conveyor(cluster.url, lease="30s") as app:
            yield app

    @pytest.fixture
    def queues(self, cluster: ClusterOfNodes, app: Conveyor) -> list[Any]:
        """Two queues at different nodes."""
        first, *others = [app.queue(name) for name in NAMES]
        return [first, next(one for one in others if self.node(cluster, one) is not self.node(cluster, first))]

    @staticmethod
    def node(cluster: ClusterOfNodes, queue: Any) -> Any:
        """Return the node that has a queue."""
        return cluster.owner(queue.keys.jobs)

    def wait(self, cluster: ClusterOfNodes, queues: list[Any]) -> None:
        """Wait until a call blocks at the node of each queue."""
        for queue in queues:
            node = self.node(cluster, queue)
            until(lambda node=node: b"\nblocked_clients:1\r" in node.ask("INFO", "clients"))

    def token(self, cluster: ClusterOfNodes, queue: Any) -> bool:
        """Tell whether a token waits for those who wait for the queue."""
        return bool(self.node(cluster, queue).ask("EXISTS", queue.keys.wake))

    def test_blocking(
        self, cluster: ClusterOfNodes, app: Conveyor, queues: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a blocking pull that has its message."""
        usual = Consumer._stop_waiting

        def stop(consumer: Consumer[Any]) -> None:
            app.client.run(operations.wake(queues[1].keys.wake))
            until(lambda: consumer._waiters is not None and not consumer._waiters._heard.empty())
            usual(consumer)

        monkeypatch.setattr(Consumer, "_stop_waiting", stop)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(app.pull(queues, wait="60s")))
        thread.start()
        self.wait(cluster, queues)
        queues[0].push(1)
        until_ended(thread)
        assert self.token(cluster, queues[1])
        taken(found)

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_awaited(
        self, cluster: ClusterOfNodes, queues: list[Any], monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
    ) -> None:
        """Of an awaited pull that has its message, and of one that is cancelled."""
        usual = AsyncConsumer._stop_waiting
        called: list[int] = []

        async def stop(consumer: AsyncConsumer[Any]) -> None:
            if not called:
                called.append(await consumer.client.arun(operations.wake(queues[1].keys.wake)))
            await usual(consumer)

        monkeypatch.setattr(AsyncConsumer, "_stop_waiting", stop)

        async def run() -> None:
            async with Conveyor(cluster.url, lease="30s") as app:
                pull = asyncio.create_task(app.apull([queue.name for queue in queues], wait="60s"))
                await asyncio.to_thread(self.wait, cluster, queues)
                if cancelled:
                    pull.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await pull
                else:
                    await app.queue(queues[0].name).apush(1)
                    [message] = await pull
                    await message.aack()

        asyncio.run(run())
        assert self.token(cluster, queues[1])


def test_slots_of_a_cluster(cluster: ClusterOfNodes) -> None:
    """Over queues in different slots and nodes, with partitions and a plain list, every message is taken once."""
    with at_several_nodes(cluster) as (app, queues):
        queues.append(app.plain_list("list"))
        for take in (_pull, _consume):
            push_one_by_one(app, queues, 12, take)
        assert [(queue.stats().leased, queue.stats().workers) for queue in queues] == [(0, 0)] * 6


def _pull(app: Conveyor, queues: list[Any], found: list[Any], count: int) -> None:
    while len(found) < count:
        for message in app.pull(queues, 3, wait="60s"):
            with message as body:
                found.append(body)


def _consume(app: Conveyor, queues: list[Any], found: list[Any], count: int) -> None:
    for message in islice(app.consume(queues), count):
        with message as body:
            found.append(body)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda app: app.pull("mail"),
        lambda app: app.pull([]),
        lambda app: app.pull({}),
        lambda app: app.pull(None),
        lambda app: app.pull([1]),
        lambda app: app.pull([["a"]]),
        lambda app: app.pull(app.queue("a")),
        lambda app: app.pull(["no such name"]),
        lambda app: app.pull({"a": 0}),
        lambda app: app.pull({"a": -1}),
        lambda app: app.pull({"a": float("nan")}),
        lambda app: app.pull({"a": "3"}),
        lambda app: app.pull({"a": True}),
        lambda app: app.pull(["a"], 0),
        lambda app: app.pull(["a"], wait="soon"),
        lambda app: app.consume(["a"], on_error="ignore"),
        lambda app: app.consume("a"),
        lambda app: app.pull([Conveyor("redis://127.0.0.1:1/0").queue("a")]),
    ],
)
def test_wrong_input(wrong: Callable[[Conveyor], Any]) -> None:
    """An argument that is no list of queues with weights is refused before anything is sent."""
    app = Conveyor("redis://127.0.0.1:1/0")
    with pytest.raises(ConfigurationError):
        wrong(app)


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
