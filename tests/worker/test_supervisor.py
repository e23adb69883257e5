"""Supervisors, children and signals, with real processes on a real server."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.supervisor_process import KEYS, Queue, SupervisorProcess, running
from support.waiting import until
from testbed.server_process import Server

LEASE_MS = 1000
FAR_LEASE_MS = "3600000"
"""No test lasts until its end, so whatever comes back was given back."""
NEVER = b"/no such file"


@pytest.fixture
def queue(url: str) -> Iterator[Queue]:
    made = Queue(url)
    yield made
    made.purge()
    made.client.close()


@pytest.fixture
def supervise(tmp_path: Path, queue: Queue) -> Iterator[Callable[..., SupervisorProcess]]:
    """Start supervisors; those left after the test are killed before the queue is purged."""
    started: list[SupervisorProcess] = []

    def start(url: str, env: dict[str, str] | None = None, **options: Any) -> SupervisorProcess:
        started.append(SupervisorProcess(url, tmp_path / f"log{len(started)}", env or {}, **options))
        return started[-1]

    yield start
    for one in started:
        children = one.children() if one.process.poll() is None else []
        one.process.kill()
        one.process.wait()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print(one.log)


@pytest.mark.row("A1", "A7")
def test_killed_child_loses_nothing(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """Jobs of a child killed with SIGKILL are ready again long before its lease ends, a new child takes them, its sibling goes on."""
    one = supervise(url, processes=2, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    queue.push("hold", 40)
    before = queue.busy(20, 20)
    victim, sibling = before
    lost, kept = queue.held(before[victim].worker), queue.held(before[sibling].worker)

    os.kill(victim, signal.SIGKILL)
    until(lambda: before[victim].worker not in {member.worker for member in queue.workers()})
    after = queue.by_pid(20, 20)

    assert victim not in after
    assert after[sibling].worker == before[sibling].worker
    assert queue.held(before[sibling].worker) == kept
    assert queue.held(next(m.worker for pid, m in after.items() if pid != sibling)) == lost
    assert (queue.crashes(lost), queue.crashes(kept)) == ({1}, {0})
    assert re.search(rf"\(pid {victim}\) was killed by SIGKILL \(.*\); returned 20 jobs in \d+ ms", one.log)
    assert len(one.children()) == 2
    assert queue.is_sound()


@pytest.mark.row("A3")
def test_stopped_child_keeps_its_jobs(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """A child frozen for three leases still holds its jobs, and goes on with them when it is thawed."""
    one = supervise(url)
    ids = queue.push("hold", 5)
    ((pid, member),) = queue.by_pid(5).items()
    until(lambda: "The lease guard is connected" in one.log)
    before = len(one.log)  # a busy machine may have held up its start
    os.kill(pid, signal.SIGSTOP)
    frozen = int(time.time() * 1000)  # the server's clock is this machine's
    until(lambda: queue.workers()[0].end > frozen + 4.3 * LEASE_MS)  # renewed for three leases and more
    until(lambda: "has not run for" in one.log[before:])
    os.kill(pid, signal.SIGCONT)
    told = until(lambda: "runs again after" in (text := one.log[before:]) and text).partition("runs again after")[0]

    assert queue.held(member.worker) == set(ids)
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert queue.crashes(ids) == {0}
    assert (told.count("has not run for"), told.count("E11")) == (1, 0)


@pytest.mark.row("A5", "A6")
@pytest.mark.parametrize("task", ["block", "clutch"])
def test_blocked_loop_is_named_and_keeps_its_lease(
    task: str, supervise: Callable[..., SupervisorProcess], queue: Queue, url: str, tmp_path: Path
) -> None:
    """A job that blocks the loop, or holds the GIL, for two leases keeps its own, and the log says which, and where it stood."""
    one = supervise(url)
    until(lambda: "The lease guard is connected" in one.log)
    go = tmp_path / "go"
    queue.push(task, body=bytes(go))
    until(lambda: queue.counts().leased == 1)
    until(lambda: "has blocked its event loop" in one.log)
    blocked = int(time.time() * 1000)
    until(lambda: queue.workers()[0].end > blocked + 3 * LEASE_MS)  # renewed for two leases and more
    assert queue.counts().leased == 1
    go.touch()
    until(lambda: queue.counts().leased == 0)

    assert int(queue.client.execute("HLEN", KEYS.jobs, key=KEYS.jobs)) == 0
    until(lambda: "runs again after" in one.log)
    assert re.search(rf"E11 .* has blocked its event loop for \d+\.\d s in {task} \(\S+\)", one.log)
    assert re.search(r'stub_worker\.py", line \d+ in work', one.log)
    assert one.log.count("E11") == 1


@pytest.mark.row("A5")
def test_stall_without_end_is_ended(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """A child that blocks beyond max_stall is killed, its jobs are charged with a crash and taken by the next."""
    one = supervise(url, max_stall=1.5, env={"STUB_WANT": "1"})
    (id_,) = queue.push("block", body=NEVER)
    (pid,) = queue.by_pid(1)
    until(lambda: not running(pid))
    until(lambda: [m.held for m in queue.workers() if m.about["pid"] != pid] == [1])

    assert queue.crashes([id_]) == {1}
    assert re.search(r"was killed after blocking its event loop for \d+ s in block \(\S+\); returned 1 job in", one.log)
    one.process.kill()
    until(lambda: queue.counts().leased == 0 or "drains and ends" in one.log)


@pytest.mark.row("A7")
def test_orphans_drain_and_end(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """When the supervisor is killed its children give back their jobs uncharged and end, also one whose loop is blocked."""
    one = supervise(url, processes=2, grace=2.5, env={"STUB_LEASE_MS": "700", "STUB_WANT": "1"})
    ids = queue.push("hold") + queue.push("block", body=NEVER)
    pids = list(queue.by_pid(1, 1))
    until(lambda: "E11" in one.log)
    one.process.kill()
    until(lambda: sum(running(pid) for pid in pids) == 1)
    ends = set[int]()
    while any(running(pid) for pid in pids):
        found = queue.counts()  # once: a job may go from one place to the other between two looks
        assert found.ready + found.leased == 2
        ends.update(member.end for member in queue.workers())
        time.sleep(0.02)

    assert len(ends) > 1  # its lease was renewed while its loop stood still
    assert queue.counts().leased == 0
    assert queue.crashes(ids) == {0}
    assert queue.is_sound()


@pytest.mark.row("A10")
def test_stop_is_orderly(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """After SIGTERM what runs is finished, what only waits is given back uncharged, and the exit code is 0."""
    one = supervise(url, processes=2, grace=600.0)
    waiting, short = queue.push("hold", 20), queue.push("sleep", 20, body=b"0.7")
    queue.by_pid(20, 20)
    one.signal(signal.SIGTERM)

    assert one.wait() == 0  # long before its grace is over
    counts = queue.counts()
    assert (counts.ready, counts.leased, counts.workers) == (20, 0, 0)
    assert queue.crashes(waiting + short) == {0}
    assert queue.is_sound()


@pytest.mark.row("A10")
def test_stop_ends_what_outlives_its_grace(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """A child that does not end within its grace is killed, its jobs come back without a crash, and the exit code is 0."""
    one = supervise(url, grace=0.2, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    ids = queue.push("block", body=NEVER) + queue.push("hold", 3)
    queue.by_pid(4)
    stopped = one.signal(signal.SIGTERM)

    assert one.wait() == 0
    assert time.monotonic() - stopped > 2.0
    assert (queue.counts().ready, queue.counts().leased) == (4, 0)
    assert queue.crashes(ids) == {0}
    assert queue.starts(ids) == {1}  # they may have begun: the next attempt must be seen as another one
    assert "after its grace; returned 4 jobs" in one.log


@pytest.mark.row("A10")
def test_second_signal_hurries(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """A second SIGINT does not wait for the grace to pass; children have process groups of their own."""
    one = supervise(url, grace=600.0)
    ids = queue.push("sleep", 3, body=b"600")
    ((pid, member),) = queue.by_pid(3).items()
    assert member.about["group"] == pid != os.getpgid(one.pid)
    one.signal(signal.SIGINT)
    until(lambda: "Stopping" in one.log)
    assert one.process.poll() is None
    one.signal(signal.SIGINT)

    assert one.wait() == 0
    assert (queue.counts().ready, queue.counts().leased) == (3, 0)
    assert queue.crashes(ids) == {0}


def test_hopeless_start_is_given_up(supervise: Callable[..., SupervisorProcess], url: str) -> None:
    """When no child comes up five times in a row the supervisor says so and exits with 1."""
    one = supervise(url, app="broken:app")

    assert one.wait(120) == 1
    assert one.log.count("Cannot start the worker of broken:app") == 5
    assert "Giving up: 5 worker processes for 'broken:app'" in one.log
    assert "importing it failed" in one.log


@pytest.mark.standalone_only("stops the process of one server")
def test_child_that_dies_while_redis_hangs(
    supervise: Callable[..., SupervisorProcess], queue: Queue, server: Server, url: str
) -> None:
    """A hanging Redis does not keep a dead child from being replaced; its jobs return when Redis answers."""
    one = supervise(url, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    ids = queue.push("hold", 5)
    ((pid, member),) = queue.busy(5).items()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: [child for child in one.children() if child != pid and running(child)])
        os.kill(one.children()[0], signal.SIGKILL)
        assert until(lambda: one.log.count("Started worker child 1") == 3)
    finally:
        os.kill(server.pid, signal.SIGCONT)

    until(lambda: [m.held for m in queue.workers() if m.worker != member.worker] == [5])
    assert len(queue.workers()) == 1
    assert queue.crashes(ids) == {1}


def test_child_that_dies_while_redis_is_down(
    supervise: Callable[..., SupervisorProcess], start_server: Callable[..., Server]
) -> None:
    """The jobs of a child that died while Redis was away are returned when it is back, and the supervisor lives through it."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    queue = Queue(server.url)
    one = supervise(server.url, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    ids = queue.push("hold", 5)
    ((pid, member),) = queue.busy(5).items()
    server.kill()
    os.kill(pid, signal.SIGKILL)
    until(lambda: "Cannot reach Redis" in one.log)
    server.start()

    until(lambda: member.worker not in {m.worker for m in queue.workers()})
    queue.by_pid(5)
    assert queue.crashes(ids) == {1}
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert (queue.counts().ready, queue.counts().leased) == (5, 0)
    queue.client.close()


@pytest.mark.row("A11")
def test_stop_without_redis(supervise: Callable[..., SupervisorProcess], start_server: Callable[..., Server]) -> None:
    """A stop while Redis is down waits neither for Redis nor for jobs that do not end."""
    server = start_server()
    queue = Queue(server.url)
    one = supervise(server.url, grace=0.2)
    queue.push("hold", 5)
    queue.by_pid(5)
    server.kill()
    one.signal(signal.SIGTERM)

    assert one.wait() == 0
    assert "the last jobs of this worker come back when their leases end" in one.log
    queue.client.close()


def test_burst_ends_when_drained(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """With --burst a killed child is replaced, everything is drained all the same, and the exit code is 0."""
    one = supervise(url, processes=2, burst=True, env={"STUB_LEASE_MS": FAR_LEASE_MS, "STUB_WANT": "10"})
    queue.push("sleep", 60, body=b"0.3")
    pids = list(queue.by_pid(10, 10))
    os.kill(pids[0], signal.SIGKILL)

    assert one.wait() == 0
    assert int(queue.client.execute("HLEN", KEYS.jobs, key=KEYS.jobs)) == 0
    assert re.search(r"was killed by SIGKILL \(.*\); returned", one.log)


def test_the_shortest_burst_introduces_itself(
    supervise: Callable[..., SupervisorProcess], queue: Queue, url: str
) -> None:
    """A worker says what it works for even when its child has come up and ended before anybody looked."""
    one = supervise(url, burst=True)
    [child] = until(one.children)
    one.signal(signal.SIGSTOP)
    until(lambda: not running(child))
    one.signal(signal.SIGCONT)

    assert one.wait() == 0
    assert "works for support.stub_worker:app until everything is drained" in one.log


@pytest.mark.row("A8")
@pytest.mark.parametrize("code", [0, 75])
def test_a_job_that_exits_is_a_crash(
    supervise: Callable[..., SupervisorProcess], queue: Queue, url: str, code: int
) -> None:
    """A job that ends its process with the exit code of an orderly end is charged with a crash all the same."""
    one = supervise(url, env={"STUB_LEASE_MS": FAR_LEASE_MS, "STUB_WANT": "1"})
    [poison] = queue.push("exit", body=str(code).encode())

    assert until(lambda: queue.crashes([poison]) == {1})
    one.signal(signal.SIGTERM)
    assert one.wait() == 0


def test_recycled_child_is_replaced_without_blame(
    supervise: Callable[..., SupervisorProcess], queue: Queue, url: str
) -> None:
    """A child that exits with 75 is replaced, and jobs it may have left come back uncharged."""
    one = supervise(url, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    ids = queue.push("hold", 3)
    (pid,) = queue.by_pid(3)
    queue.push("recycle")
    until(lambda: "to be replaced by a fresh one" in one.log)
    until(lambda: [m for m in queue.workers() if m.about["pid"] != pid and m.held == 3])

    assert queue.crashes(ids) == {0}
    assert "SIG" not in one.log


def test_quiet_and_stacks(supervise: Callable[..., SupervisorProcess], queue: Queue, url: str) -> None:
    """SIGUSR2 writes the stacks of all threads and tasks; after SIGUSR1 nothing is leased, by a restarted child neither."""
    one = supervise(url)
    queue.push("hold", 2)
    (pid,) = queue.by_pid(2)
    one.signal(signal.SIGUSR2)
    for stack in (r'child_main\.py", line \d+ in main', r"name='hold' (.*\n)+?.*in work"):
        # The log is written line by line.
        until(lambda stack=stack: re.search(stack, one.log.partition("worker child 1 (pid ")[2]))
    one.signal(signal.SIGUSR1)
    until(lambda: "Quiet" in one.log)
    until(lambda: queue.workers()[0].held == 2)
    os.kill(pid, signal.SIGKILL)
    until(lambda: queue.counts().ready == 2)
    queue.by_pid(0)
    queue.push("noop")
    end = queue.workers()[0].end
    until(lambda: queue.workers()[0].end > end + 300)  # it went on making turns meanwhile
    assert (queue.counts().ready, queue.counts().leased) == (3, 0)


def test_embedded_server_outlives_its_only_child(supervise: Callable[..., SupervisorProcess], directory: Path) -> None:
    """With the embedded server the supervisor is a user of it too: the server does not stop with the last child."""
    url = f"embedded:{directory / 'project'}"
    one = supervise(url, env={"STUB_LEASE_MS": FAR_LEASE_MS})
    until(lambda: "The lease guard is connected" in one.log, 30)
    queue = Queue(url)
    ids = queue.push("hold", 5)
    (pid,) = queue.busy(5)
    info = queue.client.execute("INFO", "server")
    queue.client.close()
    os.kill(pid, signal.SIGKILL)
    until(lambda: "returned 5 jobs" in one.log)
    queue = Queue(url)
    queue.by_pid(5)

    assert queue.crashes(ids) == {1}
    run_id = re.compile(rb"run_id:(\w+)")
    assert run_id.findall(bytes(queue.client.execute("INFO", "server"))) == run_id.findall(bytes(info))
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    queue.client.close()
