"""Worker processes by the age of the oldest job."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from conveyor.errors import ConfigurationError
from conveyor.worker.supervision.autoscale import Bounds, next_count
from support.worker_processes import wait, worker_processes


@pytest.mark.parametrize(
    ("count", "age", "calm", "unchanged", "wanted"),
    [
        (2, 1.5, 0.0, 2.0, 4),  # they do not keep up
        (4, 9.0, 0.0, 1.0, 8),
        (8, 60.0, 0.0, 99.0, 8),  # the upper bound
        (2, 1.5, 0.0, 0.5, 2),  # the last step has not begun
        (4, 0.6, 0.0, 99.0, 4),  # in between nothing changes
        (8, None, 5.0, 99.0, 8),  # not calm for long enough
        (8, None, 16.0, 9.0, 4),
        (5, 0.1, 16.0, 9.0, 2),
        (8, None, 16.0, 5.0, 8),  # one step after the other
        (2, None, 999.0, 999.0, 2),  # the lower bound
        (1, None, 0.0, 0.0, 2),
    ],
)
def test_the_number_follows_the_age_of_the_oldest_job(
    count: int, age: float | None, calm: float, unchanged: float, wanted: int
) -> None:
    """It doubles where jobs wait, halves after a time of calm, and stays within its bounds and in between."""
    assert next_count(Bounds(2, 8), count, age, calm, unchanged) == wanted


@pytest.mark.parametrize("text", ["2", "8..2", "0..3", "a..b", "1..300", "1...3", "-1..2"])
def test_bounds_that_are_none_are_refused(text: str) -> None:
    """Bounds are two whole numbers in order."""
    with pytest.raises(ConfigurationError, match="--autoscale takes"):
        Bounds.parse(text)


@pytest.mark.row("A42")
def test_processes_come_with_a_burst_and_go_after_it(url: str, tmp_path: Path) -> None:
    """A burst starts processes up to the upper bound; then all but the lower bound end, and no job runs twice or is charged."""
    with worker_processes(url, tmp_path) as processes:
        supervisor = processes.start(autoscale="1..3", concurrency=1)
        wait(processes.registered)
        count = 120
        processes.app.enqueue_many(processes.tasks.note.s(n, 0.1) for n in range(count))
        wait(lambda: len(processes.registered()) == 3)
        wait(processes.drained)
        wait(lambda: len(processes.registered()) == 1)
        assert processes.completions() == count
        assert processes.repeats() == 0
        assert processes.is_sound()
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(60) == 0
