"""From a URL to what it names: a server, a master watched by sentinels, or a cluster."""

from __future__ import annotations

import difflib
from urllib.parse import SplitResult, urlsplit

from conveyor.errors import ConfigurationError
from conveyor.store.address import Address, redact
from conveyor.store.place import Topology

SCHEMES = (
    "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip


def locate(url: str, connect_timeout: float | None = None) -> Topology:
    """Return what *url* names; connects to nothing. Raises ConfigurationError."""
    try:
        if not _is_cut(urlsplit(url)):
            return _locate(url, connect_timeout)
    except ValueError:  # its text may quote the password
        pass
    raise ConfigurationError(
        f"{redact(url)!r} cannot be read as a URL. What is special in a password, such as / or [, is written by its "
        "number: urllib.parse.quote(password, safe='')."
    )


def _is_cut(parts: SplitResult) -> bool:
    """Tell whether the login ends amid a password, at a / or ? or # that was not quoted."""
    if "@" in parts.netloc or parts.scheme == "unix":
        return False
    ports = [name.rpartition(":")[2] for name in parts.netloc.split(",") if ":" in name and not name.endswith("]")]
    return "@" in parts.path + parts.fragment or ("@" in parts.query and not all(map(str.isdecimal, ports)))


def _locate(url: str, connect_timeout: float | None) -> Topology:
    scheme, _, topology = urlsplit(url).scheme.partition("+")
    timeout = () if connect_timeout is None else (connect_timeout,)
    if scheme in {"redis", "rediss"} and topology == "sentinel":
        from conveyor.store.sentinel import Sentinel

        return Sentinel(url, *timeout)
    if scheme in {"redis", "rediss"} and topology == "cluster":
        from conveyor.store.cluster import Cluster

        return Cluster(url, *timeout)
    if topology:
        near = difflib.get_close_matches(f"{scheme}+{topology}", SCHEMES, 1)
        guess = f" Did you mean {near[0]}://?" if near else ""
        raise ConfigurationError(
            f"{redact(url)!r}: there is no topology {topology!r}.{guess} Known are redis://host:6379/0, "
            "redis+sentinel://host:26379,host:26379/master and redis+cluster://host:6379,host:6379, each also with "
            "rediss for TLS, and unix:///path.",
            code="E31",
        )
    return Address(url, *timeout)
