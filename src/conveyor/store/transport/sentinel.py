"""A master that sentinels watch: each connection asks them which server it is, and asks that server whether it agrees."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.store.transport import replies
from conveyor.store.transport.connection import aquery, fatal_reply, query
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
from conveyor.store.transport.url import HostPort, StandaloneServer, check_database, masked, split_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

log = logging.getLogger("conveyor.store")


class Sentinel:
    """
    ``redis+sentinel://user:password@h1:26379,h2:26379/master?db=0``: the current master serves all keys.

    Making one checks the URL and connects to nothing. Raises ConfigurationError.
    """

    single = True

    def __init__(
        self, url: str, connect_timeout: float = FAILOVER_CONNECT_TIMEOUT, *, login: LoginProvider | None = None
    ) -> None:
        self.url, self._login = url, login
        self._timeout = min(connect_timeout, FAILOVER_CONNECT_TIMEOUT)
        hosts = split_hosts(url, 26379)
        if not hosts.path or "/" in hosts.path:
            raise ConfigurationError(
                f"{masked(url)!r} does not name the master that the sentinels watch. Write its name after the "
                "hosts: redis+sentinel://host:26379,host:26379/mymaster?db=0",
                code="E32",
            )
        self.name = hosts.path
        options = dict(hosts.options)
        self._database = options.pop("db", "")
        check_database(self._database, url)
        own = {name: options.pop(f"sentinel_{name}", "") for name in ("username", "password", "password_file")}
        self._server = replace(hosts, options=tuple(options.items()))
        options.pop("password_file", None)
        options |= {"password_file": own["password_file"]} if own["password_file"] else {}
        asking = replace(hosts, user=own["username"], password=own["password"], options=tuple(options.items()))
        timeout = min(self._timeout, QUERY_TIMEOUT)
        self._sentinels = [
            StandaloneServer(asking.url(host, port), timeout, QUERY_TIMEOUT) for host, port in hosts.hosts
        ]
        self._master: HostPort | None = None
        self.server(hosts.hosts[0]).check_options()

    def __str__(self) -> str:
        return masked(self.url)

    @property
    def reply_timeout(self) -> float:
        """Seconds one reply may take."""
        return FAILOVER_REPLY_TIMEOUT

    def endpoint(self, key: str) -> Endpoint:
        """Return this endpoint: the master serves all keys."""
        return self

    def current_server(self) -> Hashable:
        """Return itself: one master serves all keys."""
        return self

    def note_moved(self, reply: str) -> None:
        """Raise ConfigurationError (E33): the server is a node of a cluster."""
        self._sentinels[0].note_moved(reply)

    def ask_redirect(self, reply: str) -> Endpoint:
        """Raise ConfigurationError (E33): a master that sentinels watch is no node of a cluster."""
        return self._sentinels[0].ask_redirect(reply)

    def open(self, *, read_timeout: float | None, deadline: float = math.inf) -> Connection:
        """Return a connection to the master. Raises EndpointUnresolved, redis-py's errors, ConfigurationError (E32)."""
        lookup = _MasterLookup(self, deadline)
        for server in lookup.candidates():
            try:
                connection = self.server(server).open(read_timeout=read_timeout, deadline=deadline)
                role = lookup.role(query(connection, "ROLE"))
            except lookup.transient as error:
                lookup.reject(server, error)
                continue
            if role == "master":
                lookup.accept(server)
                return connection
            lookup.reject(server, f"is a {role}")
            connection.disconnect()
        raise lookup.error()

    async def aopen(self) -> AsyncConnection:
        """Awaitable form of `open`."""
        lookup = _MasterLookup(self)
        candidates = lookup.candidates()
        while (server := await in_thread(lambda: next(candidates, None))) is not None:
            try:
                connection = await self.server(server).aopen()
                role = lookup.role(await aquery(connection, "ROLE"))
            except lookup.transient as error:
                lookup.reject(server, error)
                continue
            if role == "master":
                lookup.accept(server)
                return connection
            lookup.reject(server, f"is a {role}")
            await connection.disconnect(nowait=True)
        raise lookup.error()

    def server(self, server: HostPort) -> StandaloneServer:
        """Return a server by host and port, with the credentials of this URL."""
        return StandaloneServer(
            self._server.url(*server, database=self._database), self._timeout, FAILOVER_HANDSHAKE_TIMEOUT, self._login
        )

    def sentinels(self) -> list[StandaloneServer]:
        """Return the sentinels, the one that answered last first."""
        return list(self._sentinels)

    def prefer(self, sentinel: StandaloneServer) -> None:
        """Ask *sentinel* first from now on."""
        self._sentinels = [sentinel, *(one for one in self._sentinels if one != sentinel)]

    def note_master(self, server: HostPort) -> None:
        """Log a change of the master."""
        if self._master is not None and self._master != server:
            log.warning("master %s: now at %s:%d", self.name, *server)
        self._master = server


class _MasterLookup:
    """One search for the master: the servers that the sentinels name, and why each was rejected."""

    def __init__(self, sentinel: Sentinel, deadline: float = math.inf) -> None:
        from redis import RedisError

        self._sentinel = sentinel
        self._deadline = deadline
        self._reasons: list[str] = []
        self._without_master: list[StandaloneServer] = []
        self._named: StandaloneServer | None = None
        self.transient: tuple[type[Exception], ...] = (RedisError, OSError)
        self._refused: ConveyorError | None = None

    def candidates(self) -> Iterator[HostPort]:
        """Ask the sentinels in turn; yield each server that one names, once."""
        seen: set[HostPort] = set()
        for address in self._sentinel.sentinels():
            if monotonic() >= self._deadline:
                self._reasons.append(f"{_host_of(address)}: not asked, the time is over")
                continue
            try:
                server = self._ask(address)
            except self.transient as error:
                self._reasons.append(f"{_host_of(address)}: {error}")
                if (text := fatal_reply(error)) is not None:
                    self._refused = self._refused or _no_sentinel(address, text)
                continue
            if server is None:
                self._without_master.append(address)
            elif server not in seen:
                seen.add(server)
                self._named = address
                yield server

    def _ask(self, address: StandaloneServer) -> HostPort | None:
        deadline = half_left(self._deadline)
        connection = address.open(read_timeout=time_left(deadline, QUERY_TIMEOUT), deadline=deadline)
        try:
            reply = query(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._sentinel.name)
        finally:
            connection.disconnect()
        return None if reply is None else (reply[0].decode(), int(reply[1]))

    def reject(self, server: HostPort, why: Exception | str) -> None:
        """Remember why a server was rejected."""
        self._reasons.append(f"{server[0]}:{server[1]}, named by {_host_of(self._named)}: {why}")
        if isinstance(why, Exception) and (text := fatal_reply(why)) is not None:
            self._refused = replies.fatal_error(text, str(self._sentinel.server(server)))

    @staticmethod
    def role(reply: Any) -> str:
        """Return the role that a server reports; when ROLE is not permitted, the sentinel is believed."""
        word = reply[0] if isinstance(reply, list) and reply else b"master"  # ROLE is not permitted
        return "replica" if word == b"slave" else str(word.decode())

    def accept(self, server: HostPort) -> None:
        """Note the server that confirmed that it is the master."""
        if self._named is not None:
            self._sentinel.prefer(self._named)
        self._sentinel.note_master(server)

    def error(self) -> Exception:
        """Return the error for a search without a result. A final refusal says more than an unreachable server."""
        if self._refused is not None:
            return self._refused
        if self._without_master and self._named is None and not self._reasons:
            return ConfigurationError(
                f"The sentinels know no master {self._sentinel.name!r}. {self._known(self._without_master[0])}",
                code="E32",
            )
        if self._named is None:
            reasons = self._reasons + [f"{_host_of(one)} knows no such master" for one in self._without_master]
            return EndpointUnresolved(f"no sentinel knows the master {self._sentinel.name!r} ({'; '.join(reasons)})")
        return EndpointUnresolved(f"the master {self._sentinel.name!r} cannot be reached ({'; '.join(self._reasons)})")

    def _known(self, address: StandaloneServer) -> str:
        try:
            connection = address.open(read_timeout=time_left(self._deadline, QUERY_TIMEOUT), deadline=self._deadline)
            try:
                masters = query(connection, "SENTINEL", "MASTERS")
            finally:
                connection.disconnect()
        except self.transient:
            return ""
        names = sorted(one[1].decode() for one in masters or [])
        return f"They know: {', '.join(names)}." if names else "They know none."


def _no_sentinel(address: StandaloneServer, text: str) -> ConveyorError:
    """Return the error for a server that was asked as a sentinel and refused."""
    if "unknown command" not in text:
        return replies.fatal_error(text, str(address))
    scheme = urlsplit(address.url).scheme
    return ConfigurationError(
        f"The server at {address.host} is no sentinel. Name the sentinels; their default port is 26379. If there "
        f"are none, write {scheme}://{address.host}, or {scheme}+cluster://{address.host} for a cluster.",
        code="E33",
    )


def _host_of(address: StandaloneServer | None) -> str:
    return "nobody" if address is None else address.host
