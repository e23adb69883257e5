"""The topology that a URL names: a server, a master watched by sentinels, or a cluster."""

from __future__ import annotations

import logging
from urllib.parse import parse_qs

from conveyor.errors import ConfigurationError
from conveyor.store.transport.credentials import LoginProvider
from conveyor.store.transport.endpoint import Topology
from conveyor.store.transport.url import StandaloneServer, masked, split_url

log = logging.getLogger("conveyor.store")
SCHEMES = (
    "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip


def topology_of(url: str, connect_timeout: float | None = None, login: LoginProvider | None = None) -> Topology:
    """
    Return the topology that *url* names; connects to nothing. *login*: for its servers. Raises ConfigurationError.

    Hosts of Valkey hand out ``valkey://`` and ``valkeys://``: they mean ``redis://`` and ``rediss://``.
    """
    if url.startswith("valkey"):
        url = "redis" + url.removeprefix("valkey")
    parts = split_url(url)
    whole = parts.scheme
    if whole.startswith("rediss") and parse_qs(parts.query).get("ssl_cert_reqs") == ["none"]:
        log.warning("%s: ssl_cert_reqs=none lets anyone on the network path pretend to be this server.", masked(url))
    timeout = () if connect_timeout is None else (connect_timeout,)
    topology = whole.partition("+")[2]
    if whole not in SCHEMES:
        _refuse_scheme(url, whole, topology)
    if topology == "sentinel":
        from conveyor.store.transport.sentinel import Sentinel

        return Sentinel(url, *timeout, login=login)
    if topology == "cluster":
        from conveyor.store.transport.cluster import Cluster

        return Cluster(url, *timeout, login=login)
    if connect_timeout is None:
        return StandaloneServer(url, login=login)
    return StandaloneServer(url, connect_timeout, login=login)


def embedded_directory(url: str) -> str:
    """
    Return the directory that the URL of an embedded server names, "" for the project's own.

    Raises ConfigurationError for a host: it would become a directory, with the password in its name.
    """
    directory = url.removeprefix("embedded:")
    if directory.startswith("//") and not directory.startswith("///") and directory != "//":
        raise ConfigurationError(
            f"{masked(url)!r}: an embedded server has a directory, no host and no password. Write embedded:///path/of/it, or "
            "embedded: for the one of this project."
        )
    return directory.removeprefix("//")


def _refuse_scheme(url: str, scheme: str, topology: str) -> None:
    """Raise the error for an unknown scheme, with the one that was probably meant."""
    from difflib import get_close_matches

    near = get_close_matches(scheme, (*SCHEMES, "embedded"), 1, cutoff=0.7)
    guess = f" Did you mean {near[0]}://?" if near else ""
    what = f"there is no topology {topology!r}" if topology else "this is not a Redis URL"
    raise ConfigurationError(
        f"{masked(url)!r}: {what}.{guess} Write redis://host:6379/0, "
        "redis+sentinel://host:26379,host:26379/mymaster or redis+cluster://host:6379,host:6379, each also with "
        "rediss for TLS, unix:///path or embedded:///directory.",
        code="E31" if topology or near else "E02",
    )
