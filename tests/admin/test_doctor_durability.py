"""The doctor's findings about durability: `wait_replicas` and `fsync`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conveyor.admin import doctor
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability
from support.replica_pair import ReplicaPair
from testbed.server_process import Server

Start = Callable[..., Server]


def said(url: str, requests: dict[str, Durability] | None = None) -> tuple[doctor.HealthReport, list[tuple[str, str]]]:
    """Return the report on a server, and level and text of what it says of durability."""
    backend = Client(url, namespace="t", retry_for=1)
    report = doctor.examine(backend, durability_requests=requests)
    backend.close()
    return report, [(one.level, one.text) for one in report.findings if one.name == "durability"]


@pytest.mark.parametrize(
    ("name", "options", "fsync_works", "how"),
    [
        ("valkey", (), False, "its append-only file is off"),
        ("valkey", ("--appendonly", "yes"), True, "each call waits 1 to 2 s"),
        ("valkey", ("--appendonly", "yes", "--appendfsync", "always"), True, "WAITAOF confirms the sync"),
        ("redis7", ("--appendonly", "yes"), False, "older than 7.2"),
        ("redis6", ("--appendonly", "yes", "--appendfsync", "always"), True, "every reply confirms the sync"),
    ],
)
def test_how_a_sync_is_confirmed(
    start_server: Start, name: str, options: tuple[str, ...], fsync_works: bool, how: str
) -> None:
    """The doctor says whether fsync=True works, how, and if not, what to set."""
    report, lines = said(start_server(*options, name=name).url)
    assert report.fsync_works is fsync_works
    assert [how in text for _, text in lines].count(True) == 1, lines


def test_what_queues_ask_and_what_replicas_there_are(start_server: Start) -> None:
    """A queue that asks for more than there is is a problem, and so are min-replicas that nothing meets."""
    pair = ReplicaPair(start_server)
    with pair.primary.client() as client:
        assert ("note", "min-replicas-to-write is 0") in [
            (level, text[:26]) for level, text in said(pair.primary.url)[1]
        ]
        client.config_set("min-replicas-to-write", 1)
        requests = {"one": Durability(replicas=1), "two": Durability(replicas=2), "disk": Durability(fsync=True)}
        report, lines = said(pair.primary.url, requests)
        problems = [one for one in report.problems if one.name == "durability"]
        assert report.replicas == 1
        assert [(one.code, one.text.partition(",")[0]) for one in problems] == [
            ("E29", "queue 'two' asks for 2 replicas"),
            ("E36", "queue 'disk' asks for fsync: every push is refused"),
        ]
        assert any("queue 'one' asks for 1 replica: available" in text for _, text in lines)
        assert any("min-replicas-to-write is 1" in text and level == "ok" for level, text in lines)
        client.config_set("min-replicas-to-write", 2)
        _, lines = said(pair.primary.url)
        assert ("problem", "every push is refused") in [(level, text[-21:]) for level, text in lines]
    pair.close()
