"""
The names of all keys, in one place.

All keys of a queue have the same hash tag, the queue's name, so each step is one script in one slot of a cluster. Three
keys have no tag: `<namespace>:queues`, the set of known queues, `<namespace>:expiring`, those of them that go when nobody uses
them, and `<namespace>:outboxes`, that of database outboxes.
"""

from __future__ import annotations

import re
from typing import Literal

from conveyor.errors import ConfigurationError

_NAMESPACE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
PRIORITIES = 10


def known_queues(namespace: str) -> str:
    """Return the key of the set of known queues."""
    return f"{namespace}:queues"


def expiring_queues(namespace: str) -> str:
    """Return the key of the sorted set of queues that go when nobody uses them: when to look next whether one is gone."""
    return f"{namespace}:expiring"


def database_outboxes(namespace: str) -> str:
    """Return the key of the set of database tables whose rows are delivered to this namespace."""
    return f"{namespace}:outboxes"


def check_namespace(namespace: str) -> str:
    """Return *namespace* if it is valid; raises ConfigurationError."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise ConfigurationError(f"Invalid namespace {namespace!r}: use 1 to 64 characters out of A-Z a-z 0-9 _ . : -")
    return namespace


def queue_key(namespace: str, queue: str, name: Literal["jobs", "workers", "conf"]) -> str:
    """Return one key of a queue that is no plain list, by which a script that reads many queues names each."""
    return f"{namespace}:{{{queue}}}:{name}"


class QueueKeys:
    """
    The keys of one queue.

    Args:
        foreign: the plain list that this queue shares with other programs, None for an ordinary queue. A list that has a
            hash tag of its own lends it to the other keys.
        partitions: the number of partitions that this program declares for the queue. Scripts refuse any other.
        expires: the ms after which the queue goes when nobody uses it, as this program declares it; 0: it stays.
        events_kept: the number of events that the queue keeps, as this program declares it; 0: none, None: not said.
    """

    __slots__ = (
        "conf", "dead", "due", "events", "events_kept", "expires", "foreign", "intake", "jobs", "none", "outbox", "partitions",
        "prefix", "queue", "ready", "recent", "room", "state", "upkeep", "waiters", "wake", "workers",
    )  # fmt: skip

    def __init__(
        self, namespace: str, queue: str, *, foreign: str | None = None, partitions: int = 1, expires: int = 0,
        events_kept: int | None = None,
    ) -> None:  # fmt: skip
        self.queue = queue
        self.expires = expires
        self.events_kept = events_kept
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
        self.upkeep = prefix + "upkeep"
        self.room = prefix + "room"
        self.events = prefix + "events"
        # Never exists. A script that touches keys which its call does not name, names this one besides: while the slot moves to
        # another node of a cluster, the server then refuses the whole call (TRYAGAIN), and not a command amid the script.
        self.none = prefix + "none"
        self.ready = tuple(f"{prefix}ready:{priority}" for priority in range(PRIORITIES))

    @property
    def event_readers(self) -> str:
        """The key of the sorted set of the channels of processes that read the events."""
        return self.prefix + "event-readers"

    @property
    def schedules(self) -> str:
        """The key of the set of the names of schedules whose jobs go to this queue."""
        return self.prefix + "schedules"

    def schedule(self, name: str) -> str:
        """Return the key of the hash of one schedule."""
        return f"{self.prefix}schedule:{name}"

    @property
    def unique_lead(self) -> str:
        """The first part of the key of a unique key; the text of that follows."""
        return self.prefix + "unique:k:"

    def leased(self, worker: str) -> str:
        """Return the key of the hash of the jobs that *worker* has leased."""
        return f"{self.prefix}leased:{worker}"

    def wake_of(self, worker: str) -> str:
        """Return the key of the list whose tokens wake one busy worker."""
        return f"{self.prefix}wake:{worker}"

    def answer(self, command: str) -> str:
        """Return the key of the answer to one command to a worker."""
        return f"{self.prefix}answer:{command}"

    def tag(self, tag: str) -> str:
        """Return the key of the sorted set of the ids that have a tag."""
        return f"{self.prefix}tag:{tag}"

    def lane(self, producer: str) -> str:
        """Return the key `lane:<producer>`: number and reply of the last push in a producer's sequence."""
        return f"{self.prefix}lane:{producer}"

    def inbox(self, source: str) -> str:
        """Return the key of the number and reply of the last delivery from the outbox of queue *source*."""
        return f"{self.prefix}inbox:{source}"

    def reply_channel(self, process: str) -> str:
        """Return the channel on which a process of the same namespace is notified of the results it awaits."""
        return reply_channel(self.prefix.partition(":{")[0], process)

    def result(self, id: str) -> str:  # noqa: A002
        """Return the key of the outcome of a job that has a key of its own."""
        return f"{self.prefix}result:{id}"

    def logs(self, id: str) -> str:  # noqa: A002
        """Return the key of the list of what a job has logged."""
        return f"{self.prefix}logs:{id}"

    def stream(self, id: str) -> str:  # noqa: A002
        """Return the key of the stream of a job's partial results."""
        return f"{self.prefix}stream:{id}"

    def result_window(self, id: str) -> str:  # noqa: A002
        """Return the key of the hash that has the outcome of a job otherwise, with those of ids of the same 64 ms."""
        return f"{self.prefix}results:{id[:7]}"


def _foreign_prefix(namespace: str, name: str) -> str:
    """
    Return the prefix of the keys beside a plain list, which must be in the same slot as the list.

    A list without braces hashes as a whole, so its name becomes the tag. A list with a tag lends it.
    """
    tag = re.search(r"\{([^}]+)\}", name)
    if tag is not None:
        return f"{namespace}:{{{tag[1]}}}:{name}:"
    if "{" in name or "}" in name:
        raise ConfigurationError(f"The list name {name!r} has braces that form no hash tag. Rename the list.")
    return f"{namespace}:{{{name}}}:"


def reply_channel(namespace: str, process: str) -> str:
    """Return the channel on which one process is notified of the results it awaits."""
    return f"{namespace}:replies:{process}"
