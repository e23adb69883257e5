"""Many queues: the number of steps in which all of them are read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from conveyor.admin.admin import Admin
from conveyor.admin.history import read_history
from conveyor.admin.queue_directory import QueueDirectory
from conveyor.errors import QueueNotFound
from conveyor.store import schedules
from conveyor.store.client.client import Client
from support.client_worker import ClientWorker, dead, push, recorded_steps

pytestmark = [
    pytest.mark.leaves_keys("jobs are pushed here to be looked at"),
    pytest.mark.standalone_only("counts the steps at one server"),
]
MANY = 240


@pytest.fixture
def backend(url: str) -> Iterator[Client]:
    backend = Client(url, namespace="t", retry_for=1)
    for number in range(MANY):
        push(backend, f"tenant-{number:03}", b"1")
    yield backend
    backend.close()


@pytest.fixture
def steps(backend: Client, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that were run, in their order."""
    return recorded_steps(backend, monkeypatch)


@pytest.mark.parametrize(
    "read", [Admin.queues, Admin.load, Admin.state_counts, Admin.flags], ids=["queues", "load", "state_counts", "flags"]
)
def test_queues_are_counted_a_hundred_in_one_step(
    backend: Client, steps: list[str], read: Callable[[Admin], object]
) -> None:
    """Counting queues takes a step for each hundred of them, whatever it is for."""
    read(Admin(backend))

    assert steps.count("count_queues") == 3
    assert steps.count("counts") == 0


def test_a_step_of_counting_ends_behind_many_workers_or_counters(backend: Client, steps: list[str]) -> None:
    """A queue with a thousand workers, or as many counters of a minute, ends a step: the next one goes on behind it, and none is missed."""
    crowded = backend.keys("tenant-003")
    names = [one for number in range(1000) for one in ("9999999999999", f"w{number:03}")]
    backend.execute("ZADD", crowded.workers, *names, key=crowded.workers)
    minute = int(time.time() // 60)
    prefix = backend.keys("tenant-010").prefix
    counters = [one for number in range(1000) for one in (f"done:task{number}", "2")]
    for number in (minute - 1, minute, minute + 1):  # whichever is the last when it is counted
        backend.execute("HSET", f"{prefix}stats:{number}", *counters, key=prefix)
    admin = Admin(backend)
    partitions = {name: [name] for name in admin.names()[:50]}
    steps.clear()

    found = {info.name: (info.workers, ended[-1].done) for info, ended, *_ in admin.count(partitions, 1)}

    assert len(found) == 50
    assert (found["tenant-003"], found["tenant-010"], found["tenant-049"]) == ((1000, 0), (0, 2000), (0, 0))
    assert steps == ["count_queues"] * 3


def test_a_step_of_metrics_ends_behind_many_counters(backend: Client, steps: list[str]) -> None:
    """A queue with a thousand counters ends a step of the totals too, and all queues are in the metrics."""
    for name in ("tenant-003", "tenant-010"):
        prefix = backend.keys(name).prefix
        counters = [one for number in range(1000) for one in (f"done:task{number}", "2")]
        backend.execute("HSET", f"{prefix}stats:total", *counters, key=prefix)
    steps.clear()

    text = Admin(backend).metrics_text()

    assert text.count(',outcome="succeeded"} 2') == 2000
    assert text.count("conveyor_leases_lost_total{") == MANY
    assert steps.count("read_totals") == 2 + 3  # behind those two, and of the other 229


def test_workers_of_many_queues_are_read_in_one_step(backend: Client, steps: list[str]) -> None:
    """Queues without a worker cost no step of their own; those with one list it, in their order."""
    for name in ("tenant-200", "tenant-007"):
        ClientWorker(backend, name).take()
    steps.clear()

    found = Admin(backend).workers()

    assert [(one.queue, one.held) for one in found] == [("tenant-007", 1), ("tenant-200", 1)]
    assert steps == ["workers"]


def test_many_workers_are_read_in_further_steps(backend: Client, steps: list[str]) -> None:
    """A step ends behind the queue in which its thousandth worker stands, and the next one goes on there: none is missed."""
    crowded = backend.keys("tenant-003")
    names = [one for number in range(1000) for one in ("9999999999999", f"w{number:03}")]
    backend.execute("ZADD", crowded.workers, *names, key=crowded.workers)
    ClientWorker(backend, "tenant-100").take()
    steps.clear()

    found = Admin(backend).workers()

    assert [one.queue for one in found] == ["tenant-003"] * 1000 + ["tenant-100"]
    assert steps == ["workers", "workers"]


@pytest.mark.parametrize(
    "read",
    [
        Admin.failures,
        Admin.count_jobs,
        lambda admin: list(admin.each_job(state="dead")),
        lambda admin: admin.jobs(offset=239),
    ],
    ids=["failures", "count_jobs", "each_job", "page"],
)
def test_jobs_of_many_queues_are_looked_for_where_some_are(
    backend: Client, steps: list[str], read: Callable[[Admin], object]
) -> None:
    """Dead letters, pages and numbers of jobs in all queues: these are counted a hundred in a step, and those that hold none are left."""
    dead(backend, "tenant-007", "no")
    steps.clear()

    read(Admin(backend))

    assert (steps.count("counts"), steps.count("count_queues")) == (0, 3)
    assert steps.count("list_jobs") <= 2


def test_doctor_reads_many_queues_in_few_steps(backend: Client, steps: list[str]) -> None:
    """Its checks take a step for many queues, but for the records, of which it reads as many as it has time for, and says so."""
    report = Admin(backend).doctor(seconds=0)

    assert steps.count("count_queues") == 3
    assert steps.count("examine_queues") == 1
    assert steps.count("audit") <= 1
    assert [one.text for one in report.findings if one.name == "records"] == [
        f"the records of {steps.count('audit')} of {MANY} queues were examined, in the time that this may take"
    ]
    steps.clear()
    assert [one for one in Admin(backend).doctor().findings if one.name == "records"] == []
    assert steps.count("audit") == MANY


def test_a_doctor_in_a_hurry_leaves_large_queues(backend: Client, steps: list[str]) -> None:
    """With little time no queue is examined whose records would keep the server for longer than 5 ms, which is said."""
    push(backend, "tenant-007", *[b"1"] * 600)
    keys = backend.keys("tenant-007")
    backend.execute("HDEL", keys.jobs, backend.execute("LINDEX", keys.ready[0], 300, key=keys.jobs), key=keys.jobs)

    hurried = Admin(backend).doctor(seconds=600)
    assert [one.text for one in hurried.findings if one.name == "records"] == [
        f"the records of {MANY - 1} of {MANY} queues were examined, in the time that this may take"
    ]
    assert (steps.count("audit"), "E10" in [one.code for one in hurried.problems]) == (MANY - 1, False)
    assert "E10" in [one.code for one in Admin(backend).doctor().problems]


def test_doctor_reads_schedules_only_where_there_are_some(backend: Client, steps: list[str]) -> None:
    """A queue that has schedules is asked for them, and the others are not."""
    keys = backend.keys("tenant-003")
    backend.run(schedules.claim_name(schedules.schedule_index("t"), "daily", keys.queue))
    backend.run(schedules.put_schedule(keys, "daily", "x", b"{}", b"", "data", int(time.time() * 1000) + 3_600_000))
    steps.clear()

    Admin(backend).doctor(seconds=0)

    assert steps.count("schedule_read") == 1


def test_doctor_notes_of_many_queues_are_few(backend: Client) -> None:
    """Beyond twenty, queues with dead letters or paused ones share one note."""
    for number in range(25):
        dead(backend, f"tenant-{number:03}", "no")
        Admin(backend).pause(f"tenant-{number:03}")

    notes = [one.text for one in Admin(backend).doctor(seconds=0).findings if one.level == "note"]

    assert "5 more queues have 5 dead letters" in notes
    assert "5 more queues are paused" in notes
    assert sum("dead letter" in text for text in notes) == 21


def test_served_queues_are_read_together(backend: Client, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of many served queues are listed in the steps of counting, for the jobs they hold in one for all, and the names are read once."""
    for number in range(30):
        ClientWorker(backend, f"tenant-{number:03}").take()
    reads, queues = list[int](), backend.queues
    monkeypatch.setattr(backend, "queues", lambda: reads.append(1) or queues())
    steps.clear()

    text = Admin(backend).metrics_text()

    assert text.count('conveyor_queue_workers{queue="tenant-029"} 1') == 1
    assert 'conveyor_workers{kind="unknown",state="running"} 1' in text
    assert (steps.count("workers"), steps.count("count_queues"), len(reads)) == (0, 3, 1)
    reads.clear()
    steps.clear()

    Admin(backend).flags(most=5)

    assert (steps.count("workers"), steps.count("leased_jobs"), steps.count("read_stats") <= 5 * 2) == (1, 5, True)
    assert len(reads) <= 4


def test_an_answer_that_asks_several_things_reads_the_names_once(
    backend: Client, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interface that `knowing` returns reads the names of queues no more; dead letters are looked for where the counts have some."""
    dead(backend, "tenant-007", "no")
    admin = Admin(backend)
    admin = admin.knowing(admin.queue_partitions())
    reads, queues = list[int](), backend.queues
    monkeypatch.setattr(backend, "queues", lambda: reads.append(1) or queues())
    infos = admin.queues()
    steps.clear()

    assert [(one.queue, one.count) for one in admin.failures(queues=infos).groups] == [("tenant-007", 1)]
    assert steps.count("count_queues") == 1
    admin.doctor(seconds=0, queues=infos)
    admin.flags(infos)
    assert [len(admin.causes(info.name, info.ready)) for info in infos[:20]] == [1] * 20
    assert (len(admin.workers()), admin.names(), reads) == (0, [info.name for info in infos], [])
    with pytest.raises(QueueNotFound, match="tenant-999"):
        admin.queue("tenant-999")


def test_a_slow_server_hides_no_history_of_few_queues(backend: Client) -> None:
    """Where the first queue takes all of the time, the history of ten is read nevertheless; it says how many there are."""
    history = read_history(backend, QueueDirectory(backend), "1h", None, None, seconds=0)

    assert (history.read_queues, history.queues_total) == (10, MANY)
