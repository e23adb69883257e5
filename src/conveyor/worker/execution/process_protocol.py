"""
The messages between a worker and its processes for single jobs, as frames, and how an exception travels in them.

An exception travels as text and names, never pickled. It arrives as an instance of a class made for it, below those of
the original's classes that the worker has loaded anyway. So `except`, `isinstance` and a retry policy see what they would
have seen; attributes do not travel.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import msgspec

from conveyor.errors import ConveyorError, RateLimited, RetryIn, Snooze
from conveyor.messaging.retry import Retry, wait_of
from conveyor.payload import failures

HEAD = struct.Struct("<I")
"""Before each frame: the number of its bytes."""


class StartRequest(msgspec.Struct, tag="start"):
    """
    To the process, once: what to load, the path of modules, and the limits above which it is replaced.

    `modules` names the modules of tasks that the app may not import itself.
    """

    app: str
    modules: dict[str, str]
    path: list[str]
    verbose: bool
    max_jobs: int
    max_memory: int | None


class RunRequest(msgspec.Struct, tag="job"):
    """
    To the process: one attempt. `body` is the arguments' raw JSON. `keep_ms` None: that of the task.

    `items` are the jobs of a batch, whose `body` is empty. `timeout_ms`: the time limit that the process itself keeps.
    """

    task: str
    body: bytes
    id: str
    queue: str
    attempt: int
    headers: dict[str, str]
    keep_ms: int | None
    enqueued_ms: int | None
    due_ms: int | None = None
    items: list[RunRequest] = []
    tags: list[str] = []
    costs: dict[str, str] = {}
    notes: dict[str, Any] = {}
    keeps_logs: bool = True
    timeout_ms: int | None = None


class ReadyReply(msgspec.Struct, tag="ready"):
    """From the process: the app is loaded."""


class ExtendRequest(msgspec.Struct, tag="extend"):
    """From the process: the running job asks for a deadline that many ms ahead."""

    ms: int
    id: str
    attempt: int


class EmitRequest(msgspec.Struct, tag="emit"):
    """From the process: a partial result of the running job, or of an item of its batch, encoded."""

    data: bytes
    id: str
    attempt: int
    item: int | None = None


class LiveReply(msgspec.Struct, tag="live"):
    """
    From the process: what the running job, or one of a batch, said of itself: done, total and text, and its notes as JSON.

    None: nothing new. `lines` are those that it logged since; of a batch they are of all its items.
    """

    id: str
    attempt: int
    progress: tuple[float | None, float | None, str] | None = None
    notes: bytes | None = None
    lines: list[tuple[int, str, str, str]] = []


class DoneReply(msgspec.Struct, tag="done"):
    """
    From the process: the job's result as JSON (None if none is stored), and the entries of the jobs it spawned.

    `worn` says why the process is to be replaced; empty while it is not. `charges` are the true costs that the job told.
    """

    id: str
    attempt: int
    result: bytes | None
    spawned: list[bytes] = []
    worn: str = ""
    charges: dict[str, int] = {}


class FailedReply(msgspec.Struct, tag="failed"):
    """
    From the process: the exception that the job raised, or the loading of the app, which has no id.

    `kinds` are its class and all above it as ``module:qualified.name``. `delay` is that of a Snooze, a RetryIn or a
    RateLimited. `worn` and `charges` as in `DoneReply`. `unable`: the job did not run, since the process cannot run it.
    """

    kinds: list[str]
    message: str
    traceback: str
    frame: str = ""
    code: str | None = None
    delay: float | str | None = None
    worn: str = ""
    id: str = ""
    attempt: int = 0
    unable: bool = False
    charges: dict[str, int] = {}


class BatchReply(msgspec.Struct, tag="batch"):
    """
    From the process: how the items of a batch ended, by their index in the request: results, errors, jobs that they spawned,
    true costs.

    `worn` as in `DoneReply`. What failed for all items alike is a `FailedReply`.
    """

    id: str
    attempt: int
    results: list[bytes | None]
    errors: dict[int, FailedReply]
    spawned: dict[int, list[bytes]]
    worn: str = ""
    charges: dict[int, dict[str, int]] = {}


Request = StartRequest | RunRequest
Reply = ReadyReply | ExtendRequest | EmitRequest | LiveReply | DoneReply | FailedReply | BatchReply

_encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
read_request, read_reply = _requests.decode, _replies.decode


def pack(message: Request | Reply) -> bytes:
    """Return *message* as one frame."""
    data = _encode(message)
    return HEAD.pack(len(data)) + data


# Raised out of a coroutine, these do not mean that the job failed.
_UNRAISABLE = (StopIteration, StopAsyncIteration)


def capture(error: BaseException) -> FailedReply:
    """Return *error* as it travels."""
    record = failures.describe(error, 0, 0, "")
    return FailedReply(
        kinds=[_name(kind) for kind in type.mro(type(error)) if kind is not object],
        message=record.message,
        traceback=record.traceback,
        frame=record.frame,
        code=str(error.code) if isinstance(error, ConveyorError) else None,
        delay=_delay(error),
    )


def _delay(error: BaseException) -> float | str | None:
    """Return how long *error* says to wait; None where it says nothing, or nothing that is a duration."""
    if not isinstance(error, Snooze | RetryIn | RateLimited) or wait_of(error) is None:
        return None
    given = error.after if isinstance(error, RateLimited) else error.delay
    return given.total_seconds() if isinstance(given, timedelta) else given


def rebuild(failed: FailedReply, policy: Retry) -> Exception:
    """
    Return the exception of *failed*, without running code of its class and without importing anything.

    Its base classes are those that *policy* names or that are loaded here. One that would end a program (SystemExit) is
    an Exception of that name here.
    """
    if failed.delay is not None:
        return next(kind for kind in (RetryIn, RateLimited, Snooze) if _name(kind) in failed.kinds)(failed.delay)
    kind = _make_class(failed.kinds, _loaded_classes(failed.kinds, policy))
    native: Any = next(one for one in kind.__mro__ if one.__module__ == "builtins" and issubclass(one, BaseException))
    group = issubclass(native, BaseExceptionGroup)
    arguments = (failed.message, [Exception(failed.message)]) if group else (failed.message,)
    error: Exception = native.__new__(kind, *arguments)
    attributes: dict[str, Any] = {
        "conveyor_text": failed.message,
        "conveyor_traceback": failed.traceback,
        "conveyor_frame": failed.frame,
        "__notes__": [f"In the process of the job:\n{failed.traceback}"],
    }
    if failed.code is not None:
        attributes["code"] = failed.code
    for name, value in attributes.items():
        object.__setattr__(error, name, value)  # a frozen dataclass can be an exception too
    return error


class _RemoteException:
    """The first base of every rebuilt exception. It has the text that the skipped `__init__` would have set."""

    conveyor_text: str
    conveyor_traceback: str
    conveyor_frame: str

    def __init_subclass__(cls) -> None:
        pass  # that of the other bases may want arguments

    def __str__(self) -> str:
        return self.conveyor_text

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({self.conveyor_text!r})"


def _loaded_classes(names: Iterable[str], policy: Retry) -> list[type[Exception]]:
    """Return the loaded classes of those names, without those that are bases of another of them."""
    known: dict[str, type] = {}
    for given in (policy.on, policy.give_up):
        for named in given if isinstance(given, tuple) else (given,):
            known.setdefault(_name(named), named)
    found: list[type[Exception]] = []
    for name in names:
        kind: type | None = known.get(name) or _loaded_class(name)
        if kind is None or not issubclass(kind, Exception) or issubclass(kind, _UNRAISABLE):
            continue
        if not any(issubclass(one, kind) for one in found):
            found.append(kind)
    return found or [Exception]


def _make_class(names: list[str], bases: list[type[Exception]]) -> type[Exception]:
    module, _, qualified = names[0].partition(":")
    attributes = {"__module__": module, "__qualname__": qualified}
    for possible in (bases, bases[:1], [Exception]):
        try:
            return type(qualified.rpartition(".")[2], (_RemoteException, *possible), attributes)
        except Exception:  # noqa: S112  a metaclass, or a class that allows none below it
            continue
    raise AssertionError("a class below Exception can always be made")


def _loaded_class(name: str) -> type | None:
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        # Not getattr: a module may import what it is asked for.
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and _name(found) == name else None


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
