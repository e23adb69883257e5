"""Crash attribution: what the table of running jobs records, and the job that is charged for a crash."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from conveyor import Conveyor, JobFailed, Retry, current
from conveyor.admin.admin import Admin
from conveyor.cli import cli
from conveyor.ids import split
from conveyor.store import operations
from conveyor.store.operations import Settlement, TurnReport
from conveyor.worker.crash_attribution import (
    CELLS,
    EXECUTING,
    IN_PROCESS,
    LOOP_CELL,
    OVERFLOW_CELL,
    RunningSnapshot,
    RunningTable,
    id_checksum,
)
from conveyor.worker.shared_memory import ChildSlot
from conveyor.worker.worker import Worker
from support import process_app
from support.client_worker import ClientWorker
from support.manual_worker import ManualWorker
from support.running_worker import working
from support.waiting import auntil
from support.worker_processes import wait, worker_processes

IDS = ["on-the-loop", "on-a-thread", "waits", "prefetched"]
ON_LOOP, ON_THREAD, WAITS, PREFETCHED = IDS


def snapshot_of(*, loop: str = "", thread: str = "", waits: str = "", beside: str = "") -> RunningSnapshot:
    cells = [0] * CELLS
    cells[LOOP_CELL] = id_checksum(loop) if loop else 0
    cells[OVERFLOW_CELL + 1] = id_checksum(thread) | EXECUTING if thread else 0
    cells[OVERFLOW_CELL + 2] = id_checksum(waits) if waits else 0
    cells[OVERFLOW_CELL + 3] = cells[LOOP_CELL]  # it has suspended once
    cells[OVERFLOW_CELL + 4] = id_checksum(beside) | IN_PROCESS if beside else 0
    found = RunningSnapshot.read(cells)
    assert found is not None
    return found


@pytest.mark.row("A8")
@pytest.mark.parametrize(
    ("snapshot", "fault", "blamed", "near"),
    [
        (snapshot_of(loop=ON_LOOP, thread=ON_THREAD, waits=WAITS), True, [ON_LOOP, ON_THREAD], []),
        (snapshot_of(loop=ON_LOOP, thread=ON_THREAD, waits=WAITS), False, [ON_LOOP, ON_THREAD], [WAITS]),
        (snapshot_of(loop=ON_LOOP, waits=WAITS), True, [ON_LOOP], []),
        (snapshot_of(waits=WAITS), True, [WAITS], []),
        (snapshot_of(waits=WAITS), False, [WAITS], []),
        (snapshot_of(), False, [], []),
        (snapshot_of(loop=ON_LOOP, beside=WAITS), True, [ON_LOOP, WAITS], []),
        (snapshot_of(waits=WAITS, beside=ON_THREAD), True, [ON_THREAD, WAITS], []),
        (snapshot_of(loop="of another queue", waits=WAITS), True, [], []),
    ],
)  # fmt: skip
def test_the_job_that_is_charged(snapshot: RunningSnapshot, fault: bool, blamed: list[str], near: list[str]) -> None:
    """A job that was executing is charged; one that was under way only when killed, or alone; one that had not begun never."""
    assert snapshot.blame(IDS, fault=fault) == (blamed, near)


def test_more_jobs_than_cells_rule_no_job_out() -> None:
    """A job without a free cell takes the overflow cell for ever; then nothing is known. Cells that are left are used again."""
    table = RunningTable(memoryview(bytearray(8 * CELLS)).cast("q"))
    taken = [table.take_cell() for _ in range(CELLS - 2)]
    assert len({*taken, LOOP_CELL, OVERFLOW_CELL}) == CELLS
    table.cells[taken[5]] = id_checksum("a")
    table.release_cell(taken[5])
    assert table.cells[taken[5]] == 0
    assert table.take_cell() == taken[5]
    assert RunningSnapshot.read(table.cells) == RunningSnapshot(frozenset(), frozenset())

    assert table.take_cell() == OVERFLOW_CELL
    table.cells[OVERFLOW_CELL] = id_checksum("b")
    table.release_cell(OVERFLOW_CELL)
    assert RunningSnapshot.read(table.cells) is None


async def test_a_worker_shows_what_it_runs(app: Conveyor, slot: ChildSlot) -> None:
    """A job is executing before its first wait, waiting during it, executing after it; on a thread it executes; then it is gone."""
    go, seen, begun = threading.Event(), list[tuple[bool, bool]](), asyncio.Event()

    def look() -> None:
        snapshot, me = slot.running_snapshot(), id_checksum(split(current().job_id)[1])
        assert snapshot is not None
        seen.append((me in snapshot.executing, me in snapshot.waiting))

    @app.task
    async def waits() -> None:
        look()
        await asyncio.sleep(0)
        look()
        begun.set()
        await asyncio.to_thread(go.wait)
        look()

    @app.task
    def blocks() -> None:
        look()
        go.wait()

    worker = Worker(app, slot=slot)
    running = asyncio.create_task(worker.run())
    jobs = [await waits.aenqueue(), await blocks.aenqueue()]
    await asyncio.wait_for(begun.wait(), 60)
    await auntil(lambda: len(seen) == 3)
    waiting, executing = (id_checksum(split(job.id)[1]) for job in jobs)
    found = slot.running_snapshot()
    go.set()
    for job in jobs:
        await job.aresult("60s")

    assert seen == [(True, False)] * 4
    assert found == RunningSnapshot(frozenset({executing}), frozenset({waiting}))
    assert slot.running_snapshot() == RunningSnapshot(frozenset(), frozenset())
    worker.stop()
    assert await running == 0
    await app.aclose()


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_a_job_without_a_cell_is_never_forgotten(
    url: str, slot: ChildSlot, monkeypatch: pytest.MonkeyPatch, run_in: str
) -> None:  # fmt: skip
    """The end of one job without a cell of its own does not hide that others may run without one."""
    monkeypatch.setattr(RunningTable, "take_cell", lambda _: OVERFLOW_CELL)
    async with Conveyor(url) as app:

        @app.task
        async def on_loop() -> None:
            await asyncio.sleep(0)

        @app.task
        def on_thread() -> None: ...

        worker = Worker(app, slot=slot)
        running = asyncio.create_task(worker.run())
        await (await (on_loop if run_in == "loop" else on_thread).aenqueue()).aresult("60s")
        worker.stop()
        assert await running == 0
    assert slot.running_snapshot() is None


@pytest.mark.parametrize(
    ("how", "crashes"),
    [("crash", [1, 1, 2, 2]), ("leave", [0, 0, 1, 1]), ("blamed", [1, 1, 2, 2]), ("near", [1, 1, 2, 1]), ("neither", [0, 0, 1, 1])],
)  # fmt: skip
def test_a_crash_that_was_counted_before_is_kept_or_taken_back(app: Conveyor, how: str, crashes: list[int]) -> None:
    """For fresh jobs, one charged among others and one charged alone: a job without blame has no crash more than before."""
    task = app.task(name="any")(lambda: None)
    for _ in range(4):
        task.enqueue()
    manual = ClientWorker(app.client, "default")
    ids = [split(public)[1] for public in manual.take(4)]
    marks = [Settlement("M", ids[2], state=b"1 0 2+"), Settlement("M", ids[3], state=b"1 0 2*")]
    manual._turn(0, TurnReport(others=marks))
    blame = {"blamed": (ids, []), "near": ([], ids), "neither": ([], [])}.get(how)

    app.client.run(operations.reap(manual.keys, manual.identity, crashed=how != "leave", blame=blame))

    states = [app.client.execute("HGET", manual.keys.state, id_, key=manual.keys.state) for id_ in ids]
    assert [int(state.split()[2]) for state in states] == crashes  # with no doubt left
    app.queue("default").purge()


ENDS = {"segfault": "was killed by SIGSEGV", "exit": "exited with code ", "abort": "was killed by SIGABRT"}


@pytest.mark.row("A8")
@pytest.mark.parametrize("how", ENDS)
def test_a_fault_is_charged_to_the_executed_job(url: str, tmp_path: Path, how: str) -> None:
    """Jobs that wait in the process that another one ends three times have no crash; that one's errors say how, when and where."""
    with worker_processes(url, tmp_path, lease="10s") as one:
        one.start(processes=1, concurrency=10)
        waiting = one.app.enqueue_many(one.tasks.note.s(n, 60) for n in range(5))
        wait(lambda: len(one.starts()) == 5)
        poison = one.tasks.poison.enqueue(5, how)
        wait(lambda: one.counts().dead == 1)
        wait(lambda: [len(one.starts()[n]) for n in range(5)] == [4] * 5)

        keys = one.app.client.keys("default")
        states = [one.app.client.execute("HGET", keys.state, split(job.id)[1], key=keys.state) for job in waiting]
        assert [state.split()[2] for state in states] == [b"0"] * 5
        assert len(one.starts()[5]) == 3
        shown, words = Admin(one.app.client).job(poison.id), ENDS[how]
        assert [(error.attempt, error.type, words in error.message) for error in shown.errors] == [
            (attempt, "crashed", True) for attempt in (1, 2, 3, 3)
        ]
        assert all(re.fullmatch(r".+:\d+", error.worker) and error.at <= shown.ended for error in shown.errors)
        assert "its worker crashed 3 times while it ran; the last time, at " in shown.errors[-1].message
        with pytest.raises(JobFailed, match=re.escape(words)):
            poison.result(timeout=0)
        told = CliRunner().invoke(cli, ["job", "show", poison.id, "--url", url, "--namespace", one.app.namespace])
        assert re.search(rf"error\.1\tcrashed: its worker {words}.*\(\d{{4}}-.*Z, .+:\d+\)\n", told.output), told.output


@pytest.mark.row("A8")
async def test_a_process_is_charged_until_its_crash_is_settled(url: str, slot: ChildSlot) -> None:
    """A job whose own process died is beside until Redis knows: when the worker dies just then, the crash counts all the same."""
    seen: list[tuple[str, RunningSnapshot | None]] = []

    class Look(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage(), slot.running_snapshot()))

    look = Look()
    logging.getLogger("conveyor.worker").addHandler(look)
    async with Conveyor(url) as app:
        function = process_app.app.tasks["support.process_app.die"].function
        task = app.task(name="support.process_app.die", run_in="process", retry=Retry(max_crashes=1))(function)
        worker = Worker(app, slot=slot, reference="support.process_app:app")
        running = asyncio.create_task(worker.run())
        job = await task.aenqueue("exit")
        with pytest.raises(JobFailed):
            await job.aresult("60s")
        worker.stop()
        assert await running == 0
        await asyncio.to_thread(app.queue("default").purge, dead=True)
    logging.getLogger("conveyor.worker").removeHandler(look)
    [found] = [snapshot for text, snapshot in seen if "crashed its process" in text]
    assert found is not None
    assert found.blame([split(job.id)[1]], fault=True) == ([split(job.id)[1]], [])


@pytest.mark.leaves_keys("the load goes on until its jobs are purged")
async def test_jobs_of_a_killed_worker_start_under_load(url: str) -> None:
    """Jobs that came back from a crash start while a worker that holds work ahead has more of it at every moment."""
    app, load_ended, started = Conveyor(url), 0, list[int]()

    @app.task(name="load")
    async def load() -> None:
        nonlocal load_ended
        await asyncio.sleep(0.001)
        load_ended += 1

    @app.task(name="victim")
    async def victim(n: int) -> None:
        started.append(n)

    async def keep_loaded() -> None:
        pushed = 0
        while True:
            if pushed - load_ended < 500:
                await app.aenqueue_many([load.s() for _ in range(500)])
                pushed += 500
            await asyncio.sleep(0)

    await app.aenqueue_many([victim.s(n) for n in range(4)])
    killed = await asyncio.to_thread(ManualWorker, app)
    assert len(await asyncio.to_thread(killed.take, 4)) == 4
    async with working(app, concurrency=4):
        loading = asyncio.create_task(keep_loaded())
        await auntil(lambda: load_ended > 2000)
        await app.client.arun(operations.reap(killed.keys, killed.worker, crashed=True))
        await auntil(lambda: len(started) == 4, 20)
        loading.cancel()
    await app.queue("default").apurge()
    await app.aclose()
