"""
The journal of a demo: the start and the end of every run, written by the tasks.

An append-only file with one line per event, independent of the queue. A line is one `write`, so processes share the
file and a kill leaves no partial line. The report checks the queue's counts against it, and the display reads it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from conveyor.jobs.context import current

LineKind = Literal["up", "start", "ok", "fail", "retry", "dead"]
_KINDS = get_args(LineKind)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """
    One line: an event of one job in process `pid` at `at` (s since the epoch).

    `key`: the name by which the producer knows the job. `up`: a worker process has started. `retry`, `dead`: the worker's
    decision after a `fail`. `seconds`: how long the run took, or the pause before a retry.
    """

    at: float
    kind: LineKind
    pid: int
    task: str = ""
    key: str = ""
    attempt: int = 0
    seconds: float = 0.0
    note: str = ""


class TaskRun:
    """A run in progress. Its `note` is shown when it ends."""

    note = ""


class Journal:
    """A writer of journal lines; without a path it writes nothing."""

    def __init__(self, path: str | None) -> None:
        """
        Open an existing file for appending; raises OSError.

        A shared lock on it is held while it is open. The cleanup waits until all locks are released, and then takes the
        lock itself, so that no further process can open the journal.
        """
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Close the file; later calls of `write` do nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(
        self, kind: LineKind, task: str = "", key: str = "", attempt: int = 0, seconds: float = 0.0, note: str = ""
    ) -> None:
        """Append one line."""
        if self._file is None:
            return
        words = " ".join(note.split())[:200]
        fields = (f"{time.time():.6f}", kind, str(os.getpid()), task, key, str(attempt), f"{seconds:.6f}", words)
        os.write(self._file, ("\t".join(fields) + "\n").encode())

    @contextmanager
    def run(self, task: str = "", key: str = "", attempt: int = 0) -> Iterator[TaskRun]:
        """Write the start and the end of the code inside; by default for the job that runs here."""
        if not task or not attempt:
            job = current()
            task, key, attempt = job.task, key or job.job_id, job.attempt
        started, run = time.perf_counter(), TaskRun()
        self.write("start", task, key, attempt)
        try:
            yield run
        except BaseException as error:
            self.write("fail", task, key, attempt, time.perf_counter() - started, f"{type(error).__name__}: {error}")
            raise
        self.write("ok", task, key, attempt, time.perf_counter() - started, run.note)


class JournalReader:
    """A reader of the lines that were added since the last read."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._incomplete = path, 0, b""

    def read(self) -> list[JournalEntry]:
        """Return the new lines."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        return [parse(line.decode()) for line in lines]


def parse(text: str) -> JournalEntry:
    """Parse a line; raises ValueError."""
    at, kind, pid, task, key, attempt, seconds, note = text.split("\t")
    if kind not in _KINDS:
        raise ValueError(f"no line of a journal: {text!r}")
    return JournalEntry(float(at), cast("LineKind", kind), int(pid), task, key, int(attempt), float(seconds), note)
