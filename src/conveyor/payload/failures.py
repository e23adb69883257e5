"""Exceptions as stored records: bounded, printable, and safe also when the exception's own methods fail."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from logging import ERROR, Logger
from time import monotonic
from traceback import TracebackException
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from conveyor.errors import RetryIn
from conveyor.payload.records import Failure
from conveyor.payload.redaction import Hide

MESSAGE_BYTES = 2 * 1024
TRACEBACK_BYTES = 8 * 1024
REPEAT_AFTER = 60.0
"""Seconds until the same error, or the traceback of the same failure, is logged again."""
_NAME_BYTES = 256
FRAME_BYTES = 200
_MOST_PLACES = 1000
_PASSED_ON = tuple(os.path.join(os.path.dirname(path), "") for path in (os.path.dirname(__file__), asyncio.__file__))
"""Directories of code that only passes an exception on to where it is recorded."""
_LIBRARY = re.compile(
    r"^<|[/\\](site-packages|dist-packages|lib[/\\]python\d[.\d]*)[/\\]|[/\\]conveyor[/\\](jobs|worker|payload)[/\\]"
)
_STORED_NAMES = {"UnreadablePayload": "Unreadable", "PayloadTooNew": "TooNew"}
"""Classes that are stored under a shorter name than theirs: what is stored does not follow when a class is renamed."""


def describe(
    error: BaseException, attempt: int, now_ms: int, worker: str, hide: Hide | None = None, began_ms: int = 0
) -> Failure:
    """
    Return *error* as it is stored and shown; never raises. *began_ms*: when its attempt began, 0 where that is not known.

    The message takes at most 2 KiB of UTF-8, the traceback 8 KiB, the frame 200 bytes; longer ones lose their middle. *hide* takes
    values out of message and traceback.
    """
    found = Failure(
        attempt, now_ms, type_name(error), message(error), _own_frame(error), _traceback(error), worker, began=began_ms
    )
    return found if hide is None else without_values(found, hide)


def without_values(failure: Failure, hide: Hide) -> Failure:
    """Return a failure whose texts were changed by *hide*, within their limits."""
    text, trace = shorten(hide(failure.message), MESSAGE_BYTES), shorten(hide(failure.traceback), TRACEBACK_BYTES)
    return replace(failure, message=text, traceback=trace)


def type_name(error: BaseException) -> str:
    """
    Return the qualified name of an exception's class, as it is stored and shown (`JobFailed.type`).

    Builtins and the classes of Conveyor have no module in front.
    """
    kind = type(error)
    try:
        module, name = str(kind.__module__), str(kind.__qualname__)
    except BaseException:  # a metaclass may do anything
        return "Exception"
    # Where a class of ours lies in the package may change with any release; what is stored must not.
    bare = module in {"builtins", "conveyor"} or module.startswith("conveyor.")
    return shorten(_STORED_NAMES.get(name, name) if bare else f"{module}.{name}", _NAME_BYTES)


def message(error: BaseException) -> str:
    """Return the text of an exception, at most 2 KiB of UTF-8, also when its `__str__` fails."""
    try:
        text = str(error)
    except BaseException as reason:  # a __str__ that raises SystemExit ends no worker either
        text = f"<no message: {type(reason).__name__} in __str__>"
    return shorten(text, MESSAGE_BYTES)


def shorten(text: str, most: int) -> str:
    """Return *text* as storable Unicode of at most *most* bytes in UTF-8; a longer one loses its middle."""
    if len(text) > most:
        # All that is cut below lies between these, and a gigabyte is not encoded first.
        text = text[:most] + text[-most:]
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= most:
        return data.decode()
    mark = b"\n[... cut ...]\n" if most >= TRACEBACK_BYTES else b" [...] "
    head = (most - len(mark)) // 2
    tail = most - len(mark) - head
    # A character halved by a cut is dropped.
    return f"{data[:head].decode(errors='ignore')}{mark.decode()}{data[-tail:].decode(errors='ignore')}"


def safe_exception(error: BaseException) -> BaseException:
    """Return *error*, or an ordinary exception that names it when `isinstance` on it raises."""
    try:
        isinstance(error, (Exception, type(None)))
    except BaseException as reason:
        stand_in = RuntimeError(f"{type_name(error)}, whose __class__ raises {type_name(reason)}")
        return stand_in.with_traceback(error.__traceback__)
    return error


class FailureLog:
    """
    Logs failures to *logger*, a line each, with the traceback of the user's frames.

    Of failures that repeat (the same class from the same line) the traceback is logged once a minute, and the lines between
    count them. A `RetryIn` that is retried is a line alone, unless it was raised because of another exception.
    """

    def __init__(self, logger: Logger, clock: Callable[[], float] = monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._seen: dict[tuple[str, str, int], tuple[float, int]] = {}
        """Class, file and line → when its traceback was logged last, and how many came since."""

    def log(self, level: int, text: str, *arguments: Any, error: BaseException, hide: Hide | None = None) -> None:
        """
        Log *error*; without the traceback when it cannot be formatted. Never raises for the sake of *error*.

        With *hide*, which takes values out of texts, the traceback is a part of the text.
        """
        if hide is not None:
            arguments = tuple(hide(one) if isinstance(one, str) else one for one in arguments)
        if type(error) is RetryIn and level < ERROR and error.__cause__ is None and error.__context__ is None:
            self._logger.log(level, text, *arguments)
            return
        elsewhere = _told_by_process(error)
        shown = users_frames(error.__traceback__) if elsewhere is None else None
        place = _place(shown) if elsewhere is None else (elsewhere, 0)
        key, now = (type_name(error), *place), self._clock()
        at, repeated = self._seen.get(key, (-REPEAT_AFTER, 0))
        if now - at < REPEAT_AFTER:
            self._seen[key] = (at, repeated + 1)
            self._logger.log(level, text + " (as before: %d since its traceback)", *arguments, repeated + 1)
            return
        if len(self._seen) >= _MOST_PLACES:
            self._seen.clear()
        self._seen[key] = (now, 0)
        if hide is not None:
            self._logger.log(level, text + "\n%s", *arguments, hide(_traceback(error)).rstrip())
            return
        try:
            self._logger.log(level, text, *arguments, exc_info=(type(error), error, shown))
        except BaseException as reason:  # the methods of an exception are the caller's code
            self._logger.log(level, text + "\n<no traceback: %s while it was formatted>", *arguments, type_name(reason))


def users_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return *traceback* from the first frame that is neither ours nor of asyncio; whole when there is none."""
    at = traceback
    while at is not None and at.tb_frame.f_code.co_filename.startswith(_PASSED_ON):
        at = at.tb_next
    return traceback if at is None else at


def is_own(file: str) -> bool:
    """Tell whether a file is of the user's own code, by its path."""
    return _LIBRARY.search(file) is None


def frame_text(file: str, line: int, function: str) -> str:
    """Return a frame as it is stored and shown: ``app/mail.py:42 send``."""
    path = "/".join(file.replace("\\", "/").rsplit("/", 2)[-2:])
    return shorten(f"{path}:{line} {function}", FRAME_BYTES)


def _own_frame(error: BaseException) -> str:
    """
    Return the innermost frame of the user's own code in the traceback of *error*; "" without one.

    Of a group it is that of its first error, since the group itself comes from where the tasks were waited for.
    """
    told = _told_by_process(error, "conveyor_frame")
    if told is not None:
        return told
    frames = list[TracebackType]()
    try:
        if isinstance(error, BaseExceptionGroup) and (first := _own_frame(error.exceptions[0])):
            return first
        at = error.__traceback__
        while at is not None:
            frames.append(at)
            at = at.tb_next
        for one in reversed(frames):
            code = one.tb_frame.f_code
            if is_own(code.co_filename):
                return frame_text(code.co_filename, one.tb_lineno or 0, code.co_name)
    except BaseException:  # the attributes of an exception are the caller's code
        return ""
    return ""


def _told_by_process(error: BaseException, name: str = "conveyor_traceback") -> str | None:
    """Return the traceback of the process that raised *error*, since the one here shows only its arrival; else None."""
    try:
        text = getattr(error, name, None)
    except BaseException:  # the methods of an exception are the caller's code
        return None
    return text if isinstance(text, str) else None


def _place(traceback: TracebackType | None) -> tuple[str, int]:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return ("", 0) if traceback is None else (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)


def _traceback(error: BaseException) -> str:
    try:
        text = _told_by_process(error)
        if text is None:
            text = "".join(TracebackException(type(error), error, users_frames(error.__traceback__)).format())
    except BaseException as reason:  # notes, causes and groups are the caller's objects too
        text = f"<no traceback: {type(reason).__name__} while it was formatted>"
    return shorten(text, TRACEBACK_BYTES)
