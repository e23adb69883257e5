"""
The service manager's notifications (sd_notify): ready, status, watchdog, stopping.

They are datagrams to the socket that the environment names; without one nothing is done.
"""

from __future__ import annotations

import os
import socket
from time import monotonic
from typing import TYPE_CHECKING

from conveyor.worker.logs import LOG
from conveyor.worker.supervision.health import not_live, not_ready

if TYPE_CHECKING:
    from conveyor.worker.supervision.health import WorkerFacts

_STATUS_EVERY = 1.0
"""Seconds between two texts of the status: they are for people."""


class ServiceManager:
    """Tells systemd how a worker is. `stop_within`: seconds that a stop may take, which are asked for when it begins."""

    def __init__(self, address: str, watchdog: float | None, stop_within: float) -> None:
        """Create the socket; *address* is a path, or an abstract name behind ``@``. *watchdog*: seconds, None: there is none."""
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._pet_every = None if watchdog is None else watchdog / 2
        self._stop_within = stop_within
        self._status, self._told_at, self._pet_at = "", 0.0, 0.0
        self._is_ready = self._is_stopping = False

    @classmethod
    def of_environment(cls, stop_within: float) -> ServiceManager | None:
        """Return the one that started this process, None without one. Its variables are not passed on to children."""
        address, every, pid = (os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        if not address.startswith(("/", "@")):
            return None
        own = every.isdigit() and int(every) > 0 and pid in {"", str(os.getpid())}
        return cls(address, int(every) / 1e6 if own else None, stop_within)

    def update(self, facts: WorkerFacts) -> None:
        """
        Tell what has changed: READY when the worker takes jobs for the first time, STATUS, STOPPING, and that it lives.

        It lives as long as a restart would mend nothing: an outage of Redis is said in the status, and stops no worker.
        """
        now, why = monotonic(), not_ready(facts)
        lines: list[str] = []
        if not why and not self._is_ready:
            self._is_ready = True
            lines.append("READY=1")
        if facts.state == "stopping" and not self._is_stopping:
            self._is_stopping = True
            lines += ["STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(self._stop_within * 1e6)}"]
        if self._pet_every is not None and now - self._pet_at >= self._pet_every and not not_live(facts):
            self._pet_at = now
            lines.append("WATCHDOG=1")
        status = f"{facts.app}: {why or _running(len(facts.children))}"
        if status != self._status and (lines or now - self._told_at >= _STATUS_EVERY):
            self._status, self._told_at = status, now
            lines.append(f"STATUS={status}")
        if lines:
            self._send("\n".join(lines))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, text: str) -> None:
        try:
            self._socket.sendto(text.encode(errors="replace"), self._address)
        except OSError as error:  # it does not read just now, or is gone: a worker works without
            LOG.debug("systemd could not be told %s: %s", text.replace("\n", " "), error)


def _running(processes: int) -> str:
    return f"takes jobs, {processes} process{'es' * (processes != 1)}"
