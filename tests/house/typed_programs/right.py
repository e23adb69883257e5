"""Correct uses, for the type checkers only; nothing here is run."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, assert_type

from conveyor import (
    BatchFailed,
    CallNext,
    Concurrency,
    Context,
    Conveyor,
    Debounce,
    Depends,
    Job,
    JobFailed,
    Message,
    Middleware,
    Outgoing,
    PlainList,
    Queue,
    Rate,
    Retry,
    RetryIn,
    Snooze,
    Task,
    Throttle,
    Topic,
    Unique,
    current,
)
from conveyor.events import JobDead
from conveyor.sql import Ledger, Outbox

app = Conveyor("redis://127.0.0.1:6379/0", namespace="shop", lease="15s")


@dataclass
class Order:
    id: str
    total: int


@app.task
async def add(a: int, b: int = 2, *, context: Context = current()) -> int:
    context.logger.info("%s of %s", context.attempt, context.job_id)
    return a + b


@app.task(name="mail.send", queue="mail", timeout="30s", retry=Retry(attempts=3, backoff="1s"), keep_result=60)
def send(user: int, tenant: str, tokens: int = 1) -> str:
    return f"{user} {tenant} {tokens}"


@app.task(retry=3, run_in="process", ack="early", expires="1h", priority=5)
async def load(order: Order, at: datetime | None = None) -> list[Order]:
    return [order]


@app.task
def nothing() -> None: ...


@app.batch_task(size=500, within="1s", group_by="id", retry=3)
async def index(orders: list[Order], *, context: Context = current()) -> None:
    raise BatchFailed({0: ValueError(context.items[0].job_id)}, results=[None] * len(orders))


@app.batch_task(size=10, within=1, run_in="process")
def prices(orders: list[Order]) -> list[int]:
    return [order.total for order in orders]


@app.batch_task(size=10, within=1)
async def names_of(orders: list[Order]) -> list[str]:
    return [order.id for order in orders]


async def batches() -> None:
    assert_type(index.enqueue(Order("o1", 3)), Job[None])
    assert_type(await names_of.aenqueue(Order("o1", 3)), Job[str])
    assert_type(prices.options(delay="1m").enqueue(Order("o1", 3)).result(), int)
    assert_type(app.enqueue_many(prices.s(Order(str(n), n)) for n in range(9)), list[Job[int]])
    assert_type(prices([Order("o1", 3)]), list[int])
    assert_type(await names_of([Order("o1", 3)]), list[str])
    await index([Order("o1", 3)])


def spread() -> None:
    orders = app.queue("orders", Order, partitions=8, max_length=80)
    assert_type(orders, Queue[Order])
    assert_type(orders.push(Order("o1", 3), group="c7"), str)
    assert_type(orders.push_many([Order("o2", 3)], group="c7"), list[str])
    for message in orders.pull(3, wait="1s"):
        assert_type(message.body, Order)
    assert_type(orders.repartition(4), int)


async def several() -> None:
    orders, refunds, names = app.queue("orders", Order), app.queue("refunds", Order), app.queue("names", str)
    for message in app.consume([orders, refunds], prefetch=10):
        assert_type(message.body, Order)
    async for message in app.aconsume({orders: 3, refunds: 1}):
        assert_type(message.body, Order)
    assert_type(app.pull([orders], 3), list[Message[Order]])
    assert_type(await app.apull((orders, refunds), 3, wait="1s"), list[Message[Order]])
    assert_type(app.pull([app.plain_list("raw", type=Order)]), list[Message[Order]])
    assert_type(app.pull([orders, names]), list[Message[Any]])
    assert_type(app.pull(["orders", refunds]), list[Message[Any]])
    assert_type(app.pull({"orders": 3}), list[Message[Any]])


async def chain(context: Context = current()) -> None:
    assert_type(context.spawn(add.s(1, 2)), Job[int])
    assert_type(context.spawn(send.options(delay="1m").s(1, "acme")), Job[str])


async def twins() -> None:
    assert_type(await add.aenqueue(1, b=2), Job[int])
    assert_type(await (await add.aenqueue(1)).aresult(timeout="5s"), int)
    assert_type(await send.options(delay="10m", id="order-7").aenqueue(1, "acme"), Job[str])
    assert_type(await app.aenqueue_many(add.s(i, i) for i in range(10)), list[Job[int]])
    assert_type(await add(1, 2), int)
    async with app, app.worker(queues={"mail": 3, "default": 1}, concurrency=100, threads=8, labels="gpu") as worker:
        assert_type(worker.stop(), None)
        assert_type(await worker.wait(), None)


def waiting() -> None:
    raise (Snooze if current().attempt == 1 else RetryIn)(timedelta(minutes=1))


def lists() -> None:
    assert_type(app.plain_list("raw"), PlainList[Any])
    assert_type(app.plain_list("orders", type=Order), PlainList[Order])
    assert_type(app.enqueue_many([add.s(1)], tags=["bulk"]), list[Job[int]])


def blocking() -> None:
    assert_type(add.enqueue(1), Job[int])
    assert_type(send(1, "acme"), str)
    assert_type(send.enqueue(1, tenant="acme").result(timeout=5), str)
    assert_type(nothing.enqueue().result(), None)
    assert_type(load.enqueue(Order("o1", 3), at=datetime.now(UTC)).result(), list[Order])
    assert_type(send.options(priority=5, at=datetime.now(UTC), headers={"a": "b"}).enqueue(1, "acme"), Job[str])
    assert_type(app.enqueue_many([send.s(1, "a"), send.options(delay=1).s(2, "b")]), list[Job[str]])
    assert_type(send.job("mail:x"), Job[str])
    assert_type(app.job("mail:x"), Job[Any])
    mixed = app.enqueue_many(iter([add.s(1)])) + app.enqueue_many([add.s(2)])
    assert_type(mixed[0].cancel(), Literal["removed", "will-not-start", "asked", ""])
    with app:
        try:
            add.enqueue(1).result()
        except JobFailed as error:
            assert_type(error.traceback, str)


def takes_any(task: Task[..., object]) -> str:
    return task.name


names = [takes_any(add), takes_any(send)]
values = [
    Rate(100, "1s", by="tenant"),
    Concurrency(2),
    Unique(by=("user",), until="5m"),
    Debounce("5s", max_wait="1m"),
    Throttle("1m"),
]


@app.middleware
class Trace(Middleware):
    def push(self, outgoing: Outgoing) -> None:
        outgoing.headers["trace"] = "1"

    async def run(self, context: Context, call_next: CallNext) -> Any:
        return await call_next()


@app.middleware
async def timed(context: Context, call_next: CallNext) -> Any:
    return await call_next()


@app.lifespan
async def resources() -> AsyncIterator[Mapping[str, Any]]:
    yield {"db": 1}


@app.on(JobDead)
def dead(event: JobDead) -> None:
    print(event.reason)


@app.on("done")
async def done(event: object) -> None: ...


app.on(JobDead, dead)


# -- topics -----------------------------------------------------------------------------------------------------------
created = app.topic("order.created", Order)
assert_type(created, Topic[Order])
assert_type(app.topic("order.*"), Topic[Any])


async def fan_out() -> None:
    assert_type(created.subscribe("a", app.queue("b", Order)), int)
    assert_type(created.publish(Order("o1", 1), priority=3, headers={"a": "b"}), list[str])
    assert_type(await created.apublish_many([Order("o1", 1)]), list[list[str]])
    assert_type([(info.name, info.nobody) for info in await app.atopics()], list[tuple[str, int]])


# -- transactions -----------------------------------------------------------------------------------------------------
outbox, ledger = Outbox(app, lambda: sqlite3.connect("shop.db")), Ledger()


def charge(amount: int) -> list[str]:
    return [str(amount)]


async def acharge(amount: int) -> list[str]:
    return [str(amount)]


async def transact(connection: sqlite3.Connection) -> None:
    with outbox.transaction(connection):
        assert_type(ledger.first(connection, "k"), bool)
    async with outbox.within(connection):
        assert_type(ledger.once(connection, "k", charge, amount=1), list[str])
        assert_type(await ledger.aonce(connection, "k", acharge, 1), list[str])
    with outbox.relay():
        assert_type(outbox.deliver(), int)


class Db:
    def __enter__(self) -> Db:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __next__(self) -> str:
        return ""


def get_db() -> Db:
    return Db()


async def aget_db(db: Db = Depends(get_db)) -> Db:
    return db


def db_session(context: Context = current()) -> Iterator[Db]:
    yield Db()


async def adb_session() -> AsyncIterator[Db]:
    yield Db()


async def adb_pool() -> AsyncGenerator[Db, None]:
    yield Db()


@app.task
async def audited(
    x: int,
    first: Db = Depends(get_db),
    second: Db = Depends(aget_db),
    third: Db = Depends(db_session),
    fourth: Db = Depends(adb_session),
    fifth: Db = Depends(adb_pool, scope="worker"),
) -> str:
    return f"{x} {first} {second} {third} {fourth} {fifth}"


@app.batch_task(size=10, within=1)
def stored(rows: list[int], db: Db = Depends(db_session)) -> None: ...


assert_type(audited.enqueue(1), Job[str])
assert_type(stored.enqueue(1), Job[None])
with app.override(get_db, Db):
    pass
