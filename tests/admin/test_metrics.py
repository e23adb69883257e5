"""Metrics: what Prometheus reads is what happened, the same from every program, and never falls."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from conveyor import Concurrency, Conveyor, Rate, Retry, ids
from conveyor.admin.admin import Admin
from conveyor.admin.metrics import SystemFacts, TaskTotals, load_json, render, task_totals
from conveyor.admin.views import QueueInfo, WorkerInfo
from conveyor.admin.worker_control import Slots, processes_of, slots_of
from conveyor.errors import QueueNotFound
from conveyor.messaging.limit_control import LimitState
from conveyor.store import inspection, operations
from conveyor.store.schedules import RunLine, ScheduleRow
from support import process_app
from support.running_worker import drain, until_counts, working
from support.shell import Shell

_SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? ([0-9.e+-]+)')


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a scrape by name and values of labels; each line must be of the format."""
    found: dict[tuple[str, ...], float] = {}
    for line in text.splitlines():
        if line.startswith("# "):
            assert line.split(" ")[1] in {"HELP", "TYPE"}
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        labels = re.findall(r'"((?:[^"\\]|\\.)*)"', match[2] or "")
        assert (match[1], *labels) not in found, line
        found[match[1], *labels] = float(match[3])
    return found


@pytest.fixture
async def app(url: str) -> Any:
    """An app with a task that does well, one that fails, and one that waits for its turn."""
    async with Conveyor(url) as app:

        @app.task(name="well", queue="mail")
        async def well(n: int) -> None: ...

        @app.task(name="bad", queue="mail", retry=Retry(attempts=2, backoff="20ms", jitter=False))
        async def bad() -> None:
            raise ValueError("as asked")

        @app.task(name="slow", queue="mail", limits=[Concurrency(1)])
        async def slow() -> None: ...

        yield app


async def test_counters_are_what_happened(app: Conveyor, redis: redis_py.Redis) -> None:
    """Successes, retries, dead letters, run times, delays of starts and waits are counted by queue and task."""
    well, bad, slow = (app.tasks[name] for name in ("well", "bad", "slow"))
    for n in range(5):
        await well.aenqueue(n)
    await bad.aenqueue()
    await slow.aenqueue()
    await drain(app)
    found = samples(await Admin(app.client).ametrics_text())
    assert found["conveyor_redis_up",] == 1
    assert found["conveyor_jobs_finished_total", "mail", "well", "succeeded"] == 5
    assert found["conveyor_jobs_finished_total", "mail", "bad", "retried"] == 1
    assert found["conveyor_jobs_finished_total", "mail", "bad", "dead"] == 1
    assert found["conveyor_job_duration_seconds_count", "mail", "well"] == 5
    assert found["conveyor_job_duration_seconds_bucket", "mail", "well", "+Inf"] == 5
    for task, count in (("well", 5), ("bad", 1), ("slow", 1)):
        assert found["conveyor_job_start_delay_seconds_count", "mail", task] == count
    assert found["conveyor_job_wait_seconds_total", "mail", "bad", "retry"] == 0.02
    assert ("conveyor_job_wait_seconds_total", "mail", "slow", "limit") in found
    assert ("conveyor_job_wait_seconds_total", "mail", "well", "queue") in found
    assert found["conveyor_queue_jobs", "mail", "dead"] == 1
    assert found["conveyor_queue_jobs", "mail", "ready"] == 0
    await app.queue("mail").apurge(dead=True)


async def test_each_end_of_an_attempt_is_counted_once(app: Conveyor, redis: redis_py.Redis) -> None:
    """A job that dies of crashes, of its payload or of its result is dead; a crash that is tried again is retried; a stopped one is cancelled."""
    started = asyncio.Event()

    @app.task(name="waits", queue="mail")
    async def waits() -> None:
        started.set()
        await asyncio.sleep(3600)

    @app.task(name="odd", queue="mail")
    async def odd() -> Any:
        return object()

    die = process_app.app.tasks["support.process_app.die"].function
    crash = app.task(name="support.process_app.die", queue="mail", run_in="process", retry=Retry(max_crashes=2))(die)
    await crash.aenqueue("exit")
    await odd.aenqueue()
    unreadable = await app.tasks["well"].aenqueue(1)
    envelope = redis.hget("conveyor:{mail}:jobs", ids.split(unreadable.id)[1])
    redis.hset("conveyor:{mail}:jobs", ids.split(unreadable.id)[1], (envelope or b"").replace(b"1", b'"x"'))
    running = await waits.aenqueue()
    async with working(app, reference="support.process_app:app"):
        await asyncio.wait_for(started.wait(), 60)
        await running.acancel()
        await until_counts(app, lambda found: found.dead == 3 and not found.leased, "mail")
    found = samples(await Admin(app.client).ametrics_text())
    told = {
        labels[2:]: count for labels, count in found.items() if labels[0] == "conveyor_jobs_finished_total" and count
    }
    assert told == {
        ("support.process_app.die", "retried"): 1, ("support.process_app.die", "dead"): 1, ("odd", "dead"): 1,
        ("well", "dead"): 1, ("waits", "cancelled"): 1,
    }  # fmt: skip
    await app.queue("mail").apurge(dead=True)


async def test_schedules_limits_workers_and_lost_leases(url: str, redis: redis_py.Redis) -> None:
    """Schedules, limits, places of workers and lost leases are metrics too, and another program reads the same numbers."""
    async with Conveyor(url) as app, Conveyor(url) as other:
        app.queue("mail", limits=[Rate(5, "1h", name="sends"), Concurrency(1, by="tenant", name="tenants")])
        gate, started = asyncio.Event(), asyncio.Event()

        @app.task(name="held", queue="mail")
        async def held(tenant: str) -> None:
            started.set()
            await gate.wait()

        schedule = await app.schedules.aput("yearly", held.s("a"), cron="0 0 1 1 *")
        await schedule.apause()
        await held.aenqueue("a")
        await held.aenqueue("a")
        async with working(app, concurrency=4) as worker:
            await asyncio.wait_for(started.wait(), 60)
            [consumer] = worker.consumers
            found = samples(await Admin(app.client).ametrics_text())
            assert samples(await Admin(other.client).ametrics_text()).keys() == found.keys()
            assert found["conveyor_schedule_paused", "mail", "yearly"] == 1
            assert found["conveyor_schedule_skipped_total", "mail", "yearly", "missed"] == 0
            assert found["conveyor_schedule_late_seconds", "mail", "yearly"] == 0
            assert found["conveyor_limit_used", "mail", "sends", "rate"] == 1
            assert found["conveyor_limit_available", "mail", "sends", "rate"] == 4
            assert found["conveyor_limit_used", "mail", "tenants", "concurrency"] == 1
            assert found["conveyor_limit_waiting", "mail", "tenants", "concurrency"] == 1
            assert found["conveyor_workers", "worker", "running"] == 1
            assert found["conveyor_worker_slots", worker.name, "used"] == 1
            assert found["conveyor_worker_slots", worker.name, "free"] == 3
            assert found["conveyor_worker_loop_lag_seconds", worker.name] == 0
            assert found["conveyor_worker_memory_bytes", worker.name] == worker._usage.memory
            assert found["conveyor_worker_cpu_ratio", worker.name] == 0
            assert found["conveyor_leases_lost_total", "mail"] == 0
            await app.client.arun(operations.reap(consumer.keys, consumer.identity))
            assert samples(await Admin(other.client).ametrics_text())["conveyor_leases_lost_total", "mail"] == 1
            gate.set()
        await drain(app)
        await schedule.adelete()


def test_only_workers_whose_leases_hold_have_slots() -> None:
    """A silent worker has no slots, memory or lag, one of an earlier release no memory, and more jobs than slots use all of them."""
    now = datetime.now(UTC)

    def registered(pid: int, end: datetime, **about: Any) -> WorkerInfo:
        return WorkerInfo(f"w{pid}", "a", "host", pid, 5, end, {"concurrency": 4, **about}, now, now)

    later = now + timedelta(seconds=9)
    workers = [
        registered(1, later, kind="worker", memory=3 * 2**20, cpu=250, usage_told=1),
        registered(2, later, kind="worker"),
        registered(3, now - timedelta(seconds=1), kind="worker", memory=2**20, cpu=1),
        registered(4, later, kind="consumer"),
    ]
    found = samples(render((), {}, {}, SystemFacts(workers=processes_of(workers))))
    of_workers = {name: value for name, value in found.items() if name[0].startswith("conveyor_worker_")}
    assert of_workers == {
        ("conveyor_worker_slots", "host:1", "used"): 4, ("conveyor_worker_slots", "host:1", "free"): 0,
        ("conveyor_worker_slots", "host:2", "used"): 4, ("conveyor_worker_slots", "host:2", "free"): 0,
        ("conveyor_worker_loop_lag_seconds", "host:1"): 0, ("conveyor_worker_loop_lag_seconds", "host:2"): 0,
        ("conveyor_worker_memory_bytes", "host:1"): 3 * 2**20, ("conveyor_worker_cpu_ratio", "host:1"): 2.5,
    }  # fmt: skip
    assert slots_of(processes_of(workers)) == Slots(used=8, total=8)


def test_schedules_that_stand_still_and_full_keys() -> None:
    """A schedule is as late as its instant is past, and not while it is paused; of a limit by keys its fullest key is told."""
    reasons = {"missed": 2, "overlap": 1, "paused": 0, "superseded": 0}
    row = ScheduleRow("nightly", "", b"", b"", "code", 40_000, False, "", 7, 3, [], 0, reasons)
    limit = Concurrency(4, by="tenant", name="api")
    states = [LimitState("mail", "api", key, limit, limit, False, used, 1, None) for key, used in (("a", 1), ("b", 3))]
    facts = SystemFacts([("mail", 100_000, row), ("mail", 100_000, row._replace(name="off", paused=True))], states)
    found = samples(render((), {}, {}, facts))
    assert found["conveyor_schedule_late_seconds", "mail", "nightly"] == 60
    assert found["conveyor_schedule_late_seconds", "mail", "off"] == 0
    assert found["conveyor_schedule_fired_total", "mail", "nightly"] == 7
    assert found["conveyor_schedule_skipped_total", "mail", "nightly", "missed"] == 2
    assert found["conveyor_limit_used", "mail", "api", "concurrency"] == 3
    assert found["conveyor_limit_available", "mail", "api", "concurrency"] == 1
    assert found["conveyor_limit_waiting", "mail", "api", "concurrency"] == 2


async def test_counters_never_fall(app: Conveyor, redis: redis_py.Redis) -> None:
    """The counters of minutes that are over are kept as sums, so what was counted once stays counted."""
    for round_ in range(1, 4):
        await app.tasks["well"].aenqueue(1)
        await drain(app)
        found = samples(await Admin(app.client).ametrics_text())
        assert found["conveyor_jobs_finished_total", "mail", "well", "succeeded"] == round_
        # As if all that had been an hour before.
        last = int(redis.get("conveyor:{mail}:stats:last") or 0)
        redis.rename(f"conveyor:{{mail}}:stats:{last}", f"conveyor:{{mail}}:stats:{last - 60 * round_}")
        redis.set("conveyor:{mail}:stats:last", last - 60 * round_, ex=60)
    redis.delete(*redis.scan_iter("conveyor:{mail}:stats:[0-9h]*"))
    found = samples(await Admin(app.client).ametrics_text())
    # The last minute is gone, the sums are not.
    assert found["conveyor_jobs_finished_total", "mail", "well", "succeeded"] == 2


async def test_many_tasks_are_counted_too(app: Conveyor, redis: redis_py.Redis) -> None:
    """Counters that are too many for one step are read in pages, and added up when their minute is over, as few ones are."""
    prefix, crowd = "conveyor:{mail}:stats:", {f"done:task {number}": 1 for number in range(9_000)}
    await app.tasks["well"].aenqueue(1)
    await drain(app)
    last = int(redis.get(prefix + "last") or 0)
    redis.hset(f"{prefix}{last}", mapping=crowd)  # type: ignore[arg-type]

    async def succeeded() -> tuple[float, float]:
        found = samples(await Admin(app.client).ametrics_text())
        ends = {labels[2]: count for labels, count in found.items() if labels[-1] == "succeeded"}
        return ends["well"], sum(ends.values())

    assert await succeeded() == (1, 9_001)
    for before in (1, 2):  # as if that had been the minute before
        last = int(redis.get(prefix + "last") or 0)
        redis.rename(f"{prefix}{last}", f"{prefix}{last - before}")
        redis.set(prefix + "last", last - before, ex=60)
        await app.tasks["well"].aenqueue(1)
        await drain(app)
        assert await succeeded() == (1 + before, 9_001 + before)
    assert redis.hlen(prefix + "total") > 9_000


async def test_pages_of_two_minutes_are_not_mixed(
    app: Conveyor, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute that is over while pages are read is neither missing nor counted twice: they are read anew."""
    prefix = "conveyor:{mail}:stats:"
    await app.tasks["well"].aenqueue(1)
    await drain(app)
    last = int(redis.get(prefix + "last") or 0)
    redis.hset(prefix + "total", mapping={f"done:task {number}": 1 for number in range(6_000)})  # type: ignore[arg-type]
    redis.expire(prefix + "total", 60)
    asked: list[str] = []

    def read_page(queue: str, of: Any, cursor: int) -> Any:
        if of == "last" and "last" not in asked:  # between the two, once
            redis.hincrby(prefix + "total", "done:well", 1)
            redis.set(prefix + "last", last + 1, ex=60)
            redis.rename(f"{prefix}{last}", f"{prefix}{last + 1}")
        asked.append(of)
        return page(queue, of, cursor)

    page = inspection.read_totals_page
    monkeypatch.setattr(inspection, "read_totals_page", read_page)
    found = samples(await Admin(app.client).ametrics_text())
    assert found["conveyor_jobs_finished_total", "mail", "well", "succeeded"] == 2
    assert asked.count("total") > asked.index("last")


def test_format_and_hostile_names() -> None:
    """Names are escaped, histograms are cumulative, and without Redis only that is said."""
    totals_ = task_totals(
        {'done:a"b\\c\nd': 3, 'ms:a"b\\c\nd': 1500, 'le0:a"b\\c\nd': 1, 'le15:a"b\\c\nd': 2, "odd": 1, "x:y": 2}
    )
    text = render((), {"q": totals_}, {"used_memory": 5})
    found = samples(text)
    name = 'a\\"b\\\\c\\nd'
    assert found["conveyor_job_duration_seconds_bucket", "q", name, "0.005"] == 1
    assert found["conveyor_job_duration_seconds_bucket", "q", name, "3600"] == 1
    assert found["conveyor_job_duration_seconds_bucket", "q", name, "+Inf"] == 3
    assert found["conveyor_job_duration_seconds_sum", "q", name] == 1.5
    assert samples(render((), {}, None)) == {("conveyor_redis_up",): 0.0}
    assert task_totals({}) == {}
    assert TaskTotals().waits == {}


def test_redis_that_is_away_is_a_metric() -> None:
    """Without Redis the metrics say so instead of failing."""
    with Conveyor("redis://127.0.0.1:1") as app:
        assert samples(Admin(app.client).metrics_text()) == {("conveyor_redis_up",): 0.0}


@pytest.fixture
def loaded(url: str) -> Iterator[Conveyor]:
    """An app whose queues hold something."""
    with Conveyor(url) as app:
        app.queue("a").push_many(range(3))
        app.queue("b").push(1, delay="1h")
        yield app
        for name in ("a", "b"):
            app.queue(name).purge()


def test_load_for_autoscalers(loaded: Conveyor, url: str, tmp_path: Path) -> None:
    """The load is of the queues that are named, or of all; a paused one does not count; a name that is none is refused."""
    admin, shell = Admin(loaded.client), Shell(tmp_path, url)
    document = load_json(admin.load())
    assert (document["total"]["ready"], document["total"]["load"]) == (3, 3)
    assert document["queues"]["b"]["scheduled"] == 1
    admin.pause("a")
    assert load_json(admin.load("a"))["total"]["ready"] == 0
    with pytest.raises(QueueNotFound):
        admin.load(["nobody"])
    assert json.loads(shell.run("metrics", "--load", "a").stdout)["queues"]["a"]["ready"] == 3
    printed = shell.run("metrics").stdout
    assert samples(printed)["conveyor_queue_jobs", "a", "ready"] == 3
    assert samples(printed)["conveyor_queue_paused", "a"] == 1


def everything() -> SystemFacts:
    """Return facts of which each metric has a sample."""
    runs = [RunLine(1, 1, "fired", "x", 0)]
    row = ScheduleRow("s", "", b"", b"", "code", None, False, "", 0, 0, runs, 0, {"missed": 1})
    limit, now = Concurrency(1, name="l"), datetime.now(UTC)
    about = {"kind": "worker", "concurrency": 1, "memory": 2**20, "cpu": 50}
    worker = WorkerInfo("w", "a", "host", 1, 0, now, about, now, now)
    return SystemFacts(
        [("a", 0, row)], [LimitState("a", "l", None, limit, limit, False, 0, 0, None)], processes_of([worker]), {"a": 0}
    )


def test_each_metric_is_documented() -> None:
    """The page of metrics names each metric, and each has a help text, one type and samples of its own name in one piece."""
    page = (Path(__file__).parents[2] / "docs/guides/metrics-and-traces.md").read_text()
    counters = {"done:t": 1, "ms:t": 1, "le0:t": 1, "at0:t": 1, "wait:queue:t": 1}
    info = {"used_memory": 1, "maxmemory": 1, "evicted_keys": 0, "connected_clients": 1}
    queue = QueueInfo("a", 1, 0, 0, 0, 0, 1, 1.0, False, 5)
    text = render([queue], {"a": task_totals(counters)}, info, everything())
    families = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", text, re.MULTILINE)
    assert len(dict(families)) == len(families) == len(re.findall(r"^# HELP (\S+) \S.*$", text, re.MULTILINE))
    for name, kind in families:
        assert (kind == "counter") == name.endswith("_total"), name
        assert f"`{name}`" in page, name
    order = [re.match(r"[a-z_]+", line)[0] for line in text.splitlines() if not line.startswith("#")]  # type: ignore[index]
    base = [re.sub(r"_(bucket|sum|count)$", "", name) for name in order]
    assert [name for at, name in enumerate(base) if at == 0 or base[at - 1] != name] == [name for name, _ in families]


def unknown_names(expression: str, text: str) -> list[str]:
    """Return what an expression of PromQL names that *text*, a scrape, does not have: metrics, labels, values of labels."""
    labels: dict[str, dict[str, set[str]]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, pairs = re.match(r"[a-z_]+", line)[0], re.findall(r'([a-z_]+)="([^"]*)"', line)  # type: ignore[index]
            known = labels.setdefault(name, {})
            for label, value in pairs:
                known.setdefault(label, set()).add(value)
    found, named = [], set[str]()
    for name, selector in re.findall(r"(conveyor_[a-z_]+)(?:\{([^}]*)\})?", expression):
        known = labels.get(name, {})
        named |= known.keys()
        if name not in labels:
            found.append(name)
        for label, operator, value in re.findall(r'([a-z_]+)(=~|!=|!~|=)"([^"]*)"', selector):
            if label not in known:
                found.append(f"{name}{{{label}}}")
            elif "$" not in value and label not in {"queue", "task"}:  # those are the reader's
                parts = value.split("|") if "~" in operator else [value]
                found += [f'{name}{{{label}="{part}"}}' for part in parts if part not in known[label]]
    grouped = re.findall(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)", expression) + re.findall(
        r"\$labels\.([a-z_]+)", expression
    )
    found += [label for group in grouped for label in re.split(r", *", group) if label not in named]
    return found


def test_board_and_alerts_name_metrics_that_exist(loaded: Conveyor) -> None:
    """Each metric, label and value of a label in the Grafana board, the alert rules and the guide is one that the text has."""
    docs = Path(__file__).parents[2] / "docs"
    board, alerts = json.loads((docs / "grafana/conveyor.json").read_text()), (docs / "grafana/alerts.yml").read_text()
    counters = {"done:t": 1, "ms:t": 1, "le0:t": 1, "at0:t": 1, "wait:queue:t": 1}
    info = {"used_memory": 1, "maxmemory": 1, "evicted_keys": 0, "connected_clients": 1}
    text = render(Admin(loaded.client).queues(), {"a": task_totals(counters)}, info, everything())
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    legends = re.findall(r"\{\{ *([a-z_]+) *\}\}", json.dumps(board))
    rules = alerts.split("- alert:")[1:]
    guide = (docs / "guides/metrics-and-traces.md").read_text()
    told = re.findall(r"query: (.*)", guide) + re.findall(r"`(sum by [^`]*)`", guide)
    assert len(shown) >= 20
    assert len(told) >= 3
    for expression in (*shown, *rules, *told):
        assert unknown_names(expression, text) == [], expression
    assert set(legends) <= set(re.findall(r'([a-z_]+)="', text))
    assert len(rules) == len(re.findall(r"^ *expr: \S", alerts, re.MULTILINE)) == 11
    wrong = 'max by (qeue) (conveyor_queue_jobs{state=~"ready|redy",que="a"}) > conveyor_nothing{x="1"}'
    expected = [
        'conveyor_queue_jobs{state="redy"}',
        "conveyor_queue_jobs{que}",
        "conveyor_nothing",
        "conveyor_nothing{x}",
        "qeue",
    ]
    assert unknown_names(wrong, text) == expected
