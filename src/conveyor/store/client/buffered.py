"""A client whose pushes are kept while Redis is away, and the thread that delivers them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor.errors import ConfigurationError, ConveyorError, QueueFull, StoreUnavailable
from conveyor.ids import logical, partition
from conveyor.store import operations
from conveyor.store.client.batching import PendingPush, PushBatcher, chunks, entries_of
from conveyor.store.client.buffer import LOOK_EVERY, Buffer
from conveyor.store.client.client import Client
from conveyor.store.client.confirmed import ConfirmedTarget
from conveyor.store.client.durability import Durability
from conveyor.store.client.spool import MemorySpool, QueueName, SpoolBatch, SpooledPush, day_identity
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.partitions import PartitionCountMismatch, claims, count, partition_of
from conveyor.store.script import Argument, Call
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport import replies
from conveyor.store.transport.connection import Connection
from conveyor.store.transport.url import server_name

if TYPE_CHECKING:
    from conveyor.store.transport.endpoint import Endpoint

FIRST_TRY = 0.05
"""Seconds the first attempt is retried for: a stale connection, or a slot that moved, is not an outage."""
DRAINING_PAUSE = 0.001
"""Seconds a push pauses while the buffer is being delivered."""
MAX_PAUSE = 1.0
"""Maximum seconds between two attempts of the delivery."""
_LOG_AGAIN_AFTER = 60.0
_log = logging.getLogger("conveyor.buffer")


class BufferedClient(Client):
    """
    A client with a buffer: while it holds something, every push queues behind it.

    What dead processes left in its directory is delivered, too.
    """

    def __init__(self, url: str | None = None, *, buffer: Buffer, **options: Any) -> None:
        """*options* are those of a client."""
        super().__init__(url, **options)
        self.buffer: Buffer = buffer
        self.new_sequence = _day_sequence
        self.make_batcher = partial(BufferedBatcher, self)
        self._delivery = SpoolDelivery(self, buffer)
        self._flushed = False
        buffer.bind(self._delivery.start, server_name(self.configured_url))
        if buffer.on_disk:
            self._delivery.start()

    # -- blocking -----------------------------------------------------------------------------------------------------

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Store *entries* as a client does, or keep them."""
        self.refuse_in_loop()
        ids: list[str] = []
        for part in chunks(entries, whole):
            make = partial(operations.push, keys, entries=part, max_length=max_length)
            ids += self._push_or_keep(keys, part, max_length, make)
        return ids

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Store plain messages as a client does, or keep them."""
        self.refuse_in_loop()
        self._push_or_keep(
            keys, pairs, max_length, partial(operations.push_plain, keys, pairs=pairs, max_length=max_length)
        )

    def start_push_plain(self, keys: QueueKeys, pairs: Sequence[Argument]) -> Callable[[], None]:
        """Store plain messages before returning: a push in flight could not be kept in order."""
        self.push_plain(keys, pairs)
        return _nothing

    def _push_or_keep(self, keys: QueueKeys, content: Sequence[Any], max_length: int, make: Callable[..., Any]) -> Any:
        if self.buffer.holds_back(self.queue_name(keys)):
            if self.buffer.draining:
                self.buffer.wait_empty(DRAINING_PAUSE)
            return self.keep(keys, content, max_length, None, None)
        try:
            self.announce(keys, retry_for=FIRST_TRY)
        except StoreUnavailable as error:
            return self.keep(keys, content, max_length, None, error)
        producer = self._take_connection(keys.jobs)
        try:
            stored = producer.connection.run(make(sequence=producer.sequence), retry_for=FIRST_TRY)
        except StoreUnavailable as error:
            # It may have been stored, so it keeps its sequence and number, and the connection gets another sequence.
            sequence, producer.sequence = producer.sequence, self.new_sequence()
            return self.keep(keys, content, max_length, sequence, error)
        finally:
            producer.free_list.append(producer)
        if stored is True or isinstance(stored, operations.NewQueueIds):
            self.announce_again(keys)
        return stored

    def queue_name(self, keys: QueueKeys) -> QueueName:
        """Return the name under which a buffer holds pushes to *keys*."""
        return self.namespace, keys.queue, keys.foreign

    def keep(
        self,
        keys: QueueKeys,
        content: Sequence[Any],
        max_length: int,
        sequence: ProducerSequence | None,
        error: StoreUnavailable | None,
    ) -> list[str]:
        """Put a push into the buffer: *content* is entries, or id, envelope, id, envelope, …"""
        entries = list(content) if content and isinstance(content[0], Entry) else operations.plain_entries(content)
        entries = [
            msgspec.structs.replace(one, deadline=None) if one.deadline is not None else one for one in entries
        ]  # of this process
        if any(key.conflict == "raise" for entry in entries for key in entry.keys):
            raise StoreUnavailable(
                f"Queue '{keys.queue}' cannot be asked now whether a job with the unique key exists, and Unique(conflict='raise') "
                "promises the answer, so the job was not kept in the buffer. Enqueue it again later."
            ) from error
        if max_length and len(entries) > max_length:
            raise QueueFull(
                f"Queue '{keys.queue}' takes at most {max_length} jobs, and this push has {len(entries)}. Nothing was stored."
            )
        record = SpooledPush(
            self.namespace, keys.queue, entries, time.time(), int(max_length), keys.partitions, foreign=keys.foreign
        )
        if sequence is not None:
            record.lane, record.number = sequence.identity, sequence.number
        if entries:
            self.buffer.add(record, error)
        return [entry.id for entry in entries]

    def confirmed_target(self, durability: Durability) -> ConfirmedTarget:
        """Return the target of confirmed pushes: they are never kept, and never overtake what is."""
        return BufferedConfirmedTarget(self, super().confirmed_target(durability))

    # -- awaitable ----------------------------------------------------------------------------------------------------

    def is_announced(self, keys: QueueKeys) -> bool:
        """Return True: the batcher announces the queue, or keeps the push."""
        return True

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Store *entries* as a client does, or keep them."""
        sequence = self.loop_connections().batcher(keys, max_length)
        ids: list[str] = []
        for part in chunks(entries, whole):
            ids += await sequence.push(part, max_length)
        return ids

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Deliver what can be delivered in time, log the rest, and close."""
        if not self._flushed:
            self._flush()
        super().close()

    def _flush(self) -> None:
        self.buffer.flush()
        if self._delivery.stop():
            self.buffer.release_files()

    async def aclose(self) -> None:
        """Awaitable form of `close`."""
        await asyncio.get_running_loop().run_in_executor(None, self._flush)
        self._flushed = True
        try:
            await super().aclose()
        finally:
            self._flushed = False

    def forked(self) -> None:
        """Start anew in a forked child."""
        super().forked()
        self.buffer.forked()
        self._delivery.forked()


class BufferedConfirmedTarget(ConfirmedTarget):
    """Confirmed pushes of a buffered client: they wait until the buffer is empty."""

    def __init__(self, client: BufferedClient, confirmed: ConfirmedTarget) -> None:
        self._client = client
        self._target = confirmed

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Store *entries* and wait until they are confirmed."""
        client, to = self._client, self._client.queue_name(keys)
        client.refuse_in_loop()
        if client.buffer.holds_back(to) and not client.buffer.wait_empty(client.retry_for, to):
            raise self._not_empty_error()
        return self._target.push(keys, entries, max_length=max_length, whole=whole)

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Awaitable form of `push`."""
        deadline = time.monotonic() + self._client.retry_for
        to = self._client.queue_name(keys)
        while self._client.buffer.holds_back(to):
            if time.monotonic() > deadline:
                raise self._not_empty_error()
            await asyncio.sleep(0.02)
        return await self._target.apush(keys, entries, max_length=max_length, whole=whole)

    def _not_empty_error(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"A push with fsync or wait_replicas cannot overtake the {len(self._client.buffer):,} jobs that wait in the buffer, "
            "and Redis does not accept them now. Nothing was stored. Push again later."
        )


class BufferedBatcher(PushBatcher):
    """A batcher whose calls are kept while Redis is away."""

    def __init__(self, client: BufferedClient, *about: Any) -> None:
        super().__init__(*about, on_new_queue=client.aannounce_again)
        self._client = client
        self._sequence = _day_sequence()
        self._retry_for = FIRST_TRY

    async def send_batch(self, batch: list[PendingPush], plain: bool) -> list[str]:
        """Send one call, or keep it."""
        client, entries = self._client, entries_of(batch)
        if client.buffer.holds_back(client.queue_name(self._keys)):
            if client.buffer.draining:
                await asyncio.sleep(DRAINING_PAUSE)
            return client.keep(self._keys, entries, self._max_length, None, None)
        try:
            await client.aannounce(self._keys, retry_for=FIRST_TRY)
        except StoreUnavailable as error:
            return client.keep(self._keys, entries, self._max_length, None, error)
        try:
            return await super().send_batch(batch, plain)
        except StoreUnavailable as error:
            sequence, self._sequence = self._sequence, _day_sequence()
            return client.keep(self._keys, entries, self._max_length, sequence, error)

    def new_sequence(self) -> ProducerSequence:
        """Return a fresh sequence."""
        return _day_sequence()


class DeliveryPauses:
    """Until when each queue, or all of them (None), is left alone after an attempt that failed."""

    def __init__(self) -> None:
        self._until: dict[QueueName | None, tuple[int, float]] = {}
        self._next = float("inf")

    def allow(self, to: QueueName) -> bool:
        """Tell whether the queue may be tried now."""
        until = max(self._until[one][1] if one in self._until else 0.0 for one in (to, None))
        if until <= time.monotonic():
            return True
        self._next = min(self._next, until)
        return False

    @property
    def for_all(self) -> bool:
        """True when Redis was away at the last attempt: then more pushes are no reason to try."""
        return None in self._until

    def begin(self, to: QueueName | None) -> None:
        """Leave a queue alone for a moment, longer each time."""
        attempt = self._until[to][0] + 1 if to in self._until else 1
        self._until[to] = attempt, time.monotonic() + replies.backoff(attempt, cap=MAX_PAUSE)

    def end(self, to: QueueName | None) -> None:
        """Forget the failures of a queue that accepts again."""
        self._until.pop(to, None)
        self._until.pop(None, None)

    def remaining(self) -> float:
        """Return the seconds until the first queue that `allow` refused since the last call may be tried."""
        until, self._next = self._next, float("inf")
        return max(0.0, until - time.monotonic())


class SpoolDelivery:
    """
    The thread that delivers the buffer.

    It runs while something waits; with a buffer on disk always, because another process may die and leave something.
    """

    def __init__(self, client: BufferedClient, buffer: Buffer) -> None:
        self._client = client
        self._buffer = buffer
        self.forked()

    def forked(self) -> None:
        """Forget the thread, which belongs to the parent."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping, self._changed = SignalSafeEvent(), SignalSafeEvent()

    def start(self) -> None:
        """Start the thread unless it runs; if it sleeps, let it look."""
        with self._lock:
            if self._thread is None:
                self._stopping.clear()
                self._thread = threading.Thread(target=self._run, name="conveyor-buffer", daemon=True)
                self._thread.start()
            self._changed.set()

    def stop(self) -> bool:
        """Stop the thread, which leaves what waits as it is; return whether it has ended."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return True
        self._stopping.set()
        self._changed.set()
        thread.join(10)
        return not thread.is_alive()

    def _run(self) -> None:
        connections: dict[Endpoint, Connection] = {}
        pauses, refusals = DeliveryPauses(), RefusalLog()
        try:
            while True:
                self._changed.clear()
                if self._stopping.is_set():
                    return
                with self._lock:  # so that nothing is added between the check and the end
                    found = self._next(pauses)
                    if found is None and not self._buffer.on_disk and not len(self._buffer):
                        self._thread = None
                        return
                if found is not None:
                    self._deliver(*found, connections, pauses, refusals)
                else:
                    wakes = self._stopping if pauses.for_all else self._changed
                    wakes.wait(min(pauses.remaining(), LOOK_EVERY))
        finally:
            for connection in connections.values():
                connection.close()
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _next(self, pauses: DeliveryPauses) -> tuple[MemorySpool, SpoolBatch] | None:
        try:
            return self._buffer.next_batch(pauses.allow)
        except (OSError, ConfigurationError) as error:
            _log.error("the buffer %s cannot be used: %s", self._buffer.directory, error)
            return None

    def _deliver(
        self,
        spool: MemorySpool,
        batch: SpoolBatch,
        connections: dict[Endpoint, Connection],
        pauses: DeliveryPauses,
        refusals: RefusalLog,
    ) -> None:
        to = batch.first.to
        try:
            number = self._send(spool, batch, connections)
        except StoreUnavailable:
            self._buffer.unanswered()
            # Where all queues have one server, it is away for all of them.
            pauses.begin(None if self._client.has_one_endpoint else to)
        except Exception as error:
            self._buffer.refused()
            pauses.end(None)
            if not isinstance(error, QueueFull):
                refusals.log(batch, error)
            elif self._buffer.halve_batch(spool, batch):
                return
            pauses.begin(to)
        else:
            pauses.end(to)
            if number is not None:
                self._buffer.delivered(spool, batch, number)

    def _send(self, spool: MemorySpool, batch: SpoolBatch, connections: dict[Endpoint, Connection]) -> int | None:
        """Push a batch; return the highest number of its sequence that Redis has taken, None when it was placed anew."""
        first, client = batch.first, self._client
        keys = QueueKeys(first.namespace, first.queue, foreign=first.foreign, partitions=first.partitions)
        client.announce(keys, retry_for=FIRST_TRY)
        endpoint = client.endpoint(keys)
        connection = connections.get(endpoint)
        if connection is None:
            connection = connections[endpoint] = Connection(endpoint, client.timeout)
        try:
            taken = connection.run(_push_of(batch, keys, 0), retry_for=FIRST_TRY)
        except operations.WithdrawnPush:
            # The failed attempt was refused, but nobody was told. Only this push uses its sequence, so the next number is free.
            taken = connection.run(_push_of(batch, keys, 1), retry_for=FIRST_TRY)
        except PartitionCountMismatch as error:
            queue = logical(first.queue)
            if error.recorded is None:
                # Redis was emptied meanwhile, so it has no number yet. Set this one, unless another program was first.
                for claim in claims(first.namespace, queue, keys.partitions):
                    client.run(claim, retry_for=FIRST_TRY)
                taken = connection.run(_push_of(batch, keys, 0), retry_for=FIRST_TRY)
                client.announce_again(keys)
                return int(taken)
            number, change = client.run(count(QueueKeys(first.namespace, queue)), retry_for=FIRST_TRY)
            if change or not number or number == keys.partitions:
                raise  # the change is under way
            # The partition has taken none of these: it would have said so instead. And it takes no late copy any more.
            self._buffer.place_anew(
                spool, batch, [one for record in batch.records for one in place_anew(record, number)]
            )
            return None
        if isinstance(taken, operations.NewQueueNumber):
            client.announce_again(keys)
        return int(taken)


class RefusalLog:
    """Logs refusals that an operator has to end: of each queue one a minute."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def log(self, batch: SpoolBatch, error: Exception) -> None:
        """Log *error*, which refused *batch*."""
        queue, now = batch.first.queue, time.monotonic()
        if now - self._logged_at.get(queue, -_LOG_AGAIN_AFTER) < _LOG_AGAIN_AFTER:
            return
        self._logged_at[queue] = now
        _log.error(
            "queue %s: buffered jobs cannot be delivered until this is fixed: %s", queue, error,
            exc_info=not isinstance(error, ConveyorError),
        )  # fmt: skip


def place_anew(record: SpooledPush, partitions: int) -> list[SpooledPush]:
    """Return the records that take the place of *record* when its queue has another number of *partitions*."""
    queue = logical(record.queue)
    placed: dict[str, list[Entry]] = {}
    for entry in record.entries:
        at = partition_of(
            next(key for key in (entry.group, entry.placing_key, entry.id) if key is not None), partitions
        )
        placed.setdefault(queue if partitions == 1 else partition(queue, at), []).append(entry)
    # A sequence of its own, because the new place may have higher numbers of the old one.
    lane = f"{record.queue}>{record.lane}"
    most = max(1, record.max_length * record.partitions // partitions) if record.max_length else 0
    return [
        replace(record, queue=name, entries=entries, partitions=partitions, lane=lane, max_length=most)
        for name, entries in placed.items()
    ]


def _push_of(batch: SpoolBatch, keys: QueueKeys, skipped: int) -> Call[int]:
    """Return the call that delivers *batch*; *skipped* numbers of its sequence were given up."""
    first, entries = batch.first, batch.entries(time.time())
    numbers = range(first.number + skipped, batch.last_number + skipped + 1)
    return operations.push_numbered(keys, first.lane, numbers, entries, max_length=first.max_length)


def _day_sequence() -> ProducerSequence:
    return ProducerSequence(day_identity())


def _nothing() -> None:
    """Do nothing: `start_push_plain` has stored everything already."""
