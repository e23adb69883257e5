"""
Bytes of every release stay readable: this version reads its files, and writes the same bytes where they are reproducible.

A release adds its own: ``PYTHONPATH=src:tests:tests/payload python -c "import test_golden as t; t.keep('0.2.0')"``. Files of earlier
ones are never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conveyor.errors import PayloadError
from conveyor.payload.codec import ValueCodec, encode_json
from conveyor.payload.formats import MSGPACK, FormatCodec, FormatRegistry, codec_for
from conveyor.payload.pipeline import PLAIN, PayloadPipeline, make_pipeline
from conveyor.payload.records import (
    AttemptHistory,
    EnvelopeOptions,
    Failure,
    Outcome,
    read_envelope,
    read_failure,
    read_outcome,
    to_json,
    write_envelope,
)
from conveyor.payload.sealed_records import open_failure, open_result, pack_failure, pack_result
from conveyor.payload.signature import TaskSignature
from conveyor.payload.wrapped import BARE, COMPRESSED, ELSEWHERE, GCM, HMAC, describe, read_wrapped

HOME = Path(__file__).parents[1] / "golden"
RELEASES = sorted(path.name for path in HOME.iterdir() if path.is_dir())
KEYS = {"2026-11": "golden secret, known to everybody"}
PLACE = {"queue": "mail", "task": "mail.send", "id": "0Q8AwEkiHuTqwTCLmeX0pl"}
WORDS = ("word " * 400).strip()


class Shelf:
    """A store that holds the one file of a release, or keeps what it is given."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def put(self, name: str, data: bytes) -> None:
        self.data = data

    def get(self, name: str, most: int) -> bytes | None:
        return self.data[:most]

    def delete(self, name: str) -> None: ...

    def old(self, seconds: float) -> list[str]:
        return []


def mail(to: str, copies: int = 1, *words: str, urgent: bool = False, **more: float) -> None: ...


def body() -> bytes:
    return TaskSignature(mail, "mail.send").encode(("ada@example.org", 2, "a", "ü\n"), {"urgent": True, "x": 1.5})


def large_body() -> bytes:
    return TaskSignature(mail, "mail.send").encode((WORDS,), {})


def sealing(
    shelf: Shelf | None = None, *, keys: bool = True, encrypt: bool = False, compress: int | None = None
) -> PayloadPipeline:
    made = make_pipeline(
        keys=KEYS if keys else None, encrypt=encrypt, compress=compress, large=shelf, large_above=100, max_large="1MiB",
        max_payload=512 * 1024,
    )  # fmt: skip
    assert made is not None
    return made


class Mirror:
    """A format of a program's own."""

    name = "mirror"

    def encode(self, value: object, /) -> bytes:
        return encode_json(value)[::-1]

    def decode(self, data: bytes, type: object, /) -> object:  # noqa: A002
        return ValueCodec(type).decode(data[::-1])


MESSAGE = {1: b"\xff", "x": [None, 1.5]}
MIRROR = FormatRegistry(Mirror())
PACKED = FormatRegistry(MSGPACK, MIRROR.known)


def called(formats: FormatRegistry) -> bytes:
    return write_envelope(
        "mail.send", TaskSignature(mail, "mail.send", formats=formats).encode(("ada", 2, "a"), {"x": 1.5})
    )


NO_LONGER_WRITTEN = {"state_alone"}  # a mark behind the counts, from before it moved elsewhere
FAILURE = Failure(2, 1_764_000_000_000, "builtins.ValueError", "no ü", "", 'Traceback:\n  File "x"', "host:1")
STATE = AttemptHistory(3, 2, 1, [to_json(FAILURE), to_json(Failure(3, 5, "crashed", "again"))])


def written() -> dict[str, bytes]:
    """Return the files of this version whose bytes are reproducible."""
    extra = EnvelopeOptions(headers={"trace": "1\n2"}, timeout_ms=2000, keep_ms=60_000, attempts=3, version=2)
    shelf = Shelf()
    sealing(shelf).wrap(large_body(), **PLACE)
    return {
        "envelope_plain": write_envelope("mail.send", body()),
        "envelope_extra": b"p9 e1764000000000 d1763000000000 i uorder 7" + write_envelope("mail.send", body(), extra),
        "message": write_envelope("", b'{"id":1}'),
        "message_msgpack": write_envelope("", value_codec(PACKED).encode(MESSAGE)),
        "call_msgpack": called(PACKED),
        "call_own": called(MIRROR),
        "result_msgpack": b'{"status":"done",%b,"at":7}'
        % pack_result(PLAIN, value_codec(PACKED).encode(MESSAGE), "mail", PLACE["id"]),
        "state": STATE.encode(),
        "outcome_done": to_json(Outcome("done", at=7)),
        "outcome_dead": to_json(Outcome("dead", failure=FAILURE, reason="all 2 attempts failed", at=7)),
        "sealed_hmac": sealing().wrap(body(), **PLACE),
        "result_hmac": b'{"status":"done",%b,"at":7}' % pack_result(sealing(), b"[1,2]", "mail", PLACE["id"]),
        "error_hmac": to_json(pack_failure(sealing(), FAILURE, "mail", PLACE["id"])),
        "blob_hmac": shelf.data,
    }


def written_with_chance() -> dict[str, bytes]:
    """Return the files of this version that hold a nonce or a random name, or depend on the version of zlib."""
    shelf = Shelf()
    return {
        "sealed_gcm": sealing(encrypt=True).wrap(body(), **PLACE),
        "sealed_gcm_compressed": sealing(encrypt=True, compress=100).wrap(large_body(), **PLACE),
        "compressed": sealing(keys=False, compress=100).wrap(large_body(), **PLACE),
        "claim_hmac": sealing(shelf).wrap(large_body(), **PLACE),
        "result_gcm": b'{"status":"done",%b,"at":7}'
        % pack_result(sealing(encrypt=True), b"[1,2]", "mail", PLACE["id"]),
    }


def value_codec(formats: FormatRegistry) -> FormatCodec[object]:
    return codec_for(Any, formats=formats, max_payload=1000, what="it")


def keep(release: str) -> None:
    """Write the files of a release that has none yet."""
    place = HOME / release
    place.mkdir()
    for name, data in (written() | written_with_chance()).items():
        (place / f"{name}.bin").write_bytes(data)


@pytest.fixture(params=RELEASES)
def golden(request: pytest.FixtureRequest) -> dict[str, bytes]:
    """The files of one release by their names."""
    return {path.stem: path.read_bytes() for path in (HOME / request.param).glob("*.bin")}


@pytest.mark.row("D3")
def test_every_release_is_still_read(golden):
    """Envelopes, states, outcomes and sealed bytes of each release mean the same to this version."""
    plain, extra, message = (read_envelope(golden[name]) for name in ("envelope_plain", "envelope_extra", "message"))
    assert (plain.task, plain.body, plain.is_plain) == ("mail.send", body(), True)
    assert (extra.priority, extra.expires_ms, extra.due_ms) == (9, 1_764_000_000_000, 1_763_000_000_000)
    assert (extra.own_id, extra.unique, extra.body) == (True, "order 7", body())
    assert extra.extra == EnvelopeOptions(
        headers={"trace": "1\n2"}, timeout_ms=2000, keep_ms=60_000, attempts=3, version=2
    )
    assert (message.task, message.body) == ("", b'{"id":1}')
    args, kwargs = TaskSignature(mail, "mail.send").decode(plain.body)
    assert (args, kwargs) == (["ada@example.org", 2, "a", "ü\n"], {"urgent": True, "x": 1.5})
    state = AttemptHistory.decode(golden["state"])
    assert state == STATE
    assert AttemptHistory.decode(golden.get("state_alone", golden["state"])) == STATE
    assert state.failures_list()[0] == FAILURE
    assert read_outcome(golden["outcome_done"]).status == "done"
    assert read_outcome(golden["outcome_dead"]).failure == FAILURE


@pytest.mark.row("D3")
def test_formats_of_every_release_are_read(golden):
    """Messages, calls and results in other formats than JSON mean the same to this version, and JSON itself is read beside them."""
    assert value_codec(PACKED).decode(read_envelope(golden["message_msgpack"]).body) == MESSAGE
    result = open_result(None, read_outcome(golden["result_msgpack"]), "mail", PLACE["id"], 100)
    assert value_codec(PACKED).decode(result) == MESSAGE
    signature = TaskSignature(mail, "mail.send", formats=PACKED)
    for name in ("call_msgpack", "call_own"):
        assert signature.decode(read_envelope(golden[name]).body) == (["ada", 2, "a"], {"urgent": False, "x": 1.5})
    assert signature.decode(read_envelope(golden["envelope_plain"]).body)[0] == ["ada@example.org", 2, "a", "ü\n"]


@pytest.mark.row("D3")
def test_sealed_bytes_of_every_release_open(golden):
    """Bodies that earlier releases sealed, compressed or stored elsewhere open with the keys of then."""
    keyed = sealing()
    for name, algorithm, form in (
        ("sealed_hmac", HMAC, 0), ("sealed_gcm", GCM, 0), ("sealed_gcm_compressed", GCM, COMPRESSED),
        ("compressed", BARE, COMPRESSED), ("claim_hmac", HMAC, ELSEWHERE),
    ):  # fmt: skip
        header = read_wrapped(golden[name])
        assert (header.algorithm, header.form) == (algorithm, form)
        opener = PLAIN if algorithm == BARE else sealing(Shelf(golden["blob_hmac"]))
        assert opener.unwrap(golden[name], **PLACE) == (
            body() if name in {"sealed_hmac", "sealed_gcm"} else large_body()
        )
        assert ("2026-11" in describe(golden[name])) is (algorithm != BARE)
        if algorithm != BARE:
            with pytest.raises(PayloadError, match="E38"):
                PLAIN.unwrap(golden[name], **PLACE)
    for name in ("result_hmac", "result_gcm"):
        assert open_result(keyed, read_outcome(golden[name]), "mail", PLACE["id"], 100) == b"[1,2]"
    assert open_failure(keyed, read_failure(golden["error_hmac"]), "mail", PLACE["id"]) == FAILURE


def test_the_same_bytes_are_written_again():
    """Where nothing is random this version writes what the files of its layout hold, byte for byte."""
    newest = {path.stem: path.read_bytes() for path in (HOME / RELEASES[-1]).glob("*.bin")}
    assert {name: data for name, data in written().items() if newest[name] != data} == {}
    assert newest.keys() - NO_LONGER_WRITTEN == written().keys() | written_with_chance().keys()
