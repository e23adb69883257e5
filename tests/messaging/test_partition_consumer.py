"""Taking messages from all partitions of a queue: fairly, exactly once, and again when the taker died."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from conveyor.messaging.consumer.partition_steps import PartitionRoundRobin
from conveyor.messaging.consumer.steps import ConsumerSteps, TurnStep, WaitStep
from conveyor.messaging.leases import DeadWorkerDetector, LeaseSession
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.store import operations
from conveyor.store.keys import QueueKeys
from support.partition_helpers import FAST, ack_all, audits, in_a_loop, place_of, spread
from support.time_limits import PATIENCE
from support.waiting import until, until_ended, until_said


def drained(queue, **options):
    """Consume until nothing is left; return the messages in the order they were taken."""
    left, found = len(queue), []
    if left:
        for message in queue.consume(**options):
            with message:
                found.append(message)
            if len(found) == left:
                break
    return found


class TestConsume:
    @pytest.mark.parametrize("prefetch", [1, 7, 500])
    def test_everything_once_in_order_within_a_partition(self, orders, prefetch):
        """With any prefetch each message is handed out once, those of a partition in their order."""
        orders.push_many(range(600))
        found = drained(orders, prefetch=prefetch)
        assert sorted(message.body for message in found) == list(range(600))
        for number in range(8):
            bodies = [message.body for message in found if place_of(message.id) == number]
            assert bodies == sorted(bodies)

    def test_none_starves_beside_a_long_one(self, orders):
        """With 2,000 messages in one partition, and more coming, the few of the others are taken among the first."""
        orders.push_many(range(2000), group="c7")
        for number, part in enumerate(orders.parts):
            if number != 4:
                part.push(-1 - number)
        found = []
        for message in orders.consume():
            with message as body:
                found.append(body)
                if body >= 0:
                    orders.parts[4].push(body)  # it never runs dry
            if len(found) == 400:
                break
        assert sorted(body for body in found if body < 0) == [-8, -7, -6, -4, -3, -2, -1]

    def test_a_quiet_partition_is_noticed_while_another_is_busy(self, orders):
        """A message that comes to a partition which had nothing is taken while others still have plenty."""
        orders.push_many(range(2000), group="c7")
        found = []
        for message in orders.consume():
            with message as body:
                found.append(body)
            if len(found) == 100:
                orders.push("late", group="c8")
            if body == "late":
                break
        assert len(found) < 600

    @pytest.mark.usefixtures("only_when_woken")
    def test_an_idle_consumer_is_woken_for_any_partition(self, orders):
        """A push to any partition starts within a moment, not at the next look of an idle consumer seconds later."""
        found, consumer = [], orders.consume()

        def take():
            for message in consumer:
                with message as body:
                    found.append(body)
                if body == 7:
                    break

        thread = threading.Thread(target=take)
        thread.start()
        for number, part in enumerate(orders.parts):
            until(lambda: _blocked(orders.client) >= 1)
            part.push(number)
            until(lambda number=number: len(found) > number)
        until_ended(thread)
        consumer.close()

    @pytest.mark.usefixtures("only_when_woken")
    def test_a_delayed_message_of_any_partition_comes_when_it_is_due(self, orders):
        """An idle consumer watches the due instants of all partitions."""
        orders.push("never", group="c6", delay="1h")
        consumer = orders.consume()
        for wanted, group in (("one", "c8"), ("two", "c7")):
            begun = time.monotonic()
            orders.push(wanted, group=group, delay="200ms")
            with next(consumer) as body:
                assert body == wanted
                assert 0.19 < time.monotonic() - begun < PATIENCE
        consumer.close()

    def test_ends_of_every_kind(self, orders):
        """Ack, nack, dead and extend of messages of several partitions do what they do on any queue."""
        orders.push_many(range(8))
        done, again, dead, longer, *rest = orders.pull(8)
        done.ack()
        again.nack(delay="1h")
        dead.dead("no")
        longer.extend("1m")
        stats = orders.stats()
        assert (stats.leased, stats.scheduled, stats.dead) == (5, 1, 1)
        longer.ack()
        ack_all(rest)

    def test_what_a_loop_leaves_goes_back_without_a_trace(self, orders):
        """Messages leased ahead and not begun are back in front, at attempt 1, when the loop is left."""
        orders.push_many(range(64))
        consumer = orders.consume(prefetch=8)
        first = next(consumer)
        consumer.close()
        assert len(orders) == 64
        back = orders.pull(64)
        assert {message.attempt for message in back if message.id != first.id} == {1}
        ack_all(back)

    def test_batches_gather_from_all_partitions(self, orders):
        """A batch is filled from wherever there are messages, and acked as one."""
        bodies = []
        for numbers, within in ((range(90), "1h"), (range(90, 100), "100ms")):
            orders.push_many(numbers)
            for batch in orders.batches(size=30, within=within):
                with batch as some:
                    bodies.append(list(some))
                if sum(map(len, bodies)) == numbers.stop:
                    break
        assert [len(some) for some in bodies[:3]] == [30, 30, 30]
        assert sorted(body for some in bodies for body in some) == list(range(100))

    @pytest.mark.usefixtures("only_when_woken")
    def test_pull_waits_for_any_partition(self, orders):
        """An empty pull returns nothing after its wait; one that waits is woken by a push to any partition."""
        begun = time.monotonic()
        assert orders.pull(3, wait="100ms") == []
        assert time.monotonic() - begun >= 0.1
        timer = threading.Timer(0.2, lambda: orders.push("x", group="c8"))
        timer.start()
        assert ack_all(orders.pull(3, wait="1h")) == ["x"]
        until_ended(timer)
        assert time.monotonic() - begun < PATIENCE

    def test_the_awaitable_forms_do_the_same(self, orders):
        """consume, batches and pull on an event loop: each message once, woken for any partition, nothing left behind."""

        async def check():
            ids = await orders.apush_many(range(300))
            found = []
            consumer = orders.aconsume(prefetch=5)
            async for message in consumer:
                async with message as body:
                    found.append(body)
                if len(found) == 300:
                    break
            await consumer.aclose()
            assert sorted(found) == list(range(300))
            waiting = asyncio.create_task(orders.apull(1, wait="60s"))
            await asyncio.sleep(0)
            await orders.apush("x", group="c7")
            [message] = await waiting
            assert message.body == "x"
            await message.aack()
            sizes = []
            for count, within in ((40, "1h"), (50, "100ms")):
                await orders.apush_many(range(count - sum(sizes)))
                batches = orders.abatches(size=20, within=within)
                async for batch in batches:
                    async with batch as some:
                        sizes.append(len(some))
                    if sum(sizes) == count:
                        break
                await batches.aclose()
            assert sizes[:2] == [20, 20]
            return len(ids)

        assert in_a_loop(orders, check()) == 300

    def test_a_slow_body_keeps_its_lease_on_every_partition(self, backend):
        """A batch of messages of several partitions, held for three leases, is acked and ran once."""
        queue = spread(backend, 4, lease_ms=300)
        queue.push_many(range(8))
        for batch in queue.batches(size=8, within="1h"):
            with batch as bodies:
                assert len(bodies) == 8
                time.sleep(0.9)
            break
        assert (len(queue), queue.stats().leased) == (0, 0)


class TestCrash:
    def test_all_that_a_dead_consumer_held_comes_back(self, url, backend):
        """A consumer killed while it held messages of 8 partitions loses none: all come back, at their second attempt."""
        queue = spread(backend, lease_ms=600)
        queue.push_many(range(40))
        code = f"""
import sys
from conveyor import Conveyor
orders = Conveyor({url!r}).queue("orders", partitions=8, lease="600ms")
for batch in orders.batches(size=40, within="1h"):
    print(len(batch), flush=True)
    sys.stdin.read()
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert until_said(process).strip() == "40"
            assert all(part.stats().leased for part in queue.parts)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            process.stdin.close()
            process.stdout.close()
        found = []
        for message in queue.consume(prefetch=4):
            with message as body:
                found.append((body, message.attempt))
            if len(found) == 40:
                break
        assert sorted(found) == [(n, 2) for n in range(40)]
        assert audits(queue) == []


class TestModel:
    @pytest.mark.parametrize("count", [2, 8])
    def test_everything_pushed_is_consumed_exactly_once(self, backend, count, rounds):
        """Random pushes beside random takes, which ack, refuse and give back: each message ends once, in its partition."""
        seed = random.randrange(10**9)
        print(f"seed {seed}")
        chance = random.Random(seed)
        queue = spread(backend, count)
        pushed, ended = [], Counter()
        for _ in range(rounds(1500, 150)):
            choice = chance.random()
            if choice < 0.25:
                options = chance.choice([{}, {"group": f"g{chance.randrange(5)}"}, {"priority": chance.randrange(10)},
                                         {"delay": 0.01 * chance.random()}, {"front": True}])  # fmt: skip
                pushed.append(queue.push(len(pushed), **options))
            elif choice < 0.4:
                start = len(pushed)
                pushed += queue.push_many(range(start, start + chance.randrange(40)), priority=chance.choice([0, 0, 3]))
            elif choice < 0.7:
                for message in queue.pull(chance.randrange(1, 30)):
                    if chance.random() < 0.2:
                        message.nack(delay=0) if message.attempt < 3 else message.ack()
                        ended[message.id] += message.attempt >= 3
                    else:
                        message.ack()
                        ended[message.id] += 1
            elif choice < 0.85:
                _consume_some(queue, chance, ended)
            else:
                assert audits(queue) == []
        deadline = time.monotonic() + 60
        while left := len(queue):
            assert time.monotonic() < deadline, f"{left} messages never come"
            for message in queue.pull(50, wait="1s"):
                message.ack()
                ended[message.id] += 1
        assert ended == Counter(pushed)
        assert audits(queue) == []


def _consume_some(queue, chance, ended):
    """Consume a few messages in a loop that is then left; with more than there are it would wait for ever."""
    few = min(chance.randrange(12), queue.stats().ready)
    if few:
        for message in queue.consume(prefetch=chance.randrange(1, 10)):
            with message:
                ended[message.id] += 1
            few -= 1
            if few == 0:
                break


def _blocked(backend):
    return int(
        dict(line.split(b":", 1) for line in backend.execute("INFO", "clients").splitlines() if b":" in line)[
            b"blocked_clients"
        ]
    )


# -- decisions, without Redis -------------------------------------------------------------------------------------------


def test_a_round_robin_looks_at_all_before_it_rests():
    """At first every partition may have work: each is visited once, then all are waited for at once."""
    sessions = [
        LeaseSession(QueueKeys("c", f"q/{n}"), 6000, b"", DeadWorkerDetector(6000), clock=lambda: 0.0) for n in range(4)
    ]
    policy = SettlementPolicy(FAST, "w", lambda: 0)
    programs = PartitionRoundRobin(
        [ConsumerSteps(session, policy, lambda leased: leased, clock=lambda: 0.0) for session in sessions],
        2,
        clock=lambda: 0.0,
    )
    program = programs.fetch(3)
    steps = [next(program) for _ in range(5)]
    assert steps[:4] == [
        TurnStep(3, at=2, must=False),
        TurnStep(3, at=3, must=False),
        TurnStep(3, at=0, must=False),
        TurnStep(3, at=1, must=False),
    ]
    assert isinstance(steps[4], WaitStep)
    assert not steps[4].full
    programs.woken(1)
    assert next(program) == TurnStep(3, at=1, must=False)


def test_a_round_robin_does_not_wait_while_it_holds_too_much():
    """A partition at which a consumer holds as much as it may is not asked for more."""
    session = LeaseSession(QueueKeys("c", "q/0"), 6000, b"", DeadWorkerDetector(6000), clock=lambda: 0.0)
    session.held = {str(n): object() for n in range(operations.MOST_HELD)}
    programs = PartitionRoundRobin(
        [ConsumerSteps(session, SettlementPolicy(FAST, "w", lambda: 0), lambda leased: leased, clock=lambda: 0.0)],
        0,
        clock=lambda: 0.0,
    )
    step = next(programs.fetch(3))
    assert step == WaitStep(step.seconds, full=True)
