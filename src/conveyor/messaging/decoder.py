"""Reads the body of a leased message: unseals it, upcasts it, decodes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from conveyor.errors import PayloadError, StoreUnavailable
from conveyor.messaging.leases import LeasedMessage
from conveyor.messaging.message import Message, Settler
from conveyor.payload.formats import FormatCodec
from conveyor.payload.pipeline import PLAIN, PayloadPipeline
from conveyor.payload.versions import OldPayload, PayloadTooNew, sealed_name, upcast_body
from conveyor.payload.wrapped import MAGIC

T = TypeVar("T")


class MessageDecoder(Generic[T]):
    """Reads the messages of one queue."""

    def __init__(
        self,
        queue: str,
        codec: FormatCodec[T],
        sealing: PayloadPipeline | None,
        version: int,
        upcast: Callable[[int, Any], Any] | None,
    ) -> None:
        self._queue = queue
        self._codec = codec
        self._sealing = sealing
        self._version = version
        self._upcast = upcast
        self._old_payload = OldPayload(f"A message of queue '{queue}'", codec.max_payload, codec.formats, call=False)

    def message(self, leased: LeasedMessage, settler: Settler) -> Message[T]:
        """Return the message users see. Raises PayloadError (PayloadTooNew is one), BlobUnavailable."""
        return Message(self._body(leased), leased, settler)

    def _body(self, leased: LeasedMessage) -> T:
        if leased.damage:
            raise PayloadError(f"The envelope cannot be read: {leased.damage}.", code="E15")
        envelope = leased.envelope
        body, version = envelope.body, envelope.extra.version
        if version > self._version:
            raise PayloadTooNew(f"A message of queue '{self._queue}'", version, self._version)
        if self._sealing is not None or body[:1] == MAGIC:
            body = self._open(leased) if leased.fetched_body is None else leased.fetched_body
        if version < self._version and self._upcast is not None:
            body = upcast_body(body, version, self._version, self._upcast, self._old_payload)
        return self._codec.decode(body)

    def _open(self, leased: LeasedMessage) -> bytes:
        sealing, data = self._sealing or PLAIN, leased.envelope.body
        leased.blob = self.blob_of(leased)
        return sealing.unwrap(
            data, queue=self._queue, task=sealed_name("", leased.envelope.extra.version), id=leased.id
        )

    def blob_of(self, leased: LeasedMessage) -> str:
        """Return the name of the body where it lies in a store, "" where it does not. Raises PayloadError."""
        task, data = sealed_name("", leased.envelope.extra.version), leased.envelope.body
        reference = (self._sealing or PLAIN).reference(data, queue=self._queue, task=task, id=leased.id)
        return "" if reference is None else reference.name

    @property
    def fetches(self) -> bool:
        """True when bodies may lie in a blob store."""
        return self._sealing is not None and self._sealing.store is not None

    async def fetch(self, waiting: Iterable[LeasedMessage]) -> None:
        """Read bodies that lie in the blob store, on a thread. An error is raised later, by `message`."""
        for leased in list(waiting):
            if leased.fetched_body is None and PLAIN.is_stored_elsewhere(leased.envelope.body):
                with contextlib.suppress(PayloadError, StoreUnavailable):
                    leased.fetched_body = await asyncio.to_thread(self._open, leased)

    def delete(self, blob: str) -> None:
        """Remove the blob of a message whose end Redis has confirmed."""
        sealing = self._sealing
        if sealing is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            sealing.delete(blob)
        else:
            loop.run_in_executor(None, sealing.delete, blob)
