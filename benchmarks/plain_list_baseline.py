"""Baselines on plain Redis lists: as a tutorial writes them, and as fast as they can be made."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import msgspec
import redis.asyncio

from benchmarks.harness import TEXT, Bench, percentile, rates

LIST = "raw"
_STOP = b"stop"

# Another process that pushes one document each 20 ms, which says when it was pushed.
_PUSHER = """
import json, sys, time, redis
client, count = redis.Redis.from_url(sys.argv[1]), int(sys.argv[2])
client.ping()
begin = time.monotonic() + 0.2
for number in range(count):
    time.sleep(max(0, begin + number * 0.02 - time.monotonic()))
    client.rpush("raw", json.dumps({"id": number, "sent": time.monotonic_ns()}))
"""

# The same with an awaited RPUSH.
_ASYNC_PUSHER = """
import asyncio, json, sys, time, redis.asyncio

async def main():
    client, count = redis.asyncio.Redis.from_url(sys.argv[1]), int(sys.argv[2])
    await client.ping()
    begin = time.monotonic() + 0.2
    for number in range(count):
        await asyncio.sleep(max(0, begin + number * 0.02 - time.monotonic()))
        await client.rpush("raw", json.dumps({"id": number, "sent": time.monotonic_ns()}))
    await client.aclose()

asyncio.run(main())
"""

# Another process that answers each request.
_RESPONDER = """
import json, sys, redis
client = redis.Redis.from_url(sys.argv[1])
while (item := client.blpop("request", timeout=30)) and item[1] != b"stop":
    client.rpush("reply", json.dumps(json.loads(item[1])["id"]))
"""


def raw_list(bench: Bench) -> None:
    """Push one JSON document at a time with RPUSH, take one at a time with BLPOP."""
    bench.flush()
    count = bench.size(18_000)
    with bench.client() as client:
        bench.note_rounds("raw-list push /s", rates(lambda n: _push_each(client, n), count))
        bench.note_rounds("raw-list pop /s", rates(lambda n: _pop_each(client, n), count))
    bench.flush()


def _push_each(client: Any, count: int) -> None:
    for number in range(count):
        client.rpush(LIST, json.dumps({"id": number, "text": TEXT}))


def _pop_each(client: Any, count: int) -> None:
    for _ in range(count):
        item = client.blpop([LIST], timeout=5)
        assert json.loads(item[1])["text"] == TEXT


def raw_limit(bench: Bench) -> None:
    """Push 1,000 at a time, take 100 at a time with LPOP, encoded and decoded by msgspec."""
    bench.flush()
    count = bench.size(600_000) // 3000 * 3000
    with bench.client() as client:
        bench.note_rounds("raw-limit push /s", rates(lambda n: _push_batches(client, n), count))
        bench.note_rounds("raw-limit pop /s", rates(lambda n: _pop_batches(client, n), count))
    bench.flush()


def _push_batches(client: Any, count: int) -> None:
    encode = msgspec.json.Encoder().encode
    for begin in range(0, count, 1000):
        client.rpush(LIST, *[encode({"id": number, "text": TEXT}) for number in range(begin, begin + 1000)])


def _pop_batches(client: Any, count: int) -> None:
    decode = msgspec.json.Decoder().decode
    taken = 0
    while taken < count:
        documents = [decode(item) for item in client.lpop(LIST, 100)]
        taken += len(documents)


def raw_latency(bench: Bench) -> None:
    """Time from a push by another process to its BLPOP here, one each 20 ms; and a round trip over two lists."""
    bench.flush()
    count = bench.size(500)
    with bench.client() as client:
        pusher = subprocess.Popen([sys.executable, "-c", _PUSHER, bench.url, str(count)])
        delays = []
        for _ in range(count):
            item = client.blpop([LIST], timeout=10)
            delays.append((time.monotonic_ns() - json.loads(item[1])["sent"]) / 1e6)
        pusher.wait(10)
        bench.note("raw-list idle-to-start p50 ms", percentile(delays, 50))
        awaited = asyncio.run(_awaited_delays(bench, count))
        bench.note("raw-list awaited idle-to-start p50 ms", percentile(awaited, 50))
        bench.note("raw-list idle-to-start p99 ms", percentile(delays, 99))

        responder = subprocess.Popen([sys.executable, "-c", _RESPONDER, bench.url])
        awaited = asyncio.run(_awaited_trips(bench, count))
        bench.note("raw-list awaited round trip p50 ms", percentile(awaited, 50))
        trips = [_round_trip(client, number) for number in range(count + 20)][20:]  # the first wait for its start
        client.rpush("request", _STOP)
        responder.wait(10)
        bench.note("raw-list round trip p50 ms", percentile(trips, 50))
    bench.flush()


async def _awaited_delays(bench: Bench, count: int) -> list[float]:
    """Return the time from each awaited push by another process to its awaited BLPOP here, in ms."""
    client = redis.asyncio.Redis.from_url(bench.url)
    pusher = await asyncio.create_subprocess_exec(sys.executable, "-c", _ASYNC_PUSHER, bench.url, str(count))
    delays = []
    for _ in range(count):
        item = await client.blpop([LIST], timeout=10)
        assert item is not None
        delays.append((time.monotonic_ns() - json.loads(item[1])["sent"]) / 1e6)
    await pusher.wait()
    await client.aclose()
    return delays


async def _awaited_trips(bench: Bench, count: int) -> list[float]:
    """Return the time of each awaited request and reply over two lists, in ms."""
    client, trips = redis.asyncio.Redis.from_url(bench.url), []
    for number in range(count + 20):
        start = time.perf_counter()
        await client.rpush("request", json.dumps({"id": number, "text": TEXT}))
        item = await client.blpop(["reply"], timeout=10)
        assert item is not None
        assert json.loads(item[1]) == number
        trips.append((time.perf_counter() - start) * 1e3)
    await client.aclose()
    return trips[20:]  # the first wait for its start


def _round_trip(client: Any, number: int) -> float:
    start = time.perf_counter()
    client.rpush("request", json.dumps({"id": number, "text": TEXT}))
    item = client.blpop(["reply"], timeout=10)
    assert json.loads(item[1]) == number
    return (time.perf_counter() - start) * 1e3


def raw_memory(bench: Bench) -> None:
    """Bytes per document of 100 bytes in a plain list."""
    bench.flush()
    count = bench.size(100_000)
    with bench.client() as client:
        before = client.info("memory")["used_memory"]
        _push_batches(client, count // 1000 * 1000)
        after = client.info("memory")["used_memory"]
        bench.note("raw-list bytes per entry", (after - before) / (count // 1000 * 1000))
    bench.flush()
