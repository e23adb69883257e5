"""A task that is paused: its jobs wait in their order, and others of the queue go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from conveyor import Conveyor, QueueFull, Unique
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError
from conveyor.ids import new_id
from conveyor.jobs.job import Job
from conveyor.payload.records import write_envelope
from conveyor.store import inspection, limits, operations
from conveyor.store.operations import Settlement
from support.manual_worker import ManualWorker, drain

pytestmark = [pytest.mark.redis6, pytest.mark.redis7]
Jobs = list[Job[None]]


@pytest.fixture(autouse=True)
def tasks(app: Conveyor) -> Iterator[None]:
    @app.task(name="mail.send", queue="mail")
    def send(user: int) -> None: ...

    @app.task(name="mail.clean", queue="mail")
    def clean(user: int) -> None: ...

    yield
    app.resume_task("mail.send")
    drain(app)


def enqueue(app: Conveyor, *names: str, **options: object) -> Jobs:
    """Enqueue a job of mail.<name> for each name."""
    return [app.tasks[f"mail.{name}"].options(**options).enqueue(1) for name in names]  # type: ignore[arg-type]


def bare(jobs: Jobs) -> list[str]:
    return [job.id.partition(":")[2] or job.id for job in jobs]


def audit(app: Conveyor, queue: str = "mail") -> list[tuple[str, str]]:
    return app.client.run(inspection.audit(app.client.keys(queue)))


def test_jobs_are_chosen_by_the_state_that_they_tell(app: Conveyor) -> None:
    """Jobs of a paused task, and one that is to run after another one, are found as waiting, and not as ready."""
    again = app.task(name="mail.again", queue="mail", unique=Unique(by=("user",), conflict="rerun"))(lambda user: None)
    manual = ManualWorker(app, "mail")
    first = again.enqueue(1)
    assert manual.take(1) == bare([first])
    app.pause_task("mail.send")
    jobs = [again.enqueue(1), *enqueue(app, "send", "send"), *enqueue(app, "clean")]
    assert manual.take(1) == bare(jobs[3:])

    for state in ("ready", "waiting", "leased"):
        chosen = {job.id for job in [first, *jobs] if job.status() == state}
        assert {job.id for job in app.jobs(queue="mail", state=state)} == chosen, state
        assert app.count_jobs(queue="mail", state=state) == len(chosen)
    assert app.count_jobs(queue="mail", state="waiting") == app.queue("mail").stats().waiting == 3
    assert app.cancel(queue="mail", state="waiting") == 3
    manual.done(*bare([first]))
    manual.done(*bare(jobs[3:]))
    manual.leave()


def test_a_queue_of_cancelled_jobs_has_no_oldest_one(app: Conveyor) -> None:
    """The rest of a cancelled job, which stays until a worker reaches it, is no job that waits."""
    [job] = enqueue(app, "clean")
    assert app.queue("mail").stats().oldest_age is not None
    job.cancel()
    assert app.queue("mail").stats().oldest_age is None


def test_jobs_of_a_paused_task_wait_and_others_go_on(app: Conveyor) -> None:
    """They hold no lease and use no attempt, count as waiting, and go first and in their order when the task is resumed."""
    jobs = enqueue(app, "send", "clean", "send", "clean", "send")
    app.pause_task("mail.send")
    worker = ManualWorker(app, "mail")

    assert worker.take(10) == bare([jobs[1], jobs[3]])
    assert (worker.turn(5).ids, jobs[0].status(), jobs[0].why().kind) == ([], "waiting", "task-paused")
    stats = app.queue("mail").stats()
    assert (stats.ready, stats.waiting, len(stats), audit(app)) == (0, 3, 3, [])
    later = enqueue(app, "send", "clean", "send")
    assert worker.take(10) == bare(later[1:2])

    app.resume_task("mail.send")
    newest = enqueue(app, "clean", "send")
    assert jobs[0].status() in {"ready", "waiting"}
    assert worker.take(2) == bare([jobs[0], jobs[2]])
    assert worker.take(10) == bare([jobs[4], later[0], later[2], *newest])
    assert {one.attempts for one in (job.info() for job in (*jobs[::2], *newest))} == {1}
    assert app.client.execute("HGET", worker.keys.conf, "paused_tasks", key="mail") is None
    assert audit(app) == []
    worker.leave()


def test_a_pause_holds_for_every_worker_and_task_by_priority(app: Conveyor) -> None:
    """Workers that were there before, come later, or belong to other programs obey; priorities keep their order."""
    early = ManualWorker(app, "mail")
    low, high = enqueue(app, "send", "send"), enqueue(app, "send", "clean", "send", priority=7)
    app.pause_task(app.tasks["mail.send"])
    app.pause_task("mail.send")  # again: nothing changes

    other = Conveyor(app.client.configured_url, namespace=app.namespace)
    late = ManualWorker(other, "mail")
    assert (early.take(10), late.take(10)) == (bare(high[1:2]), [])
    other.resume_task("mail.send", queue="mail")
    other.resume_task("mail.send", queue="mail")

    assert late.take(10) == bare([high[0], high[2], *low])
    for one in (early, late):
        one.leave()
    other.close()


def test_a_pause_survives_a_new_connection_and_is_of_one_queue(app: Conveyor) -> None:
    """With `queue=` jobs of the task in other queues go on; the pause is kept in Redis."""
    vip, usual = enqueue(app, "send", queue="vip"), enqueue(app, "send")
    app.pause_task("mail.send", queue="mail")
    app.client.close()
    workers = ManualWorker(app, "vip"), ManualWorker(app, "mail")

    assert [one.take(5) for one in workers] == [bare(vip), []]

    app.resume_task("mail.send")
    assert workers[1].take(5) == bare(usual)
    for one in workers:
        one.leave()


def test_jobs_that_are_leased_already_run_or_come_back_first(app: Conveyor) -> None:
    """A pause does not touch what is leased; a job that is returned or whose worker dies stands before those that wait."""
    jobs = enqueue(app, "send", "send", "send", "send")
    worker, dying = ManualWorker(app, "mail"), ManualWorker(app, "mail")
    assert (worker.take(2), dying.take(1)) == (bare(jobs[:2]), bare(jobs[2:3]))
    app.pause_task("mail.send")
    assert worker.turn(5).ids == []

    app.client.run(operations.reap(dying.keys, dying.worker))
    assert worker.turn(5).ids == []
    assert worker.turn(5, Settlement("F", bare(jobs)[1]), done=(bare(jobs)[0],)).ids == []
    assert (app.queue("mail").stats().waiting, audit(app)) == (3, [])

    app.resume_task("mail.send")
    assert worker.take(5) == bare(jobs[1:])
    worker.leave()


def test_a_task_is_paused_again_before_its_jobs_have_gone(app: Conveyor) -> None:
    """The jobs that are left wait again, before those that were enqueued meanwhile."""
    jobs = enqueue(app, *["send"] * 5)
    worker = ManualWorker(app, "mail")
    app.pause_task("mail.send")
    assert worker.take(9) == []
    app.resume_task("mail.send")
    assert worker.take(2) == bare(jobs[:2])
    jobs += enqueue(app, "send")
    app.pause_task("mail.send")
    others = enqueue(app, "clean")

    assert worker.take(9) == bare(others)
    assert audit(app) == []
    app.resume_task("mail.send")

    assert worker.take(9) == bare(jobs[2:])
    assert audit(app) == []
    worker.leave()


def test_waiting_jobs_are_known_to_everything(app: Conveyor) -> None:
    """Cancel, purge, listing, the maximum length, redrive and repair know the jobs that wait for their task."""
    bounded = app.queue("mail", max_length=6)
    jobs = enqueue(app, "send", "send", "send", "send")
    app.pause_task("mail.send")
    worker = ManualWorker(app, "mail")
    assert worker.take(9) == []

    with pytest.raises(QueueFull):
        app.enqueue_many([app.tasks["mail.send"].s(1) for _ in range(3)])
    listed = Admin(app.client).jobs("mail", "waiting")
    assert [job.id for job in listed] == [job.id for job in jobs]
    assert jobs[1].cancel() == "removed"
    assert (jobs[1].status(), len(bounded), audit(app)) == ("cancelled", 3, [])
    assert Admin(app.client).repair("mail") == 0

    app.resume_task("mail.send")
    assert worker.take(1) == bare(jobs[:1])
    app.pause_task("mail.send")
    worker.dead(bare(jobs)[0], None)
    assert bounded.redrive() == 1
    assert worker.take(9) == []
    assert (bounded.stats().waiting, bounded.stats().ready, audit(app)) == (3, 0, [])
    assert bounded.purge() == 3
    assert (len(bounded), audit(app)) == (0, [])
    app.resume_task("mail.send")
    worker.leave()


def test_many_jobs_of_a_paused_task_do_not_hold_up_a_turn(app: Conveyor) -> None:
    """A turn passes over so many entries and no more, says that there is more, and the next ones find the job behind them."""
    app.enqueue_many([app.tasks["mail.send"].s(1) for _ in range(3000)])
    others = enqueue(app, "clean")
    app.pause_task("mail.send")
    worker, turns, found = ManualWorker(app, "mail"), 0, list[str]()
    while not found:
        reply = worker.turn(1)
        turns, found = turns + 1, reply.ids
        assert reply.ids or reply.more

    assert (found, app.queue("mail").stats().waiting, audit(app)) == (bare(others), 3000, [])
    assert turns < 40
    worker.turn(0, done=tuple(found))
    app.queue("mail").purge()
    worker.leave()


def test_a_worker_hears_of_a_resumed_task(app: Conveyor) -> None:
    """A worker that is idle, because all that there is waits for its task, starts when the task is resumed."""
    ran: list[int] = []

    @app.task(name="mail.count", queue="mail")
    async def count(user: int) -> None:
        ran.append(user)

    async def scenario() -> None:
        await app.apause_task("mail.count")
        async with app.worker(queues={"mail": 1}):
            waiting = [await count.aenqueue(number) for number in range(3)]
            await (await app.tasks["mail.clean"].aenqueue(1)).aresult(timeout=60)
            assert (ran, await waiting[2].astatus()) == ([], "waiting")
            await app.aresume_task("mail.count")
            for job in waiting:
                await job.aresult(timeout=60)
        await app.client.aclose()

    asyncio.run(scenario())
    assert ran == [0, 1, 2]


def test_names_are_checked(app: Conveyor) -> None:
    """A name that no task can have, and a queue that none can be called, are refused; nothing is stored."""
    for call in (lambda: app.pause_task("mail send"), lambda: app.pause_task("mail.send", queue="a b")):
        with pytest.raises(ConfigurationError):
            call()
    assert app.client.queues() == []


# -- with groups and limits ---------------------------------------------------------------------------------------


def push(app: Conveyor, task: str, group: str | None = None, limits: tuple[str, ...] = ()) -> str:
    """Push a job of mail.<task> that is in a group, or has limits; return its id."""
    entry = operations.Entry(new_id(), write_envelope(f"mail.{task}", b'{"user":1}'), group=group, limits=limits)
    [id_] = app.client.push(app.client.keys("mail"), [entry])
    return id_


def test_a_group_whose_first_job_is_paused_waits_and_others_go_on(app: Conveyor) -> None:
    """Order within a group holds: what stands behind a job of a paused task waits with it; other groups do not."""
    blocked = [push(app, "send", "a"), push(app, "clean", "a")]
    free, mixed = push(app, "clean", "b"), [push(app, "clean", "c"), push(app, "send", "c")]
    app.pause_task("mail.send")
    worker = ManualWorker(app, "mail")

    assert worker.take(9) == [free, mixed[0]]
    assert audit(app) == []
    assert app.job(f"mail:{blocked[0]}").why().kind == "task-paused"
    behind = app.job(f"mail:{blocked[1]}").why()
    assert (behind.kind, behind.name, behind.behind) == ("group", "a", f"mail:{blocked[0]}")
    assert str(behind) == f"It waits in group 'a' behind job mail:{blocked[0]}, which waits, too."
    worker.turn(0, *(Settlement("D", id_, attributes=worker.envelopes[id_].attributes) for id_ in (free, mixed[0])))
    assert (worker.take(9), audit(app)) == ([], [])
    app.resume_task("mail.send")

    assert sorted(worker.take(9)) == sorted([blocked[0], mixed[1]])
    worker.turn(
        0, *(Settlement("D", id_, attributes=worker.envelopes[id_].attributes) for id_ in (blocked[0], mixed[1]))
    )
    assert worker.take(9) == [blocked[1]]
    assert audit(app) == []
    worker.turn(0, Settlement("D", blocked[1], attributes=worker.envelopes[blocked[1]].attributes))
    worker.leave()


def test_a_limited_job_of_a_paused_task_holds_no_slot(app: Conveyor) -> None:
    """Jobs of other tasks that share the limit pass; the paused ones take it when they go on."""
    keys = app.client.keys("mail")
    app.client.run(limits.declare_limits(keys, {"api": "c 1 -"}, replace=False))
    paused, other = push(app, "send", limits=("1:api",)), push(app, "clean", limits=("1:api",))
    app.pause_task("mail.send")
    worker = ManualWorker(app, "mail")

    found = worker.take(9)
    assert (found, audit(app)) == ([], []) or found == [other]
    app.resume_task("mail.send")
    if not found:
        found = worker.take(9)
        assert found == [paused]
    assert audit(app) == []
    worker.turn(0, Settlement("D", found[0], attributes=worker.envelopes[found[0]].attributes))
    [last] = worker.take(9)
    assert {found[0], last} == {paused, other}
    worker.turn(0, Settlement("D", last, attributes=worker.envelopes[last].attributes))
    worker.leave()


def test_a_task_is_held_by_a_job_that_was_refused(app: Conveyor) -> None:
    """A job of a task without limits that is told to wait holds its task: no other of it starts, and none uses an attempt."""
    jobs = enqueue(app, "send", "send", "clean")
    worker = ManualWorker(app, "mail")
    assert worker.take(1) == bare(jobs[:1])
    reply = worker.turn(9, Settlement("L", bare(jobs)[0], 600_000, b";mail.send"))

    assert (reply.ids, audit(app)) == (bare(jobs[2:]), [])
    why = jobs[1].why()
    assert (why.status, why.kind, why.name) == ("waiting", "limit", "mail.send")
    assert str(why).startswith("Task 'mail.send' is held until 20")
    assert reply.next_due is not None
    app.client.execute("ZADD", worker.keys.due, "1", "\t;mail.send", key="mail")
    app.client.execute("HSET", worker.keys.prefix + "limits", "\t;mail.send", "1", key="mail")

    assert worker.take(9) == bare(jobs[:2])
    assert app.client.execute("HGET", worker.keys.conf, "paused_tasks", key="mail") is None
    assert audit(app) == []
    worker.leave()
