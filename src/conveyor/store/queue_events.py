"""Events of a queue: the call that reads them. Scripts write them, as lib/events.lua says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Script

READ_EVENTS = Script("read_events")
PAGE = 500
"""Events that are read at once."""
TO_COME = "$"
"""The place behind all events that are kept."""


class StoredEvent(NamedTuple):
    """An event as it is stored: its id, which begins with the instant in ms, and its fields."""

    id: str
    fields: dict[str, str]


class EventPage(NamedTuple):
    """
    Some events of one queue or partition, and the `place` behind them; `more` follow at once, `missed` went before these.

    `kept`: False when the queue keeps no events.
    """

    kept: bool
    more: bool = False
    missed: bool = False
    events: Sequence[StoredEvent] = ()
    place: str = ""


def read_events(keys: QueueKeys, channel: str, after: str) -> Call[EventPage]:
    """Return the call that reads a page of events *after* one ("": all), and registers *channel* for those that come."""
    names = (keys.events, keys.event_readers, keys.conf)
    return Call(READ_EVENTS, names, (channel, after, str(PAGE)), _read_page)


def _read_page(reply: list[Any]) -> EventPage:
    if reply[0] == b"off":
        return EventPage(False)
    events = [
        StoredEvent(
            id_.decode(),
            {
                name.decode(): value.decode(errors="ignore")
                for name, value in zip(fields[::2], fields[1::2], strict=False)
            },
        )
        for id_, fields in reply[2]
    ]
    return EventPage(True, reply[0] == b"more", reply[1] == 1, events, reply[3].decode())
