"""A primary with replicas, a switch in front of them, and what a test needs to break both."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from server import Server

PORTS = "--port"


def free_port() -> int:
    """Return a port of this machine nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Pair:
    """A primary and one replica that follows it; `promote` makes the replica the primary."""

    def __init__(self, start: Callable[..., Server], name: str = "valkey", *options: str) -> None:
        """Start both and wait until the replica is online."""
        self.ports = free_port(), free_port()
        # The last option counts: the helper's own says port 0, and replication needs one.
        common = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", *options)
        self.primary = start("--port", str(self.ports[0]), *common, name=name)
        self.replica = start("--port", str(self.ports[1]), *common, name=name)
        self.follow()

    def follow(self) -> None:
        """Make the replica follow the primary; right after the sync WAIT counts none, so wait until it counts."""
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(self.ports[0]))
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


class Switch:
    """A TCP door with a fixed address: connections made through it go to whichever Unix socket it points at."""

    def __init__(self, target: Server) -> None:
        """Open the door."""
        self.target = target
        self.lines: list[tuple[socket.socket, socket.socket]] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._door.getsockname()[1]}/0"
        threading.Thread(target=self._serve, daemon=True).start()

    def turn(self, target: Server) -> None:
        """Point at another server and cut who is connected."""
        self.target = target
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        lines, self.lines = self.lines, []
        for line in lines:
            for end in line:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the door."""
        self._door.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._door.accept()
                there = socket.socket(socket.AF_UNIX)
                try:
                    there.connect(str(self.target.socket))
                except OSError:
                    here.close()
                    continue
                self.lines.append((here, there))
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def switch(target: Server) -> Iterator[Switch]:
    """A switch for the length of a block."""
    found = Switch(target)
    try:
        yield found
    finally:
        found.close()
