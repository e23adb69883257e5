"""Short scenes, each with the one fault that shows a certain kind of defect: what a sabotaged build must fail, and ours pass.

A case gets a stage, makes its fault, and returns a verdict; it takes a few seconds.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chaos.environment import Stage
from chaos.processes import Program
from chaos.recording_server import FAKETIME
from chaos.run_result import Verdict


class Case(NamedTuple):
    """A scene and the stage it wants."""

    play: Callable[[Stage], Verdict]
    lease: float = 1.0


def run(name: str, *, source: Path | None = None, seed: int = 1) -> Verdict:
    """Play a case on the given `src`; returns the verdict."""
    case = CASES[name]
    # What is meant to fail ends early when it is stuck. Ours is stuck only when it is: a busy machine is slow at everything.
    with Stage(seed=seed, lease=case.lease, source=source, patience=1.0 if source is not None else 4.0) as stage:
        verdict = case.play(stage)
        if source is not None:
            stage.keep = False  # it is meant to fail
        return verdict


def _push(stage: Stage, count: int, *, rate: float = 0, url: str = "", number: int = 0, **mix: float) -> Program:
    kinds = {kind.replace("_ms", ":"): weight for kind, weight in mix.items()}
    return stage.crew.producer(number, url or stage.url, seed=stage.seed, rate=rate, count=count, mix=json.dumps(kinds))


def _holder(stage: Stage, runs: int) -> int:
    """Wait for that many runs; return the process that began most of them."""
    stage.started(runs)
    pids: list[int] = [line["pid"] for line in stage.lines("runs") if line["phase"] == "start"]
    return max(set(pids), key=pids.count)


def zombie(stage: Stage) -> Verdict:
    """Freeze a worker beyond its lease; it wakes while another runs its jobs, and reports them done."""
    for number in range(2):
        stage.crew.embedded(f"program{number}", stage.url)
    stage.ready(2)
    _push(stage, 6, quick_ms1500=1)
    pid = _holder(stage, 6)
    stage.fault("stop worker", pids=[pid], lasting=5)
    os.kill(pid, signal.SIGSTOP)
    mine = sum(line["phase"] == "start" and line["pid"] == pid for line in stage.lines("runs"))
    stage.started(6 + mine, 10)
    os.kill(pid, signal.SIGCONT)
    stage.drain(6, stall=3)
    return stage.judge()


def kill(stage: Stage) -> Verdict:
    """Kill a supervised worker with SIGKILL while it runs jobs."""
    program = stage.crew.supervised("worker", stage.url, processes=1)
    stage.ready(1)
    _push(stage, 8, quick_ms800=1)
    pid = _holder(stage, 8)
    stage.fault("kill worker", pids=[pid], supervised=True)
    os.kill(pid, signal.SIGKILL)
    stage.drain(6, stall=3)
    assert program.starts == 1
    return stage.judge()


def recovery(stage: Stage) -> Verdict:
    """The same with a lease that nobody would wait for: the supervisor gives the jobs back."""
    stage.crew.supervised("worker", stage.url, processes=2)
    stage.ready(2)
    _push(stage, 4, quick_ms700=1)
    pid = _holder(stage, 4)
    stage.fault("kill worker", pids=[pid], supervised=True)
    os.kill(pid, signal.SIGKILL)
    drained = stage.drain(5, stall=3)
    verdict = stage.judge()
    if drained is None or verdict.counts["recovery, supervised"].get("max", 9) > 3:
        verdict.failed.append("recovered late")
    return verdict


def poison(stage: Stage) -> Verdict:
    """Jobs that kill their worker, beside others that do nothing of the kind."""
    # A poison job is the first, and all wait before the worker comes: so it is leased with neighbours that are to start
    # behind it, and that have run at none of its crashes.
    _push(stage, 1, number=1, poison=1)
    stage.wait(lambda: stage.remaining() == 1, 20)
    _push(stage, 29, poison=1, bystander_ms200=9)
    stage.wait(lambda: stage.remaining() == 30, 20)
    stage.crew.supervised("worker", stage.url, processes=1, concurrency=4)
    stage.ready(1)
    stage.drain(10, stall=8)
    return stage.judge()


def cut(stage: Stage) -> Verdict:
    """Lose the replies of pushes, which are then repeated."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    producer = _push(stage, 200, url=stage.proxy.url, rate=100, quick=1, bulk=0.02, own=0.1)
    while producer.alive():
        stage.fault("swallow replies")
        stage.proxy.swallow_reply(2, "EVALSHA")
        stage.wait(lambda: not stage.proxy.swallows or not producer.alive(), 5)
    stage.drain(8, stall=4)
    return stage.judge()


def rollback(stage: Stage) -> Verdict:
    """Redis forgets what was acknowledged, as after a failover: it believes a worker holds what that worker has done."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    _push(stage, 6, quick_ms500=1)
    stage.started(6)
    [aof] = (stage.ground.directory / "appendonlydir").glob("*.incr.aof")
    size = aof.stat().st_size
    stage.drain(5)
    stage.fault("roll back")
    stage.ground.stop()
    with aof.open("rb+") as file:
        file.truncate(size)
    stage.ground.restart()
    stage.wait(lambda: stage.remaining() > 0, 2)
    stage.drain(4, stall=3)
    # The counters went back too, so an attempt may come a second time; nothing may stay where it is.
    return stage.judge(waived=("same attempt twice", "duplicate outcomes", "zombie accepted", "stored twice"))


def frozen(stage: Stage) -> Verdict:
    """Redis stands still for three leases: all leases look over, and nobody is dead."""
    # Three, since only who looks before others have renewed sees them overdue: the first but one does, whoever that is.
    for number in range(3):
        stage.crew.supervised(f"worker{number}", stage.url, processes=1, concurrency=3)
    stage.ready(3)
    _push(stage, 8, quick_ms5000=1)
    stage.started(8)
    stage.fault("freeze redis", lasting=3 * stage.lease)
    stage.ground.freeze()
    time.sleep(3 * stage.lease)  # the fault itself: how long Redis stands still
    stage.ground.thaw()
    stage.drain(5)
    return stage.judge(also=("repeated executions",))


def slow(stage: Stage) -> Verdict:
    """Jobs that take longer than a lease, and no fault at all: each runs once."""
    # The second worker leases as soon as it is registered, before its first renewal, while the first one looks on.
    stage.crew.supervised("worker", stage.url, processes=1, concurrency=2)
    stage.ready(1)
    _push(stage, 6, quick_ms2800=1, steady_ms2800=0.3)
    stage.started(2)
    stage.crew.embedded("program", stage.url)
    stage.ready(2)
    stage.drain(8, stall=5)
    return stage.judge(also=("repeated executions",))


def full(stage: Stage) -> Verdict:
    """Redis reaches maxmemory with jobs waiting: pushes are refused whole, and the work drains."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    stage.ground.command("HSET", "chaos:{default}:conf", "paused", "1")
    _push(stage, 400, quick=1, bulk=0.05)
    stage.wait(lambda: not any(one.alive() for one in stage.crew.producers()), 5)
    _push(stage, 120, number=1, rate=60, quick=1)  # knows the queue by then: it is the pushes that are refused
    stage.wait(lambda: any(line["call"].startswith("1.") and line["phase"] == "ok" for line in stage.lines("calls")), 5)
    stage.fault("squeeze memory", lasting=8)
    stage.ground.command("HDEL", "chaos:{default}:conf", "paused")
    stage.ground.squeeze(0.8)
    _push(stage, 30, number=2, quick=1, bulk=0.1)
    stage.drain(5, stall=3)
    return stage.judge()


def pickup(stage: Stage) -> Verdict:
    """A worker with nothing to do hears of a job at once."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    # Over 2.5 s: whoever only looks every 5 s finds one of them late, whenever it looks.
    _push(stage, 6, rate=2, quick=1, own=0.3)
    stage.drain(8)
    verdict = stage.judge()
    if verdict.counts["pickup"].get("max", 9) > 2.2:
        verdict.failed.append("picked up late")
    return verdict


def term(stage: Stage) -> Verdict:
    """A worker is asked to stop while it runs what its grace is too short for; its successor does the rest."""
    program = stage.crew.supervised("worker", stage.url, processes=1, concurrency=3, grace="0.2s")
    stage.ready(1)
    _push(stage, 6, quick_ms1500=1, steady_ms1500=0.5)
    stage.started(3)
    stage.fault("restart worker", pids=program.family(), lasting=5)
    program.signal(signal.SIGTERM)
    stage.drain(8, stall=5)
    return stage.judge()


def unique(stage: Stage) -> Verdict:
    """A dead letter comes back while another job holds the key it once had."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    _push(stage, 3, keys=1)
    stage.drain(6)
    return stage.judge()


def clock(stage: Stage) -> Verdict:
    """A producer whose clock is an hour slow asks for delays."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    before = dict(stage.crew.env)
    stage.crew.env.update({"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
    _push(stage, 8, delayed=1)
    stage.crew.env = before
    stage.drain(6)
    return stage.judge()


def mixed(stage: Stage) -> Verdict:
    """Failures, delays and cancellations without any fault."""
    stage.crew.embedded("program", stage.url)
    stage.ready(1)
    _push(stage, 60, flaky=1, cancel=1, delayed=0.5, message=1)
    stage.drain(6, stall=4)
    return stage.judge(also=("unexplained repeats",))


CASES = {
    "zombie": Case(zombie), "kill": Case(kill), "recovery": Case(recovery, 15.0), "poison": Case(poison), "cut": Case(cut),
    "rollback": Case(rollback), "frozen": Case(frozen), "slow": Case(slow), "full": Case(full), "pickup": Case(pickup, 15.0),
    "term": Case(term, 15.0), "unique": Case(unique, 15.0), "clock": Case(clock, 15.0), "mixed": Case(mixed, 15.0),
}  # fmt: skip
