"""`Conveyor(blocking_in_loop=…)`: what blocking methods do in a thread whose event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.messaging.message import Message
from conveyor.store.client.buffer import Buffer

URL = "redis://127.0.0.1:1"


@pytest.fixture(params=["plain", "buffer"])
async def app(url: str, request: pytest.FixtureRequest) -> AsyncIterator[Conveyor]:
    buffer = Buffer() if request.param == "buffer" else None
    app = Conveyor(url, blocking_in_loop="allow", buffer=buffer)
    yield app
    await app.aclose()


@pytest.mark.leaves_keys("stubs of jobs that were cancelled")
async def test_blocking_methods_work_in_a_running_loop(app: Conveyor) -> None:
    """Where the app allows it, pushes, consuming, settling, jobs and maintenance block the loop and do their work."""
    mail, both, raw = app.queue("mail"), app.queue("both", partitions=2), app.plain_list("raw")
    mail.push(1)
    mail.push_many([2, 3])
    mail.push(4, priority=1, fsync=False)
    both.push(5)
    raw.push(6)
    assert len(mail) == 3 + 1
    assert mail.stats().ready == 4
    assert "4 ready" in repr(mail)

    [first] = mail.pull()
    assert first.body == 4
    first.extend("1m")
    first.ack()
    with mail.pull(wait="1s")[0] as body:
        assert body == 1
    for message in mail.consume():
        with message as body:
            assert body == 2
        break
    for batch in mail.batches(1):
        with batch as bodies:
            assert bodies == [3]
        break
    for queue, body in ((both, 5), (raw, 6)):
        [message] = queue.pull()
        assert message.body == body
        message.ack()
    assert mail.purge() == 0

    @app.task(keep_result=0)
    def add(a: int, b: int) -> int:
        return a + b

    job = add.enqueue(1, 2)
    assert add.options(priority=1).enqueue(1, 2).status() == "ready"
    assert job.status() == "ready"
    with pytest.raises(TimeoutError):
        job.result(timeout=0.05)
    assert [one.cancel() for one in (job, *app.enqueue_many([add.s(1, 2)]))] == ["removed", "removed"]
    assert app.enqueue("elsewhere").cancel() == "removed"
    assert app.queue("default").purge() == 1
    assert app.ping() > 0


async def test_the_loop_that_would_do_the_work_is_never_blocked(app: Conveyor) -> None:
    """The blocking end of a message of `apull` is refused on its own loop, where it could never come, and nothing is done."""
    mail = app.queue("mail")
    await mail.apush(1)
    [message] = await mail.apull()
    for end in (message.ack, message.nack, lambda: message.dead("no"), lambda: message.extend("1m")):
        with pytest.raises(ConfigurationError, match="aack") as caught:
            end()
        assert caught.value.code == "E06"
    await message.aack()
    assert (await mail.astats()).leased == 0


async def test_a_block_without_async_is_refused_before_it_runs(url: str) -> None:
    """`with message` on the loop that took it says what to write, and no line of it runs; in a thread it settles."""
    app = Conveyor(url)
    mail = app.queue("mail")
    await mail.apush_many([1, 2, 3])
    async for message in mail.aconsume():
        with pytest.raises(ConfigurationError, match="Write:  async with message as body") as caught:
            message.__enter__()
        assert caught.value.code == "E06"

        def settle(message: Message[Any] = message) -> None:
            with message as body:
                assert body == 1

        await asyncio.to_thread(settle)
        break
    async for batch in mail.abatches(2):
        with pytest.raises(ConfigurationError, match="Write:  async with message as body"):
            batch.__enter__()
        async with batch as bodies:
            assert bodies == [2, 3]
        break
    await app.aclose()


async def test_a_refusal_names_what_to_write(url: str) -> None:
    """Loops are written with `async for`, and the length of a queue with `alen`."""
    app = Conveyor(url)
    mail = app.queue("mail")
    with pytest.raises(ConfigurationError, match=r"len\(queue\) was called.*\n.*await queue\.alen\(\)"):
        len(mail)
    with pytest.raises(ConfigurationError, match=r"async for … in mail\.aconsume\(…\)"):
        mail.consume()
    with pytest.raises(ConfigurationError, match=r"await mail\.apull\(…\)"):
        mail.pull()
    await app.aclose()


async def test_it_is_refused_by_default(url: str) -> None:
    """An app that says nothing, or "refuse", raises E06 in a running loop."""
    for options in ({}, {"blocking_in_loop": "refuse"}):
        app = Conveyor(url, **options)  # type: ignore[arg-type]
        for call in (lambda: app.queue("mail").push(1), app.ping, lambda: app.enqueue("x")):  # noqa: B023
            with pytest.raises(ConfigurationError) as caught:
                call()
            assert caught.value.code == "E06"
        assert "Write:  await app.aenqueue('x', …)" in str(caught.value)
        await app.aclose()


@pytest.mark.parametrize("value", ["yes", True, None, ""])
def test_another_value_is_refused(value: Any) -> None:
    """Only the two words are taken, and a wrong one is refused where the app is made."""
    with pytest.raises(ConfigurationError, match="blocking_in_loop must be 'refuse' or 'allow'"):
        Conveyor(URL, blocking_in_loop=value)
