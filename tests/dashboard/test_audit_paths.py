"""Actions on workers and on kinds of failures stand in the audit, whichever way they are made."""

from __future__ import annotations

import asyncio
import getpass
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.admin import Admin
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard
from support.dashboard_client import OWN_PAGE, ask
from support.running_worker import drain, working
from support.waiting import auntil

pytestmark = pytest.mark.leaves_keys("dead letters and the audit are left to be looked at")
ACCOUNT = f"{getpass.getuser()}@{socket.gethostname()}"
TOKEN = {"authorization": "Bearer secret"}
"""A program of the HTTP API; a page of the dashboard sends OWN_PAGE."""


def site_of(url: str) -> Any:
    return dashboard(Conveyor(url), lambda _: Access.ALL.named("ada"), tokens={"secret": Access.ALL.named("deploy")})


async def test_commands_to_workers_are_audited_whichever_way_they_come(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quiet and stop from the command line, from a page and over HTTP: who, what, which worker; a stack is only looked at."""
    monkeypatch.setenv("CONVEYOR_URL", url)
    begun, go = asyncio.Event(), asyncio.Event()
    async with Conveyor(url) as app:

        @app.task(name="hold", queue="held")
        async def hold() -> None:
            begun.set()
            await go.wait()

        await hold.aenqueue()
        admin = Admin(app.client)
        async with working(app, grace=1.0) as worker:
            await begun.wait()

            async def post(path: str, headers: dict[str, str], name: str = worker.name) -> Any:
                return await asyncio.to_thread(lambda: ask(site_of(url), "POST", path, {"id": name}, headers))

            stack = await post("workers/stack", OWN_PAGE)
            assert (stack.status_code, "await go.wait()" in stack.json()["stack"]) == (200, True)
            for action, outcome in (("quiet", "quiet"), ("stop", "stopping")):
                for headers in (OWN_PAGE, TOKEN):
                    answer = await post(f"workers/{action}", headers)
                    assert (answer.status_code, answer.json()["outcome"]) == (200, outcome), answer.text
                line = ["workers", action, worker.name, *(["--yes"] if action == "stop" else [])]
                assert await asyncio.to_thread(main, line) == 0, capsys.readouterr().err
            gone = await post("workers/stop", TOKEN, "nowhere:1")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "E56")
            go.set()
            await auntil(lambda: worker.lifecycle.stopped)
        entries = await asyncio.to_thread(admin.audit)
    assert [(one.who, one.what, one.target, one.count) for one in reversed(entries)] == [
        (who, f"{action} worker", worker.name, 1) for action in ("quiet", "stop") for who in ("ada", "deploy", ACCOUNT)
    ]  # fmt: skip


def test_actions_on_a_kind_of_failure_are_audited_whichever_way_they_come(
    url: str, app: Conveyor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retry and delete of all of one kind: who, what, by which filter, how many, and when."""
    monkeypatch.setenv("CONVEYOR_URL", url)
    admin, expected = Admin(app.client), list[tuple[str, str, str, int]]()
    ways: list[tuple[str, Callable[[str, Any], object]]] = [
        ("ada", lambda action, row: by_http(url, OWN_PAGE, action, row.filter)),
        ("deploy", lambda action, row: by_http(url, TOKEN, action, row.filter)),
        (ACCOUNT, lambda action, row: main(["failures", action, row.fingerprint[:8], "--yes"])),
    ]
    die(url, 2)
    for action in ("retry", "delete"):
        for who, act in ways:
            [row] = admin.failure_matrix("1h").groups
            act(action, row)
            expected.append((who, action, row.filter, row.count))
            if (action, who) != ("delete", ACCOUNT):
                die(url, 0 if action == "retry" else 2)
    entries = list(reversed(admin.audit()))
    assert [(one.who, one.what, one.filter, one.count) for one in entries] == expected
    assert all(one.at is not None for one in entries)


def by_http(url: str, headers: dict[str, str], action: str, filter_: str) -> None:
    site = site_of(url)
    answer = ask(site, "POST", "operations", {"action": action, "filter": filter_}, headers)
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + 60
    while any(one.state == "running" for one in site.service.operations.all()):
        assert time.monotonic() < deadline, "the operation did not end"
        time.sleep(0.005)


def die(url: str, count: int) -> None:
    """Enqueue *count* jobs that fail for good, and run all that there are."""

    async def run() -> None:
        async with Conveyor(url) as other:

            @other.task(name="shop.pay", queue="shop", retry=1)
            async def pay() -> None:
                raise ValueError("refused")

            for _ in range(count):
                await pay.aenqueue()
            await drain(other)

    asyncio.run(run())
