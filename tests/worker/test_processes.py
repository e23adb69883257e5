"""Jobs alone in a process of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from conveyor import ConfigurationError, Conveyor, JobFailed, PayloadError, Retry, RetryIn, Snooze, ids
from conveyor.jobs.task import definition_of
from conveyor.messaging import retry
from conveyor.messaging.retry import GiveUp, RetryAfter, after_failure, wait_of
from conveyor.payload import failures
from conveyor.payload.records import AttemptHistory, EnvelopeOptions
from conveyor.worker.app_loading import find_reference, load
from conveyor.worker.execution import processes as pool
from conveyor.worker.execution.processes import ProcessCrashed, ProcessPool, ProcessUnavailable
from conveyor.worker.settlement import SettlementWriter
from conveyor.worker.worker import Worker
from support import process_app
from support.running_worker import audit, working
from support.supervisor_process import running
from support.time_limits import LATER, PATIENCE
from support.waiting import auntil

APP = "support.process_app:app"
ID = ids.new_id()

Run = Callable[..., Awaitable[Any]]


def attempt(name: str, /, **arguments: Any) -> Any:
    task = process_app.app.tasks[f"support.process_app.{name}"]
    return SimpleNamespace(
        handler=SimpleNamespace(name=task.name, task=definition_of(task), keeps_logs=False),
        body=json.dumps(arguments).encode(),
        public_id=ids.public("default", ID),
        number=3,
        envelope=SimpleNamespace(extra=EnvelopeOptions(headers={"trace": "t1"}), tags=(), due_ms=None),
        consumer=SimpleNamespace(queue="default"),
        move_deadline=lambda ms: None,
        costs={},
        expire=lambda: False,
        stored_notes=dict,
    )


@pytest.fixture
async def processes() -> AsyncIterator[ProcessPool]:
    found = ProcessPool(APP, 2)
    yield found
    await found.close()


@pytest.fixture
def run(processes: ProcessPool) -> Run:
    return lambda name, /, **arguments: processes.run(attempt(name, **arguments))


def ended(pid: int) -> bool:
    """Return whether a process has ended; one that has not been waited for yet counts as ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


async def staying(run: Run, place: Path, name: str, **more: Any) -> tuple[asyncio.Task[Any], list[int]]:
    """Start a job that stays, and return it with the pids of its process and of the one it has started."""
    job = asyncio.ensure_future(run("stay", place=str(place), name=name, **more))
    await auntil((place / name).exists)
    return job, [int(pid) for pid in (place / name).read_text().split()]


async def test_arguments_and_result_arrive_typed(run: Run) -> None:
    """A job gets its arguments and gives its result in the annotated types, in another process."""
    assert await run("swap", point={"x": 1, "y": 2}) == process_app.Point(2, 1)
    assert await run("pid") != os.getpid()
    assert await run("nothing") is None
    assert await run("unkept") is None
    assert await run("big", count=300_000) == "x" * 300_000


async def test_a_process_is_used_again() -> None:
    """Jobs one after the other share a process, until it has done its number of jobs."""
    processes = ProcessPool(APP, 2, max_jobs=3)

    pids = [await processes.run(attempt("pid")) for _ in range(4)]

    assert pids[0] == pids[1] == pids[2] != pids[3]
    await auntil(lambda: ended(pids[0]))
    await processes.close()


async def test_an_idle_process_ends_in_order(
    processes: ProcessPool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was idle for long closes its lifespan and ends, and the next job gets a fresh one."""
    monkeypatch.setattr(pool, "_GRACE", PATIENCE)
    monkeypatch.setenv("CLOSED_MARKER", str(tmp_path / "closed"))
    processes.idle_seconds = 0.05

    first = await run("pid")
    await auntil(lambda: ended(first))

    assert (tmp_path / "closed").exists()
    assert await run("pid") != first


async def test_close_leaves_no_process(run: Run, processes: ProcessPool, tmp_path: Path) -> None:
    """Closing ends idle processes and busy ones, and jobs that wait for a process get an error."""
    busy, pids = await staying(run, tmp_path, "busy")
    idle = await run("pid")
    other, more = await staying(run, tmp_path, "other")
    assert more[0] == idle
    waiting = asyncio.ensure_future(run("pid"))
    await asyncio.sleep(0)

    await processes.close()

    assert all(map(ended, pids[:1] + more[:1]))
    for job in (busy, other, waiting):
        with pytest.raises(ProcessCrashed):
            await job


async def test_the_context_is_known(run: Run) -> None:
    """A job in a process knows who it is, by its parameter and by `current()`."""
    job_id, task, queue, number, headers, made, same = await run("about")

    assert (job_id, task, queue, number) == (f"default:{ID}", "support.process_app.about", "default", 3)
    assert headers == {"trace": "t1"}
    assert made * 1000 == pytest.approx(ids.made_at_ms(ID))
    assert same


async def test_partial_results_come_before_the_end(processes: ProcessPool) -> None:
    """Values that a job emits in its process reach the worker in order, and before its result."""
    parts: list[bytes] = []

    async def emit(data: bytes) -> None:
        parts.append(data)

    one = attempt("emit_parts", count=3)
    one.ended, one.emit_encoded = 0.0, emit
    assert await processes.run(one) == 3
    assert parts == [b'{"number":0}', b'{"number":1}', b'{"number":2}']


@pytest.mark.row("A91")
async def test_a_thread_of_an_ended_job_hurts_no_other(processes: ProcessPool, run: Run) -> None:
    """A thread that speaks for a job which has ended, while another one runs in its process, is not heard and crashes nothing."""
    pid, other = await run("linger"), attempt("listen")
    other.public_id = ids.public("default", ids.new_id())
    assert await processes.run(other) == [True, pid, ["E44"]]


async def test_the_lifespan_is_open(run: Run) -> None:
    """An `async def` runs on the loop of the lifespan, a `def` on none, and both see what it yielded."""
    assert await run("on_loop") is True
    assert await run("no_loop") is True
    assert await run("on_loop") is True


async def test_an_error_is_matched_by_the_policy(run: Run) -> None:
    """An exception of a job arrives as an instance of its class, so the retry policy decides as for any job."""
    with pytest.raises(process_app.TooPoor, match="declined: no money") as caught:
        await run("decline")

    error = caught.value
    policy = definition_of(process_app.app.tasks["support.process_app.decline"]).settings.retry
    assert isinstance(error, process_app.Declined)
    assert isinstance(error, LookupError)
    assert isinstance(after_failure(policy, AttemptHistory(), 1, error, b"{}"), GiveUp)
    record = failures.describe(error, 1, 0, "w")
    assert record.type == "support.process_app.TooPoor"
    assert record.message == "declined: no money"
    assert 'raise TooPoor(402, reason="no money")' in record.traceback
    assert "process_child.py" not in record.traceback
    assert record.frame.startswith("support/process_app.py:")
    assert record.frame.endswith(" decline")
    assert record.traceback.count("declined: no money") == 1
    assert "raise TooPoor" in error.__notes__[0]


@pytest.mark.row("A14")
@pytest.mark.parametrize(
    ("kind", "type_", "base"),
    [
        ("local", "support.process_app.fail.<locals>.Local", KeyError),
        ("frozen", "support.process_app.Frozen", process_app.Frozen),
        ("os", "FileNotFoundError", FileNotFoundError),
        ("group", "ExceptionGroup", ExceptionGroup),
        ("unicode", "UnicodeDecodeError", UnicodeDecodeError),
        ("exit", "SystemExit", Exception),
        ("interrupt", "KeyboardInterrupt", Exception),
        ("cancelled", "asyncio.exceptions.CancelledError", Exception),
        ("stop", "StopIteration", Exception),
        ("long", "ValueError", ValueError),
    ],
)
async def test_every_error_arrives(run: Run, kind: str, type_: str, base: type[Exception]) -> None:
    """Every exception of a job arrives with its name and message, as an Exception that a policy can match."""
    with pytest.raises(base) as caught:
        await run("fail", kind=kind)

    record = failures.describe(caught.value, 1, 0, "w")
    assert record.type == type_
    assert "raise errors[kind]" in record.traceback
    assert record.message == failures.message(caught.value)
    assert isinstance(after_failure(Retry(), AttemptHistory(), 1, caught.value, b"{}"), RetryAfter)
    if kind not in {"cancelled", "interrupt"}:
        assert record.message


async def test_control_flow_and_codes_arrive(run: Run) -> None:
    """A Snooze and a RetryIn keep their delays, an error of the library its code, and none is a crash."""
    with pytest.raises(RetryIn) as again:
        await run("fail", kind="retry_in")
    assert again.value.delay == "7m"
    with pytest.raises(Snooze) as snoozed:
        await run("fail", kind="snooze")
    assert snoozed.value.delay == "5m"
    with pytest.raises(Snooze) as snoozed:
        await run("fail", kind="snooze_delta")
    assert snoozed.value.delay == 300
    with pytest.raises(Snooze) as snoozed:
        await run("fail", kind="snooze_wrong")
    assert wait_of(snoozed.value) is None

    with pytest.raises(PayloadError) as load_error:
        await run("swap", point=1)
    assert load_error.value.code == "E15"

    with pytest.raises(PayloadError, match="five"):
        await run("bad_result")


@pytest.mark.row("A9")
async def test_cancelling_kills(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling a job kills its process and all it has started, without any grace, even one that holds the GIL."""
    monkeypatch.setattr(pool, "_GRACE", LATER)
    job, pids = await staying(run, tmp_path, "stuck", hold=True)

    began = time.monotonic()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job

    assert time.monotonic() - began < PATIENCE
    assert ended(pids[0])
    await auntil(lambda: ended(pids[1]))
    assert await run("pid") != pids[0]


async def test_cancelling_while_it_starts_leaves_nothing(processes: ProcessPool, run: Run) -> None:
    """A job cancelled before its process has loaded the app leaves no process behind, at whatever step."""
    for steps in (1, 3, 10):
        job = asyncio.ensure_future(run("pid"))
        for _ in range(steps):
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert "0 of 2" in repr(processes)


@pytest.mark.row("A7", "A91")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit", "exited with code 3"),
        ("kill", "killed by SIGKILL"),
        ("segfault", "killed by SIGSEGV"),
        ("close", "broke its connection"),
        ("heir", "exited with code 3"),
        ("forge", "reported on something else"),
    ],
)
async def test_a_crash_is_reported(run: Run, how: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends under its job is a crash that says which job and how; the next job gets a fresh one."""
    if how != "close":  # that one does not end by itself
        monkeypatch.setattr(pool, "_EXIT_PATIENCE", PATIENCE)
    with pytest.raises(ProcessCrashed, match=rf"process_app\.die \(default:{ID}, attempt 3\).*{words}"):
        await run("die", how=how)

    assert await run("pid") > 0


async def test_an_idle_death_costs_nobody(run: Run) -> None:
    """A process that dies while idle is replaced, and no job is told, also when the event loop has not seen the end yet."""
    first = await run("pid")
    os.kill(first, signal.SIGKILL)
    await auntil(lambda: not Path(f"/proc/{first}").exists())

    second = await run("pid")
    assert second != first
    os.kill(second, signal.SIGKILL)
    while running(second):  # blocks the loop
        os.sched_yield()
    assert await run("pid") not in {first, second}


async def test_as_many_run_as_there_is_room(run: Run, tmp_path: Path) -> None:
    """Jobs run side by side up to the limit; one more waits for the end of another."""
    (one, first), (two, second) = [await staying(run, tmp_path, name) for name in ("one", "two")]
    three = asyncio.ensure_future(run("stay", place=str(tmp_path), name="three"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not (tmp_path / "three").exists()

    (tmp_path / "go").touch()

    assert await asyncio.gather(one, two, three) == ["one", "two", "three"]
    third = int((tmp_path / "three").read_text().split()[0])
    assert len({first[0], second[0]}) == 2
    assert third in {first[0], second[0]}


async def test_output_is_the_jobs_own(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Output of a job and its programs goes where the worker's output goes, and its standard input is empty."""
    assert await run("chatter", text="hello") == 0

    out, err = capfd.readouterr()
    assert "hello\n" in out
    assert "raw bytes\n" in out
    assert "input\n" in out
    assert "hello" * 20_000 in err


async def test_a_stop_of_the_service_does_not_hurt(run: Run) -> None:
    """SIGTERM and SIGINT to all of a service end no job, and the programs that a job starts still heed them."""
    assert await run("signalled") == -signal.SIGTERM


async def test_a_job_extends_its_limit(processes: ProcessPool) -> None:
    """`context.extend` in a process moves the time limit that the worker keeps."""
    asked: list[int] = []
    one = attempt("extend", ms=90_000)
    one.move_deadline = asked.append

    await processes.run(one)

    assert asked == [90_000]


async def test_an_app_that_does_not_load_is_named() -> None:
    """Without an app, or with one that a fresh process cannot load, the error says what is wrong."""
    with pytest.raises(ProcessUnavailable, match="conveyor worker module:app"):
        await ProcessPool(None, 1).run(attempt("pid"))

    processes = ProcessPool("support.process_app:lost", 1)
    with pytest.raises(ConfigurationError, match=r"support\.process_app:lost.*has no attribute 'lost'") as caught:
        await processes.run(attempt("pid"))
    assert caught.value.code == "E08"
    assert "0 of 1" in repr(processes)


def test_the_app_of_a_program_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app has the name of a module that was imported; the main program, a function and a frozen program have none."""

    class Impostor:
        """An object of a C library that stands among the modules: it says that it is one, and has no members."""

        __slots__ = ()
        __class__ = types.ModuleType  # type: ignore[assignment]

    monkeypatch.setitem(sys.modules, "impostor", Impostor())
    assert find_reference(process_app.app) == APP
    assert find_reference(Conveyor()) is None

    main = Conveyor()
    monkeypatch.setattr(sys.modules["__main__"], "main", main, raising=False)
    assert find_reference(main) is None

    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert find_reference(process_app.app) is None


def test_a_process_imports_only_what_the_app_does_not() -> None:
    """The module of a task is imported where the app does not have the task, and not where it has."""
    assert load(APP, {"support.process_app.swap": "no_such_module"}) is process_app.app
    with pytest.raises(ModuleNotFoundError):
        load(APP, {"other": "no_such_module"})


@pytest.mark.row("A171")
@pytest.mark.parametrize("reference", [None, "support.process_app:lost", "support.forking_app:app"])
async def test_jobs_wait_for_a_worker_that_can_run_them(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, reference: str | None
) -> None:
    """A worker with no app to load, one that does not load, or one without the task offers its jobs again, unchanged."""
    monkeypatch.setattr(retry, "put_off_ms", lambda _: 20)
    async with Conveyor(url) as app:
        about = app.task(name="support.process_app.about", run_in="process")(
            process_app.app.tasks["support.process_app.about"].function
        )

        @app.task
        async def beside() -> int:
            return 1

        assert find_reference(app) is None
        jobs = [await about.aenqueue() for _ in range(3)]
        offered: dict[str, int] = {}
        leave = SettlementWriter.leave_to_others

        def count(self: SettlementWriter, attempt: Any, error: Any) -> None:
            offered[attempt.id] = offered.get(attempt.id, 0) + 1
            leave(self, attempt, error)

        monkeypatch.setattr(SettlementWriter, "leave_to_others", count)
        async with working(app, reference=reference):
            assert await (await beside.aenqueue()).aresult(timeout=20) == 1
            await auntil(lambda: len(offered) == 3 and min(offered.values()) > 1, 30)
        assert {await job.astatus() for job in jobs} <= {"scheduled", "ready"}
        warned = [line for line in caplog.messages if line.startswith("E08")]
        assert len(warned) == 1
        assert "Jobs of support.process_app.about wait for a worker that can run them" in warned[0]

        async with working(app, reference=APP):
            assert [(await job.aresult(timeout=20))[3] for job in jobs] == [1, 1, 1]  # no attempt was used
        assert await audit(app) == []


SHOP = "from conveyor import Conveyor\napp = Conveyor()\n"
TASKS = """
import os
from shop import app

@app.task(run_in="process")
def pid(): return os.getpid()
"""
PROGRAM = """
import asyncio, os
import shop_tasks
from shop import app

@app.task(run_in="process")
def stays(): return os.getpid()

async def main():
    async with app, app.worker():
        waits = await stays.aenqueue()
        ran = await shop_tasks.pid.aenqueue()
        print(await ran.aresult(timeout=20) not in (None, os.getpid()))
        while await waits.astatus() != "scheduled":
            await asyncio.sleep(0.01)
        print(await waits.acancel())

asyncio.run(main())
"""


@pytest.mark.row("A171")
def test_a_program_runs_them_in_processes(url: str, tmp_path: Path) -> None:
    """`app.worker()` runs tasks of imported modules in processes that import these; a task of the main program waits."""
    for name, text in (("shop", SHOP), ("shop_tasks", TASKS), ("main", PROGRAM)):
        (tmp_path / f"{name}.py").write_text(text)
    env = os.environ | {"CONVEYOR_URL": url}
    done = subprocess.run(
        [sys.executable, "main.py"], check=False, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )

    assert (done.stdout.split(), done.returncode) == (["True", "removed"], 0), done.stderr
    assert done.stderr.count("E08 No process can run main.stays") == 1


PARENT = """
import asyncio, sys
from conveyor.worker.execution.processes import ProcessPool
from test_processes import APP, attempt
asyncio.run(ProcessPool(APP, 1).run(attempt("stay", place=sys.argv[1], name="orphan", hold=True)))
"""


async def test_a_killed_worker_leaves_nothing(tmp_path: Path) -> None:
    """When the worker is killed, its process ends at once, GIL held or not, with all that the job has started."""
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=os.environ | {"PYTHONPATH": paths})
    try:
        await auntil((tmp_path / "orphan").exists)
    finally:
        worker.kill()
        worker.wait()

    for pid in map(int, (tmp_path / "orphan").read_text().split()):
        await auntil(lambda pid=pid: ended(pid))


def test_it_works_on_uvloop(tmp_path: Path) -> None:
    """On uvloop, results, errors, crashes and kills are the same."""

    async def all_of_it() -> None:
        processes = ProcessPool(APP, 2)

        def run(name: str, /, **arguments: Any) -> Awaitable[Any]:
            return processes.run(attempt(name, **arguments))

        first = await run("pid")
        assert await run("pid") == first
        with pytest.raises(process_app.TooPoor):
            await run("decline")
        with pytest.raises(ProcessCrashed, match="SIGSEGV"):
            await run("die", how="segfault")
        job, pids = await staying(run, tmp_path, "stuck", hold=True)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert ended(pids[0])
        last = await run("pid")
        await processes.close()
        assert ended(last)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(all_of_it())


@pytest.mark.leaves_keys("dead letters stay until somebody looks at them")
async def test_a_worker_runs_its_jobs_in_processes(url: str, tmp_path: Path) -> None:
    """Through a worker: a result is kept, an error and a time limit follow the policy, a crash counts as one."""
    async with Conveyor(url) as app:

        def task(name: str, **options: Any) -> Any:
            function = process_app.app.tasks[f"support.process_app.{name}"].function
            return app.task(name=f"support.process_app.{name}", run_in="process", **options)(function)

        swapped = await task("swap").aenqueue(process_app.Point(1, 2))
        declined = await task("decline", retry=Retry(on=(LookupError,), give_up=(process_app.Declined,))).aenqueue()
        stuck = await task("stay", timeout="1h", retry=1).aenqueue(str(tmp_path), "stuck", True)
        crashed = await task("die", retry=Retry(max_crashes=1)).aenqueue("segfault")
        worker = Worker(app, burst=True, reference=APP)
        running = asyncio.create_task(worker.run())
        await auntil((tmp_path / "stuck").exists)
        [consumer] = worker.consumers
        consumer.move_deadline(consumer.held[ids.split(stuck.id)[1]], 0)
        await asyncio.wait_for(running, PATIENCE)

        assert await swapped.aresult(timeout=60) == process_app.Point(2, 1)
        for job, type_ in ((declined, "support.process_app.TooPoor"), (stuck, "TimeoutError")):
            with pytest.raises(JobFailed) as caught:
                await job.aresult(timeout=60)
            assert caught.value.type == type_
        with pytest.raises(JobFailed):
            await crashed.aresult(timeout=60)
        pid, started = map(int, (tmp_path / "stuck").read_text().split())
        assert ended(pid)
        await auntil(lambda: ended(started))  # it was killed with it, and the kernel ends each in its own time
        assert await audit(app) == []


@pytest.mark.row("D161")
async def test_a_job_that_expired_while_its_process_started_does_not_run(processes: ProcessPool) -> None:
    """A job that is too late when a process is free does not run in it, and the process is kept for the next."""
    late = attempt("pid")
    late.expire = lambda: True

    with pytest.raises(asyncio.CancelledError):
        await processes.run(late)

    assert "1 of 2, 1 idle" in repr(processes)
    assert await processes.run(attempt("pid")) > 0
