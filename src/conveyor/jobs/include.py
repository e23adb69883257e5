"""The modules of an app that define its tasks: named, or found by a pattern, and imported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from pkgutil import iter_modules

from conveyor.errors import ConfigurationError

INCLUDE_VARIABLE = "CONVEYOR_INCLUDE"
"""Names more modules, separated by commas: those of the command line, for every process of a worker."""


def check_include(include: Iterable[str]) -> tuple[str, ...]:
    """Return the names or patterns of modules, checked; raises ConfigurationError."""
    if isinstance(include, str) or not isinstance(include, Iterable):
        raise ConfigurationError(f'include takes a list of modules, such as ["shop.mail"], not {include!r}.')
    names = tuple(include)
    for name in names:
        if not isinstance(name, str) or not name or not all(name.split(".")):
            raise ConfigurationError(
                f"include takes modules such as 'shop.mail', or patterns such as 'shop.tasks.*', not {name!r}."
            )
        if "*" in name.partition(".")[0]:
            raise ConfigurationError(f"include: the pattern {name!r} must begin with the name of a package.")
    return names


def import_included(include: Iterable[str]) -> None:
    """
    Import the modules of *include* and of `CONVEYOR_INCLUDE`, so that their tasks are registered.

    Raises ConfigurationError for a pattern that matches nothing, and what importing a module raises.
    """
    for name in (*include, *check_include(part for part in os.environ.get(INCLUDE_VARIABLE, "").split(",") if part)):
        if "*" not in name:
            import_module(name)
            continue
        found = list(_matching(name.split(".")))
        if not found:
            raise ConfigurationError(f"include: no module matches {name!r}. `*` stands for one part of a name.")
        for module in found:
            import_module(module)


def _matching(parts: list[str]) -> Iterator[str]:
    """Yield the modules whose dotted names match *parts* one by one, sorted; packages on the way are imported."""
    first = next(number for number, part in enumerate(parts) if "*" in part)
    package = ".".join(parts[:first])
    for module in sorted(iter_modules(getattr(import_module(package), "__path__", ())), key=lambda one: one.name):
        if not fnmatchcase(module.name, parts[first]) or module.name == "__main__":
            continue
        name, rest = f"{package}.{module.name}", parts[first + 1 :]
        if not rest:
            yield name
        elif module.ispkg:
            yield from _below(name, rest)


def _below(package: str, rest: list[str]) -> Iterator[str]:
    if any("*" in part for part in rest):
        yield from _matching([*package.split("."), *rest])
        return
    # A package of several need not have the module: `shop.*.tasks` takes those that do.
    for part in rest:
        names = {one.name for one in iter_modules(getattr(import_module(package), "__path__", ()))}
        if part not in names:
            return
        package = f"{package}.{part}"
    yield package
