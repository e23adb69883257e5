"""The content of Redis after a run, read with plain redis-py and the key names of docs/reference/redis-keys.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

CONSTANT = ("*:queues", "*:conf", "*:wake", "*:recent", "*:inbox:*", "*:{/topics}:registry", "*:{/topics}:counts")
"""Keys that a drained queue may keep for good."""


@dataclass
class RemainingState:
    """The state of one namespace. Ids are public ones."""

    live: dict[str, str] = field(default_factory=dict)
    """Jobs that have not ended, and where they are: ready, due, leased, or nowhere."""
    dead: dict[str, str] = field(default_factory=dict)
    """Dead letters → the last line of their state."""
    results: dict[str, bytes] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    """Keys that will never go, beyond those documented and those of dead letters."""
    findings: list[str] = field(default_factory=list)
    """Contradictions: a job in no place or in two, an entry, a state or a lease of nobody, a wrong count."""


def take(client: Any, namespace: str = "chaos") -> RemainingState:
    """Read everything of *namespace*; *client* is a redis-py client with bytes as replies."""
    dump = RemainingState()
    keys: list[bytes] = list(client.scan_iter(f"{namespace}:*", count=5000))
    queues = {key.split(b"{", 1)[1].split(b"}", 1)[0] for key in keys if b"{" in key}
    expected: set[str] = set()
    for queue in sorted(queues):
        expected |= _queue(client, namespace, queue.decode(), keys, dump)
    for key in keys:
        name = key.decode()
        if name not in expected and client.pttl(key) == -1 and not any(fnmatchcase(name, one) for one in CONSTANT):
            dump.leaked.append(name)
    dump.leaked.sort()
    return dump


def _queue(client: Any, namespace: str, queue: str, keys: list[bytes], dump: RemainingState) -> set[str]:
    prefix = f"{namespace}:{{{queue}}}:"
    dead = {id_.decode() for id_ in client.zrange(prefix + "dead", 0, -1)}
    states = client.hgetall(prefix + "state")
    places = _places(client, prefix, keys, dump)
    jobs = dict(client.hscan_iter(prefix + "jobs", count=1000))
    for raw, envelope in jobs.items():
        id_ = raw.decode()
        public = f"{queue}:{id_}"
        if id_ in dead:
            dump.dead[public] = (states.get(raw) or b"").decode("utf-8", "replace")
        elif envelope[:1] != b"x":
            dump.live[public] = " and ".join(places.get(id_, ["nowhere"]))
    _audit_slots(client, prefix, keys, places, dump)
    _audit(queue, jobs, {**places, **{id_: [*places.get(id_, ()), "dead"] for id_ in dead}}, dump)
    dump.findings += [f"{queue}: a state of nobody, {id_!r}" for id_ in states.keys() - jobs.keys()]
    tags = _audit_tags(client, prefix, queue, jobs, keys, dump)
    stubs = sum(envelope[:1] == b"x" for envelope in jobs.values())
    counted = int(client.hget(prefix + "conf", "stubs") or 0)
    if counted != stubs:
        dump.findings.append(f"{queue}: {stubs} cancelled jobs in line, and {counted} are counted")
    found = [key for key in keys if key.startswith(f"{prefix}result:".encode())]
    for first in range(0, len(found), 1000):
        part = found[first : first + 1000]
        for key, value in zip(part, client.mget(part), strict=True):
            if value is not None:
                dump.results[f"{queue}:{key.decode().removeprefix(prefix + 'result:')}"] = value
    for window in (key for key in keys if key.startswith(f"{prefix}results:".encode())):
        for raw, kept in client.hscan_iter(window, count=1000):
            dump.results[f"{queue}:{raw.decode()}"] = kept.partition(b"\n")[2]
    # A dead letter keeps its envelope and its state, and nothing else may be in these two.
    kept = {"jobs"} if {key.decode() for key in jobs} <= dead else set()
    if {key.decode() for key in states} <= dead:
        kept.add("state")
    return tags | {prefix + name for name in (*kept, "dead", "recent")}


def _places(client: Any, prefix: str, keys: list[bytes], dump: RemainingState) -> dict[str, list[str]]:
    """Return id → where it is, but for dead letters; more than one place is one too many."""
    found: dict[str, list[str]] = {}
    workers = set(client.zrange(prefix + "workers", 0, -1))
    sources = [(f"ready:{n}", client.lrange(f"{prefix}ready:{n}", 0, -1)) for n in range(10)]
    sources.append(("due", client.zrange(prefix + "due", 0, -1)))
    sources.append(("behind another", client.hvals(prefix + "reruns")))
    groups = [key for key in keys if key.startswith(f"{prefix}group:".encode())]
    sources += [("waiting", client.lrange(key, 0, -1)) for key in groups]
    for key in keys:
        if key.startswith(f"{prefix}leased:".encode()):
            held = client.hkeys(key)
            sources.append(("leased", held))
            if _ids(held) and key.rpartition(b":")[2] not in workers:
                dump.findings.append(f"{key.decode()} holds jobs and is not registered")
    for place, fields in sources:
        for id_ in _ids(fields):
            found.setdefault(id_, []).append(place.partition(":")[0])
    return found


def _audit_slots(
    client: Any, prefix: str, keys: list[bytes], places: dict[str, list[str]], dump: RemainingState
) -> None:
    """Compare the slots of limits with the jobs that hold them, and the groups with their tickets."""
    held: Counter[bytes] = Counter()
    for id_, names in client.hgetall(prefix + "slots").items():
        held.update(names.split(b"\t"))
        if id_.decode() not in places:
            dump.findings.append(f"{prefix}slots: {id_!r} is no job and holds {names!r}")
    counted = {name: int(n) for name, n in client.hgetall(prefix + "limits").items() if name[:1] != b"\t"}
    if counted != held:
        dump.findings.append(f"{prefix}limits counts {counted}, and jobs hold {dict(held)}")
    groups = Counter(
        key.removeprefix(f"{prefix}group:".encode()).replace(b":", b"", 1)
        for key in keys
        if key.startswith(f"{prefix}group:".encode())
    )
    tickets = Counter(client.smembers(prefix + "tickets")) + Counter(client.hkeys(prefix + "waits"))
    if groups != tickets:
        dump.findings.append(
            f"{prefix}: groups {dict(groups - tickets)} have no ticket, tickets {dict(tickets - groups)} no group"
        )


def _audit(queue: str, jobs: dict[bytes, bytes], places: dict[str, list[str]], dump: RemainingState) -> None:
    known = {id_.decode() for id_ in jobs}
    for id_ in sorted(known | places.keys()):
        where = places.get(id_, [])
        if len(where) != (id_ in known):
            place = f"{' and '.join(where) or 'nowhere'}{'' if id_ in known else ', and no job'}"
            dump.findings.append(f"{queue}:{id_} is {place}")


def _audit_tags(
    client: Any, prefix: str, queue: str, jobs: dict[bytes, bytes], keys: list[bytes], dump: RemainingState
) -> set[str]:
    """Note what is found by a tag that it does not have, and what is not found by one that it has; return the keys of tags."""
    had = {
        (part[1:].decode(), id_.decode())
        for id_, envelope in jobs.items()
        if envelope[:1] != b"x"
        for part in envelope.partition(b"\n")[0].split(b"\t")[1:]
        if part[:1] == b"t"
    }
    start = f"{prefix}tag:".encode()
    found = {
        (key.removeprefix(start).decode(), id_.decode())
        for key in keys
        if key.startswith(start)
        for id_ in client.zrange(key, 0, -1)
    }
    dump.findings += [f"{queue}:{id_} is gone, and found by tag {tag!r}" for tag, id_ in sorted(found - had)]
    dump.findings += [f"{queue}:{id_} is not found by its tag {tag!r}" for tag, id_ in sorted(had - found)]
    return {f"{prefix}tag:{tag}" for tag, _ in had}


def _ids(fields: list[bytes]) -> list[str]:
    return [one.decode() for one in fields if one[:1] != b"\t"]
