"""
From committed rows to Redis, each exactly once, however often the deliverer is killed and however many there are.

A batch of rows gets a name, and that is committed; then they are pushed in a lane of that name, and deleted. Who finds
named rows pushes just these in that lane again, which Redis answers from its memory if it has them. Nothing goes before
what was named earlier, so rows leave in their order. What one queue refuses holds up that queue alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from conveyor import ids
from conveyor.errors import ConveyorError, QueueFull, StoreUnavailable
from conveyor.ids import new_identity
from conveyor.jobs import spawn_outbox
from conveyor.sql.transaction import explained
from conveyor.store import operations
from conveyor.store.client.buffer import DAY
from conveyor.store.client.spool import MOST_BYTES, MOST_JOBS, SpooledPush
from conveyor.store.keys import known_queues
from conveyor.store.operations import Entry, ProducerSequence, StalePush

if TYPE_CHECKING:
    from conveyor.jobs.core import AppCore
    from conveyor.sql.drivers import DbConnection
    from conveyor.sql.tables import TableSql


PATIENCE = 1.0
NEXT = """SELECT seq, LENGTH(entry) FROM {table}
 WHERE namespace = ? AND batch = ''{others} ORDER BY seq LIMIT 1000"""
CLAIM = "UPDATE {table} SET batch = ? WHERE namespace = ? AND batch = '' AND seq <= ?{others}"
# Above '' and not unequal to it: that an index finds.
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
    """Rows of one batch that go to one place: pushed together, in a lane of their own."""

    batch: str
    queue: str
    seqs: list[int]
    entries: list[Entry]

    @property
    def lane(self) -> str:
        """The name of their lane."""
        return self.batch + DAY


@dataclass(slots=True)
class DeliveryPass:
    """What one pass did, by queue: rows taken to Redis, refusals; and whether it left a batch to another deliverer."""

    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, ConveyorError] = field(default_factory=dict)
    left: bool = False

    @property
    def count(self) -> int:
        """All rows taken to Redis."""
        return sum(self.counts.values())


class OutboxDelivery:
    """Delivers the rows of one table that belong to one app."""

    def __init__(self, core: AppCore, table: TableSql) -> None:
        """Take whose rows, and where they lie."""
        self._core, self._table = core, table
        self._known: set[str] = set()
        self._mine: set[str] = set()
        self._seen: dict[str, float] = {}

    def pass_through(self, link: DbConnection, *, resting: Collection[str] = (), courtesy: float = 0.0) -> DeliveryPass:
        """
        Deliver all that is committed by now, but for the queues that are *resting*.

        A batch of another deliverer is left to it for so many seconds of *courtesy*, and nothing is pushed before it.
        Raises what the driver raises; a refusal of Redis is told in what is returned.
        """
        passed, rest = DeliveryPass(), set(resting)
        with explained(self._table):
            while True:
                parts = self._named(link)
                recent = self._of_others(parts, courtesy)
                renamed: set[str] = set()  # queues whose first rows have other names now: what follows comes after them
                for part in parts:
                    if part.batch in recent:
                        passed.left = True
                        return passed
                    if part.queue in rest or part.queue in renamed:
                        continue
                    try:
                        count = self._carry(link, part, PATIENCE if not _away(passed) else 0.0)
                    except ConveyorError as error:
                        passed.refusals[part.queue] = error
                        rest.add(part.queue)
                        continue
                    if count:
                        passed.counts[part.queue] = passed.counts.get(part.queue, 0) + count
                    else:
                        renamed.add(part.queue)
                if not renamed and not self._claim(link, rest):
                    return passed

    def _run(self, link: DbConnection, sql: str, *values: object) -> int:
        return link.run(self._table.fill(sql), *values).touched

    # -- which rows ---------------------------------------------------------------------------------------------------

    def _claim(self, link: DbConnection, resting: Collection[str]) -> bool:
        """Name the next rows; return whether there were any."""
        space, waits = self._core.client.namespace, tuple(resting)
        others = f" AND queue NOT IN ({', '.join('?' * len(waits))})" if waits else ""
        rows = link.run(self._table.fill(NEXT).replace("{others}", others), space, *waits).rows
        link.commit()  # a database holds what a transaction has read, and some go on seeing just that
        if not rows:
            return False
        name = new_identity()
        self._run(link, CLAIM.replace("{others}", others), name, space, _last(rows), *waits)
        # Another may have claimed a moment ago: what it left over follows its rows, even where it has lower numbers,
        # since a number is drawn before its commit.
        if {queue for (queue,) in link.run(self._table.fill(ALSO_NAMED), space, name).rows} - set(resting):
            link.rollback()
        else:
            link.commit()
            self._mine.add(name)
        return True

    def _named(self, link: DbConnection) -> list[DeliveryBatch]:
        rows = link.run(self._table.fill(NAMED), self._core.client.namespace).rows
        link.commit()
        firsts: dict[tuple[str, str], int] = {}
        for batch, queue, seq, *_ in rows:
            firsts.setdefault((batch, queue), seq)
        rows.sort(key=lambda row: (firsts[row[0], row[1]], row[2]))  # what shares a lane stands together
        return [
            self._part(link, *which, list(group)) for which, group in groupby(rows, key=lambda row: (row[0], row[1]))
        ]

    def _part(
        self, link: DbConnection, batch: str, queue: str, rows: Sequence[tuple[str, str, int, int, bytes]]
    ) -> DeliveryBatch:
        part, now = DeliveryBatch(batch, queue, [], []), time.time()
        for _, _, seq, created_ms, data in rows:
            try:
                _, entry = spawn_outbox.read(bytes(data))
            except (msgspec.DecodeError, ValueError) as error:
                self._set_aside(link, part, seq, error)
                continue
            part.seqs.append(seq)
            part.entries += SpooledPush(self._core.client.namespace, queue, [entry], created_ms / 1000).due(now)
        return part

    def _set_aside(self, link: DbConnection, part: DeliveryBatch, seq: int, error: Exception) -> None:
        self._run(link, SET_ASIDE, self._core.client.namespace, part.batch, part.queue, seq)
        link.commit()
        log.error(
            "E49 row %d of %s, for queue '%s', cannot be read (%s). It is set aside, and outbox.redrive() puts it back",
            seq, self._table, part.queue, error,
        )  # fmt: skip

    def _of_others(self, parts: Sequence[DeliveryBatch], courtesy: float) -> set[str]:
        """Return the batches that another deliverer is at work on, as far as one can see: they are new here."""
        now, names = time.monotonic(), {part.batch for part in parts}
        self._mine &= names
        self._seen = {name: self._seen.get(name, now) for name in names - self._mine}
        return {name for name, since in self._seen.items() if now - since < courtesy}

    # -- one part -----------------------------------------------------------------------------------------------------

    def _carry(self, link: DbConnection, part: DeliveryBatch, patience: float) -> int:
        """Push a part and delete its rows; return how many, 0 when they were named anew instead."""
        if not part.entries:
            return 0
        if any(self._place(part.queue, entry) != part.queue for entry in part.entries):
            return self._move(link, part)
        try:
            self._push(part, patience)
        except StalePush:
            return self._split(link, part)
        except QueueFull:
            if len(part.entries) == 1:
                raise
            # Fewer may fit. First its lane is shut, so that no late copy of the whole can come after a half.
            keys = self._core.keys(part.queue)
            self._core.client.run(operations.fence(keys, part.lane), patience=patience)
            try:
                self._push(part, patience)
            except StalePush:
                return self._split(link, part)
        return self._delete(link, part)

    def _push(self, part: DeliveryBatch, patience: float) -> None:
        core, queue = self._core, ids.logical(part.queue)
        client, keys = core.client, core.keys(part.queue)
        if part.queue not in self._known:
            known = known_queues(client.namespace)
            client.run(operations.announce(known, keys.queue), patience=patience)
            self._known.add(part.queue)
        declared, partitions = core.bounded.get(queue), core.partitioned.get(queue)
        asks = None if declared is None else declared.asks
        most = partitions.most if partitions else declared.max_length if declared else None
        # Not `push_plain`: its script would open a lane that was shut.
        call = operations.push(keys, ProducerSequence(part.lane, insists=True), part.entries, max_length=most or 0)
        work = partial(client.carry, keys, call, asks, patience=patience)
        if partitions is None:
            work()
        else:
            partitions.keep(work)

    def _delete(self, link: DbConnection, part: DeliveryBatch) -> int:
        count = self._run(link, DELETE, self._core.client.namespace, part.batch, part.queue)
        link.commit()
        return len(part.entries) if count < 0 else count

    def _split(self, link: DbConnection, part: DeliveryBatch) -> int:
        """Give both halves of a part whose lane is shut names of their own: the first half first, in case of a kill."""
        space, middle, end = self._core.client.namespace, len(part.seqs) // 2, part.seqs[-1]
        for last in [part.seqs[middle - 1], end] if middle else [end]:
            name = new_identity()
            self._mine.add(name)
            self._run(link, RENAME, name, space, part.batch, part.queue, last)
        link.commit()
        return 0

    # -- partitions that changed --------------------------------------------------------------------------------------

    def _place(self, queue: str, entry: Entry) -> str:
        """Return where a row for *queue* goes now: elsewhere when its partition is no more, or not yet."""
        core = self._core
        if queue in core.plain_lists:
            return queue
        partitions = core.partitioned.get(ids.logical(queue))
        if partitions is None:
            return ids.logical(queue)
        if any(keys.queue == queue for keys in partitions.keys):
            return queue
        return partitions.keys[partitions.pick(unique=entry.unique, id=entry.id)].queue

    def _move(self, link: DbConnection, part: DeliveryBatch) -> int:
        """Have rows wait for where they go now, unless they had arrived where they went before."""
        lane, space = self._core.keys(part.queue).lane(part.lane), self._core.client.namespace
        said = self._core.client.execute("GET", lane, key=lane, patience=PATIENCE)
        if isinstance(said, bytes) and said.startswith(b"1\nok"):
            return self._delete(link, part)
        for seq, entry in zip(part.seqs, part.entries, strict=True):
            self._run(link, MOVE, self._place(part.queue, entry), space, part.batch, part.queue, seq)
        link.commit()
        return 0


def _last(rows: Sequence[tuple[int, int]]) -> int:
    """Return the number of the last of the first *rows* that may travel in one batch."""
    size = 0
    for at, (seq, length) in enumerate(rows):
        size += length
        if at and size > MOST_BYTES:
            return rows[at - 1][0]
        if at == MOST_JOBS - 1:
            return seq
    return rows[-1][0]


def _away(passed: DeliveryPass) -> bool:
    return any(isinstance(error, StoreUnavailable) for error in passed.refusals.values())
