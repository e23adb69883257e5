"""
The keeper: a small process that owns the embedded server as long as a process uses it.

It starts the server, restarts it after a crash, and waits for the exclusive lock on the data directory. It gets that lock
when the last user is gone, however that user ended, and then stops the server. When the keeper is killed, the server ends
too.

It runs as a plain script on the standard library alone: importing the package would load the Redis client and everything
else into a process that may live for days.

Files of the data directory: `lock` (shared: a user; exclusive: the keeper that stops the server), `keeper.lock` (held
by the keeper), `server.lock` (held by the keeper and inherited by the server, so two servers never write the same
files), `server.json` (the record below), `server.log`, `data/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, TypedDict, cast

if TYPE_CHECKING:
    from collections.abc import Callable

_READY_POLL = 0.01  # seconds between two checks of a starting server
_STOP_TIMEOUT = 30.0  # seconds a server may take to write its data to disk before it is killed
_ORPHAN_TIMEOUT = 5.0  # seconds for the server of a killed keeper to end
_MAX_PAUSE = 5.0  # seconds between two starts of a server that keeps crashing
# Other C libraries, and servers with an allocator of their own, ignore it.
_ALLOCATOR = "glibc.malloc.tcache_count=4096"
_STEADY_AFTER = 10.0  # seconds after which a crash no longer counts as one of a series


class ServerRecord(TypedDict):
    """The content of `server.json`: which server wrote the data, and where it is. `pid` is 0 when none is ready."""

    family: str
    version: str
    socket: str
    pid: int
    keeper: int
    host: str


_FIELDS = {"family": str, "version": str, "socket": str, "pid": int, "keeper": int, "host": str}


class KeeperRequest(TypedDict):
    """The arguments of a keeper; `lock` is the descriptor of `keeper.lock`, already locked."""

    directory: str
    socket: str
    binary: str
    family: str
    version: str
    lock: int


def read_record(directory: str) -> ServerRecord | None:
    """Return the record of *directory*, None where no server has run. ValueError when it is damaged."""
    try:
        path = os.path.join(directory, "server.json")
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in _FIELDS.items()):
        raise ValueError("not a record of a server")
    return cast("ServerRecord", {key: record[key] for key in _FIELDS})


def write_record(directory: str, record: ServerRecord) -> None:
    """Replace the record in one step: a reader sees the old or the new one."""
    path = os.path.join(directory, "server.json")
    draft = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(draft, flags, 0o600), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def ask(path: str, command: bytes, *, timeout: float = 1.0) -> bytes:
    """Send one inline *command* to the server at *path*; return the first bytes of its reply, empty when none came."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        connection.sendall(command + b"\r\n")
        return connection.recv(512)
    return b""


def server_environment() -> dict[str, str]:
    """
    Return the environment of the server: this process's, and a setting of the C library's allocator.

    The Valkey of the wheel uses that allocator, which keeps 7 freed blocks of a size at hand. A queue frees blocks by the
    hundred, so in a heap of a million jobs each job got blocks that were no longer in a cache: 2.3 times the time in the
    server. With 4,096 at hand, 1.4 times. A value that the user has set comes later and counts.
    """
    tunables = [_ALLOCATOR, *filter(None, [os.environ.get("GLIBC_TUNABLES")])]
    return {**os.environ, "GLIBC_TUNABLES": ":".join(tunables)}


def server_command(binary: str, version: tuple[int, ...], path: str, data: str) -> list[str]:
    """Return the command line of a server that listens on the socket *path* only and keeps its data in *data*."""
    settings = {
        "port": "0",
        "unixsocket": path,
        "unixsocketperm": "700",
        "dir": data,
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    if version >= (7,):  # older servers do not know the setting and refuse to start
        settings["enable-debug-command"] = "no"
    return [binary, *(word for name, value in settings.items() for word in (f"--{name}", value))]


def parent_death_signal() -> Callable[[], None] | None:
    """Return what a child calls before exec to end with its parent; None where the kernel does not support it."""
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    parent = os.getpid()

    def die_with_parent() -> None:
        prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return die_with_parent


class Keeper:
    """One server, its record, and the loop that watches both."""

    def __init__(self, request: KeeperRequest) -> None:
        self.request = request
        self.directory = request["directory"]
        self.data = os.path.join(self.directory, "data")
        self.server: subprocess.Popen[bytes] | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.ready_at = 0.0  # 0: not ready
        self.was_ready = False  # was ready once: a later end is a crash, not a server that cannot start
        self.start_at = 0.0
        self.pause = 0.0
        self.die_with_parent = parent_death_signal()
        self.data_lock = -1
        self.users_lock = -1
        self.lock_waiter = 0
        self.events = -1

    def run(self) -> int:
        """Keep the server until the last user is gone or it is stopped; return the exit code."""
        if not self._lock_data():
            return 1
        self._listen()
        while True:
            events = self._wait()
            if self.server is not None and (code := self.server.poll()) is not None:
                # 0: the server was told to stop, by SHUTDOWN or SIGTERM, so it is not restarted
                if code == 0 or not self.was_ready:
                    return self._finish(code)
                self._crashed(code)
            if self._last_user_gone():
                self.lock_waiter = 0
                return self._finish(self._stop())
            if events & {signal.SIGTERM, signal.SIGINT}:
                return self._finish(self._stop())
            if self.server is None and time.monotonic() >= self.start_at:
                self._start()
            elif self.server is not None and not self.ready_at:
                self._check_ready()

    def _lock_data(self) -> bool:
        self.data_lock = os.open(
            os.path.join(self.directory, "server.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        old = _record_or_none(self.directory)
        end = time.monotonic() + _ORPHAN_TIMEOUT
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.data_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end:
                self._log(f"another server (pid {old and old['pid']}) still writes {self.data}; end it, then try again")
                return False
            if old is not None:  # left by a keeper that was killed
                ask(old["socket"], b"SHUTDOWN", timeout=0.2)
            time.sleep(_READY_POLL)
        os.makedirs(self.data, 0o700, exist_ok=True)
        self._record(pid=0)
        return True

    def _listen(self) -> None:
        self.users_lock = os.open(
            os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._fork_lock_waiter()
        self.events, wake = os.pipe()
        os.set_blocking(wake, False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the number arrives in the pipe
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(wake)

    def _fork_lock_waiter(self) -> None:
        # A child waits for the lock, which it shares with the keeper. Not a thread: the locks of a killed process with
        # threads may outlive its main thread, so a new user could get the server that is about to end.
        self.lock_waiter = os.fork()
        if self.lock_waiter == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.close(self.request["lock"])
                os.close(self.data_lock)
                if self.die_with_parent is not None:
                    self.die_with_parent()
                fcntl.flock(
                    self.users_lock, fcntl.LOCK_EX
                )  # and held by the keeper, so new users wait while the server stops
                os._exit(0)
            finally:
                os._exit(1)

    def _last_user_gone(self) -> bool:
        pid, status = os.waitpid(self.lock_waiter, os.WNOHANG)
        if pid and status:  # it was killed
            self._fork_lock_waiter()
        return bool(pid) and status == 0

    def _wait(self) -> set[int]:
        timeout: float | None = None
        if self.server is None:
            timeout = max(0.0, self.start_at - time.monotonic())
        elif not self.ready_at:
            timeout = _READY_POLL
        readable, _, _ = select.select([self.events], [], [], timeout)
        return set(os.read(self.events, 512)) if readable else set()

    def _start(self) -> None:
        version = tuple(int(part) for part in self.request["version"].split("."))
        command = server_command(self.request["binary"], version, self.request["socket"], self.data)
        # The server inherits the lock of the data: while it lives, no other server starts on these files.
        self.server = subprocess.Popen(  # noqa: S603
            command,
            cwd=self.data,
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=(self.data_lock,),
            preexec_fn=self.die_with_parent,  # noqa: PLW1509  there are no threads
        )
        if self.die_with_parent is None:
            self.guard = subprocess.Popen(  # noqa: S603  its `read` ends when the keeper does
                ["/bin/sh", "-c", 'read _; kill "$0"', str(self.server.pid)], stdin=subprocess.PIPE
            )

    def _check_ready(self) -> None:
        assert self.server is not None
        if ask(self.request["socket"], b"PING").startswith((b"+PONG", b"-MISCONF")):
            self.ready_at, self.was_ready = time.monotonic(), True
            self._record(pid=self.server.pid)

    def _crashed(self, code: int) -> None:
        now = time.monotonic()
        if self.ready_at and now - self.ready_at > _STEADY_AFTER:
            self.pause = 0.0
        self._log(f"the server ended with {code}; next start in {self.pause:g} s")
        self.start_at = now + self.pause
        self.pause = min(_MAX_PAUSE, max(0.1, 2 * self.pause))
        self.server, self.ready_at = None, 0.0
        self._release_guard()
        self._record(pid=0)

    def _stop(self) -> int:
        if self.server is None:
            return 0
        self.server.terminate()
        try:
            return self.server.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._log(f"the server did not stop within {_STOP_TIMEOUT:g} s and is killed")
            self.server.kill()
            return self.server.wait()

    def _finish(self, code: int) -> int:
        self._release_guard()
        if self.lock_waiter:
            os.kill(self.lock_waiter, signal.SIGKILL)
            os.waitpid(self.lock_waiter, 0)
        with contextlib.suppress(OSError):
            os.unlink(self.request["socket"])
        with contextlib.suppress(OSError):  # the data directory may have been deleted meanwhile
            self._record(pid=0)
        return 0 if code == 0 else 1

    def _release_guard(self) -> None:
        if self.guard is not None:
            self.guard.kill()  # before its pipe closes: the pid it would signal may belong to another process by now
            self.guard.wait()
            assert self.guard.stdin is not None
            self.guard.stdin.close()
            self.guard = None

    def _record(self, *, pid: int) -> None:
        writer: Any = self.request
        if not self.was_ready:  # until it has read them, the files are those of the server that wrote them
            writer = _record_or_none(self.directory) or self.request
        write_record(
            self.directory,
            ServerRecord(
                family=writer["family"],
                version=writer["version"],
                socket=self.request["socket"],
                pid=pid,
                keeper=os.getpid(),
                host=socket.gethostname(),
            ),
        )

    def _log(self, text: str) -> None:
        print(f"{os.getpid()}:K {time.strftime('%d %b %Y %H:%M:%S')} {text}", flush=True)


def _record_or_none(directory: str) -> ServerRecord | None:
    with contextlib.suppress(ValueError):
        return read_record(directory)
    return None


def main(text: str) -> None:
    """Detach from the starter, whose child ends here at once, and keep a server as *text* (JSON) requests."""
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    request: KeeperRequest = json.loads(text)
    code = 1
    try:
        code = Keeper(request).run()
    finally:
        # Unlocked, not only closed: a fork of the starter may hold a copy of the descriptor.
        fcntl.flock(request["lock"], fcntl.LOCK_UN)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
