"""The Redis of a run, and what can be done to it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from testbed.server_process import Server, find_binary, kind_of

HOME = Path(__file__).parent.parent

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
"""Where libfaketime is, None where it is not installed: then nobody steps clocks."""
_WRAPPER = """#!/bin/sh
export LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={file} FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1
exec {binary} "$@"
"""


def _starts(wrapper: Path) -> bool:
    """Tell whether a server starts with libfaketime: one with an allocator of the system may hang at once."""
    try:
        done = subprocess.run([wrapper, "--version"], capture_output=True, timeout=5, check=False)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


class RecordingServer:
    """One server with an append-only file that is never rewritten: the history of the run."""

    def __init__(
        self, directory: Path, *, fsync: str = "always", clock: bool = False, name: str = "valkey",
        users: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        """
        Start it in *directory*, whose path must be short; with *clock* its clock can be set where libfaketime is.

        *users*: the words of an ACL line for each user besides the default one, which may do everything.
        """
        found = find_binary(name)
        if found is None:
            raise RuntimeError(f"no binary of {name}")
        # Redis 6.2 allows DEBUG without being asked, and knows no such setting.
        debug = () if kind_of(found) == "redis6" else ("--enable-debug-command", "local")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._clock: Path | None = None
        if clock and FAKETIME is not None:
            file, wrapper = directory / "clock", directory / "server"
            file.write_text("+0\n")
            wrapper.write_text(_WRAPPER.format(library=FAKETIME, file=file, binary=found))
            wrapper.chmod(0o700)
            if _starts(wrapper):
                self._clock, found = file, wrapper
        self.server = Server(
            found, directory, "--appendonly", "yes", "--appendfsync", fsync, "--auto-aof-rewrite-percentage", "0",
            *debug, *(word for user in users for word in ("--user", *user)),
        )  # fmt: skip
        self.url = self.server.url
        self.socket = self.server.socket
        self._lock = threading.RLock()
        self.frozen = False

    def client(self, **options: Any) -> Any:
        """Return a redis-py client that repeats nothing."""
        return self.server.client(**{"retry": Retry(NoBackoff(), 0), "socket_timeout": 5, **options})

    def stop(self) -> None:
        """End the server."""
        with self._lock:
            self.thaw()
            self.server.kill()

    def restart(self, pause: float = 0.0) -> float:
        """Kill the server with SIGKILL, wait, and start it again; return the seconds until it answered."""
        with self._lock:
            self.thaw()
            began = time.monotonic()
            self.server.kill()
            time.sleep(pause)
            self.server.start()
            return time.monotonic() - began

    def freeze(self) -> None:
        """Stop the process; it holds its connections and answers nothing."""
        os.kill(self.server.pid, signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        if self.frozen:
            with suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGCONT)
        self.frozen = False

    @property
    def has_clock(self) -> bool:
        """Whether its clock can be set."""
        return self._clock is not None

    def set_clock(self, offset: float) -> None:
        """Set the server's clock this many seconds from the machine's."""
        assert self._clock is not None
        self._clock.write_text(f"{offset:+g}\n")

    def command(self, *parts: Any) -> Any:
        """Carry out one command; None when the server does not answer."""
        try:
            with self.client() as client:
                return client.execute_command(*parts)
        except redis_py.RedisError:
            return None

    def squeeze(self, share: float = 1.0) -> None:
        """Set maxmemory to what is used now times *share*; 0 lifts it."""
        used = 0
        if share:
            with self.client() as client:
                used = int(client.info("memory")["used_memory"] * share)
        self.command("CONFIG", "SET", "maxmemory", str(used))
