"""
Ends the copies of a worker that its jobs make with `os.fork`.

A copy has the connections, the event loop and the jobs of its worker. It may run the code that forked to its end, and
nothing after that: the same jobs would run twice, and two processes would read the replies of one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, NoReturn

from conveyor.store.fork_safety import on_fork

if TYPE_CHECKING:
    from types import FrameType, TracebackType

_PATIENCE = 2.0
"""Seconds for what a copy still has to write: a thread of the worker may have held a lock of the stream at the fork."""


class ForkGuard:
    """Tells whether this process is a forked copy of the one that made the guard, and ends a copy."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """
        Args:
            loop: the event loop of the calling thread: a copy ends before it comes back to it. None: there is none.
        """
        self.is_copy = False
        self.checked: set[asyncio.Task[None]] = set()
        """Tasks of the loop that look at `is_copy` wherever code of a job returns or waits."""
        self._loop = loop
        self._thread = threading.get_ident()
        on_fork(self)

    def forked(self) -> None:
        """Note that this is a copy, and have it end where its code comes back to the loop."""
        self.is_copy = True
        if self._loop is None or threading.get_ident() != self._thread or self._loop.is_closed():
            return
        task = asyncio.current_task(self._loop)
        if task is None:  # a callback of the loop
            self._loop.call_soon(self.end_on_loop)
        elif task not in self.checked:
            self._end_after_step(task.get_coro())

    def _end_after_step(self, coroutine: object) -> None:
        """End the copy when the coroutine of the running task returns or waits, before the loop runs another task."""
        outermost = getattr(coroutine, "cr_frame", None)

        def on_event(frame: FrameType, event: str, _: object) -> None:
            if frame is outermost and event == "return":
                sys.setprofile(None)
                self.end_on_loop()

        sys.setprofile(on_event)  # slows this copy down, and nothing else

    def __enter__(self) -> None:
        """Begin code that may fork."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End a copy: its code has returned."""
        if self.is_copy:
            self.end(error)

    def end_on_loop(self) -> NoReturn:
        """End the copy because its code would go on with the event loop, which belongs to the worker."""
        _exit(1, [f"Process {os.getpid()}, forked by a job, ends here: the event loop is not its own."])

    def end(self, error: BaseException | None = None) -> NoReturn:
        """End the copy as a program ends whose main function returned, or raised *error*."""
        if error is None:
            _exit(0, [])
        if not isinstance(error, SystemExit):
            _exit(1, traceback.format_exception(error))
        code: object = error.code
        if code is None or isinstance(code, int):
            _exit((code or 0) & 0xFF, [])
        _exit(1, [str(code)])  # sys.exit("what is wrong")

    def close(self) -> None:
        """Let go of the loop, which is about to end."""
        self._loop = None


def _exit(code: int, lines: list[str]) -> NoReturn:
    if (buffers := sys.modules.get("conveyor.store.client.buffer")) is not None:
        buffers.flush_all()  # what the copy pushed while Redis was away

    def write() -> None:
        with contextlib.suppress(Exception):  # the job may have closed a stream, or put anything in its place
            sys.stdout.flush()
            if lines:
                print("".join(lines), file=sys.stderr)
            sys.stderr.flush()

    writer = threading.Thread(target=write, name="conveyor-copy-end", daemon=True)
    writer.start()
    writer.join(_PATIENCE)
    os._exit(code)
