"""What a push goes through: a backend, one whose pushes are confirmed, or one that keeps them for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from conveyor.store.durability import Wish
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Entry
    from conveyor.store.script import Argument


class Way(Protocol):
    """A way in."""

    @property
    def deferred(self) -> bool:
        """True when nothing goes to Redis now, so nothing can be asked of it either."""
        ...

    def push(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]: ...
    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None: ...
    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]: ...


class Outlet(Protocol):
    """Tells whether pushes go somewhere else right now."""

    def __call__(self, wish: Wish | None = None) -> Way | None:
        """Return that way; raises ConfigurationError where it cannot give what one push asks for."""
        ...
