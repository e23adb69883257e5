"""One queue on a real server: seed it, call its scripts, compare everything it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import redis as redis_py

from conveyor.payload.records import write_envelope
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Entry, ProducerSequence, Settlement, TurnReply, TurnReport
from conveyor.store.script import Call
from support.server_dump import difference, exact, readable

T = TypeVar("T")
REST = write_envelope("", b"1")
PLAIN = REST.decode()
"""The envelope of a plain job as a dump shows it."""
LEASE = 60_000
_NAMES = """
local found = {}
for _, key in ipairs(redis.call("KEYS", ARGV[1])) do
  found[#found + 1] = key
  found[#found + 1] = redis.call("PTTL", key)
end
return found
"""
"""The keys of a pattern, each with its TTL in ms: one round trip."""
WORKER = {".about": "{}", ".lease": str(LEASE)}
"""Fields of a lease hash besides `.turn` and the jobs."""


def entry(id: str, **options: Any) -> Entry:  # noqa: A002
    """Return a message with a body of 1."""
    return Entry(id, REST, **options)


@contextmanager
def full(client: redis_py.Redis) -> Iterator[None]:
    """Let the server be at its maxmemory, with nothing to evict."""
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(redis_py.ResponseError, match="maxmemory"):
            client.set("probe", "x")
        yield
    finally:
        client.config_set("maxmemory", "0")


class SeededQueue:
    """The queue `q` of one server. Workers have a lease of a minute, so nothing ends by itself."""

    def __init__(self, client: redis_py.Redis, url: str, keys: QueueKeys | None = None) -> None:
        self.redis = client
        self.client = Client(url, namespace="c", retry_for=0)
        self.keys = keys or self.client.keys("q")
        self.lane = ProducerSequence("L")

    def run(self, call: Call[T]) -> T:
        """Carry out a step, once."""
        return self.client.run(call)

    # -- seeds ----------------------------------------------------------------------------------------------------

    def push(self, *entries: Entry | str, **options: Any) -> list[str]:
        """Push messages, or plain ones named by their ids, in one call."""
        made = [one if isinstance(one, Entry) else entry(one) for one in entries]
        return self.run(operations.push(self.keys, self.lane, made, **options))

    def register(self, *workers: str, lease_ms: int = LEASE) -> None:
        """Register workers."""
        for worker in workers:
            self.run(operations.register(self.keys, worker, lease_ms, b"{}"))

    def turn(
        self, worker: str = "w", number: int = 1, want: int = 0, *,
        done: Iterable[str] = (), others: Iterable[Settlement] = (), flags: str = "", report: TurnReport | None = None,
    ) -> TurnReply:  # fmt: skip
        """Make a turn."""
        return self.run(self.turn_call(worker, number, want, done=done, others=others, flags=flags, report=report))

    def turn_call(
        self, worker: str = "w", number: int = 1, want: int = 0, *,
        done: Iterable[str] = (), others: Iterable[Settlement] = (), flags: str = "", report: TurnReport | None = None,
    ) -> Call[TurnReply]:  # fmt: skip
        """Return the call of a turn, to be sent more than once."""
        sent = TurnReport(list(done), list(others)) if report is None else report
        return operations.turn(self.keys, worker, number, want, LEASE, sent, flags=flags)

    def lease(self, *ids: str, worker: str = "w") -> None:
        """Let a new worker hold fresh plain jobs, leased in its turn 1; the wake token is taken."""
        self.push(*ids)
        self.register(worker)
        assert self.turn(worker, 1, len(ids)).ids == list(ids)
        self.take_token()

    def add_dead(self, *ids: str, state: bytes = b"1 1 0\n{}") -> None:
        """Make dead letters, in this order; nothing else remains but the declared constant keys."""
        self.lease(*ids, worker="undertaker")
        self.turn("undertaker", 2, others=[Settlement("X", id_, state=state) for id_ in ids])
        self.run(operations.reap(self.keys, "undertaker", crashed=False))
        base = self.now() - 100_000
        for place, id_ in enumerate(ids):
            self.redis.zadd(self.keys.dead, {id_: base + place})

    def take_token(self) -> bool:
        """Pop the wake token, as an idle worker does; return whether there was one."""
        return self.redis.lpop(self.keys.wake) is not None

    def pause(self, paused: bool = True) -> None:
        """Pause or resume, and take the token."""
        self.run(operations.configure(self.keys, "paused", "1" if paused else ""))
        self.take_token()

    # -- looks ----------------------------------------------------------------------------------------------------

    def now(self) -> int:
        """Return the server's clock in ms."""
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def dump(self) -> dict[str, Any]:
        """Return the readable content of the whole server."""
        return readable(self.redis, self.keys.prefix)

    def jobs_and_places(self) -> dict[str, Any]:
        """Return the readable content without what merely counts and wakes: counters, recent jobs, tokens, looks, events, and times to live."""
        whole = {name.partition(" ~")[0]: value for name, value in self.dump().items()}
        return {
            key: value
            for key, value in whole.items()
            if key.partition(":")[0] not in {"stats", "recent", "wake", "upkeep", "counts", "events"}
        }

    def since(self, before: dict[str, Any]) -> dict[str, Any]:
        """Return every key that differs from an earlier `dump`, with its new content; None: gone."""
        return difference(before, self.dump())

    def audit(self) -> list[tuple[str, str]]:
        """Return what is inconsistent."""
        found = self.redis.eval(_NAMES, 0, f"{self.keys.prefix}*")
        ttls = {
            key.decode().removeprefix(self.keys.prefix): ttl for key, ttl in zip(found[::2], found[1::2], strict=True)
        }
        names = list(ttls)
        tags = [name.removeprefix("tag:") for name in names if name.startswith("tag:")]
        unique = [name.removeprefix("unique:k:") for name in names if name.startswith("unique:k:") and ttls[name] == -1]
        beside = [name for name in names if name.startswith(("stream:", "logs:"))]
        return self.run(inspection.audit(self.keys, tags=tags, unique=unique, beside=beside))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Fail when anything on the server differs afterwards."""
        before = exact(self.redis)
        yield
        assert difference(before, exact(self.redis)) == {}
