"""From a leased message to what its body holds: opened, brought up to date, decoded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from conveyor.errors import PayloadError, StoreUnavailable
from conveyor.messaging.leases import LeasedMessage
from conveyor.payload.formats import FormatCodec
from conveyor.payload.pipeline import PLAIN, PayloadPipeline
from conveyor.payload.versions import OldPayload, PayloadTooNew, sealed_name, upcast_body
from conveyor.payload.wrapped import MAGIC

T = TypeVar("T")


class MessageDecoder(Generic[T]):
    """How the messages of one queue are read."""

    def __init__(
        self,
        queue: str,
        codec: FormatCodec[T],
        sealing: PayloadPipeline | None,
        version: int,
        upcast: Callable[[int, Any], Any] | None,
    ) -> None:
        """Take what the queue was declared with."""
        self._queue = queue
        self._codec = codec
        self._sealing = sealing
        self._version = version
        self._upcast = upcast
        self._old = OldPayload(f"A message of queue '{queue}'", codec.max_payload, codec.formats, call=False)

    def body(self, leased: LeasedMessage) -> T:
        """Return what *leased* holds. Raises PayloadError, its kind TooNew, and BlobUnavailable."""
        if leased.damage:
            raise PayloadError(f"The envelope cannot be read: {leased.damage}.", code="E15")
        envelope = leased.envelope
        body, version = envelope.body, envelope.extra.version
        if version > self._version:
            raise PayloadTooNew(f"A message of queue '{self._queue}'", version, self._version)
        if self._sealing is not None or body[:1] == MAGIC:
            body = self._opened(leased) if leased.opened is None else leased.opened
        if version < self._version and self._upcast is not None:
            body = upcast_body(body, version, self._version, self._upcast, self._old)
        return self._codec.decode(body)

    def _opened(self, leased: LeasedMessage) -> bytes:
        sealing, data, place = (
            self._sealing or PLAIN,
            leased.envelope.body,
            (self._queue, sealed_name("", leased.envelope.extra.version), leased.id),
        )
        reference = sealing.reference(data, queue=place[0], task=place[1], id=place[2])
        leased.blob = "" if reference is None else reference.name
        return sealing.unwrap(data, queue=place[0], task=place[1], id=place[2])

    @property
    def fetches(self) -> bool:
        """True when bodies may lie in a store."""
        return self._sealing is not None and self._sealing.store is not None

    async def fetch(self, waiting: Iterable[LeasedMessage]) -> None:
        """Open those of *waiting* that lie in the store, on a thread; an error is met again when they are handed out."""
        for leased in list(waiting):
            if leased.opened is None and PLAIN.is_stored_elsewhere(leased.envelope.body):
                with contextlib.suppress(PayloadError, StoreUnavailable):
                    leased.opened = await asyncio.to_thread(self._opened, leased)

    def ended(self, blob: str) -> None:
        """Remove the large body of a message that has ended, confirmed by Redis."""
        sealing = self._sealing
        if sealing is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            sealing.delete(blob)
        else:
            loop.run_in_executor(None, sealing.delete, blob)
