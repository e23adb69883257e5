"""
The names of queues that this process has added to Redis's set of all queues.

The set lies in a slot of its own, so no push can look into it. It is written to again when a push or a registration
finds its queue new in Redis, which has then forgotten everything, and looked at every 30 seconds: the set alone may be lost.
Queues that go when nobody uses them stand in a second set, with the instant at which to look whether they are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import monotonic, time
from typing import NamedTuple

from conveyor.payload.redaction import Redaction
from conveyor.store import operations, redacted_names, topics
from conveyor.store.keys import QueueKeys, expiring_queues, known_queues
from conveyor.store.operations import SOME_EXPIRE
from conveyor.store.script import Call, CallProgram

REFRESH = 30.0
"""Seconds after which the set is looked at for all names."""
PAUSE = 5.0
"""Seconds before the set is tried again at a node that was away."""
MOST = 10_000
"""Names that are remembered, at most: a program may push to a queue of each of its clients, all its life."""
MOST_LOOKED_AT = 200
"""Queues that are looked at, one by one, whether they exist."""
LATER_MS = 3_600_000
"""Milliseconds after which a queue is looked at again that holds something and so does not expire."""


class _Known(NamedTuple):
    """The facts by which a queue is found again."""

    foreign: str | None
    expires: int


class QueueIndex:
    """The names that were added, and when to look at the set again."""

    def __init__(self, namespace: str, redaction: Redaction) -> None:
        self._namespace = namespace
        self._redaction, self._told_changes = redaction, 0
        self._names: dict[str, _Known] = {}  # in the order in which they were added
        self._refresh_at = float("inf")
        self._paused_until = float("-inf")

    def __contains__(self, name: str) -> bool:
        """Tell whether nothing needs to be done before a push to queue *name*."""
        return name in self._names and monotonic() < self._refresh_at

    def is_due(self, queues: Iterable[QueueKeys]) -> bool:
        """Tell whether something is to be done for *queues* now: one of them is new here, or the set is to be looked at again."""
        now = monotonic()
        if now < self._paused_until:
            return False
        return now >= self._refresh_at or any(keys.queue not in self._names for keys in queues)

    def announcing(self, queues: Sequence[QueueKeys]) -> CallProgram[None]:
        """Add those of *queues* to the set that are new here; from time to time, look at it for all that are remembered."""
        refreshes = monotonic() >= self._refresh_at
        if refreshes:
            self._refresh_at = monotonic() + REFRESH  # first, so that pushes at the same time do not look as well
        new = {keys.queue: keys for keys in queues if keys.queue not in self._names}
        before = tuple(self._names.items()) if refreshes else ()
        yield from self._add(new.values())
        if before:
            yield from self._refresh(before)

    def _add(self, queues: Iterable[QueueKeys]) -> CallProgram[None]:
        if self._redaction and (changes := self._redaction.changes) != self._told_changes:
            # Before the first push: people who look without the app must not see what it hides.
            yield redacted_names.add(self._namespace, self._redaction.names)
            self._told_changes = changes
        expiring = {keys.queue: keys.expires for keys in queues if keys.expires}
        for keys in queues:
            if keys.expires or keys.events_kept is not None:
                # Before its name: a deletion that comes in between looks for the settings when it has removed the name.
                yield operations.declare_queue(keys)
        names = [keys.queue for keys in queues]
        if names:
            marks = (SOME_EXPIRE,) if expiring else ()
            yield operations.announce(known_queues(self._namespace), *names, *marks)
        if expiring:
            now = int(time() * 1000)
            times = {name: now + expires for name, expires in expiring.items()}
            yield operations.look_at(expiring_queues(self._namespace), times)
        if not self._names:
            self._refresh_at = monotonic() + REFRESH
        self._names.update((keys.queue, _Known(keys.foreign, keys.expires)) for keys in queues)
        while len(self._names) > MOST:
            self.discard(next(iter(self._names)))  # the next push there adds it again

    def _refresh(self, before: Sequence[tuple[str, _Known]]) -> CallProgram[None]:
        """Add what is missing in the set and not deleted. What was deleted, by whomever, is forgotten here too."""
        known, expire = known_queues(self._namespace), any(one.expires for _, one in before)
        found = yield operations.are_known(known, *(name for name, _ in before), *([SOME_EXPIRE] if expire else []))
        missing = [one for one, is_known in zip(before, found, strict=False) if not is_known]
        names = [SOME_EXPIRE] if expire and not found[-1] else []
        for name, one in missing:
            # So many at once were not deleted: the set is lost. Names that expire are added at the next push there.
            is_lost = len(missing) > MOST_LOOKED_AT
            keys = QueueKeys(self._namespace, name, foreign=one.foreign)
            if not one.expires and (is_lost or (yield _exists(keys))):
                names.append(name)
            else:
                self.discard(name)
        if names:
            yield operations.announce(known, *names)
        if expire:
            yield from removing_expired(self._namespace)

    def discard(self, name: str) -> None:
        """Note that Redis has forgotten queue *name*, and may have forgotten everything."""
        self._names.pop(name, None)
        self._told_changes = 0

    def pause(self) -> None:
        """Note that the node of the set is away: pushes to other nodes go on without it."""
        now = monotonic()
        self._paused_until, self._refresh_at = now + PAUSE, min(self._refresh_at, now + PAUSE)


def removing_expired(namespace: str) -> CallProgram[set[str]]:
    """Remove the names of queues that nobody used and that are gone; return them. Some are looked at, the longest due first."""
    now, expiring = int(time() * 1000), expiring_queues(namespace)
    gone, later = list[QueueKeys](), dict[str, int]()
    for name in (yield operations.expiring_names(expiring, now, MOST_LOOKED_AT)):
        keys = QueueKeys(namespace, name)
        left = yield operations.time_to_live(keys.conf)
        if left == -2 and not (yield _exists(keys)):
            gone.append(keys)
        else:
            later[name] = now + (left if left > 0 else LATER_MS)
    if later:
        yield operations.look_at(expiring, later)
    if gone:
        yield from withdrawing(namespace, gone)
        for keys in gone:
            yield topics.leave(topics.TopicKeys(namespace), keys.queue)
    elif not later:
        yield from _forget_mark(namespace)
    return {keys.queue for keys in gone}


def withdrawing(namespace: str, places: Sequence[QueueKeys]) -> CallProgram[None]:
    """Remove queues from the set of known ones; those that were begun anew meanwhile are added again."""
    known = known_queues(namespace)
    yield operations.withdraw_names(known, *(place.queue for place in places))
    if (yield operations.stop_looking(expiring_queues(namespace), *(place.queue for place in places))):
        yield from _forget_mark(namespace)
    for place in places:
        if (yield _exists(place)):
            yield operations.announce(known, place.queue)


def _forget_mark(namespace: str) -> CallProgram[None]:
    if not (yield operations.count_expiring(expiring_queues(namespace))):
        yield operations.withdraw_names(known_queues(namespace), SOME_EXPIRE)


def _exists(keys: QueueKeys) -> Call[bool]:
    return operations.exists(keys.conf, keys.jobs, *([] if keys.foreign is None else [keys.foreign]))
