"""The app of test_batches.py whose batches run in processes: a fresh process can load it by this module's name."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conveyor import BatchFailed, ConfigurationError, Context, Conveyor, Retry, current

app = Conveyor(os.environ.get("CONVEYOR_URL", "unix:///nonexistent/conveyor.sock"))


@dataclass
class Row:
    id: int
    tenant: str = ""


@app.task(name="after", queue="after")
async def after(n: int) -> None: ...


def apart(rows: list[Row], context: Context = current()) -> list[list[Any]]:
    """Fail for rows below zero, end the process for one of 13, stay for one of 60; spawn a job for the others."""
    for row, item in zip(rows, context.items, strict=True):
        item.spawn(after.s(row.id))
        with suppress(ConfigurationError):  # where the task has no cost
            item.charge(2 * row.id)
    if any(row.id == 13 for row in rows):
        os._exit(3)
    if any(row.id == 60 for row in rows):
        Path(rows[0].tenant).touch()
        time.sleep(60)
    failed: dict[int, BaseException] = {at: LookupError(f"no {row.id}") for at, row in enumerate(rows) if row.id < 0}
    results = [[row.id, len(rows), item.attempt, os.getpid()] for row, item in zip(rows, context.items, strict=True)]
    if failed:
        raise BatchFailed(failed, results=results)
    return results


def declare(app: Conveyor, **options: Any) -> Any:
    """Register the task on another program's app, under the name that a process looks for."""
    quick = Retry(attempts=2, backoff="5ms", jitter=False)
    given = {"size": 4, "within": "1h", "retry": quick, **options}
    return app.batch_task(name="apart", run_in="process", **given)(apart)


declare(app)
