"""
Records `conveyor demo` in a pseudo terminal and draws docs/images/demo.svg from what it printed.

    .venv/bin/python docs/images/record_demo.py

The upper part of the picture is the live screen some two seconds after a worker was killed. The lower part is the report
at the end without its table of tasks. The text, the colours and the positions are those of one recorded run.
"""

from __future__ import annotations

import codecs
import fcntl
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from unicodedata import east_asian_width

ROOT = Path(__file__).parent.parent.parent
PICTURE = Path(__file__).with_name("demo.svg")
COLUMNS, ROWS = 96, 24
KILLED, BUSY, REPORT, TABLE = "SIGKILL to worker", re.compile(r"worker .* runs [1-9]"), "accepted", "TASK"
AFTER_KILL, UNTIL_STOP = 2.0, 6.0
"""Seconds from the kill to the earliest live screen that is drawn, and to ctrl-C."""


@dataclass(frozen=True)
class Style:
    """Style of a character; *colour* is the number of an SGR code, 0: the colour of plain text."""

    colour: int = 0
    bold: bool = False
    dim: bool = False


Row = list[tuple[str, Style]]


@dataclass
class Screen:
    """Text of a terminal, with all lines that have scrolled away; it knows the few codes that the demo uses."""

    rows: list[Row] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: Style = Style()

    def feed(self, text: str) -> None:
        """Receive output of the program."""
        for code, plain in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([^\x1b])", text):
            if code:
                self._obey(code)
            elif plain == "\n":
                self.row += 1
                self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]
            elif plain == "\r":
                self.column = 0
            else:
                self._put(plain)

    def lines(self) -> list[str]:
        """Return the text without its styles."""
        return ["".join(character for character, _ in row).rstrip() for row in self.rows]

    def _put(self, character: str) -> None:
        row = self.rows[self.row]
        row += [(" ", Style())] * (self.column - len(row))
        cells = [(character, self.style)]
        if east_asian_width(character) in "WF":
            cells.append(("", self.style))  # the right half of a wide character
        row[self.column : self.column + len(cells)] = cells
        self.column += len(cells)

    def _obey(self, code: str) -> None:
        number, kind = code[:-1], code[-1]
        if kind == "A":
            self.row = max(0, self.row - int(number or 1))
        elif kind == "K":
            del self.rows[self.row][self.column :]
        elif kind == "J":
            del self.rows[self.row][self.column :], self.rows[self.row + 1 :]
        elif kind == "m":
            for part in number.split(";"):
                self.style = _styled(self.style, int(part or 0))


def _styled(style: Style, code: int) -> Style:
    if code == 0:
        return Style()
    if code in {1, 2}:
        return replace(style, bold=style.bold or code == 1, dim=style.dim or code == 2)
    return replace(style, colour=code)


def record() -> tuple[list[Row], list[Row]]:
    """Run the demo and press ctrl-C some time after the kill; return the live screen then, and the report."""
    screen, killed_at = Screen(), 0.0
    live: list[Row] = []
    for text in _output():
        screen.feed(text)
        now = time.monotonic()
        if not killed_at and any(KILLED in line for line in screen.lines()):
            killed_at = now
        busy = any(map(BUSY.match, screen.lines()))
        if not live and busy and killed_at and now > killed_at + AFTER_KILL and text.endswith("\x1b[J"):
            live = [list(row) for row in screen.rows]
    lines = screen.lines()
    if not live:
        raise SystemExit("The demo ended before the picture was taken:\n" + "\n".join(lines))
    start = max(number for number, line in enumerate(lines) if line.startswith(REPORT))
    table = next(number for number, line in enumerate(lines) if number > start and line.startswith(TABLE))
    after = next(number for number, line in enumerate(lines) if number > table and not line)
    return live, screen.rows[start:table] + screen.rows[after + 1 :]


def _output() -> Iterator[str]:
    """Yield what the demo prints, cut after each redraw of its screen."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    command = [sys.executable, "-m", "conveyor", "demo"]
    demo = subprocess.Popen(  # noqa: S603
        command, cwd=ROOT, stdin=inner, stdout=inner, stderr=inner, env=environment | {"TERM": "xterm-256color"}
    )
    os.close(inner)
    decoder, kept, stop_at = codecs.getincrementaldecoder("utf-8")(), "", None
    while data := _read(terminal):
        kept += decoder.decode(data)
        *frames, kept = re.split(r"(?<=\x1b\[J)", kept)
        yield from frames
        if stop_at is None and any(KILLED in frame for frame in frames):
            stop_at = time.monotonic() + UNTIL_STOP
        elif stop_at is not None and time.monotonic() > stop_at:
            demo.send_signal(signal.SIGINT)
            stop_at = math.inf  # once only
    yield kept
    if demo.wait() != 0:
        raise SystemExit(f"conveyor demo ended with {demo.returncode}:\n{kept}")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


# -- drawing --------------------------------------------------------------------------------------------------------

FONT, CELL, LINE = 14, 8.4, 20
LEFT, TOP, BOTTOM = 22, 62, 20
WIDTH = round(2 * LEFT + COLUMNS * CELL)
BARS = " ▁▂▃▄▅▆▇█"
CLASSES = {31: "r", 32: "g", 33: "y", 36: "c"}
CSS = """
  text { font: 14px ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; white-space: pre; fill: #d5dbe5 }
  .b { font-weight: bold; fill: #ffffff } .d { fill: #8592a6 } .r { fill: #ff7b72 } .g { fill: #56d364 } .y { fill: #e3b341 } .c { fill: #56c8d8 }
  .window { fill: #10161f; stroke: #3a4656 } .bar { fill: #1b2430 } .rule { stroke: #3a4656 }
  @media (prefers-color-scheme: light) {
    text { fill: #2a3240 }
    .b { fill: #000000 } .d { fill: #667080 } .r { fill: #c4212b } .g { fill: #18803a } .y { fill: #8a6100 } .c { fill: #0b7d93 }
    .window { fill: #fbfcfd; stroke: #c9d1db } .bar { fill: #eef1f5 } .rule { stroke: #c9d1db }
  }
"""  # noqa: E501


def draw(live: list[Row], report: list[Row]) -> str:
    """Return the picture as SVG."""
    upper = [_typed("make demo"), [], *_trimmed(live)]
    lower = _trimmed(report)
    rule_at = TOP + LINE * len(upper) + 4
    height = rule_at + 40 + LINE * len(lower) + BOTTOM - 12
    dots = "".join(
        f'<circle cx="{LEFT + 6 + 20 * n}" cy="19" r="6" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        "<title>conveyor demo: producers push, workers run jobs, one worker is killed, and no accepted job is lost</title>",
        f"<style>{CSS}</style>",
        f'<rect class="window" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        f'<path class="bar" d="M1 38 V10 A9 9 0 0 1 10 1 H{WIDTH - 10} A9 9 0 0 1 {WIDTH - 1} 10 V38 Z"/>',
        dots,
        *(one for number, row in enumerate(upper) for one in _row(row, TOP + LINE * number)),
        f'<path class="rule" stroke-dasharray="3 5" d="M{LEFT} {rule_at} H{WIDTH - LEFT}"/>',
        f'<text class="d" x="{WIDTH - LEFT}" y="{rule_at + 28}" text-anchor="end">at the end, after ctrl-C</text>',
        *(one for number, row in enumerate(lower) for one in _row(row, rule_at + 28 + LINE * number)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _typed(command: str) -> Row:
    prompt: Row = [("$", Style(dim=True)), (" ", Style())]
    return prompt + [(character, Style(bold=True)) for character in command]


def _trimmed(rows: list[Row]) -> list[Row]:
    """Return *rows* without empty ones at either end."""
    full = [number for number, row in enumerate(rows) if "".join(character for character, _ in row).strip()]
    return rows[full[0] : full[-1] + 1]


def _row(row: Row, y: float) -> Iterator[str]:
    """Yield the elements of one row: bars as rectangles, words at their columns."""
    column = 0
    while column < len(row):
        character, style = row[column]
        end = column + 1
        if character in BARS and character != " ":
            tall = LINE * 0.8 * BARS.index(character) / 8
            yield (
                f'<rect class="{_class(style)}" x="{_x(column):.1f}" y="{y + 3 - tall:.1f}" '
                f'width="{CELL - 1:.1f}" height="{tall:.1f}"/>'
            )
        elif character.strip():
            end = _word_end(row, column)
            word = "".join(one for one, _ in row[column:end])
            if word in {"⚡", "⟲"}:
                word += "\ufe0e"  # as text, not as a coloured picture
            kind = f' class="{_class(style)}"' if _class(style) else ""
            # The length keeps columns in line, whatever font the reader has.
            length = f' textLength="{(end - column) * CELL:.1f}"' if end - column > 2 else ""
            yield f'<text{kind} x="{_x(column):.1f}" y="{y}"{length}>{escape(word)}</text>'
        column = end


def _word_end(row: Row, start: int) -> int:
    """Return where the words end that begin at *start*: before two spaces, another style, a bar or a symbol."""
    style, column = row[start][1], start
    if not row[start][0].isascii() and row[start][0] in "⚡⟲✓✗":
        return start + (2 if row[start + 1][0] == "" else 1)
    while column < len(row) and row[column][1] == style and row[column][0] not in "⚡⟲✓✗▁▂▃▄▅▆▇█":
        if "".join(one for one, _ in row[column : column + 2]) == "  ":
            break
        column += 1
    return column


def _class(style: Style) -> str:
    if style.colour:
        return CLASSES[style.colour]
    return "b" if style.bold else "d" if style.dim else ""


def _x(column: int) -> float:
    return LEFT + column * CELL


if __name__ == "__main__":
    PICTURE.write_text(draw(*record()), "utf-8")
    print(PICTURE.relative_to(ROOT))
