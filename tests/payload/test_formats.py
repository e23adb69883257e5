"""Other formats than JSON: MessagePack and a program's own, for messages, arguments and results, everywhere they travel."""

from __future__ import annotations

import asyncio
import struct
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from conveyor import FileStore, Format
from conveyor.admin.admin import Admin
from conveyor.errors import ConfigurationError, JobFailed, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from support.custom_formats import Opaque, OpaqueFormat, Packed, Point, declare
from support.queue_snapshot import kept_result
from support.running_worker import drain
from support.shell import Shell

KEYS = {"2026-11": "f" * 32}
JOBS = "conveyor:{default}:jobs"


def ways(tmp_path: Any) -> dict[str, dict[str, Any]]:
    return {
        "bare": {},
        "signed": {"keys": KEYS},
        "encrypted": {"keys": KEYS, "encrypt": True, "compress": 10},
        "elsewhere": {"large": FileStore(tmp_path / "blobs"), "large_above": 20},
    }


@pytest_asyncio.fixture
async def made(url):
    """Make apps on the emptied server; all are closed and their queues emptied at the end."""
    apps: list[Conveyor] = []

    def one(**options: Any) -> Conveyor:
        apps.append(Conveyor(url, **options))
        return apps[-1]

    yield one
    for app in apps:
        for queue in ("default", *core_of(app).queues):
            held = core_of(app).queues.get(queue) or app.queue(queue)
            await held.apurge()
            await held.apurge(dead=True)
        await app.aclose()


@pytest.mark.parametrize("way", ["bare", "signed", "encrypted", "elsewhere"])
async def test_jobs_and_results_travel_in_msgpack(made, redis, tmp_path, way):
    """Arguments and results keep their bytes and number keys, however they are wrapped, from one call or from many."""
    app = made(format="msgpack", **ways(tmp_path)[way])
    declare(app)
    at = datetime(2026, 1, 2, tzinfo=UTC)
    value = {1: b"\xff\x00" * 20, "deep": [[None, True, 1.5]], "nan": float("inf")}
    jobs = [await app.tasks["echo"].aenqueue(value, b"\x80", 1, 2, at=at)]
    jobs += await app.aenqueue_many(app.tasks["echo"].s(n) for n in range(3))
    jobs += [await app.tasks["echo"].options(priority=3, id="mine").aenqueue(b"x")]
    moved = await app.tasks["move"].aenqueue(Point(1, 2))
    await app.tasks["spawn"].aenqueue(b"\x01")
    await app.tasks["early"].aenqueue(b"\x01")
    if way == "bare":
        bodies = [data.split(b"\n", 2)[2] for data in redis.hvals(JOBS)]
        assert all(body.startswith(b"\x02\x07msgpack") for body in bodies)
    await drain(app)
    assert await jobs[0].aresult("1s") == [value, b"\x80", [1, 2], {"at": "2026-01-02T00:00:00Z"}]
    assert [await job.aresult("1s") for job in jobs[1:4]] == [[n, b"\x00", [], {}] for n in range(3)]
    assert await app.job("mine").aresult("1s") == [b"x", b"\x00", [], {}]
    assert await moved.aresult("1s") == Point(2, 3)
    record = kept_result(redis, app.client.keys("default"), moved.id.split(":")[1])
    assert b'"packed":"' in record
    assert not list(redis.scan_iter("*dead*"))


@pytest.mark.parametrize("way", ["bare", "signed", "encrypted", "elsewhere"])
@pytest.mark.parametrize("partitions", [1, 3])
async def test_messages_travel_in_msgpack(made, tmp_path, way, partitions):
    """Messages pushed in any way arrive as they were, in their order, from one partition or several."""
    app = made(**ways(tmp_path)[way])
    queue = app.queue("mail", format="msgpack", partitions=partitions)
    values = [{n: b"\xff" * n} for n in range(40)]
    await queue.apush(values[0])
    await queue.apush_many(values[1:])
    found = []
    async with asyncio.timeout(60):
        async for message in queue.aconsume(prefetch=10):
            async with message as body:
                found.append(body)
            if len(found) == 40:
                break
    assert sorted(found, key=str) == sorted(values, key=str)
    assert partitions > 1 or found == values


async def test_a_format_of_ones_own(made, redis):
    """Messages, arguments and results go through an own format with their annotated types, and decoded values are checked."""
    app = made()
    queue = app.queue("points", Point, format=Packed())
    await queue.apush(Point(3, -4))
    [stored] = redis.hvals("conveyor:{points}:jobs")
    assert stored == b"\n\n\x02\x09points.v1" + struct.pack("<ii", 3, -4)
    [message] = await queue.apull()
    assert message.body == Point(3, -4)
    await message.aack()
    declare(app, format=core_of(app).formats.known["points.v1"])
    job = await app.tasks["move"].aenqueue(Point(5, 6), by=Point(-1, -2))
    await drain(app)
    assert await job.aresult("1s") == Point(4, 4)
    with pytest.raises(PayloadError, match="cannot be stored") as caught:
        await queue.apush("no point")
    assert caught.value.code == "E04"

    class Lossy(Packed):
        name = "lossy"

        def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
            return Point(0, 0)

    class Text(Packed):
        name = "text"

        def encode(self, value: Any, /) -> Any:
            return "text"

    for form, code in ((Lossy(), "E03"), (Text(), "E04")):
        with pytest.raises(PayloadError) as caught:
            await app.queue(f"q-{form.name}", Point, format=form).apush(Point(1, 1))
        assert caught.value.code == code
        assert "Nothing was stored" in str(caught.value)


async def test_classes_that_only_their_format_knows(made, redis):
    """A message, an argument and a result may be of a class that has no JSON; JSON in its place is refused."""
    app = made(format=OpaqueFormat())

    @app.task(name="say")
    async def say(word: Opaque, more: Opaque | None = None, *rest: Opaque) -> Opaque:
        return Opaque(word.words + (more.words if more else "") + str(len(rest)))

    queue = app.queue("words", Opaque)
    await queue.apush(Opaque("a"))
    jobs = [await say.aenqueue(Opaque("b")), await say.aenqueue(Opaque("b"), Opaque("c"))]
    redis.hset(app.client.keys("words").jobs, "json", b'\n\n{"words":"x"}')
    redis.rpush(app.client.keys("words").ready[0], "json")
    await drain(app)
    assert [(await job.aresult("1s")).words for job in jobs] == ["b0", "bc0"]
    [message] = await queue.apull(2)
    assert message.body == Opaque("a")
    await message.aack()
    [letter] = [one async for one in queue.adead_letters()]
    assert "Expected Opaque, got dict" in letter.error
    seeing = await asyncio.to_thread(Admin(app.client, formats=core_of(app).formats).job, jobs[0].id)
    assert "Opaque" in str(seeing.result)


async def test_a_worker_without_a_format_sets_the_job_aside(made, redis, caplog):
    """It is a dead letter after one attempt with its bytes, which says which format it is; redriven to who has it, it runs."""
    old, new = made(), made(format=Packed())
    declare(old)
    declare(new)
    old_queue, queue = old.queue("points", Point), new.queue("points", Point)
    job = await new.tasks["move"].aenqueue(Point(1, 2))
    await queue.apush(Point(3, 4))
    before = redis.hvals(JOBS) + redis.hvals("conveyor:{points}:jobs")
    await drain(old)
    assert await old_queue.apull() == []
    with pytest.raises(JobFailed, match=r"E50 It is in the format 'points.v1', and this program knows json, msgpack\."):
        await old.job(job.id).aresult("1s")
    letters = []
    for held in (old.queue("default"), old_queue):
        letters += [one async for one in held.adead_letters()]
    assert ["E50" in letter.error for letter in letters] == [True, True]
    assert [letter.attempts for letter in letters] == [1, 1]
    assert letters[1].payload == b"\x02\x09points.v1" + struct.pack("<ii", 3, 4)
    assert redis.hvals(JOBS) + redis.hvals("conveyor:{points}:jobs") == before
    await old.queue("default").aredrive()
    await old_queue.aredrive()
    await drain(new)
    assert await job.aresult("1s") == Point(2, 3)
    [message] = await queue.apull()
    assert message.body == Point(3, 4)
    await message.aack()


async def test_formats_change_while_jobs_wait(made):
    """A program reads every format it was given, so the one it writes can change at any time, and back."""
    writers = [made(), made(format="msgpack"), made(format=Packed())]
    jobs = []
    for app in writers:
        declare(app)
        jobs.append(await app.tasks["move"].aenqueue(Point(1, 2)))
        await app.queue("points", Point).apush(Point(7, 7))
    reader = made(format=["json", Packed()])
    declare(reader)
    assert repr(core_of(reader).formats) == "<Formats json, msgpack, points.v1; writes json>"
    await drain(reader)
    assert [await reader.tasks["move"].job(job.id).aresult("1s") for job in jobs] == [Point(2, 3)] * 3
    messages = await reader.queue("points", Point).apull(3)
    assert [message.body for message in messages] == [Point(7, 7)] * 3
    for message in messages:
        await message.aack()


async def test_old_versions_are_brought_up_in_their_format(made):
    """An upcast gets the plain values, bytes as bytes, and what it returns is read in the same format."""
    seen = []

    def upcast(version: int, held: Any) -> Any:
        seen.append(held)
        return {"word": held["text"] + b"!"} if isinstance(held, dict) else held + b"!"

    old, new = made(format="msgpack"), made(format="msgpack")

    @old.task(name="say")
    async def say(text: bytes) -> None: ...

    @new.task(name="say", version=2, upcast=upcast)
    async def say_now(word: bytes) -> bytes:
        return word

    job = await say.aenqueue(b"\xff")
    await old.queue("mail", bytes).apush(b"\xfe")
    await drain(new)
    assert await new.tasks["say"].job(job.id).aresult("1s") == b"\xff!"
    [message] = await new.queue("mail", bytes, version=2, upcast=upcast).apull()
    assert message.body == b"\xfe!"
    await message.aack()
    assert seen == [{"text": b"\xff"}, b"\xfe"]


async def test_what_just_fits_arrives(made):
    """The limit holds for the stored bytes, mark included, and is the same for writing and reading a sealed body."""
    app = made(keys=KEYS, format="msgpack", max_payload=1000)

    @app.task(name="same")
    async def same(word: bytes) -> bytes:
        return word

    queue = app.queue("mail", bytes)

    async def longest(push: Any) -> Any:
        for length in range(1000, 0, -1):
            try:
                return await push(bytes(length))
            except PayloadError as error:
                assert error.code == "E21"  # noqa: PT017
        raise AssertionError

    await longest(queue.apush)
    [message] = await queue.apull()
    assert len(message.body) == 1000 - 9 - 3
    await message.aack()
    job = await longest(same.aenqueue)
    await drain(app)
    assert len(await job.aresult("1s")) == 1000 - 9 - 3 - 6


@pytest.mark.parametrize(
    "wrong", ["yaml", Packed, object(), 7, type("Json", (Packed,), {"name": "json"})(),
              type("Msgpack", (Packed,), {"name": "msgpack"})(), type("Long", (Packed,), {"name": "x" * 17})(), ()],
)  # fmt: skip
def test_wrong_formats_are_refused(wrong):
    """An object that is no format, or whose name is taken, is refused where it is written."""
    with pytest.raises(ConfigurationError, match=r"[Ff]ormat"):
        Conveyor(format=wrong)


def test_one_name_is_one_format():
    """Two objects of one name in an app are refused; the same object may be given everywhere."""
    app, form = Conveyor(format=(one := Packed())), Packed()
    app.queue("a", Point, format=one)
    with pytest.raises(ConfigurationError, match=r"Two formats are called 'points\.v1'"):
        app.queue("b", Point, format=form)
    assert isinstance(one, Format)


# -- the command line -----------------------------------------------------------------------------------------------

APP = """
import struct
from conveyor import Conveyor

app = Conveyor(format="msgpack")
app.queue("mail", dict[int, bytes])


@app.task(name="echo", retry=1)
def echo(word: bytes, n: int = 1) -> bytes:
    return word * n


@app.task(name="away", run_in="process")
def away(word: bytes) -> bytes:
    return word + word
"""


@pytest.mark.long
def test_the_command_line_writes_and_shows_it(url, redis, tmp_path):
    """`push` and `enqueue` write the declared format from JSON, `job show` decodes, and tasks run in processes of their own."""
    shell = Shell(tmp_path, url)
    shell.write("jobs.py", APP)
    run = {"CONVEYOR_APP": "jobs:app"}
    pushed = shell.run("push", "mail", '{"1":"/w=="}', **run)
    assert pushed.returncode == 0, pushed.stderr
    [stored] = redis.hvals("conveyor:{mail}:jobs")
    assert stored.endswith(b"\x02\x07msgpack" + msgspec.msgpack.encode({1: b"\xff"}))
    refused = shell.run("push", "mail", '{"x":1}', **run)
    assert (refused.returncode, "E15" in refused.stderr) == (2, True)
    for environment in (run, {}):  # without the app too: everybody reads MessagePack
        assert '{"1":"/w=="}' in shell.run("job", "show", pushed.stdout.strip(), **environment).stdout
        assert '{"1":"/w=="}' in shell.run("job", "list", **environment).stdout
    waiting = shell.run("enqueue", "echo", "word=/w==", "n=2", **run).stdout.strip()
    away = shell.run("enqueue", "away", "--args", '["/w=="]', **run)
    assert '"word":"/w=="' in shell.run("job", "show", waiting, **run).stdout
    worked = shell.run("worker", "--burst", "--processes", "1", "-q", "default", **run)
    assert worked.returncode == 0, worked.stderr
    for id_ in (waiting, away.stdout.strip()):
        assert '"//8="' in shell.run("job", "show", id_).stdout
    redis.delete(*redis.keys("conveyor:{mail}:*"))


async def test_what_cannot_be_shown_is_said(made):
    """A body of an unknown format is shown with the format's name, and its bytes lie in the dead letter as they came."""
    app = made(format=Packed())
    queue = app.queue("points", Point)
    id_ = await queue.apush(Point(1, 2))
    seeing = await asyncio.to_thread(Admin(app.client, formats=core_of(app).formats).job, id_)
    assert seeing.payload == '{"x":1,"y":2}'
    blind = await asyncio.to_thread(Admin(app.client).job, id_)
    assert "19 bytes" in str(blind.payload)
    assert "E50" in str(blind.payload)
    sealed = made(namespace="sealed", format="msgpack", keys=KEYS, encrypt=True)
    id_ = await sealed.queue("q").apush({1: "x"})
    shown = await asyncio.to_thread(
        Admin(sealed.client, sealing=sealed.sealing, formats=core_of(sealed).formats).job, id_
    )
    assert shown.payload == '{"1":"x"}'
