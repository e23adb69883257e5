"""Log lines of a job are kept, with the attempt that logged them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from conveyor import ConfigurationError, Context, Conveyor, Retry, current
from conveyor.admin.admin import Admin
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard
from conveyor.jobs.job_log import MOST_BYTES, MOST_LINES, JobLog
from conveyor.store import operations
from conveyor.store.operations import TurnReport
from conveyor.worker.log_capture import LINE_BYTES
from support import process_app
from support.app_fixtures import loop_app  # noqa: F401
from support.dashboard_client import ask
from support.running_worker import audit, drain, working
from support.time_limits import PATIENCE
from support.waiting import auntil, until_status

shop = logging.getLogger("shop")


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """INFO of the program's own logger, as most programs have it."""
    shop.setLevel(logging.INFO)
    yield
    shop.setLevel(logging.NOTSET)


async def lines(job: Any) -> list[tuple[int, str, str]]:
    """Return attempt, level and text of what is kept of a job's lines."""
    return [(line.attempt, line.level, line.message) for line in await job.alogs()]


@pytest.mark.row("D357")
@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_lines_of_failed_attempts_are_kept(app: Conveyor, kind: str) -> None:
    """By default the lines of each attempt that failed are kept, also after a success, and those of a success are not."""

    def work(context: Context) -> None:
        shop.info("attempt %d", context.attempt)
        context.logger.info("through the context")
        if context.attempt == 1:
            raise LookupError

    @app.task(retry=Retry(attempts=2, backoff="1ms"))
    async def coroutine(context: Context = current()) -> None:
        await asyncio.sleep(0)
        work(context)

    @app.task(retry=Retry(attempts=2, backoff="1ms"))
    def thread(context: Context = current()) -> None:
        work(context)

    job = await (coroutine if kind == "coroutine" else thread).aenqueue()
    shop.warning("of no job")
    await drain(app)
    expected = [(1, "INFO", "attempt 1")]
    if logging.getLogger("conveyor.job").isEnabledFor(logging.INFO):
        expected.append((1, "INFO", "through the context"))
    assert await lines(job) == expected
    assert await audit(app) == []


async def test_a_task_says_when_lines_are_kept(app: Conveyor, redis: Any) -> None:
    """With logs="always" those of a success are kept, with "never" not even those of a failure; other words are refused."""

    @app.task(logs="always")
    async def always() -> None:
        shop.info("all is well")

    @app.task(logs="never", retry=Retry(attempts=1))
    async def never() -> None:
        shop.error("nobody reads this")
        raise LookupError

    kept, unkept = await always.aenqueue(), await never.aenqueue()
    await drain(app)
    assert await lines(kept) == [(1, "INFO", "all is well")]
    assert (await kept.astatus(), await kept.aresult(timeout=PATIENCE)) == ("done", None)
    assert await lines(unkept) == []
    assert len(redis.keys("*:logs:*")) == 1
    with pytest.raises(ConfigurationError, match="'failure', 'always', 'never'"):
        app.task(logs="sometimes")(lambda: None)  # type: ignore[call-overload]
    await Admin(app.client).adelete([unkept.id])


async def test_a_success_that_logs_costs_nothing_more(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that log and end well are simply done: their lines leave nothing."""
    done: list[str] = []
    others: list[Any] = []
    turn = operations.turn

    def noted(*arguments: Any, **options: Any) -> Any:
        report: TurnReport = arguments[5]
        done.extend(report.done)
        others.extend(report.others)
        return turn(*arguments, **options)

    monkeypatch.setattr(operations, "turn", noted)

    @app.task
    async def work() -> int:
        shop.info("all is well")
        return 1

    jobs = [await work.aenqueue() for _ in range(10)]
    await drain(app)
    assert (len(done), others) == (10, [])
    assert [await lines(job) for job in jobs] == [[]] * 10


@pytest.mark.row("D357")
@pytest.mark.parametrize("how", ["fail", "crash"])
async def test_lines_of_a_process_are_kept(app: Conveyor, how: str) -> None:
    """A job in a process of its own is no exception, also when the process dies under it."""
    name = "support.process_app.complain"
    complain = app.task(name=name, run_in="process", retry=Retry(attempts=1, max_crashes=1))(
        process_app.app.tasks[name].function
    )
    job = await complain.aenqueue(how)
    async with working(app, reference="support.process_app:app"):
        await until_status(job, "dead")
    assert await lines(job) == [(1, "WARNING", f"from {how}"), (1, "WARNING", "before the end")]
    await Admin(app.client).adelete([job.id])


async def test_a_running_job_is_followed(app: Conveyor) -> None:
    """A follower of a job sees its lines while it runs, in their order and each once, and the last ones at its end."""
    gate, seen = threading.Event(), []

    @app.task
    async def work() -> None:
        shop.info("first")
        await auntil(gate.is_set)
        shop.info("last")

    job = await work.aenqueue()

    def follow() -> None:
        for line in Admin(app.client).follow_logs(job.id, pause=0.02):
            seen.append(line.message)
            gate.set()

    async with working(app):
        await asyncio.wait_for(asyncio.to_thread(follow), PATIENCE)
    assert seen == ["first", "last"]


async def test_a_page_has_the_lines_of_a_running_job(app: Conveyor) -> None:
    """A running job whose lines are asked for over HTTP sends them as they come; nobody has to wait for its end."""
    gate = asyncio.Event()

    @app.task
    async def work() -> None:
        shop.info("first")
        await gate.wait()

    job, site = await work.aenqueue(), dashboard(app, lambda _: Access.ALL)

    def read() -> dict[str, Any]:
        return ask(site, "GET", "job/logs", {"id": job.id}).json()  # type: ignore[no-any-return]

    async with working(app):
        await until_status(job, "leased")
        await auntil(lambda: asyncio.to_thread(lambda: [one["text"] for one in read()["logs"]] == ["first"]))
        assert (await asyncio.to_thread(read))["followed"] is True
        gate.set()
        await until_status(job, "done")
    assert (await asyncio.to_thread(read))["followed"] is False
    hidden = dashboard(app, lambda _: Access.only())
    assert (await asyncio.to_thread(ask, hidden, "GET", "job/logs", {"id": job.id})).status_code == 403


async def test_lines_of_a_batch_are_those_of_its_items(app: Conveyor) -> None:
    """An item that fails has the lines of the call that it was part of."""

    @app.batch_task(size=2, within="5s", retry=1)
    async def index(rows: list[int]) -> None:
        shop.info("%d rows", len(rows))
        raise LookupError

    jobs = [await index.aenqueue(row) for row in (1, 2)]
    await drain(app)
    assert [(1, "INFO", "2 rows")] in [await lines(job) for job in jobs]
    await Admin(app.client).adelete([job.id for job in jobs])


@pytest.mark.row("D23")
def test_lines_are_bounded() -> None:
    """The newest lines of an attempt are kept, within 1,000 and 64 KiB, and a line says how many were dropped."""
    log = JobLog()
    log.add([(1, "INFO", "x", str(number)) for number in range(MOST_LINES + 5)])
    taken = log.take()
    assert [line[3] for line in taken[:2]] == ["5 earlier lines were dropped", "5"]
    assert len(taken) == MOST_LINES + 1
    assert log.take() == []
    log.add([(1, "INFO", "x", "y" * LINE_BYTES)] * 100)
    assert sum(len(line[3]) for line in log.take()) <= MOST_BYTES + 100


@pytest.mark.parametrize("encrypt", [False, True])
async def test_lines_are_sealed(url: str, redis: Any, encrypt: bool) -> None:
    """With keys, lines are signed or encrypted, and a program without them only describes what is there."""
    app = Conveyor(url, keys={"k1": "0" * 32}, encrypt=encrypt)

    @app.task(retry=1)
    async def work() -> None:
        shop.info("the Miller file")
        raise LookupError

    job = await work.aenqueue()
    await drain(app)
    [key] = redis.keys("*:logs:*")
    assert (b"Miller" in redis.lindex(key, 0)) is not encrypt
    assert await lines(job) == [(1, "INFO", "the Miller file")]
    async with Conveyor(url) as other:
        [line] = await other.job(job.id).alogs()
        assert line.message.startswith("sealed with key k1")
    await Admin(app.client).adelete([job.id])
    await app.aclose()


def test_the_command_line_shows_them(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`conveyor job logs` prints the lines, as text and as JSON, and those of a job that ended are followed to their end."""
    with Conveyor(url) as app:

        @app.task(logs="always")
        def work() -> None:
            try:
                raise LookupError("\x1b[31m")
            except LookupError:
                shop.exception("no page")

        job = work.enqueue()
        asyncio.run(drain(app))
        for options in ([], ["-f"], ["--json"]):
            assert main(["job", "logs", job.id, "--url", url, *options]) == 0
    plain, followed, document = capsys.readouterr().out.splitlines()
    assert plain == followed
    assert plain.split("\t")[1:4] == ["ERROR", "shop", "1"]
    assert "no page" in plain
    assert "LookupError" in plain
    assert "\x1b" not in plain
    [line] = json.loads(document)["lines"]
    assert line["level"] == "ERROR"
