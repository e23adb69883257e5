"""Commands to a worker: what people see of it, and what they may tell it to do."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from redis import Redis

from conveyor.admin.admin import Admin
from conveyor.errors import WorkerNotFound
from conveyor.jobs.app import Conveyor
from conveyor.store import operations
from conveyor.worker.leasing import wakeup
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import counts, drain, working
from support.shell import Shell
from support.time_limits import LATER
from support.waiting import auntil
from support.worker_processes import wait, worker_processes


async def test_a_worker_is_seen_and_told_what_to_do(app: Conveyor) -> None:
    """Its job and its stacks are seen from outside; quiet, it takes nothing more; stopped, it drains and ends."""
    begun, go = asyncio.Event(), asyncio.Event()

    @app.task(name="wait-for-go")
    async def wait_for_go() -> None:
        begun.set()
        await go.wait()

    job = await wait_for_go.aenqueue()
    admin = Admin(app.client)
    async with working(app, grace=1.0) as worker:
        await asyncio.wait_for(begun.wait(), 60)
        (seen,) = await admin.aworker_processes(jobs=5)
        assert (seen.name, seen.kind, seen.state, seen.queues) == (worker.name, "worker", "running", ["default"])
        assert (seen.held, seen.concurrency, seen.pid, seen.silent) == (1, 100, os.getpid(), False)
        assert [(one.id, one.task) for one in seen.jobs] == [(job.id, "wait-for-go")]
        assert seen.version

        stack = await admin.aworker_stack(worker.name)
        assert f"Task wait-for-go {job.id}:" in stack
        assert "await go.wait()" in stack
        assert stack.index("Task wait-for-go") == stack.index("Task ")  # before the tasks of the worker itself
        assert "Thread MainThread:" in stack

        await admin.aquiet_worker(worker.name)
        later = await wait_for_go.aenqueue()
        await app.client.arun(operations.wake(app.client.keys("default").wake_of(worker.consumers[0].identity)))
        await until_state(admin, worker.name, "quiet")
        assert await later.astatus() == "ready"

        await admin.astop_worker(worker.name)
        await until_state(admin, worker.name, "stopping")
        go.set()
        await auntil(lambda: worker.lifecycle.stopped)

    assert (await counts(app)).ready == 1
    with pytest.raises(WorkerNotFound):
        await admin.astop_worker(worker.name)
    await drain(app)


async def until_state(admin: Admin, name: str, state: str) -> None:
    """Wait until the worker is shown in that state."""

    async def reached() -> bool:
        return (await admin.aworker_process(name)).state == state

    await auntil(reached)


async def test_what_is_no_command_does_nothing(app: Conveyor) -> None:
    """An unknown word, and an answer to a key of anything else, are tokens and no more: no code, no other key."""

    @app.task
    async def five() -> int:
        return 5

    keys = app.client.keys("default")
    async with working(app) as worker:
        own = keys.wake_of(worker.consumers[0].identity)
        for text in ('{"do":"exec","answer":"x"}', json.dumps({"do": "stack", "answer": keys.jobs}), "{", "{}"):
            await app.client.aexecute("RPUSH", own, text, key=own)

        async def taken() -> bool:
            return not await app.client.aexecute("LLEN", own, key=own)

        await auntil(taken)
        assert await (await five.aenqueue()).aresult(timeout="60s") == 5
        assert worker.lifecycle.stopping is False


@pytest.mark.row("A45")
@pytest.mark.usefixtures("only_when_woken")
async def test_a_worker_that_registered_anew_is_heard(
    app: Conveyor, redis: Redis[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that blocks as a worker registers anew does not go on with the list of its former identity alone."""
    monkeypatch.setattr(wakeup, "BLOCK", LATER)
    begun, go = asyncio.Event(), asyncio.Event()

    @app.task
    async def wait_for_go() -> None:
        begun.set()
        await go.wait()

    keys = app.client.keys("default")
    async with working(app, concurrency=1) as worker:
        [consumer] = worker.consumers
        await wait_for_go.aenqueue()
        await asyncio.wait_for(begun.wait(), 60)
        former = consumer.identity
        listener = worker.connections.of(keys).listeners[0]
        await auntil(lambda: listener._listening and consumer.wake_list not in listener._listening)
        redis.flushdb()
        go.set()
        await auntil(lambda: consumer.identity != former and not consumer.busy)
        await Admin(app.client).astop_worker(worker.name)
        await auntil(lambda: worker.lifecycle.stopping)


def test_a_stopped_process_is_not_started_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line lists processes with their build, and stops those of a supervisor by its pid; that one ends with 0."""
    monkeypatch.setenv("CONVEYOR_BUILD", "r7")
    with worker_processes(url, tmp_path) as processes:
        supervisor = processes.start()
        wait(processes.registered)
        shell = Shell(tmp_path, url)
        (child,) = processes.registered()
        listed = json.loads(shell.run("workers", "list", "--json").stdout)["workers"]
        assert [(one["pid"], one["supervisor"]) for one in listed] == [(child, supervisor.pid)]
        assert shell.run("workers", "list").stdout.rstrip("\n").split("\t")[8:10] == ["r7", ""]
        host = listed[0]["host"]
        done = shell.run("workers", "stop", f"{host}:{supervisor.pid}", "--yes")
        assert done.stdout.split() == [f"{host}:{child}", "stopping"], done.stderr
        assert supervisor.wait(60) == 0
        assert processes.registered() == set()
