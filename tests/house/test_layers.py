"""The layers: a module imports only from its own or a lower one, and nothing goes in circles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.import_graph import Tree, find_cycles, find_imports, read_tree

ROOT = Path(__file__).parents[2] / "src" / "conveyor"

# A row a package: a module imports only from its own row and from those above it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "events"),
    ("acting", "ids", "units"),
    ("payload",),  # values <-> bytes: no Redis, no event loop
    ("store",),  # all that knows Redis
    ("messaging",),  # queues of messages: knows no task
    ("jobs",),  # tasks and the app
    ("worker", "sql", "admin"),  # each stands alone on the jobs
    ("cli", "dashboard", "contrib", "testing", "__main__"),  # faces
)
ALONE = {"worker", "sql", "admin"}  # of one row, and none imports from another
FACADE = len(LAYERS) - 1.5  # the public names: gathered from everything below, for programs and for the top layer


def package_of(module: str) -> str:
    """Return the package or top-level module that *module* belongs to: `conveyor.store.keys` → store."""
    return [*module.split("."), ""][1]


def layer_of(module: str) -> float | None:
    """Return the layer of *module* (`conveyor.store.keys` → 1), or None when the table lacks it."""
    if module == "conveyor":
        return FACADE
    return next((number for number, names in enumerate(LAYERS) if package_of(module) in names), None)


def violations(tree: Tree) -> list[str]:
    """Return what is wrong with *tree*, a sentence each."""
    found = [
        f"{module} is in no layer: add it to LAYERS in tests/house/test_layers.py."
        for module in tree
        if layer_of(module) is None
    ]
    imports = find_imports(tree)
    for item in imports:
        source, target = layer_of(item.source), layer_of(item.target)
        if source is not None and target is not None and target > source:
            found.append(f"{item.source}, line {item.line}: imports {item.target}, which is in a higher layer.")
        packages = {package_of(item.source), package_of(item.target)}
        if len(packages) == 2 and packages <= ALONE:
            found.append(f"{item.source}, line {item.line}: imports {item.target}, of a package beside its own.")
    found += [f"These import each other: {', '.join(group)}." for group in find_cycles(imports)]
    return found


def test_layers_are_kept() -> None:
    """No module of the library imports from a higher layer, in functions or for types either, and there are no cycles."""
    tree = read_tree(ROOT)

    assert {"conveyor", "conveyor.errors", "conveyor.store"} <= set(tree)
    assert violations(tree) == []


def test_import_from_a_higher_layer_is_found() -> None:
    """An upward import is found at the top, in a function, under TYPE_CHECKING, and in a relative form."""
    tree = {
        "conveyor": "from conveyor.jobs.app import Conveyor",
        "conveyor.errors": "",
        "conveyor.jobs.app": "import conveyor.errors",
        "conveyor.store": "",
        "conveyor.store.keys": "from ..jobs.app import Conveyor",
        "conveyor.payload.codec": "def f():\n    from conveyor.jobs import app",
        "conveyor.messaging.queue": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import conveyor.jobs.app",
        "conveyor.jobs.task": "from conveyor import Conveyor",
    }

    assert violations(tree) == [
        "conveyor.store.keys, line 1: imports conveyor.jobs.app, which is in a higher layer.",
        "conveyor.payload.codec, line 2: imports conveyor.jobs.app, which is in a higher layer.",
        "conveyor.messaging.queue, line 3: imports conveyor.jobs.app, which is in a higher layer.",
        "conveyor.jobs.task, line 1: imports conveyor, which is in a higher layer.",
    ]


def test_import_from_a_neighbour_is_found() -> None:
    """The worker, the SQL outbox and the admin know nothing of each other."""
    tree = {"conveyor.admin.admin": "", "conveyor.worker.worker": "def f():\n    from conveyor.admin import admin"}

    assert violations(tree) == [
        "conveyor.worker.worker, line 2: imports conveyor.admin.admin, of a package beside its own."
    ]


def test_cycle_within_a_layer_is_found() -> None:
    """Modules of one layer that import each other are found, over any number of steps."""
    tree = {
        "conveyor.jobs.task": "from conveyor.jobs.result import Job",
        "conveyor.jobs.result": "def f():\n    from . import app",
        "conveyor.jobs.app": "from conveyor.jobs.task import Task\nfrom conveyor.jobs.context import Context",
        "conveyor.jobs.context": "",
    }

    assert violations(tree) == ["These import each other: conveyor.jobs.app, conveyor.jobs.result, conveyor.jobs.task."]


def test_module_without_a_layer_is_found() -> None:
    """A new package or top-level module has to be given a layer."""
    assert violations({"conveyor.novel": ""}) == [
        "conveyor.novel is in no layer: add it to LAYERS in tests/house/test_layers.py."
    ]


def test_picture_of_the_floors_is_current() -> None:
    """`docs/images/floors.svg` is what the imports of today draw; after a change run `docs/images/draw_floors.py`."""
    program = ROOT.parents[1] / "docs" / "images" / "draw_floors.py"
    done = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, f"{done.stderr}The picture is old: python docs/images/draw_floors.py"
