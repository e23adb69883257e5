"""The calls that the supervisor's lease guard makes to Redis."""

from __future__ import annotations

import time
from typing import Any

import redis as redis_py

from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.worker.shared_memory import ChildInfo, ChildSpec, SharedMemory
from conveyor.worker.supervision.lease_guard import LeaseGuard
from support.supervisor_process import KEYS, until


def test_healthy_worker_costs_no_beats(url: str, redis: redis_py.Redis) -> None:
    """The lease guard sends nothing for a worker that renews by itself, and renews for one that does not."""
    board = SharedMemory(1)
    slot = board.slot(0)
    slot.prepare(ChildSpec("app", {}, 1, 1, burst=False, grace=1))
    slot.set_info(ChildInfo(url, "test"))
    slot.set_identity(KEYS, "w1", 500)
    backend = Client(url, namespace="test")
    backend.run(operations.register(KEYS, "w1", 500, b"{}"))

    def calls() -> int:
        stats: Any = redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

    guard = LeaseGuard()
    guard.watch(slot)
    start, end = calls(), time.monotonic() + 0.8
    while time.monotonic() < end:
        slot.note_renewal("w1")
        time.sleep(0.02)
    assert calls() == start

    until(lambda: calls() >= start + 4)
    assert float(redis.zscore(KEYS.workers, "w1") or 0) > time.time() * 1000
    guard.forget(slot)
    assert guard.close(1)
    backend.run(operations.reap(KEYS, "w1"))
    backend.close()
    board.close()
