"""Rates of queues: what came in and what left between two counts, and whether a backlog grows or shrinks."""

from __future__ import annotations

from typing import Any

import pytest

from conveyor import Conveyor, Retry
from conveyor.admin import queue_flow
from conveyor.admin.admin import Admin
from conveyor.admin.queue_flow import Flow, FlowMeter, flow_document
from conveyor.admin.views import QueueCount, QueueInfo
from conveyor.store.inspection import LeftLately
from support.app_fixtures import blocking_client, loop_app  # noqa: F401
from support.running_worker import until_counts, working

MINUTE = 29_000_000 * 60_000


def count(at: int, before: int = 0, current: int = 0, **counts: Any) -> QueueCount:
    """Return a count of a queue *at* so many ms behind the beginning of a minute."""
    held = {"ready": 0, "scheduled": 0, "waiting": 0, "leased": 0, "dead": 0, "dropped": 0} | counts
    info = QueueInfo(name="mail", workers=1, oldest_age=None, paused=False, max_length=None, **held)
    return QueueCount(info, (), (), [LeftLately(MINUTE + at, before, current)])


def rates(*counted: QueueCount, kinds: tuple[str, ...] = ("worker",)) -> Flow | None:
    """Return the rates after the last of these counts."""
    meter, flow = FlowMeter(), None
    for one in counted:
        flow = meter.add(one, kinds)
    return flow


def in_and_out(flow: Flow | None) -> tuple[float | None, float | None]:
    assert flow is not None
    return flow.in_per_second, flow.out_per_second


@pytest.mark.redis6
async def test_what_comes_and_goes_is_what_was_pushed_and_ended(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two counts on a server there came what was pushed, scheduled or not, and there left what was done or is dead."""
    monkeypatch.setattr(queue_flow, "_LEAST_MS", 1)

    @app.task(retry=Retry(attempts=2, backoff="1h"))
    def fail() -> None:
        raise TimeoutError

    @app.task(retry=Retry(attempts=1))
    def halve(number: int) -> int:
        return 12 // number

    admin, meter = Admin(app.client), FlowMeter()

    async def counted() -> QueueCount:
        (one,) = await admin.acount({"default": ["default"]}, 1)
        return one

    await halve.aenqueue(1)
    first = await counted()
    assert meter.add(first, ["worker"]) is None
    for number in (0, 2, 3):
        await halve.aenqueue(number)
    await halve.options(delay="1h").aenqueue(5)
    await fail.aenqueue()
    async with working(app):
        await until_counts(app, lambda one: (one.ready, one.leased, one.scheduled, one.dead) == (0, 0, 2, 1))
    second = await counted()

    flow = meter.add(second, ["worker"])

    seconds = (second.left[0].at_ms - first.left[0].at_ms) / 1000
    assert (second.info.scheduled, second.info.dead) == (2, 1)  # one of them is tried again
    assert in_and_out(flow) == (pytest.approx(5 / seconds), pytest.approx(4 / seconds))
    await app.queue("default").apurge()
    await app.queue("default").apurge(dead=True)


def test_a_minute_that_ends_between_two_counts_loses_nothing() -> None:
    """The jobs that left are the rest of the minute that ended and the beginning of the next; over more minutes nothing is known."""
    first = count(50_000, 7, 40, ready=5)
    assert in_and_out(rates(first, count(60_000, 55, 5, ready=5))) == (2.0, 2.0)  # 15 and 5 in ten seconds
    assert rates(first, count(121_000, 55, 5, ready=5)) is None
    assert rates(first, count(52_000, 7, 3, ready=5)) is None  # the queue was deleted and came again
    assert rates(first, count(60_000, -1, 5, ready=5)) is None  # too many counters to read
    assert rates(first, count(60_000, 55, -1, ready=5)) is None
    assert rates(first, count(40_000, 7, 60, ready=5)) is None  # the clock was set back


def test_rates_are_averaged_over_the_last_seconds() -> None:
    """Rates are those of the last twelve seconds, and none while two counts are less than two seconds apart."""
    steps = [count(second * 1000, 0, 10 * second) for second in range(20)]
    assert rates(*steps[:2]) is None
    assert in_and_out(rates(*steps[:3])) == (10.0, 10.0)
    burst = [count(20_000 + second * 1000, 0, 190, ready=120) for second in range(20)]
    assert in_and_out(rates(*steps, burst[0])) == (pytest.approx((120 + 110) / 12), pytest.approx(110 / 12))
    assert in_and_out(rates(*steps, *burst)) == (0.0, 0.0)


def test_a_purge_is_no_negative_arrival() -> None:
    """Where more went than was counted, as by a purge, nothing came in; what was dropped for newer jobs has left and was replaced."""
    purged = rates(count(0, ready=1000), count(10_000, 0, 20, ready=0))
    assert in_and_out(purged) == (0.0, 2.0)
    assert in_and_out(rates(count(0, ready=50, dropped=5), count(10_000, ready=50, dropped=25))) == (2.0, 2.0)


def test_a_backlog_grows_or_shrinks() -> None:
    """The trend is of what is ready, waits and is leased; it is steady while it changes no more than chance makes it."""
    shrinks = rates(count(0, ready=600, waiting=80, leased=20), count(10_000, 0, 100, ready=580, waiting=20))
    assert shrinks == Flow(0.0, 10.0, "shrinks", 60.0)
    assert str(shrinks) == "shrinks, empty in about 1 m"
    assert flow_document(shrinks) == {
        "in_per_second": 0.0, "out_per_second": 10.0, "trend": "shrinks", "empty_in": 60.0,
        "sentence": "shrinks, empty in about 1 m",
    }  # fmt: skip
    assert str(rates(count(0, ready=5), count(10_000, ready=50))) == "grows"
    assert str(rates(count(0, ready=5), count(10_000, ready=0, current=5))) == "shrinks"
    for steady in (
        rates(count(0, ready=5), count(10_000, ready=8)),
        rates(count(0, ready=5), count(10_000, ready=65, current=10_000)),  # of 10,060 that came
        rates(count(0, ready=5), count(10_000, ready=5, scheduled=500)),
    ):
        assert steady is not None
        assert (steady.trend, str(steady)) == ("steady", "")


def test_consumers_of_messages_leave_the_trend_alone() -> None:
    """Consumers of messages count nothing that they take: the trend is known, and what comes in and goes out is not."""
    pair = (count(0, ready=700), count(10_000, ready=600))
    for kinds in (("consumer",), ("worker", "pull")):
        assert rates(*pair, kinds=kinds) == Flow(None, None, "shrinks", 60.0)
    assert in_and_out(rates(*pair, kinds=())) == (0.0, 0.0)


def test_partitions_are_counted_together(client: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a queue with partitions are those of all of them; when their number changes they are not known for a moment."""
    monkeypatch.setattr(queue_flow, "_LEAST_MS", 1)
    orders = client.queue("orders", partitions=3)
    admin, meter = Admin(client.client), FlowMeter()

    def counted() -> QueueCount:
        (one,) = [one for one in admin.count(admin.queue_partitions(), 1) if one.info.name == "orders"]
        return one

    orders.push_many(list(range(9)))
    first = counted()
    orders.push_many(list(range(12)))
    second = counted()
    while second.left[0].at_ms == first.left[0].at_ms:
        second = counted()

    meter.add(first, ())
    seconds = (max(one.at_ms for one in second.left) - max(one.at_ms for one in first.left)) / 1000
    assert in_and_out(meter.add(second, ())) == (pytest.approx(12 / seconds), 0.0)
    assert meter.add(second._replace(left=second.left[:2]), ()) is None
    orders.purge()
