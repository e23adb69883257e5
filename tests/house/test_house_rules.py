"""The house rules that a program can check. Each test also shows that its check finds what it is for."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from support.import_graph import read_tree

HOME = Path(__file__).parents[2]
ROOT = HOME / "src" / "conveyor"

MAX_FUNCTION = 60
MAX_PUBLIC = 44  # the names of the contract, of which gather is still to come
VAGUE = {"utils", "util", "base", "common", "manager", "helpers", "misc"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}

# (module or package, call) → why it may
ALLOWED = {
    ("conveyor.cli", "import_module"): "the operator names the app, and subcommands are loaded lazily",
    ("conveyor.jobs.app", "import_module"): "`Conveyor.worker` loads the package above it by a constant name",
    ("conveyor.jobs.include", "import_module"): "the program names the modules of its tasks",
    ("conveyor.worker", "import_module"): "a worker process loads the app that the operator named",
    ("conveyor", "import_module"): "public names are loaded at first use, from a table in the source",
}


def long_functions(source: str) -> list[str]:
    """Return the functions of *source* over the limit, from `def` to the last line, docstring included."""
    lengths = {
        f"{node.name} ({node.lineno})": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MAX_FUNCTION]


def forbidden_calls(module: str, source: str) -> list[str]:
    """Return what *source* uses that loads or runs code from data, less what ALLOWED permits."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if (node.module or "").split(".")[0] in PICKLES else []
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            bare = isinstance(node.func, ast.Name) and name in {"eval", "exec", "compile", "__import__"}
            names = [name] if bare or name == "import_module" else []
        found += [f"{module}, line {node.lineno}: {name}" for name in names if name and not _allowed(module, name)]
    return found


def _allowed(module: str, name: str) -> bool:
    return any(
        call == name and (module == place or (place != "conveyor" and module.startswith(f"{place}.")))
        for place, call in ALLOWED
    )


def script_texts(source: str) -> list[int]:
    """Return the lines of *source* with the text of a script, built or whole, or a call that takes one."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    lua = re.compile(r"redis\.p?call|\bKEYS\[|\bARGV\[")
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and lua.search(node.value)
            and id(node) not in docstrings
        )
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"eval", "register_script"}
        )
    )


def missing_in_header(text: str) -> list[str]:
    """Return which of KEYS, ARGV and returns the leading comment of a script does not speak of."""
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("--")), len(lines))
    header = "\n".join(lines[:end])
    return [word for word in ("KEYS", "ARGV", "returns") if not re.search(rf"\b{word}\b", header, re.IGNORECASE)]


def undescribed(text: str) -> list[str]:
    """Return the functions of a part, and what of them the comment above does not tell: a parameter, or what they return."""
    found = []
    for comment, name, parameters in re.findall(r"((?:^--.*\n)*)^local function (\w+)\((.*?)\)", text, re.MULTILINE):
        words = [word.strip() for word in parameters.split(",") if word.strip()]
        missing = [word for word in words if not re.search(rf"(?<![\w.]){re.escape(word)}(?![\w])", comment)]
        missing += [] if re.search(r"^-- returns ", comment, re.MULTILINE) else ["returns"]
        found += [f"{name}: {word}" for word in missing]
    return found


def vague_modules(modules: Iterable[str]) -> list[str]:
    """Return those of the dotted names that say nothing."""
    return [module for module in modules if VAGUE & set(module.split("."))]


def public_names(source: str) -> set[str]:
    """Return the names that an `__init__` offers: `__all__`, or what it binds without a leading underscore."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def _written() -> Iterator[Path]:
    for folder in ("src", "tests", "testbed", "benchmarks", "chaos", "examples"):
        for suffix in ("*.py", "*.lua"):
            yield from sorted((HOME / folder).rglob(suffix))


def test_functions_are_short() -> None:
    """No function has more than 60 lines, and one of 61 would be found."""
    assert long_functions("def f():\n" + "    x = 1\n" * 60) == ["f (1): 61 lines"]
    assert long_functions("async def f():\n" + "    x = 1\n" * 59) == []

    found = {
        str(path.relative_to(HOME)): long_functions(path.read_text()) for path in _written() if path.suffix == ".py"
    }
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_modules_say_what_they_are() -> None:
    """No module is named after nothing in particular."""
    assert vague_modules(["conveyor.store.utils", "conveyor.payload.codec", "conveyor.common"]) == [
        "conveyor.store.utils",
        "conveyor.common",
    ]

    assert vague_modules(read_tree(ROOT)) == []


@pytest.mark.row("I21")
def test_scripts_come_from_lua_files() -> None:
    """No text of a script stands in Python or is put together there, and each way to do so would be found."""
    assert script_texts('"""Runs redis.call."""\nx = f"return redis.call(\'GET\', {key})"') == [2]
    assert script_texts('y = "return {}".format(1)\nz = "local a = KEYS[" + n + "]"') == [2]
    assert script_texts("client.eval(text, 0)\nclient.evalsha(sha, 0)") == [1]

    found = {module: script_texts(source) for module, source in read_tree(ROOT).items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.row("I21")
def test_data_never_becomes_code() -> None:
    """Nothing is unpickled or evaluated, and only what the operator named is imported."""
    bad = "import pickle\nfrom dill import loads\neval('1')\nexec(x)\nimportlib.import_module(name)\n__import__(name)"
    assert [line.partition(": ")[2] for line in forbidden_calls("conveyor.payload.codec", bad)] == [
        "pickle",
        "dill",
        "eval",
        "exec",
        "import_module",
        "__import__",
    ]
    assert forbidden_calls("conveyor.cli.load", "importlib.import_module(name)") == []

    assert [call for module, source in read_tree(ROOT).items() for call in forbidden_calls(module, source)] == []


def test_scripts_say_what_they_take_and_give() -> None:
    """The header of each script lists its KEYS, its ARGV and what it returns."""
    assert missing_in_header("-- Do it.\n-- KEYS: jobs\n\nlocal x = ARGV[1]") == ["ARGV", "returns"]
    assert (
        missing_in_header("-- Do it.\n-- needs: numbers\n--\n-- KEYS: jobs\n-- ARGV: id\n-- returns 1\nreturn 1") == []
    )

    scripts = sorted(ROOT.rglob("*.lua"))
    found = {path.name: missing_in_header(path.read_text()) for path in scripts if path.parent.name != "lib"}
    assert len(found) > 20
    assert {name: words for name, words in found.items() if words} == {}
    assert [path.name for path in scripts if not path.read_text().startswith("--")] == []


def test_parts_of_scripts_say_what_they_take_and_give() -> None:
    """The comment above each function that scripts share names its parameters and tells what it returns."""
    good = (
        "-- Lists.\n\n-- Add.\n-- key, ...  the list, values\n-- returns  nothing\nlocal function add(key, ...)\nend\n"
    )
    assert undescribed(good) == []
    assert undescribed(good.replace("key, ...  ", "the ")) == ["add: key", "add: ..."]
    assert undescribed(good.replace("returns", "gives")) == ["add: returns"]
    assert undescribed("local function add(key)\nend\n") == ["add: key", "add: returns"]

    parts = sorted(ROOT.rglob("lib/*.lua"))
    assert len(parts) > 5
    assert {path.name: found for path in parts if (found := undescribed(path.read_text()))} == {}


def test_public_names_are_few() -> None:
    """`import conveyor` offers at most 36 names, and `__init__` defines nothing of its own."""
    assert public_names("from a import b, _c\nimport d as e\nF = 1\n__version__ = '1'") == {"b", "e", "F"}
    assert public_names("from a import b, c\n__all__ = ['b']") == {"b"}

    source = (ROOT / "__init__.py").read_text()
    own = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name not in {"__getattr__", "__dir__"}
    ]
    assert len(public_names(source)) <= MAX_PUBLIC
    assert own == []


def repeated_names(paths: Iterable[str]) -> list[str]:
    """Return the names of test files of which there are several: one process collects only one of them."""
    names = Counter(Path(one).name for one in paths)
    return [name for name, count in names.items() if count > 1]


def test_test_files_have_names_of_their_own() -> None:
    """No two test files have the same name in different folders, so that a run of all collects them all."""
    assert not repeated_names(map(str, (HOME / "tests").rglob("test_*.py")))
    assert repeated_names(["cli/test_a.py", "sql/test_a.py", "sql/test_b.py"]) == ["test_a.py"]
