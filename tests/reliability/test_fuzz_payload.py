"""Random bytes in Redis give typed errors and dead letters with their bytes, and end no worker."""

from __future__ import annotations

import random
import time
import tracemalloc
import zlib
from collections import Counter
from functools import partial
from typing import Any

import pytest

from conveyor import FileStore
from conveyor.errors import PayloadError
from conveyor.ids import new_ids
from conveyor.jobs.app import Conveyor
from conveyor.payload.codec import ValueCodec
from conveyor.payload.pipeline import PLAIN, PayloadPipeline, make_pipeline
from conveyor.payload.records import AttemptHistory, read_leniently, read_outcome, write_envelope
from conveyor.payload.sealed_records import RecordDecoder, open_failure, pack_failure
from conveyor.payload.signature import TaskSignature
from conveyor.payload.wrapped import describe
from support.running_worker import audit, counts, drain, until_counts, working

PLACE = {"queue": "q", "task": "shop.add", "id": "an id"}
KEYS = {"2026-11": "f" * 32}


def sealing(tmp_path: Any, **options: Any) -> PayloadPipeline:
    defaults: dict[str, Any] = {"keys": None, "encrypt": False, "compress": None, "large": None}
    limits = {"large_above": 300, "max_large": "2MiB", "max_payload": 512 * 1024}
    made = make_pipeline(**defaults | limits | options)
    assert made is not None
    return made


def mutated(source: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return *data* damaged in one to four places."""
    found = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at, kind = source.randrange(len(found) + 1), source.randrange(7)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << source.randrange(8)
        elif kind == 1:
            found[at:at] = source.randbytes(source.randint(1, 8))
        elif kind == 2:
            del found[at : at + source.randint(1, 16)]
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            found[at:at] = source.choice(
                [b"[" * 80, b'{"a":' * 80, b"9" * 5000, b"NaN", b'"\\ud800"', b"\xed\xa0\x80", b"1e999", b"\x00"]
            )
        elif kind == 5:
            found[at:] = source.choice(others)[at:]
        else:
            found[at:at] = found[: source.randint(0, 64)]
    return bytes(found)


def add(a: int, b: list[dict[str, float]] | None = None, *rest: str, **more: int) -> None: ...


@pytest.mark.row("D5")
def test_damaged_bytes_give_typed_errors(tmp_path, rounds):
    """Mutations of everything that is stored are read, or refused with a PayloadError, in a bounded time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    signature = TaskSignature(add, "shop.add")
    body = signature.encode((1, [{"x": 1.5}] * 30, "word"), {"more": 2})
    store = FileStore(tmp_path)
    ways = [
        PLAIN, sealing(tmp_path, keys=KEYS), sealing(tmp_path, keys=KEYS, encrypt=True), sealing(tmp_path, compress=10),
        sealing(tmp_path, large=store), sealing(tmp_path, keys=KEYS, encrypt=True, compress=10, large=store, large_above=30),
    ]  # fmt: skip
    bodies = [way.wrap(body, **PLACE) for way in ways]
    outcome = b'{"status":"done","value":{"a":[1,2.5]},"failure":{"attempt":1,"at":2,"type":"x","message":"y"}}'
    state = b'1 1 0\n{"attempt":1,"at":2,"type":"x","message":"y","packed":"AQEB"}'
    values: list[ValueCodec[Any]] = [ValueCodec(Any), ValueCodec(dict[str, int]), ValueCodec(float)]
    ends: Counter[str] = Counter()
    slowest = 0.0

    def attempt(call: Any, *args: Any, **options: Any) -> Any:
        nonlocal slowest
        start = time.thread_time()
        try:
            return call(*args, **options)
        except PayloadError as error:
            ends[error.code] += 1
        finally:
            slowest = max(slowest, time.thread_time() - start)

    for _ in range(rounds(1_000_000, 20_000) // 10):
        number = source.randrange(len(bodies))
        data = mutated(source, bodies[number], bodies)
        for way in (ways[number], source.choice(ways)):
            opened = attempt(way.unwrap, data, **PLACE)
            assert opened is None or way.sealer is None or opened == body, "a changed body was taken for genuine"
            attempt(partial(RecordDecoder(way).preview, call=True), data, "q", "shop.add", "an id")
        attempt(describe, data)
        damaged = mutated(source, body, bodies)
        attempt(signature.decode, damaged)
        attempt(source.choice(values).decode, damaged)
        attempt(read_outcome, mutated(source, outcome, [body]))
        _, known, _ = read_leniently(
            mutated(source, write_envelope("shop.add", body), bodies), mutated(source, state, [body])
        )
        for failure in known.failures_list():
            attempt(open_failure, ways[1], failure, "q", "an id")
    print(ends, f"slowest {slowest * 1000:.1f} ms")
    assert {"E15", "E38", "E40", "E41"} <= ends.keys()
    assert slowest < 2.0  # of processor time; typically below 1 ms


@pytest.mark.row("D4", "D5")
def test_bombs_do_not_grow(tmp_path):
    """A body that claims to be a gigabyte is refused before it is inflated: a compressed one, and a reference."""
    bomb = b"\x01\x01\x00\x01" + zlib.compress(b" " * (1 << 28), 1)
    keyed = sealing(tmp_path, keys=KEYS, large=FileStore(tmp_path))
    assert keyed.sealer is not None
    claim = b'{"name":"%b","size":%d,"sha256":"00"}' % (b"ab" * 16, 1 << 30)
    reference = keyed.sealer.seal(claim, 2, b"payload", "q", "shop.add", "an id")
    tracemalloc.start()
    for way, data in ((PLAIN, bomb), (keyed, reference)):
        with pytest.raises(PayloadError) as caught:
            way.unwrap(data, **PLACE, limit=1 << 20)
        assert caught.value.code == "E21"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def names_another_task(data: bytes, app: Conveyor) -> bool:
    """Tell whether an envelope is whole and names a task that *app* does not have: such a job waits for its worker."""
    envelope, _, damage = read_leniently(data, None)
    return not damage and envelope.task not in app.tasks


@pytest.mark.row("D1")
@pytest.mark.parametrize("keys", [None, KEYS], ids=["bare", "sealed"])
async def test_random_bodies_are_set_aside(url, redis, rounds, keys):
    """
    Random bytes in the place of a body, or of a whole envelope, become dead letters with their bytes; workers go on.

    Those that happen to name a task nobody knows wait for a worker that has it, and are kept as well.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source, count = random.Random(seed), rounds(10_000, 300)
    async with Conveyor(url, keys=keys) as app:

        @app.task(name="add")
        async def add(a: int) -> int:
            return a

        @app.task(name="wait", ack="early")
        async def wait(a: int) -> int:
            return a

        await (await add.aenqueue(1)).astatus()
        held = app.client.keys("default")
        written: dict[str, bytes] = {}
        for number, id_ in enumerate(new_ids(count)):
            noise = source.randbytes(source.randint(0, 200))
            head = (b"\nadd\n", b"\nadd\n{", b"\nadd\n\x01\x01", b"\nadd\t{", b"\nwait\n", b"\n", b"")[number % 7]
            if not head:  # what a stub begins with means something, and so do marks
                noise = b"\n" + noise
            written[id_] = head + noise
        for id_, data in written.items():
            redis.hset(held.jobs, id_, data)
            redis.rpush(held.ready[0], id_)
        waiting = {id_ for id_, data in written.items() if names_another_task(data, app)}
        good = await add.aenqueue(2)
        async with working(app) as worker:
            assert await good.aresult("60s") == 2
            await until_counts(app, lambda now: now.dead >= count - len(waiting))
            assert not worker.lifecycle.stopped
        left = await counts(app)
        stored = redis.hgetall(held.jobs)
        assert {id_: stored[id_.encode()] for id_ in written} == written
        # Some are put off, and some of these were due again when the worker stopped.
        assert (left.scheduled + left.ready, left.leased) == (len(waiting), 0)
        assert left.dead == count - len(waiting)
        assert {id_.decode() for id_ in redis.zrange(held.dead, 0, -1)} == written.keys() - waiting
        assert left.dead > count // 2
        assert await audit(app) == []
        letters = {letter.id.split(":")[1]: letter async for letter in app.queue("default").adead_letters()}
        assert {letter.attempts for letter in letters.values()} == {1}, next(
            one for one in letters.values() if one.attempts != 1
        )
        assert await app.queue("default").aredrive() == left.dead
        stored = redis.hgetall(held.jobs)
        assert {id_: stored[id_.encode()] for id_ in written} == written
        await drain(app)
        assert (await counts(app)).dead == left.dead
        await app.queue("default").apurge()
        await app.queue("default").apurge(dead=True)


def test_sealed_errors_survive_damage(tmp_path):
    """An error whose seal does not match is shown as such, without its texts."""
    way = sealing(tmp_path, keys=KEYS, encrypt=True)
    from conveyor.payload.records import Failure

    failure = Failure(1, 2, "ValueError", "secret words", traceback="Traceback: secret")
    packed = pack_failure(way, failure, "q", "an id")
    assert "secret" not in str(packed)
    assert open_failure(way, packed, "q", "an id") == failure
    shown = open_failure(way, packed, "q", "another id")
    assert "E40" in shown.message
    assert shown.traceback == ""
    assert AttemptHistory(errors=[b"{"]).failures_list()[0].type == "unreadable"


@pytest.mark.row("D4")
def test_huge_values_are_refused_where_they_are_made():
    """A value far above the limit is refused before anything is sent, at the cost of its own JSON."""
    text = "x" * (32 << 20)
    signature, codec = TaskSignature(add, "shop.add"), ValueCodec(Any)
    tracemalloc.start()
    for encode in (lambda: signature.encode((1, None, text), {}), lambda: codec.encode(text)):
        with pytest.raises(PayloadError) as caught:
            encode()
        assert caught.value.code == "E21"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * len(text)
