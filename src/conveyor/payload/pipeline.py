"""
The steps of a body on its way to Redis (compress, store elsewhere, seal) and back (open, fetch, decompress).

Compression comes before encryption, because encrypted bytes do not compress. On the way back the seal is checked before
anything else of the body is read. `make_pipeline` reads the options of an app.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.blobs import BlobStore, BlobUnavailable, is_name, new_name
from conveyor.payload.wrapped import (
    BARE,
    COMPRESSED,
    ELSEWHERE,
    MAGIC,
    WrappedPayload,
    read_wrapped,
    unreadable,
    write_head,
)
from conveyor.units import Size, size

if TYPE_CHECKING:
    from conveyor.payload.signing import Sealer

MAX_LARGE = 16 * 1024 * 1024
"""Bytes of JSON that a body stored elsewhere may take, unless the app says otherwise."""
LARGE_ABOVE = 256 * 1024
_LEVEL = 1  # JSON shrinks to a sixth at level 1; level 6 takes three times as long for a few per cent more
_SLACK = 1024  # bytes that header, nonce and tag add at most

BodyKind = Literal[b"payload", b"result", b"error", b"blob", b"part", b"progress", b"notes", b"logs"]
log = logging.getLogger("conveyor.sealing")


class BlobReference(msgspec.Struct, frozen=True):
    """Stands in Redis for a large body: the name of its bytes, their number (`size`) and their SHA-256."""

    name: str
    size: int
    sha256: str


class PayloadPipeline:
    """
    Compresses, stores elsewhere and seals bodies as the app's options say, and undoes it.

    Without options it opens bodies that need no settings. `queue` may be the name of a partition: seals are bound to
    the whole queue.
    """

    def __init__(
        self,
        *,
        seal: Sealer | None = None,
        compress_above: int | None = None,
        store: BlobStore | None = None,
        large_above: int = LARGE_ABOVE,
        max_whole: int = MAX_LARGE,
    ) -> None:
        """Make a pipeline. None leaves a step out; sizes in bytes."""
        self.sealer = seal
        self.store = store
        self.max_whole = max_whole
        self._compress_above = compress_above
        self._large_above = large_above

    def __repr__(self) -> str:
        parts = [repr(self.sealer.keyring)] if self.sealer else []
        parts += [f"compress above {self._compress_above:,}"] if self._compress_above is not None else []
        parts += [f"{self.store!r} above {self._large_above:,}"] if self.store is not None else []
        return f"<Sealing {', '.join(parts) or 'of nothing'}>"

    # -- out ------------------------------------------------------------------------------------------------------

    def wrap(self, body: bytes, *, queue: str, task: str, id: str, kind: BodyKind = b"payload") -> bytes:  # noqa: A002
        """
        Return the bytes that Redis stores for *body*; a large body is in the store when this returns.

        A body that needs no step is returned as it is. Raises BlobUnavailable when the store fails.
        """
        queue, form = queue.partition("/")[0], 0
        if self._compress_above is not None and len(body) > self._compress_above:
            smaller = zlib.compress(body, _LEVEL)
            if len(smaller) < len(body):
                body, form = smaller, COMPRESSED
        if self.is_large(body, kind):
            body, form = self._put(self._seal(body, form, b"blob", queue, task, id)), ELSEWHERE
        return self._seal(body, form, kind, queue, task, id)

    def is_large(self, body: bytes, kind: BodyKind) -> bool:
        """Tell whether a body goes to the store."""
        return self.store is not None and kind == b"payload" and len(body) > self._large_above

    def _seal(self, body: bytes, form: int, kind: BodyKind, queue: str, task: str, id_: str) -> bytes:
        if self.sealer is not None:
            return self.sealer.seal(body, form, kind, queue, task, id_)
        return write_head(BARE, form) + body if form else body

    def _put(self, blob: bytes) -> bytes:
        assert self.store is not None
        reference = BlobReference(new_name(), len(blob), hashlib.sha256(blob).hexdigest())
        try:
            self.store.put(reference.name, blob)
        except Exception as error:
            raise BlobUnavailable(f"The large body could not be stored in {self.store!r}: {error!r}.") from error
        return msgspec.json.encode(reference)

    # -- back -----------------------------------------------------------------------------------------------------

    def unwrap(
        self,
        data: bytes,
        *,
        queue: str,
        task: str,
        id: str,  # noqa: A002
        limit: int | None = None,
        kind: BodyKind = b"payload",
    ) -> bytes:
        """
        Return the body that was wrapped, of at most *limit* bytes.

        Raises PayloadError: E15 damaged, E21 too large, E38 no keys here, E39 unknown key, E40 the seal does not
        match, E41 not sealed, E42 the large body is gone. Raises BlobUnavailable when the store fails.
        """
        limit = self.max_whole if limit is None else limit
        queue = queue.partition("/")[0]
        wrapped, body = self._open(data, kind, queue, task, id)
        if wrapped is None:
            return _bounded(body, limit)
        if wrapped.form & ELSEWHERE:
            if kind != b"payload":
                raise unreadable("results and errors never lie in a store")
            blob = self._fetch(_reference(body), limit)
            wrapped, body = self._open(blob, b"blob", queue, task, id)
            if wrapped is None:
                return _bounded(body, limit)
            if wrapped.form & ELSEWHERE:
                raise unreadable("a large body refers to another one")
        return _inflate(body, limit) if wrapped.form & COMPRESSED else _bounded(body, limit)

    def is_current(self, data: bytes) -> bool:
        """Tell whether *data* is sealed as it would be now, by the first key; True where nothing is sealed."""
        return self.sealer is None or (data[:1] == MAGIC and self.sealer.is_current(read_wrapped(data)))

    def is_stored_elsewhere(self, data: bytes) -> bool:
        """Tell whether opening *data* reads the store."""
        return data[:1] == MAGIC and len(data) > 3 and bool(data[3] & ELSEWHERE)

    def reference(self, data: bytes, *, queue: str, task: str, id: str) -> BlobReference | None:  # noqa: A002
        """Return the reference to the large body of *data*, None when it is in Redis. Raises PayloadError."""
        if not self.is_stored_elsewhere(data):
            return None
        wrapped, body = self._open(data, b"payload", queue.partition("/")[0], task, id)
        return None if wrapped is None else _reference(body)

    def _open(
        self, data: bytes, kind: BodyKind, queue: str, task: str, id_: str
    ) -> tuple[WrappedPayload | None, bytes]:
        """Return the header (None for a bare body) and the body, its seal checked."""
        if data[:1] != MAGIC:
            if self.sealer is not None:
                raise self._unsealed()
            return None, data
        wrapped = read_wrapped(data)
        if wrapped.algorithm == BARE:
            if self.sealer is not None:
                raise self._unsealed()
            return wrapped, wrapped.body
        if self.sealer is None:
            raise PayloadError(
                f"E38 It is sealed with key '{wrapped.key_id}', and this program has no keys. "
                f"Give it the producer's: Conveyor(keys={{'{wrapped.key_id}': secret}}), then redrive.",
                code="E38",
            )
        return wrapped, self.sealer.open(wrapped, kind, queue, task, id_)

    def _unsealed(self) -> PayloadError:
        assert self.sealer is not None
        return PayloadError(
            f"E41 It is not sealed, and this program takes only what is sealed with {', '.join(self.sealer.keyring.ids)}. "
            "Give the producer the same keys and push it again; if you trust it, redrive it with a worker without keys.",
            code="E41",
        )

    def _fetch(self, reference: BlobReference, limit: int) -> bytes:
        if self.store is None:
            raise PayloadError(
                f"E42 Its {reference.size:,} bytes lie in a store of large bodies, and this program has none. "
                "Give it the producer's: Conveyor(large=…), then redrive.",
                code="E42",
            )
        if reference.size > limit + _SLACK:  # checked before a byte is read
            raise PayloadError(f"E21 It refers to {reference.size:,} bytes, and the limit is {limit:,}.", code="E21")
        try:
            blob = self.store.get(reference.name, reference.size + 1)
        except Exception as error:
            raise BlobUnavailable(f"The store {self.store!r} did not give {reference.name}: {error!r}.") from error
        if blob is None:
            why = "is not there"
        elif len(blob) != reference.size or hashlib.sha256(blob).hexdigest() != reference.sha256:
            why = f"is not what was stored ({len(blob):,} bytes of {reference.size:,}, or others)"
        else:
            return blob
        raise PayloadError(
            f"E42 Its large body {why}: {reference.name} in {self.store!r}. Restore it and redrive, or delete the job.",
            code="E42",
        )

    def delete(self, name: str) -> None:
        """Remove the large body of a job that has ended. A failure is logged: the sweep removes it later."""
        try:
            if self.store is not None:
                self.store.delete(name)
        except Exception as error:
            log.warning("the large body %s could not be deleted (%r); the sweep will", name, error)


PLAIN = PayloadPipeline()
"""Opens bodies that need no settings, and raises for the others what is missing."""


def _reference(body: bytes) -> BlobReference:
    try:
        reference = msgspec.json.decode(body, type=BlobReference)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise unreadable(f"the reference to a large body is damaged ({type(error).__name__})") from None
    if not is_name(reference.name) or reference.size < 0:
        raise unreadable("the reference to a large body is damaged")
    return reference


def _bounded(body: bytes, limit: int) -> bytes:
    if len(body) > limit:
        raise PayloadError(f"E21 It takes {len(body):,} bytes, and the limit is {limit:,}.", code="E21")
    return body


def _inflate(data: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(data, limit + 1)  # never more, whatever size the data claims
    except zlib.error as error:
        raise unreadable(f"it does not decompress ({error})") from None
    if len(body) > limit:
        raise PayloadError(f"E21 It decompresses to more than the limit of {limit:,} bytes.", code="E21")
    if not inflater.eof:
        raise unreadable("it does not decompress (it is cut off)")
    return body


def checked_store(store: Any) -> BlobStore | None:
    """Return the store of ``large=``; raises ConfigurationError for an object that is no store."""
    if store is not None and not isinstance(store, BlobStore):
        raise ConfigurationError(
            "Conveyor(large=…) takes a store with put, get, delete and old, such as FileStore('/srv/blobs'), "
            f"not {type(store).__name__}."
        )
    return store


def make_pipeline(
    *,
    keys: Mapping[str, str | bytes] | None,
    encrypt: bool,
    compress: Size | None,
    large: BlobStore | None,
    large_above: Size,
    max_large: Size,
    max_payload: int,
) -> PayloadPipeline | None:
    """Return the pipeline of an app, None when no option needs one; raises ConfigurationError."""
    if encrypt and keys is None:
        raise ConfigurationError("Conveyor(encrypt=True) needs keys: Conveyor(keys={'2026-11': secret}, encrypt=True).")
    if keys is None and compress is None and large is None:
        return None
    seal = None
    if keys is not None:
        from conveyor.payload.signing import Keyring, Sealer

        seal = Sealer(Keyring(keys), encrypt=bool(encrypt))
    above, whole = size(large_above, "large_above"), size(max_large, "max_large")
    if large is not None and above > max_payload:
        raise ConfigurationError(
            f"large_above ({above:,} bytes) must not exceed max_payload ({max_payload:,}): what lies between fits nowhere."
        )
    if large is not None and whole < max_payload:
        raise ConfigurationError(f"max_large ({whole:,} bytes) must be at least max_payload ({max_payload:,}).")
    return PayloadPipeline(
        seal=seal,
        compress_above=None if compress is None else size(compress, "compress"),
        store=checked_store(large),
        large_above=above,
        max_whole=max_payload if large is None else whole,
    )
