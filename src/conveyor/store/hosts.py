"""A URL that names several hosts, taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

from conveyor.errors import ConfigurationError
from conveyor.store.address import masked, taken_apart


@dataclass(frozen=True)
class Hosts:
    """The parts of a URL that names several hosts: ``scheme://user:password@h1:1,h2:2/path?options``."""

    scheme: str
    """redis or rediss."""
    user: str
    password: str = field(repr=False)
    hosts: tuple[tuple[str, int], ...]
    path: str
    options: tuple[tuple[str, str], ...] = field(repr=False)

    def url(self, host: str, port: int, *, database: str = "") -> str:
        """Return the URL of one server, with these credentials and options."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user or self.password else ""
        name = f"[{host}]" if ":" in host else host
        options = f"?{urlencode(self.options)}" if self.options else ""
        return f"{self.scheme}://{login}{name}:{port}/{database}{options}"


def split_hosts(url: str, default_port: int) -> Hosts:
    """Take a URL of several hosts apart. Raises ConfigurationError."""
    parts = taken_apart(url)
    login, _, names = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = tuple(_host(url, name, default_port) for name in names.split(",") if name)
    if not hosts:
        raise ConfigurationError(f"{masked(url)!r} names no host.")
    options = tuple(parse_qsl(parts.query, keep_blank_values=True))
    path = unquote(parts.path.strip("/"))
    return Hosts(parts.scheme.partition("+")[0], unquote(user), unquote(password), hosts, path, options)


def _host(url: str, name: str, default_port: int) -> tuple[str, int]:
    host, colon, port = name.strip().rpartition(":")
    if not colon or port.endswith("]"):
        host, port = name.strip(), str(default_port)
    if not port.isdecimal() or not 0 < int(port) < 65536 or not host or len(host.split()) > 1:
        raise ConfigurationError(f"{masked(url)!r}: {masked(name)!r} is not a host with a port.")
    return host.strip("[]"), int(port)
