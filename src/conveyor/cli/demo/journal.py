"""
The journal: what really ran, written by the tasks themselves and not by the queue.

An append-only file with a line for the start and the end of every run. A line is one `write`, so processes share the
file and a kill never leaves half of one. The accounts are checked against it, and the display lives on it.
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

Kind = Literal["up", "start", "ok", "fail", "retry", "dead"]
_KINDS = get_args(Kind)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """
    One line: at `at` (s since the epoch) the process `pid` did something to what the producer knows as `key`.

    `up` is a worker process that begins, `retry` and `dead` what the worker decided after a `fail`. `seconds` is how
    long a run took, or the pause before a retry.
    """

    at: float
    kind: Kind
    pid: int
    task: str = ""
    key: str = ""
    attempt: int = 0
    seconds: float = 0.0
    note: str = ""


class TaskRun:
    """One run under way; the `note` is shown with its end."""

    note = ""


class Journal:
    """Writes lines into a file, or nowhere without one."""

    def __init__(self, path: str | None) -> None:
        """
        Open the file, which must be there, for appending; raises OSError.

        A shared lock on it is held: who tidies up waits until all have let go, and nobody comes in from then on.
        """
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(
        self, kind: Kind, task: str = "", key: str = "", attempt: int = 0, seconds: float = 0.0, note: str = ""
    ) -> None:
        """Append one line."""
        if self._file is None:
            return
        words = " ".join(note.split())[:200]
        fields = (f"{time.time():.6f}", kind, str(os.getpid()), task, key, str(attempt), f"{seconds:.6f}", words)
        os.write(self._file, ("\t".join(fields) + "\n").encode())

    @contextmanager
    def run(self, task: str = "", key: str = "", attempt: int = 0) -> Iterator[TaskRun]:
        """Write the start and the end of what is inside; by default it is the job that runs here."""
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
    """Reads what was added to a journal since the last look."""

    def __init__(self, path: Path) -> None:
        """Begin at the beginning."""
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
    """Return a line from its text; raises ValueError."""
    at, kind, pid, task, key, attempt, seconds, note = text.split("\t")
    if kind not in _KINDS:
        raise ValueError(f"no line of a journal: {text!r}")
    return JournalEntry(float(at), cast("Kind", kind), int(pid), task, key, int(attempt), float(seconds), note)
