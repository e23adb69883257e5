"""The progress, notes and log lines of a job, as they are stored. Their texts are as secret as its arguments."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from conveyor.errors import PayloadError
from conveyor.payload.failures import shorten
from conveyor.payload.pipeline import PLAIN, BodyKind, PayloadPipeline
from conveyor.payload.wrapped import MAGIC, describe, from_base64, to_base64
from conveyor.units import instant

NOTES_BYTES = 8 * 1024
"""Bytes of JSON that the notes of a job may take."""
TEXT_BYTES = 300
"""Bytes of the text of a progress that are kept."""
_LIMIT = 1 << 20


class Progress(msgspec.Struct, frozen=True):
    """The progress of a job: `done` of `total`, and a text; None and "" stand for what the job did not tell."""

    done: float | None = None
    total: float | None = None
    text: str = ""

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None where that is not known."""
        if self.done is None or not self.total:
            return None
        return min(1.0, self.done / self.total)

    def __str__(self) -> str:
        counts = "" if self.done is None else f"{self.done:,}" + (f" of {self.total:,}" if self.total else "")
        if self.fraction is not None:
            counts += f" ({self.fraction:.0%})"
        return ": ".join(part for part in (counts, self.text) if part)


StoredLine = tuple[int, str, str, str]
"""A line that a job logged: ms since the epoch, level, logger and text."""


class LogLine(msgspec.Struct, frozen=True):
    """A line that a job logged: when, at what level, through which logger, in which attempt."""

    at: datetime
    level: str
    logger: str
    message: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.at.astimezone():%H:%M:%S} {self.level:<7} {self.message}"


class _StoredProgress(msgspec.Struct, omit_defaults=True):
    done: float | None = None
    total: float | None = None
    text: str = ""
    packed: str = ""


_PROGRESS = msgspec.json.Decoder(_StoredProgress)
_LINES = msgspec.json.Decoder(tuple[int, list[StoredLine]])
_encode = msgspec.json.Encoder().encode


def pack_progress(sealing: PayloadPipeline | None, progress: Progress, queue: str, id: str) -> bytes:  # noqa: A002
    """Return the stored form of *progress*, its text wrapped as an error's is; the numbers stay readable."""
    text, packed = shorten(progress.text, TEXT_BYTES), ""
    if sealing is not None and text:
        data = _wrap(sealing, text.encode(), queue, id, b"progress")
        if data[:1] == MAGIC:
            text, packed = "", to_base64(data).decode()
    return _encode(_StoredProgress(_whole(progress.done), _whole(progress.total), text, packed))


def open_progress(sealing: PayloadPipeline | None, stored: bytes, queue: str, id: str) -> Progress | None:  # noqa: A002
    """Return a stored progress; a text that cannot be read here is described. Stored bytes never make it raise."""
    try:
        found = _PROGRESS.decode(stored) if stored else None
    except (msgspec.MsgspecError, ValueError):
        return None
    if found is None:
        return None
    text = found.text
    if found.packed:
        try:
            text = _unwrap(sealing, found.packed, queue, id, b"progress").decode(errors="replace")
        except PayloadError as error:
            text = _described(found.packed, error)
    return Progress(_whole(found.done), _whole(found.total), text)


def pack_notes(sealing: PayloadPipeline | None, notes: bytes, queue: str, id: str) -> bytes:  # noqa: A002
    """Return the stored form of *notes*, the JSON of an object: that, or a text when it is wrapped."""
    if sealing is None or notes in {b"", b"{}"}:
        return b"" if notes == b"{}" else notes
    data = _wrap(sealing, notes, queue, id, b"notes")
    return b'"%b"' % to_base64(data) if data[:1] == MAGIC else notes


def open_notes(sealing: PayloadPipeline | None, stored: bytes, queue: str, id: str) -> dict[str, Any]:  # noqa: A002
    """Return stored notes; raises PayloadError where they cannot be read here."""
    if not stored:
        return {}
    try:
        if stored[:1] == b'"':
            stored = _unwrap(sealing, msgspec.json.decode(stored, type=str), queue, id, b"notes")
        elif sealing is not None and sealing.sealer is not None:
            raise PayloadError("They are not sealed, and this program takes only what is sealed.", code="E41")
        return msgspec.json.decode(stored, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError) as error:
        raise PayloadError(f"The notes of {queue}:{id} cannot be read: {error}.", code="E15") from None


def show_notes(sealing: PayloadPipeline | None, stored: bytes, queue: str, id: str) -> dict[str, Any]:  # noqa: A002
    """Return stored notes for people: those that cannot be read here are described. Stored bytes never make it raise."""
    try:
        return open_notes(sealing, stored, queue, id)
    except PayloadError as error:
        return {"(unreadable)": f"{error.code}: {error}"}


def pack_lines(
    sealing: PayloadPipeline | None, lines: Sequence[StoredLine], attempt: int, queue: str, id: str  # noqa: A002
) -> bytes:  # fmt: skip
    """Return the stored form of lines of an attempt: JSON, or that wrapped."""
    data = _encode((attempt, lines))
    return data if sealing is None else _wrap(sealing, data, queue, id, b"logs")


def open_lines(sealing: PayloadPipeline | None, stored: bytes, queue: str, id: str) -> list[LogLine]:  # noqa: A002
    """Return stored lines; those that cannot be read here are one that says so. Stored bytes never make it raise."""
    try:
        data = (sealing or PLAIN).unwrap(stored, queue=queue, task="", id=id, kind=b"logs", limit=_LIMIT)
        attempt, lines = _LINES.decode(data)
        return [LogLine(instant(at), level, logger, message, attempt) for at, level, logger, message in lines]
    except PayloadError as error:
        text = f"{describe(stored)}; {error.code}"
    except (msgspec.MsgspecError, ValueError, OverflowError, OSError) as error:
        text = f"these lines cannot be read: {error}"
    return [LogLine(instant(0), "ERROR", "conveyor", text, 0)]


def _wrap(sealing: PayloadPipeline, body: bytes, queue: str, id_: str, kind: BodyKind) -> bytes:
    return sealing.wrap(body, queue=queue, task="", id=id_, kind=kind)


def _unwrap(sealing: PayloadPipeline | None, packed: str, queue: str, id_: str, kind: BodyKind) -> bytes:
    return (sealing or PLAIN).unwrap(from_base64(packed), queue=queue, task="", id=id_, kind=kind, limit=_LIMIT)


def _described(packed: str, error: PayloadError) -> str:
    try:
        return f"{describe(binascii.a2b_base64(packed.encode()))}; {error.code}"
    except ValueError:
        return str(error)


def _whole(number: float | None) -> float | None:
    """Return a whole number as an int: `3 of 10` and not `3.0 of 10.0`."""
    return int(number) if isinstance(number, float) and number.is_integer() else number
