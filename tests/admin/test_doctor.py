"""The doctor: each thing that can be wrong with a server is found, named, and comes with what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conveyor.admin import doctor, server_checks
from conveyor.errors import StoreUnavailable
from conveyor.store import operations, schedules
from conveyor.store.client.client import Client
from conveyor.store.keys import known_queues
from support.client_worker import ClientWorker, dead, push
from testbed.server_process import Server

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be looked at")
Start = Callable[..., Server]


@pytest.fixture
def examine() -> Iterator[Callable[[str], doctor.HealthReport]]:
    backends: list[Client] = []

    def look(url: str) -> doctor.HealthReport:
        backends.append(Client(url, namespace="t", retry_for=1))
        return doctor.examine(backends[-1])

    yield look
    for backend in backends:
        backend.close()


def named(report: doctor.HealthReport, name: str) -> doctor.Finding:
    """Return the gravest finding of that name."""
    grave = ["problem", "warning", "note", "ok"]
    return min((f for f in report.findings if f.name == name), key=lambda f: grave.index(f.level))


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.standalone_only("a primary without replicas, and no node of a cluster")
def test_a_sound_server_is_healthy(url: str, examine: Callable[[str], doctor.HealthReport]) -> None:
    """A primary that evicts nothing is healthy; that it keeps jobs in memory only is a warning."""
    report = examine(url)

    assert report.healthy
    assert report.family in {"valkey", "redis"}
    assert 0 < report.latency_ms < 1000
    assert (report.durability, named(report, "durability").level) == ("memory", "warning")
    assert named(report, "eviction").level == "ok"
    assert named(report, "clock").level == "ok"
    assert named(report, "role").text == "primary, no replica"


@pytest.mark.parametrize(
    ("options", "durability"),
    [
        (("--appendonly", "yes"), "aof-everysec"),
        (("--appendonly", "yes", "--appendfsync", "always"), "aof-always"),
        (("--appendonly", "yes", "--appendfsync", "no"), "aof-os"),
        (("--save", "60 1"), "snapshots"),
    ],
)
def test_durability_is_said_in_words(
    start_server: Start, examine: Callable[[str], doctor.HealthReport], options: tuple[str, ...], durability: str
) -> None:
    """The durability really obtained is read from the server, not assumed."""
    report = examine(start_server(*options).url)

    assert report.durability == durability
    assert report.healthy
    finding = named(report, "durability")
    sure = durability in {"aof-everysec", "aof-always"}
    assert (finding.level == "warning") is not sure  # at least every second, or it is said what to set
    assert sure or "CONFIG SET append" in finding.remedy


@pytest.mark.row("C12")
@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_eviction_is_a_problem(start_server: Start, examine: Callable[[str], doctor.HealthReport], policy: str) -> None:
    """A server that may delete keys is unhealthy, with E10 and the command that mends it."""
    report = examine(start_server("--maxmemory", "100mb", "--maxmemory-policy", policy).url)

    finding = named(report, "eviction")
    assert not report.healthy
    assert (finding.level, finding.code) == ("problem", "E10")
    assert policy in finding.text
    assert "noeviction" in finding.remedy


@pytest.mark.parametrize(
    ("option", "value", "level", "says"),
    [
        ("timeout", "60", "note", "idle connections are closed after 60 s"),
        ("tcp-keepalive", "0", "warning", "connections of vanished machines stay open"),
        ("tcp-keepalive", "3600", "note", "stay open for that many seconds"),
        ("maxmemory-clients", "500000000", "note", "closes connections, of workers too"),
    ],
)
def test_settings_of_connections(
    start_server: Start, examine: Callable[[str], doctor.HealthReport], option: str, value: str, level: str, says: str
) -> None:
    """A server that closes quiet connections, or keeps those of the dead, is told of with what to set; one with defaults is not."""
    server = start_server()
    assert [one for one in examine(server.url).findings if one.name == "connections"] == []
    with server.client() as client:
        client.config_set(option, value)
    finding = named(examine(server.url), "connections")
    assert (finding.level, says in finding.text) == (level, True)
    assert finding.remedy.startswith(f"CONFIG SET {option} ")


@pytest.mark.parametrize(
    ("minimum", "lag", "says"),
    [("1", "10", None), ("1", "60", "60 s behind"), ("1", "0", "every replica"), ("0", "60", None)],
)
def test_lag_of_replicas(minimum: str, lag: str, says: str | None) -> None:
    """A replica that counts though it is far behind is told of."""
    facts = {
        "role": "master",
        "slave0": "ip=10.0.0.2,port=6379,state=online,offset=1,lag=0",
        "min_slaves_good_slaves": "1",
    }
    found = [one for one in server_checks.replication_findings(facts, minimum, lag) if "max-lag is" in one.text]
    assert [(one.level, one.remedy) for one in found] == [("note", "CONFIG SET min-replicas-max-lag 10")] * (
        says is not None
    )
    assert says is None or says in found[0].text


@pytest.mark.parametrize(
    ("family", "version", "patched"),
    [
        ("redis", "6.2.14", "6.2.20"), ("redis", "6.2.20", None), ("redis", "7.0.15", "7.2.11"), ("redis", "7.2.10", "7.2.11"),
        ("redis", "7.4.6", None), ("redis", "8.0.3", "8.0.4"), ("redis", "8.2.1", "8.2.2"), ("redis", "8.4.0", None),
        ("valkey", "7.2.10", "7.2.11"), ("valkey", "8.0.6", None), ("valkey", "8.1.3", "8.1.4"), ("valkey", "9.0.0", None),
    ],
)  # fmt: skip
def test_known_vulnerabilities(family: str, version: str, patched: str | None) -> None:
    """A release with a hole that any user with a script can use is known, with the first one without it."""
    assert server_checks.first_patched_release(family, version) == patched


@pytest.mark.parametrize("name", ["redis6", "redis7"])
def test_server_with_a_hole_is_a_warning(
    start_server: Start, examine: Callable[[str], doctor.HealthReport], name: str
) -> None:
    """The doctor names the hole of an old server, and the release to take."""
    report = examine(start_server(name=name).url)
    if server_checks.first_patched_release(report.family, report.version) is None:
        pytest.skip(f"{report.version} has none")
    finding = named(report, "version")
    assert (finding.level, "CVE-2025-49844" in finding.text) == ("warning", True)
    assert finding.remedy == f"Use {server_checks.first_patched_release(report.family, report.version)} or newer."


def test_full_memory_is_a_problem(start_server: Start, examine: Callable[[str], doctor.HealthReport]) -> None:
    """A server close to its maxmemory is unhealthy before it refuses anything."""
    server = start_server()
    with server.client() as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.03))

    report = examine(server.url)

    assert named(report, "memory").level == "problem"
    assert not report.healthy


def test_replica_is_a_problem(
    url: str, server: Server, start_server: Start, examine: Callable[[str], doctor.HealthReport]
) -> None:
    """A read-only replica is unhealthy; its primary is named, and a link to it that is down; what a push may ask there is not told."""
    replica = start_server()
    with replica.client() as client:
        client.replicaof("127.0.0.1", "1")

    report = examine(replica.url)

    finding = named(report, "role")
    assert (finding.level, finding.code) == ("problem", "E16")
    assert "127.0.0.1:1" in finding.remedy
    assert finding.text.startswith("this is a read-only replica, and its link to the primary is down")
    assert not [one for one in report.findings if "fsync=True" in one.text]


def test_what_this_user_may_not_ask_is_unknown(
    start_server: Start, examine: Callable[[str], doctor.HealthReport]
) -> None:
    """Where CONFIG and INFO are refused, the rest is examined and the gaps are said."""
    server = start_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "shy", "on", ">canary-of-shy", "~*", "&*", "+@all", "-config", "-info")

    report = examine(server.url.replace("unix://", "unix://shy:canary-of-shy@"))

    assert report.healthy
    assert report.durability == "unknown"
    assert named(report, "version").level == "warning"
    assert named(report, "eviction").level == "warning"
    assert "canary-of-shy" not in report.url


def test_config_alone_refused(start_server: Start, examine: Callable[[str], doctor.HealthReport]) -> None:
    """Where only CONFIG is refused, as at most providers, eviction and the append-only file are still known."""
    server = start_server("--appendonly", "yes")
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "shy", "on", ">canary-of-shy", "~*", "&*", "+@all", "-config")

    report = examine(server.url.replace("unix://", "unix://shy:canary-of-shy@"))

    assert report.durability == "aof-everysec"
    assert named(report, "eviction").level == "ok"


def test_stranded_jobs_are_a_problem(url: str, examine: Callable[[str], doctor.HealthReport]) -> None:
    """Ready jobs that no worker takes are a problem that names who works; dead letters and a pause are notes."""
    backend = Client(url, namespace="t", retry_for=1)
    dead(backend, "films", "no")
    push(backend, "mail", b"1")
    ClientWorker(backend, "mail")
    assert examine(url).healthy

    push(backend, "mial", b"1", b"2")
    report = examine(url)
    backend.close()

    (problem,) = report.problems
    assert problem.code == "E12"
    assert "'mial' has 2 jobs" in problem.text
    assert "Workers take: mail" in problem.text
    assert any("1 dead letter" in f.text and f.level == "note" for f in report.findings)


@pytest.mark.row("B10")
def test_schedules_are_looked_at(url: str, examine: Callable[[str], doctor.HealthReport]) -> None:
    """A schedule without its alarm, one in two queues and one that stands still are problems; one that is in order is none."""
    client = Client(url, namespace="t", retry_for=1)
    keys, other = client.keys("mail"), client.keys("films")
    for one in (keys, other):
        client.run(operations.announce(known_queues("t"), one.queue))
        ClientWorker(client, one.queue)
    hour = 3_600_000 + round(time.time() * 1000)
    for name in ("daily", "silent", "late"):
        client.run(schedules.claim_name(schedules.schedule_index("t"), name, "mail"))
        client.run(schedules.put_schedule(keys, name, name, b"{}", b"", "data", hour))
    assert examine(url).healthy

    client.execute("ZREM", keys.due, "\t\tsilent", key=keys.due)
    client.execute("HSET", keys.schedule("late"), "next", "1000", key=keys.due)
    client.run(schedules.put_schedule(other, "daily", "x", b"{}", b"", "data", hour))
    report = examine(url)
    client.close()

    texts = sorted(one.text for one in report.problems if one.name == "schedule")
    assert len(texts) == 4, texts  # the alarm of the one that is late was not moved with its instant
    for text, words in zip(
        texts,
        ["stands still", "alarm behind the instant", "schedule without an alarm", "each instant comes twice"],
        strict=True,
    ):
        assert words in text


def test_absent_server_raises(directory: Path, examine: Callable[[str], doctor.HealthReport]) -> None:
    """Where nothing listens there is no report but an error."""
    with pytest.raises(StoreUnavailable, match="nowhere"):
        examine(f"unix://{directory}/nowhere")


@pytest.mark.row("C42")
@pytest.mark.parametrize("name", ["valkey", "redis7"])
def test_no_advice_names_a_command_that_was_renamed_away(
    start_server: Start, examine: Callable[[str], doctor.HealthReport], name: str
) -> None:
    """Where the configuration takes CONFIG, INFO or ACL away, what to do is said without them."""
    options = ("--timeout", "60", "--tcp-keepalive", "0", "--maxmemory-policy", "allkeys-lru")
    plain = examine(start_server(*options, name=name).url)
    assert any(one.remedy.startswith("CONFIG SET") for one in plain.findings)

    for away in (("CONFIG",), ("CONFIG", "ACL"), ("CONFIG", "INFO"), ("CONFIG", "INFO", "ACL")):
        renamed = [word for command in away for word in ("--rename-command", command, "")]
        report = examine(start_server(*options, *renamed, name=name).url)
        remedies = "\n".join(one.remedy for one in report.findings)
        assert "CONFIG SET" not in remedies
        assert "+config" not in remedies
        assert ("+info" in remedies) is False or "INFO" not in away
        assert "ACL SETUSER" not in remedies or "ACL" not in away
        if "INFO" not in away:
            assert named(report, "eviction").remedy.startswith(
                "In its configuration file: maxmemory-policy noeviction."
            )


@pytest.mark.parametrize(
    ("remedy", "unknown", "instead"),
    [
        ("ACL SETUSER … +info +config|get", ["CONFIG"], "ACL SETUSER … +info"),
        ("ACL SETUSER … +info +config|get", ["ACL"], "In its configuration file or ACL file: user … +info +config|get"),
        ("ACL SETUSER … +info", ["INFO"], "INFO was renamed in the server's configuration"),
        ("CONFIG SET timeout 0", ["CONFIG"], "In its configuration file: timeout 0."),
        ("CONFIG SET timeout 0", ["ACL"], "CONFIG SET timeout 0"),
        ("Use 7.2 or newer.", ["CONFIG"], "Use 7.2 or newer."),
    ],
)
def test_advice_without_a_command(remedy: str, unknown: list[str], instead: str) -> None:
    """A remedy that needs a command which the server does not know is replaced, any other stays."""
    assert server_checks.remedy_without(remedy, unknown).startswith(instead)
