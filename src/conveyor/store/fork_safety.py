"""
Forks: a child uses no connection, sequence, thread or lock of its parent.

`on_fork` resets in every child the objects that hold such things. `lazy_property` computes an attribute without a lock
that a fork could copy while it is held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, overload
from weakref import ref

T = TypeVar("T")


class ForkAware(Protocol):
    """An object that must not use in a child what belongs to its parent."""

    def forked(self) -> None:
        """Forget connections, sequences and threads: they belong to the parent."""
        ...


# One hook for all, since hooks cannot be removed: one for each would accumulate with every app that comes and goes. References
# and no WeakSet, since every pull makes an entry: adding and removing one runs no Python.
_fork_aware: set[ref[ForkAware]] = set()


def on_fork(instance: ForkAware) -> None:
    """Call ``instance.forked()`` in every forked child while *instance* lives."""
    _fork_aware.add(ref(instance, _fork_aware.discard))


def _reset_in_child() -> None:
    for known in list(_fork_aware):
        if (instance := known()) is not None:
            instance.forked()


os.register_at_fork(after_in_child=_reset_in_child)


class lazy_property(Generic[T]):  # noqa: N801  used as a decorator, as property is
    """
    Makes a method an attribute that is computed on first use, without a lock.

    `functools.cached_property` of Python 3.11 holds a lock meanwhile, one for all instances. A process that forks while
    another thread computes copies it locked, and the child waits forever. Here two threads may compute the same value twice.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy_property[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object, owner: type) -> lazy_property[T] | T:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
