"""Signing and encrypting: a body and what it is bound to, to bytes and back."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.sealing.envelope import GCM, HMAC, NONCE, Wrapped, bound, head
from conveyor.sealing.keyring import Keyring


class Seal:
    """Seals with the first key of a ring, opens with all. Signs, or encrypts too."""

    __slots__ = ("_algorithm", "keyring")

    def __init__(self, keyring: Keyring, *, encrypt: bool) -> None:
        """Take the keys; *encrypt* needs the package ``cryptography`` and raises ConfigurationError without it."""
        self.keyring = keyring
        self._algorithm = GCM if encrypt else HMAC
        if encrypt:
            _aesgcm("Conveyor(encrypt=True)")

    def close(self, body: bytes, form: int, kind: bytes, queue: str, task: str, id_: str) -> bytes:
        """Return *body* sealed, bound to its kind and its place."""
        key_id = self.keyring.first
        start = head(self._algorithm, form, key_id)
        context = bound(kind, queue, task, id_, start)
        if self._algorithm == HMAC:
            key = self.keyring.signing(key_id)
            assert key is not None
            return start + body + hmac.digest(key, context + body, hashlib.sha256)
        nonce = os.urandom(NONCE)
        cipher = self._cipher(key_id, kind, queue, task, id_)
        sealed: bytes = cipher.encrypt(nonce, body, context)
        return start + nonce + sealed

    def open(self, wrapped: Wrapped, kind: bytes, queue: str, task: str, id_: str) -> bytes:
        """Return the body when its seal holds; raises PayloadError (E39 unknown key, E40 it does not)."""
        key_id = wrapped.key_id
        key = self.keyring.signing(key_id)
        if key is None:
            known = ", ".join(self.keyring.ids)
            raise PayloadError(
                f"E39 It is sealed with key '{key_id}', which this program does not know (it has {known}). "
                f"Add it: Conveyor(keys={{…, '{key_id}': secret}}), then redrive.",
                code="E39",
            )
        context = bound(kind, queue, task, id_, wrapped.head)
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
        # A key of its own for each job: with random nonces one AES-GCM key is good for 2^32 bodies, which a busy
        # system pushes in a day.
        key = self.keyring.encrypting(key_id)
        assert key is not None
        return _aesgcm(f"What is encrypted with key '{key_id}'")(
            hmac.digest(key, bound(kind, queue, task, id_), hashlib.sha256)
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
        "secret of that key is another one there. The bytes are kept; mend the keys, then redrive.",
        code="E40",
    )
