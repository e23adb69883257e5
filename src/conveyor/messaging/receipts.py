"""
Receipts: pulled messages that any program can settle later, without the objects of the one that pulled them.

Each message is held by an identity of its own, which its receipt names. Whoever settles it first moves it to an identity that
nobody else knows, in one step, so that of two ends at the same time one is refused; then the usual turn reports the end.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from conveyor import ids
from conveyor.errors import ConfigurationError, ConveyorError, LeaseLost
from conveyor.messaging.consumer.asynchronous import see_through
from conveyor.messaging.consumer.settling import PartitionSource
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.message import Message, success
from conveyor.messaging.plain_list import PlainList
from conveyor.messaging.queue import Queue
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.pipeline import PLAIN
from conveyor.payload.records import AttemptHistory, read_envelope
from conveyor.store import inspection, operations
from conveyor.store.inspection import JobRow
from conveyor.store.operations import Settlement
from conveyor.store.script import CallProgram, adrive
from conveyor.units import digits

SettledAs = Literal["done", "retried", "dead", "extended", "lost"]
HowToEnd = Callable[[SettlementPolicy, LeasedMessage], Settlement]
_OUTCOMES: dict[str, SettledAs] = {"D": "done", "R": "retried", "X": "dead"}


class Receipt(NamedTuple):
    """A held message: the queue or partition, the identity that holds it, and its bare id."""

    queue: str
    worker: str
    id: str

    def __str__(self) -> str:
        text = json.dumps(self, ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def read_receipt(text: str) -> Receipt:
    """Return the receipt that *text* stands for. Raises ConfigurationError."""
    try:
        data = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        parts = json.loads(data)
        queue, worker, id_ = parts
        name, slash, number = queue.partition("/")
        ids.queue_name(name)
        if not (
            worker.isalnum() and worker.isascii() and id_.isprintable() and (not slash or digits(number) is not None)
        ):
            raise ValueError
        return Receipt(queue, worker, id_)
    except (binascii.Error, ValueError, TypeError, AttributeError, ConveyorError, RecursionError):
        raise ConfigurationError(f"{text[:40]!r} is no receipt of a message. Nothing was settled.") from None


async def pull(queue: Queue[Any], most: int, wait: float, lease_ms: int | None) -> list[tuple[Receipt, Message[Any]]]:
    """
    Return up to *most* messages with their receipts as soon as there is one, or none after *wait* seconds.

    *lease_ms*: None: that of the queue. When this is cancelled, what was pulled is handed back.
    """
    if isinstance(queue, PlainList):
        raise ConfigurationError(f"{queue.name!r} is a plain list: its entries have no receipts. Nothing was pulled.")
    messages = await queue.apull(most, wait)
    found: list[tuple[Receipt, Message[Any]]] = []
    try:
        for message in messages:
            with suppress(LeaseLost):
                await message.astart()
                found.append((await _receipt(message, queue, lease_ms), message))
    except BaseException:
        await hand_back(messages)
        raise
    return found


async def _receipt(message: Message[Any], queue: Queue[Any], lease_ms: int | None) -> Receipt:
    leased = message._leased  # noqa: SLF001
    if lease_ms is not None or len(leased.session.held) > 1:
        await message.aextend((lease_ms or queue.lease_ms) / 1000)
    return Receipt(leased.session.keys.queue, leased.session.worker, leased.id)


async def hand_back(messages: list[Message[Any]]) -> None:
    """Give messages back to the front of their queue, as if they had not been pulled, also where this is cancelled."""

    async def release() -> None:
        for message in reversed(messages):
            with suppress(ConveyorError):  # its lease ends, and it comes back then
                await message.arelease()

    await see_through(release)


async def acknowledge(queue: Queue[Any], receipt: Receipt) -> SettledAs:
    """Acknowledge a message; "lost" where the receipt is over."""
    return await _settle(queue, receipt, lambda _, leased: success(leased))


async def refuse(queue: Queue[Any], receipt: Receipt, delay_ms: int | None) -> SettledAs:
    """Refuse a message: again after *delay_ms* (None: the pause of the queue), or dead; "lost" where the receipt is over."""
    return await _settle(queue, receipt, lambda policy, leased: policy.nacked(leased, delay_ms))


async def extend(queue: Queue[Any], receipt: Receipt, lease_ms: int) -> SettledAs:
    """Have the lease of a message end *lease_ms* from now; "lost" where the receipt is over."""
    session = _source(queue, receipt).session
    call = operations.extend(session.keys, receipt.worker, receipt.id, receipt.worker, lease_ms, session.about)
    return "extended" if await queue.client.arun(call) else "lost"


async def _settle(queue: Queue[Any], receipt: Receipt, end: HowToEnd) -> SettledAs:
    return await adrive(_settling(_source(queue, receipt), receipt, end), queue.client.arun)


def _source(queue: Queue[Any], receipt: Receipt) -> PartitionSource[Any]:
    """Return the queue or partition of a receipt, as the identity that holds it sees it. Raises ConfigurationError."""
    source = next((one for one in queue._sources(True) if one.session.keys.queue == receipt.queue), None)  # noqa: SLF001
    if source is None:
        raise ConfigurationError(f"Queue {queue.name!r} has no part {receipt.queue!r} here. Nothing was settled.")
    source.session.worker, source.session.registered = receipt.worker, True
    source.session.note_time(int(time.time() * 1000))
    return source


def _settling(source: PartitionSource[Any], receipt: Receipt, end: HowToEnd) -> CallProgram[SettledAs]:
    session = source.session
    sought = JobRow(receipt.id, "leased", read_envelope(b"\n\n"), AttemptHistory(0, 0, 0), "")
    page = yield inspection.whole_jobs(session.keys, [sought], "short")
    if not page.rows:
        return "lost"
    envelope, history = page.rows[0].envelope, page.rows[0].state
    leased = LeasedMessage(receipt.id, envelope, history, started=True, begun=True, session=session)
    if session.bodies is not None and PLAIN.is_stored_elsewhere(envelope.body):
        leased.blob = source.decoder.blob_of(leased)
    session.held[receipt.id] = leased
    yield from session.extend(leased, session.lease_ms)
    if leased.lost:
        return "lost"
    settlement = end(source.policy, leased)
    own = leased.session
    own.settle(leased, settlement)
    while not leased.lost and own.owes(leased):
        yield from own.turn()
    return "lost" if leased.lost else _OUTCOMES[settlement.kind]
