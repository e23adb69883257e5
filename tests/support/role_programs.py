"""Programs that use every right of a role: run once with all of them, and again with one taken away."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from conveyor.admin import acl, doctor
from conveyor.admin.admin import Admin
from conveyor.admin.blob_sweep import sweep
from conveyor.admin.job_query import parse
from conveyor.errors import JobNotFound
from conveyor.ids import new_identity
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.jobs.core import core_of
from conveyor.messaging.partitions import repartition
from conveyor.messaging.retry import Retry
from conveyor.payload.blobs import FileStore
from conveyor.store import inspection, limits, operations, queue_events, schedules, worker_commands
from conveyor.store.job_filter import Walk
from conveyor.store.keys import expiring_queues, known_queues
from conveyor.worker.shared_memory import ChildInfo, LeaseIdentity
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard
from support.manual_worker import ManualWorker
from support.running_worker import working
from support.waiting import until
from testbed.server_process import Server

NAMESPACE = "shop"
LIST = "foreign:{t1}:list"
PASSWORD = "pass-canary"
FAST = Retry(attempts=2, backoff="1ms", jitter=False)
EXPECTED = {"client|setinfo", "client", "config|get", "config", "wait", "waitaof"}
"""Commands that redis-py and the doctor ask for and can do without."""
SERVER = {"redis6": "6.2", "redis7": "7.0", "redis8": "7.2", "valkey": "7.2"}


@dataclass
class RoleUser:
    """A user of one role on a server, made with the very line that is printed."""

    server: Server
    rules: acl.AclRules

    @property
    def url(self) -> str:
        return self.server.url.replace("unix://", f"unix://{self.rules.user}:{PASSWORD}@")

    def allow(self, *changes: str) -> None:
        """Make the user as printed, then change a rule."""
        digest = "#" + hashlib.sha256(PASSWORD.encode()).hexdigest()
        with self.server.client() as client:
            client.execute_command(*self.rules.command.replace(acl.PASSWORD, digest).split(" "))
            if changes:
                client.execute_command("ACL", "SETUSER", self.rules.user, *changes)
            client.execute_command("ACL", "LOG", "RESET")

    def denied(self) -> set[str]:
        """Return what the server has refused this user since, commands in lower case."""
        with self.server.client() as client:
            entries = client.acl_log(128)
        mine = [one for one in entries if _text(one["username"]) == self.rules.user]
        return {_text(one["object"]).lower() for one in mine} - EXPECTED

    def refuse(self, *command: str) -> str:
        """Send a command as this user; return how it was refused."""
        with self.server.client(username=self.rules.user, password=PASSWORD) as client:
            try:
                reply = client.execute_command(*command)
            except Exception as error:
                return str(error)
        raise AssertionError(f"{self.rules.user} was allowed {command}: {reply!r}")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def shop(url: str) -> Iterator[Conveyor]:
    """Give the app of all these programs, at *url*."""
    app = Conveyor(url, namespace=NAMESPACE, lease="600ms")
    app.client.retry_for = 0.5
    app.plain_list(LIST, task="shop.double")

    @app.task(name="shop.double")
    async def double(n: int) -> int:
        return 2 * n

    @app.task(name="shop.fail", retry=FAST)
    async def fail() -> None:
        raise ValueError("as asked")

    @app.task(name="shop.chain")
    async def chain(context: Context = current()) -> None:
        await context.emit(1)
        context.spawn(double.options(delay="1ms").s(1))

    @app.task(name="shop.long")
    async def long() -> None:
        await asyncio.sleep(60)

    with app:
        yield app


def furnish(app: Conveyor) -> ManualWorker:
    """Put one job of each kind in the queues, as an owner of all rights; return who holds the leased ones."""
    app.client.execute("FLUSHALL", "SYNC")
    double, fail = app.tasks["shop.double"], app.tasks["shop.fail"]
    manual = ManualWorker(app)
    double.options(id="done").enqueue(1)
    double.options(id="leased").enqueue(1)
    fail.options(id="dead").enqueue()
    fail.options(id="dead-too").enqueue()
    for id_, end in zip(manual.take(4), ("done", "", "dead", "dead"), strict=True):
        if end == "done":
            manual.done(id_, 2)
        elif end:
            manual.dead(id_, None)
    level(app, lease=True)
    for name in ("first", "second"):
        app.queue("brief", expires="1h").push(1, id=name)
    double.options(unique="held", id="ready").enqueue(1)
    double.options(delay="1h", id="scheduled").enqueue(1)
    app.client.run(operations.await_result(app.client.keys("default"), "ready", f"{NAMESPACE}:replies:nobody"))
    return manual


def level(app: Conveyor, *, lease: bool) -> None:
    """Push jobs with a group and with a limit; lease what may start, so that the others wait."""
    keys, lane = app.client.keys("levelled"), operations.ProducerSequence(new_identity())
    for number in (1, 2):
        app.client.run(limits.declare_limits(keys, {"hourly": f"r {number} 3600000 0 -"}, replace=True))
    entries = [operations.Entry(new_identity(), b"\n\n1", limits=("1:hourly",)) for _ in range(4)]
    entries += [operations.Entry(new_identity(), b"\n\n1", group="g", front=True) for _ in range(2)]
    app.client.run(operations.push(keys, lane, entries))
    assert app.client.run(inspection.counts(keys)).waiting >= 6
    if lease:
        worker = new_identity()
        app.client.run(operations.register(keys, worker, 60_000, b"{}"))
        reply = app.client.run(operations.turn(keys, worker, 1, 9, 60_000, operations.TurnReport()))
        assert len(reply.ids) == 3


def schedule(app: Conveyor) -> None:
    """Put a schedule, act on it and on its job, and delete it."""
    made = app.schedules.put("hourly", app.tasks["shop.double"].s(1), every="1h")
    made.pause()
    made.resume()
    assert [one.name for one in app.schedules.list()] == ["hourly"]
    assert (job := made.run()).status() == "ready"
    assert job.update(priority=1)
    app.schedules.delete("hourly")


def forget_expired(app: Conveyor) -> None:
    """List the queues when one of those that expire is gone and another is not."""
    app.client.run(operations.announce(known_queues(NAMESPACE), "gone", operations.SOME_EXPIRE))
    app.client.run(operations.look_at(expiring_queues(NAMESPACE), {"default": 1, "gone": 2}))
    assert "gone" not in app.client.queues()


def look_at_limits(app: Conveyor) -> None:
    """Show limits, groups, and what waits at them."""
    keys = app.client.keys("levelled")
    assert app.client.run(limits.list_limits(keys))[0].waiting == 2
    assert app.client.run(limits.list_groups(keys))
    assert app.client.run(inspection.counts(keys)).waiting == 3
    assert app.client.run(inspection.list_jobs(keys, "waiting", 0, 9)).rows
    assert app.client.run(inspection.audit(keys)) == []


def follow(app: Conveyor) -> None:
    """Push to a queue that keeps events, and read them from the beginning and from the end."""
    told = app.queue("told", events=10)
    told.push(1)
    told.push(1, id="told")
    # Without the right to store events the pushes succeed, and a reader would wait for ever.
    assert app.client.run(queue_events.read_events(told.keys, "", "")).events
    assert next(app.events("told")).name == "enqueued"
    assert app.client.run(queue_events.read_events(told.keys, "", queue_events.TO_COME)).kept


def produce(app: Conveyor) -> None:
    """Push and enqueue in every way, and ask for it."""
    level(app, lease=False)
    follow(app)
    schedule(app)
    app.queue("reply", expires="1h").push(1)
    app.client._announced._refresh_at = 0.0  # as half a minute later
    app.queue("reply2", expires="1h").push(1)
    forget_expired(app)
    orders, double = app.queue("orders"), app.tasks["shop.double"]
    orders.push({"n": 1})
    orders.push_many([1, 2, 3], priority=3)
    orders.push(1, delay="1m")
    orders.push(1, unique="u", expires="1m")
    orders.push(1, unique="u")
    orders.push(1, id="mine", front=True)
    core_of(app).plain_lists[LIST].push({"n": 1})
    app.queue("spread", partitions=2).push_many([1, 2])
    latest = app.queue("latest", max_length=2, full="drop-oldest")
    latest.push_many([1, 2])
    latest.push(3)
    topic = app.topic("order.created")
    topic.subscribe(orders, "audit")
    assert len(topic.publish(1)) == 2
    assert [one.published for one in app.topics()] == [1]
    topic.unsubscribe(orders, "audit")
    assert len(orders) >= 5
    assert orders.stats().ready >= 5
    job = double.enqueue(4)
    app.enqueue_many([double.s(1), double.s(2)])
    assert job.status() == "ready"
    assert job.why().queue == "default"
    try:
        job.result(timeout=0.05)
    except TimeoutError:
        pass
    assert app.job("done").result(timeout=60) == 2
    assert list(app.job("done").stream()) == []
    assert [one.state for one in app.job("done").watch()][-1] == "done"
    waiting = threading.Thread(target=lambda: _ended(job))
    waiting.start()
    until(
        lambda: app.client.run(
            operations.await_result(app.client.keys("default"), job.id.split(":")[1], f"{NAMESPACE}:replies:x")
        )[0]
    )
    assert job.cancel()
    waiting.join(60)
    app.client.execute("PING")  # as the thread does that waits for results
    for name in ("ready", "scheduled", "leased"):
        app.job(name).cancel()
    double.options(tags=["a"]).enqueue(5)
    find(app)
    assert app.count_jobs(tag="a") == app.cancel(tag="a") == 1


def find(app: Conveyor) -> None:
    """Find jobs on every way."""
    for options in ({"tag": "a"}, {"state": "leased"}, {"state": "dead", "since": "1d"}, {"error": "as asked"}):
        list(app.jobs(queue="default", **options))
    first = Walk(states=("dead",), most=1)
    step, _ = app.client.run(inspection.find_jobs(app.client.keys("default"), first))
    app.client.run(inspection.find_jobs(app.client.keys("default"), msgspec.structs.replace(first, cursor=step.cursor)))


def _ended(job: Any) -> None:
    try:
        job.result(timeout=60)
    except Exception:
        return


def look(app: Conveyor) -> None:
    """Show all that a dashboard shows."""
    admin = Admin(app.client, plain_lists=core_of(app).plain_lists)
    assert {one.name for one in admin.queues()} >= {"default"}
    assert admin.queue("default").dead >= 1
    assert admin.workers("default")
    assert "conveyor_redis_up 1" in admin.metrics_text()
    assert admin.worker_processes(jobs=1)
    for state in ("ready", "scheduled", "leased", "dead", "done"):
        admin.jobs("default", state)
    assert admin.job("done").status == "done"
    admin.job("leased")
    assert admin.search(parse("state:dead")).jobs
    assert admin.failure_matrix().total >= 1
    admin.history("1h")
    admin.ended_lately(["default"], 1)
    admin.audit()
    assert admin.why("leased").kind == "running"
    assert admin.why("ready").status == "ready"
    assert isinstance(admin.causes("default"), list)
    try:
        admin.job("unheard-of")
    except JobNotFound:
        pass
    look_at_limits(app)
    report = admin.doctor()
    assert report.version
    assert app.client.run(inspection.audit(app.client.keys("default"))) == []
    list(app.queue("default").dead_letters())
    find(app)
    assert app.topics() == []


def operate(app: Conveyor) -> None:
    """Do all that an operator does to queues and jobs."""
    look(app)
    admin = Admin(app.client, plain_lists=core_of(app).plain_lists)
    app.client.run(limits.set_limit(app.client.keys("levelled"), "hourly", None, "r 3 3600000 0"))
    admin.pause("default")
    admin.acting_as("ada").resume("default")
    assert [one.who for one in admin.audit()] == ["ada"]
    keys = app.client.keys("default")
    order = worker_commands.new_command(keys, "stack")
    assert app.client.run(worker_commands.send(keys, admin.workers("default")[0].id, order))
    assert app.client.run(worker_commands.read_answer(order)) is None
    admin.pause_task("shop.double", "default")
    admin.resume_task("shop.double", "default")
    line = app.client.keys("default").ready[0]
    assert app.client.execute("LPOP", line, key=line)
    assert admin.repair("default") == 1
    forget_expired(app)
    app.topic("order.created").subscribe("audit")
    assert app.topic("order.created").unsubscribe("audit") == 1
    acted = [admin.retry(["scheduled"]), admin.cancel(["leased", "ready"])]
    assert [one.outcome for pair in acted for one in pair] == ["retried", "asked", "cancelled"]
    assert admin.redrive("default", limit=1) == 1
    assert [one.outcome for one in admin.delete(["dead-too"])] == ["deleted"]
    admin.purge("default")
    admin.purge("default", dead=True)
    end_brief_queue(app, admin)
    core_of(app).plain_lists[LIST].purge()
    for number in (2, 1):
        repartition(app.client, "spread", number)
    with (
        tempfile.TemporaryDirectory() as directory,
        Conveyor(app.client.configured_url, namespace=app.namespace, large=FileStore(directory)) as sweeping,
    ):
        sweep(sweeping)


def end_brief_queue(app: Conveyor, admin: Admin) -> None:
    """Change, cancel and purge the messages of a queue that expires, and that has an end though it holds something."""
    conf = app.client.keys("brief").conf
    app.client.execute("EXPIRE", conf, 60, key=conf)
    assert app.job("second").update(priority=1)
    assert app.job("first").cancel()
    assert admin.purge("brief") == 1


async def work(app: Conveyor) -> None:
    """Be a worker with everything a worker does, and its supervisor, and a consumer of messages."""
    double, fail, long = (app.tasks[f"shop.{name}"] for name in ("double", "fail", "long"))
    assert (await asyncio.to_thread(doctor.eviction_policy, app.client))[0]
    async with working(app, grace=0.5) as worker:  # where a right is missing, a job may still run at the end
        consumer = worker.consumers[0]
        assert await (await double.aenqueue(2)).aresult(timeout=60) == 4
        own = await double.options(delay="10ms", unique="k", id=new_identity()).aenqueue(3)
        assert await app.job(own.id).aresult(timeout=60) == 6
        assert [part async for part in app.job(own.id).astream()] == []
        await app.tasks["shop.chain"].aenqueue()
        dying = await fail.aenqueue()
        stopping = await long.aenqueue()
        await _reached(stopping, "leased")
        await stopping.acancel()
        await core_of(app).plain_lists[LIST].apush({"n": 5})
        consumer.wake_self()
        await _reached(stopping, "cancelled")
        await _reached(dying, "dead")
        await double.options(priority=5, expires="1ms", delay="5ms").aenqueue(1)
        await _empty(app)
        await consumer.connection.run(operations.held_ids(consumer.keys, consumer.identity), retry_for=1.0)
        member = (consumer.keys, consumer.identity, consumer.lease_ms, True)
        await consumer.connection.run(operations.idle_turn([member]), retry_for=1.0)  # as after five seconds
        order = worker_commands.new_command(consumer.keys, "stack")
        consumer.on_element(
            msgspec.json.encode(order)
        )  # as an operator sends it; the answer leaves before the worker does
    await asyncio.to_thread(find, app)
    await asyncio.to_thread(level, app, lease=True)
    await asyncio.to_thread(schedule, app)
    await asyncio.to_thread(_tick, app)
    await asyncio.to_thread(_die, app)
    await asyncio.to_thread(_consume, app)


async def _reached(job: Any, status: str) -> None:
    async with asyncio.timeout(60):
        while await job.astatus() != status:
            await asyncio.sleep(0.005)


async def _empty(app: Conveyor) -> None:
    lists = [app.client.keys("default"), core_of(app).plain_lists[LIST].keys]
    async with asyncio.timeout(60):
        while any(
            [(c := await app.client.arun(inspection.counts(one))).ready + c.leased + c.scheduled for one in lists]
        ):
            await asyncio.sleep(0.005)


def _tick(app: Conveyor) -> None:
    """Carry out an instant of a schedule."""
    keys = app.client.keys("default")
    app.client.run(schedules.put_schedule(keys, "timer", "digest", b"{}", b"", "data", 1000))
    _, [row] = app.client.run(schedules.read_schedules(keys, "timer"))
    assert app.client.run(schedules.fire_schedule(keys, row, None, None, reason="missed")).skipped == "missed"
    assert app.client.run(schedules.change_schedule(keys, "timer", "delete")) == 1


def _die(app: Conveyor) -> None:
    """Lease as a child that dies, and return it as its supervisor does."""
    app.tasks["shop.double"].enqueue(1)
    manual = ManualWorker(app)
    assert manual.take(1)
    app.client.run(
        operations.turn(manual.keys, manual.worker, manual.number, 1, 60_000, operations.TurnReport())
    )  # a repeat
    app.client.run(operations.heartbeat(manual.keys, manual.worker, 60_000))
    identity = LeaseIdentity(NAMESPACE, "default", None, manual.worker, 60_000, True, time.monotonic())
    dead_child = DeadChild("a child was killed", ChildInfo(app.client.address.url, NAMESPACE), [identity], crashed=True)
    lease_guard = LeaseGuard()
    lease_guard.return_jobs(dead_child)
    # Where a right is missing, the guard would go on trying for as long as it may.
    until(lambda: dead_child.returned or lease_guard._failures > 2)
    assert lease_guard.close(60.0 if dead_child.returned else 0.0)
    assert dead_child.returned == 1


def _consume(app: Conveyor) -> None:
    """Consume messages, one of them with a lease of its own."""
    app.queue("reply", expires="1h").push(1)
    app.client._announced._refresh_at = 0.0  # as half a minute later
    app.queue("reply2", expires="1h").push(1)
    forget_expired(app)
    orders = app.queue("orders")
    ids = orders.push_many([1, 2])
    assert app.job(ids[1]).why().queue == "orders"
    messages = orders.pull(n=2, wait="60s")
    messages[0].extend("1m")
    for message in messages:
        message.ack()
