"""Helpers of the tests of the buffer: waiting, and the ids that are ready."""

from __future__ import annotations

from testbed.server_process import Server


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
