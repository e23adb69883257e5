"""Notifications of a worker to systemd, at a real socket."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from conveyor.worker.supervision.health import STANDS, ChildFacts, WorkerFacts
from conveyor.worker.supervision.systemd import ServiceManager
from support.shell import Shell

APP = """
import os, sys
from conveyor import Conveyor

app = Conveyor()
assert "NOTIFY_SOCKET" not in os.environ or "child_main" not in sys.argv[0]
@app.task
def send() -> None: ...
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


def told(listener: socket.socket, wanted: str) -> list[str]:
    """Return the lines that come until *wanted* is among them, it included."""
    lines: list[str] = []
    while wanted not in lines:
        lines += listener.recv(4096).decode().split("\n")
    return lines


def facts(state: str, *, turned: float | None = 0.1, passed: float = 0.1) -> WorkerFacts:
    return WorkerFacts("shop:app", "1", state, passed, [ChildFacts(1, 42, 0.1, turned, 15.0, True, None)])


def test_it_says_what_has_changed(manager: socket.socket) -> None:
    """READY comes once, when jobs are taken; the watchdog is told while a restart would mend nothing; stopping asks for time."""
    tells = ServiceManager(manager.getsockname(), 0.0, stop_within=34.0)
    tells.update(facts("running", turned=None))
    assert manager.recv(4096).decode() == "WATCHDOG=1\nSTATUS=shop:app: no process has registered yet"
    tells.update(facts("running"))
    assert manager.recv(4096).decode() == "READY=1\nWATCHDOG=1\nSTATUS=shop:app: takes jobs, 1 process"
    tells.update(facts("running", turned=60.0))
    assert "Redis does not answer" in manager.recv(4096).decode()
    tells.update(facts("running", passed=STANDS + 1))  # nothing is told
    tells.update(facts("stopping"))
    assert manager.recv(4096).decode().startswith("STOPPING=1\nEXTEND_TIMEOUT_USEC=34000000\nWATCHDOG=1")
    tells.close()


def test_variables_of_the_environment(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a socket nothing is told; the watchdog of another process is not this one's; nothing is passed on."""
    assert ServiceManager.of_environment(1.0) is None
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    found = ServiceManager.of_environment(1.0)
    assert found is not None
    assert "NOTIFY_SOCKET" not in os.environ
    found.update(facts("running"))
    assert "WATCHDOG" not in manager.recv(4096).decode()
    found.close()


def test_a_worker_tells_it(url: str, tmp_path: Path, manager: socket.socket) -> None:
    """A worker is ready when it takes jobs, lives on, and says that it stops; its children do not see the socket."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", APP)
    worker = shell.start("worker", "shop:app", NOTIFY_SOCKET=manager.getsockname(), WATCHDOG_USEC="400000")
    try:
        told(manager, "READY=1")
        assert "WATCHDOG=1" in told(manager, "WATCHDOG=1")
        worker.send_signal(signal.SIGTERM)
        assert "STOPPING=1" in told(manager, "STOPPING=1")
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.communicate()
