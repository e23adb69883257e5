"""What every test of a script gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis as redis_py

from support.seeded_queue import Scene


@pytest.fixture
def scene(redis: redis_py.Redis, url: str) -> Iterator[Scene]:
    """An empty queue; what a test leaves in it is removed."""
    found = Scene(redis, url)
    yield found
    found.client.close()
    redis.flushall(asynchronous=False)
