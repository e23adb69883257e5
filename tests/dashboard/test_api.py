"""The HTTP API on a real server: what it shows, what it does, and how it answers bad input."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from conveyor import Conveyor
from conveyor.admin import Admin
from conveyor.admin.job_query import parse
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard, operations
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.errors import InvalidFilter
from conveyor.payload.redaction import REDACTED
from support.dashboard_client import ask, inputs_of
from support.running_worker import until_counts
from support.waiting import until
from testbed.server_process import Server

pytestmark = pytest.mark.leaves_keys("jobs are left to be looked at")


@pytest.fixture
def site(app: Conveyor) -> Any:
    return dashboard(app, lambda _: Access.ALL.named("ada"))


def get(site: Any, path: str, **inputs: Any) -> dict[str, Any]:
    answer = ask(site, "GET", path, inputs)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def post(site: Any, path: str, **inputs: Any) -> dict[str, Any]:
    answer = ask(site, "POST", path, inputs)
    assert answer.status_code in {200, 202}, answer.text
    return answer.json()  # type: ignore[no-any-return]


def fail(app: Conveyor, count: int) -> None:
    """Leave so many dead jobs of one task, whose messages differ by a number, and one of another."""

    @app.task(queue="mail", retry=1)
    def send(user: int) -> None:
        raise ValueError(f"no such user {user}")

    @app.task(queue="mail", retry=1)
    def other() -> None:
        raise KeyError("x")

    async def run() -> None:
        for user in range(count):
            await send.options(tags=["vip"] if user == 3 else []).aenqueue(user)
        await other.aenqueue()
        async with app.worker(queues={"mail": 1}):
            while (await app.queue("mail").astats()).dead < count + 1:
                await asyncio.sleep(0.02)
        await app.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_failing_task_is_found_and_all_its_dead_jobs_are_retried(app: Conveyor, site: Any) -> None:
    """From the table of failures to its jobs, to a retry of all of them in the background, which the audit names."""
    fail(app, 7)
    groups = get(site, "failures")["groups"]
    assert [(one["type"], one["count"], sum(one["cells"])) for one in groups] == [
        ("ValueError", 7, 7),
        ("KeyError", 1, 1),
    ]
    assert groups[0]["frame"].startswith("dashboard/test_api.py:")
    assert groups[0]["frame"].endswith(" send")
    page = get(site, "jobs", filter=groups[0]["filter"], limit=3)
    assert len(page["jobs"]) == 3
    assert get(site, "jobs/matching", filter=groups[0]["filter"])["states"] == {"dead": 7}

    job = get(site, "job", id=page["jobs"][0]["id"])
    assert job["job"]["errors"][0]["frames"][-1]["own"] is True
    assert job["actions"] == ["retry", "delete", "rerun"]
    operation = post(site, "operations", action="retry", filter=groups[0]["filter"])["operation"]
    deadline = time.monotonic() + 60
    while (shown := get(site, "operation", id=operation["id"])["operation"])["state"] == "running":
        assert time.monotonic() < deadline
    assert (shown["state"], shown["done"], shown["refused"], shown["user"]) == ("done", 7, 0, "ada")
    stats = app.queue("mail").stats()
    assert (stats.ready, stats.dead) == (7, 1)
    [entry] = get(site, "audit")["entries"]
    assert (entry["who"], entry["what"], entry["count"], entry["filter"]) == ("ada", "retry", 7, groups[0]["filter"])


def test_a_long_operation_is_noted_when_it_began(app: Conveyor, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit names an operation while it goes on, too: its end is not noted where its process is killed."""
    monkeypatch.setattr(operations, "_NOTED_AFTER", -1.0)
    fail(app, 3)
    operation = post(site, "operations", action="retry", filter="state:dead", rate="1/h")["operation"]
    until(lambda: get(site, "audit")["entries"])
    [begun] = get(site, "audit")["entries"]
    assert (begun["who"], begun["what"], begun["filter"], begun["detail"]) == ("ada", "retry", "state:dead", "begun")
    assert get(site, "operation", id=operation["id"])["operation"]["state"] == "running"
    post(site, "operations/stop", id=operation["id"])  # an hour need not pass before it is heard
    until(lambda: get(site, "operation", id=operation["id"])["operation"]["state"] == "stopped")
    assert [(one["detail"], one["count"]) for one in get(site, "audit")["entries"]] == [("stopped", 1), ("begun", None)]


def test_history_is_what_ended(app: Conveyor, site: Any) -> None:
    """History by minute and by hour counts each attempt once."""
    fail(app, 4)
    for name in ("15m", "24h", "7d", "30d"):
        found = get(site, "history", range=name)
        assert sum(found["failed"]) == 5, name
        assert len(found["failed"]) == len(found["times"]) == len(found["p99_ms"])
        assert {one["task"].rpartition(".")[2]: one["failed"] for one in found["tasks"]} == {"send": 4, "other": 1}
    assert sum(get(site, "history", range="15m", queue="mail", task=found["tasks"][0]["task"])["failed"]) == 4


def test_pages_of_jobs_hold_each_job_once(app: Conveyor, site: Any) -> None:
    """Pages by their cursor hold every job of all queues and states once, with and without a filter."""
    for queue in ("a", "b"):
        app.queue(queue).push_many([{"n": n} for n in range(23)])
        app.queue(queue).push({"n": 99}, delay="1h")
    for text, expected in (("", 48), ("-body.n:99", 46), ("body.n:*", 48), ("state:scheduled", 2), ("queue:a", 24)):
        ids, cursor = [], ""
        while cursor is not None:
            page = get(site, "jobs", filter=text, limit=5, cursor=cursor)
            assert len(page["jobs"]) <= 5
            ids += [one["id"] for one in page["jobs"]]
            cursor = page["next"]
        assert len(ids) == len(set(ids)) == expected, text


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("sate:dead", 0), ("task:x sate:dead", 7), ("state:gone", 6), ("state:", 6), ('error:"x', 6), ("age:1h", 4), ("age:>x", 4),
        ("attempt:many", 8), ('""', 0), ("header:x", 7), ("state.x:dead", 0), ("since:2026-13-01", 6),
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_read_says_where(text: str, position: int) -> None:
    """The error of a filter names the column at which it cannot be read."""
    with pytest.raises(InvalidFilter, match=f"Column {position + 1} ") as caught:
        parse(text)
    assert caught.value.position == position


def test_the_filter_language_chooses(app: Conveyor) -> None:
    """Each field chooses the jobs that have it, and a minus the others."""
    fail(app, 5)
    app.queue("orders").push({"user": {"id": 42}, "note": "Grüße"}, headers={"trace": "t1"}, priority=3)
    admin = Admin.of_app(app)
    for text, count in {
        "": 7, "state:dead": 6, "queue:orders": 1, "queue:o*": 1, "task:*.send": 5, "-task:*.send": 2, "error:NO": 5,
        'error:"user 3"': 1, "tag:vip": 1, "tag:vip state:ready": 0, "args.user:2": 1, "body.user.id:42": 1, "args.user:4*": 1,
        "grüße": 1, '"no such user 1"': 1, "age:>1h": 0, "age:<1h": 7, "-age:<1h": 0, "attempt:1": 6, "attempt:>=2": 0,
        "priority:3": 1, "header.trace:t*": 1, "state:ready,dead": 7, "since:1h older:0s error:keyerror": 1,
    }.items():  # fmt: skip
        query = parse(text)
        assert len(admin.search(query, limit=100).jobs) == count, text
        assert admin.count_matching(query).count == count, text


def test_bad_input_is_answered_calmly(app: Conveyor, site: Any) -> None:
    """Pages of any number, binary bodies, large payloads and wrong types get a small answer, and never a 500."""
    app.queue("a.b:c-d_e").push({"big": "x" * 500_000})
    for inputs in (
        {"offset": 10**12},
        {"offset": -5},
        {"limit": -3},
        {"limit": 10**30},
        {"cursor": "x\ny\n-1\nz"},
        {"cursor": "a"},
    ):
        get(site, "jobs", **inputs)
    get(site, "queues", offset=10**12)
    rows = get(site, "jobs")["jobs"]
    assert len(rows[0]["args"]) < 300
    shown = get(site, "job", id=rows[0]["id"])["job"]
    assert len(shown["payload"]) <= 64 * 1024 + 1
    assert shown["payload_size"] > 500_000
    for path, inputs, status in (
        ("job", {"id": "none/such?#"}, 404), ("queue", {"name": ".."}, 404), ("jobs", {"limit": "x"}, 422), ("jobs", {"page": 1}, 422),
        ("history", {"range": "1y"}, 422), ("job", {}, 422), ("schedule", {"name": "x"}, 404), ("operation", {"id": "x"}, 422),
        ("audit", {"before": "x y"}, 422), ("jobs", {"filter": "x" * 5000}, 422),
    ):  # fmt: skip
        assert ask(site, "GET", path, inputs).status_code == status, path
    for inputs in ({"queue": 5}, {"queue": None}, {"queue": ["a"]}, {}, {"queue": "none"}):
        assert ask(site, "POST", "queues/purge", inputs).status_code in {404, 422}
    assert ask(site, "POST", "operations", {"action": "delete"}).status_code == 422
    assert ask(site, "POST", "operations", {"action": "fly", "filter": "state:dead"}).status_code == 422


def test_a_server_that_goes_away_is_a_503(start_server: Any) -> None:
    """While Redis does not answer, each page says so, and it works again after that."""
    server: Server = start_server()
    with Conveyor(server.url, timeout="0.3s") as app:
        app.queue("mail").push(1)
        site = dashboard(app, lambda _: Access.ALL)
        get(site, "queues")
        server.kill()
        for path in ("queues", "jobs", "snapshot", "session"):
            answer = ask(site, "GET", path, {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "E01"), path


def test_the_description_names_every_route(site: Any) -> None:
    """The OpenAPI description has each route with its inputs."""
    document = get(site, "openapi.json")
    assert document["openapi"] == "3.1.0"
    assert document["paths"]["/jobs"]["get"]["parameters"][0]["name"] == "filter"
    assert document["paths"]["/queues/purge"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "required"
    ] == ["queue"]


def test_the_description_holds_for_what_is_taken_and_answered(app: Conveyor) -> None:
    """Each route takes what its description says, null for what may be left out; each answer has a status and a form of it."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    site: Any = dashboard(app, lambda _: Access.ALL)
    document = get(site, "openapi.json")
    for route in ENDPOINTS:
        if route.path == "stream":  # it has no end, and the answer below WSGI has no body
            continue
        described = document["paths"][f"/{route.path}"][route.method.lower()]
        for choice in (*route.action, "no-such-action") if isinstance(route.action, Mapping) else (None,):
            given = inputs_of(route, choice)
            if route.method == "POST":
                given = dict.fromkeys(route.fields) | given
                schema = described["requestBody"]["content"]["application/json"]["schema"]
                assert validator(schema).is_valid(given) == (choice != "no-such-action"), (route.path, given)
            answer = ask(site, route.method, route.path, given)
            content = described["responses"][str(answer.status_code)]["content"]
            media, _, _ = answer.headers["content-type"].partition(";")
            schema = {**content[media]["schema"], "components": document["components"]}
            found = list(validator(schema).iter_errors(answer.json() if media == "application/json" else answer.text))
            assert found == [], (route.path, found)
            assert answer.status_code != 500, route.path


def test_a_queue_names_its_paused_tasks(app: Conveyor, site: Any) -> None:
    """The page of a queue gets the tasks that are paused there, which it offers to resume."""
    app.queue("mail").push(1)

    ask(site, "POST", "queues/pause", {"queue": "mail", "task": "shop.pay"})
    paused = ask(site, "GET", "queue", {"name": "mail"}).json()["paused_tasks"]
    ask(site, "POST", "queues/resume", {"queue": "mail", "task": "shop.pay"})

    assert paused == ["shop.pay"]
    assert ask(site, "GET", "queue", {"name": "mail"}).json()["paused_tasks"] == []


def test_all_queues_are_paused_at_once(url: str) -> None:
    """Each partition of each queue is paused, and resumed; the audit has one line with the number; no input at all pauses nothing."""
    with Conveyor(url) as app:
        site = dashboard(app, lambda _: Access.ALL.named("ada"))
        app.queue("mail").push(1)
        app.queue("orders", partitions=3).push_many(range(9))

        assert ask(site, "POST", "queues/pause", {}).status_code == 404
        assert ask(site, "POST", "queues/pause", {"all": False}).status_code == 404
        for more in ({"queue": "mail"}, {"task": "shop.pay"}):
            refused = ask(site, "POST", "queues/pause", {"all": True, **more})
            assert (refused.status_code, "'all'" in refused.text) == (422, True)
        assert not any(one["paused"] for one in get(site, "queues")["queues"])

        answer = ask(site, "POST", "queues/pause", {"all": True}).json()
        assert (answer["queue"], answer["task"], answer["queues"]) == (None, None, ["mail", "orders"])
        assert all(one["paused"] for one in get(site, "queue", name="orders")["partitions"])
        assert get(site, "snapshot")["totals"]["paused_queues"] == 2
        assert ask(site, "POST", "queues/resume", {"all": True}).json()["queues"] == ["mail", "orders"]
        assert not any(one["paused"] for one in get(site, "queue", name="orders")["partitions"])
        assert not app.queue("mail").stats().paused

        told = [
            (one["who"], one["what"], one["target"], one["count"]) for one in get(site, "audit", limit=5)["entries"]
        ]
        assert told == [("ada", "resume", "all queues", 2), ("ada", "pause", "all queues", 2)]


@pytest.mark.parametrize("path", ["queues/pause", "schedules/pause", "enqueue", "jobs/actions"])
def test_text_that_is_no_text_is_refused(site: Any, path: str) -> None:
    """Half of a surrogate pair in any text of a body is answered with 422, and nothing is done."""
    route = next(one for one in ENDPOINTS if one.path == path)
    for name, field in route.fields.items():
        if field.kind in {"text", "texts"} and not field.choices:
            body = inputs_of(route, "retry") | {name: "\ud800" if field.kind == "text" else ["\ud800"]}
            if path != "jobs/actions":
                del body["action"]
            answer = ask(site, "POST", path, body)
            assert (answer.status_code, "surrogate" in answer.text) == (422, True), (name, answer.text)


def test_an_input_that_is_given_twice_is_refused(app: Conveyor, site: Any) -> None:
    """A parameter or a member of a body that stands twice is not chosen from: it is answered with 422, and nothing is done."""
    app.queue("mail").push(1)

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
            headers = {"content-type": "application/json", "sec-fetch-site": "same-origin"}
            return [
                await client.get("/api/v1/jobs?state=dead&state=done"),
                await client.post("/api/v1/queues/pause", content='{"queue":"mail","queue":"other"}', headers=headers),
                await client.post(
                    "/api/v1/push", content='{"queue":"mail","messages":[{"a":1,"a":2}]}', headers=headers
                ),
            ]

    for answer, name in zip(asyncio.run(send()), ("state", "queue", "a"), strict=True):
        assert answer.status_code == 422
        assert f"'{name}' is given twice" in answer.json()["error"]["message"]
    assert (app.queue("mail").stats().paused, len(app.queue("mail"))) == (False, 1)


def test_push_and_enqueue_over_http(app: Conveyor) -> None:
    """A program with a token pushes messages and enqueues jobs, whose arguments are checked, and what was refused stored nothing."""

    @app.task(queue="mail")
    def send(to: str, times: int = 1) -> None: ...

    site = dashboard(app, tokens={"secret": Access.only("enqueue_jobs").named("shop")})

    def call(path: str, **inputs: Any) -> Any:
        return ask(site, "POST", path, inputs, {"authorization": "Bearer secret"})

    pushed = call("push", queue="orders", messages=[{"n": 1}, {"n": 2}], tags=["vip"], headers={"a": "b"}).json()
    assert len(pushed["ids"]) == 2
    assert call("push", queue="orders", messages=[{"n": 1}], id="own").json()["ids"] == ["own"]
    job = call("enqueue", task=send.name, kwargs={"to": "ada"}, priority=3, delay="1h").json()
    assert app.count_jobs(tag="vip") == 2
    assert [one.priority for one in Admin.of_app(app).jobs("mail")] == [3]
    assert job["id"].startswith("mail:")
    for path, inputs in (
        ("enqueue", {"task": "none"}), ("enqueue", {"task": send.name, "kwargs": {"to": 5}}), ("enqueue", {"task": send.name}),
        ("push", {"queue": "a b", "messages": [1]}), ("push", {"queue": "orders", "messages": [1, 2], "id": "x"}),
        ("push", {"queue": "orders", "messages": [1], "headers": {"a": 1}}), ("push", {"queue": "orders", "messages": {}}),
        ("push", {"queue": "orders", "messages": [1], "delay": "soon"}),
    ):  # fmt: skip
        assert call(path, **inputs).status_code == 422, (path, inputs)
    assert (len(app.queue("orders")), len(app.queue("mail"))) == (3, 1)
    assert (
        ask(
            dashboard(Admin.of_app(app), lambda _: Access.ALL), "POST", "push", {"queue": "x", "messages": [1]}
        ).status_code
        == 422
    )
    assert {one.who for one in Admin.of_app(app).audit()} == {"shop"}


def test_files_of_pages_are_compressed_and_kept(site: Any) -> None:
    """A file of the pages comes compressed, once; asked again with its tag it is not sent."""

    async def ask_for(path: str, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://here") as client:
            return await client.get(path, headers=headers)

    first = asyncio.run(ask_for("/static/app.js"))
    assert (first.status_code, first.headers["content-encoding"]) == (200, "gzip")
    again = {"if-none-match": first.headers["etag"]}
    assert asyncio.run(ask_for("/static/app.js", **again)).status_code == 304
    assert asyncio.run(ask_for("/static/app.js", **{"accept-encoding": "identity"})).text == first.text


def test_a_minute_that_is_over_is_added_to_its_hour_once(app: Conveyor, redis: Any) -> None:
    """The first end in another minute adds the counters of the last one to its hour, and later ends add nothing more."""
    keys = app.client.keys("mail")
    last = int(time.time() // 60) - 65
    redis.hset(f"{keys.prefix}stats:{last}", mapping={"done:x": 5, "failed:x": 2})
    redis.set(f"{keys.prefix}stats:last", last)
    redis.sadd("conveyor:queues", "mail")
    assert sum(Admin.of_app(app).history("7d", task="x").done) == 5
    fail(app, 3)
    hour = redis.hgetall(f"{keys.prefix}stats:h{last // 60}")
    assert {name: int(count) for name, count in hour.items()} == {b"done:x": 5, b"failed:x": 2}
    assert 0 < redis.ttl(f"{keys.prefix}stats:{last}") <= 90_000
    assert redis.ttl(f"{keys.prefix}stats:h{last // 60}") > 86_400 * 30
    assert sum(Admin.of_app(app).history("7d", task="x").done) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--auth NAME:PASSWORD"),
        (["--host", "0.0.0.0", "--auth", "ada"], "NAME:PASSWORD"),
        (["--auth", ":x"], "NAME:PASSWORD"),
    ],
)
def test_another_address_needs_a_login(
    options: list[str], message: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command listens at no address of others without a login, and says what to give."""
    assert main(["dashboard", "--url", url, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_waiting_job_is_changed_and_an_ended_one_runs_again(url: str) -> None:
    """Only what differs from what is shown is changed, a mark is no value, and who did what stands in the audit."""
    app = Conveyor(url, redact=["token"])

    @app.task(queue="mail", retry=1)
    def send(user: int, token: str = "") -> None:
        raise ValueError("no")

    async def fail_one() -> str:
        job = await send.aenqueue(2**60 + 1, "secret")
        async with app.worker(queues={"mail": 1}):
            await until_counts(app, lambda now: now.dead, "mail")
        await app.aclose()
        return job.id

    dead = asyncio.run(asyncio.wait_for(fail_one(), 60))
    waiting = send.options(delay="1h").enqueue(1, "secret").id
    message = app.queue("orders").push({"n": 1})
    site = dashboard(app, lambda _: Access.ALL.named("ada"))
    assert get(site, "job", id=dead)["actions"] == ["retry", "delete", "rerun"]
    assert get(site, "job", id=waiting)["actions"] == ["promote", "update", "cancel", "delete"]
    shown = json.loads(get(site, "job", id=waiting)["job"]["payload"])
    assert shown == {"user": 1, "token": REDACTED}
    changes = {"args": {**shown, "user": 2**60 + 1}, "priority": 7, "delay": "2h"}
    assert post(site, "jobs/update", id=waiting, changes=changes)["changed"] is True
    assert app.job(waiting).info().arguments == {"user": 2**60 + 1, "token": "secret"}
    assert post(site, "jobs/update", id=waiting, changes={"args": json.loads(get(site, "job", id=waiting)["job"]["payload"])}) == {
        "schema": "conveyor/job-updated@1", "id": waiting, "changed": False, "detail": "These are the arguments that it has.",
    }  # fmt: skip
    assert post(site, "jobs/update", id=message, changes={"priority": 3})["changed"] is True
    for id_, changes, status in (
        (waiting, {}, 422), (waiting, {"queue": "x"}, 422), (waiting, {"priority": 10}, 422), (waiting, {"args": {"user": REDACTED}}, 422),
        (waiting, {"args": {"user": "x"}}, 422), (waiting, {"args": [1]}, 422), (waiting, {"at": "soon"}, 422), (waiting, {"delay": "x"}, 422),
        (waiting, {"args": {"none": 1}}, 422), (message, {"args": {"n": 2}}, 422), ("mail:none", {"priority": 1}, 404),
    ):  # fmt: skip
        assert ask(site, "POST", "jobs/update", {"id": id_, "changes": changes}).status_code == status, changes
    assert (
        ask(site, "POST", "enqueue", {"task": send.name, "kwargs": {"user": 1, "token": REDACTED}}).status_code == 422
    )
    assert post(site, "jobs/update", id=dead, changes={"priority": 1})["changed"] is False

    results = post(site, "jobs/rerun", ids=[dead, waiting, "mail:none", message])["results"]
    assert [one["outcome"] for one in results] == ["enqueued", "refused", "not found", "refused"]
    again = app.job(results[0]["detail"]).info()
    assert (again.origin, again.arguments) == (dead, {"user": 2**60 + 1, "token": "secret"})
    audit = Admin.of_app(app).audit()
    assert [(one.who, one.what, one.count) for one in audit] == [
        ("ada", "rerun", 1),
        ("ada", "update", 1),
        ("ada", "update", 1),
    ]
    assert "secret" not in str(audit)
    alone = Admin(app.client)  # without the app nothing is known of arguments
    assert alone.update(waiting, priority=1) is True
    assert alone.rerun(dead)[0].outcome == "refused"
    app.close()
