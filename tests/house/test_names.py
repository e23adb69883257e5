"""
Names and words: one meaning for the name of a type or of an imported constant, no name that was given up, plain beginnings of docstrings and comments.

Each test also shows that its check finds what it is for.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parents[2]

# Names that classes once had. None is an English word that begins a sentence, nor the name of another class.
GIVEN_UP = {
    "Antechamber", "AsyncAlchemy", "AsyncBell", "AsyncDriver", "AsyncHolding", "AsyncLane", "AsyncMover",
    "AsyncSpread", "AsyncTower", "AwaitableHolder", "Bell", "Berth", "BlockingHolder", "Bookkeeper",
    "BufferedBackend", "BufferedLane", "ConfirmedLane", "ConfirmedWire", "Confirmer", "Dormitory", "Errand",
    "Guardian", "HandWorker", "Harbour", "KillAccount", "LateReply", "LateTurn", "Lessee", "Lively", "Mortal",
    "Offspring", "Pulses", "Pusher", "RawPusher", "Refugee", "Rota", "Seating", "Seats", "SlotPlace", "StandIn",
    "Suspects", "TaskAccount", "Unresolved", "Unstorable", "WaitBroken", "WireLost",
    "WrappedPosting", "WrongPartitions",
}  # fmt: skip


def given_up_names(text: str) -> list[str]:
    """Return the given-up names that stand in *text* as words of their own, in their order."""
    return [word for word in re.findall(r"\b[A-Z]\w+\b", text) if word in GIVEN_UP]


def shared_type_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return name → the files that define it, of types that are defined more than once: classes, nested ones too, and aliases."""
    places = defaultdict(list)
    for file, source in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file)
        for name in _assigned(tree):
            if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name) and not name.endswith(("_co", "_contra")):
                places[name].append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def _assigned(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module gives values to."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            yield from (one.id for one in getattr(target, "elts", [target]) if isinstance(one, ast.Name))


def shared_constants(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return name → the modules it is imported from, of constants that other modules import from more than one."""
    origins = defaultdict(set)
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "conveyor":
                for alias in node.names:
                    if re.fullmatch(r"[A-Z][A-Z0-9_]+", alias.name):
                        origins[alias.name].add(node.module)
    return {name: sorted(modules) for name, modules in origins.items() if len(modules) > 1}


BEGINNINGS = re.compile(r"(Who|What|Whom|Whose|How|Take|Do the same)\b")


def unclear_beginnings(source: str) -> list[int]:
    """Return the lines of Python *source* where a docstring, or a line of a comment, begins with one of the words."""
    if not re.search(rf"""(#|['"])\s*{BEGINNINGS.pattern}""", source):
        return []  # a look at the text spares most files the parser
    docstrings = [
        node.value.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and BEGINNINGS.match(node.value.value.strip())
    ]
    comments = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and BEGINNINGS.match(token.string.lstrip("#: "))
    ]
    return sorted(docstrings + comments)


def unclear_comments(script: str) -> list[int]:
    """Return the lines of a Lua *script* where a line of a comment begins with one of the words."""
    lines = enumerate(script.splitlines(), 1)
    return [n for n, line in lines if (text := line.partition("--")[2].strip()) and BEGINNINGS.match(text)]


def written(*folders: str) -> Iterator[Path]:
    """Yield the files of the project's own text under *folders*, but for this one, which has the names."""
    for folder in folders:
        for suffix in ("*.py", "*.lua", "*.md", "*.patch"):
            yield from (path for path in sorted((HOME / folder).rglob(suffix)) if path != Path(__file__))


def test_names_that_were_given_up_do_not_come_back() -> None:
    """No class name of the list stands in the source, the tests, the chaos runs, the benchmarks, the examples or the docs."""
    assert given_up_names("class Berth(Rota): ...  # a Lessee's") == ["Berth", "Rota", "Lessee"]
    assert given_up_names("Berths, rota, lessee, AsyncLaneX, a_Berth") == []

    paths = [*written("src", "tests", "testbed", "chaos", "benchmarks", "examples", "docs"), *HOME.glob("*.md")]
    assert len(paths) > 300
    found = {str(path.relative_to(HOME)): given_up_names(path.read_text()) for path in paths}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_name_of_a_type_means_one_thing() -> None:
    """No two classes or aliases of types of the source have the same name, nested and private ones included."""
    two = {
        "a.py": "class One: ...\nclass Two:\n    class Three: ...",
        "b.py": "class Three: ...\nOne = list[int]\nT = X = 1",
    }
    assert shared_type_names(two) == {"Three": ["a.py", "b.py"], "One": ["a.py", "b.py"]}

    sources = {str(path.relative_to(HOME)): path.read_text() for path in written("src") if path.suffix == ".py"}
    assert len(sources) > 100
    assert shared_type_names(sources) == {}


def test_the_name_of_an_imported_constant_means_one_thing() -> None:
    """No two modules of the source give the same name to constants that others import."""
    two = {
        "c.py": "from conveyor.a import PLAIN, READY",
        "d.py": "def f():\n    from conveyor.b import PLAIN as P\nfrom conveyor.a import READY",
    }
    assert shared_constants(two) == {"PLAIN": ["conveyor.a", "conveyor.b"]}

    sources = {str(path.relative_to(HOME)): path.read_text() for path in written("src") if path.suffix == ".py"}
    assert shared_constants(sources) == {}


def test_texts_begin_with_their_subject() -> None:
    """No docstring and no line of a comment begins with Who, What, Whom, Whose, How, Take or "Do the same"."""
    bad = '"""What it is."""\nx = 1  # Who takes it\n"""\nTake it.\n"""\ndef f():\n    """Do the same."""\n'
    assert unclear_beginnings(bad) == [1, 2, 3, 7]
    good = '"""Return what it is."""\nx = "What"  # taken by whoever\n# Whoever, Taken, However\ny = 1\n'
    assert unclear_beginnings(good) == []
    assert unclear_comments("-- Do it.\nlocal x = 1 -- What it is\n--- How\n-- so\n-- However") == [2]

    paths = list(written("src", "tests", "testbed", "chaos", "benchmarks", "examples", "docs"))
    found = {
        str(path.relative_to(HOME)): (unclear_beginnings if path.suffix == ".py" else unclear_comments)(
            path.read_text()
        )
        for path in paths
        if path.suffix in {".py", ".lua"}
    }
    assert len(found) > 100
    assert {file: lines for file, lines in found.items() if lines} == {}
