"""
What must be written down before it may start: the crash of a suspect, the ack of an early acknowledged job.

A job that came back from two crashes is a suspect, whether it ran or was only leased. One
suspect runs at a time, and its crash is counted before it starts (taken back at any orderly
end): charging all that were leased together would convict the neighbours of one poison job.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from conveyor import outcome
from conveyor.store.operations import Report, Settlement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.worker.attempt import Attempt


class Antechamber:
    """Holds attempts until the turn that carries their record is answered."""

    def __init__(self) -> None:
        """Begin empty."""
        self._suspects: deque[Attempt] = deque()
        self._suspect: Attempt | None = None
        self._charge: Settlement | None = None
        self._early: list[Attempt] = []

    def __bool__(self) -> bool:
        return bool(self._early)

    def suspect(self, attempt: Attempt, report: Report) -> None:
        """Take an attempt that may crash its worker."""
        self._suspects.append(attempt)
        if attempt.history.crashes < 2 and not attempt.history.alone:
            report.others.append(Settlement("M", attempt.id, state=outcome.waiting(attempt.history).encode()))

    def early(self, attempt: Attempt, report: Report) -> None:
        """Take an attempt that is acknowledged before it starts."""
        self._early.append(attempt)
        report.done.append(attempt.id)

    def forget(self, id_: str) -> None:
        """Drop an early one whose ack was refused: another worker has it."""
        self._early = [one for one in self._early if one.id != id_]

    def clear(self) -> None:
        """Drop all: their lease is lost."""
        self._early.clear()
        self._suspects.clear()
        self._suspect = None

    def ended(self, attempt: Attempt) -> None:
        """Note the end of an attempt, so that the next suspect may run."""
        if self._suspect is attempt:
            self._suspect = None

    def advance(self, report: Report, held: Mapping[str, Attempt]) -> list[Attempt]:
        """Have the next suspect's crash counted; return those that are poison already."""
        poison: list[Attempt] = []
        while self._suspect is None and self._suspects:
            attempt = self._suspects.popleft()
            if held.get(attempt.id) is not attempt or attempt.ended != 0.0:
                continue
            if attempt.history.crashes >= attempt.handler.task.settings.retry.max_crashes:
                poison.append(attempt)
                continue
            self._suspect = attempt
            self._charge = Settlement("M", attempt.id, state=outcome.suspected(attempt.history).encode())
            report.others.append(self._charge)
        return poison

    def confirmed(self, report: Report, held: Mapping[str, Attempt]) -> list[Attempt]:
        """Return the attempts that may start, now that *report* is settled."""
        free: list[Attempt] = []
        suspect = self._suspect
        charged = {one.id for one in report.others if one is self._charge}
        if suspect is not None and suspect.id in charged and held.get(suspect.id) is suspect and suspect.ended == 0.0:
            free.append(suspect)
        if self._early and report.done:
            acked = set(report.done)
            free += [attempt for attempt in self._early if attempt.id in acked]
            self._early = [attempt for attempt in self._early if attempt.id not in acked]
        return free
