"""Enqueuing inside a database transaction: the jobs are there exactly when the data is."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from typing import Any

import pytest

from conveyor import Duplicate, Middleware, Outgoing, PayloadError
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.payload.records import read_envelope
from conveyor.sql import Outbox
from support.databases import Database, prepare
from support.manual_worker import ManualWorker, arguments
from support.ready_ids import bare, line
from support.running_worker import working
from support.waiting import until
from testbed.server_process import Server

SALE = "INSERT INTO sale VALUES ('o1')"
NOWHERE = "redis://127.0.0.1:1/0"


def add_task(app: Conveyor, **options: Any) -> Any:
    @app.task(name="add", **options)
    def add(a: int, b: int = 0) -> int:
        return a + b

    return add


def say(connection: Any, sql: str = SALE) -> None:
    connection.cursor().execute(sql)


def test_a_commit_makes_data_and_jobs_real(app: Conveyor, outbox: Outbox, database: Database, server: Server) -> None:
    """A block that ends well has stored the program's rows and the jobs; these reach Redis once, with the ids that were given."""
    add, mail = add_task(app), app.queue("mail")
    with closing(database.connect()) as connection:
        with outbox.transaction(connection):
            say(connection)
            job = add.enqueue(1, 2)
            ids = [mail.push({"n": n}) for n in range(3)]
            assert (line(server), len(mail)) == ([], 0)
        assert database.one("SELECT COUNT(*) FROM sale") == 1
    assert job.status() == "waiting"
    assert outbox.stats()[:2] == (4, 0)

    assert outbox.deliver() == 4
    assert outbox.deliver() == 0
    assert (line(server, "default"), line(server)) == (bare([job.id]), bare(ids))
    assert job.status() == "ready"
    assert outbox.stats() == (0, 0, None)
    assert [message.body for message in ack_all(mail, 3)] == [{"n": 0}, {"n": 1}, {"n": 2}]


def ack_all(queue: Any, count: int) -> list[Any]:
    messages = queue.pull(count, wait="5s")
    for message in messages:
        message.ack()
    return messages  # type: ignore[no-any-return]


def test_a_rollback_leaves_nothing(app: Conveyor, outbox: Outbox, database: Database, redis: Any) -> None:
    """After an error in the block, or a rollback behind it, there is neither data nor a job, and Redis heard of nothing."""
    add = add_task(app)
    with closing(database.connect()) as connection:
        with pytest.raises(ZeroDivisionError), outbox.transaction(connection):  # noqa: PT012
            say(connection)
            add.enqueue(1)
            raise ZeroDivisionError
        with outbox.within(connection):
            say(connection)
            app.enqueue_many(add.s(n) for n in range(2500))
        connection.rollback()
    assert database.one("SELECT COUNT(*) FROM sale") == 0
    assert outbox.deliver() == 0
    assert redis.keys("*") == []


def test_a_queue_that_is_declared_in_a_block_is_used_after_it(
    app: Conveyor, outbox: Outbox, database: Database, server: Server
) -> None:
    """A queue that is named for the first time in a block keeps nothing of the block: later pushes go to Redis."""
    for name, options in (("mail", {}), ("spread", {"partitions": 2})):
        with closing(database.connect()) as connection, outbox.transaction(connection):
            app.queue(name, **options).push(1)
        app.queue(name, **options).push(2)
        assert outbox.deliver() == 1
        assert sorted(message.body for message in ack_all(app.queue(name, **options), 2)) == [1, 2]
    app.client.execute("DEL", "conveyor:queues", key="conveyor:queues")  # the fixture drains queues in one piece


def test_a_savepoint_takes_its_jobs_along(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """Jobs enqueued after a savepoint are gone when the program rolls back to it; the rest stays."""
    add = add_task(app)
    with closing(database.connect()) as connection, outbox.transaction(connection):
        say(connection)
        kept = add.enqueue(1)
        say(connection, "SAVEPOINT here")
        add.enqueue(2)
        say(connection, "ROLLBACK TO here")
    assert outbox.deliver() == 1
    manual = ManualWorker(app)
    assert manual.take(5) == bare([kept.id])
    manual.done(*bare([kept.id]))
    manual.leave()


def test_within_leaves_the_commit_to_the_program(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """`within` ends without a commit: nothing is delivered before the program's own."""
    add = add_task(app)
    with closing(database.connect()) as connection:
        with outbox.within(connection):
            add.enqueue(1)
        assert outbox.deliver() == 0 if database.dialect != "sqlite" else True
        connection.commit()
        assert outbox.deliver() == 1


async def test_every_way_to_push(app: Conveyor, outbox: Outbox, database: Database, server: Server) -> None:
    """Blocking and awaitable, one and many, jobs and messages: all become rows, and arrive in the order of their queue."""
    add, mail = add_task(app), app.queue("mail")

    def block(connection: Any) -> list[str]:
        with outbox.transaction(connection):
            ids = [mail.push(0), *mail.push_many(range(250)), mail.push(1, headers={"a": "b"})]
            jobs = [add.enqueue(0), *app.enqueue_many([add.s(n) for n in range(1200)]), add.s(1).enqueue()]
            return ids + [job.id for job in jobs]

    def adapt_blocking() -> list[str]:
        with closing(database.connect()) as connection:
            return block(connection)

    ids = await asyncio.to_thread(adapt_blocking)
    with closing(database.connect()) as connection:
        async with outbox.transaction(connection):
            ids += [await mail.apush(0), *await mail.apush_many(range(250))]
            jobs = [await add.aenqueue(0), *await app.aenqueue_many([add.s(n) for n in range(10)])]
            jobs += await asyncio.gather(*(add.aenqueue(n) for n in range(10)))
            ids += [job.id for job in jobs]
    assert line(server) == []
    assert await outbox.adeliver() == len(ids)
    assert line(server) == bare([id_ for id_ in ids if id_.startswith("mail:")])
    assert line(server, "default") == bare([id_ for id_ in ids if id_.startswith("default:")])
    await app.aclose()


def test_options_arrive(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """Priority, delay, headers, an id and a unique key of one's own hold for what comes from an outbox as for any push."""
    add, mail = add_task(app), app.queue("mail")
    with closing(database.connect()) as connection, outbox.transaction(connection):
        add.options(priority=7).enqueue(1)
        later = add.options(delay="1h").enqueue(2)
        own = add.options(id="order-7", headers={"trace": "t1"}).enqueue(3)
        again = add.options(id="order-7").enqueue(4)
        mail.push("first")
        mail.push("before", front=True, unique="k")
        mail.push("not again", unique="k")
    outbox.deliver()

    assert own.id == again.id == "order-7"
    assert later.status() == "scheduled"
    manual = ManualWorker(app)
    taken = manual.take(5)
    assert [arguments(app, manual.envelopes[id_])[0] for id_ in taken] == [[1, 0], [3, 0]]
    assert manual.envelopes["order-7"].extra.headers == {"trace": "t1"}
    for id_ in taken:
        manual.done(id_)
    manual.leave()
    assert [message.body for message in ack_all(mail, 5)] == ["before", "first"]
    later.cancel()


def test_delays_count_from_the_push(app: Conveyor, outbox: Outbox, database: Database, redis: Any) -> None:
    """A job that waited for the relay longer than its delay is ready, one past its expiry has no time left, others are due later."""
    mail = app.queue("mail")
    with closing(database.connect()) as connection, outbox.transaction(connection):
        late = mail.push("late", delay="1m")
        gone = mail.push("gone", expires="1m")
        mail.push("later", delay="1h")
    database.do("UPDATE conveyor_outbox SET created_ms = created_ms - 120000")
    outbox.deliver()
    seconds, micros = (
        redis.time() if not hasattr(redis, "get_primaries") else redis.time(target_nodes=redis.get_primaries()[0])
    )
    now = seconds * 1000 + micros // 1000
    read = {id_: read_envelope(redis.hget("conveyor:{mail}:jobs", *bare([id_]))) for id_ in (late, gone)}
    assert read[late].due_ms is None
    assert read[gone].expires_ms is not None
    assert now - 60_000 < read[gone].expires_ms <= now + 1
    assert mail.stats().scheduled == 1


def test_nothing_goes_to_redis_in_a_block(database: Database) -> None:
    """A block needs no Redis at all: neither jobs nor messages, nor queues with limits or partitions ask it anything."""
    with Conveyor(NOWHERE) as away:
        outbox = Outbox(away, database.connect)
        prepare(outbox, database)
        add = add_task(away)
        queues = [away.queue("mail", max_length=5), away.queue("orders", partitions=4), away.queue("safe", fsync=True)]
        away.queue("adds", partitions=4)
        with closing(database.connect()) as connection, outbox.transaction(connection):
            add.enqueue(1)
            away.enqueue_many([add.s(2), add.options(queue="adds").s(3)])
            for queue in queues:
                queue.push(1)
                queue.push_many(range(10))
    assert outbox.stats().waiting == 36


async def test_a_waiting_caller_gets_the_result(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """A caller that waits for a job before its delivery waits on and gets the result; the relay needs no call."""
    add = add_task(app)
    async with working(app, threads=2):
        with closing(database.connect()) as connection:
            async with outbox.transaction(connection):
                job = await add.aenqueue(20, 22)
        waiting = asyncio.create_task(job.aresult(timeout="20s"))
        assert await job.astatus() == "waiting"
        async with outbox.relay():
            assert await waiting == 42
        assert await job.astatus() == "done"
    await app.aclose()


def test_a_relay_is_called_by_the_end_of_a_block(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """In a process with a relay the end of a block calls it: an interval of an hour delays no row."""
    outbox = Outbox(app, database.connect, interval="1h")
    mail = app.queue("mail")
    with outbox.relay(), closing(database.connect()) as connection:
        for n in range(1, 6):
            with outbox.transaction(connection):
                mail.push(n)
            until(lambda n=n: len(mail) == n)
        with outbox.within(connection):
            mail.push(6)
        connection.commit()
        until(lambda: len(mail) == 6)
    ack_all(mail, 10)


def test_blocks_are_of_one_app_and_one_context(app: Conveyor, url: str, outbox: Outbox, database: Database) -> None:
    """Pushes of another app, of another thread, and after the end of the block go to Redis; those of an inner block to its connection."""
    mail = app.queue("mail")
    with Conveyor(url, namespace="other") as other, closing(database.connect()) as one:
        elsewhere = other.queue("mail")
        with outbox.transaction(one) as block:
            elsewhere.push(1)
            thread = threading.Thread(target=mail.push, args=("thread",), daemon=True)
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            mail.push("row")
        mail.push("after")
        assert (len(mail), len(elsewhere)) == (2, 1)
        with pytest.raises(ConfigurationError, match="used once"), block:
            pass
        elsewhere.purge()
    assert outbox.deliver() == 1
    assert [message.body for message in ack_all(mail, 5)] == ["thread", "after", "row"]


async def test_a_task_that_outlives_its_block_pushes_to_redis(
    app: Conveyor, outbox: Outbox, database: Database
) -> None:
    """A task begun in a block pushes into it while it is open, and to Redis afterwards."""
    mail, ended = app.queue("mail"), asyncio.Event()

    async def pushes() -> None:
        await mail.apush("in")
        pushed.set()
        await ended.wait()
        await mail.apush("out")

    pushed = asyncio.Event()
    with closing(database.connect()) as connection:
        async with outbox.transaction(connection):
            task = asyncio.create_task(pushes())
            await asyncio.wait_for(pushed.wait(), 60)
        assert await mail.alen() == 0
        ended.set()
        await asyncio.wait_for(task, 60)
    assert (await mail.alen(), await outbox.adeliver()) == (1, 1)
    for message in await mail.apull(5):
        await message.aack()
    await app.aclose()


def test_inner_blocks(app: Conveyor, outbox: Outbox, database: Database, tmp_path: Any) -> None:
    """Of two blocks the inner one takes the pushes, and its end gives them back to the outer one."""
    import sqlite3

    mail = app.queue("mail")
    second = Outbox(app, lambda: sqlite3.connect(tmp_path / "second.db"), table="other_outbox")
    with closing(database.connect()) as one, closing(sqlite3.connect(tmp_path / "second.db")) as two:
        second.create(two)
        with pytest.raises(ZeroDivisionError), outbox.transaction(one):  # noqa: PT012
            mail.push("gone")
            with second.transaction(two):
                mail.push("kept")
            mail.push("gone too")
            raise ZeroDivisionError
    assert (outbox.deliver(), second.deliver()) == (0, 1)
    assert [message.body for message in ack_all(mail, 5)] == ["kept"]


def test_arguments_and_middleware_are_the_same(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """In a block arguments are checked as ever, and a middleware sees a job that has no id yet."""
    add = add_task(app)
    seen = []

    @app.middleware
    class Traced(Middleware):
        def push(self, outgoing: Outgoing) -> None:
            seen.append(outgoing.id)
            outgoing.headers["trace"] = "t1"

    with closing(database.connect()) as connection, outbox.transaction(connection):
        add.enqueue(1)
        with pytest.raises(PayloadError):
            add.enqueue("one")
    assert seen == [None, None]
    assert outbox.deliver() == 1
    manual = ManualWorker(app)
    [id_] = manual.take(1)
    assert manual.envelopes[id_].extra.headers == {"trace": "t1"}
    manual.done(id_)
    manual.leave()


def test_sealed_payloads(url: str, database: Database) -> None:
    """An app with keys seals before the row is written, and its consumers open what the relay delivered."""
    with Conveyor(url, keys={"k1": "sixteen bytes and more"}, encrypt=True) as app:
        outbox, mail = Outbox(app, database.connect), app.queue("mail")
        prepare(outbox, database)
        with closing(database.connect()) as connection, outbox.transaction(connection):
            mail.push("secret text")
        assert b"secret text" not in bytes(database.one("SELECT entry FROM conveyor_outbox"))
        outbox.deliver()
        assert [message.body for message in ack_all(mail, 2)] == ["secret text"]
        from support.manual_worker import drain

        drain(app)


def test_two_namespaces_share_a_table(app: Conveyor, url: str, outbox: Outbox, database: Database) -> None:
    """A relay delivers the rows of its own app's namespace, and lets the others be."""
    with Conveyor(url, namespace="other") as other:
        theirs = Outbox(other, database.connect)
        with closing(database.connect()) as connection, theirs.transaction(connection):
            other.queue("mail").push(1)
        assert outbox.deliver() == 0
        assert theirs.deliver() == 1
        other.queue("mail").purge()


def test_a_duplicate_is_not_an_error_of_the_block(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """A unique key that is taken is found out at the delivery: the push returns, and the job that was there stays alone."""
    mail = app.queue("mail")
    mail.push("there", unique="k")
    with closing(database.connect()) as connection, outbox.transaction(connection):
        try:
            mail.push("second", unique="k")
        except Duplicate:
            pytest.fail("nobody can know yet")
    assert outbox.deliver() == 1
    assert [message.body for message in ack_all(mail, 5)] == ["there"]
