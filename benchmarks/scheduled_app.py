"""The app of the run of schedules: each job writes its planned instant, its start and its process into a journal."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from conveyor import Conveyor, Retry, current

JOURNAL = Path(os.environ.get("SCHEDULED_JOURNAL", "/nowhere"))
EXPRESSION = os.environ.get("SCHEDULED_EXPRESSION", "* * * * * *")
"""Each second. A deployment that says it in other words changes the definition, and no instant."""

app = Conveyor(lease="2s")
PATIENT = Retry(attempts=50, backoff="20ms", cap="20ms", jitter=False, max_crashes=1000)


async def write(name: str) -> None:
    """Append a line in one write: schedule, planned instant (ms), id, attempt, pid, start (ns of the machine's monotonic clock)."""
    context = current()
    planned = context.scheduled_for
    assert planned is not None
    line = f"{name} {round(planned.timestamp() * 1000)} {context.job_id} {context.attempt} {os.getpid()} {time.monotonic_ns()}\n"
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    await asyncio.sleep(0.1)


@app.cron(EXPRESSION, overlap="queue", missed="all")
@app.task(name="kept", queue="ticks", retry=PATIENT)
async def kept() -> None:
    """Run at each second, however late."""
    await write("kept")


@app.cron(EXPRESSION, overlap="skip", missed="skip")
@app.task(name="skipping", queue="ticks", retry=PATIENT)
async def skipping() -> None:
    """Run at each second, unless the run of the second before still goes on."""
    await write("skipping")
