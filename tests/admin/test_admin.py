"""The admin interface: its views of queues and jobs, and the effects of its actions."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace
from redis import Redis

from conveyor.admin.admin import Admin
from conveyor.admin.flags import queue_flags
from conveyor.admin.views import QueueInfo
from conveyor.errors import ConfigurationError, JobNotFound, QueueNotFound
from conveyor.store import inspection
from conveyor.store.client.client import Client
from support.client_worker import ClientWorker, dead, push

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be looked at")


def test_counts_of_a_queue(admin: Admin, backend: Client) -> None:
    """Each job is counted in its state, once, and a worker as long as it is registered."""
    dead(backend, "mail", "no")
    push(backend, "mail", b"1", b"2", b"3")
    push(backend, "mail", b"4", delay_ms=60_000)
    ClientWorker(backend, "mail").take()

    (mail,) = admin.queues()

    assert (mail.name, mail.ready, mail.scheduled, mail.leased, mail.dead, mail.workers) == ("mail", 2, 1, 1, 1, 1)
    assert mail.oldest_age is not None
    assert 0 <= mail.oldest_age < 10
    assert admin.queue("mail").dead == 1


def test_unknown_queue_is_named(admin: Admin, backend: Client) -> None:
    """An action on a queue that never was raises, and says which queues there are."""
    push(backend, "mail", b"1")

    for action in (admin.queue, admin.pause, admin.resume, admin.purge, admin.redrive, admin.workers, admin.jobs):
        with pytest.raises(QueueNotFound, match=r"mial.*Known: mail"):
            action("mial")


def test_paused_queue_gives_nothing_until_it_is_resumed(admin: Admin, backend: Client) -> None:
    """A paused queue takes pushes and gives no job; resumed, it gives them."""
    push(backend, "mail", b"1")
    worker = ClientWorker(backend, "mail")

    admin.pause("mail")
    assert admin.queue("mail").paused
    assert worker.take() == []
    admin.resume("mail")
    assert len(worker.take()) == 1


def test_purge_spares_what_is_leased_or_dead(admin: Admin, backend: Client) -> None:
    """Purge removes ready and scheduled jobs and says how many; leased jobs and dead letters stay."""
    dead(backend, "mail", "no")
    push(backend, "mail", *[b"1"] * 1200)
    push(backend, "mail", b"2", b"3", delay_ms=60_000)
    ClientWorker(backend, "mail").take()

    assert admin.purge("mail") == 1201

    left = admin.queue("mail")
    assert (left.ready, left.scheduled, left.leased, left.dead) == (0, 0, 1, 1)
    assert admin.purge("mail", dead=True) == 1
    assert admin.queue("mail").dead == 0


def test_redrive_takes_the_oldest_first(admin: Admin, backend: Client) -> None:
    """Redrive with a limit puts the oldest dead letters back, and with ids just those."""
    died = []
    for body in "abc":
        died += dead(backend, "mail", body)
        time.sleep(0.003)  # deaths are ordered by their millisecond
    first, second, third = died

    assert admin.redrive("mail", limit=1) == 1
    assert admin.job(first).status == "ready"
    assert admin.redrive("mail", ids=[third]) == 1
    assert admin.job(third).status == "ready"
    assert admin.job(second).status == "dead"
    assert admin.redrive("mail") == 1
    assert admin.redrive("mail") == 0


def test_jobs_are_listed_in_pages(admin: Admin, backend: Client) -> None:
    """Pages of any size together list every job once, in order, though hundreds of cancelled ones stand between them."""
    ids = push(backend, "mail", *[b"1"] * 1100)
    admin.cancel(ids[:600])

    pages = [admin.jobs("mail", "ready", offset=offset, limit=200) for offset in range(600, 1100, 200)]

    assert [job.id for page in pages for job in page] == ids[600:]
    assert [job.id for job in admin.jobs("mail", "ready", limit=3)] == ids[600:603]


def test_jobs_of_all_queues_and_states(admin: Admin, backend: Client) -> None:
    """Without a queue and a state, all that live are listed; a task narrows it."""
    (failed,) = dead(backend, "mail", "no", task="shop.send")
    (waiting,) = push(backend, "films", b"1", task="shop.cut")
    (later,) = push(backend, "mail", b"2", task="shop.send", delay_ms=60_000)

    assert {job.id for job in admin.jobs()} == {failed, waiting, later}
    assert {job.id for job in admin.jobs(task="shop.send")} == {failed, later}
    assert [job.id for job in admin.jobs(task="shop.send", offset=1)] == [failed]
    assert [job.id for job in admin.jobs(state="dead")] == [failed]
    with pytest.raises(ConfigurationError, match="no state 'lost'"):
        admin.jobs(state="lost")


def test_a_scheduled_job_says_when(admin: Admin, backend: Client) -> None:
    """A scheduled job shows its due instant, payload, priority and own id."""
    (id_,) = push(backend, "mail", b'{"a": 1}', task="shop.send", delay_ms=60_000, priority=4, id="order-7")

    job = admin.job("order-7")

    assert (id_, job.id, job.status, job.queue, job.task) == ("order-7", "order-7", "scheduled", "mail", "shop.send")
    assert (job.payload, job.priority, job.attempt) == ('{"a": 1}', 4, 0)
    assert job.due is not None
    assert timedelta(seconds=40) < job.due - datetime.now(UTC) < timedelta(seconds=80)


def test_a_leased_job_says_who_holds_it(admin: Admin, backend: Client) -> None:
    """A leased job shows its worker, and the worker how much it holds."""
    (id_,) = push(backend, "mail", b"1")
    worker = ClientWorker(backend, "mail")
    worker.take()

    job = admin.job(id_)
    (info,) = admin.workers("mail")

    assert (job.status, job.worker, job.attempt) == ("leased", worker.identity, 1)
    assert (info.id, info.queue, info.host, info.pid, info.held) == (worker.identity, "mail", "testhost", 4711, 1)
    assert info.lease_ends > datetime.now(UTC)


def test_a_dead_job_says_why(admin: Admin, backend: Client) -> None:
    """A dead letter shows the error of its attempt with its traceback."""
    (id_,) = dead(backend, "mail", "no such user")

    job = admin.job(id_)

    assert (job.status, job.attempt, job.failures) == ("dead", 1, 1)
    assert job.ended is not None
    (error,) = job.errors
    assert (error.type, error.message, error.attempt) == ("ValueError", "no such user", 1)
    assert "Traceback" in error.traceback


def test_a_finished_job_shows_its_result(admin: Admin, backend: Client) -> None:
    """A finished job shows its result while that is kept, and afterwards still that it is done."""
    kept, bare = push(backend, "mail", b"1", b"2", task="shop.send")
    worker = ClientWorker(backend, "mail")
    worker.take(2)
    worker.succeed(kept, b'{"sent":3}')
    worker.succeed(bare, keep_ms=0)

    assert (admin.job(kept).status, admin.job(kept).result) == ("done", '{"sent":3}')
    assert (admin.job(bare).status, admin.job(bare).result, admin.job(bare).ran_ms) == ("done", None, 5)
    assert [job.id for job in admin.jobs("mail", "done")] == [bare, kept]


def test_a_cancelled_job_is_cancelled(admin: Admin, backend: Client) -> None:
    """A job cancelled before its start is known as cancelled, and counts no more."""
    (id_,) = push(backend, "mail", b"1")

    assert [one.outcome for one in admin.cancel([id_])] == ["cancelled"]

    assert admin.job(id_).status == "cancelled"
    assert admin.queue("mail").ready == 0
    assert admin.queue("mail").oldest_age is None


def test_unknown_job_raises(admin: Admin, backend: Client) -> None:
    """An unknown id raises, generated or bare, also when its queue never existed."""
    push(backend, "mail", b"1")

    for id_ in ("nope", "mail:" + "0" * 22, "mial:" + "0" * 22):
        with pytest.raises(JobNotFound, match=f"{id_} is known in namespace 't'"):
            admin.job(id_)


def test_retry_revives_dead_and_scheduled_jobs_only(admin: Admin, backend: Client) -> None:
    """Retry puts a dead job back with its history and a fresh budget, starts a scheduled one, and refuses others."""
    (failed,) = dead(backend, "mail", "no")
    (later,) = push(backend, "mail", b"1", delay_ms=60_000)
    (waiting,) = push(backend, "mail", b"2")

    outcomes = [one.outcome for one in admin.retry([failed, later, waiting, "nope"])]

    assert outcomes == ["retried", "retried", "refused", "not found"]
    revived = admin.job(failed)
    assert (revived.status, revived.attempt, revived.failures, len(revived.errors)) == ("ready", 1, 0, 1)
    assert admin.job(later).status == "ready"


def test_cancel_asks_the_worker_of_a_running_job(admin: Admin, backend: Client) -> None:
    """Cancelling a leased job asks its worker; one that has ended is refused."""
    (id_,) = push(backend, "mail", b"1")
    ClientWorker(backend, "mail").take()
    (failed,) = push(backend, "films", b"1")
    other = ClientWorker(backend, "films")
    other.take()
    other.fail(failed)

    assert [one.outcome for one in admin.cancel([id_, failed, "nope"])] == ["asked", "refused", "not found"]
    assert "dead" in admin.cancel([failed])[0].detail


def test_delete_leaves_no_trace(admin: Admin, backend: Client) -> None:
    """Delete removes ready jobs and dead letters; a leased one stays."""
    (failed,) = dead(backend, "mail", "no")
    (held,) = push(backend, "mail", b"1")
    ClientWorker(backend, "mail").take()
    (waiting,) = push(backend, "mail", b"2")

    assert [one.outcome for one in admin.delete([failed, held, waiting])] == ["deleted", "refused", "deleted"]

    assert [job.id for job in admin.jobs("mail")] == [held]
    with pytest.raises(JobNotFound):
        admin.job(failed)


def test_plain_list_is_counted_and_purged_whole(backend: Client, redis: Redis) -> None:
    """Of a plain list, what other programs pushed and what we moved in are counted and purged together."""
    redis.rpush("{t1}:numbers", *range(5))
    admin = Admin(backend, plain_lists=["{t1}:numbers"])

    assert [(info.name, info.ready) for info in admin.queues()] == [("{t1}:numbers", 5)]
    assert "{t1}:numbers" in admin.doctor().problems[0].text
    assert admin.purge("{t1}:numbers") == 5
    assert admin.queue("{t1}:numbers").ready == 0
    assert redis.llen("{t1}:numbers") == 0


@pytest.mark.row("C103")
def test_jobs_in_no_place_are_told_and_put_back(admin: Admin, backend: Client, redis: Redis) -> None:
    """Counts and doctor tell of jobs with a record and no place; `repair` puts back exactly those, beside a worker."""
    push(backend, "mail", *(b"%d" % n for n in range(1200)))
    worker = ClientWorker(backend, "mail")
    worker.take()
    lost = redis.lpop(backend.keys("mail").ready[0], 700)

    assert admin.queue("mail").unplaced == len(lost)
    found = [finding for finding in admin.doctor().findings if "neither ready" in finding.text]
    assert [(one.level, one.remedy) for one in found] == [("problem", "conveyor queue repair mail")]
    assert admin.repair("mail") == len(lost)
    assert admin.repair("mail") == 0

    assert admin.queue("mail").unplaced == 0
    assert backend.run(inspection.audit(backend.keys("mail"))) == []
    assert set(redis.lrange(backend.keys("mail").ready[0], 0, len(lost) - 1)) == set(lost)


async def test_jobs_are_watched_in_a_loop(admin: Admin, backend: Client) -> None:
    """The awaitable twins of watch and follow_logs give what those give, and their errors."""
    await asyncio.to_thread(dead, backend, "mail", "no")
    (failed,) = await admin.ajobs("mail", "dead")
    updates = [one async for one in admin.awatch(failed.id)]
    assert [one.state for one in updates][-1] == "dead"
    assert updates == await asyncio.to_thread(lambda: list(admin.watch(failed.id)))
    assert [line async for line in admin.afollow_logs(failed.id)] == []
    for twin in (admin.awatch, admin.afollow_logs):
        with pytest.raises(JobNotFound):
            assert [one async for one in twin("unheard-of")]


async def test_awaitable_twins_do_the_same(admin: Admin, backend: Client) -> None:
    """Every method has an awaitable twin with its answer and its errors, and the loop goes on meanwhile."""
    public = [name for name in vars(Admin) if not name.startswith("_") and not isinstance(vars(Admin)[name], property)]
    asks_nothing = {"of_app", "acting_as", "knowing"}
    assert [
        one for one in public if f"a{one}" not in public and one[1:] not in public and one not in asks_nothing
    ] == []

    def prepare() -> None:
        push(backend, "mail", *[b"%d" % n for n in range(250)])
        push(backend, "mail", b"late", delay_ms=60_000)
        dead(backend, "mail", "no")

    await asyncio.to_thread(prepare)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    assert await admin.anames() == ["mail"]
    assert [one.ready for one in await admin.aqueues()] == [250]
    assert (await admin.aqueue("mail")).scheduled == 1
    with pytest.raises(QueueNotFound):
        await admin.aqueue("mial")
    ids = [job.id async for job in admin.aeach_job("mail", "ready")]
    assert len(set(ids)) == 250
    assert [job.id async for job in admin.aeach_job("mail", "ready", offset=100, limit=120)] == ids[100:220]
    assert [job.id for job in await admin.ajobs("mail", "ready", limit=2)] == ids[:2]
    assert await admin.acount_jobs("mail", "ready") == 250
    assert (await admin.ajob(ids[0])).status == "ready"
    assert [one.outcome for one in await admin.acancel(ids[:2])] == ["cancelled"] * 2
    assert [one.outcome for one in await admin.adelete(ids[2])] == ["deleted"]
    assert [one.outcome for one in await admin.aretry([job.id for job in await admin.ajobs("mail", "scheduled")])] == [
        "retried"
    ]
    assert await admin.aredrive("mail") == 1
    await admin.apause("mail")
    assert (await admin.aqueue("mail")).paused
    await admin.aresume("mail")
    assert await admin.apartitions("mail") == []
    assert await admin.arepair("mail") == 0
    assert await admin.aworkers() == []
    with pytest.raises(ConfigurationError, match="mail"):
        await admin.arefuse_full("mail")
    assert await admin.apurge("mail") == 249
    assert await admin.arepartition("mail", 1) == 1
    assert (await admin.adoctor()).durability
    ticking.cancel()
    assert ticks > 100


def test_a_queue_whose_workers_have_died_is_stranded(admin: Admin, backend: Client) -> None:
    """Workers whose leases have ended serve nobody: what waits for them and what they hold is told, until another one comes."""
    push(backend, "mail", b"1", b"2", b"3")
    worker = ClientWorker(backend, "mail")
    worker.take()
    assert (admin.queue("mail").workers, admin.queue("mail").silent, admin.queue("mail").stranded) == (1, 0, False)
    backend.execute("ZADD", worker.keys.workers, "1000", worker.identity, key=worker.keys.workers)  # as time passes

    for info in (admin.queue("mail"), admin.queues()[0]):
        assert (info.workers, info.silent, info.leased, info.stranded) == (0, 1, 1, True)
    told = "Queue 'mail' has 3 jobs and no worker takes it. Its worker has died or hangs. No worker is running."
    assert [flag.text for flag in admin.flags() if flag.kind == "no-worker"] == [told]
    assert told in [finding.text for finding in admin.doctor().problems]
    assert 'conveyor_workers{kind="unknown",state="silent"} 1' in admin.metrics_text()
    assert 'conveyor_queue_workers{queue="mail"} 0' in admin.metrics_text()

    ClientWorker(backend, "mail").take()
    assert not admin.queue("mail").stranded


def test_many_queues_without_a_worker_are_one_flag() -> None:
    """The flag of many queues that no worker takes says since when the oldest of their jobs waits, and how many have lost their workers."""
    idle = QueueInfo("a", 3, 0, 0, 0, 0, 0, 90.0, False, None)
    queues = [
        idle,
        replace(idle, name="b", ready=0, waiting=2, oldest_age=None, silent=2),
        replace(idle, name="c", oldest_age=3.0),
    ]
    [flag] = queue_flags(queues)
    assert flag.text == (
        "3 queues have 8 jobs and no worker is running, since 1 m 30 s: a, b, c. The workers of 1 of them have died or hang"
    )
    [flag] = queue_flags([replace(one, silent=0, oldest_age=None) for one in queues])
    assert flag.text == "3 queues have 8 jobs and no worker is running: a, b, c"
