"""A primary with a replica, a TCP switch in front of them, and the means to break both."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from testbed.server_groups import free_port
from testbed.server_process import Server


class ReplicaPair:
    """A primary and one replica that follows it through a `link` that can be held; `promote` makes it the primary."""

    def __init__(self, start: Callable[..., Server], name: str = "valkey", *options: str) -> None:
        """Start both and wait until the replica counts."""
        # The last option counts: the helper's own says port 0, and replication needs one.
        self.port = free_port()
        common = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", *options)
        self.primary = start("--port", str(self.port), *common, name=name)
        self.replica = start("--port", str(free_port()), *common, name=name)
        self.link = Switch(("127.0.0.1", self.port))
        self.follow()

    def follow(self) -> None:
        """Make the replica follow the primary; right after the sync WAIT counts none, so wait until it counts."""
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self.link.port))
        deadline = time.monotonic() + 20
        with self.primary.client() as client:
            while client.info("replication").get("slave0", {}).get("state") != "online":
                assert time.monotonic() < deadline, "the replica did not come online"
                time.sleep(0.005)
            client.set("followed", 1, ex=60)
            assert client.execute_command("WAIT", 1, 10_000) == 1

    def promote(self) -> None:
        """Make the replica a primary."""
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")

    def close(self) -> None:
        """End both."""
        self.link.close()
        self.primary.kill()
        self.replica.kill()


Target = str | tuple[str, int]


class Switch:
    """A TCP door with a fixed address: connections made through it go to the Unix socket or port it points at."""

    def __init__(self, target: Target) -> None:
        """Open the door."""
        self.target = target
        self.held = False
        self._lines: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        threading.Thread(target=self._serve, daemon=True).start()

    def turn(self, target: Target) -> None:
        """Point at another server and cut who is connected."""
        self.target = target
        self.cut()

    def hold(self) -> None:
        """Swallow from now on what the target says, as a broken network does."""
        self.held = True

    def cut(self) -> None:
        """Cut all connections."""
        lines, self._lines = self._lines, []
        for end in lines:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the door."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._door.accept()
                there = socket.socket(socket.AF_UNIX if isinstance(self.target, str) else socket.AF_INET)
                try:
                    there.connect(self.target)
                except OSError:
                    here.close()
                    there.close()
                    continue
                self._lines += (here, there)
                for source, sink, held in ((here, there, False), (there, here, True)):
                    threading.Thread(target=self._carry, args=(source, sink, held), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, holds: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not (holds and self.held):
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()  # the other thread closes the other end


def stored(server: Server, queue: str = "mail") -> set[str]:
    """Return the bare ids of the jobs that a server holds."""
    with server.client() as client:
        return {id_.decode() for id_ in client.hkeys(f"conveyor:{{{queue}}}:jobs")}


def bare(ids: list[str]) -> set[str]:
    """Return public ids without their place."""
    return {id_.rpartition(":")[2] for id_ in ids}
