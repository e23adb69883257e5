"""When the next turn leaves: before the jobs of the last one are made into attempts, where a queue is full."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conveyor import Concurrency, Conveyor, Unique
from conveyor.store import operations
from conveyor.worker.leasing.capacity import Capacity, PartitionGroup
from conveyor.worker.leasing.queue_consumer import QueueConsumer
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, drain

JOBS = 4_000


class Parts(SimpleNamespace):
    """Parts of a worker, as far as the number of jobs to lease depends on them."""

    def __hash__(self) -> int:
        return id(self)


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


def test_a_slow_server_makes_no_smaller_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace at which jobs end is no measure of a worker that had none left when the reply came; one that had some is slower now."""
    now = 0.0
    monkeypatch.setattr("conveyor.worker.leasing.capacity.perf_counter", lambda: now)
    parts: Any = Parts(free=100, stopping=False, is_limited=False)
    capacity = Capacity(parts, parts, parts)
    consumer: Any = Parts(
        group=PartitionGroup(1.0),
        backlog=0,
        held=(),
        report=operations.TurnReport(),
        job_size=Parts(max_jobs=500),
    )
    capacity.note_work(consumer, possible=True)

    def room_after(ended: int) -> int:
        nonlocal now
        now += 0.1
        capacity.finished += ended
        return capacity.room(consumer, coming=100)

    assert room_after(500) == 250  # 5,000 a second: 50 ms of them, beside free slots, and less those that come
    assert [room_after(50) for _ in range(5)] == [250] * 5
    capacity.note_backlog(consumer, 100)
    assert room_after(50) < 200
