"""Tasks: functions as they were, arguments checked and stored, options that arrive."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import redis as redis_py

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import Context, current
from conveyor.jobs.task import definition_of
from conveyor.messaging.retry import Retry
from support.manual_worker import ManualWorker, arguments


@dataclass
class Order:
    id: str
    total: int

    def paid(self) -> None:
        """Do nothing: a method."""


def add(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


def jobs_in(client: redis_py.Redis, queue: str = "default") -> int:
    return client.hlen(f"conveyor:{{{queue}}}:jobs")


def test_task_stays_the_function(app: Conveyor) -> None:
    """Calling a task runs the function here, with its name, its docstring and its signature."""
    task = app.task(add)

    assert task(1, b=5) == 6
    assert (task.__name__, task.__doc__, inspect.signature(task)) == ("add", "Add.", inspect.signature(add))
    assert (task.name, task.queue, definition_of(task).run_in, definition_of(task).is_async) == (
        "test_task.add",
        "default",
        "thread",
        False,
    )
    assert app.tasks == {"test_task.add": task}


async def test_async_task_stays_the_function(app: Conveyor) -> None:
    """An async task called gives a coroutine, and runs on the loop by default."""

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    assert await double(4) == 8
    assert (definition_of(double).is_async, definition_of(double).run_in) == (True, "loop")


def test_default_name_of_a_script_is_its_modules(tmp_path: Path) -> None:
    """A script that is run calls its tasks as a worker that imports it does."""
    (tmp_path / "shop.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor('redis://x')\n@app.task\ndef f(): ...\nprint(f.name)\n"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}

    ways = [["shop.py"], ["-m", "shop"], ["-c", "import shop"]]
    outputs = [
        subprocess.run([sys.executable, *way], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        for way in ways
    ]

    assert [output.stdout for output in outputs] == ["shop.f\n"] * 3


def test_arguments_arrive_in_their_types(app: Conveyor) -> None:
    """The stored arguments are those the function would be called with, dataclasses and datetimes included."""
    seen = datetime(2026, 1, 2, tzinfo=UTC)

    @app.task
    def ship(order: Order, at: datetime, *, tags: set[str]) -> None: ...

    job = ship.enqueue(Order("o1", 3), seen, tags={"a"})

    manual = ManualWorker(app)
    [id_] = manual.take()
    assert job.id == f"default:{id_}"
    assert (job.task, job.queue, job.duplicate) == ("test_task.ship", "default", False)
    assert arguments(app, manual.envelopes[id_]) == ([Order("o1", 3), seen], {"tags": {"a"}})
    manual.leave()


def test_context_is_not_an_argument(app: Conveyor) -> None:
    """A parameter whose default is current() is filled by the worker: it cannot be passed and is not stored."""

    @app.task
    def work(n: int, context: Context = current()) -> None: ...

    work.enqueue(1)

    assert tuple(definition_of(work).signature.injected) == ("context",)
    with pytest.raises(PayloadError, match="which the worker fills"):
        work.enqueue(1, context=current())
    manual = ManualWorker(app)
    [id_] = manual.take()
    assert arguments(app, manual.envelopes[id_]) == ([1], {})
    manual.leave()


def test_wrong_arguments_store_nothing(app: Conveyor, redis: redis_py.Redis) -> None:
    """Arguments that do not fit the function, or cannot be stored, are refused where they are passed."""
    task: Any = app.task(add)

    for args, kwargs, code in [((), {}, "E03"), (("x",), {}, "E03"), ((1,), {"c": 1}, "E03"), ((object(),), {}, "E04")]:
        with pytest.raises(PayloadError) as caught:
            task.enqueue(*args, **kwargs)
        assert caught.value.code == code
    with pytest.raises(PayloadError):
        task.options(delay=1).enqueue("x")

    assert redis.keys() == []


async def test_blocking_enqueue_in_a_loop_is_refused(app: Conveyor, redis: redis_py.Redis) -> None:
    """Inside a running loop enqueue raises E06, which shows the call to write instead and where it stands."""
    task = app.task(add)

    for enqueue in (task.enqueue, task.options(priority=1).enqueue):
        with pytest.raises(ConfigurationError) as caught:
            enqueue(1, b=3)
        assert caught.value.code == "E06"
        assert "add.enqueue() called while an event loop is running" in str(caught.value)
        assert "from test_task.py:" in str(caught.value)
        assert "await add.aenqueue(1, b=3)" in str(caught.value)

    assert redis.keys() == []


async def test_enqueues_of_one_tick_share_round_trips(app: Conveyor, redis: redis_py.Redis) -> None:
    """A hundred concurrent aenqueue calls are stored in the order of their calls, by a few scripts."""
    task = app.task(add)
    await task.aenqueue(0)  # opens the connection, loads the script
    redis.config_resetstat()

    jobs = await asyncio.gather(*(task.aenqueue(n) for n in range(1, 101)))

    stats = redis.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] <= 3
    ids = redis.lrange("conveyor:{default}:ready:0", 0, -1)
    assert [f"default:{id_.decode()}" for id_ in ids[1:]] == [job.id for job in jobs]
    await app.aclose()


def test_options_reach_the_envelope(app: Conveyor) -> None:
    """Headers, timeout, result's time and attempts of one job are stored with it; its queue is the one asked for."""
    task = app.task(add)
    job = task.options(
        queue="vip", headers={"trace": "t1"}, timeout="5s", keep_result="1h", retry=2, expires="1m"
    ).enqueue(1)

    assert job.queue == "vip"
    manual = ManualWorker(app, "vip")
    [id_] = manual.take()
    extra, expires = manual.envelopes[id_].extra, manual.envelopes[id_].expires_ms
    assert (extra.headers, extra.timeout_ms, extra.keep_ms, extra.attempts) == ({"trace": "t1"}, 5_000, 3_600_000, 2)
    assert expires is not None
    assert abs(expires - datetime.now(UTC).timestamp() * 1000 - 60_000) < 30_000
    manual.leave()


def test_options_order_jobs(app: Conveyor) -> None:
    """A higher priority goes first, front goes before all of its priority, the rest is first come first."""
    task = app.task(add)
    last = task.enqueue(1)
    first = task.options(front=True).enqueue(2)
    urgent = task.options(priority=9).enqueue(3)

    manual = ManualWorker(app)
    assert [f"default:{id_}" for id_ in manual.take(3)] == [urgent.id, first.id, last.id]
    manual.leave()


def test_delayed_jobs_are_scheduled(app: Conveyor, redis: redis_py.Redis) -> None:
    """A delay counts from now by the server's clock, an instant is taken as it is, and one in the past is now."""
    task = app.task(add)
    at = datetime.now(UTC) + timedelta(hours=1)

    delayed, planned = task.options(delay="30m").enqueue(1), task.options(at=at).enqueue(2)
    past = task.options(at=at - timedelta(days=1)).enqueue(3)

    assert [job.status() for job in (delayed, planned, past)] == ["scheduled", "scheduled", "ready"]
    due = dict(redis.zrange("conveyor:{default}:due", 0, -1, withscores=True))
    assert due[planned.id.rpartition(":")[2].encode()] == round(at.timestamp() * 1000 + 0.5)
    assert abs(due[delayed.id.rpartition(":")[2].encode()] - (at.timestamp() - 1800) * 1000) < 30_000


def test_own_id_is_stored_once(app: Conveyor, redis: redis_py.Redis) -> None:
    """An id of one's own names the job, and a second enqueue with it stores nothing."""
    task = app.task(add).options(id="order-7")

    first, second = task.enqueue(1), task.enqueue(2)

    assert (first.id, second.id) == ("order-7", "order-7")
    assert jobs_in(redis) == 1
    manual = ManualWorker(app)
    assert manual.take(10) == ["order-7"]
    assert arguments(app, manual.envelopes["order-7"]) == ([1, 2], {})
    manual.done("order-7")
    assert task.enqueue(3).status() == "done"
    assert jobs_in(redis) == 0
    manual.leave()


def test_unique_key_returns_the_holder(app: Conveyor, redis: redis_py.Redis) -> None:
    """A second enqueue with a key that is held returns the job that holds it, marked as a duplicate."""
    task = app.task(add).options(unique="user-1")

    first, second = task.enqueue(1), task.enqueue(2)

    assert (first.duplicate, second.duplicate, second.id) == (False, True, first.id)
    assert jobs_in(redis) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay": 1, "at": datetime.now(UTC)}, {"delay": -1}, {"delay": "soon"}, {"at": datetime(2030, 1, 1)},  # noqa: DTZ001
        {"priority": 10}, {"priority": True}, {"id": ""}, {"id": "a\nb"}, {"queue": "no spaces"}, {"unique": ""},
        {"unique": 5}, {"expires": 0}, {"headers": {"a": 1}}, {"headers": {"a": "\udc80"}}, {"headers": {"a": "x" * 9000}},
        {"headers": 5}, {"front": True, "delay": 1}, {"timeout": 0}, {"keep_result": "x"}, {"retry": 0},
        {"retry": Retry()}, {"wait_replicas": -1}, {"fsync": 1},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(app: Conveyor, wrong: dict[str, Any]) -> None:
    """An option that cannot be honoured raises where it is given."""
    with pytest.raises((ConfigurationError, PayloadError)):
        app.task(add).options(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue": "a b"}, {"name": "ü"}, {"timeout": 0}, {"retry": 0}, {"keep_result": -1}, {"run_in": "fork"},
        {"ack": "never"}, {"expires": 0}, {"priority": -1},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(app: Conveyor, wrong: dict[str, Any]) -> None:
    """A task is not registered with a setting that cannot be honoured."""
    with pytest.raises(ConfigurationError):
        app.task(**wrong)(add)

    assert app.tasks == {}


def test_settings_are_kept_for_the_worker(app: Conveyor) -> None:
    """The worker reads the options of the decorator, in ms."""
    task = app.task(
        name="mail.add", queue="mail", timeout="30s", retry=3, keep_result=0, run_in="process", ack="early"
    )(add)
    settings = definition_of(task).settings

    assert (task.name, task.queue, definition_of(task).run_in) == ("mail.add", "mail", "process")
    assert (settings.timeout_ms, settings.retry.attempts, settings.keep_ms, settings.ack) == (30_000, 3, 0, "early")


def test_functions_that_cannot_be_tasks_are_refused(app: Conveyor) -> None:
    """A second function of the same name, a nameless one, a task, and an async one on a thread are refused."""
    app.task(add)

    def other() -> None: ...

    other.__name__ = "add"

    async def later() -> None: ...

    wrong: list[Any] = [other, lambda: None, partial(add, 1), app.tasks["test_task.add"], 5]
    for function in wrong:
        with pytest.raises(ConfigurationError):
            app.task(function)
    with pytest.raises(ConfigurationError, match="run_in='thread'"):
        app.task(run_in="thread")(later)

    assert list(app.tasks) == ["test_task.add"]


def test_partial_of_an_async_function_is_async(app: Conveyor) -> None:
    """A partial and a callable object run where what they call would."""

    async def fetch(url: str, n: int) -> int:
        return n

    assert definition_of(app.task(name="partial")(partial(fetch, n=1))).run_in == "loop"


def test_pushes_of_one_make_few_calls(app: Conveyor) -> None:
    """A blocking enqueue makes 19 calls of Python, and a push 29: what a call needs only when it fails is made then."""
    task, queue = app.task(add), app.queue("messages")
    for push, most in ((partial(task.enqueue, 1), 19), (partial(queue.push, 1), 29)):
        for _ in range(300):  # connects, and draws the random parts of some ids
            push()
        calls = [_calls_of(push) for _ in range(20)]
        assert min(calls) <= most, calls


def _calls_of(function: Callable[[], object]) -> int:
    """Return how many functions of Python are called."""
    calls = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def test_what_no_worker_can_run_is_refused(app: Conveyor) -> None:
    """A generator, a method and a task are no functions that a worker can call: the decorator says so, with the remedy."""

    def each(n: int) -> Iterator[int]:
        yield n

    async def aeach(n: int) -> AsyncIterator[int]:
        yield n

    for wrong in (each, aeach, partial(each, 1)):
        with pytest.raises(ConfigurationError, match=r"is a generator.*context\.emit"):
            app.task(name="x")(wrong)
    with pytest.raises(ConfigurationError, match=r"Order\.paid\(\) is a method.*@staticmethod"):
        app.task(Order.paid)

    @app.cron(every="1h")
    async def scheduled() -> None: ...

    with pytest.raises(ConfigurationError, match=r"a task already.*@app.cron\(…\) stands above"):
        app.task(name="y")(scheduled)
