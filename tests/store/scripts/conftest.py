"""The fixture of every test of a script."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis as redis_py

from conveyor.acting import acting_as
from support.seeded_queue import SeededQueue


@pytest.fixture
def seeded(redis: redis_py.Redis, url: str) -> Iterator[SeededQueue]:
    """An empty queue, on which ada acts; what a test leaves in it is removed."""
    found = SeededQueue(redis, url)
    with acting_as("ada"):
        yield found
    found.client.close()
    redis.flushall(asynchronous=False)
