"""The command line as a shell calls it: a process of its own, its two streams and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from testbed.fork_server import ForkServer, Program

FORK_SERVER = ForkServer()
SOURCES = Path(__file__).parents[2] / "src"
_WAITS = """
import atexit, os, runpy, sys, time

began, waited = time.monotonic(), [0.0]
time.monotonic = lambda: began + waited[0]
time.sleep = lambda seconds: waited.append(waited.pop() + seconds)
descriptor = int(sys.argv.pop(1))
atexit.register(lambda: os.write(descriptor, str(waited[0]).encode()))
sys.argv[0] = "conveyor"
runpy.run_module("conveyor", run_name="__main__", alter_sys=True)
"""


@dataclass
class Shell:
    """Runs `conveyor …` in *directory* against *url*; nothing of the tests' own environment reaches it."""

    directory: Path
    url: str | None = None

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the variables that a command sees."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CONVEYOR_", "PYTEST"))}
        kept.pop("PYTHONUNBUFFERED", None)  # with it a line of print() is two writes: a log line may come between
        kept |= {"PYTHONPATH": str(SOURCES), "PYTHONDONTWRITEBYTECODE": "1"}
        return kept | ({"CONVEYOR_URL": self.url} if self.url else {}) | extra

    def run(self, *arguments: str, stdin: str | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end, in a process that need not import for it: see `fork_server`."""
        environment = self.environment(**extra)
        done = FORK_SERVER.run(list(arguments), cwd=self.directory, env=environment, stdin=stdin, timeout=60)
        return done or subprocess.run(
            [sys.executable, "-m", "conveyor", *arguments],
            cwd=self.directory,
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run_waiting(self, *arguments: str, **extra: str) -> tuple[subprocess.CompletedProcess[str], float]:
        """
        Run one command on a clock that moves by its own pauses alone; return also how many seconds these add up to.

        A busy machine does not change them.
        """
        ours, theirs = os.pipe()
        try:
            done = subprocess.run(
                [sys.executable, "-c", _WAITS, str(theirs), *arguments],
                cwd=self.directory,
                env=self.environment(**extra),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs,),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            os.close(theirs)
        with os.fdopen(ours) as pipe:
            return done, float(pipe.read())

    def start(self, *arguments: str, **extra: str) -> Program | subprocess.Popen[str]:
        """Start one command and leave it running."""
        environment = self.environment(**extra)
        program = FORK_SERVER.start(["conveyor", *arguments], cwd=self.directory, env=environment)
        return program or self.start_anew(*arguments, **extra)

    def start_anew(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        """Start one command in an interpreter of its own: the system shows its words and variables."""
        return subprocess.Popen(
            [sys.executable, "-m", "conveyor", *arguments],
            cwd=self.directory,
            env=self.environment(**extra),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def write(self, name: str, text: str) -> None:
        """Write a file into the working directory of the commands."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
