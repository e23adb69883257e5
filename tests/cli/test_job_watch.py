"""`conveyor job watch` and progress bars: states as lines, the progress as a bar on a terminal, and the exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from conveyor.events import JobEnded, ProgressChanged
from conveyor.jobs import progress_bar
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import current
from conveyor.jobs.progress_bar import ProgressBar, progress_line
from conveyor.payload.records import AttemptHistory
from conveyor.store.operations import Settlement
from support.app_fixtures import blocking_app  # noqa: F401
from support.manual_worker import ManualWorker, drain
from support.running_worker import working
from support.shell import Shell
from support.terminal import on_terminal
from support.time_limits import PATIENCE
from support.waiting import auntil, until, until_said


class Terminal(io.StringIO):
    """A terminal that remembers what was drawn."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_updates_as_lines_and_documents(shell: Shell, app: Conveyor) -> None:
    """In a pipe each update is a line, with --json a document; a job that died makes the command exit 7."""
    job = app.external_task("shop.pay").enqueue(1)
    manual = ManualWorker(app)
    [id_] = manual.take()
    manual.dead(id_, None)
    manual.leave()
    done, shown = shell.run("job", "watch", job.id), shell.run("job", "watch", job.id, "--json")
    assert (done.returncode, shown.returncode) == (7, 7)
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["ready", "leased", "dead"]
    documents = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [one["kind"] for one in documents] == ["StateChanged", "StateChanged", "JobEnded"]
    assert {one["schema"] for one in documents} == {"conveyor/job-update@1"}
    assert shell.run("job", "watch", "default:0000000000000000000000").returncode == 5
    app.queue("default").purge(dead=True)


def test_ctrl_c_ends_only_the_watching(shell: Shell, app: Conveyor) -> None:
    """A SIGINT ends the command with 130; the job goes on."""
    job = app.external_task("shop.pay").enqueue(1)
    with subprocess.Popen(
        [sys.executable, "-m", "conveyor", "job", "watch", job.id], cwd=shell.directory, env=shell.environment(),
        stdout=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert "ready" in until_said(command)
        command.send_signal(signal.SIGINT)
        assert command.wait(PATIENCE) == 130
    assert job.status() == "ready"
    drain(app)


def test_a_bar_on_a_terminal(shell: Shell, app: Conveyor) -> None:
    """On a terminal the progress is a bar that goes away at the end; the states stay."""
    job = app.external_task("shop.pay").enqueue(1)
    manual = ManualWorker(app)
    [id_] = manual.take()
    state = AttemptHistory(progress=b'{"done":3,"total":12,"text":"resizing"}').encode()
    manual.turn(0, Settlement("M", id_, state=state))

    def end() -> None:
        until(lambda: app.client.execute("HLEN", manual.keys.waiters) == 1)
        manual.done(id_, 1)

    ending = threading.Thread(target=end)
    ending.start()
    shown = on_terminal(shell, "job", "watch", job.id)
    ending.join(PATIENCE)
    manual.leave()
    assert "██████░░░░░░░░░░░░░░░░░░   25%  3 of 12  resizing" in shown
    assert "done" in shown.splitlines()[-1]


async def test_a_result_with_a_bar(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`result(bar=True)` draws the progress and leaves the line empty; without a terminal nothing is drawn or watched."""
    terminal = Terminal()
    app = Conveyor(url)

    @app.task
    async def count() -> int:
        for number in range(1, 4):
            current().progress(number, 3, "counting")
        return 3

    calls: Any = [count.s() for _ in range(3)]
    async with app, working(app):
        job = await count.aenqueue()
        assert await job.aresult(bar=True) == 3
        monkeypatch.setattr(sys, "stderr", terminal)
        job = await count.options(delay="1h").aenqueue()
        result = asyncio.create_task(job.aresult(bar=True))
        await auntil(lambda: f"{job.id} is scheduled" in terminal.getvalue())
        assert await job.aupdate(delay=0)
        assert await result == 3
        jobs = await app.aenqueue_many(calls, bar=True)
        monkeypatch.undo()
        assert [await one.aresult() for one in jobs] == [3, 3, 3]
    drawn = terminal.getvalue()
    assert "3 of 3  enqueued" in drawn
    assert drawn.endswith("\r\x1b[K")


def test_a_line_fits_the_terminal() -> None:
    """A line says what is known, and is cut to the width; control characters of a job do not reach the terminal."""
    assert progress_line(1, None, "", None, 80) == "1"
    assert progress_line(None, None, "a\x1b[2Jb", None, 80) == "a\\x1b[2Jb"
    assert progress_line(5, 10, "x" * 200, 75.0, 60).startswith(
        "████████████░░░░░░░░░░░░   50%  5 of 10  1:15 left  xx"
    )
    assert len(progress_line(5, 10, "x" * 200, 75.0, 60)) == 59


def test_several_jobs_share_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several jobs one bar shows how far all are, and the time that is left counts from the first look, not from zero."""
    terminal, now = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_bar, "monotonic", lambda: now[0])

    def told(bar: ProgressBar, name: str, done: float, jobs: int) -> str:
        now[0] += 1
        bar.follow(ProgressChanged("1-leased-0", name, "leased", 1, None, done, 100, "rows"), jobs)
        return terminal.getvalue().rpartition("\x1b[K")[2]

    one = ProgressBar()
    assert [told(one, "a", done, 1).split("  ")[3:] for done in (90, 92, 94)][-1] == ["0:03 left", "rows"]
    assert told(one, "a", 0, 1).endswith("  0%  0 of 100  rows")  # a next attempt
    one.close()
    several = ProgressBar()
    assert told(several, "a", 50, 2).split("  ")[1:] == [" 25%", "0 of 2 jobs ended"]
    assert told(several, "b", 50, 2).split("  ")[1:] == [" 50%", "0 of 2 jobs ended"]
    now[0] += 1
    several.follow(JobEnded("1-done", "a", "done", 1, None), 2)
    assert terminal.getvalue().endswith(" 75%  1 of 2 jobs ended  0:01 left")
