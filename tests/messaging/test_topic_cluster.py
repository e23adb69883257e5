"""Topics on a cluster: the copies lie in several slots, and each subscriber gets its own once, through crashes and outages."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest
from redis.exceptions import ConnectionError as TransportError

from conveyor import Conveyor, QueueFull
from conveyor.admin.admin import Admin
from conveyor.messaging.topic import TopicInfo
from conveyor.store import inspection
from support.cut_commands import AsyncCut, Cut, Dies
from support.waiting import until, until_ended
from testbed.server_groups import ClusterOfNodes, wait_for

TOPIC = "user.created"
QUEUES = ("a", "b", "c", "d")


def taken(app: Conveyor, queue: str) -> list[Any]:
    """Pull all messages of a queue that are ready, and return their bodies."""
    bodies = []
    while messages := app.queue(queue).pull(100):
        for message in messages:
            bodies.append(message.body)
            message.ack()
    return bodies


def test_copies_over_the_nodes(cluster: ClusterOfNodes) -> None:
    """Every subscriber gets its copies, in their order; nothing stays in an outbox, and the counts are those of a single server."""
    with Conveyor(cluster.url) as app:
        topic = app.topic(TOPIC)
        assert topic.publish("nobody") == []
        topic.subscribe(*QUEUES)
        app.topic("user.*").subscribe("a", "e")
        assert len({cluster.owner(app.client.keys(queue).jobs).port for queue in QUEUES}) > 1
        ids = [topic.publish(number) for number in range(5)]
        ids += topic.publish_many(range(5, 300))
        assert [[id_.partition(":")[0] for id_ in copies] for copies in ids] == [[*QUEUES, "e"]] * 300
        for queue in (*QUEUES, "e"):
            keys = app.client.keys(queue)
            assert app.client.execute("EXISTS", keys.outbox, key=keys.outbox) == 0
            assert app.client.run(inspection.audit(keys)) == []
            assert taken(app, queue) == list(range(300))
        assert app.topics() == [TopicInfo("user.*", ("a", "e")), TopicInfo(TOPIC, QUEUES, 301, 1)]


async def test_awaitable_forms_over_the_nodes(cluster: ClusterOfNodes) -> None:
    """Publishes at the same time of two programs, with an outbox that all of them deliver: each copy arrives once."""
    async with Conveyor(cluster.url) as app, Conveyor(cluster.url) as other:
        await app.topic(TOPIC).asubscribe(*QUEUES)
        await asyncio.gather(
            *(app.topic(TOPIC).apublish(number) for number in range(60)),
            *(other.topic(TOPIC).apublish(number) for number in range(60, 120)),
        )
        for queue in QUEUES:
            assert sorted(await asyncio.to_thread(taken, app, queue)) == list(range(120))


def test_partitions_and_full_queues(cluster: ClusterOfNodes) -> None:
    """A program that does not declare a queue finds its partitions; a queue that is declared with a limit refuses when full."""
    with Conveyor(cluster.url) as app, Conveyor(cluster.url) as other:
        wide: Any = app.queue("wide", partitions=3)
        app.topic(TOPIC).subscribe("b", "wide")
        for number in range(6):
            (other if number % 2 else app).topic(TOPIC).publish(number)
        bodies = []
        while messages := wide.pull(10):
            for message in messages:
                bodies.append(message.body)
                message.ack()
        assert sorted(bodies) == list(range(6))
        app.topic(TOPIC).unsubscribe("wide")
        app.queue("z", max_length=1)
        app.topic(TOPIC).subscribe("z")
        app.topic(TOPIC).publish(6)
        with pytest.raises(QueueFull, match="'z' holds 1 jobs and takes at most 1"):
            app.topic(TOPIC).publish(7)
        assert taken(other, "b") == list(range(7))
        assert taken(other, "z") == [6]


def test_cost_over_the_nodes(cluster: ClusterOfNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish to k queues is k + 4 round trips: who subscribes, the first copy, the outbox's head, each other one, its end."""
    with Conveyor(cluster.url) as app:
        for queues in (1, 2, 4):
            app.topic(f"t.{queues}").subscribe(*QUEUES[:queues])
            app.topic(f"t.{queues}").publish(0)
            with monkeypatch.context() as patch:
                cut = Cut(patch, 0, sent=False, error=Dies)
                app.topic(f"t.{queues}").publish(1)
            assert cut.count == (2 if queues == 1 else queues + 4)


@pytest.mark.row("D282")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
@pytest.mark.parametrize("error", [Dies, TransportError], ids=["dies", "cut"])
def test_once_each_wherever_it_breaks(
    cluster: ClusterOfNodes, monkeypatch: pytest.MonkeyPatch, sent: bool, error: type[BaseException]
) -> None:
    """
    The publisher dies, or a connection breaks, at every command: each subscriber gets the message once, or, not published, none.

    Consumers finish what has arrived before the next deliverer begins. That is a consumer of the queue whose outbox it is.
    """
    with Conveyor(cluster.url, lease="300ms") as consumer:
        consumer.topic(TOPIC).subscribe(*QUEUES)
        with monkeypatch.context() as patch, Conveyor(cluster.url) as publisher:
            steps = Cut(patch, 0, sent=sent, error=error)
            publisher.topic(TOPIC).publish("first")
        assert [taken(consumer, queue) for queue in QUEUES] == [["first"]] * 4
        outcomes = Counter[bool]()
        for at in range(1, steps.count + 1):
            publisher, published = Conveyor(cluster.url), None
            with monkeypatch.context() as patch:
                Cut(patch, at, sent=sent, error=error)
                with suppress(Dies):
                    published = publisher.topic(TOPIC).publish(at)
            got = {queue: taken(consumer, queue) for queue in QUEUES}
            until(partial(has_delivered, consumer, got))
            assert list(got.values()) in ([[at]] * 4, [[]] * 4), f"at command {at}"
            assert published is None or got["a"] == [at]
            outcomes[got["a"] == [at]] += 1
            publisher.close()
        assert outcomes.total() > 8
        assert outcomes[True] >= 4
        assert (outcomes[False] > 0) is (error is Dies)


def has_delivered(app: Conveyor, got: dict[str, list[Any]]) -> bool:
    """Pull from the queues, as their consumers would again and again, and add what came; tell whether the outbox is empty."""
    outbox = app.client.keys("a").outbox
    is_empty = not app.client.execute("EXISTS", outbox, key=outbox)
    for queue, bodies in got.items():
        bodies += taken(app, queue)
    return is_empty


@pytest.mark.row("D282")
def test_a_node_that_is_away(cluster: ClusterOfNodes) -> None:
    """A publish returns while the node of one subscriber does not answer; its copy comes with it, delivered by who is there."""
    with Conveyor(cluster.url, timeout="2s", lease="300ms") as app:
        topic = app.topic(TOPIC)
        nodes = {queue: cluster.owner(app.client.keys(queue).jobs).port for queue in map(chr, range(97, 123))}
        registry = cluster.owner(app.topic(TOPIC)._directory.keys.registry).port
        known = cluster.owner("conveyor:queues").port
        away = next(queue for queue, port in nodes.items() if port not in (registry, known))
        here = [queue for queue, port in nodes.items() if port != nodes[away]][:2]
        topic.subscribe(away, *here)
        topic.publish("before")
        assert [taken(app, queue) for queue in (away, *here)] == [["before"]] * 3
        node = cluster.owner(app.client.keys(away).jobs)
        node.freeze()
        try:
            for number in range(3):
                assert len(topic.publish(number)) == 3
        finally:
            node.thaw()
        wait_for(lambda: node.ask("PING") and cluster.owner(app.client.keys(away).jobs) is not None)
        received: dict[str, list[Any]] = {queue: [] for queue in (away, *here)}

        def arrived() -> bool:
            for queue, bodies in received.items():
                bodies += taken(app, queue)
            return all(len(bodies) == 3 for bodies in received.values())

        until(arrived)
        assert received == {queue: [0, 1, 2] for queue in (away, *here)}


@pytest.mark.row("D282")
@pytest.mark.parametrize("consume", ["consume", "aconsume"])
def test_a_consumer_delivers_the_outbox_of_its_queue(
    cluster: ClusterOfNodes, monkeypatch: pytest.MonkeyPatch, consume: str
) -> None:
    """Copies whose publisher has died are delivered by a consumer that waits at the first queue, within its upkeep."""
    with Conveyor(cluster.url, lease="600ms") as app:
        app.topic(TOPIC).subscribe(*QUEUES)
        with monkeypatch.context() as patch:
            patch.setattr("conveyor.messaging.topic.TopicDirectory._deliver", lambda *_: iter(()))
            app.topic(TOPIC).publish(1)
        assert [app.queue(queue).stats().ready for queue in QUEUES] == [1, 0, 0, 0]
        info = Admin(app.client).queue("a")
        assert info.outbox == 3
        found: list[Any] = []
        ended = threading.Event()
        thread = threading.Thread(target=_BY[consume], args=(cluster.url, found, ended))
        thread.start()
        until(lambda: all(app.queue(queue).stats().ready == 1 for queue in QUEUES[1:]) and found == [1])
        ended.set()
        app.queue("a").push("end")
        until_ended(thread)
        assert found == [1, "end"]
        assert [taken(app, queue) for queue in QUEUES] == [[], [1], [1], [1]]


def _consume(url: str, found: list[Any], ended: threading.Event) -> None:
    with Conveyor(url, lease="600ms") as app, closing(app.queue("a").consume()) as messages:
        for message in messages:
            with message as body:
                found.append(body)
            if ended.is_set():
                break


def _aconsume(url: str, found: list[Any], ended: threading.Event) -> None:
    async def run() -> None:
        async with Conveyor(url, lease="600ms") as app:
            consumer = app.queue("a").aconsume()
            async for message in consumer:
                async with message as body:
                    found.append(body)
                if ended.is_set():
                    break
            await consumer.aclose()

    asyncio.run(run())


_BY: dict[str, Callable[..., None]] = {"consume": _consume, "aconsume": _aconsume}


@pytest.mark.row("D282")
def test_an_awaited_publish_breaks_at_every_command(cluster: ClusterOfNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on an event loop: a connection that breaks at any command, its reply lost, doubles and loses nothing."""
    with Conveyor(cluster.url) as app:
        app.topic(TOPIC).subscribe(*QUEUES)

        async def publish(value: int) -> None:
            async with Conveyor(cluster.url) as publisher:
                await publisher.topic(TOPIC).apublish(value)

        at = steps = 1
        while at <= steps:
            with monkeypatch.context() as patch:
                cut = AsyncCut(patch, at)
                asyncio.run(publish(at))
            steps = max(steps, cut.count)
            assert [taken(app, queue) for queue in QUEUES] == [[at]] * 4, f"at command {at}"
            at += 1
        assert at > 8
