"""A progress bar on standard error, where that is a terminal; nothing elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from conveyor.errors import ConveyorError
from conveyor.events import JobEnded, ProgressChanged
from conveyor.ids import clean
from conveyor.jobs.watching import Watcher

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from conveyor.events import JobUpdate
    from conveyor.jobs.watching import Changes, WatchHub

_PAUSE = 0.1
"""Seconds between two drawings; the last one is always drawn."""
_WIDTH = 24
_SAMPLES = 3
"""Steps after which the time that is left is estimated."""


def can_redraw(stream: TextIO) -> bool:
    """Tell whether lines on *stream* can be drawn again: it is a terminal, and not one that only prints (``TERM=dumb``)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class ProgressBar:
    """One line of a terminal that is drawn again and again. `close` removes it, so that what follows stands in its place."""

    def __init__(self) -> None:
        self.on_terminal = can_redraw(sys.stderr)
        self._first: tuple[float, float] | None = None  # what was done when it was first shown, and when that was
        self._drawn_at = 0.0
        self._steps = 0
        self._line = ""
        self._parts: dict[str, float] = {}
        self._ended: set[str] = set()

    def follow(self, update: JobUpdate, jobs: int) -> None:
        """Draw what an update says: of one job its progress, of several how far all of them are, and how many have ended."""
        if jobs == 1:
            if isinstance(update, ProgressChanged):
                self.show(update.done, update.total, update.text)
            return
        if isinstance(update, ProgressChanged) and update.total:
            self._parts[update.job_id] = min(1.0, (update.done or 0) / update.total)
        elif isinstance(update, JobEnded):
            self._parts[update.job_id] = 1.0
            self._ended.add(update.job_id)
        if self._parts:
            self.show(sum(self._parts.values()), jobs, count=f"{len(self._ended):,} of {jobs:,} jobs ended")

    def show(self, done: float | None, total: float | None, text: str = "", *, count: str = "") -> None:
        """Draw *done* of *total*, and a text; where the total is not known, what is. *count* stands in place of both numbers."""
        self._steps += 1
        is_last = total is not None and done is not None and done >= total
        now = monotonic()
        if self.on_terminal and (is_last or now - self._drawn_at >= _PAUSE):
            self._drawn_at = now
            left = self._time_left(done, total, now)
            self._draw(progress_line(done, total, text, left, shutil.get_terminal_size().columns, count=count))

    def say(self, text: str) -> None:
        """Draw a line without a bar."""
        if self.on_terminal:
            self._draw(clean(text)[: shutil.get_terminal_size().columns - 1])

    def close(self) -> None:
        """Remove the line."""
        if self._line:
            self._line = ""
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _time_left(self, done: float | None, total: float | None, now: float) -> float | None:
        """Estimate it from what was done while somebody looked: a job may have run for long before."""
        if done is None or total is None:
            return None
        if self._first is None or done < self._first[0]:  # the next attempt begins anew
            self._first, self._steps = (done, now), 1
        first, since = self._first
        if done <= first or self._steps < _SAMPLES or done >= total:
            return None
        return (now - since) * (total - done) / (done - first)

    def _draw(self, line: str) -> None:
        if line != self._line:
            self._line = line
            encoding = sys.stderr.encoding or "ascii"
            sys.stderr.write("\r\x1b[K" + line.encode(encoding, "replace").decode(encoding))
            sys.stderr.flush()


def progress_line(
    done: float | None, total: float | None, text: str, seconds_left: float | None, columns: int, *, count: str = ""
) -> str:
    """Return the line of a bar, cut to the width of the terminal."""
    words = []
    if done is not None and total:
        part = min(1.0, max(0.0, done / total))
        filled = round(part * _WIDTH)
        words.append("█" * filled + "░" * (_WIDTH - filled))
        words.append(f"{part:4.0%}")
    if count or done is not None:
        words.append(count or f"{done:,}" + (f" of {total:,}" if total else ""))
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        words.append(f"{minutes}:{seconds:02} left")
    if text:
        words.append(clean(text))
    return "  ".join(words)[: max(columns - 1, 1)]


class JobBar:
    """A block in which the progress of jobs is drawn, by the thread that watches them. Nothing is watched without a terminal."""

    def __init__(self, hub: WatchHub, changes: Sequence[Changes]) -> None:
        self._hub, self._bar = hub, ProgressBar()
        self._watcher = Watcher(changes, self._draw)
        self._closed = False

    def __enter__(self) -> None:
        if self._bar.on_terminal:
            self._hub.add(self._watcher)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        if self._bar.on_terminal:
            self._hub.remove(self._watcher)
            self._bar.close()

    def _draw(self) -> None:
        try:
            updates = self._watcher.take()
        except ConveyorError:  # whoever waits for the job is told
            return
        for update in updates if not self._closed else ():
            draw_update(self._bar, update)


def draw_update(bar: ProgressBar, update: JobUpdate) -> None:
    """Draw what an update says."""
    if isinstance(update, ProgressChanged):
        bar.show(update.done, update.total, update.text)
    else:
        again = f", attempt {update.attempt}" if update.attempt > 1 else ""
        bar.say(f"{update.job_id} is {update.state}{again}")
