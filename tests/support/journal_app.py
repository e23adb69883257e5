"""
The app that the tests of failures run in real workers. Its jobs write each start and end into a journal, a line each.

With ``WORKERS_POINT=name`` a process kills itself when it passes that point and finds the file *name* to take away; the ids
of the jobs it was at go into the file ``struck``.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conveyor import Conveyor, Retry, current
from conveyor.worker import recycling
from conveyor.worker.execution import executor
from conveyor.worker.execution.executor import Executor
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from conveyor.worker.worker import Worker

executor.AFTER_TIMEOUT = float(os.environ.get("WORKERS_AFTER_TIMEOUT", "5"))
recycling.MIN_LIFE = float(os.environ.get("WORKERS_LEAST_LIFE", "10"))
PLACE = Path(os.environ.get("WORKERS_PLACE", "/nowhere"))
POINT = os.environ.get("WORKERS_POINT", "")
_RUNS = itertools.count()


def write(what: str, n: int, attempt: int | None = None) -> None:
    """Append a line in one write, so that lines of several processes do not mix: event, number, attempt, pid, instants."""
    line = f"{what} {n} {attempt or current().attempt} {os.getpid()} {time.monotonic():.4f} {time.time():.4f}\n"
    descriptor = os.open(PLACE / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


async def note(n: int, seconds: float = 0.0) -> str:
    write("start", n)
    await asyncio.sleep(seconds)
    write("end", n)
    return f"{current().attempt} {os.getpid()}"


def plain(n: int, seconds: float = 0.0) -> str:
    write("start", n)
    time.sleep(seconds)
    write("end", n)
    return f"{current().attempt} {os.getpid()}"


async def first(n: int) -> None:
    """Do not end at the first attempt, before there is a file *go*."""
    write("start", n)
    while current().attempt == 1 and not (PLACE / "go").exists():
        await asyncio.sleep(0.01)
    write("end", n)


async def block(n: int, seconds: float) -> str:
    """Hold up the event loop at the first attempt."""
    write("start", n)
    if current().attempt == 1:
        time.sleep(seconds)
    write("end", n)
    return f"{current().attempt} {os.getpid()}"


async def clutch(n: int, seconds: float) -> str:
    """Hold the interpreter's lock at the first attempt, as native code does: no thread of the process runs meanwhile."""
    write("start", n)
    if current().attempt == 1:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    write("end", n)
    return f"{current().attempt} {os.getpid()}"


async def poison(n: int, how: str) -> None:
    """End the process that runs it."""
    write("start", n)
    if how == "exit":
        os._exit(3)
    elif how == "kill":  # as the kernel does when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfault":
        ctypes.string_at(0)
    else:
        os.abort()


async def gathered(items: list[list[int]]) -> None:
    """Write down the items (number, and what it does), and end the process for a 13."""
    for (n, _), item in zip(items, current().items, strict=True):
        write("start", n, item.attempt)
    if any(does == 13 for _, does in items):
        ctypes.string_at(0)


async def deaf(n: int, seconds: float) -> None:
    """Swallow the first cancellation."""
    write("start", n)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(seconds)
    write("end", n)


LEAK: list[bytes] = []


async def leak(n: int, size: int, seconds: float = 0.0) -> None:
    """Keep so many bytes for ever."""
    write("start", n)
    LEAK.append(b"x" * size)
    await asyncio.sleep(seconds)
    write("end", n)


def leak_apart(n: int, size: int) -> None:
    write("start", n)
    LEAK.append(b"x" * size)
    write("end", n)


async def again(n: int) -> None:
    """Fail at the first attempt."""
    write("start", n)
    if current().attempt == 1:
        raise ValueError
    write("end", n)


async def noop(n: int) -> None:
    """Leave no trace but a count."""
    next(_RUNS)


def idle(n: int) -> None:
    """Leave none from a thread."""
    next(_RUNS)


async def tell(n: int) -> None:
    """Write down how often the last two ran in this process."""
    write("runs", next(_RUNS))


def declare(app: Conveyor) -> Any:
    """Register the tasks on *app*, which may be another program's; return them by name."""
    once = Retry(attempts=1)
    quick = Retry(attempts=2, backoff="5ms", jitter=False)
    return SimpleNamespace(
        # Kills at random hit a job that runs sooner or later three times, which is what `max_crashes` is there for.
        note=app.task(name="note", keep_result=0, retry=Retry(max_crashes=100))(note),
        early=app.task(name="early", ack="early")(plain),
        good=app.task(name="good", keep_result=0)(note),
        first=app.task(name="first", keep_result=0)(first),
        told=app.task(name="told", keep_result="10m", retry=Retry(max_crashes=100))(note),
        leak=app.task(name="leak", keep_result=0)(leak),
        leak_apart=app.task(name="leak_apart", keep_result=0, run_in="process")(leak_apart),
        again=app.task(name="again", keep_result=0, retry=Retry(attempts=2, backoff="1s", jitter=False))(again),
        noop=app.task(name="noop")(noop),
        idle=app.task(name="idle")(idle),
        tell=app.task(name="tell")(tell),
        plain=app.task(name="plain", keep_result=0, retry=Retry(max_crashes=100))(plain),
        block=app.task(name="block", keep_result="10m", retry=once)(block),
        clutch=app.task(name="clutch", keep_result="10m", retry=once)(clutch),
        poison=app.task(name="poison", retry=Retry(attempts=5, backoff="5ms"))(poison),
        slow=app.task(name="slow", timeout="50ms", retry=quick)(note),
        gathered=app.batch_task(name="gathered", size=4, within="1h", retry=Retry(max_crashes=3))(gathered),
        waiting=app.batch_task(name="waiting", size=9, within="1h", retry=Retry(max_crashes=3))(gathered),
        deaf=app.task(name="deaf", timeout="50ms", retry=once)(deaf),
        stuck=app.task(name="stuck", timeout="50ms", retry=quick)(plain),
        apart=app.task(name="apart", timeout="300ms", retry=quick, run_in="process")(plain),
    )


def _strike(*ids: str) -> bool:
    """Remove the file that arms the point; return whether it was there, and record the process."""
    try:
        os.unlink(PLACE / POINT)
    except FileNotFoundError:
        return False
    (PLACE / "struck").open("a").write(" ".join(ids) + "\n")
    return True


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _ends(consumer: QueueConsumer) -> list[str]:
    """Return the jobs that the next turn says are over."""
    report = consumer.report
    return report.done + [one.id for one in report.others if one.kind not in "MS"]


def _arm() -> None:
    """Put the kill at the point that the environment names."""
    absorb, begin, thread, ended, start = (
        QueueConsumer._absorb, Executor._begin, Executor._start_on_thread, Worker.on_finished, QueueConsumer._send_turn,
    )  # fmt: skip

    def after_claim(self: Any, turn: Any, report: Any) -> None:
        if turn.ids and _strike(*turn.ids):
            _die()
        absorb(self, turn, report)

    def before_run(self: Any, attempt: Any) -> Any:
        if _strike(attempt.id):
            _die()
        return (thread if attempt.handler.kind == "thread" else begin)(self, attempt)

    def after_run(self: Any, attempt: Any, value: Any, error: Any) -> None:
        if _strike(attempt.id):
            _die()
        ended(self, attempt, value, error)

    def before_ack(self: Any, want: int) -> None:
        if (ids := _ends(self)) and _strike(*ids):
            _die()
        start(self, want)

    def mid_ack(self: Any, want: int) -> None:
        struck = self.connection.is_open and bool(ids := _ends(self)) and _strike(*ids)
        if struck:
            self.connection._transport.pause_reading()  # nobody reads the reply
        start(self, want)
        if struck:
            asyncio.get_running_loop().call_later(0.05, _die)  # uvloop sends when this pass of the loop is over

    places: dict[str, list[tuple[Any, str, Any]]] = {
        "after_claim": [(QueueConsumer, "_absorb", after_claim)],
        "before_run": [(Executor, "_begin", before_run), (Executor, "_start_on_thread", before_run)],
        "after_run": [(Worker, "on_finished", after_run)],
        "before_ack": [(QueueConsumer, "_send_turn", before_ack)],
        "mid_ack": [(QueueConsumer, "_send_turn", mid_ack)],
    }
    for kind, name, instead in places.get(POINT, []):
        setattr(kind, name, instead)


_arm()
app = Conveyor(os.environ.get("CONVEYOR_URL"), lease=os.environ.get("WORKERS_LEASE", "15s"))
declare(app)
