"""The memory, the processor use and the lag of its event loop that a worker tells."""

from __future__ import annotations

import math
import os
import sys
import threading
from typing import Any

import pytest

from conveyor.admin.admin import Admin
from conveyor.admin.worker_control import WorkerProcess
from conveyor.jobs.app import Conveyor
from conveyor.store import worker_commands
from conveyor.worker import usage
from conveyor.worker.usage import LEAST_MEMORY, WINDOW, ProcessUsage, processor_seconds, resident_memory
from support import process_app
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import working
from support.waiting import auntil

MIB = 2**20
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this system has no /proc")


class MeasuredUsage(ProcessUsage):
    """The usage of a process of which the test says what is measured."""

    def __init__(self, memory: int = 100 * MIB, seconds: float = 1.0) -> None:
        super().__init__(lambda: ())
        self.found: tuple[int | None, dict[int | str, float]] = (memory, {"self": seconds})
        self.begin()

    def _measure(self) -> tuple[int | None, dict[int | str, float]]:
        return self.found

    def ends_window(self, memory: int, cpu: float) -> bool:
        """End a window in which the process had *memory* and used so many per cent of a core; tell whether that is to be told."""
        at = self._until
        used = self._seconds["self"] + cpu / 100 * (at - self._begun_at)
        self.found = (memory, {"self": used})
        return self.is_to_be_told(at)


def test_loop_lag_is_told_when_there_is_some() -> None:
    """A loop that is on time tells nothing; one that kept others waiting tells the longest time once, and when it is over."""
    measured = MeasuredUsage()
    start = measured._until
    measured.note_ticks(0.0, 0.25, 0.25)
    assert not measured.is_to_be_told(start)
    measured.note_ticks(1.0, 1.75, 0.25)
    measured.note_ticks(2.0, 2.5, 0.25)
    assert not measured.is_to_be_told(start + 1)
    assert measured.is_to_be_told(start + WINDOW)
    assert measured.lag_ms == 500
    assert measured.is_to_be_told(start + 2 * WINDOW)
    assert measured.lag_ms == 0


def test_small_changes_are_not_told() -> None:
    """Memory is told when it differs from what was told by 8 MiB that are a tenth of it, processor use when by ten points."""
    measured = MeasuredUsage(100 * MIB)
    for memory, cpu in ((100, 0), (109, 9), (91, 9.4), (100, 0)):
        assert not measured.ends_window(memory * MIB, cpu), (memory, cpu)
    assert (measured.memory, measured.cpu) == (100 * MIB, 0)
    assert measured.ends_window(110 * MIB, 9)
    assert (measured.memory, measured.cpu) == (110 * MIB, 9)
    assert not measured.ends_window(120 * MIB, 18)  # a tenth of what was told is 11 MiB
    assert measured.ends_window(120 * MIB, 19)
    assert (measured.memory, measured.cpu) == (120 * MIB, 19)
    assert measured.ends_window(20 * MIB, 350)
    assert not measured.ends_window(20 * MIB + LEAST_MEMORY - MIB, 341)  # a third more, and little
    assert measured.ends_window(20 * MIB + LEAST_MEMORY, 350)
    assert measured.cpu == 350


def test_a_slow_growth_is_told_in_the_end() -> None:
    """Memory is compared with what was told last, however slowly it grows."""
    measured = MeasuredUsage(100 * MIB)
    told = [memory for memory in range(101, 131) if measured.ends_window(memory * MIB, 0)]
    assert told == [110, 121]


@needs_proc
def test_memory_and_processor_time_are_read_of_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are those of the process, by its pid too; of one that has ended, and where there is no /proc, nothing is known."""
    own = resident_memory()
    assert own is not None
    assert 10 * MIB < own < 4000 * MIB
    assert resident_memory(os.getpid()) == pytest.approx(own, rel=0.2)
    begin, times = processor_seconds(), os.times()
    assert begin == pytest.approx(times.user + times.system, abs=0.5)
    ended = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(ended, 0)
    assert (resident_memory(ended), processor_seconds(ended)) == (None, None)
    with monkeypatch.context() as patch:
        patch.setattr(usage, "PROC", "/nowhere")
        unknown = ProcessUsage(lambda: [os.getpid()])
        unknown.begin()
        assert not unknown.is_to_be_told(unknown._until)
    assert (unknown.memory, unknown.cpu) == (None, None)


async def seen(admin: Admin) -> WorkerProcess:
    """Return the only process that serves queues."""
    [process] = await admin.aworker_processes()
    return process


async def test_a_change_costs_one_command(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A worker tells its usage when it registers, and a change of it once, through one of its queues, while windows go by.

    People see what was told last, whichever registration they look at.
    """
    memory, looks, told = [100 * MIB], [0], list[str]()
    describe = worker_commands.describe

    def counted(keys: Any, worker: str, about: bytes) -> Any:
        told.append(keys.queue)
        return describe(keys, worker, about)

    def measured(self: ProcessUsage) -> tuple[int, dict[int | str, float]]:
        looks[0] += 1
        return memory[0], {"self": 1.0}

    monkeypatch.setattr(usage, "WINDOW", 0.01)
    monkeypatch.setattr(usage, "LEAST_LAG", math.inf)
    monkeypatch.setattr(ProcessUsage, "_measure", measured)
    monkeypatch.setattr(worker_commands, "describe", counted)

    async def look_again() -> None:
        before = looks[0]
        await auntil(lambda: looks[0] >= before + 3)

    for name in ("first", "second", "third"):
        app.task(name=name, queue=name)(lambda: None)
    admin = Admin(app.client)
    async with working(app):
        await look_again()
        assert ((await seen(admin)).memory, (await seen(admin)).cpu, told) == (100 * MIB, 0, [])
        memory[0] = 150 * MIB
        await auntil(lambda: told)
        await auntil(lambda: _has_memory(admin, 150 * MIB))
        await look_again()
        assert len(told) == 1
        process = await seen(admin)
        assert len({one.about["memory"] for one in process.members}) == 2
        assert process.about["memory"] == 150 * MIB


async def _has_memory(admin: Admin, least: int) -> bool:
    return ((await seen(admin)).memory or 0) >= least


@needs_proc
async def test_jobs_that_compute_are_seen(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker uses what its jobs use: processor time of a thread, and memory that it holds."""
    monkeypatch.setattr(usage, "WINDOW", 0.5)
    over = threading.Event()

    @app.task
    def compute() -> int:
        held = bytearray(os.urandom(MIB)) * 64
        while not over.is_set():
            sum(range(1000))
        return len(held)

    admin = Admin(app.client)
    async with working(app) as worker:
        before = worker._usage.memory
        assert before is not None
        await compute.aenqueue()
        try:
            await auntil(lambda: _has_memory(admin, before + 48 * MIB))
            await auntil(lambda: _uses_processor(admin))
        finally:
            over.set()


async def _uses_processor(admin: Admin) -> bool:
    return ((await seen(admin)).cpu or 0) >= usage.LEAST_CPU


@needs_proc
async def test_job_processes_count_too(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a worker is that of the processes too in which its jobs run."""
    monkeypatch.setattr(usage, "WINDOW", 0.2)
    nothing = process_app.app.tasks["support.process_app.nothing"].function
    task = app.task(name="support.process_app.nothing", run_in="process")(nothing)
    admin = Admin(app.client)
    async with working(app, reference="support.process_app:app") as worker:
        await (await task.aenqueue()).aresult(timeout=60)
        [pid] = worker.executor.processes.pids
        found = resident_memory(pid)
        assert found is not None
        assert found > LEAST_MEMORY
        own = resident_memory()
        assert own is not None
        assert worker._usage._measure()[0] == pytest.approx(own + found, abs=8 * MIB)
        assert set(worker._usage._measure()[1]) == {"self", pid}
        # A tenth of the memory of the worker may be more than what one process adds.
        monkeypatch.setattr(usage, "LEAST_SHARE", 0.0)
        await auntil(lambda: _has_memory(admin, own + found - 16 * MIB))
