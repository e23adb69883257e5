"""A worker of one queue on a `Client`: a test calls its every step, with the same calls as a real worker."""

from __future__ import annotations

import time

import pytest

from conveyor.ids import new_id, new_identity, public, split
from conveyor.payload import records
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.operations import Entry, Settlement, TurnReport

LEASE_MS = 60_000


class ClientWorker:
    """One registered worker of one queue. Ids are public ones."""

    def __init__(self, backend: Client, queue: str) -> None:
        self.client, self.queue, self.keys = backend, queue, backend.keys(queue)
        self.identity, self.number = new_identity(), 0
        about = operations.about(host="testhost", pid=4711)
        backend.run(operations.register(self.keys, self.identity, LEASE_MS, about))

    def take(self, want: int = 1) -> list[str]:
        """Lease up to *want* jobs."""
        return [public(self.queue, id_) for id_ in self._turn(want, TurnReport()).ids]

    def succeed(self, public_id: str, value: bytes = b"null", *, keep_ms: int = 60_000, ran_ms: int = 5) -> None:
        """End a leased job with a result, as a worker writes it."""
        id_ = split(public_id)[1]
        record = records.to_json({"status": "done", "value": records.msgspec.Raw(value), "at": 1_700_000_000_000})
        recent = recent_entry(id_, "done", ran_ms)
        self._turn(0, TurnReport(others=[Settlement("D", id_, keep_ms, record)], recent=[recent]))

    def fail(self, public_id: str, message: str = "no", *, kind: str = "ValueError") -> None:
        """Make a leased job a dead letter after its first attempt."""
        id_ = split(public_id)[1]
        failure = records.Failure(1, 1_700_000_000_000, kind, message, "", f"Traceback: {message}", "testhost")
        state = records.AttemptHistory(1, 1, 0, [records.to_json(failure)])
        record = records.to_json(records.Outcome("dead", failure=failure, reason="all 1 attempts failed"))
        self._turn(0, TurnReport(others=[Settlement("X", id_, 0, record, state.encode())]))

    def _turn(self, want: int, report: TurnReport) -> operations.TurnReply:
        self.number = operations.next_turn_number(self.number, time.time_ns() // 1_000_000)
        return self.client.run(operations.turn(self.keys, self.identity, self.number, want, LEASE_MS, report))


def recent_entry(id_: str, status: str, ran_ms: int) -> bytes:
    """Return an entry of the recently finished."""
    from conveyor.store.inspection import write_finished

    return write_finished(id_, "shop.send", status, 1_700_000_000_000, ran_ms)


def push(backend: Client, queue: str, *bodies: bytes, task: str = "", **options: object) -> list[str]:
    """Push jobs; return their public ids."""
    own = options.pop("id", None)
    entries = [
        Entry(str(own) if own else new_id(), records.write_envelope(task, body), own_id=bool(own), **options)  # type: ignore[arg-type]
        for body in bodies
    ]
    return [public(queue, id_) for id_ in backend.push(backend.keys(queue), entries)]


def dead(backend: Client, queue: str, *messages: str, task: str = "") -> list[str]:
    """Push jobs and let each fail for good; return their public ids, oldest death first."""
    ids = []
    worker = ClientWorker(backend, queue)
    for message in messages:
        push(backend, queue, b"1", task=task)
        taken = worker.take()
        worker.fail(taken[0], message)
        ids += taken
    backend.run(operations.reap(worker.keys, worker.identity))
    return ids


def wait_for_job(worker: ClientWorker) -> str:
    """Lease the next job that arrives; return its public id."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if taken := worker.take():
            return taken[0]
        time.sleep(0.02)
    raise AssertionError("no job arrived")


def recorded_steps(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that from now on gets the name of each script that *client* runs, in their order."""
    steps, run, run_each = list[str](), client.run, client.run_each

    def recorded(call, **options):  # type: ignore[no-untyped-def]
        steps.append(call.script.name)
        return run(call, **options)

    def each_recorded(calls):  # type: ignore[no-untyped-def]
        steps.extend(call.script.name for call in calls)
        return run_each(calls)

    monkeypatch.setattr(client, "run", recorded)
    monkeypatch.setattr(client, "run_each", each_recorded)
    return steps
