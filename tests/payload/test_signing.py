"""Sealing: the keys, the bytes as documented, and refused bodies."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.payload.pipeline import PLAIN, PayloadPipeline, make_pipeline
from conveyor.payload.signing import Keyring
from conveyor.payload.wrapped import describe, read_wrapped, sealed_context
from conveyor.units import size

SECRET = "a secret of more than sixteen bytes"
PLACE = {"queue": "mail", "task": "send", "id": "an id"}


def sealing(keys=None, *, encrypt=False, compress=None) -> PayloadPipeline:
    made = make_pipeline(
        keys=keys or {"k1": SECRET}, encrypt=encrypt, compress=compress, large=None, large_above=1, max_large=1,
        max_payload=1 << 20,
    )  # fmt: skip
    assert made is not None
    return made


def derived(use: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, b"conveyor sealing", use).derive(SECRET.encode())


def context(kind: bytes, *more: bytes) -> bytes:
    """As docs/reference/wire-format.md says it."""
    parts = (b"conveyor", kind, b"mail", b"send", b"an id", *more)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def test_signed_bytes_are_as_documented():
    """Another program can check and make them: HKDF, then HMAC over the context and the body."""
    head = b"\x01\x01\x01\x00\x02k1"
    tag = hmac.digest(derived(b"hmac-sha256"), context(b"payload", head) + b"{}", hashlib.sha256)
    assert sealing().wrap(b"{}", **PLACE) == head + b"{}" + tag


def test_encrypted_bytes_are_as_documented():
    """AES-256-GCM under a key of the job's own, with the same context as associated data."""
    head = b"\x01\x01\x02\x00\x02k1"
    data = sealing(encrypt=True).wrap(b'{"a":1}', **PLACE)
    key = hmac.digest(derived(b"aes-256-gcm"), context(b"payload"), hashlib.sha256)
    assert data[: len(head)] == head
    nonce, body = data[len(head) : len(head) + 12], data[len(head) + 12 :]
    assert AESGCM(key).decrypt(nonce, body, context(b"payload", head)) == b'{"a":1}'
    assert sealing(encrypt=True).wrap(b'{"a":1}', **PLACE) != data  # the nonce is random
    ours = head + nonce + AESGCM(key).encrypt(nonce, b"{}", context(b"payload", head))
    assert sealing().unwrap(ours, **PLACE) == b"{}"  # who only signs opens it too


def test_every_byte_is_covered():
    """No byte of a sealed body can be changed, none cut off and none added, wherever it stands."""
    for way in (sealing(), sealing(encrypt=True), sealing(encrypt=True, compress=1)):
        data = way.wrap(b'{"a":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}', **PLACE)
        changed = [data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] for at in range(len(data)) for bit in (1, 128)]
        changed += [data[:at] for at in range(len(data))] + [data + b"x", data[:-1] + b"xx"]
        for one in changed:
            with pytest.raises(PayloadError):
                way.unwrap(one, **PLACE)


def test_places_cannot_be_shifted_into_each_other():
    """Parts are bound with their lengths: "ab" + "c" is not "a" + "bc"."""
    assert sealed_context(b"payload", "ab", "c", "d") != sealed_context(b"payload", "a", "bc", "d")
    data = sealing().wrap(b"{}", queue="ab", task="c", id="d")
    with pytest.raises(PayloadError, match="E40"):
        sealing().unwrap(data, queue="a", task="bc", id="d")
    assert sealing().unwrap(data, queue="ab/3", task="c", id="d") == b"{}"  # a partition belongs to its queue


def test_seal_is_checked_before_anything_is_read(monkeypatch):
    """A body whose seal does not match is neither decompressed nor decoded."""
    from conveyor.payload import pipeline

    data = sealing(compress=1).wrap(b'{"a":"' + b"a" * 1000 + b'"}', **PLACE)
    monkeypatch.setattr(pipeline, "_inflate", lambda *_: pytest.fail("it was decompressed"))
    with pytest.raises(PayloadError, match="E40"):
        sealing({"k1": SECRET + "!"}).unwrap(data, **PLACE)


def test_text_and_bytes_are_the_same_secret():
    """A secret as str is its UTF-8."""
    data = sealing({"k1": "ü" * 10}).wrap(b"{}", **PLACE)
    assert sealing({"k0": SECRET, "k1": ("ü" * 10).encode()}).unwrap(data, **PLACE) == b"{}"


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({}, "at least one"), ("secret", "dict"), ({"": SECRET}, "key number 1"), ({"a" * 65: SECRET}, "key number 1"),
        ({"k": SECRET, "a b": SECRET}, "key number 2"), ({"ü": SECRET}, "key number 1"), ({7: SECRET}, "key number 1"),
        ({"k": "short"}, "5 bytes"), ({"k": None}, "NoneType"), ({"k\n": SECRET}, "key number 1"),
    ],
)  # fmt: skip
def test_bad_keys_are_refused(keys, word):
    """Ids are 1 to 64 plain characters, secrets 16 bytes or more, and the refusal shows no secret."""
    with pytest.raises(ConfigurationError, match=word) as caught:
        Conveyor("redis://localhost", keys=keys)
    assert SECRET not in str(caught.value)


def test_encryption_needs_keys():
    """Encryption without keys is refused; payloads are not left bare."""
    for options in ({"encrypt": True}, {"encrypt": True, "compress": 100}):
        with pytest.raises(ConfigurationError, match="needs keys"):
            Conveyor("redis://localhost", **options)
    assert Conveyor("redis://localhost").sealing is None


def test_repr_shows_ids_only():
    """The text of a keyring shows its ids only."""
    assert repr(Keyring({"2026-11": SECRET, "b": SECRET})) == "<Keyring 2026-11, b>"
    assert repr(sealing()) == "<Sealing <Keyring k1>>"
    with pytest.raises(TypeError):
        Keyring({"k": SECRET}).__reduce__()


def test_what_a_person_is_told():
    """Bytes that are not opened are described."""
    assert describe(sealing().wrap(b"{}", **PLACE)) == "sealed with key k1 (hmac): 41 bytes"
    assert describe(b"\x01\x01\x00\x01xyz") == "compressed: 7 bytes"
    assert describe(b"\x01\x09").startswith("unreadable: ")
    assert read_wrapped(b"\x01\x01\x00\x02{}").form == 2
    with pytest.raises(PayloadError, match=r"has version 9, and this program knows 1. Upgrade"):
        PLAIN.unwrap(b"\x01\x09\x01\x00", **PLACE)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, 1), ("1B", 1), ("16KiB", 16384), ("2 MiB", 2 << 20), ("3kB", 3000)]
)
def test_sizes_are_read(given, expected):
    """Bytes, or a number with its unit."""
    assert size(given, "x") == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "", "16", "16 kib", "0MiB", "KiB", None, "1e3B"])
def test_other_sizes_are_refused(given):
    """Anything else is refused with how it is written."""
    with pytest.raises(ConfigurationError, match="256KiB"):
        size(given, "x")
