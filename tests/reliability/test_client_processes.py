"""Clients that are forked, cancelled amid a command, or share their name."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from chaos.fault_proxy import Proxy
from conveyor import ConfigurationError, Conveyor
from conveyor.store import operations
from conveyor.store.fork_safety import lazy_property
from conveyor.worker.worker import Worker
from support.forked_children import exit_code, exit_codes, in_child
from support.multiprocessing_target import note, spawned
from support.running_worker import audit, counts, drain
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def talk(app: Conveyor, who: str, times: int) -> int:
    """Say things to the server and enqueue; return how many answers were somebody else's."""
    task = app.tasks["note"]
    wrong = 0
    for n in range(times):
        word = f"{who} {n} {random.random()}"
        wrong += app.client.execute("ECHO", word) != word.encode()
        wrong += task.options(id=f"{who}-{n}", keep_result=0).enqueue(n).id != f"{who}-{n}"
    return wrong


@pytest.mark.row("A12")
@pytest.mark.leaves_keys("ids of one's own are remembered for a day")
@forks
@pytest.mark.standalone_only(
    "ECHO is for no role, and a fork amid a handshake may hang in OpenSSL",
    on=("redis6", "redis7", "sentinel", "cluster"),
)
def test_forks_amid_commands(url: str, rounds: Rounds) -> None:
    """Forked while 20 threads have commands in flight: parent and children each get their own answers only."""
    times = rounds(100, 6)
    with Conveyor(url) as app:
        app.task(name="note")(note)
        stop, wrong = threading.Event(), Counter[str]()

        def chatter(name: str) -> None:
            round_ = 0
            while not stop.is_set():
                wrong[name] += talk(app, f"{name}.{round_}", 3)
                round_ += 1

        threads = [threading.Thread(target=chatter, args=(f"t{n}",)) for n in range(20)]
        for thread in threads:
            thread.start()
        try:
            codes = exit_codes([in_child(lambda n=n: talk(app, f"child{n}", 5)) for n in range(times)])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert codes == [0] * times
        assert wrong.total() == 0
        assert len(wrong) == 20
        app.client.run(operations.purge(app.client.keys("default"), "ready", 1000))
        app.queue("default").purge()


@pytest.mark.row("A12")
@forks
@pytest.mark.parametrize("way", ["consume", "batches", "pull"])
def test_a_fork_amid_the_block_of_a_message(url: str, way: str) -> None:
    """A forked child that leaves the block of a message and its loop ends neither; it cannot go on with the loop; the parent can."""
    with Conveyor(url, lease="60s") as app:
        queue = app.queue("mail")
        queue.push_many(range(4))
        taking = queue.consume(prefetch=2) if way == "consume" else queue.batches(2, 0.0)
        pulled = queue.pull(2) if way == "pull" else []
        block: Any = pulled[0] if pulled else next(taking)

        def leave() -> int:
            block.__exit__(SystemExit, SystemExit(), None)
            if way == "pull":
                return 0
            with pytest.raises(ConfigurationError, match="in a forked child"):
                next(taking)
            taking.close()
            return 0

        block.__enter__()
        assert exit_code(in_child(leave)) == 0
        stats = queue.stats()
        assert (stats.leased, stats.workers) == (2, 1)
        block.__exit__(None, None, None)
        following: Any = pulled[1] if pulled else next(taking)
        following.ack()
        taking.close()
        assert len(queue) == (0 if way == "batches" else 2)
        queue.purge()


@pytest.mark.row("A12")
@forks
async def test_a_fork_amid_the_block_of_an_awaited_message(url: str) -> None:
    """The same for a loop that is awaited: what leaves it in the child ends at once and sends nothing."""
    async with Conveyor(url, lease="60s") as app:
        queue = app.queue("mail")
        await queue.apush_many(range(4))
        taking = queue.aconsume(prefetch=2)
        block = await anext(taking)

        def leave() -> int:
            for leaving in (block.__aexit__(SystemExit, SystemExit(), None), taking.aclose()):
                with pytest.raises(StopIteration):
                    leaving.send(None)
            return 0

        async with block:
            assert await asyncio.to_thread(exit_code, in_child(leave)) == 0
            stats = await queue.astats()
            assert (stats.leased, stats.workers) == (2, 1)
        async with await anext(taking):
            pass
        await taking.aclose()
        assert await queue.alen() == 2
        await queue.apurge()


@pytest.mark.row("A12")
@forks
def test_a_fork_while_another_thread_settles(url: str) -> None:
    """A child may settle what its parent has pulled, and waits for no lock that a thread of its parent holds."""
    with Conveyor(url, lease="60s") as app:
        queue = app.queue("mail")
        queue.push(1)
        [message] = queue.pull()

        def settle() -> int:
            signal.alarm(60)
            message.ack()
            return 0

        settler: Any = message._settler
        with settler._lock:
            pid = in_child(settle)
        assert exit_code(pid) == 0
        assert queue.stats().leased == 0


@pytest.mark.row("A12")
@forks
def test_a_fork_while_another_thread_computes_what_is_kept() -> None:
    """A thread that is amid what is computed once, as a first connection is, holds no lock that a forked child waits for."""
    amid, go = threading.Event(), threading.Event()

    class Kept:
        @lazy_property
        def value(self) -> int:
            if threading.current_thread() is not threading.main_thread():
                amid.set()
                go.wait()
            return 7

    thread = threading.Thread(target=lambda: Kept().value)
    thread.start()
    assert amid.wait(60)
    try:
        assert exit_code(in_child(lambda: Kept().value), 60) == 7
    finally:
        go.set()
        thread.join()


@pytest.mark.row("A46")
def test_a_first_push_as_the_interpreter_ends(url: str) -> None:
    """A program that connects for the first time in a function of `atexit` pushes there like anywhere else."""
    program = (
        "import atexit, sys\nfrom conveyor import Conveyor\nqueue = Conveyor(sys.argv[1]).queue('mail')\n"
        "atexit.register(queue.push, 'bye')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with Conveyor(url) as app:
        [message] = app.queue("mail").pull()
        with message as body:
            assert body == "bye"


@pytest.mark.row("A12")
@forks
@pytest.mark.standalone_only(
    "ECHO is for no role, and a fork amid a handshake may hang in OpenSSL",
    on=("redis6", "redis7", "sentinel", "cluster"),
)
async def test_a_fork_amid_awaited_commands(url: str, rounds: Rounds) -> None:
    """Forked out of a running loop with 20 awaited calls in flight: the child's blocking calls and the loop's go on."""
    async with Conveyor(url) as app:
        task = app.task(name="note")(note)
        await task.aenqueue(0)
        for _ in range(rounds(50, 3)):
            flying = [asyncio.create_task(task.aenqueue(n)) for n in range(10)]
            words = [asyncio.create_task(app.client.aexecute("ECHO", str(n))) for n in range(10)]
            await asyncio.sleep(0)

            def child() -> int:
                own = {task.enqueue(n).id for n in range(5)}
                return 5 - len(own)

            pid = in_child(child)
            assert [await word for word in words] == [str(n).encode() for n in range(10)]
            assert len({(await job).id for job in flying}) == 10
            assert await asyncio.to_thread(exit_code, pid) == 0
        assert (await counts(app)).ready == 1 + 15 * rounds(50, 3)
        await drain(app)


@pytest.mark.row("A12")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@forks
async def test_processes_of_multiprocessing(url: str, method: str) -> None:
    """Processes started by `multiprocessing` enqueue beside their parent, forked or spawned."""
    async with Conveyor(url) as app:
        task = app.task(name="note")(note)
        await task.aenqueue(-1)
        context = multiprocessing.get_context(method)
        both = [context.Process(target=spawned, args=(url, 100 * n)) for n in range(2)]
        for process in both:
            process.start()
        await asyncio.gather(*(task.aenqueue(n) for n in range(20)))
        for process in both:
            await asyncio.to_thread(process.join, 30)
        assert [process.exitcode for process in both] == [0, 0]
        assert (await counts(app)).ready == 61
        await drain(app)


@pytest.mark.row("A13")
@pytest.mark.standalone_only("puts a proxy before the socket of one server")
async def test_cancels_amid_commands(url: str, server: Server, rounds: Rounds) -> None:
    """Calls cancelled at random over a connection of 4 ms: no answer goes to another call, every accepted job runs once."""
    cancels, seed = rounds(2000, 200), random.randrange(10**9)
    dice = random.Random(seed)
    print(f"seed {seed}")
    with Proxy(server.socket, seed=seed) as proxy:
        proxy.delay(0.002)
        async with Conveyor(proxy.url) as app:
            ran: Counter[int] = Counter()

            @app.task
            async def count(n: int) -> int:
                ran[n] += 1
                return n

            await count.aenqueue(-1)
            wrong: list[str] = []
            accepted: dict[int, Any] = {}

            async def call(n: int) -> None:
                word = f"word {n}"
                if await app.client.aexecute("ECHO", word) != word.encode():
                    wrong.append(word)
                accepted[n] = await count.aenqueue(n)
                if await accepted[n].astatus() not in {"ready", "leased", "done"}:
                    wrong.append(f"status of {n}")

            async with app.worker():
                done = first = 0
                while done < cancels:
                    calls = [asyncio.create_task(call(n)) for n in range(first, first + 50)]
                    for one in calls[::2]:
                        asyncio.get_running_loop().call_later(dice.uniform(0, 0.02), one.cancel)
                    ends = await asyncio.gather(*calls, return_exceptions=True)
                    done, first = done + sum(isinstance(end, asyncio.CancelledError) for end in ends), first + 50
                    assert [
                        end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)
                    ] == []
                results = await asyncio.gather(*(job.aresult(timeout=60) for job in accepted.values()))
            assert wrong == []
            assert results == list(accepted)
            assert set(ran.values()) == {1}
            assert await audit(app) == []


@pytest.mark.row("A15", "I5")
async def test_workers_of_one_name_are_two(url: str) -> None:
    """Two workers of the same host and pid share nothing: one dies and is reaped, the other keeps what it holds."""
    async with Conveyor(url) as app:
        gate = asyncio.Event()
        runs: Counter[int] = Counter()

        @app.task
        async def hold(n: int) -> int:
            runs[n] += 1
            await gate.wait()
            return n

        workers = [Worker(app, concurrency=1) for _ in range(2)]
        running = []
        jobs = []
        for n, worker in enumerate(workers):
            jobs.append(await hold.aenqueue(n))
            running.append(asyncio.create_task(worker.run()))
            await auntil(lambda n=n: runs[n] == 1)
        dead, alive = workers
        assert dead.name == alive.name
        identities = [worker.consumers[0].identity for worker in workers]
        assert len(set(identities)) == 2
        assert all(len(identity) == 24 for identity in identities)
        dead.fail(RuntimeError("dies"))
        with pytest.raises(RuntimeError, match="dies"):
            await asyncio.wait_for(running[0], 60)
        heir = Worker(app, concurrency=1)  # the same pod again, before anybody noticed
        running.append(asyncio.create_task(heir.run()))
        await asyncio.wait_for(heir.ready.wait(), 60)
        assert heir.name == dead.name
        assert (await counts(app)).workers == 3
        assert await app.client.arun(operations.reap(app.client.keys("default"), identities[0])) == 1
        await auntil(lambda: runs[0] == 2)
        assert runs[1] == 1
        gate.set()
        assert [await job.aresult(timeout=60) for job in jobs] == [0, 1]
        for worker in (alive, heir):
            worker.stop()
        await asyncio.wait_for(asyncio.gather(*running[1:]), 60)
        assert await audit(app) == []
