"""
The HTTP endpoints of a worker for those that watch over it: `/livez`, `/readyz`, details at `/`, and reports on all queues
such as `/metrics` and `/load`.

They are served by the supervisor, from a thread of its own: it answers whatever jobs do to the children, and reads of
them in the shared memory.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from conveyor.errors import ConfigurationError, QueueNotFound
from conveyor.ids import clean
from conveyor.units import digits
from conveyor.worker.logs import LOG

STANDS = 10.0
"""Seconds without a pass of the supervisor's loop after which it counts as dead."""
LATE = 1.0
"""Seconds that a turn may come after a third of the lease: a machine may be busy."""
_READ_WITHIN = 5.0
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
Report = Callable[[Sequence[str]], tuple[str, str]]
"""Returns the content type and the text of an endpoint, for the queues that its query names; may raise QueueNotFound."""


class ChildFacts(NamedTuple):
    """One process of the worker: ages in seconds, None: not yet. `lease` is the shortest of its leases."""

    number: int
    pid: int
    ticked: float | None
    turned: float | None
    lease: float
    takes_jobs: bool
    job: tuple[str, str] | None


class WorkerFacts(NamedTuple):
    """A worker as its supervisor sees it. `passed`: seconds since the last pass of the supervisor's loop."""

    app: str
    version: str
    state: str
    passed: float
    children: Sequence[ChildFacts]


def not_live(facts: WorkerFacts) -> str:
    """Return why a worker must be started anew; "" while it lives."""
    return f"the supervisor has stood still for {facts.passed:.0f} s" if facts.passed > STANDS else ""


def not_ready(facts: WorkerFacts) -> str:
    """Return why a worker takes no jobs; "" while one of its processes has made a turn within a third of its lease."""
    if facts.state != "running":
        return f"it is {facts.state}"
    if why := not_live(facts):
        return why
    if not facts.children:
        return "no process is up"
    taking = [child for child in facts.children if child.takes_jobs and child.turned is not None]
    if not taking:
        return "no process has registered yet"
    if not any(child.turned is not None and child.turned <= child.lease / 3 + LATE for child in taking):
        latest = min(child.turned or 0.0 for child in taking)
        return f"no turn for {latest:.1f} s: Redis does not answer, or a job blocks the event loop"
    return ""


def bind(address: str) -> socket.socket:
    """Return a socket that is bound to *address*, ``8080`` or ``127.0.0.1:8080``; raises ConfigurationError."""
    host, _, text = address.rpartition(":")
    if (port := digits(text)) is None or port > 65535:
        raise ConfigurationError(f"--health-port takes a port, such as 8080 or 127.0.0.1:8080, not {address!r}.")
    try:
        return socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(
            f"The health endpoints cannot be served at {address}: {error.strerror or error}. Choose another --health-port."
        ) from error


class HealthServer:
    """Serves the endpoints at a bound socket, from a daemon thread."""

    def __init__(self, sock: socket.socket, facts: Callable[[], WorkerFacts], reports: Mapping[str, Report]) -> None:
        """
        Args:
            sock: from `bind`.
            facts: returns what is known of the worker now.
            reports: what answers further paths, such as `/metrics`.
        """
        self._socket, self._facts, self._reports = sock, facts, reports
        threading.Thread(target=self._run, name="conveyor-health", daemon=True).start()

    @property
    def address(self) -> str:
        """Where it serves, for people."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{host if ':' not in host else f'[{host}]'}:{port}/"

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            LOG.exception("The health endpoints have ended")

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, sock=self._socket, limit=8192)
        async with server:
            await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_WITHIN):
                method, target, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode("ascii").split(" ")
            status, kind, body = await self._respond(method, *target.partition("?")[::2])
            length = f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close"
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
            writer.write(head.encode() + (b"" if method == "HEAD" else body))
            await writer.drain()
        except (OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError):
            pass  # no HTTP, or the other end is gone
        finally:
            writer.close()

    async def _respond(self, method: str, path: str, query: str) -> tuple[str, str, bytes]:
        if method not in {"GET", "HEAD"}:
            return "405 Method Not Allowed", _TEXT, b"GET only\n"
        if path in self._reports:
            try:
                kind, text = await asyncio.to_thread(self._reports[path], parse_qs(query).get("queue", []))
                return "200 OK", kind, text.encode()
            except QueueNotFound as error:
                return "404 Not Found", _TEXT, f"{clean(str(error))}\n".encode()
            except Exception as error:
                return "503 Service Unavailable", _TEXT, f"{clean(str(error))}\n".encode()
        facts = self._facts()
        if path in {"/livez", "/readyz"}:
            why = not_live(facts) if path == "/livez" else not_ready(facts)
            return ("503 Service Unavailable", _TEXT, f"{why}\n".encode()) if why else ("200 OK", _TEXT, b"ok\n")
        if path in {"/", "/health"}:
            return "200 OK", _JSON, json.dumps(_document(facts), indent=2).encode()
        return (
            "404 Not Found",
            _TEXT,
            f"There are {', '.join(['/livez', '/readyz', '/health', *self._reports])}.\n".encode(),
        )


def _document(facts: WorkerFacts) -> dict[str, Any]:
    why, dead = not_ready(facts), not_live(facts)
    return {
        "schema": "conveyor/worker-health@1", "live": not dead, "ready": not why, "reason": why, "state": facts.state,
        "app": facts.app, "version": facts.version,
        "processes": [
            {
                "number": one.number, "pid": one.pid, "seconds_since_loop": one.ticked, "seconds_since_turn": one.turned,
                "lease_seconds": one.lease, "takes_jobs": one.takes_jobs,
                "running_on_loop": None if one.job is None else {"task": one.job[0], "id": one.job[1]},
            }
            for one in facts.children
        ],
    }  # fmt: skip


def age(at: float) -> float | None:
    """Return the seconds since *at* (monotonic); None for 0.0."""
    return round(max(0.0, monotonic() - at), 3) if at else None
