"""Two things that people come to a terminal for, done with the real commands, as a new user would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conveyor import Concurrency, Conveyor
from conveyor.store.transport.endpoint import in_thread
from support.running_worker import drain
from support.shell import Shell


@pytest.fixture
async def app(url: str) -> AsyncIterator[Conveyor]:
    """An app on the server; what its queues hold is removed."""
    async with Conveyor(url) as app:
        yield app
        for name in ("mail", "media"):
            await app.queue(name).apurge()
            await app.queue(name).apurge(dead=True)


async def test_failing_task_is_found_read_and_retried(app: Conveyor, url: str, tmp_path: Path) -> None:
    """The task that fails is found, the reason is read, all of its dead jobs are retried, and the queue drains."""
    broken = True

    @app.task(name="mail.send", queue="mail", retry=1)
    async def send(user: int) -> None:
        if broken and user % 2:
            raise TimeoutError(f"smtp {user} did not answer")

    @app.task(name="media.cut", queue="media", retry=1)
    async def cut() -> None:
        raise ValueError("no such film")

    for user in range(6):
        await send.aenqueue(user)
    await cut.aenqueue()
    await drain(app)
    shell = Shell(tmp_path, url)

    status = await in_thread(lambda: shell.run("status", "--json"))
    assert {one["task"]: one["count"] for one in json.loads(status.stdout)["failures"]["groups"]}["mail.send"] == 3
    listed = await in_thread(lambda: shell.run("failures", "list"))
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    assert [row[1:4] for row in rows] == [["3", "mail.send", "TimeoutError"], ["1", "media.cut", "ValueError"]]
    assert "test_terminal_journeys.py" in rows[0][4]
    fingerprint = rows[0][0]
    shown = await in_thread(lambda: shell.run("failures", "show", fingerprint))
    assert 'raise TimeoutError(f"smtp {user} did not answer")' in shown.stdout

    unasked = await in_thread(lambda: shell.run("failures", "retry", fingerprint))
    assert (unasked.returncode, unasked.stdout) == (6, "")
    assert "Retry 3 dead jobs of mail.send" in unasked.stderr
    done = await in_thread(lambda: shell.run("failures", "retry", fingerprint, "--yes"))
    assert (done.returncode, done.stdout) == (0, "retried\t3\n")
    broken = False
    await drain(app)
    queue = await in_thread(lambda: shell.run("queue", "show", "mail", "--json"))
    counts = json.loads(queue.stdout)["queue"]
    assert (counts["ready"], counts["leased"], counts["dead"]) == (0, 0, 0)
    wrong = await in_thread(lambda: shell.run("failures", "show", fingerprint))
    assert wrong.returncode == 5
    assert "conveyor failures list" in wrong.stderr


async def test_what_is_stuck_since_when_and_why(app: Conveyor, url: str, tmp_path: Path) -> None:
    """At night: which queue stands still, since when, why its oldest job waits, and what is to be done."""

    @app.task(name="mail.send", queue="mail", limits=[Concurrency(1)])
    async def send() -> None: ...

    job = await send.aenqueue()
    shell = Shell(tmp_path, url)
    status = await in_thread(lambda: shell.run("status"))
    assert status.returncode == 8
    row = next(line for line in status.stdout.splitlines() if line.startswith("mail\t")).split("\t")
    assert "stranded" in row
    assert "Queue 'mail' has 1 job and no worker takes it" in status.stderr
    assert "conveyor worker -q mail" in status.stderr
    why = await in_thread(lambda: shell.run("job", "why", job.id))
    assert why.stdout.startswith("no-worker\t")
    as_json = json.loads((await in_thread(lambda: shell.run("job", "why", job.id, "--json"))).stdout)
    assert as_json["why"]["sentence"] in why.stdout
