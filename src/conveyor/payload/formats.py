"""
Formats beside JSON: MessagePack, and formats of a program.

JSON is stored as it is. Every other format is marked, so that no reader has to guess::

    02  [length of the name, name]  data

The first byte begins neither JSON nor a wrapped body. A name is looked up among the formats that this program was
given; none is ever imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import msgspec

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import (
    MAX_DEPTH,
    MAX_PAYLOAD,
    ValueCodec,
    encode_json,
    from_json_form,
    is_equal,
    reason,
    show,
    to_plain,
    too_large,
)

T = TypeVar("T")
MARK = b"\x02"
_NAME = re.compile(r"[a-z0-9_.-]{1,16}")
_NOT_CONTAINER = bytes(byte for byte in range(256) if not (0x80 <= byte <= 0x9F or 0xDC <= byte <= 0xDF))


@runtime_checkable
class Format(Protocol):
    """
    A format: values to bytes and back. `name` is stored in Redis: 1 to 16 characters out of ``a-z 0-9 _ . -``.

    Both methods are called from several threads, with one message, one result, or one argument of a task at a time.
    An exception in them becomes a PayloadError. The type is the annotated one, or Any where none is known: to show a
    value, or for an upcast. `decode` gets bytes from any source. Its result must equal the value that `encode` was given.
    """

    @property
    def name(self) -> str:
        """The name. Bytes with another meaning need another name."""

    def encode(self, value: Any, /) -> bytes:
        """Return the bytes of *value*."""

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
        """Return the value of *data* as *type*."""


FormatChoice = Format | Literal["json", "msgpack"]
"""The values of ``format=``."""


class Msgpack:
    """MessagePack: like JSON, but bytes stay bytes, keys stay numbers, and NaN has a form. No extension types."""

    name = "msgpack"

    def __repr__(self) -> str:
        return "msgpack"

    def plain(self, value: Any) -> Any:
        """Return *value* as dicts, lists, scalars and bytes, as it is written."""
        return msgspec.to_builtins(value, builtin_types=(bytes, bytearray, memoryview), enc_hook=to_plain)

    def encode(self, value: Any, /) -> bytes:
        """Return the bytes of any storable value."""
        return msgspec.msgpack.encode(self.plain(value))

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
        """Return the value of bytes as *type*; raises RecursionError for more than 64 levels."""
        # Counting first, as for JSON: with few bytes that can open a list or a map it is not deep.
        suspect = len(data) > MAX_DEPTH and len(data.translate(None, _NOT_CONTAINER)) > MAX_DEPTH
        if suspect and _is_deep(_decoder(Any).decode(data)):
            raise RecursionError
        try:
            decoder = _decoder(type)
        except TypeError:  # an annotation that cannot be hashed
            decoder = _decoder.__wrapped__(type)
        return decoder.decode(data)


MSGPACK = Msgpack()


class FormatRegistry:
    """The formats of an app by their names, and the one that is written (`writes`; None: JSON)."""

    __slots__ = ("known", "writes")

    def __init__(self, writes: Format | None = None, known: dict[str, Format] | None = None) -> None:
        """Make a registry that writes one format and reads all of *known*; MessagePack is always read."""
        self.known: dict[str, Format] = {MSGPACK.name: MSGPACK} if known is None else known
        self.writes = writes
        if writes is not None:
            self.known.setdefault(writes.name, writes)

    def __repr__(self) -> str:
        return f"<Formats {', '.join(['json', *self.known])}; writes {self.writes.name if self.writes else 'json'}>"

    def with_writer(self, choice: FormatChoice | None) -> FormatRegistry:
        """Return a registry that writes *choice*, which the others read from now on. None: the same. ConfigurationError."""
        return self if choice is None else FormatRegistry(self._format_of(choice), self.known)

    def _format_of(self, choice: FormatChoice) -> Format | None:
        if choice == "json":
            return None
        if choice == "msgpack":
            return MSGPACK
        name = getattr(choice, "name", None)
        if isinstance(choice, str | type) or not isinstance(choice, Format):
            raise ConfigurationError(
                f"format= takes 'json', 'msgpack', or an object with name, encode and decode, not {show(choice)}."
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "json":
            raise ConfigurationError(
                f"The name of a format is 1 to 16 of a-z 0-9 _ . - and not json, as {show(name)} of {show(choice)} is not."
            )
        if self.known.setdefault(name, choice) is not choice:
            raise ConfigurationError(
                f"Two formats are called {name!r}: {self.known[name]!r} and {choice!r}. Rename one."
            )
        return choice

    # -- bodies ---------------------------------------------------------------------------------------------------

    def add_mark(self, data: bytes) -> bytes:
        """Return the body for the data of what is written."""
        assert self.writes is not None
        name = self.writes.name.encode()
        return MARK + bytes((len(name),)) + name + data

    def split_mark(self, body: bytes) -> tuple[Format, bytes]:
        """Return the format of a marked body, and its data. Raises PayloadError: E15 damaged, E50 not known here."""
        end = 2 + body[1] if len(body) > 1 else 0
        name = body[2:end].decode("latin-1")
        if len(body) < end or not _NAME.fullmatch(name):
            raise PayloadError("The name of its format is damaged.", code="E15")
        form = self.known.get(name)
        if form is None:
            raise PayloadError(
                f"E50 It is in the format '{name}', and this program knows {', '.join(['json', *self.known])}. "
                "Give it the producer's: Conveyor(format=…), then redrive.",
                code="E50",
            )
        return form, body[end:]

    def encode_arguments(self, arguments: dict[str, bytes]) -> bytes:
        """Return the body of a call from its encoded arguments: a map of MessagePack, of bytes for other formats."""
        if self.writes is MSGPACK:
            return self.add_mark(msgspec.msgpack.encode({key: msgspec.Raw(data) for key, data in arguments.items()}))
        return self.add_mark(msgspec.msgpack.encode(arguments))

    def split_arguments(self, body: bytes) -> tuple[Format, dict[str, bytes]]:
        """Return the format and the arguments of a marked body, each still encoded. Raises PayloadError (E15, E50)."""
        form, data = self.split_mark(body)
        try:
            if form is MSGPACK:
                return form, {key: bytes(raw) for key, raw in _RAW.decode(data).items()}
            return form, _BYTES.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PayloadError(f"The arguments cannot be decoded: {reason(error)}.", code="E15") from None

    def decode_untyped(self, body: bytes, *, call: bool) -> tuple[Any, Callable[[Any], bytes]]:
        """
        Return the value of a body whose type is not known, and the function that encodes another one likewise.

        *call*: the body holds the arguments of a task. Raises PayloadError (E15, E50), and the errors of decoding.
        """
        if body[:1] != MARK:
            return msgspec.json.decode(body), encode_json
        form, data = self.split_mark(body)
        again = FormatRegistry(form, self.known)
        if call:
            parts = self.split_arguments(body)[1]
            value: Any = {key: form.decode(part, Any) for key, part in parts.items()}
            return value, lambda new: again.encode_arguments({key: form.encode(part) for key, part in new.items()})
        return form.decode(data, Any), lambda new: again.add_mark(form.encode(new))


JSON = FormatRegistry()
"""Writes JSON, and reads JSON and MessagePack."""


class FormatCodec(ValueCodec[T], Generic[T]):
    """Writes values of one type as JSON; reads JSON and every known format."""

    def __init__(
        self,
        type: Any = Any,  # noqa: A002
        *,
        formats: FormatRegistry = JSON,
        max_payload: int = MAX_PAYLOAD,
        what: str = "value",
        lossy: bool = False,
    ) -> None:
        """Make a ValueCodec with *formats*; raises ConfigurationError."""
        super().__init__(type, max_payload=max_payload, what=what, lossy=lossy)
        self.formats = formats

    def encode_unmarked(self, value: T) -> bytes:
        """Return the bytes of *value* in the written format, without a mark; raises as `encode` does."""
        form = self.formats.writes
        if form is None:
            return ValueCodec.encode(self, value)
        try:
            sent: Any = MSGPACK.plain(value) if self._lossy and form is MSGPACK else value
            data = form.encode(sent)
        except Exception as error:
            raise self._unstorable(value, error) from None
        if not isinstance(data, bytes):
            raise self._refusal(
                "E04", f"{self._what}: the format '{form.name}' made {show(data)} of it, which is not bytes."
            )
        if excess := too_large(data, self.max_payload, form.name):
            raise self._refusal(excess[0], f"{self._what} {excess[1]}")
        try:
            received = form.decode(data, self._type)
        except RecursionError as error:
            raise self._unstorable(value, error) from None
        except Exception as error:
            raise self._refusal("E03", f"{self._what} does not fit: {reason(error)} ({show(value)}).") from None
        if not is_equal(sent, received):
            self._compare(value, sent, received)
        return data

    def decode_unmarked(self, form: Format, data: bytes) -> T:
        """Return the value of *data* in *form*; raises PayloadError (E15, E22)."""
        try:
            return form.decode(data, self._type)  # type: ignore[no-any-return]
        except MemoryError:
            raise
        except RecursionError:
            raise PayloadError(f"{self._what} is nested deeper than {MAX_DEPTH} levels.", code="E22") from None
        except Exception as error:
            why = f"{self._what} cannot be decoded from '{form.name}': {reason(error)}."
            raise PayloadError(why, code="E15") from error

    def _no_json(self, data: bytes, refusal: PayloadError) -> T:
        if data[:1] != MARK:
            raise refusal
        form, inner = self.formats.split_mark(data)
        if excess := too_large(data, self.max_payload, form.name):  # with the mark, as when it was written
            raise PayloadError(f"{self._what} {excess[1]}", code=excess[0])
        return self.decode_unmarked(form, inner)


class FormatWriter(FormatCodec[T], Generic[T]):
    """A FormatCodec that writes another format than JSON."""

    def encode(self, value: T) -> bytes:
        """Return *value* in the written format, marked; raises as a ValueCodec does."""
        assert self.formats.writes is not None
        body = self.formats.add_mark(self.encode_unmarked(value))
        if excess := too_large(body, self.max_payload, self.formats.writes.name):
            raise self._refusal(excess[0], f"{self._what} {excess[1]}")
        return body


def codec_for(
    annotation: Any, *, formats: FormatRegistry, max_payload: int, what: str, lossy: bool = False
) -> FormatCodec[Any]:
    """Return the codec of a type, for JSON the shortest one. Raises ConfigurationError."""
    kind = FormatCodec if formats.writes is None else FormatWriter
    return kind(annotation, formats=formats, max_payload=max_payload, what=what, lossy=lossy)


def make_registry(choice: FormatChoice | Sequence[FormatChoice]) -> FormatRegistry:
    """Return the formats of ``format=``, of which the first is written; raises ConfigurationError."""
    several: Sequence[Any] = choice if isinstance(choice, list | tuple) and choice else [choice]
    formats = FormatRegistry()
    first, *_ = [formats.with_writer(one) for one in several]
    return first


def body_text(body: bytes, formats: FormatRegistry, *, call: bool) -> str:
    """Return a body as people see it: as JSON where it has that form, else a description."""
    if body[:1] != MARK:
        return body.decode("utf-8", "backslashreplace")
    try:
        return value_text(formats.decode_untyped(body, call=call)[0])
    except PayloadError as error:
        return f"{len(body):,} bytes. {error}"
    except Exception as error:  # of a format of a program
        return f"{len(body):,} bytes that cannot be shown: {reason(error)}"


def value_text(value: Any) -> str:
    """Return a value as people see it, as JSON where it has that form."""
    try:
        return encode_json(value).decode()
    except Exception:
        return show(value)


_RAW = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_BYTES = msgspec.msgpack.Decoder(dict[str, bytes])


@lru_cache(512)
def _decoder(type: Any) -> msgspec.msgpack.Decoder[Any]:  # noqa: A002
    return msgspec.msgpack.Decoder(type, dec_hook=from_json_form, ext_hook=_refuse)


def _refuse(code: int, data: memoryview) -> Any:
    raise ValueError(f"it has the extension type {code}, and none is taken")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            one
            for above in level
            for one in (above.values() if type(above) is dict else above if type(above) is list else ())
            if type(one) in {dict, list}
        ]
        if not level:
            return False
    return True
