"""
Removal of everything that a demo leaves, also after a SIGKILL.

A script that needs only the standard library. The demo and the supervisor hold the other end of the pipe that is its
standard input. When both are gone, it waits for the worker processes, which may outlive a killed supervisor for a
while, and for the embedded server to stop. Then it deletes the directory and, on a server given by --url, the keys of
the demo.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from typing import BinaryIO, TypedDict

SERVER, JOURNAL = "server", "journal"
_PATIENCE_SECONDS = 40.0  # for workers of a killed supervisor to drain, and for the server to stop


class CleanupRequest(TypedDict):
    """The things to remove: *directory*, and the keys of *namespace* at *url* (None: no keys)."""

    directory: str
    url: str | None
    namespace: str


def main(text: str) -> None:
    """Wait for all processes of the demo to end, then remove what they left."""
    request: CleanupRequest = json.loads(text)
    while os.read(0, 1024):
        pass
    with open(os.path.join(request["directory"], JOURNAL), "rb") as journal:
        try:
            # The lock is held to the end: a worker that starts late fails on it, before it starts a server again.
            _wait_for(journal)
            if request["url"] is None:
                with contextlib.suppress(FileNotFoundError), open(_keeper_lock(request), "rb") as keeper:
                    _wait_for(keeper)
            else:
                _delete_keys(request["url"], request["namespace"])
        finally:
            shutil.rmtree(request["directory"], ignore_errors=True)


def _keeper_lock(request: CleanupRequest) -> str:
    return os.path.join(request["directory"], SERVER, "keeper.lock")


def _wait_for(file: BinaryIO) -> None:
    """
    Wait for the lock of *file*, at most `_PATIENCE_SECONDS`.

    Workers hold the lock of the journal, the keeper that of its own file until its server has stopped.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)


def _delete_keys(url: str, namespace: str) -> None:
    from redis import Redis, RedisError

    with contextlib.suppress(RedisError), Redis.from_url(url, socket_timeout=10) as client:
        for pattern in (f"{namespace}:*", f"{namespace}-*"):
            keys = list(client.scan_iter(pattern, count=1000))
            for first in range(0, len(keys), 500):
                client.unlink(*keys[first : first + 500])


if __name__ == "__main__":
    main(sys.argv[1])
