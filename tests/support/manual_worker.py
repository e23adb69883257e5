"""A manual worker of an app's queue: leases jobs and settles them through the store's own operations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from conveyor.ids import new_identity
from conveyor.jobs.app import Conveyor
from conveyor.jobs.task import definition_of
from conveyor.payload.records import AttemptHistory, Envelope, Failure, Outcome, read_envelope, to_json
from conveyor.store import operations
from conveyor.store.operations import Settlement, TurnReply, TurnReport


class ManualWorker:
    """A registered worker that holds what it leased until a test settles it."""

    def __init__(self, app: Conveyor, queue: str = "default") -> None:
        self.client = app.client
        self.keys = app.client.keys(queue)
        self.worker = new_identity()
        self.number = 0
        self.envelopes: dict[str, Envelope] = {}
        self.client.run(operations.register(self.keys, self.worker, 60_000, operations.about()))

    def turn(self, want: int = 0, *others: Settlement, done: tuple[str, ...] = (), flags: str = "e") -> TurnReply:
        self.number += 1
        report = TurnReport(list(done), list(others))
        return self.client.run(operations.turn(self.keys, self.worker, self.number, want, 60_000, report, flags=flags))

    def take(self, want: int = 1) -> list[str]:
        """Lease up to *want* jobs and return their ids, first come first; `envelopes` has the rest."""
        turn = self.turn(want)
        self.envelopes.update((id_, read_envelope(data)) for id_, data in zip(turn.ids, turn.envelopes, strict=True))
        return turn.ids

    def done(self, id: str, *value: Any, keep_ms: int = 600_000) -> None:  # noqa: A002
        """Finish a job, with its value when there is one to keep."""
        record = to_json(Outcome("done", msgspec.Raw(to_json(value[0])))) if value else b""
        self._settle("D", id, keep_ms if value else 0, record)

    def plainly_done(self, *ids: str) -> None:
        """Finish jobs that keep nothing; they give back their unique keys."""
        report = TurnReport()
        for id_ in ids:
            report.add_done(id_, self.envelopes[id_].attributes)
        self._report(report)

    def unkept(self, *ids: str) -> None:
        """Finish jobs that returned a value which is not kept."""
        self._report(TurnReport(list(ids), results=dict.fromkeys(ids, (0, b""))))

    def dead(self, id: str, failure: Failure | None, crashes: int = 0) -> None:  # noqa: A002
        """Give a job up."""
        errors = [] if failure is None else [to_json(failure)]
        record = to_json(Outcome("dead", failure=failure, reason="gave up"))
        self._settle("X", id, 0, record, AttemptHistory(1, len(errors), crashes, errors).encode())

    def cancelled(self, id: str) -> None:  # noqa: A002
        """End a job as cancelled while it ran."""
        self._settle("C", id, 600_000, to_json(Outcome("cancelled")))

    def _settle(self, kind: str, id: str, ms: int, record: bytes, state: bytes = b"") -> None:  # noqa: A002
        envelope = self.envelopes[id]
        one = Settlement(kind, id, ms, record, state, envelope.attributes, envelope.own_id)
        assert self.turn(0, one).lost == []

    def leave(self) -> None:
        """Finish what is held and go."""
        while ids := self.client.run(operations.held_ids(self.keys, self.worker)):
            report = TurnReport()
            for id_ in ids:
                report.add_done(id_, self.envelopes[id_].attributes if id_ in self.envelopes else "")
            self._report(report)
        self.turn(0, flags="t")

    def _report(self, report: TurnReport) -> None:
        self.number += 1
        self.client.run(operations.turn(self.keys, self.worker, self.number, 0, 60_000, report, flags="e"))


class ServingWorker(ManualWorker):
    """A registered worker that says what it is, and which tasks it knows."""

    def __init__(
        self, app: Conveyor, queue: str = "default", tasks: tuple[str, ...] = (), kind: str = "worker", **facts: Any
    ) -> None:
        super().__init__(app, queue)
        self.client.run(operations.reap(self.keys, self.worker, crashed=False))
        about = operations.about(kind=kind, host="web-3", pid=4711, task_set=operations.task_set(tasks), **facts)
        self.client.run(operations.register(self.keys, self.worker, 60_000, about, tasks=tasks))
        self.number = int(time.time() * 1000) - 1_735_689_600_000  # as a worker's: the number of a turn is its instant


def arguments(app: Conveyor, envelope: Envelope) -> tuple[list[Any], dict[str, Any]]:
    """Return what the function would be called with."""
    return definition_of(app.tasks[envelope.task]).signature.decode(envelope.body)


def drain(app: Conveyor) -> None:
    """Empty all queues of *app*."""
    for queue in app.client.queues():
        keys = app.client.keys(queue)
        for place in ("rerun", "ready", "due", "dead"):
            while app.client.run(operations.purge(keys, place, 500))[0]:
                pass
        manual = ManualWorker(app, queue)
        assert manual.take(1000) == []
        manual.leave()
        app.client.execute("DEL", keys.wake, key=keys.wake)  # a token that no worker took


@pytest.fixture(name="manual")
def manual_worker(app: Conveyor) -> Iterator[ManualWorker]:
    """A manual worker of the app's default queue."""
    manual = ManualWorker(app)
    yield manual
    manual.leave()
