"""Habits of other libraries: calls by name, and hints for names that something has elsewhere."""

from __future__ import annotations

import copy
import re
from datetime import date
from typing import Any

import pytest

import conveyor
from conveyor import ConfigurationError, Conveyor, JobFailed, PayloadError
from conveyor.admin import Admin
from conveyor.jobs.hints import APP_MEMBERS, APP_OPTIONS, JOB_MEMBERS, PACKAGE_NAMES, TASK_MEMBERS
from support.running_worker import drain


async def test_a_task_of_another_program_is_enqueued_by_its_name(url: str) -> None:
    """`app.enqueue` needs no function: the worker binds positions and names, types them, and refuses what does not fit."""
    producer, worker = Conveyor(url), Conveyor(url)

    @worker.task(name="bill.send", queue="bill", retry=1)
    async def send(customer: int, due: date, *, copies: int = 1) -> str:
        return f"{customer} {due:%d.%m.} {copies}"

    @worker.task(name="collect")
    async def collect(*numbers: int, **words: str) -> list[Any]:
        return [numbers, words]

    producer.external_task("bill.send", queue="bill")
    sent = await producer.aenqueue("bill.send", 7, due="2026-12-24", copies=2)
    collected = await producer.external_task("collect").options(priority=3).aenqueue(1, 2, three="4")
    misfit = await producer.aenqueue("bill.send", 7)
    mistyped = await producer.aenqueue("bill.send", "seven", due="2026-12-24")
    await drain(worker)

    assert (sent.queue, sent.task) == ("bill", "bill.send")
    assert await sent.aresult() == "7 24.12. 2"
    assert await collected.aresult() == [[1, 2], {"three": "4"}]
    with pytest.raises(JobFailed, match="missing 'due'"):
        await misfit.aresult()
    with pytest.raises(JobFailed, match="Expected int, got str - at"):
        await mistyped.aresult()
    await worker.queue("bill").apurge(dead=True)
    for app in (producer, worker):
        await app.aclose()


def test_a_name_that_is_registered_here_is_that_task(app: Conveyor) -> None:
    """`app.enqueue` of a task that this program has checks the arguments here, and goes to the task's queue."""

    @app.task(name="add", queue="sums")
    def add(a: int, b: int) -> int:
        return a + b

    assert app.external_task("add") is add
    assert app.enqueue("add", 1, b=2).queue == "sums"
    with pytest.raises(PayloadError, match="missing 'b'"):
        app.enqueue("add", 1)
    app.external_task("far", queue="there")
    with pytest.raises(ConfigurationError, match="declared twice"):
        app.external_task("far", queue="elsewhere")
    app.queue("sums").purge()


def test_names_of_other_libraries_get_a_hint() -> None:
    """Members and options that other libraries have are answered with what to write here."""
    app = Conveyor("redis://localhost:1")

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    task: Any = add
    for member, written in {"delay": r"add\.enqueue", "apply_async": r"add\.options", "kiq": "await add"}.items():
        with pytest.raises(AttributeError, match=written):
            getattr(task, member)
    with pytest.raises(AttributeError, match=r"Task \S*add has no attribute 'colour'\.$"):
        _ = task.colour
    with pytest.raises(AttributeError, match=r"app\.enqueue\('name'"):
        _ = app.send_task  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"job\.result\("):
        _ = app.job("x").get  # type: ignore[attr-defined]
    for owner, members, name in (
        (task, TASK_MEMBERS, r"\S*add"),
        (app, APP_MEMBERS, ""),
        (app.job("x"), JOB_MEMBERS, ""),
    ):
        for member, hint in members.items():
            written = re.escape(hint).replace(r"\{name\}", name)
            with pytest.raises(AttributeError, match=f"{member!r}\\. Write: {written}$"):
                getattr(owner, member)
    for name, hint in PACKAGE_NAMES.items():
        with pytest.raises(ImportError, match=f"{name!r}\\. Write: {re.escape(hint)}$"):
            exec(f"from conveyor import {name}")
    with pytest.raises(AttributeError, match=r"has no attribute 'colour'\.$"):
        _ = conveyor.colour  # type: ignore[attr-defined]
    for option, hint in APP_OPTIONS.items():
        with pytest.raises(TypeError, match=f"{option!r}\\. Write: {re.escape(hint)}$"):
            Conveyor(**{option: ""})
    with pytest.raises(TypeError, match=r"not available yet\. Write: context\.spawn"):
        task.s(1, 2) | task.s(3)
    with pytest.raises(TypeError, match=r"'bind'\. Write: current\(\)"):
        app.task(bind=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"'retries'\. Write: retry=5"):
        app.task(retries=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"'countdown'\. Write: delay="):
        task.options(countdown=3)
    with pytest.raises(TypeError, match=r"'colour'\.$"):
        task.options(colour=3)


def test_a_task_can_be_copied() -> None:
    """A copy of a task, which asks for members that tasks do not have, is made and enqueues as the task does."""
    app = Conveyor("redis://localhost:1")

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    copied = copy.copy(add)
    assert copied(1, 2) == 3
    assert copied.s(1, 2).definition is add.s(1, 2).definition


def test_one_id_is_one_id(app: Conveyor) -> None:
    """The actions of Admin take one id as well as many: the letters of a text are no ids."""

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    admin = Admin(app.client)
    job = add.options(delay="1h").enqueue(1, 2)

    assert [(one.id, one.outcome) for one in admin.retry(job.id)] == [(job.id, "retried")]
    assert [one.outcome for one in admin.cancel(job.id)] == ["cancelled"]
    other = add.enqueue(1, 2)
    assert [one.outcome for one in admin.delete(other.id)] == ["deleted"]
    assert admin.redrive("default", ids=other.id) == 0


def test_a_plain_list_takes_its_task_second(app: Conveyor) -> None:
    """`plain_list(name, task)` is the order of the contract, and a type in that place is told where it goes."""

    @app.task
    def note(n: int) -> None: ...

    assert app.plain_list("numbers", note).task == note.name
    with pytest.raises(ConfigurationError, match="type=…"):
        app.plain_list("others", int)  # type: ignore[arg-type]


async def test_the_result_of_an_own_id_is_found_through_its_task(url: str) -> None:
    """`task.job(own_id)` finds the queue of the job by itself."""
    app = Conveyor(url)

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    await add.options(id="order-7").aenqueue(1, 2)
    await drain(app)

    assert await add.job("order-7").aresult() == 3
    await app.aclose()
