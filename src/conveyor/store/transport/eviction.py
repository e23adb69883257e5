"""What a server does whose memory is full: refuse what is new, as it must, or throw away what is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from conveyor.errors import ConveyorError
from conveyor.store.transport import replies

SAFE_POLICY = "noeviction"
REMEDY = "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file or parameter group"
UNKNOWN = "the eviction policy is unknown"
CHECK_EVERY = 3600.0
"""Seconds between two looks of a running worker."""
_MAX_IDS = 10


def eviction_risk(policy: str, evicted: int) -> str | None:
    """Return what is wrong with a policy under which *evicted* keys have gone; None for ``noeviction`` and for "" (unknown)."""
    if policy in {"", SAFE_POLICY}:
        return None
    since = f", and {evicted:,} keys were evicted since its start" if evicted else ""
    what = "jobs" if policy.startswith("allkeys") else "results, and the keys that keep a push from being stored twice"
    return f"Redis may delete {what}: maxmemory-policy is {policy}{since}."


async def watch_policy(ask: Callable[[], Awaitable[Sequence[object]]], log: logging.Logger) -> None:
    """
    Look now and every hour, with the INFO of each server that *ask* gets; log a policy that deletes jobs, once until it changes.

    A worker that runs is not stopped for it; the look at its start did not happen if the server was away.
    """
    logged = SAFE_POLICY
    while True:
        try:
            servers = [replies.parse_info(info) for info in await ask()]
        except ConveyorError:  # away, or this user may not ask
            servers = []
        policies = {one.get("maxmemory_policy", ""): int(one.get("evicted_keys", 0)) for one in servers}
        worst = next(
            (policy for policy in policies if policy not in {"", SAFE_POLICY}), SAFE_POLICY if servers else logged
        )
        if worst != logged and (wrong := eviction_risk(worst, policies[worst])) is not None:
            log.error("E10 %s Set: %s", wrong, REMEDY)
        logged = worst
        await asyncio.sleep(CHECK_EVERY)


def log_missing_jobs(log: logging.Logger, queue: str, ids: Sequence[str]) -> None:
    """Log jobs that stood in line and whose record the server no longer has; a turn tells each once."""
    named = ", ".join(ids[:_MAX_IDS])
    log.error(
        "E10 queue %s: the server has lost the records of %d jobs, which will not run: %s. It evicted them, or they were "
        "deleted. See `conveyor doctor`.", queue, len(ids), named,
    )  # fmt: skip
