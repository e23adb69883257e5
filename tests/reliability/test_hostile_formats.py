"""Hostile bytes in other formats than JSON: typed errors in bounded time, dead letters, and no worker that ends."""

from __future__ import annotations

import random
import time
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from conveyor.errors import PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.task import definition_of
from conveyor.payload.formats import MSGPACK, FormatCodec, FormatRegistry, codec_for
from conveyor.payload.signature import TaskSignature
from conveyor.worker.attempt import Handler
from conveyor.worker.worker import Worker
from support.custom_formats import Packed, Point, declare
from support.running_worker import drain


@pytest.mark.parametrize(
    ("value", "code"),
    [(10**30, "E04"), ("\ud800", "E04"), (object(), "E04"), ({1, 2}, "E03"), (Decimal(1), "E03"),
     (datetime(2026, 1, 1, tzinfo=UTC), "E03"), ("x" * 2000, "E21")],
)  # fmt: skip
def test_what_would_arrive_changed_is_refused(value, code):
    """The rule of JSON holds: a value without annotation that would come back changed is refused where it is made."""
    codec = codec_for(Any, formats=FormatRegistry(MSGPACK), max_payload=1000, what="it")
    with pytest.raises(PayloadError) as caught:
        codec.encode(value)
    assert caught.value.code == code
    for good in (b"\xff", {1: 2, "a": b""}, [1.5, None, True], float("inf"), -(2**63), 2**64 - 1):
        assert codec.decode(codec.encode(good)) == good
    [back] = codec.decode(codec.encode([float("nan")]))
    assert back != back


@pytest.mark.row("D5")
def test_depth_and_bombs_are_bounded():
    """64 levels are taken and 65 are not, whichever way they are nested; lengths that lie and extensions are refused."""
    codec: FormatCodec[Any] = codec_for(Any, formats=FormatRegistry(MSGPACK), max_payload=1 << 20, what="it")
    deep: Any = 1
    for level in range(64):
        deep = [deep] if level % 2 else {"a": deep}
    assert codec.decode(codec.encode(deep)) == deep
    with pytest.raises(PayloadError) as caught:
        codec.encode([deep])
    assert caught.value.code == "E22"
    wide = [[[]] * 10 for _ in range(1000)]
    assert codec.decode(codec.encode(wide)) == wide
    mark = b"\x02\x07msgpack"
    bombs = {
        b"\x91" * 65 + b"\x01": "E22", b"\x91" * 100_000: "E22", b"\x81\xa1a" * 90 + b"\x01": "E22",
        b"\xdd\xff\xff\xff\xff": "E15", b"\xdf\xff\xff\xff\xff": "E15", b"\xc6\xff\xff\xff\xff": "E15",
        b"\xc7\x03\x05abc": "E15", b"\xc1": "E15", b"\x01\x02": "E15", b"": "E15", b"\xa1\xff": "E15",
    }  # fmt: skip
    for data, code in bombs.items():
        with pytest.raises(PayloadError) as caught:
            codec.decode(mark + data)
        assert caught.value.code == code, data[:20]
    for damaged in (b"\x02", b"\x02\x00", b"\x02\xff", b"\x02\x07msgpac", b"\x02\x02\xff\xff1", b"\x02\x04json1"):
        with pytest.raises(PayloadError) as caught:
            codec.decode(damaged)
        assert caught.value.code == ("E50" if b"json" in damaged else "E15")
    with pytest.raises(PayloadError) as caught:
        codec.decode(mark + b"\xc6\x00\x20\x00\x00" + bytes(2 << 20))
    assert caught.value.code == "E21"


def add(a: int, b: list[dict[str, float]] | None = None, *rest: bytes, **more: int) -> None: ...


@pytest.mark.row("D5")
def test_damaged_msgpack_gives_typed_errors(rounds):
    """Mutations of calls and values, in MessagePack and in a format of one's own, are read or refused, in bounded time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    formats = FormatRegistry().with_writer(Packed())  # known to the others too
    packed = FormatRegistry(MSGPACK, formats.known)
    signatures = [TaskSignature(add, "add", formats=packed), TaskSignature(move, "move", formats=formats)]
    values: list[FormatCodec[Any]] = [
        codec_for(type_, formats=packed, max_payload=1 << 16, what="it") for type_ in (Any, dict[int, bytes], Point)
    ]
    bodies = [
        signatures[0].encode((1, [{"x": 1.5}] * 5, b"\xff"), {"more": 2}),
        signatures[1].encode((Point(1, 2),), {}),
        *(codec.encode(one) for codec, one in zip(values, ([{1: b"x"}], {1: b"\xff"}, Point(1, 2)), strict=True)),
    ]
    ends: Counter[str] = Counter()
    slowest = 0.0
    for _ in range(rounds(200_000, 5_000)):
        data = bytearray(source.choice(bodies))
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(data) + 1)
            kind = source.randrange(5)
            if kind == 0 and data:
                data[at % len(data)] = source.randrange(256)
            elif kind == 1:
                data[at:at] = source.randbytes(source.randint(1, 8))
            elif kind == 2:
                del data[at : at + source.randint(1, 8)]
            elif kind == 3:
                data[at:at] = source.choice(
                    [b"\x91" * 80, b"\xdd\xff\xff\xff\xff", b"\xc7\x01\x05a", b"\xd6\xff\0\0\0\1"]
                )
            else:
                data[at:] = source.choice(bodies)[at:]
        for reader in (*signatures, *values):
            start = time.thread_time()
            try:
                reader.decode(bytes(data))
                ends["read"] += 1
            except PayloadError as error:
                ends[error.code] += 1
            slowest = max(slowest, time.thread_time() - start)
    print(ends, f"slowest {slowest * 1000:.1f} ms")
    assert {"read", "E15", "E22", "E50"} <= ends.keys()
    assert slowest < 2.0


def move(point: Point, by: Point = Point(1, 1)) -> Point:  # noqa: B008
    raise NotImplementedError


@pytest.mark.row("D1")
async def test_damaged_msgpack_is_set_aside(url, redis):
    """Damage in the place of a call makes a dead letter with its bytes; the worker goes on."""
    app = Conveyor(url, format="msgpack")
    declare(app)
    jobs = [await app.tasks["move"].aenqueue(Point(n, n)) for n in range(20)]
    held = app.client.keys("default")
    written = {}
    for n, job in enumerate(jobs):
        id_ = job.id.split(":")[1]
        data = redis.hget(held.jobs, id_)
        written[id_.encode()] = data[: len(data) - 1 - n] if n % 2 else data[:-1] + b"\xc1"
    redis.hset(held.jobs, mapping=written)
    good = await app.tasks["move"].aenqueue(Point(0, 0))
    await drain(app)
    assert await good.aresult("60s") == Point(1, 1)
    assert redis.hgetall(held.jobs) == written
    letters = [letter async for letter in app.queue("default").adead_letters()]
    assert {letter.attempts for letter in letters} == {1}
    assert len(letters) == 20
    await app.queue("default").apurge(dead=True)
    await app.aclose()


def test_ordinary_jobs_take_the_short_way():
    """With other formats known, a JSON job is still looked up by its first bytes, and a marked one misses that table."""
    app = Conveyor(format=["json", "msgpack"])
    declare(app)
    worker = Worker(app)
    task = app.tasks["move"]
    other = Conveyor(format="msgpack")
    declare(other)
    table = worker.loader.plain_handlers("default", {task.name: Handler(definition_of(task))}, foreign=False)
    for home, short in ((app, True), (other, False)):
        body = definition_of(home.tasks["move"]).signature.encode((Point(1, 2),), {})
        assert ((definition_of(task).head + body)[: len(definition_of(task).head) + 1] in table) is short
