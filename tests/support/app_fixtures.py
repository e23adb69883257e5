"""
Fixtures of an app that a test file takes in place of the `app` of conftest.py, by importing them.

The one of conftest.py runs what is left in its queues when a test is over, which most tests on an event loop do not want.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from conveyor import Conveyor
from support.manual_worker import drain


@pytest.fixture(name="app")
async def loop_app(url: str) -> AsyncIterator[Conveyor]:
    """An app on the emptied server, closed on the event loop of the test."""
    app = Conveyor(url)
    yield app
    await app.aclose()


@pytest.fixture(name="app")
async def emptied_loop_app(url: str) -> AsyncIterator[Conveyor]:
    """Another such app, whose default queue is emptied when the test is over."""
    app = Conveyor(url)
    yield app
    await app.aclose()
    await asyncio.to_thread(drain, app)


@pytest.fixture(name="app")
def blocking_app(url: str) -> Iterator[Conveyor]:
    """An app on the emptied server, for blocking calls."""
    with Conveyor(url) as app:
        yield app


@pytest.fixture(name="client")
def blocking_client(url: str) -> Iterator[Conveyor]:
    """Another app on the emptied server, for blocking calls."""
    with Conveyor(url) as app:
        yield app
