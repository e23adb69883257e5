"""
Checks of a server for the doctor.

The durability that it can confirm, and whether its release is too old or vulnerable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from conveyor.errors import ConveyorError
from conveyor.store.client.durability import Durability, FsyncMethod, decide_fsync_method

ExecuteCommand = Callable[..., object]
LONGEST_LAG = 10
"""Seconds that a replica may be behind and still count for min-replicas-to-write."""
_FSYNC_METHODS = {
    FsyncMethod.REPLY: "fsync=True works: every reply confirms the sync (appendfsync always)",
    FsyncMethod.WAITAOF: "fsync=True works: WAITAOF confirms the sync",
    FsyncMethod.WATCH: "fsync=True works; each call waits 1 to 2 s, because this server's WAITAOF is not reliable with everysec",
}


class DurabilityFinding(msgspec.Struct, frozen=True):
    """A finding of the doctor about durability."""

    level: Literal["ok", "note", "warning", "problem"]
    text: str
    remedy: str = ""
    code: str = ""


def online_replicas(facts: Mapping[str, str]) -> int:
    """Return the number of online replicas by INFO."""
    return sum("state=online" in state for name, state in facts.items() if re.fullmatch(r"slave\d+", name))


def replication_findings(facts: Mapping[str, str], minimum: str | None, lag: str | None) -> Iterator[DurabilityFinding]:
    """
    Yield findings about replicas.

    *minimum*, *lag*: min-replicas-to-write and -max-lag, None: unknown.
    """
    count = online_replicas(facts)
    if facts.get("role") == "slave":
        return
    if count:
        yield DurabilityFinding("ok", f"{_replicas(count)} online: wait_replicas up to {count} can be confirmed")
    if count and minimum == "0":
        text = "min-replicas-to-write is 0: a primary that is cut off keeps accepting jobs that a failover loses"
        yield DurabilityFinding("note", text, "CONFIG SET min-replicas-to-write 1, and min-replicas-max-lag 10")
    if count and minimum not in {None, "0"} and lag is not None and (lag == "0" or int(lag) > LONGEST_LAG):
        counts = "every replica counts for it" if lag == "0" else f"a replica that is {lag} s behind counts for it"
        yield DurabilityFinding(
            "note", f"min-replicas-max-lag is {lag}: {counts}", f"CONFIG SET min-replicas-max-lag {LONGEST_LAG}"
        )
    if minimum not in {None, "0"}:
        good = int(facts.get("min_slaves_good_slaves", count))
        text = f"min-replicas-to-write is {minimum}, with a lag of at most {lag} s; {good} qualify now"
        if good < int(str(minimum)):
            yield DurabilityFinding(
                "problem", f"{text}: every push is refused", "Bring the replicas back, or lower it."
            )
        else:
            yield DurabilityFinding(
                "ok", f"{text}. It limits what a failover loses; only a push with wait_replicas is safe from it"
            )


def fsync_finding(execute: ExecuteCommand, where: str) -> tuple[bool, DurabilityFinding]:
    """Return whether fsync=True can be confirmed, with a finding that says how."""
    replies: list[object] = []
    for command in Durability(fsync=True).probe_commands():
        try:
            replies.append(execute(*command))
        except ConveyorError as error:
            replies.append(error.__cause__ or error)  # the server's own reply, which `decide_fsync_method` can read
    try:
        return True, DurabilityFinding(
            "ok", _FSYNC_METHODS[decide_fsync_method(Durability(fsync=True), replies, where)]
        )
    except (ConveyorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        refusal = re.search(r"cannot be confirmed by Redis at .*?: (.*?)\. Nothing was stored\. Set it: (.*?),", reason)
        if refusal is None:
            return False, DurabilityFinding("note", f"fsync=True cannot be confirmed: {reason}")
        return False, DurabilityFinding("note", f"fsync=True would be refused (E36): {refusal[1]}", refusal[2])


def durability_request_finding(
    queue: str, request: Durability, *, fsync_works: bool, replicas: int
) -> DurabilityFinding:
    """Return a finding on whether a queue gets the durability it requests for every push."""
    requested = ["fsync"] * request.fsync + [_replicas(request.replicas)] * (request.replicas > 0)
    text = f"queue '{queue}' asks for {' and '.join(requested)}"
    if request.fsync and not fsync_works:
        return DurabilityFinding(
            "problem", f"{text}: every push is refused", "See above, or declare the queue without fsync.", "E36"
        )
    if request.replicas > replicas:
        remedy = f"Add replicas, or declare the queue with wait_replicas={replicas}."
        return DurabilityFinding("problem", f"{text}, and {replicas} are online: every push raises", remedy, "E29")
    return DurabilityFinding("ok", f"{text}: available")


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"


OLDEST_SUPPORTED = {"redis": (6, 2), "valkey": (7, 2)}

# First releases with a patch for CVE-2025-49844, by which a script of an authenticated user can run any code. They also
# patch the earlier ones (CVE-2022-24735, CVE-2024-31228, -31449, -46981, CVE-2025-46817, -46818). 7.0 has no such release.
_PATCHED: dict[str, dict[tuple[int, ...], tuple[int, int, int]]] = {
    "redis": {(6, 2): (6, 2, 20), (7, 0): (7, 2, 11), (7, 2): (7, 2, 11), (7, 4): (7, 4, 6), (8, 0): (8, 0, 4), (8, 2): (8, 2, 2)},
    "valkey": {(7, 2): (7, 2, 11), (8, 0): (8, 0, 6), (8, 1): (8, 1, 4)},
}  # fmt: skip


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: "7.2.11" as (7, 2, 11)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def first_patched_release(family: str, version: str) -> str | None:
    """Return the first release with the patch that this one lacks; None when it lacks none."""
    own = version_numbers(version)
    patched = _PATCHED[family].get(own[:2])
    return ".".join(map(str, patched)) if patched is not None and len(own) > 2 and own < patched else None


def remedy_without(remedy: str, unknown: Sequence[str]) -> str:
    """Return a remedy that names none of the commands that the server does not know, whose names are *unknown*."""
    if remedy.startswith("CONFIG SET ") and "CONFIG" in unknown:
        settings = remedy.removeprefix("CONFIG SET ").partition(", and the same in")[0]
        return f"In its configuration file: {settings}. Then restart it (CONFIG was renamed there)."
    if not remedy.startswith("ACL SETUSER "):
        return remedy
    granted = [word for word in remedy.split() if word.startswith("+")]
    known = [word for word in granted if word[1:].partition("|")[0].upper() not in unknown]
    renamed = " and ".join(name for name in unknown if any(word[1:].upper().startswith(name) for word in granted))
    if not known:
        return f"{renamed} was renamed in the server's configuration: give it its name back, or look there."
    if "ACL" in unknown:
        return f"In its configuration file or ACL file: user … {' '.join(known)} (ACL was renamed there)."
    return f"ACL SETUSER … {' '.join(known)}"
