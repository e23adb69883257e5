"""The layers: a module imports only from its own or a lower one, and nothing goes in circles."""

from __future__ import annotations

from pathlib import Path

from imports import Tree, find_cycles, find_imports, read_tree

ROOT = Path(__file__).parent.parent / "src" / "conveyor"

# A module, or a package and all in it, stands in one layer. Lower layers know nothing of higher ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "model",
        "duration",
        "codec",
        "signature",
        "outcome",
        "parameter",
        "cron",
        "event",
        "failure",
        "format",
        "ident",
        "provider",
    ),  # values: no I/O
    ("sealing",),  # payloads between JSON and Redis; knows files, not Redis
    ("store",),  # all that knows Redis
    (  # messaging
        "aconsumer",
        "aspread",
        "consumer",
        "flow",
        "group",
        "holder",
        "lessee",
        "message",
        "mover",
        "opening",
        "partition",
        "partitioned",
        "plain",
        "posting",
        "pulse",
        "pulses",
        "pusher",
        "queue",
        "repartition",
        "rota",
        "scatter",
        "spread",
        "sweep",
        "verdict",
        "wrapping",
    ),
    (  # jobs
        "app",
        "bulk",
        "declaration",
        "context",
        "hook",
        "job",
        "limit",
        "middleware",
        "outbox",
        "outgoing",
        "registration",
        "result",
        "schedule",
        "sending",
        "sql",
        "task",
        "workflow",
    ),
    ("worker",),
    ("acl", "admin", "doctor", "guarantee", "leftover", "logical", "release", "view", "telemetry", "testing"),
    ("cli", "demo", "web", "contrib", "__main__"),
)
FACADE = len(LAYERS) - 1.5  # the public names: gathered from everything below, for programs and for the top layer


def layer_of(module: str) -> float | None:
    """Return the layer of *module* (`conveyor.store.keys` → 1), or None when the table lacks it."""
    if module == "conveyor":
        return FACADE
    head = module.split(".")[1]
    return next((number for number, names in enumerate(LAYERS) if head in names), None)


def violations(tree: Tree) -> list[str]:
    """Return what is wrong with *tree*, a sentence each."""
    found = [
        f"{module} is in no layer: add it to LAYERS in tests/test_layers.py."
        for module in tree
        if layer_of(module) is None
    ]
    imports = find_imports(tree)
    for item in imports:
        source, target = layer_of(item.source), layer_of(item.target)
        if source is not None and target is not None and target > source:
            found.append(f"{item.source}, line {item.line}: imports {item.target}, which is in a higher layer.")
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
        "conveyor": "from conveyor.app import Conveyor",
        "conveyor.errors": "",
        "conveyor.app": "import conveyor.errors",
        "conveyor.store": "",
        "conveyor.store.keys": "from ..app import Conveyor",
        "conveyor.codec": "def f():\n    from conveyor import app",
        "conveyor.queue": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import conveyor.app",
        "conveyor.task": "from conveyor import Conveyor",
    }

    assert violations(tree) == [
        "conveyor.store.keys, line 1: imports conveyor.app, which is in a higher layer.",
        "conveyor.codec, line 2: imports conveyor.app, which is in a higher layer.",
        "conveyor.queue, line 3: imports conveyor.app, which is in a higher layer.",
        "conveyor.task, line 1: imports conveyor, which is in a higher layer.",
    ]


def test_cycle_within_a_layer_is_found() -> None:
    """Modules of one layer that import each other are found, over any number of steps."""
    tree = {
        "conveyor.task": "from conveyor.result import Job",
        "conveyor.result": "def f():\n    from . import app",
        "conveyor.app": "from conveyor.task import Task\nfrom conveyor.context import Context",
        "conveyor.context": "",
    }

    assert violations(tree) == ["These import each other: conveyor.app, conveyor.result, conveyor.task."]


def test_module_without_a_layer_is_found() -> None:
    """A new module has to be given a layer."""
    assert violations({"conveyor.novel": ""}) == [
        "conveyor.novel is in no layer: add it to LAYERS in tests/test_layers.py."
    ]
