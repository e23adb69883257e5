"""Rates of queues: what came in and what left, from two counts of a queue, since a push counts nothing."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from conveyor.units import rough_span

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Sequence

    from conveyor.admin.views import QueueCount
    from conveyor.store.inspection import LeftLately

_WINDOW_MS, _LEAST_MS = 12_000, 2_000
"""The time over which rates are averaged, and the least that two counts have to be apart."""
_COUNTING = frozenset({"worker", ""})
"""Kinds of workers that count what they end; consumers of messages do not."""


class Flow(msgspec.Struct, frozen=True, gc=False):
    """
    The rates of a queue over the last seconds.

    `in_per_second`, `out_per_second`: jobs that came in, and that left with any outcome; None where consumers of messages take
    them, which count nothing. `trend`: of what is ready, waits and is leased; a change as small as chance makes it is "steady".
    `empty_in`: seconds until nothing of that is left if it goes on so; None unless it shrinks.
    """

    in_per_second: float | None
    out_per_second: float | None
    trend: Literal["grows", "shrinks", "steady"]
    empty_in: float | None = None

    def __str__(self) -> str:
        """Return the trend in words, "" where it is steady."""
        if self.trend == "steady":
            return ""
        return self.trend if self.empty_in is None else f"{self.trend}, empty in about {rough_span(self.empty_in)}"


def flow_document(flow: Flow | None) -> dict[str, Any] | None:
    """Return rates with their sentence; None where they are not known."""
    return None if flow is None else {**msgspec.structs.asdict(flow), "sentence": str(flow)}


class _Reading(NamedTuple):
    """
    The counts of a queue at an instant (ms): what it held in all, and what of that was due.

    `gone`: what had left it since the first reading. `counts_all`: whether all who end its jobs count them.
    """

    at: int
    held: int
    due: int
    dropped: int
    gone: int
    left: Sequence[LeftLately]
    counts_all: bool


class FlowMeter:
    """The last counts of queues, from which their rates follow: whoever counts again and again needs no further command."""

    def __init__(self) -> None:
        self._readings: dict[str, deque[_Reading]] = {}

    def add(self, one: QueueCount, kinds: Collection[str]) -> Flow | None:
        """
        Note a count of a queue with what left it, and return its rates; None while there is only one, or the last was too long ago.

        *kinds*: those of its workers.
        """
        info, known = one.info, self._readings.get(one.info.name)
        if not one.left:
            self._readings.pop(info.name, None)
            return None
        due = info.ready + info.waiting + info.leased
        at = max(part.at_ms for part in one.left)
        new = _Reading(at, due + info.scheduled, due, info.dropped, 0, one.left, _COUNTING.issuperset(kinds))
        gone = _gone_since(known[-1], new) if known else None
        if known is None or gone is None:
            self._readings[info.name] = deque([new])
            return None
        known.append(new._replace(gone=known[-1].gone + gone))
        while len(known) > 2 and known[1].at <= at - _WINDOW_MS:
            known.popleft()
        return _flow(known)

    def keep(self, names: Container[str]) -> None:
        """Forget all other queues."""
        self._readings = {name: known for name, known in self._readings.items() if name in names}


def _gone_since(last: _Reading, new: _Reading) -> int | None:
    """Return how many jobs have left a queue between two counts, None where that is not known."""
    if len(last.left) != len(new.left):
        return None
    found = [after.since(before) for before, after in zip(last.left, new.left, strict=True)]
    if any(one is None for one in found):
        return None
    return sum(one or 0 for one in found) + max(0, new.dropped - last.dropped)


def _flow(known: Sequence[_Reading]) -> Flow | None:
    first, last = known[0], known[-1]
    if last.at - first.at < _LEAST_MS:
        return None
    seconds, gone, change = (last.at - first.at) / 1000, last.gone - first.gone, last.due - first.due
    # Jobs that were deleted, or cancelled in the queue, are counted nowhere: less came in then, but never less than nothing.
    came = max(0, last.held - first.held + gone)
    counted = all(one.counts_all for one in known)
    # Two counts of jobs that come and go independently differ by so much in one of twenty cases.
    moved = abs(change) > 2 * max(came + gone, abs(change)) ** 0.5
    trend: Literal["grows", "shrinks", "steady"] = "steady" if not moved else "grows" if change > 0 else "shrinks"
    empty_in = last.due * seconds / -change if trend == "shrinks" and last.due else None
    return Flow(came / seconds if counted else None, gone / seconds if counted else None, trend, empty_in)
