"""
Seals: a body signed, or encrypted, together with its context.

An app has one or more secrets, each with an id. The first seals, all of them open.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from typing import Any

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.wrapped import GCM, HMAC, NONCE, WrappedPayload, sealed_context, write_head

MIN_SECRET = 16
"""Bytes that a secret must have at least; 32 random ones are advised."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SALT = b"conveyor sealing"
_ADVICE = 'Make one:  python -c "import secrets; print(secrets.token_urlsafe(32))"'


class Keyring:
    """The keys for signing and for encrypting, derived from each secret. It never shows them."""

    __slots__ = ("_keys", "sealing_key_id")

    def __init__(self, keys: Mapping[str, str | bytes]) -> None:
        """Derive the keys of key id → secret, the sealing one first; raises ConfigurationError, without secrets in it."""
        if not isinstance(keys, Mapping) or not keys:
            raise ConfigurationError(
                "Conveyor(keys=…) takes a dict of key id to secret with at least one: keys={'2026-11': secret}. "
                "Leave it out to seal nothing."
            )
        # HKDF derives a uniform key for each use from any secret: a leak through one algorithm does not weaken the
        # other.
        self._keys: dict[str, tuple[bytes, bytes]] = {}
        for number, (id_, secret) in enumerate(keys.items(), 1):
            material = _checked(number, id_, secret)
            self._keys[id_] = (derive(material, b"hmac-sha256"), derive(material, b"aes-256-gcm"))
        self.sealing_key_id = next(iter(self._keys))

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(self._keys)}>"

    def __reduce__(self) -> Any:
        raise TypeError("A keyring is not pickled: secrets stay where they were given.")

    @property
    def ids(self) -> tuple[str, ...]:
        """The key ids, the sealing one first."""
        return tuple(self._keys)

    def signing_key(self, id_: str) -> bytes | None:
        """Return the key for HMAC, None for an unknown id."""
        keys = self._keys.get(id_)
        return None if keys is None else keys[0]

    def encryption_key(self, id_: str) -> bytes | None:
        """Return the key from which the keys of single jobs are derived, None for an unknown id."""
        keys = self._keys.get(id_)
        return None if keys is None else keys[1]


def derive(secret: bytes, use: bytes) -> bytes:
    """Return 32 bytes for one use of a secret: HKDF-SHA256 (RFC 5869) with a fixed salt."""
    extracted = hmac.digest(_SALT, secret, hashlib.sha256)
    return hmac.digest(extracted, use + b"\x01", hashlib.sha256)


def _checked(number: int, id_: object, secret: object) -> bytes:
    if not isinstance(id_, str) or not _ID.fullmatch(id_):
        # The id is not shown: a program that swaps the two has the secret here.
        raise ConfigurationError(
            f"Conveyor(keys=…): the id of key number {number} must be 1 to 64 characters out of A-Z a-z 0-9 _ . -, "
            "for example '2026-11'."
        )
    if not isinstance(secret, str | bytes):
        raise ConfigurationError(
            f"Conveyor(keys=…): the secret of key '{id_}' must be str or bytes, not {type(secret).__name__}."
        )
    try:
        material = secret.encode() if isinstance(secret, str) else bytes(secret)
    except UnicodeEncodeError:
        raise ConfigurationError(f"Conveyor(keys=…): the secret of key '{id_}' is not Unicode. {_ADVICE}") from None
    if len(material) < MIN_SECRET:
        raise ConfigurationError(
            f"Conveyor(keys=…): the secret of key '{id_}' has {len(material)} bytes, and needs at least {MIN_SECRET}. {_ADVICE}"
        )
    return material


class Sealer:
    """Seals with the first key of a keyring, opens with all. It signs, and encrypts where asked."""

    __slots__ = ("_algorithm", "keyring")

    def __init__(self, keyring: Keyring, *, encrypt: bool) -> None:
        """Make the sealer; *encrypt* needs the package ``cryptography``, else it raises ConfigurationError."""
        self.keyring = keyring
        self._algorithm = GCM if encrypt else HMAC
        if encrypt:
            _aesgcm("Conveyor(encrypt=True)")

    def seal(self, body: bytes, form: int, kind: bytes, queue: str, task: str, id_: str) -> bytes:
        """Return *body* sealed, bound to its kind, queue, task and id."""
        key_id = self.keyring.sealing_key_id
        start = write_head(self._algorithm, form, key_id)
        context = sealed_context(kind, queue, task, id_, start)
        if self._algorithm == HMAC:
            key = self.keyring.signing_key(key_id)
            assert key is not None
            return start + body + hmac.digest(key, context + body, hashlib.sha256)
        nonce = os.urandom(NONCE)
        cipher = self._cipher(key_id, kind, queue, task, id_)
        sealed: bytes = cipher.encrypt(nonce, body, context)
        return start + nonce + sealed

    def is_current(self, wrapped: WrappedPayload) -> bool:
        """Tell whether a body was sealed as `seal` does it now."""
        return (wrapped.algorithm, wrapped.key_id) == (self._algorithm, self.keyring.sealing_key_id)

    def open(self, wrapped: WrappedPayload, kind: bytes, queue: str, task: str, id_: str) -> bytes:
        """Return the body when its seal matches; raises PayloadError (E39 unknown key, E40 no match)."""
        key_id = wrapped.key_id
        key = self.keyring.signing_key(key_id)
        if key is None:
            known = ", ".join(self.keyring.ids)
            raise PayloadError(
                f"E39 It is sealed with key '{key_id}', which this program does not know (it has {known}). "
                f"Add it: Conveyor(keys={{…, '{key_id}': secret}}), then redrive.",
                code="E39",
            )
        context = sealed_context(kind, queue, task, id_, wrapped.write_head)
        if wrapped.algorithm == HMAC:
            if hmac.compare_digest(hmac.digest(key, context + wrapped.body, hashlib.sha256), wrapped.tag):
                return wrapped.body
            raise _mismatch(key_id)
        try:
            cipher = self._cipher(key_id, kind, queue, task, id_)
        except ConfigurationError as error:
            raise PayloadError(f"E38 {error}", code="E38") from None
        from cryptography.exceptions import InvalidTag

        try:
            opened: bytes = cipher.decrypt(wrapped.nonce, wrapped.body, context)
        except InvalidTag:
            raise _mismatch(key_id) from None
        return opened

    def _cipher(self, key_id: str, kind: bytes, queue: str, task: str, id_: str) -> Any:
        # Each job has a key of its own: with random nonces one AES-GCM key is good for 2^32 bodies, which a busy
        # system pushes in a day.
        key = self.keyring.encryption_key(key_id)
        assert key is not None
        return _aesgcm(f"What is encrypted with key '{key_id}'")(
            hmac.digest(key, sealed_context(kind, queue, task, id_), hashlib.sha256)
        )


def _aesgcm(what: str) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigurationError(
            f"{what} needs the package 'cryptography', which is not installed. Install:  pip install 'conveyor[encrypt]'"
        ) from None
    return AESGCM


def _mismatch(key_id: str) -> PayloadError:
    return PayloadError(
        f"E40 Its seal (key '{key_id}') does not match: it was changed or moved from another job, task or queue, or the "
        "secret of that key is another one there. The bytes are kept: correct the keys, then redrive.",
        code="E40",
    )
