"""The app: bulk enqueues, closing, hooks, and the cost of importing it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis as redis_py

import conveyor
from conveyor.errors import ConfigurationError, PayloadError, QueueFull
from conveyor.events import Event, JobDead, JobDone, JobEvent
from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from conveyor.jobs.job import Job
from conveyor.jobs.task import Task, TaskCall, definition_of
from support.manual_worker import ManualWorker, arguments
from support.waiting import auntil, until

SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def note(app: Conveyor) -> Task[[int], None]:
    @app.task
    def note(n: int) -> None: ...

    return note


def numbers(app: Conveyor, queue: str = "default") -> list[int]:
    """Lease all jobs of *queue* and return the numbers they were enqueued with, in order."""
    manual, found = ManualWorker(app, queue), []
    while ids := manual.take(1000):
        found += [arguments(app, manual.envelopes[id_])[0][0] for id_ in ids]
        for id_ in ids:
            manual.done(id_)
    manual.leave()
    return found


# -- many ---------------------------------------------------------------------------------------------------------


def test_many_are_enqueued_in_order(app: Conveyor, note: Task[[int], None], redis: redis_py.Redis) -> None:
    """enqueue_many stores the calls of a generator in their order, a thousand a round trip, and returns their handles."""
    note.enqueue(0)
    redis.config_resetstat()
    jobs = app.enqueue_many(note.s(n) for n in range(1, 2501))

    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 3
    assert len({job.id for job in jobs}) == 2500
    assert [job.id for job in jobs] == sorted(job.id for job in jobs)
    assert {job.status() for job in jobs[::500]} == {"ready"}
    assert numbers(app) == list(range(2501))


def test_many_of_all_kinds_keep_their_order(app: Conveyor, note: Task[[int], None]) -> None:
    """Plain calls and those with options, of several queues, keep the order of each queue; handles that of the calls."""
    calls: list[TaskCall[None]] = []
    for n in range(30):
        if n % 3 == 0:
            calls.append(note.s(n))
        elif n % 3 == 1:
            calls.append(note.options(headers={"n": str(n)}).s(n))
        else:
            calls.append(note.options(queue="vip").s(n))
    jobs = app.enqueue_many(calls)

    assert [job.queue for job in jobs] == ["default", "default", "vip"] * 10
    assert numbers(app) == [n for n in range(30) if n % 3 < 2]
    assert numbers(app, "vip") == [n for n in range(30) if n % 3 == 2]


def test_many_find_duplicates(app: Conveyor, note: Task[[int], None]) -> None:
    """A call whose key is held gets the handle of the holder, also when the holder is in the same push."""
    keyed = note.options(unique="k")
    first, second, other = app.enqueue_many([keyed.s(1), keyed.s(2), note.s(3)])

    assert (second.id, second.duplicate, first.duplicate, other.duplicate) == (first.id, True, False, False)
    assert numbers(app) == [1, 3]


def test_bad_call_in_a_list_stores_nothing(app: Conveyor, note: Any, redis: redis_py.Redis) -> None:
    """A list with one bad call is refused as a whole."""
    with pytest.raises(PayloadError):
        app.enqueue_many([note.s(n) for n in range(2000)] + [note.s("x")])

    assert redis.keys() == []


def test_bad_call_in_a_generator_says_how_far_it_came(app: Conveyor, note: Any) -> None:
    """A generator is stored as it goes: the error of a bad call tells how many came before."""
    with pytest.raises(PayloadError) as caught:
        app.enqueue_many(note.s(n if n != 1500 else "x") for n in range(2000))

    assert caught.value.__notes__ == ["1000 jobs were enqueued before it."]
    assert numbers(app) == list(range(1000))


async def test_many_without_blocking(app: Conveyor, note: Task[[int], None]) -> None:
    """aenqueue_many does the same; the blocking form is refused inside a loop and names it."""
    jobs = await app.aenqueue_many(note.s(n) for n in range(1500))
    with pytest.raises(ConfigurationError, match=r"await app\.aenqueue_many"):
        app.enqueue_many([note.s(1)])
    await app.aclose()

    assert [await asyncio.to_thread(numbers, app), len({job.id for job in jobs})] == [list(range(1500)), 1500]


def _instants(app: Conveyor, redis: redis_py.Redis, jobs: list[Job[None]]) -> list[int]:
    """Return when jobs are due, in ms since the first."""
    due = [redis.zscore(app.client.keys("default").due, job.id.partition(":")[2]) for job in jobs]
    return [int(at - due[0]) for at in due if isinstance(at, float) and isinstance(due[0], float)]


def test_many_are_spread_over_a_time(app: Conveyor, note: Task[[int], None], redis: redis_py.Redis) -> None:
    """`spread` puts the starts of many calls at even distances behind what they have of a delay or an instant."""
    at = datetime.now(UTC) + timedelta(hours=1)
    even = app.enqueue_many([note.options(at=at).s(n) for n in range(1200)], spread="20m")
    assert _instants(app, redis, even) == [1000 * n for n in range(1200)]

    behind = app.enqueue_many((note.options(delay="1h").s(n) for n in range(3)), spread="9m", jitter="10s")
    for n, offset in enumerate(_instants(app, redis, behind)):
        assert abs(offset - n * 180_000) <= 10_000 + 60_000  # a pause of a busy machine between two calls
    assert len(app.enqueue_many((note.s(n) for n in range(3)), spread=0)) == 3
    assert app.enqueue_many([], spread="1m") == []
    with pytest.raises(ConfigurationError, match=r"without front=True\. Nothing was enqueued"):
        app.enqueue_many([note.options(front=True).s(1)], jitter="1s")
    with pytest.raises(ConfigurationError, match="spread 'soon' is not a duration"):
        app.enqueue_many([note.s(1)], spread="soon")
    app.queue("default").purge()


async def test_many_are_spread_without_blocking(app: Conveyor, note: Task[[int], None], redis: redis_py.Redis) -> None:
    """The awaitable form spreads as the blocking one does."""
    at = datetime.now(UTC) + timedelta(hours=1)
    jobs = await app.aenqueue_many((note.options(at=at).s(n) for n in range(4)), spread="2s")
    assert await asyncio.to_thread(_instants, app, redis, jobs) == [0, 500, 1000, 1500]
    await app.queue("default").apurge()
    await app.aclose()


def test_none_are_nothing(app: Conveyor, redis: redis_py.Redis) -> None:
    """No calls store nothing."""
    assert app.enqueue_many([]) == app.enqueue_many(iter(())) == []
    assert redis.keys() == []


def test_call_is_enqueued_alone(app: Conveyor, note: Task[[int], None]) -> None:
    """A call is a value that can be enqueued itself."""
    call = note.options(queue="vip").s(5)

    assert call.enqueue().queue == "vip"
    assert repr(call) == "<test_app.note(5)>"
    assert numbers(app, "vip") == [5]


# -- the app itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": {"k": "secret"}}, {"encrypt": True}, {"lease": 0}, {"lease": "x"}, {"max_payload": 0},
        {"namespace": "a{b"}, {"url": "http://x"},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    """An app is not made with a setting that cannot be honoured."""
    with pytest.raises(ConfigurationError):
        Conveyor(**{"url": "redis://127.0.0.1:1", **wrong})


def test_payload_limit_of_the_app_holds_for_tasks(url: str) -> None:
    """The app's limit holds for each task that has none of its own."""
    with Conveyor(url, max_payload=100) as app:

        def f(text: str) -> str: ...  # type: ignore[empty-body]

        small, large = app.task(f), app.task(name="large", max_payload=1000)(f)
        with pytest.raises(PayloadError) as caught:
            small.enqueue("x" * 200)
        assert caught.value.code == "E21"
        assert definition_of(large).signature.max_payload == 1000


@pytest.mark.standalone_only("counts the connections of one server")
def test_closing_is_not_the_end(app: Conveyor, note: Task[[int], None], redis: redis_py.Redis) -> None:
    """`with app:` closes its connections; using it again opens others."""
    idle = len(redis.client_list())
    for n in range(2):
        with app as same:
            note.enqueue(n)
            assert len(redis.client_list()) == idle + 1
        assert same is app
        until(lambda: len(redis.client_list()) == idle)
    assert numbers(app) == [0, 1]


async def test_async_with_closes_the_loops_connection(url: str, redis: redis_py.Redis) -> None:
    """`async with app:` closes what this event loop opened."""
    idle = len(redis.client_list())
    async with Conveyor(url) as app:
        await app.client.aexecute("PING")
        assert len(redis.client_list()) == idle + 1
    await auntil(lambda: len(redis.client_list()) == idle)


async def test_a_loop_that_ends_after_the_app_leaves_no_connection(url: str, redis: redis_py.Redis) -> None:
    """Loops over messages that are left, and end when the app is closed already, give back what they hold and close."""
    idle = len(redis.client_list())
    app = Conveyor(url)
    held = []
    for name in ("mail", "orders"):
        await app.queue(name).apush_many([1, 2])
        held.append(app.queue(name).aconsume(2))
        async with await anext(held[-1]) as body:
            assert body == 1
    await app.aclose()
    await asyncio.gather(*(one.aclose() for one in held))
    await auntil(lambda: len(redis.client_list()) == idle)

    async with Conveyor(url) as other:
        for name in ("mail", "orders"):
            counts = await other.queue(name).astats()
            assert (counts.ready, counts.leased) == (1, 0)
            await other.queue(name).apurge()


def test_worker_comes_from_the_layer_above(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """app.worker() hands itself and its options to the embedded worker, which is loaded by its name."""
    monkeypatch.setattr("conveyor.worker.embedded.EmbeddedWorker", lambda app, **options: (app, options))

    given, options = cast("tuple[Conveyor, dict[str, Any]]", app.worker(queues={"mail": 3}, threads=2))
    assert given is app
    assert (options["queues"], options["threads"], options["concurrency"]) == ({"mail": 3}, 2, 100)


def test_a_worker_takes_queues_as_pull_does(app: Conveyor) -> None:
    """app.worker(queues=…) takes a list of names or queues, or a map to weights."""
    mail = app.queue("mail")
    for queues in (["mail", "orders"], (mail, "orders"), {"mail": 1, "orders": 3}, {mail: 1, app.queue("orders"): 3}):
        assert repr(app.worker(queues=queues)) == "<EmbeddedWorker of mail, orders: not started>"
    with pytest.raises(ConfigurationError, match="takes a list of queues"):
        app.worker(queues="mail")


# -- queues -------------------------------------------------------------------------------------------------------


def test_queue_is_declared_once(app: Conveyor) -> None:
    """The same declaration gives the same queue, another one of that name is refused; a wrong one leaves no trace."""
    orders = app.queue("orders", int, lease="30s", max_attempts=3)

    assert app.queue("orders", int, lease=30, max_attempts=3) is orders
    assert (core_of(app).queues, core_of(app).queue_lease_ms("orders"), core_of(app).queue_lease_ms("other")) == (
        {"orders": orders},
        30_000,
        15_000,
    )
    wrong: Any
    for wrong in ({"type": str}, {"lease": "31s"}, {"max_attempts": 4}, {"max_length": 5}):
        with pytest.raises(ConfigurationError, match="declared twice"):
            app.queue("orders", **{"type": int, "lease": "30s", "max_attempts": 3, **wrong})
    for wrong in ({"partitions": 0}, {"lease": 0}, {"max_length": 0}, {"full": "never"}, {"max_attempts": 0}):
        with pytest.raises(ConfigurationError):
            app.queue("new", **wrong)
    with pytest.raises(ConfigurationError):
        app.queue("a b")
    assert app.queue("new").name == "new"


def test_queue_carries_messages(app: Conveyor) -> None:
    """A queue made by the app stores and gives back values of its type."""
    orders = app.queue("orders", int)
    orders.push(5)
    [message] = orders.pull()
    with message as order:
        assert order == 5
    assert len(orders) == 0


def test_plain_list_is_declared_once(app: Conveyor, note: Task[[int], None], redis: redis_py.Redis) -> None:
    """A plain list knows the task it feeds, takes what others push, and cannot be declared in two ways."""
    numbers = app.plain_list("app:{t1}:numbers", note, type=int, lease="5s")

    assert app.plain_list("app:{t1}:numbers", task=note.name, type=int, lease=5) is numbers
    assert core_of(app).plain_lists == {"app:{t1}:numbers": numbers}
    assert (numbers.task, core_of(app).queue_lease_ms(numbers.name), core_of(app).keys(numbers.name)) == (
        note.name,
        5_000,
        numbers.keys,
    )
    for declare in (
        lambda: app.plain_list("app:{t1}:numbers"),
        lambda: (app.plain_list("orders"), app.queue("orders")),
    ):
        with pytest.raises(ConfigurationError, match="declared twice"):
            declare()
    plain = app.plain_list("plain")
    redis.rpush("plain", '{"id": 1}')
    [message] = plain.pull()
    with message as body:
        assert body == {"id": 1}


async def test_full_queue_takes_no_jobs(app: Conveyor, note: Task[[int], None]) -> None:
    """The maximum length of a declared queue holds for jobs: each way to enqueue raises QueueFull and stores nothing."""
    app.queue("default", max_length=2)
    await note.aenqueue(1)
    await app.aenqueue_many([note.s(2)])
    many = [note.s(3), note.s(4)]
    for attempt in (note.aenqueue(3), note.options(priority=1).aenqueue(3), app.aenqueue_many(many)):
        with pytest.raises(QueueFull):
            await attempt
    await app.aclose()

    def blocking() -> list[int]:
        calls: list[Any] = [
            lambda: note.enqueue(3),
            lambda: note.options(delay=1).enqueue(3),
            lambda: app.enqueue_many(many),
        ]
        for call in calls:
            with pytest.raises(QueueFull):
                call()
        return numbers(app)

    assert await asyncio.to_thread(blocking) == [1, 2]


# -- hooks --------------------------------------------------------------------------------------------------------

DONE = JobDone("default:x", "t", "default", 1, 0.5)
DEAD = JobDead("default:y", "t", "default", 5, "gave up", None)


def test_listeners_hear_their_events(app: Conveyor) -> None:
    """A listener is called with events of its kind, by name, by class or by a class above; `listeners` has them."""
    heard: list[tuple[str, Event]] = []
    app.on("dead", lambda event: heard.append(("name", event)))
    app.on(JobDead)(lambda event: heard.append(("class", event)))

    assert (JobDead in core_of(app).listeners, JobDone in core_of(app).listeners) == (True, False)

    @app.on(JobEvent)
    def all_kinds(event: JobEvent) -> None:
        heard.append(("above", event))

    for event in (DONE, DEAD):
        core_of(app).emit(event)

    assert heard == [("above", DONE), ("name", DEAD), ("class", DEAD), ("above", DEAD)]
    wrong: list[Any] = ["died", int, 5]
    for kind in wrong:
        with pytest.raises(ConfigurationError):
            app.on(kind)


async def test_async_listeners_are_scheduled(app: Conveyor, caplog: pytest.LogCaptureFixture) -> None:
    """An async listener runs on the loop; an error of a listener is logged, and the others are still called."""
    heard = asyncio.Event()

    @app.on("done")
    def broken(event: JobDone) -> None:
        raise ValueError("broken")

    @app.on("done")
    async def broken_later(event: JobDone) -> None:
        raise ValueError("broken later")

    @app.on("done")
    async def listen(event: JobDone) -> None:
        heard.set()

    with caplog.at_level(logging.ERROR):
        core_of(app).emit(DONE)
        await asyncio.wait_for(heard.wait(), 60)

    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["broken", "broken later"]


def test_async_listener_without_a_loop_is_told(app: Conveyor, caplog: pytest.LogCaptureFixture) -> None:
    """An async listener cannot be called where no loop runs; a warning says so."""

    @app.on("done")
    async def listen(event: JobDone) -> None: ...

    core_of(app).emit(DONE)

    assert "was not called" in caplog.text


async def test_lifespans_open_in_order_and_close_in_reverse(app: Conveyor) -> None:
    """Lifespans are entered in order and left in reverse, also after an error; what they yield is one mapping."""
    steps: list[str] = []

    @app.lifespan
    async def database() -> AsyncIterator[dict[str, Any]]:
        steps.append("open database")
        try:
            yield {"db": 1}
        finally:
            steps.append("close database")

    @app.lifespan
    @asynccontextmanager
    async def nothing() -> AsyncIterator[None]:
        steps.append("open nothing")
        yield None
        steps.append("close nothing")

    async with core_of(app).lifespan_context() as state:
        assert state == {"db": 1}
    assert steps == ["open database", "open nothing", "close nothing", "close database"]
    with pytest.raises(KeyError):
        async with core_of(app).lifespan_context():
            raise KeyError
    assert steps[-1] == "close database"

    async def wrong() -> None: ...

    function: Any = wrong
    with pytest.raises(ConfigurationError):
        app.lifespan(function)


# -- importing ----------------------------------------------------------------------------------------------------


def test_importing_loads_next_to_nothing() -> None:
    """`import conveyor` loads neither redis nor msgspec nor asyncio; the first use of a name loads what it needs."""
    script = "import sys, conveyor\nprint([name for name in ('redis', 'msgspec', 'asyncio', 'click') if name in sys.modules])\n"
    script += "from conveyor import Conveyor\nprint('redis' in sys.modules, Conveyor.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": SOURCE}, capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines() == ["[]", "False conveyor.jobs.app"]


def test_public_names_are_there() -> None:
    """Every public name can be imported, is listed, and a name that does not exist says so."""
    assert [name for name in conveyor.__all__ if getattr(conveyor, name, None) is None] == []
    assert set(conveyor.__all__) <= set(dir(conveyor))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        conveyor.Nothing  # noqa: B018
