"""A worker for development: it starts anew when a source file changes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from conveyor import Conveyor
from conveyor.worker.supervision.reload import SourceWatcher
from support.shell import Shell
from support.waiting import until

APP = """
from conveyor import Conveyor
app = Conveyor()
@app.task(name="say")
def say() -> str:
    return "{}"
"""


def test_a_watcher_sees_what_came_went_and_changed(tmp_path: Path) -> None:
    """Python files below the folders count, and no hidden or installed ones."""
    for name in ("a.py", "b.py", "pkg/c.py", ".venv/d.py", "__pycache__/e.py", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    watcher = SourceWatcher((tmp_path,))
    for name in ("a.py", "pkg/c.py", ".venv/d.py", "__pycache__/e.py", "note.txt", "new.py"):
        (tmp_path / name).write_text("22")
    (tmp_path / "b.py").unlink()
    found = until(watcher.changed)
    assert [os.path.relpath(one, tmp_path) for one in found] == ["a.py", "b.py", "new.py", "pkg/c.py"]
    assert not until(lambda: [watcher.changed()])[0]


@pytest.mark.row("A43")
def test_a_worker_runs_the_code_of_now(url: str, tmp_path: Path) -> None:
    """A change replaces the process; code that cannot be imported waits for the next change, and loses no job."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", APP.format("one"))
    with Conveyor(url) as app, shell.start("dev", "shop:app", "--no-dashboard") as dev:
        say = app.external_task("say", queue="default")
        assert dev.stderr is not None
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(iter(dev.stderr.readline, "")), daemon=True)
        reader.start()
        try:
            assert say.enqueue().result(timeout="60s") == "one"
            shell.write("shop.py", APP.format("another"))
            until(lambda: any("Reload: shop.py changed" in line for line in log))
            assert until(lambda: (found := say.enqueue().result(timeout="60s")) == "another" and found)
            until(lambda: any("Reload: done, 1 task: say" in line for line in log))

            shell.write("shop.py", "this is no Python")
            until(lambda: any("the next change of a source file" in line for line in log))
            assert any("SyntaxError" in line for line in log)
            assert not [line for line in log if "importlib" in line or "child_main" in line]  # only the app's own lines
            job = say.enqueue()
            shell.write("shop.py", APP.format("mended"))
            assert job.result(timeout="60s") == "mended"
            until(lambda: sum("Reload: done" in line for line in log) == 2)
        finally:
            dev.send_signal(signal.SIGINT)
            assert dev.wait(60) == 0, "".join(log)
            reader.join()
