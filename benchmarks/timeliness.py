"""
Work that comes when it should, and what is seen while it runs: ``python -m benchmarks.timeliness [SCENE…]``.

Counts of commands hold on any machine; times are figures only of one that does nothing else. Each scene says its goal.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import NAMESPACE, Bench, Worker, commands_sent, percentile, running_server, wait_for
from benchmarks.job_notes import Record


def schedules(bench: Bench) -> None:
    """Commands a second of an idle worker without schedules and with 1,000 of them. Goal: at most 1 more."""
    from benchmarks.measured_jobs import app, due

    bench.flush()
    with Worker(bench, "-q", "due", "--processes", "1") as worker:
        _ready(bench, worker, "due")
        without = _idle_rate(bench)
        for number in range(bench.size(1000)):
            app.schedules.put(f"idle{number}", due.s(number, 0), cron="0 0 1 1 *")
        _ready(bench, worker, "due")
        bench.note("idle, commands /s more", _idle_rate(bench) - without)
    for one in app.schedules.list():
        one.delete()


def _idle_rate(bench: Bench) -> float:
    time.sleep(3)  # what was put has been looked at
    with bench.client() as client:
        before, began = commands_sent(client), time.monotonic()
        time.sleep(20)  # what is measured is that nothing happens
        return float((commands_sent(client) - before) / (time.monotonic() - began))


def _lateness(record: Record, count: int, what: str, *, within: float = 60) -> list[float]:
    """Return how late *count* jobs started, in ms, as soon as their notes are there."""
    late: list[float] = []

    def have_started() -> bool:
        late.extend(one.value / 1000 for one in record.read())
        return len(late) >= count

    wait_for(have_started, what, within=within)
    return late


def ticks(bench: Bench) -> None:
    """Measure how late a schedule of each second starts its job in an idle worker. Goal: 50 ms at p99."""
    from benchmarks.measured_jobs import app, tick

    bench.flush()
    record, count = Record(bench.record_path), 20 if bench.quick else 120
    list(record.read())
    with Worker(bench, "-q", "ticks", "--processes", "1") as worker:
        _ready(bench, worker, "ticks")
        app.schedules.put("each-second", tick.s(1), every="1s")
        late = _lateness(record, count, "ticks", within=count + 60)
        app.schedules.delete("each-second")
    bench.note("tick late p50 ms", percentile(late, 50))
    bench.note("tick late p99 ms", percentile(late, 99))


def instant(bench: Bench) -> None:
    """Measure how long it takes until 10,000 jobs that are due at one instant have started in one process. Goal: 1 s."""
    from benchmarks.measured_jobs import app, due

    bench.flush()
    record, count = Record(bench.record_path), bench.size(10_000)
    list(record.read())
    with Worker(bench, "-q", "due", "--processes", "1", "-c", "1000") as worker:
        _ready(bench, worker, "due")
        at = int(time.time()) + 6
        timed = due.options(at=datetime.fromtimestamp(at, UTC))
        app.enqueue_many(timed.s(number, at * 1_000_000) for number in range(count))
        assert time.time() < at, "enqueueing took longer than the delay"
        used = worker.cpu()
        late = _lateness(record, count, "all starts")
        bench.note("due at once, CPU s of the worker", worker.cpu() - used)
    bench.note("due at once, first start ms", min(late))
    bench.note("due at once, last start ms", max(late))


def delayed(bench: Bench) -> None:
    """Measure how late single delayed jobs start in an idle worker, one each 50 ms. Goal: 20 ms at p99."""
    from benchmarks.measured_jobs import app, due

    bench.flush()
    record, count = Record(bench.record_path), bench.size(1000)
    list(record.read())
    with Worker(bench, "-q", "due", "--processes", "1") as worker:
        _ready(bench, worker, "due")
        first = (time.time_ns() // 1_000_000 + 3000) * 1000
        instants = [first + number * 50_000 for number in range(count)]
        app.enqueue_many(
            due.options(at=datetime.fromtimestamp(at / 1e6, UTC)).s(number, at) for number, at in enumerate(instants)
        )
        late = _lateness(record, count, "all", within=count * 0.05 + 60)
    bench.note("delayed late p50 ms", percentile(late, 50))
    bench.note("delayed late p99 ms", percentile(late, 99))


def autoscale(bench: Bench) -> None:
    """Measure how soon a burst of 10,000 jobs of 50 ms brings 2..8 processes to the upper bound, and back. Goals: 5 s, 60 s."""
    from benchmarks.measured_jobs import app, burst

    bench.flush()
    with Worker(bench, "-q", "burst", "--autoscale", "2..8", "-c", "10") as worker:
        wait_for(lambda: worker.check() and _registered(bench, "burst") == 2, "two processes")
        time.sleep(2)
        used = worker.cpu()
        app.enqueue_many(burst.s(number) for number in range(10_000))
        began = time.monotonic()
        wait_for(lambda: _registered(bench, "burst") == 8, "the upper bound")
        bench.note("burst, upper bound after s", time.monotonic() - began)
        bench.note("burst, CPU s until then", worker.cpu() - used)
        queue = app.queue("burst")
        wait_for(lambda: len(queue) + queue.stats().leased == 0, "the end of the burst", within=300, every=0.2)
        began = time.monotonic()
        wait_for(lambda: _registered(bench, "burst") == 2, "the lower bound", within=120)
        bench.note("burst, lower bound after s", time.monotonic() - began)
        with bench.client() as client:
            bench.note("burst, jobs charged", client.hlen(f"{NAMESPACE}:{{burst}}:state") + queue.stats().dead)


def dev(bench: Bench) -> None:
    """Measure how long `conveyor dev` takes until the worker and the dashboard are there. Goal: 2 s."""
    with tempfile.TemporaryDirectory(prefix="dev", dir="/tmp") as directory, socket.socket() as probe:
        (Path(directory) / "tasks.py").write_text(
            "from conveyor import Conveyor\n\napp = Conveyor()\n\n\n@app.task\ndef work() -> None: ...\n"
        )
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
        log = Path(directory) / "log"
        with log.open("wb") as file:
            began = time.monotonic()
            program = subprocess.Popen(
                [sys.executable, "-m", "conveyor", "dev", "tasks:app", "--port", str(port)],
                cwd=directory, stdout=file, stderr=file, env=environment,
            )  # fmt: skip
        try:
            wait_for(lambda: b"works for" in log.read_bytes(), "the worker")
            bench.note("dev, worker after s", time.monotonic() - began)
            wait_for(lambda: _listens(port), "the dashboard")
            bench.note("dev, both after s", time.monotonic() - began)
        finally:
            program.send_signal(signal.SIGINT)
            _, _, used = os.wait4(program.pid, 0)
        bench.note("dev, CPU s of all processes", used.ru_utime + used.ru_stime)


def progress(bench: Bench) -> None:
    """Measure a call of `context.progress`, 100,000 times a second, and count what is written. Goals: 1 µs, 4 writes a second."""
    from benchmarks.measured_jobs import app, idling, progressing

    bench.flush()
    record, seconds = Record(bench.record_path), 2.0 if bench.quick else 20.0
    list(record.read())
    calls: dict[str, float] = {}
    with Worker(bench, "-q", "told", "--processes", "1") as worker:
        _ready(bench, worker, "told")
        for task in (idling, progressing):
            with bench.client() as client:
                before, began = commands_sent(client), time.monotonic()
                task.enqueue(seconds).result(timeout=f"{seconds + 60:.0f}s")
                calls[task.name] = (commands_sent(client) - before) / (time.monotonic() - began)
    app.close()
    taken = [one.value / 1e6 for one in record.read()]  # µs of one call: a line is a thousand of them, in ns
    bench.note("progress, calls /s", 1000 * len(taken) / seconds)
    bench.note("progress, p50 of a call µs", percentile(taken, 50))
    bench.note("progress, mean of a call µs", sum(taken) / len(taken))
    bench.note("progress, commands /s more", calls[progressing.name] - calls[idling.name])


def watch(bench: Bench) -> None:
    """1,000 jobs watched by 100 watchers that are cut off meanwhile. Goals: one subscription, no start and no end missed."""
    bench.flush()
    asyncio.run(_watch(bench))


async def _watch(bench: Bench) -> None:
    from benchmarks.measured_jobs import app, burst

    client, count = bench.client(), 1000
    jobs = await app.aenqueue_many(burst.s(number) for number in range(count))
    seen: list[dict[str, list[str]]] = [{} for _ in range(100)]

    async def follow(states: dict[str, list[str]]) -> None:
        async for update in app.awatch(jobs):
            states.setdefault(update.job_id, []).append(update.state)

    watchers = [asyncio.create_task(follow(states)) for states in seen]
    key = f"{NAMESPACE}:{{burst}}:waiters"
    await _until(lambda: client.hlen(key) == count and all(len(states) == count for states in seen))
    subscribed = [one for one in client.client_list() if int(one["sub"])]
    channels = {value.count(b"*") for value in client.hvals(key)}
    cuts, began = 0, time.monotonic()
    with Worker(bench, "-q", "burst", "--processes", "1", "-c", "10") as worker:
        while not all(one.done() for one in watchers):
            worker.check()
            await asyncio.sleep(0.1)
            if cuts < 10 and any("leased" in states for states in seen[0].values()):
                for one in client.client_list():
                    if int(one["sub"]):
                        client.client_kill_filter(_id=one["id"])
                cuts += 1
    await asyncio.gather(*watchers)
    bench.note("watched, subscriptions", len(subscribed))
    bench.note("watched, registrations of a job", max(channels))
    bench.note("watched, cuts", cuts)
    bench.note("watched, updates", sum(len(one) for states in seen for one in states.values()))
    bench.note("watched, starts missed", sum(one.count("leased") != 1 for states in seen for one in states.values()))
    bench.note("watched, ends missed", sum(one[-1] != "done" for states in seen for one in states.values()))
    bench.note("watched, seconds", time.monotonic() - began)
    await app.aclose()


def stream(bench: Bench) -> None:
    """10,000 parts read by a reader that is cut ten times. Goal: each once, in order."""
    bench.flush()
    asyncio.run(_stream(bench))


async def _stream(bench: Bench) -> None:
    from benchmarks.measured_jobs import app, emitting

    client, count = bench.client(), bench.size(10_000)
    values: list[int] = []
    last, cuts = None, 0
    with Worker(bench, "-q", "told", "--processes", "1") as worker:
        _ready(bench, worker, "told")
        job, began = await emitting.aenqueue(count), time.monotonic()
        while len(values) < count:
            async with aclosing(job.astream(last)) as parts:
                async for part in parts:
                    last = part.id
                    values.append(part.value)
                    if cuts < 10 and len(values) >= (cuts + 1) * count // 11:
                        cuts += 1
                        if cuts % 2:
                            break  # it goes away, and comes back with the id of the last part
                        for one in client.client_list(_type="pubsub"):
                            client.client_kill_filter(_id=one["id"])
                else:
                    break
        taken = time.monotonic() - began
    bench.note("stream, parts", len(values))
    bench.note("stream, cuts", cuts)
    bench.note("stream, parts missing", len(set(range(1, count + 1)) - set(values)))
    bench.note("stream, parts twice", len(values) - len(set(values)))
    bench.note("stream, parts out of order", sum(b <= a for a, b in itertools.pairwise(values)))
    bench.note("stream, parts /s", len(values) / taken)
    await app.aclose()


async def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _registered(bench: Bench, queue: str) -> int:
    with bench.client() as client:
        return int(client.zcard(f"{NAMESPACE}:{{{queue}}}:workers"))


def _ready(bench: Bench, worker: Worker, queue: str) -> None:
    wait_for(lambda: worker.check() and _registered(bench, queue), "the worker")
    time.sleep(1)


SCENES: dict[str, Callable[[Bench], None]] = {
    scene.__name__: scene for scene in (schedules, ticks, instant, delayed, autoscale, dev, progress, watch, stream)
}


def main() -> None:
    """Run the scenes that are named, or all."""
    parser = ArgumentParser(prog="python -m benchmarks.timeliness", description=__doc__)
    parser.add_argument("scenes", nargs="*", choices=[*SCENES, []], help="all without")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    options = parser.parse_args()
    with running_server() as (url, pid), tempfile.TemporaryDirectory(prefix="bench") as directory:
        os.environ["CONVEYOR_URL"] = url  # before benchmarks.measured_jobs is imported
        bench = Bench(url, pid, options.quick, 0, Path(directory) / "record")
        os.environ["CONVEYOR_BENCH_RECORD"] = str(bench.record_path)
        for name in options.scenes or SCENES:
            print(name, flush=True)
            SCENES[name](bench)


if __name__ == "__main__":
    main()
