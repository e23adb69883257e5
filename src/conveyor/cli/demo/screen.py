"""Displays of a running demo: redrawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import TextIO

import click

from conveyor.cli.demo.journal import JournalEntry
from conveyor.cli.demo.run import DemoState
from conveyor.units import installed_version

_BARS = "▁▂▃▄▅▆▇█"
_BAR_COUNT = 24
_HIDE_CURSOR, _SHOW_CURSOR, _CURSOR_UP, _CLEAR_LINE, _CLEAR_BELOW = (
    "\x1b[?25l",
    "\x1b[?25h",
    "\x1b[{}A",
    "\x1b[K",
    "\x1b[J",
)
_EVENTS_KEPT = 200


class RateMeter:
    """The growth of a count, measured every half second."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_BAR_COUNT)
        self._last = 0
        self._at = time.monotonic()

    def record(self, count: int) -> None:
        """Record the count; calls within half a second of the last are ignored."""
        now = time.monotonic()
        if now - self._at >= 0.5:
            self._rates.append((count - self._last) / (now - self._at))
            self._last, self._at = count, now

    def render(self, colour: str) -> str:
        """Return the rates as bars, the newest on the right, and the present rate."""
        most = max(self._rates, default=0) or 1
        bars = "".join(_BARS[min(7, int(8 * rate / most))] for rate in self._rates).rjust(_BAR_COUNT)
        return f"{click.style(bars, fg=colour)} {self.per_second:4.0f}/s"

    @property
    def per_second(self) -> float:
        """The mean rate of the last two seconds."""
        last = list(self._rates)[-4:]
        return sum(last) / len(last) if last else 0.0


class LineDisplay:
    """A display in plain text: a line a second, and one for every unusual event."""

    def __init__(self, out: TextIO, seconds: float | None) -> None:
        self._out, self._rate = out, RateMeter()
        self._next, self._introduced, self._began = 0.0, False, False

    def show(self, state: DemoState) -> None:
        """Write lines for what is new in *state*."""
        self._rate.record(state.totals["ok"])
        if state.server and not self._introduced:
            self._introduced = True
            self._say(f"conveyor {installed_version()} · {state.server}")
        if state.first_done is not None and not self._began:
            self._began = True
            self._say(f"the first job was done {state.first_done:.1f} s after the start")
        for news in state.news:
            self._say(f"{_clock()} {news}")
        if state.server and time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            running = sum(len(worker.running) for worker in state.workers.values() if worker.killed_at is None)
            self._say(
                f"{_clock()} {state.phase}: accepted {state.accepted}, done {state.totals['ok']}, "
                f"retried {state.totals['retry']}, dead {state.totals['dead']}, running {running}, queued {state.queued}, "
                f"{self._rate.per_second:.0f}/s"
            )

    def close(self) -> None:
        """Do nothing: a plain display has nothing to restore."""

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


class LiveDisplay:
    """A display redrawn in place, within the size of the terminal. It hides the cursor."""

    def __init__(self, out: TextIO, seconds: float | None) -> None:
        self._out, self._seconds = out, seconds
        self._events: deque[str] = deque(maxlen=_EVENTS_KEPT)
        self._news: deque[str] = deque(maxlen=2)  # stays while events scroll
        self._accepted_rate, self._done_rate = RateMeter(), RateMeter()
        self._lines_drawn = 0
        self._colour = click.get_current_context().color is not False
        self._out.write(_HIDE_CURSOR)

    def show(self, state: DemoState) -> None:
        """Draw *state* over what was drawn before."""
        self._accepted_rate.record(state.accepted)
        self._done_rate.record(state.totals["ok"])
        for entry in state.entries:
            if (text := describe(entry)) is not None:
                self._events.append(text)
        self._news.extend(click.style(f"{_clock()} {news}", bold=True) for news in state.news)
        columns, rows = shutil.get_terminal_size()
        lines = self._frame(state)
        free_rows = max(1, rows - len(lines) - 2)
        events = list(self._events)[-free_rows:]
        lines += [*events, *[""] * (min(free_rows, 12) - len(events)), self._footer(state)]
        shown = [self._fit(line, columns) for line in lines[: rows - 1]]
        begin = "\r" + (_CURSOR_UP.format(self._lines_drawn) if self._lines_drawn else "")
        self._out.write(begin + "".join(f"{line}{_CLEAR_LINE}\n" for line in shown) + _CLEAR_BELOW)
        self._out.flush()
        self._lines_drawn = len(shown)

    def close(self) -> None:
        """Show the cursor again."""
        self._out.write(_SHOW_CURSOR)
        self._out.flush()

    def _fit(self, line: str, columns: int) -> str:
        plain = click.unstyle(line)
        if len(plain) >= columns:
            return plain[: columns - 1]
        return line if self._colour else plain

    def _frame(self, state: DemoState) -> list[str]:
        elapsed = time.monotonic() - state.began
        clock = (
            f"{elapsed:.0f} s" if self._seconds is None else f"{min(elapsed, self._seconds):.0f} of {self._seconds:g} s"
        )
        totals, dim = state.totals, _dim
        ended = f"{totals['ok']:,} · retried {totals['retry']:,} · dead {totals['dead']:,}"
        return [
            f"{click.style('conveyor', bold=True)} {installed_version()} · {state.server or 'starting a server …'} · {clock}",
            "",
            f"{dim('pushed')}  {self._accepted_rate.render('cyan')}  accepted {state.accepted:,}",
            f"{dim('done')}    {self._done_rate.render('green')}  done {ended}",
            "",
            dim(f"{'QUEUE':<12}{'READY':>8}{'SCHEDULED':>11}{'LEASED':>8}{'DEAD':>6}"),
            *(
                f"{name:<12}{one.ready:>8,}{one.scheduled:>11,}{one.leased:>8,}{one.dead:>6,}"
                for name, one in state.counts.items()
            ),
            "",
            *_worker_lines(state),
            *self._news,
            "",
        ]

    def _footer(self, state: DemoState) -> str:
        words = {
            "running": "ctrl-C to stop: queued jobs are finished first",
            "draining": "draining: pushing has stopped, queued jobs are finished",
            "checking": "looking up every acknowledged id",
        }
        return _dim(words.get(state.phase, ""))


def describe(entry: JournalEntry) -> str | None:
    """Return a journal entry as a line of text; None for entries that are not shown."""
    if entry.kind in {"up", "start", "fail"}:
        return None
    mark, colour = {"ok": ("✓", "green"), "retry": ("✗", "yellow"), "dead": ("✗", "red")}[entry.kind]
    head = f"{_clock(entry.at)} {click.style(mark, fg=colour)} {entry.task:<17} {_short_id(entry.key):<11}"
    if entry.kind == "retry":
        return f"{head} attempt {entry.note} → retry in {entry.seconds:.1f} s"
    if entry.kind == "dead":
        return f"{head} dead after {entry.attempt} attempts: {entry.note}"
    took = f"{1000 * entry.seconds:,.0f} ms" if entry.seconds < 1 else f"{entry.seconds:.1f} s"
    again = f" (attempt {entry.attempt})" if entry.attempt > 1 else ""
    return f"{head} {took:>6}  {_dim(entry.note + again)}"


def _worker_lines(state: DemoState) -> list[str]:
    lines = []
    for worker in sorted(state.workers.values(), key=lambda worker: worker.since)[-4:]:
        tasks = ", ".join(dict.fromkeys(entry.task for entry in worker.running.values()))
        status = f"ran {worker.done:>6,}, runs {len(worker.running)} {_dim(tasks)}"
        if worker.killed_at is not None:
            status = click.style(f"ran {worker.done:>6,}, killed with SIGKILL at {_clock(worker.killed_at)}", fg="red")
        lines.append(f"{_dim('worker')} {worker.pid:<8} {status}")
    return lines or [_dim("starting two workers …")]


def _short_id(key: str) -> str:
    bare = key.rpartition(":")[2]
    return bare if len(bare) <= 8 else f"{bare[:5]}…{bare[-4:]}"


def _dim(text: str) -> str:
    return click.style(text, dim=True)


def _clock(at: float | None = None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
