"""Every script on a key of another type, on a full server, and after the server forgot the scripts."""

from __future__ import annotations

from importlib.resources import files

import pytest

from conveyor.errors import ConveyorError, QueueFull
from support.script_calls import CALLS, KEYS, PUSHES, READS, furnish, name_of
from support.seeded_queue import Scene, full
from support.server_dump import exact


def spoil(scene: Scene, key: str) -> None:
    """Put a value of another type where *key* is."""
    kind = scene.redis.type(key)
    scene.redis.delete(key)
    if kind == b"string" or (kind == b"none" and any(part in key for part in (":lane:", ":unique:", ":result:"))):
        scene.redis.rpush(key, "spoiled")
    else:
        scene.redis.set(key, "spoiled")


@pytest.mark.row("I4")
def test_every_script_is_here() -> None:
    """No script is left out of the tests below."""
    folder = files("conveyor.store").joinpath("scripts")
    scripts = {path.name.removesuffix(".lua") for path in folder.iterdir() if path.is_file()}
    assert {make(KEYS).script.name for make, _ in CALLS.values()} == scripts


@pytest.mark.row("C28", "I4")
@pytest.mark.redis6
@pytest.mark.parametrize("name", CALLS)
def test_wrong_type_fails_with_nothing_written(scene: Scene, name: str) -> None:
    """With any key of another type a script fails before its first write, or never touches that key."""
    make, touched = CALLS[name]
    furnish(scene)
    others = {key.removeprefix(KEYS.prefix) for key in exact(scene.redis)} - {"q"}
    noticed = set()
    for key in sorted(touched | others):
        scene.redis.flushall(asynchronous=False)
        furnish(scene)
        spoil(scene, name_of(key, scene))
        before = exact(scene.redis)
        try:
            scene.run(make(KEYS))
        except ConveyorError:
            noticed.add(key)
            assert exact(scene.redis) == before, f"{name} wrote something before it failed on {key}"

    assert touched <= noticed


@pytest.mark.row("C11", "C28")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("name", sorted(CALLS.keys() - PUSHES))
def test_full_server_still_drains(scene: Scene, name: str) -> None:
    """On a full server every script that accepts nothing does exactly what it does on one with room."""
    make, _ = CALLS[name]
    furnish(scene)
    expected_reply = scene.run(make(KEYS))
    expected = scene.dump()
    scene.redis.flushall(asynchronous=False)
    furnish(scene)

    with full(scene.redis):
        reply = scene.run(make(KEYS))

    assert scene.dump() == expected
    if name not in {"turn", "register", "list_jobs", "get_job", "counts", "workers"}:  # these tell the time
        in_order = sorted if name == "held_ids" else repr  # of a hash, which has none
        assert in_order(reply) == in_order(expected_reply)


@pytest.mark.row("C11", "I4", "I20")
@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("name", sorted(PUSHES))
@pytest.mark.standalone_only("sets the memory limit of one server")
def test_full_server_refuses_a_push_whole(scene: Scene, name: str) -> None:
    """On a full server a push raises QueueFull and leaves nothing, and with room again the same call succeeds."""
    make, _ = CALLS[name]
    furnish(scene)
    call = make(KEYS)
    before = scene.dump()
    with full(scene.redis), scene.unchanged(), pytest.raises(QueueFull, match="maxmemory"):
        scene.run(call)

    scene.run(call)
    assert {"list_push": "q", "push": "jobs", "push_plain": "jobs", "claim_partitions": "conf"}[name] in scene.since(
        before
    )
    assert scene.audit() == []


@pytest.mark.row("C11")
@pytest.mark.redis6
@pytest.mark.redis7
def test_backlog_drains_on_a_full_server(scene: Scene) -> None:
    """A worker can register, lease and finish a whole backlog while the server takes nothing new."""
    scene.push(*[f"{n:04}" for n in range(2500)])
    with full(scene.redis):
        scene.register("w")
        number, done = 0, []
        while True:
            number += 1
            done = scene.turn("w", number, 1000, done=done).ids
            if not done:
                break

    assert number == 4
    assert scene.redis.hlen(scene.keys.jobs) == 0
    assert scene.audit() == []


@pytest.mark.parametrize("name", sorted(READS))
def test_reads_change_nothing(scene: Scene, name: str) -> None:
    """A read leaves every key as it was."""
    make, _ = CALLS[name]
    furnish(scene)
    with scene.unchanged():
        scene.run(make(KEYS))


@pytest.mark.row("C14")
@pytest.mark.parametrize("name", ["push", "turn", "reap", "cancel-scheduled", "purge-ready"])
def test_forgotten_scripts_are_sent_again(scene: Scene, name: str) -> None:
    """After SCRIPT FLUSH a call has the effect it always has."""
    make, _ = CALLS[name]
    furnish(scene)
    scene.run(make(KEYS))
    expected = scene.dump()
    scene.redis.flushall(asynchronous=False)
    furnish(scene)
    scene.redis.script_flush()

    scene.run(make(KEYS))

    assert scene.dump() == expected


@pytest.mark.row("I4")
@pytest.mark.redis6
@pytest.mark.parametrize("name", sorted(CALLS.keys() - READS))
def test_call_sent_twice(scene: Scene, name: str) -> None:
    """Every step may be sent again when its reply was lost: no job is lost or doubled by it."""
    make, _ = CALLS[name]
    furnish(scene)
    call = make(KEYS)
    first = scene.run(call)
    live = scene.redis.hkeys(scene.keys.jobs)
    before = exact(scene.redis)

    second = scene.run(call)

    assert scene.audit() == []
    if name == "list_intake":  # takes what is still there, and overwrites nothing
        assert (first, second) == (3, 1)
        assert set(live) < set(scene.redis.hkeys(scene.keys.jobs))
    elif name == "purge-ready":
        assert second == (0, 0)
    elif name not in {"turn", "register", "heartbeat"}:  # these renew a lease
        assert exact(scene.redis) == before
