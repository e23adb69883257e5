"""Jobs that need a worker with a label, or of the build that enqueued them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import current
from conveyor.messaging import retry
from conveyor.messaging.limits import Concurrency
from conveyor.worker import settlement
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import audit, until_counts, working
from support.shell import Shell
from support.waiting import auntil

APP = """
from conveyor import Conveyor
app = Conveyor()
@app.task(name="train", requires="gpu")
async def train() -> None: ...
"""


async def why(job: Any, kind: str) -> str:
    """Wait until the job waits for that cause; return its sentence."""

    async def told() -> str | None:
        found = await job.awhy()
        return next((str(one) for one in (found, *found.also) if one.kind == kind), None)

    sentence: str = await auntil(told, what=f"{job} waits for {kind}")
    return sentence


@pytest.mark.row("A41")
async def test_a_job_waits_for_a_worker_with_its_labels(app: Conveyor) -> None:
    """A worker without the label leaves it, visibly and free of charge; one that has all of them runs it, as its first attempt."""

    @app.task(requires=["gpu", "eu"])
    async def train() -> int:
        return current().attempt

    @app.task
    async def plain() -> str:
        return "plain"

    job = await train.aenqueue()
    async with working(app, labels=["eu"]):
        assert await (await plain.aenqueue()).aresult(timeout="60s") == "plain"
        assert "the label 'gpu'" in await why(job, "label")
        causes = await Admin(app.client).acauses("default")
        assert [(one.kind, one.name, one.jobs) for one in causes if one.kind == "label"] == [("label", "gpu", 1)]
        await until_counts(app, lambda now: now.scheduled)  # it was leased, and put off
        async with working(app, labels=["gpu", "eu", "big"]):
            assert await job.aresult(timeout="60s") == 1
    assert await audit(app) == []


@pytest.mark.redis6
async def test_a_worker_that_can_run_a_job_takes_it_from_one_that_cannot(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch, redis: redis_py.Redis
) -> None:
    """However long others have put jobs off, a worker with the label takes them at once, whether it was idle or starts later."""
    monkeypatch.setattr(settlement, "LONGEST_REQUIREMENT_MS", 3_600_000)
    monkeypatch.setattr(retry, "put_off_ms", lambda _: 3_600_000)
    ran: list[int] = []

    @app.task(requires="gpu")
    async def train(number: int) -> None:
        ran.append(number)

    @app.task(requires="gpu", priority=4, limits=[Concurrency(1)])
    async def urgent() -> None: ...

    async with working(app):
        jobs = [await train.aenqueue(number) for number in range(5)]
        jobs.append(await urgent.aenqueue())
        gone = await train.aenqueue(99)
        await until_counts(app, lambda now: now.scheduled >= 7)
        await gone.acancel()
        assert redis.hget("conveyor:{default}:conf", "needs") == b"1"
        async with working(app, labels=["gpu"]):
            for job in jobs:
                await job.aresult(timeout="60s")
            assert sorted(ran) == list(range(5))
            for number in range(20):  # one or the other leases it
                await (await train.aenqueue(number)).aresult(timeout="60s")
    assert not redis.exists("conveyor:{default}:needs")
    assert not redis.hexists("conveyor:{default}:conf", "needs")
    assert await audit(app) == []


@pytest.mark.row("A41")
async def test_a_pinned_job_waits_for_its_build_until_it_is_released(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of another build leave it; released by an operator, any worker runs it."""
    monkeypatch.setenv("CONVEYOR_BUILD", "v1")

    @app.task(pin="build")
    async def bill() -> dict[str, str]:
        return dict(current().headers)

    headers = {"pin": '{"pin":"v1"', "build": "v1"}
    jobs = [await bill.aenqueue(), await bill.options(headers=headers).aenqueue()]
    monkeypatch.setenv("CONVEYOR_BUILD", "v2")
    admin = Admin(app.client)
    async with working(app):
        assert "pinned to build 'v1'" in await why(jobs[0], "build")
        await until_counts(app, lambda now: now.scheduled >= 2)
        assert await admin.arelease_build("default", "v2") == 0
        assert await admin.arelease_build("default", "v1") == 2
        assert [await job.aresult(timeout="60s") for job in jobs] == [{}, headers]


def test_labels_that_are_none_are_refused(url: str) -> None:
    """Nothing is declared with a label that no worker could be given."""
    app = Conveyor(url)
    for wrong in ({"requires": "a b"}, {"requires": [""]}, {"requires": 5}, {"pin": "version"}, {"requires": "x" * 65}):
        with pytest.raises(ConfigurationError):
            app.task(**wrong)(print)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="Invalid label in labels"):
        app.worker(labels="a b")
    app.close()


def test_one_label_is_one_for_a_worker_as_for_a_task(url: str) -> None:
    """``labels="gpu"`` is the label gpu, and not three of one letter."""
    worker: Any = Conveyor(url).worker(queues={"q": 1}, labels="gpu")
    assert worker._worker._labels == ["gpu"]
    assert repr(worker) == "<EmbeddedWorker of q: not started>"


def test_a_worker_gets_its_labels_on_the_command_line(url: str, tmp_path: Path) -> None:
    """`--label` reaches the processes of a worker, which run what needs it."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", APP)
    with Conveyor(url) as app:
        job = app.task(name="train", requires="gpu")(lambda: None).enqueue()
        done = shell.run("worker", "shop:app", "--label", "gpu,eu", "--burst")
        assert (done.returncode, "labels     gpu, eu" in done.stderr) == (0, True), done.stderr
        assert job.status() == "done"
