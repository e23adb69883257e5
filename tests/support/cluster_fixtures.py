"""Fixtures: a cluster with replicas, and a master under sentinels. Started when first asked for; each test finds them well and empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server_groups import ClusterOfNodes, Watched


@pytest.fixture(scope="session")
def whole_cluster(directory: Path) -> Iterator[ClusterOfNodes]:
    """Three masters, each with a replica."""
    cluster = ClusterOfNodes(directory / "cluster", replicas=1)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(whole_cluster: ClusterOfNodes) -> ClusterOfNodes:
    """The cluster: all nodes run and agree, and hold nothing."""
    for node in whole_cluster.nodes:
        if not node.running:
            node.start()
    whole_cluster.settle()
    for node in whole_cluster.masters():
        node.ask("FLUSHALL")
    return whole_cluster


@pytest.fixture(scope="session")
def whole_watched(directory: Path) -> Iterator[Watched]:
    """A master, its replica, three sentinels."""
    watched = Watched(directory / "watched")
    yield watched
    watched.stop()


@pytest.fixture
def watched(whole_watched: Watched) -> Watched:
    """The master and its sentinels: all run and agree, and hold nothing."""
    for node in (*whole_watched.servers, *whole_watched.sentinels):
        if node.running:
            node.thaw()
        else:
            node.start()
    whole_watched.settle()
    whole_watched.master.ask("FLUSHALL")
    return whole_watched
