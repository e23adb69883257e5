"""
Jobs that may start only after Redis has recorded something: a possible crash (poison job), or an early ack.

A job that was merely leased beside a poison job must not be given up with it. So the first crash of a worker is counted
for all that it held, and makes nothing worse. From then on a job is charged by its own starts alone: its crash is
counted before it starts, and taken back at any orderly end. After one crash, as many start together as there are free
slots; after two (or when the next would be the last) they start one at a time. One that has waited long for its turn
goes back, so that another worker runs it: jobs of a dead worker come to the front and so to one worker, all of them.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.messaging import retry
from conveyor.store.operations import Settlement, TurnReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conveyor.worker.attempt import Attempt

LONGEST_WAIT = 0.5
"""Seconds that a job waits behind another one that must run alone, before it is put off for other workers."""


class Quarantine:
    """The attempts of one queue whose jobs crashed before. Each waits until the turn that counts its crash is answered."""

    def __init__(self, free: Callable[[], int], on_reserved: Callable[[int], None]) -> None:
        """
        Args:
            free: returns how many jobs could start now.
            on_reserved: called with `reserved` when it has changed.
        """
        self._free, self._on_reserved = free, on_reserved
        self._crashed_once: deque[Attempt] = deque()
        self._charged: dict[str, tuple[Settlement, Attempt]] = {}  # of those: the record is on the way to Redis
        self._alone: deque[tuple[Attempt, float]] = deque()  # those that start one at a time, and since when they wait
        self._started_alone: Attempt | None = None
        self._charge: Settlement | None = None  # the record of that one
        self.reserved = 0
        """Slots that are spoken for: a job that came back from a crash starts before anything is leased behind it."""
        self.in_use = False
        """True while `advance` or `confirmed` may have something to do."""

    def _note(self) -> None:
        reserved = len(self._crashed_once) + len(self._charged)
        if reserved != self.reserved:
            self.reserved = reserved
            self._on_reserved(reserved)
        self.in_use = bool(self.reserved or self._alone or self._started_alone)

    def add(self, attempt: Attempt) -> None:
        """Add an attempt at a job that came back from a crash."""
        history, limit = attempt.history, attempt.handler.task.settings.retry.max_crashes
        alone = history.crashes >= limit or retry.runs_alone(history, limit)
        if alone:
            self._alone.append((attempt, monotonic()))
        else:
            self._crashed_once.append(attempt)
        self._note()

    def take_late(self) -> list[Attempt]:
        """Remove and return the attempts that have waited `LONGEST_WAIT` for others that must run alone."""
        late, since = [], monotonic() - LONGEST_WAIT
        while self._started_alone is not None and self._alone and self._alone[0][1] <= since:
            late.append(self._alone.popleft()[0])
        return late

    def clear(self) -> None:
        """Drop all attempts: their lease is lost."""
        self._crashed_once.clear()
        self._charged.clear()
        self._alone.clear()
        self._started_alone = None
        self._note()

    def on_finished(self, attempt: Attempt) -> None:
        """Note the end of an attempt, so that the next one may start."""
        if self._started_alone is attempt:
            self._started_alone = None
        self._note()

    def advance(self, report: TurnReport, held: Mapping[str, Attempt]) -> list[Attempt]:
        """Put the crashes of those that may start next into *report*; return those that are poison already."""
        while self._crashed_once and self._free() > len(self._charged):
            attempt = self._crashed_once.popleft()
            if held.get(attempt.id) is attempt and attempt.ended == 0.0:
                charge = Settlement("M", attempt.id, state=retry.with_presumed_crash(attempt.history).encode())
                attempt.presumed = False
                self._charged[attempt.id] = charge, attempt
                report.others.append(charge)
        poison: list[Attempt] = []
        while self._started_alone is None and self._alone:
            attempt, _ = self._alone.popleft()
            if held.get(attempt.id) is not attempt or attempt.ended != 0.0:
                continue
            if attempt.history.crashes >= attempt.handler.task.settings.retry.max_crashes:
                poison.append(attempt)
                continue
            self._started_alone = attempt
            attempt.presumed = True
            self._charge = Settlement(
                "M", attempt.id, state=retry.with_presumed_crash(attempt.history, alone=True).encode()
            )
            report.others.append(self._charge)
        self._note()
        return poison

    def confirmed(self, report: TurnReport, held: Mapping[str, Attempt]) -> list[Attempt]:
        """Return the attempts that may start, now that *report* is settled."""
        free: list[Attempt] = []
        for one in report.others if self._charged else ():
            charge, attempt = self._charged.get(one.id, (None, None))
            if attempt is not None and charge is one:
                del self._charged[one.id]
                if held.get(one.id) is attempt and attempt.ended == 0.0:
                    free.append(attempt)
        alone = self._started_alone
        charged = {one.id for one in report.others if one is self._charge}
        if alone is not None and alone.id in charged and held.get(alone.id) is alone and alone.ended == 0.0:
            free.append(alone)
        self._note()
        return free


class EarlyAcks:
    """The attempts of one queue whose jobs are acknowledged before they start."""

    def __init__(self) -> None:
        self.waiting: list[Attempt] = []
        """Those that wait for the reply of the turn which carries their ack."""
        self.acknowledged: set[Attempt] = set()
        """Those that are gone from Redis and have not ended here, so that no other worker has them."""

    def __bool__(self) -> bool:
        return bool(self.waiting or self.acknowledged)

    def add(self, attempt: Attempt, report: TurnReport) -> None:
        """Acknowledge *attempt* with *report*."""
        self.waiting.append(attempt)
        report.add_done(attempt.id, attempt.envelope.attributes)

    def forget(self, id_: str) -> None:
        """Drop an attempt whose ack was refused: another worker has the job."""
        self.waiting = [one for one in self.waiting if one.id != id_]

    def clear(self) -> None:
        """Drop all that are not acknowledged: their lease is lost."""
        self.waiting.clear()

    def confirmed(self, report: TurnReport) -> list[Attempt]:
        """Return the attempts that may start, now that *report* is settled."""
        if not self.waiting or not report.done:
            return []
        acked = set(report.done)
        confirmed = [attempt for attempt in self.waiting if attempt.id in acked]
        self.acknowledged.update(confirmed)
        self.waiting = [attempt for attempt in self.waiting if attempt.id not in acked]
        return confirmed
