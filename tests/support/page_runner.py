"""A reader of one page: saves its files, runs its Python, types its commands in a terminal, and compares."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from support.markdown_page import ROOT, Block
from support.shell import FORK_SERVER, Shell
from testbed.fork_server import Program

RETRY_FOR = 20.0
SNIPPETS = Path(__file__).parent / "snippet_runner.py"

_LOOSE = (
    (re.compile(r"[0-9A-Z_a-z~]{22}"), "<id>"),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?"), "<time>"),
    (re.compile(r"\bin \d+(\.\d+)? (d|h|m|s|ms)\b( \d+ (h|m|s)\b)?"), "in <time>"),
    (re.compile(r"\b\d+(\.\d+)?(e-\d+)? ?(ms|s|MB|kB)\b"), "<size>"),
    (re.compile(r"unix://[^\s,]+"), "<url>"),
    (re.compile(r"[^\s:]*/\.conveyor\b"), "<directory>"),
    (re.compile(r"\b\d+\.\d+\.\d+\b|\(not installed\)"), "<version>"),
    (re.compile(r"\s+"), " "),
)

_ERASED = re.compile(r"[^\n]*\r\x1b\[K")
"""A line that is erased, such as a progress bar, and with it the sequence that does so."""
_OF_SHELLS = re.compile(r"[|&;<>$`*?~#]")
_STAYS = re.compile(r"conveyor worker(?= |$)(?!.* --burst)")
"""Commands that run until ctrl-C."""


def loose(text: str) -> str:
    """Return a line without what differs from run to run: ids, times, sizes, places."""
    for pattern, name in _LOOSE:
        text = pattern.sub(name, text)
    return text.strip()


def first_missing(expected: list[str], printed: str) -> str | None:
    """Return the first expected line that is not printed after those before it; ``…`` stands for anything."""
    lines = iter([loose(line) for line in printed.splitlines()])
    for line in expected:
        if line.strip() == "…":
            continue  # gaps are allowed anyway; this one is for people
        pattern = re.compile(re.escape(loose(line)).replace("…", ".*"))
        if not any(pattern.fullmatch(one) for one in lines):
            return line
    return None


class Terminal:
    """One command in a terminal of its own."""

    def __init__(self, command: str, directory: Path, environment: dict[str, str]) -> None:
        """Type it."""
        self.command = command
        self.printed = ""
        self._screen, inner = pty.openpty()
        self.process = _forked(command, directory, environment, inner) or subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=inner, stderr=inner,
            start_new_session=True,
        )  # fmt: skip
        os.close(inner)

    def read(self, seconds: float) -> bool:
        """Read what comes within that time; False when the command has closed its terminal."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._screen, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        self.printed = _ERASED.sub("", self.printed + data.decode("utf-8", "replace").replace("\r\n", "\n"))
        return bool(data)

    def wait_for(self, expected: list[str]) -> str | None:
        """Read until *expected* is there, or the command has ended; return what is missing."""
        deadline = time.monotonic() + RETRY_FOR
        while True:
            ended = not self.read(0.05)
            whole = self.printed if ended else self.printed.rpartition("\n")[0]
            missing = first_missing(expected, whole)
            if missing is None or ended or time.monotonic() > deadline:
                return missing

    def finish(self) -> int:
        """Read to the end and return the exit code."""
        deadline = time.monotonic() + RETRY_FOR
        while self.read(0.05):
            assert time.monotonic() < deadline, f"$ {self.command}\ndoes not end:\n{self.printed}"
        return self.process.wait(RETRY_FOR)

    def interrupt(self) -> None:
        """Press ctrl-C when the command is at rest, as a person does: its last output is complete."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            deadline, before = time.monotonic() + RETRY_FOR, ""
            while (now := self._effort()) != before and time.monotonic() < deadline:
                before = now
                self.read(0.15)
            os.killpg(self.process.pid, signal.SIGINT)

    def _effort(self) -> str:
        """Return the time that the command has used its processor for; other than before while it waits for one."""
        state, *fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return " ".join(fields[10:12]) if state == "S" else f"{state} {time.monotonic()}"

    def close(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._screen)


def _forked(command: str, directory: Path, environment: dict[str, str], screen: int) -> Program | None:
    """Start a command that is `conveyor` alone in a process that need not import for it: see `fork_server`."""
    words = shlex.split(command.removeprefix("exec "))
    if words[0] != "conveyor" or _OF_SHELLS.search(command):
        return None
    return FORK_SERVER.start(words, cwd=directory, env=environment, streams=[screen] * 3, new_session=True)


class PageRunner:
    """Does with the blocks of a page what a person does."""

    def __init__(self, directory: Path, url: str | None) -> None:
        """Work in *directory*; without *url* the commands have the embedded server of that project."""
        self.directory = directory
        (directory / "pyproject.toml").touch()
        programs = directory / "bin"
        programs.mkdir()
        for name, words in {"python": "", "conveyor": " -m conveyor"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
            (programs / name).chmod(0o755)
        path = f"{programs}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        self.environment = Shell(directory, url).environment(
            PATH=path, NO_COLOR="1", COLUMNS="120", LINES="50", CONVEYOR_EXAMPLES=str(ROOT / "examples")
        )
        self._running: list[Terminal] = []
        self._snippets: Program | None = None

    def __enter__(self) -> PageRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the commands that the page has left running; each must end well."""
        try:
            for terminal in self._running:
                terminal.interrupt()
                code = terminal.finish()
                assert error or code == 0, f"$ {terminal.command}\nended with {code} on ctrl-C:\n{terminal.printed}"
        finally:
            for terminal in self._running:
                terminal.close()
            if self._snippets is not None:
                self._snippets.communicate(timeout=RETRY_FOR)

    def follow(self, block: Block, place: str) -> None:
        """Do what the block asks for."""
        if block.file is not None:
            path = self.directory / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.kind == "python":
            self.run(block, place)
        elif block.kind == "console":
            for command, expected in block.commands():
                self.type(command, expected, place)

    def type(self, command: str, expected: list[str], place: str) -> None:
        """Run one command and compare what it prints; a worker is left running, ``^C`` ends a program."""
        if command.startswith(("cd ", "export ")):
            self._remember(command)
            return
        interrupted = expected[-1:] == ["^C"]
        expected = expected[:-1] if interrupted else expected
        stays = bool(_STAYS.match(command))
        # Without a shell in between, which ctrl-C would end as well.
        terminal = Terminal(f"exec {command}" if interrupted or stays else command, self.directory, self.environment)
        if stays and not interrupted:
            self._running.append(terminal)
            missing = terminal.wait_for(expected)
        else:
            try:
                missing = terminal.wait_for(expected) if interrupted else None
                if interrupted:
                    terminal.interrupt()
                code = terminal.finish()
                missing = missing or first_missing(expected, terminal.printed)
                if code and not interrupted and not expected:
                    missing = f"nothing, but it ended with {code}"
            finally:
                terminal.close()
        assert missing is None, f"{place}: $ {command}\nshould print: {missing}\nprinted:\n{terminal.printed}"

    def run(self, block: Block, place: str) -> None:
        """Run a Python block where the ones before it have run."""
        if self._snippets is None:
            self._snippets = FORK_SERVER.start([str(SNIPPETS)], cwd=self.directory, env=self.environment)
            assert self._snippets is not None
        assert self._snippets.stdin is not None
        assert self._snippets.stdout is not None
        self._snippets.stdin.write(json.dumps([block.text, place]) + "\n")
        self._snippets.stdin.flush()
        printed = []
        while (line := self._snippets.stdout.readline()) and not line.startswith("\0"):
            printed.append(line)
        text = "".join(printed)
        assert line == "\0ok\n", f"{place}:\n{block.text}\nfailed:\n{text}"
        missing = first_missing(block.printed, text)
        assert missing is None, f"{place}:\n{block.text}\nshould print: {missing}\nprinted:\n{text}"

    def _remember(self, command: str) -> None:
        word, _, rest = command.partition(" ")
        if word == "export":
            name, _, value = rest.partition("=")
            self.environment[name] = value
