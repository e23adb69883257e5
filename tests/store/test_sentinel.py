"""A master under sentinels: killed, silent, demoted, doubled; and every URL that cannot be right."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, ConveyorError, StoreUnavailable
from conveyor.jobs import results
from conveyor.store import inspection
from conveyor.store.client import subscription
from conveyor.store.client.client import Client
from conveyor.store.transport.endpoint import Endpoint
from conveyor.store.transport.url import redact
from support.failover_load import FailoverLoad
from support.running_worker import audit, working
from support.waiting import auntil
from testbed.server_groups import Node, SentinelGroup, free_port, wait_for
from testbed.server_process import Server


async def blocked_at(node: Node) -> int:
    """Return how many clients wait for work at a server."""
    listed = await asyncio.to_thread(node.ask, "CLIENT", "LIST")
    return int(listed.count(b"cmd=blpop"))


async def until_blocked_at(node: Node, seconds: float = 20.0) -> None:
    """Wait until an idle worker waits for work at *node*."""
    deadline = time.monotonic() + seconds
    while not await blocked_at(node):
        assert time.monotonic() < deadline, f"nobody waits for work at {node.name}"
        await asyncio.sleep(0.05)


@pytest.mark.row("C25")
@pytest.mark.row("C4")
async def test_killed_masters_stop_the_work_for_seconds_and_lose_nothing(
    sentinel_group: SentinelGroup, rounds: Callable[[int, int], int]
) -> None:
    """Kills of the master under load: work goes on 5 s after the election at the latest, nothing is lost, and no error is seen before 5 s."""
    traffic = FailoverLoad(sentinel_group.url)
    stops, elections, kills = [], [], []
    async with traffic.flowing():
        for _ in range(rounds(30, 2)):
            began = time.monotonic()
            dead = await asyncio.to_thread(sentinel_group.kill_master)
            election = asyncio.ensure_future(asyncio.to_thread(_elected, sentinel_group, dead))
            stops.append(await traffic.until_goes_on())
            elections.append(await election)
            kills.append((began, time.monotonic()))
            await asyncio.to_thread(sentinel_group.mend, dead)
    ours = max(stop - elected for stop, elected in zip(stops, elections, strict=True))
    print(
        f"{len(stops)} kills: longest stop {max(stops):.2f} s, of which ours {ours:.2f} s; {len(traffic.accepted)} jobs, "
        f"{len(traffic.missing)} lost, {len(traffic.doubled)} ran again, {len(traffic.errors)} errors"
    )
    assert ours < 5
    assert (traffic.lost(kills), traffic.doubled) == ([], [])
    assert not traffic.errors or max(elections) > 4  # a producer's patience is 5 s
    assert await traffic.audit() == []
    await traffic.app.aclose()


def _elected(sentinel_group: SentinelGroup, dead: Node) -> float:
    began = time.monotonic()
    sentinel_group.await_other(dead.port)
    return time.monotonic() - began


@pytest.mark.row("C7")
@pytest.mark.row("C17")
async def test_idle_worker_finds_the_new_master_when_the_old_one_falls_silent(sentinel_group: SentinelGroup) -> None:
    """An idle worker, blocked at a master that answers no more and closes nothing, waits at the new one before its block could end."""
    traffic = FailoverLoad(sentinel_group.url)
    async with working(traffic.app):
        await until_blocked_at(sentinel_group.master)
        old = await asyncio.to_thread(sentinel_group.freeze_master)
        began = time.monotonic()
        await asyncio.to_thread(sentinel_group.await_other, old.port)
        await until_blocked_at(sentinel_group.master)
        assert time.monotonic() - began < 25  # one block alone is 30 s
        await traffic.app.tasks["note"].aenqueue(1)
        await auntil(lambda: traffic.ran[1])
        await asyncio.to_thread(sentinel_group.mend, old)
    await traffic.app.aclose()


@pytest.mark.row("C6")
async def test_blocked_call_at_a_demoted_master_goes_on_at_the_new_one(sentinel_group: SentinelGroup) -> None:
    """A worker blocked at a master that is made a replica waits at the new master; a push through an old connection goes there too."""
    traffic = FailoverLoad(sentinel_group.url)
    with Conveyor(sentinel_group.url) as producer:
        task = producer.task(queue="mail", name="note")(_never)
        async with working(traffic.app):
            await asyncio.to_thread(task.enqueue, 1)
            await auntil(lambda: traffic.ran[1])
            await until_blocked_at(sentinel_group.master)
            old = await asyncio.to_thread(sentinel_group.split)
            assert await blocked_at(old)
            await asyncio.to_thread(sentinel_group.mend, old)
            await asyncio.to_thread(task.enqueue, 2)
            await auntil(lambda: traffic.ran[2])
            await until_blocked_at(sentinel_group.master)
            assert sentinel_group.master is not old
    assert traffic.ran == {1: 1, 2: 1}
    await traffic.app.aclose()


@pytest.mark.row("C5")
async def test_no_late_end_is_accepted_after_two_masters_were_one_again(
    sentinel_group: SentinelGroup, rounds: Callable[[int, int], int]
) -> None:
    """A worker that ended its job at a deposed master changes nothing at the real one: the job ran again, once."""
    for number in range(rounds(20, 1)):
        await _split(sentinel_group, number)


async def _split(sentinel_group: SentinelGroup, number: int) -> None:
    gate, started = asyncio.Event(), []
    first, second = (
        _slow(sentinel_group.url, "first", gate, started),
        _slow(sentinel_group.url, "second", None, started),
    )
    async with working(first) as stale:
        job = await first.tasks["slow"].aenqueue()
        await auntil(lambda: started == ["first"])
        old = await asyncio.to_thread(sentinel_group.split)
        async with working(second):
            await auntil(lambda: started == ["first", "second"])
            assert await second.job(job.id).aresult(timeout=60) == "second"
        gate.set()
        await auntil(lambda: not stale.consumers[0].held)
        await asyncio.to_thread(sentinel_group.mend, old)
        await until_blocked_at(sentinel_group.master)
        assert await second.job(job.id).aresult(timeout=60) == "second", f"round {number}"
        assert await audit(second, "mail") == []
    await first.aclose()
    await second.aclose()


def _slow(url: str, answer: str, gate: asyncio.Event | None, started: list[str]) -> Conveyor:
    app = Conveyor(url, lease="2s")

    @app.task(queue="mail", name="slow", keep_result="10m")
    async def slow() -> str:
        started.append(answer)
        if gate is not None:
            await gate.wait()
        return answer

    return app


@pytest.mark.row("C25")
async def test_results_arrive_across_a_failover(sentinel_group: SentinelGroup) -> None:
    """A caller that waits for a result while the master dies gets it, blocking or not."""
    app, gate = Conveyor(sentinel_group.url, lease="5s"), asyncio.Event()

    @app.task(keep_result="10m")
    async def slow(n: int) -> int:
        await gate.wait()
        return 2 * n

    with Conveyor(sentinel_group.url) as other:
        async with working(app) as worker:
            jobs = [await slow.aenqueue(n) for n in range(4)]
            await auntil(lambda: len(worker.consumers[0].held) == 4)
            waiting = [asyncio.ensure_future(job.aresult(timeout=40)) for job in jobs[:2]]
            waiting += [asyncio.ensure_future(asyncio.to_thread(other.job(j.id).result, timeout=40)) for j in jobs[2:]]
            dead = await asyncio.to_thread(sentinel_group.kill_master)
            gate.set()
            assert await asyncio.gather(*waiting) == [0, 2, 4, 6]
            await asyncio.to_thread(sentinel_group.mend, dead)
    await app.aclose()


@pytest.mark.row("C17")
def test_subscriber_notices_a_server_that_fell_silent(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection for results, which only listens, is opened anew when its server says nothing to a ping either."""
    server = start_server()
    backend = Client(server.url)
    replies = results.ResultSubscriber(backend)
    listener = subscription.Subscription(
        backend.endpoint(""),
        replies.channel,
        on_message=replies.handle_message,
        on_subscribed=replies.wake_all,
        ping_after=0.1,
    )
    try:
        assert listener.ready.wait(60)
        with server.client() as client:
            wait_for(lambda: int(client.info("commandstats")["cmdstat_ping"]["calls"]) > 2)  # and its pongs were heard
        assert listener.ready.is_set()
        monkeypatch.setattr(subscription, "PONG_WITHIN", 0.2)
        os.kill(server.pid, signal.SIGSTOP)
        wait_for(lambda: not listener.ready.is_set(), what="the silence went unnoticed")
        os.kill(server.pid, signal.SIGCONT)
        assert listener.ready.wait(60)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        listener.close()
        backend.close()


@pytest.mark.row("C25")
def test_sentinel_that_is_down_or_wrong_is_passed_over(sentinel_group: SentinelGroup) -> None:
    """A sentinel that does not listen, and one that names a server which is no master, cost a moment; the next one is asked."""
    place = sentinel_group.servers[0].directory / "lies"
    stranger = Node(
        place, "--replicaof", "127.0.0.1", "1"
    )  # through a replica of theirs the others would teach the liar better
    liar = Node(place, "--sentinel", configuration=_monitor(stranger.port))
    try:
        right = sentinel_group.sentinels[0].name
        with Conveyor(f"redis+sentinel://127.0.0.1:{free_port()},{liar.name},{right}/main?db=3") as app:
            assert app.client.execute("ROLE")[0] == b"master"  # type: ignore[index]
            assert b" db=3 " in app.client.execute("CLIENT", "INFO")  # type: ignore[operator]
            sentinel: Any = app.client.address
            assert sentinel.sentinels()[0].url == f"redis://{right}/"
    finally:
        liar.kill()
        stranger.kill()


def _monitor(port: int) -> str:
    return f"sentinel monitor main 127.0.0.1 {port} 9\nsentinel down-after-milliseconds main 600000\n"


def test_master_the_sentinels_do_not_know_is_answered_with_those_they_do(sentinel_group: SentinelGroup) -> None:
    """A misspelt master's name is E32, with the names the sentinels know."""
    with (
        Conveyor(sentinel_group.url.replace("/main", "/mian")) as app,
        pytest.raises(ConfigurationError, match=r"no master 'mian'. They know: main") as caught,
    ):
        app.queue("q").push(1)
    assert caught.value.code == "E32"


def test_no_sentinel_that_answers_is_an_outage(url: str) -> None:
    """When no sentinel is there the error names each, within the caller's patience and without the passwords."""
    one, two = free_port(), free_port()
    backend = Client(
        f"redis+sentinel://u:secret@127.0.0.1:{one},127.0.0.1:{two}/main?sentinel_password=hush", retry_for=0.5
    )
    began = time.monotonic()
    with pytest.raises(
        StoreUnavailable, match=rf"no sentinel knows the master 'main' \(127.0.0.1:{one}: .*127.0.0.1:{two}: "
    ) as caught:
        backend.run(inspection.counts(backend.keys("q")))
    assert time.monotonic() - began < 5
    assert "secret" not in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ("redis+sentinel://h:26379,h2:26379", "E32", r"Write its name after the hosts"),
        ("redis+sentinel://h:26379/a/b", "E32", r"does not name the master"),
        ("redis+sentinel:///main", "E02", r"names no host"),
        ("redis+sentinel://h:port/main", "E02", r"'h:port' is not a host with a port"),
        ("redis+sentinel://u:secret@h:0/main", "E02", r"'h:0' is not a host"),
    ],
)  # fmt: skip
def test_wrong_url_is_refused_where_it_is_written(wrong: str, code: str, says: str) -> None:
    """A URL that cannot mean anything is refused when the app is made, with what to write instead."""
    with pytest.raises(ConveyorError, match=says) as caught:
        Conveyor(wrong)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


def test_parts_of_a_url_go_where_they_belong() -> None:
    """Credentials and database are the master's, the sentinels have their own, other options are everybody's."""
    url = "rediss+sentinel://me:p%40ss@h1,[::1]:7/main?db=3&sentinel_username=s&sentinel_password=x%2Fy&ssl_cert_reqs=none"
    address: Any = Client(url).address
    assert address.server(("m", 6380)).url == "rediss://me:p%40ss@m:6380/3?ssl_cert_reqs=none"
    assert [one.url for one in address.sentinels()] == [
        "rediss://s:x%2Fy@h1:26379/?ssl_cert_reqs=none", "rediss://s:x%2Fy@[::1]:7/?ssl_cert_reqs=none",
    ]  # fmt: skip
    place: Endpoint = address.endpoint("any")
    assert str(place) == redact(url) == (
        "rediss+sentinel://me:***@h1,[::1]:7/main?db=3&sentinel_username=s&sentinel_password=***&ssl_cert_reqs=none"
    )  # fmt: skip


def _never(n: int) -> None:
    """Only its name and signature matter to a producer."""
