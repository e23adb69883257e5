"""Loads the app that an operator named, such as ``shop.jobs:app``."""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from typing import Any


def load(reference: str) -> Any:
    """Return the app that ``module:attribute`` names; raises what importing it raises."""
    module, _, attribute = reference.partition(":")
    return reduce(getattr, (attribute or "app").split("."), import_module(module))
