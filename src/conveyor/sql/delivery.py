"""
Delivery of committed rows to Redis, each exactly once, with any number of deliverers and after any number of kills.

A batch of rows gets a name, and that is committed. Then its rows are pushed in a sequence of that name, and deleted. A
deliverer that finds named rows pushes the same rows in the same sequence again, which Redis answers from its memory if
it has them. Nothing is pushed before a batch that was named earlier, so rows leave in their order. A refusal of one
queue holds up that queue alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from conveyor import ids
from conveyor.errors import ConveyorError, QueueFull, StoreUnavailable
from conveyor.ids import new_identity
from conveyor.messaging import outbox
from conveyor.sql.transaction import explain_missing_table
from conveyor.store import operations
from conveyor.store.client.spool import DAY_SUFFIX, MAX_BYTES, MAX_JOBS, SpooledPush
from conveyor.store.keys import database_outboxes
from conveyor.store.operations import Entry, ProducerSequence, StalePush

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.sql.drivers import DbConnection
    from conveyor.sql.tables import TableSql


RETRY_FOR = 1.0
NEXT = """SELECT seq, LENGTH(entry) FROM {table}
 WHERE namespace = ? AND batch = ''{others} ORDER BY seq LIMIT 1000"""
CLAIM = "UPDATE {table} SET batch = ? WHERE namespace = ? AND batch = '' AND seq <= ?{others}"
# batch > '' and not batch <> '': an index finds it.
NAMED = """SELECT batch, queue, seq, created_ms, entry FROM {table}
 WHERE namespace = ? AND batch > '' AND batch <> '!' ORDER BY seq"""
ALSO_NAMED = """SELECT DISTINCT queue FROM {table}
 WHERE namespace = ? AND batch > '' AND batch <> '!' AND batch <> ?"""
SET_ASIDE = "UPDATE {table} SET batch = '!' WHERE namespace = ? AND batch = ? AND queue = ? AND seq = ?"
RENAME = "UPDATE {table} SET batch = ? WHERE namespace = ? AND batch = ? AND queue = ? AND seq <= ?"
MOVE = "UPDATE {table} SET batch = '', queue = ? WHERE namespace = ? AND batch = ? AND queue = ? AND seq = ?"
DELETE = "DELETE FROM {table} WHERE namespace = ? AND batch = ? AND queue = ?"
log = logging.getLogger("conveyor.relay")


@dataclass(slots=True)
class DeliveryBatch:
    """The rows of one name that go to one queue or partition: pushed together, in a sequence of their own."""

    name: str
    queue: str
    seqs: list[int]
    entries: list[Entry]

    @property
    def sequence(self) -> str:
        """The name of their sequence."""
        return self.name + DAY_SUFFIX


@dataclass(slots=True)
class DeliveryPass:
    """The result of one pass: rows delivered and refusals, by queue; and whether a batch was left to another deliverer."""

    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, ConveyorError] = field(default_factory=dict)
    left_to_another: bool = False

    @property
    def count(self) -> int:
        """The number of rows delivered."""
        return sum(self.counts.values())


class OutboxDelivery:
    """Delivers the rows of one table that belong to one app."""

    def __init__(self, core: AppCore, table: TableSql) -> None:
        self._core, self._table = core, table
        self._is_recorded = False
        self._own_batches: set[str] = set()
        self._first_seen: dict[str, float] = {}

    def deliver(self, db: DbConnection, *, skipped: Collection[str] = (), grace: float = 0.0) -> DeliveryPass:
        """
        Deliver all committed rows, except for the queues that are *skipped*.

        A batch of another deliverer is left to it for *grace* seconds, and nothing is pushed before it. Raises the
        errors of the driver; refusals of Redis are part of the result.
        """
        result, skip = DeliveryPass(), set(skipped)
        with explain_missing_table(self._table):
            while True:
                batches = self._named_batches(db)
                recent = self._recent_of_others(batches, grace)
                renamed: set[str] = set()  # queues whose first rows have new names: the rows behind them must wait
                for batch in batches:
                    if batch.name in recent:
                        result.left_to_another = True
                        return result
                    if batch.queue in skip or batch.queue in renamed:
                        continue
                    try:
                        count = self._deliver_batch(db, batch, RETRY_FOR if not _is_away(result) else 0.0)
                    except ConveyorError as error:
                        result.refusals[batch.queue] = error
                        skip.add(batch.queue)
                        continue
                    if count:
                        result.counts[batch.queue] = result.counts.get(batch.queue, 0) + count
                    else:
                        renamed.add(batch.queue)
                if not renamed and not self._claim(db, skip):
                    return result

    def _run(self, db: DbConnection, sql: str, *values: object) -> int:
        return db.run(self._table.fill(sql), *values).row_count

    # -- which rows ---------------------------------------------------------------------------------------------------

    def _claim(self, db: DbConnection, skipped: Collection[str]) -> bool:
        """Give the next rows a name; return whether there were any."""
        namespace, waits = self._core.client.namespace, tuple(skipped)
        others = f" AND queue NOT IN ({', '.join('?' * len(waits))})" if waits else ""
        rows = db.run(self._table.fill(NEXT).replace("{others}", others), namespace, *waits).rows
        db.commit()  # a database keeps the rows that a transaction has read, and some see the same snapshot until its end
        if not rows:
            return False
        name = new_identity()
        self._run(db, CLAIM.replace("{others}", others), name, namespace, _last_seq(rows), *waits)
        # Another deliverer may have claimed a moment ago. The rows that it left follow its rows, even with lower
        # numbers, because a number is drawn before its commit.
        if {queue for (queue,) in db.run(self._table.fill(ALSO_NAMED), namespace, name).rows} - set(skipped):
            db.rollback()
        else:
            db.commit()
            self._own_batches.add(name)
        return True

    def _named_batches(self, db: DbConnection) -> list[DeliveryBatch]:
        rows = db.run(self._table.fill(NAMED), self._core.client.namespace).rows
        db.commit()
        firsts: dict[tuple[str, str], int] = {}
        for name, queue, seq, *_ in rows:
            firsts.setdefault((name, queue), seq)
        rows.sort(key=lambda row: (firsts[row[0], row[1]], row[2]))  # rows of one sequence stand together
        return [
            self._read_batch(db, *which, list(group))
            for which, group in groupby(rows, key=lambda row: (row[0], row[1]))
        ]

    def _read_batch(
        self, db: DbConnection, name: str, queue: str, rows: Sequence[tuple[str, str, int, int, bytes]]
    ) -> DeliveryBatch:
        batch, now = DeliveryBatch(name, queue, [], []), time.time()
        for _, _, seq, created_ms, data in rows:
            try:
                _, entry = outbox.read(bytes(data))
            except (msgspec.DecodeError, ValueError) as error:
                self._set_aside(db, batch, seq, error)
                continue
            batch.seqs.append(seq)
            batch.entries += SpooledPush(self._core.client.namespace, queue, [entry], created_ms / 1000).due(now)
        return batch

    def _set_aside(self, db: DbConnection, batch: DeliveryBatch, seq: int, error: Exception) -> None:
        self._run(db, SET_ASIDE, self._core.client.namespace, batch.name, batch.queue, seq)
        db.commit()
        log.error(
            "E49 row %d of %s, for queue '%s', cannot be read (%s). It is set aside, and outbox.redrive() puts it back",
            seq, self._table, batch.queue, error,
        )  # fmt: skip

    def _recent_of_others(self, batches: Sequence[DeliveryBatch], grace: float) -> set[str]:
        """Return the batches that another deliverer may be working on: they were first seen within *grace* seconds."""
        now, names = time.monotonic(), {batch.name for batch in batches}
        self._own_batches &= names
        self._first_seen = {name: self._first_seen.get(name, now) for name in names - self._own_batches}
        return {name for name, since in self._first_seen.items() if now - since < grace}

    # -- one part -----------------------------------------------------------------------------------------------------

    def _deliver_batch(self, db: DbConnection, batch: DeliveryBatch, retry_for: float) -> int:
        """Push a batch and delete its rows; return how many, 0 when they got new names instead."""
        if not batch.entries:
            return 0
        if any(self._destination(batch.queue, entry) != batch.queue for entry in batch.entries):
            return self._requeue(db, batch)
        try:
            self._push(batch, retry_for)
        except StalePush:
            return self._split(db, batch)
        except QueueFull:
            if len(batch.entries) == 1:
                raise
            # Fewer may fit. First the sequence is closed, so that no late copy of the whole can follow a half.
            keys = self._core.keys(batch.queue)
            self._core.client.run(operations.fence(keys, batch.sequence), retry_for=retry_for)
            try:
                self._push(batch, retry_for)
            except StalePush:
                return self._split(db, batch)
        return self._delete(db, batch)

    def _push(self, batch: DeliveryBatch, retry_for: float) -> None:
        core, queue = self._core, ids.logical(batch.queue)
        client, keys = core.client, core.keys(batch.queue)
        client.announce(keys, retry_for=retry_for)
        self._record(retry_for)
        declared, partitions = core.bounded.get(queue), core.partitioned.get(queue)
        asks = None if declared is None else declared.durability
        most = partitions.max_length if partitions else declared.max_length if declared else None
        # Not `push_plain`: its script would open a sequence that was closed.
        call = operations.push(
            keys, ProducerSequence(batch.sequence, resends_refused=True), batch.entries, max_length=most or 0
        )
        work = partial(client.push_unbuffered, keys, call, asks, retry_for=retry_for)
        ids_ = work() if partitions is None else partitions.run_agreed(work)
        if isinstance(ids_, operations.NewQueueIds):
            client.announce_again(keys)
            self._is_recorded = False

    def _record(self, retry_for: float) -> None:
        """Record once that this table delivers here: a sweep in a program that does not know it must not run."""
        if not self._is_recorded:
            client = self._core.client
            with suppress(ConveyorError):
                client.run(
                    operations.announce(database_outboxes(client.namespace), self._table.name), retry_for=retry_for
                )
                self._is_recorded = True

    def _delete(self, db: DbConnection, batch: DeliveryBatch) -> int:
        count = self._run(db, DELETE, self._core.client.namespace, batch.name, batch.queue)
        db.commit()
        return len(batch.entries) if count < 0 else count

    def _split(self, db: DbConnection, batch: DeliveryBatch) -> int:
        """Give both halves of a batch whose sequence is closed new names; the first half first, in case of a kill."""
        namespace, middle, end = self._core.client.namespace, len(batch.seqs) // 2, batch.seqs[-1]
        for last in [batch.seqs[middle - 1], end] if middle else [end]:
            name = new_identity()
            self._own_batches.add(name)
            self._run(db, RENAME, name, namespace, batch.name, batch.queue, last)
        db.commit()
        return 0

    # -- partitions that changed --------------------------------------------------------------------------------------

    def _destination(self, queue: str, entry: Entry) -> str:
        """Return the queue or partition of a row now: another one when the number of partitions has changed."""
        core = self._core
        if queue in core.plain_lists:
            return queue
        partitions = core.partitioned.get(ids.logical(queue))
        if partitions is None:
            return ids.logical(queue)
        if any(keys.queue == queue for keys in partitions.keys):
            return queue
        return partitions.keys[partitions.pick(group=entry.group, unique=entry.placing_key, id=entry.id)].queue

    def _requeue(self, db: DbConnection, batch: DeliveryBatch) -> int:
        """Let rows wait for their new partition, unless the old one had accepted them."""
        key, namespace = self._core.keys(batch.queue).lane(batch.sequence), self._core.client.namespace
        remembered = self._core.client.execute("GET", key, key=key, retry_for=RETRY_FOR)
        if isinstance(remembered, bytes) and remembered.startswith(b"1\nok"):
            return self._delete(db, batch)
        for seq, entry in zip(batch.seqs, batch.entries, strict=True):
            self._run(db, MOVE, self._destination(batch.queue, entry), namespace, batch.name, batch.queue, seq)
        db.commit()
        return 0


def _last_seq(rows: Sequence[tuple[int, int]]) -> int:
    """Return the number of the last row that fits into one batch."""
    size = 0
    for at, (seq, length) in enumerate(rows):
        size += length
        if at and size > MAX_BYTES:
            return rows[at - 1][0]
        if at == MAX_JOBS - 1:
            return seq
    return rows[-1][0]


def _is_away(result: DeliveryPass) -> bool:
    return any(isinstance(error, StoreUnavailable) for error in result.refusals.values())
