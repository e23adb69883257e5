"""Sealed, compressed and versioned messages."""

from __future__ import annotations

import logging
from contextlib import aclosing

import pytest

from conveyor import FileStore
from conveyor.errors import ConfigurationError, JobFailed
from conveyor.jobs.app import Conveyor
from conveyor.jobs.core import core_of
from support.running_worker import drain
from support.waiting import auntil

KEYS = {"2026-11": "s" * 32}


@pytest.fixture
def made(url):
    """Make apps on the emptied server; their queues are emptied at the end."""
    apps: list[Conveyor] = []

    def one(**options):
        apps.append(Conveyor(url, **options))
        return apps[-1]

    yield one
    for app in apps:
        for queue in core_of(app).queues.values():
            queue.purge()
            queue.purge(dead=True)
        app.close()


@pytest.mark.parametrize("encrypt", [False, True], ids=["signed", "encrypted"])
def test_sealed_messages_arrive(made, redis, encrypt):
    """Messages pushed in any way arrive in order and lie sealed in Redis; errors do too."""
    queue = made(keys=KEYS, encrypt=encrypt).queue("mail")
    queue.push("a", headers={"trace": "1"})
    queue.push("b", id="mine", delay="0s")
    queue.push_many(f"m{n}" for n in range(1200))
    bodies = [data.split(b"\n", 2)[2] for data in redis.hvals(queue.keys.jobs)]
    assert len(bodies) == 1202
    assert all(body.startswith(b"\x01") for body in bodies)

    taken = [message for _ in range(3) for message in queue.pull(n=600)]
    assert [message.body for message in taken] == ["a", "b", *(f"m{n}" for n in range(1200))]
    assert taken[0].headers == {"trace": "1"}
    taken[0].dead("it says secret-word")
    with taken[1]:
        raise ValueError("and secret-word again")
    for message in taken[2:10]:
        message.ack()
    assert not any(b"secret-word" in state for state in redis.hvals(queue.keys.state))
    [letter] = queue.dead_letters()
    assert letter.error == "dead: it says secret-word"
    assert letter.payload.startswith(b"\x01")
    for message in taken[10:]:
        message.nack(delay="1h")


@pytest.mark.parametrize(
    ("code", "options"), [("E38", {}), ("E39", {"keys": {"other": "t" * 32}}), ("E40", {"keys": {"2026-11": "t" * 32}})]
)
def test_message_that_cannot_be_opened_is_a_dead_letter(made, redis, caplog, code, options):
    """It is set aside with its bytes and one line in the log; the next message comes, and redriven it arrives."""
    right, wrong = made(keys=KEYS).queue("mail"), made(**options).queue("mail")
    right.push("sealed")
    [before] = redis.hvals(right.keys.jobs)
    with caplog.at_level(logging.WARNING, "conveyor"):
        assert wrong.pull() == []
    assert len(caplog.records) == 1
    assert code in caplog.text
    assert redis.hvals(right.keys.jobs) == [before]
    [letter] = wrong.dead_letters()
    assert code in letter.error
    assert letter.payload == before.split(b"\n", 2)[2]
    assert right.redrive() == 1
    [message] = right.pull()
    assert message.body == "sealed"
    message.ack()


async def test_partitions_are_one_queue_to_the_seal(url, tmp_path):
    """A seal is bound to the queue, whichever partition a message or a job lies in; errors and results open too."""
    async with Conveyor(url, keys=KEYS, encrypt=True, large=FileStore(tmp_path), large_above="1KiB") as app:
        queue = app.queue("mail", partitions=3)

        @app.task(name="mail.length", queue="mail", retry=1)
        async def length(text: str) -> int:
            if not text:
                raise ValueError("empty")
            return len(text)

        jobs = [await length.aenqueue("x" * size) for size in (1, 2, 3, 2000, 3000)]
        failed = await length.aenqueue("")
        assert all("mail/" in job.id for job in jobs)
        await drain(app)
        assert [await job.aresult("1s") for job in jobs] == [1, 2, 3, 2000, 3000]
        with pytest.raises(JobFailed, match="ValueError: empty"):
            await failed.aresult("1s")
        assert [letter.error async for letter in queue.adead_letters()] == ["ValueError: empty"]
        await queue.apurge(dead=True)
        queue = app.queue("post", partitions=3)
        await queue.apush_many(["a", "b" * 2000, "c"])
        taken = list(await queue.apull(n=3, wait="2s"))

        async def took_all() -> bool:
            if len(taken) < 3:
                taken.extend(await queue.apull(n=3, wait="2s"))
            return len(taken) >= 3

        await auntil(took_all, what="three messages")
        assert sorted(message.body for message in taken) == ["a", "b" * 2000, "c"]
        for message in taken:
            await message.aack()
        await auntil(lambda: not list(tmp_path.glob("??/*")))


def test_compressed_messages_need_no_settings_to_be_read(made, redis):
    """Above the size they are compressed where that helps, and anybody reads them."""
    queue = made(compress="1KiB").queue("mail")
    queue.push_many(["x" * 2000, "small"])
    big, small = (data.split(b"\n", 2)[2] for data in sorted(redis.hvals(queue.keys.jobs), key=len, reverse=True))
    assert len(big) < 100
    assert big[:4] == b"\x01\x01\x00\x01"
    assert small == b'"small"'
    other = made().queue("mail")
    taken = other.pull(n=2)
    assert [message.body for message in taken] == ["x" * 2000, "small"]
    for message in taken:
        message.ack()


def test_older_messages_are_brought_up_and_newer_ones_wait(made, redis):
    """A queue of a version gets every older message step by step; a newer one waits and uses no attempt."""

    def upcast(version, value):
        return [value] if version == 1 else {"words": value}

    first, third = made().queue("mail"), made(keys=None).queue("mail", version=3, upcast=upcast)
    first.push("one")
    made().queue("mail", version=2).push(["two"])
    third.push({"words": ["three"]})
    taken = third.pull(n=3)
    assert [message.body for message in taken] == [{"words": ["one"]}, {"words": ["two"]}, {"words": ["three"]}]
    assert b'"version":3' in b"".join(redis.hvals(first.keys.jobs))
    for message in taken[:2]:
        message.ack()
    taken[2].nack(delay=0)
    assert first.pull(n=3) == []
    assert first.stats().scheduled == 1
    assert [state.split(b"\n")[0] for state in redis.hvals(first.keys.state)] == [b"1 1 0"]


async def test_large_messages_on_a_loop(url, tmp_path):
    """Awaitable consumers fetch and remove large bodies too."""
    async with Conveyor(url, keys=KEYS, large=FileStore(tmp_path), large_above="1KiB") as app:
        queue = app.queue("mail")
        await queue.apush("x" * 5000)
        await queue.apush_many(["y" * 5000, "small"])
        assert len(list(tmp_path.glob("??/*"))) == 2
        found = []
        async with aclosing(queue.aconsume(prefetch=5)) as messages:
            async for message in messages:
                async with message as body:
                    found.append(body)
                if len(found) == 3:
                    break
        assert found == ["x" * 5000, "y" * 5000, "small"]
        await auntil(lambda: not list(tmp_path.glob("??/*")))


@pytest.mark.parametrize(
    "options", [{"version": 0}, {"version": True}, {"version": 1, "upcast": print}, {"version": 2, "upcast": 3}]
)
def test_bad_versions_are_refused(made, options):
    """A version is a whole number from 1, an upcast a function for a later one."""
    with pytest.raises(ConfigurationError, match=r"version|upcast"):
        made().queue("mail", **options)
    with pytest.raises(ConfigurationError, match=r"version|upcast"):
        made().task(**options)
