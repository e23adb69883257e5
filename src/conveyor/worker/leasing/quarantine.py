"""
What must be written down before it may start: the crash of a suspect, the ack of an early acknowledged job.

Who was merely leased beside a poison job must not be convicted with it. So the first crash of a worker is counted for all
that it held, and makes nothing worse; from then on a job is charged by its own starts alone: its crash is counted
before it starts, and taken back at any orderly end. After one crash as many start together as there are free slots;
after two (or when the next would be the last) one at a time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from conveyor.messaging import retry
from conveyor.store.operations import Settlement, TurnReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conveyor.worker.attempt import Attempt


class Quarantine:
    """Holds attempts until the turn that carries their record is answered."""

    def __init__(self, free: Callable[[], int]) -> None:
        """Begin empty; *free* tells how many jobs could start right now."""
        self._free = free
        self._returned: deque[Attempt] = deque()  # after one crash
        self._charged: dict[str, tuple[Settlement, Attempt]] = {}  # of those: on the way to Redis
        self._suspects: deque[Attempt] = deque()
        self._suspect: Attempt | None = None
        self._charge: Settlement | None = None
        self._early: list[Attempt] = []
        self.acknowledged: set[Attempt] = (
            set()
        )  # of those: gone from Redis and not ended here, so that nobody else has them

    def __bool__(self) -> bool:
        return bool(self._early or self.acknowledged)

    @property
    def reserved(self) -> int:
        """How many slots are spoken for: who came back from a crash starts before anything is leased behind it."""
        return len(self._returned) + len(self._charged)

    def suspect(self, attempt: Attempt) -> None:
        """Take an attempt that came back from a crash."""
        history, limit = attempt.history, attempt.handler.task.settings.retry.max_crashes
        alone = history.crashes >= limit or retry.runs_alone(history, limit)
        (self._suspects if alone else self._returned).append(attempt)

    def early(self, attempt: Attempt, report: TurnReport) -> None:
        """Take an attempt that is acknowledged before it starts."""
        self._early.append(attempt)
        report.done.append(attempt.id)

    def forget(self, id_: str) -> None:
        """Drop an early one whose ack was refused: another worker has it."""
        self._early = [one for one in self._early if one.id != id_]

    def clear(self) -> None:
        """Drop all that are leased: their lease is lost."""
        self._early.clear()
        self._returned.clear()
        self._charged.clear()
        self._suspects.clear()
        self._suspect = None

    def ended(self, attempt: Attempt) -> None:
        """Note the end of an attempt, so that the next suspect may run."""
        self.acknowledged.discard(attempt)
        if self._suspect is attempt:
            self._suspect = None

    def advance(self, report: TurnReport, held: Mapping[str, Attempt]) -> list[Attempt]:
        """Have the crashes of those counted that may start next; return those that are poison already."""
        while self._returned and self._free() > len(self._charged):
            attempt = self._returned.popleft()
            if held.get(attempt.id) is attempt and attempt.ended == 0.0:
                charge = Settlement("M", attempt.id, state=retry.with_presumed_crash(attempt.history).encode())
                self._charged[attempt.id] = charge, attempt
                report.others.append(charge)
        poison: list[Attempt] = []
        while self._suspect is None and self._suspects:
            attempt = self._suspects.popleft()
            if held.get(attempt.id) is not attempt or attempt.ended != 0.0:
                continue
            if attempt.history.crashes >= attempt.handler.task.settings.retry.max_crashes:
                poison.append(attempt)
                continue
            self._suspect = attempt
            self._charge = Settlement(
                "M", attempt.id, state=retry.with_presumed_crash(attempt.history, alone=True).encode()
            )
            report.others.append(self._charge)
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
        suspect = self._suspect
        charged = {one.id for one in report.others if one is self._charge}
        if suspect is not None and suspect.id in charged and held.get(suspect.id) is suspect and suspect.ended == 0.0:
            free.append(suspect)
        if self._early and report.done:
            acked = set(report.done)
            early = [attempt for attempt in self._early if attempt.id in acked]
            free += early
            self.acknowledged.update(early)
            self._early = [attempt for attempt in self._early if attempt.id not in acked]
        return free
