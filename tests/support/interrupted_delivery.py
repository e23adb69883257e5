"""Deliveries of an outbox that are killed at a chosen step, and rows for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from conveyor.jobs.core import core_of
from conveyor.sql import Outbox
from conveyor.sql.delivery import OutboxDelivery
from conveyor.sql.drivers import DbapiConnection, StatementResult, adapt_blocking
from support.databases import Database
from support.ready_ids import bare


class ProcessKilled(BaseException):
    """Stands for the SIGKILL of the delivering process."""


class KillAtStep:
    """Raises `ProcessKilled` at the n-th step of a delivery: before it is carried out, or right after."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.left, self.after = at, after

    def step(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise ProcessKilled
        try:
            return work(*args, **options)
        finally:
            if self.left == 0:
                raise ProcessKilled


class InterruptedConnection(DbapiConnection):
    """A connection whose statements and commits are steps that may be the last."""

    def __init__(self, link: Any, killer: KillAtStep) -> None:
        super().__init__(link._connection, link._style, link.dialect)
        self.killer = killer

    def run(self, sql: str, *values: object) -> StatementResult:
        return self.killer.step(super().run, sql, *values)  # type: ignore[no-any-return]

    def commit(self) -> None:
        self.killer.step(super().commit)


def attempt(outbox: Outbox, database: Database, killer: KillAtStep, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Deliver until *killer* kills the process; return whether it did."""
    backend = outbox.app.client
    carry = backend.push_unbuffered
    connection = database.connect()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "push_unbuffered", lambda *args, **options: killer.step(carry, *args, **options))
            OutboxDelivery(core_of(outbox.app), outbox._table).deliver(
                InterruptedConnection(adapt_blocking(connection), killer)
            )
    except ProcessKilled:
        return True
    else:
        return False
    finally:
        connection.close()  # what was not committed is rolled back, as when the process ends


def fill(outbox: Outbox, database: Database, *names: str, count: int = 3, rounds: int = 1) -> dict[str, list[str]]:
    """Push to queues in turns, in one transaction; return the ids by queue."""
    ids: dict[str, list[str]] = {name: [] for name in names}
    with closing(database.connect()) as connection, outbox.transaction(connection):
        for _ in range(rounds):
            for name in names:
                queue = core_of(outbox.app).queues.get(name) or outbox.app.queue(name)
                ids[name] += bare(queue.push_many(range(count)))
    return ids
