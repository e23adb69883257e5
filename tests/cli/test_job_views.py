"""Views for an operator in the night: where a job hangs, what fails since when, and commands that act on exactly those."""

from __future__ import annotations

import asyncio
import json
import os
import re
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.cli import filters
from conveyor.errors import ConfigurationError
from conveyor.ids import new_id
from conveyor.payload.records import AttemptHistory, EnvelopeOptions, Failure, to_json, write_envelope
from conveyor.store import operations
from conveyor.store.client.client import Client
from support.client_worker import ClientWorker, push
from support.shell import Shell
from support.terminal import on_terminal, plain

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be looked at")
LONG = "payments.example.org answered 503: " + "upstream connect error, " * 20 + "reset at the end"


def bury(backend: Client, redis: Redis, task: str, kind: str, message: str, *, ago: timedelta) -> str:
    """Make a dead letter of queue `shop` that died *ago*, after five attempts; return its public id."""
    keys, id_ = backend.keys("shop"), new_id()
    died = int((datetime.now(UTC) - ago).timestamp() * 1000)
    backend.announce(keys)
    failure = Failure(5, died, kind, message, traceback="Traceback", worker="w")
    redis.hset(keys.jobs, id_, write_envelope(task, b'{"n":1}'))
    redis.hset(keys.state, id_, AttemptHistory(5, 5, 0, [to_json(failure)]).encode())
    redis.zadd(keys.dead, {id_: died})
    return f"shop:{id_}"


def run_worker(backend: Client, **facts: object) -> ClientWorker:
    """Return a registered worker of queue `shop` that says *facts* of itself."""
    worker = ClientWorker(backend, "shop")
    about = operations.about(kind="worker", host="web-3", pid=4711, **facts)
    backend.execute("HSET", worker.keys.leased(worker.identity), "\tabout", about, key=worker.keys.jobs)
    return worker


# -- jobs that run ------------------------------------------------------------------------------------------------


def test_a_running_job_tells_since_when_where_and_its_limit(shell: Shell, backend: Client) -> None:
    """A leased job is listed and shown with its host, pid, start and time limit: its own, its task's, or none."""
    own = write_envelope("shop.pay", b"1", EnvelopeOptions(timeout_ms=5000))
    [with_own] = backend.push(backend.keys("shop"), [operations.Entry(new_id(), own)])
    of_task, without = (push(backend, "shop", b"1", task=task)[0] for task in ("shop.pay", "shop.report"))
    began = datetime.now(UTC) - timedelta(seconds=1)
    run_worker(backend, timeouts={"shop.pay": 7_200_000}).take(3)
    ended = datetime.now(UTC) + timedelta(seconds=1)

    piped = [line.split("\t") for line in shell.run("job", "list", "--state", "leased").stdout.splitlines()]
    jobs = json.loads(shell.run("job", "list", "--json").stdout)["jobs"]
    shown = shell.run("job", "show", without).stdout
    on_screen = plain(on_terminal(shell, "job", "show", without))

    assert [(row[0], row[-1]) for row in piped] == [
        (f"shop:{with_own}", "on web-3:4711, time limit 5.0 s"), (of_task, "on web-3:4711, time limit 2 h"),
        (without, "on web-3:4711, no time limit"),
    ]  # fmt: skip
    assert [(job["host"], job["pid"], job["timeout_ms"]) for job in jobs] == [
        ("web-3", 4711, 5000), ("web-3", 4711, 7_200_000), ("web-3", 4711, None),
    ]  # fmt: skip
    assert all(began <= datetime.fromisoformat(job["leased_at"]) <= ended for job in jobs)
    assert {datetime.fromisoformat(row[5]) for row in piped} == {
        datetime.fromisoformat(job["leased_at"]) for job in jobs
    }
    assert "host\tweb-3\npid\t4711\nleased_at\t2" in shown
    assert re.search(r"pid +4711\b.*leased_at +\S.* ago.*timeout +none", on_screen, re.DOTALL)


async def test_a_worker_tells_the_limits_of_its_tasks(app: Conveyor) -> None:
    """The time limit of a running job is that of its task in the worker that runs it."""
    started = asyncio.Event()

    @app.task(name="slow", timeout="90s")
    async def slow() -> None:
        started.set()
        await asyncio.sleep(3600)

    async with app, app.worker(concurrency=1):
        job = await slow.aenqueue()
        await asyncio.wait_for(started.wait(), 60)
        info = await asyncio.to_thread(Admin(app.client).job, job.id)
        await job.acancel()

    assert (info.timeout_ms, info.pid, info.status) == (90_000, os.getpid(), "leased")
    assert info.leased_at is not None


def test_jobs_that_run_for_long_are_chosen(shell: Shell, backend: Client) -> None:
    """`--older` finds the jobs that have been running for longer than a time."""
    push(backend, "shop", b"1", b"2", task="shop.report")
    worker = ClientWorker(backend, "shop")
    [held] = worker.take()
    since = datetime.now(UTC) - timedelta(hours=3)
    place = operations.next_turn_number(0, int(since.timestamp() * 1000)) * 8192 + 1
    backend.execute("HSET", worker.keys.leased(worker.identity), held.partition(":")[2], place, key=worker.keys.jobs)

    assert shell.run("job", "list", "-q", "--state", "leased", "--older", "1h").stdout == f"{held}\n"
    assert shell.run("job", "list", "-q", "--state", "leased", "--older", "4h").stdout == ""


# -- lists --------------------------------------------------------------------------------------------------------


def test_a_list_fits_a_terminal(shell: Shell, backend: Client, redis: Redis) -> None:
    """In 80 columns no line is longer, ids are whole and name the queue once, and errors are not cut before they say anything."""
    ids = [
        bury(
            backend,
            redis,
            "shop.billing.cards.charge_the_customer",
            "shop.errors.ChargeFailed",
            LONG,
            ago=timedelta(hours=2),
        )
        for _ in range(3)
    ]
    push(backend, "shop", b'"' + b"x" * 500 + b'"', task="shop.pay")

    text = plain(on_terminal(shell, "job", "list", columns=80)).splitlines()

    assert max(map(len, text)) <= 80
    assert sorted(line.split()[0] for line in text if line.startswith("shop:") and "dead" in line) == sorted(ids)
    assert sum("attempt 5: shop.errors.ChargeFailed: payments.example.org answered 503" in line for line in text) == 3
    assert sum("cards.charge_the_customer" in line for line in text) == 3
    assert "QUEUE" not in text[0]


def test_a_list_names_the_queue_of_own_ids(shell: Shell, backend: Client) -> None:
    """An id of the caller's does not name its queue, so a column does."""
    push(backend, "shop", b"1", id="order-7")

    heading, row = plain(on_terminal(shell, "job", "list")).splitlines()[:2]

    assert "QUEUE" in heading
    assert row.split()[:2] == ["order-7", "shop"]


def test_a_piped_list_is_not_cut(shell: Shell, backend: Client, redis: Redis) -> None:
    """Through a pipe errors and payloads are whole, and with a filter the list is, too."""
    ids = [bury(backend, redis, "shop.pay", "ValueError", LONG, ago=timedelta(hours=1)) for _ in range(60)]
    bury(backend, redis, "shop.pay", "KeyError", "'x'", ago=timedelta(hours=1))
    body = '"' + "x" * 500 + '"'
    push(backend, "shop", body.encode())

    filtered = shell.run("job", "list", "--error", "valueerror: payments", "--since", "2h").stdout.splitlines()
    listed = shell.run("job", "list", "--state", "ready").stdout

    assert sorted(line.split("\t")[0] for line in filtered) == sorted(ids)
    assert {line.split("\t")[-1] for line in filtered} == {f"ValueError: {LONG}"}
    assert listed.rstrip("\n").split("\t")[-1] == body
    assert "Showing 50. More: --limit 100" in on_terminal(shell, "job", "list", "--error", "ValueError")


# -- failures -----------------------------------------------------------------------------------------------------


def test_failures_are_grouped(shell: Shell, backend: Client, redis: Redis) -> None:
    """`queue show` and `status` say how many failed of what, since when, and why, and how to put them back."""
    for minutes in (37, 20, 3):
        last = bury(
            backend, redis, "shop.pay", "shop.NoAccount", f"no account {minutes}", ago=timedelta(minutes=minutes)
        )
    bury(backend, redis, "", "KeyError", LONG, ago=timedelta(days=2))

    screen = plain(on_terminal(shell, "queue", "show", "shop"))
    status = plain(on_terminal(shell, "status", expected={0, 8}, columns=80))
    assert max(map(len, status.splitlines())) <= 80
    piped = shell.run("queue", "show", "shop").stdout
    for name in (["queue", "show", "shop"], ["status"]):
        groups = json.loads(shell.run(*name, "--json").stdout)["failures"]["groups"]
        assert [(group["count"], group["type"], group["task"], group["pattern"]) for group in groups[:1]] == [
            (3, "shop.NoAccount", "shop.pay", "no account …")
        ]
        assert groups[0]["id"] == last

    for text in (screen, status):
        assert re.search(r"^ +3x  NoAccount in shop\.pay +first \S.*  last \S", text, re.MULTILINE)
        assert "e.g. no account 3\n" in text
        assert re.search(r"^ +1x  KeyError +first \w{3} \d\d \d\d:\d\d  last", text, re.MULTILINE)
        assert max(len(line) for line in text.splitlines() if "account" in line or "answered" in line) <= 80
    assert "conveyor queue redrive shop --error NoAccount --task shop.pay" in screen
    assert re.search(
        r"^failure\.1\t3x shop\.NoAccount in shop\.pay first \S+Z last \S+Z: no account …$", piped, re.MULTILINE
    )
    assert LONG[:250] in piped


def test_redrive_puts_exactly_the_chosen_back(shell: Shell, backend: Client, redis: Redis) -> None:
    """`queue redrive` with filters counts, asks, and puts back those and no others; with a limit the oldest."""
    old, newer = (
        bury(backend, redis, "shop.pay", "ValueError", "no account", ago=timedelta(minutes=ago)) for ago in (9, 8)
    )
    bury(backend, redis, "shop.mail", "ValueError", "no account", ago=timedelta(minutes=7))
    bury(backend, redis, "shop.pay", "KeyError", "'x'", ago=timedelta(minutes=6))
    choice = ("queue", "redrive", "shop", "--error", "ValueError", "--task", "shop.pay")

    unasked, dry = shell.run(*choice), shell.run(*choice, "--dry-run")
    one = shell.run(*choice, "--limit", "1", "--yes")
    ready = [job.id for job in Admin(backend).jobs("shop", "ready")]
    rest = shell.run(*choice, "--yes")
    none = shell.run(*choice, "--yes")

    assert (unasked.returncode, "2 dead letters" in unasked.stderr, dry.stdout) == (6, True, "2\n")
    assert (one.stdout, ready, rest.stdout) == ("1\n", [old], "1\n")
    assert [job.id for job in Admin(backend).jobs("shop", "ready")] == [old, newer]
    assert Admin(backend).queue("shop").dead == 2
    assert (none.returncode, none.stdout, "No dead letters match" in none.stderr) == (0, "0\n", True)


def test_jobs_are_acted_on_by_filters(shell: Shell, backend: Client, redis: Redis) -> None:
    """`retry`, `cancel` and `delete` take the filters of `list`, ask, and act on exactly those."""
    failed, other = (
        bury(backend, redis, "shop.pay", "ValueError", text, ago=timedelta(hours=1))
        for text in ("no account", "closed")
    )
    gone = bury(backend, redis, "shop.pay", "ValueError", "no account", ago=timedelta(days=3))
    mail, pay = (push(backend, "shop", b"1", task=task)[0] for task in ("shop.mail", "shop.pay"))

    def states(*ids: str) -> list[str]:
        found = {job.id: job.status for job in Admin(backend).jobs("shop")}
        return [found.get(id_, "gone") for id_ in ids]

    assert shell.run("job", "retry", "--error", "no account", "--since", "1d").returncode == 6
    retried = shell.run("job", "retry", "--error", "no account", "--since", "1d", "--yes")
    assert (retried.returncode, retried.stdout.split("\t")[:2]) == (0, [failed, "retried"])
    assert states(failed, other, gone) == ["ready", "dead", "dead"]
    assert shell.run("job", "delete", "--state", "dead", "--older", "2d", "--yes").returncode == 0
    assert states(other, gone, mail, pay) == ["dead", "gone", "ready", "ready"]
    assert shell.run("job", "cancel", "--task", "shop.mail", "--yes").returncode == 0
    assert states(other, failed, mail, pay) == ["dead", "ready", "gone", "ready"]
    assert "No jobs match" in shell.run("job", "cancel", "--task", "shop.nothing", "--yes").stderr


@pytest.mark.parametrize(
    "words",
    [
        ["job", "retry"], ["job", "delete", "--yes"], ["job", "cancel", "an-id", "--task", "t"], ["job", "retry", "--state", "done"],
        ["job", "list", "--since", "yesterday"], ["job", "list", "--older", "25:00"], ["job", "list", "--error", ""],
    ],
)  # fmt: skip
def test_a_choice_that_means_nothing_is_usage(shell: Shell, words: list[str]) -> None:
    """A command without a choice, with two, or with one that cannot be read ends with 2 and does nothing."""
    done = shell.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_moments_are_read() -> None:
    """A moment is so long ago, a local time of the last 24 hours, or an instant, local without a zone."""
    now = datetime.now(UTC)

    def read(text: str) -> datetime:
        at = filters.instant("--since", text)
        assert at is not None
        return at

    assert abs(now - timedelta(hours=2) - read("2h")) < timedelta(minutes=1)
    assert read("2026-03-01T02:14:00Z") == datetime(2026, 3, 1, 2, 14, tzinfo=UTC)
    assert read("2026-03-01T02:14").tzinfo is not None
    for text in ("02:14", "2:14", "23:59:59"):
        assert timedelta(0) <= datetime.now(UTC) - read(text) <= timedelta(hours=25)
        assert f"{read(text):%H:%M:%S}".startswith(text.zfill(5))
    with pytest.raises(ConfigurationError, match="--since 'soon' is not a duration"):
        read("soon")


# -- the night ----------------------------------------------------------------------------------------------------


def test_the_night_takes_few_commands(shell: Shell, backend: Client, redis: Redis) -> None:
    """Three commands tell what fails, since when, how often and why; two more put exactly those back."""
    for minutes in range(37):
        bury(
            backend,
            redis,
            "shop.pay",
            "ConnectionError",
            f"payments answered 503 after {minutes} ms",
            ago=timedelta(minutes=minutes + 3),
        )
    for _ in range(4):
        bury(backend, redis, "shop.pay", "ValueError", "no such card", ago=timedelta(days=1))

    status = plain(on_terminal(shell, "status", expected={0, 8}, columns=80))
    assert max(map(len, status.splitlines())) <= 80
    assert re.search(r"37x  ConnectionError in shop\.pay +first \S.*  last \S.*  in shop", status)
    queue = plain(on_terminal(shell, "queue", "show", "shop"))
    [command] = re.findall(r"Put the first back:\n    conveyor (.*)\n", queue)
    listed = shell.run("job", "list", "-q", "--error", "ConnectionError", "--task", "shop.pay").stdout.split()
    assert "Traceback" in shell.run("job", "show", listed[0], "--json").stdout
    done = shell.run(*command.split(), "--yes")

    assert (len(listed), done.stdout) == (37, "37\n")
    assert sorted(job.id for job in Admin(backend).jobs("shop", "ready", limit=99)) == sorted(listed)
    assert Admin(backend).queue("shop").dead == 4


# -- why a job waits ----------------------------------------------------------------------------------------------


def test_why_a_job_waits_is_a_command(shell: Shell, backend: Client) -> None:
    """`job why` prints every cause, the first one first; `job show` has the first; documents have the fields and the sentence."""
    backend.announce(backend.keys("shop"))
    [waiting, running] = push(backend, "shop", b"1", b"2", task="shop.pay")
    backend.run(operations.configure(backend.keys("shop"), "paused", "1"))

    piped = [line.split("\t") for line in shell.run("job", "why", waiting).stdout.splitlines()]
    told = json.loads(shell.run("job", "why", waiting, "--json").stdout)
    shown = shell.run("job", "show", waiting).stdout
    document = json.loads(shell.run("job", "show", waiting, "--json").stdout)

    paused = "Queue 'shop' is paused. Resume it:  conveyor queue resume shop"
    assert [cause for cause, _ in piped] == ["queue-paused", "no-worker", "position"]
    assert piped[0][1] == paused
    assert piped[1][1] == "No worker serves queue 'shop'."
    assert (told["schema"], told["why"]["kind"], told["why"]["sentence"]) == ("conveyor/why@1", "queue-paused", paused)
    assert [(one["kind"], one["ahead"]) for one in told["why"]["also"]] == [("no-worker", None), ("position", 0)]
    assert f"why\t{paused}" in shown.splitlines()
    assert document["why"]["kind"] == "queue-paused"

    backend.run(operations.configure(backend.keys("shop"), "paused", ""))
    run_worker(backend).take(2)
    assert shell.run("job", "why", running).stdout.startswith("running\tIt does not wait: web-3:4711 has it, since 20")
    assert json.loads(shell.run("job", "show", running, "--json").stdout)["why"]["kind"] == "running"
    assert shell.run("job", "why", "shop:0Q8AwEkiHuTqwTCLmeX0pl").returncode == 5


def test_why_the_jobs_of_a_queue_wait(shell: Shell, backend: Client) -> None:
    """`queue show` names each cause with the jobs that it holds up; `status` those that its table does not show."""
    backend.announce(backend.keys("shop"))
    push(backend, "shop", b"1", b"2", task="shop.pay")
    push(backend, "shop", b"3", task="shop.report")
    push(backend, "shop", b"4", task="shop.pay", delay_ms=3_600_000)

    unserved = json.loads(shell.run("queue", "show", "shop", "--json").stdout)["causes"]
    worker = ClientWorker(backend, "shop")
    backend.run(operations.reap(worker.keys, worker.identity, crashed=False))
    about = operations.about(kind="worker", host="web-3", pid=4711, task_set=operations.task_set(["shop.report"]))
    backend.run(operations.register(worker.keys, worker.identity, 60_000, about, tasks=["shop.report"]))
    served = json.loads(shell.run("queue", "show", "shop", "--json").stdout)["causes"]
    piped = shell.run("queue", "show", "shop").stdout.splitlines()
    on_screen = plain(on_terminal(shell, "queue", "show", "shop"))
    status = plain(on_terminal(shell, "status"))

    assert [(one["kind"], one["jobs"]) for one in unserved] == [("no-worker", 4), ("scheduled", 1)]
    assert [(one["kind"], one["name"], one["jobs"]) for one in served] == [
        ("unknown-task", "shop.pay", 3), ("scheduled", "shop", 1),
    ]  # fmt: skip
    unknown = "No worker knows the task 'shop.pay': 3 of the 4 jobs that were looked at need it."
    assert f"why.1\t{unknown}" in piped
    assert f"  {unknown}" in on_screen.splitlines()
    assert f"  shop: {unknown}" in status.splitlines()
    assert "scheduled, the first for" not in status


def test_a_paused_task_is_a_command(shell: Shell, backend: Client) -> None:
    """`queue pause --task` pauses a task in one queue or in all, and its jobs are listed as waiting with the cause."""
    backend.announce(backend.keys("shop"))
    [paid, _] = push(backend, "shop", b"1", b"2", task="shop.pay")
    push(backend, "shop", b"3", task="shop.report")
    worker = ClientWorker(backend, "shop")

    answer = json.loads(shell.run("queue", "pause", "--task", "shop.pay", "--json").stdout)
    worker.take(5)
    listed = shell.run("job", "list", "--state", "waiting", "-q").stdout.split()
    causes = json.loads(shell.run("queue", "show", "shop", "--json").stdout)["causes"]
    said = shell.run("job", "why", paid).stdout.splitlines()[0]
    resumed = shell.run("queue", "resume", "shop", "--task", "shop.pay")

    assert answer == {"schema": "conveyor/task-paused@1", "task": "shop.pay", "queues": ["shop"], "paused": True}
    assert (len(listed), listed[0]) == (2, paid)
    assert [(one["kind"], one["name"], one["jobs"]) for one in causes] == [("task-paused", "shop.pay", 2)]
    assert causes[0]["sentence"] == "Task 'shop.pay' is paused: 2 jobs wait."
    assert said == "task-paused\tTask 'shop.pay' is paused. Resume it:  conveyor queue resume --task shop.pay"
    assert resumed.stderr.strip() == "shop.pay is resumed in shop."
    assert shell.run("queue", "pause").returncode == 2
    assert len(worker.take(5)) == 2
