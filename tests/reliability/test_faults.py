"""Jobs under faults of the server, of the network and of the program itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.store import operations
from support.forked_children import exit_codes, in_child
from support.running_worker import audit, drain, until_counts, working
from support.waiting import auntil
from testbed.server_process import Server


@pytest.mark.row("C1")
async def test_twenty_restarts_under_load_lose_nothing(start_server: Callable[..., Server]) -> None:
    """Twenty kills of the server under load: every job whose enqueue returned runs, without a restart of any program."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    app = Conveyor(server.url)
    ran: dict[int, int] = {}
    accepted: list[int] = []
    stop = threading.Event()

    @app.task
    async def note(n: int) -> None:
        ran[n] = ran.get(n, 0) + 1

    def produce() -> None:
        producer, n = Conveyor(server.url), 0
        task = producer.task(name=note.name)(note.function)
        while not stop.is_set():
            try:
                task.enqueue(n)
            except StoreUnavailable:
                pass  # unknown: it may or may not have been accepted
            else:
                accepted.append(n)
            n += 1
        producer.close()

    thread = threading.Thread(target=produce, daemon=True)
    async with working(app):
        thread.start()
        for _ in range(20):
            goal = len(accepted) + 20
            await auntil(lambda goal=goal: len(accepted) > goal)
            server.kill()
            server.start()
        stop.set()
        await asyncio.to_thread(thread.join, 60)
        assert not thread.is_alive()
        await auntil(lambda: set(accepted) <= set(ran))
        await until_counts(app, lambda now: not now.ready + now.leased)  # what was stored without an answer as well
    assert await audit(app) == []
    await app.aclose()


@pytest.mark.row("C14")
async def test_script_flush_under_load_is_not_noticed(url: str, redis: Any) -> None:
    """A server that forgets all scripts again and again costs neither errors nor jobs."""
    app = Conveyor(url)
    done: set[int] = set()

    @app.task
    async def note(n: int) -> None:
        done.add(n)

    async with working(app):
        for round_ in range(40):
            redis.script_flush()
            await note.aenqueue(2 * round_)
            redis.script_flush()
            await app.aenqueue_many([note.s(2 * round_ + 1)])
        await auntil(lambda: len(done) == 80)
    assert await audit(app) == []
    await app.aclose()


@pytest.mark.row("A13")
async def test_a_cancelled_enqueue_disturbs_nobody(url: str) -> None:
    """Cancelling some of many concurrent enqueues leaves the answers of all others right."""
    app = Conveyor(url)
    ran: set[int] = set()

    @app.task
    async def note(n: int) -> int:
        ran.add(n)
        return n

    tasks = [asyncio.create_task(note.aenqueue(n)) for n in range(200)]
    for step in range(4):
        await asyncio.sleep(0)
        for task in tasks[step::8]:
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    accepted = {n: job for n, job in enumerate(results) if not isinstance(job, BaseException)}
    await drain(app)

    assert len(accepted) >= 100
    assert set(accepted) <= ran
    for n, job in accepted.items():
        assert await job.aresult(timeout=60) == n
    await app.aclose()


@pytest.mark.row("A12")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_uses_no_connection_of_its_parent(url: str) -> None:
    """Parent and forked child both go on enqueueing, and no reply crosses over."""
    app = Conveyor(url)

    @app.task
    async def note(n: int) -> None: ...

    note.enqueue(0)

    def missing(child: int) -> int:
        return 50 - len({note.enqueue(100 * child + n).id for n in range(50)})

    children = [in_child(partial(missing, child)) for child in range(3)]
    for n in range(50):
        note.enqueue(1000 + n)
    assert exit_codes(children) == [0, 0, 0]

    assert app.client.run(operations.purge(app.client.keys("default"), "ready", 1000)) == (201, 201)
    app.close()


@pytest.mark.row("C1")
async def test_a_server_that_is_absent_at_first_is_waited_for(start_server: Callable[..., Server]) -> None:
    """A worker started before its server begins when the server comes, and a producer is told clearly meanwhile."""
    server = start_server()
    server.kill()
    app = Conveyor(server.url)
    app.client.retry_for = 0.2

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    with pytest.raises(StoreUnavailable, match="Cannot reach Redis at unix://"):
        await add.aenqueue(1, 2)
    from conveyor.worker.worker import Worker

    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    server.start()
    await asyncio.wait_for(worker.ready.wait(), 60)
    app.client.retry_for = 5.0
    job = await add.aenqueue(1, 2)
    assert await job.aresult(timeout=60) == 3
    worker.stop()
    await asyncio.wait_for(running, 60)
    await app.aclose()


FROZEN = """
import asyncio, os, sys
from conveyor import Conveyor, current
app = Conveyor(os.environ["CONVEYOR_URL"], lease=sys.argv[2])

@app.task(name="hold", retry=1)
async def hold() -> str:
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()} {current().attempt}\\n")
    while not os.path.exists(sys.argv[1] + ".go"):
        await asyncio.sleep(0.02)
    return str(os.getpid())

async def main() -> None:
    async with app.worker():
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.row("A3")
@pytest.mark.leaves_keys("the worker of the frozen process is ended by force")
async def test_a_frozen_worker_is_fenced(url: str, tmp_path: Path) -> None:
    """A worker frozen beyond its lease finds its job taken over; its late report changes nothing."""
    log = tmp_path / "runs"
    log.touch()
    (tmp_path / "frozen.py").write_text(FROZEN)
    environment = {**os.environ, "CONVEYOR_URL": url}

    def start(lease: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(tmp_path / "frozen.py"), str(log), lease], env=environment)

    app = Conveyor(url)
    first = start("1s")
    job = app.task(name="hold")(_hold)
    handle = await job.aenqueue()
    second: subprocess.Popen[bytes] | None = None
    try:
        await auntil(lambda: len(log.read_text().splitlines()) == 1)
        os.kill(first.pid, signal.SIGSTOP)
        second = start("6s")  # a busy machine can keep this one
        await auntil(lambda: len(log.read_text().splitlines()) == 2)
        os.kill(first.pid, signal.SIGCONT)
        (tmp_path / "runs.go").touch()
        assert await handle.aresult(timeout=60) == str(second.pid)
        until_still = time.monotonic() + 1  # the first one has had its say by then
        await auntil(lambda: time.monotonic() > until_still)
        assert await handle.aresult(timeout=60) == str(second.pid)
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()
    runs = [line.split() for line in log.read_text().splitlines()]
    assert [attempt for _, attempt in runs] == ["1", "2"]
    assert await audit(app) == []
    await app.aclose()


async def _hold() -> str:
    return ""


async def test_an_outage_is_told_once(start_server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    """A worker says that Redis is away when that lasts, and when it is back; a short outage is not worth a word."""
    caplog.set_level("INFO")
    server = start_server()
    async with Conveyor(server.url) as app:
        app.task(name="hold")(_hold)

        def told(words: str) -> int:
            return sum(words in record.getMessage() for record in caplog.records)

        async with working(app) as worker:
            await asyncio.to_thread(server.kill)
            await auntil(lambda: told("Redis is away"))
            await asyncio.to_thread(server.start)
            await auntil(lambda: told("Redis is back after"))
            await auntil(lambda: worker.consumers[0].has_capacity)
            wire = worker.consumers[0].connection
            wire.drop(ConnectionError("cut"))
            await auntil(lambda: wire.is_open)
        assert (told("Redis is away"), told("Redis is back after")) == (1, 1)


async def test_bad_arguments_store_nothing(url: str, redis: Any) -> None:
    """A refused enqueue leaves no trace in Redis."""
    app = Conveyor(url)

    @app.task
    async def typed(n: int, text: str = "") -> None: ...

    await typed.aenqueue(1)
    await drain(app)
    before = sorted(redis.scan_iter())
    for arguments in ((), ("x",), (1, 2), (object(),), (1, "x" * 600_000), (float("nan"),)):
        with pytest.raises(ConveyorError):
            await typed.aenqueue(*arguments)  # type: ignore[arg-type,call-arg]
    assert sorted(redis.scan_iter()) == before
    await app.aclose()
