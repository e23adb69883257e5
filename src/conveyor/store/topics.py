"""
Topics: which queues subscribe to what, and a publish to all of them.

The registry lies in one slot. A publish on a single server is one step over the queues of all subscribers. In a cluster it
stores the copy of one queue, and the others in that queue's outbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.ids import new_identity
from conveyor.store import operations
from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import AS_DECLARED, argument_of
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.script import Argument, Call, Command, Script

PUBLISH, SUBSCRIBE, SUBSCRIBERS, HGETALL = (
    Script("publish"),
    Script("subscribe"),
    Script("subscribers"),
    Script("HGETALL"),
)


class TopicKeys:
    """The keys of all topics of a namespace. "/" is in no name of a queue, so the tag is of no queue."""

    __slots__ = ("counts", "prefix", "registry")

    def __init__(self, namespace: str) -> None:
        self.prefix = prefix = f"{namespace}:{{/topics}}:"
        self.registry = prefix + "registry"
        self.counts = prefix + "counts"

    def lane(self, producer: str) -> str:
        """Return the key of the number and reply of the last publish in a producer's sequence."""
        return f"{self.prefix}lane:{producer}"


class Subscribers(msgspec.Struct, frozen=True):
    """The queues that subscribe to a topic, and the version of the registry that says so."""

    version: str = ""
    queues: tuple[str, ...] = ()


class SubscribersChanged(Exception):
    """Others subscribe than the publisher knew: nothing was stored. `now` are those."""

    def __init__(self, now: Subscribers) -> None:
        super().__init__(now)
        self.now = now


class TopicCopies(msgspec.Struct):
    """The copies for one queue or partition. Copies with the same *entries* travel once."""

    keys: QueueKeys
    entries: list[Entry]
    max_length: int = AS_DECLARED


def subscribe(keys: TopicKeys, pattern: str, queues: Sequence[str]) -> Call[int]:
    """Return the call that subscribes *queues*; it yields how many did not before."""
    return Call(SUBSCRIBE, (keys.registry,), ("add", pattern, new_identity(), *queues), int)


def unsubscribe(keys: TopicKeys, pattern: str, queues: Sequence[str]) -> Call[int]:
    """Return the call that ends subscriptions; it yields how many there were."""
    return Call(SUBSCRIBE, (keys.registry,), ("remove", pattern, new_identity(), *queues), int)


def leave(keys: TopicKeys, queue: str) -> Call[int]:
    """Return the call that ends all subscriptions of *queue*; it yields how many there were."""
    return Call(SUBSCRIBE, (keys.registry,), ("leave", "", new_identity(), queue), int)


def subscribers(keys: TopicKeys, topic: str, count: int = 0) -> Call[Subscribers]:
    """Return the call that finds the subscribers of *topic*, and counts *count* messages that are about to be published."""
    return Call(SUBSCRIBERS, (keys.registry, keys.counts), (topic, str(count)), _read_subscribers)


def _read_subscribers(reply: list[bytes]) -> Subscribers:
    version, *queues = (one.decode() for one in reply)
    return Subscribers(version, tuple(queues))


def patterns(keys: TopicKeys) -> Call[dict[str, list[str]]]:
    """Return the call that reads all patterns, each with the queues that subscribe to it."""
    return Command(HGETALL, (keys.registry,), (), _read_patterns)


def counts(keys: TopicKeys) -> Call[dict[str, tuple[int, int]]]:
    """
    Return the call that reads how many messages were published to each topic, and of these how many to nobody.

    The name "" stands for all topics beyond the first 10,000.
    """
    return Command(HGETALL, (keys.counts,), (), _read_counts)


def _pairs(reply: Any) -> list[tuple[str, str]]:
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return [(name.decode(), value.decode()) for name, value in items]


def _read_patterns(reply: Any) -> dict[str, list[str]]:
    return {name[1:]: queues.split() for name, queues in sorted(_pairs(reply)) if name.startswith("=")}


def _read_counts(reply: Any) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, number in sorted(_pairs(reply)):
        published, nobody = found.get(name[1:], (0, 0))
        found[name[1:]] = (int(number), nobody) if name[0] == "+" else (published, int(number))
    return found


def publish(
    keys: TopicKeys, sequence: ProducerSequence, topic: str, version: str, count: int, copies: Sequence[TopicCopies]
) -> Call[list[list[str]]]:
    """
    Return the call that stores all *copies* of *count* messages on a single server, or nothing.

    It yields the ids of each queue's copies, `NewQueueIds` where the queue was new in Redis. Raises SubscribersChanged.
    """
    names = (keys.lane(sequence.identity), keys.registry, keys.counts, keys.registry)
    return _publish(names, sequence, (topic, version, str(count)), copies, ())


def publish_from(
    sequence: ProducerSequence, topic: str, copies: TopicCopies, others: Sequence[bytes]
) -> Call[list[list[str]]]:
    """Return the call that stores the copies of one queue, and the *others* in its outbox; it yields what `publish` does."""
    keys = copies.keys
    names = (keys.lane(sequence.identity), keys.none, keys.none, keys.outbox)
    return _publish(names, sequence, (topic, "-", "0"), [copies], others)


def _publish(
    names: tuple[str, ...], sequence: ProducerSequence, about: tuple[str, str, str], copies: Sequence[TopicCopies],
    others: Sequence[bytes],
) -> Call[list[list[str]]]:  # fmt: skip
    number = str(sequence.next())
    blocks: dict[int, tuple[int, list[str | None]]] = {}  # by the identity of the list of entries
    texts: list[Argument] = []
    queues: list[Argument] = []
    ids: list[list[str | None]] = []
    for one in copies:
        if (block := blocks.get(id(one.entries))) is None:
            arguments, found = operations.push_arguments("", one.keys, one.entries, 0)
            block = blocks[id(one.entries)] = (len(blocks) + 1, found)
            texts += (str(len(arguments) - 3), *arguments[3:])
        queues += (argument_of(one.max_length), str(one.keys.partitions), str(block[0]))
        ids.append(block[1])
    args = (number, *about, str(len(blocks)), *texts, *queues, *others)
    decode = partial(_published, number, [one.keys for one in copies], ids)
    return Call(PUBLISH, (*names, *(one.keys.jobs for one in copies)), args, decode, operations.WITHDRAW)


def _published(number: str, queues: list[QueueKeys], ids: list[list[str | None]], reply: bytes) -> list[list[str]]:
    first, *rest = reply.split(b"\f") if isinstance(reply, bytes) else [b""]
    status, *words = operations.status_of(number, first)
    if status == "ok":
        return [
            operations.accepted_ids(answer.decode().split("\n")[1:], own) for answer, own in zip(rest, ids, strict=True)
        ]
    if status == "changed":
        raise SubscribersChanged(Subscribers(words[0], tuple(filter(None, words[1:]))))
    if status.startswith("refused "):
        operations.refused(queues[int(status.partition(" ")[2]) - 1], words)
    raise operations.StalePush


def checked_pattern(name: object) -> str:
    """
    Check the name of a topic or a pattern, and return it. Raises ConfigurationError.

    Words stand between points. In a pattern `*` is one word, and `#` at the end any number of words, also none.
    """
    words = name.split(".") if isinstance(name, str) else []
    for at, word in enumerate(words):
        if word != "*" and not (word == "#" and at == len(words) - 1) and not _is_word(word):
            break
    else:
        if words and len(str(name)) <= 128 and words != ["#", ""]:
            return str(name)
    raise ConfigurationError(
        f"Invalid topic {name!r}: write words of A-Z a-z 0-9 _ : - with points between them, 128 characters at most, as in "
        "'user.created'. In a pattern '*' stands for one word and '#', as the last, for any number of words. Nothing was stored."
    )


def _is_word(word: str) -> bool:
    return word.isascii() and bool(word) and word.replace("_", "a").replace(":", "a").replace("-", "a").isalnum()


def is_pattern(name: str) -> bool:
    """Tell whether *name* has wildcards."""
    return "*" in name or "#" in name
