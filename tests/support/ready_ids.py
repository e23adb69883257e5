"""Helpers of the tests of the buffer: waiting, and the ids that are ready."""

from __future__ import annotations

import time
from collections.abc import Callable

from testbed.server_process import Server


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def bare(ids: list[str]) -> list[str]:
    return [id_.rpartition(":")[2] for id_ in ids]


def line(server: Server, queue: str = "mail") -> list[str]:
    """Return the ids that are ready, in order; fail when a job has no entry."""
    with server.client() as client:
        ids, jobs = (
            client.pipeline()
            .lrange(f"conveyor:{{{queue}}}:ready:0", 0, -1)
            .hlen(f"conveyor:{{{queue}}}:jobs")
            .execute()
        )
    assert jobs == len(ids)
    return [id_.decode() for id_ in ids]
