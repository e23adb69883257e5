"""One run of the demo: push, work, kill, drain, and look up every acknowledged id."""

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
from conveyor.cli.demo.environment import DemoEnvironment
from conveyor.cli.demo.journal import JournalEntry, JournalReader
from conveyor.cli.demo.producer import (
    MESSAGE,
    READING,
    AcknowledgedPushes,
    DemoProducer,
    ForeignProducer,
    consume_orders,
)
from conveyor.cli.demo.report import DemoReport, Kill
from conveyor.store.inspection import QueueCounts
from conveyor.units import quantity

PROCESSES = 2
DRAIN, INTERRUPTED_DRAIN = 30.0, 10.0
"""Seconds for queued jobs to end: after the time is up, and after ctrl-C."""
FIRST_KILL = 8.0
"""Seconds into a demo without a time limit at which a worker is killed."""
WORKER_START = 30.0
"""Seconds to wait for the first worker before the demo continues without a kill."""
_BURST_SIZE = 40
_RETURNED = re.compile(r"\(pid (\d+)\) .*; (returned (\d+) jobs? in \d+ ms)")


@dataclass
class WorkerStatus:
    """A worker process as the journal shows it."""

    pid: int
    since: float
    done: int = 0
    running: dict[str, JournalEntry] = field(default_factory=dict)
    killed_at: float | None = None


@dataclass
class DemoState:
    """
    The state that a display shows.

    `entries` and `news` are the events since it was shown last.
    """

    server: str = ""
    accepted: int = 0
    phase: str = "starting"
    began: float = field(default_factory=time.monotonic)
    counts: dict[str, QueueCounts] = field(default_factory=dict)
    workers: dict[int, WorkerStatus] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    entries: list[JournalEntry] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    first_done: float | None = None

    @property
    def queued(self) -> int:
        """The number of accepted jobs and messages that wait in a queue."""
        return sum(len(counts) for counts in self.counts.values())


class DemoRun:
    """One run of the demo in an environment."""

    def __init__(
        self, environment: DemoEnvironment, *, seconds: float | None, show: Callable[[DemoState], None]
    ) -> None:
        """Push for *seconds* (None: until `stop`); call *show* about ten times a second."""
        self._environment, self._seconds, self._show = environment, seconds, show
        self.state = DemoState()
        self.pushes = AcknowledgedPushes()
        self._entries: list[JournalEntry] = []
        self._kills: list[Kill] = []
        self._stop, self._stop_draining = asyncio.Event(), asyncio.Event()
        self._workers_ended_early = False
        self._journal, self._log_offset = JournalReader(environment.journal), 0

    def stop(self) -> None:
        """Stop pushing and drain; called again, stop draining."""
        (self._stop_draining if self._stop.is_set() else self._stop).set()

    async def run(self) -> DemoReport:
        """Run the demo to its end; return the report."""
        self._environment.start_workers(PROCESSES)
        app = await asyncio.to_thread(self._environment.start_server)
        self.state.server = self._environment.server
        from conveyor.cli.demo import task

        producer = DemoProducer(self.pushes)
        foreign_producer = ForeignProducer(app.client.address.url, task.readings.name, self.pushes)
        watching = asyncio.create_task(self._watch())
        consuming = asyncio.create_task(consume_orders())
        try:
            foreign_producer.start()
            pushing = asyncio.create_task(producer.run())
            self.state.phase = "running"
            await self._run_until_stopped(producer)
            producer.stop()
            await asyncio.gather(pushing, asyncio.to_thread(foreign_producer.stop))
            self.state.phase = "draining"
            await self._drain()
        finally:
            for one in (consuming, watching):
                one.cancel()
            await asyncio.gather(consuming, watching, return_exceptions=True)
        self.state.phase = "checking"
        await asyncio.to_thread(self._environment.stop_workers)
        states = await asyncio.to_thread(self._queue_states)
        # Afterwards: processes without their supervisor may have worked on, and the journal has to prove what is not queued.
        self._update_state()
        self._show_state()
        result = report.build_report(self.pushes.accepted, states, report.histories(self._entries), self._kills)
        return replace(result, problems=[*result.problems, *self._early_end_problems()])

    # -- pushing and draining ------------------------------------------------------------------------------------------------

    async def _run_until_stopped(self, producer: DemoProducer) -> None:
        """Wait until pushing is to stop; half-way, kill a worker that runs jobs."""
        half = FIRST_KILL if self._seconds is None else self._seconds / 2
        if await self._stopped_within(half):
            return
        await self._kill(producer)
        rest = None if self._seconds is None else self._seconds - (time.monotonic() - self.state.began)
        await self._stopped_within(rest)

    async def _stopped_within(self, seconds: float | None) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds if seconds is None else max(0.0, seconds))
        return self._stop.is_set()

    async def _kill(self, producer: DemoProducer) -> None:
        """
        SIGKILL the worker process that runs most jobs.

        Waits until one runs jobs, after a burst of work.
        """
        await producer.burst(_BURST_SIZE)
        called = began = time.monotonic()
        while (waited := time.monotonic() - began) < 3:
            self._update_state()
            if not self.state.workers and not self._stop.is_set() and began < called + WORKER_START:
                began = time.monotonic()  # on a busy machine the first worker may need many seconds to start
            alive = [worker for worker in self.state.workers.values() if worker.killed_at is None]
            victim = max(alive, key=lambda worker: len(worker.running), default=None)
            if victim is not None and len(victim.running) >= (4 if waited < 1 else 1):
                break
            await asyncio.sleep(0.005)
        else:
            self.state.news.append("no worker ran a job that could be interrupted, so none was killed")
            return
        running = len(victim.running)
        victim.killed_at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        self._kills.append(Kill(victim.pid, victim.killed_at))
        self.state.news.append(f"⚡ SIGKILL to worker {victim.pid} while it runs {quantity(running, 'job')}")

    async def _drain(self) -> None:
        """Wait until no job is queued or running."""
        interrupted = self._stop.is_set()
        deadline = time.monotonic() + (INTERRUPTED_DRAIN if interrupted else DRAIN)
        while (
            time.monotonic() < deadline
            and not self._stop_draining.is_set()
            and not (self._stop.is_set() and not interrupted)
        ):
            counts = await asyncio.to_thread(self._count)
            if counts and all(len(one) + one.leased == 0 for one in counts.values()):
                return
            if self._workers_ended():
                return  # no worker is left: the rest is reported as left
            await asyncio.sleep(0.1)

    # -- watching ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            counting = asyncio.create_task(asyncio.to_thread(self._count))
            for _ in range(5):
                self._update_state()
                self._show_state()
                await asyncio.sleep(0.1)
            self.state.counts = await counting or self.state.counts
            if self._workers_ended() and not self._workers_ended_early:
                self._workers_ended_early = True
                self.state.news.append("the workers ended unexpectedly: pushing stops")
                self._stop.set()

    def _workers_ended(self) -> bool:
        return self._environment.supervisor is not None and self._environment.supervisor.poll() is not None

    def _show_state(self) -> None:
        try:
            self._show(self.state)
        except OSError:  # the terminal or the other end of the pipe is closed
            self._show = lambda _: None
            self._stop.set()
        self.state.entries, self.state.news = [], []

    def _update_state(self) -> None:
        """Read the new lines of the journal and of the workers' log."""
        state = self.state
        state.accepted = len(self.pushes.accepted)
        for entry in self._journal.read():
            self._entries.append(entry)
            state.entries.append(entry)
            state.totals[entry.kind] += 1
            worker = state.workers.get(entry.pid)
            if entry.kind == "up":
                state.workers[entry.pid] = WorkerStatus(entry.pid, entry.at)
            elif worker is not None and entry.kind == "start":
                worker.running[entry.key] = entry
            elif worker is not None and entry.kind in {"ok", "fail"}:
                worker.running.pop(entry.key, None)
                worker.done += 1
            if entry.kind == "ok" and state.first_done is None:
                state.first_done = time.monotonic() - state.began
        with suppress(FileNotFoundError), self._environment.log.open("rb") as log:
            log.seek(self._log_offset)
            for raw in log:
                if not raw.endswith(b"\n"):
                    break
                self._log_offset += len(raw)
                self._read_log_line(raw.decode("utf-8", "replace").strip())

    def _read_log_line(self, text: str) -> None:
        """Return the number of returned jobs, read from a line of the supervisor about a death."""
        matched = _RETURNED.search(text)
        if matched is None:
            return
        pid, count = int(matched[1]), int(matched[3])
        self._kills = [Kill(kill.pid, kill.at, count) if kill.pid == pid else kill for kill in self._kills]
        self.state.news.append(f"⟲ the supervisor of {pid} {matched[2]} and starts another worker")

    def _count(self) -> dict[str, QueueCounts]:
        from conveyor.cli.demo import task

        try:
            names = sorted({one.queue for one in task.app.tasks.values()})
            counts = {name: task.app.queue(name).stats() for name in names}
            return counts | {"orders": task.orders.stats(), "readings": task.readings.stats()}
        except StoreUnavailable:
            return {}

    # -- the end ---------------------------------------------------------------------------------------------------

    def _queue_states(self) -> dict[str, str | None]:
        """Ask the queue for the state of every acknowledged id."""
        from conveyor.cli.demo import task

        admin, states = Admin(task.app.client), dict[str, str | None]()
        readings = self._reading_states(admin, task.readings.name)
        for key, kind in self.pushes.accepted.items():
            if kind == READING:
                states[key] = readings.get(key, "done")  # no longer queued: the journal has to prove that it ran
            elif kind == MESSAGE:
                try:
                    states[key] = task.app.job(key).status()
                except JobNotFound:
                    states[key] = "done"  # as with readings
            else:
                try:
                    states[key] = admin.job(key).status
                except JobNotFound:
                    states[key] = None
        return states

    def _early_end_problems(self) -> list[str]:
        supervisor = self._environment.supervisor
        return (
            [f"the workers ended unexpectedly with exit code {supervisor.returncode}"]
            if self._workers_ended_early and supervisor
            else []
        )

    def _reading_states(self, admin: Admin, name: str) -> dict[str, str | None]:
        """Return the states of readings that are still on their list, between it and the queue it feeds, or in that queue."""
        from conveyor.cli.demo import task

        documents: list[tuple[str, str]] = []
        for place in (name, task.readings.keys.intake):  # in the order in which an entry passes them
            raw = admin.client.execute("LRANGE", place, "0", "-1")
            assert isinstance(raw, list)
            documents += [(bytes(entry).decode(), "ready") for entry in raw]
        if name in admin.client.queues():
            documents += [(job.payload or "{}", job.status) for job in admin.jobs(name, limit=1_000_000)]
        return {task.reading_key(json.loads(text)["id"]): state for text, state in documents}


def log_tail(path: Path) -> str:
    """Return the last 15 lines of the workers' log."""
    with suppress(FileNotFoundError):
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-15:])
    return ""
