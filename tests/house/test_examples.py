"""The examples: each is run as a process of its own and prints what it says."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from support.shell import FORK_SERVER, Shell
from support.waiting import until_said

EXAMPLES = Path(__file__).parents[2] / "examples"

PRINTED = {
    "batches": ["all written: True", "fewer than ten calls: True"],
    "jobs_quickstart": ["Hello Ada.", "999000"],
    "messages_quickstart": ["urgent 100 attempt 1", "o1 1 attempt 1", "o3 3 attempt 1", "o2 2 attempt 2"],
    "back_pressure": ["never more than five: True", "each camera in order: True"],
    "partial_results": ["You asked: what is a queue? (6 words)"],
    "partitions": ["each customer in one partition: True", "partitions used: 4", "taken in order: 36 left: 0"],
    "schedules": [
        "At 08:30 on Monday (Europe/Berlin)",
        "Mondays: True",
        "two beats, a second apart: True",
    ],
    "watching": [
        "attempt 1 runs",
        "attempt 1 failed: OSError: the disk is full",
        "attempt 2 runs",
        "done",
        "resized by the last attempt: 3",
        "at the end: 6 of 6",
    ],
    "webhooks": ["['dead', 'done']"],
    "dependencies": [
        "connection opened",
        "Hello Ada.",
        "Hello Bob.",
        "Hello Test.",
    ],
    "retries": ["ada served at attempt 3", "patient ran 3 times", "PermissionError: not for eve"],
    "rpc": ["0.25", "ZeroDivisionError: float division by zero", "the worker ended with 0"],
    "topics": [
        "welcome-mails user.created {'id': 1, 'name': 'Ada'}",
        "user-audit user.deleted {'id': 1}",
        "newsletter user.created {'id': 2, 'name': 'Grace'}",
        "user.* published 0 subscribers user-audit",
        "user.created published 2",
    ],
    "unique_jobs": ["1 job, published home 5", "rerun 1", "indexed home 1 then indexed home 5"],
    "transactions": ["delivered: 1", "('o1', 1)"],
    "virtual_transport": ["received to mail", "received to images", "waiting after the requeue: 1", "purged: 1"],
    "limits_and_groups": [
        "took long enough: True",
        "at most 2 of a tenant at a time",
        "booked in order: [0, 1, 2]",
    ],
    "lifespan_and_middleware": ["opened", "name t1", "Ada", "closed"],
}
PAIRED = {
    f"{kind}_{side}" for kind in ("plain", "conveyor") for side in ("producer", "consumer")
}  # in test_plain_list.py


@pytest.mark.leaves_keys("some show dead letters")
@pytest.mark.parametrize("name", PRINTED)
def test_example_does_what_it_says(name: str, url: str) -> None:
    """An example runs by itself, prints what is expected in that order, and exits 0."""
    example = FORK_SERVER.start([f"{name}.py"], cwd=EXAMPLES, env=Shell(EXAMPLES, url).environment())
    assert example is not None
    printed, errors = example.communicate(timeout=240)
    assert example.returncode == 0, errors
    lines = iter(printed.splitlines())
    for expected in PRINTED[name]:
        assert any(expected in line for line in lines), f"{expected!r} is not in order in:\n{printed}\n{errors}"


@pytest.mark.leaves_keys("it is ended by a signal, like a web server, and not by the end of its worker")
def test_web_handler_answers(url: str) -> None:
    """A request enqueues and is answered with an id, under which the job can be asked for."""
    process = subprocess.Popen(
        [sys.executable, "async_web_handler.py", "0"], cwd=EXAMPLES, env=Shell(EXAMPLES, url).environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = until_said(process).split()[-1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/thumbnail/cat.png", timeout=10) as answer:
            assert answer.status == 202
            job = answer.read().decode()
        for _ in range(100):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/job/{job}", timeout=10) as answer:
                status = answer.read().decode()
            if status == "done":
                break
        assert status == "done"
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def test_examples_are_short_and_tested() -> None:
    """Each example is run by a test, and fits on a screen, but for one that a page shows in parts."""
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == {*PRINTED, *PAIRED, "async_web_handler"}
    long = {"virtual_transport": 90}  # a class of sixty lines that a page shows, and its use
    assert [name for name, path in files.items() if len(path.read_text().splitlines()) > long.get(name, 42)] == []
