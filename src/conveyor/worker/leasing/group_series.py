"""
Series: jobs of a group that runs one at a time, which one turn has leased together and which run here one after the other.

A round trip for each job is most of what a quick one costs. Nobody else could run what waits behind a job of such a group, so that
a series takes nothing from other workers: its group is theirs again when the last job of it has left this one. Each job starts when
the one before has ended well, and the ends travel with the turns that follow. After any other end (a retry, a return, a refusal)
the rest goes back in the same report and in front of that end, so that a job which comes back stands before it. The rest goes back
too when the series is `LONGEST` old: a pause or another tenant waits no longer for it than for jobs leased ahead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from conveyor.store.operations import TurnReport
    from conveyor.worker.attempt import Attempt

LONGEST = 0.05
"""Seconds after its turn was sent in which a job of a series may start. A lease is never shorter."""
MOST = 500
"""Jobs of a series, at most."""
_AIM = LONGEST / 2
_COST = 0.00005  # seconds that a job takes beside its function


class _Series:
    __slots__ = ("ends_at", "started", "waiting")

    def __init__(self) -> None:
        self.started = 1
        self.waiting: deque[Attempt] = deque()
        self.ends_at = 0.0


class GroupSeries:
    """The series of one queue, and how long one may be: what ends within half of `LONGEST`, as jobs went lately."""

    def __init__(
        self, held: Mapping[str, Attempt], start: Callable[[Attempt], None], hand_back: Callable[[list[Attempt]], None]
    ) -> None:
        """
        Args:
            held: what is leased here.
            start: starts an attempt, because the one before has just ended.
            hand_back: returns attempts that have not started, the youngest first.
        """
        self._held, self._start, self._hand_back = held, start, hand_back
        self.running: dict[Attempt, _Series] = {}
        """By the attempt that must end before the next one starts."""
        self._taken: dict[str, tuple[Attempt, _Series]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._seconds = _AIM
        """Those that a job takes, as far as they are known."""
        self.length = 1
        """The number of jobs that the next turn may lease of a group; 1: no series."""
        self.flag = ""
        """The flag of a turn that asks for them."""

    # -- length ---------------------------------------------------------------------------------------------------

    def note_ends(self, count: int, seconds: float) -> None:
        """Measure jobs with groups or limits: so many have ended, and ran for *seconds* altogether."""
        # Quick to believe in long ones, slow to forget them.
        self._expect(max(seconds / count + _COST, self._seconds / 2))

    def _expect(self, seconds: float) -> None:
        self._seconds = seconds
        self.length = max(1, min(MOST, int(_AIM / seconds)))
        self.flag = f"s{self.length}" if seconds <= _AIM / 2 else ""

    # -- what a turn has leased -----------------------------------------------------------------------------------

    def follows(self, attempt: Attempt) -> bool:
        """Tell whether a job of the same group that the turn has leased before *attempt* must end first."""
        attributes = attempt.envelope.attributes
        at = attributes.find("\tg")
        if at < 0 or "\tl" in attributes:
            return False
        group = attributes[at + 2 :].split("\t", 1)[0]
        if group not in self._taken:
            self._taken[group] = attempt, _Series()
            return False
        self._taken[group][1].waiting.append(attempt)
        return True

    def begin(self, leased_at: float) -> None:
        """
        Begin the series of a turn that was sent at *leased_at* (monotonic).

        Jobs that are not simply run, one after the other, go back, with those behind them.
        """
        taken, self._taken = self._taken, {}
        for head, series in taken.values():
            if not series.waiting:
                continue
            series.ends_at = leased_at + LONGEST
            simple = 0
            if _is_simply_run(head):
                simple = next(
                    (at for at, one in enumerate(series.waiting) if not _is_simply_run(one)), len(series.waiting)
                )
            if simple < len(series.waiting):
                self._cut(1 + simple, [series.waiting.pop() for _ in range(len(series.waiting) - simple)])
            if series.waiting:
                self.running[head] = series
        self._set_timer()

    # -- their ends -----------------------------------------------------------------------------------------------

    def on_finished(self, attempt: Attempt, report: TurnReport) -> None:
        """Start what waits for *attempt*, whose end is the last in *report*, or return it."""
        series = self.running.pop(attempt, None)
        if series is None:
            return
        well = report.done and report.done[-1] == attempt.id
        if not well and report.others:
            last = report.others[-1]
            well = last.kind == "D" and last.id == attempt.id
        waiting, held = series.waiting, self._held
        while waiting:
            if not well or monotonic() >= series.ends_at:
                self._cut(series.started, [*reversed(waiting)])
                return
            after = waiting.popleft()
            if after.ended == 0.0 and held.get(after.id) is after:  # neither cancelled nor returned at a stop
                series.started += 1
                if waiting:
                    self.running[after] = series
                self._start(after)
                return

    def clear(self) -> None:
        """Forget all: their lease is lost."""
        self.running.clear()

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _cut(self, started: int, rest: list[Attempt]) -> None:
        """Return the *rest* of a series, the youngest first, so many jobs of which have *started*."""
        rest = [one for one in rest if one.ended == 0.0 and self._held.get(one.id) is one]
        if rest:
            self._expect(max(self._seconds, _AIM / started))
            self._hand_back(rest)

    def _set_timer(self) -> None:
        if self.running and self._timer is None:
            first = min(one.ends_at for one in self.running.values())
            self._timer = asyncio.get_running_loop().call_later(max(0.0, first - monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        """Return what waits for a job that runs for long."""
        self._timer, now = None, monotonic()
        for head, series in [*self.running.items()]:
            if series.ends_at <= now:
                del self.running[head]
                self._cut(series.started, [*reversed(series.waiting)])
        self._set_timer()


def _is_simply_run(attempt: Attempt) -> bool:
    """Tell whether it starts without a turn before it, and alone."""
    handler = attempt.handler
    return not (attempt.crashed_before or handler.early) and handler.kind in {"loop", "thread", "process"}
