"""Large and strange input, given to the HTTP API and to the command line alike: answered calmly, and never with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.cli import main
from conveyor.dashboard import Access, dashboard
from conveyor.errors import ConfigurationError
from support.dashboard_client import ask

pytestmark = pytest.mark.leaves_keys("queues are left to be looked at")
SIGNS = "azAZ09_.:-"


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
