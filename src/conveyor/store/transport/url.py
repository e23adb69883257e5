"""
URLs of Redis: checked, redacted, and turned into the parameters of connections.

`StandaloneServer` is one server by its URL. `HostList` holds the parts of a URL that names several hosts, as those of Sentinel and
Cluster do.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
from collections.abc import Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.store.fork_safety import lazy_property
from conveyor.store.transport.credentials import LoginProvider, PasswordFile
from conveyor.store.transport.endpoint import REPLY_TIMEOUT, time_left
from conveyor.units import digits

if TYPE_CHECKING:
    from redis import Connection
    from redis.asyncio import Connection as AsyncConnection

    from conveyor.store.transport.endpoint import Endpoint

# To the last "@" of the word: an unquoted password may contain "/", ":" and "@" itself.
_SECRET = re.compile(r"(?<=://)([^/:@\s]*):\S*@")
_SECRET_OPTION = re.compile(r"(?<=[?&])(\w*password=)[^&\s]*")
# In a text that is only a URL: no space and no slash ends a password.
_LOGIN = re.compile(r"^((?:.*?://)?[^/:@]*):.*@", re.DOTALL)
_LOGIN_OPTION = re.compile(r"(?<=[?&])(\w*password=)[^&]*")
HostPort = tuple[str, int]
_CONNECT_TIMEOUT = 5.0
# A peer that vanished is noticed after a minute, also where nothing waits for a reply: three unanswered probes.
_ALIVE = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}


def configured_url(argument: str | None) -> str | None:
    """Return the URL by the order of settings: argument, ``CONVEYOR_URL``, None (the embedded server)."""
    return argument or os.environ.get("CONVEYOR_URL") or None


def redact(text: str) -> str:
    """Return *text* with the passwords of all URLs in it masked."""
    return _SECRET_OPTION.sub(r"\1***", _SECRET.sub(r"\1:***@", text))


def masked(url: str) -> str:
    """Return a given URL with its passwords masked, however malformed it is."""
    return _LOGIN.sub(r"\1:***@", _LOGIN_OPTION.sub(r"\1***", url))


def server_name(url: str | None) -> str:
    """
    Return a name for the server that *url* names, None the embedded one: hosts and database, without login and options.

    The same server under another address has another name.
    """
    if url is None or url.startswith("embedded:"):
        return url or "embedded:"
    parts = split_url(url)
    kind, path = parts.scheme.replace("rediss", "redis"), parts.path.strip("/")
    database = dict(parse_qsl(parts.query)).get("db") or "0"
    if kind == "unix":
        return f"unix:///{path}/{database}"
    default = "26379" if kind.endswith("sentinel") else "6379"
    hosts = parts.netloc.rpartition("@")[2].lower().split(",")
    named = sorted(
        host if re.search(r":\d+$", host) else f"{host.rstrip(':') or 'localhost'}:{default}" for host in hosts
    )
    if kind == "redis":
        database = path or database
    return f"{kind}://{','.join(named)}/{path + '/' if kind.endswith('sentinel') else ''}{database}"


def split_url(url: str) -> SplitResult:
    """Return the parts of *url*. Raises ConfigurationError, also for a password that would be read as host or path."""
    try:
        url.encode()  # a lone surrogate could not be quoted
        parts = urlsplit(url)
    except ValueError:  # its text may contain the password
        parts = None
    if parts is not None:
        behind = parts.path + parts.fragment + parts.query.partition("=")[0]
        lost = parts.netloc if parts.scheme == "unix" else "@" in behind
        if not lost or "@" in parts.netloc:
            return parts
    raise ConfigurationError(
        f"{masked(url)!r} is not a URL of Redis. If its user or password contains / ? # @ [ ] or a space, quote "
        "it:  python -c \"import urllib.parse as u; print(u.quote(input(), safe=''))\""
    )


def check_database(text: str, url: str) -> None:
    """Raise ConfigurationError unless *text* is a database number or empty; redis-py would take anything else as 0."""
    if text and digits(text) is None:
        raise ConfigurationError(f"{masked(url)!r}: the database must be a number, as in redis://host:6379/0.")


class StandaloneServer(msgspec.Struct, frozen=True, dict=True):
    """One Redis server by its URL: ``redis://``, ``rediss://`` or ``unix://``."""

    url: str
    connect_timeout: float = _CONNECT_TIMEOUT
    handshake_timeout: float = REPLY_TIMEOUT
    """Seconds for the first exchange on a new connection (AUTH, SELECT): connecting succeeds even to a frozen server."""
    login: LoginProvider | None = None
    """Asked at each connection, instead of the user and the password of the URL."""

    def __post_init__(self) -> None:
        parts = self._parts
        if parts.scheme not in {"redis", "rediss", "unix"}:
            raise ConfigurationError(
                f"{masked(self.url)!r} is not the URL of one server. Write redis://host:6379/0, rediss://… or unix:///path."
            )
        if parts.scheme == "unix":
            if not parts.path.strip("/"):
                raise ConfigurationError(f"{masked(self.url)!r} names no socket. Write unix:///run/redis.sock?db=0.")
            return
        try:
            port = parts.port
        except ValueError:  # its text may contain a part of the password
            port = 0
        if port == 0:
            raise ConfigurationError(
                f"{masked(self.url)!r}: the port must be a number from 1 to 65535. In a password write / : @ as %2F %3A %40."
            )
        check_database(parts.path.strip("/"), self.url)

    def __str__(self) -> str:
        return masked(self.url)

    def __repr__(self) -> str:
        return f"<StandaloneServer {self}>"

    @lazy_property
    def _parts(self) -> SplitResult:
        return split_url(self.url)

    @lazy_property
    def _parameters(self) -> dict[str, Any]:
        from redis import connection

        try:
            parameters = dict(connection.parse_url(self.url))
        except ValueError as error:
            raise ConfigurationError(f"{self} is not a Redis URL: {redact(str(error))}") from None
        parameters.pop("connection_class", None)
        self._use_password_file(parameters)
        self._use_login(parameters)
        # RESP2 is enough, and every supported server speaks it. redis-py must not retry: it does not know what may be repeated.
        local = self._parts.scheme == "unix"
        alive = {} if local else {"socket_keepalive": True, "socket_keepalive_options": _ALIVE}
        parameters = {
            "socket_connect_timeout": self.connect_timeout,
            **alive,
            **_driver(parameters),
            **parameters,
            "protocol": 2,
        }
        if parameters.get("db"):
            parameters["db"] = str(parameters["db"])  # redis-py sends it as it is: see `Argument`
        self._check_parameters(parameters)
        return parameters

    def _use_password_file(self, parameters: dict[str, Any]) -> None:
        path = parameters.pop("password_file", None)
        if path is None:
            return
        if parameters.pop("password", None):
            raise ConfigurationError(f"{self} has both a password and a password_file. Leave one out.")
        parameters["credential_provider"] = PasswordFile(path, parameters.pop("username", None))

    def _use_login(self, parameters: dict[str, Any]) -> None:
        if self.login is None:
            return
        if parameters.pop("password", None) or "credential_provider" in parameters:
            raise ConfigurationError(f"{self} has a password, and the app has credentials=. Leave one out.")
        parameters.pop("username", None)
        parameters["credential_provider"] = self.login

    def _check_parameters(self, parameters: dict[str, Any]) -> None:
        """Raise ConfigurationError for parameters that redis-py rejects: now, not at the first call."""
        from redis import Connection, RedisError, SSLConnection, UnixDomainSocketConnection

        kind: Any = {"redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection}
        try:
            kind[self._parts.scheme](**parameters)
        except (TypeError, ValueError, RedisError) as error:
            unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
            why = f"{unknown[1]} is not one of its options" if unknown else redact(str(error))
            raise ConfigurationError(  # without the value, which may be a secret
                f"{self._parts.scheme}://{self.host}: {why}. The options after ? are those of redis-py's "
                "connections, such as ssl_ca_certs, and password_file; for Sentinel also sentinel_username, "
                "sentinel_password and sentinel_password_file."
            ) from None

    def endpoint(self, key: str) -> Endpoint:
        """Return this server, which serves all keys."""
        return self

    @property
    def single(self) -> bool:
        """True: one endpoint serves all keys."""
        return True

    @property
    def reply_timeout(self) -> float:
        """Seconds one reply may take."""
        return self.handshake_timeout

    @property
    def host(self) -> str:
        """Host and port, as in the URL."""
        return self._parts.netloc.rpartition("@")[2] or "host:6379"

    def check_options(self) -> None:
        """Raise ConfigurationError for unknown or invalid options of the URL."""
        assert self._parameters is not None

    def current_server(self) -> Hashable:
        """Return this server."""
        return self

    def note_moved(self, reply: str) -> None:
        """Raise ConfigurationError (E33): only nodes of a cluster reply so."""
        raise ConfigurationError(
            f"The server at {self} is one node of a cluster ({reply}). Name some of its nodes in a cluster's URL: "
            f"{'rediss' if self.url.startswith('rediss') else 'redis'}+cluster://{self.host}",
            code="E33",
        )

    def ask_redirect(self, reply: str) -> Endpoint:
        """Raise ConfigurationError (E33), as `note_moved`."""
        self.note_moved(reply)
        raise AssertionError

    def open(self, *, read_timeout: float | None, deadline: float = math.inf) -> Connection:
        """Return a connected blocking connection; the tries to connect and the first exchange end at *deadline*."""
        connection = self.new_connection(read_timeout=time_left(deadline, self.handshake_timeout), deadline=deadline)
        connection.connect()
        if read_timeout != connection.socket_timeout:
            assert connection._sock is not None  # noqa: SLF001
            connection._sock.settimeout(read_timeout)  # noqa: SLF001
            connection._parser._socket_timeout = read_timeout  # noqa: SLF001
        return connection

    async def aopen(self) -> AsyncConnection:
        """Return a connected asyncio connection."""
        connection = self.new_async_connection()
        try:
            async with asyncio.timeout(self.connect_timeout + self.handshake_timeout):
                await connection.connect()
        except TimeoutError as error:
            await connection.disconnect(nowait=True)
            raise TimeoutError("connected, but no answer") from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    def new_connection(self, *, read_timeout: float | None, deadline: float = math.inf) -> Connection:
        """Return an unopened blocking connection."""
        from redis import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        kind = {"redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection}
        parameters = {**self._parameters, "socket_timeout": read_timeout, "retry": Retry(NoBackoff(), 0)}
        if deadline != math.inf:
            parameters["socket_connect_timeout"] = time_left(deadline, parameters["socket_connect_timeout"])
            parameters["redis_connect_func"] = partial(_begin_session, deadline)
        return cast("Connection", kind[self._parts.scheme](**parameters))

    def new_async_connection(self) -> AsyncConnection:
        """Return an unopened asyncio connection."""
        from redis import backoff
        from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.asyncio.retry import Retry

        kind = {"redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection}
        parameters = {**self._parameters, "socket_timeout": None, "retry": Retry(backoff.NoBackoff(), 0)}
        return cast("AsyncConnection", kind[self._parts.scheme](**parameters))


def _begin_session(deadline: float, connection: Any) -> None:
    """Make the first exchange of a connection of redis-py in the time that connecting has left of it."""
    connection.socket_timeout = time_left(deadline, connection.socket_timeout)
    connection._sock.settimeout(connection.socket_timeout)  # noqa: SLF001  as in `open`
    connection.on_connect()


def _driver(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what redis-py tells the server of itself: by itself it reads the metadata of its package for each connection."""
    try:
        from redis import DriverInfo, __version__
    except ImportError:  # an earlier redis-py
        return {}
    return (
        {} if {"lib_name", "lib_version"} & parameters.keys() else {"driver_info": DriverInfo(lib_version=__version__)}
    )


class HostList(msgspec.Struct, frozen=True):
    """The parts of a URL that names several hosts: ``scheme://user:password@h1:1,h2:2/path?options``."""

    scheme: str
    """redis or rediss."""
    user: str
    password: str
    hosts: tuple[HostPort, ...]
    path: str
    options: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return f"<HostList {self.hosts}>"

    def url(self, host: str, port: int, *, database: str = "") -> str:
        """Return the URL of one server, with these credentials and options."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user or self.password else ""
        name = f"[{host}]" if ":" in host else host
        options = f"?{urlencode(self.options)}" if self.options else ""
        return f"{self.scheme}://{login}{name}:{port}/{database}{options}"


def split_hosts(url: str, default_port: int) -> HostList:
    """Return the parts of a URL of several hosts. Raises ConfigurationError."""
    parts = split_url(url)
    login, _, names = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = tuple(_host(url, name, default_port) for name in names.split(",") if name)
    if not hosts:
        raise ConfigurationError(f"{masked(url)!r} names no host.")
    options = tuple(parse_qsl(parts.query, keep_blank_values=True))
    path = unquote(parts.path.strip("/"))
    return HostList(parts.scheme.partition("+")[0], unquote(user), unquote(password), hosts, path, options)


def _host(url: str, name: str, default_port: int) -> HostPort:
    host, colon, port = name.strip().rpartition(":")
    if not colon or port.endswith("]"):
        host, port = name.strip(), str(default_port)
    number = digits(port) or 0
    if not 0 < number < 65536 or not host or len(host.split()) > 1:
        raise ConfigurationError(f"{masked(url)!r}: {masked(name)!r} is not a host with a port.")
    return host.strip("[]"), number
