"""Unique, Debounce and Throttle of tasks: which calls become one job, and what the answer says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis as redis_py

from conveyor import Concurrency, Conveyor, Debounce, Duplicate, Rate, Throttle, Unique
from conveyor.errors import ConfigurationError, JobCancelled, JobNotFound, PayloadError, StoreUnavailable
from conveyor.jobs.context import Context, current
from conveyor.jobs.job import Job
from conveyor.jobs.task import Task
from conveyor.store import inspection, operations
from conveyor.store.client.buffer import Buffer
from conveyor.store.operations import Settlement
from support.manual_worker import ManualWorker, arguments
from support.running_worker import drain, working
from support.waiting import until


def sync(page: int, text: str = "", *, tenant: str = "none") -> None: ...


@pytest.fixture
def manual(app: Conveyor) -> Iterator[ManualWorker]:
    manual = ManualWorker(app)
    yield manual
    assert app.client.run(inspection.audit(manual.keys)) == []
    manual.leave()


def taken(app: Conveyor, manual: ManualWorker) -> list[list[Any]]:
    """Lease all and return the positional arguments that each would get."""
    return [arguments(app, manual.envelopes[id_])[0] for id_ in manual.take(100)]


def held(redis: redis_py.Redis, app: Conveyor) -> int:
    """Return how many unique keys there are."""
    return sum(":unique:k:" in key.decode() for key in redis.keys(f"{app.client.namespace}:*"))


# -- keys -------------------------------------------------------------------------------------------------------------


def test_equal_arguments_are_one_job(app: Conveyor, manual: ManualWorker) -> None:
    """However they are given, by position, by name or by default, equal values of `by` are one key, and others are others."""
    task = app.task(unique=Unique(by=("page", "tenant")))(sync)
    first = task.enqueue(1, "a")

    again = [task.enqueue(1, "b"), task.enqueue(page=1), task.enqueue(1, tenant="none"), *app.enqueue_many([task.s(1)])]
    others = [task.enqueue(2), task.enqueue(1, tenant="acme"), task.enqueue(1, tenant='none", tenant="x')]

    assert (first.duplicate, first.conflict) == (False, None)
    assert {(job.id, job.duplicate, job.conflict) for job in again} == {(first.id, True, "kept")}
    assert not any(job.duplicate for job in others)
    assert taken(app, manual)[0] == [1, "a"]


def test_without_by_all_arguments_are_the_key(app: Conveyor, manual: ManualWorker) -> None:
    """`Unique()` compares all arguments, of any length."""
    task = app.task(unique=Unique())(sync)
    first = task.enqueue(1, "x" * 5000)

    assert task.enqueue(1, "x" * 5000, tenant="none").id == first.id
    assert not task.enqueue(1, "x" * 4999 + "y").duplicate


def test_the_key_of_a_call_takes_the_place_of_that_of_its_arguments(app: Conveyor, manual: ManualWorker) -> None:
    """`options(unique=…)` names the key, and what the task declares goes on for it."""
    task = app.task(unique=Unique(by=("page",), conflict="raise"))(sync)
    task.options(unique="all").enqueue(1)

    with pytest.raises(Duplicate) as refused:
        task.options(unique="all").enqueue(2)

    assert refused.value.key == "all"
    assert not task.enqueue(1).duplicate


def test_a_key_is_shown_in_readable_form(app: Conveyor, manual: ManualWorker) -> None:
    """The key of a unique job is told with its policy; a long key keeps its beginning and a digest."""
    from conveyor.admin.admin import Admin

    task = app.task(name="sync", unique=Unique(by=("page", "tenant"), until="5m", conflict="replace"))(sync)
    job = task.enqueue(1, tenant="a\u200bb")
    long = task.enqueue(2, tenant="x" * 300)

    admin = Admin(app.client)
    assert admin.job(job.id).keys == ['sync(page=1, tenant="a\\u200bb") (for 5 m, replace)']
    [shown] = admin.job(long.id).keys
    assert shown.startswith('sync(page=2, tenant="xxxx')
    assert len(shown) < 230


# -- policies ---------------------------------------------------------------------------------------------------------


def test_until_start_ends_with_the_lease(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """A call that comes when the job has started makes a job of its own; one that comes before meets it."""
    task = app.task(unique=Unique(by=("page",), until="start"))(sync)
    first = task.enqueue(1)
    assert task.enqueue(1).id == first.id

    manual.take()

    second = task.enqueue(1)
    assert (second.duplicate, second.id == first.id, held(redis, app)) == (False, False, 1)


def test_until_a_time_outlives_the_job(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """The window counts from the enqueue, also when the job has ended before; a job that is cancelled frees it."""
    task = app.task(unique=Unique(by=("page",), until="5m"))(sync)
    first = task.enqueue(1)
    [id_] = manual.take()
    manual.done(id_)

    assert (task.enqueue(1).id, task.enqueue(1).conflict) == (first.id, "kept")
    [key] = [key for key in redis.keys(f"{app.client.namespace}:*") if b":unique:k:" in key]
    assert 200_000 < redis.pttl(key) <= 300_000
    redis.pexpire(key, 1)
    until(lambda: not redis.exists(key))
    again = task.enqueue(1)
    assert again.id != first.id
    assert again.cancel() == "removed"
    assert not task.enqueue(1).duplicate


async def awaited_many(app: Conveyor, calls: list[Any]) -> None:
    try:
        await app.aenqueue_many(calls)
    finally:
        await app.aclose()


WAYS_IN: dict[str, Callable[[Conveyor, list[Any]], object]] = {
    "one": lambda _, calls: calls[0].enqueue(),
    "many": lambda app, calls: app.enqueue_many(calls),
    "async": lambda app, calls: asyncio.run(awaited_many(app, calls)),
}


@pytest.mark.row("D13")
@pytest.mark.parametrize("how", WAYS_IN)
def test_raise_stores_nothing(app: Conveyor, manual: ManualWorker, how: str) -> None:
    """`Duplicate` names the job that has the key, and nothing of the call is stored, also of a bulk one."""
    task = app.task(name="sync", unique=Unique(by=("page",), conflict="raise"))(sync)
    first = task.enqueue(1)

    calls = [task.s(2), task.s(1), task.s(3)]

    with pytest.raises(Duplicate) as refused:
        WAYS_IN[how](app, [task.s(1, "later")] if how == "one" else calls)

    assert (refused.value.job_id, refused.value.key) == (first.id, "sync(page=1)")
    assert taken(app, manual) == [[1, ""]]


async def test_raise_refuses_only_its_own_call(app: Conveyor, manual: ManualWorker) -> None:
    """Calls of one tick share a round trip, and the others are stored when one of them is a duplicate."""
    task = app.task(unique=Unique(by=("page",), conflict="raise"))(sync)
    await task.aenqueue(1)

    found = await asyncio.gather(*(task.aenqueue(page) for page in (2, 1, 3, 3)), return_exceptions=True)

    assert [isinstance(one, Duplicate) for one in found] == [False, True, False, True]
    await app.aclose()


@pytest.mark.row("D13")
def test_replace_rewrites_what_waits(app: Conveyor, manual: ManualWorker) -> None:
    """A job that waits gets the latest arguments and keeps its id and its place; so does a scheduled one."""
    task = app.task(unique=Unique(by=("page",), conflict="replace"))(sync)
    first, other = task.enqueue(1, "a"), task.enqueue(2, "b")
    later = task.options(delay="1h").enqueue(3, "c")

    found = [task.enqueue(1, "z"), *app.enqueue_many([task.s(3, "y"), task.s(3, "x"), task.s(4, "a"), task.s(4, "b")])]

    assert [(job.id, job.conflict) for job in found[:3]] == [
        (first.id, "replaced"), (later.id, "replaced"), (later.id, "replaced"),
    ]  # fmt: skip
    assert (found[3].conflict, found[4].conflict, found[3].id) == (None, "replaced", found[4].id)
    assert later.status() == "scheduled"
    assert taken(app, manual) == [[1, "z"], [2, "b"], [4, "b"]]
    assert other.conflict is None


def test_replace_of_a_job_that_runs_runs_it_once_more(app: Conveyor, manual: ManualWorker) -> None:
    """The latest arguments are not lost with one that has started: it is run again with them, but not with the same ones."""
    task = app.task(unique=Unique(by=("page",), conflict="replace"))(sync)
    first = task.enqueue(1, "a")
    [id_] = manual.take()

    same, new = task.enqueue(1, "a"), task.enqueue(1, "b")

    assert (same.id, same.conflict) == (first.id, "kept")
    assert (new.id == first.id, new.conflict, new.status()) == (False, "rerun", "waiting")
    manual.done(id_)
    assert taken(app, manual) == [[1, "b"]]


def test_rerun_runs_once_more_with_the_latest(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """However many calls come while it runs, one job follows, with the arguments of the last, and not before the first ended."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    first = task.enqueue(1, "0")
    assert (task.enqueue(1, "0").conflict, task.enqueue(1, "1").conflict) == ("kept", "replaced")
    assert taken(app, manual) == [[1, "1"]]

    calls = [task.enqueue(1, str(n)) for n in range(1, 4)] + app.enqueue_many([task.s(1, "8"), task.s(1, "9")])

    assert {(job.duplicate, job.conflict) for job in calls} == {(True, "rerun")}
    assert len({job.id for job in calls}) == 1
    rerun = calls[0]
    assert (rerun.status(), first.status(), taken(app, manual)) == ("waiting", "leased", [])
    assert (rerun.why().kind, rerun.why().name, rerun.info().arguments) == ("rerun", first.id, {"page": 1, "text": "9"})
    counted = app.client.run(inspection.counts(manual.keys))
    assert (counted.waiting, counted.unplaced, len(counted)) == (1, 0, 1)
    manual.done(operations_id(first))
    assert rerun.status() == "ready"
    assert task.enqueue(1, "10").conflict == "replaced"
    assert taken(app, manual) == [[1, "10"]]
    manual.done(operations_id(rerun))
    assert (held(redis, app), task.enqueue(1).duplicate) == (0, False)


def make_expired(redis: redis_py.Redis, manual: ManualWorker, job: Job[Any]) -> None:
    """Have the time of a job that expires be over."""
    id_ = operations_id(job)
    envelope, changed = re.subn(rb" e\d+", b" e1", redis.hget(manual.keys.jobs, id_), count=1)
    assert changed
    redis.hset(manual.keys.jobs, id_, envelope)


def operations_id(job: Job[Any]) -> str:
    """Return the id of a job within its queue."""
    return job.id.rpartition(":")[2]


def give_back(manual: ManualWorker, id_: str) -> None:
    manual.turn(0, Settlement("F", id_))


def cancel_waiting(app: Conveyor, manual: ManualWorker, id_: str) -> None:
    give_back(manual, id_)
    assert app.client.run(operations.cancel(manual.keys, id_)) == operations.CANCEL_REMOVED


def cancel_scheduled(app: Conveyor, manual: ManualWorker, id_: str) -> None:
    manual.turn(0, Settlement("R", id_, 60_000, state=b"1 1 0"))
    assert app.client.run(operations.cancel(manual.keys, id_)) == operations.CANCEL_REMOVED


def cancel_reaped(app: Conveyor, manual: ManualWorker, id_: str) -> None:
    assert app.client.run(operations.cancel(manual.keys, id_)) == operations.CANCEL_ASKED
    assert app.client.run(operations.reap(manual.keys, manual.worker)) == 0
    manual.__init__(app)  # type: ignore[misc]


def delete_waiting(app: Conveyor, manual: ManualWorker, id_: str) -> None:
    give_back(manual, id_)
    assert app.client.run(operations.cancel(manual.keys, id_, delete=True)) == 1


def expire(app: Conveyor, manual: ManualWorker, id_: str) -> None:
    envelope = app.client.execute("HGET", manual.keys.jobs, id_, key=manual.keys.jobs)
    app.client.execute("HSET", manual.keys.jobs, id_, b" e1" + envelope, key=manual.keys.jobs)
    give_back(manual, id_)
    manual.take()


WAYS_OUT: dict[str, Callable[[Conveyor, ManualWorker, str], None]] = {
    "done": lambda app, manual, id_: manual.done(id_, 1),
    "plainly done": lambda app, manual, id_: manual.plainly_done(id_),
    "dead": lambda app, manual, id_: manual.dead(id_, None),
    "cancelled while it runs": lambda app, manual, id_: manual.cancelled(id_),
    "cancelled while it waits": cancel_waiting,
    "cancelled while it is scheduled": cancel_scheduled,
    "cancelled, and its worker died": cancel_reaped,
    "deleted": delete_waiting,
    "expired": expire,
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_rerun_takes_over_the_rest_of_a_window(
    app: Conveyor, manual: ManualWorker, redis: redis_py.Redis, way: str
) -> None:
    """However the first job of a window of time ends, the one that runs after it has the key for what is left of that window."""
    task = app.task(unique=Unique(by=("page",), until="5m", conflict="rerun"))(sync)
    task.enqueue(1, "a")
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")

    WAYS_OUT[way](app, manual, id_)

    assert (task.enqueue(1, "c").duplicate, held(redis, app)) == (True, 1)
    [key] = [key for key in redis.keys(f"{app.client.namespace}:*") if b":unique:k:" in key]
    assert (redis.get(key).decode(), 0 < redis.pttl(key) <= 300_000) == (operations_id(rerun), True)
    assert rerun.status() in {"ready", "leased"}
    if rerun.status() == "ready":
        assert rerun.cancel() == "removed"
        assert not task.enqueue(1).duplicate


def test_a_rerun_takes_no_key_that_another_job_has(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """When the window is over while the first job runs, the job that came then keeps its key, whenever the first one ends."""
    task = app.task(unique=Unique(by=("page",), until="5m", conflict="rerun"))(sync)
    task.enqueue(1, "a")
    [id_] = manual.take()
    task.enqueue(1, "b")
    [key] = [key for key in redis.keys(f"{app.client.namespace}:*") if b":unique:k:" in key]
    redis.delete(key)  # as if its time had come
    other = task.enqueue(1, "c")

    manual.done(id_)

    assert redis.get(key).decode() == operations_id(other)


@pytest.mark.parametrize("until", ["done", "start", "5m"])
@pytest.mark.parametrize("conflict", ["keep", "raise", "replace", "rerun"])
def test_an_expired_job_keeps_no_call_out(
    app: Conveyor, manual: ManualWorker, redis: redis_py.Redis, conflict: Any, until: Any
) -> None:
    """A job that expired while it waited will not run, so a call with its key is a job of its own, and runs."""
    task = app.task(unique=Unique(by=("page",), until=until, conflict=conflict), expires="1h")(sync)
    first = task.options(expires="1m").enqueue(1, "a")
    make_expired(redis, manual, first)

    second = task.enqueue(1, "a")

    assert (second.duplicate, second.id == first.id) == (False, False)
    assert app.client.run(inspection.audit(manual.keys)) == []
    [holder] = [redis.get(key).decode() for key in redis.keys(f"{app.client.namespace}:*") if b":unique:k:" in key]
    assert holder == operations_id(second)
    assert taken(app, manual) == [[1, "a"]]
    with pytest.raises(JobCancelled):
        first.result(timeout=5)
    assert held(redis, app) == (0 if until == "start" else 1)  # the first one took nothing from it when it was dropped


def test_a_dead_letter_with_a_time_to_live_keeps_its_window(
    app: Conveyor, manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """A job that ran and died holds its window of time, also when it would have expired since."""
    task = app.task(unique=Unique(by=("page",), until="5m"), expires="1m")(sync)
    first = task.enqueue(1)
    manual.dead(*manual.take(), None)
    make_expired(redis, manual, first)

    assert task.enqueue(1).id == first.id


def test_a_debounced_job_that_expired_is_not_put_off(
    app: Conveyor, manual: ManualWorker, redis: redis_py.Redis
) -> None:
    """A call that meets a debounced job which expired begins a wait of its own."""
    task = app.task(debounce=Debounce("1h", by="page"))(sync)
    first = task.options(expires="1m").enqueue(1, "a")
    make_expired(redis, manual, first)

    second = task.enqueue(1, "b")

    assert (second.conflict, second.id == first.id, second.status()) == (None, False, "scheduled")


def test_a_rerun_is_put_off_by_debounced_calls(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """A debounced job that is to run after another one is put off by each call, as one that is scheduled is."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"), debounce=Debounce("1h", by="page", max_wait="100h"))(
        sync
    )
    first = task.enqueue(1, "a")
    app.client.run(operations.promote(manual.keys, operations_id(first)))
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")
    line, _, rest = redis.hget(manual.keys.jobs, operations_id(rerun)).partition(b"\t")
    redis.hset(manual.keys.jobs, operations_id(rerun), b" d1\t" + rest)  # as if its wait were over

    assert task.enqueue(1, "c").id == rerun.id
    manual.done(id_)

    assert (line[:2], rerun.status()) == (b" d", "scheduled")
    assert redis.zscore(manual.keys.due, operations_id(rerun)) > 10**12


@pytest.mark.row("D330")
@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_out_forgets_the_rerun(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis, way: str) -> None:
    """However the first job ends, the one that was to run after it runs, holds the key, and leaves nothing behind."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    task.enqueue(1, "a")
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")

    WAYS_OUT[way](app, manual, id_)

    assert rerun.status() in {"ready", "leased"}
    manual.take()
    assert (task.enqueue(1, "c").conflict, held(redis, app)) == ("rerun", 1)
    assert app.client.run(inspection.audit(manual.keys)) == []
    manual.done(operations_id(rerun))
    [last] = manual.take()
    assert arguments(app, manual.envelopes[last])[0] == [1, "c"]
    manual.done(last)
    assert (held(redis, app), redis.exists(f"{manual.keys.prefix}reruns")) == (0, 0)


@pytest.mark.row("D330")
@pytest.mark.parametrize("how", ["retry", "reap", "returned"])
def test_a_job_that_comes_back_keeps_its_rerun(app: Conveyor, manual: ManualWorker, how: str) -> None:
    """A retry, a crash and a returned job run again first; what was to run afterwards still waits for that, with the latest."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    first = task.enqueue(1, "a")
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")
    if how == "retry":
        manual.turn(0, Settlement("R", id_, 0, state=b"1 1 0"))
    elif how == "reap":
        assert app.client.run(operations.reap(manual.keys, manual.worker)) == 1
        manual.__init__(app)  # type: ignore[misc]
    else:
        give_back(manual, id_)

    assert task.enqueue(1, "c").id == rerun.id
    assert manual.take(10) == [operations_id(first)]
    assert rerun.status() == "waiting"
    manual.done(id_)
    assert taken(app, manual) == [[1, "c"]]


def test_a_dead_letter_stays_dead_while_its_rerun_has_the_key(app: Conveyor, manual: ManualWorker) -> None:
    """Redriving the first is refused until the second has ended; then it takes the key again."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    first = task.enqueue(1, "a")
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")
    manual.dead(id_, None)

    redriven = app.client.run(operations.redrive(manual.keys, ids=[id_]))
    assert (redriven, redriven.kept) == (0, ((id_, operations_id(rerun)),))
    assert taken(app, manual) == [[1, "b"]]
    manual.done(operations_id(rerun))
    assert app.client.run(operations.redrive(manual.keys, ids=[id_])) == 1
    assert task.enqueue(1, "a").id == first.id


def test_the_rerun_can_be_cancelled_and_purged(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """The rerun that waits for another is a job: cancelling it leaves the first alone, and a purge takes it."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    task.enqueue(1, "a")
    [id_] = manual.take()
    rerun = task.enqueue(1, "b")
    assert (rerun.cancel(), rerun.status()) == ("removed", "cancelled")
    assert app.client.run(inspection.audit(manual.keys)) == []

    other = task.enqueue(1, "c")
    assert (other.conflict, other.id == rerun.id) == ("rerun", False)
    assert app.queue("default").purge() == 1
    with pytest.raises(JobNotFound):
        other.status()
    manual.done(id_)
    assert (taken(app, manual), held(redis, app)) == ([], 0)


PLACES: dict[str, Callable[[ManualWorker, Task[..., Any]], str]] = {}


def place(name: str) -> Callable[[Any], Any]:
    return lambda function: PLACES.setdefault(name, function)


@place("first of its group")
def first_of_its_group(manual: ManualWorker, task: Task[..., Any]) -> str:
    return operations_id(task.enqueue(1, tenant="a"))


@place("behind another one")
def behind_another(manual: ManualWorker, task: Task[..., Any]) -> str:
    task.enqueue(2, tenant="a")
    return operations_id(task.enqueue(1, tenant="a"))


@place("at a full limit")
def at_a_full_limit(manual: ManualWorker, task: Task[..., Any]) -> str:
    task.enqueue(2, tenant="a")
    manual.take(5)
    id_ = operations_id(task.enqueue(1, tenant="a"))
    assert manual.take(5) == []
    return id_


@place("scheduled")
def scheduled(manual: ManualWorker, task: Task[..., Any]) -> str:
    id_ = operations_id(task.options(delay="1h").enqueue(1, tenant="a"))
    assert task.enqueue(1, "kept", tenant="a").duplicate
    return id_


@place("before a retry")
def before_a_retry(manual: ManualWorker, task: Task[..., Any]) -> str:
    id_ = operations_id(task.enqueue(1, tenant="a"))
    assert manual.take(5) == [id_]
    manual.turn(0, Settlement("R", id_, 3_600_000, state=b"1 1 0"))
    return id_


@place("without a group")
def without_a_group(manual: ManualWorker, task: Task[..., Any]) -> str:
    return operations_id(task.options(priority=3).enqueue(1, tenant=None))


@place("to be run afterwards")
def to_be_run_afterwards(manual: ManualWorker, task: Task[..., Any]) -> str:
    task.enqueue(1, tenant="a")
    manual.take(5)
    return operations_id(task.enqueue(1, "again", tenant="a"))


@pytest.mark.parametrize("group_by", [None, "tenant"])
@pytest.mark.parametrize("where", PLACES)
def test_new_arguments_have_their_own_group_and_limits(
    app: Conveyor, manual: ManualWorker, redis: redis_py.Redis, where: str, group_by: str | None
) -> None:
    """A job whose arguments were replaced waits in the group and at the limits of the new ones, and pays their cost."""

    def bill(page: int, text: str = "", *, tenant: str | None, tokens: int = 1) -> None: ...

    limits = [Concurrency(1, by="tenant"), Rate(100, "1h", by="tenant", cost="tokens")]
    task = app.task(name="bill", unique=Unique(by=("page",), conflict="replace"), limits=limits, group_by=group_by)(
        bill
    )
    id_ = PLACES[where](manual, task)
    blocks = task.options(priority=9).enqueue(3, tenant="b", tokens=60)
    assert manual.take(1) == [operations_id(blocks)]

    calls = [task.s(1, "new", tenant="b", tokens=tokens) for tokens in (7, 40, 41)]
    assert {job.conflict for job in app.enqueue_many(calls)} <= {"replaced", "rerun"}

    assert app.client.run(inspection.audit(manual.keys)) == []
    manual.done(operations_id(blocks))
    for other in [one for one in manual.envelopes if one not in {id_, operations_id(blocks)}]:
        manual.done(other)
    if redis.zscore(manual.keys.due, id_):
        app.client.run(operations.promote(manual.keys, id_))
    rest = [one for one in manual.take(5) if one != id_]
    assert id_ not in manual.take(5)  # 60 and 41 are more than the rate lets pass
    assert task.enqueue(1, "newer", tenant="b", tokens=40).id.endswith(id_)
    assert app.client.run(inspection.audit(manual.keys)) == []
    assert manual.take(5) == [id_]
    assert arguments(app, manual.envelopes[id_]) == ([1, "newer"], {"tenant": "b", "tokens": 40})
    used = {(one.name, one.key): one.used for one in app.limits.list("default") if one.key}
    assert (used["bill.concurrency.tenant", "b"], used["bill.rate.tenant", "b"]) == (1, 100)
    for one in [*rest, id_]:
        manual.done(one)
    assert not redis.exists(f"{manual.keys.prefix}slots")
    assert app.client.run(inspection.audit(manual.keys)) == []


# -- debounce and throttle --------------------------------------------------------------------------------------------


def test_debounce_runs_once_with_the_latest(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """Many calls are one job, which waits anew from each, and gets the arguments of the last."""
    task = app.task(debounce=Debounce("1h", by="page"))(sync)
    first = task.enqueue(1, "0")
    redis.zadd(manual.keys.due, {operations_id(first): 10**15})  # as if time had passed since: the next call moves it

    jobs = [task.enqueue(1, str(n)) for n in range(1, 50)]

    assert {(job.id, job.conflict) for job in jobs} == {(first.id, "replaced")}
    assert (first.status(), task.enqueue(2).duplicate) == ("scheduled", False)
    due = redis.zscore(manual.keys.due, operations_id(first))
    assert due < 10**14
    app.client.run(operations.promote(manual.keys, operations_id(first)))
    assert task.enqueue(1, "last").conflict == "replaced"  # its time has come, and it has not started
    assert taken(app, manual) == [[1, "last"]]
    assert task.enqueue(1, "new").conflict is None


def test_debounce_waits_no_longer_than_max_wait(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """Calls that never pause do not put the job off for ever: its latest instant counts from the first call."""
    task = app.task(debounce=Debounce("50m", by="page", max_wait="1h"))(sync)
    job = task.enqueue(1, "0")
    id_ = operations_id(job)
    envelope = redis.hget(manual.keys.jobs, id_)
    latest = int(envelope.partition(b"\tm")[2].partition(b"\n")[0])
    assert 0 <= latest - redis.zscore(manual.keys.due, id_) - 600_000 < 5
    earlier = latest - 3_000_000  # as if the first call had come 50 minutes ago
    redis.hset(manual.keys.jobs, id_, envelope.replace(b"%d" % latest, b"%d" % earlier))

    task.enqueue(1, "1")

    assert redis.zscore(manual.keys.due, id_) == earlier
    app.client.run(operations.promote(manual.keys, id_))
    assert taken(app, manual) == [[1, "1"]]


def test_debounce_without_by_is_one_job_of_the_task(app: Conveyor, manual: ManualWorker) -> None:
    """Without `by` all calls of the task are one."""
    task = app.task(debounce=Debounce("1h"))(sync)
    assert task.enqueue(1).id == task.enqueue(2).id


def test_throttle_accepts_the_first(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """The first call runs at once; those of the time after it are answered with it, also when it has ended."""
    task = app.task(throttle=Throttle("1m", by="page"))(sync)
    first = task.enqueue(1, "a")
    assert taken(app, manual) == [[1, "a"]]
    manual.done(operations_id(first))

    again = task.enqueue(1, "b")

    assert (again.id, again.conflict, again.status()) == (first.id, "kept", "done")
    assert not task.enqueue(2).duplicate
    assert taken(app, manual) == [[2, ""]]


def test_the_three_together(app: Conveyor, manual: ManualWorker, redis: redis_py.Redis) -> None:
    """One task may have all three, and a job ends with all of its keys."""
    task = app.task(
        unique=Unique(by=("tenant",), conflict="rerun"),
        debounce=Debounce("1h", by="page"),
        throttle=Throttle("1m", by="text"),
    )(sync)
    first = task.enqueue(1, "a", tenant="x")

    assert task.enqueue(1, "b", tenant="y").conflict == "replaced"  # the page
    assert task.enqueue(2, "a", tenant="y").conflict == "kept"  # the text
    assert task.enqueue(2, "c", tenant="x").conflict == "replaced"  # the tenant
    assert (held(redis, app), first.cancel(), held(redis, app)) == (3, "removed", 0)


# -- a real worker ----------------------------------------------------------------------------------------------------


async def test_what_changed_last_is_seen_by_the_last_run(app: Conveyor) -> None:
    """With rerun and a running worker no change is lost: the last run of each page has the arguments of its last call."""
    seen: dict[int, list[int]] = {}
    running: set[int] = set()

    @app.task(unique=Unique(by=("page",), conflict="rerun"))
    async def index(page: int, version: int) -> None:
        assert page not in running
        running.add(page)
        seen.setdefault(page, []).append(version)
        await asyncio.sleep(0.002)
        running.remove(page)

    async with working(app, concurrency=8):
        for version in range(120):
            await index.aenqueue(version % 3, version)
    await drain(app)

    assert {page: versions[-1] for page, versions in seen.items()} == {0: 117, 1: 118, 2: 119}
    assert all(versions == sorted(set(versions)) for versions in seen.values())
    await app.aclose()


async def test_the_handle_of_a_rerun_waits_for_its_run(app: Conveyor) -> None:
    """`result()` of the answer is the result of the run with these arguments."""
    started, go = asyncio.Event(), asyncio.Event()

    @app.task(unique=Unique(by=("page",), conflict="rerun"))
    async def index(page: int, version: int) -> int:
        started.set()
        await go.wait()
        return version

    async with working(app):
        first = await index.aenqueue(1, 1)
        await started.wait()
        second = await index.aenqueue(1, 2)
        go.set()
        assert (await first.aresult(timeout=60), await second.aresult(timeout=60)) == (1, 2)
    await app.aclose()


# -- other ways in ----------------------------------------------------------------------------------------------------


async def test_a_spawned_job_carries_its_keys(app: Conveyor) -> None:
    """The outbox of a job delivers a unique job as such: of two with one key one runs."""
    ran: list[int] = []

    @app.task(unique=Unique(by=("page",), conflict="replace"))
    async def index(page: int, version: int) -> None:
        ran.append(version)

    @app.task(queue="parents")
    async def parent(context: Context = current()) -> None:
        for version in range(3):
            context.spawn(index.options(delay="1h").s(1, version))

    await parent.aenqueue()
    await drain(app, queues={"parents": 1})
    keys = app.client.keys("default")
    [row] = (await app.client.arun(inspection.list_jobs(keys, "scheduled", 0, 10))).rows
    await app.client.arun(operations.promote(keys, row.id))
    await drain(app)

    assert ran == [2]
    await app.aclose()


async def test_raise_is_refused_in_an_outbox(app: Conveyor) -> None:
    """Nobody could be told of the duplicate of a spawned job, so the call is refused."""
    index = app.task(unique=Unique(by=("page",), conflict="raise"))(sync)
    refused: list[str] = []

    @app.task
    async def parent(context: Context = current()) -> None:
        try:
            context.spawn(index.s(1))
        except ConfigurationError as error:
            refused.append(str(error))

    await parent.aenqueue()
    await drain(app)

    assert "nobody is there to be told of a duplicate" in refused[0]
    await app.aclose()


def test_a_buffered_job_carries_its_keys(server_url_away: str) -> None:
    """While Redis is away a job with keys is kept, but for one whose duplicate must raise."""
    with Conveyor(server_url_away, namespace="away", timeout="100ms", buffer=Buffer(linger=0)) as app:
        keeps = app.task(name="keeps", unique=Unique(by=("page",), conflict="rerun"))(sync)
        raises = app.task(name="raises", unique=Unique(by=("page",), conflict="raise"))(sync)

        assert keeps.enqueue(1).status() == "waiting"
        with pytest.raises(StoreUnavailable, match="was not kept in the buffer"):
            raises.enqueue(1)


@pytest.fixture
def server_url_away(tmp_path: Any) -> str:
    """The address of no server."""
    return f"unix://{tmp_path}/none"


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Unique, {"by": "user"}), (Unique, {"by": (1,)}), (Unique, {"by": ("a b",)}), (Unique, {"until": "end"}),
        (Unique, {"until": 0}), (Unique, {"conflict": "drop"}), (Debounce, {"wait": 0}), (Debounce, {"wait": 1, "by": 5}),
        (Debounce, {"wait": "1m", "max_wait": "1s"}), (Throttle, {"per": 0}), (Throttle, {"per": "1s", "by": "not a name"}),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    """A value that no queue could honour is refused where it is written."""
    with pytest.raises(ConfigurationError):
        kind(**wrong)


def test_values_keep_what_they_were_given() -> None:
    """Durations are read once, and equal values are equal."""
    assert (Debounce("5s", by="page", max_wait="1m").max_wait_ms, Debounce(2).wait_ms, Throttle("1m").per_ms) == (
        60_000, 2000, 60_000,
    )  # fmt: skip
    assert Unique(by=("user",), until="5m", conflict="raise") != Unique()
    assert (Unique(until="5m").until_ms, Unique().until_ms) == (300_000, None)


@pytest.mark.parametrize(
    "options",
    [
        {"unique": Unique(by=("pge",))}, {"debounce": Debounce(1, by="pge")}, {"throttle": Throttle(1, by="pge")},
        {"unique": "page"}, {"debounce": 5}, {"throttle": Unique()},
    ],
)  # fmt: skip
def test_a_declaration_that_does_not_fit_is_refused(app: Conveyor, options: dict[str, Any]) -> None:
    """An unknown parameter in `by` and a value of another kind are refused at import, and the task is not registered."""
    with pytest.raises(ConfigurationError, match=r"Did you mean 'page'|takes a (Unique|Debounce|Throttle)"):
        app.task(**options)(sync)
    assert app.tasks == {}


def test_a_key_above_1_kb_is_refused(app: Conveyor, manual: ManualWorker) -> None:
    """Named arguments of more than 1 KB are no key: nothing is stored."""
    task = app.task(unique=Unique(by=("text",)))(sync)
    with pytest.raises(PayloadError, match="1,024"):
        task.enqueue(1, "x" * 1100)
    with pytest.raises(ConfigurationError):
        task.options(unique="x" * 1100)
    assert taken(app, manual) == []


def test_debounce_says_when_a_job_starts(app: Conveyor, manual: ManualWorker) -> None:
    """A delay beside Debounce is refused at the call."""
    task: Task[..., None] = app.task(debounce=Debounce("1s"))(sync)
    for options in ({"delay": 5}, {"front": True}):
        with pytest.raises(ConfigurationError, match="says when its jobs start"):
            task.options(**options).enqueue(1)  # type: ignore[arg-type]
    assert taken(app, manual) == []


def test_sealed_arguments_are_not_replaced(url: str) -> None:
    """A seal binds arguments to their job, so policies that put others in their place are refused at import."""
    with Conveyor(url, keys={"k": "s" * 32}) as app:
        for options in ({"debounce": Debounce(1)}, {"unique": Unique(conflict="rerun")}):
            with pytest.raises(ConfigurationError, match="an app with keys"):
                app.task(**options)(sync)  # type: ignore[call-overload]
        app.task(unique=Unique(), throttle=Throttle(1))(sync)


def test_a_cancelled_rerun_says_so(app: Conveyor, manual: ManualWorker) -> None:
    """Waiting for the result of a rerun that was cancelled raises JobCancelled."""
    task = app.task(unique=Unique(by=("page",), conflict="rerun"))(sync)
    task.enqueue(1)
    manual.take()
    rerun = task.enqueue(1)
    rerun.cancel()
    with pytest.raises(JobCancelled):
        rerun.result(timeout=5)
