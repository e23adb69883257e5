"""
Forks: a child uses no connection, sequence, thread or lock of its parent.

`on_fork` resets in every child the objects that hold such things. `lazy_property` computes an attribute without a lock
that a fork could copy while it is held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, overload
from weakref import WeakSet

T = TypeVar("T")


class ForkAware(Protocol):
    """Something that must not use what its parent uses."""

    def forked(self) -> None:
        """Forget connections, lanes and threads: they are the parent's."""
        ...


# One hook for all, since hooks cannot be taken back: one for each would keep growing with every app that comes and goes.
_fork_aware: WeakSet[ForkAware] = WeakSet()


def on_fork(instance: ForkAware) -> None:
    """Call ``holder.forked()`` in every child forked while it lives."""
    _fork_aware.add(instance)


def _notify_children() -> None:
    for instance in list(_fork_aware):
        instance.forked()


os.register_at_fork(after_in_child=_notify_children)


class lazy_property(Generic[T]):  # noqa: N801  used as a decorator, as property is
    """Makes a method an attribute that is computed once."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        """Take the method."""
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
