"""Partitions on a cluster of three masters, where each lies in a slot of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.messaging.consumer.renewal import by_endpoint
from support.partition_helpers import FAST, audits
from support.running_worker import working
from support.waiting import until, until_ended
from testbed.server_groups import ClusterOfNodes


def _blocked(cluster: ClusterOfNodes) -> int:
    """Return how many clients of all nodes wait for something."""
    texts = [node.ask("INFO", "clients").decode() for node in cluster.nodes]
    return sum(int(text.partition("blocked_clients:")[2].split()[0]) for text in texts)


def test_an_idle_consumer_waits_at_each_slot(cluster: ClusterOfNodes) -> None:
    """With a blocked connection for each partition, it is woken for any of them; none is left when it ends."""
    with Conveyor(cluster.url, lease="30s") as app:
        orders: Any = app.queue("orders", partitions=6)
        assert len(by_endpoint(app.client, orders.partitions.keys, lambda keys: keys)) == 6
        assert len({cluster.owner(keys.jobs).port for keys in orders.partitions.keys}) > 1
        found, consumer = [], orders.consume()

        def take() -> None:
            for message in consumer:
                with message as body:
                    found.append(body)
                if len(found) == 12:
                    break

        orders.partitions.agree()
        thread = threading.Thread(target=take)
        thread.start()
        for number in range(12):
            until(lambda: _blocked(cluster) >= 6)
            orders.parts[number % 6].push(number)
            until(lambda number=number: len(found) > number)
        until_ended(thread)
        consumer.close()
        assert found == list(range(12))
        assert audits(orders) == []
        until(lambda: _blocked(cluster) == 0)


async def test_a_consumer_on_a_loop_waits_at_each_slot(cluster: ClusterOfNodes) -> None:
    """The same on an event loop, where each slot has a task."""
    async with Conveyor(cluster.url, lease="30s") as app:
        orders: Any = app.queue("orders", partitions=6)
        found, consumer = [], orders.aconsume()

        async def take() -> None:
            async for message in consumer:
                async with message as body:
                    found.append(body)
                if len(found) == 12:
                    break

        await orders.partitions.aagree()
        task = asyncio.create_task(take())
        for number in range(12):
            await asyncio.to_thread(until, lambda: _blocked(cluster) >= 6, 10)
            await orders.parts[number % 6].apush(number)
            await asyncio.to_thread(until, lambda number=number: len(found) > number, 4)
        await asyncio.wait_for(task, 60)
        await consumer.aclose()
        assert found == list(range(12))
        await asyncio.to_thread(until, lambda: _blocked(cluster) == 0, 10)


def test_everything_works_over_the_nodes(cluster: ClusterOfNodes) -> None:
    """Bulk pushes, pulls, batches, dead letters, counts, handles and a change of the number, over slots of all nodes."""
    with Conveyor(cluster.url) as app:
        orders: Any = app.queue("orders", partitions=6, lease="5s")
        orders.retry = FAST
        ids = orders.push_many(range(1200))
        assert (len(orders), Admin(app.client).names()) == (1200, ["orders"])
        assert app.job(ids[7]).status() == "ready"
        assert orders.push(-1, id="own-7") == "own-7"
        assert app.job("own-7").cancel()
        bodies = []
        for batch in orders.batches(size=100, within="100ms"):
            with batch as some:
                bodies += some
            if len(bodies) == 1200:
                break
        assert sorted(bodies) == list(range(1200))
        orders.push_many(range(12))
        for message in orders.pull(12):
            message.dead("no")
        assert len(list(orders.dead_letters())) == 12
        assert orders.redrive(limit=5) == 5
        assert (orders.purge(), orders.purge(dead=True)) == (5, 7)
        assert orders.repartition(3) == 6
    with Conveyor(cluster.url) as app:
        app.queue("orders", partitions=3).push_many(range(9))
        assert sorted(message.body for message in app.queue("orders", partitions=3).pull(9)) == list(range(9))


@pytest.mark.usefixtures("only_when_woken")
async def test_a_worker_serves_partitions_on_all_nodes(cluster: ClusterOfNodes) -> None:
    """Tasks of one queue in six slots run, an idle worker starts a job of any at once, and the results are found."""
    async with Conveyor(cluster.url) as app:
        app.queue("orders", partitions=6)

        @app.task(queue="orders")
        async def double(n: int) -> int:
            return 2 * n

        async with working(app) as worker:
            assert len(worker.consumers) == 6
            jobs = await app.aenqueue_many(double.s(n) for n in range(300))
            assert [await job.aresult(timeout=60) for job in jobs] == [2 * n for n in range(300)]
            for n in range(6):
                assert await (await double.aenqueue(n)).aresult(timeout=60) == 2 * n
