"""The app of test_dependencies.py: a fresh process can load it by this module's name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator

from conveyor import Context, Conveyor, Depends, current

time.sleep(float(os.environ.get("DEPENDENCY_IMPORT_SECONDS", "0")))
app = Conveyor(namespace=os.environ.get("DEPENDENCY_NAMESPACE", "dependencies"))


def note(text: str) -> None:
    with open(os.environ["DEPENDENCY_LOG"], "a") as log:
        log.write(f"{text} {os.getpid()}\n")


async def engine() -> AsyncIterator[int]:
    note("open engine")
    yield id(asyncio.get_running_loop())
    note("close engine")


def session(engine: int = Depends(engine, scope="worker")) -> Iterator[str]:
    note("open session")
    try:
        yield f"session {engine > 0}"
    except BaseException as error:
        note(f"roll back {type(error).__name__}")
        raise
    note("close session")


@app.task(run_in="process", retry=1)
def plain(name: str, session: str = Depends(session)) -> tuple[str, int]:
    if name == "bad":
        raise LookupError(name)
    return f"{session} of {name}", os.getpid()


@app.task(run_in="process", retry=1)
async def awaited(name: str, session: str = Depends(session)) -> tuple[str, int]:
    return f"{session} of {name}", os.getpid()


@app.task(run_in="process", retry=1, timeout="0.2s", timeout_hard="60s")
def slow(session: str = Depends(session)) -> None:
    while True:
        time.sleep(0.01)


@app.task(run_in="process", retry=1, timeout="0.2s", timeout_hard="60s")
async def aslow(session: str = Depends(session)) -> None:
    current().extend("0.3s")
    await asyncio.sleep(60)


@app.task(run_in="process", retry=1, timeout="0.1s", timeout_hard="0.6s")
def stuck() -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            time.sleep(60)


async def hangs() -> AsyncIterator[None]:
    try:
        await asyncio.sleep(600)
        yield
    except BaseException as error:
        note(f"given up {type(error).__name__}")
        raise


@app.task(run_in="process", retry=1, timeout="0.2s", timeout_hard="20s")
def waits(session: str = Depends(session), value: None = Depends(hangs)) -> None:
    note("has what never comes")


NEXT, EXTENDED = threading.Event(), threading.Event()


@app.task(run_in="process", retry=1, timeout="60s", timeout_hard="120s")
def leaves_a_thread(context: Context = current()) -> int:
    def extend() -> None:
        NEXT.wait(60)
        context.extend("0.1s")
        EXTENDED.set()

    threading.Thread(target=extend, daemon=True).start()
    return os.getpid()


@app.task(run_in="process", retry=1, timeout="60s", timeout_hard="120s")
def follows() -> int:
    signal.raise_signal(signal.SIGALRM)
    NEXT.set()
    assert EXTENDED.wait(60)
    time.sleep(0.5)
    return os.getpid()


@app.task(run_in="process", fresh=True)
def pid() -> int:
    return os.getpid()


@app.batch_task(size=2, within="1s", run_in="process")
def batch(names: list[str], session: str = Depends(session)) -> list[str]:
    return [f"{session} of {name}" for name in names]


@app.batch_task(size=1, within="10ms", run_in="process")
async def lasting(numbers: list[int]) -> list[int]:
    await asyncio.sleep(0.5)
    return [os.getpid() for _ in numbers]
