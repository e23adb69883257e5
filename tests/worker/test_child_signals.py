"""The signals of a worker process while it comes up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.shell import SOURCES

PROGRAM = """
import asyncio, os, signal, sys, tempfile
from types import SimpleNamespace
from conveyor.worker.supervision import child_main

class Work:
    def __init__(self):
        self.asked = asyncio.Event()
    async def run(self):
        await asyncio.wait_for(self.asked.wait(), 20)
        return 7
    def stop(self):
        self.asked.set()
    hurry = quiet = stop

def collect(numbers):
    early = gathered(numbers)
    if when == "before the loop":
        os.kill(os.getpid(), signal.SIGTERM)
    return early

def tick():
    if when == "as it is up":
        os.kill(os.getpid(), signal.SIGTERM)

when = sys.argv[1]
gathered, child_main._collect = child_main._collect, collect
if sys.argv[2] == "asyncio":
    child_main._new_loop = asyncio.new_event_loop
alive, _ = os.pipe()
spec = SimpleNamespace(quiet=False, grace=1.0, app="jobs:app")
slot = SimpleNamespace(set_info=lambda info: None, tick=tick)
with tempfile.TemporaryFile() as stacks:
    os._exit(child_main._run(spec, slot, alive, stacks.fileno(), lambda spec, slot: (None, Work())))
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("when", ["before the loop", "as it is up"])
def test_a_stop_that_comes_while_a_process_comes_up_is_heard(when: str, loop: str) -> None:
    """A SIGTERM between the handlers and the loop, and one at the moment in which the process counts as up, stop it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, when, loop], env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
