"""Conveyor: messages and background jobs on Redis, nothing lost in between. These are the public names."""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from conveyor import provider

if TYPE_CHECKING:
    from conveyor.app import Conveyor
    from conveyor.context import Context, current
    from conveyor.errors import (
        ConfigurationError,
        ConveyorError,
        Duplicate,
        DurabilityNotReached,
        JobCancelled,
        JobFailed,
        JobNotFound,
        LeaseLost,
        PayloadError,
        QueueFull,
        RateLimited,
        ResultExpired,
        Snooze,
        StoreUnavailable,
        UnknownTask,
    )
    from conveyor.job import Job
    from conveyor.limit import Concurrency, Debounce, Rate, Unique
    from conveyor.message import Message
    from conveyor.middleware import Middleware
    from conveyor.outcome import Retry
    from conveyor.outgoing import Outgoing
    from conveyor.plain import PlainList
    from conveyor.queue import Queue
    from conveyor.store.buffer import Buffer
    from conveyor.task import Task

__all__ = [
    "Buffer",
    "Concurrency",
    "ConfigurationError",
    "Context",
    "Conveyor",
    "ConveyorError",
    "Debounce",
    "Duplicate",
    "DurabilityNotReached",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobNotFound",
    "LeaseLost",
    "Message",
    "Middleware",
    "Outgoing",
    "PayloadError",
    "PlainList",
    "Queue",
    "QueueFull",
    "Rate",
    "RateLimited",
    "ResultExpired",
    "Retry",
    "Snooze",
    "StoreUnavailable",
    "Task",
    "Unique",
    "UnknownTask",
    "current",
]

# Where each name is, apart from the errors: loaded at its first use, so that importing the package costs nothing.
_HOME = {
    "Buffer": "store.buffer",
    "Concurrency": "limit",
    "Context": "context",
    "Conveyor": "app",
    "Debounce": "limit",
    "Job": "job",
    "Message": "message",
    "Middleware": "middleware",
    "Outgoing": "outgoing",
    "PlainList": "plain",
    "Queue": "queue",
    "Rate": "limit",
    "Retry": "outcome",
    "Task": "task",
    "Unique": "limit",
    "current": "context",
}

provider.embedded_worker = partial(import_module, "conveyor.worker.embedded")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'conveyor' has no attribute {name!r}")
    found = getattr(import_module(f"conveyor.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
