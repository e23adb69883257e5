"""The relay: a thread that delivers an outbox while its block lasts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport import replies

if TYPE_CHECKING:
    from types import TracebackType

    from conveyor.errors import ConveyorError
    from conveyor.sql.delivery import DeliveryPass, OutboxDelivery
    from conveyor.sql.drivers import DbConnection

GRACE = 1.0
"""Seconds for which a batch of another relay is left to it, before that relay counts as dead."""
FIRST_PAUSE, WATCH_FOR = 0.005, 1.0
"""Seconds: the first pause after a block whose commit is near; it doubles, for so long."""
SHORT_PAUSE = 0.05
LONGEST_PAUSE = 1.0
"""Longest pause in seconds before refused rows are tried again."""
_LOG_AGAIN = 60.0
_log = logging.getLogger("conveyor.relay")


@dataclass(slots=True)
class _QueueBackoff:
    """A queue that refuses rows: when to try again, how often it refused, whether that was logged."""

    until: float = 0.0
    attempts: int = 0
    logged: bool = False


class Relay:
    """A thread that delivers committed rows: at once when it is woken, else every *interval* seconds."""

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[DbConnection]],
        delivery: OutboxDelivery,
        interval: float,
        relays: set[Relay],
    ) -> None:
        """Make a relay. It is a member of *relays* while it runs, to be woken there."""
        self._connect, self._delivery, self._interval, self._relays = connect, delivery, interval, relays
        self._backoffs: dict[str, _QueueBackoff] = {}
        self._logged_at: dict[str, float] = {}
        self._woken = SignalSafeEvent()
        self._stopped = False
        self._watch_until, self._next_pause, self._pause = 0.0, FIRST_PAUSE, interval
        self._thread: threading.Thread | None = None

    def wake(self, committed: bool = True) -> None:
        """Deliver now. When the rows may not be *committed* yet, deliver a few times more soon after."""
        if not committed:
            self._watch_until, self._next_pause = time.monotonic() + WATCH_FOR, FIRST_PAUSE
        self._woken.set()

    def stop(self) -> None:
        """End after the current pass; `run` returns soon."""
        self._stopped = True
        self._woken.set()

    def run(self) -> None:
        """Deliver until `stop`, in this thread. Refusals of the database or Redis are logged and tried again."""
        self._relays.add(self)
        failures, logged = 0, -_LOG_AGAIN
        try:
            while not self._stopped:
                try:
                    with self._connect() as db:
                        while not self._stopped:
                            self._deliver(db)
                            failures = 0
                            self._wait()
                except Exception as error:
                    failures += 1
                    if time.monotonic() - logged >= _LOG_AGAIN:
                        logged = time.monotonic()
                        _log.warning("the outbox cannot be read; trying again: %s: %s", type(error).__name__, error)
                    self._woken.wait(replies.backoff(failures + 3, cap=LONGEST_PAUSE))
                    self._woken.clear()
        finally:
            self._relays.discard(self)

    def _deliver(self, db: DbConnection) -> None:
        now = time.monotonic()
        skipped = {queue for queue, backoff in self._backoffs.items() if backoff.until > now}
        result = self._delivery.deliver(db, skipped=skipped, grace=GRACE)
        for queue in () if result.left_to_another else self._backoffs.keys() - skipped - result.refusals.keys():
            if self._backoffs.pop(queue).logged:
                _log.warning("queue '%s': rows of the outbox are delivered again", queue)
        for queue, error in result.refusals.items():
            self._note_refusal(queue, error, result.counts.get(queue, 0))
        if result.count:
            _log.debug("%d rows delivered", result.count)
        self._plan_pause(result)

    def _note_refusal(self, queue: str, error: ConveyorError, count: int) -> None:
        now = time.monotonic()
        backoff = self._backoffs.setdefault(queue, _QueueBackoff())
        # A full queue that is being drained is asked again soon.
        backoff.attempts = 1 if count else backoff.attempts + 1
        backoff.until = now + replies.backoff(backoff.attempts, cap=LONGEST_PAUSE)
        if now - self._logged_at.get(queue, -_LOG_AGAIN) >= _LOG_AGAIN:
            self._logged_at[queue], backoff.logged = now, True
            _log.warning("queue '%s': rows of the outbox wait; trying again: %s", queue, error)

    def _plan_pause(self, result: DeliveryPass) -> None:
        """Choose the pause before the next pass."""
        now = time.monotonic()
        pauses = [self._interval, *(max(0.0, backoff.until - now) for backoff in self._backoffs.values())]
        if now < self._watch_until:
            pauses.append(self._next_pause)
            self._next_pause *= 2
        if result.left_to_another:
            pauses.append(SHORT_PAUSE)
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
