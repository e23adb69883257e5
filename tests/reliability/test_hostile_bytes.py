"""Hostile bytes in Redis, secrets in awkward places, and the views that people get of both."""

from __future__ import annotations

import asyncio
import base64
import enum
import itertools
import logging
import os
import stat
import traceback
import zlib
from typing import Any

import pytest
from redis import RedisError

from conveyor import FileStore
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, ConveyorError, PayloadError
from conveyor.ids import clean, new_id
from conveyor.jobs.app import Conveyor
from conveyor.payload.pipeline import PayloadPipeline, make_pipeline
from conveyor.payload.records import Failure, to_json
from conveyor.payload.sealed_records import open_failure
from conveyor.store.transport.topology import topology_of
from conveyor.worker.logs import SafeFormatter
from support.running_worker import drain, working
from support.server_dump import exact
from support.shell import Shell
from support.waiting import auntil

KEYS = {"2026-11": "f" * 32}
PASSWORD = "canary"
STEERING = "\x1b[2J\x9b2J"


def sealing(**options: Any) -> PayloadPipeline:
    defaults: dict[str, Any] = {"keys": KEYS, "encrypt": False, "compress": None, "large": None}
    made = make_pipeline(**defaults | {"large_above": 300, "max_large": "2MiB", "max_payload": 512 * 1024} | options)
    assert made is not None
    return made


# -- seals ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("D1")
@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
def test_sealed_bytes_open_only_where_they_were_sealed(encrypt):
    """Of every two of 48 places (kind, queue, task and version, id) what is sealed for one does not open at the other."""
    way = sealing(encrypt=encrypt)
    places = list(
        itertools.product(
            (b"payload", b"result", b"error", b"blob"), ("mail", "mail2"), ("send", "send\t2", ""), ("a", "b")
        )
    )
    for kind, queue, task, id_ in places:
        data = way.wrap(b"{}", queue=queue, task=task, id=id_, kind=kind)
        opened = []
        for other in places:
            try:
                way.unwrap(data, queue=other[1], task=other[2], id=other[3], kind=other[0])
            except PayloadError as error:
                assert error.code == "E40"  # noqa: PT017
            else:
                opened.append(other)
        assert opened == [(kind, queue, task, id_)]


def test_no_record_asks_the_store():
    """Results and errors never lie in a store, so one that claims to is damaged, and nothing is fetched or raised for it."""

    class Silent:
        def put(self, name: str, data: bytes) -> None: ...

        def get(self, name: str, most: int) -> bytes | None:
            pytest.fail("the store was asked")

        def delete(self, name: str) -> None: ...

        def old(self, seconds: float) -> Any: ...

    way = sealing(keys=None, large=Silent())
    claim = b'\x01\x01\x00\x02{"name":"%b","size":3,"sha256":"00"}' % (b"ab" * 16)
    with pytest.raises(PayloadError, match="never lie in a store"):
        way.unwrap(claim, queue="q", task="", id="x", kind=b"result")
    packed = Failure(1, 2, "ValueError", "sealed", packed=base64.b64encode(claim).decode())
    assert "never lie in a store" in open_failure(way, packed, "q", "x").message


class Colour(enum.Enum):
    RED = "red"


class Shade(enum.Enum):
    RED = "red"
    VIOLET = "violet-canary"


@pytest.mark.row("D1")
@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
async def test_what_cannot_be_read_is_not_quoted(url, redis, encrypt):
    """Why a sealed payload does not fit may quote it (a value of no Enum, what an upcast says): sealed as well, told with the keys."""

    def upcast(version: int, held: Any) -> Any:
        raise ValueError(f"{held} will not do")

    async with Conveyor(url, keys=KEYS, encrypt=encrypt) as old, Conveyor(url, keys=KEYS, encrypt=encrypt) as new:

        @old.task(name="paint")
        async def paint(colour: Shade) -> None: ...

        @old.task(name="write")
        async def write(word: str) -> None: ...

        await paint.aenqueue(Shade.VIOLET)
        await write.aenqueue("letter-canary")
        await old.queue("shades", Shade).apush(Shade.VIOLET)
        await old.queue("letters", str).apush("letter-canary")

        @new.task(name="paint")
        async def paint_now(colour: Colour) -> None: ...

        @new.task(name="write", version=2, upcast=upcast)
        async def write_now(word: str) -> None: ...

        queues = [new.queue("shades", Colour), new.queue("letters", str, version=2, upcast=upcast)]
        await drain(new)
        for queue in queues:
            assert await queue.apull() == []
        letters = [one for queue in (new.queue("default"), *queues) async for one in queue.adead_letters()]
        assert len(letters) == 4
        assert all("canary" in letter.error for letter in letters), [letter.error for letter in letters]
        for key, value in exact(redis).items():
            if encrypt or ":jobs" not in str(key):
                assert "canary" not in str(value), key
        for queue in (new.queue("default"), *queues):
            await queue.apurge(dead=True)


async def test_what_was_not_opened_is_told_without_keys(url):
    """The reason why a seal does not match is no secret: it is shown without the keys, too."""
    async with Conveyor(url) as bare, Conveyor(url, keys=KEYS) as keyed:
        await bare.queue("mail").apush("x")
        assert await keyed.queue("mail").apull() == []
        [letter] = [one async for one in bare.queue("mail").adead_letters()]
        assert "E41" in letter.error
        await bare.queue("mail").apurge(dead=True)


@pytest.mark.row("D4")
async def test_old_versions_are_bounded_too(url, redis):
    """A payload past the limits is refused before it is decoded for an upcast."""
    called = []

    def upcast(version: int, held: Any) -> Any:
        called.append(version)
        return held

    async with Conveyor(url, max_payload=10_000) as app:

        @app.task(name="write", version=2, upcast=upcast)
        async def write(word: str) -> None: ...

        queue = app.queue("letters", version=2, upcast=upcast)
        await write.aenqueue("x")
        await queue.apush("x")
        for name, body in itertools.product(("default", "letters"), (b'{"word":"%b"}' % (b"x" * 20_000), b"[" * 9_000)):
            keys, id_ = app.client.keys(name), new_id()
            redis.hset(keys.jobs, id_, b"\n%b\n%b" % (b"write" if name == "default" else b"", body))
            redis.rpush(keys.ready[0], id_)
        await drain(app)
        [message] = await queue.apull(10)
        await message.aack()
        for one in (app.queue("default"), queue):
            found = [letter.error async for letter in one.adead_letters()]
            assert len(found) == 2
            assert sorted(
                words for error in found for words in ("20,011 bytes", "nested deeper than 64") if words in error
            ) == [
                "20,011 bytes",
                "nested deeper than 64",
            ]
            await one.apurge(dead=True)
    assert called == []


@pytest.mark.row("D4")
async def test_a_page_of_bombs_is_small(url, redis):
    """A list of jobs shows what a bomb is, and does not hold what it would become."""
    async with Conveyor(url, compress=10) as app:
        await app.queue("mail").apush("x" * 100_000)
        keys = app.client.keys("mail")
        for _ in range(50):
            id_ = new_id()
            redis.hset(keys.jobs, id_, b"\n\n\x01\x01\x00\x01" + zlib.compress(b" " * (8 << 20), 1))
            redis.rpush(keys.ready[0], id_)
        listed = await asyncio.to_thread(Admin(app.client).jobs, "mail", "ready", limit=100)
        assert len(listed) == 51
        assert sum(len(info.payload or "") for info in listed) < 200_000
        assert "compressed" in str(listed[-1].payload)
        assert "E21" in str(listed[-1].payload)
        assert listed[0].payload == f'"{"x" * 100_000}"'
        await app.queue("mail").apurge()


# -- the store ------------------------------------------------------------------------------------------------------


def test_file_store_is_private_and_outlives_a_power_cut(tmp_path, monkeypatch):
    """Files and folders are their owner's alone, and every new name is synced in the folder it stands in."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = FileStore(tmp_path / "srv" / "blobs")
    store.put("ab" * 16, b"x")
    file = store.directory / "ab" / ("ab" * 16)
    assert [stat.S_IMODE(place.stat().st_mode) for place in (store.directory, file.parent, file)] == [
        0o700,
        0o700,
        0o600,
    ]
    folders = {str(place) for place in (tmp_path, tmp_path / "srv", store.directory, file.parent)}
    assert folders <= synced
    assert any(name.startswith(str(file.parent / ".")) for name in synced), "the file itself"


# -- what people see ------------------------------------------------------------------------------------------------


AWKWARD = ["canary/x", "canary#x", "canary?x", "canary@x", "canary x", "canary:x", "x[canary]", "x℀canary", "x\ncanary"]
URLS = [
    "redis://ada:{}@127.0.0.1:1/0", "redis://:{}@127.0.0.1:1", "rediss://ada:{}@127.0.0.1:1", "unix://ada:{}@/tmp/none",
    "redis+sentinel://ada:{}@127.0.0.1:1,127.0.0.1:2/m", "redis+cluster://:{}@127.0.0.1:1", "http://ada:{}@h",
    "redis+sentinel://127.0.0.1:1/m?sentinel_password={}&db=0", "redis://127.0.0.1:1/0?db=x&password={}", "ada:{}@h:1",
    "redis:/ada:{}@h", "redis://h:1/0?password={}",
]  # fmt: skip


@pytest.mark.parametrize("word", AWKWARD)
def test_passwords_that_need_quoting_are_not_shown(word):
    """A password with a slash, a blank or a bracket in it, unquoted, is in no error and in no repr."""
    for form in URLS:
        url, shown = form.format(word), ""
        try:
            place = topology_of(url)
            shown = f"{place} {place!r} {vars(place).get('_hosts')} {vars(place).get('_server')}"
            connection = place.endpoint("x").open(read_timeout=1.0)
            connection.disconnect()
        except (ConveyorError, OSError, RedisError) as error:
            shown += f"{error} {error!r}" + "".join(traceback.format_exception(error))
        assert shown
        assert PASSWORD not in shown, form


def test_unquoted_password_is_told_how_to_write():
    """Where a password would be read as host and path, the error says what to do."""
    for form in URLS[:3] + URLS[4:6]:
        with pytest.raises(ConfigurationError, match=r"quote it: .*quote"):
            topology_of(form.format("x/y"))


def test_unverified_tls_is_warned_of(caplog):
    """Turning the check of certificates off is said once, without the password."""
    topology_of("rediss://ada:canary@h:1/0?ssl_cert_reqs=none")
    topology_of("rediss://ada:canary@h:1/0")
    [record] = caplog.records
    assert "ssl_cert_reqs=none" in record.getMessage()
    assert PASSWORD not in record.getMessage()


async def test_log_lines_cannot_be_forged(url, redis, caplog):
    """A task, an id and an error that hold line breaks and escapes are one line each that steers nothing."""
    caplog.set_level(logging.INFO)
    async with Conveyor(url) as app:

        @app.task(name="read")
        async def read(word: str) -> None:
            raise ValueError(word)

        await read.options(retry=1).aenqueue(f"{STEERING}\nERROR forged")
        keys = app.client.keys("default")
        hostile = f"own{STEERING}\nERROR forged"
        for task, id_ in ((f"no{STEERING}\rtask", new_id()), ("read", hostile)):
            redis.hset(keys.jobs, id_, f"\n{task}\n[".encode())
            redis.rpush(keys.ready[0], id_)
        async with working(app):
            await auntil(lambda: len([one for one in caplog.records if one.levelno >= logging.WARNING]) >= 3)
        messages = [record.getMessage() for record in caplog.records]
        assert any("E05" in one for one in messages)
        assert [one for one in messages if clean(one) != one] == []
        shown = [SafeFormatter().format(record) for record in caplog.records]
        assert any("Traceback" in one for one in shown)
        assert [one for one in shown if "\x1b" in one or "\x9b" in one or "\r" in one] == []
        await app.queue("default").apurge()
        await app.queue("default").apurge(dead=True)


@pytest.mark.long
@pytest.mark.leaves_keys("a queue's name that no client of ours would write")
def test_terminals_are_not_steered(url, redis, tmp_path):
    """Text from Redis reaches a terminal, or a document, with its control characters escaped."""
    shell = Shell(tmp_path, url)
    shell.write("jobs.py", JOBS)
    run = {"CONVEYOR_APP": "jobs:app"}
    shell.run("push", "mail", '"x"', "--header", f"h={STEERING}")
    name = f"bad{STEERING}"
    redis.sadd("conveyor:queues", name)
    prefix = f"conveyor:{{{name}}}:"
    id_ = new_id()
    redis.hset(prefix + "jobs", id_, f'\n{STEERING}\n"{STEERING}"')
    redis.rpush(prefix + "ready:0", id_)
    redis.hset(
        "conveyor:{mail}:state", id_, b"1 1 0\n" + to_json(Failure(1, 2, STEERING, STEERING, STEERING, STEERING))
    )
    redis.hset("conveyor:{mail}:jobs", id_, "\n\n1")
    redis.zadd("conveyor:{mail}:dead", {id_: 1})
    worker = shell.start("worker", "--processes", "1", **run)
    shown = []
    try:
        for command in (
            ("status",), ("doctor",), ("queue", "list"), ("job", "list"), ("job", "show", f"mail:{id_}"),
            ("job", "show", "\x9b2J"), ("enqueue", "fail", "word=" + STEERING, "--wait", "--timeout", "20s", "-v"),
        ):  # fmt: skip
            for options in ((), ("--json",)):
                done = shell.run(*command, *options, **run)
                shown.append(done.stdout + done.stderr)
    finally:
        worker.terminate()
        shown += worker.communicate(timeout=60)
    assert sum("9b2J" in one for one in shown) > 8, "the test reaches them"
    assert [one for one in shown if "\x1b" in one or "\x9b" in one] == []
    redis.delete(*redis.keys("conveyor:*"))


JOBS = """
from conveyor import Conveyor

app = Conveyor()


@app.task(retry=1)
def fail(word: str) -> None:
    raise ValueError(word)
"""
