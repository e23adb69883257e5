"""Short cases, each with the one fault that shows a certain kind of defect: a sabotaged build must fail it, and ours pass.

A case gets an environment, makes its fault, and returns a result; it takes a few seconds.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from chaos.environment import Environment
from chaos.processes import Program
from chaos.recording_server import FAKETIME
from chaos.run_result import RunResult


class Case(NamedTuple):
    """A case: its function, and the environment it wants."""

    play: Callable[[Environment], RunResult]
    lease: float = 1.0


def run(name: str, *, source: Path | None = None, seed: int = 1) -> RunResult:
    """Run a case on the given `src`; returns the result."""
    case = CASES[name]
    # A sabotaged build ends early when it is stuck. For ours the limit is long, because a busy machine is slow at everything.
    with Environment(
        seed=seed, lease=case.lease, source=source, retry_for=1.0 if source is not None else 4.0
    ) as environment:
        result = case.play(environment)
        if source is not None:
            environment.keep = False  # it is meant to fail
        return result


def _push(
    environment: Environment, count: int, *, rate: float = 0, url: str = "", number: int = 0, **mix: float
) -> Program:
    kinds = {kind.replace("_ms", ":"): weight for kind, weight in mix.items()}
    return environment.process_group.producer(
        number, url or environment.url, seed=environment.seed, rate=rate, count=count, mix=json.dumps(kinds)
    )


def _holder(environment: Environment, runs: int) -> int:
    """Wait for that many runs; return the process that began most of them."""
    environment.started(runs)
    pids: list[int] = [line["pid"] for line in environment.lines("runs") if line["phase"] == "start"]
    return max(set(pids), key=pids.count)


def zombie(environment: Environment) -> RunResult:
    """Freeze a worker beyond its lease; it wakes while another runs its jobs, and reports them done."""
    for number in range(2):
        environment.process_group.embedded(f"program{number}", environment.url)
    environment.ready(2)
    _push(environment, 6, quick_ms1500=1)
    pid = _holder(environment, 6)
    environment.fault("stop worker", pids=[pid], lasting=5)
    os.kill(pid, signal.SIGSTOP)
    mine = sum(line["phase"] == "start" and line["pid"] == pid for line in environment.lines("runs"))
    environment.started(6 + mine, 10)
    os.kill(pid, signal.SIGCONT)
    environment.drain(6, stall=3)
    return environment.evaluate()


def kill(environment: Environment) -> RunResult:
    """Kill a supervised worker with SIGKILL while it runs jobs."""
    program = environment.process_group.supervised("worker", environment.url, processes=1)
    environment.ready(1)
    _push(environment, 8, quick_ms800=1)
    pid = _holder(environment, 8)
    environment.fault("kill worker", pids=[pid], supervised=True)
    os.kill(pid, signal.SIGKILL)
    environment.drain(6, stall=3)
    assert program.starts == 1
    return environment.evaluate()


def recovery(environment: Environment) -> RunResult:
    """The same with a lease that nobody would wait for: the supervisor gives the jobs back."""
    environment.process_group.supervised("worker", environment.url, processes=2)
    environment.ready(2)
    _push(environment, 4, quick_ms700=1)
    pid = _holder(environment, 4)
    environment.fault("kill worker", pids=[pid], supervised=True)
    os.kill(pid, signal.SIGKILL)
    drained = environment.drain(5, stall=3)
    result = environment.evaluate()
    if drained is None or result.counts["recovery, supervised"].get("max", 9) > 3:
        result.failed.append("recovered late")
    return result


def poison(environment: Environment) -> RunResult:
    """Jobs that kill their worker, beside others that do nothing of the kind."""
    # A poison job is the first, and all wait before the worker comes: so it is leased with neighbours that are to start
    # behind it, and that have run at none of its crashes.
    _push(environment, 1, number=1, poison=1)
    environment.wait(lambda: environment.remaining() == 1, 20)
    _push(environment, 29, poison=1, bystander_ms200=9)
    environment.wait(lambda: environment.remaining() == 30, 20)
    environment.process_group.supervised("worker", environment.url, processes=1, concurrency=4)
    environment.ready(1)
    environment.drain(10, stall=8)
    return environment.evaluate()


def cut(environment: Environment) -> RunResult:
    """Lose the replies of pushes, which are then repeated."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    producer = _push(environment, 200, url=environment.proxy.url, rate=100, quick=1, bulk=0.02, own=0.1)
    while producer.alive():
        environment.fault("swallow replies")
        environment.proxy.swallow_reply(2, "EVALSHA")
        environment.wait(lambda: not environment.proxy.swallows or not producer.alive(), 5)
    environment.drain(8, stall=4)
    return environment.evaluate()


def rollback(environment: Environment) -> RunResult:
    """Redis forgets what was acknowledged, as after a failover: it believes a worker holds what that worker has done."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    _push(environment, 6, quick_ms500=1)
    environment.started(6)
    [aof] = (environment.server.directory / "appendonlydir").glob("*.incr.aof")
    size = aof.stat().st_size
    environment.drain(5)
    environment.fault("roll back")
    environment.server.stop()
    with aof.open("rb+") as file:
        file.truncate(size)
    environment.server.restart()
    environment.wait(lambda: environment.remaining() > 0, 2)
    environment.drain(4, stall=3)
    # The counters went back too, so an attempt may come a second time; nothing may stay where it is.
    return environment.evaluate(waived=("same attempt twice", "duplicate outcomes", "zombie accepted", "stored twice"))


def frozen(environment: Environment) -> RunResult:
    """Redis stands still for three leases: all leases look over, and nobody is dead."""
    # Three, since only who looks before others have renewed sees them overdue: the first but one does, whoever that is.
    for number in range(3):
        environment.process_group.supervised(f"worker{number}", environment.url, processes=1, concurrency=3)
    environment.ready(3)
    _push(environment, 8, quick_ms5000=1)
    environment.started(8)
    environment.fault("freeze redis", lasting=3 * environment.lease)
    environment.server.freeze()
    time.sleep(3 * environment.lease)  # the fault itself: how long Redis stands still
    environment.server.thaw()
    environment.drain(5)
    return environment.evaluate(also=("repeated executions",))


def slow(environment: Environment) -> RunResult:
    """Jobs that take longer than a lease, and no fault at all: each runs once."""
    # The second worker leases as soon as it is registered, before its first renewal, while the first one looks on.
    environment.process_group.supervised("worker", environment.url, processes=1, concurrency=2)
    environment.ready(1)
    _push(environment, 6, quick_ms2800=1, steady_ms2800=0.3)
    environment.started(2)
    environment.process_group.embedded("program", environment.url)
    environment.ready(2)
    environment.drain(8, stall=5)
    return environment.evaluate(also=("repeated executions",))


def full(environment: Environment) -> RunResult:
    """Redis reaches maxmemory with jobs waiting: pushes are refused whole, and the work drains."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    environment.server.command("HSET", "chaos:{default}:conf", "paused", "1")
    _push(environment, 400, quick=1, bulk=0.05)
    environment.wait(lambda: not any(one.alive() for one in environment.process_group.producers()), 5)
    _push(environment, 120, number=1, rate=60, quick=1)  # knows the queue by then: it is the pushes that are refused
    environment.wait(
        lambda: any(line["call"].startswith("1.") and line["phase"] == "ok" for line in environment.lines("calls")), 5
    )
    environment.fault("squeeze memory", lasting=8)
    environment.server.command("HDEL", "chaos:{default}:conf", "paused")
    environment.server.squeeze(0.8)
    _push(environment, 30, number=2, quick=1, bulk=0.1)
    environment.drain(5, stall=3)
    return environment.evaluate()


def pickup(environment: Environment) -> RunResult:
    """A worker with nothing to do hears of a job at once."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    # Over 2.5 s: whoever only looks every 5 s finds one of them late, whenever it looks.
    _push(environment, 6, rate=2, quick=1, own=0.3)
    environment.drain(8)
    result = environment.evaluate()
    if result.counts["pickup"].get("max", 9) > 2.2:
        result.failed.append("picked up late")
    return result


def term(environment: Environment) -> RunResult:
    """A worker is asked to stop while it runs what its grace is too short for; its successor does the rest."""
    program = environment.process_group.supervised("worker", environment.url, processes=1, concurrency=3, grace="0.2s")
    environment.ready(1)
    _push(environment, 6, quick_ms1500=1, steady_ms1500=0.5)
    environment.started(3)
    environment.fault("restart worker", pids=program.family(), lasting=5)
    program.signal(signal.SIGTERM)
    environment.drain(8, stall=5)
    return environment.evaluate()


def unique(environment: Environment) -> RunResult:
    """A dead letter is asked back while another job holds the key it once had."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    _push(environment, 3, keys=1)
    environment.drain(6)
    return environment.evaluate()


def clock(environment: Environment) -> RunResult:
    """A producer whose clock is an hour slow asks for delays."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    before = dict(environment.process_group.env)
    environment.process_group.env.update(
        {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    )
    _push(environment, 8, delayed=1)
    environment.process_group.env = before
    environment.drain(6)
    return environment.evaluate()


def mixed(environment: Environment) -> RunResult:
    """Failures, delays and cancellations without any fault."""
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    _push(environment, 60, flaky=1, cancel=1, delayed=0.5, message=1)
    environment.drain(6, stall=4)
    return environment.evaluate(also=("unexplained repeats",))


def batch(environment: Environment) -> RunResult:
    """Items of batches, some of which fail alone and one of which ends its worker, with no other fault."""
    # One after the other: what ends the worker is to have others before it in its batch, and others behind it.
    _push(environment, 20, batched=6, batched_apart=1, batched_beside=2)
    environment.wait(lambda: environment.remaining() == 20, 20)
    _push(environment, 1, number=1, batched_poison=1)
    environment.wait(lambda: environment.remaining() == 21, 20)
    _push(environment, 20, number=2, batched=6, batched_apart=1, batched_beside=2)
    environment.wait(lambda: environment.remaining() == 41, 20)
    environment.process_group.queues = ("default", "box")
    environment.process_group.supervised("worker", environment.url, processes=1)
    environment.ready(1)
    environment.drain(10, stall=8)
    return environment.evaluate(also=("dead by crashes",))


def levelled(environment: Environment) -> RunResult:
    """Jobs with rates, slots and groups, some of which fail at first, and two workers: no fault, and no limit exceeded."""
    for number in range(2):
        environment.process_group.embedded(f"program{number}", environment.url)
    environment.ready(2)
    _push(environment, 120, ordered=4, pair=3, scarce=2, paced=1, costly=1, grouped_message=2)
    environment.drain(15, stall=8)
    return environment.evaluate(also=("unexplained repeats",))


def levelled_kill(environment: Environment) -> RunResult:
    """The same, and workers that are killed while they hold slots: these come back with their jobs."""
    for number in range(2):
        environment.process_group.supervised(f"worker{number}", environment.url, processes=1)
    environment.process_group.embedded("program", environment.url)
    environment.ready(3)
    _push(environment, 80, rate=40, ordered=4, pair=4, scarce=4)
    for struck in range(3):
        environment.started(15 + 15 * struck)
        children = environment.process_group.programs[struck % 2].children()
        environment.fault("kill worker", pids=children, supervised=True)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    environment.drain(15, stall=8)
    return environment.evaluate()


def fanned(environment: Environment) -> RunResult:
    """Calls that become one job, a queue that is full at times, and messages that are published: nothing is missing."""
    environment.process_group.queues = ("default", "narrow")
    environment.process_group.embedded("program", environment.url)
    environment.ready(1)
    for number in range(2):
        _push(
            environment,
            150,
            number=number,
            rate=60,
            rerun=4,
            debounced=4,
            narrow=2,
            narrow_bulk=0.2,
            published_message=2,
            tagged=2,
        )
    environment.drain(15, stall=8)
    return environment.evaluate(also=("unexplained repeats",))


def told(environment: Environment) -> RunResult:
    """Jobs that tell parts, progress and notes, and fail at first, and ticks of schedules, while replies are lost."""
    environment.process_group.queues = ("told",)
    for number in range(2):
        environment.process_group.embedded(f"program{number}", environment.proxy.url)
    environment.read_along(environment.proxy.url)
    environment.ready(2, queue="told")
    producer = _push(environment, 40, rate=10, told_ms10=1)
    while producer.alive():
        environment.fault("swallow replies")
        environment.proxy.swallow_reply(1, "EVALSHA")
        environment.wait(lambda: not environment.proxy.swallows or not producer.alive(), 5)
        environment.wait(lambda: not producer.alive(), 0.05)
    environment.proxy.heal()
    environment.end_schedules()
    environment.drain(10, stall=6)
    return environment.evaluate()


CASES = {
    "zombie": Case(zombie), "kill": Case(kill), "recovery": Case(recovery, 15.0), "poison": Case(poison), "cut": Case(cut),
    "rollback": Case(rollback), "frozen": Case(frozen), "slow": Case(slow), "full": Case(full), "pickup": Case(pickup, 15.0),
    "term": Case(term, 15.0), "unique": Case(unique, 15.0), "clock": Case(clock, 15.0), "mixed": Case(mixed, 15.0),
    "batch": Case(batch, 15.0), "levelled": Case(levelled, 15.0), "levelled-kill": Case(levelled_kill, 15.0),
    "fanned": Case(fanned, 15.0), "told": Case(told, 2.0),
}  # fmt: skip
