"""
The layout of a wrapped body, byte for byte.

    01  version  algorithm  form  [length of key id, key id]  [nonce]  body  [tag]

No JSON begins with the first byte, which tells a wrapped body from a bare one. The context of the seal (kind, queue,
task, id) is not stored: the reader knows where the bytes lie, and bytes moved elsewhere do not match.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from typing import NamedTuple

from conveyor.errors import PayloadError

MAGIC = b"\x01"
VERSION = 1
BARE, HMAC, GCM = 0, 1, 2
"""Algorithms: none, HMAC-SHA256, AES-256-GCM."""
COMPRESSED, ELSEWHERE = 1, 2
"""Forms, as bits: the body is compressed with zlib; the body is a reference to a blob."""
NONCE = 12
TAGS = {BARE: 0, HMAC: 32, GCM: 16}
NAMES = {BARE: "", HMAC: "hmac", GCM: "aes-256-gcm"}


class WrappedPayload(NamedTuple):
    """The parts of a wrapped body. `head` is all before `nonce`; with AES-GCM `body` is encrypted and ends with its tag."""

    algorithm: int
    form: int
    key_id: str
    write_head: bytes
    nonce: bytes
    body: bytes
    tag: bytes


def write_head(algorithm: int, form: int, key_id: str = "") -> bytes:
    """Return the bytes before nonce and body."""
    start = bytes((1, VERSION, algorithm, form))
    return start + bytes((len(key_id),)) + key_id.encode() if algorithm else start


def read_wrapped(data: bytes) -> WrappedPayload:
    """Return the parts of a wrapped body, trusting none of them; raises PayloadError (E15)."""
    if len(data) < 4 or data[:1] != MAGIC:
        raise unreadable("it is cut off")
    version, algorithm, form = data[1], data[2], data[3]
    if version != VERSION:
        raise unreadable(f"it has version {version}, and this program knows {VERSION}. Upgrade it")
    if algorithm not in TAGS or form & ~(COMPRESSED | ELSEWHERE):
        raise unreadable(f"algorithm {algorithm} and form {form} are not known")
    if algorithm == BARE:
        return WrappedPayload(algorithm, form, "", data[:4], b"", data[4:], b"")
    end = 5 + data[4] if len(data) > 4 else 0
    nonce_end = end + (NONCE if algorithm == GCM else 0)
    if end <= 5 or len(data) < nonce_end + TAGS[algorithm]:
        raise unreadable("it is cut off")
    key_id = data[5:end]
    if not key_id.isascii() or not key_id.decode().isprintable():
        raise unreadable("its key id is not text")
    body, tag = data[nonce_end:], b""
    if algorithm == HMAC:
        body, tag = body[:-32], body[-32:]
    return WrappedPayload(algorithm, form, key_id.decode(), data[:end], data[end:nonce_end], body, tag)


def sealed_context(kind: bytes, queue: str, task: str, id_: str, *more: bytes) -> bytes:
    """Return the context that a seal covers beside the body: length and part, so that no two contexts are alike."""
    parts = (b"conveyor", kind, queue.encode(), task.encode(), id_.encode(errors="surrogatepass"), *more)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def describe(data: bytes) -> str:
    """Return a description of a wrapped body that is not opened; never raises."""
    try:
        wrapped = read_wrapped(data)
    except PayloadError as error:
        return f"unreadable: {error}"
    words = []
    if wrapped.algorithm:
        words.append(f"sealed with key {wrapped.key_id} ({NAMES[wrapped.algorithm]})")
    if wrapped.form & ELSEWHERE:
        words.append("stored elsewhere")
    elif wrapped.form & COMPRESSED:
        words.append("compressed")
    return f"{', '.join(words) or 'wrapped'}: {len(data):,} bytes"


def unreadable(why: str) -> PayloadError:
    """Return the error for a body whose wrapping cannot be read."""
    return PayloadError(f"The wrapping of the payload cannot be read: {why}.", code="E15")


def to_base64(data: bytes) -> bytes:
    """Return the text in which wrapped bytes stand in JSON."""
    return b2a_base64(data, newline=False)


def from_base64(text: str) -> bytes:
    """Return the bytes that `to_base64` was given; raises PayloadError (E40)."""
    try:
        return a2b_base64(text.encode(), strict_mode=True)
    except ValueError:
        raise PayloadError("The sealed text is not base64: it was changed.", code="E40") from None
