"""Progress of a running job, and the notes that stay between its attempts."""

from __future__ import annotations

import asyncio
import math
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from conveyor import ConfigurationError, Context, Conveyor, PayloadError, Retry, current
from conveyor.admin.admin import Admin
from conveyor.cli import main
from conveyor.payload.live_records import Progress, open_notes, open_progress, pack_notes, pack_progress
from conveyor.payload.records import AttemptHistory
from conveyor.store import operations
from conveyor.store.operations import Settlement, TurnReport
from support import process_app
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, drain, working
from support.time_limits import PATIENCE
from support.waiting import auntil


async def said(job: Any, done: float) -> Progress:
    """Wait until *job* has said that so much is done; return the progress."""

    async def reached() -> Progress | None:
        progress: Progress | None = await job.aprogress()
        return progress if progress is not None and progress.done == done else None

    found: Progress = await auntil(reached)
    return found


@pytest.fixture
def settlements(monkeypatch: pytest.MonkeyPatch) -> list[Settlement]:
    """The settlements that workers send, in their order."""
    sent: list[Settlement] = []
    turn = operations.turn

    def noted(keys: Any, worker: str, number: int, want: int, lease_ms: int, report: TurnReport, **flags: Any) -> Any:
        sent.extend(report.others)
        return turn(keys, worker, number, want, lease_ms, report, **flags)

    monkeypatch.setattr(operations, "turn", noted)
    return sent


@pytest.mark.row("D355")
@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_progress_is_seen_while_the_job_runs_and_after_it(app: Conveyor, kind: str) -> None:
    """`job.progress()` is None, then what the job said last, also when it has ended; a job that says nothing has none."""
    gate = threading.Event()

    def begin(context: Context) -> None:
        context.progress(3, 10, "resizing")

    @app.task
    async def coroutine(context: Context = current()) -> None:
        begin(context)
        await auntil(gate.is_set)
        current().progress(10, 10)

    @app.task
    def thread(context: Context = current()) -> None:
        begin(context)
        gate.wait(PATIENCE)
        current().progress(10, 10)

    @app.task
    async def silent() -> int:
        return 1

    job, other = await (coroutine if kind == "coroutine" else thread).aenqueue(), await silent.aenqueue()
    assert await job.aprogress() is None
    async with working(app):
        assert await said(job, 3) == Progress(3, 10, "resizing")
        assert (await job.ainfo()).progress == Progress(3, 10, "resizing")
        gate.set()
        assert await job.aresult(timeout=PATIENCE) is None
        assert await other.aresult(timeout=PATIENCE) == 1
    assert await job.aprogress() == Progress(10, 10)
    assert await other.aprogress() is None
    assert await audit(app) == []


@pytest.mark.row("D23", "D355")
async def test_a_thousand_calls_are_few_writes(app: Conveyor, settlements: list[Settlement]) -> None:
    """At most four writes a second leave the worker, the last word comes before the end; a job that says nothing costs none."""

    @app.task
    async def count(context: Context = current()) -> None:
        for done in range(20_000):
            context.progress(done, 20_000)
            if done % 1000 == 0:
                await asyncio.sleep(0)

    @app.task
    async def silent(context: Context = current()) -> str:
        return context.job_id

    jobs = [await silent.aenqueue() for _ in range(20)]
    await drain(app)
    assert settlements == []  # all of them were simply done

    loop = asyncio.get_running_loop()
    job, began = await count.aenqueue(), loop.time()
    await drain(app)
    writes, seconds = [one.kind for one in settlements], loop.time() - began
    assert writes[-2:] == ["M", "D"]
    assert len(writes) <= 4 * seconds + 3, f"{len(writes)} in {seconds:.2f} s"
    assert await job.aprogress() == Progress(19_999, 20_000)
    assert {await one.aresult() for one in jobs} == {one.id for one in jobs}


@pytest.mark.row("D354")
async def test_notes_stay_between_attempts(app: Conveyor) -> None:
    """A retry finds the notes of the attempt before, also what was changed inside a value; a dead letter keeps and shows them."""
    found: list[dict[str, Any]] = []

    @app.task(retry=Retry(attempts=3, backoff="1ms"))
    async def walk(context: Context = current()) -> None:
        found.append(deepcopy(dict(context.notes)))
        context.notes["page"] = context.attempt
        context.notes.setdefault("seen", []).append(context.attempt)
        raise LookupError("not yet")

    job = await walk.aenqueue()
    await drain(app)

    assert found == [{}, {"page": 1, "seen": [1]}, {"page": 2, "seen": [1, 2]}]
    assert (await job.ainfo()).notes == {"page": 3, "seen": [1, 2, 3]}
    admin = Admin(app.client)
    await admin.aretry([job.id])
    await drain(app)
    assert found[3] == {"page": 3, "seen": [1, 2, 3]}
    await admin.adelete([job.id])


@pytest.mark.row("D354")
async def test_notes_survive_the_death_of_the_worker(app: Conveyor) -> None:
    """Notes of an attempt whose worker is gone are there for the next one, and a crash that was counted before stays counted."""
    found: list[tuple[int, dict[str, Any]]] = []
    gate = asyncio.Event()

    @app.task(retry=Retry(max_crashes=5))
    async def walk(context: Context = current()) -> None:
        found.append((context.attempt, dict(context.notes)))
        context.notes[f"attempt {context.attempt}"] = True
        context.progress(context.attempt)
        await gate.wait()

    async def crash(done: int) -> None:
        await said(job, done)
        [consumer] = worker.consumers
        await app.client.arun(operations.reap(consumer.keys, consumer.identity, crashed=True))
        consumer.on_token()
        await auntil(lambda: len(found) == done + 1)

    job = await walk.aenqueue()
    async with working(app) as worker:
        await crash(1)
        await crash(2)
        await said(job, 3)
        _, row, _ = await job._alook_up()
        assert row is not None
        assert (row.state.starts, row.state.crashes) == (
            2,
            3,
        )  # that of this attempt was counted before it began, and stays
        gate.set()
        await job.aresult(timeout=PATIENCE)
    assert found == [(1, {}), (2, {"attempt 1": True}), (3, {"attempt 1": True, "attempt 2": True})]


async def test_a_process_tells_its_worker(app: Conveyor, tmp_path: Path) -> None:
    """A job in a process of its own is seen as any other, and what it noted before its process died is not lost."""
    name = "support.process_app.tell"
    tell = app.task(name=name, run_in="process", retry=Retry(max_crashes=3))(process_app.app.tasks[name].function)
    job = await tell.aenqueue(str(tmp_path / "go"))
    async with working(app, reference="support.process_app:app"):
        assert await said(job, 1) == Progress(1, 2, "telling")

        async def noted() -> Any:
            return (await job.ainfo()).notes

        await auntil(noted)
        (tmp_path / "go").touch()
        await job.aresult(timeout=PATIENCE)
    assert await job.aprogress() == Progress(2, 2)
    assert (await job.ainfo()).notes == {"attempts": [1, 2]}


async def test_items_of_a_batch_tell_each_for_itself(app: Conveyor) -> None:
    """Each item of a batch has a progress; the batch itself has none, and says where to write it."""
    refusals: list[str] = []

    @app.batch_task(size=2, within="5s")
    async def index(rows: list[int], context: Context = current()) -> None:
        for row, item in zip(rows, context.items, strict=True):
            item.progress(row, 9)
            item.notes["row"] = row
        with pytest.raises(ConfigurationError, match=r"items\[0\]") as refused:
            context.progress(1, 2)
        refusals.append(str(refused.value))

    jobs = [await index.aenqueue(row) for row in (3, 4)]
    await drain(app)
    assert [await job.aprogress() for job in jobs] == [Progress(3, 9), Progress(4, 9)]
    assert [(await job.ainfo()).notes for job in jobs] == [{"row": 3}, {"row": 4}]
    assert len(refusals) == 1


def context() -> Context:
    return Context(job_id="q:x", task="t", queue="q", attempt=1, headers={}, state={}, deadline_hook=None)


@pytest.mark.parametrize(
    "wrong", [("3",), (math.nan,), (math.inf,), (-1,), (True,), (1, "10"), (1, 2, 3), (), (None, None, "")]
)
def test_a_progress_that_is_none_is_refused(wrong: tuple[Any, ...]) -> None:
    """A value that is no number of at least 0, no text, or nothing at all is refused with what to write."""
    with pytest.raises(ConfigurationError, match=r"context\.progress\(3, 10, 'resizing'\)"):
        context().progress(*wrong)


@pytest.mark.parametrize(
    ("value", "code"), [("x" * 9000, "E21"), (object(), "E04"), (math.nan, "E04"), (b"x", "E03"), ({1, 2}, "E03")]
)
def test_notes_that_cannot_be_stored_are_refused(value: Any, code: str) -> None:
    """Notes take 8 KiB of JSON values; what does not fit is refused, and the others stay as they were."""
    notes = context().notes
    notes["page"] = 7
    with pytest.raises(PayloadError) as refused:
        notes["more"] = value
    assert refused.value.code == code
    assert notes == {"page": 7}


@pytest.mark.parametrize("encrypt", [False, True])
async def test_texts_and_notes_are_sealed(url: str, redis: Any, encrypt: bool) -> None:
    """With keys, progress and notes are sealed: with encryption nothing of them is in Redis, and another app only describes them."""
    app = Conveyor(url, keys={"k1": "0" * 32}, encrypt=encrypt)
    seen: list[dict[str, Any]] = []

    @app.task(retry=Retry(attempts=2, backoff="1ms"))
    async def walk(context: Context = current()) -> None:
        seen.append(dict(context.notes))
        context.progress(1, 2, "the Miller file")
        context.notes["who"] = "Miller"
        raise LookupError

    job = await walk.aenqueue()
    await drain(app)
    assert seen == [{}, {"who": "Miller"}]
    assert await job.aprogress() == Progress(1, 2, "the Miller file")
    [state] = redis.hgetall("conveyor:{default}:state").values()
    assert b"Miller" not in state if encrypt else b'"done":1' in state
    async with Conveyor(url) as other:
        info = await other.job(job.id).ainfo()
        assert info.progress is not None
        assert info.progress.done == 1
        assert info.progress.text.startswith("sealed with key k1")
        assert "E38" in info.notes["(unreadable)"]
    await Admin(app.client).adelete([job.id])
    await app.aclose()


def test_a_history_with_both_is_read_back() -> None:
    """The state of a job keeps progress, notes and errors apart, also with a key that looks like a sealed note."""
    progress, notes = (
        pack_progress(None, Progress(1.0, 2.5, "a\tb\nc"), "q", "x"),
        pack_notes(None, b'{"packed":"a\\tb"}', "q", "x"),
    )
    history = AttemptHistory(3, 2, 1, [b'{"attempt":1}', b'{"attempt":2}'], progress=progress, notes=notes)
    assert AttemptHistory.decode(history.encode()) == history
    assert history.encode().split(b"\n")[0].split(b" ")[:3] == [b"3", b"2", b"1"]  # as older readers take it
    assert open_progress(None, progress, "q", "x") == Progress(1, 2.5, "a\tb\nc")
    assert open_notes(None, notes, "q", "x") == {"packed": "a\tb"}
    assert AttemptHistory.decode(b"3 2 1\n{}") == AttemptHistory(3, 2, 1, [b"{}"])


def test_the_command_line_shows_both(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`conveyor job show` and its JSON have progress and notes."""
    with Conveyor(url) as app:

        @app.task(retry=Retry(attempts=1))
        def walk(context: Context = current()) -> None:
            context.progress(3, 10, "resizing")
            context.notes["page"] = 7
            raise LookupError

        job = walk.enqueue()
        asyncio.run(drain(app))
        for options in ([], ["--json"]):
            assert main(["job", "show", job.id, "--url", url, *options]) == 0
        shown, document = capsys.readouterr().out.split("{", 1)
        assert "progress\t3 of 10 (30%): resizing" in shown
        assert "notes.page\t7" in shown
        assert '"notes":{"page":7}' in document.replace(" ", "").replace("\n", "")
        app.queue("default").purge(dead=True)
