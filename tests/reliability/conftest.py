"""The fixture of the runs against models of queues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis as redis_py

from support.seeded_queue import SeededQueue


@pytest.fixture
def seeded(redis: redis_py.Redis, url: str) -> Iterator[SeededQueue]:
    """The queue that all runs of a test use; the server is empty afterwards."""
    found = SeededQueue(redis, url)
    yield found
    found.client.close()
    redis.flushall(asynchronous=False)
