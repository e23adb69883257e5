"""A cause is what the next lease finds, on queues in random states with groups, limits and pauses. The seed of each run is printed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from conveyor import Conveyor
from conveyor.ids import new_id
from conveyor.jobs.why import Why
from conveyor.payload.records import write_envelope
from conveyor.store import inspection, limits, operations
from conveyor.store.operations import Entry, Settlement
from support.manual_worker import ManualWorker, drain

TASKS, GROUPS = ("a", "b"), ("g1", "g2", "g3")
LIMITS = (("1:api",), ("1:api:k1",), ("1:api:k2", "1:rate"), ("1:rate",), ("1:own:g1",), ())
SHUT = {"queue-paused", "task-paused", "group-paused", "limit", "group", "scheduled"}
STEPS = 30


class RandomQueue:
    """A queue to which random things happen, and a worker that knows its tasks."""

    def __init__(self, app: Conveyor, seed: int) -> None:
        self.app, self.random = app, random.Random(seed)
        self.worker = ManualWorker(app, "q")
        self.keys, self.run = self.worker.keys, app.client.run
        self.ids: list[str] = []
        self.held: list[str] = []
        self.paused: set[str] = set()
        declared = {"api": "c 2 k", "rate": "r 3 3600000 0 -", "own": "c 2 tenant"}
        self.run(limits.declare_limits(self.keys, declared, replace=False))

    def step(self) -> None:
        """Let one thing happen."""
        self.random.choice(
            (self.push, self.push, self.push, self.lease, self.settle, self.settle, self.pause, self.cancel)
        )()

    def push(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            task, group = self.random.choice(TASKS), self.random.choice((*GROUPS, None, None))
            entry = Entry(
                new_id(), write_envelope(task, b"{}"), priority=self.random.choice((0, 0, 0, 4)), group=group,
                limits=self.random.choice(LIMITS), delay_ms=3_600_000 if self.random.random() < 0.1 else None,
            )  # fmt: skip
            self.ids += self.app.client.push(self.keys, [entry])

    def lease(self) -> None:
        self.held += self.worker.take(self.random.choice((1, 2, 5)))

    def settle(self) -> None:
        if not self.held:
            return
        id_ = self.held.pop(self.random.randrange(len(self.held)))
        kind = self.random.choice(("D", "D", "F", "R"))
        settled = Settlement(kind, id_, 3_600_000 if kind == "R" else 0, state=b"" if kind == "D" else b"1 0 0")
        settled.attributes = self.worker.envelopes[id_].attributes
        self.worker.turn(0, settled)

    def pause(self) -> None:
        what = self.random.choice(("queue", *TASKS, *GROUPS))
        paused = what not in self.paused
        (self.paused.add if paused else self.paused.discard)(what)
        if what == "queue":
            self.run(operations.configure(self.keys, "paused", "1" if paused else ""))
        elif what in TASKS:
            self.run(limits.pause_task(self.keys, what, paused=paused))
        else:
            self.run(limits.set_group(self.keys, what, weight=None, paused=paused))

    def cancel(self) -> None:
        if self.ids:
            self.app.job(f"q:{self.random.choice(self.ids)}").cancel()

    def causes(self) -> dict[str, Why]:
        """Return why each job waits that does."""
        found = {}
        for id_ in self.ids:
            facts = self.run(inspection.why(self.keys, id_))
            if facts.job[0] in {"ready", "waiting", "scheduled"}:
                found[id_] = self.app.job(f"q:{id_}").why()
        return found

    def close(self) -> None:
        """Resume everything and end what is held."""
        for what in sorted(self.paused):
            if what == "queue":
                self.run(operations.configure(self.keys, "paused", ""))
            elif what in TASKS:
                self.run(limits.pause_task(self.keys, what, paused=False))
            else:
                self.run(limits.set_group(self.keys, what, weight=None, paused=False))
        for id_ in self.held:
            self.worker.turn(0, Settlement("D", id_, attributes=self.worker.envelopes[id_].attributes))
        self.worker.leave()


@pytest.fixture
def queues(app: Conveyor) -> Iterator[list[RandomQueue]]:
    made: list[RandomQueue] = []
    yield made
    for one in made:
        one.close()
    drain(app)
    app.client.execute("DEL", *(f"{app.client.keys('q').prefix}rate:{name}" for name in ("rate",)), key="q")


@pytest.mark.parametrize("seed", range(6))
def test_a_cause_is_what_the_next_lease_finds(app: Conveyor, queues: list[RandomQueue], seed: int) -> None:
    """No job is leased that was told a cause which shuts it out; and when a lease finds nothing, no job was told its position alone."""
    print("seed", seed)
    queue = RandomQueue(app, seed)
    queues.append(queue)
    for _ in range(STEPS):
        queue.step()
        told = queue.causes()
        taken = queue.worker.take(1000)
        queue.held += taken
        # A job of a group that several may run goes with the one before it.
        gone = {f"q:{id_}" for id_ in taken}
        shut = {id_: told[id_] for id_ in taken if told[id_].kind in SHUT and told[id_].behind not in gone}
        assert shut == {}, "leased, though it was told that something shuts it out"
        if not taken:
            free = [id_ for id_, why in told.items() if why.kind == "position"]
            assert free == [], "nothing was leased, though nothing was told to be in the way"
        assert app.client.run(inspection.audit(queue.keys)) == []
        for id_ in taken[: queue.random.randint(0, len(taken))]:
            queue.held.remove(id_)
            queue.worker.turn(0, Settlement("D", id_, attributes=queue.worker.envelopes[id_].attributes))
