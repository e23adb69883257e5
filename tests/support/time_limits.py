"""Tests of what happens at once: nothing that looks by a clock may do it instead."""

from __future__ import annotations

import pytest

from conveyor.messaging.leases import LeaseSession
from conveyor.worker.leasing import list_intake
from conveyor.worker.leasing.wakeup import WorkerConnections

PATIENCE = 60.0
"""Seconds that a test waits for what must come: more than a busy machine takes, and less than `LATER`."""
LATER = 90.0
"""Seconds after which a periodic look comes where `only_when_woken` has put it off."""


@pytest.fixture
def only_when_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let workers and consumers of this process look for work only when they are woken, or at an instant that they know.

    Then what starts at all has started without waiting for a periodic look, however late a busy machine runs it.
    """
    monkeypatch.setattr(WorkerConnections, "tick", lambda _: None)
    monkeypatch.setattr(list_intake, "BLOCK", LATER)
    monkeypatch.setattr(LeaseSession, "wait", _until_due)


def _until_due(session: LeaseSession) -> float:
    return LATER if session.due_at is None else max(0.001, session.due_at + 0.001 - session.clock())
