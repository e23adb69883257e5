"""A real queue and a small model of it take the same random steps, one by one or four at once, and stay alike."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import redis as redis_py
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from conveyor import Conveyor
from conveyor.store import inspection
from support import concurrent_clients
from support.queue_snapshot import read
from support.seeded_queue import SeededQueue
from support.state_machine import QueueMachine
from testbed.server_groups import free_port
from testbed.server_process import Server

EXAMPLES = int(os.environ.get("CONVEYOR_MODEL_EXAMPLES", "200"))
STEPS = int(os.environ.get("CONVEYOR_MODEL_STEPS", "50"))
SEED = int(os.environ.get("CONVEYOR_MODEL_SEED", "20261124"))
PARTS = 8
"""Tests of their own seeds, so that they share the cores."""
EXAMPLES_A_RUN = 5
"""Many short runs meet what is rare sooner than a long one: the examples of one run are more alike."""


@pytest.mark.long
@pytest.mark.row("I1", "I5")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.standalone_only(
    "empties the place for each of its many examples; what it tests is scripts, which run on one node anywhere"
)
def test_queue_and_model_stay_alike(seeded: SeededQueue, part: int) -> None:
    """
    After any steps each id is in exactly one place, in order, with one holder and one outcome, as the model says.

    The run is the same each time; `CONVEYOR_MODEL_SEED` makes another, and EXAMPLES and STEPS a longer one.
    """
    machine = type("Bound", (QueueMachine,), {"seeded": seeded})
    first, runs = SEED + 1000 * part, -(-EXAMPLES // (PARTS * EXAMPLES_A_RUN))
    for number in range(first, first + runs):
        print(f"model: {EXAMPLES_A_RUN} examples of {STEPS} steps, seed {number}")
        run_state_machine_as_test(
            seed(number)(machine),
            settings=settings(
                max_examples=EXAMPLES_A_RUN,
                stateful_step_count=STEPS,
                derandomize=False,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.long
@pytest.mark.row("I1", "I5", "I18")
def test_four_clients_at_once(start_server: Callable[..., Server], rounds: Callable[[int, int], int]) -> None:
    """
    Four clients that push, lease, settle, reap, cancel and repeat each other's calls at once get the replies of the model.

    `CONVEYOR_MODEL_SEED` makes the clients' choices another; who comes first is up to the machine.
    """
    port = free_port()
    server = start_server("--port", str(port))
    with server.client() as client, redis_py.Redis(port=port) as there:
        keys, changes, repeats, twins = concurrent_clients.KEYS, 0, 0, 0
        for example in range(rounds(500, 8)):
            print(f"seed {SEED + example}")
            history = concurrent_clients.run_clients(there, f"redis://127.0.0.1:{port}/0", SEED + example, 200)
            model = concurrent_clients.replay(history)

            assert read(client, keys) == model.snapshot()
            with Conveyor(server.url, namespace="c") as app:
                assert app.client.run(inspection.audit(keys)) == []
            assert model.told(), "there is work, no token, and nobody watches"
            changes += sum(one != two for (one, *_), (two, *_) in itertools.pairwise(history))
            repeats += len(history) - len({id(step) for _, step, _ in history})
            twins += sum(one is two for (_, one, _), (_, two, _) in itertools.pairwise(history))
        print(f"{changes} times another client came next, {repeats} steps were repeats, {twins} right behind")
        assert changes > 200 * rounds(500, 8)
        assert repeats > 20 * rounds(500, 8)
        assert twins > 0
