"""Slots of workers: how many there are, and how many are used, of all workers and of those that serve a queue."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.admin import admin as admin_module
from conveyor.admin.admin import Admin
from conveyor.admin.worker_control import Slots
from conveyor.dashboard import Access, dashboard
from conveyor.store import operations
from support.app_fixtures import loop_app  # noqa: F401
from support.client_worker import recorded_steps
from support.dashboard_client import get
from support.running_worker import working
from support.shell import Shell
from support.terminal import on_terminal, plain
from support.waiting import auntil

pytestmark = pytest.mark.standalone_only("in a cluster the workers of each queue are read by themselves")


@pytest.fixture
async def held(app: Conveyor) -> AsyncIterator[Admin]:
    """A worker of four slots, of which jobs of `busy` use two and one of `mail` uses one, and one of an earlier release for `apart`."""
    begun, go = list[str](), asyncio.Event()

    async def hold() -> None:
        begun.append("one")
        await go.wait()

    busy, mail = (app.task(name=name, queue=name)(hold) for name in ("busy", "mail"))
    about = operations.about(kind="worker", host="earlier", pid=7, concurrency=3, version="0.0.9", started=0)
    apart = app.client.keys("apart")
    await app.client.aannounce(apart)
    await app.client.arun(operations.register(apart, "earlier", 600_000, about))
    async with working(app, concurrency=4):
        for task in (busy, busy, mail):
            await task.aenqueue()
        await auntil(lambda: len(begun) == 3)
        try:
            yield Admin(app.client)
        finally:
            go.set()
    await app.client.arun(operations.reap(apart, "earlier"))


async def test_slots_of_a_queue_are_those_of_its_workers(held: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The slots of a queue are those of the workers that serve it, whatever uses them, and cost no command more than to list these.

    Where others are not read with them, that is said.
    """
    steps, read_names = recorded_steps(held.client, monkeypatch), held.client.queues
    monkeypatch.setattr(held.client, "queues", lambda: steps.append("names") or read_names())
    listed = await held.aworkers("mail")
    assert steps == ["names", "workers"]
    found = await held.aqueue_workers("mail")
    assert steps == ["names", "workers"] * 2
    assert [one.id for one in found.registrations] == [one.id for one in listed]
    assert (found.slots, found.exact) == (Slots(3, 4), True)
    assert str(found.slots) == "3 of 4 slots used"
    monkeypatch.setattr(admin_module, "_WORKERS_SIZE", 1)
    found = await held.aqueue_workers("mail")
    assert (found.slots, found.exact) == (Slots(1, 4), False)


async def test_the_command_line_tells_slots_and_usage(held: Admin, url: str, tmp_path: Path) -> None:
    """Lists, `status` and `queue show` tell slots that are used, and what workers use; what an earlier release does not tell is a dash."""
    shell = Shell(tmp_path, url)

    async def run(*arguments: str) -> str:
        return (await asyncio.to_thread(shell.run, *arguments)).stdout

    async def shown(*arguments: str, columns: int = 120) -> str:
        return plain(await asyncio.to_thread(lambda: on_terminal(shell, *arguments, columns=columns)))

    all_slots = {"used": 3, "total": 7}
    listed = json.loads(await run("workers", "list", "--json"))
    assert listed["slots"] == json.loads(await run("status", "--json"))["slots"] == all_slots
    [earlier, own] = sorted(listed["workers"], key=lambda one: one["memory"] or 0)
    assert (earlier["memory"], earlier["cpu"], earlier["slots"]) == (None, None, {"used": 0, "total": 3})
    assert (own["cpu"], own["slots"], own["concurrency"]) == (0, {"used": 3, "total": 4}, 4)
    rows = [line.split("\t")[-2:] for line in (await run("workers", "list")).splitlines()]
    assert sorted(rows) == sorted([["", ""], [str(own["memory"]), "0"]])

    table = await shown("workers", "list")
    assert re.search(r"MEMORY +CPU\n", table)
    assert re.search(r"[\d.]+ MB +0 %\n", table)
    assert re.search(r"earlier:7 .* - +-\n", table)
    assert table.endswith("\n\n3 of 7 slots used.\n")
    assert "MEMORY" not in await shown("workers", "list", columns=80)
    facts = await shown("workers", "show", own["name"])
    assert re.search(r"slots +4\nslots used +3\n", facts)
    assert re.search(r"memory +[\d.]+ MB\ncpu +0 %\n", facts)
    assert "memory" not in await shown("workers", "show", "earlier:7")
    assert "2 worker processes, 3 of 7 slots used:\n" in await shown("status")

    queue = json.loads(await run("queue", "show", "mail", "--json"))
    assert queue["slots"] == {"used": 3, "total": 4, "exact": True}
    assert "slots\t4\nslots_used\t3\n" in await run("queue", "show", "mail")
    assert re.search(r"slots +████████░░ 3 of 4 slots used\n", await shown("queue", "show", "mail", columns=80))


async def test_the_api_tells_slots_and_usage(held: Admin, app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The snapshot, workers and a queue tell slots, with what a worker uses.

    The list of queues has those of the last snapshot, and reads no worker for it.
    """
    site: Any = dashboard(app, lambda _: Access.ALL)
    steps = recorded_steps(site.service.admin.client, monkeypatch)

    async def read(path: str, **inputs: Any) -> Any:
        return await asyncio.to_thread(get, site, path, **inputs)

    assert [one["slots"] for one in (await read("queues"))["queues"]] == [None] * 3
    assert steps == ["count_queues"]
    assert (await read("snapshot"))["totals"]["slots"] == {"used": 3, "total": 7}
    workers = await read("workers")
    assert workers["slots"] == {"used": 3, "total": 7}
    [own] = [one for one in workers["workers"] if one["id"] != "earlier:7"]
    [earlier] = [one for one in workers["workers"] if one["id"] == "earlier:7"]
    assert (own["slots"], own["cpu"], own["memory"] > 0) == ({"used": 3, "total": 4}, 0, True)
    assert (earlier["slots"], earlier["cpu"], earlier["memory"]) == ({"used": 0, "total": 3}, None, None)
    steps.clear()
    listed = {one["name"]: one["slots"] for one in (await read("queues"))["queues"]}
    assert listed == {
        "apart": {"used": 0, "total": 3},
        "busy": {"used": 3, "total": 4},
        "mail": {"used": 3, "total": 4},
    }
    assert steps == ["count_queues"]
    queue = await read("queue", name="mail")
    assert queue["slots"] == {"used": 3, "total": 4, "exact": True}
    [there] = queue["workers"]
    assert (there["queues"], there["held"], there["slots"]) == (["mail"], 1, {"used": 3, "total": 4})
