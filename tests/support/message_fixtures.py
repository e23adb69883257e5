"""Fixtures and helpers of the tests of messages."""

from __future__ import annotations

import pytest

from conveyor.messaging.queue import Queue
from conveyor.messaging.retry import Retry
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client

FAST = Retry(attempts=3, backoff="10ms", jitter=False)


@pytest.fixture
def backend(url):
    """The app's access to the emptied server."""
    backend = Client(url)
    yield backend
    backend.close()


@pytest.fixture
def queue(backend):
    """A queue that must be in order, and hold nothing leased, when the test is over."""
    queue = Queue(backend, "mail", lease_ms=2000, retry=FAST)
    yield queue
    assert backend.run(inspection.audit(queue.keys)) == []
    queue.purge()
    queue.purge(dead=True)
    stats = queue.stats()
    assert (stats.ready, stats.leased, stats.workers) == (0, 0, 0)


def first(queue, **options):
    """Return a consumer that stays open, and the first message it yields."""
    consumer = queue.consume(**options)
    return consumer, next(consumer)


def crash(queue, message):
    """Return what *message*'s consumer has leased, as its supervisor does when it died."""
    return queue.client.run(operations.reap(queue.keys, message._settler.session.worker))
