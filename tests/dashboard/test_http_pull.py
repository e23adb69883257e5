"""Messages consumed over HTTP: pulled with receipts, which any instance of the dashboard settles once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conveyor import Concurrency, Conveyor, Queue
from conveyor.dashboard import Access, dashboard
from conveyor.messaging.receipts import Receipt, read_receipt
from support.dashboard_client import ask
from support.waiting import auntil
from testbed.server_groups import free_port

ROOT = Path(__file__).parents[2]
TOKENS = {"secret": Access.only("pull_messages").named("billing")}


@pytest.fixture
def site(app: Conveyor) -> Any:
    return dashboard(app, tokens=TOKENS)


def call(site: Any, path: str, **inputs: Any) -> Any:
    """Return the document of one call, which is allowed."""
    answer = ask(site, "POST", path, inputs, {"authorization": "Bearer secret"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pull(site: Any, queue: str = "orders", **inputs: Any) -> list[dict[str, Any]]:
    return call(site, "pull", queue=queue, **inputs)["messages"]  # type: ignore[no-any-return]


def settle(site: Any, how: str, *messages: dict[str, Any], **inputs: Any) -> list[str]:
    results = call(site, f"messages/{how}", receipts=[one["receipt"] for one in messages], **inputs)["results"]
    assert [one["receipt"] for one in results] == [one["receipt"] for one in messages]
    return [one["outcome"] for one in results]


def test_messages_are_pulled_and_each_is_settled_by_its_receipt(app: Conveyor, site: Any) -> None:
    """A pulled message has all that a consumer needs; each receipt settles its own message, at any instance, once."""
    queue = app.queue("orders", max_attempts=2)
    queue.push_many([{"n": n} for n in range(4)], headers={"trace": "t1"}, tags=["vip"])
    first, second, third, fourth = pull(site, max=10)
    assert (first["body"], first["attempt"], first["headers"], first["tags"]) == ({"n": 0}, 1, {"trace": "t1"}, ["vip"])
    with Conveyor(app.client.address.url) as other_app:
        other_app.queue("orders", max_attempts=2)
        other = dashboard(other_app, tokens=TOKENS)
        assert settle(other, "ack", first, second) == ["done", "done"]
        assert settle(other, "nack", third, delay="1h") == ["retried"]
        assert settle(other, "extend", fourth, lease="1h") == ["extended"]
    assert settle(site, "ack", first, third) == ["lost", "lost"]
    assert settle(site, "extend", second, lease="1m") == ["lost"]
    stats = queue.stats()
    assert (stats.leased, stats.scheduled, stats.ready, stats.dead) == (1, 1, 0, 0)
    assert settle(site, "nack", fourth, delay="0s") == ["retried"]
    [again] = pull(site, wait=20)
    assert (again["body"], again["attempt"]) == ({"n": 3}, 2)
    assert settle(site, "nack", again) == ["dead"]
    assert [one.error for one in queue.dead_letters()] == ["nack: refused by nack()"]
    queue.purge()
    queue.purge(dead=True)


def test_a_late_end_is_refused(app: Conveyor, site: Any) -> None:
    """When a lease has ended and another consumer has the message, the end of the first one changes nothing."""
    queue = app.queue("orders", lease="1s")
    queue.push({"n": 1})
    [late] = pull(site, lease="1s")
    deadline = time.monotonic() + 60
    while not (messages := pull(site, wait=2)):
        assert time.monotonic() < deadline
    assert [one["attempt"] for one in messages] == [2]
    assert settle(site, "ack", late) == ["lost"]
    assert settle(site, "nack", late) == ["lost"]
    assert queue.stats().leased == 1
    assert settle(site, "ack", messages[0]) == ["done"]


def test_of_two_ends_at_once_one_is_carried_out(app: Conveyor) -> None:
    """Two instances that get the two ends of a message at the same time answer "lost" to one of them."""
    queue = app.queue("orders")

    async def race(receipt: Receipt) -> list[str]:
        from conveyor.messaging import receipts

        with Conveyor(app.client.address.url) as other:
            found = await asyncio.gather(
                receipts.acknowledge(queue, receipt), receipts.refuse(other.queue("orders"), receipt, 3_600_000)
            )
            await other.aclose()
        await app.aclose()
        return list(found)

    site = dashboard(app, tokens=TOKENS)
    for _ in range(5):
        queue.push({"n": 1})
        [message] = pull(site)
        found = asyncio.run(race(read_receipt(message["receipt"])))
        assert sorted(found) in (["done", "lost"], ["lost", "retried"])
        assert queue.purge() == found.count("retried")
    assert queue.stats().leased == 0


def test_limits_groups_and_partitions(app: Conveyor, site: Any) -> None:
    """A settled message gives back the place of its limit and its group, and a message of a partition is settled in it."""
    app.queue("orders", limits=[Concurrency(1)]).push_many([1, 2])
    [first] = pull(site, max=5)
    assert pull(site, max=5) == []
    assert settle(site, "ack", first) == ["done"]
    [second] = pull(site, max=5)
    assert settle(site, "ack", second) == ["done"]

    with Conveyor(app.client.address.url, namespace="other") as other:  # the fixture drains queues of one piece
        consume_partitions(other)


def consume_partitions(app: Conveyor) -> None:
    site, spread = dashboard(app, tokens=TOKENS), app.queue("spread", partitions=2)
    spread.push_many([1, 2, 3, 4], group="g")
    spread.push_many([5, 6, 7, 8])
    found = []
    while messages := pull(site, "spread", max=3):
        found += [one["body"] for one in messages]
        assert set(settle(site, "ack", *messages)) == {"done"}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [one for one in found if one < 5] == [1, 2, 3, 4]


class Caller:
    """A client of the dashboard's ASGI application, that can go away while it waits."""

    def __init__(self, site: Any, inputs: dict[str, Any]) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.sends: Callable[[], Any] | None = None
        self._body: list[Any] = [{"type": "http.request", "body": json.dumps(inputs).encode(), "more_body": False}]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/api/v1/pull",
            "raw_path": b"/api/v1/pull", "query_string": b"", "root_path": "", "scheme": "http", "client": ("here", 1),
            "server": ("here", 80),
            "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer secret"), (b"host", b"here")],
        }  # fmt: skip
        self.call = asyncio.ensure_future(site(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.sends is not None:
            await self.sends()
        self.sent.append(message)


def test_a_pull_waits_and_ends_with_its_client(app: Conveyor, site: Any) -> None:
    """A pull waits for a message without a thread; that of a client that has gone away takes none, and gives back what it had."""
    import threading

    queue, first = app.queue("orders"), list[dict[str, Any]]()

    async def run() -> None:
        threads = threading.active_count()
        waiting = [Caller(site, {"queue": "orders", "wait": 20}) for _ in range(30)]
        await auntil(lambda: site.service.waiting_pulls == 30)
        assert threading.active_count() <= threads + 1
        for one in waiting[1:]:
            one.gone.set()
        await asyncio.wait_for(asyncio.gather(*(one.call for one in waiting[1:])), 60)
        # A call waits for its leaving only for a while, so on a busy machine one may end before the pull does.
        await auntil(lambda: site.service.waiting_pulls == 1)
        await queue.apush({"n": 1})
        await asyncio.wait_for(waiting[0].call, 60)
        first.extend(json.loads(waiting[0].sent[1]["body"])["messages"])
        assert [one["body"] for one in first] == [{"n": 1}]
        leaver = Caller(site, {"queue": "orders", "max": 5})
        leaver.gone.set()
        await queue.apush({"n": 2})
        await asyncio.wait_for(leaver.call, 60)
        await auntil(lambda: site.service.waiting_pulls == 0)
        stats = await queue.astats()
        assert (stats.leased, stats.ready) == (1, 1)
        await app.aclose()

    asyncio.run(run())
    [second] = pull(site)
    assert (second["body"], second["attempt"]) == ({"n": 2}, 1)
    assert settle(site, "ack", first[0], second) == ["done", "done"]


async def handed_back(queue: Queue[Any]) -> None:
    """Wait until nothing is leased: the lease is too long to end meanwhile. The message is as it was before it was pulled."""
    deadline = time.monotonic() + 60
    while (stats := await queue.astats()).leased or stats.workers:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert (stats.ready, stats.scheduled, stats.dead) == (1, 0, 0)


@pytest.mark.row("D501")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("inputs", [{}, {"lease": "1h"}])
def test_a_pull_that_the_server_cancels_hands_back(
    app: Conveyor, site: Any, times: int, inputs: dict[str, Any]
) -> None:
    """A pull that its server cancels at any pass of the loop, once or twice in a row, leaves its message as it was."""
    queue, messages = app.queue("orders", lease="1h"), list[dict[str, Any]]()
    queue.push({"n": 1})

    async def run() -> None:
        passes, struck = 0, 0
        while True:
            caller = Caller(site, {"queue": "orders", **inputs})
            for _ in range(passes):
                await asyncio.sleep(0)
            if caller.call.done():
                break
            for _ in range(times):
                caller.call.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([caller.call])
            if caller.call.cancelled():
                await handed_back(queue)
                struck += 1
            else:
                break
            passes += 1 if passes < 20 else passes // 8
        assert struck > 5
        await app.aclose()
        messages.extend(json.loads(caller.sent[1]["body"])["messages"])

    asyncio.run(run())
    assert site.service.waiting_pulls == 0
    assert [message["attempt"] for message in messages] == [1]
    assert settle(site, "ack", *messages) == ["done"]


@pytest.mark.row("D501")
def test_a_service_ends_behind_what_it_hands_back(app: Conveyor, site: Any) -> None:
    """A server cancels its calls and ends its process when the service has stopped: what was pulled is back by then."""
    queue = app.queue("orders", lease="1h")
    queue.push({"n": 1})
    answered: list[dict[str, Any]] = []

    async def run() -> None:
        for passes in range(0, 90, 3):
            caller = Caller(site, {"queue": "orders", "lease": "2h"})
            for _ in range(passes):
                await asyncio.sleep(0)
            caller.call.cancel()
            await asyncio.sleep(0)
            await site.service.stop()
            assert site.service.waiting_pulls == 0
            if body := b"".join(part.get("body", b"") for part in caller.sent):
                answered.extend(json.loads(body)["messages"])
                break
            stats = await queue.astats()
            assert (stats.leased, stats.ready) == (0, 1)
        await app.aclose()

    asyncio.run(run())
    assert not answered or settle(site, "ack", *answered) == ["done"]
    queue.purge()


@pytest.mark.row("D501")
@pytest.mark.parametrize("way", ["cancelled", "failed"])
def test_an_answer_that_is_not_sent_hands_back(app: Conveyor, site: Any, way: str) -> None:
    """Where the server is cancelled, or fails, as it sends the answer to a pull, the messages are handed back."""
    queue = app.queue("orders", lease="1h")
    queue.push({"n": 1})

    async def run() -> None:
        caller = Caller(site, {"queue": "orders"})

        async def fail() -> None:
            if way == "failed":
                raise OSError("the client has gone away")
            caller.call.cancel()
            await asyncio.sleep(60)

        caller.sends = fail
        with pytest.raises((OSError, asyncio.CancelledError)):
            await caller.call
        await handed_back(queue)
        await app.aclose()

    asyncio.run(run())
    [message] = pull(site)
    assert (message["attempt"], settle(site, "ack", message)) == (1, ["done"])


@pytest.mark.parametrize(
    ("path", "inputs"),
    [
        ("pull", {}), ("pull", {"queue": "a b"}), ("pull", {"queue": "orders", "lease": "1ms"}), ("pull", {"queue": "orders", "lease": "1d"}),
        ("pull", {"queue": "orders", "max": "x"}), ("pull", {"queue": "mail"}), ("pull", {"queue": "plain"}),
        ("messages/ack", {"receipts": ["x"]}), ("messages/ack", {"receipts": ["WyJhIiwiYiIsImMiXQ", "é"]}), ("messages/ack", {"receipts": [5]}),
        ("messages/ack", {"receipts": ["W10"]}), ("messages/nack", {"receipts": [str(Receipt("a/x", "b", "c"))]}),
        ("messages/extend", {"receipts": []}), ("messages/extend", {"receipts": [], "lease": "soon"}),
        ("messages/nack", {"receipts": [], "delay": "-1s"}), ("messages/ack", {"receipts": [str(Receipt("orders/7", "b", "c"))]}),
        ("messages/ack", {"receipts": ["x"] * 101}), ("messages/ack", {"receipts": [str(Receipt("{}", "b\n", "c"))]}),
    ],
)  # fmt: skip
def test_bad_input(app: Conveyor, site: Any, path: str, inputs: dict[str, Any]) -> None:
    """A value that cannot be a queue, a receipt or a duration is refused, and nothing is settled."""
    app.queue("orders")
    app.plain_list("plain")

    @app.task(queue="mail")
    def send() -> None: ...

    answer = ask(site, "POST", path, inputs, {"authorization": "Bearer secret"})
    assert answer.status_code == 422, answer.text
    unknown = {"receipts": [str(Receipt("orders", "nobody", "none"))]}
    assert call(site, "messages/ack", **unknown)["results"][0]["outcome"] == "lost"
    assert call(site, "pull", queue="orders", max=10**30, wait=-5)["messages"] == []


@pytest.mark.leaves_keys("the dashboard is killed")
def test_the_commands_of_the_guide(url: str, tmp_path: Path) -> None:
    """The commands of the guide run as they are printed, at another port, and end with a message that is done."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    text = (ROOT / "docs/guides/dashboard.md").read_text()
    script = text.partition("### Consume messages")[2].partition("```sh\n")[2].partition("```")[0]
    port = free_port()
    script = "set -m\n" + script.replace(":7070", f":{port}").replace("shop:app", f"shop:app --port {port}")
    (tmp_path / "shop.py").write_text("from conveyor import Conveyor\napp = Conveyor()\norders = app.queue('orders')\n")
    with Conveyor(url) as app:
        app.queue("orders").push({"n": 1})
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env={**kept, "CONVEYOR_URL": url, "PATH": path}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert '"outcome":"extended"' in done.stdout, done
        assert '"outcome":"done"' in done.stdout, done
        assert app.queue("orders").stats().leased == 0
