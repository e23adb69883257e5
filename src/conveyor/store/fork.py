"""What happens in a forked child: whoever holds sockets or threads of its parent lets go of them."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Something that must not use what its parent uses."""

    def forked(self) -> None:
        """Forget connections, lanes and threads: they are the parent's."""
        ...


# One hook for all, since hooks cannot be taken back: one for each would keep growing with every app that comes and goes.
_holders: WeakSet[Forked] = WeakSet()


def on_fork(holder: Forked) -> None:
    """Call ``holder.forked()`` in every child forked while it lives."""
    _holders.add(holder)


def _tell() -> None:
    for holder in list(_holders):
        holder.forked()


os.register_at_fork(after_in_child=_tell)
