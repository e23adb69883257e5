"""Sabotaged builds: a copy of `src` with one patch of `chaos/sabotage/` applied."""

from __future__ import annotations

import re
from pathlib import Path

from chaos.recording_server import HOME

FOLDER = Path(__file__).parent / "sabotage"


class DoesNotApplyError(ValueError):
    """The source has changed where the patch was aimed: aim it anew."""


def patches() -> dict[str, Path]:
    """Return the patches that a case must catch, by name."""
    return {name: path for name, path in _all().items() if test_of(path) is None}


def tested_patches() -> dict[str, Path]:
    """Return the patches that a test of the suite must catch, by name."""
    return {name: path for name, path in _all().items() if test_of(path) is not None}


def _all() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.patch"))}


def test_of(patch: Path) -> str | None:
    """Return the test that must catch it: what stands behind `Test:` in its first lines; None: a case does."""
    found = re.search(r"^Test: (\S+)$", patch.read_text(), re.MULTILINE)
    return None if found is None else found[1]


def case_of(patch: Path) -> str:
    """Return the case that must catch it: the word after `Case:` in its first lines."""
    found = re.search(r"^Case: (\w+)$", patch.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{patch.name} does not say `Case: <name>`")
    return found[1]


def build(patch: Path, directory: Path) -> Path:
    """Return a copy of this tree's `src` in *directory*, of links but for what *patch* changes."""
    texts = changed(patch)
    real = {Path(), *(folder for name in texts for folder in Path(name).parents)}
    _link(Path("src"), directory, real)
    for name, text in texts.items():
        path = directory / name
        path.unlink()
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()
    return directory / "src"


def _link(folder: Path, directory: Path, real: set[Path]) -> None:
    """Make *folder* in *directory*, with links to what is in ours; folders of *real* are made in the same way."""
    (directory / folder).mkdir()
    for entry in (HOME / folder).iterdir():
        name = folder / entry.name
        # Compiled modules too, each by a link of its own: else every process compiles those beside a changed one anew.
        if name in real or entry.name == "__pycache__":
            _link(name, directory, real)
        else:
            (directory / name).symlink_to(entry)


def changed(patch: Path) -> dict[str, str]:
    """Return the files that *patch* changes, as they are afterwards; raises DoesNotApplyError."""
    found: dict[str, str] = {}
    for name, hunks in _files(patch.read_text()).items():
        path = HOME / name
        if not path.is_file():
            raise DoesNotApplyError(f"{patch.name}: there is no {name}")
        text = path.read_text()
        for old, new in hunks:
            if text.count(old) != 1:
                raise DoesNotApplyError(f"{patch.name}: found {text.count(old)} times in {name}, not once:\n{old}")
            text = text.replace(old, new)
        found[name] = text
    return found


def _files(patch: str) -> dict[str, list[tuple[str, str]]]:
    """Return file → pairs of what stands there and what shall; the line numbers of a hunk mean nothing to us."""
    files: dict[str, list[tuple[str, str]]] = {}
    hunks: list[tuple[str, str]] = []
    old: list[str] | None = None
    new: list[str] = []
    for line in [*patch.splitlines(), "@@"]:
        if line.startswith(("@@", "--- ")):
            if old is not None:
                hunks.append(("".join(old), "".join(new)))
            old, new = ([], []) if line.startswith("@@") else (None, [])
        elif line.startswith("+++ "):
            hunks = files.setdefault(line[4:].split("\t")[0].removeprefix("b/").strip(), [])
        elif old is not None:
            if line[:1] in {" ", "-", ""}:
                old.append(line[1:] + "\n")
            if line[:1] in {" ", "+", ""}:
                new.append(line[1:] + "\n")
    return files
