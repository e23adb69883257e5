"""`conveyor job update`, `job retry --again` and `job cancel --wait`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.cli import main
from support.manual_worker import drain as remove_jobs
from support.running_worker import drain, working
from support.waiting import auntil, until_ended, until_status

APP = """
import asyncio
import os

from conveyor import Conveyor

app = Conveyor(os.environ["CONVEYOR_URL"])


@app.task(name="send", retry=1)
async def send(to: str, n: int = 1) -> str:
    if to == "long":
        await asyncio.sleep(600)
    if "@" not in to:
        raise ValueError(to)
    return f"{to} {n}"
"""


@pytest.fixture
def app(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("CONVEYOR_URL", url)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "changed_mail.py").write_text(APP)
    import changed_mail  # type: ignore[import-not-found]

    yield changed_mail.app
    remove_jobs(changed_mail.app)
    changed_mail.app.close()


def test_jobs_are_changed_run_again_and_cancelled(app: Conveyor, capsys: pytest.CaptureFixture[str]) -> None:
    """Each does what it says, tells what it refuses, and its exit code says so too."""

    def run(*words: str, code: int = 0) -> str:
        assert main(words) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.err if code == 2 else printed.out.strip()

    async def work() -> None:
        await drain(app)
        await app.aclose()

    named = ("-A", "changed_mail:app")
    one = run("enqueue", *named, "send", "to=ada", "--in", "1h")
    assert "n='many'" in run("job", "update", *named, one, "n=many", code=2)
    assert "Nothing was changed." in run("job", "update", *named, one, "m=1", code=2)
    assert "Nothing is to change" in run("job", "update", one, code=2)
    assert run("job", "update", one, "--priority", "3").startswith(f"{one}\tchanged")
    assert run("job", "update", *named, one, "n=2", "to=ada@x", "--in", "0").startswith(f"{one}\tchanged")
    bad = run("enqueue", *named, "send", "to=nowhere")
    asyncio.run(work())
    assert run("job", "update", one, "--in", "5m", code=6).startswith(f"{one}\trefused\tit is done")
    _, outcome, again = run("job", "retry", *named, one, "--again").split("\t")
    assert outcome == "enqueued"
    assert f"origin\t{one}" in run("job", "show", again)
    asyncio.run(work())
    assert '"ada@x 2"' in run("job", "show", again)
    assert run("job", "cancel", bad, "--wait", code=6).startswith(f"{bad}\tdead\tValueError: nowhere")
    assert run("job", "retry", *named, "default:nobody", "--again", code=5).startswith("default:nobody\tnot found")

    waits = run("enqueue", *named, "send", "to=long")
    run("job", "cancel", waits, "--wait", "--dry-run")
    assert app.job(waits).status() == "ready"
    ready, over = threading.Event(), threading.Event()

    async def hold() -> None:
        async with working(app):
            await until_status(app.job(waits), "leased")
            ready.set()
            await auntil(over.is_set)
        await app.aclose()

    worker = threading.Thread(target=asyncio.run, args=(hold(),))
    worker.start()
    try:
        assert ready.wait(60)
        assert run("job", "cancel", waits, "--wait", "--timeout", "60s").startswith(
            f"{waits}\tcancelled\tJob {waits} was cancelled"
        )
    finally:
        over.set()
        until_ended(worker)
    assert run("job", "retry", *named, waits, "--again", code=6).startswith(f"{waits}\trefused\tThe arguments of job")
