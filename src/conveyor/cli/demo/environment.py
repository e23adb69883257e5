"""The surroundings of a demo: a private directory, a server, the workers, and their removal."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import conveyor
from conveyor.cli.demo import cleanup
from conveyor.errors import ConfigurationError

if TYPE_CHECKING:
    from conveyor.jobs.app import Conveyor

_STOP_SECONDS = 10.0
"""Seconds for workers to stop: their grace of 5 s, and the force that follows it."""


class DemoEnvironment:
    """
    The directory, server and processes of one demo.

    `close` removes all of them; so does a SIGKILL of this process.
    """

    def __init__(self, url: str | None) -> None:
        if url is not None:
            _refuse_several_servers(url)
        self.directory = Path(tempfile.mkdtemp(prefix="conveyor-demo-"))
        self.namespace = f"demo-{secrets.token_hex(4)}"
        self.url = f"embedded:{self.directory / cleanup.SERVER}" if url is None else url
        self.journal = self.directory / cleanup.JOURNAL
        self.journal.touch()
        self.log = self.directory / "worker.log"
        self.server, self.server_ms = "", 0.0
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.app: Conveyor | None = None
        pictures = self.directory / "pictures"
        pictures.mkdir()
        self._environment = {
            "CONVEYOR_URL": self.url, "CONVEYOR_DEMO_NAMESPACE": self.namespace,
            "CONVEYOR_DEMO_JOURNAL": str(self.journal), "CONVEYOR_DEMO_PICTURES": str(pictures),
        }  # fmt: skip
        os.environ.update(self._environment)  # the demo's app reads them when it is imported, later
        request = cleanup.CleanupRequest(directory=str(self.directory), url=url, namespace=self.namespace)
        read_end, self._write_end = os.pipe()  # it reads until no process holds the other end
        self._cleanup_process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", *(["-I", "-S"] if url is None else []), cleanup.__file__, json.dumps(request)],
            stdin=read_end, env=self._child_environment(), start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(read_end)

    def start_workers(self, processes: int) -> None:
        """Start the supervisor of the workers; return at once."""
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "conveyor.cli.demo.worker_processes", str(processes)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._child_environment(), pass_fds=(self._write_end,),
                start_new_session=True,  # ctrl-C reaches only this process
            )  # fmt: skip

    def start_server(self) -> Conveyor:
        """
        Start or reach the server; return the demo's app.

        Raises StoreUnavailable, ConfigurationError.
        """
        from conveyor.cli.demo import task

        assert task.app.namespace == self.namespace, (
            "the demo's app was imported before its environment variables were set"
        )
        began = time.perf_counter()
        self.app = task.app
        self.app.client.retry_for = 2.0
        facts = _server_facts(self.app)
        self.server_ms = 1000 * (time.perf_counter() - began)
        attachment = self.app.client.server_handle
        name = "Valkey" if "valkey_version" in facts else "Redis"
        number = facts.get("valkey_version", facts.get("redis_version", "?"))
        where = "embedded, unix socket" if attachment is not None else str(self.app.client.address)
        self.server = f"{name} {number} ({where}, {self.server_ms:.0f} ms)"
        return self.app

    def stop_workers(self) -> None:
        """Stop the workers: running jobs may finish, the others are handed back."""
        supervisor = self.supervisor
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        supervisor.stdin.close()  # the workers stop when their standard input ends
        try:
            supervisor.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(supervisor.pid, signal.SIGKILL)  # its children notice its death and end
            supervisor.wait()

    def close(self) -> None:
        """Stop all processes and wait until everything is removed."""
        self.stop_workers()
        if self.app is not None:
            from conveyor.cli.demo import task

            task.journal.close()
            self.app.close()
        os.close(self._write_end)
        try:
            self._cleanup_process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return  # it finishes without this process

    def _child_environment(self) -> dict[str, str]:
        # The same package as in this process, and no module of the working directory in its place.
        package = str(Path(conveyor.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(paths)}


def _server_facts(app: Conveyor) -> dict[str, str]:
    reply = app.client.execute("INFO", "server")
    text = reply.decode() if isinstance(reply, bytes) else str(reply)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _refuse_several_servers(url: str) -> None:
    """
    Raise ConfigurationError for a cluster or sentinels.

    One producer of the demo knows only RPUSH, and needs one server.
    """
    from conveyor.store.transport.topology import topology_of
    from conveyor.store.transport.url import StandaloneServer, masked

    if not isinstance(topology_of(url), StandaloneServer):
        raise ConfigurationError(
            f"conveyor demo needs a single server, and {masked(url)} is a cluster or sentinels. Use redis://host:6379/0, or leave "
            "--url out: then it starts a server of its own. Nothing was started."
        )
