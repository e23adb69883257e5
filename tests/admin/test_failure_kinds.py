"""Dead letters told apart by the line of the user's code that raised their error."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.admin import Admin
from conveyor.admin.failure_matrix import FailureRow
from conveyor.admin.job_query import parse
from conveyor.errors import InvalidFilter
from conveyor.ids import split
from conveyor.payload.failures import FRAME_BYTES, describe
from conveyor.payload.records import AttemptHistory, read_failure, to_json
from support.running_worker import until_counts

pytestmark = pytest.mark.leaves_keys("dead letters are left to be looked at")


def fail(app: Conveyor, count: int) -> None:
    """Leave dead jobs of one task with one class and message from two lines, *count* from each, and one whose error is a library's."""

    def check(number: int) -> None:
        if number % 2:
            raise ValueError("refused")
        raise ValueError("refused")

    @app.task(name="shop.pay", queue="shop", retry=1)
    async def pay(number: int) -> None:
        if number < 0:
            int("x")
        check(number)

    async def run() -> None:
        for number in range(2 * count):
            await pay.aenqueue(number)
        await pay.aenqueue(-1)
        async with app.worker(queues={"shop": 1}):
            await until_counts(app, lambda now: now.dead > 2 * count, "shop")
        await app.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def rows(admin: Admin) -> list[FailureRow]:
    return admin.failure_matrix("1h").groups


def test_two_lines_that_raise_the_same_are_two_kinds(app: Conveyor) -> None:
    """Class and message are alike, the lines are not: two rows, each with its place, and its filter chooses its jobs alone."""
    fail(app, 3)
    admin = Admin(app.client)
    [one, other, odd] = rows(admin)
    assert [(row.task, row.type, row.count) for row in (one, other, odd)] == [
        ("shop.pay", "ValueError", 3), ("shop.pay", "ValueError", 3), ("shop.pay", "ValueError", 1),
    ]  # fmt: skip
    assert one.message == other.message == "refused"
    for row, function in ((one, "check"), (other, "check"), (odd, "pay")):
        assert row.frame is not None
        assert row.frame.startswith("admin/test_failure_kinds.py:")
        assert row.frame.endswith(f" {function}")
    assert len({row.frame for row in (one, other, odd)}) == 3
    assert one.filter == f"state:dead queue:shop task:shop.pay fingerprint:{one.fingerprint}"
    for row in (one, other, odd):
        found = admin.search(parse(row.filter)).jobs
        assert (len(found), {job.errors[-1].frame for job in found}) == (row.count, {row.frame})
        assert admin.count_matching(parse(f"fingerprint:{row.fingerprint[:8].upper()}")).count == row.count

    acted = [result for results in admin.act_on_matching("redrive", parse(one.filter)) for result in results]

    assert [result.outcome for result in acted] == ["retried"] * 3
    assert [(row.fingerprint, row.count) for row in rows(admin)] == [(other.fingerprint, 3), (odd.fingerprint, 1)]
    assert sum(len(step) for step in admin.act_on_matching("delete", parse(other.filter))) == 3
    assert [row.fingerprint for row in rows(admin)] == [odd.fingerprint]
    for wrong in ("fingerprint:abc", "fingerprint:xyzw", f"fingerprint:{one.fingerprint}0"):
        with pytest.raises(InvalidFilter, match=r"Column 13 .*4 to 16 of the hexadecimal digits"):
            parse(wrong)


def test_errors_of_an_older_release_are_told_apart_by_their_message(app: Conveyor, redis: Redis) -> None:
    """A record without a frame is of the kind of its message; the place is read from the traceback of the newest."""
    fail(app, 2)
    admin = Admin(app.client)
    keys = app.client.keys("shop")
    for job in list(admin.each_job("shop", "dead")):
        id_ = split(job.id)[1]
        history = AttemptHistory.decode(redis.hget(keys.state, id_))
        failure = read_failure(history.errors[-1])
        assert failure.frame
        failure.frame = ""
        assert b"frame" not in to_json(failure)
        history.errors = [to_json(failure)]
        redis.hset(keys.state, id_, history.encode())

    [alike, odd] = rows(admin)

    assert [(row.count, row.message) for row in (alike, odd)] == [
        (4, "refused"), (1, "invalid literal for int() with base 10: 'x'"),
    ]  # fmt: skip
    assert (alike.frame or "").endswith(" check")
    assert [admin.count_matching(parse(row.filter)).count for row in (alike, odd)] == [4, 1]


def test_the_frame_of_an_error_is_bounded_and_the_users() -> None:
    """Frames of libraries are passed over, deep recursion costs one frame, and an error without any has none."""
    assert describe(ValueError("x"), 1, 1, "w").frame == ""
    scope: dict[str, object] = {}
    name = "f" * 1000
    exec(
        compile(
            f"def {name}(n):\n    return {name}(n - 1) if n else int('x')\n",
            "/srv/app/" + "d" * 500 + "/mail.py",
            "exec",
        ),
        scope,
    )
    exec(compile("def call(f): f(50)\n", "/x/lib/python3.11/site-packages/lib.py", "exec"), scope)
    exec(compile("def outer(call, f):\n    call(f)\n", "/srv/app/web/views.py", "exec"), scope)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        scope["outer"](scope["call"], scope[name])  # type: ignore[operator]
    found = describe(caught.value, 1, 1, "w").frame
    assert len(found.encode()) <= FRAME_BYTES
    assert found.startswith("ddd")

    with pytest.raises(TypeError) as caught_in_library:
        scope["outer"](scope["call"], None)  # type: ignore[operator]
    assert describe(caught_in_library.value, 1, 1, "w").frame == "web/views.py:2 outer"


def test_the_frame_of_a_group_is_that_of_its_first_error() -> None:
    """Groups of errors from two lines are two kinds, however deep they are nested; one whose errors were never raised has its own frame."""

    def one() -> None:
        raise ValueError("x")

    def two() -> None:
        raise ValueError("x")

    found = []
    for function in (one, two):
        with pytest.raises(ValueError, match="x") as caught:
            function()
        found.append(describe(ExceptionGroup("tasks", [caught.value]), 1, 1, "w").frame.partition(" ")[2])
        nested = ExceptionGroup("out", [ExceptionGroup("in", [caught.value]), KeyError()])
        found.append(describe(nested, 1, 1, "w").frame.partition(" ")[2])
    assert found == ["one", "one", "two", "two"]
    with pytest.raises(ExceptionGroup) as never:
        raise ExceptionGroup("tasks", [ValueError("never raised")])
    assert describe(never.value, 1, 1, "w").frame.endswith(" test_the_frame_of_a_group_is_that_of_its_first_error")
