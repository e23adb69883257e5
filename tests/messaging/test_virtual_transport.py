"""The example of a transport on public names: what a messaging library does with its channels."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from conveyor import Conveyor
from support.waiting import until, until_ended

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "virtual_transport.py"
PAGE = ROOT / "docs" / "guides" / "building-on-conveyor.md"
QUEUES = ("mail", "images", "reports")


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("virtual_transport", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def channels(url: str, redis: Redis[bytes]) -> Iterator[Any]:
    """Make channels of one app; when the test is over their queues are deleted and nothing of them is left."""
    app = Conveyor(url, lease="2s")
    made: list[Any] = []

    def make() -> Any:
        made.append(_module().Channel(app))
        return made[-1]

    yield make
    for channel in made:
        channel.close()
    for queue in QUEUES:
        made[0].queue_delete(queue)
    assert [key for key in redis.keys("conveyor:*") if redis.ttl(key) == -1] == []
    app.close()


def test_publish_get_and_acknowledge(channels: Any) -> None:
    """A published message is received once, by priority and in order; a tag is acknowledged once."""
    channel = channels()
    for number in range(3):
        channel.basic_publish({"n": number}, "mail", headers={"h": "1"})
    channel.basic_publish({"n": "first"}, "mail", priority=9)
    bodies = []
    while received := channel.basic_get("mail"):
        tag, body = received
        bodies.append(body["n"])
        channel.basic_ack(tag)
        with pytest.raises(KeyError):
            channel.basic_ack(tag)
    assert bodies == ["first", 0, 1, 2]
    assert channel.queue_size("mail") == 0


@pytest.mark.usefixtures("only_when_woken")
def test_consume_from_several_queues(channels: Any) -> None:
    """Callbacks of several queues get their messages; a channel that waits is woken for each; it ends in time without one."""
    channel, other, seen = channels(), channels(), []

    def receive(tag: int, body: Any) -> None:
        seen.append(body)
        channel.basic_ack(tag)

    for queue in QUEUES:
        channel.basic_consume(queue, receive)
    for queue in (*QUEUES, *QUEUES):
        count = len(seen)
        thread = threading.Thread(target=channel.drain_events, args=(60,))
        thread.start()
        other.basic_publish(queue, queue)
        until_ended(thread)
        assert seen[count:] == [queue]
    channel.basic_cancel("mail")
    other.basic_publish("nobody consumes it", "mail")
    with pytest.raises(TimeoutError):
        channel.drain_events(timeout=0.1)
    assert channel.queue_size("mail") == 1


def test_reject(channels: Any) -> None:
    """A message that is requeued is the next one again, without an attempt; one that is not becomes a dead letter."""
    channel = channels()
    channel.basic_publish("a", "mail")
    channel.basic_publish("b", "mail")
    for _ in range(8):  # more than a queue has attempts
        tag, body = channel.basic_get("mail")
        assert body == "a"
        channel.basic_reject(tag, requeue=True)
    tag, _ = channel.basic_get("mail")
    channel.basic_reject(tag)
    assert channel.queue_size("mail") == 1
    assert [letter.error for letter in channel.app.queue("mail").dead_letters()] == ["dead: rejected"]


def test_what_is_held_is_kept_and_given_back(channels: Any) -> None:
    """Held and renewed, a message goes to nobody else; a channel that closes gives all back, in their order."""
    channel, other = channels(), channels()
    for number in range(4):
        channel.basic_publish(number, "images")
    held = [channel.basic_get("images") for _ in range(3)]
    channel.basic_ack(held[1][0])
    first = next(iter(channel.held.values()))
    ends = first.lease_ends
    until(lambda: first.lease_ends > ends + timedelta(milliseconds=50))  # renewed
    tag, body = other.basic_get("images")
    assert body == 3
    other.basic_ack(tag)
    assert other.basic_get("images") is None
    channel.close()
    received = [other.basic_get("images") for _ in range(2)]
    assert [body for _, body in received] == [0, 2]


def test_purge_and_delete(channels: Any, redis: Redis[bytes]) -> None:
    """A purge tells how many it removed; a queue that is deleted leaves nothing, and begins anew when it is used again."""
    channel = channels()
    for number in range(5):
        channel.basic_publish(number, "reports")
    assert (channel.queue_size("reports"), channel.queue_purge("reports"), channel.queue_size("reports")) == (5, 5, 0)
    channel.basic_publish("again", "reports")
    channel.queue_delete("reports")
    assert channel.queue_size("reports") == 0
    channel.basic_publish("anew", "reports")
    tag, body = channel.basic_get("reports")
    assert body == "anew"
    channel.basic_ack(tag)


def test_the_page_shows_the_example() -> None:
    """The page "building on Conveyor" prints the class as it is in the example, which has about sixty lines."""
    source = EXAMPLE.read_text("utf-8").partition("\n\n")[2].partition("\n\nif __name__")[0].strip()
    assert source in PAGE.read_text("utf-8")
    assert len(source.splitlines()) <= 70
