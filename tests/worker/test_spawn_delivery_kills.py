"""Followers leave exactly once, however often the processes that deliver them are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from conveyor.ids import new_ids
from conveyor.jobs.app import Conveyor
from conveyor.payload.records import write_envelope
from conveyor.store import inspection
from conveyor.store.operations import Entry
from support.supervisor_process import children_of

HERE = Path(__file__).parent


@pytest.mark.row("A1", "A3")
def test_killed_deliverers_lose_and_double_nothing(url: str, tmp_path: Path, rounds: Callable[[int, int], int]) -> None:
    """Children killed at random moments, with parents that fail and are run again: one follower for each parent."""
    seed, kills = random.randrange(2**32), rounds(100, 5)
    print("seed", seed)
    rng, log = random.Random(seed), tmp_path / "log"
    log.touch()
    parents = 200 * kills
    app = Conveyor(url, namespace="family")
    app.client.push(
        app.client.keys("parents"),
        [
            Entry(id_, write_envelope("support.spawning_app.parent", b'{"n":%d}' % n))
            for n, id_ in enumerate(new_ids(parents))
        ],
    )
    errors = tmp_path / "err"
    with errors.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "conveyor", "worker", "support.spawning_app:app", "--processes", "2", "-c", "20"], cwd=HERE, stderr=file,
            env={**os.environ, "CONVEYOR_URL": url, "FAMILY_LOG": str(log), "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120 + 4 * kills
        for _ in range(kills):
            before = log.stat().st_size
            while log.stat().st_size < before + 100 and not _is_empty(app):
                assert time.monotonic() < deadline, errors.read_text()[-3000:]
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            if found := children_of(worker.pid):
                os.kill(rng.choice(found), signal.SIGKILL)
        while not _is_empty(app):
            assert time.monotonic() < deadline + 10, errors.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    born: dict[int, set[str]] = defaultdict(set)
    for line in log.read_text().splitlines():
        n, _, job = line.partition(" ")
        born[int(n)].add(job)
    doubled = {n: jobs for n, jobs in born.items() if len(jobs) > 1}
    assert (sorted(set(range(parents)) - set(born)), doubled) == ([], {}), f"lost, doubled (seed {seed})"
    for keys in (app.client.keys("parents"), app.client.keys("followers")):
        app.client.execute("DEL", keys.wake, key=keys.wake)
    app.close()


def test_a_process_of_its_own_spawns_too(url: str, tmp_path: Path) -> None:
    """Jobs spawned in a fresh process come back with its result and leave with its end."""
    log = tmp_path / "log"
    with Conveyor(url, namespace="family") as app:
        app.client.push(
            app.client.keys("parents"),
            [Entry(new_ids(1)[0], write_envelope("support.spawning_app.distant", b'{"n":7}'))],
        )
    done = subprocess.run(
        [sys.executable, "-m", "conveyor", "worker", "support.spawning_app:app", "--burst"], cwd=HERE, timeout=60, check=False,
        env={**os.environ, "CONVEYOR_URL": url, "FAMILY_LOG": str(log), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, log.read_text().split()[0]) == (0, "7"), done.stderr


def _is_empty(app: Conveyor) -> bool:
    found = [app.client.run(inspection.counts(app.client.keys(queue))) for queue in ("parents", "followers")]
    keys = app.client.keys("parents")
    outbox = app.client.execute("LLEN", keys.outbox, key=keys.outbox)
    return not outbox and not any(one.ready + one.scheduled + one.leased + one.dead for one in found)
