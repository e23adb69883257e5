"""
The text of a key: of a group, a limit, a unique key, made of any value that JSON can carry.

Equal values give equal text in every process and version. Text stays as it is, a number is its digits, so that people can
type a key as they see it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import msgspec

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import encode_json, reason, show

LONGEST_KEY = 200
"""Characters of a key as it is stored; a longer one keeps its beginning and gets a digest."""
LARGEST_KEY = 1024
"""Bytes of a key as it is given; a larger one is refused."""
_READABLE = 160


def key_text(value: Any, what: str = "A key") -> str:
    """
    Return the text of a key; *what* names it in errors.

    Raises PayloadError: E04 for a value that is no key (not storable, or text with control characters), E21 above 1 KB.
    """
    text = value if type(value) is str and value else _canonical(value, what)
    if not text.isprintable():
        raise PayloadError(
            f"{what} {show(text)} holds characters that cannot be printed. Make a key of printable characters. "
            "Nothing was stored.",
            code="E04",
        )
    return _shortened(text, LARGEST_KEY, what)


def call_key(name: str, arguments: Mapping[str, Any], what: str, *, largest: int | None = LARGEST_KEY) -> str:
    """
    Return the text of a key made of some arguments of a call: ``send(user=7, tenant="acme")``; *what* names it in errors.

    Raises PayloadError as `key_text` does; without *largest* a key of any length gets a digest.
    """
    given = [f"{key}={_json(_plain(value, what))}" for key, value in arguments.items()]
    text = f"{name}({', '.join(given)})"
    if not text.isprintable():  # inside of a JSON text: its other characters can all be printed
        text = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
    return _shortened(text, largest, what)


def _shortened(text: str, largest: int | None, what: str) -> str:
    if len(text) <= LONGEST_KEY:
        return text
    data = text.encode()
    if largest is not None and len(data) > largest:
        raise PayloadError(
            f"{what} takes {len(data):,} bytes, and the limit is {largest:,}. Use an id, or a digest of your own, as "
            "the key. Nothing was stored.",
            code="E21",
        )
    return f"{text[:_READABLE]}…{sha256(data).hexdigest()[:32]}"


def group_key(group: Any) -> str:
    """Return the text of a group key that a caller gives as `group=`. Raises ConfigurationError."""
    if not isinstance(group, str) or not group:
        raise ConfigurationError(
            f"group must be a text of at least 1 character, not {show(group)}. Nothing was stored."
        )
    try:
        return key_text(group, "group")
    except PayloadError as error:
        raise ConfigurationError(str(error)) from None


def _canonical(value: Any, what: str) -> str:
    """Return the JSON of *value* with sorted members; a JSON text without its quotes, so that a UUID reads as people type it."""
    plain = _plain(value, what)
    return plain if isinstance(plain, str) and plain else _json(plain)


def _json(plain: Any) -> str:
    return msgspec.json.encode(plain, order="deterministic").decode()


def _plain(value: Any, what: str) -> Any:
    """Return *value* as JSON carries it."""
    try:
        plain = msgspec.json.decode(encode_json(value))
        if isinstance(plain, float) and plain.is_integer() and abs(plain) < 2**53:
            return int(plain)  # 1.0 and 1 are equal, so they are one key
        return plain
    except Exception as error:
        raise PayloadError(
            f"{what} {show(value)} cannot be a key: {reason(error)}. Nothing was stored.", code="E04"
        ) from None


def member_reader(steps: tuple[str, ...]) -> Callable[[Any], Any]:
    """Return a function that follows *steps*, attributes or members of mappings, from a value; it raises LookupError."""

    def read(value: Any) -> Any:
        for step in steps:
            if isinstance(value, dict):
                value = value[step]
            else:
                try:
                    value = getattr(value, step)
                except AttributeError:
                    raise KeyError(step) from None
        return value

    return read
