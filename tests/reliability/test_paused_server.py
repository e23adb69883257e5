"""The server stands still for a while: row C10 of docs/reliability.md."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from time import monotonic

import pytest

from conveyor.events import JobLost
from conveyor.jobs.app import Conveyor
from support.running_worker import audit, working
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
LEASE = 0.8


@pytest.mark.row("C10")
@pytest.mark.parametrize("leases", [0.5, 3.0])
async def test_a_frozen_server_makes_no_duplicate(
    start_server: Callable[..., Server], rounds: Rounds, leases: float
) -> None:
    """A server that stood still for half a lease, or for three, finds all living workers alive: no running job runs twice."""
    server = start_server()
    app, ran, lost, go = Conveyor(server.url, lease=LEASE), Counter[int](), list[JobLost](), asyncio.Event()
    app.on(JobLost)(lost.append)

    @app.task
    async def hold(n: int) -> None:
        ran[n] += 1
        await go.wait()

    jobs = 0
    async with working(app, concurrency=50), working(app, concurrency=50):  # each watches the other
        for _ in range(rounds(10, 1)):
            go.clear()
            await app.aenqueue_many([hold.s(n) for n in range(jobs, jobs + 100)])
            jobs += 100
            await auntil(lambda: len(ran) == jobs)  # noqa: B023
            os.kill(server.pid, signal.SIGSTOP)
            await _pass(leases * LEASE)
            os.kill(server.pid, signal.SIGCONT)
            await _pass(1.5 * LEASE)  # some looks for the dead
            go.set()
            with server.client() as client:
                await auntil(lambda: client.hlen(app.client.keys("default").jobs) == 0)
    assert ran == Counter(range(jobs))
    assert lost == []
    assert await audit(app) == []
    await app.aclose()


async def _pass(seconds: float) -> None:
    end = monotonic() + seconds
    await auntil(lambda: monotonic() > end, seconds + 5)
