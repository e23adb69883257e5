"""
Queues found by the names of all keys: for a set of known queues that was lost, and for reads that may miss nothing.

It costs a walk through all keys of each server, those of other programs too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from conveyor.errors import StoreUnavailable
from conveyor.store.transport import replies
from conveyor.store.transport.cluster import Cluster
from conveyor.store.transport.url import StandaloneServer

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Topology

PAGE_SIZE = 1000
_TYPES = {"jobs": "hash", "outbox": "list"}
_SPECIAL = re.compile(r"[\\\[\]*?^-]")  # in a pattern of keys
KeyKind = Literal["jobs", "outbox"]


class ServerClient(Protocol):
    """The part of a client that looks at keys."""

    namespace: str
    retry_for: float

    @property
    def address(self) -> Topology: ...
    def to_node(self, url: str) -> ServerClient: ...
    def execute(self, *command: str | bytes, key: str | None = None, retry_for: float | None = None) -> object: ...
    def close(self) -> None: ...


@contextmanager
def node_clients(client: ServerClient) -> Iterator[list[ServerClient]]:
    """Lend a client for each server that holds keys of *client*: itself, or one for each node of a cluster."""
    if not isinstance(client.address, Cluster):
        yield [client]
        return
    try:
        nodes: list[StandaloneServer] = client.address.nodes()
    except OSError as error:
        raise replies.unavailable(str(client.address), error) from error
    with ExitStack() as stack:
        clients = [client.to_node(node.url) for node in nodes]
        for one in clients:
            stack.callback(one.close)
        yield clients


def queues_at(node: ServerClient, kind: KeyKind, *, most: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield each queue that has jobs, or an outbox, at this server, and the key of them; look at *most* keys or so."""
    name = re.compile(rf"{re.escape(node.namespace)}:\{{([^}}]+)\}}:(?:(.+):)?{kind}")
    cursor, seen = b"0", 0
    while most is None or seen < most:
        cursor, page = _scan(node, cursor, f"{node.namespace}:{{*}}:*{kind}", _TYPES[kind])
        seen += PAGE_SIZE
        for key in page:
            if (found := name.fullmatch(key.decode())) is not None:
                yield found[2] or found[1], found[0]
        if cursor == b"0":
            return


def find_queues(client: ServerClient, *, most: int | None = None) -> list[str]:
    """
    Return the names of all queues that have jobs, sorted; look at *most* keys of a server or so.

    Servers that do not answer are left out, unless none does.
    """
    names: set[str] = set()
    failed: list[StoreUnavailable] = []
    with node_clients(client) as nodes:
        for node in nodes:
            try:
                names.update(queue for queue, _ in queues_at(node, "jobs", most=most))
            except StoreUnavailable as error:
                failed.append(error)
        if failed and len(failed) == len(nodes):
            raise failed[0]
    return sorted(names)


def keys_containing(client: ServerClient, text: str) -> Iterator[str]:
    """Yield the keys of the namespace of *client*, on all servers, whose names contain *text*; some may come twice."""
    pattern = f"{client.namespace}:*{_SPECIAL.sub(lambda match: chr(92) + match[0], text)}*"
    with node_clients(client) as nodes:
        for node in nodes:
            cursor = b"0"
            while True:
                reply: Any = node.execute(
                    "SCAN", cursor, "MATCH", pattern, "COUNT", str(PAGE_SIZE), retry_for=node.retry_for
                )
                cursor = reply[0]
                yield from (key.decode("utf-8", "surrogateescape") for key in reply[1])
                if cursor == b"0":
                    break


def _scan(node: ServerClient, cursor: bytes, pattern: str, type_: str) -> tuple[bytes, list[bytes]]:
    reply: Any = node.execute(
        "SCAN", cursor, "MATCH", pattern, "COUNT", str(PAGE_SIZE), "TYPE", type_, retry_for=node.retry_for
    )
    return reply[0], reply[1]
