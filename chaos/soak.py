"""The long run: everything at once, under a load of every kind."""

from __future__ import annotations

import signal
import time
from collections import Counter
from typing import Any

from chaos.environment import Environment
from chaos.fault_injector import DECKS, Fault, FaultInjector
from chaos.run_result import RunResult

RATE = 60.0
"""Jobs a second, of all producers together."""
FORGOTTEN = (
    "lost",
    "spawned twice",
    "same attempt twice",
    "zombie accepted",
    "poison started too often",
    "ran after cancel",
    "limit violations",
    "order violations",
    "tick violations",
    "note violations",
    "stream violations",
    "progress violations",
    "update violations",
    "event violations",
)
"""
Effects of the promotion of a replica that had not heard the last writes: pushes, starts, outcomes, counts and cancellations
of the last moments are gone, whoever uses Redis. What a replica had confirmed is not, and nothing may be stuck, or in two places.
"""


def soak(
    seconds: float,
    seed: int,
    faults: list[Fault],
    *,
    lease: float = 1.0,
    topology: str = "standalone",
    roles: bool = False,
) -> tuple[RunResult, Environment, dict[str, Any]]:
    """Run for *seconds* under *faults*, heal, drain, check; return the result, the environment, and facts about the run."""
    with Environment(seed=seed, lease=lease, clock=True, topology=topology, roles=roles) as environment:
        _people(environment, seed, seconds)
        environment.ready(4)
        environment.read_along(environment.proxy.url if topology == "standalone" else environment.url)
        injector = FaultInjector(environment, faults)
        injector.start()
        injector.finish()
        environment.heal()
        for program in environment.process_group.producers():
            if not program.killable:
                program.signal(signal.SIGTERM)
        environment.process_group.drain_buffers()
        environment.end_schedules()
        began = time.monotonic()
        drained = environment.drain(20 + 10 * lease)
        result = environment.evaluate(waived=FORGOTTEN if topology == "sentinel" else ())
        for kind in injector.idle():
            result.fail("faults that never struck", f"{kind}: {injector.reasons.get(kind, 'unknown')}")
        facts: dict[str, Any] = {
            "topology": topology, "server": environment.server_kind, "seed": seed, "seconds": seconds, "lease": lease,
            "drained in": f"{drained:.1f} s" if drained is not None else f"not within {time.monotonic() - began:.0f} s",
            "programs restarted": environment.process_group.restarts,
            "commands through proxy": sum(environment.proxy.commands.values()),
            "connections cut": environment.proxy.count["cut"] + environment.proxy.count["closed"],
            "replies swallowed": environment.proxy.count["swallowed"],
        }  # fmt: skip
        if topology == "sentinel":
            # More than were ordered: silence that the sentinels took for death.
            facts["promotions"] = environment.server.promotions()
        for kind, count in sorted(injector.missed.items()):
            facts[f"missed: {kind}"] = f"{count} ({injector.reasons[kind]})"
        environment.faults = Counter({kind: injector.struck[kind] for kind in DECKS[topology]})
        return result, environment, facts


def _people(environment: Environment, seed: int, seconds: float) -> None:
    processes, direct = environment.process_group, environment.url
    alone = environment.topology == "standalone"
    proxied = environment.proxy.url if alone else direct
    processes.queues = ("default", "wide", "box", "narrow", "told")
    processes.supervised("worker1", direct)
    processes.supervised("worker2", proxied)
    processes.embedded("program1", direct)
    processes.embedded("program2", proxied)
    for number, url in enumerate((direct, proxied)):
        confirm = 0 if alone or number == 0 else 1
        processes.producer(number, url, seed=seed, rate=RATE / 3, count=int(RATE * (seconds + 600)), confirm=confirm)
    processes.killable(2, proxied, seed=seed, rate=RATE / 3)
