"""The app of test_dependencies.py: a fresh process can load it by this module's name."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

from conveyor import Conveyor, Depends

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
    yield f"session {engine > 0}"
    note("close session")


@app.task(run_in="process", retry=1)
def plain(name: str, session: str = Depends(session)) -> tuple[str, int]:
    if name == "bad":
        raise LookupError(name)
    return f"{session} of {name}", os.getpid()


@app.task(run_in="process", retry=1)
async def awaited(name: str, session: str = Depends(session)) -> tuple[str, int]:
    return f"{session} of {name}", os.getpid()


@app.batch_task(size=2, within="1s", run_in="process")
def batch(names: list[str], session: str = Depends(session)) -> list[str]:
    return [f"{session} of {name}" for name in names]
