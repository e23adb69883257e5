"""Limits and groups as their users see them, with workers on a real server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from conveyor import Concurrency, Context, Conveyor, Rate, RateLimited, Retry, RetryIn, current
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError
from conveyor.messaging.limit_control import LimitState
from conveyor.sql import Outbox
from conveyor.store import limits as store_limits
from conveyor.store.client.buffer import Buffer
from conveyor.store.client.buffered import place_anew
from conveyor.store.client.spool import SpooledPush
from conveyor.store.partitions import partition_of
from support.databases import Database
from support.running_worker import drain, until_counts, working
from support.waiting import auntil

ONCE = Retry(attempts=5, backoff="10ms", cap="10ms", jitter=False)


@pytest.fixture(autouse=True)
async def closed(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Close the connections of the test's loop."""
    used = request.getfixturevalue("app") if "app" in request.fixturenames else None
    yield
    if used is not None:
        await used.aclose()


async def test_a_rate_holds_for_all_workers_together(app: Conveyor, url: str) -> None:
    """Thirty jobs at ten in 300 ms, in two workers, need two more windows after the first; every job runs once."""
    ran: list[int] = []

    def declare(where: Conveyor) -> Any:
        @where.task(name="call", queue="api", limits=[Rate(10, "300ms")])
        async def call(n: int) -> None:
            ran.append(n)

        return call

    async with Conveyor(url) as other:
        declare(other)
        task = declare(app)
        began = time.monotonic()
        await app.aenqueue_many([task.s(n) for n in range(30)])
        async with working(app, queues={"api": 1}), working(other, queues={"api": 1}):
            await auntil(lambda: len(ran) == 30)
    assert time.monotonic() - began >= 0.6
    assert sorted(ran) == list(range(30))


async def test_concurrency_by_a_key_holds_up_its_key_alone(app: Conveyor) -> None:
    """At most two jobs of a tenant run at a time; another tenant's starts although the first one's wait."""
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    gate = asyncio.Event()

    @app.task(name="work", limits=[Concurrency(2, by="tenant")])
    async def work(tenant: str) -> None:
        running[tenant] += 1
        most[tenant] = max(most[tenant], running[tenant])
        await gate.wait()
        running[tenant] -= 1

    jobs = [await work.aenqueue("flood") for _ in range(20)]
    async with working(app, concurrency=50):
        await auntil(lambda: running["flood"] == 2)
        assert [await job.astatus() for job in jobs[2:4]] == ["waiting", "waiting"]
        jobs.append(await work.aenqueue("other"))
        await auntil(lambda: running["other"] == 1)
        gate.set()
        for job in jobs:
            await job.aresult(timeout="30s")
    assert most == {"flood": 2, "other": 1}
    assert used(await app.limits.alist("default")) == {}


def used(states: list[LimitState]) -> dict[str, int]:
    return {
        f"{state.name}:{state.key}": state.used for state in states if state.used and state.limit.kind == "concurrency"
    }


async def test_the_true_cost_delays_the_next(app: Conveyor) -> None:
    """A rate counts what a job says that it cost: more than its argument said, or less."""

    @app.task(name="ask", queue="llm", limits=[Rate(100, "1h", cost="tokens")])
    async def ask(true: int, tokens: int = 50, context: Context = current()) -> None:
        context.charge(true)

    async with working(app):
        await (await ask.aenqueue(10)).aresult(timeout="30s")
        [state] = await app.limits.alist("ask")
        assert (state.used, state.limit) == (10, Rate(100, "1h", cost="tokens"))
        await (await ask.aenqueue(85)).aresult(timeout="30s")
        [state] = await app.limits.alist("llm")
        assert state.used == 95
        last = await ask.aenqueue(1, tokens=6)
        assert await last.astatus() == "waiting"
        await last.acancel()


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_charge_needs_a_limit_with_a_cost(app: Conveyor, run_in: Any) -> None:
    """context.charge in a task without such a limit raises what says which limit it needs."""

    def charge(context: Context = current()) -> str:
        try:
            context.charge(5)
        except ConfigurationError as error:
            return str(error)
        return ""

    async def acharge(context: Context = current()) -> str:
        return charge(context)

    task = app.task(name="t", run_in=run_in)(acharge if run_in == "loop" else charge)
    async with working(app):
        assert "needs one limit with a cost" in await (await task.aenqueue()).aresult(timeout="30s")


async def test_rate_limited_holds_all_jobs_of_the_limit_and_costs_no_attempt(app: Conveyor) -> None:
    """After a 429 nobody of that limit starts until it has passed; the job itself is the next, with its budget untouched."""
    starts: list[tuple[str, int, float]] = []

    @app.task(name="fetch", limits=[Rate(1000, "1s", by="host")], retry=1)
    async def fetch(host: str, n: int) -> int:
        starts.append((host, n, time.monotonic()))
        if (host, n) == ("a", 0) and current().attempt == 1:
            raise RateLimited("400ms")
        return current().attempt

    first = await fetch.aenqueue("a", 0)
    async with working(app, concurrency=1):
        await auntil(lambda: starts)

        async def is_held() -> bool:
            limits = await app.client.arun(store_limits.list_limits(app.client.keys("default")))
            return any(one.opens_at for one in limits)

        await auntil(is_held)
        others = [await fetch.aenqueue("a", n) for n in (1, 2)]
        free = await fetch.aenqueue("b", 0)
        assert await free.aresult(timeout="30s") == 1
        assert await first.aresult(timeout="30s") == 2
        for job in others:
            assert await job.aresult(timeout="30s") == 1
    mine = [(n, at) for host, n, at in starts if host == "a"]
    assert [n for n, _ in mine] == [0, 0, 1, 2]
    assert mine[1][1] - mine[0][1] >= 0.4
    assert (await first.ainfo()).attempts == 2


async def test_rate_limited_holds_a_task_without_limits(app: Conveyor) -> None:
    """A job of a task without a limit that is told to wait holds its task: no other of it starts until then, others do."""
    starts: list[tuple[int, float]] = []

    @app.task(name="fetch", retry=1)
    async def fetch(n: int) -> int:
        starts.append((n, time.monotonic()))
        if n == 0 and current().attempt == 1:
            raise RateLimited("400ms")
        return current().attempt

    @app.task(name="other")
    async def other() -> None: ...

    first = await fetch.aenqueue(0)
    async with working(app, concurrency=1):
        await auntil(lambda: starts)
        await until_counts(app, lambda now: not now.leased)
        others = [await fetch.aenqueue(n) for n in (1, 2)]
        await (await other.aenqueue()).aresult(timeout="30s")
        assert await first.aresult(timeout="30s") == 2
        for job in others:
            assert await job.aresult(timeout="30s") == 1
    assert sorted(n for n, _ in starts) == [0, 0, 1, 2]
    assert min(at for _, at in starts[1:]) - starts[0][1] >= 0.4


async def test_retry_in_counts_an_attempt_and_holds_nobody(app: Conveyor) -> None:
    """RetryIn is a failure with a pause of its own: it spends an attempt, and others of the limit start meanwhile."""
    ran: list[int] = []

    @app.task(name="t", limits=[Rate(1000, "1s")], retry=2)
    async def task(n: int) -> int:
        ran.append(n)
        if n == 0:
            raise RetryIn("150ms")
        return current().attempt

    failing = await task.aenqueue(0)
    async with working(app, concurrency=1):
        await auntil(lambda: ran == [0])
        assert await (await task.aenqueue(1)).aresult(timeout="30s") == 1
        await auntil(lambda: ran == [0, 1, 0])
    assert (await failing.astatus(), ran) == ("dead", [0, 1, 0])


async def test_a_group_keeps_its_order_through_retries(app: Conveyor) -> None:
    """Jobs of a key start in their order, one at a time; a retry blocks its key and nothing else."""
    starts: list[tuple[str, int]] = []
    running: set[str] = set()
    overlaps: list[str] = []

    @app.task(name="book", group_by="account", retry=ONCE)
    async def book(account: str, number: int) -> None:
        if account in running:
            overlaps.append(account)
        running.add(account)
        starts.append((account, number))
        await asyncio.sleep(0)
        running.discard(account)
        if number % 3 == 1 and current().attempt < 3:
            raise ConnectionError

    accounts = [f"a{n}" for n in range(10)]
    await app.aenqueue_many([book.s(account, number) for number in range(8) for account in accounts])
    await drain(app)
    assert overlaps == []
    for account in accounts:
        numbers = [number for name, number in starts if name == account]
        assert numbers == sorted(numbers)
        assert Counter(numbers) == {number: 3 if number % 3 == 1 else 1 for number in range(8)}


async def test_another_key_does_not_wait_for_a_flood(app: Conveyor) -> None:
    """A single job of another tenant, and one without a key, start after one round of the keys that have work."""
    starts: list[str] = []

    @app.task(name="work", group_by="tenant")
    async def work(tenant: str | None) -> None:
        starts.append(tenant or "none")

    await app.aenqueue_many([work.s("flood") for _ in range(300)])
    await app.aenqueue_many([work.s("small"), work.s(None)])
    await drain(app, concurrency=1)
    assert len(starts) == 302
    assert max(starts.index("small"), starts.index("none")) <= 4


async def test_weight_and_pause_count_for_what_is_queued(app: Conveyor) -> None:
    """A weight set after the jobs were enqueued gives that key so many a turn; a paused key starts nothing until it is resumed."""
    starts: list[str] = []

    @app.task(name="work", limits=[Rate(10_000, "1s", by="tenant")])
    async def work(tenant: str) -> None:
        starts.append(tenant)
        await asyncio.sleep(0.02)  # so that a turn leases what is free, and not what quick jobs will need soon

    await app.aenqueue_many([work.s(tenant) for _ in range(60) for tenant in ("light", "heavy", "off")])
    await app.groups.aset("default", "heavy", weight=3)
    await app.groups.aset("default", "off", paused=True)
    states = {one.key: (one.weight, one.paused, one.waiting) for one in await app.groups.alist("default")}
    assert states == {"light": (1, False, 60), "heavy": (3, False, 60), "off": (1, True, 60)}
    async with working(app, concurrency=8):
        await auntil(lambda: len(starts) == 120)
        # Exactly 60, but that a large turn names the jobs of one key after those of another; 40 without the weight.
        assert 50 <= starts[:80].count("heavy") <= 60
        assert "off" not in starts
        await app.groups.aset("default", "off", paused=False)
        await auntil(lambda: len(starts) == 180)


async def test_a_group_opened_by_a_concurrency_limit(app: Conveyor) -> None:
    """Concurrency(3) by the key of the group lets three of it run at a time, started in their order."""
    starts: list[int] = []
    gate = asyncio.Event()

    @app.task(name="sync", group_by="account", limits=[Concurrency(3, by="account")])
    async def sync(account: str, page: int) -> None:
        starts.append(page)
        await gate.wait()

    jobs = [await sync.aenqueue("a", page) for page in range(6)]
    async with working(app, concurrency=20):
        await auntil(lambda: len(starts) == 3)
        assert await jobs[3].astatus() == "waiting"
        gate.set()
        for job in jobs:
            await job.aresult(timeout="30s")
    assert starts[:3] == [0, 1, 2]


async def test_an_operator_changes_a_limit_while_workers_run(app: Conveyor) -> None:
    """A raised limit starts what waits at once, for one key or for all; a reset gives the number of the code back."""
    running: Counter[str] = Counter()
    gates = {"first": asyncio.Event(), "all": asyncio.Event()}

    @app.task(name="work", limits=[Concurrency(1, by="tenant")])
    async def work(tenant: str) -> None:
        running[tenant] += 1
        await gates["all"].wait()

    await app.aenqueue_many([work.s(tenant) for _ in range(6) for tenant in ("a", "b")])
    async with working(app, concurrency=50):
        await auntil(lambda: running == {"a": 1, "b": 1})
        await app.limits.aset("default", Concurrency(3, by="tenant"), key="a")
        await auntil(lambda: running == {"a": 3, "b": 1})
        await app.limits.aset("work", Concurrency(2, by="tenant"))
        await auntil(lambda: running == {"a": 3, "b": 2})
        states = {(one.name, one.key): (one.limit.n, one.overridden) for one in await app.limits.alist("default")}
        assert states["work.concurrency.tenant", None] == (2, True)
        assert states["work.concurrency.tenant", "a"] == (3, True)
        assert await app.limits.areset("default", "work.concurrency.tenant", "a") == 1
        assert await app.limits.areset("default") == 1
        gates["all"].set()
        await auntil(lambda: running == {"a": 6, "b": 6})
    [state] = [one for one in await app.limits.alist("default") if one.key is None]
    assert (state.limit, state.declared, state.overridden) == (*[Concurrency(1, by="tenant")] * 2, False)


@pytest.mark.parametrize(
    ("limit", "key", "why"),
    [
        (Rate(5, "1s"), None, "No limit of 'default' fits"), (Concurrency(5), "a", "More than one"),
        (Concurrency(5, name="x"), None, "It has: "), (Concurrency(5, by="b"), None, "No limit"),
    ],
)  # fmt: skip
def test_a_change_that_fits_no_limit_is_refused(app: Conveyor, limit: Any, key: str | None, why: str) -> None:
    """An operator's change names one declared limit, else it is refused with those that there are, and nothing is changed."""

    @app.task(name="work", limits=[Concurrency(1, by="tenant"), Concurrency(2, by="user")])
    def work(tenant: str, user: str) -> None: ...

    with pytest.raises(ConfigurationError, match=why):
        app.limits.set("default", limit, key)
    assert not any(one.overridden for one in app.limits.list("default"))
    app.client.execute("DEL", app.client.keys("default").conf, key=app.client.keys("default").conf)


async def test_the_numbers_of_limits_and_groups_agree(app: Conveyor) -> None:
    """The numbers of jobs that run and wait, by limits and groups, are those of the queue: jobs, and not groups of them."""
    gate = asyncio.Event()

    @app.task(name="open", queue="opened", group_by="key", limits=[Concurrency(3, by="key")])
    async def opened(key: str) -> None:
        await gate.wait()

    @app.task(name="one", queue="limited", limits=[Concurrency(2)])
    async def limited() -> None:
        await gate.wait()

    @app.task(name="strict", queue="strict", group_by="key")
    async def strict(key: str) -> None:
        await gate.wait()

    jobs = [await call.aenqueue() for call in (*[opened.s("a")] * 10, *[limited.s()] * 10, *[strict.s("a")] * 10)]
    async with working(app, queues={"opened": 1, "limited": 1, "strict": 1}, concurrency=20):
        for queue, running in (("opened", 3), ("limited", 2), ("strict", 1)):
            counts = await until_counts(app, lambda now, running=running: now.leased >= running, queue)  # type: ignore[misc]
            assert (counts.leased, counts.waiting) == (running, 10 - running)
            states = await app.limits.alist(queue)
            if queue != "strict":
                assert sum(one.used for one in states) == running
                assert sum(one.waiting for one in states) == 10 - running
            groups = await app.groups.alist(queue)
            assert [(one.waiting, one.running) for one in groups] == [(10 - running, running)]
        gate.set()
        for job in jobs:
            await job.aresult(timeout="30s")


def test_a_smooth_rate_in_place_of_one_with_costs_is_refused(app: Conveyor) -> None:
    """An operator cannot make a rate smooth that weighs its jobs: none of a cost above 1 would start."""

    @app.task(name="work", limits=[Rate(100, "1s", cost="tokens")])
    def work(tokens: int) -> None: ...

    with pytest.raises(ConfigurationError, match="weighs jobs by 'tokens'"):
        app.limits.set("default", Rate(100, "1s", smooth=True))
    assert not any(one.overridden for one in app.limits.list("default"))
    app.client.execute("DEL", app.client.keys("default").conf, key=app.client.keys("default").conf)


async def test_two_programs_that_declare_one_limit_otherwise(app: Conveyor, url: str) -> None:
    """Another number is a deployment; another kind or key is refused, to a producer at the push and to a worker at its start."""

    def declare(where: Conveyor, limit: Any) -> Any:
        return where.task(name="work", limits=[limit])(lambda tenant: None)

    first = declare(app, Rate(5, "1s", name="api"))
    await first.aenqueue("a")
    async with Conveyor(url) as newer:
        declare(newer, Rate(7, "1s", name="api"))
        await drain(newer)
    [state] = await app.limits.alist("default")
    assert state.limit == Rate(7, "1s")
    for wrong in (Concurrency(5, name="api"), Rate(5, "1s", by="tenant", name="api")):
        async with Conveyor(url) as other:
            task = declare(other, wrong)
            with pytest.raises(ConfigurationError, match="give one another name"):
                await task.aenqueue("a")
            with pytest.raises(ConfigurationError, match="give one another name"):
                async with other.worker():
                    pass
            assert (await other.queue("default").astats()).ready == 0


def test_messages_of_a_group_are_taken_in_order(app: Conveyor) -> None:
    """One message of a group is out at a time; a nack with a delay blocks its group and no other, an ack opens it."""
    orders = app.queue("orders")
    orders.push_many([1, 2], group="a")
    orders.push(10, group="b")

    first, other = orders.pull(10, wait="10s")
    assert (first.body, other.body) == (1, 10)
    assert (orders.stats().waiting, len(orders)) == (1, 1)
    first.nack(delay=0.05)
    other.ack()
    [again] = orders.pull(10, wait="10s")
    assert (again.body, again.attempt) == (1, 2)
    again.ack()
    [second] = orders.pull(10, wait="10s")
    assert second.body == 2
    second.ack()


def test_limits_of_a_message_queue(app: Conveyor) -> None:
    """A limit by a field of the body counts the messages that are out."""
    mail = app.queue("mail", dict, limits=[Concurrency(1, by="domain")])
    mail.push_many([{"domain": "a"}, {"domain": "a"}, {"domain": "b"}])
    taken = mail.pull(10, wait="10s")
    assert [one.body["domain"] for one in taken] == ["a", "b"]
    for one in taken:
        one.ack()
    [last] = mail.pull(10, wait="10s")
    last.ack()
    assert used(app.limits.list("mail")) == {}


def test_a_schedule_is_not_listed_as_a_limit(app: Conveyor) -> None:
    """Limits of a queue with a schedule are listed; the schedule, which is due beside them, is none of them."""

    @app.task(name="report", queue="reports", limits=[Rate(5, "1m")])
    def report() -> None: ...

    app.schedules.put("nightly", report.s(), every="1d")
    assert [one.name for one in app.limits.list("reports")] == ["report.rate"]
    app.schedules.delete("nightly")
    app.client.execute("DEL", app.client.keys("reports").conf, key=app.client.keys("reports").conf)


def test_a_consumer_that_is_told_to_wait_holds_the_limit(app: Conveyor) -> None:
    """RateLimited out of `with message` holds the limit of the queue, and costs no attempt."""
    calls = app.queue("calls", limits=[Rate(100, "1s")], max_attempts=1)
    calls.push_many([1, 2])
    seen: list[tuple[int, float]] = []
    for message in calls.consume():
        with message as body:
            seen.append((body, time.monotonic()))
            if len(seen) == 1:
                raise RateLimited(0.2)
        if len(seen) == 3:
            break
    assert [body for body, _ in seen] == [1, 1, 2]
    assert seen[1][1] - seen[0][1] >= 0.2
    assert calls.stats().dead == 0


def test_groups_in_partitions(url: str) -> None:
    """The group picks the partition, so its order and a limit by it are exact; any other limit is split."""
    app = Conveyor(url)
    limits = [Concurrency(2, by="group", name="exact"), Concurrency(8, name="split")]
    parted = app.queue("parted", partitions=4, limits=limits)
    parted.push_many(range(5), group="c7")
    taken = parted.pull(10, wait="10s")
    assert [one.body for one in taken] == [0, 1]
    states = {one.name: (one.limit.n, one.used) for one in app.limits.list("parted") if one.key is None}
    assert states["split"] == (8, 2)
    assert [(one.key, one.limit.n, one.used) for one in app.limits.list("parted") if one.key] == [("c7", 2, 2)]
    app.limits.set("parted", Concurrency(4, name="exact"), key="c7")
    more = parted.pull(10, wait="1s")
    assert not more, "the split limit has room for two in each partition"
    app.limits.set("parted", Concurrency(16, name="split"))
    more = parted.pull(10, wait="10s")
    assert [one.body for one in more] == [2, 3]
    with pytest.raises(ConfigurationError, match="smaller than the 4 partitions"):
        app.limits.set("parted", Concurrency(3, name="split"))
    for one in [*taken, *more]:
        one.ack()
    [last] = parted.pull(10, wait="10s")
    last.ack()
    app.close()


async def test_spawned_jobs_keep_their_limits(app: Conveyor) -> None:
    """A job that another job spawns has its group and its limits, as if it were enqueued."""
    order: list[int] = []

    @app.task(name="child", queue="children", group_by="key", limits=[Concurrency(1, by="key")])
    async def child(key: str, n: int) -> None:
        order.append(n)
        await asyncio.sleep(0.01)

    @app.task(name="parent")
    async def parent() -> None:
        for n in range(5):
            current().spawn(child.s("k", n))

    await parent.aenqueue()
    await drain(app)
    await auntil(lambda: len(order) == 5)
    assert order == list(range(5))


@pytest.mark.leaves_keys("its job waits")
def test_a_database_outbox_keeps_them(app: Conveyor, outbox: Outbox, database: Database) -> None:
    """A job that is enqueued in a transaction arrives with its group and its limits."""
    work = app.task(name="work", group_by="tenant", limits=[Rate(5, "1s", by="tenant", cost="n")])(
        lambda tenant, n: None
    )
    with closing(database.connect()) as connection, outbox.transaction(connection):
        job = work.enqueue("acme", 3)
    outbox.deliver()
    info = Admin(app.client).job(job.id)
    assert (info.status, info.group, info.limits) == ("waiting", "acme", ["work.rate.tenant:acme"])


def test_a_buffer_keeps_them() -> None:
    """A push that waits for Redis, in memory or in a file, keeps its group and its limits."""
    with Conveyor("redis://127.0.0.1:1/0", buffer=Buffer(), timeout="100ms") as app:
        task = app.task(name="work", group_by="tenant", limits=[Concurrency(2)])(lambda tenant: None)
        task.enqueue("acme")
        buffer = app.client.buffer
        assert buffer is not None
        [record] = buffer._own_spool().records()
        stored = msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(record)), SpooledPush)
        for entry in (*record.entries, *stored.entries):
            assert (entry.group, entry.limits) == ("acme", ("1:work.concurrency",))
        assert [one.queue for one in place_anew(replace(record, partitions=1), 4)] == [
            f"default/{partition_of('acme', 4)}"
        ]
        buffer._own_spool()._remove(record.to, record.lane, record.number)


def test_changes_of_a_task_concern_all_its_limits(app: Conveyor) -> None:
    """By the name of a task its limits are found, also those with names of their own, and no others of its queue."""

    @app.task(name="mail:send", limits=[Rate(10, "1s"), Rate(100, "1m", name="provider", by="tenant")])
    def send(tenant: str) -> None: ...

    @app.task(name="mail:send.later", limits=[Rate(10, "1s")])
    def later() -> None: ...

    app.limits.set("mail:send", Rate(5, "1s"))
    app.limits.set("mail:send", Rate(50, "1m"), key="acme")
    app.limits.set("mail:send.later", Rate(7, "1s"))

    states = app.limits.list("mail:send")
    assert [(one.name, one.key, one.limit.n) for one in states] == [
        ("mail.send.rate", None, 5), ("provider", None, 100), ("provider", "acme", 50),
    ]  # fmt: skip
    assert app.limits.reset("mail:send") == 2
    changed = [(one.name, one.limit.n) for one in app.limits.list("default") if one.overridden]
    assert changed == [("mail.send.later.rate", 7)]
    assert app.limits.reset("mail:send.later") == 1


def test_a_key_in_use_shows_what_holds_for_it(app: Conveyor) -> None:
    """A limit that operators set for all keys is shown as the limit of each key, and its own as its own."""
    mail: Any = app.queue("mail", dict, limits=[Concurrency(1, by="tenant")])
    mail.push_many([{"tenant": tenant} for tenant in "ab"])
    app.limits.set("mail", Concurrency(3, by="tenant"))
    app.limits.set("mail", Concurrency(5, by="tenant"), key="b")
    messages = mail.pull(2)

    states = {
        one.key: (one.limit.n, one.declared and one.declared.n, one.overridden) for one in app.limits.list("mail")
    }

    assert states == {None: (3, 1, True), "a": (3, 1, False), "b": (5, 1, True)}
    app.limits.reset("mail")
    for message in messages:
        message.ack()


def test_changes_made_before_the_first_push_hold_in_partitions(url: str) -> None:
    """A change of operators to a declared queue in partitions holds in them, also when nothing was pushed to it before."""
    with Conveyor(url) as app:
        mail: Any = app.queue("mail", dict, partitions=2, limits=[Concurrency(2, by="group"), Rate(100, "1s")])

        app.groups.set("mail", "a", weight=3)
        app.limits.set("mail", Concurrency(4, by="group"))
        app.limits.set("mail", Rate(50, "1s"))
        mail.push_many([{"n": n} for n in range(6)], group="a")

        assert [(one.name, one.limit.n, one.overridden) for one in app.limits.list("mail") if one.key is None] == [
            ("concurrency.group", 4, True), ("rate", 50, True),
        ]  # fmt: skip
        assert [(one.key, one.weight) for one in app.groups.list("mail")] == [("a", 3)]
        messages = mail.pull(10)
        assert len(messages) == 4
        assert app.limits.reset("mail") == 2
        for message in [*messages, *mail.pull(10)]:
            message.ack()
        app.groups.set("mail", "a", weight=1)
        for message in mail.pull(10):
            message.ack()


def test_nothing_is_set_while_the_number_of_partitions_changes(url: str) -> None:
    """A change that comes amid a change of the number of partitions is refused, since it would reach none of them."""
    with Conveyor(url) as app:
        mail: Any = app.queue("mail", dict, partitions=2, limits=[Rate(100, "1s")])
        mail.purge()
        mail.push({"n": 1})
        mail.purge()
        keys = app.client.keys("mail")
        app.client.execute("HSET", keys.conf, "partitions", "0", "switch", "2 3 token", key=keys.conf)

        with pytest.raises(ConfigurationError, match="is being changed right now"):
            app.limits.set("mail", Rate(50, "1s"))
        with pytest.raises(ConfigurationError, match="is being changed right now"):
            app.groups.set("mail", "a", paused=True)

        app.client.execute("HDEL", keys.conf, "switch", key=keys.conf)
        app.client.execute("HSET", keys.conf, "partitions", "2", key=keys.conf)
        assert not any(one.overridden for one in app.limits.list("mail"))
