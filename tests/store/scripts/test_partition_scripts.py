"""claim_partitions.lua, repartition.lua and partitions.lua, and the refusal of pushes and registrations with another number."""

from __future__ import annotations

import pytest

from conveyor.store import operations
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement
from conveyor.store.partitions import PartitionCountMismatch, claim_partitions, count, repartition
from support.seeded_queue import REST, SeededQueue, full

WHOLE = QueueKeys("c", "q")
PART = QueueKeys("c", "q/1", partitions=4)


@pytest.fixture
def part(seeded: SeededQueue) -> SeededQueue:
    """Partition 1 of a queue with four, claimed."""
    seeded.keys = PART
    seeded.run(claim_partitions(PART, 4, whole=False))
    return seeded


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("whole", [True, False])
def test_the_first_number_stands(seeded: SeededQueue, whole: bool) -> None:
    """A fresh queue takes the first number that comes, tells the same one so, refuses another, and changes no more."""
    assert seeded.run(claim_partitions(seeded.keys, 4, whole=whole)) is True
    assert seeded.dump() == {"conf": {"partitions": "4", "schema": "2"}}

    with seeded.unchanged():
        assert seeded.run(claim_partitions(seeded.keys, 4, whole=whole)) is False
        with pytest.raises(PartitionCountMismatch, match="has 4 partitions, but this program says 8") as refused:
            seeded.run(claim_partitions(seeded.keys, 8, whole=whole))
        assert (refused.value.recorded, refused.value.code) == (4, "E34")


def test_a_queue_that_was_used_without_partitions_has_one(seeded: SeededQueue) -> None:
    """A queue that was pushed to, or taken from, in one piece refuses a claim; a paused one that was not used does not."""
    seeded.pause()
    assert seeded.run(count(seeded.keys)) == (1, "")
    seeded.register("w")

    with seeded.unchanged(), pytest.raises(PartitionCountMismatch, match="has 1 partition, but this program says 4"):
        seeded.run(claim_partitions(seeded.keys, 4, whole=True))


@pytest.mark.redis6
@pytest.mark.parametrize(("there", "found"), [("4", 4), (None, None), ("0", 0)])
def test_a_push_with_another_number_stores_nothing(seeded: SeededQueue, there: str | None, found: int | None) -> None:
    """Both scripts that push, and a registration, refuse a number that is not the partition's, and change nothing."""
    keys = QueueKeys("c", "q/1", partitions=8)
    if there is not None:
        seeded.redis.hset(keys.conf, mapping={"partitions": there, "schema": "2"})
    for call in (
        operations.push(keys, seeded.lane, []),
        operations.push_plain(keys, seeded.lane, ["a", REST]),
        operations.register(keys, "w", 1000, b"{}"),
    ):
        with seeded.unchanged(), pytest.raises(PartitionCountMismatch) as refused:
            seeded.run(call)
        assert (refused.value.recorded, refused.value.queue) == (found, "q")


def test_a_push_without_partitions_is_refused_by_a_queue_that_has_them(seeded: SeededQueue) -> None:
    """A program that knows nothing of the partitions stores nothing beside them."""
    seeded.run(claim_partitions(seeded.keys, 4, whole=True))
    with seeded.unchanged(), pytest.raises(PartitionCountMismatch, match=r"app\.queue\('q', partitions=4\)"):
        seeded.push("a")
    with seeded.unchanged(), pytest.raises(PartitionCountMismatch):
        seeded.register("w")


@pytest.mark.parametrize("plain", [True, False])
def test_a_repeat_is_answered_whatever_the_number_is_now(part: SeededQueue, plain: bool) -> None:
    """A push that was accepted, and whose repeat comes after the number changed, is still answered as accepted."""
    made = operations.push_plain(PART, part.lane, ["a", REST]) if plain else operations.push(PART, part.lane, [])
    part.run(made)
    part.redis.hset(PART.conf, "partitions", "8")
    with part.unchanged():
        part.run(made)


# -- changing it ------------------------------------------------------------------------------------------------------


def _switch(seeded: SeededQueue, keys: QueueKeys, step: str, token: str, number: int | None) -> tuple[int, int]:
    return seeded.run(repartition(keys, step, token, number))


@pytest.mark.redis6
@pytest.mark.redis7
def test_begin_shuts_and_end_opens(seeded: SeededQueue) -> None:
    """Between begin and end no push, registration or claim is accepted; afterwards the number is that of end."""
    seeded.run(claim_partitions(WHOLE, 4, whole=True))
    assert _switch(seeded, WHOLE, "begin", "T", 8) == (1, 4)
    assert seeded.dump()["conf"] == {"partitions": "0", "switch": "4 8 T", "schema": "2"}
    assert seeded.run(count(WHOLE)) == (0, "4 8 T")
    with pytest.raises(PartitionCountMismatch, match="is being changed right now"):
        seeded.run(claim_partitions(WHOLE, 4, whole=True))

    with seeded.unchanged():
        assert _switch(seeded, WHOLE, "end", "other", 4) == (-1, 0)
    assert _switch(seeded, WHOLE, "end", "T", 8) == (1, 0)
    assert seeded.dump() == {"conf": {"partitions": "8", "schema": "2"}, "wake ~3600s": ["1"]}


@pytest.mark.redis6
@pytest.mark.redis7
def test_a_change_can_be_made_on_a_full_server(part: SeededQueue) -> None:
    """A change that begins, or has begun, when the server is full is brought to its end."""
    part.run(claim_partitions(WHOLE, 4, whole=True))
    part.register("w")
    with full(part.redis):
        assert _switch(part, WHOLE, "begin", "T", 2) == (1, 4)
        assert _switch(part, PART, "close", "T", 4) == (1, 4)
        assert _switch(part, PART, "open", "T", 2) == (1, 0)
        assert _switch(part, WHOLE, "end", "T", 2) == (1, 0)
    assert [part.run(count(keys)) for keys in (WHOLE, PART)] == [(2, "")] * 2


def test_one_piece_is_what_is_not_said(seeded: SeededQueue) -> None:
    """A queue that is laid in one piece again looks as one that never had partitions."""
    seeded.run(claim_partitions(WHOLE, 4, whole=True))
    _switch(seeded, WHOLE, "begin", "T", 1)
    _switch(seeded, WHOLE, "end", "T", 1)
    assert seeded.dump()["conf"] == {"schema": "2"}


def test_an_abandoned_change_is_taken_over(seeded: SeededQueue) -> None:
    """Starting a change that another started takes it over; the number before is still known, and the other owns nothing."""
    seeded.run(claim_partitions(WHOLE, 4, whole=True))
    _switch(seeded, WHOLE, "begin", "T", 8)
    assert _switch(seeded, WHOLE, "begin", "U", 2) == (1, 4)
    assert _switch(seeded, WHOLE, "end", "T", 8)[0] == -1
    assert _switch(seeded, WHOLE, "end", "U", 2) == (1, 0)


@pytest.mark.parametrize("place", ["ready", "scheduled", "leased", "dead", "cancelled"])
@pytest.mark.parametrize("step", ["begin", "close"])
def test_what_is_not_empty_stays_open(seeded: SeededQueue, place: str, step: str) -> None:
    """A job in any state, and even the place of a cancelled one, keeps the queue and a partition from being shut."""
    seeded.push("a")
    if place == "scheduled":
        seeded.redis.lpop(seeded.keys.ready[0])
        seeded.redis.zadd(seeded.keys.due, {"a": seeded.now() + 60_000})
    elif place == "cancelled":
        seeded.run(operations.cancel(seeded.keys, "a"))
    elif place != "ready":
        seeded.register("w")
        seeded.turn("w", 1, 1)
        if place == "dead":
            seeded.turn("w", 2, others=[Settlement("X", "a", state=b"1 1 0")])
    with seeded.unchanged():
        assert _switch(seeded, seeded.keys, step, "T", None if step == "close" else 4) == (0, 1)


def test_close_expects_the_number_it_knows(part: SeededQueue) -> None:
    """A partition that says another number than was expected is left alone; one that was shut already is shut again."""
    with part.unchanged():
        assert _switch(part, PART, "close", "T", 2) == (-1, 4)
    assert _switch(part, PART, "close", "T", 4) == (1, 4)
    assert _switch(part, PART, "close", "U", 4) == (1, 0)
    with part.unchanged():
        assert _switch(part, PART, "open", "T", 2)[0] == -1
    assert _switch(part, PART, "open", "U", 2) == (1, 0)
    assert part.dump()["conf"] == {"partitions": "2", "schema": "2"}


def test_close_sends_workers_away(part: SeededQueue) -> None:
    """A worker that holds nothing is struck off and called, so that it learns the new number when it comes again."""
    part.register("w")
    assert _switch(part, PART, "close", "T", 4) == (1, 4)

    state = part.dump()
    assert "workers" not in state
    assert "leased:w" not in state
    assert state["wake:w ~60s"] == ["1"]
    with pytest.raises(operations.WorkerUnregistered):
        part.turn("w", 1, 1)
