"""Faults for a script: a line that is another, a snapshot of a queue to begin from again, and a slot that is open."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import redis as redis_py

from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Script
from support.seeded_queue import SeededQueue, entry
from support.server_dump import exact, postponed
from support.server_groups import ClusterOfNodes, Node, slot_of


def break_script(monkeypatch: pytest.MonkeyPatch, module: ModuleType, operation: str, line: str, instead: str) -> None:
    """Have the script that *module* calls *operation* run with *instead* in place of each *line*."""
    honest = getattr(module, operation)
    assert line in honest.text, "the script has changed: aim the sabotage anew"
    broken = Script(honest.name)
    broken.text = honest.text.replace(line, instead)
    monkeypatch.setattr(module, operation, broken)


def plant(seeded: SeededQueue, call: Call[Any]) -> None:
    """Make every key exist that *call* names, but the one that never does."""
    seeded.push(*(entry(f"p{priority}", priority=priority) for priority in range(10)))
    for key in call.keys:
        if key == seeded.keys.none or seeded.redis.exists(key):
            continue
        name = key.removeprefix(seeded.keys.prefix)
        kind, _, of = name.partition(":")
        if kind == "lane":
            seeded.redis.set(key, "0\nok")
        elif kind == "leased":
            seeded.register(of)
        elif kind == "result":
            seeded.redis.set(key, "{}")
        elif kind == "results":
            seeded.redis.hset(key, "planted", "1\n{}")
        elif kind == "stream":
            seeded.redis.xadd(key, {"v": "1"}, id="1-1")
        elif kind == "upkeep":
            seeded.redis.set(key, "0", ex=600)
        elif kind == "room":
            seeded.redis.hset(seeded.keys.conf, mapping={"line": "1", "bound": "1 block"})
            seeded.redis.zadd(key, {"channel 1 1": 1})
        else:
            assert kind == "wake", f"cannot plant {key}"
            seeded.redis.rpush(key, "1")


_RESTORE = """
redis.call("FLUSHALL")
for at = 1, #ARGV, 3 do
  redis.call("RESTORE", ARGV[at], ARGV[at + 1], ARGV[at + 2])
end
"""


class Snapshot:
    """All keys of a server, to be put back: as old as they were, so that a slow test compares what is alike."""

    def __init__(self, client: redis_py.Redis) -> None:
        self._client = client
        self._saved = [(key, max(client.pttl(key), 0), client.dump(key)) for key in client.keys("*")]
        self._instants = {key: value for key, (_, value) in exact(client).items() if postponed(key, value, 1)}
        self._made = time.monotonic()

    def restore(self) -> None:
        """Leave exactly these keys on the server."""
        if isinstance(self._client, redis_py.RedisCluster):
            self._client.flushall(asynchronous=False)
            self._send([("RESTORE", *saved) for saved in self._saved])
        else:
            self._client.eval(_RESTORE, 0, *itertools.chain.from_iterable(self._saved))
        age = time.monotonic() - self._made
        if age > 1:
            later = int(age * 1000)
            self._send([one for key, value in self._instants.items() for one in postponed(key, value, later)])

    def _send(self, commands: list[tuple[Any, ...]]) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            pipeline.execute()


class Asking:
    """A client of the node that a slot is moving to: each command goes behind ASKING."""

    def __init__(self, node: Node) -> None:
        self._client = redis_py.Redis(port=node.port, single_connection_client=True)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def command(*arguments: Any, **options: Any) -> Any:
            self._client.execute_command("ASKING")
            return getattr(self._client, name)(*arguments, **options)

        return command

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class OpenSlot:
    """The slot of one queue, to be opened between the node that owns it and another one, and closed again."""

    def __init__(self, cluster: ClusterOfNodes, keys: QueueKeys) -> None:
        self.source = cluster.owner(keys.jobs)
        self.target = next(node for node in cluster.masters() if node is not self.source)
        self._ids, self._slot = cluster.ids, slot_of(keys.jobs)
        self._asking = Asking(self.target)

    @contextmanager
    def opened(self, moved: Iterable[str]) -> Iterator[None]:
        """Let the slot be MIGRATING while the keys *moved* are at the target already."""
        self.target.ask("FLUSHALL")
        self.target.ask("CLUSTER", "SETSLOT", self._slot, "IMPORTING", self._ids[self.source.port])
        self.source.ask("CLUSTER", "SETSLOT", self._slot, "MIGRATING", self._ids[self.target.port])
        try:
            if names := list(moved):
                self.source.ask("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *names)
            yield
        finally:
            self.source.ask("CLUSTER", "SETSLOT", self._slot, "STABLE")
            self.target.ask("CLUSTER", "SETSLOT", self._slot, "STABLE")

    def content(self, source: redis_py.Redis) -> dict[str, Any]:
        """Return what both nodes hold, while the slot is open."""
        here, there = exact(source), exact(self._asking)
        assert not here.keys() & there.keys()
        return {**here, **there}

    def close(self) -> None:
        """Close the connection to the target."""
        self._asking.close()


class LimitedUser:
    """A user of a server who may do everything but single commands; `url` logs in as that user."""

    def __init__(self, client: redis_py.Redis, url: str) -> None:
        self._client = client
        self.url = url.replace("unix://", "unix://limited:secret@")
        self.allow_all()

    def allow_all(self) -> None:
        """Allow every key, channel and command."""
        self._client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", "~*", "&*", "+@all")

    def deny(self, *rules: str) -> None:
        """Withdraw rights, by rules such as ``-lpop`` or ``resetchannels``."""
        self.allow_all()
        self._client.execute_command("ACL", "SETUSER", "limited", *rules)

    def close(self) -> None:
        """Remove the user."""
        self._client.execute_command("ACL", "DELUSER", "limited")


def commands_sent(client: redis_py.Redis, run: Callable[[], object]) -> set[str]:
    """Return the commands that scripts send while *run* is carried out."""
    found = set[str]()
    with client.monitor() as monitor:
        run()
        client.echo("the end")
        for told in monitor.listen():
            if told["client_type"] == "lua":
                found.add(told["command"].split()[0].upper())
            elif told["command"].startswith("ECHO"):
                return found
    raise AssertionError("MONITOR ended")
