"""
The embedded server: a real Valkey or Redis for one project, shared by its processes, without any setup.

`attach` starts or finds it, and holds a shared lock on the data directory as long as the handle lives. A keeper process
(`keeper.py`) stops the server when the last user is gone; the data stays for the next one.
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
from conveyor.store.embedded.ownership import open_own, require_own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["ServerHandle", "ServerStatus", "attach", "inspect", "project_directory", "server_binary", "stop"]

KEEPER = Path(keeper.__file__)

_POLL = 0.01  # seconds between two checks of a lock or of a starting server
_LOG_LIMIT = 1_000_000  # bytes of server.log kept from one start to the next
_ALIVE = (b"+PONG", b"-MISCONF")
"""
Replies to PING of a server that can be used. With -MISCONF it cannot save, mostly on a full disk, and takes no writes: reads go
on, and a push is told by the server itself what is wrong.
"""
_SOCKET_PATH_LIMIT = 100  # bytes; the kernel's limit is 107 on Linux and 103 on macOS


class _SharedLock:
    """A shared lock, held by one descriptor: a forked child shares it, an executed program does not inherit it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # never LOCK_UN: that would take the lock from forked processes as well


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """One user's hold on the server, which lives at least as long. A context manager; `close` may be repeated."""

    url: str
    pid: int
    directory: Path
    started: bool
    version: str
    _lock: _SharedLock = field(repr=False, compare=False)

    def close(self) -> None:
        """Release the server; the keeper stops it when nobody else uses it."""
        self._lock.close()

    def __enter__(self) -> ServerHandle:
        """Return the handle."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the server."""
        self.close()


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The state of a project's server: `size` is its data in bytes; `pid` and `url` are None when none runs."""

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

    *wait* is in seconds; loading old data does not count. Raises ConfigurationError when there is no server program, the
    directory cannot be used, or another family or a newer version wrote its data. Raises StoreUnavailable, with the last lines
    of the log, when the server does not start or is not ready in time.
    """
    directory = _resolve(directory)
    deadline = time.monotonic() + wait
    with _usable_directory(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (directory / ".gitignore").exists():
            with open(open_own(directory / ".gitignore", os.O_WRONLY), "w") as file:
                file.write("*\n")
        lock = _SharedLock(_lock_shared(directory, deadline))
    try:
        return _wait_ready(directory, lock, deadline, wait)
    except BaseException:
        lock.close()
        raise


def project_directory(start: Path | None = None) -> Path:
    """Return the `.conveyor` of the project around *start*: upwards, the first found or beside a pyproject.toml."""
    origin = (start or Path.cwd()).resolve()
    for directory in (origin, *origin.parents):
        if (directory / ".conveyor").is_dir() or (directory / "pyproject.toml").is_file():
            return directory / ".conveyor"
    return origin / ".conveyor"


def inspect(directory: Path | None = None) -> ServerStatus | None:
    """Return the state of the server of *directory*, without starting or holding it; None where none has ever run."""
    directory = _resolve(directory)
    record = _record(directory)
    if record is None:
        return None
    running = record["pid"] > 0 and _has_keeper(directory) and _answers(record["socket"])
    return ServerStatus(
        running=running,
        url=_url(record["socket"]) if running else None,
        pid=record["pid"] if running else None,
        family=record["family"],
        version=f"{record['family']} {record['version']}",
        directory=directory,
        size=sum(_size(file) for file in (directory / "data").rglob("*")),
    )


def stop(directory: Path | None = None, *, wait: float = 10.0) -> bool:
    """
    Stop the server of *directory* even while it has users; its data is on disk when this returns. True if one ran.

    Raises StoreUnavailable when it has not stopped after *wait* seconds.
    """
    directory = _resolve(directory)
    deadline = time.monotonic() + wait
    ran = False
    while _has_keeper(directory):
        ran = True
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"The server of {directory} has not stopped within {wait:g} s. Its log: {directory / 'server.log'}"
            )
        record = _record(directory)
        if record is not None and not _send_if_alive(record["socket"], b"SHUTDOWN") and _keeper_is_on_this_host(record):
            with contextlib.suppress(ProcessLookupError):
                os.kill(record["keeper"], signal.SIGTERM)  # starting, or its socket was deleted
        time.sleep(_POLL)
    return ran


def _wait_ready(directory: Path, lock: _SharedLock, deadline: float, wait: float) -> ServerHandle:
    started_at: int | None = None  # where the log of our server begins
    while True:
        with _usable_directory(directory):
            keeper_lock = _lock(directory / "keeper.lock", fcntl.LOCK_EX)
        if keeper_lock is not None:
            try:
                if started_at is not None:
                    raise StoreUnavailable(
                        f"The embedded server of {directory} does not start.{_log_tail(directory, started_at)}"
                    )
                started_at = _start_keeper(directory, keeper_lock)
            finally:
                os.close(keeper_lock)  # the keeper has its own copy, and with it the lock
        record = _record(directory)
        reply = b""
        if record is not None and Path(record["socket"]).exists():
            _require_private(Path(record["socket"]).parent)
            reply = keeper.ask(record["socket"], b"PING")
            if record["pid"] and reply.startswith(_ALIVE):
                version = f"{record['family']} {record['version']}"
                return ServerHandle(
                    _url(record["socket"]), record["pid"], directory, started_at is not None, version, lock
                )
        if reply.startswith(b"-LOADING"):
            deadline = time.monotonic() + wait
        if time.monotonic() > deadline:
            raise StoreUnavailable(_not_ready(directory, record, wait, reply) + _log_tail(directory, started_at or 0))
        time.sleep(_POLL)


def _not_ready(directory: Path, record: keeper.ServerRecord | None, wait: float, reply: bytes) -> str:
    if reply.startswith(b"-"):
        answer = reply.decode(errors="replace").strip()
        return f"The embedded server of {directory} is not ready after {wait:g} s. It answers: {answer}"
    if record is None or not record["pid"]:
        return f"The embedded server of {directory} is not ready after {wait:g} s."
    return (
        f"The embedded server of {directory} (pid {record['pid']} on {record['host']}) does not answer at"
        f" {record['socket']} after {wait:g} s.\n"
        "    If another container or user started it, stop it there (conveyor server stop), or share a server through"
        " CONVEYOR_URL."
    )


def _start_keeper(directory: Path, lock: int) -> int:
    """Start a keeper that takes over the descriptor *lock*; return the length of the log before it."""
    binary, version = server_binary()
    family, _, number = version.partition(" ")
    _require_same_server(directory, binary, family, number)
    request = keeper.KeeperRequest(
        directory=str(directory),
        socket=str(_socket_path(directory)),
        binary=str(binary),
        family=family,
        version=number,
        lock=lock,
    )
    record = _record(directory)
    log = directory / "server.log"
    with _usable_directory(directory):
        if record is not None and record["pid"]:  # the last keeper was killed; what it left is not ready
            keeper.write_record(str(directory), {**record, "pid": 0})
        with open(open_own(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
            if output.tell() > _LOG_LIMIT:
                output.truncate(0)
            begin = log.stat().st_size
            # Isolated and without site-packages: fast, small, and independent of PYTHONPATH and the working directory.
            command = [sys.executable, "-I", "-S", str(KEEPER), json.dumps(request)]
            child = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                cwd=directory,
                start_new_session=True,
            )
            child.wait()  # it forks and ends at once
    return begin


def _require_same_server(directory: Path, binary: Path, family: str, number: str) -> None:
    record = _record(directory)
    if record is None or not any(file.is_file() for file in (directory / "data").rglob("*")):
        return
    if record["family"] == family and numbers(number) >= numbers(record["version"]):
        return
    raise ConfigurationError(
        f"The data in {directory} was written by {record['family']} {record['version']}, and {binary} is {family} {number},"
        f" which may not read it.\n    Use {record['family']} {record['version']} or newer:"
        " pip install 'conveyor[embedded]', or CONVEYOR_SERVER_BIN=/path/to/the/server.\n"
        f"    Or set CONVEYOR_URL to another server, or delete {directory} to start empty (the jobs in it are lost).",
        code="E02",
    )


def _lock_shared(directory: Path, deadline: float) -> int:
    while (descriptor := _lock(directory / "lock", fcntl.LOCK_SH)) is None:  # the keeper is stopping the server
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"The server of {directory} is still stopping. Its log: {directory / 'server.log'}")
        time.sleep(_POLL)
    return descriptor


def _lock(path: Path, kind: int) -> int | None:
    """Return a descriptor that holds the lock, or None when another process has it."""
    descriptor = open_own(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _has_keeper(directory: Path) -> bool:
    """Tell whether a keeper lives: it holds its lock from before it starts until after it has ended."""
    if not (directory / "keeper.lock").exists():
        return False
    descriptor = _lock(directory / "keeper.lock", fcntl.LOCK_SH)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


@contextlib.contextmanager
def _usable_directory(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The embedded server cannot keep its data in {directory}: {error.strerror or error}.\n"
            "    Make the directory writable, work in another, or set CONVEYOR_URL to a server that runs elsewhere.",
            code="E02",
        ) from error


def _record(directory: Path) -> keeper.ServerRecord | None:
    try:
        with _usable_directory(directory):
            return keeper.read_record(str(directory))
    except ValueError as error:
        raise ConfigurationError(
            f"{directory / 'server.json'} is damaged ({error}), so it is unknown which server wrote the data beside it.\n"
            "    Delete that file to let the present server try, or the directory to start empty (its jobs are lost).",
            code="E02",
        ) from error


def _socket_path(directory: Path) -> Path:
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16] + ".sock"
    shared = Path(f"/tmp/conveyor-{os.geteuid()}")  # noqa: S108  made private and checked below
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "-")
    if runtime.is_absolute() and len(os.fsencode(runtime / "conveyor" / name)) <= _SOCKET_PATH_LIMIT:
        with contextlib.suppress(OSError):
            if runtime.stat().st_uid == os.geteuid():  # not what sudo left of another user's environment
                shared = runtime / "conveyor"
    with _usable_directory(shared):
        shared.mkdir(mode=0o700, exist_ok=True)
    _require_private(shared)
    return shared / name


def _require_private(directory: Path) -> None:
    """Raise ConfigurationError for a directory in which another user could create a socket."""
    with _usable_directory(directory):
        status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigurationError(
            f"{directory}, for the embedded server's socket, is not private to you (owner {status.st_uid}, mode"
            f" {stat.S_IMODE(status.st_mode):04o}).\n"
            "    Remove it, or set XDG_RUNTIME_DIR to a directory that is yours alone.",
            code="E02",
        )


def _answers(path: str) -> bool:
    return bool(keeper.ask(path, b"PING"))


def _send_if_alive(path: str, command: bytes) -> bool:
    if not _answers(path):
        return False
    keeper.ask(path, command)  # no reply when it shuts down
    return True


def _keeper_is_on_this_host(record: keeper.ServerRecord) -> bool:
    return record["keeper"] > 0 and record["host"] == socket.gethostname()  # in a container, the pid is another process


def _resolve(directory: Path | None) -> Path:
    """Return the directory that is meant, once it is known that nobody else can write what it says."""
    found = Path(directory).resolve() if directory is not None else project_directory()
    with _usable_directory(found):
        require_own(found)
    return found


def _url(path: str) -> str:
    return f"unix://{quote(path)}"


def _size(file: Path) -> int:
    try:
        status = file.lstat()
    except OSError:
        return 0  # a rewrite replaced it meanwhile
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _log_tail(directory: Path, begin: int) -> str:
    """Return the last ten lines of the log after the byte *begin*, indented, or nothing."""
    try:
        text = (directory / "server.log").read_bytes()[begin:].decode(errors="replace").strip()
    except OSError:
        return ""
    last = "\n    ".join(text.splitlines()[-10:])
    return (
        f" The end of its log, {directory / 'server.log'}:\n    {last}"
        if last
        else f" Its log: {directory / 'server.log'}"
    )
