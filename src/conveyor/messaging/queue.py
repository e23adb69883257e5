"""A message queue: typed values are pushed, and taken under a lease, so that none is lost."""

from __future__ import annotations

import os
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from typing import Any, Generic, TypeVar, Unpack, cast, get_args

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.messaging import deletion, maintenance
from conveyor.messaging import partitions as partitioning
from conveyor.messaging.consumer.asynchronous import AsyncConsumer
from conveyor.messaging.consumer.blocking import Consumer
from conveyor.messaging.consumer.partition_steps import QueueShares
from conveyor.messaging.consumer.settling import ConsumerSources, PartitionSource
from conveyor.messaging.consumer.steps import Program
from conveyor.messaging.declared_limits import (
    LoadKeyReader,
    QueueLimits,
    declare_limits,
    message_reader,
    queue_owner,
)
from conveyor.messaging.decoder import MessageDecoder
from conveyor.messaging.leases import DeadWorkerDetector, LeasedMessage, LeaseSession
from conveyor.messaging.limits import Concurrency, Rate
from conveyor.messaging.maintenance import DeadLetter
from conveyor.messaging.message import Batch, Message, OnError
from conveyor.messaging.outbox import OutboxRoutes
from conveyor.messaging.publisher import Publisher
from conveyor.messaging.push_options import (
    PLAIN_PUSH,
    Outgoing,
    PreparedPush,
    PushManyOptions,
    PushMiddleware,
    PushOptions,
    prepare_push,
    with_sealing,
)
from conveyor.messaging.retry import Retry, retry_policy
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.payload.formats import JSON, FormatCodec, FormatRegistry, codec_for
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.redaction import Hide
from conveyor.payload.sealed_records import RecordDecoder, pack_failure, pack_refusal
from conveyor.payload.versions import check_version, sealed_name
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client
from conveyor.store.client.durability import Durability
from conveyor.store.inspection import QueueCounts
from conveyor.store.keys import QueueKeys
from conveyor.store.max_length import Full, MaxLength
from conveyor.store.operations import MOST_HELD
from conveyor.store.script import Call, CallProgram, adrive, drive
from conveyor.units import Duration, milliseconds, whole_number

T = TypeVar("T")
SHORTEST_LEASE_MS = 100


class MessageSource(Generic[T]):
    """A queue, or several by their weights, as messages are taken from them."""

    client: Client

    def _consumer_sources(self, transient: bool) -> ConsumerSources[T]:
        """Return what a consumer takes from, with new identities, *transient* for a single pull."""
        raise NotImplementedError

    def consume(self, prefetch: int = 1, *, on_error: OnError = "log") -> Generator[Message[T], None, None]:
        """
        Yield messages without end, each as soon as there is one; a thread renews their leases.

        Up to *prefetch* are leased in one round trip. Errors inside ``with message`` are logged and nacked;
        ``on_error="raise"`` passes them on as well. An outage of Redis is waited for. Messages that are not settled
        when the loop is left go back to the front; those that had not started keep no trace of it.
        """
        self.client.refuse_in_loop()
        prefetch = whole_number("prefetch", prefetch, 1, MOST_HELD)
        consumer = self._consumer(checked_on_error(on_error))
        return consumer.loop(consumer.fetching(prefetch))

    def batches(
        self, size: int = 100, within: Duration = "1s", *, on_error: OnError = "log"
    ) -> Generator[Batch[T], None, None]:
        """Yield lists of messages without end: of *size*, or what came *within* that time of the first."""
        self.client.refuse_in_loop()
        size, wait_ms = whole_number("size", size, 1, MOST_HELD), milliseconds(within, name="within")
        consumer = self._consumer(checked_on_error(on_error))
        return consumer.loop(consumer.gathering(size, wait_ms / 1000), Batch)

    def pull(self, n: int = 1, wait: Duration = 0, *, renew: bool = False) -> list[Message[T]]:
        """
        Return up to *n* messages as soon as there is one, or none after *wait*.

        Settle each with `ack`, `nack`, `dead` or `release` before its lease ends, or `extend` it. With *renew* a thread
        renews their leases until they are settled, or the program has dropped them all.
        """
        n, wait_ms = whole_number("n", n, 1, MOST_HELD), milliseconds(wait, name="wait")
        return self._consumer("log", transient=True).pull(n, wait_ms / 1000, renew=renew)

    def aconsume(self, prefetch: int = 1, *, on_error: OnError = "log") -> AsyncGenerator[Message[T], None]:
        """Awaitable form of `consume`."""
        prefetch = whole_number("prefetch", prefetch, 1, MOST_HELD)
        return self._async(checked_on_error(on_error), lambda consumer: consumer.fetching(prefetch))

    def abatches(
        self, size: int = 100, within: Duration = "1s", *, on_error: OnError = "log"
    ) -> AsyncGenerator[Batch[T], None]:
        """Awaitable form of `batches`."""
        size, wait_ms = whole_number("size", size, 1, MOST_HELD), milliseconds(within, name="within")
        return self._async(checked_on_error(on_error), lambda consumer: consumer.gathering(size, wait_ms / 1000), Batch)

    async def apull(self, n: int = 1, wait: Duration = 0, *, renew: bool = False) -> list[Message[T]]:
        """Awaitable form of `pull`."""
        n, wait_ms = whole_number("n", n, 1, MOST_HELD), milliseconds(wait, name="wait")
        return await self._async_consumer("log", transient=True).pull(n, wait_ms / 1000, renew=renew)

    def _consumer(self, on_error: OnError, *, transient: bool = False) -> Consumer[T]:
        return Consumer(self.client, self._consumer_sources(transient), on_error, transient=transient)

    def _async_consumer(self, on_error: OnError, *, transient: bool = False) -> AsyncConsumer[T]:
        return AsyncConsumer(self.client, self._consumer_sources(transient), on_error, transient=transient)

    async def _async(
        self,
        on_error: OnError,
        programs: Callable[[AsyncConsumer[T]], Callable[[], Program[Any]]],
        as_shown: Callable[[Any], Any] | None = None,
    ) -> AsyncGenerator[Any, None]:
        # One generator and none inside: an event loop that ends closes all that it knows at the same time.
        consumer = self._async_consumer(on_error)  # made inside the loop, at the first step
        await consumer.begin()
        program = programs(consumer)
        try:
            while True:
                found = await consumer.next(program())
                yield found if as_shown is None else as_shown(found)
        finally:
            await consumer.end()


class QueueSelection(MessageSource[Any]):
    """Several queues of one app that messages are taken from together, by their weights."""

    def __init__(self, queues: Mapping[Queue[Any], float]) -> None:
        """Make the selection of *queues*, which belong to one app and have weights above 0."""
        self.queues = tuple(queues)
        self.client = self.queues[0].client
        self._weights = tuple(queues.values())
        self._shares_of_pulls = QueueShares(self._weights)

    def _consumer_sources(self, transient: bool) -> ConsumerSources[Any]:
        shares = self._shares_of_pulls if transient else QueueShares(self._weights)
        return ConsumerSources(*(queue._sources(transient) for queue in self.queues), shares=shares)  # noqa: SLF001


class Queue(MessageSource[T]):
    """
    A queue of messages of one type. `Conveyor.queue` makes it.

    Every blocking call has an awaitable twin with an ``a`` before its name.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        lease_ms: int,
        max_attempts: int | None = None,
        max_length: int | None = None,
        full: Full = "raise",
        retry: Retry | None = None,
        max_crashes: int | None = None,
        partitions: int = 1,
        limits: Sequence[Rate | Concurrency] | None = None,
        ageing_ms: int = 0,
        durability: Durability | None = None,
        expires_ms: int = 0,
        events: int | None = None,
        max_payload: int = MAX_PAYLOAD,
        sealing: PayloadPipeline | None = None,
        version: int = 1,
        upcast: Callable[[int, Any], Any] | None = None,
        formats: FormatRegistry = JSON,
        middlewares: Sequence[PushMiddleware] = (),
    ) -> None:
        """Declare the queue; nothing is sent. Each push goes through *middlewares*. Raises ConfigurationError."""
        self.name = self._checked_name(name)
        self.client = client
        self.expires_ms = expires_ms
        self.events_kept = events
        self.keys = self._keys()
        self.codec: FormatCodec[T] = codec_for(
            type, formats=formats, max_payload=max_payload, what=f"A message of queue '{name}'"
        )
        self.lease_ms = whole_number("lease_ms", lease_ms, SHORTEST_LEASE_MS)
        checked_full(full)
        self.max_length = None if max_length is None else MaxLength(whole_number("max_length", max_length, 1), full)
        self.retry = retry_policy(retry, max_attempts, max_crashes)
        _check_combination(name, full, max_length, limits)
        if partitions != 1:
            raise ConfigurationError(
                "A Queue has one partition; app.queue(…, partitions=…) makes a queue with several."
            )
        self.limits = QueueLimits(client, ids.logical(self.name), self._partition_count())
        """The limits of this queue, with those of tasks whose jobs this program keeps in it."""
        self.limits.add(queue_owner(self.limits.queue), declare_limits(queue_owner(self.limits.queue), limits))
        self.ageing_ms = ageing_ms
        self.durability = durability
        self._middlewares = middlewares
        self._sealing = sealing
        self.version = check_version(version, upcast, f"queue({name!r})")
        self._decoder: MessageDecoder[T] = MessageDecoder(name, self.codec, sealing, version, upcast)
        self._detector = DeadWorkerDetector(self.lease_ms)
        self._publisher: Publisher[T] = self._make_publisher()
        self.directory: OutboxRoutes | None = None
        """The queues of the app; None until it has declared this one."""
        self._fixed_limits = self._add_limits(type)
        self.admit: Callable[[], None] | None = None
        """Called before a push, while the app has not told that the queue holds messages: it raises where it holds jobs."""

    # -- what a plain list does otherwise ---------------------------------------------------------------------------

    def _checked_name(self, name: str) -> str:
        return ids.queue_name(name)

    def _keys(self) -> QueueKeys:
        return QueueKeys(self.client.namespace, self.name, expires=self.expires_ms, events_kept=self.events_kept)

    def _make_publisher(self) -> Publisher[T]:
        target = self.client.redis_target(self.durability)
        return Publisher(self.client, target, self.keys, self.codec, self.max_length, self._middlewares)

    def _partition_count(self) -> int:
        return self.keys.partitions

    def _add_limits(self, type_: Any) -> tuple[str, ...]:
        """Have the publisher read the limits of each message; return those that all messages have alike."""
        declared = self.limits.of(queue_owner(self.limits.queue))
        if not declared:
            return ()
        reader = LoadKeyReader(declared, message_reader(self.name, type_), partitions=self._partition_count())
        self._publisher.limits = self.limits
        if reader.fixed is None:
            self._publisher.load_keys = reader
        return reader.fixed or ()

    def _intake(self) -> Callable[[int], Call[int]] | None:
        return None

    def _publisher_for(self, options: PreparedPush) -> Publisher[T]:
        """Return the publisher for these options; its target is where pushes go at the moment. Raises ConfigurationError."""
        if self.admit is not None:
            self.admit()
        if options.durability_request is None and not self.client.deferring:
            return self._publisher
        return self._publisher.through(self.client.push_target(self.durability, options.durability_request))

    # -- push ---------------------------------------------------------------------------------------------------------

    def push(self, value: T, **options: Unpack[PushOptions]) -> str:
        """
        Store one message and return its id.

        `delay` or `at` (an aware datetime) schedule it; `priority` is 0 to 9, higher first; `front` puts it before all
        others; `expires` drops it when no consumer was handed it by then; `headers` are text, `tags` words by which it is
        found. While a message with the same `unique` key exists, its id is returned and nothing is stored; likewise with
        `id`, until a day after it ended. `fsync` waits until it is on disk, `wait_replicas` until so many replicas have it,
        each for `wait_timeout`.
        Raises PayloadError, ConfigurationError, QueueFull: nothing was stored; StoreUnavailable: it may have been
        stored, once; DurabilityNotReached: it was stored, but not confirmed.
        """
        prepared = self._prepared(options)
        return self._publisher_for(prepared).push(value, prepared)

    def push_many(self, values: Iterable[T], **options: Unpack[PushManyOptions]) -> list[str]:
        """
        Store many messages in their order, in few round trips, and return their ids.

        A list is checked completely before anything is stored, an iterator in windows of 100,000 that are dropped as
        soon as they are stored. With `max_length` all are accepted or none, at most 100,000 at a time.
        """
        prepared = self._prepared_many(options)
        self.client.refuse_in_loop()  # before a generator of values is begun
        return self._publisher_for(prepared).push_many(values, prepared)

    async def apush(self, value: T, **options: Unpack[PushOptions]) -> str:
        """Awaitable form of `push`; concurrent calls share round trips."""
        prepared = self._prepared(options)
        return await self._publisher_for(prepared).apush(value, prepared)

    async def apush_many(self, values: Iterable[T], **options: Unpack[PushManyOptions]) -> list[str]:
        """Awaitable form of `push_many`."""
        prepared = self._prepared_many(options)
        return await self._publisher_for(prepared).apush_many(values, prepared)

    def _prepared(self, options: PushOptions) -> PreparedPush:
        if not options and self._sealing is None and self.version == 1 and not self._fixed_limits:
            return PLAIN_PUSH
        if unknown := options.keys() - PushOptions.__annotations__.keys():
            raise TypeError(f"push() got an unexpected keyword argument {min(unknown)!r}")
        if options.get("timeout") is not None and (self.max_length is None or self.max_length.full != "block"):
            raise ConfigurationError(
                f"timeout= is how long a push waits for room, and queue '{self.name}' does not wait: declare it with "
                "max_length= and full='block'. Nothing was stored."
            )
        prepared = prepare_push(**options, version=self.version)
        if self._fixed_limits:
            prepared = replace(prepared, limits=self._fixed_limits)
        return with_sealing(prepared, self._sealing, self.name, self.version)

    @property
    def _limits_messages(self) -> bool:
        """True when its messages carry limits of this queue."""
        return bool(self._fixed_limits) or self._publisher.load_keys is not None

    def _limited(self, value: Any, options: PreparedPush) -> PreparedPush:
        """Return *options* with the limits that this queue has for the message *value*. Raises PayloadError."""
        if (reader := self._publisher.load_keys) is None:
            return replace(options, limits=self._fixed_limits)
        headers = {} if options.extra is None else dict(options.extra.headers)
        outgoing = Outgoing("", self.name, headers=headers, body=value, group=options.group, tags=options.tags)
        return replace(options, limits=reader.read(outgoing).limits)

    def _prepared_many(self, options: PushManyOptions) -> PreparedPush:
        if alone := {"id", "unique"} & options.keys():
            raise ConfigurationError(
                f"push_many takes no {' and no '.join(sorted(alone))}: each belongs to one message."
            )
        return self._prepared(cast("PushOptions", options))

    # -- take ---------------------------------------------------------------------------------------------------------

    def _consumer_sources(self, transient: bool) -> ConsumerSources[T]:
        return ConsumerSources(self._sources(transient))

    def _sources(self, transient: bool) -> list[PartitionSource[T]]:
        """Return the partitions of this queue as a consumer needs them, itself where it is in one piece."""
        return [self._source(transient)]

    def _source(self, transient: bool) -> PartitionSource[T]:
        """Return this queue as a consumer needs it, with a new identity, *transient* for a single pull."""
        kind = "pull" if transient else "consumer"
        about = operations.about(kind=kind, host=socket.gethostname(), pid=os.getpid(), queue=self.name)
        # Pulls share what they saw, since a single one seldom looks twice.
        detector = self._detector if transient else DeadWorkerDetector(self.lease_ms)
        session = LeaseSession(self.keys, self.lease_ms, about, detector, intake=self._intake(), transient=transient)
        session.limits = self.limits
        session.ageing_ms = self.ageing_ms
        session.bodies = self._decoder if self._decoder.fetches else None
        session.directory = self.directory
        return PartitionSource(session, self._policy(session), self._decoder)

    def _policy(self, session: LeaseSession) -> SettlementPolicy:
        sealing, worker = self._sealing, f"{socket.gethostname()}:{os.getpid()}"
        hider = self._hider if self.client.redaction else None
        if sealing is None:
            return SettlementPolicy(self.retry, worker, lambda: session.now_ms, limits=self.limits, hider=hider)
        return SettlementPolicy(
            self.retry,
            worker,
            lambda: session.now_ms,
            pack=lambda id_, record: pack_failure(sealing, record, self.name, id_),
            pack_refusal=lambda id_, record, code: pack_refusal(sealing, record, code, self.name, id_),
            limits=self.limits,
            hider=hider,
        )

    def _hider(self, leased: LeasedMessage) -> Hide | None:
        """Return what takes redacted values of a message out of texts about it."""
        decoder, envelope = RecordDecoder(self._sealing, self.codec.formats, self.client.redaction), leased.envelope
        body = envelope.body if leased.fetched_body is None else leased.fetched_body
        name = sealed_name(envelope.task, envelope.extra.version)
        return decoder.preview_and_hide(body, self.name, name, leased.id, call=False)[1]

    # -- look and care ------------------------------------------------------------------------------------------------

    def stats(self) -> QueueCounts:
        """Count: `ready scheduled waiting leased dead oldest_age paused workers`."""
        return self.client.run(inspection.counts(self.keys))

    def __len__(self) -> int:
        return len(self.stats())

    def __bool__(self) -> bool:
        return True  # an empty queue is a queue

    def pause(self) -> None:
        """Stop leasing from the queue until `resume`; pushes are still accepted."""
        self.client.run(operations.configure(self.keys, "paused", "1"))

    def resume(self) -> None:
        """End a pause; waiting consumers continue at once."""
        self.client.run(operations.configure(self.keys, "paused", ""))

    def purge(self, dead: bool = False) -> int:
        """Remove all waiting messages, or the *dead* letters, and return how many. Leased messages stay."""
        return drive(self._purge(dead), self.client.run_once)

    def redrive(self, limit: int | None = None) -> int:
        """
        Put dead letters back, oldest first, with all their attempts; return how many.

        Each takes its unique key again. One whose key another message holds now stays dead, and the log names both.
        """
        return drive(maintenance.redrive(self.keys, limit), self.client.run)

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Yield the dead letters, oldest first."""
        page, after = self.client.run(maintenance.dead_page(self.keys, 0, self._sealing))
        while after:
            yield from page
            page, after = self.client.run(maintenance.dead_page(self.keys, after, self._sealing))

    async def astats(self) -> QueueCounts:
        """Awaitable form of `stats`."""
        return await self.client.arun(inspection.counts(self.keys))

    async def alen(self) -> int:
        """Awaitable form of `len`."""
        return len(await self.astats())

    async def apause(self) -> None:
        """Awaitable form of `pause`."""
        await self.client.arun(operations.configure(self.keys, "paused", "1"))

    async def aresume(self) -> None:
        """Awaitable form of `resume`."""
        await self.client.arun(operations.configure(self.keys, "paused", ""))

    async def apurge(self, dead: bool = False) -> int:
        """Awaitable form of `purge`."""
        return await adrive(self._purge(dead), self.client.arun_once)

    async def aredrive(self, limit: int | None = None) -> int:
        """Awaitable form of `redrive`."""
        return await adrive(maintenance.redrive(self.keys, limit), self.client.arun)

    async def adead_letters(self) -> AsyncIterator[DeadLetter]:
        """Awaitable form of `dead_letters`."""
        page, after = await self.client.arun(maintenance.dead_page(self.keys, 0, self._sealing))
        while after:
            for letter in page:
                yield letter
            page, after = await self.client.arun(maintenance.dead_page(self.keys, after, self._sealing))

    def delete(self) -> None:
        """
        Delete the queue with all its keys, results of its ended jobs included; one that does not exist is no error.

        Raises ConfigurationError (E35), with nothing deleted, while it holds anything, dead letters and spawned jobs in its
        outbox included, or while workers or consumers serve it. A push that races with it is stored, in the queue before
        or in a new one. It walks through all keys of the server.
        """
        deletion.delete(self.client, self.keys)

    async def adelete(self) -> None:
        """Awaitable form of `delete`."""
        await deletion.adelete(self.client, self.keys)

    def repartition(self, partitions: int) -> int:
        """
        Change the number of partitions, which must all be empty, and return the number before.

        Every program must then declare the new number: this object, with the old one, is refused too. Raises
        ConfigurationError (E35), with nothing changed, when something is ready, scheduled, leased or dead.
        """
        return partitioning.repartition(self.client, self.name, partitions)

    async def arepartition(self, partitions: int) -> int:
        """Awaitable form of `repartition`."""
        return await partitioning.arepartition(self.client, self.name, partitions)

    def _purge(self, dead: bool) -> CallProgram[int]:
        return maintenance.purge_dead(self.keys) if dead else maintenance.purge_waiting(self.keys)

    def __dir__(self) -> list[str]:
        # Completion shows the methods and `name`; the other attributes are for the library.
        return [name for name in super().__dir__() if name == "name" or name not in vars(self)]

    def __repr__(self) -> str:
        kind = type(self).__name__
        try:
            self.client.refuse_in_loop()
            counts = self._peek() if self._reached() else None
        except (ConveyorError, OSError):
            counts = None
        if counts is None:
            return f"<{kind} {self.name}>"
        rest = "".join(f", {n} {word}" for word in ("scheduled", "leased", "dead") if (n := getattr(counts, word)))
        return f"<{kind} {self.name}: {counts.ready} ready{rest}{', paused' if counts.paused else ''}>"

    def _peek(self) -> QueueCounts:
        return self.client.run(inspection.counts(self.keys), retry_for=0)

    def _reached(self) -> bool:
        return self.client.has_idle_connection


def checked_on_error(value: OnError) -> OnError:
    if value not in get_args(OnError):
        raise ConfigurationError(f"on_error must be 'log' or 'raise', not {value!r}.")
    return value


def _check_combination(name: str, full: Full, max_length: int | None, limits: object) -> None:
    if full != "raise" and max_length is None:
        raise ConfigurationError(f"full={full!r} says what a push beyond max_length does: give max_length too.")
    if full == "drop-oldest" and limits:
        raise ConfigurationError(
            f"queue({name!r}): full='drop-oldest' and limits= exclude each other, since a job that waits at a limit cannot be "
            "dropped for a newer one. Declare full='raise' or full='block'."
        )


def checked_full(value: Full) -> Full:
    if value not in get_args(Full):
        raise ConfigurationError(f"full must be one of {', '.join(get_args(Full))}, not {value!r}.")
    return value
