"""What a worker needs to know of a task, laid out for the hot path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError, PayloadError

if TYPE_CHECKING:
    from conveyor.signature import Signature
    from conveyor.task import Task

BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 3_600_000)
"""Upper bounds of the duration histogram; the last field counts what took longer."""


Decode = Callable[[bytes], tuple[list[Any], dict[str, Any]]]


def _decode_entry(signature: Signature) -> Decode:
    """
    Return how an entry of a plain list becomes arguments: an object's members by name, as from `enqueue`.

    What does not fit so is the one argument of a task that has one.
    """
    (name, *others) = signature.parameters or ("",)

    def decode(body: bytes) -> tuple[list[Any], dict[str, Any]]:
        try:
            return signature.decode(body)
        except PayloadError:
            if others or not name:
                raise
            return signature.decode(b'{"%b":%b}' % (name.encode(), body))

    return decode


class Handler:
    """A task as one consumer runs it, with its counters since the last turn."""

    __slots__ = (
        "buckets", "decode", "done", "early", "failed", "function", "injected", "kind", "name", "retried", "run_ms",
        "stores", "task", "timeout", "unfit",
    )  # fmt: skip

    def __init__(self, task: Task[Any, Any], *, raw: bool = False) -> None:
        """Look everything up once; *raw* for the entries of a plain list, written by programs that know no parameters."""
        self.task = task
        self.name = task.name
        self.unfit: ConveyorError | None = None
        self.function = task.function
        self.kind: str = task.run_in
        self.decode: Decode = _decode_entry(task.signature) if raw else task.signature.decode
        self.injected = task.signature.injected
        self.timeout: float | None = None if task.settings.timeout_ms is None else task.settings.timeout_ms / 1000
        self.early = task.settings.ack == "early"
        self.stores = not task.returns_none
        self.done = self.failed = self.retried = 0
        self.run_ms = 0.0
        self.buckets: dict[int, int] = {}

    @classmethod
    def unknown(cls, name: str, unfit: ConveyorError | None = None) -> Handler:
        """Return the handler of a job nobody here can run: why not is *unfit*, or that nobody knows the task."""
        found = cls.__new__(cls)
        found.name, found.kind, found.unfit = name, "unknown", unfit
        found.early = found.stores = False
        found.done = found.failed = found.retried = 0
        found.timeout = None
        return found

    def count_done(self, seconds: float) -> None:
        """Count a success that ran for *seconds*."""
        self.done += 1
        ms = seconds * 1000
        self.run_ms += ms
        bucket = 0 if ms <= 5 else bisect_left(BUCKETS_MS, ms)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def drain(self, into: dict[str, int]) -> None:
        """Move the counters into *into*, as fields of this minute's hash."""
        name = self.name
        if self.done:
            into["done:" + name] = self.done
            into["ms:" + name] = round(self.run_ms)
            for bucket, count in self.buckets.items():
                into[f"le{bucket}:{name}"] = count
            self.buckets = {}
            self.done, self.run_ms = 0, 0.0
        if self.failed:
            into["failed:" + name] = self.failed
            self.failed = 0
        if self.retried:
            into["retried:" + name] = self.retried
            self.retried = 0
