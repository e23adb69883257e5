"""Why a job waits: the first cause that a lease meets, from the keys that it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from conveyor import Conveyor, JobNotFound, Why
from conveyor.admin.admin import Admin
from conveyor.ids import new_id
from conveyor.jobs.job import Job
from conveyor.payload.records import AttemptHistory, Failure, to_json, write_envelope
from conveyor.store import inspection, limits, operations
from conveyor.store.operations import Settlement
from support.manual_worker import ManualWorker, ServingWorker, drain

pytestmark = [pytest.mark.redis6, pytest.mark.redis7]


@pytest.fixture
def queue(app: Conveyor) -> Iterator[str]:
    @app.task(name="mail.send", queue="mail")
    def send(user: int) -> None: ...

    yield "mail"
    drain(app)


def send(app: Conveyor, user: int = 1, **options: object) -> Job[object]:
    return app.tasks["mail.send"].options(**options).enqueue(user)  # type: ignore[arg-type]


def test_a_paused_queue_is_the_first_cause(app: Conveyor, queue: str) -> None:
    """Of several causes the one that the lease meets first is named, and the others stand behind it in its order."""
    job = send(app, delay="1h")
    app.queue(queue).pause()

    why = job.why()

    assert (why.kind, why.name, why.status) == ("queue-paused", "mail", "scheduled")
    assert [one.kind for one in why.also] == ["no-worker", "scheduled"]
    assert str(why) == "Queue 'mail' is paused. Resume it:  conveyor queue resume mail"


def test_a_queue_that_nothing_serves(app: Conveyor, queue: str) -> None:
    """A worker makes the cause go away; a consumer of messages serves no jobs, and a worker no messages."""
    job = send(app)
    assert (job.why().kind, str(job.why())) == ("no-worker", "No worker serves queue 'mail'.")

    consumer = ServingWorker(app, kind="consumer", queue=queue)
    assert job.why().kind == "no-worker"

    worker = ServingWorker(app, queue, ("mail.send",))
    assert job.why().kind == "position"
    consumer.leave()
    message = app.queue("letters").push(1)
    other = ServingWorker(app, "letters", ("mail.send",))
    assert str(app.job(message).why()) == "No consumer serves queue 'letters'."
    for one in (worker, other):
        one.leave()


def test_a_task_that_no_worker_knows(app: Conveyor, queue: str) -> None:
    """The last worker that knew the task is named, with the instant at which it left; a worker that knows it ends the cause."""
    job = send(app)
    other = ServingWorker(app, queue, ("mail.bounce",))
    assert str(job.why()) == "No worker of queue 'mail' knows the task 'mail.send'. None of its last workers did."

    knowing = ServingWorker(app, queue, ("mail.bounce", "mail.send"))
    assert job.why().kind == "position"
    began = datetime.now(UTC) - timedelta(seconds=5)
    app.client.run(operations.reap(knowing.keys, knowing.worker, crashed=False))

    why = job.why()

    assert (why.kind, why.name, why.seen_name) == ("unknown-task", "mail.send", "web-3:4711")
    assert why.seen is not None
    assert began < why.seen < datetime.now(UTC) + timedelta(seconds=5)
    assert "was last known by web-3:4711, seen at" in str(why)
    silent = ManualWorker(app, queue)  # of an earlier version: it has not said what it knows
    assert job.why().kind == "position"
    for one in (other, silent):
        one.leave()


def test_sets_of_tasks_are_bounded(app: Conveyor, queue: str) -> None:
    """A queue remembers the last twenty sets of tasks; workers with the same tasks share one."""
    for number in [*range(25), 24, 24]:
        worker = ServingWorker(app, queue, ("mail.send", f"new.{number}"))
        app.client.run(operations.reap(worker.keys, worker.worker, crashed=False))

    conf = app.client.execute("HKEYS", app.client.keys(queue).conf, key=queue)
    names = sorted(field.decode().partition(":")[0] for field in conf)

    assert (names.count("tasks"), names.count("seen"), names.count("task_sets")) == (20, 20, 1)


def test_a_scheduled_job_and_a_retry(app: Conveyor, queue: str) -> None:
    """A delayed job names its instant, one that failed its error besides."""
    worker = ServingWorker(app, queue, ("mail.send",))
    later, failing = send(app, delay="1h"), send(app)
    [id_] = worker.take()
    failure = to_json(Failure(1, 5, "builtins.ValueError", "no such user"))
    worker.turn(0, Settlement("R", id_, 60_000, state=AttemptHistory(1, 1, 0, [failure]).encode()))

    why, again = later.why(), failing.why()

    assert (why.kind, why.error) == (again.kind, "") == ("scheduled", "")
    assert why.opens_at is not None
    assert timedelta(minutes=59) < why.opens_at - datetime.now(UTC) < timedelta(minutes=61)
    assert str(why).startswith("It is scheduled for 20")
    assert again.error == "attempt 1 failed: ValueError: no such user"
    assert str(again).startswith("It is tried again at 20")
    assert str(again).endswith("(attempt 1 failed: ValueError: no such user).")
    worker.leave()


def test_a_position_with_an_estimate(app: Conveyor, queue: str) -> None:
    """The position counts what is leased before, urgent jobs too; the estimate comes from the attempts that ended lately."""
    worker = ServingWorker(app, queue, ("mail.send",))
    first, second, urgent = send(app), send(app), send(app, priority=5)
    assert [(one.why().ahead, one.why().total, one.why().estimate) for one in (urgent, first, second)] == [
        (0, 3, None), (1, 3, None), (2, 3, None),
    ]  # fmt: skip
    assert str(second.why()) == "It is number 3 of 3 in queue 'mail'."

    minute = worker.turn().now // 60_000
    app.client.execute(
        "HSET", f"{worker.keys.prefix}stats:{minute}", "done:mail.send", "2", "failed:x", "1", "le3:y", "9", key=queue
    )
    why = second.why()

    assert why.estimate is not None
    assert 0 <= why.estimate <= 61  # a job a third of the time that this minute has lasted
    assert "At the present rate that is about" in str(why)
    app.client.execute("DEL", f"{worker.keys.prefix}stats:{minute}", key=queue)
    worker.leave()


def test_a_position_is_looked_for_among_so_many(app: Conveyor, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that stands further from both ends than is looked is not searched; what is said of it is at least."""
    monkeypatch.setattr(inspection, "LOOKED_AT", 2)
    worker = ServingWorker(app, queue, ("mail.send",))
    jobs = [send(app, user) for user in range(7)]

    found = [(job.why().ahead, job.why().exact) for job in jobs]

    assert found == [(0, True), (1, True), (2, False), (2, False), (2, False), (5, True), (6, True)]
    assert str(jobs[3].why()) == "At least 2 of 7 jobs in queue 'mail' are before it."
    worker.leave()


def test_a_job_that_does_not_wait(app: Conveyor, queue: str) -> None:
    """A leased job names who has it, one that ended how; one that was never there is no answer but an error."""
    worker = ServingWorker(app, queue, ("mail.send",))
    job, dead = send(app), send(app)
    [id_, other] = worker.take(2)

    running = job.why()
    worker.dead(other, Failure(1, 5, "builtins.ValueError", "no such user"))
    worker.done(id_)

    assert (running.kind, running.name, running.status) == ("running", "web-3:4711", "leased")
    assert str(running).startswith("It does not wait: web-3:4711 has it, since 20")
    assert str(job.why()) == "It ended well."
    assert str(dead.why()) == "It failed for good after 1 attempt: ValueError: no such user."
    with pytest.raises(JobNotFound):
        app.job("mail:nothing").why()
    worker.leave()


def test_a_job_whose_worker_is_gone(app: Conveyor, queue: str) -> None:
    """A job whose worker's lease has ended is not said to run calmly: since when, and whether another worker is there to start it."""
    worker = ServingWorker(app, queue, ("mail.send",))
    job = send(app)
    worker.take(1)
    keys = app.client.keys(queue)
    assert job.why().seen is None

    app.client.execute("ZADD", keys.workers, "XX", 1_700_000_000_000, worker.worker, key=keys.workers)
    gone = job.why()
    assert (gone.kind, [one.kind for one in gone.also]) == ("running", ["no-worker"])
    assert gone.seen == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert "web-3:4711 has it, since 20" in str(gone)
    assert "has died or hangs: its lease ended at 2023-11-14 22:13:20 UTC" in str(gone)
    assert str(gone.also[0]) == "No worker serves queue 'mail'."

    another = ServingWorker(app, queue, ("mail.send",))
    assert job.why().also == ()
    another.leave()
    worker.leave()


def test_the_awaitable_twin_and_an_own_id(app: Conveyor, queue: str) -> None:
    """`awhy` says what `why` does, also of an id that does not name its queue."""
    job = send(app, id="order-7")

    async def look() -> Why:
        try:
            return await app.job("order-7").awhy()
        finally:
            await app.client.aclose()

    why = asyncio.run(look())

    assert isinstance(why, Why)
    assert (why.kind, why.queue, why.task) == ("no-worker", "mail", "mail.send")
    assert why.kind == app.job("order-7").why().kind == job.why().kind


# -- limits and groups --------------------------------------------------------------------------------------------


def push(app: Conveyor, *, group: str | None = None, limits: tuple[str, ...] = ()) -> Job[object]:
    """Push a job that is in a group, or has limits."""
    entry = operations.Entry(new_id(), write_envelope("mail.send", b'{"user":1}'), group=group, limits=limits)
    [id_] = app.client.push(app.client.keys("mail"), [entry])
    return app.job(f"mail:{id_}")


def end(worker: ManualWorker, id_: str) -> None:
    worker.turn(0, Settlement("D", id_, attributes=worker.envelopes[id_].attributes))


def test_a_concurrency_limit_that_is_full(app: Conveyor, queue: str) -> None:
    """The limit is named with its slots and who is ahead, before and after a lease has met it; a slot that is free ends the cause."""
    worker = ServingWorker(app, queue, ("mail.send",))
    app.client.run(limits.declare_limits(worker.keys, {"api": "c 1 -"}, replace=False))
    jobs = [push(app, limits=("1:api",)) for _ in range(4)]
    assert jobs[0].why().kind == "position"
    [first] = worker.take(1)
    for _ in range(2):
        whys = [job.why() for job in jobs[1:]]
        assert [(one.kind, one.name, one.used, one.most, one.ahead) for one in whys] == [
            ("limit", "api", 1, 1, 0), ("limit", "api", 1, 1, 1), ("limit", "api", 1, 1, 2),
        ]  # fmt: skip
        assert worker.take(5) == []
    assert str(jobs[2].why()) == "Limit 'api' is full (1 of 1); at least 1 is ahead."
    assert jobs[2].status() == "waiting"
    end(worker, first)

    assert [job.why().kind for job in jobs[1:]] == ["position"] * 3
    for _ in range(3):
        [id_] = worker.take(5)
        end(worker, id_)
    worker.leave()


def test_a_rate_that_is_used_up(app: Conveyor, queue: str) -> None:
    """A rate says when it opens; one by a key names the key; what an operator set counts."""
    worker = ServingWorker(app, queue, ("mail.send",))
    app.client.run(limits.declare_limits(worker.keys, {"api": "r 2 3600000 0 tenant"}, replace=False))
    jobs = [push(app, limits=("1:api:acme",)) for _ in range(3)]
    taken = worker.take(5)
    assert len(taken) == 2

    why = jobs[2].why()

    assert (why.kind, why.name, why.key, why.used, why.most, why.per) == ("limit", "api", "acme", 2, 2, 3600)
    assert why.opens_at is not None
    assert timedelta(minutes=58) < why.opens_at - datetime.now(UTC) < timedelta(minutes=61)
    assert str(why).startswith("Limit 'api' of 'acme' is full (2 of 2 in 1 h), opens at 20")
    app.client.run(limits.set_limit(worker.keys, "api", "acme", "r 5 3600000 0"))
    assert jobs[2].why().kind == "position"
    [last] = worker.take(5)
    for id_ in (*taken, last):
        end(worker, id_)
    app.client.execute("DEL", worker.keys.prefix + "rate:api:acme", key=queue)
    worker.leave()


def test_a_limit_that_is_held(app: Conveyor, queue: str) -> None:
    """A rate, a concurrency and a group that a service holds say until when, and not that they are full."""
    worker = ServingWorker(app, queue, ("mail.send",))
    app.client.run(limits.declare_limits(worker.keys, {"api": "r 5 1000 0 -", "two": "c 2 -"}, replace=False))
    for options, limit, said in (
        ({"limits": ("1:api",)}, "api", "Limit 'api'"), ({"limits": ("1:two",)}, "two", "Limit 'two'"),
        ({"group": "acme"}, ":acme", "Group 'acme'"),
    ):  # fmt: skip
        job = push(app, **options)
        [id_] = worker.take(5)
        worker.turn(0, Settlement("L", id_, 3_600_000, limit.encode(), attributes=worker.envelopes[id_].attributes))

        why = job.why()

        assert (why.kind, why.most, why.behind) == ("limit", None, "")
        assert why.opens_at is not None
        assert timedelta(minutes=58) < why.opens_at - datetime.now(UTC) < timedelta(minutes=61)
        assert str(why).startswith(f"{said} is held until 20")
        assert job.cancel()
        app.client.execute("HDEL", f"{worker.keys.prefix}limits", f"\t{limit}", key=queue)
    worker.take(5)
    worker.leave()
    app.queue(queue).purge()


def test_causes_of_a_queue_of_groups(app: Conveyor, queue: str) -> None:
    """The first job of each group is looked at, so a missing worker is told; a paused key is; at a limit jobs are counted; its alarm is none."""
    admin, keys = Admin(app.client), app.client.keys(queue)
    app.client.run(limits.declare_limits(keys, {"api": "r 1 3600000 0 -"}, replace=False))
    jobs = [
        push(app, group="acme"),
        push(app, group="acme"),
        *(push(app, limits=("1:api",)) for _ in range(3)),
    ]
    assert [str(one) for one in admin.causes(queue)] == ["No worker serves it: 5 jobs wait."]

    app.groups.set(queue, "acme", paused=True)
    worker = ServingWorker(app, queue, ("other",))
    [id_] = worker.take(5)
    causes = admin.causes(queue)
    assert [(one.kind, one.name, one.jobs) for one in causes] == [
        ("group-paused", "acme", 2), ("limit", "api", 2), ("unknown-task", "mail.send", 2),
    ]  # fmt: skip
    assert str(causes[0]) == "Group 'acme' is paused: 2 jobs wait."
    assert causes[1].opens_at is not None
    assert causes[1].at is not None
    assert 0 < (causes[1].opens_at - causes[1].at).total_seconds() <= 3600
    assert str(causes[1]).startswith(
        f"Limit 'api' is full: 2 jobs wait, opens at {causes[1].opens_at:%Y-%m-%d %H:%M:%S} UTC (in "
    )
    assert causes[2].looked == 2

    end(worker, id_)
    assert all(job.cancel() for job in jobs if not job.id.endswith(id_))
    app.groups.set(queue, "acme", paused=False)
    app.client.execute("DEL", f"{keys.prefix}rate:api", key=queue)
    worker.take(5)
    worker.leave()
    app.queue(queue).purge()


def test_a_group_behind_its_first_job(app: Conveyor, queue: str) -> None:
    """The job that comes first is named, while it is leased and while it waits for its retry; a paused group is a cause of its own."""
    worker = ServingWorker(app, queue, ("mail.send",))
    first, second = push(app, group="acme"), push(app, group="acme")
    [id_] = worker.take(5)

    held = second.why()
    worker.turn(0, Settlement("R", id_, 3_600_000, state=b"1 1 0", attributes=worker.envelopes[id_].attributes))
    retried = second.why()
    app.client.run(limits.set_group(worker.keys, "acme", weight=None, paused=True))
    paused = second.why()

    assert (held.kind, held.name, held.behind, held.behind_status) == ("group", "acme", first.id, "leased")
    assert str(held) == f"It waits in group 'acme' behind job {first.id}, which is leased."
    assert (retried.kind, retried.behind, retried.behind_status) == ("group", first.id, "scheduled")
    assert f"It waits in group 'acme' behind job {first.id}, which is tried again at 20" in str(retried)
    assert (paused.kind, str(paused), paused.also[0].kind) == (
        "group-paused", "Group 'acme' is paused. Resume it:  conveyor queue resume mail --group acme", "group",
    )  # fmt: skip
    app.client.run(limits.set_group(worker.keys, "acme", weight=None, paused=False))
    worker.leave()
