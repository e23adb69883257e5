"""The environment of a run, set up and torn down: Redis, a proxy before it, programs, and their logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis as redis_py

from chaos import remaining_state
from chaos.checker import check
from chaos.fault_proxy import Proxy
from chaos.processes import ProcessGroup, role_rules
from chaos.recording_server import RecordingServer
from chaos.redis_history import read_history
from chaos.run_data import gather
from chaos.run_log import RunLog, read_on
from chaos.run_result import RunResult

QUEUES = (
    "default",
    "mail",
    "box",
    "narrow",
    "left",
    "right",
    "told",
    *(f"{queue}/{number}" for queue in ("wide", "post") for number in range(3)),
)


class Environment:
    """One run. Its directory is removed at the end unless something was found, or `CHAOS_KEEP` is set."""

    def __init__(
        self,
        *,
        seed: int = 1,
        lease: float = 2.0,
        source: Path | None = None,
        clock: bool = False,
        topology: str = "standalone",
        fsync: str = "always",
        retry_for: float = 1.0,
        roles: bool = False,
        server: str | None = None,
    ) -> None:
        """
        Start Redis and, before a single server, the proxy; programs are started through `process_group`.

        *retry_for* multiplies the seconds that draining and ending may take.
        With *roles* programs have the rights that `conveyor acl` prints for them and no more.
        *server* is a name or the path of a binary, None: that of `CHAOS_SERVER`, else Valkey.
        Under `everysec` a server that is killed on a slow disk forgets what it had answered, whoever uses it.
        """
        self.seed, self.lease, self.retry_for = seed, lease, retry_for
        self.directory = Path(tempfile.mkdtemp(prefix="cx", dir="/tmp"))
        self.topology = topology
        self.server_kind = server = server or os.environ.get("CHAOS_SERVER") or "valkey"
        self.server: Any
        if topology == "standalone":
            users = role_rules(topology) if roles else []
            self.server = RecordingServer(self.directory / "r", clock=clock, fsync=fsync, name=server, users=users)
        else:
            from chaos import server_topologies

            self.server = {"cluster": server_topologies.Cluster, "sentinel": server_topologies.Sentinel}[topology](
                self.directory / "r", name=server
            )
            for user in role_rules(topology) if roles else []:
                self.server.add_user(user)
        self.proxy = Proxy(getattr(self.server, "socket", "nobody"), seed=seed).start()
        self.process_group = ProcessGroup(self.directory, lease=lease, source=source, roles=roles)
        self.faults: Counter[str] = Counter()
        self._record = RunLog(self.directory / "faults")
        self._lock = threading.Lock()
        self._read: dict[str, tuple[list[dict[str, Any]], int]] = {}
        self._client: Any = None
        self.keep = bool(os.environ.get("CHAOS_KEEP"))

    @property
    def url(self) -> str:
        """Redis itself."""
        return str(self.server.url)

    def fault(self, kind: str, *, pids: Iterable[int] = (), lasting: float = 0.0, **facts: Any) -> None:
        """Write a fault down, before it is made; it strikes *pids*, or everybody when there are none."""
        with self._lock:
            self.faults[kind] += 1
        until = time.monotonic() + lasting
        self._record.write(kind=kind, pids=list(pids), until=until, **facts)

    # -- looking ---------------------------------------------------------------------------------------------------

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return what stands in a file of the run: calls, runs or faults."""
        found, at = self._read.get(name, ([], 0))
        more, at = read_on(self.directory / name, at)  # not all of it again: some of who waits looks 50 times a second
        self._read[name] = (found + more, at)
        return self._read[name][0]

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """Give a client of the server, from the thread that drives the run; where there is one server, the same each time."""
        if self.topology != "standalone":  # the next one to ask may be another
            with self.server.client() as client:
                yield client
            return
        client, self._client = self._client or self.server.client(), None
        yield client
        self._client = client  # not after an error: the server may have been started again

    def remaining(self) -> int:
        """Return how many jobs have not ended; -1 when Redis does not answer."""
        try:
            with self._asking() as client:
                pipe = client.pipeline(transaction=False)
                for queue in QUEUES:
                    pipe.hlen(f"chaos:{{{queue}}}:jobs")
                    pipe.zcard(f"chaos:{{{queue}}}:dead")
                found = pipe.execute()
        except (redis_py.RedisError, OSError, StopIteration):
            return -1
        return int(sum(found[::2]) - sum(found[1::2]))

    def wait(self, condition: Callable[[], Any], seconds: float) -> Any:
        """Wait until *condition* holds; return what it returned, or nothing after *seconds*."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        return found

    def ready(self, workers: int, seconds: float = 60.0, *, queue: str = "default") -> None:
        """Wait until that many workers have registered for the jobs of a queue; raises when they do not."""

        def registered() -> bool:
            with self._asking() as client:
                return int(client.zcard(f"chaos:{{{queue}}}:workers")) >= workers

        if not self.wait(registered, seconds):
            logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.directory.glob("*.log")]
            raise RuntimeError("the workers did not start\n" + "\n".join(logs))

    def started(self, count: int, seconds: float = 60.0) -> Any:
        """Wait until that many runs have begun."""
        return self.wait(lambda: sum(line["phase"] == "start" for line in self.lines("runs")) >= count, seconds)

    def read_along(self, url: str) -> None:
        """Start the program that reads what jobs tell, and wait until its schedules stand."""
        self.process_group.reader(url, seed=self.seed)
        self.wait(lambda: sum(line["phase"] == "put" for line in self.lines("reads")) == 2, 30 * self.retry_for)

    # -- the end ---------------------------------------------------------------------------------------------------

    def end_schedules(self) -> None:
        """Let the schedules come to a stop: each tick enqueues a job."""
        for program in self.process_group.readers():
            program.signal(signal.SIGUSR1)
            self.wait(lambda: sum(line["phase"] == "stood" for line in self.lines("reads")) == 2, 30 * self.retry_for)

    def heal(self) -> None:
        """End every fault that lasts."""
        self.proxy.heal()
        self.server.thaw()
        if self.faults["step clock"]:
            # Jobs scheduled while the clock was an hour ahead are due now, too. Not two hours: a push whose reply is
            # lost just now is repeated, and a lane remembers it for so long (docs/reliability.md, Limits).
            self.server.set_clock(70 * 60)
        self.wait(lambda: self.server.command("CONFIG", "SET", "maxmemory", "0"), 20)

    def drain(self, seconds: float, *, stall: float | None = None) -> float | None:
        """
        Wait until the producers are done and every job has ended; return how long it took, None when it did not.

        It may take longer than *seconds* as long as jobs end: *stall* seconds without one is too long. Both are multiplied
        by the patience of the environment.
        """
        began = time.monotonic()
        seconds, stall = seconds * self.retry_for, (stall or max(15.0, 8 * self.lease)) * self.retry_for
        if not self.wait(lambda: not any(one.alive() for one in self.process_group.producers()), seconds):
            return None
        fewest, progress = 1 << 60, time.monotonic()
        while left := self.remaining():
            now = time.monotonic()
            if 0 <= left < fewest:
                fewest, progress = left, now
            if now - progress > stall and now - began > seconds:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def _only_the_living(self) -> bool:
        """Return whether the registrations of all dead workers are gone."""
        with self._asking() as client:
            for key in client.scan_iter("chaos:*:leased:*", count=1000):
                about = client.hget(key, "\tabout")
                if about and not Path(f"/proc/{json.loads(about).get('pid', 1)}").exists():
                    return False
        return True

    def evaluate(self, *, also: Iterable[str] = (), waived: Iterable[str] = ()) -> RunResult:
        """Wait until dead workers are reaped, end the living ones, then check what is left."""
        self.wait(self._only_the_living, min(10.0, 3 * self.lease + 1))
        for program in self.process_group.readers():
            program.signal(signal.SIGTERM)
            self.wait(lambda: not program.alive(), 60)  # noqa: B023  waited for at once
        orderly = self.process_group.retire(15 * self.retry_for)
        with self.server.client(socket_timeout=60) as client:
            left = remaining_state.take(client)
        self.server.stop()
        data = gather(
            self.lines("calls"),
            self.lines("runs"),
            self.lines("faults"),
            left,
            read_history(self.server.directory) if self.topology == "standalone" else None,
            self.lease,
            told=self.lines("told"),
            reads=self.lines("reads"),
        )
        result = check(data, also=also, waived=waived)
        finished = sum(line["phase"] == "end" for line in self.lines("calls"))
        if finished != len(self.process_group.producers()):
            result.counts["producers that failed"] = len(self.process_group.producers()) - finished
            result.failed.append("producers that failed")
        if self.process_group.readers() and not any(line["phase"] == "end" for line in self.lines("reads")):
            result.counts["readers that failed"] = 1
            result.failed.append("readers that failed")
        if not orderly:
            result.counts["workers that did not end"] = 1
            result.failed.append("workers that did not end")
        self.keep = self.keep or bool(result.failed)
        return result

    def close(self) -> None:
        """End every process and remove the directory."""
        self.process_group.close()
        self.proxy.stop()
        self.server.stop()
        self._record.close()
        if self.keep:
            print(f"what was recorded lies in {self.directory}", flush=True)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
