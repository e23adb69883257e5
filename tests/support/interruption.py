"""
Raises an exception at a numbered point of a call, as a signal handler does.

CPython runs signal handlers after a call of a C function has returned and when a function is entered. A profile function
is called at the same points, so it reaches each of them in turn, without any timing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

MANGLED = "'traceback' object is not callable"
"""
The text of what CPython 3.11 raises now and then in place of a profile function's exception.

The traceback of the latter is on the stack where the function to call was, which no program can bring about.
"""


class Interrupted(BaseException):
    """The exception of the handler."""


class Interruption:
    """
    A block in which point *number*, from 1, raises; `struck` tells whether it was reached.

    *only* chooses the frames that count, and *error* is what is raised.
    """

    def __init__(
        self, number: int, *, only: Callable[[FrameType], bool] | None = None, error: type[BaseException] = Interrupted
    ) -> None:
        self._left, self._only, self._error = number, only, error
        self.struck = False

    def _event(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in {"call", "c_return"} or frame.f_globals.get("__name__") == __name__:
            return
        if frame.f_code.co_name == "__del__":  # nothing leaves it
            return
        if frame.f_code.co_filename == "<string>":  # made by dataclasses; there CPython 3.11 loses its stack by a raise
            return
        if self._only is not None and not self._only(frame):
            return
        self._left -= 1
        if self._left == 0:
            self.struck = True
            raise self._error

    def __enter__(self) -> Interruption:
        sys.setprofile(self._event)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        sys.setprofile(None)
        return self.struck and kind is not None and (issubclass(kind, self._error) or str(error) == MANGLED)


def points(step: int = 1, **options: Any) -> Iterator[Interruption]:
    """Yield an interruption at each *step*-th point, until one is not reached any more."""
    number = 1
    while True:
        one = Interruption(number, **options)
        yield one
        if not one.struck:
            return
        number += step


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return what *function* returns in a thread of its own; fail when it takes longer, as behind a lock that is held."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]
