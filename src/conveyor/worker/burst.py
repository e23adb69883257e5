"""When a worker that stops when everything is drained may stop."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conveyor.worker.consumer import Consumer


class Burst:
    """Watches the queues run empty."""

    def __init__(self, *, until: float = 0.0) -> None:
        """*until*: the instant (monotonic) before which a predecessor's retries are not due, and it is not over."""
        self.until = until
        self._emptied_at = -1

    def is_over(self, consumers: Sequence[Consumer], ended: int) -> bool:
        """
        Tell whether all queues were found empty twice; after the first time they are asked again.

        What our last job sent to another queue came after that one was asked. *ended* is how many jobs have ended: no
        job may come between the two.
        """
        if monotonic() < self.until or not all(one.drained for one in consumers):
            return False
        if self._emptied_at == ended:
            return True
        self._emptied_at = ended
        for one in consumers:
            one.more = True
            one.schedule()
        return False
