"""Supervisors as processes, and the queue that their stub workers serve."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from conveyor.ids import new_ids
from conveyor.payload.records import write_envelope
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.inspection import WorkerRow
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Entry
from support.server_kinds import connect
from support.waiting import until
from testbed.fork_server import start_program

KEYS = QueueKeys("test", "q")


def children_of(pid: int) -> list[int]:
    """Return the pids of the children of a process: none when it has ended, which the one that forked it may not have told yet."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def running(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Queue:
    """The queue that the stub workers serve, as the tests inspect it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.client = Client(url, namespace="test", retry_for=30)

    def push(self, task: str, count: int = 1, body: bytes = b"0") -> list[str]:
        entries = [Entry(id_, write_envelope(task, body)) for id_ in new_ids(count)]
        return self.client.push(KEYS, entries)

    def workers(self) -> list[WorkerRow]:
        return self.client.run(inspection.workers(KEYS))

    def held(self, worker: str) -> set[str]:
        return set(self.client.run(operations.held_ids(KEYS, worker)))

    def counts(self) -> inspection.QueueCounts:
        return self.client.run(inspection.counts(KEYS))

    def crashes(self, ids: Any) -> set[int]:
        states = [self.client.execute("HGET", KEYS.state, id_, key=KEYS.state) for id_ in ids]
        return {int(state.split(b" ")[2].split(b"\n")[0]) if isinstance(state, bytes) else 0 for state in states}

    def starts(self, ids: Any) -> set[int]:
        states = [self.client.execute("HGET", KEYS.state, id_, key=KEYS.state) for id_ in ids]
        return {int(state.split(b" ")[0]) if isinstance(state, bytes) else 0 for state in states}

    def by_pid(self, *held: int) -> dict[int, WorkerRow]:
        """Return the registered workers by process, once each holds exactly that many jobs."""
        found = until(lambda: (c := self.workers()) and sorted(m.held for m in c) == sorted(held) and c)
        return {member.about["pid"]: member for member in found}

    def busy(self, *held: int) -> dict[int, WorkerRow]:
        """The same, once all that they hold has begun, too: after the next turn of each."""

        def turns() -> dict[str, int]:
            return {
                one.worker: int(self.client.execute("HGET", key := KEYS.leased(one.worker), "\tturn", key=key) or 0)
                for one in found.values()
            }

        found = self.by_pid(*held)
        before = turns()
        until(lambda: all(number > before[worker] for worker, number in turns().items()))
        return found

    def is_sound(self) -> bool:
        return self.client.run(inspection.audit(KEYS)) == []

    def purge(self) -> None:
        with connect(self._url) as client:
            for key in client.keys("test:*"):
                client.delete(key)


class SupervisorProcess:
    """A supervisor with its children."""

    def __init__(self, url: str, log: Path, env: dict[str, str], **options: Any) -> None:
        self.log_path = log
        with log.open("wb") as out:
            words, variables = ["support.stub_worker", json.dumps(options)], {"STUB_URL": url, **env}
            self.process = start_program(words, {**os.environ, **variables}, out)
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def children(self) -> list[int]:
        return children_of(self.pid)

    def signal(self, number: int) -> float:
        sent = time.monotonic()
        self.process.send_signal(number)
        return sent

    def wait(self, timeout: float = 60.0) -> int:
        return self.process.wait(timeout)
