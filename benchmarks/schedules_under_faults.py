"""
Schedules of each second under faults: ``python -m benchmarks.schedules_under_faults --ticks 300``.

Workers are killed, frozen beyond their leases and deployed again with another expression, and their clocks are wrong by up to
five minutes. One schedule keeps every instant, one skips an instant while its last job lives. Counts come from the
journal that the jobs write. It ends with 1 when an instant was started twice, or neither started nor skipped with a reason.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import redis

from benchmarks.load_levelling import say
from chaos.recording_server import FAKETIME
from testbed.server_process import Server, find_binary

ROOT = Path(__file__).parents[1]
EXPRESSIONS = ("* * * * * *", "*/1 * * * * *")
CLOCKS_WRONG_BY = 300
"""Seconds."""


class Start(NamedTuple):
    """One line of the journal; `planned` in ms since the epoch, `at` in seconds by the machine's monotonic clock."""

    schedule: str
    planned: int
    id: str
    attempt: int
    pid: int
    at: float


class Run:
    """A server, workers with wrong clocks, and the journal of their jobs."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.random = random.Random(options.seed)
        self.journal, self.log = directory / "journal", (directory / "workers.log").open("ab")
        self.journal.touch()
        binary = find_binary(options.server)
        if binary is None:
            raise SystemExit(f"There is no server {options.server}.")
        self.server = Server(binary, directory / "server")
        self.environment = {
            **os.environ, "CONVEYOR_URL": self.server.url, "SCHEDULED_JOURNAL": str(self.journal),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }  # fmt: skip
        os.environ["CONVEYOR_URL"] = self.server.url
        self.workers: list[subprocess.Popen[bytes]] = []
        self.frozen: dict[int, float] = {}
        self.faults: Counter[str] = Counter()

    def start_worker(self) -> None:
        """Start a worker of one process with a clock and an expression of its own."""
        environment = self.environment | {"SCHEDULED_EXPRESSION": self.random.choice(EXPRESSIONS)}
        if FAKETIME is not None:
            wrong_by = self.random.randint(-CLOCKS_WRONG_BY, CLOCKS_WRONG_BY)
            environment |= {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME": f"{wrong_by:+d}",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        command = [
            sys.executable, "-m", "conveyor", "worker", "benchmarks.scheduled_app:app", "-q", "ticks", "--grace", "2s",
        ]  # fmt: skip
        self.workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log))

    def children(self) -> list[int]:
        """Return the processes that run jobs and are not frozen."""
        found = []
        for worker in self.workers:
            with suppress(OSError):
                found += Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        return [int(pid) for pid in found if int(pid) not in self.frozen]

    def starts(self) -> list[Start]:
        """Return what the journal says; the last line may be half written."""
        whole, _, _ = self.journal.read_text().rpartition("\n")
        parts = (line.split() for line in whole.splitlines())
        return [
            Start(name, int(planned), id_, int(attempt), int(pid), int(at) / 1e9)
            for name, planned, id_, attempt, pid, at in parts
        ]

    def break_something(self) -> None:
        """Kill or freeze a process, or deploy a worker again; thaw what was frozen long enough."""
        for pid, until in list(self.frozen.items()):
            if time.monotonic() > until:
                self._send(pid, signal.SIGCONT)
                del self.frozen[pid]
        kind = self.random.choice(("kill", "freeze", "deploy"))
        pids = self.children()
        if kind == "deploy":
            worker = self.workers.pop(self.random.randrange(len(self.workers)))
            worker.terminate()
            self.start_worker()
        elif pids:
            pid = self.random.choice(pids)
            if kind == "freeze":
                self.frozen[pid] = time.monotonic() + self.random.uniform(2.5, 6)
            self._send(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        self.faults[kind] += 1

    def _send(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def close(self) -> None:
        """End the workers and the server."""
        for pid in self.frozen:
            self._send(pid, signal.SIGCONT)
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait(60)
        self.server.kill()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="benchmarks.schedules_under_faults", description=__doc__)
    parser.add_argument("--ticks", type=int, default=300, help="seconds that are counted")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between two faults")
    parser.add_argument("--server", default="valkey")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    print(
        f"seed {options.seed}" + ("" if FAKETIME else "; libfaketime is not installed, so all clocks are right"),
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="sc", dir="/tmp") as directory:
        run = Run(Path(directory), options)
        try:
            return play(run, options)
        finally:
            run.close()


def play(run: Run, options: argparse.Namespace) -> int:
    """Break things while the schedules go on, then compare."""
    from benchmarks.scheduled_app import app

    for _ in range(options.workers):
        run.start_worker()
    deadline = time.monotonic() + 120
    while {one.schedule for one in run.starts()} != {"kept", "skipping"}:
        if time.monotonic() > deadline:
            raise SystemExit("Waited two minutes for the first starts.")
        time.sleep(0.1)
    first = max(one.planned for one in run.starts()) + 1000
    last = first + (options.ticks - 1) * 1000
    reasons: dict[str, dict[int, tuple[str, int]]] = {"kept": {}, "skipping": {}}
    reached = 0
    next_fault = time.monotonic()
    while reached <= last:  # until the schedules themselves are beyond it
        if time.monotonic() >= next_fault and reached + 1000 * 5 < last:
            run.break_something()
            next_fault += options.pause
        handles = [app.schedules.get(name) for name in reasons]
        for handle in handles:  # each reads its instant and its last runs in one step
            for past in handle.runs():
                if past.outcome != "fired":
                    reasons[handle.name][round(past.instant.timestamp() * 1000)] = (past.outcome, past.skipped)
        reached = min(round(handle.due.timestamp() * 1000) for handle in handles if handle.due)
        time.sleep(0.2)
    for pid in run.frozen:
        run._send(pid, signal.SIGCONT)
    ticks, deadline = app.queue("ticks"), time.monotonic() + 60
    for name in reasons:
        app.schedules.get(name).pause()
    while len(ticks) + ticks.stats().leased and time.monotonic() < deadline:
        time.sleep(0.1)
    counts = ticks.stats()
    say("ticks, workers", f"{options.ticks}, {options.workers}")
    say("faults", ", ".join(f"{count} x {name}" for name, count in sorted(run.faults.items())))
    bad = 0
    for name, skipped in reasons.items():
        starts = [one for one in run.starts() if one.schedule == name and first <= one.planned <= last]
        ids: dict[int, set[str]] = {}
        for one in starts:
            ids.setdefault(one.planned, set()).add(one.id)
        covered = set(ids)
        explained: set[int] = set()
        for at, (_, count) in skipped.items():
            explained |= {at + 1000 * n for n in range(count)}
        wanted = set(range(first, last + 1, 1000))
        twice = sum(len(found) > 1 for found in ids.values()) + len(covered & explained)
        lost = wanted - covered - explained
        say(f"{name}: instants with a job", len(covered))
        say(f"{name}: skipped, by reason", str(dict(Counter(reason for reason, _ in skipped.values()))))
        say(f"{name}: instants with two jobs, or skipped and started", twice)
        say(f"{name}: instants without job and reason", len(lost))
        say(f"{name}: starts beyond the first of a job, after kills", len(starts) - len({one.id for one in starts}))
        bad += twice + len(lost)
    say("dead", counts.dead)
    client = redis.Redis.from_url(run.server.url)
    say("keys that stay", sum(client.ttl(key) == -1 for key in client.scan_iter()))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
