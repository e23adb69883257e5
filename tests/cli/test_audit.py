"""The command line in the audit: each command that changes something says who did what, on what, how many, and when."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from conveyor import Conveyor
from conveyor.admin import Admin
from conveyor.cli import COMMANDS, cli

pytestmark = pytest.mark.leaves_keys("jobs are left to be acted on")
WHO = f"{getpass.getuser()}@{socket.gethostname()}"
LOOKING = {
    "config show", "config check", "job export", "status", "top", "doctor", "metrics", "audit", "acl", "help", "completion", "dashboard", "bench", "job list", "job show",
    "job logs", "job why", "job watch", "queue list", "queue show", "topic list", "limits list", "schedule list", "schedule show",
    "schedule next", "workers list", "workers show", "workers stack", "failures list", "failures show",
}  # fmt: skip
"""Commands that change nothing."""
PROGRAMS = {"demo", "dev", "worker", "relay", "server start", "server stop", "server status", "mcp"}
"""Programs that run: what they do is done by jobs, or by those who talk to them."""
ACTING: dict[str, tuple[list[str], str]] = {
    "push": (["orders", '{"n": 1}'], "push"),
    "enqueue": (["shop_audit.send", "user=7", "--app", "shop_audit"], "enqueue"),
    "topic subscribe": (["created", "orders"], "subscribe"),
    "topic unsubscribe": (["created", "orders"], "unsubscribe"),
    "topic publish": (["created", "{}"], "publish"),
    "limits set": (["limited", "5/1m", "--app", "shop_audit"], "set limit"),
    "limits reset": (["limited", "--app", "shop_audit"], "reset limit"),
    "queue pause": (["mail"], "pause"),
    "queue resume": (["mail"], "resume"),
    "queue redrive": (["mail", "--task", "shop_audit.send", "--yes"], "redrive"),
    "queue repair": (["mail"], "repair"),
    "queue release": (["mail", "--build", "b1"], "release build"),
    "queue purge": (["orders", "--yes"], "purge"),
    "queue partition": (["orders", "2", "--yes"], "repartition"),
    "queue delete": (["orders", "--yes"], "delete queue"),
    "job update": (["WAITING", "user=8", "--app", "shop_audit"], "update"),
    "job retry": (["--queue", "mail", "--state", "scheduled", "--older", "0s", "--yes"], "retry"),
    "job cancel": (["WAITING"], "cancel"),
    "job delete": (["--queue", "mail", "--task", "shop_audit.send", "--yes"], "delete"),
    "schedule run": (["nightly", "--app", "shop_audit"], "run schedule"),
    "schedule pause": (["nightly"], "pause schedule"),
    "schedule resume": (["nightly"], "resume schedule"),
    "schedule delete": (["nightly", "--yes"], "delete schedule"),
    "mark": (["v1.4"], "mark"),
}
"""Commands that change something, in an order in which each has something to do."""
ELSEWHERE = {"workers quiet", "workers stop", "failures retry", "failures delete"}
"""Commands that need a running worker, or act as others do."""


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> list[str]:
    """Return the names of all commands below one."""
    if not isinstance(command, click.Group):
        return [" ".join(words)]
    context = click.Context(command)
    names = COMMANDS if not words else command.list_commands(context)
    return [leaf for name in names for leaf in leaves(command.get_command(context, name) or command, (*words, name))]


def test_each_command_that_changes_something_stands_in_the_audit(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command is known to look, to run, or to act; those that act leave one entry each, with the account and the machine."""
    assert set(leaves(cli)) - LOOKING - PROGRAMS - ELSEWHERE == set(ACTING)
    (tmp_path / "shop_audit.py").write_text(
        "from conveyor import Conveyor, Rate\napp = Conveyor()\n@app.task(queue='mail')\ndef send(user: int) -> None: ...\n"
        "@app.cron('0 9 * * *', name='nightly')\ndef report() -> None: ...\n"
        "limited = app.queue('limited', limits=[Rate(1, '1s')])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVEYOR_URL", url)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        run_all(url)
    finally:
        sys.modules.pop("shop_audit", None)


def run_all(url: str) -> None:
    with Conveyor(url) as app:
        import shop_audit  # type: ignore[import-not-found]

        waiting = shop_audit.send.options(delay="1h").enqueue(7).id
        app.schedules.put("nightly", shop_audit.send.s(1), cron="0 9 * * *")
        shop_audit.limited.push(1)
        admin = Admin(app.client)
        for known, (name, (arguments, what)) in enumerate(ACTING.items(), 1):
            line = [*name.split(), *(waiting if one == "WAITING" else one for one in arguments)]
            if name == "queue redrive":
                bury(app)
            if name in {"job retry", "job delete", "job cancel"}:
                waiting = shop_audit.send.options(delay="1h").enqueue(9).id
                line = [waiting if one.startswith("mail:") else one for one in line]
            done = CliRunner().invoke(cli, line, prog_name="conveyor", obj={"verbose": False})
            entries = admin.audit(limit=1_000)
            assert len(entries) == known, (line, done.output, done.exception)
            assert (entries[0].who, entries[0].what) == (WHO, what), line
        found = {one.what: one for one in admin.audit(limit=1_000)}
        assert found["redrive"].filter == "task:shop_audit.send"
        assert (found["purge"].count, found["push"].target) == (1, "orders")
        assert found["delete"].filter == "task:shop_audit.send"
        assert (found["delete"].count or 0) >= 1
        shop_audit.app.close()
    shown = CliRunner().invoke(cli, ["audit", "--limit", "3", "--json", "--url", url], prog_name="conveyor")
    document: dict[str, Any] = json.loads(shown.output)
    assert document["schema"] == "conveyor/audit@1"
    assert [one["what"] for one in document["entries"]] == ["mark", "delete schedule", "resume schedule"]


def bury(app: Conveyor) -> None:
    """Leave a dead letter of the task."""
    import asyncio

    import shop_audit

    from support.running_worker import drain

    @app.task(name="shop_audit.send", queue="mail", retry=1)
    def send(user: int) -> None:
        raise ValueError(user)

    async def run() -> None:
        await shop_audit.send.aenqueue(1)
        await shop_audit.app.aclose()
        await drain(app)
        await app.aclose()

    asyncio.run(run())
