"""
Real workers on a real server, and the journal that their jobs write: for tests that kill, freeze and stop them.

As a program it is a supervisor with its options as JSON, or with `{"embed": true}` a program with a worker inside.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from conveyor import Conveyor
from conveyor.store import inspection, operations
from conveyor.worker.leasing import heartbeat
from conveyor.worker.logs import configure_log
from conveyor.worker.shared_memory import ChildSpec
from conveyor.worker.supervision import autoscale
from conveyor.worker.supervision.supervisor import Supervisor
from support import journal_app
from support.server_kinds import connect
from support.supervisor_process import children_of
from support.waiting import until
from testbed.fork_server import Program, start_program

Process = Program | subprocess.Popen[bytes]


class Line(NamedTuple):
    """One line of the journal."""

    what: str
    n: int
    attempt: int
    pid: int
    at: float
    wall: float


class WorkerProcesses:
    """The app of the tests in this process, and supervisors that serve it, started by `start`."""

    def __init__(self, url: str, place: Path, *, lease: str = "15s", **env: str) -> None:
        """*place* is an empty folder for journal and logs, *env* more variables of the workers' environment."""
        self.url, self.place = url, place
        self.app = Conveyor(url, lease=lease)
        self.tasks = journal_app.declare(self.app)
        self.keys = self.app.client.keys("default")
        self._env = {**os.environ, "CONVEYOR_URL": url, "WORKERS_PLACE": str(place)}
        self._env |= {"WORKERS_LEASE": lease, **env}
        self.supervisors: list[Process] = []
        self._read, self._lines = 0, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what is left, take its registrations away, and close."""
        for one in self.supervisors:
            children = self.children(one) if one.poll() is None else []
            one.kill()
            one.wait()
            for pid in children:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if any(error):
            print(self.log)

    def tidy(self) -> None:
        """Remove what killed workers leave: their registrations, and the jobs."""
        for member in self.app.client.run(inspection.workers(self.keys)):
            self.app.client.run(operations.reap(self.keys, member.worker, crashed=False))
        queue = self.app.client
        for place in ("ready", "due", "dead"):
            while queue.run(operations.purge(self.keys, place, 500))[0]:
                pass
        self.app.close()

    # -- processes ------------------------------------------------------------------------------------------------

    def start(self, *, processes: int = 1, env: dict[str, str] | None = None, **options: Any) -> Process:
        """Start a supervisor, with further variables *env*."""
        options = {"processes": processes, **options}
        words = ["support.worker_processes", json.dumps(options)]
        with (self.place / f"log{len(self.supervisors)}").open("wb") as log:
            self.supervisors.append(start_program(words, self._env | (env or {}), log))
        return self.supervisors[-1]

    def embed(self, **options: Any) -> Process:
        """Start a program with a worker inside: no supervisor looks after it."""
        return self.start(embed=True, **options)

    def let_go(self) -> None:
        """Let the jobs of task `first` end."""
        (self.place / "go").touch()

    @property
    def log(self) -> str:
        """The log of all supervisors and their children."""
        return "".join((self.place / f"log{n}").read_text() for n in range(len(self.supervisors)))

    @staticmethod
    def children(supervisor: Process) -> list[int]:
        """Return the pids of its children."""
        return children_of(supervisor.pid)

    # -- what happened --------------------------------------------------------------------------------------------

    @property
    def journal(self) -> list[Line]:
        """All lines so far."""
        try:
            with (self.place / "journal").open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return self._lines
        whole = data.rpartition(b"\n")[0]
        if whole:
            self._read += len(whole) + 1
            for text in whole.decode().split("\n"):
                what, n, attempt, pid, at, wall = text.split()
                self._lines.append(Line(what, int(n), int(attempt), int(pid), float(at), float(wall)))
        return self._lines

    def starts(self) -> dict[int, list[Line]]:
        """Return the starts of each job, in the order they were written."""
        found: dict[int, list[Line]] = defaultdict(list)
        for line in self.journal:
            if line.what == "start":
                found[line.n].append(line)
        return found

    def completions(self) -> int:
        """Return how many jobs ended well, as Redis counted them in the step that took them off."""
        with self.client() as client:
            return sum(
                int(value)
                for key in client.scan_iter("*:stats:[0-9]*")  # of minutes; sums of hours hold the same again
                for field, value in client.hgetall(key).items()
                if field.startswith(b"done:")
            )

    def lost(self) -> int:
        """Return how many jobs were taken from workers that died, or gave no sign: each is charged with a crash."""
        with self.client() as client:
            return int(client.hget(f"{self.keys.prefix}stats:total", "lost") or 0)

    def client(self) -> Any:
        """Return a plain client."""
        return connect(self.url)

    def counts(self) -> inspection.QueueCounts:
        """Return what the queue holds."""
        return self.app.client.run(inspection.counts(self.keys))

    def registered(self) -> set[int]:
        """Return the pids of the workers that Redis knows."""
        return {int(member.about["pid"]) for member in self.app.client.run(inspection.workers(self.keys))}

    def drained(self) -> bool:
        """Tell whether nothing is left to do."""
        found = self.counts()
        return found.ready + found.leased + found.scheduled == 0

    def repeats(self) -> int:
        """Return how many starts were not the first of their job; each must carry a higher attempt than the one before."""
        extra = 0
        for n, lines in self.starts().items():
            attempts = [line.attempt for line in lines]
            assert attempts == sorted(set(attempts)), f"job {n} was started as attempts {attempts}"
            extra += len(lines) - 1
        return extra

    def is_sound(self) -> bool:
        """Tell whether the audit finds nothing."""
        return self.app.client.run(inspection.audit(self.keys)) == []


@contextmanager
def worker_processes(url: str, place: Path, **options: Any) -> Iterator[WorkerProcesses]:
    """Give worker processes; after the block its processes are gone, and so is what they left in Redis."""
    made = WorkerProcesses(url, place, **options)
    with made:
        yield made
    made.tidy()


def wait(condition: Callable[[], Any], seconds: float = 150.0) -> Any:
    """Return the condition's first true value. The time is more than a busy machine takes, and less than a test is given."""
    return until(condition, seconds)


async def embed(options: dict[str, Any]) -> None:
    """Run as another program, with a worker inside; `max_stall` in seconds."""
    heartbeat.MAX_STALL = options.pop("max_stall", heartbeat.MAX_STALL)
    async with journal_app.app.worker(**{"concurrency": 20, "grace": 5.0, **options}):
        await asyncio.Event().wait()


def supervise(options: dict[str, Any]) -> int:
    """Run as the supervisor."""
    configure_log(verbose=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    bounds = options.pop("autoscale", None)
    autoscale.CALM_FOR, autoscale.SHRINK_EVERY = 1.0, 0.5
    processes, stall = options.pop("processes"), float(options.pop("max_stall", 300))
    fixed: dict[str, Any] = {
        "queues": {"default": 1.0}, "concurrency": 20, "threads": 4, "burst": False, "grace": 5.0, "path": tuple(sys.path),
    }  # fmt: skip
    spec = ChildSpec("support.journal_app:app", **{**fixed, **options})
    scaled = None if bounds is None else autoscale.Bounds.parse(bounds)
    return Supervisor(spec, processes=processes, max_stall=stall, autoscale=scaled).run()


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    if chosen.pop("embed", False):
        del chosen["processes"]
        configure_log()
        asyncio.run(embed(chosen))
    sys.exit(supervise(chosen))
