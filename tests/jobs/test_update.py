"""Changing jobs that wait, and running jobs again that have ended."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conveyor import (
    Concurrency,
    ConfigurationError,
    Conveyor,
    FileStore,
    JobNotFound,
    PayloadError,
    Rate,
    ResultExpired,
    Retry,
    Unique,
    UnknownTask,
    current,
)
from conveyor.ids import split
from conveyor.store import operations
from support.app_fixtures import emptied_loop_app  # noqa: F401
from support.manual_worker import ManualWorker
from support.running_worker import audit, counts, drain, working
from support.waiting import until_status


async def test_update_changes_a_job_where_it_waits(app: Conveyor) -> None:
    """Time, priority and arguments of a ready and of a scheduled job change, alone and together, and it runs so."""
    ran: list[tuple[str, int, str]] = []

    @app.task(name="note", retry=1)
    async def note(name: str, n: int = 0, *, text: str = "") -> None:
        ran.append((name, n, text))

    _, second, third, fourth = [await note.aenqueue(name, n=1) for name in ("first", "second", "third", "fourth")]
    later = await note.options(delay="1h").aenqueue("later")
    assert await second.aupdate(priority=5)
    assert await third.aupdate(delay="1h", args={"n": 3, "text": "x"})
    assert await third.astatus() == "scheduled"
    assert await later.aupdate(at=datetime.now(UTC) - timedelta(seconds=1), priority=9)
    assert await fourth.aupdate(args={"text": "y"})
    assert await audit(app) == []

    await drain(app)
    assert ran == [("later", 0, ""), ("second", 1, ""), ("first", 1, ""), ("fourth", 1, "y")]
    assert (await third.ainfo()).arguments == {"name": "third", "n": 3, "text": "x"}
    assert await third.aupdate(delay=0)
    await drain(app)
    assert ran[-1] == ("third", 3, "x")
    assert not await third.aupdate(priority=1)


async def test_update_is_too_late_for_what_has_started(app: Conveyor) -> None:
    """A job that runs, is dead, done or cancelled is not changed; one that waits for its next attempt is."""
    started, go = asyncio.Event(), asyncio.Event()
    ran: list[str] = []

    @app.task(name="work", retry=Retry(attempts=2, backoff="1h"))
    async def work(name: str) -> str:
        ran.append(name)
        if name == "bad":
            raise ValueError(name)
        started.set()
        await go.wait()
        return name

    job, bad, gone = [await work.aenqueue(name) for name in ("good", "bad", "gone")]
    assert await gone.acancel() == "removed"
    assert not await gone.aupdate(priority=1)
    async with working(app):
        await started.wait()
        assert not await job.aupdate(args={"name": "late"})
        await until_status(bad, "scheduled")
        assert await bad.aupdate(delay=0, args={"name": "mended"})
        go.set()
        assert await bad.aresult(30) == "mended"
        assert await job.aresult(30) == "good"
        assert not await job.aupdate(delay=0)
    assert sorted(ran) == ["bad", "good", "mended"]
    with pytest.raises(JobNotFound):
        await app.job("default:unknown").aupdate(priority=1)


async def test_a_job_that_changed_meanwhile_is_read_again(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of one job at a time both hold: the second one is made to what the first has left."""

    @app.task(name="work")
    async def work(a: int, b: int) -> list[int]:
        return [a, b]

    job, plain = await work.aenqueue(1, 1), operations.update
    sent: list[str] = []
    monkeypatch.setattr(operations, "update", lambda *args, **more: sent.append(args[1]) or plain(*args, **more))

    assert await asyncio.gather(job.aupdate(args={"a": 2}), job.aupdate(args={"b": 2})) == [True, True]
    await drain(app)
    assert await job.aresult(5) == [2, 2]
    assert len(sent) == 3  # one was made to what it was before


async def test_updates_keep_groups_and_limits_whole(app: Conveyor) -> None:
    """Whatever updates do to jobs in groups and at limits, the audit finds nothing, and each runs once with what it had last."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    choose = random.Random(seed)
    ran: dict[int, tuple[str, int]] = {}

    async def work(n: int, tenant: str, tokens: int = 1) -> None:
        assert n not in ran
        ran[n] = (tenant, tokens)

    limits = [Concurrency(1, by="tenant"), Rate(1000, "1h", cost="tokens", name="tokens")]
    tasks = [
        app.task(name="limited", queue="q", limits=limits, keep_result=0)(work),
        app.task(name="grouped", queue="q", group_by="tenant", keep_result=0)(work),
        app.task(name="plain", queue="q", keep_result=0)(work),
    ]
    expected: dict[int, tuple[str, int]] = {}
    jobs: dict[int, Any] = {}
    for n in range(30):
        tenant, task = choose.choice("abc"), choose.choice(tasks)
        jobs[n] = await task.options(priority=choose.choice([0, 0, 3]), delay=choose.choice([None, "1h"])).aenqueue(
            n, tenant
        )
        expected[n] = (tenant, 1)
    manual = await asyncio.to_thread(ManualWorker, app, "q")
    held = await asyncio.to_thread(manual.take, 4)  # limits are in use, tickets wait at them
    for step in range(120):
        n = choose.randrange(30)
        changes: dict[str, Any] = choose.choice(
            [{"delay": "1h"}, {"delay": 0}, {"priority": choose.choice([0, 3, 9])}, {}]
        )
        args = choose.choice([{}, {"tenant": choose.choice("abc")}, {"tokens": choose.randint(1, 5)}])
        if not changes and not args:
            continue
        changed = await jobs[n].aupdate(**changes, **({"args": args} if args else {}))
        assert changed is (split(jobs[n].id)[1] not in held), f"step {step}"
        if changed:
            expected[n] = (args.get("tenant", expected[n][0]), args.get("tokens", expected[n][1]))
        assert await audit(app, "q") == [], f"step {step}: {n} {changes} {args}"
    for n, job in jobs.items():
        if split(job.id)[1] in held:
            expected.pop(n)
        else:
            assert await job.aupdate(delay=0)
    await asyncio.to_thread(manual.leave)
    await drain(app, queues={"q": 1})
    assert ran == expected
    assert (await counts(app, "q")).waiting == 0


async def test_sealed_and_large_arguments_are_changed(url: str, tmp_path: Path) -> None:
    """New arguments are sealed as those before, and a large body that is replaced is deleted from its store."""
    store = FileStore(tmp_path / "blobs")
    async with Conveyor(url, keys={"k1": "secret of the test"}, encrypt=True, large=store, large_above=1000) as app:

        @app.task(name="read")
        async def read(text: str, n: int) -> int:
            return len(text) + n

        def blobs() -> int:
            return sum(one.is_file() for one in (tmp_path / "blobs").rglob("*"))

        job = await read.aenqueue("x" * 2000, 1)
        assert blobs() == 1
        assert await job.aupdate(args={"n": 5})
        assert blobs() == 1
        assert await job.aupdate(args={"text": "secret"}, priority=3)
        assert blobs() == 0
        await drain(app)
        assert await job.aresult(5) == 11
        again = await job.arerun()
        await drain(app)
        assert await again.aresult(5) == 11


async def test_wrong_updates_change_nothing(app: Conveyor) -> None:
    """A change that does not fit, or cannot be made, is refused with what to do, and the job stays as it was."""

    @app.task(name="work", unique=Unique(by=("user",)))
    async def work(user: int, text: str = "") -> None: ...

    @app.task(name="debit", unique=None)
    async def debit(user: int) -> None: ...

    job = await work.aenqueue(1)
    message_id = await app.queue("messages").apush({"a": 1})
    before = await job.ainfo()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigurationError, "takes what is to change"),
        ({"delay": 1, "at": datetime.now(UTC)}, ConfigurationError, "give one of them"),
        ({"at": datetime.now()}, ConfigurationError, "time zone"),  # noqa: DTZ005
        ({"priority": 10}, ConfigurationError, "0 to 9"),
        ({"args": ["x"]}, ConfigurationError, "by name"),
        ({"args": {"user": "x"}}, PayloadError, r"user.*Nothing was changed"),
        ({"args": {"nobody": 1}}, PayloadError, "unexpected argument 'nobody'"),
        ({"args": {"user": 2}, "priority": 3}, ConfigurationError, "another unique key"),
    ]
    for changes, error, text in wrong:
        with pytest.raises(error, match=f"(?s){text}"):
            await job.aupdate(**changes)
    with pytest.raises(ConfigurationError, match="no arguments by name"):
        await app.job(message_id).aupdate(args={"a": 2})
    assert await app.job(message_id).aupdate(priority=2)
    del app._core.definitions["debit"]
    with pytest.raises(UnknownTask, match="does not know the task 'debit'"):
        await (await debit.aenqueue(1)).aupdate(args={"user": 2})
    assert await job.ainfo() == before
    assert await job.aupdate(args={"text": "y"}, priority=3)


async def test_rerun_enqueues_the_same_call_again(app: Conveyor) -> None:
    """A job that is dead or done runs again as a new one with its arguments and options, which knows its origin."""
    fails = [True]

    @app.task(name="work", queue="w", retry=1)
    async def work(a: int, *rest: str, b: int = 2, **more: int) -> list[Any]:
        if a == 1 and fails:
            raise ValueError("no")
        return [a, rest, b, more, current().headers["h"], current().tags]

    dead = await work.options(headers={"h": "x"}, tags=["t"], priority=4, keep_result="1h").aenqueue(1, "r", c=3)
    done = await work.options(headers={"h": "y"}).aenqueue(2)
    waits = await work.options(headers={"h": "z"}, delay="1h").aenqueue(3)
    await drain(app, queues={"w": 1})
    fails.clear()
    with pytest.raises(ConfigurationError, match="is scheduled: only a job that has ended"):
        await waits.arerun()
    again, more = await dead.arerun(), await done.arerun()
    assert len({dead.id, done.id, again.id, more.id}) == 4
    info = await again.ainfo()
    assert (info.origin, info.arguments) == (dead.id, (await dead.ainfo()).arguments)
    await drain(app, queues={"w": 1})

    assert await again.aresult(5) == [1, ["r"], 2, {"c": 3}, "x", ["t"]]
    assert await more.aresult(5) == [2, [], 2, {}, "y", []]
    assert (await more.ainfo()).origin == done.id
    assert await dead.astatus() == "dead"
    third = await more.arerun()
    await drain(app, queues={"w": 1})
    assert (await third.ainfo()).origin == more.id


async def test_rerun_needs_the_arguments(app: Conveyor) -> None:
    """A job whose arguments are not kept, or whose task is not known here, is refused, and nothing is enqueued."""

    @app.task(name="work", retry=1)
    async def work(text: str) -> int:
        return len(text)

    long, cancelled, dead = await work.aenqueue("x" * 5000), await work.aenqueue("c"), await work.aenqueue("d")
    await cancelled.acancel()
    await drain(app)
    for job in (long, cancelled):
        with pytest.raises(ResultExpired, match=r"arguments of job .* are not kept"):
            await job.arerun()
    with pytest.raises(JobNotFound):
        await app.job("default:unknown").arerun()
    del app._core.definitions["work"]
    with pytest.raises(UnknownTask):
        await dead.arerun()
    assert (await counts(app)).ready == 0
