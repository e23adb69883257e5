"""Fixtures of several tests of the worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conveyor.worker.shared_memory import ChildSlot, ChildSpec, SharedMemory
from support.running_worker import join_threads


@pytest.fixture
def slot() -> Iterator[ChildSlot]:
    """The slot of a child in the memory that it shares with a supervisor."""
    memory = SharedMemory(1)
    made = memory.slot(0)
    made.prepare(ChildSpec("shop:app", {}, 1, 1, burst=False, grace=1))
    yield made
    join_threads()
    memory.close()
