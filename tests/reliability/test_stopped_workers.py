"""Workers that are told to stop: in a rolling deployment, amid a lease's reply, and while Redis is down."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor, current
from conveyor.store import operations
from conveyor.store.transport.async_connection import AsyncConnection
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.worker import Worker
from support.running_worker import audit, counts, drain
from support.worker_processes import wait, worker_processes
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
GRACE = 0.5


@pytest.mark.long
@pytest.mark.row("A10")
@pytest.mark.leaves_keys("what is left is taken away by its fixture")
def test_rolling_restarts_lose_and_charge_nothing(url: str, tmp_path: Path, rounds: Rounds) -> None:
    """Supervisors stopped one after the other under load: each exits 0 beside jobs that do not end, all jobs are done, none is charged."""
    restarts, pushed = rounds(200, 6), 0
    with worker_processes(url, tmp_path, lease="15s") as one:

        def push(*calls: Any) -> range:
            nonlocal pushed
            one.app.enqueue_many(task.s(pushed + at, *seconds) for at, (task, *seconds) in enumerate(calls))
            pushed += len(calls)
            return range(pushed - len(calls), pushed)

        alive = [one.start(concurrency=10, grace=GRACE) for _ in range(2)]
        took: list[float] = []
        for _ in range(restarts):
            push(*[(one.tasks.note, 0.02)] * 98, *[(one.tasks.plain, 0.01)] * 20)
            alive.append(one.start(concurrency=10, grace=GRACE))
            oldest = alive.pop(0)
            [child] = wait(lambda oldest=oldest: set(one.children(oldest)) & one.registered())
            # One that does not end at its first attempt runs there: the stop hands it back, and cannot wait for it.
            holders: set[int] = set()
            while child not in holders:
                [n] = push((one.tasks.first,))
                holders.add(wait(lambda n=n: one.starts().get(n))[0].pid)
            stopped = time.monotonic()
            oldest.send_signal(signal.SIGTERM)
            assert oldest.wait(60) == 0
            took.append(time.monotonic() - stopped)
        one.let_go()
        wait(one.drained)
        print(f"exits took at most {max(took):.2f} s")

        assert one.completions() == pushed
        assert set(one.starts()) == set(range(pushed))
        assert one.repeats() >= restarts
        assert one.counts().dead == 0
        # A process that gets no time at its stop cannot give everything back. It says so, and what it held comes back by its lease.
        if one.log.count("come back when their leases end") == 0:
            assert one.lost() == 0
            assert "is dead; returned" not in one.log
        assert not re.search(r"exited with code|SIGSEGV|is poison", one.log)
        assert one.is_sound()


@pytest.mark.row("A10")
def test_a_signal_to_the_whole_group_is_one_stop(url: str, tmp_path: Path) -> None:
    """A service manager signals the supervisor and its children: that is one stop, and running jobs end by themselves."""
    with worker_processes(url, tmp_path) as one:
        one.app.enqueue_many(one.tasks.note.s(n, 1.5) for n in range(20))
        supervisor = one.start(grace=20)
        wait(lambda: len(one.starts()) == 20)
        [child] = one.children(supervisor)
        os.kill(child, signal.SIGTERM)
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0
        assert (one.completions(), one.repeats(), one.counts().ready) == (20, 0, 0)


@pytest.mark.row("A10")
@pytest.mark.parametrize("when", ["sent", "answered"])
async def test_a_stop_amid_a_claim_loses_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch, rounds: Rounds, when: str
) -> None:
    """A stop between a turn and its reply, or at the reply: the leased jobs go back to the front, in order and uncharged."""
    async with Conveyor(url) as app:
        seen: list[tuple[int, int]] = []

        @app.task(retry=1)
        async def note(n: int) -> None:
            seen.append((n, current().attempt))

        workers: list[Worker] = []
        leased: list[int] = []
        send, answered, absorb = AsyncConnection.send, QueueConsumer._on_reply, QueueConsumer._absorb

        def sent_and_stopped(wire: AsyncConnection, command: Any, answer: Any, **options: Any) -> None:
            send(wire, command, answer, **options)
            if command[:2] == ("EVALSHA", operations.TURN.sha) and not workers[-1]._stop_asked.is_set():
                workers[-1].stop()

        def stopped_and_answered(consumer: QueueConsumer, reply: Any) -> None:
            if not isinstance(reply, Exception):  # a new server does not know the script yet
                workers[-1].stop()
            answered(consumer, reply)

        def counted(consumer: QueueConsumer, turn: Any, report: Any) -> None:
            assert workers[-1]._stop_asked.is_set()
            leased.append(len(turn.ids))
            absorb(consumer, turn, report)

        times = rounds(50, 10)
        for number in range(times):
            await app.aenqueue_many(note.s(10 * number + n) for n in range(10))
            with monkeypatch.context() as patch:
                patch.setattr(QueueConsumer, "_absorb", counted)
                if when == "sent":
                    patch.setattr(AsyncConnection, "send", sent_and_stopped)
                else:
                    patch.setattr(QueueConsumer, "_on_reply", stopped_and_answered)
                workers.append(Worker(app, concurrency=3, grace=5))
                leased.clear()
                assert await asyncio.wait_for(workers[-1].run(), 60) == 0
            assert leased[0] > 0
            found = await counts(app)
            assert (found.leased, found.workers, found.dead) == (0, 0, 0)
        await drain(app, concurrency=1)
        assert [n for n, _ in seen] == list(range(10 * times))
        assert {attempt for _, attempt in seen} == {1}
        assert await audit(app) == []


@pytest.mark.row("A11")
def test_a_stop_while_redis_is_down(start_server: Callable[..., Server], tmp_path: Path, rounds: Rounds) -> None:
    """Stopped while Redis is gone, a worker exits 0 and does not wait for its jobs or for Redis; others have them a lease later."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    for number in range(rounds(20, 2) // 2):
        place = tmp_path / str(number)
        place.mkdir()
        with worker_processes(server.url, place, lease="2s") as one:
            both: list[subprocess.Popen[bytes]] = [one.start(grace=GRACE), one.start(grace=GRACE)]
            one.app.enqueue_many(one.tasks.note.s(n, 600) for n in range(40))
            wait(lambda one=one: len({line.pid for line in one.journal}) == 2)
            server.kill()
            stopped = time.monotonic()
            for supervisor in both:
                supervisor.send_signal(signal.SIGTERM)
            assert [supervisor.wait(60) for supervisor in both] == [0, 0]  # beside jobs that run for longer
            print(f"exits took {time.monotonic() - stopped:.2f} s")
            assert one.log.count("Redis does not answer") >= 2
            server.start()
            heir = one.start(grace=GRACE, concurrency=50)
            (child,) = wait(lambda one=one, heir=heir: one.children(heir))
            wait(lambda one=one, child=child: {line.n for line in one.journal if line.pid == child} == set(range(40)))
            wait(lambda one=one, child=child: one.registered() == {child})
            assert one.repeats() > 0
