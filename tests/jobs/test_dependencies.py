"""Dependencies: parameters that the worker opens before a job and cleans up after it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import pytest

from conveyor import Context, Conveyor, Depends, JobCancelled, JobFailed, PayloadError, Retry, current
from conveyor.errors import ConfigurationError
from support import dependency_app
from support.app_fixtures import emptied_loop_app  # noqa: F401
from support.running_worker import drain, working

LOG: list[str] = []


@pytest.fixture(autouse=True)
def log() -> list[str]:
    LOG.clear()
    return LOG


async def get_pool() -> AsyncIterator[str]:
    LOG.append("open pool")
    try:
        async with asyncio.timeout(60):  # it must be left in the task that entered it
            yield "pool"
    finally:
        LOG.append("close pool")


def get_db(pool: str = Depends(get_pool), context: Context = current()) -> Iterator[str]:
    LOG.append(f"open db {context.task}")
    try:
        yield f"db of {pool}"
    except BaseException as error:
        LOG.append(f"roll back {type(error).__name__}")
        raise
    else:
        LOG.append("commit")


async def get_user(db: str = Depends(get_db)) -> str:
    LOG.append("get user")
    return f"user in {db}"


def opened(name: str) -> list[str]:
    return ["open pool", f"open db {name}", "get user"]


async def test_dependencies_are_opened_once_and_closed_in_reverse(app: Conveyor) -> None:
    """Dependencies of each kind reach async tasks and tasks on threads, each once for a job; the last opened is closed first."""

    @app.task(name="loop")
    async def loop(x: int, user: str = Depends(get_user), db: str = Depends(get_db)) -> str:
        LOG.append("run")
        return f"{x} {user}, {db} {current().attempt}"

    @app.task(name="thread")
    def thread(x: int, *, user: str = Depends(get_user), db: str = Depends(get_db)) -> str:
        LOG.append("run")
        return f"{x} {user}, {db} {current().attempt} {threading.current_thread() is not threading.main_thread()}"

    @app.batch_task(name="batch", size=2, within="1s")
    async def batch(items: list[int], db: str = Depends(get_db), user: str = Depends(get_user)) -> list[str]:
        LOG.append(f"run {items}")
        return [f"{item} {user}, {db}" for item in items]

    assert "db" not in repr(loop)
    for task, expected in (
        (loop, "7 user in db of pool, db of pool 1"),
        (thread, "7 user in db of pool, db of pool 1 True"),
    ):
        LOG.clear()
        job = await task.aenqueue(7)
        await drain(app)
        assert await job.aresult(5) == expected
        assert [*opened(task.name), "run", "commit", "close pool"] == LOG

    LOG.clear()
    jobs = [await batch.aenqueue(n) for n in (1, 2)]
    await drain(app)
    assert [await job.aresult(5) for job in jobs] == [f"{n} user in db of pool, db of pool" for n in (1, 2)]
    assert [*opened("batch"), "run [1, 2]", "commit", "close pool"] == LOG


def swallow() -> Iterator[None]:
    try:
        yield
    except LookupError:
        LOG.append("swallowed")


def broken(db: str = Depends(get_db)) -> None:
    raise OSError("no such host")


def bad_end() -> Iterator[None]:
    yield
    raise OSError("cannot commit")


async def test_dependencies_clean_up_however_the_job_ends(app: Conveyor) -> None:
    """A job that fails, times out, is cancelled or loses a dependency leaves none open, and fails with its own error."""

    started = asyncio.Event()

    @app.task(name="t", retry=1, timeout="0.1s")
    async def late(db: str = Depends(get_db)) -> None:
        await asyncio.sleep(60)

    @app.task(name="c", retry=1)
    async def stopped(db: str = Depends(get_db)) -> None:
        started.set()
        await asyncio.sleep(60)

    def fails(db: str = Depends(get_db), other: None = Depends(swallow)) -> None:
        raise LookupError("x")

    async def afails(db: str = Depends(get_db), other: None = Depends(swallow)) -> None:
        fails(db)

    @app.task(name="u", retry=1)
    async def unopened(other: None = Depends(broken)) -> None: ...

    @app.task(name="e", retry=1)
    def unclosed(db: str = Depends(get_db), end: None = Depends(bad_end)) -> None: ...

    failed = [
        await task.aenqueue()
        for task in (app.task(retry=1)(fails), app.task(retry=1)(afails), unopened, unclosed, late)
    ]
    job = await stopped.aenqueue()
    async with working(app):
        errors = []
        for one in failed:
            with pytest.raises(JobFailed) as raised:
                await one.aresult(30)
            errors.append(raised.value.type.rpartition(".")[2])
        await started.wait()
        assert await job.acancel() == "asked"
        with pytest.raises(JobCancelled):
            await job.aresult(30)

    assert errors == ["LookupError", "LookupError", "OSError", "OSError", "TimeoutError"]
    counted = Counter(LOG)
    assert counted["open pool"] == counted["close pool"] == 6
    assert counted["swallowed"] == 2
    assert counted["commit"] == 0
    assert counted["roll back LookupError"] == counted["roll back OSError"] == 2
    assert counted["roll back CancelledError"] == 2


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_worker_scope_opens_once_and_closes_at_the_end(app: Conveyor, kind: str) -> None:
    """A dependency with scope="worker" is opened at its first use, shared by all jobs, and closed when the worker ends."""
    failures = iter([True])

    async def engine() -> AsyncIterator[list[int]]:
        if next(failures, False):
            raise OSError("not yet")
        LOG.append("open engine")
        yield []
        LOG.append("close engine")

    def model(engine: list[int] = Depends(engine, scope="worker")) -> Iterator[list[int]]:
        LOG.append(f"open model {threading.current_thread() is threading.main_thread()}")
        yield engine
        LOG.append("close model")

    async def work(n: int, model: list[int] = Depends(model, scope="worker")) -> None:
        model.append(n)
        LOG.append(f"run {len(model)}")

    def work_plainly(n: int, model: list[int] = Depends(model, scope="worker")) -> None:
        model.append(n)
        LOG.append(f"run {len(model)}")

    function: Callable[..., Any] = work if kind == "async" else work_plainly
    task: Any = app.task(name="work", retry=Retry(attempts=3, backoff="1ms"))(function)
    jobs = [await task.aenqueue(n) for n in range(4)]
    async with working(app):
        for job in jobs:
            await job.aresult(30)

    assert LOG[:2] == ["open engine", "open model False"]
    assert sorted(LOG[2:6]) == [f"run {n}" for n in range(1, 5)]
    assert LOG[6:] == ["close model", "close engine"]


async def test_override_replaces_a_dependency(app: Conveyor) -> None:
    """Inside app.override another function is called, nested and worker-wide ones too, and it may use the original."""
    variable: ContextVar[str] = ContextVar("variable", default="unset")

    def fake(db: str = Depends(get_db)) -> str:
        variable.set("set")
        return f"fake {db}"

    @app.task(name="work")
    async def work(user: str = Depends(get_user)) -> tuple[str, str]:
        return user, variable.get()

    async def run() -> tuple[str, str]:
        job = await work.aenqueue()
        await drain(app)
        return await job.aresult(5)

    with app.override(get_db, fake):
        assert await run() == ("user in fake db of pool", "set")
        with app.override(get_db, lambda: "inner"):
            assert await run() == ("user in inner", "unset")
        assert (await run())[0] == "user in fake db of pool"
    assert (await run())[0] == "user in db of pool"


async def test_dependencies_in_a_process(app: Conveyor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of run_in="process" have dependencies in their process, and refuse what is overridden in this one."""
    monkeypatch.setenv("DEPENDENCY_LOG", str(tmp_path / "log"))
    reference = "support.dependency_app:app"
    there = dependency_app.app
    for task in (dependency_app.plain, dependency_app.awaited):
        app.task(name=task.name, run_in="process", retry=1)(task.function)
    for name in ("slow", "aslow", "stuck", "pid", "waits", "leaves_a_thread", "follows"):
        task = there.tasks[f"{dependency_app.__name__}.{name}"]
        app.task(name=task.name, run_in="process", retry=1)(task.function)
    for batch in (dependency_app.batch, dependency_app.lasting):
        app.batch_task(name=batch.name, size=2, within="1s", run_in="process")(batch.function)
    good = [await app.aenqueue(task.name, "a") for task in (dependency_app.plain, dependency_app.awaited)]
    bad = await app.aenqueue(dependency_app.plain.name, "bad")
    items = [await app.aenqueue(dependency_app.batch.name, name) for name in "xy"]
    assert there.tasks.keys() == app.tasks.keys()

    async with working(app, reference=reference) as worker:
        worker.executor.processes.limit = 1
        assert [(await job.aresult(60))[0] for job in good] == ["session True of a"] * 2
        assert [await job.aresult(60) for job in items] == ["session True of x", "session True of y"]
        with pytest.raises(JobFailed, match="bad"):
            await bad.aresult(60)
        with app.override(dependency_app.session, lambda: "fake"):
            refused = await app.aenqueue(dependency_app.plain.name, "b")
            with pytest.raises(JobFailed, match=r"app\.override\(\) .* is not in force"):
                await refused.aresult(60)

    lines = (tmp_path / "log").read_text().splitlines()
    told = Counter(line.rpartition(" ")[0] for line in lines)
    pids = {line.rpartition(" ")[2] for line in lines}
    assert told["open session"] == 4
    # A generator is closed where its job failed, and the code behind its yield is left out.
    assert told["close session"] == 3
    assert told["open engine"] == told["close engine"] == len(pids)


def test_enqueue_knows_nothing_of_dependencies(app: Conveyor) -> None:
    """A dependency is no argument of a job: enqueue refuses it, and a plain call of the task must be given it."""

    @app.task(name="shop.work")
    def work(x: int, db: str = Depends(get_db)) -> str:
        return f"{x} {db}"

    with pytest.raises(PayloadError, match="'db', which the worker fills"):
        work.enqueue(1, db="mine")
    with pytest.raises(ConfigurationError, match=r"without 'db', which only a worker fills. .* work\(…, db=…\)"):
        work(1)
    assert work(1, db="mine") == work(1, "mine") == "1 mine"
    placeholder: Any = Depends(get_db)
    with pytest.raises(ConfigurationError, match=r"Depends\(get_db\)\.execute: only a worker fills"):
        placeholder.execute("select 1")


def test_wrong_declarations_are_refused(app: Conveyor) -> None:
    """A parameter that cannot be filled is refused where it is declared, with what to write."""

    def needs(name: str) -> str:
        return name

    def job_wide(context: Context = current()) -> str:
        return context.job_id

    def refused(function: Any, match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            app.task(name="refused")(function)

    def asks(value: str = Depends(needs)) -> None: ...
    def wide(value: str = Depends(job_wide, scope="worker")) -> None: ...
    def annotated(value: Annotated[str, Depends(get_db)]) -> None: ...

    annotated.__annotations__["value"] = Annotated[str, Depends(get_db)]
    refused(asks, r"'name' of its dependency .*needs\(\) has no default")
    refused(wide, 'has scope="worker", so it cannot depend on what belongs to one job')
    refused(annotated, "a dependency is a default value")
    with pytest.raises(ConfigurationError, match="takes a function, not"):
        Depends("get_db")  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="'job', 'worker'"):
        Depends(get_db, scope="process")  # type: ignore[call-overload]
    for wrong in ((get_db, "fake"), (None, get_db)):
        with pytest.raises(ConfigurationError, match=r"app\.override\(\) takes the function"), app.override(*wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(ConfigurationError, match="has no default"), app.override(get_db, needs):
        pass
