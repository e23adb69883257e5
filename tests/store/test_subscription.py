"""The thread that reads a channel: what a message costs it, and a server that is silent, alive or not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from conveyor.store.client import subscription
from conveyor.store.client.client import Client
from conveyor.store.client.subscription import Subscription
from support.waiting import until
from testbed.server_process import Server

CHANNEL = "c:replies:x"


@contextmanager
def subscribed(url: str, ping_after: float | None = 60.0) -> Iterator[tuple[Subscription, list[bytes], list[bool]]]:
    """Yield a subscription, the messages that it has read, and an entry for each time that it subscribed."""
    messages, times = list[bytes](), list[bool]()
    endpoint = Client(url, namespace="c").endpoint("")
    one = Subscription(
        endpoint, CHANNEL, on_message=messages.append, on_subscribed=lambda: times.append(True), ping_after=ping_after
    )
    try:
        until(lambda: times)
        yield one, messages, times
    finally:
        one.close()


def test_a_message_costs_few_calls(url: str, redis: Any) -> None:
    """A message costs the thread one call of Python beside what it is read for."""
    calls = list[str]()

    def count(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        ours = event == "call" and code.co_filename == subscription.__file__  # a socket of TLS has calls of its own
        if ours and threading.current_thread().name == "conveyor-replies":
            calls.append(code.co_qualname)

    threading.setprofile(count)
    try:
        with subscribed(url) as (_, messages, _):
            redis.publish(CHANNEL, "first")
            until(lambda: messages == [b"first"])
            until(lambda: calls[-1:] == ["Subscription._next"])  # it waits again
            before = len(calls)
            redis.publish(CHANNEL, "second")
            until(lambda: messages == [b"first", b"second"])
            until(lambda: len(calls) > before)
            assert calls[before:] == ["Subscription._next"]
    finally:
        threading.setprofile(None)


@pytest.mark.standalone_only("reads the counters of one server")
def test_a_quiet_channel_is_kept(url: str, redis: Any) -> None:
    """A server that answers PING is alive: the channel stays subscribed, and its messages come."""
    with subscribed(url, ping_after=0.02) as (_, messages, times):
        until(lambda: redis.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) > 3)
        redis.publish(CHANNEL, "x")
        until(lambda: messages == [b"x"])
        assert len(times) == 1


def test_a_frozen_server_is_noticed(start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer PING ends the connection, and another one is opened when it is back."""
    monkeypatch.setattr(subscription, "PONG_WITHIN", 0.5)
    server = start_server()
    with subscribed(server.url, ping_after=0.02) as (one, messages, times):
        os.kill(server.pid, signal.SIGSTOP)
        try:
            until(lambda: not one.ready.is_set())
        finally:
            os.kill(server.pid, signal.SIGCONT)
        until(lambda: len(times) > 1 and one.ready.is_set())
        with server.client() as client:
            until(lambda: client.publish(CHANNEL, "x") and messages)
