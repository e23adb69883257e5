"""Steps of spawned jobs, one by one: end a job with followers, deliver them, lease what arrived."""

from __future__ import annotations

from conveyor import Conveyor
from conveyor.jobs.core import core_of
from conveyor.messaging import outbox
from conveyor.store import operations
from conveyor.store.operations import Settlement
from conveyor.worker.leasing.spawn_delivery import deliver
from support.manual_worker import ManualWorker


def entry(app: Conveyor, queue: str, n: int) -> bytes:
    """Return what an outbox keeps of a follower, here one that leaves no trace of its id when it has ended."""
    _, prepared = outbox.read(app.tasks["family.follower"].s(n).follow()[1])
    prepared.own_id = False
    return outbox.write(queue, prepared)


def settle(app: Conveyor, followers: list[tuple[str, int]], *, reaped: bool = False) -> ManualWorker:
    """End a job that spawned these, as a worker that does no more than that; or as one that lost its lease before."""
    app.tasks["family.parent"].enqueue(0)
    manual = ManualWorker(app)
    (id_,) = manual.take(1)
    if reaped:
        app.client.run(operations.reap(manual.keys, manual.worker))
    spawned = [Settlement("S", id_, record=entry(app, queue, n)) for queue, n in followers]
    manual.turn(0, *spawned, Settlement("D", id_), flags="t")
    return manual


def take_all(app: Conveyor, queue: str) -> list[int]:
    """Lease and finish all of a queue; return the numbers in their order."""
    manual = ManualWorker(app, queue)
    ids = manual.take(1000)
    found = [int(manual.envelopes[id_].body.strip(b'{"n:}[]')) for id_ in ids]
    manual.turn(0, done=tuple(ids), flags="t")
    return found


async def emptied(app: Conveyor) -> int:
    """Deliver until nothing is left; return how many batches there were."""
    count = 0
    try:
        while await deliver(app.client.keys("default"), core_of(app)):
            count += 1
    finally:
        await app.client.aclose()
    return count
