"""Loads the app that an operator named, such as ``shop.jobs:app``."""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from typing import Any

from conveyor.jobs.core import core_of
from conveyor.jobs.include import import_included


def load(reference: str) -> Any:
    """Return the app that ``module:attribute`` names, with all its tasks; raises what importing its modules raises."""
    module, _, attribute = reference.partition(":")
    app = reduce(getattr, (attribute or "app").split("."), import_module(module))
    import_included(core_of(app).include)
    return app
