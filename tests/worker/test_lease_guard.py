"""The calls that the supervisor's lease guard makes to Redis."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis as redis_py

from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.worker.shared_memory import ChildInfo, ChildSpec, LeaseIdentity, SharedMemory
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard
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


def test_an_unexpected_error_is_repeated_after_growing_pauses(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that fails unexpectedly, with jobs to return, logs once a pause, and each pause is longer than the last."""

    def fail(_: LeaseGuard) -> tuple[list[Any], float]:
        tries.append(time.monotonic())
        raise ValueError("a slot that cannot be read")

    tries: list[float] = []
    monkeypatch.setattr(LeaseGuard, "_find_stale", fail)
    guard = LeaseGuard()
    identity = LeaseIdentity("test", "mail", None, "w1", 500, current=True, renewed=0.0)
    guard.return_jobs(DeadChild("died", ChildInfo("unix:///nowhere", "test"), [identity], crashed=False))
    until(lambda: len(tries) == 3)
    assert not guard.close(0)

    assert tries[1] - tries[0] >= 0.5
    assert tries[2] - tries[1] >= 1.0
    assert sum("failed unexpectedly" in line for line in caplog.messages) == len(tries)
