"""Fixtures of the tests of the administration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conveyor.admin.admin import Admin
from conveyor.store.client.client import Client


@pytest.fixture
def backend(url: str) -> Iterator[Client]:
    """The access of a program to the emptied server."""
    backend = Client(url, namespace="t", retry_for=1)
    yield backend
    backend.close()


@pytest.fixture
def admin(backend: Client) -> Admin:
    """The administration over it."""
    return Admin(backend)
