"""Examine a server and the queues on it: what is wrong, why it matters, and what to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from conveyor.admin import server_checks
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.admin.server_checks import asked, confirmation, online, replication
from conveyor.errors import ConveyorError, StoreUnavailable
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability as Asked
from conveyor.store.keys import QueueKeys
from conveyor.store.transport import eviction, replies
from conveyor.store.transport.cluster import Cluster
from conveyor.store.transport.url import StandaloneServer

Level = Literal["ok", "note", "warning", "problem"]
Durability = Literal["memory", "snapshots", "aof-os", "aof-everysec", "aof-always", "unknown"]

PINGS = 7
SKEW_WARNING = 1.0
_NAMED = 10
_MOST_AUDITED = 10_000
_OR_CONSUMER = "  (for messages: a program that consumes them)"
MEMORY_WARNING, MEMORY_PROBLEM = 0.75, 0.9
LARGE_SLOT = 1_000_000

_DURABILITY: dict[Durability, str] = {
    "memory": "memory only: a restart of the server loses every job",
    "snapshots": "RDB snapshots only: a restart loses what was accepted since the last snapshot",
    "aof-os": "append-only file, fsync when the system likes: a power cut may lose about 30 s",
    "aof-everysec": "append-only file, fsync every second: a power cut may lose the last second",
    "aof-always": "append-only file, fsync before every reply: what was accepted survives a power cut",
    "unknown": "unknown: the server does not tell this user (CONFIG and INFO are refused)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `problem` means something is wrong now, `warning` that it may go wrong."""

    name: str
    level: Level
    text: str
    remedy: str = ""
    code: str = ""


@dataclass(slots=True)
class HealthReport:
    """
    What an examination found. `latency_ms` is the median of a few pings; `url` has no password.

    `synced` tells whether ``fsync=True`` can be confirmed, `replicas` how many are online; of a cluster, everywhere.
    """

    url: str
    family: str = ""
    version: str = ""
    latency_ms: float = 0.0
    durability: Durability = "unknown"
    synced: bool = False
    replicas: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems

    @property
    def problems(self) -> list[Finding]:
        """What is wrong now."""
        return [finding for finding in self.findings if finding.level == "problem"]

    def add(self, name: str, level: Level, text: str, remedy: str = "", code: str = "") -> None:
        """Append a finding."""
        self.findings.append(Finding(name, level, text, remedy, code))


def examine(
    client: Client, logical: QueueDirectory | None = None, asks: Mapping[str, Asked] | None = None
) -> HealthReport:
    """
    Look at everything; raises StoreUnavailable when the server does not answer.

    *logical* says what is known of queues besides their names in Redis: which are plain lists; *asks* what queues ask
    of every push.
    """
    report = HealthReport(str(client.address))
    if isinstance(client.address, Cluster):
        if not _nodes(client, client.address, report):
            return report  # what is asked of the whole has no answer now
        _latency(client, report)
    else:
        _latency(client, report)
        _server(client, report)
    _asked(asks or {}, report)
    _clock(client, report)
    _queues(client, logical or QueueDirectory(client), report)
    return report


def _server(client: Client, report: HealthReport) -> None:
    facts = _information(client)
    _version(facts, report)
    if client.server_handle is not None:
        report.add(
            "server", "note", "embedded server: for one machine, made for development", "Elsewhere: CONVEYOR_URL"
        )
    elif facts.get("redis_mode") == "cluster" and isinstance(client.address, StandaloneServer):
        host = client.address.host
        report.add("server", "problem", "this is one node of a cluster", f"Write redis+cluster://{host}", "E33")
    _role(facts, report)
    _eviction(client, facts, report)
    _durability(client, facts, report)
    _confirmations(client, facts, report)
    _memory(facts, report)
    _connections(client, report)


def _nodes(client: Client, cluster: Cluster, report: HealthReport) -> bool:
    """Examine each node that owns slots, and tell whether all answer; the whole is as durable as the least durable of them."""
    weakest = list(_DURABILITY)
    found = []
    try:
        nodes = cluster.nodes()
    except OSError as error:
        raise replies.unavailable(str(cluster), error) from error
    for address in nodes:
        node = Client(address.url, retry_for=client.retry_for)
        try:
            one = HealthReport(address.host)
            _server(node, one)
        except StoreUnavailable as error:
            one.add("node", "problem", str(error).partition("\n")[0], "Start it, or promote a replica of it.", "E01")
        finally:
            node.close()
        found.append(one)
        report.family, report.version = one.family, one.version
        report.findings += [
            replace(finding, text=f"{address.host}: {finding.text}")
            for finding in one.findings
            if (finding.name, finding.code) != ("server", "E33")
        ]
    report.replicas = min((one.replicas for one in found), default=0)
    report.synced = all(one.synced for one in found)
    report.durability = min((one.durability for one in found), key=weakest.index, default="unknown")
    return not any(finding.name == "node" for finding in report.findings)


def eviction_policy(client: Client) -> tuple[str, int]:
    """Return (maxmemory-policy, keys evicted since the start); the policy is "" when this user may not know it."""
    facts = _information(client)
    return _policy(client, facts), int(facts.get("evicted_keys", 0))


def evicting(policy: str, evicted: int) -> Finding | None:
    """Return what is wrong with an eviction policy, None when nothing is."""
    wrong = eviction.eviction_risk(policy, evicted)
    return None if wrong is None else Finding("eviction", "problem", wrong, eviction.REMEDY, "E10")


def stranded(waiting: dict[str, int], served: list[str]) -> list[Finding]:
    """
    Return the findings for queues with jobs that no worker takes: *waiting* is queue → jobs that could start.

    *served* are the queues that workers take; when there is none at all, one finding says it for all.
    """
    if not served and len(waiting) > 1:
        names = ", ".join(list(waiting)[:_NAMED]) + (", …" if len(waiting) > _NAMED else "")
        text = f"{len(waiting)} queues have {sum(waiting.values()):,} jobs and no worker is running: {names}"
        return [Finding("queue", "problem", text, f"conveyor worker{_OR_CONSUMER}", "E12")]
    takers = f"Workers take: {', '.join(served[:_NAMED])}." if served else "No worker is running."
    return [
        Finding(
            "queue",
            "problem",
            f"Queue '{name}' has {'1 job' if ready == 1 else f'{ready:,} jobs'} and no worker takes it. {takers}",
            f"conveyor worker -q {name}{_OR_CONSUMER}",
            "E12",
        )
        for name, ready in waiting.items()
    ]


def _latency(client: Client, report: HealthReport) -> None:
    took = []
    client.execute("PING")  # opens the connection
    for _ in range(PINGS):
        start = time.perf_counter()
        client.execute("PING")
        took.append((time.perf_counter() - start) * 1000)
    report.latency_ms = round(median(took), 3)
    level: Level = "warning" if report.latency_ms > 10 else "ok"
    remedy = "Run workers and producers near the server: every push is one round trip." if level == "warning" else ""
    report.add("latency", level, f"answers in {report.latency_ms:.2f} ms at {report.url}", remedy)


def _information(client: Client) -> dict[str, str]:
    return replies.parse_info(_allowed(client, "INFO"))


def _setting(client: Client, name: str) -> str | None:
    reply = _allowed(client, "CONFIG", "GET", name)
    return reply[1].decode() if isinstance(reply, list) and len(reply) > 1 else None


def _allowed(client: Client, *command: str) -> object:
    """Return the reply, None when this user may not ask or the server does not know the command."""
    try:
        return client.execute(*command)
    except StoreUnavailable:
        raise
    except ConveyorError:
        return None


def _version(facts: dict[str, str], report: HealthReport) -> None:
    if not facts:
        report.add("version", "warning", "INFO is refused: version, memory and role are unknown", "ACL SETUSER … +info")
        return
    report.family = "valkey" if "valkey_version" in facts else "redis"
    report.version = facts.get("valkey_version") or facts.get("redis_version", "")
    numbers = server_checks.numbers(report.version)
    name = f"{report.family.capitalize()} {report.version}"
    oldest = server_checks.OLDEST[report.family]
    if numbers and numbers[:2] < oldest:
        wanted = f"{oldest[0]}.{oldest[1]}"
        report.add("version", "problem", f"{name} is too old", f"Use {wanted} or newer, or Valkey 7.2 or newer.")
        return
    safe = server_checks.mended(report.family, report.version)
    if safe is not None:
        text = f"{name} has a known hole (CVE-2025-49844), unless your distribution mended it"
        report.add("version", "warning", text, f"Use {safe} or newer.")
    else:
        report.add("version", "ok", name)


def _role(facts: dict[str, str], report: HealthReport) -> None:
    if facts.get("role") == "slave":
        primary = f"{facts.get('master_host', '?')}:{facts.get('master_port', '?')}"
        report.add("role", "problem", "this is a read-only replica", f"Use its primary: {primary}", "E16")
    elif facts:
        replicas = int(facts.get("connected_slaves", 0))
        text = (
            f"primary with {replicas} replica{'s' * (replicas > 1)} (asynchronous)"
            if replicas
            else "primary, no replica"
        )
        report.add("role", "ok", text)


def _policy(client: Client, facts: dict[str, str]) -> str:
    return facts.get("maxmemory_policy") or _setting(client, "maxmemory-policy") or ""


def _eviction(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    policy = _policy(client, facts)
    wrong = evicting(policy, int(facts.get("evicted_keys", 0)))
    if wrong is not None:
        report.findings.append(wrong)
    elif policy:
        report.add("eviction", "ok", "noeviction: a full server refuses new jobs and keeps the old ones")
    else:
        report.add("eviction", "warning", eviction.UNKNOWN, "ACL SETUSER … +info")


def _durability(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    failed = [
        name
        for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        if facts.get(name, "ok") != "ok" and not (name.startswith("aof") and facts.get("aof_enabled") == "0")
    ]
    for name in failed:
        report.add(
            "durability", "problem", f"the last write to disk failed ({name})", "See the server's log and its disk."
        )
    report.durability = _obtained(client, facts)
    level: Level = "warning" if report.durability in {"memory", "snapshots", "unknown"} else "ok"
    remedy = "CONFIG SET appendonly yes, and the same in its configuration file" if level == "warning" else ""
    if report.durability == "unknown":
        remedy = "ACL SETUSER … +info +config|get"
    report.add("durability", level, _DURABILITY[report.durability], remedy)


def _obtained(client: Client, facts: dict[str, str]) -> Durability:
    append = facts.get("aof_enabled") or {"yes": "1", "no": "0"}.get(_setting(client, "appendonly") or "")
    if append == "1":
        fsync = _setting(client, "appendfsync")
        found: dict[str | None, Durability] = {"always": "aof-always", "no": "aof-os"}
        return found.get(fsync, "aof-everysec")  # the default, where CONFIG is refused
    if append is None:
        return "unknown"
    save = _setting(client, "save")
    return "memory" if save == "" else "snapshots" if save else "unknown"


def _confirmations(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    """Say what a push may ask for here."""
    least, lag = (_setting(client, f"min-replicas-{what}") for what in ("to-write", "max-lag"))
    report.replicas = online(facts)
    report.synced, line = confirmation(client.execute, str(client.address))
    for one in (line, *replication(facts, least, lag)):
        report.add("durability", one.level, one.text, one.remedy, one.code)


def _asked(asks: Mapping[str, Asked], report: HealthReport) -> None:
    for queue, one in asks.items():
        line = asked(queue, one, synced=report.synced, replicas=report.replicas)
        report.add("durability", line.level, line.text, line.remedy, line.code)


def _memory(facts: dict[str, str], report: HealthReport) -> None:
    if "used_memory" not in facts:
        return
    used, most = int(facts["used_memory"]), int(facts.get("maxmemory", 0))
    if most == 0:
        report.add("memory", "note", f"{_size(used)} used, no maxmemory", "Set one below the machine's memory.")
        return
    share = used / most
    level: Level = "problem" if share >= MEMORY_PROBLEM else "warning" if share >= MEMORY_WARNING else "ok"
    remedy = "Add workers, or give it more memory: at maxmemory every push is refused." if level != "ok" else ""
    report.add("memory", level, f"{share:.0%} of maxmemory used ({_size(used)} of {_size(most)})", remedy)


def _connections(client: Client, report: HealthReport) -> None:
    """Say when the server closes connections that are only quiet, or keeps those whose clients are gone."""
    if (quiet := _setting(client, "timeout")) not in {None, "0"}:
        text = f"timeout is {quiet}: connections that are quiet for {quiet} s are closed, and opened again at the next call"
        report.add("connections", "note", text, "CONFIG SET timeout 0")
    if _setting(client, "tcp-keepalive") == "0":
        text = "tcp-keepalive is off: connections of machines that are gone stay, and a blocked one swallows a call for work"
        report.add("connections", "warning", text, "CONFIG SET tcp-keepalive 60")


def _clock(client: Client, report: HealthReport) -> None:
    before = time.time()
    reply = _allowed(client, "TIME")
    after = time.time()
    if not isinstance(reply, list):
        return
    theirs = int(reply[0]) + int(reply[1]) / 1e6
    skew = max(before - theirs, theirs - after, 0.0)
    if skew > SKEW_WARNING:
        text = f"this machine's clock and the server's differ by {skew:.1f} s"
        report.add(
            "clock", "warning", text, "Run NTP on both. Leases are safe (they use the server's); ages look wrong."
        )
    else:
        report.add("clock", "ok", f"clocks agree ({skew * 1000:.0f} ms apart)")


def _queues(client: Client, logical: QueueDirectory, report: HealthReport) -> None:
    counts = {name: logical.counts(name) for name in logical.names()}
    served = [name for name, found in counts.items() if found.workers]
    waiting = {n: found.ready for n, found in counts.items() if found.ready and not found.workers and not found.paused}
    report.findings += stranded(waiting, served)
    for name, found in counts.items():
        _records(client, [logical.keys(place) for place in logical.places(name)], found, report)
        if logical.is_shut(name):
            text = f"queue '{name}' takes nothing: a change of its partitions was not completed"
            report.add("queue", "problem", text, f"conveyor queue partition {name} N", "E34")
        size = (found.ready + found.scheduled + found.leased + found.dead) // len(logical.places(name))
        if size > LARGE_SLOT and not client.address.single:
            text = (
                f"queue '{name}' has {size:,} jobs in a slot: moving it stops both nodes for about {2e-6 * size:.0f} s"
            )
            report.add("queue", "warning", text, "More partitions, or move it when it is short.")
        if found.paused:
            report.add("queue", "note", f"queue '{name}' is paused", f"conveyor queue resume {name}")
        if found.dead:
            text = f"queue '{name}' has {found.dead:,} dead letter{'s' * (found.dead > 1)}"
            report.add("queue", "note", text, f"conveyor job list --queue {name} --state dead")
    if all(finding.name != "queue" for finding in report.findings):
        report.add("queue", "ok", f"{len(counts)} queue{'s' * (len(counts) != 1)}, none of them stuck")


def _records(client: Client, places: list[QueueKeys], found: inspection.QueueCounts, report: HealthReport) -> None:
    """Look for jobs that stand in line without a record, where that takes a moment only."""
    if len(found) + found.leased + found.dead > _MOST_AUDITED:
        return
    for keys in places:
        lost = [id_ for what, id_ in client.run(inspection.audit(keys)) if what.startswith("no envelope")]
        if lost:
            named = ", ".join(lost[:3])
            text = f"queue '{keys.queue}': the records of {len(lost):,} jobs are gone, so they will not run: {named}"
            report.add("queue", "problem", text, "Was the server evicting? Enqueue them again.", "E10")


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"
