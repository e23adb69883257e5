"""Several steps that only read, in one round trip."""

from __future__ import annotations

from contextlib import closing

import pytest
from redis import Redis

from conveyor.admin.admin import Admin
from conveyor.store import inspection
from conveyor.store.client.client import Client
from conveyor.store.transport.connection import Connection
from support.client_worker import push

pytestmark = [
    pytest.mark.leaves_keys("jobs are pushed here to be looked at"),
    pytest.mark.standalone_only("counts the round trips to one server"),
]
MANY = 120


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of commands in each write to a server."""
    found, send = list[int](), Connection._send

    def counted(self: Connection, commands):  # type: ignore[no-untyped-def]
        found.append(len(commands))
        return send(self, commands)

    monkeypatch.setattr(Connection, "_send", counted)
    return found


def test_steps_that_read_share_a_round_trip(url: str, writes: list[int]) -> None:
    """Each step has its own answer, in their order, after one write."""
    with closing(Client(url, namespace="t", retry_for=1)) as client:
        for number in range(5):
            push(client, f"q{number}", *[b"1"] * number)
        calls = [inspection.counts(client.keys(f"q{number}")) for number in range(5)]
        client.run_each(calls)
        writes.clear()
        assert [one.ready for one in client.run_each(calls)] == [0, 1, 2, 3, 4]
        assert writes == [5]
        assert client.run_each([]) == []


def test_what_fails_is_repeated_by_itself(url: str, redis: Redis, writes: list[int]) -> None:
    """Scripts that a server has forgotten are loaded, and a connection that was cut is opened again: every step is answered."""
    with closing(Client(url, namespace="t", retry_for=5)) as client:
        push(client, "mail", b"1")
        calls = [inspection.counts(client.keys("mail"))] * 3
        assert [one.ready for one in client.run_each(calls)] == [1] * 3
        redis.script_flush()
        assert [one.ready for one in client.run_each(calls)] == [1] * 3
        writes.clear()
        assert [one.ready for one in client.run_each(calls)] == [1] * 3
        assert writes == [3]
        redis.execute_command("CLIENT", "KILL", "SKIPME", "yes")
        assert [one.ready for one in client.run_each(calls)] == [1] * 3


def test_the_doctor_and_the_limits_of_many_queues_take_few_round_trips(url: str, writes: list[int]) -> None:
    """The records of fifty small queues are examined in one round trip; queues without limits are asked for none."""
    with closing(Client(url, namespace="t", retry_for=1)) as client:
        for number in range(MANY):
            push(client, f"tenant-{number:03}", b"1")
        admin = Admin(client)
        admin.doctor()
        writes.clear()
        admin.doctor()
        assert sorted(writes)[-3:] == [20, 50, 50]
        assert len(writes) < 40
        writes.clear()
        assert admin.queues_with_limits() == []
        assert len(writes) <= 4
