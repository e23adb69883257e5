"""Tasks on a queue in several partitions: running, views for people, and options of a push."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor, Throttle, Unique
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, DurabilityNotReached, QueueNotFound
from conveyor.jobs.context import current
from conveyor.jobs.core import core_of
from conveyor.messaging.partitions import partition_of
from conveyor.store import inspection
from conveyor.worker.leasing import capacity, queue_consumer
from conveyor.worker.leasing.capacity import STINT, PartitionGroup
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from support.partition_helpers import ack_all, audits, lengths, place_of
from support.running_worker import drain, working
from support.shell import Shell
from support.waiting import auntil

SECRETS = {"2026-11": "a secret of thirty-two bytes and more"}


@pytest.fixture
async def app(url: str) -> Any:
    """An app whose queue `orders` has 8 partitions and must be in order when the test is over."""
    app = Conveyor(url)
    orders: Any = app.queue("orders", partitions=8)
    yield app
    assert await asyncio.to_thread(audits, orders) == []
    await app.aclose()


async def test_jobs_are_spread_and_run_once(app: Conveyor) -> None:
    """Every way of enqueuing spreads over the partitions; a worker runs all of them, each once, with its result."""
    ran: Counter[int] = Counter()

    @app.task(queue="orders")
    async def double(n: int) -> int:
        ran[n] += 1
        return 2 * n

    orders: Any = app.queue("orders", partitions=8)
    jobs = [await double.aenqueue(n) for n in range(8)]
    jobs += await app.aenqueue_many(double.s(n) for n in range(8, 2008))
    jobs += [await asyncio.to_thread(double.enqueue, n) for n in range(2008, 2016)]
    jobs += await asyncio.to_thread(app.enqueue_many, [double.s(n) for n in range(2016, 2024)])
    # Single jobs go round; a thousand of a bulk push, or all of a smaller one, fill one partition.
    assert sorted(await asyncio.to_thread(lengths, orders)) == [2, 2, 2, 2, 2, 10, 1002, 1002]
    assert {place_of(job.id) for job in jobs} == set(range(8))

    await drain(app)

    assert ran == Counter(range(2024))
    assert [await job.aresult(timeout=60) for job in jobs[::100]] == [2 * n for n in range(0, 2024, 100)]
    assert await app.job(jobs[7].id).aresult(timeout=60) == 14


async def test_the_key_of_a_unique_task_places_its_jobs(app: Conveyor) -> None:
    """The key of a call picks its partition, so that it is unique in the whole queue; two keys on such a queue are refused."""
    ran: list[tuple[int, str]] = []

    @app.task(queue="orders", unique=Unique(by=("page",), conflict="replace"))
    async def index(page: int, text: str = "") -> None:
        ran.append((page, text))

    @app.task(queue="orders", unique=Unique(by=("page",)), throttle=Throttle("1m", by="text"))
    async def both(page: int, text: str = "") -> None: ...

    jobs = [await index.aenqueue(page, text) for page in range(6) for text in "ab"]
    assert [job.conflict for job in jobs] == [None, "replaced"] * 6
    assert len({job.queue for job in jobs}) > 1
    with pytest.raises(ConfigurationError, match="several keys"):
        await both.aenqueue(1)

    await drain(app)

    assert sorted(ran) == [(page, "b") for page in range(6)]


async def test_keys_of_jobs_place_them(app: Conveyor) -> None:
    """A job's unique key or own id picks its partition, so a second one meets it; options may send it to the queue."""

    @app.task
    async def note(n: int) -> int:
        return n

    there = note.options(queue="orders", unique="u1")
    first, again = await there.aenqueue(1), await there.aenqueue(2)
    assert (again.id, again.duplicate, place_of(first.id)) == (first.id, True, partition_of("u1", 8))
    mine = await note.options(queue="orders", id="order-7").aenqueue(3)
    assert (mine.id, mine.queue) == ("order-7", f"orders/{partition_of('order-7', 8)}")
    assert (await note.options(queue="orders", id="order-7").aenqueue(4)).duplicate
    assert await app.job("order-7").astatus() == "ready"
    assert await mine.acancel()
    later = await note.options(queue="orders", delay="1h", priority=3).aenqueue(5)
    assert await later.astatus() == "scheduled"
    assert await later.acancel()
    async with working(app, queues={"orders": 2.0}) as worker:
        assert {consumer.group.weight for consumer in worker.consumers} == {2.0}
        assert await first.aresult(timeout=60) == 1


@pytest.mark.usefixtures("only_when_woken")
async def test_an_idle_worker_starts_a_job_of_any_partition_at_once(app: Conveyor) -> None:
    """A job runs within a moment whichever partition it falls into, and beside a partition that is full of work."""

    @app.task(queue="orders")
    async def note(n: int) -> int:
        return n

    orders: Any = app.queue("orders", partitions=8)
    async with working(app, concurrency=2):
        for n in range(16):
            assert await (await note.aenqueue(n)).aresult(timeout=60) == n

        @app.task(queue="orders")
        async def slow() -> None:
            await asyncio.sleep(0.005)

    await asyncio.gather(*[slow.options(unique=None).aenqueue() for _ in range(200)])
    async with working(app, concurrency=2):
        job = await note.aenqueue(1)
        assert await job.aresult(timeout=60) == 1
    await drain(app)
    assert (await orders.astats()).ready == 0


@pytest.mark.row("D261")
async def test_a_partition_that_may_hold_no_more_lets_others_lease(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition of which a worker holds all that it may, while these jobs run, keeps its slots from no other partition."""
    for module in (capacity, queue_consumer):
        monkeypatch.setattr(module, "MOST_HELD", 10)
    running, ends = 0, asyncio.Event()

    @app.task(queue="orders")
    async def hold(n: int) -> None:
        nonlocal running
        running += 1
        await ends.wait()

    await asyncio.gather(*[hold.aenqueue(n) for n in range(160)])
    async with working(app, concurrency=100):
        await auntil(lambda: running == 80, what="ten jobs of each of eight partitions run")
        ends.set()
        await auntil(lambda: running == 160)


@pytest.mark.usefixtures("only_when_woken")
async def test_no_queue_waits_for_a_quiet_one_s_turn(app: Conveyor) -> None:
    """A worker with fewer slots than queues starts a job of each at once: a queue without work passes its turn on."""
    for name in "abcdefgh":
        app.task(queue=name, name=name)(_return)
    async with working(app, concurrency=2):
        for name in "cdefghabcdefghab":
            assert await (await app.tasks[name].aenqueue()).aresult(timeout=60) == 1


async def _return() -> int:
    return 1


def test_people_see_one_queue(url: str) -> None:
    """Counts, jobs, workers and actions go by the queue's name; a partition can be looked at, and no more."""
    with Conveyor(url) as app:
        orders: Any = app.queue("orders", partitions=4)
        app.queue("mail").push(1)
        ids = orders.push_many(range(40))
        for message in orders.pull(8):
            message.dead("no")
        admin = Admin(app.client)
        assert [(one.name, one.ready, one.dead, one.partitions) for one in admin.queues()] == [
            ("mail", 1, 0, 1), ("orders", 32, 8, 4),
        ]  # fmt: skip
        assert [one.name for one in admin.partitions("orders")] == [f"orders/{n}" for n in range(4)]
        assert sum(one.ready for one in admin.partitions("orders")) == 32
        assert (admin.queue("orders/3").ready + admin.queue("orders/3").dead, admin.partitions("mail")) == (10, [])
        found = [job.id for job in admin.jobs("orders", "ready", limit=100)]
        found += [job.id for job in admin.jobs("orders", "dead")]
        assert sorted(found) == sorted(ids)
        pages = [job.id for first in range(0, 32, 5) for job in admin.jobs("orders", "ready", offset=first, limit=5)]
        assert pages == found[:32]
        assert {job.queue for job in admin.jobs("orders/2")} == {"orders/2"}
        assert admin.job(ids[3]).queue == f"orders/{place_of(ids[3])}"
        for action in (admin.pause, admin.resume, admin.purge, admin.redrive, admin.refuse_full):
            with pytest.raises(ConfigurationError, match="Name the queue: orders"):
                action("orders/2")
        for name in ("orders/4", "mail/0", "nobody"):
            with pytest.raises(QueueNotFound, match="Known: mail, orders"):
                admin.queue(name)
        admin.pause("orders")
        assert (admin.queue("orders").paused, orders.pull(5)) == (True, [])
        admin.resume("orders")
        letters = [letter.id for letter in orders.dead_letters()]
        assert admin.redrive("orders", ids=letters[:3]) == 3
        assert (admin.redrive("orders", limit=2), admin.purge("orders", dead=True), admin.purge("orders")) == (2, 3, 37)
        assert [acted.outcome for acted in admin.cancel([orders.push(1), ids[0]])] == ["cancelled", "not found"]
        report = admin.doctor()
        assert [finding.text for finding in report.findings if "orders/" in finding.text] == []
        assert ack_all(orders.pull(9)) == []
        app.queue("mail").purge()


def test_the_command_line(url: str, tmp_path: Path) -> None:
    """push places; list, show, job list and status speak of one queue; partition changes the number, or says why not."""
    shell = Shell(tmp_path, url)
    with Conveyor(url) as app:
        orders: Any = app.queue("orders", partitions=4)
        orders.partitions.agree()
        pushed = shell.run("push", "orders", "-", stdin="".join(f"{n}\n" for n in range(8))).stdout.split()
        assert lengths(orders) == [2] * 4
        assert len({place_of(id_) for id_ in pushed}) == 4
        listed = shell.run("queue", "list").stdout.split("\t")
        assert (listed[0], listed[1], listed[-1].strip()) == ("orders", "8", "4")
        shown = json.loads(shell.run("queue", "show", "orders", "--json").stdout)
        assert (shown["queue"]["ready"], len(shown["partitions"])) == (8, 4)
        refused = shell.run("queue", "partition", "orders", "2", "--yes")
        assert (refused.returncode, "E35" in refused.stderr, "orders/3 (2)" in refused.stderr) == (6, True, True)
        assert shell.run("queue", "purge", "orders", "--yes").stdout == "8\n"
        dry = shell.run("queue", "partition", "orders", "2", "--dry-run")
        assert (dry.returncode, "has 4 partitions" in dry.stderr.replace("\n", " ")) == (0, True)
        orders.push(1)
        assert orders.purge() == 1
        done = json.loads(shell.run("queue", "partition", "orders", "2", "--yes", "--json").stdout)
        assert (done["before"], done["partitions"]) == (4, 2)
        with pytest.raises(ConfigurationError, match="has 2 partitions, but this program says 4"):
            orders.push(1)
        shell.write(
            "wrong.py", "from conveyor import Conveyor\napp = Conveyor()\n\n@app.task(queue='orders')\ndef t(): ...\n"
        )
        worker = shell.run("worker", "wrong", "--burst", "--processes", "1")
        assert worker.returncode != 0
        assert "app.queue('orders', partitions=2)" in worker.stderr


def test_sealed_bodies_belong_to_the_queue(url: str) -> None:
    """Sealed messages and jobs of partitions open: a seal is bound to the queue, whichever partition a body lies in."""
    with Conveyor(url, keys=SECRETS, encrypt=True) as app:
        orders: Any = app.queue("orders", partitions=4)
        orders.push_many(["secret"] * 20)
        orders.push("mine", group="c7")
        assert sorted(set(ack_all(orders.pull(21)))) == ["mine", "secret"]

        @app.task(queue="orders")
        async def note(text: str) -> str:
            return text

        jobs = app.enqueue_many(note.s(str(n)) for n in range(12))
        asyncio.run(_drained(app))
        assert [job.result(timeout=60) for job in jobs] == [str(n) for n in range(12)]


async def _drained(app: Conveyor) -> None:
    try:
        await drain(app)
    finally:
        await app.aclose()


@pytest.mark.standalone_only(
    "there is no replica to confirm anything", on=("valkey", "redis6", "redis7", "tls", "acl", "cluster")
)
def test_a_push_that_is_not_confirmed_says_what_was_stored(url: str) -> None:
    """Without the replicas that were asked for, a push to partitions raises, and names the jobs that were stored."""
    with Conveyor(url) as app:
        orders: Any = app.queue("orders", partitions=4)
        orders.push(0)
        for push in (
            lambda **options: orders.push(1, **options),
            lambda **options: orders.push_many(range(8), **options),
        ):
            before = len(orders)
            with pytest.raises(DurabilityNotReached, match="0 of 1 replica") as late:
                push(wait_replicas=1, wait_timeout="50ms")
            assert 0 < len(orders) - before == len(late.value.job_ids)
            assert all(app.job(id_).status() == "ready" for id_ in late.value.job_ids)
        orders.purge()


def test_pushes_are_kept_while_redis_is_away(start_server: Any, tmp_path: Path) -> None:
    """With a buffer, pushes to partitions of a server that is not there yet are delivered when it is, and agree then."""
    from conveyor import Buffer

    server = start_server()
    server.kill()
    with Conveyor(server.url, buffer=Buffer(tmp_path / "kept")) as app:
        app.client.retry_for = 0.2
        orders: Any = app.queue("orders", partitions=4)
        ids = [orders.push(n) for n in range(12)]
        assert len(set(ids)) == 12
        server.start()
        assert app.client.buffer is not None
        app.client.buffer.flush()
        assert lengths(orders) == [3] * 4
        assert sorted(ack_all(orders.pull(12))) == list(range(12))


def test_counts_are_what_a_person_expects() -> None:
    """Sums; the age of the oldest of all; paused when any partition is; a worker once, though it serves all."""
    parts = [
        inspection.QueueCounts(1, 2, 0, 3, 4, 5.0, False, 2, 10), inspection.QueueCounts(1, 0, 0, 0, 1, 9.0, True, 3, 10),
        inspection.QueueCounts(0, 0, 0, 0, 0, None, False, 2, 10),
    ]  # fmt: skip
    assert inspection.total(parts) == inspection.QueueCounts(2, 2, 0, 3, 5, 9.0, True, 3, 30)


async def test_what_a_job_spawns_finds_its_partition(app: Conveyor) -> None:
    """Jobs that a job spawns for a queue with partitions that nobody used before are placed, delivered and run once."""
    ran: Counter[int] = Counter()

    @app.task(queue="orders")
    async def follower(n: int) -> None:
        ran[n] += 1

    @app.task
    async def leader() -> None:
        for n in range(40):
            current().spawn(follower.s(n))

    await leader.aenqueue()
    await drain(app)
    assert ran == Counter(range(40))


async def _turns_of_a_drain(app: Conveyor, name: str, partitions: int, patch: pytest.MonkeyPatch) -> int:
    """Return how many turns a worker makes to run 20,000 jobs of a queue."""
    turns, send = itertools.count(), QueueConsumer._send_turn
    patch.setattr(QueueConsumer, "_send_turn", lambda consumer, want: (next(turns), send(consumer, want))[1])
    app.queue(name, partitions=partitions)
    task = app.task(queue=name, name=name)(_return)
    await asyncio.to_thread(app.enqueue_many, [task.s()] * 20_000)
    await drain(app, queues={name: 1.0}, concurrency=100)
    patch.setattr(QueueConsumer, "_send_turn", send)
    return next(turns)


@pytest.mark.row("D26")
async def test_a_worker_leases_full_batches_of_partitions(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker drains a queue in four partitions in about as many turns as a queue in one piece."""
    one = await _turns_of_a_drain(app, "whole", 1, monkeypatch)
    four = await _turns_of_a_drain(app, "parted", 4, monkeypatch)
    print(f"{one} turns, in four partitions {four}")
    assert four <= 1.6 * one


@pytest.mark.row("D26")
@pytest.mark.standalone_only("counts the calls that one server gets")
async def test_bulk_jobs_fill_one_partition_a_call(app: Conveyor, redis: Any) -> None:
    """Each thousand jobs of a bulk push is one call, to the next partition each time."""

    @app.task(queue="orders")
    async def note(n: int) -> None: ...

    orders: Any = app.queue("orders", partitions=8)
    await app.aenqueue_many([note.s(0)])  # agrees on the number of partitions
    calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    await app.aenqueue_many(note.s(n) for n in range(4000))
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] - calls <= 6
    assert sorted(await asyncio.to_thread(lengths, orders))[-4:] == [1000] * 4
    await orders.apurge()


async def test_a_bulk_push_agrees_anew_with_an_emptied_redis(app: Conveyor, redis: Any) -> None:
    """A thousand jobs that an emptied Redis refuses are stored once the number of partitions is agreed on anew."""

    @app.task(queue="orders")
    async def note(n: int) -> None: ...

    orders: Any = app.queue("orders", partitions=8)
    await asyncio.to_thread(app.enqueue_many, [note.s(0)])  # agrees on the number of partitions
    redis.flushdb()
    jobs = await asyncio.to_thread(lambda: app.enqueue_many(note.s(n) for n in range(3000)))
    assert sorted(await asyncio.to_thread(lengths, orders)) == [0, 0, 0, 0, 0, 1000, 1000, 1000]
    assert {await job.astatus() for job in jobs[::500]} == {"ready"}
    await orders.apurge()


async def test_a_bulk_push_sends_a_thousand_jobs_while_the_next_are_prepared(app: Conveyor) -> None:
    """The reply to a thousand jobs of one partition is read when the next thousand are prepared, as in a queue in one piece."""
    sent: list[str] = []
    core = core_of(app)
    start = core.client.start_push_plain

    def noted(keys: Any, pairs: Any) -> Any:
        complete = start(keys, pairs)
        sent.append("sent")
        return lambda: (sent.append("answered"), complete())[1]

    @app.task(queue="orders")
    async def note(n: int) -> None: ...

    def calls() -> Any:
        for n in range(2000):
            if n == 1999:
                sent.append("prepared")
            yield note.s(n)

    orders: Any = app.queue("orders", partitions=8)
    await asyncio.to_thread(app.enqueue_many, [note.s(0)])  # agrees on the number of partitions
    core.client.start_push_plain = noted
    await asyncio.to_thread(lambda: app.enqueue_many(calls()))
    assert sent == ["sent", "prepared", "answered", "sent", "answered"]
    await orders.apurge()


class _Partition:
    """A partition that always has work."""

    def __init__(self) -> None:
        self.scheduled = 0

    def schedule(self) -> None:
        self.scheduled += 1


@pytest.mark.row("D26")
def test_no_partition_starves() -> None:
    """Partitions that always have work lease one after the other, each for at most a stint; a quiet one is passed over."""
    group, parts = PartitionGroup(1.0), [_Partition() for _ in range(4)]
    everybody: list[Any] = list(parts)
    for one in everybody:
        group.note_work(one, possible=True)
    led: list[Any] = []
    for _ in range(4 * STINT):
        led.append(group.leader)
        group.note_turn(group.leader)

    runs = [(one, len(list(turns))) for one, turns in groupby(led)]
    assert [one for one, _ in runs[:4]] == parts
    assert all(turns <= STINT for _, turns in runs)
    assert all(one.scheduled for one in parts)  # it is told that its turn has come
    quiet = group.leader
    group.note_work(quiet, possible=False)
    assert group.leader is not quiet


@pytest.mark.row("D26")
async def test_a_partition_that_does_not_answer_holds_up_no_other(app: Conveyor) -> None:
    """While the node of one partition says nothing, a worker leases from the others; afterwards from that one too."""
    ran: Counter[int] = Counter()

    @app.task(queue="orders")
    async def note(n: int) -> None:
        ran[n] += 1

    jobs = [await note.aenqueue(n) for n in range(16)]
    silent = jobs[0].queue
    async with working(app, queues={"orders": 1.0}, concurrency=1) as worker:
        [consumer] = [one for one in worker.consumers if one.queue == silent]
        await auntil(lambda: len(ran) == 16 and not any(one.busy or one.has_more for one in worker.consumers))
        connection, replies = consumer.connection, list[Any]()
        send = connection.send

        def send_to_silence(command: Any, answer: Any, **options: Any) -> None:
            hidden = consumer.keys.jobs in command
            send(command, (lambda reply: replies.append((answer, reply))) if hidden else answer, **options)

        connection.send = send_to_silence
        ran.clear()
        for n in range(16):
            await note.aenqueue(n)
        await auntil(lambda: len(ran) == 14)
        connection.send = send
        for answer, reply in replies:
            answer(reply)
        await auntil(lambda: len(ran) == 16)
    assert set(ran.values()) == {1}
