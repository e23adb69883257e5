"""A page of the documentation as a program sees it: its blocks, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<kind>\S*)\s*$")
_FILE = re.compile(r"# (?P<name>[\w/]+\.(?:py|toml))$")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_PRINTED = re.compile(r"^\s*print\(.*\)\s+# (?P<text>.+)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it begins at."""

    kind: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file a reader saves it as, when its first line names one."""
        found = _FILE.match(self.text.partition("\n")[0])
        return found["name"] if found else None

    @property
    def printed(self) -> list[str]:
        """The lines that its prints should print: ``print(x)  # text``."""
        return [found["text"] for line in self.text.splitlines() if (found := _PRINTED.match(line))]

    def commands(self) -> list[tuple[str, list[str]]]:
        """Return what is typed in a console block, each with the output shown below it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found and line.strip():
                found[-1][1].append(line)
        return found


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in their order."""
    kind, fence, start, lines = "", "", 0, []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        found = _FENCE.match(line)
        if not fence and found:
            kind, fence, start, lines = found["kind"], found["fence"], number, []
        elif fence and line.rstrip() == fence:
            yield Block(kind, "\n".join(lines) + "\n", start)
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"{path}:{start}: a block without an end"


def prose(path: Path) -> str:
    """Return a page without its blocks and without code in a line."""
    text = re.sub(r"^(`{3,}).*?^\1\s*$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"``.*?``|`[^`\n]*`", "code", text)


def links(path: Path) -> list[str]:
    """Return where a page links to; its pictures are among them."""
    return [found["target"] for found in _LINK.finditer(prose(path))]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges make them."""
    text = re.sub(r"^(`{3,}).*?^\1\s*$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
