"""The figures: one fault, many times, under load. Each scenario counts what docs/reliability.md states."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from chaos.environment import Environment
from chaos.processes import Program
from chaos.run_result import RunResult, spread

Facts = dict[str, Any]


class Scenario(NamedTuple):
    """A scenario: its function, its count in a full run, and the lease of its workers."""

    play: Callable[[Environment, int, Facts], RunResult]
    times: int
    lease: float
    fsync: str = "always"


def run(name: str, count: int | None, seed: int, *, fsync: str = "") -> tuple[RunResult, Environment, Facts]:
    """Play a scenario. *count* None: a full run. *fsync*: another `appendfsync` than the scenario's."""
    scenario = SCENARIOS[name]
    count = scenario.times if count is None else count
    facts: Facts = {"scenario": name, "count": count, "seed": seed, "lease": scenario.lease}
    began = time.monotonic()
    with Environment(seed=seed, lease=scenario.lease, fsync=fsync or scenario.fsync) as environment:
        result = scenario.play(environment, count, facts)
        facts["took"] = f"{time.monotonic() - began:.0f} s"
        return result, environment, facts


def _producers(environment: Environment, urls: list[str], *, rate: float, count: int, mix: dict[str, float]) -> None:
    for number, url in enumerate(urls):
        place, text = 10 * len(environment.process_group.producers()) + number, json.dumps(mix)
        environment.process_group.producer(
            place, url, seed=environment.seed, rate=rate / len(urls), count=count // len(urls), mix=text
        )


def _finish(environment: Environment, facts: Facts, *, seconds: float = 60, also: tuple[str, ...] = ()) -> RunResult:
    began = time.monotonic()
    environment.heal()
    if environment.drain(seconds) is not None:
        facts["drained in"] = f"{time.monotonic() - began:.1f} s"
    return environment.evaluate(also=also)


def _end_producers(environment: Environment) -> None:
    for program in environment.process_group.producers():
        program.signal(signal.SIGTERM)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# -- workers -----------------------------------------------------------------------------------------------------------


def sigkill(environment: Environment, count: int, facts: Facts) -> RunResult:
    """SIGKILL a random worker, again and again, while 200 jobs for each kill go through."""
    draw = random.Random(environment.seed)
    workers = [environment.process_group.supervised(f"worker{n}", environment.url, grace="1s") for n in range(2)]
    workers.append(environment.process_group.embedded("program", environment.url))
    environment.ready(5)
    every = 0.45
    mix = {"bulk": 0.06, "quick": 1, "steady": 0.1, "message": 0.1, "quick:300": 0.2}
    _producers(environment, [environment.url] * 2, rate=200 / every, count=200 * count, mix=mix)
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + every * (number + draw.random()) - time.monotonic()))  # the rhythm of the fault
        _kill_one(environment, draw, workers)
    return _finish(environment, facts, seconds=120)


def _kill_one(environment: Environment, draw: random.Random, workers: list[Program]) -> None:
    """Kill a child, or now and then a whole worker: one that is up, so that every kill strikes."""
    while True:
        program = draw.choice(workers)
        children = program.children() if program.supervised else []
        if children and draw.random() < 0.95:
            child = draw.choice(children)
            environment.fault("kill worker", pids=[child], supervised=True)
            _kill([child])
            return
        if program.alive():
            family = program.family()
            environment.fault("kill worker", pids=family)
            _kill(family)
            return


def sigstop(environment: Environment, count: int, facts: Facts) -> RunResult:
    """SIGSTOP a worker for 1.2 to 4 leases while it runs jobs; it wakes, and reports what others have run meanwhile."""
    draw = random.Random(environment.seed)
    workers = [environment.process_group.embedded(f"program{n}", environment.url) for n in range(5)]
    environment.ready(5)
    mix = {"quick:900": 1, "quick:300": 1, "steady:500": 0.3, "quick": 2, "message": 0.5}
    _producers(environment, [environment.url], rate=40, count=1_000_000, mix=mix)
    environment.started(40)
    frozen: dict[int, float] = {}
    made = 0
    while made < count or frozen:
        now = time.monotonic()
        for pid in [pid for pid, until in frozen.items() if until <= now]:
            os.kill(pid, signal.SIGCONT)
            del frozen[pid]
        awake = [program for program in workers if program.pid not in frozen]
        if made < count and len(frozen) < 3:
            pid = draw.choice(awake).pid
            seconds = environment.lease * draw.uniform(1.2, 4)
            environment.fault("stop worker", pids=[pid], lasting=seconds)
            os.kill(pid, signal.SIGSTOP)
            frozen[pid] = now + seconds
            made += 1
        time.sleep(draw.uniform(0.1, 0.3))  # the rhythm of the fault
    _end_producers(environment)
    result = _finish(environment, facts)
    facts["runs that zombies finished"] = result.counts["overlapping executions"]
    return result


def recovery(environment: Environment, count: int, facts: Facts) -> RunResult:
    """Kill children under a supervisor, then whole hosts; how long until what they ran has begun elsewhere."""
    draw = random.Random(environment.seed)
    hosts = [
        environment.process_group.supervised(f"host{n}", environment.url, processes=2, concurrency=10) for n in range(4)
    ]
    survivor = environment.process_group.supervised("survivor", environment.url, processes=1, concurrency=60)
    environment.ready(9)
    _producers(environment, [environment.url], rate=8, count=1_000_000, mix={"quick:3000": 1})
    environment.started(20)
    for _ in range(count):
        child = draw.choice(environment.wait(lambda: _fresh(environment, [*hosts, survivor]), 20))
        environment.fault("kill worker", pids=[child], supervised=True)
        _kill([child])
        time.sleep(0.8)  # the rhythm of the fault
    for _ in range(max(1, count // 15)):
        child = draw.choice(environment.wait(lambda: _fresh(environment, hosts), 20))
        family = next(program for program in hosts if child in program.children()).family()
        environment.fault("kill host", pids=family)
        _kill(family)
        # The host is gone for as long as its lease lasts and longer: nobody on it gives anything back.
        time.sleep(environment.lease / 3)
    time.sleep(environment.lease + 5)  # what the last host held is due by then
    _end_producers(environment)
    result = _finish(environment, facts, seconds=60)
    facts["promised"] = f"supervised within 1 s; host gone within {environment.lease + 5:g} s"
    return result


def _fresh(environment: Environment, programs: list[Program]) -> list[int]:
    """Return the children that run jobs, all for the first time: one that came back twice would wait to run alone."""
    open_: dict[int, dict[str, int]] = {}
    for line in environment.lines("runs"):
        held = open_.setdefault(line["pid"], {})
        if line["phase"] == "start":
            held[line["id"]] = line["attempt"]
        else:
            held.pop(line["id"], None)
    children = [child for program in programs for child in program.children()]
    return [child for child in children if open_.get(child) and max(open_[child].values()) == 1]


# -- Redis and the way to it -------------------------------------------------------------------------------------------


def redis_kill(environment: Environment, count: int, facts: Facts) -> RunResult:
    """SIGKILL Redis, again and again; its append-only file is synced every second."""
    draw = random.Random(environment.seed)
    environment.process_group.supervised("worker", environment.url)
    environment.process_group.embedded("program", environment.url)
    environment.ready(3)
    mix = {"quick": 1, "bulk": 0.02, "steady": 0.1, "message": 0.2, "own": 0.1, "quick:1500": 0.02}
    _producers(environment, [environment.url] * 2, rate=120, count=1_000_000, mix=mix)
    environment.started(150)
    back: list[float] = []
    for _ in range(count):
        environment.fault("kill redis", lasting=1)
        environment.server.restart(draw.choice([0.0, 0.0, 0.3]))
        back.append(time.monotonic())
        time.sleep(draw.uniform(0.6, 1.4))  # the rhythm of the fault
    _end_producers(environment)
    result = _finish(environment, facts)
    starts = sorted(line["at"] for line in environment.lines("runs") if line["phase"] == "start")
    pauses = [next((at - moment for at in starts if at >= moment), 99.0) for moment in back]
    result.counts["throughput back"] = spread(pauses)
    return result


def cut(environment: Environment, count: int, facts: Facts) -> RunResult:
    """Cut connections at random bytes, of producers and workers alike: as many jobs as calls."""
    environment.process_group.embedded("program1", environment.proxy.url)
    environment.process_group.supervised("worker", environment.proxy.url, processes=1)
    environment.ready(2)
    mix = {"quick": 1, "bulk:15": 0.05, "message": 0.2, "own": 0.1, "unique": 0.05, "delayed": 0.1}
    _producers(environment, [environment.proxy.url] * 2, rate=250, count=1_000_000, mix=mix)
    environment.started(150)  # else the workers' own connections use up the cuts before there is load
    environment.fault("cut", lasting=600, connections=count)
    environment.proxy.cut_randomly(mean=3000, times=count, seed=environment.seed)
    environment.wait(lambda: environment.proxy.count["cut"] >= count, 330)
    _end_producers(environment)
    result = _finish(environment, facts)
    facts["connections cut"] = environment.proxy.count["cut"]
    return result


def maxmemory(environment: Environment, count: int, facts: Facts) -> RunResult:
    """Fill Redis to its maxmemory with jobs waiting: all drain, no lease is lost, pushes are refused whole."""
    for number in range(2):
        environment.process_group.supervised(f"worker{number}", environment.url)
    environment.ready(4)
    environment.server.command("HSET", "chaos:{default}:conf", "paused", "1")
    _producers(environment, [environment.url] * 2, rate=0, count=count, mix={"bulk": 1, "quick:2500": 0.05, "flaky": 1})
    environment.wait(lambda: not any(one.alive() for one in environment.process_group.producers()), 120)
    facts["waiting at maxmemory"] = environment.remaining()
    environment.fault("squeeze memory", lasting=60)
    environment.server.squeeze(0.8)
    environment.server.command("HDEL", "chaos:{default}:conf", "paused")
    _producers(environment, [environment.url], rate=50, count=300, mix={"quick": 1, "bulk": 0.02})
    facts["drained at maxmemory"] = environment.drain(60) is not None
    facts["maxmemory"] = environment.server.command("CONFIG", "GET", "maxmemory")[b"maxmemory"].decode() + " bytes"
    environment.heal()
    before = len(environment.lines("runs"))
    _producers(environment, [environment.url], rate=0, count=100, mix={"quick": 1})
    result = _finish(environment, facts, also=("unexplained repeats",))
    facts["runs after it was lifted"] = (len(environment.lines("runs")) - before) // 2
    return result


SCENARIOS = {
    "sigkill": Scenario(sigkill, 500, 2.0),
    "sigstop": Scenario(sigstop, 200, 1.0),
    "redis-kill": Scenario(redis_kill, 100, 5.0, "everysec"),
    "cut": Scenario(cut, 5000, 5.0),
    "recovery": Scenario(recovery, 60, 15.0),
    "maxmemory": Scenario(maxmemory, 10_000, 2.0),
}
