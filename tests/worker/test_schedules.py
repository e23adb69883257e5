"""Schedules on a real server: each instant once, whatever happens to workers, definitions and clocks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
import pytest_asyncio
from click.testing import CliRunner

from conveyor import ConfigurationError, Conveyor, current
from conveyor.cli import cli
from conveyor.errors import ScheduleNotFound
from conveyor.jobs.core import core_of
from conveyor.jobs.schedule import job_id
from conveyor.jobs.schedules import Schedule, Schedules
from conveyor.store import schedules as store
from conveyor.store.keys import QueueKeys
from conveyor.worker.scheduler import Scheduler
from support.running_worker import audit, working
from support.waiting import auntil


@pytest_asyncio.fixture
async def app(url: str) -> AsyncIterator[Conveyor]:
    """An app with a task that notes its runs; its schedules are gone behind the test."""
    app = Conveyor(url)
    yield app
    for schedule in await app.schedules.alist():
        await schedule.adelete()
    await app.queue("default").apurge()
    await app.aclose()


def keys_of(app: Conveyor) -> QueueKeys:
    return app.client.keys("default")


async def reach(app: Conveyor, name: str, instant: datetime) -> None:
    """Set back what a schedule has reached, as if no worker had been there since."""
    keys, ms = keys_of(app), round(instant.timestamp() * 1000)
    await app.client.aexecute("HSET", keys.schedule(name), "next", str(ms), key=keys.due)
    await app.client.aexecute("ZADD", keys.due, str(ms), f"\t\t{name}", key=keys.due)


async def outcomes(app: Conveyor, name: str) -> list[tuple[str, int]]:
    """Return what became of the instants of a schedule, the oldest first."""
    return [(run.outcome, run.skipped) for run in reversed((await app.schedules.aget(name)).runs())]


@pytest.mark.row("I15")
async def test_each_instant_has_one_job(app: Conveyor, url: str, redis: Any) -> None:
    """Several workers share the schedules of decorators and of data: each instant is started once, and leaves no key behind."""
    ran: list[tuple[str, datetime | None]] = []

    @app.cron("* * * * * *")
    async def tick() -> None:
        ran.append((current().job_id, current().scheduled_for))

    @app.task(name="greet")
    async def greet(n: int) -> None:
        ran.append((current().job_id, current().scheduled_for))

    await app.schedules.aput("greeting", greet.s(3), every="1s", overlap="queue")
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(working(app))
        await auntil(lambda: len(ran) >= 6)

    counts = Counter(job for job, _ in ran)
    assert set(counts.values()) == {1}
    for name in (tick.name, "greeting"):
        instants = sorted(at for job, at in ran if at and job.startswith(f"{name}@"))
        assert [b - a for a, b in pairwise(instants)] == [timedelta(seconds=1)] * (len(instants) - 1)
        for at in instants:
            assert counts[job_id(name, round(at.timestamp() * 1000))] == 1
        schedule = await app.schedules.aget(name)
        assert (schedule.fired, schedule.skipped) == (len(instants), 0)
        assert {run.outcome for run in schedule.runs()} == {"fired"}
    assert [key for key in redis.keys("*") if b"@" in key] == []


async def test_a_definition_is_put_once(app: Conveyor) -> None:
    """The same definition changes nothing, another takes its place, and one of the other origin is refused."""

    @app.task(name="greet")
    async def greet(n: int) -> None: ...

    first = await app.schedules.aput("greeting", greet.s(3), cron="0 0 1 1 *", tz="Europe/Berlin")
    await reach(app, "greeting", datetime(2090, 1, 1, tzinfo=UTC))
    again = await app.schedules.aput("greeting", greet.s(3), cron="0 0 1 1 *", tz="Europe/Berlin")
    assert again.due == datetime(2090, 1, 1, tzinfo=UTC)
    assert (first.origin, first.task, first.queue, first.when) == (
        "data", "greet", "default", "At 00:00 on January 1 (Europe/Berlin)",
    )  # fmt: skip
    other = await app.schedules.aput("greeting", greet.s(4), cron="0 0 1 1 *", tz="Europe/Berlin")
    assert other.due is not None
    assert other.due.year < 2090
    assert [one.name for one in await app.schedules.alist()] == ["greeting"]

    owner = Schedules(core_of(app))
    spec = other._spec
    with pytest.raises(ConfigurationError, match=r"belongs to app\.schedules\.put\(\)\. Nothing was stored"):
        await owner.adrive(owner.put_program("greeting", greet.s(5), spec, "code"))
    wrong: Any = greet
    with pytest.raises(ConfigurationError, match=r"takes a call, such as report\.s"):
        await app.schedules.aput("greeting", wrong, every="1m")

    @app.cron("0 9 * * *", name="nightly")
    async def nightly() -> None: ...

    with pytest.raises(ConfigurationError, match=r"belongs to a decorator in the code\. Nothing was stored"):
        await app.schedules.aput("nightly", greet.s(5), every="1m")  # no worker has stored the other yet
    elsewhere = greet.options(queue="vip").s(4)
    with pytest.raises(ConfigurationError, match="is there, for queue 'default'"):
        await app.schedules.aput("greeting", elsewhere, every="1m")
    await other.adelete()
    moved = await app.schedules.aput("greeting", elsewhere, every="1m")
    assert moved.queue == "vip"
    await moved.adelete()
    for call in (app.schedules.aget("greeting"), app.schedules.adelete("greeting"), moved.apause(), moved.arun()):
        with pytest.raises(ScheduleNotFound, match="no schedule 'greeting'"):
            await call


async def test_a_newer_definition_supersedes(app: Conveyor) -> None:
    """An instant that had come, but was not carried out, belongs to the definition of before: it is skipped, and said to be."""

    @app.task(name="greet")
    async def greet(n: int) -> None: ...

    await app.schedules.aput("greeting", greet.s(3), every="1h")
    await reach(app, "greeting", datetime.now(UTC) - timedelta(minutes=1))
    await app.schedules.aput("greeting", greet.s(4), every="2h")

    assert await outcomes(app, "greeting") == [("superseded", 1)]


@pytest.mark.row("B6")
@pytest.mark.parametrize(
    ("missed", "expected"),
    [
        ("one", [("missed", 2), ("fired", 0)]),
        ("all", [("fired", 0), ("fired", 0), ("fired", 0)]),
        ("skip", [("missed", 3)]),
    ],
)
async def test_instants_that_nobody_carried_out(app: Conveyor, missed: Any, expected: list[tuple[str, int]]) -> None:
    """When workers come back, the policy decides about the instants that passed meanwhile, and the schedule goes on from there."""
    ran: list[datetime | None] = []

    @app.task(name="greet")
    async def greet() -> None:
        ran.append(current().scheduled_for)

    await app.schedules.aput("greeting", greet.s(), every="24h", missed=missed, overlap="queue")
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if datetime.now(UTC) - midnight < timedelta(minutes=2):
        pytest.skip("the last instant is less than two minutes old")
    await reach(app, "greeting", midnight - timedelta(days=2))

    async with working(app):
        await auntil(lambda: len(ran) == sum(outcome == "fired" for outcome, _ in expected))

        async def decided() -> bool:
            return await outcomes(app, "greeting") == expected

        await auntil(decided)
    assert ran == [midnight - timedelta(days=back) for back in (2, 1, 0)][3 - len(ran) :]
    schedule = await app.schedules.aget("greeting")
    assert schedule.due == midnight + timedelta(days=1)
    first_skipped = {run.instant for run in schedule.runs() if run.outcome == "missed"}
    assert first_skipped <= {midnight - timedelta(days=2)}


async def test_the_drift_of_a_schedule_is_told(app: Conveyor, url: str) -> None:
    """The time from an instant to its job is told in Python, as JSON and by the command; a skipped instant has none."""

    @app.task(name="greet")
    async def greet() -> None: ...

    await app.schedules.aput("greeting", greet.s(), every="1h")
    await reach(app, "greeting", _hour(3))
    keys = keys_of(app)
    _, [row] = await app.client.arun(store.read_schedules(keys, "greeting"))
    await app.client.arun(store.fire_schedule(keys, row, None, None, reason="missed"))
    await reach(app, "greeting", _hour(2))
    async with working(app):

        async def fired() -> bool:
            return (await app.schedules.aget("greeting")).fired > 0

        await auntil(fired)
    schedule = await app.schedules.aget("greeting")

    late = [run for run in schedule.runs() if run.outcome == "fired"]
    assert late
    assert all(run.drift is not None and run.instant + run.drift == run.at for run in late)
    assert {run.drift for run in schedule.runs() if run.outcome == "missed"} == {None}
    show = ["schedule", "show", "greeting", "--url", url]
    as_json = await asyncio.to_thread(CliRunner().invoke, cli, [*show, "--json"])
    piped = await asyncio.to_thread(CliRunner().invoke, cli, show)
    told = [run["drift"] for run in json.loads(as_json.stdout)["schedule"]["runs"]]
    assert told == [None if run.drift is None else run.drift.total_seconds() for run in schedule.runs()]
    assert [line.split("\t")[3] for line in piped.stdout.split("\n\n")[1].splitlines()] == [
        "" if one is None else str(one) for one in told
    ]


@pytest.mark.parametrize("overlap", ["skip", "cancel"])
async def test_an_instant_while_the_last_job_is_not_over(app: Conveyor, overlap: Any) -> None:
    """`overlap` skips the instant, or cancels the job of the one before."""
    started: list[str] = []
    release = asyncio.Event()

    @app.task(name="greet", retry=1)
    async def greet() -> None:
        started.append(current().job_id)
        await release.wait()

    await app.schedules.aput("greeting", greet.s(), every="1h", overlap=overlap)
    async with working(app):
        await reach(app, "greeting", _hour(0))
        await auntil(lambda: len(started) == 1)
        await reach(app, "greeting", _hour(0) + timedelta(seconds=1))
        if overlap == "skip":

            async def skipped() -> bool:
                return ("overlap", 1) in await outcomes(app, "greeting")

            await auntil(skipped)
            assert len(started) == 1
        else:
            await auntil(lambda: len(started) == 2)
            assert await app.job(started[0]).astatus() == "cancelled"
        release.set()


def _hour(back: int) -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=back)


@pytest.mark.row("B7")
async def test_of_many_that_carry_out_an_instant_one_does(app: Conveyor) -> None:
    """The step compares the instant and the definition: of any number of workers one enqueues the job."""

    @app.task(name="greet")
    async def greet() -> None: ...

    await app.schedules.aput("greeting", greet.s(), every="1h", missed="all")
    await reach(app, "greeting", _hour(3))
    schedulers = [Scheduler(keys_of(app), core_of(app)) for _ in range(8)]
    for one in schedulers:
        one.begin(["greeting"])
    await asyncio.gather(*(one.finish(60) for one in schedulers))

    schedule = await app.schedules.aget("greeting")
    assert schedule.fired + schedule.skipped == 4
    assert (await app.queue("default").astats()).ready == schedule.fired


@pytest.mark.row("B7")
async def test_an_instant_whose_worker_dies_goes_to_another(app: Conveyor) -> None:
    """A worker that was handed an instant and does nothing leaves it to the next that asks, two seconds later."""
    ran: list[str] = []

    @app.task(name="greet")
    async def greet() -> None:
        ran.append(current().job_id)

    await app.schedules.aput("greeting", greet.s(), every="1h")
    await reach(app, "greeting", _hour(0))
    lost = asyncio.Event()
    begin = Scheduler.begin

    def begin_once(self: Scheduler, names: Any) -> None:
        if lost.is_set():
            begin(self, names)
        lost.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "begin", begin_once)
        async with working(app):
            await auntil(lambda: len(ran) == 1)
    assert ran == [job_id("greeting", round(_hour(0).timestamp() * 1000))]


async def test_a_schedule_of_an_unknown_task_stands_still(app: Conveyor, url: str) -> None:
    """A worker that does not know the task leaves the instant alone; one that knows it carries it out."""
    other, ran = Conveyor(url), list[str]()

    @other.task(name="unrelated")
    async def unrelated() -> None: ...

    @app.task(name="greet")
    async def greet() -> None:
        ran.append(current().job_id)

    await app.schedules.aput("greeting", greet.s(), every="1h")
    await reach(app, "greeting", _hour(0))
    scheduler = Scheduler(keys_of(app), core_of(other))
    scheduler.begin(["greeting"])
    await scheduler.finish(60)
    schedule = await app.schedules.aget("greeting")
    assert (schedule.due, schedule.fired, schedule.runs()) == (_hour(0), 0, [])

    await reach(app, "greeting", _hour(0))
    async with working(app):
        await auntil(lambda: len(ran) == 1)
    await other.aclose()


async def test_a_paused_schedule_stands_still(app: Conveyor) -> None:
    """Paused, no instant is carried out; resumed, it goes on with the next one; `run` enqueues a job beside its instants."""

    @app.task(name="greet")
    async def greet(n: int) -> None: ...

    schedule = await app.schedules.aput("greeting", greet.s(7), every="1h", jitter="5s")
    await schedule.apause()
    await schedule.apause()
    keys = keys_of(app)
    await app.client.aexecute(
        "HSET", keys.schedule("greeting"), "next", str(round(_hour(3).timestamp() * 1000)), key=keys.due
    )
    assert await app.client.aexecute("ZCARD", keys.due, key=keys.due) == 0
    paused = await app.schedules.aget("greeting")
    assert (paused.paused, paused.next(3)) == (True, [])
    _, [row] = await app.client.arun(store.read_schedules(keys, "greeting"))
    assert (await app.client.arun(store.fire_schedule(keys, row, None, None, reason="missed"))) == store.Fired()

    await paused.aresume()
    resumed = await app.schedules.aget("greeting")
    assert resumed.due == _hour(-1)
    assert await outcomes(app, "greeting") == [("paused", 4)]
    assert resumed.skipped == 4
    assert resumed.next(2) == [_hour(-1), _hour(-2)]

    job = await resumed.arun()
    assert (await job.ainfo()).arguments == {"n": 7}
    assert await app.queue("default").apurge() == 1


async def test_a_purge_leaves_schedules_alone(app: Conveyor) -> None:
    """A purge removes the jobs that are scheduled, and no schedule: its alarm stays, and it counts as no job."""

    @app.task(name="greet")
    async def greet() -> None: ...

    schedule = await app.schedules.aput("greeting", greet.s(), every="1h")
    await greet.options(delay="2h").aenqueue()
    await greet.options(delay="1s").aenqueue()
    queue = app.queue("default")

    assert (await queue.astats()).scheduled == 2
    assert await queue.apurge() == 2
    assert (await queue.astats()).scheduled == 0
    keys = keys_of(app)
    assert schedule.due is not None
    assert await app.client.aexecute("ZSCORE", keys.due, "\t\tgreeting", key=keys.due) is not None
    assert await audit(app) == []
    with pytest.raises(ConfigurationError, match=r"1 schedule\. Nothing was deleted\. Delete its schedules"):
        await queue.adelete()


async def test_a_queue_that_refuses_keeps_the_instant(app: Conveyor, url: str) -> None:
    """A full queue takes no job: nothing is changed, and the instant is carried out when there is room."""

    @app.task(name="greet")
    async def greet() -> None: ...

    await app.schedules.aput("greeting", greet.s(), every="1h")
    await reach(app, "greeting", _hour(0))
    keys = keys_of(app)
    _, [row] = await app.client.arun(store.read_schedules(keys, "greeting"))
    entry = Schedules(core_of(app)).job_entry(keys, row, row.next_ms or 0, "greeting@x")
    await greet.aenqueue()
    full = await app.client.arun(store.fire_schedule(keys, row, None, entry, max_length=1))
    assert full == store.Fired(refusal="full")
    assert (await app.schedules.aget("greeting")).due == _hour(0)
    assert (await app.client.arun(store.fire_schedule(keys, row, None, entry, max_length=2))).job == "greeting@x"


async def test_sealed_schedules(url: str, redis: Any) -> None:
    """With keys the arguments of a schedule are sealed in Redis, and so is each of its jobs."""
    app, ran = Conveyor(url, keys={"k": "0" * 32}, encrypt=True), list[str]()

    @app.task(name="greet")
    async def greet(text: str) -> None:
        ran.append(text)

    await app.schedules.aput("greeting", greet.s("confidential"), every="1h")
    await app.schedules.aput("greeting", greet.s("confidential"), every="1h")
    assert b"confidential" not in b"".join(redis.hgetall(app.client.keys("default").schedule("greeting")).values())
    await reach(app, "greeting", _hour(0))
    async with working(app):
        await auntil(lambda: ran == ["confidential"])
        await (await app.schedules.aget("greeting")).arun()
        await auntil(lambda: ran == ["confidential"] * 2)
    await app.schedules.adelete("greeting")
    await app.aclose()


@pytest.mark.row("B7")
async def test_one_that_cannot_be_carried_out_holds_up_no_other(
    app: Conveyor, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A schedule that was sealed with a key which a worker does not have is put off; others that are due with it are carried out."""
    keys = keys_of(app)

    async def greet() -> None: ...

    async with Conveyor(url, keys={"old": "0" * 32}) as old, Conveyor(url, keys={"new": "1" * 32}) as new:
        for name, one in (("a-old", old), ("b-new", new)):
            await one.schedules.aput(name, one.task(name="greet")(greet).s(), every="1h")
            await reach(app, name, _hour(0))

        async def carry_out(one: Conveyor, *names: str) -> list[int]:
            scheduler = Scheduler(keys, core_of(one))
            scheduler.begin(names)
            await scheduler.finish(60)
            return [(await owner.schedules.aget(name)).fired for name, owner in (("a-old", old), ("b-new", new))]

        assert await carry_out(new, "a-old", "b-new") == [0, 1]
        assert "schedule a-old cannot be carried out here: E" in caplog.text
        put_off = await app.client.aexecute("ZSCORE", keys.due, "\t\ta-old", key=keys.due)
        assert float(put_off) > _hour(0).timestamp() * 1000  # type: ignore[arg-type]
        assert await carry_out(old, "a-old") == [1, 1]
        await old.schedules.adelete("a-old")
        await new.schedules.adelete("b-new")


@pytest.mark.row("B7")
async def test_a_schedule_follows_a_change_of_keys(app: Conveyor, url: str) -> None:
    """Put again with a new first key it is sealed with that one, and keeps the instant that has come; over a lost key it is new."""
    keys = keys_of(app)

    async def greet() -> None: ...

    async def put(secrets: dict[str, str]) -> Schedule:
        async with Conveyor(url, keys=secrets) as one:
            return await one.schedules.aput("greeting", one.task(name="greet")(greet).s(), every="1h")

    old, new = {"old": "0" * 32}, {"new": "1" * 32}
    await put(old)
    await reach(app, "greeting", _hour(0))
    assert (await put(new | old)).due == _hour(0)
    assert await outcomes(app, "greeting") == []
    async with Conveyor(url, keys=new) as one:
        one.task(name="greet")(greet)
        scheduler = Scheduler(keys, core_of(one))
        scheduler.begin(["greeting"])
        await scheduler.finish(60)
    assert await outcomes(app, "greeting") == [("fired", 0)]
    digest = await app.client.aexecute("HGET", keys.schedule("greeting"), "digest", key=keys.due)
    await put(new)
    assert await app.client.aexecute("HGET", keys.schedule("greeting"), "digest", key=keys.due) == digest

    await put({"other": "2" * 32})
    assert await app.client.aexecute("HGET", keys.schedule("greeting"), "digest", key=keys.due) != digest


async def test_each_of_many_late_instants_cancels_the_one_before(app: Conveyor) -> None:
    """With overlap="cancel" and missed="all" the jobs of instants that are caught up cancel one another: the newest is left."""

    @app.task(name="greet")
    async def greet() -> None: ...

    await app.schedules.aput("greeting", greet.s(), every="1h", overlap="cancel", missed="all")
    await reach(app, "greeting", _hour(3))
    scheduler = Scheduler(keys_of(app), core_of(app))
    scheduler.begin(["greeting"])
    await scheduler.finish(60)

    states = [
        await app.job(job_id("greeting", round(_hour(back).timestamp() * 1000))).astatus() for back in (3, 2, 1, 0)
    ]
    assert states == ["cancelled"] * 3 + ["ready"]


@pytest.mark.row("B7")
async def test_a_schedule_that_is_put_again_keeps_its_alarm(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that is deleted, and put again while a worker finds it gone, is there and has its alarm."""

    @app.task(name="greet")
    async def greet() -> None: ...

    read = store.read_schedules
    asked: list[str] = []

    def reading(keys: QueueKeys, *names: str) -> Any:
        asked.extend(names)
        return read(keys, "gone")  # as it was just before it was put again

    scheduler = Scheduler(keys := keys_of(app), core_of(app))
    await app.schedules.aput("greeting", greet.s(), every="1h")
    monkeypatch.setattr(store, "read_schedules", reading)
    scheduler.begin(["greeting"])
    await scheduler.finish(60)
    monkeypatch.undo()
    assert asked == ["greeting"]
    assert [one.name for one in await app.schedules.alist()] == ["greeting"]
    assert await app.client.aexecute("ZSCORE", keys.due, "\t\tgreeting", key=keys.due) is not None


def test_a_decorator_takes_tasks_without_arguments() -> None:
    """`@app.cron` stands on a function or on a task; one that takes arguments is told how its schedule is put."""
    app = Conveyor("redis://localhost:1")

    @app.cron(every="1h", overlap="queue")
    @app.task(name="report", queue="slow", retry=1)
    async def report(day: str = "today") -> str:
        return day

    [declared] = core_of(app).declared_schedules.values()
    assert (declared.name, declared.call.definition.queue, declared.spec.overlap) == ("report", "slow", "queue")
    with pytest.raises(ConfigurationError, match=r"takes arguments\. Write: app\.schedules\.put\("):

        @app.cron("* * * * *")
        async def needy(n: int) -> None: ...

    with pytest.raises(ConfigurationError, match="overlap must be one of"):
        app.cron("* * * * *", overlap="often")(report)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="takes no id="):
        app.schedules.put("x", report.options(id="1").s(), every="1h")
    with pytest.raises(ConfigurationError, match="Invalid schedule name"):
        app.schedules.put("x y", report.s(), every="1h")


def test_the_blocking_forms(app_sync: Conveyor) -> None:
    """Put, get, list, pause, resume, run and delete without an event loop."""

    @app_sync.task(name="greet")
    def greet() -> None: ...

    schedule: Schedule = app_sync.schedules.put("greeting", greet.s(), every="1h", jitter="30m")
    schedule.pause()
    assert app_sync.schedules.get("greeting").paused
    schedule.resume()
    assert [one.paused for one in app_sync.schedules.list()] == [False]
    assert schedule.run().status() == "ready"  # now, without the jitter of its instants
    app_sync.schedules.delete("greeting")
    assert list(app_sync.schedules.list()) == []
    app_sync.queue("default").purge()


@pytest.fixture
def app_sync(url: str) -> Any:
    """An app of a program without an event loop."""
    with Conveyor(url) as app:
        yield app
