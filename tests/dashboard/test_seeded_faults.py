"""Each cause of waiting and each kind of end, seeded on a real server: named in two clicks, by one sentence wherever one asks."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from conveyor import Conveyor, Retry
from conveyor.admin.admin import Admin
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard
from conveyor.ids import new_id, split
from conveyor.jobs.job import Job
from conveyor.payload.failures import describe
from conveyor.payload.records import AttemptHistory, EnvelopeOptions, Failure, to_json, write_envelope
from conveyor.store import limits, operations
from conveyor.store.operations import Settlement, WorkerUnregistered
from conveyor.worker.logs import describe_end
from support.dashboard_client import ask
from support.manual_worker import ServingWorker
from support.running_worker import drain
from support.waiting import until

TASK = "mail.send"
Shell = Callable[..., str]


@pytest.fixture
def shell(url: str, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Run a command in this process; return what it printed, with `--json` its document."""

    def run(*arguments: str) -> str:
        code = main([*arguments, "--url", url])
        printed = capsys.readouterr()
        assert code in {0, 8}, printed.err
        return printed.out if "--json" in arguments else printed.out + printed.err

    return run


def without_ages(text: str) -> str:
    """Return a sentence without what moves between two reads: how far an instant is."""
    return re.sub(r"(in|since|due)? ?[\d.]+ (ms|s|m|min|h|d)\b( \d+ (s|m|min|h)\b)?( ago)?", "…", text)


def sentence(app: Conveyor, shell: Shell, job: str) -> str:
    """Return why a job waits or how it ended: what the list leads to, what two commands print and what their JSON has."""
    site = dashboard(app, lambda _: Access.ALL)
    state = "state:done" if app.job(job).status() == "done" else "queue:mail"
    assert job in [one["id"] for one in ask(site, "GET", "jobs", {"filter": state}).json()["jobs"]]
    told: list[str] = [
        ask(site, "GET", "job", {"id": job}).json()["why"]["sentence"],
        shell("job", "why", job).partition("\n")[0].partition("\t")[2],
        json.loads(shell("job", "why", job, "--json"))["why"]["sentence"],
        re.search(r"^why\t(.*)$", shell("job", "show", job), re.MULTILINE)[1],  # type: ignore[index]
        json.loads(shell("job", "show", job, "--json"))["why"]["sentence"],
        str(app.job(job).why()),
    ]
    assert len(set(map(without_ages, told))) == 1, (told, shell("job", "why", job))
    hidden = dashboard(app, lambda _: Access.only())
    assert "no such user" not in ask(hidden, "GET", "job", {"id": job}).text
    return str(told[0])


@dataclass
class Seed:
    """A queue `mail` with a worker that serves it."""

    app: Conveyor
    worker: ServingWorker

    def push(self, *, group: str | None = None, limit: str = "", labels: tuple[str, ...] = (), build: str = "") -> str:
        """Push a job; return its id."""
        options = EnvelopeOptions(pin=build, requires=list(labels))
        entry = operations.Entry(
            new_id(), write_envelope(TASK, b'{"user":1}', options), group=group, limits=(limit,) if limit else ()
        )
        [id_] = self.app.client.push(self.worker.keys, [entry])
        return f"mail:{id_}"

    # -- causes of waiting ------------------------------------------------------------------------------------------

    def paused_queue(self) -> str:
        self.app.queue("mail").pause()
        return self.push()

    def paused_task(self) -> str:
        job = self.push()
        Admin(self.app.client).pause_task(TASK, "mail")
        return job

    def paused_key(self) -> str:
        job = self.push(group="acme")
        self.app.client.run(limits.set_group(self.worker.keys, "acme", weight=None, paused=True))
        return job

    def no_worker(self) -> str:
        self.worker.leave()
        return self.push()

    def unknown_task(self) -> str:
        self.worker.leave()
        self.worker = ServingWorker(self.app, "mail", ("mail.bounce",))
        return self.push()

    def full_limit(self) -> str:
        self.app.client.run(limits.declare_limits(self.worker.keys, {"api": "c 1 -"}, replace=False))
        self.push(limit="1:api")
        job = self.push(limit="1:api")
        self.worker.take(1)
        return job

    def group(self) -> str:
        self.push(group="acme")
        self.worker.take(1)
        return self.push(group="acme")

    def groups(self) -> str:
        for group, jobs in (("acme", 4), ("umbrella", 2)):
            for _ in range(jobs):
                job = self.push(group=group)
        assert len(self.worker.take(2)) == 2
        self.push(group="idle")
        [_] = self.worker.take(1)
        return job

    def scheduled(self) -> str:
        return self.app.tasks[TASK].options(delay="1h").enqueue(1).id

    def position(self) -> str:
        self.push()
        return self.push()

    def label(self) -> str:
        return self.push(labels=("gpu",))

    def build(self) -> str:
        return self.push(build="v41")

    # -- kinds of ends ----------------------------------------------------------------------------------------------

    def crashed(self, cause: str) -> str:
        """Have the worker that holds a job die of *cause*."""
        job = self.push()
        ids = self.worker.take(1)
        self.app.client.run(operations.reap(self.worker.keys, self.worker.worker, blame=(ids, ()), cause=cause))
        self.worker = ServingWorker(self.app, "mail", (TASK,))
        return job

    def kill(self) -> str:
        return self.crashed(f"its worker {describe_end(-9)}")

    def memory(self) -> str:
        return self.crashed(f"its worker {describe_end(137)}")

    def fault(self) -> str:
        return self.crashed(f"its worker {describe_end(-11)}")

    def blocked_loop(self) -> str:
        return self.crashed(f"its worker was killed after blocking its event loop for 60 s, in job {TASK}")

    def retried(self) -> str:
        job = self.push()
        [id_] = self.worker.take(1)
        error = to_json(describe(ValueError("no such user"), 1, 5, "w"))
        self.worker.turn(0, Settlement("R", id_, 60_000, state=AttemptHistory(1, 1, 0, [error]).encode()))
        return job


WAITING: dict[Callable[[Seed], str], str] = {
    Seed.paused_queue: r"Queue 'mail' is paused\. Resume it:  conveyor queue resume mail",
    Seed.paused_task: r"Task 'mail\.send' is paused\. Resume it:  conveyor queue resume --task mail\.send",
    Seed.paused_key: r"Group 'acme' is paused\. Resume it:  conveyor queue resume mail --group acme",
    Seed.no_worker: r"No worker serves queue 'mail'\. The task 'mail\.send' was last known by web-3:4711, seen at .*\.",
    Seed.unknown_task: r"No worker of queue 'mail' knows the task 'mail\.send'\. .*last known by web-3:4711.*",
    Seed.full_limit: r"Limit 'api' is full \(1 of 1\)\.",
    Seed.group: r"It waits in group 'acme' behind job mail:[\w~]+, which is leased\.",
    Seed.scheduled: r"It is scheduled for 20.* UTC \(in .*\)\.",
    Seed.position: r"It is number 2 of 2 in queue 'mail'\.",
    Seed.label: r"It requires a worker with the label 'gpu', and none serves queue 'mail'\.  Start one:  .*--label gpu",
    Seed.build: r"It is pinned to build 'v41', and no worker of it serves queue 'mail'\.  Release such jobs:  .*--build v41",
    Seed.kill: r"It is number 1 of 1 in .* Attempt 1 crashed: its worker was killed by SIGKILL \(the kernel does that .*\)\.",
    Seed.memory: r"It is number 1 of 1 in .* Attempt 1 crashed: its worker exited with code 137 \(128 \+ 9: SIGKILL \(the kernel .*\)\)\.",
    Seed.fault: r"It is number 1 of 1 in .* Attempt 1 crashed: its worker was killed by SIGSEGV \(a fault in native code\)\.",
    Seed.blocked_loop: r"It is number 1 of 1 in .* Attempt 1 crashed: its worker was killed after blocking its event loop .*",
    Seed.retried: r"It is tried again at 20.* \(attempt 1 failed: ValueError: no such user\)\.",
}  # fmt: skip


@pytest.mark.parametrize("seed", WAITING, ids=lambda seed: seed.__name__)
def test_a_waiting_job_names_its_cause(app: Conveyor, shell: Shell, seed: Callable[[Seed], str]) -> None:
    """The pages, the commands, their JSON and `why()` say one sentence; it names the cause, and the command that ends it."""

    @app.task(name=TASK, queue="mail")
    def send(user: int) -> None: ...

    seeded = Seed(app, ServingWorker(app, "mail", (TASK,), build="v42", labels=["cpu"]))
    job = seed(seeded)
    said = sentence(app, shell, job)
    assert re.fullmatch(WAITING[seed], said), said
    app.queue("mail").resume()
    Admin(app.client).resume_task(TASK, "mail")
    app.client.run(limits.set_group(seeded.worker.keys, "acme", weight=None, paused=False))
    Admin(app.client).purge("mail")
    with suppress(WorkerUnregistered):  # one that has left
        seeded.worker.leave()


QUEUE_CAUSES: dict[Callable[[Seed], str], tuple[str, str]] = {
    Seed.paused_key: (r"Group 'acme' is paused: 1 job waits\.", "acme"),
    Seed.full_limit: (r"Limit 'api' is full: 1 job waits\.", "api"),
    Seed.group: (r"1 job waits in group 'acme' behind a job that is leased or tried again\.", "acme"),
    Seed.groups: (
        r"4 jobs wait in 2 groups behind jobs that are leased or tried again, 3 of them in group 'acme'\.", "acme",
    ),
}  # fmt: skip


@pytest.mark.parametrize("met", [False, True], ids=["no-turn-yet", "met-by-a-turn"])
@pytest.mark.parametrize("seed", QUEUE_CAUSES, ids=lambda seed: seed.__name__)
def test_a_queue_says_what_its_groups_and_limits_wait_for(
    app: Conveyor, shell: Shell, seed: Callable[[Seed], str], *, met: bool
) -> None:
    """The page of a queue, two commands and their JSON say one sentence, which links to the limits, before and after a turn has met the jobs."""
    seeded = Seed(app, ServingWorker(app, "mail", (TASK,)))
    seed(seeded)
    if met:
        assert seeded.worker.take(9) == []
    site = dashboard(app, lambda _: Access.ALL)
    [cause] = ask(site, "GET", "queue", {"name": "mail"}).json()["causes"]
    [shown] = json.loads(shell("queue", "show", "mail", "--json"))["causes"]
    [stated] = json.loads(shell("status", "--json"))["causes"]
    printed = re.search(r"^why\.1\t(.*)$", shell("queue", "show", "mail"), re.MULTILINE)
    pattern, name = QUEUE_CAUSES[seed]
    assert re.fullmatch(pattern, cause["sentence"]), cause
    assert printed is not None
    assert {shown["sentence"], stated["sentence"], printed[1]} == {cause["sentence"]}
    assert cause["links"] == [{"page": "limits", "name": name}]
    app.client.run(limits.set_group(seeded.worker.keys, "acme", weight=None, paused=False))
    Admin(app.client).purge("mail")
    seeded.worker.leave()


def test_a_job_that_ended_says_how(app: Conveyor, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception, a time limit, arguments that do not fit, crashes and a task that nobody knew for a day: one sentence each."""
    once = Retry(attempts=1)

    @app.task(name="fails", queue="mail", retry=once)
    def fails() -> None:
        raise ValueError("no such user")

    @app.task(name="hangs", queue="mail", retry=once, timeout="20ms")
    async def hangs() -> None:
        await asyncio.sleep(3600)

    @app.task(name="typed", queue="mail", retry=once)
    def typed(user: int) -> None: ...

    @app.task(name="kills", queue="mail", retry=Retry(attempts=9, max_crashes=2))
    def kills() -> None: ...

    @app.task(name="well", queue="mail", keep_result="1h")
    def well() -> int:
        return 1

    jobs: dict[str, Job[Any]] = {one.name: one.enqueue() for one in (fails, hangs, kills, well)}
    [text] = app.client.push(
        app.client.keys("mail"), [operations.Entry(new_id(), write_envelope("typed", b'{"user":"x"}'))]
    )
    with monkeypatch.context() as patch:
        patch.setattr("conveyor.ids.time", lambda: time.time() - 2 * 86_400)
        old = new_id()
    app.client.push(app.client.keys("mail"), [operations.Entry(old, write_envelope("gone", b"{}"))])
    crash = to_json(Failure(2, 5, "crashed", f"its worker {describe_end(-9)}", worker="web-3:4711"))
    keys, id_ = app.client.keys("mail"), split(jobs["kills"].id)[1]
    app.client.execute("HSET", keys.state, id_, AttemptHistory(2, 0, 2, [crash]).encode(), key=keys.state)
    asyncio.run(drain(app))

    told = {name: sentence(app, shell, job.id) for name, job in jobs.items()}
    told |= {"typed": sentence(app, shell, f"mail:{text}"), "gone": sentence(app, shell, f"mail:{old}")}

    assert told["fails"] == "It failed for good after 1 attempt: ValueError: no such user."
    assert (
        told["hangs"]
        == "It failed for good after 1 attempt: TimeoutError: the attempt ran longer than its time limit of 0.02 s."
    )
    assert told["kills"].startswith(
        "It failed for good after 2 attempts: its worker crashed 2 times while it ran; the last time, at 1970-"
    )
    assert told["kills"].endswith(
        "on web-3:4711: its worker was killed by SIGKILL (the kernel does that when memory runs out)."
    )
    assert re.fullmatch(r"It failed for good after 1 attempt: PayloadError: .*user.*", told["typed"]), told["typed"]
    assert told["gone"] == "It failed for good: UnknownTask: no worker that has the task 'gone' came within a day."
    assert told["well"] == "It ended well."
    app.queue("mail").purge(dead=True)


def test_what_is_stuck_is_flagged_in_one_sentence(app: Conveyor, shell: Shell) -> None:
    """A queue without a worker, one that is full, an outbox and a schedule that stands still: the overview and `status` say the same."""

    @app.task(name="tick", queue="ticks")
    def tick() -> None: ...

    app.schedules.put("hourly", tick.s(), every="1h")
    late, ticks = str(round(time.time() * 1000) - 7_230_000), app.client.keys("ticks")
    app.client.execute("HSET", ticks.schedule("hourly"), "next", late, key=ticks.due)
    app.queue("lonely").push_many([1, 2])
    full = app.queue("full", max_length=1, full="block")
    full.push(1)
    waiting = threading.Thread(target=lambda: full.push(2))
    waiting.start()
    until(lambda: Admin(app.client).queue("full").blocked)
    app.client.execute("RPUSH", app.client.keys("lonely").outbox, "x", key=app.client.keys("lonely").jobs)

    site = dashboard(app, lambda _: Access.ALL)
    flags = {(flag["kind"], flag["text"]) for flag in ask(site, "GET", "snapshot", {}).json()["flags"]}
    document = json.loads(shell("status", "--json"))
    printed = shell("status")
    assert {without_ages(text) for _, text in flags} == {without_ages(one["text"]) for one in document["flags"]}
    assert {kind for kind, _ in flags} == {"no-worker", "full", "outbox", "schedule-stands-still"}
    for _, text in flags:
        assert without_ages(text) in without_ages(printed)
    assert document["healthy"] is False
    app.schedules.delete("hourly")
    full.purge()
    waiting.join(60)
    assert not waiting.is_alive()
    for queue in (full, app.queue("lonely")):
        queue.purge()
    keys = app.client.keys("lonely")
    app.client.execute("DEL", keys.outbox, key=keys.jobs)
