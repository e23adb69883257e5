"""A cluster: the keys of a queue are in one slot, and a map says which node owns it now."""

from __future__ import annotations

import logging
import math
import re
import threading
from binascii import crc_hqx
from collections.abc import Hashable
from time import monotonic
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.store.fork_safety import on_fork
from conveyor.store.transport import replies
from conveyor.store.transport.connection import fatal_reply, query
from conveyor.store.transport.credentials import LoginProvider
from conveyor.store.transport.endpoint import (
    FAILOVER_CONNECT_TIMEOUT,
    FAILOVER_HANDSHAKE_TIMEOUT,
    FAILOVER_REPLY_TIMEOUT,
    QUERY_TIMEOUT,
    Endpoint,
    EndpointUnresolved,
    half_left,
    in_thread,
    time_left,
)
from conveyor.store.transport.url import HostPort, StandaloneServer, masked, split_hosts

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

log = logging.getLogger("conveyor.store")
SLOTS = 16384
MAP_FRESH = 1.0
"""Seconds a map is trusted when a connection is reopened: its loss may mean that the node has lost its slots."""
_MAP_INTERVAL = 0.1
"""Minimum seconds between two requests for the map, however many connections are lost at once."""
_REDIRECT = re.compile(r"\b(?:MOVED|ASK) (\d+) (\S*):(\d+)")
ANYWHERE = -1


def slot_of(key: str) -> int:
    """Return the slot of a key: that of its hash tag, when it has one."""
    start = key.find("{")
    if start >= 0:
        end = key.find("}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key.encode(), 0) % SLOTS


class Cluster:
    """
    ``redis+cluster://user:password@h1:7000,h2:7000``: an endpoint for each slot, and the map of slots to nodes.

    Making one checks the URL and connects to nothing. Raises ConfigurationError.
    """

    single = False

    def __init__(
        self, url: str, connect_timeout: float = FAILOVER_CONNECT_TIMEOUT, *, login: LoginProvider | None = None
    ) -> None:
        self.url, self._login = url, login
        self._timeout = min(connect_timeout, FAILOVER_CONNECT_TIMEOUT)
        self._hosts = split_hosts(url, 6379)
        database = dict(self._hosts.options).get("db", self._hosts.path) or "0"
        if database != "0":
            raise ConfigurationError(
                f"{masked(url)!r} asks for database {database}, but a cluster has only database 0. Leave it out, and use "
                "namespace= to keep programs apart.",
                code="E33",
            )
        self._endpoints: dict[int, SlotEndpoint] = {}
        self._nodes: dict[HostPort, StandaloneServer] = {}
        self._known: list[HostPort] = list(self._hosts.hosts)
        self._owners: list[HostPort | None] = [None] * SLOTS
        self._node(self._known[0]).check_options()
        self.forked()
        on_fork(self)

    def __str__(self) -> str:
        return masked(self.url)

    def forked(self) -> None:
        """Start with a new lock and without a map in a forked child."""
        self._lock = threading.Lock()
        self._mapped_at = self._asked_at = float("-inf")
        self._failure: Exception | None = None

    def endpoint(self, key: str) -> Endpoint:
        """Return the endpoint for *key*; "" is any node."""
        slot = slot_of(key) if key else ANYWHERE
        endpoint = self._endpoints.get(slot)
        if endpoint is None:
            endpoint = self._endpoints.setdefault(slot, SlotEndpoint(self, slot))
        return endpoint

    def nodes(self) -> list[StandaloneServer]:
        """Return the nodes that own slots now."""
        self._refresh()
        return [self._node(server) for server in dict.fromkeys(one for one in self._owners if one is not None)]

    # -- the map --------------------------------------------------------------------------------------------------

    def known_owner(self, slot: int) -> StandaloneServer | None:
        """Return the owner of *slot* by the map, None when the map may be outdated."""
        if monotonic() - self._mapped_at > MAP_FRESH:
            return None
        server = next((one for one in self._known if one in self._owners), None) if slot < 0 else self._owners[slot]
        return None if server is None else self._node(server)

    def last_owner(self, slot: int) -> StandaloneServer | None:
        """Return the owner of *slot* by the last map, however old that is."""
        server = self._owners[slot] if slot >= 0 else None
        return None if server is None else self._node(server)

    def owner(self, slot: int, deadline: float = math.inf) -> StandaloneServer:
        """Return the owner of *slot*; asks the nodes when the map is old. Raises EndpointUnresolved, ConfigurationError."""
        node = self.known_owner(slot)
        if node is not None:
            return node
        self._refresh(deadline)
        node = self.known_owner(slot)
        if node is None:
            raise EndpointUnresolved(f"no node of the cluster owns slot {slot}")
        return node

    def note_owner(self, slot: int, server: HostPort) -> None:
        """Note the owner of *slot* that a node has named."""
        self._owners[slot] = server
        self._mapped_at = monotonic()

    def distrust_map(self, server: HostPort | None = None) -> None:
        """Ask for the map before it is used again, and *server*, which did not answer, last."""
        self._mapped_at = float("-inf")
        if server in self._known:
            self._known.remove(server)
            self._known.append(server)

    def redirect_target(self, reply: str, asked: HostPort | None) -> tuple[int, StandaloneServer] | None:
        """Return the slot and the node that MOVED or ASK name; one without a host is on the host of *asked*."""
        match = _REDIRECT.search(reply)
        if match is None:
            return None
        host = match[2] if match[2] not in {"", "?"} else (asked or self._known[0])[0]
        return int(match[1]), self._node((host, int(match[3])))

    def _refresh(self, deadline: float = math.inf) -> None:
        began = monotonic()
        with self._lock:  # at most for one request: a failure counts for those that came meanwhile
            if self._mapped_at >= began:
                return  # another thread was asking
            if monotonic() - self._asked_at < _MAP_INTERVAL and self._failure is not None:
                raise self._failure
            try:
                self._owners = self._ask_for_map(deadline)
                self._failure = None
                self._mapped_at = monotonic()
            except EndpointUnresolved as error:
                self._failure = error
                raise
            finally:
                self._asked_at = monotonic()

    def _ask_for_map(self, deadline: float) -> list[HostPort | None]:
        from redis import RedisError

        reasons: list[str] = []
        doubtful: list[HostPort | None] | None = None
        refused: ConveyorError | None = None
        for server in dict.fromkeys((*self._known, *self._hosts.hosts)):
            if monotonic() >= deadline:
                reasons.append(f"{server[0]}:{server[1]}: not asked, the time is over")
                continue
            try:
                state, slots = self._ask(server, deadline)
            except (RedisError, OSError) as error:
                if refused is None and (text := fatal_reply(error)) is not None:
                    refused = self._refused(server, text)
                reasons.append(f"{server[0]}:{server[1]}: {error}")
            else:
                owners = self._read(server, slots)
                if b"cluster_state:ok" in state:
                    return owners
                doubtful = doubtful or owners  # separated from the others, or a failover is in progress
        if doubtful is not None and any(doubtful):
            return doubtful
        if refused is not None:
            raise refused
        raise EndpointUnresolved(
            f"no node of the cluster answers ({'; '.join(reasons) or 'none of them knows a slot'})"
        )

    def _ask(self, server: HostPort, deadline: float) -> tuple[bytes, list[Any]]:
        node = StandaloneServer(self._hosts.url(*server), min(self._timeout, QUERY_TIMEOUT), QUERY_TIMEOUT, self._login)
        deadline = half_left(deadline)
        connection = node.open(read_timeout=time_left(deadline, QUERY_TIMEOUT), deadline=deadline)
        try:
            return query(connection, "CLUSTER", "INFO") or b"cluster_state:ok", query(connection, "CLUSTER", "SLOTS")
        finally:
            connection.disconnect()

    def _read(self, asked: HostPort, slots: list[Any]) -> list[HostPort | None]:
        owners: list[HostPort | None] = [None] * SLOTS
        masters: dict[HostPort, None] = {}
        replicas: dict[HostPort, None] = {}
        for first, last, master, *others in slots or ():
            server = _server(master, asked)
            masters[server] = None
            replicas.update(dict.fromkeys(_server(one, asked) for one in others))
            owners[first : last + 1] = [server] * (last + 1 - first)
        if masters:
            order = [asked, *masters, *replicas]
            self._known = list(dict.fromkeys(one for one in order if one in masters or one in replicas))
        return owners

    def _refused(self, server: HostPort, text: str) -> ConveyorError:
        scheme, host = self._hosts.scheme, f"{server[0]}:{server[1]}"
        if "cluster support disabled" in text:
            what = f"is not part of one. Write {scheme}://{host}"
        elif "unknown command" in text:
            what = (
                f"is a sentinel or does not support clusters. For a sentinel write {scheme}+sentinel://{host}/mymaster"
            )
        else:
            return replies.fatal_error(text, str(self))
        return ConfigurationError(f"{self} names a cluster, but the server at {host} {what}", code="E33")

    def _node(self, server: HostPort) -> StandaloneServer:
        node = self._nodes.get(server)
        if node is None:
            node = self._nodes[server] = StandaloneServer(
                self._hosts.url(*server), self._timeout, FAILOVER_HANDSHAKE_TIMEOUT, self._login
            )
        return node

    def server_of(self, node: StandaloneServer) -> HostPort | None:
        """Return host and port of a node."""
        return next((server for server, address in self._nodes.items() if address is node), None)


class SlotEndpoint:
    """The owner of one slot; -1 is any node."""

    def __init__(self, cluster: Cluster, slot: int) -> None:
        self._cluster, self._slot = cluster, slot
        self._asked: StandaloneServer | None = None

    def __str__(self) -> str:
        return str(self._cluster)

    def __repr__(self) -> str:
        return f"<SlotEndpoint {self._slot}>"

    @property
    def reply_timeout(self) -> float:
        """Seconds one reply may take."""
        return FAILOVER_REPLY_TIMEOUT

    def open(self, *, read_timeout: float | None, deadline: float = math.inf) -> Connection:
        """Return a connection to the owner. Raises EndpointUnresolved, redis-py's errors, ConfigurationError (E33)."""
        node = self._asked = self._cluster.owner(self._slot, deadline)
        try:
            return node.open(read_timeout=read_timeout, deadline=deadline)
        except Exception:
            self._cluster.distrust_map(self._cluster.server_of(node))
            raise

    async def aopen(self) -> AsyncConnection:
        """Awaitable form of `open`."""
        node = self._cluster.known_owner(self._slot)
        if node is None:
            node = await in_thread(lambda: self._cluster.owner(self._slot))
        self._asked = node
        try:
            return await node.aopen()
        except Exception:
            self._cluster.distrust_map(self._cluster.server_of(node))
            raise

    def current_server(self) -> Hashable:
        """Return the owner by the last map."""
        return self._cluster.last_owner(self._slot) or self

    def note_moved(self, reply: str) -> None:
        """Note the owner named by MOVED; any other reply (CLUSTERDOWN) means that the map may be wrong."""
        target = self._redirect_target(reply)
        if target is None:
            self._cluster.distrust_map()
            return
        server = self._cluster.server_of(target[1])
        assert server is not None
        self._cluster.note_owner(target[0], server)

    def ask_redirect(self, reply: str) -> Endpoint:
        """Return the node that ASK names."""
        target = self._redirect_target(reply)
        if target is None:
            raise EndpointUnresolved(reply)
        return target[1]

    def _redirect_target(self, reply: str) -> tuple[int, StandaloneServer] | None:
        asked = None if self._asked is None else self._cluster.server_of(self._asked)
        return self._cluster.redirect_target(reply, asked)


def _server(entry: list[Any], asked: HostPort) -> HostPort:
    host = entry[0]
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    return (name if name not in {"", "?"} else asked[0]), int(entry[1])
