"""The names of classes: one meaning for a name, and no name that was given up. Each test also shows that its check finds what it is for."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parents[2]

# Names that classes once had. None is an English word that begins a sentence, nor the name of another class.
GIVEN_UP = {
    "AsyncAlchemy", "AsyncBell", "AsyncDriver", "AsyncHolding", "AsyncLane", "AsyncMover", "AsyncSpread",
    "AsyncTower", "AwaitableHolder", "Antechamber", "Berth", "BlockingHolder", "Bookkeeper", "BufferedBackend",
    "BufferedLane", "ConfirmedLane", "ConfirmedWire", "Confirmer", "Errand", "Harbour", "HandWorker", "KillAccount",
    "LateTurn", "Lessee", "Mortal", "Offspring", "RawPusher", "Refugee", "Rota", "StandIn", "TaskAccount",
    "WireLost", "WrappedPosting",
}  # fmt: skip


def given_up_names(text: str) -> list[str]:
    """Return the given-up names that stand in *text* as words of their own, in their order."""
    return [word for word in re.findall(r"\b[A-Z]\w+\b", text) if word in GIVEN_UP]


def shared_class_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return class name → the files that define it, for names that are defined more than once; nested classes count."""
    places = defaultdict(list)
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def written(*folders: str) -> Iterator[Path]:
    """Yield the files of the project's own text under *folders*, but for this one, which has the names."""
    for folder in folders:
        for suffix in ("*.py", "*.lua", "*.md", "*.patch"):
            yield from (path for path in sorted((HOME / folder).rglob(suffix)) if path != Path(__file__))


def test_names_that_were_given_up_do_not_come_back() -> None:
    """No class name of the list stands in the source, the tests, the chaos runs, the benchmarks, the examples or the docs."""
    assert given_up_names("class Berth(Rota): ...  # a Lessee's") == ["Berth", "Rota", "Lessee"]
    assert given_up_names("Berths, rota, lessee, AsyncLaneX, a_Berth") == []

    paths = [*written("src", "tests", "chaos", "benchmarks", "examples", "docs"), *HOME.glob("*.md")]
    assert len(paths) > 300
    found = {str(path.relative_to(HOME)): given_up_names(path.read_text()) for path in paths}
    assert {file: names for file, names in found.items() if names} == {}


def test_a_class_name_means_one_thing() -> None:
    """No two classes of the source have the same name, nested and private ones included."""
    two = {"a.py": "class One: ...\nclass Two:\n    class Three: ...", "b.py": "class Three: ...\nclass Four: ..."}
    assert shared_class_names(two) == {"Three": ["a.py", "b.py"]}

    sources = {str(path.relative_to(HOME)): path.read_text() for path in written("src") if path.suffix == ".py"}
    assert len(sources) > 100
    assert shared_class_names(sources) == {}
