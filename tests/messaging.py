"""What the tests of messages share."""

from __future__ import annotations

import time

from conveyor.outcome import Retry
from conveyor.store import operations

FAST = Retry(attempts=3, backoff="10ms", jitter=False)


def until(check, seconds=4.0):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


def first(queue, **options):
    """Take one message with a consumer that goes on."""
    consumer = queue.consume(**options)
    return consumer, next(consumer)


def crash(queue, message):
    """Return what *message*'s holder has leased, as its supervisor does when it died."""
    return queue.backend.run(operations.reap(queue.keys, message._holder.lessee.worker))
