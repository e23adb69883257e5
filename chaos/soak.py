"""The long run: everything at once, under a load of every kind."""

from __future__ import annotations

import signal
import time
from collections import Counter
from typing import Any

from chaos.environment import Stage
from chaos.fault_injector import DECKS, Fault, Nemesis
from chaos.run_result import Verdict

RATE = 60.0
"""Jobs a second, of all producers together."""
FORGOTTEN = (
    "lost",
    "spawned twice",
    "same attempt twice",
    "zombie accepted",
    "poison started too often",
    "ran after cancel",
)
"""
What follows when a promoted replica had not heard the last writes: pushes, outcomes, counts and cancellations of the last
moments are gone, whoever uses Redis. What a replica had confirmed is not, and nothing may be stuck, or in two places.
"""


def soak(
    seconds: float, seed: int, faults: list[Fault], *, lease: float = 1.0, topology: str = "standalone"
) -> tuple[Verdict, Stage, dict[str, Any]]:
    """Run for *seconds* under *faults*, heal, drain, judge; return the verdict, the stage, and what the run was like."""
    with Stage(seed=seed, lease=lease, clock=True, topology=topology) as stage:
        _people(stage, seed, seconds)
        stage.ready(4)
        nemesis = Nemesis(stage, faults)
        nemesis.start()
        nemesis.finish()
        stage.heal()
        for program in stage.crew.producers():
            if not program.mortal:
                program.signal(signal.SIGTERM)
        stage.crew.bequeath()
        began = time.monotonic()
        drained = stage.drain(20 + 10 * lease)
        verdict = stage.judge(waived=FORGOTTEN if topology == "sentinel" else ())
        for kind in nemesis.idle():
            verdict.fail("faults that never struck", f"{kind}: {nemesis.reasons.get(kind, 'unknown')}")
        facts: dict[str, Any] = {
            "topology": topology, "seed": seed, "seconds": seconds, "lease": lease,
            "drained in": f"{drained:.1f} s" if drained is not None else f"not within {time.monotonic() - began:.0f} s",
            "programs restarted": stage.crew.restarts, "commands through proxy": sum(stage.proxy.commands.values()),
            "connections cut": stage.proxy.count["cut"] + stage.proxy.count["closed"],
            "replies swallowed": stage.proxy.count["swallowed"],
        }  # fmt: skip
        if topology == "sentinel":
            # More than were ordered: silence that the sentinels took for death.
            facts["promotions"] = stage.ground.promotions()
        for kind, count in sorted(nemesis.missed.items()):
            facts[f"missed: {kind}"] = f"{count} ({nemesis.reasons[kind]})"
        stage.faults = Counter({kind: nemesis.struck[kind] for kind in DECKS[topology]})
        return verdict, stage, facts


def _people(stage: Stage, seed: int, seconds: float) -> None:
    crew, direct = stage.crew, stage.url
    alone = stage.topology == "standalone"
    proxied = stage.proxy.url if alone else direct
    crew.queues = ("default", "wide", "box")
    crew.supervised("worker1", direct)
    crew.supervised("worker2", proxied)
    crew.embedded("program1", direct)
    crew.embedded("program2", proxied)
    for number, url in enumerate((direct, proxied)):
        confirm = 0 if alone or number == 0 else 1
        crew.producer(number, url, seed=seed, rate=RATE / 3, count=int(RATE * (seconds + 600)), confirm=confirm)
    crew.mortal(2, proxied, seed=seed, rate=RATE / 3)
