"""Real clusters, and masters under sentinels, on ports of 127.0.0.1. No pytest in here: other programs use it too."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import time
from binascii import crc_hqx
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis as redis_py

from testbed.server_process import _LEASH as LEASH
from testbed.server_process import find_binary

SLOTS = 16384
_ports: Iterator[int] = itertools.count(12000 + os.getpid() % 300 * 30)


def free_port() -> int:
    """
    Return a port that no other process gets from here while this one lives, also when its server is away for a moment.

    10,000 above it, where a node of a cluster talks to the others, is free too. The system gives neither to outgoing
    connections, whose ports begin at 32,768.
    """
    return next(port for port in _ports if all(map(_is_free, (port, port + 10000))) and _reserve(port))


def _reserve(port: int) -> bool:
    """Bind a name that stands for the port, and goes with this process; return False when another one has it."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0conveyor port {port}")
    except OSError:
        holder.close()
        return False
    holder.detach()  # held by its number alone: an object would warn at the end of the process that nobody closed it
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], object], seconds: float = 60.0, what: str = "") -> None:
    """Wait until *condition* holds; errors of a server that is not there do not count."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(redis_py.RedisError, OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise AssertionError(what or "the condition never came true")
        time.sleep(0.01)


def slot_of(key: str) -> int:
    """Return the slot of a key, or of its hash tag."""
    tag = key.partition("{")[2].partition("}")[0] if "{" in key else ""
    return crc_hqx((tag or key).encode(), 0) % SLOTS


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class Node:
    """One server process on a port, dead when the test process is dead."""

    def __init__(
        self, directory: Path, *options: str, configuration: str = "", name: str = "valkey", check: bool = True
    ) -> None:
        """Start it: *options* as on its command line, *configuration* as a file it may write to; *check* that it answers."""
        self.port = free_port()
        self.name = f"127.0.0.1:{self.port}"
        self.url = f"redis://{self.name}"
        self._binary = find_binary(name)
        assert self._binary is not None, f"no binary of {name}"
        self.directory = directory / str(self.port)
        self.directory.mkdir(parents=True)
        self._file = self.directory / "conf"
        self._file.write_text(configuration)
        self._options = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), *options)
        self._check = check
        self.start()

    def start(self) -> None:
        """Start the process, again after a kill, and wait until it answers."""
        command = [str(self._binary), str(self._file), *self._options]
        log = self.directory / "log"
        self._leash = subprocess.Popen(
            ["/bin/sh", "-c", LEASH, str(log), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._leash.stdout is not None
        self.pid = int(self._leash.stdout.readline())
        if self._check:
            wait_for(lambda: self.ask("PING"), what=f"{self._binary} did not start, see {log}")

    def ask(self, *command: str | int, timeout: float = 2.0) -> Any:
        """Return the reply to one command, as the server sent it."""
        with self.client(socket_timeout=timeout, socket_connect_timeout=1) as client:
            return client.execute_command(*command)

    def client(self, **options: Any) -> redis_py.Redis:
        """Return a client whose replies are as the server sent them."""
        client = redis_py.Redis(port=self.port, protocol=2, **options)
        client.response_callbacks.clear()
        return client

    def role(self) -> str:
        """Return master or slave."""
        return str(self.ask("ROLE")[0].decode())

    def await_replicas(self) -> None:
        """Wait until the replicas have all that was written up to now."""
        written = int(self.ask("ROLE")[1])
        wait_for(lambda: all(int(offset) >= written for _, _, offset in self.ask("ROLE")[2]), what="a replica lags")

    def freeze(self) -> None:
        """Stop it silently: connections stay, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def running(self) -> bool:
        """True while the process exists."""
        return self._leash.poll() is None

    def kill(self) -> None:
        """End the process with SIGKILL and wait until it is gone. A second call does nothing."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
            self._leash.wait(10)
        for pipe in (self._leash.stdin, self._leash.stdout):
            if pipe is not None:
                pipe.close()


QUIET = ("--save", "", "--appendonly", "no", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")


class SentinelGroup:
    """A master with a replica, and three sentinels that watch them: `url` leads to whoever is master."""

    NAME = "main"

    def __init__(
        self, directory: Path, *, down_after_ms: int = 500, failover_timeout_ms: int = 3000, name: str = "valkey"
    ) -> None:
        """Start all five, and wait until the sentinels know each other and the replica is in step."""
        self._directory = directory
        self.servers = [Node(directory, *QUIET, name=name)]
        self.servers.append(Node(directory, *QUIET, "--replicaof", "127.0.0.1", str(self.servers[0].port), name=name))
        lines = (
            f"monitor {self.NAME} 127.0.0.1 {self.servers[0].port} 2", f"down-after-milliseconds {self.NAME} {down_after_ms}",
            f"failover-timeout {self.NAME} {failover_timeout_ms}", f"parallel-syncs {self.NAME} 1",
        )  # fmt: skip
        self._down_after_ms = down_after_ms
        text = "".join(f"sentinel {line}\n" for line in lines)
        self.sentinels = [Node(directory, "--sentinel", configuration=text, name=name) for _ in range(3)]
        self.url = f"redis+sentinel://{','.join(one.name for one in self.sentinels)}/{self.NAME}"
        self.settle()

    @property
    def master(self) -> Node:
        """The server the sentinels name."""
        host, port = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)
        assert host == b"127.0.0.1"
        return next(one for one in self.servers if one.port == int(port))

    @property
    def replica(self) -> Node:
        """The other one."""
        master = self.master
        return next(one for one in self.servers if one is not master)

    def settle(self) -> None:
        """Wait until all agree: a master that knows it, a replica in step, and sentinels that could fail over at once."""

        def agreed() -> bool:
            master, ports = self.master, set()
            for sentinel in self.sentinels:
                state = _pairs(sentinel.ask("SENTINEL", "MASTER", self.NAME))
                flags, others = state[b"flags"], int(state[b"num-slaves"])
                if flags != b"master" or others < 1 or int(state[b"num-other-sentinels"]) < 2:
                    return False
                ports.add(int(state[b"port"]))
                known = map(_pairs, sentinel.ask("SENTINEL", "REPLICAS", self.NAME))
                if [one[b"flags"] for one in known if int(one[b"port"]) == self.replica.port] != [b"slave"]:
                    return False
            replication = self.replica.ask("ROLE")
            return ports == {master.port} and master.role() == "master" and replication[3:4] == [b"connected"]

        wait_for(agreed, what="the sentinels do not agree")

    def kill_master(self) -> Node:
        """End the master with SIGKILL and return it; the sentinels need a while to notice. `mend` brings it back."""
        node = self.master
        node.await_replicas()
        node.kill()
        return node

    def freeze_master(self) -> Node:
        """Let the master fall silent, connections kept, and return it."""
        node = self.master
        node.freeze()
        return node

    def failover(self) -> None:
        """Let the sentinels make the replica the master, and wait until they have."""
        before = self.master.port
        wait_for(lambda: self.sentinels[0].ask("SENTINEL", "FAILOVER", self.NAME))
        self.await_other(before)

    def await_other(self, port: int) -> None:
        """Wait until the master is another one than that at *port*."""
        wait_for(lambda: self.master.port != port and self.master.role() == "master", what="no failover")

    def split(self) -> Node:
        """Make the replica the master while the old one does not notice: return it, alive, with all its connections."""
        old = self.freeze_master()
        self.await_other(old.port)
        old.thaw()
        return old

    def mend(self, node: Node) -> None:
        """Bring a server back, or to its senses, and wait until it is the new master's replica."""
        # Sentinels promote a replica that has never been in step as readily as another, and it has nothing yet: on a
        # busy machine half a second of silence was enough for that.
        self._tell_sentinels("down-after-milliseconds", 60_000)
        if not node.running:
            node.start()
        node.thaw()
        node.ask("REPLICAOF", "127.0.0.1", self.master.port)  # sentinels give this order too, up to ten seconds later
        self.settle()
        self._tell_sentinels("down-after-milliseconds", self._down_after_ms)

    def _tell_sentinels(self, name: str, value: int) -> None:
        for sentinel in self.sentinels:
            sentinel.ask("SENTINEL", "SET", self.NAME, name, value)

    def promotions(self) -> int:
        """Return how often the first sentinel saw another server become the master."""
        return (self.sentinels[0].directory / "log").read_text().count("+switch-master")

    def stop(self) -> None:
        """End all."""
        for node in (*self.sentinels, *self.servers):
            if node.running:
                node.thaw()
            node.kill()


class ClusterOfNodes:
    """Three masters, with replicas on request, each a third of the slots: `url` names them all."""

    def __init__(
        self, directory: Path, *, replicas: int = 0, node_timeout_ms: int = 1000, name: str = "valkey"
    ) -> None:
        """Start the nodes, introduce them, and wait until all say that the cluster is well."""
        options = (
            *QUIET, "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf",
            "--cluster-node-timeout", str(node_timeout_ms), "--cluster-replica-validity-factor", "0",
        )  # fmt: skip
        self.nodes = [Node(directory, *options, name=name) for _ in range(3 * (1 + replicas))]
        masters = self.nodes[:3]
        for number, node in enumerate(masters):
            first, last = number * SLOTS // 3, (number + 1) * SLOTS // 3
            node.ask("CLUSTER", "ADDSLOTS", *range(first, last))
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port)
        self.ids = {node.port: self._id(node) for node in self.nodes}
        for number, node in enumerate(self.nodes[3:]):
            master = self.ids[masters[number % 3].port]
            wait_for(partial(node.ask, "CLUSTER", "REPLICATE", master), what="no introduction")
        self.url = f"redis+cluster://{','.join(node.name for node in self.nodes[:3])}"
        self.settle()

    @staticmethod
    def _id(node: Node) -> str:
        return str(node.ask("CLUSTER", "MYID").decode())

    def _state(self, node: Node) -> dict[str, str]:
        return dict(line.split(":", 1) for line in node.ask("CLUSTER", "INFO").decode().split())

    def settle(self) -> None:
        """Wait until every running node calls the cluster well, knows all others, and replicas are in step."""

        def settled() -> bool:
            running = [node for node in self.nodes if node.running]
            for node in running:
                state = self._state(node)
                if state["cluster_state"] != "ok" or int(state["cluster_known_nodes"]) < len(self.nodes):
                    return False
                role = node.ask("ROLE")
                if role[0] == b"slave" and role[3] != b"connected":
                    return False
            return len({str(self._map(node)) for node in running}) == 1

        wait_for(settled, what="the nodes do not agree")

    def _map(self, node: Node) -> list[tuple[int, int, int]]:
        slots = node.ask("CLUSTER", "SLOTS")
        return sorted((first, last, master[1]) for first, last, master, *_ in slots)

    def masters(self) -> list[Node]:
        """Return the running nodes that own slots."""
        ports = {port for node in self.nodes if node.running for _, _, port in self._map(node)}
        return [node for node in self.nodes if node.running and node.port in ports]

    def owner(self, key: str, *, asked: Node | None = None) -> Node:
        """Return the node that owns the slot of *key*."""
        slot = slot_of(key)
        node = asked or next(node for node in self.nodes if node.running)
        port = next(port for first, last, port in self._map(node) if first <= slot <= last)
        return next(node for node in self.nodes if node.port == port)

    def replica_of(self, master: Node) -> Node:
        """Return a running replica of *master*."""
        for node in self.nodes:
            if node.running and node is not master:
                role = node.ask("ROLE")
                if role[0] == b"slave" and int(role[2]) == master.port:
                    return node
        raise AssertionError(f"{master.name} has no replica")

    def migrate_slot(self, key: str, to: Node | None = None, *, batch: int = 20, pause: float = 0.0) -> Node:
        """Move the slot of *key*, and all its keys, in the classic way; return the node that owns it now."""
        slot, source = slot_of(key), self.owner(key)
        target = to or next(node for node in self.masters() if node is not source)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[target.port])
        with source.client(socket_timeout=60) as client:
            while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, batch):
                client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 60_000, "KEYS", *keys)
                time.sleep(pause)
        for node in (target, source, *(n for n in self.masters() if n not in {target, source})):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", self.ids[target.port])
        return target

    def migrate_slot_whole(self, key: str) -> Node:
        """Move the slot of *key* as Valkey 9 can, all keys at one instant; return the node that owns it now."""
        slot, source = slot_of(key), self.owner(key)
        target = next(node for node in self.masters() if node is not source)
        source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self.ids[target.port])
        wait_for(lambda: self.owner(key, asked=target) is target, what="the slot did not move")
        return target

    def await_silence(self, ms: int) -> None:
        """Let the nodes take one for dead that is silent for so long."""
        for node in self.nodes:
            if node.running:
                node.ask("CONFIG", "SET", "cluster-node-timeout", ms)

    def failover(self, key: str) -> Node:
        """Let the replica of the slot's owner take over in good order; return it when it has."""
        replica = self.replica_of(self.owner(key))
        replica.ask("CLUSTER", "FAILOVER")
        wait_for(lambda: self.owner(key, asked=replica) is replica, what="no failover")
        return replica

    def kill_master(self, key: str) -> Node:
        """End the owner of the slot with SIGKILL, wait until a replica has taken over, and return the dead one."""
        node = self.owner(key)
        replica = self.replica_of(node)
        node.await_replicas()
        node.kill()
        self.await_silence(1000)
        wait_for(lambda: self.owner(key, asked=replica) is replica, what="no failover")
        return node

    def mend(self, node: Node) -> None:
        """Bring a dead node back, and wait until it is a replica in step."""
        node.start()
        self.settle()

    def stop(self) -> None:
        """End all."""
        for node in self.nodes:
            node.kill()
