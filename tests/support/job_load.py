"""A load on a server while something goes wrong there: a producer thread, workers in this loop, and the account of both."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any, Self

from conveyor.errors import StoreUnavailable
from conveyor.events import JobLost
from conveyor.jobs.app import Conveyor
from support.running_worker import audit, counts, working
from support.waiting import auntil

PAUSE = 0.001


class JobLoad:
    """
    Jobs with rising numbers are enqueued and run until the block ends; then everything accepted must have run.

    `accepted` has the numbers whose enqueue returned, `ran` how often each began, `errors` what a producer was told
    other than that Redis cannot be reached, `unknown` the numbers of those, `lost` the jobs a worker had to give up.
    """

    def __init__(
        self, url: str, *, producer: str | None = None, workers: int = 1, bulk: int = 0, forgetful: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        """
        `url` is for the workers, *producer* for the producer if it differs; *bulk* jobs go with every tenth push.

        Of a *forgetful* server only the order at the end is asked, not that everything accepted has run.
        """
        self.app = Conveyor(url, **options)
        self.ran: Counter[int] = Counter()
        self.accepted: list[int] = []
        self.accepted_at: dict[int, tuple[float, float]] = {}  # when the call began and when it returned
        self.errors: list[Exception] = []
        self.unknown: list[int] = []
        self.lost: list[JobLost] = []
        self.app.on(JobLost)(self.lost.append)
        self._url, self._bulk, self._workers = producer or url, bulk, workers
        self._forgetful = forgetful
        self._stack = AsyncExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)

        @self.app.task(name="note", retry=1)
        async def note(n: int) -> None:
            self.ran[n] += 1

        self.note = note

    def _produce(self) -> None:
        with Conveyor(self._url) as app:
            task, n, pushes = app.task(name="note")(self.note.function), 0, 0
            while not self._stop.wait(PAUSE):
                numbers = list(range(n, n + (self._bulk if self._bulk and pushes % 10 == 0 else 1)))
                n, pushes, began = numbers[-1] + 1, pushes + 1, monotonic()
                try:
                    if len(numbers) > 1:
                        app.enqueue_many([task.s(number) for number in numbers])
                    else:
                        task.enqueue(numbers[0])
                except StoreUnavailable:
                    self.unknown += numbers
                except Exception as error:
                    self.errors.append(error)
                else:
                    self.accepted += numbers
                    self.accepted_at.update(dict.fromkeys(numbers, (began, monotonic())))

    async def __aenter__(self) -> Self:
        """Start the workers, then the producer; return when jobs run."""
        for _ in range(self._workers):
            await self._stack.enter_async_context(working(self.app))
        self._thread.start()
        await self.more(5)
        return self

    async def more(self, count: int, seconds: float = 60.0) -> float:
        """Wait until *count* jobs more have begun; return after how many seconds."""
        began, goal = monotonic(), self.ran.total() + count
        await auntil(lambda: self.ran.total() >= goal, seconds)
        return monotonic() - began

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Stop; everything accepted has run and nothing is out of order in the queue."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join)
        try:
            if kind is None:
                await self._drained()
        finally:
            await self._stack.aclose()
        if kind is None:
            assert await audit(self.app) == []
            left = await counts(self.app)
            assert (left.ready, left.scheduled, left.leased, left.dead) == (0, 0, 0, 0)
        await self.app.aclose()

    async def _drained(self) -> None:
        if not self._forgetful:
            await auntil(lambda: set(self.accepted) <= set(self.ran), 90)
        deadline = monotonic() + 90
        while (left := await counts(self.app)).ready or left.leased or left.scheduled:
            assert monotonic() < deadline, f"this is never done: {left}"
            await asyncio.sleep(0.01)

    @property
    def again(self) -> list[int]:
        """The numbers of the jobs that ran more than once."""
        return [n for n, times in self.ran.items() if times > 1]
