"""A chaos run as part of the suite: everything at once, short here, two minutes where `CONVEYOR_CHAOS_SECONDS` says so."""

from __future__ import annotations

import os
import random

import pytest

from chaos import report, scenario
from chaos.nemesis import WEIGHTS, schedule
from chaos.soak import soak

SECONDS = float(os.environ.get("CONVEYOR_CHAOS_SECONDS", "12"))


def test_nothing_is_lost_and_nothing_happens_twice_unseen() -> None:
    """Workers, Redis and the way between are broken under load; every bold line of the table in chaos/README.md is zero."""
    seed = int(os.environ.get("CONVEYOR_CHAOS_SEED", random.randrange(1_000_000)))

    verdict, stage, facts = soak(SECONDS, seed)

    print(report.table(verdict, stage.faults, facts))
    assert verdict.counts["acknowledged"] > 10 * SECONDS
    assert sum(stage.faults.values()) > SECONDS / 2
    assert verdict.failed == [], f"again: make chaos ARGS='--minutes {SECONDS / 60:g} --seed {seed}'"


def test_a_schedule_is_its_seed() -> None:
    """The same seed gives the same faults, another seed others; in an hour every kind comes."""
    assert schedule(1, 60) == schedule(1, 60)
    assert schedule(1, 60) != schedule(2, 60)
    assert {fault.kind for fault in schedule(1, 3600)} == set(WEIGHTS)


@pytest.mark.parametrize(("name", "count"), [("redis-kill", 2), ("cut", 30), ("maxmemory", 300)])
def test_scenarios_of_the_published_figures_pass(name: str, count: int) -> None:
    """A few rounds of what `make chaos ARGS="--scenario …"` does many times."""
    verdict, stage, facts = scenario.run(name, count, seed=1)

    print(report.table(verdict, stage.faults, facts))
    assert verdict.failed == []
    assert sum(stage.faults.values()) >= 1
    assert verdict.counts["ok"] > 100
