"""Examination of a server and its queues: what is wrong, why it matters, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from conveyor.admin import server_checks
from conveyor.admin.flags import late_schedules, queue_flags
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.admin.server_checks import (
    durability_request_finding,
    fsync_finding,
    online_replicas,
    replication_findings,
)
from conveyor.admin.server_info import execute_if_allowed, read_setting, server_time
from conveyor.admin.views import QueueInfo, queue_info
from conveyor.errors import ConfigurationError, ConveyorError, StoreUnavailable
from conveyor.store import inspection, schedules
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability
from conveyor.store.keys import QueueKeys
from conveyor.store.transport import eviction, replies
from conveyor.store.transport.cluster import Cluster
from conveyor.store.transport.url import StandaloneServer
from conveyor.units import instant, size_text, span

Level = Literal["ok", "note", "warning", "problem"]
DurabilityLevel = Literal["memory", "snapshots", "aof-os", "aof-everysec", "aof-always", "unknown"]

PING_COUNT = 7
CLOCK_SKEW_WARNING = 1.0
_MAX_NAMED = 10
_MAX_NOTES = 20
"""Queues of which each has a note that it is paused, or has dead letters."""
_MARKS_SIZE = 300
"""Queues of which one call reads the marks."""
_MAX_AUDITED, _AUDITED_PLACES, _AUDITED_JOBS = 10_000, 50, 500
MEMORY_WARNING, MEMORY_PROBLEM = 0.75, 0.9
LARGE_SLOT = 1_000_000
LONGEST_KEEPALIVE = 300
"""Seconds between two probes of an idle connection: the default of servers."""

_LEVEL_TEXTS: dict[DurabilityLevel, str] = {
    "memory": "memory only: a restart of the server loses every job",
    "snapshots": "RDB snapshots only: a restart loses what was accepted since the last snapshot",
    "aof-os": "append-only file, fsync when the operating system decides: a power cut may lose about 30 s",
    "aof-everysec": "append-only file, fsync every second: a power cut may lose the last second",
    "aof-always": "append-only file, fsync before every reply: what was accepted survives a power cut",
    "unknown": "unknown: this user may not read it (CONFIG and INFO are refused)",
}


class Finding(msgspec.Struct, frozen=True):
    """
    The result of one check.

    `problem`: something is wrong now. `warning`: something may go wrong.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""
    code: str = ""


class HealthReport(msgspec.Struct):
    """
    The findings of an examination.

    `url`: without the password. `latency_ms`: median of a few pings. `fsync_works`: whether ``fsync=True`` can be
    confirmed. `replicas`: how many are online. For a cluster, both hold for the weakest node.
    """

    url: str
    family: str = ""
    version: str = ""
    latency_ms: float = 0.0
    durability: DurabilityLevel = "unknown"
    fsync_works: bool = False
    replicas: int = 0
    findings: list[Finding] = msgspec.field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong now."""
        return not self.problems

    @property
    def problems(self) -> list[Finding]:
        """The findings that are wrong now."""
        return [finding for finding in self.findings if finding.level == "problem"]

    def add(self, name: str, level: Level, text: str, remedy: str = "", code: str = "") -> None:
        """Append a finding."""
        self.findings.append(Finding(name, level, text, remedy, code))


def examine(
    client: Client, directory: QueueDirectory | None = None, durability_requests: Mapping[str, Durability] | None = None, *,
    seconds: float | None = None, queues: Sequence[QueueInfo] | None = None,
) -> HealthReport:  # fmt: skip
    """
    Run all checks. Raises StoreUnavailable when the server does not answer.

    *directory*: the known queues and plain lists. *durability_requests*: queue → the durability it requests for every
    push. *seconds*: the time in which the records of queue after queue are examined, None: of all; a finding says where it ended.
    *queues*: all of them, as they were counted just now; None: they are counted.
    """
    report = HealthReport(str(client.address))
    if isinstance(client.address, Cluster):
        if not _check_nodes(client, client.address, report):
            return report  # the checks of the whole cluster would fail now
        _check_latency(client, report)
    else:
        _check_latency(client, report)
        _check_server(client, report)
    _check_durability_requests(durability_requests or {}, report)
    _check_clock(client, report)
    _check_queues(client, directory or QueueDirectory(client), report, seconds, queues)
    return report


def _check_server(client: Client, report: HealthReport) -> None:
    facts = _info(client)
    _check_version(facts, report)
    if client.server_handle is not None:
        report.add(
            "server", "note", "embedded server: for development on one machine", "In production set CONVEYOR_URL"
        )
    elif facts.get("redis_mode") == "cluster" and isinstance(client.address, StandaloneServer):
        host = client.address.host
        report.add("server", "problem", "this is one node of a cluster", f"Write redis+cluster://{host}", "E33")
    _check_role(facts, report)
    _check_eviction(client, facts, report)
    _check_durability(client, facts, report)
    _check_confirmations(client, facts, report)
    _check_memory(facts, report)
    _check_connections(client, report)
    _advise_without_renamed(client, report)


def _advise_without_renamed(client: Client, report: HealthReport) -> None:
    """Replace advice to send commands that the server's configuration has renamed away."""
    if not any(word in finding.remedy for finding in report.findings for word in ("CONFIG SET", "ACL SETUSER")):
        return
    unknown = [name for name in ("CONFIG", "INFO", "ACL") if _is_unknown(client, name)]
    if unknown:
        report.findings = [
            replace(one, remedy=server_checks.remedy_without(one.remedy, unknown)) for one in report.findings
        ]


def _is_unknown(client: Client, command: str) -> bool:
    try:
        client.execute(command)  # without its arguments, so it does nothing where it is known
    except StoreUnavailable:
        raise
    except ConveyorError as error:
        return error.code == "E33"
    return False


def _check_nodes(client: Client, cluster: Cluster, report: HealthReport) -> bool:
    """
    Check each node that owns slots; return whether all answer.

    The least durable node counts for the cluster.
    """
    weakest = list(_LEVEL_TEXTS)
    node_reports = []
    try:
        nodes = cluster.nodes()
    except OSError as error:
        raise replies.unavailable(str(cluster), error) from error
    for address in nodes:
        node = Client(address.url, retry_for=client.retry_for, login=client.login)
        try:
            one = HealthReport(address.host)
            _check_server(node, one)
        except StoreUnavailable as error:
            one.add("node", "problem", str(error).partition("\n")[0], "Start it, or promote a replica of it.", "E01")
        finally:
            node.close()
        node_reports.append(one)
        report.family, report.version = one.family, one.version
        report.findings += [
            replace(finding, text=f"{address.host}: {finding.text}")
            for finding in one.findings
            if (finding.name, finding.code) != ("server", "E33")
        ]
    report.replicas = min((one.replicas for one in node_reports), default=0)
    report.fsync_works = all(one.fsync_works for one in node_reports)
    report.durability = min((one.durability for one in node_reports), key=weakest.index, default="unknown")
    return not any(finding.name == "node" for finding in report.findings)


def eviction_policy(client: Client) -> tuple[str, int]:
    """
    Return (maxmemory-policy, keys evicted since the start).

    The policy is "" when this user may not read it.
    """
    facts = _info(client)
    return _policy(client, facts), int(facts.get("evicted_keys", 0))


def eviction_finding(policy: str, evicted: int) -> Finding | None:
    """Return a finding for a dangerous eviction policy, None for a safe one."""
    wrong = eviction.eviction_risk(policy, evicted)
    return None if wrong is None else Finding("eviction", "problem", wrong, eviction.REMEDY, "E10")


def _check_latency(client: Client, report: HealthReport) -> None:
    took = []
    client.execute("PING")  # opens the connection
    for _ in range(PING_COUNT):
        start = time.perf_counter()
        client.execute("PING")
        took.append((time.perf_counter() - start) * 1000)
    report.latency_ms = round(sorted(took)[len(took) // 2], 3)
    level: Level = "warning" if report.latency_ms > 10 else "ok"
    remedy = "Run workers and producers near the server: every push is one round trip." if level == "warning" else ""
    report.add("latency", level, f"answers in {report.latency_ms:.2f} ms at {report.url}", remedy)


def _info(client: Client) -> dict[str, str]:
    return replies.parse_info(execute_if_allowed(client, "INFO"))


def _check_version(facts: dict[str, str], report: HealthReport) -> None:
    if not facts:
        report.add("version", "warning", "INFO is refused: version, memory and role are unknown", "ACL SETUSER … +info")
        return
    report.family = "valkey" if "valkey_version" in facts else "redis"
    report.version = facts.get("valkey_version") or facts.get("redis_version", "")
    numbers = server_checks.version_numbers(report.version)
    name = f"{report.family.capitalize()} {report.version}"
    oldest = server_checks.OLDEST_SUPPORTED[report.family]
    if numbers and numbers[:2] < oldest:
        wanted = f"{oldest[0]}.{oldest[1]}"
        report.add("version", "problem", f"{name} is too old", f"Use {wanted} or newer, or Valkey 7.2 or newer.")
        return
    safe = server_checks.first_patched_release(report.family, report.version)
    if safe is not None:
        text = f"{name} has a known vulnerability (CVE-2025-49844); your distribution may have patched it"
        report.add("version", "warning", text, f"Use {safe} or newer.")
    else:
        report.add("version", "ok", name)


def _check_role(facts: dict[str, str], report: HealthReport) -> None:
    if facts.get("role") == "slave":
        primary = f"{facts.get('master_host', '?')}:{facts.get('master_port', '?')}"
        down = (
            int(facts.get("master_link_down_since_seconds", 0)) if facts.get("master_link_status") == "down" else None
        )
        link = (
            ""
            if down is None
            else ", and its link to the primary is down" + (f", for {span(down)}" if down > 0 else "")
        )
        report.add("role", "problem", f"this is a read-only replica{link}", f"Use its primary: {primary}", "E16")
    elif facts:
        replicas = int(facts.get("connected_slaves", 0))
        text = (
            f"primary with {replicas} replica{'s' * (replicas > 1)} (asynchronous)"
            if replicas
            else "primary, no replica"
        )
        report.add("role", "ok", text)


def _policy(client: Client, facts: dict[str, str]) -> str:
    return facts.get("maxmemory_policy") or read_setting(client, "maxmemory-policy") or ""


def _check_eviction(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    policy = _policy(client, facts)
    wrong = eviction_finding(policy, int(facts.get("evicted_keys", 0)))
    if wrong is not None:
        report.findings.append(wrong)
    elif policy:
        report.add("eviction", "ok", "noeviction: a full server refuses new jobs and keeps the old ones")
    else:
        report.add("eviction", "warning", eviction.UNKNOWN, "ACL SETUSER … +info")


def _check_durability(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    failed = [
        name
        for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        if facts.get(name, "ok") != "ok" and not (name.startswith("aof") and facts.get("aof_enabled") == "0")
    ]
    for name in failed:
        report.add(
            "durability", "problem", f"the last write to disk failed ({name})", "See the server's log and its disk."
        )
    report.durability = _durability_level(client, facts)
    level: Level = "ok" if report.durability in {"aof-everysec", "aof-always"} else "warning"
    remedy = "CONFIG SET appendonly yes, and the same in its configuration file" if level == "warning" else ""
    if report.durability == "aof-os":
        remedy = "CONFIG SET appendfsync everysec, and the same in its configuration file"
    elif report.durability == "unknown":
        remedy = "ACL SETUSER … +info +config|get"
    report.add("durability", level, _LEVEL_TEXTS[report.durability], remedy)


def _durability_level(client: Client, facts: dict[str, str]) -> DurabilityLevel:
    append = facts.get("aof_enabled") or {"yes": "1", "no": "0"}.get(read_setting(client, "appendonly") or "")
    if append == "1":
        fsync = read_setting(client, "appendfsync")
        levels: dict[str | None, DurabilityLevel] = {"always": "aof-always", "no": "aof-os"}
        return levels.get(fsync, "aof-everysec")  # the default, where CONFIG is refused
    if append is None:
        return "unknown"
    save = read_setting(client, "save")
    return "memory" if save == "" else "snapshots" if save else "unknown"


def _check_confirmations(client: Client, facts: dict[str, str], report: HealthReport) -> None:
    """Report the durability that a push may request here; a replica takes none."""
    if facts.get("role") == "slave":
        return
    minimum, lag = (read_setting(client, f"min-replicas-{what}") for what in ("to-write", "max-lag"))
    report.replicas = online_replicas(facts)
    report.fsync_works, line = fsync_finding(client.execute, str(client.address))
    for one in (line, *replication_findings(facts, minimum, lag)):
        report.add("durability", one.level, one.text, one.remedy, one.code)


def _check_durability_requests(durability_requests: Mapping[str, Durability], report: HealthReport) -> None:
    for queue, one in durability_requests.items():
        line = durability_request_finding(queue, one, fsync_works=report.fsync_works, replicas=report.replicas)
        report.add("durability", line.level, line.text, line.remedy, line.code)


def _check_memory(facts: dict[str, str], report: HealthReport) -> None:
    if "used_memory" not in facts:
        return
    used, most = int(facts["used_memory"]), int(facts.get("maxmemory", 0))
    if most == 0:
        report.add("memory", "note", f"{size_text(used)} used, no maxmemory", "Set one below the machine's memory.")
        return
    share = used / most
    level: Level = "problem" if share >= MEMORY_PROBLEM else "warning" if share >= MEMORY_WARNING else "ok"
    remedy = "Add workers, or give it more memory: at maxmemory every push is refused." if level != "ok" else ""
    report.add("memory", level, f"{share:.0%} of maxmemory used ({size_text(used)} of {size_text(most)})", remedy)


def _check_connections(client: Client, report: HealthReport) -> None:
    """Report that idle connections are closed, or that those of vanished clients are kept."""
    if (quiet := read_setting(client, "timeout")) not in {None, "0"}:
        text = f"timeout is {quiet}: idle connections are closed after {quiet} s, and opened again at the next call"
        report.add("connections", "note", text, "CONFIG SET timeout 0")
    if (most := read_setting(client, "maxmemory-clients")) not in {None, "0"}:
        text = f"maxmemory-clients is {most}: beyond it the server closes connections, of workers too, which open them again"
        report.add("connections", "note", text, "CONFIG SET maxmemory-clients 0")
    keepalive = read_setting(client, "tcp-keepalive")
    if keepalive is not None and keepalive.isdigit() and int(keepalive) > LONGEST_KEEPALIVE:
        text = (
            f"tcp-keepalive is {keepalive}: connections of vanished machines stay open for that many seconds and more"
        )
        report.add("connections", "note", text, "CONFIG SET tcp-keepalive 60")
    if keepalive == "0":
        text = "tcp-keepalive is off: connections of vanished machines stay open, and a blocked one takes a wake-up for itself"
        report.add("connections", "warning", text, "CONFIG SET tcp-keepalive 60")


def _check_clock(client: Client, report: HealthReport) -> None:
    before = time.time()
    theirs = server_time(client)
    after = time.time()
    skew = max(before - theirs, theirs - after, 0.0)
    if skew > CLOCK_SKEW_WARNING:
        text = f"this machine's clock and the server's differ by {skew:.1f} s"
        report.add(
            "clock",
            "warning",
            text,
            "Run NTP on both. Leases are safe (they use the server's clock); ages are shown wrongly.",
        )
    else:
        report.add("clock", "ok", f"clocks agree ({skew * 1000:.0f} ms apart)")


def _check_queues(
    client: Client, directory: QueueDirectory, report: HealthReport, seconds: float | None, queues: Sequence[QueueInfo] | None
) -> None:  # fmt: skip
    parts = directory.everything()  # once: of ten thousand queues each other way to a partition reads all names again
    if queues is None:
        counted = directory.counts_and_ended([part for some in parts.values() for part in some], 0)
        queues = [
            queue_info(name, inspection.total([counted[part].counts for part in some])) for name, some in parts.items()
        ]
    counts = {one.name: one for one in queues if one.name in parts}
    parts = {name: parts[name] for name in counts}
    for flag in queue_flags(list(counts.values())):
        report.add("queue", flag.level, flag.text, flag.remedy, flag.code)
    marks: dict[str, inspection.QueueMarks] = {}
    places = {name: some[0] for name, some in parts.items() if len(some) > 1}  # schedules are in the first partition
    for names in directory.steps([*parts, *places.values()], _MARKS_SIZE):
        found = client.run(inspection.examine_queues([directory.key(one, "conf") for one in names]))
        marks.update(zip(names, found, strict=True))
    scheduled = {name: some[0] for name, some in parts.items() if marks[some[0]].has_schedules}
    _check_schedule_names(client, directory, scheduled, report)
    for name in [name for name in parts if marks[name].is_being_repartitioned]:
        text = f"queue '{name}' accepts nothing: a change of its partitions was not completed"
        report.add("queue", "problem", text, f"conveyor queue partition {name} N", "E34")
    _check_all_records(client, directory, parts, counts, report, seconds)
    if not client.address.single:
        _check_sizes(parts, counts, report)
    _note_queues(counts, report)
    if all(finding.name != "queue" for finding in report.findings):
        report.add("queue", "ok", f"{len(counts)} queue{'s' * (len(counts) != 1)}, none of them stuck")


def _check_all_records(
    client: Client, directory: QueueDirectory, parts: Mapping[str, Sequence[str]],
    counts: Mapping[str, QueueInfo], report: HealthReport, seconds: float | None,
) -> None:  # fmt: skip
    # Where time is short, other programs wait for the server too: it takes 10 us for each job.
    until, most = (None, _MAX_AUDITED) if seconds is None else (time.monotonic() + seconds, _AUDITED_JOBS)
    read = 0
    for names in _audited_together(parts, counts, most):
        if until is not None and time.monotonic() >= until:
            break
        small = [name for name in names if _jobs_of(counts[name]) <= most]
        read += len(small)
        places = [directory.keys(part) for name in small for part in parts[name]]
        for keys, problems in zip(places, client.run_each([inspection.audit(keys) for keys in places]), strict=True):
            _report_records(keys, problems, report)
    if until is not None and read < len(parts):
        text = f"the records of {read:,} of {len(parts):,} queues were examined, in the time that this may take"
        report.add("records", "note", text, "conveyor doctor examines all of them")


def _audited_together(
    parts: Mapping[str, Sequence[str]], counts: Mapping[str, QueueInfo], most: int
) -> Iterator[list[str]]:
    """Yield the queues that are examined in one round trip: small ones, so that it takes no longer than that of a large one."""
    names, places, jobs = list[str](), 0, 0
    for name in parts:
        more = jobs_of if (jobs_of := _jobs_of(counts[name])) <= most else 0
        if names and (places + len(parts[name]) > _AUDITED_PLACES or jobs + more > _AUDITED_JOBS):
            yield names
            names, places, jobs = [], 0, 0
        names.append(name)
        places, jobs = places + len(parts[name]), jobs + more
    if names:
        yield names


def _jobs_of(count: QueueInfo) -> int:
    return count.ready + count.scheduled + count.waiting + count.leased + count.dead


def _check_sizes(parts: Mapping[str, Sequence[str]], counts: Mapping[str, QueueInfo], report: HealthReport) -> None:
    for name, count in counts.items():
        size = (count.ready + count.scheduled + count.leased + count.dead) // len(parts[name])
        if size > LARGE_SLOT:
            text = f"queue '{name}' has {size:,} jobs in a slot: moving the slot blocks both nodes for about {2e-6 * size:.0f} s"
            report.add("queue", "warning", text, "Use more partitions, or move the slot when the queue is short.")


def _note_queues(counts: Mapping[str, QueueInfo], report: HealthReport) -> None:
    """Note queues that are paused, or have dead letters: those with most have a note each, and all others share one."""
    paused = [name for name, count in counts.items() if count.paused]
    for name in paused[:_MAX_NOTES]:
        report.add("queue", "note", f"queue '{name}' is paused", f"conveyor queue resume {name}")
    if rest := paused[_MAX_NOTES:]:
        report.add("queue", "note", f"{len(rest):,} more queues are paused", "conveyor queue list")
    dead = sorted((name for name, count in counts.items() if count.dead), key=lambda name: -counts[name].dead)
    for name in dead[:_MAX_NOTES]:
        text = f"queue '{name}' has {counts[name].dead:,} dead letter{'s' * (counts[name].dead > 1)}"
        report.add("queue", "note", text, f"conveyor job list --queue {name} --state dead")
    if rest := dead[_MAX_NOTES:]:
        total = sum(counts[name].dead for name in rest)
        report.add("queue", "note", f"{len(rest):,} more queues have {total:,} dead letters", "conveyor queue list")


def _report_records(keys: QueueKeys, problems: Sequence[tuple[str, str]], report: HealthReport) -> None:
    """Report jobs without a record, and what schedules and jobs lack."""
    _report_schedules(keys.queue, [(what, name) for what, name in problems if "schedule" in what], report)
    lasting = [name for what, name in problems if what == "no time to live"]
    if lasting:
        text = f"queue '{keys.queue}': {len(lasting):,} keys of jobs would stay for ever: {', '.join(lasting[:3])}"
        report.add("queue", "warning", text, f"EXPIRE {keys.prefix}{lasting[0]} 86400, and so on")
    missing = [id_ for what, id_ in problems if what.startswith("no envelope")]
    if missing:
        named = ", ".join(missing[:3])
        text = f"queue '{keys.queue}': the records of {len(missing):,} jobs are missing, so they will not run: {named}"
        report.add("queue", "problem", text, "The server may have evicted them. Enqueue them again.", "E10")


def _report_schedules(queue: str, problems: list[tuple[str, str]], report: HealthReport) -> None:
    """Report schedules that have no alarm, or one that is not theirs."""
    for what, name in problems[:_MAX_NAMED]:
        stopped = "alarm" in what and not what.startswith("alarm of")
        level: Level = "problem" if stopped or "gone" in what else "note"
        remedy = (
            f"conveyor schedule pause {name}, then conveyor schedule resume {name}" if stopped
            else f"conveyor schedule delete {name}, then declare it again" if "gone" in what
            else "The next worker that meets it takes it away."
        )  # fmt: skip
        report.add("schedule", level, f"queue '{queue}': {what}: {name}", remedy)


def _check_schedule_names(
    client: Client, directory: QueueDirectory, scheduled: Mapping[str, str], report: HealthReport
) -> None:
    """
    Look for schedules that stand in two queues, so that each instant comes twice, and for those that stand still.

    *scheduled*: the queues that have schedules, each with the partition that has them.
    """
    try:
        named = client.run(schedules.all_names(schedules.schedule_index(client.namespace)))
        found = {
            queue: client.run(schedules.read_schedules(directory.keys(part)))
            for queue, part in scheduled.items() if named
        }  # fmt: skip
    except ConfigurationError:
        return  # a user who may not read them
    for queue, (now, rows) in found.items():
        keys = directory.keys(scheduled[queue])
        for row in rows:
            if named.get(row.name, keys.queue) != keys.queue:
                text = f"schedule '{row.name}' of queue '{queue}' stands in queue '{named[row.name]}' too: each instant comes twice"
                report.add("schedule", "problem", text, "Delete it, and declare it for one of them again.")
        for flag in late_schedules([(queue, row) for row in rows], instant(now)):
            report.add("schedule", flag.level, flag.text, flag.remedy, flag.code)
