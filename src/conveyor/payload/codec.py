"""
Values to JSON bytes and back, into the annotated type; never pickle.

`encode` decodes its own result and compares it before it returns. So a value that would arrive changed (NaN as null,
bytes as text, keys that collapse) is refused in the producer, and does not fail in a worker.
"""

from __future__ import annotations

import dataclasses
import inspect
import reprlib
import sys
from collections.abc import Callable
from datetime import datetime, time
from decimal import Decimal
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.units import size

T = TypeVar("T")

MAX_PAYLOAD = 512 * 1024
"""Bytes of JSON that one body, one set of arguments or one result may take."""
LARGEST_MAX_PAYLOAD = 16 * 1024 * 1024
"""Bytes that an application may raise that limit to: one reply with larger ones holds up all that is behind it."""
MAX_DEPTH = 64
"""Levels of lists and objects in stored JSON."""

SHALLOW = 2 * MAX_DEPTH
"""JSON of at most this many bytes cannot be nested deeper than MAX_DEPTH."""

STORABLE = (
    "Storable: str int float bool None list tuple set dict bytes datetime date time timedelta Decimal UUID Enum "
    "NamedTuple TypedDict dataclass msgspec.Struct pydantic model."
)

_PLAIN = frozenset({str, int, float, bool, type(None)})
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__pos__),
    (float, float.__pos__),
)
_NOT_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def payload_limit(value: object, name: str) -> int:
    """Return a limit of payloads in bytes; raises ConfigurationError, which calls it *name*, also above 16 MiB."""
    limit = size(value, name)
    if limit > LARGEST_MAX_PAYLOAD:
        raise ConfigurationError(
            f"{name} is at most 16MiB, not {value!r}: payloads go through the memory of the server and of each worker. "
            "Larger ones lie in a store of yours: Conveyor(large=…), or pass a reference."
        )
    return limit


class ValueCodec(Generic[T]):
    """Turns values of one type into JSON and back: message bodies and results of tasks."""

    def __init__(
        self,
        type: Any = Any,  # noqa: A002  the contract's name
        *,
        max_payload: int = MAX_PAYLOAD,
        what: str = "value",
        lossy: bool = False,
    ) -> None:
        """
        Make the codec of an annotation; raises ConfigurationError for a type that JSON cannot tell apart.

        *max_payload* is the limit in bytes, *what* the subject of error messages. *lossy* lets values take their JSON
        form where no type says how to decode them (a datetime in a result without annotation arrives as text).
        """
        self._type = Any if type is inspect.Signature.empty else type
        self.max_payload = max_payload
        self._what = what
        self._lossy = lossy
        self._decode = typed_decoder(self._type, what)

    def encode(self, value: T) -> bytes:
        """
        Return *value* as JSON that `decode` accepts.

        Raises PayloadError: E03 it does not fit the type, E04 it cannot be stored, E21 too large, E22 nested too deep.
        """
        try:
            sent: Any = plain_form(value) if self._lossy else value
            data = encode_json(sent)
        except Exception as error:
            raise self._unstorable(value, error) from None
        if excess := exceeded_limit(data, self.max_payload):
            raise self._refusal(excess[0], f"{self._what} {excess[1]}")
        if b"null" in data and (path := self._not_a_number(sent)):
            raise self._refusal(
                "E04",
                f"{self._what} cannot be stored: JSON has no NaN and no Infinity (at {path}). Pass None instead.",
            )
        try:
            received = self._decode(data)
        except Exception as error:
            raise self._refusal("E03", f"{self._what} does not fit: {reason(error)} ({show(value)}).") from None
        if not is_equal(sent, received):
            self._compare(value, sent, received)
        return data

    def _compare(self, value: T, sent: Any, received: Any) -> None:
        try:
            change = difference(sent, received)
        except Exception as error:
            raise self._unstorable(value, error) from None
        if change:
            raise self._refusal("E03", self._changed(change))

    def decode(self, data: bytes) -> T:
        """Return the value in its annotated type; raises PayloadError (E15, E21, E22) where there is none."""
        try:
            excess = exceeded_limit(data, self.max_payload)
            if not excess:
                return self._decode(data)  # type: ignore[no-any-return]
        except MemoryError:
            raise  # it says nothing about the bytes
        except Exception as error:
            return self._no_json(data, PayloadError(f"{self._what} cannot be decoded: {reason(error)}.", code="E15"))
        return self._no_json(data, PayloadError(f"{self._what} {excess[1]}", code=excess[0]))

    def _no_json(self, data: bytes, refusal: PayloadError) -> T:
        """Return the value of bytes that are not JSON, or are too large as JSON; here there is none."""
        raise refusal

    def _refusal(self, code: str, text: str) -> PayloadError:
        return PayloadError(f"{text} Nothing was stored.", code=code)

    def _model_advice(self) -> str:
        return "Store its key (pk) and load it where it is used."

    def _unstorable(self, value: object, error: Exception) -> PayloadError:
        if isinstance(error, RecursionError):
            return self._refusal("E22", f"{self._what} contains itself, or is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(error, NotSerializable) and issubclass(type(error.value), tuple | frozenset):
            why = f"{show(error.value)} is a key of a dict, and in JSON keys are text (or a number, a date, an Enum)."
        elif isinstance(error, NotSerializable):
            kind, advice = f"of type {_type_name(error.value)}", "Pass what it is made of, or a dataclass."
            if _is_django_model(error.value):
                kind, advice = "a Django model", self._model_advice()
            why = f"{show(error.value)} is {kind}.\n    {advice}\n    {STORABLE}"
        elif isinstance(error, UnicodeEncodeError):
            why = f"{show(value)} holds text that is not Unicode (a lone surrogate). Pass bytes, or repair the text."
        else:
            why = f"{reason(error)} ({show(value)})."
        return self._refusal("E04", f"{self._what} cannot be stored: {why}")

    def _not_a_number(self, value: object) -> str | None:
        try:
            return _not_finite(plain_form(value), "$")
        except Exception as error:
            raise self._unstorable(value, error) from None

    def _changed(self, change: RoundTripDifference) -> str:
        sent, received = _type_name(change.sent), _type_name(change.received)
        if (
            change.path == "$"
            and self._type is type(change.received)
            and type(change.sent) not in {self._type, *_PLAIN}
        ):
            return f"{self._what} does not fit: Expected {received}, got {sent} {show(change.sent)}."
        return (
            f"{self._what} would arrive changed: {sent} {show(change.sent)} would become {received} "
            f"{show(change.received)}, at {change.path}.\n    Annotate it with its type, or pass a plain JSON value."
        )


class UnreadablePayload(PayloadError):
    """The payload of a job cannot be read, now or later. Raised before the job's own code runs."""

    code = "E15"


class NotSerializable(Exception):
    """A value without a JSON form, met by the encoder."""

    def __init__(self, value: object) -> None:
        """Keep the value. It is not printed here, because its repr may fail."""
        super().__init__()
        self.value = value


def exceeded_limit(data: bytes, max_payload: int) -> tuple[str, str] | None:
    """Return the code and text for JSON that is too large (E21) or nested too deep (E22), else None."""
    if excess := too_large(data, max_payload):
        return excess
    # Counting is enough for nearly all: JSON with few brackets is not deep.
    if len(data) > SHALLOW and data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(data):
        return "E22", f"is nested deeper than {MAX_DEPTH} levels."
    return None


def too_large(data: bytes, max_payload: int, form: str = "JSON") -> tuple[str, str] | None:
    """Return the code and text for bytes that are too large (E21), else None."""
    if len(data) <= max_payload:
        return None
    return "E21", (
        f"takes {len(data):,} bytes as {form}, and the limit is {max_payload:,}.\n"
        "    Store the data elsewhere (a file, a bucket, a table) and pass a reference to it."
    )


def _is_deep(data: bytes) -> bool:
    # All in C: drop the texts, then all but brackets, then dips between siblings (which are never the deepest
    # place), then one level of innermost pairs at a time. The answer for malformed JSON does not matter: the decoder
    # refuses it, and stops at its own depth.
    bare = b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = bare.translate(_ONE_KIND, _NOT_BRACKET)
    if b"[" * (MAX_DEPTH + 1) in brackets:
        return True
    for dip in (32, 16, 8, 4, 2, 1):
        brackets = brackets.replace(b"]" * dip + b"[" * dip, b"")
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    return b"[]" in brackets


class RoundTripDifference(NamedTuple):
    """A place in a value where the received value is not the sent one."""

    path: str
    sent: object
    received: object


def is_equal(sent: Any, received: Any) -> bool:
    """Return whether the two are equal; False when the comparison fails."""
    try:
        return bool(sent == received)
    except Exception:
        return False


def difference(sent: Any, received: Any, path: str = "$") -> RoundTripDifference | None:
    """
    Return the first place where *received* lost something of *sent*, else None.

    A plain value may become a richer one, because the type asks for that (text a datetime, a list a set). A tuple may
    become a list. A richer value may not become plain, and no value may become a different one.
    """
    if isinstance(sent, list | tuple) and isinstance(received, list | tuple):
        return _difference_of_items(sent, received, path)
    if isinstance(sent, dict) and isinstance(received, dict):
        return _difference_of_mappings(sent, received, path)
    kind = type(sent)
    fields = _fields(received)
    if fields and kind is type(received):
        pairs = ((name, getattr(sent, name, None), getattr(received, name, None)) for name in fields)
        return next((d for name, a, b in pairs if (d := difference(a, b, f"{path}.{name}"))), None)
    if fields and isinstance(sent, dict):
        pairs = ((name, sent[name], getattr(received, name, None)) for name in fields if name in sent)
        return next((d for name, a, b in pairs if (d := difference(a, b, f"{path}.{name}"))), None)
    if is_equal(sent, received) or (kind is float is type(received) and str(sent) == str(received)):
        return None  # NaN too
    if kind in _PLAIN or isinstance(sent, list | tuple | dict):
        became_richer = type(received) not in _PLAIN
    elif kind is type(received) and kind in {datetime, time, Decimal}:
        # Equality is too strict: Decimal("NaN"), and instants in the hour when clocks are set back.
        became_richer = str(sent) == str(received)
    else:
        became_richer = kind is type(received) and _is_pydantic_model(kind)
    return None if became_richer else RoundTripDifference(path, sent, received)


def _difference_of_items(sent: Any, received: Any, path: str) -> RoundTripDifference | None:
    if len(sent) != len(received):
        return RoundTripDifference(path, sent, received)
    for index, (before, after) in enumerate(zip(sent, received, strict=True)):
        if change := difference(before, after, f"{path}[{index}]"):
            return change
    return None


def _difference_of_mappings(sent: Any, received: Any, path: str) -> RoundTripDifference | None:
    if len(sent) != len(received):  # 1 and "1" are one key in JSON
        return RoundTripDifference(path, sent, received)
    for (key, before), (arrived, after) in zip(sent.items(), received.items(), strict=True):
        if type(key) is not str and not is_equal(key, arrived):
            return RoundTripDifference(f"a key of {path}", key, arrived)
        if change := difference(before, after, f"{path}.{arrived}"):
            return change
    return None


def _fields(value: object) -> tuple[str, ...]:
    if isinstance(value, msgspec.Struct):
        return value.__struct_fields__
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return ()


def _not_finite(value: Any, path: str) -> str | None:
    if isinstance(value, float):
        return None if value - value == 0 else path
    if isinstance(value, dict):
        pairs = ((f"{path}.{key}", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        pairs = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    else:
        return None
    return next((hit for where, item in pairs if (hit := _not_finite(item, where))), None)


def typed_decoder(type: Any, what: str) -> Callable[[bytes], Any]:  # noqa: A002
    """Return the function from JSON to *type*; raises ConfigurationError for a type that JSON cannot tell apart."""
    try:
        return msgspec.json.Decoder(type, dec_hook=from_json_form).decode
    except Exception as error:
        raise ConfigurationError(f"{what} cannot be stored as {show(type)}: {reason(error)}.") from error


def from_builtin(value: object, type: Any) -> Any:  # noqa: A002
    """Return a plain value as *type*, reading numbers and dates from text as well; raises msgspec.ValidationError."""
    return msgspec.convert(value, type, strict=False, dec_hook=from_json_form)


def _subclass_form(value: object) -> Any:
    # Subclasses of the scalars (SafeString, numpy.float64), without calling what they override.
    for scalar, exactly in _SCALARS:
        if issubclass(type(value), scalar):
            return exactly(value)
    raise NotSerializable(value)


def _to_json(value: Any) -> Any:
    if _is_pydantic_model(type(value)):
        return msgspec.Raw(value.model_dump_json(by_alias=True, round_trip=True).encode())
    return _subclass_form(value)


def to_plain(value: Any) -> Any:
    """Return the plain form of a value that msgspec does not know: the hook of its encoders. Raises NotSerializable."""
    if _is_pydantic_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    return _subclass_form(value)


def from_json_form(type: Any, value: Any) -> Any:  # noqa: A002
    """Return a plain value in a type that msgspec does not know: the hook of its decoders."""
    if not _is_pydantic_model(type):
        return value  # msgspec then names the expected type
    try:
        # From JSON, because a strict model takes a datetime from text in JSON only.
        return type.model_validate_json(encode_json(value))
    except ValueError as error:
        first: dict[str, Any] = next(iter(getattr(error, "errors", list)()), {})
        where = ".".join(map(str, first.get("loc", ())))
        text = f"{first.get('msg', 'does not validate')}{where and f' - at {type.__name__}.{where}'}"
        raise ValueError(text) from None


encode_json: Callable[[Any], bytes] = msgspec.json.Encoder(enc_hook=_to_json).encode
"""Encodes any storable value as JSON, unchecked."""


def plain_form(value: object) -> Any:
    """Return *value* as dicts, lists and scalars, NaN included; raises as the encoder does."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=to_plain)


def _is_pydantic_model(type_: Any) -> bool:
    # A program with a model has imported pydantic; the library never imports it.
    model = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return model is not None and isinstance(type_, type) and issubclass(type_, model)


def _is_django_model(value: object) -> bool:
    try:
        return hasattr(value, "_meta") and hasattr(value, "pk")
    except Exception:
        return False


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def show(value: object) -> str:
    """Return a short repr for an error text, also when the object's own repr fails."""
    try:
        text = value.__qualname__ if isinstance(value, type) else _short.repr(value)
    except Exception:
        text = f"<{_type_name(value)}>"
    return text.encode("utf-8", "backslashreplace").decode()


def _type_name(value: object) -> str:
    try:
        return type(value).__qualname__
    except Exception:  # a metaclass may do anything
        return "object"


def reason(error: Exception) -> str:
    """Return the text of an error as part of a message: ``Expected int, got str - at $.id``."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    try:
        text = str(error).replace("`", "").rstrip(".")
    except Exception:
        text = ""
    if not isinstance(error, msgspec.MsgspecError):
        text = f"{type(error).__name__}: {text}"
    return text.encode("utf-8", "backslashreplace").decode()
