"""`conveyor demo` as a person and a script run it, and its report, which says whether the counts add up."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from conveyor.admin.admin import Admin
from conveyor.cli.demo.image import decode, draw, encode, shrink
from conveyor.cli.demo.journal import Journal, JournalEntry
from conveyor.cli.demo.report import Kill, build_report, histories, summary_lines
from conveyor.cli.demo.run import DemoRun
from conveyor.store.client.client import Client
from support.shell import Shell
from support.supervisor_process import running
from support.waiting import until, until_said

ACCEPTED = {"q:a": "work", "q:b": "work", "q:c": "work", "q:d": "work"}
KILL = Kill(7, 10.0, returned=3)


def lines() -> list[JournalEntry]:
    """a ran, b was cut off by the kill of 7 and ran again, c failed twice and died, d waits for its retry."""
    return [
        JournalEntry(1.0, "up", 7), JournalEntry(1.0, "up", 8),
        JournalEntry(2.0, "start", 8, "work", "q:a", 1), JournalEntry(2.5, "ok", 8, "work", "q:a", 1, 0.5),
        JournalEntry(9.0, "start", 7, "work", "q:b", 1),
        JournalEntry(10.2, "start", 8, "work", "q:b", 2), JournalEntry(10.4, "ok", 8, "work", "q:b", 2, 0.2),
        JournalEntry(3.0, "start", 7, "work", "q:c", 1), JournalEntry(3.1, "fail", 7, "work", "q:c", 1, 0.1),
        JournalEntry(3.1, "retry", 7, "work", "q:c", 1), JournalEntry(4.0, "start", 8, "work", "q:c", 2),
        JournalEntry(4.1, "fail", 8, "work", "q:c", 2, 0.1), JournalEntry(4.1, "dead", 8, "work", "q:c", 2),
        JournalEntry(5.0, "start", 8, "work", "q:d", 1), JournalEntry(5.1, "fail", 8, "work", "q:d", 1, 0.1),
    ]  # fmt: skip


STATES = {"q:a": "done", "q:b": "done", "q:c": "dead", "q:d": "scheduled"}


def test_accounts_add_up_by_their_parts() -> None:
    """Every accepted job is done, dead or left, and the report shows that the job cut off by a kill ran again."""
    report = build_report(ACCEPTED, STATES, histories(lines()), [KILL])

    assert (report.accepted, report.done, report.dead, report.left, report.lost) == (4, 2, 1, 1, 0)
    assert report.sound
    (kill,) = report.kills
    assert (kill.interrupted, kill.again, kill.returned) == (1, 1, 3)
    assert kill.first_ms == pytest.approx(200)
    (task,) = report.tasks
    assert (task.runs, task.retries, task.median_ms) == (6, 1, pytest.approx(100))


def test_the_counts_of_the_report_stand_in_one_column() -> None:
    """With colours and without them, each count of the report ends in the same column."""
    report = build_report(ACCEPTED, STATES, histories(lines()), [KILL])
    names = "accepted|done|dead|cancelled|left|lost"

    counts = [re.match(rf"\s*({names})\s+\d+", click.unstyle(line)) for line in summary_lines(report)]

    assert [count.end() for count in counts if count is not None] == [19] * 6


def test_an_acknowledged_id_that_nobody_knows_is_lost() -> None:
    """The report names a loss when the queue does not know an acknowledged id, whatever the journal saw of it."""
    report = build_report(ACCEPTED, {**STATES, "q:a": None}, histories(lines()), [KILL])

    assert report.lost == 1
    assert not report.sound
    assert "q:a" in report.problems[0]


def test_done_without_a_run_is_lost() -> None:
    """The queue's word is not enough: a job that is said to be done and was never seen to succeed is lost."""
    unseen = [line for line in lines() if not (line.key == "q:a" and line.kind == "ok")]

    report = build_report(ACCEPTED, STATES, histories(unseen), [KILL])

    assert (report.done, report.lost) == (1, 1)
    assert not report.sound


def test_a_job_cut_off_and_not_run_again_is_no_success() -> None:
    """A job that a kill cut off counts as done only when another process ran it afterwards."""
    cut = [line for line in lines() if not (line.key == "q:b" and line.pid == 8)]

    report = build_report(ACCEPTED, STATES, histories(cut), [KILL])

    assert report.lost == 1
    assert report.kills[0].again == 0


def test_pictures_survive_the_way_through_png() -> None:
    """A picture comes back from its PNG as it was, and shrinking takes the mean of each box."""
    original = draw(3, 24, 16)

    assert decode(encode(original)) == original
    small = shrink(original, 8)
    assert (small.width, small.height) == (3, 2)
    box = [original.pixels[3 * (y * 24 + x)] for y in range(8) for x in range(8)]
    assert small.pixels[0] == sum(box) // 64


def test_late_worker_is_turned_away(tmp_path: Path) -> None:
    """The journal of a demo that is being removed cannot be opened, so no late worker starts its server again."""
    path = tmp_path / "journal"
    path.touch()
    early = Journal(str(path))
    early.write("up")
    with path.open("rb") as remover:
        with pytest.raises(BlockingIOError):
            fcntl.flock(remover, fcntl.LOCK_EX | fcntl.LOCK_NB)
        early.close()
        fcntl.flock(remover, fcntl.LOCK_EX | fcntl.LOCK_NB)

        with pytest.raises(BlockingIOError):
            Journal(str(path))

    path.unlink()
    with pytest.raises(FileNotFoundError):
        Journal(str(path))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell in an empty directory, whose temporary files lie there too."""
    (tmp_path / "tmp").mkdir()
    return Shell(tmp_path)


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where the demo of this test may put things; nothing of it is left afterwards."""
    yield {"TMPDIR": str(tmp_path / "tmp")}
    until(lambda: not list((tmp_path / "tmp").iterdir()))


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line or environment names *text*."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in known and running(int(entry.name)):
                found.append(int(entry.name))
    return found


def test_unattended_demo_adds_up_and_leaves_nothing(shell: Shell, temporary: dict[str, str]) -> None:
    """Four seconds of demo kill a worker, say which, account for every job, exit 0 and leave no process or file."""
    done = shell.run("demo", "--seconds", "4", "--json", **temporary)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "conveyor/demo@1"
    assert report["sound"]
    assert report["lost"] == 0
    assert report["accepted"] == report["done"] + report["dead"] + report["cancelled"] + report["left"] > 60
    assert report["first_done_seconds"] < 45
    (kill,) = report["kills"]
    assert kill["interrupted"] == kill["again"] >= 1
    assert kill["returned"] >= kill["interrupted"]
    assert f"SIGKILL to worker {kill['pid']}" in done.stderr
    assert f"the supervisor of {kill['pid']} returned {kill['returned']} job" in done.stderr
    assert {task["task"] for task in report["tasks"] if task["done"]} >= {
        "text.statistics", "picture.thumbnail", "payment.charge", "mail.reminder", "orders (message)",
        "readings (RPUSH)",
    }  # fmt: skip
    until(lambda: processes_with(temporary["TMPDIR"]) == [])  # the last of them end a moment later
    assert not (shell.directory / ".conveyor").exists()


def test_ctrl_c_drains_and_exits_0(shell: Shell, temporary: dict[str, str]) -> None:
    """Ctrl-C ends a demo in order: accepted jobs are finished, counted and printed."""
    demo = shell.start_anew("demo", "--seconds", "300", **temporary)
    until_said(demo, "the first job was done", 120)

    demo.send_signal(signal.SIGINT)
    out, _ = demo.communicate(timeout=60)

    assert demo.returncode == 0, out
    assert "The counts add up" in out


def test_killed_demo_leaves_nothing(shell: Shell, temporary: dict[str, str]) -> None:
    """Nothing of a demo that was killed with SIGKILL stays: no worker, no server, no file."""
    demo = shell.start_anew("demo", "--seconds", "300", **temporary)
    until_said(demo, "the first job was done", 120)
    assert len(processes_with(temporary["TMPDIR"])) >= 5

    demo.kill()
    demo.communicate(timeout=60)

    until(lambda: processes_with(temporary["TMPDIR"]) == [])


def test_demo_without_workers_fails(shell: Shell, temporary: dict[str, str]) -> None:
    """When the supervisor itself is killed, the demo ends early, counts what is left, and exits 1."""
    demo = shell.start_anew("demo", "--seconds", "300", **temporary)
    until_said(demo, "the first job was done", 120)
    (supervisor,) = [pid for pid in processes_with("conveyor.cli.demo.worker_processes") if parent(pid) == demo.pid]

    os.kill(supervisor, signal.SIGKILL)
    out, _ = demo.communicate(timeout=60)

    assert demo.returncode == 1, out
    assert "the workers ended unexpectedly" in out
    assert "lost            0" in out


def parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.standalone_only("the demo needs a single server")
def test_demo_on_a_server_of_somebody_elses(shell: Shell, temporary: dict[str, str], url: str) -> None:
    """With --url the demo uses that server, and deletes all its keys there; the leak check of `url` sees to the rest."""
    done = shell.run("demo", "--seconds", "2", "--url", url, **temporary)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "The counts add up" in done.stdout


@pytest.mark.parametrize("several", ["redis+cluster://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/mymaster"])
def test_demo_refuses_several_servers(shell: Shell, several: str) -> None:
    """A cluster or sentinels are refused with a sentence before anything starts."""
    done = shell.run("demo", "--seconds", "1", "--url", several)

    assert done.returncode == 2
    assert "needs a single server" in done.stderr
    assert "Traceback" not in done.stderr


def test_live_picture_on_a_terminal(shell: Shell, temporary: dict[str, str]) -> None:
    """On a terminal the demo draws queues, workers and events in place, and shows the cursor again at its end."""
    ours, theirs = pty.openpty()
    demo = subprocess.Popen(
        [sys.executable, "-m", "conveyor", "demo", "--seconds", "2"],
        cwd=shell.directory, env=shell.environment(TERM="xterm", **temporary), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # the terminal of nobody
        pass
    os.close(ours)

    assert demo.wait(60) == 0
    text = seen.decode()
    assert "QUEUE" in text
    assert "✓ text.statistics" in text.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "The counts add up" in text


def test_a_reading_between_its_list_and_the_queue_is_left(url: str, redis: Any) -> None:
    """A reading that a worker has taken off its list, and not yet into the queue, is not called lost."""
    from conveyor.cli.demo import task

    places = (task.readings.name, task.readings.keys.intake)
    for number, place in enumerate(places):
        redis.rpush(place, f'{{"id": {number}}}')
    client = Client(url)
    found = DemoRun._reading_states(None, Admin(client), task.readings.name)  # type: ignore[arg-type]
    client.close()
    redis.delete(*places)

    assert found == {task.reading_key(0): "ready", task.reading_key(1): "ready"}
