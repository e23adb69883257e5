"""The queue of the tests of partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conveyor.messaging.partitioned_queue import PartitionedQueue
from conveyor.store.client.client import Client
from support.partition_helpers import audits, clear, spread


@pytest.fixture
def orders(backend: Client) -> Iterator[PartitionedQueue[Any]]:
    """A queue with 8 partitions that must be in order, and hold nothing leased, when the test is over."""
    queue = spread(backend)
    yield queue
    assert audits(queue) == []
    clear(queue)
    assert (queue.stats().leased, queue.stats().workers) == (0, 0)
