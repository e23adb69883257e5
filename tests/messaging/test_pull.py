"""Explicit ends, pull and batches."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from conveyor.errors import LeaseLost
from conveyor.store import inspection
from support.message_fixtures import crash, first, until
from support.time_limits import AT_ONCE


class TestExplicit:
    def test_ack_is_confirmed_when_it_returns(self, queue):
        """Nothing is leased after it; a second time it is no longer ours."""
        queue.push(1)
        [message] = queue.pull()
        message.ack()
        assert queue.stats().leased == 0
        with pytest.raises(LeaseLost):
            message.ack()

    def test_nack(self, queue):
        """It comes back after the given delay, or by the backoff; each counts, and the last of the budget buries."""
        queue.push(1)
        [message] = queue.pull()
        message.nack(delay="1h")
        assert queue.stats().scheduled == 1
        queue.purge()
        queue.push(2)
        for attempt in (1, 2, 3):
            [message] = queue.pull(wait="2s")
            assert message.attempt == attempt
            message.nack()
        [letter] = queue.dead_letters()
        assert (letter.error, letter.attempts) == ("nack: refused by nack()", 3)

    def test_dead(self, queue):
        """A dead letter with its reason."""
        queue.push(1)
        [message] = queue.pull()
        message.dead("no such address")
        assert [letter.error for letter in queue.dead_letters()] == ["dead: no such address"]

    def test_extend(self, queue):
        """The message gets a lease of its own that outlives its consumer, more than once, and ends like any other."""
        queue.push_many([1, 2])
        consumer, message = first(queue)
        message.extend("1m")
        message.extend("5m")
        consumer.close()
        [member] = queue.client.run(inspection.workers(queue.keys))
        assert member.held == 1
        assert member.end > time.time() * 1000 + 200_000
        message.ack()
        [message] = queue.pull()
        message.extend("1m")
        with message:
            raise ValueError
        until(lambda: queue.stats().ready + queue.stats().scheduled == 1)

    def test_extend_when_lost(self, queue):
        """A lease that was given up cannot be extended."""
        queue.push(1)
        [message] = queue.pull()
        crash(queue, message)
        with pytest.raises(LeaseLost):
            message.extend("1m")

    def test_block_of_a_pulled_message(self, queue):
        """Its end is confirmed with the block."""
        queue.push_many([1, 2])
        for message in queue.pull(2):
            with message:
                pass
        assert queue.stats().leased == 0

    def test_pull_waits(self, queue):
        """Empty after its time, and leaves nothing behind."""
        begin = time.monotonic()
        assert queue.pull(3, wait="250ms") == []
        assert 0.2 < time.monotonic() - begin < AT_ONCE
        assert queue.pull() == []
        assert queue.stats().workers == 0


class TestBatches:
    def test_full_ones_and_the_rest_in_time(self, queue):
        """A batch is handed out full, or as it is some time after its first message came."""
        queue.push_many(range(25))
        sizes = []
        begin = time.monotonic()
        for batch in queue.batches(size=10, within="200ms"):
            sizes.append(len(batch))
            with batch as bodies:
                assert bodies == batch.bodies
            if sum(sizes) == 25:
                break
        assert sizes == [10, 10, 5]
        assert 0.15 < time.monotonic() - begin < AT_ONCE
        assert queue.stats().leased == 0

    def test_errors_nack_what_is_open(self, queue):
        """Messages settled one by one stay settled; the rest comes back in order."""
        queue.push_many(range(4))
        with closing(queue.batches(size=4, within=0)) as batches:
            batch = next(batches)
            with batch:
                batch[0].ack()
                batch[1].dead("x")
                raise ValueError
        stats = until(lambda: (s := queue.stats()).leased == 0 and s)
        assert (stats.ready + stats.scheduled, stats.dead) == (2, 1)

    def test_all_at_once(self, queue):
        """ack() of a batch is one round trip and takes what is open."""
        queue.push_many(range(4))
        with closing(queue.batches(size=4)) as batches:
            batch = next(batches)
            batch[0].extend("1m")
            batch.ack()
            assert queue.stats().leased == 0
