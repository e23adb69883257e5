"""
An interpreter that has imported Conveyor already, and forks for each program that a test runs.

A program is a process of its own as ever, with its own environment, directory, streams and exit code: only the half
second of processor time is saved that a fresh interpreter imports for. As a program this file is that interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Self, TextIO

_AT_START = ("PYTHON", "LC_", "LANG", "TZ", "LD_", "OPENSSL_")
"""Beginnings of the variables that an interpreter or its libraries read when they start."""


def of_the_start(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that cannot change once an interpreter runs."""
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


class Program:
    """A program that the interpreter has forked, as `subprocess.Popen` shows one."""

    def __init__(self, words: list[str], status: int, streams: list[int | None]) -> None:
        """Read its pid from the pipe *status*, its end later; *streams* are our ends of pipes to its own, where there are any."""
        self.args = words
        self.returncode: int | None = None
        modes = zip(streams, "wrr", strict=True)
        self.stdin, self.stdout, self.stderr = (None if one is None else os.fdopen(one, mode) for one, mode in modes)
        self._lock, self._status = threading.Lock(), os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._status.readline())

    def __del__(self) -> None:
        """Close the pipe, which more than one thread may wait at until then."""
        self._status.close()

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended; negative for a signal."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        with self._lock:
            if self.returncode is None:
                self.returncode = int(self._status.readline())
            return self.returncode

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def communicate(self, given: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Write *given*, read both streams to their ends, and wait."""
        found = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            with stream:
                found[number] = stream.read()

        def write(stream: TextIO) -> None:
            with suppress(BrokenPipeError):  # it did not want to read all of it
                if given:
                    stream.write(given)
                stream.close()

        told = [(number, one) for number, one in enumerate((self.stdout, self.stderr)) if one is not None]
        threads = [threading.Thread(target=read, args=one, daemon=True) for one in told]
        if self.stdin is not None:
            threads.append(threading.Thread(target=write, args=(self.stdin,), daemon=True))
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return found[0], found[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the streams and wait, as `subprocess.Popen` does."""
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                stream.close()
        self.wait()


class ForkServer:
    """The process that forks; started at the first call, ended by `close` or with the process of the tests."""

    def __init__(self, warm: ForkServer | None = None, *, ours: Path = Path(), source: Path = Path()) -> None:
        """
        Args:
            warm: forks this one, which then imports Conveyor anew and nothing else; None: a fresh interpreter.
            ours: the folder on PYTHONPATH from which *warm* imported Conveyor.
            source: the folder that stands there instead.
        """
        self._warm, self._ours, self._source = warm, str(ours), str(source)
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._process: Any = None
        self._start: dict[str, str] = {}

    def run(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], stdin: str | None, timeout: float
    ) -> subprocess.CompletedProcess[str] | None:
        """Run `conveyor …` to its end; None where only a fresh interpreter could."""
        program = self.start(["conveyor", *arguments], cwd=cwd, env=env)
        if program is None:
            return None
        try:
            out, error = program.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
        return subprocess.CompletedProcess(program.args, program.wait(), out, error)

    def start(
        self, words: list[str], *, cwd: Path, env: dict[str, str], streams: list[int] | None = None,
        new_session: bool = False,
    ) -> Program | None:  # fmt: skip
        """
        Start a module by its name, or a file of Python, with arguments; None where only a fresh interpreter could.

        Args:
            words: the module or file, and the arguments.
            cwd: its directory.
            env: its environment.
            streams: the descriptors of its three streams; None: pipes.
            new_session: it leads a session, and so a process group, of its own.
        """
        with self._lock:
            if self._channel is None and env.get("LD_PRELOAD") == os.environ.get("LD_PRELOAD"):
                self._launch(env)
        if of_the_start(env) != self._start:
            return None
        status = os.pipe()
        pipes = [] if streams is not None else [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]] if streams is None else streams
        with os.fdopen(os.memfd_create("request"), "w+b") as request:
            request.write(json.dumps([words, str(cwd), env, new_session]).encode())
            request.flush()
            with self._lock:
                assert self._channel is not None
                socket.send_fds(self._channel, [b"."], [request.fileno(), *theirs, status[1]])
        os.close(status[1])
        for descriptor in theirs if pipes else ():
            os.close(descriptor)
        ours: list[int | None] = [pipes[0][1], pipes[1][0], pipes[2][0]] if pipes else [None] * 3
        return Program(words, status[0], ours)

    def _launch(self, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        # Not those of one program besides, such as its TMPDIR: others are forked from here.
        others = {name: value for name, value in os.environ.items() if not name.startswith(("CONVEYOR_", *_AT_START))}
        base = others | of_the_start(env)
        with theirs, Path(os.devnull).open("wb") as nothing:
            if self._warm is None:
                command = [sys.executable, __file__]
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=nothing, stderr=nothing, cwd="/", env=base
                )
            else:
                there = base | {"PYTHONPATH": base["PYTHONPATH"].replace(self._source, self._ours)}
                words, streams = [__file__, self._ours, self._source], [theirs.fileno(), *2 * [nothing.fileno()]]
                self._process = self._warm.start(words, cwd=Path("/"), env=there, streams=streams)
        assert ours.recv(1) == b"!", "the interpreter that forks did not start"
        self._channel, self._start = ours, of_the_start(env)
        atexit.register(self.close)

    def close(self) -> None:
        """End the process and wait for its end; programs that it forked go on."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
                self._process.wait()
        atexit.unregister(self.close)


_OF_TESTS = ForkServer()


def start_program(words: list[str], env: dict[str, str], log: IO[bytes]) -> Program | subprocess.Popen[bytes]:
    """Start a module of the tests, which finds all that they find and writes into a file."""
    env = {**env, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with Path(os.devnull).open("rb") as nothing:
        streams = [nothing.fileno(), log.fileno(), log.fileno()]
        program = _OF_TESTS.start(words, cwd=Path.cwd(), env=env, streams=streams)
        command = [sys.executable, "-m", *words]
        return program or subprocess.Popen(command, env=env, stdin=nothing, stdout=log, stderr=log)


def _replace(ours: str, source: str) -> None:
    """Forget Conveyor as it was imported from the folder *ours*; *source* stands in its place on the path."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "conveyor"]:
        del sys.modules[name]
    sys.path[:] = [source if path == ours else path for path in sys.path]
    importlib.invalidate_caches()


def _preload() -> None:
    import conveyor
    from conveyor.cli import COMMANDS

    for entry in COMMANDS.values():
        importlib.import_module(entry.target.partition(":")[0])
    for name in conveyor.__all__:
        getattr(conveyor, name)
    for name in ("admin.admin", "worker.embedded", "worker.supervision.supervisor", "worker.worker"):
        importlib.import_module(f"conveyor.{name}")
    importlib.import_module("redis.asyncio")


def _serve(channel: socket.socket) -> tuple[Any, list[int]]:
    """Fork for each request; return, in the process that is to be the command, the request and its three streams."""
    while True:
        told, descriptors, _, _ = socket.recv_fds(channel, 1, 5)
        if not told:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    request, *streams, status = descriptors
    if pid := os.fork():  # its parent, which says how it ended
        for descriptor in streams:
            os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request, "rb") as file:
        *found, new_session = json.load(file)
    if new_session:
        os.setsid()
    os.write(status, f"{os.getpid()}\n".encode())
    os.close(status)
    return found, streams


def _stream(descriptor: int, mode: str, like: TextIO, *, line_buffering: bool) -> TextIO:
    """Open a stream as an interpreter does that starts with it."""
    stream = open(descriptor, mode, encoding=like.encoding, errors=like.errors, closefd=False)  # noqa: SIM115
    assert isinstance(stream, TextIOWrapper)
    if line_buffering:
        stream.reconfigure(line_buffering=True)
    return stream


def main() -> None:
    """Import, then be one program after another, each in a process of its own; requests come through standard input."""
    channel = socket.socket(fileno=0)
    if sys.argv[1:]:
        _replace(*sys.argv[1:])
    _preload()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the parents of the programs
    channel.send(b"!")
    ((program, *arguments), directory, environment), streams = _serve(channel)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = _stream(number, mode, getattr(sys, name), line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    sys.path[0] = directory
    importlib.invalidate_caches()
    code = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take apart what was imported is a third of what a command costs


if __name__ == "__main__":
    main()
