"""When the next turn leaves: before the jobs of the last one are made into attempts, where a queue is full."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor import Concurrency, Conveyor, Unique
from conveyor.store import operations
from conveyor.worker.leasing.capacity import Capacity
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, drain

JOBS = 4_000


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Let a worker hold as much ahead as it may; return how many jobs each turn leased, were held then, and if the next had left."""
    seen: list[tuple[int, int, bool]] = []
    take = QueueConsumer._take

    def noting(self: QueueConsumer, turn: operations.TurnReply, sent_at: float) -> None:
        seen.append((len(turn.ids), len(self.held), self.is_turning))
        take(self, turn, sent_at)

    monkeypatch.setattr(Capacity, "ahead", lambda *_: 1000)
    monkeypatch.setattr(QueueConsumer, "_take", noting)
    return seen


@pytest.mark.parametrize("kind", ["plain", "limited", "unique"])
async def test_the_server_works_while_jobs_are_taken(
    app: Conveyor, taken: list[tuple[int, int, bool]], kind: str
) -> None:
    """The next turn leaves before the jobs of the last one are made into attempts, and never brings more than may be held."""
    options: dict[str, Any] = {
        "plain": {},
        "limited": {"limits": [Concurrency(2000)]},
        "unique": {"unique": Unique(by=("number",))},
    }[kind]
    ran: list[int] = []

    async def note(number: int) -> None:
        ran.append(number)

    task: Any = app.task(**options)(note)
    await app.aenqueue_many([task.s(number) for number in range(JOBS)])
    await drain(app)
    assert ran == [*range(JOBS)]
    assert sum(count for count, _, _ in taken) == JOBS
    # Neither the first, before which it is not known how jobs go, nor those that tell of the end of the queue.
    full = [is_turning for count, _, is_turning in taken[1:] if count == 500]
    assert len(full) >= 3
    assert sum(full) >= len(full) - 1
    assert max(count + held for count, held, _ in taken) <= operations.MOST_HELD
    assert await audit(app) == []


async def test_jobs_that_report_first_are_taken_before_the_next_turn(
    app: Conveyor, taken: list[tuple[int, int, bool]]
) -> None:
    """No turn leaves before the acks of jobs that may start only after them are in it."""
    ran: list[int] = []

    @app.task(ack="early")
    async def note(number: int) -> None:
        ran.append(number)

    await app.aenqueue_many([note.s(number) for number in range(JOBS)])
    await drain(app)
    assert sorted(ran) == [*range(JOBS)]
    assert [is_turning for _, _, is_turning in taken if is_turning] == []
    assert await audit(app) == []
