"""The app of the runs of limits and groups: each job writes its start and its end into a journal, one line each."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from conveyor import Concurrency, Conveyor, Rate, Retry, current

JOURNAL = Path(os.environ.get("LEVELLED_JOURNAL", "/nowhere"))
N = int(os.environ.get("LEVELLED_N", "100"))
PER = os.environ.get("LEVELLED_PER", "1s")
SECONDS = float(os.environ.get("LEVELLED_SECONDS", "0"))
"""Duration of a job in seconds."""

app = Conveyor(lease=os.environ.get("LEVELLED_LEASE", "15s"))
PATIENT = Retry(attempts=50, backoff="20ms", cap="20ms", jitter=False, max_crashes=1000)


def write(what: str, key: str, n: int) -> None:
    """Append a line in one write, so that lines of several processes do not mix: event, key, number, attempt, pid, instant."""
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {key} {n} {current().attempt} {os.getpid()} {time.monotonic_ns()}\n".encode())
    os.close(descriptor)


@app.task(name="rated", queue="levelled", limits=[Rate(N, PER)], retry=PATIENT)
async def rated(n: int) -> None:
    """Start under a rate."""
    write("start", "-", n)
    await asyncio.sleep(SECONDS)
    write("end", "-", n)


@app.task(name="keyed", queue="levelled", limits=[Rate(1, PER, by="key", name="each")])
async def keyed(key: str, n: int) -> None:
    """Start under the rate of a key."""
    write("start", key, n)


@app.task(name="slotted", queue="levelled", limits=[Concurrency(N)], retry=PATIENT)
async def slotted(n: int) -> None:
    """Run under a concurrency limit."""
    write("start", "-", n)
    await asyncio.sleep(SECONDS)
    write("end", "-", n)


@app.task(name="ordered", queue="levelled", group_by="key", retry=PATIENT)
async def ordered(key: str, n: int) -> None:
    """Run in the order of a key; every seventh job fails at its first attempt."""
    write("start", key, n)
    await asyncio.sleep(SECONDS)
    if n % 7 == 3 and current().attempt == 1:
        write("fail", key, n)
        raise ConnectionError
    write("end", key, n)


@app.task(name="fair", queue="levelled", group_by="key")
async def fair(key: str, n: int) -> None:
    """Run in turn with other keys."""
    write("start", key, n)


@app.task(name="weighed", queue="levelled", limits=[Concurrency(1_000_000, by="key")])
async def weighed(key: str, n: int) -> None:
    """Run by the weight of its key."""
    write("start", key, n)
