"""The number of partitions: all programs must say the same, and changing it loses nothing."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time

import pytest

from conveyor import Concurrency, Conveyor, Rate
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError
from conveyor.messaging.partitions import partition_count, partition_names
from conveyor.messaging.queue import Queue
from conveyor.store import limits as store_limits
from conveyor.store import partitions as partitioning
from conveyor.store.client.client import Client
from conveyor.worker.worker import Worker
from support.partition_helpers import ack_all, audits, clear, in_a_loop, lengths, spread
from support.running_worker import working
from support.waiting import until, until_ended, until_said


def numbers(backend, count=8):
    """Return what each partition says of their number."""
    places = [backend.keys(f"orders/{number}") for number in range(count)]
    return [backend.run(partitioning.count(keys))[0] for keys in places]


@pytest.fixture
def queue8(backend):
    """A queue that lies in 8 partitions."""
    queue = spread(backend)
    queue.push(0)
    ack_all(queue.pull())
    return queue


class TestWrongNumber:
    @pytest.mark.parametrize("wrong", [1, 4, 16])
    def test_whoever_says_another_number_is_refused(self, url, queue8, wrong):
        """Pushes, pulls and consumers with another number raise E34, store and take nothing, and say what to do."""
        other = Client(url)
        mine = spread(other, wrong) if wrong > 1 else Queue(other, "orders", lease_ms=2000)
        queue8.push_many(range(8))
        for attempt in (
            lambda: mine.push(1), lambda: mine.push_many([1, 2]), mine.pull, lambda: next(mine.consume()),
            lambda: next(mine.batches()), lambda: asyncio.run(_twins(other, mine)),
        ):  # fmt: skip
            with pytest.raises(ConfigurationError, match=f"has 8 partitions, but this program says {wrong}") as refused:
                attempt()
            assert refused.value.code == "E34"
            assert f"conveyor queue partition orders {wrong}" in str(refused.value)
        assert (lengths(queue8), queue8.stats().leased) == ([1] * 8, 0)
        assert [(one.name, one.partitions, one.ready) for one in Admin(other).queues()] == [("orders", 8, 8)]
        other.close()
        clear(queue8)

    def test_a_live_queue_of_one_piece_refuses_partitions(self, url, backend):
        """A program that begins to say partitions= on a queue in use is refused, and what is queued stays."""
        plain = Queue(backend, "orders", lease_ms=2000)
        plain.push_many(range(5))
        mine = spread(Client(url))
        for attempt in (lambda: mine.push(1), mine.pull):
            with pytest.raises(ConfigurationError, match="has 1 partition, but this program says 8"):
                attempt()
        assert ack_all(plain.pull(9)) == list(range(5))

    async def test_a_worker_with_another_number_does_not_start(self, url):
        """It serves no partition of the queue instead of some; with the right number it starts."""
        async with Conveyor(url) as right, Conveyor(url) as wrong, Conveyor(url) as ignorant:
            right.queue("orders", partitions=4)
            await right.queue("orders", partitions=4).apush(1)
            wrong.queue("orders", partitions=8)
            for app in (wrong, ignorant, right):
                app.task(queue="orders", name="t")(_nothing)
            for app in (wrong, ignorant):
                with pytest.raises(ConfigurationError, match="has 4 partitions") as refused:
                    await asyncio.wait_for(Worker(app).run(), 60)
                assert refused.value.code == "E34"
            assert (await right.queue("orders", partitions=4).astats()).workers == 0
            async with working(right) as worker:
                assert [consumer.group.weight for consumer in worker.consumers] == [1.0] * 4
            assert await right.queue("orders", partitions=4).apurge() == 1

    def test_a_program_goes_on_after_redis_was_emptied(self, queue8, redis):
        """Producers and consumers that run agree anew with a server that has lost everything."""
        consumer = queue8.consume()
        queue8.push(1)
        with next(consumer) as body:
            assert body == 1
        redis.flushall()
        queue8.push_many(range(16))
        found = []
        for message in consumer:
            with message as body:
                found.append(body)
            if len(found) == 16:
                break
        consumer.close()
        assert sorted(found) == list(range(16))
        assert partition_count(queue8.client, "orders") == 8


def _nothing() -> None: ...


async def _twins(backend, queue):
    try:
        await queue.apush(1)
    finally:
        await backend.aclose()


class TestRace:
    def test_of_two_programs_with_different_numbers_one_wins(self, url, backend, rounds):
        """Two processes that push first at the same instant: one number stands, everywhere, and only its pushes are stored."""
        count = rounds(200, 25)
        code = f"""
import sys, time
from conveyor import Conveyor
from conveyor.errors import ConfigurationError
app, number = Conveyor({url!r}), int(sys.argv[1])
print("ready", flush=True)
for n in range({count}):
    sys.stdin.readline()
    try:
        app.queue(f"race{{n}}", partitions=number).push_many(range(10))
        print("won", flush=True)
    except ConfigurationError as error:
        print(error.code, flush=True)
"""
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for number in (3, 5)
        ]
        won = {3: 0, 5: 0}
        try:
            assert [until_said(racer) for racer in racers] == ["ready\n"] * 2
            for n in range(count):
                for racer in racers if n % 2 else racers[::-1]:
                    racer.stdin.write("go\n")
                    racer.stdin.flush()
                said = [until_said(racer).strip() for racer in racers]
                assert sorted(said) == ["E34", "won"]
                winner = (3, 5)[said.index("won")]
                won[winner] += 1
                assert partition_count(backend, f"race{n}") == winner
                places = [backend.keys(f"race{n}/{one}") for one in range(5)]
                found = [backend.run(partitioning.count(keys))[0] for keys in places]
                assert found == [winner] * winner + [1] * (5 - winner)
                assert Admin(backend).purge(f"race{n}") == 10
        finally:
            for racer in racers:
                racer.stdin.close()
                racer.stdout.close()
                racer.wait(60)
        assert sum(won.values()) == count


class TestRepartition:
    @pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 1), (1, 8), (4, 8), (8, 8)])
    def test_an_empty_queue_changes(self, url, backend, before, after):
        """The number changes from any to any other: programs with the new one go on, those with the old one are refused, names follow."""
        old = spread(backend, before) if before > 1 else Queue(backend, "orders", lease_ms=2000)
        old.push(1)
        ack_all(old.pull())
        old.pause()
        assert old.repartition(after) == before
        with Conveyor(url) as app:
            new = app.queue("orders", partitions=after)
            new.resume()
            new.push_many(range(20))
            assert sorted(ack_all(new.pull(20))) == list(range(20))
            assert app.client.queues() == (["orders"] if after == 1 else [f"orders/{n}" for n in range(after)])
            assert [one.partitions for one in Admin(app.client).queues()] == [after]
        if before != after:
            with pytest.raises(ConfigurationError, match="this program says"):
                old.push(1)
            assert partition_count(backend, "orders") == after

    @pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (1, 2)])
    def test_what_operators_have_set_is_kept(self, url, before, after):
        """Limits are split anew, and pauses and weights hold in every partition, one that was used long ago included."""
        limits = [Rate(8, "1s", name="starts"), Concurrency(8, by="group", name="each")]
        with Conveyor(url) as app:
            orders = app.queue("orders", partitions=before, limits=limits)
            if before < after:
                app.client.run(store_limits.set_group(app.client.keys("orders/3"), "old", weight=9, paused=True))
            orders.push({}, group="a")
            ack_all(orders.pull())
            app.limits.set("orders", Rate(16, "1s", name="starts"))
            app.limits.set("orders", Concurrency(5, by="group", name="each"), key="a")
            app.groups.set("orders", "a", weight=3, paused=True)
            orders.pause()
            assert orders.repartition(after) == before
        with Conveyor(url) as app:
            orders = app.queue("orders", partitions=after, limits=limits)
            assert orders.stats().paused
            for name in partition_names("orders", after):
                keys = app.client.keys(name)
                records = {(one.name, one.key): one.override for one in app.client.run(store_limits.list_limits(keys))}
                assert records["starts", ""] == f"r {16 // after} 1000 0"
                assert records["each", "a"] == "c 5"
                groups = app.client.run(store_limits.list_groups(keys))
                assert {(one.group, one.weight, one.paused) for one in groups} - {("old", 1, False)} == {("a", 3, True)}
            assert {(one.name, one.key): one.limit.n for one in app.limits.list("orders")}["starts", None] == 16
            app.limits.reset("orders")
            app.groups.set("orders", "a", weight=1, paused=False)
            orders.resume()

    @pytest.mark.parametrize("place", ["ready", "scheduled", "leased", "dead"])
    def test_what_holds_something_is_named(self, queue8, place):
        """A job in any state in any partition refuses the change (E35), names the partition, and changes nothing."""
        queue8.push(1, group="c7", delay="1h" if place == "scheduled" else 0)
        held = queue8.pull() if place in {"leased", "dead"} else []
        if place == "dead":
            held.pop().dead("no")
        with pytest.raises(ConfigurationError, match=r"orders/4 \(1\)") as refused:
            queue8.repartition(4)
        assert refused.value.code == "E35"
        assert numbers(queue8.client) == [8] * 8
        ack_all(held)
        clear(queue8)
        assert queue8.repartition(4) == 8

    def test_nothing_is_lost_to_a_producer_that_races(self, url, backend, rounds):
        """Pushes while the number changes: each is either stored before, and the change refused, or refused, or stored after."""
        for attempt in range(rounds(40, 6)):
            before, after = (2, 3) if attempt % 2 == 0 else (3, 2)
            old = spread(backend, before)
            accepted, refused, stop, go_on = [], [], threading.Event(), threading.Event()

            def produce(old=old, accepted=accepted, refused=refused, stop=stop, go_on=go_on):
                while not stop.is_set():
                    if len(accepted) % 5 == 0:
                        go_on.wait(60)  # a change never meets an empty queue otherwise
                        go_on.clear()
                    try:
                        accepted.append(old.push(len(accepted)))
                    except ConfigurationError as error:
                        refused.append(error.code)
                        if "is being changed" not in str(error):
                            return

            taken = []
            thread = threading.Thread(target=produce)
            thread.start()
            other = spread(Client(url), before)
            deadline, codes = time.monotonic() + 60, set()
            for change in itertools.count():
                taken += ack_all(other.pull(1000))
                if change % 2 == 0:
                    go_on.set()  # the producer races with this change, and waits during the next
                try:
                    other.repartition(after)
                except ConfigurationError as error:
                    codes.add(error.code)
                else:
                    go_on.set()
                    until(lambda refused=refused: refused)
                if refused or time.monotonic() > deadline:
                    break
            stop.set()
            go_on.set()
            until_ended(thread)
            assert codes <= {"E35"}
            assert sorted(taken) == list(range(len(accepted)))
            assert set(refused) == {"E34"}
            assert numbers(backend, 3) == [after] * 3
            new = spread(backend, after)
            assert (len(new), audits(new)) == (0, [])
            other.client.close()

    def test_whoever_runs_with_the_old_number_ends(self, url, backend, queue8):
        """A consumer and a worker that run when the number changes end with E34, instead of serving some partitions."""
        failed = []

        def take():
            try:
                for message in queue8.consume():
                    message.ack()
            except ConfigurationError as error:
                failed.append(error.code)

        thread = threading.Thread(target=take)
        thread.start()
        until(lambda: queue8.stats().workers == 1)
        spread(Client(url)).repartition(4)
        thread.join(60)
        assert failed == ["E34"]

        async def work():
            async with Conveyor(url) as app:
                app.queue("orders", partitions=4)
                app.task(queue="orders", name="t")(_nothing)
                worker = Worker(app)
                running = asyncio.create_task(worker.run())
                await asyncio.wait_for(worker.ready.wait(), 60)
                assert await app.queue("orders", partitions=4).arepartition(8) == 4
                await asyncio.wait_for(running, 60)

        with pytest.raises(ConfigurationError, match="has 8 partitions, but this program says 4"):
            asyncio.run(work())
        assert all(part.stats().workers == 0 for part in queue8.parts)

    def test_a_change_that_was_not_completed_is_completed_by_the_next(self, url, backend, queue8):
        """With the queue shut, pushes wait and then say so; the same command again completes it, wherever it stood."""
        other = Client(url, retry_for=0.2)
        mine = spread(other)
        whole = backend.keys("orders")
        for steps in (1, 2, 5, 9):
            backend.run(partitioning.repartition(whole, "begin", "dead", 4))
            for one in range(min(steps - 1, 8)):
                backend.run(partitioning.repartition(queue8.parts[one].keys, "close", "dead", 8))
            with pytest.raises(ConfigurationError, match="is being changed right now"):
                spread(other).push(1)
            assert Admin(backend).queue("orders").partitions == 8
            assert queue8.repartition(8) == 8
            assert numbers(backend) == [8] * 8
            mine.push(1)
            assert ack_all(mine.pull()) == [1]
        # The queue has its new number, and its partitions are still shut.
        backend.run(partitioning.repartition(whole, "begin", "dead", 4))
        for part in queue8.parts:
            backend.run(partitioning.repartition(part.keys, "close", "dead", 8))
        backend.run(partitioning.repartition(whole, "end", "dead", 4))
        assert spread(backend, 4).repartition(4) == 4
        four = spread(other, 4)
        assert len(four.push_many(range(8))) == 8
        assert four.purge() == 8
        other.close()

    def test_a_push_waits_for_a_change_to_end(self, backend, queue8):
        """A push that meets a change waits for it, and succeeds when the number is its own again."""
        whole = backend.keys("orders")
        backend.run(partitioning.repartition(whole, "begin", "T", 4))
        for part in queue8.parts:
            backend.run(partitioning.repartition(part.keys, "close", "T", 8))
        done = []
        thread = threading.Thread(target=lambda: done.append(queue8.push(1)))
        thread.start()
        time.sleep(0.1)
        assert done == []
        backend.run(partitioning.repartition(whole, "end", "T", 8))
        for part in queue8.parts:
            backend.run(partitioning.repartition(part.keys, "open", "T", 8))
        thread.join(60)
        assert (len(done), queue8.purge()) == (1, 1)

    def test_a_plain_list_is_one_key(self, url):
        """The number of partitions cannot be changed for a name that is no queue of Conveyor."""
        with Conveyor(url) as app:
            readings = app.plain_list("readings")
            with pytest.raises(ConfigurationError, match="is one key"):
                readings.repartition(4)
            with pytest.raises(ConfigurationError, match="is one key"):
                in_a_loop(readings, readings.arepartition(4))
