"""
The zero-setup server: a real Valkey or Redis for one project, shared by its processes.

`attach` starts it or finds it, and holds a shared lock on the data directory for as long as the attachment lives. A
keeper process (`keeper.py`) stops the server when the last holder is gone; the data stays for the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store.embedded import keeper
from conveyor.store.embedded.binary import numbers, server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["ServerHandle", "ServerStatus", "attach", "inspect", "project_directory", "server_binary", "stop"]

KEEPER = Path(keeper.__file__)

_POLL = 0.01  # seconds between two looks at a lock or at a starting server
_LOG_LIMIT = 1_000_000  # bytes of server.log kept from one start to the next
_SOCKET_PATH_LIMIT = 100  # bytes; the kernel's limit is 107 on Linux and 103 on macOS


class _SharedLock:
    """A shared lock, held through one descriptor; a forked child shares it, an executed program does not inherit it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # never LOCK_UN: that would take the lock from forked processes as well


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """One user's hold on the server; the server lives at least as long. A context manager; `close` may be repeated."""

    url: str
    pid: int
    directory: Path
    started: bool
    version: str
    _hold: _SharedLock = field(repr=False, compare=False)

    def close(self) -> None:
        """Let go; the keeper stops the server when nobody else holds it."""
        self._hold.close()

    def __enter__(self) -> ServerHandle:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go."""
        self.close()


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What is known of a project's server: `size` is its data in bytes; `pid` and `url` are None when none runs."""

    running: bool
    url: str | None
    pid: int | None
    family: str
    version: str
    directory: Path
    size: int


def attach(directory: Path | None = None, *, wait: float = 10.0) -> ServerHandle:
    """
    Hold the server of *directory* (a `.conveyor`, by default the project's), starting it when none runs.

    *wait* is in seconds; loading old data does not count. Raises ConfigurationError when there is no server program,
    the directory cannot be used, or another family or a newer version wrote its data; StoreUnavailable, with the last
    lines of the log, when the server does not start or is not ready in time.
    """
    place = _resolve(directory)
    deadline = time.monotonic() + wait
    with _usable(place):
        place.mkdir(parents=True, exist_ok=True)
        if not (place / ".gitignore").exists():
            (place / ".gitignore").write_text("*\n")
        hold = _SharedLock(_share(place, deadline))
    try:
        return _join(place, hold, deadline, wait)
    except BaseException:
        hold.close()
        raise


def project_directory(start: Path | None = None) -> Path:
    """Return the `.conveyor` of the project around *start*: upwards, the first found or beside a pyproject.toml."""
    origin = (start or Path.cwd()).resolve()
    for place in (origin, *origin.parents):
        if (place / ".conveyor").is_dir() or (place / "pyproject.toml").is_file():
            return place / ".conveyor"
    return origin / ".conveyor"


def inspect(directory: Path | None = None) -> ServerStatus | None:
    """Say how the server of *directory* is, without starting or holding it; None where none has ever run."""
    place = _resolve(directory)
    record = _record(place)
    if record is None:
        return None
    running = record["pid"] > 0 and _kept(place) and _answers(record["socket"])
    return ServerStatus(
        running=running,
        url=_url(record["socket"]) if running else None,
        pid=record["pid"] if running else None,
        family=record["family"],
        version=f"{record['family']} {record['version']}",
        directory=place,
        size=sum(_size(file) for file in (place / "data").rglob("*")),
    )


def stop(directory: Path | None = None, *, wait: float = 10.0) -> bool:
    """
    Stop the server of *directory* even while it has users; its data is on disk when this returns. True if one ran.

    Raises StoreUnavailable when it has not stopped after *wait* seconds.
    """
    place = _resolve(directory)
    deadline = time.monotonic() + wait
    ran = False
    while _kept(place):
        ran = True
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"The server of {place} has not stopped within {wait:g} s. Its log: {place / 'server.log'}"
            )
        record = _record(place)
        if record is not None and not _reached(record["socket"], b"SHUTDOWN") and _is_here(record):
            with contextlib.suppress(ProcessLookupError):
                os.kill(record["keeper"], signal.SIGTERM)  # starting, or its socket was deleted
        time.sleep(_POLL)
    return ran


def _join(place: Path, hold: _SharedLock, deadline: float, wait: float) -> ServerHandle:
    started_at: int | None = None  # where the log of our server begins
    while True:
        with _usable(place):
            lock = _lock(place / "keeper.lock", fcntl.LOCK_EX)
        if lock is not None:
            try:
                if started_at is not None:
                    raise StoreUnavailable(f"The embedded server of {place} does not start.{_tail(place, started_at)}")
                started_at = _start_keeper(place, lock)
            finally:
                os.close(lock)  # the keeper has its own copy, and with it the lock
        record = _record(place)
        reply = b""
        if record is not None and Path(record["socket"]).exists():
            _require_private(Path(record["socket"]).parent)
            reply = keeper.ask(record["socket"], b"PING")
            if record["pid"] and reply.startswith(b"+PONG"):
                version = f"{record['family']} {record['version']}"
                return ServerHandle(_url(record["socket"]), record["pid"], place, started_at is not None, version, hold)
        if reply.startswith(b"-LOADING"):
            deadline = time.monotonic() + wait
        if time.monotonic() > deadline:
            raise StoreUnavailable(_late(place, record, wait) + _tail(place, started_at or 0))
        time.sleep(_POLL)


def _late(place: Path, record: keeper.ServerRecord | None, wait: float) -> str:
    if record is None or not record["pid"]:
        return f"The embedded server of {place} is not ready after {wait:g} s."
    return (
        f"The embedded server of {place} (pid {record['pid']} on {record['host']}) does not answer at"
        f" {record['socket']} after {wait:g} s.\n"
        "    If another container or user started it, stop it there (conveyor server stop), or share a server through"
        " CONVEYOR_URL."
    )


def _start_keeper(place: Path, lock: int) -> int:
    """Start a keeper that takes over the descriptor *lock*; the length of the log before it."""
    binary, version = server_binary()
    family, _, number = version.partition(" ")
    _require_same_server(place, binary, family, number)
    orders = keeper.KeeperRequest(
        directory=str(place),
        socket=str(_socket_path(place)),
        binary=str(binary),
        family=family,
        version=number,
        lock=lock,
    )
    record = _record(place)
    log = place / "server.log"
    with _usable(place):
        if record is not None and record["pid"]:  # the last keeper was killed; what it left is not ready
            keeper.write_record(str(place), {**record, "pid": 0})
        with open(log, "ab") as output:
            if output.tell() > _LOG_LIMIT:
                output.truncate(0)
            begin = log.stat().st_size
            # Isolated and without site-packages: quick, small, and deaf to PYTHONPATH and the working directory.
            command = [sys.executable, "-I", "-S", str(KEEPER), json.dumps(orders)]
            child = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                cwd=place,
                start_new_session=True,
            )
            child.wait()  # it forks and ends at once
    return begin


def _require_same_server(place: Path, binary: Path, family: str, number: str) -> None:
    record = _record(place)
    if record is None or not any(file.is_file() for file in (place / "data").rglob("*")):
        return
    if record["family"] == family and numbers(number) >= numbers(record["version"]):
        return
    raise ConfigurationError(
        f"The data in {place} was written by {record['family']} {record['version']}, and {binary} is {family} {number},"
        f" which may not read it.\n    Use {record['family']} {record['version']} or newer:"
        " pip install 'conveyor[embedded]', or CONVEYOR_SERVER_BIN=/path/to/the/server.\n"
        f"    Or set CONVEYOR_URL to another server, or delete {place} to start empty (the jobs in it are lost).",
        code="E02",
    )


def _share(place: Path, deadline: float) -> int:
    while (descriptor := _lock(place / "lock", fcntl.LOCK_SH)) is None:  # the keeper is stopping the server
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"The server of {place} is still stopping. Its log: {place / 'server.log'}")
        time.sleep(_POLL)
    return descriptor


def _lock(path: Path, kind: int) -> int | None:
    """Return a descriptor that holds the lock, or None when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _kept(place: Path) -> bool:
    """Say whether a keeper lives: it holds its lock from before it starts until after it ended."""
    if not (place / "keeper.lock").exists():
        return False
    descriptor = _lock(place / "keeper.lock", fcntl.LOCK_SH)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


@contextlib.contextmanager
def _usable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The embedded server cannot keep its data in {place}: {error.strerror or error}.\n"
            "    Make the directory writable, work in another, or set CONVEYOR_URL to a server that runs elsewhere.",
            code="E02",
        ) from error


def _record(place: Path) -> keeper.ServerRecord | None:
    try:
        with _usable(place):
            return keeper.read_record(str(place))
    except ValueError as error:
        raise ConfigurationError(
            f"{place / 'server.json'} is damaged ({error}), so it is unknown which server wrote the data beside it.\n"
            "    Delete that file to let the present server try, or the directory to start empty (its jobs are lost).",
            code="E02",
        ) from error


def _socket_path(place: Path) -> Path:
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16] + ".sock"
    shared = Path(f"/tmp/conveyor-{os.geteuid()}")  # noqa: S108  made private and checked below
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "-")
    if runtime.is_absolute() and len(os.fsencode(runtime / "conveyor" / name)) <= _SOCKET_PATH_LIMIT:
        with contextlib.suppress(OSError):
            if runtime.stat().st_uid == os.geteuid():  # not what sudo left of another user's environment
                shared = runtime / "conveyor"
    with _usable(shared):
        shared.mkdir(mode=0o700, exist_ok=True)
    _require_private(shared)
    return shared / name


def _require_private(place: Path) -> None:
    """Refuse a directory in which somebody else could put a socket of his own."""
    with _usable(place):
        found = place.lstat()
    mine = found.st_uid == os.geteuid() or os.geteuid() == 0
    if not stat.S_ISDIR(found.st_mode) or not mine or found.st_mode & 0o077:
        raise ConfigurationError(
            f"{place}, for the embedded server's socket, is not private to you (owner {found.st_uid}, mode"
            f" {stat.S_IMODE(found.st_mode):04o}).\n"
            "    Remove it, or set XDG_RUNTIME_DIR to a directory that is yours alone.",
            code="E02",
        )


def _answers(path: str) -> bool:
    return bool(keeper.ask(path, b"PING"))


def _reached(path: str, command: bytes) -> bool:
    if not _answers(path):
        return False
    keeper.ask(path, command)  # no reply when it obeys
    return True


def _is_here(record: keeper.ServerRecord) -> bool:
    return record["keeper"] > 0 and record["host"] == socket.gethostname()  # in a container, the pid is another process


def _resolve(directory: Path | None) -> Path:
    return Path(directory).resolve() if directory is not None else project_directory()


def _url(path: str) -> str:
    return f"unix://{quote(path)}"


def _size(file: Path) -> int:
    try:
        found = file.lstat()
    except OSError:
        return 0  # a rewrite replaced it meanwhile
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _tail(place: Path, begin: int, lines: int = 10) -> str:
    """Return the last lines of the log after the byte *begin*, indented, or nothing."""
    try:
        text = (place / "server.log").read_bytes()[begin:].decode(errors="replace").strip()
    except OSError:
        return ""
    last = "\n    ".join(text.splitlines()[-lines:])
    return f" The end of its log, {place / 'server.log'}:\n    {last}" if last else f" Its log: {place / 'server.log'}"
