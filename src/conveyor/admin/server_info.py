"""The facts that a server tells about itself, as the page of the server shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.store.client.client import Client
from conveyor.store.transport import replies
from conveyor.store.transport.cluster import Cluster
from conveyor.units import digits


class ServerInfo(msgspec.Struct, frozen=True):
    """
    The facts of a server; None for one that it does not tell, as to a user that may not ask for INFO.

    `uptime`: seconds. `memory`: `used`, `peak`, `max` (0: no limit), in bytes, `policy`, `fragmentation`. `persistence`: `aof`,
    `rdb_last`, `fsync`. `keys`: of its database. Of a cluster only `mode` is told.
    """

    mode: str
    uptime: int | None = None
    memory: Mapping[str, Any] | None = None
    persistence: Mapping[str, Any] | None = None
    ops_per_second: int | None = None
    clients: int | None = None
    evicted: int | None = None
    expired: int | None = None
    keys: int | None = None


def read_server_info(client: Client) -> ServerInfo:
    """Return the facts of the server in two commands. Raises StoreUnavailable when it does not answer."""
    if isinstance(client.address, Cluster):
        return ServerInfo("cluster")
    facts = execute_if_allowed(client, "INFO")
    if facts is None:
        return ServerInfo("unknown")
    told = replies.parse_info(facts)
    size = execute_if_allowed(client, "DBSIZE")
    saved = _number(told, "rdb_last_save_time")
    return ServerInfo(
        told.get("redis_mode", "standalone"), _number(told, "uptime_in_seconds"),
        {
            "used": _number(told, "used_memory"), "peak": _number(told, "used_memory_peak"), "max": _number(told, "maxmemory"),
            "policy": told.get("maxmemory_policy"), "fragmentation": _ratio(told.get("mem_fragmentation_ratio")),
        },
        {
            "aof": told.get("aof_enabled") == "1", "rdb_last": None if not saved else datetime.fromtimestamp(saved, UTC),
            "fsync": read_setting(client, "appendfsync") if told.get("aof_enabled") == "1" else None,
        },
        _number(told, "instantaneous_ops_per_sec"), _number(told, "connected_clients"), _number(told, "evicted_keys"),
        _number(told, "expired_keys"), size if isinstance(size, int) else None,
    )  # fmt: skip


def execute_if_allowed(client: Client, *command: str) -> object:
    """Return the reply; None when the command is refused or unknown."""
    try:
        return client.execute(*command)
    except StoreUnavailable:
        raise
    except ConveyorError:
        return None


def server_time(client: Client) -> float:
    """Return the server's seconds since the epoch, which its counters and instants go by; where TIME is refused this machine's."""
    reply = execute_if_allowed(client, "TIME")
    return int(reply[0]) + int(reply[1]) / 1e6 if isinstance(reply, list) else time.time()


def read_setting(client: Client, name: str) -> str | None:
    """Return a setting of the server; None when that may not be asked."""
    reply = execute_if_allowed(client, "CONFIG", "GET", name)
    return reply[1].decode() if isinstance(reply, list) and len(reply) > 1 else None


def _number(facts: Mapping[str, str], name: str) -> int | None:
    text = facts.get(name, "")
    return digits(text)


def _ratio(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
