"""Results and errors, wrapped like payloads: they are as secret as the arguments of their job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from conveyor.errors import PayloadError
from conveyor.payload.formats import JSON, MARK, FormatRegistry, body_text
from conveyor.payload.live_records import LogLine, Progress, open_lines, open_progress, show_notes
from conveyor.payload.pipeline import MAX_LARGE, PLAIN, PayloadPipeline
from conveyor.payload.records import Failure, Outcome, RunRecord
from conveyor.payload.redaction import REDACTED, Hide, Redaction
from conveyor.payload.versions import sealed_name
from conveyor.payload.wrapped import MAGIC, describe, from_base64, to_base64

# Bound to queue and id, not to the task: the reader of a result may not know the task, and an id is one job's.
_NO_TASK = ""
_UNOPENED = frozenset({"E38", "E39", "E40", "E41", "E43", "E50"})
"""Errors about a body that was not opened or decoded. They quote nothing of it, and must be readable without keys."""


def pack_result(sealing: PayloadPipeline, value: bytes, queue: str, id: str) -> bytes:  # noqa: A002
    """Return the member of the outcome's JSON that contains *value*."""
    data = sealing.wrap(value, queue=queue, task=_NO_TASK, id=id, kind=b"result")
    return b'"packed":"%b"' % to_base64(data) if data[:1] in {MAGIC, MARK} else b'"value":%b' % value


def pack_arguments(body: bytes) -> bytes:
    """Return the member of a RunRecord's JSON that contains *body*, the arguments as they were stored."""
    return b'"packed":"%b"' % to_base64(body) if body[:1] in {MAGIC, MARK} else b'"body":%b' % body


def open_result(sealing: PayloadPipeline | None, outcome: Outcome, queue: str, id: str, limit: int) -> bytes:  # noqa: A002
    """Return the body of a result; raises PayloadError as `PayloadPipeline.unwrap` does."""
    opener = sealing or PLAIN
    data = from_base64(outcome.packed) if outcome.packed else bytes(outcome.value)
    try:
        return opener.unwrap(data, queue=queue, task=_NO_TASK, id=id, limit=limit, kind=b"result")
    except PayloadError as error:
        raise PayloadError(f"The result of {queue}:{id} cannot be opened. {error}", code=error.code) from None


def pack_part(sealing: PayloadPipeline | None, value: bytes, queue: str, id: str, part: str) -> bytes:  # noqa: A002
    """Return the bytes of a partial result as they are stored, bound to its place in the stream of the job."""
    return (sealing or PLAIN).wrap(value, queue=queue, task=_NO_TASK, id=f"{id}\t{part}", kind=b"part")


def open_part(sealing: PayloadPipeline | None, data: bytes, queue: str, id: str, part: str, limit: int) -> bytes:  # noqa: A002
    """Return the body of a partial result; raises PayloadError as `PayloadPipeline.unwrap` does."""
    try:
        return (sealing or PLAIN).unwrap(
            data, queue=queue, task=_NO_TASK, id=f"{id}\t{part}", limit=limit, kind=b"part"
        )
    except PayloadError as error:
        raise PayloadError(f"Part {part} of {queue}:{id} cannot be opened. {error}", code=error.code) from None


def pack_failure(sealing: PayloadPipeline, failure: Failure, queue: str, id: str) -> Failure:  # noqa: A002
    """Return *failure* with its texts wrapped; its class and its place in the code stay readable, for sorting."""
    body = msgspec.json.encode((failure.message, failure.traceback))
    data = sealing.wrap(body, queue=queue, task=_NO_TASK, id=id, kind=b"error")
    if data[:1] != MAGIC:
        return failure
    return replace(failure, message=describe(data), traceback="", packed=to_base64(data).decode())


def pack_refusal(sealing: PayloadPipeline, failure: Failure, code: str, queue: str, id: str) -> Failure:  # noqa: A002
    """Return *failure* of a body that could not be read, wrapped where it may quote the body (a value of no Enum)."""
    return failure if code in _UNOPENED else pack_failure(sealing, failure, queue, id)


def open_failure(sealing: PayloadPipeline | None, failure: Failure, queue: str, id: str) -> Failure:  # noqa: A002
    """Return *failure* with its texts, or with the reason why they cannot be read here. Stored bytes never make it raise."""
    if not failure.packed:
        return failure
    try:
        body = (sealing or PLAIN).unwrap(
            from_base64(failure.packed), queue=queue, task=_NO_TASK, id=id, kind=b"error", limit=1 << 20
        )
        message, traceback = msgspec.json.decode(body, type=tuple[str, str])
    except PayloadError as error:
        message, traceback = f"{failure.message}. {error}", ""
    except msgspec.MsgspecError:
        message, traceback = f"{failure.message}. The sealed value is not an error.", ""
    return replace(failure, message=message, traceback=traceback, packed="")


class RecordDecoder(NamedTuple):
    """
    Shows bodies, results and errors to people, with the keys, the store and the formats of an app.

    With a *redaction* they see what it leaves of them; None: everything.
    """

    sealing: PayloadPipeline | None = None
    formats: FormatRegistry = JSON
    redaction: Redaction | None = None

    def preview(self, body: bytes, queue: str, task: str, id: str, *, call: bool) -> str:  # noqa: A002
        """Return a body as people see it: its value as JSON, or a description; reads no store."""
        return self.preview_and_hide(body, queue, task, id, call=call)[0]

    def preview_and_hide(
        self, body: bytes, queue: str, task: str, id: str, *, limit: int = MAX_LARGE, call: bool  # noqa: A002
    ) -> tuple[str, Hide | None]:  # fmt: skip
        """Return a body likewise, and the function that takes what is hidden in it out of other texts; None: nothing is."""
        text = self._opened(body, queue, task, id, limit, call=call)
        name = task.partition("\t")[0] if call else ""
        if not self.redaction or not self.redaction.concerns(name):
            return text, None
        return self.redaction.body(text, name), self.redaction.lazy_hider(text, name)

    def _opened(self, body: bytes, queue: str, task: str, id: str, limit: int, *, call: bool) -> str:  # noqa: A002
        if body[:1] == MAGIC:
            opener: Any = self.sealing or PLAIN
            try:
                if opener.is_stored_elsewhere(body):
                    where = opener.reference(body, queue=queue, task=task, id=id)
                    return f"stored elsewhere as {where.name}: {where.size:,} bytes"
                body = opener.unwrap(body, queue=queue, task=task, id=id, limit=limit)
            except PayloadError as error:
                return f"{describe(body)}; {error.code}"
        return self._text_of(body, call=call)

    def _text_of(self, body: bytes, *, call: bool) -> str:
        text = body_text(body, self.formats, call=call)
        if not self.redaction or body[:1] != MARK or text.startswith(f"{len(body):,} bytes"):
            return text
        try:
            msgspec.json.decode(text)
        except (msgspec.MsgspecError, RecursionError):
            return f'"{REDACTED}"'  # the text of a value without a JSON form is its class's own: no field can be found in it
        return text

    def arguments(self, run: RunRecord, queue: str, id: str) -> str | None:  # noqa: A002
        """Return the arguments of a run as people see them; None where they are not kept."""
        return self.arguments_and_hide(run, queue, id)[0]

    def arguments_and_hide(self, run: RunRecord, queue: str, id: str) -> tuple[str | None, Hide | None]:  # noqa: A002
        """Return the arguments of a run, and what `preview_and_hide` returns besides."""
        try:
            body = stored_arguments(run)
        except PayloadError as error:
            return str(error), None
        if not body:
            return None, None
        return self.preview_and_hide(body, queue, sealed_name(run.task, run.version), id, call=True)

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers as people see them."""
        return self.redaction.headers(headers) if self.redaction else dict(headers)

    def result(self, outcome: Outcome, queue: str, id: str) -> str:  # noqa: A002
        """Return a result as people see it."""
        try:
            text = self._text_of(open_result(self.sealing, outcome, queue, id, MAX_LARGE), call=False)
        except PayloadError as error:
            return str(error)
        task = "" if outcome.run is None else outcome.run.task
        return self.redaction.result(text, task) if self.redaction else text

    def progress(self, stored: bytes, queue: str, id: str) -> Progress | None:  # noqa: A002
        """Return a stored progress, with its text as far as it can be read."""
        return open_progress(self.sealing, stored, queue, id)

    def notes(self, stored: bytes, queue: str, id: str) -> dict[str, Any]:  # noqa: A002
        """Return stored notes, or a description of those that cannot be read."""
        notes = show_notes(self.sealing, stored, queue, id)
        return dict(self.redaction.value(notes)) if self.redaction else notes

    def lines(self, portions: Iterable[bytes], queue: str, id: str) -> list[LogLine]:  # noqa: A002
        """Return stored lines, as far as they can be read."""
        return [line for portion in portions for line in open_lines(self.sealing, portion, queue, id)]

    def failure(self, failure: Failure, queue: str, id: str) -> Failure:  # noqa: A002
        """Return an error with its texts, as far as they can be read."""
        return open_failure(self.sealing, failure, queue, id)


def stored_arguments(run: RunRecord) -> bytes:
    """Return the arguments of a run as its envelope had them; b"" where they are not kept. Raises PayloadError."""
    return from_base64(run.packed) if run.packed else bytes(run.body)
