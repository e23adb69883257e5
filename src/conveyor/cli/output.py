"""
Output of commands, and questions to the user.

Tables on a terminal, tab-separated text in a pipe, or one JSON document with `--json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import click

from conveyor.cli.exit import ExitCode
from conveyor.errors import ConfigurationError
from conveyor.ids import CONTROL_IN_LINES, clean, clean_lines
from conveyor.units import iso_timestamp, quantity, rough_span, span

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.admin.views import ActionResult

_COLOURS = {
    "dead": "red", "leased": "cyan", "scheduled": "yellow", "ready": "green", "cancelled": "magenta",
    "paused": "yellow", "stranded": "red", "not found": "red", "refused": "red",
}  # fmt: skip
_LEAST_BESIDE = 40
"""Columns that the last column of a table has at least, or it is printed below each row."""
MARKS = {"ok": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


class StandardOutputError(Exception):
    """Standard output cannot be written."""


class Output:
    """The output of one command: data on standard output, all other text on standard error."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.on_terminal = sys.stdout.isatty()

    def document(self, name: str, **content: Any) -> None:
        """Print one JSON document with a versioned schema."""
        from conveyor.admin.views import json_form

        text = json.dumps({"schema": f"conveyor/{name}@1", **content}, default=json_form, ensure_ascii=False)
        # JSON leaves them as they are, but a terminal may act on them.
        _print(CONTROL_IN_LINES.sub(lambda match: json.dumps(match[0])[1:-1], text))

    def line(self, text: str) -> None:
        """Print one line of data."""
        _print(text)

    def say(self, text: str) -> None:
        """Print a line that is not data, on standard error."""
        click.echo(clean_lines(text), err=True)

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[object]], *, narrow: str = "", below: bool = False
    ) -> None:
        """
        Print rows: aligned under headings on a terminal, otherwise tab-separated without them.

        On a terminal too narrow for them, the start of the column *narrow* is cut, and with *below* the last column is
        printed in a line of its own below each row.
        """
        if self.on_terminal:
            _print_aligned(headings, rows, narrow, below=below)
        else:
            for row in rows:
                _print("\t".join(machine_text(cell) for cell in row))

    def pairs(self, rows: Sequence[tuple[str, object]]) -> None:
        """Print named values, one a line. A terminal does not show empty ones."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            if not self.on_terminal:
                _print(f"{name}\t{machine_text(value)}")
            elif value is not None and value != "":
                _print(f"{click.style(name.ljust(width), dim=True)}  {_colour_state(human_text(value))}")

    def confirm(self, question: str, *, yes: bool, dry_run: bool) -> bool:
        """
        Return whether to proceed: with *yes*, or when the user agrees.

        Ends the command with 6 when the user does not agree, or there is no terminal to ask on.
        """
        if dry_run:
            self.say(f"{question}  Nothing was done (--dry-run).")
            return False
        if yes:
            return True
        if not sys.stdin.isatty():
            self.say(f"{question}  Not confirmed: give --yes. Nothing was done.")
            raise click.exceptions.Exit(ExitCode.REFUSED)
        try:
            confirmed = click.confirm(question, default=False, err=True)
        except click.Abort:
            self.say("")  # the shell's prompt then starts on its own line
            raise
        if not confirmed:
            self.say("Nothing was done.")
            raise click.exceptions.Exit(ExitCode.REFUSED)
        return True


class OutcomeCounter(Counter[str]):
    """The outcomes of an action on many jobs, each with the number of jobs that had it."""

    def follow(
        self, out: Output, total: int, pages: Iterable[list[ActionResult]],
        on_page: Callable[[list[ActionResult]], None] | None = None,
    ) -> None:  # fmt: skip
        """Count the results of the *pages*, of *total* jobs, while a line says how far the action is; hand each page on."""
        with ProgressLine(out, "done", total) as progress:
            for results in pages:
                self.update(one.outcome for one in results)
                if on_page is not None:
                    on_page(results)
                progress.add(len(results))

    @property
    def done(self) -> int:
        """The number of jobs that were changed."""
        return sum(count for outcome, count in self.items() if outcome not in {"refused", "not found"})

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the command."""
        return ExitCode.REFUSED if self["refused"] else ExitCode.OK

    def show(self, out: Output) -> None:
        """Print a line for each outcome, for people."""
        for outcome, number in self.items():
            out.line(f"{quantity(number, 'job')} {outcome}.")


class ProgressLine:
    """A line on a terminal that says how far an action is, from its second second on; nothing where there is no terminal."""

    def __init__(self, out: Output, done: str, total: int) -> None:
        """Begin to count *total* jobs, which are *done*: "cancelled"."""
        self._out, self._done, self._total = out, done, total
        self._shown_at = monotonic()
        self._shown = False
        self.count = 0

    def add(self, count: int) -> None:
        """Count some."""
        from conveyor.jobs.progress_bar import can_redraw

        self.count += count
        if monotonic() - self._shown_at >= 1 and can_redraw(sys.stderr):
            self._shown_at, self._shown = monotonic(), True
            click.echo(f"\r\x1b[K{self.count:,} of {self._total:,} {self._done}", nl=False, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)
        if kind is not None:
            self._out.say(
                f"Stopped: {self.count:,} of {self._total:,} {self._done}. The same command goes on with the rest."
            )


def confirm_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--yes`` and ``--dry-run``."""
    function = click.option("--dry-run", is_flag=True, help="Only show what would be done.")(function)
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)


def machine_text(value: object) -> str:
    """Return a value as text for programs: exact, on one line, without tabs."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return iso_timestamp(value)
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.3f}"
    return clean(str(value))


def human_text(value: object) -> str:
    """Return a value as text for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        seconds = (value - datetime.now(UTC)).total_seconds()
        return f"in {span(seconds)}" if seconds > 0 else f"{span(-seconds)} ago"
    if isinstance(value, timedelta):
        return span(value.total_seconds())
    return clean(str(value))


def short_time(at: datetime) -> str:
    """Return how far away an instant is, in one unit: ``38 m ago``, ``in 2 h``."""
    seconds = (at - datetime.now(UTC)).total_seconds()
    text = rough_span(abs(seconds))
    return f"in {text}" if seconds > 0 else f"{text} ago"


def clock_time(at: datetime) -> str:
    """
    Return an instant as a local time: ``02:14``, ``Nov 26 23:50``, ``2025-11-26``.

    A time alone is of the last 24 hours, as `--since 02:14` reads it: at night half of them are yesterday's.
    """
    local, now = at.astimezone(), datetime.now(UTC).astimezone()
    if local.date() == now.date() or timedelta() <= now - local < timedelta(hours=23, minutes=59):
        return f"{local:%H:%M}"
    return f"{local:%b %d %H:%M}" if abs(now - local) < timedelta(days=180) else f"{local:%Y-%m-%d}"


def parse_seconds(text: str, *, name: str) -> float:
    """Convert ``30``, ``5s`` or ``1h30m`` to seconds; raises ConfigurationError."""
    from conveyor.units import milliseconds

    is_number = text.isascii() and text.replace(".", "", 1).isdigit()
    return milliseconds(float(text) if is_number else text, name=name) / 1000


def _print(text: str) -> None:
    """Print a line on standard output; raises StandardOutputError, such as for a full disk."""
    try:
        click.echo(clean_lines(text))
    except BrokenPipeError:
        raise  # the reader is gone: click ends the command without an error
    except OSError as error:
        with suppress(OSError):  # what was not written is tried again at the end, and the exit code would be 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StandardOutputError(f"Cannot write to standard output: {error.strerror or error}") from error


def terminal_width() -> int:
    """Return the columns of the terminal; 80 where that is not known."""
    return shutil.get_terminal_size().columns


def shortened(text: str, width: int) -> str:
    """Return *text* in at most *width* characters: the end of a longer one is cut."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _print_aligned(
    headings: Sequence[str], rows: Sequence[Sequence[object]], narrow: str = "", *, below: bool = False
) -> None:
    cells = [[human_text(cell) for cell in row] for row in rows]
    numeric = [all(isinstance(row[i], int | float | timedelta | None) for row in rows) for i in range(len(headings))]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(headings)]
    columns = terminal_width()
    last_width = columns - sum(widths[:-1]) - 2 * (len(widths) - 1)
    below = below and last_width < min(widths[-1], _LEAST_BESIDE)
    shown = len(headings) - below  # columns that stand in the row itself
    if not below:
        widths[-1] = min(widths[-1], max(last_width, 12))
    if narrow:
        at, excess = headings.index(narrow), sum(widths[:shown]) + 2 * (shown - 1) - columns
        widths[at] = max(widths[at] - max(excess, 0), min(widths[at], 12))

    def padded(row: Sequence[str]) -> list[str]:
        fitted = [shortened(cell, widths[i]) if i + 1 == len(headings) else cell for i, cell in enumerate(row)]
        if narrow and len(row[at]) > widths[at]:
            fitted[at] = "…" + row[at][1 - widths[at] :]
        return [
            cell.rjust(widths[i]) if numeric[i] else cell.ljust(widths[i]) if i + 1 < shown else cell
            for i, cell in enumerate(fitted[:shown])
        ]

    _print(click.style("  ".join(padded([name.upper() for name in headings])).rstrip(), bold=True))
    for row in cells:
        _print("  ".join(_colour_state(cell) for cell in padded(row)).rstrip())
        if below and row[-1] not in {"", "-"}:
            _print("    " + shortened(row[-1], columns - 4))


def _colour_state(cell: str) -> str:
    colour = _COLOURS.get(cell.strip())
    return click.style(cell, fg=colour) if colour else cell


def parse_instant(text: str | None) -> datetime | None:
    """Return what --at says; raises ConfigurationError."""
    if text is None:
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"--at {text!r} is not an ISO 8601 instant such as 2026-05-01T09:00+02:00.") from error
    if instant.tzinfo is None:
        raise ConfigurationError(
            f"--at {text!r} has no time zone. Add one: 2026-05-01T09:00+02:00, or Z for UTC.", code="E18"
        )
    return instant
