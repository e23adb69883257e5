"""The play: push, work, kill, drain, and look at every acknowledged id."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from conveyor import JobNotFound, StoreUnavailable
from conveyor.admin.admin import Admin
from conveyor.cli.demo import report
from conveyor.cli.demo.journal import JournalEntry, JournalReader
from conveyor.cli.demo.producer import (
    MESSAGE,
    READING,
    AcknowledgedPushes,
    DemoProducer,
    ForeignProducer,
    consume_orders,
)
from conveyor.cli.demo.report import DemoReport, KeyHistory, Kill
from conveyor.cli.demo.stage import DemoEnvironment
from conveyor.store.inspection import QueueCounts

PROCESSES = 2
DRAIN, HASTY_DRAIN = 30.0, 10.0
"""Seconds for what is queued to end: after the time is up, and after ctrl-C."""
FIRST_KILL = 8.0
"""Seconds into a demo without an end at which a worker is killed."""
_BURST = 40
_RETURNED = re.compile(r"\(pid (\d+)\) .*; (returned (\d+) jobs? in \d+ ms)")


@dataclass
class WorkerStatus:
    """One worker process as the journal shows it."""

    pid: int
    since: float
    done: int = 0
    running: dict[str, JournalEntry] = field(default_factory=dict)
    killed_at: float | None = None


@dataclass
class DemoState:
    """What a display shows; `lines` and `news` are what happened since the last look."""

    server: str = ""
    accepted: int = 0
    phase: str = "starting"
    began: float = field(default_factory=time.monotonic)
    counts: dict[str, QueueCounts] = field(default_factory=dict)
    workers: dict[int, WorkerStatus] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    lines: list[JournalEntry] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    first_done: float | None = None

    @property
    def queued(self) -> int:
        """How much is accepted and has neither ended nor begun."""
        return sum(len(counts) for counts in self.counts.values())


class DemoRun:
    """One performance of the demo on a stage."""

    def __init__(self, stage: DemoEnvironment, *, seconds: float | None, show: Callable[[DemoState], None]) -> None:
        """Take how long to push (None: until `stop`), and who is shown what happens, about ten times a second."""
        self._stage, self._seconds, self._show = stage, seconds, show
        self.view = DemoState()
        self.ledger = AcknowledgedPushes()
        self.trails: dict[str, KeyHistory] = {}
        self._lines: list[JournalEntry] = []
        self._kills: list[Kill] = []
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._deserted = False
        self._journal, self._log_at = JournalReader(stage.journal), 0

    def stop(self) -> None:
        """Push no more and drain; called again, stop draining."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self) -> DemoReport:
        """Play it to its end and return the accounts."""
        self._stage.start_workers(PROCESSES)
        app = await asyncio.to_thread(self._stage.start_server)
        self.view.server = self._stage.server
        from conveyor.cli.demo import task

        producer = DemoProducer(self.ledger)
        stranger = ForeignProducer(app.client.address.url, task.readings.name, self.ledger)
        watching = asyncio.create_task(self._watch())
        consuming = asyncio.create_task(consume_orders())
        try:
            stranger.start()
            pushing = asyncio.create_task(producer.run())
            self.view.phase = "running"
            await self._hold_until(producer)
            producer.stop()
            await asyncio.gather(pushing, asyncio.to_thread(stranger.stop))
            self.view.phase = "draining"
            await self._drain()
        finally:
            for one in (consuming, watching):
                one.cancel()
            await asyncio.gather(consuming, watching, return_exceptions=True)
        self.view.phase = "checking"
        await asyncio.to_thread(self._stage.stop_workers)
        self._look()
        self._draw()
        states = await asyncio.to_thread(self._states)
        found = report.judge(self.ledger.accepted, states, report.trails(self._lines), self._kills)
        return replace(found, problems=[*found.problems, *self._desertion()])

    # -- the middle ------------------------------------------------------------------------------------------------

    async def _hold_until(self, producer: DemoProducer) -> None:
        """Let it run; half-way, kill a worker in the middle of its work."""
        half = FIRST_KILL if self._seconds is None else self._seconds / 2
        if await self._stopped_within(half):
            return
        await self._kill(producer)
        rest = None if self._seconds is None else self._seconds - (time.monotonic() - self.view.began)
        await self._stopped_within(rest)

    async def _stopped_within(self, seconds: float | None) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds if seconds is None else max(0.0, seconds))
        return self._stop.is_set()

    async def _kill(self, producer: DemoProducer) -> None:
        """SIGKILL the worker process that runs most, once it runs something, with a pile of work before it."""
        await producer.burst(_BURST)
        began = time.monotonic()
        while (waited := time.monotonic() - began) < 3:
            self._look()
            alive = [worker for worker in self.view.workers.values() if worker.killed_at is None]
            victim = max(alive, key=lambda worker: len(worker.running), default=None)
            if victim is not None and len(victim.running) >= (4 if waited < 1 else 1):
                break
            await asyncio.sleep(0.005)
        else:
            self.view.news.append("no worker ran anything that could be cut off, so none was killed")
            return
        running = len(victim.running)
        victim.killed_at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        self._kills.append(Kill(victim.pid, victim.killed_at))
        self.view.news.append(f"⚡ SIGKILL to worker {victim.pid}, in the middle of {running} jobs")

    async def _drain(self) -> None:
        """Wait until nothing is queued or running."""
        hasty = self._stop.is_set()
        deadline = time.monotonic() + (HASTY_DRAIN if hasty else DRAIN)
        while time.monotonic() < deadline and not self._hurry.is_set() and not (self._stop.is_set() and not hasty):
            counts = await asyncio.to_thread(self._count)
            if counts and all(len(one) + one.leased == 0 for one in counts.values()):
                return
            if self._crew_ended():
                return  # nobody is there to finish it: it is left, and counted as such
            await asyncio.sleep(0.1)

    # -- looking ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            counting = asyncio.create_task(asyncio.to_thread(self._count))
            for _ in range(5):
                self._look()
                self._draw()
                await asyncio.sleep(0.1)
            self.view.counts = await counting or self.view.counts
            if self._crew_ended() and not self._deserted:
                self._deserted = True
                self.view.news.append("the workers ended by themselves: nothing more is pushed")
                self._stop.set()

    def _crew_ended(self) -> bool:
        return self._stage.crew is not None and self._stage.crew.poll() is not None

    def _draw(self) -> None:
        try:
            self._show(self.view)
        except OSError:  # nobody looks any more: the terminal is closed, or the other end of the pipe
            self._show = lambda _: None
            self._stop.set()
        self.view.lines, self.view.news = [], []

    def _look(self) -> None:
        """Read what the journal and the workers' log say that is new."""
        view = self.view
        view.accepted = len(self.ledger.accepted)
        for line in self._journal.read():
            self._lines.append(line)
            view.lines.append(line)
            view.totals[line.kind] += 1
            worker = view.workers.get(line.pid)
            if line.kind == "up":
                view.workers[line.pid] = WorkerStatus(line.pid, line.at)
            elif worker is not None and line.kind == "start":
                worker.running[line.key] = line
            elif worker is not None and line.kind in {"ok", "fail"}:
                worker.running.pop(line.key, None)
                worker.done += 1
            if line.kind == "ok" and view.first_done is None:
                view.first_done = time.monotonic() - view.began
        with suppress(FileNotFoundError), self._stage.log.open("rb") as log:
            log.seek(self._log_at)
            for raw in log:
                if not raw.endswith(b"\n"):
                    break
                self._log_at += len(raw)
                self._heard(raw.decode("utf-8", "replace").strip())

    def _heard(self, text: str) -> None:
        """Take from the workers' log what the supervisor says of a death."""
        found = _RETURNED.search(text)
        if found is None:
            return
        pid, count = int(found[1]), int(found[3])
        self._kills = [Kill(kill.pid, kill.at, count) if kill.pid == pid else kill for kill in self._kills]
        self.view.news.append(f"⟲ the supervisor of {pid} {found[2]} and starts another worker")

    def _count(self) -> dict[str, QueueCounts]:
        from conveyor.cli.demo import task

        try:
            names = sorted({one.queue for one in task.app.tasks.values()})
            found = {name: task.app.queue(name).stats() for name in names}
            return found | {"orders": task.orders.stats(), "readings": task.readings.stats()}
        except StoreUnavailable:
            return {}

    # -- the end ---------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, str | None]:
        """Ask the queue about every acknowledged id."""
        from conveyor.cli.demo import task

        admin, found = Admin(task.app.client), dict[str, str | None]()
        readings = self._readings(admin, task.readings.name)
        for key, kind in self.ledger.accepted.items():
            if kind == READING:
                found[key] = readings.get(key, "done")  # not there any more: then the journal has to prove it
            elif kind == MESSAGE:
                found[key] = task.app.job(key).status()
            else:
                try:
                    found[key] = admin.job(key).status
                except JobNotFound:
                    found[key] = None
        return found

    def _desertion(self) -> list[str]:
        crew = self._stage.crew
        return [f"the workers ended by themselves, with {crew.returncode}"] if self._deserted and crew else []

    def _readings(self, admin: Admin, name: str) -> dict[str, str | None]:
        """Return how the readings stand that are still on their list or in the queue it feeds."""
        from conveyor.cli.demo import task

        raw = admin.client.execute("LRANGE", name, 0, -1)
        assert isinstance(raw, list)
        documents = [(bytes(entry).decode(), "ready") for entry in raw]
        if name in admin.client.queues():
            documents += [(job.payload or "{}", job.status) for job in admin.jobs(name, limit=1_000_000)]
        return {task.reading_key(json.loads(text)["id"]): state for text, state in documents}


def log_tail(path: Path, lines: int = 15) -> str:
    """Return the end of the workers' log, for when something is wrong."""
    with suppress(FileNotFoundError):
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])
    return ""
