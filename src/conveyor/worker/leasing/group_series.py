"""
Series: jobs of a group that runs one at a time, which one turn has leased together and which run here one after the other.

A round trip for each job is most of what a quick one costs. Nobody else could run what waits behind a job of such a group, so that
a series takes nothing from other workers: its group is theirs again when the last job of it has left this one. Each job starts when
the one before has ended well, and the ends travel with the turns that follow. After any other end (a retry, a return, a refusal)
the rest goes back in the same report and in front of that end, so that a job which comes back stands before it. The rest goes back
too when it was leased `LONGEST` ago: a pause or another tenant waits no longer for it than for jobs leased ahead.

A series goes on: while its jobs run, a turn leases others that follow them, since else the worker and the server would take turns.
Redis allows that where the worker holds all the slots of the key, by their number. What comes after the series has ended otherwise
than well, or has returned some of its jobs, goes back too, in front of what is reported since.
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
"""Jobs of a group that one turn leases, at most."""
MOST_GOING_ON = 8
"""Series that one turn goes on with, at most: a turn has as many tickets to look for."""
_AIM = LONGEST / 2
_COST = 0.00005  # seconds that a job takes beside its function


class _Series:
    __slots__ = ("coming", "current", "group", "is_well", "started", "waiting")

    def __init__(self, group: str, first: Attempt) -> None:
        self.group = group
        self.current: Attempt | None = first  # the key of `GroupSeries.running`; None: none of its jobs runs
        self.started = 1
        self.waiting: deque[tuple[float, Attempt]] = deque()  # with the instants until which they may start
        self.coming: list[Attempt] = []  # those of the reply that is being read
        self.is_well = True  # none has ended otherwise than well, and none was returned: others may follow


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
        self._taken: dict[str, _Series] = {}
        self._asked: dict[str, _Series] = {}  # by their groups those that the turn under way may go on with
        self._asked_length = 1
        self._pace = 0.001  # seconds from one end to the next, turns included
        self._paced_at = 0.0  # since when that is measured; 0.0: no series
        self._timer: asyncio.TimerHandle | None = None
        self._seconds = _AIM
        """Those that a job takes, as far as they are known."""
        self.length = 1
        """The number of jobs that the next turn may lease of a group; 1: no series."""
        self.wants_more = False
        """True when a group had all the jobs that the last turn asked for, and others should follow them now."""

    # -- length ---------------------------------------------------------------------------------------------------

    def note_ends(self, count: int, seconds: float) -> None:
        """Measure jobs with groups or limits: so many have ended, and ran for *seconds* altogether."""
        # Quick to believe in long ones, slow to forget them.
        self._expect(max(seconds / count + _COST, self._seconds / 2))

    def note_pace(self, count: int, now: float) -> None:
        """Measure how jobs of a series follow one another: so many have ended since the last turn that had some."""
        if self._paced_at:
            self._pace = max((now - self._paced_at) * max(1, len(self.running)) / count, 0.7 * self._pace)
            self._paced_at = now if self.running else 0.0

    def _expect(self, seconds: float) -> None:
        self._seconds = seconds
        self.length = max(1, min(MOST, int(_AIM / seconds)))

    def ask(self) -> str:
        """Return the flag of a turn that leases, with the series that it may go on with: how many of their jobs are held here."""
        self._asked, self.wants_more = {}, False
        if self.length == 1:
            return ""
        length, parts, held = self.length, [""], self._held
        for current, series in self.running.items():
            if series.is_well and len(self._asked) < MOST_GOING_ON:
                waiting = sum(1 for _, one in series.waiting if one.ended == 0.0 and held.get(one.id) is one)
                if (room := self._room_behind(1 + waiting)) >= 1 and held.get(current.id) is current:
                    length = min(length, room)
                    parts.append(f"{1 + waiting}:{series.group}")
                    self._asked[series.group] = series
        self._asked_length = length
        return f"s{length}" + "\t".join(parts)

    def _room_behind(self, count: int) -> int:
        """Return how many jobs may follow *count* others, so that the last of them starts when it is half as old as `LONGEST`."""
        return int(_AIM / self._pace) - count

    # -- what a turn has leased -----------------------------------------------------------------------------------

    def follows(self, attempt: Attempt) -> bool:
        """Tell whether a job of the same group that was leased before *attempt*, by this turn or another, must end first."""
        attributes = attempt.envelope.attributes
        at = attributes.find("\tg")
        if at < 0 or "\tl" in attributes:
            return False
        group = attributes[at + 2 :].split("\t", 1)[0]
        series = self._taken.get(group)
        if series is None:
            series = self._asked.get(group)
            if series is None:
                self._taken[group] = _Series(group, attempt)
                return False
            self._taken[group] = series
        series.coming.append(attempt)
        return True

    def begin(self, leased_at: float) -> None:
        """
        Begin the series of a turn that was sent at *leased_at* (monotonic), or go on with them.

        Jobs that are not simply run, one after the other, go back, with those behind them.
        """
        taken, self._taken = self._taken, {}
        if not self.running:
            self._paced_at = leased_at
        for series in taken.values():
            coming, series.coming = series.coming, []
            if not coming:
                continue
            simple, current = 0, series.current
            if series.is_well and (series.group in self._asked or (current is not None and _is_simply_run(current))):
                simple = next((at for at, one in enumerate(coming) if not _is_simply_run(one)), len(coming))
            series.waiting.extend((leased_at + LONGEST, one) for one in coming[:simple])
            if simple < len(coming):
                self._cut(series, coming[simple:], started=series.started + len(series.waiting))
            elif len(coming) >= self._asked_length - 1 and self._room_behind(len(series.waiting)) > self.length // 2:
                self.wants_more = True
            if current is not None:
                self.running[current] = series
            else:
                self._go_on(series)
        self._asked = {}
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
        series.current = None
        if well:
            self._go_on(series)
        else:
            self._cut_all(series)

    def _go_on(self, series: _Series) -> None:
        """Start the next job of a series of which none runs, or return what has waited for too long."""
        waiting, held = series.waiting, self._held
        while waiting:
            ends_at, after = waiting[0]
            if monotonic() >= ends_at:
                self._pace *= 4
                self._cut_all(series)
                return
            waiting.popleft()
            if after.ended == 0.0 and held.get(after.id) is after:  # neither cancelled nor returned at a stop
                series.started += 1
                series.current = after
                self.running[after] = series
                self._start(after)
                return

    def end_all(self) -> None:
        """Go on with none of them, because what has not started goes back: what is still coming goes back, too."""
        for series in (*self.running.values(), *self._asked.values()):
            series.is_well = False

    def clear(self) -> None:
        """Forget all: their lease is lost."""
        self.running.clear()
        self._asked, self.wants_more = {}, False

    def close(self) -> None:
        """End the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _cut_all(self, series: _Series) -> None:
        rest = [one for _, one in series.waiting]
        series.waiting.clear()
        self._cut(series, rest, started=series.started)

    def _cut(self, series: _Series, rest: list[Attempt], *, started: int) -> None:
        """Return the *rest* of a series, so many jobs of which have *started* or will: nothing follows them any more."""
        series.is_well = False
        rest = [one for one in reversed(rest) if one.ended == 0.0 and self._held.get(one.id) is one]
        if rest:
            self._expect(max(self._seconds, _AIM / started))
            self._hand_back(rest)

    def _set_timer(self) -> None:
        if self.running and self._timer is None:
            ends = [one.waiting[0][0] for one in self.running.values() if one.waiting]
            if ends:
                delay = max(0.0, min(ends) - monotonic())
                self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        """Return what waits for a job that runs for long."""
        self._timer, now = None, monotonic()
        for series in [*self.running.values()]:
            if series.waiting and series.waiting[0][0] <= now:
                self._cut_all(series)
        self._set_timer()


def _is_simply_run(attempt: Attempt) -> bool:
    """Tell whether it starts without a turn before it, and alone."""
    handler = attempt.handler
    return not (attempt.crashed_before or handler.early) and handler.kind in {"loop", "thread", "process"}
