"""The secrets of an app by their ids: the first seals, all open."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any

from conveyor.errors import ConfigurationError

MIN_SECRET = 16
"""Bytes a secret must have; 32 random ones are advised."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SALT = b"conveyor sealing"
_ADVICE = 'Make one:  python -c "import secrets; print(secrets.token_urlsafe(32))"'


class Keyring:
    """Keys for signing and for encrypting, derived from each secret; it never shows them."""

    __slots__ = ("_keys", "first")

    def __init__(self, keys: Mapping[str, str | bytes]) -> None:
        """Take key id → secret, the sealing one first; raises ConfigurationError, which never shows a secret."""
        if not isinstance(keys, Mapping) or not keys:
            raise ConfigurationError(
                "Conveyor(keys=…) takes a dict of key id to secret with at least one: keys={'2026-11': secret}. "
                "Leave it out to seal nothing."
            )
        # HKDF gives each use a key of its own, uniform whatever the secret looks like: what one algorithm
        # gives away says nothing to the other.
        self._keys: dict[str, tuple[bytes, bytes]] = {}
        for number, (id_, secret) in enumerate(keys.items(), 1):
            material = _checked(number, id_, secret)
            self._keys[id_] = (derive(material, b"hmac-sha256"), derive(material, b"aes-256-gcm"))
        self.first = next(iter(self._keys))

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(self._keys)}>"

    def __reduce__(self) -> Any:
        raise TypeError("A keyring is not pickled: secrets stay where they were given.")

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, the sealing one first."""
        return tuple(self._keys)

    def signing(self, id_: str) -> bytes | None:
        """Return the key for HMAC, None for an id that is not known."""
        found = self._keys.get(id_)
        return None if found is None else found[0]

    def encrypting(self, id_: str) -> bytes | None:
        """Return the key that those of single jobs are derived from, None for an id that is not known."""
        found = self._keys.get(id_)
        return None if found is None else found[1]


def derive(secret: bytes, use: bytes) -> bytes:
    """Return 32 bytes for one use of a secret: HKDF-SHA256 (RFC 5869) with a fixed salt."""
    extracted = hmac.digest(_SALT, secret, hashlib.sha256)
    return hmac.digest(extracted, use + b"\x01", hashlib.sha256)


def _checked(number: int, id_: object, secret: object) -> bytes:
    if not isinstance(id_, str) or not _ID.fullmatch(id_):
        # Not shown: who swaps the two writes the secret here.
        raise ConfigurationError(
            f"Conveyor(keys=…): the id of key number {number} is 1 to 64 of A-Z a-z 0-9 _ . and -, for example '2026-11'."
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
            f"Conveyor(keys=…): the secret of key '{id_}' has {len(material)} bytes, and {MIN_SECRET} are the least. {_ADVICE}"
        )
    return material
