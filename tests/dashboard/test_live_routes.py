"""Data that a page follows: the snapshot that all viewers share, flags, history, and the routes of schedules, limits, topics and the server."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from redis import Redis

from conveyor import Concurrency, Conveyor, Retry
from conveyor.admin import queue_flow
from conveyor.admin.admin import Admin
from conveyor.admin.history import quantile
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard, live_routes, queue_counts
from conveyor.dashboard.endpoint import ApiCall
from conveyor.dashboard.live_routes import stream
from conveyor.errors import StoreUnavailable
from support.client_worker import ClientWorker
from support.dashboard_client import ask, get
from support.running_worker import drain, working
from support.waiting import auntil, until


def post(site: Any, path: str, **inputs: Any) -> Any:
    """Return the document of a change."""
    response = ask(site, "POST", path, inputs)
    assert response.status_code == 200, response.text
    return response.json()


def events_of(parts: list[bytes]) -> list[tuple[str, Any]]:
    """Return (name, document) of server-sent events."""
    found = []
    for part in parts:
        name, data, *_ = part.decode().split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_viewers_share_what_is_read(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty viewers and one cost the server the same: a snapshot is read once for all; each gets the session first."""
    await app.queue("mail").apush({"to": "ada"})
    site: Any = dashboard(app, lambda _: Access.ALL)
    reads = []
    read = site.service.live._read_snapshot
    monkeypatch.setattr(site.service.live.snapshot, "_make", lambda: reads.append(1) or read())
    monkeypatch.setattr(site.service.live.snapshot, "_seconds", 3600.0)

    async def view() -> list[tuple[str, Any]]:
        call = ApiCall(site.service, site.service.admin, Access.ALL, {"seconds": 1, "history": "1h"})
        body: AsyncIterator[Any] = (await stream(call)).body_iterator  # type: ignore[attr-defined]
        return events_of([await anext(body) for _ in range(3)])

    seen = await asyncio.gather(*(view() for _ in range(50)))
    assert len(reads) == 1
    assert {tuple(name for name, _ in events) for events in seen} == {("session", "snapshot", "history")}
    snapshot = seen[0][1][1]
    assert (snapshot["totals"]["ready"], snapshot["queues"][0]["name"]) == (1, "mail")
    await app.aclose()


def test_rates_are_told_while_somebody_follows(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows has the rates of queues from the second snapshot on, as do the pages of queues; one question alone has none."""
    monkeypatch.setattr(queue_flow, "_LEAST_MS", 1)
    monkeypatch.setattr(queue_counts, "_SECONDS_FOLLOWED", 3600.0)  # so that a busy machine does not make rates too old
    mail = app.queue("mail")
    mail.push(1)
    site: Any = dashboard(app, lambda _: Access.ALL)
    site.service.live.snapshot._seconds = 0.0
    site.service.live._flags_until = float("inf")

    def flows() -> list[Any]:
        found = [get(site, path)["queues"][0]["flow"] for path in ("queues", "snapshot")]
        return [*found, get(site, "queue", name="mail")["queue"]["flow"]]

    assert flows() == [None, None, None]
    mail.push_many(list(range(50)))
    _, told, shown = flows()
    assert told == shown
    assert told.keys() == {"in_per_second", "out_per_second", "trend", "empty_in", "sentence"}
    assert told["in_per_second"] > 0 == told["out_per_second"]
    assert (told["trend"], told["sentence"], told["empty_in"]) == ("grows", "grows", None)
    assert get(site, "queues")["queues"][0]["flow"] == told
    site.service.live.queues._followed_at -= 4000  # nobody has followed for an hour
    assert get(site, "queues")["queues"][0]["flow"] is None
    mail.purge()


@contextmanager
def served(site: Any) -> Iterator[int]:
    """Serve a dashboard over HTTP; yield its port."""
    config = uvicorn.Config(site, port=0, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with config.bind_socket() as listener:
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(60)


def test_fifty_viewers_cost_what_one_costs(app: Conveyor, redis: Redis) -> None:
    """Over HTTP a snapshot of twelve busy queues costs two commands, with the flags and the hour; as many for fifty viewers as for one."""
    for number in range(12):
        app.queue(f"queue-{number}").push(number)
    site: Any = dashboard(app, lambda _: Access.ALL)
    live = site.service.live
    started: list[float] = []
    before: list[int] = []  # what the server had been sent when each began: none is made beside another
    made: list[Any] = []
    make = live.snapshot._make

    def make_counted() -> dict[str, Any]:
        started.append(time.monotonic())
        before.append(commands(redis))
        made.append(make())
        return made[-1]

    live.snapshot._make = make_counted

    def viewed(port: int, viewers: int) -> float:
        """Return the commands of a snapshot, over five of them that this many viewers follow."""
        sockets = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(viewers)]
        for one in sockets:
            one.sendall(b"GET /api/v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            until(lambda one=one: b"event: snapshot" in one.recv(65536))
        live._flags_until = float("inf")  # they are read in a step of their own, as are those who look
        first = len(started)
        until(lambda: len(before) > first + 5)
        for one in sockets:
            one.close()
        return (before[first + 5] - before[first]) / 5

    with served(site) as port:
        assert 1.5 < viewed(port, 1) <= 2.5
        assert 1.5 < viewed(port, 50) <= 2.5
    beat = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert min(beat) >= 0.9  # so at most 2.2 commands a second
    until(lambda: len(made) == len(started))
    flags, began = commands(redis), time.monotonic()
    live._flags_until = 0.0
    live.snapshot._make()
    assert commands(redis) - flags <= 2 + 12 + 6
    assert live._flags_until - began > 4
    for number in range(12):
        app.queue(f"queue-{number}").purge()


def commands(redis: Redis) -> int:
    """Return how many calls of scripts and reads of names a server has had from clients."""
    found: Any = redis.info("commandstats")
    return sum(int(found.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval", "smembers"))


async def test_a_viewer_is_told_that_redis_is_away(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Redis a stream goes on, and says what is wrong."""
    site: Any = dashboard(app, lambda _: Access.ALL)

    def fail() -> dict[str, Any]:
        raise StoreUnavailable("Redis does not answer.")

    monkeypatch.setattr(site.service.live.snapshot, "_make", fail)
    call = ApiCall(site.service, site.service.admin, Access.ALL, {"seconds": 1, "history": None})
    body: AsyncIterator[Any] = (await stream(call)).body_iterator  # type: ignore[attr-defined]
    events = events_of([await anext(body) for _ in range(2)])
    assert [name for name, _ in events] == ["session", "away"]
    assert events[1][1]["message"] == "Redis does not answer."
    await app.aclose()


async def test_rights_that_are_taken_away_end_what_is_followed(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream tells a visitor of rights that change, and ends when the right to look is taken away or asking for it fails."""
    monkeypatch.setattr(live_routes, "_ACCESS_SECONDS", 0.0)

    def fail() -> Access:
        raise OSError("the directory of users does not answer")

    for last in (lambda: Access.DENY, fail):
        rights = iter([lambda: Access.ALL, lambda: Access.ALL, lambda: Access.READ_ONLY, last])
        site = dashboard(app, lambda _, left=rights: next(left)())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
            answer = await client.get("/api/v1/stream")  # it is answered when the stream has ended
        told = events_of([part + b"\n\n" for part in answer.content.split(b"\n\n") if part])
        assert [name for name, _ in told] == ["session", "snapshot", "snapshot", "session", "snapshot"]
        assert [document["read_only"] for name, document in told if name == "session"] == [False, True]


async def test_a_page_holds_what_it_shows_first(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Behind the page stands what the stream sends first, the hour on the overview alone, and no text in it ends its element.

    Where Redis does not answer the page comes without.
    """
    monkeypatch.setattr(live_routes, "_FIRST_SECONDS", 60)  # a busy machine may take longer than a page waits
    await app.queue("mail").apush({"to": "ada"})
    user = "</script><script>alert(1)</script><!--"
    site: Any = dashboard(app, lambda _: Access.ALL.named(user))
    site.service.live.snapshot._seconds = 3600.0

    async def held(path: str, **headers: str) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
            page = await client.get(path, headers=headers)
        assert (page.status_code, page.headers["cache-control"]) == (200, "no-store")
        assert page.text.count("<script") == 2, page.text
        assert page.text.endswith("</script>\n</body>\n</html>\n")
        return json.loads(page.text.partition('id="first">')[2].partition("</script>")[0])

    call = ApiCall(site.service, site.service.admin, Access.ALL.named(user), {"seconds": 1, "history": "1h"})
    sent: AsyncIterator[Any] = (await stream(call)).body_iterator  # type: ignore[attr-defined]
    events = dict(events_of([await anext(sent) for _ in range(3)]))
    for document in events.values():
        del document["schema"]
    assert await held("/") == events
    assert await held("/", **{"accept-encoding": "identity"}) == events
    del events["history"]
    assert await held("/jobs") == events

    def fail() -> Any:
        raise StoreUnavailable("Redis does not answer.")

    monkeypatch.setattr(site.service.live.snapshot, "_make", fail)
    monkeypatch.setattr(site.service.live.snapshot, "_seconds", 0.0)
    assert await held("/") == {}
    await app.aclose()


def test_history_counts_what_ended_and_how_long_it_ran(app: Conveyor) -> None:
    """Each range has its minutes or hours; outcomes are counted once; a task or a queue alone has its own figures."""

    @app.task(name="flaky", queue="mail", retry=Retry(attempts=2, backoff="1ms", jitter=False))
    def flaky(fails: bool) -> None:
        if fails:
            raise ValueError("no")

    for fails in (False, False, True):
        flaky.enqueue(fails)
    asyncio.run(drain(app))
    site = dashboard(app, lambda _: Access.ALL)
    for name, step, count in (("15m", 60, 15), ("24h", 60, 1440), ("30d", 3600, 720)):
        found = get(site, "history", range=name)
        assert (found["step"], len(found["times"]), len(found["p95_ms"])) == (step, count, count)
        assert [sum(found[kind]) for kind in ("done", "failed", "retried")] == [2, 1, 1]
        assert found["tasks"][0] | {"task": "flaky", "done": 2, "failed": 1, "retried": 1} == found["tasks"][0]
    assert sum(get(site, "history", task="other")["done"]) == 0
    assert sum(get(site, "history", queue="mail")["done"]) == 2
    assert ask(site, "GET", "history", {"range": "2h"}).status_code == 422
    assert ask(site, "GET", "history", {"queue": "none"}).status_code == 404
    app.queue("mail").purge(dead=True)


def test_marks_stand_in_the_history_of_their_range(app: Conveyor, redis: Redis) -> None:
    """A mark of the command line is in each history that holds its instant, the oldest first, and its key goes by itself."""
    url = str(app.client.configured_url)
    redis.xadd("conveyor:marks", {"text": "of another year"}, id="1-0")
    for text in ("v1.4", "v1.5"):
        assert main(["mark", text, "--url", url]) == 0
    assert main(["mark", "  ", "--url", url]) == 2
    site = dashboard(app, lambda _: Access.ALL)
    for name in ("15m", "30d"):
        assert [one["text"] for one in get(site, "history", range=name)["marks"]] == ["v1.4", "v1.5"]
    assert 0 < redis.ttl("conveyor:marks") <= 90 * 86400


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({0: 4}, 0.5, 2.5),
        ({3: 1}, 0.99, 49.8),
        ({0: 1, 15: 1}, 0.99, 3_600_000.0),
        ({0: 90, 7: 10}, 0.95, 750.0),
    ],
)
def test_a_percentile_lies_in_its_bucket(buckets: dict[int, int], share: float, expected: float | None) -> None:
    """A percentile out of a histogram is spread evenly in its bucket; there is none of nothing."""
    assert quantile(buckets, share) == expected


def test_flags_appear_by_themselves(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue without a worker, a task that only fails, and a schedule that stands still are flagged, each with a link."""
    monkeypatch.setattr("conveyor.admin.flags.LATE_SECONDS", 0.0)

    @app.task(name="broken", queue="mail", retry=Retry(attempts=2, backoff="1ms", jitter=False))
    def broken() -> None:
        raise ValueError("no")

    @app.task(name="patient", queue="mail", retry=Retry(attempts=9, backoff="1h"))
    def patient() -> None:
        raise ValueError("not yet")

    broken.enqueue()
    waiting = [patient.enqueue() for _ in range(2)]

    def settled() -> bool:
        mail = Admin(app.client).queue("mail")
        return (mail.scheduled, mail.dead) == (2, 1)

    async def run() -> None:
        async with working(app):
            await auntil(lambda: asyncio.to_thread(settled))

    asyncio.run(run())
    app.queue("lonely").push(1)
    app.schedules.put("tick", broken.s(), every="1s")
    site: Any = dashboard(app, lambda _: Access.ALL)
    until = time.monotonic() + 60
    while True:  # until an instant of the schedule has passed
        site.service.live._flags_until = 0.0
        site.service.live.snapshot._found = None
        found = get(site, "snapshot")["flags"]
        flags = {flag["kind"]: flag for flag in found}
        if "schedule-stands-still" in flags or time.monotonic() > until:
            break
    assert flags["no-worker"]["text"].startswith("Queue 'lonely' has 1 job")
    # Jobs that wait for their next attempt are not dead: the link leads to where they are.
    filters = {"state:dead task:broken", "state:scheduled task:patient"}
    assert {one["links"][0]["filter"] for one in found if one["kind"] == "failing"} == filters
    assert all(get(site, "jobs", filter=one)["jobs"] for one in filters)
    assert flags["schedule-stands-still"]["links"][0] == {"page": "schedule", "name": "tick"}
    app.schedules.delete("tick")
    app.queue("lonely").purge()
    app.queue("mail").purge(dead=True)
    Admin(app.client).delete([job.id for job in waiting])


@pytest.mark.leaves_keys("a worker of the test's own is still registered")
def test_jobs_that_run_too_long_are_named(
    app: Conveyor, url: str, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a task that has not ended lately is named after an hour, another after ten times its p95; everywhere in the same words."""

    @app.task(name="cut", queue="video")
    def cut() -> None: ...

    @app.task(name="send", queue="video")
    def send() -> None: ...

    send.enqueue()
    asyncio.run(drain(app))
    ages = {app.queue("inbox").push(0): 90, cut.enqueue().id: 61, cut.enqueue().id: 59, send.enqueue().id: 1}
    workers = {queue: ClientWorker(app.client, queue) for queue in ("inbox", "video")}
    assert [id_ for worker in workers.values() for id_ in worker.take(3)] == list(ages)
    for id_, minutes in ages.items():
        queue, _, bare = id_.partition(":")
        redis.hincrby(f"conveyor:{{{queue}}}:leased:{workers[queue].identity}", bare, -minutes * 60_000 * 8192)

    found = [flag for flag in Admin(app.client).flags() if flag.kind == "running-long"]

    texts = [_without_seconds(flag.text) for flag in found]
    assert texts[0] == "A message of 'inbox' is held for 1 h 30 m; none has ended in the last 15 minutes."
    assert texts[1] == "A job of 'cut' runs for 1 h 1 m; none has ended in the last 15 minutes."
    assert texts[2].startswith("A job of 'send' runs for 1 m; 95 of 100 end within ")
    assert [flag.remedy.split()[-1] for flag in found] == [
        id_ for minutes, id_ in sorted(((-minutes, id_) for id_, minutes in ages.items())) if minutes != -59
    ]
    site = dashboard(app, lambda _: Access.ALL)
    assert _running_long(get(site, "snapshot")) == texts
    assert main(["status", "--url", url, "--json"]) in {0, 8}
    assert _running_long(json.loads(capsys.readouterr().out)) == texts
    main(["status", "--url", url])
    said = _without_seconds(capsys.readouterr().err)
    assert [text for text in texts if text not in said] == []


def _running_long(document: dict[str, Any]) -> list[str]:
    return [_without_seconds(flag["text"]) for flag in document["flags"] if flag["kind"] == "running-long"]


def _without_seconds(text: str) -> str:
    """Return *text* with whole minutes for lengths of time: seconds pass between two answers."""
    return re.sub(r" m \d+ s\b", " m", text)


def test_a_schedule_is_previewed_created_and_edited(app: Conveyor) -> None:
    """A person puts a schedule under the rules of `schedules.put`; a refused one leaves nothing, and what is left out of a change stays."""

    @app.task(name="report", queue="reports")
    def report(tenant: str, days: int = 1) -> None: ...

    site = dashboard(app, lambda _: Access.ALL.named("ada"))
    [task] = get(site, "tasks")["tasks"]
    assert (task["name"], task["queue"], task["required"]) == ("report", "reports", ["tenant"])
    assert "tenant: str" in task["signature"]
    preview = get(site, "schedules/preview", cron="0 9 * * mon-fri", tz="Europe/Berlin")
    assert len(preview["next"]) == len(preview["next_in_zone"]) == 5
    assert all("09:00:00 CE" in text for text in preview["next_in_zone"])
    assert "at column 3" in get(site, "schedules/preview", cron="0 25 * * *")["error"]
    new = {"name": "n", "task": "report", "kwargs": {"tenant": "a"}, "cron": "0 9 * * *"}
    for wrong, said in (
        ({"cron": "0  25 * * *"}, "at column 4"), ({"cron": "* * * *"}, "at column 8"), ({"cron": "0 0 30 2 *"}, "never comes"),
        ({"every": "1h"}, "cron and every"), ({"tz": "Mars/X"}, "time zone"), ({"kwargs": {}}, "tenant"),
        ({"kwargs": {"tenant": "[redacted]"}}, "is shown"), ({"task": "other"}, "no task"), ({"task": None, "kwargs": None}, "'task'"),
        ({"jitter": "soon"}, "jitter"), ({"kwargs": {"tenant": "a", "self": 1}}, "self"),
    ):  # fmt: skip
        refused = ask(site, "POST", "schedules/put", {**new, **wrong})
        assert refused.status_code == 422, (wrong, refused.text)
        assert said in refused.json()["error"]["message"], wrong
    assert app.schedules.list() == []
    assert ask(site, "POST", "schedules/put", {"name": "n", "every": "1h", "replace": True}).status_code == 404

    made = post(site, "schedules/put", **new, tz="Europe/Berlin", overlap="queue", missed="all", jitter="5s")[
        "schedule"
    ]
    assert (made["cron"], made["tz"], made["every"], made["origin"], made["queue"]) == (
        "0 9 * * *",
        "Europe/Berlin",
        None,
        "data",
        "reports",
    )
    assert "already" in ask(site, "POST", "schedules/put", new).json()["error"]["message"]
    app.schedules.get("n").pause()
    changed = post(site, "schedules/put", name="n", every="90s", replace=True)["schedule"]
    assert (changed["cron"], changed["every"], changed["overlap"], changed["missed"]) == (None, "90s", "queue", "all")
    assert changed["paused"] is True
    assert app.schedules.get("n").run().info().arguments == {"tenant": "a"}
    post(
        site,
        "schedules/put",
        name="n",
        every="90s",
        task="report",
        kwargs={"tenant": "b"},
        overlap="skip",
        replace=True,
    )
    assert app.schedules.get("n").run().info().arguments == {"tenant": "b"}
    assert app.schedules.get("n").overlap == "skip"
    audit = [(one["what"], one["who"]) for one in get(site, "audit")["entries"]]
    assert audit == [("edit schedule", "ada")] * 2 + [("create schedule", "ada")]
    app.schedules.delete("n")


def test_a_schedule_of_code_or_with_options_is_not_overwritten(app: Conveyor) -> None:
    """A schedule that code declares is refused, and a new call that would lose the options of the present one; its instants may change."""

    @app.cron(every="1h", name="tick")
    def tick() -> None: ...

    @app.task(name="report")
    def report(tenant: str) -> None: ...

    everything = dashboard(app, lambda _: Access.ALL)
    for replace in (True, False):
        stored = ask(
            everything, "POST", "schedules/put", {"name": "tick", "every": "2h", "task": "tick", "replace": replace}
        )
        assert stored.status_code == (404 if replace else 422)
    owner = app.schedules
    declared = app._core.declared_schedules["tick"]
    owner.drive(owner.put_program("tick", declared.call, declared.spec, "code"))
    for given in ({}, {"task": "tick"}):
        refused = ask(everything, "POST", "schedules/put", {"name": "tick", "every": "2h", "replace": True, **given})
        assert "a decorator in the code" in refused.json()["error"]["message"]
    assert owner.get("tick").when == "every 1 h"

    owner.put("urgent", report.options(priority=9).s("a"), every="1h")
    refused = ask(
        everything, "POST", "schedules/put",
        {"name": "urgent", "every": "2h", "task": "report", "kwargs": {"tenant": "b"}, "replace": True},
    )  # fmt: skip
    assert "priority" in refused.json()["error"]["message"]
    assert owner.get("urgent").when == "every 1 h"
    post(everything, "schedules/put", name="urgent", every="2h", replace=True)
    job = owner.get("urgent").run()
    assert job.info().arguments == {"tenant": "a"}
    assert get(everything, "job", id=job.id)["job"]["priority"] == 9

    planner = dashboard(app, lambda _: Access.only("manage_schedules"))
    post(planner, "schedules/put", name="urgent", every="3h", replace=True)
    for rights in (("manage_schedules",), ("enqueue_jobs",)):
        limited = dashboard(app, lambda _, rights=rights: Access.only(*rights))
        new = {"name": "mine", "every": "1h", "task": "report", "kwargs": {"tenant": "a"}}
        assert ask(limited, "POST", "schedules/put", new).status_code == 403
    assert [one.name for one in owner.list()] == ["tick", "urgent"]
    for one in owner.list():
        one.delete()


def test_schedules_limits_groups_and_topics_are_changed(app: Conveyor) -> None:
    """A change by the pages of schedules, limits and topics is made, noted in the audit under the visitor's name, and shown."""

    @app.task(name="report", queue="reports", limits=[Concurrency(5, by="tenant")])
    def report(tenant: str) -> None: ...

    site = dashboard(app, lambda _: Access.ALL.named("ada"))
    app.schedules.put("nightly", report.s("a"), every="1d")
    post(site, "schedules/pause", name="nightly")
    assert get(site, "schedules")["schedules"][0]["paused"] is True
    post(site, "schedules/resume", name="nightly")
    assert get(site, "schedule", name="nightly")["schedule"]["late"] is False
    assert post(site, "schedules/run", name="nightly")["id"].startswith("reports:")
    post(site, "schedules/delete", name="nightly")
    assert ask(site, "POST", "schedules/run", {"name": "nightly"}).status_code == 404
    [limit] = [one for one in get(site, "limits")["limits"] if one["key"] is None]
    post(site, "limits/set", queue="reports", name=limit["name"], limit="2")
    assert [one["limit"] for one in get(site, "limits")["limits"] if one["overridden"]] == ["2"]
    assert post(site, "limits/reset", queue="reports")["reset"] == 1
    assert ask(site, "POST", "limits/set", {"queue": "reports", "limit": "many"}).status_code == 422
    post(site, "groups/set", queue="reports", key="a", paused=True)
    assert any(one["paused"] for one in get(site, "limits")["groups"])
    post(site, "groups/set", queue="reports", key="a", paused=False)
    post(site, "topics/subscribe", topic="user.created", queues=["emails"])
    assert get(site, "topics")["topics"][0]["subscribers"] == ["emails"]
    post(site, "topics/unsubscribe", topic="user.created", queues=["emails"])
    entries = get(site, "audit", limit=3)
    assert [(one["who"], one["what"]) for one in entries["entries"]][:2] == [
        ("ada", "unsubscribe"),
        ("ada", "subscribe"),
    ]
    assert get(site, "audit", limit=3, before=entries["next"])["entries"][0]["what"] == "set group"
    app.queue("reports").purge()
    app.client.execute("DEL", app.client.keys("reports").conf, key=app.client.keys("reports").conf)


def test_the_server_tells_about_itself(app: Conveyor) -> None:
    """The page of the server has its memory, its policy and what the doctor says; the password is nowhere."""
    found = get(dashboard(app, lambda _: Access.ALL), "redis")
    assert found["memory"]["policy"] == "noeviction"
    assert found["memory"]["used"] > 0
    assert {one["level"] for one in found["findings"]} <= {"ok", "note", "warning", "problem"}


def test_scrapers_and_autoscalers_are_answered(app: Conveyor) -> None:
    """`/metrics` is the text of Prometheus, for whoever may look; `load` is the work of one queue or of all."""
    app.queue("mail").push_many([1, 2])
    open_site = dashboard(app, authorize=lambda _: Access.READ_ONLY)
    scraped = asyncio.run(_get(open_site, "/metrics"))
    assert scraped.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'conveyor_queue_jobs{queue="mail",state="ready"} 2' in scraped.text
    assert ask(open_site, "GET", "load", {"queue": "mail"}).json()["total"]["ready"] == 2
    assert ask(open_site, "GET", "load", {}).json()["queues"].keys() == {"mail"}
    assert ask(open_site, "GET", "load", {"queue": "nobody"}).status_code == 404
    assert asyncio.run(_get(dashboard(app), "/metrics")).status_code == 403
    app.queue("mail").purge()


async def _get(site: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
        return await client.get(path)
