"""Many queues on the dashboard: each answer is of all of them, and all answers share what was counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.dashboard import Access, dashboard
from conveyor.dashboard.queue_counts import FEW, MOST_SHOWN, STEP
from support.client_worker import ClientWorker, recorded_steps
from support.dashboard_client import ask, get

pytestmark = [
    pytest.mark.leaves_keys("queues are left to be looked at"),
    pytest.mark.standalone_only("counts the steps at one server"),
]
MANY = 2 * FEW + 20
LAST = f"tenant-{MANY - 1:04}"
"""The last queue by name, which is in no first page."""


@pytest.fixture
def app(url: str, redis: Redis) -> Iterator[Conveyor]:
    """An app with so many queues that they are counted one after the other; the last holds three jobs, one before it one."""
    redis.sadd("conveyor:queues", *(f"tenant-{number:04}" for number in range(MANY)))
    with Conveyor(url) as app:
        app.queue(LAST).push_many([1, 2, 3])
        app.queue(f"tenant-{MANY - 9:04}").push(1)
        yield app


@pytest.fixture
def site(app: Conveyor) -> Any:
    """The dashboard of the app."""
    return dashboard(app, lambda _: Access.ALL)


@pytest.fixture
def steps(site: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that were run, in their order."""
    return recorded_steps(site.service.admin.client, monkeypatch)


def test_totals_are_of_all_queues_and_follow_in_a_few_steps(site: Any, app: Conveyor, steps: list[str]) -> None:
    """
    A snapshot has the totals of all queues, however many there are, and the largest of them.

    The next one counts those again that have most jobs, and some of the others in turn: within three all were counted.
    """
    live = site.service.live
    live.snapshot._seconds = 0.0
    live._flags_until = float("inf")
    first = get(site, "snapshot")
    assert (first["totals"]["ready"], first["queues_total"], first["read_queues"]) == (4, MANY, MANY)
    assert len(first["queues"]) == MOST_SHOWN
    assert {one["name"]: one["ready"] for one in first["queues"]}[LAST] == 3
    assert steps.count("count_queues") == -(-MANY // STEP)

    app.queue("tenant-0300").push(1)
    app.queue(LAST).push(1)
    steps.clear()
    assert get(site, "snapshot")["totals"]["ready"] in {5, 6}  # the largest is counted each time
    assert steps.count("count_queues") <= 4
    for _ in range(2):
        last = get(site, "snapshot")
    assert last["totals"]["ready"] == 6
    assert first["counted_since"] < last["counted_since"] <= last["at"]


def test_new_and_deleted_queues_are_noticed(site: Any, app: Conveyor) -> None:
    """A queue that appears is counted as soon as its name is read, and one that was deleted leaves the totals."""
    table = site.service.live.queues
    assert len(table.counted().queues) == MANY
    assert {one.ended for one in table.followed().queues} == {
        (0, 0, 0)
    }  # what was counted for others does not stand for it
    app.queue("appeared").push_many([1, 2])
    app.queue("tenant-0001").delete()
    table._named_at = float("-inf")  # names are read every few seconds
    found = {info.name: info.ready for info in table.followed().infos}
    assert found["appeared"] == 2
    assert "tenant-0001" not in found
    assert len(found) == MANY


def test_whoever_asks_shares_what_was_counted(site: Any, steps: list[str]) -> None:
    """Ten scrapers and autoscalers at once cost the counting of all queues once, and each gets all of them."""
    live = site.service.live
    counted = live.queues.counted
    live.queues.counted = lambda seconds=None, **options: counted(
        3600.0, **options
    )  # so that a busy machine does not make it older than a second

    async def scrape() -> list[Any]:
        from httpx import ASGITransport, AsyncClient

        async with AsyncClient(transport=ASGITransport(site), base_url="http://here") as client:
            paths = [f"/api/v1/{path}" for path in ("metrics", "load", "jobs/counts", "queues?sort=ready", "jobs") * 2]
            return await asyncio.gather(*(client.get(path) for path in paths))

    metrics, load, counts, queues, jobs = asyncio.run(scrape())[:5]
    assert metrics.text.count("conveyor_queue_workers{") == MANY
    assert len(load.json()["queues"]) == MANY
    assert load.json()["total"]["ready"] == counts.json()["ready"] == 4
    assert "done" not in counts.json()  # of so many queues it is not known
    assert [(one["name"], one["ready"]) for one in queues.json()["queues"][:2]] == [
        (LAST, 3),
        (f"tenant-{MANY - 9:04}", 1),
    ]
    assert jobs.json()["total"] == 4
    assert steps.count("count_queues") <= -(-MANY // STEP) + 2  # and a step for each page of queues


def test_few_queues_are_counted_for_each_answer(url: str, steps: list[str], app: Conveyor, redis: Redis) -> None:
    """Answers about a few hundred queues are as of now: what was pushed before the question is in them."""
    redis.srem("conveyor:queues", *(f"tenant-{number:04}" for number in range(MANY - 20)))
    site: Any = dashboard(app, lambda _: Access.ALL)
    for ready in (4, 5, 6):
        assert get(site, "load")["total"]["ready"] == get(site, "jobs/counts")["ready"] == ready
        assert get(site, "jobs")["total"] == ready
        app.queue(LAST).push(1)


def test_workers_of_many_served_queues_are_counted_with_them(site: Any, app: Conveyor, steps: list[str]) -> None:
    """The workers of all queues, which a snapshot and metrics count, are listed in the steps that count the queues."""
    for number in (3, MANY - 4):
        ClientWorker(app.client, f"tenant-{number:04}")
    steps.clear()
    assert get(site, "snapshot")["totals"]["workers"] == 1  # one process
    assert 'conveyor_workers{kind="unknown",state="running"} 1' in ask(site, "GET", "metrics", {}).text
    assert steps.count("workers") == 0


def test_load_lists_no_workers(url: str, app: Conveyor, redis: Redis) -> None:
    """The load of served queues and their counts ask for no worker; metrics list each one, once for all who ask meanwhile."""
    for number in range(5):
        ClientWorker(app.client, f"tenant-{number:04}")
    site: Any = dashboard(app, lambda _: Access.ALL)
    live = site.service.live
    counted = live.queues.counted
    live.queues.counted = lambda seconds=None, **options: counted(3600.0, **options)

    def listed(path: str) -> int:
        """Return how often the facts of a worker are read for an answer."""
        redis.config_resetstat()
        assert ask(site, "GET", path, {}).status_code == 200
        return int(redis.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"])

    assert listed("load") == MANY  # the settings of each queue
    assert listed("load") == listed("jobs/counts") == 0
    assert listed("metrics") == 5 * 2  # the settings, and the facts of the worker
    assert listed("metrics") == listed("load") == 0
    counted(0.0)
    text = ask(site, "GET", "metrics", {}).text
    assert 'conveyor_workers{kind="unknown",state="running"} 1' in text  # those of before stand while nobody lists them
