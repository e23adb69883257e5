"""What a server can confirm of a push: whether it is on disk, how many replicas have it. Read for the doctor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from conveyor.errors import ConveyorError
from conveyor.store.durability import Durability, Sync, judge

Ask = Callable[..., object]
_SAID = {
    Sync.REPLY: "every reply means it is synced (appendfsync always)",
    Sync.WAITAOF: "WAITAOF tells",
    Sync.WATCH: "a sync is watched go by, which takes 1 to 2 s: this server's WAITAOF answers too early under everysec",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One thing the doctor says."""

    level: Literal["ok", "note", "warning", "problem"]
    text: str
    remedy: str = ""
    code: str = ""


def online(facts: Mapping[str, str]) -> int:
    """Return how many replicas follow, by INFO."""
    return sum("state=online" in told for name, told in facts.items() if re.fullmatch(r"slave\d+", name))


def replication(facts: Mapping[str, str], least: str | None, lag: str | None) -> Iterator[Line]:
    """Yield what replicas can confirm; *least* and *lag* are min-replicas-to-write and -max-lag, None when not told."""
    count = online(facts)
    if facts.get("role") == "slave":
        return
    if count:
        yield Line("ok", f"{_replicas(count)} online: wait_replicas up to {count} can be confirmed")
    if count and least == "0":
        text = "min-replicas-to-write is 0: a primary that is cut off goes on accepting what a failover loses"
        yield Line("note", text, "CONFIG SET min-replicas-to-write 1, and min-replicas-max-lag 10")
    if least not in {None, "0"}:
        good = int(facts.get("min_slaves_good_slaves", count))
        text = f"min-replicas-to-write is {least}, with a lag of at most {lag} s; {good} now"
        if good < int(str(least)):
            yield Line("problem", f"{text}: every push is refused", "Bring the replicas back, or lower it.")
        else:
            yield Line("ok", f"{text}. It bounds what a failover loses; only wait_replicas says what it cannot lose")


def confirmation(execute: Ask, where: str) -> tuple[bool, Line]:
    """Return whether fsync=True can be confirmed, and how."""
    replies: list[object] = []
    for command in Durability(fsync=True).examination():
        try:
            replies.append(execute(*command))
        except ConveyorError as error:
            replies.append(error.__cause__ or error)  # the server's own words, which `judge` knows
    try:
        return True, Line("ok", f"fsync=True can be confirmed: {_SAID[judge(Durability(fsync=True), replies, where)]}")
    except (ConveyorError, OSError) as error:
        why = str(error).partition("\n")[0]
        found = re.search(r"cannot be confirmed by Redis at .*?: (.*?)\. Nothing was stored\. Set it: (.*?),", why)
        if found is None:
            return False, Line("note", f"fsync=True cannot be confirmed: {why}")
        return False, Line("note", f"fsync=True would be refused (E36): {found[1]}", found[2])


def asked(queue: str, asks: Durability, *, synced: bool, replicas: int) -> Line:
    """Return whether what a queue asks of every push can be had."""
    wants = ["fsync"] * asks.fsync + [_replicas(asks.replicas)] * (asks.replicas > 0)
    text = f"queue '{queue}' asks for {' and '.join(wants)}"
    if asks.fsync and not synced:
        return Line("problem", f"{text}: every push is refused", "See above, or declare it without fsync.", "E36")
    if asks.replicas > replicas:
        remedy = f"Add replicas, or declare it with wait_replicas={replicas}."
        return Line("problem", f"{text}, and {replicas} are online: every push raises", remedy, "E29")
    return Line("ok", f"{text}: it can be had")


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"
