"""Webhooks: each end is told once, signed; failures are tried again, and nothing private is reached."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from conveyor import ConfigurationError, Conveyor, Retry, RetryIn, Webhook
from conveyor.jobs import webhooks
from conveyor.jobs.core import core_of
from support.app_fixtures import loop_app  # noqa: F401
from support.running_worker import drain
from support.waiting import auntil, until_ended

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Receiver:
    """A receiver of webhooks: `answers` are its next statuses, then 204."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("location", "/elsewhere")
                self.send_header("retry-after", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        until_ended(self.thread)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.mark.row("D356")
async def test_each_end_is_told_and_signed(app: Conveyor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A success and a death are told once each; a receiver that fails or redirects is tried again with the same id."""
    fast = Retry(attempts=10, backoff="1ms", jitter=False, give_up=(webhooks.WebhookRefused,))
    monkeypatch.setattr(webhooks, "DELIVERY", fast)
    receiver.answers = [500, 302, 429]

    @app.task(name="pay", queue="money", webhook=Webhook(receiver.url, SECRET, allow_private=True), retry=1)
    async def pay(n: int) -> int:
        return 1 // n

    @app.task(name="quiet", webhook=Webhook(receiver.url, SECRET, on=["dead"], allow_private=True))
    async def quiet() -> None: ...

    good, bad = await pay.aenqueue(1), await pay.aenqueue(0)
    await quiet.aenqueue()
    await drain(app)
    told = [(headers["webhook-id"], json.loads(body)) for _, headers, body in receiver.requests]
    assert len(told) == 5  # two ends, one of them or both after three refusals
    assert {(one["type"], one["data"]["id"], one["data"]["state"]) for _, one in told} == {
        ("job.done", good.id, "done"), ("job.dead", bad.id, "dead"),
    }  # fmt: skip
    assert len({id_ for id_, _ in told}) == 2
    [error] = {one["data"]["error"]["type"] for _, one in told if one["type"] == "job.dead"}
    assert error == "ZeroDivisionError"
    for path, headers, body in receiver.requests:
        assert path == "/hook?token=1"
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.digest(bytes(range(32)), signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
    app.queue("money")
    await app.queue("money").apurge(dead=True)


@pytest.mark.row("D356")
async def test_a_delivery_that_fails_has_an_end(
    app: Conveyor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that never takes it is tried ten times; then the delivery is a dead letter, which is told to nobody."""
    monkeypatch.setattr(webhooks, "DELIVERY", replace(webhooks.DELIVERY, backoff="1ms", jitter=False))
    receiver.answers = [500] * 50

    @app.task(webhook=Webhook(receiver.url, SECRET, allow_private=True))
    async def work() -> None: ...

    await work.aenqueue()
    worker = asyncio.create_task(drain(app))
    await auntil(lambda: worker.done() or len(receiver.requests) > 10)
    assert len(receiver.requests) == 10
    await worker
    [letter] = [one async for one in app.queue("default").adead_letters()]
    assert (letter.attempts, len(receiver.requests)) == (10, 10)
    await app.queue("default").apurge(dead=True)


@pytest.mark.row("D356")
async def test_a_private_address_is_not_reached(
    app: Conveyor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads to this machine is refused when the webhook is delivered, once, and nothing is sent."""
    found = [(2, 1, 6, "", ("127.0.0.1", receiver.server.server_port))]
    monkeypatch.setattr(webhooks.socket, "getaddrinfo", lambda *words, **options: found)

    @app.task(webhook=Webhook("https://hooks.example.org/x", SECRET))
    async def work() -> None: ...

    await work.aenqueue()
    await drain(app)
    assert receiver.requests == []
    [letter] = [one async for one in app.queue("default").adead_letters()]
    assert letter.attempts == 1
    assert "private" in letter.error
    await app.queue("default").apurge(dead=True)


@pytest.mark.parametrize(
    "words",
    [
        {"url": "ftp://example.org"}, {"url": "https://user:pass@example.org/"}, {"url": "http://example.org/"},
        {"url": "https://127.0.0.1/"}, {"url": "https://localhost/"}, {"url": "https://10.1.2.3/"}, {"url": "https://[::1]/"},
        {"url": "https://[::ffff:10.0.0.1]/"}, {"url": "https://169.254.169.254/latest"}, {"url": 7},
        {"secret": "short"}, {"secret": "whsec_c2hvcnQ="}, {"on": ["started"]}, {"on": "done"},
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(words: dict[str, Any]) -> None:
    """A URL that is none, readable or private, a weak secret and an unknown end are refused where they are written."""
    with pytest.raises(ConfigurationError):
        Webhook(**{"url": "https://example.org/", "secret": SECRET, **words})


def test_a_webhook_needs_a_job_that_ends(url: str) -> None:
    """An early acknowledgement and a plain URL are refused."""
    with Conveyor(url) as app:
        with pytest.raises(ConfigurationError, match="early"):
            app.task(ack="early", webhook=Webhook("https://example.org/", SECRET))(lambda: None)
        with pytest.raises(ConfigurationError, match="takes a Webhook"):
            app.task(webhook="https://example.org/")(lambda: None)  # type: ignore[arg-type,call-overload]


def test_a_receiver_that_asks_for_patience_is_named(receiver: Receiver) -> None:
    """A status with Retry-After postpones the next try, and the error says which status answered."""
    receiver.answers = [503]
    told = {"id": "default:x", "state": "done", "at": "2026-11-28T04:20:00.000+00:00"}
    with pytest.raises(RetryIn, match=r"^http://127\.0\.0\.1 answered 503\.$") as postponed:
        webhooks.send(Webhook(receiver.url, SECRET, allow_private=True), "default:y", told)
    assert postponed.value.delay == 0


@pytest.mark.row("D356")
def test_a_receiver_that_never_finishes_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that sends its answer a byte at a time, each in time, holds up a delivery for no longer than all of it may take."""
    monkeypatch.setattr(webhooks, "_TOTAL", 0.5)
    left = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                for byte in b"HTTP/1.1 204 No Content\r\nx-slow: " + 200 * b"x" + b"\r\n\r\n":
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=drip)
        receiver.start()
        hook = Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", SECRET, allow_private=True)
        with pytest.raises(webhooks.WebhookFailed, match=r"TimeoutError: it took longer than 0\.5 s"):
            webhooks.send(
                hook, "default:y", {"id": "default:x", "state": "done", "at": "2026-11-28T04:20:00.000+00:00"}
            )
        until_ended(receiver)
    assert left.is_set()


@pytest.mark.row("D356")
async def test_a_worker_without_the_webhook_does_not_end_it(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery that a worker of another release takes, whose task has no webhook, is tried again: another worker may have it."""
    monkeypatch.setattr(webhooks, "DELIVERY", replace(webhooks.DELIVERY, attempts=3, backoff="1ms", jitter=False))
    app.task(name="unlike", webhook=Webhook("https://example.org/", SECRET))(lambda: None)
    await core_of(app).tasks[webhooks.TASK].aenqueue("pay", {"state": "done"})
    await drain(app)
    [letter] = [one async for one in app.queue("default").adead_letters()]
    assert letter.attempts == 3
    await app.queue("default").apurge(dead=True)
