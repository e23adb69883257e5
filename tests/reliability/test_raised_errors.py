"""Jobs that raise unusual exceptions: the failure is recorded within bounds, and the worker lives."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from conveyor import Conveyor, Retry
from conveyor.payload.failures import MESSAGE_BYTES, TRACEBACK_BYTES
from conveyor.store import inspection
from support.running_worker import audit, counts, drain

ONCE = Retry(attempts=1)


def refuse(*_: Any) -> NoReturn:
    raise RuntimeError("not even this")


class NoText(Exception):
    __str__ = __repr__ = refuse


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit(9)

    __repr__ = __str__


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


class NoClass(BaseException):
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no class")


class NoNotes(Exception):
    @property
    def __notes__(self) -> Any:
        raise KeyboardInterrupt


class NoCause(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name in {"__cause__", "__context__", "__notes__", "__suppress_context__"}:
            raise SystemExit(4)
        return super().__getattribute__(name)


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__qualname__", "__module__", "__name__"}:
            raise ValueError("no name")
        return super().__getattribute__(name)


class Nameless(Exception, metaclass=Meta):
    pass


class NoHash(Exception):
    __hash__ = None  # type: ignore[assignment]
    __eq__ = refuse  # type: ignore[assignment]


class NeedsArguments(Exception):
    def __init__(self, a: Any, b: Any, *, c: Any) -> None:
        super().__init__(a, b, c)


class NoBool(Exception):
    __bool__ = __len__ = refuse


def circle() -> NoReturn:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def chain() -> NoReturn:
    error: Exception = ValueError("0")
    for n in range(5000):
        outer = ValueError(str(n))
        outer.__cause__, error = error, outer
    raise error


def deep() -> None:
    deep()


def group(depth: int = 30) -> NoReturn:
    error: Exception = ValueError("leaf")
    for _ in range(depth):
        error = ExceptionGroup("nested", [error, NoText()])
    raise error


def noted() -> NoReturn:
    error = ValueError("noted")
    for _ in range(100):
        error.add_note("n" * 10_000)
    raise error


def raises(error: Any) -> Callable[[], Any]:
    def call() -> NoReturn:
        raise error

    return call


NASTY: dict[str, Callable[[], Any]] = {
    "no text": raises(NoText()),
    "text that exits": raises(Exits()),
    "text that is none": raises(NotText()),
    "endless text": raises(Endless()),
    "huge message": raises(ValueError("x" * 3_000_000)),
    "huge arguments": raises(ValueError(["y" * 1000] * 1000)),
    "surrogates": raises(ValueError("\ud800 lone \udfff")),
    "control characters": raises(ValueError("a\x00b\x1b[31m\r\n\tc\u202e")),
    "bytes": raises(ValueError(b"\xff\xfe")),
    "unicode error": b"\xff".decode,
    "no class": raises(NoClass()),
    "notes that interrupt": raises(NoNotes()),
    "a hundred long notes": noted,
    "cause that exits": raises(NoCause()),
    "circular cause": circle,
    "chain of 5,000": chain,
    "recursion": deep,
    "groups in groups": group,
    "group of base": raises(BaseExceptionGroup("base", [SystemExit(1), KeyboardInterrupt()])),
    "no name": raises(Nameless()),
    "no hash": raises(NoHash()),
    "no truth": raises(NoBool()),
    "arguments in the way": raises(NeedsArguments(1, lambda: 2, c=object())),
    "not picklable": raises(ValueError(open, lambda: None, (n for n in ()))),
    "exit": lambda: sys.exit(3),
    "exit with text": lambda: sys.exit("enough"),
    "interrupt": raises(KeyboardInterrupt()),
    "generator exit": raises(GeneratorExit()),
    "cancelled": raises(asyncio.CancelledError("by hand")),
    "base": raises(BaseException("base")),
    "stop": raises(StopIteration(7)),
    "stop async": raises(StopAsyncIteration(7)),
    "memory": raises(MemoryError()),
    "a class": raises(ValueError),
    "no exception": raises("text"),
    "assertion": raises(AssertionError()),
    "timeout": raises(TimeoutError()),
}  # fmt: skip


@pytest.mark.row("A14")
@pytest.mark.leaves_keys("dead letters stay")
@pytest.mark.parametrize("level", [logging.CRITICAL, logging.INFO], ids=["silent", "logged"])
async def test_nasty_exceptions(url: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes one dead letter of bounded size, on the loop and on a thread, and the next job runs as if nothing was."""
    logger = logging.getLogger("conveyor")
    # Formatted as any handler would, and then forgotten: megabytes with lone surrogates are no good in a test's report.
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(io.StringIO())])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", level)
    logger.manager._clear_cache()
    async with Conveyor(url) as app:

        @app.task(retry=ONCE)
        async def on_loop(name: str) -> None:
            NASTY[name]()

        @app.task(retry=ONCE)
        async def after_a_pause(name: str) -> None:
            await asyncio.sleep(0.001)
            NASTY[name]()

        @app.task(retry=ONCE)
        def on_thread(name: str) -> None:
            NASTY[name]()

        @app.task
        async def fine() -> str:
            return "fine"

        expected = 0
        for name in NASTY:
            for task in (on_loop, after_a_pause, on_thread):
                await task.aenqueue(name)
                expected += 1
        job = await fine.aenqueue()
        await drain(app, concurrency=4)

        assert await job.aresult(timeout=60) == "fine"
        assert (await counts(app)).dead == expected
        rows = (await app.client.arun(inspection.list_jobs(app.client.keys("default"), "dead", 0, 1000))).rows
        for row in rows:
            (failure,) = row.state.failures_list()
            assert len(failure.message.encode()) <= MESSAGE_BYTES, failure.type
            assert len(failure.traceback.encode()) <= TRACEBACK_BYTES, failure.type
            assert failure.type
        assert await audit(app) == []


@pytest.mark.row("A14")
@pytest.mark.leaves_keys("dead letters stay")
async def test_nasty_exceptions_are_retried_like_any(url: str) -> None:
    """Every Exception is retried by the policy, however it looks; a BaseException beside it is not."""
    async with Conveyor(url) as app:
        runs: dict[str, int] = {}

        @app.task(retry=Retry(attempts=2, backoff="1ms", jitter=False))
        async def nasty(name: str) -> None:
            runs[name] = runs.get(name, 0) + 1
            NASTY[name]()

        twice = [
            "no text",
            "text that exits",
            "no class",
            "notes that interrupt",
            "circular cause",
            "recursion",
            "no name",
            "no hash",
        ]
        once = ["exit", "interrupt", "base"]
        for name in twice + once:
            await nasty.aenqueue(name)
        await drain(app)

        assert runs == {**dict.fromkeys(twice, 2), **dict.fromkeys(once, 1)}
        assert (await counts(app)).dead == len(runs)
