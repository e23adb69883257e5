"""Fixtures: a cluster with replicas, and a master under sentinels. Started when first asked for; each test finds them well and empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.server_groups import ClusterOfNodes, SentinelGroup

PATIENT = 15_000
"""Milliseconds for which a node may be silent on a busy machine before a replica, which lacks the last writes, takes over."""


@pytest.fixture(scope="session")
def whole_cluster(directory: Path) -> Iterator[ClusterOfNodes]:
    """Three masters, each with a replica."""
    cluster = ClusterOfNodes(directory / "cluster", replicas=1, node_timeout_ms=PATIENT)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(whole_cluster: ClusterOfNodes) -> ClusterOfNodes:
    """The cluster: all nodes run and agree, and hold nothing."""
    for node in whole_cluster.nodes:
        if not node.running:
            node.start()
    whole_cluster.await_silence(PATIENT)
    whole_cluster.settle()
    for node in whole_cluster.masters():
        node.ask("FLUSHALL")
    return whole_cluster


@pytest.fixture(scope="session")
def whole_sentinel_group(directory: Path) -> Iterator[SentinelGroup]:
    """A master, its replica, three sentinels."""
    sentinel_group = SentinelGroup(directory / "watched")
    yield sentinel_group
    sentinel_group.stop()


@pytest.fixture
def sentinel_group(whole_sentinel_group: SentinelGroup) -> SentinelGroup:
    """The master and its sentinels: all run and agree, and hold nothing."""
    for node in (*whole_sentinel_group.servers, *whole_sentinel_group.sentinels):
        if node.running:
            node.thaw()
        else:
            node.start()
    whole_sentinel_group.settle()
    whole_sentinel_group.master.ask("FLUSHALL")
    return whole_sentinel_group
