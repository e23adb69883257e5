"""Tasks of run_in="process" with two time limits, and with a process for each job."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conveyor import ConfigurationError, Conveyor, JobFailed
from conveyor.jobs.task import definition_of
from conveyor.worker.execution import process_main
from conveyor.worker.execution.process_protocol import (
    HEAD,
    EmitRequest,
    LiveReply,
    Reply,
    RunRequest,
    pack,
    read_reply,
)
from support import dependency_app
from support.dependency_app import aslow, follows, lasting, leaves_a_thread, pid, slow, stuck, waits
from support.manual_worker import drain as remove_jobs
from support.running_worker import working


@pytest.fixture
async def app(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Conveyor]:
    monkeypatch.setenv("DEPENDENCY_LOG", str(tmp_path / "log"))
    app = Conveyor(url)
    limits = {"slow": ("0.2s", "60s"), "aslow": ("0.2s", "60s"), "stuck": ("0.1s", "0.6s"), "pid": (None, None)}
    for task in (slow, aslow, stuck, pid):
        soft, hard = limits[task.name.rpartition(".")[2]]
        app.task(name=task.name, run_in="process", retry=1, timeout=soft, timeout_hard=hard, fresh=task is pid)(
            task.function
        )
    yield app
    await app.aclose()
    await asyncio.to_thread(remove_jobs, app)


@pytest.mark.row("A191")
async def test_the_limit_raises_inside_and_the_hard_one_kills(app: Conveyor, tmp_path: Path) -> None:
    """At its timeout a job in a process sees a TimeoutError and cleans up; one that goes on is killed at timeout_hard."""
    jobs = {task.name: await app.aenqueue(task.name) for task in (slow, aslow, stuck)}
    texts = {}
    async with working(app, reference="support.dependency_app:app"):
        for name, job in jobs.items():
            with pytest.raises(JobFailed) as failed:
                await job.aresult(60)
            assert failed.value.type.endswith("TimeoutError")
            texts[name.rpartition(".")[2]] = failed.value.message.removeprefix(
                "the attempt ran longer than its time limit of "
            )
    assert texts == {"slow": "0.2 s", "aslow": "0.3 s", "stuck": "0.6 s"}
    assert (tmp_path / "log").read_text().count("roll back TimeoutError") == 1
    assert (tmp_path / "log").read_text().count("roll back CancelledError") == 1


@pytest.mark.row("A191")
async def test_the_limit_ends_a_wait_for_a_dependency(app: Conveyor, tmp_path: Path) -> None:
    """A dependency that a `def` waits for on the event loop is cancelled at the timeout, before others clean up and the next job."""
    app.task(name=waits.name, run_in="process", retry=1, timeout="0.2s", timeout_hard="20s")(waits.function)
    async with working(app, reference="support.dependency_app:app"):
        with pytest.raises(JobFailed, match=r"its time limit of 0\.2 s"):
            await (await app.aenqueue(waits.name)).aresult(60)
    lines = [line.rpartition(" ")[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert [line for line in lines if "engine" not in line] == [
        "open session",
        "given up CancelledError",
        "roll back TimeoutError",
    ]


@pytest.mark.row("A191")
async def test_a_limit_is_that_of_one_job(app: Conveyor) -> None:
    """A thread that a job has left extends no other job's limit, an alarm of somebody else's ends none, and none outlasts its job."""
    for task in (leaves_a_thread, follows):
        app.task(name=task.name, run_in="process", retry=1, timeout="60s", timeout_hard="120s")(task.function)
    app.batch_task(name=lasting.name, run_in="process", retry=1, size=1, within="10ms")(lasting.function)
    async with working(app, reference="support.dependency_app:app"):
        first, second = [await (await app.aenqueue(task.name)).aresult(60) for task in (leaves_a_thread, follows)]
        with pytest.raises(JobFailed, match="TimeoutError"):
            await (await app.aenqueue(aslow.name)).aresult(60)
        third = await (await app.aenqueue(lasting.name, 1)).aresult(60)
    assert first == second == third


async def test_fresh_starts_a_process_for_each_job(app: Conveyor) -> None:
    """With fresh=True no two jobs share a process."""
    jobs = [await app.aenqueue(pid.name) for _ in range(3)]
    async with working(app, reference="support.dependency_app:app"):
        pids = [await job.aresult(60) for job in jobs]
    assert len(set(pids)) == 3


async def test_a_limit_counts_from_the_start_of_the_function(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that a process takes to load the app is none of its job's: a limit that is shorter is kept all the same."""
    monkeypatch.setenv("DEPENDENCY_IMPORT_SECONDS", "4")
    app.task(name=pid.name, run_in="process", retry=1, timeout="3s")(pid.function)
    job = await app.aenqueue(pid.name)
    async with working(app, reference="support.dependency_app:app"):
        assert await job.aresult(60)


def test_only_a_process_can_be_killed(app: Conveyor) -> None:
    """A hard limit, or a fresh process, means run_in="process"; it is refused with another, and if it is not the longer limit."""
    for options, why in (({"timeout_hard": "1m"}, "can kill"), ({"fresh": True}, "shares the process")):
        with pytest.raises(ConfigurationError, match=f"run_in='process'.*{why}"):
            app.task(name="x", run_in="thread", **options)(dependency_app.note)
        assert definition_of(app.task(name=why.replace(" ", "-"), **options)(dependency_app.note)).run_in == "process"
    with pytest.raises(ConfigurationError, match="longer than timeout"):
        app.task(run_in="process", timeout="1m", timeout_hard="1m")


@pytest.mark.row("A191")
def test_a_limit_cuts_no_message() -> None:
    """A limit that passes while a job says something to a slow worker raises behind it: what follows can still be read."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = process_main._ParentConnection(theirs.detach())
    loop = asyncio.new_event_loop()
    limit = process_main._TimeLimit(connection, loop, 100, by_signal=True)
    message = EmitRequest(b"x" * 1_000_000, "default:a", 1)
    got = bytearray()
    ticks: list[BaseException] = []
    postpone = connection.postpone

    def noting(error: BaseException) -> bool:
        ticks.append(error)
        return postpone(error)

    connection.postpone = noting  # type: ignore[method-assign]

    def read() -> None:
        while not ticks:
            time.sleep(0.01)
        while len(got) < len(pack(message)):
            got.extend(ours.recv(65536))

    reader = threading.Thread(target=read)
    reader.start()
    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(TimeoutError, match=r"its time limit of 0\.1 s"), limit:
            connection.send(message)
    finally:
        signal.signal(signal.SIGALRM, before)
    reader.join(60)
    connection.forked()
    ours.close()
    loop.close()
    assert bytes(got) == pack(message)


@pytest.mark.row("A191")
def test_a_limit_loses_no_note() -> None:
    """A note is sent to the worker even if the limit of its job passes as that begins: the next attempt finds it."""
    ours, theirs = socket.socketpair()
    connection = process_main._ParentConnection(theirs.detach())
    loop = asyncio.new_event_loop()
    limit = process_main._TimeLimit(connection, loop, 100, by_signal=True)
    send = connection.send

    def late(message: Reply) -> None:
        time.sleep(0.3)  # the signal comes, before a byte of it is sent
        send(message)

    connection.send = late  # type: ignore[method-assign]
    job = RunRequest("t", b"{}", "default:a", "default", 1, {}, None, None)
    notes = process_main._LiveSender(connection).record(job).notes
    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(TimeoutError, match=r"its time limit of 0\.1 s"), limit:
            notes["page"] = 7
    finally:
        signal.signal(signal.SIGALRM, before)
    connection.forked()
    reply = read_reply(ours.recv(65536)[HEAD.size :])
    assert isinstance(reply, LiveReply)
    assert reply.notes == b'{"page":7}'
    ours.close()
    loop.close()
