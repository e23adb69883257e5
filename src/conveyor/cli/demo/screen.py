"""What a person sees of the demo while it runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import TextIO

import click

from conveyor.cli.demo.journal import JournalEntry
from conveyor.cli.demo.play import DemoState
from conveyor.cli.output import version

_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 24
_HIDE, _SHOW, _UP, _END_OF_LINE, _BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[{}A", "\x1b[K", "\x1b[J"
_EVENTS_KEPT = 200


class RateMeter:
    """How much a count grew in each of the last half seconds."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._steps: deque[float] = deque(maxlen=_SPARK)
        self._last = 0
        self._at = time.monotonic()

    def take(self, count: int) -> None:
        """Note the count; more often than twice a second changes nothing."""
        now = time.monotonic()
        if now - self._at >= 0.5:
            self._steps.append((count - self._last) / (now - self._at))
            self._last, self._at = count, now

    def drawn(self, colour: str) -> str:
        """Return the steps as bars, the newest on the right, and the present rate."""
        most = max(self._steps, default=0) or 1
        bars = "".join(_BARS[min(7, int(8 * step / most))] for step in self._steps).rjust(_SPARK)
        return f"{click.style(bars, fg=colour)} {self.per_second:4.0f}/s"

    @property
    def per_second(self) -> float:
        """The mean of the last two seconds."""
        last = list(self._steps)[-4:]
        return sum(last) / len(last) if last else 0.0


class LineDisplay:
    """Plain text: a line a second, and one for everything out of the ordinary."""

    def __init__(self, out: TextIO, seconds: float | None) -> None:
        """Take where to write."""
        self._out, self._rate = out, RateMeter()
        self._next, self._introduced, self._began = 0.0, False, False

    def show(self, view: DemoState) -> None:
        """Write what is new."""
        self._rate.take(view.totals["ok"])
        if view.server and not self._introduced:
            self._introduced = True
            self._say(f"conveyor {version()} · {view.server}")
        if view.first_done is not None and not self._began:
            self._began = True
            self._say(f"the first job was done {view.first_done:.1f} s after the start")
        for news in view.news:
            self._say(f"{_clock()} {news}")
        if view.server and time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            running = sum(len(worker.running) for worker in view.workers.values() if worker.killed_at is None)
            self._say(
                f"{_clock()} {view.phase}: accepted {view.accepted}, done {view.totals['ok']}, "
                f"retried {view.totals['retry']}, dead {view.totals['dead']}, running {running}, queued {view.queued}, "
                f"{self._rate.per_second:.0f}/s"
            )

    def close(self) -> None:
        """Nothing to restore."""

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


class LiveDisplay:
    """A picture redrawn in place, no taller and no wider than the terminal."""

    def __init__(self, out: TextIO, seconds: float | None) -> None:
        """Hide the cursor; `close` shows it again."""
        self._out, self._seconds = out, seconds
        self._events: deque[str] = deque(maxlen=_EVENTS_KEPT)
        self._news: deque[str] = deque(maxlen=2)  # stays while the events rush by
        self._in, self._done = RateMeter(), RateMeter()
        self._height = 0
        self._colour = click.get_current_context().color is not False
        self._out.write(_HIDE)

    def show(self, view: DemoState) -> None:
        """Draw *view* over what stood there before."""
        self._in.take(view.accepted)
        self._done.take(view.totals["ok"])
        for line in view.lines:
            if (text := describe(line)) is not None:
                self._events.append(text)
        self._news.extend(click.style(f"{_clock()} {news}", bold=True) for news in view.news)
        columns, rows = shutil.get_terminal_size()
        lines = self._picture(view)
        room = max(1, rows - len(lines) - 2)
        events = list(self._events)[-room:]
        lines += [*events, *[""] * (min(room, 12) - len(events)), self._footer(view)]
        fitted = [self._fitted(line, columns) for line in lines[: rows - 1]]
        begin = "\r" + (_UP.format(self._height) if self._height else "")
        self._out.write(begin + "".join(f"{line}{_END_OF_LINE}\n" for line in fitted) + _BELOW)
        self._out.flush()
        self._height = len(fitted)

    def close(self) -> None:
        """Show the cursor."""
        self._out.write(_SHOW)
        self._out.flush()

    def _fitted(self, line: str, columns: int) -> str:
        plain = click.unstyle(line)
        if len(plain) >= columns:
            return plain[: columns - 1]
        return line if self._colour else plain

    def _picture(self, view: DemoState) -> list[str]:
        spent = time.monotonic() - view.began
        clock = f"{spent:.0f} s" if self._seconds is None else f"{min(spent, self._seconds):.0f} of {self._seconds:g} s"
        totals, dim = view.totals, _dim
        ended = f"{totals['ok']:,} · retried {totals['retry']:,} · dead {totals['dead']:,}"
        return [
            f"{click.style('conveyor', bold=True)} {version()} · {view.server or 'starting a server …'} · {clock}",
            "",
            f"{dim('pushed')}  {self._in.drawn('cyan')}  accepted {view.accepted:,}",
            f"{dim('done')}    {self._done.drawn('green')}  done {ended}",
            "",
            dim(f"{'QUEUE':<12}{'READY':>8}{'SCHEDULED':>11}{'LEASED':>8}{'DEAD':>6}"),
            *(
                f"{name:<12}{one.ready:>8,}{one.scheduled:>11,}{one.leased:>8,}{one.dead:>6,}"
                for name, one in view.counts.items()
            ),
            "",
            *_workers(view),
            *self._news,
            "",
        ]

    def _footer(self, view: DemoState) -> str:
        words = {
            "running": "ctrl-C ends it: what is queued is finished first",
            "draining": "draining: nothing more is pushed, what is queued is finished",
            "checking": "looking up every acknowledged id",
        }
        return _dim(words.get(view.phase, ""))


def describe(line: JournalEntry) -> str | None:
    """Return a line of the journal for a person; None for those that are not shown."""
    if line.kind in {"up", "start", "fail"}:
        return None
    mark, colour = {"ok": ("✓", "green"), "retry": ("✗", "yellow"), "dead": ("✗", "red")}[line.kind]
    head = f"{_clock(line.at)} {click.style(mark, fg=colour)} {line.task:<17} {_short(line.key):<11}"
    if line.kind == "retry":
        return f"{head} attempt {line.note} → retry in {line.seconds:.1f} s"
    if line.kind == "dead":
        return f"{head} dead after {line.attempt} attempts: {line.note}"
    took = f"{1000 * line.seconds:,.0f} ms" if line.seconds < 1 else f"{line.seconds:.1f} s"
    again = f" (attempt {line.attempt})" if line.attempt > 1 else ""
    return f"{head} {took:>6}  {_dim(line.note + again)}"


def _workers(view: DemoState) -> list[str]:
    lines = []
    for worker in sorted(view.workers.values(), key=lambda worker: worker.since)[-4:]:
        tasks = ", ".join(dict.fromkeys(line.task for line in worker.running.values()))
        state = f"ran {worker.done:>6,}, runs {len(worker.running)} {_dim(tasks)}"
        if worker.killed_at is not None:
            state = click.style(f"ran {worker.done:>6,}, killed with SIGKILL at {_clock(worker.killed_at)}", fg="red")
        lines.append(f"{_dim('worker')} {worker.pid:<8} {state}")
    return lines or [_dim("starting two workers …")]


def _short(key: str) -> str:
    bare = key.rpartition(":")[2]
    return bare if len(bare) <= 8 else f"{bare[:5]}…{bare[-4:]}"


def _dim(text: str) -> str:
    return click.style(text, dim=True)


def _clock(at: float | None = None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
