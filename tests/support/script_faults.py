"""Faults for a script: a line that is another, a snapshot of a queue to begin from again, and a slot that is open."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import pytest
import redis as redis_py

from conveyor.errors import ConfigurationError
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Script
from support.seeded_queue import SeededQueue, entry
from support.server_dump import difference, exact, postponed
from testbed.server_groups import ClusterOfNodes, Node, slot_of


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
        self._content = exact(client)
        self._instants = {key: value for key, (_, value) in self._content.items() if postponed(key, value, 1)}
        self._made = time.monotonic()

    def restore(self) -> dict[str, Any]:
        """Leave exactly these keys on the server; return what they hold, as `exact` does."""
        if isinstance(self._client, redis_py.RedisCluster):
            self._client.flushall(asynchronous=False)
            self._send([("RESTORE", *saved) for saved in self._saved])
        else:
            self._client.eval(_RESTORE, 0, *itertools.chain.from_iterable(self._saved))
        age = time.monotonic() - self._made
        if age > 1:
            later = int(age * 1000)
            self._send([one for key, value in self._instants.items() for one in postponed(key, value, later)])
            return exact(self._client)
        return self._content

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
        source = cluster.owner(keys.jobs)
        target = next(node for node in cluster.masters() if node is not source)
        self.client = redis_py.Redis(port=source.port)
        """Of the node that owns the slot."""
        self._source, self._target, self._port = source.client(), target.client(), target.port
        self._ids, self._slot = (cluster.ids[source.port], cluster.ids[target.port]), slot_of(keys.jobs)
        self._asking = Asking(target)

    @contextmanager
    def opened(self, moved: Iterable[str]) -> Iterator[None]:
        """Let the slot be MIGRATING while the keys *moved* are at the target already."""
        self._target.execute_command("FLUSHALL")
        self._target.execute_command("CLUSTER", "SETSLOT", self._slot, "IMPORTING", self._ids[0])
        self._source.execute_command("CLUSTER", "SETSLOT", self._slot, "MIGRATING", self._ids[1])
        try:
            if names := list(moved):
                self._source.execute_command("MIGRATE", "127.0.0.1", self._port, "", 0, 5000, "KEYS", *names)
            yield
        finally:
            self._source.execute_command("CLUSTER", "SETSLOT", self._slot, "STABLE")
            self._target.execute_command("CLUSTER", "SETSLOT", self._slot, "STABLE")

    def content(self) -> dict[str, Any]:
        """Return what both nodes hold, while the slot is open."""
        here, there = exact(self.client), exact(self._asking)
        assert not here.keys() & there.keys()
        return {**here, **there}

    def close(self) -> None:
        """Close the connections to both nodes."""
        for client in (self.client, self._source, self._target, self._asking):
            client.close()


class LimitedUser:
    """A user of a server who may do everything but single commands; `url` logs in as that user."""

    def __init__(self, client: redis_py.Redis, url: str) -> None:
        self._client = client
        self.url = url.replace("unix://", "unix://limited:secret@")
        self.allow_all()

    def allow_all(self) -> None:
        """Allow every key, channel and command."""
        self.deny()

    def deny(self, *rules: str) -> None:
        """Allow everything but what rules such as ``-lpop`` or ``resetchannels`` withdraw."""
        self._client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", "~*", "&*", "+@all", *rules)

    def close(self) -> None:
        """Remove the user."""
        self._client.execute_command("ACL", "DELUSER", "limited")


def sent_by_scripts(client: redis_py.Redis, run: Callable[[], object]) -> list[str]:
    """Return the commands that scripts send while *run* is carried out, each with its arguments."""
    found = list[str]()
    with client.monitor() as monitor:
        run()
        client.echo("the end")
        for told in monitor.listen():
            if told["client_type"] == "lua":
                found.append(told["command"])
            elif told["command"].startswith("ECHO"):
                return found
    raise AssertionError("MONITOR ended")


def reached(client: redis_py.Redis, names: Iterable[str], run: Callable[[], object]) -> set[str]:
    """
    Return those of the keys *names* that a script of *run* names in a command.

    What a key holds that it never names cannot change what it does. In a cluster, where MONITOR is of one node: all names.
    """
    if isinstance(client, redis_py.RedisCluster):
        return set(names)
    sent = sent_by_scripts(client, run)
    return {name for name in names if any(name in command for command in sent)}


def refuse_each_command(
    seeded: SeededQueue, url: str, call: Call[Any], *rules: str, renewed: frozenset[str] = frozenset()
) -> None:
    """
    Carry out a step as users who may not use one of its commands, or lack one of *rules*: it is refused whole, or done.

    Refused, and sent again by a user who may, it has the effect it always has. *renewed* are keys that may change all the same.
    """
    snapshot = Snapshot(seeded.redis)
    sent = sent_by_scripts(seeded.redis, lambda: seeded.run(call))
    done = seeded.jobs_and_places()
    user = LimitedUser(seeded.redis, url)
    limited = SeededQueue(seeded.redis, user.url)
    commands = {command.split()[0].lower() for command in sent}
    for rule in (*(f"-{command}" for command in sorted(commands)), *rules):
        before = snapshot.restore()
        user.deny(rule)
        refused = True
        with suppress(ConfigurationError):
            limited.run(call)
            refused = False
        if refused:
            assert difference(before, exact(seeded.redis)).keys() <= renewed, f"with {rule} it stopped half-way"
            user.allow_all()
            limited.run(call)
        assert difference(done, seeded.jobs_and_places()) == {}, f"with {rule} it did something else"
        assert seeded.audit() == [], f"with {rule}"
    assert commands
    limited.client.close()
    user.close()
