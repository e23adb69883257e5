"""
Topics: a message that is published reaches every queue that subscribes, as a message of that queue.

A publish is a program whose steps are pairs of a blocking and an awaitable call, so both forms carry out the same one. The
publisher knows who subscribes, and the server compares that in the step that stores the copies: a subscriber that was added
meanwhile gets its copy, and one that has left gets none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Unpack, cast

import msgspec

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError, PayloadError, StoreUnavailable
from conveyor.ids import new_identity, new_ids, public
from conveyor.messaging import outbox
from conveyor.messaging.partitions import RETRY_PAUSE, Partitions
from conveyor.messaging.push_options import (
    PreparedPush,
    PushMiddleware,
    TopicManyOptions,
    TopicOptions,
    amake_entries,
    each_of,
    for_topic,
    make_entries,
    pass_through,
    prepare_push,
    push_scope,
    with_sealing,
)
from conveyor.payload.codec import show
from conveyor.payload.formats import codec_for
from conveyor.payload.versions import check_version
from conveyor.store import inspection, operations, topics
from conveyor.store import partitions as partitioning
from conveyor.store.client.outages import FIRST_TRY
from conveyor.store.fork_safety import on_fork
from conveyor.store.max_length import AS_DECLARED
from conveyor.store.operations import Entry, NewQueueIds, ProducerSequence
from conveyor.store.partitions import PartitionCountMismatch
from conveyor.store.script import Step, StepProgram, adrive_steps, drive_steps
from conveyor.store.topics import Subscribers, SubscribersChanged, TopicCopies, TopicKeys, checked_pattern, is_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.messaging.queue import Queue
    from conveyor.payload.formats import FormatChoice, FormatCodec, FormatRegistry
    from conveyor.payload.pipeline import PayloadPipeline
    from conveyor.store.client.durability import Confirmation, Durability
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call

T = TypeVar("T")
logger = logging.getLogger("conveyor.queue")
CHUNK = 1000
"""Messages that one step publishes, at most."""
CHUNK_BYTES = 8_000_000
MOST_TOPICS = 10_000
"""Topics whose subscribers a program remembers, at most."""


class DeclaredQueues(outbox.OutboxRoutes, Protocol):
    """The queues of an app, as it has declared them."""

    @property
    def sealing(self) -> PayloadPipeline | None: ...
    @property
    def formats(self) -> FormatRegistry: ...
    @property
    def max_whole(self) -> int: ...
    @property
    def queues(self) -> Mapping[str, Queue[Any]]: ...
    @property
    def bounded(self) -> Mapping[str, Queue[Any]]: ...
    def admit_message(self, queue: str) -> None: ...


class TopicInfo(msgspec.Struct, frozen=True):
    """
    A topic or a pattern: the queues that subscribe to exactly this name, and what was published.

    `published` counts messages, `nobody` those of them that no queue subscribed to. The name "" stands for all topics beyond
    the first 10,000 that were published to.
    """

    name: str
    subscribers: tuple[str, ...] = ()
    published: int = 0
    nobody: int = 0


class TopicDirectory:
    """The part that all topics of one app share: who subscribes, as far as it is known here, and the sequences of its publishes."""

    def __init__(self, queues: DeclaredQueues, middlewares: Sequence[PushMiddleware] = ()) -> None:
        self.queues, self.client, self.middlewares = queues, queues.client, middlewares
        self.keys = TopicKeys(queues.client.namespace)
        self._subscribers: dict[str, Subscribers] = {}
        self._found: dict[str, Partitions | None] = {}
        self._sequences: deque[ProducerSequence] = deque()
        on_fork(self)

    def forked(self) -> None:
        """Start anew in a forked child, since the parent goes on with its sequences."""
        self._sequences = deque()

    # -- steps --------------------------------------------------------------------------------------------------------

    def run(self, call: Any) -> Step:
        """Return the step that carries out *call*."""
        return partial(self.client.run, call), partial(self.client.arun, call)

    def make(self, name: str, type: Any, *, version: int, format: FormatChoice | None) -> Topic[Any]:  # noqa: A002
        """Return a topic or a pattern. Raises ConfigurationError."""
        check_version(version, None, f"topic({checked_pattern(name)!r})")
        codec: FormatCodec[Any] = codec_for(
            type, formats=self.queues.formats.with_writer(format), max_payload=self.queues.max_whole,
            what=f"A message of topic '{name}'",
        )  # fmt: skip
        return Topic(name, self, codec, version)

    def read_all(self) -> list[TopicInfo]:
        """Return every name that queues subscribe to and every topic that was published to, sorted."""
        return cast("list[TopicInfo]", drive_steps(self._read_all()))

    async def aread_all(self) -> list[TopicInfo]:
        """Awaitable form of `read_all`."""
        return cast("list[TopicInfo]", await adrive_steps(self._read_all()))

    def _read_all(self) -> StepProgram:
        found = yield self.run(topics.patterns(self.keys))
        counts = yield self.run(topics.counts(self.keys))
        return [
            TopicInfo(name, tuple(found.get(name, ())), *counts.get(name, (0, 0))) for name in sorted({*found, *counts})
        ]

    def note(self, topic: str, now: Subscribers) -> None:
        """Note the subscribers of *topic*."""
        self._subscribers.pop(topic, None)
        self._subscribers[topic] = now
        if len(self._subscribers) > MOST_TOPICS:
            del self._subscribers[next(iter(self._subscribers))]

    def partitions(self, queue: str) -> Partitions | None:
        """Return the partitions of a queue: as it is declared here, else as Redis has said."""
        return self.queues.partitioned.get(queue) or self._found.get(queue)

    def look_up(self, queue: str) -> StepProgram:
        """Ask Redis for the number of partitions of a queue that was not declared here, or agree on that of one that was."""
        declared = self.queues.partitioned.get(queue)
        if declared is not None:
            yield declared.reclaim, declared.areclaim
            return
        deadline = time.monotonic() + self.client.retry_for
        while True:
            number, _ = yield self.run(partitioning.count(self.client.keys(queue)))
            if number:
                break
            if time.monotonic() >= deadline:
                raise PartitionCountMismatch(self.client.keys(queue), "0")
            yield partial(time.sleep, RETRY_PAUSE), partial(asyncio.sleep, RETRY_PAUSE)
        found = None if number == 1 else Partitions(self.client, queue, number)
        self._found[queue] = found
        if found is not None:
            yield found.reclaim, found.areclaim

    # -- publishing ---------------------------------------------------------------------------------------------------

    def store(
        self, topic: str, bodies: Sequence[bytes], options: Sequence[PreparedPush], values: Sequence[Any], version: int
    ) -> StepProgram:
        """Publish messages, each with its options and value, in one step; return the public ids of each one's copies."""
        own, counted, mismatches = options[0].id, 0, 0
        message_ids = [own] if own is not None else new_ids(len(bodies))
        at_once = self.client.has_one_endpoint
        while True:
            known = self._subscribers.get(topic) if at_once else None
            # Also before a name is made known: what is remembered may name a queue that was deleted.
            if known is None or not all(self.client.is_announced(self.client.keys(queue)) for queue in known.queues):
                counts = 0 if at_once else len(bodies) - counted
                known = yield self.run(topics.subscribers(self.keys, topic, counts))
                assert known is not None
                self.note(topic, known)
                counted += counts
            if not (known.queues or at_once):
                return [[] for _ in bodies]
            copies = yield from self._copies(known.queues, message_ids, bodies, options, values, version)
            try:
                request = options[0].durability_request
                asked = None if request is None else request.applied_to(None)
                if at_once:
                    stored = yield from self._store_in_all(topic, known, len(bodies), copies, asked)
                else:
                    stored = yield from self._store_in_first(topic, copies, asked)
            except SubscribersChanged as changed:
                self.note(topic, changed.now)
                continue
            except PartitionCountMismatch as error:
                mismatches += 1
                if mismatches > len(known.queues) + 10:
                    raise
                yield from self.look_up(error.queue)
                continue
            return [
                [public(one.keys.queue, answer[at]) for one, answer in zip(copies, stored, strict=True)]
                for at in range(len(bodies))
            ]

    def _copies(
        self, queues: Sequence[str], message_ids: Sequence[str], bodies: Sequence[bytes], options: Sequence[PreparedPush],
        values: Sequence[Any], version: int,
    ) -> Generator[Step, Any, list[TopicCopies]]:  # fmt: skip
        """Return the copies for each queue: the same entries for all, but for those that have a seal or limits of their queue."""
        copies: list[TopicCopies] = []
        shared: list[Entry] | None = None
        sealing = self.queues.sealing
        for queue in queues:
            keys, most = yield from self._place(queue, options[0])
            declared = self.queues.queues.get(queue)
            limited = declared if declared is not None and declared._limits_messages else None  # noqa: SLF001
            entries = shared if limited is None and sealing is None else None
            if entries is None:
                each = [with_sealing(one, sealing, queue, version) for one in options]
                if limited is not None:
                    each = [limited._limited(value, one) for value, one in zip(values, each, strict=True)]  # noqa: SLF001
                    yield partial(limited.limits.ensure, keys), partial(limited.limits.aensure, keys)
                make = (each[0], each, message_ids, bodies)
                entries = yield partial(make_entries, *make), partial(amake_entries, *make)
                if limited is None:
                    shared = entries
            assert entries is not None
            copies.append(TopicCopies(keys, entries, most))
        if copies:
            places = [one.keys for one in copies]
            yield partial(self.client.announce, *places), partial(self.client.aannounce, *places)
        return copies

    def _store_in_all(
        self, topic: str, known: Subscribers, count: int, copies: Sequence[TopicCopies], asked: Durability | None
    ) -> Generator[Step, Any, list[list[str]]]:
        """Store all copies in one step of a single server."""
        sequence = self._take_sequence()
        try:
            stored, confirmation = yield from self._confirmed(
                topics.publish(self.keys, sequence, topic, known.version, count, copies), copies, asked
            )
        except (SubscribersChanged, PartitionCountMismatch):
            self._sequences.append(sequence)
            raise
        self._sequences.append(sequence)
        yield from self._announce_new(copies, stored)
        _check(asked, confirmation, copies, stored)
        return stored

    def _confirmed(
        self, call: Call[list[list[str]]], copies: Sequence[TopicCopies], asked: Durability | None
    ) -> Generator[Step, Any, tuple[list[list[str]], Confirmation | None]]:
        """Carry out a publish, and wait for what is asked beyond its being stored; return what was confirmed, None for nothing."""
        if asked is None or not copies:
            stored: list[list[str]] = yield self.run(call)
            return stored, None
        steps = self.client.confirm, self.client.aconfirm
        found: tuple[list[list[str]], Confirmation] = yield (
            partial(steps[0], copies[0].keys, call, asked),
            partial(steps[1], copies[0].keys, call, asked),
        )
        return found

    def _store_in_first(
        self, topic: str, copies: Sequence[TopicCopies], asked: Durability | None
    ) -> Generator[Step, Any, list[list[str]]]:
        """
        Store the copies of one queue, and the others in its outbox, from where they are delivered at once.

        It is the first queue whose server is not away. What cannot be delivered now stays in the outbox: the next publish, or
        whoever serves that queue, delivers it.
        """
        for one in copies:
            if one.max_length > 0 and len(copies) > 1:
                yield from self._refuse_full(one)
        first = next((one for one in copies if not self.client.is_away(one.keys)), copies[0])
        others = [one for one in copies if one is not first]
        written = [outbox.write(one.keys.queue, entry, accepted=True) for one in others for entry in one.entries]
        sequence = self._take_sequence()
        try:
            [stored], confirmation = yield from self._confirmed(
                topics.publish_from(sequence, topic, first, written), [first], asked
            )
        except PartitionCountMismatch:
            self._sequences.append(sequence)
            raise
        except StoreUnavailable:
            self.client.note_away(first.keys)
            raise
        self._sequences.append(sequence)
        yield from self._announce_new([first], [stored])
        if written:
            yield from self._deliver(first.keys, len(written) // outbox.MOST_TAKEN + 2)
        found = [stored if one is first else [entry.id for entry in one.entries] for one in copies]
        _check(asked, confirmation, copies, found)
        return found

    def _deliver(self, keys: QueueKeys, batches: int) -> StepProgram:
        """Deliver up to so many *batches* of an outbox."""
        try:
            for _ in range(batches):
                if not (yield from outbox.deliver(self.queues, keys, retry_for=FIRST_TRY)):
                    break
        except ConveyorError as error:
            logger.warning(
                "queue %s: copies of published messages are not delivered yet, and stay in its outbox: %s",
                keys.queue,
                error,
            )

    def _refuse_full(self, copies: TopicCopies) -> StepProgram:
        """Raise QueueFull for a queue, declared here with a maximum length, that has no room. It bounds what is accepted."""
        counts = yield self.run(inspection.counts(copies.keys))
        held = len(counts) + counts.leased
        if held + len(copies.entries) > copies.max_length:
            operations.refused(copies.keys, ["full", str(held), str(copies.max_length)])

    def _announce_new(self, copies: Sequence[TopicCopies], stored: Sequence[list[str]]) -> StepProgram:
        """Make the queues known that were new in Redis."""
        new = [one.keys for one, answer in zip(copies, stored, strict=True) if isinstance(answer, NewQueueIds)]
        if new:
            yield partial(self.client.announce_again, *new), partial(self.client.aannounce_again, *new)

    def _take_sequence(self) -> ProducerSequence:
        """
        Return a sequence that nothing is in flight of; it goes back when its publish was answered.

        One whose publish had no answer does not: a late copy would take its next number.
        """
        try:
            return self._sequences.pop()
        except IndexError:
            return ProducerSequence(new_identity())

    def _place(self, queue: str, options: PreparedPush) -> Generator[Step, Any, tuple[QueueKeys, int]]:
        """Return where the copies for *queue* go, and the maximum length there."""
        partitions = self.partitions(queue)
        declared = self.queues.bounded.get(queue)
        if partitions is None:
            return self.client.keys(queue), (declared and declared.max_length) or AS_DECLARED
        yield partitions.agree, partitions.aagree
        at = partitions.place(group=options.group, unique=options.unique, id=options.id)
        return partitions.keys[at], partitions.max_length or AS_DECLARED


def _check(
    asked: Durability | None,
    confirmation: Confirmation | None,
    copies: Sequence[TopicCopies],
    stored: Sequence[list[str]],
) -> None:
    """Raise DurabilityNotReached, with the ids of all copies, when less was confirmed than was asked."""
    if asked is not None and confirmation is not None and not asked.is_reached_by(confirmation):
        raise asked.failure_of(
            [public(one.keys.queue, id_) for one, ids_ in zip(copies, stored, strict=True) for id_ in ids_],
            confirmation,
        )


@dataclass(frozen=True)
class Topic(Generic[T]):
    """
    A topic: what is published to it reaches every queue that subscribes. `Conveyor.topic` makes it.

    A name such as ``user.*`` is a pattern, for subscriptions: `*` stands for one word, `#` at the end for any number of words.
    Every blocking call has an awaitable twin with an ``a`` before its name.
    """

    name: str
    _directory: TopicDirectory = field(repr=False)
    _codec: FormatCodec[T] = field(repr=False)
    _version: int = field(default=1, repr=False)

    # -- subscriptions ------------------------------------------------------------------------------------------------

    def subscribe(self, *queues: str | Queue[Any]) -> int:
        """
        Subscribe queues of messages: from now on each gets a copy of every message. Return how many did not subscribe before.

        It is stored in Redis and holds until `unsubscribe`, or until the queue is deleted; so a program may say it each time
        it starts. Raises ConfigurationError, with nothing stored, for a queue that is known to hold jobs, and a plain list.
        """
        return cast("int", drive_steps(self._subscribe(queues)))

    def unsubscribe(self, *queues: str | Queue[Any]) -> int:
        """End subscriptions to exactly this name, and return how many there were. Copies that are queued stay."""
        names = [self._queue_name(queue) for queue in self._given(queues)]
        return self._directory.client.run(topics.unsubscribe(self._directory.keys, self.name, names))

    def subscribers(self) -> list[str]:
        """Return the queues that get what is published here, patterns included; of a pattern those that subscribe to it."""
        return cast("list[str]", drive_steps(self._subscribers()))

    async def asubscribe(self, *queues: str | Queue[Any]) -> int:
        """Awaitable form of `subscribe`."""
        return cast("int", await adrive_steps(self._subscribe(queues)))

    async def aunsubscribe(self, *queues: str | Queue[Any]) -> int:
        """Awaitable form of `unsubscribe`."""
        names = [self._queue_name(queue) for queue in self._given(queues)]
        return await self._directory.client.arun(topics.unsubscribe(self._directory.keys, self.name, names))

    async def asubscribers(self) -> list[str]:
        """Awaitable form of `subscribers`."""
        return cast("list[str]", await adrive_steps(self._subscribers()))

    def _subscribe(self, queues: Sequence[str | Queue[Any]]) -> StepProgram:
        directory = self._directory
        names = [self._queue_name(queue) for queue in self._given(queues)]
        for name in names:
            directory.queues.admit_message(name)
        for name in names:
            if (declared := directory.queues.partitioned.get(name)) is not None:
                yield declared.agree, declared.aagree
        return (yield directory.run(topics.subscribe(directory.keys, self.name, names)))

    def _subscribers(self) -> StepProgram:
        directory = self._directory
        if is_pattern(self.name):
            found = yield directory.run(topics.patterns(directory.keys))
            return found.get(self.name, [])
        now = yield directory.run(topics.subscribers(directory.keys, self.name))
        return list(now.queues)

    def _given(self, queues: Sequence[str | Queue[Any]]) -> Sequence[str | Queue[Any]]:
        if not queues:
            raise ConfigurationError(f"Name the queues: app.topic({self.name!r}).subscribe('emails', 'audit').")
        return queues

    def _queue_name(self, queue: str | Queue[Any]) -> str:
        directory = self._directory
        name = queue if isinstance(queue, str) else getattr(queue, "name", None)
        if not isinstance(queue, str) and getattr(queue, "client", None) is not directory.client:
            is_task = hasattr(queue, "enqueue")
            raise ConfigurationError(
                f"A topic is subscribed to by queues of messages of the same app, not by {show(queue)}."
                + (" Subscribe a queue, and enqueue the task from its consumer." if is_task else "")
                + " Nothing was stored."
            )
        if name in directory.queues.plain_lists:
            raise ConfigurationError(
                f"The plain list {name!r} cannot subscribe: it holds bare documents, without headers and ids. Subscribe a queue. "
                "Nothing was stored."
            )
        return ids.queue_name(cast("str", name))

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(self, value: T, **options: Unpack[TopicOptions]) -> list[str]:
        """
        Store a copy of *value* in every queue that subscribes, and return the ids of the copies.

        Options are as in `Queue.push`, and each queue applies them by itself. Nobody subscribes: the message is counted
        (`app.topics`), and the list is empty. Either all copies are stored, or none: raises QueueFull when a queue that
        refuses what it has no room for is full, PayloadError, ConfigurationError; StoreUnavailable: it may have been stored,
        once. `fsync`, `wait_replicas` and `wait_timeout` are this publish's own, whatever the queues declare; raises
        DurabilityNotReached, with the ids of the copies that are stored.
        """
        with push_scope(self._directory.middlewares):
            return cast("list[list[str]]", drive_steps(self._publish([value], options)))[0]

    def publish_many(self, values: Iterable[T], **options: Unpack[TopicManyOptions]) -> list[list[str]]:
        """
        Publish many values in their order, in few round trips, and return the ids of each one's copies.

        They are stored in parts of at most 1,000 messages, each whole or not at all.
        """
        self._directory.client.refuse_in_loop()  # before a generator of values is begun
        with push_scope(self._directory.middlewares, many=True):
            return cast("list[list[str]]", drive_steps(self._publish(values, self._for_many(options))))

    async def apublish(self, value: T, **options: Unpack[TopicOptions]) -> list[str]:
        """Awaitable form of `publish`."""
        with push_scope(self._directory.middlewares):
            return cast("list[list[str]]", await adrive_steps(self._publish([value], options)))[0]

    async def apublish_many(self, values: Iterable[T], **options: Unpack[TopicManyOptions]) -> list[list[str]]:
        """Awaitable form of `publish_many`."""
        with push_scope(self._directory.middlewares, many=True):
            return cast("list[list[str]]", await adrive_steps(self._publish(values, self._for_many(options))))

    def _for_many(self, options: TopicManyOptions) -> TopicOptions:
        if alone := {"id", "unique"} & options.keys():
            raise ConfigurationError(
                f"publish_many takes no {' and no '.join(sorted(alone))}: each belongs to one message."
            )
        return cast("TopicOptions", options)

    def _publish(self, values: Iterable[T], options: TopicOptions) -> StepProgram:
        prepared = self._prepared(options)
        rest, published = each_of(values), list[list[str]]()
        while True:
            envelopes: list[bytes] = []
            each: list[PreparedPush] = []
            passed: list[T] = []
            size = 0
            for value in islice(rest, CHUNK):
                left, envelope, own = self._encode(value, prepared, len(published) + len(envelopes))
                envelopes.append(envelope)
                each.append(own)
                passed.append(left)
                size += len(envelope)
                if size > CHUNK_BYTES:
                    break
            if not envelopes:
                return published
            try:
                published += yield from self._directory.store(self.name, envelopes, each, passed, self._version)
            except ConveyorError as error:
                if published:
                    error.add_note(f"The first {len(published):,} messages were published before, the rest was not.")
                raise

    def _encode(self, value: T, options: PreparedPush, at: int) -> tuple[Any, bytes, PreparedPush]:
        """Return one message, its envelope and its options, as the middlewares leave them."""
        passed: Any = value
        if middlewares := self._directory.middlewares:
            passed, options = pass_through(middlewares, "", value, options, topic=self.name)
        options = for_topic(options, self.name)
        try:
            return passed, options.head + self._codec.encode(passed), options
        except PayloadError as error:
            if at:
                raise PayloadError(f"Message {at:,}: {error}", code=error.code) from error
            raise

    def _prepared(self, options: TopicOptions) -> PreparedPush:
        if is_pattern(self.name):
            raise ConfigurationError(
                f"{self.name!r} is a pattern, for subscriptions. Publish to a topic without '*' and '#'. Nothing was stored."
            )
        if self._directory.client.deferring:
            raise ConfigurationError(
                f"The topic '{self.name}' is published to inside a transaction, and who subscribes is known to Redis alone, "
                "so it cannot be a row of the outbox. Nothing was stored. Publish after the commit; or push to a queue in the "
                "transaction, and publish from its consumer.",
                code="E46",
            )
        known = TopicOptions.__annotations__
        if unknown := options.keys() - known.keys():
            raise TypeError(f"publish() got an unexpected keyword argument {min(unknown)!r}")
        return prepare_push(**options, version=self._version)
