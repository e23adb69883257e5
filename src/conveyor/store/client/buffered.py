"""A client whose pushes are kept while Redis is away, and the thread that delivers them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConveyorError, QueueFull, StoreUnavailable
from conveyor.ids import logical
from conveyor.store import operations
from conveyor.store.client.batching import PendingPush, PushBatcher, chunks, entries_of
from conveyor.store.client.buffer import Buffer
from conveyor.store.client.client import RETRY_FOR, Client, refuse_in_loop
from conveyor.store.client.confirmed import ConfirmedTarget
from conveyor.store.client.durability import Durability
from conveyor.store.client.spool import MemorySpool, SpoolBatch, SpooledPush, day_identity
from conveyor.store.keys import QueueKeys, known_queues
from conveyor.store.operations import Entry, ProducerSequence
from conveyor.store.partitions import PartitionCountMismatch, claims
from conveyor.store.script import Argument, Call
from conveyor.store.signal_safety import SignalSafeEvent
from conveyor.store.transport import replies
from conveyor.store.transport.connection import Connection

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

    What an earlier process left in the buffer is delivered at once.
    """

    def __init__(
        self, url: str | None = None, *, namespace: str = "conveyor", retry_for: float = RETRY_FOR, buffer: Buffer
    ) -> None:
        super().__init__(url, namespace=namespace, retry_for=retry_for)
        self.buffer: Buffer = buffer
        self.new_sequence = _day_sequence
        self.make_batcher = partial(BufferedBatcher, self)
        self._delivery = SpoolDelivery(self, buffer)
        self._flushed = False
        buffer.bind(self._delivery.start)
        if buffer.has_leftovers():
            self._delivery.start()

    # -- blocking -----------------------------------------------------------------------------------------------------

    def push(self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False) -> list[str]:
        """Store *entries* as a client does, or keep them."""
        refuse_in_loop()
        ids: list[str] = []
        for part in chunks(entries, whole):
            make = partial(operations.push, keys, entries=part, max_length=max_length)
            ids += self._push_or_keep(keys, part, max_length, make)
        return ids

    def push_plain(self, keys: QueueKeys, pairs: Sequence[Argument], *, max_length: int = 0) -> None:
        """Store plain messages as a client does, or keep them."""
        refuse_in_loop()
        self._push_or_keep(
            keys, pairs, max_length, partial(operations.push_plain, keys, pairs=pairs, max_length=max_length)
        )

    def start_push_plain(self, keys: QueueKeys, pairs: Sequence[Argument]) -> Callable[[], None]:
        """Store plain messages before returning: a push in flight could not be kept in order."""
        self.push_plain(keys, pairs)
        return _nothing

    def _push_or_keep(self, keys: QueueKeys, content: Sequence[Any], max_length: int, make: Callable[..., Any]) -> Any:
        if self.buffer.waiting:
            if self.buffer.draining:
                self.buffer.wait_empty(DRAINING_PAUSE)
            return self.keep(keys, content, max_length, None, None)
        try:
            self.announce_within(keys, FIRST_TRY)
        except StoreUnavailable as error:
            return self.keep(keys, content, max_length, None, error)
        producer = self._take_connection(keys.jobs)
        try:
            return producer.connection.run(make(sequence=producer.sequence), retry_for=FIRST_TRY)
        except StoreUnavailable as error:
            # It may have been stored, so it keeps its sequence and number, and the connection gets another sequence.
            sequence, producer.sequence = producer.sequence, self.new_sequence()
            return self.keep(keys, content, max_length, sequence, error)
        finally:
            producer.free_list.append(producer)

    def announce_within(self, keys: QueueKeys, retry_for: float) -> None:
        """Announce a queue as `announce` does, retrying for its own time."""
        if keys.queue not in self._announced:
            self.run(operations.announce(known_queues(self.namespace), keys.queue), retry_for=retry_for)
            self._announced.add(keys.queue)

    async def aannounce_within(self, keys: QueueKeys) -> None:
        """Awaitable form of `announce_within`."""
        if keys.queue not in self._announced:
            await self.arun(operations.announce(known_queues(self.namespace), keys.queue), retry_for=FIRST_TRY)
            self._announced.add(keys.queue)

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
        if max_length and len(entries) > max_length:
            raise QueueFull(
                f"Queue '{keys.queue}' takes at most {max_length} jobs, and this push has {len(entries)}. Nothing was stored."
            )
        record = SpooledPush(
            self.namespace, keys.queue, entries, time.time(), max_length, keys.partitions, foreign=keys.foreign
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
            ids += await sequence.push(part)
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
        refuse_in_loop()
        if self._client.buffer.waiting and not self._client.buffer.wait_empty(self._client.retry_for):
            raise self._not_empty_error()
        return self._target.push(keys, entries, max_length=max_length, whole=whole)

    async def apush(
        self, keys: QueueKeys, entries: Sequence[Entry], *, max_length: int = 0, whole: bool = False
    ) -> list[str]:
        """Awaitable form of `push`."""
        deadline = time.monotonic() + self._client.retry_for
        while self._client.buffer.waiting:
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
        super().__init__(*about)
        self._client = client
        self._sequence = _day_sequence()
        self._retry_for = FIRST_TRY

    async def send_batch(self, batch: list[PendingPush], plain: bool) -> list[str]:
        """Send one call, or keep it."""
        client, entries = self._client, entries_of(batch)
        if client.buffer.waiting:
            if client.buffer.draining:
                await asyncio.sleep(DRAINING_PAUSE)
            return client.keep(self._keys, entries, self._max_length, None, None)
        try:
            await client.aannounce_within(self._keys)
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


class SpoolDelivery:
    """The thread that delivers the buffer; it runs while something waits."""

    def __init__(self, client: BufferedClient, buffer: Buffer) -> None:
        self._client = client
        self._buffer = buffer
        self.forked()

    def forked(self) -> None:
        """Forget the thread, which belongs to the parent."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = SignalSafeEvent()

    def start(self) -> None:
        """Start the thread unless it runs."""
        with self._lock:
            if self._thread is None:
                self._stopping.clear()
                self._thread = threading.Thread(target=self._run, name="conveyor-buffer", daemon=True)
                self._thread.start()

    def stop(self) -> bool:
        """Stop the thread, which leaves what waits as it is; return whether it has ended."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return True
        self._stopping.set()
        thread.join(10)
        return not thread.is_alive()

    def _run(self) -> None:
        attempt, logged_at = 0, 0.0
        connections: dict[Endpoint, Connection] = {}
        try:
            while not self._stopping.is_set():
                with self._lock:  # so that nothing is added between the check and the end
                    waiting = self._next()
                    if waiting is None:
                        self._thread = None
                        return
                if isinstance(waiting, OSError):
                    self._stopping.wait(MAX_PAUSE)
                    continue
                spool, batch = waiting
                try:
                    number = self._send(batch, connections)
                except StoreUnavailable:
                    attempt, self._buffer.draining = attempt + 1, False
                except QueueFull:
                    attempt = 0 if self._buffer.halve_batch(spool, batch) else attempt + 1
                except Exception as error:
                    attempt += 1
                    if time.monotonic() - logged_at > _LOG_AGAIN_AFTER:
                        logged_at = time.monotonic()
                        _log_refusal(batch, error)
                else:
                    self._buffer.delivered(spool, batch, number)
                    attempt = 0
                    continue
                self._stopping.wait(replies.backoff(attempt, cap=MAX_PAUSE))
        finally:
            for connection in connections.values():
                connection.close()
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _next(self) -> tuple[MemorySpool, SpoolBatch] | OSError | None:
        try:
            return self._buffer.next_batch()
        except OSError as error:
            _log.error("the buffer %s cannot be written: %s", self._buffer.directory, error)
            return error

    def _send(self, batch: SpoolBatch, connections: dict[Endpoint, Connection]) -> int:
        """Push a batch; return the highest number of its sequence that Redis has taken."""
        first, client = batch.first, self._client
        keys = QueueKeys(first.namespace, first.queue, foreign=first.foreign, partitions=first.partitions)
        client.announce_within(keys, FIRST_TRY)
        endpoint = client.endpoint(keys)
        connection = connections.get(endpoint)
        if connection is None:
            connection = connections[endpoint] = Connection(endpoint)
        try:
            return connection.run(_push_of(batch, keys, 0), retry_for=FIRST_TRY)
        except operations.WithdrawnPush:
            # The failed attempt was refused, but nobody was told. Only this push uses its sequence, so the next number is free.
            return connection.run(_push_of(batch, keys, 1), retry_for=FIRST_TRY)
        except PartitionCountMismatch as error:
            if error.recorded is not None:
                raise
            # Redis was emptied meanwhile, so it has no number yet. Set this one, unless another program was first.
            for claim in claims(first.namespace, logical(first.queue), keys.partitions):
                client.run(claim, retry_for=FIRST_TRY)
            return connection.run(_push_of(batch, keys, 0), retry_for=FIRST_TRY)


def _push_of(batch: SpoolBatch, keys: QueueKeys, skipped: int) -> Call[int]:
    """Return the call that delivers *batch*; *skipped* numbers of its sequence were given up."""
    first, entries = batch.first, batch.entries(time.time())
    numbers = range(first.number + skipped, batch.last_number + skipped + 1)
    return operations.push_numbered(keys, first.lane, numbers, entries, max_length=first.max_length)


def _log_refusal(batch: SpoolBatch, error: Exception) -> None:
    _log.error(
        "queue %s: buffered jobs cannot be delivered until this is fixed: %s", batch.first.queue, error,
        exc_info=not isinstance(error, ConveyorError),
    )  # fmt: skip


def _day_sequence() -> ProducerSequence:
    return ProducerSequence(day_identity())


def _nothing() -> None:
    """Do nothing: `start_push_plain` has stored everything already."""
