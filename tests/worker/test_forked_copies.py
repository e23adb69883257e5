"""Jobs that fork: the copy of the worker ends with the code of the job, and the worker's own jobs run once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor
from support import forking_app
from support.running_worker import audit

ENDS = {"return": 0, "exit": 7, "text": 1, "raise": 1, "wait": 1, "later return": 0, "later wait": 1}
AROUND = 12


class ForkingWorker:
    """A supervised worker of the app whose jobs fork."""

    def __init__(self, url: str, place: Path) -> None:
        paths = os.pathsep.join([str(place), *(path for path in sys.path if path)])
        env = os.environ | {"PYTHONPATH": paths, "CONVEYOR_URL": url, "FORKING_PLACE": str(place)}
        self._command = [sys.executable, "-m", "conveyor", "worker", "support.forking_app:app", "--burst"]
        self._env, self._place = env, place

    def run(self, *options: str) -> str:
        """Work until everything is drained; return the log."""
        with (self._place / "log").open("wb") as log:
            process = subprocess.Popen(
                [*self._command, *options], env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()
                for line in self.journal("copy"):
                    self._kill(int(line[0]))
        return (self._place / "log").read_text()

    @staticmethod
    def _kill(pid: int) -> None:
        try:
            if Path(f"/proc/{pid}/environ").read_bytes().find(b"FORKING_PLACE") >= 0:
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass

    def journal(self, what: str) -> list[list[str]]:
        """Return the lines of that kind."""
        try:
            lines = (self._place / "journal").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [words for kind, *words in map(str.split, lines) if kind == what]


@pytest.fixture
def worker(url: str, tmp_path: Path) -> ForkingWorker:
    return ForkingWorker(url, tmp_path)


@pytest.fixture
async def app(url: str) -> Any:
    async with Conveyor(url) as app:
        for task in forking_app.app.tasks.values():
            app.task(name=task.name)(task.function)
        yield app


@pytest.mark.row("A91")
@pytest.mark.parametrize(
    ("task", "ways"),
    [
        ("on_a_thread", ["return", "exit", "text", "raise"]),
        ("in_a_process", ["return", "exit", "text", "raise"]),
        ("on_the_loop", list(ENDS)),
        ("on_the_loop_of_a_process", list(ENDS)),
    ],
)
async def test_a_copy_ends_with_its_job(app: Conveyor, worker: ForkingWorker, task: str, ways: list[str]) -> None:
    """
    The copy that a job forks ends as a program would when the job's code returns, exits, fails or waits.

    Its output is written. The jobs before, beside and after it run once and get their own results.
    """
    name = f"support.forking_app.{task}"
    echoes = [app.tasks[f"support.forking_app.echo_{kind}"] for kind in ("on_a_thread", "in_a_process", "on_the_loop")]
    forking, others = [], []
    for at, how in enumerate(ways):
        forking.append(await app.tasks[name].aenqueue(how))
        others += [(n, await one.aenqueue(n)) for n in range(AROUND * at, AROUND * (at + 1)) for one in echoes]

    log = await asyncio.to_thread(worker.run, "--concurrency", "4", "--threads", "2")

    found = [await job.aresult(timeout=60) for job in forking]
    assert found == [ENDS[how] for how in ways]
    assert [(n, await job.aresult(timeout=60)) for n, job in others] == [(n, n) for n, _ in others]
    ran = Counter(tuple(words) for words in worker.journal("ran"))
    assert set(ran.values()) == {1}
    assert len(ran) == len(others)
    assert {attempt for _, _, attempt in ran} == {"1"}
    waits = len([how for how in ways if how.endswith("wait")])
    assert log.count("the event loop is not its own") == waits
    printed = log.count("the copy prints this")
    assert printed == len(ways) - waits
    if "raise" in ways:
        assert "ValueError: the copy fails" in log
        assert log.count("the copy says why") == 1
    assert await audit(app) == []


@pytest.mark.row("A91")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_copy_made_in_a_task_of_a_job_ends(
    app: Conveyor, worker: ForkingWorker, tmp_path: Path, loop: str
) -> None:
    """A copy whose code is in another task of the loop ends before the loop gives it anything else to do."""
    if loop == "asyncio":  # a module of this name stands before the installed one
        (tmp_path / "uvloop.py").write_text("raise ImportError\n")
    job = await app.tasks["support.forking_app.in_a_task_of_its_own"].aenqueue()
    others = [await app.tasks["support.forking_app.echo_on_the_loop"].aenqueue(n) for n in range(AROUND)]

    log = await asyncio.to_thread(worker.run)

    assert (log.count("the copy prints this"), len(worker.journal("copy"))) == (2, 2)
    assert await job.aresult(timeout=60) == [1, 1]
    assert [await one.aresult(timeout=60) for one in others] == list(range(AROUND))
    assert set(Counter(tuple(words) for words in worker.journal("ran")).values()) == {1}
