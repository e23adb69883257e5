"""A message queue: push typed values, take them under a lease, and nothing is lost in between."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, Literal, TypeVar, Unpack, cast, get_args

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.messaging import maintenance
from conveyor.messaging import partitions as partitioning
from conveyor.messaging.consumer.aconsumer import AsyncConsumer
from conveyor.messaging.consumer.consumer import Consumer
from conveyor.messaging.consumer.settling import AsyncSettler, BlockingSettler, adrive, arun_once, drive, run_once
from conveyor.messaging.consumer.steps import ConsumerSteps, TurnStep
from conveyor.messaging.decoder import MessageDecoder
from conveyor.messaging.leases import DeadWorkerDetector, LeasedMessage, LeaseSession
from conveyor.messaging.maintenance import DeadLetter
from conveyor.messaging.message import Batch, Message, OnError, Settler
from conveyor.messaging.publisher import Publisher
from conveyor.messaging.push_options import PLAIN, PreparedPush, PushManyOptions, PushOptions, later, posting, wrapped
from conveyor.messaging.retry import Retry
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.codec import MAX_PAYLOAD
from conveyor.payload.formats import JSON, FormatCodec, FormatRegistry, codec_for
from conveyor.payload.pipeline import PayloadPipeline
from conveyor.payload.sealed_records import pack_failure, pack_refusal
from conveyor.payload.versions import check_version
from conveyor.store import inspection, operations
from conveyor.store.client.client import Client, refuse_in_loop
from conveyor.store.client.durability import Durability
from conveyor.store.inspection import QueueCounts
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import MOST_HELD
from conveyor.store.script import Call
from conveyor.store.transport.wakeup import AsyncWakeupWaiter, WakeupWaiter
from conveyor.units import Duration, milliseconds

T = TypeVar("T")
V = TypeVar("V")
Full = Literal["raise", "block", "drop-oldest"]
SHORTEST_LEASE_MS = 100


class Queue(Generic[T]):
    """
    One queue by its name, holding values of one type.

    Every blocking call has an awaitable twin with an ``a`` before its name. Made by `Conveyor.queue`.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        lease_ms: int,
        max_attempts: int = 5,
        max_length: int | None = None,
        full: Full = "raise",
        retry: Retry | None = None,
        partitions: int = 1,
        limits: Iterable[object] = (),
        asks: Durability | None = None,
        max_payload: int = MAX_PAYLOAD,
        sealing: PayloadPipeline | None = None,
        version: int = 1,
        upcast: Callable[[int, Any], Any] | None = None,
        formats: FormatRegistry = JSON,
    ) -> None:
        """Declare it; nothing is sent. Raises ConfigurationError for what it cannot do."""
        self.name = self._checked_name(name)
        self.client = client
        self.keys = self._keys()
        self.codec: FormatCodec[T] = codec_for(
            type, formats=formats, max_payload=max_payload, what=f"A message of queue '{name}'"
        )
        self.lease_ms = _whole("lease_ms", lease_ms, SHORTEST_LEASE_MS)
        self.max_length = None if max_length is None else _whole("max_length", max_length, 1)
        self.retry = retry if retry is not None else Retry(attempts=_whole("max_attempts", max_attempts, 1))
        if full not in get_args(Full):
            raise ConfigurationError(f"full must be one of {', '.join(get_args(Full))}, not {full!r}.")
        if full != "raise":
            raise later("full", f"Only 'raise' works yet, not {full!r}.")
        if partitions != 1:
            raise ConfigurationError("A Queue lies in one piece: app.queue(…, partitions=…) makes one that does not.")
        if tuple(limits):
            raise later("limits")
        self.asks = asks
        self._sealing = sealing
        self.version = check_version(version, upcast, f"queue({name!r})")
        self._opening: MessageDecoder[T] = MessageDecoder(name, self.codec, sealing, version, upcast)
        self._suspects = DeadWorkerDetector(self.lease_ms)
        self._pusher: Publisher[T] = self._make_pusher()

    # -- what a plain list does otherwise ---------------------------------------------------------------------------

    def _checked_name(self, name: str) -> str:
        return ids.queue_name(name)

    def _keys(self) -> QueueKeys:
        return self.client.keys(self.name)

    def _make_pusher(self) -> Publisher[T]:
        return Publisher(self.client.push_target(self.asks), self.keys, self.codec, self.max_length)

    def _intake(self) -> Callable[[int], Call[int]] | None:
        return None

    def _by(self, options: PreparedPush) -> Publisher[T]:
        """Return what pushes with these options, to where pushes go right now."""
        if options.durability_request is None and not self.client.diverted:
            return self._pusher
        return self._pusher.through(self.client.push_target(self.asks, options.durability_request))

    # -- push ---------------------------------------------------------------------------------------------------------

    def push(self, value: T, **options: Unpack[PushOptions]) -> str:
        """
        Store one message and return its id.

        `delay` or `at` (an aware datetime) schedule it; `priority` is 0 to 9, higher first; `front` puts it before all
        others; `expires` drops it when nobody took it by then; `headers` are text. While a message with the same
        `unique` key lives, its id is returned and nothing is stored; so with `id`, until a day after it ended.
        `fsync` waits until it is on disk, `wait_replicas` until so many replicas have it, each for `wait_timeout`.
        Raises PayloadError, ConfigurationError, QueueFull: nothing was stored; StoreUnavailable: perhaps it was, once;
        DurabilityNotReached: it was, and was not confirmed.
        """
        chosen = self._posting(options)
        return self._by(chosen).push(value, chosen)

    def push_many(self, values: Iterable[T], **options: Unpack[PushManyOptions]) -> list[str]:
        """
        Store many messages in their order, in few round trips, and return their ids.

        A list is checked whole before anything is stored, an iterator in windows of 100,000, which are held no longer
        than needed. With `max_length` all are accepted or none, at most 100,000 at a time.
        """
        chosen = self._placement(options)
        return self._by(chosen).push_many(values, chosen)

    async def apush(self, value: T, **options: Unpack[PushOptions]) -> str:
        """Store one message and return its id, as `push`; concurrent calls share round trips."""
        chosen = self._posting(options)
        return await self._by(chosen).apush(value, chosen)

    async def apush_many(self, values: Iterable[T], **options: Unpack[PushManyOptions]) -> list[str]:
        """Store many messages in their order and return their ids, as `push_many`."""
        chosen = self._placement(options)
        return await self._by(chosen).apush_many(values, chosen)

    def _posting(self, options: PushOptions) -> PreparedPush:
        if not options and self._sealing is None and self.version == 1:
            return PLAIN
        if unknown := options.keys() - PushOptions.__annotations__.keys():
            raise TypeError(f"push() got an unexpected keyword argument {min(unknown)!r}")
        return wrapped(posting(**options, version=self.version), self._sealing, self.name, self.version)

    def _placement(self, options: PushManyOptions) -> PreparedPush:
        if alone := {"id", "unique"} & options.keys():
            raise ConfigurationError(
                f"push_many takes no {' and no '.join(sorted(alone))}: each belongs to one message."
            )
        return self._posting(cast("PushOptions", options))

    # -- take ---------------------------------------------------------------------------------------------------------

    def consume(self, prefetch: int = 1, *, on_error: OnError = "log") -> Generator[Message[T], None, None]:
        """
        Yield messages for ever, each as soon as there is one; their leases are renewed by a thread.

        Up to *prefetch* are leased in one round trip. Errors inside ``with message`` are logged and nacked;
        ``on_error="raise"`` passes them on as well. An outage of Redis is waited for. What was not settled when the
        loop is left goes back to the front, what had not started without a trace.
        """
        refuse_in_loop()
        prefetch = _whole("prefetch", prefetch, 1, MOST_HELD)
        return self._consumer(_on_error(on_error)).messages(prefetch)

    def batches(
        self, size: int = 100, within: Duration = "1s", *, on_error: OnError = "log"
    ) -> Generator[Batch[T], None, None]:
        """Yield lists of messages for ever: of *size*, or what came *within* that time after the first."""
        refuse_in_loop()
        size, wait_ms = _whole("size", size, 1, MOST_HELD), milliseconds(within, name="within")
        return self._consumer(_on_error(on_error)).batches(size, wait_ms / 1000)

    def pull(self, n: int = 1, wait: Duration = 0) -> list[Message[T]]:
        """
        Return up to *n* messages as soon as there is one, or none after *wait*.

        Nobody renews their lease: settle each with `ack`, `nack` or `dead` before it ends, or `extend` it.
        """
        n, wait_ms = _whole("n", n, 1, MOST_HELD), milliseconds(wait, name="wait")
        holder = BlockingSettler(self.client, self._lessee("pull", transient=True), self._verdict(), "log")
        flow = ConsumerSteps(holder.lessee, holder.verdict, lambda leased: self._open(leased, holder))
        program, bell = flow.pull(n, wait_ms / 1000), None
        try:
            while True:
                step = next(program)
                if isinstance(step, TurnStep):
                    holder.round(step.want, leave=step.leave)
                    holder.note()
                else:
                    bell = bell or WakeupWaiter(self.client.endpoint(self.keys))
                    bell.wait(self.keys.wake, step.seconds)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            if bell is not None:
                bell.close()

    def aconsume(self, prefetch: int = 1, *, on_error: OnError = "log") -> AsyncGenerator[Message[T], None]:
        """Yield messages for ever, as `consume`, on this event loop."""
        prefetch = _whole("prefetch", prefetch, 1, MOST_HELD)
        return self._async(_on_error(on_error), lambda consumer: consumer.messages(prefetch))

    def abatches(
        self, size: int = 100, within: Duration = "1s", *, on_error: OnError = "log"
    ) -> AsyncGenerator[Batch[T], None]:
        """Yield lists of messages for ever, as `batches`, on this event loop."""
        size, wait_ms = _whole("size", size, 1, MOST_HELD), milliseconds(within, name="within")
        return self._async(_on_error(on_error), lambda consumer: consumer.batches(size, wait_ms / 1000))

    async def apull(self, n: int = 1, wait: Duration = 0) -> list[Message[T]]:
        """Return up to *n* messages as soon as there is one, or none after *wait*, as `pull`."""
        n, wait_ms = _whole("n", n, 1, MOST_HELD), milliseconds(wait, name="wait")
        holder = AsyncSettler(self.client, self._lessee("pull", transient=True), self._verdict(), "log")
        flow = ConsumerSteps(holder.lessee, holder.verdict, lambda leased: self._open(leased, holder))
        program, bell = flow.pull(n, wait_ms / 1000), None
        try:
            while True:
                step = next(program)
                if isinstance(step, TurnStep):
                    await holder.around(step.want, leave=step.leave)
                    holder.note()
                else:
                    bell = bell or AsyncWakeupWaiter(self.client.endpoint(self.keys))
                    await bell.wait(self.keys.wake, step.seconds)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            if bell is not None:
                bell.close()

    def _consumer(self, on_error: OnError) -> Consumer[T]:
        return Consumer(self.client, self._lessee("consumer"), self._verdict(), on_error, self._open)

    async def _async(
        self, on_error: OnError, begin: Callable[[AsyncConsumer[T]], AsyncGenerator[V, None]]
    ) -> AsyncGenerator[V, None]:
        # Made inside the loop, at the first step; closing this one closes the inner one at once.
        consumer = AsyncConsumer(self.client, self._lessee("consumer"), self._verdict(), on_error, self._open)
        async with aclosing(begin(consumer)) as things:
            async for thing in things:
                yield thing

    def _lessee(self, kind: str, *, transient: bool = False) -> LeaseSession:
        about = operations.about(kind=kind, host=socket.gethostname(), pid=os.getpid(), queue=self.name)
        suspects = self._suspects if transient else DeadWorkerDetector(self.lease_ms)
        lessee = LeaseSession(self.keys, self.lease_ms, about, suspects, intake=self._intake(), transient=transient)
        lessee.opening = self._opening if self._opening.fetches else None
        return lessee

    def _verdict(self) -> SettlementPolicy:
        sealing, worker = self._sealing, f"{socket.gethostname()}:{os.getpid()}"
        if sealing is None:
            return SettlementPolicy(self.retry, worker)
        return SettlementPolicy(
            self.retry,
            worker,
            pack=lambda id_, record: pack_failure(sealing, record, self.name, id_),
            pack_refusal=lambda id_, record, code: pack_refusal(sealing, record, code, self.name, id_),
        )

    def _open(self, leased: LeasedMessage, holder: Settler) -> Message[T]:
        """Return the message people see. Raises PayloadError."""
        return Message(self.name, self._opening.body(leased), leased, holder)

    # -- look and care ------------------------------------------------------------------------------------------------

    def stats(self) -> QueueCounts:
        """Count: `ready scheduled waiting leased dead oldest_age paused workers`."""
        return self.client.run(inspection.counts(self.keys))

    def __len__(self) -> int:
        return len(self.stats())

    def __bool__(self) -> bool:
        return True  # an empty queue is a queue

    def pause(self) -> None:
        """Let nobody lease from it until `resume`; pushing goes on."""
        self.client.run(operations.configure(self.keys, "paused", "1"))

    def resume(self) -> None:
        """End a pause; waiting consumers go on at once."""
        self.client.run(operations.configure(self.keys, "paused", ""))

    def purge(self, dead: bool = False) -> int:
        """Remove what waits, or the *dead* letters, and return how many; what is leased or comes later stays."""
        return drive(self._purge(dead), partial(run_once, self.client))

    def redrive(self, limit: int | None = None) -> int:
        """Put dead letters back, oldest first, with a fresh budget, and return how many."""
        return drive(maintenance.redrive(self.keys, limit), self.client.run)

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Yield what was given up, oldest first."""
        offset = 0
        while page := self.client.run(maintenance.dead_page(self.keys, offset, self._sealing)):
            yield from page
            offset += len(page)

    async def astats(self) -> QueueCounts:
        """Count, as `stats`."""
        return await self.client.arun(inspection.counts(self.keys))

    async def alen(self) -> int:
        """Return what `len` does."""
        return len(await self.astats())

    async def apause(self) -> None:
        """Let nobody lease from it until `aresume`."""
        await self.client.arun(operations.configure(self.keys, "paused", "1"))

    async def aresume(self) -> None:
        """End a pause."""
        await self.client.arun(operations.configure(self.keys, "paused", ""))

    async def apurge(self, dead: bool = False) -> int:
        """Remove what waits, or the *dead* letters, as `purge`."""
        return await adrive(self._purge(dead), partial(arun_once, self.client))

    async def aredrive(self, limit: int | None = None) -> int:
        """Put dead letters back, as `redrive`."""
        return await adrive(maintenance.redrive(self.keys, limit), self.client.arun)

    async def adead_letters(self) -> AsyncIterator[DeadLetter]:
        """Yield what was given up, oldest first."""
        offset = 0
        while page := await self.client.arun(maintenance.dead_page(self.keys, offset, self._sealing)):
            for letter in page:
                yield letter
            offset += len(page)

    def repartition(self, partitions: int) -> int:
        """
        Lay the queue in that many partitions, all of which must be empty, and return in how many it lay.

        Every program must then declare the new number: this object, with the old one, is refused too. Raises
        ConfigurationError (E35), with nothing changed, when something is ready, scheduled, leased or dead.
        """
        return partitioning.repartition(self.client, self.name, partitions)

    async def arepartition(self, partitions: int) -> int:
        """Lay the queue in that many partitions, as `repartition`."""
        return await partitioning.arepartition(self.client, self.name, partitions)

    def _purge(self, dead: bool) -> maintenance.Sweep:
        return maintenance.purge_dead(self.keys) if dead else maintenance.purge_waiting(self.keys)

    def __dir__(self) -> list[str]:
        # Completion shows the methods and `name`; the other attributes are for the library.
        return [name for name in super().__dir__() if name == "name" or name not in vars(self)]

    def __repr__(self) -> str:
        kind = type(self).__name__
        try:
            refuse_in_loop()
            counts = self._peek() if self._reached() else None
        except (ConveyorError, OSError):
            counts = None
        if counts is None:
            return f"<{kind} {self.name}>"
        rest = "".join(f", {n} {word}" for word in ("scheduled", "leased", "dead") if (n := getattr(counts, word)))
        return f"<{kind} {self.name}: {counts.ready} ready{rest}{', paused' if counts.paused else ''}>"

    def _peek(self) -> QueueCounts:
        return self.client.run(inspection.counts(self.keys), patience=0)

    def _reached(self) -> bool:
        return self.client.reached


def _on_error(value: OnError) -> OnError:
    if value not in get_args(OnError):
        raise ConfigurationError(f"on_error must be 'log' or 'raise', not {value!r}.")
    return value


def _whole(name: str, value: object, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise ConfigurationError(f"{name} must be a whole number {limits}, not {value!r}.")
    return value
