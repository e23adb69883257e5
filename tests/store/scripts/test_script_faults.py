"""Every script on a key of another type, on a full server, and after the server forgot the scripts."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from conveyor.errors import ConveyorError, QueueFull
from support.script_calls import CALLS, KEYS, PUSHES, READS, furnish, name_of
from support.script_faults import OpenSlot, Snapshot, plant, reached, refuse_each_command
from support.seeded_queue import SeededQueue, full
from support.server_dump import difference, exact
from testbed.server_groups import ClusterOfNodes
from testbed.server_process import find_binary


def spoil(seeded: SeededQueue, key: str) -> None:
    """Put a value of another type where *key* is; where it names a minute, in the next one as well, which may begin now."""
    place, stats, minute = key.rpartition("stats:")
    if stats and minute.isdigit():
        seeded.redis.set(f"{place}{stats}{int(minute) + 1}", "spoiled")
    kind = seeded.redis.type(key)
    seeded.redis.delete(key)
    if kind == b"string" or (kind == b"none" and any(part in key for part in (":lane:", ":unique:", ":result:"))):
        seeded.redis.rpush(key, "spoiled")
    else:
        seeded.redis.set(key, "spoiled")


@pytest.mark.row("I4")
def test_every_script_is_here() -> None:
    """No script is left out of the tests below."""
    folder = files("conveyor.store").joinpath("scripts")
    scripts = {path.name.removesuffix(".lua") for path in folder.iterdir() if path.is_file()}
    assert {make(KEYS).script.name for make, _ in CALLS.values()} == scripts


@pytest.mark.row("C28", "I4")
@pytest.mark.redis6
@pytest.mark.parametrize("name", CALLS)
def test_wrong_type_fails_with_nothing_written(seeded: SeededQueue, name: str) -> None:
    """With any key of another type a script fails before its first write, or never touches that key."""
    make, touched = CALLS[name]
    furnish(seeded)
    snapshot = Snapshot(seeded.redis)
    others = reached(seeded.redis, exact(seeded.redis).keys() - {"q"}, lambda: seeded.run(make(KEYS)))
    noticed = set()
    for key in sorted(touched | {name.removeprefix(KEYS.prefix) for name in others}):
        snapshot.restore()
        spoil(seeded, name_of(key, seeded))
        before = exact(seeded.redis)
        try:
            seeded.run(make(KEYS))
        except ConveyorError:
            noticed.add(key)
            assert exact(seeded.redis) == before, f"{name} wrote something before it failed on {key}"

    assert touched <= noticed


def untimed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without the events, whose ids are instants, but for their number."""
    return {key: len(value) if key.startswith("events") else value for key, value in content.items()}


@pytest.mark.row("C11", "C28")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("name", sorted(CALLS.keys() - PUSHES))
def test_full_server_still_drains(seeded: SeededQueue, name: str) -> None:
    """On a full server every script that accepts nothing does exactly what it does on one with room."""
    make, _ = CALLS[name]
    furnish(seeded)
    expected_reply = seeded.run(make(KEYS))
    expected = untimed(seeded.dump())
    seeded.redis.flushall(asynchronous=False)
    furnish(seeded)

    with full(seeded.redis):
        reply = seeded.run(make(KEYS))

    assert untimed(seeded.dump()) == expected
    if name not in {
        "turn",
        "idle_turn",
        "register",
        "list_jobs",
        "find_jobs",
        "find_jobs-tagged",
        "find_jobs-leased",
        "get_job",
        "counts",
        "count_queues",
        "workers",
        "why",
        "queue_causes",
        "watch_jobs",
        "leased_jobs",
    }:  # these tell the time
        in_order = sorted if name == "held_ids" else repr  # of a hash, which has none
        assert in_order(reply) == in_order(expected_reply)


@pytest.mark.row("C11", "I4", "I20")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("name", sorted(PUSHES))
@pytest.mark.standalone_only("sets the memory limit of one server")
def test_full_server_refuses_a_push_whole(seeded: SeededQueue, name: str) -> None:
    """On a full server a push raises QueueFull and leaves nothing, and with room again the same call succeeds."""
    make, _ = CALLS[name]
    furnish(seeded)
    call = make(KEYS)
    before = seeded.dump()
    with full(seeded.redis), seeded.unchanged(), pytest.raises(QueueFull, match="maxmemory"):
        seeded.run(call)

    seeded.run(call)
    changed = {"list_push": "q", "claim_partitions": "conf", "subscribe": "registry"}.get(name, "jobs")
    assert changed in seeded.since(before)
    assert seeded.audit() == []


@pytest.mark.row("C11")
@pytest.mark.redis6
@pytest.mark.redis7
def test_backlog_drains_on_a_full_server(seeded: SeededQueue) -> None:
    """A worker can register, lease and finish a whole backlog while the server takes nothing new."""
    seeded.push(*[f"{n:04}" for n in range(2500)])
    with full(seeded.redis):
        seeded.register("w")
        number, done = 0, []
        while True:
            number += 1
            done = seeded.turn("w", number, 1000, done=done).ids
            if not done:
                break

    assert number == 4
    assert seeded.redis.hlen(seeded.keys.jobs) == 0
    assert seeded.audit() == []


@pytest.mark.row("C101", "I4")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.standalone_only("makes a user, and reads with MONITOR what scripts send")
@pytest.mark.parametrize("name", CALLS)
def test_refused_command_refuses_whole_or_not_at_all(seeded: SeededQueue, url: str, name: str) -> None:
    """Whichever of its commands, or a channel, a user may not use: a script is refused whole, or done, and a repeat is whole."""
    make, _ = CALLS[name]
    furnish(seeded)
    renewed = {KEYS.workers} if name == "turn" else ()  # the lease of whoever asks may be renewed all the same
    refuse_each_command(seeded, url, make(KEYS), "resetchannels", renewed=frozenset(renewed))


@pytest.fixture(scope="module", params=["valkey", "redis7", "redis6"])
def nodes(request: pytest.FixtureRequest, directory: Path) -> Iterator[ClusterOfNodes]:
    """Three nodes of one kind of server."""
    if find_binary(request.param) is None:
        pytest.skip(f"{request.param}: this server is not installed")
    found = ClusterOfNodes(directory / f"slots-{request.param}", name=request.param, node_timeout_ms=15_000)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def slot(nodes: ClusterOfNodes) -> Iterator[OpenSlot]:
    """The slot of the queue, closed, at one of these nodes."""
    found = OpenSlot(nodes, KEYS)
    yield found
    found.close()


@pytest.mark.row("C22", "I4")
@pytest.mark.parametrize("name", CALLS)
def test_open_slot_refuses_whole_or_does_all(nodes: ClusterOfNodes, slot: OpenSlot, name: str) -> None:
    """While a slot moves, a script with all its keys at the old node, or some, or none, is refused whole, or done."""
    make, _ = CALLS[name]
    slot.client.flushall(asynchronous=False)
    seeded = SeededQueue(slot.client, nodes.url)
    furnish(seeded)
    call = make(KEYS)
    plant(seeded, call)
    assert seeded.audit() == []
    snapshot = Snapshot(slot.client)
    there = {key.decode() for key in slot.client.keys("*")}
    declared = [key for key in call.keys if key in there]
    assert set(call.keys) - there <= {KEYS.none}
    for moved in ((), sorted(there - set(call.keys)), declared[:1], declared[-1:], sorted(there)):
        snapshot.restore()
        with slot.opened(moved):
            before = slot.content()
            try:
                seeded.run(call)
            except ConveyorError:
                assert difference(before, slot.content()) == {}, f"refused half-way, with {moved} moved"
        if not moved:
            assert seeded.audit() == []
            seeded.run(call)  # nothing is in its way now
            assert seeded.audit() == []
    seeded.client.close()


@pytest.mark.parametrize("name", sorted(READS))
def test_reads_change_nothing(seeded: SeededQueue, name: str) -> None:
    """A read leaves every key as it was."""
    make, _ = CALLS[name]
    furnish(seeded)
    with seeded.unchanged():
        seeded.run(make(KEYS))


@pytest.mark.row("C14")
@pytest.mark.parametrize("name", ["push", "turn", "reap", "cancel-scheduled", "purge-ready"])
def test_forgotten_scripts_are_sent_again(seeded: SeededQueue, name: str) -> None:
    """After SCRIPT FLUSH a call has the effect it always has."""
    make, _ = CALLS[name]
    furnish(seeded)
    seeded.run(make(KEYS))
    expected = seeded.dump()
    seeded.redis.flushall(asynchronous=False)
    furnish(seeded)
    seeded.redis.script_flush()

    seeded.run(make(KEYS))

    assert seeded.dump() == expected


@pytest.mark.row("I4")
@pytest.mark.redis6
@pytest.mark.parametrize("name", sorted(CALLS.keys() - READS))
def test_call_sent_twice(seeded: SeededQueue, name: str) -> None:
    """Every step may be sent again when its reply was lost: no job is lost or doubled by it."""
    make, _ = CALLS[name]
    furnish(seeded)
    call = make(KEYS)
    first = seeded.run(call)
    live = seeded.redis.hkeys(seeded.keys.jobs)
    before = exact(seeded.redis)

    second = seeded.run(call)

    assert seeded.audit() == []
    if name == "list_intake":  # takes what is still there, and overwrites nothing
        assert (first, second) == (3, 1)
        assert set(live) < set(seeded.redis.hkeys(seeded.keys.jobs))
    elif name == "purge-ready":
        assert second == (0, 0)
    elif name == "command_worker":  # a worker that reads a command again gives the same answer
        command, again = seeded.redis.lrange(seeded.keys.wake_of("w"), -2, -1)
        assert command == again
    elif name not in {
        "turn",
        "idle_turn",
        "register",
        "heartbeat",
        "read_events",
    }:  # these renew a lease, or say until when
        assert exact(seeded.redis) == before
