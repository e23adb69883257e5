"""Read the content of a queue in the form of `Model.snapshot`, in one round trip."""

from __future__ import annotations

from typing import Any

from conveyor.store.keys import QueueKeys
from support.server_dump import contents


def read(client: Any, keys: QueueKeys) -> dict[str, Any]:
    """Return the content of the queue; raises AssertionError where its keys contradict each other."""
    found = {name.removeprefix(keys.prefix): held for name, held in contents(client).items()}

    def at(name: str, empty: Any) -> Any:
        return found[name][1] if name in found else empty

    def below(kind: str) -> dict[str, Any]:
        return {name.removeprefix(kind): value for name, (_, value) in found.items() if name.startswith(kind)}

    leased = {worker: _lease(held) for worker, held in below("leased:").items()}
    leased = {worker: lease for worker, lease in leased.items() if lease is not None}
    assert sorted(leased) == sorted(_members(at("workers", []))), "registrations and ends of leases differ"
    jobs, conf, tokens = at("jobs", {}), at("conf", {}), len(at("wake", []))
    assert tokens in (0, 1), "more than one wake token"
    states = {id_.decode(): history(text) for id_, text in at("state", {}).items()}
    return {
        "jobs": {id_.decode(): envelope.startswith(b"x") for id_, envelope in jobs.items()},
        "ready": {priority: ids for priority in range(10) if (ids := _jobs(at(f"ready:{priority}", [])))},
        "slots": {id_.decode(): text.decode().strip("\t").split("\t") for id_, text in at("slots", {}).items()},
        "due": _jobs([id_ for id_, _ in at("due", [])]),
        "dead": _members(at("dead", [])),
        "leased": leased,
        "state": {id_: counts for id_, counts in states.items() if counts is not None},
        "unique": {key: id_.decode() for key, id_ in below("unique:k:").items()},
        "reruns": {first.decode(): last.decode() for first, last in at("reruns", {}).items()},
        "bodies": {
            id_.decode(): envelope.split(b"\n", 2)[2].decode()
            for id_, envelope in jobs.items()
            if not envelope.startswith(b"x")
        },
        "own": {id_: found[f"unique:i:{id_}"][0] >= 0 for id_ in below("unique:i:")},
        "results": {*below("result:"), *(id_.decode() for held in below("results:").values() for id_ in held)},
        "tags": {tag: _members(held) for tag, held in below("tag:").items()},
        "groups": {group: [id_.decode() for id_ in held] for group, held in below("group:").items()},
        "waiters": {id_.decode(): text.decode().split() for id_, text in at("waiters", {}).items()},
        "stubs": int(conf.get(b"stubs", 0)),
        "paused": conf.get(b"paused") == b"1",
        "token": tokens == 1,
    }


def history(text: bytes) -> tuple[int, int, int, bytes] | None:
    """Read the counts of a stored state, without errors; None for a job that was only promoted or updated: it has none."""
    if text.startswith(b"0 0 0 \th"):
        return None
    starts, failures, crashes = text.partition(b" \t")[0].split()  # attributes stand behind them
    certain = crashes.rstrip(b"+*")
    return int(starts), int(failures), int(certain), crashes[len(certain) :]


def _lease(found: dict[bytes, bytes]) -> tuple[int, dict[str, int], list[str]] | None:
    if b"\tleft" in found:
        return None
    # The digits behind the point are the instant of the lease.
    places = {id_.decode(): int(place) for id_, place in found.items() if not id_.startswith(b"\t")}
    return int(found[b"\tturn"]), places, _asked(found.get(b"\tcancel", b"").decode())


def _jobs(entries: list[bytes]) -> list[str]:
    """Return the ids among entries, without tickets of groups and alarms of limits."""
    return [entry.decode() for entry in entries if not entry.startswith(b"\t")]


def _members(found: list[tuple[bytes, float]]) -> list[str]:
    """Return the members of a sorted set, in its order."""
    return [member.decode() for member, _ in found]


def kept_result(redis: Any, keys: QueueKeys, id: str) -> bytes:  # noqa: A002
    """Return the record of a job's outcome as it is stored: under a key of its own, or in the window of its id."""
    record: bytes | None = redis.get(keys.result(id))
    if record is not None:
        return record
    field: bytes = redis.hget(keys.result_window(id), id)
    return field.partition(b"\n")[2]


def _asked(text: str) -> list[str]:
    """Return the ids of the cancellations that were asked, without the lines that say by whom."""
    return [line for line in text.split("\n") if line and line[0] != "\t"]
