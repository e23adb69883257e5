"""The audit, a stream of what people did to queues and jobs, and the marks on charts; one pure function per step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from conveyor.errors import ConveyorError
from conveyor.store.script import Call, Command, Script

if TYPE_CHECKING:
    from conveyor.store.client.client import Client

XADD, EXPIRE, XREVRANGE = Script("XADD"), Script("EXPIRE"), Script("XREVRANGE")
_MOST_NOTED = 2_000
"""Characters of one field in the audit."""
logger = logging.getLogger("conveyor.admin")


class AuditRow(NamedTuple):
    """One entry: its id, which begins with the instant in ms, and its fields."""

    id: str
    fields: dict[str, str]


def audit_key(namespace: str) -> str:
    """Return the key of the audit of a namespace."""
    return f"{namespace}:audit"


def marks_key(namespace: str) -> str:
    """Return the key of the marks on the charts of a namespace, a stream as the audit is."""
    return f"{namespace}:marks"


def note_action(key: str, fields: Mapping[str, str], most: int = 10_000) -> Call[str]:
    """Return the call that adds an entry; about *most* are kept. A repeat would add a second one."""
    args = ("MAXLEN", "~", str(most), "*", *(text for pair in fields.items() for text in pair))
    return Command(XADD, (key,), args, lambda reply: reply.decode())


def keep_audit(key: str) -> Call[int]:
    """Return the call by which the audit, or the marks, go away 90 days from now."""
    return Command(EXPIRE, (key,), ("7776000",), int)


def read_audit(key: str, before: str | None, count: int, *, since: int | None = None) -> Call[list[AuditRow]]:
    """Return the call that reads *count* entries, the newest first: older than the entry *before*, and not before *since* in ms."""

    def decode(reply: list[Any]) -> list[AuditRow]:
        return [
            AuditRow(
                id_.decode(),
                {
                    name.decode(): value.decode(errors="replace")
                    for name, value in zip(fields[::2], fields[1::2], strict=True)
                },
            )
            for id_, fields in reply
        ]

    end = f"({before}" if before else "+"
    return Command(XREVRANGE, (key,), (end, "-" if since is None else str(since), "COUNT", str(count)), decode)


def write_audit(
    client: Client, who: str, what: str, target: str, *, chosen_by: str = "", count: int | None = None, detail: str = "",
    quiet: bool = False,
) -> None:  # fmt: skip
    """
    Note that somebody did something. *chosen_by*: the filter.

    What was done stays done when it cannot be noted, as for a user of Redis who may not write there: a warning is logged,
    unless this is *quiet*.
    """
    fields = {
        "who": who, "what": what, "target": target, "filter": chosen_by, "count": "" if count is None else str(count),
        "detail": detail,
    }  # fmt: skip
    kept = {name: text[:_MOST_NOTED] for name, text in fields.items() if text}
    key = audit_key(client.namespace)
    try:
        client.run(note_action(key, kept), retry_for=0.0)
        client.run(keep_audit(key), retry_for=0.0)
    except ConveyorError as error:
        level = logging.DEBUG if quiet else logging.WARNING
        logger.log(level, "%s by %s could not be noted in the audit: %s", what, who, error)
