"""Pushes of a queue whose bodies are wrapped: where an id and a body meet, the body is sealed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from conveyor.posting import Posting
from conveyor.sealing.sealing import Sealing
from conveyor.sealing.version import sealed_name
from conveyor.store.operations import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedPosting(Posting):
    """A way of pushing with what is done to bodies; never the shortest way, since each is bound to its id."""

    sealing: Sealing
    queue: str
    version: int
    wraps: ClassVar[bool] = True

    @property
    def is_plain(self) -> bool:
        """False: each body is bound to its own id."""
        return False

    def is_large(self, body: bytes) -> bool:
        """Tell whether *body* goes to the store of large ones."""
        return self.sealing.is_large(body, b"payload")

    def entry(self, fresh_id: str, envelope: bytes) -> Entry:
        """Return what is pushed for *envelope*, with its body wrapped."""
        id_ = fresh_id if self.id is None else self.id
        task = sealed_name("", self.version)
        body = self.sealing.wrap(envelope[len(self.head) :], queue=self.queue, task=task, id=id_)
        return Posting.entry(self, fresh_id, self.head + body)


def wrapped(options: Posting, sealing: Sealing | None, queue: str, version: int) -> Posting:
    """Return *options* for a queue with that sealing, None for none."""
    if sealing is None:
        return options
    given = {field.name: getattr(options, field.name) for field in fields(Posting)}
    return WrappedPosting(**given, sealing=sealing, queue=queue, version=version)


async def wrapped_entries(options: Posting, ids: Sequence[str], envelopes: Sequence[bytes]) -> list[Entry]:
    """Return what is pushed for *envelopes*; large bodies are written to their store on a thread."""

    def make() -> list[Entry]:
        return [options.entry(id_, envelope) for id_, envelope in zip(ids, envelopes, strict=True)]

    large = isinstance(options, WrappedPosting) and any(options.is_large(envelope) for envelope in envelopes)
    return await asyncio.to_thread(make) if large else make()
