"""A server that forgot: the queues in use are known again after a push or a registration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from conveyor import Buffer
from conveyor.admin.admin import Admin
from conveyor.jobs.app import Conveyor
from conveyor.store.client import queue_index
from conveyor.store.client.client import Client
from support.running_worker import working
from support.waiting import auntil
from testbed.server_groups import ClusterOfNodes
from testbed.server_process import Server

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be looked for")
Prepare = Callable[[Conveyor], Callable[[], Any]]


@pytest.fixture
def kept(start_server: Callable[..., Server]) -> Server:
    """A server with an append-only file, so that pushes can be confirmed."""
    return start_server("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def client(kept: Server) -> Iterator[Client]:
    """A client that pushes nothing, and knows of queues only what others made known."""
    client = Client(kept.url)
    yield client
    client.close()


def known(server: Server) -> set[bytes]:
    """Return the set of known queues."""
    with server.client() as redis:
        return set(redis.smembers("conveyor:queues"))


def forget(server: Server, *keys: str) -> None:
    """Let the server forget some keys, or everything."""
    with server.client() as redis:
        redis.delete(*keys) if keys else redis.flushall()


def _task(app: Conveyor) -> Any:
    @app.task(name="plain", queue="mail")
    async def plain() -> None: ...

    return plain


def _from(make: Callable[[Conveyor], Any], push: Callable[[Any], Any]) -> Prepare:
    def prepare(app: Conveyor) -> Callable[[], Any]:
        made = make(app)
        return lambda: push(made)

    return prepare


def _mail(app: Conveyor) -> Any:
    return app.queue("mail")


PUSHES: dict[str, Prepare] = {
    "push": _from(_mail, lambda mail: mail.push(1)),
    "push_many": _from(_mail, lambda mail: mail.push_many(range(2500))),
    "special": _from(_mail, lambda mail: mail.push(1, priority=3)),
    "confirmed": _from(_mail, lambda mail: mail.push(1, fsync=True)),
    "enqueue": _from(_task, lambda task: task.enqueue()),
    "enqueue_with_id": _from(_task, lambda task: task.options(id="mine").enqueue()),
    "partitions": _from(lambda app: app.queue("mail", partitions=3), lambda mail: mail.push(1, unique="a")),
}
APUSHES: dict[str, Prepare] = {
    "push": _from(_mail, lambda mail: mail.apush(1)),
    "push_many": _from(_mail, lambda mail: mail.apush_many(range(2500))),
    "special": _from(_mail, lambda mail: mail.apush(1, priority=3)),
    "confirmed": _from(_mail, lambda mail: mail.apush(1, fsync=True)),
    "enqueue": _from(_task, lambda task: task.aenqueue()),
    "partitions": _from(lambda app: app.queue("mail", partitions=3), lambda mail: mail.apush(1, unique="a")),
}


@pytest.mark.row("C46")
@pytest.mark.parametrize("how", PUSHES)
@pytest.mark.parametrize("buffered", [False, True])
def test_push_makes_a_forgotten_queue_known(kept: Server, how: str, buffered: bool) -> None:
    """The first push after Redis forgot everything makes its queue known again, whatever the way of pushing."""
    with Conveyor(kept.url, buffer=Buffer() if buffered else None) as app:
        push = PUSHES[how](app)
        push()
        before = known(kept)
        forget(kept)
        push()
        assert known(kept) == before


@pytest.mark.row("C46")
@pytest.mark.parametrize("how", APUSHES)
async def test_awaited_push_makes_a_forgotten_queue_known(kept: Server, how: str) -> None:
    """The same for the awaitable ways."""
    async with Conveyor(kept.url) as app:
        push: Callable[[], Awaitable[Any]] = APUSHES[how](app)
        await push()
        before = known(kept)
        forget(kept)
        await push()
        assert known(kept) == before


@pytest.mark.row("C46")
async def test_worker_makes_its_queues_known(kept: Server) -> None:
    """A worker that registers again after Redis forgot everything makes its queues known, with partitions or without."""
    async with Conveyor(kept.url, lease="1s") as app:
        _task(app)
        app.queue("orders", partitions=2)

        @app.task(name="other", queue="orders")
        async def other() -> None: ...

        async with working(app):
            names = {b"mail", b"orders/0", b"orders/1"}
            await auntil(lambda: known(kept) == names)
            forget(kept)
            await auntil(lambda: known(kept) == names)


@pytest.mark.row("C46")
async def test_consumer_makes_its_queue_known(kept: Server) -> None:
    """A consumer that registers again makes its queue known."""
    async with Conveyor(kept.url, lease="1s") as app:
        mail: Any = app.queue("mail")
        await mail.apush(1)

        async def consume() -> None:
            async for message in mail.aconsume():
                await message.aack()

        consumer = asyncio.create_task(consume())
        try:
            await auntil(lambda: known(kept) == {b"mail"})
            forget(kept)
            await auntil(lambda: known(kept) == {b"mail"})
        finally:
            consumer.cancel()
            await asyncio.wait([consumer])


@pytest.mark.row("C46")
def test_queues_are_found_without_the_set(kept: Server, client: Client) -> None:
    """When the set alone is lost, queues that hold jobs are found by their keys, jobs with ids of their own too."""
    with Conveyor(kept.url) as app:
        _task(app).options(id="mine").enqueue()
        app.queue("orders", partitions=2).push_many([1, 2])
        forget(kept, "conveyor:queues")
        assert Admin(client).names() == ["mail", "orders"]
        assert known(kept) == {b"mail", b"orders/0", b"orders/1"}
        forget(kept, "conveyor:queues")
        assert Admin(client).job("mine").queue == "mail"


@pytest.mark.row("C46")
def test_names_are_added_again_from_time_to_time(kept: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the set alone is lost, a push adds all names of its program again, and no push in between costs a command more."""
    now = [1000.0]
    monkeypatch.setattr(queue_index, "monotonic", lambda: now[0])
    with Conveyor(kept.url) as app, kept.client() as redis:
        mail, orders = app.queue("mail"), app.queue("orders")
        mail.push(1)
        orders.push(1)
        forget(kept, "conveyor:queues")
        redis.config_resetstat()
        for _ in range(50):
            mail.push(1)
        assert "cmdstat_sadd" not in redis.info("commandstats")
        now[0] += queue_index.REFRESH
        for _ in range(50):
            mail.push(1)
        assert redis.info("commandstats")["cmdstat_sadd"]["calls"] == 1
        assert known(kept) == {b"mail", b"orders"}


def test_names_of_many_queues_are_forgotten_in_their_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that pushes to ever new queues remembers so many names; a push to one that it has forgotten adds it again."""
    monkeypatch.setattr(queue_index, "MOST", 3)
    with Conveyor(url) as app:
        index = app.client._announced
        for n in range(5):
            app.queue(f"client-{n}").push(n)
        assert [f"client-{n}" in index for n in range(5)] == [False, False, True, True, True]
        app.queue("client-0").push(5)
        assert "client-0" in index
        assert "client-2" not in index
        for n in range(5):
            app.queue(f"client-{n}").purge()
            app.queue(f"client-{n}").delete()


def test_pushes_go_on_while_the_node_of_the_set_is_away(cluster: ClusterOfNodes) -> None:
    """With its node away the set is left for later: pushes to queues of other nodes are stored."""
    away = cluster.owner("conveyor:queues")
    here = next(
        name for name in map("q{}".format, range(100)) if cluster.owner(f"conveyor:{{{name}}}:jobs") is not away
    )
    with Conveyor(cluster.url) as app:
        away.freeze()
        try:
            app.queue(here).push(1)
            app.queue(here).push(2)
        finally:
            away.thaw()
        assert len(app.queue(here)) == 2


def test_a_cluster_that_forgot(cluster: ClusterOfNodes) -> None:
    """On a cluster the set lies in another slot than the queues: pushes make them known, and their keys are found."""
    with Conveyor(cluster.url) as app:
        names = [f"q{number}" for number in range(8)]
        for name in names:
            app.queue(name).push(1)
        for node in cluster.masters():
            node.ask("FLUSHALL")
        for name in names:
            app.queue(name).push(1)
        owner = cluster.owner("conveyor:queues")
        assert {name.decode() for name in owner.ask("SMEMBERS", "conveyor:queues")} == set(names)
        owner.ask("DEL", "conveyor:queues")
        assert app.client.queues() == names
