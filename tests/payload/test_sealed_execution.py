"""Sealed payloads in every place where jobs run: on the loop, on threads, in processes, behind middlewares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.shell import Shell
from testbed.server_process import Server

JOBS = """
import os
from conveyor import Conveyor, FileStore, Middleware, current

app = Conveyor(
    keys={"2026-11": "k" * 32}, encrypt=True, compress="1KiB", large=FileStore("blobs"), large_above="2KiB"
)
order = []

if os.environ.get("CHAIN"):

    @app.middleware
    class Note(Middleware):
        async def run(self, context, call_next):
            return await call_next()


@app.task(name="loop", version=2, upcast=lambda version, arguments: {"text": arguments["t"]})
async def loop(text: str) -> int:
    return len(text)


@app.task(name="thread")
def thread(text: str) -> int:
    current().spawn(loop.s(text + "!"))
    return len(text)


@app.task(name="process", run_in="process")
def process(text: str) -> int:
    assert os.getppid() != 1
    return len(text)
"""

ASK = """
import json, sys
from jobs import app

texts = ["small", "x" * 9000, "".join(map(chr, range(33, 3033)))]
jobs = [app.tasks[name].enqueue(text) for name in ("loop", "thread", "process") for text in texts]
print(json.dumps([job.result("30s") for job in jobs]))
"""


@pytest.mark.parametrize("chain", ["", "1"], ids=["bare", "middlewares"])
def test_sealed_jobs_run_wherever_jobs_run(tmp_path: Path, url: str, server: Server, chain: str) -> None:
    """Small, compressed and stored arguments reach tasks of each kind, under a supervisor and its processes."""
    import subprocess

    shell = Shell(tmp_path, url)
    shell.write("jobs.py", JOBS)
    worker = shell.start("worker", "jobs:app", "--processes", "1", CHAIN=chain)
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], cwd=tmp_path, env=shell.environment(CHAIN=chain), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        worker.terminate()
        _, error = worker.communicate(timeout=60)
    assert json.loads(done.stdout) == [5, 9000, 3000] * 3, error
    with server.client() as client:
        assert client.hgetall("conveyor:{default}:jobs") == {}, error
    assert list((tmp_path / "blobs").glob("??/*")) == []
