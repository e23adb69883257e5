"""The names of fields that are not shown, as all programs of a namespace know them: a set that only grows."""

from __future__ import annotations

from typing import Any

from conveyor.payload.redaction import RedactedNames
from conveyor.store.script import Call, Command, Script

SADD, SMEMBERS = Script("SADD"), Script("SMEMBERS")


def redaction_key(namespace: str) -> str:
    """Return the key of the set; its members are patterns, and task and name with a tab between them."""
    return f"{namespace}:redaction"


def add(namespace: str, names: RedactedNames) -> Call[int]:
    """Return the call that adds names to those of the namespace."""
    sensitive = (f"{task}\t{name}" for task, some in names.sensitive.items() for name in some)
    return Command(SADD, (redaction_key(namespace),), (*sorted(names.patterns), *sorted(sensitive)), int)


def read(namespace: str) -> Call[RedactedNames]:
    """Return the call that reads the names of the namespace."""

    def decode(reply: Any) -> RedactedNames:
        patterns, sensitive = set[str](), dict[str, set[str]]()
        for member in reply:
            task, tab, name = member.decode(errors="replace").rpartition("\t")
            if tab:
                sensitive.setdefault(task, set()).add(name)
            else:
                patterns.add(name)
        return RedactedNames(frozenset(patterns), {task: frozenset(some) for task, some in sensitive.items()})

    return Command(SMEMBERS, (redaction_key(namespace),), (), decode)
