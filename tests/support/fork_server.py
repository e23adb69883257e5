"""
An interpreter that has imported the command line already, and forks for each command that a test runs.

A command is a process of its own as ever, with its own environment, directory, streams and exit code: only the half
second of processor time is saved that a fresh interpreter imports for. As a program this file is that interpreter.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

_AT_START = ("PYTHON", "LC_", "LANG", "TZ", "LD_", "OPENSSL_")
"""Beginnings of the variables that an interpreter or its libraries read when they start."""


def of_the_start(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that cannot change once an interpreter runs."""
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


class ForkServer:
    """The process that forks; started at the first call, ended with the process of the tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._start: dict[str, str] = {}

    def run(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], stdin: str | None, timeout: float
    ) -> subprocess.CompletedProcess[str] | None:
        """Run `conveyor …` to its end; None where only a fresh interpreter could."""
        with self._lock:
            if self._channel is None:
                self._launch(env)
        if of_the_start(env) != self._start:
            return None
        command = ["conveyor", *arguments]
        with os.fdopen(os.memfd_create("request"), "w+b") as request:
            request.write(json.dumps([arguments, str(cwd), env]).encode())
            request.flush()
            pipes = [os.pipe() for _ in range(4)]  # its three streams, and what becomes of it
            theirs = [pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][1]]
            with self._lock:
                assert self._channel is not None
                socket.send_fds(self._channel, [b"."], [request.fileno(), *theirs])
        for descriptor in theirs:
            os.close(descriptor)
        return _follow(command, pipes[0][1], [pair[0] for pair in pipes[1:]], stdin, timeout)

    def _launch(self, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
            env={name: value for name, value in env.items() if not name.startswith("CONVEYOR_")},
        )  # fmt: skip
        theirs.close()
        assert ours.recv(1) == b"!", "the interpreter of the command line did not start"
        self._channel, self._start = ours, of_the_start(env)
        atexit.register(self._end, process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        assert self._channel is not None
        self._channel.close()
        process.wait()


def _follow(
    command: list[str], written: int, read: list[int], stdin: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Feed a command, and read its streams and its exit code to their ends."""
    found: dict[int, bytes] = {}

    def drain(descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as stream:
            found[descriptor] = stream.read()

    def feed() -> None:
        try:
            with os.fdopen(written, "wb") as stream:
                stream.write((stdin or "").encode())
        except BrokenPipeError:
            pass  # it did not want to read all of it

    status = os.fdopen(read[2], "rb")
    pid = int(status.readline())
    threads = [threading.Thread(target=drain, args=(one,), daemon=True) for one in read[:2]]
    threads.append(threading.Thread(target=feed, daemon=True))
    for thread in threads:
        thread.start()
    killer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with status:
        code = int(status.readline())
    overdue = not killer.is_alive()
    killer.cancel()
    for thread in (*threads, killer):
        thread.join()
    out, err = (found[one].decode().replace("\r\n", "\n").replace("\r", "\n") for one in read[:2])
    if overdue:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    return subprocess.CompletedProcess(command, code, out, err)


def _preload() -> None:
    import conveyor
    from conveyor.cli import COMMANDS

    for entry in COMMANDS.values():
        importlib.import_module(entry.target.partition(":")[0])
    for name in conveyor.__all__:
        getattr(conveyor, name)
    importlib.import_module("conveyor.admin.admin")
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
        os.write(status, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.close(status)
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request, "rb") as file:
        return json.load(file), streams


def _stream(descriptor: int, mode: str, like: TextIO) -> TextIOWrapper:
    """Open a stream as an interpreter does that starts with it."""
    opened = open(descriptor, mode, encoding=like.encoding, errors=like.errors, closefd=False)  # noqa: SIM115
    assert isinstance(opened, TextIOWrapper)
    return opened


def main() -> None:
    """Import, then be one command after another, each in a process of its own."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    _preload()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the parents of the commands
    channel.send(b"!")
    (arguments, directory, environment), streams = _serve(channel)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = _stream(0, "r", sys.stdin)
    sys.stdout = sys.__stdout__ = _stream(1, "w", sys.stdout)
    sys.stderr = sys.__stderr__ = _stream(2, "w", sys.stderr)
    sys.stderr.reconfigure(line_buffering=True)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["conveyor", *arguments]
    sys.path[0] = directory
    importlib.invalidate_caches()
    try:
        runpy.run_module("conveyor", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # to take apart what was imported is a third of what a command costs


if __name__ == "__main__":
    main()
