"""Read the content of a queue in the form of `Model.snapshot`, in two round trips."""

from __future__ import annotations

from typing import Any

from conveyor.store.keys import QueueKeys


def read(client: Any, keys: QueueKeys) -> dict[str, Any]:
    """Return the content of the queue; raises AssertionError where its keys contradict each other."""
    names = [key.decode().removeprefix(keys.prefix) for key in client.keys(keys.prefix + "*")]
    rest = {
        kind: [name.removeprefix(kind) for name in names if name.startswith(kind)]
        for kind in ("leased:", "unique:k:", "unique:i:", "result:", "results:", "tag:", "group:")
    }
    pipeline = client.pipeline(transaction=False)
    for key in keys.ready:
        pipeline.lrange(key, 0, -1)
    pipeline.hgetall(keys.jobs).zrange(keys.due, 0, -1).zrange(keys.dead, 0, -1).hgetall(keys.state)
    pipeline.hgetall(f"{keys.prefix}reruns").hgetall(f"{keys.prefix}slots")
    pipeline.hgetall(keys.waiters).hgetall(keys.conf).llen(keys.wake).zrange(keys.workers, 0, -1)
    for worker in rest["leased:"]:
        pipeline.hgetall(keys.leased(worker))
    for key in rest["unique:k:"]:
        pipeline.get(f"{keys.prefix}unique:k:{key}")
    for key in rest["unique:i:"]:
        pipeline.pttl(f"{keys.prefix}unique:i:{key}")
    for window in rest["results:"]:
        pipeline.hkeys(f"{keys.prefix}results:{window}")
    for tag in rest["tag:"]:
        pipeline.zrange(keys.tag(tag), 0, -1)
    for group in rest["group:"]:
        pipeline.lrange(f"{keys.prefix}group:{group}", 0, -1)
    replies = iter(pipeline.execute())

    ready = {priority: _jobs(next(replies)) for priority in range(10)}
    jobs, due, dead, state, reruns, slots, waiters, conf, token, workers = (next(replies) for _ in range(10))
    leased = {worker: _lease(next(replies)) for worker in rest["leased:"]}
    leased = {worker: lease for worker, lease in leased.items() if lease is not None}
    assert sorted(leased) == sorted(_texts(workers)), "registrations and ends of leases differ"
    assert token in (0, 1), "more than one wake token"
    return {
        "jobs": {id_.decode(): envelope.startswith(b"x") for id_, envelope in jobs.items()},
        "ready": {priority: ids for priority, ids in ready.items() if ids},
        "slots": {id_.decode(): text.decode().strip("\t").split("\t") for id_, text in slots.items()},
        "due": _jobs(due),
        "dead": _texts(dead),
        "leased": leased,
        "state": {id_.decode(): counts for id_, text in state.items() if (counts := history(text)) is not None},
        "unique": {key: next(replies).decode() for key in rest["unique:k:"]},
        "reruns": {first.decode(): last.decode() for first, last in reruns.items()},
        "bodies": {
            id_.decode(): envelope.split(b"\n", 2)[2].decode()
            for id_, envelope in jobs.items()
            if not envelope.startswith(b"x")
        },
        "own": {id_: next(replies) >= 0 for id_ in rest["unique:i:"]},
        "results": {*rest["result:"], *(id_ for _ in rest["results:"] for id_ in _texts(next(replies)))},
        "tags": {tag: _texts(next(replies)) for tag in rest["tag:"]},
        "groups": {group: _texts(next(replies)) for group in rest["group:"]},
        "waiters": {id_.decode(): text.decode().split() for id_, text in waiters.items()},
        "stubs": int(conf.get(b"stubs", 0)),
        "paused": conf.get(b"paused") == b"1",
        "token": token == 1,
    }


def history(text: bytes) -> tuple[int, int, int, bytes] | None:
    """Read the counts of a stored state, without errors; None for a job that was only promoted or updated: it has none."""
    if text.startswith(b"0 0 0 \th"):
        return None
    starts, failures, crashes = text.partition(b" \t")[0].split()  # attributes stand behind them
    certain = crashes.rstrip(b"+*")
    return int(starts), int(failures), int(certain), crashes[len(certain) :]


def _lease(found: dict[bytes, bytes]) -> tuple[int, dict[str, int], list[str]] | None:
    if b"\tleft" in found:
        return None
    # The digits behind the point are the instant of the lease.
    places = {id_.decode(): int(place) for id_, place in found.items() if not id_.startswith(b"\t")}
    return int(found[b"\tturn"]), places, _asked(found.get(b"\tcancel", b"").decode())


def _jobs(entries: list[bytes]) -> list[str]:
    """Return the ids among entries, without tickets of groups and alarms of limits."""
    return [entry.decode() for entry in entries if not entry.startswith(b"\t")]


def _texts(items: list[bytes]) -> list[str]:
    return [item.decode() for item in items]


def kept_result(redis: Any, keys: QueueKeys, id: str) -> bytes:  # noqa: A002
    """Return the record of a job's outcome as it is stored: under a key of its own, or in the window of its id."""
    record: bytes | None = redis.get(keys.result(id))
    if record is not None:
        return record
    field: bytes = redis.hget(keys.result_window(id), id)
    return field.partition(b"\n")[2]


def _asked(text: str) -> list[str]:
    """Return the ids of the cancellations that were asked, without the lines that say by whom."""
    return [line for line in text.split("\n") if line and line[0] != "\t"]
