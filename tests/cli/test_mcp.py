"""`conveyor mcp`: an agent lists the tools over standard input and output, and calls them."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.store.transport.endpoint import in_thread
from support.running_worker import drain
from support.shell import Shell

pytest.importorskip("mcp", reason="needs mcp, which the extra dev installs")

from mcp import Client, StdioServerParameters

Connect = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def connect(url: str, tmp_path: Path) -> Connect:
    """Return what starts `conveyor mcp` and connects a client to it."""

    @asynccontextmanager
    async def connected(*flags: str) -> AsyncIterator[Client]:
        shell = Shell(tmp_path, url)
        server = StdioServerParameters(
            command=sys.executable, args=["-m", "conveyor", "mcp", *flags], env=shell.environment(), cwd=tmp_path
        )
        async with Client(server, read_timeout_seconds=60) as client:
            yield client

    return connected


@pytest.fixture
async def dead(url: str) -> AsyncIterator[str]:
    """The id of a job that has failed for good."""
    async with Conveyor(url) as app:

        @app.task(name="mail.send", queue="mail", retry=1)
        async def send(to: str) -> None:
            raise TimeoutError("no answer from smtp")

        job = await send.aenqueue("ada")
        await drain(app)
        yield job.id
        await app.queue("mail").apurge()
        await app.queue("mail").apurge(dead=True)


async def ask(client: Client, tool: str, **given: Any) -> tuple[dict[str, Any], bool]:
    """Call a tool; return its document, and whether it says that something went wrong."""
    result = await client.call_tool(tool, given)
    return json.loads(result.content[0].text), result.is_error


async def test_an_agent_looks_and_changes_nothing(connect: Connect, dead: str) -> None:
    """Without --allow-actions all tools only look: status, queues, jobs by a filter, a job, failures, the doctor; bad input is told."""
    async with connect() as client:
        tools = {one.name: one for one in (await client.list_tools()).tools}
        assert {
            "status", "queues", "queue", "jobs", "job", "failures", "schedules", "workers", "limits", "doctor", "audit", "history",
        } <= set(tools)  # fmt: skip
        assert all(one.annotations.read_only_hint for one in tools.values())
        assert tools["job"].input_schema["required"] == ["id"]
        overview, _ = await ask(client, "status")
        assert overview["schema"] == "conveyor/overview@1"
        found, failed = await ask(client, "jobs", filter="state:dead error:Timeout")
        assert [one["id"] for one in found["jobs"]] == [dead]
        assert not failed
        shown, _ = await ask(client, "job", id=dead)
        assert shown["job"]["error"] == {"type": "TimeoutError", "message": "no answer from smtp"}
        assert shown["attempts"]
        assert (await ask(client, "failures"))[0]["groups"][0]["task"] == "mail.send"
        assert "findings" in (await ask(client, "doctor"))[0]
        for tool, given, words in (
            ("jobs", {"filter": "state:"}, "state"),
            ("job", {"id": "mail:none"}, "mail:none"),
            ("job", {}, "missing"),
            ("jobs_actions", {"action": "delete", "ids": [dead]}, "conveyor mcp --allow-actions"),
            ("jobs_delete", {"ids": [dead]}, "There is no tool"),
        ):
            document, failed = await ask(client, tool, **given)
            assert failed
            assert words in document["error"]["message"]
    async with connect("--hide-payloads") as client:
        hidden, _ = await ask(client, "job", id=dead)
        assert "ada" not in json.dumps(hidden)
        assert "no answer" not in json.dumps(hidden)


async def test_actions_are_asked_for_and_audited(connect: Connect, dead: str, url: str) -> None:
    """With --allow-actions an agent retries a job, and the audit says that it was an agent."""
    async with connect("--allow-actions") as client:
        tools = {one.name: one for one in (await client.list_tools()).tools}
        assert tools["jobs_actions"].annotations.destructive_hint
        assert {"queues_pause", "jobs_actions", "operations", "schedules_run", "limits_set"} <= set(tools)
        done, _ = await ask(client, "jobs_actions", action="retry", ids=[dead])
        assert done["results"][0]["outcome"] == "retried"
    async with Conveyor(url) as app:
        admin = Admin.of_app(app)
        assert (await admin.ajob(dead)).status == "ready"
        [entry] = await in_thread(admin.audit)
        assert entry.what == "retry"
        assert entry.who.endswith(" (mcp)")


def test_no_json_of_its_own(tmp_path: Path, url: str) -> None:
    """Its standard output belongs to the protocol, so --json is refused with the command that is meant."""
    refused = Shell(tmp_path, url).run("mcp", "--json")
    assert refused.returncode == 2
    assert "conveyor status --json" in refused.stderr


@pytest.mark.leaves_keys("a schedule is put and deleted")
async def test_another_namespace_has_its_own_schedules(connect: Connect, url: str, tmp_path: Path) -> None:
    """With --namespace, tools look at what is there, and never at the place that the app names in its code."""
    (tmp_path / "elsewhere_shop.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor()\n@app.task(name='mail.send', queue='mail')\ndef send() -> None: ...\n"
    )
    async with Conveyor(url) as app:

        @app.task(name="mail.send", queue="mail")
        async def send() -> None: ...

        await app.schedules.aput("nightly", send.s(), every="1h")
        async with connect("elsewhere_shop:app") as client:
            assert [one["name"] for one in (await ask(client, "schedules"))[0]["schedules"]] == ["nightly"]
        async with connect("elsewhere_shop:app", "--namespace", "other") as client:
            assert (await ask(client, "schedules"))[0]["schedules"] == []
        await (await app.schedules.aget("nightly")).adelete()
