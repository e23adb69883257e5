"""
Draw `floors.svg`: the packages of the library on their floors, read from its imports.

    python docs/images/draw_floors.py           # writes docs/images/floors.svg
    python docs/images/draw_floors.py --check   # exits 1 when the picture is not that of the source

A package stands one floor above the highest package that it imports. So the picture holds no list of its own.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
sys.path.append(str(PROJECT / "tests"))

from support.import_graph import find_imports, read_tree  # type: ignore[import-not-found]  # noqa: E402  as the layers test reads them

ROOT = PROJECT / "src" / "conveyor"
PICTURE = HERE / "floors.svg"

WIDTH, MARGIN, GAP, LINE = 1000, 24, 12, 16
SUBJECTS = {
    "acting": "who acts",
    "ids": "job ids, queue names",
    "units": "durations, sizes",
    "errors": "the exception tree",
    "events": "typed events",
    "payload": "values ↔ bytes",
    "store": "all that knows Redis",
    "messaging": "queues of messages",
    "jobs": "tasks and the app",
    "worker": "runs jobs",
    "sql": "outbox and ledger in a database",
    "admin": "questions and actions",
    "cli": "the command line",
}


def read_packages() -> tuple[dict[str, dict[str, list[str]]], dict[str, set[str]]]:
    """Return package → folder → file names, and package → the packages it imports."""
    rooms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    tree = {name: text for name, text in read_tree(ROOT).items() if not name.split(".")[-1].startswith("__")}
    for name in tree:
        _, *parts = name.split(".")
        if parts and not (ROOT / "/".join(parts)).is_dir():
            rooms[parts[0]]["/".join(parts[1:-1])].append(parts[-1])
    imports: dict[str, set[str]] = defaultdict(set)
    for found in find_imports(tree):
        package, target = found.source.split(".")[1:2], found.target.split(".")[1:2]
        if package and target and package != target:
            imports[package[0]].add(target[0])
    return rooms, imports


def floors(imports: Mapping[str, set[str]], rooms: Mapping[str, object]) -> list[list[str]]:
    """Return the packages floor by floor, the lowest first. Raises RecursionError when they import in a circle."""

    def height(package: str) -> int:
        return max((1 + height(below) for below in imports.get(package, set()) if below in rooms), default=0)

    found: dict[int, list[str]] = defaultdict(list)
    for package in rooms:
        found[height(package)].append(package)
    return [sorted(found[number]) for number in sorted(found)]


def _wrapped(names: list[str], width: float) -> list[str]:
    lines, line = [], ""
    for name in names:
        if line and (len(line) + len(name) + 2) * 7.4 > width:  # a monospaced glyph is 7.4 px wide
            lines.append(line)
            line = ""
        line += ("  " if line else "") + name
    return [*lines, line] if line else lines


def _room(package: str, folders: Mapping[str, list[str]], x: float, y: float, width: float) -> tuple[str, float]:
    rows: list[tuple[str, str]] = []
    for folder in sorted(folders):
        if folder:
            rows.append(("folder", f"{folder}/"))
        if folders[folder] != [package]:
            rows += [("file", line) for line in _wrapped(folders[folder], width - 2 * GAP)]
    height = 2 * LINE + LINE * len(rows) + GAP
    title = package if folders.get("") == [package] or not folders else f"{package}/"
    what = f'<tspan class="what" dx="8">{escape(SUBJECTS.get(package, ""))}</tspan>'
    out = [
        f'<rect class="room" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>',
        f'<text class="title" x="{x + GAP:g}" y="{y + 22:g}">{title}{what}</text>',
    ]
    for number, (kind, text) in enumerate(rows):
        out.append(f'<text class="{kind}" x="{x + GAP:g}" y="{y + 42 + LINE * number:g}">{escape(text)}</text>')
    return "\n".join(out), height


def draw() -> str:
    """Return the picture."""
    rooms, imports = read_packages()
    for name in [path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("__")]:
        rooms[name] = {"": [name]}
    y, body = float(MARGIN), []
    for number, floor in reversed(list(enumerate(floors(imports, rooms), 1))):
        width = (WIDTH - 2 * MARGIN - 90 - GAP * (len(floor) - 1)) / len(floor)
        drawn = [
            _room(name, rooms[name], MARGIN + 90 + place * (width + GAP), y, width) for place, name in enumerate(floor)
        ]
        height = max(tall for _, tall in drawn)
        body.append(f'<text class="floor" x="{MARGIN}" y="{y + 22:g}">floor {number}</text>')
        body += [text for text, _ in drawn]
        y += height + GAP
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + GAP:g}" role="img"
  aria-label="The packages of Conveyor: each imports only from lower floors">
<style>
  text {{ font-family: ui-sans-serif, system-ui, sans-serif; fill: #24292f; }}
  .room {{ fill: #f6f8fa; stroke: #d0d7de; }}
  .title {{ font-size: 15px; font-weight: 600; }}
  .what {{ font-size: 12px; font-weight: 400; fill: #57606a; }}
  .floor {{ font-size: 12px; fill: #57606a; }}
  .folder {{ font-size: 12px; font-weight: 600; fill: #0550ae; }}
  .file {{ font-size: 12px; font-family: ui-monospace, monospace; fill: #424a53; white-space: pre; }}
  .ground {{ fill: #ffffff; }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3; }} .room {{ fill: #161b22; stroke: #30363d; }} .what, .floor {{ fill: #8b949e; }}
    .folder {{ fill: #79c0ff; }} .file {{ fill: #c9d1d9; }} .ground {{ fill: #0d1117; }}
  }}
</style>
<rect class="ground" width="100%" height="100%" rx="10"/>
{chr(10).join(body)}
</svg>
"""


def main() -> int:
    """Write the picture, or compare it."""
    text = draw()
    if "--check" in sys.argv[1:]:
        return 0 if PICTURE.exists() and PICTURE.read_text() == text else 1
    PICTURE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
