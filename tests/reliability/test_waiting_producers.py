"""Producers that wait for room while processes are killed, the server is restarted, a master fails over: rows C121 and C122."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from conveyor import Conveyor
from support.waiting import until
from testbed.server_groups import ClusterOfNodes, SentinelGroup
from testbed.server_process import Server

_PRODUCER = """
import sys
from conveyor import Conveyor
app = Conveyor(sys.argv[1])
app.queue("small", int, max_length=2, full="block").push(int(sys.argv[2]))
app.close()
"""


def small(app: Conveyor, **options: Any) -> Any:
    return app.queue("small", int, max_length=2, full="block", **options)


def take(queue: Any, count: int) -> list[int]:
    """Pull and acknowledge so many messages, one at a time; return their bodies."""
    bodies: list[int] = []

    def take_one() -> bool:
        for message in queue.pull(wait="20s"):
            bodies.append(message.body)
            message.ack()
        return len(bodies) >= count

    until(take_one, what=f"{count} messages")
    return bodies


def waiting(queue: Any, *numbers: int) -> list[threading.Thread]:
    """Begin a push in a thread for each number, one behind the other."""
    threads = []
    for number in numbers:
        blocked = queue.stats().blocked
        threads.append(threading.Thread(target=queue.push, args=(number,), daemon=True))
        threads[-1].start()
        until(lambda blocked=blocked: queue.stats().blocked > blocked)
    return threads


@pytest.mark.row("C121")
@pytest.mark.redis6
@pytest.mark.redis7
def test_killed_producers_hold_up_nobody(app: Conveyor, url: str) -> None:
    """Of producers in line some processes are killed: the others store in their order, at once, and nothing is left of the dead."""
    queue = small(app)
    queue.push_many([1, 2])
    processes = []
    for number in (3, 4, 5):
        processes.append(subprocess.Popen([sys.executable, "-c", _PRODUCER, url, str(number)]))
        until(lambda number=number: queue.stats().blocked == number - 2)
    threads = waiting(queue, 6)
    for process in (processes[0], processes[1]):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert take(queue, 4) == [1, 2, 5, 6]
    assert processes[2].wait(60) == 0
    threads[0].join(60)
    assert (len(queue), queue.stats().blocked) == (0, 0)


@pytest.mark.row("C121")
def test_a_frozen_producer_holds_up_the_others_for_a_moment(app: Conveyor, url: str) -> None:
    """A process that is frozen when it is called is passed over; when it wakes it stores, once."""
    queue = small(app)
    queue.push_many([1, 2])
    process = subprocess.Popen([sys.executable, "-c", _PRODUCER, url, "3"])
    until(lambda: queue.stats().blocked == 1)
    threads = waiting(queue, 4)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert take(queue, 2) == [1, 2]
        until(lambda: take_one(queue) == 4)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    threads[0].join(60)
    assert take(queue, 1) == [3]
    assert (len(queue), queue.stats().blocked) == (0, 0)


def take_one(queue: Any) -> int | None:
    """Pull what is there; each pull is a turn, which calls the next producer."""
    for message in queue.pull(wait="200ms"):
        message.ack()
        return int(message.body)
    return None


@pytest.mark.row("C122")
def test_a_restart_with_and_without_data_strands_nobody(start_server: Callable[..., Server]) -> None:
    """Producers that wait while Redis is restarted, with its data or empty, store when it is back."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with Conveyor(server.url) as app:
        queue = small(app)
        queue.push_many([1, 2])
        threads = waiting(queue, 3, 4)
        server.kill()
        server.start()
        until(lambda: queue.stats().blocked == 2)
        assert sorted(take(queue, 4)) == [1, 2, 3, 4]
        queue.push_many([1, 2])
        threads += waiting(queue, 5)
        with server.client() as client:
            client.flushall()
            client.client_kill_filter(_type="pubsub")
        assert take(queue, 1) == [5]
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.row("C122")
def test_a_failover_strands_nobody(sentinel_group: SentinelGroup) -> None:
    """Producers that wait while the master dies store at the new one."""
    with Conveyor(sentinel_group.url, timeout="30s") as app:
        queue = small(app, wait_replicas=1)
        queue.push_many([1, 2])
        threads = waiting(queue, 3)
        dead = sentinel_group.kill_master()
        until(lambda: queue.stats().blocked == 1)
        sentinel_group.mend(dead)
        assert sorted(take(queue, 3)) == [1, 2, 3]
        threads[0].join(60)
        assert not threads[0].is_alive()


@pytest.mark.row("C122")
def test_partitions_of_a_cluster_wake_their_own(cluster: ClusterOfNodes) -> None:
    """In a cluster each producer is woken at the node of its partition."""
    with Conveyor(cluster.url) as app:
        queue = app.queue("wide", int, max_length=6, full="block", partitions=6)
        queue.push_many(range(6))
        more = [threading.Thread(target=queue.push, args=(number,), daemon=True) for number in range(6, 12)]
        for thread in more:
            thread.start()
        until(lambda: queue.stats().blocked == 6)
        assert sorted(take(queue, 12)) == list(range(12))
        for thread in more:
            thread.join(60)
            assert not thread.is_alive()
