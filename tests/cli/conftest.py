"""Fixtures of most tests of the command line: a shell, and the server behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conveyor.store.client.client import Client
from support.shell import Shell


@pytest.fixture
def shell(url: str, tmp_path: Path) -> Shell:
    """A shell in an empty directory, with the emptied server in its environment."""
    return Shell(tmp_path, url)


@pytest.fixture
def backend(url: str) -> Iterator[Client]:
    """A client of the emptied server, for what stands behind the commands."""
    backend = Client(url, retry_for=1)
    yield backend
    backend.close()
