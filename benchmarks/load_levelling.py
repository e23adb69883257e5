"""
Limits and groups under kills, with worker processes: ``python -m benchmarks.load_levelling rate --n 100 --seconds 20 --kills 30``.

Every case counts violations from the journal that the jobs write, and ends with 1 when there is one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import redis

from conveyor.store.keys import QueueKeys
from testbed.server_process import Server, find_binary

ROOT = Path(__file__).parents[1]
USUAL_JOBS, WEIGHED_JOBS = 2000, 20_000


class Line(NamedTuple):
    """One line of the journal; `at` in seconds by the machine's monotonic clock."""

    what: str
    key: str
    n: int
    attempt: int
    pid: int
    at: float


class Run:
    """A server, workers, and the journal of their jobs."""

    def __init__(self, directory: Path, options: argparse.Namespace, **settings: object) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.journal = directory / "journal"
        self.journal.touch()
        binary = find_binary(options.server)
        if binary is None:
            raise SystemExit(f"There is no server {options.server}.")
        self.server = Server(binary, directory / "server", "--appendonly", "yes", "--appendfsync", "everysec")
        self.environment = {
            **os.environ, "CONVEYOR_URL": self.server.url, "LEVELLED_JOURNAL": str(self.journal), "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *sys.path]
            ),
        } | {f"LEVELLED_{name.upper()}": str(value) for name, value in settings.items()}  # fmt: skip
        os.environ.update(
            {name: self.environment[name] for name in self.environment if name.startswith(("LEVELLED", "CONVEYOR"))}
        )
        from benchmarks import levelled_app

        self.tasks, self.app = levelled_app, levelled_app.app
        self.workers: list[subprocess.Popen[bytes]] = []
        self.killed: dict[int, float] = {}
        """The processes that were killed, and when (monotonic)."""
        self.returns: list[float] = []
        self.watchers: list[threading.Thread] = []

    def start(self, processes: int, concurrency: int) -> None:
        """Start a supervisor with so many processes."""
        app, queue, number, slots = "benchmarks.levelled_app:app", "levelled", str(processes), str(concurrency)
        command = [sys.executable, "-m", "benchmarks.warm_workers", app, queue, number, slots]
        if self.options.cold:
            command = [sys.executable, "-m", "conveyor", "worker", app, "-q", queue, "--processes", number, "-c", slots]
            command += ["--grace", "1s"]
        log = (self.journal.parent / "workers.log").open("ab")
        self.workers.append(subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log))

    def lines(self) -> list[Line]:
        """Return what the journal says; the last line may be half written."""
        whole, _, _ = self.journal.read_text().rpartition("\n")
        parts = (line.split() for line in whole.splitlines())
        return [
            Line(what, key, int(n), int(attempt), int(pid), int(at) / 1e9) for what, key, n, attempt, pid, at in parts
        ]

    def kill_one(self) -> bool:
        """Kill one of the processes that serve the queue, and not the last one; tell whether there was one."""
        client = self.server.client()
        children = {
            int(pid)
            for worker in self.workers
            for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
        }
        leases = {
            key: json.loads(client.hget(key, "\tabout") or b"{}").get("pid") for key in client.scan_iter("*:leased:*")
        }
        serving = sorted((children & {*leases.values()}) - self.killed.keys())
        if len(serving) < 2:
            return False
        pid = self.random.choice(serving)
        self.killed[pid] = time.monotonic()
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)
            held = [key for key, of in leases.items() if of == pid]
            self.watchers.append(threading.Thread(target=self._watch_leases, args=(client, held)))
            self.watchers[-1].start()
            return True
        return False

    def _watch_leases(self, client: Any, leases: list[bytes]) -> None:
        """Measure how long the leases of a killed process stay: its jobs and their slots are back when they are gone."""
        begin = time.monotonic()
        with client:
            while leases and client.exists(*leases) and time.monotonic() < begin + 60:
                time.sleep(0.01)
        self.returns.append(time.monotonic() - begin)

    def see_returns(self) -> None:
        """Wait until the leases of all killed processes are gone."""
        for watcher in self.watchers:
            watcher.join()

    def kill_evenly(self, seconds: float, meanwhile: Callable[[], object]) -> int:
        """
        Kill as many processes as asked, evenly over so many seconds; return how many were killed.

        A machine on which starting a process takes long gets more time, up to half an hour.
        """
        killed, begin = 0, time.monotonic()
        while killed < self.options.kills and (now := time.monotonic() - begin) < max(1800, seconds):
            if now >= (killed + 1) * seconds / (self.options.kills + 1):
                killed += self.kill_one()
            meanwhile()
            time.sleep(0.02)
        return killed

    def wait(self, condition: Callable[[], object], what: str, within: float = 300.0) -> None:
        """Wait for *condition*."""
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"Waited {within:g} s for {what}; seed {self.options.seed}.")
            time.sleep(0.05)

    def drained(self) -> bool:
        """Tell whether the queue holds nothing."""
        counts = self.app.queue("levelled").stats()
        return not (counts.ready or counts.scheduled or counts.waiting or counts.leased)

    def close(self) -> None:
        """End the workers and the server."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait(60)
        self.app.close()
        self.server.kill()


@contextmanager
def running(options: argparse.Namespace, **settings: object) -> Iterator[Run]:
    """Run a server and an app for one case."""
    with tempfile.TemporaryDirectory(prefix="lv", dir="/tmp") as directory:
        run = Run(Path(directory), options, **settings)
        try:
            yield run
        finally:
            run.close()


def say(name: str, value: Any) -> None:
    """Print one figure."""
    print(f"  {name:<58} {value:>12}" if not isinstance(value, float) else f"  {name:<58} {value:>12.4f}", flush=True)


def most_in_a_window(starts: list[float], per: float) -> int:
    """Return the most starts in a window of length *per* that begins at a start."""
    return max((bisect_left(starts, at + per) - i for i, at in enumerate(starts)), default=0)


class Admissions(threading.Thread):
    """
    The server's record of what a rate let start, read again and again while it is kept: a job of a worker that is killed counts.

    Of each ms the most that was ever seen counts, since the oldest of a record leave it one after the other. `serves` is
    since when each process serves the queue (monotonic), as far as it was seen.
    """

    def __init__(self, run: Run, name: str, per: float) -> None:
        super().__init__(daemon=True)
        self._run, self._pause, self._seen, self._over = run, min(per / 10, 0.1), Counter[int](), threading.Event()
        self._prefix = QueueKeys("conveyor", "levelled").prefix
        self._name = name
        self._workers: set[bytes] = set()
        self.serves: dict[int, float] = {}

    def run(self) -> None:
        """Read until it is over; a server that restarts is asked again."""
        with self._run.server.client() as client:
            while True:
                over = self._over.wait(self._pause)
                with suppress(redis.RedisError):
                    self._look(client)
                if over:
                    return

    def _look(self, client: Any) -> None:
        for at, count in Counter(map(int, client.lrange(f"{self._prefix}rate:{self._name}", 0, -1))).items():
            self._seen[at] = max(self._seen[at], count)
        for worker in {*client.zrange(f"{self._prefix}workers", 0, -1)} - self._workers:
            about = client.hget(f"{self._prefix}leased:{worker.decode()}", "\tabout")
            if about is not None:
                self._workers.add(worker)
                self.serves.setdefault(json.loads(about)["pid"], time.monotonic())

    def instants(self) -> list[float]:
        """Return when each start was let pass, in seconds by the server's clock, and end."""
        self._over.set()
        self.join()
        return [at / 1000 for at in sorted(self._seen.elements())]


class Room:
    """The times in which no live process had room for a job: each had as many as it runs at a time, or none served the queue."""

    def __init__(self, run: Run, lines: list[Line], serves: dict[int, float], slots: int) -> None:
        since = dict(serves)
        for line in lines:
            since[line.pid] = min(since.get(line.pid, line.at), line.at)
        changes = [(at, pid, slots) for pid, at in since.items()]
        changes += [(at, pid, -(10**6)) for pid, at in run.killed.items() if pid in since]
        changes += [(line.at, line.pid, -1 if line.what == "start" else 1) for line in lines]
        changes.sort()
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._before = [0.0]
        free: Counter[int] = Counter()
        able, last = 0, 0.0
        for at, pid, change in changes:
            was = able
            able += (free[pid] + change > 0) - (free[pid] > 0)
            free[pid] += change
            if was and not able:
                last = at
            elif able and not was:
                self._begins.append(last)
                self._ends.append(at)
                self._before.append(self._before[-1] + at - last)

    def _lacking_until(self, at: float) -> float:
        """Return how long there was none, until an instant (monotonic)."""
        number = bisect_left(self._begins, at)
        return self._before[number] - max(0.0, self._ends[number - 1] - at if number else 0.0)

    def lacking(self, begin: float, end: float) -> float:
        """Return how long there was none between two instants (monotonic)."""
        return self._lacking_until(end) - self._lacking_until(begin)


def idle_time() -> tuple[int, int]:
    """Return how long the processors of this machine have been idle, and all of their time, in ticks."""
    ticks = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def rate(options: argparse.Namespace) -> int:
    """Count starts in every window that begins at a start, with kills, and with restarts of the server."""
    n, per, slots = options.n, options.per, 50
    with running(options, n=n, per=f"{round(per * 1000)}ms", seconds=0.002) as run:
        count = int(n * options.seconds / per * 3.5) + n
        run.app.enqueue_many([run.tasks.rated.s(n) for n in range(count)])
        admissions = Admissions(run, "rated.rate", per)
        admissions.start()
        run.start(options.processes, slots)
        run.wait(run.lines, "the first start", 60)
        begin, idle, killed, restarted, down = time.monotonic(), idle_time(), 0, 0, 0.0
        # A machine on which starting a process takes long gets more time: a process that serves is always left.
        while (now := time.monotonic() - begin) < options.seconds or (
            killed < options.kills and now < 3 * options.seconds
        ):
            if restarted < options.restarts and now >= (restarted + 1) * options.seconds / (options.restarts + 1):
                restarted += 1
                run.server.kill()
                run.server.start()
                down += time.monotonic() - begin - now
            if killed < options.kills and now >= (killed + 1) * options.seconds / (options.kills + 1):
                killed += run.kill_one()
            time.sleep(0.01)
        passed, idle_after, end = admissions.instants(), idle_time(), time.monotonic()
        run.see_returns()
        with run.server.client() as client:
            seconds, micros = client.time()
        clock = seconds + micros / 1e6 - time.monotonic()
        lines = run.lines()
        starts = sorted(line.at for line in lines if line.what == "start" and line.at < end)
    say("limit", f"{n} / {per:g} s")
    say("kills, restarts of the server", f"{killed}, {restarted}")
    say("the server was down, s", down)
    say("processors idle, %", 100 * (idle_after[0] - idle[0]) / (idle_after[1] - idle[1]))
    lacking = Room(run, sorted(lines, key=lambda line: line.at), admissions.serves, slots).lacking
    say_passes(passed, n, per, lambda begin, end: lacking(begin - clock, end - clock))
    say_returns(run)
    say("starts by the jobs' own log", len(starts))
    say("passes that kills took from jobs before their start", len(passed) - len(starts))
    say("most in a window by the jobs' own log", most_in_a_window(starts, per))
    say("used by the jobs' own log", used(starts, n, per))
    return int(most_in_a_window(passed, per) > n)


def say_passes(passed: list[float], n: int, per: float, lacking: Callable[[float, float], float]) -> None:
    """Print how a rate was used; *lacking* tells how long no live process had room between two instants."""
    late = [(later - at - per, lacking(at + per, later)) for at, later in zip(passed, passed[n:], strict=False)]
    lacked = sum(seconds for _, seconds in late[::n])  # on the way from the first pass to those n, 2 n, … behind it
    say("passes by the server's record", len(passed))
    say("most in a window that begins at a pass", most_in_a_window(passed, per))
    say("used", used(passed, n, per))
    say("used while a live process had room", used(passed, n, per, lacked))
    late.sort()
    for name, place in (("middle", len(late) // 2), ("99 %", len(late) * 99 // 100), ("longest", -1)):
        say(f"ms from the opening of a place to the pass: {name}", late[place][0] * 1000)
    say("ms from the opening to the pass, with room: longest", max(ms - lacked for ms, lacked in late) * 1000)


def say_returns(run: Run) -> None:
    """Print how long the leases of killed processes stayed: until then their jobs and slots were not back."""
    returns = sorted(run.returns) or [0.0]
    say("leases back after a kill, s: middle", returns[len(returns) // 2])
    say("leases back after a kill, s: longest", returns[-1])


def used(starts: list[float], n: int, per: float, lacked: float = 0.0) -> float:
    """Return which part of a rate was used: the least time that so many starts need, of what they took beside *lacked*."""
    windows = (len(starts) - 1) // n
    return windows * per / (starts[windows * n] - starts[0] - lacked) if windows > 0 else 0.0


def keys(options: argparse.Namespace) -> int:
    """
    Let a job wait behind the limit of each of many keys, and find how late it starts, and how often a ticket was let go for it.

    Limits open evenly over the seconds: of each key, one job starts at once, and the next one a window later.
    """
    per = options.seconds + 10
    with running(options, per=f"{round(per * 1000)}ms") as run, run.server.client() as client:
        prefix, job, step = QueueKeys("conveyor", "levelled").prefix, run.tasks.keyed.s, -(-options.keys // 1000)
        run.start(options.processes, 50)
        run.app.enqueue_many([job("first", 0)])
        run.wait(run.lines, "the first start", 60)
        begin = time.monotonic()
        for at in range(0, options.keys, step):
            part = range(at, min(at + step, options.keys))
            run.app.enqueue_many([job(f"k{key}", n) for n in (0, 1) for key in part])
            time.sleep(max(0.0, begin + options.seconds * at / options.keys - time.monotonic()))
        run.wait(lambda: client.hlen(prefix + "waits") == options.keys, "a job of each key to wait", per)
        opens = [at + per * 1000 for at in last_passes(client, prefix, options.keys)]
        parked = int(client.hget(prefix + "conf", "waits"))
        seconds, micros = client.time()
        clock = seconds + micros / 1e6 - time.monotonic()
        if (seconds * 1000) > min(opens):
            raise SystemExit("Limits opened before a job of each key waited: give more --seconds.")
        time.sleep(max(0.0, max(opens) / 1000 - clock - time.monotonic()))
        run.wait(run.drained, "the queue to be empty")
        passed = last_passes(client, prefix, options.keys)
        again = int(client.hget(prefix + "conf", "waits")) - parked
        starts = {line.key: (line.at + clock) * 1000 for line in run.lines() if line.n == 1}
    late = sorted(at - due for at, due in zip(passed, opens, strict=True))
    started = sorted(starts[f"k{key}"] - due for key, due in enumerate(opens))
    say("keys, seconds in which their limits open", f"{options.keys}, {options.seconds:g}")
    say("admissions a start", 1 + again / options.keys)
    for what, found in (("pass by the server's record", late), ("start by the jobs' own log", started)):
        for name, place in (("middle", len(found) // 2), ("99 %", len(found) * 99 // 100), ("longest", -1)):
            say(f"ms from the opening to the {what}: {name}", float(found[place]))
    say("started more than 20 ms after the opening", sum(ms > 20 for ms in started))
    say("passed before the opening", sum(ms < 0 for ms in late))
    return int(again > 0.05 * options.keys or late[0] < 0)


def last_passes(client: Any, prefix: str, count: int) -> list[int]:
    """Return when the limit of each key was passed last, in ms since the epoch by the server's clock."""
    with client.pipeline(transaction=False) as pipeline:
        for key in range(count):
            pipeline.lindex(f"{prefix}rate:each:k{key}", 0)
        return [int(at) for at in pipeline.execute()]


def concurrency(options: argparse.Namespace) -> int:
    """Count jobs that run at a time, with kills; slots that are taken after draining."""
    with running(options, n=options.n, seconds=0.02) as run:
        calls, queue = map(run.tasks.slotted.s, itertools.count()), run.app.queue("levelled")
        jobs = 0

        def refill() -> None:
            """Keep jobs waiting as long as processes are killed."""
            nonlocal jobs
            if len(queue) < options.jobs // 2:
                jobs += len(run.app.enqueue_many(itertools.islice(calls, options.jobs)))

        refill()
        run.start(options.processes, -(-50 // options.processes))
        run.wait(run.lines, "the first start", 60)
        killed = run.kill_evenly(options.seconds, refill)
        run.wait(run.drained, "the queue to be empty")
        lines = run.lines()
        run.see_returns()
        slots = [state.used for state in run.app.limits.list("levelled")]
        dead = queue.stats().dead
    most, over, gaps = count_running(lines, options.n)
    say("limit, worker slots", f"{options.n}, 50")
    say("kills", killed)
    say("jobs, starts", f"{jobs}, {sum(line.what == 'start' for line in lines)}")
    say("most at a time by the jobs' own log", most)
    say("starts above the limit", over)
    say_returns(run)
    say("longest gap between starts while work waited, s", gaps)
    say("slots in use after draining", sum(slots))
    say("jobs lost", jobs - len({line.n for line in lines if line.what == "end"}) - dead)
    return int(over > 0 or sum(slots) > 0)


def count_running(lines: list[Line], limit: int) -> tuple[int, int, float]:
    """Return the most jobs at a time, how often that was above *limit*, and the longest gap between two starts."""
    # A job that a kill ended is over when its process was last seen: at the next start of that job at the latest.
    open_: dict[int, Line] = {}
    alive = last_seen(lines)
    most = over = 0
    gap = 0.0
    last: float | None = None
    for line in sorted(lines, key=lambda line: line.at):
        if line.what == "start":
            open_[line.n] = line
            running_now = sum(alive[one.pid] >= line.at or one.pid == line.pid for one in open_.values())
            most = max(most, running_now)
            over += running_now > limit
            gap = max(gap, 0.0 if last is None else line.at - last)
            last = line.at
        else:
            open_.pop(line.n, None)
    return most, over, gap


def last_seen(lines: list[Line]) -> dict[int, float]:
    """Return when each process wrote its last line."""
    found: dict[int, float] = {}
    for line in lines:
        found[line.pid] = max(found.get(line.pid, 0.0), line.at)
    return found


def order(options: argparse.Namespace) -> int:
    """Count jobs that start before an earlier one of their key has ended, with retries and kills."""
    with running(options, seconds=0.001) as run:
        calls = [run.tasks.ordered.s(f"k{key}", n) for n in range(20) for key in range(options.keys)]
        run.app.enqueue_many(calls)
        run.start(options.processes, 50)
        run.wait(run.lines, "the first start", 60)
        killed = 0
        while killed < options.kills and not run.drained():
            time.sleep(0.3)
            killed += run.kill_one()
        run.wait(run.drained, "the queue to be empty")
        lines = run.lines()
        dead = run.app.queue("levelled").stats().dead
    inversions, overlaps, ended = out_of_order(lines)
    say("keys x jobs", f"{options.keys} x 20")
    say("kills, failed attempts", f"{killed}, {sum(line.what == 'fail' for line in lines)}")
    say("starts, jobs ended, dead", f"{sum(line.what == 'start' for line in lines)}, {ended}, {dead}")
    say("inversions", inversions)
    say("overlaps", overlaps)
    return int(inversions + overlaps > 0 or ended + dead < 20 * options.keys)


def out_of_order(lines: list[Line]) -> tuple[int, int, int]:
    """Return starts before an earlier job's end, starts while another job of the key runs, and the jobs that ended."""
    inversions = overlaps = 0
    ended: defaultdict[str, set[int]] = defaultdict(set)
    open_: defaultdict[str, dict[int, Line]] = defaultdict(dict)
    alive = last_seen(lines)
    for line in sorted(lines, key=lambda line: line.at):
        if line.what != "start":
            open_[line.key].pop(line.n, None)
            if line.what == "end":
                ended[line.key].add(line.n)
            continue
        inversions += any(n not in ended[line.key] for n in range(line.n))
        overlaps += any(one.n != line.n and alive[one.pid] >= line.at for one in open_[line.key].values())
        open_[line.key][line.n] = line
    return inversions, overlaps, sum(map(len, ended.values()))


def fairness(options: argparse.Namespace) -> int:
    """Find how long another tenant's single job waits while one floods."""
    with running(options) as run:
        active = options.keys
        run.app.enqueue_many([run.tasks.fair.s("flood", n) for n in range(options.jobs)])
        run.app.enqueue_many([run.tasks.fair.s(f"t{key}", 0) for key in range(active - 1)])
        run.start(1, 10)
        run.wait(lambda: sum(line.key != "flood" for line in run.lines()) == active - 1, "the tenants' jobs")
        lines = [line for line in sorted(run.lines(), key=lambda line: line.at) if line.what == "start"]
    places = {line.key: at for at, line in enumerate(lines, 1) if line.key != "flood"}
    flood = sum(line.key == "flood" for line in lines[: max(places.values())])
    say("tenants, jobs of the one that floods", f"{active}, {options.jobs}")
    say("starts until the last tenant's single job had started", max(places.values()))
    say("of them jobs of the flood", flood)
    return int(max(places.values()) > 2 * active)


def weights(options: argparse.Namespace) -> int:
    """Change the weight of a key with many jobs queued, and count the turns that follow."""
    if options.jobs < WEIGHED_JOBS:
        raise SystemExit(
            f"weights counts thousands of starts before and after the change: give it --jobs {WEIGHED_JOBS} at least."
        )
    with running(options) as run:
        half = options.jobs // 2
        for at in range(0, half, 50_000):
            part = range(at, min(half, at + 50_000))
            run.app.enqueue_many(run.tasks.weighed.s(key, n) for n in part for key in ("light", "heavy"))
        run.app.groups.set("levelled", "heavy", weight=4)
        run.start(1, options.slots)
        run.wait(lambda: len(run.lines()) >= 2000, "2,000 starts")
        first = Counter(line.key for line in sorted(run.lines(), key=lambda line: line.at)[:1000])
        began = time.monotonic()
        run.app.groups.set("levelled", "heavy", weight=1)
        changed = len(run.lines())
        took = time.monotonic() - began
        run.wait(lambda: len(run.lines()) >= changed + 4000, "the next starts")
        after = Counter(
            line.key for line in sorted(run.lines(), key=lambda line: line.at)[changed + 1500 : changed + 3500]
        )
    say("queued", options.jobs)
    say("heavy : light with weight 4, of the first 1,000", f"{first['heavy']} : {first['light']}")
    say("heavy : light with weight 1 again", f"{after['heavy']} : {after['light']}")
    say("seconds that the change took", took)
    return int(not 3.5 <= first["heavy"] / max(1, first["light"]) <= 4.5)


CASES = {
    "rate": rate,
    "keys": keys,
    "concurrency": concurrency,
    "order": order,
    "fairness": fairness,
    "weights": weights,
}
JOBS = {"weights": WEIGHED_JOBS}
"""The jobs of the cases that need other than `USUAL_JOBS`."""


def main() -> int:
    """Run one case."""
    parser = argparse.ArgumentParser(prog="benchmarks.load_levelling", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--n", type=int, default=100, help="the number of the limit")
    parser.add_argument("--per", type=float, default=1.0, help="the window of the rate, in seconds")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=0, help="restarts of the server")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--jobs", type=int, help=f"{USUAL_JOBS} unless given; {WEIGHED_JOBS} for weights")
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=10)
    parser.add_argument("--server", default="valkey")
    parser.add_argument(
        "--cold", action="store_true", help="fresh interpreters, which import for a second of processor time"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    if options.jobs is None:
        options.jobs = JOBS.get(options.case, USUAL_JOBS)
    print(f"{options.case}: seed {options.seed}", flush=True)
    return CASES[options.case](options)


if __name__ == "__main__":
    sys.exit(main())
