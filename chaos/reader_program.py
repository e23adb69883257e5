"""A program that reads what jobs tell while they run, and that has put two schedules: it writes down all that it was told.

It follows the stream and the updates of each job of the kinds that tell something, and the events of their queue. It leaves each
of them after a few entries, and comes back with the id of the last. SIGUSR1 ends the schedules, SIGTERM the program, once
it has read everything of the jobs that there are.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from chaos.run_log import RunLog, read_on
from chaos.tested_app import app, tick
from conveyor import ConveyorError, JobNotFound, StoreUnavailable

DIRECTORY = Path(os.environ["CHAOS_DIR"])
KINDS = {"told", "told_steady", "told_boxed"}
QUEUE = "told"
SCHEDULES: dict[str, dict[str, Any]] = {
    "queueing": {"overlap": "queue", "missed": "one"},
    "skipping": {"overlap": "skip", "missed": "skip"},
}
PATIENCE = 30.0
"""Seconds that it waits for what is still to come when it is asked to end."""


class Reader:
    """Everything that is read, and how often it was left."""

    def __init__(self, seed: int) -> None:
        """*seed* decides when it leaves what it reads, and for how long."""
        self.random = random.Random(f"reader {seed}")
        self.lines = RunLog(DIRECTORY / "reads")
        self.finishing = asyncio.Event()
        self.unscheduled = asyncio.Event()
        self.done: set[str] = set()
        """The jobs of the queue whose end has come as an event."""

    async def follow(self, what: str, id_: str, open_: Callable[[str | None], AsyncGenerator[Any]]) -> None:
        """Read all entries of one job, write each down, and leave and come back now and then, until they end by themselves."""
        last: str | None = None
        while True:
            left = self.random.randint(1, 8)
            try:
                async with aclosing(open_(last)) as entries:
                    async for entry in entries:
                        last, left = entry.id, left - 1
                        self.lines.write(phase=what, id=id_, **describe(what, entry))
                        if not left:
                            break
                    else:
                        self.lines.write(phase=f"{what} end", id=id_)
                        return
            except (StoreUnavailable, JobNotFound) as error:
                # A job that a producer holds in its buffer is not there yet, and comes.
                if self.finishing.is_set() and isinstance(error, JobNotFound):
                    self.lines.write(phase="error", what=what, id=id_, why=repr(error)[:300])
                    return
                await asyncio.sleep(0.2)
            except ConveyorError as error:
                self.lines.write(phase="error", what=what, id=id_, why=repr(error)[:300])
                return
            self.lines.write(phase="left", what=what, id=id_)
            await asyncio.sleep(self.random.choice((0, 0.01, 0.2)))

    async def follow_job(self, id_: str) -> None:
        """Read the stream and the updates of a job, then what its progress is."""
        job = app.job(id_)
        await asyncio.gather(self.follow("part", id_, job.astream), self.follow("update", id_, job.awatch))
        while True:
            try:
                progress = await job.aprogress()
            except StoreUnavailable:
                await asyncio.sleep(0.2)
            except ConveyorError as error:
                self.lines.write(phase="error", what="progress", id=id_, why=repr(error)[:300])
                return
            else:
                self.lines.write(phase="progress", id=id_, text=None if progress is None else progress.text)
                return

    async def follow_events(self) -> None:
        """Read the events of the queue for ever, and leave and come back."""
        last: str | None = None
        while True:
            left = self.random.randint(5, 60)
            try:
                async with aclosing(app.aevents(QUEUE, last)) as events:
                    async for event in events:
                        last, left = event.id, left - 1
                        self.lines.write(
                            phase="event", event=event.id, name=event.name, id=event.job_id, attempt=event.attempt
                        )
                        if event.name in {"done", "dead", "cancelled"}:
                            self.done.add(event.job_id)
                        if not left:
                            break
            except ConveyorError as error:  # also the first, which comes before any worker has declared the queue
                if not isinstance(error, StoreUnavailable) and last is not None:
                    self.lines.write(phase="error", what="event", id="", why=repr(error)[:300])
                await asyncio.sleep(0.2)
            self.lines.write(phase="left", what="event", id="")
            await asyncio.sleep(self.random.choice((0, 0.01, 0.2)))

    async def follow_calls(self) -> None:
        """Follow each job that a producer was told of; return when the program is to end and all has been read."""
        followers: dict[str, asyncio.Task[None]] = {}
        at, kinds = 0, dict[str, str]()
        while True:
            last_look = self.finishing.is_set()
            lines, at = read_on(DIRECTORY / "calls", at)
            for line in lines:
                if line["phase"] == "intent":
                    kinds[line["call"]] = line["kind"]
                elif line["phase"] == "ok" and kinds.get(line["call"]) in KINDS:
                    for id_ in line["ids"]:
                        followers.setdefault(id_, asyncio.create_task(self.follow_job(id_)))
            if last_look:
                break
            await within(self.finishing, 0.2)
        if followers:
            _, open_ = await asyncio.wait(followers.values(), timeout=PATIENCE)
            for one in open_:
                one.cancel()
        wanted = {id_ for id_ in followers if id_.startswith(f"{QUEUE}:")}
        deadline = time.monotonic() + PATIENCE / 3
        while wanted - self.done and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    # -- schedules ---------------------------------------------------------------------------------------------------

    async def put_schedules(self) -> None:
        """Have a job enqueued at each second, in two ways."""
        for name, options in SCHEDULES.items():
            while True:
                try:
                    await app.schedules.aput(name, tick.s(name), every="1s", **options)
                    self.write_schedule("put", await app.schedules.aget(name))
                    break
                except ConveyorError:
                    await asyncio.sleep(0.2)

    def write_schedule(self, phase: str, schedule: Any) -> None:
        """Write down where a schedule stands, and what became of its last instants."""
        skips = [
            [round(run.instant.timestamp() * 1000), run.skipped, run.outcome]
            for run in schedule.runs()
            if run.outcome != "fired"
        ]
        self.lines.write(
            phase=phase, schedule=schedule.name, due=round(schedule.due.timestamp() * 1000), fired=schedule.fired,
            skipped=schedule.skipped, skips=skips,
        )  # fmt: skip

    async def follow_schedules(self) -> None:
        """Look at the schedules each second; at the end pause them, write down where they stand, and delete them."""
        await self.put_schedules()
        left = set(SCHEDULES)
        while left:
            ending = self.unscheduled.is_set()
            for name in sorted(left):
                try:
                    schedule = await app.schedules.aget(name)
                    if ending and not schedule.paused:
                        await schedule.apause()
                        schedule = await app.schedules.aget(name)
                    self.write_schedule("stood" if ending else "stands", schedule)
                    if ending:
                        left.discard(name)
                except ConveyorError:
                    await asyncio.sleep(0.2)
            await within(self.unscheduled, 1.0)

    async def delete_schedules(self) -> None:
        """Remove them, with all of their keys."""
        for name in SCHEDULES:
            await app.schedules.adelete(name)


async def within(event: asyncio.Event, seconds: float) -> None:
    """Wait for *event*, and no longer than that."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def main() -> None:
    """Read until SIGTERM."""
    reader, loop = Reader(int(sys.argv[1])), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, reader.unscheduled.set)
    loop.add_signal_handler(signal.SIGTERM, reader.finishing.set)
    reader.lines.write(phase="begin")
    events = asyncio.create_task(reader.follow_events())
    schedules = asyncio.create_task(reader.follow_schedules())
    await reader.follow_calls()
    await schedules
    await reader.delete_schedules()
    events.cancel()
    await asyncio.gather(events, return_exceptions=True)
    await app.aclose()
    reader.lines.write(phase="end")


def describe(what: str, entry: Any) -> dict[str, Any]:
    """Return what is written down of a part or an update."""
    if what == "part":
        return {"part": entry.id, "attempt": entry.attempt, "value": entry.value}
    return {"update": entry.id, "kind": type(entry).__name__, "state": entry.state, "attempt": entry.attempt}


if __name__ == "__main__":
    asyncio.run(main())
