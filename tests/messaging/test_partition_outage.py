"""A cluster of three of which one node is away: consumers and producers of a partitioned queue go on with the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.errors import StoreUnavailable
from conveyor.store.keys import known_queues
from conveyor.store.transport import cluster as transport
from support.partition_helpers import audits
from support.shell import Shell
from support.time_limits import LATER, PATIENCE
from support.waiting import until
from testbed.server_groups import ClusterOfNodes, Node

COUNT = 20
MANY = 12


@pytest.fixture(scope="module")
def three_nodes(directory: Path) -> Iterator[ClusterOfNodes]:
    """Three masters without replicas, which serve their slots when another is away."""
    cluster = ClusterOfNodes(directory / "three")
    for node in cluster.nodes:
        node.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(three_nodes: ClusterOfNodes) -> ClusterOfNodes:
    """The three nodes: all answer, and hold nothing."""
    three_nodes.settle()
    for node in three_nodes.nodes:
        node.ask("FLUSHALL")
    return three_nodes


@pytest.fixture
def app(cluster: ClusterOfNodes) -> Iterator[Conveyor]:
    """An app that repeats calls for as long as by default."""
    with Conveyor(cluster.url, lease="30s") as app:
        yield app


class Outage:
    """A node that is away, and the partitions that live."""

    def __init__(self, cluster: ClusterOfNodes, orders: Any) -> None:
        self.node: Node = cluster.owner(orders.partitions.keys[0].jobs)
        self.live = [part for part in orders.parts if cluster.owner(part.keys.jobs) is not self.node]
        self.away = [part for part in orders.parts if part not in self.live]
        assert self.live
        assert self.away


def filled(app: Conveyor, cluster: ClusterOfNodes) -> tuple[Any, Outage]:
    """Return a queue with messages in each partition, and the outage that is to come."""
    orders: Any = app.queue("orders", partitions=MANY)
    orders.partitions.agree()
    outage = Outage(cluster, orders)
    for part in orders.parts:
        part.push_many(range(COUNT))
    return orders, outage


def rest(orders: Any, found: list[str], take: Callable[[], list[Any]]) -> None:
    """Pull what was away until nothing is left; each message came once."""
    deadline = time.monotonic() + PATIENCE
    while len(set(found)) < COUNT * MANY and time.monotonic() < deadline:
        for message in take():
            found.append(message.id)
            message.ack()
    assert sorted(found) == sorted(set(found))
    assert len(found) == COUNT * MANY
    assert audits(orders) == []


@pytest.mark.row("C48")
def test_consumer_goes_on_with_the_others(cluster: ClusterOfNodes, app: Conveyor) -> None:
    """A `consume` that runs empties the partitions that live, and takes the others when their node is back; nothing twice."""
    orders, outage = filled(app, cluster)
    found: list[str] = []
    consumer = orders.consume()
    for _ in range(5):
        with next(consumer) as _:
            found.append(f"begun {len(found)}")

    def take() -> None:
        for message in consumer:
            with message:
                found.append(message.id)
            if len(found) == COUNT * MANY:
                break

    outage.node.freeze()
    thread = threading.Thread(target=take)
    try:
        thread.start()
        until(lambda: all(len(part) == 0 for part in outage.live))
    finally:
        outage.node.thaw()
    thread.join(60)
    assert not thread.is_alive()
    assert len(found) == COUNT * MANY
    consumer.close()
    assert len(set(found)) == len(found)
    assert audits(orders) == []


@pytest.mark.row("C48")
async def test_awaited_consumer_goes_on_with_the_others(cluster: ClusterOfNodes) -> None:
    """The same for `aconsume`."""
    async with Conveyor(cluster.url, lease="30s") as app:
        with Conveyor(cluster.url) as other:
            orders, outage = await asyncio.to_thread(filled, other, cluster)
            mine: Any = app.queue("orders", partitions=MANY)
            found: list[str] = []

            async def take() -> None:
                async for message in mine.aconsume():
                    found.append(message.id)
                    await message.aack()

            outage.node.freeze()
            consumer = asyncio.create_task(take())
            try:
                await asyncio.to_thread(until, lambda: all(len(part) == 0 for part in outage.live))
                await asyncio.to_thread(until, lambda: len(found) >= COUNT * len(outage.live))
            finally:
                outage.node.thaw()
            await asyncio.to_thread(until, lambda: len(found) == COUNT * MANY)
            consumer.cancel()
            await asyncio.wait([consumer])
            assert len(set(found)) == COUNT * MANY
            assert await asyncio.to_thread(audits, orders) == []


@pytest.mark.row("C48")
def test_pull_takes_from_the_others(cluster: ClusterOfNodes, app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pull` returns what partitions that live have, without waiting again for the one that is away."""
    orders, outage = filled(app, cluster)
    found: list[str] = []
    outage.node.freeze()
    try:
        deadline = time.monotonic() + PATIENCE
        while len(found) < COUNT * len(outage.live) and time.monotonic() < deadline:
            for message in orders.pull(10):
                found.append(message.id)
                message.ack()
        assert len(found) == COUNT * len(outage.live)
        monkeypatch.setattr(transport, "FAILOVER_REPLY_TIMEOUT", LATER)
        began = time.monotonic()
        assert orders.pull(1) == []
        assert time.monotonic() - began < PATIENCE
    finally:
        outage.node.thaw()
    until(lambda: not any(app.client.is_away(part.keys) for part in orders.parts))
    rest(orders, found, lambda: orders.pull(10))


@pytest.mark.row("C48")
def test_producer_passes_the_node_over(cluster: ClusterOfNodes, app: Conveyor) -> None:
    """After one push to a node that is away, pushes in turn and bulk pushes go to the others; back, it takes its turn again."""
    orders: Any = app.queue("orders", partitions=MANY)
    orders.push_many(range(MANY))
    outage = Outage(cluster, orders)
    outage.node.freeze()
    try:
        failed = 0
        for n in range(3 * MANY):
            try:
                orders.push(n)
            except StoreUnavailable:
                failed += 1
        assert failed <= 1
        orders.push_many(range(100))
        assert sum(len(part) for part in outage.live) >= 3 * MANY - 1 + 100 + len(outage.live)
    finally:
        outage.node.thaw()
    until(lambda: not any(app.client.is_away(part.keys) for part in orders.parts))
    before = sum(len(part) for part in outage.away)
    orders.push_many(range(MANY))
    assert sum(len(part) for part in outage.away) == before + len(outage.away)


@pytest.mark.row("C48")
def test_lists_name_what_does_not_answer(cluster: ClusterOfNodes, app: Conveyor, tmp_path: Path) -> None:
    """The command line lists what answers and names what does not, wherever the names of queues and partitions are recorded."""
    _, outage = filled(app, cluster)
    for at in range(3):
        app.queue(f"q{at}").push(1)
    silent = {part.name for part in outage.away}
    outage.node.freeze()
    try:
        with Conveyor(cluster.url) as other:
            admin = Admin(other.client)
            infos = {info.name: info for info in admin.queues()}
            assert infos["orders"].ready == COUNT * len(outage.live)
            assert set(infos["orders"].unanswered) == silent
            assert silent <= admin.unanswered
            assert len(admin.jobs("orders", "ready", limit=10_000)) == COUNT * len(outage.live)
        done = Shell(tmp_path, cluster.url).run("queue", "list")
        assert "orders" in done.stdout
        assert all(name in done.stderr for name in silent), done.stderr
    finally:
        outage.node.thaw()


async def test_queues_are_listed_without_the_node_of_their_names(cluster: ClusterOfNodes) -> None:
    """While the node of the set of known queues is away, `queues` and `aqueues` both name those that have jobs elsewhere."""
    node = cluster.owner(known_queues("conveyor"))
    elsewhere = next(name for n in range(100) if cluster.owner(f"conveyor:{{{(name := f'q{n}')}}}:jobs") is not node)
    async with Conveyor(cluster.url, timeout=1) as app:
        await app.queue(elsewhere).apush(1)
        node.freeze()
        try:
            blocking = await asyncio.to_thread(app.client.queues)
            awaited = await app.client.aqueues()
        finally:
            node.thaw()
        assert (blocking, awaited) == ([elsewhere], [elsewhere])
        await app.queue(elsewhere).apurge()
