"""The relay: a thread that delivers an outbox for as long as its block lasts, or for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from conveyor.store.transport import replies

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.errors import ConveyorError
    from conveyor.sql.delivery import DeliveryPass, OutboxDelivery
    from conveyor.sql.drivers import DbConnection

COURTESY = 1.0
"""Seconds that a batch of another relay is left to it before it counts as dead."""
EAGER, EAGER_FOR = 0.005, 1.0
"""A block has ended and its commit is near: first pause, which doubles, and for how long."""
GLANCE = 0.05
CAP = 1.0
"""Longest pause in seconds before what was refused is tried again."""
_SAY_AGAIN = 60.0
_log = logging.getLogger("conveyor.relay")


@dataclass(slots=True)
class _QueueBackoff:
    """A queue that refuses: when to try again, how often it did, whether that was said."""

    until: float = 0.0
    attempts: int = 0
    said: bool = False


class Relay:
    """Delivers what is committed: at once when it is woken, else every *interval*."""

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[DbConnection]],
        delivery: OutboxDelivery,
        interval: float,
        running: set[Relay],
    ) -> None:
        """Take how to open the database, what delivers, seconds between two looks, and where to be found meanwhile."""
        self._opened, self._delivery, self._interval, self._running = opened, delivery, interval, running
        self._rests: dict[str, _QueueBackoff] = {}
        self._said: dict[str, float] = {}
        self._woken = threading.Event()
        self._stopped = False
        self._eager_until, self._eager_pause, self._pause = 0.0, EAGER, interval
        self._thread: threading.Thread | None = None

    def wake(self, sure: bool = True) -> None:
        """Look now; and when it is not *sure* that something is committed already, a few times soon after."""
        if not sure:
            self._eager_until, self._eager_pause = time.monotonic() + EAGER_FOR, EAGER
        self._woken.set()

    def stop(self) -> None:
        """End after what is under way; `run` returns soon."""
        self._stopped = True
        self._woken.set()

    def run(self) -> None:
        """Deliver until `stop`, in this thread. What the database or Redis refuses is logged and tried again."""
        self._running.add(self)
        failures, said = 0, -_SAY_AGAIN
        try:
            while not self._stopped:
                try:
                    with self._opened() as link:
                        while not self._stopped:
                            self._look(link)
                            failures = 0
                            self._wait()
                except Exception as error:
                    failures += 1
                    if time.monotonic() - said >= _SAY_AGAIN:
                        said = time.monotonic()
                        _log.warning("the outbox cannot be read, trying again: %s: %s", type(error).__name__, error)
                    self._woken.wait(replies.backoff(failures + 3, cap=CAP))
                    self._woken.clear()
        finally:
            self._running.discard(self)

    def _look(self, link: DbConnection) -> None:
        now = time.monotonic()
        resting = {queue for queue, rest in self._rests.items() if rest.until > now}
        passed = self._delivery.pass_through(link, resting=resting, courtesy=COURTESY)
        for queue in () if passed.left else self._rests.keys() - resting - passed.refusals.keys():
            if self._rests.pop(queue).said:
                _log.warning("queue '%s' takes rows of the outbox again", queue)
        for queue, error in passed.refusals.items():
            self._refused(queue, error, passed.counts.get(queue, 0))
        if passed.count:
            _log.debug("%d rows delivered", passed.count)
        self._plan(passed)

    def _refused(self, queue: str, error: ConveyorError, count: int) -> None:
        now = time.monotonic()
        rest = self._rests.setdefault(queue, _QueueBackoff())
        rest.attempts = 1 if count else rest.attempts + 1  # a full queue that is being drained is asked again soon
        rest.until = now + replies.backoff(rest.attempts, cap=CAP)
        if now - self._said.get(queue, -_SAY_AGAIN) >= _SAY_AGAIN:
            self._said[queue], rest.said = now, True
            _log.warning("rows of the outbox for queue '%s' wait, trying again: %s", queue, error)

    def _plan(self, passed: DeliveryPass) -> None:
        """Decide how long to wait for the next look."""
        now = time.monotonic()
        pauses = [self._interval, *(max(0.0, rest.until - now) for rest in self._rests.values())]
        if now < self._eager_until:
            pauses.append(self._eager_pause)
            self._eager_pause *= 2
        if passed.left:
            pauses.append(GLANCE)
        self._pause = min(pauses)

    def _wait(self) -> None:
        self._woken.wait(self._pause)
        self._woken.clear()

    # -- in a thread --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._stopped = False
        self._thread = threading.Thread(target=self.run, name="conveyor-relay", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        assert self._thread is not None
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)
