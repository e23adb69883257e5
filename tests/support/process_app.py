"""The app of test_processes.py: a fresh process can load it by this module's name."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextvars import copy_context
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from conveyor import ConfigurationError, Context, Conveyor, Retry, RetryIn, Snooze, current
from conveyor.worker.execution.process_protocol import DoneReply, pack

app = Conveyor("unix:///nonexistent/conveyor.sock")


class Declined(Exception):
    """Has an `__init__` that cannot be called with a text."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(code, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"declined: {self.reason}"


class TooPoor(Declined, LookupError):
    pass


@dataclass(frozen=True)
class Frozen(Exception):
    field: int


@dataclass
class Point:
    x: int
    y: int


@app.lifespan
async def resources() -> AsyncIterator[dict[str, Any]]:
    loop = asyncio.get_running_loop()
    yield {"loop": loop, "pid": os.getpid()}
    if marker := os.environ.get("CLOSED_MARKER"):
        Path(marker).touch()


def process(**options: Any) -> Any:
    return app.task(run_in="process", **options)


@process()
def swap(point: Point, note: str = "-") -> Point:
    return Point(point.y, point.x)


@process()
def pid() -> int:
    return os.getpid()


@process()
def nothing() -> None:
    return None


@process(keep_result=0)
def unkept() -> int:
    return 5


@process()
def about(context: Context = current()) -> list[Any]:
    same = current() is context
    assert context.enqueued_at is not None
    made = context.enqueued_at.timestamp()
    return [context.job_id, context.task, context.queue, context.attempt, dict(context.headers), made, same]


@process()
async def on_loop(context: Context = current()) -> bool:
    await asyncio.sleep(0)
    return context.state["loop"] is asyncio.get_running_loop() and current() is context


@process()
def no_loop(context: Context = current()) -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return context.state["pid"] == os.getpid()
    return False


@process(retry=Retry(on=(LookupError,), give_up=(Declined,)))
def decline() -> None:
    raise TooPoor(402, reason="no money")


@process()
def fail(kind: str) -> None:
    class Local(KeyError):
        pass

    errors: dict[str, BaseException] = {
        "local": Local("gone"), "frozen": Frozen(3), "exit": SystemExit(7), "os": FileNotFoundError(2, "No such", "/x"),
        "cancelled": asyncio.CancelledError(), "stop": StopIteration(1), "interrupt": KeyboardInterrupt(),
        "group": ExceptionGroup("both", [ValueError("a"), Local("b")]), "unicode": UnicodeDecodeError("utf8", b"", 0, 1, "r"),
        "snooze": Snooze("5m"), "retry_in": RetryIn("7m"), "snooze_delta": Snooze(timedelta(minutes=5)),
        "snooze_wrong": Snooze(cast("Any", object())), "long": ValueError("m" * 100_000),
    }  # fmt: skip
    raise errors[kind]


@process()
def bad_result() -> int:
    return "five"  # type: ignore[return-value]


@process()
def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "close":
        os.closerange(3, 1 + max(map(int, os.listdir("/dev/fd"))))
        time.sleep(60)
    elif how == "forge":  # a report on another attempt
        os.write(int(sys.argv[2]), pack(DoneReply("default:other", 1, None)))
        time.sleep(60)
    elif how == "heir":  # a fork that goes on and holds all descriptors, as multiprocessing makes them
        if os.fork() == 0:
            time.sleep(60)
        os._exit(3)


@process()
def chatter(text: str) -> int:
    print(text)
    print(text * 20_000, file=sys.stderr)
    os.write(1, b"raw bytes\n")
    subprocess.run([sys.executable, "-c", "print(input.__name__)"], check=True)
    return len(sys.stdin.read())


@process()
def big(count: int) -> str:
    return "x" * count


@process()
def stay(place: str, name: str, hold: bool = False) -> str:
    """Write the pids of this process and of one it has started, then wait for the file `go`."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note = Path(place, name + ".part")
    note.write_text(f"{os.getpid()} {started.pid}")
    note.rename(Path(place, name))
    if hold:
        re.match("(a+)+$", "a" * 60 + "b")  # years, and never lets go of the lock
    while not Path(place, "go").exists():
        time.sleep(0.005)
    started.kill()
    started.wait()
    return name


@process()
def extend(ms: int, context: Context = current()) -> None:
    context.extend(ms / 1000)


@process()
def signalled() -> int:
    """Ask the whole group to stop, as a service manager does."""
    os.killpg(0, signal.SIGTERM)
    os.killpg(0, signal.SIGINT)
    return subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], check=False).returncode


@app.task(run_in="process")
def emit_parts(count: int) -> int:
    for number in range(count):
        current().emit({"number": number})
    return count


NEXT_RUNS, HAS_SPOKEN, REFUSED = threading.Event(), threading.Event(), list[str]()


@process()
def linger() -> int:
    """Leave a thread behind, which speaks for this job while the next one runs."""

    def speak() -> None:
        NEXT_RUNS.wait(60)
        context = current()
        context.progress(1, 2, "late")
        context.extend(0.001)
        try:
            context.emit("late")
        except ConfigurationError as error:
            REFUSED.append(error.code)
        HAS_SPOKEN.set()

    threading.Thread(target=copy_context().run, args=(speak,), daemon=True).start()
    return os.getpid()


@process()
def listen() -> list[Any]:
    """Run until a thread of an earlier job has spoken."""
    NEXT_RUNS.set()
    return [HAS_SPOKEN.wait(60), os.getpid(), REFUSED]


@process()
async def tell(place: str, context: Context = current()) -> None:
    """Say how far it is and note it; the first attempt then ends its process when the file *place* is there."""
    context.progress(context.attempt, 2, "telling")
    context.notes["attempts"] = [*context.notes.get("attempts", []), context.attempt]
    if context.attempt == 1:
        while not Path(place).exists():
            await asyncio.sleep(0.01)
        os._exit(3)
    context.progress(2, 2)


@process()
def complain(how: str) -> None:
    """Log two lines, then fail, or end the process when its worker has got them."""
    current().logger.warning("from %s", how)
    logging.getLogger("shop").warning("before the end")
    if how == "crash":
        time.sleep(0.6)
        os._exit(3)
    raise LookupError


@process(retry=Retry(attempts=2, backoff=["200ms"]))
def fail_twice() -> None:
    """Fail after 20 ms, at each attempt."""
    time.sleep(0.02)
    raise LookupError("no page")
