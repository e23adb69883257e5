"""A queue with something in every key, and for each script a call that touches as much of it as it can."""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import Any

from msgspec.structs import replace

from conveyor.messaging import outbox
from conveyor.payload.records import EnvelopeOptions, write_envelope
from conveyor.store import (
    inspection,
    limits,
    operations,
    partitions,
    plain_list,
    queue_events,
    schedules,
    streams,
    topics,
    worker_commands,
)
from conveyor.store.job_filter import JobFilter, Walk
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Entry, ProducerSequence, Settlement, TurnReport
from conveyor.store.script import Call
from conveyor.store.topics import TopicCopies, TopicKeys
from conveyor.store.worker_commands import WorkerCommand
from support.seeded_queue import REST, SeededQueue, entry

KEYS = QueueKeys("c", "q", foreign="q")
REACHED = 4_000_000_000_000
"""The instant that the schedule has reached."""
PARTS = streams.write_parts(1, 2, [b"2", b"33"], 2)
"""The second and third part of the stream of a first attempt."""
TOPICS = TopicKeys("c")
# In the slot of the queue, so that one slot can be opened for all.
TOPICS.prefix, TOPICS.registry, TOPICS.counts = KEYS.prefix, KEYS.prefix + "registry", KEYS.prefix + "counts"


def furnish(seeded: SeededQueue) -> None:
    """Make jobs in every place and priority, a suspect, a stub, two workers, cancel requests, and processes that wait."""
    seeded.lane = ProducerSequence("L")
    seeded.push(entry("d1", priority=3, unique="kd", own_id=True, tags=("a",)), entry("d2"))
    seeded.register("w", "v")
    seeded.turn("v", 1, 2)
    dead = [Settlement("X", id_, state=b"2 2 0\n{}") for id_ in ("d1", "d2")]
    seeded.turn("v", 2, others=dead, report=TurnReport([], dead, {"t:done": 1}, [b"d1\tt\tdead\t1\t1"]))
    seeded.push("h1", entry("h2", priority=4, unique="kh", own_id=True, tags=("a", "b")), "h3", "h4", "h5", "h6", "h7")
    seeded.turn("w", 1, 7)
    seeded.push("v1", "v2")
    seeded.turn("v", 3, 2)
    seeded.push("r1", entry("r2", priority=5), "x1", entry("r3", unique="kr", own_id=True, tags=("b",)))
    seeded.push(entry("s1", priority=2, delay_ms=60_000, own_id=True, tags=("a",)), _pinned("s2"))
    seeded.push(entry("s3", priority=7, delay_ms=60_000))
    seeded.run(operations.cancel(seeded.keys, "x1"))
    for id_ in ("h3", "v1"):
        seeded.run(operations.cancel(seeded.keys, id_))
    seeded.redis.hset(seeded.keys.state, mapping={"h1": "1 1 0", "h4": "3 0 1", "v2": "1 0 1", "r1": "1 1 0"})
    for id_ in ("h1", "h2", "h3", "h4", "s1", "r1", "r2", "v1", "d1"):
        seeded.run(operations.await_result(seeded.keys, id_, f"channel-{id_}"))
    seeded.redis.set(seeded.keys.result("old"), "{}", ex=600)
    seeded.redis.hset(seeded.keys.result_window("h1-old"), "h1-old", "1\n{}")
    seeded.redis.expire(seeded.keys.result_window("h1-old"), 600)
    seeded.redis.xadd(seeded.keys.stream("h1"), {"v": "1"}, id="1-1")
    seeded.redis.xadd(seeded.keys.events, {"e": "done", "j": "old"}, id="1-1")
    seeded.redis.expire(seeded.keys.events, 600)
    seeded.redis.zadd(seeded.keys.event_readers, {"channel": 9e14})
    seeded.redis.expire(seeded.keys.event_readers, 600)
    seeded.redis.hset(seeded.keys.conf, "events", 100)
    seeded.redis.pexpire(seeded.keys.stream("h1"), 600_000)
    seeded.redis.rpush(seeded.keys.intake, "1", "2")
    seeded.redis.rpush("q", "3", "4")
    seeded.redis.zadd(seeded.keys.due, {"s3": 1})
    seeded.redis.rpush(seeded.keys.outbox, outbox.write("other", entry("o1")), outbox.write("other", entry("o2")))
    seeded.redis.hset(seeded.keys.conf, "outbox", "5 1")
    seeded.redis.hset(TOPICS.registry, mapping={"version": "v", "shapes": "a.*", "=t.*": "q other", "=t.x": "q"})
    seeded.redis.hset(TOPICS.counts, "+t.x", 1)
    seeded.run(schedules.put_schedule(seeded.keys, "timer", "digest", b"{}", b"", "data", REACHED))
    problems = seeded.audit()
    assert problems == [], problems


def _pinned(id_: str) -> Entry:
    """Return a scheduled job that only workers of build v1 may run."""
    return Entry(id_, write_envelope("", b"1", EnvelopeOptions(pin="v1")), delay_ms=90_000)


def _turn(keys: QueueKeys) -> Call[Any]:
    others = [
        Settlement("D", "h2", ms=60_000, record=b"{}", attributes="\tukh\tta\ttb", own_id=True),
        Settlement("R", "h3", ms=60_000, state=b"1 1 0"),
        Settlement("F", "h4", state=b"4 0 1"),
        Settlement("X", "h5", state=b"1 1 0", record=b"{}"),
        Settlement("M", "h6", state=b"1 0 1"),
        Settlement("K", "h6"),
        Settlement("E", "h6", ms=60_000, record=PARTS),
        Settlement("R", "h7", ms=60_000, record=b"lgpu", state=b"1 1 0"),
    ]
    results = {"h1": (60_000, b"{}")}
    report = TurnReport(["h1"], others, {"t:done": 2}, [b"h1\tt\tdone\t1\t1"], results=results)
    return operations.turn(keys, "w", 2, 3, 60_000, report, flags="l")


def _push(keys: QueueKeys) -> Call[Any]:
    entries = [
        entry("n1"),
        entry("n2", priority=5, unique="kn", own_id=True, tags=("a", "n")),
        entry("n3", delay_ms=60_000),
    ]
    return operations.push(keys, ProducerSequence("N"), entries, max_length=100)


def _copies(keys: QueueKeys) -> TopicCopies:
    entries = [entry("n1"), entry("n2", priority=5, unique="kn", own_id=True), entry("n3", delay_ms=60_000)]
    return TopicCopies(keys, entries, 100)


def _publish(keys: QueueKeys) -> Call[Any]:
    return topics.publish(TOPICS, ProducerSequence("N"), "t.x", "v", 3, [_copies(keys)])


def _unversioned(call: Call[Any]) -> Call[Any]:
    """Return a change of subscriptions with a version that is the same each time."""
    return replace(call, args=(*call.args[:2], "w", *call.args[3:]))


def _publish_from(keys: QueueKeys) -> Call[Any]:
    return topics.publish_from(ProducerSequence("N"), "t.x", _copies(keys), [outbox.write("other", entry("o1"))])


def _fire(keys: QueueKeys) -> Call[Any]:
    row = schedules.ScheduleRow("timer", "digest", b"", b"", "data", REACHED, False, "", 0, 0, [], 0, {})
    return schedules.fire_schedule(keys, row, REACHED + 1000, entry("n4", priority=5), alone=True, max_length=100)


def _withdraw(keys: QueueKeys) -> Call[Any]:
    withdrawal = _push(keys).withdrawal()
    assert withdrawal is not None
    return withdrawal


#: name → the call, and the keys whose wrong type it must notice before it writes
CALLS: dict[str, tuple[Callable[[QueueKeys], Call[Any]], set[str]]] = {
    "push": (_push, {"lane:N", "jobs", "conf", "due", "dead", "ready:0", "ready:5", "unique:k:kn", "unique:i:n2", "tag:a"}),
    "push_plain": (
        lambda k: operations.push_plain(k, ProducerSequence("N"), ["n1", REST, "n2", REST], max_length=100),
        {"lane:N", "jobs", "conf", "dead", "ready:0"},
    ),
    "publish": (
        _publish, {"jobs", "conf", "due", "dead", "ready:0", "ready:5", "unique:k:kn", "unique:i:n2"}
        | {"lane:N", "registry"},
    ),
    "publish-from": (
        _publish_from,
        {"lane:N", "jobs", "conf", "due", "dead", "outbox", "ready:0", "ready:5", "unique:k:kn", "unique:i:n2"},
    ),
    "subscribe": (lambda _: topics.subscribe(TOPICS, "a.*", ["q", "p"]), {"registry"}),
    "unsubscribe": (lambda _: _unversioned(topics.unsubscribe(TOPICS, "t.*", ["q"])), {"registry"}),
    "leave-topics": (lambda _: _unversioned(topics.leave(TOPICS, "q")), {"registry"}),
    "subscribers": (lambda _: topics.subscribers(TOPICS, "t.x"), {"registry"}),
    "list_push": (lambda k: plain_list.push(k, ProducerSequence("N"), [b"1", b"2"]), {"lane:N", "foreign"}),
    "withdraw": (_withdraw, {"lane:N"}),
    "turn": (
        _turn,
        {"jobs", "state", "leased:w", "workers", "conf", "due", "dead", "recent", "waiters", "stats", "results:h1"}
        | {f"ready:{n}" for n in range(10)},
    ),
    "register": (lambda k: operations.register(k, "u", 60_000, b"{}"), {"leased:u", "workers", "conf"}),
    "heartbeat": (lambda k: operations.heartbeat(k, "w", 60_000), {"leased:w", "workers"}),
    "idle_turn": (
        lambda k: operations.idle_turn([(k, "w", 60_000, True)]), {"workers", "leased:w", "due"},
    ),
    "reap": (
        lambda k: operations.reap(k, "w"), {"leased:w", "workers", "jobs", "state", "waiters", "ready:0", "ready:4"},
    ),
    "leave": (lambda k: operations.reap(k, "v", crashed=False), {"leased:v", "workers", "jobs", "state", "ready:0"}),
    "extend": (
        lambda k: operations.extend(k, "w", "h3", "u", 60_000, b"{}"), {"leased:w", "leased:u", "workers"},
    ),
    "held_ids": (lambda k: operations.held_ids(k, "w"), {"leased:w"}),
    "cancel-scheduled": (
        lambda k: operations.cancel(k, "s1"), {"jobs", "state", "due", "dead", "workers", "conf", "waiters"},
    ),
    "cancel-ready": (
        lambda k: operations.cancel(k, "r1"), {"jobs", "state", "due", "dead", "workers", "conf", "waiters", "leased:w"},
    ),
    "cancel-tagged": (
        lambda k: operations.cancel_some(k, Walk(JobFilter(tag="a"))).then(lambda done: done.codes),
        {"jobs", "state", "due", "dead", "workers", "conf", "waiters", "leased:w", "tag:a"},
    ),
    "delete-scheduled": (
        lambda k: operations.cancel_some(k, Walk(states=("scheduled",)), delete=True).then(lambda done: done.codes),
        {"jobs", "state", "due", "dead", "waiters"},
    ),
    "cancel-leased": (lambda k: operations.cancel(k, "h1"), {"jobs", "due", "dead", "workers", "leased:w"}),
    "delete-dead": (lambda k: operations.cancel(k, "d1", delete=True), {"jobs", "state", "due", "dead", "waiters"}),
    "redrive": (operations.redrive, {"dead", "jobs", "state", "ready:0", "ready:3"}),
    "redrive-ids": (lambda k: operations.redrive(k, ids=["d1"]), {"dead", "jobs", "state", "ready:3"}),
    "redrive-tagged": (
        lambda k: operations.redrive_some(k, Walk(JobFilter(tag="a"), ("dead",))), {"dead", "jobs", "state", "ready:3", "tag:a"},
    ),
    "promote": (lambda k: operations.promote(k, "s1"), {"due", "jobs", "ready:2"}),
    "update-ready": (
        lambda k: operations.update(k, "r2", b"p5\n" + REST[1:], delay_ms=60_000, priority=3, attributes="\tgg", rest=REST),
        {"jobs", "due", "dead", "workers", "leased:w", "conf"} | {f"ready:{n}" for n in range(10)},
    ),
    "purge-ready": (
        lambda k: operations.purge(k, "ready", 10), {"jobs", "state", "conf", "waiters"} | {f"ready:{n}" for n in range(10)},
    ),
    "purge-due": (lambda k: operations.purge(k, "due", 10), {"jobs", "state", "due", "waiters"}),
    "purge-dead": (lambda k: operations.purge(k, "dead", 10), {"jobs", "state", "dead", "waiters"}),
    "schedule_put": (
        lambda k: schedules.put_schedule(k, "timer", "other", b"{}", b"", "data", 1), {"schedule:timer", "schedules", "due", "conf"},
    ),
    "schedule_fire": (_fire, {"schedule:timer", "jobs", "due", "conf", "dead", "ready:5"}),
    "schedule_change": (
        lambda k: schedules.change_schedule(k, "timer", "delete"), {"schedule:timer", "schedules", "due", "conf"},
    ),
    "schedule_read": (
        lambda k: schedules.read_schedules(k).then(lambda found: [row.name for row in found[1]]), {"schedules", "schedule:timer"},
    ),
    "outbox_take": (lambda k: outbox.take(k, replacing=5, least=9), {"outbox", "conf"}),
    "outbox_trim": (lambda k: outbox.trim(k, 5), {"outbox", "conf"}),
    "claim_partitions": (lambda k: partitions.claim_partitions(k, 3, whole=False), {"conf"}),
    "repartition": (lambda k: partitions.repartition(k, "begin", "change", 3), {"conf", "jobs", "workers", "outbox"}),
    "partitions": (partitions.count, {"conf"}),
    "pause_task": (lambda k: limits.pause_task(k, "t", paused=True), {"conf"}),
    "configure": (lambda k: operations.configure(k, "paused", "1"), {"conf"}),
    "declare_limits": (lambda k: limits.declare_limits(k, {"l": "c 2 -", "m": "r 5 1000 0 -"}, replace=True), {"conf"}),
    "set_limits": (lambda k: limits.set_limit(k, "l", None, "c 3"), {"conf"}),
    "list_limits": (limits.list_limits, {"conf", "due"}),
    "list_intake": (lambda k: operations.list_intake(k, 3, "stem"), {"jobs", "ready:0", "intake", "foreign"}),
    "find_work": (
        lambda k: operations.find_work([(k, 60_000), (k, 60_000)]), {"conf", "due"},
    ),
    "leave_room": (lambda k: operations.leave_room(k.prefix, "channel 1 1"), {"room"}),
    "wake": (lambda k: operations.wake(k.wake), set()),
    "emit": (lambda k: streams.emit(k, "w", [("h1", PARTS)]), {"leased:w", "waiters", "stream:h1"}),
    "read_stream": (
        lambda k: streams.read_stream(k, "h1", "me", None), {"jobs", "dead", "waiters", "stream:h1"},
    ),
    "watch_jobs": (
        lambda k: inspection.watch_jobs(k, ["h2", "s1", "gone"], "*me"),
        {"jobs", "state", "due", "dead", "workers", "waiters", "leased:w"},
    ),
    "command_worker": (
        lambda k: worker_commands.send(k, "w", WorkerCommand("stack", k.answer("a"))), {"leased:w", "wake:w"},
    ),
    "describe_worker": (lambda k: worker_commands.describe(k, "w", b"{}"), {"leased:w"}),
    "leased_jobs": (lambda k: worker_commands.leased_jobs(k, "w", 9), {"leased:w", "jobs"}),
    "release_build": (lambda k: worker_commands.release_build(k, "0", "v1"), {"jobs", "due"}),
    "await_result": (lambda k: operations.await_result(k, "r3", "me"), {"jobs", "dead", "waiters", "result:r3", "results:r3"}),
    "forget": (lambda k: operations.forget(k, "r1", "channel-r1"), {"waiters"}),
    "delete": (
        lambda k: operations.delete(k, "delete"),
        {"jobs", "due", "dead", "workers", "conf", "outbox", "leased:w"} | {f"ready:{n}" for n in range(10)},
    ),
    "declare_queue": (
        lambda k: operations.declare_queue(QueueKeys("c", "q", foreign="q", expires=60_000)), {"conf", "jobs", "workers"},
    ),
    "read_events": (lambda k: queue_events.read_events(k, "me", ""), {"conf"}),
    "counts": (inspection.counts, {"jobs", "due", "dead", "workers", "conf", "ready:0", "foreign", "leased:w", "outbox"}),
    "count_queues": (
        lambda k: inspection.count_queues([k.jobs], 2, workers=True),
        {"jobs", "due", "dead", "workers", "conf", "ready:0", "leased:w", "outbox"},
    ),
    "read_stats": (
        lambda k: inspection.read_stats(k, "minutes", int(time() // 60), int(time() // 60) + 1), {"stats"},
    ),
    "list_jobs": (lambda k: inspection.list_jobs(k, "ready", 0, 9), {"jobs", "state", "ready:0", "ready:9"}),
    "find_jobs": (
        lambda k: inspection.find_jobs(k, Walk()), {"jobs", "state", "due", "dead", "workers", "leased:w"},
    ),
    "find_jobs-tagged": (
        lambda k: inspection.count_found(k, Walk(JobFilter(tag="a"))), {"tag:a", "jobs", "due", "dead", "workers", "leased:w"},
    ),
    "find_jobs-leased": (
        lambda k: inspection.find_jobs(k, Walk(states=("leased",))), {"jobs", "state", "workers", "leased:w"},
    ),
    "get_job": (lambda k: inspection.get_job(k, "r1"), {"jobs", "state", "due", "dead", "workers", "leased:w"}),
    "why": (
        lambda k: inspection.why(k, "r1"),
        {"jobs", "state", "due", "dead", "workers", "leased:w", "conf", "ready:0", "ready:9", "stats"},
    ),
    "read_totals": (lambda k: inspection.read_totals([k.jobs]), set()),
    "examine_queues": (lambda k: inspection.examine_queues([k.conf]), {"conf"}),
    "queue_causes": (
        inspection.queue_causes, {"jobs", "due", "workers", "leased:w", "conf", "ready:0", "ready:9"},
    ),
    "workers": (inspection.workers, {"workers", "leased:w"}),
    "unplaced": (lambda k: inspection.unplaced(k, "jobs", "0"), {"jobs", "due", "dead", "workers", "leased:w"}),
    "unplaced-ready": (lambda k: inspection.unplaced(k, "5", "0"), {"ready:5"}),
    "repair": (
        lambda k: operations.repair(k, ["r1", "s3", "h1"]),
        {"jobs", "state", "due", "dead", "workers", "conf", "ready:0", "leased:w"},
    ),
    "audit": (inspection.audit, {"jobs", "state", "due", "dead", "workers", "conf", "ready:4", "leased:w"}),
}  # fmt: skip

#: scripts that accept, so that a full server refuses them
PUSHES = {
    "push",
    "push_plain",
    "publish",
    "publish-from",
    "subscribe",
    "list_push",
    "claim_partitions",
    "schedule_fire",
}

#: scripts that change nothing; of "delete" in a queue that holds something
READS = {
    "schedule_read",
    "held_ids",
    "delete",
    "counts",
    "count_queues",
    "read_stats",
    "read_totals",
    "examine_queues",
    "list_jobs",
    "find_jobs",
    "find_jobs-tagged",
    "find_jobs-leased",
    "get_job",
    "why",
    "queue_causes",
    "workers",
    "leased_jobs",
    "audit",
    "partitions",
    "unplaced",
    "unplaced-ready",
    "find_work",
    "subscribers",
    "list_limits",
}


def name_of(key: str, seeded: SeededQueue) -> str:
    """Return the full name of a key of the table above."""
    if key == "foreign":
        return "q"
    if key == "stats":
        return f"{KEYS.prefix}stats:{seeded.now() // 60_000}"
    return KEYS.prefix + key
