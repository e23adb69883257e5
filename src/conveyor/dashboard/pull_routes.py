"""The routes of the HTTP API by which a program in any language consumes messages: pull, then ack, nack or extend by receipt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from conveyor.dashboard import documents
from conveyor.dashboard.endpoint import ApiCall, ApiRoute, Field
from conveyor.dashboard.send_routes import app_of
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.ids import logical
from conveyor.jobs.core import core_of
from conveyor.messaging import receipts
from conveyor.messaging.consumer.asynchronous import see_through
from conveyor.messaging.message import Message
from conveyor.messaging.queue import Queue
from conveyor.messaging.receipts import Receipt, SettledAs
from conveyor.payload.codec import encode_json
from conveyor.payload.formats import value_text
from conveyor.units import milliseconds

if TYPE_CHECKING:
    from conveyor.dashboard.service import Service

MOST_PULLED = 100
LONGEST_WAIT = 20.0
LONGEST_LEASE_MS = 12 * 3_600_000
MOST_WAITING = 500
"""Pulls that wait at a time in one process; those beyond it are answered at once."""


def _queue(call: ApiCall, name: str) -> Queue[Any]:
    core = core_of(app_of(call))
    core.admit_message(name)
    return core.source(name, "pull")


def _lease_ms(call: ApiCall) -> int | None:
    if call["lease"] is None:
        return None
    lease = milliseconds(call["lease"], name="lease")
    if not 1_000 <= lease <= LONGEST_LEASE_MS:
        raise ConfigurationError(f"lease must be from 1s to 12h, not {call['lease']!r}. Nothing was done.")
    return lease


class PulledResponse(Response):
    """The answer to a pull, whose messages are handed back where it is not sent to its end."""

    def __init__(self, body: bytes, messages: list[Message[Any]], service: Service) -> None:
        super().__init__(body, 200, {"cache-control": "no-store"}, "application/json")
        self._messages, self._service = messages, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        except BaseException:  # the server ends, or the client has gone away
            await receipts.hand_back(self._messages)
            raise
        finally:
            self._service.waiting_pulls -= 1


async def pull(call: ApiCall) -> Response:
    """
    Return messages with their receipts as soon as there are some, or none after `wait` seconds.

    They are handed back when the client goes away meanwhile, and when the server ends the call.
    """
    queue, lease_ms, service = _queue(call, call["queue"]), _lease_ms(call), call.service
    wait = call["wait"] if service.waiting_pulls < MOST_WAITING else 0
    service.waiting_pulls += 1
    pulling = asyncio.ensure_future(receipts.pull(queue, call["max"], wait, lease_ms))
    leaving = asyncio.ensure_future(call.gone())
    response: Response | None = None
    try:
        await asyncio.wait([pulling, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not leaving.done():
            response = _pulled(call["queue"], pulling.result(), service)
            return response
        return Response(status_code=499)
    finally:
        leaving.cancel()
        if response is None:
            pulling.cancel()
            await see_through(partial(_take_back, pulling, service))


def _pulled(queue: str, found: list[tuple[Receipt, Message[Any]]], service: Service) -> Response:
    document = {"queue": queue, "messages": [_document(*one) for one in found]}
    return PulledResponse(documents.encoded("pulled", document), [message for _, message in found], service)


async def _take_back(pulling: asyncio.Future[list[tuple[Receipt, Message[Any]]]], service: Service) -> None:
    """Hand back what *pulling*, which was cancelled, has pulled all the same."""
    await asyncio.wait([pulling])
    if not pulling.cancelled() and not pulling.exception():
        await receipts.hand_back([message for _, message in pulling.result()])
    service.waiting_pulls -= 1  # last: the service waits for it as it ends


def _document(receipt: Receipt, message: Message[Any]) -> dict[str, Any]:
    envelope = message._leased.envelope  # noqa: SLF001
    try:
        body = json.loads(encode_json(message.body))
    except (ConveyorError, ValueError, TypeError):  # a value of another format that JSON has no form for
        body = value_text(message.body)
    return {
        "id": message.id, "receipt": str(receipt), "body": body,
        "attempt": message.attempt, "headers": message.headers, "tags": message.tags, "priority": message.priority,
        "group": envelope.group, "lease_ends": message.lease_ends,
    }  # fmt: skip


async def _settle(call: ApiCall, one: Callable[[Queue[Any], Receipt], Awaitable[SettledAs]]) -> dict[str, Any]:
    """Settle each receipt; those of one call are settled at the same time, and one that is over spoils no other."""
    given = {text: receipts.read_receipt(text) for text in call["receipts"]}
    queues = {receipt.queue: _queue(call, logical(receipt.queue)) for receipt in given.values()}
    outcomes = await asyncio.gather(*(one(queues[receipt.queue], receipt) for receipt in given.values()))
    results = [{"receipt": text, "outcome": outcome} for text, outcome in zip(given, outcomes, strict=True)]
    return {"results": results}


async def ack(call: ApiCall) -> dict[str, Any]:
    """Acknowledge messages: they are done."""
    return await _settle(call, receipts.acknowledge)


async def nack(call: ApiCall) -> dict[str, Any]:
    """Refuse messages: again after `delay`, or after the pause of the queue; dead when all attempts are used up."""
    delay_ms = None if call["delay"] is None else milliseconds(call["delay"], name="delay")
    return await _settle(call, lambda queue, receipt: receipts.refuse(queue, receipt, delay_ms))


async def extend(call: ApiCall) -> dict[str, Any]:
    """Have the leases of messages end so long from now."""
    lease_ms = _lease_ms(call)
    assert lease_ms is not None
    return await _settle(call, lambda queue, receipt: receipts.extend(queue, receipt, lease_ms))


_RECEIPTS = {"receipts": Field("texts", "receipts of pulled messages", required=True, most=MOST_PULLED)}
PULL_ROUTES = (
    ApiRoute(
        "POST", "pull", "pulled", "Pull messages of a queue, with receipts", pull, "pull_messages",
        {
            "queue": Field("text", "the name of a queue", required=True),
            "max": Field("number", "messages at most", default=1, least=1, most=MOST_PULLED),
            "wait": Field("number", "seconds to wait for the first one", default=0, most=LONGEST_WAIT),
            "lease": Field("text", "how long they are held, such as 5m; that of the queue where it is left out"),
        },
    ),
    ApiRoute("POST", "messages/ack", "settled", "Acknowledge messages by their receipts", ack, "pull_messages", _RECEIPTS),
    ApiRoute(
        "POST", "messages/nack", "settled", "Refuse messages by their receipts", nack, "pull_messages",
        {**_RECEIPTS, "delay": Field("text", "how long until they are tried again, such as 30s")},
    ),
    ApiRoute(
        "POST", "messages/extend", "settled", "Extend the leases of messages by their receipts", extend, "pull_messages",
        {**_RECEIPTS, "lease": Field("text", "how long from now, such as 5m", required=True)},
    ),
)  # fmt: skip
