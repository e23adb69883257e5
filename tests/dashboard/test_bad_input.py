"""Large and strange input, given to the HTTP API and to the command line alike: answered calmly, and never with a traceback."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from redis import Redis

from conveyor import Conveyor, Rate
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard
from conveyor.dashboard.endpoint import ApiRoute
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.dashboard.tools import Tools, tool_name
from conveyor.errors import ConfigurationError
from support import server_dump
from support.dashboard_client import OWN_PAGE, ask
from support.odd_values import LONGEST_ANSWER, ODD_TEXTS
from support.waiting import auntil

pytestmark = pytest.mark.leaves_keys("queues are left to be looked at")
SIGNS = "azAZ09_.:-"
JSON_OF_OWN_PAGE = {"content-type": "application/json", **OWN_PAGE}


def get(app: Conveyor, path: str, **inputs: Any) -> Any:
    """Return the document of a call that is answered with 200."""
    answer = ask(dashboard(app, lambda _: Access.ALL), "GET", path, inputs)
    assert answer.status_code == 200, answer.text[:500]
    return answer.json()


@pytest.fixture
def run(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Give what runs a command line: it returns the exit code and all output, in which no traceback is."""
    monkeypatch.setenv("CONVEYOR_URL", url)

    def run(*line: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(line)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err

    return run


def test_payload_of_16_mb(url: str, run: Any) -> None:
    """A job with 16 MB of arguments is listed, shown, filtered and explained; pages show its beginning and its size."""
    with Conveyor(url, max_payload="16MiB", redact=["password"]) as app:

        @app.task(queue="large")
        def work(data: str, password: str) -> None: ...

        large = "x" * 16_000_000
        job = work.enqueue(large, "secret-word")
        for text in ("", "args.data:y*"):
            page = get(app, "jobs", filter=text)
            assert all(len(row["args"]) < 300 for row in page["jobs"])
        shown = get(app, "job", id=job.id)["job"]
        assert len(shown["payload"]) <= 64 * 1024 + 1
        assert shown["payload_size"] > len(large)
        assert "secret-word" not in run("job", "show", job.id)[1]
        answer = ask(dashboard(app, lambda _: Access.ALL), "POST", "push", {"queue": "orders", "messages": [large]})
        assert answer.status_code == 200
        body = {"queue": "orders", "messages": ["small", large + "x" * (1024 * 1024)]}
        answer = ask(dashboard(app, lambda _: Access.ALL), "POST", "push", body)
        assert (answer.status_code, answer.json()["error"]["code"], len(answer.text) < 2_000) == (422, "E21", True)
        assert len(app.queue("orders")) == 1


@pytest.mark.standalone_only("counts what one server sends")
def test_large_arguments_are_read_once_for_a_page(url: str, redis: Redis) -> None:
    """The server sends the arguments of a job once for an answer about it, not once for each part, and not at all for its log lines."""
    with Conveyor(url, max_payload="16MiB", redact=["password"]) as app:

        @app.task(queue="large")
        def work(data: str, password: str) -> None: ...

        size = 4_000_000
        job = work.enqueue("x" * size, "secret-word")
        site = dashboard(app, lambda _: Access.ALL)

        def sent(path: str) -> float:
            """Return how many times the size of the arguments the server sends for an answer."""
            before = redis.info("stats")["total_net_output_bytes"]
            answer = ask(site, "GET", path, {"id": job.id})
            assert (answer.status_code, "secret-word" in answer.text) == (200, False)
            return float(redis.info("stats")["total_net_output_bytes"] - before) / size

        assert 1 <= sent("job") < 1.1
        assert sent("job/logs") < 1.1  # who asks for lines asks whether it runs


def test_binary_arguments(url: str, run: Any) -> None:
    """Arguments that are bytes, in another format or none that is known here, are shown as text or described."""
    with Conveyor(url, format="msgpack") as app:

        @app.task(queue="binary")
        def work(data: bytes) -> bytes:
            return data

        job = work.enqueue(bytes(range(256)))
        message = app.queue("raw").push(b"\x00\xff\x1b[2J")
        keys = app.client.keys("raw")
        with Redis.from_url(url) as redis:
            broken = app.queue("raw").push("x")
            redis.hset(keys.jobs, broken.partition(":")[2], b"\n\n\x02\x07unknown\xc1\x00\x1b[31m")
        rows = get(app, "jobs")["jobs"]
        assert {row["id"] for row in rows} == {job.id, message, broken}
        for id_ in (job.id, message, broken):
            assert isinstance(get(app, "job", id=id_)["job"]["payload"], str)
            code, output = run("job", "show", id_)
            assert (code, "\x1b" in output, "\x00" in output) == (0, False, False)
        for text in ("args.data:x", '"x"', "body:x", "args.data.x.y:1"):
            get(app, "jobs", filter=text)
        assert run("job", "list", "--json")[0] == 0


def test_ten_thousand_queues(url: str, redis: Redis, run: Any) -> None:
    """With 10,000 queues each page has its rows, and lists and commands end."""
    redis.sadd("conveyor:queues", *(f"q{n:05}" for n in range(10_000)))
    with Conveyor(url) as app:
        app.queue("q09999").push(1)
        page = get(app, "queues", limit=10**12, offset=9_950)
        assert (page["total"], len(page["queues"])) == (10_000, 50)
        assert get(app, "queues", q="09999", offset=10**12)["queues"] == []
        snapshot = get(app, "snapshot")
        assert (snapshot["queues_total"], len(snapshot["queues"]) <= 200) == (10_000, True)
        assert get(app, "jobs")["jobs"][0]["queue"] == "q09999"
        assert get(app, "history")["queues_total"] == 10_000
    code, output = run("queue", "list", "--json")
    assert (code, len(json.loads(output)["queues"])) == (0, 10_000)


def test_a_queue_name_with_every_allowed_sign(url: str, run: Any) -> None:
    """A queue whose name has every sign that is allowed, ids of one's own with slashes, and names of dots alone, are found."""
    with Conveyor(url) as app:
        for name in (SIGNS, "..", "-", "a" * 128):
            try:
                id_ = app.queue(name).push({"n": 1}, id="a/b?c=d#e&f <g> ü")
            except ConfigurationError:
                assert name == ".."
                continue
            assert get(app, "queue", name=name)["queue"]["ready"] == 1
            assert get(app, "job", id=id_)["job"]["queue"] == name
            assert get(app, "jobs", queue=name)["total"] == 1
            assert run("queue", "show", "--", name)[0] == 0
            assert run("job", "show", id_)[0] == 0
            assert (
                ask(dashboard(app, lambda _: Access.ALL), "POST", "queues/purge", {"queue": name}).json()["removed"]
                == 1
            )


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (["job", "list", "state:dead", "sate:x"], 2, "Column 12"),
        (["job", "list", 'error:"x'], 2, "Column 7"),
        (["job", "list", "--limit", "-1"], 2, "--limit"),
        (["job", "list", "--offset", "1000000000000"], 0, ""),
        (["job", "show", "none/such?#"], 5, "none/such"),
        (["job", "cancel", "mail:none"], 5, "not found"),
        (["job", "show", "x" * 5000], None, ""),
        (["queue", "show", "../../etc"], None, ""),
        (["queue", "purge", "none", "--yes"], 5, "none"),
        (["audit", "--limit", "0"], 2, "--limit"),
    ],
)
def test_bad_input_on_the_command_line(run: Any, line: list[str], code: int | None, text: str) -> None:
    """A filter that cannot be read says where; numbers out of range and unknown ids end with the exit code that is documented."""
    found, output = run(*line)
    assert found == code if code is not None else found in {2, 5}, output
    assert text in output
    assert len(output) < 2_000


ODD_JSON = [
    *map(json.dumps, ODD_TEXTS), "null", "true", "0", "-1", "1.5", "1e308", "1e400", "-1e400", "NaN", "Infinity", "9223372036854775808",
    f"1{'0' * 30}", "9" * 4000, "9" * 5000, "-0.0", "[]", "{}", "[1]", '["a"]', '[""]', "[null]", '["\\ud800"]', '{"a":"b"}', '{"a":1}',
    '{"\\ud800":"x"}', '{"a":1,"a":2}', "[" * 900 + "]" * 900, "[" * 100_000, '{"delay":NaN}', '{"delay":-1}', '{"at":5}',
    '{"at":"9999-12-31T23:59:59-14:00"}', '{"priority":1e400}', '{"priority":true}', '{"args":5}', '{"args":{"a":NaN}}',
]  # fmt: skip
BODIES = [
    b"",
    b"null",
    b"[]",
    b"5",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    b'{"a":' * 100_000,
    b"\x1f\x8b\x08\x00",
]
HEADERS_OF_REQUESTS = [
    {"host": ""}, {"host": "x" * 5000}, {"if-none-match": '"'}, {"authorization": "Basic \xff"}, {"authorization": "Bearer \xff"},
    {"content-length": "-1"}, {"content-encoding": "gzip"}, {"origin": "\xff://"}, {"accept-encoding": "\xff"}, {"cookie": "\xff="},
    {"content-type": "application/json; charset=utf-16"}, {"content-type": "application/json" + ";" * 2000},
]  # fmt: skip
SAMPLES = {
    "queue": "q", "queues": ["q"], "task": "t", "name": "s", "topic": "x", "key": "x", "text": "x", "messages": [1], "changes": {"priority": 3},
    "weight": 2, "receipts": ["x"], "lease": "5s",
}  # fmt: skip


def sample_inputs(route: ApiRoute, job: str) -> dict[str, Any]:
    """Return inputs of a route that mean something, those that it needs."""
    given = SAMPLES | {"id": job, "ids": [job], "limit": "5/1m" if route.path == "limits/set" else 5}
    needed = {name: one for name, one in route.fields.items() if one.required}
    return {name: one.choices[0] if one.choices else given[name] for name, one in needed.items()} | (
        {"name": "q"} if "name" in needed and not route.path.startswith("schedule") else {}
    )


def odd_requests(dice: random.Random, most: int) -> list[tuple[ApiRoute, str, str]]:
    """Return routes, each with an input and the JSON text that it is given; "" for its body as a whole, or its headers."""
    found = [
        (route, name, value)
        for route in ENDPOINTS
        if route.path != "stream"  # it has no end
        for name in (*route.fields, "unknown")
        for value in (ODD_JSON if route.method == "POST" else map(json.dumps, ODD_TEXTS))
    ]
    return dice.sample(found, min(len(found), most))


class OddRequests:
    """A dashboard on a server with something of every kind, that is asked for odd things; `ends` counts the answers."""

    def __init__(self, app: Conveyor, redis: Redis) -> None:
        self.app, self.redis, self.ends = app, redis, Counter[int]()
        self.task = app.task(name="t", queue="jobs", retry=1)(_call)
        self.limited = app.task(name="lim", queue="limited", limits=[Rate(10, "1m", name="r")])(_call)
        site: Any = dashboard(app, lambda _: Access.ALL)
        site.service.streams = False
        self.operations = site.service.operations
        self.tools = Tools(site.service, Access.ALL)
        self.tool_names = {one.name for one in self.tools.describe()}
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(site, raise_app_exceptions=False), base_url="http://here", timeout=60
        )

    async def fill(self) -> tuple[str, dict[str, Any]]:
        """Empty the server and store something; return the id of a job that waits, and what the server holds."""
        self.operations.stop_all()  # one that was begun for the last case would be noted in this one
        await auntil(lambda: all(one.state != "running" for one in self.operations.all()))
        self.redis.flushall(asynchronous=False)
        await self.app.queue("q").apush({"a": 2})
        await self.app.schedules.aput("s", self.task.s(1), every="1h")
        await self.limited.aenqueue(1)
        job = await self.task.options(delay="1h").aenqueue(1)
        return job.id, server_dump.exact(self.redis)

    def check(self, answer: httpx.Response, before: dict[str, Any], case: str) -> None:
        """Hold an answer against the law: it is no fault of the dashboard, and a refusal is small and leaves all as it was."""
        self.ends[answer.status_code] += 1
        assert answer.status_code < 500, (case, answer.text[:500])
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"], case
            assert len(answer.text) < LONGEST_ANSWER, case
            assert server_dump.difference(before, server_dump.exact(self.redis)) == {}, case

    async def ask(self, route: ApiRoute, name: str, value: str) -> None:
        """Give a route one odd input: by HTTP, and as the tool of an agent where it is one."""
        (job, before), case = await self.fill(), f"{route.path} {name}={value[:80]!a}"
        given = sample_inputs(route, job)
        if route.method == "GET":
            texts = {key: str(one) for key, one in {**given, name: json.loads(value)}.items()}
            query = "&".join(f"{key}={quote(text.encode('utf-8', 'surrogatepass'))}" for key, text in texts.items())
            answer = await self.client.get(f"/api/v1/{route.path}?{query[:60_000]}")
        else:
            pairs = [f"{json.dumps(key)}:{json.dumps(one)}" for key, one in given.items() if key != name]
            body = "{" + ",".join([*pairs, f"{json.dumps(name)}:{value}"]) + "}"
            answer = await self.client.post(f"/api/v1/{route.path}", content=body, headers=JSON_OF_OWN_PAGE)
        self.check(answer, before, case)
        if (tool := tool_name(route)) in self.tool_names and len(value) < 5000:
            text, _ = await self.tools.call(tool, {**given, name: python_of(value)})
            assert len(text) < 200_000, case
            assert '"E00"' not in text, case

    async def ask_whole(self, route: ApiRoute, headers: dict[str, str], body: bytes) -> None:
        """Send a route odd headers, and a body that is none of its own."""
        sent = {key: one.encode("latin-1") for key, one in (JSON_OF_OWN_PAGE | headers).items()}
        answer = await self.client.request(route.method, f"/api/v1/{route.path}", headers=sent, content=b"{}")
        assert answer.status_code < 500, (route.path, headers)
        if route.method == "POST":
            _, before = await self.fill()
            answer = await self.client.post(f"/api/v1/{route.path}", content=body, headers=JSON_OF_OWN_PAGE)
            self.check(answer, before, f"{route.path} {body[:20]!r}")


@pytest.mark.standalone_only("asks so much that one place is enough")
def test_every_input_of_every_route(url: str, redis: Redis, rounds: Callable[[int, int], int]) -> None:
    """An odd input is taken, or refused with a small document and nothing stored; a tool of an agent answers likewise."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def ask_all(odd: OddRequests) -> None:
        async with odd.client:
            for one in odd_requests(dice, rounds(20_000, 400)):
                await odd.ask(*one)
            for route in ENDPOINTS:
                for headers in dice.sample(HEADERS_OF_REQUESTS, rounds(len(HEADERS_OF_REQUESTS), 2)):
                    if route.path != "stream":
                        await odd.ask_whole(route, headers, dice.choice(BODIES))
        await odd.app.aclose()

    with Conveyor(url, timeout="5s") as app:
        odd = OddRequests(app, redis)
        asyncio.run(ask_all(odd))
    print(odd.ends)
    assert odd.ends[422] > 100
    assert odd.ends[200] > 5
    redis.flushall(asynchronous=False)


def _call(a: int = 0) -> None: ...


def python_of(text: str) -> Any:
    """Return what a program would hand over for a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
