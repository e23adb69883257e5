"""The documentation: its examples run, its links resolve, and its lists are complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest

import conveyor
from conveyor import events
from conveyor.cli import COMMANDS, cli
from conveyor.store.keys import QueueKeys
from support.markdown_page import PAGES, ROOT, anchors, blocks, links, prose
from support.page_runner import PageRunner, first_missing

KINDS = {
    "python": "run, or saved when the first line names a file",
    "console": "typed in a terminal",
    "toml": "saved when the first line names a file",
    "sh": "installing and other things that leave the project; what they name is checked",
    "text": "shown, not run",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.leaves_keys("pages show dead letters and what waits")
@pytest.mark.standalone_only("pages speak of one server and of all rights on it", on=("valkey",))
@pytest.mark.parametrize("path", [p for p in PAGES if name(p) != "README.md"], ids=name)
def test_page_works_as_printed(path: Path, tmp_path: Path, url: str) -> None:
    """Every block of a page, done in order by a reader, does what the page says."""
    with PageRunner(tmp_path, url) as reader:
        for block in blocks(path):
            reader.follow(block, f"{name(path)}:{block.line}")


def test_readme_works_as_printed(tmp_path: Path) -> None:
    """The first five minutes, with nothing but the embedded server."""
    with PageRunner(tmp_path, None) as reader:
        for block in blocks(ROOT / "README.md"):
            reader.follow(block, f"README.md:{block.line}")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_resolve(path: Path) -> None:
    """A link leads to a file of the repository, and to a heading in it."""
    for target in links(path):
        if target.startswith(("https://", "http://")):
            continue
        place, _, anchor = target.partition("#")
        found = (path.parent / place).resolve() if place else path
        assert found.exists(), f"{name(path)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name(path)} links to {target}: no such heading"


def test_readme_is_short() -> None:
    """A newcomer reads the README in a few minutes: it has at most 140 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_every_page_is_linked() -> None:
    """From the README one comes to every page."""
    reached, open_ = set(), [ROOT / "README.md"]
    while open_:
        path = open_.pop()
        reached.add(path)
        targets = [(path.parent / target.partition("#")[0]).resolve() for target in links(path) if "://" not in target]
        open_ += [found for found in targets if found in PAGES and found not in reached]
    assert not [name(path) for path in PAGES if path not in reached]


def test_blocks_are_of_known_kinds() -> None:
    """Nothing is hidden from these tests behind another language."""
    kinds = [(name(path), block.line, block.kind) for path in PAGES for block in blocks(path)]
    assert not [one for one in kinds if one[2] not in KINDS]


def test_install_commands_exist() -> None:
    """Targets of make, extras of pip and scripts that a shell block names are there."""
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(block.text for path in PAGES for block in blocks(path) if block.kind == "sh")
    assert text
    for target in re.findall(r"\bmake (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for names in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(names.split(",")) <= set(extras)


def test_proofs_exist() -> None:
    """Each test that the README and the overview name as a proof is in the file they link to."""
    for page in (ROOT / "README.md", ROOT / "docs/overview.md"):
        proofs = re.findall(r"\]\(((?:\.\./)?tests/[\w/]+\.py)\): `(\w+)`", page.read_text())
        assert len(proofs) >= 5
        assert not [test for file, test in proofs if f"def {test}(" not in (page.parent / file).read_text()]


def test_reference_of_names_is_complete() -> None:
    """docs/reference/api.md has every public name."""
    text = (ROOT / "docs/reference/api.md").read_text()
    assert not [one for one in conveyor.__all__ if not re.search(rf"`{one}\b", text)]


def test_reference_of_keys_is_complete() -> None:
    """docs/reference/redis-keys.md has every key that a script or the code makes."""
    text = (ROOT / "docs/reference/redis-keys.md").read_text()
    keys = QueueKeys("n", "q")
    names = {
        str(getattr(keys, slot))
        for slot in QueueKeys.__slots__
        if slot not in {"events_kept", "foreign", "partitions", "prefix", "queue", "ready"}
    }
    scripts = "".join(path.read_text() for path in (ROOT / "src/conveyor/store/scripts").rglob("*.lua"))
    names |= set(re.findall(r"prefix \.\. '([\w:]+?):?'", scripts)) | {"ready", "lane", "leased", "wake", "result"}
    assert not [one for one in names if f"`{one.removeprefix(keys.prefix)}" not in text]


def test_reference_of_events_is_complete() -> None:
    """docs/reference/events.md has every event by both its names."""
    text = (ROOT / "docs/reference/events.md").read_text()
    assert not [
        one for one, kind in events.EVENTS.items() if f"`{one}`" not in text or f"`{kind.__name__}`" not in text
    ]


def test_reference_of_settings_is_complete() -> None:
    """docs/reference/configuration.md has every variable that the code reads."""
    text = (ROOT / "docs/reference/configuration.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    names = set(re.findall(r"CONVEYOR_[A-Z_]+\b", sources))
    own = {one for one in names if one.startswith("CONVEYOR_DEMO_")}  # what the demo tells its own processes
    assert not [one for one in names - own if one not in text]


def test_reference_of_commands_is_complete() -> None:
    """docs/reference/cli.md has every command in its table and in a section, which names the subcommands."""
    text = (ROOT / "docs/reference/cli.md").read_text()
    assert not [one for one in COMMANDS if f"\n### {one}\n" not in text or f"\n| `{one}" not in text]
    sections = {one: text.partition(f"\n### {one}\n")[2].partition("\n### ")[0] for one in COMMANDS}
    groups = [(one, getattr(cli.get_command(click.Context(cli), one), "commands", {})) for one in COMMANDS]
    names = [(one, inner) for one, commands in groups for inner in commands]
    assert names
    assert not [pair for pair in names if not re.search(rf"`(conveyor {pair[0]} )?{pair[1]}\b", sections[pair[0]])]


def test_comparison_finds_what_differs(tmp_path: Path) -> None:
    """The reader notices output that is not there, and is not misled by ids and times."""
    assert (
        first_missing(["mail:0Q8AvLT0NuEHtCuLChEXEG done in 3 ms"], "x\nmail:1111111111111111111111 done in 4 ms\n")
        is None
    )
    assert first_missing(["a", "b"], "b\na\n") == "b"
    assert first_missing(["it … 3"], "it is 4\n") == "it … 3"
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)  # 3\n```\n")
    with PageRunner(tmp_path, None) as reader, pytest.raises(AssertionError, match="should print: 3"):
        reader.follow(next(blocks(page)), "page")
    assert "```" not in prose(page)
