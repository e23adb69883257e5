"""
Every key name, in one place.

All keys of a queue carry the same hash tag, the queue's name, so each step is one script
on one slot of a cluster. Only `<namespace>:queues`, the set of known queues, has no tag.
"""

from __future__ import annotations

import re

from conveyor.errors import ConfigurationError

_NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
PRIORITIES = 10


def known_queues(namespace: str) -> str:
    """Return the key of the set of known queues."""
    return f"{namespace}:queues"


def check_namespace(namespace: str) -> str:
    """Return a usable namespace; raises ConfigurationError."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise ConfigurationError(f"Invalid namespace {namespace!r}: use 1 to 64 characters out of A-Z a-z 0-9 _ . : -")
    return namespace


class QueueKeys:
    """The keys of one queue; `tag` is another hash tag than the queue's name for a foreign list that brings its own."""

    __slots__ = (
        "conf", "dead", "due", "foreign", "intake", "jobs", "outbox", "partitions", "prefix", "queue",
        "ready", "recent", "state", "waiters", "wake", "workers",
    )  # fmt: skip

    def __init__(self, namespace: str, queue: str, *, foreign: str | None = None, partitions: int = 1) -> None:
        """
        Name them all; *foreign* is the plain list this queue shares with other programs.

        *partitions* is how many this program believes the logical queue to have: scripts refuse another number.
        """
        self.queue = queue
        self.partitions = partitions
        self.foreign = foreign
        self.prefix = prefix = f"{namespace}:{{{queue}}}:" if foreign is None else _foreign_prefix(namespace, foreign)
        self.jobs = prefix + "jobs"
        self.state = prefix + "state"
        self.due = prefix + "due"
        self.workers = prefix + "workers"
        self.wake = prefix + "wake"
        self.conf = prefix + "conf"
        self.dead = prefix + "dead"
        self.recent = prefix + "recent"
        self.waiters = prefix + "waiters"
        self.intake = prefix + "intake"
        self.outbox = prefix + "outbox"
        self.ready = tuple(f"{prefix}ready:{priority}" for priority in range(PRIORITIES))

    def leased(self, worker: str) -> str:
        """Return the hash of what *worker* holds."""
        return f"{self.prefix}leased:{worker}"

    def wake_of(self, worker: str) -> str:
        """Return the list through which one busy worker is called."""
        return f"{self.prefix}wake:{worker}"

    def lane(self, producer: str) -> str:
        """Return the number and reply of a producer's last push."""
        return f"{self.prefix}lane:{producer}"

    def inbox(self, source: str) -> str:
        """Return the number and reply of what the outbox of the queue *source* last delivered here."""
        return f"{self.prefix}inbox:{source}"

    def result(self, id: str) -> str:  # noqa: A002
        """Return where the outcome of a job is kept."""
        return f"{self.prefix}result:{id}"


def _foreign_prefix(namespace: str, name: str) -> str:
    """
    Return the prefix of the keys beside a plain list: they must lie in the list's own slot.

    A list without braces hashes as a whole, so its name becomes our tag. One with a tag lends it.
    """
    tag = re.search(r"\{([^}]+)\}", name)
    if tag is not None:
        return f"{namespace}:{{{tag[1]}}}:{name}:"
    if "{" in name or "}" in name:
        raise ConfigurationError(f"The list name {name!r} has braces that form no hash tag. Rename the list.")
    return f"{namespace}:{{{name}}}:"


def reply_channel(namespace: str, process: str) -> str:
    """Return the channel on which one process hears of the results it awaits."""
    return f"{namespace}:replies:{process}"
