"""A queue in several partitions: the place of messages, counts, maintenance, and costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter

import pytest
from test_queue import commands

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, JobNotFound, QueueFull
from conveyor.ids import logical, new_id, own_id, public, queue_name, split
from conveyor.messaging.partitions import likely_first, partition_of
from support.partition_helpers import ack_all, clear, in_a_loop, lengths, place_of, spread


class TestPlacement:
    def test_a_key_picks_the_same_partition_for_ever(self):
        """CRC-32: programs in other languages, and later versions, must place alike."""
        found = [partition_of(key, 8) for key in ("c7", "c8", "order-7", "ü€", "a b")]
        assert found == [4, 5, 2, 0, 3]
        code = "from conveyor.messaging.partitions import partition_of; print([partition_of(k, 8) for k in ('c7', 'c8', 'order-7', 'ü€', 'a b')])"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == str(found)

    def test_names_of_places(self):
        """A public id names its partition; a queue's name cannot look like one; unusual names are left alone."""
        id_ = new_id()
        assert split(public("orders/3", id_)) == ("orders/3", id_)
        assert split(f"orders/x:{id_}") == (None, f"orders/x:{id_}")
        assert [logical(name) for name in ("orders/3", "orders", "a/b", "jobs/new/1")] == [
            "orders", "orders", "a/b", "jobs/new/1",
        ]  # fmt: skip
        with pytest.raises(ConfigurationError):
            queue_name("orders/3")
        with pytest.raises(ConfigurationError):
            own_id(f"orders/3:{id_}")

    def test_the_group_decides_then_the_unique_key_then_the_id(self, orders):
        """Messages of one group lie in one partition whatever else is given; so do those of a key, and of an id."""
        at = partition_of("c7", 8)
        assert {place_of(orders.push(n, group="c7")) for n in range(3)} == {at}
        assert place_of(orders.push(1, group="c7", unique="c7")) == at
        first = orders.push(1, unique="u1")
        assert place_of(first) == partition_of("u1", 8)
        assert orders.push(2, unique="u1") == first
        assert [orders.push(1, id="order-7"), orders.push(2, id="order-7")] == ["order-7", "order-7"]
        assert lengths(orders)[partition_of("order-7", 8)] >= 1
        assert orders.push_many(range(10), group="c7")[0].startswith(f"orders/{at}:")

    def test_a_unique_key_must_not_be_torn_apart(self, orders):
        """A unique key beside a group that places elsewhere could live twice: refused, nothing stored."""
        with pytest.raises(ConfigurationError, match="the group picks partition 4, the unique key partition 2"):
            orders.push(1, group="c7", unique="order-7")
        for wrong in ("", 7, "a\n", "x" * 1025):
            with pytest.raises(ConfigurationError, match="group"):
                orders.push(1, group=wrong)
        assert len(orders) == 0

    @pytest.mark.row("D191")
    def test_an_id_makes_one_job(self, url, orders):
        """An id of one's own beside a unique key is refused, for messages and jobs: another key would make another job."""
        for key in ("u1", "u2", "u3"):
            with pytest.raises(ConfigurationError, match=f"id='order-7' beside unique='{key}'"):
                orders.push(1, id="order-7", unique=key)
        assert [orders.push(n, id="order-7", unique="order-7") for n in range(3)] == ["order-7"] * 3
        assert len(orders) == 1
        with Conveyor(url) as app:
            queue = app.queue("orders", partitions=8)

            @app.task(queue="orders")
            def work() -> None: ...

            for key in ("u1", "u2"):
                with pytest.raises(ConfigurationError, match="beside unique="):
                    work.options(id="order-8", unique=key).enqueue()
                with pytest.raises(ConfigurationError, match="beside unique="):
                    app.enqueue_many([work.options(id="order-8", unique=key).s()])
            assert len(queue) == 1

    def test_without_a_key_messages_go_round(self, orders):
        """One by one or in bulk, blocking or not, each partition gets its share, to one message."""
        for n in range(16):
            orders.push(n)
        assert lengths(orders) == [2] * 8
        orders.push_many(range(803))
        assert sorted(Counter(lengths(orders)).items()) == [(102, 5), (103, 3)]

        async def more():
            await orders.apush_many(range(8))
            await asyncio.gather(*[orders.apush(n) for n in range(8)])

        in_a_loop(orders, more())
        assert sum(lengths(orders)) == 835
        assert max(lengths(orders)) - min(lengths(orders)) <= 1

    def test_order_within_a_partition_is_that_of_the_push(self, orders):
        """A bulk push keeps the order of its values in each partition, and returns the ids in the order of the values."""
        ids = orders.push_many(range(2500))
        assert len(set(ids)) == 2500
        for number, part in enumerate(orders.parts):
            mine = [n for n, id_ in enumerate(ids) if place_of(id_) == number]
            assert ack_all(part.pull(1000)) == mine

    def test_likely_places_come_first(self):
        """An id of a caller's own is looked for where it would have been placed, of each queue, then everywhere."""
        names = ["mail", *(f"orders/{n}" for n in range(8))]
        found = likely_first(names, "order-7")
        assert found[0] == "orders/2"
        assert sorted(found) == sorted(names)


class TestLength:
    def test_each_partition_takes_its_part(self, backend):
        """The maximum is split and rounded down; a full partition refuses, and the whole is never exceeded."""
        queue = spread(backend, 4, max_length=43)
        assert {part.max_length for part in queue.parts} == {10}
        queue.push_many(range(40))
        with pytest.raises(QueueFull, match="orders/"):
            queue.push(1)
        assert lengths(queue) == [10] * 4
        clear(queue)

    def test_a_maximum_smaller_than_the_partitions_is_refused(self, backend):
        """A partition that could take nothing is a mistake of the declaration."""
        with pytest.raises(ConfigurationError, match="max_length=7 is less than partitions=8"):
            spread(backend, max_length=7)
        for wrong in (0, -1, 257, True, "8", 2.0):
            with pytest.raises(ConfigurationError, match="partitions must be"):
                spread(backend, wrong)

    def test_a_bulk_push_is_whole_or_not_in_each_partition(self, backend):
        """Each partition takes all of its part or none of it, and the error says how many were stored."""
        queue = spread(backend, 4, max_length=40)
        queue.partitions.agree()
        for _ in range(4):  # begins at another partition each time
            queue.parts[3].push_many(range(4))
            with pytest.raises(QueueFull, match="orders/3") as refused:
                queue.push_many(range(28))
            found = lengths(queue)
            assert found[3] == 4
            assert set(found[:3]) <= {0, 7}
            if stored := sum(found[:3]):
                assert f"{stored} messages were stored before partition 3 refused" in str(refused.value)
            clear(queue)


class TestCost:
    def test_a_push_is_one_command(self, orders, redis):
        """After the first, a push costs what it costs on any queue: one script, no other command."""
        orders.push(0)
        for options in ({}, {"group": "c7"}, {"priority": 3}):
            _, calls, _ = commands(redis, lambda options=options: orders.push(1, **options))
            assert calls.pop("evalsha") == 1
            # Within the script a group that was empty gets its ticket.
            named = {"smembers", "eval"} if "group" in options else {"sadd", "smembers", "eval"}
            assert {name for name in calls if name in named} == set()
        _, calls, _ = commands(redis, lambda: orders.push_many(range(8000)))
        assert calls["evalsha"] == 8

    def test_consuming_costs_little_more_than_a_turn_each(self, orders, redis):
        """Messages taken one by one: a turn for each, and two more for every 16."""
        orders.push_many(range(800))
        taken = 0

        def take():
            nonlocal taken
            for message in orders.consume():
                with message:
                    taken += 1
                if taken == 800:
                    break

        _, calls, _ = commands(redis, take)
        assert 800 <= calls["evalsha"] <= 800 * 1.2 + 40


class TestCare:
    def test_counts_are_sums(self, orders):
        """Everything counted is the sum over the partitions, the age that of the oldest."""
        orders.push_many(range(20))
        orders.push(1, delay="1h")
        taken = orders.pull(5)
        taken[0].dead("no")
        stats = orders.stats()
        assert (stats.ready, stats.scheduled, stats.leased, stats.dead, len(orders)) == (15, 1, 4, 1, 16)
        assert stats.oldest_age is not None
        assert stats.oldest_age >= max(part.stats().oldest_age or 0 for part in orders.parts) - 1
        assert repr(orders) == "<PartitionedQueue orders: 15 ready, 1 scheduled, 4 leased, 1 dead>"
        assert in_a_loop(orders, _both(orders)) == (stats.ready, 16)
        ack_all(taken[1:])

    def test_pause_holds_all_partitions(self, orders):
        """While it is paused nothing is taken from any partition; resumed, everything is."""
        orders.pause()
        orders.push_many(range(16))
        assert (orders.pull(16), orders.stats().paused) == ([], True)
        orders.resume()
        assert sorted(ack_all(orders.pull(16))) == list(range(16))

    def test_purge_spares_what_is_leased(self, orders):
        """Purge empties all partitions and says how many were there."""
        orders.push_many(range(30))
        taken = orders.pull(3)
        assert (orders.purge(), len(orders)) == (27, 0)
        ack_all(taken)

    def test_dead_letters_are_one_row_by_their_death(self, orders):
        """Dead letters of all partitions come oldest first; so many are put back, and those are the oldest."""
        orders.push_many(range(24))
        for message in orders.pull(24):
            message.dead("no")
        letters = list(orders.dead_letters())
        assert [letter.died_at for letter in letters] == sorted(letter.died_at for letter in letters)
        assert sorted(letter.payload for letter in letters) == sorted(b"%d" % n for n in range(24))
        assert orders.redrive(limit=5) == 5
        assert list(orders.dead_letters()) == letters[5:]
        back = orders.pull(24)
        assert {message.id for message in back} == {letter.id for letter in letters[:5]}
        ack_all(back)
        assert (orders.redrive(), orders.stats().dead, orders.purge()) == (19, 0, 19)
        with pytest.raises(ConfigurationError):
            orders.redrive(limit=-1)

    def test_the_awaitable_forms_do_the_same(self, orders):
        """Each twin on an event loop: dead letters in order, so many put back, paused, resumed, purged."""

        async def check():
            await orders.apush_many(range(12), expires="1h")
            for message in await orders.apull(12):
                await message.adead("no")
            letters = [letter async for letter in orders.adead_letters()]
            assert [letter.died_at for letter in letters] == sorted(letter.died_at for letter in letters)
            assert len(letters) == 12
            assert await orders.aredrive(limit=3) == 3
            assert [letter async for letter in orders.adead_letters()] == letters[3:]
            assert await orders.aredrive() == 9
            await orders.apause()
            assert (await orders.astats()).paused
            await orders.aresume()
            assert await orders.apurge() == 12
            await orders.apush(1)
            [message] = await orders.apull(1, wait="2s")
            await message.anack(delay=0)
            assert len([letter async for letter in orders.adead_letters()]) == 0

        in_a_loop(orders, check())


async def _both(queue):
    return (await queue.astats()).ready, await queue.alen()


class TestHandles:
    def test_a_handle_finds_its_partition(self, url, redis):
        """By a public id, status and cancel go to the partition it names; an id of one's own costs one look and one call."""
        with Conveyor(url) as app:
            orders = app.queue("orders", partitions=8)
            job = app.job(orders.push(1))
            assert (job.status(), job.cancel(), job.status()) == ("ready", "removed", "cancelled")
            for number in range(5):
                orders.push(number, id=f"own-{number}")
            orders.push(5, id="in a group", group="g")
            for id_ in (*(f"own-{number}" for number in range(5)), "in a group"):
                assert app.job(id_).status() == ("waiting" if id_ == "in a group" else "ready")
            _, calls, _ = commands(redis, lambda: app.job("own-3").status())
            assert (calls["smembers"], calls["evalsha"]) == (1, 1)
            assert app.job("own-3").cancel()
            with pytest.raises(JobNotFound):
                app.job("nobody").status()
            orders.purge()
            assert orders.pull(9) == []  # reaches the places of the cancelled ones

    def test_it_is_declared_once(self, url):
        """Another number of partitions in the same program is a mistake; the same one is the same queue."""
        with Conveyor(url) as app:
            orders = app.queue("orders", int, partitions=8)
            assert app.queue("orders", int, partitions=8) is orders
            with pytest.raises(ConfigurationError, match="declared twice"):
                app.queue("orders", int, partitions=4)
            with pytest.raises(ConfigurationError, match="declared twice"):
                app.queue("orders", int)
            assert app.client.queues() == []
