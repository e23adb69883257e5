"""
Every answer of the dashboard and every command that reads, on queues that are full: `python -m benchmarks.dashboard_at_scale`.

Prints for each the processor time of an answer in both processes, its median and 99th percentile by the clock (which a busy
machine makes longer), and the median of the longest command that each call gave the server, by its slow log.

With queues besides, each answer is measured twice: where nobody has asked before, and where somebody follows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import redis

from benchmarks.harness import cpu_seconds, percentile, running_server
from conveyor import Conveyor
from conveyor.cli import main as command_line
from conveyor.dashboard import Access, dashboard
from conveyor.dashboard.queue_counts import QueueTable
from conveyor.ids import new_ids
from conveyor.payload.records import AttemptHistory, Failure, to_json, write_envelope
from conveyor.store import operations

GOAL_MS, GOAL_SCRIPT_MS, GOAL_OF_MANY_MS = 100.0, 5.0, 300.0
TASKS = 20
PLAIN = (
    "session", "snapshot", "overview", "metrics", "load", "operations", "schedules", "workers", "limits", "topics", "redis",
    "audit", "openapi.json", "jobs/counts",
)  # fmt: skip
FILTERS = (
    "", "state:ready", "state:dead", "state:scheduled", "queue:mail", "task:mail.task7", "state:dead error:Timeout",
    "args.user:999", "state:ready task:none", '"did not answer"', "age:>1h", "tag:vip", "state:dead task:mail.* error:KeyError",
)  # fmt: skip
ERRORS = ("builtins.TimeoutError", "builtins.ValueError", "httpx.ConnectError", "builtins.KeyError")


def fill(app: Conveyor, queued: int, dead: int, queues: int) -> dict[str, str]:
    """Store jobs that are ready, scheduled and dead in `mail`, and one in each of so many other queues; return an id each."""
    client, keys, ids = app.client, app.client.keys("mail"), {}
    client.announce(keys)
    execute = app.client.execute
    for first in range(0, queued, 5_000):
        names = new_ids(5_000)
        entries = [
            operations.Entry(
                one, write_envelope(f"mail.task{at % TASKS}", b'{"user":%d,"text":"%s"}' % (at, b"x" * 60))
            )
            for at, one in enumerate(names, first)
        ]
        client.push(keys, entries)
        if first <= queued // 2:
            ids["ready"] = f"mail:{names[0]}"
    now = int(time.time() * 1000)
    for first in range(0, dead, 2_000):
        names = new_ids(min(2_000, dead - first))
        jobs: list[Any] = ["HSET", keys.jobs]
        states: list[Any] = ["HSET", keys.state]
        places: list[Any] = ["ZADD", keys.dead]
        for at, one in enumerate(names, first):
            failure = Failure(
                3,
                now - at,
                ERRORS[at % 4],
                f"user {at} did not answer",
                f"app/mail.py:{40 + at % 4} send",
                "Traceback …\n" * 20,
                "web-1:4711",
            )
            jobs += [one, write_envelope(f"mail.task{at % TASKS}", b'{"user":%d}' % at)]
            states += [one, AttemptHistory(3, 3, 0, [to_json(failure)] * 3).encode()]
            places += [now - at * 500, one]
        for command in (jobs, states, places):
            execute(*command, key=keys.jobs)
        ids["dead"] = f"mail:{names[0]}"
    ids["scheduled"] = app.queue("mail").push({"user": 1}, delay="1h")
    minute = now // 60_000
    for number in range(minute - 90, minute):
        counters: list[Any] = ["HSET", f"{keys.prefix}stats:{number}"]
        for task in range(TASKS):
            counters += [f"done:mail.task{task}", 100, f"failed:mail.task{task}", 2, f"ms:mail.task{task}", 4000]
            for bucket in range(8):
                counters += [f"le{bucket}:mail.task{task}", 12]
        execute(*counters, key=keys.jobs)
    for at in range(queues):
        app.queue(f"tenant-{at:05}").push(1)
    return ids


def serve(app: Conveyor, queues: int) -> None:
    """Register a worker process in each of the other queues, as one that serves them all is."""
    about = operations.about(host="web-1", pid=4711)
    for at in range(queues):
        app.client.run(operations.register(app.client.keys(f"tenant-{at:05}"), f"worker-{at}", 3_600_000, about))


def calls(ids: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (route, inputs) of all that reads."""
    for route in PLAIN:
        yield route, {}
    for span in ("15m", "1h", "6h", "24h", "7d", "30d"):
        yield "history", {"range": span}
    for order in ("name", "ready", "dead", "oldest_age"):
        yield "queues", {"sort": order}
    yield "queues", {"q": "tenant-000", "offset": 10}
    yield "queue", {"name": "mail"}
    for text in FILTERS:
        yield "jobs", {"filter": text}
        yield "jobs/matching", {"filter": text}
    yield "jobs", {"filter": "state:ready", "offset": 10**12}
    for id_ in ids.values():
        yield "job", {"id": id_}
    for span in ("24h", "7d"):
        yield "failures", {"range": span}


COMMANDS = (
    "status", "doctor", "queue list", "queue show mail", "job list --limit 50", "job list --limit 50 state:dead error:Timeout",
    "workers list", "schedule list", "limits list", "topic list", "metrics",
)  # fmt: skip


class ServerLog:
    """The slow log of a server, as the time of the longest command since it was begun anew."""

    def __init__(self, url: str) -> None:
        execute: Callable[..., Any] = redis.Redis.from_url(url).execute_command
        self._execute = execute
        execute("CONFIG SET", "slowlog-log-slower-than", "500")
        execute("CONFIG SET", "slowlog-max-len", "1000")

    def begin(self) -> None:
        """Forget what was longest."""
        self._execute("SLOWLOG RESET")

    def longest(self) -> tuple[float, str]:
        """Return the longest command in ms, with its first words; (0, "") where none took half a millisecond."""
        found = [
            (entry[2] / 1000, b" ".join(entry[3][:5])[:90].decode(errors="replace"))
            for entry in self._execute("SLOWLOG", "GET", "1000")
        ]
        return max(found, default=(0.0, ""))


class Costs:
    """The cost of calls: their time, the processor time of both processes, and the longest command of each in the server."""

    def __init__(self, url: str, server: int) -> None:
        self._log, self._server = ServerLog(url), server
        self.took: list[float] = []
        self.busy: list[float] = []
        self.longest: list[tuple[float, str]] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Measure a call."""
        self._log.begin()
        begin, cpu = time.perf_counter(), time.process_time() + cpu_seconds(self._server)
        yield
        self.took.append((time.perf_counter() - begin) * 1000)
        self.busy.append((time.process_time() + cpu_seconds(self._server) - cpu) * 1000)
        self.longest.append(self._log.longest())

    def report(self, name: str, goal: float = GOAL_MS) -> list[str]:
        """Print a line and begin anew; return the line where it misses a goal."""
        busy, (longest, text) = statistics.mean(self.busy), sorted(self.longest)[len(self.longest) // 2]
        bad = busy > goal or longest > GOAL_SCRIPT_MS
        line = (
            f"{'MISS' if bad else '    '} {name:<66.66} processor {busy:7.1f} ms   median {statistics.median(self.took):7.1f}   "
            f"p99 {percentile(self.took, 99):7.1f}   longest in the server {longest:6.1f}"
        )
        print(line + (f"   {text!r}" if longest > GOAL_SCRIPT_MS else ""), flush=True)
        self.took, self.busy, self.longest = [], [], []
        return [line] if bad else []


async def measure_routes(
    app: Conveyor, ids: dict[str, str], costs: Costs, times: int, goal: float, *, followed: bool
) -> list[str]:
    """Measure each route; return what misses a goal. *followed*: a snapshot is read before each call."""
    site: Any = dashboard(app, lambda _: Access.ALL)
    missed = []
    transport = httpx.ASGITransport(site)
    async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=300) as client:
        for route, inputs in calls(ids):
            for _ in range(times):
                for shared in (site.service.live.snapshot, site.service.live.findings):
                    shared._found = None
                site.service.live._flags_until = 0.0
                if followed:
                    await client.get("/api/v1/snapshot")
                    site.service.live.snapshot._found = None
                else:
                    site.service.live.queues = QueueTable(site.service.admin)
                with costs.one():
                    answer = await client.get(f"/api/v1/{route}", params=inputs)
                assert answer.status_code == 200, answer.text
            name = f"{route} {' '.join(f'{key}={value}' for key, value in inputs.items())}"
            missed += costs.report(f"{'followed: ' if followed else ''}{name}", goal)
    return missed


def main() -> int:
    """Return 0 when every goal is reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard_at_scale", description=__doc__)
    parser.add_argument("--queued", type=int, default=1_000_000)
    parser.add_argument("--dead", type=int, default=100_000)
    parser.add_argument("--queues", type=int, default=0, help="queues with one job each, besides")
    parser.add_argument("--served", action="store_true", help="one process serves them all")
    parser.add_argument("--times", type=int, default=30, help="calls of each route")
    options = parser.parse_args()
    with running_server() as (url, server), Conveyor(url) as app:
        begin = time.monotonic()
        ids = fill(app, options.queued, options.dead, options.queues)

        @app.task(name="mail.task0", queue="mail")
        def nothing() -> None: ...

        app.schedules.put("hourly", nothing.s(), every="1h")
        print(f"filled in {time.monotonic() - begin:.0f} s")
        if options.served:
            serve(app, options.queues)
        costs, goal = Costs(url, server), GOAL_OF_MANY_MS if options.queues else GOAL_MS
        missed = []
        for followed in (False, True)[: 1 + bool(options.queues)]:
            missed += asyncio.run(measure_routes(app, ids, costs, options.times, goal, followed=followed))
        for command in (*COMMANDS, *(f"job {verb} {id_}" for id_ in ids.values() for verb in ("show", "why"))):
            for _ in range(3):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), costs.one():
                    command_line([*command.split(), "--url", url])
            costs.report(f"conveyor {command}", goal=float("inf"))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
