"""The audit, a stream of what people did to queues and jobs, and the marks on charts; one pure function per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from conveyor.store.script import Call, Command, Script

XADD, EXPIRE, XREVRANGE = Script("XADD"), Script("EXPIRE"), Script("XREVRANGE")


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
