"""Loads the app that an operator named, such as ``shop.jobs:app``, and finds the name of one for another process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import Any

from conveyor.jobs.core import core_of
from conveyor.jobs.include import import_included


def load(reference: str, modules: Mapping[str, str] | None = None) -> Any:
    """
    Return the app that ``module:attribute`` names, with all its tasks; raises what importing its modules raises.

    *modules* names the modules of tasks that the app may not import itself.
    """
    module, _, attribute = reference.partition(":")
    app = reduce(getattr, (attribute or "app").split("."), import_module(module))
    import_included(core_of(app).include)
    for task, name in (modules or {}).items():
        if task not in core_of(app).definitions:
            import_module(name)
    return app


def find_reference(app: object) -> str | None:
    """
    Return ``module:attribute`` of *app* for a fresh process; None when it could not import it.

    A module that this program has imported can be imported again. The main program is none of them: to import it would be
    to run it. A program that is frozen into one file has no interpreter for another process.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        return None
    main = sys.modules.get("__main__")
    for name, module in list(sys.modules.items()):
        if module is main or not issubclass(
            type(module), ModuleType
        ):  # not isinstance: objects of cffi say that they are
            continue
        members = object.__getattribute__(module, "__dict__")  # a lazy module is not loaded by it
        if members.get("__spec__") is not None:
            for attribute, value in list(members.items()):
                if value is app:
                    return f"{name}:{attribute}"
    return None
