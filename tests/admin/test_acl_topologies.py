"""The printed rules on a cluster, and on a master under sentinels: enough there too."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from pathlib import Path

from conveyor.admin import acl
from support.role_programs import LIST, NAMESPACE, PASSWORD, shop, work
from testbed.server_groups import ClusterOfNodes, Node, SentinelGroup

DIGEST = "#" + hashlib.sha256(PASSWORD.encode()).hexdigest()


def allow(nodes: Iterable[Node], *roles: str, topology: str, default: bool = True) -> None:
    """Make the users as printed, on each node; without *default* no other user may do anything."""
    for node in nodes:
        for role in roles:
            rules = acl.rules(role, NAMESPACE, lists=[LIST], server="7.2", topology=topology)
            node.ask(*rules.command.replace(acl.PASSWORD, DIGEST).split(" "))
        node.ask("ACL", "LOG", "RESET")


def denied(nodes: Iterable[Node]) -> list[object]:
    """Return what was refused to anybody."""
    return [entry for node in nodes for entry in node.ask("ACL", "LOG")]


def login(url: str, role: str) -> str:
    return url.replace("://", f"://{NAMESPACE}-{role}:{PASSWORD}@")


def test_rules_are_enough_on_a_cluster(directory: Path) -> None:
    """A producer and a worker live on three masters with no more than the rules for a cluster."""
    cluster = ClusterOfNodes(directory / "acl-cluster")
    try:
        allow(cluster.nodes, "producer", "worker", topology="cluster")
        lead(cluster.url)
        assert denied(cluster.nodes) == []
    finally:
        cluster.stop()


def test_rules_are_enough_under_sentinels(directory: Path) -> None:
    """The same under sentinels, which know a user that may ask for the master and no other."""
    sentinel_group = SentinelGroup(directory / "acl-sentinel")
    try:
        allow(sentinel_group.servers[:1], "producer", "worker", topology="sentinel")
        allow(sentinel_group.sentinels, "sentinel", topology="sentinel")
        user = f"?sentinel_username={NAMESPACE}-sentinel&sentinel_password={PASSWORD}"
        lead(sentinel_group.url + user)
        assert denied([*sentinel_group.servers, *sentinel_group.sentinels]) == []
    finally:
        sentinel_group.stop()


def lead(url: str) -> None:
    """Live as a worker, then as a producer of jobs that stay where they are."""

    async def worker() -> None:
        with shop(login(url, "worker")) as app:
            await work(app)
            await app.aclose()

    asyncio.run(worker())
    with shop(login(url, "producer")) as app:
        app.tasks["shop.double"].options(id="kept").enqueue(1)
        assert app.job("kept").status() == "ready"
        assert app.job("kept").cancel()
        app.topic("order.created").subscribe("a", "b", "c")
        assert len(app.topic("order.created").publish(1)) == 3
        assert app.queue("a").stats().ready == app.queue("c").stats().ready == 1
