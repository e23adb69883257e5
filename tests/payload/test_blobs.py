"""Large bodies that lie in a store: written before the push, removed after the end, missed without a crash."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pytest

from conveyor import BlobUnavailable, Buffer, FileStore
from conveyor.admin import blob_sweep
from conveyor.admin.admin import Admin
from conveyor.admin.blob_sweep import sweep
from conveyor.errors import ConfigurationError, JobFailed, PayloadError, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.messaging import outbox
from conveyor.messaging.retry import Retry
from conveyor.store.operations import Entry
from support.running_worker import drain, working
from support.waiting import auntil

KEYS = {"2026-11": "k" * 32}
BIG = "big " * 20_000


class Memory:
    """A store as a user would write one, with faults at hand."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.broken = 0

    def put(self, name: str, data: bytes) -> None:
        if self.broken:
            raise OSError("no route to the bucket")
        self.data[name] = data

    def get(self, name: str, most: int) -> bytes | None:
        if self.broken:
            self.broken -= 1
            raise OSError("no route to the bucket")
        found = self.data.get(name)
        return None if found is None else found[:most]

    def delete(self, name: str) -> None:
        self.data.pop(name, None)

    def old(self, seconds: float) -> Any:
        return iter(list(self.data))


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture
async def app(url: str, store: Memory) -> Any:
    """An app with keys and a store for what takes more than 10 kB."""
    async with Conveyor(url, keys=KEYS, large=store, large_above=10_000, max_large="1MiB") as app:
        yield app
        await app.queue("default").apurge()
        await app.queue("default").apurge(dead=True)


def length(app: Conveyor, **options: Any) -> Any:
    @app.task(name="length", **options)
    async def length(text: str) -> int:
        return len(text)

    return length


@pytest.mark.row("D4")
@pytest.mark.parametrize("compress", [None, 100])
async def test_large_arguments_lie_in_the_store_until_their_job_ended(url, redis, tmp_path, compress):
    """Redis holds a reference; the files are sealed, and gone after the job's end."""
    async with Conveyor(url, keys=KEYS, compress=compress, large=FileStore(tmp_path), large_above=200) as app:
        task = length(app)
        text = os.urandom(300_000).hex()
        jobs = [await task.aenqueue(text), *await app.aenqueue_many([task.s(text[1:]), task.s("small")])]
        files = list(tmp_path.glob("??/*"))
        assert len(files) == 2
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
        assert all(file.read_bytes().startswith(b"\x01\x01\x01") for file in files)
        assert max(map(len, redis.hvals(app.client.keys("default").jobs))) < 300
        await drain(app)
        assert [await job.aresult("1s") for job in jobs] == [600_000, 599_999, 5]
        await auntil(lambda: not list(tmp_path.glob("??/*")))


async def test_administration_fetches_nothing(app, store):
    """A list of jobs says where a large body is; it does not ask the store."""
    job = await length(app).aenqueue(BIG)
    store.broken = 99
    seeing = await asyncio.to_thread(Admin(app.client, sealing=app.sealing).job, job.id)
    assert seeing.payload.startswith("stored elsewhere as ")
    blind = await asyncio.to_thread(Admin(app.client).job, job.id)
    assert blind.payload.startswith("sealed with key 2026-11 (hmac), stored elsewhere: ")


async def test_large_arguments_survive_retries_and_death(app, store):
    """A retry and a redrive find the body; it is removed when the job succeeds and not before."""
    tried = []

    @app.task(name="flaky", retry=Retry(attempts=2, backoff="1ms"))
    async def flaky(text: str) -> int:
        tried.append(len(text))
        if len(tried) < 4:
            raise ValueError("not yet")
        return len(text)

    job = await flaky.aenqueue(BIG)
    await drain(app)
    assert len(tried) == 2
    assert len(store.data) == 1
    assert await app.queue("default").aredrive() == 1
    await drain(app)
    assert tried == [len(BIG)] * 4
    assert await job.aresult("1s") == len(BIG)
    await auntil(lambda: not store.data)


@pytest.mark.parametrize("fault", ["missing", "changed", "cut", "another"])
async def test_body_that_is_gone_makes_a_dead_letter(app, store, fault):
    """A blob that is gone or changed is E42; put back and redriven, the job runs."""
    task = length(app)
    job, other = await task.aenqueue(BIG), await task.aenqueue(BIG[1:])
    (name, data), (_second, theirs) = store.data.items()
    store.data[name] = {"missing": b"", "changed": data[:-1] + b"?", "cut": data[:-1], "another": theirs}[fault]
    if fault == "missing":
        del store.data[name]
    await drain(app)
    with pytest.raises(JobFailed, match=r"E42"):
        await job.aresult("1s")
    assert await other.aresult("1s") == len(BIG) - 1
    store.data[name] = data
    await app.queue("default").aredrive()
    await drain(app)
    assert await job.aresult("1s") == len(BIG)


async def test_store_that_is_away_is_waited_for(app, store):
    """A store that does not answer is a passing fault: a push is refused with nothing stored, a job is tried again."""
    task = length(app, retry=Retry(attempts=3, backoff="1ms"))
    store.broken = 1
    with pytest.raises(StoreUnavailable, match="no route to the bucket"):
        await task.aenqueue(BIG)
    store.broken = 0
    assert await app.queue("default").alen() == 0
    job = await task.aenqueue(BIG)
    store.broken = 2
    await drain(app)
    assert await job.aresult("1s") == len(BIG)


@pytest.mark.row("D4")
async def test_limits_hold_on_both_sides(app, url, store):
    """More than the hard limit is refused at the push, and not even fetched by a worker with a smaller one."""
    task = length(app)
    with pytest.raises(PayloadError) as caught:
        await task.aenqueue("x" * (1 << 20))
    assert caught.value.code == "E21"
    assert not store.data
    job = await task.aenqueue("x" * 900_000)
    async with Conveyor(url, keys=KEYS, large=store, large_above=1000, max_large=600_000) as small:
        length(small)
        await drain(small)
        with pytest.raises(JobFailed, match="E21"):
            await job.aresult("1s")
    async with Conveyor(url, keys=KEYS) as none:
        length(none)
        await app.queue("default").aredrive()
        await drain(none)
        with pytest.raises(JobFailed, match=r"E42.*large="):
            await job.aresult("1s")


async def test_refused_end_leaves_the_body(app, store, redis):
    """A finished job whose lease is lost keeps its body, because another worker runs it again."""
    ran, gate = [], asyncio.Event()

    @app.task(name="slow")
    async def slow(text: str) -> int:
        ran.append(text)
        await gate.wait()
        return len(ran)

    job = await slow.aenqueue(BIG)
    keys, id_ = app.client.keys("default"), job.id.partition(":")[2]
    async with working(app) as worker:
        await auntil(lambda: ran)
        assert redis.hdel(keys.leased(worker.consumers[0].identity), id_) == 1  # as if another had taken it
        gate.set()
        await auntil(lambda: not worker.consumers[0].held)
        assert len(store.data) == 1
        redis.rpush(keys.ready[0], id_)
        redis.rpush(keys.wake, "1")
        assert await job.aresult("20s") == 2
        await auntil(lambda: not store.data)
    assert ran == [BIG, BIG]


async def test_cancel_while_a_body_is_fetched(app, store):
    """A job whose body is still on its way can be handed back: it is neither lost nor run."""
    ran = []
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    @app.task(name="slow")
    async def slow(text: str) -> None:
        ran.append(text)

    fetch = store.get

    def get(name: str, most: int) -> bytes | None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return fetch(name, most)

    store.get = get
    await slow.aenqueue(BIG)
    async with working(app, grace=0.0) as worker:
        await auntil(lambda: worker.loader.fetching)
        worker.stop()
        gate.set()
    assert ran == []
    assert await app.queue("default").alen() == 1
    await drain(app)
    assert ran == [BIG]


async def test_sweep_removes_only_what_no_job_needs(app, store, tmp_path):
    """Bodies of purged jobs go; those of waiting jobs and dead letters stay, and without the keys nothing is touched."""
    task = length(app, retry=1)
    await task.options(delay="1h").aenqueue(BIG)
    waiting = set(store.data)
    cancelled = await task.options(delay="1h").aenqueue(BIG)
    assert await cancelled.acancel()
    assert len(store.data) == 2
    with pytest.raises(ConfigurationError, match="an hour"):
        await asyncio.to_thread(sweep, app, "5m")
    async with Conveyor(app.client.configured_url, keys={"2026-11": "other" * 8}, large=store) as wrong:
        with pytest.raises(PayloadError, match="Nothing was removed"):
            await asyncio.to_thread(sweep, wrong)
    assert await asyncio.to_thread(sweep, app, dry_run=True) == 1
    assert len(store.data) == 2
    assert await asyncio.to_thread(sweep, app) == 1
    assert set(store.data) == waiting


@pytest.mark.row("D46")
async def test_sweep_finds_jobs_of_queues_that_are_not_known(app, store, redis):
    """Bodies of living jobs stay when Redis has lost the set of known queues, in part or whole."""
    await length(app).options(delay="1h").aenqueue(BIG)
    await app.queue("mail", dict).apush({"text": BIG}, delay="1h")
    redis.srem("conveyor:queues", "default")
    assert await asyncio.to_thread(sweep, app) == 0
    redis.delete("conveyor:queues")
    assert await asyncio.to_thread(sweep, app) == 0
    assert len(store.data) == 2
    await app.queue("mail", dict).apurge()


@pytest.mark.row("D46")
async def test_sweep_keeps_bodies_of_jobs_on_their_way(app, store, redis):
    """Bodies of spawned jobs that lie in an outbox stay, also when its queue is not known; an entry that cannot be read stops the sweep."""
    await length(app).options(delay="1h").aenqueue(BIG)
    keys = app.client.keys("default")
    [(id_, data)] = redis.hgetall(keys.jobs).items()
    key = app.client.keys("spawning").outbox
    redis.rpush(key, outbox.write("default", Entry(id_.decode(), data)))
    redis.delete(keys.jobs, "conveyor:queues")
    assert await asyncio.to_thread(sweep, app) == 0
    redis.rpush(key, "of a later version")
    with pytest.raises(PayloadError, match="Nothing was removed"):
        await asyncio.to_thread(sweep, app)
    assert len(store.data) == 1
    redis.delete(key)


@pytest.mark.row("D46")
@pytest.mark.standalone_only("restarts a server of its own")
async def test_sweep_notices_another_server(start_server, store, monkeypatch):
    """When the server is replaced while it is read, the pages read before and after do not make a whole: nothing is removed."""
    server = start_server("--appendonly", "yes")
    async with Conveyor(server.url, large=store, large_above=10_000) as app:
        await length(app).options(delay="1h").aenqueue(BIG)
        read = blob_sweep._read

        def replaced(node: Any, command: str, *rest: Any) -> Any:
            found = read(node, command, *rest)
            if command == "HSCAN":
                server.kill()
                server.start()
                return [b"0", []]  # as the cursor of one process means nothing to another
            return found

        monkeypatch.setattr(blob_sweep, "_read", replaced)
        with pytest.raises(StoreUnavailable, match="Nothing was removed"):
            await asyncio.to_thread(sweep, app)
        assert len(store.data) == 1


@pytest.mark.row("D46")
async def test_sweep_waits_for_the_buffer(url, store):
    """Jobs that wait in the program's buffer are not read, so nothing is removed."""
    async with Conveyor("redis://127.0.0.1:1/0", large=store, large_above=10_000, buffer=Buffer(linger="1ms")) as app:
        await length(app).aenqueue(BIG)
        with pytest.raises(StoreUnavailable, match="buffer"):
            await asyncio.to_thread(sweep, app)
        assert len(store.data) == 1


def test_file_store_keeps_to_its_directory(tmp_path):
    """Names cannot leave the directory, drafts are not listed, and old blobs are."""
    store = FileStore(tmp_path / "blobs")
    name = "ab" * 16
    store.put(name, b"x" * 10)
    assert store.get(name, 4) == b"xxxx"
    assert store.get("cd" * 16, 4) is None
    for bad in ("../../etc/passwd", "", "AB" * 16, name + "/", "ab"):
        with pytest.raises(ValueError, match="32 hexadecimal"):
            store.get(bad, 1)
    assert list(store.old(60)) == []
    past = time.time() - 100
    draft = store.directory / "ab" / f".{name}.dead"
    draft.write_bytes(b"half")
    for file in store.directory.glob("??/*"):
        os.utime(file, (past, past))
    assert list(store.old(60)) == [name]
    assert not draft.exists()
    store.delete(name)
    store.delete(name)
    assert store.get(name, 1) is None
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        store.get(name, 1)  # not mounted is not missing


@pytest.mark.parametrize(
    "options",
    [{"large": "not a store"}, {"large": Memory(), "large_above": "1MiB"}, {"large": Memory(), "max_large": 1}],
)
def test_bad_stores_are_refused(url, options):
    """Options that cannot work are refused where they are written."""
    with pytest.raises(ConfigurationError):
        Conveyor(url, **options)
    assert issubclass(BlobUnavailable, StoreUnavailable)
