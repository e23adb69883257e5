"""Other grounds than one server: a cluster whose slots move, and a master that sentinels replace."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from chaos import ground  # noqa: F401  makes the servers of the test suite importable
from topology import ClusterOfNodes, Watched  # type: ignore[import-not-found]

KEY = "chaos:{default}:jobs"
ONCE: dict[str, Any] = {"socket_timeout": 5}


class Terrain:
    """What a stage asks of its Redis; there is no append-only file, so no history."""

    directory: Path
    url: str
    has_clock = False

    def command(self, *parts: Any) -> Any:
        """Carry out one command on every master; return what the first said, None when one does not answer."""
        try:
            found = [node.ask(*parts) for node in self.masters()]
        except (redis_py.RedisError, OSError, StopIteration):
            return None
        return found[0]

    def masters(self) -> list[Any]:
        """Return the nodes that take writes."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Let everything go on."""


class Cluster(Terrain):
    """Three masters with a replica each."""

    def __init__(self, directory: Path) -> None:
        """Start six nodes."""
        self.directory = directory
        self.nodes = ClusterOfNodes(directory, replicas=1)
        self.url = str(self.nodes.url)

    def masters(self) -> list[Any]:
        """Return the nodes that own slots."""
        return list(self.nodes.masters())

    def client(self, **options: Any) -> Any:
        """Return a client of the whole cluster."""
        host, port = self.nodes.nodes[0].name.split(":")
        return redis_py.RedisCluster(host=host, port=int(port), **{**ONCE, **options})

    def move(self, *, whole: bool) -> None:
        """Move the slot of the busiest queue to another node."""
        if whole:
            self.nodes.migrate_slot_whole(KEY)
        else:
            self.nodes.migrate_slot(KEY, batch=2, pause=0.01)

    def fail_over(self) -> None:
        """Let the replica of the slot's owner take over in good order."""
        with suppress(AssertionError):
            self.nodes.failover(KEY)
            self.nodes.settle()

    def stop(self) -> None:
        """End all nodes."""
        self.nodes.stop()


class Sentinel(Terrain):
    """A master, a replica, three sentinels."""

    def __init__(self, directory: Path) -> None:
        """Start five processes."""
        self.directory = directory
        self.watched = Watched(directory)
        for node in self.watched.servers:  # as Sentinel's manual advises: who is alone takes no writes
            node.ask("CONFIG", "SET", "min-replicas-to-write", 1, "min-replicas-max-lag", 1)
        self.url = str(self.watched.url)

    def masters(self) -> list[Any]:
        """Return the master."""
        return [self.watched.master]

    def client(self, **options: Any) -> Any:
        """Return a client of who is master now."""
        host, port = self.watched.master.name.split(":")
        return redis_py.Redis(host=host, port=int(port), retry=Retry(NoBackoff(), 0), **{**ONCE, **options})

    def fail_over(self) -> None:
        """Let the sentinels make the replica the master."""
        with suppress(AssertionError):
            self.watched.failover()
            self.watched.settle()

    def kill_master(self) -> None:
        """End the master with SIGKILL, wait for the other, and bring it back as a replica."""
        with suppress(AssertionError):
            dead = self.watched.kill_master()
            self.watched.await_other(dead.port)
            self.watched.mend(dead)

    def stop(self) -> None:
        """End all."""
        self.watched.stop()
