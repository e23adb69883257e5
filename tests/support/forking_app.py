"""The app of test_forked_copies.py: jobs that fork, and whose child comes back from their function."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from conveyor import Context, Conveyor, current

app = Conveyor(os.environ.get("CONVEYOR_URL", "unix:///nonexistent/conveyor.sock"))
PLACE = Path(os.environ.get("FORKING_PLACE", "/nonexistent"))
PATIENCE = 5.0


def write(line: str) -> None:
    """Add a line to the journal; one write is not torn."""
    descriptor = os.open(PLACE / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def fork() -> bool:
    """Fork; tell whether this is the copy, whose pid is noted."""
    pid = os.fork()
    if pid:
        write(f"copy {pid}")
        PIDS.append(pid)
    return pid == 0


PIDS: list[int] = []


def exit_code() -> int:
    """Wait for the copy; return its exit code, or -999 when it lives on."""
    pid, deadline = PIDS.pop(), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return -999


def leave(how: str) -> str:
    """Come back from the function of a job, in the copy."""
    print("the copy prints this")
    if how == "exit":
        sys.exit(7)
    if how == "text":
        sys.exit("the copy says why")
    if how == "raise":
        raise ValueError("the copy fails")
    return "of the copy"


@app.task(run_in="thread", retry=1)
def on_a_thread(how: str) -> str | int:
    return leave(how) if fork() else exit_code()


@app.task(run_in="process", retry=1)
def in_a_process(how: str, context: Context = current()) -> str | int:
    if fork():
        context.extend(60)  # is not of this process
        return leave(how)
    return exit_code()


async def _fork_on_the_loop(how: str) -> str | int:
    if how.startswith("later"):
        await asyncio.sleep(0.001)
    if fork():
        if how.endswith("wait"):
            await asyncio.sleep(0)
        return leave(how)
    return exit_code()  # blocks the loop: nothing else runs meanwhile


@app.task(retry=1)
async def on_the_loop(how: str) -> str | int:
    return await _fork_on_the_loop(how)


@app.task(run_in="process", retry=1)
async def on_the_loop_of_a_process(how: str) -> str | int:
    return await _fork_on_the_loop(how)


@app.task(retry=1)
async def in_a_task_of_its_own() -> list[str | int]:
    return await asyncio.gather(_fork_on_the_loop("return"), _fork_on_the_loop("return"))


def _echo(kind: str, n: int, context: Context) -> int:
    write(f"ran {kind} {n} {context.attempt}")
    return n


@app.task(run_in="thread")
def echo_on_a_thread(n: int, context: Context = current()) -> int:
    return _echo("thread", n, context)


@app.task(run_in="process")
def echo_in_a_process(n: int, context: Context = current()) -> int:
    return _echo("process", n, context)


@app.task
async def echo_on_the_loop(n: int, context: Context = current()) -> int:
    if n % 2:
        await asyncio.sleep(0)
    return _echo("loop", n, context)
