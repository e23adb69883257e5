"""The long run: everything at once, under a load of every kind."""

from __future__ import annotations

import time
from typing import Any

from chaos.checker import Verdict
from chaos.nemesis import Nemesis, schedule
from chaos.stage import Stage

RATE = 60.0
"""Jobs a second, of all producers together."""


def soak(
    seconds: float, seed: int, *, lease: float = 1.0, topology: str = "standalone", quiet: bool = False
) -> tuple[Verdict, Stage, dict[str, Any]]:
    """Run for *seconds*, heal, drain, judge; return the verdict, the stage, and what the run was like."""
    with Stage(seed=seed, lease=lease, clock=True, topology=topology) as stage:
        faults = schedule(seed, seconds, topology=topology)
        if not quiet:
            print("\n".join(map(str, faults)), flush=True)
        _people(stage, seed, seconds)
        stage.ready(4)
        nemesis = Nemesis(stage, faults)
        nemesis.start()
        nemesis.finish()
        stage.heal()
        for program in stage.crew.producers():
            program.signal(15)
        began = time.monotonic()
        drained = stage.drain(20 + 10 * lease)
        # Sentinel promotes a replica that may not have heard the last writes: what was acknowledged and what was counted
        # meanwhile may be gone. docs/reliability.md says how to wait for replicas; nothing may be stuck all the same.
        forgets = (
            ("lost", "same attempt twice", "zombie accepted", "poison started too often")
            if topology == "sentinel"
            else ()
        )
        verdict = stage.judge(waived=forgets)
        facts: dict[str, Any] = {
            "topology": topology, "seed": seed, "seconds": seconds, "lease": lease,
            "drained in": f"{drained:.1f} s" if drained is not None else f"not within {time.monotonic() - began:.0f} s",
            "programs restarted": stage.crew.restarts, "commands through proxy": sum(stage.proxy.commands.values()),
            "connections cut": stage.proxy.count["cut"] + stage.proxy.count["closed"],
            "replies swallowed": stage.proxy.count["swallowed"],
        }  # fmt: skip
        for reason in sorted(set(nemesis.skipped)):
            facts["skipped"] = reason
        return verdict, stage, facts


def _people(stage: Stage, seed: int, seconds: float) -> None:
    crew, direct = stage.crew, stage.url
    proxied = stage.proxy.url if stage.topology == "standalone" else direct
    crew.supervised("worker1", direct)
    crew.supervised("worker2", proxied)
    crew.embedded("program1", direct)
    crew.embedded("program2", proxied)
    for number, url in enumerate((direct, proxied)):
        crew.producer(number, url, seed=seed, rate=RATE / 2, count=int(RATE * (seconds + 600)))
