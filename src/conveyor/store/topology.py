"""From a URL to what it names: a server, a master watched by sentinels, or a cluster."""

from __future__ import annotations

import difflib
import logging
from urllib.parse import parse_qs

from conveyor.errors import ConfigurationError
from conveyor.store.address import Address, masked, taken_apart
from conveyor.store.place import Topology

log = logging.getLogger("conveyor.store")
SCHEMES = (
    "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip


def locate(url: str, connect_timeout: float | None = None) -> Topology:
    """Return what *url* names; connects to nothing. Raises ConfigurationError."""
    parts = taken_apart(url)
    scheme, _, topology = parts.scheme.partition("+")
    if scheme == "rediss" and parse_qs(parts.query).get("ssl_cert_reqs") == ["none"]:
        log.warning("%s: with ssl_cert_reqs=none anybody between can pretend to be this server.", masked(url))
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
            f"{masked(url)!r}: there is no topology {topology!r}.{guess} Known are redis://host:6379/0, "
            "redis+sentinel://host:26379,host:26379/master and redis+cluster://host:6379,host:6379, each also with "
            "rediss for TLS, and unix:///path.",
            code="E31",
        )
    return Address(url, *timeout)
