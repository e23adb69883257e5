"""ctrl-C in a program that takes messages or waits for a result: real signals to real programs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conveyor.jobs.app import Conveyor
from support.shell import Shell
from support.waiting import until_said

EXAMPLES = Path(__file__).parents[2] / "examples"
BEGIN = "import asyncio, time\nfrom conveyor import Conveyor\napp = Conveyor()\nmail = app.queue('mail')\napp.ping()\n"
WAITS = {
    "consume": "print('here', flush=True)\nfor message in mail.consume(): pass",
    "batches": "print('here', flush=True)\nfor batch in mail.batches(): pass",
    "pull": "print('here', flush=True)\nmail.pull(wait='60s')",
    "result": "job = app.enqueue('nobody')\nprint('here', flush=True)\njob.result()",
}
LINES = 12
"""Lines that a traceback may have: the call in the program, and where the library ends. A whole stack has 30 and more."""


def interrupted(program: list[str], url: str, directory: Path) -> tuple[int, str, str]:
    """Run *program*, send it a SIGINT when it says that it is there, and return its exit code and what it printed."""
    process = subprocess.Popen(
        [sys.executable, *program], cwd=directory, env=Shell(directory, url).environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until_said(process)
    try:
        process.wait(1)  # until it waits; the law holds earlier too
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.leaves_keys("a job that nobody runs")
@pytest.mark.parametrize("name", WAITS)
def test_a_wait_ends_the_program_in_few_lines(name: str, url: str, tmp_path: Path) -> None:
    """A program that waits ends by its interrupt, as Python programs do, and shows its own line instead of our stack."""
    code, _, errors = interrupted(["-c", BEGIN + WAITS[name]], url, tmp_path)

    assert code == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert len(errors.splitlines()) <= LINES, errors


@pytest.mark.parametrize("awaited", [False, True])
def test_the_message_in_hand_is_handed_back(awaited: bool, url: str, tmp_path: Path) -> None:
    """A message whose body is interrupted is ready again at once, and nothing is charged to it."""
    blocking = "for message in mail.consume():\n  with message: print('here', flush=True); time.sleep(60)"
    asynchronous = (
        "async def main():\n async for message in mail.aconsume():\n"
        "  async with message: print('here', flush=True); await asyncio.sleep(60)\nasyncio.run(main())"
    )
    with Conveyor(url) as app:
        mail = app.queue("mail")
        mail.push(1)
        code, _, _ = interrupted(["-c", BEGIN + (asynchronous if awaited else blocking)], url, tmp_path)
        assert code == -signal.SIGINT
        stats = mail.stats()
        assert (stats.ready, stats.leased, stats.workers) == (1, 0, 0)
        [message] = mail.pull()
        assert (message._leased.history.failures, message._leased.history.crashes) == (0, 0)
        message.ack()


@pytest.mark.leaves_keys("pushed by an example")
@pytest.mark.parametrize("name", ["conveyor_producer", "async_web_handler"])
def test_examples_end_without_a_traceback(name: str, url: str) -> None:
    """An example that runs until it is stopped ends with exit code 0 and prints no traceback."""
    arguments = ["0"] if name == "async_web_handler" else []
    code, _, errors = interrupted([f"{name}.py", *arguments], url, EXAMPLES)

    assert (code, "Traceback" in errors) == (0, False), errors
