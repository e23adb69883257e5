"""What the parts of a worker are to each other: each knows only what it needs of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import Report
    from conveyor.store.wire import Wire


class Holder(Protocol):
    """What an attempt needs of the consumer that holds it."""

    queue: str
    shared_state: Mapping[str, Any]
    report: Report
    own_retries: set[str]
    more: bool

    @property
    def now_ms(self) -> int: ...
    def begun(self) -> None: ...
    def left(self) -> None: ...
    def ended(self, attempt: Any) -> None: ...
    def holds(self, attempt: Any) -> bool: ...
    def schedule(self) -> None: ...
    def move_deadline(self, attempt: Any, seconds: float) -> None: ...


class Sleeper(Protocol):
    """What waiting for work needs of a consumer."""

    keys: QueueKeys
    queue: str
    identity: str

    @property
    def hungry(self) -> bool: ...
    @property
    def wire(self) -> Wire: ...
    def woken(self) -> None: ...
    def call_myself(self) -> None: ...
    async def until_hungry(self) -> None: ...


class Dormitory(Protocol):
    """What the listener needs of the worker."""

    stopped: bool

    @property
    def sleepers(self) -> Sequence[Sleeper]: ...
