"""Other grounds than one server: a cluster whose slots move, and a master that sentinels replace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from testbed.server_groups import ClusterOfNodes, SentinelGroup, slot_of

KEYS = tuple(
    f"chaos:{{{queue}}}:jobs"
    for queue in ("default", "wide/0", "mail", "wide/1", "post/0", "default", "wide/2", "post/1", "told")
)
"""One of each slot that is moved; the busiest queue has two turns."""
ONCE: dict[str, Any] = {"socket_timeout": 5}


class ServerTopology:
    """The servers of a run, as its environment uses them; there is no append-only file, so no history."""

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

    def every_node(self) -> list[Any]:
        """Return all servers, replicas too, without sentinels."""
        raise NotImplementedError

    def add_user(self, words: Sequence[str]) -> None:
        """Make a user on every server; *words* as on an ACL line, its name first."""
        for node in self.every_node():
            node.ask("ACL", "SETUSER", *words)

    def masters(self) -> list[Any]:
        """Return the nodes that take writes."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Let everything go on."""


class Cluster(ServerTopology):
    """Three masters with a replica each."""

    def __init__(self, directory: Path, *, name: str = "valkey") -> None:
        """Start six nodes."""
        self.directory = directory
        self.nodes = ClusterOfNodes(directory, replicas=1, name=name)
        self.url = str(self.nodes.url)

    def every_node(self) -> list[Any]:
        """Return the masters and their replicas."""
        return list(self.nodes.nodes)

    def masters(self) -> list[Any]:
        """Return the nodes that own slots."""
        return list(self.nodes.masters())

    def client(self, **options: Any) -> Any:
        """Return a client of the whole cluster."""
        host, port = self.nodes.nodes[0].name.split(":")
        return redis_py.RedisCluster(host=host, port=int(port), **{**ONCE, **options})

    def move(self, draw: float, *, whole: bool) -> None:
        """Move the slot of a queue, or of a partition, to another node."""
        key = KEYS[int(draw * len(KEYS))]
        if whole:
            self.nodes.migrate_slot_whole(key)
        else:
            # In a hundred steps, however many results lie there: half a slot takes no scripts, and that shall last a second or two.
            keys = int(self.nodes.owner(key).ask("CLUSTER", "COUNTKEYSINSLOT", slot_of(key)))
            self.nodes.migrate_slot(key, batch=2 + keys // 100, pause=0.01)

    def fail_over(self, draw: float) -> None:
        """Let the replica of a slot's owner take over in good order."""
        self.nodes.settle()
        self.nodes.failover(KEYS[int(draw * len(KEYS))])
        self.nodes.settle()

    def stop(self) -> None:
        """End all nodes."""
        self.nodes.stop()


class Sentinel(ServerTopology):
    """A master, a replica, three sentinels."""

    def __init__(self, directory: Path, *, name: str = "valkey") -> None:
        """Start five processes."""
        self.directory = directory
        self.watched = SentinelGroup(directory, name=name)
        for node in self.watched.servers:  # as Sentinel's manual advises: who is alone takes no writes
            node.ask("CONFIG", "SET", "min-replicas-to-write", 1, "min-replicas-max-lag", 1)
        self.url = str(self.watched.url)

    def every_node(self) -> list[Any]:
        """Return the master and its replica."""
        return list(self.watched.servers)

    def masters(self) -> list[Any]:
        """Return the master."""
        return [self.watched.master]

    def client(self, **options: Any) -> Any:
        """Return a client of who is master now."""
        host, port = self.watched.master.name.split(":")
        return redis_py.Redis(host=host, port=int(port), retry=Retry(NoBackoff(), 0), **{**ONCE, **options})

    # Each waits first until the replica has all there is: a second fault before that would find nobody to take over.

    def fail_over(self, _: float) -> None:
        """Let the sentinels make the replica the master."""
        self.watched.settle()
        self.watched.failover()
        self.watched.settle()

    def kill_master(self) -> None:
        """End the master with SIGKILL, wait for the other, and bring it back as a replica."""
        self.watched.settle()
        dead = self.watched.kill_master()
        try:
            self.watched.await_other(dead.port)
        finally:
            self.watched.mend(dead)

    def freeze_master(self) -> None:
        """Let the master fall silent until the other has taken over; it wakes, and still takes itself for the master."""
        self.watched.settle()
        old = self.watched.freeze_master()
        try:
            self.watched.await_other(old.port)
        finally:
            self.watched.mend(old)

    def thaw(self) -> None:
        """Wait until master and replica are in step."""
        with suppress(AssertionError):
            self.watched.settle()

    def promotions(self) -> int:
        """Return how often another server became the master, by order or not."""
        return int(self.watched.promotions())

    def stop(self) -> None:
        """End all."""
        self.watched.stop()
