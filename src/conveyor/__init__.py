"""Conveyor: messages and background jobs on Redis, nothing lost in between. These are the public names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conveyor.errors import (
        BatchFailed,
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
        RetryIn,
        Snooze,
        StoreUnavailable,
        UnknownTask,
    )
    from conveyor.jobs.app import Conveyor
    from conveyor.jobs.context import Context, current
    from conveyor.jobs.dependencies import Depends
    from conveyor.jobs.hooks import CallNext, Middleware
    from conveyor.jobs.job import Job
    from conveyor.jobs.task import Task
    from conveyor.jobs.uniqueness import Debounce, Throttle, Unique
    from conveyor.jobs.webhooks import Webhook
    from conveyor.jobs.why import Why
    from conveyor.messaging.limits import Concurrency, Rate
    from conveyor.messaging.message import Message
    from conveyor.messaging.plain_list import PlainList
    from conveyor.messaging.push_options import Outgoing
    from conveyor.messaging.queue import Queue
    from conveyor.messaging.retry import Retry
    from conveyor.messaging.topic import Topic, TopicInfo
    from conveyor.payload.blobs import BlobStore, BlobUnavailable, FileStore
    from conveyor.payload.formats import Format
    from conveyor.store.client.buffer import Buffer

__all__ = [
    "BatchFailed",
    "BlobStore",
    "BlobUnavailable",
    "Buffer",
    "CallNext",
    "Concurrency",
    "ConfigurationError",
    "Context",
    "Conveyor",
    "ConveyorError",
    "Debounce",
    "Depends",
    "Duplicate",
    "DurabilityNotReached",
    "FileStore",
    "Format",
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
    "RetryIn",
    "Snooze",
    "StoreUnavailable",
    "Task",
    "Throttle",
    "Topic",
    "TopicInfo",
    "Unique",
    "UnknownTask",
    "Webhook",
    "Why",
    "current",
]

# Where each name is, apart from the errors: loaded at its first use, so that importing the package costs nothing.
_HOME = {
    "BlobStore": "payload.blobs",
    "BlobUnavailable": "payload.blobs",
    "Buffer": "store.client.buffer",
    "CallNext": "jobs.hooks",
    "Concurrency": "messaging.limits",
    "Context": "jobs.context",
    "Conveyor": "jobs.app",
    "Debounce": "jobs.uniqueness",
    "Depends": "jobs.dependencies",
    "FileStore": "payload.blobs",
    "Format": "payload.formats",
    "Job": "jobs.job",
    "Message": "messaging.message",
    "Middleware": "jobs.hooks",
    "Outgoing": "messaging.push_options",
    "PlainList": "messaging.plain_list",
    "Queue": "messaging.queue",
    "Rate": "messaging.limits",
    "Retry": "messaging.retry",
    "Task": "jobs.task",
    "Throttle": "jobs.uniqueness",
    "Topic": "messaging.topic",
    "TopicInfo": "messaging.topic",
    "Unique": "jobs.uniqueness",
    "Webhook": "jobs.webhooks",
    "Why": "jobs.why",
    "current": "jobs.context",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from conveyor.jobs.hints import PACKAGE_NAMES, no_member

        error = no_member("The package conveyor", name, PACKAGE_NAMES)
        # `from conveyor import …` replaces the text of an AttributeError by its own, and lets an ImportError through.
        raise ImportError(str(error)) if name in PACKAGE_NAMES else error
    found = getattr(import_module(f"conveyor.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
