"""A real queue and a small model of it take the same random steps and stay alike."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis as redis_py
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from machine import Machine
from scene import Scene

EXAMPLES = int(os.environ.get("CONVEYOR_MODEL_EXAMPLES", "200"))
STEPS = int(os.environ.get("CONVEYOR_MODEL_STEPS", "50"))
SEED = int(os.environ.get("CONVEYOR_MODEL_SEED", "20261124"))
PARTS = 4
"""Runs of their own seeds, so that they share the cores."""


@pytest.fixture
def scene(redis: redis_py.Redis, url: str) -> Iterator[Scene]:
    """The queue both runs use."""
    found = Scene(redis, url)
    yield found
    found.backend.close()
    redis.flushall(asynchronous=False)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.standalone_only(
    "empties the place for each of its many examples; what it tests is scripts, which run on one node anywhere"
)
def test_queue_and_model_stay_alike(scene: Scene, part: int) -> None:
    """
    After any steps each id is in exactly one place, in order, with one holder and one outcome, as the model says.

    The run is the same each time; `CONVEYOR_MODEL_SEED` makes another, and EXAMPLES and STEPS a longer one.
    """
    machine = type("Bound", (Machine,), {"scene": scene})
    print(f"model: {EXAMPLES // PARTS} examples of {STEPS} steps, seed {SEED + part}")
    run_state_machine_as_test(
        seed(SEED + part)(machine),
        settings=settings(
            max_examples=EXAMPLES // PARTS,
            stateful_step_count=STEPS,
            derandomize=False,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
