"""The chaos checker fails for each sabotaged build in a case with the right fault, and passes for the build as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chaos import sabotage_cases, sabotaged_build
from chaos.recording_server import FAKETIME

PATCHES, TESTED = sabotaged_build.patches(), sabotaged_build.tested_patches()
CLASSICS = {
    "ends_after_lost_lease_accepted", "attempt_number_used_again", "worker_reaped_after_one_look", "first_write_of_turn_grows", "first_renewal_too_late", "wake_token_not_pushed",
    "push_acknowledged_before_stored", "lease_count_not_compared", "lease_in_two_steps", "every_job_acked_early", "result_written_after_ack", "delay_by_client_clock",
    "crash_limit_ignored", "redriven_beside_the_holder_of_its_key", "repeated_push_stored_again",
}  # fmt: skip
ROUNDS = 5
SIDE_BY_SIDE = 5  # cases are mostly waiting: for a lease to end, for work to drain
NEEDED = {sabotaged_build.case_of(patch) for patch in PATCHES.values()}


def playable(names: list[str]) -> list[str]:
    """Leave out what needs a clock that can be set, where libfaketime is not installed."""
    return [name for name in names if name != "clock" or FAKETIME is not None]


def play_sabotaged(name: str) -> list[str]:
    """Return the checker's errors; runs the case with one seed after another until there are some."""
    # A fault may strike when nothing is in its way, and then shows nothing of what it strikes.
    patch, failed = PATCHES[name], list[str]()
    for seed in range(1, ROUNDS + 1):
        with tempfile.TemporaryDirectory() as directory:
            source = sabotaged_build.build(patch, Path(directory))
            failed = sabotage_cases.run(sabotaged_build.case_of(patch), source=source, seed=seed).failed
        if failed:
            break
    return failed


def play_honest(name: str, seed: int = 1) -> str:
    result = sabotage_cases.run(name, seed=seed)
    return f"{result.failed} {result.examples}" if result.failed else ""


def test_patches_are_many_and_aimed() -> None:
    """The sabotages that any queue should be tried with are there; each applies to the source as it is and names a case."""
    assert PATCHES.keys() >= CLASSICS
    assert set(sabotage_cases.CASES) >= NEEDED
    for patch in [*PATCHES.values(), *TESTED.values()]:
        files = sabotaged_build.changed(patch)
        assert files, patch.name
        assert [name for name, text in files.items() if text == (sabotaged_build.HOME / name).read_text()] == []


def test_a_patch_that_aims_at_nothing_is_refused(tmp_path: Path) -> None:
    """A sabotage whose target has changed in the source is refused, not left out."""
    patch = tmp_path / "old.patch"
    patch.write_text(
        "Case: kill\n--- a/src/conveyor/jobs/app.py\n+++ b/src/conveyor/jobs/app.py\n@@ -1 +1 @@\n-not there\n+neither\n"
    )

    with pytest.raises(sabotaged_build.DoesNotApplyError, match="found 0 times"):
        sabotaged_build.changed(patch)


@pytest.mark.parametrize("name", TESTED)
def test_a_sabotage_of_what_jobs_tell_is_caught(name: str, tmp_path: Path) -> None:
    """The law that a broken build breaks is a test of the suite, which fails for it."""
    test = sabotaged_build.test_of(TESTED[name])
    assert test is not None
    source = sabotaged_build.build(TESTED[name], tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        "not redis6",
        test,
    ]
    for _ in range(ROUNDS):
        done = subprocess.run(
            command, cwd=sabotaged_build.HOME, env=environment, check=False, capture_output=True, text=True, timeout=120
        )
        if done.returncode != 0:
            break
    assert done.returncode == 1, done.stdout
    assert "AssertionError" in done.stdout, "it failed for another reason"


@pytest.mark.long
def test_every_sabotage_is_caught() -> None:
    """The checker finds the defect of each sabotaged build."""
    names = [name for name, patch in PATCHES.items() if playable([sabotaged_build.case_of(patch)])]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = dict(zip(names, pool.map(play_sabotaged, names), strict=True))

    assert [name for name, failed in found.items() if not failed] == []


@pytest.mark.long
def test_this_build_passes_every_case() -> None:
    """The same cases find no error in the build as it is."""
    names = playable(list(sabotage_cases.CASES))
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = dict(zip(names, pool.map(play_honest, names), strict=True))
    # Once more after a failure, and alone: beside others a worker may really be late for a lease of one second.
    found = {name: play_honest(name, seed=2) for name, failed in found.items() if failed}

    assert {name: failed for name, failed in found.items() if failed} == {}
