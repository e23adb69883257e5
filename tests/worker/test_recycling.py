"""Worker processes that are replaced by fresh ones after so many jobs, or above so much memory."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from conveyor.cli import cli
from conveyor.worker import recycling, usage
from conveyor.worker.recycling import RecycleLimits
from support.worker_processes import WorkerProcesses, wait, worker_processes

MB = 1_000_000


@pytest.fixture
def workers(url: str, tmp_path: Path) -> Iterator[WorkerProcesses]:
    with worker_processes(url, tmp_path, WORKERS_LEAST_LIFE="0.5") as made:
        yield made


def pids(workers: WorkerProcesses) -> dict[int, int]:
    """Return how many jobs each process has started."""
    found: dict[int, int] = {}
    for lines in workers.starts().values():
        for line in lines:
            found[line.pid] = found.get(line.pid, 0) + 1
    return found


def charged(workers: WorkerProcesses) -> set[int]:
    """Return the crashes charged to live jobs; a job that ended well has none left."""
    with workers.client() as client:
        return {int(state.split(b" ")[2].split(b"\n")[0]) for state in client.hgetall(workers.keys.state).values()}


@pytest.mark.long
def test_two_thousand_jobs_in_processes_of_a_hundred(workers: WorkerProcesses) -> None:
    """With max_jobs every job runs exactly once, no process takes more, and no crash or second attempt is charged."""
    workers.app.enqueue_many(workers.tasks.note.s(n) for n in range(2000))
    workers.start(processes=2, max_jobs=100)
    wait(lambda: len(workers.starts()) == 2000 and workers.drained(), 250)

    taken = pids(workers)
    assert workers.repeats() == 0
    assert charged(workers) == set()
    full = sorted(taken.values())[2:]  # but for the two that work now
    assert len(full) >= 18
    assert 90 <= full[0] < full[-1] <= 100  # drawn apart
    assert workers.log.count("jobs (limit 100): it takes no more") >= 19
    assert "crash" not in workers.log
    assert workers.is_sound()


def test_replacing_loses_no_early_ack(workers: WorkerProcesses) -> None:
    """Jobs that Redis knows no more are ended by the process that took them, before another takes its place."""
    workers.app.enqueue_many(workers.tasks.early.s(n, 0.01) for n in range(200))
    workers.start(processes=2, max_jobs=20, grace=30)
    wait(lambda: sum(line.what == "end" for line in workers.journal) == 200)

    assert workers.repeats() == 0
    assert len(pids(workers)) >= 10
    assert workers.drained()


def test_the_successor_works_while_the_old_one_drains(workers: WorkerProcesses) -> None:
    """With one process there is no gap: a fresh one takes the next job while the job of the old one still runs."""
    workers.app.enqueue_many([workers.tasks.first.s(0), workers.tasks.note.s(1)])
    supervisor = workers.start(max_jobs=1, grace=60)
    wait(lambda: any(line.what == "end" for line in workers.journal))  # of the second: the first waits for the file
    workers.let_go()
    wait(lambda: len([line for line in workers.journal if line.what == "end"]) == 2)
    wait(lambda: len(workers.children(supervisor)) == 1)

    ends = [line.n for line in workers.journal if line.what == "end"]
    assert ends == [1, 0]
    assert workers.repeats() == 0
    assert len(pids(workers)) == 2


def test_what_outlives_its_grace_is_handed_back_uncharged(workers: WorkerProcesses) -> None:
    """A job that a process cannot end within its grace runs again in a fresh one: neither a failure nor a crash is counted."""
    workers.tasks.note.enqueue(0, 60)
    workers.start(max_jobs=1, grace=0.2)
    wait(lambda: len(workers.starts()[0]) >= 2)

    assert workers.repeats() >= 1
    assert "handing back 1 job that is still running" in workers.log
    with workers.client() as client:
        [state] = client.hvals(workers.keys.state)
    assert state.split(b" ")[1:3] == [b"0", b"0"]


def test_a_stop_does_not_hurry_a_draining_process(workers: WorkerProcesses) -> None:
    """SIGTERM while a process drains to be replaced leaves its jobs what is left of their grace."""
    workers.tasks.first.enqueue(0)
    supervisor = workers.start(max_jobs=1, grace=60)
    wait(lambda: "it takes no more" in workers.log)
    supervisor.send_signal(signal.SIGTERM)
    wait(lambda: "Stopping: running jobs have" in workers.log)
    workers.let_go()

    assert supervisor.wait(60) == 0
    assert (workers.completions(), workers.repeats(), workers.counts().ready) == (1, 0, 0)


def test_a_death_amid_the_replacement_is_told_from_it(workers: WorkerProcesses) -> None:
    """A process killed while it drains is charged as ever; its job goes to the successor, and no second successor starts."""
    workers.tasks.note.enqueue(0, 60)
    supervisor = workers.start(max_jobs=1, grace=60)
    wait(lambda: len(workers.registered()) == 2)
    [first] = workers.starts()[0]
    os.kill(first.pid, signal.SIGKILL)
    wait(lambda: len(workers.starts()[0]) == 2)

    assert workers.repeats() == 1
    assert len(set(workers.registered())) <= 2
    assert re.search(rf"\(pid {first.pid}\) was killed by SIGKILL .*; returned 1 job", workers.log)
    wait(lambda: first.pid not in workers.children(supervisor))


def test_more_wear_out_than_there_are_places(workers: WorkerProcesses) -> None:
    """At most twice as many processes exist; one that wears out beyond that is replaced when another has ended."""
    workers.app.enqueue_many(workers.tasks.first.s(n) for n in range(6))
    supervisor = workers.start(max_jobs=1, grace=60)
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, len(workers.children(supervisor)))
        return workers.completions() == 6

    wait(lambda: workers.log.count("it takes no more") == 2)  # both are worn out, and their jobs wait for the file
    assert not all_done()
    workers.let_go()
    wait(all_done)
    assert most == 2
    assert (workers.repeats(), len(pids(workers))) == (0, 6)


def test_a_leak_is_ended_by_a_fresh_process(workers: WorkerProcesses) -> None:
    """With max_memory a process whose jobs leak is replaced and told with its figures; each job runs once, no crash is charged."""
    workers.app.enqueue_many(workers.tasks.leak.s(n, 10 * MB, 0.1) for n in range(100))
    workers.start(max_memory=300 * MB, concurrency=2, grace=30)
    wait(lambda: len(workers.starts()) == 100 and workers.drained())

    assert workers.repeats() == 0
    assert charged(workers) == set()
    assert len(pids(workers)) >= 3
    told = re.findall(r"has (\d+) MB after \d+ jobs and \d+ s \(limit (\d+) MB\)", workers.log)
    assert len(told) >= 2
    assert all(270 <= int(limit) <= 300 and int(has) >= int(limit) for has, limit in told)
    assert "crash" not in workers.log


def test_a_limit_below_the_need_does_not_loop(workers: WorkerProcesses) -> None:
    """A process that is larger than the limit before its first job says so and works on: a fresh one would be the same."""
    workers.app.enqueue_many(workers.tasks.note.s(n, 0.05) for n in range(100))
    workers.start(max_memory=5 * MB, concurrency=2)
    wait(lambda: len(workers.starts()) == 100 and workers.drained())  # 2.5 s, five times the least life

    assert len(pids(workers)) == 1
    assert len(re.findall(r"has \d+ MB before its first job, more than --max-memory 5 MB", workers.log)) == 1


def test_processes_of_single_jobs_follow_the_same_limits(workers: WorkerProcesses) -> None:
    """A process of run_in="process" is replaced above the limit of memory, and after so many jobs; the worker is not."""
    workers.app.enqueue_many(workers.tasks.leak_apart.s(n, 40 * MB) for n in range(40))
    workers.start(max_memory=300 * MB, env={"WORKERS_LEAST_LIFE": "0"})
    wait(lambda: len(workers.starts()) == 40 and workers.drained())

    assert workers.repeats() == 0
    assert re.search(r'of run_in="process" has \d+ MB after \d+ jobs? and \d+ s \(limit \d+ MB\)', workers.log)
    assert "it takes no more" not in workers.log


def test_a_burst_ends_when_drained(workers: WorkerProcesses) -> None:
    """With --burst and max_jobs every job is done once, and the exit code is 0."""
    workers.app.enqueue_many(workers.tasks.note.s(n) for n in range(60))
    supervisor = workers.start(burst=True, max_jobs=10, processes=2)

    assert supervisor.wait(60) == 0
    assert (workers.completions(), workers.repeats()) == (60, 0)
    assert len(pids(workers)) >= 6
    assert workers.drained()


def test_a_burst_waits_for_retries_of_a_replaced_process(workers: WorkerProcesses) -> None:
    """A retry that is not due yet when its process is replaced keeps the burst from ending: the successor runs it."""
    workers.tasks.again.enqueue(0)
    supervisor = workers.start(burst=True, max_jobs=1)

    assert supervisor.wait(60) == 0
    assert (workers.completions(), workers.repeats(), len(pids(workers))) == (1, 1, 2)
    assert workers.drained()


def test_limits_are_drawn_apart_and_never_above() -> None:
    """Each process draws its limit from the last tenth below the one given; without limits nothing is ever used up."""
    drawn = {RecycleLimits(1000, None).remaining(0) for _ in range(200)}
    assert 900 <= min(drawn) < max(drawn) <= 1000
    assert len(drawn) > 30
    assert RecycleLimits(3, None).remaining(0) == 3
    free = RecycleLimits(None, None)
    free.begin()
    assert free.used_up(10**9) is None


def test_memory_is_measured_also_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc the peak stands in for what is occupied now; both are plausible for this process."""
    now = recycling.memory_or_peak()
    monkeypatch.setattr(usage, "PROC", "/nowhere")

    assert 10 * MB < now < 4000 * MB
    assert now * 0.9 < recycling.memory_or_peak() < 8000 * MB


def test_the_command_line_refuses_what_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that cannot be read, or a number below 1, is wrong usage and says how to write it."""
    for given, said in (
        (["--max-memory", "lots"], "--max-memory must be a number of bytes"),
        (["--max-jobs", "0"], "1<=x<=1000000000000"),
    ):
        result = CliRunner().invoke(cli, ["worker", "support.journal_app:app", *given], obj={"verbose": False})
        assert result.exit_code != 0
        assert said in result.output + str(result.exception)
