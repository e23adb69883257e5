"""What is left in Redis, read with plain redis-py and the key names of docs/reference/redis-keys.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

CONSTANT = ("*:queues", "*:conf", "*:wake", "*:recent", "*:outbox:*")
"""What a drained queue may keep for good."""


@dataclass
class Dump:
    """The state of one namespace. Ids are public ones."""

    live: dict[str, str] = field(default_factory=dict)
    """Jobs that have not ended, and where they are: ready, due, leased, or nowhere."""
    dead: dict[str, str] = field(default_factory=dict)
    """Dead letters → the last line of their state."""
    results: dict[str, bytes] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    """Keys that will never go, beyond those documented and those of dead letters."""


def take(client: Any, namespace: str = "chaos") -> Dump:
    """Read everything of *namespace*; *client* is a redis-py client with bytes as replies."""
    dump = Dump()
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


def _queue(client: Any, namespace: str, queue: str, keys: list[bytes], dump: Dump) -> set[str]:
    prefix = f"{namespace}:{{{queue}}}:"
    dead = {id_.decode() for id_ in client.zrange(prefix + "dead", 0, -1)}
    states = client.hgetall(prefix + "state")
    places: dict[str, str] = {}
    for priority in range(10):
        places.update(dict.fromkeys(_ids(client.lrange(f"{prefix}ready:{priority}", 0, -1)), "ready"))
    places.update(dict.fromkeys(_ids(client.zrange(prefix + "due", 0, -1)), "due"))
    for key in keys:
        if key.startswith(f"{prefix}leased:".encode()):
            places.update(dict.fromkeys(_ids(client.hkeys(key)), "leased"))
    jobs = dict(client.hscan_iter(prefix + "jobs", count=1000))
    for raw, envelope in jobs.items():
        id_ = raw.decode()
        public = f"{queue}:{id_}"
        if id_ in dead:
            dump.dead[public] = (states.get(raw) or b"").decode("utf-8", "replace")
        elif envelope[:1] != b"x":
            dump.live[public] = places.get(id_, "nowhere")
    found = [key for key in keys if key.startswith(f"{prefix}result:".encode())]
    for first in range(0, len(found), 1000):
        part = found[first : first + 1000]
        for key, value in zip(part, client.mget(part), strict=True):
            if value is not None:
                dump.results[f"{queue}:{key.decode().removeprefix(prefix + 'result:')}"] = value
    # A dead letter keeps its envelope and its state, and nothing else may be in these two.
    kept = {"jobs"} if {key.decode() for key in jobs} <= dead else set()
    if {key.decode() for key in states} <= dead:
        kept.add("state")
    return {prefix + name for name in (*kept, "dead", "recent")}


def _ids(fields: list[bytes]) -> list[str]:
    return [one.decode() for one in fields if one[:1] != b"\t"]
