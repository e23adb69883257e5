"""The calls that the supervisor's lease guard makes to Redis."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import redis as redis_py

from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.worker import shared_memory
from conveyor.worker.shared_memory import ChildInfo, ChildSpec, LeaseIdentity, SharedMemory
from conveyor.worker.supervision import lease_guard
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard
from support.supervisor_process import KEYS
from support.waiting import until


def test_healthy_worker_costs_no_beats(url: str, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease guard sends nothing for a worker that renews by itself, and renews for one that does not."""
    now, looks = (
        [time.monotonic()],
        itertools.count(),
    )  # a clock of its own: a busy machine keeps the worker from nothing
    monkeypatch.setattr(lease_guard, "monotonic", lambda: now[0])
    monkeypatch.setattr(shared_memory, "monotonic_ns", lambda: int(now[0] * 1e9))
    find_stale, looked = LeaseGuard._find_stale, [0]

    def look(guard: LeaseGuard) -> Any:
        found = find_stale(guard)
        looked[0] = next(looks)
        return found

    monkeypatch.setattr(LeaseGuard, "_find_stale", look)
    board = SharedMemory(1)
    slot = board.slot(0)
    slot.prepare(ChildSpec("app", {}, 1, 1, burst=False, grace=1))
    slot.set_info(ChildInfo(url, "test"))
    slot.set_identity(KEYS, "w1", 500)
    backend = Client(url, namespace="test")
    backend.run(operations.register(KEYS, "w1", 500, b"{}"))

    def calls() -> int:
        stats: Any = redis.info("commandstats")
        return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])

    def pass_time() -> None:
        """Let a third of a lease pass, and the guard look."""
        now[0] += 0.16
        seen = looked[0]
        until(lambda: looked[0] > seen + 1)

    guard = LeaseGuard()
    guard.watch(slot)
    start, ends = calls(), float(redis.zscore(KEYS.workers, "w1") or 0)
    for _ in range(8):
        slot.note_renewal("w1")
        pass_time()
    assert calls() == start

    for _ in range(8):
        pass_time()
    until(lambda: calls() == start + 4)
    assert float(redis.zscore(KEYS.workers, "w1") or 0) > ends
    guard.forget(slot)
    assert guard.close(1)
    backend.run(operations.reap(KEYS, "w1"))
    backend.close()
    board.close()


@pytest.mark.row("C35")
def test_a_queue_that_is_refused_holds_up_no_other(url: str, redis: redis_py.Redis) -> None:
    """Leases of a queue are renewed, and jobs of its dead worker returned, while those of another queue are refused."""
    refused, backend = QueueKeys("test", "refused"), Client(url, namespace="test")
    board = SharedMemory(1)
    slot = board.slot(0)
    slot.prepare(ChildSpec("app", {}, 1, 1, burst=False, grace=1))
    slot.set_info(ChildInfo(url, "test"))
    redis.set(refused.workers, "of another program")
    for keys, worker in ((refused, "w0"), (KEYS, "w1")):
        slot.set_identity(keys, worker, 500)
    backend.run(operations.register(KEYS, "w1", 500, b"{}"))
    backend.run(operations.register(KEYS, "w2", 500, b"{}"))
    ends = float(redis.zscore(KEYS.workers, "w1") or 0)
    dead = DeadChild(
        "died", ChildInfo(url, "test"),
        [
            LeaseIdentity("test", keys.queue, None, worker, 500, current=True, renewed=0.0)
            for keys, worker in ((refused, "w0"), (KEYS, "w2"))
        ],
        crashed=False,
    )  # fmt: skip
    guard = LeaseGuard()
    guard.watch(slot)
    until(lambda: float(redis.zscore(KEYS.workers, "w1") or 0) > ends + 2000, 30)
    guard.return_jobs(dead)
    until(lambda: redis.zscore(KEYS.workers, "w2") is None, 30)
    guard.forget(slot)
    assert not guard.close(0)
    redis.delete(refused.workers)
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
