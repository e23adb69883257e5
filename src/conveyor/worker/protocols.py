"""What the parts of a worker are to each other: each knows only what it needs of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from conveyor.store.keys import QueueKeys
    from conveyor.store.operations import TurnReport
    from conveyor.store.transport.async_connection import AsyncConnection


class AttemptOwner(Protocol):
    """What an attempt needs of the consumer that holds it."""

    queue: str
    shared_state: Mapping[str, Any]
    report: TurnReport
    own_retries: dict[str, float]
    worked: set[Any]
    more: bool
    blobs: dict[str, str]
    keys: QueueKeys

    @property
    def now_ms(self) -> int: ...
    def begun(self, attempt: Any) -> None: ...
    def left(self) -> None: ...
    def ended(self, attempt: Any) -> None: ...
    def holds(self, attempt: Any) -> bool: ...
    def schedule(self, *, at_once: bool = False) -> None: ...
    def move_deadline(self, attempt: Any, seconds: float) -> None: ...


class WorkerServices(Protocol):
    """What a consumer needs of its worker."""

    app: Any
    executor: Any
    settling: Any
    state: Mapping[str, Any]
    stopping: bool
    stopped: bool

    @property
    def draining(self) -> bool: ...
    def hand_back(self, consumer: Any) -> None: ...
    def room(self, consumer: Any) -> int: ...
    def handlers(self, consumer: Any) -> Mapping[bytes, Any]: ...
    def arrive(self, consumer: Any, id_: str, data: bytes) -> Any: ...

    @property
    def unusual(self) -> Any: ...
    def settle_stats(self, consumer: Any, report: TurnReport) -> None: ...
    def absorbed(self, consumer: Any) -> None: ...
    def listen(self) -> None: ...
    def note_identity(self, consumer: Any) -> None: ...
    def note_renewal(self, consumer: Any) -> None: ...
    def about(self, consumer: Any) -> bytes: ...
    def fail(self, error: BaseException) -> None: ...


class WakeupTarget(Protocol):
    """What waiting for work needs of a consumer."""

    keys: QueueKeys
    queue: str
    identity: str
    wire: AsyncConnection

    @property
    def has_capacity(self) -> bool: ...
    def woken(self) -> None: ...
    def wake_self(self) -> None: ...
    async def until_has_capacity(self) -> None: ...


class PrefetchPeer(Protocol):
    """What sharing a worker's room needs of a consumer."""

    queue: str
    weight: float
    backlog: int

    def schedule(self) -> None: ...


class Stoppable(Protocol):
    """Something that ends."""

    @property
    def stopped(self) -> bool: ...


class Tenant(Stoppable, Protocol):
    """A worker as the places it serves see it."""

    name: str


class Dormitory(Stoppable, Protocol):
    """What the listener needs to know of who waits at its place."""

    @property
    def sleepers(self) -> Sequence[WakeupTarget]: ...
