"""A cluster: every face of the library on it, slots that move under load, nodes that fail, and URLs that cannot be right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conveyor import Conveyor
from conveyor.admin import doctor
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.jobs.core import core_of
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.operations import Entry, ProducerSequence, TurnReport
from conveyor.store.transport import replies
from conveyor.store.transport.cluster import slot_of
from support.failover_load import FailoverLoad
from support.running_worker import working
from support.shell import Shell
from support.waiting import auntil
from testbed.server_groups import ClusterOfNodes, free_port

QUEUES = ("mail", "orders", "a", "b:c", "x.y-z")


@pytest.mark.row("C21")
@pytest.mark.row("C26")
async def test_everything_works_on_a_cluster(cluster: ClusterOfNodes) -> None:
    """
    Queues in slots of several nodes: tasks, results, messages, a plain list and the admin see what they see on one server.

    Replicas are asked nothing: they have seen no script and no blocking call.
    """
    replicas = [node for node in cluster.nodes if node not in cluster.masters()]
    for node in replicas:
        node.ask("CONFIG", "RESETSTAT")
    async with Conveyor(cluster.url) as app:
        ran: list[Any] = []
        for queue in QUEUES:
            app.task(queue=queue, name=f"note.{queue}", keep_result="10m")(lambda n: ran.append(n) or n + 1)  # type: ignore[func-returns-value]
        readings = app.plain_list("readings", task="note.mail")
        assert len({cluster.owner(f"{{{queue}}}").port for queue in QUEUES}) > 1
        jobs = [await app.tasks[f"note.{queue}"].aenqueue(number) for number, queue in enumerate(QUEUES)]
        await readings.apush({"n": 100})
        async with working(app):
            assert [await job.aresult(timeout=60) for job in jobs] == [1, 2, 3, 4, 5]
            await auntil(lambda: 100 in ran)
            await readings.apush({"n": 101})  # now somebody is blocked at the list
            await auntil(lambda: 101 in ran)
        await app.queue("letters").apush_many(range(2500))
        taken = [message.body async for message in _some(app.queue("letters"), 2500)]
        assert taken == list(range(2500))
        admin = Admin(app.client, plain_lists=core_of(app).plain_lists)
        found = await asyncio.to_thread(admin.queues)
        assert {one.name for one in found} == {*QUEUES, "readings", "letters"}
        assert sum(one.ready + one.leased for one in found) == 0
    for node in replicas:
        seen = node.ask("INFO", "commandstats").decode()
        assert [word for word in ("evalsha", "eval", "blpop", "blmove", "smembers") if f"cmdstat_{word}:" in seen] == []


async def _some(queue: Any, count: int) -> Any:
    taken = 0
    async with asyncio.timeout(60):
        async for message in queue.aconsume(prefetch=500):
            await message.aack()
            yield message
            taken += 1
            if taken == count:
                break


@pytest.mark.row("C21")
async def test_partitions_spread_one_queue_over_the_nodes(
    cluster: ClusterOfNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue of six partitions lies on all three nodes, and one worker serves them all; the doctor warns of a slot that is slow to move."""
    monkeypatch.setattr(doctor, "LARGE_SLOT", 4)
    async with Conveyor(cluster.url) as app:
        assert {cluster.owner(f"{{hot/{n}}}") for n in range(6)} == set(cluster.masters())
        app.queue("hot", partitions=6)
        double = app.task(queue="hot", name="double", keep_result="10m")(_double)
        jobs = [await double.aenqueue(n) for n in range(60)]
        report = await asyncio.to_thread(Admin(app.client).doctor)
        assert "queue 'hot' has 10 jobs in a slot: moving the slot blocks both nodes for about 0 s" in str(
            report.findings
        )
        async with working(app):
            assert [await job.aresult(timeout=60) for job in jobs] == [2 * n for n in range(60)]


def _double(n: int) -> int:
    return 2 * n


def test_blocking_calls_and_consumers_work_on_a_cluster(cluster: ClusterOfNodes) -> None:
    """The blocking faces: push, pull that waits, consume, status, cancel, results of several queues at once."""
    with Conveyor(cluster.url) as app:
        for queue in QUEUES:
            app.queue(queue).push(queue)
        for queue in QUEUES:
            [message] = app.queue(queue).pull(wait="2s")
            assert message.body == queue
            message.ack()
        mail = app.queue("mail")
        mail.push_many(["x", "y"])
        for message in mail.consume():
            with message as body:
                if body == "y":
                    break
        later = app.task(queue="orders", name="later")(lambda: None).options(delay="1h").enqueue()
        assert later.status() == "scheduled"
        assert later.cancel()
        assert app.job(later.id).status() == "cancelled"
        app.queue("mail").purge()


@pytest.mark.row("C22")
@pytest.mark.row("C14")
async def test_slot_with_jobs_moves_under_load(cluster: ClusterOfNodes, rounds: Callable[[int, int], int]) -> None:
    """The slot of a queue moves key by key, then whole, while a producer pushes and a worker runs: nothing lost, doubled, or refused."""
    many = rounds(50_000, 2_000)
    traffic = FailoverLoad(cluster.url, pace=0.001)
    task = traffic.app.tasks["note"]
    await traffic.app.aenqueue_many(task.s(-n - 1) for n in range(many))
    for node in cluster.masters():
        node.ask("SCRIPT", "FLUSH")
    async with traffic.flowing():
        await asyncio.to_thread(cluster.migrate_slot, "{mail}", None, batch=1, pause=0.05)
        await traffic.until_goes_on()
        await asyncio.to_thread(cluster.migrate_slot, "{mail}", None, batch=1, pause=0.05)
        await asyncio.to_thread(cluster.migrate_slot_whole, "{mail}")
        await traffic.until_goes_on()
    print(f"{many} jobs there before, {len(traffic.accepted)} pushed during three moves")
    assert len(traffic.ran) == many + len(traffic.accepted)
    assert (traffic.missing, traffic.doubled, traffic.errors) == ([], [], [])
    assert await traffic.audit() == []
    await traffic.app.aclose()


@pytest.mark.row("C22")
async def test_pushes_wait_longer_for_a_slot_that_moves(cluster: ClusterOfNodes) -> None:
    """While its slot is half-way a push is repeated beyond the patience for an outage, blocking and on a loop."""
    assert replies.SLOT_MOVE_TIMEOUT == 30
    app = Conveyor(cluster.url)
    app.client.retry_for = 3.0
    mail, key = app.queue("mail"), "{mail}"
    source = cluster.owner(key)
    target = next(node for node in cluster.masters() if node is not source)
    target.ask("CLUSTER", "SETSLOT", slot_of(key), "IMPORTING", cluster.ids[source.port])
    source.ask("CLUSTER", "SETSLOT", slot_of(key), "MIGRATING", cluster.ids[target.port])
    pushes = [asyncio.create_task(mail.apush(1)), asyncio.create_task(asyncio.to_thread(mail.push, 2))]
    end = time.monotonic() + 4.0
    await auntil(lambda: time.monotonic() > end or any(push.done() for push in pushes))
    assert not any(push.done() for push in pushes)
    assert b"errorstat_TRYAGAIN" in await asyncio.to_thread(target.ask, "INFO", "errorstats")
    for node in (target, source, *cluster.masters()):
        node.ask("CLUSTER", "SETSLOT", slot_of(key), "NODE", cluster.ids[target.port])
    await asyncio.gather(*pushes)
    assert await mail.alen() == 2
    await app.aclose()


@pytest.mark.row("C21")
@pytest.mark.row("C8")
async def test_nodes_fail_over_under_load(cluster: ClusterOfNodes, rounds: Callable[[int, int], int]) -> None:
    """A replica takes over in good order, then its master is killed: work goes on by itself, no error is seen, nothing is lost or doubled."""
    traffic, kills = FailoverLoad(cluster.url), []
    async with traffic.flowing():
        for _ in range(rounds(10, 1)):
            await asyncio.to_thread(cluster.failover, "{mail}")
            await traffic.until_goes_on()
            await asyncio.to_thread(cluster.settle)
            began = time.monotonic()
            dead = await asyncio.to_thread(cluster.kill_master, "{mail}")
            kills.append((began, time.monotonic()))
            took = await traffic.until_goes_on()
            print(f"went on {took:.2f} s after the replica had taken over")
            await asyncio.to_thread(cluster.mend, dead)
    assert (traffic.lost(kills), traffic.doubled, traffic.errors) == ([], [], [])
    assert await traffic.audit() == []
    await traffic.app.aclose()


@pytest.mark.row("C21")
@pytest.mark.usefixtures("only_when_woken")
async def test_idle_worker_takes_what_comes_after_a_failover(cluster: ClusterOfNodes) -> None:
    """A worker that was idle while its node was replaced is waiting at the new one."""
    app, ran = Conveyor(cluster.url), []
    task = app.task(queue="mail", name="note")(ran.append)
    async with working(app) as worker:
        await auntil(lambda: worker.connections.blocked)
        new = await asyncio.to_thread(cluster.failover, "{mail}")
        deadline = time.monotonic() + 60
        while b"cmd=blpop" not in await asyncio.to_thread(new.ask, "CLIENT", "LIST"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        began = time.monotonic()
        await task.aenqueue(1)
        await auntil(lambda: ran == [1])
        print(f"taken after {time.monotonic() - began:.3f} s")
    await app.aclose()
    await asyncio.to_thread(cluster.settle)


@pytest.mark.row("C21")
async def test_one_key_is_asked_for_at_the_node_that_takes_the_slot_over(cluster: ClusterOfNodes) -> None:
    """With a slot half-way, what is about one key that has moved is answered by the other node, also by scripts it does not know."""
    backend = Client(cluster.url)
    keys, known = backend.keys("half"), known_queues("conveyor")
    for key in (keys.jobs, known):
        source = cluster.owner(key)
        target = next(node for node in cluster.masters() if node is not source)
        target.ask("CLUSTER", "SETSLOT", slot_of(key), "IMPORTING", cluster.ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot_of(key), "MIGRATING", cluster.ids[target.port])
        target.ask("SCRIPT", "FLUSH")
    try:
        assert await asyncio.to_thread(backend.run, inspection.workers(keys)) == []
        assert await backend.arun(operations.held_ids(keys, "nobody")) == []
        assert await backend.aexecute("SISMEMBER", known, "half", key=known) == 0
        assert await asyncio.to_thread(backend.queues) == []
        with pytest.raises(StoreUnavailable, match="The slot of these keys is moving"):
            await backend.arun(inspection.counts(keys), retry_for=0.2)
    finally:
        for key in (keys.jobs, known):
            owner = cluster.owner(key)
            for node in cluster.masters():
                node.ask("CLUSTER", "SETSLOT", slot_of(key), "NODE", cluster.ids[owner.port])
        await backend.aclose()


@pytest.mark.row("C23", "I12")
@settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.from_regex(r"[A-Za-z0-9_.:-]{1,40}", fullmatch=True), st.from_regex(r"[^\s{}]{1,20}", fullmatch=True))
def test_all_keys_of_a_step_lie_in_one_slot(queue: str, name: str) -> None:
    """All keys of a step hash to one slot, for any name of a queue or a plain list."""
    for keys in (QueueKeys("n", queue), *(QueueKeys("n", one, foreign=one) for one in (name, f"x{{{name}}}y"))):
        entries = [Entry("i", b"\n\n1", priority=3, unique="u")]
        calls: list[Any] = [
            operations.push(keys, ProducerSequence("l"), entries), operations.push_plain(keys, ProducerSequence("l"), ("i", b"\n\n1")),
            operations.turn(keys, "w", 1, 1, 1000, TurnReport()), operations.register(keys, "w", 1, b""),
            operations.reap(keys, "w"), operations.heartbeat(keys, "w", 1), operations.extend(keys, "w", "i", "v", 1, b""),
            operations.cancel(keys, "i"), operations.redrive(keys), operations.promote(keys, "i"),
            operations.purge(keys, "dead", 1), operations.await_result(keys, "i", "c"), inspection.counts(keys),
            inspection.list_jobs(keys, "ready", 0, 1), inspection.get_job(keys, "i"), inspection.audit(keys), inspection.workers(keys),
            *([] if keys.foreign is None else [operations.list_intake(keys, 1, "s")]),
        ]  # fmt: skip
        assert {slot_of(key) for call in calls for key in call.keys} == {slot_of(keys.jobs)}


def test_slots_are_those_of_the_server(cluster: ClusterOfNodes) -> None:
    """Our arithmetic agrees with CLUSTER KEYSLOT, hash tags included."""
    keys = ["", "a", "{a}b", "b{a}c", "{}a", "{a", "a}", "}{a}", "{{a}}", "é{ü}", "a{b}{c}", "x" * 300]
    assert [slot_of(key) for key in keys] == [cluster.nodes[0].ask("CLUSTER", "KEYSLOT", key) for key in keys]


def test_cli_and_doctor_know_a_cluster(cluster: ClusterOfNodes, tmp_path: Path) -> None:
    """Push, status, a worker and the doctor with a cluster's URL; the doctor looks at every node."""
    shell = Shell(tmp_path, cluster.url)
    shell.write(
        "jobs.py",
        "from conveyor import Conveyor\napp = Conveyor()\n@app.task(queue='mail')\ndef send(to: str) -> None:\n    print('sent to', to)\n",
    )
    assert shell.run("enqueue", "send", "to=ada", "-A", "jobs:app").returncode == 0
    assert "mail" in shell.run("status").stdout
    done = shell.run("worker", "jobs:app", "--burst", "--processes", "2")
    assert (done.returncode, "sent to ada" in done.stdout + done.stderr) == (0, True), done.stderr
    report = shell.run("doctor")
    for node in cluster.masters():
        assert node.name in report.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("redis+cluster://h:7000/1", "asks for database 1"), ("redis+cluster://h:7000?db=2", "asks for database 2"),
        ("redis+cluster://h:7000,h:x", "'h:x' is not a host with a port"),
    ],
)  # fmt: skip
def test_wrong_url_of_a_cluster_is_refused_where_it_is_written(wrong: str, says: str) -> None:
    """A cluster has one database, and each host a port."""
    with pytest.raises(ConfigurationError, match=says):
        Conveyor(wrong)


async def test_one_server_is_no_cluster_and_a_node_is_no_server(
    cluster: ClusterOfNodes, start_server: Callable[..., Any]
) -> None:
    """A cluster's URL on a single server and a plain URL on a node say what to write instead; no node at all is an outage."""
    port = free_port()
    start_server("--port", str(port), "--bind", "127.0.0.1")
    alone, node = Conveyor(f"redis+cluster://:@127.0.0.1:{port}"), cluster.masters()[0]
    with pytest.raises(ConfigurationError, match=rf"is not part of one. Write redis://127.0.0.1:{port}") as caught:
        await alone.queue("q").apush(1)
    assert caught.value.code == "E33"

    elsewhere = next(name for name in QUEUES if cluster.owner(f"{{{name}}}") is not node)
    one = Client(node.url)
    for attempt in (lambda: one.arun(inspection.counts(one.keys(elsewhere))), lambda: _blocking(one, elsewhere)):
        with pytest.raises(ConfigurationError, match=rf"MOVED .*redis\+cluster://{node.name}") as caught:
            await attempt()
        assert caught.value.code == "E33"

    nobody = Client(f"redis+cluster://u:secret@127.0.0.1:{free_port()}", retry_for=0.3)
    with pytest.raises(StoreUnavailable, match="no node of the cluster answers") as away:
        await nobody.arun(inspection.counts(nobody.keys("q")))
    assert "secret" not in str(away.value)
    for backend in (one, nobody):
        await backend.aclose()
    await alone.aclose()


async def _blocking(backend: Client, queue: str) -> Any:
    return await asyncio.to_thread(backend.run, inspection.counts(backend.keys(queue)))


@pytest.mark.row("C12")
async def test_each_node_of_a_queue_is_asked_for_its_policy(
    cluster: ClusterOfNodes, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker sees that one of the nodes it takes from may delete jobs, whichever that is."""
    for queue in QUEUES[:2]:
        caplog.clear()
        node = cluster.owner(f"{{{queue}}}")
        node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        app = Conveyor(cluster.url)
        for name in QUEUES:
            app.task(queue=name, name=f"note.{name}")(lambda: None)
        try:
            async with working(app):
                await auntil(lambda: "maxmemory-policy is allkeys-lru" in caplog.text)
        finally:
            node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            await app.aclose()
