"""A chaos run as part of the suite: everything at once, short here, a minute in CI, where `CONVEYOR_CHAOS_SECONDS` says so."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from chaos import report, single_fault_runs
from chaos.fault_injector import DECKS, Fault, schedule
from chaos.recording_server import FAKETIME, RecordingServer
from chaos.redis_history import read_history
from chaos.soak import soak
from support.server_kinds import OTHERS
from support.waiting import until
from testbed.server_process import find_binary

SECONDS = float(os.environ.get("CONVEYOR_CHAOS_SECONDS", "12"))
HOME = Path(__file__).parents[2]
UNDER_TEST = {"tested_app", "embedded_worker", "producer_program", "reader_program"}
"""The modules of chaos that are under test, in processes of their own; all others drive or check."""


@pytest.mark.long
def test_nothing_is_lost_and_nothing_happens_twice_unseen() -> None:
    """Workers, Redis and the way between are broken under load; every bold line of the table in chaos/README.md is zero."""
    seed = int(os.environ.get("CONVEYOR_CHAOS_SEED", random.randrange(1_000_000)))

    run_result, environment, facts = soak(SECONDS, seed, schedule(seed, SECONDS), roles=True)

    print(report.table(run_result, environment.faults, facts))
    assert run_result.counts["acknowledged"] > 10 * SECONDS
    assert sum(environment.faults.values()) > SECONDS / 2
    assert run_result.failed == [], f"again: make chaos ARGS='--minutes {SECONDS / 60:g} --seed {seed} --roles'"


@pytest.mark.long
@pytest.mark.parametrize("topology", DECKS)
def test_every_kind_of_fault_strikes(topology: str) -> None:
    """Each kind of fault there is finds somebody and is carried out, and is counted; none of them costs anything."""
    kinds = [kind for kind in DECKS[topology] if kind != "step clock" or FAKETIME is not None]
    faults = [Fault(2 + 0.4 * at, kind, 0.5, 0.3) for at, kind in enumerate(kinds)]

    run_result, environment, facts = soak(faults[-1].at, 1, faults, topology=topology)

    print(report.table(run_result, environment.faults, facts))
    assert {kind: environment.faults[kind] for kind in kinds} == dict.fromkeys(kinds, 1)
    assert run_result.failed == []


@pytest.mark.parametrize("name", ["valkey", *OTHERS, "path"])
def test_any_server_can_be_broken(directory: Path, name: str) -> None:
    """A run takes each server that the tests know, and the path of any other: it is restarted, and its history is read."""
    binary = find_binary("valkey" if name == "path" else name)
    if binary is None:
        pytest.skip(f"{name}: this server is not installed")
    place = directory / f"recorded-{name}"
    server = RecordingServer(place, clock=True, name=str(binary) if name == "path" else name)
    try:
        assert server.command("DEBUG", "SLEEP", "0") == b"OK"
        assert server.command("HSET", "chaos:{default}:jobs", "0" * 22, "\n") == 1
        server.restart()
        assert server.command("HLEN", "chaos:{default}:jobs") == 1
        if server.has_clock:
            now = server.command("TIME")[0]
            server.set_clock(3600)
            # Not at once: while one thread of the server reads the file, libfaketime gives the others the clock that was.
            until(lambda: server.command("TIME")[0] >= now + 3600)
    finally:
        server.stop()
    assert [job.created for job in read_history(place).jobs.values()] == [1]


@pytest.mark.parametrize("topology", DECKS)
def test_a_schedule_is_its_seed(topology: str) -> None:
    """The same seed gives the same faults, another seed others; within two minutes every kind comes, whatever the seed."""
    assert schedule(1, 60, topology=topology) == schedule(1, 60, topology=topology)
    assert schedule(1, 60, topology=topology) != schedule(2, 60, topology=topology)
    for seed in range(50):
        assert {fault.kind for fault in schedule(seed, 120, topology=topology)} == set(DECKS[topology])


def test_the_command_prints_the_schedule_of_its_seed() -> None:
    """`--minutes N --seed S` prints what will happen when, and the same the next day, in another process."""

    def printed(seed: int) -> str:
        command = [sys.executable, "-m", "chaos", "--schedule", "--minutes", "0.5", "--seed", str(seed)]
        return subprocess.run(command, cwd=HOME, check=True, capture_output=True, text=True).stdout

    assert printed(7) == printed(7)
    assert printed(7).splitlines() == ["seed 7", *map(str, schedule(7, 30))]


def test_drivers_and_checkers_import_nothing_of_conveyor() -> None:
    """No module that drives, breaks or checks imports the library, nor a module that does: in functions, for types, or indirectly."""
    modules = {path.stem: ast.walk(ast.parse(path.read_text())) for path in (HOME / "chaos").glob("*.py")}
    assert modules.keys() > UNDER_TEST
    for name in modules.keys() - UNDER_TEST:
        for node in modules[name]:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            whole = {f"{getattr(node, 'module', None) or ''}.{one}".strip(".") for one in found}
            assert not [one for one in whole if one.split(".")[0] == "conveyor"], name
            assert not whole & {f"chaos.{one}" for one in UNDER_TEST}, name
    loaded = "import sys, chaos.__main__, chaos.sabotage_cases, chaos.server_topologies; print([m for m in sys.modules if m.startswith('conveyor')])"
    result = subprocess.run([sys.executable, "-c", loaded], cwd=HOME, check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


@pytest.mark.long
@pytest.mark.parametrize(("name", "count"), [("redis-kill", 2), ("cut", 30), ("maxmemory", 300)])
def test_scenarios_of_the_published_figures_pass(name: str, count: int) -> None:
    """A few rounds of what `make chaos ARGS="--scenario …"` does many times."""
    # Under `everysec` a server answers during a sync before it writes: on a slow disk a kill takes that back.
    run_result, environment, facts = single_fault_runs.run(name, count, seed=1, fsync="always")

    print(report.table(run_result, environment.faults, facts))
    assert run_result.failed == []
    assert sum(environment.faults.values()) >= 1
    assert run_result.counts["ok"] > 100
